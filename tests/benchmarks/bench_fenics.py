"""Time and memory of the FEniCS solver: overhead of its process, a run on 10^5 vertices, two ranks, gradients.

Run: ``.venv/bin/python tests/benchmarks/bench_fenics.py [overhead] [large] [ranks] [gradient]`` (all without a word).
Needs FEniCS (`tumorcast doctor`).
"""

import os
import sys
import tempfile
import time

import numpy as np
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import biomodel as bm
from biomodel.domain import Domain
from biomodel.fenics.pool import close_workers, pool
from biomodel.fenics.process import CACHE, Worker
from biomodel.schedule import Schedule

DAYS = [30.0, 60.0, 120.0]
SCHEDULE = Schedule.weekly("paclitaxel", 7.0, 12, 80, "mg/m^2")
MODEL = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy("paclitaxel")])


def tumour(shape, spacing=2.0):
    domain = Domain.box(shape, (spacing,) * 3)
    z, y, x = np.meshgrid(*(domain.coords[a] - domain.coords[a].mean() for a in "zyx"), indexing="ij")
    return domain, 0.02 + 0.7 * np.exp(-(z**2 + y**2 + x**2) / 100)


def timed(call, ranks=1):
    """Result, seconds in all, seconds of them in the worker's own computation."""
    with pool(ranks).worker() as worker:
        before = worker.seconds
    began = time.perf_counter()
    found = call()
    whole = time.perf_counter() - began
    return found, whole, worker.seconds - before


def overhead():
    """Start of a process, and what a simulation costs beside the solve when the process is warm."""
    worker = Worker()
    began = time.perf_counter()
    worker.start()
    print(f"start of a worker: {time.perf_counter() - began:.2f} s")
    worker.close()
    domain, u0 = tumour((24, 24, 24))
    simulation = bm.FenicsSolver().build(MODEL, domain, SCHEDULE)
    plan = simulation.fixed_plan(DAYS, [15, 15, 30])

    def run():
        return simulation({}, u0, DAYS, plan=plan)

    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE] = folder
        close_workers()
        _, cold, _ = timed(run)
        close_workers()
        _, kept, _ = timed(run)
        del os.environ[CACHE]
        close_workers()
    timed(run)
    _, whole, solve = timed(run)
    print(f"first simulation, 24^3 voxels: {cold:.2f} s with compilation, {kept:.2f} s with forms kept from before")
    print(f"warm: {whole:.3f} s, of which beside the solve {whole - solve:.3f} s")


def large(ranks=1):
    """10^5 vertices, 120 days."""
    domain, u0 = tumour((46, 46, 46), 1.5)
    for name, params in (("D 0.1", {}), ("D 1", {"diffusion.D": 1.0})):
        simulation = bm.FenicsSolver(ranks=ranks).build(MODEL, domain, SCHEDULE)
        began = time.perf_counter()
        vertices = simulation.nodes
        meshing = time.perf_counter() - began
        began = time.perf_counter()
        plan = simulation.plan(params, u0, DAYS)
        planning = time.perf_counter() - began
        simulation(params, u0, [0.0], plan=simulation.fixed_plan([0.0], [0]))
        u, whole, solve = timed(lambda s=simulation, p=params, n=plan: s(p, u0, DAYS, plan=n), ranks)
        with pool(ranks).worker() as worker:
            peak = worker.peak
        exact = bm.TorchSolver(rtol=1e-4).build(MODEL, domain, SCHEDULE)(params, u0, DAYS)
        print(
            f"{vertices} vertices, {name} mm^2/day, 120 days, {plan.steps} steps, {ranks} rank(s): {whole:.2f} s "
            f"(worker {solve:.2f}); mesh and transfer {meshing:.1f} s, steps chosen in {planning:.1f} s; peak of the "
            f"worker {peak / 1e6:.0f} MB; difference to torch {float((u - exact).norm() / exact.norm()):.2e}"
        )
    return u


def ranks():
    """The same field on one rank and on two, with equal steps and a tight solver."""
    domain, u0 = tumour((46, 46, 46), 1.5)
    found = []
    for count in (1, 2):
        simulation = bm.FenicsSolver(ranks=count, linear_rtol=1e-12).build(MODEL, domain, SCHEDULE)
        plan = simulation.fixed_plan(DAYS, [10, 10, 20])
        simulation({}, u0, [0.0], plan=simulation.fixed_plan([0.0], [0]))
        u, whole, solve = timed(lambda s=simulation, n=plan: s({}, u0, DAYS, plan=n), count)
        print(f"{count} rank(s), {simulation.nodes} vertices, 40 steps: {whole:.2f} s (worker {solve:.2f})")
        found.append(u)
    print(f"relative difference of the fields: {float((found[0] - found[1]).norm() / found[0].norm()):.1e}")


def gradient():
    """A full gradient by parameters and initial state."""
    domain, u0 = tumour((24, 24, 24))
    simulation = bm.FenicsSolver().build(MODEL, domain, SCHEDULE)
    plan = simulation.plan({}, u0, DAYS)
    theta = {n: torch.tensor(MODEL.parameters[n].typical, dtype=torch.float64, requires_grad=True) for n in MODEL.free}
    state = torch.tensor(u0, requires_grad=True)
    simulation(theta, state, DAYS, plan=plan).sum().backward()
    _, forward, _ = timed(lambda: simulation({}, u0, DAYS, plan=plan))
    _, both, _ = timed(lambda: simulation(theta, state, DAYS, plan=plan).sum().backward())
    print(f"24^3 voxels, {plan.steps} steps: forward {forward:.2f} s; with gradient {both / forward:.1f} times that")


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["overhead", "large", "ranks", "gradient"]
    for name in wanted:
        {"overhead": overhead, "large": large, "ranks": ranks, "gradient": gradient}[name]()
