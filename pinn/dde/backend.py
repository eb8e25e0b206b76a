"""DeepXDE on PyTorch and in double precision, whatever else runs in the process.

DeepXDE chooses its back end once, when it is first imported, and keeps its precision and PyTorch's in global variables.
Here the back end is fixed and verified, and double precision holds only inside of `double`, so that other parts of a
program (an encoder in single precision) see nothing of it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Iterator
from types import ModuleType

import torch

from biomodel.errors import SolverError

NAME = "pytorch"
#: Variables from which DeepXDE reads its back end.
VARIABLES = ("DDE_BACKEND", "DDEBACKEND")


def load() -> ModuleType:
    """DeepXDE on its PyTorch back end.

    Raises
    ------
    SolverError
        If DeepXDE is missing, was imported with another back end, or the environment asks for another.
    """
    if sys.modules.get("deepxde") is None:
        for variable in VARIABLES:
            asked = os.environ.get(variable, NAME)
            if asked != NAME:
                raise SolverError(
                    f"pinn.dde: {variable} is {asked!r}; expected {NAME!r}, the only back end this works with. "
                    "Unset it, or set it to 'pytorch' before Python starts."
                )
        os.environ["DDE_BACKEND"] = NAME
    device = torch.get_default_device()
    try:
        # DeepXDE announces its back end on stderr and makes the first GPU PyTorch's default device.
        with contextlib.redirect_stderr(io.StringIO()):
            dde = importlib.import_module("deepxde")
    except ImportError as error:
        raise SolverError(
            f"pinn.dde: DeepXDE cannot be imported ({error}); install it with: pip install 'tumorcast[pinn]'"
        ) from error
    finally:
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
    check(dde)
    return dde


def check(dde: ModuleType) -> None:
    """Raise unless a loaded DeepXDE runs on PyTorch."""
    found = getattr(getattr(dde, "backend", None), "backend_name", None)
    if found != NAME:
        raise SolverError(
            f"pinn.dde: DeepXDE was already imported with the back end {found!r}; expected {NAME!r}. A process has one "
            "back end: import pinn.dde first, or set DDE_BACKEND=pytorch before Python starts."
        )


load()
import deepxde as dde  # noqa: E402  # type: ignore[import-untyped]


@contextlib.contextmanager
def double() -> Iterator[None]:
    """Double precision of DeepXDE and PyTorch inside of the block."""
    before, default = dde.config.real.precision, torch.get_default_dtype()
    dde.config.real.set_float64()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        {16: dde.config.real.set_float16, 32: dde.config.real.set_float32, 64: dde.config.real.set_float64}[before]()
        torch.set_default_dtype(default)
