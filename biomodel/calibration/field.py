"""Calibration of a map: the growth rate as a Gaussian field, with everything else that is unknown, jointly.

The growth rate is a map made of its level k, as elsewhere, and a field m(x) with the prior of
:mod:`biomodel.calibration.field_prior`: k exp(m), or k + m. The state at the first visit is an unknown of its own,
voxel by voxel: the noise of the measured one would pass for growth, and what nobody saw outside the region for
diffusion. The maximum of the posterior is found by Gauss-Newton steps solved with conjugate gradients, whose number
depends on what the data know and not on the grid; from there :mod:`biomodel.calibration.field_centre` finds the mean.
The posterior is Gaussian with the low-rank update of :mod:`biomodel.calibration.lowrank`. Length and standard deviation
of the field are given, or set by the evidence (:mod:`biomodel.calibration.field_evidence`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from biomodel.calibration.field_centre import centred
from biomodel.calibration.field_evidence import FieldEvidence, LearnedMatern
from biomodel.calibration.field_noise import StartNoise
from biomodel.calibration.field_prior import FieldPrior, Link, Matern, Multiplied
from biomodel.calibration.field_problem import FieldProblem, maximise
from biomodel.calibration.field_start import begin, log_evidence
from biomodel.calibration.fit import Fit
from biomodel.calibration.lowrank import LowRank, leading
from biomodel.errors import CalibrationError
from biomodel.models import ReactionDiffusion
from biomodel.patient import Patient
from biomodel.solvers.torch import TorchSolver

__all__ = ["FieldLaplace", "FieldPosterior"]

#: How often the mean is sought, each time with the covariance where it was last found.
CENTRINGS = 1


@dataclass(frozen=True)
class FieldLaplace:
    """The growth rate as a map: maximum of the posterior, and the Gaussian posterior near it.

    Parameters
    ----------
    prior : Matern or LearnedMatern
        Of the field: fixed, or set by the evidence within hyperpriors.
    link : Link
        How level and field make the rate: `Multiplied` or `Added`. Fits with either can be compared by their
        `log_evidence`.
    noise_length : float
        Correlation length of the voxels' noise, mm: smaller voxels do not know more. The variance of the residuals is
        raised by how many voxels such a length holds in each direction with extent, and the noise of the start is
        smooth over it.
    iterations : int
        Most Gauss-Newton steps.
    tolerance : float
        Stop where the gradient has fallen by this factor.
    most : int
        Most Hessian products for the posterior's eigenpairs, and half as many for the evidence.
    floor : float
        Eigenvalues below it are left out of the posterior: at 1 the data say as much as the prior, and a direction
        left out is at most 1.4 times as wide as it should be.
    pairs : int
        Pairs of draws that find the posterior's mean from its maximum, see :mod:`biomodel.calibration.field_centre`; 0
        stays at the maximum.
    rounds : int
        How often at most a `LearnedMatern` is set anew and the maximum found again.
    seed : int
        Of the eigenpairs' start.
    """

    prior: Matern | LearnedMatern = LearnedMatern()
    link: Link = Multiplied()
    noise_length: float = 2.0
    iterations: int = 20
    tolerance: float = 1e-3
    most: int = 600
    floor: float = 1.0
    pairs: int = 6
    rounds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        counts = min(self.iterations, self.most, self.rounds)
        if min(self.noise_length, self.pairs) < 0 or counts < 1 or not 0 < self.tolerance < 1 or self.floor <= 0:
            raise CalibrationError(
                f"FieldLaplace: noise_length {self.noise_length:g}, iterations {self.iterations}, most {self.most}, "
                f"rounds {self.rounds}, tolerance {self.tolerance:g}, floor {self.floor:g}; expected a length of 0 or "
                "more, counts of 1 or more, a tolerance between 0 and 1, a positive floor."
            )


@dataclass(frozen=True, eq=False)
class FieldPosterior:
    """Posterior of the map, jointly with the scalars of a fit.

    Attributes
    ----------
    box : tuple of slice
        Where the map lies on the patient's grid.
    mode : ndarray, shape (p + n,)
        Whitened centre, the mean or the maximum: the scalars first, then field and start.
    lowrank : LowRank
        Of the whitened data Hessian.
    prior : FieldPrior
        Its `matern` has the length and sd that were given or learned.
    link : Link
    scalars : (ndarray (p,), ndarray (p, p))
        Prior mean and root of the prior covariance of the scalars' transformed coordinates.
    noise : StartNoise
        Of the first visit's cell fraction.
    steps : tuple of int
        Conjugate-gradient products of each Gauss-Newton step.
    noise_length, padding : float
        Of the voxels' noise and the prior's box, mm; the latter may be None.
    """

    box: tuple[slice, slice, slice]
    mode: np.ndarray
    lowrank: LowRank
    prior: FieldPrior
    link: Link
    scalars: tuple[np.ndarray, np.ndarray]
    noise: StartNoise
    steps: tuple[int, ...]
    noise_length: float
    padding: float | None

    @property
    def mean(self) -> np.ndarray:
        """The field at the centre, (z, y, x) on the box."""
        return self.field(self.mode)

    def field(self, white: np.ndarray) -> np.ndarray:
        """The field (z, y, x) of whitened unknowns."""
        p = len(self.scalars[0])
        return np.asarray(self.prior.root(white[None, p : p + self.prior.size])[0])

    def coordinates(self, white: np.ndarray) -> np.ndarray:
        """Transformed coordinates (p,) of whitened unknowns."""
        mean, root = self.scalars
        return np.asarray(mean + root @ white[: len(mean)])

    def draw(self, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draws of the scalars' transformed coordinates, the field, and the change of the initial state.

        Returns
        -------
        ndarray (draws, p), ndarray (draws, z, y, x), ndarray (draws, z, y, x)
        """
        rng = np.random.default_rng(np.random.SeedSequence([seed, 1]))
        p = len(self.scalars[0])
        z = np.empty((draws, p))
        fields, starts = np.empty((draws, *self.prior.shape)), np.empty((draws, *self.prior.shape))
        for i in range(draws):  # one at a time: the white noise of many would not fit into memory
            white = self.mode + self.lowrank.root(rng.standard_normal((1, len(self.mode))))[0]
            z[i] = self.coordinates(white)
            fields[i] = self.field(white)
            starts[i] = self.noise.root(white[p + self.prior.size :])
        return z, fields, starts

    def spread(self) -> np.ndarray:
        """Standard deviation of the field in each voxel, (z, y, x).

        The prior's is the same everywhere; the data take from it what the eigenpairs say.
        """
        variance = np.full(self.prior.shape, self.prior.matern.sd**2)
        for value, vector in zip(self.lowrank.values, self.lowrank.vectors, strict=True):
            variance -= value / (1 + value) * self.field(vector) ** 2
        return np.sqrt(np.maximum(variance, 0.0))

    def gain(self) -> np.ndarray:
        """Information gained over the prior in each voxel, nats: log of prior over posterior spread."""
        return np.log(self.prior.matern.sd / np.maximum(self.spread(), 1e-12))

    def rate(self, level: float) -> np.ndarray:
        """The map of the rate at the centre, (z, y, x), from its level."""
        return self.link.of(np.asarray(level), self.mean)

    @property
    def covariance(self) -> np.ndarray:
        """Posterior covariance (p, p) of the scalars' transformed coordinates."""
        mean, root = self.scalars
        p = len(mean)
        known = self.lowrank.vectors[:, :p]
        share = self.lowrank.values / (1 + self.lowrank.values)
        return np.asarray(root @ (np.eye(p) - (known.T * share) @ known) @ root.T)


def calibrate_field(
    model: ReactionDiffusion,
    patient: Patient,
    solver: TorchSolver,
    method: FieldLaplace,
    progress: Callable[[str], None] | None = None,
) -> Fit:
    """Calibrate the growth rate as a map; see :func:`biomodel.calibrate`."""
    hyper = method.prior if isinstance(method.prior, LearnedMatern) else None
    matern = method.prior if isinstance(method.prior, Matern) else method.prior.median
    padding = hyper.length.median if hyper else None
    problem = FieldProblem(model, patient, solver, matern, method.link, method.noise_length, padding)
    found, held = begin(
        problem, solver, method.iterations, method.tolerance, max(method.most // 2, 1), method.seed, progress
    )
    white, steps, notes = found.white, list(found.steps), list(patient.notes)
    voxel = min(s for s, n in zip(problem.base.domain.spacing, problem.base.domain.shape, strict=True) if n > 1)
    for _ in range(method.rounds):
        if hyper is None:
            break
        before = problem.field.matern
        white = problem.exchange(white, hyper.reference(voxel))
        evidence = FieldEvidence(problem.linearise(white), max(method.most // 2, 1), method.seed)
        matern = evidence.best(hyper, before)
        white = problem.exchange(white, matern)
        if progress:
            progress(f"field: length {matern.length:.3g} mm, sd {matern.sd:.3g}, from {len(evidence.root)} directions")
        try:
            found = maximise(problem, white, method.iterations, method.tolerance, progress, found.largest, held)
        except CalibrationError as error:
            # A wider prior's maximum may need what the solver cannot do; the last one that was found stands.
            white = problem.exchange(white, before)
            notes.append(f"The map's length and sd were not set further than {before.length:.3g} mm and "
                         f"{before.sd:.3g}: {error}")  # fmt: skip
            break
        white, steps = found.white, [*steps, *found.steps]
        if max(abs(np.log(matern.length / before.length)), abs(np.log(matern.sd / before.sd))) < 0.1:
            break
    linear = problem.linearise(white)
    lowrank = leading(linear.hessian, problem.size, method.floor, method.most, method.seed)
    log_likelihood, evidence_found = log_evidence(linear, lowrank, method.seed)
    for _ in range(CENTRINGS if method.pairs else 0):
        moved = centred(linear, lowrank, method.pairs, seed=method.seed, progress=progress)
        if moved is white:
            break
        white = moved
        linear = problem.linearise(white)
        lowrank = leading(linear.hessian, problem.size, method.floor, method.most, method.seed)
    scalars = (problem.gaussian.mean, problem.root)
    posterior = FieldPosterior(
        problem.base.box, white, lowrank, problem.field, method.link, scalars, problem.noise, tuple(steps),
        method.noise_length, padding,
    )  # fmt: skip
    if hyper is not None and hyper.at_an_end(problem.field.matern):
        notes.append(
            f"The map's length ({problem.field.matern.length:.3g} mm) and sd ({problem.field.matern.sd:.3g}) stand at "
            "the end of what their hyperprior allows: the images ask for more, which a nearly constant map or a model "
            "that lacks something would do, too. Compare with Laplace()."
        )
    if not found.converged:
        notes.append(f"The calibration stopped after {len(steps)} steps without converging.")
    if lowrank.products >= method.most:
        notes.append(
            f"The posterior's eigenpairs were cut off at {lowrank.products} products; the largest left out is about "
            f"{lowrank.next_value:.2g}. Raise most."
        )
    return Fit(
        model=model,
        patient=patient,
        solver=solver,
        method=type(method).__name__,
        parameters=problem.base.parameters,
        prior=problem.gaussian,
        z=problem.decode(white)[0],
        covariance=posterior.covariance,
        log_likelihood=log_likelihood,
        log_evidence=evidence_found,
        count=problem.base.count,
        iterations=len(steps),
        solves=problem.base.solves,
        converged=found.converged,
        box=problem.base.box,
        notes=tuple(notes),
        rate_map=posterior,
    )
