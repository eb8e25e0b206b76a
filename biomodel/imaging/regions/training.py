"""Training of the tumour network on exams with known regions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from biomodel.errors import InputError
from biomodel.imaging.regions.exam import Exam
from biomodel.imaging.regions.learning import Training, learn, on_own_voxels, provenance_of, refuse_shared
from biomodel.imaging.regions.network import NetworkSettings
from biomodel.imaging.regions.network_tumour import TumourNetwork
from biomodel.imaging.regions.scores import score_region

__all__ = ["Case", "train"]


@dataclass(frozen=True, eq=False)
class Case:
    """An exam with its region, to learn from.

    Parameters
    ----------
    exam : Exam
    organ, region : ndarray of bool, shape (z, y, x)
        The region may be empty: that there is nothing has to be learnt too.
    patient, site : str
        Whose it is. Exams of one patient are never in part learnt from and in part kept back.
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


def train(
    cases: Sequence[Case],
    settings: NetworkSettings = NetworkSettings(),  # noqa: B008 (immutable)
    training: Training = Training(),  # noqa: B008
    *,
    kept_back: Sequence[Case] = (),
    progress: Callable[[int, float], None] | None = None,
) -> TumourNetwork:
    """Train a network to find tumours.

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
    TumourNetwork

    Raises
    ------
    InputError
        If there is no case with a tumour, a patient is also among those kept back, a patch does not fit the network, or
        MONAI is not installed.
    """
    if not any(case.region.any() for case in cases):
        raise InputError(f"train: none of {len(cases)} cases has a tumour region; there is nothing to learn.")
    refuse_shared({case.patient for case in cases}, {case.patient for case in kept_back})
    everywhere = (np.ones(case.exam.shape, bool) for case in cases)
    shown = [
        on_own_voxels(case.exam, case.organ, case.region.astype(float), known, settings, training.patch)
        for case, known in zip(cases, everywhere, strict=True)
    ]
    # Voxels half full of tumour are on one side or the other, as in the regions that readers draw.
    shown = [replace(one, target=(one.target >= 0.5).astype(np.float32)) for one in shown]
    module, loss = learn(shown, settings, training, _overlap_loss(), progress)
    network = TumourNetwork(settings, module, {})
    scores = [
        score_region(network.find(case.exam, case.organ, augment=False).mask, case.region, case.exam.spacing).dice
        for case in kept_back
    ]
    provenance = provenance_of(cases, shown, training, loss) | {
        "kept_back": len(kept_back),
        "kept_back_median_dice": float(np.median(scores)) if scores else None,
    }
    return TumourNetwork(settings, module, provenance)


def _overlap_loss() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Overlap and cross-entropy together: Isensee et al. 2021, doi:10.1038/s41592-020-01008-z; every voxel counts."""
    try:
        from monai.losses import DiceCELoss
    except ImportError:
        raise InputError(
            "training a network needs MONAI, which is not installed. Install it with pip install 'tumorcast[imaging]'."
        ) from None
    loss = DiceCELoss(sigmoid=True, batch=True)
    return lambda logits, target, weight: loss(logits, target)
