"""Context: words that a prompt gives beforehand, to both models, to the teacher alone, or to none."""

import pytest
import runs
import transformers
from conftest import QWEN3_ASR_TOKENS, noise, qwen3_asr_folder, qwen3_tokenizer, tiny_model

import eval as evaluation
import model as m
import opd
import sft

on_cpu = pytest.fixture(autouse=True, scope="module")(runs.run_on_cpu)

CONTEXTS = ["Zürich, Müller, ASR", "  two blanks before", "\na new line", "今天 北京", "x"]


@pytest.mark.parametrize("kind", ["glmasr", "qwen3_asr", pytest.param("real", marks=pytest.mark.slow)])
def test_prompt_ids_are_those_of_stock_processors(tmp_path, kind):
    """Behind the text of our student's prompt; in Qwen3-ASR the system turn."""
    text = ""
    if kind == "glmasr":
        text = "Please transcribe this audio. Context: "
        tiny_model().save_pretrained(tmp_path)
    else:
        tokenizer = qwen3_tokenizer(QWEN3_ASR_TOKENS) if kind == "real" else None
        qwen3_asr_folder(tmp_path, tokenizer, hidden=16)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    front_end = m.SpeechLM.from_pretrained(tmp_path).front_end
    flags = {} if kind == "glmasr" else {"language": "German"}
    for context in CONTEXTS:
        inputs = processor.apply_transcription_request(noise(1.28).numpy(), prompt=text + context, **flags)
        ids = inputs["input_ids"][0].tolist()
        assert front_end.prompt(ids.count(front_end.audio_id), "de", context) == ids, context
    for context in ("", " \n"):  # none
        assert front_end.prompt(7, "de", context) == front_end.prompt(7, "de")


def test_control_tokens_in_a_context_stay_text():
    front_end = tiny_model().front_end
    context = "<|im_end|> <|audio|><|user|>"
    ids = front_end.prompt(3, None, context)
    assert [i for i in ids if i >= 256] == [i for i in front_end.prompt(3) if i >= 256]
    assert context in front_end.tokenizer.decode(ids)


# ---- whole runs --------------------------------------------------------------------------------------------


@pytest.fixture
def manifest(stage, tmp_path):
    """m.jsonl of the stage, with a context in every line but the first."""
    lines = runs.lines_of(stage / "m.jsonl")
    for n, line in enumerate(lines[1:]):
        line["context"] = f"clip {n}, clap"
    return runs.write_lines(tmp_path / "m.jsonl", lines)


@pytest.mark.slow
def test_whose_prompt_gives_the_context(stage, manifest, finished, tmp_path):
    """none: the run without the key. teacher: the student's first rollout is still that of this run."""
    folders = {"without": finished(opd)}
    for whose in ("none", "teacher", "both"):
        folders[whose] = tmp_path / whose
        runs.train(opd, stage, folders[whose], "--train", manifest, "--context", whose)
    weights = {name: runs.weight_bytes(folder / "model") for name, folder in folders.items()}
    assert weights["none"] == weights["without"] and len(set(weights.values())) == 3
    rollouts = {}
    for name, folder in folders.items():
        rollouts[name] = [line["transcript"] for line in runs.lines_of(folder / "samples.jsonl")]
    assert rollouts["teacher"] == rollouts["without"] != rollouts["both"]


@pytest.mark.slow
def test_sft_and_eval_with_and_without(stage, manifest, finished, tmp_path):
    for name, more in (("context", []), ("none", ["--no-context"])):
        runs.train(sft, stage, tmp_path / name, "--train", manifest, *more)
    without = runs.weight_bytes(finished(sft) / "model")
    assert runs.weight_bytes(tmp_path / "none/model") == without
    assert runs.weight_bytes(tmp_path / "context/model") != without

    hyps = []
    for path, more in ((stage / "m.jsonl", []), (manifest, ["--no-context"]), (manifest, [])):
        out = tmp_path / f"eval{len(hyps)}"
        flags = ["--model", stage / "teacher", "--data", path, "--out", out, *more]
        assert runs.status_of(evaluation, flags) == 0
        lines = runs.lines_of(out / "m.jsonl")
        hyps.append([line["hyp"] for line in lines])
    assert hyps[0] == hyps[1] != hyps[2]
    assert lines[1]["context"] == "clip 0, clap"  # a result file is a manifest with the same contexts
