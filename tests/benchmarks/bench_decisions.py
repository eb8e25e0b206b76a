"""Decisions on virtual patients: do stated probabilities that one regimen leaves fewer cells than another come true?

Small virtual patients (24³ voxels of 2 mm), matched and mismatched. Each has had three weekly doses of paclitaxel (T)
by the second visit (day 19); some pairs of regimens part there. In others a cycle of AC follows, and they part after
the third visit (day 41). The fitted model has the matched generator's own priors; it is calibrated on the visits so far
and says with which probability regimen A leaves fewer cells than B on day 89. The truth: the same virtual patient
solved again under each regimen (finer grid, other integrator). Cells decide, all of them: visible volumes are often 0
under both.

The pairs were fixed before anything was fitted: drug order, dose-dense against standard, and reduced doses of some
drugs against leaving others out, where doses were chosen so that both kill about alike at the priors' medians.

With --optimise N, for N patients: days and amounts moved by gradients within the limits of the standard (T then AC),
from it and from AC then T, with the probability, on fresh draws, that this leaves fewer cells than the standard, and
the truth.

In the mismatched setting a second model is fitted too, which knows that some cells may be resistant.

All numbers are virtual. The calibration plot is written to build/decisions.png.

Run: python tests/benchmarks/bench_decisions.py [patients] [--setting matched|mismatched|resistant] [--optimise N]
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import beta

import biomodel as bm
from biomodel.decisions import decide
from biomodel.dosing import Expected, Quantile, optimise
from biomodel.limits import Limits
from biomodel.treatments import Combination
from biomodel.virtual import Matched, Mismatched, small_patient

DRAWS, FIRST_SEED, END = 100, 7100, 89.0
AGENTS = ("paclitaxel", "carboplatin", "doxorubicin", "cyclophosphamide")
#: Days of the visits; the regimens part after the second or the third.
VISITS = (0.0, 19.0, 41.0, END)
BINS = np.linspace(0, 1, 6)


def paclitaxel(start: float, n: int, share: float = 1.0) -> bm.Schedule:
    return bm.Schedule.weekly("paclitaxel", start, n, 80.0 * share, "mg/m^2", status="planned")


def carboplatin(start: float, n: int, share: float = 1.0) -> bm.Schedule:
    return bm.Schedule.weekly("carboplatin", start, n, 2.0 * share, "AUC", status="planned")


def ac(start: float, n: int, share: float = 1.0, every: float = 14.0) -> bm.Schedule:
    return bm.Schedule.weekly(
        "doxorubicin", start, n, 60.0 * share, "mg/m^2", every=every, status="planned"
    ) + bm.Schedule.weekly("cyclophosphamide", start, n, 600.0 * share, "mg/m^2", every=every, status="planned")


#: What comes before the regimens part, the visit after which they do, and the regimens.
EARLY = paclitaxel(1.4, 3)
LATE = EARLY + ac(22.4, 1)
STANDARD = EARLY + paclitaxel(22.4, 9) + ac(85.4, 4)
SWAPPED = EARLY + ac(22.4, 4) + paclitaxel(78.4, 9)
PAIRS = {
    "T then AC | AC then T": (2, STANDARD, SWAPPED),
    "AC every 14 days | every 21": (2, EARLY + ac(22.4, 4), EARLY + ac(22.4, 4, every=21.0)),
    "T and carboplatin, half | T": (2, EARLY + paclitaxel(22.4, 9, 0.5) + carboplatin(22.4, 9, 0.5),
                                    EARLY + paclitaxel(22.4, 9)),
    "AC, 60 % | T": (2, EARLY + ac(22.4, 4, 0.6), EARLY + paclitaxel(22.4, 8)),
    "AC | T, both had before": (3, LATE + ac(43.4, 2, every=21.0), LATE + paclitaxel(43.4, 7)),
    "AC then T | T then AC, both had": (3, LATE + ac(43.4, 1) + paclitaxel(64.4, 3),
                                        LATE + paclitaxel(43.4, 3) + ac(64.4, 1)),
}  # fmt: skip


def model() -> bm.ReactionDiffusion:
    """Logistic growth, uniform diffusion and all four drugs, with the matched generator's own priors."""
    return bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy(a) for a in AGENTS]).with_priors(
        Matched().priors()
    )


def sparing() -> bm.ReactionDiffusion:
    """The same with a fraction of cells that no drug kills, at its default prior."""
    priors = Matched().priors()
    drugs = Combination(AGENTS, tuple(priors[f"{a}.efficacy"] for a in AGENTS))
    rest = {n: p for n, p in priors.items() if not n.endswith(".efficacy")}
    return bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [drugs]).with_priors(rest)


SETTINGS = {
    "matched": (Matched(), model, "matched truth"),
    "mismatched": (Mismatched(), model, "mismatched truth"),
    "resistant": (Mismatched(), sparing, "mismatched truth, model with a resistant fraction"),
}


def one(seed: int, truth: Matched, make) -> list[dict]:
    """All pairs of one virtual patient: stated probability, and what is true."""
    fits: dict[int, bm.Fit] = {}
    rows, cells = [], {}

    def true_cells(regimen: bm.Schedule) -> float:
        if regimen not in cells:
            virtual = small_patient(seed, truth, regimen=regimen, visit_days=VISITS)
            cells[regimen] = float(virtual.truth["cells"][-1])
        return cells[regimen]

    for name, (visit, first, second) in PAIRS.items():
        began = time.process_time()
        if visit not in fits:
            whole = small_patient(seed, truth, regimen=first, visit_days=VISITS).patient
            fits[visit] = bm.calibrate(make(), whole.until(visit))
        decision = decide(fits[visit], {"A": first, "B": second}, END, DRAWS, seed)
        pair = decision.pair("A", "B")
        a, b = true_cells(first), true_cells(second)
        rows.append({"seed": seed, "pair": name, "probability": pair.probability, "true": a < b,
                     "ratio": pair.ratio, "true_ratio": a / b, "visible_tie": decision.pair("A", "B", "volume").tie,
                     "cpu": time.process_time() - began})  # fmt: skip
    return rows


def right(p: np.ndarray, y: np.ndarray, least: float) -> tuple[int, int]:
    """How often one of the two was favoured with at least this probability, and how often that one was better."""
    sure = np.maximum(p, 1 - p) >= least
    return int(sure.sum()), int((sure & ((p > 0.5) == y)).sum())


def table(rows: list[dict], name: str) -> None:
    """Print the figures of one setting."""
    p, y = np.array([r["probability"] for r in rows]), np.array([r["true"] for r in rows])
    seeds, kinds = np.array([r["seed"] for r in rows]), np.array([r["pair"] for r in rows])
    patients = np.unique(seeds)
    print(f"\n{name}: {len(rows)} pairs of regimens, {len(patients)} virtual patients, cells on day {END:g}")
    print(f"{'pair, A | B':34s}{'A better':>10s}{'stated':>8s}{'spread 10-90 %':>17s}{'Brier':>8s}{'chose right':>13s}")
    for kind in PAIRS:
        k = kinds == kind
        low, high = np.quantile(p[k], [0.1, 0.9])
        print(f"{kind:34s}{y[k].mean():10.2f}{p[k].mean():8.2f}{f'{low:.2f} to {high:.2f}':>17s}"
              f"{np.mean((p[k] - y[k]) ** 2):8.3f}{np.mean((p[k] > 0.5) == y[k]):13.2f}")  # fmt: skip
    rng = np.random.default_rng(0)
    scores = np.array([np.mean((p[seeds == s] - y[seeds == s]) ** 2) for s in patients])
    resampled = scores[rng.integers(0, len(scores), (2000, len(scores)))].mean(1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    known = np.array([y[kinds == kind].mean() for kind in kinds])
    print(f"Brier score {np.mean((p - y) ** 2):.3f} (95 % over patients {low:.3f} to {high:.3f}); a coin 0.250; the "
          f"share of patients better off with A, by pair, in hindsight {np.mean((known - y) ** 2):.3f}")  # fmt: skip
    print("stated      " + "".join(f"{f'{a:.1f}-{b:.1f}':>10s}" for a, b in zip(BINS[:-1], BINS[1:], strict=True)))
    at = np.clip(np.digitize(p, BINS) - 1, 0, len(BINS) - 2)
    print("pairs       " + "".join(f"{int((at == k).sum()):10d}" for k in range(len(BINS) - 1)))
    for label, values in (("mean stated", p), ("truly better", y)):
        means = [values[at == k].mean() if (at == k).any() else np.nan for k in range(len(BINS) - 1)]
        print(f"{label:12s}" + "".join(f"{v:10.2f}" for v in means))
    for least in (0.5, 0.8, 0.9, 0.95):
        n, good = right(p, y, least)
        print(f"favoured with {least:.2f} or more: {n} pairs, truly better {good} ({good / max(n, 1):.0%})")
    print(f"median CPU-seconds per pair, truth and calibration included: {np.median([r['cpu'] for r in rows]):.1f}")


def plot(results: dict[str, list[dict]], path: Path) -> None:
    """Stated probabilities against the share that came true, with 90 % intervals of the shares."""
    figure = Figure(figsize=(3.4 * len(results), 3.6), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        p, y = np.array([r["probability"] for r in rows]), np.array([r["true"] for r in rows])
        at = np.clip(np.digitize(p, BINS) - 1, 0, len(BINS) - 2)
        axes.plot([0, 1], [0, 1], color="0.6", lw=0.8, ls="--")
        for k in np.unique(at):
            n, good = int((at == k).sum()), int(y[at == k].sum())
            low, high = beta.ppf([0.05, 0.95], [good, good + 1], [n - good + 1, n - good])
            low, high = np.nan_to_num(low, nan=0.0), np.nan_to_num(high, nan=1.0)
            axes.plot([p[at == k].mean()] * 2, [low, high], color="#003F66", lw=1.0)
            axes.plot(p[at == k].mean(), good / n, "o", color="#003F66", ms=5)
            axes.annotate(f"{n}", (p[at == k].mean(), good / n), xytext=(6, -9), textcoords="offset points", fontsize=7)
        axes.hist(p, np.linspace(0, 1, 21), weights=np.full(len(p), 0.6 / len(p)), color="0.85", zorder=0)
        axes.set(xlabel="stated probability that A leaves fewer cells", title=f"{name}\n{len(rows)} pairs",
                 xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))  # fmt: skip
        axes.set_ylabel("share of pairs where it does")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"\nCalibration plot (number of pairs beside each point, 90 % intervals): {path}")


def optimised(seed: int, truth: Matched, make, objective) -> dict:
    """Days and amounts moved within the limits of the standard, for one patient."""
    began = time.process_time()
    whole = small_patient(seed, truth, regimen=STANDARD, visit_days=VISITS)
    fit = bm.calibrate(make(), whole.patient.until(2))
    limits = Limits.of(STANDARD, 22.0, END - 1.0)
    found = optimise(fit, STANDARD, [END], limits, objective, [SWAPPED], seed=seed)
    pair = found.decide(DRAWS).pair("optimised", "standard")
    cpu = time.process_time() - began
    swapped = small_patient(seed, truth, regimen=SWAPPED, visit_days=VISITS)
    better = small_patient(seed, truth, regimen=found.schedule, visit_days=VISITS)
    ratio = float(better.truth["cells"][-1] / whole.truth["cells"][-1])
    other = float(swapped.truth["cells"][-1] / whole.truth["cells"][-1])
    return {"seed": seed, "probability": pair.probability, "ratio": pair.ratio, "true_ratio": ratio, "swapped": other,
            "gain": found.before - found.after, "beyond": limits.violations(found.schedule, 1e-12),
            "iterations": found.iterations, "cpu": cpu}  # fmt: skip


def optimised_table(rows: list[dict], name: str) -> None:
    p, ratio = np.array([r["probability"] for r in rows]), np.array([r["true_ratio"] for r in rows])
    sure = p >= 0.9
    stated = np.median([r["ratio"] for r in rows])
    print(f"\n{name}: {len(rows)} virtual patients, schedule moved within the limits of T then AC")
    print(f"stated probability that it leaves fewer cells: mean {p.mean():.2f} ({p.min():.2f} to {p.max():.2f}); truly "
          f"fewer in {np.mean(ratio < 1):.0%}; stated 0.9 or more: {sure.sum()}, truly fewer "
          f"{(ratio[sure] < 1).sum()}")  # fmt: skip
    print(f"cells against the standard on day {END:g}: stated median {stated:.2f}, true median {np.median(ratio):.2f} "
          f"({ratio.min():.2f} to {ratio.max():.2f}), of AC then T as it is "
          f"{np.median([r['swapped'] for r in rows]):.2f}; limits broken {sum(bool(r['beyond']) for r in rows)}; "
          f"median iterations {np.median([r['iterations'] for r in rows]):.0f}, CPU-seconds "
          f"{np.median([r['cpu'] for r in rows]):.1f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patients", type=int, nargs="?", default=20)
    parser.add_argument("--setting", choices=[*SETTINGS, "all"], default="all")
    parser.add_argument("--optimise", type=int, default=0)
    parser.add_argument("--first", type=int, default=FIRST_SEED)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    chosen = [v for n, v in SETTINGS.items() if arguments.setting in (n, "all")]
    results: dict[str, list[dict]] = {}
    seeds = range(arguments.first, arguments.first + arguments.patients)
    for truth, make, title in chosen:
        if arguments.patients:
            results[title] = [row for seed in seeds for row in one(seed, truth, make)]
            table(results[title], title)
    if results:
        plot(results, Path("build") / "decisions.png")
    for truth, make, title in chosen:
        for what, objective in (("mean over the posterior", Expected()), ("its 90 % quantile", Quantile(0.9))):
            seeds = range(arguments.first, arguments.first + arguments.optimise)
            rows = [optimised(seed, truth, make, objective) for seed in seeds]
            if rows:
                optimised_table(rows, f"{title}, {what}")
                results[f"{title}, {what}"] = rows
    if arguments.save:
        arguments.save.write_text(json.dumps(results, default=float))


if __name__ == "__main__":
    main()
