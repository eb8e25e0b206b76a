"""A growth law discovered from images: a biologically-informed network beside Gauss-Newton. All is virtual.

Truth is Gompertz's law (`tests/gompertz.py`), which is in neither fitted family. Four images of 32 x 32 voxels, of
which the first is the known start, with 1 % or 5 % noise; the diffusivity is unknown, too.

- network: `pinn.discover`, state and law trained together.
- Gauss-Newton: the values of `TableGrowth` by `TorchSolver`, from the exact start.

Law: largest error over the visited range, from a voxel's noise to the largest cell fraction, relative to the law's
largest value, and relative to the law itself where u > 0.05. Inside: part of the visited range in which the truth is
in the 90 % band. Solvers: largest relative L2 difference of `TorchSolver` and `FenicsSolver` at the images' days and
at day 60, with the table that the network became. Forecast: relative L2 error of the torch solution at day 60.
Formula: the best by Akaike's criterion, with and without Gompertz's in the library.

Run: python tests/benchmarks/bench_discover.py [--seeds 5] [--noise 0.01 0.05] [--results FILE]
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import biomodel as bm  # noqa: E402
import pinn  # noqa: E402
from biomodel.errors import SolverError  # noqa: E402
from gompertz import DAYS, LATER, SPREAD, D, Differences, Tumour, law, misses  # noqa: E402
from pinn.discovery.found import LIBRARY  # noqa: E402
from pinn.discovery.laws import at, spread_over  # noqa: E402

#: Seeds 0 and 1 were used while settings were chosen.
FIRST_SEED = 2


def fenics():
    """The solver, or None where dolfinx is not installed."""
    try:
        return bm.FenicsSolver()
    except SolverError:
        return None


def by_network(tumour, images, sds):
    model = bm.ReactionDiffusion(pinn.NetworkGrowth(), bm.Isotropic(SPREAD))
    began = time.process_time()
    found = pinn.discover(model, tumour.domain, DAYS, images, sds)
    seconds = time.process_time() - began
    u = spread_over(*found.visited, 100)
    low, high = found.band(u)
    table = found.tabulated()
    values = {n: p.typical for n, p in table.parameters.items()}
    formulas = found.formulas(), found.formulas([t for t in LIBRARY if not isinstance(t, bm.Gompertz)])
    sd = float(np.sqrt(found.covariance[-1, -1]))
    row = {"D": found.values["diffusion.D"], "D_off": (np.log(found.values["diffusion.D"] / D)) / sd,
           "law": misses(found.growth, *found.visited)[0], "law_own": misses(found.growth, 0.05, found.visited[1])[1],
           "inside": float(((low <= law(u)) & (law(u) <= high)).mean()), "seconds": seconds,
           "formula": type(formulas[0][0].term).__name__, "without": type(formulas[1][0].term).__name__,
           "without_law": misses(lambda u: at(formulas[1][0].term, formulas[1][0].values, u), *found.visited)[0],
           "equation": found.equation, "images": found.images, "visited": found.visited}  # fmt: skip
    days = [*DAYS[1:], LATER]
    u1 = bm.TorchSolver().build(table, tumour.domain, bm.Schedule())(values, tumour.u0, days)[0].numpy()
    row["forecast"] = float(np.linalg.norm(u1[-1] - tumour.truth[-1]) / np.linalg.norm(tumour.truth[-1]))
    solver = fenics()
    if solver is not None:
        u2 = solver.build(table, tumour.domain, bm.Schedule())(values, tumour.u0, days)[0].detach().numpy()
        row["solvers"] = max(float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in zip(u1, u2, strict=True))
    return row


def by_gauss_newton(tumour, images, sds, visited):
    model = bm.ReactionDiffusion(pinn.TableGrowth(), bm.Isotropic(SPREAD))
    began = time.process_time()
    simulation = bm.TorchSolver(rtol=5e-3).build(model, tumour.domain, bm.Schedule())
    found = pinn.infer(pinn.StateProblem(model, Differences(simulation), tumour.u0, DAYS[1:], images[1:], sds[-1]))
    seconds = time.process_time() - began
    own = model.of(model.growth, found.values)

    def growth(u):
        return at(model.growth, own, u)

    u = spread_over(*visited, 100)
    step, along = 1e-5, np.zeros((len(u), len(found.z)))
    for i, name in enumerate(own):
        along[:, i] = np.log(at(model.growth, {**own, name: own[name] * np.exp(step)}, u) / growth(u)) / step
    wide = 1.645 * np.sqrt(np.einsum("np,pq,nq->n", along, found.covariance, along))
    inside = np.abs(np.log(law(u) / growth(u))) <= wide
    u1 = simulation(found.values, tumour.u0, [LATER])[0, 0].detach().numpy()
    return {"D": found.values["diffusion.D"], "D_off": np.log(found.values["diffusion.D"] / D) / found.sd[-1],
            "law": misses(growth, *visited)[0], "law_own": misses(growth, 0.05, visited[1])[1],
            "inside": float(inside.mean()), "seconds": seconds,
            "forecast": float(np.linalg.norm(u1 - tumour.truth[-1]) / np.linalg.norm(tumour.truth[-1]))}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.01, 0.05])
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    tumour, rows = Tumour(), []
    if given.results and given.results.exists():
        rows = [json.loads(line) for line in given.results.read_text().splitlines()]
    for noise in given.noise:
        for seed in range(FIRST_SEED, FIRST_SEED + given.seeds):
            if any((r["noise"], r["seed"]) == (noise, seed) for r in rows):
                continue
            images, sds = tumour.images(noise, seed)
            network = by_network(tumour, images, sds)
            both = {"network": network, "Gauss-Newton": by_gauss_newton(tumour, images, sds, network["visited"])}
            for method, row in both.items():
                rows.append({"noise": noise, "seed": seed, "method": method, **row})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                if given.results:
                    with given.results.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    table(rows, given.noise)


def table(rows, noises):
    """Medians, and the worst in brackets."""
    print(f"{'noise':>6} {'method':13}{'seeds':>6}{'law, of max':>18}{'law, own':>18}{'inside':>8}{'D off, sd':>11}"
          f"{'forecast':>10}{'solvers':>9}{'CPU s':>7}  formula, without Gompertz (its law)")  # fmt: skip
    for noise in noises:
        for method in ("network", "Gauss-Newton"):
            here = [r for r in rows if (r["noise"], r["method"]) == (noise, method)]
            if not here:
                continue

            def both(name, here=here):
                found = [100 * r[name] for r in here]
                return f"{np.median(found):.1f} % ({max(found):.1f} %)"

            solvers = [100 * r["solvers"] for r in here if "solvers" in r]
            said = [f"{r['formula']}, {r['without']} ({r['without_law']:.1%})" for r in here if "formula" in r]
            print(f"{noise:6.0%} {method:13}{len(here):6d}{both('law'):>18}{both('law_own'):>18}"
                  f"{np.mean([r['inside'] for r in here]):8.0%}{np.abs([r['D_off'] for r in here]).max():11.1f}"
                  f"{np.median([100 * r['forecast'] for r in here]):9.1f}%"
                  f"{f'{max(solvers):.2f} %' if solvers else '-':>9}{np.median([r['seconds'] for r in here]):7.1f}  "
                  + "; ".join(said))  # fmt: skip


if __name__ == "__main__":
    main()
