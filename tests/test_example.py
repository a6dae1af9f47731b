"""The embedded example: what is shipped, and (slow) that the main command does what the README says."""

import json
import subprocess
import sys

import numpy as np
import pytest
import runs
import safetensors.torch
import torch
import transformers
from conftest import ROOT

import data
import model
import opd

EXAMPLE = ROOT / "example"
sys.path.insert(0, str(EXAMPLE))

import make  # noqa: E402

TESTS = ["en-clean", "en-other", "zh-read", "zh-net", "zh-meeting"]


@pytest.fixture(scope="module")
def clips():
    """{set: its clips}"""
    return {name: data.read_manifest(EXAMPLE / f"{name}.jsonl") for name in ("train", "dev", *TESTS)}


def test_training_dev_and_tests_share_no_voice_and_no_sentence(clips):
    """Nor do the sets that are not shipped: what teacher and base learned from."""

    def variant_of(speaker):
        """What makes a voice, in either language: "zh+m3" and "en-us+m3" are one variant."""
        return speaker.split("+")[1]

    tests = sum((clips[name] for name in TESTS), [])
    parts = [clips["train"], clips["dev"], tests]
    texts = [{clip.text for clip in part} for part in parts]
    voices = [{variant_of(clip.fields["speaker"]) for clip in part} for part in parts]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not texts[a] & texts[b]
        assert not voices[a] & voices[b]
    extra = {variant_of(speaker) for speaker in make.EXTRA["en"] + make.EXTRA["zh"]}
    assert not extra & (voices[1] | voices[2])
    fresh = {variant_of(speaker) for speaker in make.FRESH["en"] + make.FRESH["zh"]}
    assert not fresh & (extra | voices[0] | voices[1] | voices[2])


@pytest.mark.parametrize("name", ["teacher", "base"])
def test_models_are_stock_folders_in_float32(name, clips):
    """Stock transformers loads them and writes what ours writes."""
    weights = safetensors.torch.load_file(EXAMPLE / name / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    stock = transformers.GlmAsrForConditionalGeneration.from_pretrained(EXAMPLE / name)
    processor = transformers.AutoProcessor.from_pretrained(EXAMPLE / name)
    ours = model.SpeechLM.from_pretrained(EXAMPLE / name).eval()
    # As the README shows it: the clip alone, padded to a multiple of 80 ms.
    padding = {"audio_kwargs": {"padding": "longest", "pad_to_multiple_of": 1280}}
    for clip in clips["en-clean"][::60] + clips["zh-read"][::60]:
        waveform = data.load_audio(clip)
        inputs = processor.apply_transcription_request(waveform.numpy(), processor_kwargs=padding)
        ids = stock.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
        rollout = ours.sample(data.collate([waveform], ours.front_end, [clip.language]), 64)
        text = ours.front_end.texts(rollout)[0]
        assert processor.decode(ids, skip_special_tokens=True) == text and text


def test_defaults_are_the_papers_and_the_example_keeps_the_method():
    method = {"k": 32, "support": "union", "tau": 1.0, "temperature": 0.0, "max_new_tokens": 64}
    method.update(states="student", objective="kl", divergence="forward", weight_decay=0.005, clip=1.0)
    defaults = vars(opd.parse_args(["--train", "m", "--student", "s", "--teacher", "t"]))
    assert method.items() <= defaults.items()
    assert {"lr": 1e-4, "batch_size": 960, "warmup_steps": 1000}.items() <= defaults.items()
    args = vars(opd.parse_args([f"@{EXAMPLE / 'opd.args'}"]))
    assert method.items() <= args.items()
    assert (args["student"], args["teacher"]) == ("example/base", "example/teacher")
    assert args["eval"] == [f"example/{name}.jsonl" for name in TESTS]


@pytest.mark.slow
def test_the_main_command(tmp_path):
    """README, quick start: mean error falls by 15 % or more, four of five sets improve, 2 GB a process."""
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "opd.py", "@example/opd.args", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=1200)
    summary = json.loads((out / "summary.json").read_text())
    before, after = ([summary[when][name]["value"] for name in TESTS] for when in ("before", "after"))
    assert np.mean(after) <= 0.85 * np.mean(before)
    assert sum(a < b for a, b in zip(after, before)) >= 4
    lines = runs.lines_of(out / "metrics.jsonl")
    kl = [line["kl"] for line in lines]
    assert np.mean(kl[-10:]) < 0.7 * np.mean(kl[:10])
    assert lines[-1]["rss_gb"] < 2
    change = summary["change"]["macro"]
    assert change["relative_high"] < 0 and change["clusters"] == 40
