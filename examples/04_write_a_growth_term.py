# %% [markdown]
# # 4. Write a growth term
#
# A term is one pointwise function and its parameters. Solvers, calibration, forecasts and reports then work with it as
# with any other. Here: logistic growth with a weak Allee effect, where sparse cells divide more slowly, as seen in
# cultures of breast cancer cells (Johnson et al. 2019, doi:10.1371/journal.pbio.3000399).

# %%
from dataclasses import dataclass

import biomodel as bm
from biomodel.parameters import Parameter, Prior
from biomodel.terms import Growth
from biomodel.virtual import small_patient

# %% [markdown]
# ## The term
# `rate` may use only `u` (the cell fraction), `p` (the term's own parameters), `c` (fields that it declares) and `ops`
# (exp, log, sqrt, where, ...): then every solver can evaluate and differentiate it.


# %%
@dataclass(frozen=True)
class Allee(Growth):
    k: Prior = bm.LogNormal(0.06, 0.4)
    a: Prior = bm.LogNormal(0.05, 0.7)

    @property
    def parameters(self):
        return (
            Parameter("k", "1/day", self.k, (1e-6, 2.0), description="proliferation rate of dense cells"),
            Parameter("a", "1", self.a, (1e-4, 1.0), description="cell fraction at which growth is halved"),
        )

    def rate(self, u, p, c, ops):
        return p["k"] * u * (1 - u) * u / (u + p["a"])


# %% [markdown]
# ## The same calibration
# Two models on the same two visits, compared by evidence.

# %%
patient = small_patient(seed=7).patient
known = patient.until(visit=2)
drugs = [bm.Chemotherapy(agent) for agent in known.schedule.agents]
comparison = bm.compare(
    [bm.ReactionDiffusion(growth, bm.Isotropic(), drugs) for growth in (bm.Logistic(), Allee())], known
)
for row in comparison.table():
    print(f"{row['model'].split()[0]:10} log evidence {row['log_evidence']:8.1f}  weight {row['evidence_weight']:.2f}")

# %% [markdown]
# ## The same forecast

# %%
last = patient.visits[-1].day
for fit in comparison.fits:
    forecast = bm.forecast(fit, until=last, draws=40, seed=0)
    low, middle, high = forecast["volume"].sel(time=last).quantile([0.05, 0.5, 0.95], "draw").values
    name = type(fit.model.growth).__name__
    print(f"{name:10} volume on day {last:g}: {middle:.2f} cm³ (90 %: {low:.2f} to {high:.2f})")
print({name: round(value, 4) for name, value in comparison.fits[1].values.items() if name.startswith("growth")})
