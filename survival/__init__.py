"""survival: prediction of response and of the time to an event, and the evidence that a prediction helps."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from survival.calibration import (
        ConformalSets,
        Costs,
        Isotonic,
        SensitivityFloor,
        SpecificityFloor,
        Temperature,
        VennAbers,
    )
    from survival.curves import Curves, predict_curves
    from survival.hazard import AFT, Boosting, Cox, DiscreteHazard, ElasticCox, Forest, Head
    from survival.networks import DeepCox, DeepHazard
    from survival.outcome import follow_up
    from survival.pcr import Calibrated, LateFusion, Mixture
    from survival.splits import LeaveOut, PatientFolds, check_split, out_of_fold
    from survival.stacking import Stacked

__all__ = [
    "AFT",
    "Boosting",
    "Calibrated",
    "ConformalSets",
    "Costs",
    "Cox",
    "Curves",
    "DeepCox",
    "DeepHazard",
    "DiscreteHazard",
    "ElasticCox",
    "Forest",
    "Head",
    "Isotonic",
    "LateFusion",
    "LeaveOut",
    "Mixture",
    "PatientFolds",
    "SensitivityFloor",
    "SpecificityFloor",
    "Stacked",
    "Temperature",
    "VennAbers",
    "check_split",
    "follow_up",
    "out_of_fold",
    "predict_curves",
]

_MODULES = {
    "calibration": (
        "ConformalSets",
        "Costs",
        "Isotonic",
        "SensitivityFloor",
        "SpecificityFloor",
        "Temperature",
        "VennAbers",
    ),
    "curves": ("Curves", "predict_curves"),
    "hazard": ("AFT", "Boosting", "Cox", "DiscreteHazard", "ElasticCox", "Forest", "Head"),
    "networks": ("DeepCox", "DeepHazard"),
    "outcome": ("follow_up",),
    "pcr": ("Calibrated", "LateFusion", "Mixture"),
    "splits": ("LeaveOut", "PatientFolds", "check_split", "out_of_fold"),
    "stacking": ("Stacked",),
}
_HOME = {name: f"survival.{module}" for module, names in _MODULES.items() for name in names}
_EXTRA = ("lifelines", "pandas", "sklearn", "sksurv")


def __getattr__(name: str) -> Any:
    """The name, whose module is imported when the name is first used: its libraries take seconds."""
    if name not in _HOME:
        raise AttributeError(f"module 'survival' has no attribute {name!r}")
    try:
        value = getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _EXTRA:
            raise
        raise ModuleNotFoundError(
            f"survival.{name} needs {error.name}, which is not installed: pip install 'tumorcast[survival]'",
            name=error.name,
        ) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
