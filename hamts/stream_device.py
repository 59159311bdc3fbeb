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

__all__ = ["network_on"]


def network_on(model: HAMForecaster, device: str) -> HAMNetwork:
    """The model's network there; its kernels are chosen here, once.

    Raises DataError E-OPTION where there is no such device, or none of that name.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise DataError(
            "E-OPTION", f"device must be 'cpu', 'cuda' or 'cuda:' and a number. Got {device!r}.", fix="device='cuda'"
        )
    network = model._fitted.network.eval()
    if device == "cpu":
        return network
    count = torch.cuda.device_count()
    number = torch.device(device).index or 0
    if number >= count:
        there = [f"cuda:{n}" for n in range(count)]
        raise DataError(
            "E-OPTION",
            f"The device of a stream must be there. Got device={device!r}; there are {['cpu', *there]}.",
            fix="Run it on a machine with a CUDA device, or leave device='cpu'.",
        )
    config, weight = network.config, network.head.project.weight
    kernels = resolve_kernels("auto", device=device, head_width=config.width // config.heads, dtype=weight.dtype)
    moved = copy.deepcopy(network).to(device).eval()
    moved.use_kernels(kernels)
    return moved
