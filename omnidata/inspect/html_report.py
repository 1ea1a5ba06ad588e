"""``inspect --html``: one self-contained file, the summary, a gallery of samples, the extremes, the rejects.

    report/page.html   the skeleton, with %STYLE%, %SCRIPT% and %DATA%
    report/style.css   light and dark
    report/script.js   draws the page from one JSON object, which report_data() makes

Nothing is fetched when the page is opened: a Content-Security-Policy forbids it. The dataset's text travels
as JSON with every ``<`` escaped and is shown as text nodes, so no corpus can put markup into the page.
"""

from __future__ import annotations

import base64
import io
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from omnidata.inspect.samples import Run, SampleView, kept_values, read_views, rejects_of
from omnidata.inspect.summary import Summary, summarize
from omnidata.inspect.terminal import human_bytes, human_flops, human_hours
from omnidata.printable import printable
from omnidata.schema import REASONS, UserError

if TYPE_CHECKING:
    from omnidata.dataset import Dataset
    from omnidata.inspect.columns import ColumnSummary
    from omnidata.plan.cost import Assumptions, Cost

THUMBNAIL = 256  # pixels, longer side
MAX_REJECTS = 2000  # shown in the page, which says so when there are more


def write_report(
    dataset: Dataset, path: str, *, positions: list[int], assume: Assumptions | None = None
) -> int:
    """Write the page for these samples and the dataset's extremes to ``path``; return its size in bytes.

    Raises:
        UserError: a sample is damaged, or ``path`` cannot be written.
    """
    summary = summarize(dataset, assume=assume)
    edges = {ref.position for refs in summary.extremes.values() for ref in refs}
    views = read_views(dataset, sorted(edges.union(positions)))
    page = render_page(report_data(summary, views, rejects_of(dataset)[:MAX_REJECTS]))
    try:
        return Path(path).write_bytes(page)
    except OSError as error:
        raise UserError(f"cannot write the report to {path}: {error.strerror}") from error


def render_page(data: dict[str, object]) -> bytes:
    """The finished page around ``data``."""
    folder = files("omnidata.inspect") / "report"
    page = (folder / "page.html").read_bytes()
    encoded = orjson.dumps(data).replace(b"<", b"\\u003c")  # `</script>` in a corpus must not end ours
    for name, content in (
        (b"%STYLE%", (folder / "style.css").read_bytes()),
        (b"%SCRIPT%", (folder / "script.js").read_bytes()),
        (b"%DATA%", encoded),
    ):
        before, _, after = page.partition(name)
        page = before + content + after
    return page


def report_data(summary: Summary, views: Any, rejects: list[dict[str, str]]) -> dict[str, object]:
    """The one object that script.js draws."""
    return {
        "summary": summary.as_dict() | {"columns": [_column_data(column) for column in summary.columns]},
        "size": human_bytes(summary.num_bytes),
        "cost": _cost_facts(summary.cost),
        "reasons": REASONS,
        "samples": [_sample_data(view) for view in views],
        "rejects": [{name: printable(text) for name, text in reject.items()} for reject in rejects],
    }


def _cost_facts(cost: Cost) -> list[tuple[str, str]]:
    return [
        ("model", cost.model),
        ("compute", human_flops(cost.flops)),
        ("time", f"{human_hours(cost.hours)} on {cost.num_gpus} × {cost.gpu}"),
        ("assumed", f"{cost.peak_flops_per_gpu / 1e12:,.0f} TFLOP/s peak, {cost.mfu:.0%} of it reached"),
        ("frozen", ", ".join(cost.frozen) or "nothing"),
        (
            "images",
            f"{cost.patches_per_image:,.0f} patches, {cost.tflops_per_image:.3g} TFLOP forward each",
        ),
    ]


def _column_data(column: ColumnSummary) -> dict[str, object]:
    values = [{"value": printable(item.value), "count": item.count} for item in column.values]
    return asdict(column) | {"name": printable(column.name), "values": values}


def _sample_data(view: SampleView) -> dict[str, object]:
    row = view.row
    return {
        "position": view.position,
        "key": row["key"],
        "split": row["split"],
        "id": printable(row["id"]),
        "source": printable(row["source"]),
        "locator": printable(row["locator"]),
        "tokens": row["n_tokens"],
        "supervised": row["n_supervised"],
        "kept": [(printable(name), printable(value)) for name, value in kept_values(row)],
        "sizes": row["image_sizes"],
        "parts": view.slice_names,
        "thumbs": [thumbnail(image) for image in view.images],
        "runs": [_run_data(run) for run in view.runs],
    }


def _run_data(run: Run) -> dict[str, object]:
    pieces = [(printable(p.text), p.ids[0] if len(p.ids) == 1 else list(p.ids)) for p in run.pieces]
    return {
        "kind": run.kind,
        "supervised": run.supervised,
        "num_tokens": run.num_tokens,
        "image": run.image,
        "pieces": pieces,
    }


def thumbnail(image: bytes) -> str:
    """A small JPEG of a stored image as a ``data:`` URI.

    Raises:
        UserError: the image does not decode.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(image)) as picture:
            picture.draft("RGB", (THUMBNAIL, THUMBNAIL))  # a JPEG decodes at a fraction of its size
            small = picture.convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"a stored image does not decode ({error}): run `omnidata verify --deep`") from error
    file = io.BytesIO()
    small.save(file, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
