"""What all tests share."""

import os
from pathlib import Path

import pytest

# Read by numpy, torch, numba and matplotlib when first imported, and inherited by the commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "Agg"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the real data, named by `TUMORCAST_DATA`; the test is skipped without it."""
    name = os.environ.get("TUMORCAST_DATA", "")
    if not name:
        pytest.skip("TUMORCAST_DATA is not set: this test reads real data from the folder it names")
    folder = Path(name)
    if not folder.is_dir():
        pytest.skip(f"TUMORCAST_DATA names {name!r}, which is not a folder: this test reads real data from there")
    return folder
