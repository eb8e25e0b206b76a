"""`decide`: the same draws of a patient under several regimens, compared draw by draw.

What a model believes about regimens, with its uncertainty. It is never advice on treatment: a model knows nothing of
what a person tolerates, wants, or has besides the tumour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import xarray as xr

from biomodel.calibration.fit import Fit
from biomodel.defaults import default_model
from biomodel.errors import InputError, ModelError
from biomodel.forecast import Forecast, forecast
from biomodel.models import ReactionDiffusion
from biomodel.patient import Patient, Visit
from biomodel.schedule import Schedule
from biomodel.tables import html_table
from biomodel.treatments import Kill

__all__ = ["NOT_ADVICE", "Decision", "DoseTotal", "Pair", "decide", "model_for", "untried"]

NOT_ADVICE = "This says what the model believes, not what is good for a person; it is not advice on treatment."
#: Posterior over prior standard deviation above which the data told next to nothing of a parameter.
UNINFORMED = 0.9
#: Total doxorubicin, mg/m², beyond which a note is made: about 5 % of patients had heart failure at 400, 26 % at 550
#: (Swain et al. 2003, doi:10.1002/cncr.11407).
DOXORUBICIN = 400.0
#: Share of draws with visible tumour at a visit without, beyond which a note is made.
OVERLOOKED = 0.1
#: The same volume or number of cells in two regimens: a tie.
SAME = 1e-12


@dataclass(frozen=True)
class Pair:
    """Two regimens compared draw by draw.

    Attributes
    ----------
    first, second : str
    quantity : str
    less, tie : float
        Share of draws in which the first leaves less than the second, and in which both leave the same.
    error : float
        Monte-Carlo standard error of `probability`.
    difference, low, high : float
        Mean of first minus second over the draws, and its 5 % and 95 % quantiles, in the quantity's unit.
    ratio, ratio_low, ratio_high : float
        Median of first over second, and the same quantiles; NaN where a draw leaves nothing in the second.
    """

    first: str
    second: str
    quantity: str
    less: float
    tie: float
    error: float
    difference: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float

    @property
    def probability(self) -> float:
        """Probability that the first regimen leaves less: ties count half for each."""
        return self.less + self.tie / 2


@dataclass(frozen=True)
class DoseTotal:
    """What a regimen holds of one drug: doses and amount after the last calibrated visit, and over the whole course."""

    agent: str
    units: str
    doses: int
    amount: float
    whole: float
    largest: float


@dataclass(frozen=True, eq=False)
class Decision:
    """Regimens compared on one day.

    Attributes
    ----------
    data : xarray.Dataset
        ``volume`` (regimen, draw; visible tumour, cm³) and, with images, ``cells`` (all cells, also those too sparse
        to be seen). Draw i is the same patient in every regimen.
    day : float
    fit : Fit
    schedules : mapping of str to Schedule
    seed : int
    notes : tuple of str
        Which drugs rest on priors alone, and what else a reader must know.
    """

    data: xr.Dataset
    day: float
    fit: Fit
    schedules: Mapping[str, Schedule]
    seed: int
    notes: tuple[str, ...] = field(default=())

    @property
    def labels(self) -> tuple[str, ...]:
        """The regimens, in the order given."""
        return tuple(self.schedules)

    @property
    def quantity(self) -> str:
        """What decides: cells, which never tie at 0 as volumes do; without images the volume."""
        return "cells" if "cells" in self.data else "volume"

    def values(self, label: str, quantity: str | None = None) -> np.ndarray:
        """Draws of a quantity under one regimen, (draws,)."""
        quantity = self.quantity if quantity is None else quantity
        if quantity not in self.data:
            raise InputError(f"decision: no quantity {quantity!r}; there is {', '.join(map(str, self.data))}.")
        if label not in self.schedules:
            raise InputError(f"decision: no regimen {label!r}; there are {', '.join(self.schedules)}.")
        return self.data[quantity].sel(regimen=label).values

    def pair(self, first: str, second: str, quantity: str | None = None) -> Pair:
        """Compare two regimens, by `quantity` if not the deciding one."""
        quantity = self.quantity if quantity is None else quantity
        a, b = self.values(first, quantity), self.values(second, quantity)
        tie = np.abs(a - b) <= SAME * np.maximum(np.abs(a), np.abs(b))
        score = np.where(tie, 0.5, a < b)
        low, high = np.quantile(a - b, [0.05, 0.95])
        ratios = np.quantile(a / b, [0.5, 0.05, 0.95]) if (b > 0).all() else np.full(3, math.nan)
        # A sample of zeros and ones alone has no spread, but the probability is not known exactly for that.
        error = math.sqrt(max(score.var(), 1 / (len(a) + 1) * (1 - 1 / (len(a) + 1))) / len(a))
        return Pair(first, second, quantity, float((~tie & (a < b)).mean()), float(tie.mean()), error,
                    float((a - b).mean()), float(low), float(high), *(float(r) for r in ratios))  # fmt: skip

    def pairs(self, quantity: str | None = None) -> tuple[Pair, ...]:
        """All pairs, each once, in the order of the regimens."""
        return tuple(self.pair(a, b, quantity) for a, b in combinations(self.labels, 2))

    def least(self, quantity: str | None = None) -> dict[str, float]:
        """Probability that each regimen leaves least of all; where several do, they share the draw."""
        values = np.stack([self.values(label, quantity) for label in self.labels])
        lowest = values <= values.min(0) * (1 + SAME)
        return dict(zip(self.labels, (lowest / lowest.sum(0)).mean(1).tolist(), strict=True))

    def gone(self) -> dict[str, float]:
        """Probability of no visible tumour on the day, by regimen (without images: below the detection floor)."""
        settings = self.fit.patient.volumes
        floor = settings.floor if self.fit.patient.domain.well_mixed and settings else 0.0
        return {label: float((self.values(label, "volume") <= floor).mean()) for label in self.labels}

    def totals(self, label: str) -> tuple[DoseTotal, ...]:
        """Doses of each drug in one regimen."""
        begin, found = self.fit.patient.visits[-1].day, []
        schedule = self.schedules[label]
        for agent in dict.fromkeys(d.agent for d in schedule.doses):
            doses = schedule.of(agent)
            later = [d.amount for d in doses if d.day >= begin]
            found.append(DoseTotal(agent, doses[0].units, len(later), sum(later), sum(d.amount for d in doses),
                                   max(d.amount for d in doses)))  # fmt: skip
        return tuple(found)

    def table(self) -> list[dict[str, object]]:
        """One row per regimen: volume and cells with 90 % intervals, probabilities, and doses to come."""
        least, gone, rows = self.least(), self.gone(), []
        for label in self.labels:
            row: dict[str, object] = {"regimen": label, "no_visible_tumour": gone[label], "least": least[label]}
            for name in map(str, self.data):
                low, middle, high = np.quantile(self.values(label, name), [0.05, 0.5, 0.95])
                row |= {name: float(middle), f"{name}_low": float(low), f"{name}_high": float(high)}
            row["doses"] = {t.agent: t for t in self.totals(label)}
            rows.append(row)
        return rows

    def _repr_html_(self) -> str:
        def doses(row) -> str:
            held = [f"{t.doses} × {t.agent}, {t.amount:g} {t.units}" for t in row["doses"].values() if t.doses]
            return "; ".join(held) or "none"

        def interval(row, name: str) -> str:
            return f"{row[name]:.3g} ({row[f'{name}_low']:.2g} to {row[f'{name}_high']:.2g})"

        names = [str(n) for n in self.data]
        columns = ["regimen", *(f"{n}, {self.data[n].attrs['units']} (90 %)" for n in names), "no visible tumour",
                   "leaves least", "doses to come"]  # fmt: skip
        rows = [
            (r["regimen"], *(interval(r, n) for n in names), f"{r['no_visible_tumour']:.0%}", f"{r['least']:.0%}",
             doses(r))
            for r in self.table()
        ]  # fmt: skip
        pairs = [
            (f"{p.first} leaves less than {p.second}", f"{p.probability:.0%}", f"{p.tie:.0%}",
             f"{p.difference:.3g} ({p.low:.2g} to {p.high:.2g})")
            for p in self.pairs()
        ]  # fmt: skip
        title = f"Regimens of {self.fit.patient.id} on day {self.day:g}, as the model foresees them. {NOT_ADVICE}"
        return html_table(columns, rows, title) + html_table(
            ("comparison, draw by draw", "probability", "of which ties", f"difference of {self.quantity}"), pairs
        )


def model_for(patient: Patient, regimens: Mapping[str, Schedule]) -> ReactionDiffusion:
    """The default model with a term for every drug of the patient's own schedule and of the regimens."""
    union = patient.schedule
    for schedule in regimens.values():
        union = union + schedule
    return default_model(patient.replace_schedule(union))


def untried(fit: Fit, agents: Iterable[str]) -> dict[str, dict[str, float]]:
    """Which of the agents the patient had never had by the last calibrated visit.

    Returns
    -------
    dict
        By agent: its calibrated parameters with their shrinkage (posterior over prior standard deviation; 1 where the
        data said nothing).
    """
    last = fit.patient.visits[-1].day
    known = fit.patient.schedule
    had = {d.agent for d in known.doses if d.day < last} | {o.agent for o in known.ongoing if o.start_day < last}
    return {a: _shrinkage(fit, a) for a in dict.fromkeys(agents) if a not in had}


def _shrinkage(fit: Fit, agent: str) -> dict[str, float]:
    """Shrinkage of the parameters that are an agent's alone."""
    names: list[str] = []
    for term in fit.model.treatments:
        if isinstance(term, Kill) and agent in term.agents:
            own = [p.name for p in term.parameters if len(term.agents) == 1 or p.name.endswith(f"_{agent}")]
            names += [f"{term.name}.{name}" for name in own]
    return {n: s for n, s in fit.shrinkage.items() if n in names}


def check_history(fit: Fit, regimens: Mapping[str, Schedule]) -> None:
    """Raise where a regimen differs from the patient's schedule before the last calibrated visit.

    Whether an entry is marked given or planned does not matter.
    """
    last = fit.patient.visits[-1].day

    def history(schedule: Schedule) -> set[tuple]:
        doses = {(d.day, d.agent, f"{d.amount:g} {d.units}") for d in schedule.doses if d.day < last}
        fractions = {(f.day, "radiotherapy", f"{f.gray:g} Gy") for f in schedule.fractions if f.day < last}
        return doses | fractions | {(o.start_day, o.agent, "from then on") for o in schedule.ongoing
                                    if o.start_day < last}  # fmt: skip

    known = history(fit.patient.schedule)
    for label, schedule in regimens.items():
        other = history(schedule)
        if other != known:
            day, agent, amount = min(other ^ known)
            where = "only in the regimen" if (day, agent, amount) in other else "only in the patient's schedule"
            raise InputError(
                f"regimen {label!r}: before the last calibrated visit on day {last:g} it differs from the patient's "
                f"schedule: {agent} {amount} on day {day:g} is {where}. The calibration rests on that history; keep it "
                "(no_further_treatment(patient.schedule, day) + what comes after) and change only what follows."
            )


def decide(
    fit: Fit,
    regimens: Mapping[str, Schedule],
    day: float,
    draws: int = 400,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> Decision:
    """Compare regimens on one day.

    Each draw of the posterior, with its initial state, goes through every regimen (common random numbers), so
    differences are those between regimens for one and the same patient.

    Parameters
    ----------
    fit : Fit
        With a term for every drug of the regimens (see :func:`model_for`).
    regimens : mapping of str to Schedule
        At least two, by label, each with what was given before the last calibrated visit.
    day : float
        After that visit.
    draws, seed : int
    progress : callable, optional
        Wraps the iteration over regimens, for a progress bar.

    Returns
    -------
    Decision

    Raises
    ------
    InputError
        If there are fewer than two regimens, histories differ, the day is not to come, or the fit has no posterior.
    ModelError
        If the model has no term for a drug of a regimen.
    """
    regimens = dict(regimens)
    last = fit.patient.visits[-1].day
    if len(regimens) < 2:
        raise InputError(f"decide: {len(regimens)} regimens given; expected at least two to compare, by label.")
    if not (math.isfinite(day) and day > last):
        raise InputError(f"decide: day {day:g}; expected one after the last calibrated visit, day {last:g}.")
    if isinstance(draws, bool) or not isinstance(draws, (int, np.integer)) or draws < 1:
        raise InputError(f"decide: draws is {draws!r}; expected a whole number from 1.")
    if not fit.sd.any():
        raise InputError("decide: a MAP fit has no posterior, so no probabilities; calibrate with Laplace() or NUTS().")
    for label, schedule in regimens.items():
        try:
            fit.model.check_schedule(schedule)
        except ModelError as error:
            raise ModelError(f"regimen {label!r}: {error}") from error
    check_history(fit, regimens)
    notes: list[str] = [NOT_ADVICE]
    empty = [v for v in fit.patient.visits[1:] if fit.patient.volume_of(v) == 0]
    parts: list[xr.Dataset] = []
    labels = list(regimens)
    for label in progress(labels) if progress else labels:
        found = forecast(fit, None, draws, seed, [*(v.day for v in empty), day], regimens[label], math.inf)
        if not parts:
            notes += _overlooked(found, empty)
        now = found.data.sel(time=day)
        part = now[["volume"]]
        if "cell_fraction" in now:
            theta = now.attrs["theta"]
            whole = now["cell_fraction"].sum(("z", "y", "x"), dtype=float)
            part = part.assign(cells=whole * theta if math.isfinite(theta) else whole)
            part["cells"].attrs["units"] = "1" if math.isfinite(theta) else "full voxels"
            part["volume"].attrs["units"] = "cm^3"
        parts.append(part.drop_vars("time"))
        notes += [f"{label}: {n}" for n in found.notes if n not in fit.notes]
    # A draw without a finite state under one regimen is left out under all.
    names = xr.DataArray(labels, dims="regimen", name="regimen")
    data = xr.concat(parts, names, join="inner", combine_attrs="override")
    data.attrs = {"day": float(day), "patient": fit.patient.id}
    return Decision(data, float(day), fit, regimens, seed, (*fit.notes, *notes, *_words(fit, regimens, day)))


def _overlooked(found: Forecast, empty: Sequence[Visit]) -> list[str]:
    """Notes on visits without visible tumour at which many draws show some.

    Such a visit only bounds the parameters. A Gaussian posterior whose centre lies within the bound does not know of
    it, and thinks too little of the treatment so far.
    """
    if found.fit.patient.domain.well_mixed:
        return []
    shares = {v.number: float((found["volume"].sel(time=v.day) > 0).mean()) for v in empty}
    return [
        f"No tumour was seen at visit {number}, but {share:.0%} of the draws show some then: the posterior has not "
        "taken that in, and the drugs given before it may be stronger than stated here."
        for number, share in shares.items() if share > OVERLOOKED
    ]  # fmt: skip


def _words(fit: Fit, regimens: Mapping[str, Schedule], day: float) -> list[str]:
    """What a reader must know of drugs and days."""
    found = []
    last = fit.patient.visits[-1].day
    to_come = {label: [d for d in s.doses if last <= d.day < day] for label, s in regimens.items()}
    used = dict.fromkeys(d.agent for doses in to_come.values() for d in doses)
    used |= dict.fromkeys(o.agent for s in regimens.values() for o in s.ongoing if o.start_day < day)
    new = untried(fit, used)
    for agent, shrinkage in new.items():
        where = ", ".join(f"{n} (shrinkage {s:.2f})" for n, s in shrinkage.items()) or "no parameter of its own"
        found.append(
            f"{agent} had not been given by the last calibrated visit: what it does rests on priors alone, through "
            f"{where}."
        )
    for agent in used:
        vague = {n: s for n, s in _shrinkage(fit, agent).items() if s > UNINFORMED}
        if agent not in new and vague:
            which = ", ".join(f"{n} (shrinkage {s:.2f})" for n, s in vague.items())
            found.append(f"{agent} was given, but the visits told next to nothing of it: {which}.")
    for label, schedule in regimens.items():
        late = [d for d in schedule.doses if d.day >= day]
        if late:
            found.append(f"{label}: {len(late)} doses on day {day:g} or later do not count.")
        total = sum(d.amount for d in schedule.of("doxorubicin") if d.units == "mg/m^2")
        if total > DOXORUBICIN:
            found.append(
                f"{label}: {total:g} mg/m^2 of doxorubicin in all; the risk of heart failure rises steeply beyond "
                f"{DOXORUBICIN:g}."
            )
    return found
