"""The parts of Markov chains: reflection, the operation, checkpoints, what is said of chains, bad input."""

import json
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pytest
from scipy.stats import kstest, truncnorm

import biomodel as bm
from biomodel.calibration.checkpoint import ChainFile, as_plain, as_state
from biomodel.calibration.density import VolumeDensity, Whitened, folded, shared
from biomodel.calibration.gaussnewton import GaussianPrior, prior_of
from biomodel.calibration.identifiability import unidentified
from biomodel.calibration.mcmc import NUTS, SMC, ByNutpie, ByPymc, advice, sample_nuts
from biomodel.calibration.samples import Chains, Samples
from biomodel.calibration.volumes import VolumeProblem
from biomodel.errors import CalibrationError, TumorcastError
from biomodel.parameters import Parameter

pytest.importorskip("pymc")

PLAN = bm.Schedule.weekly("paclitaxel", 1.0, 12, 80, "mg/m^2", status="planned")


class Gaussian:
    """A normal density with given standard deviations."""

    def __init__(self, sd):
        self.sd, self.size = np.asarray(sd, float), len(sd)
        self.prior = GaussianPrior(np.zeros(self.size), np.diag(self.sd**2))
        self.limits = (np.full(self.size, -np.inf), np.full(self.size, np.inf))

    def __call__(self, x):
        return -0.5 * float((x / self.sd) @ (x / self.sd)), -x / self.sd**2

    def value(self, x):
        return self(x)[0]

    def log_likelihood(self, x):
        return 0.0

    def fingerprint(self):
        return str(self.sd)


class Two(Gaussian):
    """Two narrow normals far apart: no chain finds both."""

    def __call__(self, x):
        near = np.sign(x[0]) * 30.0
        shift = x - np.eye(self.size)[0] * near
        return -0.5 * float(shift @ shift), -shift


def test_coordinates_are_reflected_at_their_bounds():
    low, high = np.array([0.0, -np.inf, 0.0]), np.array([2.0, 1.0, np.inf])
    z, sign = folded(np.array([[2.5, 1.5, -1.0], [-0.5, -7.0, 3.0], [4.25, 0.0, 0.0], [1.0, 0.5, 2.0]]), low, high)
    np.testing.assert_allclose(z, [[1.5, 0.5, 1.0], [0.5, -7.0, 3.0], [0.25, 0.0, 0.0], [1.0, 0.5, 2.0]])
    np.testing.assert_array_equal(sign, [[-1, -1, -1], [-1, 1, 1], [1, 1, 1], [1, 1, 1]])
    inside, plain = folded(np.array([1.0, 0.0, 5.0]), low, high)
    np.testing.assert_array_equal(inside, [1.0, 0.0, 5.0])
    np.testing.assert_array_equal(plain, 1.0)


def test_shares_of_reflected_points_sum_to_one_and_have_their_slope():
    low, high, infinite = np.array([-0.5, 1.0]), np.array([0.8, 5.0]), np.array([np.inf, np.inf])
    rng = np.random.default_rng(0)
    for place in rng.uniform(low, high, (20, 2)):
        images = [n * (high - low) + np.where(n % 2 == 0, place, low + high - place) for n in range(-6, 7)]
        total = sum(np.exp(shared(z, low, high)[0]) for z in images)
        np.testing.assert_allclose(total, 1.0, rtol=1e-12)
    white = Whitened(Gaussian([1.0, 2.0, 0.7]), np.array([0.3, 2.0, 0.1]), np.diag([0.5, 2.0, 1.0]),
                     (np.append(low, -infinite[0]), np.append(high, infinite[0])))  # fmt: skip
    for x in rng.normal(scale=2.0, size=(20, 3)):
        value, slope = white(x)
        assert value == pytest.approx(white.value(x), rel=1e-12)
        steps = [(white.value(x + h) - white.value(x - h)) / 2e-6 for h in 1e-6 * np.eye(3)]
        np.testing.assert_allclose(slope, steps, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", [ByPymc(), ByNutpie()])
def test_a_bound_cuts_the_density_off(engine):
    low, high = np.array([-0.5, -np.inf]), np.array([0.8, np.inf])
    white = Whitened(Gaussian([1.0, 2.0]), np.array([0.3, 0.0]), np.diag([0.5, 2.0]), (low, high))
    found = sample_nuts(white, chains=4, draws=1500, seed=1, engine=engine)
    z = white.coordinates(found.x)
    thin = z[:, ::10].reshape(-1, 2)
    assert kstest(thin[:, 0], truncnorm(-0.5, 0.8).cdf).pvalue > 0.01
    assert kstest(thin[:, 1], "norm", (0, 2.0)).pvalue > 0.01


def test_the_operation_differentiates_in_a_model_of_its_own():
    from biomodel.calibration.nuts import log_density_op

    pm = pytest.importorskip("pymc")
    op = log_density_op(Gaussian([0.5, 2.0, 1.0]))
    with pm.Model() as model:
        x = pm.Flat("x", shape=3)
        pm.Potential("posterior", 3.0 * op(x)[0])
    value, slope = model.compile_logp(), model.compile_dlogp()
    at = np.array([0.3, -1.0, 0.7])
    step = [(value({"x": at + h}) - value({"x": at - h})) / 2e-6 for h in 1e-6 * np.eye(3)]
    np.testing.assert_allclose(slope({"x": at}), step, rtol=1e-7)
    np.testing.assert_allclose(step, -3 * at / np.array([0.25, 4.0, 1.0]), rtol=1e-7)


def volume_density(patient, model):
    problem = VolumeProblem(model, patient, bm.TorchSolver())
    return VolumeDensity(problem, prior_of(problem.parameters))


def test_gradient_without_images_against_differences():
    patient = bm.Patient.from_volumes("G", [0.0, 21.0, 60.0], [8.0, 3.5, 0.4], PLAN, cv=0.3)
    model = bm.ReactionDiffusion(bm.Logistic(), bm.NoDiffusion(), [bm.Chemotherapy("paclitaxel")])
    density = volume_density(patient, model)
    rng = np.random.default_rng(0)
    for _ in range(3):
        z = density.prior.mean + density.prior.sd * rng.standard_normal(density.size)
        value, gradient = density(z)
        assert value == pytest.approx(density.value(z), rel=1e-12)
        steps = [(density.value(z + h) - density.value(z - h)) / 2e-5 for h in 1e-5 * np.eye(density.size)]
        np.testing.assert_allclose(gradient, steps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("engine", [ByPymc(), ByNutpie()])
def test_the_same_seed_gives_the_same_draws_whatever_ran_before(engine):
    first = sample_nuts(Gaussian([1.0, 1.3]), 2, 50, 50, seed=4, engine=engine)
    sample_nuts(Gaussian([0.8, 1.0]), 1, 20, 50, seed=9, engine=engine)
    again = sample_nuts(Gaussian([1.0, 1.3]), 2, 50, 50, seed=4, engine=engine)
    np.testing.assert_array_equal(first.x, again.x)
    assert first.gradients == again.gradients
    assert not np.array_equal(first.x, sample_nuts(Gaussian([1.0, 1.3]), 2, 50, 50, seed=5, engine=engine).x)


class Stopping(Gaussian):
    """Ends the run after some evaluations, as an interruption would."""

    def __init__(self, sd, after):
        super().__init__(sd)
        self.after = after

    def __call__(self, x):
        self.after -= 1
        if self.after < 0:
            raise KeyboardInterrupt
        return super().__call__(x)


@pytest.mark.parametrize("engine", [ByPymc(), ByNutpie()])
@pytest.mark.parametrize("after", [60, 700, 1500])
def test_interrupted_sampling_goes_on_to_the_same_result(engine, after, tmp_path, monkeypatch):
    monkeypatch.setattr("biomodel.calibration.checkpoint.EVERY", 0.0)
    sd = [1.0, 1.5, 0.7]
    whole = sample_nuts(Gaussian(sd), 2, 100, 100, seed=2, engine=engine)
    with pytest.raises(KeyboardInterrupt):
        sample_nuts(Stopping(sd, after), 2, 100, 100, seed=2, engine=engine, folder=tmp_path)
    spent = Stopping(sd, 10**9)
    resumed = sample_nuts(spent, 2, 100, 100, seed=2, engine=engine, folder=tmp_path)
    np.testing.assert_array_equal(resumed.x, whole.x)
    for name in whole.stats:
        np.testing.assert_array_equal(resumed.stats[name], whole.stats[name])
    if isinstance(engine, ByPymc):
        assert 10**9 - spent.after < whole.gradients  # something was left to go on from
    # Finished chains cost their starting points, and more draws continue them.
    idle = Stopping(sd, 10**9)
    np.testing.assert_array_equal(sample_nuts(idle, 2, 100, 100, seed=2, engine=engine, folder=tmp_path).x, whole.x)
    assert 10**9 - idle.after == 2
    longer = sample_nuts(Gaussian(sd), 3, 130, 100, seed=2, engine=engine, folder=tmp_path)
    np.testing.assert_array_equal(longer.x[:2, :100], whole.x)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    sample_nuts(Gaussian([1.0, 1.5]), 1, 10, 10, seed=2, folder=tmp_path)
    for density, settings in (
        (Gaussian([1.0, 1.6]), {"seed": 2}),
        (Gaussian([1.0, 1.5]), {"seed": 3}),
        (Gaussian([1.0, 1.5]), {"seed": 2, "target_accept": 0.9}),
        (Gaussian([1.0, 1.5]), {"seed": 2, "engine": ByNutpie()}),
    ):
        with pytest.raises(CalibrationError, match="holds draws of other data"):
            sample_nuts(density, 1, 10, 10, folder=tmp_path, **settings)
    (tmp_path / "chain-0.npz").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(CalibrationError, match="cannot be read"):
        sample_nuts(Gaussian([1.0, 1.5]), 1, 10, 10, seed=2, folder=tmp_path)


def test_a_state_survives_json_to_the_last_bit(tmp_path):
    class Named(NamedTuple):
        state: dict
        words: tuple | None

    @dataclass
    class Inner:
        mean: np.ndarray
        count: int

    @dataclass
    class Outer:
        inner: Inner
        step: float
        rng: dict
        key: tuple
        named: Named

    rng = np.random.default_rng(3)
    inner, named = Inner(rng.normal(size=(2, 3)), 5), Named({"a": 7}, None)
    state = Outer(inner, np.float64(0.1) * 3, rng.bit_generator.state, (1, 2), named)
    back = as_state(state, json.loads(json.dumps(as_plain(state))))
    np.testing.assert_array_equal(back.inner.mean, state.inner.mean)
    assert (back.inner.count, back.step, back.rng, back.key) == (5, state.step, state.rng, (1, 2))
    assert isinstance(back.named, Named) and back.named == state.named
    file = ChainFile(tmp_path / "new", 3, "what it is")
    assert file.read() is None
    file.write({"x": np.arange(3.0)}, {"done": 3})
    arrays, kept = ChainFile(tmp_path / "new", 3, "what it is").read()
    np.testing.assert_array_equal(arrays["x"], np.arange(3.0))
    assert kept == {"done": 3} and [p.name for p in (tmp_path / "new").iterdir()] == ["chain-3.npz"]


def chains(z, **stats):
    return Chains(np.asarray(z), stats, 100, 1.0, "pymc 5")


def test_what_is_said_of_chains():
    rng = np.random.default_rng(0)
    good = rng.normal(size=(4, 1000, 2))
    assert advice(("a", "b"), chains(good, diverging=np.zeros((4, 1000), bool))) == []
    few = advice(("a", "b"), chains(good[:, :40]))
    assert any("independent draws (bulk" in n for n in few) and any("(tail" in n for n in few)
    slow = good.copy()
    slow[0, :, 1] += 0.5
    (note, *_) = advice(("a", "b"), chains(slow))
    assert "R-hat of b is 1.0" in note and "raise tune and draws" in note
    split = np.zeros((4, 1000), bool)
    split[1, :8] = True
    (note,) = advice(("a", "b"), chains(good, diverging=split))
    assert "8 of the draws (0.2 %) diverged" in note and "target_accept" in note
    assert "single chain" in advice(("a", "b"), chains(good[:1]))[0]
    samples = Samples.of(chains(good))
    assert samples.ess == pytest.approx(4000, rel=0.2) and samples.z.shape == (4000, 2)
    np.testing.assert_allclose(samples.covariance, np.cov(good.reshape(-1, 2).T), rtol=1e-3)


def test_chains_that_do_not_mix_are_no_result(tmp_path):
    two = Two([1.0, 1.0])
    with pytest.raises(CalibrationError, match=r"not mixed \(R-hat .*Raise tune and draws"):
        NUTS(chains=4, draws=100, tune=100, seed=1).sample(two, np.zeros(2), 900 * np.eye(2))
    kept = NUTS(chains=4, draws=100, tune=100, seed=1, checkpoint=tmp_path)
    with pytest.raises(CalibrationError, match="the checkpoint keeps the draws"):
        kept.sample(two, np.zeros(2), 900 * np.eye(2))


def test_a_density_that_is_not_finite_at_the_start_is_no_result():
    class Nowhere(Gaussian):
        def __call__(self, x):
            return -np.inf, np.zeros(self.size)

    with pytest.raises(CalibrationError, match="not finite at the optimum"):
        NUTS().sample(Nowhere([1.0]), np.zeros(1), np.eye(1))
    with pytest.raises(CalibrationError, match="not finite at the starting point"):
        sample_nuts(Nowhere([1.0]))

    class Disc(Gaussian):
        """Nothing beyond a radius: starting points outside are drawn in."""

        def __call__(self, x):
            return super().__call__(x) if x @ x < 0.01 else (-np.inf, np.zeros(self.size))

    assert np.isfinite(sample_nuts(Disc([1.0, 1.0]), 1, 20, 20).x).all()


@pytest.mark.parametrize("engine", [ByPymc(), ByNutpie()])
def test_an_error_of_the_density_is_not_hidden(engine):
    class Broken(Gaussian):
        calls = 0

        def __call__(self, x):
            self.calls += 1
            if self.calls > 20:
                raise ZeroDivisionError("what went wrong")
            return super().__call__(x)

    with pytest.raises(ZeroDivisionError, match="what went wrong"):
        sample_nuts(Broken([1.0, 2.0]), 1, 50, 50, engine=engine)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: NUTS(chains=0), "chains is 0"),
        (lambda: NUTS(draws=2.5), "draws is 2.5"),
        (lambda: NUTS(tune=-1), "tune is -1"),
        (lambda: NUTS(seed=True), "seed is True"),
        (lambda: NUTS(target_accept=1.0), "target_accept is 1.0"),
        (lambda: SMC(draws=1), "draws is 1"),
        (lambda: SMC(threshold=0.0), "threshold 0.0"),
    ],
)
def test_settings_that_have_no_meaning_are_refused(make, what):
    with pytest.raises(CalibrationError, match=what):
        make()


def log_normal(units="1/day", sigma=0.5):
    return Parameter("k", units, bm.LogNormal(0.05, sigma), (1e-6, 10.0))


def test_what_the_data_leave_open_is_named():
    parameters = {"growth.k": log_normal(), "paclitaxel.efficacy": log_normal(), "diffusion.D": log_normal("mm^2/day"),
                  "adc_shift.visit1": Parameter("s", "1", bm.Normal(0.0, 1.0), (-6.0, 6.0))}  # fmt: skip
    prior = prior_of(parameters)
    difference = np.array([1.0, -1.0, 0.0, 0.0])
    note, pair = unidentified(parameters, 1e4 * np.outer(difference, difference), prior)
    assert "next to nothing about diffusion.D: its posterior is the prior's (100 % of its spread is left)" in note
    assert "cannot be told apart" in pair and "know only their difference" in pair
    assert "growth.k +42 %" in pair and "paclitaxel.efficacy +42 %" in pair  # exp(0.5 / sqrt 2)
    assert "the prior decides (100 % of its spread is left)" in pair
    total = np.abs(difference)
    assert "what they do together" in unidentified(parameters, 1e4 * np.outer(total, total), prior)[-1]
    assert unidentified(parameters, 1e4 * np.diag([1.0, 1.0, 1.0, 0.0]), prior) == []
    (all_of_them,) = unidentified(parameters, np.zeros((4, 4)), prior)
    assert "growth.k, paclitaxel.efficacy and diffusion.D: their posterior is the prior's" in all_of_them
    # A shift that the data confuse with growth takes away what they know of growth.
    both = np.array([1.0, 0.0, 0.0, 0.05])
    known = 1e4 * (np.outer(both, both) + np.diag([0.0, 1.0, 1.0, 0.0]))
    assert unidentified(parameters, known, prior) == []
    shifted = np.array([1.0, 0.0, 0.0, 5.0])
    (note,) = unidentified(parameters, 1e4 * (np.outer(shifted, shifted) + np.diag([0.0, 1.0, 1.0, 0.0])), prior)
    assert "growth.k" in note


def test_every_calibration_says_what_its_data_leave_open():
    model = bm.ReactionDiffusion(bm.Exponential(), bm.NoDiffusion(), [bm.Chemotherapy("paclitaxel")])
    patient = bm.Patient.from_volumes("I", [0.0, 21.0, 84.0], [8.0, 6.0, 1.0], PLAN, cv=0.1)
    for method in (bm.MAP(), bm.Laplace(), bm.Importance()):
        notes = bm.calibrate(model, patient, method=method).notes
        assert any("growth.k and paclitaxel.efficacy cannot be told apart" in n or
                   "paclitaxel.efficacy and growth.k cannot be told apart" in n for n in notes)  # fmt: skip
        assert not any("disagree" in n for n in notes)


def test_volumes_that_contradict_each_other_are_named():
    model = bm.ReactionDiffusion(bm.Logistic(), bm.NoDiffusion())
    patient = bm.Patient.from_volumes("C", [0.0, 10.0, 20.0, 30.0], [3.0, 3.3, 200.0, 3.4])
    (note,) = [n for n in bm.calibrate(model, patient).notes if "disagree" in n]
    assert "visit 3 (day 20): 200 cm³ were measured" in note and "another unit" in note
    with pytest.raises(TumorcastError, match="cv 0; expected a fraction above 0"):
        replace(patient.volumes, cv=0.0)


def test_a_fit_without_chains_has_no_inference_data():
    model = bm.ReactionDiffusion(bm.Logistic(), bm.NoDiffusion())
    patient = bm.Patient.from_volumes("N", [0.0, 10.0], [3.0, 3.3])
    with pytest.raises(CalibrationError, match="holds no chains"):
        _ = bm.calibrate(model, patient).inference
