"""Encoders: what they see, what augmentation leaves alone, files, training that resumes, and devices that run out."""

import multiprocessing
import os
import socket
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from biomodel.errors import GeometryError, InputError
from biomodel.imaging import encoder_loop
from biomodel.imaging.encoder import Encoder, EncoderSettings, group_norm
from biomodel.imaging.encoder_augment import Augmentation, hidden_blocks
from biomodel.imaging.encoder_loop import Loop, MemoryWarning, run
from biomodel.imaging.encoder_study import CHANNELS, Scan, Study, collate
from biomodel.imaging.encoder_training import FineTuning, Predictor, Pretraining, _Pretrain, fine_tune, pretrain
from virtual_studies import TIMES, cohort

SHAPE = (8, 16, 16)
TINY = EncoderSettings(features=(4, 8), width=16, heads=2, layers=1)
STILL = Augmentation(flip=(), shift=0, gain=0.0, noise=0.0)


@pytest.fixture(scope="module")
def studies():
    return cohort(0, 6)[0]


@pytest.fixture(scope="module")
def encoder():
    return Encoder(TINY).eval()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# What it sees ---------------------------------------------------------------------------------------------------------


def test_a_patient_is_encoded_alone_as_among_others(encoder, studies):
    """Padding of patients with fewer volumes changes nothing."""
    assert len({len(s.volumes()) for s in studies}) > 1
    together = encoder.encode(studies, batch=6)
    alone = torch.cat([encoder.encode([s]) for s in studies])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_units_of_the_signal_do_not_matter_and_units_of_adc_do(encoder, studies):
    scan = next(s.scans[0] for s in studies if s.scans[0].adc is not None)
    base = encoder.encode([Study("a", [scan])])
    louder = replace(scan, dce=7.0 * scan.dce)
    torch.testing.assert_close(encoder.encode([Study("a", [louder])]), base, rtol=1e-4, atol=1e-5)
    wetter = replace(scan, adc=1.5 * scan.adc)
    assert not torch.allclose(encoder.encode([Study("a", [wetter])]), base, atol=1e-4)


def test_days_seconds_modalities_and_the_mask_matter(encoder, studies):
    two = next(s for s in studies if len(s.scans) == 2)
    first, second = (replace(s, adc=s.dce[0] * 1e-3) for s in two.scans)
    base = encoder.encode([Study("a", [first, second])])
    for changed in (
        [first, replace(second, day=60.0)],
        [first, replace(second, times=(-10.0, 90.0, 600.0))],
        [replace(first, adc=None), second],
        [replace(first, dce=first.dce[:2], times=TIMES[:2]), second],
        [replace(first, mask=np.roll(first.mask, 4, 2)), second],
        [first],
    ):
        assert not torch.allclose(encoder.encode([Study("a", changed)]), base, atol=1e-5)
    # The first visit's day is where the clock starts.
    later = [replace(s, day=s.day + 100) for s in (first, second)]
    torch.testing.assert_close(encoder.encode([Study("a", later)]), base)


def test_without_a_mask_the_whole_is_pooled(encoder, studies):
    scan = replace(studies[0].scans[0], mask=None)
    assert bool(torch.isfinite(encoder.encode([Study("a", [scan])])).all())


def test_bad_scans_are_named():
    volume = np.ones(SHAPE)
    with pytest.raises(InputError, match="no volume"):
        Scan(0.0, mask=volume)
    with pytest.raises(InputError, match="times .* for 2 phases"):
        Scan(0.0, dce=np.ones((2, *SHAPE)), times=[0.0])
    with pytest.raises(GeometryError, match="resample them to one grid"):
        Scan(0.0, adc=volume, t2=np.ones((8, 8, 8)))
    with pytest.raises(InputError, match="not finite"):
        Scan(0.0, t2=np.full(SHAPE, np.nan))
    with pytest.raises(GeometryError, match="expected 4 axes"):
        Scan(0.0, dce=volume, times=[0.0])
    with pytest.raises(InputError, match="in order"):
        Study("a", [Scan(3.0, t2=volume), Scan(1.0, t2=volume)])
    with pytest.raises(GeometryError, match="one shape"):
        collate([Study("a", [Scan(0.0, t2=volume)]), Study("b", [Scan(0.0, t2=np.ones((8, 8, 8)))])])


# Augmentation ---------------------------------------------------------------------------------------------------------


def test_augmentation_leaves_kinetics_alone(studies):
    study = next(s for s in studies if len(s.scans) == 2 and s.scans[0].adc is not None)
    changed = Augmentation(noise=0.0, gain=0.5)(study, np.random.default_rng(3))
    plain = [v[3] for v in study.volumes()]
    assert not np.allclose(changed[0], plain[0])
    signal, gain, adc, mask = (CHANNELS.index(n) for n in ("signal", "gain", "adc", "mask"))

    def ratios(volumes):
        inside = volumes[0][mask] > 0.5
        return [np.sort(volumes[j][gain][inside] / volumes[0][signal][inside]) for j in (1, 2)]

    # Voxels moved together and no ratio changed, unless some were moved out of the volume.
    assert changed[0][mask].sum() == plain[0][mask].sum()
    for a, b in zip(ratios(changed), ratios(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    row = next(i for i, v in enumerate(study.volumes()) if v[1] == "adc")
    inside = plain[row][mask] > 0.5
    np.testing.assert_array_equal(
        np.sort(changed[row][adc][changed[row][mask] > 0.5]), np.sort(plain[row][adc][inside])
    )
    # All volumes of the patient moved alike.
    assert all(np.array_equal(v[mask], changed[0][mask]) for v in changed)


def test_hidden_blocks():
    hidden = hidden_blocks((9, 16, 17), 4, 0.5, np.random.default_rng(0))
    assert hidden.shape == (9, 16, 17) and 0.3 < hidden.mean() < 0.7
    assert np.ptp(hidden[:4, 4:8, 8:12].astype(int)) == 0


def test_phases_of_a_visit_are_hidden_alike(studies):
    task = _Pretrain(Encoder(TINY), studies, Pretraining())
    views = task.batch(4, np.random.default_rng(0))
    for patient in range(4):
        for visit in range(2):
            rows = views.hidden[(views.one.patient == patient) & (views.one.visit == visit)]
            assert bool((rows == rows[:1]).all())
    assert 0.3 < float(views.hidden.float().mean()) < 0.7


# Backbones and files --------------------------------------------------------------------------------------------------


def test_backbones_of_monai(studies, tmp_path):
    nets = pytest.importorskip("monai.networks.nets")

    def resnet():
        return nets.ResNetFeatures("resnet10", pretrained=False, in_channels=len(CHANNELS))

    made = Encoder(TINY, resnet())
    assert made.maps == 512 and not any(isinstance(m, nn.BatchNorm3d) for m in made.modules())
    found = made.encode(studies[:1])
    made.save(tmp_path / "resnet.pt")
    torch.testing.assert_close(Encoder.load(tmp_path / "resnet.pt", resnet()).encode(studies[:1]), found)
    with pytest.raises(InputError, match="the backbone it was made with"):
        Encoder.load(tmp_path / "resnet.pt")
    with pytest.raises(InputError, match="do not fit"):
        Encoder.load(tmp_path / "resnet.pt", nn.Conv3d(5, 8, 3))


def test_backbones_that_do_not_fit_are_named():
    with pytest.raises(InputError, match="in_channels=5"):
        Encoder(TINY, nn.Conv3d(1, 4, 3))
    with pytest.raises(InputError, match="leave its pooling"):
        Encoder(TINY, nn.Sequential(nn.Conv3d(5, 4, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten()))
    assert isinstance(group_norm(nn.Sequential(nn.BatchNorm3d(6)))[0], nn.GroupNorm)
    with pytest.raises(InputError, match="multiple of 4 heads"):
        EncoderSettings(width=18)


def test_files(encoder, studies, tmp_path):
    path = tmp_path / "encoder.pt"
    encoder.save(path)
    again = Encoder.load(path)
    assert same(encoder, again)
    torch.testing.assert_close(again.encode(studies), encoder.encode(studies))
    content = torch.load(path, weights_only=True)
    torch.save({**content, "format": "tumorcast-encoder-99"}, path)
    with pytest.raises(InputError, match="tumorcast-encoder-99.*this version reads"):
        Encoder.load(path)
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="holds no encoder"):
        Encoder.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="is no file of an encoder"):
        Encoder.load(path)
    with pytest.raises(InputError, match="there is no such file"):
        Encoder.load(tmp_path / "none.pt")


# Training -------------------------------------------------------------------------------------------------------------

LOOP = Loop(steps=6, batch=4, every=2, rate=3e-3)


def test_pretraining_lowers_its_loss_and_repeats_itself(studies):
    settings = Pretraining(replace(LOOP, steps=20))
    made = [Encoder(TINY, seed=1) for _ in range(2)]
    told = []
    outcomes = [pretrain(e, studies, settings, progress=lambda step, loss: told.append(step)) for e in made]
    assert same(*made) and outcomes[0].losses == outcomes[1].losses
    assert np.mean(outcomes[0].losses[-5:]) < 0.85 * np.mean(outcomes[0].losses[:5])
    assert told == 2 * list(range(1, 21)) and 0 <= outcomes[0].share_waiting <= 1


def test_a_stopped_run_resumes_to_the_same_weights(studies, tmp_path):
    settings = Pretraining(LOOP)
    whole, parts = Encoder(TINY), Encoder(TINY)
    pretrain(whole, studies, settings)
    run(_Pretrain(parts, studies, settings), LOOP, tmp_path / "c.pt", stop=3)
    again = Encoder(TINY, seed=5)
    outcome = pretrain(again, studies, settings, tmp_path / "c.pt")
    assert len(outcome.losses) == 3 and same(whole, again)
    assert pretrain(again, studies, settings, tmp_path / "c.pt").losses == ()
    with pytest.raises(InputError, match="another training"):
        pretrain(again, studies, Pretraining(replace(LOOP, seed=9)), tmp_path / "c.pt")
    (tmp_path / "c.pt").write_bytes(b"nothing")
    with pytest.raises(InputError, match="is no checkpoint"):
        pretrain(again, studies, settings, tmp_path / "c.pt")


def test_gradients_add_up(studies):
    """Without contrasts, which see all patients of a part at once, parts change nothing."""
    labels = np.arange(6.0)[:, None]
    made = []
    for parts in (1, 2, 4):
        one = Encoder(TINY)
        fine_tune(one, studies, labels, FineTuning(replace(LOOP, accumulate=parts), STILL))
        made.append(one)
    for other in made[1:]:
        for a, b in zip(made[0].parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


def test_frozen_and_layer_wise_rates(studies):
    labels = np.arange(6.0)[:, None]
    frozen = Encoder(TINY)
    fine_tune(frozen, studies, labels, FineTuning(LOOP, frozen=True))
    assert same(frozen, Encoder(TINY))
    moved = Encoder(TINY)
    fine_tune(moved, studies, labels, FineTuning(LOOP, falling=0.1))

    def change(name):
        pairs = [(a, b) for (n, a), b in zip(moved.named_parameters(), frozen.parameters(), strict=True) if name in n]
        return np.mean([float((a - b).abs().mean().detach()) for a, b in pairs])

    assert 0 < change("backbone") < 0.3 * change("transformer")


def test_few_labels_are_learned_and_unknown_ones_are_left_out(studies):
    labels = np.array([[1.0, 5.0], [2.0, np.nan], [3.0, 5.5], [np.nan, 6.0], [1.5, 5.2], [2.5, 5.8]])
    settings = FineTuning(replace(LOOP, steps=60), STILL, falling=1.0)
    predictor, outcome = fine_tune(Encoder(TINY), studies, labels, settings)
    assert np.mean(outcome.losses[-5:]) < 0.5 * np.mean(outcome.losses[:5])
    found = predictor.predict(studies)
    assert found.shape == (6, 2) and 4.5 < found[:, 1].mean() < 6.5
    for bad in (labels[:3], labels[:, 0], np.full((6, 1), np.nan)):
        with pytest.raises(InputError, match="fine_tune"):
            fine_tune(Encoder(TINY), studies, bad)
    classes, _ = fine_tune(Encoder(TINY), studies, np.array([[0], [1], [0], [1], [1], [0]]),
                           FineTuning(LOOP, loss=nn.functional.binary_cross_entropy_with_logits))  # fmt: skip
    assert float(classes.mean) == 0 and float(classes.sd) == 1


@pytest.mark.slow  # CPUs convolve slowly in halves
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_mixed_precision(studies, precision):
    made = Encoder(TINY)
    outcome = pretrain(made, studies, Pretraining(Loop(steps=2, batch=2, precision=precision, device="cpu")))
    assert np.isfinite(outcome.losses).all() and all(p.dtype == torch.float32 for p in made.parameters())


def test_settings_that_make_no_sense():
    with pytest.raises(InputError, match="precision"):
        Loop(precision=torch.float64)
    for wrong in (lambda: Loop(steps=0), lambda: Pretraining(hidden=1.0), lambda: FineTuning(falling=0.0),
                  lambda: Augmentation(flip=(3,))):  # fmt: skip
        with pytest.raises(InputError):
            wrong()
    with pytest.raises(InputError, match="no studies"):
        pretrain(Encoder(TINY), [])


# Memory and processes -------------------------------------------------------------------------------------------------


class Greedy(nn.Module):
    """A backbone that runs out of memory with more than so many volumes, on devices of a kind."""

    def __init__(self, most):
        super().__init__()
        self.most, self.inner = most, nn.Conv3d(5, 4, 3, 2, 1)

    def forward(self, x):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("injected")
        return self.inner(x)


def test_out_of_memory_does_less_at_a_time_and_says_so(studies):
    one = [Study(s.patient, s.scans[:1]) for s in studies]
    labels = np.arange(6.0)[:, None]
    backbone = Greedy(100)
    made = Encoder(TINY, backbone)
    free = Encoder(TINY, Greedy(100))
    free.load_state_dict(made.state_dict())
    backbone.most = 4  # a patient has three or four volumes
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _, outcome = fine_tune(made, one, labels, FineTuning(LOOP, STILL))
    assert outcome.accumulate == 4 and [w.category for w in told] == 2 * [MemoryWarning]
    assert "in 2 parts from now on" in str(told[0].message) and "in 4 parts" in str(told[1].message)
    fine_tune(free, one, labels, FineTuning(LOOP, STILL))
    for a, b in zip(made.parameters(), free.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)
    backbone.most = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MemoryWarning)
        with pytest.raises(InputError, match="one patient alone"):
            fine_tune(made, one, labels, FineTuning(LOOP, STILL))


def test_out_of_memory_with_one_patient_goes_to_the_cpu(studies, monkeypatch):
    """A stand-in for a GPU, on which every attempt fails."""
    task = _Pretrain(Encoder(TINY), studies, Pretraining(replace(LOOP, steps=2)))
    attempt = encoder_loop._Run._attempt

    def on_cpu_alone(self, batch):
        if self.device.type == "cpu":
            return attempt(self, batch)
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(encoder_loop._Run, "_attempt", on_cpu_alone)
    loop = replace(LOOP, steps=2)
    made = encoder_loop._Run(task, loop, 0, 1, None)
    made.device = type("Device", (), {"type": "gpu", "__str__": lambda self: "gpu"})()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        outcome = made.go(None, None)
    assert "gpu ran out of memory; training goes on on the CPU" in str(told[-1].message) and len(told) == 3
    assert outcome.device == "cpu" and len(outcome.losses) == 2 and outcome.accumulate == 4


def _process(rank, port, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    made = Encoder(TINY, seed=rank)  # the first process's weights count
    outcome = pretrain(made, cohort(0, 6)[0], Pretraining(replace(LOOP, steps=3)), folder / "c.pt")
    made.save(folder / f"{rank}.pt")
    assert len(outcome.losses) == 3
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_one_network(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_process, args=(rank, port, tmp_path)) for rank in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join(120)
    assert [one.exitcode for one in both] == [0, 0]
    made = [Encoder.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert same(*made) and not same(made[0], Encoder(TINY, seed=0))
    assert (tmp_path / "c.pt").exists()


def test_a_batch_is_shared_evenly(studies, monkeypatch):
    monkeypatch.setattr(encoder_loop, "launched", lambda: (0, 3))
    with pytest.raises(InputError, match="3 processes"):
        pretrain(Encoder(TINY), studies, Pretraining(LOOP))
    assert Predictor(Encoder(TINY), 2).head.out_features == 2
