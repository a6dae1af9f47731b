"""What shows a run: report.png, and TensorBoard."""

import argparse
import importlib
import json
import math

import pytest
from runs import BOTH, argv_of, error_line, lines_of, run_on_cpu, status_of, train, write_lines

import data
import opd
import overlap

DRAW_REPORT = overlap.draw_report
on_cpu = pytest.fixture(autouse=True, scope="module")(run_on_cpu)


def test_the_picture_has_the_metrics_and_the_errors(tmp_path, monkeypatch):
    """Panels over the steps, of which one had no row; errors before and after with their intervals."""
    figures = []
    monkeypatch.setattr(overlap.Figure, "savefig", lambda figure, *args, **more: figures.append(figure))
    line = {"step": 2, "loss": 0.5, "kl": 0.25, "vuss": 5.0, "vuss_1": 1.0, "vuss_2": 3.0}
    line.update(empty=0.0, capped=0.25, looping=0.125)
    before = {"value": 20.0, "low": 15.0, "high": 25.0}
    after = {"value": 10.0, "low": None, "high": None}
    silent = {"value": None, "low": None, "high": None}  # no reference unit
    DRAW_REPORT(tmp_path, [{"step": 1}, line], {"en": (before, after), "silence": (silent, silent)})
    axes = figures[0].axes
    for axis in axes[:3]:
        for curve in axis.lines:
            (_, first), (step, last) = curve.get_xydata().tolist()
            assert math.isnan(first) and (step, last) == (2, line[curve.get_label()])
    points = [curve.get_xydata().tolist()[0] for curve in axes[3].lines]
    assert points[:2] == [[20, 0.15], [10, -0.15]] and all(math.isnan(x) for x, _ in points[2:])
    intervals = axes[3].collections[0].get_segments()
    assert intervals[0].tolist() == [[15, 0.15], [25, 0.15]]


def test_a_run_without_a_row_has_no_vuss(stage, tmp_path, capsys):
    """One bad clip a step, and sound ones for the self-check: summary.json holds null and no NaN."""
    lines = lines_of(stage / "m.jsonl")
    lines[-1] = {**lines[-1], "audio": str(tmp_path / "none.wav"), "duration": 9.0}  # the longest is first
    write_lines(tmp_path / "m.jsonl", lines)
    flags = ["--train", tmp_path / "m.jsonl", "--batch-size", 1, "--on-bad-audio", "skip"]
    train(opd, stage, tmp_path / "run", *flags)
    summary = data.read_json(tmp_path / "run/summary.json")
    assert (summary["skipped"], summary["vuss_first"], summary["vuss_last"]) == (1, None, None)
    assert "VUSS – → –" in capsys.readouterr().out


def test_a_set_that_cannot_be_compared_is_named_beside_the_others(tmp_path, capsys):
    line = {"audio": "/a.wav", "duration": 1, "text": "ja", "language": "de", "hyp": "", "stopped": True}
    before = {"x": line, "v": {**line, "error": "bad"}, "w": line, "silence": {**line, "text": ""}, "y": line}
    after = {"x": line, "v": line, "w": {**line, "text": "nein"}, "silence": before["silence"]}
    for step, sets in enumerate((before, after)):
        for stem, own in sets.items():
            write_lines(tmp_path / f"eval-{step}/{stem}.jsonl", [own])
    (tmp_path / "eval-0/summary.json").write_text(json.dumps(before))
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "step_s": 1.0, "skipped": 0}])
    opd.report(argparse.Namespace(out=str(tmp_path), steps=1), before)
    change = data.read_json(tmp_path / "summary.json")["change"]
    assert list(change["sets"]) == ["x"] and list(change["not_compared"]) == ["silence", "v", "w", "y"]
    printed = capsys.readouterr().out
    for stem, reason in change["not_compared"].items():
        assert f"{stem}: before and after are not compared: {reason}\n" in printed


@pytest.mark.slow
def test_a_run_leaves_a_picture(stage, tmp_path, monkeypatch):
    """Also where nothing was evaluated, and with a set whose transcripts are empty."""
    monkeypatch.setattr(overlap, "draw_report", DRAW_REPORT)
    lines = [{**line, "text": ""} for line in lines_of(stage / "m.jsonl")]
    write_lines(tmp_path / "silence.jsonl", lines)
    train(opd, stage, tmp_path / "run", "--eval", stage / "m.jsonl", tmp_path / "silence.jsonl")
    train(opd, stage, tmp_path / "bare")
    for name in ("run", "bare"):
        assert (tmp_path / name / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@BOTH
def test_tensorboard_has_every_metric_also_after_a_resume(stage, tmp_path, script):
    pytest.importorskip("tensorboard")
    flags = ["--steps", 4, "--save-every", 2, "--keep", 9, "--tensorboard"]
    out = tmp_path / "run"
    train(script, stage, out, *flags)
    (out / "step-4").rename(tmp_path / "step-4")
    (out / "model").rename(tmp_path / "model")
    (out / "summary.json").unlink()
    lines = train(script, stage, out, *flags, "--resume")
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    reader = events.EventAccumulator(str(out / "tensorboard")).Reload()
    assert set(reader.Tags()["scalars"]) == lines[0].keys()
    for name in lines[0]:
        points = [(event.step, event.value) for event in reader.Scalars(name)]
        assert points == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines], name


@BOTH
def test_without_tensorboard_the_flag_is_refused(stage, tmp_path, monkeypatch, script, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert status_of(script, argv_of(script, stage, tmp_path / "run", "--tensorboard")) == 2
    assert "pip install tensorboard" in error_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
