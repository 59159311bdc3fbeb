"""What a tag of an event or action column asks for."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TagType"]


@dataclass(frozen=True, kw_only=True)
class TagType:
    """What a tag of one event or action column asks for.

    Attributes:
        name: the column.
        priority: where tags without a quota of their own share what is left, lower ones leave first.
        quota: share of the must-keep entries reserved for this type, and the most it may hold; None: no quota of its
            own.
        before_patches: patches before the tag that are kept with it; they must still be in the window.
        after_patches: patches after it: the effect of an action comes later.
    """

    name: str
    priority: float = 1.0
    quota: float | None = None
    before_patches: int = 0
    after_patches: int = 0

    def __post_init__(self) -> None:
        if not self.priority > 0:
            raise ValueError(f"priority must be above 0. Got {self.priority} for tag type {self.name!r}.")
        if self.quota is not None and not 0 <= self.quota <= 1:
            raise ValueError(f"quota must lie in [0, 1]. Got {self.quota} for tag type {self.name!r}.")
        for name in ("before_patches", "after_patches"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more. Got {getattr(self, name)} for tag type {self.name!r}.")
