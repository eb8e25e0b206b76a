"""Errors that a user sees.

Each message says what is wrong, where, what was found and how to mend it. The command line prints the message alone and
ends with the ``exit_code`` of the error's class; a traceback never reaches a shell user.

======  =======================================================================================
code    meaning
======  =======================================================================================
0       success
1       unexpected failure inside the program (a bug: please report it)
2       the command line itself was wrong (an unknown option, a missing argument)
3       bad input: :class:`InputError`, :class:`UnitError`, :class:`GeometryError`
4       the model, solver or calibration could not do what was asked
5       the output could not be written: :class:`OutputError`
130     stopped by the user (Ctrl-C)
======  =======================================================================================
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "CalibrationError",
    "GeometryError",
    "InputError",
    "ModelError",
    "OutputError",
    "NotFiniteError",
    "SolverError",
    "TumorcastError",
    "UnitError",
]


class TumorcastError(Exception):
    """Base of every error that the package raises on purpose."""

    exit_code: ClassVar[int] = 1


class InputError(TumorcastError):
    """Something read from the user (a file, a value, an argument) cannot be used."""

    exit_code: ClassVar[int] = 3


class UnitError(InputError):
    """A unit is missing, unknown or of another dimension than expected."""


class GeometryError(InputError):
    """Images or arrays do not lie on the same grid, or a grid cannot be used."""


class ModelError(TumorcastError):
    """A model is put together in a way that has no meaning."""

    exit_code: ClassVar[int] = 4


class SolverError(TumorcastError):
    """A solver cannot solve the model it was given, or failed in doing so."""

    exit_code: ClassVar[int] = 4


class NotFiniteError(SolverError):
    """The state of a simulation is NaN or infinite: the parameters are too extreme for the model."""


class CalibrationError(TumorcastError):
    """The data do not allow the calibration that was asked for."""

    exit_code: ClassVar[int] = 4


class OutputError(TumorcastError):
    """A result could not be written; nothing half-written is left behind."""

    exit_code: ClassVar[int] = 5
