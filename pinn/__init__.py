"""Physics-informed networks that solve and calibrate the models of `biomodel`."""

from pinn.calibration import Gap, GapWarning, LMPinn, PinnFit
from pinn.discover import Discovered, Discovery, Formula, NetworkGrowth, TableGrowth, discover
from pinn.joint import DataWarning, JointProblem
from pinn.joint_chains import chained
from pinn.joint_forecast import JointForecast, forecast_joint
from pinn.joint_patient import joint_problem
from pinn.joint_posterior import JointPosterior, choose_start, infer_joint, resampled
from pinn.observed import Cells, Observation, Outline, Uptake
from pinn.outlines import DURATION, Imaged, Infiltration, WhiteGrey, glioma_problem
from pinn.solver import PinnSimulation, PinnSolver, TrainingWarning
from pinn.starts import Foci, FreeStart
from pinn.states import Posterior, StateProblem, infer

__all__ = [
    "Cells",
    "DURATION",
    "DataWarning",
    "Discovered",
    "Discovery",
    "Foci",
    "Formula",
    "FreeStart",
    "Gap",
    "GapWarning",
    "Imaged",
    "Infiltration",
    "JointForecast",
    "JointPosterior",
    "JointProblem",
    "LMPinn",
    "NetworkGrowth",
    "Observation",
    "Outline",
    "PinnFit",
    "PinnSimulation",
    "PinnSolver",
    "Posterior",
    "StateProblem",
    "TableGrowth",
    "TrainingWarning",
    "Uptake",
    "WhiteGrey",
    "chained",
    "choose_start",
    "discover",
    "forecast_joint",
    "glioma_problem",
    "infer",
    "infer_joint",
    "joint_problem",
    "resampled",
]
