"""The commands as a user gives them: torchrun, stages in a row, and changed copies of the scripts."""

import json
import sys

import pytest
import runs
import torch
from conftest import ROOT

import data
import eval
import model
import opd
import sft

EXAMPLE = ROOT / "example"
on_cpu = pytest.fixture(autouse=True, scope="module")(runs.run_on_cpu)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return runs.write_stage(tmp_path_factory.mktemp("stage"))


# ---- launches ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_is_one_process(stage, tmp_path):
    """The command as the README gives it: the same metrics and errors on two ranks as on one."""
    one = tmp_path / "one"
    two = tmp_path / "two"
    flags = ["--eval", stage / "m.jsonl", "--steps", 2, "--workers", 1]
    expected = runs.train(opd, stage, one, *flags)
    status, text = runs.run_command("opd.py", runs.argv_of(opd, stage, two, *flags), nproc=2)
    assert status == 0, text[-3000:]
    assert "2 process(es) on cpu" in text and "before %" in text and str(two / "model") in text
    runs.assert_same_metrics(runs.lines_of(two / "metrics.jsonl"), expected, 1e-5)
    summaries = [json.loads((out / "summary.json").read_text()) for out in (one, two)]
    for when in ("before", "after"):
        sets = [{**summary[when]["m"], "rtf": 0} for summary in summaries]
        assert sets[0] == sets[1]
    assert json.loads((two / "config.json").read_text())["world_size"] == 2


def test_a_mistake_that_all_ranks_meet_is_printed_once(stage, tmp_path):
    """Where all look, and where only rank 0 does: --out."""
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "notes.txt").write_text("mine")
    for flags, message in (
        (["--max-seconds", 0.1], "no clip of at most"),
        (["--out", notes], "is not empty"),
    ):
        argv = runs.argv_of(opd, stage, tmp_path / "run", *flags)
        results = runs.run_ranks(lambda argv=argv: runs.status_of(opd, argv), 2)
        assert [status for status, _ in results] == [2, 2]
        assert message in runs.error_line(results[0][1])
        assert results[1][1] == "" and not (tmp_path / "run").exists()


# ---- stages ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_td_and_opd_on_the_example(tmp_path):
    """eval.py writes the teacher's transcripts, sft.py learns them, opd.py goes on from there."""
    clips = data.read_manifest(EXAMPLE / "dev.jsonl")[:12]
    path = runs.write_lines(tmp_path / "td.jsonl", [{**clip.fields, "audio": clip.audio} for clip in clips])
    teacher = EXAMPLE / "teacher"
    argv = ["--model", teacher, "--data", path, "--out", tmp_path / "written"]
    assert runs.status_of(eval, [str(flag) for flag in argv]) == 0
    results = runs.lines_of(tmp_path / "written/td.jsonl")
    assert len(results) == 12 and sum(line["hyp"] == line["text"] for line in results) >= 10

    steps = ["--workers", 0, "--steps", 5, "--batch-size", 12, "--warmup-steps", 1, "--lr", 3e-4]
    argv = ["--train", tmp_path / "written/td.jsonl", "--text-field", "hyp", "--model", EXAMPLE / "base"]
    argv += ["--out", tmp_path / "td", *steps]
    assert runs.status_of(sft, [str(flag) for flag in argv]) == 0
    argv = ["--train", path, "--student", tmp_path / "td/model", "--teacher", teacher]
    argv += ["--out", tmp_path / "opd", *steps]
    assert runs.status_of(opd, [str(flag) for flag in argv]) == 0
    for name in ("td", "opd"):
        losses = [line["loss"] for line in runs.lines_of(tmp_path / name / "metrics.jsonl")]
        assert len(losses) == 5 and losses[-1] < losses[0]
    model.SpeechLM.from_pretrained(tmp_path / "opd/model")


# ---- a changed copy ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_copy_with_another_divergence(stage, tmp_path):
    """The change of docs/fork.md: the sum of both directions, in one line of support_kl."""
    change = "kl = kl_rows(log_p, log_q) + kl_rows(log_q, log_p)"
    assert f"`{change}`" in (ROOT / "docs/fork.md").read_text(encoding="utf-8")
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name == "model.py":
            assert text.count("kl = kl_rows(log_p, log_q)\n") == 1
            text = text.replace("kl = kl_rows(log_p, log_q)\n", f"{change}\n")
        (folder / path.name).write_text(text, encoding="utf-8")

    def train_copy():
        for path in folder.glob("*.py"):
            sys.modules.pop(path.stem, None)
        sys.path.insert(0, str(folder))
        import opd as copy

        assert copy.__file__.startswith(str(folder))
        flags = ["--steps", 2, "--batch-size", 5, "--clip", 0]
        return runs.status_of(copy, runs.argv_of(copy, stage, tmp_path / "run", *flags))

    status, text = runs.run_ranks(train_copy, 1)[0]
    assert status == 0, text
    line = runs.lines_of(tmp_path / "run/metrics.jsonl")[0]
    metrics, _, _ = runs.opd_step(stage, 5, divergence="both")
    del metrics["kl"]  # which is the same line
    assert {key: line[key] for key in metrics} == pytest.approx(metrics, rel=1e-5)
    end = runs.weights_of(tmp_path / "run/model")
    for name, start in runs.weights_of(stage / "student").items():
        assert not torch.equal(end[name], start), name
