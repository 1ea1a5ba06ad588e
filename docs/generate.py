"""Write what the pages take from the code: docs/api.md, and the tables between ``generated`` marks.

    python docs/generate.py            write (`make docs`)
    python docs/generate.py --check    exit 1 and name the pages that are not up to date

Nothing is imported but the contract: sources are parsed, so that no host of an adapter need be installed.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from omnidata import schema  # noqa: E402

# Where to find each public object: heading, package, names, and what comes before them.
API = (
    ("Datasets", "omnidata", ("Dataset", "Sample", "Manifest", "ShardInfo", "webdataset_pipeline")),
    ("Rendering", "omnidata", ("Renderer", "Rendered", "to_conversation", "Reading")),
    ("Planning and loading", "omnidata", ("EpochPlan", "PackLoader", "Microbatch", "Where")),
    (
        "Adapters",
        "omnidata/adapters",
        ("train_dataset", "packs", "PackDataset", "PackModule", "PackTaskEncoder", "PackDataLoader"),
    ),
    (
        "OmniLMM",
        "omnimodel",
        ("OmniLMMConfig", "OmniLMMModel", "OmniLMMForCausalLM", "Resampler", "ImageProcessor"),
    ),
)
HEAD = """# API

Written by `make docs` from the docstrings of the public objects; `tests/test_docs.py` fails if it is out of
date. What is not listed here may change in any release. The commands explain themselves: `omnidata --help`.
"""


def main(arguments: list[str]) -> int:
    """Write, or only compare."""
    texts = wanted()
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        if "--check" in arguments:
            print(f"{path.relative_to(ROOT)} is not up to date: run `make docs`")
        else:
            path.write_text(texts[path])
            print(f"wrote {path.relative_to(ROOT)}")
    return int(bool(stale) and "--check" in arguments)


def wanted() -> dict[Path, str]:
    """Every page that takes something from the code -> its text as it must be."""
    texts = {ROOT / "docs" / "api.md": api()}
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        filled = re.sub(
            r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)",
            lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}",
            text,
            flags=re.DOTALL,
        )
        if "<!-- generated:" in text and page.name != "api.md":
            texts[page] = filled
    return texts


# --- tables of the contract -------------------------------------------------------------------------------


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _reasons() -> str:
    return _table(("reason", "meaning"), [(f"`{name}`", text) for name, text in schema.REASONS.items()])


def _columns(columns: tuple[schema.Column, ...]) -> str:
    rows = [(f"`{column.name}`", f"`{column.type}`", column.doc) for column in columns]
    return _table(("column", "Arrow type", "what"), rows)


def _fields(name: str) -> str:
    """The fields of a dataclass of the contract, with the comments beside them."""
    lines, (_, node) = (ROOT / "omnidata/schema.py").read_text().splitlines(), find("omnidata", name)
    comments = {
        item.target.id: lines[item.lineno - 1].partition("  # ")[2]
        for item in node.body
        if isinstance(item, ast.AnnAssign)
    }
    fields = dataclasses.fields(getattr(schema, name))
    rows = [(f"`{field.name}`", f"`{field.type}`", comments[field.name]) for field in fields]
    return _table(("key", "type", "what"), rows)


TABLES = {
    "reasons": _reasons,
    "index_columns": lambda: _columns(schema.INDEX_COLUMNS),
    "reject_columns": lambda: _columns(schema.REJECT_COLUMNS),
    "manifest": lambda: _fields("Manifest"),
    "shard_info": lambda: _fields("ShardInfo"),
}


# --- the API ----------------------------------------------------------------------------------------------

Definition = ast.ClassDef | ast.FunctionDef


def find(package: str, name: str) -> tuple[str, Definition]:
    """The module and the one top-level definition of a name in a package's folder."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        is_there = re.search(rf"^(?:class|def) {name}\b", text, re.MULTILINE)
        for node in ast.parse(text).body if is_there else ():
            if isinstance(node, Definition) and node.name == name:
                found.append((".".join(path.relative_to(ROOT).with_suffix("").parts), node))
    return found[0]


def api() -> str:
    """docs/api.md."""
    parts = [HEAD]
    for heading, package, names in API:
        parts.append(f"## {heading}\n")
        for name in names:
            module, node = find(package, name)
            parts.append(f"### {name}\n\n`{module.removesuffix('.__init__')}.{name}`\n")
            parts += [f"```text\n{text}\n```\n" for text in _described(node)]
    return "\n".join(parts)


def _described(node: Definition) -> Iterator[str]:
    """Signature and docstring of an object, then of each public method."""
    if isinstance(node, ast.FunctionDef):
        yield _entry(node, "def ")
        return
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    start = [method for method in methods if method.name == "__init__"]
    fields = [ast.unparse(item) for item in node.body if isinstance(item, ast.AnnAssign)]
    head = _signature(start[0]).replace("__init__", node.name, 1) if start else node.name
    yield "\n\n".join([f"class {head}", *filter(None, [ast.get_docstring(node), "\n".join(fields)])])
    for method in methods:
        if not method.name.startswith("_") and ast.get_docstring(method):
            is_property = any(ast.unparse(mark).endswith("property") for mark in method.decorator_list)
            yield _entry(method, "property " if is_property else "def ")


def _entry(node: ast.FunctionDef, kind: str) -> str:
    head = node.name if kind == "property " else _signature(node)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{kind}{head}{returns}\n\n{ast.get_docstring(node) or ''}".rstrip()


def _signature(node: ast.FunctionDef) -> str:
    """``name(arguments)``, an argument a line if they are many."""
    arguments = ast.unparse(node.args)
    arguments = re.sub(r"^(self|cls)(, )?", "", arguments)
    if len(node.name) + len(arguments) <= 100:
        return f"{node.name}({arguments})"
    parts, depth, part = [], 0, ""
    for character in arguments:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts, part = [*parts, part.strip()], ""
        else:
            part += character
    return f"{node.name}(\n    " + ",\n    ".join([*parts, part.strip()]) + ",\n)"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
