"""The network as the rest of hamts uses it: raw chunks in, quantiles in the user's units out, the memory passed along.

Reading the past and forecasting are the same pass: a forecast goes on over tokens whose targets are hidden, on a copy
of the memory. Nothing here knows of training.

B items · C channels · G targets · N patches · P steps in a patch · Q quantiles · L half-lives
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from hamts.config import MemoryConfig, ModelConfig
from hamts.data.constants import chosen, constant, sent
from hamts.data.panel import KNOWN_AHEAD
from hamts.data.patches import Chunk
from hamts.data.scale import CausalScale, ScaleState, ScaleStats
from hamts.nn.backbone import Backbone, ChannelSpec
from hamts.nn.budget import check_room, entry_caps
from hamts.nn.decide import prepared
from hamts.nn.ham import LayerTrace
from hamts.nn.head import QuantileHead
from hamts.nn.scratchpad import LayerMemory
from hamts.nn.tags import tag_rules
from hamts.nn.tokens import Policy, Tokens, map_tensors
from hamts.ops.kernels import TORCH, Kernels

__all__ = ["HAMNetwork", "Reading", "StreamMemory"]

LEVEL_CLAMP = 5.0
VALUE_CLAMP = 30.0


@dataclass(frozen=True)
class StreamMemory:
    """All that is remembered of B items: a plain tree of tensors."""

    layers: list[LayerMemory]
    scale: ScaleState

    def select(self, rows: torch.Tensor) -> StreamMemory:
        """Memories of some items, copied; rows may repeat."""
        there = sent(rows, self.scale.sums.device)  # [B]
        return map_tensors(self, lambda tensor: tensor.index_select(0, there))

    def side_by_side(self) -> StreamMemory:
        """The same memories, entries out of the pool that they share: what is read of them writes into no pool."""
        layers = [layer.side_by_side() if isinstance(layer, LayerMemory) else layer for layer in self.layers]
        return replace(self, layers=layers)

    def detach(self) -> StreamMemory:
        return map_tensors(self, lambda tensor: tensor.detach())


@dataclass(frozen=True)
class Reading:
    """Result of reading one chunk."""

    quantiles: torch.Tensor  # [B, G, N, P, Q] scaled
    mean: torch.Tensor  # [B, G, N] float64: what unscales them
    scale: torch.Tensor  # [B, G, N] float64
    bounds: torch.Tensor  # [B, G, N, 2] float64: what quantiles are kept within
    memory: StreamMemory
    traces: list[LayerTrace]
    heard: torch.Tensor  # [B, C, N] share of each token that was observed; 0 = nothing to keep

    def unscaled(self) -> torch.Tensor:
        """Quantiles in the user's units, [B, G, N, P, Q] float64."""
        values = self.mean[..., None, None] + self.scale[..., None, None] * self.quantiles.double()
        # what lies on a bound lies on it to the last digit, whatever the scaled value was rounded to
        low, high = self.bounds[..., None, None, :].unbind(-1)  # 2 x [B, G, N, 1, 1]
        scaled = scaled_bounds(self.bounds, self.mean, self.scale, self.quantiles.dtype)
        values = torch.where(self.quantiles <= scaled[..., 0], low, values)  # [B, G, N, P, Q]
        return torch.where(self.quantiles >= scaled[..., 1], high, values).clamp(low, high)


class HAMNetwork(nn.Module):
    """Normaliser, backbone and head under one roof, with the facts about the columns they were built for."""

    unit: torch.Tensor
    adaptive: torch.Tensor
    static_mean: torch.Tensor
    static_scale: torch.Tensor
    calendar_used: torch.Tensor
    cross_targets: torch.Tensor

    def __init__(self, config: ModelConfig, memory: MemoryConfig, spec: ChannelSpec) -> None:
        super().__init__()
        self.config, self.memory_config, self.spec = config, memory, spec
        self.kernels: Kernels = TORCH
        self._entry_bytes: dict[torch.dtype, int] = {}
        self.backbone = Backbone(config, spec, budget_bytes=memory.budget_bytes)
        self.head = QuantileHead(config.width, config.patch_steps, config.quantiles)
        C = len(spec.roles)
        numeric = [role != "event" and n == 0 for role, n in zip(spec.roles, spec.levels, strict=True)]
        self.register_buffer("unit", torch.ones(C, dtype=torch.float64))  # [C]
        self.register_buffer("adaptive", torch.tensor(numeric))  # [C]
        self.register_buffer("static_mean", torch.zeros(spec.static_numeric))  # [E]
        self.register_buffer("static_scale", torch.ones(spec.static_numeric))  # [E]
        # 0 for phases that the training rows cover too rarely to tell a season from a date
        self.register_buffer("calendar_used", torch.ones(spec.calendar_features))  # [F]
        uses_tags = "tags" in config.router_names
        self.tags = tag_rules(memory, spec.roles, spec.names, config.window_patches) if uses_tags else None
        # whether targets read one another: decided on validation data
        self.register_buffer("cross_targets", torch.tensor(True))  # []
        if config.mixer == "ham":
            check_room(memory.budget_bytes, self.entry_bytes() * config.layers * config.entries_per_token)

    def use_kernels(self, kernels: Kernels) -> None:
        """Run every layer on these; ``resolve_kernels`` decided them once, for the device the network is on."""
        self.kernels = kernels
        for layer in self.backbone.layers():
            layer.kernels = kernels

    @property
    def scaler(self) -> CausalScale:
        return CausalScale(self.config.half_life_steps, self.unit, self.adaptive, tuple(self.spec.targets))

    def empty_memory(self, items: int) -> StreamMemory:
        """The memory of items of which nothing was read."""
        like = self.head.project.weight
        layers = self.backbone.empty_memory(items, len(self.spec.roles), like)
        if self.config.mixer == "ham":
            tracked, types = self.memory_config.threshold != "fixed", 0 if self.tags is None else len(self.tags.names)
            scores = len(self.backbone.layers()[0].router.names)
            layers = [prepared(layer, tracked=tracked, types=types, scores=scores) for layer in layers]
        return StreamMemory(layers, self.scaler.empty(items))

    def entry_bytes(self) -> int:
        """Bytes of one scratchpad entry, as its tensors are stored."""
        kind = self.head.project.weight.dtype
        if kind not in self._entry_bytes:
            self._entry_bytes[kind] = self.empty_memory(1).layers[0].scratchpad.bytes_per_entry()
        return self._entry_bytes[kind]

    def readable(self, cross: torch.Tensor) -> torch.Tensor:
        """Which channel may read which: covariates always, other targets where ``cross`` [B] says so. [B, C, C]."""
        target = constant([role == "target" for role in self.spec.roles], torch.bool, cross.device)  # [C]
        own = torch.eye(len(target), dtype=torch.bool, device=cross.device)  # [C, C]
        if self.config.cross_reading == "never":
            return own.expand(len(cross), -1, -1)
        return (~target | cross[:, None, None] | own).expand(-1, len(target), -1)

    def policy(
        self, share: torch.Tensor, *, cross: torch.Tensor | None = None, capped: bool = True, use_tags: bool = True
    ) -> Policy:
        """What the scratchpads may do, for the share asked of each item, [B]."""
        if cross is None:
            cross = self.cross_targets.expand(len(share))
        share, cross = share.to(self.unit.device), cross.to(self.unit.device)
        caps: tuple[int | None, int | None] = (None, None)
        # a rival has the size it was built with
        if capped and self.config.mixer == "ham":
            whole = self.config.entries_per_token
            tokens = entry_caps(
                budget_bytes=self.memory_config.budget_bytes,
                bytes_per_entry=self.entry_bytes() * whole,
                layers=self.config.layers,
                must_keep_share=self.memory_config.must_keep_share,
            )
            caps = (tokens[0] * whole, tokens[1] * whole)
        return Policy(
            share=share, readable=self.readable(cross), cap_kept=caps[0], cap_must=caps[1], use_tags=use_tags,
            threshold=self.memory_config.threshold, eviction=self.memory_config.eviction, tags=self.tags,
            entries_per_token=self.config.entries_per_token,
        )  # fmt: skip

    def forward(
        self,
        chunk: Chunk,
        memory: StreamMemory,
        policy: Policy | Sequence[Policy],
        *,
        stepwise: bool = False,
        decode: bool = True,
        advance: bool = True,
    ) -> Reading:
        """Read one chunk.

        Args:
            chunk: complete patches of the past, or a horizon.
            policy: one for all layers, or one per layer.
            decode: whether quantiles are wanted; reading the past only moves the memory.
            advance: whether the memory after the chunk is wanted; a forecast leaves it as it was.
        """
        device = self.head.project.weight.device
        chunk = map_tensors(chunk, lambda tensor: sent(tensor, device))
        stats, scale_after = self.scaler.advance(chunk.values, chunk.observed, memory.scale)
        tokens = self.tokens(chunk, stats)
        policies = [policy] * self.config.layers if isinstance(policy, Policy) else list(policy)
        result = self.backbone(tokens, memory.layers, policies, stepwise=stepwise, advance=advance)
        targets = self.spec.targets
        first = slice(None) if decode else slice(0, 0)
        hidden = chosen(result.hidden[:, :, first], targets)  # [B, G, N, D], or no N
        mean, scale = (chosen(x[:, :, first, 0], targets) for x in (stats.mean, stats.scale))  # 2 x [B, G, N]
        bounds = stats.bounds[:, :, first]  # [B, G, N, 2]
        return Reading(
            quantiles=bounded(self.head(hidden), bounds, mean, scale),
            mean=mean,
            scale=scale,
            bounds=bounds,
            memory=StreamMemory(result.memory, scale_after) if advance else memory,
            traces=result.traces,
            heard=tokens.heard,
        )

    def tokens(self, chunk: Chunk, stats: ScaleStats) -> Tokens:
        """Scale a chunk and say what may and must be kept of it."""
        kind = self.head.project.weight.dtype
        mean, scale = stats.mean[..., :1], stats.scale[..., :1]  # 2 x [B, C, N, 1]
        values = ((chunk.values - mean) / scale).clamp(-VALUE_CLAMP, VALUE_CLAMP)  # [B, C, N, P]
        codes = constant([n > 0 for n in self.spec.levels], torch.bool, values.device)[:, None, None]  # [C, 1, 1]
        values = torch.where(codes, chunk.values, values)  # [B, C, N, P]
        ahead_values, ahead_observed = self._ahead(chunk, mean, scale)
        event = constant([role == "event" for role in self.spec.roles], torch.bool, values.device)[:, None]  # [C, 1]
        target = constant([role == "target" for role in self.spec.roles], torch.bool, values.device)[:, None]
        share = chunk.observed.to(kind).mean(-1)  # [B, C, N]
        tagged = chunk.tags.any(-1)  # [B, C, N]
        heard = torch.where(event | tagged, tagged.to(kind), share)  # [B, C, N]
        moment = tagged.any(1, keepdim=True)  # [B, 1, N]
        must = chunk.complete & (tagged | (target & moment & (share > 0)))  # [B, C, N]
        marks = torch.stack(
            [stats.offset / self.unit[:, None], torch.log(stats.scale[..., 0] / self.unit[:, None])], -1
        )  # [B, C, N, 2]
        return Tokens(
            values=torch.where(chunk.observed, values, 0.0).to(kind),
            observed=chunk.observed,
            tags=chunk.tags,
            event_offset=chunk.event_offset.to(kind),
            ahead_values=ahead_values.to(kind),
            ahead_observed=ahead_observed,
            calendar=(chunk.calendar * self.calendar_used).to(kind),
            level=self._level(stats).to(kind),
            marks=torch.cat([marks, torch.ones_like(marks[..., :1])], -1).to(kind),
            heard=heard,
            present=chunk.present,
            routable=chunk.complete & (heard >= 0.5) & ~event,
            must_keep=must,
            position=chunk.position,
            elapsed=chunk.elapsed.to(kind),
            static_values=((chunk.static_values - self.static_mean) / self.static_scale).to(kind),
            static_codes=chunk.static_codes,
            markable=chunk.complete & target & (share > 0),
        )

    def _level(self, stats: ScaleStats) -> torch.Tensor:
        """Where level and scale stand against slower statistics, and where bounds are: [B, C, N, 2 L + 2]."""
        slow_mean, slow_scale = stats.mean[..., 1:], stats.scale[..., 1:]  # 2 x [B, C, N, L - 1]
        level = (stats.mean[..., :1] - slow_mean) / slow_scale  # [B, C, N, L - 1]
        spread = torch.log(stats.scale[..., :1] / slow_scale)  # [B, C, N, L - 1]
        where = torch.zeros(*level.shape[:-1], 4, dtype=level.dtype, device=level.device)  # [B, C, N, 4]
        targets = self.spec.targets
        mean, scale = (chosen(x[..., :1], targets) for x in (stats.mean, stats.scale))  # 2 x [B, G, N, 1]
        bounds = (stats.bounds - mean) / scale  # [B, G, N, 2]
        there = stats.bound_share > 0  # [B, G, N, 2]
        known = torch.cat([torch.where(there, bounds, 0.0), stats.bound_share], -1)  # [B, G, N, 4]
        where = where.index_copy(1, constant(targets, torch.int64, where.device), known)  # [B, C, N, 4]
        return torch.cat([level, spread, where], -1).clamp(-LEVEL_CLAMP, LEVEL_CLAMP)

    def _ahead(self, chunk: Chunk, mean: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The next patches of known-ahead channels, for tokens with a step to forecast only: 2 x [B, C, N, L P].

        Tokens of the past carry none: a stream may not know them yet when it commits a token, and a stream and one
        pass over the whole must agree.
        """
        B, C, N, P = chunk.values.shape
        L = self.config.lookahead_patches
        values = chunk.values.new_zeros(B, C, N, L * P)  # [B, C, N, L P]
        observed = torch.zeros(B, C, N, L * P, dtype=torch.bool, device=values.device)  # [B, C, N, L P]
        if chunk.horizon is None or L == 0:
            return values, observed
        known = constant([role in KNOWN_AHEAD for role in self.spec.roles], torch.bool, values.device)
        known = (known & self.adaptive)[:, None, None]  # [C, 1, 1]
        for ahead in range(1, min(L, N - 1) + 1):
            place = slice((ahead - 1) * P, ahead * P)
            scaled = (chunk.values[:, :, ahead:] - mean[:, :, :-ahead]) / scale[:, :, :-ahead]  # [B, C, N - a, P]
            asked = chunk.horizon[:, None, :-ahead].any(-1, keepdim=True)  # [B, 1, N - a, 1]
            there = chunk.observed[:, :, ahead:] & known & asked  # [B, C, N - a, P]
            values[:, :, :-ahead, place] = torch.where(there, scaled.clamp(-VALUE_CLAMP, VALUE_CLAMP), 0.0)
            observed[:, :, :-ahead, place] = there
        return values, observed


def bounded(quantiles: torch.Tensor, bounds: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Quantiles kept within each target's bounds: censored quantile regression (Powell 1986).

    Scaled quantiles, [B, G, N, P, Q], stay what they are inside; a level that falls beyond a bound lies on it.
    """
    low, high = scaled_bounds(bounds, mean, scale, quantiles.dtype).unbind(-1)  # 2 x [B, G, N, 1, 1]
    return torch.minimum(torch.maximum(quantiles, low), high)


def scaled_bounds(bounds: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Bounds [B, G, N, 2] as the network sees them, [B, G, N, 1, 1, 2]."""
    return ((bounds - mean[..., None]) / scale[..., None]).to(kind)[..., None, None, :]
