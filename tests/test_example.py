"""The embedded example: what is shipped, and (slow) that the main command does what the README says."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import opd
from conftest import ROOT
from data import load_audio, read_manifest
from model import SpeechLM, align_vocabularies

EXAMPLE = ROOT / "example"
TESTS = ["en-clean", "en-other", "zh-read", "zh-net", "zh-meeting"]


def clips_of(*names):
    return [clip for name in names for clip in read_manifest(EXAMPLE / f"{name}.jsonl")]


def test_amounts_and_sizes():
    assert sum(clip.duration for clip in clips_of("train")) >= 40 * 60
    assert all(90 <= len(clips_of(name)) <= 110 for name in TESTS)
    assert all(1 <= clip.duration <= 4 for clip in clips_of("train", "dev", *TESTS))
    assert sum(path.stat().st_size for path in EXAMPLE.glob("*.tar")) <= 12e6
    models = [path for name in ("teacher", "base") for path in (EXAMPLE / name).rglob("*")]
    assert sum(path.stat().st_size for path in models) <= 12e6


def test_test_voices_and_sentences_are_not_in_training():
    train, others = clips_of("train"), clips_of("dev", *TESTS)
    for what in (lambda clip: clip.text, lambda clip: clip.fields["speaker"]):
        assert not {what(clip) for clip in train} & {what(clip) for clip in others}
        assert not {what(clip) for clip in clips_of("dev")} & {what(clip) for clip in clips_of(*TESTS)}
    labelled = {clip.key for clip in clips_of("labelled")}
    assert labelled < {clip.key for clip in train}


def test_words_and_characters():
    clips = clips_of("train", "dev", *TESTS)
    words = {word for clip in clips if clip.language == "en" for word in clip.text.split()}
    characters = {c for clip in clips if clip.language == "zh" for c in clip.text}
    assert 40 <= len(words) <= 120 and 40 <= len(characters) <= 120


def test_clips_sound():
    """Every 20th clip: decodes to its duration, is neither silent nor clipped."""
    for clip in clips_of("train", "dev", *TESTS)[::20]:
        waveform = load_audio(clip)
        assert 0.003 < waveform.square().mean().sqrt() < 0.5
        assert abs(len(waveform) / 16000 - clip.duration) < 0.002


@pytest.mark.parametrize("name", ["teacher", "base"])
def test_models_are_stock_folders_in_float32(name):
    weights = safetensors.torch.load_file(EXAMPLE / name / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert "model.audio_tower.conv1.weight" in weights
    net = transformers.GlmAsrForConditionalGeneration.from_pretrained(EXAMPLE / name)
    processor = transformers.AutoProcessor.from_pretrained(EXAMPLE / name)
    ours = SpeechLM.from_pretrained(EXAMPLE / name)
    from data import collate
    for clip in clips_of("en-clean", "zh-read")[::40]:
        waveform = load_audio(clip)
        inputs = processor.apply_transcription_request(
            waveform.numpy(),
            processor_kwargs=dict(audio_kwargs=dict(padding="longest", pad_to_multiple_of=1280)))
        ids = net.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1]:]
        rollout = ours.sample(collate([waveform], ours.front_end), 64)
        text = ours.front_end.decode(rollout.ids[0, :rollout.lens[0]].tolist())
        assert processor.decode(ids, skip_special_tokens=True) == text


def test_teacher_and_base_share_one_vocabulary():
    base, teacher = (SpeechLM.from_pretrained(EXAMPLE / name) for name in ("base", "teacher"))
    alignment = align_vocabularies(base, teacher)
    assert torch.equal(alignment.student_forbidden, base.forbidden)
    assert sum(p.numel() for p in base.parameters()) < sum(p.numel() for p in teacher.parameters())


def test_defaults_are_the_papers_and_the_example_sets_its_own():
    paper = opd.parse_args(["--train", "m", "--student", "s", "--teacher", "t"])
    assert (paper.k, paper.tau, paper.temperature, paper.lr, paper.batch_size, paper.warmup_steps,
            paper.weight_decay, paper.clip, paper.max_new_tokens) == (32, 1.0, 0.0, 1e-4, 960, 1000,
                                                                      0.005, 1.0, 64)
    args = opd.parse_args([f"@{EXAMPLE / 'opd.args'}"])
    assert args.train == ["example/train.jsonl"]
    assert (args.student, args.teacher) == ("example/base", "example/teacher")
    assert args.eval == [f"example/{name}.jsonl" for name in TESTS]
    assert (args.k, args.tau, args.temperature, args.weight_decay, args.clip) == (32, 1.0, 0.0, 0.005, 1.0)


@pytest.mark.slow
def test_the_main_command(tmp_path):
    """README, quick start: mean error falls by at least 15 %, four of five sets improve, 2 GB a process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "opd.py",
               "@example/opd.args", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.load(open(tmp_path / "run/summary.json"))
    before, after = ([summary[when][name]["value"] for name in TESTS] for when in ("before", "after"))
    assert np.mean(after) <= 0.85 * np.mean(before)
    assert sum(a < b for a, b in zip(after, before)) >= 4
    assert summary["vuss_last"] < summary["vuss_first"]
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["rss_gb"] < 2
