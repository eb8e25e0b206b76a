"""Simulation-based calibration of Laplace, importance sampling and NUTS, tumours without images. All data are virtual.

Truths are drawn from the prior of the fit, volumes from the truths with the fit's own noise, and each truth is ranked
among near independent draws of its posterior: uniform ranks are what a right posterior gives (Talts et al. 2018,
arXiv:1804.06788). The model is exponential growth under three doses of a drug, with unknown growth rate, efficacy and
first volume, and four volumes with Student-t errors of their logarithm: three parameters, skewed posteriors, as two of
the parameters are positive and hard to tell apart. Laplace and importance sampling take all replications at once; NUTS
takes one after the other, starting from the Laplace fit.

Run: python tests/benchmarks/bench_sbc.py [--replications 500] [--nuts 200] [--engine nutpie] [--figure F.png]
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

import numpy as np

import biomodel as bm
from biomodel.calibration.importance import Importance
from biomodel.calibration.mcmc import NUTS, ByNutpie, ByPymc
from biomodel.calibration.population import Population
from biomodel.calibration.samples import Samples
from biomodel.calibration.volumes import VolumeNoise, volume_parameters
from biomodel.diagnostics import RankStatistics, independent_draws, simulate_volumes, simulation_based_calibration
from biomodel.parameters import JointPrior

DAYS, FIRST = (0.0, 21.0, 42.0, 63.0), 10.0
PLAN = bm.Schedule.weekly("paclitaxel", 21.0, 3, 80, "mg/m^2")
NOISE = VolumeNoise((0.0,), (0.2,), 8.0)
#: Draws ranked of each posterior: 64 or 16 ranks alike, which 32 or 16 bins divide.
MANY, FEW = 63, 15
ENGINES = {"nutpie": ByNutpie(), "pymc": ByPymc()}


def population() -> Population:
    """The fixed prior of all replications: `calibrate` with a bare model would centre that of V0 on the data."""
    drug = bm.Chemotherapy("paclitaxel", bm.LogNormal(0.1, 0.7))
    model = bm.ReactionDiffusion(bm.Exponential(bm.LogNormal(0.02, 0.7)), bm.NoDiffusion(), [drug])
    parameters = volume_parameters(model, FIRST)
    mean, sd = (np.array([getattr(p.prior, what) for p in parameters.values()]) for what in ("location", "scale"))
    return Population(model, JointPrior(tuple(parameters), mean, np.diag(sd**2)), parameters, NOISE, 0, 0.0, ())


def study(posterior, replications: int, seed: int) -> RankStatistics:
    """Calibration of one method: `posterior` takes patients and random numbers."""
    people, template = population(), bm.Patient.from_volumes("S", DAYS, np.ones(len(DAYS)), PLAN, floor=1e-6)
    gaussian = people.gaussian
    return simulation_based_calibration(
        tuple(people.parameters),
        lambda n, rng: rng.multivariate_normal(gaussian.mean, gaussian.covariance, n),
        lambda z, rng: simulate_volumes(people, template, z, rng),
        lambda patients, rng: posterior(people, patients, rng),
        replications, seed,
    )  # fmt: skip


def laplace(people: Population, patients, rng) -> np.ndarray:
    z, covariance = people.laplace(patients)
    white = rng.standard_normal((len(z), MANY, z.shape[1]))
    return z[:, None] + np.einsum("npq,nsq->nsp", np.linalg.cholesky(covariance), white)


def importance(people: Population, patients, rng) -> np.ndarray:
    drawn = people.posterior(patients, draws=Importance().draws).draws
    return np.stack([independent_draws(Samples(z, w), MANY, rng)
                     for z, w in zip(drawn.z, drawn.weights, strict=True)])  # fmt: skip


class Nuts:
    """NUTS, one patient after the other; `ess`, `divergences` and `gradients` are what it took."""

    def __init__(self, engine, draws: int, tune: int):
        self.engine, self.draws, self.tune = engine, draws, tune
        self.ess: list[float] = []
        self.divergences = self.gradients = 0

    def __call__(self, people: Population, patients, rng) -> np.ndarray:
        found = []
        for i, patient in enumerate(patients):
            method = NUTS(1, self.draws, self.tune, seed=int(rng.integers(2**31)), map=bm.MAP(), engine=self.engine)
            samples = bm.calibrate(people, patient, method=method).samples
            self.ess.append(samples.ess)
            self.divergences += samples.chains.divergences
            self.gradients += samples.chains.gradients
            found.append(independent_draws(samples, FEW, rng))
            if (i + 1) % 20 == 0:
                print(f"  NUTS {i + 1} of {len(patients)}", file=sys.stderr, flush=True)
        return np.stack(found)


def report(label: str, found: RankStatistics, seconds: float) -> None:
    for row in found.table():
        print(f"{label:12s}{found.replications:6d}{found.draws:6d}  {row['name']:22s}{row['chi_squared_p']:10.3g}"
              f"{row['ecdf_p']:10.3g}{'yes' if row['in_band'] else 'NO':>9s}{row['lowest']:10.3f}"
              f"{row['highest']:10.3f}{seconds:10.1f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replications", type=int, default=500, help="of Laplace and importance sampling")
    parser.add_argument("--nuts", type=int, default=200, help="replications of NUTS; 0 for none")
    parser.add_argument("--draws", type=int, default=250, help="of each chain")
    parser.add_argument("--tune", type=int, default=150)
    parser.add_argument("--engine", choices=ENGINES, default="nutpie")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, help="write the figure of the ranks here")
    arguments = parser.parse_args()
    nuts = Nuts(ENGINES[arguments.engine], arguments.draws, arguments.tune)
    methods = {"Laplace": (laplace, arguments.replications), "Importance": (importance, arguments.replications)}
    if arguments.nuts:
        methods["NUTS"] = (nuts, arguments.nuts)
    print("Virtual tumours; truths from the fit's prior, data from its likelihood. Uniform ranks: p > 0.01, ECDF in")
    print("its band (95 %), and 0.125 of the truths each in the lowest and in the highest eighth of the draws.")
    print(f"{'':12s}{'repl.':>6s}{'draws':>6s}  {'':22s}{'p chi²':>10s}{'p ECDF':>10s}{'in band':>9s}{'lowest':>10s}"
          f"{'highest':>10s}{'CPU-s':>10s}")  # fmt: skip
    studies = {}
    for label, (posterior, replications) in methods.items():
        began = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            studies[label] = study(posterior, replications, arguments.seed)
        report(label, studies[label], time.process_time() - began)
        sys.stdout.flush()
    if arguments.nuts:
        ess = np.array(nuts.ess)
        print(f"NUTS ({arguments.engine}): {FEW} of {arguments.draws} draws ranked, worth {ess.min():.0f} to "
              f"{ess.max():.0f} independent ones (median {np.median(ess):.0f}; fewer than {FEW} in "
              f"{(ess < FEW).sum()} replications); {nuts.divergences} divergences; "
              f"{nuts.gradients / len(ess):.0f} gradients each")  # fmt: skip
    if arguments.figure:
        from biomodel.figure_diagnostics import rank_differences

        rank_differences(studies).savefig(arguments.figure, dpi=150)


if __name__ == "__main__":
    main()
