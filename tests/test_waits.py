"""Nothing in forward and backward waits for a GPU: counted here, in the path that a GPU takes."""

from __future__ import annotations

import contextlib

import pytest
import tiny_families
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from omnidata.loader import PackLoader
from omnimodel import host_known
from omnimodel.attention import as_on_gpu
from omnimodel.host_known import HostKnown, known, plain
from omnimodel.packed import class_for, config_of
from pipelines.config import parse_recipe
from pipelines.data import model_inputs, train_loader
from pipelines.parallel import World
from pipelines.waits import Waits

CPU, META = torch.device("cpu"), torch.device("meta")
# SmolVLM leaves out padding pictures, which it knows by their pixels.
LEFT = {"smolvlm": {"smolvlm/modeling_smolvlm.py", "transformers/masking_utils.py"}}


def pack(folder):
    [microbatch] = PackLoader(folder / "data", global_batch=1, max_tokens=4096, num_epochs=1)
    with as_on_gpu():
        return model_inputs(microbatch, CPU)


def load(folder):
    config = config_of(str(folder / "model"))
    return class_for(config).from_pretrained(str(folder / "model"), config=config, dtype=torch.float32)


def step(model, inputs):
    with as_on_gpu(), Waits() as waits:
        loss = model(**inputs).loss
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return waits.places, found | {"loss": loss.detach()}


@pytest.mark.parametrize("name", tiny_families.MODELS)
def test_a_step_waits_for_nothing_and_learns_the_same(family, name):
    inputs, model = pack(family(name)), load(family(name))
    before, expected = step(model, {key: plain(value) for key, value in inputs.items()})
    after, found = step(model, inputs)
    assert before, "the same step with tensors of which the host knows nothing waits"
    assert {place.partition(":")[0] for place in after} == LEFT.get(name, set())
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key


WITHOUT_NUMBERS = ["qwen3_vl", "minicpmv4_6", "internvl"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in WITHOUT_NUMBERS[1:]]


@pytest.mark.parametrize("name", [WITHOUT_NUMBERS[0], *SLOW])
def test_a_step_on_the_meta_device_asks_for_no_value(family, name):
    """There whoever needs one raises, and copies from the host show. In bfloat16."""
    inputs = pack(family(name))
    known_inputs = {key: value for key, value in inputs.items() if isinstance(value, HostKnown)}
    assert {"input_ids", "position_ids", "cu_seqlens", "token_type_ids"} <= known_inputs.keys()
    inputs |= {key: known(value.values, META) for key, value in known_inputs.items()}
    inputs |= {key: inputs[key].to(META) for key in ("pixel_values", "shift_labels")}
    config = config_of(str(family(name) / "model"))
    with META:
        model = class_for(config)._from_config(config, dtype=torch.bfloat16)
    with as_on_gpu(), Waits("meta") as waits:
        model(**inputs).loss.backward()
    assert not waits.places


@pytest.mark.parametrize("name", [WITHOUT_NUMBERS[0], *SLOW])
def test_a_rehearsed_step_asks_for_no_value(family, name):
    """Fake tensors have none either; what the host knows stays real."""
    inputs, config = pack(family(name)), config_of(str(family(name) / "model"))
    with no_init_weights(), FakeTensorMode() as fake, as_on_gpu(), Waits() as waits:
        model = class_for(config)._from_config(config, dtype=torch.bfloat16)
        waits.places.clear()  # of making it
        inputs |= {key: fake.from_tensor(inputs[key]) for key in ("pixel_values", "shift_labels")}
        model(**inputs).loss.backward()
    assert not waits.places


def test_a_tower_that_is_not_told_waits(family, monkeypatch):
    monkeypatch.setattr(host_known, "told", lambda function: function)
    monkeypatch.setattr(host_known, "leave_out", lambda module: None)
    places, _ = step(load(family("llava_onevision")), pack(family("llava_onevision")))
    assert not places, "only what it makes of numbers itself needs more than known tensors"
    monkeypatch.setattr(host_known, "making", lambda like: as_on_gpu())
    places, _ = step(load(family("llava_onevision")), pack(family("llava_onevision")))
    assert places


@pytest.mark.parametrize(("name", "has_bytes"), [("qwen3_vl", True), ("minicpmv4_6", False)])
def test_a_gpu_is_sent_bytes_where_the_processor_has_them(family, name, has_bytes):
    tree = {"run": {"dir": "unused"}, "model": {"path": str(family(name) / "model")}, "optim": {"steps": 1}}
    tree["data"] = {"train": [{"path": str(family(name) / "data")}], "max_tokens": 4096, "global_batch": 1}
    recipe, config = parse_recipe(tree), config_of(str(family(name) / "model"))
    world, dtypes, inputs = World(0, 1, CPU, "single"), [], []
    for place in (contextlib.nullcontext(), as_on_gpu()):
        with place:
            microbatch = next(iter(train_loader(recipe, world, config)))
            dtypes.append(microbatch.images["pixel_values"].dtype)
            inputs.append(model_inputs(microbatch, CPU)["pixel_values"])
    assert dtypes == [torch.float32, torch.uint8 if has_bytes else torch.float32]
    torch.testing.assert_close(inputs[1], inputs[0], atol=1e-5, rtol=0)


# --- tensors that the host knows --------------------------------------------------------------------------

MASK = torch.tensor([[True, False, True], [False, False, True]])
OPERATIONS = {
    "tolist": lambda x, m: torch.tensor(m.nonzero().tolist()),
    "item": lambda x, m: x * m.sum().item(),
    "index": lambda x, m: x[m],
    "index of rows": lambda x, m: x[m[:, 2], 1:],
    "index in the middle": lambda x, m: x[:, m[0]],
    "index beside integers": lambda x, m: x[m[:, 0], torch.tensor([1])],
    "expanded": lambda x, m: x[m[..., None].expand_as(x)],
    "select": lambda x, m: x.masked_select(m[..., None]),
    "scatter": lambda x, m: x.masked_scatter(m[..., None], x.flatten() * 2),
    "fill": lambda x, m: x.masked_fill(m[..., None], 0.5),
    "where": lambda x, m: torch.where(m[..., None], x, -x),
    "put": lambda x, m: x.clone().index_put((m,), x[0, 0] * 3),
    "in place": lambda x, m: _put(x.clone(), m),
    "repeat": lambda x, m: x.repeat_interleave(m.sum(0), dim=1),
    "arithmetic": lambda x, m: x * (m.long().cumsum(1) + 1)[..., None],
}


def _put(tensor, mask):
    tensor[mask] = 7.0
    return tensor


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_known_mask_does_what_a_plain_one_does(name):
    operation = OPERATIONS[name]
    results = []
    for mask in (MASK, known(MASK, CPU)):
        x = torch.arange(24.0).view(2, 3, 4).requires_grad_()
        result = operation(x, mask)
        if result.requires_grad:
            (result * torch.arange(result.numel()).view_as(result)).sum().backward()
        results.append((plain(result.detach()), x.grad))
    (expected, gradient), (found, found_gradient) = results
    assert torch.equal(found, expected)
    assert (gradient is None) == (found_gradient is None)
    if gradient is not None:
        assert torch.equal(gradient, found_gradient)


def test_values_that_change_are_copied_again():
    ids = known(torch.tensor([1, 2, 3]), META)
    other = known(torch.tensor([1, 2, 3]), CPU)
    first = ids.on_device()
    assert ids.on_device() is first and first.device == META
    ids.masked_fill_(ids == 2, 5)
    other[other == 2] = 5
    assert ids.tolist() == [1, 5, 3] and ids.on_device() is not first
    assert (torch.zeros(3) + other).tolist() == [1, 5, 3]


def test_what_the_gpu_writes_to_a_known_tensor_is_read_and_counted():
    ids = known(torch.tensor([1, 2, 3]), CPU)
    ids[1] = torch.tensor([7])[0]
    assert ids.tolist() == [1, 7, 3]
    with pytest.raises(NotImplementedError):  # there is nothing to read on the meta device
        known(torch.tensor([1, 2]), META).copy_(torch.ones(2, dtype=torch.int64, device=META))


def test_a_scatter_of_too_few_values_is_refused():
    with pytest.raises(RuntimeError, match="masked_scatter: 12 places, but only 3 values"):
        torch.zeros(2, 3, 4).masked_scatter(known(MASK, CPU)[..., None], torch.ones(3))


def test_waits_are_named():
    counted = torch.tensor([1, 0, 2])
    with Waits() as waits:
        counted.tolist()
        counted[counted > 0]
        int(counted.sum())
        torch.tensor([1, 2], device="cpu")
        known(counted, CPU).tolist()
        counted.sum()
    assert {place.partition(":")[0] for place in waits.places} == {"tests/test_waits.py"}
    assert len(waits.places) == 4
