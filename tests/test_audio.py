"""Audio of data.py: formats, codecs, segments, tars, and files that are cut off, damaged or joined."""

import io
import math
import os
import pathlib
import tarfile

import av
import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
from test_data import raises_at, steps

import data
from data import AudioError, Clip, load_audio


def chirp(seconds, rate=16_000):
    """(samples,) float32, 200 Hz to 3 kHz, the same sound at any rate: a wrong position shows."""
    t = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * (200 + 1400 * t / seconds) * t)).astype(np.float32)


def encoded(wave, rate=16_000, fmt="WAV", subtype=None, **options):
    """The bytes of a sound file."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=fmt, subtype=subtype, **options)
    return file.getvalue()


def by_ffmpeg(path, wave, codec, rate):
    """Writes a sound file by FFmpeg, in the format that its name says."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        stream.bit_rate = 12_200 if "amr" in codec else 64_000
        stream.codec_context.open()  # tells the frame size
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        frame.pts = 0
        size = stream.codec_context.frame_size or 1024
        frames = av.AudioResampler(stream.codec_context.format, "mono", rate, size)
        for piece in [*frames.resample(frame), *frames.resample(None), None]:
            container.mux(stream.encode(piece))
    return path


def best_lag(waveform, expected):
    """(lag, correlation) where `expected` fits best: not every codec's delay is in its file."""
    waveform = np.asarray(waveform)
    lag = max(int(scipy.signal.correlate(waveform, expected, "valid").argmax()), 0)
    return lag, np.corrcoef(waveform[lag : lag + len(expected)], expected)[0, 1]


def clip_of(path, duration, content=None, **times):
    """A clip of a file, which is written first where its content is given."""
    if content is not None:
        pathlib.Path(path).write_bytes(content)
    return Clip(str(path), duration, "m.jsonl:7", {}, **times)


def refused(reason, clip):
    raises_at(f"m.jsonl:7: {clip.audio}", AudioError, reason, load_audio, clip)


LOSSLESS = (
    "WAV PCM_U8,WAV PCM_16,WAV PCM_24,WAV PCM_32,WAV FLOAT,WAV DOUBLE,FLAC PCM_16,FLAC PCM_24,AIFF PCM_16"
)
TIMES = [
    (-1, -1, 0, 32_000),
    (1.5, -1, 24_000, 32_000),
    (-1, 0.25, 0, 4000),
    (1.0001, 1.9999, 16_002, 31_998),
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
    assert waveform.dtype == torch.float32
    assert torch.equal(waveform, torch.from_numpy(x[first:last, 0]))


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 48_000])
def test_resampling_keeps_pitch_phase_and_length(tmp_path, rate):
    n = rate * 3 // 2 + 1
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(n) / rate)
    waveform = load_audio(clip_of(tmp_path / "a.wav", n / rate, encoded(tone, rate, subtype="FLOAT")))
    assert len(waveform) == math.ceil(n * 16_000 / rate)
    expected = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(len(waveform), dtype=torch.float64) / 16_000)
    assert (waveform - expected)[100:-100].abs().max() < 3e-3


BY_LIBSNDFILE = (
    "OGG VORBIS 16000,OGG OPUS 16000,OGG OPUS 48000,MP3 MPEG_LAYER_III 16000,MP3 MPEG_LAYER_III 44100"
)
BY_FFMPEG = (
    "m4a aac 16000,m4a aac 44100,mp4 alac 16000,mov pcm_s16le 16000,webm libopus 48000,wma wmav2 16000,"
    "amr libopencore_amrnb 8000,3gp aac 16000,aac aac 16000,mka flac 16000,mp2 mp2 44100,wv wavpack 16000"
)


@pytest.mark.parametrize("kind", [*BY_LIBSNDFILE.split(","), *BY_FFMPEG.split(",")])
def test_codecs_give_the_same_sound_in_place_and_segments_to_the_sample(tmp_path, kind):
    """Whatever a seek misplaces or spoils: Vorbis by libsndfile, first frames of MP3, the times of webm."""
    fmt, codec, rate = kind.split()
    rate = int(rate)
    path = tmp_path / f"a.{fmt}"
    if kind in BY_LIBSNDFILE:
        path.write_bytes(encoded(chirp(4.0, rate), rate, fmt, codec))
    else:
        by_ffmpeg(path, chirp(4.0, rate), codec, rate)
    assert data.audio_duration(path.read_bytes()) == pytest.approx(4.0, abs=0.1)
    whole = load_audio(clip_of(path, 4.0))
    assert abs(len(whole) - 64_000) < 1600
    lag, correlation = best_lag(whole, chirp(4.0)[2000:58_000])
    has_delay = fmt in ("wma", "aac", "mp2", "amr")  # which the file does not tell
    assert abs(lag - 2000) <= (3000 if has_delay else 1) and correlation > 0.9
    for begin, end in ((0.5, 1.0), (1.3, 2.2), (3.0, 3.9)):
        waveform = load_audio(clip_of(path, end - begin, begin_time=begin, end_time=end))
        expected = whole[round(begin * 16_000) : round(end * 16_000)]
        assert len(waveform) == len(expected)
        inner = slice(0, None) if rate == 16_000 else slice(100, -100)  # resampled from another first sample
        torch.testing.assert_close(waveform[inner], expected[inner], atol=2e-4, rtol=0)


CANNOT_SEEK = "WAV GSM610,WAV G721_32,AU G723_24,AU G723_40,WAV NMS_ADPCM_16,WAV NMS_ADPCM_32,AIFF GSM610"


@pytest.mark.parametrize("kind", CANNOT_SEEK.split(","))
def test_codecs_that_cannot_seek_are_read_from_the_start(tmp_path, kind):
    content = encoded(chirp(2.0, 8000), 8000, *kind.split())
    whole, _ = soundfile.read(io.BytesIO(content), 16_000, dtype="float32")
    expected = data.resampler(8000, 16_000)(torch.from_numpy(whole))[:31_900]  # some codecs fill a last block
    waveform = load_audio(clip_of(tmp_path / "a", 2.0, content))
    torch.testing.assert_close(waveform[:31_900], expected)
    waveform = load_audio(clip_of(tmp_path / "a", 0.5, begin_time=1.0, end_time=1.5))
    assert torch.equal(waveform, data.resampler(8000, 16_000)(torch.from_numpy(whole[8000:12_000])))


def test_channels_are_averaged_and_opposite_ones_refused(tmp_path):
    x = steps(4000, channels=2)
    content = encoded(x, subtype="FLOAT")
    expected = torch.from_numpy((x[:, 0] + x[:, 1]) / 2)
    assert torch.equal(load_audio(clip_of(tmp_path / "a.wav", 0.25, content)), expected)
    assert not load_audio(clip_of(tmp_path / "c.wav", 0.25, encoded(0 * x))).any()  # silence is no defect
    opposite = encoded(x[:, :1] * [1, -1], subtype="FLOAT")
    refused("opposite phase", clip_of(tmp_path / "d.wav", 0.25, opposite))


@pytest.mark.parametrize("begin, end", [(2.0, -1), (2.5, 3.0), (1.0, 2.2)])
def test_a_segment_past_the_end_is_an_error(tmp_path, begin, end):
    for kind in ("WAV", "MP3"):
        content = encoded(chirp(2.0), fmt=kind)
        clip = clip_of(tmp_path / kind, 1.0, content, begin_time=begin, end_time=end)
        refused("and ends before the clip does", clip)


def test_a_byte_range_of_a_tar_equals_the_file(tmp_path):
    names = ("WAV", "OGG", "MP3")
    tar_path = tmp_path / "shard.tar"
    with tarfile.open(tar_path, "w") as tar:
        for name in names:
            (tmp_path / name).write_bytes(encoded(chirp(1.0), fmt=name))
            tar.add(tmp_path / name, name)
    with tarfile.open(tar_path) as tar:
        members = tar.getmembers()
    for name, member in zip(names, members):
        place = {"offset": member.offset_data, "nbytes": member.size}
        alone = load_audio(clip_of(tmp_path / name, 1.0))
        assert torch.equal(load_audio(clip_of(tar_path, 1.0, **place)), alone)
        part = clip_of(tar_path, 0.5, begin_time=0.25, end_time=0.75, **place)
        torch.testing.assert_close(load_audio(part), alone[4000:12_000], atol=1e-3, rtol=0)
    end = place["offset"] + place["nbytes"]
    os.truncate(tar_path, end - 1)
    refused(f"ends before byte {end}", clip_of(tar_path, 1.0, **place))
    refused("cannot be decoded", clip_of(tar_path, 1.0, offset=3, nbytes=4000))  # not where a member starts


def test_a_file_that_cannot_be_used_is_an_error_that_names_line_and_file(tmp_path):
    (tmp_path / "a.wav").write_bytes(encoded(steps(100)))
    reasons = {"none": "No such file", ".": "Is a directory", "a.wav/b": "Not a directory"}
    for name, reason in reasons.items():
        refused(reason, clip_of(tmp_path / name, 1.0))
    for content in (b"", b"RIFF\x24\x00", b"<html>not found</html>" * 40):
        refused("cannot be decoded", clip_of(tmp_path / "b.wav", 1.0, content))
    soundfile.write(tmp_path / "secret.wav", steps(16_000), 16_000)  # a playlist could open any file
    playlist = (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/secret.wav\n#EXT-X-ENDLIST\n".encode()
    )
    refused("cannot be decoded", clip_of(tmp_path / "c.m3u8", 1.0, playlist))
    refused("holds 0.00 s from 0 s on", clip_of(tmp_path / "c.wav", 1.0, encoded(np.zeros(0))))
    for value in (np.nan, np.inf):
        x = steps(4000)
        x[1234] = value
        refused("NaN or infinite", clip_of(tmp_path / "d.wav", 0.25, encoded(x, subtype="FLOAT")))
    loud = 12 * steps(4000)  # peaks of 9.4 are no defect, those of 25,600 are
    clip = clip_of(tmp_path / "e.wav", 0.25, encoded(loud, subtype="FLOAT"))
    assert torch.equal(load_audio(clip), torch.from_numpy(loud[:, 0]))
    clip = clip_of(tmp_path / "e.wav", 0.25, encoded(32_768 * steps(4000), subtype="FLOAT"))
    refused("divide by 32768", clip)


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
def test_a_file_that_is_cut_off_never_passes_for_a_whole_clip(tmp_path, kind):
    """Nor does a WAV or FLAC where the manifest was made of what is left."""
    content = encoded(chirp(3.0), 16_000, *kind.split())
    for share in (0.5, 0.8):
        refused("", clip_of(tmp_path / "a", 3.0, content[: int(share * len(content))]))
        if kind in ("WAV PCM_16", "FLAC PCM_16"):
            refused("", clip_of(tmp_path / "a", 3.0 * share))


@pytest.mark.parametrize("kind", ["WAV PCM_16", "FLAC PCM_16", "OGG VORBIS", "MP3 MPEG_LAYER_III"])
def test_tags_chunks_and_rubbish_behind_the_audio_are_no_defect(tmp_path, kind):
    content = encoded(chirp(1.0), 16_000, *kind.split())
    alone = load_audio(clip_of(tmp_path / "a", 1.0, content))
    ends = [ID3V1, b"APETAGEX" + b"x" * 5000, bytes(5000)]
    changed = [content + end for end in ends]
    if "FLAC" in kind or "MP3" in kind:
        changed.append(ID3V2 + content)
    for content in changed:
        assert data.audio_duration(content) == pytest.approx(1.0, abs=0.03)
        waveform = load_audio(clip_of(tmp_path / "a", 1.0, content))
        assert len(waveform) - 16_000 in range(500)
        torch.testing.assert_close(waveform[:16_000], alone)


@pytest.mark.parametrize("kind", KINDS[2:])
def test_files_that_were_joined_are_read_whole(tmp_path, kind):
    waves = [chirp(1.0), chirp(0.2), chirp(3.0)]
    content = b"".join(encoded(wave, 16_000, *kind.split()) for wave in waves)
    clip = clip_of(tmp_path / "a", 4.2, content)
    seconds = data.audio_duration(content)  # MP3 encoders pad each of them
    assert 4.15 < seconds < (4.6 if "MP3" in kind else 4.3)
    clip.duration = seconds
    whole = load_audio(clip)
    lag, correlation = best_lag(whole, waves[2][:46_000])
    assert 1.1 < lag / 16_000 < 1.5 and correlation > 0.9
    segment = load_audio(clip_of(tmp_path / "a", 0.9, begin_time=2.1, end_time=3.0))
    torch.testing.assert_close(segment[99:-99], whole[33_699:47_901], atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [0, 31_999, 32_000, 32_044, 0x7FFF_F000, 0xFFFF_FFFF])
def test_the_size_of_wav_data_may_be_unknown(tmp_path, size):
    """sox and ffmpeg write 7ffff000 and ffffffff to a pipe, others 0; some writers count the header."""
    content = bytearray(encoded(np.full(16_000, 0.5)))
    content[40:44] = size.to_bytes(4, "little")
    assert abs(len(load_audio(clip_of(tmp_path / "a", 1.0, content))) - 16_000) <= 1


@pytest.mark.parametrize("total", [0, 2**36 - 1])
def test_the_number_of_flac_samples_may_be_unknown(tmp_path, total):
    x = steps(160_000)
    content = bytearray(encoded(x, 16_000, "FLAC"))
    content[21] = content[21] & 0xF0 | total >> 32
    content[22:26] = (total & 0xFFFF_FFFF).to_bytes(4, "big")
    assert data.audio_duration(bytes(content)) == pytest.approx(10)
    assert torch.equal(load_audio(clip_of(tmp_path / "a", 10.0, content)), torch.from_numpy(x[:, 0]))


def loud_then_quiet():
    """Ten seconds of MP3 with a variable bit rate: a first frame of 417 bytes that counts the 384 others."""
    wave = 0.1 * steps(441_000)
    wave[44_100:] *= 0.001
    return encoded(wave, 44_100, "MP3", bitrate_mode="VARIABLE")


def test_mp3_is_as_long_as_its_frames(tmp_path):
    """By the size of the first frame libsndfile expects 2.1 s, by a wrong count what it says."""
    whole = loud_then_quiet()
    contents = [whole[417:], ID3V2 + whole[417:] + ID3V1]  # from a streaming encoder
    contents += [whole[:29] + count.to_bytes(4, "big") + whole[33:] for count in (0, 385, 4000)]
    for content in contents:
        assert data.audio_duration(content) == pytest.approx(10.0, abs=0.04)
        waveform = load_audio(clip_of(tmp_path / "a", 10.0, content))
        segment = load_audio(clip_of(tmp_path / "a", 1.0, begin_time=8.0, end_time=9.0))
        torch.testing.assert_close(segment[99:-99], waveform[128_099:143_901], atol=1e-5, rtol=0)


def test_mp3_with_a_hole_or_a_change_of_channels_is_refused(tmp_path):
    whole = loud_then_quiet()
    damaged = whole[:30_000] + bytes(2000) + whole[32_000:]
    refused("cannot be decoded", clip_of(tmp_path / "a", 10.0, damaged))
    stereo = encoded(steps(44_100, 2), 44_100, "MP3")
    refused("changes its sample rate or channels", clip_of(tmp_path / "c", 11.0, whole + stereo))


def test_what_a_library_would_choke_on(tmp_path):
    """A tag in no known encoding is passed over; too many channels and an odd rate are refused."""
    mp3 = by_ffmpeg(tmp_path / "a.mp3", chirp(1.0), "libmp3lame", 16_000)
    tag = b"TAG" + "中文歌曲".encode("gbk").ljust(125, b"\0")
    mp3.write_bytes(mp3.read_bytes() + tag)
    assert data.audio_duration(mp3.read_bytes()) == pytest.approx(1.0, abs=0.1)
    wide = tmp_path / "wide.mov"
    with av.open(str(wide), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16_000, layout="hexadecagonal")
        samples = np.zeros((1, 16 * 16_000), dtype=np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="hexadecagonal")
        frame.sample_rate = 16_000
        for piece in (frame, None):
            container.mux(stream.encode(piece))
    odd = tmp_path / "odd.wav"
    odd.write_bytes(encoded(chirp(1.0, 7919), 7919))
    for path, message in ((wide, "more than 8 channels"), (odd, "7919 Hz, has no usable ratio")):
        with pytest.raises(AudioError, match=message):
            load_audio(Clip(str(path), 1.0, "m.jsonl:1", {}))
