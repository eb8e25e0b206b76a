"""Triage: is a forecast usable, to be reviewed, or not usable, and why.

Every check asks one question that can be answered when the forecast is made. The verdict is the worst answer. Where a
threshold is not of a source it is a working choice; how the classes then fared on virtual patients is printed by
``tests/benchmarks/bench_conformal.py``.

=============================  ==========================================  ======================================
question                       review                                      not usable
=============================  ==========================================  ======================================
like the reference cohort?     p of its distance below 0.05: one in        p of 0.01 or less: one in a hundred
                               twenty of the cohort itself                 of it (needs 99 patients)
could the model have made      p below 0.01 of a volume; of residuals      never by itself: p-values of fitted
its data?                      too, without a reference cohort             data are no exact ones
do model and images agree?     inflation of the noise above 3              above 6, twice that
                               (`DOUBTFUL` of the calibration)
did the calibration end?       not converged                               --
did the data teach anything?   no parameter was identified                 --
does it say anything?          90 % of the volume holds both a partial     --
                               response and progression (see `RESPONSE`),
                               or a tumour where none was seen last
=============================  ==========================================  ======================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from biomodel.calibration.calibrate import DOUBTFUL
from biomodel.calibration.fit import Fit
from biomodel.diagnostics_predictive import MISFIT, WORST, PredictiveCheck
from biomodel.errors import InputError
from biomodel.forecast import Forecast
from biomodel.out_of_distribution import Distance
from biomodel.tables import html_table

__all__ = ["NOT_USABLE", "REVIEW", "USABLE", "Finding", "Triage", "triage"]

USABLE, REVIEW, NOT_USABLE = "usable", "review", "not usable"
CLASSES = (USABLE, REVIEW, NOT_USABLE)
#: p-values below which a patient is unlike the reference cohort: for review, and not usable.
UNLIKE, ALIEN = 0.05, 0.01
#: p-value of a posterior predictive check below which the data surprise the model.
SURPRISING = 0.01
#: Inflation of the noise beyond which model and images have nothing to say to each other.
HOPELESS = 2 * DOUBTFUL
#: Fewest draws that make an interval.
DRAWS = 20
#: RECIST's partial response and progression, 30 % less and 20 % more of the longest diameter, as ratios of volumes of
#: the same shape (Eisenhauer et al. 2009, doi:10.1016/j.ejca.2008.10.026).
RESPONSE, PROGRESSION = 0.7**3, 1.2**3


@dataclass(frozen=True)
class Finding:
    """Answer to one question: its class, and the reason in plain words."""

    question: str
    verdict: str
    reason: str


@dataclass(frozen=True)
class Triage:
    """Verdict on a forecast.

    Attributes
    ----------
    findings : tuple of Finding
        One for each question.
    patient : str
        Fingerprint of the patient; "" if not told.
    """

    findings: tuple[Finding, ...]
    patient: str = ""

    @property
    def verdict(self) -> str:
        """The worst of the findings: "usable", "review" or "not usable"."""
        return max((f.verdict for f in self.findings), key=CLASSES.index)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why a forecast is not simply usable, the gravest first."""
        graver = sorted(self.findings, key=lambda f: -CLASSES.index(f.verdict))
        return tuple(f.reason for f in graver if f.verdict != USABLE)

    def _repr_html_(self) -> str:
        rows = [(f.question, f.verdict, f.reason) for f in self.findings]
        return html_table(("question", "answer", "why"), rows, f"Triage: {self.verdict}")


def triage(forecast: Forecast, check: PredictiveCheck | None = None, distance: Distance | None = None) -> Triage:
    """Judge a forecast by what is known when it is made.

    Parameters
    ----------
    forecast : Forecast
    check : PredictiveCheck, optional
        `posterior_predictive_check` of its fit. Without it that question stays open, which asks for review.
    distance : Distance, optional
        From a reference cohort, ``reference.distance(features(fit, check))``. The same.

    Returns
    -------
    Triage

    Raises
    ------
    InputError
        If the forecast's last day is not after the calibration, or the check is of another patient.
    """
    fit = forecast.fit
    patient = fit.patient.fingerprint()
    if check is not None and check.patient not in ("", patient):
        raise InputError(
            f"triage: the predictive check is of another patient (or other data) than the forecast of {fit.patient.id};"
            " expected posterior_predictive_check(forecast.fit)."
        )
    if not forecast.times[-1] > fit.patient.visits[-1].day:
        raise InputError(
            f"triage: the forecast of {fit.patient.id} ends on day {forecast.times[-1]:g}, the calibration on day "
            f"{fit.patient.visits[-1].day:g}; expected a forecast of later days."
        )
    now = [v for v in map(fit.patient.volume_of, fit.patient.visits) if v is not None][-1]
    draws = forecast.data["volume"].values[:, -1]
    volumes = fit.patient.volumes
    floor = volumes.floor if fit.patient.domain.well_mixed and volumes else 0.0
    findings = [like_the_cohort(distance), could_have_made(check, distance is not None)]
    if not fit.patient.domain.well_mixed:
        findings.append(agrees(fit.inflation) if fit.rate_map is None else UNASKED)
    return Triage((*findings, *ended_and_taught(fit), says_something(draws, now, floor)), patient)


#: What a map of the growth rate leaves open: it can follow any image.
UNASKED = Finding("Do model and images agree?", REVIEW, "Not asked: a map of the growth rate follows the images, and "
                  "its misfit is not computed. Look at the inflation of the fit without a map.")  # fmt: skip


def like_the_cohort(distance: Distance | None) -> Finding:
    """Whether the patient is like the reference cohort."""
    question = "Is the patient like those the model was checked on?"
    if distance is None:
        return Finding(question, REVIEW, "Nobody has checked whether forecasts hold for patients like this one.")
    verdict = NOT_USABLE if distance.p <= ALIEN else REVIEW if distance.p < UNLIKE else USABLE
    if verdict == USABLE:
        return Finding(question, verdict, f"Like those of {distance.cohort} (p = {distance.p:.2g}).")
    farthest = ", ".join(f"{n} ({z:+.1f} sd)" for n, z in list(distance.apart.items())[:3])
    reason = (
        f"Unlike the patients of {distance.cohort}: p = {distance.p:.2g} for one as far from the others. Farthest off: "
        f"{farthest}. What was found on them need not hold here."
    )
    return Finding(question, verdict, reason)


def could_have_made(check: PredictiveCheck | None, reference: bool = False) -> Finding:
    """Whether the fitted model could have made its data.

    With a reference cohort the residuals' misfit is one of the features compared with it, which is the better judge: a
    third of *right* models (virtual, matched) have residuals of images that surprise them. A p-value cannot be smaller
    than the replicates allow: 200 of them see what happens once in a hundred.
    """
    question = "Could the fitted model have made the data?"
    if check is None:
        return Finding(question, REVIEW, "The fitted model was not compared with its data.")
    judged = [(n, p) for n, p in zip(check.names, check.p, strict=True) if not (reference and n in (MISFIT, WORST))]
    odd = [(n, p) for n, p in judged if p < SURPRISING]
    draws = check.replicated.shape[1]
    if not odd and not reference and 2 / (draws + 1) > SURPRISING:
        return Finding(question, REVIEW, f"Nothing odd in {draws} replicates, which are too few to see what a right "
                       "model does less than once in a hundred times; make 200.")  # fmt: skip
    if not odd:
        return Finding(question, USABLE, "Data made by the fitted model look like the patient's.")
    named = ", ".join(f"{n} (p = {p:.2g})" for n, p in odd)
    return Finding(question, REVIEW, f"Data made by the fitted model hardly ever look like the patient's in: {named}.")


def agrees(inflation: float) -> Finding:
    """Whether model and images agree within the stated noise."""
    question = "Do model and images agree?"
    if inflation <= DOUBTFUL:
        return Finding(question, USABLE, f"As well as the noise allows (inflation {inflation:.1f}).")
    reason = (
        f"Model and images disagree by more than the noise: the images count {inflation:.1f} times less than stated. "
        "Look for regions drawn askew, images that are not aligned, or cells that the model does not know."
    )
    return Finding(question, NOT_USABLE if inflation > HOPELESS else REVIEW, reason)


def ended_and_taught(fit: Fit) -> Sequence[Finding]:
    """Whether the calibration ended, and whether the data taught anything."""
    ended = Finding("Did the calibration end well?", USABLE, "It converged.")
    if not fit.converged:
        ended = Finding(ended.question, REVIEW, f"It stopped after {fit.iterations} iterations without converging.")
    if not fit.sd.any():
        return ended, Finding("Did the data teach anything?", REVIEW, "Not known: this method computes no posterior.")
    learned = [n for n in fit.identified if n in fit.model.free]
    taught = Finding("Did the data teach anything?", USABLE, f"They informed {', '.join(learned)}.")
    if not learned:
        taught = Finding(taught.question, REVIEW, "No parameter by itself is much better known than before; the "
                         "forecast rests on the tumour as measured, and on what parameters do together.")  # fmt: skip
    return ended, taught


def says_something(draws: np.ndarray, now: float, floor: float = 0.0) -> Finding:
    """Whether the forecast tells response from progression: volumes (draws,) against the last measured one, cm³.

    At `floor` and below no tumour is seen.
    """
    question = "Does the forecast tell response from progression?"
    if len(draws) < DRAWS:
        return Finding(question, REVIEW, f"Not known from {len(draws)} draws; make at least {DRAWS}.")
    low, high = np.quantile(draws, [0.05, 0.95])
    if now <= floor and high > floor:
        reason = (
            f"No: no tumour was seen last, and its 90 % interval goes up to {high:.2g} cm³, so that it does not tell "
            "whether one is seen again."
        )
        return Finding(question, REVIEW, reason)
    if now <= floor:
        return Finding(question, USABLE, "No visible tumour, neither last nor in 95 % of its draws.")
    if low < RESPONSE * now and high > PROGRESSION * now:
        reason = (
            f"No: its 90 % interval, {low:.2g} to {high:.2g} cm³, holds both a partial response and progression of the "
            f"{now:.2g} cm³ last measured."
        )
        return Finding(question, REVIEW, reason)
    return Finding(question, USABLE, f"Its 90 % interval is {low:.2g} to {high:.2g} cm³, last measured {now:.2g} cm³.")
