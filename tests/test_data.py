"""data.py without the audio: languages, manifests, features, batches, their order, output folders, flags."""

import argparse
import gzip
import json
import math
import re
import sys

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from transformers import GlmAsrProcessor, WhisperFeatureExtractor
from transformers.models.qwen3_asr.processing_qwen3_asr import LANGUAGE_CODE_TO_NAME

import data
from data import AudioError, Clip, Clips, InputError

REMEDY = "; give a path that can be used\n"
GOOD = '{"audio": "a.wav", "duration": 2.0, "text": "hello"}'


def steps(n, channels=1, seed=0):
    """(n, channels) multiples of 1/128 in [−0.8, 0.8]: exact in float and in every PCM width from 8 bits."""
    return np.random.default_rng(seed).integers(-100, 101, (n, channels)).astype(np.float32) / 128


def line_of(**changed):
    """A manifest line; a value of ... leaves the key out."""
    line = {"audio": "a.wav", "duration": 2.0, **changed}
    return json.dumps({key: value for key, value in line.items() if value is not ...})


def raises_at(where, exception, reason, function, *args):
    """The call raises one line that begins with its place and says why."""
    with pytest.raises(exception) as caught:
        function(*args)
    message = str(caught.value)
    assert re.match(rf"(/\S*/)?{re.escape(where)}: ", message), message
    assert reason in message and "\n" not in message


# ---- languages ---------------------------------------------------------------------------------------------

CODES = {
    "zh": "zh ZH zh-CN zh_TW zh-Hant-TW zh-Hans cmn cmn-Hans-CN wuu nan hak gan Chinese Mandarin zho chi",
    "yue": "yue yue-HK Cantonese zh-HK zh-Hant-HK zh_yue",
    "en": "en en-US en_gb eng English ENGLISH",
    "de": "de de-CH deu ger German",
    "jv": "jw jv jav Javanese",
    "he": "iw he heb Hebrew",
    **{code: code for code in "eo kab haw ceb no nb nn tw".split()},
}
CODE_PAIRS = [(name, code) for code, names in CODES.items() for name in names.split()]


@pytest.mark.parametrize("name, code", [*CODE_PAIRS, (" en ", "en")])
def test_language_code(name, code):
    assert data.language_code(name) == code


@pytest.mark.parametrize(
    "name", ["cn", "jp", "Deutsch", "中文", "", "xx", "und", "-", "en-", "en us", "zh-!", "english-uk!"]
)
def test_a_language_that_is_not_known_is_an_error_of_its_line(tmp_path, name):
    path = write_manifest(tmp_path, GOOD, line_of(language=name))
    raises_at("m.jsonl:2", InputError, f"language {name!r} is not known", data.read_manifest, path)


def test_all_thirty_names_and_their_own_codes_are_known():
    assert len(LANGUAGE_CODE_TO_NAME) == 30
    for code, name in LANGUAGE_CODE_TO_NAME.items():
        assert data.language_code(name) == data.language_code(code) == code


SCRIPTS = {
    "今天天气": "zh",
    "東京タワー": "ja",
    "はい": "ja",
    "대한민국 大韓": "ko",
    "สวัสดี ok": "th",
    "καλημέρα": "el",
    "hello": None,
    "привет": None,
    "2025 !": None,
    "<asr_text>καλημέρα<|im_end|>": "el",
}


@pytest.mark.parametrize("text, language", SCRIPTS.items())
def test_script_language(text, language):
    assert data.script_language(text) == language
    assert data.script_language(text * 5000) == language  # as fast as it is long


@pytest.mark.parametrize("default, language", [(None, "zh"), ("en", "zh"), ("yue", "yue"), ("ja", "ja")])
def test_han_is_no_objection_to_cantonese_or_japanese(default, language):
    assert data.script_language("東京大学", default) == language
    assert data.script_language("東京のだいがく", default) == "ja"


# ---- manifest ----------------------------------------------------------------------------------------------


def write_manifest(folder, *lines, name="m.jsonl"):
    (folder / name).write_bytes("\n".join(lines).encode())
    return str(folder / name)


def test_a_line_with_all_keys_and_with_null_ones():
    line = {"audio": "sub/é 名.flac", "duration": 1.5, "text": "", "language": "cmn", "speaker": {"id": 5}}
    line |= {"begin_time": 0.5, "end_time": 2, "offset": 0, "nbytes": 9}
    clip = data.parse_line(json.dumps(line).encode(), "m:1", "/x")
    assert clip == Clip("/x/sub/é 名.flac", 1.5, "m:1", line, "", "zh", 0.5, 2, 0, 9)
    nulls = dict.fromkeys(["text", "language", "begin_time", "end_time", "offset", "nbytes"])
    clip = data.parse_line(line_of(**nulls, hyp="from hyp").encode(), "m:1", "/x", text_field="hyp")
    assert clip == Clip("/x/a.wav", 2.0, "m:1", clip.fields, "from hyp")
    assert data.parse_line(GOOD.encode(), "m:1", "/x", text_field=None).text is None
    assert data.parse_line(line_of(audio="/y/b.wav").encode(), "m:1", "/x").audio == "/y/b.wav"


@pytest.mark.parametrize(
    "text", ["<asr_text>", "a<|im_end|>b", "language models are good", "\u2028 \x85", "👍🏽"]
)
def test_a_text_is_kept_as_it_is(text):
    for ascii_only in (True, False):
        raw = json.dumps({"audio": "a", "duration": 1, "text": text}, ensure_ascii=ascii_only).encode()
        assert data.parse_line(raw, "m:1", "/x").text == text


DEFECTS = {
    "not JSON": ['{"audio": "a.wav"', GOOD + ",", '{"duration": ' + "9" * 5000 + "}"],
    "expected a JSON object, found": ["[1, 2]", '"a.wav"', "null", "3"],
    '"audio" is missing': [line_of(audio=...), line_of(audio=None)],
    '"audio" must be a string, found 3': [line_of(audio=3)],
    '"duration" is missing': [line_of(duration=...), line_of(duration=None)],
    '"duration" must be a number of seconds': [
        *(line_of(duration=value) for value in ("2.0", True, [2], math.nan, math.inf, 10**400)),
        '{"audio": "a.wav", "duration": 1e999}',
    ],
    '"duration" must be above 0 s': [line_of(duration=0), line_of(duration=-1.5)],
    '"text" must be a string': [line_of(text=5), line_of(text=["a"]), line_of(text=False)],
    '"end_time" must be a number of seconds': [line_of(end_time=False)],
    "end_time 1 is not after begin_time 2": [line_of(begin_time=2.0, end_time=1.0)],
    "is not after begin_time": [line_of(begin_time=1.0, end_time=1.0), line_of(end_time=0)],
    '"offset" and "nbytes" go together': [line_of(offset=0), line_of(nbytes=9), line_of(offset=0, nbytes=0)],
    '"offset" must be a whole number of bytes': [line_of(offset=x, nbytes=9) for x in (-1, 0.5, 2**70)],
}


@pytest.mark.parametrize("reason", DEFECTS)
def test_a_defect_is_an_error_that_names_file_and_line(tmp_path, reason):
    for line in DEFECTS[reason]:
        path = write_manifest(tmp_path, GOOD, "", line, GOOD)
        raises_at("m.jsonl:3", InputError, reason, data.read_manifest, path)


LINES = [GOOD, '{"audio": "é/名.wav", "duration": 3, "text": "x y"}']


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("{}\n{}\n", (1, 2)),
        ("\ufeff{}\r\n{}\r\n", (1, 2)),
        ("\n\r\n \t\n{}\n\n{}  ", (4, 6)),
    ],
)
def test_blank_lines_line_ends_and_a_byte_order_mark_change_no_clip(tmp_path, text, numbers):
    path = write_manifest(tmp_path, text.format(*LINES))
    clips = data.read_manifest(path)
    assert [clip.fields for clip in clips] == [json.loads(line) for line in LINES]
    assert [clip.audio for clip in clips] == [f"{tmp_path}/a.wav", f"{tmp_path}/é/名.wav"]
    assert [clip.where for clip in clips] == [f"{path}:{number}" for number in numbers]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", ": holds no clip"),
        (gzip.compress(GOOD.encode()), ":1: not JSON in UTF-8"),
        (GOOD.replace("a.wav", "é").encode("latin-1"), ":1: not JSON in UTF-8"),
    ],
)
def test_a_file_that_is_no_manifest(tmp_path, content, reason):
    (tmp_path / "m.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=f"m.jsonl{reason}"):
        data.read_manifest(str(tmp_path / "m.jsonl"))


def test_clips_of_several_manifests_are_one_sequence(tmp_path):
    """Equal names in two folders, and one file twice: every clip has its own place and its own folder."""
    paths = []
    for folder, languages in (("x", ["en", None]), ("y", ["en", None, "zh-CN"])):
        (tmp_path / folder).mkdir()
        lines = []
        for i, language in enumerate(languages):
            lines.append(line_of(duration=10.0 + i, text=f"{folder}{i}", language=language))
        paths.append(write_manifest(tmp_path / folder, *lines))
    paths.append(paths[0])
    clips = Clips(paths, 30.0, "text")
    assert list(clips) == sum(map(data.read_manifest, paths), [])
    assert clips.seconds.tolist() == [10, 11, 10, 11, 12, 10, 11]
    firsts = {"en": "x0", None: "x1", "zh": "y2"}
    assert {code: clip.text for code, clip in clips.languages.items()} == firsts


def test_clips_count_what_they_leave_out(tmp_path):
    """Long clips, and lines of a result file without a hypothesis because the clip could not be decoded."""
    lines = [
        line_of(duration=30.0, hyp="z"),
        line_of(duration=30.01, hyp="x"),
        line_of(error="e"),
        line_of(duration=99, error="e"),
        line_of(error="e", hyp="y"),
        line_of(error="e", hyp=None),
        line_of(hyp=""),
    ]
    path = write_manifest(tmp_path, *lines)
    clips = Clips([path], 30.0, "hyp")
    assert [clip.text for clip in clips] == ["z", "y", ""]
    assert clips.n_failed == 3
    assert clips.n_long == 1
    assert len(Clips([path], 30.0)) == 5  # where no text is wanted none can lack
    raises_at("m.jsonl:1", InputError, 'no "text"', Clips, [path], 30.0, "text")
    with pytest.raises(InputError, match="holds no clip of at most 1 s$"):
        Clips([path], 1.0)
    wanted = Clips([path], 30.0, "hyp", is_wanted=lambda clip: clip.text != "z")
    assert [clip.text for clip in wanted] == ["y", ""]
    assert wanted.n_unwanted == 1


# ---- features ----------------------------------------------------------------------------------------------

LENGTHS = "1 159 160 161 399 400 960 961 1279 1280 1281 2560 2561 4000 16000 77777 479999 480000"


@pytest.fixture(scope="module")
def extractor():
    return WhisperFeatureExtractor(feature_size=128)


@pytest.mark.parametrize("n", [int(n) for n in LENGTHS.split()])
def test_log_mel_and_token_count_equal_stock(extractor, n):
    generator = torch.Generator().manual_seed(n)
    waveform = 0.1 * torch.randn(n, generator=generator) * torch.linspace(0, 1, n).sin().abs()
    stock_input = torch.nn.functional.pad(waveform, (0, 1280 - n)) if n < 961 else waveform
    options = {"padding": "longest", "pad_to_multiple_of": 1280, "return_attention_mask": True}
    stock = extractor(stock_input.numpy(), sampling_rate=16_000, return_tensors="pt", **options)
    mel = data.log_mel(waveform)
    assert mel.shape == (128, 8 * math.ceil(n / 1280)) and mel.dtype == torch.float32
    torch.testing.assert_close(mel, stock["input_features"][0], atol=1e-4, rtol=0)
    n_frames = stock["attention_mask"].sum()
    assert data.n_audio_tokens(n) == GlmAsrProcessor._get_audio_token_length(None, n_frames)


def test_log_mel_of_silence():
    silent = (math.log10(1e-10) + 4) / 4
    assert torch.equal(data.log_mel(torch.zeros(1000)), torch.full((128, 8), silent))
    assert torch.equal(data.log_mel(torch.zeros(1000), padded_samples=8000), torch.full((128, 50), silent))


class FakeFrontEnd:
    """A model's front end: a mel frame a 160 samples, a prompt of [language, 5 for each audio token, 2]."""

    pad_id = 99
    frame_multiple = 16

    def features(self, waveform):
        return data.log_mel(waveform)

    def n_audio_tokens(self, n_samples):
        return n_samples // 1280

    def prompt(self, n_audio, language, context):
        return [{"zh": 7, "en": 8, None: 9}[language], *[5] * n_audio, 2]


def test_collate_pads_mels_with_zeros_and_prompts_on_the_left():
    noise = torch.from_numpy(steps(6400)[:, 0])
    waveforms = [torch.zeros(2560), noise, noise[:3200] / 9]
    batch = data.collate(waveforms, FakeFrontEnd(), ["zh", None, None], default_language="en")
    assert batch.mel.shape == (3, 128, 48) and batch.mel_lens.tolist() == [16, 40, 24]
    for b, waveform in enumerate(waveforms):  # as if it were alone
        n = batch.mel_lens[b]
        assert torch.equal(batch.mel[b, :, :n], data.log_mel(waveform))
        assert torch.equal(batch.mel[b, :, n:], torch.zeros(128, 48 - n))
    assert batch.audio_lens.tolist() == [2, 5, 2]
    prompts = [[99, 99, 99, 7, 5, 5, 2], [8, 5, 5, 5, 5, 5, 2], [99, 99, 99, 8, 5, 5, 2]]
    assert batch.prompt_ids.tolist() == prompts
    assert torch.equal(batch.prompt_mask, batch.prompt_ids != 99)
    assert batch.seconds.tolist() == pytest.approx([0.16, 0.4, 0.2])
    assert batch.silent.tolist() == [True, False, False]
    assert batch.languages == ["zh", None, None]


# ---- order of batches --------------------------------------------------------------------------------------


def durations_of(n, seed=0):
    return np.random.default_rng(seed).uniform(1, 10, n).astype(np.float32)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    order = data.BatchOrder(durations_of(60), 4, seed=0, pool_batches=5)
    forward = [order(step).tolist() for step in range(40)]
    np.random.seed(5)
    for step in reversed(range(40)):  # whatever was asked before
        assert data.BatchOrder(durations_of(60), 4, 0, pool_batches=5)(step).tolist() == forward[step]
        assert order(step).tolist() == forward[step]
    other = data.BatchOrder(durations_of(60), 4, seed=1, pool_batches=5)
    assert sum(other(step).tolist() == forward[step] for step in range(1, 40)) <= 1
    assert forward[1:15] != forward[16:30]  # each epoch has its own order


@pytest.mark.parametrize(
    "n, batch_size, pool_batches", [(60, 4, 5), (60, 3, 1), (60, 1, 60), (300, 24, 50), (1200, 40, 50)]
)
def test_an_epoch_holds_every_clip_once_and_begins_with_the_longest(n, batch_size, pool_batches):
    durations = durations_of(n)
    order = data.BatchOrder(durations, batch_size, 7, pool_batches)
    counts = np.zeros(n, dtype=int)
    size = order.pool_batches * batch_size
    for step in range(3 * math.lcm(n, size) // batch_size):
        batch = order(step)
        assert batch.shape == (batch_size,)
        np.add.at(counts, batch, 1)
        if (step + 1) * batch_size % math.lcm(n, size) == 0:
            assert counts.min() == counts.max()
        elif (step + 1) * batch_size % size == 0:  # inside a pool the stream is sorted
            assert counts.max() - counts.min() <= 1
    assert sorted(durations[order(0)]) == sorted(durations)[-batch_size:]


def test_batches_are_slices_of_similar_length_in_random_order():
    durations = durations_of(1000)
    order = data.BatchOrder(durations, 10, 0)
    batches = [durations[order(step)] for step in range(50)]
    assert [batch.min() for batch in batches] != sorted(batch.min() for batch in batches)
    batches.sort(key=min)
    assert all(a.max() <= b.min() for a, b in zip(batches, batches[1:]))
    twice = [len(set(order(step).tolist())) < 10 for step in range(500)]
    assert sum(twice) <= 5  # at most where two epochs meet


def test_a_set_smaller_than_a_batch():
    order = data.BatchOrder(durations_of(5), 10, 0)
    for step in range(3):
        assert np.bincount(order(step)).tolist() == [2, 2, 2, 2, 2]


def test_micro_batches():
    durations = np.array([2.0, 5.0, 2.0, 40.0, 4.0])
    assert data.cut_micro_batches([], durations, 10) == []
    assert data.cut_micro_batches([0, 1, 2, 3, 4], durations, 10) == [[3], [1, 4], [0, 2]]
    assert data.cut_micro_batches([2, 0], durations, 4.0) == [[0, 2]]  # equal lengths: by number
    assert data.cut_micro_batches([2, 0], durations, 3.9) == [[0], [2]]


def dataset_of(folder, make, seconds, bad=()):
    """A StepDataset over clips of noise, of which some are missing."""
    lines = []
    for i, length_s in enumerate(seconds):
        if i not in bad:
            soundfile.write(folder / f"{i}.wav", steps(round(length_s * 16_000)), 16_000)
        lines.append(line_of(audio=f"{i}.wav", duration=length_s, text=str(i)))
    args = argparse.Namespace(batch_size=8, seed=3, micro_seconds=1.0, on_bad_audio="skip")
    return data.StepDataset(Clips([write_manifest(folder, *lines)], 30.0, "text"), args, make)


def numbers_and_samples(step, indices, clips, waveforms):
    assert [clip.text for clip in clips] == [str(i) for i in indices]
    return step, indices, [len(waveform) for waveform in waveforms]


SECONDS = [0.1 + 0.01 * i for i in range(20)]


def test_steps_depend_neither_on_ranks_nor_workers_nor_the_start(tmp_path, monkeypatch):
    dataset = dataset_of(tmp_path, numbers_and_samples, SECONDS)
    straight = list(data.step_batches(dataset, 0, 5, workers=0))
    assert list(data.step_batches(dataset, 0, 5, workers=2)) == straight
    assert list(data.step_batches(dataset, 3, 5, workers=0)) == straight[3:]
    for step, micros, bad in straight:
        batch = data.BatchOrder(np.float32(SECONDS), 8, 3)(step).tolist()
        assert sorted(sum((indices for _, indices, _ in micros), [])) == sorted(batch) and bad == []
        shares = []
        for rank in range(4):
            monkeypatch.setattr(data, "rank_and_world", lambda rank=rank: (rank, 4))
            micros, _ = dataset_of(tmp_path, numbers_and_samples, SECONDS)[step]
            shares.append(sum((indices for _, indices, _ in micros), []))
        assert [sorted(share) for share in shares] == [sorted(batch[rank::4]) for rank in range(4)]


def test_a_bad_clip_that_a_data_worker_meets_is_one_line(tmp_path):
    """The worker hands it over as a value: raised there it would be a traceback."""
    dataset = dataset_of(tmp_path, numbers_and_samples, SECONDS[:8], bad=(7,))
    dataset.args.on_bad_audio = "error"
    raises_at("m.jsonl:8", AudioError, "No such file", list, data.step_batches(dataset, 0, 1, 1))


# ---- output folders ----------------------------------------------------------------------------------------


def run_args(out, **changed):
    values = {"out": str(out), "resume": False, "lr": 0.1, "train": ["a.jsonl"], "workers": 2, "steps": 20}
    return argparse.Namespace(**{**values, **changed})


def test_a_new_run_wants_a_new_or_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes.txt").write_text("x")
    for name in ("new/er", "empty"):
        for resume in (False, True):  # nothing to resume: it begins
            step, checkpoint, _ = data.open_run(run_args(tmp_path / name, resume=resume), "opd.py", {})
            assert (step, checkpoint) == (0, None)
    for resume, message in ((False, "used is not empty: choose another"), (True, "holds no run of opd.py")):
        with pytest.raises(InputError, match=message):
            data.open_run(run_args(tmp_path / "used", resume=resume), "opd.py", {})
    assert not (tmp_path / "new").exists()


def test_a_run_is_resumed_with_the_same_arguments_from_its_newest_checkpoint(tmp_path):
    out = tmp_path / "out"
    inputs = {"train": [write_manifest(tmp_path, "abc", name="train.jsonl")]}
    _, _, config = data.open_run(run_args(out), "opd.py", inputs)
    data.begin_run(run_args(out), config, 0)
    for name in ("step-5", "step-10", "step-15.partial"):
        (out / name / "model").mkdir(parents=True)
        for file in ("state.safetensors", "model/model.safetensors"):
            safetensors.torch.save_file({"x": torch.zeros(1)}, out / name / file)
    moved = {"train": [write_manifest(tmp_path, "abc", name="moved.jsonl")]}
    resumed = run_args(out, resume=True, train=moved["train"], workers=0)  # content counts, not where it lies
    assert data.open_run(resumed, "opd.py", moved)[:2] == (10, str(out / "step-10"))
    other = {"train": [write_manifest(tmp_path, "abd", name="other.jsonl")]}
    refusals = {
        "--lr was 0.1, now 0.2; keep it": (run_args(out, resume=True, lr=0.2), "opd.py", inputs),
        "--train was .*: the run began with other content": (run_args(out, resume=True), "opd.py", other),
        "holds no run of sft.py": (run_args(out, resume=True), "sft.py", inputs),
    }
    for message, (args, script, files) in refusals.items():
        with pytest.raises(InputError, match=message):
            data.open_run(args, script, files)


def test_fingerprints_tell_contents_apart(tmp_path):
    """Of weights, each 64 kB are looked at: a trained part shows wherever it lies."""
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert data.fingerprint(write_manifest(tmp_path, "abc")) == abc
    (tmp_path / "config.json").write_text("abc")
    digests = {data.fingerprint(str(tmp_path))}
    weights = np.zeros(2**21, dtype=np.uint8)
    for first in (0, 2**20 + 5, 2**21 - 2**16):
        weights[first : first + 2**16] += 1
        weights.tofile(tmp_path / "model.safetensors")
        digests.add(data.fingerprint(str(tmp_path)))
    assert len(digests) == 4


# ---- flags and errors --------------------------------------------------------------------------------------


def parser_of_two_flags():
    parser = data.argument_parser("x.py", "100 % of it")
    parser.add_argument("--steps", type=data.at_least(1, int), default=5, help="optimizer steps")
    parser.add_argument("--rate", type=data.at_least(0), default=0.5, help="per second")
    return parser


def test_flags_from_the_command_line_and_a_file(tmp_path):
    parser = parser_of_two_flags()
    (tmp_path / "a.args").write_text("--steps 7  # seven\n\n--rate\n1e-3\n")
    assert vars(parser.parse_args([])) == {"steps": 5, "rate": 0.5}
    assert vars(parser.parse_args([f"@{tmp_path}/a.args", "--rate", "0"])) == {"steps": 7, "rate": 0.0}


@pytest.mark.parametrize(
    "argv, reason",
    [
        ("--steps 0", "argument --steps: must be at least 1, found 0"),
        ("--steps 1.5", "argument --steps: invalid number value: '1.5'"),
        ("--rate -1", "argument --rate: must be at least 0, found -1"),
        ("--rate nan", "must be at least 0, found nan"),
        ("--step 3", "unrecognized arguments: --step 3"),
    ],
)
def test_a_flag_that_is_wrong(argv, reason, capsys):
    with pytest.raises(SystemExit) as caught:
        parser_of_two_flags().parse_args(argv.split())
    assert caught.value.code == 2 and reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, rank, status, printed",
    [
        (None, 0, None, ""),
        (InputError("m.jsonl:1: bad"), 0, 2, "x.py: error: m.jsonl:1: bad\n"),
        (InputError("m.jsonl:1: bad"), 1, 2, ""),
        (AudioError("m.jsonl:1: bad"), 1, 2, "x.py: error: m.jsonl:1: bad\n"),
        (OSError(20, "no folder", "a/b"), 1, 2, f"x.py: error: [Errno 20] no folder: 'a/b'{REMEDY}"),
        (OSError(28, "full", "a/b"), 1, 2, "x.py: error: [Errno 28] full: 'a/b'; make room on that disk\n"),
    ],
)
def test_a_mistake_of_the_user_is_one_line_and_a_status(error, rank, status, printed, monkeypatch, capsys):
    def main(args):
        if error is not None:
            raise error

    monkeypatch.setattr(sys, "argv", ["/y/x.py"])
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    try:
        data.run_script(main, None)
    except SystemExit as caught:
        assert caught.code == status
    else:
        assert status is None
    assert capsys.readouterr().err == printed
    for other in (ZeroDivisionError(), OSError("a library's own")):  # a traceback
        error = other
        with pytest.raises(type(other)):
            data.run_script(main, None)
