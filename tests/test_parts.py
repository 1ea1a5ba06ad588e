"""Freezing by component, and adapters on top of it."""

import pytest
import torch
from tiny_model import gradients, pack, tiny_model

from omnimodel import OmniLMMForCausalLM
from omnimodel.parts import Parts, freeze


def test_every_parameter_belongs_to_one_component():
    model = tiny_model()
    parts = Parts(model)
    counts = parts.count()
    assert sum(total for total, _ in counts.values()) == sum(p.numel() for p in model.parameters())
    assert all(total > 0 for total, _ in counts.values())
    assert (
        Parts(model.model).of("layers.0.mlp.up_proj.weight") == "language_model"
    )  # as OmniLMMModel names it
    with pytest.raises(AttributeError, match="something"):
        parts.of("something.else")


@pytest.mark.parametrize("name", Parts(tiny_model()).names)
def test_freezing_one_stops_it_alone(name):
    model = tiny_model()
    freeze(model, [name])
    _, grads = gradients(model, pack())
    for parameter, grad in grads.items():
        assert (grad is None) == (Parts(model).of(parameter) == name), parameter
    freeze(model, [])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_unknown_components_are_listed():
    with pytest.raises(ValueError, match=r"no component tower to freeze; there are vision_tower"):
        freeze(tiny_model(), ["tower", "resampler"])


def test_frozen_parts_are_frozen_again_after_a_load(tmp_path):
    model = tiny_model()
    freeze(model, ["vision_tower", "language_model"])
    model.save_pretrained(tmp_path)
    loaded = OmniLMMForCausalLM.from_pretrained(tmp_path)
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert not dict(loaded.named_parameters()).get("model.resampler.pos_embed")  # fixed: nothing can train it


# --- LoRA through peft ------------------------------------------------------------------------------------

LANGUAGE = r"model\.layers\..*\.(q_proj|v_proj|up_proj)"
TOWER = r"model\.vision_tower\.blocks\..*\.(proj|q_proj|fc2)"


@pytest.mark.parametrize(
    "targets", [LANGUAGE, TOWER, f"{LANGUAGE}|{TOWER}"], ids=["language", "tower", "both"]
)
def test_adapters_train_save_load_and_merge(targets, tmp_path):
    peft = pytest.importorskip("peft")
    plain = tiny_model(mm_vision_tower="vit_base_patch16_clip_224", vision_kwargs=CLIP)
    before = plain.state_dict()
    model = peft.get_peft_model(
        tiny_model(mm_vision_tower="vit_base_patch16_clip_224", vision_kwargs=CLIP),
        peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False),
    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    model(**pack()).loss.backward()
    assert trainable and all(p.grad is not None and p.grad.any() for p in trainable)
    with torch.no_grad():
        for parameter in trainable:
            parameter -= 0.1 * parameter.grad
    expected = model(**pack()).loss
    assert expected != plain(**pack()).loss
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(loaded(**pack()).loss, expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**pack()).loss, expected, atol=1e-5, rtol=1e-5)
    assert isinstance(merged, OmniLMMForCausalLM) and list(merged.state_dict()) == list(before)


CLIP = {"img_size": 28, "patch_size": 14, "embed_dim": 64, "depth": 3, "num_heads": 2}


def test_adapters_on_the_head_give_the_same_loss_as_full_logits():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(), config)
    output = model(**pack(), return_logits=True)
    labels = pack()["shift_labels"]
    expected = torch.nn.functional.cross_entropy(output.logits[0], labels[0])
    torch.testing.assert_close(output.loss, expected)
