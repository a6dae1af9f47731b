"""eval.py: normalisation, errors and corpus figures by hand, sets and their defects, result files, order."""
import dataclasses
import json
import os
import shutil
import types

import numpy as np
import pytest
import soundfile
import torch

import data
import eval as evaluation
from data import Clip, InputError
from model import Rollout

ZEROS = dict(substitutions=0, deletions=0, insertions=0)

NORMALIZED = [
    ("en", "Hello, World!", "hello world"),
    ("en", "It's the colour of the café — isn't it?", "it is the color of the cafe is not it"),
    ("en", "I can't and won't", "i can not and will not"),
    ("en", "Mr. Smith met Dr. Jones", "mister smith met doctor jones"),
    ("en", "um, hmm", ""),                                          # fillers are no words
    ("en", "[noise] hello (laughs)", "hello"),                      # nor is what stands in brackets
    ("en", "two hundred and one", "201"),
    ("en", "1,000 is 20%", "1000 is 20%"),
    ("en", "", ""),
    ("en", " \t\n", ""),
    ("en", "—?!", ""),
    ("zh", "今天 天气 很 好。", "今 天 天 气 很 好"),
    ("zh", "它是３点，ＯＫ吗？", "它 是 3 点 o k 吗"),               # full width to ASCII; Latin letters one by one
    ("zh", "\ufeff二〇二四年……", "二 〇 二 四 年"),
    ("zh", "①《书》「名」、·", "1 书 名"),
    ("zh", "。，", ""),
    ("yue", "廣東話呀！", "廣 東 話 呀"),
    ("ja", "ｶﾅ カタカナ！", "カ ナ カ タ カ ナ"),
    ("ja", "か\u3099", "が"),                                        # NFKC composes
    ("ko", "한국어 문장.", "한 국 어 문 장"),
    ("th", "ภาษา ไทย", "ภ า ษ า ไ ท ย"),
    ("de", "Straße, Öl & Käse!", "straße öl käse"),
    ("fr", "L'eau d'ÉTÉ", "l eau d été"),
    ("fr", "e\u0301te\u0301", "été"),
    ("ru", "Привет, Мир!", "привет мир"),
    ("hi", "हिन्दी है।", "हिन्दी है"),                                   # vowel signs stay
    ("es", "¿Qué tal? ¡Bien!", "qué tal bien"),
    ("de", "👍 ok_und … weiter", "ok und weiter"),
    ("de", "ﬁn 5 °C", "fin 5 c"),
    ("tr", "<|im_end|> metin", "im end metin"),
    (None, "Hello,  World 3.5", "hello world 3 5"),
]


@pytest.mark.parametrize("language, text, units", NORMALIZED)
def test_normalize(language, text, units):
    assert evaluation.normalize(text, language) == units.split()


@pytest.mark.parametrize("language, reference, hypothesis, substitutions, deletions, insertions, units", [
    ("en", "the cat sat", "the cat sat", 0, 0, 0, 3),
    ("en", "The cat, sat!", "the  CAT sat.", 0, 0, 0, 3),           # both sides are normalised
    ("en", "the cat sat", "the bat sat", 1, 0, 0, 3),
    ("en", "the cat sat", "the sat", 0, 1, 0, 3),
    ("en", "the cat sat", "the big cat sat", 0, 0, 1, 3),
    ("en", "big cat sat on the mat today", "so big bat sat on mat today", 1, 1, 1, 7),
    ("en", "the cat sat", "", 0, 3, 0, 3),
    ("en", "the cat sat", "?!", 0, 3, 0, 3),
    ("en", "", "hello there you", 0, 0, 3, 0),
    ("en", "um", "hello there", 0, 0, 2, 0),                        # empty after normalisation
    ("en", "", "", 0, 0, 0, 0),
    ("en", "yes", "yes yes yes yes", 0, 0, 3, 1),
    ("zh", "今天天气很好", "今天气很好吗", 0, 1, 1, 6),
    ("zh", "今天，天气很好。", "今天 天汽 很好", 1, 0, 0, 6),
    ("zh", "", "好的", 0, 0, 2, 0),
    ("ja", "カナ", "かな", 2, 0, 0, 2),
    ("ko", "한국어 문장", "한국 문장", 0, 1, 0, 5),
    ("de", "guten Tag", "gutenTag", 1, 1, 0, 2),                    # words, not characters
    ("zh", "你好", "你 好", 0, 0, 0, 2),
])
def test_count_errors_by_hand(language, reference, hypothesis, substitutions, deletions, insertions, units):
    assert evaluation.count_errors(reference, hypothesis, language) == dict(
        errors=substitutions + deletions + insertions, units=units,
        substitutions=substitutions, deletions=deletions, insertions=insertions)


def result(language="en", text="x", hyp="x", errors=0, units=1, stopped=True, duration=36.0, **counts):
    return dict(language=language, text=text, hyp=hyp, stopped=stopped, duration=duration, errors=errors,
                units=units, **{**ZEROS, **counts})


def test_summarize_is_errors_over_units_not_a_mean_of_rates():
    """1/1 and 1/9 and 2 words invented on silence: 4/10, not the mean of 100 % and 11 %."""
    summary = evaluation.summarize([result(errors=1, units=1, substitutions=1),
                                    result(errors=1, units=9, deletions=1, stopped=False),
                                    result(text="", hyp="oh well", errors=2, units=0, insertions=2),
                                    dict(hyp="", stopped=False, duration=72.0, language="en")])
    assert summary.items() >= dict(metric="WER", value=40.0, n=4, scored=3, errors=4, units=10, substitutions=1,
                                   deletions=1, insertions=2, empty=1, capped=2, hours=0.05, failed=0).items()


@pytest.mark.parametrize("languages, metric", [
    (["en", "de"], "WER"), (["zh", "ja", "ko", "th", "yue"], "CER"), (["en", "zh"], "MER"), ([], "WER")])
def test_metric_name_follows_the_languages(languages, metric):
    assert evaluation.summarize([result(language) for language in languages])["metric"] == metric


@pytest.mark.parametrize("text, metric", [("你好", "CER"), ("hello", "WER")])
def test_metric_name_where_the_line_names_no_language(text, metric):
    unnamed = result(text=text)
    del unnamed["language"]
    for line in (unnamed, result(None, text)):
        assert evaluation.summarize([line])["metric"] == metric


def test_summary_without_a_reference_has_no_value():
    assert evaluation.summarize([dict(hyp="a", stopped=True, duration=1.0)])["value"] is None
    assert evaluation.summarize([])["value"] is None


@pytest.mark.parametrize("fields, language", [
    (dict(text="hello"), "en"), (dict(text=""), "en"), (dict(text="OK 好"), "zh"),
    (dict(text="㐀", language=None), "zh"), (dict(text="Grüße"), "en"), (dict(text="好", language="en"), "en"),
    (dict(text="a", language="zh-CN"), "zh"), (dict(text="好", language="EN"), "en"),
    (dict(text="a", language="Chinese"), "zh"), (dict(text="a", language=" zh_TW"), "zh"),
    (dict(text="a", language="Thai"), "th"), (dict(text="a", language="de"), "de")])
def test_language_of(fields, language):
    assert evaluation.language_of(fields) == language


# ------------------------------------------------------------------------------------------------------------
# Sets
# ------------------------------------------------------------------------------------------------------------
def write_manifest(path, *lines):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def line(**changed):
    return {"audio": "a.wav", "duration": 1.0, "text": "hello there", "language": "en", **changed}


@pytest.fixture
def wav(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(16_000) / 9) / 2, 16_000)
    return tmp_path / "a.wav"


def test_read_sets(tmp_path, wav):
    path = write_manifest(tmp_path / "one.jsonl", line(), line(duration=30.0))
    sets = evaluation.read_sets([path, str(wav)], 30.0)
    assert list(sets) == ["one", "a"] and [clip.duration for clip in sets["one"]] == [1.0, 30.0]
    assert [clip.duration for clip in sets["a"]] == [1.0]
    assert sets["a"][0].audio == str(wav) and sets["a"][0].text is None


def test_equal_stems_are_an_error(tmp_path):
    paths = [write_manifest(tmp_path / folder / "test.jsonl", line()) for folder in ("x", "y")]
    with pytest.raises(InputError, match="stem 'test'"):
        evaluation.read_sets(paths, 30.0)


def test_over_long_clip_is_an_error_that_names_its_line(tmp_path):
    path = write_manifest(tmp_path / "m.jsonl", line(), line(duration=30.5))
    with pytest.raises(InputError, match=r"/m\.jsonl:2: 30\.5 s, over --max-seconds 30; split"):
        evaluation.read_sets([path], 30.0)
    assert len(evaluation.read_sets([path], 30.5)["m"]) == 2


def test_neither_manifest_nor_audio(tmp_path):
    (tmp_path / "notes.txt").write_text("no audio " * 100)
    for path in (tmp_path / "notes.txt", tmp_path / "missing.flac", tmp_path / "missing.jsonl"):
        with pytest.raises(InputError, match=path.name):
            evaluation.read_sets([str(path)], 30.0)


# ------------------------------------------------------------------------------------------------------------
# Result files
# ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def run(monkeypatch):
    """run(manifest paths, hyps of every set, out) → summaries. The transcripts are given, without a model."""
    def run(paths, hyps, out):
        monkeypatch.setattr(evaluation, "transcribe",
                            lambda model, clips, *args, **caps: [
                                dict(hyp=h, stopped=h != "cut") for h in hyps[:len(clips)]])
        sets = evaluation.read_sets(paths, 30.0)
        return evaluation.evaluate(StubModel(), sets, torch.device("cpu"), 600.0, out=out)
    return run


def test_evaluate_scores_and_writes(tmp_path, wav, run):
    path = write_manifest(tmp_path / "test.jsonl", line(speaker={"id": 5}), line(text="好", language="zh"),
                          line(text=None))
    summaries = run([path], ["hello", "好好", "cut"], str(tmp_path / "out"))
    expected = dict(metric="MER", value=100 * 2 / 3, n=3, scored=2, errors=2, units=3, substitutions=0,
                    deletions=1, insertions=1, empty=0, capped=1, hours=pytest.approx(3 / 3600), failed=0,
                    looping=0)
    assert summaries["test"].items() >= expected.items()
    assert summaries == json.loads((tmp_path / "out" / "summary.json").read_text())
    lines = [json.loads(text) for text in (tmp_path / "out" / "test.jsonl").read_text().splitlines()]
    counts = dict(errors=1, units=2, substitutions=0, deletions=1, insertions=0)
    assert lines[0] == dict(line(speaker={"id": 5}), audio="../a.wav", hyp="hello", stopped=True, **counts)
    assert lines[1]["hyp"] == "好好" and lines[1]["errors"] == lines[1]["insertions"] == 1
    assert lines[2] == dict(line(text=None), audio="../a.wav", hyp="cut", stopped=False)
    assert "好好" in (tmp_path / "out" / "test.jsonl").read_text()                # readable, not \u597d


@pytest.mark.parametrize("out", ["out", "deep/er/out", ".", "absolute", "link/out"])
def test_result_file_is_a_manifest_wherever_it_lies(tmp_path, wav, run, monkeypatch, out):
    """`link` leads elsewhere, as `runs` does where there is a scratch disk; `link/..` is not its parent."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk" / "scratch").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "scratch")
    out = str(tmp_path / "elsewhere") if out == "absolute" else out
    write_manifest(tmp_path / "sets" / "test.jsonl", line(audio="../a.wav"),
                   line(audio=str(wav), duration=0.5, begin_time=0.25, end_time=0.75),
                   line(audio="../a.wav", offset=0, nbytes=wav.stat().st_size))
    run(["sets/test.jsonl"], ["first", "second", ""], out)
    monkeypatch.chdir("/")
    clips = data.read_manifest(str(tmp_path / out / "test.jsonl"), text_field="hyp")
    assert [clip.text for clip in clips] == ["first", "second", ""]
    assert [os.path.exists(clip.audio) and os.path.samefile(clip.audio, wav) for clip in clips] == [True] * 3
    assert [len(data.load_audio(clip)) for clip in clips] == [16_000, 8000, 16_000]


def test_result_of_a_result_keeps_nothing_stale(tmp_path, wav, run):
    path = write_manifest(tmp_path / "test.jsonl", line())
    run([path], ["hello"], str(tmp_path / "one"))
    run([str(tmp_path / "one" / "test.jsonl")], ["hello there"], str(tmp_path / "two"))
    (again,) = [json.loads(text) for text in (tmp_path / "two" / "test.jsonl").read_text().splitlines()]
    assert again == dict(line(), audio="../a.wav", hyp="hello there", stopped=True, errors=0,
                         units=2, **ZEROS)
    old = json.loads((tmp_path / "one" / "test.jsonl").read_text())
    unlabelled = {key: value for key, value in old.items() if key not in ("text", "language")}
    path = write_manifest(tmp_path / "one" / "unlabelled.jsonl", unlabelled)
    summary = run([path], ["hello"], str(tmp_path / "three"))["unlabelled"]
    assert summary["scored"] == 0                                               # old counts are not new ones


def test_evaluate_without_out_writes_nothing(tmp_path, wav, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_manifest(tmp_path / "test.jsonl", line())
    assert run(["test.jsonl", "a.wav"], ["hello there"], None)["test"]["value"] == 0.0
    assert sorted(os.listdir(tmp_path)) == ["a.wav", "test.jsonl"]


def test_bare_audio_file_as_a_set(tmp_path, wav, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["a.wav"], ["hello"], "out")["a"]["value"] is None
    (clip,) = data.read_manifest("out/a.jsonl", text_field="hyp")
    assert os.path.samefile(clip.audio, wav) and (clip.text, clip.duration) == ("hello", 1.0)


def test_transcripts_of_several_audio_files_have_their_names(tmp_path, wav, run, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(wav, "b.wav")
    run(["a.wav"], ["hello"], None)
    run(["a.wav", "b.wav"], ["hello"], None)
    assert capsys.readouterr().out == "hello\na.wav\thello\nb.wav\thello\n"


# ------------------------------------------------------------------------------------------------------------
# Decoding order
# ------------------------------------------------------------------------------------------------------------
CAPS = dict(max_new_tokens=50, tokens_per_second=5.0)


class StubModel:
    """"Writes" a clip's number of samples digit by digit; notes the batches it was given."""

    def __init__(self):
        self.batches = []
        self.front_end = types.SimpleNamespace(
            pad_id=0, prompt=lambda n, language: [1], n_audio_tokens=data.n_audio_tokens, frame_multiple=8,
            languages={},
            features=lambda waveform: torch.zeros(128, 8 * -(-len(waveform) // 1280)),
            texts=lambda rollout: ["".join(map(str, ids[:n].tolist()))
                                   for ids, n in zip(rollout.ids, rollout.lens)])

    def with_languages(self, batch):
        return batch

    def sample(self, batch, max_new_tokens, k, tokens_per_second):
        assert dict(max_new_tokens=max_new_tokens, tokens_per_second=tokens_per_second) == CAPS
        numbers = [[int(digit) for digit in str(round(s * 16_000))] for s in batch.seconds.tolist()]
        self.batches.append([round(seconds, 3) for seconds in batch.seconds.tolist()])
        ids = torch.tensor([number + [9] * (8 - len(number)) for number in numbers])    # 9 must not be read
        return Rollout(ids, torch.tensor([len(number) for number in numbers]), batch.seconds < 0.5)


SECONDS = [0.2, 0.7, 0.1, 0.5, 0.4, 0.3]
TRANSCRIPTS = [dict(hyp=hyp, stopped=stopped) for hyp, stopped in (
    ("3200", True), ("11200", False), ("1600", True), ("8000", False), ("6400", True), ("4800", True))]


@pytest.fixture
def six_clips(tmp_path):
    clips = []
    for i, seconds in enumerate(SECONDS):
        soundfile.write(tmp_path / f"{i}.wav", np.sin(np.arange(round(seconds * 16_000))) / 2, 16_000)
        clips.append(Clip(str(tmp_path / f"{i}.wav"), seconds, f"m:{i}", {}))
    return clips


def transcribe(model, clips):
    return evaluation.transcribe(model, clips, torch.device("cpu"), 1.0, **CAPS)


def test_transcribe_answers_in_the_manifests_order(six_clips):
    model = StubModel()
    assert transcribe(model, six_clips) == TRANSCRIPTS
    assert model.batches == [[0.7], [0.5, 0.4], [0.3, 0.2, 0.1]]    # within 1 s, counted as clips × longest


def test_evaluate_decodes_every_set_with_the_given_caps(six_clips):
    model, sets = StubModel(), {}
    for stem, clips in (("one", six_clips[:2]), ("two", six_clips[2:])):
        sets[stem] = [dataclasses.replace(clip, text="1600", fields=dict(duration=clip.duration, text="1600"))
                      for clip in clips]
    summaries = evaluation.evaluate(model, sets, torch.device("cpu"), 1.0, **CAPS)
    figures = {stem: (s["errors"], s["units"], s["capped"]) for stem, s in summaries.items()}
    assert figures == {"one": (2, 2, 1), "two": (3, 4, 1)}


def test_ranks_share_the_clips_and_all_get_every_transcript(six_clips, monkeypatch):
    """Rank 1 first; what it hands over is kept for rank 0. Neighbours in length go to different ranks."""
    shares, models = [None, None], [StubModel(), StubModel()]

    def run_rank(rank):
        def all_gather_object(found, mine):
            shares[rank] = mine
            found[:] = shares if rank == 0 else [dict.fromkeys(range(6)), mine]
        group = types.SimpleNamespace(is_initialized=lambda: True, get_rank=lambda: rank,
                                      get_world_size=lambda: 2, all_gather_object=all_gather_object)
        monkeypatch.setattr(data, "dist", group)
        return transcribe(models[rank], six_clips)

    run_rank(1)
    assert run_rank(0) == TRANSCRIPTS
    assert [model.batches for model in models] == [[[0.7], [0.4, 0.2]], [[0.5, 0.3], [0.1]]]
