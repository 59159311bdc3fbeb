"""What token recall is about: its tasks, its vocabulary, and a token model around the memory layers of hamts.

B sequences · L tokens · N = L · V vocabulary · n pairs
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from benchmarks.recall_teacher import Asked, asked_reads
from hamts.config import ModelConfig
from hamts.nn.backbone import Block
from hamts.nn.ham import HAMLayer
from hamts.nn.mixers import layer_makers
from hamts.nn.tokens import Policy, Tokens
from hamts.ops.attend import attend
from hamts.ops.kernels import Kernels

__all__ = [
    "FILLER", "KEYS", "MARKER", "MODELS", "OWN", "SELECTED_BY", "SHARED", "TASKS", "TOKENS_PER_PAIR", "VALUES",
    "Lesson", "TokenModel", "draw_needle", "draw_recall", "lesson_of", "places_of_values", "policies_of",
]  # fmt: skip

KEYS, VALUES, FILLER = 512, 128, 64
MARKER = KEYS + VALUES + FILLER
TOKENS_PER_PAIR = 16
ROOMY_BYTES = 1 << 40

LEARNED: dict[str, Any] = {"router": "learned"}
TOKEN = LEARNED | {"learned_features": "token"}
SURPRISE: dict[str, Any] = {"router": "surprise", "head_reduction": "min"}
# the teacher of asked reads is heard by these scores' own weights and by nothing below: at weight 1 a gradient that
# goes on through the score's input outweighs the task there. Its weight. Scores of ``-only`` hear nothing else, and the
# read feels their logarithm (that of ``-mute`` it never feels)
OWN = {
    "learned-token-asked-own-0.02": 0.02,
    "learned-token-asked-own-0.1": 0.1,
    "learned-token-asked-own-0.3": 0.3,
    "learned-token-asked-own-1": 1.0,
    "learned-token-asked-own-only": 1.0,
    "learned-asked-own-0.3": 0.3,
    "learned-token-asked-bare-0.02": 0.02,
    "learned-token-asked-bare-0.3": 0.3,
    "learned-token-asked-bare-only": 1.0,
    "learned-asked-bare-0.3": 0.3,
    "learned-token-asked-own-0.3-deaf": 0.3,
    "learned-asked-own-0.3-deaf": 0.3,
}
# these do not hear the state in half of the sequences that they learn from: what a state answers needs no lookup, and
# where it answers all that is short none is learned
DEAF = ("learned-token-deaf", "learned-token-asked-own-0.3-deaf", "learned-asked-own-0.3-deaf", "surprise-deaf")
# training of the learned score taken apart; see BIAS_FROM, SELECTED_BY and TARGETS; then by what it is taught, see
# WEIGHTS and SEVERED; then by which weights are taught, and by which reads, see OWN and BARE; then by what is heard
# in DEAF
APART = (
    "learned-late", "learned-token-late", "learned-token-silent", "learned-token-gain", "learned-token-silent-gain",
    "learned-token-asked", "learned-token-asked-mute", "learned-token-taught", "learned-token-mute", "learned-asked",
    "learned-asked-mute", "learned-token-deaf", *OWN,
)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "recurrent": {"mixer": "recurrent"},
    "attention": {"mixer": "attention"},
    "gdn_gsa": {"mixer": "gdn_gsa"},
    "learned": LEARNED,
    "learned-token": TOKEN,
    "surprise": SURPRISE,
    "error": {"router": "error", "head_reduction": "min"},
    "learned-shared": LEARNED,
    "learned-token-shared": TOKEN,
    "surprise-shared": SURPRISE,
    **{name: TOKEN if "-token-" in name else LEARNED for name in APART},
    "surprise-biased": LEARNED | {"head_reduction": "min"},
    "surprise-deaf": SURPRISE,
}
# shares of all steps between which the score's logarithm comes into the logits of the read; elsewhere it is always
# there. Before, its gradient passes all the same: the read does not feel it, and says what it would gain by it.
ALWAYS, NEVER = (0.0, 0.0), (math.inf, math.inf)
BIAS_FROM = {
    "learned-late": (0.6, 0.75),
    "learned-token-late": (0.6, 0.75),
    "learned-token-silent": NEVER,
    "learned-token-silent-gain": NEVER,
    "learned-token-asked-mute": NEVER,
    "learned-token-mute": NEVER,
    "learned-asked-mute": NEVER,
}
# the reads that these are taught by are counted without the score's logarithm: what it lowered is read less, and would
# be taught lower still
BARE = tuple(name for name in OWN if "-bare-" in name)
# nothing but the auxiliary target teaches these scores
MUTE = ("learned-token-asked-mute", "learned-token-mute", "learned-asked-mute")
SEVERED = (*MUTE, "learned-token-asked-own-only", "learned-token-asked-bare-only")
# entries chosen by another score than the one whose logarithm is in the logits
SELECTED_BY = {"surprise-biased": "surprise"}
# what teaches the learned score beside the task, where it is not the attention that an entry received
TARGETS = {
    "learned-token-gain": "gain",
    "learned-token-silent-gain": "gain",
    "learned-token-asked": "asked",
    "learned-token-asked-mute": "asked",
    "learned-asked": "asked",
    "learned-asked-mute": "asked",
    **dict.fromkeys(OWN, "asked"),
}
# of the auxiliary loss, where it is not AUXILIARY_WEIGHT
AUXILIARY_WEIGHT = 0.02
WEIGHTS = dict.fromkeys(("learned-token-asked", "learned-asked", "learned-token-taught", *MUTE), 1.0) | OWN
# variants whose scratchpad holds the keys and values that the state is written with, after the short convolution
SHARED = "-shared"


@dataclass(frozen=True)
class Lesson:
    """What teaches a model, its learned score above all."""

    target: str = "attention"
    weight: float = AUXILIARY_WEIGHT
    own: bool = False  # the target's gradient reaches the score's own weights alone
    severed: bool = False  # the task's gradient does not reach the score
    bare: bool = False  # reads that teach it are counted without its logarithm
    bias_from: tuple[float, float] = ALWAYS
    deaf: bool = False  # in half of the sequences the state is not heard


def lesson_of(name: str) -> Lesson:
    return Lesson(
        target=TARGETS.get(name, "attention"), weight=WEIGHTS.get(name, AUXILIARY_WEIGHT), own=name in OWN,
        severed=name in SEVERED, bare=name in BARE, bias_from=BIAS_FROM.get(name, ALWAYS),
        deaf=name in DEAF,
    )  # fmt: skip


@dataclass(frozen=True)
class WideBlocks(Kernels):
    """The read in few, large blocks of queries: launches are what costs time at these sizes on a GPU."""

    @property
    def attend(self) -> Callable[..., Any]:
        return partial(attend, block=1 << 10)


@dataclass(frozen=True)
class FaintBias(WideBlocks):
    """The same, where the read feels as much of the learned log-bias as the model says; the gradient is all of it."""

    model: Any = None
    layer: Any = None

    @property
    def attend(self) -> Callable[..., Any]:
        return self._attend

    def _attend(self, queries: torch.Tensor, *, scratch: Any, **others: Any) -> Any:
        strength = self.model.bias_strength
        bare = self.layer.scratch_bias.to(scratch.bias.dtype).expand_as(scratch.bias)  # [B, M, H] as if it said nothing
        if strength != 1.0 or self.model.severed:
            learned = scratch.bias - bare  # [B, M, H]
            # nothing is added where the score is severed, but the gradient is taken away
            cut = learned.detach() - learned if self.model.severed else 0.0  # [B, M, H]
            gone = (1.0 - strength) * learned.detach()  # [B, M, H]
            scratch = replace(scratch, bias=scratch.bias + cut - gone)  # [B, M, H]
        if self.model.asked is not None:
            counted = replace(scratch, bias=bare) if self.model.bare else scratch  # [B, M, H]
            self.model.reads.append(asked_reads(queries, counted, others, self.model.asked))
        return super().attend(queries, scratch=scratch, **others)


def draw_recall(
    length: int, count: int, generator: torch.Generator, tokens_per_pair: int = TOKENS_PER_PAIR
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences and what is right at each place, -1 where nothing is asked: 2 x [B, L]."""
    device = generator.device
    pairs = length // tokens_per_pair
    ids = torch.randint(KEYS + VALUES, KEYS + VALUES + FILLER, (count, length), generator=generator, device=device)

    def chosen(most: int) -> torch.Tensor:
        return torch.rand(count, most, generator=generator, device=device).argsort(1)[:, :pairs]  # [B, n]

    keys = chosen(KEYS)  # [B, n]
    values = KEYS + torch.randint(VALUES, (count, pairs), generator=generator, device=device)  # [B, n]
    stored, asked_from = 3 * length // 4, 3 * length // 4
    place = 2 * chosen(stored // 2)  # [B, n]
    ids.scatter_(1, place, keys)
    ids.scatter_(1, place + 1, values)
    query = asked_from + chosen(length - asked_from)  # [B, n]
    ids.scatter_(1, query, keys)
    right = torch.full_like(ids, -1).scatter_(1, query, values)
    return ids, right


def places_of_values(ids: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Where the value of each query of ``draw_recall`` stands: [B, L] each -> [B, L], -1 where nothing is asked."""
    B, L = ids.shape
    place = torch.full((B, KEYS + VALUES + FILLER), -1, dtype=torch.int64, device=ids.device)  # [B, V]
    at = torch.arange(L, device=ids.device)  # [L]
    # a key stands once before it is asked
    stored = (right < 0) & (ids < KEYS)  # [B, L]
    place.scatter_reduce_(1, ids.clamp_max(place.shape[1] - 1), torch.where(stored, at, -1), "amax")
    return torch.where(right >= 0, place.gather(1, ids.clamp_max(place.shape[1] - 1)) + 1, -1)  # [B, L]


def draw_needle(
    length: int, count: int, generator: torch.Generator, tokens_per_pair: int = TOKENS_PER_PAIR
) -> tuple[torch.Tensor, torch.Tensor]:
    """One marked pair, and its key again at the end: 2 x [B, L]."""
    device = generator.device
    ids = torch.randint(KEYS + VALUES, KEYS + VALUES + FILLER, (count, length), generator=generator, device=device)
    place = torch.randint(3 * length // 4 - 3, (count, 1), generator=generator, device=device)  # [B, 1]
    key = torch.randint(KEYS, (count, 1), generator=generator, device=device)  # [B, 1]
    value = KEYS + torch.randint(VALUES, (count, 1), generator=generator, device=device)  # [B, 1]
    ids.scatter_(1, place, MARKER).scatter_(1, place + 1, key).scatter_(1, place + 2, value)
    ids[:, -2], ids[:, -1] = MARKER, key[:, 0]
    right = torch.full_like(ids, -1)
    right[:, -1] = value[:, 0]
    return ids, right


TASKS = {"recall": draw_recall, "needle": draw_needle}


class SharedKeys(HAMLayer):
    """HAM whose scratchpad holds what its state is written with: keys and values after the short convolution.

    The equations of the paper use one key and one value for both; ``HAMLayer`` keeps them from before the convolution.
    """

    def _inputs(self, mixed: torch.Tensor, tokens: Tokens, memory: Any, turn: Any) -> Any:
        plain = super()._inputs(mixed, tokens, memory, turn)
        grid = mixed.shape[:2]  # B, C
        keys = self._turned_keys(plain.k.unflatten(0, grid), turn)  # [B, N, C, H, K]
        values = plain.v.unflatten(0, grid).transpose(1, 2)  # [B, N, C, H, K]
        return replace(
            plain,
            keys=torch.cat([memory.pending.keys, keys], 1),
            values=torch.cat([memory.pending.values, values], 1),
        )


class TokenModel(nn.Module):
    """Embedding, blocks of a memory layer and a gated MLP, and a head over the vocabulary."""

    def __init__(self, config: ModelConfig, *, shared: bool = False) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(MARKER + 1, config.width)
        makers = layer_makers(config, channels=1, budget_bytes=ROOMY_BYTES)
        if shared:
            makers = [lambda: SharedKeys(config)] * config.layers
        blocks = [Block(config, make) for make in makers]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, VALUES)
        nn.init.normal_(self.embedding.weight, std=0.5)
        # of the learned log-bias, what the read feels
        self.bias_strength, self.severed, self.bare = 1.0, False, False
        # places that are asked, where reads from them are to be counted, and these reads, layer by layer
        self.asked: Asked | None = None
        self.reads: list[torch.Tensor] = []
        # sequences in which the state is not heard, [B]
        self.deaf: torch.Tensor | None = None
        if config.mixer == "ham":
            for block in blocks:
                block.memory.recurrent_norm.register_forward_hook(self._heard)
        learns = config.mixer == "ham" and "learned" in config.router_names
        for block in blocks:
            faint = {"model": self, "layer": block.memory}
            said = "large blocks of queries"
            block.memory.kernels = FaintBias("torch", said, **faint) if learns else WideBlocks("torch", said)

    def select_by(self, score: str) -> str:
        """Let another score choose entries, with the learned one's logarithm in the logits; the one that did before.

        Thresholds are of the score before: they must be set anew. Scores of the state's error are always there.
        """
        before = {layer.router.names for layer in self.layers()}
        for layer in self.layers():
            layer.router.names = (score,)
        return before.pop()[0]

    def _heard(self, _: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        """What the state said, [B, 1, L, H, G], where it is heard."""
        if self.deaf is None:
            return output
        return output.masked_fill(self.deaf[:, None, None, None, None], 0.0)  # [B, 1, L, H, G]

    def layers(self) -> list[Any]:
        return [block.memory for block in self.blocks]

    def forward(self, ids: torch.Tensor, policies: list[Policy]) -> tuple[torch.Tensor, list[Any]]:
        """Logits of the values, [B, L, values], and a trace per layer."""
        self.reads.clear()
        x = self.embedding(ids)[:, None]  # [B, 1, L, D]
        tokens, traces = as_tokens(ids, x), []
        for block, policy in zip(cast("list[Block]", self.blocks), policies, strict=True):
            memory = block.memory.empty_memory(len(ids), 1, x)
            x, _, trace = block(x, tokens, memory, policy, stepwise=False, advance=True)
            traces.append(trace)
        return self.head(self.norm(x[:, 0])), traces


def as_tokens(ids: torch.Tensor, like: torch.Tensor) -> Tokens:
    """Every token of one channel, observed, at whole positions."""
    B, L = ids.shape
    ones = like.new_ones(B, 1, L)
    nothing, yes = like.new_zeros(B, 1, L, 0), torch.ones(B, 1, L, dtype=torch.bool, device=ids.device)
    return Tokens(
        values=like.new_zeros(B, 1, L, 1),
        observed=yes[..., None],
        tags=~yes[..., None],
        event_offset=like.new_zeros(B, 1, L, 1),
        ahead_values=nothing,
        ahead_observed=nothing.bool(),
        calendar=like.new_zeros(B, L, 0),
        level=nothing,
        marks=torch.stack([torch.zeros_like(ones), torch.zeros_like(ones), ones], -1),
        heard=ones,
        present=yes[:, 0],
        routable=yes,
        must_keep=~yes,
        position=torch.arange(L, dtype=torch.float64, device=ids.device).expand(B, L),
        elapsed=ones[:, 0],
        static_values=like.new_zeros(B, 0),
        static_codes=torch.zeros(B, 0, dtype=torch.int64, device=ids.device),
    )


def policies_of(model: TokenModel, share: torch.Tensor, **changes: Any) -> list[Policy]:
    """The same for every layer; chance counts the layers apart."""
    readable = torch.ones(len(share), 1, 1, dtype=torch.bool, device=share.device)
    policy = Policy(share=share, readable=readable, use_tags=False, **changes)
    if policy.control is None:
        return [policy] * len(model.blocks)
    return [replace(policy, control=replace(policy.control, layer=n)) for n in range(len(model.blocks))]
