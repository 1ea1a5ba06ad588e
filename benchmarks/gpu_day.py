"""One part of benchmarks/gpu_day.sh: ``python benchmarks/gpu_day.py PART --out FILE.jsonl [--toy]``.

Parts start other programs of this repository as a user would, and boil their output down to a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from train_setup import BILLION, TINY, make_corpus  # noqa: E402

from pipelines.planning import PUBLISHED  # noqa: E402

FOLDER = Path(os.environ.get("GPU_DAY_FOLDER", "gpu_day"))
Figures = dict[str, Any]
TOLD = FOLDER / "so_far.jsonl"  # --out, when that is known
STARTED: list[subprocess.Popen[bytes]] = []
# What resumes: small, because its checkpoints are written every few steps.
SMALL = BILLION | {
    "mm_vision_tower": "vit_base_patch16_clip_224",
    "vision_kwargs": {"img_size": 448, "depth": 6},
    **{"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6},
    **{"num_attention_heads": 12, "num_key_value_heads": 4},
}


# The published widths; 80 GB hold eight layers of 32 with their moments.
WIDE = PUBLISHED | {"num_hidden_layers": 8}
TOY_QWEN = {
    "text_config": {
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 4096},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
    },
    "vision_config": {
        **{"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "out_hidden_size": 64},
        "deepstack_visual_indexes": [0],
    },
}


def model_of(toy: bool, model: Figures) -> Figures:
    """The model, or at toy sizes the tiny one."""
    return TINY if toy else model


# --- recipes ----------------------------------------------------------------------------------------------


def recipe(name: str, model: Figures, *, toy: bool, steps: int) -> Path:
    """A recipe over the shards of ``data``, as a file."""
    tree: dict[str, Figures] = {
        "run": {"dir": str(FOLDER / name), **({"device": "cpu"} if toy else {"dtype": "bfloat16"})},
        "data": {
            "train": [{"path": str(FOLDER / "corpus" / "data")}],
            "max_tokens": 2048 if toy else 8192,
            "global_batch": 2 if toy else 4,
            "num_workers": 1 if toy else max(1, len(os.sched_getaffinity(0)) - 2),
        },
        "model": {"config": model_of(toy, model), "freeze": ["vision_tower"]},
        "optim": {"lr": 3e-4, "warmup_steps": 2, "schedule": "constant", "steps": steps},
        "checkpoint": {"every": 0},
        "eval": {"every": 0},
        "log": {"every": 5, "tensorboard": False, "plot": False},
    }
    path = FOLDER / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def change(path: Path, sections: dict[str, Figures]) -> None:
    """Merge into the recipe's sections."""
    tree = yaml.safe_load(path.read_text())
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    path.write_text(yaml.safe_dump(tree))


def start(path: Path, *, ranks: int = 0, **environment: str) -> subprocess.Popen[bytes]:
    """train.py in a process group of its own; its output goes beside the recipe."""
    command = [sys.executable, str(HERE.parent / "pipelines" / "train.py"), str(path)]
    if ranks:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command[1:1] = torchrun
    with path.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | environment, start_new_session=True
        )
    STARTED.append(process)
    return process


def end_all(*_: Any) -> None:
    """Nothing that a part started may outlive it: the next part measures the same device."""
    for process in STARTED:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if _:
        sys.exit(124)


def lines_of(path: Path) -> list[Figures]:
    """The steps that a run has told so far."""
    metrics = path.with_suffix("") / "metrics.jsonl"
    if not metrics.exists():
        return []
    lines = [json.loads(x) for x in metrics.read_text().splitlines() if x.endswith("}")]
    return [line for line in lines if "loss" in line]


def finished(path: Path, process: subprocess.Popen[bytes]) -> list[Figures]:
    """The steps of a run that must succeed."""
    if process.wait():
        tail = path.with_suffix(".log").read_text(errors="replace")[-1500:]
        raise SystemExit(f"{path.name} ended with {process.returncode}:\n{tail}")
    return lines_of(path)


def until_step(path: Path, process: subprocess.Popen[bytes], step: int, limit: float = 600.0) -> float:
    """Seconds until the run has told ``step``, or has taken ``limit`` of them."""
    began = time.perf_counter()
    while process.poll() is None and time.perf_counter() - began < limit:
        if any(line["step"] >= step for line in lines_of(path)):
            break
        time.sleep(0.05)
    return time.perf_counter() - began


def tell(row: Figures) -> None:
    """A line of its own for what a part has found so far: its time may be up before its end."""
    line = json.dumps({"part": sys.argv[1], "so_far": True} | row)
    with TOLD.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


# --- the parts --------------------------------------------------------------------------------------------


def data(toy: bool) -> Figures:
    """Photographs, records and shards for all other parts."""
    began = time.perf_counter()
    size = (TINY if toy else BILLION)["image_size"]
    records = 300 if toy else 3000
    (FOLDER / "corpus").mkdir(parents=True, exist_ok=True)
    make_corpus(FOLDER / "corpus", records=records, image_size=size, options=["--split", "val=0.05"])
    sys.path.append(str(HERE.parent / "tests"))  # a processor of the published settings, without a network
    import published

    corpus, folder = FOLDER / "corpus", published.save("qwen3_vl_sft", FOLDER / "qwen-model")
    command = [sys.executable, "-m", "omnidata.cli", "build-shards", str(corpus / "records.jsonl"), "--quiet"]
    command += ["--image-root", str(corpus / "photos"), "--model", folder, "--out", str(FOLDER / "qwen")]
    longest = "2048" if toy else "8192"  # its small vocabulary makes long texts
    subprocess.run([*command, "--max-length", longest], check=True, stdout=sys.stderr)
    report = {"records": records, "seconds": time.perf_counter() - began}
    return report | {"gpu": "none" if toy else torch.cuda.get_device_name(), "torch": torch.__version__}


def resume(toy: bool) -> Figures:
    """kill -9 in mid-run and resume, with and without ``run.deterministic``; bf16 beside fp32."""
    steps, due = (7, 5) if toy else (16, 9)
    threads = {"OMP_NUM_THREADS": "1" if toy else "4"}
    kinds = {"": {"deterministic": True}} if toy else {"": {}, "deterministic-": {"deterministic": True}}
    references, victims = {}, {}
    for kind, run in kinds.items():
        for group, name in ((references, "whole"), (victims, "killed")):
            path = recipe(f"{kind}{name}", SMALL, toy=toy, steps=steps)
            every = {"every": 4 if name == "killed" else 0}
            change(path, {"run": run, "data": {"num_workers": 1 if toy else 3}, "checkpoint": every})
            change(path, {"optim": {"ema": 0.99}})  # saved and resumed, too
            group[kind] = (path, start(path, ranks=1, **threads))
    for path, process in victims.values():
        until_step(path, process, due)
        if process.poll() is not None:
            finished(path, process)
            raise SystemExit(f"{path.name} had ended before it could be killed")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    figures: Figures = {"killed_after_step": due}
    again = {kind: (path, start(path, ranks=1, **threads)) for kind, (path, _) in victims.items()}
    path = recipe("float32", SMALL, toy=toy, steps=steps)
    change(path, {"run": {"dtype": "float32"}, "data": {"num_workers": 1 if toy else 3}})
    process = start(path, **threads)
    for kind in kinds:
        whole, resumed = finished(*references[kind]), finished(*again[kind])
        figures[f"{kind}max_loss_difference"] = difference(whole, resumed)
        figures[f"{kind}steps"] = len(resumed)
    bf16, fp32 = finished(*references[""]), finished(path, process)
    figures |= {"bf16_first_loss": bf16[0]["loss"], "fp32_first_loss": fp32[0]["loss"]}
    return figures | {"bf16_max_loss_difference": difference(bf16, fp32), "last_loss": fp32[-1]["loss"]}


def difference(some: list[Figures], others: list[Figures]) -> float:
    """The largest difference between two runs' losses; they must have the same steps."""
    if [line["step"] for line in some] != [line["step"] for line in others]:
        return float("nan")
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(some, others, strict=True))


def shards(toy: bool) -> Figures:
    """train.py on real shards: the 12B's widths and a Qwen3-VL-4B's, with as many layers as the GPU holds."""
    is_large = not toy and torch.cuda.get_device_properties(0).total_memory > 100e9
    text = {"num_hidden_layers": 36 if is_large else 18}
    variants: dict[str, tuple[str, Figures, Figures]] = {
        "omnilmm_12b_widths": ("corpus/data", WIDE, {}),
        "qwen3_vl_4b_widths": ("qwen", {"text_config": text}, {"activation_checkpointing": "selective"}),
    }
    if toy:
        variants["qwen3_vl_4b_widths"] = ("qwen", TOY_QWEN, {})
    figures: Figures = {}
    for name, (dataset, config, model) in variants.items():
        is_qwen = dataset == "qwen"
        path = recipe(name, config, toy=toy and not is_qwen, steps=4 if toy else 16)
        change(path, {"run": {"device": "cpu", "dtype": "float32"}} if toy else {"run": {}})
        change(
            path, {"data": {"train": [{"path": str(FOLDER / dataset)}], "max_tokens": 2048 if toy else 8192}}
        )
        change(path, {"model": model, "log": {"every": 1}})
        began = time.perf_counter()
        process = start(path)
        first = until_step(path, process, 1)
        until_step(path, process, 4 if toy else 16, limit=600 if toy else 65 - first)
        if process.poll():
            finished(path, process)  # says why
        end_all()  # the weights that it would write are of no use
        lines = lines_of(path)
        figures[name] = speed(lines) | {
            "layers": text["num_hidden_layers"] if is_qwen else config.get("num_hidden_layers"),
            "seconds_to_first_step": first,
            "seconds_in_all": time.perf_counter() - began,
        }
        tell({name: figures[name]})
    return figures


def speed(lines: list[Figures]) -> Figures:
    """Medians over the steps behind the warm-up."""
    names = ("mfu", "tokens_per_s", "images_per_s", "seconds", "data_wait", "memory_gb")
    warm = lines[len(lines) // 4 :]
    return {name: statistics.median(line[name] for line in warm) for name in names if name in warm[0]} | {
        "last_loss": lines[-1]["loss"]
    }


def memory(toy: bool) -> Figures:
    """Peak memory and step time of the 12B's widths, frozen tower, beside the plan (80 GB hold 12 layers)."""
    runs = {
        "sft_12_none": ["--layers", "12", "--stages", "sft"],
        "sft_16_selective": ["--layers", "16", "--stages", "sft", "--checkpointing", "selective"],
        "sft_12_compiled": ["--layers", "12", "--stages", "sft", "--compile"],
        "align_24_none": ["--layers", "24", "--stages", "align"],
    }
    figures: Figures = {}
    for name, words in runs.items():
        if toy:
            words = ["--toy", "--layers", "2", *words[2:]]
        figures[name] = ask("train_gpu.py", "--json", *words)
        tell({name: figures[name]})
    return figures


def ask(script: str, *words: str) -> Figures:
    """Another benchmark's JSON, or why there is none."""
    done = subprocess.run(
        [sys.executable, str(HERE / script), *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"failed": done.stderr[-800:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def qwen(toy: bool) -> Figures:
    """transformers' own Qwen3-VL with our attention: speed, memory, and what makes the host wait."""
    from qwen_gpu import measure

    figures: Figures = {}
    for variant in ("frozen_tower", "all_trained", "compiled")[: 1 if toy else 3]:
        figures |= measure(toy=toy, variants=[variant])
        tell({variant: figures[variant]})
    return figures


def loader(toy: bool) -> Figures:
    """Samples/s of the loader alone, by workers."""
    from omnidata.loader.loader import PackLoader

    figures: Figures = {}
    cores = len(os.sched_getaffinity(0))
    for workers in (1,) if toy else sorted({1, 4, max(1, cores - 2)}):
        packs = iter(
            PackLoader(
                [{"path": str(FOLDER / "corpus" / "data"), "split": "train"}],
                global_batch=1,
                max_tokens=2048 if toy else 8192,
                image_size=(TINY if toy else BILLION)["image_size"],
                num_workers=workers,
                pin_memory=not toy,
            )
        )
        for _ in range(3):
            next(packs)
        began, samples, images = time.perf_counter(), 0, 0
        while time.perf_counter() - began < (1 if toy else 6):
            pack = next(packs)
            samples, images = samples + len(pack.keys), images + len(pack.images)
        seconds = time.perf_counter() - began
        figures[f"{workers}_workers"] = {
            "samples_per_s": samples / seconds,
            "images_per_s": images / seconds,
        }
        del packs
    return figures


def trainer(toy: bool) -> Figures:
    """benchmarks/train.py on the device."""
    words = ["--contenders", "ours, packed", "HF Trainer", "--json"]
    if toy:
        return ask("train.py", *words, "--records", "60", "--steps", "6")
    return ask("train.py", *words, "--device", "cuda", "--records", "1500", "--steps", "11", "--batch", "16")


def answers(toy: bool) -> Figures:
    """generate.py and evaluate.py on the model that ``resume`` left."""
    final = FOLDER / "whole" / "final"
    photo = sorted((FOLDER / "corpus" / "photos").iterdir())[0]
    limit = "8" if toy else "128"
    asked = ["generate.py", "--model", str(final), "--image", str(photo), "--question", "What is this?"]
    scored = [
        "evaluate.py",
        "--model",
        str(final),
        "--data",
        str(FOLDER / "corpus" / "data"),
        "--split",
        "val",
    ]
    figures: Figures = {}
    for words in (asked, [*scored, "--limit", limit, "--out", str(FOLDER / "eval.json")]):
        began = time.perf_counter()
        command = [sys.executable, str(HERE.parent / "pipelines" / words[0]), *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        name = words[0].removesuffix(".py")
        figures[f"{name}_seconds"] = time.perf_counter() - began
        if done.returncode:
            figures[f"{name}_failed"] = done.stderr[-800:]
        elif words is asked:
            figures["answer"] = done.stdout[-200:]
        else:
            figures |= json.loads((FOLDER / "eval.json").read_text())
    return figures


PARTS = {part.__name__: part for part in (data, resume, memory, shards, trainer, loader, answers, qwen)}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    global TOLD
    TOLD = options.out
    if not options.toy and not torch.cuda.is_available():
        sys.exit("this needs a CUDA device; --toy runs its code at toy sizes on the CPU")
    signal.signal(signal.SIGTERM, end_all)  # what `timeout` sends
    began = time.perf_counter()
    try:
        figures = PARTS[options.part](options.toy)
    finally:
        end_all()
    line = json.dumps({"part": options.part, "took": round(time.perf_counter() - began, 1)} | figures)
    with options.out.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


if __name__ == "__main__":
    main()
