# %% [markdown]
# # 2. What if the regimen were another one?
#
# A calibrated model can be run under any schedule, also under one that was never given. Draws are the same in every
# plan, so differences between plans are compared draw by draw. The patient is virtual, and such a comparison says what
# the model believes, not what is good for a person.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import biomodel as bm
from biomodel.defaults import no_further_treatment, without_further
from biomodel.virtual import small_patient

folder = Path(os.environ.get("TUMORCAST_EXAMPLES") or tempfile.mkdtemp())

# %%
patient = small_patient(seed=7).patient
known = patient.until(visit=2)
today, end = known.visits[-1].day, patient.visits[-1].day
fit = bm.calibrate(bm.default_model(known), known)
print(f"{patient.id}: calibrated on visits up to day {today:g}, forecast to day {end:g}")

# %% [markdown]
# ## The plans
# What was given before today stays in every plan: the calibration assumed it.

# %%
planned = known.schedule
so_far = no_further_treatment(planned, today)
first = min(dose.day for dose in planned.doses if dose.day > today)
ac = bm.Schedule.weekly("doxorubicin", first, 4, 60, "mg/m^2", every=14, status="planned") + bm.Schedule.weekly(
    "cyclophosphamide", first, 4, 600, "mg/m^2", every=14, status="planned"
)
plans = {
    "as planned": planned,
    "no further treatment": so_far,
    "without further carboplatin": without_further(planned, "carboplatin", today),
    "AC from now on": so_far + ac,
}

# %% [markdown]
# ## The forecasts

# %%
forecasts = {
    label: bm.forecast(fit, until=end, times=[end], draws=100, seed=0, schedule=plan) for label, plan in plans.items()
}
reference = forecasts["as planned"]["volume"].sel(time=end)
for label, forecast in forecasts.items():
    volume = forecast["volume"].sel(time=end)
    low, middle, high = volume.quantile([0.05, 0.5, 0.95], "draw").values
    # Draw by draw: the same patient under both plans. Where both leave nothing to see, they are equal.
    compared = f"  larger than as planned in {float((volume > reference).mean()):.0%} of draws"
    print(f"{label:28} {middle:6.2f} cm³ (90 %: {low:.2f} to {high:.2f}){'' if label == 'as planned' else compared}")

# %% [markdown]
# ## The courses
# Medians and 90 % bands; the vertical line is today.

# %%
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
styles = ("-", "--", ":", "-.")
for (label, forecast), style in zip(forecasts.items(), styles, strict=True):
    curve = forecast.curves["volume"]
    low, middle, high = np.quantile(curve.values, [0.05, 0.5, 0.95], axis=0)
    (line,) = axis.plot(curve["day"], middle, style, label=label)
    axis.fill_between(curve["day"], low, high, color=line.get_color(), alpha=0.12, lw=0)
axis.axvline(today, color="0.5", lw=0.8)
axis.set(xlabel="day", ylabel="tumour volume, cm³", title=f"{patient.id} under four plans")
axis.legend()
figure.savefig(folder / "what_if.png", dpi=120)
print(f"Figure: {folder / 'what_if.png'}")
