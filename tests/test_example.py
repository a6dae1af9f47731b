"""The embedded example: what is shipped, and (slow) that the main command does what the README says."""

import collections
import json
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from conftest import ROOT
from runs import lines_of, run_command

import opd
from data import collate, load_audio, read_manifest
from model import SpeechLM, align_vocabularies

EXAMPLE = ROOT / "example"
sys.path.insert(0, str(EXAMPLE))

import make  # noqa: E402

TESTS = ["en-clean", "en-other", "zh-read", "zh-net", "zh-meeting"]


def clips_of(*names):
    clips = []
    for name in names:
        clips += read_manifest(EXAMPLE / f"{name}.jsonl")
    return clips


def test_amounts_and_sizes():
    assert sum(clip.duration for clip in clips_of("train")) >= 40 * 60
    assert all(90 <= len(clips_of(name)) <= 128 for name in TESTS)
    assert 100 <= len(clips_of("dev")) <= 160
    assert all(1 <= clip.duration <= 4 for clip in clips_of("train", "dev", *TESTS))
    assert sum(path.stat().st_size for path in EXAMPLE.glob("*.tar")) <= 12e6
    models = [path for name in ("teacher", "base") for path in (EXAMPLE / name).rglob("*")]
    assert sum(path.stat().st_size for path in models) <= 12e6


def variant_of(speaker):
    """What makes a voice, in either language: "zh+m3" and "en-us+m3" are one variant."""
    return speaker.split("+")[1]


def test_training_dev_and_tests_share_no_voice_and_no_sentence():
    """Nor do the sets that are not shipped: what teacher and base learned from."""
    sets = [clips_of("train"), clips_of("dev"), clips_of(*TESTS)]
    texts = [{clip.text for clip in clips} for clips in sets]
    voices = [{variant_of(clip.fields["speaker"]) for clip in clips} for clips in sets]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not texts[a] & texts[b] and not voices[a] & voices[b]
    for name, heard in (("dev", voices[1]), ("test", voices[2])):
        for speaker in make.EXTRA["en"] + make.EXTRA["zh"]:
            assert variant_of(speaker) not in heard, (name, speaker)


def test_test_sets_hold_enough_voices():
    """At least 15 voices in each set, with 6 to 8 clips each; dev has eight voices a language."""
    for name in TESTS:
        counts = collections.Counter(clip.fields["speaker"] for clip in clips_of(name))
        assert len(counts) >= 15 and set(counts.values()) <= {6, 7, 8}, name
    dev = {(clip.language, clip.fields["speaker"]) for clip in clips_of("dev")}
    assert collections.Counter(language for language, _ in dev) == {"en": 8, "zh": 8}


def test_words_and_characters():
    words, characters = set(), set()
    for clip in clips_of("train", "dev", *TESTS):
        if clip.language == "en":
            words |= set(clip.text.split())
        else:
            characters |= set(clip.text)
    assert 40 <= len(words) <= 120 and 40 <= len(characters) <= 120


def test_clips_sound():
    """Every 20th clip: decodes to its duration, is neither silent nor clipped."""
    for clip in clips_of("train", "dev", *TESTS)[::20]:
        waveform = load_audio(clip)
        assert 0.003 < waveform.square().mean().sqrt() < 0.5
        assert abs(len(waveform) / 16000 - clip.duration) < 0.002


@pytest.mark.parametrize("name", ["teacher", "base"])
def test_models_are_stock_folders_in_float32(name):
    """Stock transformers loads them and writes what ours writes."""
    weights = safetensors.torch.load_file(EXAMPLE / name / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    stock = transformers.GlmAsrForConditionalGeneration.from_pretrained(EXAMPLE / name)
    processor = transformers.AutoProcessor.from_pretrained(EXAMPLE / name)
    ours = SpeechLM.from_pretrained(EXAMPLE / name).eval()
    # As the README shows it: the clip alone, padded to a multiple of 80 ms.
    padding = {"audio_kwargs": {"padding": "longest", "pad_to_multiple_of": 1280}}
    for clip in clips_of("en-clean", "zh-read")[::40]:
        waveform = load_audio(clip)
        inputs = processor.apply_transcription_request(waveform.numpy(), processor_kwargs=padding)
        ids = stock.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
        rollout = ours.sample(collate([waveform], ours.front_end, [clip.language]), 64)
        text = ours.front_end.texts(rollout)[0]
        assert processor.decode(ids, skip_special_tokens=True) == text and text


def test_teacher_and_base_share_one_vocabulary():
    base, teacher = (SpeechLM.from_pretrained(EXAMPLE / name) for name in ("base", "teacher"))
    alignment = align_vocabularies(base, teacher)
    assert torch.equal(alignment.student_forbidden, base.forbidden)
    assert sum(p.numel() for p in base.parameters()) < sum(p.numel() for p in teacher.parameters())


def test_defaults_are_the_papers_and_the_example_sets_its_own():
    paper = {
        "k": 32,
        "support": "union",
        "tau": 1.0,
        "temperature": 0.0,
        "lr": 1e-4,
        "batch_size": 960,
        "warmup_steps": 1000,
        "weight_decay": 0.005,
        "clip": 1.0,
        "max_new_tokens": 64,
    }
    defaults = vars(opd.parse_args(["--train", "m", "--student", "s", "--teacher", "t"]))
    assert {key: defaults[key] for key in paper} == paper
    args = vars(opd.parse_args([f"@{EXAMPLE / 'opd.args'}"]))
    assert (args["student"], args["teacher"]) == ("example/base", "example/teacher")
    assert args["train"] == ["example/train.jsonl"]
    assert args["eval"] == [f"example/{name}.jsonl" for name in TESTS]
    for key in ("k", "support", "tau", "temperature", "weight_decay", "clip", "max_new_tokens"):
        assert args[key] == paper[key]


@pytest.mark.slow
def test_the_main_command(tmp_path):
    """README, quick start: mean error falls by 15 % or more, four of five sets improve, 2 GB a process."""
    out = tmp_path / "run"
    status, text = run_command("opd.py", ["@example/opd.args", "--out", out], nproc=2, seconds=1200)
    assert status == 0, text[-3000:]
    summary = json.loads((out / "summary.json").read_text())
    before, after = ([summary[when][name]["value"] for name in TESTS] for when in ("before", "after"))
    assert np.mean(after) <= 0.85 * np.mean(before)
    assert sum(a < b for a, b in zip(after, before)) >= 4
    lines = lines_of(out / "metrics.jsonl")
    kl = [line["kl"] for line in lines]
    assert np.mean(kl[-10:]) < 0.7 * np.mean(kl[:10])
    assert lines[-1]["rss_gb"] < 2
    change = summary["change"]["macro"]
    assert change["relative_high"] < 0 and change["clusters"] == 40
