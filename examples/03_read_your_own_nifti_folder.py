# %% [markdown]
# # 3. Read your own NIfTI folder
#
# You have ADC maps, tumour regions and a mask of the organ as NIfTI files, and know when the patient was scanned and
# treated. Write one `patient.json` beside the images, check the folder, and forecast.

# %%
import json
import os
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

import biomodel as bm
from biomodel.quality import check

folder = Path(os.environ.get("TUMORCAST_EXAMPLES") or tempfile.mkdtemp()) / "P001"
folder.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The images
# You would have these files already. Here they are drawn: a tumour in a ball of tissue whose cells become fewer, so
# that ADC rises and the region shrinks. Scanners write ADC in many units; these maps hold µm²/s. Axes may be in any
# order and direction: the affine says how they lie.

# %%
shape, spacing = (44, 44, 20), (1.5, 1.5, 3.0)
affine = np.diag([-1.5, -1.5, 3.0, 1.0])  # x to the left, y to the back, as in DICOM
affine[:3, 3] = (33, 33, -30)
x, y, z = np.meshgrid(*(np.arange(n) * size for n, size in zip(shape, spacing, strict=True)), indexing="ij")
mask = (x - 33) ** 2 + (y - 33) ** 2 + (z - 30) ** 2 < 30**2
distance = np.sqrt((x - 30) ** 2 + (y - 36) ** 2 + (z - 30) ** 2)
rng = np.random.default_rng(0)


def save(name: str, values: np.ndarray) -> None:
    image = nib.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, folder / name)


save("breast.nii.gz", mask.astype(np.uint8))
for visit, densest in ((1, 0.80), (2, 0.62)):
    cells = densest * np.exp(-((distance / 8.0) ** 2))  # cell fraction
    region = (cells > 0.15) & mask
    adc = (3000 - 2500 * cells) * rng.normal(1, 0.05, shape)
    save(f"visit{visit}_tumour.nii.gz", region.astype(np.uint8))
    save(f"visit{visit}_adc.nii.gz", np.where(mask, adc, 0).astype(np.float32))

# %% [markdown]
# ## The manifest
# Every number has its unit; none is ever guessed. Days count from any day 0 you like. `adc_w` (free water) and
# `adc_min` (a voxel full of cells) turn ADC into cell fractions and have no default: see the documentation of
# `CellularitySettings` for published values. Doses that were planned from the start are marked so: a forecast may know
# those to come.

# %%
manifest = {
    "schema": "tumorcast/patient/v1",
    "id": "P001",
    "organ": "breast",
    "grid": {"mask": "breast.nii.gz"},
    "cellularity": {
        "adc_w": {"value": 3.0e-3, "units": "mm^2/s"},
        "adc_min": {"value": 0.5e-3, "units": "mm^2/s"},
    },
    "visits": [
        {
            "day": day,
            "adc": {"file": f"visit{number}_adc.nii.gz", "units": "um^2/s"},
            "region": {"file": f"visit{number}_tumour.nii.gz"},
        }
        for number, day in ((1, 0), (2, 20))
    ],
    "treatments": [
        {
            "kind": "chemotherapy",
            "agent": "paclitaxel",
            "day": 2 + 7 * week,
            "dose": {"value": 80, "units": "mg/m^2"},
            "status": "planned",
        }
        for week in range(12)
    ],
}
(folder / "patient.json").write_text(json.dumps(manifest, indent=2))

# %% [markdown]
# ## Check it
# The same as `tumorcast validate P001`.

# %%
findings = check(folder)
print(findings)
assert findings.ok

# %% [markdown]
# ## Use it
# Nothing is known yet of later visits, so there is nothing to score: this is a forecast of the future. The same as
# `tumorcast forecast P001 --calibrate-on 2 --until 62 --out result`.

# %%
patient = bm.Patient.read(folder)
print(patient)
fit = bm.calibrate(bm.default_model(patient), patient)
forecast = bm.forecast(fit, until=62, draws=100, seed=0)
for day in forecast.times:
    low, middle, high = forecast["volume"].sel(time=day).quantile([0.05, 0.5, 0.95], "draw").values
    print(f"Volume on day {day:g}: {middle:.2f} cm³ (90 %: {low:.2f} to {high:.2f})")
