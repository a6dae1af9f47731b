"""Converts the released ARK-ASR-0.6B to a folder of ours, without running its remote code.

    python -m prepare.ark AutoArk-AI/ARK-ASR-0.6B --out ark

The result is a stock GlmAsr folder with the same graph; the weights have other names. The release's rotary
embedding turns dimensions 2i and 2i + 1 of a head together, stock's i and i + r / 2, so rows of q and k are
reordered. A clip alone scores the same in both if both give it as many audio tokens: we round their number
up, the release down. In a batch the release's scores also depend on the padding, which it does not mask.
"""

import re

import torch
import transformers
from safetensors.torch import load_file

import data
import model
from prepare.student import glm_asr_config, save

RENAMED = {  # regular expressions, applied in this order
    r"^model\.": "model.language_model.",
    r"^audio_encoder\.whisper\.": "model.audio_tower.",
    r"^audio_encoder\.layer_norm\.": "model.audio_tower.norm.",
    r"^audio_encoder\.adapting\.0\.": "model.multi_modal_projector.linear_1.",
    r"^audio_encoder\.adapting\.2\.": "model.multi_modal_projector.linear_2.",
    r"(audio_tower\.layers\.\d+)\.self_attn\.out_proj\.": r"\1.self_attn.o_proj.",
    r"(audio_tower\.layers\.\d+)\.self_attn_layer_norm\.": r"\1.input_layernorm.",
    r"(audio_tower\.layers\.\d+)\.final_layer_norm\.": r"\1.post_attention_layernorm.",
    r"(audio_tower\.layers\.\d+)\.(fc\d)\.": r"\1.mlp.\2.",
}
TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
)


def parse_args(argv=None):
    parser = data.argument_parser("python -m prepare.ark", __doc__)
    parser.usage = "python -m prepare.ark MODEL --out DIR"
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of the released ARK-ASR")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    return parser.parse_args(argv)


def main(args):
    data.check_out(args.out)
    save(convert(args.model), args.out)


def convert(name):
    """The released ARK-ASR as a `SpeechLM`, in the data type of its weights."""
    folder = model.local_folder(name)
    released = model.read_config(name, folder)
    if "whisper_config" not in released:
        raise data.InputError(f"{name} is no released ARK-ASR: its config.json has no whisper_config")
    if released.get("merge_factor", 4) != 4:
        raise data.InputError(f"{name}: merge_factor {released['merge_factor']}; our adapter merges 4 frames")

    tokenizer = transformers.Qwen2TokenizerFast.from_pretrained(folder)
    tokenizer.init_kwargs.pop("auto_map", None)  # what we save refers to no remote code
    weights = converted_weights(folder, released["whisper_config"]["encoder_attention_heads"])
    embeddings = weights["model.language_model.embed_tokens.weight"]
    tied = torch.equal(weights.setdefault("lm_head.weight", embeddings), embeddings)
    speech_lm = model.SpeechLM(converted_config(released, tokenizer, tied), tokenizer)
    speech_lm.load_state_dict(weights)
    return speech_lm.to(embeddings.dtype)


def converted_config(released, tokenizer, tied):
    """The GlmAsrConfig of the release's flat Qwen2 config with its whisper_config."""
    whisper = released["whisper_config"]
    audio = {
        "hidden_size": whisper["d_model"],
        "intermediate_size": whisper["encoder_ffn_dim"],
        "num_attention_heads": whisper["encoder_attention_heads"],
        "num_hidden_layers": whisper["encoder_layers"],
        "num_mel_bins": whisper["num_mel_bins"],
    }
    sizes = {field: released[field] for field in TEXT_FIELDS if field in released}
    rope = {"rope_type": "default", "rope_theta": released["rope_theta"]}
    text = transformers.Qwen2Config(**sizes, rope_parameters=rope, tie_word_embeddings=tied)
    return glm_asr_config(audio, text, tokenizer, tied)


def converted_weights(folder, n_heads):
    """{our name: tensor} of all weights in a folder."""
    weights = {}
    for path in model.weight_files(folder):
        for name, tensor in load_file(path).items():
            if name.endswith("embed_positions.weight"):
                continue  # Whisper's absolute positions, not used
            for pattern, replacement in RENAMED.items():
                name = re.sub(pattern, replacement, name)
            if re.search(r"audio_tower\..*\.[qk]_proj\.", name):
                tensor = halves_from_pairs(tensor, n_heads)
            weights[name] = tensor
    return weights


def halves_from_pairs(tensor, n_heads):
    """Reorders the rows of q or k (heads · d, …) for rotary halves in place of neighbouring pairs.

    Only the first r = d / 2 rows of each head are turned. Of these the even ones come first, then the odd
    ones: the pair (2i, 2i + 1) becomes (i, i + r / 2).
    """
    d = len(tensor) // n_heads
    order = [*range(0, d // 2, 2), *range(1, d // 2, 2), *range(d // 2, d)]
    return tensor.view(n_heads, d, -1)[:, order].reshape(tensor.shape)


if __name__ == "__main__":
    data.run_script(main, parse_args())
