"""How one budget is shared: by services in the allocation task of ``frontier``, by nodes in ``topo``; tier 0.

B sequences · T rows · S services · n rows of a service · N items
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from probes.contract import ProbeBatch
from probes.floors import fit_ridge, ridge_answer
from probes.t0 import Trace, read_state

__all__ = ["NODE_SCHEMES", "SCHEMES", "allocate", "allocate_nodes", "recalls"]

MAD_TO_SIGMA = 1.4826
WARM_ROWS = 5


def by_service(values: torch.Tensor, reporter: torch.Tensor, services: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of each service in time order: values [B, T] -> [B, S, n], and where they came from, [B, S, n]."""
    T = values.shape[1] - values.shape[1] % services
    order = reporter[:, :T].argsort(dim=1, stable=True).reshape(len(values), services, -1)  # [B, S, n]
    return values.gather(1, order.flatten(1)).reshape(order.shape), order


def running_z(size: torch.Tensor) -> torch.Tensor:
    """(e - median) / MAD of the service's earlier rows, [B, S, n]; 0 for its first few."""
    out = torch.zeros_like(size)
    for row in range(WARM_ROWS, size.shape[-1]):
        past = size[..., :row]
        middle = past.median(-1, keepdim=True).values
        spread = MAD_TO_SIGMA * (past - middle).abs().median(-1).values
        out[..., row] = (size[..., row] - middle[..., 0]) / spread.clamp_min(1e-6)
    return out


def allocate(scheme: str, batch: ProbeBatch, train: ProbeBatch, total: int) -> torch.Tensor:
    """Rows kept by a scheme, [B, L] bool.

    Raises:
        ValueError: an unknown scheme, or fewer rows than services where each is to have one.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"Unknown scheme {scheme!r}. Available: {list(SCHEMES)}.")
    trace, services = read_state(batch), int(batch.extra["reporter"].max()) + 1
    size, order = by_service(_size(trace, batch), batch.extra["reporter"], services)  # 2 x [B, S, n]
    chosen = _SCHEMES[scheme](size, order, batch, train, total)  # [B, S, n] bool
    kept = torch.zeros(batch.crit.shape, dtype=torch.bool)
    return kept.scatter(1, order.flatten(1), chosen.flatten(1))


def recalls(kept: torch.Tensor, batch: ProbeBatch) -> dict[str, float]:
    """Share of items kept: over all, mean over services, and of the worst service."""
    found = kept.gather(1, batch.need[..., 0])  # [B, Q]
    service = batch.slices["service"]
    each = [float(found[service == number].float().mean()) for number in range(int(service.max()) + 1)]
    return {"micro": float(found.float().mean()), "macro": sum(each) / len(each), "worst": min(each)}


def _size(trace: Trace, batch: ProbeBatch) -> torch.Tensor:
    return trace.error.norm(dim=-1)[:, : batch.context_rows]


def _best(score: torch.Tensor, total: int) -> torch.Tensor:
    """The best ``total`` rows of all services, [B, S, n] -> bool."""
    flat = score.flatten(1)
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter(1, flat.topk(total, dim=1).indices, True)
    return kept.reshape(score.shape)


def _each(score: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The best ``counts[s]`` rows of each service."""
    out = torch.zeros_like(score, dtype=torch.bool)
    for number, count in enumerate(counts):
        if count:
            out[:, number].scatter_(1, score[:, number].topk(min(count, score.shape[-1]), dim=1).indices, True)
    return out


def _floor_then_z(size: torch.Tensor, total: int) -> torch.Tensor:
    services = size.shape[1]
    if total < services:
        raise ValueError(f"A row for each of {services} services needs a budget of as many. Got {total}.")
    z = running_z(size)
    first = _each(z, [1] * services)
    return first | _best(z.masked_fill(first, -1e9), total - services)


def _crit(batch: ProbeBatch, services: int) -> torch.Tensor:
    return by_service(batch.crit[:, : batch.context_rows].float(), batch.extra["reporter"], services)[0]


def _greedy(size: torch.Tensor, train: ProbeBatch, total: int) -> torch.Tensor:
    """Per-service budgets that gained most on training sequences, one row at a time; rows by z inside a service."""
    services = size.shape[1]
    train_size, _ = by_service(_size(read_state(train), train), train.extra["reporter"], services)
    hit = _crit(train, services).gather(2, running_z(train_size).argsort(-1, descending=True))  # [B, S, n]
    gain = hit.mean(0)  # [S, n] items found by the k-th best row
    counts = [0] * services
    for _ in range(total):
        best = max(range(services), key=lambda s: float(gain[s, counts[s]]) if counts[s] < gain.shape[1] else -1.0)
        counts[best] += 1
    return _each(running_z(size), counts)


def _learned(size: torch.Tensor, train: ProbeBatch, total: int) -> torch.Tensor:
    """A linear score of log error, z and service, fitted to the truth of training sequences."""
    services = size.shape[1]

    def features(e: torch.Tensor) -> torch.Tensor:
        service = torch.eye(services)[:, None].expand(services, e.shape[-1], services).expand(*e.shape, services)
        z = running_z(e).clamp(-10, 10)
        parts = torch.stack([torch.log(e.clamp_min(1e-6)), z, z.clamp_min(2.0)], -1)
        return torch.cat([parts, service, service * parts[..., :1]], -1)

    train_size, _ = by_service(_size(read_state(train), train), train.extra["reporter"], services)
    weights = fit_ridge(features(train_size).flatten(0, 2), _crit(train, services).flatten()[:, None])
    return _best(ridge_answer(features(size), weights)[..., 0], total)


_SCHEMES: dict[str, Callable[..., torch.Tensor]] = {
    "uniform": lambda size, order, batch, train, total: _each(size, [total // size.shape[1]] * size.shape[1]),
    "raw": lambda size, order, batch, train, total: _best(size, total),
    "z": lambda size, order, batch, train, total: _best(running_z(size), total),
    "floor+z": lambda size, order, batch, train, total: _floor_then_z(size, total),
    "greedy": lambda size, order, batch, train, total: _greedy(size, train, total),
    "learned": lambda size, order, batch, train, total: _learned(size, train, total),
    "oracle": lambda size, order, batch, train, total: _best(_crit(batch, size.shape[1]), total),
}
SCHEMES = tuple(_SCHEMES)


# --- nodes

NODE_SCHEMES = ("uniform", "degree", "owned", "global")


def allocate_nodes(scheme: str, batch: ProbeBatch, score: torch.Tensor, total: int) -> torch.Tensor:
    """Rows kept where nodes have budgets: score [B, L] -> [B, L] bool, ``total`` of them or all that may be kept.

    ``global`` keeps the best rows of all, those that belong to no node too. The others are told by the truth which rows
    belong to a node: ``owned`` keeps the best of these whatever their node, ``uniform`` gives every node as many,
    ``degree`` a node with children more, as its reading is asked about by them. What a node has no row for goes to the
    others. Within a node the best rows stay, of equal ones the earlier.

    Raises:
        ValueError: an unknown scheme.
    """
    if scheme not in NODE_SCHEMES:
        raise ValueError(f"Unknown scheme {scheme!r}. Available: {list(NODE_SCHEMES)}.")
    owner = batch.extra["node"]  # [B, L]
    if scheme != "global":
        score = score.masked_fill(owner < 0, -torch.inf)
    there = score > -torch.inf  # [B, L]
    if scheme in ("global", "owned"):
        order = score.argsort(dim=1, descending=True, stable=True)[:, :total]
        return torch.zeros_like(batch.crit).scatter(1, order, True) & there
    assert batch.edge_index is not None
    parent = batch.edge_index[..., 1]  # [B, V]
    weight = torch.ones_like(parent, dtype=torch.float32)  # [B, V]
    if scheme == "degree":
        weight = weight.scatter_add(1, parent, torch.ones_like(weight))
    of = owner.clamp_min(0)  # [B, L]
    quota = _quotas(weight, torch.zeros_like(parent).scatter_add(1, of, there.long()), total)  # [B, V]
    row = torch.arange(score.shape[1])  # [L]
    first, second = score[:, None], score[..., None]  # [B, 1, L], [B, L, 1]
    above = (first > second) | ((first == second) & (row < row[:, None]))  # [B, L, L]
    above &= (of[:, None] == of[..., None]) & there[:, None]
    return (above.sum(-1) < quota.gather(1, of)) & there


def _quotas(weight: torch.Tensor, room: torch.Tensor, total: int) -> torch.Tensor:
    """Whole shares of a total by weight, none beyond its room, [B, V]: what one has no room for goes to the others.

    What rounding leaves over goes to the largest rests.
    """
    quota = torch.zeros_like(room)
    # each round spends all that is left or fills one more
    for _ in range(room.shape[1]):
        open_ = quota < room  # [B, V]
        left = torch.minimum(total - quota.sum(1, keepdim=True), (room - quota).sum(1, keepdim=True))  # [B, 1]
        if not bool(left.any()):
            break
        share = weight * open_  # [B, V]
        exact = left * share / share.sum(1, keepdim=True).clamp_min(1e-9)
        whole = exact.floor().long()
        rest = left - whole.sum(1, keepdim=True)  # [B, 1]
        rank = torch.where(open_, exact - whole, -1.0).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        quota = torch.minimum(quota + whole + (rank < rest), room)
    return quota
