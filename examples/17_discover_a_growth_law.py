# %% [markdown]
# # 17. Discover a growth law
#
# How fast does tumour grow where it is sparse, and where it is dense? Logistic growth is a guess. Here the law is
# learned from four images, together with the diffusivity: a small network for growth as a function of the cell
# fraction, trained beside one for the state (Lagergren et al. 2020, doi:10.1371/journal.pcbi.1008462). All is virtual;
# the truth is Gompertz's law, which the learned family does not hold, solved on cells a quarter as large by another
# method.

# %%
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import biomodel as bm
import pinn
from biomodel.errors import SolverError
from biomodel.truth import Hazard, average, integrate

folder = Path(os.environ.get("TUMORCAST_EXAMPLES") or tempfile.mkdtemp())
K, D, N, SPACING, FINER = 0.06, 0.3, 32, 1.5, 4
DAYS, LATER = [0.0, 12.0, 24.0, 40.0], 60.0

# %% [markdown]
# ## The images
# A start that is known well, and three images with an error of 5 % of the densest.

# %%
fine = bm.Domain.box((1, N * FINER, N * FINER), (SPACING, SPACING / FINER, SPACING / FINER))
y, x = np.meshgrid(*(fine.coords[a] - fine.coords[a].mean() for a in "yx"), indexing="ij")
start = 0.15 * np.exp(-(x**2 + y**2) / (2 * 4.0**2))[None]
run = integrate(start[None], fine.mask, np.full(fine.shape, D), fine.spacing, K, Hazard.none(), [*DAYS[1:], LATER],
                gompertz_floor=1e-30, cutoff=-1)  # fmt: skip
truth = np.stack([average(u, (1, FINER, FINER))[0] for u in (start[None], *run)])
sds = np.array([0.004] + 3 * [0.05 * truth[:4].max()])
images = truth[:4] + sds[:, None, None, None] * np.random.default_rng(10).standard_normal(truth[:4].shape)
domain = bm.Domain.box((1, N, N), (SPACING,) * 3)

# %% [markdown]
# ## The law
# `NetworkGrowth` is a term like any other, with the network's weights as its parameters. What comes back is the law
# with a band, over the cell fractions that the images show.

# %%
model = bm.ReactionDiffusion(pinn.NetworkGrowth(), bm.Isotropic(bm.LogNormal(0.1, 1.0)))
began = time.process_time()
found = pinn.discover(model, domain, DAYS, images, sds)
u = np.linspace(*found.visited, 200)
true = -K * u * np.log(u)
print(f"in {time.process_time() - began:.0f} CPU-seconds; D = {found.values['diffusion.D']:.2f} mm²/day, true {D}")
print(f"largest error between cell fractions {u[0]:.2f} and {u[-1]:.2f}: "
      f"{np.abs(found.growth(u) - true).max() / true.max():.1%} of the largest growth")  # fmt: skip

# %% [markdown]
# ## A formula
# Formulas from a small library, fitted to the learned law in units of its own uncertainty. The best by Akaike's
# criterion comes first; without Gompertz's among them, the generalised logistic law takes its place.

# %%
for one in found.formulas():
    said = ", ".join(f"{n} {v:.3g}" for n, v in one.values.items())
    print(f"{type(one.term).__name__:10} criterion {one.criterion:7.1f}, off by {one.departure:.1%}   {said}")

# %% [markdown]
# ## A table, for every solver
# The law as a table is a term that every solver takes, and so is a formula. Below the noise of a voxel the images say
# nothing of the law, but tumour there grows, too, and with Gompertz's law fast: the table continues the law there as
# the network happens to, the formula by its form. `tests/benchmarks/bench_discover.py` has Gauss-Newton on the table's
# values beside this: it forecasts better than the network's table.

# %%
table = found.tabulated()
values = {name: parameter.typical for name, parameter in table.parameters.items()}
formula = replace(model, growth=found.formulas()[0].term)
u0 = torch.tensor(truth[:1])


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


solved = bm.TorchSolver(rtol=3e-3).build(table, domain, bm.Schedule())(values, u0, [*DAYS[1:], LATER])[0].numpy()
own = bm.TorchSolver().build(formula, domain, bm.Schedule())({"diffusion.D": values["diffusion.D"]}, u0, [LATER])
print(f"forecast of day {LATER:g}, relative error: table {relative(solved[-1], truth[-1]):.1%}, formula "
      f"{relative(own[0, 0].numpy(), truth[-1]):.1%}, last image carried forward "
      f"{relative(images[-1], truth[-1]):.0%}")  # fmt: skip
try:
    other = bm.FenicsSolver().build(table, domain, bm.Schedule())(values, u0, [*DAYS[1:], LATER])[0].numpy()
    worst = max(relative(a, b) for a, b in zip(other, solved, strict=True))
    print(f"finite elements and finite volumes differ by at most {worst:.2%}")
except SolverError as error:
    print(f"without FEniCS: {error}")

# %%
figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
low, high = found.band(u)
axis.fill_between(u, low, high, alpha=0.3, label="90 % band")
axis.plot(u, found.growth(u), label="learned")
axis.plot(u, true, "k--", label="true")
axis.set(xlabel="cell fraction", ylabel="growth, 1/day", title="A growth law from four images")
axis.legend()
figure.savefig(folder / "law.png", dpi=130)
