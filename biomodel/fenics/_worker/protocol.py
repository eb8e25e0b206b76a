"""Frames between the main process and a worker: a JSON header with plain arrays behind it.

A frame is four magic bytes, the header's length as a 64-bit little-endian number, the header (JSON), and the arrays'
bytes in C order one after the other; the header's ``"arrays"`` gives name, type and shape of each. Nothing is ever
unpickled: only the types in `TYPES` are accepted.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

MAGIC = b"TCW1"
TYPES = ("float64", "int64", "int32", "int8", "uint8", "bool")
#: A header larger than this is not one: something else wrote into the stream.
LARGEST_HEADER = 1 << 28


class ProtocolError(Exception):
    """What arrived is no frame."""


class Closed(ProtocolError):
    """The other side has closed the stream."""


def write_frame(stream: BinaryIO, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
    """Write one frame and flush.

    Parameters
    ----------
    stream : binary file
    header : mapping
        Whatever JSON can hold; the key ``"arrays"`` is set here.
    arrays : mapping of str to ndarray, optional
        Of one of the types in `TYPES`.
    """
    held = {name: np.ascontiguousarray(a) for name, a in (arrays or {}).items()}
    for name, a in held.items():
        if a.dtype.name not in TYPES:
            raise ProtocolError(f"array {name!r} has type {a.dtype}; a frame holds {', '.join(TYPES)}.")
    listed = [[name, a.dtype.name, list(np.shape(arrays[name]))] for name, a in held.items()] if arrays else []
    text = json.dumps({**header, "arrays": listed}).encode()
    stream.write(MAGIC + struct.pack("<Q", len(text)) + text)
    for a in held.values():
        stream.write(a.reshape(-1).view(np.uint8).data)
    stream.flush()


def read_frame(stream: BinaryIO, skip: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read one frame: its header and its arrays by name.

    Parameters
    ----------
    stream : binary file
    skip : int
        Most bytes of something else that may come first (what an interpreter prints before its program runs).

    Raises
    ------
    Closed
        If the stream ends.
    ProtocolError
        If what arrives is no frame.
    """
    start = _read(stream, len(MAGIC))
    while start != MAGIC and skip > 0:
        start, skip = start[1:] + _read(stream, 1), skip - 1
    start += _read(stream, 8)
    if start[: len(MAGIC)] != MAGIC:
        raise ProtocolError(f"expected the beginning of a frame, found {bytes(start[:32])!r}.")
    (length,) = struct.unpack("<Q", start[len(MAGIC) :])
    if length > LARGEST_HEADER:
        raise ProtocolError(f"a header of {length} bytes is too long to be one.")
    header = json.loads(bytes(_read(stream, length)))
    arrays = {}
    for name, kind, shape in header.pop("arrays"):
        if kind not in TYPES or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ProtocolError(f"array {name!r} has type {kind!r} and shape {shape!r}.")
        dtype = np.dtype(kind)
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(_read(stream, count * dtype.itemsize), dtype).reshape(shape)
    return header, arrays


def _read(stream: BinaryIO, count: int) -> bytearray:
    buffer = bytearray(count)
    view, done = memoryview(buffer), 0
    while done < count:
        got = stream.readinto(view[done:])  # type: ignore[attr-defined]  # every binary file here has it
        if not got:
            raise Closed("the stream has ended.")
        done += got
    return buffer
