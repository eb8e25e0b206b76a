"""What users may rely on: the names at the top of the package, and that all public names are documented and typed."""

import doctest
import importlib
import inspect
import pkgutil
import re
import typing

import pytest

import biomodel as bm

#: Adding a name is a decision, removing one breaks users: both show here.
NAMES = {
    # data
    "Domain", "Patient", "Schedule", "Visit",
    # equations
    "Chemotherapy", "Combination", "Exponential", "Gompertz", "Isotropic", "Logistic", "NoDiffusion", "Radiotherapy",
    "ReactionDiffusion", "Systemic", "TissueDiffusion",
    # priors
    "Fixed", "LogNormal", "LogitNormal", "Normal",
    # numerics and inference
    "FenicsSolver", "FieldLaplace", "Importance", "Laplace", "MAP", "NUTS", "SMC", "TorchSolver",
    # verbs and their results
    "Fit", "Forecast", "Report", "Score", "calibrate", "compare", "decide", "default_model", "forecast",
    "learn_priors", "report", "score", "stages",
}  # fmt: skip


def modules():
    """Every public module of the package."""
    for found in pkgutil.walk_packages(bm.__path__, "biomodel."):
        if not any(part.startswith("_") for part in found.name.split(".")):
            yield importlib.import_module(found.name)


MODULES = {module.__name__: module for module in modules()}
PUBLIC = {
    f"{name}.{attribute}": getattr(module, attribute)
    for name, module in MODULES.items()
    for attribute in getattr(module, "__all__", ())
}


def test_names_at_the_top():
    assert set(bm.__all__) == NAMES
    assert len(set(bm.__all__)) == len(bm.__all__)
    for name in bm.__all__:
        assert callable(getattr(bm, name)), name
    assert {name for name in dir(bm) if not name.startswith("_")} == NAMES


@pytest.mark.parametrize("name", ["forecast", "report", "stages"])
def test_a_function_is_not_hidden_by_its_module(name):
    """`forecast` is a function, also after somebody imported the module of that name."""
    module = importlib.import_module(f"biomodel.{name}")
    assert inspect.isfunction(getattr(bm, name)) and getattr(bm, name) is getattr(module, name)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="forcast"):
        bm.forcast  # noqa: B018


def sections(text):
    return set(re.findall(r"^ *(\w+)\n *-{3,}$", text, flags=re.MULTILINE))


@pytest.mark.parametrize("name", sorted(NAMES))
def test_names_at_the_top_have_numpydoc(name):
    thing = getattr(bm, name)
    text = inspect.getdoc(thing) or ""
    assert text.splitlines()[0].endswith("."), "the first line is one sentence"
    if inspect.isfunction(thing):
        assert {"Parameters", "Returns"} <= sections(text), text
        taken = list(inspect.signature(thing).parameters)
        assert all(re.search(rf"^ *[\w, ]*\b{n}\b", text, flags=re.MULTILINE) for n in taken), taken
        hints = typing.get_type_hints(thing)
        assert set(hints) >= {*taken, "return"}, f"{name} lacks annotations"
    else:
        own = {n: m for n, m in vars(thing).items() if not n.startswith("_")}
        methods = [n for n, m in own.items() if inspect.isfunction(m) or isinstance(m, (property, classmethod))]
        # getdoc also finds what a base class says of the method.
        assert [n for n in methods if not inspect.getdoc(getattr(thing, n))] == []


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_are_documented(name):
    thing = PUBLIC[name]
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert inspect.getdoc(thing), f"{name} has no docstring"
        assert not (inspect.getdoc(thing) or "").startswith(f"{thing.__name__}("), f"{name} has no docstring of its own"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_examples_in_docstrings(name):
    module = MODULES[name]
    assert module.__doc__, f"{name} has no docstring"
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, _ = doctest.testmod(module, optionflags=flags)
    assert failed == 0
