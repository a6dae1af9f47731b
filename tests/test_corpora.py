"""data.py's corpus importers: each corpus in its own layout to exact lines, shards, what is left out."""
import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch

import data
from conftest import DATA, ROOT
from data import AudioError, InputError

LEFT_OUT = re.compile(r"\s*left out: ([\d,]+) × (.+) \(first: (.+)\)")
SUMMARY = re.compile(r"([\d,]+) clips?\b\D*([\d,.]+) h")
WORDS = "zero one two three four five six seven eight nine".split()


def number(text):
    return float(text.replace(",", ""))


def parse_report(out):
    """(clips, hours, [(count, reason, first)]) of what an importer printed; the reasons come last."""
    lines, left = out.splitlines(), []
    while lines and (match := LEFT_OUT.fullmatch(lines[-1])):
        left.insert(0, (int(number(match[1])), match[2], match[3]))
        lines.pop()
    summary = next(match for line in reversed(lines) if (match := SUMMARY.search(line)))
    return int(number(summary[1])), number(summary[2]), left


def call(*argv):
    data.main(data.parse_args([str(arg) for arg in argv]))


def run(*argv):
    """({id: manifest line} in order, [(count, reason, first)]) of `data.py argv`, whose --out follows."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        call(*argv)
    path = str(argv[argv.index("--out") + 1])
    lines = [json.loads(line) for line in open(path, encoding="utf-8")]
    clips, hours, left = parse_report(printed.getvalue())
    assert clips == len(lines) == len(data.read_manifest(path))
    assert hours == pytest.approx(sum(line["duration"] for line in lines) / 3600, abs=0.006)
    by_id = {line["id"]: line for line in lines}
    assert len(by_id) == len(lines)
    return by_id, left


def refused(*argv):
    """The one-line message of a refused call, which leaves no --out, no shard and nothing unfinished."""
    out = pathlib.Path(argv[argv.index("--out") + 1])
    with pytest.raises(InputError) as caught:
        call(*argv)
    assert not out.exists() and not list(out.parent.rglob("*.partial*")) + list(out.parent.rglob("*.tar"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def clip_of(path, clip_id):
    return next(clip for clip in data.read_manifest(str(path)) if clip.fields["id"] == clip_id)


def sounds(path):
    """{id: waveform} of a manifest."""
    return {clip.fields["id"]: data.load_audio(clip) for clip in data.read_manifest(str(path))}


def sound(path, seconds=0.25, seed=0, rate=16_000, channels=1, **kind):
    """Writes noise in multiples of 1/128, exact in every PCM width: any shift by a sample shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = np.random.default_rng(seed).integers(-60, 61, (round(seconds * rate), channels))
    soundfile.write(path, steps.astype(np.float32) / 128, rate, **kind)
    return path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------------
# One small tree of each corpus
# ------------------------------------------------------------------------------------------------------------
LIBRI = {
    "test-clean": {"84-121123-0000": "GO DO YOU HEAR", "84-121123-0001": "BUT IN LESS THAN FIVE MINUTES",
                   "1272-128104-0000": "MISTER QUILTER'S MANNER"},
    "dev-clean": {"1272-128104-0001": "NOR IS"},
    "train-other-500": {"20-205-0000": "SPOON"},
}


def librispeech(root, splits=LIBRI):
    chapters, seconds = {}, 0.0
    for split, texts in splits.items():
        for utterance, text in texts.items():
            speaker, chapter, _ = utterance.split("-")
            seconds += 0.25
            sound(root / split / speaker / chapter / f"{utterance}.flac", seconds, int(seconds * 4))
            path = root / split / speaker / chapter / f"{speaker}-{chapter}.trans.txt"
            chapters[path] = chapters.get(path, "") + f"{utterance} {text}\n"
    for path, text in chapters.items():
        write(path, text)
    return root


def aishell1(root, clips=(("train", "S0002", "0122"), ("train", "S0003", "0121"), ("test", "S0764", "0123"))):
    texts = ["甚至 出现 交易 几乎 停滞", "一二线  城市 A P P\t虽然", "据 悉"]
    lines = []
    for i, (split, speaker, utterance) in enumerate(clips):
        sound(root / "wav" / split / speaker / f"BAC009{speaker}W{utterance}.wav", 0.25 * (i + 1), seed=i)
        lines.append(f"BAC009{speaker}W{utterance} {texts[i]}\n")
    write(root / "transcript" / "aishell_transcript_v0.8.txt", "".join(lines))
    return root


def segment(sid, begin, end, *subsets, text="你好"):
    return dict(sid=sid, confidence=1.0, begin_time=begin, end_time=end, subsets=list(subsets), text=text)


def audio(path, *segments, **more):
    return dict(aid=pathlib.PurePath(path).stem, duration=99.5, md5="0" * 32, path=path, segments=segments,
                **more)


def wenetspeech(root, audios=None):
    """By default one recording of 2 s with three segments in two subsets."""
    if audios is None:
        sound(root / "audio/train/Y01.wav", 2.0, seed=7)
        audios = [audio("audio/train/Y01.wav", segment("Y01_S0", 0, 0.5, "L", "M", text="一 only L"),
                        segment("Y01_S1", 0.61, 1.36, "L"), segment("Y01_S2", 1.5, 2, "TEST_NET"))]
    write(root / "WenetSpeech.json", json.dumps(dict(audios=audios), ensure_ascii=False))
    return root


def kaldi(root):
    sound(root / "a.wav", 0.25, seed=1)
    sound(root / "b.flac", 0.5, seed=2)
    write(root / "wav.scp", "utt1 a.wav\nutt2 b.flac\n")
    return root


def fsdd(root, speakers=("ann", "bob"), takes=range(8)):
    """A pure tone a take, its pitch by digit and speaker; takes 0–4 last 0.1 s, later ones 0.12 s."""
    for s, speaker in enumerate(speakers):
        for digit in range(10):
            for take in takes:
                t = np.arange(800 if take < 5 else 960) / 8000
                path = root / f"{digit}_{speaker}_{take}.wav"
                path.parent.mkdir(parents=True, exist_ok=True)
                edges = np.sin(np.pi / 2 * np.clip(500 * np.minimum(t, t[-1] - t), 0, 1)) ** 2     # 2 ms
                tone = (0.01 if speaker == "bob" else 0.6) * edges * np.sin(2 * np.pi * pitch(digit, s) * t)
                soundfile.write(path, tone, 8000, subtype="PCM_16")
    return root


def pitch(digit, speaker):
    return 400 + 240 * digit + 100 * speaker            # Hz, 100 or more apart


def folder(root):
    sound(root / "b" / "two.flac", 0.5, seed=1)
    sound(root / "a.wav", 0.25, seed=2)
    write(root / "a.txt", "hello")
    return root


BUILD = dict(librispeech=librispeech, aishell1=aishell1, wenetspeech=wenetspeech, kaldi=kaldi, fsdd=fsdd,
             folder=folder)
N_CLIPS = dict(librispeech=5, aishell1=3, wenetspeech=3, kaldi=2, fsdd=4, folder=2)


def small(corpus, tmp_path):
    """[corpus, ROOT and what makes the run short]"""
    return [corpus, BUILD[corpus](tmp_path / "corpus"), *(["--count", "4"] if corpus == "fsdd" else [])]


# ------------------------------------------------------------------------------------------------------------
# What every importer has in common
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("corpus", BUILD)
def test_manifest_reads_back_as_audio_of_the_stated_duration(corpus, tmp_path):
    lines, left = run(*small(corpus, tmp_path), "--out", tmp_path / "m.jsonl")
    waves = sounds(tmp_path / "m.jsonl")
    assert len(lines) == N_CLIPS[corpus] and not left
    for clip_id, line in lines.items():
        assert len(waves[clip_id]) == pytest.approx(line["duration"] * 16_000, abs=1.01)
        assert not os.path.isabs(line["audio"]) and waves[clip_id].any()
    assert not list(tmp_path.rglob("*.partial*"))


@pytest.mark.parametrize("corpus", BUILD)
def test_audio_elsewhere_is_absolute(corpus, tmp_path):
    (tmp_path / "lists").mkdir()
    pack = ["--pack", tmp_path / "shards.tar"] if corpus == "fsdd" else []
    lines, _ = run(*small(corpus, tmp_path), *pack, "--out", tmp_path / "lists" / "m.jsonl")
    assert all(os.path.isabs(line["audio"]) and os.path.exists(line["audio"]) for line in lines.values())


@pytest.mark.parametrize("corpus", BUILD)
def test_root_and_out_relative_to_the_current_folder(corpus, tmp_path, monkeypatch):
    name, root, *short = small(corpus, tmp_path)
    monkeypatch.chdir(tmp_path)
    lines, _ = run(name, "corpus", *short, "--out", "m.jsonl")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert len(sounds("../m.jsonl")) == len(lines) == N_CLIPS[corpus]
    again, _ = run(name, "../corpus", *short, "--out", "m.jsonl")       # beside, not above: absolute
    monkeypatch.chdir("/")
    assert len(sounds(tmp_path / "other" / "m.jsonl")) == len(again) == N_CLIPS[corpus]
    assert all(os.path.isabs(line["audio"]) == (corpus != "fsdd") for line in again.values())
    monkeypatch.chdir(tmp_path / "other")
    above, _ = run(name, "../corpus", *short, "--out", "../above.jsonl")
    assert not any(os.path.isabs(line["audio"]) for line in above.values()) and len(sounds("../above.jsonl"))


@pytest.mark.parametrize("corpus", BUILD)
def test_existing_out_is_refused_and_left_alone(corpus, tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b"precious\r\n")
    call_args = small(corpus, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="m.jsonl"):
        call(*call_args, "--out", tmp_path / "m.jsonl")
    assert (tmp_path / "m.jsonl").read_bytes() == b"precious\r\n" and sorted(tmp_path.rglob("*")) == before


LOOKED_FOR = dict(librispeech=r"\.trans\.txt|\.flac", aishell1=r"aishell_transcript_v0\.8\.txt|wav/",
                  wenetspeech=r"WenetSpeech\.json", kaldi=r"wav\.scp", fsdd=r"digit.*speaker.*take",
                  folder=r"(?i)audio|wav|flac")


@pytest.mark.parametrize("there", [True, False], ids=["empty", "missing"])
@pytest.mark.parametrize("corpus", BUILD)
def test_nothing_found_names_the_folder_and_what_was_looked_for(corpus, there, tmp_path):
    if there:
        write(tmp_path / "empty" / "sub" / "notes.md", "nothing here")
    message = refused(corpus, tmp_path / "empty", "--out", tmp_path / "m.jsonl")
    assert str(tmp_path / "empty") in message
    assert not there or re.search(LOOKED_FOR[corpus], message.replace(str(tmp_path), ""))


@pytest.mark.parametrize("argv", [
    "folder R --out m --split test", "kaldi R --out m --split test", "librispeech R --out m --language en",
    "aishell1 R --out m --seed 1", "wenetspeech R --out m --count 5", "fsdd R --out m --language en",
    "folder R --out m --speakers jackson", "librispeech R", "kaldi --out m", "timit R --out m",
    "fsdd R --out m --count 0", "fsdd R --out m --max-digits 0", "fsdd R --out m --count x",
    "librispeech R --out m --spl test-clean"])
def test_unknown_flags_end_with_status_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        data.parse_args(argv.split())
    assert caught.value.code == 2
    assert re.fullmatch(r"data\.py.*: error: .+\n", capsys.readouterr().err)


def test_defaults_of_fsdd():
    args = data.parse_args(["fsdd", "R", "--out", "m.jsonl"])
    assert (args.count, args.seed, args.max_digits) == (1000, 0, 6)


def test_as_a_script(tmp_path):
    """Status 0 although one clip is left out; a mistake: status 2 and one line on stderr."""
    root = librispeech(tmp_path / "ls")
    (root / "dev-clean/1272/128104/1272-128104-0001.flac").unlink()
    script = [sys.executable, str(ROOT / "data.py"), "librispeech", "ls", "--split"]
    pipes = dict(cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    good = subprocess.Popen(script + "test-clean dev-clean --out good.jsonl".split(), **pipes)
    bad = subprocess.Popen(script + "test-clear --out bad.jsonl".split(), **pipes)
    (out, err), (bad_out, bad_err) = good.communicate(timeout=60), bad.communicate(timeout=60)
    assert (good.returncode, err) == (0, "")
    assert parse_report(out)[0] == 3 and [count for count, *_ in parse_report(out)[2]] == [1]
    assert bad.returncode == 2 and not (tmp_path / "bad.jsonl").exists()
    assert re.fullmatch(r"data\.py: error: .*test-clear.*\n", bad_err)


# ------------------------------------------------------------------------------------------------------------
# LibriSpeech
# ------------------------------------------------------------------------------------------------------------
def test_librispeech_lines(tmp_path):
    librispeech(tmp_path / "ls")
    lines, left = run("librispeech", tmp_path / "ls", "--out", tmp_path / "m.jsonl")
    assert lines["84-121123-0001"] == dict(
        id="84-121123-0001", audio="ls/test-clean/84/121123/84-121123-0001.flac",
        text="BUT IN LESS THAN FIVE MINUTES", duration=0.5, language="en", speaker="84")
    assert {i: (line["text"], line["speaker"], line["duration"]) for i, line in lines.items()} == {
        "84-121123-0000": ("GO DO YOU HEAR", "84", 0.25),
        "84-121123-0001": ("BUT IN LESS THAN FIVE MINUTES", "84", 0.5),
        "1272-128104-0000": ("MISTER QUILTER'S MANNER", "1272", 0.75),
        "1272-128104-0001": ("NOR IS", "1272", 1.0), "20-205-0000": ("SPOON", "20", 1.25)}
    assert not left
    wave, _ = soundfile.read(tmp_path / "ls/train-other-500/20/205/20-205-0000.flac", dtype="float32")
    assert np.array_equal(sounds(tmp_path / "m.jsonl")["20-205-0000"].numpy(), wave)


@pytest.mark.parametrize("splits", [["test-clean"], ["dev-clean", "train-other-500"]])
def test_librispeech_splits(splits, tmp_path):
    librispeech(tmp_path / "up" / "LibriSpeech")
    lines, left = run("librispeech", tmp_path / "up", "--split", *splits, "--out", tmp_path / "m.jsonl")
    assert set(lines) == {utterance for split in splits for utterance in LIBRI[split]} and not left


def test_librispeech_parent_folder_gives_the_same_clips(tmp_path):
    librispeech(tmp_path / "up" / "LibriSpeech")
    parent, _ = run("librispeech", tmp_path / "up", "--out", tmp_path / "p.jsonl")
    itself, _ = run("librispeech", tmp_path / "up" / "LibriSpeech", "--out", tmp_path / "i.jsonl")
    assert parent == itself and len(parent) == 5


def test_librispeech_missing_split_lists_those_that_are(tmp_path):
    message = refused("librispeech", librispeech(tmp_path / "ls"), "--split", "test-clean", "test-other",
                      "--out", tmp_path / "m.jsonl")
    assert all(name in message for name in ("test-other", "test-clean", "dev-clean", "train-other-500"))


def test_librispeech_leaves_out_what_has_no_partner(tmp_path):
    root = librispeech(tmp_path / "ls")
    chapter = root / "test-clean" / "84" / "121123"
    for n in (7, 8):
        sound(chapter / f"84-121123-000{n}.flac", seed=n)
    with open(chapter / "84-121123.trans.txt", "a") as file:
        file.write("84-121123-0009 NOT RECORDED\n")
    lines, left = run("librispeech", root, "--out", tmp_path / "m.jsonl")
    assert set(lines) == {utterance for texts in LIBRI.values() for utterance in texts}
    (n_line, no_line, line_first), (n_audio, no_audio, audio_first) = sorted(left, reverse=True)
    assert (n_line, n_audio) == (2, 1) and no_line != no_audio
    assert "84-121123-0007" in line_first and "84-121123-0009" in audio_first


def test_1500_clips_in_one_and_a_half_seconds(tmp_path):
    content = sound(tmp_path / "x.flac", 0.1).read_bytes()
    for chapter in range(15):
        where = tmp_path / "ls" / "train" / "7" / str(chapter)
        where.mkdir(parents=True)
        names = [f"7-{chapter}-{n:04d}" for n in range(100)]
        for name in names:
            (where / f"{name}.flac").write_bytes(content)
        write(where / f"7-{chapter}.trans.txt", "".join(f"{name} HELLO\n" for name in names))
    seconds = []
    for attempt in range(2):
        start = time.perf_counter()
        lines, _ = run("librispeech", tmp_path / "ls", "--out", tmp_path / f"{attempt}.jsonl")
        seconds.append(time.perf_counter() - start)
    assert len(lines) == 1500 and {line["duration"] for line in lines.values()} == {0.1}
    assert min(seconds) < 1.5


# ------------------------------------------------------------------------------------------------------------
# AISHELL-1
# ------------------------------------------------------------------------------------------------------------
def test_aishell1_lines(tmp_path):
    lines, left = run("aishell1", aishell1(tmp_path / "data_aishell"), "--out", tmp_path / "m.jsonl")
    assert list(lines.values()) == [
        dict(id=f"BAC009{speaker}W{n}", audio=f"data_aishell/wav/{split}/{speaker}/BAC009{speaker}W{n}.wav",
             text=text, duration=duration, language="zh", speaker=speaker)
        for split, speaker, n, text, duration in sorted([
            ("train", "S0002", "0122", "甚至出现交易几乎停滞", 0.25),
            ("train", "S0003", "0121", "一二线城市APP虽然", 0.5), ("test", "S0764", "0123", "据悉", 0.75)],
            key=lambda clip: list(lines).index(f"BAC009{clip[1]}W{clip[2]}"))]
    assert not left


@pytest.mark.parametrize("splits, speakers", [(["train"], {"S0002", "S0003"}), (["test"], {"S0764"}),
                                              (["test", "train"], {"S0002", "S0003", "S0764"})])
def test_aishell1_splits_of_the_parent_folder(splits, speakers, tmp_path):
    aishell1(tmp_path / "up" / "data_aishell")
    lines, _ = run("aishell1", tmp_path / "up", "--split", *splits, "--out", tmp_path / "m.jsonl")
    assert {line["speaker"] for line in lines.values()} == speakers
    assert all(line["audio"].startswith("up/data_aishell/wav/") for line in lines.values())


def test_aishell1_missing_split_lists_those_that_are(tmp_path):
    message = refused("aishell1", aishell1(tmp_path / "a"), "--split", "dev", "--out", tmp_path / "m.jsonl")
    assert all(re.search(rf"\b{split}\b", message.replace(str(tmp_path), ""))
               for split in ("dev", "train", "test"))


def test_aishell1_clips_without_a_line_are_left_out(tmp_path):
    root = aishell1(tmp_path / "a")
    for n in ("0401", "0400"):
        sound(root / "wav" / "train" / "S0002" / f"BAC009S0002W{n}.wav")
    lines, [(count, _, first)] = run("aishell1", root, "--split", "train", "--out", tmp_path / "m.jsonl")
    assert set(lines) == {"BAC009S0002W0122", "BAC009S0003W0121"}
    assert count == 2 and "BAC009S0002W0400" in first


# ------------------------------------------------------------------------------------------------------------
# WenetSpeech
# ------------------------------------------------------------------------------------------------------------
def test_wenetspeech_lines(tmp_path):
    lines, left = run("wenetspeech", wenetspeech(tmp_path / "w"), "--out", tmp_path / "m.jsonl")
    assert lines["Y01_S0"] == dict(id="Y01_S0", audio="w/audio/train/Y01.wav", text="一 only L", duration=0.5,
                                   begin_time=0, end_time=0.5, language="zh")
    assert {i: (line["begin_time"], line["end_time"]) for i, line in lines.items()} == {
        "Y01_S0": (0, 0.5), "Y01_S1": (0.61, 1.36), "Y01_S2": (1.5, 2)}
    assert lines["Y01_S1"]["duration"] == pytest.approx(0.75, abs=1e-9) and not left
    whole, _ = soundfile.read(tmp_path / "w/audio/train/Y01.wav", dtype="float32")
    waves = sounds(tmp_path / "m.jsonl")
    assert np.array_equal(waves["Y01_S1"].numpy(), whole[9_760:21_760])
    assert np.array_equal(waves["Y01_S2"].numpy(), whole[24_000:])


@pytest.mark.parametrize("splits, ids", [(["M"], {"Y01_S0"}), (["L"], {"Y01_S0", "Y01_S1"}),
                                         (["TEST_NET", "M"], {"Y01_S0", "Y01_S2"})])
def test_wenetspeech_subsets(splits, ids, tmp_path):
    lines, left = run("wenetspeech", wenetspeech(tmp_path / "w"), "--split", *splits, "--out",
                      tmp_path / "m.jsonl")
    assert set(lines) == ids and not left


def test_wenetspeech_missing_subset_lists_those_that_are(tmp_path):
    message = refused("wenetspeech", wenetspeech(tmp_path / "w"), "--split", "TEST_MEETING", "--out",
                      tmp_path / "m.jsonl")
    assert all(re.search(rf"\b{name}\b", message.replace(str(tmp_path), ""))
               for name in ("TEST_MEETING", "TEST_NET", "L", "M"))


def test_wenetspeech_reads_no_header_and_counts_segments_of_missing_audio(tmp_path):
    """Of hours that are no audio nothing but the name is looked at; only chosen segments count as missing."""
    wenetspeech(tmp_path / "w", [
        dict(segments=[segment("A0", 0, 3600, "L"), segment("A1", 3600, 9000.5, "L")], path="x/a.opus",
             aid="a", duration=9000.5),
        audio("x/gone.opus", segment("B0", 0, 1, "S"), segment("B1", 1, 2, "L"), segment("B2", 2, 3, "L")),
        audio("x/gone2.opus", segment("C0", 0, 1, "L"))])
    write(tmp_path / "w" / "x" / "a.opus", "no audio")
    lines, [(count, reason, first)] = run("wenetspeech", tmp_path / "w", "--split", "L", "--out",
                                          tmp_path / "m.jsonl")
    assert [line["duration"] for line in lines.values()] == [3600, 5400.5]
    assert count == 3 and ("B1" in first or "x/gone.opus" in first)
    _, [(count, *_)] = run("wenetspeech", tmp_path / "w", "--out", tmp_path / "all.jsonl")
    assert count == 4


@pytest.mark.parametrize("pack", [[], ["--pack", "shard.tar"]], ids=["plain", "packed"])
@pytest.mark.parametrize("cut", [-1, -60, 20, 1])
def test_wenetspeech_truncated_json_is_refused(cut, pack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = wenetspeech(tmp_path / "w") / "WenetSpeech.json"
    path.write_bytes(path.read_bytes()[:cut])
    assert "WenetSpeech.json" in refused("wenetspeech", tmp_path / "w", *pack, "--out", tmp_path / "m.jsonl")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"audios": []}', '{"audios": 3}', "not json", "null"])
def test_wenetspeech_json_without_clips_is_refused(text, tmp_path):
    write(tmp_path / "w" / "WenetSpeech.json", text)
    assert "WenetSpeech.json" in refused("wenetspeech", tmp_path / "w", "--out", tmp_path / "m.jsonl")


def test_wenetspeech_streams_40_megabytes_in_30(tmp_path):
    """8,600 recordings of four segments; only every 860th is there."""
    segments = ", ".join(json.dumps(segment(f"Y%05d_S{s}", s, s + 0.5, "L", text="长" * 350),
                                    ensure_ascii=False) for s in range(4))
    record = '{"aid": "Y%05d", "path": "audio/Y%05d.opus", "duration": 5.0, "segments": [' + segments + "]}"
    (tmp_path / "audio").mkdir()
    with open(tmp_path / "WenetSpeech.json", "w", encoding="utf-8") as file:
        file.write('{"audios": [' + ",\n".join(record % ((n,) * 6) for n in range(8_600)) + "]}")
    for n in range(0, 8_600, 860):
        (tmp_path / "audio" / f"Y{n:05d}.opus").touch()
    assert (tmp_path / "WenetSpeech.json").stat().st_size > 40e6
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        lines, [(count, _, first)] = run("wenetspeech", tmp_path, "--out", tmp_path / "m.jsonl")
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert len(lines) == 40 and count == 4 * 8_590 and "Y00001" in first
    assert peak < 30e6


# ------------------------------------------------------------------------------------------------------------
# Kaldi
# ------------------------------------------------------------------------------------------------------------
def test_kaldi_wav_scp_alone(tmp_path):
    lines, left = run("kaldi", kaldi(tmp_path / "k"), "--out", tmp_path / "m.jsonl")
    assert list(lines.values()) == [dict(id="utt1", audio="k/a.wav", duration=0.25),
                                    dict(id="utt2", audio="k/b.flac", duration=0.5)]
    assert not left


def test_kaldi_text_and_speakers(tmp_path):
    root = kaldi(tmp_path / "k")
    write(root / "text", "utt2 今天 天气\nutt1 Hello,  world\n")
    write(root / "utt2spk", "utt1 ann\nutt2 王\n")
    lines, left = run("kaldi", root, "--out", tmp_path / "m.jsonl")
    assert lines["utt1"] == dict(id="utt1", audio="k/a.wav", text="Hello,  world", duration=0.25,
                                 language="en", speaker="ann")
    assert lines["utt2"] == dict(id="utt2", audio="k/b.flac", text="今天 天气", duration=0.5, language="zh",
                                 speaker="王")
    assert not left


def test_kaldi_id_without_text_is_left_out(tmp_path):
    root = kaldi(tmp_path / "k")
    write(root / "text", "utt1 hello\nutt9 nobody\n")
    lines, left = run("kaldi", root, "--out", tmp_path / "m.jsonl")
    assert list(lines) == ["utt1"]
    assert [(count, "utt2" in first or "b.flac" in first) for count, _, first in left
            if "utt9" not in first] == [(1, True)]


def test_kaldi_paths_with_blanks_in_root_then_in_the_current_folder(tmp_path, monkeypatch):
    names = ["k/my clips/a b.wav", "here/my clips/a b.wav", "here/only here.wav", "x/abs.wav"]
    for i, name in enumerate(names):
        sound(tmp_path / name, 0.25 * (i + 1), seed=i)
    write(tmp_path / "k" / "wav.scp",
          f"both my clips/a b.wav\nhere only here.wav\nabs {tmp_path}/x/abs.wav\n")
    monkeypatch.chdir(tmp_path / "here")
    lines, left = run("kaldi", "../k", "--out", tmp_path / "m.jsonl")
    monkeypatch.chdir("/")
    assert {i: line["duration"] for i, line in lines.items()} == {"both": 0.25, "here": 0.75, "abs": 1.0}
    assert {i: len(wave) for i, wave in sounds(tmp_path / "m.jsonl").items()} == {"both": 4000, "here": 12000,
                                                                                  "abs": 16000}
    assert not left


def test_kaldi_segments(tmp_path):
    root = kaldi(tmp_path / "k")
    write(root / "segments", "s1 utt1 0.05 0.2\ns2 utt2 0 0.25\ns3 utt2 0.25 0.5\n")
    write(root / "text", "s1 one\ns2 два\ns3 三\n")
    write(root / "utt2spk", "s1 ann\ns2 bob\ns3 bob\n")
    lines, left = run("kaldi", root, "--out", tmp_path / "m.jsonl")
    assert {i: (line["audio"], line["begin_time"], line["end_time"], line["text"], line["language"],
                line["speaker"]) for i, line in lines.items()} == {
        "s1": ("k/a.wav", 0.05, 0.2, "one", "en", "ann"), "s2": ("k/b.flac", 0, 0.25, "два", "ru", "bob"),
        "s3": ("k/b.flac", 0.25, 0.5, "三", "zh", "bob")}
    assert [line["duration"] for line in lines.values()] == pytest.approx([0.15, 0.25, 0.25]) and not left
    whole, _ = soundfile.read(root / "b.flac", dtype="float32")
    assert np.array_equal(sounds(tmp_path / "m.jsonl")["s3"].numpy(), whole[4000:])


@pytest.mark.parametrize("segments, kept, n_left", [(False, ["utt1", "utt2"], 2), (True, ["s1"], 3)])
def test_kaldi_commands_are_left_out_and_never_run(segments, kept, n_left, tmp_path):
    root = kaldi(tmp_path / "k")
    with open(root / "wav.scp", "a") as file:
        file.write(f"cmd1 touch {tmp_path}/ran; cat {root}/a.wav |\ncmd2 touch {tmp_path}/ran |  \n")
    if segments:
        write(root / "segments", "s1 utt1 0 0.2\ns2 cmd1 0 0.1\ns3 cmd1 0.1 0.2\ns4 cmd2 0 0.2\n")
    lines, [(count, reason, first)] = run("kaldi", root, "--out", tmp_path / "m.jsonl")
    assert list(lines) == kept and count == n_left
    assert re.search("command|pipe|[|]", reason) and re.search("cmd1|s2", first)
    assert not (tmp_path / "ran").exists()


def test_kaldi_missing_audio_is_left_out(tmp_path):
    root = kaldi(tmp_path / "k")
    (root / "b.flac").unlink()
    lines, [(count, _, first)] = run("kaldi", root, "--out", tmp_path / "m.jsonl")
    assert list(lines) == ["utt1"] and count == 1 and re.search(r"utt2|b\.flac", first)


def test_kaldi_empty_utt2spk_gives_no_speaker(tmp_path):
    root = kaldi(tmp_path / "k")
    write(root / "utt2spk", "")
    lines, _ = run("kaldi", root, "--out", tmp_path / "m.jsonl")
    assert [sorted(line) for line in lines.values()] == [["audio", "duration", "id"]] * 2


LANGUAGES = {"我们去吃饭": "zh", "hello there": "en", "今日はいい天気です": "ja", "안녕하세요": "ko",
             "добрый день": "ru", "12 345": None}


def test_kaldi_language_by_script(tmp_path):
    root = kaldi(tmp_path / "k")
    write(root / "wav.scp", "".join(f"u{i} a.wav\n" for i in range(len(LANGUAGES))))
    write(root / "text", "".join(f"u{i} {text}\n" for i, text in enumerate(LANGUAGES)))
    lines, _ = run("kaldi", root, "--out", tmp_path / "m.jsonl")
    assert [line.get("language") for line in lines.values()] == list(LANGUAGES.values())
    assert "language" not in lines["u5"]
    lines, _ = run("kaldi", root, "--language", "yue", "--out", tmp_path / "yue.jsonl")
    assert {line["language"] for line in lines.values()} == {"yue"}


# ------------------------------------------------------------------------------------------------------------
# Free Spoken Digits
# ------------------------------------------------------------------------------------------------------------
def heard(wave, n_samples):
    """[(digit, speaker)] of joined tones of n_samples each, and the samples of silence before each tone."""
    loud, place, tones, gaps = np.abs(wave) > 0.1 * np.abs(wave).max(), 0, [], []
    while loud[place:].sum() > 100:
        start = place + int(np.argmax(loud[place:]))
        spectrum = np.abs(np.fft.rfft(wave[start:start + n_samples], 16_000))
        hz = int(spectrum.argmax())
        tones.append(min(((d, s) for d in range(10) for s in range(2)), key=lambda ds: abs(pitch(*ds) - hz)))
        gaps.append(start - place)
        place = start + n_samples
    return tones, gaps


def test_fsdd_clips_are_what_their_text_says(tmp_path):
    root = fsdd(tmp_path / "f")
    lines, left = run("fsdd", root, "--split", "test", "--count", 60, "--max-digits", 4, "--out",
                      tmp_path / "m.jsonl")
    waves, all_gaps = sounds(tmp_path / "m.jsonl"), []
    assert len(lines) == 60 and not left
    for clip_id, line in lines.items():
        words, seconds = line["text"].split(" "), line["duration"]
        tones, gaps = heard(waves[clip_id].numpy(), 1600)
        assert [(WORDS[digit], "ann bob".split()[speaker]) for digit, speaker in tones] == [
            (word, line["speaker"]) for word in words]
        assert line["language"] == "en" and abs(len(waves[clip_id]) - 16_000 * seconds) < 1
        assert -1e-3 <= seconds - 0.1 * len(words) <= 0.15 * (len(words) - 1) + 1e-3
        assert gaps[0] < 40 and all(gap <= 0.15 * 16_000 + 40 for gap in gaps)
        all_gaps += gaps[1:]
    assert {len(line["text"].split()) for line in lines.values()} == {1, 2, 3, 4}
    assert {line["speaker"] for line in lines.values()} == {"ann", "bob"}
    assert {word for line in lines.values() for word in line["text"].split()} == set(WORDS)
    assert min(all_gaps) < 0.03 * 16_000 and max(all_gaps) > 0.12 * 16_000      # spread over 0–150 ms


def test_fsdd_levels_are_normalised(tmp_path):
    """ann and bob are 36 dB apart in the recordings."""
    lines, _ = run("fsdd", fsdd(tmp_path / "f"), "--count", 40, "--max-digits", 1, "--split", "test", "--out",
                   tmp_path / "m.jsonl")
    waves, levels = sounds(tmp_path / "m.jsonl"), {"ann": [], "bob": []}
    for clip_id, line in lines.items():
        levels[line["speaker"]].append(waves[clip_id].square().mean().sqrt().item())
    assert min(levels["ann"]) > 0.01 and max(levels["ann"]) < 0.7
    assert max(levels["ann"] + levels["bob"]) < 1.1 * min(levels["ann"] + levels["bob"])


@pytest.mark.parametrize("split, seconds", [(["test"], {0.1}), (["train"], {0.12}), (None, {0.1, 0.12}),
                                            (["train", "test"], {0.1, 0.12})])
def test_fsdd_splits_are_by_take(split, seconds, tmp_path):
    fsdd(tmp_path / "f" / "recordings")
    lines, _ = run("fsdd", tmp_path / "f", "--count", 40, "--max-digits", 1, *(["--split", *split] if split
                   else []), "--out", tmp_path / "m.jsonl")
    assert {round(line["duration"], 3) for line in lines.values()} == seconds


def test_fsdd_speakers(tmp_path):
    fsdd(tmp_path / "f", speakers=("ann", "bob", "cy"), takes=range(2))
    lines, _ = run("fsdd", tmp_path / "f", "--speakers", "cy", "ann", "--count", 30, "--out",
                   tmp_path / "m.jsonl")
    assert {line["speaker"] for line in lines.values()} == {"ann", "cy"}
    message = refused("fsdd", tmp_path / "f", "--speakers", "ann", "eve", "--out", tmp_path / "f" / "m.jsonl")
    assert "eve" in message


def test_fsdd_missing_split_lists_those_that_are(tmp_path):
    message = refused("fsdd", fsdd(tmp_path / "f", takes=range(5)), "--split", "train", "--out",
                      tmp_path / "m.jsonl").replace(str(tmp_path), "")
    assert re.search(r"\btrain\b", message) and re.search(r"\btest\b", message)


@pytest.mark.parametrize("samples", [None, 0, 800], ids=["no audio", "empty", "silent"])
def test_fsdd_unusable_recordings_never_end_up_in_a_clip(samples, tmp_path):
    """Refused with its name, or left out: no traceback, no NaN, nothing at full scale."""
    root = fsdd(tmp_path / "f", takes=range(2))
    if samples is None:
        (root / "3_ann_1.wav").write_bytes(b"this is no audio at all")
    else:
        soundfile.write(root / "3_ann_1.wav", np.zeros(samples), 8000)
    try:
        run("fsdd", root, "--speakers", "ann", "--count", 60, "--max-digits", 1,
            "--out", tmp_path / "m.jsonl")
    except InputError as error:
        assert "3_ann_1.wav" in str(error) and sorted(os.listdir(tmp_path)) == ["f"]
    else:
        assert all(wave.abs().max() < 0.99 for wave in sounds(tmp_path / "m.jsonl").values())


@pytest.mark.parametrize("name", ["3_ann_b_1.wav", "3_ann_x.wav"])
def test_fsdd_other_names_end_in_no_traceback(name, tmp_path):
    root = fsdd(tmp_path / "f", takes=range(1))
    sound(root / name, 0.1)
    try:
        run("fsdd", root, "--count", 4, "--out", tmp_path / "m.jsonl")
    except InputError as error:
        assert name in str(error)


def test_fsdd_same_seed_same_bytes(tmp_path):
    root = fsdd(tmp_path / "f", takes=range(3))
    for i, seed in enumerate((5, 5, 6)):
        (tmp_path / str(i)).mkdir()
        run("fsdd", root, "--seed", seed, "--count", 12, "--out", tmp_path / str(i) / "m.jsonl")
        if i == 0:
            time.sleep(1.1)                                         # a time stamp in the tar would differ
    first, second, other = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in "012")
    assert set(first) == {"m.jsonl", "m-00000.tar"} and first == second
    assert first["m.jsonl"] != other["m.jsonl"] and first["m-00000.tar"] != other["m-00000.tar"]
    texts = [[json.loads(line)["text"] for line in files["m.jsonl"].splitlines()] for files in (first, other)]
    assert texts[0] != texts[1]


def test_fsdd_of_the_real_recordings(tmp_path):
    if not (DATA / "fsdd").is_dir():
        pytest.skip(f"{DATA}/fsdd is absent (set ASR_OPD_DATA)")
    lines, left = run("fsdd", DATA / "fsdd", "--split", "test", "--speakers", "jackson", "theo",
                      "--count", 60, "--pack", tmp_path / "digits.tar", "--out", tmp_path / "m.jsonl")
    waves, levels = sounds(tmp_path / "m.jsonl"), {"jackson": [], "theo": []}
    for clip_id, line in lines.items():
        assert line["audio"] == "digits-00000.tar" and set(line["text"].split()) <= set(WORDS)
        levels[line["speaker"]].append(waves[clip_id].square().mean().sqrt().item())
    assert len(lines) == 60 and not left and {len(line["text"].split()) for line in lines.values()} == {
        1, 2, 3, 4, 5, 6}
    assert 0.5 < np.median(levels["theo"]) / np.median(levels["jackson"]) < 2       # recorded 25 dB apart
    assert 0 == sum((wave.abs() >= 1).float().mean().item() > 0.01 for wave in waves.values())


# ------------------------------------------------------------------------------------------------------------
# Folders
# ------------------------------------------------------------------------------------------------------------
def test_folder_lines(tmp_path, capsys):
    for i, name in enumerate(["b/z.wav", "b/c/y.flac", "a.ogg", "d.mp3", "e e.wav"]):
        sound(tmp_path / "clips" / name, 0.25 * (i + 1), seed=i)
    sound(tmp_path / "clips" / "f.opus", 1.5, format="OGG", subtype="OPUS")
    (tmp_path / "clips" / "b" / "z.txt").write_bytes("\ufeff \t你好，世界 \r\n".encode())
    write(tmp_path / "clips" / "b" / "c" / "y.txt", "Two  words\n\n")
    write(tmp_path / "clips" / "a.txt", "здравствуй")
    write(tmp_path / "clips" / "e e.txt", "42")
    write(tmp_path / "clips" / "unrelated.txt", "no audio")
    write(tmp_path / "clips" / "notes.md", "no audio")
    call("folder", tmp_path / "clips", "--out", tmp_path / "m.jsonl")
    lines = [json.loads(line) for line in open(tmp_path / "m.jsonl", encoding="utf-8")]
    assert [line["audio"] for line in lines] == [
        f"clips/{name}" for name in ("a.ogg", "b/c/y.flac", "b/z.wav", "d.mp3", "e e.wav", "f.opus")]
    assert [(line.get("text"), line.get("language")) for line in lines] == [
        ("здравствуй", "ru"), ("Two  words", "en"), ("你好，世界", "zh"), (None, None), ("42", None),
        (None, None)]
    assert [sorted(line) for line in lines[2:5]] == [["audio", "duration", "id", "language", "text"],
                                                     ["audio", "duration", "id"],
                                                     ["audio", "duration", "id", "text"]]
    assert [lines[i]["duration"] for i in (1, 2, 4)] == [0.5, 0.25, 1.25]
    out = capsys.readouterr().out
    assert parse_report(out)[::2] == (6, [])
    assert re.search(r"\b2 [^\n]*without|without [^\n]*\b2\b|\b2 [^\n]*no text", out)
    assert len(sounds(tmp_path / "m.jsonl")) == 6


def test_folder_language_given(tmp_path):
    lines, _ = run("folder", folder(tmp_path / "clips"), "--language", "de", "--out", tmp_path / "m.jsonl")
    assert [(line.get("text"), line["language"]) for line in lines.values()] == [("hello", "de"),
                                                                                 (None, "de")]


def test_folder_of_every_format_and_defect(tmp_path):
    """What has a header comes in, packed with the same bytes and the same outcome of load_audio."""
    edge = DATA / "edge"
    if not edge.is_dir():
        pytest.skip(f"{edge} is absent (set ASR_OPD_DATA)")
    counts, clips = [], {}
    for name, pack in dict(plain=[], packed=["--pack", str(tmp_path / "edge.tar")]).items():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            call("folder", edge, *pack, "--out", tmp_path / f"{name}.jsonl")
        clips[name] = data.read_manifest(str(tmp_path / f"{name}.jsonl"))
        counts.append(sum(count for count, *_ in parse_report(printed.getvalue())[2]))
    names = [os.path.basename(clip.audio) for clip in clips["plain"]]
    assert set(names) >= {"flac16_16k.flac", "mp3_44k.mp3", "opus_48k.opus", "vorbis_16k.ogg",
                          "wav_s16_8000.wav", "stereo_44k.wav", "mislabelled_flac_as.wav", "one_sample.wav",
                          "名字 with spaces é.wav"}
    assert not set(names) & {"not_audio.wav", "empty_file.wav", "truncated_header.wav", "zero_samples.wav",
                             "edge.json", "raw_pcm_no_header.pcm"}
    assert len(names) == len(set(names)) == len(clips["packed"]) and counts[0] == counts[1] >= 4

    def outcome(clip):
        try:
            return data.load_audio(clip)
        except AudioError:
            return None

    n_sound = 0
    for whole, part in zip(clips["plain"], clips["packed"]):
        assert content_of(part) == pathlib.Path(whole.audio).read_bytes()
        expected, got = outcome(whole), outcome(part)
        assert (got is None) == (expected is None) and (got is None or torch.equal(got, expected))
        n_sound += got is not None
    assert n_sound > 30


def kept_or_refused(name, corpus, *argv):
    """ids that a run keeps, all of them readable; {} where it is refused with a line that holds `name`."""
    try:
        lines, left = run(corpus, *argv)
    except InputError as error:
        assert name in str(error) and "\n" not in str(error)
        return {}
    assert sum(count for count, *_ in left) >= 1
    return lines


def test_folder_text_in_another_encoding_is_not_taken(tmp_path):
    root = folder(tmp_path / "clips")
    (root / "b" / "two.txt").write_bytes("今天天气".encode("gbk"))
    assert "b/two" not in kept_or_refused("two.txt", "folder", root, "--out", tmp_path / "m.jsonl")


def test_folder_names_that_are_not_utf8_do_not_stop_the_run_with_a_traceback(tmp_path):
    root = folder(tmp_path / "clips")
    shutil.copy(root / "a.wav", os.fsencode(root) + "/天气.wav".encode("gbk"))
    kept_or_refused("UTF-8", "folder", root, "--out", tmp_path / "m.jsonl")


@pytest.mark.parametrize("rate", [16_000, 44_100, 192_000])
def test_one_sample_does_not_spoil_the_manifest(rate, tmp_path):
    root = folder(tmp_path / "clips")
    sound(root / "c.wav", 1 / rate, seed=3, rate=rate)
    run("folder", root, "--out", tmp_path / "m.jsonl")
    assert len(sounds(tmp_path / "m.jsonl")) >= 2


# ------------------------------------------------------------------------------------------------------------
# Shards
# ------------------------------------------------------------------------------------------------------------
def content_of(clip):
    with open(clip.audio, "rb") as file:
        file.seek(clip.offset)
        return file.read(clip.nbytes)


def check_tar(folder, lines):
    """tarfile, told that nothing is compressed, finds the members of exactly these lines."""
    ranges = {}
    for line in lines.values():
        ranges.setdefault(line["audio"], []).append((line["offset"], line["nbytes"]))
    for name, expected in ranges.items():
        assert (folder / name).stat().st_size % 512 == 0
        with tarfile.open(folder / name, "r:") as tar:
            members = tar.getmembers()
            assert sorted((m.offset_data, m.size) for m in members) == sorted(expected)
            assert len({m.name for m in members}) == len(members) and all(m.isfile() for m in members)


def without(line, *keys):
    return {key: value for key, value in line.items() if key not in keys}


def test_whole_files_are_packed_byte_for_byte(tmp_path):
    root = tmp_path / "clips"
    for i, name in enumerate(["a.flac", "b.ogg", "c.mp3", "sub/a.flac"]):
        sound(root / name, 0.3 + 0.1 * i, seed=i, rate=[16_000, 44_100, 16_000, 8_000][i], channels=1 + i % 2)
        write((root / name).with_suffix(".txt"), f"text {i}")
    sound(root / "d.wav", 0.25, subtype="FLOAT")
    (tmp_path / "shards").mkdir()
    plain, _ = run("folder", root, "--out", tmp_path / "plain.jsonl")
    packed, left = run("folder", root, "--pack", tmp_path / "shards" / "x.tar", "--out", tmp_path / "p.jsonl")
    assert {line["audio"] for line in packed.values()} == {"shards/x-00000.tar"} and not left
    assert os.listdir(tmp_path / "shards") == ["x-00000.tar"]
    assert list(packed) == list(plain) and len(plain) == 5
    check_tar(tmp_path, packed)
    waves, expected = sounds(tmp_path / "p.jsonl"), sounds(tmp_path / "plain.jsonl")
    with tarfile.open(tmp_path / "shards" / "x-00000.tar") as tar:
        names = {member.offset_data: member.name for member in tar}
    for clip_id, line in packed.items():
        assert without(line, "audio", "offset", "nbytes", "crc32") == without(plain[clip_id], "audio")
        original = pathlib.Path(tmp_path / plain[clip_id]["audio"])
        assert content_of(clip_of(tmp_path / "p.jsonl", clip_id)) == original.read_bytes()
        assert pathlib.Path(names[line["offset"]]).suffix == original.suffix
        assert torch.equal(waves[clip_id], expected[clip_id])


def check_packed_segments(tmp_path, corpus, root):
    plain, plain_left = run(corpus, root, "--out", tmp_path / "plain.jsonl")
    packed, left = run(corpus, root, "--pack", tmp_path / "x.tar", "--out", tmp_path / "p.jsonl")
    assert list(packed) == list(plain) and left == plain_left == []
    check_tar(tmp_path, packed)
    waves, expected = sounds(tmp_path / "p.jsonl"), sounds(tmp_path / "plain.jsonl")
    for clip_id, line in packed.items():
        assert without(line, "audio", "offset", "nbytes", "crc32", "duration") == without(
            plain[clip_id], "audio", "begin_time", "end_time", "duration")
        assert line["duration"] == pytest.approx(plain[clip_id]["duration"], abs=1e-4)
        with soundfile.SoundFile(io.BytesIO(content_of(clip_of(tmp_path / "p.jsonl", clip_id)))) as file:
            assert (file.format, file.subtype) == ("FLAC", "PCM_16")
            assert (file.samplerate, file.channels) == (16_000, 1)
        torch.testing.assert_close(waves[clip_id], expected[clip_id], atol=1.01 / 32_768, rtol=0)
    return packed, waves


def test_segments_are_packed_as_flac_of_exactly_that_stretch(tmp_path):
    root = tmp_path / "w"
    sound(root / "mono.wav", 2.0, seed=1)
    sound(root / "stereo.wav", 2.0, seed=2, rate=44_100, channels=2)
    sound(root / "talk.opus", 2.0, seed=3, format="OGG", subtype="OPUS")
    sound(root / "low.flac", 2.0, seed=4, rate=8_000)
    wenetspeech(root, [audio(name, segment(f"{name}_0", 0, 0.51), segment(f"{name}_1", 0.513, 1.2),
                             segment(f"{name}_2", 1.0, 2)) for name in ("mono.wav", "stereo.wav", "talk.opus",
                                                                        "low.flac")])
    _, waves = check_packed_segments(tmp_path, "wenetspeech", root)
    whole, _ = soundfile.read(root / "mono.wav", dtype="float32")
    assert np.array_equal(waves["mono.wav_1"].numpy(), whole[8_208:19_200])


def test_kaldi_segments_are_packed_too(tmp_path):
    root = kaldi(tmp_path / "k")
    write(root / "segments", "s1 utt1 0.05 0.2\ns2 utt2 0 0.25\ns3 utt2 0.25 0.5\n")
    write(root / "text", "s1 one\ns2 two\ns3 three\n")
    packed, _ = check_packed_segments(tmp_path, "kaldi", root)
    assert list(packed) == ["s1", "s2", "s3"]


@pytest.mark.parametrize("n, shard_bytes, counts", [(5, 15_000, [2, 2, 1]), (4, 15_000, [2, 2]),
                                                    (3, 1, [1, 1, 1]), (5, 10**9, [5])])
def test_a_new_shard_starts_when_one_is_over(n, shard_bytes, counts, tmp_path, monkeypatch):
    """Files of 8,044 bytes, 8,704 in a tar."""
    for i in range(n):
        sound(tmp_path / "clips" / f"{i}.wav", 0.25, seed=i, subtype="PCM_16")
    monkeypatch.setattr(data, "SHARD_BYTES", shard_bytes)
    lines, _ = run("folder", tmp_path / "clips", "--pack", tmp_path / "x.tar", "--out", tmp_path / "m.jsonl")
    shards = [f"x-{i:05d}.tar" for i in range(len(counts))]
    assert [line["audio"] for line in lines.values()] == [
        shard for shard, count in zip(shards, counts) for _ in range(count)]
    assert sorted(path.name for path in tmp_path.glob("*.tar*")) == shards
    check_tar(tmp_path, lines)
    assert [len(wave) for wave in sounds(tmp_path / "m.jsonl").values()] == [4000] * n


def test_an_existing_shard_is_refused_and_left_alone(tmp_path):
    root = kaldi(tmp_path / "k")
    write(tmp_path / "x-00000.tar", "precious")
    with pytest.raises(InputError, match="x-00000.tar"):
        call("kaldi", root, "--pack", tmp_path / "x.tar", "--out", tmp_path / "m.jsonl")
    assert (tmp_path / "x-00000.tar").read_text() == "precious" and not (tmp_path / "m.jsonl").exists()


def test_segments_that_cannot_be_cut_are_left_out(tmp_path):
    """One beyond the end of its recording, two of a recording that is no audio."""
    wenetspeech(tmp_path / "w", [
        audio("a.wav", segment("A0", 0, 0.5), segment("A1", 2, 2.5), segment("A2", 1, 2)),
        audio("b.wav", segment("B0", 0, 1), segment("B1", 1, 2))])
    sound(tmp_path / "w" / "a.wav", 2.0)
    write(tmp_path / "w" / "b.wav", "no audio")
    lines, left = run("wenetspeech", tmp_path / "w", "--pack", tmp_path / "x.tar",
                      "--out", tmp_path / "m.jsonl")
    assert {i: len(wave) for i, wave in sounds(tmp_path / "m.jsonl").items()} == {"A0": 8000, "A2": 16_000}
    assert sum(count for count, *_ in left) == 3
    check_tar(tmp_path, lines)


def test_shards_elsewhere_are_absolute(tmp_path, monkeypatch):
    for name in ("far", "lists"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    lines, _ = run("kaldi", kaldi(tmp_path / "k"), "--pack", "far/x.tar",
                   "--out", tmp_path / "lists" / "m.jsonl")
    assert {line["audio"] for line in lines.values()} == {str(tmp_path / "far" / "x-00000.tar")}
    monkeypatch.chdir("/")
    assert len(sounds(tmp_path / "lists" / "m.jsonl")) == 2


@pytest.mark.parametrize("pack", [[], ["--pack", "x.tar"]], ids=["plain", "packed"])
@pytest.mark.parametrize("corpus, broken", [
    ("librispeech", "test-clean/84/121123/84-121123-0001.flac"), ("kaldi", "a.wav"), ("folder", "b/two.flac"),
    ("aishell1", "wav/train/S0003/BAC009S0003W0121.wav")])
def test_undecodable_files_are_left_out(corpus, broken, pack, tmp_path, monkeypatch):
    name, root = small(corpus, tmp_path)
    (root / broken).write_bytes(b"this is no audio at all")
    monkeypatch.chdir(tmp_path)
    lines, [(count, reason, first)] = run(name, root, *pack, "--out", tmp_path / "m.jsonl")
    assert len(lines) == N_CLIPS[corpus] - 1 and count == 1 and reason
    assert pathlib.Path(broken).stem in first or first == "utt1"
    assert len(sounds(tmp_path / "m.jsonl")) == len(lines)


def test_a_run_that_leaves_everything_out_is_refused(tmp_path):
    root = kaldi(tmp_path / "k")
    shutil.rmtree(root)
    write(root / "wav.scp", "utt1 gone.wav\n")
    assert re.search(r"utt1|gone\.wav|wav\.scp", refused("kaldi", root, "--out", tmp_path / "m.jsonl"))
