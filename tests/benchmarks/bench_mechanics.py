"""Speed of elastic equilibrium on voxels and of coupled simulations: one table each.

Run: python tests/benchmarks/bench_mechanics.py [solve] [simulation] [calibration]
"""

import sys
import time

import numpy as np
import torch

import biomodel as bm
from biomodel.domain import Domain
from biomodel.mechanics import StressDamped
from biomodel.schedule import Schedule
from biomodel.solvers.elastic import Body
from biomodel.solvers.multigrid import Multigrid
from biomodel.virtual import small_patient


def breast(n: int):
    """A ball of two tissues in random patches with a tumour, n³ voxels: mask, fraction of the denser one, cells."""
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n)] * 3, indexing="ij")
    rng = np.random.default_rng(0)
    waves = sum(np.cos(rng.uniform(2, 8) * (a * z + b * y + c * x)) for a, b, c in rng.standard_normal((12, 3)))
    tumour = (z - 0.2) ** 2 + y**2 + x**2
    return z**2 + y**2 + x**2 < 0.95, (waves > 0).astype(float), 0.8 * np.exp(-tumour / 0.08)


class Counting:
    """Counts multigrid cycles."""

    def __init__(self):
        self.count, self.plain = 0, Multigrid.cycle

    def __enter__(self):
        def cycle(levels, r, level=0):
            self.count += level == 0
            return self.plain(levels, r, level)

        Multigrid.cycle = cycle
        return self

    def __exit__(self, *_):
        Multigrid.cycle = self.plain


def solve() -> None:
    """One solve for the stress, from nothing and from the last one, with its adjoint."""
    print("\none solve for the stress, moduli 2 to 20 kPa, Poisson 0.45, one thread, least CPU time of 3")
    print(f"{'voxels':>8s}{'rtol':>8s}{'seconds':>9s}{'cycles':>8s}{'next':>9s}{'cycles':>8s}{'gradient':>10s}")
    for n in (32, 64):
        mask, dense, u = (torch.tensor(a) for a in breast(n))
        young = (2 + 2 * dense + (20 - 2 - 2 * dense) * u)[None]
        later = (2 + 2 * dense + (20 - 2 - 2 * dense) * 1.03 * u)[None]
        body = Body(mask, (1.0, 1.0, 1.0), 0.45, True)
        pressure = 10 * u[None]
        for rtol in (1e-6, 1e-10):
            rows = []
            for _ in range(3):
                with Counting() as first:
                    began = time.process_time()
                    _, w = body.equilibrium(young, pressure, rtol)
                    cold = time.process_time() - began
                with Counting() as second:
                    began = time.process_time()
                    body.equilibrium(later, 1.03 * pressure, rtol, (w,))
                    warm = time.process_time() - began
                moving = pressure.clone().requires_grad_()
                began = time.process_time()
                body.equilibrium(young, moving, rtol)[0].sum().backward()
                rows.append((cold, first.count, warm, second.count, time.process_time() - began))
            cold, cycles, warm, fewer, both = min(rows)
            print(f"{n:6d}³ {rtol:8.0e}{cold:9.2f}{cycles:8d}{warm:9.2f}{fewer:8d}{both:10.2f}")


def simulation() -> None:
    """120 days of growth with and without mechanics."""
    print("\n120 days, k 0.05/day, D 0.2 mm²/day, error in time 1e-3, one thread, CPU time with choice of steps")
    print(f"{'voxels':>8s} {'model':16s}{'steps':>6s}{'seconds':>9s}{'gradient':>10s}")
    for n, spacing in ((32, 2.0), (64, 1.0)):
        mask, dense, u = breast(n)
        tissues = {"adipose": 1 - dense, "fibroglandular": dense}
        domain = Domain.box(mask.shape, (spacing,) * 3, mask, tissues)
        for name, diffusion in (("no mechanics", bm.Isotropic()), ("mechanics", StressDamped())):
            model = bm.ReactionDiffusion(bm.Logistic(), diffusion)
            run = bm.TorchSolver().build(model, domain, Schedule())
            values = {"growth.k": 0.05, "diffusion.D": 0.2}
            run(values, u * mask, [2.0])
            began = time.process_time()
            plan = run.plan(values, u * mask, [120.0])
            run(values, u * mask, [120.0], plan=plan)
            forward = time.process_time() - began
            theta = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in values.items()}
            began = time.process_time()
            run(theta, u * mask, [120.0], plan=plan).sum().backward()
            print(f"{n:6d}³  {name:16s}{plan.steps:6d}{forward:9.2f}{time.process_time() - began:10.2f}")


def calibration() -> None:
    """A small virtual patient, two visits."""
    print("\ncalibration of a virtual patient of 24³ voxels on two visits, and 40 draws of a forecast; CPU time")
    patient = small_patient(seed=7).patient
    known = patient.until(visit=2)
    drugs = [bm.Chemotherapy(agent) for agent in known.schedule.agents]
    print(f"{'model':16s}{'calibration s':>14s}{'solves':>8s}{'forecast s':>12s}{'log evidence':>14s}")
    for name, diffusion in (("no mechanics", bm.Isotropic()), ("mechanics", StressDamped())):
        began = time.process_time()
        fit = bm.calibrate(bm.ReactionDiffusion(bm.Logistic(), diffusion, drugs), known)
        middle = time.process_time()
        bm.forecast(fit, until=patient.visits[-1].day, draws=40, seed=0)
        end = time.process_time()
        print(f"{name:16s}{middle - began:14.1f}{fit.solves:8d}{end - middle:12.1f}{fit.log_evidence:14.1f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = {f.__name__: f for f in (solve, simulation, calibration)}
    for name in sys.argv[1:] or jobs:
        jobs[name]()
