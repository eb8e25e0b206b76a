# %% [markdown]
# # 5. A patient without images
#
# Often only volumes are known. A patient without images is one well-mixed point: the flat limit of the same model, with
# the same treatments, calibration, forecast and scores.

# %%
import biomodel as bm

# %% [markdown]
# ## The patient
# Four (made-up) volumes, weekly paclitaxel for twelve weeks. `cv` is how far a repeated measurement would scatter,
# `floor` the smallest volume that is seen at all.

# %%
plan = bm.Schedule.weekly("paclitaxel", start=1, n=12, amount=80, units="mg/m^2", status="planned")
patient = bm.Patient.from_volumes(
    "P002", days=[0, 21, 56, 84], volumes_cm3=[12.0, 8.1, 4.4, 2.6], schedule=plan, cv=0.2, floor=0.05
)
known = patient.until(visit=2)

# %% [markdown]
# ## Calibrate and forecast

# %%
model = bm.default_model(known)
print(model.label)
fit = bm.calibrate(model, known)
for row in fit.table():
    print(f"{row['name']:24} {row['estimate']:8.3g} {row['units']:8} informed by {row['informed_by']}")
days = [visit.day for visit in patient.visits[2:]]
forecast = bm.forecast(fit, times=days, draws=1000, seed=0)

# %% [markdown]
# ## Score
# Volumes are compared as they would be measured: with noise and detection floor.

# %%
for row in bm.score(forecast, patient).rows:
    volumes = f"volume {row['volume']:6.2f} cm³, seen {row['observed_volume']:.2f}"
    print(f"day {row['day']:3g}  {row['predictor']:19} {volumes}, CRPS {row['crps']:.2f}")
