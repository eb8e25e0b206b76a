"""The integrator of virtual truth against exact solutions: order in time and space, mass, doses, populations."""

import numpy as np
import pytest
from scipy.integrate import quad

from biomodel.anatomy import Breast, draw_breast
from biomodel.errors import SolverError
from biomodel.truth import Hazard, average, face_rates, integrate, refine

DOSES = Hazard(np.array([2.0, 8.0]), np.array([0.9, 0.7]), np.array([0.35, 0.5]))


def last(state, mask, diffusivity, spacing, growth, hazard, day, **options):
    return list(integrate(state, mask, diffusivity, spacing, growth, hazard, [day], **options))[-1]


def flat(value, shape=(2, 2, 2)):
    return (
        np.full((1, *shape), value),
        np.ones(shape, bool),
        np.full(shape, 0.01),
    )  # so little that accuracy sets the steps


def flat_solution(u0, k, hazard, day):
    """Logistic growth under a time-dependent kill is a Bernoulli equation: 1/u solves a linear one."""

    def exponent(t):
        given = hazard.days <= t
        decays = hazard.decays[given]
        killed = hazard.weights[given] / decays * (1 - np.exp(-decays * (t - hazard.days[given])))
        return k * t - killed.sum()

    stops = [0.0, *hazard.days[hazard.days < day], day]
    parts = [
        quad(lambda t: np.exp(exponent(t)), a, b, epsabs=1e-14, epsrel=1e-13)[0]
        for a, b in zip(stops, stops[1:], strict=False)
    ]
    return np.exp(exponent(day)) / (1.0 / u0 + k * sum(parts))


def test_flat_state_under_doses_is_of_fourth_order_in_time():
    exact = flat_solution(0.3, 0.2, DOSES, 14.0)
    steps = (0.25, 0.125, 0.0625, 0.03125)
    errors = [abs(last(*flat(0.3), (1, 1, 1), 0.2, DOSES, 14.0, max_step=h)[0, 0, 0, 0] - exact) for h in steps]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    print("time errors", errors, "orders", orders)
    assert np.all(np.abs(orders[1:] - 4) < 0.1), (errors, orders)


def test_the_state_at_a_dose_is_the_one_before_it():
    early = last(*flat(0.5), (1, 1, 1), 0.05, DOSES, 2.0)
    untreated = last(*flat(0.5), (1, 1, 1), 0.05, Hazard.none(), 2.0)
    np.testing.assert_array_equal(early, untreated)


def test_more_output_times_do_not_change_the_solution():
    many = list(integrate(*flat(0.5), (1, 1, 1), 0.05, DOSES, np.arange(0, 12.5, 0.25)))
    few = last(*flat(0.5), (1, 1, 1), 0.05, DOSES, 12.25, max_step=0.25)
    np.testing.assert_allclose(many[-1], few, rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_diffusion_of_a_cosine_is_of_second_order_in_space(axis):
    length, diffusion, day = 20.0, 0.3, 30.0
    wave = np.pi / length
    errors = []
    for cells in (10, 20, 40):
        shape = [3, 3, 3]
        shape[axis] = cells
        spacing = [1.3, 0.9, 1.1]
        spacing[axis] = length / cells
        edges = np.linspace(0, length, cells + 1)
        mode = np.diff(np.sin(wave * edges)) / (wave * spacing[axis])  # averages of the cosine over the cells
        mode = mode.reshape([-1 if n == axis else 1 for n in range(3)])
        state = np.broadcast_to(0.5 + 0.3 * mode, shape)[None]
        mask, field = np.ones(shape, bool), np.full(shape, diffusion)
        found = last(state, mask, field, spacing, 0.0, Hazard.none(), day, max_step=0.1)
        exact = 0.5 + 0.3 * np.exp(-diffusion * wave**2 * day) * mode
        errors.append(float(np.abs(found[0] - exact).max()))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    print("space errors", errors, "orders", orders)
    assert np.all(orders > 1.95), (errors, orders)


def rough_problem():
    rng = np.random.default_rng(3)
    mask, fibroglandular, _ = draw_breast(rng, (12, 14, 12), (2.0, 1.5, 1.0), Breast())
    state = np.where(mask, rng.random(mask.shape), 0.0)[None]
    return state, mask, 0.02 + 0.5 * fibroglandular, (2.0, 1.5, 1.0)


def test_mass_is_conserved_without_reaction():
    state, mask, diffusivity, spacing = rough_problem()
    found = last(state, mask, diffusivity, spacing, 0.0, Hazard.none(), 200.0, cutoff=-1.0)
    assert abs(found.sum() / state.sum() - 1) < 1e-12
    assert not found[0][~mask].any()
    assert np.ptp(found[0][mask]) < np.ptp(state[0][mask])


def test_the_moving_box_changes_nothing_that_matters():
    mask = np.ones((10, 60, 10), bool)
    state = np.zeros((1, *mask.shape))
    state[0, 4:6, 10:14, 4:6] = 0.7
    field = np.full(mask.shape, 0.1)
    boxed = last(state, mask, field, (1, 1, 1), 0.05, DOSES, 20.0)
    full = last(state, mask, field, (1, 1, 1), 0.05, DOSES, 20.0, cutoff=-1.0)
    np.testing.assert_allclose(boxed, full, atol=1e-10)
    assert boxed[0, :, 40].max() < 1e-3 < boxed[0, :, 12].max()


def test_faces_carry_the_harmonic_mean_and_none_leaves_the_mask():
    mask = np.array([[[True, True, False]]])
    rates = face_rates(mask, np.array([[[0.1, 0.3, 0.5]]]), (1.0, 1.0, 2.0))
    assert rates[2][1, 1].tolist() == [0.0, 0.0, pytest.approx(0.15 / 4), 0.0, 0.0]
    assert not rates[0].any() and not rates[1].any()


def test_resistant_cells_survive():
    state = np.array([0.7, 0.1])[:, None, None, None]
    mask, field = np.ones((1, 1, 1), bool), np.zeros((1, 1, 1))
    found = last(state, mask, field, (1, 1, 1), 0.0, DOSES, 30.0, sensitivity=[1.0, 0.0], max_step=0.1).ravel()
    exposure = np.sum(DOSES.weights / DOSES.decays * (1 - np.exp(-DOSES.decays * (30.0 - DOSES.days))))
    assert found[0] == pytest.approx(0.7 * np.exp(-exposure), rel=1e-6)
    assert found[1] == 0.1


def test_populations_share_the_carrying_capacity():
    mask, field = np.ones((1, 1, 1), bool), np.zeros((1, 1, 1))
    parts = last(np.array([0.2, 0.1])[:, None, None, None], mask, field, (1, 1, 1), 0.1, Hazard.none(), 40.0)
    whole = last(np.array([0.3])[:, None, None, None], mask, field, (1, 1, 1), 0.1, Hazard.none(), 40.0)
    assert parts.sum() == pytest.approx(whole.sum(), rel=1e-12)
    assert parts[0] / parts[1] == pytest.approx(2.0)


def test_gompertz_growth_follows_its_solution_above_the_floor():
    found = last(*flat(0.1), (1, 1, 1), 0.05, Hazard.none(), 30.0, gompertz_floor=0.02)
    assert found.ravel()[0] == pytest.approx(np.exp(np.log(0.1) * np.exp(-0.05 * 30.0)), rel=1e-6)


def test_unsorted_times_are_refused():
    with pytest.raises(SolverError, match="after 5 day"):
        list(integrate(*flat(0.5), (1, 1, 1), 0.05, Hazard.none(), [5.0, 3.0]))


def test_averaging_undoes_refining():
    values = np.random.default_rng(0).random((3, 4, 1))
    fine = refine(values, (2, 2, 1))
    assert fine.shape == (6, 8, 1)
    np.testing.assert_allclose(average(fine, (2, 2, 1)), values, rtol=1e-15)
