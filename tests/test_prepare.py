"""prepare/: corpora in their own layouts to exact lines and shards, what is left out; prepare.check."""

import importlib
import io
import json
import os
import pathlib
import tarfile
import tracemalloc

import numpy as np
import pytest
import soundfile

import data
import prepare.manifest
from data import InputError

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def call(name, *argv):
    """`python -m prepare.NAME argv` in this process."""
    script = importlib.import_module(f"prepare.{name}")
    script.main(script.parse_args([str(arg) for arg in argv]))


@pytest.fixture
def run(tmp_path, capsys):
    """run(corpus, ROOT, flags) → manifest lines, [(count, reason, first)] of what was left out."""

    def run(name, root, *flags, out="m.jsonl"):
        call(name, root, "--out", tmp_path / out, *flags)
        summary, *left_out = capsys.readouterr().out.splitlines()
        lines = data.read_lines(tmp_path / out)
        assert f"{len(lines)} clips, " in summary
        groups = {}  # reason → which
        for clip in data.read_lines((tmp_path / out).with_suffix(".left-out.jsonl")) if left_out else []:
            groups.setdefault(clip["reason"], []).append(clip["which"])
        return lines, [(len(which), reason, which[0]) for reason, which in groups.items()]

    return run


def refused(out, name, *argv):
    """The message of a refused call, which leaves no manifest, no shard and nothing unfinished."""
    with pytest.raises(InputError) as caught:
        call(name, *argv, "--out", out)
    left_over = [path for path in out.parent.glob("*.jsonl*") if not path.name.endswith("left-out.jsonl")]
    assert not left_over and not list(out.parent.glob("*.tar"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def waveforms(path):
    """{id: waveform} of a manifest."""
    return {clip.fields["id"]: data.load_audio(clip) for clip in data.read_manifest(str(path))}


def sound(path, seconds=0.25, seed=0, rate=16_000, channels=1, **kind):
    """Writes noise in multiples of 1/128, exact in every PCM width: a shift by one sample shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = np.random.default_rng(seed).integers(-60, 61, (round(seconds * rate), channels))
    soundfile.write(path, steps.astype(np.float32) / 128, rate, **kind)
    return path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------
# One small tree of each corpus
# ----------------------------------------------------------------------------------------------------------


def librispeech(root):
    for i, name in enumerate(["test-clean/84/121123", "test-clean/84/121124", "dev-clean/1272/128104"]):
        stem = "-".join(name.split("/")[1:])
        sound(root / name / f"{stem}-0000.flac", 0.25 * (i + 1), seed=i)
        write(root / name / f"{stem}.trans.txt", f"{stem}-0000 IT'S TEXT {i}\n")
    return root


def aishell1(root):
    for i, name in enumerate(["dev/S0724/BAC009S0724W0121", "test/S0764/BAC009S0764W0122"]):
        sound(root / "wav" / f"{name}.wav", 0.25 * (i + 1), seed=i)
    texts = "\ufeffBAC009S0724W0121 一二线  城市 A P P\t虽然\nBAC009S0764W0122 据 悉\n"
    write(root / "transcript/aishell_transcript_v0.8.txt", texts)
    return root


def segment(sid, begin, end, *subsets, text="你好"):
    return {"sid": sid, "begin_time": begin, "end_time": end, "subsets": subsets, "text": text}


def wenetspeech(root, recordings=None):
    """By default one recording of 2 s with three segments."""
    if recordings is None:
        sound(root / "audio/Y01.wav", 2.0, seed=7)
        first = segment("Y01_S0", 0, 0.5, "L", "M", text="一 only L")
        segments = [first, segment("Y01_S1", 0.61, 1.36, "L"), segment("Y01_S2", 1.5, 2, "TEST_NET")]
        recordings = [{"aid": "Y01", "path": "audio/Y01.wav", "duration": 2.0, "segments": segments}]
    write(root / "WenetSpeech.json", json.dumps({"audios": recordings}, ensure_ascii=False))
    return root


def kaldi(root):
    sound(root / "a.wav", 0.25, seed=1)
    sound(root / "b.flac", 0.5, seed=2)
    write(root / "wav.scp", "utt1 a.wav\nutt2 b.flac\n")
    return root


def folder(root):
    sound(root / "b/two.flac", 0.5, seed=1)
    sound(root / "a.wav", 0.25, seed=2)
    write(root / "a.txt", "hello")
    return root


def pitch_hz(digit, speaker):
    return 400 + 240 * digit + 100 * ("ann", "bob").index(speaker)


def fsdd(root, takes=(0, 1, 5)):
    """A tone a take, its pitch by digit and speaker, its level by digit. Test takes: 0.1 s, else 0.12 s."""
    root.mkdir(parents=True)
    for speaker in ("ann", "bob"):
        for digit in range(10):
            for take in takes:
                t = np.arange(800 if take < 5 else 960) / 8000
                edges = np.sin(np.pi / 2 * np.clip(500 * np.minimum(t, t[-1] - t), 0, 1)) ** 2  # 2 ms
                tone = 0.6 / (1 + digit) * edges * np.sin(2 * np.pi * pitch_hz(digit, speaker) * t)
                soundfile.write(root / f"{digit}_{speaker}_{take}.wav", tone, 8000, subtype="PCM_16")
    return root


CORPORA = {  # name: (builder, clips, what is looked for)
    "librispeech": (librispeech, 3, "trans.txt"),
    "aishell1": (aishell1, 2, "aishell_transcript_v0.8.txt"),
    "wenetspeech": (wenetspeech, 3, "WenetSpeech.json"),
    "kaldi": (kaldi, 2, "wav.scp"),
    "folder": (folder, 2, ".wav"),
    "fsdd": (fsdd, 4, "digit_speaker_take"),
}


# ----------------------------------------------------------------------------------------------------------
# What all corpora have in common
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORPORA)
def test_manifest_reads_back_as_audio_of_the_stated_duration(name, run, tmp_path, monkeypatch):
    """Also from another current folder: audio below the manifest is relative to it."""
    build, n_clips, _ = CORPORA[name]
    build(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    flags = ["--count", 4] if name == "fsdd" else []
    lines, left_out = run(name, "corpus", *flags)
    monkeypatch.chdir("/")
    waves = waveforms(tmp_path / "m.jsonl")
    assert len(lines) == len(waves) == n_clips and left_out == []
    for line in lines:
        assert len(waves[line["id"]]) == pytest.approx(line["duration"] * 16_000, abs=1)
        assert not os.path.isabs(line["audio"]) and waves[line["id"]].any()
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("name", CORPORA)
def test_nothing_found_names_the_folder_and_what_was_looked_for(name, tmp_path):
    (tmp_path / "empty").mkdir()
    message = refused(tmp_path / "m.jsonl", name, tmp_path / "empty")
    assert str(tmp_path / "empty") in message and CORPORA[name][2] in message


def test_an_existing_manifest_or_shard_is_refused_and_left_alone(tmp_path):
    root = folder(tmp_path / "clips")
    (tmp_path / "m.jsonl").write_bytes(b"precious")
    with pytest.raises(InputError, match="m.jsonl exists"):
        call("folder", root, "--out", tmp_path / "m.jsonl")
    (tmp_path / "x-00000.tar").write_bytes(b"precious")
    with pytest.raises(InputError, match="x-00000.tar exists"):
        call("folder", root, "--out", tmp_path / "n.jsonl", "--pack", tmp_path / "x.tar")
    assert (tmp_path / "m.jsonl").read_bytes() == (tmp_path / "x-00000.tar").read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "m.jsonl", "x-00000.tar"]


# ----------------------------------------------------------------------------------------------------------
# The corpora
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["up", "up/LibriSpeech"])
def test_librispeech(root, run, tmp_path):
    librispeech(tmp_path / "up/LibriSpeech")
    lines, _ = run("librispeech", tmp_path / root)
    assert [line["id"] for line in lines] == ["1272-128104-0000", "84-121123-0000", "84-121124-0000"]
    audio = "up/LibriSpeech/test-clean/84/121123/84-121123-0000.flac"
    known = dict(text="IT'S TEXT 0", language="en", speaker="84", duration=0.25)
    assert lines[1] == dict(id="84-121123-0000", audio=audio, **known)
    lines, _ = run("librispeech", tmp_path / root, "--split", "dev-clean", out="dev.jsonl")
    assert [line["id"] for line in lines] == ["1272-128104-0000"]


def test_librispeech_leaves_out_what_has_no_partner(run, tmp_path):
    chapter = librispeech(tmp_path / "ls") / "test-clean/84/121123"
    sound(chapter / "84-121123-0007.flac")
    sound(chapter / "84-121123-0008.flac")
    write(chapter / "84-121123.trans.txt", "84-121123-0000 A\n84-121123-0009 B\n")
    lines, left_out = run("librispeech", tmp_path / "ls")
    assert len(lines) == 3 and left_out == [
        (2, "no transcript", f"{chapter}/84-121123-0007.flac"),
        (1, "no audio file", f"{chapter}/84-121123-0009.flac"),
    ]
    write(chapter / "84-121123.trans.txt", "84-121123-0000 A\n84-121123-0000 B\n")
    assert "84-121123-0000 is there twice" in refused(tmp_path / "no/m.jsonl", "librispeech", tmp_path / "ls")


def test_aishell1(run, tmp_path):
    root = aishell1(tmp_path / "up/data_aishell")
    sound(root / "wav/dev/S0724/BAC009S0724W0400.wav")
    lines, left_out = run("aishell1", tmp_path / "up")
    assert [line["text"] for line in lines] == ["一二线城市APP虽然", "据悉"]
    audio = "up/data_aishell/wav/test/S0764/BAC009S0764W0122.wav"
    known = dict(text="据悉", language="zh", speaker="S0764", duration=0.5)
    assert lines[1] == dict(id="BAC009S0764W0122", audio=audio, **known)
    assert left_out == [(1, "no transcript", f"{root}/wav/dev/S0724/BAC009S0724W0400.wav")]
    lines, _ = run("aishell1", root, "--split", "test", out="test.jsonl")
    assert [line["speaker"] for line in lines] == ["S0764"]


def test_wenetspeech(run, tmp_path):
    root = wenetspeech(tmp_path / "w")
    lines, _ = run("wenetspeech", root)
    known = dict(text="你好", language="zh", recording="Y01", begin_time=0.61, end_time=1.36, duration=0.75)
    assert lines[1] == dict(id="Y01_S1", audio="w/audio/Y01.wav", **known)
    whole, _ = soundfile.read(root / "audio/Y01.wav", dtype="float32")
    assert np.array_equal(waveforms(tmp_path / "m.jsonl")["Y01_S1"].numpy(), whole[9_760:21_760])
    lines, _ = run("wenetspeech", root, "--split", "TEST_NET", "M", out="two.jsonl")
    assert [line["id"] for line in lines] == ["Y01_S0", "Y01_S2"]
    out = tmp_path / "no/m.jsonl"
    flags = ["--split", "L", "TEST_MEETING", "--pack", tmp_path / "no/x.tar"]
    assert "TEST_MEETING" in refused(out, "wenetspeech", root, *flags)  # at its end: L is packed already
    path = root / "WenetSpeech.json"
    path.write_bytes(path.read_bytes()[:-60])
    assert "cut off" in refused(out, "wenetspeech", root)


def test_wenetspeech_is_read_as_a_stream_and_opens_no_recording(tmp_path, capsys):
    """8 MB of JSON in under 3; of the 2,000 recordings one exists, and that is no audio."""
    recordings = []
    for n in range(2_000):
        segments = [segment(f"Y{n}_S{s}", 3600 * s, 3600 * s + 0.5, "L", text="长" * 350) for s in range(4)]
        recordings.append({"aid": f"Y{n}", "path": f"Y{n}.opus", "segments": segments})
    wenetspeech(tmp_path, recordings)
    (tmp_path / "Y0.opus").touch()
    tracemalloc.start()
    call("wenetspeech", tmp_path, "--out", tmp_path / "first.jsonl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"{tmp_path}/first.jsonl: 4 clips" in capsys.readouterr().out
    assert (tmp_path / "WenetSpeech.json").stat().st_size > 8e6 and peak < 3e6


def test_kaldi_writes_no_language_but_the_given_one(run, tmp_path):
    root = kaldi(tmp_path / "k")
    lines, _ = run("kaldi", root)
    assert lines[1] == dict(id="utt2", audio="k/b.flac", duration=0.5) and len(lines) == 2
    write(root / "text", "utt2 今天 天气\n")
    write(root / "utt2spk", "utt2 王\n")
    lines, left_out = run("kaldi", root, "--language", "Mandarin", out="zh.jsonl")
    known = dict(language="zh", speaker="王", text="今天 天气")
    assert lines == [dict(id="utt2", audio="k/b.flac", duration=0.5, **known)]
    assert left_out == [(1, "no transcript", "utt1")]


def test_kaldi_segments(run, tmp_path):
    """An end of −1 is the end of the recording; a channel is read."""
    root = kaldi(tmp_path / "k")
    sound(root / "c.wav", 0.5, channels=2)
    write(root / "wav.scp", "r1 a.wav\nr2 b.flac\nr3 c.wav\n")
    segments = ["s1 r1 0.05 0.2", "s2 r2 0.125 -1", "s3 r2 0 0.25 1", "s4 r2 0 0.25 2", "s5 r3 0 0.25 1"]
    write(root / "segments", "\n".join(segments))
    lines, [(n, reason, first)] = run("kaldi", root)
    keys = ("id", "recording", "begin_time", "end_time", "duration")
    assert [tuple(line[key] for key in keys) for line in lines] == [
        ("s1", "r1", 0.05, 0.2, 0.15),
        ("s2", "r2", 0.125, -1, 0.375),
        ("s3", "r2", 0, 0.25, 0.25),
    ]
    assert (n, first) == (2, "s4") and "split the recording" in reason
    whole, _ = soundfile.read(root / "b.flac", dtype="float32")
    assert np.array_equal(waveforms(tmp_path / "m.jsonl")["s2"].numpy(), whole[2_000:])


def test_kaldi_paths_and_commands(run, tmp_path, monkeypatch):
    """Paths start at ROOT, then at the current folder; commands are never run.

    Audio below the manifest is relative to it, other audio absolute.
    """
    root = kaldi(tmp_path / "k")
    sound(tmp_path / "here/my clips/c.wav", 0.75)
    with open(root / "wav.scp", "a") as file:
        file.write(f"utt3 my clips/c.wav\nutt4 touch {tmp_path}/ran; cat a.wav |  \nutt5 gone.wav\n")
    monkeypatch.chdir(tmp_path / "here")
    lines, left_out = run("kaldi", "../k", out="here/m.jsonl")
    assert [line["audio"] for line in lines] == [f"{root}/a.wav", f"{root}/b.flac", "my clips/c.wav"]
    assert len(waveforms(tmp_path / "here/m.jsonl")) == 3
    assert left_out == [
        (1, "its audio is a command, which is never run", f"utt4 touch {tmp_path}/ran; cat a.wav |"),
        (1, "no audio file", "utt5 gone.wav"),
    ]
    assert not (tmp_path / "ran").exists()


def test_folder_texts(run, tmp_path):
    root = tmp_path / "clips"
    for name in ("b/z.wav", "a.ogg", "d d.mp3", "gbk.wav"):
        sound(root / name)
    sound(root / "b/y.WAV", format="WAV")
    (root / "b/z.txt").write_bytes("\ufeff \t你好，世界 \r\n".encode())
    write(root / "b/y.TXT", "Two  words\n\n")
    (root / "gbk.txt").write_bytes("今天天气".encode("gbk"))
    lines, left_out = run("folder", root, "--language", "de")
    assert {line["language"] for line in lines} == {"de"}
    texts = {line["id"]: line.get("text") for line in lines}
    known = {"b/y.WAV": "Two  words", "b/z.wav": "你好，世界"}
    assert texts == {"a.ogg": None, "d d.mp3": None, **known}
    assert left_out == [(1, "its .txt is not UTF-8", f"{root}/gbk.wav")]


def test_folder_enters_linked_folders_once_and_takes_no_clip_twice(run, tmp_path):
    root = folder(tmp_path / "clips")
    (root / "b/up").symlink_to(root)
    (root / "z").symlink_to(root / "b")
    (root / "same.wav").symlink_to(root / "a.wav")
    lines, left_out = run("folder", root)
    assert [line["id"] for line in lines] == ["a.wav", "b/two.flac"]
    assert left_out == [(1, "a link to a file that is a clip already", f"{root}/same.wav")]


def test_fsdd_clips_are_what_their_text_says(run, tmp_path):
    """Tones are told apart by their pitch; levels are equal."""
    lines, left_out = run("fsdd", fsdd(tmp_path / "f"), "--split", "test", "--count", 40, "--max-digits", 3)
    waves = waveforms(tmp_path / "m.jsonl")
    assert len(lines) == 40 and left_out == [] and {line["speaker"] for line in lines} == {"ann", "bob"}
    assert {len(line["text"].split()) for line in lines} == {1, 2, 3}
    for line in lines:
        wave = waves[line["id"]].numpy()
        start = 0
        for word in line["text"].split():
            pause = int(np.argmax(np.abs(wave[start:]) > 0.02))
            tone = wave[start + pause : start + pause + 1_600]
            hz = int(np.abs(np.fft.rfft(tone, 16_000)).argmax())
            assert abs(hz - pitch_hz(WORDS.index(word), line["speaker"])) < 20
            assert np.abs(tone).max() > 0.8  # of 0.9
            start += pause + 1_600
        assert len(wave) - start < 40


def test_fsdd_selection_and_seeds(run, tmp_path, monkeypatch):
    """Equal flags write equal bytes."""
    fsdd(tmp_path / "f/recordings")
    flags = ["--split", "train", "--speakers", "bob", "--count", 6, "--max-digits", 1]
    shards = []
    for name in ("a", "b"):
        monkeypatch.setattr("time.time", lambda: 1e9 + len(shards))  # no time may be stored
        lines, _ = run("fsdd", tmp_path / "f", *flags, out=f"{name}.jsonl")
        assert {line["duration"] for line in lines} == {0.12}
        assert {line["speaker"] for line in lines} == {"bob"}
        shards.append((tmp_path / f"{name}-00000.tar").read_bytes())
    assert shards[0] == shards[1]


# ----------------------------------------------------------------------------------------------------------
# Shards
# ----------------------------------------------------------------------------------------------------------


def content_of(clip):
    return pathlib.Path(clip.audio).read_bytes()[clip.offset : clip.offset + clip.nbytes]


def test_whole_files_are_packed_byte_for_byte(run, tmp_path, monkeypatch):
    """A shard ends with the first clip beyond its size; tarfile reads it, told that nothing is compressed."""
    root = tmp_path / "clips"
    for i, name in enumerate(["a.flac", "b.ogg", "c.mp3", "sub/a.wav"]):
        sound(root / name, 0.3 + 0.1 * i, seed=i, rate=16_000, channels=1 + i % 2)
    a, b = (512 + 512 * -(-(root / name).stat().st_size // 512) for name in ("a.flac", "b.ogg"))
    monkeypatch.setattr(prepare.manifest, "SHARD_BYTES", max(a, b))
    plain, _ = run("folder", root)
    packed, _ = run("folder", root, "--pack", tmp_path / "x.tar", out="packed.jsonl")
    assert [line["audio"] for line in packed] == [f"x-0000{i}.tar" for i in (0, 0, 1, 1)]
    clips = data.read_manifest(str(tmp_path / "packed.jsonl"))
    for before, after, clip in zip(plain, packed, clips, strict=True):
        assert content_of(clip) == (tmp_path / before["audio"]).read_bytes()
        assert {**before, "audio": after["audio"], "offset": clip.offset, "nbytes": clip.nbytes} == after
        with tarfile.open(clip.audio, "r:") as tar:
            names = {(member.offset_data, member.size): member.name for member in tar.getmembers()}
        assert names[clip.offset, clip.nbytes].endswith(pathlib.Path(before["audio"]).suffix)


def test_segments_are_packed_as_flac_of_exactly_that_stretch(run, tmp_path):
    root = tmp_path / "w"
    sound(root / "stereo.wav", 2.0, seed=2, rate=44_100, channels=2)
    times = [(0, 0.51), (0.513, 1.2), (2, 2.5)]  # the last lies outside
    segments = [segment(f"s{i}", *times[i]) for i in range(3)]
    wenetspeech(root, [{"aid": "r", "path": "stereo.wav", "segments": segments}])
    plain, _ = run("wenetspeech", root)
    packed, [(n, reason, first)] = run("wenetspeech", root, "--pack", tmp_path / "x.tar", out="packed.jsonl")
    assert (n, reason) == (1, "cannot be used") and "s2: " in first and "ends before the clip does" in first
    before = data.read_manifest(str(tmp_path / "m.jsonl"))
    for i, clip in enumerate(data.read_manifest(str(tmp_path / "packed.jsonl"))):
        line = packed[i]
        info = soundfile.info(io.BytesIO(content_of(clip)))
        assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", 16_000, 1)
        assert (data.load_audio(clip) - data.load_audio(before[i])).abs().max() < 1.01 / 32_768
        for key in ("id", "recording", "duration"):
            assert line[key] == plain[i][key]
        assert "begin_time" not in line and "end_time" not in line


# ----------------------------------------------------------------------------------------------------------
# prepare.check
# ----------------------------------------------------------------------------------------------------------


def checked(path, capsys, *flags):
    """(exit status, lines printed) of prepare.check."""
    status = 0
    try:
        call("check", path, *flags)
    except SystemExit as error:
        status = error.code
    return status, capsys.readouterr().out.splitlines()


def test_check_lists_every_defect_with_its_line_and_nothing_else(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sound(tmp_path / "a.wav", 2.0)
    sound(tmp_path / "long.wav", 4.0, rate=8000)
    sound(tmp_path / "short.wav", 100 / 16_000)
    soundfile.write("zero.wav", np.zeros(16_000), 16_000)
    good = dict(audio="a.wav", duration=2.0, text="x", language="en")
    lines = [
        (good, None),
        (dict(audio="zero.wav", duration=1, text=""), None),  # silence, and nothing is said
        (dict(good, end_time=1, duration=1, text=None, language="cmn"), None),
        ("{oops", "not JSON"),
        (dict(good, begin_time=-1, end_time=-1, text="y"), "a.wav: the same clip as bad.jsonl:1"),
        (dict(good, audio="gone.wav"), "gone.wav: No such file"),
        (dict(good, audio="long.wav", duration=4.0), "long.wav: 4.0 s is over --max-seconds 3.5"),
        (dict(good, audio="zero.wav", duration=1, end_time=1), "zero.wav: every sample is zero"),
        (dict(good, audio="short.wav", duration=0.00625), "100 samples, less than a window of 25 ms"),
        (dict(good, end_time=1.5, duration=1.0), "1.50 s decoded, the manifest says 1.00 s"),
        (dict(good, duration="2"), '"duration" must be'),
        (dict(good, language="cn"), "language 'cn' is not known"),
    ]
    raw = [line if isinstance(line, str) else json.dumps(line) for line, _ in lines]
    write(tmp_path / "good.jsonl", "\n".join(raw[:3]))
    write(tmp_path / "bad.jsonl", "\n".join(raw))
    summary = "good.jsonl: 3 clips, 0.001 hours, 2 with text, languages: en 1, (none) 1, zh 1; 0 defects"
    assert checked("good.jsonl", capsys) == (0, [summary])
    status, printed = checked("bad.jsonl", capsys, "--max-seconds", "3.5")
    assert status == 1 and printed.pop().endswith("; 9 defects") and len(printed) == 9
    for number, (_, reason) in enumerate(lines, 1):
        defects = [defect for defect in printed if defect.startswith(f"bad.jsonl:{number}: ")]
        assert len(defects) == (reason is not None) and (reason or "") in "".join(defects)
    write(tmp_path / "empty.jsonl", "\n")
    assert checked("empty.jsonl", capsys)[0] == 1
