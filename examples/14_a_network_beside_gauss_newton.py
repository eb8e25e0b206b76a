# %% [markdown]
# # 14. A physics-informed network beside Gauss-Newton
#
# Two noisy images of one slice, and two unknowns: how fast the tumour's cells divide and how fast
# they spread. A physics-informed network solves the same model object as the classical solver, without a grid. Both are
# given the same data and the same priors. All is virtual: the truth is solved on voxels a quarter as large, by another
# method than either solver's.

# %%
import os
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import biomodel as bm
import pinn
from biomodel.truth import Hazard, average, integrate

folder = Path(os.environ.get("TUMORCAST_EXAMPLES") or tempfile.mkdtemp())
SHAPE, SPACING, FINER = (1, 24, 24), (2.5, 2.5, 2.5), 4
TRUE = {"growth.k": 0.09, "diffusion.D": 0.25}
VISITS, LATER = [15.0, 30.0], 50.0

# %% [markdown]
# ## The data
# A small dense tumour on voxels of 2.5 mm: it is hardly wider than four of them. Voxels are averages of what they hold,
# with an error of 5 % of the densest.

# %%
fine = bm.Domain.box((1, 24 * FINER, 24 * FINER), (2.5, 2.5 / FINER, 2.5 / FINER))
y, x = np.meshgrid(*(fine.coords[a] - fine.coords[a].mean() for a in "yx"), indexing="ij")
start = 0.6 * np.exp(-(((x + 2) / 5) ** 2) - ((y - 3) / 4.2) ** 2)[None]
run = integrate(start[None], fine.mask, np.full(fine.shape, TRUE["diffusion.D"]), fine.spacing, TRUE["growth.k"],
                Hazard.none(), [*VISITS, LATER])  # fmt: skip
truth = np.stack([average(u, (1, FINER, FINER))[0] for u in run])
u0 = torch.tensor(average(start[None], (1, FINER, FINER))[0][None])
sd = 0.05 * truth[:2].max()
data = truth[:2] + sd * np.random.default_rng(1).standard_normal(truth[:2].shape)

# %% [markdown]
# ## Two fits
# `StateProblem` takes a built simulation of any solver. Gauss-Newton moves the two parameters; a network follows along
# the tangent of its trained weights, and is trained further at the new parameters. Its weights are marginalised: what
# comes out is the covariance of the two physical parameters, as from the classical solver.

# %%
domain = bm.Domain.box(SHAPE, SPACING)
model = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic())
network = pinn.PinnSolver(hidden=(14, 14), frequencies=4, rtol=3e-3).build(model, domain, bm.Schedule())
classical = bm.TorchSolver().build(model, domain, bm.Schedule())
fits = {}
for name, simulation in (("network", network), ("Gauss-Newton", classical)):
    began = time.process_time()
    fits[name] = pinn.infer(pinn.StateProblem(model, simulation, u0, VISITS, data, sd))
    seconds = time.process_time() - began
    z, spread = fits[name].z, fits[name].sd
    low, high = np.exp(z - 1.645 * spread), np.exp(z + 1.645 * spread)
    print(f"{name:13s} {seconds:5.1f} CPU-seconds", *(
        f"{n} {np.exp(v):.4f} ({a:.4f} to {b:.4f}, true {TRUE[n]:g})"
        for n, v, a, b in zip(fits[name].values, z, low, high, strict=True)
    ))  # fmt: skip

# %% [markdown]
# The classical fit takes a hundredth of the time. Its grid is coarse for this tumour, though, and moves the parameters;
# how far, the network tells, which has no grid: the difference of both solutions at the same parameters, projected onto
# them. (A calibration of a patient, `bm.calibrate`, measures the grid's error by itself and counts it as an unknown;
# halving the voxels does the same at a tenth of the network's cost.)

# %%
at = fits["Gauss-Newton"].values
gap = (classical(at, u0, VISITS) - network(at, u0, VISITS)).numpy().ravel() / sd
moved = fits["Gauss-Newton"].displaced(-gap)
for name, shift in zip(at, moved, strict=True):
    print(f"the grid moves {name} by {shift:+.2f} posterior standard deviations")

# %% [markdown]
# ## The forecast
# The classical solver takes the network's parameters and goes on to day 50. The network's own forecast, trained over
# the whole span, stands beside it: where the two differ much, one of them is not to be trusted.

# %%
values = fits["network"].values
solved = classical(values, u0, [LATER])[0, 0].numpy()
own = network(values, u0, [LATER])[0, 0].numpy()
size = np.linalg.norm(truth[2])
print(f"forecast of day {LATER:g}, relative error: re-solved {np.linalg.norm(solved - truth[2]) / size:.1%}, "
      f"the network's own {np.linalg.norm(own - truth[2]) / size:.1%}; "
      f"last image carried forward {np.linalg.norm(data[1] - truth[2]) / size:.0%}")  # fmt: skip
print(f"residual of the network at points it never saw: {network.held_out:.1e} of the cell fraction")

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
extent = (-30, 30, -30, 30)
for axis, values_, title in ((axes[0], data[1, 0], "measured, day 30"), (axes[1], own[0], "network, day 50")):
    image = axis.imshow(values_, origin="lower", extent=extent, vmin=0, vmax=1, cmap="magma")
    axis.set(title=title, xlabel="x, mm", ylabel="y, mm")
axes[1].contour(truth[2, 0], [0.15, 0.5], extent=extent, colors="white", linestyles="--", linewidths=1.2)
axes[1].contour(own[0], [0.15, 0.5], extent=extent, colors="deepskyblue", linewidths=1.2)
axes[1].plot([], [], "w--", label="true")
axes[1].plot([], [], color="deepskyblue", label="network")
axes[1].legend(loc="upper right", labelcolor="white", facecolor="black", edgecolor="none", framealpha=0.4)
figure.colorbar(image, ax=axes[1], label="cell fraction")
angle = np.linspace(0, 2 * np.pi, 200)
for name, colour in (("network", "deepskyblue"), ("Gauss-Newton", "darkorange")):
    root = np.linalg.cholesky(fits[name].covariance)
    # Nine tenths of a Gaussian in two dimensions lie within 2.146 standard deviations.
    k, d = np.exp(fits[name].z[:, None] + 2.146 * root @ np.stack((np.cos(angle), np.sin(angle))))
    axes[2].plot(k, d, color=colour, label=name)
    axes[2].plot(*np.exp(fits[name].z), "o", color=colour, markersize=4)
axes[2].plot(TRUE["growth.k"], TRUE["diffusion.D"], "kx", label="true", markersize=8)
axes[2].set(xlabel="growth rate, 1/day", ylabel="diffusivity, mm²/day", title="90 % regions of the posterior")
axes[2].legend(loc="upper right")
figure.savefig(folder / "network.png", dpi=130)
