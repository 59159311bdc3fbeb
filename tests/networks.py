"""Small networks, panels and tokens for tests: untrained but perturbed, with thresholds at which routing happens.

B items · I items · C channels · N patches · P steps in a patch · D width · H heads · K key · V value · W window patches
S score routers · R marks
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch

from hamts.config import MemoryConfig, ModelConfig
from hamts.data.panel import Channel, Dialect, Frequency, Panel, Schema, StaticColumn
from hamts.data.patches import Chunk, PatchStore, build_store
from hamts.nn.backbone import ChannelSpec
from hamts.nn.ham import HAMLayer
from hamts.nn.scratchpad import Pending
from hamts.nn.tokens import Policy, Tokens
from hamts.reader import HAMNetwork, Reading

# every role, two targets, one channel of categories
CHANNELS = (
    Channel("load", "target"),
    Channel("price", "target"),
    Channel("wind", "past"),
    Channel("mode", "past", kind="categorical", levels=("low", "high")),
    Channel("forecast", "future"),
    Channel("alarm", "event"),
    Channel("valve", "action"),
)
LOAD, PRICE, WIND, MODE, FORECAST, ALARM, VALVE = range(len(CHANNELS))
ROUTER_CHOICES = ("learned+tags", "surprise", "innovation+tags", "surprise+learned", "tags")
LENGTHS = (64, 47, 29)
STARTS = ("2024-01-01T00", "2024-03-05T05", "2024-06-07T02")
PATCH_STEPS = 3
HORIZON = 7


def make_schema(channels: tuple[Channel, ...] = CHANNELS, *, static: bool = True) -> Schema:
    columns = (StaticColumn("size"), StaticColumn("site", "categorical", ("a", "b"))) if static else ()
    dialect = Dialect(name="nixtla", id_column="unique_id", time_column="ds", library="pandas")
    return Schema(channels, columns, Frequency("calendar", "h", 24, 24), dialect)


def make_values(steps: int, rng: np.random.Generator) -> np.ndarray:
    """One item with gaps, bursts, rare events and a piecewise constant action, [T, C]."""
    values = np.empty((steps, len(CHANNELS)))
    time = np.arange(steps)
    values[:, LOAD] = 10 + 3 * np.sin(time / 3) + rng.normal(size=steps)
    values[:, PRICE] = 200 + np.cumsum(rng.normal(size=steps) * 5)
    values[:, WIND] = rng.gamma(2.0, size=steps)
    values[:, MODE] = rng.integers(0, 3, size=steps)
    values[:, FORECAST] = 4 * np.cos(time / 5) + rng.normal(size=steps)
    values[:, ALARM] = (rng.random(steps) < 0.08) * rng.integers(1, 4, size=steps)
    values[:, VALVE] = np.repeat(rng.integers(0, 3, size=steps // 9 + 1), 9)[:steps]
    values[rng.random(steps) < 0.1, LOAD] = np.nan
    values[rng.random(steps) < 0.3, WIND] = np.nan
    values[rng.random(steps) < 0.05, FORECAST] = np.nan
    gap = int(rng.integers(steps // 3, steps // 2))
    values[gap : gap + 8, : MODE + 1] = np.nan
    values[gap + 2 : gap + 6] = np.nan
    return values


def make_panel(lengths: tuple[int, ...] = LENGTHS, *, seed: int = 0) -> Panel:
    """Items of different lengths and hours; the price of the second one begins late, of the third very late."""
    rng = np.random.default_rng(seed)
    items = [make_values(steps, rng) for steps in lengths]
    if len(items) > 1:
        items[1][: lengths[1] // 2, PRICE] = np.nan
        items[-1][: lengths[-1] - 4, PRICE] = np.nan
    values = np.concatenate(items)
    offset = np.zeros(values.shape, dtype=np.float32)
    offset[:, ALARM] = np.where(values[:, ALARM] > 0, rng.random(len(values)), 0.0)
    return Panel(
        values=values,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        item_ids=np.array([f"item {i}" for i in range(len(lengths))], dtype=object),
        starts=np.array([STARTS[i % len(STARTS)] for i in range(len(lengths))], dtype="datetime64[ns]"),
        schema=make_schema(),
        event_offset=offset,
        static_values=np.stack([rng.normal(size=len(lengths)), rng.integers(0, 3, size=len(lengths))], 1),
    )


def take_items(panel: Panel, items: list[int]) -> Panel:
    """Some items of a panel, in the order asked for."""
    rows = np.concatenate([np.arange(panel.offsets[i], panel.offsets[i + 1]) for i in items])
    return replace(
        panel,
        values=panel.values[rows],
        offsets=np.concatenate([[0], np.cumsum(panel.lengths[items])]),
        item_ids=panel.item_ids[items],
        starts=panel.starts[items],
        event_offset=None if panel.event_offset is None else panel.event_offset[rows],
        static_values=None if panel.static_values is None else panel.static_values[items],
    )


def cut_items(panel: Panel, lengths: list[int]) -> Panel:
    """The first steps of every item."""
    rows = np.concatenate([panel.offsets[i] + np.arange(n) for i, n in enumerate(lengths)])
    return replace(
        panel,
        values=panel.values[rows],
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        event_offset=None if panel.event_offset is None else panel.event_offset[rows],
    )


def make_future(panel: Panel, steps: int = HORIZON, *, seed: int = 1) -> np.ndarray:
    """Known-ahead values after each item's end, [I, F, C]; NaN in every other channel."""
    rng = np.random.default_rng(seed)
    future = np.full((panel.n_items, steps, len(CHANNELS)), np.nan)
    future[..., FORECAST] = rng.normal(size=future.shape[:2])
    future[..., VALVE] = rng.integers(0, 3, size=future.shape[:2])
    return future


def make_store(panel: Panel, *, patch_steps: int = PATCH_STEPS, extra_steps: int = HORIZON) -> PatchStore:
    return build_store(panel, patch_steps=patch_steps, extra_steps=extra_steps, future=make_future(panel, extra_steps))


def make_spec(panel: Panel, store: PatchStore) -> ChannelSpec:
    return ChannelSpec(
        roles=tuple(c.role for c in panel.schema.channels),
        levels=tuple(len(c.levels) for c in panel.schema.channels),
        calendar_features=store.calendar.shape[1],
        static_numeric=store.static_values.shape[1],
        static_levels=tuple(len(c.levels) for c in panel.schema.static if c.kind == "categorical"),
        names=tuple(c.name for c in panel.schema.channels),
    )


def make_config(**changes: Any) -> ModelConfig:
    small = {
        "width": 16,
        "layers": 2,
        "heads": 2,
        "patch_steps": PATCH_STEPS,
        "half_life_steps": (12.0, 48.0),
        "quantiles": (0.1, 0.5, 0.9),
        "dropout": 0.0,
    }
    return ModelConfig(**{**small, **changes})


def perturb(module: torch.nn.Module, generator: torch.Generator, *, size: float = 0.3) -> None:
    """Move every parameter, so that none hides a mistake by being 0 or 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = size * max(float(parameter.std()) if parameter.numel() > 1 else 0.0, 0.3)
            parameter.add_(scale * noise.to(parameter.dtype))


@torch.no_grad()
def open_scratchpad(layer: HAMLayer) -> None:
    """Let entries weigh as much as fresh keys, a little different in each head."""
    layer.scratch_bias.copy_(torch.linspace(-0.5, 0.5, layer.heads))


def make_network(
    config: ModelConfig | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float64, calibrate: bool = True
) -> HAMNetwork:
    """An untrained network for the channels above, its thresholds calibrated on a panel of its own."""
    generator = torch.Generator().manual_seed(seed)
    panel = make_panel(seed=seed + 100)
    config = make_config() if config is None else config
    store = make_store(panel, patch_steps=config.patch_steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = HAMNetwork(config, MemoryConfig(), make_spec(panel, store))
    perturb(network, generator)
    for layer in network.backbone.layers():
        open_scratchpad(layer)
    network.unit.copy_(torch.from_numpy(np.nanstd(panel.values, axis=0)))
    network = network.to(dtype).eval()
    network.unit = network.unit.double()
    if calibrate:
        calibrate_on(network, store)
    return network


@torch.no_grad()
def calibrate_on(network: HAMNetwork, store: PatchStore) -> None:
    """Thresholds at the quantiles of what the network says about a store, layer by layer."""
    for number, layer in enumerate(network.backbone.layers()):
        reading = read_all(network, store, policy_for(network, store.n_items, share=0.3))
        layer.thresholds.calibrate(reading.traces[number].scores[reading.heard >= 0.5])


def policy_for(network: HAMNetwork, items: int, *, share: float = 0.3, **changes: Any) -> Policy:
    """One share for all items, without caps unless they are given."""
    kind = network.head.project.weight.dtype
    policy = network.policy(torch.full((items,), share, dtype=kind), capped=False)
    return replace(policy, **changes)


def whole_chunk(store: PatchStore) -> Chunk:
    """All complete patches of all items, aligned at their ends: shorter items begin with absent patches."""
    items = torch.arange(store.n_items)
    stop = (store.lead + store.lengths) // store.patch_steps
    patches = int(stop.max())
    return store.window(items, stop - patches, patches)


@torch.no_grad()
def read_all(network: HAMNetwork, store: PatchStore, policy: Policy, **options: Any) -> Reading:
    """One pass over everything, from an empty memory."""
    return network(whole_chunk(store), network.empty_memory(store.n_items), policy, **options)


def random_tokens(
    generator: torch.Generator,
    *,
    items: int = 2,
    channels: int = 3,
    patches: int = 12,
    patch_steps: int = 2,
    dtype: torch.dtype = torch.float64,
) -> Tokens:
    """Tokens with gaps, tags, irregular time and a late start of the last item, for a layer alone."""

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)

    grid = (items, channels, patches)
    present = torch.ones(items, patches, dtype=torch.bool)
    present[-1, : patches // 4] = False
    observed = (uniform(*grid, patch_steps) < 0.8) & (uniform(*grid, 1) < 0.85) & present[:, None, :, None]
    must_keep = (uniform(*grid) < 0.15) & present[:, None]
    tags = must_keep[..., None] & (uniform(*grid, patch_steps) < 0.7)
    heard = torch.where(must_keep, torch.ones((), dtype=dtype), observed.to(dtype).mean(-1))
    elapsed = 0.5 + uniform(items, patches)
    nothing = torch.zeros(*grid, 0, dtype=dtype)
    return Tokens(
        values=torch.where(observed, uniform(*grid, patch_steps), 0.0),
        observed=observed,
        tags=tags,
        event_offset=torch.zeros(*grid, patch_steps, dtype=dtype),
        ahead_values=nothing,
        ahead_observed=nothing.bool(),
        calendar=torch.zeros(items, patches, 0, dtype=dtype),
        level=nothing,
        marks=torch.cat([uniform(*grid, 2) - 0.5, torch.ones(*grid, 1, dtype=dtype)], -1),
        heard=heard,
        present=present,
        routable=heard >= 0.5,
        must_keep=must_keep,
        position=elapsed.double().cumsum(1),
        elapsed=elapsed,
        static_values=torch.zeros(items, 0, dtype=dtype),
        static_codes=torch.zeros(items, 0, dtype=torch.int64),
        markable=observed.any(-1),
    )


def dense_read(
    layer: HAMLayer, queries: torch.Tensor, local: Pending, routed: torch.Tensor, policy: Policy
) -> tuple[torch.Tensor, torch.Tensor]:
    """The read with an explicit mask over all tokens, [B, N, C, W + N, C], from an empty scratchpad."""
    B, N, C = queries.shape[:3]
    W, S = layer.window, layer.cross_span
    near = torch.zeros(B, N, C, W + N, C, dtype=torch.bool)
    exact = torch.zeros(B, N, C, W + N, C, dtype=torch.bool)
    for n in range(N):
        for c in range(C):
            near[:, n, c, n + 1 : n + W + 1, c] = True
        other = policy.readable & ~torch.eye(C, dtype=torch.bool)  # [B, C, C]
        near[:, n, :, n + W + 1 - S : n + W + 1] |= other[:, :, None]
        for b in range(B):
            for must_keep, cap in ((True, policy.cap_must), (False, policy.cap_kept)):
                left = (routed[b, : n + 1] & (local.must_keep[b, : n + 1] == must_keep)).nonzero().tolist()
                for step, channel in left if cap is None else left[-cap:]:
                    exact[b, n, :, step, channel] = policy.readable[b, :, channel]
                    exact[b, n, channel, step, channel] = True
    near &= local.present[:, None, None]
    own = torch.eye(C, dtype=queries.dtype)
    logits = torch.einsum("bnchk,blshk->bnchls", queries, local.keys)
    logits = logits + torch.einsum("cs,h->chs", own, layer.channel_bias)[..., None, :]
    kept = local.bias[..., None] + layer.scratch_bias  # [B, W + N, C, H]
    logits = logits + torch.where(exact[..., None], kept[:, None, None], 0.0).movedim(-1, 3)
    seen = (near | exact)[:, :, :, None]
    weight = logits.masked_fill(~seen, -torch.inf).flatten(-2).softmax(-1).nan_to_num().unflatten(-1, (W + N, C))
    output = torch.einsum("bnchls,blshv->bnchv", weight, local.values)
    return output, torch.einsum("bnchls,cs,blsr->bnchr", weight, own, local.marks)


def leaves(tree: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of nested dataclasses and lists, by its path."""
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    found: dict[str, torch.Tensor] = {}
    if isinstance(tree, list | tuple):
        for number, part in enumerate(tree):
            found |= leaves(part, f"{path}[{number}]")
    elif is_dataclass(tree) and not isinstance(tree, type):
        for field in fields(tree):
            found |= leaves(getattr(tree, field.name), f"{path}.{field.name}")
    return found
