"""`stages`: where the uncertainty of one patient's forecast comes from, stage by stage.

What is meant. A forecast rests on a chain: what was measured with errors, outlines and alignments that may be wrong,
a prior, a calibration that answers to all of these, a choice among models, and a course of treatment that may not come
as planned. Every stage gets an error of its own, and these errors are independent before anything is measured. A draw
of the forecast is a function of one draw of each:

    errors -> data measured anew (and prior moved) -> posterior's answer -> model -> treatment -> forecast

so that its variance can be divided among them by the law of total variance. For stage s of forecast Q:

- `first`, Var(E[Q | error of s]): the variance that would go, on average, if this error became known and nothing else;
- `total_effect`, E[Var(Q | all other errors)]: what would be left if all other errors were known;
- `contribution`, the mean of both: half of what two stages do only together goes to each. Contributions sum to the
  variance exactly where no three stages interact (they are then the Shapley effects: Owen 2014, SIAM/ASA J Uncertain
  Quantif 2:245, doi:10.1137/130936233), and within Monte-Carlo error in the examples and tests here.

Noise of ADC is both in the data and, through the likelihood, in the width of the posterior. It is counted once: for a
linear model the draws of :mod:`biomodel.stage_chain` have exactly the posterior's covariance, of which the noise holds
the part that comes from measuring anew, and `parameters` what the prior leaves because the data say too little.
Where images count less than their noise says (`fit.inflation`, edges, outliers), the excess is `misfit`, a stage of its
own: errors that nobody stated. The estimator is held while errors vary: a stage that were free of error would also be
trusted more, and the variance fall by more than its contribution.

Estimators: Saltelli et al. 2010, doi:10.1016/j.cpc.2009.09.018 (their table 2: first order (b), total effect (f)), on
two sets of draws and their crossings. The calibration's answer is linearised
about the fit (see :mod:`biomodel.stage_chain`); runs of the model are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from biomodel.calibration.calibrate import Comparison
from biomodel.calibration.fit import Fit
from biomodel.errors import CalibrationError, InputError
from biomodel.forecast import LONGEST
from biomodel.schedule import Schedule
from biomodel.solvers.torch import TorchSolver
from biomodel.stage_chain import STAGES, Answer, Chain, Errors, Setting, course
from biomodel.stage_errors import DrugMapError, TreatmentError
from biomodel.tables import html_table

__all__ = ["LABELS", "QUANTITIES", "TITLES", "Share", "Stages", "stages"]

#: What a reader calls each stage.
LABELS: Mapping[str, str] = {
    "adc": "ADC noise", "drug_map": "T1, AIF (drug map)", "registration": "registration",
    "segmentation": "segmentation", "parameters": "parameters (prior)", "model": "choice of model",
    "treatment": "treatment to come", "grid": "grid of the solver", "misfit": "misfit beyond stated noise",
}  # fmt: skip
#: Quantities of a forecast, with their units. The logarithm is of all cells, also those too sparse to be seen: it is
#: never without value, and errors that multiply add up in it.
QUANTITIES: Mapping[str, str] = {"volume": "cm^3", "cells": "1", "log_cells": "1"}
#: What a reader calls each quantity.
TITLES: Mapping[str, str] = {"volume": "volume", "cells": "visible cells", "log_cells": "log of all cells"}
#: Errors of treatment and drug map where a caller states none: working values.
TREATMENT, DRUG_MAP = TreatmentError(), DrugMapError()
#: Resamples behind an interval.
RESAMPLES = 400
#: Evidence weight below which a model is left out.
LEAST = 1e-3


@dataclass(frozen=True)
class Share:
    """One stage's part of a forecast's variance, each as a share of it.

    Attributes
    ----------
    contribution, low, high : float
        With its 5 % and 95 % quantiles by bootstrap over the draws.
    first, total_effect : float
    off, off_low, off_high : float or None
        By what share the variance fell when the stage's error was set to 0, with the same quantiles; None unless tried.
    """

    stage: str
    label: str
    contribution: float
    low: float
    high: float
    first: float
    total_effect: float
    off: float | None = None
    off_low: float | None = None
    off_high: float | None = None


@dataclass(frozen=True, eq=False)
class Stages:
    """Runs of a forecast's crossed draws, and the variance divided among the stages.

    Attributes
    ----------
    names : tuple of str
        Stages that have an error, in the order of :data:`biomodel.stage_chain.STAGES`.
    absent : mapping of str to str
        Stages without, and why.
    first_set, second_set : ndarray, shape (draws, 3)
        The quantities of :data:`QUANTITIES` in two independent sets of draws.
    crossed : ndarray, shape (stages, draws, 3)
        The first set with one stage's errors of the second.
    off : ndarray, shape (models, stages, draws, 3), or None
        The first set with one stage's errors set to 0; for the choice of model, with each model in turn.
    weights : ndarray, shape (models,)
    models : tuple of str
    day : float
    fits : tuple of Fit
    seed : int
    notes : tuple of str
    """

    names: tuple[str, ...]
    absent: Mapping[str, str]
    first_set: np.ndarray
    second_set: np.ndarray
    crossed: np.ndarray
    off: np.ndarray | None
    weights: np.ndarray
    models: tuple[str, ...]
    day: float
    fits: tuple[Fit, ...]
    seed: int
    notes: tuple[str, ...] = field(default=())

    def _of(self, quantity: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        if quantity not in QUANTITIES:
            raise InputError(f"stages: no quantity {quantity!r}; there are {', '.join(QUANTITIES)}.")
        k = list(QUANTITIES).index(quantity)
        off = None if self.off is None else self.off[..., k]
        return self.first_set[:, k], self.second_set[:, k], self.crossed[..., k], off

    def values(self, quantity: str = "volume") -> np.ndarray:
        """All independent draws of a quantity, (2 draws,)."""
        a, b, _, _ = self._of(quantity)
        return np.concatenate((a, b))

    @property
    def telling(self) -> str:
        """The volume, or the logarithm of all cells where no draw has any volume, which then does not vary."""
        return "volume" if self.variance("volume") > 0 else "log_cells"

    def variance(self, quantity: str = "volume") -> float:
        """Variance of the forecast, in the quantity's unit squared."""
        return float(self.values(quantity).var())

    def sum(self, quantity: str = "volume") -> tuple[float, float, float]:
        """Sum of all contributions as a share of the variance, with its 5 % and 95 % quantiles by bootstrap."""
        shares, resampled = self._shares(quantity)
        low, high = np.quantile(resampled[0].sum(0), [0.05, 0.95])
        return float(shares[0].sum()), float(low), float(high)

    def _shares(self, quantity: str) -> tuple[np.ndarray, np.ndarray]:
        a, b, crossed, off = self._of(quantity)
        found = _estimate(a, b, crossed, off, self.weights)
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, 11]))
        draws = []
        for _ in range(RESAMPLES):
            i = rng.integers(0, len(a), len(a))
            draws.append(_estimate(a[i], b[i], crossed[:, i], None if off is None else off[..., i], self.weights))
        return found, np.stack(draws, -1)

    def table(self, quantity: str = "volume") -> tuple[Share, ...]:
        """The stages' shares of the variance, in the order of the chain.

        Raises
        ------
        InputError
            If there is no such quantity, or it does not vary at all.
        """
        found, drawn = self._shares(quantity)
        low, high = np.quantile(drawn, [0.05, 0.95], axis=-1)
        rows = []
        for i, name in enumerate(self.names):
            tried = (None,) * 3 if self.off is None else tuple(float(x[3, i]) for x in (found, low, high))
            rows.append(Share(name, LABELS[name], float(found[0, i]), float(low[0, i]), float(high[0, i]),
                              float(found[1, i]), float(found[2, i]), *tried))  # fmt: skip
        return tuple(rows)

    def _repr_html_(self) -> str:
        quantity = self.telling
        rows = [(s.label, f"{s.contribution:.0%}", f"{s.low:.0%} to {s.high:.0%}") for s in self.table(quantity)]
        rows += [(LABELS[n], "–", why) for n, why in self.absent.items()]
        patient = self.fits[0].patient.id
        title = f"Where the variance of the {TITLES[quantity]} on day {self.day:g} comes from, {patient}"
        return html_table(("stage", "share of the variance", "90 % interval"), rows, title)


def _estimate(
    a: np.ndarray, b: np.ndarray, crossed: np.ndarray, off: np.ndarray | None, shares: np.ndarray
) -> np.ndarray:
    """Contribution, first order, total effect and (4) fall without it of each stage, (3 or 4, stages), as shares."""
    both = np.concatenate((a, b))
    variance = float(both.var())
    if not variance > 0:
        raise InputError(
            "stages: the forecast is the same in all draws, so there is no variance to divide; the tumour is gone in "
            "all of them, or no stage has an error. Ask for 'log_cells'."
        )
    total = ((a - crossed) ** 2).mean(1) / 2 / variance
    first = ((b - both.mean()) * (crossed - a)).mean(1) / variance
    rows = [(first + total) / 2, first, total]
    if off is not None:
        # Against two draws of the stage's errors with the same others: fewer chance correlations with them stay.
        rows.append(1 - (shares[:, None] * off.var(-1)).sum(0) / ((a.var() + crossed.var(1)) / 2))
    return np.stack(rows)


@dataclass(frozen=True, eq=False)
class _Side:
    """One draw of all errors and what each model makes of it: answers by model, model chosen, treatment, drug maps."""

    answers: Mapping[int, Answer]
    chosen: int
    schedule: Schedule
    supplies: Mapping[int, np.ndarray | None]


def stages(
    fits: Fit | Comparison | Sequence[Fit],
    until: float,
    draws: int = 200,
    seed: int = 0,
    treatment: TreatmentError | None = TREATMENT,
    drug_map: DrugMapError | None = DRUG_MAP,
    switch_off: bool = False,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> Stages:
    """Divide the variance of one patient's forecast among the stages of its making.

    Parameters
    ----------
    fits : Fit, Comparison or sequence of Fit
        Of one imaged patient, by `Laplace` (or `MAP`); several are models of which each draw takes one by its evidence.
        Errors of outlines and registration are those of the patient's cellularity (`edge_sd_mm`,
        `region_shift_sd_mm`, `misalignment_sd_mm`), which the fits must have been calibrated with.
    until : float
        Day of the forecast.
    draws : int
        Of each of the two sets. The model runs draws (stages + 2) times; with 200 draws shares are known to about
        0.05 to 0.1.
    seed : int
    treatment : TreatmentError, optional
        How the course after the last visit may differ from the plan; None takes it as fixed.
    drug_map : DrugMapError, optional
        Error of the drug map, where the models read one.
    switch_off : bool
        Also set each stage's error to 0 in turn, and see by how much the variance falls: draws times stages more runs.
        For the choice of model, each model is taken alone, and the variances averaged by their weights.
    progress : callable, optional
        Wraps the iteration over the draws.

    Returns
    -------
    Stages

    Raises
    ------
    InputError
        If `until` lies before the last calibrated visit, or draws is below 10.
    CalibrationError
        If the fits are of different patients, of one without images or ADC map, or hold a map of the growth rate.
    """
    given = (fits,) if isinstance(fits, Fit) else tuple(fits.fits if isinstance(fits, Comparison) else fits)
    _check(given, until, draws)
    chains = [Chain(fit, until, drug_map) for fit in given]
    scores = np.array([f.log_evidence for f in given])
    weights = np.exp(scores - scores.max())
    # A model that next to no draw would take is left out.
    weights = np.where(weights > LEAST * weights.sum(), weights, 0.0)
    weights /= weights.sum()
    patient = given[0].patient
    last = patient.visits[-1].day
    names, absent = _present(given, chains, weights, until, treatment)

    sides: list[_Side] = []
    work = [(side, i) for side in range(2) for i in range(draws)]
    for side, i in progress(work) if progress else work:
        errors = Errors((int(seed), 23, side, i))
        chosen = int(errors.rng("model").choice(len(given), p=weights))
        answers = {m: c.answer(errors) for m, c in enumerate(chains) if weights[m] > 0}
        supplies = {m: chains[m].draw_supply(errors) for m in answers}
        sides.append(_Side(answers, chosen, course(errors, treatment, patient.schedule, last), supplies))
    a, b = sides[:draws], sides[draws:]

    def run(sources: Mapping[str, list | None], only: int | None = None) -> np.ndarray:
        """The first set with some stages' errors from another set, or none at all (None), perhaps with one model."""
        jobs: dict[int, list[tuple[int, Setting]]] = {}
        for i in range(draws):

            def of(stage: str, i=i) -> _Side | None:
                source = sources.get(stage, a)
                return None if source is None else source[i]

            picked = of("model")
            m = only if only is not None else (picked or a[i]).chosen
            z, start = given[m].z.copy(), np.zeros_like(a[i].answers[m].start)
            for stage in STAGES:
                one = of(stage)
                z = z if one is None else z + one.answers[m].moves[stage]
            noise, plan, supply = of("adc"), of("treatment"), of("drug_map")
            setting = Setting(
                z,
                start if noise is None else noise.answers[m].start,
                patient.schedule if plan is None else plan.schedule,
                None if supply is None else supply.supplies[m],
            )
            jobs.setdefault(m, []).append((i, setting))
        found = np.zeros((draws, len(QUANTITIES)))
        for m, entries in jobs.items():
            found[[i for i, _ in entries]] = chains[m].run([s for _, s in entries])
        return found

    first_set, second_set = run({}), run(dict.fromkeys(STAGES, b))
    crossed = np.stack([run({name: b}) for name in names])
    off = None
    if switch_off:
        parts = []
        for name in names:
            if name == "model":
                parts.append([run({}, only=m) if weights[m] > 0 else first_set for m in range(len(given))])
            else:
                parts.append([run({name: None})] * len(given))
        off = np.stack([np.stack(p) for p in parts], 1)
    notes = tuple(dict.fromkeys(n for f in given for n in f.notes))
    return Stages(names, absent, first_set, second_set, crossed, off, weights, tuple(f.model.label for f in given),
                  float(until), given, int(seed), notes)  # fmt: skip


def _check(fits: tuple[Fit, ...], until: float, draws: int) -> None:
    if not fits:
        raise CalibrationError("stages: no fits given.")
    patient = fits[0].patient
    if any(f.patient.fingerprint() != patient.fingerprint() for f in fits):
        raise CalibrationError("stages: the fits are of different patients, or of different visits of one.")
    if patient.domain.well_mixed:
        raise CalibrationError(
            f"patient {patient.id} has no images, so there are no stages of imaging to tell apart; use the intervals "
            "of bm.forecast."
        )
    if patient.cellularity is None or all(v.adc is None or v.region is None for v in patient.visits):
        raise CalibrationError(
            f"patient {patient.id}: no visit has an ADC map and a region; without measured cell fractions there is no "
            "noise to carry to the forecast. Add ADC maps to the manifest."
        )
    if any(f.rate_map is not None for f in fits):
        raise CalibrationError("stages: a fit holds a map of the growth rate; calibrate with Laplace().")
    if not all(isinstance(f.solver, TorchSolver) for f in fits):
        raise CalibrationError("stages: needs fits by a TorchSolver.")
    last = patient.visits[-1].day
    if not last <= until <= patient.visits[0].day + LONGEST:
        raise InputError(
            f"stages: until is day {until:g}; expected one from the last calibrated visit, day {last:g}, and within "
            f"{LONGEST:g} days of the first."
        )
    if isinstance(draws, bool) or not isinstance(draws, (int, np.integer)) or draws < 10:
        raise InputError(f"stages: draws is {draws!r}; expected a whole number from 10.")


def _present(fits, chains, weights, until, treatment) -> tuple[tuple[str, ...], dict[str, str]]:
    """Stages that have an error, and why the others have none."""
    patient = fits[0].patient
    last = patient.visits[-1].day
    to_come = any(last < e.day < until for e in (*patient.schedule.doses, *patient.schedule.fractions))
    belongs = {s for c in chains for s in c.stage_of}
    why: dict[str, str] = {}
    if all(c.supply is None for c in chains):
        why["drug_map"] = "no model reads a drug map"
    elif all(c.drug_map is None for c in chains):
        why["drug_map"] = "taken as exact"
    if "registration" not in belongs:
        why["registration"] = "misalignment_sd is 0 in the patient's cellularity: images are taken as aligned"
    if "segmentation" not in belongs:
        why["segmentation"] = "edge_sd and region_shift_sd are 0 in the cellularity: outlines are taken as exact"
    if len(fits) < 2:
        why["model"] = "one model given"
    elif weights.max() == 1:
        why["model"] = "the data leave one model"
    if treatment is None:
        why["treatment"] = "taken as planned"
    elif not to_come:
        why["treatment"] = "no treatment between the last visit and the day of the forecast"
    if "grid" not in belongs:
        why["grid"] = "the grid's error is not estimated on boxes this large"
    if all(not c.excess.any() for c in chains):
        why["misfit"] = "model and images disagree by no more than the stated noise"
    return tuple(s for s in STAGES if s not in why), why
