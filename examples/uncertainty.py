# %% [markdown]
# # How sure is the forecast?
#
# A forecast without its uncertainty cannot be used, and an uncertainty that nobody has checked cannot be trusted. This
# notebook makes the uncertainty report of one patient: what the images taught, where the uncertainty comes from,
# whether intervals like these have held in other patients, whether this forecast should be read at all, and how sure
# the model is that one regimen leaves less tumour than another.
#
# All patients are **virtual**: made by a generator whose truth is known. What is found on virtual patients says that
# the method is right, not that the model is right for people. For research only: nothing here is advice on treating a
# person.
#
# <!-- a cell's last line shows itself, which looks useless in a script
# ruff: noqa: B018
# -->

# %%
# %matplotlib inline
import os
import tempfile
from pathlib import Path

import biomodel as bm
from biomodel.cohort_study import study_cohort
from biomodel.decisions import model_for
from biomodel.defaults import no_further_treatment
from biomodel.diagnostics import posterior_predictive_check
from biomodel.figure_decisions import regimens
from biomodel.figure_diagnostics import coverage_curves, replicates
from biomodel.figure_fields import rate_maps
from biomodel.figure_posterior import correlations, marginals
from biomodel.figure_stages import stages_figure
from biomodel.out_of_distribution import features
from biomodel.stage_errors import TreatmentError
from biomodel.triage import triage
from biomodel.uncertainty import uncertainty_pages
from biomodel.virtual import Matched, small_patient

folder = Path(os.environ.get("TUMORCAST_EXAMPLES") or tempfile.mkdtemp())

# %% [markdown]
# ## The patient, the plan and the alternatives
# Visits on days 0, 19 and 41, three of six weekly doses of paclitaxel given by the second one. Today is day 19. What
# happens if the plan is kept, if it is stopped, or if another drug takes its place?

# %%
DAYS = (0.0, 19.0, 41.0)
plan = bm.Schedule.weekly("paclitaxel", 1.4, 6, 80.0, "mg/m^2", status="planned")
patient = small_patient(5, regimen=plan, visit_days=DAYS).patient
known = patient.until(visit=2)
today, end = known.visits[-1].day, DAYS[-1]
so_far = no_further_treatment(plan, today)
ac = bm.Schedule.weekly("doxorubicin", 22.4, 2, 60.0, "mg/m^2", every=14, status="planned")
plans = {"as planned": plan, "doxorubicin instead": so_far + ac, "nothing more": so_far}
known

# %% [markdown]
# ## Calibrate and forecast
# The model needs a term for every drug of any plan. Each parameter has a prior; a virtual patient's is the one that the
# generator draws from.

# %%
drawn_from = Matched().priors()


def with_priors(model):
    return model.with_priors({name: prior for name, prior in drawn_from.items() if name in model.parameters})


model = with_priors(bm.default_model(known))
fit = bm.calibrate(model, known)
forecast = bm.forecast(fit, times=[today, end], draws=200, seed=0)
forecast

# %% [markdown]
# ## What did the images teach?
# Where the bars are as wide as the dashed line, the forecast is that for patients in general. Parameters whose
# correlation is near −1 or 1 are known together, not each.

# %%
marginals(fit)

# %%
correlations(fit)

# %% [markdown]
# Would the fitted model make data like these? Bars: data it makes; line: the patient's.

# %%
check = posterior_predictive_check(fit, draws=60, seed=0)
replicates(check)

# %% [markdown]
# ## Where does it grow?
# The same two visits can also teach a *map* of the growth rate. Its prior is smooth; the right-hand panel says where
# the images had something to tell.

# %%
mapped = bm.calibrate(model, known, method=bm.FieldLaplace())
rate_maps(mapped)

# %% [markdown]
# ## Where does the uncertainty come from?
# Errors of every stage, from the scanner's noise to a dose that may be missed, are drawn anew one at a time, and the
# calibration answers each time.

# %%
course = TreatmentError(intensity_cv=0.1, missed=0.05, delay_sd=2.0)
found = bm.stages(fit, until=end, draws=200, seed=0, treatment=course)
stages_figure(found)

# %% [markdown]
# ## Do intervals like these hold?
# The evidence: other (virtual) patients, forecast in the same way, whose day 41 is known. A study that was interrupted
# goes on where it stopped. With patients of your own, hand in a `Cohort` instead of the generator.

# %%
others = (small_patient(9000 + i, regimen=plan, visit_days=DAYS).patient for i in range(40))
study = study_cohort(
    others, model, calibrate_on=2, name="matched virtual patients", solver=fit.solver,
    folder=folder / "cohort", seed=9000,
)  # fmt: skip
evidence = study.evidence()
evidence

# %%
coverage_curves({"as forecast": evidence.curve})

# %% [markdown]
# ## Should this forecast be read?
# Every question has a threshold; the verdict is the worst answer. *Like those the model was checked on* compares the
# patient with the cohort above.

# %%
verdict = triage(forecast, check, study.reference().distance(features(fit, check)))
verdict

# %% [markdown]
# ## Which regimen?
# The posterior goes through each plan. Doxorubicin was never given: what it would do rests on its prior, and the notes
# say so.

# %%
wider = bm.calibrate(with_priors(model_for(known, plans)), known)
decision = bm.decide(wider, plans, end, draws=150)
decision

# %%
regimens(decision)

# %% [markdown]
# ## The uncertainty report
# All of it as pages of the patient's report; `.save("report.pdf")` prints it.

# %%
pages = uncertainty_pages(
    forecast, check=check, triage=verdict, stages=found, study=study, decision=decision, rate_map=mapped
)
report = bm.report(forecast, observed=patient, pages=pages)
report.save(folder / "uncertainty.html")
print(f"Report: {folder / 'uncertainty.html'}")
report
