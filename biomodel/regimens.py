"""Published chemotherapy regimens of early breast cancer as schedules.

All doses are marked ``planned``: such a regimen is fixed before it begins, so a forecast may know the doses to come,
and ``Patient.until`` keeps them.
"""

from __future__ import annotations

from biomodel.schedule import Schedule

__all__ = ["ac_t", "paclitaxel_carboplatin_ac", "weekly_paclitaxel_ac"]


def paclitaxel_carboplatin_ac(start: float = 1.4) -> Schedule:
    """Weekly paclitaxel 80 mg/m^2 and carboplatin AUC 2, 12 times, then 4 cycles of AC every 14 days, all planned.

    Weekly carboplatin beside weekly paclitaxel is an arm of KEYNOTE-522 (Schmid et al. 2020,
    doi:10.1056/NEJMoa1910549, AUC 1.5) and of GeparSixto (von Minckwitz et al. 2014,
    doi:10.1016/S1470-2045(14)70160-3, AUC 1.5 to 2); the dose-dense AC that follows is that of NeoSTOP (Sharma et al.
    2021, doi:10.1158/1078-0432.CCR-20-3646). `start` is the day of the first dose.
    """
    return (
        Schedule.weekly("paclitaxel", start, 12, 80.0, "mg/m^2", status="planned")
        + Schedule.weekly("carboplatin", start, 12, 2.0, "AUC", status="planned")
        + _ac(start + 84.0)
    )


def weekly_paclitaxel_ac(start: float = 1.4) -> Schedule:
    """Weekly paclitaxel 80 mg/m^2, 12 times, then 4 cycles of AC every 14 days, all planned.

    The control arm of I-SPY 2 (Park et al. 2016, doi:10.1056/NEJMoa1513750), with AC every two weeks.
    """
    return Schedule.weekly("paclitaxel", start, 12, 80.0, "mg/m^2", status="planned") + _ac(start + 84.0)


def ac_t(start: float = 1.4) -> Schedule:
    """AC-T: 4 cycles of AC every 14 days, then weekly paclitaxel 80 mg/m^2, 12 times, all planned.

    Dose-dense AC: CALGB 9741 (Citron et al. 2003, doi:10.1200/JCO.2003.09.081); weekly paclitaxel after AC: ECOG 1199
    (Sparano et al. 2008, doi:10.1056/NEJMoa0707056).
    """
    return _ac(start) + Schedule.weekly("paclitaxel", start + 56.0, 12, 80.0, "mg/m^2", status="planned")


def _ac(start: float) -> Schedule:
    """Doxorubicin 60 and cyclophosphamide 600 mg/m^2, four times every 14 days."""
    return Schedule.weekly("doxorubicin", start, 4, 60.0, "mg/m^2", every=14, status="planned") + Schedule.weekly(
        "cyclophosphamide", start, 4, 600.0, "mg/m^2", every=14, status="planned"
    )
