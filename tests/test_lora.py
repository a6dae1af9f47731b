"""LoRA: what trains is A and B, what is saved is W + 2 B A, and peft reads lora/."""

import peft
import pytest
import torch
import transformers
from conftest import add_random_lora, batch_of, qwen3_asr_folder, tiny_model
from runs import BOTH, run_on_cpu, train, weights_of
from safetensors.torch import load_file

import model as m

on_cpu = pytest.fixture(autouse=True, scope="module")(run_on_cpu)


def is_lm(name):
    return name.startswith(("model.language_model.", "lm_head."))


@BOTH
def test_only_lora_encoder_and_adapter_train(stage, tmp_path, script):
    """The LM's own weights stay bit for bit; the merged projections, the encoder and the adapter move."""
    before = weights_of(stage / "student")
    projections = tuple(f"{projection}.weight" for projection in m.PROJECTIONS)
    out = tmp_path / "run"
    train(script, stage, out, "--lora-rank", 4, "--steps", 3)
    after = weights_of(out / "model")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        is_frozen = is_lm(name) and not name.endswith(projections)
        assert torch.equal(tensor, after[name]) == is_frozen, name
    for folder in (out, out / "step-3"):
        names = load_file(folder / "lora" / "adapter_model.safetensors")
        assert len(names) == 2 * 7 * 2
        assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    train(script, stage, tmp_path / "lm", "--lora-rank", 4, "--steps", 2, "--train-parts", "lm")
    after = weights_of(tmp_path / "lm/model")  # lora/ is now the whole change
    for name, tensor in before.items():
        assert is_lm(name) or torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "qwen3_asr"])
@torch.no_grad()
def test_merged_folder_and_pefts_folder_are_the_model(tmp_path, kind):
    """The merged folder scores and writes as the model does, and so does lora/ on the base, both in stock."""
    base = tmp_path / "base"
    stock_class = transformers.GlmAsrForConditionalGeneration
    if kind == "qwen3_asr":
        qwen3_asr_folder(base)
        stock_class = transformers.Qwen3ASRForConditionalGeneration
    else:
        tiny_model(model_type=kind, spread=0.1).save_pretrained(base)
    speech_lm = m.SpeechLM.from_pretrained(base).eval()
    add_random_lora(speech_lm, spread=0.2)
    before = {name: tensor.clone() for name, tensor in speech_lm.state_dict().items()}
    speech_lm.save_pretrained(tmp_path / "merged")
    speech_lm.peft_models[0].save_pretrained(tmp_path / "lora")
    for name, tensor in speech_lm.state_dict().items():
        assert torch.equal(tensor, before[name]), name

    layer = "model.language_model.layers.1.mlp.down_proj"
    down, up = [before[f"{layer}.lora_{part}.default.weight"] for part in "AB"]
    merged_weight = weights_of(tmp_path / "merged")[f"{layer}.weight"]
    expected = before[f"{layer}.base_layer.weight"] + 2 * up @ down
    assert torch.allclose(merged_weight, expected, atol=1e-6)

    merged = m.SpeechLM.from_pretrained(tmp_path / "merged").eval()
    batch = batch_of(speech_lm, [0.6, 1.0, 0.3], ["en"] * 3)
    rollout = speech_lm.sample(batch, 12)
    assert torch.equal(rollout.ids, merged.sample(batch, 12).ids)
    hidden = speech_lm(batch, rollout)
    assert (merged(batch, rollout) - hidden).abs().max() < 1e-5 * hidden.abs().max()

    ids = torch.arange(20)[None]
    stock_base = stock_class.from_pretrained(base)
    base_logits = stock_base(input_ids=ids).logits
    merged_logits = stock_class.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
    on_base = peft.PeftModel.from_pretrained(stock_base, tmp_path / "lora")
    lora_names = [name for name, _ in on_base.named_parameters() if ".lora_A." in name]
    assert len(lora_names) == 7 * len(speech_lm.lm.layers)  # none beside the encoder's projections
    assert (merged_logits - on_base(input_ids=ids).logits).abs().max() < 1e-5
    assert (merged_logits - base_logits).abs().max() > 1e-2
