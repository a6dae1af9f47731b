"""The controlled arms of opd.py: each step by its definition; arms differ in nothing but their flags."""

import json
import shutil

import numpy as np
import pytest
import runs
import torch
from conftest import qwen3_asr_folder, tiny_model

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


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return runs.write_stage(tmp_path_factory.mktemp("stage"))


# ---- a step by its definition ------------------------------------------------------------------------------

STEPS = {
    "τ": {"tau": 2.0},
    "offline-kl": {"states": "reference"},
    "teacher-kl": {"states": "teacher"},
    "ce-reference": {"states": "reference", "objective": "ce"},
    "ce-teacher": {"states": "teacher", "objective": "ce"},
    "support of the teacher": {"support": "teacher"},
    "support of the student": {"support": "student"},
    "intersection": {"support": "intersection", "tau": 2.0, "k": 24},  # in some rows of no or one id
    "reverse": {"divergence": "reverse", "tau": 2.0},
    "jsd": {"divergence": "jsd", "beta": 0.3},
    "full, reverse": {"support": "full", "divergence": "reverse"},
    "full, jsd, offline": {"support": "full", "divergence": "jsd", "beta": 0.7, "states": "reference"},
}
QUICK_STEPS = ["teacher-kl", "ce-reference", "intersection", "full, jsd, offline"]


@pytest.mark.parametrize(
    "name", [name if name in QUICK_STEPS else pytest.param(name, marks=pytest.mark.slow) for name in STEPS]
)
def test_a_step_of_an_arm_is_its_definition(name, stage, tmp_path):
    """In the log, `kl` and the measures of overlap are on the union at τ = 1, whatever the loss is."""
    flags = ["--batch-size", 5, "--clip", 0]
    for flag, value in STEPS[name].items():
        flags += [f"--{flag}", value]
    line = runs.train(opd, stage, tmp_path / "run", *flags)[0]
    metrics, gradient, samples = runs.opd_step(stage, 5, **STEPS[name])
    n_rows = sum(len(sample["kl"]) for sample in samples)
    assert (0 < metrics["positions"] < n_rows) == (name == "intersection")
    assert {key: line[key] for key in metrics} == pytest.approx(metrics, rel=1e-5)
    assert line["loss"] != line["kl"] or name in ("offline-kl", "teacher-kl")
    runs.assert_same_gradient(runs.gradient_of(tmp_path / "run"), gradient, 1e-5)


def test_rows_whose_support_is_one_id_do_not_count(stage, tmp_path):
    """k = 1 and a teacher that mostly agrees: `loss` and `kl` are means over the rows where they differ."""
    near = model.SpeechLM.from_pretrained(stage / "student")
    torch.manual_seed(0)
    for parameter in near.parameters():
        parameter.data += 0.06 * torch.randn(parameter.shape)
    shutil.copytree(stage, tmp_path / "stage")
    near.save_pretrained(tmp_path / "stage/teacher")
    flags = ["--k", 1, "--batch-size", 12, "--clip", 0]
    line = runs.train(opd, tmp_path / "stage", tmp_path / "run", *flags)[0]
    metrics, gradient, _ = runs.opd_step(tmp_path / "stage", 12, k=1)
    assert 0.2 < metrics["top1"] < 0.8
    assert {key: line[key] for key in metrics} == pytest.approx(metrics, rel=1e-5)
    runs.assert_same_gradient(runs.gradient_of(tmp_path / "run"), gradient, 1e-5)


def test_a_teachers_transcript_that_the_cap_cut_has_no_stop_row(stage, tmp_path):
    line = runs.train(opd, stage, tmp_path / "run", *ARMS["ce-teacher"], "--max-new-tokens", 3)[0]
    assert line["capped"] == 1 and line["mean_tokens"] == 3
    assert line["positions"] == 3 * 6


# ---- arms differ in nothing but the objective --------------------------------------------------------------


def test_arms_see_the_same_clips_and_differ_in_their_flag_only(stage, tmp_path, monkeypatch):
    """Clips, features and prompts of every micro-batch, learning rates and weight decay, to the last bit."""
    step_batches = data.step_batches
    make_optimizer = model.make_optimizer
    seen = []

    def seen_batches(*args):
        for step, micro_batches, bad in step_batches(*args):
            for batch_clips, batch, teacher_batch, uniforms, _ in micro_batches:
                tensors = [batch.mel, batch.prompt_ids, teacher_batch.mel, teacher_batch.prompt_ids, uniforms]
                sums = [tensor.double().sum().item() for tensor in tensors]
                seen.append((step, [clip.where for clip in batch_clips], sums))
            yield step, micro_batches, bad

    def seen_optimizer(trained, *args):
        optimizer = make_optimizer(trained, *args)
        for group in optimizer.param_groups:
            seen.append((group["weight_decay"], group["betas"], len(group["params"])))
        seen.append(list(trained))
        return optimizer

    monkeypatch.setattr(data, "step_batches", seen_batches)
    monkeypatch.setattr(model, "make_optimizer", seen_optimizer)
    inputs = {}
    args = {}
    losses = {}
    for arm, flags in ARMS.items():
        seen.clear()
        out = tmp_path / arm
        lines = runs.train(opd, stage, out, "--steps", 2, "--batch-size", 6, "--micro-seconds", 2, *flags)
        config = json.loads((out / "config.json").read_text())
        args[arm] = config.pop("args")
        inputs[arm] = (seen.copy(), [line["lr"] for line in lines], config)
        losses[arm] = lines[0]["loss"]
    assert len(inputs["opd"][0]) > 6 and len(set(losses.values())) == 5
    for arm in ARMS:
        assert inputs[arm] == inputs["opd"]
        differing = {key for key in args[arm] if args[arm][key] != args["opd"][key]}
        assert differing <= {"out", "states", "objective"}


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
    "--states reference --objective ce --student-share 0.5": "--student-share",
    "--states reference --student-share 1.5": "--student-share",
    "--divergence reverse --beta 0.5": "--beta",
    "--divergence jsd --beta 0": "its ends are reverse and forward",
    "--divergence jsd --beta 1": "its ends are reverse and forward",
    "--divergence jsd --beta nan": "its ends are reverse and forward",
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
    "parts, kind",
    [("encoder", "tied"), ("lm", "tied"), ("lm", "untied"), ("adapter", "qwen3_asr")],
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
    assert moved <= trained and len(moved) > 0.9 * len(trained)
    state = runs.state_of(tmp_path / "run", 1)
    moments = {key.removeprefix("exp_avg.") for key in state if key.startswith("exp_avg.")}
    assert moments == trained


# ---- references that cannot be used ------------------------------------------------------------------------


def test_a_reference_that_the_teacher_cannot_write_is_a_bad_clip(stage, tmp_path, capsys):
    """A teacher without the token z, and a z in the text of one clip."""
    teacher = model.SpeechLM.from_pretrained(stage / "teacher")
    teacher.save_pretrained(tmp_path / "teacher")
    path = tmp_path / "teacher/tokenizer.json"
    state = json.loads(path.read_text())
    state["model"]["vocab"]["not z"] = state["model"]["vocab"].pop("z")
    path.write_text(json.dumps(state))
    lines = runs.lines_of(stage / "m.jsonl")
    lines[3]["text"] = "a zebra here"
    path = runs.write_lines(tmp_path / "m.jsonl", lines)
    flags = ["--teacher", tmp_path / "teacher", "--train", path, "--batch-size", 12, *ARMS["offline-kl"]]
    assert runs.status_of(opd, runs.argv_of(opd, stage, tmp_path / "stops", *flags)) == 2
    line = runs.error_line(capsys.readouterr().err)
    assert "m.jsonl:4" in line and "'z'" in line and "--on-bad-audio skip" in line

    metrics = runs.train(opd, stage, tmp_path / "run", *flags, "--on-bad-audio", "skip")[0]
    assert metrics["skipped"] == 1
    assert [line["clip"] for line in runs.lines_of(tmp_path / "run/bad.jsonl")] == [f"{path}:4"]
    n_tokens = [len(line["text"].encode()) for line in lines if "zebra" not in line["text"]]
    assert metrics["mean_tokens"] == pytest.approx(runs.mean(n_tokens))
    assert metrics["positions"] == sum(n_tokens) + len(n_tokens)
    runs.train(opd, stage, tmp_path / "opd", *flags[:6])  # the student never reads the text
