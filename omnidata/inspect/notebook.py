"""What a notebook shows for a Dataset: its totals in a line, and a small gallery."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from omnidata.inspect.html_report import thumbnail
from omnidata.inspect.samples import SampleView, choose_positions, read_views
from omnidata.printable import printable

if TYPE_CHECKING:
    from omnidata.dataset import Dataset

NUM_SHOWN = 6
_CARD = "width:170px;border:1px solid #8886;border-radius:8px;overflow:hidden;font-size:12px"
_IMAGE = "width:100%;max-height:120px;object-fit:cover"
_LEARNED = "background:#2e8b4f44;border-bottom:2px solid #2e8b4f"


def gallery(dataset: Dataset) -> str:
    """An HTML fragment with inline styles; every text of the dataset is escaped."""
    views = read_views(dataset, choose_positions(dataset, limit=NUM_SHOWN))
    cards = "".join(_card(view) for view in views)
    name = dataset.path + (f" ({dataset.split})" if dataset.split else "")
    shards = [shard for shard in dataset.manifest.shards if dataset.split in (None, shard.split)]
    total = f"{len(dataset):,} samples in {len(shards):,} shard{'s' * (len(shards) != 1)}"
    return (
        f"<div><b>{escape(name)}</b>: {total}; supervised text is marked"
        f'<div style="display:flex;flex-wrap:wrap;gap:8px;margin-top:6px">{cards}</div></div>'
    )


def _card(view: SampleView) -> str:
    pictures = "".join(
        f'<img src="{thumbnail(image)}" alt="image {i + 1}" style="{_IMAGE}">'
        for i, image in enumerate(view.images[:1])
    )
    row = view.row
    more = f", {row['n_images']} images" if row["n_images"] > 1 else ""
    title = f"#{view.position} · {row['n_tokens']} tokens{more}"
    text = f'<div style="max-height:9em;overflow:auto;white-space:pre-wrap">{_text(view)}</div>'
    return f'<div style="{_CARD}">{pictures}<div style="padding:6px"><b>{escape(title)}</b>{text}</div></div>'


def _text(view: SampleView) -> str:
    parts = []
    for run in view.runs:
        text = escape("[image]" if run.image is not None else printable(run.text))
        parts.append(f'<span style="{_LEARNED}">{text}</span>' if run.supervised else text)
    return "".join(parts).strip()
