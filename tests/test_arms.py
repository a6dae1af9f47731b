"""The controlled arms of opd.py: each step by its definition; arms differ in nothing but their flags."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import qwen3_asr_folder, tiny_model
from runs import (
    argv_of,
    assert_same_gradient,
    assert_same_metrics,
    error_line,
    gradient_of,
    lines_of,
    mean,
    run_on_cpu,
    state_of,
    status_of,
    timeless,
    train,
    train_on_ranks,
    weights_of,
    write_lines,
    write_stage,
)

import data
import model
import opd
import sft
from data import collate, load_audio, read_manifest
from model import PARTS, SpeechLM, narrow_support, support_kl, trained_parameters, union_support

ARMS = {
    "opd": [],
    "offline-kl": ["--states", "reference"],
    "teacher-kl": ["--states", "teacher"],
    "ce-reference": ["--states", "reference", "--objective", "ce"],
    "ce-teacher": ["--states", "teacher", "--objective", "ce"],
}


@pytest.fixture(autouse=True, scope="module")
def on_cpu():
    yield from run_on_cpu()


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return write_stage(tmp_path_factory.mktemp("stage"))


# ---- a step by its definition ------------------------------------------------------------------------------


def divergence_of(kind, p, q, beta):
    """The three divergences of two distributions, as the method writes them."""
    if kind == "forward":
        return (p * (p.log() - q.log())).sum()
    if kind == "reverse":
        return (q * (q.log() - p.log())).sum()
    m = beta * p + (1 - beta) * q
    return beta * (p * (p.log() - m.log())).sum() + (1 - beta) * (q * (q.log() - m.log())).sum()


def support_of(kind, student_ids, teacher_ids, allowed):
    """The ids of a support, from the two top-k as Python lists."""
    supports = {
        "union": set(student_ids) | set(teacher_ids),
        "teacher": set(teacher_ids),
        "student": set(student_ids),
        "intersection": set(student_ids) & set(teacher_ids),
        "full": set(allowed),
    }
    return sorted(supports[kind])


def arm_step(
    stage,
    n,
    states="student",
    objective="kl",
    support="union",
    divergence="forward",
    beta=0.5,
    tau=1.0,
    k=8,
    cap=12,
):
    """One step on the n longest clips, clip by clip and row by row, from all logits. → loss, |𝒯|, gradient"""
    student = SpeechLM.from_pretrained(stage / "student").train()
    teacher = SpeechLM.from_pretrained(stage / "teacher").eval()
    allowed = (~student.forbidden).nonzero()[:, 0].tolist()
    clips = sorted(read_manifest(stage / "m.jsonl"), key=lambda clip: -clip.duration)[:n]
    losses = []
    for clip in clips:
        batch = collate([load_audio(clip)], student.front_end, [clip.language])
        if states == "reference":
            transcript = student.front_end.transcripts([clip.text])
        else:
            writer = student if states == "student" else teacher
            transcript = writer.sample(batch, cap)  # the stage's models share their token ids
        student_logits = student.head(student(batch, transcript))
        teacher_logits = teacher.head(teacher(batch, transcript)).detach()
        tokens = transcript.ids[transcript.row_mask()]
        for z_student, z_teacher, token in zip(student_logits, teacher_logits, tokens):
            if objective == "ce":
                losses.append(-z_student.log_softmax(dim=0)[token])
                continue
            tops = []
            for z in (z_student, z_teacher):
                tops.append(z.masked_fill(student.forbidden, -math.inf).topk(k).indices.tolist())
            ids = support_of(support, *tops, allowed)
            if len(ids) < 2:
                continue
            p = (z_teacher[ids] / tau).softmax(dim=0)
            q = (z_student[ids] / tau).softmax(dim=0)
            losses.append(tau**2 * divergence_of(divergence, p, q, beta))
    loss = sum(losses) / len(losses)
    loss.backward()
    gradient = {name: parameter.grad for name, parameter in student.named_parameters()}
    return loss.item(), len(losses), gradient


STEPS = {
    "offline-kl": {"states": "reference"},
    "teacher-kl": {"states": "teacher"},
    "ce-reference": {"states": "reference", "objective": "ce"},
    "ce-teacher": {"states": "teacher", "objective": "ce"},
    "support of the teacher": {"support": "teacher"},
    "support of the student": {"support": "student"},
    "intersection": {"support": "intersection", "tau": 2.0},
    "reverse": {"divergence": "reverse", "tau": 2.0},
    "jsd": {"divergence": "jsd", "beta": 0.3},
    "full, reverse": {"support": "full", "divergence": "reverse"},
    "full, jsd, offline": {"support": "full", "divergence": "jsd", "beta": 0.7, "states": "reference"},
}


SLOW_STEPS = ["teacher-kl", "ce-teacher", "support of the student", "reverse", "jsd", "full, reverse"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_STEPS else name for name in STEPS]
)
def test_a_step_of_an_arm_is_its_definition(name, stage, tmp_path):
    settings = STEPS[name]
    flags = ["--batch-size", 5, "--clip", 0]
    for flag, value in settings.items():
        flags += [f"--{flag}", value]
    line = train(opd, stage, tmp_path / "run", *flags)[0]
    loss, n_counted, gradient = arm_step(stage, 5, **settings)
    assert line["loss"] == pytest.approx(loss, rel=1e-5)
    assert line["positions"] == n_counted
    assert_same_gradient(gradient_of(tmp_path / "run"), gradient, 1e-5)


def test_kl_and_vuss_of_the_log_are_on_the_union_whatever_the_loss(stage, tmp_path):
    """Along the same transcripts, arms log the same agreement at their first step."""
    lines = {}
    for name in ("offline-kl", "ce-reference"):
        lines[name] = train(opd, stage, tmp_path / name, *ARMS[name])[0]
    narrow = ["--support", "intersection", "--divergence", "reverse", "--tau", 2]
    lines["narrow"] = train(opd, stage, tmp_path / "narrow", *ARMS["offline-kl"], *narrow)[0]
    keys = ["kl", "vuss", "vuss_1", "vuss_2", "vuss_4", "n_student", "n_teacher", "overlap_ratio", "top1"]
    for line in lines.values():
        assert [line[key] for key in keys] == [lines["offline-kl"][key] for key in keys]
    assert lines["offline-kl"]["loss"] == lines["offline-kl"]["kl"]
    assert len({line["loss"] for line in lines.values()}) == 3


def test_a_teachers_transcript_that_the_cap_cut_has_no_stop_row(stage, tmp_path):
    line = train(opd, stage, tmp_path / "run", *ARMS["ce-teacher"], "--max-new-tokens", 3)[0]
    assert line["capped"] == 1 and line["mean_tokens"] == 3
    assert line["positions"] == 3 * 6


def test_more_supervised_training_is_sft(stage, tmp_path):
    """The arm ce-reference and sft.py take the same step."""
    flags = ["--batch-size", 5, "--clip", 0]
    arm = train(opd, stage, tmp_path / "arm", *ARMS["ce-reference"], *flags)[0]
    supervised = train(sft, stage, tmp_path / "sft", *flags)[0]
    assert arm["loss"] == pytest.approx(supervised["loss"], rel=1e-6)
    assert_same_gradient(gradient_of(tmp_path / "arm"), gradient_of(tmp_path / "sft"))


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["offline-kl", "ce-teacher"])
def test_no_cut_changes_a_step_of_an_arm(arm, stage, tmp_path):
    flags = ["--batch-size", 5, "--clip", 0, *ARMS[arm]]
    whole = train(opd, stage, tmp_path / "whole", *flags)
    lines = train_on_ranks(opd, stage, tmp_path / "cut", 2, "--micro-seconds", 0.1, *flags)
    assert_same_metrics(lines, whole, 2e-6)
    assert_same_gradient(gradient_of(tmp_path / "cut"), gradient_of(tmp_path / "whole"))


# ---- arms differ in nothing but the objective --------------------------------------------------------------


def test_arms_see_the_same_clips_and_differ_in_their_flag_only(stage, tmp_path, monkeypatch):
    """Clips, features and prompts of every micro-batch, learning rates and weight decay, to the last bit."""
    seen = {}

    def record(arm):
        def step_batches(*args):
            for step, micro_batches, bad in original(*args):
                for batch_clips, batch, teacher_batch, uniforms, _ in micro_batches:
                    tensors = [batch.mel, batch.prompt_ids, teacher_batch.mel, teacher_batch.prompt_ids]
                    tensors.append(uniforms)
                    sums = [tensor.double().sum().item() for tensor in tensors]
                    seen[arm].append((step, [clip.where for clip in batch_clips], sums))
                yield step, micro_batches, bad

        return step_batches

    def make_optimizer(*args):
        optimizer = original_optimizer(*args)
        groups = [
            (group["weight_decay"], group["betas"], len(group["params"])) for group in optimizer.param_groups
        ]
        seen[arm].append((groups, list(args[0])))
        return optimizer

    original = data.step_batches
    original_optimizer = model.make_optimizer
    monkeypatch.setattr(model, "make_optimizer", make_optimizer)
    rates = {}
    configs = {}
    starts = {}
    for arm, flags in ARMS.items():
        seen[arm] = []
        monkeypatch.setattr(data, "step_batches", record(arm))
        out = tmp_path / arm
        lines = train(opd, stage, out, "--steps", 2, "--batch-size", 6, "--micro-seconds", 2, *flags)
        rates[arm] = [line["lr"] for line in lines]
        configs[arm] = json.loads((out / "config.json").read_text())
        starts[arm] = lines[0]["loss"]
    assert len(seen["opd"]) > 4
    for arm in ARMS:
        assert seen[arm] == seen["opd"]
        assert rates[arm] == rates["opd"]
        own = configs[arm].pop("args")
        plain = configs["opd"].get("args", own)
        differing = {key for key in own if own[key] != plain[key]}
        assert differing <= {"out", "states", "objective"}
        assert configs[arm] == {key: value for key, value in configs["opd"].items() if key != "args"}
        configs[arm]["args"] = own
    assert len(set(starts.values())) == 5


@pytest.mark.slow
def test_only_reference_states_read_the_text(stage, tmp_path, capsys):
    lines = [{key: x for key, x in line.items() if key != "text"} for line in lines_of(stage / "m.jsonl")]
    path = write_lines(tmp_path / "m.jsonl", lines)
    for arm in ("opd", "teacher-kl", "ce-teacher"):
        train(opd, stage, tmp_path / arm, "--train", path, *ARMS[arm])
    for arm in ("offline-kl", "ce-reference"):
        argv = argv_of(opd, stage, tmp_path / arm, "--train", path, *ARMS[arm])
        assert status_of(opd, argv) == 2
        assert 'm.jsonl:1: no "text"' in error_line(capsys.readouterr().err)


REFUSED = {
    "--objective ce": "--objective ce",
    "--student-share 0.5": "--student-share",
    "--states reference --objective ce --student-share 0.5": "--student-share",
    "--states reference --student-share 1.5": "--student-share",
    "--beta 0.5": "--beta",
    "--divergence reverse --beta 0.5": "--beta",
    "--divergence jsd --beta 0": "its ends are reverse and forward",
    "--divergence jsd --beta 1": "its ends are reverse and forward",
    "--divergence jsd --beta nan": "its ends are reverse and forward",
    "--k 1 --support intersection": "--k 1",
    "--train-parts head": "--train-parts",
    "--support all": "--support",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_combinations_without_meaning_are_refused(flags, capsys):
    argv = ["--student", "s", "--teacher", "t", "--train", "m.jsonl", *flags.split()]
    with pytest.raises(SystemExit) as stop:
        opd.parse_args(argv)
    assert stop.value.code == 2
    assert REFUSED[flags] in error_line(capsys.readouterr().err)


# ---- GKD's mixture -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_share_of_the_steps_takes_the_students_states(stage, tmp_path):
    """A share of 1 is opd, one of 0 the arm itself; in between each step is one of the two, by its draw."""
    steps = ["--steps", 6, "--lr", 0]
    share = [*ARMS["offline-kl"], "--student-share"]
    student = timeless(train(opd, stage, tmp_path / "opd", *steps))
    reference = timeless(train(opd, stage, tmp_path / "reference", *ARMS["offline-kl"], *steps))
    assert timeless(train(opd, stage, tmp_path / "1", *share, 1, *steps)) == student
    assert timeless(train(opd, stage, tmp_path / "0", *share, 0, *steps)) == reference
    mixed = timeless(train(opd, stage, tmp_path / "mixed", *share, 0.5, *steps, "--seed", 0))
    draws = [np.random.default_rng((0, 4, step, 0)).random() < 0.5 for step in range(6)]
    assert 0 < sum(draws) < 6
    for step, is_student in enumerate(draws):
        assert mixed[step] == (student if is_student else reference)[step]
        assert student[step] != reference[step]


# ---- parts that train --------------------------------------------------------------------------------------

PART_NAMES = {
    "encoder": ("model.audio_tower.",),
    "adapter": ("model.multi_modal_projector.",),
    "lm": ("model.language_model.", "lm_head."),
}


@pytest.mark.parametrize(
    "parts, kind",
    [
        ("encoder", "tied"),
        ("lm", "tied"),
        ("lm", "untied"),
        ("adapter", "qwen3_asr"),
        ("encoder adapter", "tied"),
    ],
)
def test_parts_that_do_not_train_stay_bit_for_bit(parts, kind, stage, tmp_path):
    folder = tmp_path / "student"
    teacher = stage / "teacher"
    if kind == "qwen3_asr":
        qwen3_asr_folder(folder)
        teacher = qwen3_asr_folder(tmp_path / "teacher", seed=1)
    else:
        tiny_model(2, tied=kind == "tied", spread=0.1).save_pretrained(folder)
    out = tmp_path / "run"
    flags = ["--student", folder, "--teacher", teacher, "--support", "full", "--batch-size", 12]
    train(opd, stage, out, *flags, "--train-parts", *parts.split())
    start = weights_of(folder)
    end = weights_of(out / "model")
    prefixes = sum((PART_NAMES[part] for part in parts.split()), ())
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    trained = {name for name in start if name.startswith(prefixes)}
    assert moved <= trained and len(moved) > 0.9 * len(trained)
    moments = {key.removeprefix("exp_avg.") for key in state_of(out, 1) if key.startswith("exp_avg.")}
    assert moments == trained


def test_all_parts_are_the_default_and_what_is_frozen_stays_so():
    model = tiny_model(0)
    every = [name for name, _ in model.named_parameters()]
    assert list(trained_parameters(model)) == every
    prefixes = sum(PARTS.values(), ())
    assert all(name.startswith(prefixes) for name in every)
    model.encoder.conv1.weight.requires_grad_(False)
    assert set(every) - set(trained_parameters(model)) == {"model.audio_tower.conv1.weight"}


# ---- supports and divergences ------------------------------------------------------------------------------


def random_topk(n, k, vocab_size, generator):
    """(n, k) ids that are distinct in a row, of which some at the end are invalid."""
    ids = torch.rand(n, vocab_size, generator=generator).argsort(dim=1)[:, :k]
    n_valid = torch.randint(0, k + 1, (n, 1), generator=generator)
    return ids.masked_fill(torch.arange(k) >= n_valid, -1)


@pytest.mark.parametrize("kind", ["union", "teacher", "student", "intersection"])
def test_supports_against_sets(kind):
    generator = torch.Generator().manual_seed(3)
    student_topk = random_topk(200, 6, 12, generator)
    teacher_topk = random_topk(200, 6, 12, generator)
    ids, union = union_support(student_topk, teacher_topk)
    mask = narrow_support(kind, ids, union, student_topk, teacher_topk)
    for row in range(200):
        student_ids = set(student_topk[row].tolist()) - {-1}
        teacher_ids = set(teacher_topk[row].tolist()) - {-1}
        expected = support_of(kind, student_ids, teacher_ids, [])
        assert ids[row][mask[row]].tolist() == expected


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_divergences_and_their_gradients_against_brute_force(divergence, beta):
    """In float64, on random supports, at τ = 1.7; the gradient by plain autograd on the support alone."""
    generator = torch.Generator().manual_seed(4)
    n, U, tau = 100, 9, 1.7
    student = 3 * torch.randn(n, U, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(n, U, generator=generator, dtype=torch.float64)
    mask = torch.rand(n, U, generator=generator) < 0.4
    student.requires_grad_()
    values, counted = support_kl(student, teacher, mask, tau, divergence, beta)
    values.sum().backward()
    assert 0 < counted.sum() < n
    for row in range(n):
        inside = mask[row]
        expected_gradient = torch.zeros(U, dtype=torch.float64)
        expected = torch.zeros((), dtype=torch.float64)
        if inside.sum() >= 2:
            z = student[row].detach()[inside].requires_grad_()
            p = (teacher[row][inside] / tau).softmax(dim=0)
            q = (z / tau).softmax(dim=0)
            expected = tau**2 * divergence_of(divergence, p, q, beta)
            expected_gradient[inside] = torch.autograd.grad(expected, z)[0]
        assert bool(counted[row]) == bool(inside.sum() >= 2)
        torch.testing.assert_close(values[row], expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(student.grad[row], expected_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_divergences_stay_finite_at_scores_far_apart(divergence):
    student = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-200.0, 200.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    values, _ = support_kl(student, teacher, mask, 1.0, divergence)
    values.sum().backward()
    expected = {"forward": 400.0, "reverse": 400.0, "jsd": math.log(2)}
    assert values.item() == pytest.approx(expected[divergence], rel=1e-6)
    assert student.grad.isfinite().all() and student.grad[0, 2] == 0


def test_full_jsd_is_the_published_one_of_trl():
    """TRL, GKDTrainer: the mixture by logsumexp, two F.kl_div against it, weighted by beta; 0.5 here."""
    generator = torch.Generator().manual_seed(5)
    student = 2 * torch.randn(20, 30, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(20, 30, generator=generator, dtype=torch.float64)
    beta = 0.5
    log_q = F.log_softmax(student, dim=-1)
    log_p = F.log_softmax(teacher, dim=-1)
    parts = torch.stack([log_q + math.log(1 - beta), log_p + math.log(beta)])
    log_m = parts.logsumexp(dim=0)
    of_teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True)
    of_student = F.kl_div(log_m, log_q, reduction="none", log_target=True)
    expected = (beta * of_teacher + (1 - beta) * of_student).sum(dim=1)
    mask = torch.ones(20, 30, dtype=torch.bool)
    values, _ = support_kl(student, teacher, mask, 1.0, "jsd", beta)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-14)


# ---- references that cannot be used ------------------------------------------------------------------------


def test_a_reference_that_the_teacher_cannot_write_is_a_bad_clip(stage, tmp_path, capsys):
    """A teacher without the token z, and a z in the text of one clip."""
    teacher = SpeechLM.from_pretrained(stage / "teacher")
    teacher.save_pretrained(tmp_path / "teacher")
    path = tmp_path / "teacher/tokenizer.json"
    state = json.loads(path.read_text())
    state["model"]["vocab"]["not z"] = state["model"]["vocab"].pop("z")
    path.write_text(json.dumps(state))
    lines = lines_of(stage / "m.jsonl")
    lines[3]["text"] = "a zebra here"
    path = write_lines(tmp_path / "m.jsonl", lines)
    flags = ["--teacher", tmp_path / "teacher", "--train", path, "--batch-size", 12, *ARMS["offline-kl"]]
    assert status_of(opd, argv_of(opd, stage, tmp_path / "stops", *flags)) == 2
    line = error_line(capsys.readouterr().err)
    assert "m.jsonl:4" in line and "'z'" in line and "--on-bad-audio skip" in line

    metrics = train(opd, stage, tmp_path / "run", *flags, "--on-bad-audio", "skip")[0]
    assert metrics["skipped"] == 1
    assert [line["clip"] for line in lines_of(tmp_path / "run/bad.jsonl")] == [f"{path}:4"]
    n_tokens = [len(line["text"].encode()) for line in lines if "zebra" not in line["text"]]
    assert metrics["mean_tokens"] == pytest.approx(mean(n_tokens))
    assert metrics["positions"] == sum(n_tokens) + len(n_tokens)
    train(opd, stage, tmp_path / "opd", *flags[:6])  # the student never reads the text
