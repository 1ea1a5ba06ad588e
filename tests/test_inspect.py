"""inspect: the numbers, the runs and the text that people see, against what the fixture was made from."""

import json
import re
import time

import fsspec
import numpy as np
import pytest
from tiny_dataset import ANSWERS, NUM_QUERY

from omnidata import Dataset, cli
from omnidata.inspect.distributions import count_distribution, round_width
from omnidata.inspect.samples import choose_positions, read_views, spread
from omnidata.inspect.summary import Summary, lowest, summarize
from omnidata.inspect.terminal import human_bytes, human_hours, sparkline
from omnidata.plan.cost import (
    GPUS,
    MODELS,
    Assumptions,
    epoch_cost,
    image_flops,
    token_flops,
    training_multiplier,
)
from omnidata.printable import printable
from omnidata.schema import IGNORE_INDEX, UserError
from omnidata.text.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def data(tiny_dataset):
    return Dataset(tiny_dataset)


def run(capsys, *arguments):
    code = cli.run(["inspect", *map(str, arguments)])
    return code, capsys.readouterr()


# --- summary ----------------------------------------------------------------------------------------------


def test_the_summary_equals_sums_over_the_samples_themselves(data):
    summary = summarize(data)
    samples = [data[i] for i in range(len(data))]
    assert summary.num_samples == 24 and summary.num_records == 27 and summary.num_rejects == 3
    assert summary.num_tokens == sum(len(s.input_ids) for s in samples)
    assert summary.num_supervised == sum(int((s.labels != IGNORE_INDEX).sum()) for s in samples)
    assert summary.num_images == sum(len(s.images) for s in samples)
    lengths = np.array([len(s.input_ids) for s in samples])
    assert summary.tokens_per_sample.max == lengths.max() and summary.tokens_per_sample.mean == lengths.mean()
    for bar in summary.tokens_per_sample.histogram:
        assert bar.count == ((lengths >= bar.first) & (lengths <= bar.last)).sum()
    assert sum(bar.count for bar in summary.supervised_per_sample.histogram) == 24
    assert [(s.source, s.num_samples, s.num_rejects) for s in summary.sources] == [
        ("photos.json", 12, 2),
        ("shapes.jsonl", 12, 1),
    ]


def test_extremes_are_the_true_ones(data):
    extremes = summarize(data).extremes
    lengths = [len(data[i].input_ids) for i in range(24)]
    shares = [(data[i].labels != IGNORE_INDEX).mean() for i in range(24)]
    assert [ref.position for ref in extremes["longest"]] == sorted(range(24), key=lambda i: -lengths[i])[:8]
    assert [ref.position for ref in extremes["shortest"]] == sorted(range(24), key=lambda i: lengths[i])[:8]
    assert [ref.position for ref in extremes["least_supervised"]] == sorted(
        range(24), key=lambda i: shares[i]
    )[:8]
    largest = extremes["largest_image"]
    assert {ref.position % 3 for ref in largest} == {2} and {ref.largest_image for ref in largest} == {
        (40, 32)
    }


def test_a_split_is_summarised_alone(tiny_dataset):
    summary = summarize(Dataset(tiny_dataset, "val"))
    assert (summary.num_samples, summary.num_shards, summary.split) == (8, 1, "val")
    assert {ref.position for ref in summary.extremes["longest"]} == set(range(8))


def test_distributions():
    shown = count_distribution(np.array([20, 21, 60]))
    filled = [(bar.first, bar.last, bar.count) for bar in shown.histogram if bar.count]
    assert filled == [(20, 24, 2), (60, 64, 1)] and len(shown.histogram) == 9
    assert (shown.min, shown.median, shown.max) == (20, 21, 60)
    values = np.random.default_rng(0).integers(5, 900, 1001)
    shown = count_distribution(values)
    assert (shown.median, shown.p95) == (np.median(values), np.sort(values)[950])
    assert count_distribution(np.zeros(0, int)).histogram == ()
    assert [round_width(span) for span in (1, 16, 17, 33, 81, 1000)] == [1, 1, 2, 5, 10, 100]
    assert lowest(np.array([3, 1, 1, 2, 1]), 2) == [1, 2] and lowest(np.zeros(0), 2) == []
    assert sparkline(count_distribution(np.array([0, 0, 0, 2]))) == "█ ▃"


# --- cost -------------------------------------------------------------------------------------------------


def test_flops_equal_the_published_ones():
    """9.25 TFLOP an image of 448² and 5.63 at 400 tokens, as the reference counts them."""
    omnilmm = MODELS["omnilmm-12b"]
    assert omnilmm.num_patches(448) == 1025
    assert image_flops(omnilmm, 448) / 1e12 == pytest.approx(9.25, abs=0.005)
    assert token_flops(omnilmm, np.array([400]))[0] / 1e12 == pytest.approx(5.63, abs=0.005)


@pytest.mark.parametrize(
    ("frozen", "tower", "language"),
    [
        ((), 3, 3),
        (("vision_tower",), 1, 3),
        (("vision_tower", "language_model"), 1, 2),  # alignment: gradients reach the resampler through it
        (("vision_tower", "resampler", "language_model"), 1, 1),
        (("language_model",), 3, 2),
    ],
)
def test_frozen_parts_cost_what_the_gradient_needs(frozen, tower, language):
    assert training_multiplier("vision_tower", frozen) == tower
    assert training_multiplier("language_model", frozen) == language


def test_hours_follow_from_flops_and_assumptions():
    assume = Assumptions(gpu="a100", num_gpus=8, mfu=0.5, frozen=())
    cost = epoch_cost(np.array([400, 400]), pixels=np.array([3 * 448**2]), assume=assume)
    assert cost.flops == pytest.approx(3 * (9.25e12 + 2 * 5.63e12), rel=1e-3)
    assert cost.hours == pytest.approx(cost.flops / (8 * GPUS["a100"] * 0.5) / 3600)
    for wrong in ({"model": "gpt"}, {"gpu": "abacus"}, {"mfu": 0.0}, {"mfu": 1.5}, {"frozen": ("lm",)}):
        with pytest.raises(UserError):
            Assumptions(**wrong)


# --- samples ----------------------------------------------------------------------------------------------


def test_runs_cover_every_token_once_in_order_and_say_what_is_learned(data):
    special = data.manifest.special_tokens
    for view in read_views(data, list(range(24))):
        sample, at, images = data[view.position], 0, 0
        for part in view.runs:
            ids = sample.input_ids[at : at + part.num_tokens].tolist()
            learned = (sample.labels[at : at + part.num_tokens] != IGNORE_INDEX).tolist()
            assert learned == [part.supervised] * part.num_tokens
            if part.kind == "image":
                assert ids == [
                    special["<im_start>"],
                    *[special["<im_patch>"]] * NUM_QUERY,
                    special["<im_end>"],
                ]
                assert part.image == images
                images += 1
            else:
                assert [i for piece in part.pieces for i in piece.ids] == ids
            at += part.num_tokens
        assert at == len(sample.input_ids) and images == len(sample.images)
        said = "".join(part.text for part in view.runs if part.supervised and part.kind == "text")
        assert ANSWERS[view.position % 4] in said


def test_choosing_samples(data):
    assert choose_positions(data) == [0, 12, 23]
    assert choose_positions(data, sample=-1) == [23]
    assert choose_positions(data, key="sample-000007") == [7]
    assert choose_positions(data, source="shapes.jsonl", limit=2) == [1, 23]
    assert spread(np.arange(10), 4) == [0, 3, 6, 9] and spread(np.arange(3), 9) == [0, 1, 2]
    assert choose_positions(Dataset(data.path, "val"), key="sample-000020") == [4]
    for wrong in ({"key": "x"}, {"sample": 24}, {"source": "x"}):
        with pytest.raises(UserError):
            choose_positions(data, **wrong)


def test_a_split_numbers_its_own_rows(data):
    (view,) = read_views(Dataset(data.path, "val"), [4])
    assert view.row["key"] == "sample-000020"


def test_an_unreadable_sample_is_named_with_the_remedy(tiny_dataset, tmp_path):
    import shutil

    copy = shutil.copytree(tiny_dataset, tmp_path / "data")
    shard = copy / "shards/train-00000.tar"
    shard.write_bytes(b"\1" + shard.read_bytes()[1:])
    with pytest.raises(UserError, match=r"sample 0 \(sample-000000\).*verify"):
        list(read_views(Dataset(copy), [0]))


def test_text_of_a_url_costs_ranged_reads_only(tiny_dataset, monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.put(str(tiny_dataset), "/inspect-me", recursive=True)
    asked = []
    original = type(memory).cat_file

    def cat_file(self, path, start=None, end=None, **kwargs):
        asked.append((path, start, end))
        return original(self, path, start=start, end=end, **kwargs)

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    remote = Dataset("memory://inspect-me")
    (view,) = read_views(remote, [9])
    assert view.row["key"] == "sample-000009"
    shards = [(start, end) for path, start, end in asked if path.endswith(".tar")]
    assert shards == [(view.row["offset"], view.row["offset"] + view.row["nbytes"])]
    assert summarize(remote).num_tokens == summarize(Dataset(tiny_dataset)).num_tokens
    memory.rm("/inspect-me", recursive=True)


# --- vocabulary -------------------------------------------------------------------------------------------


def vocabulary(tokens, added=(), **more):
    entries = [{"id": i, "content": content} for i, content in added]
    model = {"vocab": {token: i for i, token in enumerate(tokens)}}
    return Vocabulary(json.dumps({"model": model, "added_tokens": entries, **more}).encode())


def test_sentencepiece_tokens_and_split_characters():
    tokens = vocabulary(["▁A", "<0xE7>", "<0x8C>", "<0xAB>", "▁", "x", "<0xE7>!"], added=[(9, "</s>")])
    pieces = [(piece.text, piece.ids) for piece in tokens.pieces([0, 1, 2, 3, 4, 9, 77, 1])]
    assert pieces == [
        (" A", (0,)),
        ("猫", (1, 2, 3)),
        (" ", (4,)),
        ("</s>", (9,)),
        ("<?77>", (77,)),
        ("\ufffd", (1,)),
    ]


def test_byte_level_tokens():
    tokens = vocabulary(["Ġcaf", "Ã", "©", "Ċ"], decoder={"type": "ByteLevel"})
    assert [(p.text, p.ids) for p in tokens.pieces([0, 1, 2, 3])] == [
        (" caf", (0,)),
        ("é", (1, 2)),
        ("\n", (3,)),
    ]


def test_the_vocabulary_spells_as_the_tokenizer_decodes(data):
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(f"{data.tokenizer_dir}/tokenizer.json")
    ours = Vocabulary(data.read_file("tokenizer/tokenizer.json"))
    for i in range(24):
        ids = data[i].input_ids.tolist()
        assert "".join(p.text for p in ours.pieces(ids)) == reference.decode(ids, skip_special_tokens=False)


def test_another_file_is_no_vocabulary():
    with pytest.raises(UserError, match=r"is not the tokenizer\.json"):
        Vocabulary(b"{}")


# --- command line -----------------------------------------------------------------------------------------


def test_the_terminal_shows_summary_and_samples_and_marks_what_is_learned(data, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    code, captured = run(capsys, data.path)
    assert code == 0 and "\x1b" not in captured.out
    for expected in (
        "24  (train 16, val 8)",
        "27 read, 3 rejected",
        "photos.json",
        "image_missing",
        "omnilmm-12b",
        "MFU 40%",
        "«A red square.</s>»",
        "#12 sample-000012",
    ):
        assert expected in captured.out, expected


def test_colour_in_a_terminal_and_none_with_no_color(data, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    _, coloured = run(capsys, data.path, "--sample", "0")
    assert "\x1b[1;32mA red square." in coloured.out and "«" not in coloured.out
    monkeypatch.setenv("NO_COLOR", "1")
    _, plain = run(capsys, data.path, "--sample", "0")
    assert "32m" not in plain.out  # bold and dim stay: they are no colours
    assert "«A red square.</s>»" in re.sub(r"\x1b\[[\d;]*m", "", plain.out)


def test_one_sample_its_image_is_a_chip(data, capsys):
    code, captured = run(capsys, data.path, "--key", "sample-000002")
    assert code == 0 and captured.out.count("image ") == 2 + 1  # two chips and the legend
    assert " image 32×32 · 6 tokens " in captured.out and "<im_patch>" not in captured.out
    assert "records" not in captured.out


def test_what_only_looks_like_a_special_token_is_marked(data, tmp_path, capsys):
    """The same spelling as a token and as typed text, in one sample."""
    turns = [{"role": "user", "content": "A </s> or <im_patch>."}, {"role": "assistant", "content": "</s>"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"id": "typed", "messages": turns}))
    sources = ["build-shards", str(tmp_path / "chat.jsonl"), "--tokenizer", f"{data.path}/tokenizer"]
    assert cli.run([*sources, "--out", str(tmp_path / "data"), "--num-query", "4"]) == 0
    capsys.readouterr()
    _, captured = run(capsys, tmp_path / "data")
    assert "A \\</s> or \\<im_patch>." in captured.out and "«\\</s></s>»" in captured.out


def test_rejects_say_when_there_are_more(data, capsys):
    _, captured = run(capsys, data.path, "--rejects", "--limit", "1")
    assert "item 90 image_missing" in captured.out and "1 of 3 rejects shown" in captured.out
    _, captured = run(capsys, data.path, "--rejects", "--source", "shapes.jsonl")
    assert "bad_json" in captured.out and "role_order" not in captured.out and "shown" not in captured.out


def test_the_json_has_the_documented_keys(data, capsys):
    code, captured = run(capsys, data.path, "--json")
    report = json.loads(captured.out)
    assert code == 0 and list(report) == list(Summary.__dataclass_fields__)
    _, captured = run(capsys, data.path, "--json", "--sample", "5")
    (sample,) = json.loads(captured.out)["samples"]
    assert (
        sample["key"] == "sample-000005"
        and sum(r["num_tokens"] for r in sample["runs"]) == sample["n_tokens"]
    )
    _, captured = run(capsys, data.path, "--json", "--rejects")
    assert len(json.loads(captured.out)["reject_records"]) == 3


def test_mistakes_are_one_line_and_exit_1(data, capsys, tmp_path):
    for arguments in (
        ["--key", "x"],
        ["--split", "x"],
        ["--gpu", "x"],
        ["--html", str(tmp_path / "no" / "x.html")],
    ):
        code, captured = run(capsys, data.path, *arguments)
        assert code == 1 and captured.err.startswith("Error: ") and captured.err.count("\n") == 1, arguments
    assert run(capsys, tmp_path)[0] == 1


def test_terminal_escapes_of_a_corpus_are_shown_not_sent():
    assert printable("a\x1b[31mb\x07\x9b\x7f\n\tc") == "a␛[31mb␇\ufffd␡\n\tc"


def test_human_numbers():
    assert [human_bytes(n) for n in (999, 1234567, 9.999e11)] == ["999 B", "1.23 MB", "1 TB"]
    assert [human_hours(h) for h in (0.002, 0.5, 5.25, 100)] == [
        "7.2 s",
        "30 min",
        "5.25 h",
        "100 h (4.2 days)",
    ]


# --- notebook ---------------------------------------------------------------------------------------------


def test_a_notebook_shows_a_gallery_with_escaped_text(data):
    html = data._repr_html_()
    assert html.count("<img") == 3 and "24 samples in 3 shards" in html
    assert "<script>" not in html
    shown = Dataset(data.path, "val")._repr_html_()
    assert "8 samples in 1 shard;" in shown and "&lt;script&gt;" in shown


# --- speed ------------------------------------------------------------------------------------------------


def test_a_summary_is_columns_not_rows(data, monkeypatch):
    """The million-row time is a benchmark; here: nothing per row, no whole index, no shard."""
    monkeypatch.setattr(Dataset, "index", property(lambda self: pytest.fail("the whole index was read")))
    monkeypatch.setattr(Dataset, "read_range", lambda *_: pytest.fail("a shard was opened"))
    start = time.perf_counter()
    summarize(Dataset(data.path))
    assert time.perf_counter() - start < 5
