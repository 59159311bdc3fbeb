"""What training reads: consecutive windows of many streams side by side, each with its own budget, place and age.

B streams side by side · I items · R rows (patches) of all items · C channels · N context patches · P steps in a patch
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import IterableDataset

from hamts.config import TrainConfig
from hamts.data.constants import constant, sent
from hamts.data.patches import Chunk, PatchStore, horizon_patches
from hamts.data.scale import ScaleState
from hamts.nn.tokens import Policy, map_tensors
from hamts.reader import HAMNetwork

__all__ = ["CROSS_CHANCE", "StreamWindows", "Windows", "on_device", "patches_since", "scale_history"]

# budget shares of training streams; 0 and 1 are drawn on purpose, they are the ends of the frontier
EMPTY_CHANCE, FULL_CHANCE, SMALLEST_SHARE, LARGEST_SHARE = 0.15, 0.10, 0.02, 0.75
# chance that the targets of a training stream read one another, where validation is to decide
CROSS_CHANCE = 0.5
# where prefixes have few lengths: the longest, and so many more, each shorter by this factor
PREFIX_LENGTHS, PREFIX_RATIO = 4, 4
NEVER = 1 << 40


@dataclass(frozen=True)
class Windows:
    """One training batch: what each stream reads next, and what it must then forecast."""

    parts: list[tuple[Chunk, Chunk]]  # a piece of the context, and the forecast after it
    reset: torch.Tensor  # [B] bool: the stream restarts: its memory is emptied, then filled from the patches before
    items: torch.Tensor  # [B] int64
    first: torch.Tensor  # [B] int64: first patch of the context
    prefix: int  # patches before the context that a restarted stream reads first, without gradient
    scale: ScaleState  # warm statistics of each stream, as of ``prefix`` patches before the context
    share: torch.Tensor  # [B] budget share asked of each stream
    cross: torch.Tensor  # [B] bool: targets may read one another


def on_device(batch: Windows, device: torch.device) -> Windows:
    """A batch on a device, but for what the host goes by: which streams restart, and where they are."""
    moved = map_tensors(batch, lambda tensor: sent(tensor, device))
    return replace(moved, reset=batch.reset, items=batch.items, first=batch.first)


def scale_history(network: HAMNetwork, store: PatchStore) -> ScaleState:
    """Normaliser sums before every patch of every item: a stream may start anywhere and be warm. [R, C, ...]."""
    scaler = network.scaler
    C, halves = store.values.shape[2], len(scaler.half_lives)
    G = len(scaler.targets)
    sums = torch.zeros(len(store.values), C, halves, 3, dtype=torch.float64)  # [R, C, L, 3]
    extreme = torch.full((len(store.values), G, 2), torch.inf, dtype=torch.float64)  # [R, G, 2]
    atoms = torch.zeros(len(store.values), G, 2, 3, dtype=torch.float64)  # [R, G, 2, 3]
    reference = torch.zeros(len(store.values), C, dtype=torch.float64)  # [R, C]
    known = torch.zeros(len(store.values), C, dtype=torch.bool)  # [R, C]
    for item in range(store.n_items):
        index = torch.tensor([item])
        first, count = int(store.first_row[item]), int(store.row_count[item])
        state = scaler.empty(1)
        for low in range(0, count, 256):
            size = min(256, count - low)
            chunk = store.window(index, store.first_patch[index] + low, size)
            after, ref, seen = scaler.running_sums(chunk.values, chunk.observed, state)
            most, mass = scaler.running_atoms(chunk.values, chunk.observed, state)
            rows = slice(first + low, first + low + size)
            before = torch.cat([state.sums[:, :, None], after[:, :, :-1]], 2)  # [1, C, N, L, 3]
            sums[rows] = before[0].transpose(0, 1)
            reference[rows], known[rows] = ref[0], (before[0, :, :, 0, 0] > 0).transpose(0, 1)
            extreme[rows] = torch.cat([state.extreme[:, :, None], most[:, :, :-1]], 2)[0].transpose(0, 1)
            atoms[rows] = torch.cat([state.atoms[:, :, None], mass[:, :, :-1]], 2)[0].transpose(0, 1)
            state = ScaleState(after[:, :, -1], ref, seen, most[:, :, -1], mass[:, :, -1])
    return ScaleState(sums, reference, known, extreme, atoms)


def patches_since(store: PatchStore) -> torch.Tensor:
    """For every patch with events, how many patches ago its item had the same events, int64 [R]; ``NEVER`` where it had
    not, and where there are none."""
    since = torch.full((len(store.values),), NEVER)  # [R]
    event = [i for i, role in enumerate(store.roles) if role == "event"]
    tags = store.tags[:, :, event]  # [R, P, E]
    named = torch.where(tags, store.values[:, :, event], 0.0).numpy()  # [R, P, E]
    rows = tags.flatten(1).any(1)  # [R]
    for item in range(store.n_items):
        first, count = int(store.first_row[item]), int(store.row_count[item])
        last: dict[bytes, int] = {}
        for row in (first + torch.nonzero(rows[first : first + count]).squeeze(1)).tolist():
            name = named[row].tobytes()
            since[row] = row - last.get(name, row - NEVER)
            last[name] = row
    return since


class StreamWindows(IterableDataset[Windows]):
    """Endless batches of consecutive windows of B streams; each restarts elsewhere now and then."""

    def __init__(
        self,
        store: PatchStore,
        history: ScaleState,
        *,
        ends: np.ndarray,
        horizon: int,
        config: TrainConfig,
        cross_chance: float,
        device: torch.device | str = "cpu",
        same_sizes: bool = False,
        few_prefixes: bool = False,
        augment: Callable[[StreamWindows], None] | None = None,
    ) -> None:
        """Where streams are is kept on the CPU; rows and statistics on ``device``, where windows are cut.

        With ``same_sizes`` every forecast has room for the longest, so that all batches have the same sizes. With
        ``few_prefixes`` a prefix has one of five lengths: what depends on it is prepared once for each. ``augment`` is
        called before each batch is drawn and may write into ``store.values``, ``store.tags`` and ``since``, which are
        then these windows' own.
        """
        self.cross_chance, self.same_sizes, self.few_prefixes = cross_chance, same_sizes, few_prefixes
        self.horizon, self.config, self.device = horizon, config, torch.device(device)
        self.host = store
        self.store, self.history = map_tensors((store, history), lambda tensor: tensor.to(device))
        self.ends = torch.from_numpy(np.asarray(ends, dtype=np.int64))  # [I] observed steps that may be used
        usable = (self.ends + store.lead) // store.patch_steps  # [I] patches
        self.patches = usable.clamp_min(1)
        self.weights = self.patches.double()
        self.generator = torch.Generator().manual_seed(config.seed)
        B = config.batch_windows
        self.items = torch.zeros(B, dtype=torch.int64)
        self.at = torch.zeros(B, dtype=torch.int64)
        self.share = torch.zeros(B)
        self.cross = torch.zeros(B, dtype=torch.bool)
        self._restart(torch.ones(B, dtype=torch.bool))
        self.reset = torch.ones(B, dtype=torch.bool)
        # patches since the same events were read last, of every row, [R]
        self.since = patches_since(store) if config.recall_share > 0 else None
        # lengths of prefixes, each as likely; none: drawn up to ``prefix_patches``
        self.prefixes: tuple[int, ...] = ()
        # most entries a layer that a stream can ever keep by score, where that is known; None: what caps allow
        self.room: int | None = None
        self.augment = augment
        if augment is not None:
            own = {name: getattr(self.store, name).clone() for name in ("values", "tags")}
            self.store = replace(self.store, **own)

    def _uniform(self, n: int) -> torch.Tensor:
        return torch.rand(n, generator=self.generator)

    def _restart(self, which: torch.Tensor) -> None:
        """Give some streams a new place, budget and reading rule."""
        B = len(which)
        N = self.config.context_patches
        items = torch.multinomial(self.weights, B, replacement=True, generator=self.generator)  # [B]
        # the last start that leaves a context and something to forecast
        last = (self.patches[items] - N - 1).clamp_min(-N // 2)  # [B]
        first = torch.minimum(last, torch.tensor(0))  # [B]
        at = first + (self._uniform(B) * (last - first + 1)).long()  # [B]
        low, high = math.log(SMALLEST_SHARE), math.log(LARGEST_SHARE)
        share = torch.exp(low + self._uniform(B) * (high - low))  # [B]
        extreme = self._uniform(B)
        share = torch.where(extreme < EMPTY_CHANCE, 0.0, share)
        share = torch.where(extreme > 1 - FULL_CHANCE, 1.0, share)
        self.items = torch.where(which, items, self.items)
        self.at = torch.where(which, at, self.at)
        self.share = torch.where(which, share, self.share)
        self.cross = torch.where(which, self._uniform(B) < self.cross_chance, self.cross)

    def keep_streams(self, number: int) -> None:
        """Go on with the first so many streams: longer ones take more room each.

        Raises ValueError unless every stream restarts at every step: carried memories belong to all of them.
        """
        if self.config.reset_share < 1.0:
            raise ValueError(
                "Streams can be left out only where all restart at every step: reset_share=1.0."
                f" Got reset_share={self.config.reset_share}."
            )
        for name in ("items", "at", "share", "cross", "reset"):
            setattr(self, name, getattr(self, name)[:number])

    def within(self, policy: Policy) -> Policy:
        """A policy with no more room than a stream can fill: what is recorded has all its room in every step."""
        if self.room is None or policy.cap_kept is None:
            return policy
        return replace(policy, cap_kept=min(self.room, policy.cap_kept))

    def __iter__(self) -> Iterator[Windows]:
        while True:
            yield self.draw()

    def draw(self) -> Windows:
        """The next batch; moves every stream on."""
        if self.augment is not None:
            self.augment(self)
        N, B = self.config.context_patches, len(self.items)
        prefix = self._prefix()
        parts, done = [], 0
        for k in range(self.config.origins):
            size = N * (k + 1) // self.config.origins - done
            if size:
                parts.append(self._part(self.at + done, size, torch.where(self.reset, prefix, 0) + done))
            done += size
        batch = Windows(parts, self.reset, self.items, self.at, prefix, self._warm(prefix), self.share, self.cross)
        self.at = self.at + N
        ended = (self.at + N) >= self.patches[self.items]
        self.reset = ended | (self._uniform(B) < self.config.reset_share)
        self._restart(self.reset)
        return batch

    def _part(self, first: torch.Tensor, patches: int, read: torch.Tensor) -> tuple[Chunk, Chunk]:
        """Some patches of every stream, and a forecast after them; ``read`` [B] patches before them at least."""
        store, B = self.store, len(self.items)
        items = sent(self.items, self.device)  # [B]
        context = store.window(items, sent(first, self.device), patches)
        context = self._hide_spans(context, self._recalled(context, first, read))
        # half of all forecasts start on a patch boundary: scheduled forecasts do
        inside = float(self._uniform(1)) < 0.5
        begun = (self._uniform(B) * store.patch_steps).long() if inside else torch.zeros(B, dtype=torch.int64)  # [B]
        boundary = (first + patches) * store.patch_steps - self.host.lead[self.items]  # [B]
        cutoffs = torch.minimum(boundary + begun, self.ends[self.items] - 1).maximum(boundary)  # [B]
        reveal = sent(self._uniform(B) < 0.5, self.device)  # [B]
        most = torch.tensor([store.patch_steps - 1]) if self.same_sizes else cutoffs - boundary
        ahead = horizon_patches(most, self.horizon, store.patch_steps)
        horizon = store.horizon(items, sent(cutoffs, self.device), self.horizon, reveal, ahead)
        return context, self._hide_beyond(horizon, cutoffs)

    def _prefix(self) -> int:
        """How much restarted streams read first; one length a step, evenly spread in its logarithm."""
        if self.prefixes:
            return self.prefixes[int(self._uniform(1) * len(self.prefixes))]
        longest = math.log(1 + self.config.prefix_patches)
        drawn = float(self._uniform(1)) * longest
        if not self.few_prefixes:
            return int(math.exp(drawn)) - 1
        lengths = {0, *(self.config.prefix_patches // PREFIX_RATIO**k for k in range(PREFIX_LENGTHS))}
        return min(sorted(lengths), key=lambda length: abs(math.log(1 + length) - drawn))

    def _warm(self, prefix: int) -> ScaleState:
        """Statistics of each stream before its prefix, [B, C, ...]."""
        local = (self.at - prefix - self.host.first_patch[self.items]).clamp_min(0)
        rows = self.host.first_row[self.items] + local.minimum(self.host.row_count[self.items] - 1)
        rows = sent(rows, self.device)  # [B]
        return map_tensors(self.history, lambda tensor: tensor[rows])

    def _recalled(self, context: Chunk, first: torch.Tensor, read: torch.Tensor) -> torch.Tensor | None:
        """Steps to hide because they follow an event that the stream has read before, [B, N, P]; None: none."""
        if self.since is None:
            return None
        B, _, N, P = context.values.shape
        local = (first - self.host.first_patch[self.items])[:, None] + torch.arange(N)  # [B, N]
        count = self.host.row_count[self.items][:, None]  # [B, 1]
        rows = self.host.first_row[self.items][:, None] + local.clamp_min(0).minimum(count - 1)  # [B, N]
        known = (self.since[rows] <= read[:, None] + torch.arange(N)) & (local >= 0) & (local < count)  # [B, N]
        known &= torch.rand(B, N, generator=self.generator) < self.config.recall_share
        event = constant([role == "event" for role in self.store.roles], torch.bool, self.device)[:, None, None]
        tagged = (context.tags & event).any(1)  # [B, N, P]
        later = tagged.flip(-1).cumsum(-1).flip(-1)  # [B, N, P] tagged steps from this one on
        return sent(known, self.device)[..., None] & (later == 0)

    def _hide_spans(self, context: Chunk, recalled: torch.Tensor | None) -> Chunk:
        """Hide one span of targets and past channels in some windows, and what is to be recalled; what is hidden
        becomes part of the task."""
        B, C, N, P = context.values.shape
        chosen = self._uniform(B) < self.config.span_share  # [B]
        length = 1 + (self._uniform(B) * min(self.horizon, N * P // 3)).long()  # [B] steps
        start = (self._uniform(B) * (N * P - length)).long()  # [B]
        step = torch.arange(N * P)  # [N P]
        span = chosen[:, None] & (step >= start[:, None]) & (step < (start + length)[:, None])  # [B, N P]
        span = sent(span, self.device).view(B, N, P)
        if recalled is not None:
            span = span | recalled
        hidden = span[:, None] & self._hideable()  # [B, C, N, P]
        if recalled is not None:
            # as in a forecast, where nothing says that no other event will follow
            hidden = hidden | (recalled[:, None] & self._of_roles("target", "past", "event"))  # [B, C, N, P]
        observed = context.observed & ~hidden  # [B, C, N, P]
        return replace(
            context,
            values=torch.where(observed, context.values, 0.0),
            observed=observed,
            tags=context.tags & ~hidden,
            horizon=span,
        )

    def _hideable(self) -> torch.Tensor:
        """Targets and past channels, [C, 1, 1] bool."""
        return self._of_roles("target", "past")

    def _of_roles(self, *roles: str) -> torch.Tensor:
        """Channels of these roles, [C, 1, 1] bool."""
        return constant([role in roles for role in self.store.roles], torch.bool, self.device)[:, None, None]

    def _hide_beyond(self, horizon: Chunk, cutoffs: torch.Tensor) -> Chunk:
        """No truth from beyond the training rows."""
        P = self.store.patch_steps
        assert horizon.horizon is not None
        N = horizon.horizon.shape[1]
        lead = self.host.lead[self.items]  # [B]
        origin = (cutoffs + lead) // P * P - lead  # [B]
        step = origin[:, None, None] + torch.arange(N * P).view(N, P)  # [B, N, P]
        usable = sent(step < self.ends[self.items][:, None, None], self.device)  # [B, N, P]
        return replace(
            horizon,
            truth=torch.where(usable[:, None], horizon.truth, torch.nan),
            observed=horizon.observed & usable[:, None],
            values=torch.where(usable[:, None], horizon.values, 0.0),
            tags=horizon.tags & usable[:, None],
        )
