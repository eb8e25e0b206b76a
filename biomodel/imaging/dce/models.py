"""Tracer-kinetic models: what the tissue's concentration is, given the plasma's.

Each model is the sum of a plasma part and of exponentials,

    C(t) = v cp(t) + Σ_j a_j ∫ cp(s) exp(-k_j (t - s)) ds,

and says only how v, a_j and k_j follow from its parameters; convolution, delay, fits and derivatives are the same for
all. Names and meaning are those of OSIPI's CAPLEX (Dickie et al. 2024, Magn Reson Med 91:1761,
doi:10.1002/mrm.29840); Ktrans, PS and Fp are per minute (mL/min per mL of tissue), volumes are fractions.
Concentrations are in mM; `cp` is the concentration in arterial plasma.

Every parameter is an amount per volume of tissue, so that all of them times f give f times the curve: starting points
need only cover the shapes (:attr:`Model.shapes`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from biomodel.errors import InputError
from biomodel.imaging.aif import InputFunction
from biomodel.imaging.concentration import Relaxivity, to_signal
from biomodel.imaging.dce.convolution import convolve, interpolate
from biomodel.imaging.t1 import SpoiledGradientEcho

__all__ = [
    "ExtendedTofts",
    "Model",
    "Patlak",
    "Response",
    "Tofts",
    "TwoCompartmentExchange",
    "TwoCompartmentUptake",
    "tissue_signal",
]

MINUTE = 60.0

#: Fractions of a volume stay a little above zero where they are divided by.
LEAST_VOLUME = 1e-4


@dataclass(frozen=True, eq=False)
class Response:
    """The tissue's response to a unit of plasma concentration: a plasma part and exponentials.

    Attributes
    ----------
    plasma : Tensor, shape (voxels,)
        v, fraction.
    amplitudes, rates : tuple of Tensor, shape (voxels,) each
        a_j and k_j, 1/s.
    """

    plasma: Tensor
    amplitudes: tuple[Tensor, ...]
    rates: tuple[Tensor, ...]


class Model(ABC):
    """A tracer-kinetic model; a new one gives the class variables and :meth:`response`.

    Attributes
    ----------
    names, units : tuple of str
        Parameters.
    lower, upper : tuple of float
        Bounds of the fit.
    one_rate : tuple of bool or None
        For models of one exponential at most, fitted by projection: (the rate is free, there is a plasma part).
    """

    names: ClassVar[tuple[str, ...]]
    units: ClassVar[tuple[str, ...]]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    one_rate: ClassVar[tuple[bool, bool] | None] = None

    @abstractmethod
    def response(self, parameters: Tensor) -> Response:
        """Response of (voxels, p) parameters."""

    @property
    @abstractmethod
    def shapes(self) -> np.ndarray:
        """Parameters (shapes, p) whose curves cover what the model can look like, up to a factor."""

    def concentration(
        self, parameters: Tensor, times: Tensor, knots: Tensor, plasma: Tensor, delay: Tensor | None = None
    ) -> Tensor:
        """Concentration in tissue, differentiable in parameters, plasma concentration and delay.

        Parameters
        ----------
        parameters : Tensor, shape (voxels, p)
        times : Tensor, shape (n,)
            s.
        knots : Tensor, shape (m,)
            Times at which the plasma concentration is given, s; it is linear between them.
        plasma : Tensor, shape (m,) or (voxels, m)
            mM.
        delay : Tensor, shape (voxels,), optional
            How much later than at the place of the input the agent arrives, s.

        Returns
        -------
        Tensor, shape (voxels, n)
            mM.
        """
        response = self.response(parameters)
        at: Tensor | None = times if delay is None else times - delay[:, None]
        there = interpolate(knots, plasma, times if at is None else at)
        if delay is None and times.shape == knots.shape and bool((times == knots).all()):
            at = None
        total = response.plasma[:, None] * there
        for amplitude, rate in zip(response.amplitudes, response.rates, strict=True):
            total = total + amplitude[:, None] * convolve(rate, knots, plasma, at)
        return total

    def __call__(self, parameters: np.ndarray, times: np.ndarray, aif: InputFunction) -> np.ndarray:
        """Concentration in tissue (voxels, n), mM, from arrays; no derivatives."""
        values = torch.as_tensor(np.atleast_2d(np.asarray(parameters, dtype=float)))
        if values.shape[1] != len(self.names):
            raise InputError(f"{type(self).__name__}: {values.shape[1]} parameters; expected {', '.join(self.names)}.")
        with torch.no_grad():
            at = torch.as_tensor(np.asarray(times, dtype=float))
            return self.concentration(values, at, torch.as_tensor(aif.times), torch.as_tensor(aif.plasma)).numpy()


def _grid(*axes: tuple[float, ...]) -> list[tuple[float, ...]]:
    return list(product(*axes))


@dataclass(frozen=True)
class Tofts(Model):
    """Exchange between plasma and the extravascular extracellular space, without a plasma part (CAPLEX M.IC1.004).

    C(t) = Ktrans ∫ cp(s) exp(-Ktrans/ve (t - s)) ds. Tofts and Kermode 1991, Magn Reson Med 17:357,
    doi:10.1002/mrm.1910170208; terms: Tofts et al. 1999, J Magn Reson Imaging 10:223.
    """

    lower: tuple[float, ...] = (0.0, LEAST_VOLUME)
    upper: tuple[float, ...] = (5.0, 1.0)
    names: ClassVar[tuple[str, ...]] = ("Ktrans", "ve")
    units: ClassVar[tuple[str, ...]] = ("1/min", "1")
    one_rate: ClassVar[tuple[bool, bool] | None] = (True, False)

    def response(self, parameters: Tensor) -> Response:
        transfer, ve = parameters.unbind(1)
        transfer = transfer / MINUTE
        return Response(torch.zeros_like(ve), (transfer,), (transfer / ve,))

    @property
    def shapes(self) -> np.ndarray:
        return np.array([(k * 0.2, 0.2) for k in np.geomspace(0.01, 20, 24)])


@dataclass(frozen=True)
class ExtendedTofts(Model):
    """The Tofts model with the agent in plasma, v_p cp(t), added (CAPLEX M.IC1.005).

    Tofts 1997, J Magn Reson Imaging 7:91.
    """

    lower: tuple[float, ...] = (0.0, LEAST_VOLUME, 0.0)
    upper: tuple[float, ...] = (5.0, 1.0, 1.0)
    names: ClassVar[tuple[str, ...]] = ("Ktrans", "ve", "vp")
    units: ClassVar[tuple[str, ...]] = ("1/min", "1", "1")
    one_rate: ClassVar[tuple[bool, bool] | None] = (True, True)

    def response(self, parameters: Tensor) -> Response:
        transfer, ve, vp = parameters.unbind(1)
        transfer = transfer / MINUTE
        return Response(vp, (transfer,), (transfer / ve,))

    @property
    def shapes(self) -> np.ndarray:
        rates = tuple(np.geomspace(0.02, 15, 12))
        return np.array([(k * 0.2, 0.2, vp) for k, vp in _grid(rates, (0.0, 0.005, 0.02, 0.06, 0.2))])


@dataclass(frozen=True)
class Patlak(Model):
    """Uptake without return: C(t) = vp cp(t) + PS ∫ cp(s) ds (CAPLEX M.IC1.006).

    Patlak et al. 1983, J Cereb Blood Flow Metab 3:1, doi:10.1038/jcbfm.1983.1. The slope is the permeability-surface
    area product where flow does not limit the exchange; it is Ktrans otherwise.
    """

    lower: tuple[float, ...] = (0.0, 0.0)
    upper: tuple[float, ...] = (5.0, 1.0)
    names: ClassVar[tuple[str, ...]] = ("PS", "vp")
    units: ClassVar[tuple[str, ...]] = ("1/min", "1")
    one_rate: ClassVar[tuple[bool, bool] | None] = (False, True)

    def response(self, parameters: Tensor) -> Response:
        transfer, vp = parameters.unbind(1)
        return Response(vp, (transfer / MINUTE,), (torch.zeros_like(vp),))

    @property
    def shapes(self) -> np.ndarray:
        return np.array([(ps, 0.05) for ps in (0.0, *np.geomspace(1e-3, 1, 12))])


@dataclass(frozen=True)
class TwoCompartmentUptake(Model):
    """Plasma of finite flow, and uptake from it without return.

    C = Fp [exp(-t/T) + PS/(Fp + PS) (1 - exp(-t/T))] * cp with T = vp/(Fp + PS). Sourbron and Buckley 2013, NMR Biomed
    26:1004, doi:10.1002/nbm.2940.
    """

    lower: tuple[float, ...] = (0.0, 0.0, LEAST_VOLUME)
    upper: tuple[float, ...] = (10.0, 5.0, 1.0)
    names: ClassVar[tuple[str, ...]] = ("Fp", "PS", "vp")
    units: ClassVar[tuple[str, ...]] = ("1/min", "1/min", "1")

    def response(self, parameters: Tensor) -> Response:
        flow, exchange, vp = parameters.unbind(1)
        flow, exchange = flow / MINUTE, exchange / MINUTE
        # Written so that no flow at all gives no response instead of a division of zero by zero.
        leaving = (flow + exchange).clamp(min=torch.finfo(vp.dtype).tiny)
        extracted = flow * exchange / leaving
        return Response(torch.zeros_like(vp), (flow - extracted, extracted), (leaving / vp, torch.zeros_like(vp)))

    @property
    def shapes(self) -> np.ndarray:
        rates, extraction = tuple(np.geomspace(0.3, 40, 12)), (0.0, 0.01, 0.03, 0.1, 0.3, 0.6)
        return np.array([(0.05 * k * (1 - e), 0.05 * k * e, 0.05) for k, e in _grid(rates, extraction)])


@dataclass(frozen=True)
class TwoCompartmentExchange(Model):
    """Plasma of finite flow that exchanges with the extravascular extracellular space (CAPLEX M.IC1.009).

    vp dcp'/dt = Fp (cp - cp') + PS (ce - cp'), ve dce/dt = PS (cp' - ce), C = vp cp' + ve ce: two exponentials.
    Brix et al. 2004, Magn Reson Med 52:420; Sourbron and Buckley 2013, NMR Biomed 26:1004,
    doi:10.1002/nbm.2940.
    """

    lower: tuple[float, ...] = (0.0, 0.0, LEAST_VOLUME, LEAST_VOLUME)
    upper: tuple[float, ...] = (10.0, 5.0, 1.0, 1.0)
    names: ClassVar[tuple[str, ...]] = ("Fp", "PS", "ve", "vp")
    units: ClassVar[tuple[str, ...]] = ("1/min", "1/min", "1", "1")

    def response(self, parameters: Tensor) -> Response:
        flow, exchange, ve, vp = parameters.unbind(1)
        flow, exchange = flow / MINUTE, exchange / MINUTE
        turnover, back = flow / vp, exchange / ve
        total, fixed = turnover + exchange / vp + back, turnover * back
        # (total² - 4 fixed) as a sum of squares, which rounding cannot make negative.
        root = ((turnover + exchange / vp - back) ** 2 + 4 * exchange / vp * back).clamp(min=1e-30).sqrt()
        fast = (total + root) / 2
        slow = fixed / fast.clamp(min=1e-30)
        share = (fast - turnover) / root
        return Response(torch.zeros_like(vp), (flow * (1 - share), flow * share), (fast, slow))

    @property
    def shapes(self) -> np.ndarray:
        flows, backs, ratios = (0.1, 0.3, 0.8, 2.0, 5.0, 12.0), (0.03, 0.1, 0.3, 1.0, 3.0), (0.05, 0.2, 0.6, 1.5)
        return np.array([(0.2 * r * f, 0.2 * b, 0.2, 0.2 * r) for f, b, r in _grid(flows, backs, ratios)])


def tissue_signal(
    model: Model,
    parameters: Tensor,
    times: Tensor,
    knots: Tensor,
    plasma: Tensor,
    *,
    t10: Tensor,
    s0: Tensor,
    acquisition: SpoiledGradientEcho,
    relaxivity: Relaxivity,
    b1: Tensor | None = None,
    delay: Tensor | None = None,
) -> Tensor:
    """Signal of a spoiled gradient echo from tracer-kinetic parameters, differentiable in all tensors.

    Parameters
    ----------
    model, parameters, times, knots, plasma, delay
        As for :meth:`Model.concentration`.
    t10, s0 : Tensor, shape (voxels,)
        T1 before contrast, s, and equilibrium signal.
    acquisition, relaxivity, b1
        As for :func:`biomodel.imaging.concentration.to_signal`.

    Returns
    -------
    Tensor, shape (voxels, n)
    """
    found = model.concentration(parameters, times, knots, plasma, delay)
    return to_signal(found, t10, s0, acquisition, relaxivity, b1=b1)
