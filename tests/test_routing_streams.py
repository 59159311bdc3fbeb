"""A live stream under every rule of routing gives what one pass gives, also after it was saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_frames import ROLES, quick, rich_frames
from streams import assert_like, begin, by_item, feed, shaken

SETTINGS: dict[str, dict[str, Any]] = {
    "typed tags, block, lowest": {
        "router": "surprise+tags",
        "routing": {
            "threshold": "block", "eviction": "lowest", "tag_half_life_patches": 20.0,
            "tag_types": [{"name": "valve", "quota": 0.5, "before_patches": 1, "after_patches": 2}],
        },
    },
    "doubt, quantile, reservoir": {
        "router": "uncertainty+residual+tags",
        "routing": {"threshold": "quantile", "eviction": "reservoir", "allocation": "normalised"},
    },
    "mix, feedback, must last, clipped": {
        "router": "mix+tags",
        "routing": {"threshold": "feedback", "eviction": "must_last", "write_clip": 2.0, "allocation": "learned"},
    },
    "steps": {"router": "error+tags", "routing": {"resolution": "step", "decision": "step"}},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_a_stream_routes_as_one_pass(name: str) -> None:
    frames = rich_frames()
    given = {"events": frames["events"], "static_df": frames["static_df"], **ROLES}
    options = {"patch_steps": 6, "budget_share": 0.4, "budget_bytes": 20_000, **SETTINGS[name]}
    model = shaken(quick(frames["df"], 24, **options, **given))
    stream, rest = begin(model, frames["df"], 150)
    feed(stream, rest, [13, 1, 40])
    asides = {key: value for key, value in frames.items() if key != "df"}
    whole = by_item(model.predict(frames["df"], 24, **asides))
    assert_like(by_item(stream.forecast(24, frames["futr_df"])), whole, tolerance=1e-5)
    again = type(stream).from_state(model, *stream.state())
    assert_like(by_item(again.forecast(24, frames["futr_df"])), whole, tolerance=1e-5)
    held = [layer.scratchpad.alive for layer in model._fitted.remembered.memory.layers]
    assert all(bool(alive.any()) for alive in held)
    assert torch.stack([alive.sum(1).float().mean() for alive in held]).mean() > 3
