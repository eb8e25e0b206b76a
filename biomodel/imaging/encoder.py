"""An encoder of imaging studies: a 3D network for every volume, then attention over phases, visits and modalities.

Each volume (a phase of a dynamic series, an ADC map, a T2-weighted image, of any visit) becomes one token: features of
a convolutional network averaged over the tumour and over the whole, with the day of its visit and the time of its
phase encoded as continuous numbers. A transformer (Vaswani et al. 2017, arXiv:1706.03762) reads the tokens that are
there; the patient's embedding is what a further token has gathered. How it is trained is the subject of
:mod:`biomodel.imaging.encoder_training`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from biomodel.errors import InputError
from biomodel.files import atomic_write
from biomodel.imaging.encoder_study import CHANNELS, KINDS, Batch, Study, collate

__all__ = ["FORMAT", "Encoder", "EncoderSettings", "group_norm"]

#: Written into every file; its number rises when channels or layout change their meaning.
FORMAT = "tumorcast-encoder-1"
_IMAGES = len(CHANNELS) - 1
#: Spread of the first weights by which tokens are averaged.
LOOK = 0.7


@dataclass(frozen=True)
class EncoderSettings:
    """Shape of an encoder.

    Parameters
    ----------
    features : tuple of int
        Channels of the convolutional network's levels; each halves the sides. Not used with a backbone of one's own.
    width : int
        Length of tokens and of the embedding, a multiple of `heads`.
    heads, layers : int
        Of the transformer.
    frequencies : int
        Sines and cosines of days and of seconds each, of periods from 4 to 4096.
    """

    features: tuple[int, ...] = (8, 16, 32, 64)
    width: int = 64
    heads: int = 4
    layers: int = 2
    frequencies: int = 6

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(self.features))
        if not self.features or min(*self.features, self.heads, self.layers, self.frequencies) < 1:
            raise InputError(f"encoder: {self}; expected positive numbers.")
        if self.width < 1 or self.width % self.heads:
            raise InputError(f"encoder: width {self.width}; expected a multiple of {self.heads} heads.")


def group_norm(module: nn.Module, groups: int = 8) -> nn.Module:
    """Replace every batch normalisation in a network by group normalisation, in place; return the network.

    Batches of few volumes have no mean worth using (Wu and He 2018, doi:10.1007/978-3-030-01261-8_1).
    """
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, nn.GroupNorm(math.gcd(groups, child.num_features), child.num_features))
        else:
            group_norm(child, groups)
    return module


def _plain(features: Sequence[int]) -> nn.Module:
    """Levels of two convolutions, the first of which halves the sides."""
    levels: list[nn.Module] = []
    before = len(CHANNELS)
    for count in features:
        for a, stride in ((before, 2), (count, 1)):
            levels.append(nn.Conv3d(a, count, 3, stride, 1, bias=False))
            # Groups of eight channels: normalising each by itself would take the strength of enhancement away.
            levels += [nn.GroupNorm(count // 8 if count % 8 == 0 else 1, count), nn.SiLU()]
        before = count
    return nn.Sequential(*levels)


class Encoder(nn.Module):
    """Studies to embeddings.

    Parameters
    ----------
    settings : EncoderSettings
    backbone : torch.nn.Module, optional
        A network from (n, 5, z, y, x) to feature maps (n, f, z', y', x'), or a list of maps of which the last counts,
        such as MONAI's ``ResNetFeatures("resnet18", pretrained=False, in_channels=5)``. Batch normalisation in it is
        replaced. A small network of `settings.features` by default.
    seed : int
        Of the first weights (those of a given backbone are its own).

    Examples
    --------
    >>> import numpy as np
    >>> from biomodel.imaging.encoder_study import Scan, Study
    >>> scan = Scan(0.0, dce=np.ones((3, 8, 16, 16)), times=[-10, 60, 300], mask=np.ones((8, 16, 16), bool))
    >>> Encoder(EncoderSettings(features=(4, 8), width=16)).encode([Study("P1", [scan])]).shape
    torch.Size([1, 16])
    """

    rates: Tensor

    def __init__(self, settings: EncoderSettings = EncoderSettings(), backbone: nn.Module | None = None,  # noqa: B008
                 *, seed: int = 0):  # fmt: skip
        super().__init__()
        self.settings, self.own = settings, backbone is None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone = _plain(settings.features) if backbone is None else group_norm(backbone)
            self.maps = self._feature_count()
            width = settings.width
            self.project = nn.Linear(2 * (self.maps + _IMAGES) + 1, width)
            self.kind = nn.Embedding(len(KINDS), width)
            self.context = 4 * settings.frequencies + 2 + width
            self.when = nn.Sequential(nn.Linear(self.context, 2 * width), nn.GELU(),
                                      nn.Linear(2 * width, 2 * width))  # fmt: skip
            self.mix = nn.Sequential(nn.GELU(), nn.Linear(width, width))
            self.gather = nn.Parameter(torch.randn(width) / math.sqrt(width))
            self.look = nn.Linear(self.context, settings.heads)
            nn.init.normal_(self.look.weight, std=LOOK)
            self.join = nn.Sequential(nn.Linear((settings.heads + 1) * width, width), nn.LayerNorm(width))
            layer = nn.TransformerEncoderLayer(width, settings.heads, 2 * width, dropout=0.0, activation="gelu",
                                               batch_first=True, norm_first=True)  # fmt: skip
            self.transformer = nn.TransformerEncoder(layer, settings.layers, nn.LayerNorm(width),
                                                     enable_nested_tensor=False)  # fmt: skip
        periods = torch.logspace(math.log10(4.0), math.log10(4096.0), settings.frequencies)
        self.register_buffer("rates", 2 * math.pi / periods, persistent=False)

    def _feature_count(self) -> int:
        training = self.backbone.training
        self.backbone.eval()
        try:
            with torch.no_grad():
                found = self._features(torch.zeros(1, len(CHANNELS), 32, 32, 32))
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"encoder: the backbone {type(self.backbone).__name__} does not take volumes of {len(CHANNELS)} "
                f"channels ({error}). Build it with in_channels={len(CHANNELS)} in three dimensions, without a head."
            ) from error
        finally:
            self.backbone.train(training)
        if found.ndim != 5:
            raise InputError(
                f"encoder: the backbone {type(self.backbone).__name__} gives {tuple(found.shape)}; expected feature "
                "maps (n, f, z, y, x): leave its pooling and its head away."
            )
        return found.shape[1]

    def _features(self, volumes: Tensor) -> Tensor:
        found = self.backbone(volumes)
        return found[-1] if isinstance(found, (list, tuple)) else found

    def features(self, batch: Batch) -> Tensor:
        """Feature maps (n, f, z', y', x') of every volume."""
        return self._features(self._seen(batch))

    @staticmethod
    def _seen(batch: Batch) -> Tensor:
        # Bright vessels and noise in dark voxels are tamed; the mask is 0 or 1.
        return torch.cat((torch.asinh(batch.volumes[:, :-1]), batch.volumes[:, -1:]), 1)

    def tokens(self, batch: Batch, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding (patients, width) and the tokens of all volumes (n, width), after attention.

        Parameters
        ----------
        maps : tensor
            From `features`.
        """
        mask = batch.volumes[:, -1:]
        share = nn.functional.interpolate(mask, maps.shape[2:], mode="area").to(maps.dtype)
        pooled = []
        # The images' own means beside those of the features, which normalisation has robbed of their units.
        for values, weight in ((maps, share), (self._seen(batch)[:, :-1], mask)):
            inside = (values * weight).sum((2, 3, 4)) / weight.sum((2, 3, 4)).clamp_min(1e-3)
            pooled += [inside.to(maps.dtype), values.mean((2, 3, 4)).to(maps.dtype)]
        # How much of the volume is tumour: sizes are lost in means.
        part = torch.log10(mask.mean((2, 3, 4)) + 1e-4).to(maps.dtype)
        token = self.project(torch.cat((*pooled, part), 1))
        # When and how something was measured says what it means, so it scales and shifts the features (Perez et al.
        # 2018, arXiv:1709.07871): a difference of phases is then a sum of tokens.
        said = self.said(batch)
        scale, shift = self.when(said).chunk(2, 1)
        token = token * (1 + scale) + shift
        token = token + self.mix(token)
        rows = int(batch.slot.max()) + 2
        full = torch.zeros(batch.size, rows, token.shape[1], dtype=token.dtype, device=token.device)
        missing = torch.ones(batch.size, rows, dtype=torch.bool, device=token.device)
        full[:, 0], missing[:, 0] = self.gather.to(token.dtype), False
        full[batch.patient, batch.slot + 1] = token
        missing[batch.patient, batch.slot + 1] = False
        read = self.transformer(full, src_key_padding_mask=missing)
        # Means over tokens, each with weights of its own by when and how they were measured: attention alone begins
        # as one plain mean over phases, in which their differences are lost.
        weights = torch.full((batch.size, rows, self.settings.heads), float("-inf"), device=token.device)
        weights[batch.patient, batch.slot + 1] = self.look(said).float()
        means = torch.einsum("brh,brw->bhw", weights.softmax(1).to(read.dtype), read)
        embedding = self.join(torch.cat((read[:, :1], means), 1).flatten(1))
        return embedding, read[batch.patient, batch.slot + 1]

    def said(self, batch: Batch) -> Tensor:
        """When and how every volume was measured (n, `context`): kind, day and second as waves and logarithms."""
        waves = [f(t[:, None] * self.rates) for t in (batch.day, batch.time) for f in (torch.sin, torch.cos)]
        plain = [torch.log1p(batch.day.clamp_min(0))[:, None], torch.log1p(batch.time.clamp_min(0))[:, None]]
        return torch.cat((*waves, *plain, self.kind(batch.kind)), 1)

    def forward(self, batch: Batch) -> Tensor:
        """Embeddings (patients, width)."""
        return self.tokens(batch, self.features(batch))[0]

    def encode(self, studies: Sequence[Study], batch: int = 4) -> Tensor:
        """Embeddings (patients, width) of any number of studies, on the CPU and without derivatives."""
        self.eval()
        device = self.gather.device
        with torch.inference_mode():
            parts = [self(collate(studies[i : i + batch]).to(device)).cpu() for i in range(0, len(studies), batch)]
        return torch.cat(parts)

    # Files ------------------------------------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write weights and settings to a file that is read without running code."""
        state = {n: v.detach().cpu() for n, v in self.state_dict().items()}
        content = {"format": FORMAT, "settings": json.dumps(asdict(self.settings)), "own": self.own, "state": state}
        with atomic_write(path, overwrite=overwrite) as temporary:
            torch.save(content, temporary)

    @classmethod
    def load(cls, path: str | PathLike[str], backbone: nn.Module | None = None) -> Encoder:
        """Read an encoder that :meth:`save` wrote; nothing in the file is run.

        Parameters
        ----------
        backbone : torch.nn.Module, optional
            A network like that with which it was made, where that was not the package's own; its weights are replaced.

        Raises
        ------
        InputError
            If the file is missing, holds no encoder or one of another version, or the backbone is another.
        """
        source = Path(path)
        if not source.is_file():
            raise InputError(f"{source}: there is no such file of an encoder.")
        try:
            content = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged or foreign file provokes in the reader
            raise InputError(f"{source}: is no file of an encoder ({type(error).__name__}).") from error
        found = content.get("format") if isinstance(content, dict) else None
        if not isinstance(found, str) or not found.startswith(FORMAT.rstrip("0123456789")):
            raise InputError(f"{source}: holds no encoder; expected a file that Encoder.save wrote.")
        if found != FORMAT:
            raise InputError(f"{source}: format {found!r}; this version reads {FORMAT!r}. Train it anew.")
        plain = json.loads(content["settings"])
        if set(plain) != {f.name for f in fields(EncoderSettings)}:
            raise InputError(f"{source}: settings {sorted(plain)}; this version has others. Train it anew.")
        if content["own"] != (backbone is None):
            want = "no backbone: it has the package's own" if content["own"] else "the backbone it was made with"
            raise InputError(f"{source}: expected {want}.")
        made = cls(EncoderSettings(**plain), backbone)
        try:
            made.load_state_dict(content["state"])
        except RuntimeError as error:
            raise InputError(f"{source}: its weights do not fit; give the backbone of its making ({error}).") from error
        return made
