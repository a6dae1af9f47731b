"""prepare.check --models: figures of two models on a few clips, before a day of training."""

import re

import pytest
from conftest import byte_tokenizer, tiny_model
from runs import run_on_cpu

import data
from prepare import check

on_cpu = pytest.fixture(autouse=True, scope="module")(run_on_cpu)


def look(*argv):
    check.main(check.parse_args([str(arg) for arg in argv]))


def figures_of(text):
    """{name: the first number behind it} of the printed lines."""
    return {name: float(value) for name, value in re.findall(r"(\w+) (-?\d[\d.e+-]*)", text)}


def test_a_model_is_its_own_teacher_and_differs_from_another(stage, capsys):
    """Where both are one model, KL is 0 and VUSS is k; clips are shown from the shortest to the longest."""
    look(stage / "m.jsonl", "--models", stage / "teacher", stage / "teacher", "--clips", 5)
    text = capsys.readouterr().out
    assert "vocabulary: 257 of the student's 257" in text
    figures = figures_of(text)
    assert figures["KL"] == 0
    assert figures["VUSS"] == 32
    assert figures["agreement"] == 1
    shown = re.findall(
        r"m\.jsonl:\d+, ([\d.]+) s\n  student   (.*)\n  teacher   (.*)\n  manifest  clip", text
    )
    assert [seconds for seconds, _, _ in shown] == ["0.30", "0.54", "0.78", "0.94", "1.18"]
    assert all(ours == theirs for _, ours, theirs in shown)

    look(stage / "m.jsonl", "--models", stage / "student", stage / "teacher", "--clips", 3)
    figures = figures_of(capsys.readouterr().out)
    assert figures["KL"] > 0
    assert 32 < figures["VUSS"] <= 64


def test_models_of_two_tokenizers_are_an_error(stage, tmp_path):
    other = byte_tokenizer()
    other.add_tokens([f"word{n}" for n in range(50)])
    tiny_model(tokenizer=other).save_pretrained(tmp_path / "other")
    with pytest.raises(data.InputError, match="one tokenizer"):
        look(stage / "m.jsonl", "--models", tmp_path / "other", stage / "teacher")
