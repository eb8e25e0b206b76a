"""The report: everything is there, nothing comes from elsewhere, and its numbers are those of the summary."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import matplotlib.pyplot
import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

import biomodel as bm
from biomodel.domain import Domain
from biomodel.errors import InputError, OutputError
from biomodel.figure_maps import _cut, maps, outline
from biomodel.figures import time_course, treatment_rows
from biomodel.findings import Finding, Findings
from biomodel.report import Page, Picture, Report, report
from biomodel.report_blocks import Fragment, Table, Text, interval, number, percent, relative_error, short
from biomodel.report_words import in_words, treatments
from biomodel.results import Results, results

FINDINGS = Findings("x", (Finding("warning", "plausibility", "v1_adc.nii.gz", "ADC <low> & odd.", "Look at it."),))
SECTIONS = [
    "Summary", "Patient and data", "Course of the volume", "Maps of the tumour", "Scores beside baselines",
    "Parameters", "What if", "Limits of use", "Provenance",
]  # fmt: skip
VOID = {"meta", "img", "br"}


class Parsed(HTMLParser):
    """Tags, attributes and texts of a page; complains about tags that do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def all(self, tag: str) -> list[str]:
        return [text for where, text in self.texts if where == tag]


def tables(made: Report) -> dict[str, Table]:
    return {b.caption.split(".")[0]: b for s in made.sections for b in s.blocks if isinstance(b, Table)}


class ResponsePage:
    """A page as another package would hand it in."""

    title = "Response & outcome"

    def __init__(self) -> None:
        figure = Figure(figsize=(4, 2))
        figure.subplots().plot([0, 1], [0, 1])
        text = "<p>Probability: <b>0.41</b></p><table><tr><th>a</th></tr><tr><td>1</td></tr></table><ul><li>x</li></ul>"
        self.blocks = (Fragment(text), Text("A < B"), Picture.of(figure, "A rising line.", "line"))


@pytest.fixture(scope="module")
def made(imaged):
    return report(imaged.forecast, imaged.patient, imaged.what_if, FINDINGS)


@pytest.fixture(scope="module")
def page(made):
    return made.html()


def test_all_sections_are_there(page):
    parsed = Parsed(page)
    assert parsed.all("h2") == SECTIONS and parsed.all("h1") == ["Tumour forecast: P014"]
    assert parsed.all("title") == ["Tumour forecast: P014"]
    links = [attrs["href"] for tag, attrs in parsed.tags if tag == "a"]
    anchors = {attrs["id"] for tag, attrs in parsed.tags if tag == "section"}
    assert {link[1:] for link in links} == anchors - {"summary"}


def test_the_page_needs_nothing_else(page):
    parsed = Parsed(page)
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attrs in parsed.tags:
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value.startswith(("data:image/png;base64,", "#")), (tag, value[:40])
    without_images = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"(https?:)?//|url\(|@import", without_images)
    policy = next(attrs["content"] for tag, attrs in parsed.tags if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'")


def test_images_are_pictures_with_words(page):
    images = [attrs for tag, attrs in Parsed(page).tags if tag == "img"]
    assert len(images) == 3
    for attrs in images:
        assert base64.b64decode(attrs["src"].partition(",")[2], validate=True).startswith(b"\x89PNG")
        assert len(attrs["alt"]) > 40


def test_its_numbers_are_those_of_the_summary(made, page):
    summary, cells = made.results.summary, Parsed(page).all("td")
    expected = []
    for quantity in summary["forecast"]["quantities"].values():
        for q in quantity["quantiles"]:
            expected += [number(q["0.5"]), interval(q["0.25"], q["0.75"]), interval(q["0.05"], q["0.95"])]
    for row in summary["scores"]:
        expected += [number(row[n]) for n in ("volume", "observed_volume", "crps")] + [
            relative_error(row["volume_error"])
        ]
        expected += [number(row[n]) for n in ("ccc", "pearson", "rmse", "dice")] if row["dice"] is not None else []
    for row in summary["calibration"]["parameters"]:
        expected += [row["name"], number(row["estimate"]), interval(row["low"], row["high"]), row["informed_by"]]
        expected.append(f"{number(row['prior_median'])} ({interval(row['prior_low'], row['prior_high'])})")
    for row in summary["what_if"]:
        expected += [percent(row[n]) for n in ("less_volume", "same_volume", "fewer_cells", "none_detectable")]
    for row in summary["observations"]:
        expected += [short(row["day"]), number(row["volume_cm3"]), number(row["longest_diameter_mm"])]
    expected.append(summary["provenance"]["patient_sha256"])
    missing = [text for text in expected if text not in cells]
    assert not missing


def test_scores_stand_beside_baselines(made):
    found = tables(made)
    assert [row[0] for row in found["Volume"].rows[:3]] == ["forecast", "carry-forward", "exponential volume"]
    assert {row[0] for row in found["Maps, over the union of predicted and observed tumour"].rows} == {
        "forecast", "carry-forward",
    }  # fmt: skip


def test_the_summary_in_words(made, imaged):
    summary = made.results.summary
    text, last = in_words(summary), summary["forecast"]["quantities"]["volume"]["quantiles"][-1]
    assert f"{number(last['0.5'])} cm³ (median; 90 % interval {interval(last['0.05'], last['0.95'])} cm³)" in text
    assert "Fitted to visits 1 and 2 (days 0 to 20)" in text and "for day 90" in text
    assert "On day 90 (visit 4) no tumour was seen, inside the 90 % interval." in text
    assert "(carry-forward)" in text and "(exponential volume)" in text and "virtual" not in text
    alone = in_words(results(imaged.forecast).summary)
    assert "the forecast is not scored" in alone


@pytest.mark.parametrize(("seen", "place"), [(0.05, "below"), (0.4, "inside"), (30.0, "above")])
def test_where_the_observation_lies(made, seen, place):
    summary = made.results.summary
    q = {"day": 90.0, "0.05": 0.2, "0.25": 0.3, "0.5": 0.4, "0.75": 0.5, "0.95": 0.9}
    forecast = {**summary["forecast"], "quantities": {"volume": {"units": "cm^3", "quantiles": [q]}}}
    scores = [{**row, "observed_volume": seen} for row in summary["scores"] if row["day"] == 90.0]
    text = in_words({**summary, "forecast": forecast, "scores": scores})
    assert f"{number(seen)} cm³ were measured, {place} the 90 % interval." in text


def test_virtual_patients_are_named_virtual(imaged, make_imaged):
    patient = replace(imaged.patient, notes=("Virtual: made up.",))
    forecast = replace(imaged.forecast, fit=make_imaged.fit(patient.until(2)))
    for made in (report(forecast, patient), report(forecast)):  # with the whole record, and without
        page = made.html()
        assert "virtual patient, breast" in page and "This patient is virtual" in page and "P014 (virtual)" in page
        assert "says little about real patients" in page


def test_text_from_data_is_escaped(make_imaged):
    nasty = "<script>alert(1)</script> & \"x\" 'y'"
    patient = replace(make_imaged.patient(nasty), notes=("<img src=x onerror=y>",), clinical={"subtype": "<b>"})
    forecast = make_imaged.forecast(patient)
    made = report(forecast, patient, [("<i>none</i>", make_imaged.forecast(patient, fit=forecast.fit))], FINDINGS)
    page = made.html()
    for text in ("<script", "<img src=x", "<i>none", "<b>", "<low>"):
        assert text not in page
    assert f"Tumour forecast: {nasty}" in Parsed(page).all("h1")
    assert "&lt;img src=x onerror=y&gt;" in page and "ADC &lt;low&gt; &amp; odd." in page
    assert made.pdf().startswith(b"%PDF")


def test_notes_findings_and_limits_are_shown(imaged, page):
    for text in ("A note of the fit.", "Drawn by two readers.", "v1_adc.nii.gz", "Look at it.", "For research only"):
        assert text in page
    assert "found nothing" in report(imaged.forecast, findings=Findings("x", ())).html()
    assert "No quality check" in report(imaged.forecast).html()


def test_made_again_from_the_folder(made, page, tmp_path):
    made.results.write(tmp_path)
    again = Report.from_folder(tmp_path)
    assert again.html() == page
    assert again.pdf() == made.pdf()


def test_from_a_folder_without_results(tmp_path):
    with pytest.raises(InputError, match=r"no summary.json in this folder; expected the results of a forecast"):
        Report.from_folder(tmp_path)


def test_a_patient_without_images(volumes, tmp_path):
    made = report(volumes.forecast, volumes.patient, volumes.what_if)
    page = made.html()
    assert Parsed(page).all("h2") == [name for name in SECTIONS if name != "Maps of the tumour"]
    assert "There are no images" in page and "volume as measured (cm³)" in page and "a measured volume of" in page
    assert tables(made)["Visits"].columns == ("visit", "use", "day", "volume (cm³)")  # nothing else was measured
    assert "fewer cells" not in tables(made)["Day 150"].columns
    assert made.pdf().startswith(b"%PDF")
    made.results.write(tmp_path)
    assert Report.from_folder(tmp_path).html() == page


def test_a_fit_without_intervals(imaged, make_imaged):
    fit = make_imaged.fit(imaged.patient.until(2), method="MAP")
    table = tables(report(make_imaged.forecast(imaged.patient, fit=fit)))["Calibrated parameters"]
    assert "sd ratio" not in table.columns
    assert {row[2] for row in table.rows} == {"not told by this method"}


def test_pages_of_other_packages(imaged):
    extra = ResponsePage()
    assert isinstance(extra, Page)
    made = report(imaged.forecast, pages=[extra])
    titles = [section.title for section in made.sections]
    assert titles[-3:] == ["Response & outcome", "Limits of use", "Provenance"]
    page = made.html()
    for part in ("<p>Probability: <b>0.41</b></p>", "<p>A &lt; B</p>", "Response &amp; outcome", "A rising line."):
        assert part in page
    assert b"/Title (Response & outcome)" in made.pdf()


def test_pdf(made, tmp_path):
    made.save(tmp_path / "x.pdf")
    data = (tmp_path / "x.pdf").read_bytes()
    assert data == made.pdf()  # no clock in it
    assert data.startswith(b"%PDF") and data.rstrip().endswith(b"%%EOF")
    assert 3 <= len(re.findall(rb"/Type /Page\b(?!s)", data)) <= 12
    assert re.findall(rb"/Title \((.*?)\)\n", data)[: len(SECTIONS)] == [name.encode() for name in SECTIONS]
    assert len(re.findall(rb"/Subtype /Image", data)) >= 3


def test_saved_by_the_ending(made, page, tmp_path):
    made.save(tmp_path / "new" / "P014.HTML")
    assert (tmp_path / "new" / "P014.HTML").read_text(encoding="utf-8") == page
    with pytest.raises(OutputError, match=r"found the ending '.docx'; expected .html or .pdf"):
        made.save(tmp_path / "x.docx")


def test_unwritable_output_leaves_nothing(made, tmp_path):
    (tmp_path / "file").write_text("kept")
    for ending in ("html", "pdf"):
        with pytest.raises(OutputError, match="cannot be written"):
            made.save(tmp_path / "file" / f"x.{ending}")
        (tmp_path / f"folder.{ending}").mkdir()
        with pytest.raises(OutputError, match="is a folder"):
            made.save(tmp_path / f"folder.{ending}")
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.html", "folder.pdf"]


def test_in_a_notebook_it_stands_in_a_frame_of_its_own(made):
    shown = made._repr_html_()
    assert shown.startswith("<iframe srcdoc=") and shown.count("<") == 2


# --- figures ----------------------------------------------------------------------------------------------------------


def test_figures_leave_global_state_alone(made):
    before = dict(matplotlib.rcParams)
    time_course(made.results)
    maps(made.results)
    assert dict(matplotlib.rcParams) == before and not matplotlib.pyplot.get_fignums()


@pytest.mark.parametrize(("largest", "scale"), [(30.0, "linear"), (900.0, "symlog")])
def test_a_wide_forecast_does_not_squash_what_was_seen(volumes, largest, scale):
    curves = volumes.forecast.curves.copy(deep=True)
    curves["volume"][:, -1] = largest
    axes = time_course(results(replace(volumes.forecast, curves=curves), volumes.patient)).axes[0]
    assert axes.get_yscale() == scale and axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > largest


def test_maps_are_drawn_as_in_the_clinic(made):
    """The grid's x grows to the patient's right, which belongs on the left of the picture; y grows to the front."""
    cut = _cut(made.results)
    assert (cut.name, cut.letters) == ("axial", ("R", "L", "A", "P"))
    (left, right), (bottom, top) = cut.limits
    assert left > right and top > bottom
    data = made.results.data()
    x, y = data["x"].values, data["y"].values
    assert cut.extent == (x[0] - 0.75, x[-1] + 0.75, y[0] - 1.0, y[-1] + 1.0)  # voxels of 1.5 × 2 mm
    figure, name = maps(made.results)[0]
    assert name == "axial"
    panel = figure.axes[0]
    assert panel.get_aspect() == 1.0 and panel.get_xlim() == cut.limits[0]


@pytest.mark.parametrize(
    ("shape", "name", "letters"),
    [((1, 8, 9), "axial", "RLAP"), ((8, 1, 9), "coronal", "RLSI"), ((8, 9, 1), "sagittal", "APSI")],
)
def test_flat_grids_are_seen_from_the_front(shape, name, letters):
    domain = Domain.box(shape, (3.0, 2.0, 1.0))
    data = xr.Dataset(
        {
            "probability": (("time", "z", "y", "x"), np.ones((1, *shape))),
            "affine": (("row", "column"), domain.affine),
        },
        {"time": [1.0], **domain.coords},
    )
    seen = xr.Dataset({"region": (("visit", "z", "y", "x"), np.zeros((1, *shape), bool))})
    tree = xr.DataTree.from_dict({"/": data, "/observations": seen})
    cut = _cut(Results(tree, {"patient": {"grid": {"spacing_mm": list(domain.spacing)}}}))
    assert cut.name == name and "".join(cut.letters) == letters


def test_outline_follows_the_voxels():
    region = np.zeros((3, 4), bool)
    region[1, 1:3] = True
    edges = outline(region, (0.0, 8.0, 0.0, 3.0))  # voxels 2 mm wide and 1 mm high
    assert len(edges) == 6
    assert np.linalg.norm(edges[:, 1] - edges[:, 0], axis=1).sum() == pytest.approx(2 * 4 + 2 * 1)
    assert edges[..., 0].min() == 2.0 and edges[..., 0].max() == 6.0
    assert edges[..., 1].min() == 1.0 and edges[..., 1].max() == 2.0


def test_rows_of_treatments(made):
    rows = dict(treatment_rows(made.results.summary["schedule"], 0.0, 50.0))
    assert list(rows) == ["paclitaxel", "trastuzumab"] and len(rows["paclitaxel"]) == 7
    one = {"kind": "radiotherapy", "agent": None, "amount": 2.0, "units": "Gy", "status": "given"}
    fractions = [{**one, "day": 10.0 + day} for day in range(3)]
    assert list(dict(treatment_rows(fractions, 0.0, 50.0))) == ["radiotherapy"]


def test_a_schedule_in_short():
    doses = bm.Schedule.weekly("paclitaxel", 1.4, 12, 80, "mg/m^2").doses
    rows = [{"kind": "chemotherapy", "agent": d.agent, "day": d.day, "amount": d.amount, "units": d.units,
             "status": d.status} for d in doses]  # fmt: skip
    table = treatments(rows, "Plan")
    assert isinstance(table, Table)
    assert table.rows == (("paclitaxel", "12 × 80 mg/m²", "1.4 to 78.4, every 7", "given"),)
    assert treatments([], "Plan").text == "Plan: none."


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.48812, "0.488"), (22.0, "22.0"), (12345.6, "12346"), (1.364e8, "1.36 × 10⁸"),
     (-2.5e-5, "−2.50 × 10⁻⁵"), (None, "–"), (float("nan"), "–")],
)  # fmt: skip
def test_numbers_as_text(value, text):
    assert number(value) == text


def test_shares_as_text():
    assert [percent(x) for x in (0.0, 0.004, 0.31, 0.999, 1.0, None)] == [
        "0 %",
        "< 1 %",
        "31 %",
        "> 99 %",
        "100 %",
        "–",
    ]
    assert [relative_error(x) for x in (0.31, -0.2, 349.0, None)] == ["+31 %", "−20 %", "× 350", "–"]
