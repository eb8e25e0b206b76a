# %% [markdown]
# # Forecast one patient's tumour
#
# Two scans of a patient under chemotherapy, and the plan of what is still to be given: how large will the tumour be at
# the next visits, and how sure can we be? This notebook goes from a folder of scans to an answer with its uncertainty,
# compares it with what was then seen, and asks what another plan would have done.
#
# The patient is **virtual**: made by a generator whose truth is known, and written to disk as a real one would be. Use
# your own folder by changing one line. For research only: nothing here is advice on treating a person.
#
# <!-- a cell's last line shows itself, which looks useless in a script
# ruff: noqa: B018
# -->

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import biomodel as bm
from biomodel.defaults import no_further_treatment
from biomodel.quality import check
from biomodel.virtual import virtual_patient

# %% [markdown]
# ## The patient
# Visits with maps of the apparent diffusion coefficient (ADC) and the tumour's region, the organ's mask, and the doses.

# %%
folder = Path(tempfile.mkdtemp()) / "patient"
virtual_patient(seed=7).write(folder)

patient = bm.Patient.read(folder)  # or the folder with your own patient.json
patient

# %% [markdown]
# Before anything is computed, look at what the check of the folder says.

# %%
print(check(folder))

# %% [markdown]
# ## What is known today
# Today is the day of visit 2. `until` drops later scans, everything derived from them and the outcome. Planned doses
# stay: the plan is known today.

# %%
known = patient.until(visit=2)
today = known.visits[-1].day
known

# %% [markdown]
# ## The model
# $$\frac{\partial u}{\partial t} = \nabla\cdot(D\nabla u) + k\,u\,(1-u) - \sum_j \mathrm{kill}_j(t)\,u$$
#
# Here $u$ is the fraction of a voxel that tumour cells fill, $k$ how fast they divide and $D$ how fast they spread;
# after each dose, a drug's kill decays exponentially. Each parameter has a prior; change any with
# `model.with_priors(...)`.

# %%
model = bm.ReactionDiffusion(
    growth=bm.Logistic(),
    diffusion=bm.Isotropic(),
    treatments=[bm.Chemotherapy(agent) for agent in known.schedule.agents],
)
model

# %% [markdown]
# ## Calibrate
# The last column says whether the data informed a parameter, or only its prior: drugs given together cannot be told
# apart, and drugs not yet given cannot be known.

# %%
fit = bm.calibrate(model, known, solver=bm.TorchSolver(), method=bm.Laplace())
fit

# %% [markdown]
# ## Forecast

# %%
days = [visit.day for visit in patient.visits]
forecast = bm.forecast(fit, times=days, draws=200, seed=0)
forecast

# %% [markdown]
# The volume over time. Filled dots were used for the calibration; the open ones came later and were not.

# %%
curve = forecast.curves["volume"]
low, q1, middle, q3, high = np.quantile(curve.values, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
axis.fill_between(curve["day"], low, high, color="tab:blue", alpha=0.15, lw=0, label="90 %")
axis.fill_between(curve["day"], q1, q3, color="tab:blue", alpha=0.3, lw=0, label="50 %")
axis.plot(curve["day"], middle, color="tab:blue", label="median")
for visit in patient.visits:
    used = visit.day <= today
    axis.plot(visit.day, patient.volume_of(visit), "o", color="k", mfc="k" if used else "w", zorder=3)
dosed = [dose.day for dose in patient.schedule.doses if dose.day <= days[-1]]
axis.plot(dosed, [0] * len(dosed), "|", color="tab:orange")
axis.axvline(today, color="0.5", lw=0.8)
axis.set(xlabel="day (doses are marked on the axis)", ylabel="tumour volume, cm³")
_ = axis.legend()

# %% [markdown]
# Where the tumour will be: the probability, voxel by voxel, that a reader would call it tumour at the last visit, with
# the outline of what was then seen.

# %%
last = patient.visits[-1]
slice_z = int(patient.visits[0].region.sum((1, 2)).argmax())
probability = np.zeros(patient.domain.shape)
probability[forecast.box] = forecast["probability"].sel(time=last.day).values
figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
image = axis.imshow(np.where(patient.domain.mask, probability, np.nan)[slice_z], origin="lower", cmap="cividis", vmax=1)
if last.region is not None and last.region[slice_z].any():
    axis.contour(last.region[slice_z], [0.5], colors="w", linestyles="--")
axis.set(xticks=[], yticks=[])
_ = figure.colorbar(image, label=f"probability of tumour on day {last.day:g}")

# %% [markdown]
# ## Score
# Against what was then seen, beside two baselines: nothing changes after visit 2, and the volume goes on along a
# straight line of its logarithm.

# %%
bm.score(forecast, patient)

# %% [markdown]
# ## What if treatment had stopped today?
# The same draws under another plan. What was given before today stays, as the calibration assumed it.

# %%
stopped = bm.forecast(fit, times=[last.day], draws=200, seed=0, schedule=no_further_treatment(known.schedule, today))
stopped

# %% [markdown]
# ## The report
# All of this on one page, with limits of use and provenance; `.save("report.html")` or `.save("report.pdf")` keeps it.

# %%
report = bm.report(forecast, observed=patient, what_if=[("no further treatment", stopped)], findings=check(folder))
report
