"""Tiny random models of the real classes, their folders, a tokenizer of bytes, and the mark `slow`."""

import os
import pathlib
import sys

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import model as m  # noqa: E402
from prepare.student import glm_asr_config  # noqa: E402

DATA = pathlib.Path(os.environ.get("ASR_OPD_DATA", ROOT.parent / "shared" / "data"))
torch.set_num_threads(1)  # tiny models: a second thread only waits
AUDIO_SPECIALS = ["<|audio|>", "<|user|>", "<|begin_of_audio|>", "<|end_of_audio|>", "<|assistant|>"]
QWEN_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPECIALS = [*QWEN_SPECIALS, *AUDIO_SPECIALS]
ROPE = {"rope_type": "default", "rope_theta": 1e6}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: over 20 s; run with `pytest -m slow`")
    config.option.markexpr = config.option.markexpr or "not slow"


# ---- our student -------------------------------------------------------------------------------------------


def byte_tokenizer(extra=(), specials=SPECIALS):
    """A Qwen2-like tokenizer with 256 bytes, no merges, then the real special tokens and `extra` ones."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens([*specials, *extra])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def qwen_text_sizes(hidden=32):
    return {
        "hidden_size": hidden,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }


def tiny_config(width=32, hidden=32, tied=True, model_type="qwen2", spread=0.3):
    """The sizes of a tiny student, as its config.json has them."""
    text = {
        **qwen_text_sizes(hidden),
        "model_type": model_type,
        "head_dim": hidden // 4,
        "initializer_range": spread,
        "rope_parameters": ROPE,
        "tie_word_embeddings": tied,
    }
    audio = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.2,
    }
    return {"audio_config": audio, "text_config": text, "tie_word_embeddings": tied}


def tiny_model(seed=0, tokenizer=None, **sizes):
    """A `SpeechLM` with random weights, in eval mode."""
    tokenizer = tokenizer or byte_tokenizer()
    config = tiny_config(**sizes)
    text = config["text_config"]
    text = transformers.CONFIG_MAPPING[text.pop("model_type")](**text, vocab_size=len(tokenizer))
    config = glm_asr_config(config["audio_config"], text, tokenizer, config["tie_word_embeddings"])
    torch.manual_seed(seed)
    return m.SpeechLM(config, tokenizer).eval()


def add_random_lora(speech_lm, spread=1.0):
    """LoRA whose B is not zero."""
    m.add_lora(speech_lm, rank=3, seed=0)
    for name, parameter in speech_lm.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=spread)
    return speech_lm


def noise(seconds, seed=0):
    """(samples,) float32 of coloured noise: something for the encoder to tell apart."""
    white = np.random.default_rng(seed).standard_normal(max(int(seconds * 16000), 1)).astype(np.float32)
    return torch.from_numpy(0.1 * white * np.abs(np.sin(np.arange(len(white)) / (900 + 100 * seed)))).float()


def batch_of(speech_lm, lengths_s, languages=None, default_language=None):
    """The Batch of as many clips, each of other noise."""
    waveforms = [noise(seconds, seed=i) for i, seconds in enumerate(lengths_s)]
    languages = languages or [None] * len(waveforms)
    return data.collate(waveforms, speech_lm.front_end, languages, default_language)


# ---- whole runs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def stage(tmp_path_factory):
    """The folder of `runs.write_stage`, which no test changes."""
    import runs  # which imports this file

    return runs.write_stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="session")
def finished(stage, tmp_path_factory):
    """finished(script, *flags) → the folder of such a run in one process, made once. No test changes it."""
    import runs

    folders = {}

    def folder_of(script, *flags):
        key = (script, *flags)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("finished") / "run"
            runs.train(script, stage, folders[key], *flags)
        return folders[key]

    return folder_of


# ---- folders -----------------------------------------------------------------------------------------------


def change_json(path, **fields):
    """Replaces or adds fields of a JSON file."""
    data.write_json(str(path), {**data.read_json(path), **fields})


def write_weights(folder, tensors, shards=1):
    """`tensors` as model.safetensors, or as so many shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    if shards == 1:
        files = ["model.safetensors"]
    weight_map = {name: files[i % shards] for i, name in enumerate(sorted(tensors))}
    for file in files:
        part = {name: tensors[name].contiguous() for name in weight_map if weight_map[name] == file}
        (folder / file).unlink(missing_ok=True)  # `tensors` may be a view of it
        safetensors.torch.save_file(part, folder / file, metadata={"format": "pt"})
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        data.write_json(str(folder / "model.safetensors.index.json"), index)


# ---- Qwen3-ASR and GLM-ASR-Nano ----------------------------------------------------------------------------

QWEN3_ASR_TOKENS = [
    *"<|audio_start|> <|audio_end|> <tts_pad> <tts_text_bos> <tts_text_eod> <tts_text_bos_single>".split(),
    *("<non_speech>", "<|audio_pad|>"),
    *(f"<blank{i}>" for i in range(1, 28)),
    *("<asr_text>", "<timestamp>"),
]
QWEN3_ASR_ROLES = {
    "audio_token": "<|audio_pad|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}
QWEN3_ASR_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\n<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'audio' %}"
    "<|audio_start|><|audio_pad|><|audio_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen3_tokenizer(extra=()):
    """The real Qwen3 tokenizer with `extra` added tokens, special where they look like <|…|>.

    Skips the test without the data.
    """
    folder = DATA / "qwen3_tokenizer"
    if not (folder / "tokenizer.json").exists():
        pytest.skip(f"no {folder}: set ASR_OPD_DATA to a folder with qwen3_tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    added = []
    for token in extra:
        added.append(tokenizers.AddedToken(token, special=token.startswith("<|"), normalized=False))
    tokenizer.add_tokens(added)
    return tokenizer


def qwen3_text_config(tokenizer, hidden, rows, spread, tied=True):
    return transformers.Qwen3Config(
        **qwen_text_sizes(hidden),
        head_dim=hidden // 4,
        vocab_size=rows,
        initializer_range=spread,
        rope_parameters=ROPE,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )


def qwen3_asr_folder(path, tokenizer=None, seed=0, hidden=32, width=32, rows=None, spread=0.2):
    """A folder like Qwen/Qwen3-ASR-1.7B-hf: stock model and processor.

    `tokenizer` holds QWEN3_ASR_TOKENS; default: bytes. There are more rows than tokens, as in the release.
    """
    tokenizer = tokenizer or byte_tokenizer(specials=[*QWEN_SPECIALS, *QWEN3_ASR_TOKENS])
    end, stop, audio, timestamp = tokenizer.convert_tokens_to_ids(
        ["<|endoftext|>", "<|im_end|>", "<|audio_pad|>", "<timestamp>"]
    )
    audio_config = {
        "num_mel_bins": 128,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 2 * width,
        "d_model": width,
        "output_dim": hidden,
        "downsample_hidden_size": 8,
        "n_window": 50,
        "n_window_infer": 800,
        "initializer_range": spread,
    }
    config = transformers.Qwen3ASRConfig(
        audio_config=audio_config,
        text_config=qwen3_text_config(tokenizer, hidden, rows or len(tokenizer) + 7, spread),
        audio_token_id=audio,
        timestamp_token_id=timestamp,
        pad_token_id=stop,
        eos_token_id=[end, stop],
        initializer_range=spread,
    )
    torch.manual_seed(seed)
    stock = transformers.Qwen3ASRForConditionalGeneration(config)
    stock.generation_config = transformers.GenerationConfig(eos_token_id=[end, stop], pad_token_id=end)
    stock.save_pretrained(path)
    tokenizer._set_model_specific_special_tokens(QWEN3_ASR_ROLES)
    extractor = transformers.Qwen3ASRFeatureExtractor()
    processor = transformers.Qwen3ASRProcessor(extractor, tokenizer, chat_template=QWEN3_ASR_TEMPLATE)
    processor.save_pretrained(path)
    return path


def glm_asr_nano_folder(path, seed=0, width=32):
    """A stock GlmAsr folder over a Llama LM, like zai-org/GLM-ASR-Nano-2512: an encoder to take over."""
    specials = "<|endoftext|> <|user|> <|assistant|> <|begin_of_audio|> <|end_of_audio|> <|pad|>".split()
    tokenizer = byte_tokenizer(specials=specials)
    text = {**qwen_text_sizes(48), "model_type": "llama", "head_dim": 12, "vocab_size": len(tokenizer)}
    config = transformers.GlmAsrConfig(
        audio_config=tiny_config(width=width)["audio_config"],
        text_config=text,
        audio_token_id=tokenizer.convert_tokens_to_ids("<|pad|>"),
    )
    torch.manual_seed(seed)
    transformers.GlmAsrForConditionalGeneration(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
