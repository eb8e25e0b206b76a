"""The tumour network: it learns, repeats, is kept safely in a file, and says how sure it is."""

import json

import numpy as np
import pytest
import torch
from scipy import ndimage

from biomodel.errors import InputError, OutputError
from biomodel.imaging.regions import (
    Case,
    Exam,
    NetworkRegions,
    NetworkSettings,
    TissueNetwork,
    Training,
    TumourNetwork,
    score_region,
    train,
)
from biomodel.imaging.regions.network import channels, resample

pytest.importorskip("monai")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SPACING = (2.0, 2.0, 2.0)
SMALL = NetworkSettings(features=(6, 8, 12), residual_units=0, spacing=SPACING)
SHORT = Training(steps=120, patch=(12, 16, 16), batch=2, rate=2.0e-2, seed=4)


def case(seed: int, spacing: tuple[float, ...] = SPACING, tumour: bool = True) -> Case:
    """A ball that enhances in tissue that hardly does, in an image of 24 × 40 × 40 mm."""
    rng = np.random.default_rng(seed)
    shape = tuple(round(extent / step) for extent, step in zip((24, 40, 40), spacing, strict=True))
    z, y, x = (((np.arange(n) + 0.5) * s).reshape(w) for n, s, w in
               zip(shape, spacing, ((-1, 1, 1), (1, -1, 1), (1, 1, -1)), strict=True))  # fmt: skip
    middle, radius = rng.uniform((10, 14, 14), (14, 26, 26)), rng.uniform(6, 8)
    region = (z - middle[0]) ** 2 + (y - middle[1]) ** 2 + (x - middle[2]) ** 2 <= radius**2
    region &= tumour
    before = 100 + 20 * ndimage.gaussian_filter(rng.standard_normal(shape), 2) + rng.normal(0, 4, shape)
    early = before * np.where(region, 2.5, 1.1) + rng.normal(0, 4, shape)
    late = before * np.where(region, 2.2, 1.2) + rng.normal(0, 4, shape)
    return Case(Exam(before, early, late, spacing), np.ones(shape, bool), region, f"p{seed}", "here")


@pytest.fixture(scope="module")
def network() -> TumourNetwork:
    return train([case(seed) for seed in range(6)], SMALL, SHORT, kept_back=[case(50)])


def test_a_short_training_finds_the_ball(network):
    test = case(77)
    found = network.find(test.exam, test.organ)
    assert score_region(found.mask, test.region, SPACING).dice > 0.8
    assert network.provenance["cases"] == 6 and network.provenance["sites"] == ["here"]
    assert network.provenance["kept_back_median_dice"] > 0.8
    assert network.provenance["training"]["seed"] == 4 and network.provenance["versions"]["torch"] == torch.__version__
    assert not (network.find(test.exam, test.organ & (np.arange(20) < 10)).mask & (np.arange(20) >= 10)).any()


def test_uncertainty_is_larger_at_the_surface(network):
    test = case(78)
    found = network.find(test.exam, test.organ)
    surface = ndimage.binary_dilation(test.region) & ~ndimage.binary_erosion(test.region)
    assert found.entropy[surface].mean() > 2 * found.entropy[~surface].mean()
    assert found.spread[surface].mean() > 2 * found.spread[~surface].mean()
    assert found.entropy.min() >= 0 and found.entropy.max() <= 1
    least, most = found.volume[1:]
    assert least <= (found.probability >= 0.5).sum() * 0.008 * 1.02 and most >= found.volume[0] * 0.98
    one = network.find(test.exam, test.organ, augment=False)
    assert (one.spread == 0).all() and one.volume[1] == one.volume[2]
    mirrored = Exam(*(np.flip(i, 2) for i in (test.exam.before, test.exam.early, test.exam.late)), SPACING)
    # Asked along all axes both ways, it cannot tell left from right.
    np.testing.assert_allclose(np.flip(network.find(mirrored, test.organ).probability, 2), found.probability, atol=1e-4)


def test_the_same_seed_gives_the_same_weights(network):
    few = Training(steps=3, patch=(12, 16, 16), batch=2, seed=9)
    cases = [case(seed) for seed in range(2)]
    state = torch.get_rng_state()
    steps = []
    one = train(cases, SMALL, few, progress=lambda step, loss: steps.append((step, loss)))
    two = train(cases, SMALL, few)
    assert one.digest == two.digest != network.digest
    assert [step for step, _ in steps] == [1, 2, 3] and all(np.isfinite(loss) for _, loss in steps)
    assert torch.equal(state, torch.get_rng_state())  # the caller's randomness is left alone
    other = train(cases, SMALL, Training(steps=3, patch=(12, 16, 16), batch=2, seed=10))
    assert other.digest != one.digest
    assert other.provenance["data"] == one.provenance["data"] != network.provenance["data"]


def test_a_file_gives_the_same_network_back(network, tmp_path):
    path = tmp_path / "tumour.pt"
    digest = network.save(path)
    read = TumourNetwork.load(path)
    assert read.digest == digest == network.digest
    assert read.settings == network.settings and read.provenance == json.loads(json.dumps(network.provenance))
    test = case(79)
    np.testing.assert_array_equal(
        read.find(test.exam, test.organ).probability, network.find(test.exam, test.organ).probability
    )
    with pytest.raises(OutputError, match="exists already"):
        network.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["tumour.pt"]


def test_a_wrong_file_is_refused(network, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        TumourNetwork.load(tmp_path / "nothing.pt")
    text = tmp_path / "text.pt"
    text.write_text("weights")
    with pytest.raises(InputError, match="is no file of network weights"):
        TumourNetwork.load(text)
    foreign = tmp_path / "foreign.pt"
    torch.save({"state_dict": network.module.state_dict()}, foreign)
    with pytest.raises(InputError, match="holds no network of this package"):
        TumourNetwork.load(foreign)
    whole = tmp_path / "whole.pt"  # a pickled module, which would run code when read
    torch.save(network.module, whole)
    with pytest.raises(InputError, match="is no file of network weights"):
        TumourNetwork.load(whole)
    network.save(good := tmp_path / "good.pt")
    content = torch.load(good, weights_only=True)
    name = next(iter(content["state"]))
    for change in (
        {"state": content["state"] | {name: content["state"][name] + 1}},
        {"header": content["header"].replace("here", "there")},
        {"sha256": "0" * 64},
    ):
        torch.save(content | change, tmp_path / "changed.pt")
        with pytest.raises(InputError, match="do not match their digest"):
            TumourNetwork.load(tmp_path / "changed.pt")
    torch.save(content | {"format": TumourNetwork.FORMAT[:-1] + "0"}, tmp_path / "old.pt")
    with pytest.raises(InputError, match="Train it anew"):
        TumourNetwork.load(tmp_path / "old.pt")
    with pytest.raises(InputError, match="holds a 'tumorcast tumour network 1'; expected a network for fibroglandular"):
        TissueNetwork.load(good)
    torch.save(content | {"state": {"a": 1}}, tmp_path / "numbers.pt")
    with pytest.raises(InputError, match="do not match their digest"):
        TumourNetwork.load(tmp_path / "numbers.pt")


def test_as_a_way_to_regions_it_brings_probability_and_uncertainty(network):
    test = case(82)
    organ = test.organ & (np.arange(20) > 2)
    found = NetworkRegions(network).region(test.exam, organ, None)
    plain = network.find(test.exam, organ)
    np.testing.assert_array_equal(found.mask, plain.mask)
    assert np.isnan(found.probability[~organ]).all() and np.isnan(found.entropy[~organ]).all()
    np.testing.assert_array_equal(found.entropy[organ], plain.entropy[organ])
    assert "among the network's views" in found.notes[0] and network.digest[:12] in found.notes[-1]
    assert "6 exams of 6 patients at here" in found.notes[-1]
    strict = NetworkRegions(network, smallest=50.0).region(test.exam, organ, None)
    assert found.mask.any() and not strict.mask.any()


def test_other_voxel_sizes_are_resampled(network):
    fine = case(80, (1.0, 1.6, 1.6))
    found = network.find(fine.exam, fine.organ)
    assert found.mask.shape == fine.exam.shape
    assert score_region(found.mask, fine.region, fine.exam.spacing).dice > 0.75


def test_resampling_keeps_places():
    z, y, x = np.indices((8, 12, 10), float)
    plane = 3 * z + 2 * y - x
    coarse = resample(plane, (1.0, 1.0, 1.0), (2.0, 2.0, 2.0), None)
    assert coarse.shape == (4, 6, 5)
    np.testing.assert_allclose(
        coarse[1:-1, 1:-1, 1:-1], plane.reshape(4, 2, 6, 2, 5, 2).mean((1, 3, 5))[1:-1, 1:-1, 1:-1]
    )
    back = resample(coarse, (2.0, 2.0, 2.0), (1.0, 1.0, 1.0), plane.shape)
    np.testing.assert_allclose(back[3:-3, 3:-3, 3:-3], plane[3:-3, 3:-3, 3:-3], atol=1e-9)
    assert resample(plane, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), None) is plane


def test_channels_do_not_depend_on_the_unit_of_the_signal():
    test = case(81)
    exam = test.exam
    scaled = Exam(50 * exam.before, 50 * exam.early, 50 * exam.late, SPACING)
    np.testing.assert_allclose(channels(scaled, test.organ), channels(exam, test.organ), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="the exam has none"):
        channels(exam, test.organ, with_adc=True)
    adc = Exam(exam.before, exam.early, exam.late, SPACING, np.full(exam.shape, 1e-3))
    assert channels(adc, test.organ, with_adc=True).shape == (6, *exam.shape)


def test_what_cannot_be_learnt_from_is_refused():
    with pytest.raises(InputError, match="none of 2 cases"):
        train([case(1, tumour=False), case(2, tumour=False)], SMALL, SHORT)
    with pytest.raises(InputError, match="split by patient"):
        train([case(1)], SMALL, SHORT, kept_back=[case(1)])
    with pytest.raises(InputError, match="multiples of 2"):
        train([case(1)], SMALL, Training(patch=(11, 16, 16)))
    with pytest.raises(InputError, match="region of shape"):
        Case(case(1).exam, case(1).organ, case(1).region[:4], "p")
    with pytest.raises(InputError, match="features"):
        NetworkSettings(features=(4,))
    with pytest.raises(InputError, match="steps 0"):
        Training(steps=0)
