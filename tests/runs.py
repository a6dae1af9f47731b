"""What the tests of whole runs share: a tiny stage, a step of opd.py by its definition, and runs of one or
several processes."""

import json
import math
import multiprocessing
import os
import socket
import sys
import tempfile
import time

import numpy as np
import pytest
import safetensors.torch
import soundfile
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from conftest import byte_tokenizer, noise, tiny_model

import data
import eval
import model
import opd
import overlap
import sft

BOTH = pytest.mark.parametrize("script", [opd, sft], ids=["opd", "sft"])


# ---- the stage: clips and models, which no test changes ----------------------------------------------------


def write_lines(path, lines):
    """A manifest of dicts, and the folders that it lies in. → its path"""
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def write_clip(path, seconds, seed, **fields):
    """An audio file. → its manifest line"""
    wave = noise(seconds, seed).numpy()
    soundfile.write(path, wave, 16_000, subtype="FLOAT", format="WAV")
    line = {"audio": str(path), "duration": len(wave) / 16_000, "text": f"clip {seed}", "language": "en"}
    return {**line, **fields}


def with_other_ids(tokenizer, missing=""):
    """The same tokens, but the 256 bytes have their ids in reverse order, and one may be missing."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"].items()
    state["model"]["vocab"] = {"other" if token == missing else token: 255 - i for token, i in vocabulary}
    reversed_bytes = tokenizers.Tokenizer.from_str(json.dumps(state))
    specials = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=reversed_bytes, **specials)


def write_stage(folder):
    """12 clips of 0.3 to 1.2 s in m.jsonl, a student, and a larger teacher with other ids. → the folder

    The student's row of the stop token is made such that its rollouts are of all kinds: empty, stopped after
    some tokens, and cut by a cap of 12.
    """
    lines = [write_clip(folder / f"{i}.wav", 0.3 + 0.08 * i, seed=7 * i % 12) for i in range(12)]
    write_lines(folder / "m.jsonl", lines)
    student = tiny_model(2, spread=0.1)
    waveforms = [noise(line["duration"], 7 * i % 12) for i, line in enumerate(lines)]
    batch = data.collate(waveforms, student.front_end, ["en"] * 12)
    first_hidden = student(batch, student.front_end.transcripts([""] * 12)).detach()  # (12, H)
    toward_clip_10 = F.normalize(first_hidden[10] - first_hidden.mean(dim=0), dim=0)
    student.head.weight.data[student.front_end.stop_id] = 2.8 * toward_clip_10
    student.save_pretrained(folder / "student")
    teacher = tiny_model(1, with_other_ids(byte_tokenizer()), width=48, hidden=64, spread=0.1)
    teacher.save_pretrained(folder / "teacher")
    return folder


def longest_clips(stage, n):
    """The first batch of a run holds the longest clips, longest first."""
    clips = data.read_manifest(stage / "m.jsonl")
    return sorted(clips, key=lambda clip: -clip.duration)[:n]


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
        # The picture takes longer than the run. test_report.py draws it.
        patch.setattr(overlap, "draw_report", lambda *args: None)
        # transformers writes every config out for a log that is off: a quarter of a tiny run's time.
        patch.setattr(transformers.PreTrainedConfig, "__repr__", object.__repr__)
        yield


# ---- a step of opd.py by its definition --------------------------------------------------------------------


def divergence_of(divergence, p, q, beta=0.5):
    """The divergences of two distributions, by their formulas; "both" is no flag, but a fork's."""
    if divergence == "forward":
        return (p * (p.log() - q.log())).sum()
    if divergence == "reverse":
        return (q * (q.log() - p.log())).sum()
    if divergence == "both":
        return ((p - q) * (p.log() - q.log())).sum()
    m = beta * p + (1 - beta) * q
    return beta * (p * (p.log() - m.log())).sum() + (1 - beta) * (q * (q.log() - m.log())).sum()


def support_of(support, student_ids, teacher_ids, allowed_ids=()):
    """The ids of a support, ascending, from two sets of top-k ids."""
    supports = {
        "union": student_ids | teacher_ids,
        "teacher": teacher_ids,
        "student": student_ids,
        "intersection": student_ids & teacher_ids,
        "full": set(allowed_ids),
    }
    return sorted(supports[support])


def opd_step(stage, n, k=8, cap=12, **flags):
    """Equation 1, or what the flags put in its place, on the n longest clips: one row at a time, all logits.

    flags: teacher, states, objective, support, divergence, beta, tau of opd.py.
    → metrics, gradient {name: tensor}, and for each clip what samples.jsonl says of it
    """
    states = flags.get("states", "student")
    student = model.SpeechLM.from_pretrained(stage / "student").train()
    teacher = model.SpeechLM.from_pretrained(flags.get("teacher", stage / "teacher")).eval()
    teacher_vocabulary = teacher.front_end.tokenizer.get_vocab()
    vocabulary = student.front_end.tokenizer.convert_ids_to_tokens(range(len(student.forbidden)))
    in_teacher = torch.tensor([teacher_vocabulary[token] for token in vocabulary])  # none is missing
    loss_flags = {key: value for key, value in flags.items() if key in ("tau", "divergence", "beta")}
    allowed_ids = (~student.forbidden).nonzero()[:, 0].tolist()

    def top_ids(logits):
        return logits.masked_fill(student.forbidden, -math.inf).topk(k).indices.tolist()

    def loss_of_row(ids, z_teacher, z_student, tau=1.0, divergence="forward", beta=0.5):
        p = (z_teacher[ids] / tau).softmax(dim=0)
        q = (z_student[ids] / tau).softmax(dim=0)
        return tau**2 * divergence_of(divergence, p, q, beta)

    rows = []
    losses = []
    samples = []
    for clip in longest_clips(stage, n):
        waveform = data.load_audio(clip)
        batch = data.collate([waveform], student.front_end, [clip.language])
        teacher_batch = data.collate([waveform], teacher.front_end, [clip.language])
        written = teacher.sample(teacher_batch, cap)
        if states == "student":
            rollout = student.sample(batch, cap)
        elif states == "reference":
            rollout = student.front_end.transcripts([clip.text])
        else:
            rollout = model.Rollout(in_teacher.argsort()[written.ids], written.lens, written.stopped)
        same_rollout = model.Rollout(in_teacher[rollout.ids], rollout.lens, rollout.stopped)
        student_logits = student.head(student(batch, rollout))
        teacher_logits = teacher.head(teacher(teacher_batch, same_rollout))[:, in_teacher].detach()
        clip_kl = []
        tokens = rollout.ids[rollout.row_mask()]
        for z_student, z_teacher, token in zip(student_logits, teacher_logits, tokens):
            student_topk = top_ids(z_student)
            teacher_topk = top_ids(z_teacher)
            union = support_of("union", set(student_topk), set(teacher_topk))
            measures = {"vuss": len(union), "n_student": k, "n_teacher": k}
            measures["overlap_ratio"] = (2 * k - len(union)) / k
            measures["jaccard"] = (2 * k - len(union)) / len(union)
            measures["top1"] = float(student_topk[0] == teacher_topk[0])
            for nested_k in (1, 2, 4):
                if nested_k < k:
                    nested = {*student_topk[:nested_k], *teacher_topk[:nested_k]}
                    measures[f"vuss_{nested_k}"] = len(nested)
            rows.append(measures)
            clip_kl.append(loss_of_row(union, z_teacher, z_student).item())
            ids = support_of(flags.get("support", "union"), set(student_topk), set(teacher_topk), allowed_ids)
            if flags.get("objective") == "ce":
                losses.append(-z_student.log_softmax(dim=0)[token])
            elif len(ids) > 1:
                losses.append(loss_of_row(ids, z_teacher, z_student, **loss_flags))
        sample = {
            "transcript": student.front_end.texts(rollout)[0],
            "teacher": teacher.front_end.texts(written)[0],
            "stopped": bool(rollout.stopped[0]),
            "n_tokens": int(rollout.lens[0]),
            "kl": clip_kl,
        }
        samples.append(sample)

    loss = sum(losses) / len(losses)
    loss.backward()
    gradient = {name: parameter.grad for name, parameter in student.named_parameters()}
    metrics = {key: mean(row[key] for row in rows) for key in rows[0]}
    kl_rows = sum(row["vuss"] > 1 for row in rows)
    metrics["kl"] = sum(sum(sample["kl"]) for sample in samples) / kl_rows
    metrics["loss"] = loss.item()
    metrics["positions"] = len(losses)
    metrics["grad_norm"] = math.sqrt(sum(g.square().sum().item() for g in gradient.values()))
    metrics["mean_tokens"] = mean(sample["n_tokens"] for sample in samples)
    metrics["empty"] = mean(sample["n_tokens"] == 0 for sample in samples)
    metrics["capped"] = mean(not sample["stopped"] for sample in samples)
    metrics["looping"] = mean(eval.looping(sample["transcript"]) for sample in samples)
    return metrics, gradient, samples


# ---- runs --------------------------------------------------------------------------------------------------


def status_of(script, argv):
    """Runs a script in this process as its command does. → exit status"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py"])  # names the script in an error
        try:
            data.run_script(script.main, script.parse_args([str(flag) for flag in argv]))
        except SystemExit as error:
            return error.code
    return 0


def train(script, stage, out, *more):
    """A run in this process that must succeed. → the lines of its metrics.jsonl"""
    assert status_of(script, argv_of(script, stage, out, *more)) == 0
    return lines_of(out / "metrics.jsonl")


def start_ranks(action, world, logs):
    """Starts action() on `world` ranks, whose exit status it returns, with output to files. → processes

    Each is a fork of this process, with everything imported: it starts at once. They meet by gloo.
    """
    if torch.cuda.is_initialized():
        pytest.skip("a process that uses a GPU cannot be forked")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run_rank(rank, log):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        sys.exit(action())

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run_rank, args=(rank, logs[rank])) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def wait_for(processes, seconds=100):
    """Waits for ranks; those that are late are killed, and the test fails. → exit statuses (−9: killed)"""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    assert not late, f"still running after {seconds} s"
    return [process.exitcode for process in processes]


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


def weight_bytes(folder):
    """Equal for two folders that the suite has written if and only if all their tensors are."""
    return (folder / "model.safetensors").read_bytes()


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
    for path in expected.rglob("*.safetensors"):
        name = path.relative_to(expected)
        if name.parts[0] in ("model", "lora", f"step-{step}"):
            assert (out / name).read_bytes() == path.read_bytes(), name


def error_line(text):
    """The one line that says what is wrong: no other line does, and there is no traceback."""
    assert "Traceback" not in text, text
    lines = [line for line in text.replace("\r", "\n").splitlines() if ".py: error: " in line]
    assert len(lines) == 1, text
    return lines[0]


def mean(values):
    return float(np.mean(list(values)))
