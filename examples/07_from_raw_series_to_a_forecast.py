# %% [markdown]
# # 7. From raw series to a forecast
#
# The whole chain on a virtual patient: raw series of two visits are quantified and registered, the result is a patient
# whose tumour is forecast. The same from the shell:
#
#     tumorcast virtual --raw --small --seed 6 --out study
#     tumorcast quantify study --out patient
#     tumorcast forecast patient --out result

# %%
import os
import tempfile
from pathlib import Path

import biomodel as bm
from biomodel.acquisition import SIEMENS_3T, write_raw
from biomodel.imaging.registration import Rigid
from biomodel.quality import check
from biomodel.quantify.pipeline import quantify
from biomodel.quantify.study import Study
from biomodel.quantify.visit import Settings
from biomodel.virtual import Matched, small_patient

folder = Path(os.environ.get("TUMORCAST_EXAMPLES") or tempfile.mkdtemp())
virtual = small_patient(6)
write_raw(virtual, folder / "study", SIEMENS_3T, visits=[1, 2], overwrite=True)

# %% [markdown]
# ## From series to a patient

# %%
done = quantify(Study.read(folder / "study"), Settings(correct_motion=False), Rigid(), say=print)
done.write(folder / "patient", overwrite=True)
print(check(folder / "patient").summary())
patient = bm.Patient.read(folder / "patient")
# A region from raw series ends where a voxel holds less tumour than a reader's does; truth is counted alike.
cells, voxel = virtual.truth["cell_fraction"].values, virtual.patient.domain.voxel_volume / 1e3


def true_volumes(record):
    return [(u >= record.cellularity.visible_fraction).sum() * voxel for u in cells]


true = true_volumes(patient)
for visit in patient.visits:
    print(f"day {visit.day:g}: {patient.volume_of(visit):.2f} cm³ found, true {true[visit.number - 1]:.2f}")

# %% [markdown]
# ## From the patient to a forecast
# Beside it stands the forecast from the true maps and regions of the same patient: the difference is what imaging
# costs.

# %%
for name, known in (("from raw series", patient), ("from true maps", virtual.patient.until(2))):
    model = bm.ReactionDiffusion(
        bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy(agent) for agent in known.schedule.agents]
    ).with_priors(Matched().priors())
    fit = bm.calibrate(model, known)
    forecast = bm.forecast(fit, until=virtual.patient.visits[2].day, draws=50, seed=0, curve_step=10.0)
    low, middle, high = (float(q) for q in forecast["volume"].isel(time=-1).quantile([0.05, 0.5, 0.95], "draw"))
    print(
        f"{name:16s}: day {virtual.patient.visits[2].day:g}: {middle:.2f} cm³ ({low:.2f} to {high:.2f}), "
        f"true {true_volumes(known)[2]:.2f}; images count {fit.inflation:.1f} times less than their noise says"
    )
