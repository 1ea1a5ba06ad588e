"""Evaluate: validation loss while training, and answers by generation.

    python pipelines/evaluate.py --model runs/demo/final --data data/shapes --split val --swap-images \\
        --out runs/demo/eval.json

asks the model every question of a built dataset (see pipelines.questions) that has a picture before it,
compares the answers exactly, and writes

    {"accuracy": 0.94, "accuracy_swapped": 0.21, "num_questions": 412}

``--swap-images`` asks everything again with every picture replaced by another one: a model that looks falls
to chance, one that guesses from the text alone does not fall.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # a file run by its path (PEP 366); the folder is `omnipipelines` in a wheel
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = Path(__file__).resolve().parent.name

import torch
import transformers

from omnidata import Dataset
from omnidata.images.slices import slicing_of
from omnidata.profiles.fingerprint import check_fingerprint
from omnidata.profiles.opening import processor_folder
from omnidata.schema import UserError
from omnidata.text.tokenizer import fingerprint
from omnimodel.packed import class_for, config_of

from .by_group import GroupCounts
from .config import Recipe
from .data import model_inputs, open_datasets, val_loader
from .ema import Ema
from .model import BuiltModel
from .parallel import World, compute_dtype
from .prompts import ProcessorPrompts, prompts_for
from .questions import (
    Answer,
    Prompts,
    Question,
    answer_questions,
    answer_share,
    questions_of,
    with_swapped_images,
)


class Evaluation:
    """The validation data of a recipe, looked at again and again while training."""

    def __init__(self, recipe: Recipe, world: World, built: BuiltModel, ema: Ema | None = None) -> None:
        self.recipe, self.world, self.model, self.ema = recipe, world, built.model, ema
        self._questions: list[Question] | None = None

    def run(self) -> dict[str, float]:
        """Validation figures; none without validation data. A collective of all ranks.

        With ``optim.ema`` each is there a second time, of the weights' running mean: ``val_loss_ema``.
        """
        figures = self._figures()
        if self.ema is not None and figures:
            with self.ema.in_place():
                figures |= {f"{name}_ema": value for name, value in self._figures().items()}
        return figures

    def _figures(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        if self.recipe.data.val and self.recipe.eval.num_batches:
            figures |= self.losses()
        if self.recipe.data.val and self.recipe.eval.num_questions:
            figures |= self.answers()
        return figures

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Mean loss over supervised tokens of the first ``num_batches`` packs; log.by: each group's, too."""
        loader = val_loader(self.recipe, self.world, self.model.config)
        num_steps = math.ceil(self.recipe.eval.num_batches / self.recipe.data.global_batch)
        total, tokens, seen = 0.0, 0, set()
        by_group = GroupCounts(loader.group_names, self.world.device)
        self.model.eval()
        for microbatch in itertools.islice(loader, num_steps * loader.microbatches_per_step):
            with compute_dtype(self.recipe.run, self.world), by_group.watching(microbatch):
                loss = self.model(**model_inputs(microbatch, self.world.device)).loss
            # Every microbatch was divided by its step's number of tokens: undo that, divide by all of them.
            total += loss.item() * microbatch.num_supervised_tokens
            if microbatch.step not in seen:
                seen.add(microbatch.step)
                tokens += microbatch.num_supervised_tokens
        self.model.train()
        figures = {"val_loss": self.world.sum([total])[0] / max(1, tokens)}
        return figures | by_group.line(self.world, prefix="val_")

    def answers(self) -> dict[str, float]:
        """Exact match and F1 of generated answers, which the ranks share."""
        if self._questions is None:
            self._questions = self._read_questions()
        world = self.world
        with compute_dtype(self.recipe.run, world):
            answers = answer_share(self._prompts, self._questions, world)
        exact, f1, count = world.sum(
            [sum(answer.is_exact for answer in answers), sum(answer.f1 for answer in answers), len(answers)]
        )
        return {"val_accuracy": exact / count, "val_f1": f1 / count} if count else {}

    def _read_questions(self) -> list[Question]:
        datasets = open_datasets(self.recipe.data.val)
        first = datasets[0]
        folder = first.tokenizer_dir if first.manifest.is_omnilmm else processor_folder(first.path)
        self._prompts = prompts_for(self.model, folder, first.manifest.profile)
        questions = itertools.chain.from_iterable(
            questions_of(dataset, self._prompts) for dataset in datasets
        )
        return list(itertools.islice(questions, self.recipe.eval.num_questions))


# --- the script -------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """See the module's docstring."""
    options = _parser().parse_args(arguments)
    try:
        report = evaluate(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = json.dumps(report)
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(text + "\n")
    print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of save_pretrained")
    parser.add_argument("--data", required=True, metavar="DATASET", help="built dataset")
    parser.add_argument("--split", help="only this split of it")
    parser.add_argument("--out", metavar="FILE", help="write the figures to this JSON file")
    parser.add_argument(
        "--answers", metavar="FILE", help="write every question and answer to this JSONL file"
    )
    parser.add_argument("--swap-images", action="store_true", help="also measure with every picture swapped")
    parser.add_argument("--text-only", action="store_true", help="also ask questions that have no picture")
    parser.add_argument("--limit", type=int, metavar="N", help="at most this many questions")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return parser


def evaluate(options: argparse.Namespace) -> dict[str, float | int]:
    """The figures of one model on one dataset."""
    dataset = Dataset(options.data, options.split)
    prompts = load_for_answers(options.model, device=options.device, dtype=options.dtype)
    refuse_other_data(prompts, dataset, options.model)
    found = questions_of(dataset, prompts, with_text_only=options.text_only)
    questions = list(itertools.islice(found, options.limit))
    if not questions:
        raise UserError(
            f"{dataset.path} has no question with a picture before it; --text-only asks the others"
        )
    report: dict[str, float | int] = {}
    with _answers_file(options.answers) as file:
        passes = {"accuracy": questions}
        if options.swap_images:
            passes["accuracy_swapped"] = with_swapped_images(questions)
        for name, asked in passes.items():
            answers = answer_questions(prompts, asked, batch_size=options.batch_size)
            report[name] = round(sum(answer.is_exact for answer in answers) / len(answers), 4)
            f1 = sum(answer.f1 for answer in answers) / len(answers)
            if len(asked) < len(questions):
                report["num_swapped"] = len(asked)  # the others' pictures have no other of as many tokens
            print(f"{name} {report[name]:.1%} of {len(answers)} questions, word F1 {f1:.1%}", file=sys.stderr)
            for answer in answers if file else ():
                file.write(json.dumps(_line(answer, name), ensure_ascii=False) + "\n")
    return report | {"num_questions": len(questions)}


def _answers_file(path: str | None) -> contextlib.AbstractContextManager[Any]:
    return open(path, "w") if path else contextlib.nullcontext()


def _line(answer: Answer, figure: str) -> dict[str, Any]:
    return {
        "figure": figure,
        "key": answer.question.key,
        "answer": answer.text,
        "truth": answer.truth,
        "exact": answer.is_exact,
    }


def refuse_other_data(prompts: Prompts, dataset: Dataset, folder: str) -> None:
    """UserError for a dataset whose prompts are not those that the model was trained on."""
    manifest = dataset.manifest
    if fingerprint(prompts.tokenizer) != manifest.tokenizer_fingerprint:
        raise UserError(f"{folder} and {dataset.path} have tokenizers that tokenize differently")
    if isinstance(prompts, ProcessorPrompts) == manifest.is_omnilmm:
        built = "OmniLMM" if manifest.is_omnilmm else manifest.profile["processor"]
        raise UserError(f"{dataset.path} was built for {built}, but {folder} is another kind of model")
    if isinstance(prompts, ProcessorPrompts):
        check_fingerprint(prompts.profile, manifest.profile["fingerprint"], where=dataset.path)
        return
    slicing = prompts.model.config.slicing
    trained, cut = slicing_of(slicing), slicing_of(manifest.settings)
    if manifest.num_images and trained != cut:
        raise UserError(
            f"{dataset.path} cuts pictures as {cut and cut.to_json()}, but {folder} was trained with "
            f"{slicing}: build the dataset with the model's --max-slices, --slice-size, --slice-tokens"
        )


def load_for_answers(folder: str, *, device: str, dtype: str) -> Prompts:
    """A trained model with its prompts, ready to generate."""
    if not (Path(folder) / "config.json").exists():
        raise UserError(
            f"{folder} is no model folder: it has no config.json (a finished run writes RUN/final)"
        )
    transformers.utils.logging.disable_progress_bar()
    try:
        config = config_of(folder)
        model = class_for(config).from_pretrained(folder, config=config, dtype=getattr(torch, dtype))
    except (ValueError, OSError) as error:
        raise UserError(f"{folder}: {error}") from error
    return prompts_for(model.to(device).eval(), folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
