"""The experiments: every command is one that opd.py takes, and the tables are computed from the lines."""

import sys

import numpy as np
import pytest
from conftest import ROOT

import eval as evaluation
import opd

sys.path.insert(0, str(ROOT / "results"))

import run as driver  # noqa: E402
import tables  # noqa: E402


def tuned_lines():
    """The grid of learning rates as if it were finished: the middle one is the best for all."""
    lines = []
    for run in driver.experiments([]):
        distance = abs(driver.LEARNING_RATES.index(run["lr"]) - 1)
        lines.append({**run, "errors": {"dev": {"anna": [10 + distance, 100]}}})
    return lines


def test_every_command_is_one_that_opd_takes(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert {run["question"] for run in driver.experiments([])} == {"tune"}  # the others need their rates
    runs = driver.experiments(tuned_lines())
    assert len({run["name"] for run in runs}) == len(runs) == 12 + sum(driver.SEEDS.values())
    seen = set()
    for run in runs:
        args = opd.parse_args(driver.command_of(run)[1:])
        assert (args.seed, args.steps, args.lr) == (run["seed"], run["steps"], run["lr"])
        assert args.eval == run["sets"] and ("dev" in args.eval[0]) == (run["question"] == "tune")
        if run["question"] == "table-1":
            assert args.lr == driver.LEARNING_RATES[1]
            seen.add((run["arm"], args.states, args.objective))
    assert seen == {
        ("opd", "student", "kl"),
        ("offline-kl", "reference", "kl"),
        ("teacher-kl", "teacher", "kl"),
        ("ce-reference", "reference", "ce"),
        ("ce-teacher", "teacher", "ce"),
    }


def line(arm, seed, errors):
    """A line of table-1 with two speakers a set, who make so many errors in ten words each."""
    sets = {stem: {"anna": [errors, 10], "bert": [errors + 1, 10]} for stem in tables.TESTS}
    return {"arm": arm, "seed": seed, "errors": sets, "before": dict.fromkeys(tables.TESTS, 50.0)}


def test_figures_of_the_tables():
    assert tables.mean_rate(line("opd", 0, 2)) == 25
    assert tables.macro_change(line("opd", 0, 2)) == pytest.approx(-50)
    runs = [line("offline-kl", 0, 4), line("opd", 0, 2)]
    table = tables.table_of(runs)
    assert table.shape == (2, len(tables.TESTS), 3)
    assert table.sum(axis=0).tolist() == [[9, 5, 20]] * len(tables.TESTS)
    figures = evaluation.relative_figures(table, 1, True)
    assert figures["value"] == pytest.approx(100 * (5 / 9 - 1))
    logs = [np.log(3 / 5), np.log(2 / 4)]  # without anna, without bert
    spread = np.sqrt(1 / 2 * sum((value - np.log(5 / 9)) ** 2 for value in logs))
    assert figures["cluster_se"] == pytest.approx(100 * spread)
