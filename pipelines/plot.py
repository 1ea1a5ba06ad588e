"""loss.svg: the loss and the throughput of a run, drawn from its metrics.jsonl without any plotting library.

python pipelines/plot.py runs/demo        writes runs/demo/loss.svg again
"""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # a file run by its path (PEP 366); the folder is `omnipipelines` in a wheel
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = Path(__file__).resolve().parent.name

from omnidata.schema import UserError

WIDTH, HEIGHT, MARGIN = 720, 220, 56  # pixels of one panel
MOST_DOTS = 40
MOST_GROUPS = 16  # panels of groups


def plot(run_dir: Path) -> Path:
    """Draw ``run_dir``/metrics.jsonl; returns the SVG's path."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    panels = [
        ("loss", [(line["step"], line["loss"]) for line in steps if line["loss"] is not None], "#1f77b4"),
        ("validation loss", [(x["step"], x["val_loss"]) for x in lines if "val_loss" in x], "#d62728"),
        *_by_group(lines),
        ("tokens/s", [(line["step"], line["tokens_per_s"]) for line in steps], "#2ca02c"),
    ]
    panels = [panel for panel in panels if panel[1]]
    if not lines:
        raise UserError(f"{run_dir}/metrics.jsonl holds no step yet, so there is nothing to draw")
    span = (min(line["step"] for line in lines), max(line["step"] for line in lines))  # of all panels
    body = "".join(_panel(*panel, span=span, top=number * HEIGHT) for number, panel in enumerate(panels))
    path = run_dir / "loss.svg"
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT * len(panels)}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f"{body}</svg>\n"
    )
    return path


def _by_group(lines: list[dict]) -> list[tuple[str, list, str]]:
    """A panel for each group's loss (log.by), of training and validation, the first few."""
    names = dict.fromkeys(name for line in lines for name in line if name.startswith(("loss/", "val_loss/")))
    return [
        (html.escape(name), [(x["step"], x[name]) for x in lines if x.get(name) is not None], "#9467bd")
        for name in sorted(names)[:MOST_GROUPS]
    ]


def _panel(
    title: str, points: Sequence[tuple[float, float]], color: str, *, span: tuple[int, int], top: int
) -> str:
    ys = [y for _, y in points]
    low, high = min(0.0, *ys), max(ys) or 1.0
    first, last = span

    def place(x: float, y: float) -> tuple[str, str]:
        across = MARGIN + (x - first) / max(1, last - first) * (WIDTH - 2 * MARGIN)
        return f"{across:.1f}", f"{top + HEIGHT - 32 - (y - low) / (high - low) * (HEIGHT - 64):.1f}"

    places = [place(x, y) for x, y in points]
    line = " ".join(f"{x},{y}" for x, y in places)
    # A line through one point would not be seen.
    dots = "".join(f'<circle cx="{x}" cy="{y}" r="2.5" fill="{color}"/>' for x, y in places)
    texts = [
        (MARGIN, top + 20, title, "start"),
        (MARGIN - 6, top + 36, f"{high:.4g}", "end"),
        (MARGIN - 6, top + HEIGHT - 28, f"{low:.4g}", "end"),
        (MARGIN, top + HEIGHT - 14, f"step {first}", "start"),
        (WIDTH - MARGIN, top + HEIGHT - 14, f"step {last}", "end"),
    ]
    labels = "".join(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>' for x, y, text, anchor in texts
    )
    axis = f"M{MARGIN},{top + 32}V{top + HEIGHT - 32}H{WIDTH - MARGIN}"
    return (
        f'<path d="{axis}" fill="none" stroke="#999"/>{labels}'
        f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>'
        f"{dots if len(points) <= MOST_DOTS else ''}"
    )


if __name__ == "__main__":
    try:
        print(plot(Path(sys.argv[1])))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
