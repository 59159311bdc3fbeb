"""The report as text: what it says, what it refuses, that nothing in it comes from or goes to anywhere else."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from report_models import NASTY, made_report, small_model, stormy_frame

from hamts.cli import main
from hamts.errors import DataError
from hamts.evaluation import seasonal_naive_forecasts
from hamts.forecast import quantile_at
from hamts.report import write_report
from hamts.report_accuracy import Verdict, measure_accuracy
from hamts.report_page import script_json

pytestmark = pytest.mark.filterwarnings("ignore::hamts.errors.DataWarning")


class Reader(HTMLParser):
    """Text of a page, its scripts, and every address in it."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.addresses: list[str] = []
        self.policy = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.addresses += [str(given[name]) for name in ("src", "href", "action", "data") if name in given]
        if tag == "meta" and given.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(given["content"])
        assert not any(name.startswith("on") for name in given), given
        if tag not in ("meta", "link", "input", "br"):
            self.stack.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        while self.stack and self.stack.pop() != tag:
            pass

    def handle_data(self, text: str) -> None:
        if self.stack and self.stack[-1] == "script":
            self.scripts[-1] += text
        elif "style" not in self.stack:
            self.words.append(text)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def content(path: Path) -> dict[str, Any]:
    return json.loads(read(path).scripts[0])


def unpack(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=f"<{kind}")


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return stormy_frame(items=3, steps=900)


@pytest.fixture(scope="module")
def labels(frame: pd.DataFrame) -> pd.DataFrame:
    rows = frame[(frame["unique_id"] == "item 0") & (frame["storm"] > 0)]
    return pd.DataFrame(
        {"unique_id": "item 0", "start": [rows["ds"].min()], "end": [rows["ds"].min()], "label": ["gale"]}
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, frame: pd.DataFrame, labels: pd.DataFrame) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return made_report(tmp_path_factory.mktemp("report"), frame, labels=labels, n_windows=6, title="Three items")


def test_the_page_asks_for_nothing_from_anywhere(made: Path) -> None:
    page = read(made)
    assert {address.split(":")[0] for address in page.addresses if not address.startswith("#")} == {"data"}
    text = made.read_text(encoding="utf-8")
    assert re.findall(r"https?://", text) == []
    assert "@import" not in text and "url(" not in text
    assert len(page.scripts) == 2
    assert "default-src 'none'" in page.policy and "unsafe" not in page.policy
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.policy


def test_it_says_what_the_issue_of_a_reader_is(made: Path) -> None:
    text = read(made).text
    for words in (
        "Three items", "The memory", "seasonal naive", "emptied memory", "as many at random", "everything kept",
        "3 items of 900 steps", "storm event", "hamts.report.write_report", "weights sha256", "seed of the fit",
        "Preview", "The model is not run again", "Tagged, and not kept", "Meeting with your labels", "Made again by",
    ):  # fmt: skip
        assert words in text, words


def test_what_the_page_holds_is_the_table(made: Path, frame: pd.DataFrame) -> None:
    data = content(made)
    model = small_model(frame.groupby("unique_id", sort=False).head(600))
    table = model.routes(frame)
    for number, item in enumerate(data["items"]):
        own = table[table["unique_id"] == item["id"]]
        tokens = item["tokens"]
        status = [data["statuses"][code] for code in unpack(tokens["status"], "u1")]
        assert status == own["status"].tolist()
        assert [item["reasons"][code] for code in unpack(tokens["reason"], "u1")] == own["reason"].tolist()
        np.testing.assert_allclose(unpack(tokens["score"], "f4"), own["score"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(unpack(tokens["read"], "f4"), own["read_mass"], rtol=1e-4, atol=1e-7)
        series = frame[frame["unique_id"] == item["id"]]
        hours = ((own["ds_start"] - series["ds"].iloc[0]) / pd.Timedelta(hours=1)).astype(int)
        assert unpack(tokens["start"], "i4").tolist() == hours.tolist()
        np.testing.assert_allclose(unpack(item["values"]["0"], "f4"), series["y"], rtol=1e-6)
        kept = np.array(status) == "kept"
        assert unpack(item["held"]["count"], "i4")[-1] == kept.sum()
        worth = unpack(tokens["worth"], "f4")
        assert np.isnan(worth[~kept]).all() and (~np.isnan(worth)).sum() == min(30, kept.sum())
        # rank 1 has the largest margin of what was decided
        margin, rank = (own["score"] - own["threshold"]).to_numpy(), unpack(tokens["rank"], "i4")
        decided = own["status"].ne("pending").to_numpy()
        assert rank[decided].min() == 1 and (rank[~decided] == -1).all()
        assert margin[rank == 1][0] == margin[decided].max()
        # an entry is read after it was written, by stretches in order of their share
        for token, found in item["reads"].items():
            written = unpack(tokens["written"], "i4")[int(token)]
            assert all(last >= written for _, last, _ in found["by"])
            shares = [share for *_, share in found["by"]]
            assert shares == sorted(shares, reverse=True) and max(shares, default=0) <= 1
            # forecasts were made after it was written; the last one after the end
            assert all(cut > written and 0 <= share <= 1 for cut, share in found["forecasts"])
            assert found["forecasts"][-1][0] == 900
        assert set(item["reads"]) == {str(token) for token in np.flatnonzero(kept)}
        assert number < 3


def test_labels_are_placed_on_their_steps(made: Path, frame: pd.DataFrame, labels: pd.DataFrame) -> None:
    ((number, first, last, text),) = content(made)["labels"]
    series = frame[frame["unique_id"] == "item 0"].reset_index(drop=True)
    assert (number, text) == (0, "gale")
    assert series["ds"][first] == labels["start"][0] and series["ds"][last] == labels["end"][0]


def test_forecasts_are_those_of_cross_validation(made: Path, frame: pd.DataFrame) -> None:
    data = content(made)
    model = small_model(frame.groupby("unique_id", sort=False).head(600))
    expected = model.cross_validation(frame, n_windows=6, quantiles=[0.1, 0.5])
    last = expected["cutoff"].max()
    rows = expected[(expected["cutoff"] == last) & (expected["unique_id"] == "item 1")]
    found = next(each for each in data["forecasts"] if each["item"] == 1 and each["y"] and each["cut"] == 900 - 12)
    quantiles = unpack(found["q"], "f4").reshape(1, 12, 5)
    np.testing.assert_allclose(quantiles[0, :, 2], rows["HAM_ql0.5"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(quantiles[0, :, 1], rows["HAM_ql0.1"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(unpack(found["y"], "f4"), rows["y"], rtol=1e-5)
    ahead = next(each for each in data["forecasts"] if each["y"] is None and each["item"] == 1)
    assert ahead["cut"] == 900


def test_accuracy_is_that_of_evaluate_and_its_verdict_follows_from_the_rows(frame: pd.DataFrame) -> None:
    model = small_model(frame.groupby("unique_id", sort=False).head(600))
    panel = model._panel_of(frame, None, None)
    found = measure_accuracy(model, panel, n_windows=5, share=model._share(None), seed=0)
    expected = model.evaluate(frame, n_windows=5).set_index("method")
    rows = pd.DataFrame(found.rows).set_index("method")
    names = {
        "HAM": "HAM",
        "seasonal naive": "seasonal_naive",
        "emptied memory": "no_memory",
        "everything kept": "full_memory",
    }
    for shown, name in names.items():
        assert rows.loc[shown, "WQL"] == pytest.approx(expected.loc[name, "WQL"], rel=1e-6)
        assert rows.loc[shown, "MASE"] == pytest.approx(expected.loc[name, "MASE"], rel=1e-6)
    # the verdict by hand: quantile losses in units of each item's mean size
    actual = found.windows.actual[:, 0]  # [X, F]
    levels = np.arange(1, 10) / 10
    own = np.stack([quantile_at(found.quantiles[:, 0], model.config.quantiles, q) for q in levels])  # [9, X, F]
    naive = seasonal_naive_forecasts(panel, found.windows)[None, :, 0]  # [1, X, F]
    loss = [
        (2 * np.abs((actual - q) * ((q >= actual) - levels[:, None, None]))).mean((0, 2)) for q in (naive, own)
    ]  # 2 x [X]
    size = np.array([np.abs(actual[found.windows.items == item]).mean() for item in found.windows.items])
    gain = 100 * (1 - (loss[1] / size).mean() / (loss[0] / size).mean())
    assert found.verdict("naive").difference == pytest.approx(gain, rel=1e-6)
    assert all(each.low <= each.difference <= each.high for each in found.verdicts)
    assert found.coverage[0.9] >= found.coverage[0.1]


def test_verdicts_in_words() -> None:
    words = [
        Verdict("emptied memory", 3.0, 1.0, 5.0, 20).words, Verdict("emptied memory", 0.4, -1.0, 2.0, 20).words,
        Verdict("seasonal naive", -3.0, -5.0, -1.0, 20).words,
        Verdict("as many at random", 2.0, -np.inf, np.inf, 3).words,
        Verdict("as many at random", np.nan, -np.inf, np.inf, 0).words,
    ]  # fmt: skip
    assert "3.0 % lower than the same weights with an emptied memory (95 %" in words[0]
    assert "no difference that 20 moments could show" in words[1]
    assert "3.0 % higher than seasonal naive" in words[2]
    assert "3 moments are too few" in words[3]
    assert "nothing can be said" in words[4]


def test_text_from_the_data_stays_text(tmp_path: Path) -> None:
    df = stormy_frame(items=2, steps=400, names=[NASTY, '"><img src=x onerror=alert(1)>'])
    df = df.rename(columns={"wind": f"wind {NASTY}"})
    log = pd.DataFrame({"unique_id": NASTY, "ds": df["ds"].iloc[[50, 120]].to_numpy(), "type": f"gale {NASTY}"})
    labels = pd.DataFrame(
        {"unique_id": [NASTY], "start": [df["ds"][40]], "end": [df["ds"][60]], "label": [f"</script>{NASTY}"]}
    )
    model = small_model(df, events=log)
    path = write_report(
        model, df, tmp_path / "page.html", events=log, labels=labels, n_windows=2, worth=5, title=NASTY,
        command=f"hamts report '{NASTY}'",
    )  # fmt: skip
    page = read(path)
    assert len(page.scripts) == 2
    assert NASTY in page.text and f"wind {NASTY}" in page.text and f"gale {NASTY}" in page.text
    text = path.read_text(encoding="utf-8")
    assert text.count("<script") == 2 and "<img" not in text
    data = content(path)
    assert data["items"][0]["id"] == NASTY
    assert data["labels"][0][3] == f"</script>{NASTY}"
    assert script_json({"a": "</script><!--\u2028&", "b": float("nan")}).count("<") == 0


# --- bad and meagre input


def report_of(tmp_path: Path, df: pd.DataFrame, model: Any = None, **options: Any) -> str:
    model = small_model(stormy_frame(items=1, steps=400)) if model is None else model
    return read(write_report(model, df, tmp_path / "page.html", n_windows=2, worth=5, force=True, **options)).text


def test_no_kept_step_is_said(tmp_path: Path) -> None:
    df = stormy_frame(items=1, steps=400)
    text = report_of(tmp_path, df, small_model(df), budget_share=0.0)
    assert "No step was ever kept: the budget share is 0%" in text
    assert "No worth was measured." in text


def test_a_history_without_a_complete_patch_is_said(tmp_path: Path) -> None:
    df = stormy_frame(items=1, steps=400)
    text = report_of(tmp_path, df.head(2))
    assert "Nothing could be kept: a patch of" in text and "the longest has 2 steps" in text
    assert "No verdict:" in text and "Not measured:" in text


def test_a_single_step_is_a_page_or_a_message_that_says_so(tmp_path: Path) -> None:
    df = stormy_frame(items=1, steps=400).head(1)
    try:
        text = report_of(tmp_path, df)
    except DataError as error:
        assert "two" in error.message or "step" in error.message or "row" in error.message
        assert not (tmp_path / "page.html").exists()
    else:
        assert "the longest has 1 step)" in text


def test_columns_without_a_value_are_said(tmp_path: Path) -> None:
    df = stormy_frame(items=2, steps=400)
    model = small_model(df)
    text = report_of(tmp_path, df.assign(wind=np.nan), model)
    assert "No value was ever observed in: wind." in text
    empty = df.assign(y=df["y"].where(df["unique_id"] == "item 0"))
    assert (
        "item 1" in content(write_report(model, empty, tmp_path / "half.html", n_windows=2, worth=5))["items"][1]["id"]
    )


def test_unknown_items_columns_and_options_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    df = stormy_frame(items=2, steps=400)
    model = small_model(df)
    out = tmp_path / "page.html"
    for match, options in [
        ("E-ITEM.*no item.*'nope'.*2, such as", {"items": ["item 0", "nope"]}),
        ("E-COLUMNS.*start and end", {"labels": pd.DataFrame({"unique_id": ["item 0"]})}),
        ("E-OPTION.*n_windows", {"n_windows": 0}),
        ("E-OPTION.*budget_share", {"budget_share": 2.0}),
    ]:
        with pytest.raises(DataError, match=match):
            write_report(model, df, out, **options)
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(DataError, match="E-EXISTS"):
        write_report(model, df, out)
    assert out.read_text() == "mine"


def test_some_items_can_be_chosen(tmp_path: Path) -> None:
    df = stormy_frame(items=3, steps=400)
    path = write_report(small_model(df), df, tmp_path / "page.html", items=["item 2", "item 0"], n_windows=2, worth=5)
    assert [item["id"] for item in content(path)["items"]] == ["item 0", "item 2"]


def test_the_command_line_makes_the_page_and_says_how_to_make_it_again(tmp_path: Path) -> None:
    df = stormy_frame(items=1, steps=400)
    df.to_csv(tmp_path / "data.csv", index=False)
    small_model(df).save(tmp_path / "model")
    out = tmp_path / "out page.html"
    arguments = [
        "report",
        tmp_path / "model",
        "--data",
        tmp_path / "data.csv",
        "--out",
        out,
        "--windows",
        2,
        "--worth",
        5,
    ]
    with pytest.raises(SystemExit) as stopped:
        main([str(each) for each in arguments])
    assert not stopped.value.code
    page = read(out)
    assert f"hamts report {tmp_path}/model --data {tmp_path}/data.csv --out '{out}' --windows 2 --worth 5" in page.text
    for bad in (["--items", "nope", "--force"], []):
        with pytest.raises(SystemExit) as stopped:
            main([str(each) for each in [*arguments, *bad]])
        assert stopped.value.code == 2
    assert read(out).text == page.text


def test_a_model_without_a_scratchpad_is_refused(tmp_path: Path) -> None:
    df = stormy_frame(items=1, steps=400)
    with pytest.raises(DataError, match="A report concerns the scratchpad, and mixer 'recurrent'"):
        write_report(small_model(df, mixer="recurrent"), df, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_labels_of_a_csv_with_the_two_offsets_of_a_zone_are_placed_right(tmp_path: Path) -> None:
    df = stormy_frame(items=1, steps=400)
    df["ds"] = pd.date_range("2024-03-28", periods=400, freq="h", tz="Europe/Berlin")
    labels = pd.DataFrame({
        "unique_id": "item 0", "start": ["2024-03-30 05:00:00+01:00", "2024-04-02 05:00:00+02:00"],
        "end": ["2024-03-30 07:00:00+01:00", "2024-04-02 05:00:00+02:00"], "label": ["before", "after"],
    })  # fmt: skip
    path = write_report(small_model(df), df, tmp_path / "page.html", labels=labels, n_windows=2, worth=5)
    # one hour is missing in the night of the 31st
    assert content(path)["labels"] == [[0, 53, 55, "before"], [0, 124, 124, "after"]]
    assert "Meeting with your labels" in read(path).text
