# %% [markdown]
# # 16. How far does a glioma reach beyond its outline?
#
# One real patient of Lipkova et al. 2019, IEEE Trans Med Imaging 38:1875 (doi:10.1109/TMI.2019.2902044; masks
# published with GliomaSolver, github.com/slitvinov/GliomaSolver, LGPL-2.1): a single visit with the region that takes
# up contrast agent (T1c), the one that is bright in FLAIR, and FET-PET inside the former. From one visit no speed can
# be known, but how far cells spread for what they grow can: D / k, and the place where it began. A contour of high cell
# fraction is held against the T1c outline, one of low cell fraction against that in FLAIR, both levels unknown, as
# Lipkova et al. 2019 and Zhang et al. 2025 (Med Image Anal 101:103423) do.
#
# Set `TUMORCAST_DATA` to the folder that holds `glioma_masks`.

# %%
import os
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.ndimage import distance_transform_edt, label

import biomodel as bm
import pinn
from biomodel.imaging.nifti import read_image
from biomodel.scoring import dice

source = Path(os.environ.get("TUMORCAST_DATA") or "/nowhere") / "glioma_masks"
if not (source / "WM.nii.gz").exists():
    print("Skipped: no glioma_masks/WM.nii.gz in the folder that TUMORCAST_DATA names.")
    sys.exit(0)
folder = Path(os.environ.get("TUMORCAST_EXAMPLES") or tempfile.mkdtemp())

# %% [markdown]
# ## The anatomy at 4 mm
# The surroundings of the lesion are cut out and blocks of 4³ voxels averaged. Tissue inside the T1c region, which the
# segmentation misreads, is that of the nearest voxel outside. The T1c region belongs to that of FLAIR.

# %%
FACTOR, MARGIN = 4, 24
raw = {n: read_image(source / f"{n}.nii.gz").values for n in ("WM", "GM", "tumT1c", "tumFLAIR", "tumPET")}
core = raw["tumT1c"] > 0
lesion = (raw["tumFLAIR"] > 0) | core
where = np.argwhere(lesion)
low = np.maximum(where.min(0) - MARGIN, 0) // FACTOR * FACTOR
high = np.minimum(where.max(0) + MARGIN, lesion.shape) // FACTOR * FACTOR
part = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
raw = {n: v[part] for n, v in raw.items()}
core, lesion = core[part], lesion[part]
white, grey, signal = raw["WM"] > 0, raw["GM"] > 0, raw["tumPET"]
nearest = distance_transform_edt(~((white | grey) & ~core), return_distances=False, return_indices=True)
white, grey = (np.where(core, tissue[tuple(nearest)], tissue) for tissue in (white, grey))


def coarse(values: np.ndarray) -> np.ndarray:
    """Mean over blocks of FACTOR³ voxels."""
    z, y, x = (n // FACTOR for n in values.shape)
    return values.reshape(z, FACTOR, y, FACTOR, x, FACTOR).mean((1, 3, 5))


tissues = {"white": coarse(white), "grey": coarse(grey)}
brain = tissues["white"] + tissues["grey"] >= 0.5
pieces, _ = label(brain)
brain = pieces == np.bincount(pieces.ravel())[1:].argmax() + 1
whole = bm.Domain.box(brain.shape, (float(FACTOR),) * 3, mask=brain, tissues=tissues)
plain = bm.Domain.box(brain.shape, (float(FACTOR),) * 3, mask=brain)
measured = coarse(signal > 0)
pet = np.where(measured >= 0.5, coarse(signal) / np.maximum(measured, 1e-9), np.nan)
imaged = pinn.Imaged((coarse(core) >= 0.5) * 1.0, (coarse(lesion) >= 0.5) * 1.0, pet)
inside = {"t1c": (imaged.t1c > 0.5) & brain, "flair": (imaged.flair > 0.5) & brain}
cm3 = FACTOR**3 / 1e3
print(f"{brain.shape} voxels of {FACTOR} mm; T1c region {inside['t1c'].sum() * cm3:.0f} cm³, with FLAIR "
      f"{inside['flair'].sum() * cm3:.0f} cm³")  # fmt: skip

# %% [markdown]
# ## Two models of the brain
# One D everywhere in the brain, or a tenth of it in grey matter. Same outlines, same likelihood, same priors;
# Gauss-Newton on the classical solver. Outlines err alike over about 10 mm, so a voxel counts as its share of a cube of
# that size.

# %%
fits = {}
for name, domain in (("one D", plain), ("white and grey", whole)):
    began = time.process_time()
    fit = pinn.infer_joint(pinn.glioma_problem(domain, imaged))
    fits[name] = fit
    u = np.asarray(fit.problem.simulation(fit.problem.physical(fit.z), fit.problem.u0(fit.z), [pinn.DURATION]))[0, 0]
    found = pinn.Infiltration.of(fit)
    overlap = ", ".join(f"{n} {dice((u >= fit.values[f'{n}.threshold']) & brain, inside[n]):.2f}" for n in inside)
    print(f"\n{name}: log evidence {fit.log_evidence:.1f}, {time.process_time() - began:.1f} CPU-seconds")
    print("  D / k {1:.0f} mm² ({0:.0f} to {2:.0f})".format(*found.ratio),
          "infiltration length {1:.1f} mm ({0:.1f} to {2:.1f})".format(*found.length),
          "k T {1:.1f} ({0:.1f} to {2:.1f})".format(*found.generations), sep=", ")  # fmt: skip
    print("  seed (mm in the box): " + ", ".join(
        f"{n[-1]} {m:.1f} ({a:.1f} to {b:.1f})" for n, (a, m, b) in found.seed.items()))  # fmt: skip
    print(f"  levels: T1c {fit.values['t1c.threshold']:.2f}, FLAIR {fit.values['flair.threshold']:.2f}; Dice {overlap}")
    beyond = (u * brain)[~inside["flair"]].sum() / (u * brain).sum()
    print(f"  cells outside the FLAIR outline: {beyond:.0%}")
distance = np.where(brain, distance_transform_edt(~inside["t1c"]), np.inf)
ball = distance <= np.sort(distance.ravel())[inside["flair"].sum() - 1]
print(f"\nthe T1c region grown by distance alone to the FLAIR volume: Dice {dice(ball, inside['flair']):.2f}")

# %% [markdown]
# ## The network
# It takes the same outlines with the same likelihood, in the same brain with one D, from the classical optimum on.

# %%
network = pinn.PinnSolver(rtol=4e-2, frequencies=4, hidden=(10, 10))
classical = fits["one D"]
began = time.process_time()
by_network = pinn.infer_joint(classical.problem.by(network), begin=classical.z, iterations=2, tolerance=0.3)
moved = (by_network.z - classical.z) / classical.sd
print(f"network: {time.process_time() - began:.1f} CPU-seconds,",
      "D / k {1:.0f} mm² ({0:.0f} to {2:.0f})".format(*pinn.Infiltration.of(by_network).ratio))  # fmt: skip
print("off the classical optimum (posterior sd): "
      + ", ".join(f"{n} {v:+.2f}" for n, v in zip(classical.problem.names[:7], moved, strict=False)))  # fmt: skip

# %% [markdown]
# ## What it means
# D / k differs between the two brains by more than either interval says, and the overlap with the outlines hardly tells
# them apart. Intervals hold if the model is right; the evidence says which of the two is less wrong, not that it is
# true.

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
centre = [int(round(float(c))) for c in np.argwhere(inside["t1c"]).mean(0)]
fit = max(fits.values(), key=lambda f: f.log_evidence)
u = np.asarray(fit.problem.simulation(fit.problem.physical(fit.z), fit.problem.u0(fit.z), [pinn.DURATION]))[0, 0]
seed = [fit.values[f"focus1.{a}"] / FACTOR for a in "zyx"]
for axis, cut, place in zip(axes, ("axial", "coronal", "sagittal"), range(3), strict=True):
    anatomy, state, t1c, flair = (
        np.take(v, centre[place], axis=place) for v in (tissues["white"] * brain, u, inside["t1c"], inside["flair"])
    )
    axis.imshow(anatomy, origin="lower", cmap="gray", vmax=1.5)
    image = axis.imshow(np.where(state > 0.01, state, np.nan), origin="lower", cmap="plasma", vmin=0, vmax=1, alpha=0.7)
    axis.contour(flair * 1.0, [0.5], colors="cyan", linewidths=1.4)
    axis.contour(t1c * 1.0, [0.5], colors="white", linewidths=1.4)
    rows = [seed[i] for i in range(3) if i != place]
    axis.plot(rows[1], rows[0], "k+", markersize=10, markeredgewidth=2)
    axis.set(title=f"{cut}: FLAIR (cyan), T1c (white), seed (+)", xticks=[], yticks=[])
figure.colorbar(image, ax=axes, label="cell fraction", shrink=0.7)
figure.savefig(folder / "glioma_outline.png", dpi=90)
