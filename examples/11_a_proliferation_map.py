# %% [markdown]
# # 11. A map of proliferation, with its uncertainty
#
# Tumours do not grow alike everywhere. Here the growth rate of one tumour is calibrated as a map, voxel by voxel, from
# three visits: a Gaussian field whose smoothness and spread are set by the evidence, jointly with diffusion and drugs.
# The patient is virtual: the true map is known, and the truth is solved on a finer grid by another method.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import biomodel as bm
from biomodel.calibration.field import FieldLaplace
from biomodel.calibration.field_evidence import LearnedMatern
from biomodel.calibration.field_prior import Added
from biomodel.figure_fields import rate_maps
from biomodel.parameters import LogNormal
from biomodel.patient import CellularitySettings
from biomodel.truth import Hazard, average, integrate, refine

folder = Path(os.environ.get("TUMORCAST_EXAMPLES") or tempfile.mkdtemp())
SETTINGS = CellularitySettings(adc_w=3.0e-3, adc_min=0.6e-3, voxel_cv=0.03, repeatability_cv=0.0, visible_fraction=0.1)
SHAPE, SPACING, DAYS = (1, 30, 30), (2.0, 2.0, 2.0), (0.0, 20.0, 40.0, 60.0)

# %% [markdown]
# ## The truth
# One slice, 60 mm wide. Cells on the left side divide fast, those on the right hardly. Paclitaxel is given each week.

# %%
y, x = np.meshgrid(*(2.0 * (np.arange(30) - 14.5),) * 2, indexing="ij")
rate = (0.05 + 0.04 * np.tanh(-x / 8) * np.cos(y / 14))[None]
start = (0.5 * np.exp(-((np.hypot(x, y) / 14) ** 4)))[None]
doses = bm.Schedule.weekly("paclitaxel", start=1.0, n=8, amount=80.0, units="mg/m^2", status="planned")
hazard = Hazard(np.array([d.day for d in doses.doses]), np.full(8, 0.09), np.full(8, 0.35))
two = (1, 2, 2)
cells = refine(start, two)
diffusivity, everywhere = np.full(cells.shape, 0.05), np.ones(cells.shape, bool)
states = integrate(cells[None], everywhere, diffusivity, (2.0, 1.0, 1.0), refine(rate, two), hazard, DAYS)
rng = np.random.default_rng(0)
visits = []
for number, (day, state) in enumerate(zip(DAYS, states, strict=True), start=1):
    u = average(state[0], two)
    adc = (SETTINGS.adc_w - u * (SETTINGS.adc_w - SETTINGS.adc_min)) * (1 + 0.03 * rng.standard_normal(SHAPE))
    visits.append(bm.Visit(number=number, day=day, adc=adc, region=u >= SETTINGS.visible_fraction))
patient = bm.Patient(
    id="virtual-map", organ="breast", domain=bm.Domain.box(SHAPE, SPACING), visits=tuple(visits), schedule=doses,
    cellularity=SETTINGS, notes=("Virtual: made up for example 11.",),
)  # fmt: skip

# %% [markdown]
# ## Calibrate on three visits, forecast the fourth
# `FieldLaplace` makes the rate a map: level plus field (`Added`, so that parts of a tumour may hardly grow). The
# field's length and sd have hyperpriors, and are set by the evidence.

# %%
model = bm.ReactionDiffusion(growth=bm.Logistic(), diffusion=bm.Isotropic(), treatments=[bm.Chemotherapy("paclitaxel")])
method = FieldLaplace(prior=LearnedMatern(sd=LogNormal(0.02, 0.7)), link=Added())
known = patient.until(visit=3)
fits = {"one rate": bm.calibrate(model, known), "a map": bm.calibrate(model, known, method=method)}
fit = fits["a map"]
found = fit.rate_map
rank = len(found.lowrank.values)
print(f"field: length {found.prior.matern.length:.1f} mm, sd {found.prior.matern.sd:.3f} 1/day; "
      f"{rank} directions informed by the images, {fit.solves} solutions of the equation")  # fmt: skip
region = patient.visits[0].region[fit.box]
guess, true = found.rate(fit.values["growth.k"]), rate[fit.box]
print(f"correlation with the true map in the first region {np.corrcoef(guess[region], true[region])[0, 1]:.2f}")
for name, one in fits.items():
    forecast = bm.forecast(one, times=[DAYS[-1]], draws=100, seed=0)
    for row in bm.score(forecast, patient).rows[: 2 if name == "a map" else 1]:
        label = name if row["predictor"] == "forecast" else row["predictor"]
        print(f"{label:14} log evidence {one.log_evidence:6.0f}, volume {row['volume']:.2f} (seen "
              f"{row['observed_volume']:.2f}) cm³, CCC of the cell fractions {row['ccc']:.2f}")  # fmt: skip

# %% [markdown]
# ## Look at it
# Rate, its standard deviation, and the information gained over the prior, with the outline of the first visit's tumour;
# beside it, for once, the truth.

# %%
rate_maps(fit).savefig(folder / "proliferation_map.png", dpi=150)
figure, axes = plt.subplots(figsize=(3, 2.6), layout="constrained")
image = axes.imshow(rate[0], origin="lower", cmap="cividis", vmin=0.0)
axes.set(title="true growth rate, 1/day", xticks=[], yticks=[])
figure.colorbar(image, ax=axes)
figure.savefig(folder / "proliferation_true.png", dpi=100)
print(f"wrote {folder / 'proliferation_map.png'}")
