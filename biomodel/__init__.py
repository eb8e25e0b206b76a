"""biomodel: the tumour model, its data, solvers, calibration and forecasts."""

from biomodel.calibration.calibrate import MAP, Laplace, calibrate, compare
from biomodel.domain import Domain
from biomodel.forecast import Forecast, forecast
from biomodel.models import ReactionDiffusion
from biomodel.parameters import Fixed, LogitNormal, LogNormal, Normal
from biomodel.patient import Patient, Visit
from biomodel.schedule import Schedule
from biomodel.scoring import score
from biomodel.solvers.torch import TorchSolver
from biomodel.terms import Exponential, Gompertz, Isotropic, Logistic, NoDiffusion, TissueDiffusion
from biomodel.treatments import Chemotherapy, Combination, Radiotherapy, Systemic
