"""A new student, as a model folder that sft.py trains. Of two kinds:

    python -m prepare.student --encoder zai-org/GLM-ASR-Nano-2512 --lm Qwen/Qwen3-0.6B --out student
    python -m prepare.student --config config.json --tokenizer example/base --out student

The first takes encoder and norm of a GlmAsr model (also of an ARK-ASR that prepare.ark converted) and a Qwen
causal LM, and draws the adapter. The second draws all weights, of a model with the sizes of a GlmAsr
config.json. Control tokens of the prompt that the tokenizer lacks are added to it.
"""

import copy
import json
import os
import shutil

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from data import InputError, argument_parser, at_least, run_script
from model import AUDIO_TOKEN, PAD_TOKEN, PROMPT_TOKENS, STOP_TOKEN, SpeechLM, local_folder, model_kind


def parse_args(argv=None):
    parser = argument_parser("python -m prepare.student", __doc__)
    add = parser.add_argument
    add("--encoder", metavar="MODEL", help="GlmAsr folder or hub name, for its encoder (with --lm)")
    add("--lm", metavar="MODEL", help="Qwen2 or Qwen3 causal LM, folder or hub name (with --encoder)")
    add("--config", metavar="FILE", help="config.json of a GlmAsr model, for its sizes (with --tokenizer)")
    add("--tokenizer", metavar="DIR", help="folder of a Qwen tokenizer (with --config)")
    add("--seed", type=at_least(0, int), default=0, help="of the weights that are drawn")
    add("--out", required=True, metavar="DIR", help="folder to write")
    return parser.parse_args(argv)


def main(args):
    refuse_existing(args.out)
    torch.manual_seed(args.seed)
    names = [name for name in ("encoder", "lm", "config", "tokenizer") if getattr(args, name)]
    if names == ["encoder", "lm"]:
        model = from_parts(args.encoder, args.lm)
    elif names == ["config", "tokenizer"]:
        model = from_config(args.config, args.tokenizer)
    else:
        raise InputError(
            f"give --encoder and --lm, or --config and --tokenizer; found {' '.join(names) or 'none'}"
        )
    save(model, args.out)


# ----------------------------------------------------------------------------------------------------------
# From parts
# ----------------------------------------------------------------------------------------------------------


def from_parts(encoder_name, lm_name):
    """A student with the encoder and norm of one model, the LM of another, and a new adapter.

    The rows of added tokens are drawn with the mean and the spread of the other rows, per dimension.
    """
    if model_kind(encoder_name, local_folder(encoder_name)) != "glmasr":
        raise InputError(f"--encoder {encoder_name}: its encoder is Qwen3-ASR's; take a GlmAsr model")
    # Stock's own class, because zai-org/GLM-ASR-Nano-2512 has a Llama LM, and older names, which it renames.
    donor = load_stock(transformers.GlmAsrForConditionalGeneration, encoder_name)
    lm = load_stock(transformers.AutoModelForCausalLM, lm_name)
    tokenizer = load_tokenizer(lm_name)

    n_old = len(tokenizer)
    add_audio_tokens(tokenizer)
    n_tokens = len(tokenizer)
    if n_tokens > lm.config.vocab_size:
        lm.resize_token_embeddings(n_tokens, mean_resizing=False)  # drawn below

    tied = lm.config.tie_word_embeddings
    matrices = [lm.get_input_embeddings().weight]  # (V, H)
    if not tied:
        matrices.append(lm.lm_head.weight)
    for matrix in matrices:
        old_rows = matrix.data[:n_old]
        noise = torch.randn(n_tokens - n_old, matrix.shape[1])
        matrix.data[n_old:n_tokens] = old_rows.mean(dim=0) + old_rows.std(dim=0) * noise

    model = SpeechLM(glm_asr_config(donor.config.audio_config, lm.config, tokenizer, tied), tokenizer)
    model.encoder.load_state_dict(donor.model.audio_tower.state_dict())
    model.lm.load_state_dict(lm.model.state_dict())
    model.head.load_state_dict(lm.lm_head.state_dict())
    return model


def load_stock(model_class, name):
    """A stock model in float32. Raises InputError where the folder is none of its class, or lacks weights."""
    folder = local_folder(name)
    try:
        model, info = model_class.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{name} is no {model_class.__name__}: {one_line(error)}") from error
    if info["missing_keys"]:
        raise InputError(f"{name}: weights are missing, such as {min(info['missing_keys'])}")
    return model


# ----------------------------------------------------------------------------------------------------------
# From random weights
# ----------------------------------------------------------------------------------------------------------


def from_config(path, tokenizer_name):
    """A student with random weights, of the sizes of a GlmAsr config.json; all ids are the tokenizer's."""
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"--config {path}: {error}") from None
    tokenizer = load_tokenizer(tokenizer_name)
    add_audio_tokens(tokenizer)

    # The text config is built here, whole: GlmAsrConfig would fill what it lacks with Llama's defaults.
    try:
        sizes = dict(config["text_config"])
        model_type = sizes.pop("model_type", "qwen2")
        sizes["vocab_size"] = max(len(tokenizer), sizes.get("vocab_size", 0))
        text = transformers.CONFIG_MAPPING[model_type](**sizes)
        tied = config.get("tie_word_embeddings", True)
        config = glm_asr_config(config["audio_config"], text, tokenizer, tied)
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise InputError(f"--config {path} is not that of a GlmAsr model: {one_line(error)}") from error
    return SpeechLM(config, tokenizer)


# ----------------------------------------------------------------------------------------------------------
# What both share, and prepare.ark
# ----------------------------------------------------------------------------------------------------------


def load_tokenizer(name):
    folder = local_folder(name)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{name} holds no tokenizer: {one_line(error)}") from error


def add_audio_tokens(tokenizer):
    """Adds to a stock Qwen tokenizer the control tokens of the prompt that it lacks."""
    vocabulary = tokenizer.get_vocab()
    new = [token for token in (*PROMPT_TOKENS, STOP_TOKEN, PAD_TOKEN) if token not in vocabulary]
    tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)


def glm_asr_config(audio, text, tokenizer, tied):
    """The GlmAsrConfig of an audio config (dict or object) and a Qwen config, with the tokenizer's ids."""
    text = copy.deepcopy(text)
    stop_id, pad_id, audio_id = tokenizer.convert_tokens_to_ids([STOP_TOKEN, PAD_TOKEN, AUDIO_TOKEN])
    text.bos_token_id = None
    text.eos_token_id = stop_id
    text.pad_token_id = pad_id
    return transformers.GlmAsrConfig(
        audio_config=audio, text_config=text, audio_token_id=audio_id, tie_word_embeddings=tied
    )


def one_line(error):
    return " ".join(str(error).split())[:200]


def refuse_existing(out):
    if os.path.isdir(out) and not os.listdir(out):
        return
    if os.path.exists(out):
        raise InputError(f"--out {out} exists; remove it, or choose another name")


def save(model, out):
    """Writes a model folder, which gets its name when it is complete."""
    partial = out.rstrip("/") + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    os.replace(partial, out)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {n_parameters / 1e6:.1f} million parameters, {len(model.front_end.tokenizer)} tokens")


if __name__ == "__main__":
    run_script(main, parse_args())
