"""What would pass in silence: tags taken for words, signs typed in several ways, damaged checkpoints."""

import builtins
import errno
import json
import os
import signal
import tarfile
import unicodedata

import pytest
import soundfile
import torch
from runs import argv_of, lines_of, run_on_cpu, train

import data
import eval
import sft
from prepare import check
from prepare import folder as folder_script

on_cpu = pytest.fixture(autouse=True, scope="module")(run_on_cpu)


# ---- texts -------------------------------------------------------------------------------------------------

PREFIXED = [  # text, language of the line → text and language as they are read
    ("language English<asr_text>call david", None, "call david", "en"),
    ("language Chinese<asr_text>打开", "zh", "打开", "zh"),
    ("language None<asr_text>", None, "", None),
    ("language models are good", None, "language models are good", None),
]


def line_of(text, language=None, **fields):
    return {"audio": "a.wav", "duration": 1.0, "text": text, "language": language, **fields}


@pytest.mark.parametrize("text, language, read_text, read_language", PREFIXED)
def test_the_prefix_of_qwen3_asrs_training_data_is_no_text(text, language, read_text, read_language):
    raw = json.dumps(line_of(text, language, hyp=text)).encode()
    clip = data.parse_line(raw, "m.jsonl:1", "")
    assert (clip.text, clip.language) == (read_text, read_language)
    assert clip.fields["text"] == clip.fields["hyp"] == read_text
    assert clip.had_prefix == (text != read_text)


def test_markup_is_not_learned(tmp_path):
    path = tmp_path / "m.jsonl"
    data.add_lines(path, [line_of("a <b c"), line_of("<|zh|><|NEUTRAL|>打开")])
    with pytest.raises(data.InputError, match=r'm.jsonl:2: "text" holds <\|zh\|>, which would be learned'):
        data.Clips([str(path)], 30.0, "text")
    assert len(data.Clips([str(path)], 30.0)) == 2  # where no text is learned


def test_prefixes_are_counted_and_the_check_lists_markup(tmp_path, capsys):
    texts = ["language English<asr_text>call david", "call <COMMA> david", "[laughter] well [laughter] (hm)"]
    lines = []
    for i, text in enumerate(texts):
        soundfile.write(tmp_path / f"{i}.wav", torch.rand(16_000).numpy(), 16_000)
        lines.append({**line_of(text, "en"), "audio": f"{i}.wav"})
    data.add_lines(tmp_path / "m.jsonl", lines)
    n_defects = check.check(str(tmp_path / "m.jsonl"), 30.0)
    data.read_manifest(str(tmp_path / "m.jsonl"))
    said = capsys.readouterr().out
    assert n_defects == 1 and "m.jsonl:2: text holds <COMMA>, which no training takes" in said
    assert said.count('1 texts began with "language …<asr_text>", which was taken off') == 2
    assert "looks like markup, and is learned as words: [laughter] 2, (hm) 1" in said


SAME = [  # language, two ways to write the same units
    ("zh", "<|zh|><|NEUTRAL|><|Speech|><|woitn|>打开", "打开"),
    ("en", "call <COMMA> david <PERIOD>", "call david"),
    ("fr", "appelle <COMMA> david", "appelle david"),
    ("fr", "l´eau d´aujourd´hui", "l'eau d’aujourd`hui"),
    ("uk", "п'ять", "пʼять"),
    ("en", "don＇t", "don't"),
    ("de", "¨ja¸ ¯nein˜", "ja nein"),
    ("fr", unicodedata.normalize("NFD", "élève noël"), "élève noël"),
    ("ar", "اللـــه", "الله"),
    ("ro", "ştiinţă", "știință"),
]


@pytest.mark.parametrize("language, one, other", SAME)
@pytest.mark.parametrize("style", ["default", "paper"])
def test_the_same_units_in_every_style(language, one, other, style):
    units = eval.normalize(other, language, style)
    assert units and eval.normalize(one, language, style) == units


# ---- runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["state.safetensors", "model/model.safetensors"])
def test_a_damaged_checkpoint_is_left_aside_and_the_one_before_goes_on(stage, tmp_path, capsys, name):
    """Bit for bit as if the newer one had not been."""
    flags = ["--steps", 4, "--save-every", 1]
    for out in ("straight", "damaged"):
        train(sft, stage, tmp_path / out, *flags)
    out = tmp_path / "damaged"
    os.remove(out / "summary.json")
    os.truncate(out / "step-4" / name, 1000)
    lines = train(sft, stage, out, *flags, "--resume")
    said = capsys.readouterr().out
    assert f"{out}/step-4 cannot be read, and is left aside as {out}/step-4.damaged" in said
    assert f"{out}: goes on from step 3" in said
    for folder in ("step-4/model", "model"):
        own = (out / folder / "model.safetensors").read_bytes()
        assert own == (tmp_path / "straight" / folder / "model.safetensors").read_bytes()
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


class Deadly(torch.utils.data.Dataset):
    def __getitem__(self, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return [], []


def test_a_data_worker_that_is_killed_is_one_line():
    steps = data.step_batches(Deadly(), 0, 3, workers=1)
    with pytest.raises(data.AudioError, match="a data worker was killed; .* --workers; go on by --resume"):
        list(steps)


def test_a_full_disk_leaves_nothing_half_written(stage, tmp_path, monkeypatch):
    import model

    def full(*args, **kwargs):
        raise model.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(model, "save_file", full)
    with pytest.raises(OSError, match="No space left") as error:
        sft.main(sft.parse_args(argv_of(sft, stage, tmp_path / "run", "--steps", 1)))
    assert str(tmp_path / "run" / "step-1") in str(error.value)
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith("step-")]


# ---- importers ---------------------------------------------------------------------------------------------


def denied(plain, suffix):
    """A function of a path that may not look at those with this end. (Nothing is denied to root.)"""

    def looked(path, *args, **kwargs):
        if str(path).endswith(suffix):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return plain(path, *args, **kwargs)

    return looked


def test_what_prepare_folder_cannot_read_is_counted_and_listed(tmp_path, capsys, monkeypatch):
    root = tmp_path / "root"
    (root / "lost+found").mkdir(parents=True)
    for name in "ab":
        soundfile.write(root / f"{name}.wav", torch.rand(16_000).numpy(), 16_000)
        (root / f"{name}.txt").write_text(name)
    (root / "c.wav").write_bytes(b"no sound")
    monkeypatch.setattr(os, "listdir", denied(os.listdir, "lost+found"))
    monkeypatch.setattr(builtins, "open", denied(open, "b.txt"))
    folder_script.main(folder_script.parse_args([str(root), "--out", str(tmp_path / "m.jsonl")]))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{tmp_path}/m.jsonl: 1 clips") and "m.left-out.jsonl" in said[-1]
    left_out = lines_of(tmp_path / "m.left-out.jsonl")
    assert [line["reason"] for line in left_out] == [
        "its .txt cannot be read",
        "cannot be used",
        "a folder that cannot be read (Permission denied)",
    ]
    assert str(root / "c.wav") in left_out[1]["which"]


def test_a_full_disk_leaves_no_shard_behind(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", torch.rand(16_000).numpy(), 16_000)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    monkeypatch.setattr(tarfile.TarFile, "close", full)
    flags = [str(tmp_path), "--out", str(tmp_path / "m.jsonl"), "--pack", str(tmp_path / "m.tar")]
    with pytest.raises(OSError, match="No space left on device: .*m.jsonl"):
        folder_script.main(folder_script.parse_args(flags))
    assert os.listdir(tmp_path) == ["a.wav"]
