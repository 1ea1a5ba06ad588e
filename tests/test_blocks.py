"""Recomputing changes no bit, compiling next to none, and names stay."""

import pytest
import torch
from tiny_model import gradients, pack, tiny_model

from omnimodel.blocks import checkpoint_blocks, compile_blocks, transformer_blocks
from omnimodel.parts import freeze


def saved_bytes(model):
    """Bytes that the forward keeps for the backward, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**pack()).loss
    del loss
    return sum(storages.values())


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_checkpointing_is_bit_identical(mode):
    plain, recomputed = tiny_model(), tiny_model()
    checkpoint_blocks(recomputed, mode)
    loss, grads = gradients(plain, pack())
    other_loss, other_grads = gradients(recomputed, pack())
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(grads[name], other_grads[name]) for name in grads)
    assert list(plain.state_dict()) == list(recomputed.state_dict())


def test_checkpointing_keeps_less_and_runs_each_block_again():
    model, calls = tiny_model(), []
    plain = saved_bytes(model)
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpoint_blocks(model, "full")
    assert saved_bytes(model) < 0.5 * plain
    calls.clear()
    model(**pack()).loss.backward()
    assert len(calls) == 2
    checkpoint_blocks(tiny_model(), "none")
    with pytest.raises(ValueError, match="'partial'"):
        checkpoint_blocks(model, "partial")


def test_a_frozen_tower_is_not_run_twice():
    model, calls = tiny_model(), []
    freeze(model, ["vision_tower"])
    model.model.vision_tower.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpoint_blocks(model, "full")
    model(**pack()).loss.backward()
    assert len(calls) == 1


@pytest.mark.parametrize("mode", ["none", "full"])
def test_compiled_blocks_compute_the_same(mode):
    """Graphs are captured as for any backend; generating C++ for them would take minutes."""
    plain, compiled = tiny_model(), tiny_model()
    compile_blocks(compiled, backend="aot_eager")
    checkpoint_blocks(compiled, mode)
    loss, grads = gradients(plain, pack())
    other_loss, other_grads = gradients(compiled, pack())
    torch.testing.assert_close(other_loss, loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(other_grads, grads, atol=1e-6, rtol=1e-4)
    assert list(plain.state_dict()) == list(compiled.state_dict())


def test_the_dropped_block_is_no_block():
    blocks = transformer_blocks(tiny_model())
    assert len(blocks) == 4 and all(any(True for _ in block.parameters()) for block in blocks)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_compiled_blocks_that_are_recomputed_give_the_same_gradients(mode):
    plain, both = tiny_model(), tiny_model()
    torch._dynamo.reset()
    checkpoint_blocks(both, mode)
    compile_blocks(both, backend="aot_eager")
    loss, grads = gradients(plain, pack())
    other_loss, other_grads = gradients(both, pack())
    torch.testing.assert_close(other_loss, loss)
    for name, grad in grads.items():
        torch.testing.assert_close(other_grads[name], grad, rtol=1e-4, atol=1e-6)
