"""Stream: the plan's microbatches of this rank, one after the other, as a model's forward takes them.

The state is the loader's, a few integers, exact at any number of ranks and workers. A host may shard,
shuffle or wrap nothing of it: it is dealt to ranks already. A step is ``microbatches_per_step`` batches on
every rank; the state stands behind the last step that was yielded whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from omnidata.adapters.batch import model_class, model_inputs, token_types_name
from omnidata.adapters.isolation import check_model
from omnidata.loader.loader import PackLoader
from omnidata.schema import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_packs(data: object, **settings: Any) -> PackLoader:
    """A PackLoader of these settings, each of whose microbatches calls the tower of a processor's model.

    Hosts shard models and wait for every rank's gradients: a rank without pictures would leave the others
    waiting, or end with DDP's "parameters that were not used". ``dummy_picture=False`` leaves it out.
    """
    return PackLoader(data, **{"dummy_picture": True, **settings})


def check_parallelism(config: Any) -> None:
    """UserError if ranks share a microbatch, as accelerate's ParallelismConfig may say; None: it does not."""
    if config is not None and config.non_data_parallel_size > 1:
        raise UserError(
            f"tensor, context or sequence parallel ranks share a microbatch (tp {config.tp_size}, cp "
            f"{config.cp_size}, sp {config.sp_size}), and packs are dealt to every rank: use data parallel "
            "ranks only (DDP, FSDP)"
        )


class Stream:
    """Iterates over ``model_inputs`` of a loader's microbatches; made once for a run, iterated once.

    Args:
        loader: of this rank.
        model: to be checked before it is wrapped; None leaves that to the caller (``isolation.check_model``).
        averaged_over: see ``model_inputs``.

    Raises:
        UserError: the model cannot learn from these packs, or ignores the number that its loss is divided by.
    """

    def __init__(
        self, loader: PackLoader, model: PreTrainedModel | None = None, *, averaged_over: int = 1
    ) -> None:
        self.loader, self._averaged_over = loader, averaged_over
        kind = model_class(loader.plan.sources[0].index.dataset)
        self.token_types = None if kind is None else token_types_name(kind)
        if model is not None and not check_model(model, loader, token_types=self.token_types):
            raise UserError(
                f"{type(model).__name__} does not divide its loss by num_items_in_batch, so a step's loss "
                "would be a mean of means: leave the model out here, and take batch.summed_loss of its logits"
            )

    @property
    def microbatches_per_step(self) -> int:
        """Batches of this rank before an update."""
        return self.loader.microbatches_per_step

    def __iter__(self) -> Iterator[dict[str, object]]:
        for microbatch in self.loader:
            yield model_inputs(microbatch, token_types=self.token_types, averaged_over=self._averaged_over)

    def __len__(self) -> int:
        """Batches of all epochs, wherever the stream stands."""
        if self.loader.num_epochs is None:
            raise TypeError("the stream goes on for ever: num_epochs is None")
        steps = sum(self.loader.steps_per_epoch(epoch) for epoch in range(self.loader.num_epochs))
        return steps * self.microbatches_per_step

    def state_dict(self) -> dict[str, object]:
        """The position behind the last step that was yielded whole."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from there; UserError if it is of other data or settings."""
        self.loader.load_state_dict(state)
