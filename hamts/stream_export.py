"""One step of a stream as a graph of plain tensors: ``(tokens, state) -> (outputs, state)``, for ``torch.export``.

The graph holds the network's own arithmetic. Two things have fixed sizes here where they grow elsewhere: the scratchpad
has room for its cap from the start, and the read multiplies all of it, what is not alive being hidden. The token of a
patch that is over moves the state on. The token of a patch that has begun, its targets hidden and ``complete`` False,
gives its forecast; the state that comes back is then to be thrown away.

B items · C channels · G targets · P steps in a patch · Q quantiles · H heads · K key · V value · M entries (the cap)
L layers · W window patches · R marks
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hamts.data.patches import Chunk
from hamts.nn import ham
from hamts.nn.scratchpad import Entries
from hamts.nn.tokens import map_tensors
from hamts.ops import naive
from hamts.ops.types import Attended, GatedDelta, ScratchKeys
from hamts.reader import HAMNetwork
from hamts.remembered import flatten_tensors, unflatten_tensors

if TYPE_CHECKING:
    from hamts.stream import Stream

__all__ = ["StepGraph", "export_step", "plain_state", "plain_tokens"]

TOKEN_FIELDS = tuple(f.name for f in fields(Chunk) if f.name not in ("truth", "horizon"))
State = dict[str, torch.Tensor]


class StepGraph(nn.Module):
    """One patch of B items.

    Args:
        network: copied; it must be of mixer ``ham`` and have a cap.
        share: budget share, fixed in the graph like every other part of the policy.
    """

    def __init__(self, network: HAMNetwork, share: float, items: int) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        for layer in self.network.backbone.layers():
            layer.kernels = _StaticKernels()  # type: ignore[assignment]
        self.policy = self.network.policy(torch.full((items,), share))
        if not isinstance(self.policy.cap_kept, int) or not isinstance(self.policy.cap_must, int):
            raise ValueError(f"A graph of fixed sizes needs one cap for all items. Got {self.policy.cap_kept!r}.")
        self.entries = self.policy.cap_kept + self.policy.cap_must
        self.template = self.network.empty_memory(1)

    def forward(self, tokens: State, state: State) -> tuple[State, State]:
        """Read one token of every channel.

        Args:
            tokens: ``plain_tokens``: values [B, C, 1, P] float64 and the other fields of a ``Chunk``.
            state: ``plain_state``: every leaf of the memory, scratchpads [B, M, ...].

        Returns:
            ``quantiles`` [B, G, P, Q] float64 in the users' units and ``routed`` [B, L, C] bool; the state after it.
        """
        chunk = Chunk(**tokens, truth=tokens["values"])
        with _fixed_room(self.entries):
            reading = self.network(chunk, unflatten_tensors(self.template, state), self.policy, stepwise=True)
        routed = torch.stack([trace.routed[..., 0] for trace in reading.traces], 1)  # [B, L, C]
        return {"quantiles": reading.unscaled()[:, :, 0], "routed": routed}, flatten_tensors(reading.memory)


def export_step(stream: Stream, items: int = 1) -> torch.export.ExportedProgram:
    """The step of a stream's model for so many items side by side; ``torch.export.save`` writes it to a file."""
    graph = StepGraph(stream._network, stream.share, items)
    if len(stream) < 1:
        raise ValueError("Exporting traces the state of an item. Got a stream without items.")
    ids = [stream.item_ids[0]] * items
    example = (plain_tokens(stream, ids), plain_state(stream, ids))
    with torch.no_grad():
        return torch.export.export(graph, example, strict=False)


def plain_state(stream: Stream, items: list[Any]) -> State:
    """State of some items, scratchpads with room for the cap."""
    policy, _ = stream._stepper.policies(1)
    assert isinstance(policy.cap_kept, int) and isinstance(policy.cap_must, int)
    room, store = policy.cap_kept + policy.cap_must, stream._items.memory
    slots = stream._slots(items)
    state = {}
    for name, leaf in flatten_tensors(store.select(slots)).items():
        if name in store.entry_leaves:
            missing = room - leaf.shape[1]
            leaf = torch.cat([leaf, leaf.new_zeros(len(leaf), missing, *leaf.shape[2:])], 1)
        state[name] = leaf.clone()
    return state


def plain_tokens(stream: Stream, items: list[Any], *, complete: bool = False) -> State:
    """The unfinished patch of some items as it stands, as tokens."""
    chunk = stream._stepper.chunk(stream._open_rows(stream._slots(items)), complete=complete)
    return {name: getattr(chunk, name).contiguous() for name in TOKEN_FIELDS}


class _StaticKernels:
    """Recurrence and read without a size that depends on data."""

    name, why, fused = "static", "exported", False

    @property
    def gated_delta(self) -> Any:
        return naive.gated_delta

    def gated_delta_step(self, *args: Any, **kwargs: Any) -> GatedDelta:
        return naive.gated_delta(*args, **kwargs)

    def attend(self, *args: Any, **kwargs: Any) -> Attended:
        return read_once(*args, **kwargs)


def read_once(
    queries: torch.Tensor,
    *,
    local_keys: torch.Tensor,
    local_values: torch.Tensor,
    local_present: torch.Tensor,
    scratch: ScratchKeys,
    readable: torch.Tensor,
    channel_bias: torch.Tensor,
    window: int,
    cross_span: int = 1,
    local_marks: torch.Tensor | None = None,
    block: int = 64,
) -> Attended:
    """``hamts.ops.attend`` for one query in time, dense: queries [B, 1, C, H, K], local_keys [B, W + 1, C, H, K]."""
    del block
    q, C = queries[:, 0], queries.shape[2]  # [B, C, H, K]
    own = torch.eye(C, dtype=torch.bool, device=q.device)  # [C, C]
    age = window - torch.arange(window + 1, device=q.device)  # [W + 1]
    allowed = readable | own  # [B, C, C]
    near = torch.where(own[:, None], (age < window)[:, None], (age < cross_span)[:, None])  # [C, W + 1, C]
    near = near & allowed[:, :, None] & local_present[:, None]  # [B, C, W + 1, C]
    source = torch.nn.functional.one_hot(scratch.channel, C).bool()  # [B, M, C]
    mine = source.transpose(1, 2)  # [B, C, M]
    seen = (scratch.visible_from <= 0) & (scratch.visible_until > 0)  # [B, M]
    kept = (allowed.to(q.dtype) @ mine.to(q.dtype) > 0) & seen[:, None]  # [B, C, M]
    fresh = torch.einsum("bchk,blshk->bchls", q, local_keys)  # [B, C, H, W + 1, C]
    fresh = fresh + own[:, None, None].to(q.dtype) * channel_bias[:, None, None]  # [B, C, H, W + 1, C]
    old = torch.einsum("bchk,bmhk->bchm", q, scratch.keys) + scratch.bias.transpose(1, 2)[:, None]  # [B, C, H, M]
    old = old + mine[:, :, None].to(q.dtype) * channel_bias[:, None]  # [B, C, H, M]
    logits = torch.cat(
        [
            fresh.masked_fill(~near[:, :, None], -torch.inf).flatten(3),
            old.masked_fill(~kept[:, :, None], -torch.inf),
        ],
        -1,
    )  # [B, C, H, J]
    weight = torch.softmax(logits, -1).nan_to_num()  # [B, C, H, J]
    local, entries = weight.split([fresh[0, 0, 0].numel(), old.shape[-1]], -1)
    local = local.unflatten(-1, (window + 1, C))  # [B, C, H, W + 1, C]
    output = torch.einsum("bchls,blshv->bchv", local, local_values)  # [B, C, H, V]
    output = output + torch.einsum("bchm,bmhv->bchv", entries, scratch.values)  # [B, C, H, V]
    marks = None
    if local_marks is not None and scratch.marks is not None:
        marks = torch.einsum("bchlc,blcr->bchr", local, local_marks)  # [B, C, H, R]
        marks = marks + torch.einsum("bchm,bcm,bmr->bchr", entries, mine.to(q.dtype), scratch.marks)  # [B, C, H, R]
        marks = marks[:, None]  # [B, 1, C, H, R]
    return Attended(output[:, None], marks, entries.sum((1, 2)), local.sum((1, 2)))


@contextmanager
def _fixed_room(room: int) -> Iterator[None]:
    """Lay scratchpads out in a fixed number of rows while a graph is traced, instead of as many as are alive."""

    def append(kept: Entries, local: Entries, *, fused: bool = False) -> tuple[Entries, torch.Tensor]:
        del fused
        both = _joined(kept, local)
        B, M = kept.alive.shape
        before = torch.full((B, M), -1, device=local.alive.device)  # [B, M]
        origin = torch.arange(local.alive.shape[1], device=local.alive.device).expand(B, -1)  # [B, L]
        return both, torch.cat([before, origin], 1)

    def merge(
        kept: Entries, local: Entries, *, most: int | None = None, fused: bool = False
    ) -> tuple[Entries, torch.Tensor]:
        del most, fused
        both = _joined(kept, local)
        order = torch.argsort((~both.alive).to(torch.uint8), dim=1, stable=True)[:, :room]  # [B, M]

        def pick(tensor: torch.Tensor) -> torch.Tensor:
            index = order.reshape(*order.shape, *(1,) * (tensor.dim() - 2)).expand(-1, -1, *tensor.shape[2:])
            return tensor.gather(1, index)

        return map_tensors(both, pick), order

    grown = ham.append_candidates, ham.merge_candidates
    ham.append_candidates, ham.merge_candidates = append, merge
    try:
        yield
    finally:
        ham.append_candidates, ham.merge_candidates = grown


def _joined(kept: Entries, local: Entries) -> Entries:
    names = [f.name for f in fields(Entries) if getattr(local, f.name) is not None]
    return replace(local, **{name: torch.cat([getattr(kept, name), getattr(local, name)], 1) for name in names})
