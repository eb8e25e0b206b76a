"""Every example runs, within a minute, and writes only where it is told to."""

import os
import runpy
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
FAST = {"03_read_your_own_nifti_folder.py", "05_quantify_one_visit.py", "volumes_only.py"}
#: CPU seconds; the wall clock would depend on what else runs.
LIMIT = 60


#: Forty patients take minutes; executed as a notebook below.
LONG = {"uncertainty.py"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in SCRIPTS if name not in LONG]
)
def test_example(name, tmp_path, monkeypatch, capsys):
    plt = pytest.importorskip("matplotlib.pyplot")
    temporary, given, here = (tmp_path / part for part in ("temporary", "given", "here"))
    for folder in (temporary, given, here):
        folder.mkdir()
    monkeypatch.setenv("TUMORCAST_EXAMPLES", str(given))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.chdir(here)
    began = time.process_time()
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    except SystemExit as end:
        assert not end.code
        pytest.skip(capsys.readouterr().out.strip())  # it says which data it lacks
    finally:
        plt.close("all")
    assert time.process_time() - began < LIMIT
    assert capsys.readouterr().out.strip()
    assert os.listdir(here) == []


def test_examples_are_numbered_and_in_percent_format():
    numbers = [name[:2] for name in SCRIPTS if name[0].isdigit()]
    assert all(number.isdigit() for number in numbers) and len(numbers) == len(set(numbers))
    for name in SCRIPTS:
        assert (EXAMPLES / name).read_text(encoding="utf-8").startswith("# %% [markdown]\n# # "), name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tables", "pictures"), [("forecast", 7, 2), ("uncertainty", 6, 7)])
def test_notebooks_execute_and_results_show_themselves(name, tables, pictures, monkeypatch, tmp_path):
    monkeypatch.setenv("TUMORCAST_EXAMPLES", str(tmp_path))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # figures show themselves through the kernel's own
    jupytext = pytest.importorskip("jupytext")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = jupytext.read(EXAMPLES / f"{name}.py")
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    shown = [out.data for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs if "data" in out]
    assert sum("text/html" in data for data in shown) >= tables
    assert sum("image/png" in data for data in shown) == pictures
