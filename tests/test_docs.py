"""Code that the documents show: it runs, and does what they say."""

import re

import numpy as np
import pytest
import soundfile
import torch
import transformers
from conftest import ROOT, qwen3_asr_folder

import data

# The forced aligner's prompt: audio, then every word with two places for times.
ALIGNER_TEMPLATE = (
    "{% for part in messages[0]['content'] %}{% if part['type'] == 'audio' %}"
    "<|audio_start|><|audio_pad|><|audio_end|>"
    "{% else %}{{ part['text'] }}<timestamp><timestamp>{% endif %}{% endfor %}"
)


def code_of(document, name):
    """The block of Python in a document that defines a function."""
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return next(block for block in blocks if f"def {name}(" in block)


def test_speech_times_become_manifest_lines(tmp_path, monkeypatch):
    """The lines are a manifest, and each decodes to its stretch of the recording."""
    monkeypatch.chdir(tmp_path)
    seconds = np.arange(31 * 16_000) / 16_000
    soundfile.write("talk.wav", seconds / 40, 16_000, subtype="FLOAT")  # the sample says where it is from
    exec(code_of("data.md", "segment_lines"), {})
    clips = data.read_manifest("talk.jsonl")
    times = [(clip.begin_time, clip.end_time) for clip in clips]
    assert times == [(0.4, 9.0), (12.2, 30.5)]  # the first pause is bridged, the second is not
    for clip in clips:
        waveform = data.load_audio(clip)
        assert waveform[0] == pytest.approx(clip.begin_time / 40, abs=1e-4)
        assert len(waveform) / 16_000 == pytest.approx(clip.duration, abs=1e-3)
    assert {clip.fields["recording"] for clip in clips} == {"talk.wav"}


@pytest.mark.parametrize(
    "limits, expected",
    [({}, [(0, 20), (20.2, 29), (29.7, 31)]), ({"longest_s": 60, "pause_s": 1}, [(0, 31)])],
)
def test_segments_are_joined_up_to_the_longest(limits, expected):
    names = {}
    exec(code_of("data.md", "segment_lines").split("\n\n\nspeech = ")[0], names)
    speech = [(0.0, 10.0), (10.5, 20.0), (20.2, 29.0), (29.7, 31.0)]
    lines = names["segment_lines"]("a.wav", speech, None, **limits)
    assert [(line["begin_time"], line["end_time"]) for line in lines] == expected


@torch.no_grad()
def test_word_times_come_from_transformers_aligner(tmp_path):
    """A tiny aligner of the real class: a begin and an end for each word, in the clip, and in order."""
    folder = qwen3_asr_folder(tmp_path / "qwen")
    config = transformers.Qwen3ASRConfig.from_pretrained(folder)
    config.num_labels = 20
    torch.manual_seed(0)
    transformers.Qwen3ASRForTokenClassification(config).save_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.chat_template = ALIGNER_TEMPLATE
    processor.save_pretrained(folder)
    names = {}
    exec(code_of("data.md", "word_times"), names)
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(16_000) / 9), 16_000)
    clip = data.clip_from_file(str(tmp_path / "a.wav"))
    model = transformers.Qwen3ASRForTokenClassification.from_pretrained(folder)
    words = names["word_times"](clip, "guten morgen, Anna", "German", processor, model)
    assert [word["text"] for word in words] == ["guten", "morgen", "Anna"]
    assert all(0 <= word["start_time"] <= word["end_time"] <= 1.6 for word in words)
