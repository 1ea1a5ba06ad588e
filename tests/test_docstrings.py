"""Names in docstrings and comments lead somewhere: files, modules, and what stands in double backticks."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("omnidata", "omnimodel", "pipelines")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# What others call so: libraries, keys of foreign records, variables of the environment.
FOREIGN = {
    *("ast", "concurrent.futures", "regex", "to_pandas", "NO_COLOR", "training_step", "data_collator"),
    *("accelerator.save_state", "load_state", "vit_so400m_patch14_siglip_384", "BytesStorageMetadata"),
    *("isMasked", "imagePath_0", "qwen3_vl/modeling_qwen3_vl.py"),
}
FILE = re.compile(r"(?<![\w/.*{<])((?:[a-z_]\w*/)*[a-z_]\w*\.py)\b")
DOTTED = re.compile(rf"\b(?:{'|'.join(PACKAGES)})(?:\.\w+)+")
QUOTED = re.compile(r"``([A-Za-z_][\w.]*)(?:\([^`\n]*\))?``")


def docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    """The nodes of all docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                yield first.value


def told(path: Path) -> Iterator[str]:
    """Docstrings and comments."""
    text = path.read_text()
    yield from (node.value for node in docstrings(ast.parse(text)) if isinstance(node.value, str))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def words_of(tree: ast.AST) -> Iterator[str]:
    """Every identifier of the code, and every word in its strings but docstrings."""
    apart = {id(node) for node in docstrings(tree)}
    for node in ast.walk(tree):
        for name in ("id", "attr", "arg", "name"):
            if isinstance(found := getattr(node, name, None), str):
                yield from found.split(".")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in apart:
            yield from re.findall(r"\w+", node.value)


@cache
def all_words() -> frozenset[str]:
    words = {part for path in SOURCES for part in path.relative_to(ROOT).with_suffix("").parts}
    for path in SOURCES:
        words.update(words_of(ast.parse(path.read_text())))
    return frozenset(words)


@cache
def all_files() -> tuple[str, ...]:
    return tuple(
        path.relative_to(ROOT).as_posix()
        for folder in (*PACKAGES, "tests", "benchmarks", "docs", "examples")
        for path in (ROOT / folder).rglob("*.py")
    )


def is_file(name: str, package: str) -> bool:
    """A path from the root, or the end of the path of one of the package's own files."""
    return any(
        path == name or (path.startswith(f"{package}/") and path.endswith(f"/{name}")) for path in all_files()
    )


def is_dotted(name: str) -> bool:
    """A module, a room, or what is defined in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:end])
        module = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if end == len(parts) and (place.is_dir() or module.exists()):
            return True
        if module.exists():
            return parts[end] in set(words_of(ast.parse(module.read_text())))
    return False


def unknown(text: str, package: str) -> Iterator[str]:
    """The names in a text that lead nowhere."""
    yield from (name for name in FILE.findall(text) if not is_file(name, package))
    yield from (name for name in DOTTED.findall(text) if not name.endswith(".py") and not is_dotted(name))
    for name in QUOTED.findall(text):
        if name.rstrip(".").split(".")[-1] not in all_words():
            yield name


@pytest.mark.parametrize("package", PACKAGES)
def test_names_in_docstrings_and_comments_exist(package):
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in SOURCES
        if path.is_relative_to(ROOT / package)
        for text in told(path)
        for name in unknown(text, package)
        if name not in FOREIGN
    ]
    assert wrong == []


def test_names_that_are_gone_are_found():
    """The check itself, on names that were here once."""
    text = (
        "See families.py, ``omnidata.builder.interop``, ``how_it_was_once(x)``; not ``Dataset``, loader.py."
    )
    assert list(unknown(text, "omnidata")) == ["families.py", "omnidata.builder.interop", "how_it_was_once"]
