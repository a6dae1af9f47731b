"""What shows a run: report.png, and TensorBoard."""

import importlib
import json
import sys

import pytest
from runs import BOTH, argv_of, lines_of, run_on_cpu, write_lines, write_stage

import opd
import overlap
from data import InputError

on_cpu = pytest.fixture(autouse=True, scope="module")(run_on_cpu)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return write_stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(autouse=True)
def with_pictures(monkeypatch):
    monkeypatch.setattr(opd, "draw_report", overlap.draw_report)


def train(script, stage, out, *more):
    script.main(script.parse_args(argv_of(script, stage, out, *more)))
    return out


def scalars_of(folder):
    """{name: [(step, value)]} of the event files in a folder."""
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    reader = events.EventAccumulator(str(folder))
    reader.Reload()
    table = {}
    for name in reader.Tags()["scalars"]:
        table[name] = [(event.step, event.value) for event in reader.Scalars(name)]
    return table


@pytest.mark.slow
def test_a_run_leaves_a_picture(stage, tmp_path):
    out = train(opd, stage, tmp_path / "run", "--steps", 2, "--eval", stage / "m.jsonl")
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    bare = train(opd, stage, tmp_path / "bare")  # nothing was evaluated
    assert (bare / "report.png").exists()


@pytest.mark.slow
def test_odd_sets_do_not_stop_a_run(stage, tmp_path):
    """A set without a transcript has no error; a name with $ is no formula."""
    lines = lines_of(stage / "m.jsonl")
    write_lines(tmp_path / "cost$5_x^$y.jsonl", lines)
    write_lines(tmp_path / "silence.jsonl", [{**line, "text": ""} for line in lines])
    sets = [tmp_path / "silence.jsonl", tmp_path / "cost$5_x^$y.jsonl"]
    out = train(opd, stage, tmp_path / "run", "--eval", *sets)
    assert (out / "summary.json").exists() and (out / "report.png").exists()


def test_without_matplotlib_a_line_says_so(stage, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = train(opd, stage, tmp_path / "run")
    printed = [line for line in capsys.readouterr().out.splitlines() if "report.png" in line]
    assert len(printed) == 1 and "pip install matplotlib" in printed[0]
    assert not (out / "report.png").exists() and (out / "summary.json").exists()


@pytest.mark.slow
@BOTH
def test_tensorboard_has_every_metric_also_after_a_resume(stage, tmp_path, script):
    pytest.importorskip("tensorboard")
    flags = ["--steps", 4, "--save-every", 2, "--keep", 9, "--tensorboard"]
    out = train(script, stage, tmp_path / "run", *flags)
    (out / "step-4").rename(tmp_path / "step-4")
    (out / "model").rename(tmp_path / "model")
    (out / "summary.json").unlink()
    train(script, stage, out, *flags, "--resume")
    scalars = scalars_of(out / "tensorboard")
    lines = lines_of(out / "metrics.jsonl")
    assert scalars.keys() == lines[0].keys()
    for name, points in scalars.items():
        assert points == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines], name


@BOTH
def test_without_tensorboard_the_flag_is_refused(stage, tmp_path, monkeypatch, script):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        train(script, stage, tmp_path / "run", "--tensorboard")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_flag_moves_nothing(stage, tmp_path):
    pytest.importorskip("tensorboard")
    weights = []
    for name, flags in (("with", ["--tensorboard"]), ("without", [])):
        out = train(opd, stage, tmp_path / name, *flags)
        weights.append((out / "model" / "model.safetensors").read_bytes())
        config = json.loads((out / "config.json").read_text())
        assert config["args"]["tensorboard"] == bool(flags)
    assert weights[0] == weights[1]
