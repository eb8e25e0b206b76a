# %% [markdown]
# # 18. Amortised inference for a cohort
#
# Every patient of a cohort has two early scans and a course of a drug; wanted are growth, spread and efficacy with
# their uncertainty, and a map of a later day. An operator is trained once, on simulated patients, and then answers in
# milliseconds. A few Gauss-Newton steps on the patient's own scans polish its answer. All patients are virtual: their
# truth is solved on voxels half as large, by another method than the operator's teachers.

# %%
import os
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import biomodel as bm
import pinn
from biomodel.truth import Hazard, average, integrate

folder = Path(os.environ.get("TUMORCAST_EXAMPLES") or tempfile.mkdtemp())

# %% [markdown]
# ## The cohort
# What is known before any scan: the model with its priors, one focus of unknown place, peak and width, two visits two
# to five weeks apart, and random courses. Patient *i* of a seed is always the same.

# %%
model = bm.ReactionDiffusion(
    bm.Logistic(k=bm.LogNormal(0.06, 0.4)), bm.Isotropic(D=bm.LogNormal(0.15, 0.5)),
    [bm.Chemotherapy("paclitaxel", efficacy=bm.LogNormal(0.12, 0.5))],
)  # fmt: skip
domain = bm.Domain.box((1, 32, 32), (2.0, 2.0, 2.0))
start = pinn.Foci(1, bm.LogitNormal(0.35, 0.7), bm.LogNormal(5.5, 0.25), 0.12)
cohort = pinn.Setting(model, domain, start, courses=(pinn.Courses("paclitaxel"),))

# %% [markdown]
# ## Training beside production
# Another process makes the samples while this one trains; with FEniCS installed, `pinn.FenicsMaker` makes a share of
# them the same way. The operator has two parts: a mixture density of all unknowns, and a DeepONet for the maps that the
# model's own equation helps to train. A useful one takes minutes; this one is trained for a few seconds.

# %%
operator = pinn.Operator(cohort)
recipe = pinn.Recipe(steps=12, batch=96, copies=2)
with pinn.Stream([pinn.Lane([pinn.TorchMaker(cohort)])], samples=768, seed=1, chunk=32) as stream:
    began = time.process_time()
    pinn.Trainer(operator, recipe, stream.count, device="cpu").run(stream)
    print(f"trained in {time.process_time() - began:.0f} CPU-seconds")
print(*stream.usage.lines(), sep="\n")

# %% [markdown]
# ## Five new patients

# %%
FINER = 2
fine = bm.Domain.box((1, 32 * FINER, 32 * FINER), (2.0, 2.0 / FINER, 2.0 / FINER))


def seen(case, rng):
    """True states of both visits and of the later day, and the noisy scans of the visits."""
    values = cohort.values(case.z)
    y, x, peak, width = case.z[3:]
    peak, width = start.peak.to_value(peak), start.width.to_value(width)
    # The first voxel's centre is at 0: the fine grid begins a quarter of a voxel before it.
    square = (fine.coords["y"][:, None] - 0.5 - y) ** 2 + (fine.coords["x"] - 0.5 - x) ** 2
    first = peak * np.exp(-square / (2 * width**2))[None]
    days = np.array([d.day for d in case.schedule.doses])
    hazard = Hazard(days, np.full(len(days), values["paclitaxel.efficacy"]), np.full(len(days), 0.35))
    run = integrate(first[None], fine.mask, np.full(fine.shape, values["diffusion.D"]), fine.spacing,
                    values["growth.k"], hazard, case.days)  # fmt: skip
    states = np.stack([average(u, (1, FINER, FINER))[0] for u in (first[None], *run)])
    return states, states[:2] + case.noise * rng.standard_normal(states[:2].shape)


cases = cohort.cases(seed=2, indices=range(5))
rng = np.random.default_rng(3)
states, scans = zip(*(seen(case, rng) for case in cases), strict=True)
given = pinn.Scans.of(cohort, cases, np.stack(scans))
began = time.process_time()
posterior = operator.posterior(given)
maps = operator.forecast(given, draws=32)
print(f"operator: {(time.process_time() - began) / len(cases):.2f} CPU-seconds per patient, its own forecast included")

# %% [markdown]
# Beside the operator: the polish, and the full fit from the prior's median, the same solver and likelihood. The polish
# ends where the full fit ends. For a small problem like this one the full fit is cheap, and the operator is worth its
# training for cohorts, for a first answer at once, and as a proposal that the exact posterior can be weighed from.

# %%
print(f"\n{'':14s}" + "".join(f"{n.split('.')[1]:>22s}" for n in model.free) + f"{'forecast off':>14s}{'CPU s':>8s}")
for i, (case, state) in enumerate(zip(cases, states, strict=True)):
    problem = pinn.ScanProblem(cohort, case, scans[i])
    size, later = np.linalg.norm(state[2]), case.days[1]
    print(f"patient {i + 1}, true " + "".join(f"{np.exp(v):15.4f}{'':7s}" for v in case.z[:3]))
    rows = [("amortised", posterior.mean[i], posterior.sd[i], maps.mean[i], 0.0)]
    for name, fit in (("polished", lambda p=problem, z=posterior.mean[i]: pinn.polish(p, z)),
                      ("full fit", lambda p=problem: pinn.full_fit(p))):  # fmt: skip
        began = time.process_time()
        found = fit()
        rows.append((name, found.z, found.sd, problem.forecast(found.z, later), time.process_time() - began))
    for name, z, sd, u, seconds in rows:
        values = "".join(f"{np.exp(z[k]):11.4f} ({np.exp(-sd[k]):4.2f}-{np.exp(sd[k]):4.2f})" for k in range(3))
        print(f"{name:14s}{values}{np.linalg.norm(u - state[2]) / size:13.1%}{seconds:9.2f}")
    print(f"{'carry forward':14s}{'':66s}{np.linalg.norm(scans[i][1] - state[2]) / size:13.1%}")

# %% [markdown]
# In brackets: factors of one posterior standard deviation. The weights of draws around the polished optimum and from
# the operator's density turn both into the exact posterior:

# %%
problem = pinn.ScanProblem(cohort, cases[0], scans[0])
exact = pinn.weighed(problem, pinn.polish(problem, posterior.mean[0]), posterior.patient(0), draws=512)
print(f"\npatient 1, {exact.ess:.0f} effective of 512 draws; 5, 50 and 95 % of each parameter:")
for name, q in zip(model.free, np.exp(exact.quantile([0.05, 0.5, 0.95])).T, strict=False):
    print(f"  {name:22s}" + "".join(f"{v:9.4f}" for v in q))

# %%
figure, axes = plt.subplots(1, 4, figsize=(14, 3.4), layout="constrained")
pictures = ((scans[0][0, 0], "first scan"), (scans[0][1, 0], f"day {cases[0].days[0]:.0f}"),
            (maps.mean[0, 0], f"operator, day {cases[0].days[1]:.0f}"), (states[0][2, 0], "truth"))  # fmt: skip
for axis, (values, title) in zip(axes, pictures, strict=True):
    image = axis.imshow(values, origin="lower", extent=(-1, 63, -1, 63), vmin=0, vmax=1, cmap="magma")
    axis.set(title=title, xlabel="x, mm", ylabel="y, mm")
figure.colorbar(image, ax=axes[-1], label="cell fraction")
figure.savefig(folder / "amortised.png", dpi=130)
