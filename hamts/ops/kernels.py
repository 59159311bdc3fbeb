"""Which form runs the recurrence and the read: decided once for a model, and never changed behind anyone's back.

``torch`` runs everywhere. ``fla`` runs the recurrence on the kernels of flash-linear-attention, ``triton`` the read on
hamts' own. ``auto`` takes each of them where it can run, and ``Kernels.why`` says what spoke against the others.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch

from hamts.ops import naive
from hamts.ops.attend import attend
from hamts.ops.gated_delta import gated_delta
from hamts.ops.types import Attended, GatedDelta

__all__ = [
    "KERNELS",
    "TORCH",
    "KernelError",
    "Kernels",
    "fla_problem",
    "launched_on",
    "resolve_kernels",
    "triton_problem",
]

KERNELS = ("auto", "torch", "fla", "triton", "fla+triton")
INSTALL = "pip install 'hamts[gpu]'"
FLA_WIDTHS, TRITON_WIDTHS = (2, 256), (16, 128)
OLDEST_FLA = (0, 4)
# a compiler defect: gradients of the gated rule are wrong on Hopper in between (fla issue 640)
WRONG_FROM, RIGHT_AGAIN = (3, 4), (3, 7, 1)
HOPPER, OLDEST_CAPABILITY = 9, (8, 0)


class KernelError(ValueError):
    """A kernel was asked for that cannot run here."""


@dataclass(frozen=True)
class Kernels:
    """What runs each branch of a layer.

    Attributes:
        name: ``torch``, ``fla``, ``triton`` or ``fla+triton``.
        why: how it came to that.
    """

    name: str
    why: str = ""

    @property
    def recurrence(self) -> str:
        return "fla" if "fla" in self.name else "torch"

    @property
    def read(self) -> str:
        return "triton" if "triton" in self.name else "torch"

    @property
    def fused(self) -> bool:
        """Whether what lies between the two branches runs as kernels too, in ``ops/layer_triton.py``."""
        return self.read == "triton"

    @property
    def gated_delta(self) -> Callable[..., GatedDelta]:
        """The recurrence over many steps. No gradient goes through its error: routers detach it."""
        if self.recurrence == "torch":
            return gated_delta
        from hamts.ops import gated_delta_fla

        return partial(gated_delta_fla.gated_delta, error_grad=False)

    @property
    def gated_delta_step(self) -> Callable[..., GatedDelta]:
        """The recurrence step by step, as a stream runs it."""
        if self.recurrence == "torch":
            return naive.gated_delta
        from hamts.ops import gated_delta_fla

        return gated_delta_fla.gated_delta_step

    @property
    def attend(self) -> Callable[..., Attended]:
        """The read."""
        if self.read == "torch":
            return attend
        from hamts.ops import attend_triton

        # a layer's marks are level, log scale and 1
        return partial(attend_triton.attend, share_mark=True)


TORCH = Kernels("torch", "runs everywhere")


def resolve_kernels(
    asked: str, *, device: str | torch.device, head_width: int, dtype: torch.dtype = torch.float32
) -> Kernels:
    """Decide what runs.

    Args:
        asked: one of ``KERNELS``.
        device: where the model is.
        head_width: K, of one head.
        dtype: of the weights.

    Raises:
        KernelError: an unknown name, or a kernel that cannot run; it says why, and what to install or change.
    """
    if asked not in KERNELS:
        raise KernelError(f"Unknown kernel {asked!r}. Available: {list(KERNELS)}.")
    if asked == "torch":
        return Kernels("torch", "as asked")
    problems = {
        "fla": fla_problem(device, head_width=head_width, dtype=dtype),
        "triton": triton_problem(device, head_width=head_width, dtype=dtype),
    }
    if asked != "auto":
        for name in asked.split("+"):
            if problems[name] is not None:
                raise KernelError(f"kernel={asked!r} cannot run: {problems[name]} Or use kernel='torch'.")
        return Kernels(asked, "as asked")
    if torch.device(device).type != "cuda":
        return Kernels("torch", "no CUDA device is used")
    usable = [name for name, problem in problems.items() if problem is None]
    against = [f"not {name}: {problem}" for name, problem in problems.items() if problem is not None]
    return Kernels("+".join(usable) or "torch", " ".join(against) or "the fastest that runs here")


def fla_problem(
    device: str | torch.device, *, head_width: int | None = None, dtype: torch.dtype = torch.float32
) -> str | None:
    """Why the recurrence cannot run on fla's kernels there, and what to do; None if it can."""
    problem = _device_problem(device) or _package_problem("fla", "fla-core", OLDEST_FLA)
    problem = problem or _package_problem("triton", "triton", None) or _dtype_problem(dtype, "fla")
    if problem is not None:
        return problem
    wrong = WRONG_FROM <= _version("triton") < RIGHT_AGAIN
    if wrong and torch.cuda.get_device_capability(torch.device(device))[0] == HOPPER:
        return (
            f"triton {metadata.version('triton')} gives wrong gradients of the gated delta rule on Hopper GPUs"
            " (flash-linear-attention issue 640); 3.4.0 and later are affected, 3.7.1 is not."
            " Install it: pip install 'triton>=3.7.1' (torch 2.13 is built for it)."
        )
    return _width_problem(head_width, FLA_WIDTHS, "fla")


def triton_problem(
    device: str | torch.device, *, head_width: int | None = None, dtype: torch.dtype = torch.float32
) -> str | None:
    """Why the read cannot run on hamts' own kernels there, and what to do; None if it can."""
    problem = _device_problem(device) or _package_problem("triton", "triton", None) or _dtype_problem(dtype, "triton")
    if problem is not None:
        return problem
    if importlib.util.find_spec("hamts.ops.attend_triton") is None:
        return "this version of hamts has no such kernel for the read."
    capability = torch.cuda.get_device_capability(torch.device(device))
    if capability < OLDEST_CAPABILITY:
        return f"the read's kernel needs a GPU of compute capability 8.0 or newer. Got {capability[0]}.{capability[1]}."
    return _width_problem(head_width, TRITON_WIDTHS, "triton")


def _device_problem(device: str | torch.device) -> str | None:
    kind = torch.device(device).type
    if kind != "cuda":
        return f"it needs a CUDA device. Got device={kind!r}; use accelerator='gpu' on a machine that has one."
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else " (torch is built without CUDA)"
        return f"it needs a CUDA device, and torch sees none{built}."
    return None


def _package_problem(module: str, package: str, oldest: tuple[int, ...] | None) -> str | None:
    if importlib.util.find_spec(module) is None:
        return f"{package} is not installed: {INSTALL}."
    if oldest is not None and _version(package) < oldest:
        wanted = ".".join(str(part) for part in oldest)
        return f"{package} {wanted} or newer is needed. Got {metadata.version(package)}: {INSTALL}."
    return None


def _dtype_problem(dtype: torch.dtype, name: str) -> str | None:
    if dtype in (torch.float32, torch.bfloat16, torch.float16):
        return None
    return f"the {name} kernels take float32, bfloat16 and float16. Got {dtype}; use another precision."


def _width_problem(head_width: int | None, widths: tuple[int, int], name: str) -> str | None:
    low, high = widths
    if head_width is None or (low <= head_width <= high and head_width % 2 == 0):
        return None
    return (
        f"the {name} kernels take even head widths from {low} to {high}. Got {head_width}:"
        " choose another width or number of heads."
    )


def _version(package: str) -> tuple[int, ...]:
    """Leading numbers of an installed package's version."""
    numbers = []
    for part in metadata.version(package).split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def launched_on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device, which need not be the tensors'; nothing to do on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
