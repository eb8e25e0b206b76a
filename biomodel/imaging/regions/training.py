"""Training of the tumour network on exams with known regions."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from torch import nn

from biomodel.errors import InputError
from biomodel.imaging.regions.exam import Exam
from biomodel.imaging.regions.network import Network, NetworkSettings, channels, resample
from biomodel.imaging.regions.scores import score_region

__all__ = ["Case", "Training", "train"]


@dataclass(frozen=True, eq=False)
class Case:
    """An exam with its region, to learn from.

    Parameters
    ----------
    exam : Exam
    organ, region : ndarray of bool, shape (z, y, x)
        The region may be empty: that there is nothing has to be learnt too.
    patient, site : str
        Whose it is. Exams of one patient or site are never in part learnt from and in part kept back.
    """

    exam: Exam
    organ: np.ndarray
    region: np.ndarray
    patient: str
    site: str = ""

    def __post_init__(self) -> None:
        for name in ("organ", "region"):
            mask = np.asarray(getattr(self, name))
            if mask.shape != self.exam.shape or (mask.dtype != bool and not np.isin(mask, (0, 1)).all()):
                raise InputError(
                    f"case of {self.patient}: {name} of shape {mask.shape}, {mask.dtype}; expected a mask of shape "
                    f"{self.exam.shape}."
                )
            object.__setattr__(self, name, mask.astype(bool))


@dataclass(frozen=True)
class Training:
    """How a network is trained.

    Parameters
    ----------
    steps : int
        Updates of the weights.
    patch : (int, int, int)
        Voxels (z, y, x) of what is shown at a time, multiples of the network's.
    batch : int
        Patches in a step.
    on_tumour : float
        Part of the patches whose middle lies in a tumour.
    rate : float
        Largest learning rate; it rises over the first tenth of the steps and falls to 0 (Smith and Topin 2018,
        arXiv:1708.07120).
    decay : float
        Weight decay of AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101).
    noise, gain : float
        Augmentation: noise added to the channels, and the spread of a factor on each. Patches are mirrored too.
    seed : int
    """

    steps: int = 2000
    patch: tuple[int, int, int] = (16, 40, 40)
    batch: int = 4
    on_tumour: float = 0.6
    rate: float = 5.0e-3
    decay: float = 1.0e-4
    noise: float = 0.03
    gain: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1 or min(self.patch) < 1 or not 0 <= self.on_tumour <= 1 or self.rate <= 0:
            raise InputError(
                f"Training: steps {self.steps}, batch {self.batch}, patch {self.patch}, on_tumour {self.on_tumour:g}, "
                f"rate {self.rate:g}; expected positive numbers and a part from 0 to 1."
            )


def train(
    cases: Sequence[Case],
    settings: NetworkSettings = NetworkSettings(),  # noqa: B008 (immutable)
    training: Training = Training(),  # noqa: B008
    *,
    kept_back: Sequence[Case] = (),
    progress: Callable[[int, float], None] | None = None,
) -> Network:
    """Train a network.

    Parameters
    ----------
    cases : sequence of Case
    settings : NetworkSettings
    training : Training
        The same cases, settings and seed give the same weights on one machine with one number of threads.
    kept_back : sequence of Case
        Scored at the end; the scores go into the provenance.
    progress
        Called after every step with its number and its loss.

    Returns
    -------
    Network

    Raises
    ------
    InputError
        If there is no case with a tumour, a patient is also among those kept back, a patch does not fit the network, or
        MONAI is not installed.
    """
    if not any(case.region.any() for case in cases):
        raise InputError(f"train: none of {len(cases)} cases has a tumour region; there is nothing to learn.")
    if shared := {case.patient for case in cases} & {case.patient for case in kept_back}:
        raise InputError(f"train: {sorted(shared)[:5]} are learnt from and kept back; split by patient.")
    if any(side % settings.multiple for side in training.patch):
        raise InputError(f"train: patch {training.patch}; expected multiples of {settings.multiple} voxels.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        module = settings.build()
    from monai.losses import DiceCELoss

    # Overlap and cross-entropy together: Isensee et al. 2021, doi:10.1038/s41592-020-01008-z.
    loss_of = DiceCELoss(sigmoid=True, batch=True)
    rng = np.random.default_rng(training.seed)
    shown = [_prepare(case, settings, training.patch) for case in cases]
    full = [i for i, (_, _, places, _) in enumerate(shown) if len(places)]
    optimiser = torch.optim.AdamW(module.parameters(), lr=training.rate, weight_decay=training.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, training.rate, total_steps=training.steps + 1, pct_start=0.1
    )
    module.train()
    losses = []
    for step in range(training.steps):
        picks = [_patch(rng, shown, full, training) for _ in range(training.batch)]
        seen, region = (torch.from_numpy(np.stack(parts)) for parts in zip(*picks, strict=True))
        loss = loss_of(module(seen), region)
        if not torch.isfinite(loss):
            raise InputError(f"train: the loss is not finite at step {step}. Use a smaller rate.")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 5.0)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if progress is not None:
            progress(step + 1, losses[-1])
    module.eval()
    network = Network(settings, module, {})
    scores = [
        score_region(network.find(case.exam, case.organ, augment=False).mask, case.region, case.exam.spacing).dice
        for case in kept_back
    ]
    tail = losses[-max(1, len(losses) // 20) :]
    provenance = {
        "cases": len(cases),
        "patients": len({case.patient for case in cases}),
        "sites": sorted({case.site for case in cases}),
        "data": _fingerprint(shown),
        "kept_back": len(kept_back),
        "kept_back_median_dice": float(np.median(scores)) if scores else None,
        "loss": float(np.mean(tail)),
        "training": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(training).items()},
        "versions": {"python": platform.python_version(), **{n: _version(n) for n in ("tumorcast", "torch", "monai")}},
    }
    return Network(settings, module, provenance)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


Shown = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _prepare(case: Case, settings: NetworkSettings, patch: tuple[int, ...]) -> Shown:
    """Channels and region on the network's grid, at least as large as a patch; voxels of tumour and of organ."""
    seen = channels(case.exam, case.organ, with_adc=settings.with_adc)
    step = case.exam.spacing
    seen = np.stack([resample(c, step, settings.spacing, None) for c in seen]).astype(np.float32)
    region, organ = (
        resample(mask.astype(float), step, settings.spacing, None) >= 0.5 for mask in (case.region, case.organ)
    )
    short = [(0, max(0, side - n)) for side, n in zip(patch, region.shape, strict=True)]
    seen, region, organ = np.pad(seen, [(0, 0), *short]), np.pad(region, short), np.pad(organ, short)
    return seen, region[None].astype(np.float32), np.argwhere(region), np.argwhere(organ)


def _patch(
    rng: np.random.Generator, shown: list[Shown], full: list[int], training: Training
) -> tuple[np.ndarray, np.ndarray]:
    """One augmented patch: channels and region."""
    on_tumour = rng.random() < training.on_tumour
    index = full[rng.integers(len(full))] if on_tumour else int(rng.integers(len(shown)))
    seen, region, tumour, organ = shown[index]
    places = tumour if on_tumour else organ
    middle = places[rng.integers(len(places))]
    jitter = [rng.integers(-side // 4, side // 4 + 1) for side in training.patch]
    begin = [
        int(np.clip(m + j - side // 2, 0, n - side))
        for m, j, side, n in zip(middle, jitter, training.patch, region.shape[1:], strict=True)
    ]
    box = (slice(None), *(slice(b, b + side) for b, side in zip(begin, training.patch, strict=True)))
    flip = tuple(axis for axis in (1, 2, 3) if rng.random() < 0.5)
    values, target = np.flip(seen[box], flip), np.flip(region[box], flip)
    inside = values.any(0, keepdims=True)
    factors = np.exp(training.gain * rng.standard_normal((len(values), 1, 1, 1))).astype(np.float32)
    values = values * factors + training.noise * inside * rng.standard_normal(values.shape).astype(np.float32)
    return values.astype(np.float32), np.ascontiguousarray(target)


def _fingerprint(shown: list[Shown]) -> str:
    """SHA-256 over all that was learnt from."""
    import hashlib

    total = hashlib.sha256()
    for seen, region, _, _ in shown:
        total.update(str(seen.shape).encode())
        total.update(np.ascontiguousarray(seen).tobytes())
        total.update(np.ascontiguousarray(region).tobytes())
    return total.hexdigest()
