# %% [markdown]
# # A real patient, with priors learned from real patients
#
# Functional tumour volumes of 384 patients of the I-SPY 2 trial (Li et al. 2020, doi:10.1038/s41523-020-00203-7; TCIA
# collection ISPY2). We hold one patient out, learn priors and noise from the others, forecast the two later visits from
# the first two, and compare. The tables are public but not part of this project: name their folder in `TUMORCAST_DATA`,
# and install pandas and openpyxl to read them.

# %%
import os
import tempfile
from pathlib import Path

import numpy as np

import biomodel as bm
from biomodel.calibration.importance import Importance
from biomodel.calibration.population import learn_priors
from biomodel.schedule import Dose
from biomodel.terms import NoGrowth

# Files go into the folder named by TUMORCAST_EXAMPLES, or else into a temporary one.
folder = Path(os.environ.get("TUMORCAST_EXAMPLES") or tempfile.mkdtemp())
table = Path(os.environ.get("TUMORCAST_DATA", "")) / "ispy2" / "Multi-feature-MRI-NACT-Data.xlsx"

# %% [markdown]
# ## The treatment
# The published order: twelve weekly doses of paclitaxel, then four of doxorubicin every two weeks. The tables hold no
# days of single doses, and the study drugs of the trial's arms are not modelled.

# %%
DAYS = [0, 21, 84, 154]
plan = bm.Schedule.weekly("paclitaxel", start=1, n=12, amount=80, units="mg/m^2", status="planned")
plan = plan.with_doses(Dose(day, "doxorubicin", 60, "mg/m^2", "planned") for day in (91, 105, 119, 133))

# %% [markdown]
# ## The model
# Some cells are spared by both drugs; the rest die in proportion to exposure. Over these months growth between doses
# cannot be told from a weaker kill, so it is left out.

# %%
model = bm.ReactionDiffusion(
    growth=NoGrowth(),
    diffusion=bm.NoDiffusion(),
    treatments=[
        bm.Combination(
            ("paclitaxel", "doxorubicin"),
            efficacy=(bm.LogNormal(0.06, 0.6), bm.LogNormal(0.3, 0.7)),
            resistant=bm.LogitNormal(0.05, 1.2),
            decay=bm.Fixed(0.3),
        )
    ],
)
print(model.label)

# %% [markdown]
# ## Learn from the others, forecast the one


# %%
def cohort() -> list[bm.Patient]:
    """All patients of the table."""
    import pandas as pd

    rows = pd.read_excel(table)
    volumes = rows[[f"VOLUME_TUM_BLU_V{visit}0" for visit in (1, 2, 3, 4)]].to_numpy(float)
    return [
        bm.Patient.from_volumes(f"ISPY2-{number:03}", DAYS, row, plan, floor=0.05, organ="breast")
        for number, row in enumerate(volumes)
    ]


def tour(patients: list[bm.Patient], one: int = 42) -> None:
    """Everything from learning to the report."""
    patient, others = patients[one], patients[:one] + patients[one + 1 :]
    population = learn_priors(model, others, noise_by_visit=True)
    print(f"\nlearned from {population.patients} patients:")
    for row in population.table():
        print(f"{row['name']:32} median {row['median']:7.3g}, 90 % of patients {row['low']:.3g} to {row['high']:.3g} "
              f"{row['units']}")  # fmt: skip
    print("scale of the errors of log(volume + 0.05 cm³), visit by visit:", np.round(population.noise.scale, 2))

    fit = bm.calibrate(population, patient.until(visit=2), method=Importance())
    print(f"\n{patient.id}: {fit.samples.ess:.0f} effective draws")
    for row in fit.table():
        print(f"{row['name']:32} {row['estimate']:7.3g} ({row['low']:.3g} to {row['high']:.3g}) {row['units']:6} "
              f"informed by {row['informed_by']}")  # fmt: skip

    forecast = bm.forecast(fit, times=DAYS[2:], draws=1000, seed=0)
    for row in bm.score(forecast, patient).rows:
        print(f"day {row['day']:3g}  {row['predictor']:19} {row['volume']:7.2f} cm³, "
              f"seen {row['observed_volume']:.2f}, CRPS {row['crps']:.2f}")  # fmt: skip
    bm.report(forecast, observed=patient).save(folder / "ispy2.html")
    print(f"Report: {folder / 'ispy2.html'}")


if table.is_file():
    tour(cohort())
else:
    print("Skipped: this example reads ispy2/Multi-feature-MRI-NACT-Data.xlsx in the folder named by TUMORCAST_DATA.")
