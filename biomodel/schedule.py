"""Treatments in time: doses of drugs, fractions of radiotherapy, and therapies known only by their start."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, SupportsFloat

from biomodel.errors import InputError
from biomodel.units import normal_dose_units

__all__ = ["Dose", "Fraction", "Ongoing", "Schedule"]

Status = Literal["given", "planned"]

#: Largest amount per dose that is still believed, by unit. High-dose methotrexate reaches 12 g/m² and fluorouracil
#: infusions a few g/m² (label doses); carboplatin stays under AUC 10 (Calvert 1989, 10.1200/JCO.1989.7.11.1748).
LARGEST_DOSE = {"mg/m^2": 15000.0, "mg/kg": 500.0, "mg": 30000.0, "AUC": 20.0, "1": 100.0}
#: Largest dose per fraction that is still believed, Gy: radiosurgery of small targets goes up to 90 Gy.
LARGEST_FRACTION = 90.0
#: Largest distance from day 0 that is still believed, days (a hundred years).
LARGEST_DAY = 36525.0


def _check_day(day: object, what: str) -> float:
    if isinstance(day, bool) or not isinstance(day, SupportsFloat):
        raise InputError(f"{what}: day {day!r}; expected a number of days from day 0.")
    value = float(day)
    if not math.isfinite(value) or abs(value) > LARGEST_DAY:
        raise InputError(f"{what}: day {value:g}; expected a number of days from day 0. Check the day or the date.")
    return value


def _check_status(status: object, what: str) -> None:
    if status not in ("given", "planned"):
        raise InputError(f"{what}: status {status!r}; expected 'given' or 'planned'.")


def _check_agent(agent: object, what: str) -> None:
    if not isinstance(agent, str) or not agent or "." in agent or any(letter.isspace() for letter in agent):
        raise InputError(
            f"{what}: agent {agent!r}; expected a name without blanks and dots (it names parameters such as "
            "'paclitaxel.efficacy'), for example 'nab-paclitaxel'."
        )


def _check_amount(value: float, most: float, units: str, what: str, kind: str, check: str) -> None:
    """Refuse a `value` in `units` that is not positive, or larger than `most`; `check` says what to look at then."""
    if not math.isfinite(value) or value <= 0:
        raise InputError(
            f"{what} {value:g} {units}; expected a positive number. Correct it, or leave out a {kind} that was not "
            "given."
        )
    if value > most:
        raise InputError(f"{what} {value:g} {units}; expected at most {most:g} {units}. {check}")


@dataclass(frozen=True)
class Dose:
    """One dose of a drug.

    Parameters
    ----------
    day
        Days from the patient's day 0; any hour of the day as a fraction.
    agent
        Name of the drug, as in the model's ``Chemotherapy(agent)``.
    amount
        Positive, in `units`.
    units
        mg/m^2, mg/kg, mg, AUC or 1 (relative to a reference dose); other units of these kinds are converted (g/m^2).
    status
        ``given`` or ``planned``.

    Raises
    ------
    InputError
        If the amount is not positive or absurdly large, or the day is no number.
    UnitError
        If the units are missing or no units of a dose.
    """

    day: float
    agent: str
    amount: float
    units: str
    status: Status = "given"

    def __post_init__(self) -> None:
        _check_agent(self.agent, f"dose on day {self.day}")
        day = _check_day(self.day, f"dose of {self.agent}")
        what = f"dose of {self.agent} on day {day:g}"
        _check_status(self.status, what)
        units, scale = normal_dose_units(self.units, what)
        amount = float(self.amount) * scale
        check = "Check the amount and its units."
        _check_amount(amount, LARGEST_DOSE[units], units, f"{what}: amount", "dose", check)
        object.__setattr__(self, "day", day)
        object.__setattr__(self, "amount", amount)
        object.__setattr__(self, "units", units)


@dataclass(frozen=True)
class Fraction:
    """One fraction of radiotherapy.

    Parameters
    ----------
    day
        Days from the patient's day 0; any hour of the day as a fraction.
    gray
        Dose, Gy.
    status
        ``given`` or ``planned``.

    Raises
    ------
    InputError
        If the dose is not positive or absurdly large, or the day is no number.
    """

    day: float
    gray: float
    status: Status = "given"

    def __post_init__(self) -> None:
        day = _check_day(self.day, "radiotherapy fraction")
        what = f"radiotherapy fraction on day {day:g}"
        _check_status(self.status, what)
        gray = float(self.gray)
        check = "Give the dose per fraction, not the total, and check its units."
        _check_amount(gray, LARGEST_FRACTION, "Gy", f"{what}: dose", "fraction", check)
        object.__setattr__(self, "day", day)
        object.__setattr__(self, "gray", gray)


@dataclass(frozen=True)
class Ongoing:
    """A therapy that continues from its start, of which single doses are not known.

    Parameters
    ----------
    start_day
        Days from the patient's day 0.
    agent
        Name of the therapy.
    status
        ``given`` or ``planned``.
    """

    start_day: float
    agent: str
    status: Status = "given"

    def __post_init__(self) -> None:
        _check_agent(self.agent, f"ongoing therapy from day {self.start_day}")
        day = _check_day(self.start_day, f"ongoing {self.agent}")
        _check_status(self.status, f"ongoing {self.agent} from day {day:g}")
        object.__setattr__(self, "start_day", day)


@dataclass(frozen=True)
class Schedule:
    """All treatments of a patient, each kind sorted by day.

    Parameters
    ----------
    doses
        Doses of drugs.
    fractions
        Fractions of radiotherapy.
    ongoing
        Therapies known only by their start.

    Raises
    ------
    InputError
        If doses of one agent are in units of different kinds (mg/m² and mg), which cannot be compared.

    Examples
    --------
    >>> plan = Schedule.weekly("paclitaxel", start=0, n=12, amount=80, units="mg/m^2")
    >>> (plan + Schedule(fractions=(Fraction(100.0, 2.0),))).agents
    ('paclitaxel',)
    """

    doses: tuple[Dose, ...] = ()
    fractions: tuple[Fraction, ...] = ()
    ongoing: tuple[Ongoing, ...] = field(default=())

    def __post_init__(self) -> None:
        # Sorting by every field makes equal contents compare equal, whatever their order in a file.
        doses = tuple(sorted(self.doses, key=lambda dose: (dose.day, dose.agent, dose.amount, dose.status)))
        fractions = tuple(sorted(self.fractions, key=lambda one: (one.day, one.gray, one.status)))
        ongoing = tuple(sorted(self.ongoing, key=lambda one: (one.start_day, one.agent, one.status)))
        units: dict[str, str] = {}
        for dose in doses:
            if units.setdefault(dose.agent, dose.units) != dose.units:
                raise InputError(
                    f"schedule: {dose.agent} is dosed in {units[dose.agent]} and, on day {dose.day:g}, in "
                    f"{dose.units}; expected one kind of units for each agent. Convert the amounts."
                )
        object.__setattr__(self, "doses", doses)
        object.__setattr__(self, "fractions", fractions)
        object.__setattr__(self, "ongoing", ongoing)

    @classmethod
    def weekly(
        cls,
        agent: str,
        start: float,
        n: int,
        amount: float,
        units: str,
        every: float = 7,
        status: Status = "given",
    ) -> Schedule:
        """Return `n` equal doses of `agent`, `every` days apart, the first on day `start`."""
        return cls(doses=tuple(Dose(start + number * every, agent, amount, units, status) for number in range(n)))

    @property
    def agents(self) -> tuple[str, ...]:
        """Names of all drugs and ongoing therapies, in alphabetical order."""
        return tuple(sorted({dose.agent for dose in self.doses} | {one.agent for one in self.ongoing}))

    @property
    def given_only(self) -> bool:
        """Whether nothing in a record with treatments is marked planned (true also when there are no treatments)."""
        kinds: tuple[tuple[Dose | Fraction | Ongoing, ...], ...] = (self.doses, self.fractions, self.ongoing)
        return all(entry.status == "given" for kind in kinds for entry in kind)

    def of(self, agent: str) -> tuple[Dose, ...]:
        """Return the doses of `agent`, by day."""
        return tuple(dose for dose in self.doses if dose.agent == agent)

    def given_after(self, day: float) -> int:
        """Count what is marked given after `day`."""
        return len(self) - len(self.until(day))

    def until(self, day: float) -> Schedule:
        """Drop what is marked given after `day`; what is planned stays."""
        return Schedule(
            doses=tuple(dose for dose in self.doses if dose.status == "planned" or dose.day <= day),
            fractions=tuple(one for one in self.fractions if one.status == "planned" or one.day <= day),
            ongoing=tuple(one for one in self.ongoing if one.status == "planned" or one.start_day <= day),
        )

    def with_doses(self, *doses: Dose | Fraction | Ongoing | Iterable[Dose]) -> Schedule:
        """Return this schedule with more doses, fractions or ongoing therapies."""
        added: list[Dose | Fraction | Ongoing] = []
        for entry in doses:
            added.extend([entry] if isinstance(entry, (Dose, Fraction, Ongoing)) else entry)
        return Schedule(
            doses=self.doses + tuple(entry for entry in added if isinstance(entry, Dose)),
            fractions=self.fractions + tuple(entry for entry in added if isinstance(entry, Fraction)),
            ongoing=self.ongoing + tuple(entry for entry in added if isinstance(entry, Ongoing)),
        )

    def without(self, agent: str) -> Schedule:
        """Return this schedule without the drug or ongoing therapy `agent`; ``"radiotherapy"`` drops all fractions.

        Raises
        ------
        InputError
            If nothing of that name is in the schedule.
        """
        if agent == "radiotherapy" and self.fractions:
            return replace(self, fractions=())
        if agent not in self.agents:
            held = ", ".join((*self.agents, *(("radiotherapy",) if self.fractions else ()))) or "nothing"
            raise InputError(f"schedule: no agent '{agent}' to leave out; it holds {held}.")
        return replace(
            self,
            doses=tuple(dose for dose in self.doses if dose.agent != agent),
            ongoing=tuple(one for one in self.ongoing if one.agent != agent),
        )

    def shift(self, days: float) -> Schedule:
        """Return this schedule `days` later (earlier if negative)."""
        return Schedule(
            doses=tuple(replace(dose, day=dose.day + days) for dose in self.doses),
            fractions=tuple(replace(one, day=one.day + days) for one in self.fractions),
            ongoing=tuple(replace(one, start_day=one.start_day + days) for one in self.ongoing),
        )

    def __add__(self, other: Schedule) -> Schedule:
        if not isinstance(other, Schedule):
            return NotImplemented
        return Schedule(self.doses + other.doses, self.fractions + other.fractions, self.ongoing + other.ongoing)

    def __len__(self) -> int:
        return len(self.doses) + len(self.fractions) + len(self.ongoing)
