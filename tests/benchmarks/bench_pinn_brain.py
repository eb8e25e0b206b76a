"""Virtual tumours in a real brain at 2 mm: D, growth rate and seed by a network and by the classical solver.

The anatomy is that of the patient of Lipkova et al. 2019 (doi:10.1109/TMI.2019.2902044, folder `glioma_masks` of
`TUMORCAST_DATA`); the tumours are virtual. Truth: finite volumes on 1 mm with classical Runge-Kutta (`biomodel.truth`)
from a Gaussian seed, averaged to voxels of 2 mm with noise of 5 %; two visits are seen, the third is forecast. Unknown:
diffusivities of white and grey matter, growth rate, and position, peak and width of the seed at day 0. Both fits start
from the priors' medians and the first image, which are off by a factor of about two.

    TUMORCAST_DATA=... OMP_NUM_THREADS=1 python tests/benchmarks/bench_pinn_brain.py [--seeds 3]
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path

import numpy as np
from scipy.ndimage import distance_transform_edt, label

import biomodel as bm
from biomodel.imaging.nifti import read_image
from biomodel.scoring import dice
from biomodel.truth import Hazard, average, integrate, refine
from pinn import PinnSolver, TrainingWarning
from pinn.joint.observed import Cells, Observation
from pinn.joint.posterior import infer_joint
from pinn.joint.problem import JointProblem
from pinn.joint.starts import Foci

#: Settings of the generator: committed before anything was fitted to them.
VISITS, LAST = (90.0, 150.0), 210.0
WHITE, RATIO, GROWTH = (0.13, 0.3), (0.1, 0.3), (0.025, 0.25)  # medians and log-sds of D_white, D_grey / D_white, k
PEAK, WIDTH, NOISE = 0.5, 4.0, 0.05
SIDE = 32  # voxels of 2 mm
LEVELS = (0.05, 0.3)
TWO = (2, 2, 2)


def anatomy() -> bm.Domain:
    """The brain around its real tumour, whose own voxels take the nearest healthy tissue."""
    source = Path(os.environ.get("TUMORCAST_DATA") or "/nowhere") / "glioma_masks"
    if not (source / "WM.nii.gz").exists():
        raise SystemExit("skipped: no glioma_masks in the folder that TUMORCAST_DATA names")
    white, grey, core = (read_image(source / f"{n}.nii.gz").values > 0 for n in ("WM", "GM", "tumT1c"))
    near = distance_transform_edt(~((white | grey) & ~core), return_distances=False, return_indices=True)
    centre = np.argwhere(core).mean(0).astype(int) // 2 * 2
    box = tuple(slice(c - SIDE, c + SIDE) for c in centre)
    parts = [average(np.where(core, t[tuple(near)], t)[box].astype(float), TWO) for t in (white, grey)]
    brain = sum(parts) >= 0.5
    pieces, _ = label(brain)
    brain = pieces == np.bincount(pieces.ravel())[1:].argmax() + 1
    tissues = {n: t * brain for n, t in zip(("white", "grey"), parts, strict=True)}
    return bm.Domain.box(brain.shape, (2.0, 2.0, 2.0), mask=brain, tissues=tissues)


class Patient:
    """One virtual tumour: truth at all days (T, z, y, x) and noisy maps of the visits."""

    def __init__(self, domain: bm.Domain, seed: int):
        rng = np.random.default_rng(seed)
        white = WHITE[0] * np.exp(WHITE[1] * rng.standard_normal())
        grey = white * RATIO[0] * np.exp(RATIO[1] * rng.standard_normal())
        growth = GROWTH[0] * np.exp(GROWTH[1] * rng.standard_normal())
        self.values = {"growth.k": growth, "diffusion.D_white": white, "diffusion.D_grey": grey}
        middle = np.abs(np.indices(domain.shape) - (np.array(domain.shape) - 1).reshape(3, 1, 1, 1) / 2).max(0) < 5
        places = np.argwhere(domain.mask & (domain.tissues["white"] > 0.9) & middle)
        self.seed = 2.0 * places[rng.integers(len(places))]  # mm, of a voxel's centre
        mask = refine(domain.mask, TWO).astype(bool)
        w, g = (refine(domain.tissues[n], TWO) for n in ("white", "grey"))
        diffusivity = np.where(mask, (white * w + grey * g) / np.maximum(w + g, 1e-9), 0.0)
        # Centres of the cells of 1 mm, where voxel centres of 2 mm lie at 0, 2, ...
        grid = np.indices(mask.shape) - 0.5
        squares = sum((grid[i] - self.seed[i]) ** 2 for i in range(3))
        start = PEAK * np.exp(-squares / (2 * WIDTH**2)) * mask
        states = integrate(start[None], mask, diffusivity, (1.0,) * 3, growth, Hazard.none(), (*VISITS, LAST))
        self.truth = np.stack([average(u[0], TWO) for u in states])
        noise = NOISE * rng.standard_normal(self.truth[:2].shape)
        seen = [np.where(domain.mask, u + e, np.nan) for u, e in zip(self.truth, noise, strict=False)]
        cells = Cells()
        self.observations = [Observation(day, u, cells) for day, u in zip(VISITS, seen, strict=True)]


def model() -> bm.ReactionDiffusion:
    """What is fitted; the priors' medians are about half or twice the generator's."""
    diffusion = bm.TissueDiffusion(("white", "grey"), (bm.LogNormal(0.06, 0.8), bm.LogNormal(0.03, 0.8)))
    return bm.ReactionDiffusion(bm.Logistic(bm.LogNormal(0.015, 0.8)), diffusion)


TOLERANCE = 1.0  # posterior sd; a network's optimum is known no better than its residual allows
NETWORK = PinnSolver(rtol=1e-2, frequencies=3, hidden=(14, 14), points=6000, iterations=30)
SOLVERS = {"network": NETWORK, "Gauss-Newton, same voxels": bm.TorchSolver(rtol=3e-3)}


def beginning(problem: JointProblem) -> np.ndarray:
    """The priors' means with the most likely of the first image's guesses of the seed, for either solver."""
    classical = problem.by(SOLVERS["Gauss-Newton, same voxels"])
    found = []
    for guess in problem.bound.guesses(np.nan_to_num(problem.observations[0].values)):
        z = problem.prior.mean.copy()
        z[problem.cut[1]] = guess
        found.append(np.clip(z, *problem.limits))
    return min(found, key=classical.objective)


def overlaps(u: np.ndarray, truth: np.ndarray) -> str:
    """Dice at all levels."""
    return "/".join(f"{dice(u >= level, truth >= level):.3f}" for level in LEVELS)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--progress", action="store_true")
    arguments = parser.parse_args()
    domain = anatomy()
    print(f"{domain}; {domain.mask.mean():.0%} of the box is brain; Dice at {LEVELS}; CPU-seconds")
    print(f"{'seed':>4} {'solver':<26} {'log ratio to truth, sd: k, D_white, D_grey':<50} {'seed off':>8} "
          f"{'visit 2':>12} {'forecast':>12} {'own forecast':>12} {'CPU':>7}")  # fmt: skip
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        patient = Patient(domain, seed)
        for name, solver in SOLVERS.items():
            before = time.process_time()
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                problem = JointProblem(
                    model(), domain, bm.Schedule(), Foci(1, width=bm.LogNormal(5.0, 0.3)), 0.0,
                    patient.observations, solver,
                )  # fmt: skip
                told = print if arguments.progress else None
                if name == "network":
                    problem.simulation.progress = told
                found = infer_joint(problem, begin=beginning(problem), tolerance=TOLERANCE, progress=told)
            spent = time.process_time() - before
            values = problem.physical(found.z)
            off = [f"{np.log(values[n] / v):+.3f} ({found.sd[problem.names.index(n)]:.3f})"
                   for n, v in patient.values.items()]  # fmt: skip
            every = problem.values(found.z)
            place = np.array([every[f"focus1.{a}"] for a in "zyx"]) - patient.seed
            classical = bm.TorchSolver().build(model(), domain, bm.Schedule())
            u0, days = problem.u0(found.z), [*VISITS, LAST]
            solved = classical(values, u0, days)[0].numpy()
            own = ""
            if name == "network":
                own = overlaps(problem.simulation(values, u0, days)[0].numpy()[-1], patient.truth[-1])
            stalled = sum(issubclass(w.category, TrainingWarning) for w in warned)
            state = f"held out {problem.simulation.held_out:.2f}, {stalled} stalled" if name == "network" else ""
            print(f"{seed:>4} {name:<26} {', '.join(off):<50} {np.linalg.norm(place):>5.2f} mm "
                  f"{overlaps(solved[1], patient.truth[1]):>12} {overlaps(solved[2], patient.truth[2]):>12} {own:>12} "
                  f"{spent:>7.1f} {state}{'' if found.converged else ' not converged'}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
