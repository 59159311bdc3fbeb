"""Can a question of xcb's channel pairs be answered at all? Skill of an ideal reader, on drawn sequences.

    python -m benchmarks.probe_ceiling

The reader is told the row of the moment and which channel was asked with. One other channel fired, each as likely: it
answers with the mean of their values, weighted by how probable it is that each is the answer and not the carrier. Once
it knows the carrier without its noise, once only what values the carrier takes. No network can do better in the mean.

B sequences · Q queries · C channels
"""

from __future__ import annotations

import argparse
import math

import torch

from probes.contract import generator
from probes.draws import PAYLOAD_RANGE, carrier
from probes.registry import get_probe
from probes.suites.xcb import LOUD, XcbConfig

PHASES = 400


def ideal_skill(rung: str, *, sequences: int, seed: int, carrier_known: bool) -> float:
    """Skill against the set mean."""
    probe, name = get_probe(f"xcb/{rung}")
    config = probe.config("small", name)
    assert isinstance(config, XcbConfig)
    batch = probe.sample(generator(seed), sequences, config)
    B, C = sequences, batch.x.shape[-1]
    quiet = probe.config("small", name, noise=0.0)
    season = carrier(quiet.draws(generator(seed))("carrier"), B, batch.context_rows, C, quiet)  # [B, T, C]
    asked = batch.x.gather(1, batch.q_index[..., None].expand(-1, -1, C))  # [B, Q, C] NaN but for the source
    row = batch.need[..., :1].expand(-1, -1, C)
    x, level = batch.x.gather(1, row), season.gather(1, row)  # 2 x [B, Q, C]
    if carrier_known:
        background = torch.exp(-0.5 * ((x - level) / config.noise).square())
    else:
        phase = torch.arange(PHASES) / PHASES * 2 * math.pi
        near = (torch.exp(-0.5 * ((x - 0.5 * p.sin()) / config.noise).square()) for p in phase)
        background = sum(near, start=torch.zeros_like(x)) / PHASES  # [B, Q, C]
    # an answer is uniform: its density is the same wherever it can lie
    low = LOUD if config.loud else 0.0
    possible = asked.isnan() & (x.abs() <= low + PAYLOAD_RANGE + 1e-5) & (x.abs() >= low)
    odds = torch.where(possible, 1.0 / background.clamp_min(1e-30), 0.0).double()  # [B, Q, C]
    answer = (odds * x).sum(-1) / odds.sum(-1)  # [B, Q]
    y, floor = batch.y[..., 0], batch.floor["set_mean"][..., 0]
    return float(1.0 - (answer - y).square().mean() / (floor - y).square().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=2_048)
    parser.add_argument("--seed", type=int, default=123)
    asked = parser.parse_args()
    print("| rung | row and carrier known | row known |\n| --- | --- | --- |")
    for rung in ("xcbC", "xcbP"):
        found = [
            ideal_skill(rung, sequences=asked.sequences, seed=asked.seed, carrier_known=known)
            for known in (True, False)
        ]
        print(f"| {rung} | {found[0]:.3f} | {found[1]:.3f} |")


if __name__ == "__main__":
    main()
