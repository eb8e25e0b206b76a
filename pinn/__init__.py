"""Physics-informed networks that solve and calibrate the models of `biomodel`."""

from pinn.amortised.makers import FenicsMaker, TorchMaker
from pinn.amortised.operator import Amortised, AmortisedForecast, CheckpointError, Operator
from pinn.amortised.polish import ScanProblem, full_fit, polish, weighed
from pinn.amortised.scans import ImagingEncoder, ScanEncoder, Scans
from pinn.amortised.setting import Case, Courses, Setting
from pinn.amortised.streaming import Chunk, Lane, Stream, StreamError, Usage
from pinn.amortised.training import Recipe, Trainer
from pinn.calibration import Gap, GapWarning, LMPinn, PinnFit
from pinn.discovery.discover import Discovered, Discovery, Formula, NetworkGrowth, TableGrowth, discover
from pinn.joint.chains import chained
from pinn.joint.forecast import JointForecast, forecast_joint
from pinn.joint.observed import Cells, Observation, Outline, Uptake
from pinn.joint.outlines import DURATION, Imaged, Infiltration, WhiteGrey, glioma_problem
from pinn.joint.patient import joint_problem
from pinn.joint.posterior import JointPosterior, choose_start, infer_joint, resampled
from pinn.joint.problem import DataWarning, JointProblem
from pinn.joint.starts import Foci, FreeStart
from pinn.solver import PinnSimulation, PinnSolver, TrainingWarning
from pinn.states import Posterior, StateProblem, infer

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
