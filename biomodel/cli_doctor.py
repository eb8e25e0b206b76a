"""``tumorcast doctor``: is FEniCS here, does it work, and what is missing?"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass

import typer

from biomodel.errors import SolverError, TumorcastError

__all__ = ["Diagnosis", "doctor", "examine"]


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes
    ----------
    rows : tuple of (str, str)
        What was looked at, and what was found.
    problem : str
        Why FEniCS cannot be used, with how to mend it; empty where it can.
    """

    rows: tuple[tuple[str, str], ...]
    problem: str = ""


def examine() -> Diagnosis:
    """Look for FEniCS, start a worker, and solve a small problem with it."""
    from biomodel.fenics.process import INSTALL, PYTHON, Worker, candidates, find_interpreter

    rows = [("interpreters tried", ", ".join(candidates()) + f" (name another in {PYTHON})")]
    worker = Worker()
    try:
        rows.append(("interpreter with dolfinx", find_interpreter()))
        hello = worker.start()
        rows += [("dolfinx", f"{hello['dolfinx']} on Python {hello['version']}"), ("compiled forms", hello["cache"])]
        rows.append(("compiler", hello["compiler"] or "found"))
        began = time.monotonic()
        _trial(worker)
        rows.append(("a small problem", f"solved in {time.monotonic() - began:.1f} s with compilation"))
    except TumorcastError as error:
        return Diagnosis(tuple(rows), str(error))
    finally:
        worker.close()
    rows.append(("several processes", _mpi()))
    rows.append(("install", INSTALL))
    return Diagnosis(tuple(rows))


def _trial(worker) -> None:
    """Make a mesh and evaluate a recorded function on it: elements, forms and the compiler are all needed."""
    import numpy as np

    from biomodel.domain import Domain
    from biomodel.fenics.mesh import BoxMesh
    from biomodel.tape import record

    mesh = BoxMesh().make(Domain.box((1, 3, 4)))
    space = ({"do": "space", "key": "doctor", "degree": 1},
             {"points": mesh.points, "cells": mesh.cells, "edges": mesh.edges})  # fmt: skip
    u = np.linspace(0, 1, len(mesh.points))
    tape = record(lambda u, p, c, ops: ops.exp(u))
    request = {"do": "evaluate", "space": "doctor", "tape": tape.json(), "scalars": {}}
    _, found = worker.ask((request, {"node:u": u}), [space])
    if not np.allclose(found["values"][0], np.exp(u)):
        raise SolverError("FEniCS gives wrong numbers for a small problem; install it anew.")


def _mpi() -> str:
    """Whether a worker runs under mpirun."""
    from biomodel.fenics.process import Worker

    if shutil.which("mpirun") is None:
        return "no mpirun on the path; only ranks=1 works"
    worker = Worker(2)
    try:
        worker.start()
    except TumorcastError as error:
        return f"do not work, only ranks=1 does: {error}"
    finally:
        worker.close()
    return "work (mpirun -n 2)"


def doctor() -> None:
    """Tell which FEniCS there is, which interpreter has it, what is missing and how to install it."""
    found = examine()
    for what, value in found.rows:
        typer.echo(f"{what}: {value}")
    if found.problem:
        raise SolverError(found.problem)
    typer.echo("FenicsSolver works here.")
