"""Features from several scanners and sites on one scale: ComBat, its assumptions, and what it does to the signal."""

from biomodel.imaging.harmonise.checks import check_assumptions
from biomodel.imaging.harmonise.combat import Combat, fit_combat
from biomodel.imaging.harmonise.report import Estimate, HarmonisationReport, harmonisation_report

__all__ = [
    "Combat",
    "Estimate",
    "HarmonisationReport",
    "check_assumptions",
    "fit_combat",
    "harmonisation_report",
]
