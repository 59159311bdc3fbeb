"""Tokens in, hidden vectors out: embedding, then blocks of a HAM layer, or a rival of it, and a gated MLP.

B items · C channels · N patches · P steps in a patch · D width · L look-ahead patches
F calendar features · G level features
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from hamts.config import ModelConfig
from hamts.data.constants import constant
from hamts.nn.checkpointing import run_checkpointed
from hamts.nn.ham import HAMLayer, LayerTrace
from hamts.nn.mixers import layer_makers
from hamts.nn.scratchpad import LayerMemory
from hamts.nn.tokens import Policy, Tokens

__all__ = ["Backbone", "ChannelSpec", "Hidden", "ROLES"]

ROLES = ("target", "past", "future", "event", "action")
LEVEL_EMBEDDING = 8


@dataclass(frozen=True)
class ChannelSpec:
    """What the network must know of the columns: a role and a number of category levels for every channel."""

    roles: tuple[str, ...]
    levels: tuple[int, ...]  # 0 for numeric and boolean channels
    calendar_features: int
    static_numeric: int = 0
    static_levels: tuple[int, ...] = ()
    names: tuple[str, ...] = ()  # of the channels; typed tags are called by them

    @property
    def targets(self) -> list[int]:
        return [i for i, role in enumerate(self.roles) if role == "target"]


@dataclass(frozen=True)
class Hidden:
    """Result of a pass through the network."""

    hidden: torch.Tensor  # [B, C, N, D]
    memory: list[LayerMemory]
    traces: list[LayerTrace]


class Embedding(nn.Module):
    """One token's numbers to one vector: a linear map per role, then a small MLP that knows the channel."""

    def __init__(self, config: ModelConfig, spec: ChannelSpec) -> None:
        super().__init__()
        D, P = config.width, config.patch_steps
        self.spec = spec
        features = 4 * P + 2 * P * config.lookahead_patches + spec.calendar_features
        features += 2 * len(config.half_life_steps) + 3
        self.per_role = nn.Parameter(torch.randn(len(ROLES), features, D) * features**-0.5)  # [roles, I, D]
        self.channel = nn.Parameter(torch.randn(len(spec.roles), D) * 0.2)  # [C, D]
        self.register_buffer("role", torch.tensor([ROLES.index(r) for r in spec.roles]), persistent=False)  # [C]
        self.grow, self.shrink = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        widest = max(spec.levels, default=0)
        self.category = nn.Embedding(widest + 1, LEVEL_EMBEDDING) if widest else None
        self.from_category = nn.Linear(P * LEVEL_EMBEDDING, D, bias=False) if widest else None
        happening = torch.tensor([role in ("event", "action") for role in spec.roles])  # [C]
        self.register_buffer("happening", happening, persistent=False)
        self.from_moment = nn.Linear(D, D, bias=False) if config.event_context and happening.any() else None
        self.from_static = nn.Linear(spec.static_numeric, D, bias=False) if spec.static_numeric else None
        self.static_category = nn.ModuleList(nn.Embedding(n + 1, D) for n in spec.static_levels)

    role: torch.Tensor
    happening: torch.Tensor

    def forward(self, tokens: Tokens) -> torch.Tensor:
        """[B, C, N, ...] -> [B, C, N, D]."""
        B, C, N, _ = tokens.values.shape
        kind = tokens.values.dtype
        categorical = constant([n > 0 for n in self.spec.levels], torch.bool, tokens.values.device)[:, None, None]
        values = torch.where(categorical, 0.0, tokens.values)  # [B, C, N, P]
        observed = tokens.observed  # [B, C, N, P]
        sparse = constant([role == "event" for role in self.spec.roles], torch.bool, values.device)[:, None, None]
        if self.from_moment is not None:
            # what happened, whether or not it is known that nothing else did: an event that is asked for while its
            # patch goes on is then like the one that was kept
            observed = observed & (tokens.tags | ~sparse)  # [B, C, N, P]
        features = torch.cat(
            [
                values,
                observed.to(kind),
                tokens.tags.to(kind),
                tokens.event_offset,
                tokens.ahead_values,
                tokens.ahead_observed.to(kind),
                tokens.calendar[:, None].expand(-1, C, -1, -1),
                tokens.level,
                torch.log(tokens.elapsed.clamp_min(1e-3))[:, None, :, None].expand(-1, C, -1, 1),
            ],
            dim=-1,
        )  # [B, C, N, I]
        x = torch.einsum("bcni,cid->bcnd", features, self.per_role[self.role])  # [B, C, N, D]
        x = x + self.channel[:, None]  # [B, C, N, D]
        if self.category is not None and self.from_category is not None:
            codes = torch.where(categorical & observed, tokens.values, 0.0).long()  # [B, C, N, P]
            vectors = self.category(codes.clamp_max(self.category.num_embeddings - 1))  # [B, C, N, P, E]
            vectors = vectors * (categorical & observed)[..., None]  # [B, C, N, P, E]
            # an event is named at a step or two of its patch, others have a level at every step
            weight = torch.where(sparse, vectors.shape[-2] ** 0.5, 1.0)  # [C, 1, 1]
            x = x + weight * self.from_category(vectors.flatten(-2))  # [B, C, N, D]
        if self.from_moment is not None:
            happens = tokens.tags.any(-1) & self.happening[:, None]  # [B, C, N]
            x = x + self.from_moment((x * happens[..., None]).sum(1, keepdim=True))  # [B, C, N, D]
        x = x + self._static(tokens)  # [B, C, N, D]
        return x + self.shrink(F.silu(self.grow(x)))

    def _static(self, tokens: Tokens) -> torch.Tensor:
        """[B, 1, 1, D], or a zero that broadcasts."""
        total = tokens.values.new_zeros(1, 1, 1, 1)
        if self.from_static is not None:
            total = total + self.from_static(tokens.static_values)[:, None, None]
        for column, table in enumerate(self.static_category):
            codes = tokens.static_codes[:, column].clamp_max(self.spec.static_levels[column])  # [B]
            total = total + table(codes)[:, None, None]  # [B, 1, 1, D]
        return total


class Block(nn.Module):
    """Pre-norm HAM layer, or a rival's, and gated MLP, both residual."""

    def __init__(self, config: ModelConfig, make_memory: Callable[[], nn.Module]) -> None:
        super().__init__()
        D, inner = config.width, int(config.width * config.mlp_ratio)
        self.before_memory, self.before_mlp = nn.RMSNorm(D), nn.RMSNorm(D)
        self.memory = make_memory()
        self.grow, self.shrink = nn.Linear(D, 2 * inner), nn.Linear(inner, D)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: torch.Tensor, tokens: Tokens, memory: LayerMemory, policy: Policy, *, stepwise: bool, advance: bool
    ) -> tuple[torch.Tensor, LayerMemory, LayerTrace]:
        result = self.memory(
            self.before_memory(x), tokens=tokens, memory=memory, policy=policy, stepwise=stepwise, advance=advance
        )
        x = x + self.dropout(result.output)  # [B, C, N, D]
        return x + self.dropout(self._fed_forward(x)), result.memory, result.trace

    def _fed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gated MLP, [B, C, N, D] -> [B, C, N, D]."""
        gate, content = self.grow(self.before_mlp(x)).chunk(2, -1)  # 2 x [B, C, N, inner]
        return self.shrink(F.silu(gate) * content)


class Backbone(nn.Module):
    """The network below the head."""

    def __init__(self, config: ModelConfig, spec: ChannelSpec, *, budget_bytes: int) -> None:
        super().__init__()
        self.embedding = Embedding(config, spec)
        makers = layer_makers(config, channels=len(spec.roles), budget_bytes=budget_bytes)
        self.blocks = nn.ModuleList(Block(config, make) for make in makers)
        self.final_norm = nn.RMSNorm(config.width)
        # whether blocks compute their inner tensors again for the gradient instead of keeping them
        self.checkpointing = False

    def empty_memory(self, items: int, channels: int, like: torch.Tensor) -> list[LayerMemory]:
        return [layer.empty_memory(items, channels, like) for layer in self.layers()]

    def layers(self) -> list[HAMLayer]:
        """The memory layers, from the input up; those of a rival answer to the same calls."""
        return [cast(HAMLayer, block.memory) for block in self.blocks]

    def forward(
        self,
        tokens: Tokens,
        memory: list[LayerMemory],
        policies: list[Policy],
        *,
        stepwise: bool = False,
        advance: bool = True,
    ) -> Hidden:
        """Read one chunk; the policies are one per layer."""
        x = self.embedding(tokens)  # [B, C, N, D]
        after, traces = [], []
        for block, layer_memory, policy in zip(self.blocks, memory, policies, strict=True):
            kept = self.checkpointing and torch.is_grad_enabled()
            run = partial(run_checkpointed, block) if kept else block
            x, layer_after, trace = run(x, tokens, layer_memory, policy, stepwise=stepwise, advance=advance)
            after.append(layer_after)
            traces.append(trace)
        return Hidden(self.final_norm(x), after, traces)
