"""Tier 2: fitted forecasters, ours or anyone's, asked by plain forecasts. One method is all they need.

h rows ahead · Y channels of the answer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from hamts.errors import DataError
from hamts.metrics import DECILES
from probes.contract import CONTRACT_VERSION, EVALUATION_SEED, FAMILY, generator, hashed
from probes.frames import EchoCase, echo_cases
from probes.registry import Probe, get_probe
from probes.results import SCHEMA_VERSION, machine, start_folder, write_document
from probes.stats import mean_interval

__all__ = ["Forecaster", "HamtsAdapter", "run_external"]

# all that is trained by default: a score of extremes needs levels in the tails
ROLLING_LEVELS = (0.01, 0.025, 0.05, *DECILES, 0.95, 0.975, 0.99)


@runtime_checkable
class Forecaster(Protocol):
    """What a forecaster must do."""

    def forecast(self, history: pd.DataFrame, future: pd.DataFrame) -> pd.DataFrame:
        """Forecast the rows of ``future``.

        Args:
            history: long table unique_id, ds, channels, events and actions; one or more series.
            future: unique_id, ds and the columns known ahead.

        Returns: unique_id, ds and the channels that can be forecast.
        """
        ...


class HamtsAdapter:
    """A fitted ``HAMForecaster`` as a forecaster of probes. It can also forecast without some of what it kept.

    Args:
        model: fitted on columns of the same names.
        budget_share: another share than that of the fit.
        device: where to forecast; the model is moved there. None: where it is.
    """

    def __init__(self, model: Any, *, budget_share: float | None = None, device: str | None = None) -> None:
        self.model, self.budget_share = model, budget_share
        if device is not None:
            model._fitted.network.to(device)

    def forecast(self, history: pd.DataFrame, future: pd.DataFrame) -> pd.DataFrame:
        """See ``Forecaster``. Raises DataError E-PROBE-CHANNELS: the model was fitted on columns that are not there."""
        self._check(history)
        steps = int(future.groupby("unique_id").size().max())
        known = self._known(future)
        answer = self.model.predict(history[self._columns(history)], steps, known, budget_share=self.budget_share)
        return self._wide(pd.DataFrame(answer.df))

    def rolling(
        self, df: pd.DataFrame, *, horizon: int, windows: int, levels: Sequence[float] = ROLLING_LEVELS
    ) -> pd.DataFrame:
        """Forecasts of the last windows of each series, every ``horizon`` rows, each from what came before it.

        Returns: unique_id, ds, cutoff, target, y and the quantiles, in columns named by their levels.
        """
        self._check(df)
        found = pd.DataFrame(
            self.model.cross_validation(
                df[self._columns(df)], horizon, n_windows=windows, step_size=horizon, quantiles=list(levels),
                budget_share=self.budget_share,
            )
        )  # fmt: skip
        target = found["target_name"] if "target_name" in found else self.model.schema.targets[0]
        named = {f"HAM_ql{level:g}": level for level in levels}
        return found.rename(columns=named).assign(target=target)[
            ["unique_id", "ds", "cutoff", "target", "y", *named.values()]
        ]

    def forecast_without(
        self, history: pd.DataFrame, future: pd.DataFrame, windows: Sequence[tuple[Any, Any]], *, seed: int = 0
    ) -> dict[str, pd.DataFrame]:
        """Forecast with everything kept, without the entries inside windows, and without as many others.

        Args:
            history: one series.
            windows: (start, end) times, both included.

        Returns: ``full``, ``without`` and ``others``, in the form of ``forecast``; only ``full`` where the memory holds
            nothing of the windows.
        """
        from hamts.data.clock import future_times
        from hamts.data.frame import encode_future
        from hamts.forecast import Forecast, resolve_levels
        from hamts.remembered import forecast_remembered

        self._check(history)
        model = self.model
        share = model._share(self.budget_share)
        remembered, schema, _ = model._read(history[self._columns(history)], share, None, None)
        rows = np.flatnonzero(_inside(history["ds"], windows))
        patch = model.config.patch_steps
        patches = np.unique((rows + int(remembered.lead[0])) // patch)
        steps = len(future)
        clock = remembered.clock(schema)
        ahead = encode_future(clock, self._known(future), h=steps)

        def answer(memory: Any) -> pd.DataFrame:
            quantiles = forecast_remembered(
                model._fitted.network, replace(remembered, memory=memory), schema, future=ahead, share=share,
                time_unit=model._fitted.plan.time_unit,
            )  # fmt: skip
            asked = resolve_levels(None, None, default=model.quantiles, trained=model.config.quantiles)
            forecast = Forecast(
                quantiles=quantiles, levels=model.config.quantiles, item_ids=remembered.item_ids, notes=(),
                times=future_times(clock, steps), schema=schema, asked=asked, templates=model._fitted.templates,
            )  # fmt: skip
            return self._wide(pd.DataFrame(forecast.df))

        found = {"full": answer(remembered.memory)}
        edited = _dropped(remembered.memory, patches, seed=seed)
        if edited is not None:
            found |= {"without": answer(edited[0]), "others": answer(edited[1])}
        return found

    def kept_rows(self, history: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a series in patches of which a layer holds an entry at the end, [T] bool, and their patches, [T]."""
        self._check(history)
        remembered, _, _ = self.model._read(
            history[self._columns(history)], self.model._share(self.budget_share), None, None
        )
        held: set[int] = set()
        for layer in remembered.memory.layers:
            entries = layer.scratchpad
            held |= set(entries.position[entries.alive].round().long().tolist())
        patch = (np.arange(len(history)) + int(remembered.lead[0])) // self.model.config.patch_steps
        return np.isin(patch, sorted(held)), patch

    def _check(self, history: pd.DataFrame) -> None:
        missing = [channel.name for channel in self.model.schema.channels if channel.name not in history.columns]
        if missing:
            raise DataError(
                "E-PROBE-CHANNELS", f"The model was fitted on columns that this probe has not: {missing}.",
                column=missing[0], fix="Fit it on probes.frames.training_frame(...) of this probe.",
            )  # fmt: skip

    def _columns(self, history: pd.DataFrame) -> list[str]:
        names = [channel.name for channel in self.model.schema.channels]
        return [name for name in history.columns if name in ("unique_id", "ds") or name in names]

    def _known(self, future: pd.DataFrame) -> pd.DataFrame | None:
        ahead = [
            c.name for c in self.model.schema.channels if c.role in ("future", "action") and c.name in future.columns
        ]
        return future[["unique_id", "ds", *ahead]] if ahead else None

    def _wide(self, frame: pd.DataFrame) -> pd.DataFrame:
        targets = list(self.model.schema.targets)
        if "target_name" in frame.columns:
            wide = frame.pivot(index=["unique_id", "ds"], columns="target_name", values="HAM")
            return wide[targets].reset_index()
        return frame.rename(columns={"HAM": targets[0]})[["unique_id", "ds", targets[0]]]


def _inside(times: pd.Series, windows: Sequence[tuple[Any, Any]]) -> np.ndarray:
    inside = np.zeros(len(times), dtype=bool)
    for start, end in windows:
        inside |= ((times >= start) & (times <= end)).to_numpy()
    return inside


def _dropped(memory: Any, patches: np.ndarray, *, seed: int) -> tuple[Any, Any] | None:
    """A memory without the entries of some patches, and one without as many others of each layer; None if none."""
    import torch

    gen = generator(seed)
    without, others, dropped = [], [], 0
    for layer in memory.layers:
        entries = layer.scratchpad
        place = entries.position.round().long()  # [1, M]
        mine = torch.isin(place, torch.as_tensor(patches, device=place.device)) & entries.alive  # [1, M]
        count = int(mine.sum())
        rest = torch.nonzero((entries.alive & ~mine)[0]).squeeze(1)  # [R]
        chosen = rest[torch.randperm(len(rest), generator=gen)[:count]]
        same_count = torch.zeros_like(mine)
        same_count[0, chosen] = True
        dropped += count
        without.append(replace(layer, scratchpad=replace(entries, alive=entries.alive & ~mine)))
        others.append(replace(layer, scratchpad=replace(entries, alive=entries.alive & ~same_count)))
    if dropped == 0:
        return None
    return replace(memory, layers=without), replace(memory, layers=others)


# --- running suites


def run_external(
    names: Sequence[str],
    folder: str | Path,
    external: Mapping[str, Forecaster],
    *,
    preset: str = "smoke",
    sequences: int = 32,
    queries: int = 1,
    progress: bool = True,
    overrides: dict[str, Any] | None = None,
) -> list[Path]:
    """Ask forecasters the echo questions of suites, and write a document for each.

    Raises:
        DataError: E-PROBE-CHANNELS, a forecaster lacks columns that it needs.
    """
    from probes.runner import bars

    root, written, versions = Path(folder), [], {}
    todo = [(probe, rung) for name in names for probe, rung in _rungs(name)]
    start_folder(root, [], {}, done=False)
    with bars(len(todo), progress) as report:
        for probe, rung in todo:
            versions[probe.name] = probe.version
            config = probe.config(preset, rung, **(overrides or {}))
            batch = probe.sample(generator(EVALUATION_SEED), sequences, config)
            cases = echo_cases(probe, batch, queries=queries)
            for name, forecaster in external.items():
                errors = np.array([_error(forecaster, case, name) for case in cases])
                content = _document(probe, rung, name, errors, cases, preset=preset)
                path = root / probe.name / f"{rung}__{name}__external__{content['identity']['config_hash']}.json"
                write_document(path, content, errors[None])
                written.append(path)
            report.finish(f"{probe.name}/{rung}")
    start_folder(root, [str(path.relative_to(root)) for path in written], versions, done=True)
    return written


def _rungs(name: str) -> list[tuple[Probe, str]]:
    probe, rung = get_probe(name)
    return [(probe, each) for each in ((rung,) if rung else tuple(probe.rungs))]


def _error(forecaster: Forecaster, case: EchoCase, name: str) -> float:
    answer = forecaster.forecast(case.history, case.future)
    missing = [column for column in case.answer_columns if column not in answer.columns]
    if missing or len(answer) != len(case.future):
        raise DataError(
            "E-PROBE-CHANNELS",
            f"Forecaster {name!r} must answer {len(case.future)} rows of {list(case.answer_columns)}."
            f" Got {len(answer)} rows of {list(answer.columns)}.",
            fix="Fit it on these columns, or answer them from its forecast method.",
        )
    guess = answer.sort_values("ds")[list(case.answer_columns)].to_numpy(dtype=float)
    return float(np.mean((guess - case.truth) ** 2))


def _document(
    probe: Probe, rung: str, name: str, errors: np.ndarray, cases: list[EchoCase], *, preset: str
) -> dict[str, Any]:
    floors = {key: float(np.mean([np.mean((c.floor[key] - c.truth) ** 2) for c in cases])) for key in cases[0].floor}
    best = min(floors, key=lambda key: floors[key])
    interval = mean_interval((1.0 - errors / floors[best])[None], resamples=500)
    config = {"preset": preset, "rung": rung, "model": name, "sequences": len(cases), "readout": "echo"}
    skill = 1.0 - float(errors.mean()) / floors[best]
    return {
        "schema_version": SCHEMA_VERSION,
        "identity": {
            "family": FAMILY, "contract_version": CONTRACT_VERSION, "suite": probe.name, "suite_version": probe.version,
            "rung": rung, "agenda_slot": probe.slot, "tier": "T2", "readout": "echo", "model": name,
            "router": "external", "config_hash": hashed(config),
        },
        "config": config,
        "data_manifest": {"train_seed": 0, "eval_streams": [EVALUATION_SEED], "leak_status": "unknown"},
        "budget": {"frac": float("nan"), "rows": 0, "bytes_state": float("nan"), "bytes_kv": float("nan"),
                   "bytes_total": float("nan")},
        "results": {
            "skill": {"values": [skill], "median": skill, "n": len(errors), "ci": [interval.low, interval.high]},
            "mse": {"values": [float(errors.mean())], "median": float(errors.mean()), "n": len(errors)},
        },
        "floor": {"name": best, "mse": floors[best]}, "oracle": {"mse": 0.0}, "diagnosis": {}, "checks": {},
        "runtime": {"device": "cpu", "status": "ok", **machine()}, "warnings": ["no training on the probe is implied"],
    }  # fmt: skip
