"""Speed of the torch solver beside its peers: one table per row of interest, ratios from the same run.

Run: python tests/benchmarks/bench_solver.py [stage] [box] [demonstration] [calibration]
"""

import resource
import sys
import time

import numpy as np
import torch
from scipy.integrate import solve_ivp

import biomodel as bm
from biomodel.calibration.calibrate import MAP
from biomodel.domain import Domain
from biomodel.patient import CellularitySettings, Patient, Visit
from biomodel.schedule import Dose, Fraction, Schedule
from biomodel.solvers.kernels import NumbaKernels


def least(function, repeats: int, clock=time.perf_counter) -> float:
    """Least time of several runs after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        began = clock()
        function()
        times.append(clock() - began)
    return min(times)


def stage() -> None:
    """One diffusion stage at 96³, one thread, against a copy of what it must touch."""
    torch.set_num_threads(1)
    print("\none diffusion stage, 96³, one thread, least CPU time of 20")
    print(f"{'dtype':10s}{'stage ms':>10s}{'copies ms':>11s}{'ratio':>8s}{'bar':>6s}")
    for dtype, bar in ((np.float64, 4), (np.float32, 6)):
        rng = np.random.default_rng(0)
        u, *faces = (rng.random((1, 98, 98, 98)).astype(dtype) for _ in range(4))
        out, c = np.zeros_like(u), np.full(1, 0.01, dtype)
        # Sources and targets far larger than the caches, used in turn, so that every copy comes from memory.
        pool = [[np.ones((96, 96, 96), dtype) for _ in range(5)] for _ in range(12)]
        turn = [0]

        def copies(pool=pool, turn=turn):
            turn[0] = (turn[0] + 1) % len(pool)
            here, there = pool[turn[0]], pool[turn[0] - 6]
            for a, b in zip(here, there, strict=True):
                np.copyto(b, a)

        def run(out=out, u=u, c=c, faces=faces):
            NumbaKernels.stage(out, u, None, None, None, (0, 0, 1, 0), c, faces)

        ours, copy = least(run, 20, time.process_time), least(copies, 20, time.process_time)
        print(f"{np.dtype(dtype).name:10s}{ours * 1e3:10.3f}{copy * 1e3:11.3f}{ours / copy:8.2f}{bar:6d}")


def box() -> None:
    """Logistic growth and diffusion on 96³ for 120 days to a relative error of 1e-3, beside py-pde and scipy."""
    import pde

    n, days = 96, 120.0
    grid = pde.CartesianGrid([[0, n]] * 3, n)
    c = grid.cell_coords - n / 2
    u0 = 0.5 * np.exp(-(c**2).sum(-1) / 50)
    print("\nbox 96³ of 1 mm, k 0.05/day, 120 days, relative L2 error at most 1e-3, two threads, compilation excluded")
    print(f"{'D':>5s} {'solver':28s}{'seconds':>9s}{'error':>10s}{'ours is faster by':>19s}")
    for d in (0.1, 1.0):
        torch.set_num_threads(2)
        model = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic())
        domain = Domain.box((n, n, n))
        params = {"growth.k": 0.05, "diffusion.D": d}
        simulation = bm.TorchSolver(rtol=1e-3).build(model, domain, Schedule())
        fine = simulation(params, u0, [days], plan=simulation.fixed_plan([days], [1200]))[0, 0].numpy()

        def error(u, fine=fine):
            return float(np.linalg.norm(u - fine) / np.linalg.norm(fine))

        ours = least(lambda s=simulation, p=params: s(p, u0, [days]), 3)
        ours_error = error(simulation(params, u0, [days])[0, 0].numpy())
        print(f"{d:5.1f} {'tumorcast (with its pilot)':28s}{ours:9.3f}{ours_error:10.1e}")
        equation = pde.PDE({"u": f"{d}*laplace(u)+0.05*u*(1-u)"})
        field = pde.ScalarField(grid, u0)
        best = None
        candidates = [("Euler, fixed step", pde.EulerSolver, {}, 0.02 / d if d < 1 else 0.02)]
        candidates += [(f"Runge-Kutta, adaptive {t:g}", pde.RungeKuttaSolver, {"adaptive": True, "tolerance": t}, 0.1)
                       for t in (1e-2, 1e-3)]  # fmt: skip
        for name, kind, options, dt in candidates:
            solver = kind(equation, **options)
            step = solver.make_stepper(field.copy(), dt=dt)
            step(field.copy(), 0, 1.0)  # compiles
            state = field.copy()
            began = time.perf_counter()
            step(state, 0, days)
            took = time.perf_counter() - began
            e = error(state.data)
            remark = "" if e <= 1e-3 else "  (too inaccurate)"
            print(f"{d:5.1f} {'py-pde ' + name:28s}{took:9.3f}{e:10.1e}{took / ours:19.1f}{remark}")
            if e <= 1e-3:
                best = min(best or took, took)
        lower, h = np.zeros_like(u0), u0.shape

        def slope(_, y, d=d, lower=lower, h=h):
            u = y.reshape(h)
            np.multiply(u, 1 - u, out=lower)
            lower.__imul__(0.05)
            for axis in range(3):
                flux = d * np.diff(u, axis=axis)
                first = [slice(None)] * 3
                last = [slice(None)] * 3
                first[axis], last[axis] = slice(0, -1), slice(1, None)
                lower[tuple(first)] += flux
                lower[tuple(last)] -= flux
            return lower.ravel().copy()

        began = time.perf_counter()
        found = solve_ivp(slope, (0, days), u0.ravel(), method="RK23", rtol=1e-3, atol=1e-6)
        took = time.perf_counter() - began
        e = error(found.y[:, -1].reshape(h))
        print(f"{d:5.1f} {'scipy solve_ivp RK23':28s}{took:9.3f}{e:10.1e}{took / ours:19.1f}")
        if best:
            print(f"{d:5.1f} fastest py-pde scheme at that error: {best / ours:.1f} times our time (bar 5)")


def demonstration_case():
    """77×116×36 voxels of 1.5×1.5×3 mm, 270 days, 30 fractions at 14:30, 74 doses of two agents, 9 visits."""
    shape, spacing = (36, 116, 77), (3.0, 1.5, 1.5)
    axes = ((np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True))
    z, y, x = np.meshgrid(*axes, indexing="ij")
    mask = (z / 54) ** 2 + (y / 87) ** 2 + (x / 57.75) ** 2 <= 1
    fractions = tuple(Fraction(30 + 7 * w + d + 14.5 / 24, 2.0) for w in range(6) for d in range(5))
    doses = tuple(Dose(30.0 + i, "temozolomide", 75, "mg/m^2") for i in range(44))
    doses += tuple(Dose(90.0 + 6 * i, "carboplatin", 2, "AUC") for i in range(30))
    model = bm.ReactionDiffusion(
        bm.Logistic(k=bm.LogNormal(0.05, 1.0)),
        bm.Isotropic(D=bm.LogNormal(0.1, 1.0)),
        [
            # Temozolomide and radiotherapy are given on the same days, so only one of the two can be calibrated.
            # Half-lives of the effect: 1.8 hours for temozolomide's plasma level, 17 hours for the other agent.
            bm.Chemotherapy("temozolomide", efficacy=bm.Fixed(0.3), decay=bm.Fixed(9.24)),
            bm.Chemotherapy("carboplatin", efficacy=bm.LogNormal(0.05, 1.0), decay=bm.Fixed(1.0)),
            bm.Radiotherapy(alpha=bm.LogNormal(0.03, 1.0)),
        ],
    )
    u0 = 0.5 * np.exp(-(z**2 + y**2 + x**2) / (2 * (12 / 2.3548) ** 2)) * mask
    params = {"diffusion.D": 0.1, "growth.k": 0.05, "carboplatin.efficacy": 0.05, "radiotherapy.alpha": 0.03}
    times = np.linspace(0, 270, 10)[1:]
    return Domain.box(shape, spacing, mask=mask), Schedule(doses, fractions), model, u0, params, times


def demonstration() -> None:
    """The nearest published package's own demonstration; its times are quoted (two cores), not run here."""
    torch.set_num_threads(2)
    domain, schedule, model, u0, params, times = demonstration_case()
    print("\nthe demonstration of TumorTwin: 77×116×36 voxels, 270 days, 30 fractions, 74 doses, 9 visits; two threads")
    solver = bm.TorchSolver(rtol=2e-4)
    simulation = solver.build(model, domain, schedule)
    forward = least(lambda: simulation(params, u0, times), 5)
    state = simulation(params, u0, times)
    reference = simulation(params, u0, times, plan=simulation.fixed_plan(times, [150] * 9))
    error = max(float((state[0, i] - reference[0, i]).norm() / reference[0, i].norm()) for i in range(9))
    plan = simulation.plan(params, u0, times)
    given = least(lambda: simulation(params, u0, times, plan=plan), 5)
    del reference, state

    def gradient():
        theta = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in params.items()}
        simulation(theta, torch.tensor(u0), times, plan=plan).square().sum().backward()

    full = least(gradient, 5)
    print(f"forward {forward:.3f} s with its pilot, {given:.3f} s with a given plan, {plan.steps} steps, worst error "
          f"at a visit {error:.1e} (bar 0.4 s, 2e-4; TumorTwin 11-17 s)")  # fmt: skip
    print(f"full gradient (4 parameters and the initial state) {full:.3f} s = {full / given:.2f} forward runs (bar 4)")
    # Calibration: measured cell fractions in the visible region, 5 % noise, starts off by a factor of two.
    fine = simulation(params, u0, times, plan=simulation.fixed_plan(times, [40] * 9))[0].numpy()
    rng = np.random.default_rng(0)
    settings = CellularitySettings(3.0e-3, 0.6e-3, repeatability_cv=0.0, voxel_cv=0.05, visible_fraction=0.1)

    def adc(u):
        return (3.0e-3 - 2.4e-3 * u) * (1 + 0.05 * rng.standard_normal(u.shape)) * domain.mask

    states = [u0, *fine]
    visits = tuple(
        Visit(number=i + 1, day=float(t), adc=adc(u), region=(u >= 0.1) & domain.mask)
        for i, (t, u) in enumerate(zip([0.0, *times], states, strict=True))
    )
    patient = Patient("demonstration", "brain", domain, visits, schedule, cellularity=settings)
    off = {k: v * f for (k, v), f in zip(params.items(), (2, 0.5, 2, 0.5), strict=True)}
    for marginalise in (False, True):
        method = MAP(starts=1, start_at=off, marginalise=marginalise)
        began = time.perf_counter()
        fit = bm.calibrate(model, patient, bm.TorchSolver(rtol=1e-3), method)
        took = time.perf_counter() - began
        found = {k: f"{fit.values[k]:.4g} (true {v:g})" for k, v in params.items()}
        what = "first map's noise marginalised" if marginalise else "first map's noise added, as peers do"
        print(f"calibration of all four from starts off by two, {what}: {took:.1f} s, {fit.iterations} final "
              f"iterations, {fit.solves} solves (bar 25 s; TumorTwin 440 s)\n  {found}")  # fmt: skip
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"peak memory of this process so far {peak:.2f} GB (bar 1 GB; TumorTwin 1.9 GB)")


def calibration() -> None:
    """Three parameters, 64×64×32 voxels, three visits."""
    from biomodel.virtual import Matched, virtual_patient

    torch.set_num_threads(2)
    patient = virtual_patient(7, Matched()).patient
    model = bm.ReactionDiffusion(
        bm.Logistic(), bm.Isotropic(),
        [bm.Chemotherapy("paclitaxel"), *(bm.Chemotherapy(a, efficacy=bm.Fixed(0.06)) for a in patient.schedule.agents
                                          if a != "paclitaxel")],
    )  # fmt: skip
    began = time.perf_counter()
    fit = bm.calibrate(model, patient.until(3))
    print(f"\ncalibration, 3 model parameters, 64×64×32, 3 visits: {time.perf_counter() - began:.1f} s, "
          f"{fit.iterations} final iterations, {fit.solves} solves (bar 15 s)")  # fmt: skip


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["stage", "box", "demonstration", "calibration"]
    for name in chosen:
        {"stage": stage, "box": box, "demonstration": demonstration, "calibration": calibration}[name]()
