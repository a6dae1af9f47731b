"""eval.py: sets and their defects, decoding order, result files, clips that fail or are cut, --resume."""

import os
import signal
import tracemalloc
import types

import numpy as np
import pytest
import soundfile
import torch
from runs import lines_of, run_ranks, status_of, write_lines

import data
import eval as evaluation
import model
from data import Clip, InputError

CPU = torch.device("cpu")


class StubModel:
    """Writes a clip's number of samples digit by digit, or `hyps`; a clip of 0.5 s or more is cut."""

    architecture = "Stub"

    def __init__(self, languages=(), hyps=None):
        self.hyps = hyps
        self.dtype = None
        self.batches = []  # seconds of the clips of each batch
        self.prompted = []  # languages in the prompts
        self.caps = []
        self.front_end = types.SimpleNamespace(
            pad_id=0,
            frame_multiple=8,
            languages=dict.fromkeys(languages),
            n_audio_tokens=data.n_audio_tokens,
            features=data.log_mel,
            prompt=self.prompt,
            texts=self.texts,
        )

    def prompt(self, n_audio, language, context):
        self.prompted.append(language)
        return [1]

    def texts(self, rollout):
        texts = ["".join(map(str, ids[:n].tolist())) for ids, n in zip(rollout.ids, rollout.lens)]
        return texts if self.hyps is None else self.hyps[: len(texts)]

    def to(self, device):
        return self

    def eval(self):
        return self

    def sample(self, batch, max_new_tokens, tokens_per_second):
        self.caps.append((max_new_tokens, tokens_per_second))
        self.batches.append([round(seconds, 3) for seconds in batch.seconds.tolist()])
        numbers = [[int(digit) for digit in str(round(s * 16_000))] for s in batch.seconds.tolist()]
        ids = torch.tensor([number + [9] * (8 - len(number)) for number in numbers])  # 9 must not be read
        return model.Rollout(ids, torch.tensor([len(number) for number in numbers]), batch.seconds < 0.5)


def write_manifest(path, *lines):
    return str(write_lines(path, lines))


def line(**changed):
    return {"audio": "a.wav", "duration": 0.3, "text": "hello there", "language": "en", **changed}


def write_wav(path, seconds):
    soundfile.write(path, np.sin(np.arange(round(seconds * 16_000)) / 9) / 2, 16_000)


@pytest.fixture
def wav(tmp_path):
    write_wav(tmp_path / "a.wav", 0.3)
    return tmp_path / "a.wav"


# ---- Sets --------------------------------------------------------------------------------------------------


def test_read_sets(tmp_path, wav):
    path = write_manifest(tmp_path / "one.jsonl", line(), line(duration=30.0, language=None))
    sets = evaluation.read_sets([path, str(wav)], 30.0)
    assert list(sets) == ["one", "a"]
    assert [clip.duration for clip in sets["one"]] == [0.3, 30.0]
    assert (sets["a"][0].audio, sets["a"][0].duration) == (str(wav), 0.3)
    with pytest.raises(InputError, match=r"one\.jsonl:2: 30\.0 s, over --max-seconds 29; split"):
        evaluation.read_sets([path], 29)
    with pytest.raises(InputError, match="have the same name"):
        evaluation.read_sets([path, path], 30.0)


# ---- Decoding ----------------------------------------------------------------------------------------------
SECONDS = [0.2, 0.7, 0.1, 0.5, 0.4, 0.3]
HYPS = ["3200", "11200", "1600", "8000", "6400", "4800"]
ANSWERS = [{"hyp": hyp, "stopped": seconds < 0.5} for hyp, seconds in zip(HYPS, SECONDS)]


@pytest.fixture
def six_clips(tmp_path):
    clips = []
    for i, seconds in enumerate(SECONDS):
        path = tmp_path / f"{i}.wav"
        write_wav(path, seconds)
        clips.append(Clip(str(path), seconds, f"m:{i}", {"audio": str(path), "duration": seconds}))
    return clips


def test_transcribe_answers_in_the_manifests_order(six_clips):
    stub = StubModel()
    decoding = {"batch_seconds": 1.0, "max_new_tokens": 50, "tokens_per_second": 5.0}
    assert evaluation.transcribe(stub, six_clips, CPU, decoding, "x")[0] == ANSWERS
    assert stub.batches == [[0.7], [0.5, 0.4], [0.3, 0.2, 0.1]]  # within 1 s, counted as clips × longest
    assert stub.caps == [(50, 5.0)] * 3


def test_bad_clips_are_left_out_of_their_batches(six_clips):
    bad = (1, 4, 2)  # a batch of its own, the last of two, the last of three
    for i in bad:
        os.remove(six_clips[i].audio)
    answers, _ = evaluation.transcribe(StubModel(), six_clips, CPU, {"batch_seconds": 1.0}, "x")
    for i, answer in enumerate(answers):
        if i in bad:
            assert list(answer) == ["error"] and answer["error"].startswith(f"m:{i}: ")
        else:
            assert answer == ANSWERS[i]


# ---- Result files ------------------------------------------------------------------------------------------


def evaluate(paths, hyps, out=None, **options):
    """Summaries of sets, of which each has these transcripts."""
    sets = evaluation.read_sets(paths, 30.0)
    return evaluation.evaluate(StubModel(hyps=hyps), sets, CPU, {}, out, **options)


def test_evaluate_scores_and_writes(tmp_path, wav):
    write_wav(tmp_path / "long.wav", 0.6)
    path = write_manifest(
        tmp_path / "test.jsonl",
        line(audio="long.wav", duration=0.6, text=None),
        line(room={"id": 5}),
        line(text="好", language="zh"),
    )
    summaries = evaluate([path], ["cut", "hello", "好好"], str(tmp_path / "out"))
    expected = {"metric": "MER", "value": 100 * 2 / 3, "n": 3, "scored": 2, "failed": 0, "capped": 1}
    assert summaries["test"].items() >= expected.items() and summaries["test"]["rtf"] > 0
    assert summaries == data.read_json(tmp_path / "out" / "summary.json")
    cut, english, chinese = lines_of(tmp_path / "out" / "test.jsonl")
    counts = {"errors": 1, "units": 2, "substitutions": 0, "deletions": 1, "insertions": 0}
    assert english == line(room={"id": 5}, audio="../a.wav", hyp="hello", stopped=True, **counts)
    assert chinese["hyp"] == "好好" and chinese["errors"] == chinese["insertions"] == 1
    assert cut == line(audio="../long.wav", duration=0.6, text=None, hyp="cut", stopped=False)


@pytest.mark.parametrize("out", ["deep/er/out", ".", "link/out"])
def test_result_file_is_a_manifest_wherever_it_lies(tmp_path, wav, monkeypatch, out):
    """`link` leads elsewhere, as `runs` does where there is a scratch disk; `link/..` is not its parent."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk" / "scratch").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "scratch")
    write_manifest(
        tmp_path / "sets" / "test.jsonl",
        line(audio="../a.wav"),
        line(audio=str(wav), duration=0.2, begin_time=0.1, end_time=0.3),
        line(audio="../a.wav", duration=0.3, offset=0, nbytes=wav.stat().st_size),
    )
    evaluate(["sets/test.jsonl"], ["first", "second", "third"], out)
    monkeypatch.chdir("/")
    clips = data.read_manifest(str(tmp_path / out / "test.jsonl"), text_field="hyp")
    assert [len(data.load_audio(clip)) for clip in clips] == [4800, 3200, 4800]
    assert sorted(clip.text for clip in clips) == ["first", "second", "third"]


def test_result_of_a_result_keeps_nothing_stale(tmp_path, wav):
    path = write_manifest(tmp_path / "test.jsonl", line(error="is damaged", hyp="hello", errors=1))
    evaluate([path], ["hello there"], str(tmp_path / "out"))
    (again,) = lines_of(tmp_path / "out" / "test.jsonl")
    assert again["hyp"] == "hello there" and again["errors"] == 0 and "error" not in again


def test_transcripts_are_printed_where_nothing_is_scored(tmp_path, monkeypatch, capsys):
    """Also that the cap cut one is said, on stderr."""
    monkeypatch.chdir(tmp_path)
    write_wav("a.wav", 0.3)
    write_wav("b.wav", 0.6)
    assert evaluate(["a.wav"], None)["a"]["value"] is None
    evaluate(["b.wav"], None)
    captured = capsys.readouterr()
    assert captured.out == "a.wav\t4800\nb.wav\t9600\n"
    assert captured.err == "eval.py: cut by the cap: b.wav\n"


# ---- The command -------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, tmp_path):
    """command(flags, stub) → exit status of eval.py with that model in place of --model."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    def command(*argv, stub=None):
        stub = stub or StubModel()

        def from_pretrained(name, dtype):
            stub.dtype = dtype
            return stub

        monkeypatch.setattr(model.SpeechLM, "from_pretrained", from_pretrained)
        return status_of(evaluation, ["--model", tmp_path / "model", *argv])

    return command


def test_a_clip_that_fails_is_reported_counted_and_nothing_else(tmp_path, wav, command, capsys):
    (tmp_path / "bad.wav").write_text("no audio " * 100)
    bad = line(audio="bad.wav", speaker=9)
    path = write_manifest(tmp_path / "m.jsonl", line(speaker=8), bad, line(text="4800", speaker=7))
    flags = ["--cluster", "speaker", "--json", tmp_path / "x.json"]
    assert command("--data", path, "--out", tmp_path / "out", *flags) == 1
    error = capsys.readouterr().err
    assert "m.jsonl:2: " in error and error.splitlines()[-1] == "eval.py: 1 clip(s) not decoded"
    summary = data.read_json(tmp_path / "out" / "summary.json")["m"]
    assert data.read_json(tmp_path / "x.json") == {"m": summary}
    assert [summary[key] for key in ("n", "scored", "failed", "errors", "units")] == [3, 2, 1, 2, 3]
    assert (summary["clusters"], summary["cluster_key"]) == (2, "speaker")
    result = lines_of(tmp_path / "out" / "m.jsonl")[1]
    assert result.pop("error").endswith("convert it to wav or flac")
    assert result == {**bad, "audio": "../bad.wav"}

    assert status_of(evaluation, ["--score", tmp_path / "out" / "m.jsonl", *flags]) == 1
    assert data.read_json(tmp_path / "x.json") == {"m": {**summary, "rtf": None}}


def test_flags_reach_the_decoder(tmp_path, wav, command, capsys):
    """By default 800 tokens and 25 a second; the first clip is decoded once more, as a warm-up."""
    stub = StubModel()
    path = write_manifest(tmp_path / "m.jsonl", line(text="Don't", language="de"))
    assert command("--data", path, stub=stub) == 0
    assert stub.caps == [(800, 25.0)] * 2 and stub.dtype == torch.float32
    flags = ["--max-new-tokens", 9, "--tokens-per-second", 2, "--normalizer", "paper", "--bf16"]
    assert command("--data", path, *flags, stub=stub) == 0
    assert stub.caps[2:] == [(9, 2.0)] * 2 and stub.dtype == torch.bfloat16
    assert "normalizer: paper/3" in capsys.readouterr().out


def test_language_is_needed_where_the_prompt_names_one(tmp_path, wav, command, capsys):
    path = write_manifest(tmp_path / "m.jsonl", line(language=None), line(language="fr"))
    assert command("--data", path, stub=StubModel(["en", "fr"])) == 2
    assert 'm.jsonl:1: "language" None: give it, or --language' in capsys.readouterr().err
    stub = StubModel(["en", "fr"])
    assert command("--data", path, "--language", "English", "--out", tmp_path / "out", stub=stub) == 0
    assert stub.prompted == ["en", "en", "en", "fr"]  # the first two of them a warm-up
    assert lines_of(tmp_path / "out" / "m.jsonl")[0]["language"] is None  # as in the manifest


# ---- --resume ----------------------------------------------------------------------------------------------


class MortalModel(StubModel):
    """Its texts depend on their batch, as the last bits of a real model do. It kills its rank at a call."""

    def __init__(self, deadly=None):
        super().__init__()
        self.deadly = deadly  # (rank, number of the call of `sample`, of which 0 is the warm-up)

    def sample(self, batch, **caps):
        if self.deadly == (data.rank_and_world()[0], len(self.batches)):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(batch, **caps)

    def texts(self, rollout):
        return [f"{text} 好 {self.batches[-1]}" for text in super().texts(rollout)]


@pytest.fixture
def two_sets(tmp_path, six_clips):
    lines = [line(audio=clip.audio, duration=clip.duration, text="4800") for clip in six_clips]
    a = write_manifest(tmp_path / "a.jsonl", *lines, line(audio="gone.wav", duration=0.5))
    return ["--data", a, write_manifest(tmp_path / "b.jsonl", *lines), "--batch-seconds", 1]


def assert_same_results(out, expected):
    """Result files bit for bit, and the summary but for the real-time factor; nothing else is left."""
    assert sorted(os.listdir(out)) == ["a.jsonl", "b.jsonl", "config.json", "summary.json"]
    for name in ("a.jsonl", "b.jsonl"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()
    summaries = [data.read_json(folder / "summary.json") for folder in (out, expected)]
    for stem in "ab":
        assert {**summaries[0][stem], "rtf": 0} == {**summaries[1][stem], "rtf": 0}


@pytest.mark.parametrize("world, first, second", [(1, 4, 4), (2, 2, 4)])
def test_a_run_killed_again_and_again_is_the_straight_run(tmp_path, two_sets, command, world, first, second):
    """Killed in the first set and in the second. Of the first kill a line is torn."""

    def start(out, deadly=None):
        def action():
            return command(*two_sets, "--out", out, "--resume", stub=MortalModel(deadly))

        return [status for status, _ in run_ranks(action, world)]

    last = world - 1
    out = tmp_path / "out"
    assert start(tmp_path / "straight") == [1, 0][:world]  # one clip cannot be decoded
    assert start(out, (last, first))[last] == -signal.SIGKILL
    part = out / f"rank-{last}.part"
    raw = part.read_bytes()
    part.write_bytes(raw[: raw.rindex("好".encode()) + 1])
    assert start(out, (last, second))[last] == -signal.SIGKILL
    assert lines_of(part)[-1]["set"] == "b" and not (out / "summary.json").exists()
    assert start(out)[0] == 1
    assert_same_results(out, tmp_path / "straight")


def test_another_number_of_ranks_goes_on(tmp_path, two_sets, command):
    """Two ranks write what one writes. Nothing is decoded twice."""
    straight = tmp_path / "straight"
    assert command(*two_sets, "--out", straight) == 1
    run_ranks(lambda: command(*two_sets, "--out", tmp_path / "two"), 2)
    assert_same_results(tmp_path / "two", straight)

    out = tmp_path / "out"
    run_ranks(lambda: command(*two_sets, "--out", out, stub=MortalModel((1, 2))), 2)
    stub = StubModel()
    assert command(*two_sets, "--out", out, "--resume", stub=stub) == 1
    assert stub.batches[1:] == [[0.2], [0.7], [0.5, 0.4], [0.3, 0.2, 0.1]]  # after the warm-up
    lines = lines_of(out / "a.jsonl")
    hyps = [line.get("hyp", "").split(" ")[0] for line in lines]
    assert hyps == [line.get("hyp", "") for line in lines_of(straight / "a.jsonl")]
    assert command(*two_sets, "--out", out, "--resume", stub=stub) == 1 and len(stub.batches) == 5  # finished


def test_a_run_goes_on_by_resume_with_the_same_flags_and_data_only(tmp_path, wav, command, capsys):
    path = write_manifest(tmp_path / "m.jsonl", line())
    flags = ["--data", path, "--out", tmp_path / "out"]
    assert command(*flags) == 0
    assert command(*flags, "--resume", "--bf16") == 2
    assert "--bf16 was False, now True" in capsys.readouterr().err
    write_manifest(tmp_path / "m.jsonl", line(), line())
    assert command(*flags, "--resume") == 2
    assert "--data was " in capsys.readouterr().err


def test_memory_does_not_grow_with_the_manifest(tmp_path, wav, command):
    """Its lines have 15 MB, of which the run holds those of a batch."""
    m = write_manifest(tmp_path / "m.jsonl", *(line(note=f"{i:100000}", speaker=i % 7) for i in range(150)))
    command("--data", write_manifest(tmp_path / "one.jsonl", line()))  # what the first call loads stays
    tracemalloc.start()
    assert command("--data", m, "--out", tmp_path / "out", "--batch-seconds", 3) == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6
