"""Conformal adjustment and triage of forecasts on 1000 small virtual patients (24³ voxels of 2 mm). All are virtual.

Half of the patients are matched (the fitted model can be right), half mismatched (resistant cells, diffusion by tissue,
regions drawn askew, Rician noise). Each has six weekly doses of paclitaxel and visits on days 0, 19 and 41; the model
(logistic growth, uniform diffusion, paclitaxel; the matched generator's own priors) is calibrated on the first two by
Laplace's approximation and forecasts the third with 100 draws.

Fixed before anything was fitted: seeds `SEEDS` + i; even i are the conformal-calibration cohort (and the reference of
the out-of-distribution flag, matched ones alone), odd i the test set. Voxels are those of the tumour regions of the
first two visits, at most VOXELS of a patient, chosen at random by the seed: what is known when the forecast is made
decides which count. The values seen are the measured volume and the measured cell fraction of the third visit (0
outside the region drawn there).

The bar: 50/80/90/95 % intervals of both cover within 3 points after adjustment, and CRPS is no worse. Patients are kept
one by one in build/conformal/, so that a stopped run goes on where it stopped.

Run: python tests/benchmarks/bench_conformal.py [--patients 500] [--only-collect]
"""

import argparse
import time
from pathlib import Path

import numpy as np

import biomodel as bm
from biomodel.diagnostics import posterior_predictive_check
from biomodel.errors import TumorcastError
from biomodel.files import atomic_write
from biomodel.observation import observe
from biomodel.virtual import Matched, Mismatched, small_patient

DRAWS, REPLICATES, VOXELS = 100, 20, 150
DAYS = (0.0, 19.0, 41.0)
REGIMEN = bm.Schedule.weekly("paclitaxel", 1.4, 6, 80.0, "mg/m^2", status="planned")
SETTINGS = {"matched": Matched(), "mismatched": Mismatched()}
#: First seeds: no patient is in both settings.
SEEDS = {"matched": 19500, "mismatched": 24500}
#: Looser than the solver's default (1e-3): the forecast's quantiles move by far less than their own Monte-Carlo error.
SOLVER = bm.TorchSolver(rtol=5e-3)
FOLDER = Path("build") / "conformal"


def model() -> bm.ReactionDiffusion:
    """Logistic growth, uniform diffusion and paclitaxel, with the matched generator's own priors."""
    drug = bm.Chemotherapy("paclitaxel")
    priors = Matched().priors()
    names = ("growth.k", "diffusion.D", "paclitaxel.efficacy")
    return bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [drug]).with_priors({n: priors[n] for n in names})


def one(seed: int, truth: Matched) -> dict[str, np.ndarray]:
    """Forecast of one virtual patient's third visit, what was then seen, and what the calibration showed."""
    began = time.process_time()
    virtual = small_patient(seed, truth, regimen=REGIMEN, visit_days=DAYS)
    known = virtual.patient.until(2)
    fit = bm.calibrate(model(), known, SOLVER)
    found = bm.forecast(fit, times=list(DAYS[1:]), draws=DRAWS, seed=seed, curve_step=100.0)
    check = posterior_predictive_check(fit, REPLICATES, seed)
    seen = [observe(virtual.patient, v) for v in virtual.patient.visits]
    # A visit without visible tumour has no region; nothing seen is a cell fraction of 0 everywhere.
    last = np.where(seen[2].region, 0.0 if seen[2].fraction is None else seen[2].fraction, 0.0)
    place = np.argwhere((seen[0].region | seen[1].region) & known.domain.mask)
    rng = np.random.default_rng([seed, 21])
    chosen = tuple(place[np.sort(rng.permutation(len(place))[:VOXELS])].T)
    maps = np.zeros((found.draws, *known.domain.shape), np.float32)
    maps[(slice(None), *found.box)] = found["cell_fraction"].values[:, -1]
    volumes = [virtual.patient.volume_of(v) for v in virtual.patient.visits]
    means = [float(s.fraction[s.region].mean()) if s.fraction is not None and s.region.any() else 0.0 for s in seen]
    return {
        "volume_draws": found["volume"].values.astype(np.float32), "volumes": np.array(volumes),
        "true_volumes": virtual.truth["volume"].values, "mean_fractions": np.array(means),
        "voxel_draws": maps[(slice(None), *chosen)].astype(np.float16), "voxel_seen": last[chosen],
        "voxel_true": virtual.truth["cell_fraction"].values[-1][chosen],
        "z": fit.z, "prior_mean": fit.prior.mean, "prior_sd": fit.prior.sd, "sd": fit.sd,
        "inflation": np.array(fit.inflation), "log_likelihood": np.array(fit.log_likelihood),
        "count": np.array(fit.count), "converged": np.array(fit.converged), "statistics": np.array(check.names),
        "check_observed": check.observed, "check_replicated": check.replicated, "check_p": check.p,
        "cpu": np.array(time.process_time() - began),
    }  # fmt: skip


def collect(patients: int) -> None:
    """Compute what is missing in the folder, both settings in turn."""
    for i in range(patients):
        for name, truth in SETTINGS.items():
            path = FOLDER / f"{name}-{SEEDS[name] + i}.npz"
            if path.exists():
                continue
            try:
                row = one(SEEDS[name] + i, truth)
            except TumorcastError as error:
                row = {"failed": np.array(str(error))}
            with atomic_write(path) as target:
                np.savez_compressed(target, **row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, default=500, help="of each setting")
    parser.add_argument("--only-collect", action="store_true")
    arguments = parser.parse_args()
    collect(arguments.patients)


if __name__ == "__main__":
    main()
