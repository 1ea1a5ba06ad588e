"""Any vision-language model of transformers, trained on packs as one document at a time would train it."""

from __future__ import annotations

import json

import numpy as np
import processors
import pytest
import tiny_families
import torch
import transformers
import yaml
from PIL import Image
from ranks import run_on_ranks

from omnidata import Dataset, cli
from omnidata.images.pixels import decode_rgb
from omnidata.loader import PackLoader
from omnidata.loader.microbatch import expand, lay_out
from omnidata.loader.pixel_source import open_pixels
from omnidata.schema import UserError
from omnimodel import attention, isolation, mixers
from omnimodel.loss import LogitScale
from omnimodel.packed import class_for, config_of, token_types
from omnimodel.parts import Parts
from pipelines.config import parse_recipe
from pipelines.data import model_inputs
from pipelines.isolation import prove_isolation
from pipelines.model import BuiltModel, names_in_files
from pipelines.parallel import World
from pipelines.train import train

CPU = torch.device("cpu")
WORLD = World(0, 1, CPU, "single")
# Masks, windows and recurrent mixers add in another order than a single document does.
GRADIENTS = dict.fromkeys(tiny_families.MODELS, 1e-4) | dict.fromkeys(tiny_families.ONLY_ATTENTION, 1e-5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Ten records: text, one picture, two pictures."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate(((64, 48), (100, 40), (60, 90))):
        small = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        Image.fromarray(small).resize((width, height)).save(root / f"{number}.jpg")
    with (root / "a.jsonl").open("w") as file:
        for i in range(10):
            names = [f"{(i + k) % 3}.jpg" for k in range(i % 3)]
            turns = [
                ("user", "<image>" * len(names) + f"What is number {i}?"),
                ("assistant", f"This is {i}."),
            ]
            messages = [{"role": role, "content": text} for role, text in turns]
            file.write(json.dumps({"id": f"r{i}", "images": names, "messages": messages}) + "\n")
    return root


@pytest.fixture(scope="module")
def family(corpus, tmp_path_factory):
    """Family -> the folder with its ``model`` and its ``data``; made when it is first asked for."""
    made = {}

    def of(name):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            model = tiny_families.save(name, root / "model")
            arguments = ["build-shards", corpus / "a.jsonl", "--image-root", corpus, "--model", model]
            arguments += ["--out", root / "data", "--workers", 1, "--quiet"]
            assert cli.run([str(argument) for argument in arguments]) == 0
            made[name] = root
        return made[name]

    return of


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
    plain = type(model.lm_head).forward
    monkeypatch.setattr(
        "omnimodel.loss._head_loss",
        lambda head, hidden, labels, scale, start: torch.nn.functional.cross_entropy(
            plain(head, hidden) * 0.5, labels, reduction="sum"
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


# --- train.py ---------------------------------------------------------------------------------------------


def recipe_tree(folder, out, **sections):
    tree = {
        "run": {"dir": str(out), "device": "cpu", "threads": 1},
        "data": {
            "train": [{"path": str(folder / "data")}],
            **{"max_tokens": 512, "global_batch": 2, "num_workers": 0},
        },
        "model": {"path": str(folder / "model")},
        "optim": {"lr": 1e-3, "steps": 4},
        "checkpoint": {"every": 2},
        "log": {},
        "parallel": {},
    }
    for section, values in sections.items():
        tree[section] |= values
    return tree


def run(folder, out, **sections):
    train(parse_recipe(recipe_tree(folder, out, **sections)))
    return transformers.AutoModelForImageTextToText.from_pretrained(out / "final", dtype=torch.float32)


def test_a_run_that_stops_and_goes_on_is_one_that_never_stopped(family, tmp_path):
    """With a layer behind the one that is used (LLaVA's): it takes no part, and is as it was at the end."""
    folder = family("llava_onevision")
    whole = run(folder, tmp_path / "whole").state_dict()
    run_dir = tmp_path / "halves"
    with pytest.raises(OSError):
        run(folder, run_dir, run={"stop_after": 2})  # no RUN/final yet
    halves = run(folder, run_dir).state_dict()
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    before = load(folder).state_dict()
    name = "model.vision_tower.post_layernorm.weight"
    assert torch.equal(before[name], whole[name])
    assert not torch.equal(before["lm_head.weight"], whole["lm_head.weight"])
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "whole" / "final")
    assert type(processor) is type(processors.make("llava_onevision", small=True))


def test_a_bfloat16_run_reads_its_shards_from_files_of_other_names(family, tmp_path):
    """FSDP over one rank: meta device, renamed keys, buffers made anew; as close as bfloat16 allows."""
    folder = family("gemma3")
    exact = run(folder, tmp_path / "exact").state_dict()
    half = run(
        folder,
        tmp_path / "half",
        run={"dtype": "bfloat16"},
        model={"activation_checkpointing": "selective", "freeze": ["vision_tower"]},
    ).state_dict()
    before = load(folder).state_dict()
    for name, tensor in half.items():
        if "vision_tower" in name:
            torch.testing.assert_close(tensor, before[name], atol=2e-3, rtol=1e-2)
        else:
            torch.testing.assert_close(tensor, exact[name], atol=6e-3, rtol=2e-2)


def test_adapters_and_rates_by_part(family, tmp_path, capsys):
    pytest.importorskip("peft")
    folder = family("qwen3_vl")
    tuned = run(
        folder,
        tmp_path / "lora",
        model={"freeze": ["vision_tower", "embeddings", "lm_head"], "lora": {"rank": 2}},
        optim={"component_lr": {"connector": 1e-2}},
        log={"by": "dataset"},
    ).state_dict()
    rows = [json.loads(line) for line in (tmp_path / "lora" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        [(name, loss)] = [(name, value) for name, value in row.items() if name.startswith("loss/")]
        assert loss == pytest.approx(row["loss"], rel=1e-5)
        assert row[name.replace("loss/", "tokens/")] == row["tokens"]
    assert "connector" in capsys.readouterr().out
    before = load(folder).state_dict()
    changed = {name for name in before if not torch.equal(before[name], tuned[name])}
    assert any("language_model.layers" in name and "q_proj" in name for name in changed)
    assert any("merger" in name for name in changed)
    assert not any("blocks" in name or "embed" in name or "lm_head" in name for name in changed)


def test_what_does_not_fit_is_named(family, tmp_path):
    folder, other = family("qwen3_vl"), family("gemma3")
    with pytest.raises(UserError, match="its processor is not the one of"):
        run(folder, tmp_path / "a", model={"path": str(other / "model")})
    with pytest.raises(UserError, match=r"model\.config\.text_config\.hiden_size: .* no such field"):
        run(folder, tmp_path / "b", model={"path": None, "config": {"text_config": {"hiden_size": 8}}})
    with pytest.raises(
        UserError, match="no component resampler to freeze; there are vision_tower, connector"
    ):
        run(folder, tmp_path / "c", model={"freeze": ["resampler"]})
    mixed = [{"path": str(folder / "data")}, {"path": str(other / "data")}]
    with pytest.raises(UserError, match="built for different models"):
        run(folder, tmp_path / "d", data={"train": mixed})


def test_random_weights_from_a_changed_configuration(family, tmp_path):
    folder = family("qwen3_vl")
    model = run(
        folder,
        tmp_path / "run",
        model={"path": None, "config": {"text_config": {"num_hidden_layers": 1}}},
        optim={"steps": 1},
    )
    assert model.config.get_text_config().num_hidden_layers == 1


SLOW = pytest.mark.slow
RANKS = [
    ("internvl", "fsdp"),
    *(pytest.param(name, "fsdp", marks=SLOW) for name in ("qwen3_vl", "minicpmv4_6")),
]


@pytest.mark.parametrize(("name", "strategy"), [*RANKS, pytest.param("llava_onevision", "ddp", marks=SLOW)])
def test_two_ranks_are_one_process(family, tmp_path, name, strategy):
    """One of them has no pictures in one step, or nothing at all."""
    folder = family(name)
    longest = max(len(sample.input_ids) for sample in Dataset(folder / "data"))
    data = {"max_tokens": longest, "global_batch": 2}
    ranks = [
        list(PackLoader(folder / "data", **data, num_epochs=1, rank=rank, world_size=2, dummy_picture=True))
        for rank in range(2)
    ]
    steps = len(ranks[0])
    assert any(a.has_dummy != b.has_dummy for a, b in zip(*ranks, strict=True))
    sections = {"data": data, "optim": {"steps": steps}, "parallel": {"strategy": strategy}}
    one = run(folder, tmp_path / "one", data=data, optim={"steps": steps}).state_dict()
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(recipe_tree(folder, tmp_path / "two", **sections)))
    run_on_ranks(2, [path])
    final = tmp_path / "two" / "final"
    two = transformers.AutoModelForImageTextToText.from_pretrained(final, dtype=torch.float32).state_dict()
    for parameter, expected in one.items():
        torch.testing.assert_close(two[parameter], expected, atol=5e-6, rtol=1e-4)
