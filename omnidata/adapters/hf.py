"""A dataset in Hugging Face's Trainer and in TRL's SFTTrainer.

    data = train_dataset("data/mix", model, max_tokens=8192, global_batch=64, num_epochs=2)
    args = TrainingArguments("runs/sft", **data.arguments(), learning_rate=1e-5)
    Trainer(model, args, train_dataset=data, data_collator=data.collator, callbacks=[data.callback]).train()

A row of the dataset is the number of one microbatch, which the collator reads (in the Trainer's worker
processes, if there are any), so ``per_device_train_batch_size`` is 1 and ``gradient_accumulation_steps``
makes the global batch. All epochs of the plan are one of the Trainer's (the plan's epochs differ by a few
packs, which the Trainer cannot know). Its sampler counts up and skips numbers on resuming: exact, at once,
at any number of ranks. The callback refuses settings that would change what is learned, and keeps the
loader's state in ``trainer_state.json``.

The loss of a step is the sum over its supervised tokens by their number. For many vision-language classes
(those with ``accepts_loss_kwargs = False``: Qwen-VL, Gemma 3, GLM-V) the Trainer would instead average the
means of microbatches and ranks. A model given to ``train_dataset`` that takes the number all the same is
told to say so; for others, and with a tokenizer only, give the Trainer ``compute_loss_func=data.loss``.
"""

from __future__ import annotations

import inspect
import os
from dataclasses import fields
from typing import Any

import datasets
import datasets.table
import numpy as np
import torch
from accelerate.state import AcceleratorState
from transformers import TrainerCallback, TrainingArguments

from omnidata.adapters.batch import model_class, model_inputs, summed_loss, token_types_name
from omnidata.adapters.isolation import check_model
from omnidata.adapters.microbatches import Microbatches
from omnidata.adapters.stream import check_parallelism, open_packs
from omnidata.dataset import Dataset
from omnidata.loader.loader import PackLoader
from omnidata.schema import UserError
from omnidata.text.tokenizer import fingerprint

NUMBER = "number"  # the column
STATE = "omnidata"  # its key among the callbacks' states in trainer_state.json; a PackLoader's state


def train_dataset(
    data: object,
    tokenizer_or_model: object,
    *,
    max_tokens: int = 4096,
    global_batch: int = 8,
    num_epochs: int = 1,
    world_size: int | None = None,
    **settings: Any,
) -> TrainDataset:
    """The packs of ``data`` for a Trainer.

    Args:
        data: as PackLoader's. tokenizer_or_model: checked against the dataset: a tokenizer or processor by
        what it does, a model by its
            vocabulary and by whether it keeps the documents of a pack apart.
        max_tokens: of a pack.
        global_batch: packs per step, over all ranks.
        num_epochs: how often the data is read.
        world_size: ranks; None asks torchrun's environment.
        settings: of PackLoader: max_images, seed, oversize, packs_per_microbatch, on_error, ...

    Raises:
        UserError: the dataset and the tokenizer or model do not fit.
    """
    world_size = world_size or int(os.environ.get("WORLD_SIZE", "1"))
    loader = open_packs(
        data,
        max_tokens=max_tokens,
        global_batch=global_batch,
        num_epochs=num_epochs,
        world_size=world_size,
        **settings,
    )
    return TrainDataset(loader, tokenizer_or_model)


class Collator:
    """The Trainer's ``data_collator``: the microbatch of a row, as the model's forward takes it."""

    def __init__(self, microbatches: Microbatches, token_types: str | None) -> None:
        self._microbatches, self._token_types = microbatches, token_types

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, object]:
        """The Trainer counts ``num_items_in_batch`` itself, so it is left out."""
        [row] = rows
        inputs = model_inputs(self._microbatches[row[NUMBER]], token_types=self._token_types)
        return {name: value for name, value in inputs.items() if name != "num_items_in_batch"}


class TrainDataset(datasets.Dataset):
    """Numbers of microbatches, with what a Trainer needs beside them; made by ``train_dataset``."""

    def __init__(self, loader: PackLoader, tokenizer_or_model: Any) -> None:
        self.microbatches = Microbatches(loader)
        numbers = datasets.table.InMemoryTable.from_pydict({NUMBER: np.arange(len(self.microbatches))})
        super().__init__(numbers, fingerprint=loader.plan.digest[:16])
        self.loader = loader
        self.source: Dataset = loader.plan.sources[0].index.dataset
        kind = model_class(self.source)
        self._token_types = None if kind is None else token_types_name(kind)
        self._takes_number = self._computed_loss = False
        self.collator = Collator(self.microbatches, self._token_types)
        if isinstance(tokenizer_or_model, torch.nn.Module):
            self.check_model(tokenizer_or_model)
            self._is_checked = True
        else:
            self._check_tokenizer(getattr(tokenizer_or_model, "tokenizer", tokenizer_or_model))
            self._is_checked = False

    # --- for the Trainer ----------------------------------------------------------------------------------

    @property
    def callback(self) -> PackCallback:
        """The Trainer's callback: checks before the first step, state in every checkpoint."""
        return PackCallback(self)

    def arguments(self, kind: type = TrainingArguments) -> dict[str, object]:
        """What the Trainer's arguments must be; ``kind``: their class, such as trl's SFTConfig."""
        wanted = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": self.loader.microbatches_per_step,
            "num_train_epochs": 1,
            "train_sampling_strategy": "sequential",
            "remove_unused_columns": False,
            "average_tokens_across_devices": True,
            "ignore_data_skip": False,
        }
        if "dataset_kwargs" in {field.name for field in fields(kind)}:  # trl's
            wanted |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "packing": False}
        return wanted

    # --- checks -------------------------------------------------------------------------------------------

    def check_arguments(self, args: Any) -> None:
        """UserError that lists every setting which would change what is learned."""
        wanted = self.arguments(type(args))
        problems = [
            f"{name} is {getattr(args, name)!r}, must be {value!r}"
            for name, value in wanted.items()
            if getattr(args, name) != value and not (name == "average_tokens_across_devices" and self._alone)
        ]
        if args.world_size != self.loader.world_size:
            problems.append(
                f"{args.world_size} ranks, but train_dataset was made for {self.loader.world_size}"
            )
        if args.label_smoothing_factor:
            problems.append(
                "label_smoothing_factor: the Trainer's smoothing takes labels as they stand, unshifted"
            )
        for name in ("split_batches", "dispatch_batches"):
            if getattr(args.accelerator_config, name):
                problems.append(f"accelerator_config.{name}: microbatches are dealt to ranks already")
        if args.n_gpu > 1:
            problems.append("one process drives several GPUs (DataParallel): start it with torchrun")
        if problems:
            raise UserError(
                "these training arguments do not fit the packs (take **data.arguments()):\n  "
                + "\n  ".join(problems)
            )

    @property
    def _alone(self) -> bool:
        return self.loader.world_size == 1  # the Trainer itself switches the average off then

    def _check_tokenizer(self, tokenizer: object) -> None:
        measured, built = fingerprint(tokenizer), self.source.manifest.tokenizer_fingerprint
        if measured != built:
            raise UserError(
                f"{self.source.path} was built with another tokenizer ({built[:12]}) than this one "
                f"({measured[:12]}): build it with the model's, or train the model that it was built for"
            )

    def check_model(self, model: object) -> None:
        """UserError if the model cannot learn from these packs."""
        self._takes_number = check_model(model, self.loader, token_types=self._token_types)
        if self._takes_number:
            unwrap_peft_model(model).accepts_loss_kwargs = True

    def check_once(self, model: object) -> None:
        """The model's check, if it was not given at the start."""
        if not self._is_checked:
            says = accepts_loss_kwargs(model)  # what the Trainer has read by now
            self.check_model(model)
            self._is_checked, self._takes_number = True, self._takes_number and says

    def check_loss(self) -> None:
        """UserError if a step's gradients were those of averaged means."""
        if not self._takes_number and not self._computed_loss:
            raise UserError(
                "the Trainer averages the means of this model's microbatches, so tokens of short replies "
                "would weigh more than others: give the Trainer compute_loss_func=data.loss"
            )

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """The Trainer's ``compute_loss_func``: see ``summed_loss``."""
        self._computed_loss = True
        return summed_loss(outputs["logits"], labels, num_items_in_batch)


def unwrap_peft_model(model: object) -> Any:
    """The model of transformers behind an adapter of peft's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def accepts_loss_kwargs(model: object) -> bool:
    """As the Trainer reads it: will it give the model the number of supervised tokens?"""
    whole = unwrap_peft_model(model)
    if hasattr(whole, "accepts_loss_kwargs"):
        return bool(whole.accepts_loss_kwargs)
    parameters = inspect.signature(whole.forward).parameters.values()
    return any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)


class PackCallback(TrainerCallback):
    """Refuses what does not fit, and keeps the loader's state in the Trainer's checkpoints."""

    def __init__(self, data: TrainDataset) -> None:
        self._data = data

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step: settings, model, and on resuming the data of the checkpoint."""
        self._data.check_arguments(args)
        check_parallelism(AcceleratorState().parallelism_config)
        self._data.check_once(kwargs["model"])
        if STATE in state.stateful_callbacks:
            self._data.microbatches.check_state(state.stateful_callbacks[STATE])
        elif state.global_step:
            raise UserError("the checkpoint has no loader's state: it was not trained with this callback")

    def on_pre_optimizer_step(self, args: object, state: object, control: object, **kwargs: Any) -> None:
        """Before any update: is the loss what it should be?"""
        self._data.check_loss()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The state for the checkpoint that follows."""
        if control.should_save:
            state.stateful_callbacks[STATE] = self._data.microbatches.state_dict(state.global_step)

    on_epoch_end = on_step_end
