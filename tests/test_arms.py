"""The controlled arms of opd.py: each step by its definition; arms differ in nothing but their flags."""

import shutil

import numpy as np
import pytest
import runs
import torch
from conftest import byte_tokenizer, qwen3_asr_folder, tiny_model

import data
import model
import opd

ARMS = {
    "opd": [],
    "offline-kl": ["--states", "reference"],
    "teacher-kl": ["--states", "teacher"],
    "ce-reference": ["--states", "reference", "--objective", "ce"],
    "ce-teacher": ["--states", "teacher", "--objective", "ce"],
}
on_cpu = pytest.fixture(autouse=True, scope="module")(runs.run_on_cpu)


# ---- a step by its definition ------------------------------------------------------------------------------

STEPS = {
    "opd": {},
    "τ": {"tau": 2.0},
    "offline-kl": {"states": "reference"},
    "teacher-kl": {"states": "teacher"},
    "ce-reference": {"states": "reference", "objective": "ce"},
    "ce-teacher": {"states": "teacher", "objective": "ce"},
    "support of the teacher": {"support": "teacher"},
    "intersection": {"support": "intersection", "tau": 2.0, "k": 24},  # in some rows of no or one id
    "reverse": {"divergence": "reverse", "tau": 2.0},
    "jsd": {"divergence": "jsd", "beta": 0.3},
    "full, reverse": {"support": "full", "divergence": "reverse"},
    "full, jsd, offline": {"support": "full", "divergence": "jsd", "beta": 0.7, "states": "reference"},
}
QUICK_STEPS = ["opd", "teacher-kl", "ce-reference", "intersection", "full, jsd, offline"]


@pytest.mark.parametrize(
    "name", [name if name in QUICK_STEPS else pytest.param(name, marks=pytest.mark.slow) for name in STEPS]
)
def test_a_step_is_its_definition(name, stage, tmp_path):
    """Gradient, metrics and samples; the teacher has other ids for the same tokens.

    In the log, `kl` and the measures of overlap are on the union at τ = 1, whatever the loss is.
    """
    out = tmp_path / "run"
    flags = ["--batch-size", 5, "--clip", 0]
    for flag, value in STEPS[name].items():
        flags += [f"--{flag}", value]
    line = runs.train(opd, stage, out, *flags)[0]
    metrics, gradient, samples = runs.opd_step(stage, 5, **STEPS[name])
    n_rows = sum(len(sample["kl"]) for sample in samples)
    assert (0 < metrics["positions"] < n_rows) == (name == "intersection")
    assert {key: line[key] for key in metrics} == pytest.approx(metrics, rel=1e-5)
    assert (line["loss"] == line["kl"]) == (name in ("opd", "offline-kl", "teacher-kl"))
    runs.assert_same_gradient(runs.gradient_of(out), gradient, 1e-5)
    if name == "opd":  # all kinds of rollouts are in it
        assert 0 < metrics["empty"] < 1
        assert 0 < metrics["capped"] < 1

    lines = runs.lines_of(out / "samples.jsonl")
    for line, clip, sample in zip(lines, runs.longest_clips(stage, 2), samples[:2], strict=True):
        assert line["step"] == 1
        assert line["clip"] == clip.where
        assert line["ref"] == clip.text
        assert {key: line[key] for key in ("transcript", "teacher", "stopped")}.items() <= sample.items()
        assert line["kl"] == pytest.approx(sample["kl"], abs=1e-4)
        assert len(line["tokens"]) == len(line["kl"]) == sample["n_tokens"] + sample["stopped"]
        assert (line["tokens"][-1] == "<|im_end|>") == sample["stopped"]


def test_rows_whose_support_is_one_id_do_not_count(stage, tmp_path):
    """k = 1 and a teacher that mostly agrees: `loss` and `kl` are means over the rows where they differ."""
    near = model.SpeechLM.from_pretrained(stage / "student")
    torch.manual_seed(0)
    for parameter in near.parameters():
        parameter.data += 0.06 * torch.randn(parameter.shape)
    near.save_pretrained(tmp_path / "near")
    flags = ["--teacher", tmp_path / "near", "--k", 1, "--batch-size", 12, "--clip", 0]
    line = runs.train(opd, stage, tmp_path / "run", *flags)[0]
    metrics, gradient, _ = runs.opd_step(stage, 12, k=1, teacher=tmp_path / "near")
    assert 0.2 < metrics["top1"] < 0.8
    assert {key: line[key] for key in metrics} == pytest.approx(metrics, rel=1e-5)
    runs.assert_same_gradient(runs.gradient_of(tmp_path / "run"), gradient, 1e-5)


def test_a_teachers_transcript_that_a_cap_cut_has_no_stop_row(stage, tmp_path):
    """The cap is ⌊seconds · --tokens-per-second⌋ + 16 where that is less than --max-new-tokens."""
    flags = [*ARMS["ce-teacher"], "--max-new-tokens", 64, "--tokens-per-second", 0.1]
    line = runs.train(opd, stage, tmp_path / "run", *flags)[0]
    assert line["capped"] == 1
    assert line["mean_tokens"] == 16
    assert line["positions"] == 16 * 6


# ---- arms differ in nothing but the objective --------------------------------------------------------------


def test_arms_see_the_same_clips_prompts_and_draws(stage, tmp_path, monkeypatch):
    """In every micro-batch, to the last bit; the learning rates are the same too."""
    step_batches = data.step_batches
    seen = []

    def seen_batches(*args):
        for step, micro_batches, bad in step_batches(*args):
            for batch_clips, batch, teacher_batch, uniforms in micro_batches:
                tensors = [batch.mel, batch.prompt_ids, teacher_batch.mel, teacher_batch.prompt_ids, uniforms]
                seen.append([clip.where for clip in batch_clips])
                seen.append([tensor.double().sum().item() for tensor in tensors])
            yield step, micro_batches, bad

    monkeypatch.setattr(data, "step_batches", seen_batches)
    inputs = []
    losses = set()
    for arm, flags in ARMS.items():
        seen.clear()
        lines = runs.train(opd, stage, tmp_path / arm, "--steps", 2, "--micro-seconds", 2, *flags)
        inputs.append([*seen, *[line["lr"] for line in lines]])
        losses.add(lines[0]["loss"])
    assert len(seen) > 4
    assert len(losses) == 5
    assert all(arm_inputs == inputs[0] for arm_inputs in inputs)


@pytest.mark.slow
def test_a_share_of_the_steps_takes_the_students_states(stage, tmp_path):
    """GKD's mixture: each step is one of opd or of the arm itself, by its draw."""
    steps = ["--steps", 6, "--lr", 0]
    student = runs.timeless(runs.train(opd, stage, tmp_path / "opd", *steps))
    reference = runs.timeless(runs.train(opd, stage, tmp_path / "reference", *ARMS["offline-kl"], *steps))
    flags = [*ARMS["offline-kl"], "--student-share", 0.5, *steps]
    mixed = runs.timeless(runs.train(opd, stage, tmp_path / "mixed", *flags))
    draws = [np.random.default_rng((0, 4, step, 0)).random() < 0.5 for step in range(6)]
    assert 0 < sum(draws) < 6
    for step, is_student in enumerate(draws):
        assert mixed[step] == (student if is_student else reference)[step]
        assert student[step] != reference[step]


# ---- flags -------------------------------------------------------------------------------------------------

REFUSED = {
    "--objective ce": "--objective ce",
    "--student-share 0.5": "--student-share",
    "--divergence reverse --beta 0.5": "--beta",
    "--divergence jsd --beta 0": "its ends are reverse and forward",
    "--k 1 --support intersection": "--k 1",
    "--lora-rank 4 --train-parts encoder": "--train-parts",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_flags_without_meaning_are_refused(flags, capsys):
    argv = ["--student", "s", "--teacher", "t", "--train", "m.jsonl", *flags.split()]
    with pytest.raises(SystemExit) as stop:
        opd.parse_args(argv)
    assert stop.value.code == 2
    assert REFUSED[flags] in runs.error_line(capsys.readouterr().err)


# ---- parts that train --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts, kind", [("encoder", "tied"), ("lm", "tied"), ("lm", "untied"), ("adapter", "qwen3_asr")]
)
def test_parts_that_do_not_train_stay_bit_for_bit(parts, kind, stage, tmp_path):
    student = tmp_path / "student"
    teacher = stage / "teacher"
    if kind == "qwen3_asr":
        qwen3_asr_folder(student)
        teacher = qwen3_asr_folder(tmp_path / "teacher", seed=1)
    else:
        tiny_model(2, tied=kind == "tied", spread=0.1).save_pretrained(student)
    flags = ["--student", student, "--teacher", teacher, "--support", "full", "--batch-size", 12]
    runs.train(opd, stage, tmp_path / "run", *flags, "--train-parts", parts)
    start = runs.weights_of(student)
    end = runs.weights_of(tmp_path / "run/model")
    prefixes = {
        "encoder": ("model.audio_tower.",),
        "adapter": ("model.multi_modal_projector.",),
        "lm": ("model.language_model.", "lm_head."),
    }
    trained = {name for name in start if name.startswith(prefixes[parts])}
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved <= trained
    assert len(moved) > 0.9 * len(trained)


# ---- references that cannot be used ------------------------------------------------------------------------


def test_a_reference_that_the_teacher_cannot_write_is_a_bad_clip(stage, tmp_path, capsys):
    """A teacher without the token z, and a z in the text of one clip."""
    shutil.copytree(stage / "teacher", tmp_path / "teacher")
    runs.with_other_ids(byte_tokenizer(), missing="z").save_pretrained(tmp_path / "teacher")
    lines = runs.lines_of(stage / "m.jsonl")
    lines[3]["text"] = "a zebra here"
    path = runs.write_lines(tmp_path / "m.jsonl", lines)
    flags = ["--teacher", tmp_path / "teacher", "--train", path, "--batch-size", 12, *ARMS["offline-kl"]]
    assert runs.status_of(opd, runs.argv_of(opd, stage, tmp_path / "stops", *flags)) == 2
    line = runs.error_line(capsys.readouterr().err)
    assert "m.jsonl:4" in line and "'z'" in line
    assert "--on-bad-audio skip" in line

    metrics = runs.train(opd, stage, tmp_path / "run", *flags, "--on-bad-audio", "skip")[0]
    assert metrics["skipped"] == 1
    assert [line["clip"] for line in runs.lines_of(tmp_path / "run/bad.jsonl")] == [f"{path}:4"]
