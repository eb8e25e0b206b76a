"""The page of a quantified study: what it shows is what the maps say, and it needs nothing else."""

import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest

from biomodel.errors import InputError, OutputError
from biomodel.imaging.voxelfit import Code
from biomodel.quantify import page_figures
from biomodel.quantify.maps import Map, VisitMaps
from biomodel.quantify.page import StudyPage, page
from biomodel.report_blocks import Listing, Picture, Table, Text
from quantified_visits import ball, oblique_grid, quantified_visit

VOID = {"meta", "img", "br"}


class Parsed(HTMLParser):
    """Tags and texts of a page; complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def fewer(visit: VisitMaps, *names: str) -> VisitMaps:
    """The same visit with some of its maps alone, which are quicker to draw."""
    return VisitMaps(
        visit.number, visit.day, visit.grid, {name: visit[name] for name in names}, visit.organ, visit.tissues,
        visit.region, visit.curves, visit.findings, visit.notes, visit.acquisition,
    )  # fmt: skip


@pytest.fixture(scope="module")
def visits() -> list[VisitMaps]:
    return [fewer(quantified_visit(), "ve", "ADC", "drug_map"), fewer(quantified_visit(2, 21.0, 5.0), "ve", "ADC")]


@pytest.fixture(scope="module")
def made(visits) -> StudyPage:
    return page(visits[::-1], "Maps of <P014>")


def tables(made: StudyPage) -> dict[str, Table]:
    return {b.caption.split(":")[0]: b for s in made.sections for b in s.blocks if isinstance(b, Table)}


def test_the_page_is_whole_and_needs_nothing_else(made, tmp_path):
    made.save(tmp_path / "maps.html")
    text = (tmp_path / "maps.html").read_text(encoding="utf-8")
    parsed = Parsed(text)
    assert [section.title for section in made.sections] == [
        "Summary", "Quality of the series", "Tumour over the visits", "Visit 1, day 0", "Visit 2, day 21",
        "Voxels without a value", "Methods", "Limits of use",
    ]  # fmt: skip
    pictures = [attrs for tag, attrs in parsed.tags if tag == "img"]
    assert pictures and all(attrs["src"].startswith("data:image/png;base64,") and attrs["alt"] for attrs in pictures)
    assert not [tag for tag, _ in parsed.tags if tag in ("script", "link", "iframe")]
    assert not re.findall(r"https?://", text)
    said = " ".join(parsed.texts)
    for words in (
        "Maps of <P014>",
        "SNR 8 <below 10>",
        "The input function is that of Parker & others.",
        "Siemens, 3 T",
    ):
        assert words in said


def test_volumes_and_medians_are_those_of_the_maps(made, visits):
    found = tables(made)
    sizes = [visit.region.sum() * 8.0 / 1000 for visit in visits]
    rows = found["Volume of the tumour"].rows
    assert [float(row[3]) for row in rows] == pytest.approx(sizes, rel=5e-3)
    assert rows[1][4] == f"−{100 * (1 - sizes[1] / sizes[0]):.0f} %"
    medians = {row[1]: row[2:] for row in found["In the tumour"].rows}
    ve = [100 * np.nanmedian(visit["ve"].values[visit.region]) for visit in visits]
    assert [float(cell.split()[0]) for cell in medians["ve (mL/100 mL)"]] == pytest.approx(ve, rel=5e-3)
    adc = 1000 * np.nanmedian(visits[0]["ADC"].values[visits[0].region])
    assert float(medians["ADC (10⁻³ mm²/s)"][0].split()[0]) == pytest.approx(adc, rel=5e-3)
    assert medians["drug_map"][1] == "–"  # not made at the second visit


def test_findings_reasons_and_limits(made, visits):
    found = tables(made)
    assert [row[1] for row in found["What the check of the series found, the gravest first"].rows] == [
        "warning", "info", "warning", "info"]  # fmt: skip
    quiet = np.mean(visits[0]["ve"].code[visits[0].organ] == Code.NO_ENHANCEMENT)
    row = next(row for row in found["All that is not simply fitted"].rows if row[0] == "1" and "rise" in row[3])
    assert row[1:3] == ("ve", "organ") and row[4] == f"{100 * quiet:.0f} %"
    summary = made.sections[0].blocks[0]
    assert isinstance(summary, Text) and "2 warnings" in summary.text
    limits = made.sections[-1].blocks[0]
    assert isinstance(limits, Listing) and "no medical device" in limits.items[0]
    assert any("arterial input" in item for item in limits.items)


def test_visits_from_other_scanners_are_named(visits):
    other = VisitMaps(2, 21.0, visits[1].grid, {}, visits[1].organ, acquisition={"vendor": "GE", "field_strength": 1.5})
    made = page([visits[0], other])
    assert made.heading[1] == "2 visits, days 0 to 21; Siemens, 3 T; GE, 1.5 T"
    assert any("different scanners" in item for item in made.sections[-1].blocks[0].items)


def test_pdf(visits, tmp_path):
    made = page([fewer(visits[1], "ADC")])
    made.save(tmp_path / "maps.pdf")
    assert (tmp_path / "maps.pdf").read_bytes().startswith(b"%PDF-")
    with pytest.raises(OutputError, match="expected .html or .pdf"):
        made.save(tmp_path / "maps.docx")


def test_a_visit_without_tumour_maps_or_findings():
    grid = oblique_grid((1, 12, 14))
    made = page([VisitMaps(1, 3.0, grid, {}, np.ones(grid.shape, bool))])
    Parsed(made.html())
    assert "No maps were made. No tumour was looked for." in made.sections[0].blocks[0].text
    none = VisitMaps(1, 3.0, grid, {"T1": Map("T1", "s", np.full(grid.shape, np.nan))}, np.ones(grid.shape, bool),
                     region=np.zeros(grid.shape, bool))  # fmt: skip
    made = page([none])
    Parsed(made.html())
    assert "no tumour found" in made.sections[0].blocks[0].text


def test_refusals(visits):
    with pytest.raises(InputError, match="no visits"):
        page([])
    with pytest.raises(InputError, match="each once"):
        page([visits[0], visits[0]])
    other = {"ADC": Map("ADC", "um^2/ms", visits[1]["ADC"].values)}
    with pytest.raises(InputError, match="'um\\^2/ms'"):
        page([visits[0], VisitMaps(2, 21.0, visits[1].grid, other, visits[1].organ)])


def test_scales_are_shared_and_hold_the_tumour(visits):
    shown = page_figures.scales(visits)
    assert list(shown) == ["ve", "ADC", "drug_map"]
    assert shown["ve"].factor == 100 and shown["ve"].units == "mL/100 mL" and shown["ve"].low == 0
    tumour = 100 * np.concatenate([visit["ve"].values[visit.region] for visit in visits])
    assert shown["ve"].high >= np.nanquantile(tumour, 0.95)
    assert shown["ADC"].label("ADC") == "ADC (10⁻³ mm²/s)"


def test_slices_show_the_largest_cut_with_the_patients_right_on_the_left():
    grid = oblique_grid()
    region = ball(grid, (5, 9, 17), 5.0)  # x grows to the right of the patient
    values = np.where(region, 2.0, 1.0)
    visit = VisitMaps(1, 0.0, grid, {"T1": Map("T1", "s", values)}, np.ones(grid.shape, bool), region=region)
    ((figure, name),) = page_figures.slices(visit, page_figures.scales([visit]), around=np.ones(grid.shape, bool))
    assert name == "axial"
    panels = [axes for axes in figure.axes if len(axes.images) == 2]
    texts = [axes.get_ylabel() for axes in panels]
    assert "slice 6 of 9" in texts
    drawn = panels[texts.index("slice 6 of 9")]
    assert np.array_equal(np.asarray(drawn.images[1].get_array()), values[5])
    left, right = drawn.get_xlim()
    place = np.array([17 * 1.25, 9 * 1.6])
    where = drawn.transData.transform(place)
    middle = drawn.transData.transform([(left + right) / 2, sum(drawn.get_ylim()) / 2])
    assert where[0] < middle[0]  # the patient's right is on the left
    letters = {text.get_text(): text.get_position() for text in panels[0].texts if len(text.get_text()) == 1}
    assert letters["R"][0] < 0.5 < letters["L"][0] and letters["A"][1] > 0.5 > letters["P"][1]


def test_bars_of_reasons_add_up(visits):
    shares = page_figures.shares(visits[0]["ve"], visits[0].region)
    assert sum(shares.values()) == pytest.approx(1) and set(shares) == {Code.FITTED, Code.AT_BOUND}
    figure = page_figures.reasons(visits)
    widths = [sum(bar.get_width() for bar in axes.patches if abs(bar.get_y() + 0.36) < 1e-6) for axes in figure.axes]
    assert widths == pytest.approx([100] * 4)
    assert page_figures.reasons([fewer(visits[0], "drug_map")]) is None


def test_residuals_are_measured_minus_fitted(visits):
    curve = visits[0].curves[0]
    figure = page_figures.curves(visits[0].curves)
    below = next(axes for axes in figure.axes if axes.get_ylabel() == "residual")
    ends = np.array([segment[1, 1] for segment in below.collections[0].get_segments()])
    np.testing.assert_allclose(ends, curve.measured - curve.fitted)


def test_the_users_own_style_changes_nothing(visits):
    def png() -> bytes:
        return Picture.of(page_figures.curves(visits[0].curves), "c", "a").png

    before = png()
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 5, "axes.titlesize": 20}):
        assert png() == before
