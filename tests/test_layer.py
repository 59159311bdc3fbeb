"""The HAM layer alone, on random tokens.

B items · C channels · N patches · H heads · K key · M entries · S score routers · A shares of the table · Q quantiles
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import dense_read, leaves, make_config, open_scratchpad, perturb, random_tokens
from test_layer_parts import SEEDS, loop_error_mean

from hamts.config import ModelConfig
from hamts.nn.controls import Control
from hamts.nn.ham import HAMLayer, HeadNorm, LayerOutput, rotate
from hamts.nn.router import (
    BIAS_FLOOR,
    innovation,
    log_bias,
    surprise,
)
from hamts.nn.scratchpad import LayerMemory, Pending
from hamts.nn.tokens import Policy, Tokens, map_tensors
from hamts.ops import kernels, naive


def make_layer(seed: int = 0, **changes: Any) -> tuple[HAMLayer, ModelConfig]:
    config = make_config(**changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = HAMLayer(config)
    perturb(layer, torch.Generator().manual_seed(seed))
    open_scratchpad(layer)
    return layer.double().eval(), config


def read_tokens(
    layer: HAMLayer, x: torch.Tensor, tokens: Tokens, policy: Policy, memory: LayerMemory | None = None, **options: Any
) -> LayerOutput:
    start = layer.empty_memory(len(x), x.shape[1], x) if memory is None else memory
    return layer(x, tokens=tokens, memory=start, policy=policy, **options)


def cut_tokens(tokens: Tokens, low: int, high: int) -> Tokens:
    """Some patches of a chunk."""
    by_item = {"calendar", "present", "position", "elapsed"}
    fixed = {"static_values", "static_codes"}
    return replace(
        tokens,
        **{
            name: getattr(tokens, name)[:, low:high] if name in by_item else getattr(tokens, name)[:, :, low:high]
            for name in Tokens.__dataclass_fields__
            if name not in fixed
        },
    )


def open_policy(items: int, channels: int, share: float = 0.4, **changes: Any) -> Policy:
    readable = torch.ones(items, channels, channels, dtype=torch.bool)
    # the last channel of the first item reads itself only
    readable[0, -1] = torch.arange(channels) == channels - 1
    return Policy(share=torch.full((items,), share, dtype=torch.float64), readable=readable, **changes)


def assert_same_memory(got: LayerMemory, wanted: LayerMemory) -> None:
    """Equal but for the padding of the scratchpad."""
    mine, other = leaves(got), leaves(wanted)
    assert torch.equal(got.scratchpad.alive.sum(1), wanted.scratchpad.alive.sum(1))
    for name, tensor in other.items():
        value = mine[name]
        if name.startswith(".scratchpad"):
            value, tensor = value[got.scratchpad.alive], tensor[wanted.scratchpad.alive]
        assert torch.allclose(value.double(), tensor.double(), rtol=0, atol=1e-10), name


def setting(
    seed: int, router: str, window: int, *, patches: int = 12
) -> tuple[HAMLayer, torch.Tensor, Tokens, torch.Generator]:
    """A layer with thresholds at which it routes, and something to read."""
    generator = torch.Generator().manual_seed(seed)
    layer, config = make_layer(seed, router=router, window_patches=window, cross_span_patches=1 + seed % window)
    tokens = random_tokens(generator, patches=patches)
    x = torch.randn(2, 3, patches, config.width, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        trace = read_tokens(layer, x, tokens, open_policy(2, 3)).trace
        layer.thresholds.calibrate(trace.scores[tokens.routable])
    return layer, x, tokens, generator


class ByHand:
    """A layer as its equations say, one step after the other, from an empty memory; all sizes as in the layer."""

    def __init__(self, layer: HAMLayer, x: torch.Tensor, tokens: Tokens, policy: Policy) -> None:
        self.layer, self.x, self.tokens, self.policy = layer, x, tokens, policy
        B, C, N, D = x.shape
        self.heads, self.width = layer.heads, layer.head_width
        shape = (B, C, N, self.heads, self.width)
        self.recalled, self.predicted, self.came = (torch.zeros(shape, dtype=x.dtype) for _ in range(3))
        self.write, self.error = torch.zeros(shape[:4], dtype=x.dtype), torch.zeros(shape[:4], dtype=x.dtype)
        self.state = torch.zeros(B, C, self.heads, self.width, self.width, dtype=x.dtype)
        for b in range(B):
            for c in range(C):
                self._recur(b, c)
        self._score()
        self._read()

    def _recur(self, b: int, c: int) -> None:
        layer, tokens, H, K = self.layer, self.tokens, self.heads, self.width
        N, D = self.x.shape[2:]
        inputs = torch.stack([layer.to_memory(self.x[b, c, n]) * tokens.present[b, n] for n in range(N)])  # [N, 3 D]
        for n in range(N):
            mixed = torch.zeros(3 * D, dtype=self.x.dtype)
            for back in range(4):
                if n >= back:
                    mixed = mixed + layer.conv[:, 3 - back] * inputs[n - back]
            q, k, v = torch.nn.functional.silu(mixed).view(3, H, K)
            q, k = q / q.norm(dim=-1, keepdim=True).clamp_min(1e-12), k / k.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            gates = layer.to_gates(self.x[b, c, n]).view(4, H)
            passed = tokens.elapsed[b, n] * tokens.present[b, n]
            decay = torch.exp(-torch.nn.functional.softplus(gates[0] + layer.decay_rate) * passed)  # [H]
            beta = gates[1].sigmoid() * tokens.heard[b, c, n]  # [H]
            for h in range(H):
                state = self.state[b, c, h] * decay[h]
                self.predicted[b, c, n, h] = state.T @ k[h]
                error = v[h] - self.predicted[b, c, n, h]
                self.state[b, c, h] = state + torch.outer(k[h], beta[h] * error)
                self.recalled[b, c, n, h] = self.state[b, c, h].T @ q[h]
                self.error[b, c, n, h] = error.square().sum()
            self.came[b, c, n], self.write[b, c, n] = v, beta

    def _score(self) -> None:
        layer, tokens = self.layer, self.tokens
        empty = torch.zeros(*self.x.shape[:2], self.heads, 2, dtype=self.x.dtype)
        mean, _ = loop_error_mean(self.error, tokens.heard > 0, empty)  # [B, C, N, H]
        fresh = innovation(self.error, mean).mean(-1)  # [B, C, N]
        angle = surprise(self.predicted, self.came).mean(-1)  # [B, C, N]
        available = {"innovation": fresh, "surprise": angle}
        self.bias = torch.zeros_like(fresh)  # [B, C, N]
        if layer.router.learned is not None:
            observed, tagged = tokens.observed.double().mean(-1), tokens.tags.any(-1).double()
            columns = [fresh.log1p(), angle, self.write.mean(-1), observed, tagged, tokens.must_keep.double()]
            logit = layer.router.learned(torch.cat([self.x, torch.stack(columns, -1)], -1))[..., 0]  # [B, C, N]
            available["learned"] = logit
            self.bias = torch.where(tokens.must_keep & layer.router.uses_tags, 0.0, log_bias(logit))
        threshold = layer.thresholds(self.policy.share)  # [B, S]
        self.routed = tokens.must_keep & layer.router.uses_tags  # [B, C, N]
        for number, name in enumerate(layer.router.names):
            above = available[name] >= threshold[:, number, None, None]
            self.routed = self.routed | (tokens.routable & above)

    def _read(self) -> None:
        layer, tokens, W = self.layer, self.tokens, self.layer.window
        H, K = self.heads, self.width
        grid = (*self.x.shape[:3], 3, H, K)
        _, keys, values = (layer.to_memory(self.x) * tokens.present[:, None, :, None]).view(grid).unbind(3)

        def padded(chunk: torch.Tensor) -> torch.Tensor:
            """[B, C, N, ...] -> [B, W + N, C, ...], nothing before the chunk."""
            chunk = chunk.transpose(1, 2)
            return torch.cat([chunk.new_zeros(len(chunk), W, *chunk.shape[2:]), chunk], 1)

        local = Pending(
            keys=padded(rotate(layer.key_norm(keys).transpose(1, 2), tokens.position).transpose(1, 2)),
            values=padded(values),
            marks=padded(tokens.marks),
            bias=padded(self.bias),
            scores=padded(self.bias[..., None]),
            position=tokens.position,
            present=padded(tokens.present[:, None].expand(-1, self.x.shape[1], -1)),
            routable=padded(tokens.routable),
            must_keep=padded(tokens.must_keep & layer.router.uses_tags),
        )
        query = layer.query_norm(layer.to_query(self.x).view(*self.x.shape[:3], H, K)).transpose(1, 2)
        query = rotate(query, tokens.position) / math.sqrt(K)  # [B, N, C, H, K]
        exact, marks = dense_read(layer, query, local, padded(self.routed), self.policy)
        share, now = marks[..., 2], tokens.marks.transpose(1, 2)[..., None, :]  # [B, N, C, H], [B, N, C, 1, R]
        level = torch.asinh((marks[..., 0] - share * now[..., 0]) / now[..., 1].exp())  # [B, N, C, H]
        spread = (marks[..., 1] - share * now[..., 1]).clamp(-5, 5)  # [B, N, C, H]
        exact = exact + level[..., None] * layer.from_marks[:, 0] + spread[..., None] * layer.from_marks[:, 1]
        gates = layer.to_gates(self.x).view(*self.x.shape[:3], 4, H).sigmoid()
        both = gates[..., 2, :, None] * layer.recurrent_norm(self.recalled)
        both = both + gates[..., 3, :, None] * layer.exact_norm(exact.transpose(1, 2))  # [B, C, N, H, V]
        self.output = layer.to_output(both.flatten(-2) * layer.to_output_gate(self.x).sigmoid())


@pytest.mark.parametrize("seed", range(10))
@torch.no_grad()
def test_a_layer_does_what_its_equations_say(seed: int) -> None:
    router = ("learned+tags", "surprise", "innovation+tags", "surprise+learned", "tags")[seed % 5]
    layer, x, tokens, _ = setting(seed, router, 1 + seed % 3)
    caps = {"cap_kept": 4, "cap_must": 2} if seed < 7 else {}
    policy = open_policy(2, 3, **caps)
    wanted = ByHand(layer, x, tokens, policy)
    got = read_tokens(layer, x, tokens, policy)
    assert torch.equal(got.trace.routed, wanted.routed)
    assert torch.allclose(got.memory.state, wanted.state, rtol=0, atol=1e-10)
    assert torch.allclose(got.output, wanted.output, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_layer_never_looks_ahead(seed: int) -> None:
    router = ("learned+tags", "surprise", "innovation+tags", "surprise+learned", "tags")[seed % 5]
    layer, x, tokens, generator = setting(seed, router, 1 + seed % 3)
    policy = open_policy(2, 3, cap_kept=4, cap_must=2)
    here = 1 + seed % 11
    other_tokens = random_tokens(generator, patches=12)
    edited = map_tensors(tokens, torch.clone)
    for name in Tokens.__dataclass_fields__:
        if name not in ("static_values", "static_codes"):
            axis = 1 if name in ("calendar", "present", "position", "elapsed") else 2
            rest = slice(here, None)
            index = (slice(None),) * axis + (rest,)
            getattr(edited, name)[index] = getattr(other_tokens, name)[index]
    other_x = x.clone()
    other_x[:, :, here:] = torch.randn(x[:, :, here:].shape, generator=generator, dtype=torch.float64)
    one = read_tokens(layer, x, tokens, policy)
    two = read_tokens(layer, other_x, edited, policy)
    # what the future adds to the scratchpad makes products longer, which may round otherwise
    assert torch.allclose(one.output[:, :, :here], two.output[:, :, :here], rtol=0, atol=1e-12)
    assert not torch.allclose(one.output[:, :, here:], two.output[:, :, here:], rtol=0, atol=1e-3)
    assert torch.equal(one.trace.scores[:, :, :here], two.trace.scores[:, :, :here])
    assert torch.equal(one.trace.routed[:, :, :here], two.trace.routed[:, :, :here])
    before = read_tokens(layer, x[:, :, :here], cut_tokens(tokens, 0, here), policy)
    assert torch.allclose(one.output[:, :, :here], before.output, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_layer_reads_chunks_as_it_reads_the_whole(seed: int) -> None:
    router = ("learned+tags", "surprise", "innovation+tags", "surprise+learned", "tags")[seed % 5]
    layer, x, tokens, _ = setting(seed, router, 1 + seed % 3, patches=14)
    policy = open_policy(2, 3, cap_kept=4, cap_must=2)
    whole = read_tokens(layer, x, tokens, policy)
    memory, outputs = None, []
    for low, high in ((0, 1), (1, 6), (6, 7), (7, 14)):
        part = layer.step if high - low == 1 else layer
        start = layer.empty_memory(2, 3, x) if memory is None else memory
        result = part(x[:, :, low:high], tokens=cut_tokens(tokens, low, high), memory=start, policy=policy)
        memory = result.memory
        outputs.append(result.output)
        assert torch.equal(result.trace.routed, whole.trace.routed[:, :, low:high])
    assert torch.allclose(torch.cat(outputs, 2), whole.output, rtol=0, atol=1e-10)
    assert memory is not None
    assert_same_memory(memory, whole.memory)
    assert whole.memory.scratchpad.alive.sum(1).max() >= 2


def test_a_forecast_needs_no_memory_after_it() -> None:
    layer, x, tokens, _ = setting(3, "learned+tags", 2)
    start = layer.empty_memory(2, 3, x)
    policy = open_policy(2, 3)
    done = read_tokens(layer, x, tokens, policy, start, advance=False)
    assert done.memory is start
    assert torch.equal(done.output, read_tokens(layer, x, tokens, policy).output)


@pytest.mark.parametrize("router", ["learned+tags", "surprise+innovation"])
@pytest.mark.parametrize("window", [1, 3])
def test_a_layer_on_fast_ops_equals_the_one_on_naive_ops(
    router: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x, tokens, generator = setting(5, router, window)
    policy = open_policy(2, 3, cap_kept=4, cap_must=2)
    with torch.no_grad():
        memory = read_tokens(layer, x, tokens, policy).memory
    later = replace(tokens, position=tokens.position + tokens.position[:, -1:], present=torch.ones_like(tokens.present))
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)

    def results() -> tuple[LayerOutput, tuple[torch.Tensor | None, ...]]:
        leaf = x.clone().requires_grad_()
        result = read_tokens(layer, leaf, later, policy, memory)
        loss = (weight * result.output).sum() + result.memory.state.square().sum()
        grads = torch.autograd.grad(loss, [leaf, *layer.parameters()], allow_unused=True)
        return result, grads

    fast, fast_grads = results()
    monkeypatch.setattr(kernels, "attend", naive.attend)
    monkeypatch.setattr(kernels, "gated_delta", naive.gated_delta)
    slow, slow_grads = results()
    assert torch.allclose(fast.output, slow.output, rtol=0, atol=1e-10)
    assert torch.equal(fast.trace.routed, slow.trace.routed)
    assert_same_memory(fast.memory, slow.memory)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    for name, mine, other in zip(names, fast_grads, slow_grads, strict=True):
        assert (mine is None) == (other is None), name
        if mine is not None and other is not None:
            assert torch.allclose(mine, other, rtol=1e-9, atol=1e-9), f"gradient of {name}"


def test_a_tagged_token_has_no_bias_and_the_others_that_of_their_score() -> None:
    layer, x, tokens, _ = setting(4, "learned+tags", 1)
    entries = read_tokens(layer, x, tokens, open_policy(2, 3, share=1.0)).memory.scratchpad
    must = entries.must_keep & entries.alive
    assert must.any() and (entries.bias[must] == 0).all()
    others = entries.alive & ~entries.must_keep
    # the learned score is the only one here
    assert torch.allclose(entries.bias[others], log_bias(entries.score[others]))
    assert (entries.bias[others] < 0).all() and (entries.bias[others] >= BIAS_FLOOR).all()


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_random_routing_keeps_the_share_asked_for_and_none_without(share: float) -> None:
    layer, x, _, generator = setting(6, "surprise", 2)
    tokens = random_tokens(generator, items=40, patches=12)
    x = x[:1].expand(40, -1, -1, -1)
    policy = open_policy(40, 3, share=share, use_tags=False, control=Control("random", torch.arange(40)))
    routed = read_tokens(layer, x, tokens, policy).trace.routed
    observed = int(tokens.routable.sum())
    assert not (routed & ~tokens.routable).any()
    # three standard deviations
    assert float(routed.sum()) / observed == pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / observed))
    none = replace(policy, share=torch.zeros(40, dtype=torch.float64))
    assert not read_tokens(layer, x, tokens, none).trace.routed.any()


def test_exploring_keeps_some_that_no_score_asked_for() -> None:
    layer, x, tokens, generator = setting(7, "surprise", 2)
    plain = open_policy(2, 3, share=0.1, use_tags=False)
    explore = replace(plain, explore_share=0.5, explore_generator=generator)
    one, two = read_tokens(layer, x, tokens, plain).trace, read_tokens(layer, x, tokens, explore).trace
    assert torch.equal(one.by_score, two.by_score)
    extra = two.routed & ~one.routed
    assert extra.any() and not (extra & ~tokens.routable).any() and not (one.routed & ~two.routed).any()


def test_heads_are_reduced_as_asked() -> None:
    scores = {}
    for reduction in ("min", "mean", "max"):
        layer, _ = make_layer(8, router="innovation", head_reduction=reduction)
        tokens = random_tokens(torch.Generator().manual_seed(8))
        x = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        scores[reduction] = read_tokens(layer, x, tokens, open_policy(2, 3)).trace.scores
    assert (scores["min"] <= scores["mean"]).all() and (scores["mean"] <= scores["max"]).all()
    assert torch.allclose(scores["mean"], (scores["min"] + scores["max"]) / 2)  # two heads
    assert not torch.allclose(scores["min"], scores["max"])


def test_norm_of_a_head_is_one_per_head() -> None:
    norm = HeadNorm(2, 3)
    x = torch.tensor([[[3.0, 0.0, 0.0], [1.0, 1.0, 1.0]]])
    assert torch.allclose(norm(x), torch.tensor([[[math.sqrt(3.0), 0.0, 0.0], [1.0, 1.0, 1.0]]]), atol=1e-5)
    assert torch.equal(norm(torch.zeros(1, 2, 3)), torch.zeros(1, 2, 3))
