"""What the page of a quantified study says: its sections, made from the maps of the visits alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy.ndimage import binary_erosion

from biomodel.imaging.voxelfit import Code
from biomodel.quantify import page_figures
from biomodel.quantify.maps import VisitMaps
from biomodel.quantify.page_figures import Scale, shares, volume
from biomodel.quantify.quantities import REASONS, quantity
from biomodel.report_blocks import Block, Listing, Picture, Section, Table, Text, number, percent, short

__all__ = ["sections", "subtitle"]


def subtitle(visits: Sequence[VisitMaps]) -> str:
    """Return visits, days and scanners."""
    days = [visit.day for visit in visits]
    when = f"day {short(days[0])}" if len(days) == 1 else f"days {short(min(days))} to {short(max(days))}"
    scanners = list(dict.fromkeys(text for visit in visits if (text := _scanner(visit)) != "–"))
    count = "1 visit" if len(visits) == 1 else f"{len(visits)} visits"
    return "; ".join([f"{count}, {when}", *scanners])


def sections(visits: Sequence[VisitMaps]) -> tuple[Section, ...]:
    """Return all sections of the page."""
    scales = page_figures.scales(visits)
    found = [
        Section("Summary", (Text(_in_words(visits), "lead"),), "summary"),
        Section("Quality of the series", tuple(_quality(visits)), "quality"),
        Section("Tumour over the visits", tuple(_course(visits, scales)), "course"),
    ]
    for visit in visits:
        title = f"Visit {visit.number}, day {short(visit.day)}"
        found.append(Section(title, tuple(_visit(visit, visits, scales)), f"visit-{visit.number}"))
    if any(one.code is not None for visit in visits for one in visit.maps.values()):
        found.append(Section("Voxels without a value", tuple(_reasons(visits)), "reasons"))
    found.append(Section("Methods", tuple(_methods(visits)), "methods"))
    found.append(Section("Limits of use", (Listing(tuple(_limits(visits))),), "limits"))
    return tuple(found)


def _scanner(visit: VisitMaps) -> str:
    vendor, field = visit.acquisition.get("vendor"), visit.acquisition.get("field_strength")
    parts = [str(vendor)] if vendor else []
    if isinstance(field, (int, float)):
        parts.append(f"{short(float(field))} T")
    return ", ".join(parts) or "–"


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# --- summary and quality ----------------------------------------------------------------------------------------------


def _in_words(visits: Sequence[VisitMaps]) -> str:
    names = list(dict.fromkeys(name for visit in visits for name in visit.maps))
    parts = [f"Maps of {_and(names)}." if names else "No maps were made."]
    known = [(visit, size) for visit in visits if (size := volume(visit)) is not None]
    if not known:
        parts.append("No tumour was looked for.")
    for visit, size in known:
        what = f"{number(size)} cm³" if size else "no tumour found"
        parts.append(f"Visit {visit.number} (day {short(visit.day)}): {what}.")
    if len(known) > 1 and known[0][1]:
        change = known[-1][1] / known[0][1] - 1
        parts.append(f"From the first to the last of them the volume changed by {_signed(change)}.")
    counts = [sum(f.severity == kind for visit in visits for f in visit.findings) for kind in ("error", "warning")]
    if any(counts):
        words = [
            f"{n} {kind}{'' if n == 1 else 's'}" for n, kind in zip(counts, ("error", "warning"), strict=True) if n
        ]
        parts.append(f"The quality check has {_and(words)}: read them before you use the maps.")
    return " ".join(parts)


def _signed(share: float) -> str:
    return f"{100 * share:+.0f} %".replace("-", "−")


def _quality(visits: Sequence[VisitMaps]) -> Iterator[Block]:
    order = {"error": 0, "warning": 1, "info": 2}
    rows = [
        (str(visit.number), found.severity, found.file, found.message, found.remedy)
        for visit in visits
        for found in sorted(visit.findings, key=lambda found: order[found.severity])
    ]
    if rows:
        columns = ("visit", "severity", "series", "finding", "remedy")
        yield Table("What the check of the series found, the gravest first", columns, tuple(rows), texts=5)
    silent = [str(visit.number) for visit in visits if not visit.findings]
    if silent:
        yield Text(f"Nothing was found at visit{'' if len(silent) == 1 else 's'} {_and(silent)}.")


# --- course -----------------------------------------------------------------------------------------------------------


def _course(visits: Sequence[VisitMaps], scales: Mapping[str, Scale]) -> Iterator[Block]:
    rows = []
    first = next((size for visit in visits if (size := volume(visit))), None)
    for visit in visits:
        size = volume(visit)
        change = "–" if size is None or not first or size == first else _signed(size / first - 1)
        rows.append((
            str(visit.number), _scanner(visit), short(visit.day), number(size), change,
            "–" if visit.region is None else str(int(np.count_nonzero(visit.region))),
        ))  # fmt: skip
    yield Table("Volume of the tumour: its voxels times their size. Change: against the first visit with a tumour.",
                ("visit", "scanner", "day", "volume (cm³)", "change", "voxels"), tuple(rows), texts=2)  # fmt: skip
    found = [visit for visit in visits if visit.region is not None and np.any(visit.region)]
    names = [name for name in scales if any(name in visit.maps for visit in found)]
    if names:
        table = []
        for name in names:
            cells = []
            for visit in found:
                cells.append(_spread(visit, name, scales[name]) if name in visit.maps else "–")
            table.append((quantity(name).long_name, scales[name].label(name), *cells))
        columns = ("quantity", "map (unit)", *(f"visit {visit.number}, day {short(visit.day)}" for visit in found))
        yield Table("In the tumour: median, and in brackets the middle half of its voxels", columns, tuple(table),
                    texts=2)  # fmt: skip
    if len(visits) > 1 and found:
        yield Picture.of(
            page_figures.course(visits, scales),
            "Volume, and median (circle) and middle half (bar) of each map in the tumour, over the days of the visits. "
            "Scales of the maps do not begin at 0. The bars show how the tumour's voxels differ, not errors.",
            _in_words(visits),
        )


def _spread(visit: VisitMaps, name: str, scale: Scale) -> str:
    values = visit[name].values[np.asarray(visit.region, bool)]
    values = values[np.isfinite(values)] * scale.factor
    if not values.size:
        return "–"
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{number(middle)} ({number(low)} to {number(high)})"


# --- one visit --------------------------------------------------------------------------------------------------------


def _visit(visit: VisitMaps, visits: Sequence[VisitMaps], scales: Mapping[str, Scale]) -> Iterator[Block]:
    shape, step = (" × ".join(f"{n:g}" for n in reversed(one)) for one in (visit.grid.shape, visit.grid.spacing))
    rows = [("voxels (x × y × z)", f"{shape}, {step} mm each"), ("scanner", _scanner(visit))]
    if visit.acquisition.get("sequence"):
        rows.append(("sequence", str(visit.acquisition["sequence"])))
    rows.append(("organ", f"{number(float(np.count_nonzero(visit.organ)) * visit.grid.voxel_volume / 1000)} cm³"))
    size = volume(visit)
    rows.append(("tumour", "not looked for" if size is None else (f"{number(size)} cm³" if size else "none found")))
    yield Table("Where the maps lie", ("item", "value"), tuple(rows), texts=2)
    # Visits on one grid show one part of the body, so that their pictures can be compared.
    together = [other for other in visits if other.region is not None and other.grid.same_as(visit.grid)]
    around = np.any([np.asarray(other.region, bool) for other in together], axis=0) if together else None
    for figure, cut in page_figures.slices(visit, scales, around):
        yield Picture.of(
            figure,
            f"{cut.capitalize()} slices through the tumour, and below the standard deviation of each voxel's value. "
            "White and black line: outline of the tumour. Grey: inside the organ, no value. One colour scale for each "
            "quantity at all visits; a pointed end says that values lie beyond it. Letters: right, left, anterior, "
            "posterior, superior, inferior of the patient.",
            f"{cut} slices of maps at visit {visit.number} with the outline of the tumour, and their errors.",
        )
    if visit.curves:
        yield Picture.of(
            page_figures.curves(visit.curves),
            "Signals of single voxels: measured (circles) and as the fitted model has them (line); below, measured "
            "minus fitted. Residuals that wave instead of scatter say that the model does not fit. Voxels are counted "
            "from 1.",
            f"Measured and fitted curves at visit {visit.number}: {'; '.join(curve.title for curve in visit.curves)}.",
        )
    if visit.notes:
        yield Text("What was done and assumed at this visit:")
        yield Listing(visit.notes)


def _reasons(visits: Sequence[VisitMaps]) -> Iterator[Block]:
    figure = page_figures.reasons(visits)
    if figure is not None:
        yield Picture.of(
            figure,
            "Share of voxels by what the fit says of them, in the organ and in the tumour.",
            "Bars: how many voxels have a value, and why the others have none.",
        )
    # Maps of one fit have the same reasons: they share a row.
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for visit in visits:
        for where, mask in (("organ", visit.organ), ("tumour", visit.region)):
            for name, one in visit.maps.items() if mask is not None else ():
                for code, share in shares(one, np.asarray(mask, bool)).items():
                    if code is not Code.FITTED:
                        row = (str(visit.number), where, REASONS[code], percent(share))
                        found.setdefault(row, []).append(name)
    rows = [(visit_number, ", ".join(names), *rest) for (visit_number, *rest), names in found.items()]
    if rows:
        yield Table(
            "All that is not simply fitted", ("visit", "maps", "where", "reason", "voxels"), tuple(rows), texts=4
        )
    else:
        yield Text("All voxels of organ and tumour were fitted.")


# --- methods and limits -----------------------------------------------------------------------------------------------


def _methods(visits: Sequence[VisitMaps]) -> Iterator[Block]:
    rows = []
    for name in dict.fromkeys(name for visit in visits for name in visit.maps):
        words = quantity(name)
        methods = dict.fromkeys(visit[name].method for visit in visits if name in visit.maps)
        rows.append(
            (name, words.long_name, words.meaning or "–", "; or ".join(text for text in methods if text) or "–")
        )
    if rows:
        yield Table("The maps in plain words", ("map", "quantity", "what it tells", "method"), tuple(rows), texts=4)
    yield Text(
        "Names and units of the perfusion maps are those of the lexicon OSIPI CAPLEX; volume fractions are given in "
        "mL per 100 mL of tissue. An error (sd) says how far noise alone would move the voxel's value if the scan were "
        "repeated and the model were right."
    )


def _limits(visits: Sequence[VisitMaps]) -> Iterator[str]:
    yield "For research only. This is no medical device, and nothing here is advice on treating a person."
    yield "A voxel without a value is not a zero: nothing is known of it. The reason is given, no guess of its value."
    names = {name for visit in visits for name in visit.maps}
    if names & {"Ktrans", "ve", "vp", "Fp", "PS", "kep"}:
        yield (
            "Errors of single voxels count noise only. A wrong arterial input, T1, flip angle or relaxivity shifts all "
            "voxels of a perfusion map together, and is not in them; nor is a model that does not fit the tissue."
        )
    if "ADC" in names:
        yield "ADC falls where cells are dense, but oedema, necrosis, fibrosis, perfusion and fat change it, too."
    regions = [visit for visit in visits if visit.region is not None and np.any(visit.region)]
    if regions:
        edge = max(_edge(visit) for visit in regions)
        yield (
            f"Look at the tumour's outline: maps, volumes and shares rest on it. Up to {percent(edge)} of its voxels "
            "lie on its edge, so an outline that is half a voxel off changes the volume by up to about half of that."
        )
    if len({_scanner(visit) for visit in visits}) > 1:
        yield "The visits are from different scanners: part of a change between them may be the scanners'."
    if len(visits) > 1:
        yield (
            "A change between two visits is a change of the tumour only if it is larger than what two scans of the "
            "same tumour differ by; that was not measured here."
        )


def _edge(visit: VisitMaps) -> float:
    """Share of the tumour's voxels that touch its outside; across a flat axis nothing is outside."""
    region = np.squeeze(np.asarray(visit.region, bool))
    return 1 - float(binary_erosion(region).sum() / region.sum())
