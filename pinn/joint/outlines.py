"""Infiltration of a glioma from the outlines of a single visit: D / k, the seed, and cells beyond the outline.

The set-up is that of Lipkova et al. 2019 (IEEE Trans Med Imaging 38:1875, doi:10.1109/TMI.2019.2902044) and Zhang et
al. 2025 (Med Image Anal 101:103423, doi:10.1016/j.media.2024.103423): u grows from a small seed by the Fisher-KPP
equation, slower in grey than in white matter; the outline in T1c (with contrast agent) is a contour of high cell
fraction, that in FLAIR of a low one, PET is proportional to u. From one visit nothing of the time scale can be known:
with days in a unit of their own, D T and k T are inferred, and from these the square of the infiltration length, D / k.

Voxels of an outline are no independent data: where model and outline part, they do over millimetres. Each likelihood is
therefore weighted by the voxel's share of a cube of that length, so that finer voxels do not make more data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from biomodel.calibration.samples import weighted_quantile
from biomodel.domain import Domain
from biomodel.errors import CalibrationError, InputError
from biomodel.models import ReactionDiffusion
from biomodel.parameters import LogitNormal, LogNormal, Operand, Parameter, Prior
from biomodel.schedule import Schedule
from biomodel.solvers.base import Solver
from biomodel.solvers.torch import TorchSolver
from biomodel.terms import Diffusion, Isotropic, Logistic
from pinn.joint.observed import Observation, Outline, Uptake
from pinn.joint.posterior import JointPosterior
from pinn.joint.problem import JointProblem
from pinn.joint.starts import Foci, Start

#: The time from seed to visit, in the unit of the model's days: 100 d at any unit.
DURATION = 100.0
#: Distance, mm, over which an outline errs alike.
ALIKE = 10.0
LIPKOVA = "Lipkova et al. 2019, IEEE Trans Med Imaging 38:1875, doi:10.1109/TMI.2019.2902044"


@dataclass(frozen=True)
class WhiteGrey(Diffusion):
    """Diffusivity D in white matter and a fixed share of it in grey matter, averaged by a voxel's tissues.

    Parameters
    ----------
    D : Prior
        In white matter.
    share : float
        D in grey over D in white matter; a tenth in Lipkova et al. 2019.
    tissues : (str, str)
        Names of white and grey matter on the domain.
    """

    D: Prior = field(default_factory=lambda: LogNormal(0.5, 1.0))
    share: float = 0.1
    tissues: tuple[str, str] = ("white", "grey")

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """D."""
        return (Parameter("D", "mm^2/day", self.D, (1e-4, 50.0), LIPKOVA, "diffusivity in white matter"),)

    @property
    def fields(self) -> tuple[str, ...]:
        """Both tissues."""
        return self.tissues

    def coefficient(self, u, p, c, ops) -> Operand:
        """Diffusivity, mm²/day."""
        white, grey = (getattr(c, t) for t in self.tissues)
        return p["D"] * (white + self.share * grey + 1e-6) / (white + grey + 1e-6)


@dataclass(frozen=True, eq=False)
class Imaged:
    """What a single visit shows of a glioma.

    Attributes
    ----------
    t1c : ndarray of 0, 1, NaN, shape (z, y, x)
        The region that takes up contrast agent, with what it encloses.
    flair : ndarray of 0, 1, NaN, shape (z, y, x), optional
        The bright region, which holds that of T1c.
    pet : ndarray, shape (z, y, x), optional
        Signal scaled to about 1 at its highest; NaN where it says nothing.
    """

    t1c: np.ndarray
    flair: np.ndarray | None = None
    pet: np.ndarray | None = None

    def observations(self, domain: Domain) -> list[Observation]:
        """The likelihoods, with thresholds 0.61 to 0.78 (T1c) and 0.06 to 0.32 (FLAIR) at 95 % of their priors.

        Raises
        ------
        InputError
            If the region of FLAIR leaves out much of that of T1c.
        """
        sides = [s for n, s in zip(domain.shape, domain.spacing, strict=True) if n > 1]
        weight = float(np.prod([min(1.0, s / ALIKE) for s in sides]))
        edge = LogNormal(0.1, 0.4)
        found = [Observation(DURATION, self.t1c, Outline(LogitNormal(0.7, 0.2), edge, weight, "t1c"))]
        if self.flair is not None:
            inside = np.nan_to_num(self.t1c) > 0.5
            missed = float((np.nan_to_num(self.flair)[inside] < 0.5).mean())
            if missed > 0.5:
                raise InputError(
                    f"flair: {missed:.0%} of the T1c region lies outside; expected the outer outline, with the T1c "
                    "region inside. Give the union of both."
                )
            found.append(Observation(DURATION, self.flair, Outline(LogitNormal(0.15, 0.5), edge, weight, "flair")))
        if self.pet is not None:
            found.append(Observation(DURATION, self.pet, Uptake(LogNormal(0.8, 0.4), LogNormal(0.12, 0.4), weight)))
        return found


def glioma_problem(domain: Domain, imaged: Imaged, start: Start | None = None, diffusion: Diffusion | None = None,
                   solver: Solver | None = None) -> JointProblem:  # fmt: skip
    """The inference of D T, k T and the seed from a single visit.

    Parameters
    ----------
    domain : Domain
        With the tissues of `diffusion`.
    start : Start, optional
        One small focus if not given.
    diffusion : Diffusion, optional
        `WhiteGrey` where the domain has tissues, else `Isotropic`.
    solver : PinnSolver, TorchSolver or FenicsSolver, optional
        `TorchSolver` if not given.
    """
    prior = LogNormal(0.5, 1.0)
    term = diffusion or (WhiteGrey(prior) if domain.tissues else Isotropic(prior))
    model = ReactionDiffusion(Logistic(LogNormal(0.06, 0.6)), term)
    seed = start or Foci(1, LogitNormal(0.5, 0.5), LogNormal(4.0, 0.3))
    return JointProblem(model, domain, Schedule(), seed, 0.0, imaged.observations(domain),
                        solver or TorchSolver(rtol=1e-2), scaled_time=True)  # fmt: skip


@dataclass(frozen=True)
class Infiltration:
    """What a single visit tells, whatever the unit of time.

    Attributes
    ----------
    ratio : (float, float, float)
        D / k in white matter, mm²: 5 %, 50 % and 95 % quantiles.
    length : (float, float, float)
        Its root, mm.
    generations : (float, float, float)
        k T, growth in the time since the seed.
    seed : dict of str to (float, float, float)
        Position of the focus, mm.
    """

    ratio: tuple[float, float, float]
    length: tuple[float, float, float]
    generations: tuple[float, float, float]
    seed: Mapping[str, tuple[float, float, float]]

    @classmethod
    def of(cls, posterior: JointPosterior, draws: int = 4000) -> Infiltration:
        """From a posterior of `glioma_problem`, by its samples where it has them, else by its Gaussian.

        Raises
        ------
        CalibrationError
            If the model has no D and k.
        """
        names = list(posterior.problem.names)
        wanted = ("diffusion.D", "growth.k")
        if any(n not in names for n in wanted):
            raise CalibrationError(f"Infiltration: expected the parameters {wanted}; found {names}.")
        samples = posterior.samples
        z = posterior.draws(draws) if samples is None else samples.z
        weights = np.full(len(z), 1 / len(z)) if samples is None else samples.weights
        logs = [z[:, names.index(n)] for n in wanted]

        def quantiles(x: np.ndarray) -> Any:
            return tuple(weighted_quantile(x, weights, [0.05, 0.5, 0.95]).tolist())

        ratio = np.exp(logs[0] - logs[1])
        places = {n: quantiles(z[:, i]) for i, n in enumerate(names) if n.startswith("focus") and n[-1] in "xyz"}
        return cls(quantiles(ratio), quantiles(np.sqrt(ratio)), quantiles(np.exp(logs[1]) * DURATION), places)
