"""Cells of the decoding benchmark: one that fails leaves nothing behind, and is told. Needs no device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernels, kernels_decode, kernels_table


def test_a_cell_that_fails_leaves_no_older_result_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, sound = "decode--S64--10--ragged--paged", "decode--S64--10--ragged"
    for name in (broken, sound):
        (tmp_path / f"{name}.json").write_text("{}", encoding="utf-8")

    def measured(streams: kernels_decode.Streams, *_: Any) -> dict[str, Any]:
        if streams.store == "paged":
            raise RuntimeError("no such kernel")
        return {"streams": streams.streams}

    monkeypatch.setattr(kernels_decode, "CELLS", [(64, 0.1, True)])
    monkeypatch.setattr(kernels_decode, "full_decode_ms", dict)
    monkeypatch.setattr(kernels_decode.Streams, "measured", measured)
    for module in (kernels, kernels_decode):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(kernels, "setting", dict)
    monkeypatch.setattr(kernels, "ceilings", dict)
    monkeypatch.setattr(kernels_table, "table", lambda: print("tables"))
    monkeypatch.setattr(sys, "argv", ["kernels", "--parts", "decode"])
    with pytest.raises(
        SystemExit, match=r"These cells failed and have no result: \['decode--S64--10--ragged--paged'\]"
    ):
        kernels.main()
    shown = capsys.readouterr()
    # the others' are recorded, and shown
    assert "no such kernel" in shown.err and shown.out.endswith("tables\n")
    assert [path.stem for path in tmp_path.iterdir()] == [sound]
    assert "64" in (tmp_path / f"{sound}.json").read_text(encoding="utf-8")
