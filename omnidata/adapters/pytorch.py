"""A dataset for torch's own loaders: an IterableDataset with a state, as torchdata's StatefulDataLoader has.

    dataset = PackDataset("data/mix", model, max_tokens=8192, global_batch=64, rank=rank, world_size=size)
    loader = StatefulDataLoader(dataset, batch_size=None)         # a batch is a pack already

The loss of a batch is its share of the step's: sum it over microbatches and ranks.
``averaged_over=world_size`` is for DDP and FSDP, which take the mean of the ranks' gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset, get_worker_info

from omnidata.adapters.stream import Stream, open_packs
from omnidata.schema import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PackDataset(Stream, IterableDataset):
    """This rank's microbatches. ``model`` and ``averaged_over`` as Stream's, all else as PackLoader's."""

    def __init__(
        self, data: Any, model: PreTrainedModel | None = None, *, averaged_over: int = 1, **settings: Any
    ) -> None:
        Stream.__init__(self, open_packs(data, **settings), model, averaged_over=averaged_over)

    def __iter__(self) -> Any:
        """UserError in one of several worker processes: each would yield everything."""
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise UserError(
                f"{worker.num_workers} workers of a DataLoader would each yield every pack: give PackDataset "
                "its own num_workers, and the DataLoader num_workers=0"
            )
        return super().__iter__()
