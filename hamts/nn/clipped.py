"""The gated delta rule with a limit on what one token may write.

B items times channels · N patches · H heads · K key · V value
"""

from __future__ import annotations

import torch

from hamts.ops.types import GatedDelta, compute_dtype

__all__ = ["Clipped", "clipped_delta"]

SCALE_HALF_LIFE_TOKENS = 64.0
# before so many tokens were written nobody knows what is usual
FEWEST_TOKENS = 4.0
SMALLEST_ERROR = 1e-6


class Clipped:
    """``clipped_delta`` as the other rules are called; afterwards ``scale`` is the one to carry on."""

    def __init__(self, limit: float, scale: torch.Tensor) -> None:
        self.limit, self.scale = limit, scale

    def __call__(self, *qkv: torch.Tensor, **given: torch.Tensor) -> GatedDelta:
        result, self.scale = clipped_delta(*qkv, **given, scale=self.scale, limit=self.limit)
        return result


def clipped_delta(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    scale: torch.Tensor,
    limit: float,
) -> tuple[GatedDelta, torch.Tensor]:
    """``ops.naive.gated_delta`` with S_n = a_n S_{n-1} + k_n (b_n c_n e_n)^T, c_n = min(1, limit s_n / ||e_n||).

    s_n is the geometric running mean of earlier ||e||, which one absurd value moves by little. How much is written
    depends on the state that earlier clipped writes left, so there is no parallel form: the rule runs step by step,
    in a stream as in a chunk, and the two agree to the last digit that the rest of the layer gives them. The error that
    comes back is the whole one.

    Args:
        queries, keys, values: [B, N, H, K], [B, N, H, K], [B, N, H, V].
        log_decay, beta: [B, N, H]; what has a gate of 0 counts for no scale.
        initial_state: [B, H, K, V].
        scale: sum of log ||e|| and weight from before, [B, H, 2].

    Returns:
        The result, and the scale to carry on.
    """
    dtype = compute_dtype(queries, keys, values, log_decay, beta, initial_state)
    q, k, v = queries.to(dtype), keys.to(dtype), values.to(dtype)
    decay, gate, state, sums = log_decay.to(dtype).exp(), beta.to(dtype), initial_state.to(dtype), scale.to(dtype)
    forget = 0.5 ** (1.0 / SCALE_HALF_LIFE_TOKENS)
    outputs, predictions, errors = [], [], []
    with torch.autocast(v.device.type, enabled=False):
        for n in range(k.shape[1]):
            state = state * decay[:, n, :, None, None]  # [B, H, K, V]
            prediction = torch.einsum("bhkv,bhk->bhv", state, k[:, n])  # [B, H, V]
            error = v[:, n] - prediction  # [B, H, V]
            size = error.detach().norm(dim=-1).clamp_min(SMALLEST_ERROR)  # [B, H]
            usual = torch.exp(sums[..., 0] / sums[..., 1].clamp_min(1.0))  # [B, H]
            known = sums[..., 1] >= FEWEST_TOKENS  # [B, H]
            part = torch.where(known, (limit * usual / size).clamp_max(1.0), 1.0)  # [B, H]
            written = (gate[:, n] * part)[..., None] * error  # [B, H, V]
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, n], written)  # [B, H, K, V]
            counted = torch.stack([size.log(), torch.ones_like(size)], -1)  # [B, H, 2]
            sums = torch.where((gate[:, n] > 0)[..., None], forget * sums + counted, sums)  # [B, H, 2]
            outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, n]))  # [B, H, V]
            predictions.append(prediction)
            errors.append(error)
    result = GatedDelta(
        output=torch.stack(outputs, 1).to(values.dtype),  # [B, N, H, V]
        prediction=torch.stack(predictions, 1).to(values.dtype),  # [B, N, H, V]
        error=torch.stack(errors, 1).to(values.dtype),  # [B, N, H, V]
        state=state,
    )
    return result, sums.detach()
