"""Partial pooling: the exact posterior of a linear hierarchical model, its limits, and misuse."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy.stats import multivariate_normal

import biomodel as bm
from biomodel.calibration.hierarchy import EXPECTED, learn_hierarchy
from biomodel.calibration.population import PseudoPatients, learn_priors
from biomodel.errors import CalibrationError
from biomodel.figure_diagnostics import shrinkage
from biomodel.parameters import JointPrior, Parameter, Prior
from biomodel.visit import VolumeSettings

BELIEF = PseudoPatients(1.0, 2.0, 0.0)
START = JointPrior(("growth.k", "initial.volume"), [0.0, 2.0], np.diag([0.02**2, 0.5**2]))
SIZES, DAYS, SD = {"a": 12, "b": 40, "c": 25, "d": 60}, np.array([0.0, 20.0, 40.0, 60.0]), 0.3
SPREAD = np.array([0.015, 0.5])


@dataclass(frozen=True)
class NetGrowth(bm.Exponential):
    """Growth or decline; log V is linear in its Gaussian rate and in log V0."""

    k: Prior = bm.Normal(0.0, 0.03)

    @property
    def parameters(self):
        return (Parameter("k", "1/day", self.k, (-5.0, 5.0)),)


MODEL = bm.ReactionDiffusion(NetGrowth(), bm.NoDiffusion())


def cohort(means, seed=0):
    """Patients of four groups with these means of (k, log V0), practically Gaussian errors and no floor."""
    rng = np.random.default_rng(seed)
    design = np.stack([DAYS, np.ones(len(DAYS))], 1)
    settings = VolumeSettings(0.3, 1e-9, 1e8)
    people, labels, logs = [], [], []
    for (name, n), mean in zip(SIZES.items(), means, strict=True):
        y = (mean + rng.standard_normal((n, 2)) * SPREAD) @ design.T + rng.standard_normal((n, len(DAYS))) * SD
        people += [replace(bm.Patient.from_volumes(f"{name}{i}", DAYS, np.exp(v)), volumes=settings)
                   for i, v in enumerate(y)]  # fmt: skip
        labels += [name] * n
        logs.append(y)
    return people, labels, design, logs


MEANS = np.array([[0.012, 2.3], [-0.006, 2.0], [0.002, 1.8], [0.004, 2.1]])


@pytest.fixture(scope="module")
def data():
    return cohort(MEANS)


def learn(people, labels, **more):
    settings = {"start": START, "belief": BELIEF, "iterations": 25} | more
    return learn_hierarchy(MODEL, people, labels, **settings)


@pytest.fixture(scope="module")
def found(data):
    people, labels, *_ = data
    return learn(people, labels)


def exact(data, within, sd, variance):
    """Mean and covariance of (mu_1 ... mu_4, mu) and the log evidence, for a known variance between groups."""
    _, _, design, logs = data
    groups, p = len(logs), 2
    inverse = np.linalg.inv(design @ within @ design.T + sd**2 * np.eye(len(DAYS)))
    root = BELIEF.mean * np.linalg.inv(within)
    # Integrated over the means: (mu_g) are Gaussian with covariance T between and the overall mean's in common.
    common = np.linalg.inv(root)
    prior = np.kron(np.ones((groups + 1, groups + 1)), common)
    for g in range(groups):
        prior[g * p : g * p + p, g * p : g * p + p] += np.diag(variance)
    mean = np.tile(START.mean, groups + 1)
    precision, right = np.linalg.inv(prior), np.linalg.inv(prior) @ mean
    for g, y in enumerate(logs):
        part = slice(g * p, g * p + p)
        precision[part, part] += len(y) * design.T @ inverse @ design
        right[part] += design.T @ inverse @ y.sum(0)
    covariance = np.linalg.inv(precision)
    # Evidence of the groups' mean data, which are sufficient for the means.
    centre = np.concatenate([y.mean(0) for y in logs])
    big = np.zeros((groups * len(DAYS), (groups + 1) * p))
    noise = np.zeros((groups * len(DAYS),) * 2)
    for g, y in enumerate(logs):
        rows = slice(g * len(DAYS), (g + 1) * len(DAYS))
        big[rows, g * p : g * p + p] = design
        noise[rows, rows] = np.linalg.inv(inverse) / len(y)
    evidence = multivariate_normal(big @ mean, big @ prior @ big.T + noise).logpdf(centre)
    return (covariance @ right).reshape(-1, p), covariance, evidence


def test_means_under_a_known_spread_are_the_exact_ones(data):
    people, labels, *_ = data
    found = learn(people, labels, between=0.4)
    variance = (0.4 * np.sqrt(np.diag(START.covariance))) ** 2
    mean, covariance, _ = exact(data, found.within, found.overall.noise.scale[0], variance)
    sd = np.sqrt(np.diag(covariance)).reshape(-1, 2)
    np.testing.assert_allclose((found.mean - mean[:-1]) / sd[:-1], 0.0, atol=0.05)
    np.testing.assert_allclose((found.overall.prior.mean - mean[-1]) / sd[-1], 0.0, atol=0.05)
    np.testing.assert_allclose(found.sd, sd[:-1], rtol=0.04)
    for g, name in enumerate(found.groups):
        block = covariance[2 * g : 2 * g + 2, 2 * g : 2 * g + 2]
        np.testing.assert_allclose(found.of(name).prior.covariance, found.within + block, rtol=0.04, atol=2e-5)


def test_the_spread_between_groups_is_inferred_as_by_quadrature(data, found):
    width = EXPECTED * np.sqrt(np.diag(START.covariance))
    # Quantiles of the half-Cauchy prior: equal weights on a grid of its probabilities.
    grid = np.tan(np.pi / 2 * (np.arange(60) + 0.5) / 60)
    pairs = np.stack(np.meshgrid(grid * width[0], grid * width[1], indexing="ij"), -1).reshape(-1, 2)
    results = [exact(data, found.within, found.overall.noise.scale[0], tau**2) for tau in pairs]
    log = np.array([r[2] for r in results])
    weight = np.exp(log - log.max())
    weight /= weight.sum()
    mean = np.einsum("s,sgp->gp", weight, [r[0] for r in results])
    second = np.einsum("s,sk->k", weight, [np.diag(r[1]) + r[0].ravel() ** 2 for r in results])
    sd = np.sqrt(second - mean.ravel() ** 2).reshape(-1, 2)
    np.testing.assert_allclose((found.mean - mean[:-1]) / sd[:-1], 0.0, atol=0.08)
    np.testing.assert_allclose(found.sd, sd[:-1], rtol=0.06)
    for k in range(2):
        order = np.argsort(pairs[:, k])
        cumulated = np.cumsum(weight[order])
        middle = pairs[order, k][np.searchsorted(cumulated, 0.5)]
        assert found.between[1, k] == pytest.approx(middle, rel=0.15)


def test_within_and_errors_are_found_again(found):
    np.testing.assert_allclose(np.sqrt(np.diag(found.within)), SPREAD, rtol=0.2)
    assert found.overall.noise.scale[0] == pytest.approx(SD, rel=0.12)
    assert np.diff(found.trace)[6:].min() > -0.5, "the evidence rises, up to sampling error"
    error = (found.mean - MEANS) / found.sd
    assert (np.abs(error) < 4).all()


def test_no_spread_pools_completely_and_a_wide_one_not_at_all(data):
    people, labels, *_ = data
    plain = learn_priors(MODEL, people, start=START, belief=BELIEF, iterations=25)
    one = learn(people, labels, between=0.0)
    np.testing.assert_allclose(one.mean, np.tile(one.mean[0], (4, 1)), atol=1e-5)
    error = np.sqrt(np.diag(plain.prior.covariance) / len(people))
    np.testing.assert_allclose((one.mean[0] - plain.prior.mean) / error, 0.0, atol=0.1)
    np.testing.assert_allclose(np.diag(one.within), np.diag(plain.prior.covariance), rtol=0.03)
    assert one.pooled == pytest.approx(1.0, abs=1e-3)
    apart = learn(people, labels, between=30.0)
    assert apart.pooled.max() < 0.01
    _, _, design, logs = data
    # Generalised least squares of each group by itself.
    inverse = np.linalg.inv(design @ apart.within @ design.T + apart.overall.noise.scale[0] ** 2 * np.eye(len(DAYS)))
    alone = [np.linalg.solve(design.T @ inverse @ design, design.T @ inverse @ y.mean(0)) for y in logs]
    np.testing.assert_allclose((apart.mean - alone) / apart.sd, 0.0, atol=0.1)


def test_groups_that_are_alike_share_and_groups_that_differ_do_not():
    people, labels, *_ = cohort(np.tile([0.0, 2.0], (4, 1)), seed=3)
    alike = learn(people, labels)
    people, labels, *_ = cohort(np.array([[0.06, 4.0], [-0.06, 0.0], [0.03, 1.0], [-0.03, 3.0]]), seed=3)
    different = learn(people, labels)
    assert (alike.pooled > 0.4).all() and (different.pooled < 0.15).all()
    assert (alike.between[1] < 0.25 * different.between[1]).all()
    # Shrunk from each group's own towards the overall one, and the small group by more than the large one.
    spread = alike.mean.std(0) / alike.own.std(0)
    assert (spread < 0.8).all()
    assert (alike.pooled[0] > alike.pooled[3]).all()


def test_a_new_group_has_the_widest_prior(found):
    unknown = found.of("never seen")
    assert unknown is found.overall
    for name in found.groups:
        assert (np.diag(unknown.prior.covariance) > np.diag(found.of(name).prior.covariance)).all()


def test_the_population_of_a_group_calibrates_a_patient(data, found):
    people, *_ = data
    fit = bm.calibrate(found.of("a"), people[0].until(2))
    np.testing.assert_array_equal(fit.prior.mean, found.of("a").prior.mean)
    assert fit.parameters["growth.k"].source == "learned from 137 patients in 4 groups: a"
    other = bm.calibrate(found.of("b"), people[0].until(2))
    assert fit.values["growth.k"] > other.values["growth.k"], "the fast group pulls up"


def test_table_and_figure_show_the_shrinkage(found):
    rows = found.table()
    assert len(rows) == 8 and {r["group"] for r in rows} == set(SIZES)
    row = next(r for r in rows if r["name"] == "initial.volume" and r["group"] == "a")
    assert row["patients"] == 12 and row["low"] < row["median"] < row["high"]
    assert row["median"] == pytest.approx(np.exp(found.mean[0, 1]))
    assert row["own"] == pytest.approx(np.exp(found.own[0, 1]))
    assert "partially pooled" in found._repr_html_()
    figure = shrinkage(found)
    assert [a.get_title().split(",")[0] for a in figure.axes] == list(found.names)
    hollow, filled = figure.axes[1].lines[-2:]
    np.testing.assert_allclose(filled.get_xdata(), np.exp(found.mean[:, 1]))
    np.testing.assert_allclose(hollow.get_xdata(), np.exp(found.own[:, 1]))


def test_the_same_seed_gives_the_same(data):
    people, labels, *_ = data
    first, again, other = (learn(people, labels, iterations=3, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.mean, again.mean)
    assert (first.mean != other.mean).any()


def test_a_full_covariance_of_patients_is_learned_where_asked(data):
    people, labels, *_ = data
    found = learn(people, labels, correlated=True, iterations=4)
    assert found.within[0, 1] != 0 and found.within[0, 1] == found.within[1, 0]


def test_misuse_is_refused(data):
    people, labels, *_ = data
    with pytest.raises(CalibrationError, match="137 patients, but 2 groups"):
        learn_hierarchy(MODEL, people, ["a", "b"])
    with pytest.raises(CalibrationError, match="all patients are of the group 'x'"):
        learn_hierarchy(MODEL, people, ["x"] * len(people))
    with pytest.raises(CalibrationError, match="between is -1"):
        learn_hierarchy(MODEL, people, labels, between=-1)
    with pytest.raises(CalibrationError, match="learn_hierarchy: 2 patients for 2 parameters"):
        learn_hierarchy(MODEL, people[:2], ["a", "b"])
    with pytest.raises(CalibrationError, match="iterations is 0"):
        learn_hierarchy(MODEL, people, labels, iterations=0)
