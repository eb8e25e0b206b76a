"""Recovery on virtual patients: are the stated uncertainties true, in the matched and in the mismatched setting?

200 small virtual patients (24³ voxels of 2 mm, two visits in, 5 % ADC noise by voxel and by visit) are calibrated on
their first two visits with the generator's own distributions as priors and forecast to the third and fourth. Truth is
made on a grid twice finer with another integrator. In the mismatched setting a second model is fitted too, which knows
that some cells may be resistant (but not the setting's other flaws). All numbers are virtual.

Run: python tests/benchmarks/bench_recovery.py [patients] [--setting matched|mismatched|resistant] [--first SEED]
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from scipy.stats import binom

import biomodel as bm
from biomodel.scoring import crps, exponential_volume
from biomodel.treatments import Combination
from biomodel.virtual import Matched, Mismatched, small_patient

DRAWS = 200


def plain(agents) -> bm.ReactionDiffusion:
    """Every cell alike, with the matched generator's own distributions as priors."""
    return bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy(a) for a in agents]).with_priors(
        Matched().priors()
    )


def sparing(agents) -> bm.ReactionDiffusion:
    """The same with a fraction of cells that no drug kills, at its default prior."""
    priors = Matched().priors()
    drugs = Combination(tuple(agents), tuple(priors[f"{a}.efficacy"] for a in agents))
    rest = {n: p for n, p in priors.items() if not n.endswith(".efficacy")}
    return bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [drugs]).with_priors(rest)


SETTINGS = {
    "matched": (Matched(), plain, "matched truth"),
    "mismatched": (Mismatched(), plain, "mismatched truth"),
    "resistant": (Mismatched(), sparing, "mismatched truth, model with a resistant fraction"),
}


def one(seed: int, truth, make) -> dict:
    """Calibrate and forecast one patient; everything that the table needs."""
    virtual = small_patient(seed, truth)
    patient = virtual.patient
    model = make(patient.schedule.agents)
    began = time.process_time()
    fit = bm.calibrate(model, patient.until(2))
    middle = time.process_time()
    days = [v.day for v in patient.visits[2:]]
    forecast = bm.forecast(fit, times=days, draws=DRAWS, seed=seed, curve_step=1e3)
    ended = time.process_time()
    row: dict = {"seed": seed, "calibration": middle - began, "forecast": ended - middle, "solves": fit.solves}
    row["z"], row["shrinkage"] = {}, fit.shrinkage
    row["inflation"] = fit.inflation
    for i, (name, parameter) in enumerate(fit.parameters.items()):
        # The combination names its efficacies after their agents.
        true_name = name.removeprefix("chemotherapy.efficacy_") + ".efficacy" if "efficacy_" in name else name
        if true_name in virtual.parameters:
            z = float(parameter.prior.to_z(virtual.parameters[true_name]))
            row["z"][name] = (fit.z[i] - z) / fit.sd[i]
    past = [patient.volume_of(v) for v in patient.visits[:2]]
    true = virtual.truth["volume"].values
    rng = np.random.default_rng(seed)
    row["visits"] = []
    for k, day in enumerate(days):
        draws, truth_volume = forecast["volume"].values[:, k], float(true[2 + k])
        pit = np.mean(draws < truth_volume) + rng.random() * np.mean(draws == truth_volume)
        low, high = np.quantile(draws, [0.05, 0.95])
        grown = exponential_volume([v.day for v in patient.visits[:2]], past, day, 0.004)
        row["visits"].append({
            "truth": truth_volume, "low": float(low), "high": float(high), "median": float(np.median(draws)),
            "pit": float(pit), "crps": crps(draws, truth_volume), "carry": abs(past[-1] - truth_volume),
            "exponential": abs(grown - truth_volume),
        })  # fmt: skip
    return row


def table(rows: list[dict], name: str) -> None:
    """Print the figures of one setting."""
    n = len(rows)
    low, high = (int(v) for v in binom.interval(0.99, n, 0.9))
    print(f"\n{name}: {n} virtual patients, calibrated on visits 1-2 (priors of the matched generator)")
    print(f"{'parameter':28s}{'mean z²':>9s}{'mean z':>9s}{'median sd ratio':>17s}{'identified':>12s}")
    for parameter in rows[0]["z"]:
        z = np.array([r["z"][parameter] for r in rows])
        s = np.array([r["shrinkage"][parameter] for r in rows])
        print(f"{parameter:28s}{np.mean(z**2):9.3f}{np.mean(z):9.3f}{np.median(s):17.3f}{np.mean(s < 0.5):12.0%}")
    print(f"{'':10s}{'90 % covers':>12s}{'by PIT':>9s}{'band of 90 %':>16s}{'50 % by PIT':>13s}"
          f"{'CRPS':>8s}{'carry':>8s}{'expon.':>9s}{'gone':>7s}")  # fmt: skip
    for k in range(2):
        v = [r["visits"][k] for r in rows]
        inside = sum(x["low"] <= x["truth"] <= x["high"] for x in v)
        pit = np.array([x["pit"] for x in v])
        nine, five = np.mean((pit > 0.05) & (pit < 0.95)), np.mean((pit > 0.25) & (pit < 0.75))
        means = [np.mean([x[c] for x in v]) for c in ("crps", "carry", "exponential")]
        gone = np.mean([x["truth"] == 0 for x in v])
        print(f"visit {k + 3:<4d}{inside / n:12.3f}{nine:9.3f}{low / n:8.3f}-{high / n:.3f}{five:13.3f}"
              f"{means[0]:8.3f}{means[1]:8.3f}{means[2]:9.3f}{gone:7.0%}")  # fmt: skip
    inflated = np.quantile([r["inflation"] for r in rows], [0.05, 0.5, 0.95])
    print(f"median CPU-seconds: calibration {np.median([r['calibration'] for r in rows]):.2f}, "
          f"forecast {np.median([r['forecast'] for r in rows]):.2f}; "
          f"median solves {np.median([r['solves'] for r in rows]):.0f}; inflation of the noise "
          f"(5 %, median, 95 %) {' '.join(f'{q:.1f}' for q in inflated)}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patients", type=int, nargs="?", default=200)
    parser.add_argument("--setting", choices=[*SETTINGS, "all"], default="all")
    parser.add_argument("--first", type=int, default=3000)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    for name, (truth, make, title) in SETTINGS.items():
        if arguments.setting in (name, "all"):
            rows = [one(arguments.first + i, truth, make) for i in range(arguments.patients)]
            table(rows, title)
            if arguments.save:
                arguments.save.with_suffix(f".{name}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
