"""topo: topology-dependent lookup. Edges and readings came as events; asked is the reading of a node's parent.

B sequences · T context rows · V nodes · E edges · Q queries · h hops · K types · G numbers in a code
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from probes.canvas import Canvas, code_names, query_rows, take
from probes.contract import ProbeBatch, ProbeConfig
from probes.draws import TYPES, choose_rows, codes, fill, payloads, permutations
from probes.registry import NO_STATE, Probe, register_probe

MARGIN = 5
PAYLOAD = 2
CONTROLS = ("none", "no_graph", "shuffled_graph", "undirected")
RELATIONS = ("other", "reverse", "sibling")


@dataclass(frozen=True, kw_only=True)
class TopoConfig(ProbeConfig):
    """Axes of topo; ``items`` is the number of nodes.

    Attributes:
        hops: parents to climb; ``hop0_share`` of the queries ask a node's own reading (training only helps by it).
        shallow_share: of the others, those that climb one parent alone; above 0 in training's first stages alone.
        form: ``stream`` (edges are rows) or ``graph`` (a static graph; each query row carries the code of the node
            that a graph encoder would name, so one lookup is left).
        taught: where training tells which node is looked up: ``last`` (the whole path after the last layer) or ``hops``
            (each hop after a layer of its own, from the first on). Nothing that is asked depends on it.
        handicap: added at first to the logits of all kept rows, in every model (``Probe.entry_bias``).
        rewires, updates: edges that change, readings that are repeated; the latest counts.
        distractors: rows of edges of another relation, which ``relation`` names: ``other`` (between any nodes),
            ``reverse`` (true edges the other way round) or ``sibling`` (nodes of the same parent, where there are any).
        control: ``none``; ``no_graph`` (the named parent is hidden), ``shuffled_graph`` (another node's) or
            ``undirected`` (which end of an edge is the parent is drawn by lot; a graph names any neighbour).
    """

    items: int = 8
    hops: int = 1
    hop0_share: float = 0.3
    shallow_share: float = 0.0
    form: str = "stream"
    taught: str = "last"
    handicap: float = 0.0
    rewires: int = 0
    updates: int = 0
    distractors: int = 0
    relation: str = "other"
    control: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("stream", "graph"):
            raise ValueError(f"Unknown form {self.form!r}. Available: ['graph', 'stream'].")
        for name, known in (("control", CONTROLS), ("relation", RELATIONS), ("taught", ("last", "hops"))):
            if getattr(self, name) not in known:
                raise ValueError(f"Unknown {name} {getattr(self, name)!r}. Available: {sorted(known)}.")
        if not 2 <= self.items <= 256 or self.hops < 1:
            raise ValueError(f"Nodes must be 2..256 and hops at least 1. Got {self.items} and {self.hops}.")
        self.need_rows(self.rows + MARGIN, "Edges and readings")

    @property
    def edges(self) -> int:
        return 0 if self.form == "graph" else self.items + self.rewires

    @property
    def rows(self) -> int:
        return self.edges + self.items + self.updates + self.distractors


@register_probe("topo", version=3, slot="multivariate encoding")
class TopologyLookup(Probe):
    Config = TopoConfig
    rungs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "topoG": {"form": "graph"},
        "topo": {},
        "topo2": {"hops": 2},
        "topo2N": {"hops": 2, "taught": "hops"},
        "topo2H": {"hops": 2, "taught": "hops", "handicap": -4.0},
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"items": 8, "queries": 8},
        "small": {"items": 16},
        "standard": {"items": 32},
        "long": {"items": 64},
    }
    quick = ("topoG",)
    cannot: ClassVar[Mapping[str, str]] = {
        "topo2 G1": "the seed decides whether the second lookup is found; topo2H tells each hop where it happens",
        "topo2H G1": "one seed of five does not find the second lookup; at a rate of 0.002 all five do (results/rates)",
        **{f"{rung} G2": NO_STATE for rung in ("topo", "topo2H")},
        "topo G5": "four seeds of five read worse off critical rows alone than off what the learned router keeps",
    }
    axes: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "items": (8, 16, 64, 256),
        "hops": (1, 2, 3),
        "form": ("graph", "stream"),
        "rewires": (0, 4, 16),
        "updates": (0, 16, 64),
        "distractors": (0, 8, 16),
        "relation": RELATIONS,
        "control": CONTROLS,
    }
    headline = "topo"
    # a lookup, then that of a node that is named, then through an edge, of few nodes still: each is found on the way
    # from the one before
    curriculum: ClassVar[tuple[tuple[float, Mapping[str, Any]], ...]] = (
        (0.1, {"form": "graph", "hop0_share": 1.0}), (0.1, {"form": "graph"}), (0.4, {"shallow_share": 0.7}), (0.4, {}),
    )  # fmt: skip
    target_weight = 3.0

    def names_after(self, config: ProbeConfig) -> tuple[int, ...]:
        assert isinstance(config, TopoConfig)
        return tuple(range(config.hops)) if config.taught == "hops" else self.named_after

    def entry_bias(self, config: ProbeConfig) -> float:
        assert isinstance(config, TopoConfig)
        return config.handicap

    def lessons(self, config: ProbeConfig) -> tuple[tuple[float, Mapping[str, Any]], ...]:
        """Where each hop is told, both are asked at once: a stage of shallow paths only delays the second."""
        assert isinstance(config, TopoConfig)
        return (*self.curriculum[:2], (0.8, {})) if config.taught == "hops" else self.curriculum

    def depth(self, config: ProbeConfig) -> int:
        """A lookup for each hop, one for the reading, and one more to name what is looked up."""
        assert isinstance(config, TopoConfig)
        return config.hops + 2

    def shortcut_features(self, batch: ProbeBatch) -> torch.Tensor:
        """Also how many children the asked node has, and its parent: degrees must not suffice."""
        assert batch.edge_index is not None
        parent = batch.edge_index[..., 1]  # [B, V]
        degree = torch.zeros_like(parent).scatter_add(1, parent, torch.ones_like(parent))  # [B, V]
        own, above = take(degree, batch.q_item), take(degree, take(parent, batch.q_item))  # 2 x [B, Q]
        return torch.cat([super().shortcut_features(batch), torch.stack([own, above], -1).float()], -1)

    def sample(self, gen: torch.Generator, n: int, config: ProbeConfig) -> ProbeBatch:
        assert isinstance(config, TopoConfig)
        draws = config.draws(gen)
        V, E = config.items, config.edges
        table = codes(config.code, max(V, TYPES))  # [K, G]
        names = permutations(draws("keys"), n, len(table))[:, :V]  # [B, V]
        child = torch.cat([torch.arange(V).expand(n, V), permutations(draws("rewired"), n, V)[:, : config.rewires]], 1)
        shift = torch.randint(1, V, child.shape, generator=draws("parents"))  # [B, V + rewires]
        parents = (child + shift) % V  # [B, V + rewires]; never itself
        node = torch.cat(
            [torch.arange(V).expand(n, V), torch.randint(V, (n, config.updates), generator=draws("updated"))], 1
        )  # [B, V + updates]
        reading = payloads(draws("payloads"), (n, node.shape[1], PAYLOAD))  # [B, V + updates, 2]
        allowed = torch.ones(n, config.context_rows, dtype=torch.bool)
        allowed[:, config.context_rows - MARGIN :] = False
        rows = choose_rows(draws("positions"), allowed, config.rows)  # [B, E + readings + D]
        edge_rows, reading_rows = rows[:, :E], rows[:, E : E + node.shape[1]]
        canvas = Canvas(
            config, draws, n, channels=PAYLOAD, key_width=table.shape[1], value_width=PAYLOAD,
            event_names=("edge", "reading", "other", "q_flag", "hops", *code_names(table.shape[1], "code"),
                         *code_names(table.shape[1], "to")),
            query_rows=min(V, config.queries),
        )  # fmt: skip
        if config.form == "graph":
            edge_rows = torch.full((n, V), -1)
            parent_now, edge_row = parents[:, :V], edge_rows
        else:
            parent_now, edge_row = _latest(edge_rows, child, parents, V)
        place, reading_row = _latest(reading_rows, node, torch.arange(node.shape[1]).expand_as(node), V)
        value = take(reading, place)  # [B, V, 2]
        self._render(canvas, table, names, edge_rows=edge_rows, child=child, parents=parents, reading_rows=reading_rows,
                     node=node, reading=reading, other_rows=rows[:, E + node.shape[1] :], draws=draws)  # fmt: skip
        return self._ask(canvas, config, table, names, parent=parent_now, edge_row=edge_row, value=value,
                         reading_row=reading_row, edge_rows=edge_rows, reading_rows=reading_rows, reading_node=node,
                         reading=reading)  # fmt: skip

    @staticmethod
    def _render(
        canvas: Canvas,
        table: torch.Tensor,
        names: torch.Tensor,
        *,
        edge_rows: torch.Tensor,
        child: torch.Tensor,
        parents: torch.Tensor,
        reading_rows: torch.Tensor,
        node: torch.Tensor,
        reading: torch.Tensor,
        other_rows: torch.Tensor,
        draws: Any,
    ) -> None:
        config, V = canvas.config, names.shape[1]
        assert isinstance(config, TopoConfig)
        code = table[take(names, node)]  # [B, readings, G]
        canvas.flag(reading_rows, "reading")
        canvas.code(reading_rows, code)
        fill(canvas.x, reading_rows, reading)
        canvas.bind(reading_rows, code, reading)
        if int(edge_rows.max()) >= 0:
            canvas.flag(edge_rows, "edge")
            first, second = child, parents
            if config.control == "undirected":
                turned = torch.rand(child.shape, generator=draws("control")) < 0.5  # [B, V + rewires]
                first, second = torch.where(turned, parents, child), torch.where(turned, child, parents)
            canvas.code(edge_rows, table[take(names, first)])
            canvas.code(edge_rows, table[take(names, second)], "to_0")
            fill(canvas.event_id, edge_rows, child)
        for rows in (edge_rows, reading_rows):
            canvas.tagged = fill(canvas.tagged, rows, torch.ones_like(rows, dtype=torch.bool))
        if other_rows.shape[1]:
            pair = _related(config.relation, parents[:, :V], other_rows.shape[1], draws)
            canvas.flag(other_rows, "other")
            canvas.code(other_rows, table[take(names, pair[:, 0])])
            canvas.code(other_rows, table[take(names, pair[:, 1])], "to_0")
            fill(canvas.distract, other_rows, torch.ones_like(other_rows, dtype=torch.bool))
            canvas.tagged = fill(canvas.tagged, other_rows, torch.ones_like(other_rows, dtype=torch.bool))

    @staticmethod
    def _ask(
        canvas: Canvas,
        config: TopoConfig,
        table: torch.Tensor,
        names: torch.Tensor,
        *,
        parent: torch.Tensor,
        edge_row: torch.Tensor,
        value: torch.Tensor,
        reading_row: torch.Tensor,
        edge_rows: torch.Tensor,
        reading_rows: torch.Tensor,
        reading_node: torch.Tensor,
        reading: torch.Tensor,
    ) -> ProbeBatch:
        n, V = names.shape
        draws, T = canvas.draws, canvas.T
        asked = permutations(draws("queries"), n, V)[:, : min(V, config.queries)]  # [B, Q]
        Q = asked.shape[1]
        plain = torch.rand(n, Q, generator=draws("hops")) < config.hop0_share  # [B, Q] a node's own reading
        depth = torch.where(plain, 0, config.hops)  # [B, Q]
        if config.shallow_share:
            shallow = torch.rand(n, Q, generator=draws("shallow")) < config.shallow_share  # [B, Q]
            depth = torch.where(shallow, depth.clamp(max=1), depth)
        node, needs, path = asked, [], []
        for hop in range(config.hops):
            climbs = depth > hop  # [B, Q]
            needs.append(torch.where(climbs, take(edge_row, node), -1))
            node = torch.where(climbs, take(parent, node), node)  # [B, Q]
            path.append(table[take(names, node)])  # [B, Q, G]
        needs.append(take(reading_row, node))
        need = torch.stack(needs, -1)  # [B, Q, hops + 1]
        q_index = query_rows(n, T, Q)  # [B, Q]
        canvas.flag(q_index, "q_flag")
        canvas.flag(q_index, "hops", depth.float() / 2)
        canvas.code(q_index, table[take(names, asked)])
        if config.form == "graph" and config.control != "no_graph":
            named = node
            if config.control == "shuffled_graph":
                named = (node + torch.randint(1, V, node.shape, generator=draws("control"))) % V
            elif config.control == "undirected":
                named = _neighbour(asked, node, parent, draws("control"))
            canvas.code(q_index, table[take(names, named)], "to_0")
        owner = torch.full(canvas.crit.shape, -1)  # [B, L] whose record a row is
        fill(owner, edge_rows, canvas.event_id.gather(1, edge_rows.clamp_min(0)))
        fill(owner, reading_rows, reading_node)
        direct = config.form == "graph"
        key = table[take(names, node if direct else asked)]  # [B, Q, G]
        canvas.bind(q_index, key, torch.zeros(n, Q, PAYLOAD))
        for number in range(need.shape[-1]):
            canvas.mark_critical(need[..., number], asked)
        fill(canvas.crit_chan, need[..., -1], torch.ones(n, Q, PAYLOAD, dtype=torch.bool))
        y = take(value, node)  # [B, Q, 2]
        latest = reading_rows.argmax(1, keepdim=True)  # [B, 1]
        children = torch.arange(V).expand(n, V)
        return canvas.batch(
            q_index=q_index, q_item=asked, y=y, need=need, x_names=("ch_0", "ch_1"), items=V,
            need_role=(*(f"edge {number + 1}" for number in range(config.hops)), "reading"), key_direct=direct,
            aux=torch.cat(path, -1), edge_index=torch.stack([children, parent], -1),
            edge_time=edge_row.clamp_min(0).double(),
            floor={
                "set_mean": value.mean(1, keepdim=True).expand_as(y),
                "last_event": take(reading, latest).expand_as(y),
            },
            slices={"hop": depth}, extra={"node": owner},
        )  # fmt: skip


def _related(relation: str, parent: torch.Tensor, count: int, draws: Any) -> torch.Tensor:
    """Both ends of edges that are no answer, parent [B, V] -> [B, 2, D] nodes."""
    n, V = parent.shape
    pair = torch.randint(V, (n, 2, count), generator=draws("distractors"))  # [B, 2, D]
    if relation == "reverse":
        return torch.stack([take(parent, pair[:, 0]), pair[:, 0]], 1)
    if relation == "sibling":
        # of the nodes with the same parent one by lot; a node without a sibling stands beside any other
        same = (parent[:, None] == parent[..., None]) & ~torch.eye(V, dtype=torch.bool)  # [B, V, V]
        chance = torch.rand(n, V, V, generator=draws("siblings")).masked_fill(~same, -1.0)  # [B, V, V]
        best = chance.max(-1)
        return torch.stack([pair[:, 0], torch.where(
            take(best.values, pair[:, 0]) >= 0, take(best.indices, pair[:, 0]), pair[:, 1]
        )], 1)  # fmt: skip
    return pair


def _neighbour(asked: torch.Tensor, node: torch.Tensor, parent: torch.Tensor, gen: torch.Generator) -> torch.Tensor:
    """Any node that an undirected graph joins to the asked one, [B, Q]: its parent or one of its children."""
    own = node == asked  # [B, Q] its own reading is asked
    joined = parent[:, None] == asked[..., None]  # [B, Q, V] children
    joined = joined.scatter(2, take(parent, asked)[..., None], True)
    chance = torch.rand(joined.shape, generator=gen).masked_fill(~joined, -1.0)  # [B, Q, V]
    return torch.where(own, node, chance.argmax(-1))


def _latest(
    rows: torch.Tensor, owner: torch.Tensor, content: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The content and row of each owner's latest event: rows, owner, content [B, W] -> 2 x [B, count]."""
    mine = owner[:, None] == torch.arange(count)[None, :, None]  # [B, count, W]
    choice = torch.where(mine, rows[:, None], -1).argmax(-1)  # [B, count]
    return take(content, choice), take(rows, choice)
