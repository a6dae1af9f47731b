"""data.py: features against stock transformers, manifests, audio of every kind, batches and order, check."""
import contextlib
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import types

import numpy as np
import pytest
import soundfile
import torch
from transformers import GlmAsrProcessor, WhisperFeatureExtractor

import data
from data import AudioError, Clip, InputError, load_audio

ROOT = pathlib.Path(data.__file__).resolve().parent
EDGE = pathlib.Path(os.environ.get("ASR_OPD_DATA", ROOT.parent / "shared" / "data")) / "edge"
GOOD = '{"audio": "a.wav", "duration": 2.0, "text": "hello"}'


def steps(n, channels=1, seed=0):
    """(n, channels) multiples of 1/128 in [−0.8, 0.8]: exact in float and in every PCM width from 8 bits."""
    return np.random.default_rng(seed).integers(-100, 101, (n, channels)).astype(np.float32) / 128


def chirp(seconds, rate):
    """(samples,) float32, 200 Hz to 3 kHz, the same sound at any rate; a wrong position shows."""
    t = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * (200 + 1400 * t / seconds) * t)).astype(np.float32)


def fields(**changed):
    """A manifest line; a value of ... leaves the key out."""
    line = {"audio": "a.wav", "duration": 2.0, **changed}
    return json.dumps({key: value for key, value in line.items() if value is not ...})


def clip_of(path, duration, **times):
    return Clip(str(path), duration, "m.jsonl:7", {}, **times)


def raises_at(where, exception, fragment, function, *args):
    with pytest.raises(exception) as caught:
        function(*args)
    message = str(caught.value)
    assert re.match(rf"(/\S*/)?{re.escape(where)}: ", message) and fragment in message and "\n" not in message


def refused(reason, clip):
    raises_at("m.jsonl:7", AudioError, reason, load_audio, clip)


# ------------------------------------------------------------------------------------------------------------
# Features
# ------------------------------------------------------------------------------------------------------------
LENGTHS = [1, 2, 159, 160, 161, 399, 400, 401, 640, 960, 961, 1279, 1280, 1281, 2559, 2560, 2561, 4000, 7999,
           16_000, 16_001, 48_000, 77_777, 112_080, 112_400, 239_999, 478_721, 479_999, 480_000]


@pytest.fixture(scope="module")
def extractor():
    return WhisperFeatureExtractor(feature_size=128)


@pytest.mark.parametrize("n", LENGTHS)
def test_log_mel_and_token_count_equal_stock(extractor, n):
    generator = torch.Generator().manual_seed(n)
    waveform = 0.1 * torch.randn(n, generator=generator) * torch.linspace(0, 1, n).sin().abs()
    stock_input = torch.nn.functional.pad(waveform, (0, 1280 - n)) if n < 961 else waveform
    stock = extractor(stock_input.numpy(), sampling_rate=16_000, padding="longest", pad_to_multiple_of=1280,
                      return_tensors="pt", return_attention_mask=True)
    mel = data.log_mel(waveform)
    assert mel.shape == (128, 8 * -(-n // 1280)) and mel.dtype == torch.float32
    torch.testing.assert_close(mel, stock["input_features"][0], atol=1e-4, rtol=0)
    n_stock = GlmAsrProcessor._get_audio_token_length(None, stock["attention_mask"].sum())
    assert data.n_audio_tokens(n) == n_stock >= 1


def test_log_mel_of_silence():
    silent = (math.log10(1e-10) + 4) / 4
    assert torch.equal(data.log_mel(torch.zeros(1000)), torch.full((128, 8), silent))


@pytest.mark.parametrize("n, tokens", [(1, 1), (960, 1), (961, 1), (2560, 2), (48_000, 37), (112_080, 87),
                                       (112_400, 88), (480_000, 375)])
def test_n_audio_tokens_of_the_method(n, tokens):
    assert data.n_audio_tokens(n) == tokens


def test_n_audio_tokens_equal_stock_for_3000_lengths():
    lengths = torch.from_numpy(np.random.default_rng(0).integers(961, 480_001, 3000))
    frames = (lengths + 159) // 160             # what stock's mask counts; the test above has the mask itself
    stock = GlmAsrProcessor._get_audio_token_length(None, frames)
    assert [data.n_audio_tokens(n) for n in lengths.tolist()] == stock.tolist()


# ------------------------------------------------------------------------------------------------------------
# Manifest
# ------------------------------------------------------------------------------------------------------------
def write_manifest(folder, *lines, name="m.jsonl"):
    (folder / name).write_bytes("\n".join(lines).encode())
    return str(folder / name)


def test_blank_lines_bom_and_crlf_are_accepted_and_counted(tmp_path):
    fourth = '{"audio": "sub/é 名.flac", "duration": 3, "text": "", "language": "zh", "speaker": {"id": 5}}'
    (tmp_path / "m.jsonl").write_bytes(f"\ufeff{GOOD}\r\n\r\n  \n{fourth}\r\n".encode())
    first, second = data.read_manifest(str(tmp_path / "m.jsonl"))
    assert (first.where, second.where) == (f"{tmp_path}/m.jsonl:1", f"{tmp_path}/m.jsonl:4")
    assert (first.audio, second.audio) == (str(tmp_path / "a.wav"), str(tmp_path / "sub/é 名.flac"))
    assert (first.duration, first.text, first.language) == (2.0, "hello", None)
    assert (second.duration, second.text, second.language) == (3.0, "", "zh")
    assert second.fields == json.loads(fourth)                                  # unknown keys too
    assert (second.end_time, second.offset, second.nbytes) == (-1.0, None, None) and second.begin_time <= 0


def test_paths_start_at_the_manifests_folder_wherever_one_stands(tmp_path, monkeypatch):
    (tmp_path / "sets").mkdir()
    write_manifest(tmp_path / "sets", '{"audio": "../x/a.wav", "duration": 1}',
                   '{"audio": "/data/b.wav", "duration": 1}')
    for folder, path in ((tmp_path, "sets/m.jsonl"), (tmp_path / "sets", "m.jsonl")):
        monkeypatch.chdir(folder)
        relative, absolute = data.read_manifest(path)
        assert os.path.isabs(relative.audio) and os.path.normpath(relative.audio) == str(tmp_path / "x/a.wav")
        assert absolute.audio == "/data/b.wav"


def test_optional_fields_null_and_other_text_field(tmp_path):
    nulls = dict(text=None, language=None, begin_time=None, end_time=None, offset=None, nbytes=None)
    path = write_manifest(tmp_path, fields(**nulls, hyp="from hyp"),
                          fields(begin_time=0.5, end_time=2, offset=0, nbytes=9))
    (clip, segment), (hyp, _) = data.read_manifest(path), data.read_manifest(path, text_field="hyp")
    assert (clip.text, clip.language, clip.end_time, clip.offset) == (None, None, -1.0, None)
    assert hyp.text == "from hyp"
    assert (segment.begin_time, segment.end_time, segment.offset, segment.nbytes) == (0.5, 2.0, 0, 9)


DEFECTS = {
    "bad json": ('{"audio": "a.wav", "duration": 2.0', "not JSON"),
    "trailing text": (GOOD + ",", "not JSON"),
    "list": ("[1, 2]", "found list"),
    "string": ('"a.wav"', "found str"),
    "null": ("null", "found NoneType"),
    "audio missing": (fields(audio=...), '"audio" is missing'),
    "audio null": (fields(audio=None), '"audio" is missing'),
    "audio number": (fields(audio=3), '"audio" must be'),
    "audio empty": (fields(audio=""), '"audio"'),
    "audio NUL": (fields(audio="a\0b"), '"audio"'),
    "duration missing": (fields(duration=...), '"duration" is missing'),
    "duration null": (fields(duration=None), '"duration" is missing'),
    "duration string": (fields(duration="2.0"), '"duration" must be'),
    "duration bool": (fields(duration=True), '"duration" must be'),
    "duration list": (fields(duration=[2]), '"duration" must be'),
    "duration NaN": (fields(duration=float("nan")), '"duration" must be finite'),
    "duration Infinity": (fields(duration=float("inf")), '"duration" must be finite'),
    "duration -Infinity": (fields(duration=-float("inf")), '"duration" must be finite'),
    "duration 1e999": ('{"audio": "a.wav", "duration": 1e999}', '"duration" must be finite'),
    "duration zero": (fields(duration=0), '"duration" must be above 0'),
    "duration negative": (fields(duration=-1.5), '"duration" must be above 0'),
    "text number": (fields(text=5), '"text" must be'),
    "text list": (fields(text=["a"]), '"text" must be'),
    "text bool": (fields(text=False), '"text" must be'),
    "language number": (fields(language=1), '"language" must be'),
    "begin string": (fields(begin_time="0"), '"begin_time" must be'),
    "begin NaN": (fields(begin_time=float("nan")), '"begin_time" must be finite'),
    "begin bool": (fields(begin_time=True), '"begin_time" must be'),
    "end bool": (fields(end_time=False), '"end_time" must be'),
    "end string": (fields(end_time="1"), '"end_time" must be'),
    "segment inverted": (fields(begin_time=2.0, end_time=1.0), "end_time 1 is not after begin_time 2"),
    "segment empty": (fields(begin_time=1.0, end_time=1.0), "is not after begin_time"),
    "segment ends at 0": (fields(end_time=0), "is not after begin_time"),
    "offset alone": (fields(offset=0), '"offset" and "nbytes" go together'),
    "nbytes alone": (fields(nbytes=10), '"offset" and "nbytes" go together'),
    "offset negative": (fields(offset=-1, nbytes=10), '"offset" and "nbytes"'),
    "nbytes zero": (fields(offset=0, nbytes=0), '"offset" and "nbytes"'),
    "offset float": (fields(offset=0.5, nbytes=10), '"offset" must be'),
    "nbytes bool": (fields(offset=0, nbytes=True), '"nbytes" must be'),
}


@pytest.mark.parametrize("line, fragment", DEFECTS.values(), ids=DEFECTS.keys())
def test_defect_is_an_error_that_names_file_and_line(tmp_path, line, fragment):
    raises_at("m.jsonl:3", InputError, fragment, data.read_manifest,
              write_manifest(tmp_path, GOOD, "", line, GOOD))


def test_not_utf8(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(f'{GOOD}\n{{"audio": "é.wav", "duration": 1}}\n'.encode("latin-1"))
    raises_at("m.jsonl:2", InputError, "not UTF-8", data.read_manifest, str(tmp_path / "m.jsonl"))


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf\r\n"], ids=["empty", "blank", "BOM only"])
def test_manifest_without_a_clip(tmp_path, content):
    (tmp_path / "m.jsonl").write_bytes(content)
    with pytest.raises(InputError, match="m.jsonl: holds no clip"):
        data.read_manifest(str(tmp_path / "m.jsonl"))


@pytest.mark.parametrize("name, reason", [("nope.jsonl", "No such file"), (".", "directory")])
def test_manifest_that_cannot_be_opened(tmp_path, name, reason):
    with pytest.raises(InputError, match=reason) as caught:
        data.read_manifest(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


def test_errors_list_keeps_the_good_lines_and_every_defect(tmp_path):
    path = write_manifest(tmp_path, GOOD, "{", GOOD, "[]", fields(duration=0))
    errors = []
    found = [(number, clip.where) for _, number, clip in data.manifest_clips(path, errors=errors)]
    assert found == [(1, f"{path}:1"), (3, f"{path}:3")]
    assert [error.split(": ")[0] for error in errors] == [f"{path}:2", f"{path}:4", f"{path}:5"]


@pytest.mark.parametrize("limit", [30.0, 15.1, 0.3])
def test_clips_keep_the_limit_itself_and_count_what_they_leave_out(tmp_path, limit):
    path = write_manifest(tmp_path, *(fields(duration=s) for s in (limit / 2, limit, limit + 0.01, 60)))
    clips = data.Clips([path], None, limit)
    assert [clip.duration for clip in clips] == [limit / 2, limit] and clips.n_long == 2 and len(clips) == 2


# Legal JSON that no sane tool writes. A user sees one line with its place, never a traceback.
ODD = {
    "audio surrogate": fields(audio="\ud800.wav"),
    "audio too long": fields(audio="a" * 5000),
    "text surrogate": fields(text="\ud800"),
    "duration 400 digits": fields(duration=10**400),
    "duration 5000 digits": '{"audio": "a.wav", "duration": ' + "9" * 5000 + "}",
    "begin 400 digits": fields(begin_time=10**400),
    "begin 1e305": fields(begin_time=1e305),
    "end 1e305": fields(end_time=1e305),
    "offset 2**70": fields(offset=2**70, nbytes=10),
    "nbytes 2**70": fields(offset=0, nbytes=2**70),
    "nbytes 1e12": fields(offset=0, nbytes=10**12),
    "nested": "[" * 100_000,
}


@pytest.mark.parametrize("line", ODD.values(), ids=ODD.keys())
def test_odd_values_are_input_errors_too(tmp_path, line):
    soundfile.write(tmp_path / "a.wav", steps(32_000), 16_000)
    path = write_manifest(tmp_path, line)
    raises_at("m.jsonl:1", InputError, "", lambda: [load_audio(clip) for clip in data.read_manifest(path)])


# ------------------------------------------------------------------------------------------------------------
# Audio
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["WAV PCM_U8", "WAV PCM_16", "WAV PCM_24", "WAV PCM_32", "WAV FLOAT",
                                  "WAV DOUBLE", "FLAC PCM_16", "FLAC PCM_24", "AIFF PCM_16"])
def test_lossless_formats_give_the_exact_samples(tmp_path, kind):
    (fmt, subtype), x = kind.split(), steps(5001)
    source = x if subtype in ("FLOAT", "DOUBLE") else (x * 32_768).astype(np.int16)     # nothing is rounded
    soundfile.write(tmp_path / "a", source, 16_000, format=fmt, subtype=subtype)
    waveform = load_audio(clip_of(tmp_path / "a", 5001 / 16_000))
    assert waveform.dtype == torch.float32 and torch.equal(waveform, torch.from_numpy(x[:, 0]))


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_pitch_phase_and_length(tmp_path, rate):
    n = rate * 3 // 2 + 1
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * np.arange(n) / rate), rate,
                    subtype="FLOAT")
    waveform = load_audio(clip_of(tmp_path / "a.wav", n / rate))
    assert len(waveform) == -(-n * 16_000 // rate)
    expected = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(len(waveform), dtype=torch.float64) / 16_000)
    assert (waveform - expected)[100:-100].abs().max() < 3e-3


@pytest.mark.parametrize("fmt, subtype, rate", [
    ("OGG", "VORBIS", 16_000), ("OGG", "VORBIS", 44_100), ("OGG", "OPUS", 16_000), ("OGG", "OPUS", 48_000),
    ("MP3", "MPEG_LAYER_III", 16_000), ("MP3", "MPEG_LAYER_III", 44_100)])
def test_lossy_formats_give_the_same_sound_in_place(tmp_path, fmt, subtype, rate):
    soundfile.write(tmp_path / "a", chirp(2.0, rate), rate, format=fmt, subtype=subtype)
    waveform = load_audio(clip_of(tmp_path / "a", 2.0)).numpy()
    assert len(waveform) == 32_000
    assert np.corrcoef(waveform, chirp(2.0, 16_000))[0, 1] > 0.98


def test_channels_are_averaged(tmp_path):
    x = steps(4000, channels=2)
    soundfile.write(tmp_path / "a.wav", x, 16_000, subtype="FLOAT")
    assert torch.equal(load_audio(clip_of(tmp_path / "a.wav", 0.25)),
                       torch.from_numpy((x[:, 0] + x[:, 1]) / 2))


def test_one_silent_channel_is_no_defect(tmp_path):
    x = steps(4000)
    soundfile.write(tmp_path / "a.wav", np.concatenate([x, 0 * x], axis=1), 16_000, subtype="FLOAT")
    assert torch.equal(load_audio(clip_of(tmp_path / "a.wav", 0.25)), torch.from_numpy(x[:, 0] / 2))
    soundfile.write(tmp_path / "a.wav", np.zeros((4000, 2)), 16_000, subtype="FLOAT")
    assert torch.equal(load_audio(clip_of(tmp_path / "a.wav", 0.25)), torch.zeros(4000))


def test_opposite_channels_are_an_error(tmp_path):
    x = steps(4000)
    soundfile.write(tmp_path / "a.wav", np.concatenate([x, -x], axis=1), 16_000, subtype="FLOAT")
    refused("opposite phase", clip_of(tmp_path / "a.wav", 0.25))


@pytest.mark.parametrize("fmt", ["WAV", "FLAC"])
@pytest.mark.parametrize("begin, end, first, last", [
    (-1, -1, 0, 32_000), (0, -1, 0, 32_000), (0, 2.0, 0, 32_000), (1.5, -1, 24_000, 32_000),
    (-1, 0.25, 0, 4000), (0.5, 1.25, 8000, 20_000), (1.0001, 1.9999, 16_002, 31_998),
    (1.5, 2.05, 24_000, 32_000), (0, 1 / 16_000, 0, 1)])
def test_segment_is_exact(tmp_path, fmt, begin, end, first, last):
    x = steps(32_000)
    soundfile.write(tmp_path / "a", (x * 32_768).astype(np.int16), 16_000, format=fmt, subtype="PCM_16")
    waveform = load_audio(clip_of(tmp_path / "a", (last - first) / 16_000, begin_time=begin, end_time=end))
    assert torch.equal(waveform, torch.from_numpy(x[first:last, 0]))


def test_segment_bounds_count_in_the_files_own_rate(tmp_path):
    soundfile.write(tmp_path / "a.wav", chirp(3.0, 48_000), 48_000, subtype="FLOAT")
    waveform = load_audio(clip_of(tmp_path / "a.wav", 1.0, begin_time=1.0, end_time=2.0)).numpy()
    assert len(waveform) == 16_000
    np.testing.assert_allclose(waveform[100:-100], chirp(3.0, 16_000)[16_100:31_900], atol=0.02)


@pytest.mark.parametrize("fmt, subtype", [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")])
def test_segment_of_a_lossy_file_is_that_part_of_the_whole(tmp_path, fmt, subtype):
    """libsndfile's seek is off by up to 0.2 s in Vorbis and spoils the first frame in MP3."""
    soundfile.write(tmp_path / "a", chirp(4.0, 48_000), 48_000, format=fmt, subtype=subtype)
    whole, _ = soundfile.read(tmp_path / "a", dtype="float32")
    for begin, end in ((0.5, 1.0), (2.5, 3.0), (3.0, 4.0)):
        waveform = load_audio(clip_of(tmp_path / "a", end - begin, begin_time=begin, end_time=end))
        part = data.resampler(48_000)(torch.from_numpy(whole[round(begin * 48_000):round(end * 48_000)]))
        torch.testing.assert_close(waveform, part, atol=2e-3, rtol=0)


@pytest.mark.parametrize("begin, end", [(2.0, -1), (5.0, -1), (2.5, 3.0), (1.0, 2.2)])
def test_segment_past_the_end_is_an_error(tmp_path, begin, end):
    soundfile.write(tmp_path / "a.wav", steps(32_000), 16_000)
    refused("is outside: 2.00 s", clip_of(tmp_path / "a.wav", 1.0, begin_time=begin, end_time=end))


@pytest.fixture
def tar(tmp_path):
    """(path of a tar, {member name: (offset, nbytes)}); the members also lie beside it."""
    soundfile.write(tmp_path / "a.wav", chirp(1.0, 16_000), 16_000)
    soundfile.write(tmp_path / "b.flac", chirp(2.0, 48_000), 48_000)
    soundfile.write(tmp_path / "c.opus", chirp(1.5, 16_000), 16_000, format="OGG", subtype="OPUS")
    with tarfile.open(tmp_path / "shard.tar", "w") as file:
        for name in ("a.wav", "b.flac", "c.opus"):
            file.add(tmp_path / name, name)
    with tarfile.open(tmp_path / "shard.tar") as file:
        return tmp_path / "shard.tar", {m.name: (m.offset_data, m.size) for m in file.getmembers()}


def test_byte_range_of_a_tar_equals_the_file(tar):
    path, members = tar
    assert len(members) == 3
    for (name, (offset, nbytes)), seconds in zip(members.items(), (1.0, 2.0, 1.5)):
        alone = load_audio(clip_of(path.parent / name, seconds))
        assert torch.equal(load_audio(clip_of(path, seconds, offset=offset, nbytes=nbytes)), alone)
    offset, nbytes = members["a.wav"]
    segment = load_audio(clip_of(path, 0.5, offset=offset, nbytes=nbytes, begin_time=0.25, end_time=0.75))
    assert torch.equal(segment, load_audio(clip_of(path.parent / "a.wav", 1.0))[4000:12_000])


def test_shard_shorter_than_the_manifest_says(tar):
    path, members = tar
    offset, nbytes = members["b.flac"]
    path.write_bytes(path.read_bytes()[:offset + nbytes - 1])
    refused(f"ends before byte {offset + nbytes}", clip_of(path, 2.0, offset=offset, nbytes=nbytes))
    refused("ends before byte", clip_of(path, 2.0, offset=10**9, nbytes=10))
    refused("cannot read it", clip_of(path, 1.0, offset=3, nbytes=4000))       # not where a member starts


@pytest.mark.parametrize("name, content, reason", [
    ("missing.wav", None, "No such file"), (".", None, "directory"), ("a.wav/b.wav", None, "Not a directory"),
    ("zero.wav", b"", "cannot read it"), ("short.wav", b"RIFF\x24\x00", "cannot read it"),
    ("page.wav", b"<html>not found</html>" * 40, "cannot read it")])
def test_unusable_file_is_an_error_that_names_line_and_file(tmp_path, name, content, reason):
    soundfile.write(tmp_path / "a.wav", steps(100), 16_000)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(reason, clip_of(tmp_path / name, 1.0))
    refused(str(tmp_path / name), clip_of(tmp_path / name, 1.0))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers(tmp_path, value):
    x = steps(4000)
    x[1234] = value
    soundfile.write(tmp_path / "a.wav", x, 16_000, subtype="FLOAT")
    refused("NaN or infinite", clip_of(tmp_path / "a.wav", 0.25))


@pytest.mark.parametrize("times", [{}, dict(begin_time=0.5, end_time=1.0)])
def test_zero_samples(tmp_path, times):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), 16_000)
    refused("", clip_of(tmp_path / "a.wav", 0.5, **times))


@pytest.mark.parametrize("fmt, subtype", [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"),
                                          ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_file_never_passes_for_a_short_clip(tmp_path, fmt, subtype, share):
    soundfile.write(tmp_path / "a", chirp(3.0, 16_000), 16_000, format=fmt, subtype=subtype)
    assert len(load_audio(clip_of(tmp_path / "a", 3.0))) == 48_000
    raw = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(raw[:int(share * len(raw))])
    refused("", clip_of(tmp_path / "a", 3.0))
    try:                                        # nor where the manifest was made after it was cut
        duration = soundfile.info(tmp_path / "a").duration
    except soundfile.LibsndfileError:
        return
    refused("", clip_of(tmp_path / "a", duration))


@pytest.mark.parametrize("total", [2**36 - 1, 10**9])
def test_a_header_that_states_a_day_of_audio_takes_no_memory(tmp_path, total):
    """FLAC's STREAMINFO with an absurd number of samples: an AudioError, before anything is allocated."""
    soundfile.write(tmp_path / "a.flac", steps(16_000), 16_000)
    raw = bytearray((tmp_path / "a.flac").read_bytes())
    raw[21] = raw[21] & 0xF0 | total >> 32
    raw[22:26] = (total & 0xFFFF_FFFF).to_bytes(4, "big")
    (tmp_path / "a.flac").write_bytes(raw)
    assert soundfile.info(tmp_path / "a.flac").frames == total
    refused("streamed or damaged", clip_of(tmp_path / "a.flac", 1.0))


@pytest.mark.parametrize("size", [0, 0xFFFF_FFFF, 0x7FFF_F024, "file", "file + 8"])
def test_a_streamed_or_slightly_wrong_riff_size_is_no_cut(tmp_path, size):
    """What ffmpeg and sox write to a pipe, where the length is not known, and sizes that are off by a header."""
    soundfile.write(tmp_path / "a.wav", steps(16_000), 16_000)
    raw = bytearray((tmp_path / "a.wav").read_bytes())
    number = dict([("file", len(raw)), ("file + 8", len(raw) + 8)]).get(size, size)
    raw[4:8] = number.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(raw)
    assert len(load_audio(clip_of(tmp_path / "a.wav", 1.0))) == 16_000


@pytest.mark.parametrize("manifest_s, good", [(2.0, True), (1.9, True), (2.1, True), (1.85, False),
                                              (2.15, False), (20.0, False)])
def test_duration_is_compared_with_the_audio(tmp_path, manifest_s, good):
    soundfile.write(tmp_path / "a.wav", steps(32_000), 16_000)
    if good:
        assert len(load_audio(clip_of(tmp_path / "a.wav", manifest_s))) == 32_000
    else:
        refused(f"2.00 s decoded, the manifest says {manifest_s:.2f} s",
                clip_of(tmp_path / "a.wav", manifest_s))


def test_content_counts_whatever_the_name_claims(tmp_path):
    x = (steps(16_000) * 32_768).astype(np.int16)
    for name in ("flac.wav", "flac.raw", "flac"):
        soundfile.write(tmp_path / name, x, 16_000, format="FLAC")
        assert torch.equal(load_audio(clip_of(tmp_path / name, 1.0)),
                           torch.from_numpy(steps(16_000)[:, 0])), name


def test_flac_that_does_not_state_its_length(tmp_path):
    """As encoders write into a pipe, total samples 0 in STREAMINFO: read it or refuse it, but don't crash."""
    soundfile.write(tmp_path / "a.flac", (steps(16_000) * 32_768).astype(np.int16), 16_000)
    raw = bytearray((tmp_path / "a.flac").read_bytes())
    raw[21] &= 0xF0
    raw[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(raw)
    with contextlib.suppress(AudioError):
        assert torch.equal(load_audio(clip_of(tmp_path / "a.flac", 1.0)),
                           torch.from_numpy(steps(16_000)[:, 0]))


def test_clip_from_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    soundfile.write("a.flac", steps(12_000), 8000)
    clip = data.clip_from_file("a.flac")
    assert (clip.audio, clip.where) == (str(tmp_path / "a.flac"), "--data")
    assert (clip.duration, clip.text) == (1.5, None)
    assert len(load_audio(clip)) == 24_000


@pytest.mark.parametrize("name", ["missing.wav", "text.wav", "text.raw", "."])
def test_clip_from_file_that_is_no_audio(tmp_path, name):
    for text in ("text.wav", "text.raw"):
        (tmp_path / text).write_text("no audio " * 200)
    raises_at(str(tmp_path / name), InputError, "", data.clip_from_file, str(tmp_path / name))


# ---- real files: one sentence in 50 formats and defects ----------------------------------------------------
EDGE_CASES = json.loads((EDGE / "edge.json").read_text()) if (EDGE / "edge.json").exists() else []
# What is too short, silent or too long loads: that is for `check` and --max-seconds to say.
EDGE_LOADS = ("ok", "empty", "skip/reject", "shorter than one fbank window", "30 s limit",
              "> 30 s: truncate/skip policy", "odd final byte", "streamed WAV, data size 0xffffffff")
EDGE_REFUSED = ("mean-downmix cancels", "unsupported by libsndfile", "reject or sanitise NaN", "headerless",
                "skip/reject: 0 samples", "truncated", "unreadable", "streamed WAV, data size 0")
EDGE_SECONDS = {"silence_3s.wav": 3.0, "one_sample.wav": 1 / 16_000, "ten_ms.wav": 0.01,
                "exact_30s.wav": 30.0, "over_30s.flac": 47.0}
EDGE_LEAST_CORRELATION = {"clipped.wav": 0.8, "quiet_-60dB.wav": 0.98}


@pytest.mark.skipif(not EDGE_CASES, reason=f"no {EDGE}/edge.json; set ASR_OPD_DATA to the folder with edge/")
@pytest.mark.parametrize("case", EDGE_CASES, ids=[case["file"] for case in EDGE_CASES])
def test_edge_file_loads_as_the_same_speech_or_is_refused(case):
    clip = clip_of(EDGE / case["file"], EDGE_SECONDS.get(case["file"], 2.435))
    if case["expect"] not in EDGE_LOADS:
        assert case["expect"].startswith(EDGE_REFUSED)
        refused(str(EDGE / case["file"]), clip)
        return
    waveform = load_audio(clip)
    assert abs(len(waveform) / 16_000 - clip.duration) < 0.05 and waveform.isfinite().all()
    if case["file"] == "silence_3s.wav":
        assert not waveform.any()
    elif clip.duration > 1:
        reference = load_audio(clip_of(EDGE / "wav_s16_16k.wav", 2.435))
        n = min(len(waveform), len(reference))
        correlation = torch.corrcoef(torch.stack([waveform[:n], reference[:n]]))[0, 1]
        assert correlation > EDGE_LEAST_CORRELATION.get(case["file"], 0.995)


# ------------------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------------------
def durations_of(n, seed=0):
    return np.random.default_rng(seed).uniform(1, 10, n)


def test_batch_is_a_pure_function_of_seed_and_step():
    durations = durations_of(60)
    forward = [data.batch_indices(durations, 4, 0, step, pool_batches=5) for step in range(40)]
    np.random.seed(5)
    for step in reversed(range(40)):                                            # whatever was asked before
        assert np.array_equal(data.batch_indices(durations.copy(), 4, 0, step, pool_batches=5), forward[step])
    other_seed = [data.batch_indices(durations, 4, 1, step, pool_batches=5) for step in range(40)]
    assert sum(np.array_equal(a, b) for a, b in zip(forward, other_seed)) <= 1
    first, second = np.concatenate(forward[:5]), np.concatenate(forward[15:20])
    assert set(first.tolist()) != set(second.tolist())                          # each epoch has its own order


@pytest.mark.parametrize("n, batch_size, pool_batches", [(60, 4, 5), (60, 4, 15), (60, 3, 1), (60, 1, 60)])
def test_an_epoch_holds_every_clip_once(n, batch_size, pool_batches):
    durations, per_epoch = durations_of(n), n // batch_size
    for epoch in range(3):
        steps_of_epoch = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        batches = [data.batch_indices(durations, batch_size, 7, s, pool_batches) for s in steps_of_epoch]
        assert sorted(np.concatenate(batches).tolist()) == list(range(n))


@pytest.mark.parametrize("n, batch_size, pool_batches", [(50, 4, 3), (61, 7, 2), (13, 4, 3), (100, 3, 11)])
def test_no_clip_is_lost_where_batches_do_not_divide_the_epoch(n, batch_size, pool_batches):
    counts = np.zeros(n, dtype=int)
    for step in range(40 * pool_batches):
        batch = data.batch_indices(durations_of(n), batch_size, 3, step, pool_batches)
        assert batch.shape == (batch_size,)
        np.add.at(counts, batch, 1)
        if (step + 1) % pool_batches == 0:    # between pools; inside one the stream is sorted
            assert counts.max() - counts.min() <= 1
    assert counts.sum() == 40 * pool_batches * batch_size


@pytest.mark.parametrize("n, batch_size", [(96, 8), (300, 24), (1200, 40), (1200, 24)])
def test_small_sets_are_not_batched_with_copies_of_a_clip(n, batch_size):
    """Where an epoch is shorter than a pool of 50 batches, sorting must not join the copies of a clip."""
    batches = [data.batch_indices(durations_of(n), batch_size, 0, step) for step in range(n // batch_size)]
    assert [len(set(batch.tolist())) for batch in batches] == [batch_size] * len(batches)


@pytest.mark.parametrize("n, batch_size", [(300, 24), (1200, 32), (2500, 40), (5000, 40)])
def test_batches_hold_distinct_clips_across_epochs_too(n, batch_size):
    durations = durations_of(n)
    batches = [data.batch_indices(durations, batch_size, 0, step) for step in range(5 * n // batch_size)]
    n_with_copies = sum(len(set(batch.tolist())) < batch_size for batch in batches)
    assert n_with_copies <= 5    # at most where two epochs meet


def test_set_smaller_than_a_batch():
    for step in range(3):
        batch = data.batch_indices(durations_of(5), 10, 0, step)
        assert np.bincount(batch).tolist() == [2, 2, 2, 2, 2]


def test_batches_of_a_pool_are_slices_of_similar_length():
    durations = durations_of(1000)
    batches = [durations[data.batch_indices(durations, 10, 0, step, pool_batches=50)] for step in range(50)]
    assert [b.min() for b in batches] != sorted(b.min() for b in batches)       # but in random order
    batches.sort(key=min)
    assert all(a.max() <= b.min() for a, b in zip(batches, batches[1:]))
    assert np.mean([np.ptp(b) for b in batches]) < 0.25


@pytest.mark.parametrize("micro_seconds", [5.0, 20.0, 33.3, 1000.0])
def test_micro_batches_keep_every_clip_and_the_limit(micro_seconds):
    durations, indices = durations_of(200), list(range(50, 110))
    cuts = data.micro_batches(indices, durations, micro_seconds)
    assert sorted(i for cut in cuts for i in cut) == indices
    longest_first = [durations[i] for cut in cuts for i in cut]
    assert longest_first == sorted(longest_first, reverse=True)
    for cut, following in zip(cuts, [*cuts[1:], None]):
        assert len(cut) == 1 or len(cut) * durations[cut].max() <= micro_seconds
        # No cut comes too early.
        assert following is None or (len(cut) + 1) * durations[cut].max() > micro_seconds


def test_micro_batches_by_hand():
    assert data.micro_batches([], np.array([]), 10) == []
    durations = np.array([2.0, 5.0, 2.0, 40.0, 4.0])
    assert data.micro_batches([0, 1, 2, 3, 4], durations, 10) == [[3], [1, 4], [0, 2]]
    assert data.micro_batches([2, 0], durations, 4.0) == [[0, 2]]               # equal lengths: by index
    assert data.micro_batches([0, 1, 2, 3, 4], durations, 10, 4) == [[3], [1], [4], [0, 2]]


def loader_of(seconds, rank=0, world=1, micro_seconds=15.0, make=lambda cut, step, bad: (cut, step)):
    return data.StepDataset(np.asarray(seconds), 8, micro_seconds, 3, rank, world, make)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_partition_the_global_batch(world):
    for step in range(12):
        whole = data.batch_indices(durations_of(30), 8, 3, step).tolist()
        shares = [loader_of(durations_of(30), rank, world)[step][0] for rank in range(world)]
        assert len({len(share) for share in shares}) == 1                       # as many micro-batches on every rank
        assert all(s == step for share in shares for _, s in share)
        shares = [[i for cut, _ in share for i in cut] for share in shares]
        assert [len(share) for share in shares] == [8 // world] * world
        assert sorted(i for share in shares for i in share) == sorted(whole)


def test_batches_do_not_depend_on_workers_and_start():
    loader = loader_of(durations_of(30), make=lambda cut, step, bad: (cut, step, torch.tensor(cut) * step))

    def plain(first, last, workers):
        batches = list(data.step_batches(loader, first, last, workers))
        assert [step for step, *_ in batches] == [-1, *range(first, last)]      # −1: a trial of the longest clips
        return [[(cut, step, x.tolist()) for cut, step, x in item] for _, item, _ in batches[1:]]

    straight = plain(0, 7, 0)
    assert len(straight) == 7 and [item[0][1] for item in straight] == list(range(7))
    assert plain(0, 7, 2) == straight
    assert plain(4, 7, 0) == straight[4:]                                       # as after a resume


@pytest.mark.parametrize("workers", [0, 1])
def test_audio_error_stays_one_line_with_workers(tmp_path, workers):
    clips = [clip_of(tmp_path / "missing.wav", 1.0)] * 8
    loader = loader_of([1.0] * 8, make=lambda cut, step, bad: [load_audio(clips[i]) for i in cut])
    raises_at("m.jsonl:7", AudioError, "No such file", lambda: list(data.step_batches(loader, 0, 1, workers)))


# ------------------------------------------------------------------------------------------------------------
# Collate
# ------------------------------------------------------------------------------------------------------------
class FakeFrontEnd:
    pad_id, frame_multiple, languages = 99, 8, {}

    def features(self, waveform):
        return waveform.mean() + torch.ones(128, 8 * -(-len(waveform) // 1280))

    def n_audio_tokens(self, n_samples):
        return n_samples // 1280

    def prompt(self, n_audio, language=None):
        return [1, *[5] * n_audio, 2]


def test_collate():
    waveforms = [torch.full((n,), v) for n, v in ((2560, 0.0), (5120, 1.0), (3000, -3.0))]
    batch = data.collate(waveforms, FakeFrontEnd())
    assert batch.mel_lens.tolist() == [16, 32, 24] and batch.audio_lens.tolist() == [2, 4, 2]
    expected = torch.zeros(3, 128, 32)
    expected[0, :, :16], expected[1], expected[2, :, :24] = 1.0, 2.0, -2.0
    assert torch.equal(batch.mel, expected) and batch.mel.dtype == torch.float32
    assert batch.prompt_ids.tolist() == [[99, 99, 1, 5, 5, 2], [1, 5, 5, 5, 5, 2], [99, 99, 1, 5, 5, 2]]
    assert batch.prompt_ids.dtype == torch.int64 and batch.prompt_mask.dtype == torch.bool
    assert batch.prompt_mask.int().tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6, [0, 0, 1, 1, 1, 1]]
    assert batch.seconds.tolist() == pytest.approx([0.16, 0.32, 0.1875])
    assert torch.equal(batch.to("cpu").mel, batch.mel)


def test_collate_with_ready_mels_computes_none():
    waveforms = [torch.zeros(2560), torch.zeros(1280)]
    mels = [torch.full((128, 16), 3.0), torch.full((128, 8), 4.0)]
    # no features
    front_end = types.SimpleNamespace(pad_id=0, prompt=lambda n, language: [n], n_audio_tokens=lambda n: n,
                                      frame_multiple=8, languages={})
    batch = data.collate(waveforms, front_end, mels=mels)
    assert torch.equal(batch.mel[0], mels[0]) and torch.equal(batch.mel[1, :, :8], mels[1])
    assert not batch.mel[1, :, 8:].any()
    assert batch.prompt_ids.tolist() == [[2560], [1280]]


def test_mel_beyond_a_clip_is_exactly_zero_and_does_not_depend_on_batch_mates():
    front_end = types.SimpleNamespace(pad_id=0, prompt=lambda n, language: [1], features=data.log_mel,
                                      n_audio_tokens=data.n_audio_tokens, frame_multiple=8, languages={})
    short, long = torch.from_numpy(chirp(0.31, 16_000)), 5 * torch.from_numpy(chirp(1.0, 16_000))
    alone, pair = data.collate([short], front_end), data.collate([short, long], front_end)
    assert pair.mel_lens.tolist() == [32, 104] and torch.equal(pair.mel[0, :, :32], alone.mel[0])
    assert torch.equal(pair.mel[0, :, 32:], torch.zeros(128, 72))


# ------------------------------------------------------------------------------------------------------------
# python data.py check
# ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """{name: (exit status, stdout, stderr)} of three runs of `python data.py check`, at once."""
    folder = tmp_path_factory.mktemp("check")
    soundfile.write(folder / "a.wav", chirp(2.0, 16_000), 16_000)
    soundfile.write(folder / "long.wav", chirp(4.0, 8000), 8000)
    soundfile.write(folder / "zero.wav", np.zeros(16_000), 16_000)
    soundfile.write(folder / "short.wav", chirp(1.0, 16_000)[100:200], 16_000)
    write_manifest(folder, fields(text="hello", language="en"),
                   fields(text="", language="en", begin_time=0, end_time=1.0, duration=1.0),
                   fields(duration=1.0, begin_time=1.0), name="good.jsonl")
    write_manifest(folder, fields(text="x"), "{oops", fields(text="x"), fields(audio="gone.wav"),
                   fields(audio="long.wav", duration=4.0), fields(audio="zero.wav", duration=1.0, text="y"),
                   fields(audio="short.wav", duration=0.00625), fields(end_time=1.5, duration=1.0),
                   fields(duration="2"), name="bad.jsonl")
    calls = {"good": "good.jsonl", "bad": "good.jsonl bad.jsonl --max-seconds 3.5", "missing": "nope.jsonl"}
    pipes = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    command = [sys.executable, ROOT / "data.py", "check"]
    running = {name: subprocess.Popen(command + call.split(), cwd=folder, **pipes) for name,
               call in calls.items()}
    found = {}
    for name, process in running.items():
        out, err = process.communicate(timeout=120)
        found[name] = (process.returncode, out.replace(str(folder), "DIR"), err)
    return found


GOOD_REPORT = ["good.jsonl: 3 clips, 0.001 hours, with text 2, empty text 1, languages en 2, (none) 1",
               "good.jsonl: 0 defect(s)"]


def test_check_of_a_good_manifest(checked):
    status, out, err = checked["good"]
    assert (status, out.splitlines(), err) == (0, GOOD_REPORT, "")


def test_check_reports_every_defect_with_its_line(checked):
    status, out, err = checked["bad"]
    assert (status, err) == (1, "") and out.splitlines()[:2] == GOOD_REPORT
    head, *defects, tail = out.splitlines()[2:]
    assert head.startswith("bad.jsonl: 7 clips, ") and tail == "bad.jsonl: 8 defect(s)"
    expected = {2: "not JSON", 3: "the same clip as bad.jsonl:1", 4: "DIR/gone.wav: No such file",
                5: "4.0 s is over --max-seconds 3.5", 6: "DIR/zero.wav: every sample is zero",
                7: "100 samples, less than a 25 ms window",
                8: "1.50 s decoded, the manifest says 1.00 s",
                9: '"duration" must be'}
    for line, fragment in expected.items():
        place = f"  bad.jsonl:{line}: "
        assert any(defect.startswith(place) and fragment in defect for defect in defects), (place, defects)


def test_check_of_a_missing_manifest_is_one_line(checked):
    status, out, err = checked["missing"]
    assert (status, out) == (2, "")
    assert err == ("data.py: error: manifest nope.jsonl: No such file or directory; "
                   "give the path of a JSON Lines file\n")


def test_check_finds_a_clip_twice_however_its_bounds_are_written(tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", chirp(2.0, 16_000), 16_000)
    path = write_manifest(tmp_path, fields(), fields(begin_time=-1, end_time=-1),
                          fields(begin_time=0.0, end_time=None),
                          fields(begin_time=0, end_time=1, duration=1),
                          fields(begin_time=1, end_time=2, duration=1))
    assert data.check(path, 30.0) == 2
    out = capsys.readouterr().out
    assert f"{path}:2: the same clip as {path}:1" in out and f"{path}:3: the same clip as {path}:1" in out


def test_check_does_not_call_an_empty_manifest_good(tmp_path):
    path = write_manifest(tmp_path, "")
    try:
        assert data.check(path, 30.0) > 0
    except InputError as error:
        assert "holds no clip" in str(error)
