# %% [markdown]
# # 9. A stiff capsule: what mechanics changes
#
# A growing tumour presses on the tissue around it, and cells move less where stress is high. Here the same tumour grows
# three times in one slice of fat: by plain diffusion, with mechanics, and with mechanics inside a stiff capsule that
# has a gap on its right. The tumour is made up; fat and tumour are as stiff as in models of the breast, the capsule is
# a hundred times stiffer than fat.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import biomodel as bm
from biomodel.mechanics import Elastic, StressDamped

folder = Path(os.environ.get("TUMORCAST_EXAMPLES") or tempfile.mkdtemp())
DAYS = [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
VISIBLE = 0.15

# %% [markdown]
# ## Tissue
# Fat of 2 kPa and, where there is one, a capsule of 200 kPa, 3 mm thick, around the tumour. The organ's edge is held.

# %%
SHAPE, SPACING = (1, 80, 80), (1.0, 1.0, 1.0)
y, x = np.meshgrid(*(np.arange(n) - n / 2 + 0.5 for n in SHAPE[1:]), indexing="ij")
radius, angle = np.hypot(x, y)[None], np.arctan2(y, x)[None]
organ = radius < 39
shell = (radius > 11) & (radius < 14) & (np.abs(angle) > np.pi / 8)
start = 0.8 * np.exp(-((radius / 5) ** 2))


def tissue(capsule):
    share = (shell & capsule).astype(float)
    return bm.Domain.box(SHAPE, SPACING, organ, tissues={"adipose": 1 - share, "capsule": share})


# %% [markdown]
# ## Three models
# `Elastic` is data: which tissues there are, how stiff they are and how hard cells press. The solver turns it into the
# field `von_mises`, which `StressDamped` reads: D = D0 exp(-gamma sigma). Nothing is calibrated here; all three share
# growth and D0.

# %%
mechanics = Elastic(tissues=("adipose", "capsule"), moduli=(bm.Fixed(2.0), bm.Fixed(200.0)))
damped = StressDamped(mechanics=mechanics)
cases = {
    "no mechanics": (bm.Isotropic(), False),
    "mechanics": (damped, False),
    "mechanics, capsule": (damped, True),
}
values = {"growth.k": 0.06, "diffusion.D": 0.4}
states, stresses, shifts = {}, {}, {}
for name, (diffusion, capsule) in cases.items():
    model = bm.ReactionDiffusion(bm.Logistic(), diffusion)
    simulation = bm.TorchSolver().build(model, tissue(capsule), bm.Schedule())
    states[name] = simulation(values, start, DAYS)[0].numpy()
    if model.auxiliaries:
        stress, displacement = simulation.stress(values, states[name])
        stresses[name], shifts[name] = stress.numpy(), np.linalg.norm(displacement.numpy(), axis=1)

# %% [markdown]
# ## What changes
# Areas of visible tumour; how much of it lies beyond the capsule, and on which side; stress and displacement.

# %%
seen = {name: u >= VISIBLE for name, u in states.items()}
beyond, gap = radius > 14, np.abs(angle) < np.pi / 4
print(f"Visible area (cm²) on days {', '.join(f'{day:g}' for day in DAYS)}; then the last day")
for name, u in states.items():
    outside = (u[-1] * beyond).sum()
    print(f"{name}: {', '.join(f'{area / 100:.1f}' for area in seen[name].sum((1, 2, 3)))}")
    towards = (u[-1] * beyond * gap).sum() / outside
    print(f"    {outside / u[-1].sum():.0%} of cells beyond 14 mm, {towards:.0%} of them in the quarter around the gap")
    if name in stresses:
        rim = seen[name][-1] & (u[-1] < 0.5)
        print(f"    von Mises stress {stresses[name][-1][rim].mean():.2f} kPa at the tumour's rim, at most "
              f"{stresses[name][-1].max():.1f} kPa; tissue moved by up to {shifts[name][-1].max():.1f} mm")  # fmt: skip

# %% [markdown]
# ## Would a lower diffusivity do?
# Plain diffusion at many D0, and how well the best of them overlaps with the tumour that mechanics makes.

# %%
plain = bm.TorchSolver().build(bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic()), tissue(False), bm.Schedule())
trials = np.geomspace(0.001, 0.4, 40)
grown = [plain({**values, "diffusion.D": d}, start, DAYS[-1:])[0, -1].numpy() >= VISIBLE for d in trials]
for name in stresses:
    goal = seen[name][-1]
    dice = [2 * (one & goal).sum() / (one.sum() + goal.sum()) for one in grown]
    best = int(np.argmax(dice))
    print(f"{name}: the best plain D0 is {trials[best]:.2g} instead of {values['diffusion.D']:g} mm²/day; it gives a "
          f"Dice of {dice[best]:.2f}")  # fmt: skip

# %% [markdown]
# ## Maps
# Cell fraction and stress on the last day, with the outline of visible tumour (dashed: at the start) and of the capsule
# (dotted), and the visible area over time.

# %%
figure, axes = plt.subplots(2, 3, figsize=(9.5, 6.4), layout="constrained")
extent = (-40, 40, -40, 40)
for column, (name, u) in enumerate(states.items()):
    top, bottom = axes[:, column]
    shown = np.where(organ[0], u[-1, 0], np.nan)
    picture = top.imshow(shown, origin="lower", extent=extent, vmin=0, vmax=1, cmap="magma")
    top.contour(x, y, u[-1, 0], [VISIBLE], colors="w", linewidths=1)
    top.contour(x, y, u[0, 0], [VISIBLE], colors="w", linewidths=0.6, linestyles="--")
    top.set(title=name, xlabel="mm")
    if name in stresses:
        shown = np.where(organ[0], stresses[name][-1, 0], np.nan)
        pressed = bottom.imshow(shown, origin="lower", extent=extent, norm="log", cmap="viridis", clim=(0.01, 10))
        bottom.contour(x, y, u[-1, 0], [VISIBLE], colors="w", linewidths=1)
    axes[1, 0].plot(DAYS, seen[name].sum((1, 2, 3)) / 100, marker="o", ms=3, label=name)
    for axis in (top, bottom) if "capsule" in name else ():
        axis.contour(x, y, shell[0], [0.5], colors="c", linewidths=0.8, linestyles=":")
axes[1, 0].set(xlabel="day", ylabel="visible area, cm²")
axes[1, 0].legend(frameon=False)
figure.colorbar(picture, ax=axes[0], label=f"cell fraction, day {DAYS[-1]:g}")
figure.colorbar(pressed, ax=axes[1], label="von Mises stress, kPa")
figure.savefig(folder / "stiff_capsule.png", dpi=120)
print(f"Figure: {folder / 'stiff_capsule.png'}")
