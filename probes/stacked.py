"""Many tier-1 networks of one shape as one: every parameter has a leading axis of networks.

The networks are ``ProbeNet``: their weights come from it and go back to it, and what is computed is what its layers
compute for one channel, one head and an empty memory. Context and query rows are read in one pass, so that a step of
training is some hundred operations instead of thousands. Tests hold this form against the layers, value and gradient.

S networks · B sequences · N rows (context and queries) · T context rows · I inputs · D width · E memory width
C values of a row · A shares of a threshold table · Q queries
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from hamts.nn.budget import SHARES
from hamts.nn.controls import counted_uniform
from hamts.nn.eviction import whole_numbers
from hamts.nn.inner import INNER_LEVELS
from probes.models import EXPLORE_SHARE, ProbeNet, recent_rows
from probes.runner_plan import STACKED_MODELS, STACKED_ROUTERS
from probes.stacked_data import Decisions, Rows
from probes.stacked_ops import EAGER, Ops, linear, product
from probes.stacked_parts import Frame, LayerKind, sources, stacked_parameters
from probes.stacked_scores import LayerScores, layer_scores

__all__ = ["LayerRead", "StackedNet", "StackedReading", "can_stack"]


def can_stack(net: ProbeNet) -> bool:
    """Whether this form covers a network."""
    config = net.config
    known = config.router in STACKED_ROUTERS if config.model == "ham" else config.model in STACKED_MODELS
    return known and config.heads == 1 and config.write_clip == 0


@dataclass(frozen=True)
class LayerRead:
    """What one layer decided and read."""

    scores: torch.Tensor | None  # [S, B, T] detached
    bias: torch.Tensor | None  # [S, B, T] of learned scores
    routed: torch.Tensor | None  # [S, B, T] bool
    visible: torch.Tensor | None  # [S B, N, T] bool: entries of the scratchpad that each row may read
    weight: torch.Tensor | None  # [S B, N, N] probabilities
    inner_loss: torch.Tensor | None = None  # [S]


@dataclass(frozen=True)
class StackedReading:
    hidden: torch.Tensor  # [S, B, N, D]
    layers: list[LayerRead] = field(default_factory=list)
    between: list[torch.Tensor] = field(default_factory=list)  # L of [S, B, N, D] after each layer; in training


class StackedNet:
    """Networks of one configuration and size side by side; ``export`` writes back to them."""

    def __init__(self, nets: Sequence[ProbeNet], *, device: str | torch.device) -> None:
        first = nets[0]
        if not can_stack(first):
            raise ValueError(f"No stacked form of {first.config}. Train its networks one by one.")
        self.nets, self.config, self.device = list(nets), first.config, torch.device(device)
        self.S, self.channels = len(nets), first.channels
        self.flat, self.leaves = stacked_parameters(self.nets, self.device)
        self.kind = [LayerKind.of(layer) for layer in first.layers]
        self.window = max(kind.window for kind in self.kind)
        self.tables = [
            torch.stack([net.layers[n].thresholds.values.to(self.device) for net in self.nets])
            for n in range(len(first.layers))
        ]  # L of [S, 1, A], or of none
        # whether a router learns from what is read; else nothing flows through its score
        self.taught = True
        # what training runs; evaluation meets other shapes
        self.ops = EAGER
        self.levels = torch.tensor([1.0 - share for share in SHARES], device=self.device)  # [A]
        self.inner_levels = torch.tensor(INNER_LEVELS, device=self.device)
        self.frames: dict[tuple[int, int], Frame] = {}
        self._chance: dict[tuple[int, int, int], torch.Tensor] = {}

    @property
    def T(self) -> int:
        """Context rows of what was read last."""
        return self.frame.T

    def _fit(self, rows: Rows) -> None:
        """Take masks and angles for rows of this size."""
        size = (rows.context_rows, rows.inputs.shape[2])
        if size not in self.frames:
            self.frames[size] = Frame.of(
                *size, {kind.window for kind in self.kind}, self.config.memory_width, self.device
            )
        self.frame = self.frames[size]

    # --- reading

    def read(
        self, rows: Rows, decisions: Decisions, *, with_scores: bool = False, training: bool = False
    ) -> StackedReading:
        """Read all rows on an empty memory.

        Args:
            with_scores: also the scores that this network's decisions do not need.
            training: with the loss of the inner head.
        """
        self._fit(rows)
        ops = self.ops if training else EAGER
        told = recent_rows(rows.inputs, rows.unseen, self.config.embed_rows)  # [S, B, N, embed rows x I]
        x = F.silu(self.linear(told.expand(self.S, -1, -1, -1), "embed.0"))
        x = self.linear(x, "embed.2")  # [S, B, N, D]
        found, between, leaf = [], [], self.leaves
        for number, kind in enumerate(self.kind):
            at = f"blocks.{number}."
            x, layer = self._layer(x, number, kind, rows, decisions, ops, with_scores, training)
            names = ("before_mlp.weight", "grow.weight", "grow.bias", "shrink.weight", "shrink.bias")
            x = ops.mlp(x, *(leaf[at + name] for name in names))
            found.append(layer)
            if training:
                between.append(x)
        return StackedReading(ops.norm(x, leaf["final_norm.weight"]), found, between)

    def answers(
        self, reading: StackedReading, rows: Rows, *, named_after: Sequence[int] = ()
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Answers, [S, B, Q, Y], and of the auxiliary target, its parts after some layers (``Probe.names_after``)."""
        index = rows.q_index.expand(self.S, -1, -1)[..., None].expand(-1, -1, -1, reading.hidden.shape[-1])
        asked = reading.hidden.gather(2, index)  # [S, B, Q, D]
        if "auxiliary.weight" not in self.leaves:
            return self.linear(asked, "answer"), None
        if not named_after:
            return self.linear(asked, "answer"), self.linear(asked, "auxiliary")
        gain, parts = self.leaves["final_norm.weight"], []
        for number, layer in enumerate(named_after):
            told = self.linear(
                self.ops.norm(reading.between[layer].gather(2, index), gain), "auxiliary"
            )  # [S, B, Q, X]
            parts.append(told.chunk(len(named_after), -1)[number])
        return self.linear(asked, "answer"), torch.cat(parts, -1)

    def next_rows(self, reading: StackedReading) -> torch.Tensor:
        """The row after each context row, [S, B, T - 1, C]."""
        return self.linear(reading.hidden[:, :, : self.T - 1], "next_row")

    def _layer(
        self,
        x: torch.Tensor,
        number: int,
        kind: LayerKind,
        rows: Rows,
        decisions: Decisions,
        ops: Ops,
        with_scores: bool,
        training: bool,
    ) -> tuple[torch.Tensor, LayerRead]:
        """The residual stream after a memory layer, [S, B, N, D], and what the layer did."""
        S, B, N, _ = x.shape
        block, leaf, E = f"blocks.{number}.", self.leaves, self.config.memory_width
        at, exact = block + "memory.", block + "memory." + kind.exact
        below, asked = ops.enter(
            x, leaf[block + "before_memory.weight"], leaf[block + "down.weight"], leaf[block + "down.bias"],
            leaf[at + "project"],
        )  # fmt: skip
        named = dict(zip(kind.projected, asked.split(kind.widths, -1), strict=True))
        mixed = named["to_memory"]  # [S, B, N, units + 2 E], or 3 E where both branches share keys and values
        keys, queries = ops.ask(
            mixed[..., -2 * E : -E], named[kind.exact + "to_query"], leaf[exact + "key_norm.gain"],
            leaf[exact + "query_norm.gain"], self.frame.cosine, self.frame.sine,
        )  # fmt: skip
        values = mixed[..., -E:].reshape(S * B, N, E)
        past = gates = scores = None
        if kind.recurrent:
            own = at + kind.branch
            q, k, v, beta, log_decay, gates = ops.write(
                mixed[..., : 3 * kind.state_width], named["to_gates"], leaf[at + "to_gates.bias"], leaf[own + "conv"],
                leaf[own + "decay_rate"], rows.heard, (~rows.asks).to(x.dtype),
            )  # fmt: skip
            output, error = ops.delta(q, k, v, beta, log_decay)  # 2 x [S, B, N, K]
            past = ops.headed(output, leaf[at + "recurrent_norm.gain"])
            if decisions.hidden:
                alone = torch.arange(B, device=self.device)[:, None] < decisions.hidden  # [B, 1]
                past = past.masked_fill((alone & self.frame.queried)[..., None], 0.0)
            if at + "narrow.weight" in leaf:
                past = product(past, leaf[at + "narrow.weight"])  # [S, B, N, E]
            if self.config.model == "ham":
                scores = layer_scores(
                    self, below, number, rows, error=error, output=output, values=v, beta=beta, ops=ops,
                    with_scores=with_scores, training=training,
                )  # fmt: skip
        visible, routed = self._entries(number, kind, rows, decisions, ops, scores)
        got, weight = values, None
        if visible is not None:
            bias = leaf[exact + "scratch_bias"][:, None].expand(-1, B, self.T)  # [S, B, T]
            if scores is not None and scores.bias is not None:
                bias = bias + (scores.bias if self.taught else scores.bias.detach())
            got, weight = ops.read(queries, keys, values, visible, bias.flatten(0, 1), self.frame.band[kind.window])
        # without entries and with a window of one a row sees itself alone
        got = got.view(S, B, N, E)
        gain = leaf[at + "exact_norm.gain"]
        both = ops.headed(got, gain) if past is None else ops.mix(past, got, gates, gain)
        x = ops.leave(
            x, both, named.get("to_output_gate"), leaf.get(at + "to_output_gate.bias"), leaf[at + "to_output.weight"],
            leaf[block + "up.weight"],
        )  # fmt: skip
        if scores is None or not self.taught:
            return x, LayerRead(None if scores is None else scores.scores, None, routed, visible, weight)
        return x, LayerRead(scores.scores, scores.bias, routed, visible, weight, scores.inner_loss)

    def _entries(
        self, number: int, kind: LayerKind, rows: Rows, decisions: Decisions, ops: Ops, scores: LayerScores | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Which kept rows each row may read, [S B, N, T] bool, and what was asked to be kept, [S, B, T] bool."""
        if not kind.keeps:
            return None, None
        S, T = self.S, self.T
        routable = rows.heard[:, :, :T] > 0  # [S, B, T]
        routable = routable.expand(S, -1, -1)
        left = self.frame.left[kind.window]  # [N, T]
        if kind.keeps_rows is not None:
            routed = routable | rows.tags  # [S, B, T]
            seen = left & (self.frame.age < kind.window + kind.keeps_rows)  # [N, T]
            visible = routed.flatten(0, 1)[:, None] & seen
        elif decisions.warm:
            routed = routable
            visible = routed.flatten(0, 1)[:, None] & left
        else:
            routed, rank = self._routed(number, routable, rows, decisions, scores)
            visible = self._survivors(routed, rank, decisions, kind, ops)
        if decisions.drop is not None:
            hidden = (
                decisions.drop.expand(S, -1, -1).flatten(0, 1)[:, None] & self.frame.queried[:, None]
            )  # [S B, N, T]
            visible = visible & ~hidden
        return visible, routed

    def _routed(
        self, number: int, routable: torch.Tensor, rows: Rows, decisions: Decisions, scores: LayerScores | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows asked to be kept, [S, B, T] bool, and what eviction compares (None: their age)."""
        router = self.config.router
        if decisions.given is not None:
            return decisions.given[number] & routable, None
        if router == "oracle":
            return rows.crit & routable, None
        if router in ("random", "stride", "recency"):
            return self._scheduled(number, routable, decisions.share), None
        if router == "tags":
            return (rows.tags | torch.zeros_like(routable)), None
        assert scores is not None and scores.scores is not None
        table = self.tables[number][:, 0]  # [S, A]
        threshold = (table * decisions.nodes).sum(-1) + decisions.beyond  # [S]
        routed = routable & (scores.scores >= threshold[:, None, None])  # [S, B, T]
        if decisions.explore is not None:
            routed = routed | ((decisions.explore[number] < EXPLORE_SHARE) & routable)
        return routed, scores.scores if self.config.eviction == "lowest" else None

    def _scheduled(self, number: int, routable: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """Rows that a control without a list keeps, [S, B, T] bool; chance is counted by place, as in the layer."""
        B, T = routable.shape[1:]
        if self.config.router == "recency":
            return routable
        if self.config.router == "stride":
            place = self.frame.order.double()
            passed = torch.floor((place + 1) * share.double()[:, None] + 5e-7)
            before = torch.floor(place * share.double()[:, None] + 5e-7)
            return routable & (passed > before)[:, None]
        if (number, B, T) not in self._chance:
            position = self.frame.order.double().expand(B, -1)
            key = torch.arange(B, device=self.device)
            self._chance[number, B, T] = counted_uniform(0, number, key, position, 1)[..., 0]  # [B, T]
        return routable & (self._chance[number, B, T] >= (1.0 - share.double())[:, None, None])

    def _survivors(
        self, routed: torch.Tensor, rank: torch.Tensor | None, decisions: Decisions, kind: LayerKind, ops: Ops
    ) -> torch.Tensor:
        """Entries that each row may read under the cap, [S B, N, T] bool.

        Entries that are dropped before the queries leave room to what comes after.
        """
        S, B, T = routed.shape
        order = self.frame.order.expand(S, B, T)  # [S, B, T]
        if rank is not None:
            # of equal ones the newer stands above
            ascending = whole_numbers(rank).argsort(dim=-1, stable=True)
            order = torch.empty_like(rank).scatter(-1, ascending, order.to(rank.dtype))
        order = torch.where(routed, order, -1.0).flatten(0, 1)  # [S B, T]
        cap, left = decisions.cap[:, None].expand(S, B).flatten(), self.frame.left[kind.window]
        there = ops.survivors(order, cap, self.frame.left_sum[kind.window], left)
        if decisions.drop is None:
            return there
        gone = decisions.drop.expand(S, B, T).flatten(0, 1)  # [S B, T]
        # what had left the list before the queries does not come back, whatever room there is
        stays = (there[:, T - 1] | ~left[T - 1]) & ~gone  # [S B, T]
        later = ops.survivors(torch.where(stays, order, -1.0), cap, self.frame.left_sum[kind.window], left)
        return torch.where(self.frame.queried[:, None], later, there)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, self.leaves[name + ".weight"], self.leaves[name + ".bias"])

    # --- tables and weights

    @torch.no_grad()
    def follow(self, reading: StackedReading, rate: torch.Tensor | float) -> None:
        """Move the threshold tables towards the quantiles of a batch's scores."""
        for table, layer in zip(self.tables, reading.layers, strict=True):
            if layer.scores is not None and table.shape[1]:
                table[:, 0].lerp_(self.quantiles(layer.scores), rate)

    def quantiles(self, scores: torch.Tensor) -> torch.Tensor:
        """Of each network's scores at the shares of a table, [S, B, T] -> [S, A]; ``torch.quantile`` without a wait."""
        ordered = scores.flatten(1).sort(dim=1).values  # [S, n]
        place = self.levels * (ordered.shape[1] - 1)  # [A]
        low = place.floor()
        below, above = ordered[:, low.long()], ordered[:, place.ceil().long()]  # 2 x [S, A]
        return torch.lerp(below, above, (place - low).expand_as(below))

    @torch.no_grad()
    def export(self) -> list[ProbeNet]:
        """Write weights and tables back to the networks."""
        for number, net in enumerate(self.nets):
            own = dict(net.named_parameters())
            for name, (leaf, place) in sources(net).items():
                whole = self.leaves[leaf][number]
                own[name].copy_(whole[place].reshape(own[name].shape))
            for table, layer in zip(self.tables, net.layers, strict=True):
                layer.thresholds.values.copy_(table[number])
        return self.nets
