"""Units at the door: what is converted, and what is refused with which words."""

import numpy as np
import pytest

from biomodel.errors import InputError, UnitError
from biomodel.units import convert, normal_dose_units, pretty

WHERE = "patient.json: visit 2, adc"


@pytest.mark.parametrize(
    ("value", "units", "to", "expected"),
    [
        (1.2e-3, "mm^2/s", "mm^2/s", 1.2e-3),
        (1.2e-3, "mm²/s", "mm^2/s", 1.2e-3),
        (1.2e-3, "mm**2/s", "mm^2/s", 1.2e-3),
        (1200.0, "1e-6 mm^2/s", "mm^2/s", 1.2e-3),
        (1200.0, "um^2/s", "mm^2/s", 1.2e-3),
        (1.2, "um^2/ms", "mm^2/s", 1.2e-3),
        (1.2, "µm²/ms", "mm^2/s", 1.2e-3),
        (10.0, "um", "mm", 0.01),
        (3.1, "cm", "mm", 31.0),
        (12.0, "mL", "cm^3", 12.0),
        (12_000.0, "mm^3", "cm^3", 12.0),
        (200.0, "cGy", "Gy", 2.0),
        (3000.0, "mT", "T", 3.0),
        (50.0, "percent", "1", 0.5),
        (5.0, "mg/mL*min", "AUC", 5.0),
    ],
)
def test_converts(value, units, to, expected):
    assert convert(value, units, to, WHERE) == pytest.approx(expected, rel=1e-15)


def test_powers_of_ten_are_exact():
    assert convert(1.0, "um^2/ms", "mm^2/s", WHERE) == 1e-3


def test_arrays_are_converted_and_left_alone_when_the_unit_is_right():
    values = np.array([[800.0, 1600.0]])
    np.testing.assert_allclose(convert(values, "1e-6 mm^2/s", "mm^2/s", WHERE), [[0.8e-3, 1.6e-3]])
    assert convert(values, "mm^2/s", "mm^2/s", WHERE) is values


def test_message_of_a_wrong_unit():
    with pytest.raises(UnitError) as caught:
        convert(1.0, "1", "mm^2/s", WHERE)
    assert str(caught.value) == (
        "patient.json: visit 2, adc: units '1'; expected mm²/s. Set 'units' in the manifest; units are never guessed."
    )
    assert isinstance(caught.value, InputError) and caught.value.exit_code == 3


@pytest.mark.parametrize("units", [None, "", "  "])
def test_missing_unit(units):
    with pytest.raises(UnitError, match=r"visit 2, adc: units are missing; expected mm²/s\. Set 'units'"):
        convert(1.0, units, "mm^2/s", WHERE)


@pytest.mark.parametrize(
    "units", ["blurb", "mm^2/", "mm^2/s)", "-1 mm^2/s", "0 mm^2/s", "nan", "inf mm^2/s", "s s s (", "'", "1/0", "\\"]
)
def test_text_that_is_no_unit(units):
    with pytest.raises(UnitError, match="not a known unit"):
        convert(1.0, units, "mm^2/s", WHERE)


@pytest.mark.parametrize("units", ["s", "mm", "mm^2", "mg/m^2", "Gy", "AUC"])
def test_other_dimension(units):
    with pytest.raises(UnitError, match=r"expected mm²/s"):
        convert(1.0, units, "mm^2/s", WHERE)


@pytest.mark.parametrize(
    ("units", "kept", "scale"),
    [
        ("mg/m^2", "mg/m^2", 1.0),
        ("mg/m²", "mg/m^2", 1.0),
        ("g/m^2", "mg/m^2", 1000.0),
        ("mg/kg", "mg/kg", 1.0),
        ("ug/kg", "mg/kg", 1e-3),
        ("g", "mg", 1000.0),
        ("AUC", "AUC", 1.0),
        ("mg/mL*min", "AUC", 1.0),
        ("1", "1", 1.0),
        ("percent", "1", 0.01),
    ],
)
def test_units_of_doses(units, kept, scale):
    found, factor = normal_dose_units(units, "dose")
    assert found == kept
    assert factor == pytest.approx(scale, rel=1e-15)


@pytest.mark.parametrize("units", ["mm", "Gy", "", None, "tablets", "day"])
def test_units_that_are_no_dose(units):
    with pytest.raises(UnitError, match=r"dose.*expected mg/m², mg/kg, mg, AUC or 1"):
        normal_dose_units(units, "dose")


def test_pretty():
    assert pretty("mm^2/s") == "mm²/s"
    assert pretty("cm^3") == "cm³"
    assert pretty("s^-1") == "s⁻¹"
    assert pretty("1") == "1 (no unit)"
