"""Details that a run does not show by itself: each test here fails on a small, plausible change of the code
that leaves every figure looking sound."""
import json
import os
import shutil
import subprocess

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers

import data
import eval as evaluation
import opd
import overlap
import sft
from conftest import byte_tokenizer, noise, tiny_config, tiny_model
from data import InputError, collate, load_audio, read_manifest
from model import (SpeechLM, Rollout, align_vocabularies, cosine_lr, load_checkpoint, make_optimizer,
                   save_checkpoint)
from test_training import metrics_of, models, opd_args, opd_run, run, sft_run       # models: a fixture

BOTH = pytest.mark.parametrize("script", [opd, sft], ids=["opd", "sft"])


# ---- helpers -----------------------------------------------------------------------------------------------
def train(script, clips_dir, models, out, *more):
    """A run of opd.py or of sft.py, both from the student's folder. → its metrics"""
    if script is opd:
        return opd_run(clips_dir, models, out, *more)
    script.main(script.parse_args([
        "--train", str(clips_dir / "m.jsonl"), "--model", str(models[0]), "--out", str(out), "--workers", "0",
        "--steps", "3", "--batch-size", "6", "--lr", "1e-3", "--warmup-steps", "1", *map(str, more)]))
    return metrics_of(out)


def write_manifest(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def weights_of(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def timeless(lines):
    return [{k: v for k, v in m.items() if not k.endswith("_s") and k != "rss_gb"} for m in lines]


# ---- optimization ------------------------------------------------------------------------------------------
@BOTH
def test_learning_rate_of_each_step_is_the_schedules_and_the_optimizers(script, clips_dir, models, tmp_path):
    lines = train(script, clips_dir, models, tmp_path / "run", "--steps", 4, "--warmup-steps", 2,
                  "--lr", 2e-3)
    assert [m["lr"] for m in lines] == pytest.approx([1e-3, 2e-3, 2e-3, 1e-3])
    assert [m["lr"] for m in lines] == [cosine_lr(step, 4, 2, 2e-3) for step in range(4)]
    train(script, clips_dir, models, tmp_path / "still", "--steps", 1, "--lr", 1, "--warmup-steps", 10 ** 9)
    start, end = weights_of(models[0]), weights_of(tmp_path / "still" / "model")
    assert start.keys() == end.keys() and all((start[name] - end[name]).abs().max() < 1e-5 for name in start)


@BOTH
def test_clip_reaches_the_gradient_norm(script, clips_dir, models, tmp_path, monkeypatch):
    real, seen = torch.nn.utils.clip_grad_norm_, []

    def record(parameters, max_norm, *args, **kwargs):
        parameters = list(parameters)
        seen.append((max_norm, len(parameters)))
        return real(parameters, max_norm, *args, **kwargs)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    for clip in (0.01, 0):
        train(script, clips_dir, models, tmp_path / str(clip), "--steps", 1, "--clip", clip)
    n = len(list(tiny_model().parameters()))
    assert seen == [(0.01, n), (float("inf"), n)]


def test_betas_and_what_does_not_decay_in_an_untied_model():
    model = tiny_model(tied=False)
    optimizer = make_optimizer(model, 1e-3, 0.005)
    assert type(optimizer) is torch.optim.AdamW
    names = {id(p): name for name, p in model.named_parameters()}
    decay, rest = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert all(group["betas"] == (0.9, 0.95) and group["lr"] == 1e-3 for group in optimizer.param_groups)
    assert ([group["weight_decay"] for group in optimizer.param_groups] == [0.005, 0]
            and decay | rest == set(names.values()) and not decay & rest)
    matrices = {name for name, p in model.named_parameters() if p.ndim >= 2}
    assert matrices - decay == {"net.lm_head.weight", "net.model.language_model.embed_tokens.weight"}
    assert decay <= matrices


def test_teacher_is_frozen_and_every_weight_of_the_student_moves(clips_dir, models, tmp_path, monkeypatch):
    real, loaded = SpeechLM.from_pretrained, {}

    def record(folder, *args, **kwargs):
        loaded[str(folder)] = real(folder, *args, **kwargs)
        return loaded[str(folder)]
    monkeypatch.setattr(opd.SpeechLM, "from_pretrained", record)
    opd_run(clips_dir, models, tmp_path / "run", "--weight-decay", 0)
    student, teacher = (loaded[str(folder)] for folder in models)
    assert len(loaded) == 2 and student.training and not teacher.training
    before = [dict(real(folder).requires_grad_(False).named_parameters()) for folder in models]
    for name, p in teacher.named_parameters():
        assert not p.requires_grad and p.grad is None and torch.equal(p.cpu(), before[1][name]), name
    for name, p in student.named_parameters():
        assert p.requires_grad and float((p.detach().cpu() - before[0][name]).abs().max()) > 1e-4, name


# ---- sft.py ------------------------------------------------------------------------------------------------
def test_sft_resume_is_the_straight_run(clips_dir, tmp_path):
    """With a CTC head, which only the training state keeps, and augmentation, which is drawn per step."""
    out, again = tmp_path / "run", tmp_path / "again"
    flags = ["--steps", 4, "--save-every", 2, "--ctc-weight", 0.5, "--time-masks", 1, "--time-width", 4]
    straight = sft_run(clips_dir, out, *flags)
    shutil.copytree(out, again, symlinks=True)
    shutil.rmtree(again / "checkpoints" / "step-0000004")         # killed after step 3, saved after step 2
    os.remove(again / "checkpoints" / "latest")
    os.symlink("step-0000002", again / "checkpoints" / "latest")
    assert timeless(sft_run(clips_dir, again, *flags, "--resume", "auto")) == timeless(straight)
    assert (again / "model/model.safetensors").read_bytes() == (out / "model/model.safetensors").read_bytes()


def augmentation(*flags):
    return sft.parse_args(["--train", "m.jsonl", *map(str, flags)])


def test_augmentation_is_a_function_of_seed_step_and_clip():
    mel = torch.randn(128, 200, generator=torch.Generator().manual_seed(0))
    kept, state = mel.clone(), torch.get_rng_state()
    args = augmentation("--time-masks", 2, "--freq-masks", 2)
    first = sft.augment(mel, args, 3, 5)
    assert torch.equal(first, sft.augment(mel, args, 3, 5)) and not torch.equal(first, mel)
    others = [sft.augment(mel, args, 4, 5), sft.augment(mel, args, 3, 6),
              sft.augment(mel, augmentation("--time-masks", 2, "--freq-masks", 2, "--seed", 1), 3, 5)]
    assert not any(torch.equal(first, other) for other in others)
    assert torch.equal(sft.augment(mel, augmentation(), 3, 5), mel)
    assert torch.equal(mel, kept) and torch.equal(torch.get_rng_state(), state)


def test_augmentation_masks_whole_frames_or_whole_bins_of_bounded_width():
    mel = torch.randn(128, 40, generator=torch.Generator().manual_seed(0))
    for flags, axis, widest in (
            (["--time-masks", 1, "--time-width", 6], 1, 6), (["--time-masks", 1], 1, 10),  # a quarter of 40
            (["--freq-masks", 1, "--freq-width", 9], 0, 9), (["--freq-masks", 3, "--freq-width", 9], 0, 27)):
        widths = []
        for step in range(60):
            out = sft.augment(mel, augmentation(*flags), step, 0)
            masked = (out == 0).all(dim=1 - axis)
            widths.append(int(masked.sum()))
            want = mel.masked_fill(masked[:, None] if axis == 0 else masked[None], 0)
            assert torch.equal(out, want), flags
        assert widest / 2 < max(widths) <= widest and len(set(widths)) > 2, flags


def test_ctc_loss_is_per_byte_and_summed_over_clips():
    """As many frames as bytes leave one path: the text itself, a frame a byte."""
    frames = torch.randn(4, 2, 257, generator=torch.Generator().manual_seed(0))
    log_p = frames.log_softmax(2)
    texts, lens = ["ab", "c", "é", ""], torch.tensor([2, 1, 2, 1])                    # é is two bytes
    want = [-(log_p[0, 0, 1 + ord("a")] + log_p[0, 1, 1 + ord("b")]) / 2, -log_p[1, 0, 1 + ord("c")],
            -(log_p[2, 0, 1 + 0xC3] + log_p[2, 1, 1 + 0xA9]) / 2, -log_p[3, 0, 0]]
    head = torch.nn.Identity()
    for b, value in enumerate(want):
        loss, short = sft.ctc_loss(head, frames[b:b + 1, :lens[b]], lens[b:b + 1], texts[b:b + 1])
        assert float(loss) == pytest.approx(float(value), rel=1e-5) and short == 0
    loss, short = sft.ctc_loss(head, frames, lens, texts)
    assert float(loss) == pytest.approx(float(sum(want)), rel=1e-5) and short == 0


# ---- checkpoints and runs ----------------------------------------------------------------------------------
def test_checkpoint_has_its_name_only_when_complete_and_the_run_can_be_moved(tmp_path, monkeypatch):
    model, out = tiny_model(), tmp_path / "run"
    optimizer = make_optimizer(model, 1e-3, 0)
    save_checkpoint(out, 1, model, optimizer)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(type(model), "save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(out, 2, model, optimizer)
    monkeypatch.undo()
    assert not (out / "checkpoints" / "step-0000002").exists()
    assert os.readlink(out / "checkpoints" / "latest") == "step-0000001"
    (tmp_path / "elsewhere").mkdir()
    shutil.move(out, tmp_path / "elsewhere" / "moved")
    moved = tmp_path / "elsewhere" / "moved"
    assert torch.equal(SpeechLM.from_pretrained(moved / "model").head.weight, model.head.weight)
    with torch.no_grad():
        weight = model.head.weight.clone()
        model.head.weight.zero_()
    load_checkpoint(moved / "checkpoints" / "latest", model, optimizer)
    assert torch.equal(model.head.weight, weight)


@BOTH
def test_resume_refuses_other_arguments_and_fewer_steps(script, clips_dir, models, tmp_path):
    out = tmp_path / "run"
    before = train(script, clips_dir, models, out, "--steps", 2)
    with pytest.raises(InputError, match=r"--lr was 0\.001, now 0\.25;"):
        train(script, clips_dir, models, out, "--steps", 3, "--lr", 0.25, "--resume", "auto")
    with pytest.raises(InputError, match="--steps 1: .* is at step 2 already"):
        train(script, clips_dir, models, out, "--steps", 1, "--resume", "auto")
    assert metrics_of(out) == before and json.load(open(out / "config.json"))["args"]["lr"] == 1e-3


def test_without_git_a_run_works(clips_dir, models, tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "which", lambda name: None)
    opd_run(clips_dir, models, tmp_path / "run", "--steps", 1)
    assert json.load(open(tmp_path / "run" / "config.json"))["git"] is None
    monkeypatch.undo()
    for printed, want in (("0123abc\n", "0123abc"), ("", None)):            # in a repository, outside of one
        monkeypatch.setattr(subprocess, "run",
                            lambda *args, **kwargs: subprocess.CompletedProcess(args, 0, stdout=printed))
        assert data.git_commit() == want


def test_a_real_folder_in_the_links_place_is_refused(clips_dir, models, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "precious").write_text("keep")
    with pytest.raises(InputError, match="already holds a run"):
        opd_run(clips_dir, models, tmp_path / "run", "--steps", 1)
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["model", "precious"]


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights, name = weights_of(tmp_path), "model.audio_tower.layers.1.mlp.fc1.weight"
    for value in (float("nan"), float("inf")):
        weights[name][2, 3] = value
        safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=f"{name} holds NaN or infinite"):
            SpeechLM.from_pretrained(tmp_path)


def test_a_users_mistake_is_one_line_and_status_2_for_the_script_too():
    done = run("opd.py", "--train", "nowhere.jsonl", "--student", "x", "--teacher", "y", check=False)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("opd.py: error: manifest nowhere.jsonl") and "Traceback" not in done.stderr


# ---- rollouts of opd.py ------------------------------------------------------------------------------------
def test_sampled_rollouts_depend_on_the_seed_and_not_on_the_cut(clips_dir, models, tmp_path):
    def sampled(name, *more):
        lines = opd_run(clips_dir, models, tmp_path / name, "--batch-size", 12, "--lr", 1e-5, *more)
        return [m["positions"] for m in lines], [m["vuss"] for m in lines]

    hot = ["--temperature", 1, "--steps"]
    whole, cut = (sampled(str(s), *hot, 2, "--micro-seconds", s) for s in (1000, 0.1))
    assert whole[0] == cut[0] and whole[1] == pytest.approx(cut[1], rel=1e-3)
    for other in (sampled("greedy", "--steps", 1), sampled("seed", *hot, 1, "--seed", 1)):
        assert abs(other[1][0] / whole[1][0] - 1) > 2e-3                    # all 12 clips, the first weights


def test_every_step_and_every_clip_of_it_has_its_own_draws(clips_dir, models, tmp_path):
    """The same audio on two lines and weights that stand still: what differs is drawn."""
    line = json.loads(open(clips_dir / "m.jsonl").readline())
    write_manifest(clips_dir / "m.jsonl", [line, line])
    written = {}
    for temperature in (0, 1):
        out = tmp_path / str(temperature)
        opd_run(clips_dir, models, out, "--batch-size", 2, "--lr", 0, "--sample-every", 1,
                "--temperature", temperature)
        samples = [json.loads(text) for text in open(out / "samples.jsonl")]
        assert [s["step"] for s in samples] == [1, 1, 2, 2, 3, 3]
        written[temperature] = {tuple(s["tokens"]) for s in samples}
    assert len(written[0]) == 1 and len(written[1]) == 6


def test_length_caps_of_opd(clips_dir, models, tmp_path):
    student = tiny_model(0, tied=False)
    with torch.no_grad():
        student.head.weight[student.front_end.stop_id] = 0                  # never the largest: never stops
    student.save_pretrained(tmp_path / "endless")
    line = json.loads(open(clips_dir / "m.jsonl").readline())
    assert line["duration"] == 0.3
    write_manifest(clips_dir / "m.jsonl", [line] * 2)
    for flags, length in (("--max-new-tokens 64 --tokens-per-second 1", 16),         # 0.3 s × 1 + 16, rounded
                          ("--max-new-tokens 64 --tokens-per-second 8", 18),
                          ("--max-new-tokens 5 --tokens-per-second 8", 5),
                          ("--max-new-tokens 20 --tokens-per-second 0", 20)):
        metrics, = opd_run(clips_dir, (tmp_path / "endless", models[1]), tmp_path / flags, "--steps", 1,
                           "--batch-size", 2, *flags.split())
        assert (metrics["mean_tokens"], metrics["capped"], metrics["empty"]) == (length, 1, 0), flags


@BOTH
def test_too_long_clips_are_left_out_unread_and_counted(script, clips_dir, models, tmp_path, capsys):
    with open(clips_dir / "m.jsonl", "a") as file:
        file.write(json.dumps(dict(audio="missing.wav", duration=99, text="x")) + "\n")
    kept = [c for c in read_manifest(clips_dir / "m.jsonl") if c.duration <= 1]
    lines = train(script, clips_dir, models, tmp_path / "run", "--steps", 2, "--max-seconds", 1,
                  "--batch-size", 5)
    assert len(kept) == 5 and len(lines) == 2
    assert "train: 5 clips, " in (out := capsys.readouterr().out) and " 8 left out as longer than 1 s" in out


def test_eval_sets_and_samples_are_of_the_models_they_name(clips_dir, models, tmp_path):
    out, manifest = tmp_path / "run", str(clips_dir / "m.jsonl")
    opd_run(clips_dir, models, out, "--eval", manifest, "--sample-every", 1, "--eval-every", 2, "--lr", 1e-2)
    summary = json.load(open(out / "summary.json"))
    sets, decoded = evaluation.read_sets([manifest], 30), {}
    for step, key, folder in ((0, "before", models[0]), (3, "after", out / "model")):
        assert json.load(open(out / f"eval-{step}" / "summary.json")) == summary[key]
        again = evaluation.evaluate(SpeechLM.from_pretrained(folder), sets, torch.device("cpu"), 600,
                                    tmp_path / f"again-{step}")
        assert {**again["m"], "rtf": 0} == {**summary[key]["m"], "rtf": 0}          # the same but for speed
        decoded[step] = [json.loads(line)["hyp"] for line in open(out / f"eval-{step}" / "m.jsonl")]
    assert decoded[0] != decoded[3] and (out / "eval-2" / "summary.json").exists()
    teacher, clips = SpeechLM.from_pretrained(models[1]), {clip.where: clip for clip in sets["m"]}
    samples = [json.loads(line) for line in open(out / "samples.jsonl")]
    assert len(samples) == 6 and any(s["teacher"] != s["student"] for s in samples)
    for sample in samples:
        clip = clips[sample["clip"]]
        written = teacher.sample(collate([load_audio(clip)], teacher.front_end), 12, k=1, tokens_per_second=8)
        text = teacher.front_end.decode(written.ids[0, :int(written.lens[0])].tolist())
        assert sample["teacher"] == text and sample["ref"] == clip.text


# ---- vocabularies ------------------------------------------------------------------------------------------
ORDER = torch.randperm(256, generator=torch.Generator().manual_seed(0)).tolist()


def permuted(model, order):
    """The same model with byte token i at id order[i]: tokenizer, embeddings and head."""
    state = json.loads(model.front_end.tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] = {token: order[i] for token, i in state["model"]["vocab"].items()}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>",
        pad_token="<|endoftext|>")
    other = SpeechLM.from_config(tiny_config(width=48, hidden=64, tied=False), tokenizer).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for ours, theirs in ((other.lm.embed_tokens, model.lm.embed_tokens), (other.head, model.head)):
            ours.weight[order] = theirs.weight[:len(order)]
    return other


def test_a_teacher_with_other_ids_for_the_same_tokens_is_the_same_teacher():
    student, teacher = tiny_model(0), tiny_model(1, width=48, hidden=64, tied=False)
    waves, results = [noise(0.4 + 0.5 * i, seed=i) for i in range(4)], []
    for other in (teacher, permuted(teacher, ORDER)):
        alignment = align_vocabularies(student, other)
        batch, teacher_batch = collate(waves, student.front_end), collate(waves, other.front_end)
        rollout = student.sample(batch, 10, k=8, forbidden=alignment.student_forbidden)
        results.append((alignment, opd.score_rollout(other, alignment, batch, teacher_batch, rollout, 8)))
    (_, plain), (alignment, moved) = results
    assert alignment.to_teacher[:256].tolist() == ORDER
    assert alignment.to_teacher[student.front_end.stop_id] == teacher.front_end.stop_id
    for name in ("support_ids", "support_mask", "teacher_topk"):
        assert torch.equal(getattr(plain, name), getattr(moved, name)), name
    mask = plain.support_mask
    torch.testing.assert_close(moved.teacher_scores[mask], plain.teacher_scores[mask], rtol=1e-5, atol=1e-5)
    assert len(mask) > 20


def test_a_run_with_a_teacher_of_other_ids_is_the_same_run(clips_dir, models, tmp_path):
    """From the folders on: the teacher's own prompt ids, and its own text in samples.jsonl."""
    teacher, results = tiny_model(1, width=48, hidden=64, tied=False), []
    for name, other in (("plain", teacher), ("moved", permuted(teacher, ORDER))):
        other.save_pretrained(tmp_path / name)
        line, = opd_run(clips_dir, (models[0], tmp_path / name), tmp_path / f"{name}-run", "--steps", 1)
        samples = [json.loads(text) for text in open(tmp_path / f"{name}-run" / "samples.jsonl")]
        results.append(([line[key] for key in ("loss", "grad_norm", "vuss", "overlap_ratio", "positions")],
                        [(s["clip"], s["student"], s["teacher"]) for s in samples]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4) and results[0][1] == results[1][1]


@pytest.mark.parametrize("token", ["<extra>", "extra"])
def test_a_token_of_one_model_only_is_never_written_and_never_in_the_support(token):
    student, teacher = tiny_model(0, byte_tokenizer(extra=[token])), tiny_model(1, width=48, hidden=64)
    extra = student.front_end.tokenizer.convert_tokens_to_ids(token)
    alignment = align_vocabularies(student, teacher)
    assert extra == len(student.forbidden) - 1 == 264 and alignment.student_forbidden[extra]
    assert alignment.to_teacher[extra] == -1 and alignment.student_forbidden.sum() == 8
    batch = collate([noise(0.4), noise(0.9, seed=1)], student.front_end)
    # Almost flat, and the draw at the end of the table: the last id that may be written.
    draw = dict(temperature=1e6, k=1000, uniforms=torch.full((2, 6), 1 - 1e-9, dtype=torch.float64))
    free = student.sample(batch, 6, **draw)
    assert (free.ids == (student.front_end.stop_id if token == "<extra>" else extra)).all()
    rollout = student.sample(batch, 6, forbidden=alignment.student_forbidden, **draw)
    assert (rollout.ids[rollout.row_mask()] == student.front_end.stop_id).all()
    assert extra not in rollout.topk_ids and rollout.topk_ids.max() == student.front_end.stop_id
    # The other way round: a teacher that would always say it.
    student, teacher = tiny_model(0), tiny_model(1, byte_tokenizer(extra=[token]), tied=False)
    alignment = align_vocabularies(student, teacher)
    batch, teacher_batch = (collate([noise(0.9, seed=1)], model.front_end) for model in (student, teacher))
    rollout = student.sample(batch, 10, k=8, forbidden=alignment.student_forbidden)
    with torch.no_grad():
        teacher.head.weight[extra] = 100 * teacher(teacher_batch, rollout)[0].mean(0)
        assert (teacher.head(teacher(teacher_batch, rollout)[0]).argmax(1) == extra).any()
    scored = opd.score_rollout(teacher, alignment, batch, teacher_batch, rollout, 8)
    assert alignment.teacher_forbidden[extra] and (scored.teacher_topk >= 0).all()
    assert (scored.teacher_scores[scored.support_mask] > -1e4).all()


# ---- overlap.py, eval.py and sampling ----------------------------------------------------------------------
def test_kl_of_the_log_is_at_temperature_1_whatever_tau(clips_dir, models, tmp_path):
    line, = opd_run(clips_dir, models, tmp_path / "run", "--steps", 1, "--batch-size", 12, "--tau", 2)
    overlap.main(overlap.parse_args(["--student", str(models[0]), "--teacher", str(models[1]), "--k", "8",
                                     "--data", str(clips_dir / "m.jsonl"), "--max-new-tokens", "12",
                                     "--out", str(tmp_path / "o.json")]))
    row = json.load(open(tmp_path / "o.json"))["measures"]["all"]
    assert line["kl"] == pytest.approx(row["kl_union"], rel=1e-4)
    assert abs(line["loss"] / line["kl"] - 1) > 0.02


def test_quarters_are_of_each_clips_own_rows(monkeypatch):
    student, teacher = tiny_model(0), tiny_model(1, width=48, hidden=64)
    stop = student.front_end.stop_id
    rollout = Rollout(torch.full((4, 8), 65), torch.tensor([8, 2, 0, 4]),
                      torch.tensor([False, True, True, True]))
    for b, n in enumerate(rollout.lens.tolist()):
        rollout.ids[b, n:] = student.front_end.pad_id
        rollout.ids[b, n:n + 1] = stop
    rollout.topk_ids = torch.stack([torch.randperm(256, generator=torch.Generator().manual_seed(i))[:5]
                                    for i in range(32)]).reshape(4, 8, 5)
    monkeypatch.setattr(student, "sample", lambda *args, **kwargs: rollout)
    alignment, waves = align_vocabularies(student, teacher), [noise(0.3 + 0.4 * i, seed=i) for i in range(4)]
    parts = [overlap.measure(student, teacher, alignment, waves, None, 5, 8, 0, torch.device("cpu"), chunk)
             for chunk in (1024, 3)]
    for values, clip, quarter in parts:
        assert clip == [0] * 8 + [1] * 3 + [2] + [3] * 5
        assert quarter == [0, 0, 1, 1, 2, 2, 3, 3] + [0, 1, 2] + [0] + [0, 0, 1, 2, 3]
        assert set(values) == set(overlap.MEASURES) and all(len(value) == 17 for value in values.values())
    for name in overlap.MEASURES:
        torch.testing.assert_close(parts[0][0][name], parts[1][0][name], rtol=1e-4, atol=1e-5)


def test_sampling_has_no_dropout_and_leaves_the_mode_as_it_was():
    config = tiny_config()
    config["text_config"]["attention_dropout"] = 0.5
    torch.manual_seed(0)
    model = SpeechLM.from_config(config, byte_tokenizer()).train()
    batch = collate([noise(0.4), noise(1.1, seed=1)], model.front_end)
    with torch.no_grad():
        a, b = (model(batch, model.front_end.transcripts(["abc", "d"]))[0] for _ in range(2))
    assert (a - b).abs().max() > 1e-3                                       # training does drop
    first, second = (model.sample(batch, 10, k=4) for _ in range(2))
    assert torch.equal(first.ids, second.ids) and torch.equal(first.topk_ids, second.topk_ids)
    assert model.training and model.lm.training and model.encoder.training
    model.eval().sample(batch, 2)
    assert not model.training and not model.lm.training


def test_a_draw_of_0_is_the_first_allowed_id():
    model = tiny_model()
    forbidden = model.forbidden.clone()
    forbidden[:5] = True
    batch = collate([noise(0.4), noise(1.1, seed=1)], model.front_end)
    rollout = model.sample(batch, 6, temperature=1.0, forbidden=forbidden, uniforms=torch.zeros(2, 6))
    assert rollout.ids.tolist() == [[5] * 6] * 2


def test_empty_references_are_scored_and_not_just_read_out(clips_dir, models, monkeypatch, capsys):
    lines = [{**json.loads(line), "text": ""} for line in open(clips_dir / "m.jsonl")]
    write_manifest(clips_dir / "m.jsonl", lines)
    monkeypatch.setattr(evaluation, "transcribe",
                        lambda model, clips, *args, **kwargs: [dict(hyp="two words", stopped=True)] * len(clips))
    evaluation.main(evaluation.parse_args(["--model", str(models[0]), "--data", str(clips_dir / "m.jsonl")]))
    header, row, *_ = capsys.readouterr().out.splitlines()
    assert header.split()[:14] == "set metric % 95 % S D I clips hours empty loops capped failed".split()
    assert row.split()[:12] == "m WER – – 0 0 24 12 0.004 0 0 0".split()


def test_results_never_overwrite_the_manifest(clips_dir, models):
    manifest = clips_dir / "m.jsonl"
    before = manifest.read_bytes()
    for out in (clips_dir, clips_dir / "student" / ".."):
        with pytest.raises(InputError, match="the result would overwrite the manifest"):
            evaluation.main(evaluation.parse_args(["--model", str(models[0]), "--data", str(manifest),
                                                   "--out", str(out)]))
    assert manifest.read_bytes() == before
