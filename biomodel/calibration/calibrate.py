"""`calibrate`, and the comparison of models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from biomodel.calibration.density import ImageDensity, VolumeDensity
from biomodel.calibration.field import FieldLaplace, calibrate_field
from biomodel.calibration.fit import Fit
from biomodel.calibration.gaussnewton import limits_of, prior_of
from biomodel.calibration.identifiability import unidentified
from biomodel.calibration.images import LEAST_SD, ImageProblem
from biomodel.calibration.importance import FEW, Importance, importance_samples
from biomodel.calibration.laplace import MAP, Laplace
from biomodel.calibration.mcmc import NUTS, SMC, advice
from biomodel.calibration.population import Population
from biomodel.calibration.volumes import VolumeProblem
from biomodel.errors import CalibrationError
from biomodel.models import ReactionDiffusion
from biomodel.patient import Patient
from biomodel.solvers.base import Solver
from biomodel.solvers.torch import TorchSolver
from biomodel.tables import html_table

#: Inflation of the noise beyond which a fit says so, and residual of a volume in units of its noise.
DOUBTFUL, FAR = 3.0, 4.0


@runtime_checkable
class OwnCalibration(Protocol):
    """A method that this package does not know, and that makes the fit itself."""

    def calibrate(self, model: ReactionDiffusion | Population, patient: Patient, solver: Solver,
                  progress: Callable[[str], None] | None = None) -> Fit:  # fmt: skip
        """Return the fit, as :func:`calibrate` does."""


def calibrate(
    model: ReactionDiffusion | Population,
    patient: Patient,
    solver: Solver | None = None,
    method: MAP | Laplace | Importance | NUTS | SMC | FieldLaplace | OwnCalibration | None = None,
    progress: Callable[[str], None] | None = None,
) -> Fit:
    """Calibrate a model on the visits of one patient.

    Parameters
    ----------
    model : ReactionDiffusion or Population
        A population learned from a cohort (`learn_priors`) brings its model, its priors and its noise of the volumes;
        it is for patients without images.
    patient : Patient
        Usually ``patient.until(visit=k)``: all its visits are used. The first gives the initial state.
    solver : TorchSolver or FenicsSolver, optional
        The former by default; patients without images have no space, and take only that.
    method : MAP, Laplace, Importance, NUTS, SMC or FieldLaplace, optional
        Laplace by default; NUTS and SMC draw from the posterior itself, which takes longer; Importance is for patients
        without images, FieldLaplace makes the growth rate a map. An object with a `calibrate` of its own, such as
        ``pinn.LMPinn()``, is asked for the fit.
    progress : callable, optional
        Receives a line of text per iteration.

    Returns
    -------
    Fit

    Raises
    ------
    CalibrationError
        If there is no tumour at the first visit, no later visit, or no point at which the model can be evaluated; or
        if chains do not mix.
    """
    solver = TorchSolver() if solver is None else solver
    method = Laplace() if method is None else method
    if isinstance(method, OwnCalibration):
        return method.calibrate(model, patient, solver, progress)
    population = None
    if isinstance(model, Population):
        population, model = model, model.model
    if not patient.domain.well_mixed and (population or isinstance(method, Importance)):
        what = "a population's priors are" if population else "Importance is"
        raise CalibrationError(
            f"patient {patient.id} has images, but {what} for patients without; use patient.without_images(), or "
            "a model and Laplace()."
        )
    if isinstance(method, FieldLaplace):
        if patient.domain.well_mixed:
            raise CalibrationError(f"patient {patient.id} has no images; FieldLaplace needs them.")
        if not isinstance(solver, TorchSolver):
            raise CalibrationError(f"FieldLaplace needs a TorchSolver; found {type(solver).__name__}.")
        return calibrate_field(model, patient, solver, method, progress)
    if isinstance(method, MAP):
        optimiser = method
    elif isinstance(method, Importance):
        optimiser = MAP(starts=method.starts, iterations=method.iterations, seed=method.seed)
    elif isinstance(method, (NUTS, SMC)):
        optimiser = method.map or MAP()
    else:
        optimiser = method.map
    problem: VolumeProblem | ImageProblem
    if patient.domain.well_mixed:
        if not isinstance(solver, TorchSolver):
            raise CalibrationError(
                f"patient {patient.id} has no images, so there is no space for {type(solver).__name__}; use "
                "TorchSolver()."
            )
        known = (population.parameters, population.noise) if population else ()
        problem = VolumeProblem(model, patient, solver, *known)
    else:
        problem = ImageProblem(model, patient, solver)
    prior = population.gaussian if population else prior_of(problem.parameters, model.joint)
    best = optimiser.optimise(problem, prior, progress)
    p = len(best.z)
    hessian = best.linear.hessian + prior.precision
    covariance = np.linalg.inv(hessian)
    covariance = (covariance + covariance.T) / 2
    log_likelihood = best.linear.log_likelihood()
    offset = best.z - prior.mean
    log_prior = -0.5 * offset @ prior.precision @ offset - 0.5 * np.linalg.slogdet(2 * np.pi * prior.covariance)[1]
    evidence = log_likelihood + log_prior + 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]
    notes = list(patient.notes)
    if not best.converged:
        notes.append(f"The calibration stopped after {best.iterations} iterations without converging.")
    low, high = limits_of(problem.parameters)
    stuck = [n for n, z, a, b in zip(problem.names, best.z, low, high, strict=True) if z <= a or z >= b]
    if stuck:
        notes.append(f"At its bound: {', '.join(stuck)}. The data ask for a value that the model forbids.")
    if best.linear.inflation > DOUBTFUL:
        notes.append(
            "Model and images disagree by more than the stated noise: the images count "
            f"{best.linear.inflation:.1f} times less than voxels with independent errors would. Look for regions "
            "drawn askew, images that are not aligned, or cells that the model does not know."
        )
    notes += unidentified(problem.parameters, best.linear.hessian, prior)
    notes += _contradictions(problem, best.linear.residual)
    samples = None
    if isinstance(method, Importance) and isinstance(problem, VolumeProblem):
        samples = importance_samples(method, problem, prior, best.z)
        covariance, evidence = samples.covariance, samples.log_evidence
        if samples.ess < FEW:
            notes.append(
                f"Importance sampling: the {method.draws} draws are worth {samples.ess:.0f} independent ones; raise "
                "draws for smooth intervals."
            )
    if isinstance(method, (NUTS, SMC)):
        density = (ImageDensity(problem, best, prior) if isinstance(problem, ImageProblem)
                   else VolumeDensity(problem, prior))  # fmt: skip
        samples = method.sample(density, best.z, covariance, progress)
        assert samples.chains is not None
        covariance = samples.covariance
        if np.isfinite(samples.log_evidence):
            evidence = samples.log_evidence
        notes += advice(problem.names, samples.chains)
    return Fit(
        model=model,
        patient=patient,
        solver=solver,
        method=type(method).__name__,
        parameters=problem.parameters,
        prior=prior,
        z=best.z,
        covariance=np.zeros((p, p)) if isinstance(method, MAP) else covariance,
        log_likelihood=float(log_likelihood),
        log_evidence=float(evidence),
        count=problem.count,
        iterations=best.iterations,
        solves=problem.solves,
        converged=best.converged,
        initial_update=problem.update,
        box=problem.box,
        notes=tuple(notes),
        samples=samples,
        noise=problem.noise if isinstance(problem, VolumeProblem) else None,
        inflation=best.linear.inflation,
    )


def _contradictions(problem: VolumeProblem | ImageProblem, residual: np.ndarray) -> list[str]:
    """Volumes that the model cannot explain at its best, and noise that no image has."""
    if isinstance(problem, ImageProblem):
        settings = problem.patient.cellularity
        assumed = problem.initial.seen.fraction is not None and settings is not None and settings.voxel_cv == 0
        if assumed and all(v.adc_sd is None for v in problem.patient.visits):
            return [
                f"The record states no noise of single voxels (voxel_cv 0), which no image has; {LEAST_SD} of the cell "
                "fraction is taken for it at later visits, and none at the first. State the scanner's."
            ]
        return []
    visits = [v for v in problem.patient.visits if problem.patient.volume_of(v) is not None]
    floor = np.exp(problem.y) - np.array([problem.patient.volume_of(v) for v in visits])
    found = []
    for visit, y, r, s, f in zip(visits, problem.y, residual, problem.scale, floor, strict=True):
        if abs(r) > FAR * s:
            found.append(
                f"Model and volumes disagree at visit {visit.number} (day {visit.day:g}): {np.exp(y) - f:.3g} cm³ were "
                f"measured where the model at its best has {max(np.exp(y - r) - f, 0.0):.3g}, {abs(r) / s:.1f} times "
                "the stated noise. Look for a volume in another unit or of another lesion, a treatment missing from "
                "the record, or noise stated too small (cv)."
            )
    return found


@dataclass(frozen=True, eq=False)
class Comparison:
    """A family of models on the same data.

    Attributes
    ----------
    fits : tuple of Fit
    """

    fits: tuple[Fit, ...]

    def _weights(self, scores: Sequence[float]) -> np.ndarray:
        x = np.asarray(scores) - np.max(scores)
        return np.exp(x) / np.exp(x).sum()

    @property
    def evidence_weights(self) -> np.ndarray:
        """Posterior model probabilities under equal prior ones."""
        return self._weights([f.log_evidence for f in self.fits])

    @property
    def best(self) -> Fit:
        """The fit with the highest evidence."""
        return self.fits[int(np.argmax([f.log_evidence for f in self.fits]))]

    def table(self) -> list[dict[str, object]]:
        """One row per model: log evidence, AIC and BIC with their weights."""
        aic = self._weights([-f.aic / 2 for f in self.fits])
        bic = self._weights([-f.bic / 2 for f in self.fits])
        return [
            {"model": f.model.label, "log_evidence": f.log_evidence, "evidence_weight": float(w), "aic": f.aic,
             "aic_weight": float(a), "bic": f.bic, "bic_weight": float(b), "parameters": len(f.names)}
            for f, w, a, b in zip(self.fits, self.evidence_weights, aic, bic, strict=True)
        ]  # fmt: skip

    def _repr_html_(self) -> str:
        rows = [
            (
                r["model"],
                f"{r['log_evidence']:.2f}",
                f"{r['evidence_weight']:.3f}",
                f"{r['aic']:.1f}",
                f"{r['bic']:.1f}",
            )
            for r in self.table()
        ]
        return html_table(("model", "log evidence", "weight", "AIC", "BIC"), rows)


def compare(
    models: Sequence[ReactionDiffusion | Population],
    patient: Patient,
    solver: Solver | None = None,
    method: MAP | Laplace | Importance | NUTS | SMC | None = None,
) -> Comparison:
    """Calibrate several models on the same patient and compare them by evidence, AIC and BIC.

    Parameters
    ----------
    models : sequence of ReactionDiffusion
    patient, solver, method
        As in :func:`calibrate`.

    Returns
    -------
    Comparison

    Raises
    ------
    CalibrationError
        If there are no models, or one of them cannot be calibrated.
    """
    if not models:
        raise CalibrationError("compare: no models given.")
    return Comparison(tuple(calibrate(m, patient, solver, method) for m in models))
