"""Pretraining an encoder without labels, and fine-tuning it with a few.

Pretraining has three parts: blocks of the volumes are hidden, the same in all phases of a visit, and have to be filled
in from what is around them and from other visits (masked autoencoding, He et al. 2022, arXiv:2111.06377); the tumour's
mean in every volume, its curve of enhancement, has to be read from the patient's embedding by when and how the volume
was measured; and two augmented views of a patient have to be told as one among others (Chen et al. 2020,
arXiv:2002.05709).

Whether that helps has to be measured for each task. On the virtual one of `tests/benchmarks/bench_encoder.py`, sixteen
labels and a rate of washout, it did not: ridge regression on four measured numbers was far ahead of every encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from biomodel.errors import InputError
from biomodel.imaging.encoder import Encoder
from biomodel.imaging.encoder_augment import Augmentation, hidden_blocks
from biomodel.imaging.encoder_loop import Loop, Outcome, run
from biomodel.imaging.encoder_study import CHANNELS, KINDS, Batch, Study, collate

__all__ = ["FineTuning", "Predictor", "Pretraining", "fine_tune", "pretrain"]

#: Channels that can be filled in, by kind of volume.
_SEEN = {"dce": ("signal", "gain"), "adc": ("adc",), "t2": ("t2",)}
_IMAGES = len(CHANNELS) - 1


@dataclass(frozen=True)
class Pretraining:
    """How an encoder learns without labels.

    Parameters
    ----------
    loop : Loop
    augmentation : Augmentation
    block, hidden : int, float
        Side of the hidden cubes, voxels, and the part of all that is hidden.
    curves, contrast : float
        Weights of the tumour's curves and of the contrastive loss beside the filled blocks; 0 leaves one out.
    temperature : float
        Of the contrastive loss.
    """

    loop: Loop = field(default_factory=Loop)
    augmentation: Augmentation = field(default_factory=Augmentation)
    block: int = 4
    hidden: float = 0.5
    curves: float = 1.0
    contrast: float = 0.1
    temperature: float = 0.2

    def __post_init__(self) -> None:
        if self.block < 1 or not 0 < self.hidden < 1 or min(self.contrast, self.curves) < 0 or self.temperature <= 0:
            raise InputError(f"Pretraining: {self}; expected a block, and a part between 0 and 1 that is hidden.")


@dataclass(frozen=True)
class FineTuning:
    """How an encoder learns from labels.

    Parameters
    ----------
    loop : Loop
    augmentation : Augmentation
    frozen : bool
        Train the new head alone.
    falling : float
        Factor on the learning rate from the head to the transformer, and again to the convolutional network: what was
        learned first changes least (Howard and Ruder 2018, arXiv:1801.06146).
    loss : callable
        Predictions and labels (n,) that are known, to a mean; ``torch.nn.functional.binary_cross_entropy_with_logits``
        for classes of 0 and 1.
    """

    loop: Loop = field(default_factory=Loop)
    augmentation: Augmentation = field(default_factory=Augmentation)
    frozen: bool = False
    falling: float = 0.3
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.mse_loss

    def __post_init__(self) -> None:
        if not 0 < self.falling <= 1:
            raise InputError(f"FineTuning: falling {self.falling}; expected a factor above 0 and up to 1.")


@dataclass(frozen=True, eq=False)
class _Views:
    """Two augmented views of the same patients, and where they are hidden (n, 1, z, y, x)."""

    one: Batch
    two: Batch | None
    hidden: Tensor

    def to(self, device: Any) -> _Views:
        two = None if self.two is None else self.two.to(device)
        return _Views(self.one.to(device), two, self.hidden.to(device))

    def part(self, first: int, last: int) -> _Views:
        rows = (self.one.patient >= first) & (self.one.patient < last)
        two = None if self.two is None else self.two.part(first, last)
        return _Views(self.one.part(first, last), two, self.hidden[rows])


class _Filling(nn.Module):
    """The encoder with what pretraining alone needs: a decoder of hidden blocks, and a projection for contrasts."""

    def __init__(self, encoder: Encoder, seed: int):
        super().__init__()
        self.encoder = encoder
        width = encoder.settings.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.narrow = nn.Conv3d(encoder.maps + width, 16, 1)
            self.fill = nn.Sequential(nn.SiLU(), nn.Conv3d(16, 16, 3, padding=1), nn.SiLU(), nn.Conv3d(16, _IMAGES, 1))
            self.curve = nn.Linear(encoder.context, _IMAGES * (width + 1))
            self.view = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


class _Pretrain:
    def __init__(self, encoder: Encoder, studies: Sequence[Study], settings: Pretraining):
        self.studies, self.settings = studies, settings
        self.module = _Filling(encoder, settings.loop.seed)

    def groups(self, rate: float) -> list[dict[str, Any]]:
        return [{"params": list(self.module.parameters()), "lr": rate}]

    def batch(self, size: int, rng: np.random.Generator) -> _Views:
        chosen = [self.studies[i] for i in rng.choice(len(self.studies), size, replace=size > len(self.studies))]
        s = self.settings

        def view() -> Batch:
            return collate(chosen, {i: s.augmentation(one, rng) for i, one in enumerate(chosen)})

        one = view()
        where = []
        for study in chosen:
            visits = [hidden_blocks(scan.shape, s.block, s.hidden, rng) for scan in study.scans]
            where += [visits[visit] for visit, *_ in study.volumes()]
        return _Views(one, view() if s.contrast else None, torch.from_numpy(np.stack(where))[:, None])

    def loss(self, batch: _Views) -> Tensor:
        encoder, one = self.module.encoder, batch.one
        images, mask = one.volumes[:, :-1], one.volumes[:, -1:]
        shown = replace(one, volumes=torch.cat((images * ~batch.hidden, mask), 1))
        maps = encoder.features(shown)
        embedding, tokens = encoder.tokens(shown, maps)
        spread = tokens.to(maps.dtype)[:, :, None, None, None].expand(-1, -1, *maps.shape[2:])
        narrow = self.module.narrow(torch.cat((maps, spread), 1))
        # Means over two voxels along each axis: an eighth of the work, and voxel noise is no subject to learn.
        half = [-(-n // 2) for n in images.shape[2:]]
        target = nn.functional.interpolate(torch.asinh(images), half, mode="area")
        hidden = nn.functional.interpolate(batch.hidden.float(), half, mode="area")
        filled = self.module.fill(nn.functional.interpolate(narrow, half, mode="trilinear"))
        there = torch.zeros(len(KINDS), _IMAGES, device=images.device)
        for kind, names in _SEEN.items():
            there[KINDS.index(kind), [CHANNELS.index(n) for n in names]] = 1
        weight = hidden * there[one.kind][:, :, None, None, None]
        misfit = nn.functional.smooth_l1_loss(filled.float(), target, reduction="none", beta=0.1)
        loss = (misfit * weight).sum() / weight.sum()
        if self.settings.curves:
            true = (torch.asinh(images) * mask).sum((2, 3, 4)) / mask.sum((2, 3, 4)).clamp_min(1.0)
            # Linear in the embedding: what a few labels can use later.
            reading = self.module.curve(encoder.said(one)).reshape(len(images), _IMAGES, -1)
            told = (reading[..., :-1] * embedding[one.patient][:, None]).sum(2) + reading[..., -1]
            known = there[one.kind] * (mask.amax((2, 3, 4)) > 0)
            misfit = nn.functional.smooth_l1_loss(told.float(), true, reduction="none", beta=0.1)
            loss = loss + self.settings.curves * (misfit * known).sum() / known.sum().clamp_min(1.0)
        if batch.two is not None and one.size > 1:
            loss = loss + self.settings.contrast * self._contrast(embedding, encoder(batch.two))
        return loss

    def _contrast(self, a: Tensor, b: Tensor) -> Tensor:
        views = nn.functional.normalize(self.module.view(torch.cat((a, b))).float(), dim=1)
        near = views @ views.T / self.settings.temperature
        near = near.masked_fill(torch.eye(len(views), dtype=torch.bool, device=near.device), float("-inf"))
        n = len(a)
        partner = torch.cat((torch.arange(n, 2 * n), torch.arange(n))).to(near.device)
        return nn.functional.cross_entropy(near, partner)


def pretrain(encoder: Encoder, studies: Sequence[Study], settings: Pretraining = Pretraining(),  # noqa: B008
             checkpoint: str | PathLike[str] | None = None,
             progress: Callable[[int, float], None] | None = None) -> Outcome:  # fmt: skip
    """Train an encoder, in place, on studies without labels.

    Parameters
    ----------
    encoder : Encoder
    studies : sequence of Study
        Of one shape.
    settings : Pretraining
    checkpoint : path, optional
        Written along the way; a run that was stopped goes on from it and ends with the same weights.
    progress : callable, optional
        Called with the number of steps done and the loss.

    Raises
    ------
    InputError
        If there are no studies, or as :func:`biomodel.imaging.encoder_loop.run` says.
    """
    if not studies:
        raise InputError("pretrain: there are no studies.")
    return run(_Pretrain(encoder, studies, settings), settings.loop, checkpoint, progress)


class Predictor(nn.Module):
    """An encoder with a linear head on its embedding.

    Attributes
    ----------
    mean, sd : tensor, shape (outputs,)
        Scale of the labels, which predictions are brought back to.
    """

    mean: Tensor
    sd: Tensor

    def __init__(self, encoder: Encoder, outputs: int, seed: int = 0):
        super().__init__()
        self.encoder = encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Linear(encoder.settings.width, outputs)
            # The first predictions are the labels' means.
            nn.init.normal_(self.head.weight, std=1e-2)
            nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.zeros(outputs))
        self.register_buffer("sd", torch.ones(outputs))

    def forward(self, batch: Batch) -> Tensor:
        """Predictions (patients, outputs) in units of the labels' spread."""
        return self.head(self.encoder(batch))

    def predict(self, studies: Sequence[Study], batch: int = 4) -> np.ndarray:
        """Predictions (patients, outputs) in the labels' units; logits where classes were learned."""
        self.eval()
        head = self.head.to("cpu")
        with torch.inference_mode():
            found = head(self.encoder.encode(studies, batch)) * self.sd.cpu() + self.mean.cpu()
        return found.numpy()


@dataclass(frozen=True, eq=False)
class _Labelled:
    one: Batch
    labels: Tensor

    def to(self, device: Any) -> _Labelled:
        return _Labelled(self.one.to(device), self.labels.to(device))

    def part(self, first: int, last: int) -> _Labelled:
        return _Labelled(self.one.part(first, last), self.labels[first:last])


class _FineTune:
    def __init__(self, module: Predictor, studies: Sequence[Study], labels: Tensor, settings: FineTuning):
        self.module, self.studies, self.labels, self.settings = module, studies, labels, settings

    def groups(self, rate: float) -> list[dict[str, Any]]:
        m, s = self.module, self.settings
        network = list(m.encoder.backbone.parameters())
        inside = {id(p) for p in network}
        rest = [p for p in m.encoder.parameters() if id(p) not in inside]
        for p in network + rest:
            p.requires_grad_(not s.frozen)
        found = [{"params": list(m.head.parameters()), "lr": rate}]
        if not s.frozen:
            found += [{"params": rest, "lr": rate * s.falling}, {"params": network, "lr": rate * s.falling**2}]
        return found

    def batch(self, size: int, rng: np.random.Generator) -> _Labelled:
        chosen = rng.choice(len(self.studies), size, replace=size > len(self.studies))
        studies = [self.studies[i] for i in chosen]
        changed = {i: self.settings.augmentation(one, rng) for i, one in enumerate(studies)}
        return _Labelled(collate(studies, changed), self.labels[chosen])

    def loss(self, batch: _Labelled) -> Tensor:
        found = self.module(batch.one).float()
        known = torch.isfinite(batch.labels)
        if not bool(known.any()):
            return 0.0 * found.sum()
        return self.settings.loss(found[known], batch.labels[known])


def fine_tune(encoder: Encoder, studies: Sequence[Study], labels: np.ndarray,
              settings: FineTuning = FineTuning(),  # noqa: B008
              checkpoint: str | PathLike[str] | None = None,
              progress: Callable[[int, float], None] | None = None) -> tuple[Predictor, Outcome]:  # fmt: skip
    """Train an encoder with a new head on labelled studies.

    Parameters
    ----------
    encoder : Encoder
        Changed in place unless frozen.
    studies : sequence of Study
    labels : ndarray, shape (studies, outputs)
        NaN where a label is not known. Labels of 0 and 1 alone are classes; others are brought to mean 0 and sd 1.
    settings : FineTuning
    checkpoint, progress
        As for :func:`pretrain`.

    Raises
    ------
    InputError
        If labels and studies do not fit, or an output has no label; and as `pretrain`.
    """
    values = torch.as_tensor(np.asarray(labels, np.float32))
    if values.ndim != 2 or len(values) != len(studies) or not len(studies):
        raise InputError(f"fine_tune: labels of shape {tuple(values.shape)} for {len(studies)} studies; expected "
                         "(studies, outputs).")  # fmt: skip
    if not bool(torch.isfinite(values).any(0).all()):
        raise InputError("fine_tune: an output has no label at all.")
    predictor = Predictor(encoder, values.shape[1], settings.loop.seed)
    for i, column in enumerate(values.T):
        known = column[torch.isfinite(column)]
        if not bool(torch.isin(known, torch.tensor([0.0, 1.0])).all()) and len(known) > 1:
            predictor.mean[i], predictor.sd[i] = known.mean(), known.std().clamp_min(1e-6)
    scaled = (values - predictor.mean) / predictor.sd
    return predictor, run(_FineTune(predictor, studies, scaled, settings), settings.loop, checkpoint, progress)
