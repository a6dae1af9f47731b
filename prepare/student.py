"""A new student, as a model folder that sft.py trains. Of two kinds:

    python -m prepare.student --encoder zai-org/GLM-ASR-Nano-2512 --lm Qwen/Qwen3-0.6B --out student
    python -m prepare.student --config config.json --tokenizer example/base --out student

The first takes encoder and norm of a GlmAsr model (also of an ARK-ASR that prepare.ark converted) and a Qwen
causal LM, and draws the adapter. The second draws all weights, of a model with the sizes of a GlmAsr
config.json. Control tokens of the prompt that the tokenizer lacks are added to it.
"""

import copy

import torch
import transformers

import data
import model


def parse_args(argv=None):
    parser = data.argument_parser("python -m prepare.student", __doc__)
    add = parser.add_argument
    add("--encoder", metavar="MODEL", help="GlmAsr folder or hub name, for its encoder (with --lm)")
    add("--lm", metavar="MODEL", help="Qwen2 or Qwen3 causal LM, folder or hub name (with --encoder)")
    add("--config", metavar="FILE", help="config.json of a GlmAsr model, for its sizes (with --tokenizer)")
    add("--tokenizer", metavar="DIR", help="folder of a Qwen tokenizer (with --config)")
    add("--seed", type=data.at_least(0, int), default=0, help="of the weights that are drawn")
    add("--out", required=True, metavar="DIR", help="folder to write")
    args = parser.parse_args(argv)
    names = [name for name in ("encoder", "lm", "config", "tokenizer") if getattr(args, name)]
    if names not in (["encoder", "lm"], ["config", "tokenizer"]):
        parser.error("give --encoder and --lm, or --config and --tokenizer")
    return args


def main(args):
    data.check_out(args.out)
    torch.manual_seed(args.seed)
    if args.encoder:
        speech_lm = from_parts(args.encoder, args.lm)
    else:
        speech_lm = from_config(args.config, args.tokenizer)
    save(speech_lm, args.out)


# ----------------------------------------------------------------------------------------------------------
# From parts
# ----------------------------------------------------------------------------------------------------------


def from_parts(encoder_name, lm_name):
    """A student with the encoder and norm of one model, the LM of another, and a new adapter.

    The rows of added tokens are drawn with the mean and the spread of the other rows, per dimension.
    """
    encoder_folder = model.local_folder(encoder_name)
    if model.model_kind(encoder_name, encoder_folder) != "glmasr":
        raise data.InputError(f"--encoder {encoder_name}: its encoder is Qwen3-ASR's; take a GlmAsr model")
    # Stock's own class, because zai-org/GLM-ASR-Nano-2512 has a Llama LM, and older names, which it renames.
    donor = load_stock(transformers.GlmAsrForConditionalGeneration, encoder_folder)
    lm_folder = model.local_folder(lm_name)
    lm = load_stock(transformers.AutoModelForCausalLM, lm_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(lm_folder, trust_remote_code=False)

    n_old = len(tokenizer)
    add_audio_tokens(tokenizer)
    embeddings = lm.get_input_embeddings().weight
    head = lm.get_output_embeddings().weight
    tied = head is embeddings
    embeddings = with_new_rows(embeddings.detach(), n_old, len(tokenizer))
    head = embeddings if tied else with_new_rows(head.detach(), n_old, len(tokenizer))

    lm.config.vocab_size = len(embeddings)
    config = glm_asr_config(donor.config.audio_config, lm.config, tokenizer, tied)
    speech_lm = model.SpeechLM(config, tokenizer)
    speech_lm.encoder.load_state_dict(donor.model.audio_tower.state_dict())
    speech_lm.lm.load_state_dict({**lm.model.state_dict(), "embed_tokens.weight": embeddings})
    speech_lm.head.load_state_dict({"weight": head})
    return speech_lm


def load_stock(model_class, folder):
    """A stock model in float32. InputError where weights are missing: transformers would draw them."""
    options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    kind = model.read_config(folder, folder).get("model_type")
    try:
        stock, info = model_class.from_pretrained(folder, **options)
    except ValueError as error:
        remedy = "--lm takes a Qwen2 or Qwen3 model, --encoder a GlmAsr one"
        raise data.InputError(f"{folder}: model_type {kind} cannot be loaded; {remedy}") from error
    if info["missing_keys"]:
        raise data.InputError(f"{folder}: weights are missing, such as {min(info['missing_keys'])}")
    return stock


def with_new_rows(matrix, n_old, n_tokens):
    """(V, H) with rows n_old … n_tokens − 1 drawn like the first n_old; it grows where it has too few."""
    n_rows = max(len(matrix), n_tokens)
    longer = matrix.new_zeros(n_rows, matrix.shape[1])
    longer[: len(matrix)] = matrix
    old_rows = matrix[:n_old]
    noise = torch.randn(n_tokens - n_old, matrix.shape[1])
    longer[n_old:n_tokens] = old_rows.mean(dim=0) + old_rows.std(dim=0) * noise
    return longer


# ----------------------------------------------------------------------------------------------------------
# From random weights
# ----------------------------------------------------------------------------------------------------------


def from_config(path, tokenizer_name):
    """A student with random weights, of the sizes of a GlmAsr config.json; all ids are the tokenizer's."""
    sizes = data.read_json(path)
    tokenizer_folder = model.local_folder(tokenizer_name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
    add_audio_tokens(tokenizer)

    # The text config is built here, whole: GlmAsrConfig would fill what it lacks with Llama's defaults.
    text = dict(sizes["text_config"])
    model_type = text.pop("model_type", "qwen2")
    text["vocab_size"] = max(len(tokenizer), text.get("vocab_size", 0))
    text = transformers.CONFIG_MAPPING[model_type](**text)
    tied = sizes.get("tie_word_embeddings", True)
    return model.SpeechLM(glm_asr_config(sizes["audio_config"], text, tokenizer, tied), tokenizer)


# ----------------------------------------------------------------------------------------------------------
# What both share, and prepare.ark
# ----------------------------------------------------------------------------------------------------------


def add_audio_tokens(tokenizer):
    """Adds to a stock Qwen tokenizer the control tokens of the prompt that it lacks."""
    vocabulary = tokenizer.get_vocab()
    needed = (*model.PROMPT_TOKENS, model.STOP_TOKEN, model.PAD_TOKEN)
    new = [token for token in needed if token not in vocabulary]
    tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)


def glm_asr_config(audio, text, tokenizer, tied):
    """The GlmAsrConfig of an audio config (dict or object) and a Qwen config, with the tokenizer's ids."""
    text = copy.deepcopy(text)
    text.bos_token_id = None
    text.eos_token_id = tokenizer.convert_tokens_to_ids(model.STOP_TOKEN)
    text.pad_token_id = tokenizer.convert_tokens_to_ids(model.PAD_TOKEN)
    audio_id = tokenizer.convert_tokens_to_ids(model.AUDIO_TOKEN)
    return transformers.GlmAsrConfig(
        audio_config=audio, text_config=text, audio_token_id=audio_id, tie_word_embeddings=tied
    )


def save(speech_lm, out):
    """Writes a model folder, which gets its name when it is complete."""
    with model.complete_or_absent(out.rstrip("/")) as folder:
        speech_lm.save_pretrained(folder)
    n_parameters = sum(parameter.numel() for parameter in speech_lm.parameters())
    print(f"{out}: {n_parameters / 1e6:.1f} million parameters, {len(speech_lm.front_end.tokenizer)} tokens")


if __name__ == "__main__":
    data.run_script(main, parse_args())
