"""Forecasts made by hand, without a solver: quick, and with every kind of treatment, visit and gap in them."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

import biomodel as bm
from biomodel.calibration.fit import Fit
from biomodel.calibration.gaussnewton import prior_of
from biomodel.domain import Domain
from biomodel.forecast import Forecast
from biomodel.schedule import Dose, Fraction, Ongoing
from biomodel.visit import CellularitySettings, Visit

SHAPE, SPACING = (6, 12, 16), (4.0, 2.0, 1.5)
PLAN = bm.Schedule.weekly("paclitaxel", 1.4, 12, 80, "mg/m^2", status="planned") + bm.Schedule(
    fractions=tuple(Fraction(30.0 + day, 2.0, "given") for day in range(5)), ongoing=(Ongoing(3.0, "trastuzumab"),)
)


def ball(radius: float, shift: float = 0.0) -> np.ndarray:
    z, y, x = ((np.arange(n) - (n - 1) / 2) * s for n, s in zip(SHAPE, SPACING, strict=True))
    return z[:, None, None] ** 2 + y[:, None] ** 2 + (x - shift) ** 2 < radius**2


def fit_of(patient: bm.Patient, method: str = "Laplace") -> Fit:
    model = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy("paclitaxel"), bm.Radiotherapy()])
    parameters = {name: model.parameters[name] for name in model.free}
    prior = prior_of(parameters)
    shrink = np.linspace(0.2, 1.0, len(parameters))
    covariance = np.diag((prior.sd * shrink) ** 2) if method == "Laplace" else np.zeros((len(shrink),) * 2)
    return Fit(model, patient, bm.TorchSolver(), method, parameters, prior, prior.mean + 0.1 * prior.sd, covariance,
               -12.5, -20.25, 321, 5, 40, True, None, None, ("A note of the fit.",))  # fmt: skip


def imaged_patient(id: str = "P014") -> bm.Patient:
    mask = np.ones(SHAPE, bool)
    mask[:, :, 0] = False
    rng = np.random.default_rng(3)
    visits = []
    for number, (day, radius) in enumerate([(0.0, 9.0), (20.0, 8.0), (45.5, 6.0), (90.0, 0.0)], start=1):
        region = ball(radius) & mask
        adc = np.where(region, 1.2e-3, 2.0e-3) * rng.lognormal(0, 0.05, SHAPE)
        visits.append(Visit(number, day, adc, region) if radius else Visit(number, day, volume=0.0))
    return bm.Patient(
        id, "breast", Domain.box(SHAPE, SPACING, mask), tuple(visits), PLAN, CellularitySettings(3e-3, 5e-4),
        clinical={"age": 51.0, "her2": False, "subtype": "triple-negative"}, outcome={"pcr": True},
        baseline="2024-03-01", notes=("Drawn by two readers.",),
    )  # fmt: skip


def imaged_forecast(patient: bm.Patient, *, strength: float = 1.0, fit: Fit | None = None, schedule=None) -> Forecast:
    known = patient.until(2)
    fit = fit_of(known) if fit is None else fit
    box = (slice(0, 6), slice(1, 12), slice(0, 15))
    domain = patient.domain.crop(box)
    days, curve, draws = np.array([20.0, 45.5, 90.0]), np.arange(0.0, 91.0, 5.0), 40
    rate = strength * np.random.default_rng(5).lognormal(np.log(0.02), 0.3, draws)

    def maps(day: float) -> np.ndarray:
        start = 0.6 * np.exp(-((np.linspace(-2, 2, 15)) ** 2)) * ball(11.0)[box]
        return start * np.exp(-rate * day)[:, None, None, None] * domain.mask

    cells = np.stack([maps(day) for day in days], 1).astype(np.float32)

    def volume(when) -> np.ndarray:
        return np.stack([(maps(day) >= 0.15).sum((1, 2, 3)) * domain.voxel_volume / 1e3 for day in when], 1)

    data = xr.Dataset(
        {
            "cell_fraction": (("draw", "time", "z", "y", "x"), cells, {"units": "1"}),
            "probability": (("time", "z", "y", "x"), (cells >= 0.15).mean(0).astype(np.float32), {"units": "1"}),
            "volume": (("draw", "time"), volume(days), {"units": "cm^3"}),
            "cells": (("draw", "time"), cells.sum((2, 3, 4), dtype=float) * 2.1e6, {"units": "1"}),
            "longest_diameter": (("draw", "time"), 20 * np.exp(-np.outer(rate, days)), {"units": "mm"}),
            "mask": (("z", "y", "x"), domain.mask),
            "affine": (("row", "column"), domain.affine),
        },
        {"draw": np.arange(draws), "time": days, **domain.coords},
        {"visible_fraction": 0.15, "theta": 2.1e6},
    )
    curves = xr.Dataset(
        {"volume": (("draw", "day"), volume(curve), {"units": "cm^3"})}, {"draw": np.arange(draws), "day": curve}
    )
    return Forecast(data, curves, fit, known.schedule if schedule is None else schedule, 7, box, fit.notes)


def volume_forecast(patient: bm.Patient, strength: float = 1.0, fit: Fit | None = None, schedule=None) -> Forecast:
    known = patient.until(2)
    fit = replace(fit_of(known), method="Laplace") if fit is None else fit
    days, curve, draws = np.array([20.0, 80.0, 150.0]), np.arange(0.0, 151.0, 5.0), 60
    rng = np.random.default_rng(5)
    rate = strength * rng.lognormal(np.log(0.02), 0.6, draws)

    def of(when) -> np.ndarray:
        return 9.0 * np.exp(-np.outer(rate, when))

    noisy = of(days) * rng.lognormal(0, 0.3, (draws, 3))
    data = xr.Dataset(
        {
            "volume": (("draw", "time"), of(days), {"units": "cm^3"}),
            "measured_volume": (("draw", "time"), noisy, {"units": "cm^3"}),
        },
        {"draw": np.arange(draws), "time": days},
    )
    curves = xr.Dataset(
        {"volume": (("draw", "day"), of(curve), {"units": "cm^3"})}, {"draw": data["draw"], "day": curve}
    )
    return Forecast(data, curves, fit, known.schedule if schedule is None else schedule, 7, None, fit.notes)


@pytest.fixture(scope="session")
def imaged():
    """A patient with images, a forecast from the first two visits, and two alternatives."""
    patient = imaged_patient()
    forecast = imaged_forecast(patient)
    less = imaged_forecast(patient, strength=0.5, fit=forecast.fit, schedule=bm.Schedule())
    more = imaged_forecast(patient, strength=3.0, fit=forecast.fit,
                           schedule=PLAN.with_doses(Dose(50.25, "paclitaxel", 175, "mg/m^2", "planned")))  # fmt: skip
    what_if = [("no treatment", less), ("more paclitaxel", more)]
    return SimpleNamespace(patient=patient, forecast=forecast, what_if=what_if)


@pytest.fixture(scope="session")
def volumes():
    """The same without images."""
    patient = bm.Patient.from_volumes("V1", [0, 20, 80, 150], [9.0, 7.0, 2.5, 0.02], PLAN)
    forecast = volume_forecast(patient)
    what_if = [("no treatment", volume_forecast(patient, 0.3, forecast.fit, bm.Schedule()))]
    return SimpleNamespace(patient=patient, forecast=forecast, what_if=what_if)


@pytest.fixture(scope="session")
def make_imaged():
    """Patients of another name, and their forecasts."""
    return SimpleNamespace(patient=imaged_patient, forecast=imaged_forecast, fit=fit_of)


@pytest.fixture
def folder(pristine, tmp_path):
    """A copy, to be damaged, of the patient folder that the module's own fixture `pristine` wrote."""
    return shutil.copytree(pristine, tmp_path / "P014")
