"""What a run survives: kills, signals, a full disk, another number of processes, numbers that are not
finite; and that an interrupted run is the uninterrupted one, bit for bit."""
import errno
import gc
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import data
import opd
import sft
from conftest import ROOT, byte_tokenizer, noise, tiny_config, tiny_model
from data import run_script
from model import SpeechLM

N_CLIPS = 12


# ---- helpers -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A folder with 12 clips of 0.3 to 1.2 s, m.jsonl, a student, a teacher, and what sft.py starts from;
    nothing writes into it."""
    folder = tmp_path_factory.mktemp("stage")
    with open(folder / "m.jsonl", "w") as file:
        for i in range(N_CLIPS):
            wave = noise(0.3 + 0.08 * i, seed=i)
            soundfile.write(folder / f"{i}.wav", wave.numpy(), 16000, subtype="FLOAT")
            file.write(json.dumps(dict(audio=f"{i}.wav", duration=len(wave) / 16000, text=f"clip {i}",
                                       language="en")) + "\n")
    tiny_model(0, spread=0.1).save_pretrained(folder / "student")
    tiny_model(1, width=48, hidden=64, spread=0.1).save_pretrained(folder / "teacher")
    (folder / "config.json").write_text(json.dumps(tiny_config(spread=0.1)))
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(autouse=True)
def private(tmp_path_factory, monkeypatch):
    """A cache folder of the tests' own, and the signal handlers as they were."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


class Command:
    """opd.py or sft.py on the stage. `main` runs it in this process, `start` as a user does."""

    def __init__(self, name, stage):
        self.name, self.stage, self.module = name, stage, {"opd": opd, "sft": sft}[name]

    def args(self, out, *more):
        models = {"opd": ["--student", self.stage / "student", "--teacher", self.stage / "teacher", "--k", 8,
                          "--max-new-tokens", 8, "--temperature", 0.7, "--sample-every", 2],
                  "sft": ["--config", self.stage / "config.json", "--tokenizer", self.stage / "tokenizer",
                          "--ctc-weight", 0.3, "--time-masks", 1, "--freq-masks", 1]}[self.name]
        return list(map(str, ["--train", self.stage / "m.jsonl", *models, "--out", out, "--workers", 0,
                              "--steps", 4, "--batch-size", 4, "--lr", 1e-3, "--warmup-steps", 1,
                              "--save-every", 1, *more]))

    def main(self, out, *more):
        """Runs it here. → exit status"""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{self.name}.py"])         # a run belongs to its script
            try:
                run_script(self.module.main, self.module.parse_args(self.args(out, *more)))
            except SystemExit as error:
                return error.code or 0
        return 0

    def start(self, out, *more, nproc=0, log=None, before=(), limits=None, nodes=("--standalone",)):
        """Starts it in a session of its own, under torchrun where nproc > 0; `log` takes both streams.
        `before`: lines of Python for each process to run first; `limits` {resource: value}; `nodes`:
        torchrun's flags of several nodes."""
        script = ROOT / f"{self.name}.py"
        if before:
            wrapper = out.parent / f"{self.name}-changed.py"
            wrapper.write_text("\n".join([
                f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = {str(script)!r}",
                *before, f"runpy.run_path({str(script)!r}, run_name='__main__')"]))
            script = wrapper
        torchrun = ["-m", "torch.distributed.run", *nodes, f"--nproc_per_node={nproc}"]
        launch = [sys.executable, *(torchrun if nproc else []), str(script), *self.args(out, *more)]

        def limit():
            for name, value in (limits or {}).items():
                resource.setrlimit(name, (value, value))
        return subprocess.Popen(
            launch, stdout=log or subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}, start_new_session=True,
            preexec_fn=limit)

    def run(self, out, *more, **how):
        """`start`, to its end. → exit status, both streams"""
        process = self.start(out, *more, **how)
        try:
            text, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            kill_tree(process)
            pytest.fail(f"still running after 120 s: {process.communicate()[0][-2000:]}")
        return process.returncode, text


@pytest.fixture(params=["opd", "sft"])
def command(request, stage):
    return Command(request.param, stage)


@pytest.fixture(scope="module")
def straight(stage, tmp_path_factory):
    """straight(name, *more) → the folder of an uninterrupted run in this process, made once, not to be
    changed."""
    runs = {}

    def get(name, *more):
        key = (name, *map(str, more))
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("straight") / name
            assert Command(name, stage).main(runs[key], "--keep", 9, *more) == 0
        return runs[key]
    return get


def metrics_of(out):
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


def timeless(lines):
    """Lines of metrics.jsonl without times and memory, which no two runs share."""
    kept = [{k: v for k, v in line.items() if not k.endswith(("_s", "_gb"))} for line in lines]
    assert all({"step", "loss", "grad_norm", "lr"} <= line.keys() for line in kept)
    return kept


def weights_of(out, step="latest"):
    return (out / "checkpoints" / step / "model" / "model.safetensors").read_bytes()


def tensors_of(out, step="latest"):
    return safetensors.torch.load(weights_of(out, step))


def assert_same_run(out, want):
    """Metrics, samples, weights and optimizer state of `out` are those of `want`, bit for bit."""
    assert timeless(metrics_of(out)) == timeless(metrics_of(want))
    assert ((out / "samples.jsonl").exists() == (want / "samples.jsonl").exists())
    if (want / "samples.jsonl").exists():
        assert (out / "samples.jsonl").read_text() == (want / "samples.jsonl").read_text()
    assert weights_of(out) == weights_of(want)
    assert_same_state(state_of(out), state_of(want))


def state_of(out, step="latest"):
    """{name: value} of the optimizer's and all other state that a checkpoint holds, whatever ranks wrote
    it."""
    checkpoint = (out / "checkpoints" / step).resolve()
    file = checkpoint.parent.parent / "state-of.tmp"
    dcp_to_torch_save(checkpoint / "state", file)
    state, flat = torch.load(file, weights_only=False), {}
    file.unlink()

    def walk(path, value):
        if not isinstance(value, (dict, list)):
            flat[path] = value
            return
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            walk(f"{path}/{key}", part)
    walk("", state)
    return flat


def assert_same_state(got, want, but=()):
    """The same tensors, those named in `but` apart."""
    assert got.keys() == want.keys() and {*but} <= want.keys()
    moments = 0
    for name, value in want.items():
        if isinstance(value, torch.Tensor) and name not in but:
            assert torch.equal(got[name], value), name
            moments += "exp_avg" in name and bool(value.any())
    assert moments > 20


def checkpoints_of(out):
    return sorted(p.name for p in (out / "checkpoints").iterdir() if not p.is_symlink())


def latest_step(out):
    """The step that `latest` names, None without it. It must be whole."""
    link = out / "checkpoints" / "latest"
    if not link.is_symlink():
        return None
    target = os.readlink(link)
    assert re.fullmatch(r"step-\d{7}", target), target
    for tensor in tensors_of(out, target).values():
        assert tensor.isfinite().all()
    state_of(out, target)
    return int(target[5:])


def snapshot(folder):
    """{path: what it is, when it was changed, and what it holds}."""
    def describe(path):
        changed = path.lstat().st_mtime_ns
        if path.is_symlink():
            return "link", changed, os.readlink(path)
        return ("folder", changed) if path.is_dir() else ("file", changed, path.read_bytes())
    return {str(path.relative_to(folder)): describe(path) for path in [folder, *sorted(folder.rglob("*"))]}


def interrupted(want, out, step):
    """A copy of a finished run as a kill leaves it after `step` was saved and the next one was logged."""
    shutil.copytree(want, out, symlinks=True)
    for path in (out / "checkpoints").iterdir():
        if not path.is_symlink() and int(path.name[5:12]) > step:
            shutil.rmtree(path)
    (out / "checkpoints" / "latest").unlink()
    (out / "checkpoints" / "latest").symlink_to(f"step-{step:07d}")
    (out / "summary.json").unlink()
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)[:step + 1]
    (out / "metrics.jsonl").write_text("".join(lines) + '{"step": 9, "lo')
    return out


def says_finished(text, out):
    return "finished" in text.replace(str(out), "OUT")


def goes_on_from(text):
    """The step of each "goes on from step N" that was printed."""
    return [int(n) for n in re.findall(r"goes on from step (\d+)", text)]


def error_lines(text):
    return [line for line in text.splitlines() if "error:" in line and "torch" not in line]


def descendants(pid):
    """Process ids below pid (torchrun's workers lead sessions of their own)."""
    children = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = list(children.get(pid, ()))
    for child in found:
        found += children.get(child, ())
    return found


def workers_of(process):
    """The ranks of a torchrun: its child processes that run a script of ours."""
    def runs_ours(pid):
        try:
            command = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
            return re.search(rb"(opd|sft)(-changed)?\.py\0", command)
        except OSError:
            return False
    return [pid for pid in descendants(process.pid) if runs_ours(pid)]


def kill_tree(process, known=()):
    """SIGKILL to a process and all below it, the ranks first and at once."""
    if not known and process.poll() is None:
        process.send_signal(signal.SIGSTOP)         # it starts no more of them meanwhile
    for pid in known or descendants(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.kill()
    process.wait()


def wait_for(condition, process, log, seconds=90):
    """→ True once condition() holds, False where the process ended before."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, f"nothing in {seconds} s: {log.read_text()[-3000:]}"
        time.sleep(0.001)
    return True


def last_logged(out):
    """The last step in metrics.jsonl, 0 without one."""
    try:
        whole = [line for line in (out / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    except FileNotFoundError:
        return 0
    return json.loads(whole[-1])["step"] if whole else 0


# ---- resume ------------------------------------------------------------------------------------------------
def test_resume_without_a_checkpoint_starts_at_0_and_says_so(command, straight, tmp_path, capsys):
    """--resume auto is right for the first start too: "no checkpoint", and the run is the plain one."""
    want = straight(command.name)
    capsys.readouterr()
    assert command.main(tmp_path / "run", "--resume", "auto") == 0
    text = capsys.readouterr().out
    assert "no checkpoint" in text and goes_on_from(text) == []
    assert_same_run(tmp_path / "run", want)


@pytest.mark.parametrize("step", [1, 3])
def test_a_resumed_run_is_the_straight_run(command, straight, step, tmp_path, capsys):
    """Killed after a save and one more logged step, then resumed: every metric, sample, weight and moment
    is the same bit for bit, each step is logged once, and the step it goes on from is printed."""
    want = straight(command.name)
    out = interrupted(want, tmp_path / "run", step)
    capsys.readouterr()
    assert command.main(out, "--keep", 9, "--resume", "auto") == 0
    assert goes_on_from(capsys.readouterr().out) == [step]
    assert [line["step"] for line in metrics_of(out)] == [1, 2, 3, 4]
    assert_same_run(out, want)
    assert (out / "summary.json").exists()


def test_a_run_resumed_with_other_free_flags_is_the_straight_run(command, straight, tmp_path):
    """--workers, --save-every and --keep may change at a resume and move no weight."""
    want = straight(command.name)
    out = interrupted(want, tmp_path / "run", 1)
    assert command.main(out, "--resume", "auto", "--workers", 1, "--save-every", 2, "--keep", 1) == 0
    assert checkpoints_of(out) == ["step-0000004"]
    assert_same_run(out, want)


def test_what_a_killed_save_leaves_is_neither_used_nor_in_the_way(command, straight, tmp_path):
    """A half-written checkpoint, a finished one that `latest` does not name yet, half a link and no
    OUT/model: the run goes on and all of it is right at its end."""
    want = straight(command.name)
    out = interrupted(want, tmp_path / "run", 2)
    folder = out / "checkpoints"
    shutil.copytree(want / "checkpoints" / "step-0000003", folder / "step-0000003")
    partial = folder / "step-0000004.partial" / "model"
    shutil.copytree(want / "checkpoints" / "step-0000004" / "model", partial)
    (partial / "model.safetensors").write_bytes(weights_of(want)[:1000])
    (folder / "latest.new").symlink_to("step-0000003")
    (out / "model").unlink()
    assert command.main(out, "--keep", 9, "--resume", "auto") == 0
    assert_same_run(out, want)
    assert checkpoints_of(out) == [f"step-000000{n}" for n in (1, 2, 3, 4)]
    assert (out / "model").resolve() == (folder / "step-0000004" / "model").resolve()


def test_a_finished_run_is_left_alone(command, straight, tmp_path, capsys):
    """The same command again prints "finished", ends with status 0, and not a byte or a date of OUT
    changes."""
    out = tmp_path / "run"
    shutil.copytree(straight(command.name), out, symlinks=True)
    before = snapshot(out)
    capsys.readouterr()
    assert command.main(out, "--keep", 9, "--resume", "auto") == 0
    assert says_finished(capsys.readouterr().out, out) and snapshot(out) == before


def test_a_run_without_its_summary_is_not_finished(command, straight, tmp_path, capsys):
    """Killed in the last evaluation: the steps are not trained again, the summary is written."""
    want = straight(command.name)
    out = tmp_path / "run"
    shutil.copytree(want, out, symlinks=True)
    (out / "summary.json").unlink()
    capsys.readouterr()
    assert command.main(out, "--keep", 9, "--resume", "auto") == 0
    text = capsys.readouterr().out
    assert not says_finished(text, out) and goes_on_from(text) == [4]
    assert (out / "summary.json").exists() and metrics_of(out) == metrics_of(want)
    assert_same_run(out, want)


def test_a_finished_run_goes_on_with_more_steps(command, straight, tmp_path, capsys):
    """--steps may be raised; the run goes on from its last step."""
    out = tmp_path / "run"
    shutil.copytree(straight(command.name), out, symlinks=True)
    first = metrics_of(out)
    capsys.readouterr()
    assert command.main(out, "--keep", 9, "--resume", "auto", "--steps", 6) == 0
    text = capsys.readouterr().out
    assert goes_on_from(text) == [4] and not says_finished(text, out)
    assert metrics_of(out)[:4] == first and [line["step"] for line in metrics_of(out)] == [1, 2, 3, 4, 5, 6]
    assert latest_step(out) == 6


CHANGES = [("opd", "--lr", 1e-3, 2e-3), ("opd", "--batch-size", 4, 6), ("opd", "--seed", 0, 1),
           ("opd", "--warmup-steps", 1, 2), ("opd", "--k", 8, 4), ("opd", "--tau", 1.0, 1.5),
           ("opd", "--temperature", 0.7, 0.8), ("opd", "--max-new-tokens", 8, 9),
           ("opd", "--support", "union", "full"), ("opd", "--weight-decay", 0.005, 0.02),
           ("opd", "--clip", 1.0, 0.5), ("opd", "--max-seconds", 30.0, 20.0),
           ("opd", "--student", "student", "teacher"), ("sft", "--lr", 1e-3, 2e-3),
           ("sft", "--ctc-weight", 0.3, 0.2), ("sft", "--time-masks", 1, 2)]


@pytest.mark.parametrize("name, flag, old, new", CHANGES)
def test_a_changed_flag_is_refused_with_both_values(stage, straight, name, flag, old, new, tmp_path, capsys):
    """A flag that would make it another run: status 2, one line with the flag and both values, OUT
    untouched."""
    out = interrupted(straight(name), tmp_path / "run", 2)
    before = snapshot(out)
    capsys.readouterr()
    new = stage / new if flag == "--student" else new
    assert Command(name, stage).main(out, "--resume", "auto", flag, new) == 2
    line, = error_lines(capsys.readouterr().err)
    assert flag in line and str(old) in line and str(new) in line
    assert snapshot(out) == before


def test_another_manifest_is_refused(stage, straight, tmp_path, capsys):
    """--train with another file, even one of the same clips: both names in the line, OUT untouched."""
    out = interrupted(straight("opd"), tmp_path / "run", 2)
    before = snapshot(out)
    other = tmp_path / "other.jsonl"
    lines = [json.loads(line) for line in open(stage / "m.jsonl")]
    lines = [line | dict(audio=str(stage / line["audio"])) for line in lines]
    other.write_text("".join(json.dumps(line) + "\n" for line in lines))
    capsys.readouterr()
    assert Command("opd", stage).main(out, "--resume", "auto", "--train", other) == 2
    line, = error_lines(capsys.readouterr().err)
    assert "--train" in line and "m.jsonl" in line and "other.jsonl" in line
    assert snapshot(out) == before


def test_a_changed_manifest_is_refused(command, straight, tmp_path, capsys):
    """The same path with other lines in it would be another run: one line that names it, nothing changed."""
    want, path = straight(command.name), tmp_path / "m.jsonl"
    lines = [json.loads(line) for line in open(command.stage / "m.jsonl")]
    path.write_text("".join(json.dumps({**line, "audio": str(command.stage / line["audio"])}) + "\n"
                            for line in lines))
    out = tmp_path / "run"
    assert command.main(out, "--train", path, "--steps", 4) == 0
    (out / "summary.json").unlink()
    text, before = path.read_text(), snapshot(out)
    path.write_text(text.replace(lines[3]["text"], "other"))
    capsys.readouterr()
    assert command.main(out, "--train", path, "--resume", "auto") == 2
    line, = error_lines(capsys.readouterr().err)
    assert str(path) in line and "changed" in line and snapshot(out) == before
    path.write_text(text)
    assert command.main(out, "--train", path, "--resume", "auto") == 0
    assert weights_of(out) == weights_of(want)


@pytest.mark.parametrize("value", [[], ["sometimes"]])
def test_resume_takes_never_and_auto(command, value, tmp_path, capsys):
    """--resume without a value, or with another, is status 2 and one line."""
    assert command.main(tmp_path / "run", "--resume", *value) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "run").exists()
    assert command.module.parse_args(command.args(tmp_path / "run")).resume == "never"


# ---- overwrite, keep, latest -------------------------------------------------------------------------------
def test_a_folder_with_a_run_is_refused(command, straight, tmp_path, capsys):
    """Without --overwrite and --resume auto: status 2, one line that names both ways on, nothing
    changed."""
    out = tmp_path / "run"
    shutil.copytree(straight(command.name), out, symlinks=True)
    before = snapshot(out)
    for more in ([], ["--resume", "never"]):
        capsys.readouterr()
        assert command.main(out, *more) == 2
        line, = error_lines(capsys.readouterr().err)
        assert "--overwrite" in line and "--resume" in line and str(out) in line
        assert snapshot(out) == before


def test_overwrite_removes_the_run_and_nothing_else(command, straight, tmp_path, capsys):
    """The new run is that of an empty folder, no file of the old one is left, a stranger's files stay."""
    out = tmp_path / "run"
    evaluating = ["--eval", command.stage / "m.jsonl", "--eval-every", 2]
    assert command.main(out, "--lr", 5e-3, "--steps", 5, *evaluating) == 0
    assert (out / "eval-2").is_dir() and (out / "eval-5").is_dir() and latest_step(out) == 5
    (out / "bad.jsonl").write_text("{}\n")
    (out / "nonfinite-2-0.jsonl").write_text("{}\n")
    (out / "notes.txt").write_text("mine")
    (out / "mine").mkdir()
    (out / "mine" / "plot.txt").write_text("mine too")
    assert command.main(out, "--overwrite", "--keep", 9) == 0
    assert (out / "notes.txt").read_text() == "mine" and (out / "mine" / "plot.txt").read_text() == "mine too"
    want = straight(command.name)
    assert sorted({*os.listdir(out)} - {"notes.txt", "mine"}) == sorted(os.listdir(want))
    assert checkpoints_of(out) == checkpoints_of(want)
    assert_same_run(out, want)


@pytest.mark.parametrize("name", ["samples.jsonl", "metrics.jsonl", "bad.jsonl", "eval-0", "summary.json"])
def test_files_of_others_with_a_runs_names_are_left_alone(command, name, tmp_path, capsys):
    """Without a config.json of ours such a file is somebody's, a manifest perhaps: one line, nothing changed."""
    out = tmp_path / "run"
    out.mkdir()
    (out / name).write_text((command.stage / "m.jsonl").read_text())
    before = snapshot(out)
    for more in ([], ["--resume", "auto"], ["--overwrite"]):
        capsys.readouterr()
        assert command.main(out, "--train", out / name, *more) == 2
        line, = error_lines(capsys.readouterr().err)
        assert str(out) in line and snapshot(out) == before


@pytest.mark.parametrize("flag, path", [("--eval", "eval-4/m.jsonl"), ("--train", "eval-4/m.jsonl"),
                                        ("start", "model")])
def test_overwrite_is_refused_where_it_would_remove_its_own_input(command, flag, path, tmp_path, capsys):
    """A manifest or model inside the run that --overwrite would empty: one line that names it, all stays."""
    out = tmp_path / "run"
    assert command.main(out, "--eval", command.stage / "m.jsonl") == 0
    flags = ["--student", out / path] if command.name == "opd" else ["--model", out / path]
    flags = flags if flag == "start" else [flag, out / path]
    before = snapshot(out)
    capsys.readouterr()
    assert command.main(out, *flags, "--overwrite") == 2
    line, = error_lines(capsys.readouterr().err)
    assert str(out / path) in line and "--overwrite" in line and snapshot(out) == before


def test_a_copy_that_followed_the_links_is_one_line(command, straight, tmp_path, capsys):
    out = shutil.copytree(straight(command.name), tmp_path / "run", symlinks=False)
    for leave in ("both", "latest"):
        capsys.readouterr()
        assert command.main(out, "--keep", 9, "--resume", "auto") == 2
        line, = error_lines(capsys.readouterr().err)
        assert str(out) in line
        shutil.rmtree(out / "model", ignore_errors=True)


def test_a_run_killed_while_it_evaluates_has_that_evaluation_after_all(command, straight, tmp_path, monkeypatch):
    out, flags = tmp_path / "run", ["--eval", command.stage / "m.jsonl", "--eval-every", 1, "--keep", 9]
    evaluate = command.module.evaluate

    def killed(*args, **how):
        if any(os.path.basename(str(arg)) == "eval-2" for arg in args):
            raise KeyboardInterrupt
        return evaluate(*args, **how)
    monkeypatch.setattr(command.module, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        command.main(out, *flags)
    monkeypatch.undo()
    assert command.main(out, *flags, "--resume", "auto") == 0
    assert {f"eval-{n}" for n in (1, 2, 3, 4)} <= {*os.listdir(out)}
    assert weights_of(out) == weights_of(straight(command.name))


def test_overwrite_of_an_empty_folder_is_a_plain_start(command, straight, tmp_path):
    """--overwrite with nothing to overwrite changes nothing."""
    (tmp_path / "run").mkdir()
    assert command.main(tmp_path / "run", "--overwrite") == 0
    assert_same_run(tmp_path / "run", straight(command.name))


@pytest.mark.parametrize("step", [2, 4])
def test_a_lost_link_loses_no_checkpoint(command, straight, step, tmp_path, capsys):
    """A copy without symbolic links, of a run that was cut off or of a finished one, goes on from its newest
    checkpoint, never from 0, and has its links again."""
    want = straight(command.name)
    out = shutil.copytree(want, tmp_path / "run", symlinks=True) if step == 4 else interrupted(
        want, tmp_path / "run", step)
    (out / "checkpoints" / "latest").unlink()
    (out / "model").unlink()
    capsys.readouterr()
    assert command.main(out, "--keep", 9, "--resume", "auto") == 0
    assert goes_on_from(capsys.readouterr().out) == [step]
    assert_same_run(out, want)
    assert os.readlink(out / "model") == "checkpoints/latest/model" and latest_step(out) == 4
    assert command.main(out, "--keep", 9, "--resume", "auto") == 0 and says_finished(
        capsys.readouterr().out, out)


@pytest.mark.parametrize("more, kept", [([], 2), (["--keep", 1], 1), (["--keep", 3], 3), (["--keep", 9], 4)])
def test_keep_is_the_number_of_checkpoints_that_stay(command, more, kept, tmp_path):
    """The last --keep checkpoints (2 by default) stay, each whole; `latest` and OUT/model name the last."""
    out = tmp_path / "run"
    assert command.main(out, *more) == 0
    assert checkpoints_of(out) == [f"step-{n:07d}" for n in range(5 - kept, 5)]
    for name in checkpoints_of(out):
        SpeechLM.from_pretrained(out / "checkpoints" / name / "model")
        assert len(state_of(out, name)) > 20
    assert os.readlink(out / "checkpoints" / "latest") == "step-0000004"
    assert os.readlink(out / "model") == "checkpoints/latest/model"
    assert (out / "model" / "config.json").exists()


def test_a_moved_run_goes_on(command, straight, tmp_path):
    """Links are relative: a folder that was moved resumes."""
    want = straight(command.name)
    out = interrupted(want, tmp_path / "before", 2).rename(tmp_path / "after")
    assert command.main(out, "--keep", 9, "--resume", "auto") == 0
    assert_same_run(out, want)


# ---- full disk ---------------------------------------------------------------------------------------------
def sizes(folder):
    return max(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def disk_full_run(command, straight, tmp_path, part, nproc=0):
    """A run that stands at step 2, and one that goes on from there and may write no file as long as the
    largest in `part` of a checkpoint. → OUT, status, text"""
    out = interrupted(straight(command.name), tmp_path / "run", 2)
    last = out / "checkpoints" / "step-0000002"
    model, state = sizes(last / "model"), sizes(last / "state")
    limit = {"model": model // 2, "state": (model + state // max(nproc, 1)) // 2}[part]
    assert limit < state and (part == "model" or limit > model)
    before = snapshot(last)
    status, text = command.run(out, "--keep", 1, "--resume", "auto", nproc=nproc,
                               limits={resource.RLIMIT_FSIZE: limit})
    assert snapshot(last) == before and latest_step(out) == 2
    assert "step-0000003" not in checkpoints_of(out)
    line, = [line for line in text.splitlines() if "step-0000003" in line and "intact" in line]
    assert "error:" in line and "Traceback" not in line, line
    assert "File too large" in line, line           # what the system said: on a real disk, "No space left"
    return out, status


@pytest.mark.parametrize("name, part", [("opd", "model"), ("sft", "state")])
def test_a_full_disk_leaves_the_last_checkpoint(stage, straight, name, part, tmp_path):
    """A checkpoint that does not fit: status 2, one line that names it and says that the one before is
    intact; it is, with --keep 1 too, and with room again the run goes on to the same end."""
    command = Command(name, stage)
    out, status = disk_full_run(command, straight, tmp_path, part)
    assert status == 2
    assert command.main(out, "--keep", 9, "--resume", "auto") == 0
    assert_same_run(out, straight(name))


def test_a_full_disk_beside_the_checkpoints_is_one_line(command, straight, tmp_path, monkeypatch, capsys):
    """No room for a line of metrics.jsonl: status 2 and one line; with room the run goes on to the same end."""
    want, out, add_lines = straight(command.name), tmp_path / "run", data.add_lines

    def full(path, lines, mode="a"):
        if path.endswith("metrics.jsonl") and lines[0]["step"] == 3:
            with open(path, mode) as file:
                file.write('{"step": 3, "lo')           # what still fits
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add_lines(path, lines, mode)
    monkeypatch.setattr(data, "add_lines", full)
    assert command.main(out, "--keep", 9) == 2
    line, = error_lines(capsys.readouterr().err.replace("\r", "\n"))
    assert line.startswith("opd.py: error: " if command.name == "opd" else "sft.py: error: ")
    assert str(out) in line and "No space left" in line and "--resume auto" in line
    monkeypatch.undo()
    assert command.main(out, "--keep", 9, "--resume", "auto") == 0
    assert_same_run(out, want)


@pytest.mark.slow
def test_a_full_disk_on_two_ranks_ends_both(stage, straight, tmp_path):
    """Two ranks that share a full disk end, with the same line, instead of waiting for each other."""
    out, status = disk_full_run(Command("opd", stage), straight, tmp_path, "state", nproc=2)
    assert status != 0


# ---- numbers that are not finite ---------------------------------------------------------------------------
def nonfinite_lines(out, step):
    """The lines of nonfinite-STEP-RANK.jsonl, by rank."""
    files = sorted(out.glob("nonfinite-*.jsonl"))
    assert all(re.fullmatch(rf"nonfinite-0*{step}-\d+\.jsonl", file.name) for file in files), files
    return [[json.loads(line) for line in open(file)] for file in files]


def check_nonfinite(out, step, command, ranks=1):
    """One file a rank, one line a clip of the global batch of all clips, with what is needed to reproduce
    it."""
    by_rank = nonfinite_lines(out, step)
    assert len(by_rank) == ranks and len({len(lines) for lines in by_rank}) == 1
    lines = sum(by_rank, [])
    assert sorted(int(line["clip"].rsplit(":", 1)[1]) for line in lines) == list(range(1, N_CLIPS + 1))
    tokenizer = byte_tokenizer()
    for line in lines:
        number = int(line["clip"].rsplit(":", 1)[1])
        assert line["step"] == step and os.path.basename(line["audio"]) == f"{number - 1}.wav"
        assert "m.jsonl" in line["clip"] and all(isinstance(i, int) for i in line["ids"])
        if command.name == "sft":
            assert line["text"] == f"clip {number - 1}"
            assert tokenizer.decode(line["ids"], skip_special_tokens=True) == line["text"]


def blow_up(command, out, *more, **how):
    """A learning rate that makes the weights of step 1 enormous and the loss of step 2 NaN. → status, text"""
    return command.run(out, "--batch-size", N_CLIPS, "--lr", 1e30, "--warmup-steps", 0, "--weight-decay", 0,
                       *more, **how)


@pytest.mark.parametrize("name, more", [("opd", []), ("opd", ["--temperature", 0]), ("sft", [])],
                         ids=["opd, sampled", "opd, greedy", "sft"])
def test_a_loss_that_is_not_finite_stops_the_run(stage, name, more, tmp_path):
    """Status 3, one line that names OUT/nonfinite-2-0.jsonl, which lists the step's clips with audio, ids and
    text; the checkpoint before is the last one."""
    command, out = Command(name, stage), tmp_path / "run"
    status, text = blow_up(command, out, *more)
    assert status == 3, text[-2000:]
    line, = [line for line in text.splitlines() if "nonfinite-" in line]
    file, = out.glob("nonfinite-*.jsonl")
    assert file.name in line and "Traceback" not in text
    assert line.startswith(f"{name}.py: error: ")       # not behind the progress bar
    check_nonfinite(out, 2, command)
    assert latest_step(out) == 1 and checkpoints_of(out) == ["step-0000001"]
    assert [m["step"] for m in metrics_of(out) if m["step"] < 2] == [1]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_both_ranks(command, tmp_path):
    """Each of two ranks writes its half of the same clips, whatever rank saw the NaN."""
    out = tmp_path / "run"
    status, text = blow_up(command, out, *(["--temperature", 0] if command.name == "opd" else []), nproc=2)
    assert status != 0 and re.search(r"exitcode\s*:\s*3", text), text[-2000:]
    check_nonfinite(out, 2, command, ranks=2)
    assert latest_step(out) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(command, value, tmp_path, monkeypatch):
    """The loss is finite, one gradient is not: status 3, the weights in memory are still those of the last
    step, and the step leaves its file and no checkpoint."""
    out, backward, poisoned = tmp_path / "run", torch.autograd.backward, []

    def poisoning(*args, **kwargs):
        backward(*args, **kwargs)
        if last_logged(out) == 1:
            for lm in [x for x in gc.get_objects() if type(x) is SpeechLM and x.training]:
                with_gradient = [p for p in lm.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
                if with_gradient:
                    with_gradient[0].grad.view(-1)[0] = value
                    poisoned[:] = [lm]
    monkeypatch.setattr(torch.autograd, "backward", poisoning)
    assert command.main(out, "--batch-size", N_CLIPS) == 3
    check_nonfinite(out, 2, command)
    assert latest_step(out) == 1 and checkpoints_of(out) == ["step-0000001"]
    want = SpeechLM.from_pretrained(out / "model").state_dict()
    got = poisoned[0].state_dict()
    assert len(want) > 20 and all(torch.equal(got[name], want[name]) for name in want)


# ---- the probe ---------------------------------------------------------------------------------------------
NO_MEMORY = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
             RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate "
                          "memory: you tried to allocate 123456789012 bytes. Error code 12 (Cannot allocate "
                          "memory)")]


@pytest.mark.parametrize("error", NO_MEMORY, ids=["gpu", "cpu"])
def test_too_little_memory_shows_before_the_first_step(command, error, tmp_path, monkeypatch, capsys):
    """Memory that does not last for the longest batch: status 2 and one line that names --micro-seconds,
    before any step."""
    def backward(*args, **kwargs):
        raise error
    monkeypatch.setattr(torch.autograd, "backward", backward)
    assert command.main(tmp_path / "run") == 2
    line, = error_lines(capsys.readouterr().err)
    assert "--micro-seconds" in line
    assert last_logged(tmp_path / "run") == 0 and not list(tmp_path.glob("run/checkpoints/step-*"))


def test_an_error_that_is_not_memory_is_not_called_so(command, tmp_path, monkeypatch, capsys):
    """Another RuntimeError in the probe stays what it is: it would mislead to say --micro-seconds."""
    def backward(*args, **kwargs):
        raise RuntimeError("shapes cannot be multiplied")
    monkeypatch.setattr(torch.autograd, "backward", backward)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        command.main(tmp_path / "run")


@pytest.mark.slow
def test_too_little_memory_on_one_rank_is_told_too(stage, tmp_path):
    """Memory that runs out on the second of two ranks only: the line with --micro-seconds is printed, and
    both end."""
    failing = ["import os, torch", "def backward(*args, **kwargs):",
               "    raise torch.OutOfMemoryError('CUDA out of memory')",
               "if os.environ['RANK'] == '1':", "    torch.autograd.backward = backward"]
    status, text = Command("opd", stage).run(tmp_path / "run", nproc=2, before=failing)
    assert status != 0 and sum("--micro-seconds" in line for line in text.splitlines()) == 1, text[-3000:]
    assert last_logged(tmp_path / "run") == 0


def test_the_probe_is_shown_at_each_start(command, straight, tmp_path, capsys):
    """One line beginning "probe:", with clips and memory, at the first start and after resuming, and none for
    a run that is finished."""
    out, again = tmp_path / "run", interrupted(straight(command.name), tmp_path / "again", 2)
    capsys.readouterr()
    assert command.main(out, "--keep", 9) == 0
    texts = [capsys.readouterr().out]
    assert command.main(again, "--resume", "auto") == 0
    texts.append(capsys.readouterr().out)
    for text in texts:
        line, = [line for line in text.splitlines() if line.startswith("probe:")]
        assert re.search(r"\b4\b.* clips", line) and re.search(r"\d\.\d", line) and "gb" in line.lower()
    assert command.main(out, "--keep", 9, "--resume", "auto") == 0
    assert "probe:" not in capsys.readouterr().out


@pytest.mark.parametrize("batch_size, micro_seconds", [(4, 600), (4, 2.5), (4, 0.1), (2, 2.3)])
def test_the_probe_is_the_longest_batch(command, batch_size, micro_seconds, tmp_path, monkeypatch):
    """No forward pass of an epoch, whatever --micro-seconds, takes more padded audio than the largest one of
    the probe before the first step."""
    out, encode = tmp_path / "run", SpeechLM.encode
    shapes = {"probe": [], "training": []}

    def spy(self, batch):
        if self.training and torch.is_grad_enabled():
            shapes["training" if probed else "probe"].append(batch.mel.shape[0] * batch.mel.shape[2])
        return encode(self, batch)
    probed, zero_grad = [], torch.optim.Optimizer.zero_grad
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad",
                        lambda self, *args, **kwargs: probed.append(1) or zero_grad(self, *args, **kwargs))
    monkeypatch.setattr(SpeechLM, "encode", spy)
    steps = N_CLIPS // batch_size
    assert command.main(out, "--batch-size", batch_size, "--micro-seconds", micro_seconds,
                        "--steps", steps) == 0
    assert len(probed) == steps + 1 and len(shapes["training"]) >= steps
    assert max(shapes["probe"]) >= max(shapes["training"])


def test_the_probe_has_the_optimizers_moments_beside_it(command, tmp_path, monkeypatch):
    """At a first start too: moments that only came with the first update would take memory that the probe did
    not see."""
    backward, found = torch.autograd.backward, []

    def spy(*args, **kwargs):
        optimizer, = [x for x in gc.get_objects()
                      if type(x) is torch.optim.AdamW and x.param_groups[0]["lr"] == 0.125]
        found.append((sum(len(group["params"]) for group in optimizer.param_groups), len(optimizer.state)))
        backward(*args, **kwargs)
    monkeypatch.setattr(torch.autograd, "backward", spy)
    gc.collect()
    assert command.main(tmp_path / "run", "--steps", 1, "--lr", 0.125) == 0
    n_parameters, n_states = found[0]
    assert n_states == n_parameters > 20


def test_the_probes_rollout_has_full_length(stage, tmp_path, monkeypatch):
    """A student that stops after a token or two is probed as if it never stopped: it may, later."""
    tiny_model(0, spread=0.1).save_pretrained(tmp_path / "hasty")
    path = tmp_path / "hasty" / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    name, = [name for name in weights if name.endswith("embed_tokens.weight")]
    weights[name][byte_tokenizer().convert_tokens_to_ids("<|im_end|>")] *= 30
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    sample, lens = SpeechLM.sample, []

    def spy(self, batch, max_new_tokens, *args, **kwargs):
        rollout = sample(self, batch, max_new_tokens, *args, **kwargs)
        if max_new_tokens == 9:
            lens.append(rollout.lens.tolist())
        return rollout
    monkeypatch.setattr(SpeechLM, "sample", spy)
    assert Command("opd", stage).main(tmp_path / "run", "--student", tmp_path / "hasty", "--sample-every", 0,
                                      "--max-new-tokens", 9) == 0
    assert len(lens) == 5 and any(n < 9 for n in sum(lens[1:], []))         # the probe's, then the steps'
    assert lens[0] == [9] * 4


def test_the_probe_changes_no_result(command, straight, tmp_path, monkeypatch):
    """A run whose probe was left out has the same metrics, samples, weights and moments, bit for bit."""
    want, item, longest = straight(command.name), data.StepDataset.__getitem__, []

    def without(self, step):
        if step < 0:
            longest.append(step)
        return item(self, step)
    monkeypatch.setattr(data.StepDataset, "__getitem__", without)
    real = data.step_batches
    monkeypatch.setattr(command.module, "step_batches",
                        lambda *args: (item for item in real(*args) if item[0] >= 0))
    assert command.main(tmp_path / "run", "--keep", 9) == 0
    assert longest == [-1]
    assert_same_run(tmp_path / "run", want)


# ---- one result for any number of ranks, micro-batches and workers -----------------------------------------
FIRST_STEP = {"opd": ("loss", "kl", "vuss", "overlap_ratio", "top1", "positions", "mean_tokens", "empty",
                      "capped", "looping", "grad_norm", "lr", "skipped"),
              "sft": ("loss", "ctc", "ctc_too_short", "tokens", "grad_norm", "lr", "skipped")}
EXACT = {"positions", "tokens", "empty", "capped", "looping", "ctc_too_short", "skipped", "lr", "mean_tokens"}


def assert_same_first_step(out, want, name):
    """Metrics of the first step, its gradient (the optimizer's first moment is a tenth of it) and the
    weights after it.

    The gradient agrees to 1e-6 of its largest element; the weights do where that gradient is not rounding
    itself: Adam's first update is lr × g / (|g| + 1e-8), which makes any tiny g a whole step."""
    got_line, want_line = metrics_of(out)[0], metrics_of(want)[0]
    for key in FIRST_STEP[name]:
        value = want_line[key]
        assert got_line[key] == (value if key in EXACT else pytest.approx(value, rel=2e-6)), key
    got, expected = state_of(out, "step-0000001"), state_of(want, "step-0000001")
    assert got.keys() == expected.keys()
    names = [key.removeprefix("/exp_avg/") for key in expected if key.startswith("/exp_avg/")]
    gradients = {name: expected[f"/exp_avg/{name}"] for name in names}
    largest, lr, compared = max(float(g.abs().max()) for g in gradients.values()), want_line["lr"], 0
    assert len(names) > 20 and largest > 1e-4
    for name, g in gradients.items():
        assert float((got[f"/exp_avg/{name}"] - g).abs().max()) <= 1e-6 * largest, name
        value = expected[f"/model/{name}"]
        difference, steady = (got[f"/model/{name}"] - value).abs(), g.abs() > 1e-4 * largest
        assert float(difference.max()) <= 2.01 * lr, name
        assert float((difference * steady).max()) <= 1e-3 * lr + 2e-7 * float(value.abs().max()), name
        compared += int(steady.sum())
    theirs, ours = tensors_of(want, "step-0000001"), tensors_of(out, "step-0000001")    # what is exported
    assert ours.keys() == theirs.keys()
    assert all(float((ours[name] - theirs[name]).abs().max()) <= 2.01 * lr for name in theirs)
    return compared


@pytest.mark.parametrize("micro_seconds", [2.5, 0.1])
def test_micro_batches_leave_the_first_step_as_it_is(command, straight, micro_seconds, tmp_path):
    """A whole batch at once, some clips, one clip at a time: same metrics, gradient and weights after the
    step."""
    flags = ["--batch-size", 8, "--warmup-steps", 0, "--steps", 1]
    want = straight(command.name, *flags)
    assert command.main(tmp_path / "run", "--micro-seconds", micro_seconds, *flags) == 0
    assert assert_same_first_step(tmp_path / "run", want, command.name) > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("nproc, micro_seconds", [(2, 1.3)])
def test_ranks_leave_the_first_step_as_it_is(command, straight, nproc, micro_seconds, tmp_path):
    """torchrun with 2 processes and several micro-batches each: same metrics,
    gradient and weights after the step as one plain process."""
    flags = ["--batch-size", 8, "--warmup-steps", 0, "--steps", 1]
    want = straight(command.name, *flags)
    status, text = command.run(tmp_path / "run", "--micro-seconds", micro_seconds, *flags, nproc=nproc)
    assert status == 0, text[-3000:]
    assert assert_same_first_step(tmp_path / "run", want, command.name) > 10_000


@pytest.mark.slow
def test_two_nodes_are_two_ranks(command, tmp_path):
    """Two torchruns that meet by --rdzv_endpoint, a process each: the run of one torchrun with two, bit for
    bit."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    nodes = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=1"]
    logs = [open(tmp_path / f"log-{i}", "w+") for i in range(2)]
    agents = [command.start(tmp_path / "two", "--keep", 9, nproc=1, nodes=nodes, log=log) for log in logs]
    for agent, log in zip(agents, logs):
        assert agent.wait(120) == 0, (log.seek(0), log.read())[1][-3000:]
    status, text = command.run(tmp_path / "one", "--keep", 9, nproc=2)
    assert status == 0, text[-3000:]
    assert json.load(open(tmp_path / "two" / "config.json"))["world_size"] == 2
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_workers_change_no_bit(command, straight, tmp_path):
    """Clips read by this process, by one worker or by three: the same run."""
    for workers in (1, 3):
        out = tmp_path / str(workers)
        assert command.main(out, "--workers", workers) == 0
        assert_same_run(out, straight(command.name))


def test_the_order_of_the_clips_does_not_know_ranks_or_workers():
    """The ranks' shares of a step are one batch dealt out, for any number of ranks and workers; every rank
    cuts its share into as many micro-batches as the others, which hold each clip once."""
    seconds, uneven = np.random.default_rng(0).lognormal(0, 1.5, 29).astype(np.float32), 0
    for step in range(12):
        batch = data.batch_indices(seconds, 12, 5, step)
        for world in (1, 2, 4, 12):
            shares, cuts = [], []
            for rank in range(world):
                cut = share_of(seconds, 12, 20.0, 5, step, rank, world)
                cuts.append(len(cut))
                shares.append([i for part in cut for i in part])
            assert len(set(cuts)) == 1
            alone = [len(data.micro_batches(share, seconds, 20.0)) for share in shares]
            uneven += len(set(alone)) > 1 and world < 12
            want = [sorted(batch[rank::world].tolist()) for rank in range(world)]
            assert [sorted(share) for share in shares] == want
    assert uneven > 3                           # shares that ask for different numbers were among them


def share_of(seconds, batch_size, micro_seconds, seed, step, rank, world):
    """The micro-batches of a rank, as lists of clip indices."""
    dataset = data.StepDataset(seconds, batch_size, micro_seconds, seed, rank, world, lambda cut, *_: cut)
    return dataset[step][0]


# ---- other numbers of ranks --------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_checkpoint_moves_between_one_and_two_ranks(command, tmp_path):
    """What two ranks saved one process loads, and the other way round: with an optimizer that does nothing
    the next checkpoint holds the very same weights and moments; with the real one the run goes on as it
    would have."""
    two, still, one, back = (tmp_path / name for name in ("two", "still", "one", "back"))
    frozen = ["import torch", "torch.optim.AdamW.step = lambda self, closure=None: None"]
    status, text = command.run(two, "--keep", 9, nproc=2)
    assert status == 0, text[-3000:]
    interrupted(two, still, 2)
    status, text = command.run(still, "--keep", 9, "--resume", "auto", before=frozen)
    assert status == 0 and goes_on_from(text) == [2], text[-3000:]
    assert weights_of(still, "step-0000004") == weights_of(two, "step-0000002")
    assert_same_state(state_of(still, "step-0000004"), state_of(two, "step-0000002"), but=["/step"])
    interrupted(two, one, 2)
    assert command.main(one, "--keep", 9, "--resume", "auto") == 0
    for got, want in zip(metrics_of(one), metrics_of(two), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-3)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-3)
    interrupted(one, back, 3)
    status, text = command.run(back, "--keep", 9, "--resume", "auto", nproc=2, before=frozen)
    assert status == 0 and goes_on_from(text) == [3], text[-3000:]
    assert weights_of(back, "step-0000004") == weights_of(one, "step-0000003")
    assert_same_state(state_of(back, "step-0000004"), state_of(one, "step-0000003"), but=["/step"])
    assert [line["step"] for line in metrics_of(back)] == [1, 2, 3, 4]


# ---- SIGTERM -----------------------------------------------------------------------------------------------
LONG = ["--steps", 40, "--save-every", 1000]


def test_sigterm_saves_the_step_and_ends_with_status_0(command, straight, tmp_path):
    """The step under way is finished, logged and saved, a line says how to go on, the status is 0; the same
    command with --resume auto ends as the run that nothing stopped."""
    out, log = tmp_path / "run", tmp_path / "log"
    process = command.start(out, *LONG, "--workers", 1, log=open(log, "w"))
    assert wait_for(lambda: last_logged(out) >= 3, process, log), log.read_text()[-3000:]
    os.killpg(process.pid, signal.SIGTERM)              # as schedulers do: the data workers get it too
    assert process.wait(60) == 0, log.read_text()[-3000:]
    assert any("--resume auto" in line for line in log.read_text().splitlines())
    step = last_logged(out)
    assert 3 <= step < 40 and latest_step(out) == step and len(metrics_of(out)) == step
    assert not (out / "summary.json").exists()
    assert command.main(out, *LONG, "--resume", "auto") == 0
    assert_same_run(out, straight(command.name, *LONG))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchrun", "one rank"])
def test_sigterm_ends_two_ranks_in_the_same_step(stage, to, tmp_path):
    """Sent to torchrun, which passes it on, or to one rank alone: both finish the same step, save it, and end
    by themselves with status 0; the run goes on from there."""
    command, out, log = Command("opd", stage), tmp_path / "run", tmp_path / "log"
    workers = 1 if to == "torchrun" else 0              # torchrun signals them too
    process = command.start(out, *LONG, "--workers", workers, nproc=2, log=open(log, "w"))
    assert wait_for(lambda: last_logged(out) >= 3, process, log), log.read_text()[-3000:]
    if to == "torchrun":
        process.send_signal(signal.SIGTERM)
    else:
        ranks = workers_of(process)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGTERM)
    status, text = process.wait(90), log.read_text()
    assert status == 0 or to == "torchrun", text[-3000:]        # torchrun itself reports the signal
    assert any("--resume auto" in line for line in text.splitlines())
    step = last_logged(out)
    assert 3 <= step < 40 and latest_step(out) == step and len(metrics_of(out)) == step
    status, text = command.run(out, *LONG, "--resume", "auto", nproc=2)
    assert status == 0 and goes_on_from(text) == [step], text[-3000:]
    assert [line["step"] for line in metrics_of(out)] == list(range(1, 41))


# ---- SIGKILL -----------------------------------------------------------------------------------------------
KILLED = ["--steps", 40, "--max-new-tokens", 6]


@pytest.mark.slow
@pytest.mark.parametrize("nproc, save_every, seed", [(0, 1, 1), (2, 2, 2)], ids=["1-rank", "2-ranks"])
def test_ten_kills_change_nothing(stage, nproc, save_every, seed, tmp_path):
    """SIGKILL to the whole tree at random moments, of the start, of training and of saving, each followed
    by the same command with --resume auto: it never starts again from 0 once there is a checkpoint, each
    step is logged once, and metrics, samples, weights and moments end as those of the run that nothing
    stopped, bit for bit."""
    command, rng = Command("opd", stage), random.Random(seed)
    want, out = tmp_path / "want", tmp_path / "run"
    flags = [*KILLED, "--save-every", save_every]
    status, text = command.run(want, *flags, nproc=nproc)
    assert status == 0, text[-3000:]
    moments = ["start"] + ["train", "save"] * 4 + ["save"]
    rng.shuffle(moments)
    killed = []
    for i, moment in enumerate(moments):
        log, known = tmp_path / f"log-{i}", []
        before = latest_step(out) if out.exists() else None
        process = command.start(out, *flags, "--resume", "auto", nproc=nproc, log=open(log, "w"))
        if moment == "start":
            time.sleep(rng.uniform(0.5, 8))
        else:
            alive = wait_for(lambda: "probe:" in log.read_text(), process, log)
            known = [*workers_of(process)] if nproc else []
            assert alive and len(known) == nproc, log.read_text()[-3000:]
            if moment == "train":
                steps = rng.randint(1, 3)
                alive = wait_for(lambda: last_logged(out) >= (before or 0) + steps, process, log)
                time.sleep(rng.uniform(0, 0.2))
            else:
                saving = lambda: any(name.endswith(".partial") for name in listdir(out / "checkpoints"))
                alive = wait_for(saving, process, log)
                time.sleep(rng.uniform(0, 0.03))
            assert alive, f"kill {i}: the run ended by itself: {log.read_text()[-3000:]}"
        running = process.poll() is None
        kill_tree(process, known)
        assert running, log.read_text()[-3000:]
        text, step = log.read_text(), latest_step(out) if out.exists() else None
        leftover = any(name.endswith(".partial") for name in listdir(out / "checkpoints"))
        killed.append((moment, leftover, step))
        check_start(text, before)
    assert len(killed) == 10
    assert sum(leftover for _, leftover, _ in killed) >= 3, killed       # kills that did land inside a save
    before = latest_step(out)
    assert before is not None and before < 40, killed
    status, text = command.run(out, *flags, "--resume", "auto", nproc=nproc)
    assert status == 0, text[-3000:]
    check_start(text, before)
    assert goes_on_from(text), text[-3000:]
    assert [line["step"] for line in metrics_of(out)] == list(range(1, 41))
    assert_same_run(out, want)
    assert checkpoints_of(out) == checkpoints_of(want)


def check_start(text, before):
    """What a start says of where it begins: never 0, nor less than `latest`, once there was a
    checkpoint."""
    for step in goes_on_from(text):
        assert step > 0 and step >= (before or 1), (step, before)
    assert before is None or "no checkpoint" not in text, text[-2000:]


def listdir(path):
    try:
        return os.listdir(path)
    except FileNotFoundError:
        return []


# ---- a kill at each file operation -------------------------------------------------------------------------
CHANGING = {"os.remove": 0, "os.rename": 0, "os.symlink": 1, "os.mkdir": 0, "os.rmdir": 0}   # event: its path


def forked(command, out, *more, kill_at=None):
    """Runs it in a fork of this process, which is killed just before file operation number `kill_at` on OUT,
    a file opened for writing already emptied. → exit status (−9: killed), names of the operations"""
    record, seen = out.parent / "operations", []

    def hook(event, args):
        if event == "open":
            path, _, flags = args
            changes = isinstance(path, str) and flags & (os.O_WRONLY | os.O_RDWR)
        else:
            path, flags, changes = (args[CHANGING[event]], 0, True) if event in CHANGING else ("", 0, False)
        inside = str(path).startswith(str(out)) or (event in CHANGING and args[-1] != -1)   # −1: no folder's
        if not changes or not inside or "busy" in vars(forked):
            return
        seen.append(f"{event} {re.sub('[0-9]+', '#', str(path).removeprefix(str(out)))}")
        if len(seen) - 1 == kill_at:
            forked.busy = True
            if flags & os.O_TRUNC:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
            os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        try:
            sys.addaudithook(hook)
            status = command.main(out, *more)
            forked.busy = True
            record.write_text(json.dumps(seen))
        except BaseException as error:              # a traceback is no exit of pytest's
            record.write_text(repr(error))
            status = 99
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, json.loads(record.read_text()) if status == 0 else None


@pytest.mark.slow
@pytest.mark.parametrize("name, first", [("opd", "fresh"), ("sft", "killed before")])
def test_a_kill_at_any_file_operation_changes_nothing(stage, straight, name, first, tmp_path, capsys):
    """Killed before each kind of thing that a run does to its folder (a file just emptied, one renamed, a
    link not there yet, an old checkpoint half removed), at a first start, a resumed one, and once more at the
    resume after such a kill: the same command with --resume auto ends as the run that nothing stopped,
    OUT/model included."""
    command, want, rng = Command(name, stage), straight(name), random.Random(0)
    flags = ["--resume", "auto", "--save-every", 4 if first == "fresh" else 2, "--keep", 1]

    def begin(out):
        if first == "resumed":
            interrupted(want, out, 1)
        return out
    status, operations = forked(command, begin(tmp_path / "all"), *flags)
    assert status == 0 and len(operations) > 20
    chosen = [rng.choice([i for i, other in enumerate(operations) if other == name]) for name in
              dict.fromkeys(operations)]
    for n, kill_at in enumerate(chosen):
        out = begin(tmp_path / str(n))
        where = f"before operation {kill_at}, {operations[kill_at]}"
        assert forked(command, out, *flags, kill_at=kill_at)[0] == -signal.SIGKILL, where
        if first == "killed before":
            forked(command, out, *flags, kill_at=rng.randrange(len(operations)))
        step = latest_step(out)
        capsys.readouterr()
        assert command.main(out, *flags) == 0, where + capsys.readouterr().err
        assert all(start >= (step or 1) for start in goes_on_from(capsys.readouterr().out)), where
        assert timeless(metrics_of(out)) == timeless(metrics_of(want)), where
        assert_same_run(out, want)
        assert (out / "model").resolve() == (out / "checkpoints" / "step-0000004" / "model").resolve(), where
        assert json.load(open(out / "summary.json"))["steps"] == 4, where
        shutil.rmtree(out)


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_a_torn_file_of_the_run_never_comes_to_be(command, straight, name, tmp_path):
    """config.json and summary.json are replaced whole: a kill while one is written leaves the old one, or
    none."""
    want = straight(command.name)
    out = interrupted(want, tmp_path / "run", 2)
    before = (out / name).read_bytes() if (out / name).exists() else None
    _, operations = forked(command, interrupted(want, tmp_path / "all", 2), "--resume", "auto")
    times = [i for i, operation in enumerate(operations) if f" /{name}" in operation]
    assert times
    for i in times:
        assert forked(command, out, "--resume", "auto", kill_at=i)[0] == -signal.SIGKILL
        after = (out / name).read_bytes() if (out / name).exists() else None
        assert after == before or json.loads(after)["steps" if name == "summary.json" else "args"]
        shutil.rmtree(out)
        interrupted(want, out, 2)


# ---- large manifests ---------------------------------------------------------------------------------------
def test_a_large_manifest_is_indexed_under_the_training_scripts_sigterm_handler(tmp_path):
    """The processes that index a manifest of over 64 MB end although the scripts catch SIGTERM; ten times."""
    with open(tmp_path / "m.jsonl", "w") as file:
        for i in range(900):
            file.write(json.dumps(dict(audio="a.wav", duration=1.0, note="x" * 100_000)) + "\n")
    code = [f"import os, sys; sys.path.insert(0, {str(ROOT)!r})", "import data", "data.catch_sigterm()",
            "for i in range(10):", f"    os.environ['XDG_CACHE_HOME'] = {str(tmp_path)!r} + f'/cache-{{i}}'",
            f"    print(len(data.Clips([{str(tmp_path / 'm.jsonl')!r}], None, 30.0)), flush=True)"]
    process = subprocess.Popen([sys.executable, "-c", "\n".join(code)], stdout=subprocess.PIPE, text=True)
    try:
        text, _ = process.communicate(timeout=40)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        pytest.fail(f"hangs after {process.communicate()[0].split()}")
    finally:
        (tmp_path / "m.jsonl").unlink()
    assert text.split() == ["900"] * 10


# ---- long runs ---------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_2000_steps_take_no_more_memory_than_200(tmp_path):
    """2,000 steps of one process, with samples and checkpoints: peak and resident memory after step 200
    grow by less than 1 %."""
    with open(tmp_path / "m.jsonl", "w") as file:
        for i in range(8):
            wave = noise(0.16 + 0.02 * (i % 4), seed=i)
            soundfile.write(tmp_path / f"{i}.wav", wave.numpy(), 16000, subtype="FLOAT")
            file.write(json.dumps(dict(audio=f"{i}.wav", duration=len(wave) / 16000)) + "\n")
    tiny_model(0, width=16, hidden=16).save_pretrained(tmp_path / "student")
    tiny_model(1, width=16, hidden=16).save_pretrained(tmp_path / "teacher")
    steps, out, log = 2000, tmp_path / "run", tmp_path / "log"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "opd.py"), "--train", str(tmp_path / "m.jsonl"), "--student",
         str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher"), "--out", str(out),
         "--workers", "0", "--steps", str(steps), "--batch-size", "2", "--k", "4", "--max-new-tokens", "2",
         "--lr", "1e-4", "--warmup-steps", "1", "--save-every", "100", "--sample-every", "50"],
        stdout=open(log, "w"), stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    resident = {}                                                                   # step → bytes
    while process.poll() is None:
        try:
            pages = int(pathlib.Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            break
        step = last_line_step(out / "metrics.jsonl")
        if pages and 0 < step < steps:
            resident[step] = pages * os.sysconf("SC_PAGE_SIZE")
        time.sleep(0.2)
    assert process.wait() == 0, log.read_text()[-3000:]
    peaks = {line["step"]: line["rss_gb"] for line in metrics_of(out)}
    assert len(peaks) == steps and peaks[steps] < 1.01 * peaks[200], (peaks[200], peaks[steps])
    early, late = ([size for step, size in resident.items() if low <= step < high]
                   for low, high in ((200, 400), (steps - 200, steps)))
    assert np.median(late) < 1.01 * np.median(early), (np.median(early), np.median(late))


def last_line_step(path):
    """The step of the last whole line, read from the file's end."""
    try:
        with open(path, "rb") as file:
            file.seek(max(file.seek(0, 2) - 2000, 0))
            found = re.findall(rb'"step": (\d+)[^\n]*\}\n', file.read())
    except FileNotFoundError:
        return 0
    return int(found[-1]) if found else 0
