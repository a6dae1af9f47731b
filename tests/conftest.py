"""Tiny random models of the real classes, published folder layouts with tiny weights, a throw-away
byte-level tokenizer, and the `slow` mark."""
import json
import os
import pathlib
import re
import sys

import numpy as np
import pytest
import safetensors.torch
import soundfile
import tokenizers
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DATA = pathlib.Path(os.environ.get("ASR_OPD_DATA", ROOT.parent / "shared" / "data"))
torch.set_num_threads(1)                # tiny models: a second thread only waits
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio|>", "<|user|>", "<|begin_of_audio|>",
            "<|end_of_audio|>", "<|assistant|>"]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: over 20 s; run with `pytest -m slow`")


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Indexes of the tests' manifests stay out of the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def pytest_collection_modifyitems(config, items):
    for item in items:          # whole runs of faults and hostile input: a second or more each
        if item.path.stem in ("test_survive", "test_hostile") and {"models", "straight", "command", "stage",
                                                                   "kind"} & set(item.fixturenames):
            item.add_marker("slow")
    if "slow" not in config.getoption("-m"):
        slow = [item for item in items if "slow" in item.keywords]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if "slow" not in item.keywords]


def byte_tokenizer(extra=(), specials=SPECIALS):
    """A Qwen2-like tokenizer with 256 bytes, no merges, then the real special tokens and `extra` ones."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens([*specials, *extra])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>",
                                                pad_token="<|endoftext|>")


def tiny_config(width=32, hidden=32, tied=True, model_type="qwen2", spread=0.3):
    text = dict(model_type=model_type, hidden_size=hidden, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
                initializer_range=spread, rope_parameters=dict(rope_type="default", rope_theta=1e6),
                tie_word_embeddings=tied, head_dim=hidden // 4)
    audio = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2, num_attention_heads=2,
                 initializer_range=0.2)
    return dict(audio_config=audio, text_config=text, tie_word_embeddings=tied)


def tiny_model(seed=0, tokenizer=None, **sizes):
    from model import SpeechLM
    torch.manual_seed(seed)
    return SpeechLM.from_config(tiny_config(**sizes), tokenizer or byte_tokenizer()).eval()


def noise(seconds, seed=0):
    """(samples,) float32 of coloured noise: something for the encoder to tell apart."""
    white = np.random.default_rng(seed).standard_normal(max(int(seconds * 16000), 1)).astype(np.float32)
    return torch.from_numpy(0.1 * white * np.abs(np.sin(np.arange(len(white)) / (900 + 100 * seed)))).float()


# ---- model folders as they are published, tiny -------------------------------------------------------------
QWEN_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN3_ASR_TOKENS = ["<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>",
                    "<tts_text_bos_single>", "<non_speech>", "<|audio_pad|>",
                    *(f"<blank{i}>" for i in range(1, 28)), "<asr_text>", "<timestamp>"]
QWEN3_ASR_ROLES = dict(audio_token="<|audio_pad|>", audio_bos_token="<|audio_start|>",
                       audio_eos_token="<|audio_end|>")
QWEN3_ASR_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\n<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'audio' %}"
    "<|audio_start|><|audio_pad|><|audio_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def qwen3_tokenizer(extra=()):
    """The real Qwen3 tokenizer with `extra` added tokens, special where they look like <|…|>.
    Skips the test without the data."""
    folder = DATA / "qwen3_tokenizer"
    if not (folder / "tokenizer.json").exists():
        pytest.skip(f"no {folder}: set ASR_OPD_DATA to a folder with qwen3_tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([tokenizers.AddedToken(token, special=token.startswith("<|"), normalized=False)
                          for token in extra])
    return tokenizer


def write_released_ark_tokenizer(folder):
    """The released ARK-ASR's ids: the real Qwen merges, Qwen2's three added tokens, then its own by id."""
    source = DATA / "qwen3_tokenizer" / "tokenizer.json"
    if not source.exists():
        pytest.skip(f"no {source}: set ASR_OPD_DATA to a folder with qwen3_tokenizer")
    names = {**dict(enumerate(QWEN_SPECIALS, 151643)), 151663: "<|audio|>", 151665: "<|user|>",
             151666: "<|begin_of_audio|>", 151667: "<|end_of_audio|>", 151668: "<|assistant|>",
             **{i: f"<|speech_{i - 151670}|>" for i in range(151670, 151690)}}
    added = [dict(id=i, content=names.get(i, f"<|extra_{i}|>"), single_word=False, lstrip=False, rstrip=False,
                  normalized=False, special=True) for i in range(151643, 151690)]
    text, n = re.subn(r'"added_tokens": \[.*?\]', '"added_tokens": ' + json.dumps(added), source.read_text(),
                      count=1, flags=re.DOTALL)          # not parsed: 11 MB
    assert n == 1
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None,
        unk_token=None, model_max_length=32768, clean_up_tokenization_spaces=False)))


def write_weights(folder, tensors, shards=1):
    """`tensors` as model.safetensors, or as so many shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    parts = [names[i::shards] for i in range(shards)]
    files = ["model.safetensors"] if shards == 1 else [
        f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for file, part in zip(files, parts):
        safetensors.torch.save_file({name: tensors[name].contiguous() for name in part}, folder / file,
                                    metadata={"format": "pt"})
    if shards > 1:
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        (folder / "model.safetensors.index.json").write_text(json.dumps(dict(
            metadata=dict(total_size=total),
            weight_map={name: file for file, part in zip(files, parts) for name in part})))


def qwen_text_sizes(hidden=32):
    return dict(hidden_size=hidden, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=2048)


def qwen3_text_config(tokenizer, hidden, rows, spread, tied=True):
    return transformers.Qwen3Config(
        **qwen_text_sizes(hidden), head_dim=hidden // 4, vocab_size=rows, initializer_range=spread,
        rope_parameters=dict(rope_type="default", rope_theta=1e6), tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"))


def qwen3_asr_folder(path, tokenizer=None, seed=0, hidden=32, width=32, rows=None, spread=0.2):
    """A folder like Qwen/Qwen3-ASR-1.7B-hf: stock model and processor.
    `tokenizer` holds QWEN3_ASR_TOKENS; default: bytes."""
    tokenizer = tokenizer or byte_tokenizer(specials=[*QWEN_SPECIALS, *QWEN3_ASR_TOKENS])
    end, stop = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    rows = rows or len(tokenizer) + 7                   # more rows than tokens, as released
    audio = dict(num_mel_bins=128, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=2 * width,
                 d_model=width, output_dim=hidden, downsample_hidden_size=8, n_window=50, n_window_infer=800,
                 initializer_range=spread)
    torch.manual_seed(seed)
    net = transformers.Qwen3ASRForConditionalGeneration(transformers.Qwen3ASRConfig(
        audio_config=audio, text_config=qwen3_text_config(tokenizer, hidden, rows, spread),
        audio_token_id=tokenizer.convert_tokens_to_ids("<|audio_pad|>"),
        timestamp_token_id=tokenizer.convert_tokens_to_ids("<timestamp>"), pad_token_id=stop,
        eos_token_id=[end, stop], initializer_range=spread))
    net.generation_config = transformers.GenerationConfig(eos_token_id=[end, stop], pad_token_id=end)
    net.save_pretrained(path)
    tokenizer._set_model_specific_special_tokens(QWEN3_ASR_ROLES)
    transformers.Qwen3ASRProcessor(transformers.Qwen3ASRFeatureExtractor(), tokenizer,
                                   chat_template=QWEN3_ASR_TEMPLATE).save_pretrained(path)
    return path


def ark_tensors(rows, seed=0, width=32, hidden=32, spread=0.2, lm_head=False):
    """Random weights under the names of the released ARK-ASR-0.6B: {key: float32 tensor}."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape):
        return spread * torch.randn(shape, generator=generator)

    def linear(name, n_out, n_in, bias=True):
        return {f"{name}.weight": matrix(n_out, n_in), **({f"{name}.bias": matrix(n_out)} if bias else {})}

    def norm(name, size, bias=True):
        return {f"{name}.weight": 1 + matrix(size), **({f"{name}.bias": matrix(size)} if bias else {})}

    audio, kv = "audio_encoder.whisper", hidden // 2
    tensors = {f"{audio}.conv1.weight": matrix(width, 128, 3), f"{audio}.conv1.bias": matrix(width),
               f"{audio}.conv2.weight": matrix(width, width, 3), f"{audio}.conv2.bias": matrix(width),
               f"{audio}.embed_positions.weight": matrix(1500, width),
               **norm("audio_encoder.layer_norm", width),
               **linear("audio_encoder.adapting.0", 2 * hidden, 4 * width),
               **linear("audio_encoder.adapting.2", hidden, 2 * hidden),
               "model.embed_tokens.weight": matrix(rows, hidden), **norm("model.norm", hidden, bias=False)}
    for n in (0, 1):
        layer = f"{audio}.layers.{n}"
        for name, bias in (("q_proj", True), ("k_proj", False), ("v_proj", True), ("out_proj", True)):
            tensors |= linear(f"{layer}.self_attn.{name}", width, width, bias)
        tensors |= norm(f"{layer}.self_attn_layer_norm", width) | norm(f"{layer}.final_layer_norm", width)
        tensors |= linear(f"{layer}.fc1", 4 * width, width) | linear(f"{layer}.fc2", width, 4 * width)
        layer = f"model.layers.{n}"
        for name, size, bias in (("q_proj", hidden, True), ("k_proj", kv, True), ("v_proj", kv, True),
                                 ("o_proj", hidden, False)):
            tensors |= linear(f"{layer}.self_attn.{name}", size, hidden, bias)
        tensors |= norm(f"{layer}.input_layernorm", hidden, False)
        tensors |= norm(f"{layer}.post_attention_layernorm", hidden, False)
        for name, n_out, n_in in (("gate_proj", 64, hidden), ("up_proj", 64, hidden),
                                  ("down_proj", hidden, 64)):
            tensors |= linear(f"{layer}.mlp.{name}", n_out, n_in, False)
    if lm_head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    return tensors


def ark_folder(path, tensors=None, shards=1, width=32, hidden=32, seed=0, released_ids=False, **config):
    """A folder in the layout of the released ARK-ASR-0.6B, without project code: flat Qwen2 config with
    whisper_config, its own key names, remote code named in auto_map; bytes, or `released_ids` and their
    151,936 rows. `config` overrides fields."""
    tokenizer, path = byte_tokenizer(), pathlib.Path(path)
    rows, (end, stop, audio) = len(tokenizer) + 5, tokenizer.convert_tokens_to_ids(
        ["<|endoftext|>", "<|im_end|>", "<|audio|>"])
    path.mkdir(parents=True)
    if released_ids:
        rows, end, stop, audio = 151_936, 151_643, 151_645, 151_663
        write_released_ark_tokenizer(path)
    else:
        tokenizer.save_pretrained(path)
    write_weights(path, tensors or ark_tensors(rows, seed, width, hidden), shards)
    whisper = dict(model_type="whisper", d_model=width, encoder_layers=2, encoder_attention_heads=2,
                   encoder_ffn_dim=4 * width, num_mel_bins=128, max_source_positions=1500, decoder_layers=32,
                   decoder_attention_heads=20, decoder_ffn_dim=5120, vocab_size=51866,
                   activation_function="gelu")
    (path / "config.json").write_text(json.dumps({
        "architectures": ["ArkasrForConditionalGeneration"], "model_type": "arkasr",
        "auto_map": {"AutoConfig": "configuration_arkasr.ArkasrConfig",
                     "AutoModelForCausalLM": "modeling_arkasr.ArkasrForConditionalGeneration"},
        **qwen_text_sizes(hidden), "vocab_size": rows, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "rope_scaling": None, "use_sliding_window": False, "sliding_window": None,
        "max_window_layers": 2, "attention_dropout": 0.0, "tie_word_embeddings": True, "use_cache": True,
        "bos_token_id": end, "eos_token_id": stop, "pad_token_id": end, "audio_token_id": audio,
        "adapter_type": "mlp", "merge_factor": 4, "mlp_adapter_act": "gelu", "use_rope": True,
        "spec_aug": False, "max_whisper_length": 1500, "torch_dtype": "bfloat16",
        "transformers_version": "4.52.4", "whisper_config": whisper, **config}))
    return path


def glm_asr_nano_folder(path, seed=0, width=32):
    """A stock GlmAsr folder over a Llama LM, like zai-org/GLM-ASR-Nano-2512: another tokenizer, an encoder to
    take over."""
    tokenizer = byte_tokenizer(specials=["<|endoftext|>", "<|user|>", "<|assistant|>", "<|begin_of_audio|>",
                                         "<|end_of_audio|>", "<|pad|>"])
    text = dict(model_type="llama", **qwen_text_sizes(48), head_dim=12, vocab_size=len(tokenizer),
                rms_norm_eps=1e-5, rope_parameters=dict(rope_type="default", rope_theta=10000.0),
                initializer_range=0.2, eos_token_id=[256, 257], pad_token_id=None)
    audio = dict(tiny_config(width=width)["audio_config"])
    torch.manual_seed(seed)
    net = transformers.GlmAsrForConditionalGeneration(transformers.GlmAsrConfig(
        audio_config=audio, text_config=text, audio_token_id=tokenizer.convert_tokens_to_ids("<|pad|>")))
    net.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def qwen3_lm_folder(path, tokenizer=None, seed=0, hidden=32, rows=None, tied=True):
    """A stock Qwen3ForCausalLM folder like Qwen/Qwen3-0.6B; rows beyond the tokenizer are zero, as unused
    ones nearly are."""
    tokenizer = tokenizer or byte_tokenizer(specials=QWEN_SPECIALS)
    torch.manual_seed(seed)
    net = transformers.Qwen3ForCausalLM(
        qwen3_text_config(tokenizer, hidden, rows or len(tokenizer) + 16, 0.2, tied))
    with torch.no_grad():
        for matrix in (net.model.embed_tokens.weight, net.lm_head.weight):
            matrix[len(tokenizer):] = 0
    net.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def thinker_folder(path, name="Qwen3-ASR-1.7B"):
    """The layout of the original Qwen3-ASR repositories: everything under "thinker"."""
    tensors = {f"thinker.{key}": torch.ones(4, 4) for key in (
        "audio_tower.conv_out.weight", "audio_tower.proj1.weight", "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight", "lm_head.weight")}
    write_weights(path / name, tensors)
    (path / name / "config.json").write_text(json.dumps({
        "architectures": ["Qwen3ASRForConditionalGeneration"], "model_type": "qwen3_asr",
        "support_languages": ["Chinese", "English"], "transformers_version": "4.57.6",
        "thinker_config": {"model_type": "qwen3_asr_thinker", "audio_token_id": 151676, "dtype": "bfloat16",
                           "audio_config": {"model_type": "qwen3_asr_audio_encoder", "d_model": 1024},
                           "text_config": {"model_type": "qwen3_asr_text", "hidden_size": 2048}}}))
    byte_tokenizer(specials=[*QWEN_SPECIALS, *QWEN3_ASR_TOKENS]).save_pretrained(path / name)
    return path / name


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def clips_dir(tmp_path):
    """A folder with 12 short clips and m.jsonl, with text, as written by hand."""
    with open(tmp_path / "m.jsonl", "w") as file:
        for i in range(12):
            wave = noise(0.3 + 0.17 * i, seed=i)
            soundfile.write(tmp_path / f"{i}.wav", wave.numpy(), 16000, subtype="FLOAT")
            file.write(json.dumps(dict(audio=f"{i}.wav", duration=len(wave) / 16000, text=f"clip {i}",
                                       language="en")) + "\n")
    return tmp_path
