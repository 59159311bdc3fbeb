"""The report in a real headless Chromium: no error, no request, and what a reader does with mouse and keyboard.

A step of its own (``make browser``): it needs Debian's ``chromium`` and the package ``playwright``, whose own browsers
are not downloaded. HAMTS_BROWSER names another Chromium; HAMTS_SHOTS a folder to keep the pictures in.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from report_models import NASTY, made_report, small_model, stormy_frame

playwright_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'hamts[browser]'")

SIZES = {"many": (20, 5_000), "long": (1, 100_000)}
MOST_SECONDS, MOST_BYTES = 3.0, 15 * 2**20

pytestmark = pytest.mark.timeout(240)


def chromium() -> str | None:
    names = (os.environ.get("HAMTS_BROWSER", ""), "chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if name and (found := shutil.which(name))), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    path = chromium()
    if path is None:
        if os.environ.get("HAMTS_NEEDS_BROWSER"):
            pytest.fail("HAMTS_NEEDS_BROWSER is set, and there is no Chromium: apt-get install chromium")
        pytest.skip("needs a Chromium: apt-get install chromium, or set HAMTS_BROWSER")
    with playwright_api.sync_playwright() as driver:
        # the sandbox of Chromium does not run as root
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@dataclass
class Visit:
    """One page, and all that it asked for or complained of."""

    page: Any
    ready_ms: float = 0.0
    seconds: float = 0.0
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def open(self, path: Path, state: str = "") -> Visit:
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda said: self.complaints.append(f"{said.type}: {said.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        began = time.perf_counter()
        self.page.goto(path.as_uri() + state)
        self.page.wait_for_function("document.documentElement.dataset.ready")
        self.seconds = time.perf_counter() - began
        self.ready_ms = float(self.page.evaluate("document.documentElement.dataset.ready"))
        return self

    def check(self) -> None:
        """Nothing but the file itself was asked for, and nothing went wrong."""
        asked = [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))]
        assert asked == []
        assert len([url for url in self.requests if url.startswith("file:")]) <= 1
        assert self.complaints == []

    def rows(self) -> Any:
        return self.page.locator("#steps tbody tr")

    def detail(self) -> str:
        return str(self.page.locator("#detail").inner_text())


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1250, "height": 900}, accept_downloads=True)
    yield Visit(context.new_page())
    context.close()


@pytest.fixture(scope="session", params=sorted(SIZES))
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    items, steps = SIZES[request.param]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return made_report(tmp_path_factory.mktemp(request.param), stormy_frame(items=items, steps=steps)), items


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return made_report(tmp_path_factory.mktemp("small"), stormy_frame(items=3, steps=900))


def keep_shot(picture: bytes, name: str) -> None:
    if folder := os.environ.get("HAMTS_SHOTS"):
        Path(folder, name).write_bytes(picture)


def colours_of(picture: bytes) -> int:
    from PIL import Image

    return len(Image.open(io.BytesIO(picture)).convert("RGB").getcolors(2**24) or [])


# --- large pages


def test_a_large_page_is_ready_within_three_seconds_and_is_not_blank(visit: Visit, large: tuple[Path, int]) -> None:
    path, items = large
    assert path.stat().st_size < MOST_BYTES
    visit.open(path)
    print(f"\n{path.parent.name}: {path.stat().st_size / 2**20:.1f} MiB, ready after {visit.ready_ms:.0f} ms")
    assert visit.ready_ms < 1000 * MOST_SECONDS
    for name in ("c-series", "c-scores", "c-layers", "c-held", "c-forecast"):
        shot = visit.page.locator(f"#{name}").screenshot()
        assert colours_of(shot) > 8, name
    keep_shot(visit.page.screenshot(full_page=True), f"{path.parent.name}.png")
    assert visit.page.locator("#item-names option").count() == items
    visit.check()


def test_a_click_on_a_kept_step_of_a_large_page_shows_its_worth(visit: Visit, large: tuple[Path, int]) -> None:
    visit.open(large[0])
    assert visit.rows().count() > 5
    visit.rows().first.click()
    assert re.search(r"Worth: -?[\d.e-]+ \(random others", visit.detail())
    began = time.perf_counter()
    visit.page.get_by_role("button", name="closer").click()
    visit.page.get_by_role("button", name="wider").click()
    visit.page.wait_for_function("true")
    # two drawings of the whole series
    assert time.perf_counter() - began < 2
    visit.check()


# --- one small page, by mouse


def test_a_click_in_the_picture_shows_values_neighbours_score_rank_reads_and_worth(visit: Visit, small: Path) -> None:
    visit.open(small)
    place = visit.page.evaluate(
        "(() => { const it = item(), token = listed.find((t) => !Number.isNaN(it.tokens.worth[t]));"
        " const box = $('c-series').getBoundingClientRect();"
        " const share = (it.tokens.start[token] + 3 - view.from) / (view.to - view.from);"
        " return { token, x: PAD.left + share * (box.width - PAD.left - PAD.right) }; })()"
    )
    visit.page.locator("#c-series").click(position={"x": place["x"], "y": 60})
    assert visit.page.evaluate("view.chosen") == place["token"]
    text = visit.detail()
    for words in ("Worth: ", "random others", "status", "why", "score", "threshold", "rank", "What attended to it",
                  "Mean share of attention", "The forecast after", "Values", "Neighbours"):  # fmt: skip
        assert words in text, words
    keep_shot(visit.page.screenshot(full_page=True), "small.png")
    visit.page.locator("#detail summary").last.click()
    assert visit.page.locator("#detail details").last.locator("tbody tr").count() > 2
    visit.check()


def test_filters_by_item_time_column_reason_and_status(visit: Visit, small: Path) -> None:
    visit.open(small)
    page = visit.page
    everything = visit.rows().count()
    page.get_by_label("event", exact=True).uncheck()
    without = visit.rows().count()
    assert 0 < without < everything
    assert "event" not in page.locator("#steps tbody").inner_text()
    page.get_by_label("event", exact=True).check()
    assert visit.rows().count() == everything
    page.locator("#channel").select_option("-1")
    assert visit.rows().count() > everything
    page.locator("#channel").select_option("0")
    page.get_by_label("below").check()
    assert visit.rows().count() > everything
    page.get_by_label("below").uncheck()
    page.locator("#from").fill("2012-01-20")
    page.locator("#from").press("Enter")
    later = visit.rows().count()
    assert 0 < later < everything
    assert page.locator("#steps tbody tr td:first-child").all_inner_texts() >= ["2012-01-19"]
    page.locator("#from").fill("yesterday")
    page.locator("#from").press("Enter")
    assert "is no time such as" in page.locator("#message").inner_text()
    page.locator("#all").click()
    page.locator("#item").fill("item 2")
    page.locator("#item").press("Enter")
    assert page.evaluate("item().id") == "item 2"
    page.locator("#item").fill("nobody")
    page.locator("#item").press("Enter")
    assert 'no item "nobody"' in page.locator("#message").inner_text()
    assert page.evaluate("item().id") == "item 2"
    for reason in page.locator("#reasons input").all():
        reason.uncheck()
    assert "No step passes the filters." in page.locator("#message").inner_text()
    visit.check()


def test_another_threshold_is_a_preview_and_changes_nothing_else(visit: Visit, small: Path) -> None:
    visit.open(small)
    page, before = visit.page, visit.rows().count()
    assert "as it is" in page.locator("#preview").inner_text()
    page.locator("#shift").evaluate("(range) => { range.value = -60; range.dispatchEvent(new Event('input')); }")
    text = page.locator("#preview").inner_text()
    shares = [float(share) for share in re.findall(r"([\d.]+) %", text)]
    assert "would lie above it" in text and shares[0] > shares[1]
    assert "not run again" in page.locator("#preview-note").inner_text()
    assert visit.rows().count() == before
    page.get_by_role("button", name="reset").click()
    assert "as it is" in page.locator("#preview").inner_text()
    visit.check()


def test_the_view_is_in_the_address_and_comes_back_from_it(visit: Visit, small: Path, browser: Any) -> None:
    visit.open(small)
    page = visit.page
    page.locator("#item").fill("item 1")
    page.locator("#item").press("Enter")
    page.locator("#from").fill("2012-01-10")
    page.locator("#from").press("Enter")
    page.get_by_label("learned").uncheck()
    visit.rows().first.click()
    page.locator("#shift").evaluate("(range) => { range.value = 40; range.dispatchEvent(new Event('input')); }")
    state = page.evaluate("location.hash")
    assert "item=item+1" in state and "step=" in state
    look = "[item().id, view.from, view.to, view.channel, view.chosen, view.shift, [...view.reasons].sort()]"
    before, detail = page.evaluate(look), visit.detail()
    context = browser.new_context(viewport={"width": 1250, "height": 900})
    other = Visit(context.new_page()).open(small, state)
    assert other.page.evaluate(look) == before
    assert other.detail() == detail
    other.check()
    context.close()
    damaged = Visit(browser.new_context().new_page()).open(
        small, "#item=nope&from=-3&to=xyz&step=99999999&status=&preview=7"
    )
    assert damaged.page.evaluate("[view.from, view.chosen, view.shift]") == [0, None, 0]
    damaged.check()


def test_what_is_exported_is_what_is_listed(visit: Visit, small: Path, tmp_path: Path) -> None:
    visit.open(small)
    with visit.page.expect_download() as started:
        visit.page.get_by_role("button", name="export CSV").click()
    started.value.save_as(tmp_path / "steps.csv")
    rows = pd.read_csv(tmp_path / "steps.csv")
    assert len(rows) == visit.page.evaluate("listed.length") == visit.rows().count()
    assert set(rows["unique_id"]) == {"item 0"} and set(rows["channel"]) == {"y"}
    frame = stormy_frame(items=3, steps=900)
    table = small_model(frame.groupby("unique_id", sort=False).head(600)).routes(frame)
    kept = table[(table["unique_id"] == "item 0") & (table["channel"] == "y") & (table["status"] == "kept")]
    np.testing.assert_allclose(rows["score"], kept["score"], rtol=1e-4, atol=1e-5)
    assert rows["start"].tolist() == kept["ds_start"].dt.strftime("%Y-%m-%d %H:%M").tolist()
    visit.check()


def test_forecasts_can_be_searched(visit: Visit, small: Path) -> None:
    visit.open(small)
    page = visit.page
    assert page.locator("#f-cut option").count() == 4
    first = page.locator("#c-forecast").screenshot()
    page.locator("#f-item").fill("item 2")
    page.locator("#f-item").press("Enter")
    page.locator("#f-cut").select_option("2")
    assert page.locator("#c-forecast").screenshot() != first
    page.locator("#f-item").fill("item 9")
    page.locator("#f-item").press("Enter")
    assert 'no item "item 9"' in page.locator("#f-note").inner_text()
    visit.check()


# --- by keyboard


def test_everything_can_be_reached_and_used_by_keyboard(visit: Visit, small: Path) -> None:
    visit.open(small)
    page = visit.page
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"A", "f-item", "f-target", "f-cut", "item", "channel", "from", "to", "zoom-in", "zoom-out", "all", "csv",
            "c-series", "shift", "shift-reset", "INPUT", "TR"} <= reached  # fmt: skip
    page.locator("#c-series").focus()
    page.keyboard.press("ArrowRight")
    first = visit.detail()
    assert "Worth" in first
    page.keyboard.press("ArrowRight")
    assert visit.detail() != first
    width = page.evaluate("view.to - view.from")
    page.keyboard.press("+")
    assert page.evaluate("view.to - view.from") < width
    page.locator("#all").click()
    visit.rows().nth(1).focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.evaluate("Number(document.activeElement.dataset.token) === view.chosen")
    visit.check()


# --- what must stay text


def test_script_in_names_and_labels_stays_text(visit: Visit, tmp_path: Path) -> None:
    image = '"><img src=x onerror="window.hacked=2">'
    df = stormy_frame(items=2, steps=400, names=[NASTY, image]).rename(columns={"wind": f"wind {NASTY}"})
    log = pd.DataFrame({"unique_id": NASTY, "ds": df["ds"].iloc[[50, 120]].to_numpy(), "type": f"gale {NASTY}"})
    labels = pd.DataFrame({"unique_id": [NASTY], "start": [df["ds"][40]], "end": [df["ds"][60]], "label": [image]})
    from hamts.report import write_report

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = small_model(df, events=log)
        path = write_report(
            model, df, tmp_path / "page.html", events=log, labels=labels, n_windows=2, worth=9, title=image
        )
    visit.open(path)
    page = visit.page
    page.locator("#channel").select_option("-1")
    for token in page.evaluate("listed.slice(0, 12)"):
        page.evaluate(f"choose({token}, true)")
    assert f"gale {NASTY}" in page.locator("#steps").inner_text()
    assert NASTY in visit.detail()
    page.locator("#item").fill(image)
    page.locator("#item").press("Enter")
    assert page.evaluate("item().id") == image
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    assert page.locator("h1").inner_text() == image
    visit.check()


def test_a_page_without_a_kept_step_or_a_patch_works(visit: Visit, tmp_path: Path, browser: Any) -> None:
    from hamts.report import write_report

    df = stormy_frame(items=1, steps=400)
    model = small_model(df)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nothing = write_report(model, df, tmp_path / "nothing.html", budget_share=0.0, n_windows=2)
        short = write_report(model, df.head(2), tmp_path / "short.html", n_windows=2)
    visit.open(nothing)
    assert "No step was ever kept" in visit.page.locator("main").inner_text()
    assert "No step passes the filters." in visit.page.locator("#message").inner_text()
    visit.check()
    other = Visit(browser.new_context().new_page()).open(short)
    assert "Nothing could be kept: a patch of" in other.page.locator("main").inner_text()
    assert not other.page.locator("#explorer").is_visible()
    other.check()
