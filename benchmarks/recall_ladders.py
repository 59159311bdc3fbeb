"""Up which lengths token models learn."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.recall_model import TOKENS_PER_PAIR

__all__ = ["LADDERS", "LATE", "SMOKE", "Rung"]


@dataclass(frozen=True)
class Rung:
    """One length of the ladder; ``tokens_per_pair`` may be fewer in training, so that a state overflows early."""

    length: int
    sequences: int
    steps: int
    tokens_per_pair: int = TOKENS_PER_PAIR


# the rate falls from the beginning, or only at the end
LADDERS: dict[str, tuple[Rung, ...]] = {
    "registered": (Rung(64, 256, 800), Rung(256, 96, 400), Rung(1024, 32, 250), Rung(4096, 12, 120)),
    "dense": (Rung(64, 128, 350, 4), Rung(256, 48, 250, 4), Rung(1024, 24, 120), Rung(4096, 8, 60)),
    "long": (Rung(64, 128, 700, 4), Rung(256, 48, 250, 4), Rung(1024, 24, 80), Rung(4096, 8, 40)),
    "longer": (Rung(64, 128, 700, 4), Rung(256, 48, 250, 4), Rung(1024, 24, 240), Rung(4096, 8, 120)),
}
# ladders that keep their learning rate until the last third
LATE = ("dense", "long", "longer")
SMOKE = (Rung(32, 8, 3, 4), Rung(64, 4, 2))
