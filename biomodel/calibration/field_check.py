"""How far a Laplace posterior of a map is from the posterior itself: a Markov chain that starts from it.

The chain is Hamiltonian Monte Carlo whose reference is the Laplace posterior N(m, C): between kicks by the gradient of
what the posterior differs from it, position and momentum turn along the exact flow of the Gaussian (Beskos, Pinski,
Sanz-Serna and Stuart 2011, Stoch Process Appl 121:2201, doi:10.1016/j.spa.2011.06.003). One kick per draw would be a
preconditioned Langevin step. Were the posterior Gaussian, every draw would be accepted and independent, on any grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from biomodel.calibration.field_problem import FieldProblem
from biomodel.calibration.fit import Fit
from biomodel.errors import CalibrationError, ModelError, SolverError
from biomodel.solvers.torch import TorchSolver
from biomodel.tables import html_table

__all__ = ["FieldCheck", "check_field"]

#: Share of accepted draws that the step is tuned for while the chain settles.
AIM = 0.75
#: Angle of a draw's whole trajectory: a quarter turn forgets the start, were the posterior Gaussian.
ANGLE = np.pi / 2
#: Effective draws below which a shift or a ratio says little.
FEW = 50


@dataclass(frozen=True, eq=False)
class FieldCheck:
    """Moments of the posterior, by a Markov chain, beside those of Laplace's approximation.

    Attributes
    ----------
    names : tuple of str
        Of the scalars.
    shift : ndarray, shape (p,)
        Mean of the chain minus Laplace's, in Laplace's standard deviations, by transformed coordinate.
    ratio : ndarray, shape (p,)
        Standard deviation of the chain over Laplace's.
    effective : ndarray, shape (p,)
        Effective number of draws of each scalar.
    field_shift, field_ratio, field_effective : ndarray, shape (z, y, x)
        The same for the logarithm of the rate (`Multiplied`) or the rate (`Added`), voxel by voxel: level and field.
    accepted : float
        Share of accepted proposals after the chain had settled.
    step : float
        Angle between two kicks, at most a quarter turn.
    """

    names: tuple[str, ...]
    shift: np.ndarray
    ratio: np.ndarray
    effective: np.ndarray
    field_shift: np.ndarray
    field_ratio: np.ndarray
    field_effective: np.ndarray
    accepted: float
    step: float

    @property
    def reliable(self) -> bool:
        """Whether the chain has mixed well enough to judge every scalar."""
        return bool(self.effective.min() >= FEW)

    def table(self) -> list[dict[str, object]]:
        """One row per scalar, with the Monte Carlo error of the shift."""
        return [
            {"name": n, "shift": float(s), "error": float(r / np.sqrt(e)), "ratio": float(r), "effective": float(e)}
            for n, s, r, e in zip(self.names, self.shift, self.ratio, self.effective, strict=True)
        ]

    def _repr_html_(self) -> str:
        rows = [
            (str(r["name"]), f"{r['shift']:+.2f} ± {r['error']:.2f}", f"{r['ratio']:.2f}", f"{r['effective']:.0f}")
            for r in self.table()
        ]
        return html_table(("parameter", "shift, sd", "ratio of sd", "effective draws"), rows, "Laplace checked")


def check_field(fit: Fit, draws: int = 300, settle: int = 100, seed: int = 0) -> FieldCheck:
    """Check the Laplace approximation of a `FieldLaplace` fit.

    The weights of outliers and the time steps are held as at the maximum, as in the approximation. A draw costs a few
    runs of the model with their adjoints, more where the posterior is farther from Gaussian. What the fit's `floor`
    leaves out of the approximation shows as a ratio below 1.

    Parameters
    ----------
    fit : Fit
    draws : int
        After the chain has settled.
    settle : int
        Draws before, during which the step is tuned.
    seed : int

    Raises
    ------
    CalibrationError
        If the fit has no map of the growth rate, or fewer than 50 draws are asked for.
    """
    found = fit.rate_map
    if found is None or not isinstance(fit.solver, TorchSolver):
        raise CalibrationError(f"check_field: a fit by {fit.method} has no map of the rate; calibrate by FieldLaplace.")
    if draws < 50 or settle < 0:
        raise CalibrationError(f"check_field: draws {draws}, settle {settle}; expected at least 50, and 0 or more.")
    problem = FieldProblem(
        fit.model, fit.patient, fit.solver, found.prior.matern, found.link, found.noise_length, found.padding
    )
    problem.replan(found.mode)
    problem.reweigh(problem.linearise(found.mode))
    known = found.lowrank
    prior = fit.parameters[problem.rate].prior

    def level(z: float) -> float:
        """What the field adds to."""
        value = float(prior.to_value(np.float64(z)))
        return float(np.log(value)) if found.link.logarithmic else value

    def beyond(v: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus log of posterior over approximation at m + C^1/2 v, and its gradient."""
        d = known.root(v[None])[0]
        try:
            value, slope = problem.slope(found.mode + d)
        except (ModelError, SolverError):
            return np.inf, np.zeros_like(v)
        pull = d + (known.vectors @ d * known.values) @ known.vectors
        return value - 0.5 * float(d @ pull), known.root((slope - pull)[None])[0]

    rng = np.random.default_rng(np.random.SeedSequence([seed, 2]))
    v, step, accepted = np.zeros(len(found.mode)), 0.4, 0
    energy, force = beyond(v)
    p, at = len(fit.names), fit.names.index(problem.rate)
    scalars, rates = np.empty((draws, p)), np.empty((draws, *found.prior.shape), np.float32)
    for n in range(-settle, draws):
        momentum = rng.standard_normal(len(v))
        x, value, slope = v, energy, force
        before = energy + 0.5 * float(v @ v + momentum @ momentum)
        angle = step * rng.uniform(0.8, 1.2)  # no two periods alike
        for _ in range(max(round(ANGLE / angle), 1)):
            momentum = momentum - angle / 2 * slope
            x, momentum = np.cos(angle) * x + np.sin(angle) * momentum, np.cos(angle) * momentum - np.sin(angle) * x
            value, slope = beyond(x)
            if not np.isfinite(value):
                break
            momentum = momentum - angle / 2 * slope
        after = value + 0.5 * float(x @ x + momentum @ momentum)
        chance = float(np.exp(min(before - after, 0.0))) if np.isfinite(after) else 0.0
        taken = rng.uniform() < chance
        if taken:
            v, energy, force = x, value, slope
        if n < 0:  # Robbins and Monro's rule
            step = float(np.clip(step * np.exp((chance - AIM) / (n + settle + 4) ** 0.6), 0.01, ANGLE))
            continue
        accepted += taken
        white = found.mode + known.root(v[None])[0]
        scalars[n] = found.coordinates(white)
        rates[n] = found.field(white) + level(scalars[n, at])
    z, fields, _ = found.draw(max(draws, 300), seed)
    laplace = fields + np.reshape([level(x) for x in z[:, at]], (-1, 1, 1, 1))
    sd = np.maximum(laplace.std(0), 1e-12)
    middle = found.mean + level(fit.z[at])
    return FieldCheck(
        names=fit.names,
        shift=(scalars.mean(0) - fit.z) / fit.sd,
        ratio=scalars.std(0) / fit.sd,
        effective=np.array([effective(x) for x in scalars.T]),
        field_shift=(rates.mean(0) - middle) / sd,
        field_ratio=rates.std(0) / sd,
        field_effective=np.apply_along_axis(effective, 0, rates),
        accepted=accepted / draws,
        step=step,
    )


def effective(chain: np.ndarray) -> float:
    """Effective number of independent draws in a chain (n,): n over its integrated autocorrelation time.

    The sum of autocorrelations ends where that of a pair falls below 0 (Geyer 1992, Stat Sci 7:473,
    doi:10.1214/ss/1177011137).
    """
    x = np.asarray(chain, float) - np.mean(chain)
    n = len(x)
    if not x.any():
        return 1.0
    spectrum = np.abs(np.fft.rfft(x, 2 * n)) ** 2
    correlation = np.fft.irfft(spectrum)[:n]
    correlation /= correlation[0]
    pairs = correlation[: n // 2 * 2].reshape(-1, 2).sum(1)
    end = np.flatnonzero(pairs < 0)
    last = end[0] if len(end) else len(pairs)
    return float(n / max(2 * pairs[:last].sum() - 1, 1.0))
