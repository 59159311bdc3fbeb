"""What a fit asks of its process: memory kept for the next step, and no chatter."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
from collections.abc import Iterator

__all__ = ["keep_freed_memory", "quiet_lightning"]

# of glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Ask glibc to keep what is freed for the next step instead of handing pages back and faulting them in again.

    A step frees and takes the same few hundred megabytes; this saves a fifth of its time. It holds for the process, and
    does nothing where the allocator is another one.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
            mallopt(parameter, value)


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """No banners, no tips: hamts says what there is to say."""
    loggers = [
        logging.getLogger(name)
        for name in (
            "lightning.pytorch",
            "lightning.fabric",
            "lightning",
            "lightning.pytorch.utilities.rank_zero",
            "lightning.fabric.utilities.rank_zero",
        )
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
