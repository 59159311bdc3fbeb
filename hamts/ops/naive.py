"""Every op written one step, or one query, at a time: what the fast ones must equal.

B items · C channels · N patches · H heads · K key · V value · M entries (scratchpad) · W window patches · R marks
J keys one query sees
"""

from __future__ import annotations

import torch

from hamts.ops.types import Attended, GatedDelta, ScratchKeys, compute_dtype

__all__ = ["attend", "gated_delta"]


def gated_delta(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    chunk: int = 32,
) -> GatedDelta:
    """Write every value into a recurrent state after predicting it from the key.

    S_n = a_n S_{n-1} + k_n (b_n e_n)^T with e_n = v_n - (a_n S_{n-1})^T k_n. The output S_n^T q_n is read after the
    write.

    Args:
        queries: [B, N, H, K], already scaled.
        keys: [B, N, H, K].
        values: [B, N, H, V].
        log_decay: log a, at most 0, [B, N, H].
        beta: write gate b; 0 leaves the state unwritten, prediction and error are right all the same, [B, N, H].
        initial_state: state carried from before the first step, [B, H, K, V]; None: zeros.
        chunk: unused here; the twin in ``gated_delta.py`` works in chunks of it.

    Source: gated delta rule, arXiv 2412.06464; the error before the write is what HAM (arXiv 2603.22325) routes on.
    """
    dtype = compute_dtype(queries, keys, values, log_decay, beta, initial_state)
    n_items, n_patches, n_heads, key_width = keys.shape
    q, k, v = queries.to(dtype), keys.to(dtype), values.to(dtype)
    decay, gate = log_decay.to(dtype).exp(), beta.to(dtype)  # [B, N, H], [B, N, H]
    zeros = v.new_zeros(n_items, n_heads, key_width, v.shape[-1])  # [B, H, K, V]
    state = zeros if initial_state is None else initial_state.to(dtype)  # [B, H, K, V]
    outputs, predictions, errors = [], [], []
    with torch.autocast(v.device.type, enabled=False):
        for n in range(n_patches):
            state = state * decay[:, n, :, None, None]  # [B, H, K, V]
            # the state must be read before it is written, or every step looks predictable
            prediction = torch.einsum("bhkv,bhk->bhv", state, k[:, n])  # [B, H, V]
            error = v[:, n] - prediction  # [B, H, V]
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, n], gate[:, n, :, None] * error)  # [B, H, K, V]
            outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, n]))  # [B, H, V]
            predictions.append(prediction)
            errors.append(error)
    return GatedDelta(
        output=torch.stack(outputs, 1).to(values.dtype),  # [B, N, H, V]
        prediction=torch.stack(predictions, 1).to(values.dtype),  # [B, N, H, V]
        error=torch.stack(errors, 1).to(values.dtype),  # [B, N, H, V]
        state=state,
    )


def attend(
    queries: torch.Tensor,
    *,
    local_keys: torch.Tensor,
    local_values: torch.Tensor,
    local_present: torch.Tensor,
    scratch: ScratchKeys | None,
    readable: torch.Tensor,
    channel_bias: torch.Tensor,
    window: int,
    cross_span: int = 1,
    local_marks: torch.Tensor | None = None,
    block: int = 64,
) -> Attended:
    """Read the window, the other channels and the scratchpad under one softmax.

    Query n of channel c sees, of what is present: its own channel's patches n-W+1 .. n; the last ``cross_span``
    patches of every channel it may read; the scratchpad entries of those channels and its own with
    visible_from <= n < visible_until. A query that sees nothing gets 0.

    Args:
        queries: [B, N, C, H, K], already scaled and rotated.
        local_keys: W patches from before the chunk, then the chunk's own, [B, W+N, C, H, K].
        local_values: [B, W+N, C, H, V].
        local_present: absent keys are never seen, bool [B, W+N, C].
        scratch: the scratchpad, or None.
        readable: may the query's channel (row) read the key's (column)? The own one always, bool [B, C, C].
        channel_bias: added to the logits of keys of the query's own channel, [H].
        window: W, at least 1.
        cross_span: patches of other channels, 0 .. W; 1 is the same step only.
        local_marks: what ``Attended.marks`` averages, [B, W+N, C, R].
        block: unused here; the twin in ``attend.py`` works in blocks of this many queries.

    Source: the read of HAM, arXiv 2603.22325; channels, ``cross_span`` and the biases are ours.
    """
    del block
    pad = None if scratch is None or scratch.keys.shape[1] == 0 else scratch
    entries = (None,) * 3 if pad is None else (pad.keys, pad.values, pad.bias)
    dtype = compute_dtype(queries, local_keys, local_values, channel_bias, local_marks, *entries)
    n_items, n_patches, n_channels, n_heads, _ = queries.shape
    output_rows, mark_rows = [], []
    local_mass = torch.zeros(local_present.shape, dtype=dtype, device=queries.device)  # [B, W+N, C]
    scratch_mass = None
    if scratch is not None:
        scratch_mass = torch.zeros(scratch.channel.shape, dtype=dtype, device=queries.device)  # [B, M]
    for b in range(n_items):
        for n in range(n_patches):
            for c in range(n_channels):
                places = _local_places(local_present, readable, b, n, c, window, cross_span)
                steps, sources = [p[0] for p in places], [p[1] for p in places]
                seen_keys = [local_keys[b, steps, sources].to(dtype)]  # [J, H, K]
                seen_values = [local_values[b, steps, sources].to(dtype)]  # [J, H, V]
                bias = [queries.new_zeros(len(places), n_heads, dtype=dtype)]  # [J, H]
                own = [source == c for source in sources]
                marks = None if local_marks is None else [local_marks[b, steps, sources].to(dtype)]  # [J, R]
                chosen: list[int] = []
                if pad is not None:
                    chosen = _scratch_places(pad, readable, b, n, c)
                    seen_keys.append(pad.keys[b, chosen].to(dtype))  # [J, H, K]
                    seen_values.append(pad.values[b, chosen].to(dtype))  # [J, H, V]
                    entry_bias = pad.bias if pad.bias.ndim == 3 else pad.bias[:, :, None]  # [B, M, H] or [B, M, 1]
                    bias.append(entry_bias[b, chosen].to(dtype).expand(len(chosen), n_heads))  # [J, H]
                    own += [int(pad.channel[b, m]) == c for m in chosen]
                    if marks is not None and pad.marks is not None:
                        marks.append(pad.marks[b, chosen].to(dtype))  # [J, R]
                is_own = torch.tensor(own, dtype=dtype, device=queries.device)  # [J]
                logits = torch.einsum("hk,jhk->jh", queries[b, n, c].to(dtype), torch.cat(seen_keys))  # [J, H]
                logits = logits + torch.cat(bias) + is_own[:, None] * channel_bias.to(dtype)  # [J, H]
                weight = torch.softmax(logits, 0)  # [J, H]
                output_rows.append(torch.einsum("jh,jhv->hv", weight, torch.cat(seen_values)))  # [H, V]
                if marks is not None:
                    mark_rows.append(torch.einsum("jh,j,jr->hr", weight, is_own, torch.cat(marks)))  # [H, R]
                received = weight.detach().sum(1)  # [J]
                local_mass[b, steps, sources] += received[: len(places)]
                if scratch_mass is not None:
                    scratch_mass[b, chosen] += received[len(places) :]
    lead = (n_items, n_patches, n_channels)
    return Attended(
        output=torch.stack(output_rows).unflatten(0, lead).to(queries.dtype),  # [B, N, C, H, V]
        marks=torch.stack(mark_rows).unflatten(0, lead).to(queries.dtype) if mark_rows else None,  # [B, N, C, H, R]
        scratch_mass=scratch_mass,
        local_mass=local_mass,
    )


def _local_places(
    present: torch.Tensor, readable: torch.Tensor, b: int, n: int, c: int, window: int, cross_span: int
) -> list[tuple[int, int]]:
    """(local index, channel) of every window key that query (n, c) sees."""
    places = [(window + n - age, c) for age in range(window)]
    others = [d for d in range(present.shape[2]) if d != c and readable[b, c, d]]
    places += [(window + n - age, d) for age in range(cross_span) for d in others]
    return [(step, source) for step, source in places if present[b, step, source]]


def _scratch_places(scratch: ScratchKeys, readable: torch.Tensor, b: int, n: int, c: int) -> list[int]:
    """Every entry that query (n, c) sees."""
    chosen = []
    for m in range(scratch.keys.shape[1]):
        source = int(scratch.channel[b, m])
        alive = int(scratch.visible_from[b, m]) <= n < int(scratch.visible_until[b, m])
        if alive and (source == c or readable[b, c, source]):
            chosen.append(m)
    return chosen
