"""What a report says in words: its title, its summary, its list of treatments, the limits of its use."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from biomodel.report_blocks import Block, Table, Text, interval, number, percent, pretty_units, short

__all__ = ["in_words", "limits", "subtitle", "title", "treatments"]


def title(summary: dict) -> str:
    """Return the report's title."""
    return f"Tumour forecast: {summary['patient']['id']}"


def subtitle(summary: dict) -> str:
    """Return organ, visits used and horizon."""
    fit, last = summary["calibration"], summary["forecast"]["days"][-1]
    kind = "virtual patient, " if summary["patient"]["virtual"] else ""
    return f"{kind}{summary['patient']['organ']}; fitted to {_fitted(fit)}; forecast to day {short(last)}"


def _visits(count: int) -> str:
    return "visit 1" if count == 1 else ("visits 1 and 2" if count == 2 else f"visits 1 to {count}")


def _fitted(calibration: dict) -> str:
    first, last = short(calibration["first_day"]), short(calibration["last_day"])
    days = f"day {first}" if first == last else f"days {first} to {last}"
    return f"{_visits(calibration['visits'])} ({days})"


def _comparable(summary: dict) -> tuple[str, dict]:
    """The forecast quantity that a measured volume is compared with."""
    found = summary["forecast"]["quantities"]
    name = "measured_volume" if "measured_volume" in found else "volume"
    return name, found[name]


def in_words(summary: dict) -> str:
    """Return the forecast and what was then seen in a few plain sentences."""
    calibration, patient = summary["calibration"], summary["patient"]
    name, quantity = _comparable(summary)
    last = quantity["quantiles"][-1]
    kind = "measured volume" if name == "measured_volume" else "tumour volume"
    parts = []
    if patient["virtual"]:
        parts.append("This patient is virtual: made by a generator, not a person.")
    parts.append(
        f"Fitted to {_fitted(calibration)}, the model forecasts for day {short(last['day'])} a {kind} of "
        f"{number(last['0.5'])} cm³ (median; 90 % interval {interval(last['0.05'], last['0.95'])} cm³)."
    )
    used = [row for row in summary["observations"] if row["role"] == "calibration" and row["volume_cm3"] is not None]
    if used:
        parts.append(f"It was {number(used[-1]['volume_cm3'])} cm³ on day {short(used[-1]['day'])}.")
    chance = summary["forecast"]["none_detectable"][-1]["probability"]
    parts.append(f"The probability that no tumour is detectable then is {percent(chance)}.")
    seen = [row for row in summary["scores"] if row["predictor"] == "forecast"]
    if seen:
        row = seen[-1]
        at = next(q for q in quantity["quantiles"] if q["day"] == row["day"])
        place = "inside" if at["0.05"] <= row["observed_volume"] <= at["0.95"] else (
            "above" if row["observed_volume"] > at["0.95"] else "below")  # fmt: skip
        value = row["observed_volume"]
        found = f"{number(value)} cm³ were measured" if value else "no tumour was seen"
        parts.append(f"On day {short(row['day'])} (visit {row['visit']}) {found}, {place} the 90 % interval.")
        others = [f"{number(other['volume'])} cm³ ({other['predictor']})" for other in summary["scores"]
                  if other["predictor"] != "forecast" and other["visit"] == row["visit"]]  # fmt: skip
        if others:
            parts.append(f"The simple predictions for that day were {' and '.join(others)}.")
    else:
        parts.append("No measurement on a forecast day is known, so the forecast is not scored.")
    return " ".join(parts)


def treatments(schedule: list[dict], caption: str) -> Block:
    """Return a schedule as a table, equal doses of one agent in one row."""

    def kind(row: dict) -> tuple:
        return row["kind"], row["agent"] or "", row["amount"] or 0.0, row["units"] or "", row["status"]

    if not schedule:
        return Text(f"{caption}: none.")
    rows = []
    grouped = [list(group) for _, group in groupby(sorted(schedule, key=lambda r: (*kind(r), r["day"])), key=kind)]
    for group in sorted(grouped, key=lambda g: (g[0]["day"], g[0]["agent"] or "")):
        row = group[0]
        if row["kind"] == "ongoing":
            rows.append((row["agent"], "continuous", f"from day {short(row['day'])}", row["status"]))
            continue
        what = f"{len(group)} × {short(row['amount'])} {pretty_units(row['units']) or 'of the reference dose'}"
        rows.append((row["agent"] or "radiotherapy", what, _days([entry["day"] for entry in group]), row["status"]))
    return Table(caption, ("agent", "doses", "days", "status"), tuple(rows), texts=4)


def _days(days: list[float]) -> str:
    """Days as text, evenly spaced ones in short."""
    gaps = {round(b - a, 6) for a, b in zip(days, days[1:], strict=False)}
    if len(days) > 3 and len(gaps) == 1:
        return f"{short(days[0])} to {short(days[-1])}, every {short(gaps.pop())}"
    if len(days) <= 12:
        return ", ".join(short(day) for day in days)
    return f"{len(days)} days from {short(days[0])} to {short(days[-1])}"


def limits(summary: dict) -> Iterator[str]:
    """Yield what a reader must know before trusting a forecast."""
    patient, fit = summary["patient"], summary["calibration"]
    grid = patient["grid"]
    yield "For research only. This is no medical device, and nothing here is advice on treating a person."
    if patient["virtual"]:
        yield "The patient is virtual. How well a forecast does here says little about real patients."
    yield (
        f"The intervals hold if the model ({fit['model']}) and its priors hold. They do not include the doubt about "
        "the kind of model: biology that it lacks (resistance, necrosis, immune response, deformation of tissue) is "
        "not in them."
    )
    if grid is None:
        yield (
            "There are no images: the tumour is one well-mixed volume, without shape or spread, and a volume below "
            f"{short(patient['detection_floor_cm3'])} cm³ is taken as not seen."
        )
    else:
        if grid["cells_per_voxel"]:
            yield (
                "Cell fractions are inferred from the apparent diffusion coefficient, which oedema, necrosis, fibrosis "
                "and perfusion change too. Numbers of cells rest on assumed cell size and packing."
            )
        yield (
            "The edge of the tumour is where a reader drew the region at each visit; its uncertainty is modelled only "
            f"roughly. Volumes count voxels with a cell fraction of {short(grid['visible_fraction'])} or more, so a "
            "forecast of no tumour means none that would be visible, not none at all."
        )
        yield "Visits are assumed to be aligned to one grid. Errors of registration count as change of the tumour."
    if fit["visits"] <= 2:
        yield (
            f"Only {_visits(fit['visits'])} informed the fit. With so few, growth and response cannot be told apart "
            "well, and an error of one whole measurement can look like response."
        )
    planned = any(row["status"] == "planned" for row in summary["schedule"])
    yield (
        "Doses are assumed to be given as listed under 'Patient and data'"
        + (", the planned ones on their planned days." if planned else ".")
        + " Their effect is assumed to fade alike after each dose."
    )
