"""Computes the tables and pictures of RESULTS.md from results/runs.jsonl, by the statistics of eval.py.

    python -m results.tables            # prints the tables, writes the pictures
    python -m results.tables --write    # and puts the tables where the documents have their marks

A table stands between the lines <!-- table NAME --> and <!-- end -->. A question whose runs are not all
finished has no table yet, but for question 3, where a student counts once it has met every teacher.
"""

import argparse
import collections
import functools
import io
import json
import os
import pathlib
import textwrap

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import eval
from results import seeds, validate
from results.run import (
    ABLATIONS,
    ARMS,
    BASE,
    BASE_2,
    LABEL_ARMS,
    LABEL_RATE,
    LABEL_TEACHERS,
    LEARNING_RATES,
    N_TD_SEEDS,
    READY_STARTS,
    READY_TEACHERS,
    RESCUE_STARTS,
    RESCUES,
    SCALE_BASE,
    SCALE_TEACHER,
    STUDENTS,
    TEACHERS,
    TEST_SETS,
    UNITS,
    experiments,
    finished_lines,
)

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
DOCUMENTS = [ROOT / "RESULTS.md", ROOT / "README.md", HERE / "tables.md"]  # which have tables

KS = [1, 2, 4, 8, 16, 32]

# Measures of question 3. Those that repeat another one are left out, because Holm's correction counts each.
MEASURES = ["vuss", "vuss_4", "top1", "mass_teacher", "advantage", "entropy_gap", "kl_full", "teacher_logp"]
BASELINES = ["error_between", "token_agreement", "trigram_f1"]

# Measures of question 8, which may tell whether OPD is the better next step. VUSS at k = 1 is 2 − top1.
READY_MEASURES = ["kl_full", "top1", *(f"vuss_{k}" for k in KS[1:-1]), "vuss", "teacher_logp", "looping"]
READY_MEASURES += ["error_student"]
READY_ARMS = {"opd": "OPD", "td": "more TD", "teacher-kl": "teacher-kl"}

# ---- figures of runs ---------------------------------------------------------------------------------------


@functools.cache
def units_of(stem):
    """{speaker: reference units} of a set, in the order of the errors of a line."""
    units = json.loads(UNITS.read_text(encoding="utf-8"))[stem]
    return {speaker: units[speaker] for speaker in sorted(units)}


def rate(line, stem):
    """Σ errors / Σ units in %."""
    return 100 * sum(line["errors"][stem]) / sum(units_of(stem).values())


def mean_rate(line):
    return float(np.mean([rate(line, stem) for stem in TEST_SETS]))


def macro_change(lines, before):
    """100 (e^M − 1), M the mean over runs and sets of ln(rate / rate before)."""
    logs = []
    for line in lines:
        logs += [np.log(rate(line, stem) / rate(before, stem)) for stem in TEST_SETS]
    return eval.percent(float(np.mean(logs)))


def evaluation_of(lines, question, model):
    """The line of a model as it is, or None."""
    for line in lines:
        if line["question"] == question and line.get("model") == model:
            return line
    return None


def by_arm(lines):
    """{arm: its lines, by seed}, arms in the order of the lines."""
    arms = collections.defaultdict(list)
    for line in lines:
        arms[line["arm"]].append(line)
    return {arm: sorted(own, key=lambda line: line["seed"]) for arm, own in arms.items()}


def runs_of(lines, question):
    """{arm: its lines} of a question, without models that were evaluated as they are."""
    return by_arm(line for line in lines if line["question"] == question and "arm" in line)


def joint_counts(lines, stems=TEST_SETS):
    """The table (G, S, runs + 1) of eval.py: errors by speaker and set in each run, then units."""
    sets = []
    for stem in stems:
        units = units_of(stem)
        columns = [line["errors"][stem] for line in lines] + [list(units.values())]
        sets.append(dict(zip(units, np.array(columns).T)))
    return eval.cluster_table(sets)


def paired(runs_a, runs_b):
    """The lines of two recipes that share their seeds, in the order of the seeds."""
    seeds_a = {line["seed"]: line for line in runs_a}
    seeds_b = {line["seed"]: line for line in runs_b}
    shared = sorted(seeds_a.keys() & seeds_b.keys())
    return [seeds_a[seed] for seed in shared], [seeds_b[seed] for seed in shared]


# ---- Markdown ----------------------------------------------------------------------------------------------


def markdown(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def signed(value):
    return f"{value:+.1f}".replace("-", "−")


def spread(low, high):
    return "–" if np.isnan(low) else f"{signed(low)} to {signed(high)}"


CONTRAST_HEADER = ["macro change, %", "mean", "each seed", "sd over seeds"]
CONTRAST_HEADER += ["95 %: other speakers", "95 %: other seeds and speakers", "p"]


def change_between(runs_a, runs_b):
    """The macro change of B against A, paired by seed, with its three spreads."""
    runs_a, runs_b = paired(runs_a, runs_b)
    return seeds.change_over_seeds(joint_counts(runs_a + runs_b), len(runs_a), is_paired=True)


def contrast_row(name, runs_a, runs_b):
    return figures_row(name, change_between(runs_a, runs_b))


def figures_row(name, figures):
    per_seed = " ".join(signed(value) for value in figures["per_seed"])
    row = [name, signed(figures["value"]), per_seed]
    row += [
        eval.number_text(figures["seed_sd"], ".1f"),
        spread(figures["cluster_low"], figures["cluster_high"]),
    ]
    return [*row, spread(figures["low"], figures["high"]), eval.p_text(figures["p"])]


def rates_row(name, lines):
    """Rates of each set as the mean over seeds, their mean, and the mean of each seed."""
    row = [name]
    for stem in TEST_SETS:
        rates = [rate(line, stem) for line in lines]
        row.append(f"{np.mean(rates):.1f}")
    means = [mean_rate(line) for line in lines]
    row.append(f"{np.mean(means):.1f}")
    row.append(each_rate(lines) if len(lines) > 1 else "")
    return row


def each_rate(lines):
    """The mean rate of each line."""
    return " ".join(f"{mean_rate(line):.1f}" for line in lines)


RATES_HEADER = [*TEST_SETS, "mean", "mean of each seed"]


def change_cell(lines, base):
    """The macro change against the base, all seeds together."""
    return f"{signed(macro_change(lines, base))} %"


def vuss_key(k):
    """The name of VUSS at k in metrics and measures."""
    return "vuss" if k == KS[-1] else f"vuss_{k}"


def save_picture(figure, path):
    """Writes a picture with 64 colours, which makes the file a quarter as large."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80)
    picture = Image.open(buffer).convert("RGB")  # matplotlib brings Pillow
    picture.quantize(64).save(path, optimize=True)


def dots(path, groups, label):
    """Draws each value of {name: values} as a point, and the mean of each name as a line."""
    figure = Figure(figsize=(max(6, 0.5 * len(groups)), 3.4), layout="constrained")
    axis = figure.subplots()
    for place, values in enumerate(groups.values()):
        axis.plot([place] * len(values), values, "o", alpha=0.6)
        axis.hlines(np.mean(values), place - 0.25, place + 0.25, color="black", linewidth=1)
    names = [textwrap.fill(name, 18) for name in groups]
    axis.set_xticks(range(len(groups)), names, rotation=60 if len(groups) > 5 else 0)
    axis.set_ylabel(label)
    save_picture(figure, path)


def draw_changes(path, runs, base):
    """Draws the macro change against the base of each run of {arm: its lines}."""
    groups = {}
    for arm, own in runs.items():
        groups[arm] = [macro_change([line], base) for line in own]
    dots(path, groups, "change against the base, %")


def draw_opd_against_offline(path, conditions):
    """Draws the macro change of opd against offline-kl, a point a seed, of {condition: {arm: its lines}}."""
    groups = {}
    for name, runs in conditions.items():
        offline, opd = paired(runs["offline-kl"], runs["opd"])
        groups[name] = [macro_change([b], a) for a, b in zip(offline, opd)]
    dots(path, groups, "opd against offline-kl, macro %")


# ---- question 1 --------------------------------------------------------------------------------------------


def tuning(lines, question="tune"):
    """The grid of learning rates: error on dev after 100 steps, a row an arm, and a teacher of question 9."""
    grid = collections.defaultdict(dict)  # arm → {learning rate: error}
    for line in lines:
        if line["question"] == question:
            name = line["arm"]
            if question == "labels-tune" and name != "ce-reference":
                name += f", {label_teacher(line)} teacher"
            grid[name][line["lr"]] = rate(line, "dev")
    rows = []
    for arm, errors in grid.items():
        best = min(errors, key=errors.get)
        row = [arm]
        for lr in LEARNING_RATES:
            cell = f"{errors[lr]:.2f}"
            row.append(f"**{cell}**" if lr == best else cell)
        rows.append(row)
    header = ["error on dev, %"] + [f"lr {lr:g}" for lr in LEARNING_RATES]
    return markdown(header, rows)


def arm_runs(lines):
    """{arm: its lines} of question 1, and the lines of base and teacher as they are."""
    runs = runs_of(lines, "table-1")
    base = evaluation_of(lines, "table-1", "example/base")
    teacher = evaluation_of(lines, "table-1", "example/teacher")
    return runs, base, teacher


def arms(lines):
    """Table 1: base, arms and teacher."""
    runs, base, teacher = arm_runs(lines)
    rows = [[*rates_row("base", [base]), "", "", ""]]
    for arm in ARMS:
        own = runs[arm]
        first = np.mean([line["vuss"]["vuss"]["first"] for line in own])
        last = np.mean([line["vuss"]["vuss"]["last"] for line in own])
        vuss = f"{first:.2f} → {last:.2f}"
        rows.append([*rates_row(arm, own), change_cell(own, base), vuss, f"{own[0]['lr']:g}"])
    rows.append([*rates_row("teacher", [teacher]), "", "", ""])
    header = ["%", *RATES_HEADER, "macro change", "VUSS, first → last 10 steps", "lr"]
    return markdown(header, rows)


def draw_arms(lines):
    runs, base, _ = arm_runs(lines)
    draw_changes(HERE / "table-1.png", runs, base)


def arms_contrasts(lines):
    """Each arm against offline-kl; the first is the primary comparison."""
    runs, _, _ = arm_runs(lines)
    rows = []
    for arm in ("opd", "teacher-kl", "ce-reference", "ce-teacher"):
        name = f"**{arm}** (primary)" if arm == "opd" else arm
        rows.append(contrast_row(f"{name} against offline-kl", runs["offline-kl"], runs[arm]))
    return markdown(CONTRAST_HEADER, rows)


def same_rate_runs(lines):
    """The runs of offline-kl with the learning rate of opd."""
    return [line for line in lines if line["question"] == "rate"]


def rate_contrasts(lines):
    """opd against offline-kl with the same learning rate, and what that rate does to offline-kl."""
    runs, _, _ = arm_runs(lines)
    same_rate = same_rate_runs(lines)
    rows = [
        contrast_row("opd against offline-kl, both with the rate of opd", same_rate, runs["opd"]),
        contrast_row("offline-kl: the rate of opd against its own", runs["offline-kl"], same_rate),
    ]
    return markdown(CONTRAST_HEADER, rows)


# ---- question 2 --------------------------------------------------------------------------------------------


def recipe_runs(lines):
    """{arm: lines with errors} of question 2."""
    return by_arm(line for line in lines if line["question"] == "table-2" and "errors" in line)


def recipe(lines):
    """Table 2: the recipe."""
    base = evaluation_of(lines, "table-1", "example/base")
    runs = recipe_runs(lines)
    rows = [[*rates_row("base", [base]), ""]]
    names = {"opd": "base + OPD", "td": "base + TD", "td+sft": "base + TD + more SFT"}
    names["td+opd"] = "base + TD + OPD"
    for arm, name in names.items():
        rows.append([*rates_row(name, runs[arm]), change_cell(runs[arm], base)])
    return markdown(["%", *RATES_HEADER, "macro change"], rows)


def recipe_contrasts(lines):
    runs = recipe_runs(lines)
    rows = []
    for arm, other in (("td+opd", "opd"), ("td+opd", "td+sft"), ("td+sft", "opd"), ("td+sft", "td")):
        rows.append(contrast_row(f"{arm} against {other}", runs[other], runs[arm]))
    return markdown(CONTRAST_HEADER, rows)


def recipe_rates(lines):
    """OPD after TD against more SFT, both with the rate of OPD, and what that rate does to more SFT."""
    runs = recipe_runs(lines)
    same_rate = runs_of(lines, "td-rate")["td+sft"]
    rows = [
        contrast_row("td+opd against td+sft, both with the rate of opd", same_rate, runs["td+opd"]),
        contrast_row("td+sft: the rate of opd against its own", runs["td+sft"], same_rate),
    ]
    return markdown(CONTRAST_HEADER, rows)


def recipe_vuss(lines):
    """VUSS during OPD with and without TD, and the difference at equal error on dev."""
    runs = recipe_runs(lines)
    rows = []
    for arm, name in (("opd", "without TD"), ("td+opd", "with TD")):
        row = [name]
        for k in KS:
            values = [line["vuss"][vuss_key(k)]["all"] for line in runs[arm]]
            row.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        rows.append(row)
    row = ["TD's difference at equal error, each seed"]
    curves = recipe_curves(lines)
    for k in KS:
        differences = []
        for seed, opd in curves["opd"].items():
            differences.append(difference_at_equal_error(opd, curves["td+opd"][seed], k))
        row.append(" ".join(f"{value:+.3f}".replace("-", "−") for value in differences))
    rows.append(row)
    header = ["VUSS"] + [f"k = {k}" for k in KS]
    return markdown(header, rows)


def recipe_curves(lines):
    """{arm: {seed: [(steps of OPD, error on dev, measures)]}}."""
    curves = {"opd": collections.defaultdict(list), "td+opd": collections.defaultdict(list)}
    measured = [line for line in lines if line["question"] == "table-2" and "measures" in line]
    for line in sorted(measured, key=lambda line: line["steps"]):
        point = (line["steps"], line["baselines"]["error_student"], line["measures"])
        if line["arm"] == "opd" and line["steps"] == 0:  # the base, which was measured once for all seeds
            for seed in range(N_TD_SEEDS):
                curves["opd"][seed].append(point)
        else:
            curves[line["arm"]][line["seed"]].append(point)
    return curves


def difference_at_equal_error(curve_a, curve_b, k):
    """Mean over the points of curve B of its VUSS − that of curve A at the same error, linear between points.

    Points of B whose error curve A does not have are left out; NaN where that is all of them.
    """
    key = vuss_key(k)
    errors_a = [error for _, error, _ in curve_a]
    values_a = [measures[key] for _, _, measures in curve_a]
    order = np.argsort(errors_a)
    differences = []
    for _, error, measures in curve_b:
        if min(errors_a) <= error <= max(errors_a):
            at_error = np.interp(error, np.array(errors_a)[order], np.array(values_a)[order])
            differences.append(measures[key] - at_error)
    return float(np.mean(differences)) if differences else float("nan")


def draw_recipe(lines):
    """VUSS at k = 1 and at k = 32 over the error on dev, along OPD with and without TD."""
    curves = recipe_curves(lines)
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axis, key in zip(figure.subplots(1, 2), ("vuss_1", "vuss")):
        for arm, colour in (("opd", "C0"), ("td+opd", "C1")):
            for seed, curve in curves[arm].items():
                errors = [error for _, error, _ in curve]
                values = [measures[key] for _, _, measures in curve]
                label = {"opd": "without TD", "td+opd": "with TD"}[arm] if seed == 0 else None
                axis.plot(errors, values, "o-", color=colour, alpha=0.6, label=label)
        axis.set_xlabel("error on dev, %")
        axis.set_ylabel("VUSS at k = 1" if key == "vuss_1" else "VUSS at k = 32")
        axis.legend()
    save_picture(figure, HERE / "table-2.png")


# ---- question 3 --------------------------------------------------------------------------------------------


def overlap_table(lines):
    """Question 3 as a table of results/validate.py; None while fewer than three students are through."""
    pairs = {}  # (student, teacher) models → overlap before
    for line in lines:
        if line["question"] == "table-3" and "measures" in line:
            pairs[line["student"], line["teacher"]] = line
    cells = []
    for line in lines:
        if line["question"] != "table-3" or "arm" not in line:
            continue
        before = evaluation_of(lines, "table-3", line["student"])
        teacher = evaluation_of(lines, "table-3", line["teacher"])
        overlap = pairs[line["student"], line["teacher"]]
        figures = {**overlap["measures"], **overlap["baselines"]}
        cell = {
            "student": name_of(line["student"], STUDENTS),
            "teacher": name_of(line["teacher"], TEACHERS),
            "seed": line["seed"],
            "measures": {name: figures[name] for name in MEASURES + BASELINES},
        }
        for key, source in (("before", before), ("teacher_errors", teacher), ("after", line)):
            cell[key] = {stem: rate(source, stem) for stem in TEST_SETS}
        cells.append(cell)
    # A student counts once it has met every teacher.
    met = collections.Counter(cell["student"] for cell in cells if cell["seed"] == 0)
    cells = [cell for cell in cells if met[cell["student"]] == len(TEACHERS)]
    if len({cell["student"] for cell in cells}) < 3:
        return None
    return validate.table_of({"primary": "vuss", "cells": cells})


def name_of(model, models):
    """The short name of a model folder."""
    return next(name for name, folder in models.items() if folder == model)


def pairs(lines):
    """Students × teachers: mean error of the five sets after 100 steps, each seed, with the models' own."""
    after = collections.defaultdict(list)
    for line in lines:
        if line["question"] == "table-3" and "arm" in line:
            pair = name_of(line["student"], STUDENTS), name_of(line["teacher"], TEACHERS)
            after[pair].append(line)
    rows = [["its own error", ""]]
    for model in TEACHERS.values():
        rows[0].append(f"{mean_rate(evaluation_of(lines, 'table-3', model)):.1f}")
    for student, model in STUDENTS.items():
        row = [student, f"{mean_rate(evaluation_of(lines, 'table-3', model)):.1f}"]
        row += [each_rate(after[student, teacher]) or "–" for teacher in TEACHERS]
        rows.append(row)
    return markdown(["mean error, %: student", "before", *(f"teacher {name}" for name in TEACHERS)], rows)


TOO_FEW = "Fewer than three students have met every teacher yet."


def prediction(lines):
    """Each measure: does it predict the error after, beyond the models' own errors?"""
    table = overlap_table(lines)
    if table is None:
        return TOO_FEW
    result = validate.analyse(table)
    header, rows = validate.association_rows(result)
    for row in rows:
        if row[0] == result["primary"]:
            row[0] = f"**{row[0]}** (primary)"
    return markdown(header, rows) + "\n\n" + validate.conclusion(result)


def odd_teachers(lines):
    """r of some measures without the teachers that were made to be odd. Not declared beforehand."""
    table = overlap_table(lines)
    if table is None:
        return TOO_FEW
    names = ["vuss", "vuss_4", "top1", "kl_full", "token_agreement"]
    rows = []
    for left_out in ([], ["style"], ["clone"], ["style", "clone"]):
        kept = [j for j, teacher in enumerate(table["teachers"]) if teacher not in left_out]
        y = validate.double_centre(table["y"][:, kept])
        row = ["without " + " and ".join(left_out) if left_out else "all teachers"]
        for name in names:
            m = validate.double_centre(table["measures"][name][:, kept])
            r = np.corrcoef(m.flatten(), y.flatten())[0, 1]
            row.append(f"{r:+.2f}".replace("-", "−"))
        rows.append(row)
    return markdown(["r", *names], rows)


def draw_prediction(lines):
    """VUSS against ln(error after), as they are and double-centred; a colour a teacher."""
    table = overlap_table(lines)
    if table is None:
        return
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    vuss = table["measures"]["vuss"]
    for axis, m, y in (
        (axes[0], vuss, table["y"]),
        (axes[1], validate.double_centre(vuss), validate.double_centre(table["y"])),
    ):
        for j, teacher in enumerate(table["teachers"]):
            axis.plot(m[:, j], y[:, j], "o", label=teacher)
    axes[0].set_xlabel("VUSS at k = 32 before")
    axes[0].set_ylabel("mean ln(error after, %)")
    axes[0].legend(fontsize="small")
    axes[1].set_xlabel("VUSS, without what belongs to one model alone")
    axes[1].set_ylabel("ln(error after), likewise")
    save_picture(figure, HERE / "table-3.png")


def support_runs(lines):
    """{support: its runs}. Those of the union are the opd runs of Table 1 with the same seeds."""
    runs = by_arm(line for line in lines if line["question"] == "support")
    table_1, _, _ = arm_runs(lines)
    union, _ = paired(table_1["opd"], runs["intersection"])
    return {"union (k = 32)": union, "intersection": runs["intersection"], "student's 52": runs["student"]}


def supports(lines):
    """KL on the union, the intersection, and the student's own 52 ids."""
    base = evaluation_of(lines, "table-1", "example/base")
    runs = support_runs(lines)
    rows = []
    for name, own in runs.items():
        rows.append([*rates_row(name, own), change_cell(own, base)])
    union, *others = runs
    contrasts = []
    for name in others:
        contrasts.append(contrast_row(f"{name} against union", runs[union], runs[name]))
    rates = markdown(["%", *RATES_HEADER, "macro change"], rows)
    return rates + "\n\n" + markdown(CONTRAST_HEADER, contrasts)


def draw_supports(lines):
    base = evaluation_of(lines, "table-1", "example/base")
    draw_changes(HERE / "support.png", support_runs(lines), base)


# ---- question 4 --------------------------------------------------------------------------------------------


def digit_runs(lines):
    """→ {arm: its runs}, {(base or teacher, set): its line}, and the sets, one a held-out speaker."""
    runs = runs_of(lines, "digits")
    models = {}
    stems = []
    for line in lines:
        if line["question"] == "digits" and "model" in line:
            stem = next(iter(line["errors"]))
            models[line["role"], stem] = line
            stems.append(stem)
    return runs, models, list(dict.fromkeys(stems))


def digits(lines):
    """Human digit strings: error on the held-out speaker."""
    runs, models, stems = digit_runs(lines)
    rows = []
    for name in ("base", *runs, "teacher"):
        row = [name]
        for stem in stems:
            if name in runs:
                rates = [rate(line, stem) for line in runs[name] if stem in line["errors"]]
            else:
                rates = [rate(models[name, stem], stem)]
            row.append(" ".join(f"{value:.1f}" for value in rates))
        rows.append(row)
    contrasts = []
    same_lr = "offline-kl with opd's lr"
    comparisons = [("opd", "offline-kl"), ("opd", same_lr), (same_lr, "offline-kl")]
    comparisons += [("opd", "ce-reference"), ("offline-kl", "ce-reference")]
    for arm, other in comparisons:
        counts, n_seeds = digit_counts(runs[other], runs[arm], stems)
        figures = seeds.change_over_seeds(counts, n_seeds, is_paired=True)
        # The speakers are few, so the exact p over them is shown too, from the means over seeds.
        changes = seeds.contrast(counts[:, 0, :-1], n_seeds)  # (speakers,), of errors
        exact_p = seeds.exact_sign_flip(changes)
        exact = f"{eval.p_text(exact_p)} ({eval.p_text(2 / 2 ** len(stems))})"
        contrasts.append([*figures_row(f"{arm} against {other}", figures), exact])
    header = [stem.removeprefix("digits-") for stem in stems]
    rates = markdown(["WER, %, held-out speaker", *header], rows)
    header = ["change, %", *CONTRAST_HEADER[1:], "exact p over speakers (its floor)"]
    return rates + "\n\n" + markdown(header, contrasts)


def draw_digits(lines):
    runs, models, _ = digit_runs(lines)
    groups = {}
    for arm, own in runs.items():
        changes = []
        for line in own:
            stem = next(iter(line["errors"]))
            changes.append(100 * (rate(line, stem) / rate(models["base", stem], stem) - 1))
        groups[arm] = changes
    dots(HERE / "digits.png", groups, "change against the base, %, a point a run")


def digit_counts(runs_a, runs_b, stems):
    """The table (speakers, 1, runs + 1) of both recipes, and the number of runs of A."""
    shared = sorted({line["seed"] for line in runs_a} & {line["seed"] for line in runs_b})
    counts = np.zeros((len(stems), 1, 2 * len(shared) + 1))
    for runs, first in ((runs_a, 0), (runs_b, len(shared))):
        for line in runs:
            if line["seed"] in shared:
                stem = next(iter(line["errors"]))
                counts[stems.index(stem), 0, first + shared.index(line["seed"])] = sum(line["errors"][stem])
    for g, stem in enumerate(stems):
        counts[g, 0, -1] = sum(units_of(stem).values())
    return counts, len(shared)


# ---- questions 5 to 7 --------------------------------------------------------------------------------------


CONDITIONS = {
    "strength": [f"base after {n_steps} steps" for n_steps in (600, 1200, 1600, 2500)],
    "amount": ["a quarter of the audio", "a half of the audio", "all of the audio"],
}
AS_IN_TABLE_1 = ("base after 1600 steps", "all of the audio")  # the example's base, and all of its audio


def condition_runs(lines, question):
    """{condition: {opd, offline-kl: its runs}} of a part of question 5; both arms have the rate of opd."""
    table_1, _, _ = arm_runs(lines)
    same_rate = table_1["opd"] + same_rate_runs(lines)
    runs = {}
    for name in CONDITIONS[question]:
        if name in AS_IN_TABLE_1:
            own = [line for line in same_rate if line["seed"] in (0, 1)]
        else:
            own = [line for line in lines if line.get("condition") == name]
        runs[name] = by_arm(own)
    return runs


def conditions(lines, question):
    """opd against offline-kl by the student's strength, or by the amount of audio."""
    base = evaluation_of(lines, "table-1", "example/base")
    rows = []
    for name, runs in condition_runs(lines, question).items():
        student = runs["opd"][0]["student"]
        before = evaluation_of(lines, "strength", student) or base
        row = [name, f"{mean_rate(before):.1f}"]
        for arm in ("opd", "offline-kl"):
            row.append(each_rate(runs[arm]))
        rows.append(row + contrast_row("", runs["offline-kl"], runs["opd"])[1:])
    header = ["", "before, mean %", "opd, each seed", "offline-kl, each seed"]
    header += ["opd against offline-kl, macro %", *CONTRAST_HEADER[2:]]
    return markdown(header, rows)


def draw_conditions(lines, question):
    draw_opd_against_offline(HERE / f"{question}.png", condition_runs(lines, question))


def robustness(lines):
    """Transcripts of silence and noise, and of long clips."""
    rows = []
    for line in lines:
        if line["question"] != "robustness":
            continue
        row = [line["name"].removeprefix("robustness-")]
        for stem in ("silence", "noise"):
            n_clips, empty, looping, capped = line["health"][stem]
            words = sum(line["errors"][stem]) / n_clips
            row += [f"{n_clips - empty} of {n_clips}", f"{words:.1f}", f"{looping} / {capped}"]
        n_clips, empty, looping, capped = line["health"]["long"]
        row += [f"{rate(line, 'long'):.1f}", f"{empty} / {looping} / {capped}"]
        rows.append(row)
    header = [""]
    for kind in ("silence", "noise"):
        header += [f"{kind}: with text", "units a clip", "looping / capped"]
    header += ["long clips: error, %", "empty / looping / capped of 80"]
    return markdown(header, rows)


def draw_robustness(lines):
    """Units that each model writes for a clip without speech."""
    own = [line for line in lines if line["question"] == "robustness"]
    names = [line["name"].removeprefix("robustness-") for line in own]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axis, stem in zip(figure.subplots(1, 2, sharey=True), ("silence", "noise")):
        axis.bar(names, [sum(line["errors"][stem]) / line["health"][stem][0] for line in own])
        axis.tick_params(axis="x", rotation=60)
        axis.set_title(stem)
    figure.axes[0].set_ylabel("words or characters a clip")
    save_picture(figure, HERE / "robustness.png")


def ablation_runs(lines):
    """{flag: its runs} of question 7, in the order of the list."""
    runs = runs_of(lines, "ablation")
    return {arm: runs[arm] for arm in ABLATIONS}


def ablations(lines):
    """One flag at a time."""
    base = evaluation_of(lines, "table-1", "example/base")
    runs = ablation_runs(lines)
    rows = []
    for arm, own in runs.items():
        _, mean, each_seed, _, _, interval, _ = contrast_row("", runs["default"], own)
        comparison = ["", "", ""] if arm == "default" else [mean, each_seed, interval]
        rows.append([arm, *rates_row(arm, own)[-2:], change_cell(own, base), *comparison])
    header = ["%", *RATES_HEADER[-2:], "macro change", "against default, macro %", "each seed"]
    return markdown([*header, CONTRAST_HEADER[-2]], rows)


def draw_ablations(lines):
    base = evaluation_of(lines, "table-1", "example/base")
    draw_changes(HERE / "ablations.png", ablation_runs(lines), base)


# ---- question 8 --------------------------------------------------------------------------------------------


def ready_runs(lines, questions=("ready", "ready-kl")):
    """{(teacher, steps of TD, arm): its lines, by seed} of the runs that begin there."""
    runs = collections.defaultdict(list)
    names = {model: name for name, (model, _) in READY_TEACHERS.items()}
    for line in lines:
        if line["question"] in questions and "td_steps" in line and "errors" in line:
            runs[names[line["teacher"]], line["td_steps"], line["arm"]].append(line)
    return {key: sorted(own, key=lambda line: line["seed"]) for key, own in runs.items()}


def errors_before(lines):
    """The lines of OPD with the errors that they had before it."""
    return [{**line, "errors": line["errors_before"]} for line in lines]


def ready(lines):
    """The error before, and after 100 steps of each arm, by the steps of TD."""
    runs = ready_runs(lines)
    rows = []
    for teacher in READY_TEACHERS:
        for td_steps in READY_STARTS:
            before = errors_before(runs[teacher, td_steps, "opd"])
            if td_steps == 0:
                before = before[:1]  # the base is the same for all seeds
            row = [teacher, str(td_steps), each_rate(before)]
            for arm in READY_ARMS:
                row.append(each_rate(runs[teacher, td_steps, arm]))
            rows.append(row)
    header = ["mean error, %, each seed: teacher", "steps of TD", "before"]
    return markdown([*header, *READY_ARMS.values()], rows)


def ready_contrasts(lines, pairs=(("opd", "td"),)):
    """Arms against each other at each start; the primary comparison is OPD against more TD."""
    runs = ready_runs(lines)
    rows = []
    for arm, other in pairs:
        for teacher in READY_TEACHERS:
            for td_steps in READY_STARTS:
                own = runs[teacher, td_steps, arm]
                name = f"{READY_ARMS[arm]} against {READY_ARMS[other]}, {teacher}, {td_steps} steps"
                if (arm, other, teacher) == ("opd", "td", "style") and td_steps != 200:
                    name = f"**{name}** (primary)"
                rows.append(contrast_row(name, runs[teacher, td_steps, other], own))
    return markdown(CONTRAST_HEADER, rows)


def teacher_kl_contrasts(lines):
    return ready_contrasts(lines, [("teacher-kl", "td"), ("opd", "teacher-kl")])


def ready_cases(lines):
    """Every start of every seed as a dict: is OPD or more TD the better next step?

    → teacher, seed, td_steps; gain: ln of the errors after OPD over those after more TD, as a mean over the
    sets, below 0 where OPD is better; measures: {name: its value before}.
    """
    runs = ready_runs(lines)
    measures = {}
    for line in lines:
        if line["question"] == "ready" and "measures" in line:
            key = (line["teacher"], line["seed"], line["td_steps"])
            measures[key] = {**line["measures"], **line["baselines"]}
    cases = []
    for teacher, (model, _) in READY_TEACHERS.items():
        for td_steps in READY_STARTS:
            for td, opd in zip(*paired(runs[teacher, td_steps, "td"], runs[teacher, td_steps, "opd"])):
                seed = opd["seed"]
                case = {"teacher": teacher, "seed": seed, "td_steps": td_steps}
                case["gain"] = np.log1p(macro_change([opd], td) / 100)
                case["measures"] = measures[model, seed if td_steps else 0, td_steps]
                cases.append(case)
    return cases


def mean_regret(is_opd, gains):
    """What a choice of OPD (N,) or else more TD costs: mean ln of the errors over those of the better one."""
    return float(np.where(is_opd, gains, -gains).clip(min=0).mean())


def best_threshold(values, gains):
    """The threshold with the least regret, where OPD is chosen at or below it: −∞ is never, ∞ is always."""
    levels = np.unique(values)
    thresholds = [-np.inf, *((levels[1:] + levels[:-1]) / 2), np.inf]
    regrets = [mean_regret(values <= threshold, gains) for threshold in thresholds]
    return thresholds[int(np.argmin(regrets))]


def left_out_choices(values, gains, groups):
    """Whether OPD is chosen in each case by the threshold of all cases of other groups: (N,)."""
    is_opd = np.zeros(len(values), dtype=bool)
    for group in np.unique(groups):
        is_left_out = groups == group
        threshold = best_threshold(values[~is_left_out], gains[~is_left_out])
        is_opd[is_left_out] = values[is_left_out] <= threshold
    return is_opd


def ready_thresholds(lines):
    """How well one threshold on a measure before tells OPD from more TD as the better next step."""
    cases = ready_cases(lines)
    gains = np.array([case["gain"] for case in cases])
    case_seeds = np.array([case["seed"] for case in cases])
    teachers = np.array([case["teacher"] for case in cases])

    def cells(is_opd, counted):
        """How often the choice is right in the counted cases, and its regret in %."""
        n_right = np.sum((is_opd == (gains < 0))[counted])
        regret = eval.percent(mean_regret(is_opd[counted], gains[counted]))
        return [f"{n_right} of {counted.sum()}", f"{regret:.1f}"]

    every = np.full(len(cases), True)
    rows = []
    for name, choice in (("always OPD", True), ("always TD", False)):
        is_opd = np.full(len(cases), choice)
        row = [name, "", *cells(is_opd, every)]
        for teacher in READY_TEACHERS:
            row += cells(is_opd, teachers == teacher)
        rows.append(row)
    for name in READY_MEASURES:
        sign = validate.EXPECTED_SIGN.get(name, 1)  # close models, of which a low value × sign is the mark
        values = np.array([sign * case["measures"][name] for case in cases])
        threshold = f"{sign * best_threshold(values, gains):.4g}".replace("-", "−")
        row = [name, f"≤ {threshold}" if sign > 0 else f"≥ {threshold}"]
        row += cells(left_out_choices(values, gains, case_seeds), every)
        other_teacher = left_out_choices(values, gains, teachers)
        for teacher in READY_TEACHERS:
            row += cells(other_teacher, teachers == teacher)
        rows.append(row)
    header = ["OPD where", "threshold of all", "right, seeds left out", "regret, %"]
    for teacher in READY_TEACHERS:
        header += [f"right, {teacher} left out", "regret, %"]
    return markdown(header, rows)


def ready_measures(lines):
    """The measures before OPD, means over seeds, and KL at the first step of OPD."""
    runs = ready_runs(lines)
    cases = ready_cases(lines)
    rows = []
    for teacher in READY_TEACHERS:
        for td_steps in READY_STARTS:
            own = [case for case in cases if (case["teacher"], case["td_steps"]) == (teacher, td_steps)]
            row = [teacher, str(td_steps)]
            for name in READY_MEASURES:
                mean = np.mean([case["measures"][name] for case in own])
                row.append(f"{mean:.3g}".replace("-", "−"))
            first_kl = [line["first_step"]["kl"] for line in runs[teacher, td_steps, "opd"]]
            rows.append([*row, " ".join(f"{value:.2f}" for value in first_kl)])
    return markdown(["teacher", "steps of TD", *READY_MEASURES, "KL at the first step, each seed"], rows)


def ratios(changes, key):
    """1 + a figure of several `seeds.change_over_seeds`, which are in %."""
    return np.array([1 + figures[key] / 100 for figures in changes])


def draw_ready(lines):
    """Errors against the base's by the steps of TD, with intervals for other seeds and speakers."""
    runs = ready_runs(lines)
    base = errors_before(runs["shipped", 0, "opd"])[0]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axis, teacher in zip(figure.subplots(1, 2, sharey=True), READY_TEACHERS):
        for arm, name in READY_ARMS.items():
            changes = []
            for td_steps in READY_STARTS:
                own = runs[teacher, td_steps, arm]
                counts = joint_counts([base] * len(own) + own)
                changes.append(seeds.change_over_seeds(counts, len(own), is_paired=True))
            value = ratios(changes, "value")
            ends = [value - ratios(changes, "low"), ratios(changes, "high") - value]
            axis.errorbar(READY_STARTS, value, ends, fmt="o-", capsize=3, label=name)
        axis.axhline(1, color="black", linewidth=0.5)
        axis.set_yscale("log")
        axis.set_yticks([0.5, 1, 2, 5], ["0.5", "1", "2", "5"])
        axis.minorticks_off()
        axis.set_title(f"teacher {teacher}")
        axis.set_xlabel("steps of TD before")
    figure.axes[0].set_ylabel("errors after 100 more steps, base = 1")
    figure.axes[0].legend()
    save_picture(figure, HERE / "ready.png")


def rescue(lines):
    """OPD with one flag, from a student without TD and one with a little: seeds 0 and 1."""
    runs = {key: own[:2] for key, own in ready_runs(lines).items()}
    runs.update(ready_runs(lines, ["ready-rescue"]))
    rows = []
    for arm in ("before", *READY_ARMS, *RESCUES):
        row = [READY_ARMS.get(arm, arm)]
        for td_steps in RESCUE_STARTS:
            if arm == "before":
                own = errors_before(runs["style", td_steps, "opd"])
            else:
                own = runs["style", td_steps, arm]
            row.append(each_rate(own))
        rows.append(row)
    header = ["mean error, %, each seed"] + [f"after {td_steps} steps of TD" for td_steps in RESCUE_STARTS]
    return markdown(header, rows)


# ---- question 9 --------------------------------------------------------------------------------------------


def label_teacher(line):
    """The name of a line's teacher."""
    return next(name for name, model in LABEL_TEACHERS.items() if model == line["teacher"])


def label_runs(lines, question="labels"):
    """{(teacher, arm): its lines, by seed}; ce-reference reads no teacher, and belongs to both."""
    runs = collections.defaultdict(list)
    for line in lines:
        if line["question"] == question and "arm" in line:
            names = LABEL_TEACHERS if line["arm"] == "ce-reference" else [label_teacher(line)]
            for name in names:
                runs[name, line["arm"]].append(line)
    return {key: sorted(own, key=lambda line: line["seed"]) for key, own in runs.items()}


def shared_cell(shares):
    """Errors on the fresh audio that both models make, in % of the teacher's and of the student's."""
    totals = {}
    for whose in ("teacher", "student", "shared"):
        totals[whose] = sum(share[whose] for share in shares)
    of_teacher = 100 * totals["shared"] / totals["teacher"]
    return f"{of_teacher:.1f}, {100 * totals['shared'] / totals['student']:.1f}"


def label_arms(lines):
    """Both teachers with their students: the test sets, the fresh audio, and the errors that they share."""
    runs = label_runs(lines)
    base = evaluation_of(lines, "labels", BASE)
    rows = [["base", *rates_row("", [base])[1:], f"{rate(base, 'fresh'):.1f}", "", "", ""]]
    for teacher, model in LABEL_TEACHERS.items():
        line = evaluation_of(lines, "labels", model)
        before = shared_cell([line["shared_before"] for line in runs[teacher, "opd"][:1]])
        row = [f"{teacher} teacher (shared: with the base)", *rates_row("", [line])[1:]]
        rows.append([*row, f"{rate(line, 'fresh'):.1f}", "", before, ""])
        for arm in LABEL_ARMS:
            own = runs[teacher, arm]
            if (teacher, arm) == ("weak", "ce-reference"):  # it reads no teacher: one row
                continue
            fresh = np.mean([rate(line, "fresh") for line in own])
            name = f"{arm} (shared: good)" if arm == "ce-reference" else f"{arm}, {teacher}"
            row = rates_row(name, own) + [f"{fresh:.1f}", change_cell(own, base)]
            rows.append([*row, shared_cell([line["shared"] for line in own]), f"{own[0]['lr']:g}"])
    shared = "shared errors, % of the teacher's, of the student's"
    return markdown(["%", *RATES_HEADER, "fresh audio", "macro change", shared, "lr"], rows)


def label_contrasts(lines):
    """What one has without transcripts, against each other and against what transcripts would bring."""
    runs = label_runs(lines)
    rows = []
    for arm, other in (
        ("opd", "ce-teacher"),
        ("opd", "teacher-kl"),
        ("teacher-kl", "ce-teacher"),
        ("opd", "offline-kl"),
        ("opd", "ce-reference"),
        ("ce-teacher", "ce-reference"),
    ):
        for teacher in ("weak", "good"):
            name = f"{arm} against {other}, {teacher} teacher"
            if (arm, other, teacher) == ("opd", "ce-teacher", "weak"):
                name = f"**{name}** (primary)"
            rows.append(contrast_row(name, runs[teacher, other], runs[teacher, arm]))
    return markdown(CONTRAST_HEADER, rows)


def label_halves(lines):
    """{which half: its lines}: the clips of whose transcripts the weak teacher is surest, or random ones."""
    halves = collections.defaultdict(list)
    for line in lines:
        if line["question"] == "labels-filter":
            halves[line["condition"]].append(line)
    return halves


def label_filter(lines):
    """SFT on one half of the clips, on the other, and on all."""
    halves = label_halves(lines)
    runs = label_runs(lines)
    everything = runs["weak", "ce-teacher"]
    rows = [
        contrast_row("ce-teacher: the surest half against all clips", everything, halves["surest"]),
        contrast_row("ce-teacher: the surest half against a random one", halves["random"], halves["surest"]),
        contrast_row(
            "opd on all clips against ce-teacher on the surest half", halves["surest"], runs["weak", "opd"]
        ),
    ]
    return markdown(CONTRAST_HEADER, rows)


def same_rate_label_runs(lines):
    """{(teacher, arm): its lines} at one learning rate: runs of their own, unless it is the tuned one."""
    tuned = label_runs(lines)
    common = label_runs(lines, "labels-rate")
    runs = {}
    for key, own in tuned.items():
        runs[key] = own if own[0]["lr"] == LABEL_RATE else common.get(key, [])
    return runs


def label_rates(lines):
    """The arms at one learning rate, where some have another of their own."""
    runs = same_rate_label_runs(lines)
    rows = []
    pairs = [("opd", other) for other in LABEL_ARMS[1:]]
    pairs += [("teacher-kl", "ce-teacher"), ("ce-teacher", "ce-reference")]
    for arm, other in pairs:
        for teacher in ("weak", "good"):
            name = f"{arm} against {other}, {teacher} teacher, both with lr {LABEL_RATE:g}"
            rows.append(contrast_row(name, runs[teacher, other], runs[teacher, arm]))
    return markdown(CONTRAST_HEADER, rows)


def draw_labels(lines):
    runs = {f"{arm}, {teacher}": own for (teacher, arm), own in label_runs(lines).items()}
    runs["ce-reference"] = runs.pop("ce-reference, good")  # it reads no teacher
    del runs["ce-reference, weak"]
    draw_changes(HERE / "labels.png", runs, evaluation_of(lines, "labels", BASE))


# ---- another base, and a larger instance -------------------------------------------------------------------


def arms_of(lines, question, base, teacher, contrasts):
    """Base, arms and teacher of a question, and some arms against others."""
    runs = runs_of(lines, question)
    before = evaluation_of(lines, question, base)
    rows = [[*rates_row("base", [before]), ""]]
    for arm in ARMS:
        if arm in runs:
            rows.append([*rates_row(arm, runs[arm]), change_cell(runs[arm], before)])
    rows.append([*rates_row("teacher", [teacher]), ""])
    rates = markdown(["%", *RATES_HEADER, "macro change"], rows)
    rows = [contrast_row(f"{arm} against {other}", runs[other], runs[arm]) for arm, other in contrasts]
    return rates + "\n\n" + markdown(CONTRAST_HEADER, rows)


def other_base(lines):
    """The two arms of the primary comparison from the base of another seed."""
    _, _, teacher = arm_runs(lines)
    return arms_of(lines, "base-2", BASE_2, teacher, [("opd", "offline-kl")])


def scale(lines):
    """Three arms of the larger instance."""
    teacher = evaluation_of(lines, "scale", SCALE_TEACHER)
    contrasts = [("opd", "offline-kl"), ("opd", "ce-reference"), ("offline-kl", "ce-reference")]
    return arms_of(lines, "scale", SCALE_BASE, teacher, contrasts)


def draw_scale(lines):
    runs = runs_of(lines, "scale")
    draw_changes(HERE / "scale.png", runs, evaluation_of(lines, "scale", SCALE_BASE))


def draw_other_base(lines):
    """opd against offline-kl, seed by seed, from both bases."""
    runs = {
        "the base of Table 1": runs_of(lines, "table-1"),
        "the base of another seed": runs_of(lines, "base-2"),
    }
    draw_opd_against_offline(HERE / "base-2.png", runs)


# ---- the answers -------------------------------------------------------------------------------------------


def answer_row(asked, figures, section):
    """A question "Fewer errors by B than by A?" with the change: yes, no, or open where 0 is inside."""
    answer = "yes" if figures["value"] < 0 else "no"
    if figures["low"] <= 0 <= figures["high"]:
        answer = "open"
    figure = f"{signed(figures['value'])} % ({spread(figures['low'], figures['high'])})"
    return [asked, figure, answer, section]


def answers(lines):
    """What was asked, the figure, the answer, the section. A question with unfinished runs is left out."""
    shown = shown_questions(lines)
    rows = []

    def ask(question, asked, runs, a, b, section):
        """Adds the question whether runs[b] have fewer errors than runs[a]."""
        if question in shown:
            rows.append(answer_row(asked, change_between(runs[a], runs[b]), section))

    table_1 = runs_of(lines, "table-1")
    one_rate = {**table_1, "offline-kl": same_rate_runs(lines)}
    pair = ("offline-kl", "opd")
    asked = "KL along the student's own transcripts, not along references: `opd` against `offline-kl`"
    ask("table-1", f"{asked} (primary)", table_1, *pair, "Table 1")
    ask("rate", "… at one learning rate", one_rate, *pair, "Table 1")
    ask("base-2", "… from another base", runs_of(lines, "base-2"), *pair, "Table 1")
    ask("scale", "… in a larger instance", runs_of(lines, "scale"), *pair, "A larger instance")
    if "digits" in shown:
        runs, _, stems = digit_runs(lines)
        counts, n_seeds = digit_counts(runs["offline-kl with opd's lr"], runs["opd"], stems)
        figures = seeds.change_over_seeds(counts, n_seeds, is_paired=True)
        rows.append(answer_row("… on human speech, at one learning rate", figures, "Human speech"))
    asked = "KL, not cross-entropy, along references: `offline-kl` against `ce-reference`"
    ask("table-1", asked, table_1, "ce-reference", "offline-kl", "Table 1")
    asked = "OPD, not more SFT on references: `opd` against `ce-reference` (not declared, unequal rates)"
    ask("table-1", asked, table_1, "ce-reference", "opd", "Table 1")

    own = label_runs(lines)
    asked = "Audio without transcripts, a weak teacher: `opd` against `ce-teacher`"
    section = "Audio without transcripts"
    ask("labels", f"{asked} (primary)", own, ("weak", "ce-teacher"), ("weak", "opd"), section)
    one_rate = same_rate_label_runs(lines)
    ask("labels", "… a good teacher", own, ("good", "ce-teacher"), ("good", "opd"), section)
    asked = "… a good teacher, with twice the rate (three seeds)"
    ask("labels-rate", asked, one_rate, ("good", "ce-teacher"), ("good", "opd"), section)
    asked = "A weak teacher: `ce-teacher` on the half of whose transcripts it is surest, not on a random half"
    ask("labels-filter", asked, label_halves(lines), "random", "surest", section)

    own = recipe_runs(lines)
    asked = "OPD, not more SFT, after TD (one of four, not corrected)"
    ask("table-2", asked, own, "td+sft", "td+opd", "Table 2")
    one_rate = {**own, **runs_of(lines, "td-rate")}
    ask("td-rate", "… at one learning rate", one_rate, "td+sft", "td+opd", "Table 2")
    ask("table-2", "OPD after TD, not OPD alone (which has 100 steps less)", own, "opd", "td+opd", "Table 2")

    own = ready_runs(lines)
    for td_steps in READY_STARTS:
        asked = f"… after {td_steps} steps of TD"
        if td_steps == 0:
            asked = "A teacher of another style: OPD, not more TD"
        asked = "The same after 200 steps of TD (not primary)" if td_steps == 200 else f"{asked} (primary)"
        ask("ready", asked, own, ("style", td_steps, "td"), ("style", td_steps, "opd"), "Readiness")
    asked = "Its KL along its own transcripts, not TD, after 50 steps of TD (the largest of ten)"
    ask("ready-kl", asked, own, ("style", 50, "td"), ("style", 50, "teacher-kl"), "Readiness")

    if "support" in shown:
        asked = "KL on S ∩ T, not on S ∪ T"
        ask("support", asked, support_runs(lines), "union (k = 32)", "intersection", "Table 3")
    asked = "Training the adapter alone (the largest of 18 flags, not corrected)"
    ask("ablation", asked, runs_of(lines, "ablation"), "default", "parts-adapter", "Ablations")

    table = overlap_table(lines)
    if table is None:
        return rows
    measures = validate.analyse(table)["measures"]
    for name, key, asked in (
        ("vuss", "r_p", "Does VUSS at k = 32 before OPD predict the error after it? (primary)"),
        ("top1", "r_p_holm", "… top-1 agreement (one of ten more, Holm)"),
    ):
        figures = measures[name]
        has_expected_sign = figures["r"] * figures["expected_sign"] > 0
        answer = "yes" if figures[key] < 0.05 and has_expected_sign else "open"
        figure = f"r {figures['r']:+.2f}, p {eval.p_text(figures[key])}".replace("-", "−")
        rows.append([asked, figure, answer, "Table 3"])
    return rows


ANSWERS_HEADER = ["fewer errors by …?", "change (95 %: other seeds and speakers)", "answer", "section"]


def all_answers(lines):
    return markdown(ANSWERS_HEADER, answers(lines))


def primary_answers(lines):
    """For the README: what was declared as primary, and its variations."""
    rows = []
    is_primary = False
    for asked, figure, answer, _ in answers(lines):
        is_primary = "(primary)" in asked or asked.startswith("…") and is_primary
        if is_primary:
            rows.append([asked.replace(" (primary)", ""), figure, answer])
    return markdown(ANSWERS_HEADER[:-1], rows)


# ---- all tables --------------------------------------------------------------------------------------------

# Name → the table, and the question whose runs it needs.
TABLES = {
    "answers": (all_answers, "table-1"),
    "primary-answers": (primary_answers, "table-1"),
    "tune": (tuning, "tune"),
    "arms": (arms, "table-1"),
    "arms-contrasts": (arms_contrasts, "table-1"),
    "rate-contrasts": (rate_contrasts, "rate"),
    "recipe": (recipe, "table-2"),
    "recipe-contrasts": (recipe_contrasts, "table-2"),
    "recipe-rates": (recipe_rates, "td-rate"),
    "recipe-vuss": (recipe_vuss, "table-2"),
    "pairs": (pairs, "table-3"),
    "prediction": (prediction, "table-3"),
    "odd-teachers": (odd_teachers, "table-3"),
    "supports": (supports, "support"),
    "digits": (digits, "digits"),
    "strength": (functools.partial(conditions, question="strength"), "strength"),
    "amount": (functools.partial(conditions, question="amount"), "amount"),
    "robustness": (robustness, "robustness"),
    "ablations": (ablations, "ablation"),
    "ready": (ready, "ready-kl"),
    "ready-contrasts": (ready_contrasts, "ready"),
    "ready-kl-contrasts": (teacher_kl_contrasts, "ready-kl"),
    "ready-measures": (ready_measures, "ready"),
    "ready-thresholds": (ready_thresholds, "ready"),
    "ready-rescue": (rescue, "ready-rescue"),
    "labels-tune": (functools.partial(tuning, question="labels-tune"), "labels-tune"),
    "labels": (label_arms, "labels"),
    "labels-contrasts": (label_contrasts, "labels"),
    "labels-filter": (label_filter, "labels-filter"),
    "labels-rate": (label_rates, "labels-rate"),
    "base-2": (other_base, "base-2"),
    "scale": (scale, "scale"),
}

PICTURES = {
    "table-1": draw_arms,
    "table-2": draw_recipe,
    "table-3": draw_prediction,
    "support": draw_supports,
    "digits": draw_digits,
    "strength": functools.partial(draw_conditions, question="strength"),
    "amount": functools.partial(draw_conditions, question="amount"),
    "robustness": draw_robustness,
    "ablation": draw_ablations,
    "ready-kl": draw_ready,
    "labels": draw_labels,
    "base-2": draw_other_base,
    "scale": draw_scale,
}

# Questions whose tables show runs of other questions too.
BESIDE = {
    "rate": {"table-1"},
    "table-2": {"table-1"},
    "td-rate": {"table-2"},
    "support": {"table-1"},
    "strength": {"table-1", "rate"},
    "amount": {"table-1", "rate"},
    "ablation": {"table-1"},
    "ready-kl": {"ready"},
    "ready-rescue": {"ready", "ready-kl"},
    "labels": {"labels-tune"},
    "labels-filter": {"labels"},
    "labels-rate": {"labels"},
    "base-2": {"table-1"},
}


def shown_questions(lines):
    """The questions whose runs, and those beside them, are all finished; question 3 once it has a run."""
    names = {line["name"] for line in lines}
    unfinished = {run["question"] for run in experiments(lines) if run["name"] not in names}
    finished = {line["question"] for line in lines} - unfinished
    shown = {question for question in finished if BESIDE.get(question, set()) <= finished}
    if any(line["question"] == "table-3" and "arm" in line for line in lines):
        shown.add("table-3")
    return shown


def all_tables(lines):
    """{name: Markdown} of the questions that are shown."""
    shown = shown_questions(lines)
    return {name: make(lines) for name, (make, question) in TABLES.items() if question in shown}


def with_tables(text, tables):
    """A document with each table between its marks. A mark without a table stays as it is."""
    for name, table in tables.items():
        begin = f"<!-- table {name} -->\n"
        end = "<!-- end -->"
        if begin in text:
            head, rest = text.split(begin, 1)
            tail = rest.split(end, 1)[1]
            text = f"{head}{begin}\n{table}\n\n{end}{tail}"
    return text


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--write", action="store_true", help="put the tables into RESULTS.md and README.md")
    args = parser.parse_args()
    lines = finished_lines()
    tables = all_tables(lines)
    for name, table in tables.items():
        print(f"{name}\n\n{table}\n")
    for question in shown_questions(lines) & PICTURES.keys():
        PICTURES[question](lines)
    if args.write:
        for path in DOCUMENTS:
            path.write_text(with_tables(path.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        os._exit(0)
