# %% [markdown]
# # 6. T1 of real images
#
# Spoiled gradient echoes at 2°, 5° and 12° and two inversion-prepared volumes from one scanner (Thrippleton et al.,
# data of the SEPAL toolbox, Apache-2.0; the folder `vfa_t1` of `TUMORCAST_DATA`; what they show looks like tubes in a
# fluid). Flip angles alone cannot tell a wrong flip angle from a wrong T1; with the inversion-prepared volumes both are
# fitted.

# %%
import os
import sys
from pathlib import Path

import numpy as np

from biomodel.imaging.nifti import read_image
from biomodel.imaging.t1 import InversionPrepared, SpoiledGradientEcho, fit_t1, vfa_linear, vfa_nonlinear

data = Path(os.environ.get("TUMORCAST_DATA", "no folder")) / "vfa_t1"
if not data.is_dir():
    print("Set TUMORCAST_DATA to the folder that holds vfa_t1; see the README for where it comes from.")
    sys.exit(0)

names = ("FA2", "FA5", "FA12", "TI_168ms", "TI_1068ms")
mask = read_image(data / "mask.nii.gz").values > 0
signal = np.stack([read_image(data / f"{name}.nii.gz").values[mask] for name in names], 1)
angles, tr = (2.0, 5.0, 12.0), 5.4e-3
print(f"{len(signal)} voxels, {len(names)} volumes")

# %% [markdown]
# ## Flip angles alone

# %%
straight, curved = vfa_linear(signal[:, :3], angles, tr), vfa_nonlinear(signal[:, :3], angles, tr)


def row(name, fit):
    quartiles = np.nanquantile(fit["T1"], [0.25, 0.5, 0.75])
    print(f"{name:30s}T1 {quartiles[1]:.3f} s (quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f})  {fit.counts()}")


row("linear", straight)
row("nonlinear", curved)

# %% [markdown]
# ## With the inversion-prepared volumes
# How long their trains of pulses are is not in the files; the numbers here are assumed, and the result rests on them.

# %%
prepared = [InversionPrepared(t, flip_angle=5.0, spacing=tr, pulses=160) for t in (0.168, 1.068)]
both = fit_t1(signal, [*(SpoiledGradientEcho(a, tr) for a in angles), *prepared], fit_b1=True)
row("nonlinear, flip angle fitted", both)
print(f"true over nominal flip angle: {np.nanmedian(both['B1']):.2f}")
