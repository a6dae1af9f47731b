"""Context: words that a prompt gives beforehand, to both models, to the teacher alone, or to none."""

import json

import pytest
import torch
import transformers
from conftest import QWEN3_ASR_TOKENS, noise, qwen3_asr_folder, qwen3_tokenizer, tiny_model
from runs import argv_of, lines_of, run_on_cpu, write_lines, write_stage

import data
import eval as evaluation
import opd
import sft
from model import SpeechLM

on_cpu = pytest.fixture(autouse=True, scope="module")(run_on_cpu)

CONTEXTS = ["Zürich, Müller, ASR", "  two blanks before", "\na new line", "今天 北京", "x"]


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
    script.main(script.parse_args(argv_of(script, stage, out, "--train", stage / manifest, *more)))
    return (out / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["bytes", pytest.param("real", marks=pytest.mark.slow)])
def test_qwen3_asr_prompt_ids_are_stocks(tmp_path, kind):
    """The context is the system turn, as the processor's `prompt` has it."""
    tokenizer = qwen3_tokenizer(QWEN3_ASR_TOKENS) if kind == "real" else None
    folder = qwen3_asr_folder(tmp_path / "qwen", tokenizer, hidden=16)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    front_end = SpeechLM.from_pretrained(folder).front_end
    for context in CONTEXTS:
        inputs = processor.apply_transcription_request(noise(0.5).numpy(), language="German", prompt=context)
        assert front_end.prompt(7, "de", context) == inputs["input_ids"][0].tolist(), context
    assert front_end.prompt(7, "de", "") == front_end.prompt(7, "de", None) == front_end.prompt(7, "de")


def test_the_students_prompt_ids_are_stocks(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "student")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "student")
    for context in CONTEXTS:
        text = f"Please transcribe this audio. Context: {context}"
        inputs = processor.apply_transcription_request(noise(1.28).numpy(), prompt=text)
        n_audio = int((inputs["input_ids"] == model.front_end.audio_id).sum())
        assert model.front_end.prompt(n_audio, None, context) == inputs["input_ids"][0].tolist(), context


def test_control_tokens_in_a_context_stay_text():
    front_end = tiny_model().front_end
    context = "<|im_end|> <|audio|><|user|>"
    ids = front_end.prompt(3, None, context)
    controls = [i for i in ids if i >= 256]
    assert controls == [i for i in front_end.prompt(3) if i >= 256]
    assert context in front_end.tokenizer.decode(ids)


def test_a_script_language_keeps_the_context(tmp_path):
    model = SpeechLM.from_pretrained(qwen3_asr_folder(tmp_path / "qwen"))
    batch = data.collate([noise(0.5)] * 2, model.front_end, [None, "de"], "en", ["names", "names"])
    renamed = model.with_script_languages(batch, ["今天", "heute"])
    expected = [model.front_end.prompt(7, code, "names") for code in ("zh", "de")]
    assert [ids[mask].tolist() for ids, mask in zip(renamed.prompt_ids, renamed.prompt_mask)] == expected


@pytest.mark.slow
@pytest.mark.parametrize("context, prompts_with", [("both", "st"), ("teacher", "t"), ("none", "")])
def test_whose_prompt_gives_the_context(stage, tmp_path, monkeypatch, context, prompts_with):
    """Which models' prompts of a step are longer, and that the evaluation is the student's own case."""
    seen = []

    def spy(waveforms, front_end, languages, default_language=None, contexts=None):
        seen.append((front_end, contexts))
        return data.collate(waveforms, front_end, languages, default_language, contexts)

    monkeypatch.setattr(opd, "collate", spy)
    monkeypatch.setattr(evaluation, "collate", spy)
    flags = ["--context", context, "--eval", stage / "context.jsonl", "--micro-seconds", 100]
    train(opd, stage, tmp_path / "run", "context.jsonl", *flags)
    student_front_end = seen[0][0]  # of the evaluation before
    for front_end, contexts in seen:
        name = "s" if front_end is student_front_end else "t"
        has_context = contexts is not None and any(contexts)
        assert has_context == (name in prompts_with)
    assert len({id(front_end) for front_end, _ in seen}) == 2


@pytest.mark.slow
def test_none_is_the_run_without_the_key(stage, tmp_path):
    without = train(opd, stage, tmp_path / "without", "m.jsonl")
    assert train(opd, stage, tmp_path / "none", "context.jsonl", "--context", "none") == without
    teacher = train(opd, stage, tmp_path / "teacher", "context.jsonl", "--context", "teacher")
    both = train(opd, stage, tmp_path / "both", "context.jsonl")
    assert len({without, teacher, both}) == 3
    # With the teacher alone, the student's first rollout is that of the run without the key.
    rollouts = []
    for name in ("without", "teacher", "both"):
        lines = lines_of(tmp_path / name / "samples.jsonl")
        rollouts.append([line["transcript"] for line in lines])
    assert rollouts[0] == rollouts[1] != rollouts[2]


@pytest.mark.slow
def test_sft_and_eval_with_and_without(stage, tmp_path):
    without = train(sft, stage, tmp_path / "without", "m.jsonl")
    assert train(sft, stage, tmp_path / "no-context", "context.jsonl", "--no-context") == without
    assert train(sft, stage, tmp_path / "context", "context.jsonl") != without

    hyps = {}
    for name, more in (("m", []), ("context", []), ("context", ["--no-context"])):
        out = tmp_path / f"{name}{len(more)}"
        data_path = str(stage / f"{name}.jsonl")
        flags = ["--model", str(stage / "teacher"), "--data", data_path, "--out", str(out), *more]
        evaluation.main(evaluation.parse_args(flags))
        lines = lines_of(out / f"{name}.jsonl")
        hyps[name, len(more)] = [line["hyp"] for line in lines]
    assert hyps["context", 1] == hyps["m", 0] != hyps["context", 0]
    assert lines[1]["context"] == "clip 0, clap"  # a result file is a manifest with the same contexts


def test_a_context_is_a_string():
    line = json.dumps({"audio": "a.wav", "duration": 1, "context": ["Anna", "Bert"]}).encode()
    with pytest.raises(data.InputError, match='m.jsonl:3: "context" must be a string'):
        data.parse_line(line, "m.jsonl:3", "/")


def test_a_batch_without_contexts_is_the_batch_of_before():
    model = tiny_model()
    plain = data.collate([noise(0.5)], model.front_end, [None])
    empty = data.collate([noise(0.5)], model.front_end, [None], contexts=[None])
    assert torch.equal(plain.prompt_ids, empty.prompt_ids)
