# %% [markdown]
# # 5. Quantify one visit
#
# A visit is a folder of raw series, BIDS or DICOM: flip angles for T1, a dynamic series with contrast agent, and
# diffusion weighting. Out come maps with an error and a reason code in every voxel. The series here are virtual: a
# made-up patient in a made-up scanner, so that the maps can be held against the truth.

# %%
import os
import tempfile
from pathlib import Path

import numpy as np
import xarray as xr

from biomodel.acquisition import SIEMENS_3T, write_raw
from biomodel.imaging.series import Kind
from biomodel.quantify.nifti_maps import write_maps
from biomodel.quantify.page import page
from biomodel.quantify.study import Study
from biomodel.quantify.visit import Settings, measure
from biomodel.virtual import small_patient

folder = Path(os.environ.get("TUMORCAST_EXAMPLES") or tempfile.mkdtemp()) / "study"
write_raw(small_patient(5), folder, SIEMENS_3T, visits=[1], overwrite=True)

# %% [markdown]
# ## The series
# Reading refuses what cannot be used and says why; the quality check says what looks doubtful.

# %%
study = Study.read(folder)
visit = study.visits[0]
intake = visit.read()
for series in intake.series:
    print(f"{series.kind.value:10s}{series.samples:4d} samples of {series.grid.shape} voxels")
dynamic = intake.one(Kind.DCE)
print(
    f"every {np.median(np.diff(dynamic.times)):.0f} s, flip angle {dynamic.flip_angle:g}°, TR {dynamic.tr * 1e3:g} ms"
)

# %% [markdown]
# ## The maps
# Motion within the dynamic series is corrected by default; this one has none, so that step is left out.

# %%
maps = measure(visit, intake, study.organ, Settings(correct_motion=False))
for note in maps.notes:
    print("-", note)
for name in ("Ktrans", "ve", "vp", "ADC"):
    print(name, maps[name].counts())

# %% [markdown]
# ## Against the truth
# Medians over the tumour, with the stated error of a single voxel (±) beside.

# %%
with xr.open_dataset(folder / "truth" / "visit1.nc", engine="h5netcdf") as truth:
    region = truth["region"].values.astype(bool)
    print(f"region: {int(maps.region.sum())} voxels found, {int(region.sum())} true")
    for name, true in (("T1", "T10"), ("Ktrans", "Ktrans"), ("ve", "ve"), ("vp", "vp"), ("ADC", "ADC")):
        m = maps[name]
        found, wanted = np.nanmedian(m.values[region]), np.median(truth[true].values[region])
        print(
            f"{name:7s}{found:10.4g} {m.units:7s} true {wanted:10.4g}  ± {np.nanmedian(m.sd[region]):.2g}"
        )

# %% [markdown]
# ## To files and to a page
# NIfTI files with sidecars that hold name, unit, method and what the reason codes mean; `tumorcast quantify --dicom`
# writes DICOM, too.

# %%
files = write_maps(maps, folder / "maps")
page([maps], "One visit").save(folder / "quantify.html")
print(f"{len(files)} files and a page in {folder}")
