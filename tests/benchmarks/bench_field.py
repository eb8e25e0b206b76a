"""A map of the growth rate on two grids: solves, iterations, time and memory. Virtual: a made-up breast and tumour.

One physical patient is imaged on voxels of one size and of half that size. The truth, with a map of the growth rate
that is no draw of the prior, is solved by `biomodel.truth` on cells half as large as the finer voxels. The noise is one
field with a correlation length of 4 mm for both grids.

Run: python tests/benchmarks/bench_field.py [--coarse-only] [--learn] [--draws 200] [--seed 0]
"""

import argparse
import resource
import time

import numpy as np
from scipy.ndimage import gaussian_filter

import biomodel as bm
from biomodel.anatomy import Breast, draw_breast, draw_tumour, random_field
from biomodel.calibration.field import FieldLaplace
from biomodel.calibration.field_evidence import LearnedMatern
from biomodel.calibration.field_prior import Matern
from biomodel.calibration.field_problem import FieldProblem
from biomodel.calibration.lowrank import conjugate_gradients
from biomodel.patient import CellularitySettings
from biomodel.regimens import paclitaxel_carboplatin_ac
from biomodel.truth import Hazard, average, integrate, refine
from biomodel.virtual import Matched

SHAPE, SPACING = (32, 64, 64), (2.0, 1.5, 1.5)  # the finer voxels
DAYS = (0.0, 20.0, 41.0, 62.0)
DIFFUSION, RATE, SPREAD = 0.08, 0.05, 0.4
SETTINGS = CellularitySettings(adc_w=3.0e-3, adc_min=0.6e-3, voxel_cv=0.05, visible_fraction=0.1)
#: No shorter than the larger voxels: both grids then hold the same information.
NOISE_LENGTH, CV, SHIFT = 4.0, 0.05, 0.05


def truth(seed: int):
    """Mask and cell fractions of each day on voxels, the map of the rate, and what each drug does."""
    rng = np.random.default_rng(seed)
    cells = tuple(s / 2 for s in SPACING)
    mask, fibroglandular, _ = draw_breast(rng, SHAPE, SPACING, Breast())
    tumour = draw_tumour(rng, mask, fibroglandular, SPACING, (2, 2, 2), 0.1, Breast(radius=(15.0, 17.0)))
    field = random_field(rng, mask.shape, SPACING, 8.0)
    rate = refine(RATE * np.exp(SPREAD * field / field[mask].std()), (2, 2, 2))
    drugs = {d.agent: d for d in Matched().drugs}
    doses = paclitaxel_carboplatin_ac().doses
    weight = [drugs[d.agent].efficacy.median * d.amount / drugs[d.agent].reference_dose for d in doses]
    hazard = Hazard(np.array([d.day for d in doses]), np.array(weight), np.array([0.35 for _ in doses]))
    fine = refine(mask, (2, 2, 2))
    runs = integrate(tumour[None], fine, np.full(fine.shape, DIFFUSION), cells, rate, hazard, DAYS)
    return mask, [average(u[0], (2, 2, 2)) for u in runs], average(rate, (2, 2, 2))


def patient(mask, fractions, factor: int, seed: int) -> bm.Patient:
    """The patient on voxels `factor` times as large, with the same noise."""
    factors = (factor,) * 3
    width = [NOISE_LENGTH / (2 * np.sqrt(np.pi)) / s for s in SPACING]
    visits = []
    for number, (day, u) in enumerate(zip(DAYS, fractions, strict=True), start=1):
        rng = np.random.default_rng([seed, number])
        noise = gaussian_filter(rng.standard_normal(u.shape), width)
        adc = SETTINGS.adc_w - u * (SETTINGS.adc_w - SETTINGS.adc_min)
        adc *= (1 + SHIFT * rng.standard_normal()) * (1 + CV * noise / noise.std())
        seen = average(u, factors) >= SETTINGS.visible_fraction
        visits.append(bm.Visit(number=number, day=day, adc=average(adc, factors), region=seen))
    spacing = tuple(s * factor for s in SPACING)
    inside = average(mask.astype(float), factors) >= 0.5
    domain = bm.Domain.box(inside.shape, spacing, inside)
    return bm.Patient(
        id=f"virtual-field-{factor}", organ="breast", domain=domain, visits=tuple(visits),
        schedule=paclitaxel_carboplatin_ac(), cellularity=SETTINGS, notes=("Virtual: made by bench_field.py.",),
    )  # fmt: skip


def newton(fit: bm.Fit) -> int:
    """Conjugate-gradient products for one Newton system at the fit's centre, to a relative residual of 1e-3."""
    found = fit.rate_map
    problem = FieldProblem(fit.model, fit.patient, fit.solver, found.prior.matern, found.link, NOISE_LENGTH)
    problem.replan(found.mode)
    linear = problem.linearise(found.mode)
    return conjugate_gradients(linear.hessian, linear.pulled(), 1e-3)[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--coarse-only", action="store_true")
    parser.add_argument("--learn", action="store_true", help="set the field's length and sd by the evidence")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    mask, fractions, rate = truth(given.seed)
    prior = LearnedMatern() if given.learn else Matern(10.0, 0.4)
    print(f"virtual patient, seed {given.seed}; calibrated on visits 1 to 3 of days {DAYS}; prior of the field {prior}")
    counts: list[tuple[int, ...]] = []
    for factor in (2,) if given.coarse_only else (2, 1):
        whole = patient(mask, fractions, factor, given.seed)
        known = whole.until(visit=3)
        model = bm.ReactionDiffusion(
            bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy(agent) for agent in known.schedule.agents]
        ).with_priors(Matched().priors())
        wall, begin = time.perf_counter(), time.process_time()
        fit = bm.calibrate(model, known, method=FieldLaplace(prior, noise_length=NOISE_LENGTH))
        middle = time.process_time()
        forecast = bm.forecast(fit, times=[DAYS[-1]], draws=given.draws, seed=0)
        end, wall = time.process_time(), time.perf_counter() - wall
        found = fit.rate_map
        region = known.visits[0].region[fit.box]
        true = average(rate, (factor,) * 3)[fit.box]
        levels, fields, _ = found.draw(given.draws, 1)
        drawn = levels[:, fit.names.index("growth.k"), None] + fields[:, region]
        z = (np.log(found.rate(fit.values["growth.k"]) / true)[region]) / drawn.std(0)
        score = {row["predictor"]: row for row in bm.score(forecast, whole).rows}
        counts.append((newton(fit), sum(found.steps), fit.solves, found.lowrank.products))
        inside = int(whole.domain.crop(fit.box).mask.sum())
        print(f"\n{'×'.join(map(str, whole.domain.shape))} voxels of {whole.domain.spacing} mm, box "
              f"{found.prior.shape}: {inside} of {int(whole.domain.mask.sum())} voxels of the mask; "
              f"{len(found.mode)} whitened unknowns")  # fmt: skip
        print(f"  conjugate-gradient products {found.steps}, together {sum(found.steps)}; converged {fit.converged}; "
              f"one Newton system at the end, to 1e-3: {counts[-1][0]}")  # fmt: skip
        low, matern = found.lowrank, found.prior.matern
        print(f"  posterior: {len(low.values)} eigenvalues above 1 of {low.values[0]:.0f} and less, "
              f"next {low.next_value:.2f}, {low.products} products; {fit.solves} solves in all")  # fmt: skip
        print(f"  field: length {matern.length:.1f} mm, sd {matern.sd:.2f}; correlation of log k "
              f"with truth in the first region {np.corrcoef(np.log(true[region]), found.mean[region])[0, 1]:.2f}, "
              f"mean z² {np.mean(z**2):.2f}, information {found.lowrank.information:.1f} nats")  # fmt: skip
        for row in fit.table()[:2]:
            print(f"  {row['name']} {row['estimate']:.3f} ({row['low']:.3f} to {row['high']:.3f})")
        print(f"  true D {DIFFUSION}; median of the true k in the first region {np.median(true[region]):.3f}")
        for name, row in score.items():
            ccc = "" if row["ccc"] is None else f", CCC {row['ccc']:.2f}"
            print(f"  day {DAYS[-1]:g}, {name}: volume {row['volume']:.2f} (seen {row['observed_volume']:.2f}) cm³, "
                  f"CRPS {row['crps']:.2f}{ccc}")  # fmt: skip
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"  CPU: calibration {middle - begin:.0f} s, {given.draws} forecasts {end - middle:.0f} s; wall "
              f"{wall:.0f} s; peak memory so far {peak:.2f} GB")  # fmt: skip
        for note in fit.notes:
            print(f"  note: {note}")
    if len(counts) == 2:
        names = ("products of one Newton system", "conjugate-gradient products", "solves", "products of the posterior")
        print("\nhalf the voxels: " + ", ".join(f"{n} {100 * (b / a - 1):+.0f} %" for n, a, b in
                                              zip(names, *counts, strict=True)))  # fmt: skip


if __name__ == "__main__":
    main()
