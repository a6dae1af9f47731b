"""Code that the documents show: it runs, and does what they say."""

import re

import numpy as np
import pytest
import soundfile
from conftest import ROOT

import data


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
