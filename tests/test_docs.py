"""The documentation is true: links lead somewhere, options exist, commands and snippets run."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import replace
from functools import cache
from pathlib import Path

import click
import docs_pages
import pytest
import yaml
from docs_pages import ROOT, blocks, commands

from omnidata import __version__, cli
from omnidata.builder.build import build
from omnidata.builder.settings import options_of, settings_of
from omnidata.schema import UserError
from pipelines.config import Recipe, parse_recipe

PAGES = docs_pages.pages()
TREES = ("omnidata", "omnimodel", "pipelines", "tests", "benchmarks", "examples", "docs")
STARTERS = ("python", "torchrun", "accelerate", "bash", "sbatch", "kubectl")  # of scripts


def name(page):
    return str(page.relative_to(ROOT))


def options_of_script(path):
    """The flags that a script's argparse or click knows, from its text; train.py's stand in command.py."""
    texts = [path.read_text()]
    if path == ROOT / "pipelines" / "train.py":
        texts.append((ROOT / "pipelines" / "command.py").read_text())
    return set(re.findall(r'"(--?[a-z][\w-]*)"', "".join(texts)))


ALL_OPTIONS = {"--help", "--version", "--resume"}
for command in cli.cli.commands.values():
    ALL_OPTIONS.update(*((*parameter.opts, *parameter.secondary_opts) for parameter in command.params))
for tree in ("pipelines", "benchmarks", "omnimodel", "docs", "tests/faults"):
    ALL_OPTIONS.update(*map(options_of_script, (ROOT / tree).rglob("*.py")))


# --- links, files, options --------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_anchors_lead_somewhere(page):
    for line, target in docs_pages.links(page):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{page}:{line} leads to {target}"
        assert not anchor or anchor in docs_pages.anchors(other), f"{page}:{line}: no heading for {target}"


def test_every_page_is_in_the_index():
    listed = {target for _, target in docs_pages.links(ROOT / "docs" / "README.md")}
    assert listed >= {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}


def _recipe_key_exists(dotted):
    kind = Recipe
    for part in dotted.split("."):
        hints = getattr(kind, "__dataclass_fields__", None)
        if hints is None:
            return True  # of a mapping
        if part not in hints:
            return False
        kind = _class_of(kind, part)
    return True


def _class_of(kind, field):
    import types
    import typing

    hint = typing.get_type_hints(kind)[field]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = typing.get_args(hint)[0]
    return hint


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_keys_files_and_targets_in_backquotes_exist(page):
    theirs = docs_pages.first_column_lines(page) if page.name == "coming_from.md" else set()
    sections = "|".join(Recipe.__dataclass_fields__)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for line, text in docs_pages.code_spans(page):
        where = f"{page}:{line}: `{text}`"
        if line not in theirs and (match := re.match(r"--[a-z][\w-]+", text)):
            assert match[0] in ALL_OPTIONS, where
        if re.fullmatch(rf"(?:{sections})(?:\.[a-z_]+)+", text):
            assert _recipe_key_exists(text), where
        if re.fullmatch(rf"(?:{'|'.join(TREES)})/[\w./-]+", text):
            assert (ROOT / text).exists(), where
        if re.fullmatch(r"omni(?:data|model)(?:\.\w+)+", text):
            assert _is_name(text), where
        if match := re.fullmatch(r"make ([a-z-]+)", text):
            assert match[1] in targets, where


@cache
def _is_name(dotted):
    """A module of ours, or something that one has; nothing is imported."""
    folder = ROOT
    for number, part in enumerate(dotted.split(".")):
        if (folder / part).is_dir():
            folder = folder / part
            continue
        file = folder / f"{part}.py"
        rest = dotted.split(".")[number + (1 if file.exists() else 0) :]
        text = (file if file.exists() else folder / "__init__.py").read_text()
        return all(re.search(rf"\b{re.escape(name)}\b", text) for name in rest)
    return True


# --- commands and snippets, looked at ---------------------------------------------------------------------

BLOCKS = [block for page in PAGES for block in blocks(page)]


def of(*languages):
    return [block for block in BLOCKS if block.language in languages]


def test_blocks_say_what_they_are():
    assert {block.language for block in BLOCKS} <= {"sh", "python", "yaml", "json", "text"}
    assert not [str(block) for block in BLOCKS if block.mark and block.language not in ("sh", "python")]


@pytest.mark.parametrize("block", of("sh"), ids=str)
def test_commands_have_their_files_options_and_recipe_keys(block):
    for words in commands(block.text):
        check_command(words, str(block))


def check_command(words, where):
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    tool, rest = words[0], words[1:]
    if tool == "omnidata":
        check_omnidata(rest, where)
    elif tool == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(rest) <= set(targets), where
    elif tool == "pip" or tool.endswith("/pip"):
        check_extras(rest, where)
    else:
        check_scripts(rest if tool in STARTERS else [], where)


def check_omnidata(rest, where):
    if rest[0].startswith("-"):
        assert rest[0] in ALL_OPTIONS, where
        return
    command = cli.cli.commands[rest[0]]
    context = click.Context(command, info_name=rest[0], resilient_parsing=True)
    arguments = [word for word in rest[1:] if not word.startswith("--config")]
    command.make_parser(context).parse_args(arguments)  # raises for an option that is not there


def check_extras(rest, where):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in rest:
        if match := re.search(r"(?:^\.|omnilmm-toolkit)\[([\w,]+)\]", word):
            assert set(match[1].split(",")) <= set(extras), where


def check_scripts(rest, where):
    named = re.compile(r"(?:pipelines|benchmarks|examples|docs)/\S+\.\w+$")
    scripts = [ROOT / word for word in rest if named.match(word)]
    for script in scripts:
        assert script.exists(), f"{where}: {script}"
    if "-m" in rest and rest[rest.index("-m") + 1].startswith("omni"):
        scripts = [ROOT / (rest[rest.index("-m") + 1].replace(".", "/") + ".py")]
    programs = [script for script in scripts if script.suffix == ".py"]
    if programs and "examples" not in programs[0].parts:
        after = rest[rest.index(name(programs[0])) :] if name(programs[0]) in rest else rest
        imported = re.findall(r"^from (pipelines\.\w+) import", programs[0].read_text(), re.MULTILINE)
        sources = [programs[0], *(ROOT / f"{module.replace('.', '/')}.py" for module in imported)]
        known = set().union(*map(options_of_script, sources))
        flags = {word.partition("=")[0] for word in after if word.startswith("--")}
        assert flags <= known, f"{where}: {flags - known}"
    recipes = [script for script in scripts if script.suffix == ".yaml" and "recipes" in script.parts]
    for recipe in recipes:
        tree = yaml.safe_load(recipe.read_text())
        for word in rest:
            if (match := re.fullmatch(r"([a-z_]+(?:\.\w+)+)=.*", word)) and not word.startswith("--"):
                assert _recipe_key_exists(match[1]), f"{where}: {word}"
        assert parse_recipe(tree, name=recipe.name)


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_snippets_compile_and_import_what_is_there(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("omni"):
            for alias in node.names:
                assert _is_name(f"{node.module}.{alias.name}"), f"{block}: {alias.name}"


@pytest.mark.parametrize("block", of("yaml", "json"), ids=str)
def test_recipes_and_json_have_no_mistake(block):
    if block.language == "json":
        json.loads(block.text)
        return
    tree = yaml.safe_load(block.text)
    try:
        assert parse_recipe(tree, name=str(block))
    except UserError as error:
        raise AssertionError(str(error)) from None


# --- commands and snippets, run ---------------------------------------------------------------------------


@pytest.fixture
def workspace(tmp_path):
    """A folder that looks like a checkout to a reader's commands."""
    for tree in (*TREES, "README.md", "Makefile"):
        (tmp_path / tree).symlink_to(ROOT / tree)
    return tmp_path


def test_first_hour_can_be_followed(workspace, monkeypatch, capfd):
    """Its commands and snippets as a reader types them, but for those that are marked."""
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("NO_COLOR", "1")
    for block in blocks(ROOT / "docs" / "first_hour.md"):
        if not block.mark and block.language in ("sh", "python"):
            follow(block, workspace)
    capfd.readouterr()


@pytest.mark.slow
def test_every_page_can_be_followed(workspace, monkeypatch, capfd):
    """Page after page, as later ones use what earlier ones wrote; first hour with its training."""
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("NO_COLOR", "1")
    for block in BLOCKS:
        if block.mark != "parsed" and block.language in ("sh", "python"):
            follow(block, workspace)
    capfd.readouterr()


def follow(block, folder):
    if block.language == "python":
        exec(compile(block.text, str(block), "exec"), {"__name__": "snippet"})
        return
    if re.search(r" [|>]+ (?!\S+ <<)|\$", block.text) or block.mark:
        run_in_bash(block.text, folder, str(block))
        return
    for step in docs_pages.steps(block.text):
        if isinstance(step, tuple):
            (folder / step[0]).write_text(step[1])
        elif step[0] != "omnidata":
            run_in_bash(shlex.join(step), folder, str(block))
        elif step[1] == "build-shards" and block.page.name != "first_hour.md" and "--config" not in step:
            build_here(step[2:])
        else:
            assert cli.run(step[1:]) == 0, f"{block}: {' '.join(step)}"


def build_here(arguments):
    """The command without processes of its own, which take most of the time of a small build."""
    with cli.cli.commands["build-shards"].make_context("build-shards", arguments) as context:
        flags = context.params | {"slice_tokens": tuple(context.params["slice_tokens"])}
    options = replace(options_of(flags), executor="inline", quiet=True)
    assert not build(settings_of(flags), flags["out"], options).rejects.get("unexpected")


def run_in_bash(text, folder, where):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PATH": path, "PYTHONPATH": paths, "NO_COLOR": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=3600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{where}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


# --- what is written from the code ------------------------------------------------------------------------


def test_generated_pages_are_up_to_date():
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_guarantees_name_every_mutant_and_no_other():
    from faults.mutants import MUTANTS

    text = (ROOT / "docs" / "guarantees.md").read_text()
    named = set(re.findall(r'"([^"]+)"', text.partition("## Data")[2]))
    assert named == {mutant.name for mutant in MUTANTS}


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]
