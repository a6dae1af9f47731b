"""Whole runs of opd.py and sft.py on tiny models: what a step computes, written out again from its
definition, and that no cut into micro-batches and ranks changes it."""

import json
import math
import re
import shutil

import pytest
import soundfile
import tokenizers
import torch
import transformers
from conftest import ROOT, byte_tokenizer, qwen3_asr_folder, tiny_model
from runs import (
    BOTH,
    argv_of,
    assert_same_gradient,
    assert_same_metrics,
    error_line,
    gradient_of,
    lines_of,
    mean,
    run_on_cpu,
    run_ranks,
    state_of,
    status_of,
    timeless,
    train,
    train_on_ranks,
    weights_of,
    write_clip,
    write_lines,
    write_stage,
)

import eval as evaluation
import opd
import sft
from data import collate, load_audio, read_manifest
from model import SpeechLM, cosine_lr

CTC_AND_MASKS = ["--ctc-weight", 0.5, "--time-masks", 1, "--freq-masks", 1, "--time-width", 5]


@pytest.fixture(autouse=True, scope="module")
def on_cpu():
    yield from run_on_cpu()


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return write_stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def plain(stage, tmp_path_factory):
    """plain(script, *flags) → the folder of such a run in one process, made once."""
    folders = {}

    def folder_of(script, *flags):
        key = (script, *flags)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("plain") / "run"
            train(script, stage, folders[key], *flags)
        return folders[key]

    return folder_of


def longest_clips(stage, n):
    """The first batch of a run holds the longest clips, longest first."""
    clips = read_manifest(stage / "m.jsonl")
    return sorted(clips, key=lambda clip: -clip.duration)[:n]


# ---- opd.py: a step by its definition ----------------------------------------------------------------------


def top_ids(logits, forbidden, k):
    return logits.masked_fill(forbidden, -math.inf).topk(k).indices.tolist()


def kl_on(support, teacher_logits, student_logits, tau):
    p = (teacher_logits[support] / tau).softmax(dim=0)
    q = (student_logits[support] / tau).softmax(dim=0)
    return tau**2 * (p * (p.log() - q.log())).sum()


def opd_step(stage, n, k=8, tau=1.0, cap=12, divergence=kl_on, teacher="teacher"):
    """Equation 1 on the n longest clips, one clip and one row at a time, from full logits.

    → metrics, gradient {name: tensor}, and for each clip {student, teacher, stopped, kl: nats of its rows}.
    """
    student = SpeechLM.from_pretrained(stage / "student").train()
    teacher = SpeechLM.from_pretrained(stage / teacher).eval()
    rows = []
    samples = []
    for clip in longest_clips(stage, n):
        batch = collate([load_audio(clip)], student.front_end, [clip.language])
        rollout = student.sample(batch, cap, k=1)
        written = teacher.sample(batch, cap, k=1)
        student_logits = student.head(student(batch, rollout))
        teacher_logits = teacher.head(teacher(batch, rollout)).detach()
        clip_kl = []
        for z_student, z_teacher in zip(student_logits, teacher_logits):
            student_ids = top_ids(z_student, student.forbidden, k)
            teacher_ids = top_ids(z_teacher, teacher.forbidden, k)
            support = sorted(set(student_ids) | set(teacher_ids))
            row = {"vuss": len(support), "overlap_ratio": (2 * k - len(support)) / k}
            row["n_student"] = k
            row["n_teacher"] = k
            for nested_k in (1, 2, 4):
                row[f"vuss_{nested_k}"] = len({*student_ids[:nested_k], *teacher_ids[:nested_k]})
            row["top1"] = float(student_ids[0] == teacher_ids[0])
            row["loss"] = divergence(support, z_teacher, z_student, tau)
            row["kl"] = divergence(support, z_teacher, z_student, 1.0).item()
            rows.append(row)
            clip_kl.append(row["kl"])
        samples.append(
            {
                "transcript": student.front_end.texts(rollout)[0],
                "teacher": teacher.front_end.texts(written)[0],
                "stopped": bool(rollout.stopped[0]),
                "n_tokens": int(rollout.lens[0]),
                "kl": clip_kl,
            }
        )
    counted = [row for row in rows if row["vuss"] >= 2]
    loss = sum(row["loss"] for row in counted) / len(counted)
    loss.backward()
    gradient = {name: parameter.grad for name, parameter in student.named_parameters()}
    keys = ["vuss", "overlap_ratio", "top1", "n_student", "n_teacher"]
    if k == 8:
        keys += ["vuss_1", "vuss_2", "vuss_4"]
    metrics = {key: mean(row[key] for row in rows) for key in keys}
    metrics["loss"] = loss.item()
    metrics["kl"] = mean(row["kl"] for row in counted)
    metrics["grad_norm"] = math.sqrt(sum(g.square().sum().item() for g in gradient.values()))
    metrics["positions"] = len(counted)
    metrics["mean_tokens"] = mean(sample["n_tokens"] for sample in samples)
    metrics["empty"] = mean(sample["n_tokens"] == 0 for sample in samples)
    metrics["capped"] = mean(not sample["stopped"] for sample in samples)
    metrics["looping"] = mean(evaluation.looping(sample["transcript"]) for sample in samples)
    return metrics, gradient, samples


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_a_step_of_opd_is_its_definition(stage, plain, tau):
    """Gradient, metrics and samples; `kl` is at temperature 1 whatever --tau is."""
    flags = ["--batch-size", 5, "--clip", 0, "--tau", tau, "--micro-seconds", 3]
    out = plain(opd, *flags)
    metrics, gradient, samples = opd_step(stage, 5, tau=tau)
    assert 0 < metrics["empty"] < 1 and 0 < metrics["capped"] < 1  # all kinds of rollouts are in it
    line = lines_of(out / "metrics.jsonl")[0]
    assert {key: line[key] for key in metrics} == pytest.approx(metrics, rel=1e-5)
    assert (line["loss"] == line["kl"]) == (tau == 1)
    assert_same_gradient(gradient_of(out), gradient, 1e-5)

    lines = lines_of(out / "samples.jsonl")
    assert len(lines) == 2
    for line, clip, sample in zip(lines, longest_clips(stage, 2), samples):
        assert line["step"] == 1 and line["clip"] == clip.where and line["ref"] == clip.text
        assert {key: line[key] for key in ("transcript", "teacher", "stopped")}.items() <= sample.items()
        assert line["kl"] == pytest.approx(sample["kl"], abs=1e-4)
        assert len(line["tokens"]) == len(line["kl"]) == sample["n_tokens"] + sample["stopped"]
        assert (line["tokens"][-1] == "<|im_end|>") == sample["stopped"]


def test_rows_whose_support_is_one_id_do_not_count(stage, tmp_path):
    """k = 1 and a teacher that mostly agrees: the mean is over the rows where they differ."""
    student = SpeechLM.from_pretrained(stage / "student")
    torch.manual_seed(0)
    for parameter in student.parameters():
        parameter.data += 0.03 * torch.randn(parameter.shape)
    student.save_pretrained(tmp_path / "near")
    out = tmp_path / "run"
    line = train(opd, stage, out, "--teacher", tmp_path / "near", "--k", 1, "--batch-size", 12, "--clip", 0)[
        0
    ]
    metrics, gradient, _ = opd_step(stage, 12, k=1, teacher=tmp_path / "near")
    assert 0.2 < metrics["top1"] < 0.8
    assert {key: line[key] for key in metrics} == pytest.approx(metrics, rel=1e-5)
    assert_same_gradient(gradient_of(out), gradient, 1e-5)


def test_opd_reads_no_transcript(stage, tmp_path):
    """Without `text` in the manifest, and with nonsense in it, the run is the same to the last bit."""
    lines = lines_of(stage / "m.jsonl")
    variants = {
        "with": lines,
        "nonsense": [{**line, "text": 17} for line in lines],
        "without": [{key: x for key, x in line.items() if key != "text"} for line in lines],
    }
    results = []
    for name, changed in variants.items():
        path = write_lines(tmp_path / f"{name}.jsonl", changed)
        out = tmp_path / name
        metrics = train(opd, stage, out, "--train", path)
        results.append((timeless(metrics), (out / "model/model.safetensors").read_bytes()))
    assert results[0] == results[1] == results[2]


@pytest.mark.slow
def test_opd_pulls_the_student_to_the_teacher(stage, tmp_path):
    lines = train(opd, stage, tmp_path / "run", "--steps", 15, "--batch-size", 6, "--lr", 2e-2)
    assert [line["step"] for line in lines] == list(range(1, 16))
    assert mean(line["loss"] for line in lines[-3:]) < 0.5 * lines[0]["loss"]


def test_the_teacher_is_frozen_and_every_weight_of_the_student_moves(stage, tmp_path, monkeypatch):
    loaded = {}
    from_pretrained = SpeechLM.from_pretrained

    def record(name, *args):
        loaded[str(name)] = from_pretrained(name, *args)
        return loaded[str(name)]

    monkeypatch.setattr(opd.SpeechLM, "from_pretrained", record)
    train(opd, stage, tmp_path / "run", "--weight-decay", 0, "--batch-size", 12)
    student, teacher = loaded[str(stage / "student")], loaded[str(stage / "teacher")]
    assert student.training and not teacher.training
    before = weights_of(stage / "teacher")
    for name, parameter in teacher.named_parameters():
        assert not parameter.requires_grad and parameter.grad is None
        assert torch.equal(parameter, before[name]), name
    start, end = weights_of(stage / "student"), weights_of(tmp_path / "run/model")
    assert start.keys() == end.keys()
    for name in start:
        assert (end[name] - start[name]).abs().max() > 1e-4, name


def test_a_step_without_a_counted_row_changes_nothing(stage, tmp_path):
    """k = 1 and a teacher that agrees: every support holds one id. The step is counted and logged."""
    out = tmp_path / "run"
    lines = train(
        opd, stage, out, "--teacher", stage / "student", "--k", 1, "--steps", 2, "--weight-decay", 1
    )
    for line in lines:
        assert line["positions"] == line["loss"] == line["kl"] == line["grad_norm"] == 0
        assert line["vuss"] == line["top1"] == 1 and line["mean_tokens"] > 0
    assert [line["step"] for line in lines] == [1, 2]
    start, end = weights_of(stage / "student"), weights_of(out / "model")
    assert all(torch.equal(start[name], end[name]) for name in start)
    assert state_of(out, 2)["updates"] == 0


def test_eval_before_and_after_is_of_the_models_it_names(stage, tmp_path, capsys):
    out = tmp_path / "run"
    manifest = str(write_lines(tmp_path / "m.jsonl", lines_of(stage / "m.jsonl")[::4]))
    train(opd, stage, out, "--eval", manifest, "--eval-every", 1, "--steps", 2, "--lr", 1e-2)
    summary = json.loads((out / "summary.json").read_text())
    sets = evaluation.read_sets([manifest], 30)
    for step, key, folder in ((0, "before", stage / "student"), (2, "after", out / "model")):
        assert json.loads((out / f"eval-{step}/summary.json").read_text()) == summary[key]
        model = SpeechLM.from_pretrained(folder)
        again = evaluation.evaluate(model, sets, torch.device("cpu"), 600, tmp_path / f"again-{step}")
        assert {**again["m"], "rtf": 0} == {**summary[key]["m"], "rtf": 0}  # the same but for speed
    assert (out / "eval-1/summary.json").exists()
    shown = capsys.readouterr().out
    assert "before %" in shown and str(out / "model") in shown


def with_other_ids(model):
    """The same model with its 256 byte tokens at other ids, in tokenizer, embeddings and head."""
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0)).tolist()
    state = json.loads(model.front_end.tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] = {token: order[i] for token, i in vocabulary.items()}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(state)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    other = SpeechLM(model.config, tokenizer)
    other.load_state_dict(model.state_dict())
    for own, old in ((other.lm.embed_tokens, model.lm.embed_tokens), (other.head, model.head)):
        own.weight.data[order] = old.weight.data[:256]
    return other


@pytest.mark.slow
def test_a_teacher_with_other_ids_for_the_same_tokens_is_the_same_teacher(stage, tmp_path):
    teacher = tiny_model(1, width=48, hidden=64, tied=False, spread=0.1)
    results = []
    for name, model in (("same", teacher), ("other", with_other_ids(teacher))):
        model.save_pretrained(tmp_path / name)
        out = tmp_path / f"run-{name}"
        lines = train(opd, stage, out, "--teacher", tmp_path / name, "--batch-size", 5, "--clip", 0)
        samples = [(line["transcript"], line["teacher"]) for line in lines_of(out / "samples.jsonl")]
        results.append((lines, samples, gradient_of(out)))
    assert_same_metrics(results[1][0], results[0][0], 1e-5)
    assert results[1][1] == results[0][1]
    assert_same_gradient(results[1][2], results[0][2])


# ---- no cut changes a step ---------------------------------------------------------------------------------

SAMPLED = ["--temperature", 0.7]


@pytest.mark.parametrize(
    "script, world, batch_size, micro_seconds, more",
    [
        pytest.param(opd, 1, 5, 0.1, [], id="opd, a clip at a time"),
        pytest.param(opd, 4, 3, 600, [], id="opd, four ranks, one without a clip", marks=pytest.mark.slow),
        pytest.param(
            opd,
            2,
            5,
            0.1,
            SAMPLED,
            id="opd, sampled, two ranks, three and two micro-batches",
            marks=pytest.mark.slow,
        ),
        pytest.param(sft, 2, 5, 0.1, CTC_AND_MASKS, id="sft, two ranks, three and two micro-batches"),
        pytest.param(sft, 1, 5, 0.1, CTC_AND_MASKS, id="sft, a clip at a time"),
    ],
)
def test_no_cut_changes_a_step(script, world, batch_size, micro_seconds, more, stage, plain, tmp_path):
    """The gradient agrees to 1e-6 of its largest element, and every metric with it."""
    flags = ["--batch-size", batch_size, "--clip", 0, *more]
    whole, out = plain(script, *flags), tmp_path / "run"
    lines = train_on_ranks(script, stage, out, world, "--micro-seconds", micro_seconds, *flags)
    assert_same_metrics(lines, lines_of(whole / "metrics.jsonl"), 2e-6)
    assert_same_gradient(gradient_of(out), gradient_of(whole))


@BOTH
def test_recompute_changes_nothing(script, stage, plain, tmp_path):
    flags = ["--batch-size", 5, "--clip", 0]
    train(script, stage, tmp_path / "run", "--recompute", *flags)
    assert_same_gradient(gradient_of(tmp_path / "run"), gradient_of(plain(script, *flags)))


def test_full_support_is_a_union_of_all_ids(stage, tmp_path):
    flags = ["--batch-size", 5, "--clip", 0]
    full, union = tmp_path / "full", tmp_path / "union"
    line = train(opd, stage, full, "--support", "full", *flags)[0]
    assert train(opd, stage, union, "--k", 10_000, *flags)[0]["loss"] == pytest.approx(line["loss"], rel=1e-6)
    assert_same_gradient(gradient_of(full), gradient_of(union))


@pytest.mark.slow
@BOTH
def test_bf16_computes_in_bf16_and_trains_float32(script, stage, tmp_path, monkeypatch):
    out = tmp_path / "run"
    flags = ["--weight-decay", 0]
    encode = SpeechLM.encode
    encoded_dtypes = set()

    def record(model, batch):
        encoded = encode(model, batch)
        encoded_dtypes.add(encoded.dtype)
        return encoded

    monkeypatch.setattr(SpeechLM, "encode", record)
    lines = train(script, stage, out, "--bf16", "--steps", 5, *flags)
    monkeypatch.undo()
    assert encoded_dtypes == {torch.bfloat16}
    assert all(math.isfinite(line["loss"]) for line in lines) and len(lines) == 5
    first = train(script, stage, tmp_path / "float32", *flags)[0]["loss"]
    assert lines[0]["loss"] == pytest.approx(first, rel=0.02) and lines[0]["loss"] != first
    start, end = weights_of(stage / "student"), weights_of(out / "model")
    for name in start:
        assert end[name].dtype == torch.float32
        assert (end[name] - start[name]).abs().max() > 1e-4, name
        assert (end[name] != end[name].bfloat16().float()).any(), name  # a master weight, not a rounded one
    moments = [tensor for key, tensor in state_of(out, 5).items() if key.startswith("exp_avg")]
    assert len(moments) == 2 * len(start) and {tensor.dtype for tensor in moments} == {torch.float32}


# ---- sampled rollouts --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_draws_depend_on_the_seed_the_step_and_the_clip(stage, tmp_path):
    """The same audio on two lines and weights that stand still: what differs is drawn."""
    line = lines_of(stage / "m.jsonl")[11]
    path = write_lines(tmp_path / "m.jsonl", [line, line])

    def tokens(name, *more):
        out = tmp_path / name
        flags = ["--train", path, "--batch-size", 2, "--lr", 0, "--steps", 2, "--sample-every", 1]
        train(opd, stage, out, *flags, *more)
        return [tuple(sample["kl"]) for sample in lines_of(out / "samples.jsonl")]

    assert len(set(tokens("greedy"))) == 1
    sampled = tokens("sampled", "--temperature", 0.7)
    assert len(sampled) == len(set(sampled)) == 4
    assert not set(tokens("seed", "--temperature", 0.7, "--seed", 1)) & set(sampled)


def test_a_rollout_is_cut_by_both_caps(stage, tmp_path):
    """min(--max-new-tokens, ⌊0.3 s × --tokens-per-second⌋ + 16)."""
    student = tiny_model(0, tied=False)
    student.head.weight.data[student.front_end.stop_id] = 0  # never the largest: it never stops
    student.save_pretrained(tmp_path / "endless")
    path = write_lines(tmp_path / "m.jsonl", lines_of(stage / "m.jsonl")[:1])
    flags = ["--train", path, "--student", tmp_path / "endless", "--batch-size", 1]
    flags += ["--max-new-tokens", 64, "--tokens-per-second", 8]
    line = train(opd, stage, tmp_path / "run", *flags)[0]
    assert (line["mean_tokens"], line["capped"], line["positions"]) == (18, 1, 18)


# ---- optimization ------------------------------------------------------------------------------------------


@BOTH
def test_the_learning_rate_of_the_log_is_the_schedules_and_the_optimizers(script, stage, tmp_path):
    lines = train(script, stage, tmp_path / "run", "--steps", 4, "--warmup-steps", 2, "--lr", 2e-3)
    assert [line["lr"] for line in lines] == pytest.approx([1e-3, 2e-3, 2e-3, 1e-3])
    assert [line["lr"] for line in lines] == [cosine_lr(step, 4, 2, 2e-3) for step in range(4)]
    # Adam's first update is the learning rate times the sign of the gradient.
    out = tmp_path / "one"
    line = train(script, stage, out, "--warmup-steps", 10, "--lr", 1e-2, "--weight-decay", 0)[0]
    start, end = weights_of(stage / "student"), weights_of(out / "model")
    largest = max(float((end[name] - start[name]).abs().max()) for name in start)
    assert line["lr"] == pytest.approx(1e-3) and largest == pytest.approx(1e-3, rel=1e-3)


@BOTH
def test_clip_reaches_the_gradient_norm(script, stage, plain, tmp_path):
    out = tmp_path / "run"
    line = train(script, stage, out, "--clip", 0.01, "--batch-size", 5)[0]
    unclipped = plain(script, "--batch-size", 5, "--clip", 0)
    norms = []
    for folder in (out, unclipped):
        norms.append(math.sqrt(sum(g.square().sum().item() for g in gradient_of(folder).values())))
    assert norms[0] == pytest.approx(0.01, rel=1e-4)
    for name, gradient in gradient_of(unclipped).items():  # AdamW's second beta is 0.95
        second_moment = state_of(unclipped, 1)[f"exp_avg_sq.{name}"]
        torch.testing.assert_close(second_moment, 0.05 * gradient.square(), rtol=1e-3, atol=1e-12)
    # The log has the norm before clipping.
    assert line["grad_norm"] == pytest.approx(norms[1], rel=1e-5)


# ---- metrics and messages ----------------------------------------------------------------------------------


@BOTH
def test_silent_clips_are_used_and_long_ones_left_out_and_both_counted(script, stage, tmp_path, capsys):
    lines = lines_of(stage / "m.jsonl")[:3]
    soundfile.write(tmp_path / "silent.wav", torch.zeros(4800).numpy(), 16_000)
    lines.append({**lines[0], "audio": str(tmp_path / "silent.wav"), "duration": 0.3})
    lines.append({"audio": "missing.wav", "duration": 99, "text": "is never read"})
    path = write_lines(tmp_path / "m.jsonl", lines)
    line = train(script, stage, tmp_path / "run", "--train", path, "--batch-size", 4)[0]
    assert line["silent"] == 0.25 and line["skipped"] == 0
    shown = capsys.readouterr().out
    assert "train: 4 clips, " in shown and re.search(r"\b1 (left out as )?longer than 30 s", shown)


def test_a_run_needs_no_git(stage, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    train(sft, stage, tmp_path / "run")
    assert json.loads((tmp_path / "run/config.json").read_text())["git"] is None


def section_of(text, title):
    """The section of a Markdown file with this title."""
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_metric_is_defined(stage, tmp_path):
    """Every key that a run writes stands in its section of docs/metrics.md, and no others in the tables."""
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    manifest = write_lines(tmp_path / "m.jsonl", lines_of(stage / "m.jsonl")[::4])
    keys = {}
    for script, flags in ((opd, ["--sample-every", 1]), (sft, CTC_AND_MASKS)):
        out = tmp_path / script.__name__
        more = ["--steps", 2, "--eval", manifest, "--eval-every", 1, *flags]
        lines = train(script, stage, out, *more)
        assert [line["step"] for line in lines] == [1, 2]
        keys[script] = lines[0].keys() | lines[1].keys()
    table_key = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)
    section = section_of(text, "metrics.jsonl of opd.py")
    assert "| `vuss_1`, `vuss_2`, `vuss_4`, … |" in section
    assert "STEM/METRIC" in section  # m/WER: the error of a set named m
    assert set(table_key.findall(section)) == keys[opd] - {"vuss_1", "vuss_2", "vuss_4", "m/WER"}

    section = section_of(text, "metrics.jsonl of sft.py")
    keys[sft].remove("m/WER")
    assert "STEM/METRIC" in section
    assert set(table_key.findall(section)) <= keys[sft] <= set(re.findall(r"`(\w+)`", section))

    section = section_of(text, "samples.jsonl")
    sample = lines_of(tmp_path / "opd/samples.jsonl")[0]
    for key in sample:
        assert f"`{key}`" in section, key


MISTAKES = {
    "no such manifest": (["--train", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    "no clip is short enough": (["--max-seconds", 0.1], "m.jsonl: no clip of at most --max-seconds 0.1"),
    "no such evaluation set": (["--eval", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
    "no model folder": (["--student", "nowhere"], "nowhere is no model folder"),
    "not a language": (["--language", "xx"], "language 'xx' is not known"),
}


@BOTH
@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("out", ["new", "empty"])
def test_a_refused_run_leaves_no_folder_behind(script, mistake, out, stage, tmp_path, capsys):
    """One line, status 2, and --out is as it was."""
    flags, message = MISTAKES[mistake]
    if script is sft:
        flags = ["--model" if flag == "--student" else flag for flag in flags]
    folder = tmp_path / "run"
    if out == "empty":
        folder.mkdir()
    assert status_of(script, argv_of(script, stage, folder, *flags)) == 2
    assert message in error_line(capsys.readouterr().err)
    assert folder.exists() == (out == "empty") and not list(tmp_path.rglob("*.json*"))


@BOTH
def test_an_evaluation_set_with_some_speakers_only_is_refused_at_the_start(script, stage, tmp_path, capsys):
    lines = lines_of(stage / "m.jsonl")
    lines[0]["speaker"] = "anna"
    manifest = write_lines(tmp_path / "m.jsonl", lines)
    assert status_of(script, argv_of(script, stage, tmp_path / "run", "--eval", manifest)) == 2
    assert 'm.jsonl:2: no "speaker"' in error_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_two_models_without_a_common_tokenizer_are_refused(stage, tmp_path, capsys):
    tokenizer = byte_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] = {("x" + token if i > 99 else token): i for token, i in vocabulary.items()}
    shutil.copytree(stage / "teacher", tmp_path / "other")
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(state))
    assert status_of(opd, argv_of(opd, stage, tmp_path / "run", "--teacher", tmp_path / "other")) == 2
    assert "token by token: one tokenizer" in error_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_run_whose_checked_clips_are_all_bad_is_refused(stage, tmp_path, capsys):
    """The self-check needs one clip, whatever --on-bad-audio is."""
    lines = [{"audio": f"gone{i}.wav", "duration": 1.0 + i} for i in range(5)]
    path = write_lines(tmp_path / "m.jsonl", lines)
    argv = argv_of(opd, stage, tmp_path / "run", "--train", path, "--on-bad-audio", "skip")
    assert status_of(opd, argv) == 2
    line = error_line(capsys.readouterr().err)
    assert "self-check" in line and f"{path}:1: " in line and "gone0.wav" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "script, flags",
    [
        *[
            (opd, f"--{name} 0")
            for name in ("k", "tau", "steps", "batch-size", "save-every", "max-new-tokens")
        ],
        *[(opd, f"--{name} -1") for name in ("clip", "temperature", "workers", "seed", "eval-every")],
        *[(opd, f"--{name} nan") for name in ("tau", "lr", "micro-seconds")],
        *[(sft, f"--{name} -1") for name in ("ctc-weight", "time-masks", "seed")],
        (opd, "--warmup-steps 1.5"),
        (opd, "--support all"),
        (opd, "--no-such-flag 1"),
        (opd, "--step 3"),
        (sft, "--lr inf"),
        (sft, "--resume auto"),
    ],
)
def test_a_wrong_flag_is_named(script, flags, capsys):
    needed = {opd: "--train m --student s --teacher t", sft: "--train m --model s"}[script]
    with pytest.raises(SystemExit) as exit:
        script.parse_args([*needed.split(), *flags.split()])
    last = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 2 and flags.split()[-1] in last


# ---- Qwen3-ASR ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [opd, sft], ids=["opd", "sft"])
def test_qwen3_asr_as_a_student_trains_and_reloads_as_the_stock_class(script, stage, tmp_path, capsys):
    """Its prompt names a language: where lines have none, --language is asked for at the start."""
    student = qwen3_asr_folder(tmp_path / "student")
    teacher = qwen3_asr_folder(tmp_path / "teacher", seed=1, hidden=64)
    lines = [{key: x for key, x in line.items() if key != "language"} for line in lines_of(stage / "m.jsonl")]
    path = write_lines(tmp_path / "m.jsonl", lines)
    models = ["--student", student, "--teacher", teacher] if script is opd else ["--model", student]
    flags = ["--train", path, *models, "--batch-size", 12, "--weight-decay", 0]
    out = tmp_path / "run"
    assert status_of(script, argv_of(script, stage, out, *flags)) == 2
    line = error_line(capsys.readouterr().err)
    assert f"{path}:1: " in line and "--language" in line and not out.exists()

    line = train(script, stage, out, *flags, "--language", "German")[0]
    assert math.isfinite(line["loss"]) and line["loss"] > 0
    stock_class = transformers.Qwen3ASRForConditionalGeneration
    stock, info = stock_class.from_pretrained(out / "model", output_loading_info=True)
    assert not any(info.values())
    end = stock.state_dict()
    for name, tensor in stock_class.from_pretrained(student).state_dict().items():
        assert end[name].dtype == torch.float32
        assert (end[name] - tensor).abs().max() > 1e-5, name
    processor = transformers.AutoProcessor.from_pretrained(out / "model")
    assert type(processor).__name__ == "Qwen3ASRProcessor"


def test_qwen3_asr_has_no_ctc(stage, tmp_path, capsys):
    student = qwen3_asr_folder(tmp_path / "student")
    assert status_of(sft, argv_of(sft, stage, tmp_path / "run", "--model", student, "--ctc-weight", 1)) == 2
    assert "--ctc-weight" in error_line(capsys.readouterr().err) and not (tmp_path / "run").exists()


# ---- bad audio ---------------------------------------------------------------------------------------------


def write_bad_clips(folder):
    """Six clips; with --batch-size 2 a batch has none that can be used, one has one, one has both. → manifest

    In the order of length, longest first: bad, bad, good, bad, good, good.
    """
    lines = []
    for i, is_bad in enumerate([True, True, False, True, False, False]):
        line = write_clip(folder / f"{i}.wav", 1.0 - 0.1 * i, seed=i)
        if is_bad:
            raw = (folder / f"{i}.wav").read_bytes()
            (folder / f"{i}.wav").write_bytes(raw[:2000])
        lines.append(line)
    return write_lines(folder / "bad.jsonl", lines)


@BOTH
def test_bad_clips_are_left_out_counted_and_listed(script, stage, tmp_path, capsys):
    """A step is that of its good clips alone, or nothing where it has none; two ranks do what one does."""
    path = write_bad_clips(tmp_path)
    flags = ["--train", path, "--batch-size", 2, "--steps", 3, "--lr", 1e-5, "--on-bad-audio", "skip"]
    flags += ["--save-every", 1, "--keep", 3, "--weight-decay", 1]
    one, two = tmp_path / "one", tmp_path / "two"
    lines = train(script, stage, one, *flags)
    shown = capsys.readouterr().out
    assert f"skipped: 3 clips that could not be used, listed in {one}/bad.jsonl" in shown
    assert json.loads((one / "summary.json").read_text())["skipped"] == 3

    # The first step holds the two longest clips, which are bad.
    n_rows = "positions" if script is opd else "tokens"
    assert [lines[0][key] for key in ("step", "skipped", n_rows, "loss", "grad_norm")] == [1, 2, 0, 0, 0]
    start, end = weights_of(stage / "student"), weights_of(one / "step-1/model")
    assert all(torch.equal(start[name], end[name]) for name in start)
    assert state_of(one, 1)["updates"] == 0 and state_of(one, 3)["updates"] == 2
    assert sorted(line["skipped"] for line in lines[1:]) == [0, 1]
    assert all(line["loss"] > 0 and line[n_rows] > 0 for line in lines[1:])

    listed = lines_of(one / "bad.jsonl")
    steps = [line["step"] for line in lines for _ in range(line["skipped"])]
    assert [line["step"] for line in listed] == steps
    assert sorted(line["clip"] for line in listed) == [f"{path}:{number}" for number in (1, 2, 4)]
    for line in listed:
        assert (
            line["audio"].endswith(".wav")
            and line["audio"] in line["reason"]
            and line["clip"] in line["reason"]
        )

    on_ranks = train_on_ranks(script, stage, two, 2, *flags)
    assert_same_metrics(on_ranks, lines, 1e-5)
    assert sorted(map(str, lines_of(two / "bad.jsonl"))) == sorted(map(str, listed))


@BOTH
def test_a_step_with_bad_clips_is_that_of_the_others(script, stage, tmp_path):
    path = write_bad_clips(tmp_path)
    flags = ["--clip", 0, "--on-bad-audio", "skip"]
    train(script, stage, tmp_path / "all", "--train", path, "--batch-size", 6, *flags)
    good = [line for i, line in enumerate(lines_of(path)) if i in (2, 4, 5)]
    path = write_lines(tmp_path / "good.jsonl", good)
    train(script, stage, tmp_path / "good", "--train", path, "--batch-size", 3, *flags)
    all_lines, good_lines = (lines_of(tmp_path / name / "metrics.jsonl") for name in ("all", "good"))
    assert all_lines[0].pop("skipped") == 3 and good_lines[0].pop("skipped") == 0
    assert_same_metrics(all_lines, good_lines, 2e-6)
    assert_same_gradient(gradient_of(tmp_path / "all"), gradient_of(tmp_path / "good"))
    assert not (tmp_path / "good/bad.jsonl").exists()


@BOTH
def test_a_bad_clip_ends_the_run_with_one_line_of_the_rank_that_meets_it(script, stage, tmp_path):
    """--on-bad-audio error, the default: status 2, and manifest, line, file and remedy."""
    path = write_bad_clips(tmp_path)
    lines = lines_of(path)
    path = write_lines(tmp_path / "one.jsonl", [lines[2], lines[3], lines[4], lines[5]])
    out = tmp_path / "run"
    argv = argv_of(script, stage, out, "--train", path, "--batch-size", 4)
    results = run_ranks(lambda: status_of(script, argv), 2)
    assert results[1][0] == 2 and results[0][0] != 0
    line = error_line(results[1][1])
    assert f"{path}:2: " in line and "3.wav" in line and "--on-bad-audio skip" in line
    assert ".py: error: " not in results[0][1]
    assert not lines_of(out / "metrics.jsonl") and not (out / "model").exists()


# ---- numbers that are not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, more", [(opd, ["--temperature", 0.7]), (sft, [])], ids=["opd, sampled", "sft"]
)
def test_a_loss_that_is_not_finite_stops_all_ranks(script, more, stage, tmp_path):
    """A learning rate that makes the weights of step 1 enormous. Status 3; each rank lists its clips."""
    out = tmp_path / "run"
    flags = ["--lr", 1e30, "--warmup-steps", 0, "--steps", 3, "--batch-size", 12, "--save-every", 1, *more]
    argv = argv_of(script, stage, out, *flags)
    results = run_ranks(lambda: status_of(script, argv), 2)
    assert [status for status, _ in results] == [3, 3], results
    line = error_line(results[0][1])
    assert "step 2: " in line and "nonfinite-2-0.jsonl" in line and "--lr" in line
    assert ".py: error: " not in results[1][1]
    clips = []
    for rank in range(2):
        listed = lines_of(out / f"nonfinite-2-{rank}.jsonl")
        assert len(listed) == 6
        for entry in listed:
            assert entry["step"] == 2 and entry["audio"].endswith(".wav") and isinstance(entry["text"], str)
        clips += [entry["clip"] for entry in listed]
    assert sorted(clips) == sorted(clip.where for clip in read_manifest(stage / "m.jsonl"))
    assert [line["step"] for line in lines_of(out / "metrics.jsonl")] == [1]
    assert (out / "step-1").exists() and not (out / "step-2").exists()


@BOTH
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(script, stage, tmp_path, monkeypatch):
    seen = {}
    sum_gradients = script.sum_gradients

    def poison(trained):
        sum_gradients(trained)
        seen.update(trained)
        if (tmp_path / "run/step-1").exists():
            first = next(iter(trained.values()))
            first.grad.view(-1)[0] = math.nan

    monkeypatch.setattr(script, "sum_gradients", poison)
    assert status_of(script, argv_of(script, stage, tmp_path / "run", "--steps", 3, "--save-every", 1)) == 3
    weights = weights_of(tmp_path / "run/step-1/model")
    assert len(weights) > 20
    for name, tensor in weights.items():
        assert torch.equal(seen[name], tensor), name
    assert lines_of(tmp_path / "run/nonfinite-2-0.jsonl")
