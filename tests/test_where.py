"""Conditions on index columns: what they mean, what they refuse, and what they choose."""

from __future__ import annotations

import io
import operator
import re

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tiny_dataset import build_tiny_dataset

from omnidata import Dataset
from omnidata.cli import cli, run
from omnidata.index import write_tables
from omnidata.plan import EpochPlan
from omnidata.schema import UserError
from omnidata.where import Where

ROWS = [
    {"n": 1, "score": 0.5, "lang": "en", "ok": True},
    {"n": 4, "score": 2.0, "lang": "de", "ok": False},
    {"n": 9, "score": None, "lang": None, "ok": None},
    {"n": -3, "score": -1e3, "lang": 'a "b"', "ok": True},
]
TABLE = pa.Table.from_pylist(
    ROWS,
    pa.schema([("n", pa.int32()), ("score", pa.float64()), ("lang", pa.string()), ("ok", pa.bool_())]),
)


def chosen(text: str) -> list[int]:
    """Rows of TABLE that meet a condition."""
    where = Where(text)
    kept = TABLE.append_column("row", [list(range(4))]).filter(where.expression(TABLE.schema, name="t"))
    assert Where(str(where)) == where, "its own spelling means the same"
    return kept["row"].to_pylist()


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("n >= 4", [1, 2]),
        ("4 <= n", [1, 2]),
        ("1 <= n < 9", [0, 1]),
        ("n == 4.0 or n < 0", [1, 3]),
        ("n < 99999999999", [0, 1, 2, 3]),  # beyond the column's own type
        ("n in [1, -3, 2.5]", [0, 3]),
        ("lang == 'en'", [0]),
        ("lang != 'en'", [1, 3]),  # the third has no lang: it meets no comparison
        ("not lang == 'en'", [1, 3]),
        ("lang not in ['en', \"de\"]", [3]),
        ("not (lang not in ['en', \"de\"])", [0, 1]),
        ("lang is null", [2]),
        ("lang is not null and ok", [0, 3]),
        ("not ok", [1]),
        ("ok == false", [1]),
        ('lang == "a \\"b\\""', [3]),
        (r"lang == 'a \"b\"' or lang == '\d'", [3]),
        ("n < " + "9" * 40, [0, 1, 2, 3]),
        ("score > n", []),
        ("score < n", [0, 1, 3]),
        ("n > 4 or n < 0 and ok", [2, 3]),  # `and` binds tighter
        ("(n > 4 or n < 0) and ok", [3]),
        ("not (n > 0 and (ok or lang is null))", [1, 3]),
        ("`n` == 1", [0]),
        ("N_IN == 1 or n == 1", None),
    ],
)
def test_what_conditions_mean(text, rows):
    if rows is None:
        with pytest.raises(UserError, match="no column 'N_IN'"):
            chosen(text)
    else:
        assert chosen(text) == rows


ATOMS = ["n >= 4", "ok", "lang == 'de'", "score < 1", "lang is null", "n in [1, 9]", "lang not in ['en']"]


@given(
    st.recursive(
        st.sampled_from(ATOMS).map(lambda text: (text,)),
        lambda inner: (
            st.tuples(st.just("not"), inner) | st.tuples(st.sampled_from(["and", "or"]), inner, inner)
        ),
        max_leaves=6,
    )
)
def test_a_condition_is_three_valued_logic(tree):
    # Python's own: None where a row has no value.
    def text(node) -> str:
        if len(node) == 1:
            return node[0]
        return (
            f"not ({text(node[1])})" if node[0] == "not" else f"({text(node[1])}) {node[0]} ({text(node[2])})"
        )

    def value(node, row):
        if len(node) == 1:
            return ATOM_VALUES[node[0]](row)
        left, right = value(node[1], row), value(node[-1], row)
        if node[0] == "not":
            return None if left is None else not left
        if node[0] == "and":
            return False if False in (left, right) else None if None in (left, right) else True
        return True if True in (left, right) else None if None in (left, right) else False

    assert chosen(text(tree)) == [i for i, row in enumerate(ROWS) if value(tree, row)]


ATOM_VALUES = {
    "n >= 4": lambda row: row["n"] >= 4,
    "ok": lambda row: row["ok"],
    "lang == 'de'": lambda row: None if row["lang"] is None else row["lang"] == "de",
    "score < 1": lambda row: None if row["score"] is None else row["score"] < 1,
    "lang is null": lambda row: row["lang"] is None,
    "n in [1, 9]": lambda row: row["n"] in (1, 9),
    "lang not in ['en']": lambda row: None if row["lang"] is None else row["lang"] != "en",
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a column or a constant is expected but it ends, at character 1"),
        ("n = 3", "cannot read '= 3': equality is ==, at character 3"),
        ("n ==", "expected but it ends, at character 5"),
        ("(n > 1", "')' is expected"),
        ("n > 1 n", "`and`, `or` or the end is expected but there is 'n'"),
        ("1 == 2", "a comparison of two constants"),
        ("n in []", "a constant is expected"),
        ("n", "n is a column of numbers: compare it"),
        ("lang > 3", "lang (text) and 3 (number) cannot be compared"),
        ("ok == 1", "ok (true or false) and 1 (number)"),
        ("n in [1, 'x']", "(text)"),
        ("lagn == 'x'", "no column 'lagn' (did you mean lang?); there are lang, n, ok, score"),
        ("__import__('os') == 1", "expected but there is '('"),
        ("n == " + "9" * 5000, "a number of more than 40 digits, at character 6"),
        ("lang == '\ud800'", "half a character"),
        ("ok; import os", "cannot read '; import o', at character 3"),
        ("lang == n", "lang (text) and n (number)"),
        ("(" * 60 + "ok" + ")" * 60, "more than 50 levels"),
        ("n == 1 or " * 4000 + "ok", "at most 20,000 characters"),
    ],
)
def test_what_is_no_condition_is_refused_at_its_place(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        chosen(text)


def test_a_long_condition_neither_crashes_nor_grows_deep():
    assert chosen(" or ".join(f"n == {number}" for number in range(2, 1500))) == [1, 2]


def test_row_groups_that_cannot_match_are_not_read():
    tables = [pa.table({"n": list(range(10 * i, 10 * i + 10)), "split": ["train"] * 10}) for i in range(5)]
    file = io.BytesIO()
    write_tables(file, tables[0].schema, tables)
    where = Where("22 <= n < 31")
    groups = ds.ParquetFileFormat().make_fragment(io.BytesIO(file.getvalue()))
    groups = groups.subset(filter=where.expression(tables[0].schema, name="t")).row_groups
    assert [group.id for group in groups] == [2, 3]
    whole = bytearray(file.getvalue())
    first = pq.ParquetFile(io.BytesIO(whole)).metadata.row_group(0).column(0)
    start = first.dictionary_page_offset or first.data_page_offset
    whole[start : start + first.total_compressed_size] = bytes(first.total_compressed_size)
    assert where.find(io.BytesIO(bytes(whole)), name="t").tolist() == list(range(22, 31))
    with pytest.raises(UserError, match="damaged"):  # row group 0 cannot be read, and was not
        Where("n < 31").find(io.BytesIO(bytes(whole)), name="t")


LARGE = [-(1 << 63), -5, 0, 3, 1 << 25, (1 << 53) + 1, 1 << 60, (1 << 60) + 1, (1 << 63) - 1]
CONSTANTS = [*LARGE, 0.5, -5.5, 2.0**25 + 0.5, 2.0**60, 2.0**63, 1e30, -1e30, float("inf"), 10**30, -(10**30)]
SIGNS = {"==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt}
SIGNS |= {">=": operator.ge}


@pytest.mark.parametrize("constant", CONSTANTS)
def test_whole_numbers_are_compared_exactly_however_large(constant):
    file = io.BytesIO()
    tables = [pa.table({"n": [n], "split": ["train"]}) for n in LARGE]  # so each has its statistics
    write_tables(file, tables[0].schema, tables)
    spelled = "1e400" if constant == float("inf") else repr(constant)
    for sign, compare in SIGNS.items():
        rows = [i for i, n in enumerate(LARGE) if compare(n, constant)]
        turned = sign.translate(str.maketrans("<>", "><"))
        for text in (f"n {sign} {spelled}", f"{spelled} {turned} n"):
            assert Where(text).find(file, name="t").tolist() == rows, text
    rows = [i for i, n in enumerate(LARGE) if n in (constant, 3)]
    assert Where(f"n in [{spelled}, 3]").find(file, name="t").tolist() == rows


# --- datasets and plans -----------------------------------------------------------------------------------

CONDITION = 'n_images <= 1 and source != "photos.json"'


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_tiny_dataset(tmp_path_factory.mktemp("where") / "data", num_samples=60, num_val=12)


def expected(dataset: Dataset) -> list[dict]:
    return [
        row for row in dataset.index.to_pylist() if row["n_images"] <= 1 and row["source"] != "photos.json"
    ]


@pytest.mark.parametrize("split", [None, "train", "val"])
def test_a_dataset_shows_only_its_rows(data, split):
    whole, part = Dataset(data, split), Dataset(data, split, CONDITION)
    rows = expected(whole)
    assert part.index.to_pylist() == rows and len(part) == len(rows) < len(whole)
    assert part.rows([2, 0]) == [rows[2], rows[0]]
    assert part[1].key == rows[1]["key"]
    assert part.index_columns(["n_tokens"])["n_tokens"].to_pylist() == [row["n_tokens"] for row in rows]


def test_a_plan_takes_what_meets_the_condition_and_each_sample_once(data):
    plan = EpochPlan({"path": data, "where": CONDITION}, max_tokens=500)
    keys = Dataset(data, "train").index["key"].to_pylist()
    planned = [keys[row] for pack in plan for row in pack.lengths.rows.tolist()]
    assert sorted(planned) == sorted(row["key"] for row in expected(Dataset(data, "train")))
    assert plan.totals.num_tokens == sum(row["n_tokens"] for row in expected(Dataset(data, "train")))


def test_a_condition_is_part_of_the_digest_by_its_meaning(data):
    def digest(**entry) -> str:
        return EpochPlan({"path": data, **entry}, max_tokens=500).digest

    assert digest() == digest(where=None) == digest(split="train")
    assert digest(where="n_images<=1 and source!='photos.json'") == digest(where=CONDITION) != digest()
    assert digest(where="n_images <= 1") != digest(where="n_images <= 2")


def test_exclusions_and_a_condition_go_together(data, tmp_path):
    rows = expected(Dataset(data, "train"))
    (tmp_path / "keys").write_text(rows[0]["key"])
    entry = {"path": data, "where": CONDITION, "exclude": str(tmp_path / "keys")}
    assert EpochPlan(entry, max_tokens=500).totals.num_samples == len(rows) - 1


def test_a_condition_that_nothing_meets_is_an_error_with_its_cause(data):
    with pytest.raises(UserError, match="no sample left to train on: see its `where`"):
        EpochPlan({"path": data, "where": "n_images > 99"}, max_tokens=500)


def test_the_commands_take_a_condition(data, capsys):
    assert run(["plan", str(data), "--max-tokens", "500", "--where", CONDITION, "--json"]) == 0
    assert f'"num_samples": {len(expected(Dataset(data, "train")))}' in capsys.readouterr().out
    assert run(["inspect", str(data), "--where", CONDITION]) == 0
    out = capsys.readouterr().out
    assert f"where {CONDITION}" in " ".join(out.split())
    assert re.search(rf"samples\s+{len(expected(Dataset(data)))} ", out)
    assert run(["inspect", str(data), "--where", "n_images > 99"]) == 0
    assert run(["plan", str(data), "--where", "n_image > 9"]) == 1
    assert "did you mean n_images?" in capsys.readouterr().err
    result = CliRunner().invoke(cli, ["plan", *[str(data)] * 3, "--where", "ok", "--where", "ok"])
    assert "2 --where for 3 datasets" in str(result.exception)


def test_one_condition_for_each_dataset(data, capsys):
    command = ["plan", str(data), str(data), "--max-tokens", "500", "--json"]
    assert run([*command, "--where", "", "--where", CONDITION]) == 0
    both = len(Dataset(data, "train")) + len(expected(Dataset(data, "train")))
    assert f'"num_samples": {both}' in capsys.readouterr().out


def test_the_rows_of_a_catalog_are_those_of_the_split(data):
    dataset = Dataset(data, "val", CONDITION)
    plan = EpochPlan(dataset, max_tokens=500)
    found = np.sort(np.concatenate([pack.lengths.rows for pack in plan]))
    keys = Dataset(data, "val").index["key"].to_pylist()
    assert [keys[row] for row in found.tolist()] == dataset.index["key"].to_pylist()
