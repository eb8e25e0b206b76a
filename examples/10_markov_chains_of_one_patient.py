# %% [markdown]
# # 10. Markov chains of one patient
#
# `Laplace` takes the posterior for Gaussian near its maximum, which takes seconds. Is that good enough for this
# patient? The no-U-turn sampler draws from the posterior itself: it starts from the Laplace fit, follows gradients of
# the solver, and says whether its chains have mixed. The patient is virtual, on voxels of 4 mm so that this is short.

# %%
import os
import tempfile
from pathlib import Path

import numpy as np

import biomodel as bm
from biomodel.figure_posterior import marginals
from biomodel.virtual import SMALL_BREAST, Matched, virtual_patient

folder = Path(os.environ.get("TUMORCAST_EXAMPLES") or tempfile.mkdtemp())

# %%
doses = bm.Schedule.weekly("paclitaxel", start=1.4, n=8, amount=80.0, units="mg/m^2", status="planned")
cube = ((12, 12, 12), (4.0, 4.0, 4.0))
patient = virtual_patient(7, Matched(), *cube, regimen=doses, anatomy=SMALL_BREAST).patient
known, day = patient.until(visit=2), patient.visits[2].day
priors = {name: prior for name, prior in Matched().priors().items() if "efficacy" not in name or "paclitaxel" in name}
model = bm.default_model(known).with_priors(priors)
laplace = bm.calibrate(model, known)

# %% [markdown]
# ## The chains
# They are kept on disk as they are drawn: a run that was stopped goes on from there, and asking for more draws
# continues them. Four chains of 1000 draws are usual; these are short, so that the example is.

# %%
method = bm.NUTS(chains=2, draws=250, tune=150, seed=0, checkpoint=folder / "chains")
chains = bm.calibrate(model, known, method=method)
found = chains.samples.chains
print(f"{'':22}{'Laplace, 90 %':26}{'NUTS, 90 %':26}{'R-hat':>7}{'ESS':>6}")
for i, rows in enumerate(zip(laplace.table(), chains.table(), strict=True)):
    cells = [f"{r['estimate']:.3g} ({r['low']:.2g} to {r['high']:.2g})" for r in rows]
    print(f"{laplace.names[i]:22}{cells[0]:26}{cells[1]:26}{found.r_hat[i]:7.3f}{found.bulk[i]:6.0f}")
for note in chains.notes:
    print(f"note: {note}")

# %% [markdown]
# ## What it means for the forecast

# %%
for name, fit in (("Laplace", laplace), ("NUTS", chains)):
    forecast = bm.forecast(fit, times=[day], draws=100, seed=0)
    low, middle, high = np.quantile(forecast["volume"].values[:, 0], [0.05, 0.5, 0.95])
    print(f"{name:8} volume on day {day:g}: {middle:.2f} cm³ (90 %: {low:.2f} to {high:.2f})")
seen = patient.volume_of(patient.visits[2])
print(f"measured: {seen:.2f} cm³")

# %% [markdown]
# ## For ArviZ
# `fit.inference` has ArviZ's layout: posterior, sample statistics, observed data and priors, ready for
# `arviz.summary`, `arviz.plot_trace` or a file.

# %%
inference = chains.inference
print(", ".join(inference.groups()))
inference.to_netcdf(str(folder / "chains.nc"))
marginals(chains).savefig(folder / "posterior.png", dpi=150)
print(f"Figure: {folder / 'posterior.png'}")
