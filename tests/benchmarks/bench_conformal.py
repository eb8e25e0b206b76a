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

Run: python tests/benchmarks/bench_conformal.py [--patients 500] [--only-collect | --as-is]
"""

import argparse
import time
from pathlib import Path

import numpy as np
from scipy.stats import rankdata, spearmanr

import biomodel as bm
from biomodel.conformal import (
    Adjustment,
    GroupScores,
    Identity,
    as_measured,
    fewest,
    learn_adjustment,
    map_coverage,
    quantile_crps,
    score_ends,
)
from biomodel.diagnostics import PredictiveCheck, coverage, pit, posterior_predictive_check
from biomodel.diagnostics_forecasts import CURVE
from biomodel.errors import TumorcastError
from biomodel.figure_diagnostics import coverage_curves
from biomodel.files import atomic_write
from biomodel.observation import observe
from biomodel.out_of_distribution import Reference, learn_reference
from biomodel.triage import (
    NOT_USABLE,
    REVIEW,
    USABLE,
    Triage,
    agrees,
    could_have_made,
    like_the_cohort,
    says_something,
)
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


def read(patients: int) -> list[dict]:
    """What is in the folder, as rows; patients without a forecast are counted and left out."""
    settings, rows, failed = small_patient(0).patient.cellularity, [], []
    for name in SETTINGS:
        for i in range(patients):
            path = FOLDER / f"{name}-{SEEDS[name] + i}.npz"
            if not path.exists():
                continue
            with np.load(path) as content:
                row = dict(content)
            if "failed" in row:
                failed.append(f"{path.stem}: {row['failed']}")
                continue
            draws = as_measured(row["voxel_draws"], settings, SEEDS[name] + i)
            row |= {"setting": name, "test": bool(i % 2), "distance": np.nan, "truth": row["voxel_true"],
                    "volume": (row["volume_draws"][:, 1].astype(float), row["volumes"][2]),
                    "cell_fraction": (draws, row["voxel_seen"])}  # fmt: skip
            rows.append(row)
    for line in failed:
        print("no forecast:", line)
    return rows


#: Unit, scale and least spread: chosen by leave-one-out CRPS on the calibration cohort alone.
QUANTITIES = {"volume": ("cm^3", Identity(), 1.0), "cell_fraction": ("1", Identity(), 0.05)}
LEVELS = (0.5, 0.8, 0.9, 0.95)


def learn(rows: list[dict], quantity: str, groups: str | None) -> Adjustment:
    """Adjustment of some patients, by the column `groups`."""
    units, scale, least = QUANTITIES[quantity]
    return learn_adjustment(
        [r[quantity][0] for r in rows], [r[quantity][1] for r in rows], quantity=quantity, units=units,
        cohort="bench_conformal", virtual=True, scale=scale, least_spread=least,
        groups=None if groups is None else [r[groups] for r in rows],
    )  # fmt: skip


def fair(draws: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Fair CRPS (n,) of independent draws (S, n)."""
    x, size = np.sort(draws, axis=0), len(draws)
    spread = 2 * ((2 * np.arange(1, size + 1) - size - 1)[:, None] * x).sum(0) / (size * (size - 1))
    return np.abs(x - seen).mean(0) - spread / 2


def judge(rows: list[dict], quantity: str, adjustment: Adjustment | None, groups: str | None) -> dict[str, np.ndarray]:
    """Share of a patient's values held at each level (patients, levels), mean width and CRPS (patients,)."""
    held, width, score, none = [], [], [], []
    for r in rows:
        draws, seen = (np.asarray(v, float) for v in r[quantity])
        draws, seen = draws.reshape(len(draws), -1), np.atleast_1d(seen)
        group = None if groups is None else r[groups]
        ends = []
        for level in LEVELS:
            if adjustment is None:
                ends.append(np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0))
            else:
                enough = adjustment.group(group).patients >= fewest(level)
                ends.append(adjustment.interval(draws, level, group) if enough else np.full((2, *seen.shape), np.nan))
                none.append(not enough)
        low, high = np.array([e[0] for e in ends]), np.array([e[1] for e in ends])
        ok = np.where(np.isnan(low), np.nan, (low <= seen) & (seen <= high))
        held.append(ok.mean(1))
        width.append((high - low)[2].mean())
        made = fair(draws, seen) if adjustment is None else quantile_crps(adjustment.draws(draws, group), seen)
        score.append(made.mean())
    return {"held": np.array(held), "width": np.array(width), "crps": np.array(score)}


def line(label: str, n: int, found: dict[str, np.ndarray], before: dict[str, np.ndarray] | None = None) -> None:
    cover = "".join(f"{c:8.1%}" for c in found["held"].mean(0))
    text = f"{label:58s}{n:5d}{cover}{found['width'].mean():10.3g}{found['crps'].mean():10.4f}"
    if before is not None:
        change = found["crps"] - before["crps"]
        reach = 1.96 * change.std(ddof=1) / np.sqrt(len(change))
        text += f"  {change.mean():+.4f} ({change.mean() - reach:+.4f} to {change.mean() + reach:+.4f})"
    print(text)


def adjusted(rows: list[dict]) -> None:
    """Coverage and CRPS of the test set before and after adjustment."""
    fit, test = [r for r in rows if not r["test"]], [r for r in rows if r["test"]]
    head = "".join(f"{level:8.0%}" for level in LEVELS)
    for quantity in QUANTITIES:
        print(f"\n{quantity.replace('_', ' ')}, third visit; virtual; calibration cohort {len(fit)}, test {len(test)}")
        print(f"{'':58s}{'n':>5s}{head}{'90% width':>10s}{'CRPS':>10s}  change of CRPS (95 %)")
        split, mondrian = learn(fit, quantity, None), learn(fit, quantity, "setting")
        for name in (*SETTINGS, "both"):
            some = [r for r in test if name in (r["setting"], "both")]
            before = judge(some, quantity, None, None)
            line(f"{name}: as forecast", len(some), before)
            own = judge(some, quantity, mondrian, "setting")
            line(f"{name}: adjusted by setting (Mondrian)", len(some), own, before)
            line(f"{name}: adjusted on both together (split)", len(some), judge(some, quantity, split, None), before)
    for quantity, (_, scale, least) in QUANTITIES.items():
        # How far a set of this size may fall from the level by chance, and that it falls to both sides.
        for name in SETTINGS:
            some = [r for r in rows if r["setting"] == name]
            found = [score_ends(r[quantity][0].reshape(DRAWS, -1), np.atleast_1d(r[quantity][1]), scale, least)
                     for r in some]  # fmt: skip
            shares, rng = [], np.random.default_rng(5)
            for _ in range(100):
                order = rng.permutation(len(found))
                half = len(found) // 2
                group = GroupScores.of([found[k] for k in order[:half]], [found[k][1] for k in order[:half]])
                ends = [group.interval(level) if half >= fewest(level) else (-np.inf, np.inf) for level in LEVELS]
                shares.append([[np.mean((a <= found[k][1]) & (found[k][0] <= b)) for a, b in ends]
                               for k in order[half:]])  # fmt: skip
            mean, sd = np.mean(shares, axis=(0, 1)), np.mean(shares, axis=1).std(0)
            told = ", ".join(f"{m:.1%} ± {s:.1%}" for m, s in zip(mean, sd, strict=True))
            print(f"{name}, {quantity}: 100 random halves, coverage of the other half, mean ± sd over halves: {told}")


def told(r: dict) -> dict[str, float]:
    """The features of :func:`biomodel.out_of_distribution.features`, from what was kept."""
    (v1, v2), floor = r["volumes"][:2], 0.008
    ratio = r["check_observed"][0].mean() / r["check_replicated"][0].mean()
    z = (r["z"] - r["prior_mean"]) / r["prior_sd"]
    return {"log first volume": np.log(v1 + floor),
            "log misfit": np.log(ratio), "log inflation": np.log(r["inflation"]),
            "log change of volume per day": np.log((v2 + floor) / (v1 + floor)) / (DAYS[1] - DAYS[0]),
            "mean cell fraction, first visit": r["mean_fractions"][0],
            "mean cell fraction, last visit": r["mean_fractions"][1],
            **{f"parameter {k + 1}, prior sds": z[k] for k in range(3)}}  # fmt: skip


def verdict(r: dict, reference: Reference) -> None:
    """Set distance and triage of a row."""
    distance = reference.distance(told(r))
    check = PredictiveCheck(tuple(r["statistics"].tolist()), ("1",) * len(r["statistics"]), r["check_observed"],
                            r["check_replicated"], tuple("volume" in n for n in r["statistics"]))  # fmt: skip
    found = (like_the_cohort(distance), could_have_made(check, True), agrees(float(r["inflation"])),
             says_something(r["volume_draws"][:, 1], float(r["volumes"][1])))  # fmt: skip
    r |= {"distance": distance.squared, "p": distance.p, "triage": Triage(found).verdict, "findings": found}


def area(bad: np.ndarray, score: np.ndarray) -> float:
    """Probability that a bad one scores higher than a good one."""
    return float((rankdata(score)[bad].sum() - bad.sum() * (bad.sum() + 1) / 2) / (bad.sum() * (~bad).sum()))


def triaged(rows: list[dict]) -> None:
    """Flags, and how forecasts of each class fared."""
    fit, test = [r for r in rows if not r["test"]], [r for r in rows if r["test"]]
    known = [r for r in fit if r["setting"] == "matched"]
    reference = learn_reference([told(r) for r in known], cohort="matched, calibration", virtual=True)
    for r in rows:
        verdict(r, reference)
    print(f"\nOut-of-distribution flag: reference {len(known)} matched patients; test set")
    for name in SETTINGS:
        p = np.array([r["p"] for r in test if r["setting"] == name])
        print(f"  {name} (n = {len(p)}): p < 0.05 in {np.mean(p < 0.05):.1%}, p < 0.01 in {np.mean(p < 0.01):.1%}")
    odd = np.array([r["setting"] == "mismatched" for r in test])
    print(f"  distance tells mismatched from matched: AUC {area(odd, np.array([r['distance'] for r in test])):.3f}")
    for k, question in enumerate(f.question for f in test[0]["findings"]):
        counts = {n: np.mean([[r["findings"][k].verdict == v for v in (REVIEW, NOT_USABLE)] for r in test
                              if r["setting"] == n], axis=0) for n in SETTINGS}  # fmt: skip
        print(f"  {question:58s} review, not usable: " + "; ".join(
            f"{n} {c[0]:.1%}, {c[1]:.1%}" for n, c in counts.items()))  # fmt: skip
    head = "".join(f"{level:8.0%}" for level in LEVELS)
    for quantity in QUANTITIES:
        print(f"\n{quantity.replace('_', ' ')} by triage, test set of both settings\n{'':58s}{'n':>5s}{head}"
              f"{'90% width':>10s}{'CRPS':>10s}")  # fmt: skip
        split = learn(fit, quantity, None)
        classes = [c for c in (USABLE, REVIEW, NOT_USABLE) if sum(r["triage"] == c for r in fit) >= fewest(0.5)]
        own = learn([r for r in fit if r["triage"] in classes], quantity, "triage")
        for c in classes:
            some = [r for r in test if r["triage"] == c]
            if len(some) < 2:
                continue
            before = judge(some, quantity, None, None)
            share = np.mean([r["setting"] == "matched" for r in some])
            line(f"{c} ({share:.0%} matched): as forecast", len(some), before)
            line(f"{c}: adjusted, all together", len(some), judge(some, quantity, split, None), before)
            line(f"{c}: adjusted by class (Mondrian)", len(some), judge(some, quantity, own, "triage"), before)
    for name in (*SETTINGS, "both"):
        some = [r for r in test if name in (r["setting"], "both")]
        found = judge(some, "volume", None, None)
        error = found["crps"] / np.array([r["volumes"][1] for r in some])
        missed = found["held"][:, 2] == 0
        apart = np.array([r["distance"] for r in some])
        print(f"{name}: distance against CRPS relative to the last volume, Spearman {spearmanr(apart, error)[0]:+.2f}; "
              f"AUC for volumes outside their 90 % interval {area(missed, apart):.2f} ({missed.sum()} of {len(some)})")


def figures(rows: list[dict]) -> None:
    """Coverage curves before and after, for volume and cell fraction."""
    fit, test = [r for r in rows if not r["test"]], [r for r in rows if r["test"]]
    for quantity in QUANTITIES:
        adjustment, curves = learn(fit, quantity, "setting"), {}
        for name in SETTINGS:
            some = [r for r in test if r["setting"] == name]
            for label in ("as forecast", "adjusted"):
                pits = []
                for i, r in enumerate(some):
                    draws, seen = r[quantity][0].reshape(DRAWS, -1), np.atleast_1d(r[quantity][1])
                    pits.append(pit(draws.T, seen, seed=i) if label == "as forecast" else
                                adjustment.pit(draws, seen, name, seed=i))  # fmt: skip
                curves[f"{name}, {label}"] = map_coverage(pits, CURVE) if quantity == "cell_fraction" else coverage(
                    np.concatenate(pits), CURVE)  # fmt: skip
        path = Path("build") / f"conformal-{quantity}.png"
        coverage_curves(curves).savefig(path, dpi=150)
        print(f"Coverage curves of the {quantity.replace('_', ' ')}: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, default=500, help="of each setting")
    parser.add_argument("--only-collect", action="store_true")
    parser.add_argument("--as-is", action="store_true", help="judge what is in the folder")
    arguments = parser.parse_args()
    if not arguments.as_is:
        collect(arguments.patients)
    if arguments.only_collect:
        return
    rows = read(arguments.patients)
    adjusted(rows)
    triaged(rows)
    figures(rows)
    print(f"CPU-seconds per patient (truth, calibration, forecast, check): {np.median([r['cpu'] for r in rows]):.2f}")


if __name__ == "__main__":
    main()
