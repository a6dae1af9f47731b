"""Code that the documents show: it runs, and does what they say."""

import re

import pytest
from conftest import ROOT

import data


def code_of(document, name):
    """The block of Python in a document that defines a function."""
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return next(block for block in blocks if f"def {name}(" in block)


@pytest.mark.parametrize(
    "limits, expected",
    [({}, [(0, 20), (20.2, 29), (29.7, 31)]), ({"longest_s": 60, "pause_s": 1}, [(0, 31)])],
)
def test_speech_times_become_manifest_lines(limits, expected, tmp_path, monkeypatch):
    """Short pauses are bridged, up to the longest segment."""
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code_of("data.md", "segment_lines"), names)
    clips = data.read_manifest("talk.jsonl")
    times = [(clip.begin_time, clip.end_time) for clip in clips]
    assert times == [(0.4, 9.0), (12.2, 30.5)]
    assert clips[1].fields["recording"] == "talk.wav"

    speech = [(0.0, 10.0), (10.5, 20.0), (20.2, 29.0), (29.7, 31.0)]
    lines = names["segment_lines"]("a.wav", speech, None, **limits)
    times = [(line["begin_time"], line["end_time"]) for line in lines]
    assert times == expected
