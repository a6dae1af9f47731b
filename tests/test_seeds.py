"""results/seeds.py: the three spreads by hand, pairing, what is refused, what is printed."""

import json
import math
import os
import statistics

import numpy as np
import pytest
import scipy.stats
from coverage import simulate_seeds
from test_scores import brute_force, stored, write_rows

from data import InputError
from results import seeds


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Folders of six runs: seeds 0, 1, 2 of recipe A, then seeds 1, 2, 0 of recipe B; and the rows."""
    rng = np.random.default_rng(1)
    skill = rng.uniform(0.2, 0.5, 6)
    rows = []
    for name in "xy":
        for i in range(40):
            units = int(rng.integers(4, 13))
            errors = rng.binomial(units, skill[i % 6] * np.linspace(1.2, 0.7, 6)).tolist()
            rows.append((name, f"s{i % 6}", i, *errors, units))
    for i, seed in enumerate((0, 1, 2, 1, 2, 0)):
        write_rows(tmp_path / f"r{i}" / "eval-9", rows[:1], 3 + i)  # an older evaluation
        write_rows(tmp_path / f"r{i}" / "eval-10", rows, 3 + i)
        (tmp_path / f"r{i}" / "config.json").write_text(json.dumps({"args": {"seed": seed}}))
    monkeypatch.chdir(tmp_path)
    return [str(tmp_path / f"r{i}") for i in range(6)], rows


def run(*argv):
    seeds.main(seeds.parse_args([str(argument) for argument in argv]))


def logs_by_hand(rows, columns):
    """Mean over sets of ln E of each run."""
    logs = []
    for c in columns:
        of_sets = []
        for name in {row[0] for row in rows}:
            of_sets.append(math.log(sum(row[c] for row in rows if row[0] == name)))
        logs.append(statistics.mean(of_sets))
    return logs


def change(log_value):
    return 100 * math.expm1(log_value)


def seeds_by_hand(rows, columns_a, columns_b, is_paired):
    """What `change_over_seeds` returns, from the formulas of results/seeds.py."""

    def mean_difference(some_rows):
        mean_a = statistics.mean(logs_by_hand(some_rows, columns_a))
        return statistics.mean(logs_by_hand(some_rows, columns_b)) - mean_a

    arms = [logs_by_hand(rows, columns_a), logs_by_hand(rows, columns_b)]
    deltas = []
    if is_paired:
        deltas = [b - a for a, b in zip(*arms)]
        arms = [deltas]
    value, se, low, high, _ = brute_force(rows, mean_difference)
    squares = [statistics.variance(arm) / len(arm) for arm in arms]
    v = sum(squares) + se**2
    n_clusters = len({row[1] for row in rows})
    per_df = [square**2 / (len(arm) - 1) for square, arm in zip(squares, arms)]
    df = v**2 / (sum(per_df) + se**4 / (n_clusters - 1))
    half = scipy.stats.t.ppf(0.975, df) * math.sqrt(v)
    return {
        "value": change(value),
        "per_seed": [change(delta) for delta in deltas],
        "seed_sd": 100 * math.sqrt(sum(statistics.variance(arm) for arm in arms)),
        "cluster_se": 100 * se,
        "cluster_low": change(low),
        "cluster_high": change(high),
        "total_se": 100 * math.sqrt(v),
        "df": df,
        "low": change(value - half),
        "high": change(value + half),
        "p": 2 * scipy.stats.t.sf(abs(value) / math.sqrt(v), df),
    }


@pytest.mark.parametrize("is_paired", [True, False])
def test_seeds_against_a_hand_calculation(runs, tmp_path, is_paired):
    """Paired, the runs of B are put in the order of seeds; unpaired, one run of A is left away."""
    folders, rows = runs
    columns_a = [3, 4, 5] if is_paired else [3, 4]
    columns_b = [8, 6, 7] if is_paired else [6, 7, 8]
    run(*folders[: len(columns_a)], "--against", *folders[3:], "--json", tmp_path / "s.json")
    c = stored(tmp_path / "s.json")
    assert c["paired"] is is_paired
    assert (c["seeds_a"], c["seeds_b"]) == (([0, 1, 2], [0, 1, 2]) if is_paired else ([0, 1], [1, 2, 0]))
    assert c["folders_a"] == [f"{folder}/eval-10" for folder in folders[: len(columns_a)]]
    for name, figures in (*c["sets"].items(), ("macro", c["macro"])):
        own = [row for row in rows if name in (row[0], "macro")]
        expected = seeds_by_hand(own, columns_a, columns_b, is_paired)
        for key, value in expected.items():
            assert figures[key] == pytest.approx(value, rel=1e-9), key
        assert (figures["clusters"], figures["cluster_key"]) == (6, "speaker")
    units = sum(row[-1] for row in rows if row[0] == "x")
    errors = [sum(row[column] for row in rows if row[0] == "x") for column in columns_b]
    assert c["sets"]["x"]["b"] == pytest.approx([100 * n / units for n in errors])


def test_what_is_not_defined_is_null(tmp_path):
    """x has one speaker. In y a run has no error. In z all agree, so the spread is that of seeds alone."""
    rows = [("x", "s0", i, 4, 4, 2, 1, 10) for i in range(3)]
    rows += [("y", f"s{i}", i, 2, 3, 1, 0, 10) for i in range(3)]
    rows += [("z", f"s{i}", i, 4, 4, 2, 1, 10) for i in range(3)]
    for i in range(4):
        write_rows(tmp_path / f"r{i}" / "eval-1", rows, 3 + i)
        (tmp_path / f"r{i}" / "config.json").write_text(json.dumps({"args": {"seed": i % 2}}))
    runs = [tmp_path / f"r{i}" for i in range(4)]
    run(*runs[:2], "--against", *runs[2:], "--json", tmp_path / "s.json")
    c = stored(tmp_path / "s.json")
    x, y, z = c["sets"].values()
    assert [x[key] for key in ("per_seed", "cluster_se", "total_se", "p")] == [[-50, -75], None, None, None]
    assert [y[key] for key in ("value", "cluster_low", "p")] == [None] * 3
    assert z["cluster_se"] == 0 and z["df"] == pytest.approx(1)
    assert z["total_se"] == pytest.approx(100 * math.log(2) / 2)  # Δ = −ln 2, −2 ln 2
    assert (c["macro"]["stems"], c["macro"]["value"]) == (["y", "z"], None)


def test_runs_are_paired_where_both_sides_have_the_same_seeds_each_once():
    assert seeds.can_be_paired([2, 1], [1, 2])
    for a, b in (([1], [None]), ([1, 1], [1, 1]), ([1, 2], [1, 3]), ([1, 2], [1])):
        assert not seeds.can_be_paired(a, b)


def test_what_cannot_be_compared_is_refused(runs):
    folders, _ = runs
    with pytest.raises(InputError, match="r0/eval-10 is given twice"):
        run(folders[0], f"{folders[0]}/eval-10", "--against", folders[3])
    os.rename(f"{folders[3]}/eval-10/y.jsonl", f"{folders[3]}/eval-10/z.jsonl")
    with pytest.raises(InputError, match="r0/eval-10 and .*/r3/eval-10 hold other sets"):
        run(folders[0], "--against", folders[3])


def test_exact_sign_flip_by_hand():
    """|± 1 ± 2 ± 4| is 7, 5, 3 and 1, each for two of the eight signs."""
    assert seeds.exact_sign_flip(np.array([1.0, 2, 4])) == 2 / 8
    assert seeds.exact_sign_flip(np.array([1.0, 2, -4])) == 8 / 8
    assert seeds.exact_sign_flip(np.array([-1.0, 2, 4])) == 4 / 8
    assert seeds.exact_sign_flip(np.zeros(3)) == 1


@pytest.mark.parametrize("is_paired", [True, False])
def test_total_interval_covers_where_speakers_alone_do_not(is_paired):
    shares = simulate_seeds(3, 40, 0.2, is_paired)
    assert 0.90 <= shares["total"] <= 0.99 and shares["speakers alone"] < 0.5
