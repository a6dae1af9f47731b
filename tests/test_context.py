"""Context: words that a prompt gives beforehand, to both models, to the teacher alone, or to none."""

import pytest
import transformers
from conftest import QWEN3_ASR_TOKENS, noise, qwen3_asr_folder, qwen3_tokenizer, tiny_model
from runs import argv_of, lines_of, run_on_cpu, write_lines, write_stage

import eval as evaluation
import model as m
import opd
import sft

on_cpu = pytest.fixture(autouse=True, scope="module")(run_on_cpu)

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


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """The tiny stage; context.jsonl is m.jsonl with a context in every line but the first."""
    folder = write_stage(tmp_path_factory.mktemp("stage"))
    lines = lines_of(folder / "m.jsonl")
    for n, line in enumerate(lines[1:]):
        line["context"] = f"clip {n}, clap"
    write_lines(folder / "context.jsonl", lines)
    return folder


def train(script, stage, out, manifest, *more):
    """→ bytes of the weights"""
    script.main(script.parse_args(argv_of(script, stage, out, "--train", stage / manifest, *more)))
    return (out / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_whose_prompt_gives_the_context(stage, tmp_path):
    """none: the run without the key. teacher: the student's first rollout is still that of this run."""
    weights = {"without": train(opd, stage, tmp_path / "without", "m.jsonl")}
    for whose in ("none", "teacher", "both"):
        weights[whose] = train(opd, stage, tmp_path / whose, "context.jsonl", "--context", whose)
    assert weights["none"] == weights["without"] and len(set(weights.values())) == 3
    rollouts = {}
    for name in weights:
        rollouts[name] = [line["transcript"] for line in lines_of(tmp_path / name / "samples.jsonl")]
    assert rollouts["teacher"] == rollouts["without"] != rollouts["both"]


@pytest.mark.slow
def test_sft_and_eval_with_and_without(stage, tmp_path):
    without = train(sft, stage, tmp_path / "without", "m.jsonl")
    assert train(sft, stage, tmp_path / "no-context", "context.jsonl", "--no-context") == without
    assert train(sft, stage, tmp_path / "context", "context.jsonl") != without

    hyps = {}
    for name, more in (("m", []), ("context", []), ("context", ["--no-context"])):
        out = tmp_path / f"{name}{len(more)}"
        flags = ["--model", stage / "teacher", "--data", stage / f"{name}.jsonl", "--out", out, *more]
        evaluation.main(evaluation.parse_args([str(flag) for flag in flags]))
        lines = lines_of(out / f"{name}.jsonl")
        hyps[name, len(more)] = [line["hyp"] for line in lines]
    assert hyps["context", 1] == hyps["m", 0] != hyps["context", 0]
    assert lines[1]["context"] == "clip 0, clap"  # a result file is a manifest with the same contexts
