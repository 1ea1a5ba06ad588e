"""MaskBench: does a trainer learn what it should, and only that?

    python benchmarks/maskbench/run.py [--work DIR] [--contestant NAME=PYTHON]... [--only NAME]...

Every contestant is asked for the ids and labels of the same conversations under the same templates, each
through its own public code in an environment of its own (README.md says how to make them), and judged by
characters. ``ours`` and ``transformers_mask`` run in this environment. Writes results.json (every verdict)
and results.md (the table, by groups, and each contestant's worst example). A contestant without an
environment is listed as not installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from conversations import conversations
from jinja2 import TemplateError
from judge import VERDICTS, Judge
from templates import TEMPLATES, Template, write_tokenizers

HERE = Path(__file__).parent
PACKAGES = {
    "ours": "omnilmm-toolkit",
    "transformers_mask": "transformers",
    "trl_sft": "trl",
    "swift_template": "ms-swift",
    "llamafactory_template": "llamafactory",
    "axolotl_strategy": "axolotl",
}
NOT_INSTALLED = {  # as published in repositories, in no package: fetched by the person who runs it
    "llava_next": "LLaVA-NeXT's preprocess functions",
    "qwen_vl_finetune": "Qwen-VL's finetuning code",
}
HERE_INSTALLED = ("ours", "transformers_mask")
IMAGE_TOKENS = ("<im_patch>", "<im_start>", "<im_end>")
WORST = ("leaked", "injected", "lost", "crashed", "refused")
NO_ANSWER = {"outcome": "crashed", "detail": "no answer"}
MARGIN = 3  # tokens of the limit beyond the turns that shall fit


def main() -> None:
    """Ask, judge, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/maskbench"))
    parser.add_argument("--contestant", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument(
        "--only",
        action="append",
        choices=[*PACKAGES, "nobody"],
        help="ask these again; nobody: judge what was answered",
    )
    parser.add_argument("--timeout", type=int, default=900, help="seconds that a contestant may take")
    options = parser.parse_args()
    pythons = dict.fromkeys(HERE_INSTALLED, sys.executable)
    for one in options.contestant:
        name, _, python = one.partition("=")
        if name not in PACKAGES or not python:
            parser.error(f"--contestant {one}: must be NAME=PYTHON, with NAME of {', '.join(PACKAGES)}")
        pythons[name] = python
    for name in options.only or ():
        if name != "nobody" and name not in pythons:
            parser.error(f"--only {name}: needs --contestant {name}=PYTHON")
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.work)
    results = {}
    for name in PACKAGES:
        if name in pythons and (not options.only or name in options.only):
            bench.ask(name, pythons[name], options.timeout)
        results[name] = bench.results(name)
    results |= {name: {"version": "not installed", "verdicts": []} for name in NOT_INSTALLED}
    file = options.work / "results.json"
    file.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    table = report(results)
    (options.work / "results.md").write_text(table, encoding="utf-8")
    print(table)


class Bench:
    """The questions of all templates, their judges, and a folder with what was asked and answered."""

    def __init__(self, work: Path, templates: tuple[Template, ...] = TEMPLATES) -> None:
        from transformers import AutoTokenizer

        self._work = work
        if not (work / "tokenizers" / templates[-1].name).exists():
            write_tokenizers(work / "tokenizers", templates)
        self._templates = {template.name: template for template in templates}
        self._tokenizers = {
            name: AutoTokenizer.from_pretrained(work / "tokenizers" / name, trust_remote_code=False)
            for name in self._templates
        }
        for tokenizer in self._tokenizers.values():
            tokenizer.add_tokens(list(IMAGE_TOKENS), special_tokens=True)
        self._judges = {
            name: Judge(self._tokenizers[name], template, IMAGE_TOKENS)
            for name, template in self._templates.items()
        }
        self.questions = [
            {**case, "template": template.name, "max_length": self._limit(case, template)}
            for template in templates
            for case in conversations()
        ]
        self._asked = {(one["template"], one["name"]): one for one in self.questions}
        lines = "".join(json.dumps(one) + "\n" for one in self.questions)
        (work / "questions.jsonl").write_text(lines, encoding="utf-8")

    def _limit(self, case: dict[str, Any], template: Template) -> int | None:
        """Tokens: the turns before ``cut_after`` and a little of the question, or most of the reply to it."""
        keep = case["cut_after"]
        if keep is None:
            return None
        if case["cut_in"] == "question":
            return len(self._ids(case["messages"][:keep], None, template)) + MARGIN
        return len(self._ids(case["messages"][: keep + 2], None, template)) - MARGIN - 1

    def _ids(self, messages: list[dict[str, Any]], tools: Any, template: Template) -> list[int]:
        tokenizer = self._tokenizers[template.name]
        return tokenizer.apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"]

    def ask(self, name: str, python: str, timeout: int) -> None:
        """Run a contestant; its answers and its version lie in the work folder then."""
        out = self._work / f"{name}.jsonl"
        out.unlink(missing_ok=True)
        paths = [str(HERE / "contestants"), *([str(HERE.parents[1])] if name == "ours" else [])]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
        script = str(HERE / "contestants" / f"{name}.py")
        files = [str(self._work / "questions.jsonl"), str(self._work / "tokenizers"), str(out)]
        with (self._work / f"{name}.log").open("w") as log:
            problem = run(
                [python, script, *files], timeout, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        version = "could not be run" if problem else version_of(PACKAGES[name], python)
        if problem:
            out.unlink(missing_ok=True)
            print(f"{name} could not be run ({problem}): see {log.name}", file=sys.stderr)
        (self._work / f"{name}.version").write_text(version)

    def results(self, name: str) -> dict[str, Any]:
        """A verdict per answer that lies in the work folder."""
        answers, version = self._work / f"{name}.jsonl", self._work / f"{name}.version"
        if not version.exists():
            return {"version": "not installed", "verdicts": []}
        if not answers.exists():
            return {"version": version.read_text(), "verdicts": []}
        given = map(json.loads, answers.read_text(encoding="utf-8").splitlines())
        of = {(one["template"], one["name"]): one for one in given}
        verdicts = [
            self._verdict(of.get(asked) or dict(zip(("template", "name"), asked, strict=True)) | NO_ANSWER)
            for asked in self._asked
        ]
        return {"version": version.read_text(), "verdicts": verdicts}

    def _verdict(self, answer: dict[str, Any]) -> dict[str, Any]:
        question = self._asked[answer["template"], answer["name"]]
        verdict = self._judges[answer["template"]].judge(question, answer, *self._own(question))
        about = {name: question[name] for name in ("template", "name", "group")}
        return about | {"verdict": verdict.verdict, "detail": verdict.detail}

    def _own(self, question: dict[str, Any]) -> list[Counter[int]]:
        """Control tokens that the template itself prints for these turns; the same behind a system turn."""
        blanks = {"content": "x", "reasoning_content": "x"}
        messages = [
            {key: blanks.get(key, value) for key, value in message.items()}
            for message in question["messages"]
        ]
        template = self._templates[question["template"]]
        ids = self._tokenizers[template.name].all_special_ids
        if messages[0]["role"] == "assistant":  # some put an empty question in front
            messages = [{"role": "user", "content": "x"}, *messages]
        own = []
        for turns in (messages, [{"role": "system", "content": "x"}, *messages]):
            try:
                own.append(Counter(self._ids(turns, question["tools"], template)))
            except TemplateError:  # it refuses: whoever answers all the same is judged by the text alone
                own.append(Counter(dict.fromkeys(ids, 2 * len(messages) + 1)))
        return own


def run(command: list[str], timeout: int, **options: Any) -> str:
    """Why the command did not end well; "" if it did."""
    try:
        code = subprocess.run(command, timeout=timeout, check=False, **options).returncode
    except subprocess.TimeoutExpired:
        return f"no end after {timeout} s"
    except OSError as error:
        return str(error)
    return f"exit status {code}" if code else ""


def version_of(package: str, python: str) -> str:
    """A package's version in an environment."""
    if python == sys.executable:
        return importlib.metadata.version(package)
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def report(results: dict[str, Any]) -> str:
    """Markdown: a row per contestant, one per group, then the worst example of each."""
    lines = ["| contestant | version | " + " | ".join(VERDICTS) + " |", "|---" * (len(VERDICTS) + 2) + "|"]
    for name, result in results.items():
        counts = Counter(one["verdict"] for one in result["verdicts"])
        cells = [str(counts[one]) if result["verdicts"] else "–" for one in VERDICTS]
        lines.append(f"| {name} | {result['version']} | " + " | ".join(cells) + " |")
    ran = {name: result["verdicts"] for name, result in results.items() if result["verdicts"]}
    groups = list(dict.fromkeys(one["group"] for verdicts in ran.values() for one in verdicts))
    lines += ["", "Right or refused, of all, by group:", ""]
    lines += ["| group | " + " | ".join(ran) + " |", "|---" * (len(ran) + 1) + "|"]
    for group in groups:
        cells = [_share([one for one in verdicts if one["group"] == group]) for verdicts in ran.values()]
        lines.append(f"| {group} | " + " | ".join(cells) + " |")
    lines += ["", "The worst of each:", ""]
    for name, verdicts in ran.items():
        bad = [one for one in verdicts if one["verdict"] in WORST]
        for one in sorted(bad, key=lambda one: WORST.index(one["verdict"]))[:1]:
            lines.append(f"- {name}: {one['verdict']} in {one['name']} ({one['template']}): {one['detail']}")
    return "\n".join(lines) + "\n"


def _share(verdicts: list[dict[str, Any]]) -> str:
    counts = Counter(one["verdict"] for one in verdicts)
    asked = len(verdicts) - counts["not run"]
    refused = f" + {counts['refused']}" if counts["refused"] else ""
    return f"{counts['right']}{refused} of {asked}" if asked else "–"


if __name__ == "__main__":
    main()
