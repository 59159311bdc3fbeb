"""A stream whose steps are recorded and replayed is the stream whose steps are launched one by one, to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import pytest
import torch
from model_frames import rich_frames, sine_frame
from streams import begin, events_of, plain_model, rich_model

from hamts.errors import DataError
from hamts.nn import scratchpad
from hamts.ops.pool import RowPool
from hamts.stream import Stream
from hamts.stream_recorded import Recorder


def replayed(run: Callable[[], list[torch.Tensor]]) -> Callable[[], None]:
    """What stands for a graph on a CPU: runs again, on the tensors of the first time and into them."""
    first = run()

    def again() -> None:
        for target, source in zip(first, run(), strict=True):
            target.copy_(source)

    return again


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked for on the way, so that shapes do not depend on what is kept."""
    # models that other tests share are made as they are
    plain_model(), rich_model()
    hold = RowPool.hold
    monkeypatch.setattr(RowPool, "hold", lambda pool, rows, alive, asks=True: hold(pool, rows, alive, asks=False))

    def room(alive: torch.Tensor, most: int | None = None, *, skips_padding: bool = False) -> int:
        return alive.shape[1] if most is None else min(most, alive.shape[1])

    monkeypatch.setattr(scratchpad, "rows_for", room)


@pytest.fixture
def first_choices() -> Iterator[None]:
    """One configuration of every kernel: to try them all takes minutes."""
    from hamts.ops import attend_triton_tiles as tiles
    from hamts.ops.gated_delta_trial import untuned

    tiles.use({kernel: candidates[-1] for kernel, candidates in tiles.CANDIDATES.items()})
    with untuned():
        yield
    tiles.use({})


def recording(stream: Stream) -> Recorder:
    network = stream._network
    each = len(network.spec.roles) * network.config.entries_per_token
    stream._stepper.recorder = Recorder(each, replayed)
    return stream._stepper.recorder


def lists_read_by(stream: Stream) -> list[torch.Tensor]:
    """Fills up with which places of each layer's list are alive, [B, M], pass by pass."""
    run, found = stream._stepper._run, []

    def noting(what: Any, chunk: Any, memory: Any, policy: Any) -> Any:
        found.extend(layer.scratchpad.alive.clone() for layer in memory.layers)
        return run(what, chunk, memory, policy)

    stream._stepper._run = noting  # type: ignore[method-assign]
    return found


def assert_same_state(one: Stream, two: Stream, tolerance: float) -> None:
    (left, _), (right, _) = one.state(), two.state()
    assert set(left) == set(right)
    for name, leaf in left.items():
        mine, other = torch.as_tensor(leaf), torch.as_tensor(right[name])
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)


def parts_of(kind: str) -> tuple[Any, pd.DataFrame]:
    return (plain_model(), sine_frame(items=3, steps=480)) if kind == "plain" else (rich_model(), rich_frames()["df"])


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("kind", ["plain", "rich"])
def test_a_replayed_stream_is_the_launched_one(kind: str) -> None:
    model, df = parts_of(kind)
    (launched, rest), (recorded, _) = (begin(model, df, 150, store="paged", items_side_by_side=2) for _ in range(2))
    recorder = recording(recorded)
    lists = [lists_read_by(launched), lists_read_by(recorded)]
    for at in range(0, len(rest), 31):
        part = rest.iloc[at : at + 31]
        for stream in (launched, recorded):
            stream.update(part, events=events_of(part) if kind == "rich" else None)
        # this read computes with padding, so its sums are rounded otherwise
        assert_same_state(launched, recorded, 1e-5)
    assert recorder.replayed > 10
    # blanks between old entries and new ones would make a GPU add up in another order
    assert len(lists[0]) == len(lists[1]) and all(map(torch.equal, *lists))
    rows = [[pool.used() for pool in stream._items.memory.entries.pools.values()] for stream in (launched, recorded)]
    assert rows[0] == rows[1]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_rows_that_are_no_numbers_are_refused_in_a_replay_too() -> None:
    stream, rest = begin(plain_model(), sine_frame(items=2, steps=480), 150, store="paged")
    recorder = recording(stream)
    for at in range(0, 120, 2):
        stream.update(rest.iloc[at : at + 2])
    replayed_before, before = recorder.replayed, stream.state_hash()
    weight = stream._network.backbone.layers()[0].to_memory.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(DataError, match="E-NUMERIC"):
            stream.update(rest.iloc[120:132])
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert recorder.replayed > replayed_before > 0 and stream.state_hash() == before


def test_steps_that_cannot_be_recorded_are_refused() -> None:
    with pytest.raises(DataError, match=r"E-OPTION.*recorded=True needs a GPU.*Got device='cpu', store='paged'"):
        plain_model().stream(store="paged", recorded=True)


@pytest.mark.gpu
@pytest.mark.usefixtures("first_choices")
@pytest.mark.parametrize("kind", ["plain", "rich"])
def test_a_recorded_stream_is_the_launched_one_on_a_gpu(kind: str) -> None:
    model, df = parts_of(kind)
    options: list[dict[str, Any]] = [{}, {"recorded": True}]
    (launched, rest), (recorded, _) = (begin(model, df, 150, device="cuda", store="paged", **o) for o in options)
    for at in range(0, len(rest), 31):
        part = rest.iloc[at : at + 31]
        for stream in (launched, recorded):
            stream.update(part, events=events_of(part) if kind == "rich" else None)
        # padding is passed over, so the same numbers are added up in the same order
        assert_same_state(launched, recorded, 0.0)
        assert launched.state_hash() == recorded.state_hash()
    recorder = recorded._stepper.recorder
    assert recorder is not None and recorder.replayed > 10
    arrays, meta = recorded.state()
    assert "recorded" not in meta["config"]
    again = Stream.from_state(model, arrays, json.loads(json.dumps(meta)), device="cuda", recorded=True)
    assert again.state_hash() == recorded.state_hash()
