"""Real volumes of I-SPY 2 against the floors that plain models set on the same folds.

Data: Li et al. 2020, npj Breast Cancer 6:63, doi:10.1038/s41523-020-00203-7 (TCIA, collection ISPY2). A reduced form of
`tests/benchmarks/bench_ispy2.py`: two folds, fewer iterations, one structure.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_ispy2.py"


@pytest.fixture(scope="module")
def bench():
    for name in ("pandas", "openpyxl", "sklearn"):
        pytest.importorskip(name)
    spec = importlib.util.spec_from_file_location("bench_ispy2", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(bench, data_dir):
    """Scores of 256 of the patients in two large folds, each forecast from the other 128 to 256."""
    from sklearn.model_selection import KFold

    volumes = bench.load(data_dir)
    logs, patients = np.log(volumes + bench.FLOOR), bench.patients_of(volumes)
    model = bench.candidates()["shared resistance"]
    scores = {}
    for train, test in list(KFold(3, shuffle=True, random_state=0).split(logs))[:2]:
        population = bench.learn(model, [patients[i] for i in train], 15, 64)
        here = {"tumorcast": bench.judge(*bench.predict(population, [patients[i] for i in test], 512), logs[test])}
        for name, values in {**here, **bench.plain(logs[train], logs[test])}.items():
            scores.setdefault(name, []).append(values)
    return {name: np.concatenate(parts) for name, parts in scores.items()}


def test_the_table_is_read(bench, data_dir):
    volumes = bench.load(data_dir)
    assert volumes.shape == (384, 4) and np.isfinite(volumes).all()
    assert (volumes >= 0).all() and (np.diff(np.median(volumes, 0)) < 0).all()


def test_plain_models_are_where_they_were_measured(found):
    """Mean absolute errors of log(FTV + 0.05) measured in ten folds; here there are other folds, of other sizes."""
    for name, expected in (("carry-forward", (1.38, 1.06)), ("exponential", (1.95, 1.55)), ("ridge", (0.85, 0.77))):
        np.testing.assert_allclose(found[name][..., 0].mean(0), expected, rtol=0.08)


def test_forecasts_beat_the_floors(found):
    mine, ridge = found["tumorcast"], found["ridge"]
    assert (mine[..., 0].mean(0) < found["carry-forward"][..., 0].mean(0) - 0.2).all()
    assert (mine[..., 0].mean(0) < found["exponential"][..., 0].mean(0) - 0.5).all()
    assert mine[..., 1].mean() < ridge[..., 1].mean() + 0.005
    assert (mine[..., 0].mean(0) <= ridge[..., 0].mean(0) + 0.02).all()


def test_intervals_cover(found):
    nine, five = found["tumorcast"][..., 2].mean(), found["tumorcast"][..., 3].mean()
    assert nine == pytest.approx(0.9, abs=0.035) and five == pytest.approx(0.5, abs=0.06)
