"""Tiny random models of the real classes, a throw-away byte-level tokenizer, and the `slow` mark."""
import os
import pathlib
import sys

import numpy as np
import pytest
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


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.getoption("-m"):
        slow = [item for item in items if "slow" in item.keywords]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if "slow" not in item.keywords]


def byte_tokenizer(extra=()):
    """A Qwen2-like tokenizer with 256 bytes, no merges, then the real special tokens and `extra` ones."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens([*SPECIALS, *extra])
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
    from model import ArkASR
    torch.manual_seed(seed)
    return ArkASR.from_config(tiny_config(**sizes), tokenizer or byte_tokenizer()).eval()


def noise(seconds, seed=0):
    """(samples,) float32 of coloured noise: something for the encoder to tell apart."""
    white = np.random.default_rng(seed).standard_normal(max(int(seconds * 16000), 1)).astype(np.float32)
    return torch.from_numpy(0.1 * white * np.abs(np.sin(np.arange(len(white)) / (900 + 100 * seed)))).float()


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def clips_dir(tmp_path):
    """A folder with 12 short clips and m.jsonl, with text, as written by hand."""
    import json
    with open(tmp_path / "m.jsonl", "w") as file:
        for i in range(12):
            wave = noise(0.3 + 0.17 * i, seed=i)
            soundfile.write(tmp_path / f"{i}.wav", wave.numpy(), 16000, subtype="FLOAT")
            file.write(json.dumps(dict(audio=f"{i}.wav", duration=len(wave) / 16000, text=f"clip {i}",
                                       language="en")) + "\n")
    return tmp_path
