"""Student and teacher speech-LMs, their sampling, and the on-policy distillation loss (arXiv 2605.28139).

    mel → encoder → LayerNorm → 4 frames merged → MLP → audio embeddings
        → prompt → Qwen causal LM → hidden rows → scores

`SpeechLM` keeps its weights in transformers' own classes, GlmAsr (Ark) or Qwen3-ASR, so a folder on disk is
stock, and adds what they lack: an encoder whose result does not depend on the batch's padding, hidden rows at
transcript positions only, batched sampling that keeps each step's top-k ids. The loss is `union_support` and
`support_kl`, with `teacher_support` and `student_scores`, which score the support.

Legend: B clips, S prompt tokens, T transcript tokens, A audio tokens, F mel frames, V vocabulary, K top-k,
N rows (clip, position) of a batch, U = 2K support entries, H hidden size of the LM, D of the encoder.
"""
import copy
import dataclasses
import glob
import json
import math
import os
import re
import shutil
import warnings

import huggingface_hub
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import (AutoModelForCausalLM, AutoProcessor, AutoTokenizer, GenerationConfig, GlmAsrConfig,
                          GlmAsrForConditionalGeneration, GlmAsrProcessor, Qwen2Config, Qwen2TokenizerFast,
                          Qwen3ASRForConditionalGeneration, WhisperFeatureExtractor)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data import (HOP, LANGUAGES, N_MELS, InputError, all_reduce_sum, barrier, collate, language_code,
                  log_mel, n_audio_tokens, one_line, pad_left, rank_and_world, script_language)

transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", "torch.distributed is disabled")     # DCP in one process

PROMPT_TEXT = "Please transcribe this audio."
AUDIO_TOKEN, STOP_TOKEN, PAD_TOKEN = "<|audio|>", "<|im_end|>", "<|endoftext|>"
PROMPT_TOKENS = ["<|user|>", "<|begin_of_audio|>", AUDIO_TOKEN, "<|end_of_audio|>", "<|assistant|>"]
ARK_PROMPT = "".join(PROMPT_TOKENS[:4]) + PROMPT_TEXT + PROMPT_TOKENS[4]
# The same prompt for stock transformers' processor: user turns, each content item in its place, no newlines.
CHAT_TEMPLATE = ("{% for message in messages %}{% if message['role'] == 'user' %}<|user|>"
                 "{% for part in message['content'] %}{% if part['type'] == 'audio' %}"
                 "<|begin_of_audio|><|audio|><|end_of_audio|>{% else %}{{ part['text'] }}{% endif %}"
                 "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")

# ---- Front end: what a model wants to hear and read before the transcript ----------------------------------
class FrontEnd:
    """Features, prompt and token ids of an Ark/GlmAsr model. Small and picklable: data workers carry it."""
    prompt_tokens, audio_token = PROMPT_TOKENS, AUDIO_TOKEN
    frame_multiple = 8                  # a batch's mel is padded to a multiple of this many frames
    languages = {}                      # code → name as the prompt has it; empty: the prompt names none
    def __init__(self, tokenizer, prompt_text=ARK_PROMPT):
        vocab = tokenizer.get_vocab()
        missing = [token for token in (*self.prompt_tokens, STOP_TOKEN, PAD_TOKEN) if token not in vocab]
        if missing:
            raise InputError(f"tokenizer {tokenizer.name_or_path} lacks the token(s) {' '.join(missing)}")
        self.tokenizer = tokenizer
        added = sorted((x.content for x in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self.added = re.compile(f"({'|'.join(map(re.escape, added))})")
        self.pad_id, self.stop_id, self.audio_id = (tokenizer.convert_tokens_to_ids(t)
                                                    for t in (PAD_TOKEN, STOP_TOKEN, self.audio_token))
        self.prompt_head, self.prompt_tail = (tokenizer(part, add_special_tokens=False)["input_ids"]
                                              for part in prompt_text.split(self.audio_token))
    features = staticmethod(log_mel)
    n_audio_tokens = staticmethod(n_audio_tokens)
    def prompt(self, n_audio, language=None):
        """Prompt ids (S,): what stands before the n_audio audio tokens, they, and what stands after them."""
        return self.prompt_head + [self.audio_id] * n_audio + self.prompt_tail
    def encode_text(self, text):
        """Token ids of a text. Control tokens written out in it ("<|im_end|>") stay text: split after "<"."""
        pieces = self.added.split(text)                 # text, added token, text, added token, …, text
        parts = [part for i, piece in enumerate(pieces)
                 for part in ((piece[:1], piece[1:]) if i % 2 else (piece,))]
        return [i for part in parts if part
                for i in self.tokenizer(part, add_special_tokens=False)["input_ids"]]
    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    def texts(self, rollout):
        return [self.decode(ids[:n]) for ids, n in zip(rollout.ids.tolist(), rollout.lens.tolist())]
    def transcripts(self, texts):
        """`Rollout` of given texts, the stop token included, for teacher forcing. None: a row not scored."""
        ids = [self.encode_text(text or "") for text in texts]
        padded = torch.full((len(ids), max(map(len, ids)) + 1), self.pad_id)
        for b, row in enumerate(ids):
            padded[b, :len(row) + 1] = torch.tensor(row + [self.stop_id])
        return Rollout(padded, torch.tensor([len(row) for row in ids]),
                       torch.tensor([text is not None for text in texts]))

class Qwen3ASRFrontEnd(FrontEnd):
    """The same of a Qwen3-ASR model: another length rule, the checkpoint's own chat template, and the
    language, which the model would write itself, in the prompt (`language English<asr_text>`)."""
    audio_token = "<|audio_pad|>"
    prompt_tokens = ["<|im_start|>", "<|audio_start|>", audio_token, "<|audio_end|>", "<asr_text>"]
    frame_multiple = 100                # the encoder's convolutions see chunks of one second
    languages = LANGUAGES
    def __init__(self, processor):
        turn = [{"role": "user", "content": [{"type": "audio", "audio": ""}]}]
        super().__init__(processor.tokenizer,
                         processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        prefixes = [self.language_ids(code) for code in LANGUAGES]
        self.undecided = os.path.commonprefix(prefixes)     # "language", then a token that tells them apart
        self.deciding_ids = [ids[len(self.undecided)] for ids in prefixes]
    @staticmethod
    def features(waveform):
        return log_mel(waveform, max(len(waveform), 8_000))     # half a second at least
    @staticmethod
    def n_audio_tokens(n_samples):
        """13 a second; three halvings, rounded up, of what the last second has."""
        frames = max(n_samples, 8_000) // HOP
        return 13 * (frames // 100) + -(-(frames % 100) // 8)
    def language_ids(self, code):
        return self.tokenizer(f"language {LANGUAGES[code]}<asr_text>", add_special_tokens=False)["input_ids"]
    def prompt(self, n_audio, language=None):
        """Prompt ids (S,); without a language they end where it would be written."""
        return super().prompt(n_audio) + (self.language_ids(language) if language else [])

def add_audio_tokens(tokenizer):
    """Adds to a stock Qwen tokenizer the prompt's control tokens that it lacks. → how many"""
    new = [x for x in (*PROMPT_TOKENS, STOP_TOKEN, PAD_TOKEN) if x not in tokenizer.get_vocab()]
    return tokenizer.add_special_tokens({"additional_special_tokens": new}, False)        # beside those there

def forbidden_ids(tokenizer, vocab_size, stop_id):
    """(V,) bool, True = never in a transcript: special, added `<…>`, rows without a token; not the stop."""
    mask = torch.ones(vocab_size, dtype=torch.bool)
    mask[[i for i in tokenizer.get_vocab().values() if i < vocab_size]] = False
    added = [i for i, token in tokenizer.added_tokens_decoder.items() if re.fullmatch("<.*>", token.content)]
    mask[[i for i in (*tokenizer.all_special_ids, *added) if i < vocab_size]] = True
    mask[stop_id] = False
    return mask

# ---- Model -------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Rollout:
    """Transcripts of B clips. Row (b, t) is scored for t < lens[b], and at t = lens[b] where stopped[b].
    Masks come from the lengths, never from `ids == pad`: the pad id may be a text's end."""
    ids: torch.Tensor           # (B, T) int64; the stop token at [b, lens[b]] where stopped; padding after it
    lens: torch.Tensor          # (B,) transcript tokens, without the stop token
    stopped: torch.Tensor       # (B,) bool, False = cut by the length cap
    topk_ids: torch.Tensor | None = None    # (B, T, K) the sampler's, −1 where not scored or not valid
    def row_mask(self):
        """(B, T) bool, True = a scored position; `x[mask]` gives the N rows, clip by clip."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < (self.lens + self.stopped)[:, None]
    def to(self, device):
        return Rollout(*(None if value is None else value.to(device) for value in vars(self).values()))

def key_masked_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, key_mask=None,
                         **kwargs):
    """The encoder's attention with padded key positions left out: (B, heads, T', d) → (B, T', heads, d).
    Stock GlmAsr has no such mask, and its embeddings depend on the batch's padding."""
    out = F.scaled_dot_product_attention(query, key, value, key_mask, dropout, scale=scaling)
    return out.transpose(1, 2), None

ALL_ATTENTION_FUNCTIONS.register("key_masked", key_masked_attention)

THINKER = "{} is an original Qwen3-ASR checkpoint (thinker.* keys); take its conversion for transformers, {}"

def local_folder(name):
    """`name` if it is a folder, else the cached, or now downloaded, folder of that hub repository."""
    name = os.fspath(name)
    if os.path.isdir(name):
        return name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"{name} is no model folder: not a directory, nor like Qwen/Qwen3-ASR-0.6B-hf")
    if re.fullmatch(r"Qwen/Qwen3-ASR-[\d.]+B", name):
        raise InputError(THINKER.format(name, name + "-hf"))
    try:
        return huggingface_hub.snapshot_download(
            name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"])
    except Exception as error:
        raise InputError(f"{name}: no such folder, and no such hub repository in the cache or within reach ("
                         f"{one_line(error)[:80]}); `hf download {name}` where there is a network") from error

def load_net(name, dtype):
    """(stock net, tokenizer, processor or None) of a folder or hub name, its kind told by config.json."""
    folder = local_folder(name)
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            raw = json.load(file)
        kind = "ark" if "whisper_config" in raw else raw.get("model_type")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{name} is no model folder: config.json: {one_line(error)}") from None
    if "thinker_config" in raw:
        size = "0.6B" if "0.6b" in os.path.basename(os.path.realpath(folder)).lower() else "1.7B"
        raise InputError(THINKER.format(name, f"Qwen/Qwen3-ASR-{size}-hf"))
    stock = dict(glmasr=GlmAsrForConditionalGeneration, qwen3_asr=Qwen3ASRForConditionalGeneration)
    if kind != "ark" and kind not in stock:
        raise InputError(f"{name}: model_type is {kind!r}, not glmasr, qwen3_asr or the released ARK-ASR")
    processor = None
    try:
        if kind == "ark":
            net, tokenizer, wrong = import_ark(folder, raw, dtype)
        else:
            net, info = stock[kind].from_pretrained(folder, dtype=dtype, use_safetensors=True,
                                                    output_loading_info=True)
            wrong = [*sorted(info["missing_keys"]), *sorted(info["unexpected_keys"]),
                     *sorted(map(str, info["mismatched_keys"]))]
            if kind == "qwen3_asr":
                processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
            tokenizer = (processor.tokenizer if processor else
                         AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:              # whatever the library says of a broken file, in one line
        raise InputError(f"{name} is no model folder: {one_line(error)}") from error
    if wrong:
        raise InputError(f"{name}: weights and config.json do not match: {', '.join(wrong[:3])}…")
    check_finite(name, net)
    return net, tokenizer, processor

def check_finite(name, net):
    for key, p in net.named_parameters():
        if not p.isfinite().all():
            raise InputError(f"{name}: {key} holds NaN or infinite weights")

def glm_asr_config(audio, text, tokenizer, tied):
    """GlmAsrConfig of an audio config (dict or object) and a text config object, ids from the tokenizer."""
    stop_id, pad_id, audio_id = tokenizer.convert_tokens_to_ids([STOP_TOKEN, PAD_TOKEN, AUDIO_TOKEN])
    text.bos_token_id, text.eos_token_id, text.pad_token_id = None, stop_id, pad_id
    return GlmAsrConfig(audio_config=audio, text_config=text, audio_token_id=audio_id,
                        tie_word_embeddings=tied)

ARK_NAMES = [(r"^model\.", "model.language_model."),
             (r"^audio_encoder\.whisper\.(conv\d|layers)", r"model.audio_tower.\1"),
             (r"^audio_encoder\.layer_norm", "model.audio_tower.norm"),
             (r"^audio_encoder\.adapting\.0", "model.multi_modal_projector.linear_1"),
             (r"^audio_encoder\.adapting\.2", "model.multi_modal_projector.linear_2"),
             (r"(model\.audio_tower\.layers\.\d+)\.self_attn\.out_proj", r"\1.self_attn.o_proj"),
             (r"(model\.audio_tower\.layers\.\d+)\.self_attn_layer_norm", r"\1.input_layernorm"),
             (r"(model\.audio_tower\.layers\.\d+)\.final_layer_norm", r"\1.post_attention_layernorm"),
             (r"(model\.audio_tower\.layers\.\d+)\.(fc\d)", r"\1.mlp.\2")]

def import_ark(folder, raw, dtype):
    """(net, tokenizer, names that do not fit) of the released ARK-ASR, without its remote code. Keys are
    renamed. Its rotary embedding turns neighbouring pairs of the first half of each head, the stock one turns
    halves: the even rows of q and k come first, then the odd ones."""
    whisper, tied = raw["whisper_config"], raw.get("tie_word_embeddings", True)
    if raw.get("merge_factor", 4) != 4:
        raise InputError(f"{folder}: merge_factor {raw['merge_factor']}; the adapter merges 4 frames")
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder)
    tokenizer.init_kwargs.pop("auto_map", None)             # what we save refers to no remote code
    heads, width = whisper["encoder_attention_heads"], whisper["d_model"]
    audio = dict(hidden_size=width, intermediate_size=whisper["encoder_ffn_dim"], num_attention_heads=heads,
                 num_hidden_layers=whisper["encoder_layers"], num_mel_bins=whisper.get("num_mel_bins", 80))
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act")
    rope = raw.get("rope_parameters") or dict(rope_type="default", rope_theta=raw.get("rope_theta", 10_000.0))
    text = Qwen2Config(**{key: raw[key] for key in fields if key in raw}, rope_parameters=rope,
                       tie_word_embeddings=tied)
    net = GlmAsrForConditionalGeneration(glm_asr_config(audio, text, tokenizer, tied)).to(dtype)
    rows = torch.arange(width // heads)
    half = len(rows) // 2
    rows = torch.cat([rows[:half:2], rows[1:half:2], rows[half:]])
    weights, paths = {}, sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors")))
    if not paths:
        raise InputError("it holds no *.safetensors")
    for path in paths:
        for key, tensor in load_file(path).items():
            if key.endswith("embed_positions.weight") or key == "lm_head.weight" and tied:
                continue                        # not used, and the embedding's twin
            for old, new in ARK_NAMES:
                key = re.sub(old, new, key)
            if re.match(r"model\.audio_tower\..*\.[qk]_proj\.", key):
                tensor = tensor.view(heads, len(rows), -1)[:, rows].reshape(tensor.shape)
            weights[key] = tensor
    missing, unexpected = net.load_state_dict(weights, strict=False)
    return net, tokenizer, [key for key in missing if not (tied and key == "lm_head.weight")] + unexpected

class SpeechLM(nn.Module):
    """A speech-LM, student or teacher: a stock net, GlmAsr (Ark) or Qwen3-ASR, and its tokenizer."""
    def __init__(self, net, tokenizer, processor=None):
        super().__init__()
        self.net = net               # …ForConditionalGeneration: the weights and their names
        self.is_qwen3_asr = net.config.model_type == "qwen3_asr"
        self.processor = processor   # Qwen3-ASR's own, saved as it was read; an Ark model's is written anew
        self.encoder, self.adapter = net.model.audio_tower, net.model.multi_modal_projector
        self.lm, self.head = net.model.language_model, net.lm_head
        audio, text = net.config.audio_config, net.config.text_config
        if text.model_type not in ("qwen2", "qwen3") or audio.num_mel_bins != N_MELS:
            raise InputError(f"no qwen2 or qwen3 LM over 128 mels: {text.model_type}, {audio.num_mel_bins}")
        self.front_end = Qwen3ASRFrontEnd(processor) if self.is_qwen3_asr else FrontEnd(tokenizer)
        if not self.is_qwen3_asr:
            self.encoder.config._attn_implementation = "key_masked"
            if audio.intermediate_size != 4 * audio.hidden_size:
                raise InputError("the encoder's intermediate_size is not 4 × hidden_size, as 4 merged frames")
        if net.config.audio_token_id != self.front_end.audio_id or text.vocab_size < len(tokenizer):
            raise InputError(f"model and tokenizer do not match: audio token {net.config.audio_token_id} and "
                             f"{text.vocab_size} rows, {self.front_end.audio_id} and {len(tokenizer)} tokens")
        forbidden = forbidden_ids(tokenizer, text.vocab_size, self.front_end.stop_id)
        self.register_buffer("forbidden", forbidden, persistent=False)      # (V,)
    @classmethod
    def from_config(cls, config, tokenizer):
        """Random weights. `config`: the dict of a GlmAsr config.json; ids come from the tokenizer."""
        add_audio_tokens(tokenizer)
        try:
            text = dict(config["text_config"])
            text["vocab_size"] = max(len(tokenizer), text.get("vocab_size", 0))
            # GlmAsrConfig would fill a dict with Llama's defaults, so the text config is built here, whole.
            text = transformers.CONFIG_MAPPING[text.pop("model_type", "qwen2")](**text)
            net = GlmAsrForConditionalGeneration(glm_asr_config(
                config["audio_config"], text, tokenizer, config.get("tie_word_embeddings", True))).float()
        except Exception as error:              # whatever the library says of a wrong field, in one line
            raise InputError(f"--config: no model can be built from it: {one_line(error)}") from error
        return cls(net, tokenizer)
    @classmethod
    def from_parts(cls, encoder, lm):
        """A new student: encoder and norm of a GlmAsr or ARK model, a Qwen causal LM, a random adapter. Audio
        tokens that the LM's tokenizer lacks get rows with the mean and the spread of the others."""
        encoder, folder = load_net(encoder, torch.float32)[0], local_folder(lm)
        try:
            lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True,
                                                      trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:
            raise InputError(f"--lm {folder} is no causal LM: {one_line(error)}") from error
        check_finite(folder, lm)
        if encoder.config.model_type != "glmasr" or lm.config.model_type not in ("qwen2", "qwen3"):
            raise InputError("--encoder is a glmasr model and --lm a qwen2 or qwen3 model, not "
                             f"{encoder.config.model_type} and {lm.config.model_type}")
        known = len(tokenizer)
        add_audio_tokens(tokenizer)
        if len(tokenizer) > lm.config.vocab_size:
            lm.resize_token_embeddings(len(tokenizer))
        for rows in (lm.get_input_embeddings().weight, lm.lm_head.weight):     # one and the same where tied
            old, new = rows.data[:known], rows.data[known:len(tokenizer)]
            new.copy_(old.mean(0) + old.std(0) * torch.randn_like(new))
        net = GlmAsrForConditionalGeneration(glm_asr_config(
            encoder.config.audio_config, lm.config, tokenizer, lm.config.tie_word_embeddings))
        net.model.audio_tower.load_state_dict(encoder.model.audio_tower.state_dict())
        net.model.language_model.load_state_dict(lm.model.state_dict())
        net.lm_head.load_state_dict(lm.lm_head.state_dict())
        return cls(net, tokenizer)
    @classmethod
    def from_pretrained(cls, name, dtype=torch.float32):
        """A model from a folder or the hub: GlmAsr, Qwen3-ASR (`-hf`), or the released ARK-ASR, told by
        config.json; in `dtype` whatever the file holds. Raises InputError that says what is missing."""
        return cls(*load_net(name, dtype))
    def save_pretrained(self, folder, weights=None):
        """Writes a stock folder of the net's class: weights (its own, or those given by name), config,
        tokenizer, processor, generation settings with which `generate` stops and writes no control token."""
        front_end = self.front_end
        if not self.is_qwen3_asr:
            self.net.generation_config = GenerationConfig(
                eos_token_id=front_end.stop_id, pad_token_id=front_end.pad_id, do_sample=False,
                suppress_tokens=self.forbidden.nonzero()[:, 0].tolist() or None)
        elif not self.net.generation_config.do_sample:      # sampling flags beside greedy could not be saved
            self.net.generation_config.update(temperature=None, top_p=None, top_k=None)
        self.net.save_pretrained(folder, state_dict=weights, save_original_format=False)    # native names
        (self.processor or GlmAsrProcessor(
            WhisperFeatureExtractor(feature_size=N_MELS), front_end.tokenizer, chat_template=CHAT_TEMPLATE,
            audio_token=AUDIO_TOKEN, default_transcription_prompt=PROMPT_TEXT)).save_pretrained(folder)
    def with_languages(self, batch, texts=None):
        """The batch with a language in every prompt, as Qwen3-ASR wants; an Ark model's as it is. One that is
        not known: by the script of the text (texts: B), else the likeliest of the thirty to the model."""
        if None not in batch.languages:
            return batch
        front_end, n_audio = self.front_end, batch.audio_lens.tolist()
        guesses = [script_language(text) for text in texts or [""] * len(n_audio)]
        if None in guesses:
            questions = [front_end.prompt(n) + front_end.undecided for n in n_audio]
            ids, mask = (x.to(batch.mel.device) for x in pad_left(questions, front_end.pad_id))
            asked = dataclasses.replace(batch, prompt_ids=ids, prompt_mask=mask)
            with torch.no_grad():
                embeds = self.embed_prompt(asked, self.encode(asked)[0])
                hidden = self.lm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions_of(mask))
                scores = self.head(hidden.last_hidden_state[:, -1])[:, front_end.deciding_ids]     # (B, 30)
            heard = [list(front_end.languages)[i] for i in scores.argmax(dim=1).tolist()]
            guesses = [guess or code for guess, code in zip(guesses, heard)]
        languages = [known or guess for known, guess in zip(batch.languages, guesses)]
        ids, mask = pad_left([front_end.prompt(*x) for x in zip(n_audio, languages)], front_end.pad_id)
        return dataclasses.replace(batch, prompt_ids=ids.to(batch.mel.device), languages=languages,
                                   prompt_mask=mask.to(batch.mel.device))
    def encode(self, batch):
        """Encoder and adapter: → audio embeddings (ΣA, H), clip by clip; an Ark encoder's frames (B, T', D)
        and their number per clip (B,), None for Qwen3-ASR. A clip's result does not depend on its batch
        mates: mel is 0 beyond a clip's own frames, which is what the convolutions pad with, and positions
        beyond it are not attended to: by a key mask here; Qwen3-ASR drops them."""
        mel = batch.mel.to(self.head.weight.dtype)
        if self.is_qwen3_asr:
            mel_mask = torch.arange(batch.mel.shape[2], device=batch.mel.device) < batch.mel_lens[:, None]
            return self.net.get_audio_features(mel, mel_mask.long()).pooler_output, None, None
        frame_lens = batch.mel_lens // 2                                                  # 50 frames a second
        positions = torch.arange(batch.mel.shape[2] // 2, device=batch.mel.device)
        key_mask = (positions < frame_lens[:, None])[:, None, None, :] if batch.padded else None
        frames = self.encoder(mel, key_mask=key_mask).last_hidden_state             # (B, T', D)
        merged = frames.reshape(len(frames), -1, 4 * frames.shape[2])                     # (B, T'/4, 4D)
        counted = torch.arange(merged.shape[1], device=merged.device) < batch.audio_lens[:, None]
        return self.adapter(merged[counted]), frames, frame_lens
    def embed_prompt(self, batch, audio_embeds):
        """Prompt embeddings (B, S, H): the placeholders' rows are replaced by audio_embeds (ΣA, H)."""
        embeds = self.lm.embed_tokens(batch.prompt_ids)
        is_audio = (batch.prompt_ids == self.front_end.audio_id) & batch.prompt_mask                # (B, S)
        return embeds.masked_scatter(is_audio[:, :, None], audio_embeds.to(embeds.dtype))
    def forward(self, batch, rollout, encoded=None):
        """Teacher forcing: (hidden rows (N, H) at the scored positions of `rollout`, clip by clip; the
        encoder's frames, frame_lens). Row (b, t) predicts token t of clip b: the last prompt column predicts
        token 0. encoded: what `encode` gave for this batch, if it is at hand."""
        audio_embeds, frames, frame_lens = encoded or self.encode(batch)
        row_mask = rollout.row_mask()
        T, S = max(int((rollout.lens + rollout.stopped).max()), 1), batch.prompt_ids.shape[1]
        embeds = torch.cat([self.embed_prompt(batch, audio_embeds),
                            self.lm.embed_tokens(rollout.ids[:, :T - 1])], dim=1)
        # Padding right of a transcript needs no mask: attention is causal and its rows are never read.
        mask = F.pad(batch.prompt_mask, (0, T - 1), value=True)                               # (B, S + T − 1)
        hidden = self.lm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions_of(mask),
                         use_cache=False)
        return hidden.last_hidden_state[:, S - 1:][row_mask[:, :T]], frames, frame_lens      # (N, H)
    def set_requires_gradient_sync(self, on):
        """FSDP2's method takes this one's place: off, gradients wait for a later backward pass."""
    @torch.no_grad()
    def sample(self, batch, max_new_tokens, temperature=0.0, k=32, tokens_per_second=0.0, forbidden=None,
               uniforms=None, encoded=None):
        """Writes transcripts: greedy at temperature 0, else sampling from softmax(logits / temperature);
        top-k ids after forbidding. → `Rollout`. max_new_tokens: cap, the stop token counted;
        tokens_per_second: a row's cap is also this × seconds + 16 (0: off; not in the paper), so that one
        looping row cannot hold the batch; forbidden: (V,) bool, default the model's own; uniforms: (B,
        max_new_tokens) draws in [0, 1) that make sampling a pure function of them; encoded: what `encode`
        gave, if it is at hand."""
        was_training = self.training
        self.eval()
        forbidden = self.forbidden if forbidden is None else forbidden
        caps = torch.full_like(batch.audio_lens, max_new_tokens)                              # (B,)
        if tokens_per_second > 0:
            caps = caps.minimum((batch.seconds * tokens_per_second).clamp(max=max_new_tokens).long() + 16)
        caps = caps * (batch.seconds > 0)                           # a place without a clip writes nothing
        B, T, k = len(caps), max(-(-int(caps.max()) // 4) * 4, 4), min(k, len(forbidden))
        mask, on_gpu = batch.prompt_mask, batch.mel.is_cuda
        embeds = self.embed_prompt(batch, (encoded or self.encode(batch))[0])
        out = self.lm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions_of(mask),
                      use_cache=True)                                                         # prefill
        decoder = Decoder(self.lm, out.past_key_values, mask, T)
        hidden = out.last_hidden_state[:, -1].to(decoder.dtype).clone()                       # (B, H)
        head = self.head.weight.to(decoder.dtype)
        never = head.new_zeros(len(forbidden)).masked_fill(forbidden, -math.inf)              # (V,)
        ids, topk_ids, t = caps.new_full((B, T), -1), caps.new_zeros((B, T, k)), caps.new_zeros(1)
        fours = torch.arange(4, device=caps.device)
        if temperature > 0:
            uniforms = torch.rand(B, T) if uniforms is None else F.pad(uniforms, (0, T))
            uniforms = uniforms.to(caps.device, torch.float64)

        def four_tokens():
            """Four tokens for every row. All in place, so that a GPU can capture it once and replay it."""
            recent = []
            for _ in range(4):
                recent.append(F.linear(hidden, head, never).float())                          # (B, V)
                token = recent[-1].argmax(dim=1)
                if temperature > 0:
                    cumulative = (recent[-1].double() / temperature).softmax(-1).cumsum(-1)
                    # The last valid id ends the table at 1: a draw of 0.999… picks no forbidden id behind it.
                    token = torch.searchsorted(cumulative / cumulative[:, -1:], uniforms.index_select(1, t),
                                               right=True)[:, 0].clamp(max=len(forbidden) - 1)   # NaN: V
                ids.index_copy_(1, t, token[:, None])
                hidden.copy_(decoder.step(F.embedding(token, self.lm.embed_tokens.weight), t))
                t.add_(1)
            topk_ids.index_copy_(1, t - 4 + fours, torch.stack(recent, dim=1).topk(k).indices)

        replay = four_tokens
        for done in range(4, T + 1, 4):
            if on_gpu and done == 8:                        # four plain steps have warmed the kernels up
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    four_tokens()
                replay = graph.replay
            replay()
            # Asking whether all rows are through waits for the device, so only now and then.
            if ((ids[:, :done] == self.front_end.stop_id).any(dim=1) | (caps <= done)).all():
                break
        self.train(was_training)
        # A row ends at its first stop token or at its cap; what was written behind it is dropped.
        places = torch.arange(T, device=caps.device)
        stop_at = torch.where(ids == self.front_end.stop_id, places, T).amin(dim=1)              # (B,)
        rollout = Rollout(ids, stop_at.minimum(caps), stop_at < caps)
        used, written = max(int((rollout.lens + rollout.stopped).max()), 1), rollout.row_mask()
        valid = torch.arange(k, device=caps.device) < (~forbidden).sum()        # forbidden ids come last
        return Rollout(ids.where(written, self.front_end.pad_id)[:, :used], rollout.lens, rollout.stopped,
                       topk_ids.where(written[:, :, None] & valid, -1)[:, :used])

class Decoder:
    """One-token steps of a Qwen LM after a prefill, over fixed key and value storage with fused projections:
    equal to the stock modules up to rounding. cache: the prefill's, S positions; prompt_mask: (B, S); T:
    tokens that may follow. Weights are copied, so one lives for one batch."""
    def __init__(self, lm, cache, prompt_mask, T):
        c, kind, past = lm.config, prompt_mask.device.type, cache.layers
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else past[0].values.dtype
        self.heads, self.kv_heads, self.eps = c.num_attention_heads, c.num_key_value_heads, c.rms_norm_eps
        self.dtype, self.norm, self.act = dtype, lm.norm.weight.to(dtype), lm.layers[0].mlp.act_fn
        self.S, mask = prompt_mask.shape[1], F.pad(prompt_mask, (0, T)).repeat_interleave(self.kv_heads, 0)
        self.bias = mask.new_zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf)[:, None]
        self.first = prompt_mask.sum(dim=1)                                          # (B,) the next position
        positions = torch.arange(self.S + T, device=prompt_mask.device)[None]
        self.rotary = torch.cat(lm.rotary_emb(past[0].keys, positions), dim=2)[0].to(dtype)  # (S + T, 2d)
        self.layers = []
        for layer, (keys, values) in zip(lm.layers, ((x.keys, x.values) for x in past)):
            a, mlp = layer.self_attn, layer.mlp
            qkv, norms = (a.q_proj, a.k_proj, a.v_proj), None
            if hasattr(a, "q_norm"):                                                 # Qwen3: (heads + kv, d)
                norms = torch.cat([n.weight.expand(count, -1) for n, count in
                                   ((a.q_norm, self.heads), (a.k_norm, self.kv_heads))])
            parts = (layer.input_layernorm.weight, torch.cat([p.weight for p in qkv]),
                     None if a.q_proj.bias is None else torch.cat([p.bias for p in qkv]), norms,
                     *(F.pad(x.flatten(0, 1), (0, 0, 0, T)) for x in (keys, values)),     # (B·kv, S + T, d)
                     a.o_proj.weight, layer.post_attention_layernorm.weight,
                     torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), mlp.down_proj.weight)
            self.layers.append([None if part is None else part.to(dtype) for part in parts])
    def step(self, x, t):
        """Hidden rows (B, H) after token t (a (1,) tensor) with embeddings x (B, H)."""
        at, B, d, x = self.S + t, len(x), self.rotary.shape[1] // 2, x.to(self.dtype)
        self.bias.index_fill_(2, at, 0.0)                                            # (B·kv, 1, S + T)
        cos, sin = F.embedding(self.first + t, self.rotary)[:, None].chunk(2, dim=2)         # (B, 1, d)
        for norm1, qkv, bias, norms, keys, values, o, norm2, gate_up, down in self.layers:
            y = F.linear(F.rms_norm(x, x.shape[-1:], norm1, self.eps), qkv, bias).view(B, -1, d)
            qk, v = y.split([self.heads + self.kv_heads, self.kv_heads], dim=1)              # (B, heads, d)
            qk = qk if norms is None else F.rms_norm(qk, (d,), None, self.eps) * norms
            qk = qk * cos + torch.cat([-qk[..., d // 2:], qk[..., :d // 2]], dim=2) * sin
            q, k = qk.split([self.heads, self.kv_heads], dim=1)
            keys.index_copy_(1, at, k.reshape(-1, 1, d))
            values.index_copy_(1, at, v.reshape(-1, 1, d))
            # Query heads that share a key head take the place of query positions. Written out: for one
            # position PyTorch's own attention takes three times as long on a CPU.
            q = q.reshape(B * self.kv_heads, -1, d)                                          # (B·kv, g, d)
            scores = torch.baddbmm(self.bias, q, keys.mT, alpha=d**-0.5)                 # (B·kv, g, S + T)
            y = torch.bmm(scores.softmax(dim=2, dtype=torch.float32).to(self.dtype), values)
            x = x + F.linear(y.view(B, -1), o)
            gate, up = F.linear(F.rms_norm(x, x.shape[-1:], norm2, self.eps), gate_up).chunk(2, dim=-1)
            x = x + F.linear(self.act(gate) * up, down)
        return F.rms_norm(x, x.shape[-1:], self.norm, self.eps)

@torch.no_grad()
def self_check(model, waveforms, languages):
    """Does the model agree with itself? Its greedy transcripts of a few clips, scored by teacher forcing. →
    dict: nll, nats a token; agreement, the share of tokens that are the likeliest of their row;
    batch_difference, the largest of a logit between clips in a batch and one by one, over the largest logit.
    InputError where shifted rows or a leaking batch show: a greedy token's likelihood is at least 1 / V."""
    device, allowed, was_training = model.forbidden.device, ~model.forbidden, model.training
    model.eval()
    batch = model.with_languages(collate(waveforms, model.front_end, languages).to(device))
    rollout = model.sample(batch, 32, k=1)
    alone = [(collate([wave], model.front_end, batch.languages[b:b + 1]).to(device),
              Rollout(*(x[b:b + 1] for x in vars(rollout).values()))) for b, wave in enumerate(waveforms)]
    together, alone = (torch.cat([model.head(model(*pair)[0]).float()[:, allowed] for pair in pairs])
                       for pairs in ([(batch, rollout)], alone))
    tokens = (allowed.cumsum(0) - 1)[rollout.ids[rollout.row_mask()]][:, None]             # among the allowed
    largest, log_p = together.abs().max(), together.log_softmax(1).gather(1, tokens)       # (N, 1)
    tolerance = 0.1 if model.head.weight.dtype in (torch.bfloat16, torch.float16) else 1e-3
    likeliest = together.gather(1, tokens) >= together.amax(1, True) - tolerance * largest
    found = dict(nll=-log_p.mean().item(), agreement=likeliest.float().mean().item(),
                 batch_difference=((together - alone).abs().max() / largest).item())
    if not (found["nll"] <= math.log(together.shape[1]) + tolerance and found["agreement"] >= 0.95
            and found["batch_difference"] <= tolerance):
        raise InputError(f"self-check: {type(model.net).__name__} contradicts itself: prompt, rows or masks "
                         f"are misaligned: {found}; sound: ≤ log V, ≥ 0.95, ≤ {tolerance:g}")
    model.train(was_training)
    return found

def check_languages(clips, *models):
    """Raises InputError where a manifest names a language that a model's prompt cannot."""
    known = [set(model.front_end.languages) for model in models if model.front_end.languages]
    for clip in clips:
        if clip.language and not all(language_code(clip.language) in codes for codes in known):
            raise InputError(f'{clip.where}: "language" is {clip.language!r}, which Qwen3-ASR does not know; '
                             f"it takes {', '.join(sorted(LANGUAGES))} or nothing")

def positions_of(mask):
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)

# ---- Loss: union-support KL (paper Eq. 1) ------------------------------------------------------------------
@dataclasses.dataclass
class Alignment:
    """Ids of one vocabulary in the other, by identical token string; −1 where there is none."""
    to_teacher: torch.Tensor        # (V_student,)
    to_student: torch.Tensor        # (V_teacher,)
    student_forbidden: torch.Tensor   # (V_student,) bool: forbidden in the student, or without a counterpart
    teacher_forbidden: torch.Tensor   # (V_teacher,) bool, likewise

def align_vocabularies(student, teacher):
    """`Alignment`; InputError where over 1 % of the student's text tokens have no counterpart."""
    student_vocab, teacher_vocab = (model.front_end.tokenizer.get_vocab() for model in (student, teacher))
    student_forbidden, teacher_forbidden = student.forbidden.tolist(), teacher.forbidden.tolist()
    pairs = {i: teacher_vocab[token] for token, i in student_vocab.items() if token in teacher_vocab
             and not student_forbidden[i] and not teacher_forbidden[teacher_vocab[token]]}
    pairs[student.front_end.stop_id] = teacher.front_end.stop_id
    to_teacher = torch.full((len(student_forbidden),), -1)
    to_student = torch.full((len(teacher_forbidden),), -1)
    student_ids, teacher_ids = torch.tensor(list(pairs)), torch.tensor(list(pairs.values()))
    to_teacher[student_ids], to_student[teacher_ids] = teacher_ids, student_ids
    text_ids, matched = len(student_forbidden) - sum(student_forbidden), len(pairs)
    if matched < 0.99 * text_ids:
        raise InputError(f"--student, --teacher: only {matched} of the student's {text_ids} text tokens are "
                         "in the teacher's vocabulary; distillation compares token by token: one tokenizer")
    maps = (to_teacher, to_student, to_teacher < 0, to_student < 0)
    return Alignment(*(x.to(student.forbidden.device) for x in maps))

def teacher_rollout(rollout, alignment):
    """The same transcripts in the teacher's ids (padding becomes id 0; it is never read)."""
    return Rollout(alignment.to_teacher[rollout.ids].clamp(min=0), rollout.lens, rollout.stopped)

def union_support(student_ids, teacher_ids):
    """U_t = S_t ∪ T_t without duplicates and invalid ids (Eq. 1): (N, K), (N, K) int64, ids < 0 invalid →
    support_ids (N, 2K) int64, −1 where not counted; support_mask (N, 2K) bool, True = counted."""
    ids = torch.cat([student_ids, teacher_ids], dim=1).sort(dim=1).values
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    support_mask = first & (ids >= 0)
    return ids.masked_fill(~support_mask, -1), support_mask

def support_kl(student_logits, teacher_logits, support_mask, temperature=1.0):
    """KL(teacher ‖ student) on the support, both renormalised there (Eq. 1): τ² Σ_u p_u (log p_u − log q_u).
    student_logits, teacher_logits: (N, U) raw scores, p = softmax_U(teacher/τ), q = softmax_U(student/τ);
    support_mask: (N, U) bool. → kl (N,) nats × τ², float32 (float64 if an input is); counted (N,) bool, rows
    with at least two valid entries. Other rows are 0 and give no gradient. The teacher gets none either."""
    dtype = torch.float64 if torch.float64 in (student_logits.dtype, teacher_logits.dtype) else torch.float32
    counted = support_mask.sum(dim=1) >= 2
    keep = support_mask & counted[:, None]
    # −inf removes an entry from the softmax; rows that are not counted get zeros, so that nothing is NaN.
    outside = torch.zeros_like(keep, dtype=dtype).masked_fill(counted[:, None], -math.inf)
    log_p = torch.where(keep, teacher_logits.detach().to(dtype) / temperature, outside).log_softmax(dim=1)
    log_q = torch.where(keep, student_logits.to(dtype) / temperature, outside).log_softmax(dim=1)
    p = log_p.exp()
    difference = log_p.masked_fill(p == 0, 0) - log_q.masked_fill(p == 0, 0)          # 0 log 0 = 0
    return temperature ** 2 * (p * difference).sum(dim=1) * counted, counted

@torch.no_grad()
def teacher_support(teacher, hidden, student_topk, alignment, k, chunk=1024):
    """The union support of every row and the teacher's scores on it: (N, H') teacher rows, (N, K) student ids
    → support_ids, support_mask (N, 2K), teacher's raw logits (N, 2K) float32, teacher's top-k (N, K), all in
    student ids, −1 invalid. `chunk` rows at a time reach the head, so no (N, V) tensor is kept."""
    parts = []
    for rows, student_ids in zip(hidden.split(chunk), student_topk.split(chunk)):
        logits = teacher.head(rows).float().masked_fill(alignment.teacher_forbidden, -math.inf)  # (chunk, V')
        top = logits.topk(min(k, logits.shape[1]))
        teacher_ids = torch.where(top.values.isfinite(), alignment.to_student[top.indices], -1)
        support_ids, support_mask = union_support(student_ids, teacher_ids)
        scores = logits.gather(1, alignment.to_teacher[support_ids.clamp(min=0)].clamp(min=0))
        parts.append((support_ids, support_mask, scores, teacher_ids))
    return tuple(torch.cat(column) for column in zip(*parts))

class SupportScores(torch.autograd.Function):
    """scores[n, u] = weight[ids[n, u]] · hidden[n]: (V, H), (N, H), (N, U) → (N, U) float32, a chunk of rows
    at a time, so that the gathered rows (N, U, H) are never there at once, in backward neither."""
    @staticmethod
    def chunks(hidden, ids):
        return range(0, len(ids), size := max(2**20 // max(ids.shape[1] * hidden.shape[1], 1), 1)), size
    @staticmethod
    def forward(ctx, weight, hidden, ids):
        ctx.save_for_backward(weight, hidden, ids)
        scores, (starts, n) = hidden.new_empty(ids.shape), SupportScores.chunks(hidden, ids)
        for i in starts:
            rows = F.embedding(ids[i:i + n], weight).to(hidden.dtype)
            scores[i:i + n] = torch.einsum("nuh,nh->nu", rows, hidden[i:i + n])
        return scores
    @staticmethod
    def backward(ctx, grad):
        weight, hidden, ids = ctx.saved_tensors
        grad_weight, grad_hidden = torch.zeros_like(weight, dtype=hidden.dtype), torch.empty_like(hidden)
        starts, n = SupportScores.chunks(hidden, ids)
        for i in starts:
            g, rows = grad[i:i + n], ids[i:i + n]
            grad_hidden[i:i + n] = torch.einsum("nu,nuh->nh", g, F.embedding(rows, weight).to(hidden.dtype))
            grad_weight.index_add_(0, rows.flatten(), (g[:, :, None] * hidden[i:i + n, None]).flatten(0, 1))
        return grad_weight.to(weight.dtype), grad_hidden, None

def student_scores(head_weight, hidden, support_ids):
    """Raw logits of the support only: (V, H) output matrix, (N, H) rows, (N, U) ids → (N, U), float32
    (float64 if the matrix is). No (N, V) tensor is made."""
    dtype = torch.promote_types(head_weight.dtype, torch.float32)
    return SupportScores.apply(head_weight, hidden.to(dtype), support_ids.clamp(min=0))

def full_kl(student, student_hidden, teacher, teacher_hidden, alignment, temperature=1.0, chunk=256):
    """`support_kl` over all ids that both models may write, exact: (N, H), (N, H') rows → kl, counted (N,).
    The logits of `chunk` rows at a time, computed again in backward."""
    def part(student_rows, teacher_rows):
        with torch.no_grad():
            teacher_logits = teacher.head(teacher_rows).float()[:, alignment.to_teacher.clamp(min=0)]
        return support_kl(student.head(student_rows).float(), teacher_logits,
                          ~alignment.student_forbidden.expand(len(teacher_rows), -1), temperature)

    parts = [checkpoint(part, *rows, use_reentrant=False)
             for rows in zip(student_hidden.split(chunk), teacher_hidden.split(chunk))]
    return tuple(torch.cat(column) for column in zip(*parts))

def speed_options(model, compiled, checkpointed):
    """torch.compile of encoder and LM; activations recomputed in backward. Neither changes results."""
    if checkpointed:
        model.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if compiled:
        model.encoder.compile(dynamic=True)
        model.lm.compile(dynamic=True)

# ---- Optimizer, schedule, checkpoints ----------------------------------------------------------------------
def make_optimizer(modules, lr, weight_decay):
    """AdamW (0.9, 0.95), no decay on norms, biases, embeddings. A tied matrix counts once."""
    decay, no_decay = [], []
    for name, p in modules.named_parameters():
        (no_decay if p.ndim < 2 or "embed_tokens" in name or "lm_head" in name else decay).append(p)
    groups = [dict(params=decay, weight_decay=weight_decay), dict(params=no_decay, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    for p in (*decay, *no_decay):                                   # now, so that memory shows from the start
        optimizer.state[p] = dict(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p),
                                  exp_avg_sq=torch.zeros_like(p))
    return optimizer

def cosine_lr(step, steps, warmup_steps, lr):
    """Learning rate of update `step` (from 0): linear warm-up, then a cosine to 0 at `steps`."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))

def shard(model, bf16):
    """Shards a student over the ranks (FSDP2): float32 shards and gradients, compute in bf16 if asked; a
    layer is whole only while it works. → its whole copy, in compute precision, for all that has no gradient;
    without torchrun the model itself. Gradients are summed: the loss is divided by global counts."""
    if not dist.is_initialized():
        return model
    actor = copy.deepcopy(model).to(torch.bfloat16 if bf16 else torch.float32).eval().requires_grad_(False)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for module in (*model.encoder.layers, *model.lm.layers, model):
        fully_shard(module, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return actor

def whole(tensor):
    """A sharded tensor whole, on every rank at once; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

@torch.no_grad()
def refresh(actor, model):
    """Copies the weights of a sharded model that has trained a step, layer by layer, to its whole copy."""
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            for key, p in module.named_parameters(prefix=name):
                if not isinstance(p, DTensor):                  # the others are layers with their own shards
                    actor.get_parameter(key).copy_(p)
            module.reshard()

def training_state(model, optimizer):
    """Weights and AdamW's moments by the parameters' names, sharded as they are, for DCP to fill or save."""
    named = dict(model.named_parameters())
    return dict(step=torch.zeros(()), model={name: p.detach() for name, p in named.items()},
                **{key: {name: optimizer.state[p][key] for name, p in named.items()}
                   for key in ("exp_avg", "exp_avg_sq")})

def link_latest(out, name):
    """Leads checkpoints/latest to the checkpoint `name`, and out/model through it, each at one stroke."""
    for path, target in (("model", "checkpoints/latest/model"), ("checkpoints/latest", name)):
        path = os.path.join(out, path)
        if os.path.lexists(path + ".new"):
            os.remove(path + ".new")
        os.symlink(target, path + ".new")
        os.replace(path + ".new", path)

def save_checkpoint(out, step, model, optimizer, keep=2):
    """Writes out/checkpoints/step-N: `model`, a Hugging Face folder, and `state`, torch's distributed
    checkpoint (DCP), from which any number of ranks can go on. All ranks call it; one tensor at a time is
    whole. Complete or not at all: written beside and renamed, then the link checkpoints/latest is replaced.
    The last `keep` stay. Raises InputError where it cannot be written; those before it stay."""
    rank, folder = rank_and_world()[0], os.path.join(out, "checkpoints")
    final = os.path.join(folder, f"step-{step:07d}")
    if os.path.realpath(os.path.join(folder, "latest")) == os.path.realpath(final):
        return
    partial, problem, weights, found = final + ".partial", None, {}, {}
    for name, p in model.net.state_dict(keep_vars=True).items():        # a tied matrix stays one tensor
        if p not in found:
            found[p] = (whole(p.detach()).cpu() if rank == 0 else whole(p.detach())[:0].clone())
        weights[name] = found[p]
    state = training_state(model, optimizer)
    state["step"] += step
    try:
        if rank == 0:
            for leftover in (*glob.glob(os.path.join(glob.escape(folder), "*.partial")), final):
                shutil.rmtree(leftover, ignore_errors=True)
        barrier()
        dcp.save(state, checkpoint_id=os.path.join(partial, "state"))
        if rank == 0:
            model.save_pretrained(os.path.join(partial, "model"), weights)
            os.rename(partial, final)
            link_latest(out, os.path.basename(final))
            steps = sorted(name for name in os.listdir(folder) if re.fullmatch(r"step-\d+", name))
            here = steps.index(os.path.basename(final)) + 1
            for name in (*steps[:max(here - keep, 0)], *steps[here:]):          # later ones: of a cut-off run
                shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
    except (Exception, CheckpointException) as error:       # disk full, quota, …, whatever a library says
        problem = next(iter(getattr(error, "failures", {0: [error]}).values()))[0]
        while problem.__context__ is not None:              # to what came first
            problem = problem.__context__
        shutil.rmtree(partial, ignore_errors=True)
    if all_reduce_sum([problem is not None], model.forbidden.device)[0]:
        raise InputError(f"checkpoint {final} could not be written: {one_line(problem or '')}; those "
                         "before it are intact: free some space, then --resume auto")

def load_checkpoint(folder, model, optimizer):
    """Restores weights and optimizer from a checkpoint's `state`, and lost links; InputError on a misfit."""
    state = training_state(model, optimizer)
    try:
        dcp.load(state, checkpoint_id=os.path.join(folder, "state"))
    except (Exception, CheckpointException) as error:
        raise InputError(f"--resume auto: {folder} does not fit this run: {one_line(error)}") from error
    for moments in optimizer.state.values():
        moments["step"].copy_(state["step"])
    out = os.path.dirname(os.path.dirname(folder))
    if rank_and_world()[0] == 0 and not os.path.exists(os.path.join(out, "model")):
        link_latest(out, os.path.basename(folder))
