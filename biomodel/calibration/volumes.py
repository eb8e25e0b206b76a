"""Calibration data of a tumour without images: volumes over time on the well-mixed domain."""

from __future__ import annotations

from biomodel.parameters import LogNormal, Parameter

CAPACITY = "initial.capacity"
VOLUME = "initial.volume"
class VolumeProblem: ...
