"""The direction of imports: lower parts never import higher ones, and `import biomodel` stays light.

Every import counts, also one inside a function or under `TYPE_CHECKING`: the direction is about what may know what.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What each import package may import of the project, besides itself.
PACKAGES: Mapping[str, frozenset[str]] = {
    "data_schemas": frozenset(),
    "biomodel": frozenset({"data_schemas"}),
    "pinn": frozenset({"data_schemas", "biomodel"}),
    "survival": frozenset({"data_schemas", "biomodel"}),
}

# From the bottom to the top; what stands on one line may import each other. A module not named here may import what it
# needs, as long as no module named here reaches a higher one through it. "biomodel" alone is the package's own
# `__init__`, which gathers the public names of all layers.
LAYERS = (
    ("errors", "files", "units"),
    ("parameters", "terms", "treatments", "domain", "schedule"),
    ("models",),
    ("solvers",),
    ("calibration",),
    ("forecast",),
    ("report", "cli", ""),
)
RANK = {f"biomodel.{name}".rstrip("."): rank for rank, names in enumerate(LAYERS) for name in names}

# The equations are evaluated by every back end, so they belong to none; xarray is for what users read and write.
FREE_OF = {"biomodel.terms": ("torch", "xarray"), "biomodel.models": ("torch", "xarray")}

HEAVY = ("dolfinx", "deepxde", "pymc", "monai")

Sources = Mapping[str, str]  # dotted module name ("biomodel", "biomodel.solvers.torch") -> source text


def project_sources() -> dict[str, str]:
    """Source of every module of the four packages that exists."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def is_package(module: str, sources: Sources) -> bool:
    return any(name.startswith(module + ".") for name in sources) or "." not in module


def imports(module: str, sources: Sources) -> Iterator[tuple[int, str]]:
    """(line, imported module) of every import in the module; names imported from a project module count as that
    module, submodules as themselves."""
    for node in ast.walk(ast.parse(sources[module])):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".") if is_package(module, sources) else module.split(".")[:-1]
                here = here[: len(here) - (node.level - 1)]
                base = ".".join([*here, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                known = submodule in sources or is_package(submodule, sources)
                yield node.lineno, submodule if known else base


def ranked(module: str) -> str | None:
    """The entry of `LAYERS` that the module belongs to: `biomodel.solvers.torch` belongs to `biomodel.solvers`."""
    entry = ".".join(module.split(".")[:2])
    return entry if entry in RANK else None


def reach(module: str, sources: Sources, through_layers: bool) -> Iterator[tuple[str, str]]:
    """(what is imported, path to it) for all that the module imports, directly or through other modules of biomodel.

    Without `through_layers`, a module with a layer is not looked through: it answers for its own imports.
    """
    seen, queue = {module}, [(module, module)]
    while queue:
        current, path = queue.pop()
        for line, target in imports(current, sources):
            step = f"{path}:{line} -> {target}"
            yield target, step
            inner = target in sources and target.startswith("biomodel.")
            if inner and target not in seen and (through_layers or ranked(target) is None):
                seen.add(target)
                queue.append((target, step))


def violations(sources: Sources) -> list[str]:
    """Every import that goes against the direction, in words."""
    found = []
    for module in sources:
        package = module.split(".")[0]
        for line, target in imports(module, sources):
            other = target.split(".")[0]
            if other in PACKAGES and other != package and other not in PACKAGES[package]:
                found.append(f"{module}:{line} imports {target}: {package} must not import {other}")
        entry = ranked(module)
        if entry is None:
            continue
        for target, path in reach(module, sources, through_layers=False):
            upper = ranked(target)
            if upper is not None and RANK[upper] > RANK[entry]:
                found.append(f"{path}: {entry} lies below {upper}")
        if entry in FREE_OF:
            for target, path in reach(module, sources, through_layers=True):
                if target.split(".")[0] in FREE_OF[entry]:
                    found.append(f"{path}: {entry} must not import {target.split('.')[0]}")
    return found


def test_imports_point_downwards() -> None:
    sources = project_sources()
    assert sources, f"no sources below {ROOT}"
    assert violations(sources) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("data_schemas", "import biomodel", "data_schemas must not import biomodel"),
        ("biomodel.cli", "def run():\n    import survival.pcr", "biomodel must not import survival"),
        ("pinn.solver", "from survival.hazard import fit", "pinn must not import survival"),
        ("survival.fusion", "import pinn", "survival must not import pinn"),
        ("biomodel.units", "from .terms import Growth", "biomodel.units lies below biomodel.terms"),
        ("biomodel.models", "from . import solvers", "biomodel.models lies below biomodel.solvers"),
        ("biomodel.solvers.torch", "from ..calibration import problem", "solvers lies below biomodel.calibration"),
        ("biomodel.calibration", "if TYPE_CHECKING:\n    import biomodel.forecast", "lies below biomodel.forecast"),
        ("biomodel.forecast", "import biomodel", "biomodel.forecast lies below biomodel"),
        ("biomodel.terms", "import torch.nn as nn", "biomodel.terms must not import torch"),
        ("biomodel.models", "def f():\n    from xarray import Dataset", "biomodel.models must not import xarray"),
        ("biomodel.models", "from biomodel.helper import x", "-> biomodel.forecast: biomodel.models lies below"),
        ("biomodel.terms", "from biomodel import helper", "helper:2 -> xarray: biomodel.terms must not import xarray"),
        ("biomodel.domain", "import xarray", "biomodel.domain:1 -> xarray: biomodel.terms must not import xarray"),
    ],
)
def test_checker_finds(module: str, source: str, complaint: str) -> None:
    """The checker sees a made-up violation of each rule, also one through a module that has no layer of its own."""
    sources = {name: "" for entries in LAYERS for name in (f"biomodel.{entry}".rstrip(".") for entry in entries)}
    sources |= {"biomodel.solvers.torch": "", "biomodel.calibration.problem": ""}
    sources["biomodel.terms"] = "from biomodel.domain import Domain"
    sources["biomodel.helper"] = "from biomodel.forecast import y\nimport xarray\n"
    assert violations(sources) == []
    found = violations(sources | {module: source})
    assert len(found) >= 1 and any(complaint in line for line in found), found


def test_checker_passes_what_is_right() -> None:
    sources = {
        "data_schemas": "import json",
        "biomodel": "from .forecast import forecast\nfrom . import units",
        "biomodel.units": "import pint\nfrom biomodel.errors import UnitError",
        "biomodel.errors": "",
        "biomodel.solvers.torch": "import torch\nfrom biomodel.models import Model\nfrom .base import Solver",
        "biomodel.solvers.base": "from ..errors import SolverError",
        "biomodel.models": "from biomodel.terms import Growth\nimport numpy",
        "biomodel.terms": "from biomodel.parameters import Parameter",
        "biomodel.parameters": "from . import units",
        "biomodel.forecast": "from biomodel.calibration import Fit\nfrom biomodel.patient import Patient",
        "biomodel.calibration": "from biomodel.solvers.torch import TorchSolver",
        "biomodel.patient": "import data_schemas",
        "biomodel.cli": "import biomodel as bm",
        "pinn.solver": "import biomodel\nimport deepxde",
        "survival.fusion": "from biomodel import forecast",
    }
    assert violations(sources) == []


def loaded(statement: str, stubs: Path) -> set[str]:
    """Which heavy packages the statement loads in a fresh interpreter.

    Empty stand-ins come first on its path: the packages need not be installed, and an import that a missing one would
    hide (`try: import pymc`) is seen.
    """
    for name in HEAVY:
        (stubs / f"{name}.py").write_text("")
    code = f"import sys\n{statement}\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    path = os.pathsep.join([str(stubs), str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_import_biomodel_is_light(tmp_path: Path) -> None:
    assert loaded("import biomodel", tmp_path) == set()
    assert loaded("try:\n    import pymc\nexcept ImportError:\n    pass", tmp_path) == {"pymc"}
