"""Physics-informed networks that solve and calibrate the models of `biomodel`."""

from pinn.calibration import Gap, GapWarning, LMPinn, PinnFit
from pinn.solver import PinnSimulation, PinnSolver, TrainingWarning
from pinn.states import Posterior, StateProblem, infer

__all__ = [
    "Gap",
    "GapWarning",
    "LMPinn",
    "PinnFit",
    "PinnSimulation",
    "PinnSolver",
    "Posterior",
    "StateProblem",
    "TrainingWarning",
    "infer",
]
