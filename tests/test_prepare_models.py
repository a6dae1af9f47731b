"""prepare.ark and prepare.student: their folders load in stock transformers and compute what they should."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import (
    ark_folder,
    ark_tensors,
    byte_tokenizer,
    glm_asr_nano_folder,
    noise,
    qwen3_lm_folder,
    tiny_config,
)
from safetensors.torch import load_file

from data import InputError, collate
from model import SpeechLM
from prepare import ark, student


def convert(released, out):
    ark.main(ark.parse_args([str(released), "--out", str(out)]))


def make_student(out, *argv):
    student.main(student.parse_args(["--out", str(out), *[str(arg) for arg in argv]]))


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


def assert_stock_loads(folder):
    """Stock transformers finds the same weights in a folder as we do. → our model"""
    model = SpeechLM.from_pretrained(folder).eval()
    load = transformers.GlmAsrForConditionalGeneration.from_pretrained
    net, info = load(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    stock = net.state_dict()
    assert stock.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, stock[name]) for name, tensor in model.state_dict().items())
    return model


def test_ark_computes_what_the_release_does(tmp_path):
    released = ark_folder(tmp_path / "ark", rms_norm_eps=1e-5, max_position_embeddings=777)
    convert(released, tmp_path / "new")
    model = assert_stock_loads(tmp_path / "new")
    weights = load_file(released / "model.safetensors")
    batch = collate([noise(0.31), noise(3.0, seed=1)], model.front_end, ["en", "en"])
    with torch.no_grad():
        embeds = model.encode(batch).split(batch.audio_lens.tolist())
    for b in (0, 1):
        expected = ark_embeddings(weights, batch.mel[b, :, : batch.mel_lens[b]])[: len(embeds[b])]
        assert (embeds[b] - expected).abs().max() < 1e-5 * expected.abs().max()
    for name, tensor in model.lm.state_dict().items():
        assert torch.equal(tensor, weights[f"model.{name}"]), name
    text = model.config.text_config
    assert (text.rms_norm_eps, text.max_position_embeddings) == (1e-5, 777)
    assert text.rope_parameters["rope_theta"] == 1e6
    assert "auto_map" not in (tmp_path / "new/config.json").read_text()


def test_ark_files_of_every_kind_give_the_same_model(tmp_path):
    """lm_head stored or not, one file or three; the data type is kept."""
    tensors = ark_tensors(len(byte_tokenizer()) + 5)
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    head = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    kinds = {"one": (tensors, 1), "shards": (tensors, 3), "head": (head, 1), "half": (half, 1)}
    states = {}
    for name, (kind, shards) in kinds.items():
        convert(ark_folder(tmp_path / name, kind, shards), tmp_path / f"{name}-new")
        states[name] = load_file(tmp_path / f"{name}-new/model.safetensors")
    assert {tensor.dtype for tensor in states["half"].values()} == {torch.bfloat16}
    for name, tensor in states["one"].items():
        assert torch.equal(states["shards"][name], tensor) and torch.equal(states["head"][name], tensor)
        assert torch.equal(states["half"][name], tensor.bfloat16())


def test_ark_refuses_what_does_not_fit(tmp_path):
    tensors = ark_tensors(len(byte_tokenizer()) + 5)
    missing = {name: tensor for name, tensor in tensors.items() if "layers.1.fc1.bias" not in name}
    unknown = {**tensors, "audio_encoder.whisper.conv3.bias": torch.ones(3)}
    misshapen = {**tensors, "audio_encoder.adapting.0.weight": torch.ones(64, 96)}
    cases = {
        "fc1.bias": ark_folder(tmp_path / "missing", missing),
        "conv3": ark_folder(tmp_path / "unknown", unknown),
        "linear_1.weight": ark_folder(tmp_path / "misshapen", misshapen),
        "merge_factor 2": ark_folder(tmp_path / "merge", merge_factor=2),
        "no whisper_config": qwen3_lm_folder(tmp_path / "lm"),
    }
    for reason, released in cases.items():
        with pytest.raises(InputError, match=reason):
            convert(released, tmp_path / "new")
    assert not list(tmp_path.glob("new*"))


@pytest.mark.parametrize("rows, tied", [(None, True), (259, True), (None, False)])
def test_student_from_parts(rows, tied, tmp_path):
    """An LM with spare rows, one with a row for each token, one with an untied head."""
    encoder = glm_asr_nano_folder(tmp_path / "nano")
    lm = qwen3_lm_folder(tmp_path / "lm", rows=rows, tied=tied)
    make_student(tmp_path / "new", "--encoder", encoder, "--lm", lm)
    model = assert_stock_loads(tmp_path / "new")
    donor = transformers.GlmAsrForConditionalGeneration.from_pretrained(encoder, dtype=torch.float32)
    for name, tensor in donor.model.audio_tower.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], tensor), name
    weights = load_file(lm / "model.safetensors")
    for name, tensor in model.lm.state_dict().items():
        assert name == "embed_tokens.weight" or torch.equal(tensor, weights[f"model.{name}"]), name

    embeddings = weights["model.embed_tokens.weight"]
    head = weights.get("lm_head.weight", embeddings)
    for matrix, old in ((model.lm.embed_tokens.weight, embeddings), (model.head.weight, head)):
        new = matrix[259:264].detach()
        assert torch.equal(matrix[:259], old[:259]) and torch.pdist(new).min() > 0.1
        assert 0.5 < (new - old[:259].mean(dim=0)).std() / old[:259].std() < 1.5
    assert (model.head.weight is model.lm.embed_tokens.weight) == tied
    assert len(model.front_end.tokenizer) == 264
    assert model.config.text_config.rope_parameters["rope_theta"] == 1e6


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
    text = json.loads((tmp_path / "0/config.json").read_text())["text_config"]
    assert (text["hidden_act"], text["rms_norm_eps"], text["eos_token_id"]) == ("silu", 1e-6, 257)


@pytest.mark.slow
def test_student_refuses_what_does_not_fit(tmp_path):
    nano, lm = glm_asr_nano_folder(tmp_path / "nano"), qwen3_lm_folder(tmp_path / "lm")
    (tmp_path / "c.json").write_text("{}")
    cases = {
        "model_type is 'qwen3'": ["--encoder", lm, "--lm", lm],
        "python -m prepare.ark": ["--encoder", ark_folder(tmp_path / "ark"), "--lm", lm],
        "nano is no AutoModelForCausalLM": ["--encoder", nano, "--lm", nano],
        "nowhere is no model folder": ["--encoder", nano, "--lm", tmp_path / "nowhere"],
        "'text_config'": ["--config", tmp_path / "c.json", "--tokenizer", lm],
        "found lm": ["--lm", lm],
        "lm exists": ["--encoder", nano, "--lm", lm, "--out", lm],
    }
    for reason, argv in cases.items():
        with pytest.raises(InputError, match=reason):
            make_student(tmp_path / "new", *argv)
    assert not list(tmp_path.glob("new*"))
