# %% [markdown]
# # 12. Where does the uncertainty come from?
#
# A forecast rests on a chain: scanner, registration, outlines, prior, choice of model, and a treatment that may not
# come as planned. How much of its uncertainty comes from each? The patient is virtual. That outlines may be off by
# 1 mm and registration by 0.5 mm is stated in the patient's record (`edge_sd`, `misalignment_sd`); the treatment's
# error is a working value here, where a ward has its own records.

# %%
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

import biomodel as bm
from biomodel.averaging import average
from biomodel.figure_stages import stages_figure
from biomodel.stage_errors import TreatmentError
from biomodel.stages import LABELS, stages
from biomodel.treatments import Combination
from biomodel.virtual import small_patient

folder = Path(os.environ.get("TUMORCAST_EXAMPLES") or tempfile.mkdtemp())

# %%
patient = small_patient(seed=7).patient
record = replace(patient.cellularity, edge_sd_mm=1.0, misalignment_sd_mm=0.5)
patient = replace(patient, cellularity=record)
known, day = patient.until(visit=2), patient.visits[2].day

# %% [markdown]
# ## Two models
# Every cell alike, or a share of cells that no drug kills. The data weigh them by their evidence.

# %%
plain = bm.default_model(known)
sparing = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [Combination(known.schedule.agents)])
fits = bm.compare([plain, sparing], known)
for fit, weight in zip(fits.fits, fits.evidence_weights, strict=True):
    print(f"{fit.model.label:80} {weight:.0%}")

# %% [markdown]
# One forecast from both: each gives its share of the draws.

# %%
forecasts = [bm.forecast(fit, times=[day], draws=100, seed=0) for fit in fits.fits]
forecast = average(forecasts, fits.evidence_weights)
low, middle, high = np.quantile(forecast["volume"].values[:, 0], [0.05, 0.5, 0.95])
print(f"Volume on day {day:g}: {middle:.2f} cm³ (90 %: {low:.2f} to {high:.2f})")

# %% [markdown]
# ## Its stages
# Each stage's errors are drawn anew while the others stay, and the calibration answers. Contributions sum to the
# variance within the error of the draws.

# %%
course = TreatmentError(intensity_cv=0.1, missed=0.05, delay_sd=2.0)
found = stages(fits, until=day, draws=150, seed=0, treatment=course)
print(f"Standard deviation of the volume: {found.variance() ** 0.5:.2f} cm³")
for share in found.table():
    print(f"  {share.label:28} {share.contribution:4.0%}  (90 %: {max(share.low, 0):.0%} to {share.high:.0%})")
for stage, reason in found.absent.items():
    print(f"  {LABELS[stage]:28}    –  {reason}")
total, low, high = found.sum()
print(f"  {'sum':28} {total:4.0%}  (90 %: {low:.0%} to {high:.0%})")

# %%
stages_figure(found).savefig(folder / "stages.png", dpi=150)
print(f"Figure: {folder / 'stages.png'}")
