"""What a fitted model refuses to answer.

I items · G targets · F future steps · Q quantiles
"""

from __future__ import annotations

import numpy as np

from hamts.data.cutoffs import first_observed
from hamts.data.panel import Panel, Schema
from hamts.errors import DataError
from hamts.remembered import Remembered

__all__ = ["refuse_non_finite", "refuse_unseen", "refuse_rival"]


def refuse_unseen(panel: Panel) -> None:
    """Nothing can be said of an item of which no target was ever observed."""
    unseen = (first_observed(panel) >= panel.lengths[:, None]).all(axis=1)  # [I]
    if unseen.any():
        raise DataError(
            "E-ALLNAN",
            f"An item needs at least one value in a target to be forecast. {int(unseen.sum())} have none.",
            column=panel.schema.targets[0],
            series=panel.item_ids[unseen][:5].tolist(),
            fix="Leave these items out of df.",
        )


def refuse_non_finite(answer: np.ndarray, remembered: Remembered, schema: Schema) -> None:
    """A forecast [I, G, F, Q] that is not a number is no forecast."""
    bad = ~np.isfinite(answer).all(axis=-1) & remembered.seen[:, :, None]  # [I, G, F]
    if bad.any():
        item, target, step = np.argwhere(bad)[0]
        raise DataError(
            "E-NUMERIC",
            f"The network gave {int(bad.sum())} values that are not numbers, first at step {step + 1} of the horizon.",
            column=schema.targets[target],
            series=remembered.item_ids[item],
            fix="Look for values of extreme size in this item; fit again with a smaller learning_rate.",
        )


def refuse_rival(mixer: str, asked: str) -> None:
    """What changes or shows the scratchpad cannot be asked of a model that has none."""
    if mixer != "ham":
        raise DataError(
            "E-OPTION",
            f"{asked} concerns the scratchpad, and mixer {mixer!r} has no scratchpad.",
            fix="Leave it out, or fit with mixer='ham'.",
        )
