"""Physics-informed networks that solve and calibrate the models of `biomodel`."""

from pinn.solver import PinnSimulation, PinnSolver, TrainingWarning
from pinn.states import Posterior, StateProblem, infer

__all__ = ["PinnSimulation", "PinnSolver", "Posterior", "StateProblem", "TrainingWarning", "infer"]
