"""The commands as a user gives them: mistakes on ranks, stages in a row, changed copies of the scripts."""

import sys

import pytest
import runs
import torch
from conftest import ROOT

import eval
import model
import opd
import sft

on_cpu = pytest.fixture(autouse=True, scope="module")(runs.run_on_cpu)


# ---- mistakes ----------------------------------------------------------------------------------------------


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


def test_td_and_then_opd(stage, tmp_path):
    """eval.py writes the teacher's transcripts, sft.py learns them, opd.py goes on from that run's folder."""
    flags = ["--model", stage / "teacher", "--data", stage / "m.jsonl", "--out", tmp_path / "written"]
    assert runs.status_of(eval, flags) == 0
    flags = ["--train", tmp_path / "written/m.jsonl", "--text-field", "hyp", "--steps", 3]
    losses = [line["loss"] for line in runs.train(sft, stage, tmp_path / "td", *flags)]
    assert losses[-1] < losses[0]
    runs.train(opd, stage, tmp_path / "opd", "--student", tmp_path / "td")
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
