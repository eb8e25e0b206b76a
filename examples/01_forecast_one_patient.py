# %% [markdown]
# # 1. Forecast one patient
#
# A patient was scanned four times. We look at the first two visits only, forecast the other two, and then compare with
# what was really seen. The patient is virtual: made by a generator, so that anyone can run this.

# %%
import os
import tempfile
from pathlib import Path

import biomodel as bm
from biomodel.virtual import small_patient

# Files go into the folder named by TUMORCAST_EXAMPLES, or else into a temporary one.
folder = Path(os.environ.get("TUMORCAST_EXAMPLES") or tempfile.mkdtemp())

# %% [markdown]
# ## The patient
# On disk this is a folder with `patient.json` and NIfTI files; example 3 makes one from your own.

# %%
made = small_patient(seed=7)
if not (folder / "patient").exists():
    made.write(folder / "patient")
patient = bm.Patient.read(folder / "patient")
print(patient)

# %% [markdown]
# ## The model
# Cells divide until space runs out (logistic growth), spread by diffusion, and are killed after each dose. Every
# parameter has a unit and a prior; the data will narrow them.

# %%
model = bm.ReactionDiffusion(
    growth=bm.Logistic(),
    diffusion=bm.Isotropic(),
    treatments=[bm.Chemotherapy(agent) for agent in patient.schedule.agents],
)
for name, parameter in model.parameters.items():
    print(f"{name:28} {parameter.typical:8.3g} {parameter.units}")

# %% [markdown]
# ## Calibrate on visits 1 and 2
# `until(visit=2)` drops everything that came later, so the forecast cannot peek.

# %%
fit = bm.calibrate(model, patient.until(visit=2), solver=bm.TorchSolver(), method=bm.Laplace())
for row in fit.table():
    print(
        f"{row['name']:28} {row['estimate']:8.3g}  90 %: {row['low']:8.3g} to {row['high']:8.3g} {row['units']:9}"
        f" informed by {row['informed_by']}"
    )

# %% [markdown]
# ## Forecast visits 3 and 4

# %%
days = [visit.day for visit in patient.visits[2:]]
forecast = bm.forecast(fit, times=days, draws=200, seed=0)
print(forecast["volume"].quantile([0.05, 0.5, 0.95], "draw").to_pandas().round(2))

# %% [markdown]
# ## Score it
# A forecast means little by itself: beside it stand "nothing changes" and a straight line through the logarithm of the
# volume.

# %%
for row in bm.score(forecast, patient).rows:
    volumes = f"volume {row['volume']:6.2f} cm³, seen {row['observed_volume']:.2f}"
    print(f"visit {row['visit']}  {row['predictor']:19} {volumes}, CRPS {row['crps']:.2f}")

# %% [markdown]
# ## Keep it

# %%
report = bm.report(forecast, observed=patient)
report.save(folder / "report.html")
print(f"Report: {folder / 'report.html'}")
