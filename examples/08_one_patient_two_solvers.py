# %% [markdown]
# # 8. One patient, two solvers
#
# Does a forecast depend on how the equations are discretised? The same model of the same virtual patient is calibrated
# and forecast by finite volumes on the voxels (`TorchSolver`) and by finite elements (`FenicsSolver`), and then once
# more with the mechanics that plain models leave out. What they differ by is held against what the images know.
#
# FEniCS comes from the system: `tumorcast doctor` says whether it is here and how to install it.

# %%
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import biomodel as bm
from biomodel.errors import SolverError
from biomodel.mechanics import StressDamped
from biomodel.observation import cell_fraction
from biomodel.virtual import Matched, small_patient

try:
    finite_elements = bm.FenicsSolver()
    finite_elements.versions()
except SolverError as error:
    print(f"Skipped: {error}")
    sys.exit(0)

virtual = small_patient(10)
known = virtual.patient.until(visit=2)
days = [visit.day for visit in virtual.patient.visits[1:]]
drugs = [bm.Chemotherapy(agent) for agent in known.schedule.agents]
plain = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), drugs).with_priors(Matched().priors())
stressed = bm.ReactionDiffusion(bm.Logistic(), StressDamped(), drugs).with_priors(Matched().priors())
# %% [markdown]
# ## The same parameters through each solver
# Maps at every later visit from the same start. The unit of comparison is the noise of one voxel's cell fraction, which
# follows from that of ADC.

# %%
settings, first = known.cellularity, known.visits[0]
noise = settings.voxel_cv * settings.adc_w / (settings.adc_w - settings.adc_min)
start = np.where(first.region, np.clip(cell_fraction(first.adc, settings), 0, 1), 0.0)
maps, volumes = {}, {}
runs = {
    "voxels": (plain, bm.TorchSolver()),
    "finite elements": (plain, finite_elements),
    "voxels, mechanics": (stressed, bm.TorchSolver()),
}
for name, (model, solver) in runs.items():
    simulation = solver.build(model, known.domain, known.schedule, start=first.day)
    simulation({}, start, days[:1])  # forms and kernels are compiled on first use
    began = time.perf_counter()
    maps[name] = np.asarray(simulation({}, start, days))[0]
    volumes[name] = (maps[name] >= settings.visible_fraction).sum((1, 2, 3)) * known.domain.voxel_volume / 1e3
    print(f"{name:28s}{time.perf_counter() - began:6.2f} s, volumes {np.round(volumes[name], 2)} cm³")

print(f"\nDifference from the voxel solver at days {days}, in units of one voxel's noise ({noise:.3f}):")
for name in list(runs)[1:]:
    apart = maps[name] - maps["voxels"]
    seen = np.maximum(maps[name], maps["voxels"]) >= settings.visible_fraction
    rms = [float(np.sqrt((a[w] ** 2).mean())) / noise if w.any() else 0.0 for a, w in zip(apart, seen, strict=True)]
    largest = np.abs(apart).max() / noise
    print(f"{name:28s} root mean square in visible tumour {np.round(rms, 2)}, largest {largest:.2f}")

# %% [markdown]
# ## What each solver calibrates
# The search by finite elements runs in FEniCS, with its own adjoint.


# %%
def calibrate(name: str, model: bm.ReactionDiffusion, solver) -> bm.Fit:
    """The fit; parameters with the factor of one posterior standard deviation."""
    began = time.perf_counter()
    method = bm.Laplace(bm.MAP(starts=1, marginalise=False))
    fit = bm.calibrate(model, known, solver=solver, method=method)
    found = ", ".join(
        f"{n.split('.')[-1]} {fit.values[n]:.3f} (×/÷ {np.exp(fit.sd[fit.names.index(n)]):.2f})"
        for n in ("growth.k", "diffusion.D", "paclitaxel.efficacy")
    )
    print(f"{name:24s}{time.perf_counter() - began:5.1f} s, {fit.solves} runs: {found}")
    return fit


fits = {
    "voxels": calibrate("voxels", plain, bm.TorchSolver()),
    "finite elements": calibrate("finite elements", plain, finite_elements),
    "voxels, mechanics": calibrate("voxels, mechanics", stressed, bm.TorchSolver()),
}
print(f"peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")

# %% [markdown]
# ## Does it matter?
# A choice of solver matters where it moves the calibrated parameters by a good part of their posterior's width, or
# the forecast by a good part of its interval.

# %%
reference = fits["voxels"]
for name in list(fits)[1:]:
    moved = {
        n: (fits[name].z[fits[name].names.index(n)] - reference.z[reference.names.index(n)])
        / reference.sd[reference.names.index(n)]
        for n in ("growth.k", "diffusion.D", "paclitaxel.efficacy")
    }
    print(f"{name}: parameters move by " + ", ".join(f"{n} {m:+.2f}" for n, m in moved.items()) + " posterior sd")
spread = bm.forecast(reference, times=days, draws=100, seed=0, curve_step=1000.0)["volume"]
wide = spread.quantile(0.95, "draw") - spread.quantile(0.05, "draw")
for name in list(runs)[1:]:
    ratio = np.abs(volumes[name] - volumes["voxels"]) / np.maximum(wide.values, 1e-9)
    share = float(ratio[wide.values > 0].max(initial=0.0))
    verdict = "does not matter" if share < 0.25 else "matters"
    print(f"{name}: the volume differs by at most {share:.0%} of the forecast's 90 % interval: that {verdict} here")

# %%
middle = int(np.argmax(first.region.sum((1, 2))))
size = (3 * len(runs), 2.7 * len(days))
figure, axes = plt.subplots(len(days), len(runs), figsize=size, layout="constrained", squeeze=False)
for row, day, one in zip(axes, days, range(len(days)), strict=True):
    panels = [("voxels", maps["voxels"][one])]
    panels += [(f"{name} less voxels", maps[name][one] - maps["voxels"][one]) for name in list(runs)[1:]]
    for axis, (title, values) in zip(row, panels, strict=True):
        limits = (0, 0.6, "viridis") if title == "voxels" else (-2 * noise, 2 * noise, "RdBu_r")
        image = axis.imshow(values[middle], vmin=limits[0], vmax=limits[1], cmap=limits[2])
        axis.set(title=f"day {day:g}: {title}", xticks=[], yticks=[])
        axis.title.set_fontsize(8)
    figure.colorbar(image, ax=row, label="cell fraction, ± 2 noise", shrink=0.8)
folder = Path(os.environ.get("TUMORCAST_EXAMPLES") or tempfile.mkdtemp())
figure.savefig(folder / "two_solvers.png", dpi=120)
print(folder / "two_solvers.png")
