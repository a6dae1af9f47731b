"""Audio of data.py: formats, codecs, segments, tars, and files that are damaged, joined or count wrong."""

import contextlib
import io
import json
import math
import os
import pathlib
import tarfile

import numpy as np
import pytest
import soundfile
import torch
from test_data import raises_at, steps

import data
from data import AudioError, Clip, InputError, load_audio

ROOT = pathlib.Path(data.__file__).resolve().parent
EDGE = pathlib.Path(os.environ.get("ASR_OPD_DATA", ROOT.parent / "shared" / "data")) / "edge"


def chirp(seconds, rate=16_000):
    """(samples,) float32, 200 Hz to 3 kHz, the same sound at any rate: a wrong position shows."""
    t = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * (200 + 1400 * t / seconds) * t)).astype(np.float32)


def encoded(wave, rate=16_000, fmt="WAV", subtype=None, **options):
    """The bytes of a sound file."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=fmt, subtype=subtype, **options)
    return file.getvalue()


def clip_of(path, duration, content=None, **times):
    """A clip of a file, which is written first where its content is given."""
    if content is not None:
        pathlib.Path(path).write_bytes(content)
    return Clip(str(path), duration, "m.jsonl:7", {}, **times)


def refused(reason, clip):
    raises_at("m.jsonl:7", AudioError, f"{clip.audio}: ", load_audio, clip)
    raises_at("m.jsonl:7", AudioError, reason, load_audio, clip)


LOSSLESS = (
    "WAV PCM_U8,WAV PCM_16,WAV PCM_24,WAV PCM_32,WAV FLOAT,WAV DOUBLE,FLAC PCM_16,FLAC PCM_24,AIFF PCM_16"
)
TIMES = [
    (-1, -1, 0, 32_000),
    (0, 2.0, 0, 32_000),
    (1.5, -1, 24_000, 32_000),
    (-1, 0.25, 0, 4000),
    (1.0001, 1.9999, 16_002, 31_998),
    (1.5, 2.05, 24_000, 32_000),
    (0, 1 / 16_000, 0, 1),
]


@pytest.mark.parametrize("kind", LOSSLESS.split(","))
@pytest.mark.parametrize("begin, end, first, last", TIMES)
def test_lossless_formats_give_the_exact_samples(tmp_path, kind, begin, end, first, last):
    """Whatever the name claims: soundfile takes *.raw for a file without a header."""
    fmt, subtype = kind.split()
    x = steps(32_000)
    source = x if subtype in ("FLOAT", "DOUBLE") else (x * 32_768).astype(np.int16)  # nothing is rounded
    content = encoded(source, fmt=fmt, subtype=subtype)
    times = {"begin_time": begin, "end_time": end}
    waveform = load_audio(clip_of(tmp_path / "a.raw", (last - first) / 16_000, content, **times))
    assert waveform.dtype == torch.float32 and torch.equal(waveform, torch.from_numpy(x[first:last, 0]))


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 48_000])
def test_resampling_keeps_pitch_phase_and_length(tmp_path, rate):
    n = rate * 3 // 2 + 1
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(n) / rate)
    waveform = load_audio(clip_of(tmp_path / "a.wav", n / rate, encoded(tone, rate, subtype="FLOAT")))
    assert len(waveform) == math.ceil(n * 16_000 / rate)
    expected = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(len(waveform), dtype=torch.float64) / 16_000)
    assert (waveform - expected)[100:-100].abs().max() < 3e-3


@pytest.mark.parametrize("kind", ["OGG VORBIS", "OGG OPUS", "MP3 MPEG_LAYER_III"])
@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_lossy_formats_give_the_same_sound_in_place_and_in_part(tmp_path, kind, rate):
    """libsndfile's own seek is off by up to 0.2 s in Vorbis and spoils the first frame in MP3."""
    content = encoded(chirp(4.0, rate), rate, *kind.split())
    waveform = load_audio(clip_of(tmp_path / "a", 4.0, content))
    assert len(waveform) == 64_000
    assert np.corrcoef(waveform.numpy(), chirp(4.0))[0, 1] > 0.98
    whole = torch.from_numpy(soundfile.read(tmp_path / "a", dtype="float32")[0])
    for begin, end in ((0.5, 1.0), (2.5, 3.0), (3.0, 4.0)):
        part = whole[round(begin * rate) : round(end * rate)]
        part = part if rate == 16_000 else data.resampler(rate)(part)
        waveform = load_audio(clip_of(tmp_path / "a", end - begin, begin_time=begin, end_time=end))
        torch.testing.assert_close(waveform, part, atol=2e-3, rtol=0)


CANNOT_SEEK = "WAV GSM610,WAV G721_32,AU G723_24,AU G723_40,WAV NMS_ADPCM_16,WAV NMS_ADPCM_32,AIFF GSM610"


@pytest.mark.parametrize("kind", CANNOT_SEEK.split(","))
def test_codecs_that_cannot_seek_are_read_from_the_start(tmp_path, kind):
    content = encoded(chirp(2.0, 8000), 8000, *kind.split())
    whole, _ = soundfile.read(io.BytesIO(content), 16_000, dtype="float32")
    expected = data.resampler(8000)(torch.from_numpy(whole))[:31_900]  # some codecs fill a last block
    waveform = load_audio(clip_of(tmp_path / "a", 2.0, content))
    torch.testing.assert_close(waveform[:31_900], expected)
    waveform = load_audio(clip_of(tmp_path / "a", 0.5, begin_time=1.0, end_time=1.5))
    assert torch.equal(waveform, data.resampler(8000)(torch.from_numpy(whole[8000:12_000])))


def test_channels_are_averaged_and_opposite_ones_refused(tmp_path):
    x = steps(4000, channels=2)
    content = encoded(x, subtype="FLOAT")
    expected = torch.from_numpy((x[:, 0] + x[:, 1]) / 2)
    assert torch.equal(load_audio(clip_of(tmp_path / "a.wav", 0.25, content)), expected)
    left = encoded(x * [1, 0], subtype="FLOAT")  # a silent channel is no defect
    assert torch.equal(load_audio(clip_of(tmp_path / "b.wav", 0.25, left)), torch.from_numpy(x[:, 0] / 2))
    assert not load_audio(clip_of(tmp_path / "c.wav", 0.25, encoded(0 * x))).any()
    opposite = encoded(x[:, :1] * [1, -1], subtype="FLOAT")
    refused("opposite phase", clip_of(tmp_path / "d.wav", 0.25, opposite))


@pytest.mark.parametrize("begin, end", [(2.0, -1), (2.5, 3.0), (1.0, 2.2)])
def test_a_segment_past_the_end_is_an_error(tmp_path, begin, end):
    clip = clip_of(tmp_path / "a.wav", 1.0, encoded(steps(32_000)), begin_time=begin, end_time=end)
    refused("is outside: the recording (its first stream) has 2.00 s", clip)


def test_a_byte_range_of_a_tar_equals_the_file(tmp_path):
    contents = [encoded(chirp(1.0)), encoded(chirp(1.0, 48_000), 48_000, "FLAC")]
    contents += [encoded(chirp(1.0), 16_000, "OGG", "OPUS"), encoded(chirp(1.0), 16_000, "MP3")]
    tar_path = tmp_path / "shard.tar"
    with tarfile.open(tar_path, "w") as tar:
        for i, content in enumerate(contents):
            info = tarfile.TarInfo(str(i))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with tarfile.open(tar_path) as tar:
        members = [(member.offset_data, member.size) for member in tar.getmembers()]
    for (offset, nbytes), content in zip(members, contents):
        alone = load_audio(clip_of(tmp_path / "alone", 1.0, content))
        assert torch.equal(load_audio(clip_of(tar_path, 1.0, offset=offset, nbytes=nbytes)), alone)
        part = clip_of(tar_path, 0.5, offset=offset, nbytes=nbytes, begin_time=0.25, end_time=0.75)
        if content is not contents[1]:  # 48 kHz: resampled from another first sample
            torch.testing.assert_close(load_audio(part), alone[4000:12_000], atol=1e-3, rtol=0)
    offset, nbytes = members[3]
    tar_path.write_bytes(tar_path.read_bytes()[: offset + nbytes - 1])
    refused(f"ends before byte {offset + nbytes}", clip_of(tar_path, 1.0, offset=offset, nbytes=nbytes))
    refused("cannot read it", clip_of(tar_path, 1.0, offset=3, nbytes=4000))  # not where a member starts


def test_a_file_that_cannot_be_used_is_an_error_that_names_line_and_file(tmp_path):
    (tmp_path / "a.wav").write_bytes(encoded(steps(100)))
    os.mkfifo(tmp_path / "pipe")  # would be waited for
    reasons = ["none No such file", ". is a directory", "a.wav/b Not a directory", "pipe no plain file"]
    for name, reason in (line.split(maxsplit=1) for line in [*reasons, "a" * 300 + " too long"]):
        refused(reason, clip_of(tmp_path / name, 1.0))
    for content in (b"", b"RIFF\x24\x00", b"<html>not found</html>" * 40):
        refused("cannot read it", clip_of(tmp_path / "b.wav", 1.0, content))
    refused("holds no samples", clip_of(tmp_path / "c.wav", 1.0, encoded(np.zeros(0))))
    for value in (np.nan, np.inf, -np.inf):
        x = steps(4000)
        x[1234] = value
        refused("NaN or infinite", clip_of(tmp_path / "d.wav", 0.25, encoded(x, subtype="FLOAT")))


@pytest.mark.parametrize(
    "manifest_s, fits", [(1.9, True), (2.1, True), (1.85, False), (2.15, False), (20.0, False)]
)
def test_duration_is_compared_with_the_audio(tmp_path, manifest_s, fits):
    clip = clip_of(tmp_path / "a.wav", manifest_s, encoded(steps(32_000)))
    if fits:
        assert len(load_audio(clip)) == 32_000
    else:
        refused(f"2.00 s decoded, the manifest says {manifest_s:.2f} s", clip)


KINDS = ["WAV PCM_16", "AIFF PCM_16", "FLAC PCM_16", "OGG VORBIS", "OGG OPUS", "MP3 MPEG_LAYER_III"]
ID3V2 = b"ID3\x04\0\0\0\0\x10\0" + b"\xff\xfb\x90\x64" * 512  # of 2,048 bytes that look like MP3
ID3V1 = b"TAG" + b"x" * 125


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_off_never_passes_for_a_short_clip(tmp_path, kind):
    content = encoded(chirp(3.0), 16_000, *kind.split())
    assert len(load_audio(clip_of(tmp_path / "a", 3.0, content))) == 48_000
    for share in (0.5, 0.9):
        cut = content[: int(share * len(content))]
        refused("", clip_of(tmp_path / "a", 3.0, cut))
        with contextlib.suppress(AudioError):  # nor where the manifest was made of the cut file
            refused("", clip_of(tmp_path / "a", data.audio_duration(cut)))


@pytest.mark.parametrize("kind", KINDS)
def test_tags_and_padding_around_the_audio_are_no_defect(tmp_path, kind):
    content = encoded(chirp(1.0), 16_000, *kind.split())
    alone = load_audio(clip_of(tmp_path / "a", 1.0, content))
    rest = [ID3V1, b"APETAGEX" + b"x" * 5000, bytes(5000)]
    if kind.startswith("WAV"):
        rest.append(b"LIST\xb8\x0b\0\0" + b"x" * 3000)
    for changed in (ID3V2 + content, *(content + tag for tag in rest)):
        assert data.audio_duration(changed) == 1.0
        torch.testing.assert_close(load_audio(clip_of(tmp_path / "a", 1.0, changed)), alone)


@pytest.mark.parametrize("kind", KINDS[2:5])
def test_files_that_were_joined_are_refused(tmp_path, kind):
    fmt, subtype = kind.split()
    contents = [encoded(chirp(seconds), 16_000, fmt, subtype) for seconds in (1.0, 0.2, 3.0)]
    clip = clip_of(tmp_path / "a", 1.0, b"".join(contents))
    refused("holds 3 streams in a row, of which only the first is read; re-encode it as one", clip)
    segment = clip_of(tmp_path / "a", 0.5, begin_time=1.1, end_time=1.6)
    refused("is outside: the recording (its first stream) has 1.00 s", segment)


@pytest.mark.parametrize(
    "size, reason",
    [(16_000, "holds 16000 bytes more"), (0, "holds 32000 bytes more"), (64_000, "is cut off")]
    + [(size, None) for size in (32_000, 31_999, 32_044, 0x7FFF_F000, 0xFFFF_FFFF)],
)
def test_the_size_of_wav_data_may_be_unknown_but_not_wrong(tmp_path, size, reason):
    """sox and ffmpeg write 7ffff000 and ffffffff to a pipe; some writers count the header."""
    content = bytearray(encoded(np.full(16_000, 0.5)))
    content[40:44] = size.to_bytes(4, "little")
    clip = clip_of(tmp_path / "a", 1.0, content)
    if reason is None:
        assert abs(len(load_audio(clip)) - 16_000) <= 1
    else:
        refused(reason, clip)


@pytest.mark.parametrize(
    "total, reason",
    [(0, "streamed or damaged"), (2**36 - 1, "streamed or damaged"), (80_000, "holds more frames")],
)
def test_a_flac_header_may_not_count_wrong(tmp_path, total, reason):
    """Nor does a count of hours (2^36 samples) or an unknown one (0) take memory."""
    content = bytearray(encoded(steps(160_000), 16_000, "FLAC"))
    content[21] = content[21] & 0xF0 | total >> 32
    content[22:26] = (total & 0xFFFF_FFFF).to_bytes(4, "big")
    seconds = 5.0 if total == 80_000 else 10.0
    refused(reason, clip_of(tmp_path / "a", seconds, content))
    if total != 80_000:
        with pytest.raises(AudioError, match="streamed or damaged"):
            data.audio_duration(bytes(content))


def loud_then_quiet():
    """Ten seconds of MP3 with a variable bit rate: a first frame of 417 bytes that counts the 384 others."""
    wave = 0.1 * steps(441_000)
    wave[44_100:] *= 0.001
    return encoded(wave, 44_100, "MP3", bitrate_mode="VARIABLE")


# Without the first frame: the decoder's own delay, 529 samples, is known and left out.
STREAMED_SAMPLES = 384 * 1152 - 529


@pytest.mark.parametrize("tags", [(b"", b""), (ID3V2 + bytes(99), ID3V1)])
def test_mp3_from_a_streaming_encoder_is_as_long_as_its_frames(tmp_path, tags):
    """By the size of the first frame libsndfile expects 2.1 s, and reads no more."""
    content = tags[0] + loud_then_quiet()[417:] + tags[1]
    assert data.audio_duration(content) == STREAMED_SAMPLES / 44_100
    waveform = load_audio(clip_of(tmp_path / "a", 10.03, content))
    assert len(waveform) == math.ceil(STREAMED_SAMPLES * 16_000 / 44_100)
    segment = load_audio(clip_of(tmp_path / "a", 1.0, begin_time=8.0, end_time=9.0))
    torch.testing.assert_close(segment[99:-99], waveform[128_099:143_901], atol=1e-5, rtol=0)


def test_mp3_from_a_streaming_encoder_holds_the_same_sound(tmp_path):
    """With 576 samples more in front: the encoder's delay stood in the missing frame."""
    whole = encoded(chirp(3.0), 16_000, "MP3")
    expected = load_audio(clip_of(tmp_path / "a", 3.0, whole))
    streamed = whole[data.mp3_frame_bytes(whole[:4]) :]
    waveform = load_audio(clip_of(tmp_path / "b", 3.0, streamed))
    torch.testing.assert_close(waveform[576:48_576], expected, atol=1e-4, rtol=0)


def test_mp3_with_a_wrong_count_and_joined_mp3_are_as_long_as_their_frames(tmp_path):
    whole = loud_then_quiet()
    for count in (0, 10, 383, 385, 4000):
        content = whole[:29] + count.to_bytes(4, "big") + whole[33:]
        assert data.audio_duration(content) == STREAMED_SAMPLES / 44_100
    n_samples = 2 * 384 * 1152 + 1152 - 529  # a first frame in the middle is silence
    (tmp_path / "a").write_bytes(whole + ID3V1 + ID3V2 + whole)
    assert data.audio_duration(tmp_path / "a") == n_samples / 44_100
    assert len(load_audio(clip_of(tmp_path / "a", 20.0))) == math.ceil(n_samples * 16_000 / 44_100)


def test_mp3_with_a_hole_or_another_end_or_a_change_of_channels_is_refused(tmp_path):
    whole = loud_then_quiet()
    for content in (whole, whole[417:]):
        damaged = content[:30_000] + bytes(2000) + content[32_000:]
        refused("more than its headers count", clip_of(tmp_path / "a", 10.0, damaged))
        refused("is cut off", clip_of(tmp_path / "b", 10.0, content[:-1]))
    stereo = encoded(steps(44_100, 2), 44_100, "MP3")
    refused("is damaged: ", clip_of(tmp_path / "c", 11.0, whole + stereo))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000])
def test_frames_are_counted_in_every_kind_of_mp3(rate, channels):
    frame = 1152 if rate >= 32_000 else 576
    content = encoded(steps(rate, channels), rate, "MP3")
    assert data.audio_duration(content) == 1.0
    streamed = content[data.mp3_frame_bytes(content[:4]) :]
    n_frames = math.ceil((rate + 1105) / frame)  # the encoder's delay is 1,105 samples
    lengths = [((n_frames + more) * frame - 529) / rate for more in (0, 1)]
    assert data.audio_duration(streamed) in lengths


def test_clip_from_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    soundfile.write("a.flac", steps(12_000), 8000)
    clip = data.clip_from_file("a.flac")
    assert (clip.audio, clip.where, clip.duration) == (str(tmp_path / "a.flac"), "a.flac", 1.5)
    assert len(load_audio(clip)) == 24_000
    (tmp_path / "text.raw").write_text("no audio " * 200)
    for name in ("missing.wav", "text.raw", "."):
        raises_at(name, InputError, "", data.clip_from_file, name)


# One sentence in 50 formats and defects. Clips that are too short, too long or silent are no defect here.
EDGE_CASES = json.loads((EDGE / "edge.json").read_text()) if (EDGE / "edge.json").exists() else []
EDGE_REFUSED = (
    "stereo_antiphase_44k.wav aac.m4a float_nan.wav zero_samples.wav truncated_half.wav truncated_header.wav "
    "empty_file.wav not_audio.wav header_zero_len.wav truncated_half.flac truncated_half.opus "
    "raw_pcm_no_header.pcm"
).split()
EDGE_SECONDS = {
    "silence_3s.wav": 3.0,
    "one_sample.wav": 1 / 16_000,
    "ten_ms.wav": 0.01,
    "exact_30s.wav": 30.0,
    "over_30s.flac": 47.0,
}
EDGE_LEAST_CORRELATION = {"clipped.wav": 0.8, "quiet_-60dB.wav": 0.98}


@pytest.mark.skipif(not EDGE_CASES, reason=f"no {EDGE}/edge.json; set ASR_OPD_DATA to the folder with edge/")
@pytest.mark.parametrize("name", [case["file"] for case in EDGE_CASES])
def test_edge_file_loads_as_the_same_speech_or_is_refused(name):
    clip = clip_of(EDGE / name, EDGE_SECONDS.get(name, 2.435))
    if name in EDGE_REFUSED:
        refused("", clip)
        return
    waveform = load_audio(clip)
    assert abs(len(waveform) / 16_000 - clip.duration) < 0.05 and waveform.isfinite().all()
    if name == "silence_3s.wav":
        assert not waveform.any()
    elif clip.duration > 1:
        expected = load_audio(clip_of(EDGE / "wav_s16_16k.wav", 2.435))
        n = min(len(waveform), len(expected))
        correlation = torch.corrcoef(torch.stack([waveform[:n], expected[:n]]))[0, 1]
        assert correlation > EDGE_LEAST_CORRELATION.get(name, 0.995)
