"""NUTS beside adaptive Metropolis: effective draws per CPU-second, of scalars and of a map's modes. All is virtual.

Both start from the Laplace fit with its covariance, in coordinates where that is the identity; Metropolis goes on
learning the covariance (Haario, Saksman and Tamminen 2001, doi:10.2307/3318737) and its scale (acceptance 0.234,
Roberts, Gelman and Gilks 1997, doi:10.1214/aoap/1034625254). A gradient counts what it costs: the CPU time of a run is
divided by what it evaluated, and that of the draws after tuning counts. Metropolis never computes a gradient.
Effective draws are the least bulk ones of all coordinates.

- 3 parameters (growth rate, diffusion, efficacy of a drug), 24³ voxels, two visits; what else is unknown is held
  at the optimum.
- 30 modes of a map of the growth rate, three visits: the leading directions of the Laplace posterior; others are held.

Run: python tests/benchmarks/bench_mcmc.py [--draws 250] [--seed 7] [--only scalars|modes]
"""

import argparse
import time

import numpy as np
from bench_field import NOISE_LENGTH, SHAPE, patient, truth

import biomodel as bm
from biomodel.calibration.density import ImageDensity, Whitened
from biomodel.calibration.field import FieldLaplace
from biomodel.calibration.field_prior import Matern
from biomodel.calibration.field_problem import FieldProblem
from biomodel.calibration.gaussnewton import prior_of
from biomodel.calibration.images import ImageProblem
from biomodel.calibration.mcmc import ByNutpie, ByPymc, sample_nuts
from biomodel.calibration.samples import Chains
from biomodel.errors import ModelError, SolverError
from biomodel.virtual import Matched, small_patient

CHAINS = 4
SCALARS = ("growth.k", "diffusion.D", "paclitaxel.efficacy")


class Part:
    """A density along some of its coordinates, others held."""

    def __init__(self, density, at, which):
        self.density, self.at, self.which, self.size = density, at, which, len(which)
        self.limits = tuple(v[which] for v in density.limits)

    def _whole(self, x):
        z = self.at.copy()
        z[self.which] = x
        return z

    def __call__(self, x):
        value, slope = self.density(self._whole(x))
        return value, slope[self.which]

    def value(self, x):
        return self.density.value(self._whole(x))


class Modes:
    """The posterior of a map along its leading directions, in coordinates where Laplace's is standard normal."""

    def __init__(self, fit: bm.Fit, count: int):
        found = fit.rate_map
        self.problem = FieldProblem(fit.model, fit.patient, fit.solver, found.prior.matern, found.link,
                                    found.noise_length, found.padding)  # fmt: skip
        self.problem.replan(found.mode)
        self.problem.reweigh(self.problem.linearise(found.mode))
        self.centre = found.mode
        self.along = found.lowrank.vectors[:count] / np.sqrt(1 + found.lowrank.values[:count, None])
        self.size = count

    def __call__(self, x):
        try:
            value, slope = self.problem.slope(self.centre + x @ self.along)
        except (ModelError, SolverError):  # too extreme for the model
            return -np.inf, np.zeros(self.size)
        return -value, -self.along @ slope

    def value(self, x):
        try:
            return -self.problem.objective(self.centre + x @ self.along)
        except (ModelError, SolverError):
            return -np.inf


def metropolis(density, chains, tune, draws, seed):
    """Adaptive Metropolis: draws (chains, draws, p), evaluations and CPU-seconds of the kept draws."""
    found, seconds = [], 0.0
    for k in range(chains):
        rng = np.random.default_rng([seed, k])
        p = density.size
        x = rng.standard_normal(p)
        value = density.value(x)
        mean, spread, scale, weight = np.zeros(p), np.eye(p), 2.38 / np.sqrt(p), 10.0 * p
        root, kept = np.eye(p), []
        for n in range(-tune, draws):
            if n == 0:
                began = time.process_time()
            step = x + scale * root @ rng.standard_normal(p)
            new = density.value(step)
            chance = float(np.exp(min(new - value, 0.0))) if np.isfinite(new) else 0.0
            if rng.uniform() < chance:
                x, value = step, new
            kept.append(x)
            if n < 0:
                scale *= np.exp((chance - 0.234) / (n + tune + 10) ** 0.6)
            weight += 1
            off = x - mean
            mean = mean + off / weight
            spread = spread + (np.outer(off, x - mean) - spread) / weight
            if n % 20 == 0:
                root = np.linalg.cholesky(spread)
        seconds += time.process_time() - began
        found.append(kept[tune:])
    return np.array(found), seconds


def compare(density, name, draws, tune, factor, seed):
    """Print one block of the table; Metropolis takes `factor` times as many steps."""
    runs = {}
    for engine in (ByPymc(), ByNutpie()):
        found = sample_nuts(density, CHAINS, draws, tune, seed=seed, engine=engine)
        kept = int(found.stats["n_steps"].sum()) + found.x[..., 0].size * isinstance(engine, ByPymc)
        each = found.seconds / found.gradients
        runs[f"NUTS, {engine.version}"] = Chains(found.x, found.stats, kept, kept * each, engine.version)
    x, seconds = metropolis(density, CHAINS, factor * tune, factor * draws, seed)
    peer = runs["adaptive Metropolis"] = Chains(x, {}, x[..., 0].size, seconds, "")
    print(f"\n{name}\n{'':26s}{'evaluations':>12s}{'CPU-s':>8s}{'ms each':>9s}{'ESS':>7s}{'R-hat':>8s}"
          f"{'ESS/CPU-s':>11s}{'ratio':>8s}")  # fmt: skip
    for label, z in runs.items():
        rate = z.bulk.min() / z.seconds
        print(f"{label:26s}{z.gradients:12d}{z.seconds:8.1f}{1e3 * z.seconds / z.gradients:9.2f}{z.bulk.min():7.0f}"
              f"{z.r_hat.max():8.3f}{rate:11.2f}{rate * peer.seconds / peer.bulk.min():8.1f}")  # fmt: skip
    first, last = (runs[label].z for label in list(runs)[:: len(runs) - 1])
    sd = last.std((0, 1))
    print(f"first and last disagree by at most {np.abs(first.mean((0, 1)) - last.mean((0, 1))).max():.2f} in a mean "
          f"(Laplace sd), {np.abs(first.std((0, 1)) / sd - 1).max():.0%} in a standard deviation; Laplace's is "
          f"{1 / sd.max():.2f} to {1 / sd.min():.2f} of theirs", flush=True)  # fmt: skip


def scalars(seed: int):
    """The whitened posterior of three parameters of a small patient, and a description."""
    known = small_patient(seed, Matched()).patient.until(2)
    drugs = [bm.Chemotherapy(agent) for agent in known.schedule.agents]
    model = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), drugs)
    problem = ImageProblem(model, known, bm.TorchSolver())
    prior = prior_of(problem.parameters)
    best = bm.MAP().optimise(problem, prior)
    density = ImageDensity(problem, best, prior)
    which = np.array([problem.names.index(n) for n in SCALARS])
    precision = (best.linear.hessian + prior.precision)[np.ix_(which, which)]
    part = Part(density, best.z, which)
    white = Whitened(part, best.z[which], np.linalg.cholesky(np.linalg.inv(precision)), part.limits)
    return white, f"{', '.join(SCALARS)}; {'×'.join(map(str, known.domain.shape))} voxels, virtual patient {seed}"


def modes(seed: int, count: int = 30):
    """The whitened posterior of the leading directions of a map, and a description."""
    mask, fractions, _ = truth(seed)
    known = patient(mask, fractions, 2, seed).until(visit=3)
    drugs = [bm.Chemotherapy(agent) for agent in known.schedule.agents]
    model = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), drugs).with_priors(Matched().priors())
    fit = bm.calibrate(model, known, method=FieldLaplace(Matern(10.0, 0.4), noise_length=NOISE_LENGTH))
    shape = "×".join(str(n // 2) for n in SHAPE)
    return Modes(fit, count), f"{count} modes of a map of the growth rate; {shape} voxels, patient of bench_field"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=250, help="of each of 4 chains of NUTS")
    parser.add_argument("--tune", type=int, default=200, help="steps of each before, which are dropped")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--only", choices=("scalars", "modes"))
    given = parser.parse_args()
    if given.only != "modes":
        compare(*scalars(given.seed), given.draws, given.tune, 4, given.seed)
    if given.only != "scalars":
        compare(*modes(0), given.draws, given.tune, 12, given.seed)


if __name__ == "__main__":
    main()
