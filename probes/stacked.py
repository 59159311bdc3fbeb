"""Many tier-1 networks of one shape as one: every parameter has a leading axis of networks.

The networks are ``ProbeNet``: their weights come from it and go back to it, and what is computed is what its layers
compute for one channel, one head and an empty memory. Context and query rows are read in one pass, so that a step of
training is some hundred operations instead of thousands. Tests hold this form against the layers, value and gradient.

S networks · B sequences · N rows (context and queries) · T context rows · I inputs · D width · E memory width
C values of a row · A shares of a threshold table · Q queries
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from hamts.nn.budget import SHARES
from hamts.nn.controls import counted_uniform
from hamts.nn.eviction import whole_numbers
from hamts.nn.ham import CONV_WIDTH
from hamts.nn.heads import ROTARY_LONGEST_PATCHES, ROTARY_SHARE
from hamts.nn.inner import INNER_LEVELS
from hamts.ops.gated_delta import gated_delta
from probes.models import EXPLORE_SHARE, ProbeNet
from probes.runner_plan import STACKED_MODELS, STACKED_ROUTERS
from probes.stacked_data import Decisions, Rows
from probes.stacked_parts import LayerKind, sources, stacked_parameters
from probes.stacked_scores import LayerScores, error_weights, layer_scores

__all__ = ["LayerRead", "StackedNet", "StackedReading", "can_stack"]

# rows of a chunk of the recurrence: few long chunks cost fewer launches than many short ones
CHUNK_ROWS = 80


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


class StackedNet:
    """Networks of one configuration and size side by side; ``export`` writes back to them."""

    def __init__(self, nets: Sequence[ProbeNet], *, context_rows: int, rows: int, device: str | torch.device) -> None:
        first = nets[0]
        if not can_stack(first):
            raise ValueError(f"No stacked form of {first.config}. Train its networks one by one.")
        self.nets, self.config, self.device = list(nets), first.config, torch.device(device)
        self.S, self.T, self.N, self.channels = len(nets), context_rows, rows, first.channels
        self.flat, self.leaves = stacked_parameters(self.nets, self.device)
        self.kind = [LayerKind.of(layer) for layer in first.layers]
        self.window = max(kind.window for kind in self.kind)
        self.tables = [
            torch.stack([net.layers[n].thresholds.values.to(self.device) for net in self.nets])
            for n in range(len(first.layers))
        ]  # L of [S, 1, A], or of none
        self._constants()

    def _constants(self) -> None:
        """Masks, angles and weights that no batch changes."""
        N, T, device = self.N, self.T, self.device
        row = torch.arange(N, device=device)
        age = row[:, None] - row[None]  # [N, N]
        self.band = {w: torch.where((age >= 0) & (age < w), 0.0, -torch.inf) for w in {k.window for k in self.kind}}
        # rows that have left the window when row n is read
        self.left = {w: age[:, :T] >= w for w in self.band}  # [N, T]
        self.age = age[:, :T]
        half = torch.float16 if device.type == "cuda" else torch.float32
        self.left_sum = {w: left.to(half) for w, left in self.left.items()}
        self.order = torch.arange(T, device=device, dtype=torch.float32)  # [T]
        self.queried = row >= T  # [N]
        self.error_weights = error_weights(T, device)  # [T, T]
        pairs = int(self.config.memory_width * ROTARY_SHARE) // 2
        rates = torch.logspace(0, -math.log2(ROTARY_LONGEST_PATCHES / 4), pairs, base=2.0, dtype=torch.float64)
        angle = row.double()[:, None] * (rates * (2 * math.pi / 4)).to(device)  # [N, pairs]
        self.cosine, self.sine, self.pairs = angle.cos().float(), angle.sin().float(), pairs
        levels = torch.tensor([1.0 - share for share in SHARES], dtype=torch.float32)
        self.levels = levels.to(device)  # [A]
        self.inner_levels = torch.tensor(INNER_LEVELS, device=device)
        self._chance: dict[tuple[int, int], torch.Tensor] = {}

    # --- reading

    def read(
        self, rows: Rows, decisions: Decisions, *, with_scores: bool = False, training: bool = False
    ) -> StackedReading:
        """Read all rows on an empty memory.

        Args:
            with_scores: also the scores that this network's decisions do not need.
            training: with the loss of the inner head.
        """
        inputs = rows.inputs.expand(self.S, -1, -1, -1)
        S, B, N, _ = inputs.shape
        x = F.silu(self.linear(inputs, "embed.0"))
        x = self.linear(x, "embed.2")  # [S, B, N, D]
        found = []
        for number, kind in enumerate(self.kind):
            at = f"blocks.{number}."
            below = self.linear(self._norm(x, at + "before_memory.weight"), at + "down")  # [S, B, N, E]
            output, layer = self._layer(below, number, kind, rows, decisions, with_scores, training)
            x = x + self._product(output, at + "up.weight")
            gate, content = self.linear(self._norm(x, at + "before_mlp.weight"), at + "grow").chunk(2, -1)
            x = x + self.linear(F.silu(gate) * content, at + "shrink")
            found.append(layer)
        return StackedReading(self._norm(x, "final_norm.weight"), found)

    def answers(self, reading: StackedReading, rows: Rows) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Answers, [S, B, Q, Y], and of the auxiliary target."""
        index = rows.q_index.expand(self.S, -1, -1)[..., None].expand(-1, -1, -1, reading.hidden.shape[-1])
        asked = reading.hidden.gather(2, index)  # [S, B, Q, D]
        auxiliary = self.linear(asked, "auxiliary") if "auxiliary.weight" in self.leaves else None
        return self.linear(asked, "answer"), auxiliary

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
        with_scores: bool,
        training: bool,
    ) -> tuple[torch.Tensor, LayerRead]:
        S, B, N, E = x.shape
        at, D = f"blocks.{number}.memory.", E
        parts = self._product(x, at + "project").split(kind.widths, -1)
        named = dict(zip(kind.projected, parts, strict=True))
        mixed = named["to_memory"]  # [S, B, N, units + 2 E], or 3 E where both branches share keys and values
        keys = self._turned(mixed[..., -2 * D : -D], at + kind.exact + "key_norm.gain")
        queries = self._turned(named[kind.exact + "to_query"], at + kind.exact + "query_norm.gain") * D**-0.5
        values = mixed[..., -D:].reshape(S * B, N, D)
        past = gates = scores = None
        if kind.recurrent:
            gates = named["to_gates"] + self._bias(at + "to_gates.bias")  # [S, B, N, 4]
            past, scores = self._recurrent(x, mixed, gates, number, kind, rows, with_scores, training)
        visible, routed = self._entries(number, kind, rows, decisions, scores)
        read, weight = self._read(queries, keys, values, kind, number, visible, scores)
        both = self._headed(read.reshape(S, B, N, D), at + "exact_norm.gain")
        if past is not None and gates is not None:
            both = gates[..., 2, None].sigmoid() * past + gates[..., 3, None].sigmoid() * both
        if "to_output_gate" in named:
            both = both * (named["to_output_gate"] + self._bias(at + "to_output_gate.bias")).sigmoid()
        output = self._product(both, at + "to_output.weight")
        layer = LayerRead(
            None if scores is None else scores.scores, None if scores is None else scores.bias, routed, visible, weight,
            None if scores is None else scores.inner_loss,
        )  # fmt: skip
        return output, layer

    def _recurrent(
        self,
        x: torch.Tensor,
        mixed: torch.Tensor,
        gates: torch.Tensor,
        number: int,
        kind: LayerKind,
        rows: Rows,
        with_scores: bool,
        training: bool,
    ) -> tuple[torch.Tensor, LayerScores | None]:
        """What the state says, [S, B, N, E], and the scores of the router."""
        S, B, N, _ = x.shape
        at, K = f"blocks.{number}.memory.", kind.state_width
        own = at + kind.branch
        units = mixed[..., : 3 * K]  # [S, B, N, 3 K]
        taps = self.leaves[own + "conv"]  # [S, 3 K, taps]
        padded = F.pad(units, (0, 0, CONV_WIDTH - 1, 0))  # [S, B, taps - 1 + N, 3 K]
        convolved = padded[:, :, :N] * taps[:, None, None, :, 0]
        for tap in range(1, CONV_WIDTH):
            convolved = torch.addcmul(convolved, padded[:, :, tap : tap + N], taps[:, None, None, :, tap])
        q, k, v = F.silu(convolved).split(K, -1)  # 3 x [S, B, N, K]
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        heard = rows.heard.expand(S, -1, -1)  # [S, B, N]
        beta = gates[..., 1].sigmoid() * heard  # [S, B, N]
        elapsed = (~rows.asks).to(x.dtype)  # [S, B, N]
        log_decay = -F.softplus(gates[..., 0] + self.leaves[own + "decay_rate"][:, None]) * elapsed  # [S, B, N]
        result = gated_delta(
            q.reshape(S * B, N, 1, K), k.reshape(S * B, N, 1, K), v.reshape(S * B, N, 1, K),
            log_decay=log_decay.reshape(S * B, N, 1), beta=beta.reshape(S * B, N, 1), chunk=CHUNK_ROWS,
        )  # fmt: skip
        past = self._headed(result.output.reshape(S, B, N, K), at + "recurrent_norm.gain")  # [S, B, N, K]
        if at + "narrow.weight" in self.leaves:
            past = self._product(past, at + "narrow.weight")  # [S, B, N, E]
        if self.config.model != "ham":
            return past, None
        grid = (S, B, N, K)
        scores = layer_scores(
            self, x, number, rows, error=result.error.reshape(grid), prediction=result.prediction.reshape(grid),
            output=result.output.reshape(grid), values=v, beta=beta, with_scores=with_scores, training=training,
        )  # fmt: skip
        return past, scores

    def _entries(
        self, number: int, kind: LayerKind, rows: Rows, decisions: Decisions, scores: LayerScores | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Which kept rows each row may read, [S B, N, T] bool, and what was asked to be kept, [S, B, T] bool."""
        if not kind.keeps:
            return None, None
        S, T = self.S, self.T
        routable = rows.heard[:, :, :T] > 0  # [S, B, T]
        routable = routable.expand(S, -1, -1)
        left = self.left[kind.window]  # [N, T]
        if kind.keeps_rows is not None:
            routed = routable | rows.tags  # [S, B, T]
            seen = left & (self.age < kind.window + kind.keeps_rows)  # [N, T]
            visible = routed.flatten(0, 1)[:, None] & seen
        else:
            routed, rank = self._routed(number, routable, rows, decisions, scores)
            cap = decisions.cap
            if decisions.warm is not None:
                routed = torch.where(decisions.warm[:, None, None], routable, routed)
                cap = torch.where(decisions.warm, float(T), cap)
            visible = self._survivors(routed, rank, cap, kind, decisions.drop)
        if decisions.drop is not None:
            hidden = decisions.drop.expand(S, -1, -1).flatten(0, 1)[:, None] & self.queried[:, None]  # [S B, N, T]
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
            place = self.order.double()
            passed = torch.floor((place + 1) * share.double()[:, None] + 5e-7)
            before = torch.floor(place * share.double()[:, None] + 5e-7)
            return routable & (passed > before)[:, None]
        if (number, B) not in self._chance:
            position = self.order.double().expand(B, -1)
            key = torch.arange(B, device=self.device)
            self._chance[number, B] = counted_uniform(0, number, key, position, 1)[..., 0]  # [B, T]
        return routable & (self._chance[number, B] >= (1.0 - share.double())[:, None, None])

    def _survivors(
        self,
        routed: torch.Tensor,
        rank: torch.Tensor | None,
        cap: torch.Tensor,
        kind: LayerKind,
        drop: torch.Tensor | None,
    ) -> torch.Tensor:
        """Entries still there when each row is read: fewer than ``cap`` that stand above them have appeared.

        Entries that are dropped before the queries leave room to what comes after.
        """
        S, B, T = routed.shape
        order = self.order.expand(S, B, T)  # [S, B, T]
        if rank is not None:
            # of equal ones the newer stands above
            ascending = whole_numbers(rank).argsort(dim=-1, stable=True)
            order = torch.empty_like(rank).scatter(-1, ascending, order.to(rank.dtype))
        order = torch.where(routed, order, -1.0).flatten(0, 1)  # [S B, T]
        left = self.left_sum[kind.window]  # [N, T]
        above = (order[:, :, None] > order[:, None, :]).to(left.dtype)  # [S B, T others, T]
        count = torch.matmul(left, above)  # [S B, N, T]
        if drop is not None:
            gone = drop.expand(S, -1, -1).flatten(0, 1)[:, None].to(above.dtype) @ above  # [S B, 1, T]
            count = count - gone * self.queried[:, None]
        count = count.unflatten(0, (S, B))  # [S, B, N, T]
        there = (count < cap[:, None, None, None]).flatten(0, 1)  # [S B, N, T]
        return there & self.left[kind.window] & routed.flatten(0, 1)[:, None]

    def _read(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        kind: LayerKind,
        number: int,
        visible: torch.Tensor | None,
        scores: LayerScores | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One softmax over window and scratchpad, [S B, N, E] each."""
        if kind.window == 1 and visible is None:
            # a row alone sees itself
            return values, None
        S, band = self.S, self.band[kind.window]  # [N, N]
        if visible is not None:
            bias = self.leaves[f"blocks.{number}.memory.{kind.exact}scratch_bias"]  # [S, 1]
            bias = bias[:, None].expand(-1, len(queries) // S, self.T)  # [S, B, T]
            if scores is not None and scores.bias is not None:
                bias = bias + scores.bias
            T = self.T
            bars = torch.where(visible, bias.flatten(0, 1)[:, None], band[:, :T])  # [S B, N, T]
            band = torch.cat([bars, band[:, T:].expand(len(bars), -1, -1)], -1)  # [S B, N, N]
        logits = torch.baddbmm(band.expand(len(queries), -1, -1), queries, keys.mT)  # [S B, N, N]
        weight = logits.softmax(-1)
        return weight @ values, weight

    # --- small things

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self._product(x, name + ".weight") + self._bias(name + ".bias")

    def _product(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """A linear map without a constant: x [S, B, N, in].

        Sequence by sequence, so that the gradient of the weights is a sum of products of some hundred rows: one product
        over all rows of a network would keep a GPU waiting for a handful of its processors.
        """
        return x @ self.leaves[name].mT[:, None]

    def _bias(self, name: str) -> torch.Tensor:
        return self.leaves[name][:, None, None]

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:]) * self._bias(name)

    def _headed(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """``HeadNorm`` of the one head."""
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * self.leaves[name][:, None]

    def _turned(self, x: torch.Tensor, gain: str) -> torch.Tensor:
        """Normed and turned by age, [S B, N, E]."""
        x = self._headed(x, gain).flatten(0, 1)
        first, second, rest = x.split([self.pairs, self.pairs, x.shape[-1] - 2 * self.pairs], -1)
        cosine, sine = self.cosine, self.sine
        return torch.cat([first * cosine - second * sine, first * sine + second * cosine, rest], -1)

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
