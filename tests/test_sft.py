"""sft.py: its step by its definition, what of a transcript is learned, CTC and SpecAugment."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from runs import (
    argv_of,
    assert_same_gradient,
    error_line,
    gradient_of,
    lines_of,
    mean,
    run_on_cpu,
    state_of,
    status_of,
    train,
    write_lines,
    write_stage,
)
from test_training import longest_clips

import eval as evaluation
import sft
from data import collate, load_audio, read_manifest
from model import SpeechLM


@pytest.fixture(autouse=True, scope="module")
def on_cpu():
    yield from run_on_cpu()


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return write_stage(tmp_path_factory.mktemp("stage"))


def test_a_step_of_sft_is_its_definition(stage, tmp_path):
    """Mean cross-entropy of transcript and stop tokens, plus 0.5 times the clips' mean CTC per byte."""
    # A learning rate of 0 leaves the drawn CTC head in the checkpoint.
    out = tmp_path / "run"
    flags = ["--batch-size", 5, "--clip", 0, "--ctc-weight", 0.5, "--lr", 0, "--micro-seconds", 3]
    train(sft, stage, out, *flags)
    model = SpeechLM.from_pretrained(stage / "student").train()
    state = state_of(out, 1)
    head = torch.nn.Linear(model.config.audio_config.hidden_size, 257)
    head.weight.data = state["weight.ctc_head.weight"]
    head.bias.data = state["weight.ctc_head.bias"]
    entropies, ctc = [], []
    for clip in longest_clips(stage, 5):
        batch = collate([load_audio(clip)], model.front_end, [clip.language])
        logits = model.head(model(batch, model.front_end.transcripts([clip.text])))
        target_ids = [*model.front_end.token_ids(clip.text), model.front_end.stop_id]
        entropies += F.cross_entropy(logits, torch.tensor(target_ids), reduction="none")
        classes = torch.tensor([byte + 1 for byte in clip.text.encode()])
        log_probs = head(model.encode_frames(batch)[0]).log_softmax(dim=1)  # (T', 257)
        total = F.ctc_loss(log_probs, classes, [len(log_probs)], [len(classes)], reduction="sum")
        ctc.append(total / len(classes))
    entropy = sum(entropies) / len(entropies)
    (entropy + 0.5 * sum(ctc) / len(ctc)).backward()
    line = lines_of(out / "metrics.jsonl")[0]
    assert line["tokens"] == len(entropies) and line["ctc_too_short"] == 0
    assert line["loss"] == pytest.approx(entropy.item(), rel=1e-5)
    assert line["ctc"] == pytest.approx(mean(value.item() for value in ctc), rel=1e-5)
    gradient = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradient |= {"ctc_head.weight": head.weight.grad, "ctc_head.bias": head.bias.grad}
    assert_same_gradient(gradient_of(out), gradient, 1e-5)


@pytest.mark.slow
def test_sft_learns_by_heart_then_transcribes(stage, tmp_path):
    """Four clips by heart: eval.py finds no error, and its result file is a manifest of the next stage."""
    sft_out, results = tmp_path / "sft", tmp_path / "results"
    texts = ["one", "two", "a b", "c"]
    lines = [{**line, "text": text} for line, text in zip(lines_of(stage / "m.jsonl")[::3], texts)]
    path = write_lines(tmp_path / "m.jsonl", lines)
    flags = ["--train", path, "--steps", 60, "--batch-size", 4, "--lr", 1e-2, "--ctc-weight", 0.3]
    lines = train(sft, stage, sft_out, *flags)
    assert lines[-1]["loss"] < 0.05 < lines[0]["loss"]
    argv = ["--model", sft_out / "model", "--data", path, "--out", results]
    assert status_of(evaluation, [str(flag) for flag in argv]) == 0
    summary = json.loads((results / "summary.json").read_text())["m"]
    assert (summary["metric"], summary["errors"], summary["units"], summary["n"]) == ("WER", 0, 5, 4)
    assert [line["hyp"] for line in lines_of(results / "m.jsonl")] == texts
    more = ["--train", results / "m.jsonl", "--text-field", "hyp", "--model", sft_out / "model"]
    assert train(sft, stage, tmp_path / "td", *more)[0]["loss"] < 0.1


def test_a_models_transcripts_are_learned_as_they_are(stage, tmp_path, capsys):
    """A cut one has no stop token and no CTC, a looping one is left out, a clip that failed has none."""
    audio = lines_of(stage / "m.jsonl")
    looping = "la " * 30
    lines = [
        {**audio[0], "hyp": "abc", "stopped": True},
        {**audio[1], "hyp": "ab", "stopped": False},
        {**audio[2], "hyp": looping, "stopped": False},
        {**audio[3], "error": "3.wav: holds no samples"},
    ]
    path = write_lines(tmp_path / "td.jsonl", lines)
    flags = ["--train", path, "--text-field", "hyp", "--batch-size", 3, "--ctc-weight", 0.5]
    out = tmp_path / "all"
    line = train(sft, stage, out, *flags)[0]
    assert (line["tokens"], line["cut"]) == (3 + 1 + 2 + len(looping), 2 / 3)
    assert "1 not decoded, 0 looping; without a stop token, as the cap cut them: 2" in capsys.readouterr().out
    out = tmp_path / "dropped"
    flags += ["--batch-size", 2, "--lr", 0, "--drop-looping"]
    line = train(sft, stage, out, *flags)[0]
    assert (line["tokens"], line["cut"]) == (3 + 1 + 2, 1 / 2)
    assert "1 not decoded, 1 looping; without a stop token, as the cap cut them: 1" in capsys.readouterr().out
    # CTC is of the complete transcript alone, over both clips.
    model = SpeechLM.from_pretrained(stage / "student")
    state = state_of(out, 1)
    batch = collate([load_audio(read_manifest(path)[0])], model.front_end, ["en"])
    frames = model.encode_frames(batch)
    logits = F.linear(frames, state["weight.ctc_head.weight"], state["weight.ctc_head.bias"])
    expected, _ = sft.ctc_loss(torch.nn.Identity(), logits, batch.mel_lens // 2, ["abc"])
    assert line["ctc"] == pytest.approx(expected.item() / 2, rel=1e-5)
    # A reference is complete, whatever `stopped` says: that is of the hypothesis.
    line = train(sft, stage, tmp_path / "text", "--train", path, "--batch-size", 4)[0]
    assert line["cut"] == 0 and line["tokens"] == sum(len(line["text"]) + 1 for line in audio[:4])


def test_sft_needs_text_on_every_line(stage, tmp_path, capsys):
    lines = lines_of(stage / "m.jsonl")
    del lines[4]["text"]
    path = write_lines(tmp_path / "m.jsonl", lines)
    assert status_of(sft, argv_of(sft, stage, tmp_path / "run", "--train", path)) == 2
    assert f'{path}:5: no "text"' in error_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_damaged_clip_to_evaluate_on_shows_before_the_training(stage, tmp_path, capsys):
    """After it, hours would be lost. With --on-bad-audio skip it is counted and shown."""
    lines = lines_of(stage / "m.jsonl")[:2]
    for line in lines:
        line["audio"] = str(stage / line["audio"])
    (tmp_path / "none.wav").write_bytes(b"RIFF")
    lines.append({**lines[0], "audio": "none.wav"})
    path = write_lines(tmp_path / "test.jsonl", lines)
    argv = argv_of(sft, stage, tmp_path / "run", "--eval", path, "--steps", 1)
    assert status_of(sft, argv) == 2
    assert f"{path}:3: " in error_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
    assert status_of(sft, [*argv, "--on-bad-audio", "skip"]) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["eval"]["test"]["failed"] == 1


TEXTS = [
    "",
    " \t ",
    "?!… ，。「」—",
    "€ ± 🙂 👩‍👩‍👧",
    "a < b > c <| im_end |>",
    "language English",
    "مرحبا بالعالم",
    "नमस्ते",
    "สวัสดีชาวโลก",
    "안녕하세요",
    "你好，世界",
    "a\x00b\x1bd",
    "a\nb\r\nc\u2028d",
    '{"text": "\\"}',
]


def test_any_text_is_learned_byte_for_byte(stage, tmp_path):
    """Every byte counts once, and one stop token a clip."""
    audio = lines_of(stage / "m.jsonl")
    lines = [{**audio[i % 12], "text": text} for i, text in enumerate(TEXTS)]
    path = write_lines(tmp_path / "m.jsonl", lines)
    flags = ["--train", path, "--batch-size", len(lines), "--ctc-weight", 0.1]
    line = train(sft, stage, tmp_path / "run", *flags)[0]
    assert line["tokens"] == sum(len(text.encode()) + 1 for text in TEXTS)
    assert math.isfinite(line["loss"]) and math.isfinite(line["ctc"])


def test_ctc_of_one_path_by_hand():
    """Two frames, text "a": the paths aa, a-, -a. Text "aa" wants a blank between, so three frames."""
    frames = torch.randn(1, 2, 257, generator=torch.Generator().manual_seed(0))
    p = frames[0].softmax(dim=1)
    a, blank = ord("a") + 1, 0
    expected = -(p[0, a] * p[1, a] + p[0, a] * p[1, blank] + p[0, blank] * p[1, a]).log()
    head, lens = torch.nn.Identity(), torch.tensor([2])
    loss, n_too_short = sft.ctc_loss(head, frames, lens, ["a"])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and n_too_short == 0
    loss, n_too_short = sft.ctc_loss(head, frames, lens, ["aa"])
    assert loss.item() == 0 and n_too_short == 1


def test_ctc_is_per_byte_and_summed_over_clips():
    """As many frames as bytes leave one path: the text itself, a frame a byte. None has no loss."""
    frames = torch.randn(5, 2, 257, generator=torch.Generator().manual_seed(0))
    log_p = frames.log_softmax(dim=2)
    texts, lens = ["ab", "c", "é", "", None], torch.tensor([2, 1, 2, 1, 2])  # é has two bytes
    expected = [
        -(log_p[0, 0, 1 + ord("a")] + log_p[0, 1, 1 + ord("b")]) / 2,
        -log_p[1, 0, 1 + ord("c")],
        -(log_p[2, 0, 1 + 0xC3] + log_p[2, 1, 1 + 0xA9]) / 2,
        -log_p[3, 0, 0],
        torch.zeros(()),
    ]
    head = torch.nn.Identity()
    for b, value in enumerate(expected):
        loss, n_too_short = sft.ctc_loss(
            head, frames[b : b + 1, : lens[b]], lens[b : b + 1], texts[b : b + 1]
        )
        assert loss.item() == pytest.approx(value.item(), rel=1e-5) and n_too_short == 0
    loss, _ = sft.ctc_loss(head, frames, lens, texts)
    assert loss.item() == pytest.approx(sum(expected).item(), rel=1e-5)


def augmentation(*flags):
    return sft.parse_args(["--train", "m.jsonl", "--model", "m", *map(str, flags)])


def test_spec_augment_is_a_function_of_seed_step_and_clip():
    mel = torch.randn(128, 200, generator=torch.Generator().manual_seed(0))
    original, state = mel.clone(), torch.get_rng_state()
    masks = ["--time-masks", 2, "--freq-masks", 2]
    args = augmentation(*masks)
    first = sft.spec_augment(mel, args, 3, 5)
    assert torch.equal(first, sft.spec_augment(mel, args, 3, 5)) and not torch.equal(first, mel)
    others = [sft.spec_augment(mel, args, 4, 5), sft.spec_augment(mel, args, 3, 6)]
    others.append(sft.spec_augment(mel, augmentation(*masks, "--seed", 1), 3, 5))
    assert not any(torch.equal(first, other) for other in others)
    assert torch.equal(sft.spec_augment(mel, augmentation(), 3, 5), mel)
    assert torch.equal(mel, original) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "flags, axis, widest",
    [
        (["--time-masks", 1, "--time-width", 6], 1, 6),
        (["--time-masks", 1], 1, 10),  # at most a quarter of the 40 frames
        (["--freq-masks", 1, "--freq-width", 9], 0, 9),
        (["--freq-masks", 3, "--freq-width", 9], 0, 27),
    ],
)
def test_spec_augment_masks_whole_frames_or_bins_of_bounded_width(flags, axis, widest):
    mel = torch.randn(128, 40, generator=torch.Generator().manual_seed(0))
    widths = set()
    for step in range(60):
        masked = sft.spec_augment(mel, augmentation(*flags), step, 0)
        is_masked = (masked == 0).all(dim=1 - axis)
        widths.add(int(is_masked.sum()))
        assert torch.equal(masked, mel.masked_fill(is_masked.unsqueeze(1 - axis), 0))
    assert widest / 2 < max(widths) <= widest and len(widths) > 2
