"""Tier 1: small networks of the real layers, with a row of a probe as a token and a head that answers query rows.

Names of models and routers are configuration: what ``hamts.nn`` knows plugs in by its name.

B sequences · N rows of a chunk · I inputs · D width · Q queries · Y numbers in an answer · X of an auxiliary target
L layers · M entries
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hamts.config import MIXERS, ROUTERS, ModelConfig
from hamts.nn.controls import Control
from hamts.nn.ham import HAMLayer
from hamts.nn.mixers import layer_makers
from hamts.nn.scratchpad import Entries
from hamts.nn.tokens import Policy, Tokens
from probes.contract import ProbeBatch

__all__ = ["MODELS", "NetConfig", "ProbeNet", "Reading", "ROUTERS_T1", "kept_rows", "memory_bytes", "recent_rows"]

# names in results, and the mixer each stands for
MODELS = {"ham": "ham", "full": "attention", **{name: name for name in MIXERS if name not in ("ham", "attention")}}
# what decides in a router's place; "shuffled" keeps what the learned router keeps of another sequence
CONTROLS = ("random", "stride", "recency", "oracle", "shuffled")
ROUTERS_T1 = (*ROUTERS, *CONTROLS)
# rivals that have one size, whatever the budget
SIZELESS = ("full", "recurrent", "gdn_gsa", "block_sparse")


@dataclass(frozen=True, kw_only=True)
class NetConfig:
    """Shape of a tier-1 network.

    Attributes:
        model: one of ``MODELS``.
        router: of ``ham``: one of ``ROUTERS_T1``, several joined by "+".
        width, memory_width: of the residual stream, and of the memory layers, which read a projection of it.
        state_width: K and V of a head's recurrent state. A narrow one holds few items (heads x key width of them), so
            that what is kept exactly matters; entries are as wide as the memory layers.
        embed_rows: rows that the embedding sees: a row and those before it, so that what belongs together within a few
            rows (an action and its effect, the rows of a waveform) is one thing to match. The same for all models.
        budget_rows: entries of a layer that rivals are sized by.
        eviction: what leaves a full list kept by score: ``lowest`` or ``fifo``.
        entry_bias: added at first to the logits of entries. A forecaster's begin low, so that they do not drown the
            present; a question's answer lies in entries alone.
    """

    model: str = "ham"
    router: str = "learned"
    width: int = 32
    memory_width: int = 32
    state_width: int = 8
    heads: int = 1
    layers: int = 2
    window_rows: int = 2
    embed_rows: int = 4
    budget_rows: int = 16
    eviction: str = "lowest"
    write_clip: float = 0.0
    entry_bias: float = 0.0

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"Unknown model {self.model!r}. Available: {sorted(MODELS)}.")
        unknown = sorted(set(self.router.split("+")) - set(ROUTERS_T1))
        if unknown:
            raise ValueError(f"Unknown router {unknown[0]!r}. Available: {sorted(ROUTERS_T1)}, joined by '+'.")
        if self.budget_rows < 1:
            raise ValueError(
                f"A budget must hold one entry at least. Got {self.budget_rows} rows. Raise it, or take a model"
                " without a scratchpad (recurrent)."
            )

    @property
    def control(self) -> str | None:
        return self.router if self.router in CONTROLS else None

    @property
    def uses_tags(self) -> bool:
        return "tags" in self.router.split("+")

    def layer_config(self, channels: int) -> ModelConfig:
        """The configuration of a layer; a row of ``channels`` values is a token."""
        # a control decides; a score without a learned bias stands below it
        router = "learned" if self.control == "shuffled" else "innovation" if self.control else self.router
        return ModelConfig(
            width=self.memory_width, layers=self.layers, heads=self.heads, state_width=self.state_width,
            patch_steps=channels, window_patches=self.window_rows, router=router, mixer=MODELS[self.model],
            write_clip=self.write_clip, entry_bias=self.entry_bias,
        )  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """Result of reading the rows of a chunk."""

    hidden: torch.Tensor  # [B, N, D]
    memory: list[Any]
    traces: list[Any]
    between: list[torch.Tensor]  # L of [B, N, D] after each layer


class Block(nn.Module):
    """Pre-norm memory layer and MLP, both residual."""

    def __init__(self, layer: nn.Module, width: int, memory_width: int) -> None:
        super().__init__()
        self.before_memory, self.before_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.down, self.up = nn.Linear(width, memory_width), nn.Linear(memory_width, width, bias=False)
        self.memory = layer
        self.grow, self.shrink = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(
        self, x: torch.Tensor, tokens: Tokens, memory: Any, policy: Policy, *, stepwise: bool, advance: bool
    ) -> tuple[torch.Tensor, Any, Any]:
        result = self.memory(
            self.down(self.before_memory(x)),
            tokens=tokens,
            memory=memory,
            policy=policy,
            stepwise=stepwise,
            advance=advance,
        )
        x = x + self.up(result.output)  # [B, 1, N, D]
        gate, content = self.grow(self.before_mlp(x)).chunk(2, -1)  # 2 x [B, 1, N, 2 D]
        return x + self.shrink(F.silu(gate) * content), result.memory, result.trace


class ProbeNet(nn.Module):
    """Embedding, blocks, and heads for answers, for the next row and for an auxiliary target.

    Args:
        inputs: I, numbers of a row.
        channels: C of them that are continuous channels.
        answers: Y.
        auxiliary: X, 0 for none.
    """

    def __init__(self, config: NetConfig, *, inputs: int, channels: int, answers: int, auxiliary: int = 0) -> None:
        super().__init__()
        self.config, self.channels = config, channels
        # what the clock showed at the first row; nothing but rotary positions reads it
        self.origin_rows = 0
        D = config.width
        self.embed = nn.Sequential(nn.Linear(config.embed_rows * inputs, D), nn.SiLU(), nn.Linear(D, D))
        # of the rows that the embedding carries along
        self.tail_bytes = (config.embed_rows - 1) * inputs * torch.get_default_dtype().itemsize
        layer_config = config.layer_config(channels)
        with torch.device("meta"):
            entry = HAMLayer(replace(layer_config, mixer="ham"))
            like = torch.zeros(1)
            self.entry_bytes = entry.empty_memory(1, 1, like).scratchpad.bytes_per_entry()
        budget_bytes = config.budget_rows * self.entry_bytes * config.layers
        makers = layer_makers(layer_config, channels=1, budget_bytes=budget_bytes)
        self.blocks = nn.ModuleList(Block(make(), D, config.memory_width) for make in makers)
        self.final_norm = nn.RMSNorm(D)
        self.answer = nn.Linear(D, answers)
        self.next_row = nn.Linear(D, channels)
        self.auxiliary = nn.Linear(D, auxiliary) if auxiliary else None

    @property
    def layers(self) -> list[Any]:
        """The memory layers, from the input up."""
        return [block.memory for block in self.blocks]

    def empty_memory(self, items: int) -> list[Any]:
        like = self.answer.weight
        return [layer.empty_memory(items, 1, like) for layer in self.layers]

    def read(
        self,
        batch: ProbeBatch,
        rows: slice,
        memory: Sequence[Any],
        policies: Sequence[Policy],
        *,
        stepwise: bool = False,
        advance: bool = True,
        hidden: int = 0,
    ) -> Reading:
        """Read some rows of a batch, going on from a memory.

        Args:
            hidden: rows of so many sequences, the first, do not see what the state says.
        """
        tokens = row_tokens(batch, rows, origin=self.origin_rows)
        told = recent_rows(batch.inputs(), batch.unseen, self.config.embed_rows)  # [B, L, embed rows x I]
        x = self.embed(told[:, rows])[:, None]  # [B, 1, N, D]
        after, traces, between = [], [], []
        for block, before, policy in zip(self.blocks, memory, policies, strict=True):
            with hidden_state(block.memory, hidden):
                x, now, trace = block(x, tokens, before, policy, stepwise=stepwise, advance=advance)
            after.append(now)
            traces.append(trace)
            between.append(x[:, 0])
        return Reading(self.final_norm(x[:, 0]), after, traces, between)

    def named(self, reading: Reading, index: torch.Tensor, named_after: Sequence[int] = ()) -> torch.Tensor:
        """The auxiliary target at rows, index [B, Q] -> [B, Q, X]; each part after its own layer, or all at the end."""
        assert self.auxiliary is not None
        place = index[..., None].expand(-1, -1, reading.hidden.shape[-1])
        if not named_after:
            return self.auxiliary(reading.hidden.gather(1, place))
        told = [self.auxiliary(self.final_norm(reading.between[layer].gather(1, place))) for layer in named_after]
        return torch.cat([part.chunk(len(told), -1)[number] for number, part in enumerate(told)], -1)

    def policies(
        self,
        batch: ProbeBatch,
        rows: int | torch.Tensor | tuple[int, ...],
        *,
        explore: torch.Generator | None = None,
        given: Sequence[torch.Tensor] | None = None,
    ) -> list[Policy]:
        """What the scratchpads may do: so many entries in each layer.

        Args:
            rows: budget of a layer in entries; a tensor gives each sequence its own, [B], a tuple each layer.
            explore: of random extra entries in training.
            given: what each layer keeps, L of [B, T] bool; for ``oracle`` and ``shuffled``.

        Raises:
            ValueError: a budget below one entry, or a control without its list.
        """
        if isinstance(rows, tuple):
            every = [self.policies(batch, own, explore=explore, given=given) for own in rows]
            return [policies[layer] for layer, policies in enumerate(every)]
        B, device = len(batch), batch.x.device
        budget = torch.as_tensor(rows, device=device).expand(B)  # [B]
        if int(budget.min()) < 1:
            raise ValueError(f"A budget must hold one entry at least. Got {int(budget.min())} rows. Raise it.")
        most = int(budget.max())
        control, tags_only = self.config.control, self.config.router == "tags"
        # a union of tags and a score halves the room, as a must-keep quota does
        must = most if tags_only else most // 2 if self.config.uses_tags else 0
        share = (budget / batch.context_rows).clamp(max=1.0).float()  # [B]
        policy = Policy(
            share=share,
            readable=torch.ones(B, 1, 1, dtype=torch.bool, device=device),
            cap_kept=most - must,
            cap_must=must,
            use_tags=self.config.uses_tags,
            eviction=self.config.eviction if control is None else "fifo",
        )
        if given is not None:
            # a list decides alone, and holds as many as it names
            policy = replace(policy, use_tags=False, cap_kept=most, cap_must=0, eviction="fifo")
        if explore is not None and control is None and given is None and not tags_only:
            policy = replace(policy, explore_share=EXPLORE_SHARE, explore_generator=explore)
        if control is None and given is None:
            return [policy] * self.config.layers
        return [replace(policy, control=self._control(batch, layer, given)) for layer in range(self.config.layers)]

    def _control(self, batch: ProbeBatch, layer: int, given: Sequence[torch.Tensor] | None) -> Control:
        B, device = len(batch), batch.x.device
        key = torch.arange(B, device=device)
        kind = self.config.control
        if given is None and kind in ("random", "stride", "recency"):
            return Control(kind=kind, key=key, layer=layer)
        if given is None and kind == "oracle":
            given = [batch.crit[:, : batch.context_rows]] * self.config.layers
        if given is None:
            raise ValueError("The control 'shuffled' needs what another sequence kept. Pass given=.")
        keep = given[layer]  # [B, T]
        position = torch.arange(keep.shape[1], dtype=torch.float64, device=device).expand(B, -1).contiguous()
        return Control(
            kind="given", key=key, layer=layer, position=position, keep=keep[..., None],
            rank=torch.zeros(*keep.shape, 1, device=device),
        )  # fmt: skip


EXPLORE_SHARE = 0.05


@contextmanager
def hidden_state(layer: Any, sequences: int) -> Iterator[None]:
    """In so many sequences, the first, a layer's output says nothing of the state; the state itself goes on."""
    if not sequences:
        yield
        return

    def hide(module: nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
        shown = torch.arange(len(output), device=output.device) >= sequences  # [B]
        return output * shown.view(-1, *[1] * (output.dim() - 1))  # [B, C, N, H, K]

    # past this norm the state adds to what was read
    handle = layer.recurrent_norm.register_forward_hook(hide)
    try:
        yield
    finally:
        handle.remove()


def recent_rows(inputs: torch.Tensor, unseen: torch.Tensor, count: int) -> torch.Tensor:
    """Every row with those before it, the newest first: inputs [..., N, I] -> [..., N, count I].

    Args:
        unseen: rows that no later row sees, [..., N] bool (``ProbeBatch.unseen``).
    """
    told = inputs * ~unseen[..., None]  # [..., N, I]
    N = inputs.shape[-2]
    earlier = [F.pad(told, (0, 0, back, 0))[..., :N, :] for back in range(1, count)]
    return torch.cat([inputs, *earlier], -1)


def row_tokens(batch: ProbeBatch, rows: slice, *, origin: int = 0) -> Tokens:
    """Rows as tokens of one channel; rows that ask write nothing, decay nothing and are never kept."""
    x = batch.x[:, rows]  # [B, N, C]
    B, N, C = x.shape
    there = ~x.isnan()  # [B, N, C]
    asks = batch.query[:, rows]  # [B, N]
    told = there.any(-1) | (batch.events[:, rows].abs().sum(-1) > 0) | (batch.actions[:, rows].abs().sum(-1) > 0)
    heard = told & ~asks  # [B, N]
    tags = batch.tags[:, rows] & ~asks  # [B, N]
    time = torch.arange(batch.x.shape[1], dtype=torch.float64, device=x.device)[rows] + origin  # [N]
    blank = x.new_zeros(B, 1, N, 0)
    return Tokens(
        values=torch.nan_to_num(x)[:, None],  # [B, 1, N, C]
        observed=there[:, None],
        tags=tags[:, None, :, None].expand(-1, -1, -1, C),
        event_offset=x.new_zeros(B, 1, N, C),
        ahead_values=blank,
        ahead_observed=blank.bool(),
        calendar=x.new_zeros(B, N, 0),
        level=blank,
        marks=x.new_zeros(B, 1, N, 3),
        heard=heard[:, None].to(x.dtype),
        present=torch.ones(B, N, dtype=torch.bool, device=x.device),
        routable=heard[:, None],
        must_keep=tags[:, None],
        position=time.expand(B, N).contiguous(),
        elapsed=(~asks).to(x.dtype),
        static_values=x.new_zeros(B, 0),
        static_codes=torch.zeros(B, 0, dtype=torch.int64, device=x.device),
    )


def kept_rows(memory: Any, rows: int) -> torch.Tensor | None:
    """Rows whose exact key and value a layer holds after the context, [B, rows] bool; None where it holds none."""
    if isinstance(getattr(memory, "scratchpad", None), Entries):
        entries = memory.scratchpad
        place, alive = entries.position.round().long(), entries.alive  # 2 x [B, M]
    elif hasattr(memory, "kept"):
        place, alive = memory.kept.index, memory.kept.alive
    else:
        return None
    kept = torch.zeros(alive.shape[0], rows + 1, dtype=torch.bool, device=alive.device)
    return kept.scatter(1, torch.where(alive, place.clamp(0, rows - 1), rows), True)[:, :rows]


def without_rows(memory: Any, drop: torch.Tensor) -> Any:
    """A HAM layer's memory without the entries of some rows, drop [B, L] bool."""
    entries = memory.scratchpad
    place = entries.position.round().long().clamp(0, drop.shape[1] - 1)  # [B, M]
    return replace(memory, scratchpad=replace(entries, alive=entries.alive & ~drop.gather(1, place)))


def memory_bytes(memories: Sequence[Any]) -> tuple[float, float]:
    """Bytes of one sequence after the context, mean: what is fixed (state, window), and what is kept exactly."""
    fixed, exact = 0.0, 0.0
    for memory in memories:
        rows = getattr(memory, "scratchpad", None) or getattr(memory, "kept", None)
        if rows is None:
            # what is kept has a fixed size here
            fixed += sum(t[0].numel() * t.element_size() for t in _tensors(memory))
            continue
        count = float(rows.alive.sum(1).float().mean())
        exact += count * sum(t[0, 0].numel() * t.element_size() for t in _tensors(rows) if t.shape[1])
        fixed += sum(t[0].numel() * t.element_size() for t in _tensors(memory)) - sum(
            t[0].numel() * t.element_size() for t in _tensors(rows)
        )
    return fixed, exact


def _tensors(container: Any) -> list[torch.Tensor]:
    from hamts.nn.tokens import map_tensors

    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(container, note)
    return found
