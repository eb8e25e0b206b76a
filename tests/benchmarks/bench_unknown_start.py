"""Start, parameters and noise of virtual patients from two to four irregular visits, some without a map of cells.

Truth is made on cells a third as wide with another integrator (`tests/virtual_starts.py` has settings and seeds).
matched: the fitted model's priors are the generator's distributions. mismatched: D and k vary over the organ, the start
is ragged, noise is correlated and heavy-tailed, and the model knows nothing of it. multifocal: two or three foci.

- network: the optimum by a network (from where the classical search ended), weights eliminated; draws weighed by the
  classical solver, shifted by the difference of both at the optimum.
- classical: the same on `TorchSolver` at the voxels' grid.

Both see the same data with the same priors and are asked for the same forecast, 20 days after the last visit; one
thread, CPU-seconds. Coverage counts truths inside central 90 % intervals, with the exact binomial 99 % band of 90 %
beside it. Forecasts solve anew with `TorchSolver`; "own" is the network's own, of the first patients only. Baselines of
the volume: the last measured one carried forward, and the exponential through the last two where there are two.

Run: python tests/benchmarks/bench_unknown_start.py [--patients 200] [--multifocal 20] [--only matched ...]
     [--results FILE] [--seconds S]
With --results each patient is kept in that file when done, and a later run goes on from there; --seconds stops a run
after that much CPU.
"""

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy.ndimage import gaussian_filter  # noqa: E402
from scipy.stats import binom  # noqa: E402

import biomodel as bm  # noqa: E402
import virtual_starts as virtual  # noqa: E402
from biomodel.scoring import exponential_volume  # noqa: E402
from pinn.joint.forecast import forecast_joint  # noqa: E402
from pinn.joint.observed import Cells, Observation, Outline  # noqa: E402
from pinn.joint.posterior import ROUGH, choose_start, infer_joint, resampled  # noqa: E402
from pinn.joint.problem import JointProblem  # noqa: E402
from pinn.joint.starts import Foci  # noqa: E402

SETTINGS = {"matched": virtual.MATCHED, "mismatched": virtual.MISMATCHED, "multifocal": virtual.MULTIFOCAL}
MODEL = bm.ReactionDiffusion(priors=virtual.PRIORS)
#: Draws of a forecast, and patients with a network's own forecast.
FORECAST, OWN = 200, 10
NAMES = {"diffusion.D": "D", "growth.k": "k"}


def foci(count):
    return Foci(count, virtual.PEAK, virtual.WIDTH)


def problem(patient, start):
    """What a network is asked."""
    cells, outline = Cells(virtual.NOISE), Outline(virtual.THRESHOLD, virtual.EDGE)
    seen = [Observation(day, values, kind) for day, *both in patient.visits
            for values, kind in zip(both, (cells, outline), strict=True) if values is not None]  # fmt: skip
    return JointProblem(MODEL, patient.domain, bm.Schedule(), start, 0.0, seen)


def quantile_of(z, weights, truth):
    """Share of the weight below the truth."""
    return float(weights[z < truth].sum())


def measured(patient):
    """Days and volumes (mm³) of the kind of data of which there is most."""
    voxel = float(np.prod(virtual.SPACING))
    found = {"cells": [], "outline": []}
    for day, cells, outline in patient.visits:
        if cells is not None:
            smooth = gaussian_filter(np.nan_to_num(cells), (0, 1, 1))
            found["cells"].append((day, voxel * float((smooth >= virtual.VISIBLE).sum())))
        if outline is not None:
            found["outline"].append((day, voxel * float(outline.sum())))
    return max(found.values(), key=len)


def one(posterior, patient, seed, own):
    """Intervals and forecast of one fit."""
    began = time.process_time()
    posterior = resampled(posterior, seed=seed)
    middle = time.process_time()
    forecast = forecast_joint(posterior, [patient.later], FORECAST, seed, virtual.VISIBLE, own=own)
    row = {"is_seconds": middle - began, "forecast_seconds": time.process_time() - middle,
           "notes": list(posterior.notes), "values": posterior.values, "sd": posterior.sd[:2].tolist()}  # fmt: skip
    samples = posterior.samples
    row["ess"] = None if samples is None else samples.ess
    z = posterior.draws(2000, seed) if samples is None else samples.z
    weights = np.full(len(z), 1 / len(z)) if samples is None else samples.weights
    for i, (name, parameter) in enumerate(posterior.problem.parameters.items()):
        row[NAMES[name]] = quantile_of(z[:, i], weights, float(parameter.prior.to_z(patient.values[name])))
    volume = forecast.volume[:, 0]
    row["V"] = float((np.mean(volume < patient.volume) + np.mean(volume <= patient.volume)) / 2)
    row["volume"] = [*np.quantile(volume, [0.05, 0.5, 0.95]), patient.volume]
    size = np.linalg.norm(patient.truth)
    row["L2"] = float(np.linalg.norm(forecast.solved[0] - patient.truth) / size)
    row["mean L2"] = float(np.linalg.norm(forecast.mean[0] - patient.truth) / size)
    if forecast.own is not None:
        row["own L2"] = float(np.linalg.norm(forecast.own[0] - patient.truth) / size)
        row["gap"] = float(forecast.gap.relative[0])
    return row


def fit(setting, seed, own):
    """Rows of one patient."""
    patient = virtual.Patient(seed, SETTINGS[setting])
    network = problem(patient, foci(1))
    classical = network.by(ROUGH)
    rows = {"setting": setting, "seed": seed, "visits": len(patient.visits), "truth": patient.values}
    rows["outlines only"] = all(c is None for _, c, _ in patient.visits)
    began = time.process_time()
    found = infer_joint(classical)
    seconds = time.process_time() - began
    rows["classical"] = one(found, patient, seed, False) | {"seconds": seconds}
    if setting == "multifocal":
        began = time.process_time()
        chosen = choose_start(network, [foci(n) for n in (1, 2, 3)])
        spent = time.process_time() - began
        rows["foci"] = [len(patient.foci), chosen.problem.start.count]
        rows["chosen"] = one(chosen, patient, seed, True) | {"seconds": spent}
    began = time.process_time()
    by_network = infer_joint(network, begin=found.z)
    seconds += time.process_time() - began
    rows["network"] = one(by_network, patient, seed, own) | {"seconds": seconds}
    days, volumes = zip(*measured(patient), strict=True)
    rows["carry"] = abs(volumes[-1] - patient.volume) / patient.volume
    if len(days) > 1:
        grown = 1e3 * exponential_volume(days, [v / 1e3 for v in volumes], patient.later, 0.004)
        rows["exponential"] = abs(grown - patient.volume) / patient.volume
    return rows


def table(rows):
    print(f"{'setting':12}{'method':11}{'n':>5}{'D':>7}{'k':>7}{'volume':>8}{'99 % band':>14}{'bias D':>8}{'bias k':>8}"
          f"{'L2':>8}{'own L2':>8}{'|vol| err':>10}{'carry':>7}{'expon.':>8}{'CPU s: fit':>11}{'draws':>7}"
          f"{'forecast':>9}{'ESS':>6}")  # fmt: skip
    for setting in SETTINGS:
        here = [r for r in rows if r["setting"] == setting]
        for method in ("classical", "network", "chosen"):
            mine = [r[method] for r in here if method in r]
            if not mine:
                continue
            n = len(mine)
            low, high = binom.ppf([0.005, 0.995], n, 0.9) / n
            inside = [np.mean([0.05 <= m[q] <= 0.95 for m in mine]) for q in ("D", "k", "V")]
            off = [np.mean([np.log(m["values"][k] / r["truth"][k]) / s for m, r in zip(mine, here, strict=True)
                            for k, s in [(name, m["sd"][i])]])
                   for name in NAMES for i in [list(mine[0]["values"]).index(name)]]  # fmt: skip
            error = np.median([abs(m["volume"][1] / m["volume"][3] - 1) for m in mine])
            own = [m["own L2"] for m in mine if "own L2" in m]
            carry = np.median([r["carry"] for r in here])
            grown = [r["exponential"] for r in here if "exponential" in r]
            seconds = [np.median([m[k] for m in mine]) for k in ("seconds", "is_seconds", "forecast_seconds")]
            ess = np.median([m["ess"] or 0 for m in mine])
            print(f"{setting:12}{method:11}{n:5d}{inside[0]:7.3f}{inside[1]:7.3f}{inside[2]:8.3f}"
                  f"{low:8.3f}-{high:.3f}{off[0]:8.2f}{off[1]:8.2f}{np.median([m['L2'] for m in mine]):8.2%}"
                  f"{np.median(own) if own else np.nan:8.2%}{error:10.1%}{carry:7.0%}"
                  f"{np.median(grown) if grown else np.nan:8.0%}{seconds[0]:11.2f}{seconds[1]:7.2f}{seconds[2]:9.2f}"
                  f"{ess:6.0f}")  # fmt: skip
    for setting in SETTINGS:
        here = [r for r in rows if r["setting"] == setting]
        short = [r for r in here if r["outlines only"]]
        notes = sum(bool(r["network"]["notes"]) for r in here)
        if here:
            print(f"{setting}: outlines only in {len(short)} patients; {notes} fits by the network carry a note")
    several = [r for r in rows if r["setting"] == "multifocal"]
    if several:
        best = np.array([min(r["network"]["L2"], r["classical"]["L2"]) for r in several])
        chosen = np.array([r["chosen"]["L2"] for r in several])
        right = sum(a == b for a, b in (r["foci"] for r in several))
        print(f"multifocal: forecast L2 of the foci that the evidence chose, below the best single focus by "
              f"{1 - chosen.mean() / best.mean():.0%} (means), {np.median(1 - chosen / best):.0%} (median patient), "
              f"least {np.min(1 - chosen / best):.0%}; number of foci right in {right} of {len(several)}")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, default=200)
    parser.add_argument("--multifocal", type=int, default=20)
    parser.add_argument("--only", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--results", type=Path)
    parser.add_argument("--seconds", type=float, default=np.inf)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    if given.results and given.results.exists():
        rows = [json.loads(line) for line in given.results.read_text().splitlines()]
    done = {(r["setting"], r["seed"]) for r in rows}
    fit("matched", 0, True)  # imports and compiled kernels belong to no method
    began = time.process_time()
    most = max(given.patients, given.multifocal)
    for setting in given.only:
        for i in range(most):
            count, seed = given.multifocal if setting == "multifocal" else given.patients, virtual.FIRST + i
            if i >= count or (setting, seed) in done or time.process_time() - began > given.seconds:
                continue
            rows.append(fit(setting, seed, i < OWN))
            print(f"{setting} {seed}: {time.process_time() - began:.0f} CPU-seconds", file=sys.stderr, flush=True)
            if given.results:
                with given.results.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    table([r for r in rows if r["setting"] in given.only])


if __name__ == "__main__":
    main()
