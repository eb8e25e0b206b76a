"""How good predictions are, and how sure one can be of it.

Every metric takes `weights`, by default one for each patient: counts of patients in a bootstrap sample, so that
:func:`~survival.metrics.compare.bootstrap` needs no copies of the data.
"""

from survival.metrics.binary import (
    AtThreshold,
    at_threshold,
    auprc,
    auroc,
    brier,
    calibration_line,
    expected_calibration_error,
    net_benefit,
)
from survival.metrics.compare import Interval, bootstrap, bootstrap_draws, corrected_t_test, delong, delong_paired, holm
from survival.metrics.subgroups import Subgroup, auroc_standard_error, detectable_difference, gaps, subgroups
from survival.metrics.times import (
    Concordance,
    brier_by_patient,
    d_calibration,
    harrell_c,
    integrated_brier_score,
    time_dependent_auc,
    uno_c,
)

__all__ = [
    "AtThreshold",
    "Concordance",
    "Interval",
    "Subgroup",
    "at_threshold",
    "auprc",
    "auroc",
    "auroc_standard_error",
    "bootstrap",
    "bootstrap_draws",
    "brier",
    "brier_by_patient",
    "calibration_line",
    "corrected_t_test",
    "d_calibration",
    "delong",
    "delong_paired",
    "detectable_difference",
    "expected_calibration_error",
    "gaps",
    "harrell_c",
    "holm",
    "integrated_brier_score",
    "net_benefit",
    "subgroups",
    "time_dependent_auc",
    "uno_c",
]
