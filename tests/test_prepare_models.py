"""prepare.ark and prepare.student: their folders load in stock transformers and compute what they should."""

import json

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from conftest import (
    QWEN_SPECIALS,
    batch_of,
    byte_tokenizer,
    change_json,
    glm_asr_nano_folder,
    qwen3_text_config,
    qwen_text_sizes,
    tiny_config,
    tiny_model,
    write_weights,
)
from runs import weights_of

import data
import model as m
from prepare import ark, student


def convert(released, out):
    ark.main(ark.parse_args([str(released), "--out", str(out)]))


def make_student(out, *argv):
    student.main(student.parse_args(["--out", str(out), *[str(arg) for arg in argv]]))


def assert_stock_loads(folder):
    """Stock transformers finds the same weights in a folder as we do. → our model"""
    speech_lm = m.SpeechLM.from_pretrained(folder).eval()
    load = transformers.GlmAsrForConditionalGeneration.from_pretrained
    net, info = load(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    stock = net.state_dict()
    assert stock.keys() == speech_lm.state_dict().keys()
    assert all(torch.equal(tensor, stock[name]) for name, tensor in speech_lm.state_dict().items())
    return speech_lm


# ---- prepare.ark -------------------------------------------------------------------------------------------

RELEASED = {  # parts of our names → those of the released ARK-ASR-0.6B, in this order
    "model.audio_tower.norm.": "audio_encoder.layer_norm.",
    "model.audio_tower.": "audio_encoder.whisper.",
    "model.multi_modal_projector.linear_1.": "audio_encoder.adapting.0.",
    "model.multi_modal_projector.linear_2.": "audio_encoder.adapting.2.",
    "model.language_model.": "model.",
}
RELEASED_LAYER = {  # of a layer of the encoder
    ".self_attn.o_proj.": ".self_attn.out_proj.",
    ".input_layernorm.": ".self_attn_layer_norm.",
    ".post_attention_layernorm.": ".final_layer_norm.",
    ".mlp.": ".",
}


def ark_tensors(seed=0):
    """Random weights under the names of the release, without lm_head: {key: float32 tensor}."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"audio_encoder.whisper.embed_positions.weight": torch.ones(1500, 32)}
    for name, ours in tiny_model().named_parameters():
        for old, new in {**RELEASED, **(RELEASED_LAYER if "audio_tower" in name else {})}.items():
            name = name.replace(old, new)
        is_scale = ours.ndim == 1 and name.endswith("weight")
        tensors[name] = is_scale + 0.2 * torch.randn(ours.shape, generator=generator)
    return tensors


def ark_folder(path, tensors=None, shards=1, **fields):
    """A folder like the release's, without project code: a flat Qwen2 config with whisper_config."""
    write_weights(path, tensors or ark_tensors(), shards)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(path)
    whisper = {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 128,
        "num_mel_bins": 128,
    }
    config = {
        **qwen_text_sizes(),
        "model_type": "arkasr",
        "auto_map": {"AutoConfig": "configuration_arkasr.ArkasrConfig"},
        "vocab_size": len(tokenizer),
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "merge_factor": 4,
        "whisper_config": whisper,
        **fields,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def rotate_pairs(x):
    """Rotary of neighbouring pairs (0, 1), (2, 3), … in the first half of each head: (T, heads, d)."""
    half = x.shape[2] // 2
    angle = torch.arange(len(x))[:, None] / 10_000 ** (torch.arange(0, half, 2) / half)
    z = torch.view_as_complex(x[..., :half].reshape(*x.shape[:2], half // 2, 2).contiguous())
    z = z * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([torch.view_as_real(z).flatten(2), x[..., half:]], dim=2)


def ark_embeddings(w, mel, n_heads=2):
    """Audio embeddings (≥ A, H) of one clip's mel (128, F), as the release computes them from its weights."""

    def linear(name, x):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", torch.zeros(()))

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"])

    audio = "audio_encoder.whisper"
    x = F.gelu(F.conv1d(mel[None], w[f"{audio}.conv1.weight"], w[f"{audio}.conv1.bias"], padding=1))
    x = F.gelu(F.conv1d(x, w[f"{audio}.conv2.weight"], w[f"{audio}.conv2.bias"], stride=2, padding=1))[0].T
    for n in (0, 1):
        name = f"{audio}.layers.{n}"
        h = norm(f"{name}.self_attn_layer_norm", x)
        q, k, v = (linear(f"{name}.self_attn.{p}_proj", h).reshape(len(h), n_heads, -1) for p in "qkv")
        weights = torch.einsum("qhd,khd->hqk", rotate_pairs(q), rotate_pairs(k)) / q.shape[2] ** 0.5
        mixed = torch.einsum("hqk,khd->qhd", weights.softmax(-1), v).flatten(1)
        x = x + linear(f"{name}.self_attn.out_proj", mixed)
        h = norm(f"{name}.final_layer_norm", x)
        x = x + linear(f"{name}.fc2", F.gelu(linear(f"{name}.fc1", h)))
    merged = norm("audio_encoder.layer_norm", x).reshape(-1, 4 * x.shape[1])
    return linear("audio_encoder.adapting.2", F.gelu(linear("audio_encoder.adapting.0", merged)))


def test_ark_computes_what_the_release_does(tmp_path):
    """Of three files and a backup, with a head of its own; and tied, in bf16."""
    weights = ark_tensors()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    released = ark_folder(tmp_path / "ark", weights, 3, rms_norm_eps=1e-5, max_position_embeddings=777)
    safetensors.torch.save_file(ark_tensors(seed=1), released / "old.safetensors")
    convert(released, tmp_path / "new")
    speech_lm = assert_stock_loads(tmp_path / "new")
    batch = batch_of(speech_lm, [0.31, 3.0])
    with torch.no_grad():
        embeds = speech_lm.encode(batch).split(batch.audio_lens.tolist())
    for b in (0, 1):
        expected = ark_embeddings(weights, batch.mel[b, :, : batch.mel_lens[b]])[: len(embeds[b])]
        assert (embeds[b] - expected).abs().max() < 1e-5 * expected.abs().max()
    for name, tensor in speech_lm.lm.state_dict().items():
        assert torch.equal(tensor, weights[f"model.{name}"]), name
    assert torch.equal(speech_lm.head.weight, weights["lm_head.weight"])
    text = speech_lm.config.text_config
    assert (text.rms_norm_eps, text.max_position_embeddings) == (1e-5, 777)
    assert text.rope_parameters["rope_theta"] == 1e6
    assert "auto_map" not in (tmp_path / "new/config.json").read_text()

    half = {name: tensor.bfloat16() for name, tensor in ark_tensors().items()}  # without lm_head
    convert(ark_folder(tmp_path / "half", half), tmp_path / "half-new")
    state = weights_of(tmp_path / "half-new")
    assert torch.equal(state["model.language_model.norm.weight"], half["model.norm.weight"])
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16} and "lm_head.weight" not in state


# ---- prepare.student ---------------------------------------------------------------------------------------


def qwen3_lm_folder(path, n_spare=16, tied=True):
    """A stock Qwen3ForCausalLM folder like Qwen/Qwen3-0.6B, with spare rows near zero; its flag says tied."""
    tokenizer = byte_tokenizer(specials=QWEN_SPECIALS)
    torch.manual_seed(0)
    config = qwen3_text_config(tokenizer, 32, len(tokenizer) + n_spare, 0.2, tied)
    stock = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for matrix in (stock.model.embed_tokens.weight, stock.lm_head.weight):
            matrix[len(tokenizer) :] = 0
    stock.save_pretrained(path)
    tokenizer.save_pretrained(path)
    change_json(path / "config.json", tie_word_embeddings=True)
    return path


@pytest.mark.parametrize("n_spare, tied", [(16, True), (0, True), (2, False)])
def test_student_from_parts(n_spare, tied, tmp_path):
    """An LM with spare rows for the new tokens or without, and one with a head of its own."""
    encoder = glm_asr_nano_folder(tmp_path / "nano")
    lm = qwen3_lm_folder(tmp_path / "lm", n_spare, tied)
    make_student(tmp_path / "new", "--encoder", encoder, "--lm", lm)
    speech_lm = assert_stock_loads(tmp_path / "new")
    donor = weights_of(encoder)
    for name, tensor in speech_lm.encoder.state_dict().items():
        assert torch.equal(tensor, donor[f"audio_tower.{name}"]), name  # its older names
    weights = weights_of(lm)
    for name, tensor in speech_lm.lm.state_dict().items():
        assert name == "embed_tokens.weight" or torch.equal(tensor, weights[f"model.{name}"]), name

    embeddings = weights["model.embed_tokens.weight"]
    head = weights.get("lm_head.weight", embeddings)
    for matrix, old in ((speech_lm.lm.embed_tokens.weight, embeddings), (speech_lm.head.weight, head)):
        new = matrix[259:264].detach()
        assert torch.equal(matrix[:259], old[:259]) and torch.pdist(new).min() > 0.1
        assert 0.5 < (new - old[:259].mean(dim=0)).std() / old[:259].std() < 1.5
        assert len(matrix) == max(264, 259 + n_spare)
    assert (speech_lm.head.weight is speech_lm.lm.embed_tokens.weight) == tied
    assert len(speech_lm.front_end.tokenizer) == 264
    assert speech_lm.config.text_config.rope_parameters["rope_theta"] == 1e6


def test_student_from_config_is_a_function_of_the_seed(tmp_path):
    """The tokenizer lacks the prompt's tokens; LM fields that are not in the file have Qwen2's defaults."""
    byte_tokenizer(specials=["<|endoftext|>", "<|im_end|>"]).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "c.json").write_text(json.dumps(tiny_config(hidden=64, tied=False)))
    states = []
    for n, seed in enumerate((0, 0, 1)):
        argv = ["--config", tmp_path / "c.json", "--tokenizer", tmp_path / "tokenizer", "--seed", seed]
        make_student(tmp_path / str(n), *argv)
        states.append(assert_stock_loads(tmp_path / str(n)).state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert not torch.equal(states[0]["lm_head.weight"], states[2]["lm_head.weight"])
    assert states[0]["lm_head.weight"].shape == (263, 64)
    text = data.read_json(tmp_path / "0/config.json")["text_config"]
    assert (text["hidden_act"], text["rms_norm_eps"], text["eos_token_id"]) == ("silu", 1e-6, 257)


def test_student_refuses_what_does_not_fit(tmp_path):
    nano = glm_asr_nano_folder(tmp_path / "nano")
    lm = qwen3_lm_folder(tmp_path / "lm")
    holed = qwen3_lm_folder(tmp_path / "holed")
    write_weights(holed, {name: x for name, x in weights_of(lm).items() if name != "model.norm.weight"})
    cases = {
        "holed: weights are missing, such as model.norm.weight": ["--encoder", nano, "--lm", holed],
        "holed is not an empty folder": ["--encoder", nano, "--lm", lm, "--out", holed],
    }
    for reason, argv in cases.items():
        with pytest.raises(data.InputError, match=reason):
            make_student(tmp_path / "new", *argv)
    assert not list(tmp_path.glob("new*"))
