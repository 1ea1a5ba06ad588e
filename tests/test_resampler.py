"""The resampler against the reference's outputs and gradients, and where the reference is silently wrong."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_model import GOLDEN
from torch.nn import functional as F

from omnimodel import Resampler
from omnimodel.resampler import resize_table, sincos_table

INDEX = json.loads((GOLDEN / "resampler/index.json").read_text())
CASES = [(name, case) for name, config in INDEX.items() for case in config["cases"] if case != "n3_broadcast"]


def golden_resampler(name):
    config = INDEX[name]
    resampler = Resampler(config["grid_size"], config["embed_dim"], config["num_heads"], config["kv_dim"])
    weights = load_file(GOLDEN / f"resampler/{name}.safetensors")
    resampler.load_state_dict({key: tensor.float() for key, tensor in weights.items()})
    return resampler


@pytest.fixture(scope="module")
def arrays():
    return {name: dict(np.load(GOLDEN / f"resampler/{name}.io.npz")) for name in INDEX}


@pytest.mark.parametrize("name, case", CASES)
def test_equals_the_reference_in_output_and_gradients(name, case, arrays):
    fields = {
        key.split("/")[1]: torch.from_numpy(a)
        for key, a in arrays[name].items()
        if key.startswith(f"{case}/")
    }
    resampler = golden_resampler(name)
    x = fields["x"].float().requires_grad_()
    y = resampler(x, attn_mask=fields.get("attn_mask"))
    # Outputs reach 7. In float32 both sides round by up to 8e-6; in float64 only the reference does.
    assert (y - fields["y"]).abs().max() < 1e-5 * fields["y"].abs().max()
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    scale = fields["grad_query"].abs().max()
    torch.testing.assert_close(resampler.query.grad / scale, fields["grad_query"] / scale, atol=1e-5, rtol=0)
    if "grad_x" in fields:
        torch.testing.assert_close(x.grad, fields["grad_x"], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name, case", CASES)
def test_in_float64_it_is_the_reference_to_its_own_rounding(name, case, arrays):
    x, y = (torch.from_numpy(arrays[name][f"{case}/{field}"]).double() for field in ("x", "y"))
    mask = arrays[name].get(f"{case}/attn_mask")
    resampler = golden_resampler(name).double()
    ours = resampler(x, attn_mask=None if mask is None else torch.from_numpy(mask))
    torch.testing.assert_close(ours, y, atol=1e-5, rtol=0)


def test_in_bfloat16_it_is_the_reference_to_bfloat16(arrays):
    name = "rs_e64_h4_kv48_g2"
    x = torch.from_numpy(arrays[name]["n16/x"]).bfloat16()
    y = golden_resampler(name).bfloat16()(x)
    expected = torch.from_numpy(arrays[name]["n16/y_bf16_model"])
    assert (y.float() - expected).abs().max() < 0.02 * expected.abs().max()


def test_position_tables_are_the_reference_s():
    tables = dict(np.load(GOLDEN / "resampler/sincos.npz"))
    for name, size, dim in [("E64_g2", 2, 64), ("E64_g3", 3, 64), ("E16_g5", 5, 16)]:
        torch.testing.assert_close(sincos_table(size, dim), torch.from_numpy(tables[name]), atol=1e-6, rtol=0)
    wide = sincos_table(8, 4096)[[0, 1, 8, 63]][:, ::64]
    expected = torch.from_numpy(tables["E4096_g8_rows_0_1_8_63_cols_every_64"])[:, : wide.shape[1]]
    torch.testing.assert_close(wide, expected, atol=1e-6, rtol=0)
    for side in (32, 4):
        expected = torch.from_numpy(tables[f"abs_pos_E16_g8_to_{side * side}"])
        resized = resize_table(sincos_table(8, 16), (side, side))
        torch.testing.assert_close(resized, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_patches", [0, 2, 3, 7, 8, 10, 12])
def test_patches_that_form_no_square_are_refused_not_broadcast(num_patches):
    resampler = golden_resampler("rs_e64_h4_kv48_g2")
    with pytest.raises(ValueError, match=f"{num_patches} patches form no square"):
        resampler(torch.randn(1, num_patches, 48))
    with pytest.raises(ValueError, match="does not fit"):
        resampler(torch.randn(1, num_patches, 48), grid=(5, 5))


def test_a_rectangle_gets_its_own_positions():
    resampler = golden_resampler("rs_e64_h4_kv48_g2")
    x = torch.randn(1, 16, 48)
    assert not torch.allclose(resampler(x, grid=(2, 8)), resampler(x))  # the reference takes 2x8 for 4x4
    table = resampler.pos_embed.reshape(2, 2, -1).permute(2, 0, 1)[None]
    expected = F.interpolate(table, size=(2, 8), mode="bicubic")[0].flatten(1).t()
    torch.testing.assert_close(resize_table(resampler.pos_embed, (2, 8)), expected)


def test_fresh_weights_are_random_and_the_table_cannot_be_trained():
    torch.manual_seed(0)
    resampler = Resampler(8, 1024, 8, 256)
    assert resampler.query.std().item() == pytest.approx(0.02, rel=0.05)
    assert resampler.proj.std().item() == pytest.approx(1024**-0.5, rel=0.05)
    assert "pos_embed" in resampler.state_dict()
    assert "pos_embed" not in dict(resampler.named_parameters())


def test_same_width_needs_no_projection():
    assert "kv_proj.weight" not in Resampler(2, 64, 4).state_dict()
    assert "kv_proj.weight" not in Resampler(2, 64, 4, 64).state_dict()
    with pytest.raises(ValueError, match="divisible"):
        Resampler(2, 64, 3)
