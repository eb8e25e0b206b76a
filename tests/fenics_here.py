"""Whether FEniCS can be tested here: skipped with the reason on a user's machine, failed where it must be there."""

import functools
import os

import pytest

from biomodel.errors import SolverError
from biomodel.fenics.process import find_interpreter

#: Set to 1 where a missing FEniCS is a failure (continuous integration).
REQUIRED = "TUMORCAST_REQUIRE_FENICS"


@functools.cache
def missing() -> str:
    """Why FEniCS cannot be used, or nothing."""
    try:
        find_interpreter()
    except SolverError as error:
        return str(error)
    return ""


def require_fenics() -> None:
    """Skip the test without FEniCS, or fail it where FEniCS is required."""
    if missing():
        (pytest.fail if os.environ.get(REQUIRED, "") not in ("", "0") else pytest.skip)(missing())
