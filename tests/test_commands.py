"""The commands as a user gives them: torchrun, stages in a row, and changed copies of the scripts."""

import json
import shutil
import sys

import pytest
import runs
import torch
import transformers
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


@pytest.mark.slow
def test_a_mistake_is_one_line_of_the_command(stage, tmp_path):
    argv = runs.argv_of(opd, stage, tmp_path / "run", "--train", "nowhere.jsonl")
    status, text = runs.run_command("opd.py", argv)
    assert status == 2 and "nowhere.jsonl" in text and text.count("\n") == 1
    status, text = runs.run_command("opd.py", argv, nproc=2)
    assert status != 0 and text.count("opd.py: error: ") == 1  # below it torchrun says that a rank failed


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
    argv += ["--out", tmp_path / "opd", "--eval", path, *steps]
    assert runs.status_of(opd, [str(flag) for flag in argv]) == 0
    for name in ("td", "opd"):
        losses = [line["loss"] for line in runs.lines_of(tmp_path / name / "metrics.jsonl")]
        assert len(losses) == 5 and losses[-1] < losses[0]
    summary = json.loads((tmp_path / "opd/summary.json").read_text())
    assert summary["before"]["td"]["n"] == summary["after"]["td"]["n"] == 12
    model.SpeechLM.from_pretrained(tmp_path / "opd/model")


# ---- changed copies ----------------------------------------------------------------------------------------


def write_copy(folder, file, changes):
    """The scripts in a folder, of which one has passages replaced: {passage that is there once: another}."""
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    text = (folder / file).read_text(encoding="utf-8")
    for old, new in changes.items():
        assert text.count(old) == 1, f"{file} has {old!r} {text.count(old)} times"
        text = text.replace(old, new)
    (folder / file).write_text(text, encoding="utf-8")


def run_copy(folder, action):
    """Runs action() in a fork where the scripts of `folder` take the place of ours."""

    def in_its_place():
        for path in folder.glob("*.py"):
            sys.modules.pop(path.stem, None)
        sys.path.insert(0, str(folder))
        return action()

    status, text = runs.run_ranks(in_its_place, 1)[0]
    assert status == 0, text


def train_copy(folder, stage, out, *more):
    """Two steps of the copy's opd.py. → its metrics"""

    def action():
        import opd as copy

        assert copy.__file__.startswith(str(folder))
        flags = ["--steps", 2, "--batch-size", 5, "--clip", 0, *more]
        return runs.status_of(copy, runs.argv_of(copy, stage, out, *flags))

    run_copy(folder, action)
    return runs.lines_of(out / "metrics.jsonl")


def assert_holds_what_trained(out, start):
    """OUT/model is the last checkpoint's, and every tensor of it moved."""
    end = runs.weights_of(out / "model")
    last = runs.weights_of(out / "step-2/model")
    assert end.keys() == start.keys() == last.keys()
    for name in start:
        assert torch.equal(end[name], last[name]) and not torch.equal(end[name], start[name]), name


@pytest.mark.slow
def test_a_copy_with_another_divergence(stage, tmp_path):
    """The change of docs/fork.md: the sum of both directions, in one line of support_kl."""
    change = "kl = kl_rows(log_p, log_q) + kl_rows(log_q, log_p)"
    assert f"`{change}`" in (ROOT / "docs/fork.md").read_text(encoding="utf-8")
    write_copy(tmp_path / "copy", "model.py", {"kl = kl_rows(log_p, log_q)\n": f"{change}\n"})
    lines = train_copy(tmp_path / "copy", stage, tmp_path / "run")
    metrics, _, _ = runs.opd_step(stage, 5, divergence="both")
    del metrics["kl"]  # which is the same line
    assert {key: lines[0][key] for key in metrics} == pytest.approx(metrics, rel=1e-5)
    assert_holds_what_trained(tmp_path / "run", runs.weights_of(stage / "student"))


NEW_ENCODER = '''class GatedEncoder(Encoder):
    """An encoder with one more layer."""

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, mel, frame_lens):
        x = super().forward(mel, frame_lens)
        return x * torch.sigmoid(self.gate(x))


class Adapter(nn.Module):'''


@pytest.mark.slow
def test_a_copy_with_another_encoder(stage, tmp_path):
    """The folders that it saves hold the new layer's trained weights, and it loads them again."""
    folder = tmp_path / "copy"
    out = tmp_path / "run"
    changes = {"class Adapter(nn.Module):": NEW_ENCODER, "encoder = Encoder(": "encoder = GatedEncoder("}
    write_copy(folder, "model.py", changes)

    def write_models():
        import model as copy

        for name in ("student", "teacher"):
            config = transformers.GlmAsrConfig.from_pretrained(stage / name)
            tokenizer = transformers.AutoTokenizer.from_pretrained(stage / name)
            torch.manual_seed(0)
            copy.SpeechLM(config, tokenizer).save_pretrained(tmp_path / name)
        return 0

    run_copy(folder, write_models)
    flags = ["--student", tmp_path / "student", "--teacher", tmp_path / "teacher"]
    lines = train_copy(folder, stage, out, *flags)
    start = runs.weights_of(tmp_path / "student")
    assert "model.audio_tower.gate.weight" in start
    assert_holds_what_trained(out, start)
    # It starts from its own result.
    again = train_copy(folder, stage, tmp_path / "again", *flags, "--student", out / "model")
    assert again[0]["loss"] < lines[0]["loss"]
