"""Physics-informed networks that solve and calibrate the models of `biomodel`."""

from pinn.calibration import Gap, GapWarning, LMPinn, PinnFit
from pinn.discover import Discovered, Discovery, Formula, NetworkGrowth, TableGrowth, discover
from pinn.joint import DataWarning, JointProblem
from pinn.joint_chains import chained
from pinn.joint_forecast import JointForecast, forecast_joint
from pinn.joint_patient import joint_problem
from pinn.joint_posterior import JointPosterior, choose_start, infer_joint, resampled
from pinn.makers import FenicsMaker, TorchMaker
from pinn.observed import Cells, Observation, Outline, Uptake
from pinn.operator import Amortised, AmortisedForecast, CheckpointError, Operator
from pinn.operator_training import Recipe, Trainer
from pinn.outlines import DURATION, Imaged, Infiltration, WhiteGrey, glioma_problem
from pinn.polish import ScanProblem, full_fit, polish, weighed
from pinn.scans import ImagingEncoder, ScanEncoder, Scans
from pinn.setting import Case, Courses, Setting
from pinn.solver import PinnSimulation, PinnSolver, TrainingWarning
from pinn.starts import Foci, FreeStart
from pinn.states import Posterior, StateProblem, infer
from pinn.streaming import Chunk, Lane, Stream, StreamError, Usage

__all__ = [
    "Amortised",
    "AmortisedForecast",
    "Case",
    "Cells",
    "CheckpointError",
    "Chunk",
    "Courses",
    "DURATION",
    "DataWarning",
    "Discovered",
    "Discovery",
    "FenicsMaker",
    "Foci",
    "Formula",
    "FreeStart",
    "Gap",
    "GapWarning",
    "Imaged",
    "ImagingEncoder",
    "Infiltration",
    "JointForecast",
    "JointPosterior",
    "JointProblem",
    "LMPinn",
    "Lane",
    "NetworkGrowth",
    "Observation",
    "Operator",
    "Outline",
    "PinnFit",
    "PinnSimulation",
    "PinnSolver",
    "Posterior",
    "Recipe",
    "ScanEncoder",
    "ScanProblem",
    "Scans",
    "Setting",
    "StateProblem",
    "Stream",
    "StreamError",
    "TableGrowth",
    "TorchMaker",
    "Trainer",
    "TrainingWarning",
    "Uptake",
    "Usage",
    "WhiteGrey",
    "chained",
    "choose_start",
    "discover",
    "forecast_joint",
    "full_fit",
    "glioma_problem",
    "infer",
    "infer_joint",
    "joint_problem",
    "polish",
    "resampled",
    "weighed",
]
