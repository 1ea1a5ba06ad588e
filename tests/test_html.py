"""The HTML report in a real browser: drawn, filtered, opened, driven by keys; no error, no request."""

import json
import re

import pytest
from chromium import Chromium, find_chromium
from tiny_dataset import build_tiny_dataset

from omnidata import cli
from omnidata.dataset import Dataset
from omnidata.inspect.html_report import render_page, write_report

needs_chromium = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)


@pytest.fixture(scope="module")
def report(tiny_dataset, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    assert cli.run(["inspect", str(tiny_dataset), "--html", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser, report):
    page = browser.open(report.as_uri())
    yield page
    assert page.problems == []


def visible(page):
    """Positions of the cards that are shown, in their order on the page."""
    return page.js(
        "[...document.querySelectorAll('#gallery li')].filter(li => !li.hidden && li.offsetHeight > 0)"
        ".map(li => Number(li.querySelector('.card-meta').textContent.match(/#(\\d+)/)[1]))"
    )


def choose(page, select, value):
    page.js(
        f"(() => {{ const s = document.getElementById('{select}'); s.value = {json.dumps(value)};"
        "s.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )


def text_of(page, selector):
    return page.js(f"document.querySelector({json.dumps(selector)}).textContent")


# --- the file ---------------------------------------------------------------------------------------------


def test_the_file_is_self_contained_and_no_text_of_it_is_markup(report):
    html = report.read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#|data:)""", html), "it refers to another file"
    assert "default-src 'none'" in html
    data = html.split('id="data">')[1].split("</script>")[0]
    assert "<" not in data
    loaded = json.loads(data)
    pieces = [piece[0] for run in loaded["samples"][2]["runs"] for piece in run["pieces"]]
    assert "<script>alert('x')</script> & more</s>" in "".join(pieces)
    assert len(loaded["samples"]) == 24 and len(loaded["rejects"]) == 3


def test_the_placeholders_of_the_template_in_the_data_stay_data(tiny_dataset):
    page = render_page({"text": "%STYLE% %DATA% </script><b>"}).decode()
    data = page.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data) == {"text": "%STYLE% %DATA% </script><b>"}


# --- the page ---------------------------------------------------------------------------------------------


@needs_chromium
def test_the_summary_is_drawn(page, tiny_dataset):
    totals = text_of(page, "#totals")
    manifest = Dataset(tiny_dataset).manifest
    assert f"{manifest.num_tokens:,}" in totals and "of 27 records" in totals
    assert page.js("document.querySelectorAll('#charts svg rect').length") > 10
    bars = page.js(
        "[...document.querySelectorAll('#charts figure:nth-child(3) title')].map(t => t.textContent)"
    )
    assert bars == ["0: 8", "1: 8", "2: 8"]
    assert "photos.json" in text_of(page, "#sources") and "omnilmm-12b" in text_of(page, "#cost")
    assert page.js("document.title").endswith("dataset report")


@needs_chromium
def test_the_gallery_filters_and_sorts(page):
    assert visible(page) == list(range(24))
    page.js("document.getElementById('query').focus()")
    page.type("question 12:")
    assert visible(page) == [12] and text_of(page, "#count") == "1 of 24 samples shown"
    page.js("document.getElementById('query').value = ''")
    choose(page, "split", "val")
    assert visible(page) == list(range(16, 24))
    choose(page, "images", "2")
    assert visible(page) == [17, 20, 23]
    choose(page, "source", "photos.json")
    assert visible(page) == [20]
    for select in ("split", "images", "source"):
        choose(page, select, "")
    choose(page, "order", "longest first")
    lengths = page.js(
        "[...document.querySelectorAll('.card-meta')]"
        ".map(m => Number(m.textContent.match(/(\\d+) token/)[1]))"
    )
    assert lengths == sorted(lengths, reverse=True) and len(lengths) == 24


@needs_chromium
def test_a_sample_opens_with_its_mask_and_ids(page, tiny_dataset):
    page.js("document.querySelectorAll('#gallery .card')[2].click()")
    assert page.js("document.getElementById('viewer').open")
    sample = Dataset(tiny_dataset)[2]
    supervised = page.js("[...document.querySelectorAll('#text .sup')].map(s => s.textContent).join('')")
    assert supervised == "<script>alert('x')</script> & more</s>"
    assert page.js("document.querySelectorAll('#text .chip').length") == 2
    assert "32×32" in text_of(page, "#text .chip") and "6 tokens" in text_of(page, "#text .chip")
    ids = page.js(
        "[...document.querySelectorAll('#text .piece')].flatMap(p => p.dataset.ids.split(' ').map(Number))"
    )
    images = set(
        Dataset(tiny_dataset).manifest.special_tokens[n] for n in ("<im_start>", "<im_patch>", "<im_end>")
    )
    assert ids == [i for i in sample.input_ids.tolist() if i not in images]
    assert page.js("document.querySelectorAll('#pictures img').length") == 2
    assert page.js(
        "[...document.querySelectorAll('#pictures img')].every(i => i.complete && i.naturalWidth > 0)"
    )
    learned = page.js("getComputedStyle(document.querySelector('#text .sup')).backgroundColor")
    plain = page.js("getComputedStyle(document.querySelector('#text .run:not(.sup)')).backgroundColor")
    assert learned != plain
    page.js("document.getElementById('ids').click()")
    shown = page.js("getComputedStyle(document.querySelector('#text .piece'), '::after').content")
    assert shown == f'"{sample.input_ids[0]}"'


@needs_chromium
def test_everything_works_with_the_keyboard(page):
    page.press("Tab")
    assert text_of(page, ":focus") == "Skip to the samples"
    page.press("Enter")
    page.wait("location.hash === '#samples'")
    page.js("document.querySelector('#gallery .card').focus()")
    page.press("Enter")
    page.wait("document.getElementById('viewer').open")
    assert text_of(page, "#viewer-title").startswith("#0 ")
    page.press("ArrowRight")
    page.press("ArrowRight")
    page.press("ArrowLeft")
    assert text_of(page, "#viewer-title").startswith("#1 ")
    page.press("Escape")
    page.wait("!document.getElementById('viewer').open")
    assert page.js("document.activeElement.className") == "card"
    unreachable = page.js(
        "[...document.querySelectorAll('button, input, select, a')].filter(e => e.tabIndex < 0).length"
    )
    assert unreachable == 0


@needs_chromium
def test_extremes_and_rejects(page):
    longest = page.js("document.querySelector('#edges .edge button').textContent")
    assert longest.endswith("79 tokens")
    page.js("document.querySelector('#edges .edge button').click()")
    assert text_of(page, "#viewer-title").startswith("#20 ")
    page.js("document.getElementById('close').click()")
    assert text_of(page, "#reject-count") == "3 of 3 rejects shown"
    page.js(
        "[...document.querySelectorAll('#reject-bar button')]"
        ".find(b => b.textContent.startsWith('role_order')).click()"
    )
    shown = page.js(
        "[...document.querySelectorAll('.reject')].filter(r => !r.hidden).map(r => r.textContent)"
    )
    assert len(shown) == 1 and "two user turns" in shown[0] and "<b>raw</b>" in shown[0]
    assert text_of(page, "#reject-count") == "1 of 3 rejects shown"


def contrast(page, selector):
    """WCAG contrast of an element's text against the nearest background that is painted."""
    return page.js(
        """((selector) => {
        const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
        const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
          .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
          .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const element = document.querySelector(selector);
        let back = element;
        while (parse(getComputedStyle(back).backgroundColor)[3] === 0) back = back.parentElement;
        const colours = [getComputedStyle(element).color, getComputedStyle(back).backgroundColor];
        const [a, b] = colours.map(parse).map(light);
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        })"""
        + f"({json.dumps(selector)})"
    )


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_is_legible_in_light_and_dark(browser, report, dark):
    page = browser.open(report.as_uri(), dark=dark)
    page.js("document.querySelectorAll('#gallery .card')[2].click()")
    for selector in (
        ".muted",
        ".card-text",
        ".card-meta",
        ".badge",
        "a",
        "#text .sup",
        "#text .special",
        "#text .chip",
        "#text .run",
        "#facts dt",
        ".reject b",
        ".totals small",
        "th",
    ):
        assert contrast(page, selector) >= 4.5, selector
    bright = page.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert (bright < 60) == dark
    assert page.problems == []


@needs_chromium
def test_a_narrow_window_needs_no_sideways_scrolling(browser, report):
    page = browser.open(report.as_uri(), width=400, height=800)
    assert page.js("document.documentElement.scrollWidth") <= 400
    assert page.problems == []


@needs_chromium
def test_a_thousand_samples_are_fine(browser, tmp_path):
    data = build_tiny_dataset(
        tmp_path / "data", num_samples=1000, samples_per_shard=250, num_val=0, image_size=24
    )
    write_report(Dataset(data), str(tmp_path / "report.html"), positions=list(range(1000)))
    page = browser.open((tmp_path / "report.html").as_uri())
    assert text_of(page, "#count") == "1,000 of 1,000 samples shown"
    took = page.js(
        "(() => { const t = performance.now(); document.getElementById('query').value = 'question 777:';"
        "filter(); document.body.offsetHeight; return performance.now() - t; })()"
    )
    assert visible(page) == [777]
    assert took < 2000, f"filtering took {took} ms"
    assert page.problems == []
