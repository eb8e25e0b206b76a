"""Splits: no patient on both sides, every part usable, and what overlaps is found."""

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("sksurv")

from sklearn.dummy import DummyClassifier  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_score  # noqa: E402
from sklearn.neighbors import KNeighborsClassifier  # noqa: E402

from biomodel.errors import InputError  # noqa: E402
from survival.hazard import Cox  # noqa: E402
from survival.outcome import follow_up  # noqa: E402
from survival.splits import LeaveOut, PatientFolds, check_split, duplicates, out_of_fold, overlap, temporal  # noqa: E402

RNG = np.random.default_rng(0)
PATIENT = np.repeat(np.arange(40), 3)
LABEL = np.repeat(RNG.random(40) < 0.4, 3).astype(int)
X = RNG.normal(size=(120, 2))


def test_rows_of_a_patient_stay_together():
    splits = list(PatientFolds(5, repeats=3, seed=1).split(X, LABEL, PATIENT))
    assert len(splits) == 15 == PatientFolds(5, repeats=3).get_n_splits()
    for k in range(3):
        tested = np.concatenate([test for _, test in splits[5 * k : 5 * k + 5]])
        assert sorted(tested) == list(range(120))
    for train, test in splits:
        assert not set(PATIENT[train]) & set(PATIENT[test])
        assert 0 < LABEL[test].mean() < 1
    again = list(PatientFolds(5, repeats=3, seed=1).split(X, LABEL, PATIENT))
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(splits, again, strict=True))
    assert not np.array_equal(splits[0][1], splits[5][1])


def test_events_are_in_every_fold():
    y = follow_up(RNG.exponential(size=60), [1] * 6 + [0] * 54)
    for train, test in PatientFolds(5, seed=3).split(np.zeros((60, 1)), y):
        assert y["event"][test].sum() >= 1 and y["event"][train].sum() >= 4
    with pytest.raises(InputError, match="6 patients of one kind for 7 folds"):
        list(PatientFolds(7).split(np.zeros((60, 1)), y))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.ones(120), "all 120 outcomes are 1; both classes are needed"),
        (np.full(120, 2), "must hold 0 and 1"),
        (np.full(120, np.nan), "nothing missing"),
        (["yes"] * 120, "no number"),
        (follow_up(np.ones(120), np.zeros(120)), "all 120 patients are censored"),
    ],
)
def test_outcomes_that_cannot_be_split(y, message):
    with pytest.raises(InputError, match=message):
        list(PatientFolds(3).split(X, y))


def test_leave_site_out():
    site = np.array(["A"] * 50 + ["B"] * 50 + ["C"] * 20)
    label = np.array([0, 1] * 50 + [0] * 19 + [1])
    splitter = LeaveOut(fewest=3)
    assert splitter.tested(label, site) == ["A", "B"] and splitter.get_n_splits(X, label, site) == 2
    for (train, test), name in zip(splitter.split(X, label, site), "AB", strict=True):
        assert set(site[test]) == {name} and name not in site[train] and "C" in site[train]
    scores = cross_val_score(LogisticRegression(), X, label, cv=splitter, groups=site)
    assert len(scores) == 2


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (None, "give `groups`"),
        (["A"] * 119 + [None], r"unknown \(the first at position 119\)"),
        (["A"] * 119 + [np.nan], "of 1 patients is unknown"),
        (["A"] * 120, "all patients come from 'A'"),
        (["A"] * 100, "100 sites named for 120 rows"),
        ([f"{k}" for k in range(120)], "no site has 3 patients of each kind"),
    ],
)
def test_sites_that_cannot_be_left_out(site, message):
    with pytest.raises(InputError, match=message):
        list(LeaveOut().split(X, LABEL, site))


def test_temporal():
    dates = np.array(["2010-05-01", "2012-01-01", "2015-01-01", "2016-01-01"], "datetime64[D]")
    train, test = temporal(dates, np.datetime64("2015-01-01"))
    assert train.tolist() == [0, 1] and test.tolist() == [2, 3]
    train, test = temporal(dates, np.datetime64("2015-01-01"), patients=["a", "b", "b", "c"])
    assert train.tolist() == [0] and test.tolist() == [2, 3]
    with pytest.raises(InputError, match="leaves 0 patients for training"):
        temporal(dates, np.datetime64("2000-01-01"))
    with pytest.raises(InputError, match="1 dates are missing"):
        temporal([1.0, np.nan], 1.0)


def test_overlaps_are_found():
    assert overlap(["P1", "P2"], ["p2 ", "P3"]) == ["p2 "]
    assert overlap([1001, 1002], [1002.0, 1003.0]) == [1002.0]
    assert overlap(["1001"], [1001, 1002]) == [1001]
    with pytest.raises(InputError, match="2 patients are in training and in test: P1, P2"):
        check_split(["P1", "P2"], ["P1", "P2", "P3"])
    table = pd.DataFrame({"age": [50.5, 61.0, np.nan], "ftv": [1.25, 3.0, 2.0]})
    assert duplicates(pd.concat([table, table.iloc[[2]]])) == [(2, 3)]
    check_split([1, 2, 3], [4], table, table.iloc[:1] + 1)
    with pytest.raises(
        InputError, match="1 rows of the test part repeat rows of training .the first: test 0, training 1"
    ):
        check_split([1, 2, 3], [4], table, table.iloc[[1]])


def test_nested_predictions_never_see_their_own_patient():
    """One neighbour remembers what it saw: with a patient's rows on both sides noise would look predictable."""
    noise, label = RNG.normal(size=(40, 5)).repeat(3, axis=0), LABEL
    nearest = KNeighborsClassifier(1)

    def probability(model, rows):
        return model.predict_proba(rows)[:, 1]

    apart = out_of_fold(nearest, noise, label, PatientFolds(5, repeats=2), probability, groups=PATIENT)
    mixed = out_of_fold(nearest, noise, label, PatientFolds(5, repeats=2), probability)
    assert apart.shape == (2, 120) and np.isfinite(apart).all()
    assert np.mean(mixed == label) > 0.95 and np.mean(apart == label) < 0.7
    search = GridSearchCV(DummyClassifier(), {"strategy": ["prior"]}, cv=PatientFolds(3))
    assert out_of_fold(search, pd.DataFrame(noise), label, PatientFolds(5), probability).shape == (1, 120)


def test_curves_out_of_fold():
    y = follow_up(RNG.exponential(size=60), np.ones(60))
    found = out_of_fold(Cox(), X[:60], y, PatientFolds(3), lambda m, rows: m.predict_curves(rows, [0.2, 0.5]).survival)
    assert found.shape == (1, 60, 2)
