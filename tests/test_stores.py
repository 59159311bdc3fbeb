"""Both stores of many streams hold and read the same, whatever comes: growth, a cap, ragged lists, saved and loaded.

On a CPU the read through pages runs in Triton's interpreter, in a process that ``test_interpreted.py`` starts; on a
CUDA device it is compiled (marker ``gpu``). The torch form over the same pages runs everywhere.

S streams · C channels · H heads · K key · V value · R marks · J rows of a step
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_ops import distance
from triton_on_cpu import INTERPRETED, WHY_NOT

from hamts.ops.kernels import TORCH, Kernels
from hamts.ops.pages import PagedStore
from hamts.ops.stores import EntryKind, PaddedStore, Store, StoreError, open_store

KINDS = {
    "one channel": EntryKind(heads=2, key_width=16, value_width=16, marks=3),
    "three channels": EntryKind(heads=2, key_width=20, value_width=17, marks=2, channels=3),
    "no marks": EntryKind(heads=1, key_width=16, value_width=24),
}
PLACES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason=WHY_NOT)),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
STREAMS, WINDOW = 5, 3
# of each stream, how likely a row is kept: nothing, little, everything
LIKELY = torch.tensor([0.0, 0.05, 0.3, 0.8, 1.0])


def drawn_rows(kind: EntryKind, J: int, generator: torch.Generator, device: str = "cpu") -> dict[str, torch.Tensor]:
    found = {}
    for name, (shape, dtype) in kind.fields().items():
        if name == "channel":
            found[name] = torch.arange(J).remainder(kind.channels).expand(STREAMS, J).to(device, dtype)
        else:
            found[name] = torch.randn(STREAMS, J, *shape, generator=generator).to(device, dtype)
    return found


def drawn_read(kind: EntryKind, generator: torch.Generator, device: str = "cpu") -> dict[str, Any]:
    S, C, H, R = STREAMS, kind.channels, kind.heads, kind.marks
    grid = (S, WINDOW + 1, C)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    return {
        "queries": draw(S, 1, C, H, kind.key_width).to(kind.dtype) * 2 * kind.key_width**-0.5,
        "local_keys": draw(*grid, H, kind.key_width).to(kind.dtype),
        "local_values": draw(*grid, H, kind.value_width).to(kind.dtype),
        "local_marks": draw(*grid, R) if R else None,
        "local_present": (torch.rand(*grid, generator=generator) < 0.8).to(device),
        "readable": (torch.rand(S, C, C, generator=generator) < 0.6).to(device),
        "channel_bias": draw(H),
        "head_bias": draw(H),
        "window": WINDOW,
    }


def pair(kind: EntryKind, cap: int | None, device: str = "cpu") -> tuple[Store, Store]:
    padded = open_store("padded", kind, STREAMS, cap=cap, device=device)
    return padded, open_store("paged", kind, STREAMS, cap=cap, device=device, grows=True)


def assert_equal_arrays(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(wanted)
    for name, expected in wanted.items():
        assert torch.equal(got[name], expected), name


def fed(stores: tuple[Store, ...], kind: EntryKind, steps: int, J: int, seed: int, device: str = "cpu") -> None:
    """Append the same rows to all, room asked for once in a while."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if step % 16 == 0:
            for store in stores:
                store.reserve(16 * J)
        rows = drawn_rows(kind, J, generator, device)
        accepted = (torch.rand(STREAMS, J, generator=generator) < LIKELY[:, None]).to(device)
        for store in stores:
            store.append_(rows, accepted)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("cap", "J"), [(None, 1), (None, 3), (150, 3), (64, 70), (1, 1)])
def test_pages_hold_what_padded_lists_hold(name: str, cap: int | None, J: int) -> None:
    kind = KINDS[name]
    padded, paged = pair(kind, cap)
    J = min(J, cap or J)
    for seed in range(3):
        fed((padded, paged), kind, 90, J, seed)
        assert_equal_arrays(paged.arrays(), padded.arrays())
    counts = padded.arrays()["count"]
    assert int(counts.max()) == (270 * J if cap is None else cap) and int(counts.min()) == 0
    # pages in use are those that the living entries touch, every one of them once
    held = paged.table[:, :-1]
    used = int((-(-paged.past // 64) - paged.first // 64).sum())
    free = paged.free[: int(paged.n_free)]
    assert int(paged.n_free) + used == paged.pages
    assert free.unique().numel() == free.numel() and (cap is not None or (held < paged.pages).sum() == used)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("cap", [None, 100])
def test_both_read_the_same_by_torch(name: str, cap: int | None, generator: torch.Generator) -> None:
    kind = KINDS[name]
    padded, paged = pair(kind, cap)
    for seed in range(2):
        fed((padded, paged), kind, 80, 2, seed)
        given = drawn_read(kind, generator)
        got, wanted = (store.read(**given, kernels=TORCH) for store in (paged, padded))
        assert distance(got.output, wanted.output) <= 1e-6
        assert (got.marks is None) == (wanted.marks is None)
        if wanted.marks is not None:
            assert distance(got.marks, wanted.marks) <= 1e-6


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("cap", [None, 150])
def test_the_kernel_reads_pages_as_torch_reads_lists(
    name: str, cap: int | None, device: str, generator: torch.Generator
) -> None:
    kind = KINDS[name]
    padded, paged = pair(kind, cap, device)
    fed((padded, paged), kind, 100, 2, 7, device)
    given = drawn_read(kind, generator, device)
    got = paged.read(**given, kernels=Kernels("triton"))
    truth = padded.read(**given, kernels=TORCH)
    # the bound that the step over padded lists has
    assert distance(got.output, truth.output) <= 1e-5
    if truth.marks is not None:
        assert distance(got.marks, truth.marks) <= 1e-5


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize(("cap", "J", "streams"), [(None, 1, 5), (None, 3, 1100), (100, 70, 20), (1, 1, 3)])
def test_the_kernel_takes_and_gives_back_the_pages_that_torch_does(
    cap: int | None, J: int, streams: int, device: str, generator: torch.Generator
) -> None:
    kind = EntryKind(heads=1, key_width=1, value_width=1)
    # too few for all, in the end, where no cap gives some back
    pages = 3 * streams if cap else 3 * streams // 2
    options = {"cap": cap, "device": device, "pages": pages, "room": 250}
    stores = [PagedStore(kind, streams, kernel=kernel, **options) for kernel in ("torch", "triton")]
    likely = torch.rand(streams, 1, generator=generator)
    rows = {name: torch.zeros(streams, J, *shape, device=device) for name, (shape, _) in kind.fields().items()}
    seen = 0
    for turn in range(200 // J if streams < 100 else 50):
        rows["bias"] += torch.arange(1, streams * J + 1, device=device).view(streams, J)
        accepted = (torch.rand(streams, J, generator=generator) < likely).to(device)
        for store in stores:
            store.append_(rows, accepted)
        if turn % 20 and int(stores[0].lost) == seen:
            continue
        seen = int(stores[0].lost)
        for name in ("table", "free"):
            one, two = (getattr(store, name)[..., :-1] for store in stores)
            assert torch.equal(one, two), name
        for name in ("n_free", "past", "first", "lost", "over"):
            assert torch.equal(*(getattr(store, name) for store in stores)), name
        # what has no place goes to the last page, in any order
        assert torch.equal(*(store.buffers["bias"][:-64] for store in stores))
    assert (seen > 0) == (cap is None)


@pytest.mark.parametrize(
    ("kernel", "device"),
    [pytest.param("torch", "cpu"), *(pytest.param("triton", *p.values, marks=p.marks) for p in PLACES)],
)
def test_a_page_that_was_not_found_is_not_given_back(kernel: str, device: str) -> None:
    kind = EntryKind(heads=1, key_width=1, value_width=1)
    store = PagedStore(kind, STREAMS, cap=64, device=device, pages=2, room=64, kernel=kernel)
    rows = drawn_rows(kind, 1, torch.Generator().manual_seed(0), device)
    # behind the pile, where nobody may write
    behind = torch.full((16,), -1, dtype=torch.int32, device=device)
    pile = torch.cat([store.free, behind])
    store.free = pile[: len(store.free)]
    for _ in range(140):
        store.append_(rows, torch.ones(STREAMS, 1, dtype=torch.bool, device=device))
    assert int(store.lost) > 0 and torch.equal(pile[len(store.free) :], behind)
    held = store.table[:, :-1]
    held, free = held[held < 2], store.free[: int(store.n_free)]
    assert 0 <= int(store.n_free) <= 2 and bool((free < 2).all()) and set(held.tolist()) | set(free.tolist()) == {0, 1}


@pytest.mark.parametrize("device", PLACES)
def test_entries_beyond_two_thousand_million_are_read(device: str, generator: torch.Generator) -> None:
    kind = KINDS["three channels"]
    _, paged = pair(kind, 150, device)
    fed((paged,), kind, 100, 2, 7, device)
    given = drawn_read(kind, generator, device)
    wanted = paged.read(**given, kernels=Kernels("triton")).output
    rounds = 64 * paged.width * 2**23
    assert rounds == 2**31
    for counted in (paged.first, paged.past):
        counted += rounds
    assert torch.equal(paged.read(**given, kernels=Kernels("triton")).output, wanted)
    # and go on
    padded = open_store("padded", kind, STREAMS, cap=150, device=device)
    padded.load(paged.arrays())
    fed((padded, paged), kind, 70, 2, 8, device)
    got, truth = paged.read(**given, kernels=Kernels("triton")), padded.read(**given, kernels=TORCH)
    assert distance(got.output, truth.output) <= 1e-5


@pytest.mark.parametrize("device", PLACES)
def test_a_mask_of_the_window_may_lie_in_any_order(device: str, generator: torch.Generator) -> None:
    kind = KINDS["three channels"]
    _, paged = pair(kind, None, device)
    given = drawn_read(kind, generator, device)
    wanted = paged.read(**given, kernels=Kernels("triton")).output
    turned = given["local_present"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    got = paged.read(**{**given, "local_present": turned}, kernels=Kernels("triton")).output
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("kernel", ["torch", pytest.param("triton", marks=PLACES[0].marks)])
@pytest.mark.parametrize("store", ["padded", "paged"])
def test_entries_that_do_not_say_their_channel_are_not_read_by_several(
    store: str, kernel: str, generator: torch.Generator
) -> None:
    one = replace(KINDS["three channels"], channels=1)
    kept = open_store(store, one, STREAMS, cap=4)
    given = drawn_read(KINDS["three channels"], generator)
    with pytest.raises(StoreError, match=r"Entries must say their channel .* Got queries of 3 channels, and entries"):
        kept.read(**given, kernels=Kernels(kernel))
    if store == "paged" and kernel == "triton":
        from hamts.ops.attend_pages import attend_pages

        with pytest.raises(StoreError, match=r"Pages must say the channel of each entry .* Got queries of 3 channels"):
            attend_pages(given.pop("queries"), pages=kept.paged(given.pop("head_bias")), **given)


@pytest.mark.parametrize("kernel", ["torch", pytest.param("triton", marks=PLACES[0].marks)])
def test_a_step_that_brings_no_row_changes_nothing(kernel: str) -> None:
    kind = KINDS["no marks"]
    store = PagedStore(kind, STREAMS, pages=10, room=64, kernel=kernel)
    fed((store,), kind, 16, 1, 3)
    before = store.arrays()
    store.append_(drawn_rows(kind, 0, torch.Generator()), torch.ones(STREAMS, 0, dtype=torch.bool))
    assert_equal_arrays(store.arrays(), before)


@pytest.mark.parametrize("device", PLACES)
def test_a_list_longer_than_the_read_is_ready_for_mixes_no_other_in(device: str, generator: torch.Generator) -> None:
    kind = KINDS["one channel"]
    stores = [PagedStore(kind, STREAMS, device=device, pages=3 * STREAMS, room=192) for _ in range(2)]
    rows = drawn_rows(kind, 1, generator, device)
    # what one program reads, which is less in the interpreter
    whole = 64 if device == "cpu" else 128
    for store, count in zip(stores, (192, whole), strict=True):
        for _ in range(count):
            store.append_(rows, torch.ones(STREAMS, 1, dtype=torch.bool, device=device))
    # one program for each stream and head: the first entries, with the window
    for store in stores:
        store.most = 1
    given = drawn_read(kind, generator, device)
    got, wanted = (store.read(**given, kernels=Kernels("triton")).output for store in stores)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("device", PLACES)
def test_a_store_of_nothing_is_read_as_the_window_alone(device: str, generator: torch.Generator) -> None:
    kind = KINDS["one channel"]
    padded, paged = pair(kind, None, device)
    given = drawn_read(kind, generator, device)
    got, truth = paged.read(**given, kernels=Kernels("triton")), padded.read(**given, kernels=TORCH)
    assert distance(got.output, truth.output) <= 1e-5 and distance(got.marks, truth.marks) <= 1e-5


@pytest.mark.parametrize(("saved", "loaded"), [("padded", "paged"), ("paged", "padded"), ("paged", "paged")])
@pytest.mark.parametrize("cap", [None, 70])
def test_what_one_saves_any_may_load_and_go_on(saved: str, loaded: str, cap: int | None) -> None:
    kind = KINDS["three channels"]
    options = {"padded": {}, "paged": {"grows": True}}
    before = open_store(saved, kind, STREAMS, cap=cap, **options[saved])
    fed((before,), kind, 60, 2, 4)
    arrays = before.arrays()
    after = open_store(loaded, kind, STREAMS, cap=cap, **options[loaded])
    # into a store that held something else
    fed((after,), kind, 20, 2, 5)
    after.load(arrays)
    assert_equal_arrays(after.arrays(), arrays)
    fed((before, after), kind, 60, 2, 6)
    assert_equal_arrays(after.arrays(), before.arrays())


@pytest.mark.parametrize("store", ["padded", "paged"])
def test_a_load_says_whether_a_recorded_step_still_holds(store: str) -> None:
    kind = KINDS["three channels"]
    kept = open_store(store, kind, STREAMS, **({"grows": True} if store == "paged" else {}))

    def places() -> list[Any]:
        # what a recorded step knows: where tensors lie, and how much it reads
        tensors = [*kept.buffers.values(), kept.first, kept.past]
        if isinstance(kept, PagedStore):
            tensors += [kept.table, kept.free, kept.n_free, kept.lost, kept.over]
        return [*(tensor.data_ptr() for tensor in tensors), getattr(kept, "most", None)]

    told = []
    for entries in (70, 70, 40, 300, 0):
        rows = {name: torch.zeros(STREAMS, entries, *shape, dtype=d) for name, (shape, d) in kind.fields().items()}
        before = places()
        told.append(kept.load({**rows, "count": torch.full((STREAMS,), entries)}))
        assert told[-1] or places() == before
    assert told == ([True] * 5 if store == "padded" else [True, False, False, True, False])


def test_pages_take_room_for_what_is_there_and_lists_for_the_longest() -> None:
    kind = KINDS["one channel"]
    padded, paged = pair(kind, None)
    counts = torch.tensor([3, 10, 40, 70, 3000])
    for store in (padded, paged):
        rows = {name: torch.zeros(5, 3000, *shape, dtype=dtype) for name, (shape, dtype) in kind.fields().items()}
        store.load({**rows, "count": counts})
        assert store.live_bytes() == int(counts.sum()) * kind.entry_bytes()
    assert padded.allocated_bytes() >= 5 * 3000 * kind.entry_bytes()
    # 5 pages begun, and one that nobody has
    assert paged.allocated_bytes() <= paged.live_bytes() + 6 * 64 * kind.entry_bytes()


@pytest.mark.parametrize(("cap", "rows"), [(500, 12), (500, 1), (64, 64)])
def test_a_full_list_is_not_moved_at_every_call(cap: int, rows: int) -> None:
    kind = EntryKind(heads=1, key_width=1, value_width=1)
    store = PaddedStore(kind, 2, cap=cap)
    new = {name: torch.zeros(2, rows, *shape) for name, (shape, _) in kind.fields().items()}
    moves, calls, rooms = 0, 0, set()
    for call in range(3000 // rows):
        moved = store.reserve(rows)
        store.append_(new, torch.ones(2, rows, dtype=torch.bool))
        if call * rows > 3 * cap:
            moves, calls, rooms = moves + moved, calls + 1, rooms | {store.room}
    assert int((store.past - store.first).max()) == cap and len(rooms) == 1
    assert store.room <= 2 * (cap + 2 * rows)
    # each move makes room for an eighth of the list, or for as many rows again
    assert moves <= calls * rows // max(cap // 8, 2 * rows) + 1


def test_pages_that_run_out_are_refused_before_and_noticed_after() -> None:
    kind = KINDS["no marks"]
    store = open_store("paged", kind, STREAMS, pages=7, room=200)
    text = r"65 more rows of 5 streams must find pages: 10 of 64 entries each. Got 7 free of 7."
    with pytest.raises(StoreError, match=f"{text} Give the store pages=10 or more, a smaller cap or fewer streams"):
        store.reserve(65)
    assert not store.reserve(64)
    rows = drawn_rows(kind, 1, torch.Generator().manual_seed(0))
    for _ in range(64):
        store.append_(rows, torch.ones(STREAMS, 1, dtype=torch.bool))
    store.check()
    kept = store.arrays()
    # two pages are left, for five streams
    store.append_(rows, torch.ones(STREAMS, 1, dtype=torch.bool))
    with pytest.raises(StoreError, match=r"3 found none of 7 pages of 64 entries: more came than reserve was asked"):
        store.check()
    # nobody else's entries were written over
    store.load(kept)
    assert_equal_arrays(store.arrays(), kept)
    with pytest.raises(StoreError, match=r"10 pages of 64 entries must be there for these streams. Got 7."):
        store.allot(torch.full((STREAMS,), 100))


def test_more_entries_than_the_read_is_ready_for_are_noticed() -> None:
    kind = KINDS["no marks"]
    store = open_store("paged", kind, STREAMS, pages=20, room=64)
    rows = drawn_rows(kind, 1, torch.Generator().manual_seed(0))
    for _ in range(65):
        store.append_(rows, torch.ones(STREAMS, 1, dtype=torch.bool))
    text = r"at most the 64 entries that reserve made ready for. One had 65, and steps may have left some out: more"
    with pytest.raises(StoreError, match=text):
        store.check()


@pytest.mark.parametrize("kernel", ["torch", pytest.param("triton", marks=PLACES[0].marks)])
def test_entries_beyond_what_is_read_are_not_said_to_lack_a_page(kernel: str) -> None:
    kind = KINDS["no marks"]
    store = PagedStore(kind, STREAMS, pages=20, room=60, kernel=kernel)
    rows = drawn_rows(kind, 1, torch.Generator().manual_seed(0))
    accepted = torch.zeros(STREAMS, 1, dtype=torch.bool)
    accepted[1:3] = True
    for _ in range(63):
        store.append_(rows, accepted)
    # steps that bring nothing add nothing
    for _ in range(5):
        store.append_(rows, torch.zeros_like(accepted))
    assert (int(store.lost), int(store.over)) == (0, 3)
    for asked in (store.check, lambda: store.reserve(1)):
        with pytest.raises(
            StoreError, match=r"at most the 60 entries .* One had 63, and steps may have left some out: more"
        ):
            asked()
    store.load(PagedStore(kind, STREAMS).arrays())
    store.check()


def test_what_a_store_cannot_be_is_refused() -> None:
    kind = KINDS["no marks"]
    with pytest.raises(StoreError, match=r"Unknown store 'heap'. Available: \['padded', 'paged'\]."):
        open_store("heap", kind, 2)
    with pytest.raises(StoreError, match=r"page must be a multiple of 64 entries. Got 48."):
        open_store("paged", kind, 2, page=48)
    with pytest.raises(StoreError, match=r"Unknown kernel 'fla' of a paged store. Available: \['torch', 'triton'\]."):
        open_store("paged", kind, 2, kernel="fla")
    with pytest.raises(StoreError, match=r"cap must be at least 1, or None for no cap. Got 0."):
        open_store("padded", kind, 2, cap=0)
    store = open_store("padded", kind, STREAMS, cap=2)
    rows = drawn_rows(kind, 3, torch.Generator().manual_seed(0))
    with pytest.raises(StoreError, match=r"At most cap=2 rows of a stream can come at once. Got 3"):
        store.append_(rows, torch.ones(STREAMS, 3, dtype=torch.bool))
    with pytest.raises(StoreError, match=r"accepted must be \[5 streams, rows\]. Got \(2, 1\)."):
        store.append_(rows, torch.ones(2, 1, dtype=torch.bool))
    with pytest.raises(StoreError, match=r"rows must have the names \['bias', 'keys', 'values'\]. Got \['keys'\]."):
        store.append_({"keys": rows["keys"]}, torch.ones(STREAMS, 1, dtype=torch.bool))
    with pytest.raises(
        StoreError, match=r"arrays must hold 5 streams of at most 2 entries. Got 5 streams, the longest"
    ):
        store.load({**rows, "count": torch.full((5,), 3)})


@pytest.mark.gpu
@pytest.mark.parametrize("cap", [None, 96])
def test_a_recorded_step_follows_and_nothing_waits(cap: int | None) -> None:
    """Append and read in a CUDA graph, replayed as pages fill, are given back and taken; launched without a wait."""
    kind = replace(KINDS["one channel"], dtype=torch.bfloat16, key_width=64, value_width=64)
    recorded, launched = (
        open_store("paged", kind, STREAMS, cap=cap, device="cuda", pages=40, room=256, kernel=kernel)
        for kernel in ("triton", "torch")
    )
    lists = PaddedStore(kind, STREAMS, cap=cap, device="cuda", room=512)
    generator = torch.Generator().manual_seed(3)
    given = drawn_read(kind, generator, "cuda")
    rows, accepted = drawn_rows(kind, 1, generator, "cuda"), torch.ones(STREAMS, 1, dtype=torch.bool, device="cuda")

    def step(store: Store) -> torch.Tensor:
        store.append_(rows, accepted)
        return store.read(**given, kernels=Kernels("triton")).output

    for store in (recorded, launched, lists):
        store.reserve(200)
        step(store)
        store.load(store.arrays())
        store.reserve(200)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(recorded)
    for n in range(190):
        for name, tensor in drawn_rows(kind, 1, generator, "cuda").items():
            rows[name].copy_(tensor)
        accepted.copy_((torch.rand(STREAMS, 1, generator=generator) < LIKELY[:, None]).cuda())
        graph.replay()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            plain = step(launched)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(output, plain)
        wanted = step(lists)
        if n % 40 == 0:
            assert distance(output, wanted) <= 1.2e-2
    assert_equal_arrays(recorded.arrays(), lists.arrays())
    assert int(recorded.past.max()) > 150
