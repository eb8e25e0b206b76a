"""`uncertainty_pages`: what stands behind a forecast's intervals, as pages of its report, in plain words.

Every page is made of one object that was computed beforehand, says what it shows and what it does not, and is left out
where its object is not given.
"""

from __future__ import annotations

import numpy as np

from biomodel.calibration.fit import Fit
from biomodel.calibration.samples import Chains
from biomodel.cohort_study import DRAWS, CohortStudy, Evidence, forecast_quantity
from biomodel.conformal_scores import fewest
from biomodel.decisions import NOT_ADVICE, Decision
from biomodel.diagnostics_forecasts import LEVELS
from biomodel.diagnostics_predictive import PredictiveCheck
from biomodel.errors import InputError
from biomodel.forecast import Forecast
from biomodel.report_blocks import (
    Block,
    Listing,
    Picture,
    Section,
    Table,
    Text,
    interval,
    number,
    percent,
    pretty_units,
    short,
)
from biomodel.stages import LABELS, TITLES, Stages
from biomodel.triage import NOT_USABLE, REVIEW, USABLE, Triage

__all__ = [
    "decision_page",
    "evidence_page",
    "map_page",
    "posterior_page",
    "stages_page",
    "triage_page",
    "uncertainty_pages",
]

#: What a verdict asks of the reader.
VERDICTS = {
    USABLE: "Nothing that was checked speaks against reading this forecast with its stated uncertainty.",
    REVIEW: "Somebody who knows images and model should look at the points below before this forecast is read.",
    NOT_USABLE: "This forecast should not be read: what it rests on does not hold for this patient.",
}
#: Correlation from which two parameters are said not to be told apart.
TOGETHER = 0.7
#: Share of the variance from which a stage is named in the words.
MATTERS = 0.1
#: Width of the interval of the shares' sum from which they are said to be rough.
ROUGH = 0.5
#: Days by which a forecast may reach farther or less far than those of a study.
NEAR = 3.0
#: Unknowns of measurement and start, of which a reader of the posterior need not hear one by one.
NUISANCES = ("adc_shift.", "grid.", "initial.", "edge.", "region_shift.", "misalignment.")


def uncertainty_pages(
    forecast: Forecast,
    *,
    check: PredictiveCheck | None = None,
    triage: Triage | None = None,
    stages: Stages | None = None,
    study: CohortStudy | None = None,
    decision: Decision | None = None,
    rate_map: Fit | None = None,
) -> tuple[Section, ...]:
    """Pages on a forecast's uncertainty, for ``report(forecast, pages=...)``.

    Parameters
    ----------
    forecast : Forecast
    check : PredictiveCheck, optional
        Of its fit (:func:`biomodel.diagnostics_predictive.posterior_predictive_check`).
    triage : Triage, optional
        :func:`biomodel.triage.triage` of the forecast.
    stages : Stages, optional
        :func:`biomodel.stages.stages` of the fit.
    study : CohortStudy, optional
        :func:`biomodel.cohort_study.study_cohort`: evidence from patients whose outcome is known.
    decision : Decision, optional
        :func:`biomodel.decisions.decide`.
    rate_map : Fit, optional
        By `FieldLaplace`, of the same patient; the forecast's own fit if it has a map.

    Returns
    -------
    tuple of Section
        Verdict, posterior, map of the growth rate, stages, evidence and decision, as far as given. A `MAP` fit has no
        posterior, so no page of it.

    Raises
    ------
    InputError
        If an object is of another patient than the forecast, or the study of another model or method.
    """
    fit = forecast.fit
    own = fit.patient.fingerprint()
    for name, held in (("check", check), ("triage", triage)):
        if held is not None and held.patient not in ("", own):
            raise InputError(
                f"uncertainty_pages: {name} is of another patient (or other data) than the forecast of "
                f"{fit.patient.id}; expected both of one fit."
            )
    if study is not None and (study.model, study.method) != (repr(fit.model), fit.method):
        raise InputError(
            f"uncertainty_pages: the study of {study.name} calibrated {study.model} by {study.method}, this forecast "
            f"{fit.model!r} by {fit.method}; expected the same, or it is no evidence. Study the cohort with this model."
        )
    mapped = fit if rate_map is None and fit.rate_map is not None else rate_map
    others = {"stages": None if stages is None else stages.fits[0], "decision": None if decision is None else
              decision.fit, "rate_map": mapped}  # fmt: skip
    for name, other in others.items():
        if other is not None and other.patient.fingerprint() != own:
            raise InputError(
                f"uncertainty_pages: {name} is of patient {other.patient.id} (or other data of them) and the forecast "
                f"of {fit.patient.id}; expected the same record. Compute both from one fit's patient."
            )
    pages = []
    if triage is not None:
        pages.append(triage_page(triage))
    if fit.sd.any():
        pages.append(posterior_page(fit, check))
    if mapped is not None:
        pages.append(map_page(mapped))
    if stages is not None:
        pages.append(stages_page(stages))
    if study is not None:
        pages.append(evidence_page(forecast, study))
    if decision is not None:
        pages.append(decision_page(decision))
    return tuple(pages)


def triage_page(found: Triage) -> Section:
    """The verdict, its reasons, and every question that was asked."""
    blocks: list[Block] = [Text(f"{found.verdict.capitalize()}. {VERDICTS[found.verdict]}", "lead")]
    if found.reasons:
        blocks.append(Listing(found.reasons))
    rows = tuple((f.question, f.verdict, f.reason) for f in found.findings)
    blocks.append(Table("What was asked. The verdict is the worst answer.", ("question", "answer", "why"), rows, 3))
    return Section("How far to trust this forecast", tuple(blocks))


def posterior_page(fit: Fit, check: PredictiveCheck | None = None) -> Section:
    """Prior and posterior of each parameter, which of them the data cannot tell apart, and whether the model fits."""
    from biomodel.figure_posterior import correlations, marginals

    data = _data(fit)
    identified = [n for n in fit.identified if not n.startswith(NUISANCES)]
    silent = [n for n in fit.names if n not in fit.identified and not n.startswith(NUISANCES)]
    words = f"Dashed: what was believed of each parameter before this patient's {data}. Bars: what is believed after."
    words += (
        f" The {data} informed {', '.join(identified)}." if identified else f" The {data} informed none of them much."
    )
    if silent:
        words += f" Of {', '.join(silent)}, each by itself, they said little."
    blocks: list[Block] = [
        Text(words),
        Picture.of(marginals(fit), "Prior (dashed) and posterior (bars) of each calibrated parameter.",
                   "Prior and posterior densities. " + words),
    ]  # fmt: skip
    if len(fit.names) > 1:
        close = _together(fit)
        if close:
            told = f"The {data} cannot tell these apart, only what they do together: " + "; ".join(close) + "."
        else:
            told = "No two of them are strongly correlated; more than two may still be known together alone."
        blocks += [Text(told), Picture.of(correlations(fit), "Correlation of each pair of parameters in the posterior. "
                                          "Near 1 or −1 only the two together are known.", told)]  # fmt: skip
    blocks += _notes(fit.notes, fit)
    if fit.samples is not None and fit.samples.chains is not None:
        blocks.append(_chains(fit, fit.samples.chains))
    if check is not None:
        blocks.append(_check(check))
    return Section(f"What the {data} taught the model", tuple(blocks))


def _data(fit: Fit) -> str:
    """What the fit rests on, in a word."""
    return "volumes" if fit.patient.domain.well_mixed else "images"


def _chains(fit: Fit, chains: Chains) -> Table:
    shown = [(i, n) for i, n in enumerate(fit.names) if not n.startswith(NUISANCES)]
    rows = tuple((n, number(float(chains.r_hat[i]), 4), number(float(chains.bulk[i])), number(float(chains.tail[i])))
                 for i, n in shown)  # fmt: skip
    return Table(
        f"{len(chains.z)} Markov chains of {chains.z.shape[1]} draws ({chains.sampler}), {chains.divergences} "
        "divergent. R-hat near 1 (up to 1.01): the chains agree. Effective sizes: as many independent draws would say "
        "as much.",
        ("parameter", "R-hat", "effective size", "of the tails"), rows,
    )  # fmt: skip


def _notes(notes: tuple[str, ...], fit: Fit) -> list[Text]:
    """Notes that do not stand elsewhere in the report, where those of the patient do."""
    return [Text(note, "note") for note in notes if note not in (*fit.patient.notes, NOT_ADVICE)]


def _together(fit: Fit) -> list[str]:
    spread = np.where(fit.sd > 0, fit.sd, 1.0)
    table = fit.covariance / np.outer(spread, spread)
    kept = [i for i, n in enumerate(fit.names) if not n.startswith(NUISANCES)]
    return [f"{fit.names[i]} and {fit.names[j]} (correlation {number(float(table[i, j]), 2)})"
            for k, i in enumerate(kept) for j in kept[k + 1 :] if abs(table[i, j]) >= TOGETHER]  # fmt: skip


def _check(check: PredictiveCheck) -> Block:
    odd = check.surprising()
    told = f"Surprising: {', '.join(odd)}." if odd else "Nothing here would surprise somebody who believed the model."
    rows = tuple(
        (r["statistic"], number(r["observed"]), interval(r["low"], r["high"]), pretty_units(r["units"]) or "1",
         number(r["p"], 2))
        for r in check.table()
    )  # fmt: skip
    return Table(
        f"The patient's data beside data that the fitted model makes itself. p: share of these at or beyond the "
        f"patient's. {told}",
        ("what", "patient", "90 % of the model's", "unit", "p"), rows,
    )  # fmt: skip


def map_page(fit: Fit) -> Section:
    """The map of the growth rate: the rate, its spread, and what the images told about it by place."""
    from biomodel.figure_fields import rate_maps

    found = fit.rate_map
    if found is None:
        raise InputError(f"map_page: a fit by {fit.method} has no map of the rate; calibrate by FieldLaplace().")
    gain = found.gain()
    words = (
        "Tumours do not grow alike everywhere. Left: the rate at which cells divide, place by place, as the images "
        "have it. Middle: how uncertain that is. Right: how much the images told there beyond the prior; where it is "
        "dark, left and middle show the prior and nothing of this patient. "
        f"The map rests on {len(found.lowrank.values)} independent patterns that the images could see, and on its "
        "smoothness."
    )
    caption = "Growth rate, its standard deviation, and the information gained, in the slice with most tumour."
    return Section("Map of the growth rate", (Text(words), Picture.of(rate_maps(fit), caption, words),
                   Text(f"Largest gain at one place: {number(float(gain.max()))} nats.")))  # fmt: skip


def stages_page(found: Stages) -> Section:
    """Which stage of the chain from scanner to forecast the uncertainty comes from."""
    from biomodel.figure_stages import stages_figure

    quantity = found.telling
    rows = found.table(quantity)
    first = sorted((r for r in rows if r.contribution >= MATTERS), key=lambda r: -r.contribution)
    told = ", ".join(f"{r.label} ({percent(min(r.contribution, 1.0))})" for r in first)
    total, low, high = found.sum(quantity)
    unit = " cm³" if quantity == "volume" else ""
    words = (
        f"On day {short(found.day)} the forecast's {TITLES[quantity]} has a standard deviation of "
        f"{number(found.variance(quantity) ** 0.5)}{unit}. Stages with a tenth of its variance or more: "
        f"{told or 'none'}. The forecast gains most where the largest of these becomes better known: a measurement by "
        "measuring better, a prior by learning from other patients."
    )
    if quantity != "volume":
        words += " No draw has any visible volume, so all cells are counted, however sparse."
    table = Table(
        "Share of the variance by stage, with 90 % intervals from the finite number of draws. Known alone: what would "
        "go if this error, and nothing else, became known.",
        ("stage", "share", "90 % interval", "known alone"),
        tuple((r.label, percent(max(r.contribution, 0.0)), f"{round(100 * r.low) + 0} to {round(100 * r.high) + 0} %",
               percent(max(r.first, 0.0))) for r in rows),
    )  # fmt: skip
    blocks: list[Block] = [
        Text(words),
        Picture.of(stages_figure(found, quantity), "Share of the variance, from scanner to forecast.", words),
        table,
        Text(f"The shares sum to {100 * total:.0f} % (90 % interval {100 * low:.0f} to {100 * high:.0f} %); in a "
             "perfect count they sum to 100 %." + (" The interval is wide: more draws would tell more."
                                                   if high - low > ROUGH else "")),
    ]  # fmt: skip
    if found.absent:
        blocks.append(Listing(tuple(f"{LABELS[n]}: {why}" for n, why in found.absent.items())))
    blocks += _notes(found.notes, found.fits[0])
    return Section("Where the uncertainty comes from", tuple(blocks))


def evidence_page(forecast: Forecast, study: CohortStudy) -> Section:
    """Whether intervals like these hold what is then measured, and this forecast's intervals corrected by that."""
    from biomodel.figure_diagnostics import coverage_curves

    found = study.evidence()
    kind = "virtual patients, made by a generator; of real ones they prove nothing" if study.virtual else "patients"
    held, low, high = (a[LEVELS.index(0.9)] for a in (found.before.observed, found.before.low, found.before.high))
    words = (
        f"The same model, calibrated in the same way, forecast {found.n} {kind} ({study.name}), whose later volume was "
        f"then compared. Its 90 % intervals held {percent(held)} of the volumes; right ones would hold "
        f"{100 * low:.0f} to {100 * high:.0f} % in a cohort of this size."
    )
    blocks: list[Block] = [
        Text(words),
        Picture.of(coverage_curves({"as forecast": found.curve}), "Share of measured volumes inside central intervals "
                   "of each size. On the diagonal intervals hold as often as they say; below it they are too narrow, "
                   "above it too wide.", words),
        _coverage(found),
        _adjusted(forecast, study),
    ]  # fmt: skip
    if study.failed:
        blocks.append(Text(f"{len(study.failed)} further patients could not be forecast.", "note"))
    return Section("Do intervals like these hold?", tuple(blocks))


def _coverage(found: Evidence) -> Table:
    before = found.before
    after = {} if found.after is None else dict(zip(found.after.levels, found.after.observed, strict=True))
    rows = tuple(
        (percent(level), percent(held), percent(after.get(level)), f"{100 * low:.0f} to {100 * high:.0f} %")
        for level, held, low, high in zip(before.levels, before.observed, before.low, before.high, strict=True)
    )
    adjusted = (
        ""
        if found.after is None
        else f", {number(found.crps_after)} cm³ adjusted, that is, moved by the errors of the cohort's other patients"
    )
    return Table(
        f"How often intervals held the measured volume. Mean CRPS (smaller is better): {number(found.crps_before)} cm³ "
        f"as forecast{adjusted}.",
        ("interval", "held", "held, adjusted", "right intervals"), rows,
    ).without_empty()  # fmt: skip


def _adjusted(forecast: Forecast, study: CohortStudy) -> Block:
    fit, n = forecast.fit, len(study.patients)
    levels = [a for a in LEVELS if fewest(a) <= n]
    if not levels:
        return Text(f"{n} patients are too few to adjust an interval by; {fewest(0.9)} allow one of 90 %.")
    if forecast.draws < DRAWS:
        return Text(f"{forecast.draws} draws are too few to adjust; make at least {DRAWS}.")
    draws = forecast[forecast_quantity(forecast)].values
    ahead = forecast.times - fit.patient.visits[-1].day
    low, high = study.ahead.min() - NEAR, study.ahead.max() + NEAR
    near = np.flatnonzero((ahead > 1e-9) & (ahead >= low) & (ahead <= high))
    if not len(near):
        return Text(f"The cohort was forecast {short(study.ahead.min())} to {short(study.ahead.max())} days ahead, and "
                    "this patient not: no interval can be adjusted by its errors.")  # fmt: skip
    learned, rows = study.adjustment(), []
    for k in near:
        for level in levels:
            tails = [(1 - level) / 2, (1 + level) / 2]
            bottom, top = learned.interval(draws[:, k], level)
            rows.append((short(float(forecast.times[k])), percent(level), interval(*np.quantile(draws[:, k], tails)),
                         interval(float(bottom), float(top))))  # fmt: skip
    return Table(
        f"This forecast, volume in cm³. Adjusted intervals hold at least as often as they say, on average over "
        f"patients like the {n} of {study.name}{' (virtual)' if study.virtual else ''}, forecast as far ahead; of "
        "one patient alone, or one unlike these, nothing is promised.",
        ("day", "interval", "as forecast", "adjusted"), tuple(rows), texts=2,
    )  # fmt: skip


def _chance(share: float, draws: int) -> str:
    """A probability from draws, without claiming more than so many of them can tell."""
    end = 100 / (draws + 1)
    if share <= 0 or share >= 1:
        return f"< {number(end, 2)} %" if share <= 0 else f"> {number(100 - end, 3)} %"
    return percent(share)


def decision_page(found: Decision) -> Section:
    """What each regimen leaves, and how probable it is that one leaves less than another."""
    from biomodel.figure_decisions import regimens

    best, chance = max(found.least().items(), key=lambda item: item[1])
    draws = len(found.values(best))
    what, fewest_of = ("cells", "fewest tumour cells") if found.quantity == "cells" else ("cm³", "the least volume")
    words = (
        f'The same draws went through {len(found.labels)} regimens. On day {short(found.day)} "{best}" leaves '
        f"{fewest_of} with probability {_chance(chance, draws)}. {NOT_ADVICE}"
    )
    rows = []
    least, gone = found.least(), found.gone()
    for label in found.labels:
        doses = "; ".join(f"{t.doses} × {t.agent}" for t in found.totals(label) if t.doses) or "none"
        low, middle, high = np.quantile(found.values(label, "volume"), [0.05, 0.5, 0.95])
        rows.append((label, doses, number(middle), interval(low, high), _chance(gone[label], draws),
                     _chance(least[label], draws)))  # fmt: skip
    pairs = tuple(
        (f"{p.first} against {p.second}", _chance(p.probability, draws), f"± {100 * p.error:.0f} %",
         "–" if np.isnan(p.ratio) else f"{number(p.ratio)} ({interval(p.ratio_low, p.ratio_high)})")
        for p in found.pairs()
    )  # fmt: skip
    blocks: list[Block] = [
        Text(words, "lead"),
        Picture.of(regimens(found), "Above: doses of each regimen. Below: what each leaves, and the probability that "
                   "the row leaves less than the column.", words),
        Table(f"Regimens on day {short(found.day)}.", ("regimen", "doses to come", "volume (cm³)", "90 % interval",
              "no visible tumour", "leaves least"), tuple(rows), texts=2),
        Table(f"Pairs, draw by draw: probability that the first leaves fewer {what}, its Monte-Carlo error, and first "
              "over second.",
              ("pair", "probability", "error", "ratio (90 %)"), pairs),
        *_notes(found.notes, found.fit),
    ]  # fmt: skip
    return Section("Which regimen?", tuple(blocks))
