# %% [markdown]
# # 15. An unknown start
#
# Three visits at odd intervals, a map of cell fractions at two of them and only an outline at the one between; the
# first is two weeks after the day from which we want to know the state. Where did the tumour begin, in how many places,
# how fast does it divide and spread, and how good are the images? All of it is inferred at once, by a physics-informed
# network whose weights are eliminated. All is virtual: the truth is solved on voxels a third as wide, by another
# method.

# %%
import os
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import biomodel as bm
import pinn
from biomodel.truth import Hazard, average, integrate

folder = Path(os.environ.get("TUMORCAST_EXAMPLES") or tempfile.mkdtemp())
SHAPE, SPACING, FINER = (1, 28, 28), (2.5, 2.5, 2.5), 3
TRUE = {"growth.k": 0.07, "diffusion.D": 0.15}
VISITS, LATER, NOISE, THRESHOLD = [14.0, 31.0, 40.0], 60.0, 0.06, 0.25

# %% [markdown]
# ## The data
# Two foci of different size. A strip of the last image is missing.

# %%
domain = bm.Domain.box(SHAPE, SPACING)
fine = bm.Domain.box((1, 28 * FINER, 28 * FINER), (2.5, 2.5 / FINER, 2.5 / FINER))
y, x = (np.arange(28 * FINER) + 0.5) * 2.5 / FINER - 1.25, (np.arange(28 * FINER) + 0.5) * 2.5 / FINER - 1.25
empty = np.ones(fine.shape)
for row, column, peak, width in ((26.0, 30.0, 0.5, 4.5), (44.0, 40.0, 0.25, 3.5)):
    empty *= 1 - peak * np.exp(-((y[:, None] - row) ** 2 + (x - column) ** 2) / (2 * width**2))[None]
run = list(integrate((1 - empty)[None], fine.mask, np.full(fine.shape, TRUE["diffusion.D"]), fine.spacing,
                     TRUE["growth.k"], Hazard.none(), [*VISITS, LATER]))  # fmt: skip
truth = [average(u, (1, FINER, FINER))[0] for u in run]
rng = np.random.default_rng(4)
first, last = (truth[i] + NOISE * rng.standard_normal(SHAPE) for i in (0, 2))
last[..., 4:9] = np.nan
outline = (truth[1] + 0.04 * rng.standard_normal(SHAPE) > THRESHOLD).astype(float)

# %% [markdown]
# ## What is asked
# Each kind of data is a likelihood with unknowns of its own: the noise of a map; threshold and softness of an outline.
# The start is one focus, two or three; the evidence of the data tells which (a further
# focus must explain more than it costs).

# %%
cells, drawn = pinn.Cells(), pinn.Outline()
seen = [pinn.Observation(VISITS[0], first, cells), pinn.Observation(VISITS[1], outline, drawn),
        pinn.Observation(VISITS[2], last, cells)]  # fmt: skip
model = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic())
problem = pinn.JointProblem(model, domain, bm.Schedule(), pinn.Foci(1), 0.0, seen)
began = time.process_time()
posterior = pinn.choose_start(problem, [pinn.Foci(1), pinn.Foci(2), pinn.Foci(3)])
print(f"{posterior.problem.start} has the highest evidence; {time.process_time() - began:.1f} CPU-seconds")
posterior = pinn.resampled(posterior)
single = pinn.infer_joint(problem)
print(f"log evidence: {posterior.log_evidence:.1f}, one focus {single.log_evidence:.1f}")

# %% [markdown]
# The Gaussian around the optimum is corrected by importance sampling: draws are weighed by the classical solver.

# %%
known = {**TRUE, "cells.noise": NOISE, "outline.threshold": THRESHOLD}
for name, (low, high) in posterior.interval(0.9).items():
    true = f", true {known[name]:g}" if name in known else ""
    print(f"{name:18s} {posterior.values[name]:8.4g}  ({low:.4g} to {high:.4g}{true})")
print(f"effective sample size {posterior.samples.ess:.0f} of {len(posterior.samples.z)} draws")

# %% [markdown]
# ## The forecast
# Twenty days on, solved anew by the classical solver from 200 draws. The network's own forecast stands beside it.

# %%
forecast = pinn.forecast_joint(posterior, [0.0, LATER], draws=200)
alone = pinn.forecast_joint(single, [0.0, LATER], draws=50)
size = np.linalg.norm(truth[3])
volume = float((run[3] >= forecast.level).sum() * np.prod(fine.spacing))
low, high = forecast.interval()[:, 1]
print(f"day {LATER:g}, volume above {forecast.level:g}: {forecast.volume[:, 1].mean() / 1e3:.2f} cm³ "
      f"({low / 1e3:.2f} to {high / 1e3:.2f}), true {volume / 1e3:.2f}")  # fmt: skip
errors = {
    "solved anew": forecast.solved[1], "the network's own": forecast.own[1], "one focus": alone.solved[1],
    "last image carried forward": np.where(np.isfinite(last), last, truth[2]),
}  # fmt: skip
print("error of the state: " + ", ".join(f"{n} {np.linalg.norm(u - truth[3]) / size:.1%}" for n, u in errors.items()))
print(f"network and classical solver differ by {forecast.gap.relative[1]:.1%}")

# %%
figure, axes = plt.subplots(1, 4, figsize=(16, 3.8), layout="constrained")
extent = (-1.25, 68.75, -1.25, 68.75)
start = average((1 - empty)[None], (1, FINER, FINER))[0, 0]
shown = ((first[0], "measured, day 14"), (forecast.mean[0, 0], "inferred start, day 0"),
         (forecast.mean[1, 0], "forecast, day 60"), (forecast.sd[1, 0], "its sd"))  # fmt: skip
for axis, (values, title) in zip(axes, shown, strict=True):
    top = 0.1 if title == "its sd" else 1
    image = axis.imshow(values, origin="lower", extent=extent, vmin=0, vmax=top, cmap="magma")
    axis.set(title=title, xlabel="x, mm", ylabel="y, mm")
    figure.colorbar(image, ax=axis, shrink=0.8)
for axis, true, found in ((axes[1], start, forecast.mean[0, 0]), (axes[2], truth[3][0], forecast.mean[1, 0])):
    axis.contour(true, [0.1, 0.3], extent=extent, colors="white", linestyles="--", linewidths=1.2)
    axis.contour(found, [0.1, 0.3], extent=extent, colors="deepskyblue", linewidths=1.2)
axes[1].plot([], [], "w--", label="true")
axes[1].plot([], [], color="deepskyblue", label="inferred")
axes[1].legend(loc="upper right", labelcolor="white", facecolor="black", edgecolor="none", framealpha=0.4)
figure.savefig(folder / "unknown_start.png", dpi=110)
