# %% [markdown]
# # 20. Will she respond?
#
# I-SPY 2: 384 women treated before surgery, with volumes, diameters, shape and background enhancement of four MRI
# visits (Li et al. 2020, doi:10.1038/s41523-020-00203-7; TCIA collection ISPY2). The outcome is a pathological complete
# response (pCR). Here the first three visits are used, the last of them in the middle of treatment. The tables are
# public but not part of this project: name their folder in `TUMORCAST_DATA`, and install the extra `survival` and
# openpyxl.
# **Research use only: what follows is about a method, not about a person.**

# %%
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

folder = Path(os.environ.get("TUMORCAST_EXAMPLES") or tempfile.mkdtemp())
data = os.environ.get("TUMORCAST_DATA", "")
if not (Path(data) / "ispy2" / "Multi-feature-MRI-NACT-Data.xlsx").is_file():
    print("This example reads the tables of ispy2 from the folder named by TUMORCAST_DATA, and they are not there.")
    sys.exit(0)

from sklearn.compose import make_column_transformer  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402

from survival import figures  # noqa: E402
from survival.calibration import Costs, SensitivityFloor, Temperature, VennAbers  # noqa: E402
from survival.cohorts import ispy2  # noqa: E402
from survival.metrics import (  # noqa: E402
    at_threshold,
    auroc,
    bootstrap,
    calibration_line,
    delong,
    delong_paired,
    net_benefit,
)
from survival.pcr import Calibrated, LateFusion, Mixture, ridge  # noqa: E402
from survival.splits import PatientFolds, out_of_fold  # noqa: E402

table = ispy2(data, visits=3)
y = table.y
print(f"{len(y)} patients, {y.sum()} with pCR; columns: "
      + ", ".join(f"{group} {len(names)}" for group, names in table.groups.items()))  # fmt: skip

# %% [markdown]
# ## Models, each beside a simpler one
# `clinical` knows receptors, MammaPrint and age; `volume` the functional tumour volume alone; `fusion` has one model
# for each source and puts their logits together; `mixture` has a model of the logarithms and one that also knows
# changes in percent. All is learned inside of the folds: each probability is of a patient whom the model never saw.

# %%
clinical = table.groups["receptors"] + table.groups["age"]
sources = {
    "clinical": clinical,
    "arm": table.groups["arm"],
    "volume": table.groups["volume"] + table.groups["diameter"],
    "shape and background": table.groups["sphericity"] + table.groups["enhancement"],
}
logs = [name for name in table.X if not name.endswith(" percent")]
volume = table.groups["volume"]


def probability(model, rows):
    return model.predict_proba(rows)[:, 1]


def some(names, C=0.03):
    """Ridge logistic regression on some of the columns."""
    return make_pipeline(make_column_transformer(("passthrough", names)), ridge(C))


models = {
    "clinical": Calibrated(some(clinical), Temperature(shift=True)),
    "volume": Calibrated(some(volume), Temperature(shift=True)),
    "fusion": LateFusion(sources, ridge(0.03)),
    "mixture": Mixture([("logs", some(logs)), ("percent", some(list(table.X)))]),
}
folds = PatientFolds(5, repeats=2, seed=0)
found = {name: out_of_fold(model, table.X, y, folds, probability) for name, model in models.items()}
for name, p in found.items():
    slope, _, large = calibration_line(y, p[0])
    print(f"{name:9s} AUC {delong(y, p[0])}, second repeat {auroc(y, p[1]):.3f}; calibration slope {slope:.2f}")

# %% [markdown]
# Do the images add to the clinical record? The same patients are in both, so the test is paired.

# %%
gain = delong_paired(y, found["mixture"][0], found["clinical"][0])
print(f"mixture less clinical: AUC {gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}), p = {gain.p:.2g}")
gain = bootstrap(lambda w: auroc(y, found["mixture"][0], w) - auroc(y, found["volume"][0], w), len(y), 400, null=0.0)
print(f"mixture less volume: AUC {gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}), p = {gain.p:.2g}")

# %% [markdown]
# ## Does acting on it help?
# Suppose that a probability of pCR above a threshold leads to a decision (less surgery, fewer drugs), and that acting
# in vain is as bad as the threshold's odds say. The decision curve shows what each model gains over treating all alike.

# %%
figures.decision_curves(y, {name: p[0] for name, p in found.items()}).savefig(folder / "pcr_decision_curves.png")
figures.calibration(y, found["mixture"][0]).savefig(folder / "pcr_calibration.png")
for name, p in found.items():
    print(f"{name:9s} net benefit at a threshold of 0.3: {net_benefit(y, p[0], [0.3])[0]:+.3f}")
print(f"everybody net benefit at a threshold of 0.3: {net_benefit(y, np.ones(len(y)), [0.3])[0]:+.3f}")

# %% [markdown]
# ## An operating point
# By costs (calibrated probabilities need no search), or by the share of responders that must be found.

# %%
p = found["mixture"][0]
for what, rule in (("acting in vain costs half", Costs(1.0, 2.0)), ("find 90 % of responders", SensitivityFloor(0.9))):
    called = at_threshold(y, p, rule.threshold(y, p))
    low, high = called.interval("sensitivity")
    print(f"{what}: threshold {called.threshold:.2f}, sensitivity {called.sensitivity:.2f} ({low:.2f} to {high:.2f}), "
          f"specificity {called.specificity:.2f}, PPV {called.ppv:.2f}, NPV {called.npv:.2f}")  # fmt: skip

# %% [markdown]
# ## One patient, and what is not known about her
# Two hundred patients train the model and calibrate it; a patient of the others gets an interval (Venn-Abers) and a set
# that holds the truth nine times in ten, among responders and among the others. A set with both says: not decided.

# %%
train, rest = np.arange(200), np.arange(200, len(y))
model = Calibrated(some(list(table.X)), VennAbers()).fit(table.X.iloc[train], y[train])
raw = model.model_.predict_proba(table.X.iloc[rest[:1]])[:, 1]
low, high = model.calibration_.interval(raw)
print(
    f"patient {table.X.index[rest[0]]}: probability of pCR between {low[0]:.2f} and {high[0]:.2f}; pCR was {y[rest[0]]}"
)
sets = model.sets(table.X.iloc[rest], coverage=0.9)
right = sets[np.arange(len(rest)), y[rest]]
print(f"sets of {len(rest)} patients: {right.mean():.2f} hold the truth, {(sets.sum(1) == 1).mean():.2f} are decided")

# %% [markdown]
# ## Visits that are missing
# The fusion predicts from the sources that are there.

# %%
fusion = LateFusion(sources, ridge(0.03)).fit(table.X.iloc[train], y[train])
without = table.X.iloc[rest].copy()
without[sources["volume"] + sources["shape and background"]] = np.nan
print(f"fusion on {len(rest)} patients: AUC {auroc(y[rest], probability(fusion, table.X.iloc[rest])):.3f}, "
      f"without images {auroc(y[rest], probability(fusion, without)):.3f}")  # fmt: skip
