"""Raw series of virtual patients, as a scanner gives them, with the truth behind every voxel.

:func:`acquire` scans a virtual patient at one visit: a variable-flip-angle series (and a B1 map), a dynamic
contrast-enhanced and a diffusion-weighted series and an anatomical image. :func:`write_raw` writes all visits as the
folder of a study, as a clinic would hand it over, and the truth beside it.

Whether the setting is matched is the protocol's matter: without :class:`ImagingFlaws` a voxel is one pool that follows
the extended Tofts model and one ADC, and only noise, the receiver, flip angles and motion stand between truth and
fit. ``protocol.mismatched()`` adds what the analysis does not model; the truth names every flaw that is present. Use it
for patients of the mismatched setting.

The folder of a study::

    study.json                       what images cannot say
    ses-01/anat/..._T1w.nii.gz       visit 1: BIDS names and sidecars (or ses-01/dicom/..., classic DICOM)
          /anat/..._flip-1_VFA.nii.gz ...
          /fmap/..._TB1map.nii.gz    if measured; always NIfTI, since DICOM has no sign of a B1 map
          /perf/..._DCE.nii.gz
          /dwi/..._dwi.nii.gz  .bval  .bvec
    ses-02/...
    truth/visit1.nc ...              maps in the pose of visit 1, plasma in the artery; never read by an analysis
         /visit1_scanned.nc ...      maps in the pose of the visit, receiver and B1
         /truth.nc                   that of the virtual patient

``study.json`` uses the words of ``patient.json`` (``biomodel/schema.py``) wherever they mean the same; tumour regions
and everything else that is made from images is not in it::

    {"schema": "tumorcast/study/v1",
     "id": "virtual-7", "organ": "breast", "baseline": "2024-03-04",
     "visits": [{"day": 0.0, "folder": "ses-01", "haematocrit": 0.41}, ...],
     "cellularity": {"adc_w": {"value": 0.003, "units": "mm^2/s"}, "adc_min": {...}, ...},
     "treatments": [{"kind": "chemotherapy", "agent": "paclitaxel", "day": 3.0,
                     "dose": {"value": 80.0, "units": "mg/m^2"}, "status": "planned"}, ...],
     "clinical": {...}, "notes": [...]}

A visit has ``day`` (or ``date``), the ``folder`` of its series relative to ``study.json`` and, if it was measured, the
``haematocrit`` (a fraction), which turns a measured arterial input into plasma. The images' own dates count from
1900-01-01 as day 0; the days of ``study.json`` are the ones that count.
"""

from __future__ import annotations

from biomodel.acquisition_protocol import GE_15T, PHILIPS_3T, SIEMENS_3T, ImagingFlaws, Motion, Protocol
from biomodel.acquisition_scan import Acquired, acquire
from biomodel.acquisition_study import write_raw

__all__ = [
    "GE_15T",
    "PHILIPS_3T",
    "SIEMENS_3T",
    "Acquired",
    "ImagingFlaws",
    "Motion",
    "Protocol",
    "acquire",
    "write_raw",
]
