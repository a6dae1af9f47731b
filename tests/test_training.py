"""Whole runs of opd.py and sft.py on tiny models: no cut into micro-batches and ranks changes a step, and
what cannot be used is counted, listed or refused. (Steps by their definition: test_arms.py, test_sft.py.)"""

import json
import math
import os
import re

import pytest
import runs
import soundfile
import torch
from conftest import ROOT, qwen3_asr_folder

import data
import eval
import model
import opd
import sft

CTC_AND_MASKS = ["--ctc-weight", 0.5, "--time-masks", 1, "--freq-masks", 1, "--time-width", 5]
on_cpu = pytest.fixture(autouse=True, scope="module")(runs.run_on_cpu)


def test_a_step_without_a_counted_row_changes_nothing(stage, tmp_path):
    """k = 1 and a teacher that agrees: every support holds one id. The step is counted and logged."""
    out = tmp_path / "run"
    flags = ["--teacher", stage / "student", "--k", 1, "--steps", 2, "--weight-decay", 1]
    lines = runs.train(opd, stage, out, *flags)
    for line in lines:
        assert line["positions"] == line["loss"] == line["kl"] == line["grad_norm"] == 0
        assert line["vuss"] == line["top1"] == line["jaccard"] == 1
        assert line["mean_tokens"] > 0
    assert [line["step"] for line in lines] == [1, 2]
    assert runs.weight_bytes(out / "model") == runs.weight_bytes(stage / "student")
    assert runs.state_of(out, 2) == {}


@pytest.mark.parametrize("text", [{"text": 17}, {}], ids=["nonsense", "no text"])
def test_opd_reads_no_transcript(text, stage, finished, tmp_path):
    """The run is the same to the last bit."""
    lines = runs.lines_of(stage / "m.jsonl")
    for line in lines:
        del line["text"]
        line.update(text)
    path = runs.write_lines(tmp_path / "m.jsonl", lines)
    metrics = runs.train(opd, stage, tmp_path / "run", "--train", path)
    assert runs.timeless(metrics) == runs.timeless(runs.lines_of(finished(opd) / "metrics.jsonl"))
    assert runs.weight_bytes(tmp_path / "run/model") == runs.weight_bytes(finished(opd) / "model")


def test_eval_before_and_after_is_of_the_models_it_names(stage, tmp_path):
    out = tmp_path / "run"
    manifest = str(runs.write_lines(tmp_path / "m.jsonl", runs.lines_of(stage / "m.jsonl")[::4]))
    runs.train(opd, stage, out, "--eval", manifest, "--steps", 2, "--lr", 1e-2)
    summary = json.loads((out / "summary.json").read_text())
    sets = eval.read_sets([manifest], 30)
    for step, key, folder in ((0, "before", stage / "student"), (2, "after", out / "model")):
        assert json.loads((out / f"eval-{step}/summary.json").read_text()) == summary[key]
        speech_lm = model.SpeechLM.from_pretrained(folder)
        again = eval.evaluate(speech_lm, sets, torch.device("cpu"), {})
        assert {**again["m"], "rtf": 0} == {**summary[key]["m"], "rtf": 0}  # the same but for speed


# ---- no cut changes a step ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, world, batch_size, micro_seconds, more",
    [
        (opd, 1, 5, 0.1, []),  # a clip at a time
        (opd, 2, 5, 0.1, ["--temperature", 0.7]),  # two ranks with three and two clips
        pytest.param(opd, 4, 3, 600, [], marks=pytest.mark.slow),  # one rank has no clip
        pytest.param(opd, 2, 5, 0.1, ["--states", "teacher", "--objective", "ce"], marks=pytest.mark.slow),
        (sft, 2, 5, 0.1, CTC_AND_MASKS),
    ],
)
def test_no_cut_changes_a_step(script, world, batch_size, micro_seconds, more, stage, finished, tmp_path):
    """The gradient agrees to 1e-6 of its largest element, and every metric with it."""
    flags = ["--batch-size", batch_size, "--clip", 0, *more]
    whole = finished(script, *flags)
    out = tmp_path / "run"
    lines = runs.train_on_ranks(script, stage, out, world, "--micro-seconds", micro_seconds, *flags)
    runs.assert_same_metrics(lines, runs.lines_of(whole / "metrics.jsonl"), 2e-6)
    runs.assert_same_gradient(runs.gradient_of(out), runs.gradient_of(whole))


@pytest.mark.slow
@runs.BOTH
def test_bf16_computes_in_bf16_and_trains_float32(script, stage, tmp_path):
    out = tmp_path / "run"
    lines = runs.train(script, stage, out, "--bf16", "--steps", 5, "--weight-decay", 0)
    first = runs.train(script, stage, tmp_path / "float32", "--weight-decay", 0)[0]["loss"]
    assert lines[0]["loss"] == pytest.approx(first, rel=0.02)
    assert lines[0]["loss"] != first
    start = runs.weights_of(stage / "student")
    end = runs.weights_of(out / "model")
    for name in start:
        assert end[name].dtype == torch.float32
        assert (end[name] - start[name]).abs().max() > 1e-4, name
        assert (end[name] != end[name].bfloat16().float()).any(), name  # a master weight, not a rounded one


# ---- rollouts ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_draws_depend_on_the_seed_the_step_and_the_clip(stage, tmp_path):
    """The same audio on two lines and weights that stand still: what differs is drawn."""
    line = runs.lines_of(stage / "m.jsonl")[0]  # whose rollout is long
    path = runs.write_lines(tmp_path / "m.jsonl", [line, line])

    def rollouts(name, *more):
        flags = ["--train", path, "--batch-size", 2, "--lr", 0, "--steps", 2, "--sample-every", 1]
        runs.train(opd, stage, tmp_path / name, *flags, *more)
        return [tuple(sample["kl"]) for sample in runs.lines_of(tmp_path / name / "samples.jsonl")]

    assert len(set(rollouts("greedy"))) == 1
    sampled = rollouts("sampled", "--temperature", 3.0)
    assert len(sampled) == len(set(sampled)) == 4
    assert not set(rollouts("seed", "--temperature", 3.0, "--seed", 1)) & set(sampled)


# ---- optimization ------------------------------------------------------------------------------------------


@runs.BOTH
def test_the_learning_rate_of_the_log_is_the_schedules_and_the_optimizers(script, stage, tmp_path):
    out = tmp_path / "run"
    flags = ["--steps", 4, "--warmup-steps", 2, "--lr", 2e-3, "--weight-decay", 0, "--save-every", 1]
    lines = runs.train(script, stage, out, *flags, "--keep", 4)
    assert [line["lr"] for line in lines] == pytest.approx([1e-3, 2e-3, 2e-3, 1e-3])
    # Adam's first update is the learning rate times the sign of the gradient.
    start = runs.weights_of(stage / "student")
    end = runs.weights_of(out / "step-1/model")
    largest = max((end[name] - start[name]).abs().max().item() for name in start)
    assert largest == pytest.approx(1e-3, rel=1e-3)


@runs.BOTH
def test_clip_reaches_the_gradient_norm(script, stage, finished, tmp_path):
    """The log has the norm before clipping."""
    line = runs.train(script, stage, tmp_path / "run", "--clip", 0.01, "--batch-size", 5)[0]
    gradient = runs.gradient_of(tmp_path / "run")
    norm = math.sqrt(sum(g.square().sum().item() for g in gradient.values()))
    assert norm == pytest.approx(0.01, rel=1e-4)
    unclipped = finished(script, "--batch-size", 5, "--clip", 0)
    assert line["grad_norm"] == runs.lines_of(unclipped / "metrics.jsonl")[0]["grad_norm"]


# ---- metrics -----------------------------------------------------------------------------------------------


@runs.BOTH
def test_silent_clips_are_used_and_counted(script, stage, tmp_path):
    lines = runs.lines_of(stage / "m.jsonl")[:3]
    soundfile.write(tmp_path / "silent.wav", torch.zeros(4800).numpy(), 16_000)
    lines.append({**lines[0], "audio": str(tmp_path / "silent.wav"), "duration": 0.3})
    path = runs.write_lines(tmp_path / "m.jsonl", lines)
    line = runs.train(script, stage, tmp_path / "run", "--train", path, "--batch-size", 4)[0]
    assert line["silent"] == 0.25
    assert line["skipped"] == 0


def section_of(text, title):
    """The section of a Markdown file with this title."""
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_metric_is_defined(stage, tmp_path):
    """Every key that a run writes stands in its section of docs/metrics.md, and no others in the tables."""
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    manifest = runs.write_lines(tmp_path / "m.jsonl", runs.lines_of(stage / "m.jsonl")[::4])
    keys = {}
    for script, flags in ((opd, ["--sample-every", 1]), (sft, CTC_AND_MASKS)):
        out = tmp_path / script.__name__
        lines = runs.train(script, stage, out, "--steps", 2, "--eval", manifest, "--eval-every", 1, *flags)
        assert "m/WER" in lines[0]  # the error of a set named m
        keys[script] = lines[0].keys() - {"m/WER"}
    table_key = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)
    section = section_of(text, "metrics.jsonl of opd.py")
    assert "| `vuss_1`, `vuss_2`, `vuss_4`, … |" in section and "STEM/METRIC" in section
    assert set(table_key.findall(section)) == keys[opd] - {"vuss_1", "vuss_2", "vuss_4"}

    section = section_of(text, "metrics.jsonl of sft.py")
    assert "STEM/METRIC" in section
    assert set(table_key.findall(section)) <= keys[sft] <= set(re.findall(r"`(\w+)`", section))

    section = section_of(text, "samples.jsonl")
    for key in runs.lines_of(tmp_path / "opd/samples.jsonl")[0]:
        assert f"`{key}`" in section, key


# ---- mistakes ----------------------------------------------------------------------------------------------


@runs.BOTH
@pytest.mark.parametrize("mistake", ["train", "model", "language", "speaker"])
def test_a_refused_run_leaves_no_folder_behind(script, mistake, stage, tmp_path, capsys):
    """One line, status 2, and no --out."""
    lines = runs.lines_of(stage / "m.jsonl")
    lines[0]["speaker"] = "anna"
    one_speaker = runs.write_lines(tmp_path / "one.jsonl", lines)
    flags, message = {
        "train": (["--train", "nowhere.jsonl"], "nowhere.jsonl"),
        "model": (["--student" if script is opd else "--model", "nowhere"], "nowhere"),
        "language": (["--language", "cn"], "'cn'"),
        "speaker": (["--eval", one_speaker], 'one.jsonl:2: no "speaker"'),
    }[mistake]
    assert runs.status_of(script, runs.argv_of(script, stage, tmp_path / "run", *flags)) == 2
    assert message in runs.error_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


# ---- Qwen3-ASR ---------------------------------------------------------------------------------------------


@runs.BOTH
def test_every_weight_of_qwen3_asr_trains(script, stage, tmp_path):
    student = qwen3_asr_folder(tmp_path / "student")
    teacher = qwen3_asr_folder(tmp_path / "teacher", seed=1, hidden=64)
    models = ["--student", student, "--teacher", teacher] if script is opd else ["--model", student]
    runs.train(script, stage, tmp_path / "run", *models, "--batch-size", 12, "--weight-decay", 0)
    end = runs.weights_of(tmp_path / "run/model")
    for name, start in runs.weights_of(student).items():
        assert (end[name] - start).abs().max() > 1e-5, name


# ---- bad audio ---------------------------------------------------------------------------------------------


def write_bad_clips(folder):
    """Six clips; with --batch-size 2 a batch has none that can be used, one has one, one has both. → manifest

    In the order of length, longest first: bad, bad, good, bad, good, good.
    """
    lines = []
    for i, is_bad in enumerate([True, True, False, True, False, False]):
        lines.append(runs.write_clip(folder / f"{i}.wav", 1.0 - 0.1 * i, seed=i))
        if is_bad:
            whole = (folder / f"{i}.wav").read_bytes()
            (folder / f"{i}.wav").write_bytes(whole[:2000])
    return runs.write_lines(folder / "bad.jsonl", lines)


@runs.BOTH
def test_bad_clips_are_left_out_counted_and_listed(script, stage, tmp_path):
    """A step without a usable clip on any rank changes no weight; two ranks do what one does."""
    path = write_bad_clips(tmp_path)
    flags = ["--train", path, "--batch-size", 2, "--steps", 3, "--lr", 1e-5, "--on-bad-audio", "skip"]
    flags += ["--save-every", 1, "--keep", 3, "--weight-decay", 1]
    one = tmp_path / "one"
    lines = runs.train(script, stage, one, *flags)
    assert json.loads((one / "summary.json").read_text())["skipped"] == 3

    # The first step holds the two longest clips, which are bad. What is a mean over clips or rows is absent.
    n_rows = "positions" if script is opd else "tokens"
    assert runs.timeless(lines)[0].keys() == {"step", "skipped", n_rows, "grad_norm", "lr"}
    assert [lines[0][key] for key in ("step", "skipped", n_rows, "grad_norm")] == [1, 2, 0, 0]
    assert runs.weight_bytes(one / "step-1/model") == runs.weight_bytes(stage / "student")
    assert runs.state_of(one, 1) == {}
    updates = [value for key, value in runs.state_of(one, 3).items() if key.startswith("step.")]
    assert updates and set(map(int, updates)) == {2}
    assert sorted(line["skipped"] for line in lines[1:]) == [0, 1]
    assert all(line["loss"] > 0 and line[n_rows] > 0 for line in lines[1:])

    listed = runs.lines_of(one / "bad.jsonl")
    assert sorted(line["clip"] for line in listed) == [f"{path}:{number}" for number in (1, 2, 4)]

    on_ranks = runs.train_on_ranks(script, stage, tmp_path / "two", 2, *flags)
    runs.assert_same_metrics(on_ranks, lines, 1e-5)
    assert sorted(map(str, runs.lines_of(tmp_path / "two/bad.jsonl"))) == sorted(map(str, listed))


@runs.BOTH
def test_a_bad_clip_ends_the_run_with_one_line_of_the_rank_that_meets_it(script, stage, tmp_path):
    """--on-bad-audio error, the default: status 2, and manifest, line, file and remedy."""
    lines = runs.lines_of(write_bad_clips(tmp_path))
    path = runs.write_lines(tmp_path / "one.jsonl", lines[2:])
    out = tmp_path / "run"
    argv = runs.argv_of(script, stage, out, "--train", path, "--batch-size", 4)
    results = runs.run_ranks(lambda: runs.status_of(script, argv), 2)
    assert results[1][0] == 2
    assert results[0][0] != 0
    line = runs.error_line(results[1][1])
    assert f"{path}:2: " in line and "3.wav" in line and "--on-bad-audio skip" in line
    assert not runs.lines_of(out / "metrics.jsonl")
    assert not (out / "model").exists()


def test_a_bad_evaluation_clip_ends_the_run_once_rank_0_has_named_it(stage, tmp_path):
    lines = runs.lines_of(stage / "m.jsonl")[:3]
    lines[1]["audio"] = "none.wav"
    path = runs.write_lines(tmp_path / "e.jsonl", lines)
    argv = runs.argv_of(opd, stage, tmp_path / "run", "--eval", path)
    results = runs.run_ranks(lambda: runs.status_of(opd, argv), 2)
    assert [status for status, _ in results] == [2, 2], results
    text = results[0][1]
    assert f"not decoded: {path}:2: " in text and "--eval: 1 clip(s) not decoded, named above" in text
    assert "error" in runs.lines_of(tmp_path / "run/eval-0/e.jsonl")[1]


# ---- numbers that are not finite ---------------------------------------------------------------------------


@runs.BOTH
def test_a_gradient_that_is_not_finite_stops_all_ranks(script, stage, tmp_path, monkeypatch):
    """NaN on one rank at step 2. Status 3; each rank lists its clips, and no weight has been saved."""
    out = tmp_path / "run"
    sum_gradients = model.sum_gradients

    def poison(trained):
        if os.environ["RANK"] == "1" and (out / "step-1").exists():
            next(iter(trained.values())).grad[0] = math.nan
        sum_gradients(trained)

    monkeypatch.setattr(model, "sum_gradients", poison)
    argv = runs.argv_of(script, stage, out, "--steps", 3, "--batch-size", 12, "--save-every", 1)
    results = runs.run_ranks(lambda: runs.status_of(script, argv), 2)
    assert [status for status, _ in results] == [3, 3], results
    line = runs.error_line(results[0][1])
    assert "step 2: " in line and "nonfinite-2-0.jsonl" in line and "--lr" in line
    listed = [runs.lines_of(out / f"nonfinite-2-{rank}.jsonl") for rank in range(2)]
    assert [len(entries) for entries in listed] == [6, 6]
    clips = sorted(entry["clip"] for entry in listed[0] + listed[1])
    assert clips == sorted(clip.where for clip in data.read_manifest(stage / "m.jsonl"))
    assert [path.name for path in out.glob("step-*")] == ["step-1"]
    assert not (out / "model").exists()
