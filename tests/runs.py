"""What the tests of whole runs share: a tiny stage, a run in this process, and runs of several processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
import transformers
from conftest import ROOT, noise, tiny_model

import opd
import overlap
import sft
from data import run_script

BOTH = pytest.mark.parametrize("script", [opd, sft], ids=["opd", "sft"])


# ---- the stage: clips and models, which no test changes ----------------------------------------------------


def write_lines(path, lines):
    """A manifest of dicts. → its path"""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def write_clip(path, seconds, seed, **fields):
    """An audio file. → its manifest line"""
    wave = noise(seconds, seed).numpy()
    soundfile.write(path, wave, 16_000, subtype="FLOAT", format="WAV")
    return {
        "audio": str(path),
        "duration": len(wave) / 16_000,
        "text": f"clip {seed}",
        "language": "en",
        **fields,
    }


def write_stage(folder):
    """12 clips of 0.3 to 1.2 s in m.jsonl, a student and a larger teacher. → the folder

    The student's row of the stop token is turned round, so that its rollouts are of all kinds: empty, stopped
    after some tokens, and cut by a cap of 12.
    """
    lines = [write_clip(folder / f"{i}.wav", 0.3 + 0.08 * i, seed=7 * i % 12) for i in range(12)]
    write_lines(folder / "m.jsonl", lines)
    student = tiny_model(2, spread=0.1)
    student.head.weight.data[student.front_end.stop_id] *= -3
    student.save_pretrained(folder / "student")
    tiny_model(1, width=48, hidden=64, spread=0.1).save_pretrained(folder / "teacher")
    return folder


def argv_of(script, stage, out, *more):
    """The flags of a short run on the stage; those in `more` win."""
    flags = ["--train", stage / "m.jsonl", "--out", out, "--workers", 0]
    flags += ["--steps", 1, "--batch-size", 6, "--lr", 1e-3, "--warmup-steps", 1]
    if script.__name__ == "opd":
        flags += ["--student", stage / "student", "--teacher", stage / "teacher"]
        flags += ["--k", 8, "--max-new-tokens", 12]
    else:
        flags += ["--model", stage / "student"]
    return [str(flag) for flag in [*flags, *more]]


def run_on_cpu():
    """The body of a fixture: these tests compare to the last bits, so they run on the CPU everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        # The picture takes longer than the run: test_report.py.
        patch.setattr(overlap, "draw_report", lambda *args: None)
        # transformers writes every config out for a log that is off: a quarter of a tiny run's time.
        patch.setattr(transformers.PreTrainedConfig, "__repr__", object.__repr__)
        yield


# ---- runs --------------------------------------------------------------------------------------------------


def status_of(script, argv):
    """Runs a script in this process as its command does. → exit status"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py"])  # names the script in an error
        try:
            run_script(script.main, script.parse_args(argv))
        except SystemExit as error:
            return error.code
    return 0


def train(script, stage, out, *more):
    """A run in this process that must succeed. → the lines of its metrics.jsonl"""
    assert status_of(script, argv_of(script, stage, out, *more)) == 0
    return lines_of(out / "metrics.jsonl")


def start_fork(action, log, **environment):
    """Runs action() in a fork of this process, its output into the file `log`. → process id

    Its exit status is what the action returns. A fork has everything imported: it starts at once.
    """
    if torch.cuda.is_initialized():
        pytest.skip("a process that uses a GPU cannot be forked")
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        os.environ.update(environment)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        status = action()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait_for(pids, seconds=100):
    """Waits for forks; those that are late are killed, and the test fails. → exit statuses (−9: killed)"""
    statuses = {}
    deadline = time.monotonic() + seconds
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for pid in set(pids) - set(statuses):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            pytest.fail(f"still running after {seconds} s")
        time.sleep(0.01)
    return [statuses[pid] for pid in pids]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(action, world, logs):
    """Starts action() on `world` ranks, each a fork that meets the others by gloo. → process ids by rank"""
    port = str(free_port())
    pids = []
    for rank, log in enumerate(logs):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        pids.append(start_fork(action, log, **environment))
    return pids


def run_ranks(action, world):
    """`start_ranks`, to its end. → [(status, text)] by rank"""
    with tempfile.TemporaryDirectory() as folder:
        logs = [os.path.join(folder, str(rank)) for rank in range(world)]
        statuses = wait_for(start_ranks(action, world, logs))
        texts = [open(log, encoding="utf-8").read() for log in logs]
    return list(zip(statuses, texts))


def train_on_ranks(script, stage, out, world, *more):
    """A run on `world` ranks that must succeed. → the lines of its metrics.jsonl"""
    argv = argv_of(script, stage, out, *more)
    results = run_ranks(lambda: status_of(script, argv), world)
    assert [status for status, _ in results] == [0] * world, results
    return lines_of(out / "metrics.jsonl")


def start_command(script, argv, nproc=0, nodes=("--standalone",), log=subprocess.PIPE, cwd=ROOT):
    """Starts a script as a user does, under torchrun where nproc > 0, in a session of its own. → Popen"""
    torchrun = ["-m", "torch.distributed.run", *nodes, f"--nproc_per_node={nproc}"] if nproc else []
    return subprocess.Popen(
        [sys.executable, *torchrun, str(ROOT / script), *map(str, argv)],
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )


def run_command(script, argv, nproc=0, seconds=200):
    """`start_command`, to its end. → exit status, both streams"""
    process = start_command(script, argv, nproc)
    try:
        text, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, text


# ---- what a run leaves -------------------------------------------------------------------------------------


def lines_of(path):
    """The objects of a JSON Lines file; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def timeless(lines):
    """Lines of metrics.jsonl without speed and memory, which no two runs share."""
    return [{key: x for key, x in line.items() if not key.endswith(("_s", "_gb"))} for line in lines]


def weights_of(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def state_of(out, step):
    return safetensors.torch.load_file(out / f"step-{step}" / "state.safetensors")


def gradient_of(out):
    """{name: gradient} of the first step of a run with --clip 0: AdamW's first moment is a tenth of it."""
    state = state_of(out, 1)
    names = [key.removeprefix("exp_avg.") for key in state if key.startswith("exp_avg.")]
    return {name: state[f"exp_avg.{name}"] / 0.1 for name in names}


def assert_same_gradient(gradient, expected, tolerance=1e-6):
    """Equal to `tolerance` of the largest element of all."""
    assert gradient.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 1e-3
    for name, value in expected.items():
        assert float((gradient[name] - value).abs().max()) <= tolerance * largest, name


def assert_same_metrics(lines, expected, tolerance=1e-6):
    """The same keys and values, but for speed and memory."""
    assert len(lines) == len(expected)
    for line, want in zip(timeless(lines), timeless(expected)):
        assert line == pytest.approx(want, rel=tolerance, abs=1e-9)


def assert_same_run(out, expected):
    """Metrics, samples, skipped clips, model and the last checkpoint are the same, bit for bit."""
    assert timeless(lines_of(out / "metrics.jsonl")) == timeless(lines_of(expected / "metrics.jsonl"))
    for name in ("samples.jsonl", "bad.jsonl"):
        assert lines_of(out / name) == lines_of(expected / name), name
    step = lines_of(expected / "metrics.jsonl")[-1]["step"]
    for name in ("model/model.safetensors", f"step-{step}/state.safetensors"):
        assert (out / name).read_bytes() == (expected / name).read_bytes(), name


def error_line(text):
    """The one line that says what is wrong: no other line does, and there is no traceback."""
    assert "Traceback" not in text, text
    lines = [line for line in text.replace("\r", "\n").splitlines() if ".py: error: " in line]
    assert len(lines) == 1, text
    return lines[0]


def mean(values):
    return float(np.mean(list(values)))
