"""Two parameters of Fisher-KPP from noisy images of two visits: networks beside classical solvers. All is virtual.

D = 0.01 and rho = 4 on the unit box, zero flux, known start (`tests/fisher_kpp.py`); data at t = 0.3 and 0.6, forecast
at t = 1; the search starts at D = 0.03, rho = 1. Noise is a share of the largest value. The truth is a cosine spectral
method on a finer grid, and so are the maximum likelihood and the posterior sd in whose units errors are given. All see
the same data and, but for DeepXDE's recipe, the same weak priors; one thread, CPU-seconds of the inference alone.

- network: `PinnSolver` with Gauss-Newton on the parameters, the weights marginalised.
- Gauss-Newton, L-BFGS: on `TorchSolver` at the data's grid, by its sensitivities and by its adjoint gradient; "on half
  voxels" is Gauss-Newton on a grid of half the voxel size, whose averages are compared with the data.
- DeepXDE + LM: `pinn.dde`, a network of DeepXDE with the equation's residual, likelihood and priors, weights and
  parameters together by Levenberg-Marquardt, the equation's weight rising.
- SS-Broyden, NNCG: the same network and losses at one weight, by the self-scaled Broyden method
  (`pinn.dde.selfscaled`) and by DeepXDE's own second-order method, NysNewton-CG, after 2000 iterations of Adam.
- DeepXDE: its usual recipe for inverse problems (Adam, then L-BFGS; losses of equation, start, flux and data added
  up), with PyTorch, in its usual single precision.

State (at t = 0.6) and forecast are a network's own, of the first five seeds; re-solved is the forecast of `TorchSolver`
on the data's grid at the parameters found.

Run: python tests/benchmarks/bench_pinn.py [--seeds 20] [--dear 2] [--only 1d-1 1d-5 2d-5] [--methods ...]
                                           [--results FILE]
`--dear` is the number of seeds of methods that take minutes each. With --results each fit is kept in that file as it
ends, and a later run goes on from there.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("DDE_BACKEND", "pytorch")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy.optimize import least_squares, minimize  # noqa: E402

import biomodel as bm  # noqa: E402
from fisher_kpp import END, LENGTH, RHO, SPAN, VISITS, D, Problem  # noqa: E402
from pinn import PinnSolver, StateProblem, infer  # noqa: E402
from pinn.carried import coefficients  # noqa: E402

PROBLEMS = {"1d-1": (1, 0.01), "1d-5": (1, 0.05), "2d-5": (2, 0.05)}
NAMES = ("growth.k", "diffusion.D")
#: Seeds for which a network makes its own forecast, which it trains for anew.
OWN = 5
#: Iterations of Adam and most of L-BFGS.
ADAM, LBFGS = 15_000, 15_000
#: Weights of the equation of DeepXDE + LM, one after the other; that of the others; and their most iterations.
RISING, WEIGHT = (10.0, 100.0, 1000.0), 100.0
BROYDEN, NNCG = 600, 100


@functools.cache
def reference(key, seed):
    """Problem, data and their noise; maximum likelihood of (log k, log D) and its sd, by the spectral solver."""
    dimensions, noise = PROBLEMS[key]
    problem = Problem(dimensions)
    data, sd = problem.noisy(noise, seed)
    found = least_squares(
        lambda q: ((problem.predicted(*q) - data) / sd).ravel(),
        np.log([problem.values[n] for n in NAMES]), x_scale=0.01, diff_step=1e-4,
    )  # fmt: skip
    return problem, data, sd, found.x, np.sqrt(np.diag(np.linalg.inv(found.jac.T @ found.jac)))


def network(problem, data, sd, seed):
    simulation = PinnSolver(seed=seed).build(problem.model, problem.domain, bm.Schedule())
    found = infer(StateProblem(problem.model, simulation, problem.u0, problem.days[:2], data, sd))
    return found.z, found.sd, lambda: simulation(found.values, problem.u0, problem.days)[0].numpy()


def gauss_newton(problem, data, sd, seed):
    simulation = bm.TorchSolver(rtol=1e-4).build(problem.model, problem.domain, bm.Schedule())
    found = infer(StateProblem(problem.model, simulation, problem.u0, problem.days[:2], data, sd))
    return found.z, found.sd, None


class Halved:
    """`TorchSolver` on voxels half as large, whose averages are those of the data's grid."""

    def __init__(self, problem):
        self.axes = [i for i, n in enumerate(problem.shape) if n > 1]
        shape = tuple(2 * n if n > 1 else 1 for n in problem.shape)
        domain = bm.Domain.box(shape, (LENGTH / problem.n / 2,) * 3)
        self.simulation = bm.TorchSolver(rtol=1e-4).build(problem.model, domain, bm.Schedule())
        # The band-limited start between the voxels: its coefficients, sampled as averages of half voxels.
        c = coefficients(problem.u0.numpy().reshape((problem.n,) * problem.dimensions))
        k = np.arange(problem.n)
        centres = (np.arange(2 * problem.n) + 0.5) / (2 * problem.n)
        along = np.cos(np.pi * np.outer(k, centres)) * np.sinc(k / (4 * problem.n))[:, None]
        for _ in range(problem.dimensions):
            c = np.tensordot(c, along, axes=([0], [0]))
        self.u0 = torch.tensor(c.reshape(1, *shape))

    def _averaged(self, u):
        for axis in (i - 3 for i in self.axes):
            axis = u.ndim + axis
            u = u.unflatten(axis, (-1, 2)).mean(axis + 1)
        return u

    def plan(self, params, u0, times):
        return self.simulation.plan(params, self.u0, times)

    def __call__(self, params, u0, times, plan=None):
        return self._averaged(self.simulation(params, self.u0, times, plan=plan))

    def sensitivities(self, params, u0, times, wrt, plan=None, du0=None, rows=None):
        u, du = self.simulation.sensitivities(params, self.u0, times, wrt, plan=plan)
        inside = torch.as_tensor(rows)
        return self._averaged(u)[:, inside], self._averaged(du)[:, :, inside]


def gauss_newton_fine(problem, data, sd, seed):
    found = infer(StateProblem(problem.model, Halved(problem), problem.u0, problem.days[:2], data, sd))
    return found.z, found.sd, None


def lbfgs(problem, data, sd, seed):
    simulation = bm.TorchSolver(rtol=1e-4).build(problem.model, problem.domain, bm.Schedule())
    priors = [problem.model.parameters[n].prior for n in NAMES]
    mean, scale = (np.array([getattr(p, a) for p in priors]) for a in ("location", "scale"))
    measured, plan = torch.tensor(data), None

    def objective(z):
        nonlocal plan
        z = torch.tensor(z, requires_grad=True)
        params = {n: torch.exp(v) for n, v in zip(NAMES, z, strict=True)}
        plan = simulation.plan(params, problem.u0, problem.days[:2])
        u = simulation(params, problem.u0, problem.days[:2], plan=plan)[0]
        value = 0.5 * ((u - measured) / sd).square().sum()
        value = value + 0.5 * ((z - torch.tensor(mean)) / torch.tensor(scale)).square().sum()
        value.backward()
        return float(value.detach()), z.grad.numpy()

    found = minimize(objective, mean, jac=True, method="L-BFGS-B", bounds=[(m - 4, m + 4) for m in mean])
    return found.x, None, None


def deepxde(problem, data, sd, seed):
    import deepxde as dde

    if dde.backend.backend_name != "pytorch":
        raise SystemExit(f"DeepXDE runs on {dde.backend.backend_name}; set DDE_BACKEND=pytorch.")
    dde.config.set_random_seed(seed)
    torch.set_num_threads(1)
    d = problem.dimensions
    diffusion, rho = dde.Variable(0.03), dde.Variable(1.0)

    def equation(x, u):
        flow = dde.grad.jacobian(u, x, i=0, j=d)
        spread = sum(dde.grad.hessian(u, x, i=i, j=i) for i in range(d))
        return flow - diffusion * spread - rho * u * (1 - u)

    def begin(x):
        return 0.5 * np.exp(-((x[:, :d] - 0.5) ** 2).sum(1, keepdims=True) / 0.01)

    box = dde.geometry.Interval(0, 1) if d == 1 else dde.geometry.Rectangle([0, 0], [1, 1])
    place = dde.geometry.GeometryXTime(box, dde.geometry.TimeDomain(0, END))
    centres = (np.arange(problem.n) + 0.5) / problem.n
    grid = np.stack(np.meshgrid(*[centres] * d, indexing="ij"), -1).reshape(-1, d)
    points = np.concatenate([np.column_stack((grid, np.full(len(grid), t))) for t in VISITS])
    conditions = [
        dde.icbc.IC(place, begin, lambda _, initial: initial),
        dde.icbc.NeumannBC(place, lambda x: np.zeros((len(x), 1)), lambda _, boundary: boundary),
        dde.icbc.PointSetBC(points, data.reshape(-1, 1)),
    ]
    sizes = {"num_domain": 2000, "num_boundary": 100, "num_initial": 200}
    if d == 2:
        sizes = {"num_domain": 4000, "num_boundary": 400, "num_initial": 800}
    model = dde.Model(
        dde.data.TimePDE(place, equation, conditions, **sizes, anchors=points),
        dde.nn.FNN([d + 1] + [32] * 3 + [1], "tanh", "Glorot normal"),
    )
    unknown = [diffusion, rho]
    model.compile("adam", lr=1e-3, external_trainable_variables=unknown, verbose=0)
    model.train(iterations=ADAM, display_every=10**9, verbose=0)
    dde.optimizers.set_LBFGS_options(maxiter=LBFGS)
    model.compile("L-BFGS", external_trainable_variables=unknown, verbose=0)
    model.train(display_every=10**9, verbose=0)
    # Values far from any tumour are kept printable.
    found = np.maximum([float(rho.detach()) / SPAN, float(diffusion.detach()) * LENGTH**2 / SPAN], 1e-6)
    return (
        np.log(found),
        None,
        lambda: np.stack(
            [model.predict(np.column_stack((grid, np.full(len(grid), t)))).ravel() for t in (*VISITS, END)]
        ),
    )


def posed(problem, data, sd, seed):
    """The problem for `pinn.dde`, with a network up to the forecast's day."""
    from pinn import dde

    inverse = dde.Inverse(problem.model, problem.domain, bm.Schedule(), problem.u0.numpy(), problem.days[:2], data, sd,
                          until=problem.days[-1])  # fmt: skip
    return dde, inverse.posed(seed=seed)


def bridge(problem, data, sd, seed):
    dde, one = posed(problem, data, sd, seed)
    found = dde.SecondOrder(weights=RISING).train(one)
    return found.z, found.sd, lambda: one.states(problem.days)


def broyden(problem, data, sd, seed):
    dde, one = posed(problem, data, sd, seed)
    one.weigh(WEIGHT)
    dde.broyden(one, BROYDEN)
    return one.z, None, lambda: one.states(problem.days)


def nncg(problem, data, sd, seed):
    dde, one = posed(problem, data, sd, seed)
    one.weigh(WEIGHT)
    one.model.compile("adam", lr=1e-3)
    one.model.train(iterations=2000, display_every=10**9)
    # A damping below the loss's own curvature, which is about 100; rank, tolerance and line search are DeepXDE's.
    dde.dde.optimizers.set_NNCG_options(mu=1e-2, cgtol=1e-6, cgmaxiter=200)
    one.model.compile("NNCG")
    with contextlib.redirect_stdout(io.StringIO()):  # it reports each conjugate gradient that was cut short
        one.model.train(iterations=NNCG, display_every=10**9)
    return one.z, None, lambda: one.states(problem.days)


METHODS = {
    "Gauss-Newton": gauss_newton,
    "on half voxels": gauss_newton_fine,
    "adjoint L-BFGS": lbfgs,
    "network": network,
    "DeepXDE + LM": bridge,
    "SS-Broyden": broyden,
    "NNCG": nncg,
    "DeepXDE": deepxde,
}
#: Methods that take minutes for a fit.
DEAR = ("DeepXDE + LM", "SS-Broyden", "NNCG", "DeepXDE")


def fit(key, method, seed):
    """One row of results."""
    problem, data, sd, best, scale = reference(key, seed)
    # Imports and compiled kernels belong to no method.
    bm.TorchSolver().build(problem.model, problem.domain, bm.Schedule())(problem.values, problem.u0, [1.0])
    begun = time.process_time()
    z, own_sd, own = METHODS[method](problem, data, sd, seed)
    seconds = time.process_time() - begun
    values = dict(zip(NAMES, np.exp(z).tolist(), strict=True))
    classical = bm.TorchSolver(rtol=1e-4).build(problem.model, problem.domain, bm.Schedule())
    solved = problem.errors(classical(values, problem.u0, problem.days)[0])
    row = {"problem": key, "method": method, "seed": seed, "off": ((z - best) / scale).tolist(), "seconds": seconds,
           "D": float(np.exp(z[1])) * SPAN / LENGTH**2, "rho": float(np.exp(z[0])) * SPAN,
           "solved": float(solved[-1])}  # fmt: skip
    if own_sd is not None:
        row["sd"] = (own_sd / scale).tolist()
    if own is not None and seed < OWN:
        begun = time.process_time()
        states = problem.errors(own())
        row |= {"state": float(states[1]), "own": float(states[-1]), "own_seconds": time.process_time() - begun}
    return row


def table(rows):
    """One line per problem and method; errors in posterior sd are those of the worse of the two parameters."""
    print(f"\ntruth: D = {D}, rho = {RHO}; off: distance from the maximum likelihood, posterior sd")
    print(f"{'data':6}{'method':16}{'seeds':>6}{'off, median':>12}{'most':>8}{'<= 0.3':>8}{'sd ratio':>14}"
          f"{'state':>9}{'forecast':>10}{'re-solved':>11}{'CPU s':>9}{'ratio':>8}")  # fmt: skip
    for key in PROBLEMS:
        base = None
        for method in METHODS:
            here = [r for r in rows if (r["problem"], r["method"]) == (key, method)]
            if not here:
                continue
            off = np.abs([r["off"] for r in here]).max(1)
            seconds = float(np.median([r["seconds"] for r in here]))
            base = seconds if method == "Gauss-Newton" else base
            ratio = f"{seconds / base:.1f}" if base else "-"
            sds = [s for r in here for s in r.get("sd", [])]
            spread = f"{min(sds):.3f}-{max(sds):.3f}" if sds else "-"

            def middle(name, here=here):
                found = [r[name] for r in here if name in r]
                return f"{100 * np.median(found):.3f} %" if found else "-"

            print(f"{key:6}{method:16}{len(here):6d}{np.median(off):12.3f}{off.max():8.3f}{(off <= 0.3).sum():5d}/"
                  f"{len(here):<2d}{spread:>14}{middle('state'):>9}{middle('own'):>10}{middle('solved'):>11}"
                  f"{seconds:9.2f}{ratio:>8}", flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--dear", type=int, default=2, help="seeds of the methods that take minutes each")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--only", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DeprecationWarning)
    rows = []
    if given.results and given.results.exists():
        rows = [json.loads(line) for line in given.results.read_text().splitlines()]
    done = {(r["problem"], r["method"], r["seed"]) for r in rows}
    for method in given.methods:
        for key in given.only:
            for seed in range(given.dear if method in DEAR else given.seeds):
                if (key, method, seed) in done:
                    continue
                rows.append(fit(key, method, seed))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                if given.results:
                    with given.results.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    table([r for r in rows if r["problem"] in given.only])


if __name__ == "__main__":
    main()
