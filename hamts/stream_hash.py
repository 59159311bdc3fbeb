"""Names for a model and a state that change when anything in them does."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hamts.data.panel import Schema
from hamts.reader import HAMNetwork
from hamts.stream_state import as_numpy

if TYPE_CHECKING:
    from hamts.resolve import Plan

__all__ = ["hash_model", "hash_state"]

# facts about deliveries, not about the stream
NOT_HASHED = ("items.counts",)
# how a stream lies in memory, which changes nothing that it knows
LAYOUT = ("store",)


def hash_model(network: HAMNetwork, schema: Schema, plan: Plan) -> str:
    """SHA-256 over weights, schema and plan."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        _add(digest, name, as_numpy(tensor))
    digest.update(_facts({"schema": schema.to_dict(), "plan": plan.to_dict()}))
    return digest.hexdigest()


def hash_state(arrays: dict[str, torch.Tensor | np.ndarray], meta: dict[str, Any]) -> str:
    """SHA-256 over what ``Stream.state`` gave, items in the order of their ids; counters of rows do not count."""
    ids = [str(each) for each in meta["item_ids"]]
    order = np.array(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64)
    digest = hashlib.sha256()
    for name in sorted(arrays):
        if name not in NOT_HASHED:
            _add(digest, name, as_numpy(arrays[name])[order])
    config = {name: value for name, value in meta.get("config", {}).items() if name not in LAYOUT}
    digest.update(_facts({**meta, "config": config, "item_ids": sorted(ids)}))
    return digest.hexdigest()


def _add(digest: Any, name: str, array: np.ndarray) -> None:
    whole = np.ascontiguousarray(array)
    digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
    digest.update(whole.tobytes())


def _facts(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, default=str).encode()
