"""The work behind ``tumorcast train``: exams to learn from, and a network's file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from biomodel.cli_show import Steps
from biomodel.errors import InputError
from biomodel.imaging.regions.learning import Training
from biomodel.imaging.regions.lessons import Lesson, virtual_lessons
from biomodel.imaging.regions.network import Network
from biomodel.imaging.regions.network_tissue import train_tissues
from biomodel.imaging.regions.training import train
from biomodel.quantify.lessons import read_lessons

__all__ = ["TISSUE_STEPS", "TUMOUR_STEPS", "gather", "teach"]

#: Steps after which more hardly help on virtual patients; about 6 and 2 minutes on one core.
TUMOUR_STEPS, TISSUE_STEPS = 2000, 600


def gather(folders: Sequence[Path], virtual: int, seed: int, shown: Steps) -> tuple[list[Lesson], list[Lesson]]:
    """Return the exams of quantified patients, and those of virtual ones.

    Raises
    ------
    InputError
        If there are none, or two folders hold one patient.
    """
    found: list[Lesson] = []
    for folder in shown.track(folders):
        shown.detail(folder.name)
        lessons = read_lessons(folder)
        if {one.patient for one in lessons} & {one.patient for one in found}:
            raise InputError(f"{folder}: patient {lessons[0].patient} was read already. Name each patient once.")
        found += lessons
    made: list[Lesson] = []
    for number in shown.track(range(virtual)):
        shown.detail(f"virtual patient {number + 1} of {virtual}")
        made += virtual_lessons([VIRTUAL_SEEDS * seed + number])
    if not found and not made:
        raise InputError("train: nothing to learn from. Name folders of quantified patients, or use --virtual.")
    return found, made


#: Seeds of virtual patients that one seed of the command may use, so that two commands share none.
VIRTUAL_SEEDS = 10_000


def teach(
    own: Sequence[Lesson], virtual: Sequence[Lesson], keep_back: int, training: Training, shown: Steps, *,
    tissues: bool, fat_suppressed: bool,
) -> tuple[Network, str]:  # fmt: skip
    """Train a network; return it and a line on how well it does on what was kept back.

    Kept back are patients of the user's own, where there are any: virtual ones tell little about them.

    Raises
    ------
    InputError
        If more patients are to be kept back than there are, or nothing can be learnt.
    """
    lessons = [*own, *virtual]
    patients = sorted({one.patient for one in own or virtual})
    if keep_back > len(patients) or keep_back == len({one.patient for one in lessons}):
        raise InputError(
            f"train: {keep_back} of {len(patients)} {'quantified' if own else 'virtual'} patients kept back; expected "
            "fewer, so that some are left to learn from."
        )
    kept = set(np.random.default_rng(training.seed).permutation(patients)[:keep_back].tolist())

    def progress(step: int, loss: float) -> None:
        shown.detail(f"step {step} of {training.steps}, loss {loss:.3f}")

    if tissues:
        cases = [(one.patient in kept, one.tissue(fat_suppressed=fat_suppressed)) for one in lessons]
        learnt, scored = ([case for out, case in cases if out is side] for side in (False, True))
        made: Network = train_tissues(learnt, training=training, kept_back=scored, progress=progress)
        score, what = made.provenance["kept_back_median_error"], "mean error of the fibroglandular fraction"
    else:
        tumours = [(one.patient in kept, one.tumour()) for one in lessons]
        some, others = ([case for out, case in tumours if out is side] for side in (False, True))
        made = train(some, training=training, kept_back=others, progress=progress)
        score, what = made.provenance["kept_back_median_dice"], "Dice"
    if not isinstance(score, float):
        return made, "No patient was kept back, so nothing is known of how well it does. Use --keep-back."
    return made, f"{len(kept)} patients kept back: median {what} {score:.3f}"
