"""Curve descriptors and the functional tumour."""

import numpy as np
import pytest

from biomodel.errors import InputError
from biomodel.imaging.dce.semiquantitative import enhancement, functional_tumour, functional_tumour_volume
from biomodel.imaging.voxelfit import Code

TIMES = np.arange(0.0, 601.0, 15.0)


def curve(slope_out=-0.001):
    """Baseline 100 to 30 s, then up to a relative enhancement of 1.5 at 150 s, then a straight line."""
    relative = np.interp(TIMES, [30.0, 150.0, 600.0], [0.0, 1.5, 1.5 + 450 * slope_out])
    return 100 * (1 + relative)


def test_descriptors_of_straight_lines():
    found = enhancement(np.stack([curve(), 3 * curve()]), TIMES, [0, 1, 2])
    assert (found.code == Code.FITTED).all()
    rise = 1.5 / 120
    for name, expected in {
        "auc60": rise * 60**2 / 2,
        "auc90": rise * 90**2 / 2,
        "peak": 1.5,
        "time_to_peak": 120.0,
        "wash_in": rise,
        "wash_out": -0.001,
        "early": 1.47,
        "ser": 1.47 / 1.17,
    }.items():
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-12, err_msg=name)


def test_arrival_between_samples_and_concentrations():
    found = enhancement(curve()[None] - 100, TIMES, [0, 1, 2], arrival=37.5, relative=False)
    rise = 150 / 120
    np.testing.assert_allclose(found.auc60, rise * (67.5**2 - 7.5**2) / 2, rtol=1e-12)
    np.testing.assert_allclose(found.peak, 150)
    np.testing.assert_allclose(found.time_to_peak, 112.5)


def test_a_series_too_short_has_no_late_values():
    found = enhancement(curve()[None, :8], TIMES[:8], [0, 1, 2])
    assert np.isnan([found.ser[0], found.early[0], found.wash_out[0]]).all()
    assert np.isfinite([found.auc60[0], found.peak[0]]).all()
    assert np.isnan(enhancement(curve()[None, :7], TIMES[:7], [0, 1, 2]).auc90[0])


def test_reasons():
    data = np.stack([curve()] * 4)
    data[0, 5], data[1, 9], data[2, 30] = np.nan, 0.0, -2.0
    found = enhancement(data, TIMES, [0, 1, 2])
    assert list(found.code) == [Code.NOT_FINITE, Code.NO_SIGNAL, Code.NO_SIGNAL, Code.FITTED]
    for name in ("auc60", "auc90", "peak", "time_to_peak", "wash_in", "wash_out", "early", "ser"):
        values = getattr(found, name)
        assert np.isnan(values[:3]).all() and np.isfinite(values[3]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": []}, "no baseline samples"),
        ({"arrival": 900.0}, "arrival at 900 s lies outside of the series"),
        ({"early": 500.0}, "expected 0 < early < late"),
        ({"times": TIMES[:-1]}, "times for 41 samples"),
        ({"signal": curve()}, r"expected \(voxels, samples\)"),
    ],
)
def test_refused(change, message):
    with pytest.raises(InputError, match=message):
        enhancement(**({"signal": curve()[None], "times": TIMES, "baseline": [0, 1, 2]} | change))


def images():
    before, early, late = np.full((8, 8, 8), 100.0), np.full((8, 8, 8), 110.0), np.full((8, 8, 8), 120.0)
    early[2:5, 2:5, 2:5], late[2:5, 2:5, 2:5] = 200.0, 180.0
    return before, early, late, np.ones((8, 8, 8), dtype=bool)


def test_functional_tumour():
    before, early, late, box = images()
    found = functional_tumour(before, early, late, box)
    assert found.sum() == 27 and found[2:5, 2:5, 2:5].all()
    assert functional_tumour_volume(found, (2.0, 1.0, 1.0)) == pytest.approx(27 * 2e-3)
    # Each rule takes out what it is for.
    early[6, 6, 6] = 300.0  # alone
    early[2, 2, 2] = 169.0  # enhances by 69 %
    before[3, 3, 3], early[3, 3, 3] = 50.0, 200.0  # too dark before contrast
    late[4, 4, 4] = 90.0  # washed out to below the baseline: a negative ratio
    late[4, 4, 3] = 100.0  # washed out to the baseline
    found = functional_tumour(before, early, late, box)
    for voxel in ((6, 6, 6), (2, 2, 2), (3, 3, 3), (4, 4, 4)):
        assert not found[voxel], voxel
    assert found[4, 4, 3] and found.sum() == 24
    box[:, :, 4:] = False
    assert not functional_tumour(before, early, late, box)[:, :, 4:].any()
    assert functional_tumour(before, early, late, box, least_ratio=2.0).sum() == 1  # the one at the baseline


def test_functional_tumour_refused():
    before, early, late, box = images()
    with pytest.raises(InputError, match="expected one 3D shape"):
        functional_tumour(before, early[1:], late, box)
    with pytest.raises(InputError, match="no voxel of the box"):
        functional_tumour(before, early, late, ~box)
    with pytest.raises(InputError, match="three positive voxel sides"):
        functional_tumour_volume(box, (1.0, 1.0))
