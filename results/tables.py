"""Computes the tables of RESULTS.md from results/runs.jsonl, by the statistics of eval.py.

    python results/tables.py

It prints the tables and writes results/table-1.png.
"""

import os
import pathlib
import sys

import numpy as np
from matplotlib.figure import Figure

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from run import error_rate, finished_lines  # noqa: E402

from eval import CountedSet, joint_table, percent, relative_figures  # noqa: E402

TESTS = ["en-clean", "en-other", "zh-read", "zh-net", "zh-meeting"]
BASELINE = "offline-kl"


def mean_rate(run):
    return float(np.mean([error_rate(run["errors"][stem]) for stem in TESTS]))


def macro_change(run):
    """100 (e^M − 1) of one run against the base, M the mean over sets of ln(rate after / rate before)."""
    logs = [np.log(error_rate(run["errors"][stem]) / run["before"][stem]) for stem in TESTS]
    return percent(float(np.mean(logs)))


def table_of(runs):
    """The table (G, S, runs + 1) of eval.py: errors by speaker and set in each run, then units."""
    sets = []
    for stem in TESTS:
        speakers = sorted(runs[0]["errors"][stem])
        rows = []
        for speaker in speakers:
            errors = [run["errors"][stem][speaker][0] for run in runs]
            rows.append([*errors, runs[0]["errors"][stem][speaker][1]])
        clusters = [("speaker", speaker) for speaker in speakers]
        sets.append(CountedSet("", clusters, np.array(rows, dtype=float)))
    return joint_table(sets)


def markdown(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def tuning(runs):
    """The grid of learning rates: error on dev after 100 steps, a row an arm."""
    grid = {}  # arm → {learning rate: error}
    rates = set()
    for run in runs:
        if run["question"] == "tune":
            grid.setdefault(run["arm"], {})[run["lr"]] = error_rate(run["errors"]["dev"])
            rates.add(run["lr"])
    rates = sorted(rates)
    rows = []
    for arm, errors in grid.items():
        rows.append([arm, *(f"{errors[lr]:.2f}" if lr in errors else "–" for lr in rates)])
    return markdown(["error on dev, %", *(f"lr {lr:g}" for lr in rates)], rows)


def arms(runs):
    """Each arm with every seed: mean error of the five sets, and the macro change against the base."""
    rows = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        own = sorted((run for run in runs if run["arm"] == arm), key=lambda run: run["seed"])
        by_set = []
        for stem in TESTS:
            by_set.append(f"{np.mean([error_rate(run['errors'][stem]) for run in own]):.1f}")
        seeds = " ".join(f"{mean_rate(run):.1f}" for run in own)
        change = np.mean([macro_change(run) for run in own])
        first = np.mean([run["vuss_first"] for run in own])
        last = np.mean([run["vuss_last"] for run in own])
        mean = f"{np.mean([mean_rate(run) for run in own]):.1f}"
        rows.append(
            [arm, f"{own[0]['lr']:g}", *by_set, mean, seeds, f"{change:+.1f} %", f"{first:.2f} → {last:.2f}"]
        )
    header = ["arm", "lr", *TESTS, "mean", "mean of each seed", "macro change", "VUSS"]
    return markdown(header, rows)


def contrasts(runs):
    """Each arm against BASELINE, paired by seed: the macro change with three spreads."""
    by_arm = {}
    for run in runs:
        by_arm.setdefault(run["arm"], {})[run["seed"]] = run
    rows = []
    baseline = by_arm.pop(BASELINE, {})
    for arm, own in by_arm.items():
        seeds = sorted(own.keys() & baseline.keys())
        if not seeds:
            continue
        pairs = [baseline[seed] for seed in seeds] + [own[seed] for seed in seeds]
        figures = relative_figures(table_of(pairs), len(seeds), is_paired=True)
        per_seed = " ".join(f"{value:+.1f}" for value in figures["per_seed"])
        speakers = f"{figures['cluster_low']:+.1f} to {figures['cluster_high']:+.1f}"
        row = [f"{arm} against {BASELINE}", f"{figures['value']:+.1f}", per_seed]
        if figures["seed_sd"] is None:
            row += ["–", speakers, "–", "–"]
        else:
            total = f"{figures['low']:+.1f} to {figures['high']:+.1f}"
            row += [f"{figures['seed_sd']:.1f}", speakers, total, f"{figures['p']:.4f}"]
        rows.append(row)
    header = ["macro change, %", "mean", "each seed", "seed sd: a rerun on these sets?"]
    header += ["95 %: these models, other speakers?", "95 %: the recipe, other seeds and speakers?", "p"]
    return markdown(header, rows)


def draw(runs, path):
    """Every run as a point: its macro change against the base, by arm; a line is the mean over seeds."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    names = list(dict.fromkeys(run["arm"] for run in runs))
    for place, arm in enumerate(names):
        changes = [macro_change(run) for run in runs if run["arm"] == arm]
        axis.plot([place] * len(changes), changes, "o", alpha=0.6)
        axis.hlines(np.mean(changes), place - 0.25, place + 0.25, color="black", linewidth=1)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("macro change against the base, %")
    figure.savefig(path, dpi=100)


def main():
    runs = finished_lines()
    print(tuning(runs))
    table_1 = [run for run in runs if run["question"] == "table-1"]
    if table_1:
        print(arms(table_1))
        print(contrasts(table_1))
        draw(table_1, HERE / "table-1.png")


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        os._exit(0)
