"""What goes into the network and what is decided about it. Plain containers; every tensor's shape beside its field.

B items · C channels · N patches · P steps in a patch · L look-ahead patches · G level features · R marks
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from hamts.nn.controls import Control

if TYPE_CHECKING:
    from hamts.nn.tags import TagRules

__all__ = ["Policy", "Tokens", "map_tensors"]

T = TypeVar("T")


def map_tensors(container: T, function: Callable[[torch.Tensor], torch.Tensor]) -> T:
    """Apply a function to every tensor of nested dataclasses, lists and tuples; everything else stays."""
    if isinstance(container, torch.Tensor):
        return function(container)  # type: ignore[return-value]
    if isinstance(container, list | tuple):
        return type(container)(map_tensors(part, function) for part in container)
    if is_dataclass(container) and not isinstance(container, type):
        changed: dict[str, Any] = {f.name: map_tensors(getattr(container, f.name), function) for f in fields(container)}
        return replace(container, **changed)
    return container


@dataclass(frozen=True)
class Tokens:
    """One chunk of every channel's tokens, scaled."""

    values: torch.Tensor  # [B, C, N, P] scaled; 0 where not observed; codes in categorical channels
    observed: torch.Tensor  # [B, C, N, P] bool
    tags: torch.Tensor  # [B, C, N, P] bool: an event or an action of this channel at this step
    event_offset: torch.Tensor  # [B, C, N, P] where inside its step an event lies, [0, 1)
    ahead_values: torch.Tensor  # [B, C, N, L*P] scaled values of the next patches, known-ahead channels only
    ahead_observed: torch.Tensor  # [B, C, N, L*P] bool
    calendar: torch.Tensor  # [B, N, F] of the patch's first step
    level: torch.Tensor  # [B, C, N, G] where level and scale stand against slower statistics, and the bounds
    marks: torch.Tensor  # [B, C, N, R] level and log scale of the stream at the token's end, and 1
    heard: torch.Tensor  # [B, C, N] how much of the token may be written, [0, 1]; 0 for gaps, 1 for tagged patches
    present: torch.Tensor  # [B, N] bool: False before an item's first patch
    routable: torch.Tensor  # [B, C, N] bool: may be kept by its score
    must_keep: torch.Tensor  # [B, C, N] bool: kept whatever its score
    position: torch.Tensor  # [B, N] float64 true time, in patches since the stream's origin
    elapsed: torch.Tensor  # [B, N] patches since the token before
    static_values: torch.Tensor  # [B, E] numeric static columns, standardised; 0 where missing
    static_codes: torch.Tensor  # [B, E'] int64
    markable: torch.Tensor | None = None  # [B, C, N] bool: an observed target, which tags of its surroundings may keep


@dataclass(frozen=True)
class Policy:
    """What the scratchpad may do in one forward pass; fixed before the pass, so that no decision reads the future.

    Attributes:
        share: budget share asked for, per item, [B].
        readable: may the query's channel read the key's channel, [B, C, C] bool.
        cap_kept, cap_must: most entries per layer kept by score, and by tag; None for no cap.
        cap_each: most entries of each item kept by score, where less than ``cap_kept``, [B] int64 (a control).
        use_tags: whether must-keep tokens are kept at all (an emptied memory keeps none).
        control: what decides in the router's place.
        threshold: one of ``hamts.config.THRESHOLDS``.
        eviction: one of ``hamts.config.EVICTIONS``.
        key: one number per item, [B] int64, from which chance is counted; None: 0.
        tags: rules of typed tags; None: all tags alike.
        entries_per_token: caps and quotas are whole tokens.
        explore_share, explore_generator: keep some unrouted tokens at random (training only).
        masses: whether the trace tells the attention that entries received; it costs a pass over them.
    """

    share: torch.Tensor
    readable: torch.Tensor
    cap_kept: int | None = None
    cap_must: int | None = None
    cap_each: torch.Tensor | None = None
    use_tags: bool = True
    control: Control | None = None
    threshold: str = "fixed"
    eviction: str = "fifo"
    key: torch.Tensor | None = None
    tags: TagRules | None = None
    entries_per_token: int = 1
    explore_share: float = 0.0
    explore_generator: torch.Generator | None = None
    masses: bool = True
