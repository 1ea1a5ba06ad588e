"""Any vision-language model of transformers, trained on packs as one document at a time would train it."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_families
import torch
import transformers

from omnidata import Dataset
from omnidata.images.pixels import decode_rgb
from omnidata.loader import PackLoader
from omnidata.loader.microbatch import expand, lay_out
from omnidata.loader.pixel_source import open_pixels
from omnidata.schema import UserError
from omnimodel import attention, isolation, mixers, patches
from omnimodel.loss import LogitScale
from omnimodel.packed import class_for, config_of, token_types
from omnimodel.parts import Parts
from pipelines.config import LoraConfig, parse_recipe
from pipelines.data import model_inputs
from pipelines.isolation import prove_isolation
from pipelines.lora import add_adapters
from pipelines.model import BuiltModel, names_in_files
from pipelines.parallel import World

CPU = torch.device("cpu")
WORLD = World(0, 1, CPU, "single")
# Masks, windows and recurrent mixers add in another order than a single document does.
GRADIENTS = dict.fromkeys(tiny_families.MODELS, 1e-4) | dict.fromkeys(tiny_families.ONLY_ATTENTION, 1e-5)


def load(folder, **changes):
    config = config_of(str(folder / "model"))
    for name, value in changes.items():
        setattr(config.get_text_config(), name, value)
    return class_for(config).from_pretrained(str(folder / "model"), config=config, dtype=torch.float32)


def gradients_of(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def alone(folder, key):
    """One sample by itself, as the class takes it: its own positions, labels that it shifts itself."""
    dataset = Dataset(folder / "data")
    sample = dataset[dataset.index["key"].to_pylist().index(key)]
    pixels = open_pixels([dataset], raw=False, augment=None, seed=0)
    pictures = [[torch.from_numpy(np.array(decode_rgb(data))).permute(2, 0, 1) for data in sample.images]]
    tensors = pixels.tensors(pictures) if sample.images else {}
    ids = torch.from_numpy(sample.input_ids.copy()).long()[None]
    types = torch.isin(ids, torch.tensor(pixels.profile.image_token_ids)).long()
    inputs = {"input_ids": ids, "labels": torch.from_numpy(sample.labels.copy()).long()[None]}
    inputs |= {name: torch.from_numpy(array) for name, array in tensors.items()}
    return inputs, types, int((sample.labels != -100).sum())


# --- the same numbers as one document at a time -----------------------------------------------------------


@pytest.mark.parametrize("name", tiny_families.MODELS)
def test_a_pack_learns_what_its_documents_learn_one_by_one(family, name):
    """Loss and gradients, against transformers' own class with its own loss on each document."""
    folder = family(name)
    model = load(folder).train()
    [microbatch] = PackLoader(folder / "data", global_batch=1, max_tokens=4096, num_epochs=1)
    assert len(microbatch.keys) == 10
    loss = model(**model_inputs(microbatch, CPU)).loss
    loss.backward()
    packed = gradients_of(model)
    own = transformers.AutoModelForImageTextToText.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    total = 0.0
    for key in microbatch.keys:
        inputs, types, count = alone(folder, key)
        named = token_types(type(own.base_model), types)
        share = own(**inputs, **named).loss * count / microbatch.num_supervised_tokens
        share.backward()
        total += share.item()
    single = gradients_of(own)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert packed.keys() == single.keys()
    for parameter, expected in single.items():
        scale = float(expected.abs().max())
        difference = float((packed[parameter] - expected).abs().max())
        assert difference <= GRADIENTS[name] * max(scale, 1e-3), parameter


@pytest.mark.parametrize("name", ["qwen3_vl", "llava_onevision", "gemma3"])
def test_a_pack_without_pictures_calls_the_tower_and_learns_the_same(family, name):
    folder = family(name)
    model = load(folder).train()
    dataset = Dataset(folder / "data")
    row = next(i for i in range(len(dataset)) if not dataset[i].images)
    sample, pixels = dataset[row], open_pixels([dataset], raw=False, augment=None, seed=0, with_dummy=True)
    dummy = pixels.dummy
    tensors = pixels.tensors([[], [dummy.picture()]])
    documents = [sample, dummy.sample]
    with_dummy = lay_out(
        documents,
        tensors,
        image_token_ids=pixels.profile.image_token_ids,
        position_ids=pixels.position_ids(documents, tensors),
        has_dummy=True,
    )
    plain = lay_out([sample], {}, image_token_ids=pixels.profile.image_token_ids)
    found = []
    for parts in (with_dummy, plain):
        microbatch = expand(parts, num_supervised_tokens=5, step=0, epoch=0)
        assert (microbatch.num_tokens, microbatch.num_images) == (len(sample.input_ids), 0)
        model(**model_inputs(microbatch, CPU)).loss.backward()
        found.append(gradients_of(model))
    parts = Parts(model)
    assert any(parts.of(n) == "vision_tower" for n in found[0]), "the tower takes part"
    assert not any(parts.of(n) == "vision_tower" for n in found[1])
    for parameter, gradient in found[0].items():
        expected = found[1].get(parameter, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


# --- documents apart, or no training ----------------------------------------------------------------------


def prove(folder, model):
    recipe = parse_recipe(
        {
            "run": {"dir": "unused", "device": "cpu"},
            "data": {"train": [{"path": str(folder / "data")}]},
            "model": {"path": str(folder / "model")},
            "optim": {"steps": 1},
        }
    )
    return prove_isolation(recipe, WORLD, BuiltModel(model, model, None), Dataset(folder / "data"))


@pytest.mark.parametrize("name", tiny_families.MODELS)
def test_every_family_is_proven(family, name):
    found = prove(family(name), load(family(name)))
    assert found.isolation.packed <= 1e-6 and found.isolation.joined > 0.1
    if name in tiny_families.ONLY_ATTENTION[:5]:
        assert found.isolation.packed == 0.0


def test_documents_that_see_each_other_are_refused_with_both_differences(family, monkeypatch):
    folder = family("qwen3_vl")
    apart = attention.per_document_attention

    def joined(query, key, value, pack):
        return apart(query, key, value, pack._replace(cu_seqlens=torch.tensor([0, query.shape[2]])))

    monkeypatch.setattr(attention, "per_document_attention", joined)
    with pytest.raises(UserError, match=r"not proven apart: packed they differ .* joined on purpose by"):
        prove(folder, load(folder))


def test_masks_that_forget_the_documents_are_refused(family, monkeypatch):
    folder = family("gemma3")
    monkeypatch.setattr(attention, "and_masks", lambda mask, _documents: mask)
    with pytest.raises(UserError, match="not proven apart"):
        prove(folder, load(folder))


@pytest.mark.parametrize("name", ["lfm2_vl", "minicpmv4_6"])
def test_mixers_along_the_row_are_refused(family, name, monkeypatch):
    monkeypatch.setattr(mixers, "keep_apart", lambda decoder: [])
    with pytest.raises(UserError, match=r"not proven apart|can't keep packed sequences apart"):
        prove(family(name), load(family(name)))


def test_a_head_that_does_more_is_refused(family, monkeypatch):
    model = load(family("qwen3_vl"))
    monkeypatch.setattr(
        "omnimodel.loss._head_loss",
        lambda logits_of, hidden, labels, scale, start: torch.nn.functional.cross_entropy(
            logits_of(hidden) * 0.5, labels, reduction="sum"
        ),
    )
    with pytest.raises(UserError, match="its own loss on a document is"):
        prove(family("qwen3_vl"), model)


def test_a_scale_of_logits_is_taken_if_the_class_takes_it(family):
    """Configurations name one that some classes around a text model do not apply: the own loss tells."""
    folder = family("qwen3_vl")
    model = load(folder, final_logit_softcapping=5.0)
    assert model.logit_scale == LogitScale(1.0, 5.0)
    prove(folder, model)
    assert model.logit_scale is None


def test_attention_that_packs_do_not_support_is_refused(family):
    folder = family("qwen3_vl")
    model = load(folder)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    model.train()
    [microbatch] = PackLoader(folder / "data", global_batch=1, max_tokens=4096, num_epochs=1)
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1 is not supported"):
        model(**model_inputs(microbatch, CPU))


def test_no_tolerance_hides_a_leak():
    found = isolation.Isolation(packed=2e-5, joined=0.5, own_loss=1.0, our_loss=1.0, dtype=torch.float32)
    assert "2.00e-05" in found.problem and "5.00e-01" in found.problem
    blind = isolation.Isolation(packed=0.0, joined=0.0, own_loss=1.0, our_loss=1.0, dtype=torch.float32)
    assert blind.problem, "a control that shows nothing proves nothing"


def test_a_tower_with_dropout_is_refused_as_well():
    query = torch.zeros(1, 2, 4, 8)
    bounds = {"cu_seq_lens_q": torch.tensor([0, 4], dtype=torch.int32), "max_length_q": 4}
    tower = transformers.AttentionInterface()[attention.TOWER_NAME]
    with pytest.raises(ValueError, match=r"attention_dropout=0\.5 is not supported"):
        tower(torch.nn.Module(), query, query, query, None, dropout=0.5, **bounds)


@pytest.mark.parametrize("kind", [torch.nn.Conv2d, torch.nn.Conv3d])
def test_a_convolution_over_single_patches_is_a_product(kind):
    axes = 2 if kind is torch.nn.Conv2d else 3
    tower = torch.nn.Sequential(kind(3, 5, 4, stride=4), kind(5, 5, 3, stride=1), kind(5, 5, 2, 2, padding=1))
    own = kind(3, 5, 4, stride=4)
    own.load_state_dict(tower[0].state_dict())
    assert patches.as_products(tower) == ["0"]
    for sides in ((4,) * axes, (8,) * axes):  # one patch, and a picture of them
        pixels = torch.randn(7, 3, *sides)
        expected, found = own(pixels), tower[0](pixels)
        torch.testing.assert_close(found, expected)
        found.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(tower[0].weight.grad, own.weight.grad, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["minicpmv4_6", "lfm2_vl"])
def test_adapters_reach_every_matrix_of_the_blocks_and_all_of_them_learn(family, name):
    """Recurrent and convolutional mixers have names of their own for theirs."""
    pytest.importorskip("peft")
    folder = family(name)
    model = load(folder).train()
    blocks = [b for b in Parts(model).blocks if b in set(model.get_decoder().modules())]
    matrices = [m for block in blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    add_adapters(model, LoraConfig(rank=2))
    [microbatch] = PackLoader(folder / "data", global_batch=1, max_tokens=4096, num_epochs=1)
    model(**model_inputs(microbatch, CPU)).loss.backward()
    learned = {n for n, p in model.named_parameters() if ".lora_B." in n and p.grad.abs().max() > 0}
    assert len(learned) == len(matrices)


# --- parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny_families.MODELS)
def test_parts_hold_every_parameter(family, name):
    model = load(family(name))
    parts = Parts(model)
    counts = parts.count()
    assert sum(total for total, _ in counts.values()) == sum(p.numel() for p in model.parameters())
    assert all(counts[part][0] > 0 for part in ("vision_tower", "connector", "language_model", "embeddings"))
    mine = {id(p) for p in model.get_decoder().parameters()} - {
        id(p) for p in model.get_input_embeddings().parameters()
    }
    assert mine == {id(p) for p in parts.parameters("language_model")}


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", "llava_onevision", "gemma3", "pixtral"])
def test_names_in_files_reach_every_weight(family, name):
    """Files have other names than modules: each file's tensor is the model's of that name."""
    from safetensors.torch import load_file

    folder = family(name)
    model = load(folder)
    files = load_file(folder / "model" / "model.safetensors")
    names = names_in_files(model, str(folder / "model"))
    assert sorted(names.values()) == sorted(files)
    state = model.state_dict()
    for mine, theirs in names.items():
        torch.testing.assert_close(state[mine], files[theirs], atol=0, rtol=0)


def test_weights_that_the_class_leaves_in_the_files_are_left(family, monkeypatch):
    model = load(family("qwen3_vl"))
    keys = ["lm_head.weight", "mtp.layers.0.weight"]
    assert "mtp.layers.0.weight" in model.names_in_files(keys)
    monkeypatch.setattr(model, "_keys_to_ignore_on_load_unexpected", [r"^mtp"])
    assert model.names_in_files(keys) == {"lm_head.weight": "lm_head.weight"}
