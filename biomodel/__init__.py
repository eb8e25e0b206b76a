"""biomodel: the tumour model, its data, solvers, calibration and forecasts."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from biomodel.calibration.calibrate import MAP, Laplace, calibrate, compare
    from biomodel.calibration.field import FieldLaplace
    from biomodel.calibration.fit import Fit
    from biomodel.calibration.importance import Importance
    from biomodel.calibration.mcmc import NUTS, SMC
    from biomodel.calibration.population import learn_priors
    from biomodel.decisions import decide
    from biomodel.defaults import default_model
    from biomodel.domain import Domain
    from biomodel.fenics.solver import FenicsSolver
    from biomodel.forecast import Forecast, forecast
    from biomodel.models import ReactionDiffusion
    from biomodel.parameters import Fixed, LogitNormal, LogNormal, Normal
    from biomodel.patient import Patient, Visit
    from biomodel.report import Report, report
    from biomodel.schedule import Schedule
    from biomodel.scoring import Score, score
    from biomodel.solvers.torch import TorchSolver
    from biomodel.stages import stages
    from biomodel.terms import Exponential, Gompertz, Isotropic, Logistic, NoDiffusion, TissueDiffusion
    from biomodel.treatments import Chemotherapy, Combination, Radiotherapy, Systemic

__all__ = [
    "MAP",
    "NUTS",
    "SMC",
    "Chemotherapy",
    "Combination",
    "Domain",
    "Exponential",
    "FenicsSolver",
    "FieldLaplace",
    "Fit",
    "Fixed",
    "Forecast",
    "Gompertz",
    "Importance",
    "Isotropic",
    "Laplace",
    "LogNormal",
    "Logistic",
    "LogitNormal",
    "NoDiffusion",
    "Normal",
    "Patient",
    "Radiotherapy",
    "ReactionDiffusion",
    "Report",
    "Schedule",
    "Score",
    "Systemic",
    "TissueDiffusion",
    "TorchSolver",
    "Visit",
    "calibrate",
    "compare",
    "decide",
    "default_model",
    "forecast",
    "learn_priors",
    "report",
    "score",
    "stages",
]

_MODULES = {
    "calibration.calibrate": ("MAP", "Laplace", "calibrate", "compare"),
    "calibration.field": ("FieldLaplace",),
    "calibration.fit": ("Fit",),
    "calibration.importance": ("Importance",),
    "calibration.mcmc": ("NUTS", "SMC"),
    "calibration.population": ("learn_priors",),
    "decisions": ("decide",),
    "defaults": ("default_model",),
    "domain": ("Domain",),
    "fenics.solver": ("FenicsSolver",),
    "forecast": ("Forecast", "forecast"),
    "models": ("ReactionDiffusion",),
    "parameters": ("Fixed", "LogNormal", "LogitNormal", "Normal"),
    "patient": ("Patient", "Visit"),
    "report": ("Report", "report"),
    "schedule": ("Schedule",),
    "scoring": ("Score", "score"),
    "solvers.torch": ("TorchSolver",),
    "stages": ("stages",),
    "terms": ("Exponential", "Gompertz", "Isotropic", "Logistic", "NoDiffusion", "TissueDiffusion"),
    "treatments": ("Chemotherapy", "Combination", "Radiotherapy", "Systemic"),
}
_HOME = {name: f"biomodel.{module}" for module, names in _MODULES.items() for name in names}


class _Package(ModuleType):
    """The package, which imports a name's module when the name is first used: torch alone takes seconds."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'biomodel' has no attribute {name!r}")
        value = getattr(import_module(_HOME[name]), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the module `forecast` binds it here under its name; the function of that name is what users mean.
        if isinstance(value, ModuleType) and _HOME.get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*__all__, *(name for name in super().__dir__() if name.startswith("__"))})


sys.modules[__name__].__class__ = _Package
