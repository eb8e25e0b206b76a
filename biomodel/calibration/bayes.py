"""Loading of the libraries behind Markov chains (the extra `bayes`), when they are needed and no sooner."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

from biomodel.errors import CalibrationError

__all__ = ["library"]


def library(name: str) -> Any:
    """A module of the extra `bayes`.

    Raises
    ------
    CalibrationError
        If it is not installed; the message says how to install it.
    """
    with warnings.catch_warnings():
        # What they announce on import (ArviZ its next version) is for their own developers and ours.
        warnings.simplefilter("ignore")
        try:
            return import_module(name)
        except ImportError as error:
            raise CalibrationError(
                f"Markov chains need {name.split('.')[0]}, which does not load here ({error}). Install the extra: "
                "pip install 'tumorcast[bayes]'."
            ) from None
