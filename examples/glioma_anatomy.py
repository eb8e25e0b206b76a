# %% [markdown]
# # Growth through a real brain
#
# One real glioma patient of Lipkova et al. 2019, IEEE Trans Med Imaging 38:1875 (doi:10.1109/TMI.2019.2902044; masks
# published with GliomaSolver, github.com/slitvinov/GliomaSolver, LGPL-2.1): white matter, grey matter, the region
# that takes up contrast agent (T1c) and the one that is bright in FLAIR, 256³ voxels of 1 mm. There is one visit, so
# nothing can be calibrated. This script asks what the model and the solver do in a real anatomy: cells run along white
# matter, stop at ventricles and between the folds, and the solver stays quick.
#
# Set `TUMORCAST_DATA` to the folder that holds `glioma_masks`; the figure goes to a folder given as argument, or to a
# temporary one.

# %%
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.ndimage import distance_transform_edt, label

import biomodel as bm
from biomodel.imaging.nifti import read_image
from biomodel.scoring import dice

source = Path(os.environ.get("TUMORCAST_DATA") or "/nowhere") / "glioma_masks"
if not (source / "WM.nii.gz").exists():
    print("Skipped: no glioma_masks/WM.nii.gz in the folder that TUMORCAST_DATA names.")
    sys.exit(0)
given = os.environ.get("TUMORCAST_EXAMPLES") or (sys.argv[1] if len(sys.argv) > 1 else None)
folder = Path(given or tempfile.mkdtemp()) / "glioma_anatomy"
folder.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The anatomy at 2 mm
# Blocks of 2 × 2 × 2 voxels are averaged, so that tissues become fractions. The files give each voxel of the brain to
# one tissue, and almost all of the T1c region to grey matter: the segmentation was made on the tumour itself and says
# nothing of the tissue that was there. Its voxels are therefore given the tissue of the nearest brain voxel outside.
# Swollen white matter is dark like grey matter, too: more than half of the FLAIR region is called grey, and left so
# since nothing near it says better. There the model spreads too slowly.


# %%
def load(name: str) -> np.ndarray:
    return read_image(source / f"{name}.nii.gz").values


def halve(values: np.ndarray) -> np.ndarray:
    """Mean over blocks of 2 × 2 × 2 voxels."""
    z, y, x = (n // 2 for n in values.shape)
    return values[: 2 * z, : 2 * y, : 2 * x].reshape(z, 2, y, 2, x, 2).mean((1, 3, 5))


white, grey, core, edema = (load(name) > 0 for name in ("WM", "GM", "tumT1c", "tumFLAIR"))
print(f"T1c region {core.sum() / 1e3:.1f} cm³, {100 * (core & grey).sum() / core.sum():.0f} % of it called grey matter")
print(f"FLAIR region {edema.sum() / 1e3:.1f} cm³; it does not include the T1c region: {not (edema & core).any()}")
print(f"  {100 * (edema & grey).sum() / edema.sum():.0f} % of it called grey matter")
healthy = (white | grey) & ~core
nearest = distance_transform_edt(~healthy, return_distances=False, return_indices=True)
white, grey = (np.where(core, tissue[tuple(nearest)], tissue) for tissue in (white, grey))
white_part, grey_part, core_part = halve(white), halve(grey), halve(core)
lesion = halve(core | edema) >= 0.5
brain = white_part + grey_part >= 0.5
pieces, _ = label(brain)
brain = pieces == np.bincount(pieces.ravel())[1:].argmax() + 1  # the one connected brain, without specks
box = bm.Domain.box(brain.shape, (2.0, 2.0, 2.0)).bounding_box(brain, 2.0)
domain = bm.Domain.box(brain.shape, (2.0, 2.0, 2.0), mask=brain, tissues={"white": white_part, "grey": grey_part})
domain = domain.crop(box)
core_part, lesion = core_part[box] * domain.mask, lesion[box] & domain.mask
cm3 = domain.voxel_volume / 1e3
print(domain)

# %% [markdown]
# ## The model
# Swanson et al. 2000 (Cell Prolif 33:317, doi:10.1046/j.1365-2184.2000.00177.x) and Harpold et al. 2007 (J Neuropathol
# Exp Neurol 66:1, doi:10.1097/nen.0b013e31802d9000) let cells move faster in white matter, about five times: for a
# high-grade glioma 0.65 mm²/day in white and 0.13 in grey matter, with a growth of 0.012 per day. GliomaSolver takes
# ten times. D = 0.13 in white, a tenth of it in grey matter, and k = 0.025 per day make a front in white matter of
# 2 √(D k) = 0.11 mm/day, 3.5 mm a month, as untreated high-grade gliomas have (about 3 mm a month: Swanson et al. 2003,
# J Neurol Sci 216:1, doi:10.1016/j.jns.2003.06.001). Both sets are run.
#
# At the start the T1c region holds cells at 0.8 of its share of each voxel, and nothing is outside.

# %%
model = bm.ReactionDiffusion(bm.Logistic(), bm.TissueDiffusion(tissues=("white", "grey")))
SETS = {
    "ten to one": {"diffusion.D_white": 0.13, "diffusion.D_grey": 0.013, "growth.k": 0.025},
    "Swanson, five to one": {"diffusion.D_white": 0.65, "diffusion.D_grey": 0.13, "growth.k": 0.012},
}
DAYS = [0.0, 60.0, 120.0, 180.0]
start = torch.tensor(0.8 * core_part)


def share_white(cells: np.ndarray) -> float:
    """Share of cells that lie in white matter."""
    both = domain.tissues["white"] + domain.tissues["grey"]
    return float((cells * domain.tissues["white"] / np.where(both > 0, both, 1)).sum() / cells.sum())


states = {}
for name, values in SETS.items():
    simulation = bm.TorchSolver().build(model, domain, bm.Schedule())
    before, clock = time.process_time(), time.perf_counter()
    with torch.no_grad():
        u = simulation(values, start, DAYS)[0].numpy()
    spent = f"{time.perf_counter() - clock:.2f} s ({time.process_time() - before:.2f} s of CPU)"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    states[name] = u
    print(f"\n{name}: {DAYS[-1]:g} days in {spent}; most memory of the process so far {peak:.2f} GB")
    outside = np.abs(u[:, ~domain.mask]).max()
    print(f"  cell fraction from {u.min():.1e} to {u.max():.3f}; outside the brain {outside:g}")
    with torch.no_grad():
        exact = bm.TorchSolver(rtol=1e-5).build(model, domain, bm.Schedule())(values, start, DAYS)[0].numpy()
    error = np.linalg.norm(u[-1] - exact[-1]) / np.linalg.norm(exact[-1])
    print(f"  error in time {error:.1e} (relative, day {DAYS[-1]:g}, against a tolerance of 1e-5)")
    for day, now in zip(DAYS, u, strict=True):
        sizes = ", ".join(f"{(now >= level).sum() * cm3:6.1f} at {level:g}" for level in (0.01, 0.05, 0.15, 0.5))
        print(f"  day {day:3g}: cm³ {sizes}; cells fill {now.sum() * cm3:5.1f} cm³")
    # What has come in 180 days, against the tissue that lies within the same distance.
    new = (u[-1] >= 0.01) & (u[0] < 0.01)
    reach = distance_transform_edt(u[0] < 0.01, sampling=domain.spacing)
    near = domain.mask & (u[0] < 0.01) & (reach <= np.quantile(reach[new], 0.95))
    print(
        f"  newly reached (0.01): {100 * share_white(new * 1.0):.0f} % white matter, all brain within the same "
        f"{reach[near].max():.0f} mm {100 * share_white(near * 1.0):.0f} %"
    )
    for tissue in ("white", "grey"):
        pure = new & (domain.tissues[tissue] > 0.9)
        typical = np.quantile(reach[pure], 0.95)
        print(f"  farthest in {tissue} matter {reach[pure].max():.0f} mm, 95th percentile {typical:.0f} mm")

# %% [markdown]
# ## Against the FLAIR region
# The bright region in FLAIR (here with the T1c region inside it) is swelling with few cells. If the model's contour of
# a low cell fraction had the same shape, their overlap would be high at some level. The simulation is of the *future*
# of the T1c region while FLAIR is of the same day, and oedema is not cells: only the shape can be compared. As a
# yardstick, the T1c region is also grown by distance alone until it has the lesion's volume: the model's contour is
# worth its equation where it overlaps more than that. Here it does not.

# %%
print(f"\nFLAIR and T1c region: {lesion.sum() * cm3:.1f} cm³")
distance = np.where(domain.mask, distance_transform_edt(core_part < 0.5, sampling=domain.spacing), np.inf)
ball = distance <= np.sort(distance.ravel())[lesion.sum() - 1]
print(f"  grown by distance alone to the same volume: Dice {dice(ball, lesion):.2f}")
print(f"  T1c region itself: Dice {dice(core_part >= 0.5, lesion):.2f}")
for name, u in states.items():
    last = u[-1]
    overlaps = ", ".join(f"{dice(last >= level, lesion):.2f} at {level:g}" for level in (0.001, 0.01, 0.05, 0.15))
    same = last >= np.sort(last.ravel())[-lesion.sum()]
    level = last[same].min()
    equal = f"at the same volume (level {level:.1e}) {dice(same, lesion):.2f}"
    print(f"  {name}, day {DAYS[-1]:g}: Dice {overlaps}; {equal}")

# %% [markdown]
# ## Look at it
# White matter is light; contours at 0.01, 0.15 and 0.5; the lesion seen in FLAIR and T1c is outlined.

# %%
centre = [int(round(float(c))) for c in np.argwhere(core_part >= 0.5).mean(0)]
figure, axes = plt.subplots(len(states), 3, figsize=(13, 9), layout="constrained")
for row, (name, u) in zip(axes, states.items(), strict=True):
    for axis, cut, place in zip(row, ("axial", "coronal", "sagittal"), range(3), strict=True):

        def section(values, place=place):
            return np.take(values, centre[place], axis=place)

        anatomy = np.where(domain.mask, domain.tissues["white"] * 0.6 + 0.3, 0)
        axis.imshow(section(anatomy), origin="lower", cmap="gray", vmin=0, vmax=1)
        cells = np.where(u[-1] >= 0.01, u[-1], np.nan)
        image = axis.imshow(section(cells), origin="lower", cmap="plasma", vmin=0, vmax=1, alpha=0.8)
        axis.contour(section(u[-1]), [0.01, 0.15, 0.5], colors="w", linewidths=0.6)
        axis.contour(section(lesion * 1.0), [0.5], colors="cyan", linewidths=1.2, linestyles="--")
        axis.set(title=f"{name}, day {DAYS[-1]:g}, {cut}", xticks=[], yticks=[])
figure.colorbar(image, ax=axes, label="cell fraction", shrink=0.6)
figure.savefig(folder / "glioma_anatomy.png", dpi=80)
print(f"\n{folder / 'glioma_anatomy.png'}")
