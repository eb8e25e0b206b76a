"""Calibration from images: gradients, weights, analytic posteriors, convergence and recovery on one small patient."""

import dataclasses

import numpy as np
import pytest
import torch

import biomodel as bm
from biomodel.calibration.calibrate import MAP, Laplace
from biomodel.calibration.gaussnewton import GaussianPrior, minimise, prior_of
from biomodel.calibration.images import ImageProblem
from biomodel.domain import Domain
from biomodel.errors import CalibrationError, SolverError
from biomodel.parameters import JointPrior
from biomodel.patient import CellularitySettings, Patient, Visit
from biomodel.schedule import Schedule

SETTINGS = CellularitySettings(3.0e-3, 0.6e-3, repeatability_cv=0.05, voxel_cv=0.05, visible_fraction=0.1)
TRUE = {"growth.k": 0.04, "diffusion.D": 0.15, "paclitaxel.efficacy": 0.06}


def make_patient(seed=0, days=(0.0, 12.0, 20.0), noise=0.03, shape=(1, 20, 22), settings=SETTINGS):
    """A patient drawn from the model itself (an inverse crime, meant: it isolates the inference)."""
    rng = np.random.default_rng(seed)
    domain = Domain.box(shape, (2.0, 2.0, 2.0))
    _, y, x = np.meshgrid(*(domain.coords[a] - domain.coords[a].mean() for a in "zyx"), indexing="ij")
    u0 = 0.7 / (1 + np.exp((np.hypot(y, 0.8 * x) - 9) / 1.0))
    schedule = Schedule.weekly("paclitaxel", 1.5, 3, 80, "mg/m^2")
    simulation = bm.TorchSolver(rtol=1e-5).build(model(), domain, schedule)
    states = [u0, *simulation(TRUE, u0, days[1:])[0].numpy()]
    visits = []
    for number, (day, u) in enumerate(zip(days, states, strict=True), 1):
        adc = (3.0e-3 - 2.4e-3 * u) * (1 + noise * rng.standard_normal(u.shape))
        visits.append(Visit(number=number, day=day, adc=adc, region=u >= 0.1))
    return Patient("virtual", "breast", domain, tuple(visits), schedule, cellularity=settings)


def model():
    return bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy("paclitaxel")])


@pytest.fixture(scope="module")
def problem():
    p = ImageProblem(model(), make_patient(), bm.TorchSolver())
    p.replan(prior_of(p.parameters).mean)
    return p


def test_jacobian_is_that_of_the_residual(problem):
    z = prior_of(problem.parameters).mean + 0.1
    linear = problem.linearise(z, False)
    for i, name in enumerate(problem.names):
        e = np.zeros(len(z))
        e[i] = 1e-4
        difference = -(problem.residual(z + e) - problem.residual(z - e)) / 2e-4
        # A row that becomes active within the difference has no derivative there.
        same = (problem.residual(z + e) != 0) == (problem.residual(z - e) != 0)
        full = np.zeros(len(difference))
        full[linear.weights.active] = linear.jacobian[i]
        scale = max(np.abs(difference).max(), 1e-12)
        assert np.abs(full - difference)[same].max() < 1e-4 * scale, name


def test_weights_are_the_inverse_of_the_dense_covariance(problem):
    z = prior_of(problem.parameters).mean
    linear = problem.linearise(z, True)
    weights = linear.weights
    dense = weights.covariance(np.eye(len(weights.active)))
    np.testing.assert_allclose(dense, dense.T, atol=1e-12)
    b = np.random.default_rng(0).standard_normal((2, len(weights.active)))
    exact = np.linalg.solve(dense, b.T).T
    found = weights.solve(b, rtol=1e-8)
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6 * np.abs(exact).max())
    measured = problem.sign[weights.active] == 0
    determinant = np.linalg.slogdet(dense[np.ix_(measured, measured)])[1]
    assert abs(weights.log_determinant(probes=30, steps=25) - determinant) < 0.02 * abs(determinant)


def test_recovery_within_the_stated_uncertainty_and_exact_covariance(problem):
    patient = make_patient(3)
    fit = bm.calibrate(model(), patient)
    assert fit.converged and not fit.notes
    for name, value in TRUE.items():
        i = fit.names.index(name)
        assert abs(fit.z[i] - np.log(value)) < 3.3 * fit.sd[i], name
    assert set(fit.identified) >= {"diffusion.D"}
    assert fit.shrinkage["growth.k"] < 1
    # Another start ends at the same place.
    elsewhere = MAP(starts=1, start_at={"growth.k": 0.1, "diffusion.D": 0.05})
    again = bm.calibrate(model(), patient, method=Laplace(elsewhere))
    assert np.max(np.abs(again.z - fit.z) / fit.sd) < 0.3
    assert set(fit.draw(5, 0)) == set(fit.names)
    assert (fit.draw(5, 0)["growth.k"] == fit.draw(5, 0)["growth.k"]).all()
    assert (fit.draw(5, 0)["growth.k"] != fit.draw(5, 1)["growth.k"]).all()
    assert "growth.k" in fit._repr_html_()


def test_no_data_gives_the_prior_back():
    # Doses begin after the last visit, so the efficacy's posterior is its prior.
    patient = make_patient().replace_schedule(Schedule.weekly("paclitaxel", 50.0, 2, 80, "mg/m^2"))
    fit = bm.calibrate(model(), patient, method=Laplace(MAP(starts=1)))
    assert abs(fit.shrinkage["paclitaxel.efficacy"] - 1) < 1e-9
    assert fit.table()[list(fit.names).index("paclitaxel.efficacy")]["informed_by"] == "prior"
    assert "paclitaxel.efficacy" not in fit.identified


def test_evidence_prefers_the_model_that_made_the_data():
    patient = make_patient(1)
    wrong = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(D=bm.Fixed(1.5)), [bm.Chemotherapy("paclitaxel")])
    found = bm.compare([wrong, model()], patient, method=Laplace(MAP(starts=1)))
    assert found.best.model.label == model().label and found.evidence_weights[1] > 0.99
    table = found.table()
    assert table[1]["bic"] < table[0]["bic"] and abs(sum(r["aic_weight"] for r in table) - 1) < 1e-12
    assert "log evidence" in found._repr_html_()


def test_a_joint_prior_of_a_cohort_is_used():
    joint = JointPrior(("growth.k", "diffusion.D"), np.log([0.03, 0.2]), np.array([[0.04, 0.01], [0.01, 0.09]]))
    p = ImageProblem(model().with_joint_prior(joint), make_patient(), bm.TorchSolver())
    prior = prior_of(p.parameters, joint)
    i = [p.names.index(n) for n in joint.names]
    np.testing.assert_allclose(prior.mean[i], joint.mean)
    np.testing.assert_allclose(prior.covariance[np.ix_(i, i)], joint.covariance)


def test_a_region_drawn_askew_widens_the_posterior_and_is_said():
    patient = make_patient(3, shape=(4, 24, 24))
    moved = np.roll(np.asarray(patient.visits[1].region), 3, axis=2)
    askew = dataclasses.replace(patient, visits=(patient.visits[0],
                                                 dataclasses.replace(patient.visits[1], region=moved)))  # fmt: skip
    good, bad = (bm.calibrate(model(), p) for p in (patient, askew))
    assert good.inflation < 1.6 and bad.inflation > 3
    assert any("disagree" in n for n in bad.notes) and not any("disagree" in n for n in good.notes)
    assert bad.shrinkage["growth.k"] > good.shrinkage["growth.k"]


class Bent:
    """Residual whose second derivative matters: Gauss-Newton overshoots by nearly two at (z - 1)² + large residual."""

    def __init__(self, z):
        self.z, self.evaluations = z, 0
        x = z[0]
        # objective 0.95 x² from residuals (x, and a large one bent by x): Gauss-Newton sees half of the curvature.
        self.objective, self.gradient = 0.95 * x * x, np.array([1.9 * x])
        self.hessian = np.array([[1.0]])

    def trial(self, z):
        return Bent(z).objective


def test_the_search_does_not_crawl_where_gauss_newton_overshoots():
    prior = GaussianPrior(np.zeros(1), np.array([[1e12]]))
    wide = (np.array([-1e6]), np.array([1e6]))
    best = minimise(Bent, np.array([100.0]), prior, wide, 40, 1e-3, lambda z, step: z + step)
    # Each whole step leaves nine tenths of the distance: it would take over a hundred.
    assert best.converged and best.iterations <= 5 and abs(best.z[0]) < 1e-3


@dataclasses.dataclass
class Quadratic:
    """A linear-Gaussian problem with a known posterior."""

    z: np.ndarray
    a: np.ndarray
    y: np.ndarray

    def __post_init__(self):
        r = self.y - self.a @ self.z
        self.objective, self.gradient, self.hessian = 0.5 * r @ r, -self.a.T @ r, self.a.T @ self.a

    def trial(self, z):
        if z[0] > 50:
            raise SolverError("too extreme")
        return 0.5 * float(np.sum((self.y - self.a @ z) ** 2))


def test_linear_gaussian_posterior_is_analytic():
    rng = np.random.default_rng(0)
    a, y = rng.standard_normal((30, 4)), rng.standard_normal(30)
    prior = GaussianPrior(rng.standard_normal(4), np.diag([1.0, 0.5, 2.0, 0.1]))
    limits = (np.full(4, -100.0), np.full(4, 100.0))
    best = minimise(lambda z: Quadratic(z, a, y), prior.mean, prior, limits, 50, 1e-9, lambda z, s: z + s)
    precision = a.T @ a + prior.precision
    exact = np.linalg.solve(precision, a.T @ y + prior.precision @ prior.mean)
    np.testing.assert_allclose(best.z, exact, atol=1e-9)
    np.testing.assert_allclose(best.linear.hessian + prior.precision, precision)


@pytest.mark.parametrize("y,expected", [([1.0, 3.0], [1.0, 2.0]), ([-20.0, 0.5], [-9.0, 0.5])])
def test_bounds_hold_and_the_rest_is_free(y, expected):
    prior = GaussianPrior(np.zeros(2), np.eye(2) * 1e6)
    limits = (np.full(2, -9.0), np.array([100.0, 2.0]))
    best = minimise(lambda z: Quadratic(z, np.eye(2), np.array(y)), np.zeros(2), prior, limits, 60, 1e-6,
                    lambda z, s: z + s)  # fmt: skip
    np.testing.assert_allclose(best.z, expected, atol=1e-4)


def test_extreme_trials_are_refused():
    prior = GaussianPrior(np.zeros(2), np.eye(2) * 1e6)
    limits = (np.full(2, -100.0), np.full(2, 100.0))
    best = minimise(lambda z: Quadratic(z, np.eye(2), np.array([80.0, 3.0])), np.zeros(2), prior, limits, 60, 1e-6,
                    lambda z, s: z + s)  # fmt: skip
    assert 40 < best.z[0] <= 50


@pytest.mark.parametrize("spoil,words", [
    (lambda p: p.until(1), "at least two visits"),
    (lambda p: dataclasses.replace(p, visits=tuple(dataclasses.replace(v, adc=None, region=None, volume=0.0)
                                                   for v in p.visits)), "no tumour region at the first visit"),
])  # fmt: skip
def test_nothing_to_calibrate_is_told(spoil, words):
    with pytest.raises(CalibrationError, match=words):
        bm.calibrate(model(), spoil(make_patient()))


def test_unknown_start_is_told():
    with pytest.raises(CalibrationError, match="is not calibrated"):
        bm.calibrate(model(), make_patient(), method=MAP(start_at={"growth.q": 1.0}))


def test_regions_alone_can_be_calibrated():
    patient = make_patient()
    bare = dataclasses.replace(patient, visits=tuple(dataclasses.replace(v, adc=None) for v in patient.visits))
    fit = bm.calibrate(model(), bare, method=Laplace(MAP(starts=1)))
    assert "initial.level" in fit.names and np.isfinite(fit.z).all()


def test_a_vanished_tumour_is_information():
    patient = make_patient()
    gone = dataclasses.replace(patient.visits[-1], adc=None, region=None, volume=0.0)
    patient = dataclasses.replace(patient, visits=(*patient.visits[:-1], gone))
    fit = bm.calibrate(model(), patient, method=Laplace(MAP(starts=1)))
    before = bm.calibrate(model(), patient.until(2), method=Laplace(MAP(starts=1)))
    assert fit.values["paclitaxel.efficacy"] > before.values["paclitaxel.efficacy"]


def test_torch_threads_do_not_change_the_result():
    patient, found = make_patient(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(bm.calibrate(model(), patient, method=Laplace(MAP(starts=1))).z)
    torch.set_num_threads(1)
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("last", [{"adc": None}, {"adc": None, "region": None, "volume": 0.0}])
def test_no_map_after_the_first_visit(last):
    """ADC at the first visit alone, then a region or a complete response."""
    patient = make_patient()
    patient = dataclasses.replace(patient, visits=(patient.visits[0], dataclasses.replace(patient.visits[1], **last)))
    fit = bm.calibrate(model(), patient, method=Laplace(MAP(starts=1)))
    assert np.isfinite(fit.log_evidence) and np.isfinite(fit.z).all()


def test_the_forecast_starts_where_the_calibration_did():
    """A first visit with a volume alone has no map to start from: the state begins at the next one."""
    patient = make_patient()
    early = Visit(number=1, day=-15.0, volume=1.0)
    later = tuple(dataclasses.replace(v, number=v.number + 1) for v in patient.visits)
    both = [patient, dataclasses.replace(patient, visits=(early, *later))]
    found = [bm.forecast(bm.calibrate(model(), p), times=[20.0, 30.0], draws=5, seed=0)["cells"].values for p in both]
    np.testing.assert_allclose(found[0], found[1])
