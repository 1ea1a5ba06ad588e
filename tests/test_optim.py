"""The schedule as a function of the step, the groups by component, and rows that alone may learn."""

import itertools
import math

import pytest
import torch
from tiny_recipe import MODEL

from omnimodel import OmniLMMConfig, OmniLMMForCausalLM
from pipelines.config import OptimConfig
from pipelines.optim import NewTokenRows, build_optimizer, clip_gradients, lr_factor, set_lr


def factors(total=100, **settings):
    optim = OptimConfig(steps=total, **settings)
    return [lr_factor(step, total, optim) for step in range(total)]


def test_cosine_rises_linearly_and_falls_to_its_end():
    values = factors(warmup_steps=10, min_lr=0.1)
    assert values[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert values[10] == 1.0 and values[55] == pytest.approx(0.1 + 0.9 / 2)  # half-way down
    assert 0.1 < values[-1] < 0.102 and all(a >= b for a, b in itertools.pairwise(values[10:]))


def test_wsd_is_flat_and_decays_at_the_end():
    values = factors(schedule="wsd", warmup_steps=5, decay_steps=20)
    assert values[4:80] == [1.0] * 76
    assert values[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 100)])


def test_constant_stays():
    assert factors(schedule="constant") == [1.0] * 100


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return OmniLMMForCausalLM(OmniLMMConfig(**MODEL, vocab_size=64, num_query=4, im_patch_token=61))


def test_every_trainable_parameter_is_in_one_group_with_its_rate(model):
    optimizer = build_optimizer(
        model, OptimConfig(lr=1e-3, component_lr={"resampler": 5e-4}, weight_decay=0.1)
    )
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["peak_lr"] == (5e-4 if group["component"] == "resampler" else 1e-3)
        for parameter in group["params"]:
            name = names[id(parameter)]
            plain = (
                parameter.ndim < 2
                or name.endswith(("query", "pos_embed", "cls_token"))
                or "embed_tokens" in name
            )
            assert group["weight_decay"] == (0.0 if plain else 0.1), name
    set_lr(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4, 2.5e-4}


def test_only_the_new_rows_move(model):
    rows = [61, 62, 63]
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.1))
    mask = NewTokenRows(model, optimizer, rows=rows)
    tables = [model.model.embed_tokens.weight, model.lm_head.weight]
    before = [table.detach().clone() for table in tables]
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        mask.mask_gradients()
        optimizer.step()
    for table, old in zip(tables, before, strict=True):
        moved = (table != old).any(dim=1).nonzero().flatten().tolist()
        assert moved == rows


def test_clipping_returns_the_norm_before_and_shows_what_is_not_finite():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([parameter], 1.0) == pytest.approx(5.0)
    assert parameter.grad.norm() == pytest.approx(1.0, abs=1e-5)
    parameter.grad = torch.tensor([math.nan, 1.0])
    assert not math.isfinite(clip_gradients([parameter], 1.0))
