"""A dataloader for accelerate's loops that is not sharded twice.

    accelerator = Accelerator()
    batches = packs("data/mix", accelerator, model, max_tokens=8192, global_batch=64, num_epochs=2)
    model, optimizer = accelerator.prepare(model, optimizer)      # not the batches: they are dealt to ranks
    already
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()

``packs`` sets the accelerator's ``gradient_accumulation_steps`` and registers the state, so that
``accelerator.save_state`` and ``load_state`` carry it. accelerate takes means over microbatches and ranks;
the batches' ``num_items_in_batch`` is such that these means are the step's loss.
``accelerator.prepare(batches)`` leaves them as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import send_to_device

from omnidata.adapters.stream import Stream, check_parallelism, open_packs
from omnidata.loader.loader import PackLoader
from omnidata.schema import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DeviceStream(Stream):
    """A Stream whose tensors are on the accelerator's device."""

    def __init__(self, loader: PackLoader, accelerator: Accelerator, model: PreTrainedModel) -> None:
        steps = loader.microbatches_per_step
        super().__init__(loader, model, averaged_over=steps * loader.world_size)
        self._device = accelerator.device

    def __iter__(self) -> Iterator[dict[str, object]]:
        for batch in super().__iter__():
            yield send_to_device(batch, self._device, non_blocking=True)


def packs(
    data: object, accelerator: Accelerator, model: PreTrainedModel | None = None, **settings: Any
) -> DeviceStream:
    """This rank's batches, registered with the accelerator.

    Args:
        data: as PackLoader's.
        accelerator: its rank and number of ranks are taken.
        model: checked before ``accelerator.prepare`` wraps it; see Stream.
        settings: of PackLoader: max_tokens, global_batch, num_epochs, num_workers, ...

    Raises:
        UserError: the accelerator accumulates another number of microbatches, or its ranks share them.
    """
    check_parallelism(getattr(accelerator, "parallelism_config", None))
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    pinned = {"pin_memory": accelerator.device.type == "cuda"}
    stream = DeviceStream(open_packs(data, **ranks, **pinned, **settings), accelerator, model)
    set_already, wanted = accelerator.gradient_accumulation_steps, stream.microbatches_per_step
    if set_already not in (1, wanted):
        raise UserError(
            f"gradient_accumulation_steps is {set_already}, and a step of these packs has "
            f"{wanted} microbatches on every rank: leave it out of Accelerator(), or change global_batch"
        )
    accelerator.gradient_accumulation_steps = wanted
    accelerator.register_for_checkpointing(stream)
    return stream
