"""Amortised inference of a cohort beside the classical fit: accuracy, calibration, time; production beside training.

Virtual patients of `tests/virtual_cohort.py`: two noisy maps of 32 x 32 voxels, irregular days, a course of a drug;
unknown are growth, diffusion, efficacy, and place, peak and width of the start. Truth comes from a grid twice finer and
another integrator; the mismatched setting adds uneven tissue, a ragged start, correlated heavy-tailed noise and
resistant cells. The operator is trained once, on samples that FEniCS and torch make while it trains, and never sees
the patients of the table.

- amortised: one pass of the operator; its forecast is the DeepONet's, averaged over 64 draws.
- polished: at most 5 Gauss-Newton steps from the amortised mean; forecast by `TorchSolver`.
- weighed: 768 draws around the polished optimum and from the operator's density, weighted by the exact posterior.
- full fit: the same Gauss-Newton from the priors' medians until it has converged; forecast by `TorchSolver`.
- carry forward: the second scan.

off: distance from the full fit in its posterior sd, the worst of the parameters; sd ratio: to the full fit's; within:
truths inside the central 90 % interval; p: chi-squared and ECDF of the ranks of all truths (simulation-based
calibration; the smaller of the two), uniform above 0.01.

Run: python tests/benchmarks/bench_amortised.py [--samples 4096] [--patients 300] [--checkpoint F] [--results F]
     python tests/benchmarks/bench_amortised.py --overlap [--repeat 3]
With --checkpoint a trained operator is kept, and a stopped training goes on; with --results patients are.
"""

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import biomodel as bm  # noqa: E402
from biomodel.diagnostics import independent_draws, rank_statistics  # noqa: E402
from pinn.amortised.makers import FenicsMaker, TorchMaker  # noqa: E402
from pinn.amortised.operator import CheckpointError, Operator  # noqa: E402
from pinn.amortised.polish import ScanProblem, full_fit, polish, weighed  # noqa: E402
from pinn.amortised.scans import Scans  # noqa: E402
from pinn.amortised.streaming import Lane, Stream  # noqa: E402
from pinn.amortised.training import Recipe, Trainer  # noqa: E402
from virtual_cohort import MATCHED, MISMATCHED, Patient, setting  # noqa: E402

#: Seeds: of training samples; of networks and steps.
SAMPLES_SEED, SEED = 1, 0
CHUNK = 32
SETTINGS = {"matched": MATCHED, "mismatched": MISMATCHED}
METHODS = ("amortised", "polished", "weighed", "full fit", "carry forward")
DRAWS, RANKED = 64, 63
#: Parameters that are reported one by one.
PHYSICAL = 3


def stream(cohort, samples, share, begin=0, separate=False):
    """Chunks by torch and FEniCS, in one process that alternates or in two."""
    makers = [TorchMaker(cohort), FenicsMaker(cohort)]
    lanes = [Lane([m]) for m in makers] if separate else [Lane(makers)]
    return Stream(lanes, samples, SAMPLES_SEED, CHUNK, (1 - share, share), begin=begin)


def trained(cohort, samples, share, recipe, checkpoint):
    """The operator, trained or read."""
    operator = Operator(cohort, seed=SEED)
    trainer, begin = Trainer(operator, recipe, -(-samples // CHUNK)), 0
    if checkpoint and checkpoint.exists():
        try:
            begin = trainer.resume(checkpoint)
        except CheckpointError as error:
            if "trained to the end" not in str(error):
                raise
            return operator
    with stream(cohort, samples, share, begin) as chunks:
        began = time.process_time()
        trainer.run(chunks, checkpoint, 16, lambda line: print(line, file=sys.stderr, flush=True))
        print(f"trained on {samples} samples ({sum(chunks.makes == 1) * CHUNK} by FEniCS), {trainer.history.steps} "
              f"steps, {time.process_time() - began:.0f} CPU-seconds of training", flush=True)  # fmt: skip
    print(*chunks.usage.lines(), sep="\n", flush=True)
    if checkpoint:
        operator.save(checkpoint)
    return operator


def ranks(truth, draws):
    """Ranks (p,) of the truth (p,) among draws (n, p)."""
    return (draws < truth).sum(0).tolist()


def measured(operator, name, index, forecast):
    """One patient by all methods; the operator's own forecast if asked for."""
    cohort = operator.setting
    patient = Patient(cohort, index, SETTINGS[name])
    case, truth, later = patient.case, patient.states[2], patient.case.days[1]
    names, rng = cohort.names, np.random.default_rng([index, 5])

    def error(u):
        return float(np.linalg.norm(u - truth) / np.linalg.norm(truth))

    row = {"setting": name, "patient": index, "carry forward": {"forecast": error(patient.scans[1])}}
    scans = Scans.of(cohort, [case], patient.scans[None])
    began = time.process_time()
    posterior = operator.posterior(scans)
    passed = time.process_time() - began
    maps = operator.forecast(scans, DRAWS, seed=index) if forecast else None
    seconds = time.process_time() - began
    problem = ScanProblem(cohort, case, patient.scans)
    mean = posterior.mean[0]
    for method, run in (("full fit", partial(full_fit, problem)), ("polished", partial(polish, problem, mean))):
        began = time.process_time()
        fit = run()
        u = problem.forecast(fit.z, later)
        row[method] = {"seconds": time.process_time() - began, "converged": fit.converged, "forecast": error(u),
                       "steps": fit.iterations, "z": fit.z.tolist(), "sd": fit.sd.tolist()}  # fmt: skip
        drawn = fit.z + rng.standard_normal((RANKED, len(names))) @ np.linalg.cholesky(fit.covariance).T
        row[method]["ranks"] = ranks(case.z, drawn)
    row["polished"]["seconds"] += passed
    began = time.process_time()
    weighted = weighed(problem, fit, posterior.patient(0), seed=index)
    z, sd = weighted.weights @ weighted.z, np.sqrt(np.diag(weighted.covariance))
    row["weighed"] = {
        "seconds": time.process_time() - began + row["polished"]["seconds"], "ess": weighted.ess, "z": z.tolist(),
        "sd": sd.tolist(), "ranks": ranks(case.z, independent_draws(weighted, RANKED, rng)),
        "forecast": error(problem.forecast(z, later)),
    }  # fmt: skip
    row["amortised"] = {
        "z": posterior.mean[0].tolist(), "sd": posterior.sd[0].tolist(), "pass": passed,
        "ranks": ranks(case.z, posterior.draw(RANKED, seed=index + 1)[0]),
        "resolved": error(problem.forecast(posterior.mean[0], later)),
    }  # fmt: skip
    if maps is not None:
        row["amortised"] |= {"seconds": seconds, "forecast": error(maps.mean[0])}
    row["truth"] = case.z.tolist()
    return row


def table(rows, names):
    """One line per setting and method, then calibration by parameter."""
    print(f"\n{'truth':12s}{'method':15s}{'n':>5s}{'off, median':>12s}{'95 %':>8s}{'<= 0.3':>8s}{'sd ratio':>9s}"
          f"{'within 90 %: ' + ', '.join(n.split('.')[-1] for n in names[:PHYSICAL]):>38s}{'least p':>9s}"
          f"{'forecast':>10s}{'CPU s':>8s}")  # fmt: skip
    for setting_name in SETTINGS:
        here = [r for r in rows if r["setting"] == setting_name]
        if not here:
            continue
        z, sd, truth = (np.array(v) for v in ([r["full fit"]["z"] for r in here],
                                              [r["full fit"]["sd"] for r in here], [r["truth"] for r in here]))
        for method in METHODS:
            own = [r[method] for r in here]
            forecast = f"{np.median([r['forecast'] for r in own if 'forecast' in r]):10.1%}"
            if method == "carry forward":
                print(f"{setting_name:12s}{method:15s}{len(here):5d}{'-':>12s}{'-':>8s}{'-':>8s}{'-':>9s}{'-':>38s}"
                      f"{'-':>9s}{forecast}{'-':>8s}")  # fmt: skip
                continue
            off = np.abs((np.array([r["z"] for r in own]) - z) / sd)[:, :PHYSICAL].max(1)
            ratio = np.median(np.array([r["sd"] for r in own])[:, :PHYSICAL] / sd[:, :PHYSICAL])
            rank = np.array([r["ranks"] for r in own])
            # 57.6 of 64 ranks are the central 90 %: those from 3 to 60 are 58, 90.6 %.
            inside = ((rank >= 3) & (rank <= 60)).mean(0)[:PHYSICAL]
            found = statistics(names, rank)
            least = min(min(r["chi_squared_p"], r["ecdf_p"]) for r in found)
            print(f"{setting_name:12s}{method:15s}{len(here):5d}{np.median(off):12.3f}{np.quantile(off, 0.95):8.3f}"
                  f"{(off <= 0.3).mean():8.1%}{ratio:9.2f}{', '.join(f'{v:.1%}' for v in inside):>38s}{least:9.2g}"
                  f"{forecast}{np.median([r['seconds'] for r in own if 'seconds' in r]):8.3f}")  # fmt: skip
    for setting_name in SETTINGS:
        here = [r for r in rows if r["setting"] == setting_name]
        if not here:
            continue
        print(f"\nranks of {len(here)} truths, {setting_name}: p of chi-squared / of the ECDF (below 0.05: outside its "
              "band of 95 %)")  # fmt: skip
        print(f"{'':22s}" + "".join(f"{m:>20s}" for m in METHODS[:4]))
        found = {m: statistics(names, np.array([r[m]["ranks"] for r in here])) for m in METHODS[:4]}
        for k, name in enumerate(names):
            each = [f"{found[m][k]['chi_squared_p']:.2g} / {found[m][k]['ecdf_p']:.2g}" for m in METHODS[:4]]
            print(f"{name:22s}" + "".join(f"{e:>20s}" for e in each))
        full = [r["full fit"] for r in here]
        print(f"full fits converged: {sum(r['converged'] for r in full)} of {len(here)}, "
              f"{np.mean([r['steps'] for r in full]):.1f} steps; polished: "
              f"{sum(r['polished']['converged'] for r in here)}, "
              f"{np.mean([r['polished']['steps'] for r in here]):.1f} steps; amortised mean, re-solved: forecast "
              f"{np.median([r['amortised']['resolved'] for r in here]):.1%}; effective draws of the weighed: median "
              f"{np.median([r['weighed']['ess'] for r in here]):.0f}", flush=True)  # fmt: skip


def statistics(names, rank):
    """Rows of `rank_statistics` from ranks (n, p): as of equidistant draws."""
    draws = np.where(np.arange(RANKED)[None, :, None] < rank[:, None], -1.0, 1.0)
    return rank_statistics(names, np.zeros(rank.shape), draws).table()


def overlap(cohort, samples, share, recipe, repeat, separate):
    """Production alone, training alone, both at once, the same samples; clock and CPU."""
    print(f"{samples} samples, {share:.0%} by FEniCS, {recipe.steps} steps per chunk of {CHUNK}; processes started and "
          f"solvers compiled before; {os.cpu_count()} cores")  # fmt: skip
    print(f"{'':4s}{'production':>22s}{'training':>20s}{'together':>20s}{'over the longer':>17s}{'load':>7s}")
    print(f"{'':4s}{'clock s':>11s}{'CPU s':>11s}{'clock s':>10s}{'CPU s':>10s}{'clock s':>10s}{'CPU s':>10s}")
    best = None
    for n in range(repeat):
        with stream(cohort, samples, share, separate=separate) as alone:
            began = time.monotonic()
            chunks = list(alone)
            produced = time.monotonic() - began, sum(lane.cpu for lane in alone.usage.lanes)
        trainer = Trainer(Operator(cohort, seed=SEED), recipe, len(chunks))
        began, cpu = time.monotonic(), time.process_time()
        trainer.run(chunks)
        learned = time.monotonic() - began, time.process_time() - cpu
        losses = trainer.history.density
        trainer = Trainer(Operator(cohort, seed=SEED), recipe, len(chunks))
        with stream(cohort, samples, share, separate=separate) as live:
            began, cpu = time.monotonic(), time.process_time()
            trainer.run(live)
            both = time.monotonic() - began, time.process_time() - cpu + sum(lane.cpu for lane in live.usage.lanes)
        ratio = both[0] / max(produced[0], learned[0])
        same = "" if trainer.history.density == losses else "  (losses differ!)"
        times = "".join(f"{v:{w}.2f}" for pair, w in ((produced, 11), (learned, 10), (both, 10)) for v in pair)
        print(f"{n + 1:<4d}{times}{ratio:17.2f}{os.getloadavg()[0]:7.1f}{same}", flush=True)
        if best is None or ratio < best[0]:
            best = ratio, live.usage
    print(f"least {best[0]:.2f}; then:", *best[1].lines(), sep="\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--fenics", type=float, default=0.0625, help="share of the samples that FEniCS makes")
    parser.add_argument("--steps", type=int, default=24, help=f"gradient steps per chunk of {CHUNK} samples")
    parser.add_argument("--physics", type=float, default=Recipe().physics, help="weight of the equation's residual")
    parser.add_argument("--patients", type=int, default=300, help="of the matched setting")
    parser.add_argument("--mismatched", type=int, default=60)
    parser.add_argument("--forecasts", type=int, default=50, help="patients of whom the operator makes the forecast")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--overlap", action="store_true", help="only production beside training")
    parser.add_argument("--separate", action="store_true", help="torch and FEniCS in processes of their own")
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    cohort = setting()
    recipe = Recipe(steps=given.steps, physics=given.physics, seed=SEED)
    if given.overlap:
        overlap(cohort, given.samples, given.fenics, recipe, given.repeat, given.separate)
        return
    operator = trained(cohort, given.samples, given.fenics, recipe, given.checkpoint)
    rows = []
    if given.results and given.results.exists():
        rows = [json.loads(line) for line in given.results.read_text().splitlines()]
    done = {(r["setting"], r["patient"]) for r in rows}
    bm.TorchSolver().build(cohort.model, cohort.domain, bm.Schedule())
    for name in SETTINGS:
        if not done:
            measured(operator, name, 10**6, True)  # imports and compiled kernels belong to no method
        for index in range(given.patients if name == "matched" else given.mismatched):
            if (name, index) in done:
                continue
            rows.append(measured(operator, name, index, index < given.forecasts))
            if given.results:
                with given.results.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    table(rows, cohort.names)


if __name__ == "__main__":
    main()
