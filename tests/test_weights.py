"""Checkpoints: every layout loads, nothing is silently missing, and the first one is put together right."""

import json
import pickle

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny_model import gradients, pack, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from omnimodel import OmniLMMConfig, OmniLMMForCausalLM, OmniLMMModel
from omnimodel.weights import NEW_TOKENS, assemble, convert, expected_shapes, main

VISION = {"img_size": 28, "embed_dim": 64, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0}
TOWER = "eva02_enormous_patch14_clip_224"
LLM = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}


def write_original(folder, model, *, num_files=3):
    """As the original saves: sharded pickles, and a config.json with its own keys beside Mistral's."""
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    names = list(state)
    weight_map = {}
    for number in range(num_files):
        file = f"pytorch_model-{number + 1:05d}-of-{num_files:05d}.bin"
        torch.save({name: state[name] for name in names[number::num_files]}, folder / file)
        weight_map |= dict.fromkeys(names[number::num_files], file)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    config = model.config.to_dict()
    for key in ("im_patch_token", "im_start_token", "im_end_token", "frozen", "rope_parameters"):
        config.pop(key)
    config |= {"architectures": ["OmniLMMForCausalLM"], "rope_theta": 10000.0, "torch_dtype": "float32"}
    config |= {"mm_use_im_start_end": True, "tune_clip": True, "use_mm_proj": True, "mm_hidden_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def original(tmp_path):
    return write_original(tmp_path / "original", tiny_model())


def assert_same_numbers(model, other):
    loss, grads = gradients(model.train(), pack())
    for token in ("im_patch_token", "im_start_token", "im_end_token"):
        setattr(other.config, token, getattr(model.config, token))
    other_loss, other_grads = gradients(other.train(), pack())
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(grads[name], other_grads[name]) for name in grads)


def test_save_and_load_give_the_same_model_through_every_door(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), OmniLMMConfig)
    for door in (OmniLMMForCausalLM, AutoModelForCausalLM):
        loaded = door.from_pretrained(tmp_path)
        assert type(loaded) is OmniLMMForCausalLM and not loaded.training
        assert_same_numbers(model, loaded)
    inner = AutoModel.from_pretrained(tmp_path)
    assert type(inner) is OmniLMMModel
    assert torch.equal(inner.resampler.query, model.model.resampler.query)


def test_the_original_s_layout_loads(original):
    loaded = OmniLMMForCausalLM.from_pretrained(original)
    assert loaded.config.num_query == 4 and loaded.config.image_size == 28
    assert (loaded.config.im_patch_token, loaded.config.im_end_token) == (
        32000,
        32002,
    )  # not in its config.json
    assert_same_numbers(tiny_model(), loaded)


def test_missing_and_unexpected_names_are_listed(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.surplus"] = state.pop("model.resampler.query")
    del state["model.vision_tower.cls_token"]
    state["lm_head.weight"] = state["lm_head.weight"][:7].clone()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        OmniLMMForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    for line in (
        "missing (2): model.resampler.query, model.vision_tower.cls_token",
        "unexpected (1): model.surplus",
        "of another shape (1): lm_head.weight",
    ):
        assert line in str(error.value)


def test_a_pickle_cannot_run_code(original):
    class Payload:
        def __reduce__(self):
            return (exec, ("raise SystemExit('code ran')",))

    file = sorted(original.glob("*.bin"))[0]
    torch.save({"model.norm.weight": Payload()}, file)
    with pytest.raises(pickle.UnpicklingError):
        OmniLMMForCausalLM.from_pretrained(original)
    with pytest.raises(pickle.UnpicklingError):
        convert(original, original.parent / "out")


# --- convert ----------------------------------------------------------------------------------------------


def test_convert_writes_the_same_model_as_safetensors(original, tmp_path):
    report = convert(original, tmp_path / "out")
    assert report["files"] == 3 and report["tensors"] == len(expected_shapes(tiny_model().config))
    assert not list((tmp_path / "out").glob("*.bin*"))
    assert_same_numbers(tiny_model(), OmniLMMForCausalLM.from_pretrained(tmp_path / "out"))


def test_convert_refuses_what_is_not_the_config_s_model(original, tmp_path, capsys):
    file = sorted(original.glob("*.bin"))[0]
    state = torch.load(file, weights_only=True)
    state["model.surplus"] = state.pop(next(iter(state)))
    torch.save(state, file)
    assert main(["convert", str(original), "--out", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert "unexpected model.surplus" in message and "missing model.embed_tokens.weight" in message
    assert not (tmp_path / "out").exists()


# --- assemble ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a Mistral with 87 words and of a timm tower with all three blocks."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=87, num_key_value_heads=2, sliding_window=512, **LLM)
    MistralForCausalLM(config).save_pretrained(root / "llm")
    (root / "vit").mkdir()
    save_file(timm.create_model(TOWER, num_classes=0, **VISION).state_dict(), root / "vit/model.safetensors")
    (root / "vit/config.json").write_text(json.dumps({"architecture": TOWER}))
    return root


def build(parts, out, **changes):
    settings = {"vision_kwargs": VISION, "num_query": 4, "image_size": 28, "dtype": torch.float32}
    return assemble(parts / "llm", str(parts / "vit"), out, **settings | changes)


def test_assemble_takes_every_weight_from_its_place(parts, tmp_path):
    report = build(parts, tmp_path / "out")
    model = OmniLMMForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.vocab_size, model.config.sliding_window) == (96, 512)
    assert model.config.image_token_ids == [87, 88, 89]
    language = MistralForCausalLM.from_pretrained(parts / "llm").state_dict()
    state = model.state_dict()
    for name, tensor in language.items():
        assert torch.equal(state[name][: len(tensor)], tensor), name
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        for row in range(87, 96):  # the original forgets <im_patch>
            torch.testing.assert_close(state[name][row], language[name].mean(dim=0))
    tower = load_file(parts / "vit/model.safetensors")
    kept = {name for name in tower if not name.startswith("blocks.2.")}
    assert all(torch.equal(state[f"model.vision_tower.{name}"], tower[name]) for name in kept)
    assert set(report["dropped_from_the_tower"]) == set(tower) - kept
    assert report["parameters"]["total"] == sum(tensor.numel() for tensor in state.values())
    assert model.model.resampler.query.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.model.resampler.ln_q.weight.eq(1).all()


def test_assemble_takes_the_ids_of_the_dataset_s_tokenizer(parts, tmp_path):
    added = [{"id": 80 + number, "content": name} for number, name in enumerate(reversed(NEW_TOKENS))]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    build(parts, tmp_path / "out", tokenizer=tmp_path)
    model = OmniLMMForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.image_token_ids == [88, 87, 86] and model.config.vocab_size == 89
    old = MistralForCausalLM.from_pretrained(parts / "llm").lm_head.weight[
        :80
    ]  # 80-86 are new tokens' rows too
    for row in range(80, 89):
        torch.testing.assert_close(model.lm_head.weight[row], old.mean(dim=0))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added[1:]}))
    with pytest.raises(ValueError, match="lacks </quad>"):
        build(parts, tmp_path / "other", tokenizer=tmp_path)


def test_assemble_is_repeatable_and_writes_the_dtype(parts, tmp_path):
    for name in ("one", "two"):
        build(parts, tmp_path / name, dtype=torch.bfloat16, seed=3)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) and one[name].dtype == torch.bfloat16 for name in one)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--vision": "no_such_tower"}, "neither a folder or file nor a timm model"),
        ({"--llm": "{parts}/vit"}, "error:"),
        ({"--out": "{parts}/llm"}, "is not empty"),
    ],
)
def test_bad_parts_are_one_clear_line(parts, tmp_path, change, message, capsys):
    options = {"--llm": f"{parts}/llm", "--vision": f"{parts}/vit", "--out": str(tmp_path / "out")}
    options |= {key: value.format(parts=parts) for key, value in change.items()}
    assert main(["assemble", *[word for pair in options.items() for word in pair]]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


def test_the_commands_print_json(parts, tmp_path, capsys):
    words = ["assemble", "--llm", parts / "llm", "--vision", parts / "vit", "--out", tmp_path / "out"]
    words += ["--vision-kwargs", json.dumps(VISION), "--num-query", "4", "--image-size", "28"]
    assert main([*map(str, words)]) == 0
    assert json.loads(capsys.readouterr().out)["new_token_ids"]["<im_patch>"] == 87
    assert main(["names", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["lm_head.weight"] == [96, 128]
    with pytest.raises(SystemExit, match="2"):
        main(["assemble"])


def test_without_network_a_timm_name_says_what_to_do(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    arguments = ["assemble", "--llm", str(parts / "llm"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--vision", "vit_tiny_patch16_224"]) == 1
    message = capsys.readouterr().err
    assert "no weights for the timm model vit_tiny_patch16_224" in message
    assert "huggingface.co/timm/vit_tiny_patch16_224" in message and "local folder" in message
    assert not (tmp_path / "out").exists()


def test_a_single_file_of_weights_needs_the_name(parts, tmp_path):
    file = str(parts / "vit/model.safetensors")
    with pytest.raises(ValueError, match="--vision-name"):
        assemble(parts / "llm", file, tmp_path / "a")
    with pytest.raises(ValueError, match=r"does not hold the weights of timm's vit_tiny"):
        assemble(parts / "llm", file, tmp_path / "b", vision_name="vit_tiny_patch16_224")
    settings = {"vision_kwargs": VISION, "num_query": 4, "image_size": 28, "vision_name": TOWER}
    assemble(parts / "llm", file, tmp_path / "c", **settings)
    assert OmniLMMForCausalLM.from_pretrained(tmp_path / "c").config.mm_vision_tower == TOWER


def test_every_token_of_the_tokenizer_gets_a_row(parts, tmp_path):
    names = [*NEW_TOKENS, "<slice>", "</slice>"]
    added = [{"id": 87 + number, "content": name} for number, name in enumerate(names)]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    report = build(parts, tmp_path / "out", tokenizer=tmp_path)
    assert report["rows_set_to_the_mean"] == list(range(87, 98))
