"""Readers of public tables: what is in them, in which unit, from where; features of later visits are never read along.

Nothing is bundled. Each reader takes the folder in which the tables of the original sources lie; the README names them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from biomodel.errors import InputError
from survival.outcome import follow_up

__all__ = ["Table", "benchmark_parts", "ispy1", "ispy2"]

#: Columns of the survival benchmarks, in the order of Katzman et al. 2018, doi:10.1186/s12874-018-0482-1.
_COLUMNS = {
    "metabric": ("MKI67", "EGFR", "PGR", "ERBB2", "hormone therapy", "radiotherapy", "chemotherapy", "ER", "age"),
    "gbsg": ("hormone therapy", "size", "postmenopausal", "age", "nodes", "PR", "ER"),
    "support": ("age", "sex", "race", "comorbidities", "diabetes", "dementia", "cancer", "blood pressure", "heart rate",
                "respiration rate", "temperature", "sodium", "white cells", "creatinine"),
}  # fmt: skip
#: Shortest time in months that stands for an event or a censoring on day 0.
_SHORTEST = 0.05


@dataclass(frozen=True, eq=False)
class Table:
    """Covariates and outcome of a cohort.

    Attributes
    ----------
    X : DataFrame, shape (n, p)
        Indexed by patient; missing values are nan.
    y : ndarray, shape (n,)
        0 and 1, or a :func:`~survival.outcome.follow_up`.
    groups : dict
        Columns by what they come from (`clinical`, `volume`, ...).
    source : str
        To be cited.
    """

    X: pd.DataFrame
    y: np.ndarray
    groups: dict[str, list[str]]
    source: str


def _file(folder: Path | str, *parts: str) -> Path:
    path = Path(folder, *parts)
    if not path.is_file():
        raise InputError(f"{'/'.join(parts)} is not in the folder '{folder}'. The README says where to get it.")
    return path


def benchmark_parts(folder: Path | str, name: str) -> tuple[Table, Table]:
    """Training and test part of METABRIC, GBSG or SUPPORT, split as published.

    Times are in months (METABRIC, GBSG) or days (SUPPORT); the one time of 0 in METABRIC is set to 0.05.

    Parameters
    ----------
    folder : path
        Holds `survival/metabric.h5` and the others.
    name : str
        `metabric`, `gbsg` or `support`.

    Returns
    -------
    (Table, Table)

    Raises
    ------
    InputError
        If the file is not there, or the name is another.
    """
    if name not in _COLUMNS:
        raise InputError(f"benchmark_parts: '{name}' is not one of {', '.join(_COLUMNS)}.")
    tables = []
    with h5py.File(_file(folder, "survival", f"{name}.h5")) as file:
        for part in ("train", "test"):
            x, t, e = (np.asarray(file[part][key], float) for key in "xte")
            X = pd.DataFrame(x, columns=list(_COLUMNS[name]))
            y = follow_up(np.maximum(t, _SHORTEST), e)
            tables.append(
                Table(
                    X,
                    y,
                    {"all": list(X)},
                    "Katzman et al. 2018, BMC Med Res Methodol 18:24, doi:10.1186/s12874-018-0482-1",
                )
            )
    return tables[0], tables[1]


def _sheet(path: Path, name: str | int = 0) -> pd.DataFrame:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unknown extension is not supported")
        return pd.read_excel(path, sheet_name=name)


def ispy2(folder: Path | str, visits: int = 4) -> Table:
    """I-SPY 2: clinical record, and MRI features of the first visits, with pCR as outcome.

    Volumes (cm³) enter as log(V + 0.05), longest diameters (cm) as log(d + 0.1) and as whether there was none to
    measure, background enhancement (%) as its logarithm, sphericity as it is. `change` is the difference of these
    logarithms to the first visit, `percent` the change in percent of what was measured, cut at 150.

    Parameters
    ----------
    folder : path
        Holds `ispy2/Multi-feature-MRI-NACT-Data.xlsx` and `ispy2/ISPY2-Imaging-Cohort-1-Clinical-Data.xlsx`.
    visits : int
        1 to 4: visits that are used, before treatment (T0) up to before surgery (T3).

    Returns
    -------
    Table
        384 patients; groups `receptors`, `age`, `arm`, `volume`, `diameter`, `sphericity`, `enhancement`.

    Raises
    ------
    InputError
        If a file is not there, or `visits` is not 1 to 4.
    """
    if visits not in (1, 2, 3, 4):
        raise InputError(f"ispy2: visits is {visits}; expected 1 to 4.")
    images = _sheet(_file(folder, "ispy2", "Multi-feature-MRI-NACT-Data.xlsx"))
    record = _sheet(_file(folder, "ispy2", "ISPY2-Imaging-Cohort-1-Clinical-Data.xlsx"))
    both = images.merge(record, left_on="CLINICAL-TRIAL-SUBJECT-ID", right_on="Patient_ID", validate="one_to_one")
    found: dict[str, dict[str, pd.Series]] = {
        "receptors": {"HR": both.HR, "HER2": both.HER2, "HR x HER2": both.HR * both.HER2, "MammaPrint": both.MP},
        "age": {"age": both.Age_at_Screening},
        "arm": {f"arm {name}": both.Arm == name for name in sorted(both.Arm.unique())},
    }
    measured = {
        "volume": [np.log(both[f"VOLUME_TUM_BLU_V{k + 1}0"] + 0.05) for k in range(visits)],
        "diameter": [np.log(both[f"LD_T{k}"] + 0.1) for k in range(visits)],
        "sphericity": [both[f"SPHERICITY_T{k}"] for k in range(visits)],
        "enhancement": [np.log(both[f"BPE_5slice_mean_T{k}"].clip(lower=1.0)) for k in range(visits)],
    }
    for group, values in measured.items():
        found[group] = {f"{group} T{k}": value for k, value in enumerate(values)}
        later = range(1, visits)
        if group in ("volume", "diameter"):
            found[group] |= {f"{group} T{k} change": values[k] - values[0] for k in later}
        percent = {"volume": "FTV", "diameter": "LD", "sphericity": "Sphericity", "enhancement": "BPE"}[group]
        found[group] |= {f"{group} T{k} percent": both[f"{percent}_pch_T0_T{k}"].clip(-100, 150) for k in later}
    found["diameter"] |= {f"diameter T{k} none": both[f"LD_T{k}"] == 0 for k in range(1, visits)}
    X = pd.DataFrame({name: column for columns in found.values() for name, column in columns.items()}).astype(float)
    X.index = pd.Index(both.Patient_ID, name="patient")
    return Table(
        X, both.pCR.to_numpy(int), {group: list(columns) for group, columns in found.items()},
        "Li et al. 2020, npj Breast Cancer 6:63, doi:10.1038/s41523-020-00203-7; TCIA collection ISPY2",
    )  # fmt: skip


def ispy1(folder: Path | str, at_surgery: bool = False) -> Table:
    """I-SPY 1 (ACRIN 6657): clinical record and longest diameters at four visits, with recurrence-free survival (days).

    Diameters (mm) enter as log(d + 5), as changes of that since the first visit, and as the mean of those measured.

    Parameters
    ----------
    folder : path
        Holds `ispy1/I-SPY_1_All_Patient_Clinical_and_Outcome_Data.xlsx`.
    at_surgery : bool
        Also pCR and RCB class, which are known after surgery. The time still starts at the start of treatment;
        landmarking is the caller's.

    Returns
    -------
    Table
        Missing values are nan; groups `clinical`, `diameter`, and `pathology` at surgery.
    """
    path = _file(folder, "ispy1", "I-SPY_1_All_Patient_Clinical_and_Outcome_Data.xlsx")
    both = _sheet(path, "predictors").merge(_sheet(path, "outcomes"), on="SUBJECTID", validate="one_to_one")
    both.columns = [str(name).strip() for name in both]
    names = ("MRI LD Baseline", "MRI LD 1-3dAC", "MRI LD InterReg", "MRI LD PreSurg")
    diameter = [np.log(pd.to_numeric(both[name]) + 5.0) for name in names]
    found: dict[str, dict[str, pd.Series]] = {
        "clinical": {
            "age": both.age, "ER": both.ERpos, "PR": both.PgRpos, "HR": both["HR Pos"], "HER2": both.Her2MostPos,
            "bilateral": both.BilateralCa,
        },
        "diameter": {f"diameter {k + 1}": d for k, d in enumerate(diameter)}
        | {f"diameter {k + 1} change": diameter[k] - diameter[0] for k in (1, 2, 3)}
        | {"diameter mean": pd.concat(diameter, axis=1).mean(axis=1)},
    }  # fmt: skip
    if at_surgery:
        found["pathology"] = {"pCR": both.PCR, "RCB class": both.RCBClass}
    X = pd.DataFrame({name: column for columns in found.values() for name, column in columns.items()}).astype(float)
    X.index = pd.Index(both.SUBJECTID, name="patient")
    y = follow_up(both.RFS, both.rfs_ind)
    return Table(
        X, y, {group: list(columns) for group, columns in found.items()},
        "Hylton et al. 2016, Radiology 279:44, doi:10.1148/radiol.2015150013; TCIA collection ISPY1",
    )  # fmt: skip
