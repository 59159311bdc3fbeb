"""Named arrays as the bytes of a safetensors file, and back, without torch where no tensor needs it.

What is read is checked before it is made: the size of the header, the number of arrays, their names and kinds. All of
them copy, so nothing that was read shares memory with anything else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hamts.storage_checks import Refusal

if TYPE_CHECKING:
    import torch

__all__ = ["pack_arrays", "unpack_arrays"]

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
# kinds of numbers, by their name in safetensors
KINDS = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "F32": "float32", "F64": "float64",
}  # fmt: skip
MOST_ARRAYS = 100_000
MOST_HEADER_BYTES = 1 << 25


def pack_arrays(arrays: Mapping[str, np.ndarray | torch.Tensor]) -> tuple[bytes, list[str]]:
    """The file's bytes, and the names of those that are torch tensors. Equal arrays give equal bytes.

    Raises ValueError: a name or a kind of number that could not be read back.
    """
    from safetensors.numpy import save

    plain, tensors = {}, []
    for name, array in arrays.items():
        if not _is_plain(name):
            raise ValueError(f"The name of an array must match {NAME.pattern!r}, without '..'. Got {name!r}.")
        if not isinstance(array, np.ndarray | np.generic):
            tensors.append(name)
            array = _as_array(name, array)
        if array.dtype.name not in KINDS.values():
            raise ValueError(f"Array {name!r} must hold one of {sorted(KINDS.values())}. Got {array.dtype}.")
        # safetensors takes memory as it lies; nothing is copied that lies well
        plain[name] = np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")
    return save(plain), sorted(tensors)


def unpack_arrays(
    folder: Path, name: str, content: bytes, *, tensors: Iterable[str] = (), refuse: Refusal
) -> dict[str, np.ndarray | torch.Tensor]:
    """What ``pack_arrays`` packed; those named in ``tensors`` come back as torch tensors."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    _check_header(folder, name, content, refuse)
    try:
        loaded: dict[str, Any] = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, MemoryError) as error:
        raise refuse(folder, name, f"it is not a safetensors file ({error})") from error
    result: dict[str, Any] = {key: np.array(array) for key, array in loaded.items()}
    for key in tensors:
        if key not in result:
            raise refuse(folder, name, f"it has no array {key!r}")
        import torch

        result[key] = torch.from_numpy(result[key])
    return result


def _as_array(name: str, tensor: torch.Tensor) -> np.ndarray:
    try:
        return tensor.detach().cpu().numpy()
    except (TypeError, AttributeError) as error:
        raise ValueError(f"Array {name!r} must be a tensor that numpy can hold. Got {type(tensor)}: {error}") from error


def _is_plain(name: str) -> bool:
    return NAME.fullmatch(name) is not None and ".." not in name


def _check_header(folder: Path, name: str, content: bytes, refuse: Refusal) -> None:
    """Refuse what claims too much before anything is made from it; that offsets fit shapes, safetensors checks."""
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > min(MOST_HEADER_BYTES, len(content) - 8):
        raise refuse(folder, name, f"its header claims {size:,} bytes of {len(content):,}")
    try:
        header = json.loads(content[8 : 8 + size])
        entries = {key: entry["dtype"] for key, entry in header.items() if key != "__metadata__"}
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise refuse(folder, name, f"its header cannot be read ({error!r})") from error
    if len(entries) > MOST_ARRAYS:
        raise refuse(folder, name, f"it claims {len(entries):,} arrays, more than {MOST_ARRAYS:,}")
    for key, kind in entries.items():
        if not _is_plain(key):
            raise refuse(folder, name, f"it has an array with a name that is not allowed, {key!r}")
        if kind not in KINDS:
            raise refuse(folder, name, f"array {key!r} holds {kind}, which a state never does")
