"""Terms, priors and models: the checks of a term, and the messages of a wrong model."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

import biomodel as bm
from biomodel.errors import ModelError
from biomodel.parameters import Fixed, JointPrior, LogitNormal, LogNormal, Normal, NumpyOps, Parameter, Prior
from biomodel.schedule import Fraction, Schedule
from biomodel.terms import (
    Exponential,
    Gompertz,
    Growth,
    Isotropic,
    Logistic,
    NoDiffusion,
    NoGrowth,
    TensorDiffusion,
    TissueDiffusion,
)  # fmt: skip
from biomodel.testing import check_term
from biomodel.treatments import Chemotherapy, Combination, Radiotherapy, Systemic

TERMS = [
    Exponential(), Logistic(), Gompertz(), NoGrowth(), Isotropic(), NoDiffusion(), TissueDiffusion(),
    TensorDiffusion(),
    Chemotherapy("paclitaxel"), Chemotherapy("paclitaxel", map="drug_map", resistant=LogitNormal(0.2, 1.0)),
    Combination(("paclitaxel", "doxorubicin")), Systemic(), Systemic(resistant=None), Radiotherapy(),
]  # fmt: skip


@pytest.mark.parametrize("term", TERMS, ids=lambda t: f"{type(t).__name__}")
def test_built_in_terms_are_sound(term):
    check_term(term)


@dataclasses.dataclass(frozen=True)
class Broken(Growth):
    how: str = "spontaneous"

    @property
    def parameters(self):
        units = "blorg/day" if self.how == "units" else "1/day"
        return (Parameter("k", units, LogNormal(5.0 if self.how == "bounds" else 0.05, 0.4), (1e-6, 2.0)),)

    def rate(self, u, p, c, ops):
        if self.how == "spontaneous":
            return p["k"] * (u + 0.1)
        if self.how == "infinite":
            return p["k"] * ops.log(u)
        return p["k"] * u


@pytest.mark.parametrize("how,words", [
    ("spontaneous", "not 0 where there are no cells"), ("infinite", "not finite"), ("bounds", "outside"),
])  # fmt: skip
def test_unsound_terms_are_told(how, words):
    with np.errstate(divide="ignore"), pytest.raises(ModelError, match=words):
        check_term(Broken(how))


def test_units_of_a_term_are_checked():
    with pytest.raises(ModelError, match="blorg"):
        check_term(Broken("units"))


def test_a_kill_whose_integral_is_wrong_is_told():
    @dataclasses.dataclass(frozen=True)
    class Wrong(Chemotherapy):
        def cumulative(self, p, c, ops):
            return 2 * super().cumulative(p, c, ops)

    with pytest.raises(ModelError, match="integrates to"):
        check_term(Wrong("paclitaxel"))


@pytest.mark.parametrize("prior", [LogNormal(0.3, 0.7), LogitNormal(0.2, 1.1), Normal(-1.0, 2.0)])
def test_priors_go_to_the_gaussian_coordinate_and_back(prior):
    for value in (0.05, 0.4, 0.9):
        assert abs(float(prior.to_value(prior.to_z(value))) - value) < 1e-12
    assert abs(prior.quantile(0.5) - float(prior.to_value(prior.location))) < 1e-12
    same = prior.at(prior.location, prior.scale)
    assert type(same) is type(prior)
    assert (same.location, same.scale) == pytest.approx((prior.location, prior.scale))
    assert prior.quantile(0.95) > prior.quantile(0.05)


@pytest.mark.parametrize("make,words", [
    (lambda: LogNormal(-1.0, 0.5), "positive"), (lambda: LogitNormal(1.5, 0.5), "between 0 and 1"),
    (lambda: Fixed(float("nan")), "finite"), (lambda: Chemotherapy("unobtainium"), "no reference dose"),
    (lambda: Chemotherapy(), "no agent"), (lambda: Combination(()), "at least one"),
    (lambda: TissueDiffusion(("a", "b"), (LogNormal(1, 1),)), "2 tissues, but 1"),
    (lambda: bm.ReactionDiffusion(growth=Isotropic()), "expected an object of Growth"),
    (lambda: bm.ReactionDiffusion(treatments=[Radiotherapy(), Radiotherapy()]), "two terms are called"),
    (lambda: bm.ReactionDiffusion(priors={"growth.kk": Fixed(1.0)}), "Did you mean 'growth.k'"),
    (lambda: bm.ReactionDiffusion().complete({"growth.k": 99.0}), "outside its bounds"),
    (
        lambda: bm.ReactionDiffusion().check_schedule(Schedule.weekly("paclitaxel", 0, 1, 80, "mg/m^2")),
        "no term for it",
    ),
    (lambda: bm.ReactionDiffusion().check_schedule(Schedule(fractions=(Fraction(1.0, 2.0),))), "bm.Radiotherapy"),
    (lambda: JointPrior(("a", "b"), np.zeros(2), -np.eye(2)), "positive definite"),
    (lambda: Chemotherapy("paclitaxel").relative_amount(80, "mg", "paclitaxel"), "reference dose"),
])  # fmt: skip
def test_wrong_models_are_told(make, words):
    with pytest.raises(ModelError, match=words):
        make()


def test_models_are_changed_by_making_new_ones():
    model = bm.ReactionDiffusion(Logistic(), Isotropic(), [Chemotherapy("paclitaxel")])
    fixed = model.fix({"growth.k": 0.03})
    assert "growth.k" in model.free and "growth.k" not in fixed.free
    assert fixed.parameters["growth.k"].typical == 0.03
    joint = JointPrior(("growth.k",), np.zeros(1), np.eye(1))
    assert model.with_joint_prior(joint).joint is joint and model.joint is None
    with pytest.raises(ModelError, match="is fixed"):
        fixed.with_joint_prior(joint)
    assert "paclitaxel.efficacy" in model._repr_html_()


def test_what_is_known_is_a_prior_with_all_its_mass_there():
    known = Fixed(0.35)
    assert isinstance(known, Prior) and (known.location, known.scale, known.quantile(0.05)) == (0.35, 0.0, 0.35)
    assert Parameter("k", "1/day", known, (0.0, 1.0)).typical == 0.35
    assert known.to_value(known.to_z(0.4)) == 0.4
    with pytest.raises(ModelError, match="is known"):
        known.at(0.3, 1.0)


def test_drugs_of_a_combination_spare_the_same_cells():
    together = Combination(("paclitaxel", "doxorubicin"))
    alone = Chemotherapy("paclitaxel", resistant=LogitNormal(0.2, 1.0))
    p = {"efficacy": 0.1, "efficacy_paclitaxel": 0.1, "efficacy_doxorubicin": 0.3, "decay": 0.35, "resistant": 0.2}
    c = SimpleNamespace(level={"paclitaxel": 1.5, "doxorubicin": 0.5}, exposure={"paclitaxel": 4.0, "doxorubicin": 2.0})
    c.map = 1.0
    assert together.cumulative(p, c, NumpyOps) == pytest.approx(-np.log(0.8 * np.exp(-1.0) + 0.2))
    assert alone.cumulative(p, c, NumpyOps) == pytest.approx(-np.log(0.8 * np.exp(-0.4) + 0.2))
    assert Combination(("paclitaxel",)).cumulative(p, c, NumpyOps) == alone.cumulative(p, c, NumpyOps)
    assert together.rate(0.5, p, c, NumpyOps) == pytest.approx(0.3 * 0.8 * np.exp(-1.0) / (0.8 * np.exp(-1.0) + 0.2))
