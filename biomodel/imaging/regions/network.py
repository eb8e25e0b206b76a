"""A small 3D U-Net (MONAI): what it sees, how it is asked, and how it is kept in a file.

Çiçek et al. 2016, doi:10.1007/978-3-319-46723-8_49, in the variant with residual units that MONAI brings. What it is
asked for is the subject of :mod:`biomodel.imaging.regions.network_tumour` and
:mod:`biomodel.imaging.regions.network_tissue`. Weights come from training on a user's own regions or on practice exams
of virtual patients. There are none in the package: a network knows only what it was shown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from biomodel.errors import InputError
from biomodel.files import atomic_write
from biomodel.imaging.regions.exam import Exam

__all__ = ["Network", "NetworkSettings", "channels", "resample"]

#: ADC that enters as 1, mm²/s.
ADC_SCALE = 2.0e-3


@dataclass(frozen=True)
class NetworkSettings:
    """Shape of a network.

    Parameters
    ----------
    features : tuple of int
        Channels of each level; the first two have the full resolution, each further one half of the one before.
    residual_units : int
        Per level.
    spacing : (float, float, float)
        Voxel sides (z, y, x) on which it works, mm; exams of other spacings are resampled to it and back.
    with_adc : bool
        Whether it also sees the ADC map. Diffusion images are coarse and shifted against the others by distortion, so
        not by default.
    """

    features: tuple[int, ...] = (8, 16, 32, 48, 64)
    residual_units: int = 1
    spacing: tuple[float, float, float] = (2.5, 1.5, 1.5)
    with_adc: bool = False

    def __post_init__(self) -> None:
        if len(self.features) < 2 or min(self.features) < 1 or self.residual_units < 0:
            raise InputError(f"network: features {self.features}; expected two levels or more.")
        if len(self.spacing) != 3 or not min(self.spacing) > 0:
            raise InputError(f"network: spacing {self.spacing}; expected three voxel sides in mm.")

    @property
    def multiple(self) -> int:
        """Sides of what it sees are multiples of this."""
        return int(np.prod(self.strides))

    @property
    def strides(self) -> tuple[int, ...]:
        """From level to level. None in the first: an edge between voxels cannot come from a halved image."""
        return (1,) + (2,) * (len(self.features) - 2)

    def build(self) -> nn.Module:
        """Return an untrained network, (batch, channels, z, y, x) to logits (batch, 1, z, y, x)."""
        try:
            from monai.networks.nets import UNet
        except ImportError:
            raise InputError(
                "the networks of regions need MONAI, which is not installed. Install it with pip install "
                "'tumorcast[imaging]'."
            ) from None
        return UNet(
            spatial_dims=3, in_channels=6 if self.with_adc else 5, out_channels=1, channels=self.features,
            strides=self.strides, num_res_units=self.residual_units,
            # Not by instance: means over a whole image and over the patches of training are not the same.
            norm="BATCH",
        )  # fmt: skip


def channels(exam: Exam, organ: np.ndarray, *, with_adc: bool = False) -> np.ndarray:
    """What a network sees of an exam, float32 (channels, z, y, x); 0 outside of the organ.

    Signal before contrast, and gains of signal early and late, each over the 95th percentile of the signal before
    contrast (that of gland, whether or not fat is suppressed); the early gain over the voxel's own signal, in which the
    receiver's bias cancels; the early gain over its 99th percentile in the organ, which tells in any patch how strong
    the strongest is; and the ADC. All pass through asinh, so that noise in dark voxels does not shout.

    Raises
    ------
    InputError
        If the ADC is asked for and missing.
    """
    inside = exam.mask(organ, "network: organ") & exam.sound
    # Smoothed for the percentiles, which would be those of the noise.
    soft = [ndimage.gaussian_filter(np.where(inside, image, 0.0), 1.0) for image in (exam.before, exam.early)]
    unit = float(np.percentile(soft[0][inside], 95))
    top = max(float(np.percentile((soft[1] - soft[0])[inside], 99)), 0.1 * unit)
    gain = exam.early - exam.before
    images = [
        exam.before / unit,
        gain / unit,
        (exam.late - exam.before) / unit,
        gain / np.maximum(exam.before, 0.2 * unit),
        gain / top,
    ]
    if with_adc:
        if exam.adc is None:
            raise InputError("network: it was trained with ADC maps, and the exam has none.")
        images.append(np.nan_to_num(exam.adc) / ADC_SCALE)
    return np.where(inside, np.arcsinh(np.stack(images)), 0.0).astype(np.float32)


def resample(values: np.ndarray, spacing: tuple[float, ...], target: tuple[float, ...], shape: tuple[int, ...] | None,
             *, nearest: bool = False) -> np.ndarray:  # fmt: skip
    """Values (z, y, x) at other spacing, with the same middle; `shape` by default covers the same extent."""
    steps = np.asarray(target) / np.asarray(spacing)
    if shape is None:
        shape = tuple(max(1, round(n / step)) for n, step in zip(values.shape, steps, strict=True))
    if shape == values.shape and np.allclose(steps, 1, rtol=1e-3):
        return values
    offset = (np.asarray(values.shape) - 1) / 2 - steps * (np.asarray(shape) - 1) / 2
    # Coarser voxels are means of finer ones, not picks.
    widths = 0.0 if nearest else np.sqrt(np.maximum(steps**2 - 1, 0) / 12)
    soft = values if nearest else ndimage.gaussian_filter(values.astype(float), widths)
    return ndimage.affine_transform(soft, steps, offset, shape, order=0 if nearest else 1, mode="nearest")


def seen_by(settings: NetworkSettings, exam: Exam, organ: np.ndarray) -> np.ndarray:
    """Channels of an exam on the network's own voxels, float32 (channels, z, y, x)."""
    full = channels(exam, organ, with_adc=settings.with_adc)
    return np.stack([resample(c, exam.spacing, settings.spacing, None) for c in full]).astype(np.float32)


def entropy_of(probability: np.ndarray) -> np.ndarray:
    """Entropy of a yes or no with these probabilities, from 0 (sure) to 1 bit."""
    both = (probability, 1 - probability)
    return np.asarray(-sum(p * np.log2(np.maximum(p, 1e-12)) for p in both))


@dataclass(frozen=True, eq=False)
class Network:
    """A trained network that gives a number from 0 to 1 in each voxel; what it means is its subclasses' matter.

    Attributes
    ----------
    settings : NetworkSettings
    module : torch.nn.Module
    provenance : dict
        How it was trained: data, settings, seed, versions, scores on what was kept back. Plain JSON values.
    """

    #: Written into every file of weights; its number rises when channels or layout change their meaning.
    FORMAT: ClassVar[str] = ""
    #: What it looks for, as messages call it.
    SUBJECT: ClassVar[str] = ""

    settings: NetworkSettings
    module: nn.Module
    provenance: Mapping[str, object]

    def views(self, exam: Exam, organ: np.ndarray, *, augment: bool = True) -> np.ndarray:
        """Return the network's answers, shape (views, z, y, x), from 0 to 1, and 0 outside of the organ.

        Parameters
        ----------
        exam : Exam
        organ : ndarray of bool, shape (z, y, x)
        augment
            Ask eight times, mirrored along every axis, instead of once.

        Raises
        ------
        InputError
            If the organ has no signal or the network needs an ADC map that is missing.
        """
        inside = exam.mask(organ, "network: organ")
        seen = seen_by(self.settings, exam, inside)
        flips = [tuple(a for a in (2, 3, 4) if code >> (a - 2) & 1) for code in range(8 if augment else 1)]
        views = self._ask(torch.from_numpy(seen)[None], flips)
        views = np.stack([resample(v, self.settings.spacing, exam.spacing, exam.shape) for v in views])
        return np.where(inside, np.clip(views, 0, 1), 0.0)

    def _ask(self, seen: Tensor, flips: list[tuple[int, ...]]) -> np.ndarray:
        """Probabilities (views, z, y, x) of one exam (1, channels, z, y, x)."""
        multiple = self.settings.multiple
        shape = seen.shape[2:]
        extra = [-n % multiple for n in shape]
        padded = nn.functional.pad(seen, [p for e in reversed(extra) for p in (0, e)])
        self.module.eval()
        views = []
        with torch.inference_mode():
            for flip in flips:
                logits = self.module(padded.flip(flip)).flip(flip)
                views.append(torch.sigmoid(logits)[0, 0, : shape[0], : shape[1], : shape[2]].numpy())
        return np.stack(views)

    @property
    def digest(self) -> str:
        """SHA-256 of settings, provenance and weights."""
        return _digest(self.module.state_dict(), _header(self.settings, self.provenance))

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> str:
        """Write weights, settings and provenance to a file that is read without running code; return its digest.

        Raises
        ------
        OutputError
            If it cannot be written, or exists and may not be replaced.
        """
        header = _header(self.settings, self.provenance)
        state = {name: value.detach().cpu() for name, value in self.module.state_dict().items()}
        digest = _digest(state, header)
        with atomic_write(path, overwrite=overwrite) as temporary:
            torch.save({"format": self.FORMAT, "header": header, "state": state, "sha256": digest}, temporary)
        return digest

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read a network that :meth:`save` wrote; nothing in the file is run.

        Raises
        ------
        InputError
            If the file is missing, holds no network of this subject, is of another version, or its contents do not
            match its digest; or if MONAI is not installed.
        """
        source = Path(path)
        if not source.is_file():
            raise InputError(
                f"{source}: there is no such file of network weights. Train one first, with 'tumorcast train'."
            )
        try:
            content = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged or foreign file provokes in the reader
            raise InputError(
                f"{source}: is no file of network weights ({type(error).__name__}). Give one that 'tumorcast train' "
                "wrote."
            ) from error
        found = str(content.get("format", "")) if isinstance(content, dict) else ""
        kind = cls.FORMAT.rstrip("0123456789")
        if not found.startswith(kind):
            what = f"holds a {found!r}" if found else "holds no network of this package"
            raise InputError(f"{source}: {what}; expected a network for {cls.SUBJECT} ({cls.FORMAT!r}).")
        if found != cls.FORMAT:
            raise InputError(f"{source}: format {found!r}; this version reads {cls.FORMAT!r}. Train it anew.")
        state, header = content.get("state"), content.get("header")
        sound = (
            isinstance(state, dict) and isinstance(header, str) and all(isinstance(v, Tensor) for v in state.values())
        )
        if not sound or _digest(state, header) != content.get("sha256"):
            raise InputError(
                f"{source}: weights and settings do not match their digest; the file was changed or damaged."
            )
        plain = json.loads(header)
        known = {field.name for field in fields(NetworkSettings)}
        if set(plain["settings"]) != known:
            raise InputError(f"{source}: settings {sorted(plain['settings'])}; expected {sorted(known)}.")
        settings = replace(
            NetworkSettings(**plain["settings"]),
            features=tuple(plain["settings"]["features"]),
            spacing=tuple(plain["settings"]["spacing"]),
        )
        module = settings.build()
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise InputError(f"{source}: its weights do not fit its settings. Train it anew.") from error
        module.eval()
        return cls(settings, module, plain["provenance"])


def _header(settings: NetworkSettings, provenance: Mapping[str, object]) -> str:
    return json.dumps({"settings": asdict(settings), "provenance": dict(provenance)}, sort_keys=True)


def _digest(state: Mapping[str, Tensor], header: str) -> str:
    total = hashlib.sha256(header.encode())
    for name in sorted(state):
        values = state[name].detach().cpu().contiguous()
        total.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        total.update(values.numpy().tobytes())
    return total.hexdigest()
