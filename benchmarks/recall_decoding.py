"""Quality against milliseconds a step, of one model: what it recalls at each usage, and what a step of it then costs.

Run ``python -m benchmarks.recall_decoding`` on a machine with a CUDA device and the extra ``gpu``; it trains one model
of ``benchmarks/recall.py`` and measures it, in some three minutes. Sequences differ in the share that they are given
(the mean is the usage; ragged). Read 4,096 tokens, and then one more: by batches of 1, 64 and 1,024, in a CUDA graph,
entries padded to the longest list, and in rows that all sequences share. ``--table`` prints what is there.

B sequences · L tokens
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.recall import train
from benchmarks.recall_ladders import LADDERS, LATE, SMOKE
from benchmarks.recall_model import KEYS, MODELS, TASKS, TokenModel, as_tokens, policies_of
from benchmarks.training_timing import versions
from hamts.config import ModelConfig
from hamts.nn.allocation import update_tables
from hamts.nn.scratchpad import Entries, LayerMemory
from hamts.nn.tokens import Policy, map_tensors
from hamts.ops.kernels import TORCH, Kernels, resolve_kernels
from hamts.ops.pool import RowPool

RESULTS = Path(__file__).parent / "results" / "recall_decoding"
USAGES = (0.0, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
BATCHES = (1, 64, 1_024)
WIDE = 16


def made(name: str, seed: int, device: str) -> TokenModel:
    config = ModelConfig(
        **{"width": 64, "layers": 2, "heads": 2, "patch_steps": 1, "dropout": 0.0, "router": "learned"} | MODELS[name]
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return TokenModel(config).to(device)


def trained(name: str, seed: int, ladder: str, device: str) -> TokenModel:
    model = made(name, seed, device)
    rungs = SMOKE if ladder == "smoke" else LADDERS[ladder]
    train(model, rungs, rate=3e-3, seed=seed, device=device, late=ladder in LATE, after=lambda length, curve: None)
    return model.eval()


def ragged(usage: float, count: int, device: str) -> torch.Tensor:
    """Shares of sequences whose mean is the usage, or nearly where some would have more than everything; [B]."""
    if usage == 1.0:
        return torch.ones(count, device=device)
    draws = torch.randn(count, generator=torch.Generator().manual_seed(0)).mul(0.6).exp()  # [B]
    return (draws / draws.mean() * usage).clamp(max=1.0).to(device)


@torch.no_grad()
def read(
    model: TokenModel, ids: torch.Tensor, share: torch.Tensor
) -> tuple[torch.Tensor, list[Any], list[LayerMemory]]:
    """Logits [B, L, values], traces and memories after some sequences."""
    x = model.embedding(ids)[:, None]  # [B, 1, L, D]
    tokens, traces, memories = as_tokens(ids, x), [], []
    policies = [replace(policy, masses=False) for policy in policies_of(model, share)]
    for block, policy in zip(model.blocks, policies, strict=True):
        x, memory, trace = block(
            x, tokens, block.memory.empty_memory(len(ids), 1, x), policy, stepwise=False, advance=True
        )
        traces.append(trace)
        memories.append(memory)
    return model.head(model.norm(x[:, 0])), traces, memories


def quality(model: TokenModel, usage: float, drawn: dict[str, list[Any]]) -> tuple[dict[str, Any], list[LayerMemory]]:
    """Share of queries answered right by task, what was kept, and memories of the first batch of recall."""
    found: dict[str, Any] = {"usage": usage}
    first: list[LayerMemory] = []
    for task, parts in drawn.items():
        right_count = asked_count = 0
        kept = []
        for number, (ids, right) in enumerate(parts):
            share = ragged(usage, len(parts) * len(ids), str(ids.device))[number * len(ids) : (number + 1) * len(ids)]
            logits, traces, memories = read(model, ids, share)
            asked = right >= 0
            right_count += int((logits[asked].argmax(-1) + KEYS == right[asked]).sum())
            asked_count += int(asked.sum())
            kept.append(torch.stack([trace.routed.float().mean((1, 2)) for trace in traces], 1))  # [B, layers]
            first = first or memories
        each = torch.cat(kept)  # [sequences, layers]
        found |= {f"{task}_right": round(right_count / asked_count, 4), f"{task}_queries": asked_count}
        found |= {f"{task}_kept": round(float(each.mean()), 4), f"{task}_kept_most": round(float(each.max()), 4)}
    return found, first


def repeated(memories: list[LayerMemory], count: int) -> list[LayerMemory]:
    """Memories of so many sequences, over and over those that there are; lists have room for the longest."""
    index = torch.arange(count, device=memories[0].state.device) % len(memories[0].state)
    many = [map_tensors(memory, lambda leaf: leaf.index_select(0, index)) for memory in memories]
    rooms = [int(memory.scratchpad.alive.sum(1).max()) for memory in many]
    return [
        replace(memory, scratchpad=map_tensors(memory.scratchpad, lambda leaf, room=room: leaf[:, :room]))
        for memory, room in zip(many, rooms, strict=True)
    ]


def in_pool(memory: LayerMemory) -> LayerMemory:
    """The same, entries in rows of a pool with room for one step."""
    pad = memory.scratchpad
    parts = {f.name: getattr(pad, f.name) for f in fields(Entries) if getattr(pad, f.name) is not None}
    pool = RowPool({name: leaf.new_zeros(1, *leaf.shape[2:]) for name, leaf in parts.items()})
    rows = pool.hold(parts, pad.alive)  # [B, M]
    pool.grow(64 * len(rows))
    narrow = {name: getattr(pad, name)[..., :0] for name in ("keys", "values", "marks")}
    return replace(memory, scratchpad=replace(pad, **narrow, rows=rows), pool=pool)


def step_of(model: TokenModel, memories: list[LayerMemory], share: torch.Tensor) -> Callable[[], torch.Tensor]:
    """One more token of every sequence, from its embedding to its logits; memories after it are made, and left."""
    ids = torch.zeros(len(share), 1, dtype=torch.int64, device=share.device)
    tokens = as_tokens(ids, model.embedding(ids)[:, None].detach())
    tokens = replace(tokens, position=tokens.position + memories[0].pending.position.amax() + 1)
    policies: list[Policy] = [replace(policy, masses=False) for policy in policies_of(model, share)]

    @torch.no_grad()
    def step() -> torch.Tensor:
        x = model.embedding(ids)[:, None]  # [B, 1, 1, D]
        for block, memory, policy in zip(model.blocks, memories, policies, strict=True):
            x, _, _ = block(x, tokens, memory, policy, stepwise=True, advance=True)
        return model.head(model.norm(x[:, 0]))

    return step


def timed(model: TokenModel, memories: list[LayerMemory], usage: float, device: str) -> dict[str, Any]:
    """Milliseconds of a step by batch and store, and whether both give the same."""
    found: dict[str, Any] = {}
    for count in BATCHES:
        many = repeated(memories, count)
        share = ragged(usage, count, device)
        alive = torch.stack([memory.scratchpad.alive.sum(1) for memory in many], 1).float()  # [B, layers]
        found[f"entries_{count}"] = [round(float(alive.mean()), 1), int(alive.max())]
        outputs = []
        for store in ("padded", "rows"):
            step = step_of(model, many if store == "padded" else [in_pool(memory) for memory in many], share)
            outputs.append(step())
            if device == "cpu":
                continue
            from benchmarks.kernels import graph_ms

            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(5):
                step()
            torch.cuda.synchronize()
            found[f"{store}_launched_ms_{count}"] = round(1e3 * (time.perf_counter() - began) / 5, 4)
            found[f"{store}_ms_{count}"] = round(graph_ms(step), 4)
        found[f"apart_{count}"] = float((outputs[0] - outputs[1]).abs().max())
    return found


def run(name: str, seed: int, ladder: str, results: Path, device: str, weights: Path | None) -> None:
    if weights is not None and weights.is_file():
        model = made(name, seed, device)
        model.load_state_dict(torch.load(weights, weights_only=True))
        model.eval()
    else:
        model = trained(name, seed, ladder, device)
        if weights is not None:
            torch.save(model.state_dict(), weights)
            return
    length, sequences = (64, 4) if ladder == "smoke" else (4_096, 128)
    side = 2 if ladder == "smoke" else WIDE
    generator = torch.Generator(device=device).manual_seed(10_000)
    drawn = {task: [draw(length, side, generator) for _ in range(sequences // side)] for task, draw in TASKS.items()}
    scores: list[list[torch.Tensor]] = [[] for _ in model.blocks]
    for ids, _ in drawn["recall"] + drawn["needle"]:
        for kept, trace in zip(scores, read(model, ids, ragged(0.5, len(ids), device))[1], strict=True):
            kept.append(trace.scores.flatten(0, -2))
    samples = [torch.cat(parts)[:: max(1, len(parts) * len(parts[0]) // 2**20)] for parts in scores]
    update_tables(model.layers(), samples, "uniform", calibrate=True)
    fast = TORCH if device == "cpu" else resolve_kernels("fla+triton", device=device, head_width=32)
    results.mkdir(parents=True, exist_ok=True)
    about = {"model": name, "seed": seed, "ladder": ladder, "length": length, "versions": versions()}
    about["device"] = torch.cuda.get_device_name() if device != "cpu" else "cpu"
    for usage in USAGES:
        cell, memories = quality(model, usage, drawn)
        plain = [block.memory.kernels for block in model.blocks]
        use(model, [fast] * len(plain))
        cell |= timed(model, memories, usage, device)
        use(model, plain)
        path = results / f"{name}--{seed}--{round(100 * usage)}.json"
        path.write_text(json.dumps(cell | about, indent=1) + "\n")
        print({key: cell[key] for key in cell if not key.endswith("queries")}, flush=True)


def use(model: TokenModel, kernels: list[Kernels]) -> None:
    for block, each in zip(model.blocks, kernels, strict=True):
        block.memory.kernels = each


def table(results: Path) -> str:
    """Quality beside milliseconds, a line for each usage."""
    cells = sorted((json.loads(path.read_text()) for path in results.glob("*.json")), key=lambda c: c["usage"])
    head = "| kept: asked, mean, most | recall right | needle right |"
    head += "".join(f" ms, batch {n:,}: padded / rows | entries mean / most |" for n in BATCHES)
    lines = [head, "|---" * (3 + 2 * len(BATCHES)) + "|"]
    for c in cells:
        line = f"| {c['usage']:.0%}, {c['recall_kept']:.1%}, {c['recall_kept_most']:.1%} | {c['recall_right']:.3f}"
        line += f" | {c['needle_right']:.3f} |"
        for n in BATCHES:
            times = " / ".join(f"{c[f'{store}_ms_{n}']:.3f}" for store in ("padded", "rows") if f"{store}_ms_{n}" in c)
            line += f" {times} | {c[f'entries_{n}'][0]:,.0f} / {c[f'entries_{n}'][1]:,} |"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="surprise", choices=list(MODELS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ladder", default="long", choices=[*LADDERS, "smoke"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--weights", type=Path, help="train into this file and end; where it is there, measure what it holds"
    )
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not args.table:
        run(args.model, args.seed, args.ladder, args.results, args.device, args.weights)
    print(table(args.results))


if __name__ == "__main__":
    main()
