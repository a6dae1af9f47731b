"""Checkpoints, --resume and --out: an interrupted run ends as the run that nothing stopped, bit for bit."""

import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
import transformers
from runs import (
    BOTH,
    argv_of,
    assert_same_metrics,
    assert_same_run,
    error_line,
    lines_of,
    run_on_cpu,
    run_ranks,
    start_ranks,
    state_of,
    status_of,
    timeless,
    train,
    train_on_ranks,
    wait_for,
    weights_of,
    write_lines,
    write_stage,
)

import data
import eval
import opd
import sft
from model import SpeechLM

# Sampling and augmentation are drawn for each step, and the CTC head is in no model folder.
FLAGS = {
    opd: ["--steps", 3, "--batch-size", 4, "--save-every", 1, "--temperature", 0.7, "--sample-every", 2],
    sft: ["--steps", 3, "--batch-size", 4, "--save-every", 1, "--ctc-weight", 0.3, "--time-masks", 1],
}


@pytest.fixture(autouse=True, scope="module")
def on_cpu():
    yield from run_on_cpu()


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return write_stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def straight(stage, tmp_path_factory):
    """straight(script) → the folder of an uninterrupted run with all its checkpoints, made once."""
    folders = {}

    def folder_of(script):
        if script not in folders:
            folders[script] = tmp_path_factory.mktemp("straight") / "run"
            train(script, stage, folders[script], *FLAGS[script], "--keep", 9)
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
            kept = [line for line in lines_of(out / name) if line["step"] <= step + 1]
            write_lines(out / name, kept)
            with open(out / name, "a") as file:
                file.write('{"step": 9, "lo')
    return out


def checkpoints_of(out):
    return sorted(path.name for path in out.glob("step-*"))


def snapshot(folder):
    """{path: what it holds} of a folder."""
    return {str(path): path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


# ---- --resume ----------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("step", [0, 2])
def test_a_resumed_run_is_the_straight_run(script, step, stage, straight, tmp_path, capsys):
    """Also from 0, where no checkpoint is complete; --workers, --save-every and --keep move no weight."""
    out = interrupted(straight(script), tmp_path / "run", step)
    more = ["--workers", 1, "--save-every", 2, "--keep", 1] if step == 2 else ["--keep", 9]
    capsys.readouterr()
    lines = train(script, stage, out, *FLAGS[script], *more, "--resume")
    assert f"{out}: goes on from step {step}\n" in capsys.readouterr().out
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert_same_run(out, straight(script))
    assert checkpoints_of(out) == (["step-3"] if step == 2 else ["step-1", "step-2", "step-3"])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 3


def test_how_a_step_is_computed_may_change(stage, straight, tmp_path):
    """--recompute and --micro-seconds, to rounding."""
    out = interrupted(straight(opd), tmp_path / "run", 1)
    lines = train(opd, stage, out, *FLAGS[opd], "--recompute", "--micro-seconds", 0.1, "--resume")
    assert_same_metrics(lines, lines_of(straight(opd) / "metrics.jsonl"), 1e-5)


@pytest.mark.slow
@BOTH
def test_a_run_on_two_ranks_goes_on_on_two_or_one(script, stage, straight, tmp_path):
    """On as many ranks it is the straight run bit for bit; on more or fewer, to rounding."""
    two = tmp_path / "two"
    flags = [*FLAGS[script], "--keep", 9]
    expected = train_on_ranks(script, stage, two, 2, *flags)
    again = interrupted(two, tmp_path / "again", 1)
    train_on_ranks(script, stage, again, 2, *flags, "--resume")
    assert_same_run(again, two)
    on_one = train(script, stage, interrupted(two, tmp_path / "one", 1), *flags, "--resume")
    assert_same_metrics(on_one, expected, 1e-5)
    on_two = interrupted(straight(script), tmp_path / "back", 1)
    lines = train_on_ranks(script, stage, on_two, 2, *flags, "--resume")
    assert_same_metrics(lines, lines_of(straight(script) / "metrics.jsonl"), 1e-5)


@BOTH
def test_a_finished_run_says_so_and_does_nothing(script, stage, straight, capsys):
    out = straight(script)
    before = snapshot(out)
    capsys.readouterr()
    assert status_of(script, argv_of(script, stage, out, *FLAGS[script], "--resume")) == 0
    assert capsys.readouterr().out == f"{out}: finished at step 3; nothing to do\n"
    assert snapshot(out) == before


def test_a_run_killed_in_its_last_evaluation_is_evaluated(stage, tmp_path, monkeypatch):
    """Its steps are not trained again, and the summary is written."""
    manifest = write_lines(tmp_path / "m.jsonl", lines_of(stage / "m.jsonl")[::4])
    out, flags = tmp_path / "run", [*FLAGS[opd], "--eval", manifest]
    evaluate = eval.evaluate

    def killed(*args, **keywords):
        if (out / "step-3").exists():
            raise KeyboardInterrupt
        return evaluate(*args, **keywords)

    monkeypatch.setattr(eval, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        train(opd, stage, out, *flags)
    assert (out / "model").exists() and not (out / "summary.json").exists()
    before = lines_of(out / "metrics.jsonl")
    monkeypatch.undo()
    assert train(opd, stage, out, *flags, "--resume") == before
    summary = json.loads((out / "summary.json").read_text())
    assert summary["before"]["m"]["n"] == summary["after"]["m"]["n"] == 3


# ---- what a resumed run must keep --------------------------------------------------------------------------

CHANGES = {
    opd: [
        *[["--lr", 2e-3], ["--batch-size", 6], ["--seed", 1], ["--warmup-steps", 2], ["--steps", 5]],
        *[["--weight-decay", 0.02], ["--clip", 0.5], ["--max-seconds", 20], ["--bf16"], ["--k", 4]],
        *[["--tau", 1.5], ["--temperature", 0.8], ["--max-new-tokens", 9], ["--tokens-per-second", 9]],
        *[["--support", "full"], ["--language", "en"]],
    ],
    sft: [
        *[["--lr", 2e-3], ["--steps", 2], ["--ctc-weight", 0.2], ["--time-masks", 2], ["--time-width", 9]],
        *[["--freq-masks", 1], ["--freq-width", 9], ["--text-field", "hyp"], ["--drop-looping"]],
    ],
}


@BOTH
def test_a_changed_flag_is_refused_by_name(script, stage, straight, tmp_path, capsys):
    """What would make it another run: status 2, one line with the flag, the old and the new value."""
    out = interrupted(straight(script), tmp_path / "run", 1)
    before = snapshot(out)
    old_args = json.loads((out / "config.json").read_text())["args"]
    for change in CHANGES[script]:
        capsys.readouterr()
        assert status_of(script, argv_of(script, stage, out, *FLAGS[script], "--resume", *change)) == 2, (
            change
        )
        line = error_line(capsys.readouterr().err)
        old = old_args[change[0].removeprefix("--").replace("-", "_")]
        new = change[1] if len(change) == 2 else True
        assert f"{change[0]} was {old}, now {new}" in line
        assert snapshot(out) == before


@BOTH
def test_data_and_models_are_compared_by_content(script, stage, straight, tmp_path, capsys):
    """Under another path they are the same; with another content they are refused by name."""
    names = ["student", "teacher"] if script is opd else ["student"]
    for name in names:
        shutil.copytree(stage / name, tmp_path / name)
    shutil.copy(stage / "m.jsonl", tmp_path / "other.jsonl")
    flag_of = {"student": "--student" if script is opd else "--model", "teacher": "--teacher"}
    moved = ["--train", tmp_path / "other.jsonl"]
    for name in names:
        moved += [flag_of[name], tmp_path / name]
    out = interrupted(straight(script), tmp_path / "run", 1)
    before = snapshot(out)

    def refused(flag):
        capsys.readouterr()
        assert status_of(script, argv_of(script, stage, out, *FLAGS[script], "--resume", *moved)) == 2
        line = error_line(capsys.readouterr().err)
        assert flag in line and "the run began with other content" in line
        assert snapshot(out) == before

    text = (tmp_path / "other.jsonl").read_text()
    (tmp_path / "other.jsonl").write_text(text.replace("clip 3", "clip 4"))
    refused("--train")
    (tmp_path / "other.jsonl").write_text(text)
    for name in names:
        weights = (tmp_path / name / "model.safetensors").read_bytes()
        (tmp_path / name / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
        refused(flag_of[name])
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    lines = train(script, stage, out, *FLAGS[script], "--resume", *moved)
    assert timeless(lines) == timeless(lines_of(straight(script) / "metrics.jsonl"))


@BOTH
@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["new", "resume"])
def test_a_folder_that_holds_something_else_is_refused(script, resume, stage, straight, tmp_path, capsys):
    """A stranger's files, and the run of the other script. Nothing in it changes."""
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "notes.txt").write_text("mine")
    other_run = tmp_path / "other"
    shutil.copytree(straight(sft if script is opd else opd), other_run)
    for out in (notes, other_run):
        before = snapshot(out)
        capsys.readouterr()
        assert status_of(script, argv_of(script, stage, out, *FLAGS[script], *resume)) == 2
        line = error_line(capsys.readouterr().err)
        assert (
            f"--out {out}" in line and (f"no run of {script.__name__}.py" if resume else "--resume") in line
        )
        assert snapshot(out) == before


@BOTH
def test_a_run_is_not_written_over(script, stage, straight, tmp_path, capsys):
    out = straight(script)
    before = snapshot(out)
    capsys.readouterr()
    assert status_of(script, argv_of(script, stage, out, *FLAGS[script])) == 2
    assert f"--out {out} is not empty" in error_line(capsys.readouterr().err)
    assert snapshot(out) == before


# ---- checkpoints -------------------------------------------------------------------------------------------


@BOTH
def test_every_checkpoint_holds_a_stock_model_in_float32(script, straight):
    """Stock transformers loads it whole. OUT/model is that of the last step."""
    out = straight(script)
    stock_class = transformers.GlmAsrForConditionalGeneration
    digests = set()
    for step in (1, 2, 3):
        stock, info = stock_class.from_pretrained(out / f"step-{step}/model", output_loading_info=True)
        assert not any(info.values())
        assert {parameter.dtype for parameter in stock.parameters()} == {torch.float32}
        transformers.AutoProcessor.from_pretrained(out / f"step-{step}/model")
        digests.add((out / f"step-{step}/model/model.safetensors").read_bytes())
        assert state_of(out, step)["step"] == state_of(out, step)["updates"] == step
    assert len(digests) == 3
    last, final = weights_of(out / "step-3/model"), weights_of(out / "model")
    assert last.keys() == final.keys() and all(torch.equal(last[name], final[name]) for name in last)
    assert not list(out.glob("*.partial")) + list(out.glob("*.new"))


@BOTH
def test_the_summary_is_written_last(script, stage, tmp_path, monkeypatch):
    out = tmp_path / "run"
    write_json = data.write_json
    seen = []

    def record(path, value):
        if path.endswith("summary.json"):
            seen.append(sorted(os.listdir(out)))
        write_json(path, value)

    monkeypatch.setattr(data, "write_json", record)
    train(script, stage, out, "--steps", 1)
    assert len(seen) == 1 and {"config.json", "metrics.jsonl", "model", "step-1"} <= set(seen[0])
    assert sorted(os.listdir(out)) == sorted([*seen[0], "summary.json"])


@pytest.mark.parametrize("keep", [1, 2])
def test_the_last_checkpoints_are_kept(keep, stage, tmp_path):
    out = tmp_path / "run"
    train(sft, stage, out, "--steps", 5, "--save-every", 2, "--keep", keep)
    assert checkpoints_of(out) == ["step-4", "step-5"][-keep:]


def test_a_save_that_is_killed_costs_no_checkpoint(stage, straight, tmp_path, monkeypatch):
    """With --keep 1 too the one before stays until the next is complete."""
    out = tmp_path / "run"
    save = SpeechLM.save_pretrained

    def killed(model, folder):
        save(model, folder)
        if "step-2" in str(folder):
            raise KeyboardInterrupt

    monkeypatch.setattr(SpeechLM, "save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        train(sft, stage, out, *FLAGS[sft], "--keep", 1)
    assert checkpoints_of(out) == ["step-1"]
    monkeypatch.undo()
    train(sft, stage, out, *FLAGS[sft], "--keep", 1, "--resume")
    assert checkpoints_of(out) == ["step-3"]
    assert_same_run(out, straight(sft))


def test_ranks_whose_weights_come_apart_stop_at_the_next_checkpoint(stage, tmp_path):
    """As where a change of the code leaves one rank's gradient out."""
    argv = argv_of(opd, stage, tmp_path / "run")

    def action():
        if os.environ["RANK"] == "1":
            opd.sum_gradients = lambda trained: [p.grad.zero_() for p in trained.values()]
            opd.nn.utils.clip_grad_norm_ = lambda *args: torch.ones(())
        else:
            opd.sum_gradients = lambda trained: None
        return status_of(opd, argv)

    results = run_ranks(action, 2)
    for status, text in results:
        assert status == 99 and "AssertionError: the ranks' weights have come apart" in text
    assert not checkpoints_of(tmp_path / "run")


# ---- kills -------------------------------------------------------------------------------------------------


def n_logged(out):
    path = out / "metrics.jsonl"
    return path.read_text().count("}\n") if path.exists() else 0


def kill_at_random(script, argv, out, world, rng, log):
    """Starts a run and sends SIGKILL to all its ranks: at its start, in training, or while it saves.

    → did the kill meet it, and did it leave a checkpoint half written?
    """
    pids = start_ranks(lambda: status_of(script, argv), world, [f"{log}-{rank}" for rank in range(world)])
    moment = rng.choice(["start", "train", "save"])
    n_before = n_logged(out)
    start = time.monotonic()
    start_s = rng.uniform(0, 1)
    while os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
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
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    statuses = wait_for(pids)
    return -signal.SIGKILL in statuses, bool(list(out.glob("step-*.partial")))


def run_with_kills(script, stage, out, world, n_kills, seed, *more):
    """Kills a run n_kills times, each time going on by --resume, and finishes it. → kills that met a save"""
    rng = random.Random(seed)
    argv = argv_of(script, stage, out, *FLAGS[script], *more, "--resume")
    kills = []
    for n in range(n_kills):
        newest = max(data.complete_steps(out), default=0)
        kills.append(kill_at_random(script, argv, out, world, rng, out.parent / f"log-{n}"))
        assert max(data.complete_steps(out), default=0) >= newest  # a kill costs no checkpoint
    train_on_ranks(script, stage, out, world, *FLAGS[script], *more, "--resume")
    assert sum(met for met, _ in kills) >= n_kills - 1, kills
    return sum(in_a_save for _, in_a_save in kills)


def test_kills_change_nothing(stage, straight, tmp_path):
    run_with_kills(sft, stage, tmp_path / "run", 1, 3, 0, "--keep", 1)
    assert_same_run(tmp_path / "run", straight(sft))


@pytest.mark.slow
@BOTH
def test_ten_kills_of_two_ranks_change_nothing(script, stage, tmp_path):
    more = ["--steps", 25, "--keep", 1]
    expected = tmp_path / "straight"
    train_on_ranks(script, stage, expected, 2, *FLAGS[script], *more)
    assert run_with_kills(script, stage, tmp_path / "run", 2, 10, 2, *more) >= 2
    assert_same_run(tmp_path / "run", expected)
