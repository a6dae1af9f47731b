"""Checkpoints, --resume and --out: an interrupted run ends as the run that nothing stopped, bit for bit."""

import json
import random
import shutil
import signal
import time

import pytest
import runs

import data
import opd
import sft

SAVES = ["--steps", 3, "--batch-size", 4, "--save-every", 1]
# Sampling and augmentation are drawn for each step, and the CTC head is in no model folder.
FLAGS = {
    opd: [*SAVES, "--temperature", 0.7, "--sample-every", 2],
    sft: [*SAVES, "--ctc-weight", 0.3, "--time-masks", 1],
}
on_cpu = pytest.fixture(autouse=True, scope="module")(runs.run_on_cpu)


@pytest.fixture
def straight(finished):
    """straight(script) → the folder of an uninterrupted run with all its checkpoints."""
    return lambda script, *more: finished(script, *FLAGS[script], "--keep", 9, *more)


def interrupted(finished, out, step):
    """A copy of a finished run as a kill leaves it: step + 1 was logged, and its checkpoint half written."""
    shutil.copytree(finished, out)
    (out / "summary.json").unlink()
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "lora", ignore_errors=True)
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


# ---- --resume ----------------------------------------------------------------------------------------------


LORA = pytest.param(["--lora-rank", 4], marks=pytest.mark.slow)


@runs.BOTH
@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("lora", [[], LORA], ids=["all weights", "LoRA"])
def test_a_resumed_run_is_the_straight_run(script, step, lora, stage, straight, tmp_path, capsys):
    """Also from 0, where no checkpoint is complete; --workers, --save-every and --keep move no weight."""
    expected = straight(script, *lora)
    out = interrupted(expected, tmp_path / "run", step)
    flags = [*FLAGS[script], *lora]
    more = ["--workers", 1, "--save-every", 2, "--keep", 1] if step == 2 else ["--keep", 9]
    capsys.readouterr()
    lines = runs.train(script, stage, out, *flags, *more, "--resume")
    assert f"{out}: goes on from step {step}" in capsys.readouterr().out
    assert [line["step"] for line in lines] == [1, 2, 3]
    runs.assert_same_run(out, expected)
    assert runs.weight_bytes(out / "model") == runs.weight_bytes(out / "step-3/model")
    checkpoints = sorted(path.name for path in out.glob("step-*"))
    assert checkpoints == (["step-3"] if step == 2 else ["step-1", "step-2", "step-3"])
    # Now it is finished: a further --resume says so, and trains nothing.
    assert runs.train(script, stage, out, *flags, "--resume") == lines
    assert "finished at step 3" in capsys.readouterr().out


@pytest.mark.slow
@runs.BOTH
def test_a_run_may_go_on_on_more_or_fewer_ranks(script, stage, straight, tmp_path):
    """It is the straight run, to rounding."""
    expected = runs.lines_of(straight(script) / "metrics.jsonl")
    on_two = interrupted(straight(script), tmp_path / "two", 1)
    lines = runs.train_on_ranks(script, stage, on_two, 2, *FLAGS[script], "--resume")
    runs.assert_same_metrics(lines, expected, 1e-5)
    on_one = interrupted(on_two, tmp_path / "one", 2)
    lines = runs.train(script, stage, on_one, *FLAGS[script], "--resume")
    runs.assert_same_metrics(lines, expected, 1e-5)


def test_a_run_killed_in_its_last_evaluation_is_evaluated(stage, finished, tmp_path):
    """Its steps are not trained again, and the summary is written, without a set of an earlier start."""
    flags = [*FLAGS[opd], "--eval", str(stage / "m.jsonl")]
    expected = finished(opd, *flags)
    out = interrupted(expected, tmp_path / "run", 3)
    shutil.copy(out / "eval-0/m.jsonl", out / "eval-0/other.jsonl")
    runs.train(opd, stage, out, *flags, "--resume")
    runs.assert_same_run(out, expected)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (out, expected)]
    assert summaries[0]["change"] == summaries[1]["change"]
    for when in ("before", "after"):
        own, straight = [{**summary[when]["m"], "rtf": 0} for summary in summaries]
        assert own == straight


# ---- kills -------------------------------------------------------------------------------------------------


def n_logged(out):
    path = out / "metrics.jsonl"
    return path.read_text().count("}\n") if path.exists() else 0


@pytest.mark.parametrize(
    "script, world, n_steps, n_kills",
    [
        (sft, 1, 8, 3),
        pytest.param(opd, 2, 25, 10, marks=pytest.mark.slow),
        pytest.param(sft, 2, 25, 10, marks=pytest.mark.slow),
    ],
)
def test_kills_change_nothing(script, world, n_steps, n_kills, stage, tmp_path):
    """SIGKILL of all ranks, each time a random moment after a step: in training or while saving."""
    flags = [*FLAGS[script], "--steps", n_steps, "--keep", 1]
    runs.train_on_ranks(script, stage, tmp_path / "straight", world, *flags)
    out = tmp_path / "run"
    argv = runs.argv_of(script, stage, out, *flags, "--resume")
    rng = random.Random(0)
    for _ in range(n_kills):
        newest = max(data.complete_steps(out), default=0)
        n_before = n_logged(out)
        logs = [tmp_path / f"log-{rank}" for rank in range(world)]
        processes = runs.start_ranks(lambda: runs.status_of(script, argv), world, logs)
        deadline = time.monotonic() + 60
        while n_logged(out) <= n_before:
            assert processes[0].is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.05))
        for process in processes:
            process.kill()
        assert -signal.SIGKILL in runs.wait_for(processes)
        assert max(data.complete_steps(out), default=0) >= newest  # a kill costs no checkpoint
    runs.train_on_ranks(script, stage, out, world, *flags, "--resume")
    runs.assert_same_run(out, tmp_path / "straight")
