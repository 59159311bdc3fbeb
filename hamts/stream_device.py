"""Where a stream runs: the fitted network as it is, or a copy of it on a GPU, on the kernels that run there."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING

import torch

from hamts.errors import DataError
from hamts.ops.kernels import resolve_kernels

if TYPE_CHECKING:
    from hamts.forecaster import HAMForecaster
    from hamts.reader import HAMNetwork

__all__ = ["HERE", "check_device", "network_on"]

# options of a stream that are the machine's, which no state knows of
HERE = ("device", "recorded")

# as torch writes them: of a number with zeros before it, or of one beyond a byte, torch knows nothing
NAMES = re.compile(r"cpu|cuda(?::(?P<number>0|[1-9][0-9]{0,3}))?", re.ASCII)


def check_device(device: object) -> None:
    """Raises DataError E-OPTION where there is no such device, or none of that name."""
    named = NAMES.fullmatch(device) if isinstance(device, str) else None
    if named is None:
        raise DataError(
            "E-OPTION", f"device must be 'cpu', 'cuda' or 'cuda:' and a number. Got {device!r}.", fix="device='cuda'"
        )
    count = torch.cuda.device_count()
    if device != "cpu" and int(named["number"] or 0) >= count:
        there = [f"cuda:{n}" for n in range(count)]
        raise DataError(
            "E-OPTION",
            f"The device of a stream must be there. Got device={device!r}; there are {['cpu', *there]}.",
            fix="Run it on a machine with a CUDA device, or leave device='cpu'.",
        )


def network_on(model: HAMForecaster, device: str) -> HAMNetwork:
    """The model's network there; its kernels are chosen here, once.

    Raises DataError E-OPTION where there is no such device, or none of that name.
    """
    check_device(device)
    network = model._fitted.network.eval()
    if device == "cpu":
        return network
    config, weight = network.config, network.head.project.weight
    kernels = resolve_kernels("auto", device=device, head_width=config.width // config.heads, dtype=weight.dtype)
    moved = copy.deepcopy(network).to(device).eval()
    moved.use_kernels(kernels)
    return moved
