"""What was discovered: a growth law with its uncertainty, and the terms that it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares
from scipy.special import ndtri

from biomodel.calibration.gaussnewton import limits_of, prior_of
from biomodel.errors import ModelError
from biomodel.models import ReactionDiffusion
from biomodel.parameters import Fixed, JointPrior, LogNormal
from biomodel.terms import Gompertz, Growth, Logistic
from pinn.discovery.laws import Allee, Power, Richards, TableGrowth, at, spread_over

__all__ = ["LIBRARY", "Discovered", "Formula"]

#: Formulas that are tried: logistic, Gompertz, generalised logistic, weak Allee effect, power law.
LIBRARY: tuple[Growth, ...] = (
    Logistic(LogNormal(0.05, 1.0)), Gompertz(LogNormal(0.05, 1.0)), Richards(), Allee(), Power()
)  # fmt: skip
#: Cell fractions at which law and formula are compared.
PLACES = 25
#: Part by which a formula may miss the law for nothing: neither is exact.
NUGGET = 0.01


@dataclass(frozen=True, eq=False)
class Formula:
    """A formula fitted to the learned law.

    Attributes
    ----------
    term : Growth
        With its parameters known.
    values : dict of str to float
    criterion : float
        Akaike's: squared misfit, in units of the law's covariance, plus twice the number of parameters (Akaike 1974,
        doi:10.1109/TAC.1974.1100705). The smallest is best; one that is larger by 10 explains next to nothing.
    departure : float
        Largest departure from the learned law over the visited range, relative to the law's largest value.
    """

    term: Growth
    values: dict[str, float]
    criterion: float
    departure: float


@dataclass(frozen=True, eq=False)
class Discovered:
    """A growth law learned from images.

    Attributes
    ----------
    model : ReactionDiffusion
        The model whose growth was learned.
    values : dict of str to float
        All its parameters.
    z, covariance : ndarray, shape (p,) and (p, p)
        Transformed coordinates of its free parameters, and their covariance; the state network is marginalised.
    visited : (float, float)
        Cell fractions that the images show: from the noise of a voxel to the largest. Outside, the law is the prior's.
    equation : float
        Root mean square of the equation's residual at places that training never saw, in cell fractions per whole time.
    images : float
        Mean square of the images' misfit over their noise: about 1 where all is well.
    converged : bool
        Whether the last stage of training ended by itself.
    """

    model: ReactionDiffusion
    values: dict[str, float]
    z: np.ndarray
    covariance: np.ndarray
    visited: tuple[float, float]
    equation: float
    images: float
    converged: bool = True

    def growth(self, u: Sequence[float] | np.ndarray) -> np.ndarray:
        """Growth (n,) at cell fractions (n,), 1/day."""
        return at(self.model.growth, self.model.of(self.model.growth, self.values), u)

    def band(self, u: Sequence[float] | np.ndarray, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end (n,) of the interval that holds the growth at each u with this probability.

        As far as the Gaussian about the optimum goes: in `tests/benchmarks/bench_discover.py` nominal 90 % bands held
        the truth on about 60 % of the visited range, and D lay up to four of its standard deviations off.
        """
        wide = float(ndtri((1 + level) / 2)) * np.sqrt(np.diag(self._log_covariance(np.asarray(u, float))))
        middle = self.growth(u)
        return middle * np.exp(-wide), middle * np.exp(wide)

    def tabulated(self, knots: Sequence[float] = TableGrowth().knots) -> ReactionDiffusion:
        """The model with the law as a table, for every solver; its priors, jointly with D, are what was learned."""
        knots = tuple(knots)
        # At 0 and 1 the law is 0, but its part s is not: both ends are taken from just inside.
        u = np.clip(knots, 1e-9, 1 - 1e-9)
        s = self.growth(u) / (u * (1 - u))
        names = [n for n in self.model.free if n.startswith("diffusion.")]
        along = np.concatenate((self._along(u), np.eye(len(self.z))[[self.model.free.index(n) for n in names]]))
        covariance = along @ self.covariance @ along.T
        covariance += 1e-8 * np.eye(len(covariance))
        sd = np.sqrt(np.diag(covariance))
        table = TableGrowth(knots, tuple(LogNormal(float(v), float(e)) for v, e in zip(s, sd[: len(s)], strict=True)))
        priors = {n: self.model.parameters[n].prior.at(self.z[self.model.free.index(n)], sd[len(s) + i])
                  for i, n in enumerate(names)}  # fmt: skip
        made = replace(self.model, growth=table, priors=priors, joint=None)
        mean = np.concatenate((np.log(s), [self.z[self.model.free.index(n)] for n in names]))
        return made.with_joint_prior(JointPrior(
            (*(f"growth.s{j}" for j in range(len(s))), *names), mean, covariance, "learned by pinn.discover"
        ))  # fmt: skip

    def formulas(self, library: Sequence[Growth] = LIBRARY) -> list[Formula]:
        """Formulas fitted to the law over the visited range, the best by its criterion first."""
        if not library:
            raise ModelError("formulas: the library is empty; expected growth terms such as bm.Logistic().")
        u = spread_over(*self.visited, PLACES)
        law = self.growth(u)
        covariance = self._log_covariance(u) + NUGGET**2 * np.eye(PLACES)
        root = np.linalg.cholesky(covariance)
        found = []
        for term in library:
            parameters = {p.name: p for p in term.parameters}
            low, high = limits_of(parameters)

            def values(z, parameters=parameters):
                return {n: float(p.prior.to_value(v)) for (n, p), v in zip(parameters.items(), z, strict=True)}

            def misfit(z, term=term, values=values):
                there = np.maximum(at(term, values(z), u), 1e-12)
                return np.linalg.solve(root, np.log(there / law))

            start = np.clip(prior_of(parameters).mean, low + 1e-6, high - 1e-6)
            best = least_squares(misfit, start, bounds=(low, high))
            own = values(best.x)
            known = replace(term, **{n: Fixed(v) for n, v in own.items()})
            departure = float(np.abs(at(term, own, u) - law).max() / law.max())
            found.append(Formula(known, own, float(2 * best.cost + 2 * len(own)), departure))
        return sorted(found, key=lambda f: f.criterion)

    def _along(self, u: np.ndarray) -> np.ndarray:
        """Derivatives (n, p) of the logarithm of the growth by the transformed coordinates."""
        term, step = self.model.growth, 1e-5
        found = np.zeros((len(u), len(self.z)))
        for i, name in enumerate(self.model.free):
            if not name.startswith(f"{term.name}."):
                continue
            prior = self.model.parameters[name].prior
            ends = [
                np.log(at(term, self.model.of(term, {**self.values, name: float(prior.to_value(self.z[i] + h))}), u))
                for h in (step, -step)
            ]
            found[:, i] = (ends[0] - ends[1]) / (2 * step)
        return found

    def _log_covariance(self, u: np.ndarray) -> np.ndarray:
        along = self._along(u)
        return along @ self.covariance @ along.T
