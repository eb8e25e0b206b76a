"""The names at the top of survival: documented, loaded on use, and a missing extra is said."""

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import survival

pytest.importorskip("sksurv")
pytest.importorskip("lifelines")
ROOT = Path(__file__).resolve().parents[2]


def test_every_name_is_there_and_no_other():
    assert survival.__all__ == sorted(survival.__all__) and len(set(survival.__all__)) == len(survival.__all__)
    assert {name for name in dir(survival) if not name.startswith("__")} == set(survival.__all__)
    assert set(survival._HOME) == set(survival.__all__)
    with pytest.raises(AttributeError, match="Coxx"):
        survival.Coxx  # noqa: B018


@pytest.mark.parametrize("name", survival.__all__)
def test_names_have_numpydoc(name):
    thing = getattr(survival, name)
    text = inspect.getdoc(thing) or ""
    assert text.splitlines()[0].endswith((".", ").")), text.splitlines()[0]
    if inspect.isfunction(thing):
        sections = set(re.findall(r"^ *(\w+)\n *-{3,}$", text, flags=re.MULTILINE))
        assert {"Parameters", "Returns", "Raises"} <= sections
        taken = list(inspect.signature(thing).parameters)
        assert all(re.search(rf"^ *[\w, ]*\b{n}\b", text, flags=re.MULTILINE) for n in taken), taken
        assert set(typing.get_type_hints(thing)) >= {*taken, "return"}


MODULES = sorted(found.name for found in pkgutil.walk_packages(survival.__path__, "survival."))


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_documented_and_their_examples_hold(name):
    module = importlib.import_module(name)
    assert module.__doc__ and module.__all__ == sorted(module.__all__)
    for public in (getattr(module, one) for one in module.__all__):
        text = inspect.getdoc(public) or ""
        assert text and not text.startswith(f"{public.__name__}("), public.__name__
        if inspect.isclass(public):
            own = [n for n, m in vars(public).items() if not n.startswith("_") and inspect.isfunction(m)]
            bare = [n for n in own if not inspect.getdoc(getattr(public, n))]
            assert not bare or getattr(public, "_is_protocol", False), bare
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


def test_importing_survival_loads_no_library():
    code = "import sys, survival; print([n for n in ('sksurv', 'lifelines', 'torch', 'sklearn') if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "[]", run.stderr


def test_a_missing_extra_is_said():
    code = "import sys; sys.modules['sksurv'] = None; import survival; survival.Cox"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "pip install 'tumorcast[survival]'" in run.stderr
