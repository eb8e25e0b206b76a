"""Amortised inference: an operator that maps two early scans and a schedule to posterior and forecast in one pass.

Trained once on simulated patients of a :class:`pinn.amortised.setting.Setting`, it answers for a new patient in
milliseconds: a mixture density over parameters and start (:mod:`pinn.amortised.density`), and maps of any day by a
physics-informed DeepONet (:mod:`pinn.amortised.surrogate`) pushed through draws of that density.
:mod:`pinn.amortised.polish` then takes a few Gauss-Newton steps on the patient's own data with a classical solver.

Networks compute in float64 on a CPU: they are small, and half the time would be saved by float32 at best. On a GPU
float32 is the default; its rounding of 1e-7 is far below the noise of scans of some per cent.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from biomodel.errors import InputError
from pinn.amortised.density import Mixture, MixtureHead
from pinn.amortised.scans import Scans, Summary
from pinn.amortised.setting import Setting
from pinn.amortised.surrogate import Surrogate

#: What a checkpoint says it is, and the version of its layout.
KIND, VERSION = "tumorcast operator", 1
#: Patients whose maps are drawn at once, times draws.
AT_ONCE = 256


class CheckpointError(InputError):
    """A checkpoint cannot be used."""


@dataclass(frozen=True, eq=False)
class Amortised:
    """Posteriors of n patients by one pass of the network.

    Attributes
    ----------
    names : tuple of str
    mean, sd : ndarray, shape (n, p)
        Of the transformed coordinates.
    """

    names: tuple[str, ...]
    mixture: Mixture
    centre: torch.Tensor
    scale: torch.Tensor

    @property
    def mean(self) -> np.ndarray:
        return (self.centre + self.scale * self.mixture.moments()[0]).cpu().numpy()

    @property
    def sd(self) -> np.ndarray:
        variance = torch.diagonal(self.mixture.moments()[1], dim1=1, dim2=2)
        return (self.scale * torch.sqrt(variance)).cpu().numpy()

    @property
    def covariance(self) -> np.ndarray:
        """Covariances (n, p, p)."""
        return (self.scale[:, :, None] * self.mixture.moments()[1] * self.scale[:, None]).cpu().numpy()

    def draw(self, count: int, seed: int = 0) -> np.ndarray:
        """Draws (n, count, p) of the transformed coordinates."""
        return self._draw(count, seed).cpu().numpy()

    def _draw(self, count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator(self.centre.device).manual_seed(seed)
        return self.centre[:, None] + self.scale[:, None] * self.mixture.draw(count, generator)

    def log_density(self, z: np.ndarray) -> np.ndarray:
        """Log densities (n,) of coordinates (n, p)."""
        at = (torch.as_tensor(z).to(self.centre) - self.centre) / self.scale
        return (self.mixture.log_density(at) - torch.log(self.scale).sum(1)).cpu().numpy()

    def patient(self, row: int) -> Amortised:
        """One patient's posterior; its `log_density` takes any number of coordinates."""
        m, here = self.mixture, slice(row, row + 1)
        if not 0 <= row < len(self.centre):
            raise InputError(f"Amortised: patient {row} of {len(self.centre)}; they are numbered from 0.")
        one = Mixture(m.log_weights[here], m.means[here], m.roots[here])
        return Amortised(self.names, one, self.centre[here], self.scale[here])


@dataclass(frozen=True, eq=False)
class AmortisedForecast:
    """Maps of n patients on their days, from draws of their posteriors.

    Attributes
    ----------
    mean, sd : ndarray, shape (n, z, y, x)
    cells : ndarray, shape (n, draws)
        Sum of the cell fraction times the voxel's volume, mm³.
    """

    mean: np.ndarray
    sd: np.ndarray
    cells: np.ndarray


class Operator(torch.nn.Module):
    """Early scans and schedule to posterior and forecast.

    Parameters
    ----------
    setting : Setting
    encoder : module, optional
        Trainable, images (n, 2, z, y, x) to (n, features), with an attribute `features`: its output stands beside the
        fixed summary. `pinn.ScanEncoder` is a small one, `pinn.ImagingEncoder` makes one of an encoder of images.
    components, hidden
        Of the density; see :class:`pinn.amortised.density.MixtureHead`.
    width, products
        Of the DeepONet; see :class:`pinn.amortised.surrogate.Surrogate`.
    seed : int
    """

    def __init__(self, setting: Setting, encoder: torch.nn.Module | None = None, components: int = 3,
                 hidden: tuple[int, ...] = (128, 128), width: int = 64, products: int = 32,
                 seed: int = 0):  # fmt: skip
        super().__init__()
        self.setting, self.summary, self.encoder = setting, Summary(setting), encoder
        features = self.summary.size
        if encoder is not None:
            if not isinstance(more := getattr(encoder, "features", None), int):
                raise InputError(
                    f"Operator: the encoder {type(encoder).__name__} has no attribute 'features'; expected the number "
                    "of features that it gives for each patient."
                )
            features += more
        self.head = MixtureHead(features, len(setting.names), components, hidden, seed)
        self.surrogate = Surrogate(setting, width, products, seed)
        self.options: dict[str, Any] = {"components": components, "hidden": list(hidden), "width": width,
                                        "products": products, "encoder": type(encoder).__name__}  # fmt: skip
        self.to(torch.float64)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.head.last.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the networks' numbers."""
        return self.head.last.weight.dtype

    # One pass ---------------------------------------------------------------------------------------------------------

    def density(self, features: torch.Tensor, images: torch.Tensor | None) -> Mixture:
        """The mixture over standardised coordinates, from the summary's features and, with an encoder, the images."""
        if self.encoder is not None:
            assert images is not None, "an encoder needs the images"
            more = self.encoder(images)
            if more.shape != (expected := (len(features), self.encoder.features)):
                raise InputError(
                    f"Operator: the encoder {type(self.encoder).__name__} gave {tuple(more.shape)}; expected "
                    f"(patients, features) = {expected}."
                )
            features = torch.cat((features, more.to(features.dtype)), 1)
        return self.head(features)

    def standard(self, pivot: torch.Tensor, spread: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Centre and scale (n, p) of the coordinates: prior for the parameters, the first scan for the start."""
        m = len(self.setting.model.free)
        mean, sd = self.surrogate.mean[:m], self.surrogate.sd[:m]
        return (torch.cat((mean.expand(len(pivot), -1), pivot), 1), torch.cat((sd.expand(len(pivot), -1), spread), 1))

    @torch.no_grad()
    def posterior(self, scans: Scans) -> Amortised:
        """Posteriors of parameters and start."""
        scans = scans.to(self.device, self.dtype)
        features, pivot, spread = self.summary(scans)
        mixture = self.density(features, scans.images)
        return Amortised(self.setting.names, mixture, *self.standard(pivot, spread))

    @torch.no_grad()
    def forecast(self, scans: Scans, draws: int = 64, seed: int = 0) -> AmortisedForecast:
        """Maps of the days asked for (the second of `scans.days`), pushed through draws of the posterior."""
        scans = scans.to(self.device, self.dtype)
        z = self.posterior(scans)._draw(draws, seed)
        mean, sd, cells = [], [], []
        volume = self.setting.domain.voxel_volume
        step = max(1, AT_ONCE // draws)
        for low in range(0, len(scans), step):
            here = scans[slice(low, low + step)]
            rows = torch.arange(len(here), device=self.device).repeat_interleave(draws)
            u = self.surrogate.map(z[low : low + step].flatten(0, 1), here[rows], here.days[rows, 1])
            u = u.reshape(len(here), draws, *u.shape[1:])
            mean.append(u.mean(1))
            sd.append(u.std(1) if draws > 1 else torch.zeros_like(u[:, 0]))
            cells.append(u.sum((2, 3, 4)) * volume)
        return AmortisedForecast(*(torch.cat(part).cpu().numpy() for part in (mean, sd, cells)))

    # Files ------------------------------------------------------------------------------------------------------------

    def _told(self) -> dict[str, Any]:
        """What a checkpoint has to agree with."""
        s = self.setting
        return {
            "model": s.model.label, "names": list(s.names), "shape": list(s.domain.shape),
            "spacing": [float(v) for v in s.domain.spacing], "prior_mean": [round(float(v), 9) for v in s.prior.mean],
            "prior_sd": [round(float(v), 9) for v in s.prior.sd], "interval": list(s.interval),
            "ahead": list(s.ahead), "noise": list(s.noise), **self.options,
        }  # fmt: skip

    def save(self, path: str | Path, more: dict[str, Any] | None = None) -> None:
        """Write a checkpoint, beside and renamed; `more` is a trainer's own."""
        path = Path(path)
        beside = path.with_name(path.name + ".part")
        content = {"kind": KIND, "version": VERSION, "for": self._told(), "weights": self.state_dict(),
                   "more": more or {}}  # fmt: skip
        torch.save(content, beside)
        os.replace(beside, path)

    def restore(self, path: str | Path) -> dict[str, Any]:
        """Read weights from a checkpoint of an operator of the same setting and sizes; what a trainer left there.

        Raises
        ------
        CheckpointError
            If the file is no checkpoint of this version, or is for something else; the message says what differs.
        """
        try:
            found = torch.load(path, map_location=self.device, weights_only=True)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: there is no such file; train an operator and save it first.") from None
        except Exception as error:  # torch raises whatever its readers do
            why = type(error).__name__
            raise CheckpointError(f"{path}: not a checkpoint that can be read safely ({why}).") from error
        if not isinstance(found, dict) or found.get("kind") != KIND:
            raise CheckpointError(f"{path}: a torch file, but no {KIND}'s checkpoint.")
        if found["version"] != VERSION:
            raise CheckpointError(f"{path}: version {found['version']} of the layout; this release reads {VERSION}. "
                                  "Train again, or install the release that wrote it.")  # fmt: skip
        told, own = found["for"], self._told()
        if differ := [k for k in own if told.get(k) != own[k]]:
            k = differ[0]
            raise CheckpointError(
                f"{path}: trained for another setting ({', '.join(differ)} differ); {k} is {told.get(k)} there, here "
                f"{own[k]}. Build the operator with the setting and sizes it was trained with."
            )
        self.load_state_dict(found["weights"])
        return found["more"]
