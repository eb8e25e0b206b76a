"""Regions of an exam: the organ, its tissues, the tumour by thresholds or by a network, and scores of all of them."""

from biomodel.imaging.regions.exam import Exam
from biomodel.imaging.regions.learning import Training
from biomodel.imaging.regions.methods import (
    FoundRegion,
    FuzzyClusters,
    NetworkRegions,
    NetworkTissues,
    RegionMethod,
    ThresholdRegions,
    TissueMethod,
)
from biomodel.imaging.regions.network import NetworkSettings
from biomodel.imaging.regions.network_tissue import TissueCase, TissueNetwork, train_tissues
from biomodel.imaging.regions.network_tumour import NetworkRegion, TumourNetwork
from biomodel.imaging.regions.organ import BRAIN, BREAST, Organ, Usual, body_mask, breast_mask, given_mask
from biomodel.imaging.regions.scores import Interval, RegionScore, bootstrap, score_region, surface_distances
from biomodel.imaging.regions.tissue import Clusters, Tissues, fuzzy_c_means, tissues
from biomodel.imaging.regions.training import Case, train
from biomodel.imaging.regions.tumour import Thresholds, TumourRegion, find_tumour

__all__ = [
    "BRAIN",
    "BREAST",
    "Case",
    "Clusters",
    "Exam",
    "FoundRegion",
    "FuzzyClusters",
    "Interval",
    "NetworkRegion",
    "NetworkRegions",
    "NetworkSettings",
    "NetworkTissues",
    "Organ",
    "RegionMethod",
    "RegionScore",
    "ThresholdRegions",
    "Thresholds",
    "TissueCase",
    "TissueMethod",
    "TissueNetwork",
    "Tissues",
    "Training",
    "TumourNetwork",
    "TumourRegion",
    "Usual",
    "body_mask",
    "bootstrap",
    "breast_mask",
    "find_tumour",
    "fuzzy_c_means",
    "given_mask",
    "score_region",
    "surface_distances",
    "tissues",
    "train",
    "train_tissues",
]
