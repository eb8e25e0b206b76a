"""Training of a network on patches of exams, whatever it is to learn."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from biomodel.errors import InputError
from biomodel.imaging.regions.exam import Exam
from biomodel.imaging.regions.network import NetworkSettings, resample, seen_by

__all__ = ["Shown", "Training", "learn", "on_own_voxels", "provenance_of", "refuse_shared"]

#: Loss of logits against targets and the weights of their voxels, all (batch, 1, z, y, x).
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


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
    on_target : float
        Part of the patches whose middle lies in what is looked for.
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
    on_target: float = 0.6
    rate: float = 5.0e-3
    decay: float = 1.0e-4
    noise: float = 0.03
    gain: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1 or min(self.patch) < 1 or not 0 <= self.on_target <= 1 or self.rate <= 0:
            raise InputError(
                f"Training: steps {self.steps}, batch {self.batch}, patch {self.patch}, on_target {self.on_target:g}, "
                f"rate {self.rate:g}; expected positive numbers and a part from 0 to 1."
            )


class Source(Protocol):
    """What a case says of where it comes from."""

    @property
    def patient(self) -> str: ...

    @property
    def site(self) -> str: ...


@dataclass(frozen=True, eq=False)
class Shown:
    """One case on the network's own voxels, at least as large as a patch.

    Attributes
    ----------
    seen : ndarray of float32, shape (channels, z, y, x)
    target, weight : ndarray of float32, shape (1, z, y, x)
        What the network should say, from 0 to 1, and how much each voxel counts.
    places, organ : ndarray of int, shape (n, 3)
        Voxels of what is looked for, and of the organ.
    """

    seen: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    places: np.ndarray
    organ: np.ndarray


def refuse_shared(learnt: set[str], kept_back: set[str]) -> None:
    """Raise InputError if patients are learnt from and kept back."""
    if shared := learnt & kept_back:
        raise InputError(f"train: {sorted(shared)[:5]} are learnt from and kept back; split by patient.")


def on_own_voxels(
    exam: Exam, organ: np.ndarray, target: np.ndarray, known: np.ndarray, settings: NetworkSettings,
    patch: tuple[int, int, int],
) -> Shown:  # fmt: skip
    """Bring an exam, its target and where this is known onto the network's voxels."""
    seen = seen_by(settings, exam, organ)

    def own(values: np.ndarray) -> np.ndarray:
        return resample(values.astype(float), exam.spacing, settings.spacing, None)

    share, inside = own(known), own(organ) >= 0.5
    values = np.where(share >= 0.5, own(np.where(known, target, 0.0)) / np.maximum(share, 0.5), 0.0)
    short = [(0, max(0, side - n)) for side, n in zip(patch, inside.shape, strict=True)]
    seen, values = np.pad(seen, [(0, 0), *short]), np.pad(values, short).clip(0, 1)
    weight, inside = np.pad(share >= 0.5, short), np.pad(inside, short)
    return Shown(
        seen, values[None].astype(np.float32), weight[None].astype(np.float32), np.argwhere(values >= 0.5),
        np.argwhere(inside),
    )  # fmt: skip


def learn(
    shown: Sequence[Shown],
    settings: NetworkSettings,
    training: Training,
    loss_of: Loss,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[nn.Module, float]:
    """Train a network; return it and its mean loss over the last twentieth of the steps.

    The same cases, settings and seed give the same weights on one machine with one number of threads.

    Raises
    ------
    InputError
        If a patch does not fit the network, the loss is not finite, or MONAI is not installed.
    """
    if any(side % settings.multiple for side in training.patch):
        raise InputError(f"train: patch {training.patch}; expected multiples of {settings.multiple} voxels.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        module = settings.build()
    rng = np.random.default_rng(training.seed)
    full = [i for i, one in enumerate(shown) if len(one.places)]
    optimiser = torch.optim.AdamW(module.parameters(), lr=training.rate, weight_decay=training.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, training.rate, total_steps=training.steps + 1, pct_start=0.1
    )
    module.train()
    losses = []
    for step in range(training.steps):
        picks = [_patch(rng, shown, full, training) for _ in range(training.batch)]
        seen, target, weight = (torch.from_numpy(np.stack(parts)) for parts in zip(*picks, strict=True))
        loss = loss_of(module(seen), target, weight)
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
    return module, float(np.mean(losses[-max(1, len(losses) // 20) :]))


def _patch(
    rng: np.random.Generator, shown: Sequence[Shown], full: list[int], training: Training
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One augmented patch: channels, target and weight."""
    on_target = rng.random() < training.on_target
    index = full[rng.integers(len(full))] if on_target else int(rng.integers(len(shown)))
    one = shown[index]
    places = one.places if on_target else one.organ
    middle = places[rng.integers(len(places))]
    jitter = [rng.integers(-side // 4, side // 4 + 1) for side in training.patch]
    begin = [
        int(np.clip(m + j - side // 2, 0, n - side))
        for m, j, side, n in zip(middle, jitter, training.patch, one.target.shape[1:], strict=True)
    ]
    box = (slice(None), *(slice(b, b + side) for b, side in zip(begin, training.patch, strict=True)))
    flip = tuple(axis for axis in (1, 2, 3) if rng.random() < 0.5)
    values, target, weight = (np.flip(array[box], flip) for array in (one.seen, one.target, one.weight))
    inside = values.any(0, keepdims=True)
    factors = np.exp(training.gain * rng.standard_normal((len(values), 1, 1, 1))).astype(np.float32)
    values = values * factors + training.noise * inside * rng.standard_normal(values.shape).astype(np.float32)
    return values.astype(np.float32), np.ascontiguousarray(target), np.ascontiguousarray(weight)


def provenance_of(
    cases: Sequence[Source], shown: Sequence[Shown], training: Training, loss: float
) -> dict[str, object]:
    """How a network came about, as plain JSON values."""
    return {
        "cases": len(cases),
        "patients": len({case.patient for case in cases}),
        "sites": sorted({case.site for case in cases}),
        "data": _fingerprint(shown),
        "loss": loss,
        "training": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(training).items()},
        "versions": {"python": platform.python_version(), **{n: _version(n) for n in ("tumorcast", "torch", "monai")}},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _fingerprint(shown: Sequence[Shown]) -> str:
    """SHA-256 over all that was learnt from."""
    total = hashlib.sha256()
    for one in shown:
        total.update(str(one.seen.shape).encode())
        for array in (one.seen, one.target, one.weight):
            total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()
