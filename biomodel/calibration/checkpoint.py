"""Chains kept on disk as they are drawn, so that interrupted sampling goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from biomodel.errors import CalibrationError
from biomodel.files import atomic_write

__all__ = ["ChainFile", "as_plain", "as_state"]

#: Seconds between two writings of a chain.
EVERY = 2.0


@dataclass(eq=False)
class ChainFile:
    """One chain's file: its draws so far, and the state from which its sampler goes on.

    Parameters
    ----------
    folder : path
    chain : int
    fingerprint : str
        Of the density and of the settings that shape the chain; a file with another one is refused.
    """

    folder: str | PathLike[str]
    chain: int
    fingerprint: str

    def __post_init__(self) -> None:
        self.path = Path(self.folder) / f"chain-{self.chain}.npz"
        self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time to write again."""
        return time.monotonic() - self._last > EVERY

    def write(self, arrays: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        """Replace the file in one step.

        Raises
        ------
        OutputError
            If it cannot be written; what was there is unchanged then.
        """
        with atomic_write(self.path) as path, open(path, "wb") as file:
            np.savez(file, allow_pickle=False, fingerprint=np.array(self.fingerprint),
                     state=np.array(json.dumps(state)), **arrays)  # fmt: skip
        self._last = time.monotonic()

    def read(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Arrays and state, or None where nothing was written yet.

        Raises
        ------
        CalibrationError
            If the file is of another run or damaged.
        """
        if not self.path.is_file():
            return None
        remedy = "Give another folder, or remove this one to start anew."
        try:
            with open(self.path, "rb") as file, np.load(file, allow_pickle=False) as data:
                arrays = {name: data[name] for name in data.files}
            fingerprint, state = str(arrays.pop("fingerprint")), json.loads(str(arrays.pop("state")))
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            what = f"{self.path}: cannot be read ({error}); expected a chain's draws."
            raise CalibrationError(f"{what} {remedy}") from None
        if fingerprint != self.fingerprint:
            raise CalibrationError(
                f"{self.path}: holds draws of other data, another model or other settings than these (only the number "
                f"of draws and of chains may differ); chains of two posteriors are not mixed. {remedy}"
            )
        return arrays, state


def as_plain(state: Any) -> Any:
    """Nested dataclasses of numbers and arrays as what JSON can hold; floats keep every bit."""
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        return {f.name: as_plain(getattr(state, f.name)) for f in dataclasses.fields(state)}
    if isinstance(state, np.ndarray):
        return state.tolist()
    if isinstance(state, np.generic):
        return state.item()
    if isinstance(state, Mapping):
        return {k: as_plain(v) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        return [as_plain(v) for v in state]
    return state


def as_state(like: Any, plain: Any) -> Any:
    """What `as_plain` was given, shaped as `like`, a state of the same kind."""
    if dataclasses.is_dataclass(like) and not isinstance(like, type):
        return type(like)(**{f.name: as_state(getattr(like, f.name), plain[f.name]) for f in dataclasses.fields(like)})
    if isinstance(like, np.ndarray):
        return np.array(plain, like.dtype).reshape(np.shape(plain))
    if isinstance(like, Mapping):
        return {k: as_state(like.get(k), v) for k, v in plain.items()}
    if isinstance(like, tuple):
        # Named ones, as PyMC's state of a generator is, keep their names; plain ones may have grown.
        return type(like)(*map(as_state, like, plain)) if hasattr(like, "_fields") else tuple(plain)
    return plain
