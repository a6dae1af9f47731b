"""The experiments: every command is one that its script takes, and the tables are computed from the lines."""

import json
import re
import shlex

import numpy as np
import pytest
from conftest import ROOT

import eval as evaluation
import opd
import overlap
import sft
from results import labels, sets, tables
from results import run as driver

SCRIPTS = {"opd.py": opd, "sft.py": sft, "eval.py": evaluation, "overlap.py": overlap}


def best_rate(arm, rates):
    """The third of the grid for opd, the second for the others."""
    return rates[2 if arm == "opd" else 1]


GRIDS = {
    "tune": driver.LEARNING_RATES,
    "labels-tune": driver.LEARNING_RATES,
    "scale-tune": driver.SCALE_RATES,
}


def tuned_lines():
    """The grids of learning rates as if they were finished: `best_rate` has the fewest errors."""
    lines = []
    for question, rates in GRIDS.items():
        for run in driver.experiments(lines):
            if run["question"] == question:
                distance = abs(rates.index(run["lr"]) - rates.index(best_rate(run["arm"], rates)))
                lines.append({**run, "errors": {"dev": [10 + distance, 1]}})
    return lines


def test_every_command_is_one_that_its_script_takes(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert {run["question"] for run in driver.experiments([])} == {"tune"}  # the others need their rates
    runs = driver.experiments(tuned_lines())
    assert len({run["name"] for run in runs}) == len(runs)
    assert not {run["name"] for run in runs} & driver.MODELS.keys()  # each has its own folder
    models = [{"name": name, "command": command} for name, command in driver.MODELS.items()]
    seen = set()
    for run in runs + models:
        script, *flags = shlex.split(driver.command_of(run))
        if script not in SCRIPTS:
            continue
        args = SCRIPTS[script].parse_args(flags)
        assert args.out == f"runs/results/{run['name']}"
        if "arm" in run and script == "opd.py":
            assert (args.seed, args.steps, args.lr) == (run["seed"], run["steps"], run["lr"])
            assert (args.student, args.teacher) == (run["student"], run["teacher"])
            assert any("dev" in path for path in args.eval) == ("tune" in run["question"])
        if run.get("question") == "table-1" and "arm" in run:
            assert args.lr == best_rate(run["arm"], driver.LEARNING_RATES)
            seen.add((run["arm"], args.states, args.objective))
    assert seen == {
        ("opd", "student", "kl"),
        ("offline-kl", "reference", "kl"),
        ("teacher-kl", "teacher", "kl"),
        ("ce-reference", "reference", "ce"),
        ("ce-teacher", "teacher", "ce"),
    }


def test_whatever_a_run_needs_has_its_maker():
    runs = driver.experiments(tuned_lines())
    makers = {name: {"name": name, "command": command} for name, command in driver.MODELS.items()}
    makers.update({run["name"]: run for run in runs})
    for run in makers.values():
        assert makers.keys() >= set(driver.needs(run)), run["name"]


def line(arm, seed, errors):
    """A line of table-1: in each set the first speaker makes so many errors, the others one more."""
    errors_of_set = {stem: [errors] + [errors + 1] * 19 for stem in tables.TEST_SETS}
    return {"question": "table-1", "arm": arm, "seed": seed, "errors": errors_of_set}


def test_figures_of_the_tables():
    a = line("offline-kl", 0, 4)
    b = line("opd", 0, 2)
    units = sum(tables.units_of("en-clean").values())
    assert tables.rate(a, "en-clean") == pytest.approx(100 * 99 / units)
    assert tables.macro_change([b], a) == pytest.approx(100 * (59 / 99 - 1))
    counts = tables.joint_counts([a, b])
    assert counts.shape == (40, len(tables.TEST_SETS), 3)  # 20 English voices and 20 Chinese
    assert counts.sum(axis=0)[0].tolist() == [99, 59, units]


def made_up(run, rng):
    """A line of a run as the driver would write it."""
    line = {**run, "command": driver.command_of(run)}
    if line["command"].startswith("overlap.py"):
        names = [*tables.MEASURES, *(f"vuss_{k}" for k in tables.KS[:-1])]
        line["measures"] = {name: float(rng.uniform(1, 2)) for name in names}
        names = [*tables.BASELINES, "error_student", "looping"]
        line["baselines"] = {name: float(rng.uniform(1, 2)) for name in names}
        return line
    sets = [*tables.TEST_SETS, "dev", "fresh"]
    line["errors"] = {stem: rng.integers(1, 9, size=20).tolist() for stem in sets}
    line["shared"] = {"teacher": 9, "student": 8, "shared": 7}
    line["shared_before"] = line["shared"]
    if run["question"] == "ready" and run["arm"] == "opd":
        line["errors_before"] = line["errors"]
        line["first_step"] = {"kl": 9.4, "top1": 0.4, "looping": 0.0}
    return line


@pytest.mark.slow
def test_every_question_has_its_table_and_picture_once_it_is_through(monkeypatch, tmp_path):
    """From the lines of the runs, and from made-up ones of those to come."""
    units = json.loads(driver.UNITS.read_text(encoding="utf-8"))
    (tmp_path / "units.json").write_text(json.dumps({"fresh": {"voice": 900}, **units}), encoding="utf-8")
    monkeypatch.setattr(tables, "UNITS", tmp_path / "units.json")
    rng = np.random.default_rng(0)
    lines = driver.finished_lines()
    for _ in ("grids of learning rates", "runs that take the best"):
        finished = {line["name"] for line in lines}
        lines += [made_up(run, rng) for run in driver.experiments(lines) if run["name"] not in finished]
    computed = tables.all_tables(lines)
    assert computed.keys() == tables.TABLES.keys()
    for name, table in computed.items():
        assert table.count("|") > 20 and "nan" not in table, name
    monkeypatch.setattr(tables, "HERE", tmp_path)
    for draw in tables.PICTURES.values():
        draw(lines)
    assert len(list(tmp_path.glob("*.png"))) == len(tables.PICTURES)


def test_difference_at_equal_error():
    curve_a = [(0, 30.0, {"vuss": 53.0}), (50, 20.0, {"vuss": 52.0}), (100, 10.0, {"vuss": 50.0})]
    curve_b = [(0, 25.0, {"vuss": 52.0}), (50, 15.0, {"vuss": 50.5}), (100, 5.0, {"vuss": 40.0})]
    # 52.5 and 51 on curve A; the last point lies beyond it.
    assert tables.difference_at_equal_error(curve_a, curve_b, 32) == pytest.approx((-0.5 - 0.5) / 2)


def test_the_next_steps_from_a_student_differ_in_nothing_else():
    """OPD, its other arm and more TD: the same start, clips, order and settings of the optimizer."""
    shared = ["seed", "steps", "batch_size", "lr", "warmup_steps", "weight_decay", "clip", "eval"]
    arms = {}  # (teacher, seed, steps of TD) → arm → its settings
    for run in driver.ready_runs():
        if run["question"] in ("ready", "ready-kl") and "td_steps" in run and "arm" in run:
            script, *flags = shlex.split(driver.command_of(run))
            args = SCRIPTS[script].parse_args([flag.replace("@", f"@{ROOT}/") for flag in flags])
            start = args.model if script == "sft.py" else args.student
            settings = [start] + [getattr(args, name) for name in shared]
            arms.setdefault((run["teacher"], run["seed"], run["td_steps"]), {})[run["arm"]] = settings
    assert len(arms) == 2 * 4 * 5
    for start, own in arms.items():
        assert own.keys() == tables.READY_ARMS.keys(), start
        assert own["opd"] == own["teacher-kl"] == own["td"], start


def test_one_threshold_tells_the_better_next_step():
    values = np.array([9.0, 4.0, 2.0, 1.0, 0.5, 0.4])
    gains = np.log([3.0, 1.5, 0.9, 1.2, 0.8, 0.7])  # OPD helps below 2, but for one case
    assert tables.mean_regret(values > 0, gains) == pytest.approx(np.log(3 * 1.5 * 1.2) / 6)
    assert tables.mean_regret(values < 0, gains) == pytest.approx(-np.log(0.9 * 0.8 * 0.7) / 6)
    assert tables.best_threshold(values, gains) == 0.75  # to miss 0.9 is cheaper than to take 1.2
    assert tables.best_threshold(values, -np.abs(gains)) == np.inf
    assert tables.best_threshold(values, np.abs(gains)) == -np.inf
    # Without the last three, 3.0 divides the others; without the first three, 0.75 does.
    groups = np.array([0, 0, 0, 1, 1, 1])
    assert tables.left_out_choices(values, gains, groups).tolist() == [False] * 3 + [True] * 3


def test_errors_that_a_student_takes_over():
    english = {"text": "call peter at ten now", "teacher": "call pete ten now", "language": "en"}
    chinese = {"text": "开车去上海", "teacher": "开去杭海", "language": "zh"}
    lines = [{**english, "hyp": "call pete at tan now"}, {**chinese, "hyp": "开去杭海水"}]
    # The teacher has "pete" and no "at", no 车 and 杭. The student shares all but the "at".
    assert labels.shared_errors(lines) == {"teacher": 4, "student": 5, "shared": 3}


def test_another_style_is_the_same_to_the_scores():
    for text, language in (("close the window at five", "en"), ("请打电话六七六二", "zh")):
        styled = sets.styled(text, language)
        assert styled != text
        assert evaluation.count_errors(text, styled, language)["errors"] == 0


@pytest.mark.slow
def test_documents_show_what_the_runs_say():
    """They hold every table that results/tables.py computes from results/runs.jsonl."""
    computed = tables.all_tables(driver.finished_lines())
    texts = [path.read_text(encoding="utf-8") for path in tables.DOCUMENTS]
    for text in texts:
        assert tables.with_tables(text, computed) == text, "python -m results.tables --write"
    shown = re.findall("<!-- table (.*) -->", "".join(texts))
    assert set(shown) == set(computed)


def test_lines_are_of_the_listed_runs_and_stay_small():
    files = [path for path in (ROOT / "results").glob("*.*") if path.suffix != ".py"]
    assert sum(path.stat().st_size for path in files) < 800_000
    lines = driver.finished_lines()
    commands = {run["name"]: driver.command_of(run) for run in driver.experiments(lines)}
    for line in lines:
        assert line["command"] == commands[line["name"]]
        assert re.fullmatch("[0-9a-f]{12}", line["commit"])
    assert len({line["name"] for line in lines}) == len(lines)


def test_digit_strings_are_scored_by_word(tmp_path, monkeypatch):
    """Whisper's normaliser makes one word of them, so that a string with one error would be all wrong."""
    monkeypatch.setattr(driver, "WORK", tmp_path)
    monkeypatch.setattr(driver, "UNITS", tmp_path / "units.json")
    result = {"text": "one two three", "hyp": "one three", "speaker": "theo", "language": "en", "errors": 9}
    for question, n_units in (("digits", 3), ("table-1", 1)):
        (tmp_path / question).mkdir()
        (tmp_path / question / f"{question}.jsonl").write_text(json.dumps(result) + "\n", encoding="utf-8")
        line = driver.line_of({"question": question, "name": question, "command": "eval.py"}, 1)
        assert line["errors"] == {question: [1]}
        units = json.loads((tmp_path / "units.json").read_text(encoding="utf-8"))
        assert units[question] == {"theo": n_units}
