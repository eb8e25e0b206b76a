"""Readers of public tables: the counts of their papers, and nothing of later visits."""

import numpy as np
import pytest

pytest.importorskip("sksurv")
pytest.importorskip("openpyxl")

from biomodel.errors import InputError  # noqa: E402
from survival.cohorts import benchmark_parts, ispy1, ispy2  # noqa: E402


@pytest.mark.parametrize(("name", "train", "test", "columns"), [("metabric", 1523, 381, 9), ("gbsg", 1546, 686, 7)])
def test_benchmarks(data_dir, name, train, test, columns):
    one, other = benchmark_parts(data_dir, name)
    assert one.X.shape == (train, columns) and other.X.shape == (test, columns)
    assert len(one.y) == train and other.y["time"].min() > 0
    assert 50 < one.X["age"].mean() < 65


def test_ispy2(data_dir):
    whole = ispy2(data_dir)
    assert len(whole.X) == 384 and whole.y.sum() == 113 and not whole.X.isna().any().any()
    assert sorted(c for columns in whole.groups.values() for c in columns) == sorted(whole.X)
    early = ispy2(data_dir, visits=2)
    assert not [c for c in early.X if "T2" in c or "T3" in c]
    assert early.X.equals(whole.X[list(early.X)])
    change = whole.X["volume T2"] - whole.X["volume T0"]
    assert np.allclose(change, whole.X["volume T2 change"])
    assert (whole.X[whole.groups["arm"]].sum(axis=1) == 1).all()
    with pytest.raises(InputError, match="expected 1 to 4"):
        ispy2(data_dir, visits=5)


def test_ispy1(data_dir):
    table = ispy1(data_dir)
    assert len(table.X) == 221 and table.y["event"].sum() == 63
    assert "pCR" not in table.X and "RCB class" not in table.X
    four = table.X[[f"diameter {k}" for k in (1, 2, 3, 4)]]
    assert np.allclose(table.X["diameter mean"], four.mean(axis=1), equal_nan=True)
    later = ispy1(data_dir, at_surgery=True)
    assert later.X["pCR"].sum() == 58 and later.X["pCR"].isna().sum() == 6
    assert table.X.filter(regex=r"diameter \d$").notna().all(axis=1).sum() == 186


def test_tables_that_are_not_there(tmp_path):
    for read in (ispy1, ispy2, lambda folder: benchmark_parts(folder, "gbsg")):
        with pytest.raises(InputError, match="is not in the folder"):
            read(tmp_path)
    with pytest.raises(InputError, match="'flchain' is not one of metabric, gbsg, support"):
        benchmark_parts(tmp_path, "flchain")
