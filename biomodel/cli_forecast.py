"""The work behind ``tumorcast forecast``: calibrate, forecast, compare plans, show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import typer
from rich.table import Table

from biomodel.calibration.calibrate import calibrate
from biomodel.cli_show import Steps
from biomodel.defaults import default_model, no_further_treatment, without_further
from biomodel.forecast import Forecast, forecast
from biomodel.patient import Patient
from biomodel.schedule import Schedule
from biomodel.solvers.torch import TorchSolver

__all__ = ["Outcome", "Plan", "days_of", "plans_of", "run", "tables"]

LEVELS = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class Plan:
    """Another plan to compare with the patient's own."""

    label: str
    schedule: Schedule


@dataclass(frozen=True, eq=False)
class Outcome:
    """What was computed for one patient.

    Parameters
    ----------
    forecast
        Under the patient's own plan.
    what_if
        Under other plans, by label.
    """

    forecast: Forecast
    what_if: tuple[tuple[str, Forecast], ...]


def days_of(patient: Patient, known: Patient, until: float | None) -> list[float]:
    """Return the days to forecast: those of all visits up to `until`, and `until` itself.

    Visits that were calibrated on are among them, so that the report can show how well the fit describes them.

    Raises
    ------
    typer.BadParameter
        If there is no day after the last calibrated visit.
    """
    last = known.visits[-1]
    end = patient.visits[-1].day if until is None else until
    if not end > last.day:
        if until is None:
            raise typer.BadParameter(
                f"patient {patient.id} has no visit after visit {last.number} (day {last.day:g}); give the last day of "
                f"the forecast, for example --until {last.day + 28:g}, or calibrate on fewer visits",
                param_hint="--until",
            )
        raise typer.BadParameter(
            f"day {until:g} is not after visit {last.number} (day {last.day:g}), the last one used",
            param_hint="--until",
        )
    return sorted({visit.day for visit in patient.visits if visit.day <= end} | {end})


def plans_of(known: Patient, stop: bool, without: Sequence[str]) -> tuple[Plan, ...]:
    """Return the plans to compare with the patient's own; one that changes nothing is left out.

    Raises
    ------
    InputError
        If an agent to leave out is not in the schedule.
    """
    day, own = known.visits[-1].day, known.schedule
    plans = [Plan(f"no further {agent}", without_further(own, agent, day)) for agent in without]
    if stop:
        plans.insert(0, Plan("no further treatment", no_further_treatment(own, day)))
    return tuple(plan for plan in plans if plan.schedule != own)


def run(
    known: Patient,
    days: Sequence[float],
    plans: Sequence[Plan],
    *,
    draws: int,
    seed: int,
    device: str,
    steps: Steps,
) -> Outcome:
    """Calibrate on what is `known`, and forecast under the own and the other plans.

    Raises
    ------
    TumorcastError
        If a step cannot be done.
    """
    solver = TorchSolver(device=device)
    steps.say(f"Calibrating on {len(known.visits)} visits")
    fit = calibrate(default_model(known), known, solver, progress=steps.detail)
    steps.say("Forecasting")
    own = forecast(fit, times=days, draws=draws, seed=seed, progress=steps.track)
    others = []
    for plan in plans:
        steps.say(f"Forecasting with {plan.label}")
        # The comparison is of volumes; maps at all visits would only cost memory.
        other = forecast(fit, times=[days[-1]], draws=draws, seed=seed, schedule=plan.schedule, progress=steps.track)
        others.append((plan.label, other))
    return Outcome(own, tuple(others))


def tables(outcome: Outcome, patient: Patient) -> list[tuple[str, Table]]:
    """Return the forecast, visit by visit, and under the other plans, each with its title."""
    found = [_visits(outcome, patient)]
    if outcome.what_if:
        found.append(_plans(outcome))
    return found


def _quantity(data: Forecast) -> str:
    # Where measurement noise was added, that is what compares with a measured volume.
    return "measured_volume" if "measured_volume" in data.data else "volume"


def _interval(data: Forecast, day: float) -> tuple[str, str]:
    low, middle, high = data[_quantity(data)].sel(time=day).quantile(LEVELS, "draw").values
    return f"{middle:.3g}", f"{low:.3g} to {high:.3g}"


def _visits(outcome: Outcome, patient: Patient) -> tuple[str, Table]:
    known = outcome.forecast.fit.patient
    last = known.visits[-1]
    title = f"{patient.id}: tumour volume (cm³) forecast from visits 1 to {last.number} (day {last.day:g})"
    table = Table()
    for name in ("day", "visit", "median", "90 % interval", "none visible", "seen", "unchanged"):
        table.add_column(name, justify="right")
    unchanged = next((v for v in map(known.volume_of, reversed(known.visits)) if v is not None), None)
    visits = {visit.day: visit for visit in patient.visits}
    for day in outcome.forecast.times:
        if day <= last.day:
            continue
        visit = visits.get(float(day))
        seen = None if visit is None else patient.volume_of(visit)
        table.add_row(
            f"{day:g}",
            "" if visit is None else str(visit.number),
            *_interval(outcome.forecast, day),
            f"{_gone(outcome.forecast, day):.0%}",
            "" if seen is None else f"{seen:.3g}",
            "" if unchanged is None else f"{unchanged:.3g}",
        )
    return title, table


def _gone(forecast: Forecast, day: float) -> float:
    """Probability that no visible tumour is left on a day."""
    known = forecast.fit.patient
    floor = known.volumes.floor if known.domain.well_mixed and known.volumes else 0.0
    return float((forecast["volume"].sel(time=day) <= floor).mean())


def _plans(outcome: Outcome) -> tuple[str, Table]:
    day = float(outcome.forecast.times[-1])
    table = Table()
    table.add_column("plan")
    for name in ("median", "90 % interval"):
        table.add_column(name, justify="right")
    for label, data in (("as planned", outcome.forecast), *outcome.what_if):
        table.add_row(label, *_interval(data, day))
    return f"What if: tumour volume (cm³) on day {day:g}", table
