"""The command ``tumorcast``.

Everything heavy is imported inside the commands, so that ``--help`` answers at once. Errors become
messages in :mod:`biomodel.cli_group`, which also brings in the commands of other packages.
"""

from __future__ import annotations

import os
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from biomodel.cli_doctor import doctor
from biomodel.cli_group import CommandGroup, run
from biomodel.cli_show import console, steps
from biomodel.errors import OutputError

if TYPE_CHECKING:
    from biomodel.cli_forecast import Outcome
    from biomodel.findings import Findings
    from biomodel.patient import Patient

__all__ = ["app", "main"]

#: Blank lines keep their place in the help; single line breaks do not.
EXIT_CODES = "\n\n".join(
    (
        "Exit codes:",
        "0 done",
        "1 unexpected failure (a bug: please report it)",
        "2 wrong command line",
        "3 bad input",
        "4 the calculation failed, or a package it needs is not installed",
        "5 the output could not be written",
        "130 interrupted (Ctrl-C)",
    )
)

#: What a result folder holds. A folder with anything else in it is never replaced.
RESULT_FILES = frozenset({"report.html", "report.pdf", "forecast.nc", "summary.json"})

app = typer.Typer(
    name="tumorcast",
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(version("tumorcast"))
        except PackageNotFoundError:
            typer.echo("unknown: the package is not installed")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Forecast how one patient's tumour responds to treatment, with its uncertainty, from scans at a few visits.

    Try it:

    tumorcast virtual --out example --seed 7

    tumorcast forecast example --out result
    """


# --- commands ---------------------------------------------------------------------------------------------------------


@app.command(epilog="Example:\n\ntumorcast validate P014")
def validate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Patient folder, or a cohort of them.")],
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check a patient folder: schema, geometry and units, plausibility, identifying information.

    Ends with 0 if the folder can be used (there may be warnings) and with 3 if it cannot.
    """
    from biomodel.quality import check

    findings = check(folder)
    if json:
        typer.echo(findings.to_json())
    elif len(findings):
        console().print(findings)
    else:
        typer.echo(findings.summary())
    raise typer.Exit(findings.exit_code)


@app.command(epilog="Example:\n\ntumorcast forecast P014 --calibrate-on 2 --draws 200 --seed 0 --out result")
def forecast(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Patient folder with its patient.json.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="OUT", help="Folder to write; a previous result there is replaced.")
    ],
    calibrate_on: Annotated[
        int, typer.Option("--calibrate-on", metavar="K", help="Use visits 1 to K; nothing later is looked at.")
    ] = 2,
    draws: Annotated[int, typer.Option(min=1, help="Draws from the posterior.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same result.")] = 0,
    until: Annotated[
        float | None, typer.Option(metavar="DAY", help="Forecast up to this day; by default the last visit.")
    ] = None,
    what_if: Annotated[
        bool, typer.Option("--what-if/--no-what-if", help="Compare with no further treatment after visit K.")
    ] = True,
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="AGENT", help="Compare with the plan without further doses of AGENT; repeatable."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    pdf: Annotated[bool, typer.Option("--pdf/--no-pdf", help="Write the report as PDF, too.")] = True,
) -> None:
    """Calibrate on the first visits, forecast the later ones, score what was then seen, write a report.

    OUT gets report.html, report.pdf, forecast.nc and summary.json, all of them or none.
    """
    _check_device(device)
    with steps() as shown:
        shown.say("Reading the patient")
        from biomodel import cli_forecast as job
        from biomodel.patient import Patient
        from biomodel.quality import check

        patient = Patient.read(folder)
        known = patient.until(visit=calibrate_on)
        days = job.days_of(patient, known, until)
        plans = job.plans_of(known, what_if, without or [])
        _check_result_folder(out)
        outcome = job.run(known, days, plans, draws=draws, seed=seed, device=device, steps=shown)
        shown.say("Writing the report")
        _write(out, outcome, patient, check(folder), pdf)
    for title, table in job.tables(outcome, patient):
        typer.echo(title)
        console().print(table)
    for note in outcome.forecast.notes:
        typer.echo(f"Note: {note}")
    typer.echo(f"Report: {out / 'report.html'}")


@app.command(epilog="Example:\n\ntumorcast report result")
def report(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Result folder written by 'tumorcast forecast'.")],
    pdf: Annotated[bool, typer.Option("--pdf/--no-pdf", help="Write the report as PDF, too.")] = True,
) -> None:
    """Write the report of a result folder anew, from its forecast.nc and summary.json."""
    from biomodel.report import Report

    page = Report.from_folder(out)
    page.save(out / "report.html")
    if pdf:
        page.save(out / "report.pdf")
    typer.echo(f"Report: {out / 'report.html'}")


@app.command(epilog="Example:\n\ntumorcast virtual --out example --seed 7")
def virtual(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Patient folder to make; it must not exist.")],
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same patient.")] = 7,
    mismatched: Annotated[
        bool, typer.Option("--mismatched", help="Add physics and errors that the fitted model lacks.")
    ] = False,
    small: Annotated[bool, typer.Option("--small", help="24 × 24 × 24 voxels, for quick trials.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Write raw series for 'tumorcast quantify' instead.")] = False,
) -> None:
    """Make a virtual patient whose truth is known, written to disk as a real one would be."""
    _check_new(out)
    with steps() as shown:
        shown.say("Growing a virtual tumour")
        from biomodel.files import atomic_folder
        from biomodel.virtual import Matched, Mismatched, small_patient, virtual_patient

        truth = Mismatched() if mismatched else Matched()
        made = small_patient(seed, truth) if small else virtual_patient(seed, truth)
        if raw:
            from biomodel.acquisition import SIEMENS_3T, write_raw

            write_raw(made, out, SIEMENS_3T.mismatched() if mismatched else SIEMENS_3T, seed=seed)
            typer.echo(f"Virtual study: {out}")
            return
        # The truth is written after the patient, so one folder around both makes them appear together.
        with atomic_folder(out) as temporary:
            made.write(temporary)
    typer.echo(f"Virtual patient: {out}")


@app.command(epilog="Example:\n\ntumorcast resample adc.nii.gz --like mask.nii.gz --out new_adc.nii.gz")
def resample(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="NIfTI file to bring onto another grid.")],
    like: Annotated[Path, typer.Option("--like", metavar="MASK", help="NIfTI file whose grid is wanted.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="NIfTI file to write; it must not exist.")],
) -> None:
    """Bring an image onto the grid of another by their positions in the patient (nothing is registered).

    Maps are interpolated linearly, masks by the nearest voxel.
    """
    from biomodel.quality import resample as bring

    _check_new_file(out)
    if not out.name.endswith((".nii", ".nii.gz")):
        raise typer.BadParameter(f"{out.name} must end in .nii or .nii.gz", param_hint="--out")
    bring(image, like, out)
    typer.echo(f"Resampled: {out}")


class Between(StrEnum):
    """What may move between visits."""

    rigid = "rigid"
    affine = "affine"
    bspline = "bspline"


@app.command(epilog="Example:\n\ntumorcast quantify study --out P014\n\ntumorcast forecast P014 --out result")
def quantify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Study: study.json beside folders of raw series.")],
    out: Annotated[Path, typer.Option("--out", metavar="OUT", help="Patient folder to make; it must not exist.")],
    registration: Annotated[Between, typer.Option(help="What may move between visits.")] = Between.bspline,
    spacing: Annotated[
        float | None, typer.Option(min=0.1, metavar="MM", help="Side of cubic voxels; by default those of visit 1.")
    ] = None,
    repeats: Annotated[
        int,
        typer.Option(min=0, help="Repetitions of each registration, which tell its error for the maps; 0: none."),
    ] = 3,
    motion: Annotated[
        bool, typer.Option("--motion/--no-motion", help="Correct motion within the dynamic series.")
    ] = True,
    dicom: Annotated[
        bool, typer.Option("--dicom", help="Write DICOM parametric maps and segmentations, too.")
    ] = False,
    region_weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Find tumours with a network of 'tumorcast train', not with thresholds."),
    ] = None,
    tissue_weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Tell tissues apart with a network, not with fuzzy c-means."),
    ] = None,
) -> None:
    """Turn raw DCE, DWI and T1 series (DICOM or BIDS) into maps on one grid and a patient that can be forecast.

    OUT gets patient.json with its images, maps/, registration/ and quantify.html, all of them or none.
    """
    _check_new(out)
    with steps() as shown:
        shown.say("Reading the study")
        from biomodel.imaging.registration import Affine, BSpline, Rigid
        from biomodel.quantify.pipeline import quantify as run_all
        from biomodel.quantify.study import Study
        from biomodel.quantify.visit import Settings

        settings = Settings(correct_motion=motion)
        if region_weights is not None:
            from biomodel.imaging.regions import NetworkRegions, TumourNetwork

            settings = replace(settings, region=NetworkRegions(TumourNetwork.load(region_weights)))
        if tissue_weights is not None:
            from biomodel.imaging.regions import NetworkTissues, TissueNetwork

            settings = replace(settings, tissue=NetworkTissues(TissueNetwork.load(tissue_weights)))
        kind = {Between.rigid: Rigid, Between.affine: Affine, Between.bspline: BSpline}[registration]()
        done = run_all(Study.read(folder), settings, kind, spacing, repeats, say=shown.say)
        shown.say("Writing")
        done.write(out, dicom=dicom)
    for visit in done.visits:
        assert visit.region is not None
        volume = float(visit.region.sum()) * visit.grid.voxel_volume / 1e3
        typer.echo(f"Visit {visit.number}, day {visit.day:g}: tumour {volume:.2f} cm³")
    for note in done.patient.notes:
        typer.echo(f"Note: {note}")
    typer.echo(f"Maps: {out / 'quantify.html'}")


@app.command(epilog="Example:\n\ntumorcast train P001 P002 P003 --virtual 40 --keep-back 1 --out tumour.pt\n\n"
             "tumorcast quantify study --region-weights tumour.pt --out P014")  # fmt: skip
def train(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="File of weights to write; it must not exist.")],
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR]...", help="Patients of 'tumorcast quantify', regions corrected."),
    ] = None,
    virtual: Annotated[int, typer.Option(min=0, metavar="N", help="Learn from N virtual patients, too.")] = 0,
    tissues: Annotated[bool, typer.Option("--tissues", help="For --tissue-weights, not --region-weights.")] = False,
    bright_fat: Annotated[
        bool, typer.Option("--bright-fat", help="With --tissues: the patients' series do not suppress fat.")
    ] = False,
    keep_back: Annotated[int, typer.Option(min=0, metavar="K", help="Patients that are scored, not learnt from.")] = 0,
    training_steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Updates of the weights; by default 2000, with --tissues 600.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same network.")] = 0,
) -> None:
    """Train a network for tumour regions (or tissues) on quantified patients, virtual patients or both.

    It learns the files maps/visitN_region.nii.gz (or visitN_tissue-fibroglandular.nii.gz) as they are: look them
    through and correct them first. An empty region says that there is no tumour.
    """
    if bright_fat and (virtual or not tissues):
        raise typer.BadParameter(
            "needs --tissues, and no virtual patients, whose fat is dark", param_hint="--bright-fat"
        )
    _check_new_file(out)
    with steps() as shown:
        shown.say("Reading the exams")
        from biomodel import cli_train as job
        from biomodel.imaging.regions import Training

        own, made_up = job.gather(folders or [], virtual, seed, shown)
        shown.say("Training")
        count = training_steps or (job.TISSUE_STEPS if tissues else job.TUMOUR_STEPS)
        made, score = job.teach(
            own, made_up, keep_back, Training(steps=count, seed=seed), shown,
            tissues=tissues, fat_suppressed=not bright_fat,
        )  # fmt: skip
        digest = made.save(out)
    typer.echo(f"Learnt from {made.provenance['cases']} exams of {made.provenance['patients']} patients.")
    typer.echo(score)
    typer.echo(f"Weights: {out} ({digest[:12]})")


app.command(epilog="Example:\n\ntumorcast doctor")(doctor)


# --- checks before anything is computed ------------------------------------------------------------------------------


def _check_device(device: str) -> None:
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (_ and not number.isdigit()):
        raise typer.BadParameter(f"{device!r} is not a device; use cpu, cuda or cuda:N", param_hint="--device")


def _check_writable(out: Path) -> None:
    """Tell before a long calculation what would fail at its end."""
    parent = out.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"{out}: {parent} is a file, not a folder. Choose another output path.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"{out}: you may not write in {parent}. Choose another output folder or change its permissions."
        )


def _check_new(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{out}: exists already and is left as it is. Choose another folder or remove it first.")
    _check_writable(out)


def _check_new_file(out: Path) -> None:
    if out.exists():
        raise OutputError(f"{out}: exists already and is left as it is. Choose another name or remove it first.")
    _check_writable(out)


def _check_result_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file; expected a folder. Choose another output path.")
    held = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
    foreign = [name for name in held if name not in RESULT_FILES]
    if foreign or (held and "summary.json" not in held):
        shown = ", ".join((foreign or held)[:4]) + (", ..." if len(foreign or held) > 4 else "")
        raise OutputError(
            f"{out}: holds {shown}, so it is not a result of this command alone and is left as it is. Choose another "
            "folder for --out, or move these files away."
        )
    _check_writable(out)


# --- the result folder ------------------------------------------------------------------------------------------------


def _write(out: Path, outcome: Outcome, patient: Patient, findings: Findings, pdf: bool) -> None:
    """Write all files of a result, or none."""
    from biomodel.files import atomic_folder
    from biomodel.report import report as page

    made = page(outcome.forecast, observed=patient, what_if=outcome.what_if, findings=findings)
    with atomic_folder(out, overwrite=True, marker="summary.json") as temporary:
        made.results.write(temporary)
        made.save(temporary / "report.html")
        if pdf:
            made.save(temporary / "report.pdf")


def main() -> None:
    """Run the command line."""
    run(app)


if __name__ == "__main__":
    main()
