"""Checkpoints, --resume and --out: an interrupted run ends as the run that nothing stopped, bit for bit."""

import json
import os
import random
import re
import shutil
import signal
import time

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

# Sampling and augmentation are drawn for each step, and the CTC head is in no model folder.
FLAGS = {
    opd: ["--steps", 3, "--batch-size", 4, "--save-every", 1, "--temperature", 0.7, "--sample-every", 2],
    sft: ["--steps", 3, "--batch-size", 4, "--save-every", 1, "--ctc-weight", 0.3, "--time-masks", 1],
}


on_cpu = pytest.fixture(autouse=True, scope="module")(runs.run_on_cpu)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return runs.write_stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def straight(stage, tmp_path_factory):
    """straight(script) → the folder of an uninterrupted run with all its checkpoints, made once."""
    folders = {}

    def folder_of(script):
        if script not in folders:
            folders[script] = tmp_path_factory.mktemp("straight") / "run"
            runs.train(script, stage, folders[script], *FLAGS[script], "--keep", 9)
        return folders[script]

    return folder_of


def interrupted(finished, out, step):
    """A copy of a finished run as a kill leaves it: step + 1 was logged, and its checkpoint half written."""
    shutil.copytree(finished, out)
    (out / "summary.json").unlink()
    shutil.rmtree(out / "model")
    for folder in out.glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    partial = out / f"step-{step + 1}.partial/model"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes((finished / "model/model.safetensors").read_bytes()[:1000])
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (out / name).exists():
            kept = [line for line in runs.lines_of(out / name) if line["step"] <= step + 1]
            runs.write_lines(out / name, kept)
            with open(out / name, "a") as file:
                file.write('{"step": 9, "lo')
    return out


def checkpoints_of(out):
    return sorted(path.name for path in out.glob("step-*"))


def snapshot(folder):
    """{path: what it holds} of a folder."""
    return {str(path): path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


# ---- --resume ----------------------------------------------------------------------------------------------


@runs.BOTH
@pytest.mark.parametrize("step", [0, 2])
def test_a_resumed_run_is_the_straight_run(script, step, stage, straight, tmp_path, capsys):
    """Also from 0, where no checkpoint is complete; --workers, --save-every and --keep move no weight."""
    out = interrupted(straight(script), tmp_path / "run", step)
    more = ["--workers", 1, "--save-every", 2, "--keep", 1] if step == 2 else ["--keep", 9]
    capsys.readouterr()
    lines = runs.train(script, stage, out, *FLAGS[script], *more, "--resume")
    assert f"{out}: goes on from step {step}" in capsys.readouterr().out
    assert [line["step"] for line in lines] == [1, 2, 3]
    runs.assert_same_run(out, straight(script))
    assert checkpoints_of(out) == (["step-3"] if step == 2 else ["step-1", "step-2", "step-3"])
    assert json.loads((out / "summary.json").read_text())["steps"] == 3
    # Now it is finished: a further --resume says so, and does nothing.
    before = snapshot(out)
    assert runs.train(script, stage, out, *FLAGS[script], "--resume") == lines
    assert "finished at step 3" in capsys.readouterr().out and snapshot(out) == before


@pytest.mark.slow
@runs.BOTH
def test_a_run_may_go_on_on_more_or_fewer_ranks(script, stage, straight, tmp_path):
    """It is the straight run, to rounding."""
    expected = runs.lines_of(straight(script) / "metrics.jsonl")
    on_two = interrupted(straight(script), tmp_path / "two", 1)
    lines = runs.train_on_ranks(script, stage, on_two, 2, *FLAGS[script], "--resume")
    runs.assert_same_metrics(lines, expected, 1e-5)
    on_one = interrupted(on_two, tmp_path / "one", 2)
    runs.assert_same_metrics(runs.train(script, stage, on_one, *FLAGS[script], "--resume"), expected, 1e-5)


def test_a_run_killed_in_its_last_evaluation_is_evaluated(stage, tmp_path, monkeypatch):
    """Its steps are not trained again, and the summary is written."""
    manifest = runs.write_lines(tmp_path / "m.jsonl", runs.lines_of(stage / "m.jsonl")[::4])
    out = tmp_path / "run"
    flags = [*FLAGS[opd], "--eval", manifest]
    evaluate = eval.evaluate

    def killed(*args, **keywords):
        if (out / "step-3").exists():
            raise KeyboardInterrupt
        return evaluate(*args, **keywords)

    monkeypatch.setattr(eval, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        runs.train(opd, stage, out, *flags)
    assert (out / "model").exists() and not (out / "summary.json").exists()
    before = runs.lines_of(out / "metrics.jsonl")
    monkeypatch.undo()
    assert runs.train(opd, stage, out, *flags, "--resume") == before
    summary = json.loads((out / "summary.json").read_text())
    assert summary["before"]["m"]["n"] == summary["after"]["m"]["n"] == 3


@runs.BOTH
def test_what_a_resumed_run_must_keep(script, straight):
    """All but what docs/metrics.md names; training data and models by their content (test_data.py)."""
    config = json.loads((straight(script) / "config.json").read_text())
    assert config["inputs"].keys() == config["args"].keys() & {"train", "student", "teacher", "model"}
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    sentence = re.search(r"A resumed run may have another\s+number of ranks, ([^.]*)\.", text)[1]
    flags = {flag.replace("-", "_") for flag in re.findall(r"`--([\w-]+)`", sentence)}
    assert set(data.MAY_CHANGE) == flags | {"resume", "out"} and len(flags) > 5


# ---- checkpoints -------------------------------------------------------------------------------------------


@runs.BOTH
def test_every_checkpoint_holds_a_stock_model_in_float32(script, straight):
    """Stock transformers loads it whole. OUT/model is that of the last step."""
    out = straight(script)
    stock_class = transformers.GlmAsrForConditionalGeneration
    weights = []
    for step in (1, 2, 3):
        folder = out / f"step-{step}/model"
        stock, info = stock_class.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        assert {parameter.dtype for parameter in stock.parameters()} == {torch.float32}
        transformers.AutoProcessor.from_pretrained(folder)
        weights.append((folder / "model.safetensors").read_bytes())
        assert runs.state_of(out, step)["step"] == runs.state_of(out, step)["updates"] == step
    assert len(set(weights)) == 3 and (out / "model/model.safetensors").read_bytes() == weights[-1]
    assert not list(out.glob("*.partial")) + list(out.glob("*.new"))


def test_ranks_whose_weights_come_apart_stop_at_the_next_checkpoint(stage, tmp_path):
    """As where a change of the code leaves one rank's gradient out."""
    argv = runs.argv_of(opd, stage, tmp_path / "run")

    def action():
        if os.environ["RANK"] == "1":
            model.sum_gradients = lambda trained: [p.grad.zero_() for p in trained.values()]
            opd.nn.utils.clip_grad_norm_ = lambda *args: torch.ones(())
        else:
            model.sum_gradients = lambda trained: None
        return runs.status_of(opd, argv)

    results = runs.run_ranks(action, 2)
    for status, text in results:
        assert status == 1 and "AssertionError: the ranks' weights have come apart" in text
    assert not checkpoints_of(tmp_path / "run")


# ---- kills -------------------------------------------------------------------------------------------------


def n_logged(out):
    path = out / "metrics.jsonl"
    return path.read_text().count("}\n") if path.exists() else 0


def kill_at_random(script, argv, out, world, rng, log):
    """Starts a run and sends SIGKILL to all its ranks: at its start, in training, or while it saves.

    → did the kill meet it, and did it leave a checkpoint half written?
    """
    logs = [f"{log}-{rank}" for rank in range(world)]
    processes = runs.start_ranks(lambda: runs.status_of(script, argv), world, logs)
    moment = rng.choice(["start", "train", "save"])
    n_before = n_logged(out)
    start = time.monotonic()
    start_s = rng.uniform(0, 1)
    while processes[0].is_alive():
        has_logged = n_logged(out) > n_before
        if moment == "start" and time.monotonic() > start + start_s:
            break
        if moment == "train" and has_logged:
            time.sleep(rng.uniform(0, 0.05))
            break
        if moment == "save" and has_logged and list(out.glob("step-*.partial")):
            time.sleep(rng.uniform(0, 0.01))
            break
        assert time.monotonic() < start + 60
        time.sleep(0.0005)
    for process in processes:
        process.kill()
    statuses = runs.wait_for(processes)
    return -signal.SIGKILL in statuses, bool(list(out.glob("step-*.partial")))


def run_with_kills(script, stage, out, world, n_kills, seed, *more):
    """Kills a run n_kills times, each time going on by --resume, and finishes it. → kills that met a save"""
    rng = random.Random(seed)
    argv = runs.argv_of(script, stage, out, *FLAGS[script], *more, "--resume")
    kills = []
    for n in range(n_kills):
        newest = max(data.complete_steps(out), default=0)
        kills.append(kill_at_random(script, argv, out, world, rng, out.parent / f"log-{n}"))
        assert max(data.complete_steps(out), default=0) >= newest  # a kill costs no checkpoint
    runs.train_on_ranks(script, stage, out, world, *FLAGS[script], *more, "--resume")
    assert sum(met for met, _ in kills) >= n_kills - 1, kills
    return sum(in_a_save for _, in_a_save in kills)


def test_kills_change_nothing(stage, straight, tmp_path):
    run_with_kills(sft, stage, tmp_path / "run", 1, 3, 0, "--keep", 1)
    runs.assert_same_run(tmp_path / "run", straight(sft))


@pytest.mark.slow
@runs.BOTH
def test_ten_kills_of_two_ranks_change_nothing(script, stage, tmp_path):
    more = ["--steps", 25, "--keep", 1]
    expected = tmp_path / "straight"
    runs.train_on_ranks(script, stage, expected, 2, *FLAGS[script], *more)
    assert run_with_kills(script, stage, tmp_path / "run", 2, 10, 2, *more) >= 2
    runs.assert_same_run(tmp_path / "run", expected)
