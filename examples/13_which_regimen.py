# %% [markdown]
# # 13. Which regimen?
#
# A calibrated model can say how sure it is that one regimen leaves fewer tumour cells than another, and it can move
# doses about to find a schedule that leaves fewer still under the same limits. The patient is virtual, so the truth
# under every regimen is known and shown at the end. **What follows says what the model believes. It is not advice on
# treatment**: a model knows nothing of what a person tolerates or wants.

# %%
import os
import tempfile
from pathlib import Path

import biomodel as bm
from biomodel.decisions import decide, model_for
from biomodel.defaults import no_further_treatment
from biomodel.dosing import optimise
from biomodel.figure_decisions import regimens
from biomodel.limits import Limits
from biomodel.virtual import Matched, small_patient

folder = Path(os.environ.get("TUMORCAST_EXAMPLES") or tempfile.mkdtemp())
SEED, END = 4, 89.0


# %% [markdown]
# ## The regimens
# Three weekly doses of paclitaxel (T) have been given by the second visit, on day 19. What comes then is open.


# %%
def ac(start: float, cycles: int, share: float = 1.0) -> bm.Schedule:
    """Doxorubicin and cyclophosphamide every two weeks."""
    return bm.Schedule.weekly(
        "doxorubicin", start, cycles, 60 * share, "mg/m^2", every=14, status="planned"
    ) + bm.Schedule.weekly("cyclophosphamide", start, cycles, 600 * share, "mg/m^2", every=14, status="planned")


def paclitaxel(start: float, doses: int) -> bm.Schedule:
    return bm.Schedule.weekly("paclitaxel", start, doses, 80, "mg/m^2", status="planned")


planned = paclitaxel(1.4, 12) + ac(85.4, 4)
so_far = no_further_treatment(planned, 19.0)
plans = {
    "T, then AC": planned,
    "AC now, then T": so_far + ac(22.4, 4) + paclitaxel(78.4, 9),
    "AC now at 60 %, no T": so_far + ac(22.4, 4, 0.6),
    "nothing more": so_far,
}

# %% [markdown]
# ## The fit
# On the first two visits. The model needs a term for every drug of any regimen, also for those the patient has never
# had: of these the images say nothing, and what they do rests on the priors.

# %%
virtual = small_patient(SEED, regimen=planned, visit_days=(0, 19, 41, END))
known = virtual.patient.until(visit=2)
model = model_for(known, plans)
model = model.with_priors({name: prior for name, prior in Matched().priors().items() if name in model.parameters})
fit = bm.calibrate(model, known)
for row in fit.table():
    if row["name"] in model.parameters:
        print(f"{row['name']:28} {row['estimate']:.3g} ({row['low']:.2g} to {row['high']:.2g}), "
              f"informed by {row['informed_by']}")  # fmt: skip

# %% [markdown]
# ## The comparison
# Each draw of the posterior goes through every regimen, so the comparison is made for one and the same patient at a
# time. Cells decide: volumes of visible tumour are often 0 under two regimens alike.

# %%
decision = decide(fit, plans, END, draws=150)
for row in decision.table():
    doses = ", ".join(f"{t.doses} × {t.agent}" for t in row["doses"].values() if t.doses) or "none"
    print(f"{row['regimen']:22} {row['volume']:5.2f} cm³ ({row['volume_low']:.2f} to {row['volume_high']:.2f})  "
          f"no visible tumour {row['no_visible_tumour']:.0%}  leaves least {row['least']:.0%}  "
          f"doses to come: {doses}")  # fmt: skip
for pair in decision.pairs():
    print(f"{pair.first} leaves fewer cells than {pair.second}: {pair.probability:.0%} (± {pair.error:.0%}), "
          f"{pair.ratio:.2f} times as many ({pair.ratio_low:.2g} to {pair.ratio_high:.2g})")  # fmt: skip
for note in decision.notes:
    print("Note:", note)
regimens(decision).savefig(folder / "which_regimen.png", dpi=130)

# %% [markdown]
# ## Moving the doses
# Days and amounts of the planned doses, by gradients through the solver, within the limits of the plan itself: no more
# of any drug, no larger dose, no shorter interval, no higher load on the bone marrow. Fewer cells on days 60 and 89
# both count, lest treatment be put off. The search goes downhill only, so it begins both at the plan and at the other
# order of the drugs. The comparison uses draws that it has not seen.

# %%
limits = Limits.of(planned, first=22, last=END - 1)
better = optimise(fit, planned, [60, END], limits, starts=[plans["AC now, then T"]])
beyond = ", ".join(limits.violations(better.schedule)) or "nothing"
print(f"Beyond the limits: {beyond} ({better.iterations} iterations)")
for agent in better.schedule.agents:
    doses = [f"{d.amount:.0f} on day {d.day:.0f}" for d in better.schedule.of(agent) if d.day > 19]
    print(f"{agent:17} {', '.join(doses)}")
against = better.decide(draws=150)
pair = against.pair("optimised", "standard")
print(f"It leaves fewer cells than the plan: {pair.probability:.0%}, {pair.ratio:.2f} times as many "
      f"({pair.ratio_low:.2g} to {pair.ratio_high:.2g})")  # fmt: skip
regimens(against).savefig(folder / "moved_doses.png", dpi=130)

# %% [markdown]
# ## The truth
# Only a virtual patient can be treated in every way.

# %%
for label, plan in {**plans, "doses moved": better.schedule}.items():
    truth = small_patient(SEED, regimen=plan, visit_days=(0, 19, 41, END)).truth
    print(f"{label:22} {float(truth['volume'][-1]):5.2f} cm³, {float(truth['cells'][-1]):.2e} cells on day {END:g}")
print(f"Figures: {folder / 'which_regimen.png'}, {folder / 'moved_doses.png'}")
