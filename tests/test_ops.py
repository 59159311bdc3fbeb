"""The fast ops equal the ones written step by step, in outputs and gradients.

B items · C channels · N patches · H heads · K key · V value · M entries (scratchpad) · W window patches · R marks
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch

from hamts.ops import joint_softmax, naive
from hamts.ops.attend import attend
from hamts.ops.gated_delta import gated_delta
from hamts.ops.types import ScratchKeys

LENGTHS = [1, 2, 31, 32, 33, 63, 65, 100]
# relative to the norm of the truth, which is computed in float64 on the same numbers. float32 rounds at 6e-8; sums over
# a hundred steps and a triangular solve with entries up to 1.5 cost one digit. float64 has nine digits more
RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def distance(got: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative to the truth's norm, or to 0.1 where the truth is (nearly) 0."""
    return float(
        (got.detach().double() - truth.detach().double()).norm() / truth.detach().double().norm().clamp(min=0.1)
    )


def weighed(result: Any) -> torch.Tensor:
    """One number that depends on every differentiable entry of a result, each with its own weight."""
    total = torch.zeros((), dtype=torch.float64)
    for field in fields(result):
        part = getattr(result, field.name)
        if part is not None and part.requires_grad:
            weight = torch.linspace(-1, 1, part.numel(), dtype=torch.float64).view(part.shape)
            total = total + (weight * part.double() + 0.5 * weight * part.double() ** 2).sum()
    return total


def assert_same(got: Any, truth: Any, got_leaves: dict, true_leaves: dict, tolerance: float) -> None:
    for field in fields(truth):
        expected, value = getattr(truth, field.name), getattr(got, field.name)
        assert (expected is None) == (value is None), field.name
        if expected is not None:
            assert distance(value, expected) <= tolerance, field.name
    expected_grads = torch.autograd.grad(weighed(truth), list(true_leaves.values()), materialize_grads=True)
    grads = torch.autograd.grad(weighed(got), list(got_leaves.values()), materialize_grads=True)
    for name, expected, value in zip(true_leaves, expected_grads, grads, strict=True):
        assert torch.isfinite(value).all(), f"gradient of {name}"
        assert distance(value, expected) <= tolerance, f"gradient of {name}"


def delta_leaves(
    n_patches: int, *, correlation: float = 0.0, beta: float | None = None, seed: int = 0, shape: tuple = (2, 2, 6, 5)
) -> dict[str, torch.Tensor]:
    """Float64 leaves on numbers that float32 holds exactly; every third step is missing unless beta is given."""
    generator = torch.Generator().manual_seed(seed)
    n_items, n_heads, key_width, value_width = shape

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    shared = torch.nn.functional.normalize(normal(n_items, 1, n_heads, key_width), dim=-1)
    apart = torch.nn.functional.normalize(normal(n_items, n_patches, n_heads, key_width), dim=-1)
    gate = torch.rand(n_items, n_patches, n_heads, generator=generator, dtype=torch.float64)
    gate = gate * (torch.arange(n_patches) % 3 != 1)[:, None] if beta is None else torch.full_like(gate, beta)
    leaves = {
        "queries": normal(n_items, n_patches, n_heads, key_width),
        "keys": torch.nn.functional.normalize(correlation**0.5 * shared + (1 - correlation) ** 0.5 * apart, dim=-1),
        "values": normal(n_items, n_patches, n_heads, value_width),
        "log_decay": -0.1 * normal(n_items, n_patches, n_heads).abs(),
        "beta": gate,
        "initial_state": normal(n_items, n_heads, key_width, value_width),
    }
    return {name: leaf.float().double().requires_grad_() for name, leaf in leaves.items()}


def run_delta(op: Any, leaves: dict[str, torch.Tensor], **options: Any) -> Any:
    positional = [leaves["queries"], leaves["keys"], leaves["values"]]
    named = {name: leaf for name, leaf in leaves.items() if name in ("log_decay", "beta", "initial_state")}
    return op(*positional, **named, **options)


def as_dtype(leaves: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("n_patches", LENGTHS)
def test_chunks_equal_step_by_step_with_missing_steps(n_patches: int, dtype: torch.dtype) -> None:
    truth = delta_leaves(n_patches)
    leaves = as_dtype(truth, dtype)
    assert_same(run_delta(gated_delta, leaves), run_delta(naive.gated_delta, truth), leaves, truth, RELATIVE[dtype])


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("n_patches", LENGTHS)
def test_chunks_equal_step_by_step_on_strongly_correlated_keys(n_patches: int, dtype: torch.dtype) -> None:
    truth = delta_leaves(n_patches, correlation=0.95, beta=0.95, shape=(2, 2, 16, 8))
    leaves = as_dtype(truth, dtype)
    got = run_delta(gated_delta, leaves, chunk=64)
    assert_same(got, run_delta(naive.gated_delta, truth), leaves, truth, RELATIVE[dtype])


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 200])
def test_any_chunk_gives_the_same_from_a_state_of_zeros(chunk: int) -> None:
    truth = delta_leaves(100)
    del truth["initial_state"]
    leaves = as_dtype(truth, torch.float64)
    got = run_delta(gated_delta, leaves, chunk=chunk)
    assert_same(got, run_delta(naive.gated_delta, truth), leaves, truth, 1e-10)


@pytest.mark.parametrize("forgotten", [-1e4, -torch.inf])
@pytest.mark.parametrize("dtype", RELATIVE)
def test_forgetting_everything_at_once_stays_exact_afterwards(dtype: torch.dtype, forgotten: float) -> None:
    truth = delta_leaves(70)
    with torch.no_grad():
        truth["log_decay"][:, 5::9] = forgotten
    leaves = as_dtype(truth, dtype)
    assert_same(run_delta(gated_delta, leaves), run_delta(naive.gated_delta, truth), leaves, truth, RELATIVE[dtype])


@pytest.mark.parametrize("op", [naive.gated_delta, gated_delta])
def test_one_step_by_hand(op: Any) -> None:
    key, value, query = torch.tensor([1.0, 0.0]), torch.tensor([4.0, 6.0]), torch.tensor([0.5, 2.0])
    state = torch.tensor([[2.0, 0.0], [0.0, 8.0]])
    result = op(
        query.view(1, 1, 1, 2),
        key.view(1, 1, 1, 2),
        value.view(1, 1, 1, 2),
        log_decay=torch.tensor(0.5).log().view(1, 1, 1),
        beta=torch.tensor(0.5).view(1, 1, 1),
        initial_state=state.view(1, 1, 2, 2),
    )
    assert result.prediction.flatten().tolist() == [1.0, 0.0]
    assert result.error.flatten().tolist() == [3.0, 6.0]
    assert result.state.flatten().tolist() == [2.5, 3.0, 0.0, 4.0]
    assert result.output.flatten().tolist() == [1.25, 9.5]


def test_a_gap_writes_nothing_and_its_error_is_right() -> None:
    leaves = delta_leaves(40)
    with torch.no_grad():
        leaves["beta"].zero_()
    result = run_delta(gated_delta, leaves, chunk=16)
    decay = leaves["log_decay"].cumsum(1).exp()
    expected = torch.einsum("bnh,bhkv,bnhk->bnhv", decay, leaves["initial_state"], leaves["keys"])
    assert distance(result.prediction, expected) < 1e-12
    assert distance(result.error, leaves["values"] - expected) < 1e-12
    assert distance(result.state, decay[:, -1, :, None, None] * leaves["initial_state"]) < 1e-12


@pytest.mark.parametrize("chunk", [3, 8])
def test_gated_delta_passes_gradcheck_in_one_chunk_and_in_three(chunk: int) -> None:
    leaves = delta_leaves(7, shape=(1, 1, 3, 2))

    def results(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        got = run_delta(gated_delta, dict(zip(leaves, values, strict=True)), chunk=chunk)
        return got.output, got.prediction, got.error, got.state

    assert torch.autograd.gradcheck(results, list(leaves.values()))


@pytest.mark.parametrize("cut", [1, 17, 32, 99])
def test_a_sequence_in_two_calls_equals_one_call(cut: int) -> None:
    leaves = delta_leaves(100)
    whole = run_delta(gated_delta, leaves)
    parts = {name: leaf for name, leaf in leaves.items() if name != "initial_state"}
    head = run_delta(
        gated_delta, {**{n: x[:, :cut] for n, x in parts.items()}, "initial_state": leaves["initial_state"]}
    )
    tail = run_delta(gated_delta, {**{n: x[:, cut:] for n, x in parts.items()}, "initial_state": head.state})
    for name in ("output", "prediction", "error"):
        joined = torch.cat([getattr(head, name), getattr(tail, name)], 1)
        assert distance(joined, getattr(whole, name)) < 1e-10, name
    assert distance(tail.state, whole.state) < 1e-10


@pytest.mark.parametrize("edited", [1, 20, 32, 50])
@pytest.mark.parametrize("chunk", [32, 128])
def test_editing_later_steps_leaves_earlier_results_bit_equal(edited: int, chunk: int) -> None:
    leaves = as_dtype(delta_leaves(64), torch.float32)
    changed = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    for name in ("queries", "keys", "values", "beta"):
        changed[name][:, edited:] *= -3
    changed["log_decay"][:, edited:] = -2.0
    before, after = (run_delta(gated_delta, x, chunk=chunk) for x in (leaves, changed))
    for name in ("output", "prediction", "error"):
        assert torch.equal(getattr(before, name)[:, :edited], getattr(after, name)[:, :edited]), name
        assert not torch.equal(getattr(before, name)[:, edited:], getattr(after, name)[:, edited:]), name


def test_bfloat16_runs_in_float32_and_comes_back() -> None:
    leaves = as_dtype(delta_leaves(50), torch.bfloat16)
    got = run_delta(gated_delta, leaves)
    truth = run_delta(naive.gated_delta, as_dtype(leaves, torch.float64))
    assert got.state.dtype == torch.float32
    assert distance(got.state, truth.state) < 1e-5
    for name in ("output", "prediction", "error"):
        assert getattr(got, name).dtype == torch.bfloat16
        # bf16 keeps 8 bits: one rounding is at most 4e-3
        assert distance(getattr(got, name), getattr(truth, name)) < 4e-3


def test_autocast_does_not_lower_the_precision_of_either_op() -> None:
    leaves, scene = as_dtype(delta_leaves(40), torch.float32), Scene(seed=3)
    plain, read = run_delta(gated_delta, leaves), scene.run(attend, scene.leaves(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_read = run_delta(gated_delta, leaves), scene.run(attend, scene.leaves(torch.float32))
    assert torch.equal(plain.output, cast.output)
    assert torch.equal(read.output, cast_read.output)


@dataclass(frozen=True)
class Scene:
    """A random ragged read: gaps, evictions, entries older than the chunk, channels that may not be read."""

    n_items: int = 2
    n_patches: int = 9
    n_channels: int = 3
    n_entries: int = 8
    window: int = 2
    cross_span: int = 1
    n_marks: int = 2
    bias_per_head: bool = False
    seed: int = 0

    def leaves(self, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        local = (self.n_items, self.window + self.n_patches, self.n_channels)
        entries = (self.n_items, self.n_entries)
        shapes = {
            "queries": (self.n_items, self.n_patches, self.n_channels, 2, 4),
            "local_keys": (*local, 2, 4),
            "local_values": (*local, 2, 3),
            "channel_bias": (2,),
            "local_marks": (*local, self.n_marks),
            "keys": (*entries, 2, 4),
            "values": (*entries, 2, 3),
            "bias": (*entries, 2) if self.bias_per_head else entries,
            "marks": (*entries, self.n_marks),
        }
        if not self.n_marks:
            del shapes["local_marks"], shapes["marks"]
        draws = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
        return {name: draw.to(dtype).requires_grad_() for name, draw in draws.items()}

    def masks(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 1000)

        def draw(low: int, high: int, *shape: int) -> torch.Tensor:
            return torch.randint(low, high, shape, generator=generator)

        n = self.n_patches
        first = draw(-n, n, self.n_items, self.n_entries).sort(1).values
        last = first + draw(1, 2 * n + 1, self.n_items, self.n_entries)
        padding = torch.arange(self.n_entries) >= draw(0, self.n_entries + 1, self.n_items)[:, None]
        return {
            "local_present": draw(0, 4, self.n_items, self.window + n, self.n_channels) > 0,
            "readable": draw(0, 3, self.n_items, self.n_channels, self.n_channels) > 0,
            "channel": draw(0, self.n_channels, self.n_items, self.n_entries),
            "visible_from": first.masked_fill(padding, 10**9),
            "visible_until": last.masked_fill(padding, 0),
        }

    def run(self, op: Any, leaves: dict, masks: dict | None = None, block: int = 64) -> Any:
        masks = self.masks() if masks is None else masks
        own = {f.name for f in fields(ScratchKeys)}
        scratch = {name: x for name, x in {**leaves, **masks}.items() if name in own}
        local: dict[str, Any] = {n: x for n, x in {**leaves, **masks}.items() if n not in own and n != "queries"}
        local |= {"window": self.window, "cross_span": self.cross_span, "block": block}
        return op(leaves["queries"], **local, scratch=ScratchKeys(**scratch))


SCENES = [
    Scene(),
    Scene(n_channels=1, seed=1),
    Scene(n_entries=0, seed=2),
    Scene(n_channels=1, n_entries=0, n_marks=0, seed=3),
    Scene(window=1, bias_per_head=True, seed=4),
    Scene(window=1, cross_span=0, seed=5),
    Scene(window=2, cross_span=2, n_marks=0, seed=6),
    Scene(window=4, cross_span=1, bias_per_head=True, seed=7),
    Scene(window=4, cross_span=4, seed=8),
    Scene(window=8, cross_span=2, n_patches=5, seed=9),
    Scene(window=8, cross_span=1, n_entries=0, seed=10),
    Scene(n_items=3, n_patches=1, seed=11),
    Scene(n_items=4, n_entries=30, seed=12),
]


@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize("scene", SCENES, ids=str)
def test_blocks_equal_query_by_query(scene: Scene, block: int) -> None:
    truth, leaves = scene.leaves(), scene.leaves()
    assert_same(scene.run(attend, leaves, block=block), scene.run(naive.attend, truth), leaves, truth, 1e-10)


@pytest.mark.parametrize("scene", SCENES, ids=str)
def test_float32_blocks_equal_query_by_query(scene: Scene) -> None:
    truth, leaves = scene.leaves(), scene.leaves(torch.float32)
    assert_same(scene.run(attend, leaves), scene.run(naive.attend, truth), leaves, truth, RELATIVE[torch.float32])


@pytest.mark.parametrize("room", [1, 1000])
def test_items_in_groups_of_any_size_give_the_same(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint_softmax, "GROUP_LOGITS_CPU", room)
    scene = Scene(n_items=5, n_entries=12, seed=13)
    truth, leaves = scene.leaves(), scene.leaves()
    assert_same(scene.run(attend, leaves), scene.run(naive.attend, truth), leaves, truth, 1e-10)


def test_no_scratchpad_equals_an_empty_one() -> None:
    scene = Scene(n_entries=0)
    leaves, masks = scene.leaves(), scene.masks()
    local: dict[str, Any] = {
        name: leaves[name] for name in ("local_keys", "local_values", "channel_bias", "local_marks")
    }
    local |= {name: masks[name] for name in ("local_present", "readable")}
    for op in (attend, naive.attend):
        got = op(leaves["queries"], **local, scratch=None, window=2)
        assert torch.equal(got.output, scene.run(op, leaves).output)
        assert got.scratch_mass is None


def test_attend_passes_gradcheck() -> None:
    scene = Scene(n_items=1, n_patches=3, n_channels=2, n_entries=3, n_marks=1, seed=5)
    leaves = scene.leaves()

    def results(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        got = scene.run(attend, dict(zip(leaves, values, strict=True)), block=2)
        return got.output, got.marks

    assert torch.autograd.gradcheck(results, list(leaves.values()))


@pytest.mark.parametrize("op", [naive.attend, attend])
def test_a_query_that_sees_nothing_gets_zero_and_finite_gradients(op: Any) -> None:
    scene = Scene()
    leaves, masks = scene.leaves(), scene.masks()
    masks["local_present"] = torch.zeros_like(masks["local_present"])
    masks["visible_from"] = torch.full_like(masks["visible_from"], 4)
    masks["visible_until"] = torch.full_like(masks["visible_until"], 6)
    masks["channel"], masks["readable"] = torch.zeros_like(masks["channel"]), torch.zeros_like(masks["readable"])
    got = scene.run(op, leaves, masks)
    seeing = torch.zeros(2, 9, 3, dtype=torch.bool)
    seeing[:, 4:6, 0] = True
    assert (got.output[~seeing] == 0).all() and (got.marks[~seeing] == 0).all()
    assert (got.output[seeing] != 0).all()
    for gradient in torch.autograd.grad(weighed(got), list(leaves.values()), materialize_grads=True):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("scene", [s for s in SCENES if s.n_entries], ids=str)
def test_masses_are_the_probability_of_every_query_that_sees_a_key(scene: Scene) -> None:
    got = scene.run(attend, scene.leaves(), block=7)
    # with values of 1 a query's output is its total probability: 1, or 0 where it sees nothing
    ones = {name: torch.ones_like(x) if name.endswith("values") else x for name, x in scene.leaves().items()}
    total = scene.run(attend, ones).output[..., 0].sum((1, 2, 3))
    assert not got.local_mass.requires_grad and not got.scratch_mass.requires_grad
    assert torch.allclose(got.local_mass.sum((1, 2)) + got.scratch_mass.sum(1), total, atol=1e-10)


def unseen_edits(scene: Scene, query: int, channel: int) -> dict[str, torch.Tensor]:
    """For every key tensor, which keys query (n, c) cannot see, at the positions the op takes them."""
    masks = scene.masks()
    steps = torch.arange(scene.window + scene.n_patches)[:, None]
    channels = torch.arange(scene.n_channels)
    readable = masks["readable"][:, channel] | (channels == channel)
    own = (steps > query) & (steps <= query + scene.window) & (channels == channel)
    near = (steps > query + scene.window - scene.cross_span) & (steps <= query + scene.window)
    local = (own | (near & readable[:, None])) & masks["local_present"]
    alive = (masks["visible_from"] <= query) & (query < masks["visible_until"])
    return {"local": ~local, "scratch": ~(alive & readable.gather(1, masks["channel"]))}


@pytest.mark.parametrize("scene", [s for s in SCENES if s.n_channels > 1 and s.n_entries], ids=str)
def test_editing_keys_a_query_cannot_see_leaves_it_bit_equal(scene: Scene) -> None:
    leaves = {name: leaf.detach() for name, leaf in scene.leaves(torch.float32).items()}
    before = scene.run(attend, leaves, block=4)
    for query, channel in [(0, 0), (scene.n_patches // 2, 1), (scene.n_patches - 1, 2)]:
        unseen = unseen_edits(scene, query, channel)
        changed = dict(leaves)
        for name in ("local_keys", "local_values", "local_marks", "keys", "values", "bias", "marks"):
            if name in leaves:
                hidden = unseen["local" if name.startswith("local") else "scratch"]
                hidden = hidden.view(*hidden.shape, *[1] * (leaves[name].ndim - hidden.ndim))
                changed[name] = torch.where(hidden, 100 - 7 * leaves[name], leaves[name])
        after = scene.run(attend, changed, block=4)
        assert torch.equal(before.output[:, query, channel], after.output[:, query, channel])
        if before.marks is not None:
            assert torch.equal(before.marks[:, query, channel], after.marks[:, query, channel])


@pytest.mark.parametrize("cut", [1, 4, 8])
@pytest.mark.parametrize("scene", [SCENES[0], SCENES[7], SCENES[9]], ids=str)
def test_a_chunk_in_two_calls_equals_one_call(scene: Scene, cut: int) -> None:
    cut = min(cut, scene.n_patches - 1)
    leaves, masks = scene.leaves(), scene.masks()
    whole = scene.run(attend, leaves)
    head, tail = dict(leaves), dict(leaves)
    head_masks, tail_masks = dict(masks), dict(masks)
    head["queries"], tail["queries"] = leaves["queries"][:, :cut], leaves["queries"][:, cut:]
    for name in ("local_keys", "local_values", "local_marks"):
        head[name], tail[name] = leaves[name][:, : scene.window + cut], leaves[name][:, cut:]
    present = masks["local_present"]
    head_masks["local_present"], tail_masks["local_present"] = present[:, : scene.window + cut], present[:, cut:]
    for name in ("visible_from", "visible_until"):
        tail_masks[name] = masks[name] - cut
    first, second = scene.run(attend, head, head_masks), scene.run(attend, tail, tail_masks)
    assert distance(torch.cat([first.output, second.output], 1), whole.output) < 1e-10
    assert distance(torch.cat([first.marks, second.marks], 1), whole.marks) < 1e-10
    assert distance(first.scratch_mass + second.scratch_mass, whole.scratch_mass) < 1e-10


def test_an_item_alone_equals_the_item_in_its_batch() -> None:
    scene = Scene(n_items=4, n_entries=20, seed=14)
    leaves, masks = scene.leaves(), scene.masks()
    batch = scene.run(attend, leaves)
    for b in range(4):
        alone = {name: x if name == "channel_bias" else x[b : b + 1] for name, x in leaves.items()}
        got = replace(scene, n_items=1).run(attend, alone, {name: x[b : b + 1] for name, x in masks.items()})
        assert distance(got.output, batch.output[b : b + 1]) < 1e-10


def test_reading_wider_than_the_window_is_refused() -> None:
    scene = Scene(window=2, cross_span=3)
    with pytest.raises(ValueError, match=r"cross_span must lie in 0 .. window. Got cross_span=3, window=2."):
        scene.run(attend, scene.leaves())
