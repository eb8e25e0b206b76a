"""ComBat against the numbers of published implementations (combat.json names them)."""

import json
from pathlib import Path

import numpy as np
import pytest

from biomodel.imaging.harmonise import fit_combat


@pytest.fixture(scope="module")
def reference():
    content = json.loads((Path(__file__).parent / "combat.json").read_text("utf-8"))
    covariates = np.column_stack([content["age"], content["grade"]])
    harmonised = {name: np.array(values) for name, values in content["harmonised"].items()}
    return np.array(content["features"]), np.array(content["site"]), covariates, harmonised


def test_values_of_neurocombat(reference):
    x, site, z, expected = reference
    for name, found in {
        "covariates": fit_combat(x, site, z).apply(x, site, z),
        "no covariates": fit_combat(x, site).apply(x, site),
        "reference B": fit_combat(x, site, z, reference="B").apply(x, site, z),
        "no shrinkage": fit_combat(x, site, z, shrink=False).apply(x, site, z),
    }.items():
        np.testing.assert_allclose(found, expected[name], atol=1e-6, err_msg=name)


def test_values_of_neuroharmonize_on_new_samples(reference):
    x, site, z, expected = reference
    train = np.arange(len(x)) % 4 != 0
    combat = fit_combat(x[train], site[train], z[train])
    np.testing.assert_allclose(combat.apply(x[~train], site[~train], z[~train]), expected["new rows"], atol=1e-6)
