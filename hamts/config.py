"""Every default of hamts, once. Layers and forecasters take these objects and have no default numbers of their own."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from hamts.config_tags import TagType

__all__ = [
    "ALLOCATIONS", "AUXILIARY_TARGETS", "EVICTIONS", "MIXERS", "PRESETS", "ROUTERS", "THRESHOLDS", "MachineConfig",
    "MemoryConfig", "ModelConfig", "Preset", "TagType", "TrainConfig",
]  # fmt: skip

ROUTERS = ("surprise", "error", "innovation", "write", "uncertainty", "residual", "learned", "mix", "tags")
ALLOCATIONS = ("uniform", "pooled", "normalised", "learned")
THRESHOLDS = ("fixed", "quantile", "feedback", "block")
EVICTIONS = ("fifo", "lowest", "must_last", "reservoir")
AUXILIARY_TARGETS = ("attention", "gain", "none")
# what stands in the place of the HAM layer, see hamts.nn.mixers
MIXERS = (
    "ham", "attention", "recurrent", "recurrent_wide", "window", "recurrent_window", "gdn_gsa", "top_write",
    "log_linear", "pooled", "block_sparse", "neighbours",
)  # fmt: skip
MACHINE_CHOICES = {
    "kernel": ("auto", "torch", "fla", "triton", "fla+triton"),
    "strategy": ("auto", "ddp", "fsdp"),
    "compile_mode": ("none", "default", "reduce-overhead"),
}
QUANTILES = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.975, 0.99)


def _known(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"Unknown {name} {value!r}. Available: {sorted(choices)}.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the network.

    Attributes:
        width: D, of the residual stream. Divides into ``heads``.
        state_width: K and V of a head's recurrent state; 0: those of a head of the exact branch, whose keys and values
            it then shares. Another width has keys and values of its own: a narrow state beside wide entries, say.
        patch_steps: P, steps in a token; 1 gives step-level routing.
        window_patches: W, the last patches of the own channel that are read exactly.
        cross_span_patches: how many of the last patches of other channels are read exactly (1 = the same step only).
        cross_reading: ``auto`` (covariates always, targets if validation favours it), ``always``, or ``never`` (each
            channel reads itself only).
        lookahead_patches: patches of a known-ahead channel that a token of the horizon also carries.
        half_life_steps: of the causal normaliser; the first scales, the others say where the level stands.
        router: names of ``ROUTERS`` joined by "+"; a token is kept if any of them asks for it.
        head_reduction: how a score per head becomes one per token: ``min`` (the paper's), ``mean`` or ``max``.
        mixer: ``ham``, or one of its rivals, of the same bytes: see ``hamts.nn.mixers``.
        pool_patches: of ``pooled``, patches that become one entry.
        block_patches, top_blocks: of ``block_sparse``, patches in a block and blocks that a query reads.
        neighbours: of ``neighbours``, stretches of the past that a query goes on with.
        learned_features: what the learned score sees: ``token`` alone (the paper's), or the ``state``'s error and gates
            too.
        decision: ``channel``: each channel's token by itself; ``step``: all channels of a moment are kept if one asks.
        resolution: ``patch``: a kept token is one entry; ``step``: its steps are entries of their own, P to a token, so
            that single steps can be read. Each counts in bytes.
        allocation: how the budget spreads over layers, channels and items: ``uniform``: each layer gets its share;
            ``pooled``: one threshold over all layers, spend where it helps; ``normalised``: each stream's score against
            its own past, so each gets its share; ``learned``: that plus a learned level, one threshold over all layers.
            Thresholds that are tracked follow the part of the whole that a layer takes under one threshold; a budget in
            bytes is split evenly over layers all the same.
        event_context: whether the tokens of all channels know from the start which events and actions happen in their
            patch; else they read it from those channels, a layer later. An event is then also read alike whether or not
            it is known what follows in its patch; models fitted with it before that was so must be fitted anew.
        entry_bias, match_gain: at first, what is added to the logits of entries, and how sharply queries match keys.
        gate_start: at first, what is added to the gates of the exact read and of the output, of every mixer: 3 opens
            both, so that what is looked up is heard from the first step on; 0: half open.
        queries_from_keys: whether queries of the exact read start with the weights of its keys: like finds like.
        read_reference: keys up to which logits of the exact read are as they are; with more they are multiplied by
            log(keys) / log(this), so that a long list does not drown what matches. 0: never.
        rotary_share: of a head's width that turns with time; the rest matches content at any age.
        write_clip: most that the residual written to the state may exceed its running scale, 0 for no limit. Clipping
            makes the rule nonlinear: it then runs step by step.
    """

    width: int = 128
    layers: int = 2
    heads: int = 4
    state_width: int = 0
    patch_steps: int = 12
    window_patches: int = 2
    cross_span_patches: int = 1
    cross_reading: str = "auto"
    lookahead_patches: int = 1
    half_life_steps: tuple[float, ...] = (72.0, 288.0, 1152.0)
    router: str = "learned+tags"
    head_reduction: str = "mean"
    mixer: str = "ham"
    pool_patches: int = 8
    block_patches: int = 16
    top_blocks: int = 4
    neighbours: int = 8
    learned_features: str = "state"
    decision: str = "channel"
    resolution: str = "patch"
    allocation: str = "uniform"
    event_context: bool = False
    entry_bias: float = -4.0
    match_gain: float = 1.0
    gate_start: float = 0.0
    queries_from_keys: bool = False
    read_reference: int = 0
    rotary_share: float = 0.5
    write_clip: float = 0.0
    mlp_ratio: float = 2.0
    dropout: float = 0.1
    quantiles: tuple[float, ...] = QUANTILES

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            wrong = f"width={self.width}, heads={self.heads}"
            raise ValueError(f"width must divide into 2 x heads. Got {wrong}. Choose a width that is a multiple.")
        counts = ("width", "layers", "heads", "patch_steps", "window_patches")
        for name in (*counts, "pool_patches", "block_patches", "top_blocks", "neighbours"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1. Got {getattr(self, name)}.")
        if not 1 <= self.cross_span_patches <= self.window_patches:
            wrong = f"{self.cross_span_patches} with window_patches={self.window_patches}"
            raise ValueError(f"cross_span_patches must lie in 1..window_patches. Got {wrong}.")
        nothings = {"state_width": "that of a head", "write_clip": "no limit", "read_reference": "logits as they are"}
        for name, nothing in nothings.items():
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 ({nothing}) or more. Got {getattr(self, name)}.")
        if self.read_reference == 1 or not 0 <= self.rotary_share <= 1:
            wrong = f"read_reference={self.read_reference}, rotary_share={self.rotary_share}"
            raise ValueError(f"read_reference must not be 1, and rotary_share lie in [0, 1]. Got {wrong}.")
        unknown = [name for name in self.router_names if name not in ROUTERS]
        if unknown or not self.router_names:
            raise ValueError(f"Unknown router {self.router!r}. Available: {sorted(ROUTERS)}, joined by '+'.")
        _known("cross_reading", self.cross_reading, ("auto", "always", "never"))
        _known("head_reduction", self.head_reduction, ("min", "mean", "max"))
        _known("learned_features", self.learned_features, ("state", "token"))
        _known("decision", self.decision, ("channel", "step"))
        _known("resolution", self.resolution, ("patch", "step"))
        _known("allocation", self.allocation, ALLOCATIONS)
        _known("mixer", self.mixer, MIXERS)
        if 0.5 not in self.quantiles or list(self.quantiles) != sorted(set(self.quantiles)):
            raise ValueError(f"quantiles must rise and hold 0.5. Got {self.quantiles}.")

    @property
    def head_state_width(self) -> int:
        """K and V of a head's state."""
        return self.state_width or self.width // self.heads

    @property
    def entries_per_token(self) -> int:
        """Entries that a kept token becomes."""
        return self.patch_steps if self.resolution == "step" else 1

    @property
    def router_names(self) -> tuple[str, ...]:
        return tuple(name for name in self.router.split("+") if name)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> ModelConfig:
        tuples = {name: tuple(content[name]) for name in ("half_life_steps", "quantiles")}
        return cls(**{**content, **tuples})


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """How much is kept.

    Attributes:
        budget_share: share of the observed tokens asked for; 0 = recurrent state + window, 1 = everything observed.
        budget_bytes: hard cap of one item's scratchpads, over all layers.
        must_keep_share: part of the cap reserved for tagged tokens.
        explore_share: in training, share of unrouted tokens kept at random so that scores of dropped ones learn too.
        threshold: ``fixed`` after training, or tracked online so that usage follows the share asked for: ``quantile``,
            a step for every token; ``feedback``, a step against the running usage (as the paper's Algorithm 2);
            ``block``, a step on the logarithm at every 64th patch.
        eviction: what leaves a full list: ``fifo``, the oldest; ``lowest``, the lowest score; ``must_last``, the oldest
            without a tag, tags taking room from the rest as they come; ``reservoir``, a random one, so that what is
            held is an even sample of all that was written.
        tag_types: event and action columns whose tags are treated in their own way; others have ``TagType``'s defaults.
        tag_half_life_patches: age at which the priority of a tag has halved; None: it never fades.
        budget_flops: most floating-point operations per step of one item, None for no such limit. Like bytes, it sets
            the most entries.
        budget_ms: the same in milliseconds, by a cost model fitted on this machine.
    """

    budget_share: float = 0.10
    budget_bytes: int = 512 * 2**10
    must_keep_share: float = 0.5
    explore_share: float = 0.10
    threshold: str = "fixed"
    eviction: str = "fifo"
    tag_types: tuple[TagType, ...] = ()
    tag_half_life_patches: float | None = None
    budget_flops: float | None = None
    budget_ms: float | None = None

    def __post_init__(self) -> None:
        for name in ("budget_share", "must_keep_share", "explore_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1]. Got {getattr(self, name)}.")
        if self.budget_bytes < 0:
            raise ValueError(f"budget_bytes must be 0 or more. Got {self.budget_bytes}.")
        _known("threshold", self.threshold, THRESHOLDS)
        _known("eviction", self.eviction, EVICTIONS)
        for name in ("tag_half_life_patches", "budget_flops", "budget_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, or None. Got {value}.")
        names = [one.name for one in self.tag_types]
        if len(set(names)) < len(names):
            raise ValueError(f"tag_types must name each column once. Got {names}.")
        reserved = sum(one.quota or 0.0 for one in self.tag_types)
        if reserved > 1 + 1e-9:
            raise ValueError(
                f"The quotas of tag_types must add up to 1 at most, they are shares of the must-keep entries. Got"
                f" {reserved:g}. Divide each by {reserved:g}, or raise must_keep_share to at least"
                f" {min(self.must_keep_share * reserved, 1.0):g} and divide them so."
            )

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> MemoryConfig:
        """Rebuild from ``asdict``, also after a trip through JSON; fields that were not there get their defaults."""
        types = tuple(one if isinstance(one, TagType) else TagType(**one) for one in content.get("tag_types", ()))
        return cls(**{**content, "tag_types": types})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the network is fitted.

    Attributes:
        max_steps: optimiser steps; None sizes them to the machine and the data.
        max_time_s: wall-clock seconds of fitting; None for no limit. Whatever came last is usable.
        batch_windows: windows (streams read side by side) in a step.
        context_patches: N, patches read per step by each stream, its memory carried from the step before.
        origins: forecasts made on the way through a context, evenly spaced, the last at its end.
        average_decay: of the moving average of the weights that is checked and kept.
        reset_share: chance that a stream restarts elsewhere after a step; it bounds how stale a carried entry can be.
        prefix_patches: most patches that a restarted stream reads before its first window, so that entries are old.
        span_share: chance that a training window hides a random span of its context.
        recall_share: chance that what follows an event in its patch is hidden where the stream has read the same event
            before, so that the loss asks what followed then.
        auxiliary_weight: weight of what teaches the learned scores beside the task.
        auxiliary_target: what that is: ``attention``, the mass an entry received; ``gain``, what dropping the entry
            would cost, to first order; ``none``.
        budget_flops: floating-point operations of training, in expectation over budgets and ages of streams; no more
            steps are taken than it allows. None for no such limit.
        inner_weight: weight of the one-patch-ahead loss of the inner heads, where a score uses them.
    """

    max_steps: int | None = None
    max_time_s: float | None = None
    batch_windows: int = 96
    context_patches: int = 14
    origins: int = 2
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    warmup_steps: int = 40
    gradient_clip: float = 1.0
    average_decay: float = 0.99
    reset_share: float = 0.08
    prefix_patches: int = 512
    span_share: float = 0.25
    recall_share: float = 0.0
    auxiliary_weight: float = 0.02
    auxiliary_target: str = "attention"
    inner_weight: float = 0.1
    budget_flops: float | None = None
    checks: int = 16
    patience: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        _known("auxiliary_target", self.auxiliary_target, AUXILIARY_TARGETS)
        if self.budget_flops is not None and not self.budget_flops > 0:
            raise ValueError(f"budget_flops of training must be above 0, or None. Got {self.budget_flops}.")


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What a stream does with rows that are not simply the next ones, and how it learns from its own errors.

    Attributes:
        late: of a row before the last one that never came: ``reopen`` takes it while its patch is unfinished and drops
            it later, ``drop`` drops it, ``error`` refuses the frame.
        correction: of other values for a row that was taken: ``error``, ``ignore``, or ``apply`` while its patch is
            unfinished. What the state has read cannot be unlearned.
        jump: of a row more than ``max_jump_steps`` ahead: ``quarantine`` leaves it out, ``error``, or ``accept``.
        recent_rows: last steps of each item whose values are known by a hash, to tell replayed rows from corrected.
        surprise: whether new rows are scored against the forecast made when their patch began.
        score_rows: past scores of an item that a new one is ranked among.
        calibrate: whether forecasts are shifted by what the stream learned from its own errors.
        calibration_rate: step of that learning, in scales of the stream.
        drift_scales: deviation from the stream's level, in its scales, from which a row counts as drifted.
        items_side_by_side: items read in one pass of the network.
        store: where scratchpads lie: ``padded``, each with room for the longest of all, or ``paged``, in rows that all
            items share, which takes less where they differ in length. Results and saved states are the same.
        device: where it runs, ``cpu``, ``cuda`` or ``cuda:0`` and so on. A saved state knows nothing of it.
        recorded: whether a step of each size is recorded once and replayed, as a CUDA graph; of ``paged`` on a GPU.
    """

    late: str = "reopen"
    correction: str = "error"
    jump: str = "quarantine"
    max_jump_steps: int = 20_000
    recent_rows: int = 512
    surprise: bool = True
    score_rows: int = 512
    calibrate: bool = False
    calibration_rate: float = 0.02
    drift_scales: float = 50.0
    items_side_by_side: int = 128
    store: str = "padded"
    device: str = "cpu"
    recorded: bool = False

    def __post_init__(self) -> None:
        choices = {
            "late": ("reopen", "drop", "error"),
            "correction": ("error", "ignore", "apply"),
            "jump": ("quarantine", "error", "accept"),
            "store": ("padded", "paged"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {sorted(allowed)}. Got {getattr(self, name)!r}.")
        for name in ("max_jump_steps", "recent_rows", "score_rows", "items_side_by_side"):
            if not hasattr(value := getattr(self, name), "__index__") or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1. Got {value!r}.")
            object.__setattr__(self, name, int(value))  # numpy's would not go into a saved state
        for name in ("calibration_rate", "drift_scales"):
            if not hasattr(value := getattr(self, name), "__float__") or isinstance(value, bool) or not value > 0:
                raise ValueError(f"{name} must be a number above 0. Got {value!r}.")
            object.__setattr__(self, name, float(value))


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """On what a fit runs, and how; it changes speed and memory, and results by rounding alone.

    Attributes:
        accelerator: ``auto``, ``cpu``, ``gpu`` or ``cuda``; ``auto`` takes a CUDA device where there is one.
        precision: of lightning; ``bf16-mixed`` keeps scores, gates and states in float32.
        kernel: what runs the recurrence and the read: ``auto``, ``torch``, ``fla``, ``triton`` or ``fla+triton``.
        strategy: how several processes share a fit: ``auto``, ``ddp``, or ``fsdp``, which also spreads the weights.
        devices: processes, one a device; ``batch_windows`` divides by it.
        accumulate: batches whose gradients make one optimiser step.
        checkpointing: whether blocks compute their inner tensors again for the gradient instead of keeping them.
        compile_mode: ``none``; ``default`` fuses the arithmetic between kernels; ``reduce-overhead`` also replays CUDA
            graphs, for short contexts. The first steps then wait for the compiler.
        cuda_graphs: record the passes and gradients of a step once and replay them, where launching takes longer than
            computing, as on short contexts; with kernel ``fla+triton`` on one GPU.
    """

    accelerator: str = "auto"
    precision: str = "32-true"
    kernel: str = "auto"
    strategy: str = "auto"
    devices: int = 1
    accumulate: int = 1
    checkpointing: bool = False
    compile_mode: str = "none"
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        for name in ("devices", "accumulate"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1. Got {value!r}.")
        for name, allowed in MACHINE_CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"Unknown {name} {getattr(self, name)!r}. Available: {list(allowed)}.")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A size: what changes in the model and in training."""

    model: dict[str, Any]
    train: dict[str, Any]


PRESETS: dict[str, Preset] = {
    "tiny": Preset(model={"width": 32, "layers": 1, "heads": 2}, train={"max_steps": 150, "batch_windows": 32}),
    "small": Preset(model={"width": 128, "layers": 2, "heads": 4}, train={}),
    "base": Preset(model={"width": 192, "layers": 4, "heads": 6}, train={"learning_rate": 1e-3}),
}


def with_preset(preset: str, model: ModelConfig, train: TrainConfig) -> tuple[ModelConfig, TrainConfig]:
    """Apply a preset's sizes to two configurations."""
    if preset not in PRESETS:
        raise ValueError(f"Unknown preset {preset!r}. Available: {sorted(PRESETS)}.")
    return replace(model, **PRESETS[preset].model), replace(train, **PRESETS[preset].train)
