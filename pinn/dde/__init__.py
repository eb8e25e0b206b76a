"""The models of `biomodel` as DeepXDE problems, with what DeepXDE lacks for inverse problems.

>>> import pinn.dde  # doctest: +SKIP

This loads DeepXDE, so `import pinn` does not.
"""

from pinn.dde.backend import dde, double
from pinn.dde.conditions import Observations, Organ, PriorOf, ZeroFlux
from pinn.dde.equation import Equation
from pinn.dde.network import Carried, Cosines, Exact, Fourier, Free, Growing, State
from pinn.dde.problem import Inverse, Model, Posed
from pinn.dde.sampling import Causal, Refine, Settled, refined
from pinn.dde.training import Estimate, FirstOrder, FirstOrderReport, SecondOrder, StoppedEarlyWarning, broyden

__all__ = [
    "Carried",
    "Causal",
    "Cosines",
    "Equation",
    "Estimate",
    "Exact",
    "FirstOrder",
    "FirstOrderReport",
    "Fourier",
    "Free",
    "Growing",
    "Inverse",
    "Model",
    "Observations",
    "Organ",
    "Posed",
    "PriorOf",
    "Refine",
    "SecondOrder",
    "Settled",
    "State",
    "StoppedEarlyWarning",
    "ZeroFlux",
    "broyden",
    "dde",
    "double",
    "refined",
]
