"""The shape of the code: who may import whom, what may never be written, how large things may grow."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("omnidata", "omnimodel", "pipelines")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# The flow of omnidata: a module imports only from its own floor or an earlier one.
FLOW = (
    "schema outcomes files printable start without_pandas",
    "durable locks manifest index shards where origin view_base",
    "corpus images text near conversation dialogue render part_renderer profiles interop executors "
    "ray_executor",
    "dataset",
    "builder plan",
    "loader verify leaks adapters inspect copier",
    "commands options cli cli_copies __main__",
)
FLOOR = {name: number for number, floor in enumerate(FLOW) for name in floor.split()}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES
}


def names(path):
    return str(path.relative_to(ROOT))


def imports(path):
    """(line, module) of the import statements in a file; ``if TYPE_CHECKING`` blocks do not count."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            inner = [f"{module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name if name in MODULES else module) for name in inner)


@pytest.mark.parametrize("path", FILES, ids=names)
def test_packages_keep_to_their_side(path):
    package = path.relative_to(ROOT).parts[0]
    forbidden = {
        "omnidata": ("omnimodel", "pipelines"),
        "omnimodel": ("omnidata", "pipelines"),
        "pipelines": (),
    }
    for line, module in imports(path):
        assert module.split(".")[0] not in forbidden[package], f"{path}:{line} imports {module}"
        if module.split(".")[0] == "click":
            assert path.name in ("cli.py", "cli_copies.py", "options.py") or package == "pipelines", (
                f"{path}:{line} imports click"
            )


@pytest.mark.parametrize("path", FILES, ids=names)
def test_no_broad_except_goes_on_and_no_unsafe_load(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException")
            raises = any(isinstance(child, ast.Raise) for child in ast.walk(node))
            assert not broad or raises, f"{path}:{node.lineno} catches everything and goes on"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "torch.load",
            "pickle.load",
            "pickle.loads",
        ):
            safe = any(keyword.arg == "weights_only" and keyword.value.value for keyword in node.keywords)
            assert safe, f"{path}:{node.lineno} unpickles what may be anybody's file"


@pytest.mark.parametrize("path", FILES, ids=names)
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400, f"{path} has {len(text.splitlines())} lines"
    tree = ast.parse(text)
    assert not tree.body or ast.get_docstring(tree), f"{path} does not say what it is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno
            assert length <= 70, f"{path}:{node.lineno} {node.name} has {length} lines"


def test_ignore_index_is_written_once_a_package():
    places = [
        names(path)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and ast.unparse(node) == "-100"
    ]
    assert places.count("omnidata/schema.py") == 1
    assert len([place for place in places if place.startswith("omnidata/")]) == 1, places
    assert len([place for place in places if place.startswith("omnimodel/")]) <= 1, places
    assert not [place for place in places if place.startswith("pipelines/")], places


def room(module):
    """What FLOW calls a module of omnidata: ``omnidata.plan.epoch`` -> plan, ``omnidata`` -> None."""
    return module.split(".")[1] if module.startswith("omnidata.") else None


def edges(name):
    """The modules of ours that a module imports, at its top or inside a function."""
    for line, module in imports(MODULES[name]):
        if module in MODULES and module != name:
            yield line, module


def test_any_gives_way_to_types():
    """Lines that name it: fewer are welcome, more are not. (transformers' names count as it in mypy, too.)"""
    lines = [line for path in FILES for line in path.read_text().splitlines() if re.search(r"\bAny\b", line)]
    assert len(lines) <= 617


def test_every_module_has_its_floor():
    assert {room(name) for name in MODULES if name.startswith("omnidata.")} == FLOOR.keys()


def test_imports_point_backwards_along_the_flow():
    for name in MODULES:
        for line, module in edges(name):
            if room(name) and room(module):
                assert FLOOR[room(module)] <= FLOOR[room(name)], (
                    f"{MODULES[name]}:{line} imports {module}, a later floor"
                )


def test_there_is_no_circle():
    """Neither of modules nor of omnidata's rooms, imports inside functions included."""
    modules = {name: {module for _, module in edges(name)} for name in MODULES}
    rooms = {name: set() for name in FLOOR}
    for name, targets in modules.items():
        if room(name):
            rooms[room(name)] |= {room(target) for target in targets} - {room(name), None}
    for graph in (modules, rooms):
        try:
            list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            raise AssertionError(f"a circle of imports: {' -> '.join(error.args[1])}") from None


def test_importing_omnidata_loads_neither_torch_nor_transformers():
    modules = [
        "omnidata." + ".".join(path.relative_to(ROOT / "omnidata").with_suffix("").parts)
        for path in (ROOT / "omnidata").rglob("*.py")
        if path.name != "__init__.py" and path.parent.name != "adapters"  # those import their hosts
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "loaded = {'torch', 'transformers', 'timm'} & sys.modules.keys()\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
