"""sft.py: its step by its definition, what of a transcript is learned, CTC and SpecAugment."""

import pytest
import runs
import torch
import torch.nn.functional as F
from conftest import qwen3_asr_folder

import data
import model
import sft

on_cpu = pytest.fixture(autouse=True, scope="module")(runs.run_on_cpu)


def test_a_step_of_sft_is_its_definition(stage, tmp_path):
    """Mean cross-entropy of transcript and stop tokens, plus 0.5 times the clips' mean CTC per byte."""
    # A learning rate of 0 leaves the drawn CTC head in the checkpoint.
    flags = ["--batch-size", 5, "--clip", 0, "--ctc-weight", 0.5, "--lr", 0, "--micro-seconds", 3]
    line = runs.train(sft, stage, tmp_path / "run", *flags)[0]
    student = model.SpeechLM.from_pretrained(stage / "student").train()
    state = runs.state_of(tmp_path / "run", 1)
    head = torch.nn.Linear(student.config.audio_config.hidden_size, 257)
    head.weight.data = state["ctc_head.weight"]
    head.bias.data = state["ctc_head.bias"]
    entropies = []
    ctc = []
    for clip in runs.longest_clips(stage, 5):
        batch = data.collate([data.load_audio(clip)], student.front_end, [clip.language])
        logits = student.head(student(batch, student.front_end.transcripts([clip.text])))
        target_ids = [*student.front_end.token_ids(clip.text), student.front_end.stop_id]
        entropies += F.cross_entropy(logits, torch.tensor(target_ids), reduction="none")
        classes = torch.tensor([byte + 1 for byte in clip.text.encode()])
        log_probs = head(student.encode_frames(batch)[0]).log_softmax(dim=1)  # (T', 257)
        total = F.ctc_loss(log_probs, classes, [len(log_probs)], [len(classes)], reduction="sum")
        ctc.append(total / len(classes))
    entropy = sum(entropies) / len(entropies)
    mean_ctc = sum(ctc) / len(ctc)
    (entropy + 0.5 * mean_ctc).backward()
    assert line["tokens"] == len(entropies) and line["ctc_too_short"] == 0
    assert line["loss"] == pytest.approx(entropy.item(), rel=1e-5)
    assert line["ctc"] == pytest.approx(mean_ctc.item(), rel=1e-5)
    gradient = {name: parameter.grad for name, parameter in student.named_parameters()}
    gradient |= {"ctc_head.weight": head.weight.grad, "ctc_head.bias": head.bias.grad}
    runs.assert_same_gradient(runs.gradient_of(tmp_path / "run"), gradient, 1e-5)


def test_a_models_transcripts_are_learned_as_they_are(stage, tmp_path, capsys):
    """A cut one has no stop token and no CTC, a looping one is left out, a clip that failed has none."""
    audio = runs.lines_of(stage / "m.jsonl")
    looping = "la " * 30
    lines = [
        {**audio[0], "hyp": "abc", "stopped": True},
        {**audio[1], "hyp": "ab", "stopped": False},
        {**audio[2], "hyp": looping, "stopped": False},
        {**audio[3], "error": "3.wav: holds no samples"},
    ]
    path = runs.write_lines(tmp_path / "td.jsonl", lines)
    flags = ["--train", path, "--text-field", "hyp", "--batch-size", 3, "--ctc-weight", 0.5]
    out = tmp_path / "all"
    line = runs.train(sft, stage, out, *flags)[0]
    assert (line["tokens"], line["cut"]) == (3 + 1 + 2 + len(looping), 2 / 3)
    assert "1 not decoded, 0 looping\n" in capsys.readouterr().out
    out = tmp_path / "dropped"
    flags += ["--batch-size", 2, "--lr", 0, "--drop-looping"]
    line = runs.train(sft, stage, out, *flags)[0]
    assert (line["tokens"], line["cut"]) == (3 + 1 + 2, 1 / 2)
    assert "1 not decoded, 1 looping\n" in capsys.readouterr().out
    # CTC is of the complete transcript alone, over both clips.
    student = model.SpeechLM.from_pretrained(stage / "student")
    state = runs.state_of(out, 1)
    batch = data.collate([data.load_audio(data.read_manifest(path)[0])], student.front_end, ["en"])
    frames = student.encode_frames(batch)
    logits = F.linear(frames, state["ctc_head.weight"], state["ctc_head.bias"])
    expected, _ = sft.ctc_loss(torch.nn.Identity(), logits, batch.mel_lens // 2, ["abc"])
    assert line["ctc"] == pytest.approx(expected.item() / 2, rel=1e-5)
    # A reference is complete, whatever `stopped` says: that is of the hypothesis.
    line = runs.train(sft, stage, tmp_path / "text", "--train", path, "--batch-size", 4)[0]
    assert line["cut"] == 0
    assert line["tokens"] == sum(len(line["text"]) + 1 for line in audio[:4])


def test_ctc_for_qwen3_asr_is_refused_at_the_start(stage, tmp_path, capsys):
    """Its encoder has no frames of a fixed rate."""
    flags = ["--model", qwen3_asr_folder(tmp_path / "student"), "--ctc-weight", 1]
    assert runs.status_of(sft, runs.argv_of(sft, stage, tmp_path / "run", *flags)) == 2
    assert "--ctc-weight" in runs.error_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_ctc_by_hand():
    """Per byte, summed over clips; None has no loss. As many frames as bytes leave one path: a frame a byte.

    Text "a" in two frames: the paths aa, a-, -a. Text "aa" wants a blank between, so three frames.
    """
    frames = torch.randn(7, 2, 257, generator=torch.Generator().manual_seed(0))
    log_p = frames.log_softmax(dim=2)
    a = 1 + ord("a")
    cases = [  # text, frames, loss
        ("ab", 2, -(log_p[0, 0, a] + log_p[0, 1, a + 1]) / 2),
        ("c", 1, -log_p[1, 0, a + 2]),
        ("é", 2, -(log_p[2, 0, 1 + 0xC3] + log_p[2, 1, 1 + 0xA9]) / 2),  # two bytes
        ("", 1, -log_p[3, 0, 0]),
        (None, 2, torch.zeros(())),
        ("a", 2, -(log_p[5, 0, [a, a, 0]] + log_p[5, 1, [a, 0, a]]).logsumexp(dim=0)),
        ("aa", 2, torch.zeros(())),
    ]
    head = torch.nn.Identity()
    for b, (text, n_frames, expected) in enumerate(cases):
        clip_frames = frames[b : b + 1, :n_frames]
        loss, n_too_short = sft.ctc_loss(head, clip_frames, torch.tensor([n_frames]), [text])
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert n_too_short == (text == "aa")
    texts, lens, losses = zip(*cases)
    loss, n_too_short = sft.ctc_loss(head, frames, torch.tensor(lens), texts)
    assert loss.item() == pytest.approx(sum(losses).item(), rel=1e-5) and n_too_short == 1


def augmentation(*flags):
    return sft.parse_args(["--train", "m.jsonl", "--model", "m", *map(str, flags)])


def test_spec_augment_is_a_function_of_seed_step_and_clip():
    mel = torch.randn(128, 200, generator=torch.Generator().manual_seed(0))
    original = mel.clone()
    masks = ["--time-masks", 2, "--freq-masks", 2]
    args = augmentation(*masks)
    first = sft.spec_augment(mel, args, 3, 5)
    assert torch.equal(first, sft.spec_augment(mel, args, 3, 5))
    assert not torch.equal(first, mel)
    others = [sft.spec_augment(mel, args, 4, 5), sft.spec_augment(mel, args, 3, 6)]
    others.append(sft.spec_augment(mel, augmentation(*masks, "--seed", 1), 3, 5))
    assert not any(torch.equal(first, other) for other in others)
    assert torch.equal(sft.spec_augment(mel, augmentation(), 3, 5), mel)
    assert torch.equal(mel, original)


@pytest.mark.parametrize(
    "flags, axis, widest",
    [
        (["--time-masks", 1, "--time-width", 6], 1, 6),
        (["--time-masks", 1], 1, 10),  # at most a quarter of the 40 frames
        (["--freq-masks", 1, "--freq-width", 9], 0, 9),
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
