"""prepare.huggingface: local folders as a hub has them, to exact lines and the bytes of their audio files."""
# ruff: noqa: F811 (the fixture `run` of test_prepare.py is an argument here)

import importlib
import json
import os
import tarfile

import pytest

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # read when the package is imported
datasets = pytest.importorskip("datasets")

import pyarrow.parquet  # noqa: E402
from test_prepare import content_of, refused, run, sound, write  # noqa: E402, F401

import data  # noqa: E402


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def contents(path):
    """{id: bytes} of the clips of a manifest."""
    return {clip.fields["id"]: content_of(clip) for clip in data.read_manifest(str(path))}


def parquet(path, types=None, **columns):
    """A parquet file as the hub has them: types, such as Audio, are in its header. Returns its folder.

    Columns are stored as they are. `Dataset.cast_column` would encode audio by a package that nothing here
    needs.
    """
    table = datasets.Dataset.from_dict(columns)
    features = table.features.copy()
    features.update(types or {})
    rows = table.with_format("arrow")[:]
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(rows.cast(features.arrow_schema), path)
    return path.parent


def stored(path, name=None):
    """A value of an audio column: the bytes of a file, with its name."""
    return {"bytes": path.read_bytes(), "path": name}


AUDIO = {"audio": datasets.Audio()}


@pytest.fixture
def sounds(tmp_path):
    """Three files of 0.25, 0.5 and 0.75 s."""
    folder = tmp_path / "sounds"
    return [
        sound(folder / "a.flac", 0.25, seed=1),
        sound(folder / "b.ogg", 0.5, seed=2),
        sound(folder / "c.wav", 0.75, seed=3, rate=8_000, channels=2),
    ]


# ---- layouts -----------------------------------------------------------------------------------------------


def test_parquet(run, sounds, tmp_path):
    """Bytes are those of the files; classes are written by name; a null and a class −1 are no value."""
    folder = parquet(
        tmp_path / "set/data/test-00000-of-00001.parquet",
        {**AUDIO, "language": datasets.ClassLabel(names=["de", "zh"])},
        audio=[stored(sounds[0], "a.flac"), stored(sounds[1], "b.ogg"), stored(sounds[2])],
        Sentence=["Guten Tag!", "今天 下雨", ""],
        language=[0, 1, -1],
        speaker_id=[7, 7, None],
        id=["x", "y", None],
    )
    lines, left_out = run("huggingface", folder.parent)
    assert left_out == []
    place = [{key: line.pop(key) for key in ("audio", "offset", "nbytes")} for line in lines]
    assert [line["audio"] for line in place] == ["m-00000.tar"] * 3
    assert lines == [
        dict(id="x", text="Guten Tag!", language="de", speaker="7", duration=0.25),
        dict(id="y", text="今天 下雨", language="zh", speaker="7", duration=0.5),
        dict(id="test-2", text="", duration=0.75),
    ]
    expected = {"x": sounds[0], "y": sounds[1], "test-2": sounds[2]}
    assert contents(tmp_path / "m.jsonl") == {name: path.read_bytes() for name, path in expected.items()}


def test_audio_folder(run, sounds, tmp_path):
    """A line without text, and one without its file, are left out."""
    table = (
        "file_name,transcription,locale\na.flac,hello,en\nsub/b.ogg,bonjour,fr\nc.wav,,en\ngone.wav,x,en\n"
    )
    folder = tmp_path / "set"
    write(folder / "metadata.csv", table)
    (folder / "sub").mkdir()
    for path, name in zip(sounds, ["a.flac", "sub/b.ogg", "c.wav"], strict=True):
        (folder / name).write_bytes(path.read_bytes())
    lines, left_out = run("huggingface", folder, "--pack", tmp_path / "x.tar")
    values = [(line["id"], line["text"], line["language"]) for line in lines]
    assert values == [("train-0", "hello", "en"), ("train-1", "bonjour", "fr")]
    expected = {"train-0": sounds[0].read_bytes(), "train-1": sounds[1].read_bytes()}
    assert contents(tmp_path / "m.jsonl") == expected and (tmp_path / "x-00000.tar").exists()
    no_file = (1, "no audio file that can be read", f"train-3 {folder}/gone.wav")
    assert left_out == [(1, "no transcript", "train-2"), no_file]


def test_numbers_of_a_csv_are_not_taken_for_texts(sounds, tmp_path):
    """The package has guessed that 007 is 7."""
    folder = tmp_path / "set"
    write(folder / "metadata.csv", "file_name,text\na.flac,007\n")
    (folder / "a.flac").write_bytes(sounds[0].read_bytes())
    assert "not of strings; give --text-column text" in refused(tmp_path / "m.jsonl", "huggingface", folder)


def test_tars_of_webdataset(run, sounds, tmp_path):
    (tmp_path / "set").mkdir()
    write(tmp_path / "one.txt", "hello\n")
    with tarfile.open(tmp_path / "set/train-000.tar", "w") as tar:
        for name in ("one", "two"):
            tar.add(sounds[0], f"{name}.flac")
            tar.add(tmp_path / "one.txt", f"{name}.txt")
    lines, left_out = run("huggingface", tmp_path / "set")
    assert [(line["id"], line["text"]) for line in lines] == [("one", "hello"), ("two", "hello")]
    assert contents(tmp_path / "m.jsonl") == dict.fromkeys(("one", "two"), sounds[0].read_bytes())


def test_a_folder_of_save_to_disk(run, sounds, tmp_path):
    """One split, or several with their names."""
    folder = parquet(tmp_path / "set/train.parquet", AUDIO, audio=[stored(sounds[0])], text=["hi"])
    [path] = folder.glob("*.parquet")
    rows = datasets.Dataset.from_parquet(str(path), split="train")
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"dev": rows, "test": rows}).save_to_disk(tmp_path / "two")
    choices = {"one": ([], ["train-0"]), "two": (["--split", "test"], ["test-0"])}
    for name, (flags, ids) in choices.items():
        run("huggingface", tmp_path / name, *flags, out=f"{name}.jsonl")
        assert contents(tmp_path / f"{name}.jsonl") == {ids[0]: sounds[0].read_bytes()}


def test_what_is_no_audio_is_left_out_and_named(run, sounds, tmp_path):
    cut = sounds[2].read_bytes()[:-1000]
    no_path = str(tmp_path / "gone.wav")
    values = [stored(sounds[0]), {"bytes": b"no audio", "path": "n.wav"}, {"bytes": cut, "path": "c.wav"}]
    values += [None, {"bytes": None, "path": no_path}]
    texts = ["a", "b", "c", "d", "e"]
    folder = parquet(tmp_path / "set/train.parquet", AUDIO, audio=values, text=texts)
    lines, left_out = run("huggingface", folder)
    assert [line["text"] for line in lines] == ["a"]
    reasons = {reason: (n, first) for n, reason, first in left_out}
    n, first = reasons.pop("cannot be used")
    assert n == 2 and first.startswith("train-1: cannot be decoded")
    assert reasons == {
        "no audio": (1, "train-3"),
        "no audio file that can be read": (1, f"train-4 {no_path}"),
    }


# ---- choices -----------------------------------------------------------------------------------------------


def test_splits_and_configurations(run, sounds, tmp_path):
    root = tmp_path / "set"
    for i, name in enumerate(["de/train", "de/test", "fr/test"]):
        parquet(root / f"{name}.parquet", AUDIO, audio=[stored(sounds[i])], text=[name])
    configs = "- config_name: de\n  data_dir: de\n- config_name: fr\n  data_dir: fr\n"
    write(root / "README.md", f"---\nconfigs:\n{configs}---\n")
    texts = {}
    choices = {"all": [], "both": ["--split", "test", "train", "test"]}
    for name, flags in choices.items():
        lines, _ = run("huggingface", root, "--config", "de", *flags, out=f"{name}.jsonl")
        texts[name] = [line["text"] for line in lines]
    assert texts == {"all": ["de/train", "de/test"], "both": ["de/test", "de/train"]}

    out = tmp_path / "no/m.jsonl"
    message = refused(out, "huggingface", root, "--config", "de", "--split", "dev")
    assert message == f"--split dev: {root} has train, test"
    assert "'de', 'fr'" in refused(out, "huggingface", root)


def test_language_is_that_of_the_flag_or_column_and_never_guessed(run, sounds, tmp_path):
    audio = [stored(path) for path in sounds]
    columns = dict(audio=audio, text=["你好", "b", "c"])
    plain = parquet(tmp_path / "plain/train.parquet", AUDIO, **columns)
    named = parquet(tmp_path / "named/train.parquet", AUDIO, **columns, LANG=["Chinese", "xx", ""])
    lines, _ = run("huggingface", plain)
    assert not any("language" in line for line in lines)
    lines, [(n, reason, first)] = run("huggingface", named, out="named.jsonl")
    assert [line.get("language") for line in lines] == ["Chinese", None]
    assert (n, reason) == (1, "cannot be used") and first.startswith("train-1: language 'xx' is not known")
    lines, _ = run("huggingface", named, "--language", "Mandarin", out="flag.jsonl")
    assert [line["language"] for line in lines] == ["zh"] * 3


def test_columns_that_are_ambiguous_or_missing_are_asked_for(run, sounds, tmp_path):
    out = tmp_path / "no/m.jsonl"
    columns = dict(audio=[stored(sounds[0])], noisy=[stored(sounds[1])], digit=[3], lists=[["x"]])
    types = {**AUDIO, "noisy": datasets.Audio()}
    root = parquet(tmp_path / "two/train.parquet", types, **columns, text=["Hi."], raw_text=["hi"])
    message = refused(out, "huggingface", root)
    assert "audio may be audio or noisy; choose by --audio-column" in message
    noisy = [root, "--audio-column", "noisy"]
    message = refused(out, "huggingface", *noisy)
    assert "text may be text or raw_text; choose by --text-column" in message
    message = refused(out, "huggingface", *noisy, "--text-column", "words")
    assert "no such column" in message
    message = refused(out, "huggingface", *noisy, "--text-column", "lists")
    assert "has no text there" in message

    expected = {"raw_text": "hi", "digit": "3"}
    for column, text in expected.items():
        lines, _ = run("huggingface", *noisy, "--text-column", column, out=f"{column}.jsonl")
        assert [line["text"] for line in lines] == [text]
        assert contents(tmp_path / f"{column}.jsonl") == {"train-0": sounds[1].read_bytes()}
    lines, left_out = run("huggingface", *noisy, "--no-text", out="untexted.jsonl")
    assert len(lines) == 1 and "text" not in lines[0] and left_out == []


# ---- errors ------------------------------------------------------------------------------------------------


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    out = tmp_path / "no/m.jsonl"
    assert "any data file" in refused(out, "huggingface", tmp_path / "missing")
    assert "a-name/of-nothing" in refused(out, "huggingface", "a-name/of-nothing")


SECOND_SHARDS = {
    "pointer of git lfs": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "is cut off": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "has the columns ['audio', 'words']": lambda path: parquet(path, AUDIO, audio=[None], words=["b"]),
}


@pytest.mark.parametrize("defect", SECOND_SHARDS)
def test_a_faulty_shard_behind_the_first_is_named(sounds, tmp_path, defect):
    for n in (0, 1):
        parquet(tmp_path / f"set/train-{n}.parquet", AUDIO, audio=[stored(sounds[n])], text=["a"])
    SECOND_SHARDS[defect](tmp_path / "set/train-1.parquet")
    message = refused(tmp_path / "out/m.jsonl", "huggingface", tmp_path / "set", "--text-column", "text")
    assert "train-1.parquet" in message and defect in message


def test_relative_paths_start_at_the_file_that_names_them(run, sounds, tmp_path, monkeypatch):
    write(tmp_path / "set/train.jsonl", json.dumps({"audio": "../sounds/a.flac", "text": "a"}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    flags = ["--audio-column", "audio", "--text-column", "text"]
    lines, left_out = run("huggingface", tmp_path / "set", *flags)
    assert [line["text"] for line in lines] == ["a"] and left_out == []


def test_rows_are_read_as_a_stream(sounds, tmp_path):
    """The first clip is there before the second file is, and nothing is put into the cache."""
    folder = tmp_path / "set"
    rows = [{"file_name": name, "text": name} for name in ("a.flac", "c.wav")]
    write(folder / "metadata.jsonl", "\n".join(json.dumps(row) for row in rows))
    (folder / "a.flac").write_bytes(sounds[0].read_bytes())
    script = importlib.import_module("prepare.huggingface")
    clips = script.clips(script.parse_args([str(folder), "--out", str(tmp_path / "m.jsonl")]))
    assert next(clips)["text"] == "a.flac"
    (folder / "c.wav").write_bytes(sounds[2].read_bytes())
    assert next(clips)["content"] == sounds[2].read_bytes()
    assert not list(datasets.config.HF_DATASETS_CACHE.rglob("*.arrow"))
