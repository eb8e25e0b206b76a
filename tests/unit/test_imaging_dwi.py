"""ADC, IVIM and kurtosis against truth: bias, errors, intervals, noise floor, gradients and bad input."""

import numpy as np
import pytest
import torch
from scipy.special import ive
from scipy.stats import rice

from biomodel.errors import GeometryError, InputError, UnitError
from biomodel.imaging.dwi import (
    Gaussian,
    IvimBounds,
    KurtosisBounds,
    Rician,
    background_noise,
    cell_fraction_with_sd,
    differentiable_fit,
    fit_adc,
    fit_ivim,
    fit_kurtosis,
    ivim,
    kurtosis,
    monoexponential,
    rician_mean,
    trace_series,
)
from biomodel.imaging.dwi.kernels import _bessel
from biomodel.imaging.dwi.noise import _fisher, fisher_table
from biomodel.imaging.voxelfit import Code
from biomodel.observation import cell_fraction
from biomodel.visit import CellularitySettings

B4 = np.array([0.0, 100.0, 400.0, 800.0])
#: The 18 b-values of OSIPI's IVIM phantom (TF2.4 IVIM-MRI code collection, phantoms/MR_XCAT_qMRI, Apache-2.0).
B18 = np.array([0, 1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 250, 350, 400, 550, 700, 850, 1000], float)
SIGMA = 0.0005
#: D, f, D* (mm²/s, 1, mm²/s). Brain: OSIPI's brain phantom after Rydhög et al. 2014. Body: OSIPI's XCAT phantom, which
#: names Delattre et al. (liver, myocardium), van Baalen et al. (kidney), Huang et al. (oesophagus), Taimouri et al.
#: (spleen), Li et al. (stomach) and, for the pancreas and its tumour, the literature. Breast tumour: Sigmund et al.
#: 2011, doi:10.1002/mrm.22740 (invasive ductal carcinoma). Blood (f = 1) has no D to find and is left out.
TISSUES = {
    "grey matter": (0.81e-3, 0.044, 84e-3),
    "white matter": (0.86e-3, 0.033, 76e-3),
    "liver": (1.5e-3, 0.11, 100e-3),
    "kidney cortex": (2.12e-3, 0.097, 20e-3),
    "kidney medulla": (2.09e-3, 0.158, 19e-3),
    "pancreas": (1.3e-3, 0.15, 10e-3),
    "pancreatic tumour": (1.8e-3, 0.37, 10e-3),
    "spleen": (1.3e-3, 0.2, 30e-3),
    "stomach wall": (1.5e-3, 0.3, 12e-3),
    "oesophagus": (1.67e-3, 0.32, 30e-3),
    "myocardium": (2.4e-3, 0.15, 80e-3),
    "breast tumour": (1.14e-3, 0.105, 14.9e-3),
}


def magnitude(signal, sigma, rng):
    return np.abs(signal + sigma * (rng.standard_normal(signal.shape) + 1j * rng.standard_normal(signal.shape)))


def covered(fit, name, truth):
    low, high = fit.interval(name)
    return float(np.mean((low <= truth) & (truth <= high)))


def ivim_signal(b, d, f, d_star):
    return (1 - f) * np.exp(-b * d) + f * np.exp(-b * d_star)


# --- ADC --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
def test_adc_without_noise_is_exact_for_any_type_of_number(dtype):
    adc = np.array([0.3e-3, 1.1e-3, 2.9e-3])
    signal = (20000 * np.exp(-B4 * adc[:, None])).astype(dtype)
    fit = fit_adc(signal, B4)
    tolerance = {np.float32: 1e-6, np.float64: 1e-10, np.int16: 2e-4}[dtype]
    np.testing.assert_allclose(fit["ADC"], adc, rtol=tolerance)
    np.testing.assert_allclose(fit["S0"], 20000, rtol=tolerance)
    assert fit.names == ("S0", "ADC") and fit.units[1] == "mm^2/s" and fit.counts() == {"fitted": 3}


def test_adc_weights_rest_where_the_weighted_equations_hold():
    rng = np.random.default_rng(1)
    signal = magnitude(500 * np.exp(-B4 * 1.2e-3) * np.ones((50, 1)), 25, rng)
    fit = fit_adc(signal, B4)
    for s, (s0, adc) in zip(signal, fit.values, strict=True):
        w = (s0 * np.exp(-B4 * adc)) ** 2
        slope, level = np.polyfit(B4, np.log(s), 1, w=np.sqrt(w))
        assert -slope == pytest.approx(adc, rel=1e-5) and np.exp(level) == pytest.approx(s0, rel=1e-5)


@pytest.mark.parametrize("snr", [50, 15])
@pytest.mark.parametrize("noise", [Gaussian(), Gaussian(1.0), Rician(1.0), Rician()])
def test_adc_intervals_cover(noise, snr):
    rng = np.random.default_rng(2)
    adc = rng.uniform(0.5e-3, 1.8e-3, 10_000)
    fit = fit_adc(magnitude(snr * np.exp(-B4 * adc[:, None]), 1.0, rng), B4, noise=noise)
    assert 0.93 <= covered(fit, "ADC", adc) <= 0.97
    assert 0.93 <= covered(fit, "S0", snr) <= 0.97


def test_rician_noise_takes_the_floor_out_of_the_adc():
    rng = np.random.default_rng(3)
    b, adc = np.array([0.0, 0, 500, 1000, 1500, 2000, 2500]), 1.8e-3
    signal = magnitude(8 * np.exp(-b * adc) * np.ones((4000, 1)), 1.0, rng)
    plain, aware = fit_adc(signal, b, noise=Gaussian(1.0)), fit_adc(signal, b, noise=Rician(1.0))
    # Standard error of the medians about 0.5 % of the value.
    assert abs(np.median(aware["ADC"]) - adc) < 0.03 * adc
    assert np.median(plain["ADC"]) < 0.9 * adc
    assert covered(aware, "ADC", adc) > 0.91 and covered(plain, "ADC", adc) < 0.85


def test_rician_fit_maximises_the_likelihood():
    rng = np.random.default_rng(4)
    signal = magnitude(6 * np.exp(-B4 * 1.5e-3) * np.ones((20, 1)), 1.0, rng)
    fit = fit_adc(signal, B4, noise=Rician(1.0))

    def loglikelihood(s0, adc):
        return rice.logpdf(signal, s0[:, None] * np.exp(-B4 * adc[:, None])).sum(1)

    best = loglikelihood(fit["S0"], fit["ADC"])
    for ds, dd in ((0.02, 0), (-0.02, 0), (0, 2e-5), (0, -2e-5)):
        assert (loglikelihood(fit["S0"] + ds, fit["ADC"] + dd) < best).all()


def test_noise_of_the_series_from_residuals_and_from_air():
    rng = np.random.default_rng(5)
    adc = rng.uniform(0.5e-3, 2e-3, 3000)
    signal = magnitude(600 * np.exp(-B4 * adc[:, None]), 12.0, rng)
    given, estimated = fit_adc(signal, B4, noise=Rician(12.0)), fit_adc(signal, B4, noise=Rician())
    assert np.median(estimated.sd("ADC") / given.sd("ADC")) == pytest.approx(1, abs=0.05)
    assert background_noise(magnitude(np.zeros(5000), 12.0, rng)) == pytest.approx(12, rel=0.03)
    with pytest.raises(InputError, match="background"):
        background_noise(np.zeros(1000))
    with pytest.raises(InputError, match="Give sigma"):
        fit_adc(signal[:20], B4, noise=Rician())
    with pytest.raises(InputError, match="give sigma"):
        fit_adc(signal[:, :2], B4[[0, 3]], noise=Rician())


def test_fewer_images_leave_no_error_bar_but_given_noise_does():
    signal = 100 * np.exp(-np.array([[0.0, 0.8]]))
    assert np.isnan(fit_adc(signal, [0, 800]).sd("ADC")).all()
    fit = fit_adc(signal, [0, 800], noise=Gaussian(1.0))
    # By hand: sd(ADC) = sqrt((1/100)² + (1/44.9)²) / 800
    assert fit.sd("ADC")[0] == pytest.approx(np.hypot(0.01, 0.01 * np.exp(0.8)) / 800, rel=1e-6)


def test_averages_weigh_samples():
    rng = np.random.default_rng(6)
    counts = np.array([1.0, 1, 4, 9])
    adc = 1e-3
    clean = 100 * np.exp(-B4 * adc) * np.ones((10_000, 1))
    signal = clean + rng.standard_normal(clean.shape) * 2 / np.sqrt(counts)
    weighted, plain = fit_adc(signal, B4, averages=counts), fit_adc(signal, B4)
    assert weighted["ADC"].std() < plain["ADC"].std()
    assert 0.93 <= covered(weighted, "ADC", adc) <= 0.97
    with pytest.raises(InputError, match="averaged"):
        fit_adc(signal, B4, averages=counts, noise=Rician(2.0))


# --- directions -------------------------------------------------------------------------------------------------------


def test_trace_of_a_tensor_does_not_depend_on_how_it_lies():
    rng = np.random.default_rng(7)
    axes, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    tensor = axes @ np.diag([1.7e-3, 0.5e-3, 0.4e-3]) @ axes.T
    directions = np.vstack([np.zeros((2, 3)), np.eye(3), np.eye(3)])
    b = np.array([0, 0, 499, 500, 501, 1000, 1000, 1000.0])
    weighting = np.einsum("ni,ij,nj->n", directions, tensor, directions) * np.round(b, -2)
    fit = fit_adc(300 * np.exp(-weighting)[None], np.round(b, -2), directions=directions)
    assert fit["ADC"][0] == pytest.approx(np.trace(tensor) / 3, rel=1e-9)
    series = trace_series(300 * np.exp(-weighting)[None], b, directions)
    np.testing.assert_allclose(series.b_values, [0, 500, 1000])
    np.testing.assert_array_equal(series.averages, [2, 3, 3])


def test_trace_keeps_bad_voxels_bad_and_refuses_uneven_directions():
    b, g = np.array([0, 1000, 1000, 1000.0]), np.vstack([np.zeros(3), np.eye(3)])
    signal = np.array([[9.0, 3, 3, 3], [9, 0, 3, 3], [9, np.nan, 3, 3], [9, -1, 3, 3]])
    fit = fit_adc(signal, b, directions=g)
    assert list(fit.code) == [Code.FITTED, Code.NO_SIGNAL, Code.NOT_FINITE, Code.NO_SIGNAL]
    with pytest.raises(InputError, match="spread evenly"):
        trace_series(signal[:, :3], b[:3], g[:3])
    with pytest.raises(InputError, match="direction missing"):
        trace_series(signal, b, np.vstack([np.zeros((2, 3)), np.eye(3)[:2]]))
    with pytest.raises(InputError, match="one direction per image"):
        trace_series(signal, b, g[:3])
    with pytest.raises(InputError, match="Rician"):
        fit_adc(signal, b, directions=g, noise=Rician(1.0))
    with pytest.raises(InputError, match="both directions and averages"):
        fit_adc(signal, b, directions=g, averages=np.ones(4))


# --- IVIM and kurtosis ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tissue", TISSUES)
def test_ivim_errors_are_near_the_cramer_rao_bound(tissue):
    d, f, d_star = TISSUES[tissue]
    clean = ivim_signal(B18, d, f, d_star)
    slow, fast = np.exp(-B18 * d), np.exp(-B18 * d_star)
    slopes = np.stack([clean, -B18 * (1 - f) * slow, fast - slow, -B18 * f * fast], 1)
    bound = SIGMA * np.sqrt(np.diag(np.linalg.inv(slopes.T @ slopes)))
    rng = np.random.default_rng(8)
    # 8000 voxels: the median error is known to 1.3 %.
    fit = fit_ivim(clean + SIGMA * rng.standard_normal((8000, len(B18))), B18)
    assert fit.counts() == {"fitted": 8000}
    for name, truth, best in zip(("D", "f", "D*"), (d, f, d_star), bound[1:], strict=True):
        median = np.median(np.abs(fit[name] - truth))
        assert median <= 1.1 * 0.6745 * best, f"{name}: {median / (0.6745 * best):.3f} of the bound's median"
        assert 0.93 <= covered(fit, name, truth) <= 0.97


def test_ivim_on_a_bound_says_so_and_keeps_the_other_errors():
    signal = np.exp(-B18 * 1e-3)[None] * np.ones((2, 1))
    signal[1] *= 1 - 0.002 * (B18 < 40)  # less at low b than one exponential: f would be negative
    fit = fit_ivim(signal, B18, noise=Gaussian(0.01))
    assert fit.code[1] == Code.AT_BOUND and fit["f"][1] == 0
    assert np.isnan(fit.sd("f")[1]) and np.isnan(fit.sd("D*")[1]) and np.isfinite(fit.sd("D")[1])
    assert fit["D"][1] == pytest.approx(1e-3, rel=0.01)


def test_ivim_finds_the_same_optimum_from_rician_likelihood_far_above_the_noise():
    rng = np.random.default_rng(9)
    signal = magnitude(1000 * ivim_signal(B18, *TISSUES["pancreas"]) * np.ones((50, 1)), 0.5, rng)
    plain, aware = fit_ivim(signal, B18, noise=Gaussian(0.5)), fit_ivim(signal, B18, noise=Rician(0.5))
    np.testing.assert_allclose(plain["D*"], aware["D*"], rtol=1e-3)
    np.testing.assert_allclose(plain.sd("D*"), aware.sd("D*"), rtol=1e-2)


def test_kurtosis_and_the_noise_floor():
    b, d, k = np.array([0, 0, 100, 300, 600, 900, 1200, 1600, 2000.0]), 1.0e-3, 0.9
    clean = np.exp(-b * d + (b * d) ** 2 * k / 6)
    exact = fit_kurtosis(700 * clean[None], b)
    np.testing.assert_allclose(exact.values[0], [700, d, k], rtol=1e-6)
    rng = np.random.default_rng(10)
    fit = fit_kurtosis(magnitude(clean * np.ones((10_000, 1)), 0.01, rng), b)
    assert 0.93 <= covered(fit, "D", d) <= 0.97 and 0.93 <= covered(fit, "K", k) <= 0.97
    # Water has no kurtosis; its noise floor looks like one.
    water = magnitude(np.exp(-b * 2e-3) * np.ones((4000, 1)), 0.03, rng)
    plain, aware = fit_kurtosis(water, b, noise=Gaussian(0.03)), fit_kurtosis(water, b, noise=Rician(0.03))
    assert np.median(plain["K"]) > 0.04 and abs(np.median(aware["K"])) < 0.6 * np.median(plain["K"])


# --- bad input --------------------------------------------------------------------------------------------------------

FITS = [fit_adc, fit_ivim, fit_kurtosis]


@pytest.mark.parametrize("fit", FITS)
def test_b_values_that_cannot_be_used_are_refused(fit):
    b = np.array([0, 10, 50, 200, 800.0])
    signal = np.exp(-b * 1e-3)[None]
    for bad, match in (
        (np.where(b == 50, np.nan, b), "missing for image 3"),
        (np.where(b == 50, -50, b), "negative for image 3"),
        (b[:3], "3 b-values for 5 images"),
        (np.full(5, 800.0), "1 different b-value "),
        (["a"] * 5, "one number per image"),
    ):
        with pytest.raises(InputError, match=match):
            fit(signal, bad)
    for bad in (b / 1000, b * 1e6):
        with pytest.raises(UnitError, match="never guessed"):
            fit(signal, bad)
    with pytest.raises(InputError, match="1 different b-value "):
        fit(signal[:, :1], [0])


def test_each_model_needs_its_number_of_different_b_values():
    signal = np.array([[4.0, 4.0, 3.0, 2.0]])
    assert fit_adc(signal[:, 1:], [0, 0, 800]).counts() == {"fitted": 1}
    with pytest.raises(InputError, match="2 different b-values .*at least 3"):
        fit_kurtosis(signal, [0, 0, 800, 800])
    with pytest.raises(InputError, match="3 different b-values .*at least 4"):
        fit_ivim(signal, [0, 0, 400, 800])


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("noise", [Gaussian(), Rician(0.01)])
def test_bad_voxels_have_a_code_and_no_value(fit, noise):
    b = np.array([0, 10, 50, 100, 200, 400, 800.0])
    signal = np.tile(ivim_signal(b, 1e-3, 0.2, 0.02), (7, 1))
    signal[1, 2], signal[2, 2], signal[3, 2], signal[4, 2], signal[5, 0] = np.nan, np.inf, 0, -1, 3
    mask = np.arange(7) != 6
    result = fit(signal, b, noise=noise, mask=mask, ceiling=2.0)
    expected = ["FITTED", "NOT_FINITE", "NOT_FINITE", "NO_SIGNAL", "NO_SIGNAL", "SATURATED", "OUTSIDE"]
    assert [Code(c).name for c in result.code[1:]] == expected[1:]
    assert result.code[0] in (Code.FITTED, Code.AT_BOUND)
    assert np.isfinite(result.values[0]).all()
    assert (
        np.isnan(result.values[1:]).all() and np.isnan(result.covariance[1:]).all() and np.isnan(result.rss[1:]).all()
    )


@pytest.mark.parametrize("fit", FITS)
def test_signals_and_options_of_the_wrong_kind_are_refused(fit):
    b = np.array([0, 10, 50, 200, 800.0])
    signal = np.exp(-b * 1e-3)[None]
    with pytest.raises(GeometryError, match="voxels, samples"):
        fit(signal[0], b)
    with pytest.raises(GeometryError, match="mask"):
        fit(signal, b, mask=np.ones(2, bool))
    with pytest.raises(InputError, match="magnitude"):
        fit(signal.astype(complex), b)
    with pytest.raises(InputError, match="no voxels"):
        fit(signal[:0], b)
    with pytest.raises(InputError, match="expected Gaussian"):
        fit(signal, b, noise="rician")
    with pytest.raises(InputError, match="sigma"):
        fit(signal, b, noise=Rician(-1.0))
    with pytest.raises(InputError, match="sigma of shape"):
        fit(signal, b, noise=Gaussian(np.ones(3)))
    with pytest.raises(InputError, match="averages"):
        fit(signal, b, averages=np.zeros(5))
    with pytest.raises(InputError, match="ceiling"):
        fit(signal, b, ceiling=0)


def test_bounds_that_make_no_sense_are_refused():
    for make in (
        lambda: IvimBounds(d=(1e-3, 1e-3)),
        lambda: IvimBounds(f=(0, 1.5)),
        lambda: IvimBounds(d_star=(0, 0.1)),
        lambda: KurtosisBounds(d=(-1e-3, 1e-3)),
        lambda: KurtosisBounds(k=(2, 1)),
    ):
        with pytest.raises(InputError, match="expected"):
            make()


def test_noise_only_and_extreme_voxels_end_without_a_crash():
    rng = np.random.default_rng(11)
    noise = magnitude(np.zeros((500, len(B18))), 1.0, rng)
    steep = np.maximum(np.exp(-B18 * 0.4), 1e-200)[None]
    growing = np.exp(B18 * 2e-3)[None]
    signal = np.vstack([noise, steep, growing, 1e30 * steep, 1e-30 * growing])
    for fit in FITS:
        for kind in (Gaussian(), Rician(1.0)):
            result = fit(signal, B18, noise=kind)
            valued = np.isfinite(result.values).all(1)
            assert set(np.unique(result.code[~valued])) <= {Code.NO_SIGNAL}
            assert valued[:500].all()


# --- pieces -----------------------------------------------------------------------------------------------------------


def test_bessel_functions_and_information_against_their_definitions():
    x = np.concatenate([[1e-6], np.geomspace(1e-3, 1e5, 400)])
    ours = np.array([_bessel(v) for v in x])
    np.testing.assert_allclose(ours[:, 0], np.log(ive(0, x)), atol=3e-7)
    np.testing.assert_allclose(ours[:, 1], ive(1, x) / ive(0, x), rtol=2e-6)
    table = fisher_table()
    assert table[0] == pytest.approx(0, abs=1e-9) and (np.diff(table) > -1e-9).all()
    assert table[-1] == pytest.approx(1 - 0.5 / 12**2, abs=1e-4)
    # The variance of the score in a simulation.
    rng = np.random.default_rng(12)
    m = magnitude(np.full(200_000, 1.5), 1.0, rng)
    score = m * ive(1, 1.5 * m) / ive(0, 1.5 * m) - 1.5
    assert np.var(score) == pytest.approx(_fisher(1.5), rel=0.02)


def test_mean_of_magnitudes():
    rng = np.random.default_rng(13)
    for a in (0.0, 0.7, 3.0):
        mean = float(rician_mean(torch.tensor(a), torch.tensor(2.0)))
        assert mean == pytest.approx(magnitude(np.full(200_000, a), 2.0, rng).mean(), rel=0.01)


def parameters(*values):
    return tuple(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values)


def test_forward_signals_have_right_gradients():
    b = torch.linspace(0, 3, 6, dtype=torch.float64)  # ms/µm², so that finite differences are well scaled
    one = parameters([1.0, 2.0], [0.8, 1.5])
    assert torch.autograd.gradcheck(lambda *p: monoexponential(b, *p), one)
    assert torch.autograd.gradcheck(lambda *p: kurtosis(b, *p), (*one, *parameters([0.9, 0.2])))
    assert torch.autograd.gradcheck(lambda *p: ivim(b, *p), (*one, *parameters([0.1, 0.3], [9.0, 20.0])))
    assert torch.autograd.gradcheck(rician_mean, parameters([0.5, 4.0], [1.0, 2.0]))
    np.testing.assert_allclose(
        ivim(torch.tensor(B18), *parameters(1.0, 1e-3, 0.1, 0.02)).detach(), ivim_signal(B18, 1e-3, 0.1, 0.02)
    )


@pytest.mark.parametrize(
    ("fit", "model", "logarithmic", "truth"),
    [
        (fit_adc, monoexponential, True, (1.0, 1.1e-3)),
        (fit_kurtosis, kurtosis, False, (1.0, 1.1e-3, 0.8)),
        (fit_ivim, ivim, False, (1.0, 1.1e-3, 0.15, 0.02)),
    ],
)
def test_fitted_parameters_have_the_gradient_of_refitting(fit, model, logarithmic, truth):
    rng = np.random.default_rng(14)
    b = torch.tensor(B18)
    clean = model(b, *(torch.tensor([v], dtype=torch.float64) for v in truth)).numpy()
    signal = clean + 0.003 * rng.standard_normal((3, len(B18)))
    signal[2, 0] = np.nan
    traced = torch.tensor(signal, requires_grad=True)
    result = fit(signal, B18)
    values = differentiable_fit(result, traced, b, model, logarithmic=logarithmic)
    np.testing.assert_allclose(values.detach(), result.values, rtol=1e-6)
    (gradient,) = torch.autograd.grad(values[0, 1], traced)
    assert (gradient[1:] == 0).all()
    step = 1e-4
    for i in (0, 6, 17):
        high, low = signal.copy(), signal.copy()
        high[0, i] += step
        low[0, i] -= step
        expected = (fit(high, B18).values[0, 1] - fit(low, B18).values[0, 1]) / (2 * step)
        assert float(gradient[0, i]) == pytest.approx(expected, rel=2e-3)
    with pytest.raises(GeometryError, match="those that were fitted"):
        differentiable_fit(result, traced[:1], b, model, logarithmic=logarithmic)


# --- cellularity ------------------------------------------------------------------------------------------------------


def test_adc_error_becomes_cell_fraction_error():
    settings = CellularitySettings(adc_w=3e-3, adc_min=0.6e-3)
    rng = np.random.default_rng(15)
    adc = np.full(100_000, 1.2e-3)
    noisy = adc + 1e-4 * rng.standard_normal(adc.shape)
    cells = cell_fraction_with_sd(noisy, np.full(adc.shape, 1e-4), settings)
    np.testing.assert_array_equal(cells.fraction, cell_fraction(noisy, settings))
    assert cells.fraction.std() == pytest.approx(cells.sd[0], rel=0.01)
    assert cells.shared_sd.mean() == pytest.approx(0.05 * 1.2e-3 / 2.4e-3, rel=1e-3)
    assert cells.total_sd[0] == pytest.approx(np.hypot(cells.sd[0], cells.shared_sd[0]))


def test_missing_adc_has_no_cell_fraction_and_bad_errors_are_refused():
    settings = CellularitySettings(adc_w=3e-3, adc_min=0.6e-3)
    cells = cell_fraction_with_sd([1e-3, np.nan, 1e-3], [1e-4, 1e-4, np.nan], settings)
    for values in (cells.fraction, cells.sd, cells.shared_sd):
        assert list(np.isnan(values)) == [False, True, True]
    with pytest.raises(InputError, match="negative"):
        cell_fraction_with_sd([1e-3], [-1e-4], settings)
    with pytest.raises(GeometryError, match="same grid"):
        cell_fraction_with_sd([1e-3], [1e-4, 1e-4], settings)
