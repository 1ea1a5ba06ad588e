"""Adapters in the language model, in the tower, or in both: all of them learn, nothing beside them does."""

import pytest
import torch
from tiny_model import gradients, pack, tiny_config, tiny_model

from omnidata.schema import UserError
from omnimodel import OmniLMMForCausalLM
from omnimodel.parts import Parts
from pipelines.config import LoraConfig
from pipelines.lora import add_adapters, is_adapter, merged

pytest.importorskip("peft")
EVA_FUSED = {"mm_vision_tower": "eva02_enormous_patch14_clip_224"}
EVA_FUSED["vision_kwargs"] = {"img_size": 28, "embed_dim": 64, "depth": 3, "num_heads": 2, "mlp_ratio": 2}


@pytest.mark.parametrize("tower", [{}, EVA_FUSED], ids=["split qkv", "fused qkv, as the 12B's"])
@pytest.mark.parametrize(
    "targets", [["language_model"], ["vision_tower"], ["language_model", "vision_tower"]]
)
def test_every_adapter_learns_and_merges(targets, tower):
    plain, model = tiny_model(**tower), tiny_model(**tower)
    config = LoraConfig(rank=2, alpha=8.0, targets=targets)
    add_adapters(model, config)
    before = model(**pack()).loss
    torch.testing.assert_close(before, plain(**pack()).loss, atol=1e-6, rtol=0)  # B starts at zero
    _, grads = gradients(model, pack())
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            assert grads[name] is not None and grads[name].any(), f"{name} is never used"
        if Parts(model).of(name) in targets:
            assert is_adapter(name) == parameter.requires_grad, name
        elif not is_adapter(name):
            assert parameter.requires_grad, name
    adapted = {Parts(model).of(name) for name in grads if is_adapter(name)}
    assert adapted == set(targets)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.add_(0.02)
    clean = OmniLMMForCausalLM(tiny_config(**tower)).train()
    clean.load_state_dict(merged(model.state_dict(), config))
    assert abs(model(**pack()).loss - before) > 1e-4
    torch.testing.assert_close(clean(**pack()).loss, model(**pack()).loss, atol=1e-5, rtol=1e-5)


def test_what_names_nothing_is_refused():
    with pytest.raises(UserError, match="name one or both of language_model, vision_tower"):
        add_adapters(tiny_model(), LoraConfig(targets=["lm_head"]))
    with pytest.raises(UserError, match="match nothing in the language_model"):
        add_adapters(tiny_model(), LoraConfig(target_modules=["no_proj"]))
