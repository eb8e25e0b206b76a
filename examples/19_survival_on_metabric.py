# %% [markdown]
# # 19. How long without the event?
#
# METABRIC: 1904 women with breast cancer, four gene indicators and five clinical columns, months to death or to the end
# of follow-up (Curtis et al. 2012, doi:10.1038/nature10983; prepared and split by Katzman et al. 2018,
# doi:10.1186/s12874-018-0482-1). Models are chosen on the training part; the test part is opened once, at the end. The
# table is public but not part of this project: name its folder in `TUMORCAST_DATA`, and install the extra `survival`.
# **Research use only: what follows is about a method, not about a person.**

# %%
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

folder = Path(os.environ.get("TUMORCAST_EXAMPLES") or tempfile.mkdtemp())
data = os.environ.get("TUMORCAST_DATA", "")
if not (Path(data) / "survival" / "metabric.h5").is_file():
    print("This example reads survival/metabric.h5 from the folder named by TUMORCAST_DATA, and it is not there.")
    sys.exit(0)

from sklearn.compose import make_column_transformer  # noqa: E402
from sklearn.model_selection import GridSearchCV  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import SplineTransformer  # noqa: E402

import survival as sv  # noqa: E402
from survival import figures  # noqa: E402
from survival.cohorts import benchmark_parts  # noqa: E402
from survival.metrics import Concordance, bootstrap, d_calibration, integrated_brier_score  # noqa: E402
from survival.splits import PatientFolds  # noqa: E402

train, test = benchmark_parts(data, "metabric")
print(f"{len(train.X)} patients to train on, {train.y['event'].sum()} events; {len(test.X)} to test on")

# %% [markdown]
# ## One model, chosen by cross-validation
# A head is an estimator of scikit-learn: pipelines and searches work with it. Here the penalty of a Cox model is chosen
# by its concordance in five folds of the training part.

# %%
search = GridSearchCV(sv.Cox(), {"alpha": [0.1, 10.0, 100.0]}, cv=PatientFolds(5, seed=0)).fit(train.X, train.y)
print(f"Cox: penalty {search.best_params_['alpha']:g}, C in cross-validation {search.best_score_:.3f}")
for name, effect in sorted(zip(train.X, search.best_estimator_.coef_, strict=True), key=lambda one: -abs(one[1]))[:3]:
    print(f"  hazard ratio of one standard deviation of {name}: {np.exp(effect):.2f}")

# %% [markdown]
# ## Several models mixed
# The weights of the mixture are those with the least Brier score out of fold, again on the training part alone. Models
# of the hazard in intervals need no proportional hazards; splines let age act as it does.

# %%
measured = ["MKI67", "EGFR", "PGR", "ERBB2", "age"]
splines = make_column_transformer((SplineTransformer(5, knots="quantile"), measured), remainder="passthrough")
mixture = sv.Stacked(
    [
        ("Cox", sv.Cox(10.0)),
        ("forest", sv.Forest(trees=60, leaf=15, times=50)),
        ("hazards", sv.DiscreteHazard(intervals=15)),
        ("network", sv.DeepHazard(members=2, intervals=15)),
    ],
    folds=4,
).fit(train.X, train.y)
print("weights: " + ", ".join(f"{name} {weight:.2f}" for name, weight in mixture.weights_.items()))
curved = make_pipeline(splines, sv.Cox(10.0)).fit(train.X, train.y)

# %% [markdown]
# ## The test part
# Concordance says whom the model puts first; the Brier score also whether the probabilities are right. The difference
# of two models is judged on the same samples of patients.

# %%
first, last = np.quantile(test.y["time"], (0.05, 0.9))
times = np.linspace(first, last, 60)
models = {"Cox": search, "Cox with splines": curved, "mixture": mixture}
order = {name: Concordance(test.y, model.predict(test.X)) for name, model in models.items()}
for name, model in models.items():
    curves = sv.predict_curves(model, test.X, times)
    loss = integrated_brier_score(train.y, test.y, curves)
    print(f"{name:17s} C {bootstrap(order[name], len(test.y), 200)}, integrated Brier score {loss:.4f}")
gain = bootstrap(lambda counts: order["mixture"](counts) - order["Cox"](counts), len(test.y), 400, null=0.0)
print(f"mixture less Cox: {gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}), p = {gain.p:.3f}")

# %% [markdown]
# Are the probabilities right over the whole follow-up? If so, each tenth of the probability holds a tenth of the
# patients.

# %%
ends = np.minimum(test.y["time"], mixture.last_time_)
axis = np.unique(ends)
own = mixture.predict_curves(test.X, axis).survival[np.arange(len(ends)), np.searchsorted(axis, ends)]
calibration = d_calibration(test.y, own)
low, high = calibration.share.min(), calibration.share.max()
print(f"D-calibration: shares from {low:.2f} to {high:.2f}, p = {calibration.p:.2f}")

# %% [markdown]
# ## Curves of three patients
# With low, middle and high risk.

# %%
risk = mixture.predict(test.X)
shown = np.argsort(risk)[[len(risk) // 10, len(risk) // 2, 9 * len(risk) // 10]]
curves = mixture.predict_curves(test.X.iloc[shown], np.linspace(1, 300, 150))
figure = figures.survival_curves(curves, ["low risk", "middle", "high risk"], "months")
figure.savefig(folder / "metabric_curves.png")
print("median months: " + ", ".join(f"{m:.0f}" if np.isfinite(m) else "past the end" for m in curves.median()))

# %% [markdown]
# ## What is refused
# A column that is missing, or one the model does not know, is an error and not a guess.

# %%
try:
    mixture.predict(test.X.drop(columns="age"))
except Exception as error:
    print(f"{type(error).__name__}: {error}")
