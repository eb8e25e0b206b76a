"""Fibroglandular and adipose tissue by a network: a fraction in each voxel, and how far its views agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from biomodel.errors import InputError
from biomodel.imaging.regions.exam import Exam
from biomodel.imaging.regions.learning import Shown, Training, learn, on_own_voxels, provenance_of, refuse_shared
from biomodel.imaging.regions.network import Network, NetworkSettings
from biomodel.imaging.regions.tissue import Tissues, doubts_of, receiver_bias

__all__ = ["TissueCase", "TissueNetwork", "train_tissues"]


@dataclass(frozen=True, eq=False)
class TissueCase:
    """An exam with its tissue, to learn from.

    Parameters
    ----------
    exam : Exam
    organ : ndarray of bool, shape (z, y, x)
    fibroglandular : ndarray, shape (z, y, x)
        Fraction from 0 to 1; NaN where it is not known, such as in a tumour, and not asked for outside of the organ.
    fat_suppressed : bool
        Whether fat is the darker tissue.
    patient, site : str
        Whose it is. Exams of one patient are never in part learnt from and in part kept back.

    Raises
    ------
    InputError
        If a shape differs, values lie outside of 0 to 1, or nothing is known inside of the organ.
    """

    exam: Exam
    organ: np.ndarray
    fibroglandular: np.ndarray
    fat_suppressed: bool
    patient: str
    site: str = ""

    def __post_init__(self) -> None:
        values, organ = np.asarray(self.fibroglandular, float), np.asarray(self.organ).astype(bool)
        if values.shape != self.exam.shape or organ.shape != self.exam.shape:
            raise InputError(
                f"case of {self.patient}: fibroglandular of shape {values.shape}, organ of {organ.shape}; expected "
                f"{self.exam.shape}, that of the images."
            )
        known = values[organ & np.isfinite(values)]
        if not known.size or known.min() < 0 or known.max() > 1:
            found = f"{known.min():g} to {known.max():g}" if known.size else "no known value"
            raise InputError(
                f"case of {self.patient}: fibroglandular {found} in the organ; expected fractions from 0 to 1."
            )
        object.__setattr__(self, "organ", organ)
        object.__setattr__(self, "fibroglandular", np.where(organ, values, np.nan))


@dataclass(frozen=True, eq=False)
class TissueNetwork(Network):
    """A network trained to tell fibroglandular from adipose tissue, by :func:`train_tissues`.

    Examples
    --------
    >>> network = TissueNetwork.load("tissue.pt")  # doctest: +SKIP
    >>> network.split(exam, organ, fat_suppressed=True).share  # doctest: +SKIP
    """

    FORMAT: ClassVar[str] = "tumorcast tissue network 1"
    SUBJECT: ClassVar[str] = "fibroglandular tissue"

    def split(self, exam: Exam, organ: np.ndarray, *, fat_suppressed: bool, augment: bool = True) -> Tissues:
        """Split an organ into fibroglandular and adipose tissue.

        Parameters
        ----------
        exam : Exam
        organ : ndarray of bool, shape (z, y, x)
        fat_suppressed
            Whether fat is the darker tissue; the network must have seen such images.
        augment
            Ask eight times, mirrored along every axis, instead of once.

        Returns
        -------
        Tissues
            With the spread between the views. In a tumour it says what the tissue looks like to the network.

        Raises
        ------
        InputError
            If the network saw no such images, or the organ has no signal.
        """
        learnt = self.provenance.get("fat_suppressed")
        if not isinstance(learnt, list) or bool(fat_suppressed) not in learnt:
            raise InputError(
                f"tissue network: the images are {_words(fat_suppressed)}, and it learnt from images "
                f"{' and '.join(_words(one) for one in learnt) if isinstance(learnt, list) else 'of unknown kind'}. "
                "Train it on such images, or use fuzzy c-means."
            )
        inside = exam.mask(organ, "tissue network: organ")
        even, bias = _even(exam, inside)
        views = self.views(even, inside, augment=augment)
        sound = inside & exam.sound
        gland = np.where(inside, np.where(sound, views.mean(0), np.nan), 0.0)
        spread = np.where(inside, np.where(sound, views.std(0), np.nan), 0.0)
        adipose = np.where(inside, 1 - gland, 0.0)
        return Tissues(gland, adipose, bias, None, doubts_of(gland[inside]), spread)


def train_tissues(
    cases: Sequence[TissueCase],
    settings: NetworkSettings = NetworkSettings(),  # noqa: B008 (immutable)
    training: Training = Training(steps=600),  # noqa: B008
    *,
    kept_back: Sequence[TissueCase] = (),
    progress: Callable[[int, float], None] | None = None,
) -> TissueNetwork:
    """Train a network for tissue.

    The loss is the cross-entropy against the fractions where these are known, which is least where the network gives
    the fraction itself; overlap would push mixed voxels to one side.

    Parameters
    ----------
    cases, settings, training, kept_back, progress
        As for :func:`biomodel.imaging.regions.train`; patches are centred on fibroglandular tissue.

    Raises
    ------
    InputError
        If no case has fibroglandular tissue, a patient is also among those kept back, a patch does not fit the network,
        or MONAI is not installed.
    """
    refuse_shared({case.patient for case in cases}, {case.patient for case in kept_back})
    shown = [_prepare(case, settings, training) for case in cases]
    if not any(len(one.places) for one in shown):
        raise InputError(f"train_tissues: none of {len(cases)} cases has fibroglandular tissue; nothing to learn.")
    module, loss = learn(shown, settings, training, _cross_entropy, progress)
    known = {"fat_suppressed": sorted({bool(case.fat_suppressed) for case in cases})}
    network = TissueNetwork(settings, module, known)
    errors = []
    for case in kept_back:
        found = network.split(case.exam, case.organ, fat_suppressed=case.fat_suppressed, augment=False)
        errors.append(float(np.nanmean(np.abs(found.fibroglandular - case.fibroglandular))))
    provenance = provenance_of(cases, shown, training, loss) | known
    provenance |= {
        "kept_back": len(kept_back),
        "kept_back_median_error": float(np.median(errors)) if errors else None,
    }
    return TissueNetwork(settings, module, provenance)


def _words(fat_suppressed: bool) -> str:
    return "with fat suppression" if fat_suppressed else "without fat suppression"


def _even(exam: Exam, organ: np.ndarray) -> tuple[Exam, np.ndarray]:
    """The exam without the receiver's bias, as fuzzy c-means sees it, and that bias."""
    bias = receiver_bias(exam.before, organ & exam.sound, exam.spacing)
    return Exam(exam.before / bias, exam.early / bias, exam.late / bias, exam.spacing, exam.adc), bias


def _prepare(case: TissueCase, settings: NetworkSettings, training: Training) -> Shown:
    even, _ = _even(case.exam, case.organ)
    known = np.isfinite(case.fibroglandular)
    target = np.where(known, case.fibroglandular, 0.0)
    return on_own_voxels(even, case.organ, target, known, settings, training.patch)


def _cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    each = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (each * weight).sum() / torch.clamp(weight.sum(), min=1.0)
