"""Tapes: recorded terms give the terms' own numbers, and so do their derivatives."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import biomodel as bm
from biomodel.errors import ModelError
from biomodel.parameters import NumpyOps, Parameter
from biomodel.solvers.base import Context
from biomodel.solvers.reaction import TorchOps
from biomodel.tape import Tape, gradient, record
from biomodel.terms import Growth, NoGrowth


@dataclass(frozen=True)
class Allee(Growth):
    """A law that is not in the package: growth with a threshold, and a ceiling by `where`."""

    k: bm.LogNormal = bm.LogNormal(0.05, 0.4)

    @property
    def parameters(self):
        return (Parameter("k", "1/day", self.k, (1e-6, 2.0)),)

    @property
    def fields(self):
        return ("oxygen",)

    def rate(self, u, p, c, ops):
        slowed = u / (u + 0.05) * c.oxygen ** 0.5
        return p["k"] * u * ops.where((u > 0.9) & (c.oxygen < 2), 0.1 * (1 - u), 1 - u) * slowed + abs(-u) * 0.0


TERMS = [
    bm.Exponential(), bm.Logistic(), bm.Gompertz(), NoGrowth(), Allee(), bm.Isotropic(), bm.NoDiffusion(),
    bm.TissueDiffusion(("a", "b")), bm.Chemotherapy("paclitaxel", map="drug_map", resistant=bm.LogitNormal(0.2, 1.0)),
    bm.Combination(("paclitaxel", "doxorubicin")), bm.Systemic(), bm.Radiotherapy(),
]  # fmt: skip
U = np.array([-0.1, 0.0, 1e-6, 0.1, 0.5, 0.95, 1.2])
LEVEL, EXPOSURE = (0.7, 0.3), (2.0, 1.0)


def laid_out(term):
    """The term's function of (u, p, c, ops), its parameter values, its context and the agents it reads."""
    values = {p.name: p.typical for p in term.parameters}
    context = {name: 0.3 + 0.1 * np.arange(len(U)) for name in term.fields}
    agents = getattr(term, "agents", ())
    if isinstance(term, bm.Radiotherapy):
        return lambda u, p, c, ops: term.survival(p, c, ops), values, {**context, "dose": 2.0}, ()
    if agents:
        drug = getattr(term, "map", None)

        def rate(u, p, c, ops):
            c.map = getattr(c, drug) if drug else 1.0
            return term.rate(u, p, c, ops)

        context["level"] = dict(zip(agents, LEVEL, strict=False))
        context["exposure"] = dict(zip(agents, EXPOSURE, strict=False))
        return rate, values, context, agents
    return getattr(term, "rate", None) or term.coefficient, values, context, ()


def recorded(term):
    function, values, context, agents = laid_out(term)
    plain = [n for n in context if n not in ("level", "exposure")]
    tape = record(function, list(values), plain, agents)
    given = {"u": U, **{f"p.{n}": v for n, v in values.items()}, **{f"c.{n}": context[n] for n in plain}}
    for what in ("level", "exposure"):
        given.update({f"{what}.{a}": x for a, x in context.get(what, {}).items()})
    return tape, given, function, values, context


@pytest.mark.parametrize("term", TERMS, ids=lambda t: type(t).__name__)
def test_a_tape_gives_the_terms_own_numbers(term):
    tape, given, function, values, context = recorded(term)
    tape = Tape(**{k: tuple(map(tuple, v)) if k == "rows" else tuple(v)
                   for k, v in json.loads(json.dumps(tape.json())).items()})  # fmt: skip
    own = function(U, values, Context(**context), NumpyOps)
    (found,) = tape(given)
    np.testing.assert_allclose(np.broadcast_to(found, U.shape), np.broadcast_to(own, U.shape), rtol=1e-15)


@pytest.mark.parametrize("term", TERMS, ids=lambda t: type(t).__name__)
def test_derivatives_of_a_tape_are_those_of_autograd(term):
    tape, given, function, values, context = recorded(term)
    wrt = ["u", *(f"p.{n}" for n in values), *(n for n in tape.inputs if n.startswith(("c.", "level", "exposure")))]
    found = gradient(tape, wrt)(given)
    x = {n: torch.tensor(np.broadcast_to(v, U.shape).copy(), requires_grad=True) for n, v in given.items()}
    c = {n: x.get(f"c.{n}") for n in context}
    for what in ("level", "exposure"):
        if what in context:
            c[what] = {a: x[f"{what}.{a}"] for a in context[what]}
    y = function(x["u"], {n: x[f"p.{n}"] for n in values}, Context(**c), TorchOps)
    y = torch.as_tensor(y, dtype=torch.float64).expand(U.shape)
    np.testing.assert_allclose(np.broadcast_to(found[0], U.shape), y.detach().numpy(), rtol=1e-14)
    exact = torch.autograd.grad(y.sum(), [x[n] for n in wrt], allow_unused=True) if y.requires_grad else [None] * len(x)
    for name, a, b in zip(wrt, found[1:], exact, strict=False):
        b = np.zeros(len(U)) if b is None else b.numpy()
        np.testing.assert_allclose(np.broadcast_to(a, U.shape), b, rtol=1e-12, atol=1e-15, err_msg=name)


def test_a_tensor_has_nine_outputs():
    tape = record(lambda u, p, c, ops: [[p["D"] * (i + j) for i in range(3)] for j in range(3)], ["D"])
    assert tape({"p.D": 2.0}) == [0.0, 2.0, 4.0, 2.0, 4.0, 6.0, 4.0, 6.0, 8.0]


def test_what_is_not_used_is_not_on_the_tape():
    tape = record(lambda u, p, c, ops: p["D"] + 0 * u, ["D", "E"])
    assert tape.inputs == ("p.D",) and len(tape.rows) == 1


def branching(u, p, c, ops):
    return u if u > 0.5 else 0.0


@pytest.mark.parametrize("function,words", [
    (branching, r"ops\.where"), (lambda u, p, c, ops: max(u, 0.1), r"ops\.where"),
    (lambda u, p, c, ops: np.exp(u), "numpy.exp"), (lambda u, p, c, ops: ops.tanh(u), "ops.tanh"),
    (lambda u, p, c, ops: c.oxygen * u, "declare"), (lambda u, p, c, ops: torch.exp(u), "could not be recorded"),
    (lambda u, p, c, ops: u * float("inf"), "finite"), (lambda u, p, c, ops: float(u), r"ops\.where"),
    (lambda u, p, c, ops: u == 0, r"ops\.where"), (lambda u, p, c, ops: p["q"], "KeyError"),
])  # fmt: skip
def test_what_a_tape_cannot_hold_is_told(function, words):
    with pytest.raises(ModelError, match=words):
        record(function)


def test_a_numpy_number_on_the_left_is_recorded():
    tape = record(lambda u, p, c, ops: np.float64(2.0) * u - np.float64(1.0) / (np.float64(3.0) + u))
    assert tape({"u": 2.0})[0] == pytest.approx(4 - 0.2)
