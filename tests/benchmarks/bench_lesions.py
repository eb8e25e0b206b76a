"""Growth and response laws on real lesion time courses, each compared by evidence and by what it predicts.

641 lesions of five trials with at least 6 measurements; the last three of each are held out. Every law runs as the
package's own model of a tumour without images, with priors learned from the measurements that are not held out (all
lesions: no held-out value is used). Data: Laleh et al. 2022, PLoS Comput Biol 18:e1009822,
doi:10.1371/journal.pcbi.1009822, read from the folder named by TUMORCAST_DATA.

Run: TUMORCAST_DATA=... python tests/benchmarks/bench_lesions.py
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import biomodel as bm
from biomodel.calibration.importance import weighted_crps, weighted_quantile
from biomodel.calibration.population import learn_priors
from biomodel.parameters import JointPrior, Parameter, Prior
from biomodel.schedule import Ongoing
from biomodel.terms import NoGrowth

FLOOR = 0.05  # cm³
HELD_OUT = 3
#: Median first volume (cm³) and scale of the errors at which the learning starts.
VOLUME, CV = 10.9, 0.25


@dataclass(frozen=True)
class NetGrowth(bm.Exponential):
    """Exponential growth or decline at a net rate of either sign."""

    k: Prior = bm.Normal(0.0, 0.007)

    @property
    def parameters(self):
        return (Parameter("k", "1/day", self.k, (-1.0, 1.0), "", "net rate"),)


def load(folder: Path) -> list[bm.Patient]:
    """Lesions with at least six records, as patients; repeated days are averaged in log(V + floor)."""
    table = pd.read_csv(folder / "lesion_growth" / "flat_patient_data.csv")
    table = table[table.groupby("Pt_hashID").Lesion_vol.transform("size") >= 6].drop_duplicates()
    table["log"] = np.log(table.Lesion_vol / 1000 + FLOOR)
    table = table.groupby(["Pt_hashID", "T_days"], as_index=False).log.mean()
    plan = bm.Schedule(ongoing=(Ongoing(-1.0, "therapy", "planned"),))
    lesions = []
    for name, one in table.groupby("Pt_hashID"):
        days = (one.T_days - one.T_days.iloc[0]).to_numpy(float)
        volumes = np.maximum(np.exp(one.log.to_numpy()) - FLOOR, 0.0)
        volumes[volumes < 1e-9] = 0.0
        lesions.append(bm.Patient.from_volumes(str(name), days, volumes, plan, cv=CV, floor=FLOOR))
    return lesions


def laws() -> dict[str, tuple[bm.ReactionDiffusion, JointPrior]]:
    """Models with the starting point of the learning: wide, and equally wide for all."""

    def bare(growth):
        # Net laws: growth and therapy are one; the therapy's own hazard is out.
        none = bm.Systemic("therapy", efficacy=bm.Fixed(1e-7), resistant=None)
        return bm.ReactionDiffusion(growth, bm.NoDiffusion(), [none])

    first = (np.log(VOLUME), 2.0)
    # Logistic and Gompertz approach a volume at some ratio to the first one, above or below it.
    ratio = 1.5
    limited = JointPrior(("growth.k", "initial.volume", "initial.capacity"), [np.log(0.012), first[0], first[0]],
                         [[1.0, 0, 0], [0, first[1] ** 2, first[1] ** 2], [0, first[1] ** 2, first[1] ** 2 + ratio**2]])
    alone = JointPrior(("initial.volume",), [first[0]], [[first[1] ** 2]])
    two = bm.ReactionDiffusion(
        bm.Exponential(bm.LogNormal(0.0016, 1.0)), bm.NoDiffusion(),
        [bm.Systemic("therapy", efficacy=bm.LogNormal(0.02, 1.0), resistant=bm.LogitNormal(0.38, 1.5))],
    )  # fmt: skip
    return {
        "constant": (bare(NoGrowth()), alone),
        "exponential": (bare(NetGrowth()), alone),
        "logistic": (bare(bm.Logistic()), limited),
        "Gompertz": (bare(bm.Gompertz()), limited),
        "two-population": (two, alone),
    }


def evaluate(model: bm.ReactionDiffusion, start: JointPrior, lesions: list[bm.Patient], iterations: int) -> dict:
    """Learn from the early visits, then evidence and held-out scores by lesion."""
    began = time.process_time()
    early = [x.until(len(x.visits) - HELD_OUT) for x in lesions]
    days = np.array([[v.day for v in x.visits[-HELD_OUT:]] for x in lesions])
    seen = np.log([[v.volume + FLOOR for v in x.visits[-HELD_OUT:]] for x in lesions])
    population = learn_priors(model, early, start=start, correlated=True, df=4.0, iterations=iterations, draws=64)
    posterior = population.posterior(early, days, draws=512)
    x = np.moveaxis(posterior.measurements(), 2, 1)
    w = np.broadcast_to(posterior.weights[:, None], x.shape)
    q = weighted_quantile(x, w, [0.05, 0.25, 0.5, 0.75, 0.95])
    return {
        "evidence": posterior.draws.log_evidence,
        "error": np.abs(seen - q[..., 2]).mean(1),
        "crps": weighted_crps(x, w, seen).mean(1),
        "nine": np.mean((seen >= q[..., 0] - 1e-9) & (seen <= q[..., 4] + 1e-9)),
        "five": np.mean((seen >= q[..., 1] - 1e-9) & (seen <= q[..., 3] + 1e-9)),
        "seconds": time.process_time() - began,
        "ess": float(np.median(posterior.draws.ess)),
        "population": population,
    }


def main(iterations: int = 50) -> None:
    folder = os.environ.get("TUMORCAST_DATA", "")
    if not folder:
        print("TUMORCAST_DATA is not set: this benchmark reads real lesions from the folder it names.")
        return
    lesions = load(Path(folder))
    began = time.process_time()
    found = {}
    for name, (model, start) in laws().items():
        found[name] = evaluate(model, start, lesions, iterations)
        print(f"  {name}: {found[name]['seconds']:.0f} CPU-seconds", file=sys.stderr, flush=True)
    n = len(lesions)
    evidence = np.stack([f["evidence"] for f in found.values()], 1)
    errors = np.stack([f["error"] for f in found.values()], 1)
    print(f"{n} lesions, last {HELD_OUT} measurements held out; errors of log(V + {FLOOR:g} cm³), one thread")
    print(f"{'law':18s}{'log evidence':>13s}{'best for':>10s}{'MAE':>8s}{'CRPS':>8s}{'90 %':>8s}{'50 %':>8s}"
          f"{'MAE - Gompertz':>18s}{'seconds':>9s}")  # fmt: skip
    gompertz = found["Gompertz"]["error"]
    for i, (name, f) in enumerate(found.items()):
        d = f["error"] - gompertz
        print(f"{name:18s}{f['evidence'].sum():13.0f}{np.sum(evidence.argmax(1) == i):10d}{f['error'].mean():8.3f}"
              f"{f['crps'].mean():8.3f}{f['nine']:8.3f}{f['five']:8.3f}"
              f"{d.mean():+11.3f} ± {d.std() / n**0.5:.3f}{f['seconds']:9.1f}")  # fmt: skip
    known = np.log([x.visits[-HELD_OUT - 1].volume + FLOOR for x in lesions])
    seen = np.log([[v.volume + FLOOR for v in x.visits[-HELD_OUT:]] for x in lesions])
    carried = np.abs(seen - known[:, None]).mean(1)
    d = carried - gompertz
    print(f"{'carry-forward':18s}{'':13s}{'':10s}{carried.mean():8.3f}{carried.mean():8.3f}{'':16s}"
          f"{d.mean():+11.3f} ± {d.std() / n**0.5:.3f}")  # fmt: skip
    chosen = errors[np.arange(n), evidence.argmax(1)]
    print(f"{'law of evidence':18s}{'':13s}{'':10s}{chosen.mean():8.3f}")
    zero = np.array([any(v.volume == 0 for v in x.visits) for x in lesions])
    parts = ", ".join(f"{k} {f['error'][~zero].mean():.3f}" for k, f in found.items())
    print(f"without the {zero.sum()} lesions that have a zero (complete response or not measurable): {parts}, "
          f"carry-forward {carried[~zero].mean():.3f}")  # fmt: skip
    print(f"all laws: {time.process_time() - began:.0f} CPU-seconds")
    print("Published (Laleh et al. 2022, 1472 patients of these trials, least squares by patient): Gompertz has the\n"
          "best balance between goodness of fit and number of parameters, and predicts well; no intervals are given.")
    best = list(found)[int(np.bincount(evidence.argmax(1), minlength=len(found)).argmax())]
    total = list(found)[int(evidence.sum(0).argmax())]
    worse = [k for k, f in found.items() if f["error"].mean() > carried.mean()]
    print(f"Here: best for most lesions by evidence: {best}; highest total evidence: {total}. "
          f"Laws whose median predicts worse than carrying the last volume forward: {', '.join(worse) or 'none'}.")
    print("The 90 % intervals of every law cover too little: lesions leave these smooth laws by more than the errors\n"
          "that their earlier visits teach.")


if __name__ == "__main__":
    main()
