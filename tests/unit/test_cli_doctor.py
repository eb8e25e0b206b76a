"""`tumorcast doctor`: what it finds, and what it says where FEniCS is missing or broken."""

from typer.testing import CliRunner

from biomodel.cli import app
from biomodel.fenics.process import PYTHON
from fenics_here import require_fenics


def test_doctor_finds_what_the_tests_use():
    require_fenics()
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    for words in ("interpreter with dolfinx", "compiler: found", "solved in", "FenicsSolver works here", "apt-get"):
        assert words in done.output


def test_doctor_says_what_is_missing_and_how_to_install_it(monkeypatch):
    monkeypatch.setenv(PYTHON, "/bin/false")
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 4
    assert "interpreters tried: /bin/false" in done.output and "apt-get install" in done.output


def test_doctor_tells_a_broken_fenics(monkeypatch, tmp_path):
    require_fenics()
    (tmp_path / "dolfinx.py").write_text("raise ImportError('libdolfinx.so: cannot open')")
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\nexport PYTHONPATH={tmp_path}\nexec /usr/bin/env python3 "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv(PYTHON, str(python))
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 4 and "libdolfinx.so" in done.output
