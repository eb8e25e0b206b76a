"""ADC of the tumour's part of voxels that it shares: recovered, with an error that grows as the share falls."""

import numpy as np
import pytest
from scipy import ndimage

from biomodel.errors import GeometryError, InputError
from biomodel.imaging.partial_volume import mean_over, tumour_adc, tumour_share

SHAPE, SPACING = (20, 24, 24), (2.0, 2.0, 2.0)
TUMOUR, FAT = 2.2e-3, 0.8e-3


def phantom(blur):
    """A ball of tumour in fat: true share in each voxel, signal gained, ADC as a series of that blur shows it."""
    z, y, x = np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij")
    radius = np.sqrt((z - 9.3) ** 2 + (y - 11.6) ** 2 + (x - 12.2) ** 2)
    share = np.clip(5.5 - radius, 0, 1)
    seen = ndimage.gaussian_filter(share, blur)
    adc = seen * TUMOUR + (1 - seen) * FAT
    return share, 20 + 180 * share, adc, share > 0.5


@pytest.mark.parametrize("resolution", [0.001, 2.0])
def test_adc_at_the_edge_is_that_of_the_tumour(resolution):
    share, gain, adc, region = phantom(resolution / 2 / 2.0)
    found = tumour_share(gain, region, np.ones(SHAPE, bool), SPACING, (resolution,) * 3)
    own, sd = tumour_adc(adc, np.full(SHAPE, 2e-5), found, region, SPACING)
    edge = region & (share < 1)
    assert np.abs(adc - TUMOUR)[edge].mean() > 0.2e-3
    assert np.abs(own - TUMOUR)[edge].mean() < 0.05e-3
    assert np.all(np.abs(own - TUMOUR)[region] < 3 * sd[region])
    np.testing.assert_array_equal(own[~region], adc[~region])


def test_the_core_keeps_its_adc_and_its_error():
    _, gain, adc, region = phantom(0.5)
    core = ndimage.distance_transform_edt(region) > 3
    gain = np.where(core, 60.0, gain)  # poorly supplied, not fat
    noise = np.full(SHAPE, 2e-5)
    found = tumour_share(gain, region, np.ones(SHAPE, bool), SPACING, (2.0, 2.0, 2.0))
    own, sd = tumour_adc(adc, noise, found, region, SPACING)
    assert core.sum() > 20
    np.testing.assert_allclose(own[core], adc[core], rtol=1e-12)
    np.testing.assert_allclose(sd[core], 2e-5, rtol=0.2)
    edge = region & ~ndimage.binary_erosion(region)
    assert sd[edge].min() > 2 * sd[core].max()


def test_unknown_adc_stays_unknown_and_does_not_spread():
    _, gain, adc, region = phantom(0.5)
    adc[9, 11, 12] = np.nan
    adc[0, 0, 0] = np.nan
    found = tumour_share(gain, region, np.ones(SHAPE, bool), SPACING, (2.0, 2.0, 2.0))
    own, _ = tumour_adc(adc, np.full(SHAPE, 2e-5), found, region, SPACING)
    assert np.isnan(own).sum() == 2


def test_bad_input():
    _, gain, adc, region = phantom(0.5)
    organ = np.ones(SHAPE, bool)
    with pytest.raises(GeometryError, match="expected one grid"):
        tumour_share(gain[1:], region, organ, SPACING, SPACING)
    with pytest.raises(InputError, match="region is empty"):
        tumour_share(gain, ~organ, organ, SPACING, SPACING)
    with pytest.raises(InputError, match="no tissue beside"):
        tumour_share(gain, region, region, SPACING, SPACING)
    found = tumour_share(gain, region, organ, SPACING, SPACING)
    with pytest.raises(InputError, match="has no ADC"):
        tumour_adc(np.full(SHAPE, np.nan), adc, found, region, SPACING)


def test_mean_over_a_mask_ignores_the_rest():
    values = np.zeros(SHAPE)
    where = np.zeros(SHAPE, bool)
    where[:, :, :12] = True
    values[where], values[~where] = 3.0, 1e6
    np.testing.assert_allclose(mean_over(values, where, SPACING, 4.0), 3.0, rtol=1e-9)
    assert not mean_over(values, ~(where | ~where), SPACING, 4.0).any()
