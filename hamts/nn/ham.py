"""The HAM layer: a recurrent state for what is predictable, a scratchpad for what must stay exact.

Source: Hybrid Associative Memories, arXiv 2603.22325: the recurrence (Eqs 6-8), routing by prediction error (Eqs 9-10),
the sparse cache (Eq. 11), two independent gates (Eqs 12-13), the learned router (Eq. 14). The grid of channels, the
window, the union of reads, tags, caps and the level features are ours.

B items · C channels · N patches · D width · H heads · K key · V value (= K) · W window patches · M entries · R marks
S score routers · G width of a head's state (K unless it has one of its own)
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from hamts.config import ModelConfig
from hamts.nn.budget import ThresholdTable
from hamts.nn.clipped import Clipped
from hamts.nn.counts import sharpened
from hamts.nn.decide import Decision, decide, prepared
from hamts.nn.eviction import end_times
from hamts.nn.heads import HeadNorm, Turn, angles, rotate, start_gates, start_queries, turned
from hamts.nn.router import Router, Scores
from hamts.nn.scratchpad import (
    Carried,
    Entries,
    LayerMemory,
    Pending,
    append_candidates,
    append_shared,
    as_entries,
    empty_memory,
    merge_candidates,
)
from hamts.nn.stages import Inputs, Products
from hamts.nn.steps import StepEntries, step_features
from hamts.nn.tokens import Policy, Tokens, map_tensors
from hamts.nn.trace import LayerOutput, LayerTrace, layer_trace
from hamts.ops.kernels import TORCH, Kernels
from hamts.ops.types import Attended, GatedDelta

__all__ = ["HAMLayer", "HeadNorm", "LayerOutput", "LayerTrace", "rotate"]

CONV_WIDTH = 4
MARKS = 3
FASTEST_TOKENS, SLOWEST_TOKENS = 4.0, 512.0


class HAMLayer(nn.Module):
    """One HAM layer over all channels of a batch of items; weights are shared by channels and items."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, H = config.width, config.heads
        K = D // H
        G = config.head_state_width
        self.heads, self.head_width, self.state_width = H, K, G
        # both branches share keys and values, unless the state has a width of its own
        self.shared = G == K
        self.window, self.cross_span = config.window_patches, config.cross_span_patches
        self.write_clip, self.config = config.write_clip, config
        self.to_memory = nn.Linear(D, 3 * D if self.shared else 3 * H * G + 2 * D, bias=False)
        self.to_query = nn.Linear(D, D, bias=False)
        self.conv = nn.Parameter(torch.empty(3 * H * G, CONV_WIDTH))  # [3 H G, taps]
        self.to_gates = nn.Linear(D, 4 * H)  # decay, write gate, recurrent gate, scratchpad gate
        self.to_output_gate = nn.Linear(D, D)
        self.to_output = nn.Linear(D, D, bias=False)
        self.decay_rate = nn.Parameter(torch.empty(H))  # [H] log of the decay per patch
        self.query_norm, self.key_norm = HeadNorm(H, K, gain=config.match_gain), HeadNorm(H, K)
        self.recurrent_norm, self.exact_norm = HeadNorm(H, G), HeadNorm(H, K)
        self.narrow = None if self.shared else nn.Linear(H * G, D, bias=False)
        self.from_marks = nn.Parameter(torch.zeros(H, 2, K))  # [H, 2, K]
        self.channel_bias = nn.Parameter(torch.ones(H))  # [H]
        self.scratch_bias = nn.Parameter(torch.full((H,), config.entry_bias))  # [H] entries must not drown fresh keys
        # what runs the recurrence and the read; decided for the whole network by ``HAMNetwork.use_kernels``
        self.kernels: Kernels = TORCH
        self.router = Router(config)
        self.steps = StepEntries(config) if config.resolution == "step" else None
        self.thresholds = ThresholdTable(len(self.router.names), allocation=config.allocation)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            nn.init.uniform_(self.conv, -0.3, 0.3)
            self.conv[:, -1] += 1.0  # start as a pass-through: the newest tap dominates
            tau = torch.logspace(math.log10(FASTEST_TOKENS), math.log10(SLOWEST_TOKENS), self.heads)  # [H]
            self.decay_rate.copy_(torch.log(torch.expm1(1.0 / tau)))
            start_gates(self.config, self.to_gates, self.to_output_gate)
            start_queries(self.config, self.to_query, self.to_memory)

    @property
    def fused(self) -> bool:
        """Whether fused kernels surround the branches: they know layers whose branches share keys and values."""
        return self.kernels.fused and self.shared

    def empty_memory(self, items: int, channels: int, like: torch.Tensor) -> LayerMemory:
        """A memory that has read nothing, for so many items of so many channels."""
        memory = empty_memory(
            items=items,
            channels=channels,
            heads=self.heads,
            head_width=self.head_width,
            state_width=self.state_width,
            window=self.window,
            taps=CONV_WIDTH - 1,
            scores=len(self.router.names),
            marks=MARKS,
            dtype=like.dtype,
            device=like.device,
            carried=replace(
                self.router.empty_carried(items, channels, like),
                write_scale=like.new_zeros(items, channels, self.heads, 2) if self.write_clip else None,
            ),
        )
        if self.steps is None:
            return memory
        steps = like.new_zeros(*memory.pending.routable.shape, *self.steps.weight.shape[:2])  # [B, W, C, P, 3]
        return replace(memory, pending=replace(memory.pending, steps=steps))

    def forward(
        self,
        x: torch.Tensor,
        *,
        tokens: Tokens,
        memory: LayerMemory,
        policy: Policy,
        stepwise: bool = False,
        advance: bool = True,
    ) -> LayerOutput:
        """Read and write a chunk of N patches in parallel.

        Args:
            x: normalised input, [B, C, N, D].
            stepwise: use the step-by-step recurrence instead of the chunked one (``step`` does).
            advance: False where the memory after the chunk is not wanted, as in a forecast; the old one comes back.
        """
        (B, C, N, _), H = x.shape, self.heads
        used = None if memory.pool is None else memory.pool.used()
        policy = replace(policy, use_tags=policy.use_tags and self.router.uses_tags)
        types = len(policy.tags.channels) if policy.use_tags and policy.tags is not None else 0
        after = memory
        memory = memory if N == 1 else memory.side_by_side()
        memory = prepared(memory, tracked=policy.threshold != "fixed", types=types, scores=len(self.router.names))
        turn = self.turn_of(tokens.position)
        of = self._products(x)
        gates = of.gates.reshape(B, C, N, 4, H)  # [B, C, N, 4, H]
        inputs = self._inputs(of.mixed, tokens, memory, turn)
        recurrent, beta, carried = self._recurrent(inputs, gates, tokens, memory, stepwise=stepwise)
        scores = self.router(
            x, recurrent=recurrent, values=inputs.v.unflatten(0, (B, C)), beta=beta, tokens=tokens,
            error_mean=memory.error_mean, carried=carried, narrow=of.narrow, begun=of.begun, fused=self.fused,
        )  # fmt: skip
        local = self._local(inputs, scores, tokens, memory.pending)
        decision = decide(
            local, tokens=tokens, policy=policy, carried=scores.carried, router=self.router,
            thresholds=self.thresholds, frozen=not advance,
        )  # fmt: skip
        queries = self._queries(of.queries, turn)  # [B, N, C, H, K]
        read, entries, until, origin = self._read(queries, decision, memory, policy)
        both = self._both(recurrent.output, read, tokens.marks, gates, of.opened)  # [B, C, N, D]
        output = self.to_output(both)  # [B, C, N, D]
        if advance:
            after = self._after(
                recurrent.state, inputs.tail, scores.error_mean, decision, entries, until, origin, N, policy
            )
            after = after if memory.pool is None else replace(after, pool=memory.pool)
        elif memory.pool is not None and used is not None:
            memory.pool.give_back(used)
        trace = layer_trace(scores, decision, read, entries, until, origin, policy)
        return LayerOutput(output, after, trace)

    def step(self, x: torch.Tensor, *, tokens: Tokens, memory: LayerMemory, policy: Policy) -> LayerOutput:
        """One patch, [B, C, 1, D], through the step-by-step recurrence: what a stream runs."""
        return self.forward(x, tokens=tokens, memory=memory, policy=policy, stepwise=True)

    def _products(self, x: torch.Tensor) -> Products:
        """What the maps of a token, [B, C, N, D], make of it."""
        kind = x.device.type
        products_in = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if self.fused:
            from hamts.ops.layer_products import products

            maps = [(linear.weight, linear.bias) for linear in (self.to_memory, self.to_query, self.to_output_gate)]
            narrow, gates, (mixed, queries, opened, *begun) = products(
                x, kind=products_in, precise=(self.to_gates.weight, self.to_gates.bias), fused=True,
                maps=maps + self.router.maps(),
            )  # fmt: skip
            return Products(narrow, gates, mixed, queries, opened, begun)
        # one cast for all that multiply it
        narrow = x.to(products_in)  # [B, C, N, D]
        # also under mixed precision: a decay of 0.999 has no bfloat16
        with torch.autocast(kind, enabled=False):
            gates = self.to_gates(x.to(self.to_gates.weight.dtype))  # [B, C, N, 4 H]
        return Products(narrow, gates, self.to_memory(narrow), self.to_query(narrow), self.to_output_gate(narrow))

    def turn_of(self, position: torch.Tensor) -> Turn:
        """Angles by which the read's queries and keys turn with time, position [B, N]."""
        return angles(position, self.head_width, self.conv.dtype, self.config.rotary_share)

    def _inputs(self, mixed: torch.Tensor, tokens: Tokens, memory: LayerMemory, turn: Turn) -> Inputs:
        """What both branches take of the projections, [B, C, N, 3 D] or [B, C, N, 3 H G + 2 D]."""
        (B, C, N, _), H, K = mixed.shape, self.heads, self.head_width
        # an absent token is as if it had never been: no trace in the convolution either
        present = tokens.present[:, None, :, None].to(mixed.dtype)  # [B, 1, N, 1]
        before = memory.conv_tail.to(mixed.dtype)  # [B, C, taps - 1, 3 H G]
        if self.fused:
            from hamts.ops import layer_triton

            last = mixed[:, :, 1 - CONV_WIDTH :] * present[:, :, 1 - CONV_WIDTH :]  # [B, C, up to taps - 1, 3 D]
            tail = torch.cat([before[:, :, last.shape[2] :], last], 2)  # [B, C, taps - 1, 3 D]
            return Inputs(
                *layer_triton.layer_inputs(
                    mixed, tail=before, present=tokens.present, conv=self.conv, gain=self.key_norm.gain, turn=turn,
                    pending_keys=memory.pending.keys, pending_values=memory.pending.values,
                ),
                tail,
            )  # fmt: skip
        mixed = mixed * present  # [B, C, N, 3 D] or [B, C, N, 3 H G + 2 D]
        units = mixed[..., : 3 * H * self.state_width]  # [B, C, N, 3 H G]
        padded = torch.cat([before, units], dim=2)  # [B, C, taps - 1 + N, 3 H G]
        pair = mixed[..., -2 * H * K :].reshape(B, C, N, 2, H, K)
        raw_keys, raw_values = pair.unbind(3)  # 2 x [B, C, N, H, K]
        keys = torch.cat([memory.pending.keys, self._turned_keys(raw_keys, turn)], 1)  # [B, W + N, C, H, K]
        values = torch.cat([memory.pending.values, raw_values.transpose(1, 2)], 1)  # [B, W + N, C, H, K]
        return Inputs(*self._convolved(padded), keys, values, padded[:, :, N:])

    def _recurrent(
        self, inputs: Inputs, gates: torch.Tensor, tokens: Tokens, memory: LayerMemory, *, stepwise: bool
    ) -> tuple[GatedDelta, torch.Tensor, Carried]:
        """The gated delta rule, [B, C, ...]; also the write gates, and what is usual."""
        B, C, N, _, H = gates.shape
        G, kind = self.state_width, inputs.v.dtype
        beta = gates[..., 1, :].sigmoid() * tokens.heard[..., None]  # [B, C, N, H]
        elapsed = (tokens.elapsed * tokens.present)[:, None, :, None].to(kind)  # [B, 1, N, 1]
        log_decay = -F.softplus(gates[..., 0, :] + self.decay_rate) * elapsed  # [B, C, N, H]
        # other widths than a head's were not asked about when kernels were chosen
        kernels, carried = self.kernels if self.shared else TORCH, memory.carried
        rule = kernels.gated_delta_step if stepwise else kernels.gated_delta
        if carried.write_scale is not None:
            rule = Clipped(self.write_clip, carried.write_scale.reshape(B * C, H, 2))
        result = rule(
            inputs.q, inputs.k, inputs.v, log_decay=log_decay.reshape(B * C, N, H), beta=beta.reshape(B * C, N, H),
            initial_state=memory.state.reshape(B * C, H, G, G),
        )  # fmt: skip
        if isinstance(rule, Clipped):
            carried = replace(carried, write_scale=rule.scale.reshape(B, C, H, 2))
        return result.over(B, C), beta, carried

    def _convolved(self, padded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Short convolution: [B, C, taps - 1 + N, 3 H G] -> queries and keys of length 1, values, [B C, N, H, G]."""
        B, C, N = padded.shape[0], padded.shape[1], padded.shape[2] - (CONV_WIDTH - 1)
        taps = self.conv.to(padded.dtype)  # [3 H G, taps]
        convolved = padded[:, :, :N] * taps[:, 0]  # [B, C, N, 3 H G]
        for tap in range(1, CONV_WIDTH):
            convolved = convolved + padded[:, :, tap : tap + N] * taps[:, tap]  # [B, C, N, 3 H G]
        q, k, v = F.silu(convolved).reshape(B * C, N, 3, self.heads, self.state_width).unbind(2)  # 3 x [B C, N, H, G]
        return F.normalize(q, dim=-1).to(v.dtype), F.normalize(k, dim=-1).to(v.dtype), v

    def _local(self, inputs: Inputs, scores: Scores, tokens: Tokens, pending: Pending) -> Pending:
        """The window's carried tokens followed by the chunk's own, time first: every field [B, W + N, C, ...]."""
        C = inputs.keys.shape[2]
        chunk = Pending(
            keys=inputs.keys,
            values=inputs.values,
            marks=tokens.marks.transpose(1, 2),
            bias=scores.bias.transpose(1, 2),
            scores=scores.scores.transpose(1, 2),
            position=tokens.position,
            present=tokens.present[:, :, None].expand(-1, -1, C),
            routable=tokens.routable.transpose(1, 2),
            must_keep=tokens.must_keep.transpose(1, 2),
            steps=None if self.steps is None else step_features(tokens, inputs.keys.dtype),
        )
        return chunk.after(pending, tokens.markable)

    def _read(
        self, queries: torch.Tensor, decision: Decision, memory: LayerMemory, policy: Policy
    ) -> tuple[Attended, Entries, torch.Tensor, torch.Tensor]:
        """One softmax over window, other channels and scratchpad; also the merged entries, their end and origin."""
        (N, C), local, kept, pool = queries.shape[1:3], decision.local, memory.scratchpad, memory.pool
        # what the chunk leaves in the window no query of the chunk finds in the scratchpad; for a gradient it is only
        # left out, as one of a slice would fill and add the whole once more
        L = local.position.shape[1] if local.keys.requires_grad else N
        gone = map_tensors(local, lambda tensor: tensor[:, :L]) if local.position.shape[1] > L else local
        routed = decision.routed[:, :L] & (torch.arange(L, device=queries.device) < N)[:, None]  # [B, L, C]
        fresh = as_entries(gone, routed, decision.rank[:, :L], policy.use_tags)  # [B, L C]
        each = 1
        if self.steps is not None and gone.steps is not None:
            fresh, each = self.steps(fresh, gone.steps), self.steps.steps  # [B, L C P]
        fresh = fresh.held(pool)
        kept = replace(kept, keys=kept.keys.to(fresh.keys.dtype), values=kept.values.to(fresh.values.dtype))
        if self.kernels.fused and fresh.keys.requires_grad and self.steps is None:
            entries, origin, keys, values = append_shared(kept, fresh)  # [B, M'], [B, M'], 2 x [B, L C, H, K]
            local = replace(local, keys=keys.view(local.keys.shape), values=values.view(local.values.shape))
        else:
            entries, origin = append_candidates(kept, fresh, fused=self.kernels.fused)  # [B, M']
        # the token at local index l leaves the window when query l is asked
        visible_from = torch.where(origin >= 0, origin // (C * each), 0)  # [B, M']
        until = end_times(entries, visible_from, policy, fused=self.kernels.fused)  # [B, M']
        scratch = entries.as_keys(pool, head_bias=self.scratch_bias, since=visible_from, until=until)
        spans = {"window": self.window, "cross_span": self.cross_span}
        read = self.kernels.attend(
            sharpened(queries, scratch, policy.readable, **spans, reference=self.config.read_reference),
            local_keys=local.keys,
            local_values=local.values,
            local_present=local.present,
            scratch=scratch,
            readable=policy.readable,
            channel_bias=self.channel_bias,
            local_marks=local.marks,
            **spans,
        )
        return read, entries, until, visible_from

    def _queries(self, raw: torch.Tensor, turn: Turn) -> torch.Tensor:
        """Queries of the read: [B, C, N, D] -> [B, N, C, H, K], normed, turned and scaled."""
        if self.fused:
            from hamts.ops import layer_triton

            return layer_triton.turned_queries(raw, gain=self.query_norm.gain, turn=turn, scale=self.head_width**-0.5)
        return self._turned_queries(raw, turn)

    def _turned_queries(self, raw: torch.Tensor, turn: Turn) -> torch.Tensor:
        heads = self.query_norm(raw.unflatten(-1, (self.heads, -1))).transpose(1, 2)  # [B, N, C, H, K]
        return (turned(heads, turn) * self.head_width**-0.5).to(raw.dtype)

    def _turned_keys(self, raw: torch.Tensor, turn: Turn) -> torch.Tensor:
        """Keys of the read: [B, C, N, H, K] -> [B, N, C, H, K]."""
        return turned(self.key_norm(raw).transpose(1, 2), turn).to(raw.dtype)

    def _both(
        self, recurrent: torch.Tensor, read: Attended, now: torch.Tensor, gates: torch.Tensor, opened: torch.Tensor
    ) -> torch.Tensor:
        """Two independent head-wise gates over both branches, and an output gate: [B, C, N, D]."""
        if self.fused and read.marks is not None:
            from hamts.ops import layer_triton

            return layer_triton.mixed_branches(
                recurrent, read.output, marks=read.marks, now=now, gates=gates, opened=opened,
                recurrent_gain=self.recurrent_norm.gain, exact_gain=self.exact_norm.gain, from_marks=self.from_marks,
            )  # fmt: skip
        return self._mix(recurrent, read.output, read.marks, now, gates, opened)

    def _mix(
        self,
        recurrent: torch.Tensor,
        exact: torch.Tensor,
        marks: torch.Tensor | None,
        now: torch.Tensor,
        gates: torch.Tensor,
        opened: torch.Tensor,
    ) -> torch.Tensor:
        exact = exact.transpose(1, 2)  # [B, C, N, H, V]
        if marks is not None:
            exact = exact + self._relative_level(marks.transpose(1, 2), now)  # [B, C, N, H, V]
        gate_recurrent, gate_exact = gates[..., 2, :, None].sigmoid(), gates[..., 3, :, None].sigmoid()
        past = self.recurrent_norm(recurrent)  # [B, C, N, H, G]
        if self.narrow is not None:
            past = self.narrow(past.flatten(-2)).reshape(exact.shape)  # [B, C, N, H, V]
        both = gate_recurrent * past + gate_exact * self.exact_norm(exact)
        return (both.flatten(-2) * opened.sigmoid()).to(opened.dtype)

    def _relative_level(self, read: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
        """Level and scale of what was read, against now: read [B, C, N, H, R], now [B, C, N, R] -> [B, C, N, H, V].

        The marks are (level, log scale, 1), so the last column of what was read is the share read from the own channel.
        """
        share = read[..., 2:]  # [B, C, N, H, 1]
        apart = read[..., :2] - share * now[..., None, :2]  # [B, C, N, H, 2]
        level = torch.asinh(apart[..., :1] * torch.exp(-now[..., None, 1:2]))  # [B, C, N, H, 1]
        pair = torch.cat([level, apart[..., 1:].clamp(-5, 5)], -1)  # [B, C, N, H, 2]
        return torch.einsum("bcnhr,hrv->bcnhv", pair, self.from_marks)

    def _after(
        self,
        state: torch.Tensor,
        tail: torch.Tensor,
        error_mean: torch.Tensor,
        decision: Decision,
        entries: Entries,
        until: torch.Tensor,
        visible_from: torch.Tensor,
        N: int,
        policy: Policy,
    ) -> LayerMemory:
        """The memory as the next chunk finds it: evicted entries gone, tokens still in the window pending."""
        survives = entries.alive & (visible_from <= N - 1) & (until > N - 1)  # [B, M']
        nothing = map_tensors(entries, lambda tensor: tensor[:, :0])
        most = None if policy.cap_kept is None or policy.cap_must is None else policy.cap_kept + policy.cap_must
        survivors = replace(entries, alive=survives)
        scratchpad, _ = merge_candidates(nothing, survivors, most=most, fused=self.kernels.fused)
        local = decision.local if decision.local.asked is None else replace(decision.local, asked=decision.asked)
        pending = map_tensors(local, lambda tensor: tensor[:, -self.window :])
        return LayerMemory(state, tail, error_mean, pending, scratchpad, decision.carried)
