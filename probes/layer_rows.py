"""How one total of entries is shared by the layers of a network: alike, all in one, or as validation says.

L layers
"""

from __future__ import annotations

import torch

from probes.contract import VALIDATION_SEED, generator
from probes.reading import answer_batch
from probes.scores import query_error
from probes.train import Fitted, sample

__all__ = ["LAYER_SPLITS", "layer_rows"]

# "learned" is the one of these, of the even split and of those between that is best on validation
LAYER_SPLITS = ("first", "last", "learned")
VALIDATION_SEQUENCES = 128


def layer_rows(split: str, fitted: Fitted, *, rows: int) -> tuple[int, ...]:
    """Entries of each layer, ``rows`` times as many in all as there are layers; every layer has one at least.

    Raises:
        ValueError: an unknown split.
    """
    layers = fitted.net.config.layers
    if split == "first":
        return concentrated(rows * layers, layers, 0)
    if split == "last":
        return concentrated(rows * layers, layers, layers - 1)
    if split == "learned":
        return learned(fitted, rows)
    raise ValueError(f"Unknown split of layers {split!r}. Available: {list(LAYER_SPLITS)}.")


def concentrated(total: int, layers: int, place: int, share: float = 1.0) -> tuple[int, ...]:
    """This share of the total in one layer, the rest alike in the others."""
    others = max(round((1.0 - share) * total / max(layers - 1, 1)), 1)
    return tuple(total - others * (layers - 1) if layer == place else others for layer in range(layers))


@torch.no_grad()
def learned(fitted: Fitted, rows: int) -> tuple[int, ...]:
    """The split with the least error on validation sequences; of equal ones the most even.

    Tried are the even one, and of each layer one that gives it all and one half way between.
    """
    net, plan, layers = fitted.net, fitted.plan, fitted.net.config.layers
    batch = sample(plan, generator(VALIDATION_SEED), VALIDATION_SEQUENCES).to(plan.device)
    tried, half = [(rows,) * layers], (1.0 + 1.0 / layers) / 2
    tried += [concentrated(rows * layers, layers, place, share) for share in (half, 1.0) for place in range(layers)]
    errors = {each: float(query_error(answer_batch(net, batch, each)[0], batch).nanmean()) for each in tried}
    return min(errors, key=lambda each: errors[each])
