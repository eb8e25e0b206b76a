"""Schedules: order, units, limits, and what is known at a time."""

import pytest

from biomodel.errors import InputError, UnitError
from biomodel.schedule import Dose, Fraction, Ongoing, Schedule


def test_sorted_and_equal_whatever_the_order():
    first = Dose(0, "paclitaxel", 80, "mg/m^2")
    later = Dose(7, "carboplatin", 6, "AUC", "planned")
    assert Schedule((later, first)) == Schedule((first, later))
    assert Schedule((later, first)).doses == (first, later)
    assert Schedule((later, first)).agents == ("carboplatin", "paclitaxel")
    assert Schedule((later, first)).of("paclitaxel") == (first,)


def test_units_are_normalised():
    assert Dose(0, "methotrexate", 8, "g/m^2") == Dose(0, "methotrexate", 8000, "mg/m^2")
    assert Dose(0, "carboplatin", 6, "mg/mL*min").units == "AUC"


@pytest.mark.parametrize("amount", [-80, 0, float("nan"), float("inf")])
def test_dose_must_be_positive(amount):
    with pytest.raises(InputError, match=r"dose of paclitaxel on day 7: amount .* mg/m\^2; expected a positive number"):
        Dose(7, "paclitaxel", amount, "mg/m^2")


@pytest.mark.parametrize(
    ("amount", "units"), [(80_000, "mg/m^2"), (80, "kg/m^2"), (600, "AUC"), (1e6, "mg"), (1e4, "mg/kg"), (1e3, "1")]
)
def test_absurd_dose(amount, units):
    with pytest.raises(InputError, match=r"expected at most .* Check the amount and its units"):
        Dose(7, "carboplatin", amount, units)


def test_dose_needs_units_of_a_dose():
    with pytest.raises(UnitError, match="dose of paclitaxel on day 7: units 'mm'; expected mg/m²"):
        Dose(7, "paclitaxel", 80, "mm")


@pytest.mark.parametrize(("gray", "message"), [(-2, "positive"), (0, "positive"), (200, "per fraction, not the total")])
def test_absurd_fraction(gray, message):
    with pytest.raises(InputError, match=message):
        Fraction(3, gray)


@pytest.mark.parametrize("day", [float("nan"), float("inf"), 1e6])
def test_absurd_day(day):
    for make in (
        lambda: Dose(day, "paclitaxel", 80, "mg/m^2"),
        lambda: Fraction(day, 2),
        lambda: Ongoing(day, "trastuzumab"),
    ):
        with pytest.raises(InputError, match="Check the day or the date"):
            make()


@pytest.mark.parametrize("agent", ["", "two words", "a.b", 3])
def test_agent_names_parameters(agent):
    with pytest.raises(InputError, match="without blanks and dots"):
        Dose(0, agent, 80, "mg/m^2")


def test_status():
    with pytest.raises(InputError, match="expected 'given' or 'planned'"):
        Fraction(0, 2.0, "done")


def test_one_agent_has_one_kind_of_units():
    with pytest.raises(InputError, match=r"carboplatin is dosed in AUC and, on day 7, in mg; expected one kind"):
        Schedule((Dose(0, "carboplatin", 6, "AUC"), Dose(7, "carboplatin", 600, "mg")))


def test_until_drops_later_given_and_keeps_planned():
    schedule = Schedule(
        doses=(Dose(0, "a", 1, "1"), Dose(7, "a", 1, "1"), Dose(7.01, "a", 1, "1"), Dose(14, "a", 1, "1", "planned")),
        fractions=(Fraction(1, 2), Fraction(9, 2), Fraction(10, 2, "planned")),
        ongoing=(Ongoing(8, "b"), Ongoing(8, "c", "planned")),
    )
    known = schedule.until(7)
    assert [dose.day for dose in known.doses] == [0, 7, 14]
    assert [one.day for one in known.fractions] == [1, 10]
    assert [one.agent for one in known.ongoing] == ["c"]
    assert schedule.given_after(7) == 3
    assert known.until(7) == known
    assert not schedule.given_only


def test_given_only():
    assert Schedule().given_only
    assert Schedule((Dose(0, "a", 1, "1"),)).given_only
    assert not Schedule(fractions=(Fraction(0, 2, "planned"),)).given_only


def test_weekly_shift_and_sum():
    taxane = Schedule.weekly("paclitaxel", start=1, n=3, amount=80, units="mg/m^2", status="planned")
    assert [dose.day for dose in taxane.doses] == [1, 8, 15]
    assert {dose.status for dose in taxane.doses} == {"planned"}
    three = Schedule.weekly("carboplatin", 0, 2, 6, "AUC", every=21)
    both = taxane + three.shift(2.5)
    assert both.agents == ("carboplatin", "paclitaxel")
    assert [dose.day for dose in both.of("carboplatin")] == [2.5, 23.5]
    assert len(both) == 5


def test_without_and_with():
    schedule = Schedule.weekly("a", 0, 2, 1, "1") + Schedule(fractions=(Fraction(0, 2),), ongoing=(Ongoing(0, "b"),))
    assert schedule.without("a").doses == ()
    assert schedule.without("b").ongoing == ()
    assert schedule.without("radiotherapy").fractions == ()
    with pytest.raises(InputError, match="no agent 'x' to leave out; it holds a, b, radiotherapy"):
        schedule.without("x")
    more = schedule.with_doses(Dose(3, "c", 1, "1"), Fraction(1, 2), [Dose(5, "c", 1, "1")])
    assert [dose.day for dose in more.of("c")] == [3, 5]
    assert len(more.fractions) == 2
