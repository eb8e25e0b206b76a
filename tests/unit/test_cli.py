"""The command line: what it does, and how each kind of trouble ends in a message, an exit code and no files."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from biomodel import cli_group
from biomodel.cli import app
from biomodel.imaging.nifti import read_image
from biomodel.virtual import small_patient
from patient_folders import edit, rewrite

ROOT = Path(__file__).resolve().parents[2]
RESULT = {"report.html", "forecast.nc", "summary.json"}


def run(*args):
    """Run the command in this process."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert "Traceback" not in result.output
    return result


def forecast(folder, out, *more):
    return run("forecast", folder, "--out", out, "--draws", 3, "--no-pdf", "--no-what-if", *more)


def program(*args, code="from biomodel.cli import main; main()", **more):
    """Start the command as a program of its own, from other code if given."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        **({"stdout": subprocess.PIPE} | more),
    )


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A small virtual patient; never changed."""
    folder = tmp_path_factory.mktemp("cli") / "P014"
    small_patient(7).write(folder)
    return folder


@pytest.fixture(scope="module")
def result(pristine, tmp_path_factory):
    """A result folder with everything in it, never changed; what the command said; what it computed."""
    from biomodel import cli_forecast

    out, outcomes = tmp_path_factory.mktemp("results") / "P014", []

    def keep(*args, compute=cli_forecast.run, **kwargs):
        outcomes.append(compute(*args, **kwargs))
        return outcomes[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli_forecast, "run", keep)
        done = run("forecast", pristine, "--calibrate-on", 2, "--draws", 5, "--out", out, "--without", "carboplatin")
    assert done.exit_code == 0, done.output
    return out, done, outcomes[0]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def left_in(folder):
    """Everything in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_lists_commands_and_exit_codes():
    shown = run("--help")
    assert shown.exit_code == 0
    for word in ("validate", "forecast", "report", "virtual", "resample", "3 bad input", "130 interrupted"):
        assert word in shown.output


@pytest.mark.parametrize("command", ["validate", "forecast", "report", "virtual", "quantify", "train", "resample"])
def test_help_of_each_command_shows_an_example(command):
    shown = run(command, "--help")
    assert shown.exit_code == 0
    assert f"tumorcast {command} " in shown.output.partition("Example:")[2]


def test_help_needs_none_of_the_heavy_packages():
    code = (
        "import sys\n"
        "from biomodel.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(*sorted({'torch', 'numpy', 'xarray', 'matplotlib', 'pint'} & set(sys.modules)), file=sys.stderr)"
    )
    process = program(code=code)
    shown, heavy = process.communicate(timeout=60)
    assert "forecast" in shown
    assert heavy.split() == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nonsense"], "No such command"),
        (["forecast", "P014"], "--out"),
        (["forecast", "P014", "--out", "x", "--draws", "0"], "--draws"),
        (["forecast", "P014", "--out", "x", "--device", "gpu"], "cuda"),
        (["resample", "a.nii", "--like", "b.nii", "--out", "c.txt"], ".nii.gz"),
    ],
)
def test_wrong_command_lines_end_with_2(arguments, complaint):
    done = run(*arguments)
    assert done.exit_code == 2
    assert complaint in done.output


# --- what it does -----------------------------------------------------------------------------------------------------


def test_forecast_writes_everything(result):
    out, done, _ = result
    assert left_in(out) == sorted(RESULT | {"report.pdf"})
    assert left_in(out.parent) == ["P014"]
    assert done.output.splitlines()[-1] == f"Report: {out / 'report.html'}"
    for words in ("seen", "no further treatment", "no further carboplatin"):
        assert words in done.output
    summary = json.loads((out / "summary.json").read_text())
    assert [one["label"] for one in summary["what_if"]] == ["no further treatment", "no further carboplatin"]
    assert summary["calibration"]["visits"] == 2 and summary["forecast"]["draws"] == 5
    assert str(out.parent) not in (out / "summary.json").read_text()


def test_forecast_again_replaces_the_result_with_the_same_bytes(pristine, result, tmp_path):
    first = result[0]
    out = shutil.copytree(first, tmp_path / "P014")
    (out / "summary.json").write_text("{}")
    done = run("forecast", pristine, "--calibrate-on", 2, "--draws", 5, "--out", out, "--without", "carboplatin")
    assert done.exit_code == 0, done.output
    assert (out / "summary.json").read_bytes() == (first / "summary.json").read_bytes()
    assert left_in(tmp_path) == ["P014"]


def test_report_is_made_again_from_the_files(result, tmp_path):
    first = result[0]
    out = shutil.copytree(first, tmp_path / "P014")
    (out / "report.html").unlink()
    done = run("report", out, "--no-pdf")
    assert done.exit_code == 0, done.output
    assert "<html" in (out / "report.html").read_text(encoding="utf-8")


def test_report_of_another_folder_is_bad_input(pristine, tmp_path):
    assert run("report", tmp_path / "nothing").exit_code == 3
    before = contents(pristine.parent / "P014" / "truth")
    done = run("report", pristine)
    assert done.exit_code == 3 and "summary.json" in done.output
    assert not (pristine / "report.html").exists() and contents(pristine / "truth") == before


def test_validate(pristine, folder):
    good = run("validate", pristine)
    assert good.exit_code == 0 and "0 errors" in good.output
    (folder / "visit2_adc.nii.gz").unlink()
    bad = run("validate", folder)
    assert bad.exit_code == 3 and "visit2_adc" in bad.output
    found = json.loads(run("validate", folder, "--json").output)
    assert not found["ok"]
    (error,) = [item for item in found["findings"] if item["severity"] == "error"]
    assert error["file"] == "visit2_adc.nii.gz" and error["remedy"]


def test_virtual_patients_are_reproducible_and_never_overwrite(pristine, tmp_path):
    done = run("virtual", "--out", tmp_path / "a", "--seed", 7, "--small")
    assert done.exit_code == 0, done.output
    for name in ("patient.json", "visit2_adc.nii.gz", "mask.nii.gz"):
        assert (tmp_path / "a" / name).read_bytes() == (pristine / name).read_bytes()
    assert (tmp_path / "a" / "truth" / "truth.nc").is_file()
    again = run("virtual", "--out", tmp_path / "a", "--seed", 8, "--small")
    assert again.exit_code == 5 and "exists already" in again.output
    assert (tmp_path / "a" / "patient.json").read_bytes() == (pristine / "patient.json").read_bytes()
    other = run("virtual", "--out", tmp_path / "b", "--seed", 7, "--small", "--mismatched")
    assert other.exit_code == 0
    assert (tmp_path / "b" / "visit2_adc.nii.gz").read_bytes() != (pristine / "visit2_adc.nii.gz").read_bytes()


def test_until(folder, tmp_path):
    edit(folder, lambda data: data.update(visits=data["visits"][:2]))
    done = forecast(folder, tmp_path / "out")
    assert done.exit_code == 2 and "--until" in done.output
    done = forecast(folder, tmp_path / "out", "--until", 40)
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["forecast"]["days"][-1] == 40 and summary["scores"] == []


def test_a_patient_without_images(tmp_path):
    manifest = {
        "schema": "tumorcast/patient/v1",
        "id": "P2",
        "organ": "breast",
        "volumes": {"cv": 0.2, "floor": {"value": 0.05, "units": "cm^3"}},
        "visits": [
            {"day": day, "volume": {"value": value, "units": "cm^3"}}
            for day, value in ((0, 12.0), (21, 8.0), (63, 3.0))
        ],
        "treatments": [
            {
                "kind": "chemotherapy",
                "agent": "paclitaxel",
                "day": 1 + 7 * week,
                "dose": {"value": 80, "units": "mg/m^2"},
                "status": "planned",
            }
            for week in range(12)
        ],
    }
    (tmp_path / "P2").mkdir()
    (tmp_path / "P2" / "patient.json").write_text(json.dumps(manifest))
    done = forecast(tmp_path / "P2", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert set(left_in(tmp_path / "out")) == RESULT


# --- bad input --------------------------------------------------------------------------------------------------------


def truncate(folder):
    data = (folder / "visit1_adc.nii.gz").read_bytes()
    (folder / "visit1_adc.nii.gz").write_bytes(data[: len(data) // 2])


def spoil(value):
    def change(values):
        region = np.unravel_index(np.argmin(np.where(values > 0, values, np.inf)), values.shape)
        values[region] = value
        return values

    return lambda folder: rewrite(folder, "visit2_adc.nii.gz", change)


def other_grid(folder):
    image = read_image(folder / "visit2_adc.nii.gz")
    affine = image.affine.copy()
    affine[:3, :3] *= 0.5
    nib.save(nib.Nifti1Image(np.kron(image.values, np.ones((2, 2, 2))).T, affine), folder / "visit2_adc.nii.gz")


def outside(values):
    values[0, 0, 0] = 1
    return values.astype(bool)


def set_visit(number, **values):
    return lambda folder: edit(folder, lambda data: data["visits"][number - 1].update(values))


def set_dose(value):
    return lambda folder: edit(folder, lambda data: data["treatments"][0]["dose"].update(value=value))


BAD_INPUT = {
    "no folder": (shutil.rmtree, "P014", "path"),
    "no manifest": (lambda f: (f / "patient.json").unlink(), "patient.json", ""),
    "manifest is no JSON": (lambda f: (f / "patient.json").write_text("{"), "patient.json", ""),
    "missing NIfTI": (lambda f: (f / "visit1_adc.nii.gz").unlink(), "visit1_adc.nii.gz", "Check the name"),
    "truncated NIfTI": (truncate, "visit1_adc.nii.gz", "Copy or export it again"),
    "no NIfTI": (lambda f: (f / "mask.nii.gz").write_text("hello"), "mask.nii.gz", "Copy or export it again"),
    "NaN": (spoil(np.nan), "visit2_adc.nii.gz", "Repair the map"),
    "infinite": (spoil(np.inf), "visit2_adc.nii.gz", "Repair the map"),
    "wrong units": (set_visit(2, adc={"file": "visit2_adc.nii.gz", "units": "1"}), "visit 2, adc", "never guessed"),
    "units that do not fit the values": (
        set_visit(2, adc={"file": "visit2_adc.nii.gz", "units": "um^2/s"}),
        "visit2_adc.nii.gz",
        "never guessed",
    ),
    "other grid": (other_grid, "visit2_adc.nii.gz", "tumorcast resample visit2_adc.nii.gz --like mask.nii.gz --out"),
    "empty region": (
        lambda f: rewrite(f, "visit1_region.nii.gz", lambda v: np.zeros(v.shape, bool)),
        "visit1_region.nii.gz",
        "leave 'region' out",
    ),
    "region outside the mask": (
        lambda f: rewrite(f, "visit1_region.nii.gz", outside),
        "visit1_region.nii.gz",
        "Enlarge the mask or cut the region",
    ),
    "visits out of order": (set_visit(2, day=60.0), "patient.json", "in order"),
    "visits on the same day": (set_visit(2, day=0.0), "patient.json", "the same day"),
    "negative dose": (set_dose(-80.0), "patient.json", "expected a positive number"),
    "absurd dose": (set_dose(8e7), "patient.json", "Check the amount"),
    "unknown field": (lambda f: edit(f, lambda data: data.update(adress="x")), "adress", ""),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_with_3_and_leaves_nothing(case, folder, tmp_path):
    spoil, names, remedy = BAD_INPUT[case]
    spoil(folder)
    done = forecast(folder, tmp_path / "results" / "out")
    assert done.exit_code == 3, done.output
    assert done.output.startswith("Error: ")
    assert names in done.output and remedy in done.output
    assert len(done.output) < 1500 and done.output.count("\n") < 20
    assert not (tmp_path / "results").exists()
    assert run("validate", folder).exit_code == 3


@pytest.mark.parametrize(("number", "code"), [(0, 3), (9, 3), (-1, 3), (1, 4)])
def test_a_visit_that_does_not_exist_or_is_not_enough(number, code, pristine, tmp_path):
    done = forecast(pristine, tmp_path / "out", "--calibrate-on", number)
    assert done.exit_code == code
    assert "visit" in done.output
    assert left_in(tmp_path) == []


def test_an_agent_that_is_not_in_the_plan(pristine, tmp_path):
    done = forecast(pristine, tmp_path / "out", "--without", "aspirin")
    assert done.exit_code == 3 and "aspirin" in done.output and "paclitaxel" in done.output
    assert left_in(tmp_path) == []


def test_calibration_without_a_tumour(folder, tmp_path):
    nothing = {"value": 0.0, "units": "cm^3"}

    def drop(data):
        for visit in data["visits"][:2]:
            visit.pop("region")
            visit.pop("adc")
            visit["volume"] = nothing

    edit(folder, drop)
    done = forecast(folder, tmp_path / "out")
    assert done.exit_code == 4 and "no tumour" in done.output
    assert not (tmp_path / "out").exists()


def test_the_offered_resample_command_mends_the_folder(folder, tmp_path, monkeypatch):
    other_grid(folder)
    message = forecast(folder, tmp_path / "out").output
    (command,) = re.findall(r"'(tumorcast resample .*?)'", message)
    monkeypatch.chdir(folder)
    name, *arguments = shlex.split(command)
    assert name == "tumorcast"
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    again = run(*arguments)
    assert again.exit_code == 5 and "exists already" in again.output
    set_visit(2, adc={"file": arguments[-1], "units": "mm^2/s"})(folder)
    assert run("validate", folder).exit_code == 0


# --- output that cannot be written ------------------------------------------------------------------------------------


@pytest.fixture
def no_calculation(monkeypatch):
    """What is wrong must be told before anything is computed."""

    def never(*args, **kwargs):
        raise AssertionError("calculated in vain")

    monkeypatch.setattr("biomodel.cli_forecast.calibrate", never)


def test_a_folder_of_another_kind_is_left_alone(pristine, folder, result, tmp_path, no_calculation):
    before = contents(folder / "truth")
    done = forecast(pristine, folder)
    assert done.exit_code == 5 and "patient.json" in done.output and "--out" in done.output
    assert contents(folder / "truth") == before and (folder / "patient.json").is_file()
    # A result folder to which somebody added a file of their own.
    mixed = shutil.copytree(result[0], tmp_path / "mixed")
    (mixed / "notes.txt").write_text("mine")
    done = forecast(pristine, mixed)
    assert done.exit_code == 5 and "notes.txt" in done.output
    assert (mixed / "notes.txt").read_text() == "mine"


def test_output_below_a_file_or_without_permission(pristine, tmp_path, monkeypatch, no_calculation):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        done = forecast(pristine, out)
        assert done.exit_code == 5 and "Choose another" in done.output
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
    done = forecast(pristine, tmp_path / "out")
    assert done.exit_code == 5 and "may not write" in done.output
    assert left_in(tmp_path) == ["file"]


@pytest.fixture
def calculated(pristine, result, monkeypatch):
    """What was computed for the result folder, so that tests of writing need not compute it again."""
    monkeypatch.setattr("biomodel.cli_forecast.run", lambda *args, **kwargs: result[2])


@pytest.mark.parametrize("name", ["forecast.nc", "summary.json", "report.html"])
def test_full_disk(name, folder, result, calculated, tmp_path, monkeypatch):
    """The disk fills up at one of the files: the earlier result stays whole."""
    from biomodel import files

    def flush(path, before=files._flush_to_disk):
        if path.name.endswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        before(path)

    monkeypatch.setattr(files, "_flush_to_disk", flush)
    out = shutil.copytree(result[0], tmp_path / "out")
    before = contents(out)
    done = forecast(folder, out)
    assert done.exit_code == 5, done.output
    assert "disk is full" in done.output and name in done.output and ".tmp-" not in done.output
    assert contents(out) == before
    assert left_in(tmp_path) == ["P014", "out"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kilobytes", [4, 40, 120])
def test_writing_fails_for_real(kilobytes, folder, calculated, tmp_path):
    """The system refuses to write more, in the middle of a file: HDF5 would end the process with a crash."""
    import resource

    child = os.fork()
    if child == 0:
        code = 99
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, resource.RLIM_INFINITY))
            code = forecast(folder, tmp_path / "out").exit_code
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
    assert left_in(tmp_path) == ["P014"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_standard_output(pristine):
    with open("/dev/full", "w") as full:
        process = program("validate", pristine, stdout=full)
        _, message = process.communicate(timeout=60)
    assert process.returncode == 5
    assert "Traceback" not in message and "cannot write" in message and "ignored" not in message


# --- interruption and failures ----------------------------------------------------------------------------------------


def test_interruption_while_writing_leaves_nothing(pristine, calculated, tmp_path, monkeypatch):
    from biomodel.report import Report

    def stop(self, path):
        assert (path.parent / "forecast.nc").is_file()  # the maps are there already, in a temporary folder
        raise KeyboardInterrupt

    monkeypatch.setattr(Report, "save", stop)
    done = forecast(pristine, tmp_path / "out")
    assert done.exit_code == 130
    assert done.output == "interrupted; nothing was written\n"
    assert left_in(tmp_path) == []


def test_ctrl_c_in_the_middle_of_a_run(pristine, tmp_path):
    """A real signal to a real program, sent while it forecasts."""
    code = (
        "import sys, time, biomodel.cli, biomodel.cli_forecast\n"
        "def slow(*args):\n    print('running', flush=True); time.sleep(60)\n"
        "sys.modules['biomodel.forecast'].longest_diameter = slow\n"
        "biomodel.cli.main()"
    )
    process = program("forecast", pristine, "--out", tmp_path / "out", "--draws", 3, code=code)
    assert process.stdout.readline() == "running\n", process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=20)
    assert process.returncode == 130
    assert message == "interrupted; nothing was written\n"
    assert left_in(tmp_path) == []


def test_an_unexpected_failure_is_told_without_a_traceback(pristine, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("by zero")

    monkeypatch.delenv("TUMORCAST_DEBUG", raising=False)
    monkeypatch.setattr("biomodel.cli_forecast.calibrate", fail)
    done = forecast(pristine, tmp_path / "out")
    assert done.exit_code == 1
    assert "ZeroDivisionError: by zero" in done.output and "TUMORCAST_DEBUG=1" in done.output
    assert left_in(tmp_path) == []
    monkeypatch.setenv("TUMORCAST_DEBUG", "1")
    shown = CliRunner().invoke(app, ["forecast", str(pristine), "--out", str(tmp_path / "out")])
    assert shown.exit_code == 1 and "Traceback" in shown.output


def test_not_enough_memory(pristine, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr("biomodel.cli_forecast.calibrate", fail)
    done = forecast(pristine, tmp_path / "out")
    assert done.exit_code == 4 and "memory" in done.output


# --- commands of other packages ---------------------------------------------------------------------------------------


@pytest.fixture
def extensions(tmp_path, monkeypatch):
    """Three packages with commands: one that works, one that misses a package, one that is not there at all."""
    (tmp_path / "good_extension.py").write_text(
        "import typer\ncommands = typer.Typer()\n"
        "@commands.command()\ndef respond(name: str) -> None:\n    'Answer.'\n    typer.echo(f'hello {name}')\n"
    )
    (tmp_path / "poor_extension.py").write_text("import a_package_that_is_not_there\n")
    entries = [
        EntryPoint("respond", "good_extension:commands", cli_group.GROUP),
        EntryPoint("respond-too", "good_extension:respond", cli_group.GROUP),
        EntryPoint("survive", "poor_extension:commands [survival]", cli_group.GROUP),
        EntryPoint("forecast", "poor_extension:commands", cli_group.GROUP),
    ]
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli_group, "entry_points", lambda group: entries)


def test_commands_of_other_packages(extensions):
    shown = run("--help")
    assert shown.exit_code == 0 and "respond" in shown.output and "survive" in shown.output
    assert not {"good_extension", "poor_extension"} & set(sys.modules)
    assert run("respond", "Ada").output == "hello Ada\n"
    assert run("respond-too", "Ada").output == "hello Ada\n"
    assert "Answer." in run("respond", "--help").output
    sys.modules.pop("good_extension")


def test_a_missing_extra_shows_how_to_install_it(extensions):
    missing = run("survive", "x")
    assert missing.exit_code == 4
    assert "a_package_that_is_not_there" in missing.output
    assert "pip install 'tumorcast[survival]'" in missing.output
    assert run("survive", "--help").exit_code == 0
    # A package cannot take the place of a command of our own.
    assert "--calibrate-on" in run("forecast", "--help").output
