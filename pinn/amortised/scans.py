"""What an operator sees of a patient: noisy maps of two visits, their noise, days and treatment, and a fixed summary.

The summary holds what a physicist would read off the maps first: a focus fitted to each of them, and the rings around
it in which a map differs from a focus. A network that is given these has little left to learn; a trainable encoder of
the images themselves may stand beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from biomodel.errors import InputError
from biomodel.imaging.encoder import Encoder
from biomodel.imaging.encoder_study import CHANNELS, KINDS, Batch
from biomodel.models import ReactionDiffusion
from biomodel.solvers.reaction import Course
from biomodel.treatments import Kill
from pinn.amortised.focus import FocusMaps
from pinn.amortised.makers import Arrays, dose_tables
from pinn.amortised.setting import Case, Setting

#: Middles and width of the rings, in widths of the fitted focus.
RINGS, RING = (0.3, 0.8, 1.3, 1.8, 2.3, 2.8, 3.4), 0.3
#: Parts of the time to a day at which the treatment so far is told.
SENSORS = (0.25, 0.5, 0.75, 1.0)


@dataclass(eq=False)
class Scans:
    """Patients as an operator takes them, n at once.

    Attributes
    ----------
    images : tensor, shape (n, 2, z, y, x)
        Cell fractions of two visits with noise.
    noise : tensor, shape (n,)
        Standard deviation of one voxel.
    days : tensor, shape (n, 2)
        Of the second visit and of the forecast that is asked for; the first visit is day 0.
    dose_days, dose_amounts : tensor, shape (n, agents, most)
        Doses of each agent relative to its reference dose; padded with days of infinity.
    """

    images: torch.Tensor
    noise: torch.Tensor
    days: torch.Tensor
    dose_days: torch.Tensor
    dose_amounts: torch.Tensor

    @classmethod
    def of(cls, setting: Setting, cases: Sequence[Case], images: np.ndarray) -> Scans:
        """From cases and their images (n, 2, z, y, x).

        Raises
        ------
        InputError
            If the images are on another grid, not two per case, or not finite.
        """
        images = np.asarray(images, float)
        if images.shape != (expected := (len(cases), 2, *setting.domain.shape)):
            raise InputError(f"scans: shape {images.shape}; expected (patients, visits, z, y, x) = {expected}.")
        if bad := int((~np.isfinite(images)).sum()):
            raise InputError(
                f"scans: {bad} voxels are NaN or infinite; an operator needs whole maps. Fill them in, or calibrate by "
                "pinn's joint inference, which leaves them out."
            )
        for case in cases:
            setting.model.check_schedule(case.schedule)
        doses = dose_tables(setting, cases)
        return cls(
            torch.tensor(images), torch.tensor([c.noise for c in cases], dtype=torch.float64),
            torch.tensor([c.days for c in cases], dtype=torch.float64), torch.tensor(doses["dose_days"]),
            torch.tensor(doses["dose_amounts"]),
        )  # fmt: skip

    @classmethod
    def noisy(cls, arrays: Arrays, rng: np.random.Generator) -> Scans:
        """From a maker's samples, with fresh noise."""
        noise = arrays["noise"]
        clean = arrays["states"][:, :2]
        images = clean + noise.reshape(-1, 1, 1, 1, 1) * rng.standard_normal(clean.shape)
        return cls(*(torch.tensor(a) for a in (images, noise, arrays["days"], arrays["dose_days"],
                                               arrays["dose_amounts"])))  # fmt: skip

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, rows: torch.Tensor | slice) -> Scans:
        return Scans(*(getattr(self, f.name)[rows] for f in fields(self)))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Scans:
        """The same elsewhere."""
        return Scans(*(getattr(self, f.name).to(device, dtype) for f in fields(self)))


class Doses(Course):
    """Kill exponents of many patients from tables of doses alone."""

    def __init__(self, model: ReactionDiffusion, days: torch.Tensor, amounts: torch.Tensor):
        self.model, self.doses = model, {}
        for term in model.treatments:
            for agent in term.agents if isinstance(term, Kill) else ("",):
                number = len(self.doses)
                self.doses[term.name, agent] = (days[:, number], amounts[:, number])
        self.active = list(model.treatments)


class Summary(torch.nn.Module):
    """A fixed summary of scans, and the first visit's focus, relative to which the start is told.

    Parameters
    ----------
    setting : Setting
    """

    places: torch.Tensor
    rings: torch.Tensor

    def __init__(self, setting: Setting):
        super().__init__()
        self.setting, self.maps = setting, FocusMaps(setting.start, setting.domain)
        axes = self.maps.axes
        grids = np.meshgrid(*(setting.domain.coords[a] for a in "zyx"), indexing="ij")
        self.register_buffer("places", torch.tensor(np.stack([grids[a].ravel() for a in axes], -1)))
        self.register_buffer("rings", torch.tensor(RINGS, dtype=torch.float64))

    @property
    def size(self) -> int:
        """Number of features."""
        return 10 + 2 * len(RINGS) + len(SENSORS) * len(self.setting.model.treatments)

    @torch.no_grad()
    def forward(self, scans: Scans) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features (n, size), the start's coordinates as the scans show them (n, d + 2), and their spread (n, d + 2).

        The place is that of both visits together, peak and width are those of the first.
        """
        first, second = scans.images[:, 0], scans.images[:, 1]
        both = first + second
        z1, sd1 = self.maps.fit(first, scans.noise, 1.0, both)
        z2, sd2 = self.maps.fit(second, scans.noise, 2.0, both)
        pivot, spread = z1.clone(), sd1.clone()
        weight1, weight2 = sd1[:, :-2] ** -2, sd2[:, :-2] ** -2
        pivot[:, :-2] = (weight1 * z1[:, :-2] + weight2 * z2[:, :-2]) / (weight1 + weight2)
        spread[:, :-2] = (weight1 + weight2) ** -0.5
        mean, sd = self.maps.prior_mean[-2:], self.maps.prior_sd[-2:]
        parts = [(z1[:, -2:] - mean) / sd, (z2[:, -2:] - mean) / sd]
        parts += [torch.log(s[:, -2:] / sd) + 2 for s in (sd1, sd2)]
        parts += [self._rings(first, z1, scans.noise), self._rings(second, z2, scans.noise)]
        low, high = np.log(self.setting.noise)
        parts.append((torch.log(scans.noise)[:, None] - (low + high) / 2) / max(high - low, 0.1))
        parts.append(2 * scans.days[:, :1] / self.setting.interval[1] - 1)
        parts.append(treatment(self.setting, scans, scans.days[:, 0]))
        return torch.cat(parts, 1), pivot, spread

    def _rings(self, images: torch.Tensor, z: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Means of image minus focus in rings around it, over their noise; large ones are drawn in."""
        misfit = (images - self.maps.states(z)).flatten(1)
        place, _, width = self.maps.shape_of(z)
        radius = torch.cdist(place[:, None], self.places.expand(len(z), -1, -1))[:, 0] / width[:, None]
        found = []
        for middle in self.rings:
            weight = torch.exp(-0.5 * ((radius - middle) / RING) ** 2)
            found.append((weight * misfit).sum(1) / (torch.sqrt((weight**2).sum(1)) * noise + 1e-12))
        return torch.asinh(torch.stack(found, 1) / 2)


def treatment(setting: Setting, scans: Scans, day: torch.Tensor) -> torch.Tensor:
    """Kill exponents at the parameters' medians, (n, sensors times treatments), at parts of the time to a day (n,)."""
    model, found = setting.model, []
    at = day[:, None] * torch.tensor(SENSORS, dtype=day.dtype, device=day.device)
    values = {n: torch.full((1,), p.typical, dtype=day.dtype, device=day.device) for n, p in model.parameters.items()}
    for term in model.treatments:
        doses = Doses(model, scans.dose_days, scans.dose_amounts)
        doses.active = [term]
        found.append(doses.exponent(values, at))
    return torch.cat(found, 1) if found else at[:, :0]


class ScanEncoder(torch.nn.Module):
    """A small convolutional encoder of scans, (n, 2, z, y, x) to (n, features), for grids of some tens of voxels.

    Any module with this signature and an attribute `features` may take its place.

    Parameters
    ----------
    features : int
    channels : int
        Of the first layer; each further one has twice as many on half as many voxels.
    seed : int
    """

    def __init__(self, features: int = 32, channels: int = 8, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[torch.nn.Module] = []
            sizes = (2, channels, 2 * channels, 4 * channels)
            for before, after in zip(sizes[:-1], sizes[1:], strict=True):
                layers += [torch.nn.Conv3d(before, after, 3, stride=2, padding=1), torch.nn.SiLU()]
            self.body = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool3d((1, 4, 4)), torch.nn.Flatten())
            self.last = torch.nn.Linear(sizes[-1] * 16, features)
        self.features = features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of images (n, 2, z, y, x)."""
        return self.last(self.body(images))


class ImagingEncoder(torch.nn.Module):
    """An encoder of `biomodel.imaging` as an encoder of scans: each map of cell fractions enters as a quantitative map.

    Parameters
    ----------
    encoder : biomodel.imaging.encoder.Encoder
        Fresh, or pretrained and loaded from a file.
    level : float
        Cell fraction from which a voxel belongs to the tumour, in which features are pooled.
    """

    def __init__(self, encoder: Encoder, level: float = 0.15):
        super().__init__()
        self.encoder, self.level, self.features = encoder, level, encoder.settings.width

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features (n, features) of scans (n, visits, z, y, x)."""
        n, visits = images.shape[:2]
        maps = images.reshape(n * visits, *images.shape[2:]).to(self.encoder.gather.dtype)
        volumes = maps.new_zeros(n * visits, len(CHANNELS), *maps.shape[1:])
        volumes[:, CHANNELS.index("adc")] = maps
        volumes[:, CHANNELS.index("mask")] = (maps > self.level).to(maps.dtype)
        visit = torch.arange(visits, device=maps.device).repeat(n)
        patient = torch.arange(n, device=maps.device).repeat_interleave(visits)
        kind = torch.full_like(visit, KINDS.index("adc"))
        # Days are told to the operator beside the images; here visits are only told apart.
        batch = Batch(volumes, patient, visit, visit, kind, visit.to(maps.dtype), torch.zeros_like(maps[:, 0, 0, 0]), n)
        return self.encoder(batch).to(images.dtype)
