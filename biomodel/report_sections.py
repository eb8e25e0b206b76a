"""What a report says: its sections, made from the :class:`~biomodel.results.Results` alone."""

from __future__ import annotations

from collections.abc import Iterator

from biomodel import figure_maps, figures
from biomodel.report_blocks import (
    Block,
    Listing,
    Picture,
    Section,
    Table,
    Text,
    interval,
    number,
    percent,
    pretty_units,
    relative_error,
    short,
)
from biomodel.report_words import in_words, limits, treatments
from biomodel.results import Results

__all__ = ["sections"]

NAMES = {
    "volume": "volume", "measured_volume": "volume as measured", "cells": "tumour cells",
    "longest_diameter": "longest diameter",
}  # fmt: skip


def sections(results: Results) -> tuple[Section, ...]:
    """Return all sections of a report, the further pages of other packages aside."""
    summary = results.summary
    found = [
        Section("Summary", (Text(in_words(summary), "lead"), *_notes(summary)), "summary"),
        Section("Patient and data", tuple(_patient(summary)), "patient"),
        Section("Course of the volume", tuple(_course(results)), "course"),
    ]
    if summary["patient"]["grid"] is not None:
        found.append(Section("Maps of the tumour", tuple(_maps(results)), "maps"))
    found.append(Section("Scores beside baselines", tuple(_scores(summary)), "scores"))
    found.append(Section("Parameters", tuple(_parameters(summary)), "parameters"))
    if summary["what_if"]:
        found.append(Section("What if", tuple(_what_if(results)), "what-if"))
    found.append(Section("Limits of use", (Listing(tuple(limits(summary))),), "limits"))
    found.append(Section("Provenance", (_provenance(summary),), "provenance"))
    return tuple(found)


def _notes(summary: dict) -> Iterator[Block]:
    for note in summary["notes"]:
        yield Text(note, "note")


# --- patient ----------------------------------------------------------------------------------------------------------


def _words(name: str) -> str:
    known = {"hr": "hormone receptors", "her2": "HER2", "er": "ER", "pr": "PR", "pcr": "pathological complete response",
             "rcb_class": "RCB class", "rcb_index": "RCB index", "ki67": "Ki-67"}  # fmt: skip
    return known.get(name, name.replace("_", " "))


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return short(value) if isinstance(value, (int, float)) else str(value)


def _patient(summary: dict) -> Iterator[Block]:
    patient, grid = summary["patient"], summary["patient"]["grid"]
    rows = [("patient", patient["id"] + (" (virtual)" if patient["virtual"] else "")), ("organ", patient["organ"])]
    if patient["baseline"]:
        rows.append(("day 0", patient["baseline"]))
    if grid is None:
        rows += [("images", "none: volumes only"), ("detection floor", f"{short(patient['detection_floor_cm3'])} cm³")]
    else:
        shape, step = (" × ".join(f"{n:g}" for n in reversed(grid[key])) for key in ("shape", "spacing_mm"))
        rows.append(("voxels (x × y × z)", f"{shape}, {step} mm each"))
        rows.append(("visible from a cell fraction of", short(grid["visible_fraction"])))
        if grid["cells_per_voxel"]:
            rows.append(("cells in a full voxel", number(grid["cells_per_voxel"])))
    rows += [(_words(name), _value(value)) for name, value in patient["clinical"].items()]
    rows += [(f"outcome: {_words(name)}", _value(value)) for name, value in (patient["outcome"] or {}).items()
             if name != "schema" and value is not None]  # fmt: skip
    yield Table("Patient", ("item", "value"), tuple(rows), texts=2)
    visits = summary["observations"]
    columns = ["visit", "use", "day", "volume (cm³)", "longest diameter (mm)"]
    imaged = grid is not None
    table = []
    for row in visits:
        use = "fit" if row["role"] == "calibration" else "comparison only"
        sizes = (number(row["volume_cm3"]), number(row["longest_diameter_mm"]))
        line = [str(row["visit"]), use, short(row["day"]), *sizes]
        if imaged:
            images = " + ".join(word for word, has in (("ADC", row["adc"]), ("region", row["region"])) if has) or "none"
            line = [*line[:2], images, *line[2:], number(row["cells"])]
        table.append(tuple(line))
    if imaged:
        columns = [*columns[:2], "images", *columns[2:], "tumour cells"]
    yield Table("Visits", tuple(columns), tuple(table), texts=3 if imaged else 2).without_empty()
    yield treatments(summary["schedule"], "Treatments that the forecast assumes")
    if summary["findings"] is None:
        yield Text("No quality check of the patient's folder was run for this report.")
    elif not summary["findings"]:
        yield Text("The quality check of the patient's folder found nothing.")
    else:
        found = tuple((f["severity"], f["file"], f["message"], f["remedy"]) for f in summary["findings"])
        yield Table("Quality check of the patient's folder", ("severity", "file", "finding", "remedy"), found, texts=4)


# --- course and maps --------------------------------------------------------------------------------------------------


def _course(results: Results) -> Iterator[Block]:
    summary = results.summary
    yield Picture.of(
        figures.time_course(results),
        "Tumour volume over time. Bands: 50 % and 90 % intervals of the forecast. Filled circles were used by the "
        "fit, open circles were seen later. Thin lines: the last volume carried forward, and an exponential through "
        "the last two volumes (cut off where it leaves the frame). Below: doses and fractions as ticks, continuous "
        "therapies as bars; what was given is drawn thick, what was planned thin.",
        in_words(summary),
    )
    observed = {row["day"]: row for row in summary["observations"]}
    measured = {"volume": "volume_cm3", "measured_volume": "volume_cm3", "cells": "cells",
                "longest_diameter": "longest_diameter_mm"}  # fmt: skip
    rows = []
    for name in (name for name in NAMES if name in summary["forecast"]["quantities"]):
        quantity = summary["forecast"]["quantities"][name]
        unit = pretty_units(quantity["units"])
        for q in quantity["quantiles"]:
            seen = observed.get(q["day"])
            rows.append((
                NAMES[name] + (f" ({unit})" if unit else ""), short(q["day"]), number(q["0.5"]),
                interval(q["0.25"], q["0.75"]), interval(q["0.05"], q["0.95"]),
                number(None if seen is None else seen[measured[name]]),
            ))  # fmt: skip
    yield Table("Forecast and observation", ("quantity", "day", "median", "50 % interval", "90 % interval", "observed"),
                tuple(rows))  # fmt: skip
    chances = ", ".join(f"day {short(row['day'])}: {percent(row['probability'])}"
                        for row in summary["forecast"]["none_detectable"])  # fmt: skip
    yield Text(f"Probability that no tumour is detectable: {chances}.")


def _maps(results: Results) -> Iterator[Block]:
    for figure, cut in figure_maps.maps(results):
        yield Picture.of(
            figure,
            f"{cut.capitalize()} slices through the place with most tumour on each day; one colour scale for each "
            "column. White and black line: outline of the observed region. Grey: inside the organ, not measured. "
            "White: outside the organ. Letters: right, left, anterior, posterior, superior, inferior of the patient.",
            f"{cut} slices: observed cell fraction, median forecast, width of its 90 % interval, probability of "
            "tumour.",
        )


# --- scores -----------------------------------------------------------------------------------------------------------


def _scores(summary: dict) -> Iterator[Block]:
    rows = summary["scores"]
    if not rows:
        yield Text("No visit after the calibration lies on a forecast day, so there is nothing to score.")
        return

    def covered(value: bool | None) -> str:
        return "–" if value is None else ("yes" if value else "no")

    yield Table(
        "Volume. CRPS: the mean distance to the observation less half the mean distance between draws; smaller is "
        "better.",
        ("predictor", "day", "predicted (cm³)", "observed (cm³)", "error", "CRPS (cm³)", "in 50 %", "in 90 %"),
        tuple((r["predictor"], short(r["day"]), number(r["volume"]), number(r["observed_volume"]),
               relative_error(r["volume_error"]), number(r["crps"]), covered(r["covered_50"]), covered(r["covered_90"]))
              for r in rows),
    )  # fmt: skip
    mapped = [r for r in rows if r["dice"] is not None]
    if mapped:
        yield Table(
            "Maps, over the union of predicted and observed tumour. CCC: concordance of the cell fraction. Errors of "
            "cells and longest diameter are relative.",
            ("predictor", "day", "Dice", "CCC", "Pearson", "RMSE", "cells", "diameter"),
            tuple((r["predictor"], short(r["day"]), number(r["dice"]), number(r["ccc"]), number(r["pearson"]),
                   number(r["rmse"]), relative_error(r["cells_error"]), relative_error(r["diameter_error"]))
                  for r in mapped),
        ).without_empty()  # fmt: skip


# --- parameters -------------------------------------------------------------------------------------------------------


def _parameters(summary: dict) -> Iterator[Block]:
    fit = summary["calibration"]
    certain = fit["method"] == "MAP"
    yield Text(
        f"Model: {fit['model']}. Method: {fit['method']}, {fit['iterations']} iterations, {fit['solves']} solutions of "
        f"the model, {fit['data']} measured values; {'converged' if fit['converged'] else 'not converged'}. Log "
        f"evidence {number(fit['log_evidence'], 5)}, log-likelihood {number(fit['log_likelihood'], 5)}, AIC "
        f"{number(fit['aic'], 5)}, BIC {number(fit['bic'], 5)}."
    )
    rows = []
    for row in fit["parameters"]:
        informed = "not told by this method" if certain else row["informed_by"]
        rows.append((
            row["name"], row["description"], informed, number(row["estimate"]),
            "–" if certain else interval(row["low"], row["high"]), pretty_units(row["units"]) or "1",
            f"{number(row['prior_median'])} ({interval(row['prior_low'], row['prior_high'])})",
            "–" if certain else number(row["shrinkage"], 2),
        ))  # fmt: skip
    told = (
        "This method gives the most likely values alone, no intervals."
        if certain
        else "The last column is the posterior over the prior standard deviation: 1 says that the data told nothing; "
        "below 0.5 a parameter counts as informed by the data."
    )
    yield Table(
        f"Calibrated parameters. {told}",
        ("parameter", "meaning", "informed by", "estimate", "90 % interval", "unit", "prior median (90 %)", "sd ratio"),
        tuple(rows),
        texts=3,
    ).without_empty()
    silent = [row["name"] for row in fit["parameters"] if row["informed_by"] == "prior" and not certain]
    if silent:
        yield Text(f"The data said next to nothing about {', '.join(silent)}; the forecast relies on the prior there.")
    if fit["known_parameters"]:
        known = ", ".join(f"{name} = {short(value)}" for name, value in fit["known_parameters"].items())
        yield Text(f"Not calibrated: {known}.")
    sources: dict[str, list[str]] = {}
    for row in fit["parameters"]:
        if row["source"]:
            sources.setdefault(row["source"], []).append(row["name"])
    if sources:
        yield Text("Where the models and priors come from:")
        yield Listing(tuple(f"{', '.join(names)}: {source}" for source, names in sources.items()))


# --- what if ----------------------------------------------------------------------------------------------------------


def _what_if(results: Results) -> Iterator[Block]:
    summary = results.summary
    rows = summary["what_if"]
    day = rows[0]["day"]
    alt = f"Median volume on day {short(day)}: " + "; ".join(
        f"{row['label']} {number(row['quantities']['volume']['quantiles'][-1]['0.5'])} cm³" for row in rows
    )
    yield Picture.of(
        figures.what_if(results),
        f"Volume under the plan and under other treatments. Left: medians over time. Right: on day {short(day)}, "
        "median, 50 % (thick) and 90 % (thin) intervals.",
        alt,
    )
    plan = summary["forecast"]
    q = plan["quantities"]["volume"]["quantiles"][-1]
    table: list[tuple[str, ...]] = [("the plan", number(q["0.5"]), interval(q["0.05"], q["0.95"]),
              percent(plan["none_detectable"][-1]["probability"]), "–", "–", "–")]  # fmt: skip
    for place, row in enumerate(rows, start=1):
        q = row["quantities"]["volume"]["quantiles"][-1]
        shares = (row[name] for name in ("none_detectable", "less_volume", "same_volume", "fewer_cells"))
        name = f"{figures.letter(place)}: {row['label']}"
        table.append((name, number(q["0.5"]), interval(q["0.05"], q["0.95"]), *map(percent, shares)))
    yield Table(
        f"Day {short(day)}. Less than the plan: share of draws in which this treatment leaves less volume, the same "
        "volume (as where nothing is visible under both), or fewer cells.",
        ("treatment", "median (cm³)", "90 % interval", "none detectable", "less volume", "same volume", "fewer cells"),
        tuple(table),
    ).without_empty()
    for place, row in enumerate(rows, start=1):
        yield treatments(row["schedule"], f"Treatments, {figures.letter(place)}: {row['label']}")
    yield Text("A what-if extrapolates: drugs and doses that this patient never had rest on priors alone.")


# --- limits and provenance --------------------------------------------------------------------------------------------


def _provenance(summary: dict) -> Block:
    made, forecast = summary["provenance"], summary["forecast"]
    solver = made["solver"]
    rows = [
        ("solver", f"{solver['name']}, tolerance {short(solver['rtol'])}, {solver['dtype']}, {solver['device']}"),
        ("draws, seed", f"{forecast['draws']}, {forecast['seed']}"),
        ("data of the fit (SHA-256)", made["patient_sha256"]),
        *((name, text) for name, text in made["versions"].items()),
        ("the same for scripts", "forecast.nc (arrays), summary.json (numbers)"),
    ]
    return Table("What this report was made with", ("item", "value"), tuple(rows), texts=2)
