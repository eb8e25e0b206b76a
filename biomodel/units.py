"""Units, read, checked and converted once: where data enter the package.

Inside, quantities are plain numbers in mm, day, mm²/day, 1/day, Gy, mm²/s (ADC), cm³ (volumes) and mm (diameters). A
unit is never guessed from a value, and a missing one is an error.
"""

from __future__ import annotations

import math
import tokenize
from functools import lru_cache
from typing import TypeVar

import numpy as np
import pint

from biomodel.errors import UnitError

__all__ = ["convert", "factor", "normal_dose_units", "pretty", "registry"]

registry: pint.UnitRegistry = pint.UnitRegistry()
# Carboplatin is dosed by the area under its concentration curve, in mg/mL·min (Calvert et al. 1989,
# 10.1200/JCO.1989.7.11.1748).
registry.define("AUC = milligram / milliliter * minute")

Number = TypeVar("Number", float, np.ndarray)

_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")

# What pint raises, down to its tokenizer, for text that is no unit.
_NO_UNIT = (
    pint.PintError,
    tokenize.TokenError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)

#: Units in which the amount of a drug is kept, by kind of dosing.
DOSE_UNITS = ("mg/m^2", "mg/kg", "mg", "AUC", "1")


def pretty(units: str) -> str:
    """Return `units` as they are printed: ``mm^2/s`` becomes ``mm²/s``, ``1`` becomes ``1 (no unit)``."""
    if units == "1":
        return "1 (no unit)"
    parts = units.replace("**", "^").split("^")
    text = parts[0]
    for part in parts[1:]:
        digits = len(part) - len(part.lstrip("-0123456789"))
        text += part[:digits].translate(_SUPERSCRIPTS) + part[digits:]
    return text.replace("um", "µm") if text.startswith("um") else text


@lru_cache(maxsize=256)
def _quantity(units: str) -> pint.Quantity:
    """Parse a unit, with an optional scale in front (``1e-6 mm^2/s``)."""
    quantity = registry.Quantity(1.0, "") * registry.parse_expression(units)
    if not (math.isfinite(quantity.magnitude) and quantity.magnitude > 0):
        raise ValueError("a unit's scale must be positive and finite")
    return quantity


@lru_cache(maxsize=1024)
def _factor(units: str, to: str) -> float:
    scale = float(_quantity(units).to(registry.Unit("" if to == "1" else to)).magnitude)
    # Powers of ten pick up a rounding error on the way (um^2/ms would be 0.0009999999999999998 mm^2/s).
    return float(f"{scale:.15g}")


def _refuse(units: object, to: str, where: str, found: str) -> UnitError:
    return UnitError(f"{where}: {found}; expected {pretty(to)}. Set 'units' in the manifest; units are never guessed.")


def factor(units: str | None, to: str, where: str) -> float:
    """Return the number by which a value in `units` is multiplied to be in `to`.

    Raises
    ------
    UnitError
        If `units` is missing, unknown, or of another dimension than `to`.
    """
    if units is None or (isinstance(units, str) and not units.strip()):
        raise _refuse(units, to, where, "units are missing")
    if not isinstance(units, str):
        raise _refuse(units, to, where, f"units {units!r} (not text)")
    units = units.strip()
    if units == to:
        return 1.0
    try:
        _quantity(units)
    except _NO_UNIT:
        raise _refuse(units, to, where, f"units '{units}' (not a known unit)") from None
    try:
        return _factor(units, to)
    except pint.PintError:
        raise _refuse(units, to, where, f"units '{units}'") from None


def convert(value: Number, units: str | None, to: str, where: str) -> Number:
    """Convert `value` from `units` to `to`.

    Parameters
    ----------
    value
        Number or array, in `units`.
    units
        As read from the user: anything pint knows (``mm^2/s``, ``um^2/ms``, ``mL``), also with a scale in front
        (``1e-6 mm^2/s``), ``AUC`` for carboplatin, ``1`` for a pure number.
    to
        The unit wanted.
    where
        Place named in the error, such as ``patient.json: visit 2, adc``.

    Raises
    ------
    UnitError
        If `units` is missing, unknown, or of another dimension than `to`.

    Examples
    --------
    >>> convert(1200.0, "um^2/s", "mm^2/s", "patient.json: visit 2, adc")
    0.0012
    """
    scale = factor(units, to, where)
    return value if scale == 1.0 else value * scale


def normal_dose_units(units: str | None, where: str) -> tuple[str, float]:
    """Return the unit in which an amount of drug given in `units` is kept, and the factor to it.

    The kinds of dosing are by body surface (mg/m²), by body mass (mg/kg), flat (mg), by area under the curve (AUC,
    mg/mL·min) and relative to a reference dose (1). Milligram per kilogram is a pure number to pint, so it is told
    apart from a relative dose by its spelling.

    Raises
    ------
    UnitError
        If `units` is missing, unknown or of no such kind.
    """
    expected = "mg/m^2, mg/kg, mg, AUC or 1"
    if units is None or not isinstance(units, str) or not units.strip():
        raise _refuse(units, expected, where, "units are missing")
    units = units.strip()
    if units in DOSE_UNITS:
        return units, 1.0
    try:
        quantity = _quantity(units)
    except _NO_UNIT:
        raise _refuse(units, expected, where, f"units '{units}' (not a known unit)") from None
    if quantity.dimensionless:
        target = "mg/kg" if "gram" in f"{quantity.units}" else "1"
        return target, _factor(units, target)
    for target in DOSE_UNITS[:-1]:
        if quantity.check(registry.Unit(target).dimensionality):
            return target, _factor(units, target)
    raise _refuse(units, expected, where, f"units '{units}'")
