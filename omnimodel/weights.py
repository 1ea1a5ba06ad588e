"""Checkpoints: put a first one together, convert an old one, list what one must hold.

    python -m omnimodel.weights assemble --llm zephyr-7b-beta --vision DIR_OR_TIMM_NAME --out start
        a Mistral folder + a timm ViT + a fresh resampler -> the model that stage 1 starts from
    python -m omnimodel.weights convert OmniLMM-12B --out OmniLMM-12B-st
        pytorch_model-*.bin -> safetensors, one file in memory at a time
    python -m omnimodel.weights names OmniLMM-12B
        name and shape of every tensor that the folder's config.json asks for

Pickled files are only ever read with ``weights_only=True``: a tensor file must not be able to run code.
Loading itself needs nothing from here: ``OmniLMMForCausalLM.from_pretrained(dir)`` reads all layouts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, MistralForCausalLM

from omnimodel import vision
from omnimodel.config import EVA02_E, OmniLMMConfig
from omnimodel.modeling import OmniLMMForCausalLM
from omnimodel.parts import Parts

# In the order of their ids behind the language model's own vocabulary.
NEW_TOKENS = (
    "<im_patch>", "<im_start>", "<im_end>", "<box>", "</box>", "<ref>", "</ref>", "<quad>", "</quad>"
)  # fmt: skip
Tensors = dict[str, torch.Tensor]


def expected_shapes(config: OmniLMMConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every saved tensor; allocates nothing."""
    with torch.device("meta"):
        model = OmniLMMForCausalLM(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# --- assemble ---------------------------------------------------------------------------------------------


def assemble(
    llm: Path,
    vision_source: str,
    out: Path,
    *,
    vision_name: str | None = None,
    vision_kwargs: dict[str, Any] | None = None,
    tokenizer: Path | None = None,
    num_query: int = 64,
    image_size: int = 448,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the stage-1 start to ``out`` and return a report of what came from where."""
    _refuse_filled(out)
    tower_name, tower_file = _vision_source(vision_source, vision_name)
    mistral = AutoConfig.from_pretrained(llm, trust_remote_code=False)  # nor ask whether to run its code
    if mistral.model_type != "mistral":
        raise ValueError(f"{llm} holds a {mistral.model_type} model; OmniLMM is built on Mistral")
    token_ids = _new_token_ids(tokenizer, mistral.vocab_size)
    settings = {key: value for key, value in mistral.to_dict().items() if key != "model_type"}
    settings |= {f"{name.strip('<>')}_token": token_ids[name] for name in NEW_TOKENS[:3]}
    settings |= {
        "vocab_size": max(mistral.vocab_size, max(token_ids.values()) + 1, _tokenizer_size(tokenizer))
    }
    mean, std = _statistics(vision_source, tower_name)
    config = OmniLMMConfig(
        **settings | {"architectures": ["OmniLMMForCausalLM"], "dtype": dtype},
        mm_vision_tower=tower_name,
        vision_kwargs=vision_kwargs,
        num_query=num_query,
        image_size=image_size,
        image_mean=mean,
        image_std=std,
    )
    with torch.device("meta"):
        model = OmniLMMForCausalLM(config)
    tower, dropped = _tower_weights(model, tower_file, dtype)  # may have to download, so it fails first
    language, new_rows = _language_weights(llm, config, set(token_ids.values()), dtype)
    torch.manual_seed(seed)
    state = language | tower | _resampler_weights(model, dtype)
    model.load_state_dict(state, assign=True, strict=True)
    model.save_pretrained(out)
    return _report(model, state, new_rows, dropped, token_ids)


def _refuse_filled(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give a new folder with --out")


def _new_token_ids(tokenizer: Path | None, vocab_size: int) -> dict[str, int]:
    """From the tokenizer the training data was built with, else the ids right behind the vocabulary."""
    if tokenizer is None:
        return {name: vocab_size + number for number, name in enumerate(NEW_TOKENS)}
    added = json.loads((Path(tokenizer) / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    missing = [name for name in NEW_TOKENS if name not in ids]
    if missing:
        raise ValueError(
            f"{tokenizer} lacks {' '.join(missing)}; make one with "
            "`omnidata prepare-tokenizer SOURCE --out DIR`"
        )
    return {name: ids[name] for name in NEW_TOKENS}


def _tokenizer_size(tokenizer: Path | None) -> int:
    """One more than the largest id, so that every token has a row: others may have been added as well."""
    if tokenizer is None:
        return 0
    added = json.loads((Path(tokenizer) / "tokenizer.json").read_text())["added_tokens"]
    return 1 + max(token["id"] for token in added)


def _language_weights(
    llm: Path, config: OmniLMMConfig, new_ids: set[int], dtype: torch.dtype
) -> tuple[Tensors, list[int]]:
    """The folder's weights; the rows of new tokens are the mean of the others, in and out."""
    state = MistralForCausalLM.from_pretrained(llm, dtype=dtype).state_dict()
    old_size = state["lm_head.weight"].shape[0]
    new_rows = sorted(new_ids | set(range(old_size, config.vocab_size)))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = _with_mean_rows(state[name], config.vocab_size, new_rows)
    return state, new_rows


def _with_mean_rows(table: torch.Tensor, size: int, new_rows: list[int]) -> torch.Tensor:
    is_old = torch.ones(table.shape[0], dtype=torch.bool)
    is_old[[row for row in new_rows if row < table.shape[0]]] = False
    mean = table[is_old].float().mean(dim=0).to(table.dtype)
    grown = torch.cat([table, mean.expand(max(0, size - table.shape[0]), -1)])
    grown[new_rows] = mean
    return grown


def _statistics(source: str, name: str) -> tuple[list[float], list[float]]:
    """Mean and deviation of the tower's training images: what its folder says, else what timm knows."""
    card = Path(source) / "config.json"
    trained = json.loads(card.read_text()).get("pretrained_cfg") if card.is_file() else None
    if trained and {"mean", "std"} <= trained.keys():
        return list(trained["mean"]), list(trained["std"])
    return vision.statistics_of(name)


def _vision_source(source: str, name: str | None) -> tuple[str, Path | None]:
    """A timm name, or a folder or file of timm weights -> (timm name, file or None to download)."""
    path = Path(source)
    if not path.exists():
        if not timm.is_model(source.split(".")[0]):
            raise ValueError(f"--vision {source} is neither a folder or file nor a timm model")
        return source, None
    names = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")
    files = [path] if path.is_file() else [path / each for each in names if (path / each).exists()]
    if not files:
        raise ValueError(f"--vision {source} holds none of {', '.join(names)}")
    card = path / "config.json"
    if name is None and path.is_dir() and card.exists():
        name = json.loads(card.read_text()).get("architecture")
    if name is None:
        raise ValueError(f"{source} does not say which timm model it is; add --vision-name {EVA02_E}")
    return name, files[0]


def _tower_weights(
    model: OmniLMMForCausalLM, file: Path | None, dtype: torch.dtype
) -> tuple[Tensors, list[str]]:
    """Weights that the tower keeps, and the names of those it drops; timm translates foreign layouts."""
    config = model.config
    overlay = {} if file is None else {"pretrained_cfg_overlay": {"file": str(file)}}
    try:
        full = timm.create_model(
            config.mm_vision_tower, pretrained=True, num_classes=0, **overlay, **config.vision_kwargs
        ).state_dict()
    except (OSError, RuntimeError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise ValueError(_no_weights(config.mm_vision_tower, file, first_line)) from error
    dropped = vision.dropped_names(list(full), model.model.vision_tower)
    prefix = "model.vision_tower."
    return {prefix + name: full[name].to(dtype) for name in full if name not in dropped}, dropped


def _no_weights(name: str, file: Path | None, error: str) -> str:
    if file is not None:
        return (
            f"{file} does not hold the weights of timm's {name} ({error}); --vision-name says which they are"
        )
    hub_id = getattr(timm.get_pretrained_cfg(name, allow_unregistered=True), "hf_hub_id", None)
    source = (
        f"download huggingface.co/{hub_id} on a machine that can" if hub_id else "timm has none to download"
    )
    return (
        f"no weights for the timm model {name}: {error} Either way, --vision takes a local folder "
        f"(config.json and model.safetensors) or file: {source}"
    )


def _resampler_weights(model: OmniLMMForCausalLM, dtype: torch.dtype) -> Tensors:
    resampler = model.model.resampler.to_empty(device="cpu")
    for module in resampler.modules():
        model.model._init_weights(module)
    return {f"model.resampler.{name}": tensor.to(dtype) for name, tensor in resampler.state_dict().items()}


def _report(
    model: OmniLMMForCausalLM,
    state: Tensors,
    new_rows: list[int],
    dropped: list[str],
    token_ids: dict[str, int],
) -> dict[str, Any]:
    parts, counts = Parts(model), dict[str, int]()
    for name, tensor in state.items():
        counts[parts.of(name)] = counts.get(parts.of(name), 0) + tensor.numel()
    return {
        "parameters": counts | {"total": sum(counts.values())},
        "new_token_ids": token_ids,
        "rows_set_to_the_mean": new_rows,
        "dropped_from_the_tower": dropped,
        "random": "resampler",
    }


# --- convert ----------------------------------------------------------------------------------------------


def convert(source: Path, out: Path) -> dict[str, Any]:
    """``pytorch_model*.bin`` -> safetensors and an index; names and shapes are checked first."""
    _refuse_filled(out)
    files = sorted(source.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{source} has no pytorch_model*.bin to convert")
    shapes = {
        name: tuple(tensor.shape) for file in files for name, tensor in _read(file).items() if _is_saved(name)
    }
    _refuse_other_shapes(source, shapes, expected_shapes(OmniLMMConfig.from_pretrained(source)))
    out.mkdir(parents=True, exist_ok=True)
    weight_map, num_bytes = dict[str, str](), 0
    for number, file in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        # clone: tensors of a pickle may share memory, which safetensors refuses
        tensors = {key: tensor.clone().contiguous() for key, tensor in _read(file).items() if _is_saved(key)}
        save_file(tensors, out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    for path in _companions(source):
        shutil.copy2(path, out / path.name)
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return {"files": len(files), "tensors": len(weight_map), "bytes": num_bytes}


def _read(file: Path) -> Tensors:
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _is_saved(name: str) -> bool:
    return not name.endswith("rotary_emb.inv_freq")  # older transformers saved this constant


def _companions(source: Path) -> Iterator[Path]:
    for path in sorted(source.iterdir()):
        if path.suffix in (".json", ".jinja", ".model", ".md") and not path.name.endswith(".index.json"):
            yield path


def _refuse_other_shapes(
    source: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    problems = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} is {found[name]}, not {expected[name]}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]
    if problems:
        raise ValueError(
            f"{source} does not hold the weights of its config.json:\n  " + "\n  ".join(problems)
        )


# --- command line -----------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 done, 1 bad input (one message), 2 wrong usage."""
    options = _parser().parse_args(argv)
    try:
        print(json.dumps(options.run(options), indent=2))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m omnimodel.weights", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("assemble", help="Mistral folder + timm ViT -> the start of stage 1")
    one.add_argument("--llm", type=Path, required=True, help="folder of a Mistral model, such as Zephyr-7B")
    one.add_argument("--vision", required=True, help="timm name (downloads), or folder or file of weights")
    one.add_argument("--vision-name", help="timm name of the weights, if the folder does not say it")
    one.add_argument("--vision-kwargs", type=json.loads, help="JSON for timm.create_model")
    one.add_argument(
        "--tokenizer", type=Path, help="the dataset's tokenizer folder: gives the new tokens' ids"
    )
    one.add_argument("--num-query", type=int, default=64)
    one.add_argument("--image-size", type=int, default=448)
    one.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    one.add_argument("--seed", type=int, default=0, help="of the resampler's random start")
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(run=_run_assemble)
    two = commands.add_parser("convert", help="pytorch_model-*.bin -> safetensors")
    two.add_argument("source", type=Path)
    two.add_argument("--out", type=Path, required=True)
    two.set_defaults(run=lambda options: convert(options.source, options.out))
    three = commands.add_parser("names", help="name and shape of every tensor a config.json asks for")
    three.add_argument("source", type=Path)
    three.set_defaults(run=lambda options: expected_shapes(OmniLMMConfig.from_pretrained(options.source)))
    return parser


def _run_assemble(options: argparse.Namespace) -> dict[str, Any]:
    return assemble(
        options.llm,
        options.vision,
        options.out,
        vision_name=options.vision_name,
        vision_kwargs=options.vision_kwargs,
        tokenizer=options.tokenizer,
        num_query=options.num_query,
        image_size=options.image_size,
        dtype=getattr(torch, options.dtype),
        seed=options.seed,
    )


if __name__ == "__main__":
    raise SystemExit(main())
