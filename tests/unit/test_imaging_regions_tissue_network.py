"""The tissue network: it learns fractions, says where its views disagree, and refuses images of another kind."""

import numpy as np
import pytest
from scipy import ndimage

from biomodel.errors import InputError
from biomodel.imaging.regions import (
    Exam,
    NetworkSettings,
    NetworkTissues,
    TissueCase,
    TissueNetwork,
    Training,
    TumourNetwork,
    train_tissues,
)

pytest.importorskip("monai")
pytest.importorskip("SimpleITK")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SHAPE, SPACING = (12, 24, 24), (2.0, 2.0, 2.0)
SMALL = NetworkSettings(features=(6, 8, 12), residual_units=0, spacing=SPACING)
SHORT = Training(steps=100, patch=(12, 16, 16), batch=2, rate=2.0e-2, seed=4)


def case(seed: int, noise: float = 6.0) -> TissueCase:
    """Bright gland of smooth shape in dark fat, mixed at the edges; a ball of unknown tissue enhances."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal(SHAPE), 2.5)
    gland = ndimage.gaussian_filter((field > np.quantile(field, 0.7)).astype(float), 0.7)
    z, y, x = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    ball = (z - 6) ** 2 + (y - 8) ** 2 + (x - 8) ** 2 < 9
    shading = np.exp(0.25 * (y / SHAPE[1] - 0.5))
    before = (40 + 100 * gland) * shading
    early = before * np.where(ball, 2.5, 1.0 + 0.2 * gland)
    noisy = [image + rng.normal(0, noise, SHAPE) for image in (before, early, early)]
    organ = np.ones(SHAPE, bool) & (x > 1)
    return TissueCase(Exam(*noisy, SPACING), organ, np.where(ball, np.nan, gland), True, f"p{seed}", "here")


@pytest.fixture(scope="module")
def network() -> TissueNetwork:
    return train_tissues([case(seed) for seed in range(6)], SMALL, SHORT, kept_back=[case(50)])


def test_a_short_training_finds_fractions(network):
    test = case(77)
    found = network.split(test.exam, test.organ, fat_suppressed=True)
    known = np.isfinite(test.fibroglandular)
    error = np.abs(found.fibroglandular - test.fibroglandular)[known]
    guess = np.abs(np.mean(test.fibroglandular[known]) - test.fibroglandular[known])
    assert error.mean() < 0.25 * guess.mean()
    # Fractions, not a yes or no: voxels that are mixed come out in between.
    mixed = known & (np.abs(test.fibroglandular - 0.5) < 0.2)
    assert np.median(np.abs(found.fibroglandular[mixed] - 0.5)) < 0.3
    np.testing.assert_allclose((found.fibroglandular + found.adipose)[test.organ], 1)
    assert (found.fibroglandular[~test.organ] == 0).all() and found.clusters is None
    assert network.provenance["fat_suppressed"] == [True] and network.provenance["cases"] == 6
    assert network.provenance["kept_back_median_error"] < 0.1
    assert 0.5 < found.bias.min() and found.bias.max() < 2 and np.ptp(found.bias) > 0.01


def test_views_disagree_more_where_it_errs(network):
    test = case(78)
    found = network.split(test.exam, test.organ, fat_suppressed=True)
    known = np.isfinite(test.fibroglandular)
    error, spread = np.abs(found.fibroglandular - test.fibroglandular)[known], found.spread[known]
    assert error[spread > np.median(spread)].mean() > 2 * error[spread <= np.median(spread)].mean()
    one = network.split(test.exam, test.organ, fat_suppressed=True, augment=False)
    assert (one.spread == 0).all()


def test_voxels_without_signal_have_no_fraction(network):
    test = case(79)
    early = test.exam.early.copy()
    early[3, 12, 12] = np.nan
    found = network.split(
        Exam(test.exam.before, early, test.exam.late, SPACING), test.organ, fat_suppressed=True, augment=False
    )
    assert np.argwhere(np.isnan(found.fibroglandular)).tolist() == [[3, 12, 12]]


def test_the_same_seed_gives_the_same_weights_and_a_file_keeps_them(network, tmp_path):
    few = Training(steps=3, patch=(12, 16, 16), batch=2, seed=9)
    cases = [case(seed) for seed in range(2)]
    assert train_tissues(cases, SMALL, few).digest == train_tissues(cases, SMALL, few).digest != network.digest
    network.save(path := tmp_path / "tissue.pt")
    read = TissueNetwork.load(path)
    assert read.digest == network.digest
    test = case(80)
    way = NetworkTissues(read, augment=False).tissues(test.exam, test.organ, fat_suppressed=True)
    plain = network.split(test.exam, test.organ, fat_suppressed=True, augment=False)
    np.testing.assert_array_equal(way.fibroglandular, plain.fibroglandular)
    assert read.digest[:12] in way.notes[-1]
    with pytest.raises(InputError, match="holds a 'tumorcast tissue network 1'; expected a network for tumours"):
        TumourNetwork.load(path)


def test_images_of_another_kind_and_cases_without_truth_are_refused(network):
    test = case(81)
    with pytest.raises(InputError, match="without fat suppression, and it learnt from images with fat suppression"):
        network.split(test.exam, test.organ, fat_suppressed=False)
    with pytest.raises(InputError, match="split by patient"):
        train_tissues([case(1)], SMALL, SHORT, kept_back=[case(1)])
    with pytest.raises(InputError, match="no known value in the organ"):
        TissueCase(test.exam, test.organ, np.full(SHAPE, np.nan), True, "p")
    with pytest.raises(InputError, match="expected fractions from 0 to 1"):
        TissueCase(test.exam, test.organ, 100 * test.fibroglandular, True, "p")
    with pytest.raises(InputError, match="fibroglandular of shape"):
        TissueCase(test.exam, test.organ, test.fibroglandular[:3], True, "p")
    fat = TissueCase(test.exam, test.organ, np.zeros(SHAPE), True, "p")
    with pytest.raises(InputError, match="none of 1 cases has fibroglandular"):
        train_tissues([fat], SMALL, SHORT)
