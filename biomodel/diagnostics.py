"""Checks of posteriors and forecasts, gathered: ranks, coverage, and replicated data.

- `simulation_based_calibration`: is a method's posterior right, when the model is? (`diagnostics_ranks`)
- `check_forecasts`: were forecasts right, and how sharp? (`diagnostics_forecasts`)
- `posterior_predictive_check`: could the fitted model have made its data? (`diagnostics_predictive`)

Figures are in :mod:`biomodel.figure_diagnostics`.
"""

from biomodel.diagnostics_forecasts import Coverage, ForecastCheck, check_forecasts, coverage, pit
from biomodel.diagnostics_predictive import PredictiveCheck, posterior_predictive_check
from biomodel.diagnostics_ranks import (
    RankStatistics,
    independent_draws,
    rank_statistics,
    simulate_volumes,
    simulation_based_calibration,
    uniform_band,
    uniform_p,
)

__all__ = [
    "Coverage",
    "ForecastCheck",
    "PredictiveCheck",
    "RankStatistics",
    "check_forecasts",
    "coverage",
    "independent_draws",
    "pit",
    "posterior_predictive_check",
    "rank_statistics",
    "simulate_volumes",
    "simulation_based_calibration",
    "uniform_band",
    "uniform_p",
]
