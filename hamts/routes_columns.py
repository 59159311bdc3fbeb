"""Columns of the routed-steps table that are read off the rows: times, values, tags and layers.

T tokens with something observed · P steps in a patch · L layers
R rows of the store · C channels · U sets of tags
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from hamts.data.clock import as_numbers, as_times, step_times
from hamts.data.panel import Panel
from hamts.data.patches import PatchStore

__all__ = ["Times", "layer_names", "observed_values", "tags_of"]


@dataclass(frozen=True)
class Times:
    """Times of steps of the tokens' items, as the user's frame has them."""

    panel: Panel
    item: np.ndarray  # [T]

    def __call__(self, steps: np.ndarray, known: np.ndarray | None = None) -> pd.Series:
        """Steps [T] -> times [T], missing where not ``known``."""
        panel = self.panel
        if panel.times is None:
            times = step_times(panel, panel.starts[self.item], steps)  # [T]
        else:
            times = panel.times[panel.offsets[self.item] + np.minimum(steps, panel.lengths[self.item] - 1)]
        integer = times.dtype.kind != "M"
        series = pd.Series(as_times(as_numbers(times), integer=integer))
        zone = panel.schema.dialect.time_zone
        if not integer and zone is not None:
            series = series.dt.tz_localize("UTC").dt.tz_convert(zone)
        if known is None:
            return series
        return (series.astype("Int64") if integer else series).where(known)


def observed_values(
    store: PatchStore, row: np.ndarray, channel: np.ndarray, categorical: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Observed steps of each token, and the mean of their values: 2 x [T]."""
    values = store.values.numpy()[row, :, channel]  # [T, P]
    known = ~np.isnan(values)  # [T, P]
    count = known.sum(1)  # [T]
    mean = np.where(known, values, 0.0).sum(1) / np.maximum(count, 1)  # [T]
    return count, np.where(categorical[channel] | (count == 0), np.nan, mean)


def layer_names(own: np.ndarray) -> np.ndarray:
    """[T, L] bool -> text such as ``0,1``, [T]."""
    sets, code = np.unique(own, axis=0, return_inverse=True)  # [U, L], [T]
    text = np.array([",".join(str(layer) for layer in np.flatnonzero(line)) for line in sets], dtype=object)
    return text[code.reshape(-1)]


def tags_of(store: PatchStore, panel: Panel, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Names of the channels tagged in each token's patch, and whether one of them is an event: 2 x [T]."""
    tagged = (store.tags & ~torch.isnan(store.values)).any(1).numpy()  # [R, C]
    sets, code = np.unique(tagged, axis=0, return_inverse=True)  # [U, C], [R]
    channels = panel.schema.channels
    text = np.array([",".join(c.name for c, on in zip(channels, line, strict=True) if on) for line in sets], object)
    event = (sets & np.array([c.role == "event" for c in channels])).any(1)  # [U]
    own = code.reshape(-1)[row]  # [T]
    return text[own], event[own]
