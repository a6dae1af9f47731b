"""Speech-LMs, their sampling, and the loss of on-policy distillation (arXiv 2605.28139).

    mel (B, 128, F) → Encoder → frames (B, T', D) → four merged → Adapter → audio embeddings (ΣA, H)
        → in the prompt's placeholders → Qwen LM → hidden rows (N, H) → head → logits (N, V)

Legend, used in all files:
    B  clips of a batch                N  rows: scored (clip, position) pairs of a batch, clip by clip
    S  prompt tokens                   K  top-k ids of a model at a row
    T  transcript tokens               U  ids of a support: the union of two top-k has at most 2K
    A  audio tokens, 12.5 a second     V  vocabulary: rows of the LM's output matrix
    F  mel frames, 100 a second        H  hidden size of the LM
    T' encoder frames, 50 a second     D  hidden size of the encoder
    d  size of an attention head       L  columns that a position may attend to

Order: encoder and adapter, the LM, prompts and token ids, the speech-LM, sampling, Qwen3-ASR, model folders,
the loss, vocabularies and self-check, LoRA, optimizer and checkpoints.
"""

import contextlib
import dataclasses
import errno
import functools
import glob
import math
import os
import re
import shutil
import sysconfig

import huggingface_hub
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import data

transformers.utils.logging.disable_progress_bar()

# ----------------------------------------------------------------------------------------------------------
# Encoder and adapter
# ----------------------------------------------------------------------------------------------------------
# The names of modules and parameters are those of stock transformers' GlmAsr, so that the saved folder is
# stock. What stock lacks is the key mask: there, a clip's embeddings depend on its batch mates' lengths.


class EncoderAttention(nn.Module):
    """Self-attention with rotary positions on the first half of each head's dimensions."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.n_heads = config.num_attention_heads
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D, bias=False)
        self.v_proj = nn.Linear(D, D)
        self.o_proj = nn.Linear(D, D)

    def forward(self, x, rotary, key_mask):
        """x (B, T', D), rotary: cos and sin (T', r), key_mask (B, 1, 1, T') True = attended → (B, T', D)."""
        B, n_frames, D = x.shape
        q = self.q_proj(x).view(B, n_frames, self.n_heads, -1).transpose(1, 2)  # (B, heads, T', d)
        k = self.k_proj(x).view(B, n_frames, self.n_heads, -1).transpose(1, 2)
        v = self.v_proj(x).view(B, n_frames, self.n_heads, -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(rotate(q, *rotary), rotate(k, *rotary), v, attn_mask=key_mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, n_frames, D))


class EncoderMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size)
        self.self_attn = EncoderAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size)
        self.mlp = EncoderMLP(config)

    def forward(self, x, rotary, key_mask):
        x = x + self.self_attn(self.input_layernorm(x), rotary, key_mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Encoder(nn.Module):
    """Whisper's encoder with rotary instead of absolute positions: mel (B, 128, F) → frames (B, T', D).

    A clip's frames do not depend on its batch mates. The mel is exactly 0 beyond a clip's own frames, which
    is what the convolutions pad with, and frames beyond frame_lens (B,) are masked as keys.
    """

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.conv1 = nn.Conv1d(config.num_mel_bins, D, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(D, D, kernel_size=3, stride=2, padding=1)
        self.layers = nn.ModuleList([EncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(D)  # the paper's adapter begins with it; stock counts it to the encoder
        self.rotary_theta = config.rope_parameters["rope_theta"]
        head_size = D // config.num_attention_heads
        self.rotary_size = int(head_size * config.rope_parameters["partial_rotary_factor"])

    def forward(self, mel, frame_lens):
        x = F.gelu(self.conv1(mel))  # (B, D, F)
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # (B, T', D), T' = (F + 1) // 2
        positions = torch.arange(x.shape[1], device=x.device)
        rotary = rotary_table(positions, self.rotary_size, self.rotary_theta, x.dtype)
        key_mask = (positions < frame_lens[:, None])[:, None, None, :]  # (B, 1, 1, T')
        for layer in self.layers:
            x = layer(x, rotary, key_mask)
        return self.norm(x)


class Adapter(nn.Module):
    """MLP from four merged encoder frames to the LM's embeddings: (ΣA, 4D) → (ΣA, H)."""

    def __init__(self, config):
        super().__init__()
        H = config.text_config.hidden_size
        self.linear_1 = nn.Linear(4 * config.audio_config.hidden_size, 2 * H)
        self.linear_2 = nn.Linear(2 * H, H)

    def forward(self, merged):
        return self.linear_2(F.gelu(self.linear_1(merged)))


def rotary_table(positions, size, theta, dtype):
    """cos and sin (…, size) of positions (…) · theta^(−2i / size), each frequency twice."""
    exponents = torch.arange(0, size, 2, device=positions.device).float() / size
    angles = positions.float()[..., None] * (1.0 / theta**exponents)  # (…, size / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Turns the first r dimensions of x (B, heads, n, d), as many as the table has: i with i + r / 2."""
    size = cos.shape[-1]
    unturned = x[..., :size]
    first, second = unturned.chunk(2, dim=-1)
    turned = unturned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, x[..., size:]], dim=-1) if size < x.shape[-1] else turned


# ----------------------------------------------------------------------------------------------------------
# The Qwen LM
# ----------------------------------------------------------------------------------------------------------
# Qwen2 and Qwen3, with the parameter names and the operations of stock transformers: in float32 on a CPU its
# hidden rows are stock's bit for bit. It stands here so that one forward serves training, the prompt and
# single tokens. Whatever sits on a module (a hook, LoRA, another class) is then in all three.


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        # torch's fused kernel wants one dtype. Under autocast q and k are bf16, but the weights are float32.
        return super().forward(x.to(self.weight.dtype))


def fused(function, x):
    """Returns a small function, or its compiled form where x (…, 1, size) is one token of a rollout on a GPU.

    There the number of kernels decides how long a token takes, and compiled it is one kernel, not several.
    """
    is_one_token = x.is_cuda and x.shape[-2] == 1 and not torch.is_grad_enabled()
    return compiled(function) if is_one_token else function


@functools.cache
def compiled(function):
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if shutil.which(os.environ.get("CC", "cc")) and os.path.exists(header):
        return torch.compile(function, dynamic=True)
    if data.rank_and_world()[0] == 0:
        print(f"{function.__name__} is not compiled: no C compiler or no {header}; rollouts take longer")
    return function


class QwenAttention(nn.Module):
    """Self-attention with rotary positions, in which several query heads may share a key head."""

    def __init__(self, config):
        super().__init__()
        H = config.hidden_size
        self.n_heads = config.num_attention_heads
        self.n_key_heads = config.num_key_value_heads
        self.d = getattr(config, "head_dim", None) or H // self.n_heads
        is_qwen2 = config.model_type == "qwen2"
        self.q_proj = nn.Linear(H, self.n_heads * self.d, bias=is_qwen2)
        self.k_proj = nn.Linear(H, self.n_key_heads * self.d, bias=is_qwen2)
        self.v_proj = nn.Linear(H, self.n_key_heads * self.d, bias=is_qwen2)
        self.o_proj = nn.Linear(self.n_heads * self.d, H, bias=False)
        self.q_norm = nn.Identity() if is_qwen2 else RMSNorm(self.d, config.rms_norm_eps)
        self.k_norm = nn.Identity() if is_qwen2 else RMSNorm(self.d, config.rms_norm_eps)

    def forward(self, x, rotary, mask, cache=None, columns=None):
        """x (B, n, H) → (B, n, H); the other arguments are those of `QwenLM.forward`, of this layer."""
        B, n, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, n, self.n_heads, self.d)).transpose(1, 2)  # (B, heads, n, d)
        k = self.k_norm(self.k_proj(x).view(B, n, self.n_key_heads, self.d)).transpose(1, 2)
        v = self.v_proj(x).view(B, n, self.n_key_heads, self.d).transpose(1, 2)
        q = fused(rotate, q)(q, *rotary)
        k = fused(rotate, k)(k, *rotary)
        if cache is not None:
            cache[0].index_copy_(2, columns, k.to(cache.dtype))
            cache[1].index_copy_(2, columns, v.to(cache.dtype))
            k, v = cache[..., : mask.shape[3], :]  # the columns that may be attended to

        n_shared = self.n_heads // self.n_key_heads
        if n == 1:
            # Query heads of one key head take the place of query positions, so that no key is repeated.
            q = q.reshape(B, self.n_key_heads, n_shared, self.d)
        else:
            k = k[:, :, None].expand(-1, -1, n_shared, -1, -1).flatten(1, 2)  # (B, heads, L, d)
            v = v[:, :, None].expand(-1, -1, n_shared, -1, -1).flatten(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.d**-0.5)
        y = y.reshape(B, self.n_heads, n, self.d).transpose(1, 2)
        return self.o_proj(y.flatten(2))


class QwenMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(fused(gated, x)(self.gate_proj(x), self.up_proj(x)))


def gated(gate, up):
    return F.silu(gate) * up


class QwenLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = QwenAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = QwenMLP(config)

    def forward(self, x, rotary, mask, cache=None, columns=None):
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache, columns)
        return x + self.mlp(self.post_attention_layernorm(x))


class QwenLM(nn.Module):
    """A Qwen2 or Qwen3 LM without its output matrix: embeddings (B, n, H) → hidden rows (B, n, H).

    config: stock transformers' Qwen2Config or Qwen3Config. Raises InputError for a setting that is not built.
    """

    def __init__(self, config):
        super().__init__()
        check_text_config(config)
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([QwenLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, embeds, rotary, mask, cache=None, columns=None):
        """Hidden rows at the n positions of `embeds`, the one forward of training and sampling.

        rotary: of `rotary`, for these positions. mask (B, 1, n, L): bool, True = attended; or float, 0
        = attended and −∞ = not. Without a cache the L columns are the n positions. cache: of `cache_shape`;
        keys and values are written into its columns (n,), and its first L columns are attended to.
        """
        x = embeds
        for i, layer in enumerate(self.layers):
            x = layer(x, rotary, mask, None if cache is None else cache[i], columns)
        return self.norm(x)

    def rotary(self, positions, dtype):
        """cos and sin (B, 1, n, d) of positions (B, n), the same for all heads."""
        theta = self.config.rope_parameters["rope_theta"]
        return rotary_table(positions[:, None], self.layers[0].self_attn.d, theta, dtype)

    def cache_shape(self, n_clips, n_columns):
        """(layers, 2, B, key heads, L, d): keys and values of L columns."""
        attention = self.layers[0].self_attn
        return (len(self.layers), 2, n_clips, attention.n_key_heads, n_columns, attention.d)


def check_text_config(config):
    """Raises InputError where the LM of a config is none of ours, with the key and its value."""
    if config.model_type not in ("qwen2", "qwen3"):  # which need not have the other keys
        raise data.InputError(f"text_config: model_type is {config.model_type!r}; the LM is Qwen2 or Qwen3")
    settings = {  # key → value, and the value that the LM here is built for
        "layer_types": (set(config.layer_types), {"full_attention"}),
        "rope_type": (config.rope_parameters.get("rope_type", "default"), "default"),
        "hidden_act": (config.hidden_act, "silu"),
        "attention_dropout": (config.attention_dropout, 0),
        "attention_bias": (getattr(config, "attention_bias", False), False),
    }
    for key, (value, built) in settings.items():
        if value != built:
            raise data.InputError(f"text_config: {key} is {value!r}; the LM here is built for {built!r}")


def causal_mask(mask):
    """(B, 1, L, L) bool from (B, L): a position attends to itself and to what is real before it."""
    L = mask.shape[1]
    return mask[:, None, None] & torch.ones(L, L, dtype=torch.bool, device=mask.device).tril()


def positions_of(mask):
    """Position ids of tokens that are padded on the left: the first real one has 0."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


# ----------------------------------------------------------------------------------------------------------
# Prompts and token ids
# ----------------------------------------------------------------------------------------------------------

STOP_TOKEN = "<|im_end|>"
PAD_TOKEN = "<|endoftext|>"
AUDIO_TOKEN = "<|audio|>"
PROMPT_TEXT = "Please transcribe this audio."
TOKENS_PER_SECOND = 25.0  # of a transcript, at most: fast Greek and Hindi need 22
PROMPT_TOKENS = ["<|user|>", "<|begin_of_audio|>", AUDIO_TOKEN, "<|end_of_audio|>", "<|assistant|>"]
PROMPT = f"<|user|><|begin_of_audio|>{AUDIO_TOKEN}<|end_of_audio|>{PROMPT_TEXT}<|assistant|>"
CONTEXT = "{context}"  # where a prompt gives the words of a clip's context
CONTEXT_PROMPT = PROMPT.replace(PROMPT_TEXT, f"{PROMPT_TEXT} Context: {CONTEXT}")
# The same prompt for stock transformers' processor: user turns, each content item in its place, no newlines.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<|user|>"
    "{% for part in message['content'] %}{% if part['type'] == 'audio' %}"
    "<|begin_of_audio|><|audio|><|end_of_audio|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclasses.dataclass
class Rollout:
    """Transcripts of B clips, as token ids.

    Row (b, t) is scored for t < lens[b], and at t = lens[b] where the rollout stopped by itself: the stop
    token is part of the transcript, and a transcript that the cap cut has none. Masks come from the
    lengths, never from `ids == pad`: the pad id may be a text's own end.
    """

    ids: torch.Tensor  # (B, T) int64; the stop token at [b, lens[b]] where stopped, padding behind
    lens: torch.Tensor  # (B,) transcript tokens, the stop token not counted
    stopped: torch.Tensor  # (B,) bool; False: cut by the cap

    def row_mask(self):
        """(B, T) bool, True = a scored row; `x[row_mask]` gives the N rows, clip by clip."""
        positions = torch.arange(self.ids.shape[1], device=self.ids.device)
        return positions < (self.lens + self.stopped)[:, None]

    def to(self, device):
        return Rollout(self.ids.to(device), self.lens.to(device), self.stopped.to(device))


class FrontEnd:
    """What our student wants to hear and read before the transcript: features, prompt, token ids.

    Small and without weights, so that data workers can carry it.
    """

    audio_token = AUDIO_TOKEN
    prompt_tokens = PROMPT_TOKENS
    frame_multiple = 8  # a batch's mel is padded to a multiple of this many frames
    languages = {}  # code → name as the prompt has it; empty: the prompt names no language
    features = staticmethod(data.log_mel)  # (samples,) → log-mel (128, F) of the clip alone
    n_audio_tokens = staticmethod(data.n_audio_tokens)

    def __init__(self, tokenizer, prompt=PROMPT, context_prompt=CONTEXT_PROMPT):
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in (*self.prompt_tokens, STOP_TOKEN, PAD_TOKEN) if token not in vocabulary]
        if missing:
            raise data.InputError(f"tokenizer {tokenizer.name_or_path}: no token(s) {' '.join(missing)}")
        self.tokenizer = tokenizer
        self.pad_id = vocabulary[PAD_TOKEN]
        self.stop_id = vocabulary[STOP_TOKEN]
        self.audio_id = vocabulary[self.audio_token]
        self.template_ids = self.token_ids(prompt)  # one placeholder
        self.context_prompt = context_prompt
        # Added tokens, longest first, to find them written out in a text. `split` keeps a group.
        added = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values()]
        added.sort(key=len, reverse=True)
        self.added_tokens = re.compile(f"({'|'.join(added)})")

    def prompt(self, n_audio, language=None, context=None):
        """Prompt ids (S,) with n_audio placeholders. Our student's prompt names no language."""
        ids = self.template_ids
        if context is not None and context.strip() != "":
            # Stock processors tokenise the text between two control tokens in one piece, so the words before
            # the context must not be tokenised apart from it.
            before, after = self.context_prompt.split(CONTEXT)
            words = self.added_tokens.split(before)[-1]
            ids = self.token_ids(before.removesuffix(words)) + self.encode_text(words + context)
            ids = ids + self.token_ids(after)
        place = ids.index(self.audio_id)
        return ids[:place] + [self.audio_id] * n_audio + ids[place + 1 :]

    def token_ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode_text(self, text):
        """Token ids of a text. A control token written out in it stays text: it is cut behind its "<"."""
        ids = []
        for piece in self.added_tokens.split(text):
            if self.added_tokens.fullmatch(piece):
                ids += self.token_ids(piece[:1])
                piece = piece[1:]
            ids += self.token_ids(piece)
        return ids

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def texts(self, rollout):
        """The transcripts of a rollout as B strings."""
        lens = rollout.lens.tolist()
        return [self.decode(ids[:n]) for ids, n in zip(rollout.ids.tolist(), lens)]

    def transcripts(self, texts, stopped=None):
        """The `Rollout` of given texts, for teacher forcing; stopped: B bools, False = no stop token."""
        rows = [torch.tensor([*self.encode_text(text), self.stop_id]) for text in texts]
        lens = torch.tensor([len(row) - 1 for row in rows])
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_id)
        stopped = torch.ones(len(texts), dtype=torch.bool) if stopped is None else torch.tensor(stopped)
        return Rollout(ids, lens, stopped)


class Qwen3ASRFrontEnd(FrontEnd):
    """The same of Qwen3-ASR: another length rule, its own chat template, and a language in the prompt.

    The prompt ends with `language English<asr_text>`, which the model would otherwise write itself.
    """

    audio_token = "<|audio_pad|>"
    prompt_tokens = ["<|im_start|>", "<|audio_start|>", audio_token, "<|audio_end|>", "<asr_text>"]
    frame_multiple = 100  # its convolutions see chunks of one second

    def __init__(self, processor):
        from transformers.models.qwen3_asr.processing_qwen3_asr import LANGUAGE_CODE_TO_NAME  # slow to import

        system = {"role": "system", "content": [{"type": "text", "text": CONTEXT}]}
        user = {"role": "user", "content": [{"type": "audio", "audio": ""}]}
        prompt = processor.apply_chat_template([system, user], tokenize=False, add_generation_prompt=True)
        super().__init__(processor.tokenizer, prompt.replace(CONTEXT, ""), context_prompt=prompt)
        self.languages = LANGUAGE_CODE_TO_NAME

    def features(self, waveform):
        return data.log_mel(waveform, max(len(waveform), 8_000))  # half a second at least

    def n_audio_tokens(self, n_samples):
        """13 for each full second; the rest is halved three times, rounding up."""
        full, rest = divmod(max(n_samples, 8_000) // data.HOP, 100)
        return 13 * full + math.ceil(rest / 8)

    def prompt(self, n_audio, language=None, context=None):
        name = self.languages[language]
        return super().prompt(n_audio, context=context) + self.token_ids(f"language {name}<asr_text>")


def forbidden_ids(tokenizer, vocab_size, stop_id):
    """(V,) bool, True = never in a transcript: special and added `<…>` tokens but the stop, unused rows."""
    forbidden = torch.ones(vocab_size, dtype=torch.bool)
    forbidden[list(tokenizer.get_vocab().values())] = False
    forbidden[tokenizer.all_special_ids] = True
    for i, token in tokenizer.added_tokens_decoder.items():
        if re.fullmatch("<.*>", token.content):
            forbidden[i] = True
    forbidden[stop_id] = False
    return forbidden


# ----------------------------------------------------------------------------------------------------------
# The speech-LM
# ----------------------------------------------------------------------------------------------------------


class SpeechLM(nn.Module):
    """Encoder, adapter and a Qwen causal LM: our student. Every such model is also a teacher.

    The state dict is stock GlmAsr's: model.audio_tower.*, model.multi_modal_projector.*,
    model.language_model.*, lm_head.weight. Stock transformers loads the saved folder without this project.
    """

    architecture = "GlmAsrForConditionalGeneration"

    def __init__(self, config, tokenizer):
        """Random weights. config: a transformers GlmAsrConfig whose ids are those of the tokenizer."""
        super().__init__()
        audio = config.audio_config
        text = config.text_config
        if audio.num_mel_bins != data.N_MELS or audio.num_key_value_heads != audio.num_attention_heads:
            raise data.InputError(f"the encoder wants {data.N_MELS} mel bins and as many key as query heads")
        if audio.intermediate_size != 4 * audio.hidden_size:
            raise data.InputError("the encoder's intermediate_size is not four frames, 4 × hidden_size")
        # A ModuleDict, because stock's names begin with "model."; its parts are read by the properties below.
        self.model = nn.ModuleDict()
        self.model["audio_tower"] = Encoder(audio)
        self.model["multi_modal_projector"] = Adapter(config)
        self.model["language_model"] = QwenLM(text)
        # New weights: matrices are normal, biases 0. Norms are born as 1.
        for name, parameter in self.named_parameters():
            part = audio if name.startswith("model.audio_tower.") else text
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=part.initializer_range)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.lm.embed_tokens.weight
        else:
            nn.init.normal_(self.lm_head.weight, std=text.initializer_range)
        self.set_up(config, FrontEnd(tokenizer))

    def set_up(self, config, front_end):
        """What every speech-LM has beside its modules."""
        self.config = config
        self.config.tie_word_embeddings = self.lm_head.weight is self.lm.embed_tokens.weight
        self.front_end = front_end
        self.bf16 = False  # compute in bf16 by autocast; the weights stay as they are
        self.bf16_copies = {}  # (module, name of a parameter) → its copy, see `bf16_weights`
        self.free_decoders()
        self.peft_models = []  # peft's wrapper after `add_lora`, in a list: it is no part of this module
        vocab_size = config.text_config.vocab_size
        n_tokens = len(front_end.tokenizer)
        if config.audio_token_id != front_end.audio_id or vocab_size < n_tokens:
            ours = f"audio token {config.audio_token_id} and {vocab_size} rows"
            raise data.InputError(f"model and tokenizer differ: {ours}, {front_end.audio_id} and {n_tokens}")
        forbidden = forbidden_ids(front_end.tokenizer, vocab_size, front_end.stop_id)
        self.register_buffer("forbidden", forbidden, persistent=False)  # (V,)

    # ---- the parts, by properties: an attribute would put every tensor into the state dict twice ----

    @property
    def encoder(self):
        return self.model.audio_tower

    @property
    def adapter(self):
        return self.model.multi_modal_projector

    @property
    def lm(self):
        return self.model.language_model

    @property
    def head(self):
        return self.lm_head

    @property
    def device(self):
        return self.forbidden.device

    def autocast(self, cache_enabled=True):
        """The context of compute precision. Every method that computes enters it by itself."""
        return torch.autocast(self.device.type, torch.bfloat16, self.bf16, cache_enabled)

    # ---- folder in, folder out ----

    @staticmethod
    def from_pretrained(name, dtype=torch.float32):
        """A model from a folder or the hub: by config.json a `SpeechLM` or a `Qwen3ASR`, weights in `dtype`.

        Raises InputError that says what is missing, or which command converts the folder.
        """
        folder = local_folder(name)
        kind = model_kind(name, folder)
        try:
            speech_lm = {"glmasr": SpeechLM, "qwen3_asr": Qwen3ASR}[kind].load(folder, dtype)
        except data.InputError as error:
            raise data.InputError(f"{name}: {error}") from None
        except (OSError, ValueError, AttributeError) as error:
            absent = [file for file in BESIDE_WEIGHTS[kind] if not os.path.exists(os.path.join(folder, file))]
            if not absent:
                raise
            raise data.InputError(f"{name} has no {absent[0]}; copy it from the model's source") from error
        for key, parameter in speech_lm.named_parameters():
            if not parameter.isfinite().all():
                raise data.InputError(f"{name}: {key} holds NaN or infinite weights")
        return speech_lm

    @classmethod
    def load(cls, folder, dtype):
        config = transformers.GlmAsrConfig.from_pretrained(folder)
        text = data.read_json(os.path.join(folder, "config.json")).get("text_config", {})
        if "rope_theta" in text and "rope_parameters" not in text:  # transformers 5 would take 10,000
            rope = f'"rope_parameters": {{"rope_theta": {text["rope_theta"]}, "rope_type": "default"}}'
            raise data.InputError(f"config.json: rope_theta is not read in text_config; write {rope}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        weights = {}
        for path in weight_files(folder):
            weights.update(load_file(path))
        embeddings = weights.get("model.language_model.embed_tokens.weight")
        if config.tie_word_embeddings and embeddings is not None:
            # A head of its own is kept, whatever the flag says.
            head = weights.setdefault("lm_head.weight", embeddings)
            config.tie_word_embeddings = torch.equal(head, embeddings)
        model = cls(config, tokenizer).to(dtype)
        model.load_state_dict(weights)  # all of them and no other; torch's error names what does not fit
        return model

    def save_pretrained(self, folder):
        """Writes a folder that stock transformers loads: weights, configs, tokenizer, processor."""
        os.makedirs(folder, exist_ok=True)
        weights = merged_weights(self)
        if self.config.tie_word_embeddings:
            weights.pop("lm_head.weight")
        save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        self.config.architectures = [self.architecture]
        self.config.dtype = self.head.weight.dtype
        self.config.save_pretrained(folder)
        self.generation_config().save_pretrained(folder)
        self.processor().save_pretrained(folder)

    def generation_config(self):
        """Settings with which stock `generate` stops where we do and writes no control token."""
        return transformers.GenerationConfig(
            eos_token_id=self.front_end.stop_id,
            pad_token_id=self.front_end.pad_id,
            do_sample=False,
            suppress_tokens=self.forbidden.nonzero()[:, 0].tolist() or None,
        )

    def processor(self):
        return transformers.GlmAsrProcessor(
            transformers.WhisperFeatureExtractor(feature_size=data.N_MELS),
            self.front_end.tokenizer,
            chat_template=CHAT_TEMPLATE,
            audio_token=AUDIO_TOKEN,
            default_transcription_prompt=PROMPT_TEXT,
        )

    def recompute_activations(self):
        """Keeps only the layers' inputs, and runs them again in the backward pass, with the same numbers."""
        for layer in (*self.encoder.layers, *self.lm.layers):
            layer.forward = functools.partial(recomputed, layer.forward)

    # ---- audio → embeddings → hidden rows ----

    def encode_frames(self, batch):
        """The encoder's frames (B, T', D), batch.mel_lens // 2 of them real."""
        with self.autocast():
            return self.encoder(batch.mel.to(self.head.weight.dtype), batch.mel_lens // 2)

    def encode(self, batch, frames=None):
        """Audio embeddings (ΣA, H) of all clips, one after the other: four frames, 80 ms, become a token."""
        frames = self.encode_frames(batch) if frames is None else frames
        B, n_frames, D = frames.shape
        merged = frames.reshape(B, n_frames // 4, 4 * D)
        positions = torch.arange(n_frames // 4, device=frames.device)
        is_audio = positions < batch.audio_lens[:, None]  # (B, T' / 4)
        with self.autocast():
            return self.adapter(merged[is_audio])

    def embed_prompt(self, batch, encoded):
        """Prompt embeddings (B, S, H), the placeholders' rows replaced by the audio embeddings (ΣA, H)."""
        embeds = self.lm.embed_tokens(batch.prompt_ids)
        is_audio = (batch.prompt_ids == self.front_end.audio_id) & batch.prompt_mask  # (B, S)
        assert len(encoded) == int(is_audio.sum()), "encoder and front end disagree on the audio tokens"
        return embeds.masked_scatter(is_audio[:, :, None], encoded.to(embeds.dtype))

    def forward(self, batch, rollout, encoded=None):
        """Teacher forcing: hidden rows (N, H) at the scored rows of `rollout`, clip by clip.

        Row (b, t) predicts token t of clip b: the last prompt column predicts token 0.
        encoded: the audio embeddings, where `encode` has been called for this batch already.
        """
        encoded = self.encode(batch) if encoded is None else encoded
        row_mask = rollout.row_mask()  # (B, T)
        S = batch.prompt_ids.shape[1]
        T = max(int(row_mask.sum(dim=1).max()), 1)
        with self.autocast():
            transcript = self.lm.embed_tokens(rollout.ids[:, : T - 1])
            embeds = torch.cat([self.embed_prompt(batch, encoded), transcript], dim=1)  # (B, S + T − 1, H)
            # Padding right of a transcript needs no mask: attention is causal, its rows are not read.
            mask = F.pad(batch.prompt_mask, (0, T - 1), value=True)
            hidden = self.lm(embeds, self.lm.rotary(positions_of(mask), embeds.dtype), causal_mask(mask))
        return hidden[:, S - 1 :][row_mask[:, :T]]

    def with_script_languages(self, batch, texts, default_language):
        """The batch with prompts in which a clip without a language has that of its text's script.

        texts: B strings, such as the student's rollouts. Other prompts stay as they are; ours names none.
        """
        if None not in batch.languages or not self.front_end.languages:
            return batch
        prompts = []
        for b, text in enumerate(texts):
            language = batch.languages[b] or data.script_language(text, default_language)
            prompts.append(self.front_end.prompt(int(batch.audio_lens[b]), language, batch.contexts[b]))
        prompt_ids, prompt_mask = data.pad_left(prompts, self.front_end.pad_id)
        return dataclasses.replace(batch, prompt_ids=prompt_ids, prompt_mask=prompt_mask).to(self.device)

    # ---- sampling ----

    @torch.no_grad()
    def sample(
        self,
        batch,
        max_new_tokens,
        temperature=0.0,
        tokens_per_second=TOKENS_PER_SECOND,
        forbidden=None,
        uniforms=None,
        encoded=None,
    ):
        """Writes a transcript of each clip. → `Rollout`

        Greedy at temperature 0, else drawn from softmax(logits / temperature). A clip's cap, its stop token
        counted, is min(max_new_tokens, ⌊seconds · tokens_per_second⌋ + 16), so that one looping rollout
        cannot hold the batch (tokens_per_second 0: max_new_tokens alone; not in the paper).
        forbidden: (V,) bool, the model's own by default. uniforms: (B, ≥ max_new_tokens) draws in [0, 1)
        that make sampling a function of them. encoded: what `encode` gave, if it has been called already.
        """
        was_training = self.training
        self.eval()
        forbidden = self.forbidden if forbidden is None else forbidden
        caps = torch.full_like(batch.audio_lens, max_new_tokens)  # (B,)
        if tokens_per_second > 0:
            caps = caps.minimum((batch.seconds * tokens_per_second).floor().long() + 16)
        assert uniforms is None or uniforms.shape[1] >= int(caps.max()), "uniforms: a draw for each token"
        if temperature > 0 and uniforms is None:
            uniforms = torch.rand(len(caps), max_new_tokens, dtype=torch.float64, device=caps.device)
        # Without autocast's cache: it is emptied at the end, and a captured graph would read freed memory.
        with self.autocast(cache_enabled=False), bf16_weights(self):
            encoded = self.encode(batch) if encoded is None else encoded
            ids = write_tokens(self, batch, encoded, caps, forbidden, temperature, uniforms)
        self.train(was_training)

        # A rollout ends at its first stop token or at its cap; what was written behind it is dropped.
        positions = torch.arange(ids.shape[1], device=ids.device)
        is_stop = ids == self.front_end.stop_id
        stop_at = torch.where(is_stop, positions, ids.shape[1]).amin(dim=1)  # (B,)
        n_rows = caps.minimum(stop_at + 1)  # (B,) with the stop token
        ids = ids.masked_fill(positions >= n_rows[:, None], self.front_end.pad_id)
        return Rollout(ids[:, : int(n_rows.max())], lens=stop_at.minimum(caps), stopped=stop_at < caps)

    def decoder(self, n_clips, n_columns, temperature):
        """The `Decoder` for this many clips and columns, both rounded up so that few are made.

        It is kept until `free_decoders`. All share one storage for keys and values, as large as the largest
        needs. On a GPU a hook on the LM runs only while a step is captured, and a module that is put on it
        later is not seen: call `free_decoders` then.
        """
        n_clips, n_columns = decoder_size(n_clips, n_columns)
        key = (n_clips, n_columns, temperature, self.bf16)
        if key not in self.decoders:
            dtype = torch.bfloat16 if self.bf16 else self.head.weight.dtype
            n_floats = math.prod(self.lm.cache_shape(n_clips, n_columns))
            if len(self.cache_storage) < n_floats or self.cache_storage.dtype != dtype:
                self.free_decoders()  # their graphs know the old place
                self.cache_storage = torch.zeros(n_floats, dtype=dtype, device=self.device)
            self.decoders[key] = Decoder(self, n_clips, n_columns, temperature, self.cache_storage)
        return self.decoders[key]

    def free_decoders(self):
        """Gives back the memory of sampling; the next rollout takes it anew."""
        self.decoders = {}
        self.cache_storage = torch.empty(0)
        self.graph_pool = None  # memory that the graphs share; none can be captured into that of deleted ones

    def _apply(self, *args, **kwargs):
        """Moves or converts the weights. Then a graph would read the old places."""
        self.free_decoders()
        self.bf16_copies = {}
        return super()._apply(*args, **kwargs)


def recomputed(forward, *args, **kwargs):
    """forward(…) of a layer, which is run once more in the backward pass."""
    if torch.is_grad_enabled():  # not while sampling: a captured graph must not read the random state
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)


@contextlib.contextmanager
def bf16_weights(speech_lm):
    """While it is open, the LM's linear layers and the head hold copies of their weights in bf16.

    Autocast would cast each weight anew for every token, with the same result. The copies are kept, and
    refreshed in place, so that a graph reads the weights of the last update. Without `bf16` nothing happens.
    """
    copies = speech_lm.bf16_copies
    places = []  # (module, name, weight)
    modules = (*speech_lm.lm.modules(), speech_lm.head) if speech_lm.bf16 else ()
    for module in modules:
        if type(module) is nn.Linear:
            for name, weight in module.named_parameters(recurse=False):
                places.append((module, name, weight))
    try:
        for module, name, weight in places:
            if (module, name) not in copies:
                empty = torch.empty_like(weight, dtype=torch.bfloat16)
                copies[module, name] = nn.Parameter(empty, requires_grad=False)
            copies[module, name].copy_(weight)
            setattr(module, name, copies[module, name])
        yield
    finally:
        for module, name, weight in places:
            setattr(module, name, weight)


def write_tokens(speech_lm, batch, encoded, caps, forbidden, temperature, uniforms):
    """The sampling loop: the prompt in one pass, then one token after another. → ids (B, T)

    A clip that has stopped goes on until all have; `sample` drops what is behind its stop token.
    """
    lm = speech_lm.lm
    B, S = batch.prompt_ids.shape
    T = int(caps.max())
    decoder = speech_lm.decoder(B, S + T, temperature)

    # The prompt. Its last column predicts the first token.
    decoder.begin(batch.prompt_mask, forbidden, uniforms)
    embeds = speech_lm.embed_prompt(batch, encoded)  # (B, S, H)
    rotary = lm.rotary(positions_of(batch.prompt_mask), embeds.dtype)
    columns = torch.arange(S, device=caps.device)
    cache = decoder.cache[:, :, :B]
    hidden = lm(embeds, rotary, causal_mask(batch.prompt_mask), cache, columns)[:, -1]
    decoder.pick_token(speech_lm, F.pad(hidden, (0, 0, 0, len(decoder.ids) - B)))

    ids = decoder.ids[:B, S : S + T]
    for n_written in range(1, T):
        # On a GPU, asking whether all clips have stopped waits for the device: only after every fourth token.
        if not ids.is_cuda or n_written % 4 == 0:
            has_stopped = (ids == speech_lm.front_end.stop_id).any(dim=1)
            if (has_stopped | (caps <= n_written)).all():
                break
        decoder.write_token(speech_lm)
    return ids


def decoder_size(n_clips, n_columns):
    """Clips rounded up to 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, …, and columns to a multiple of 64."""
    step = max(2 ** (n_clips.bit_length() - 2), 1)
    return step * math.ceil(n_clips / step), 64 * math.ceil(n_columns / 64)


class Decoder:
    """The state of the sampling loop, in tensors of fixed size, for up to B clips.

    Each of L columns is a position of a prompt or, behind it, of a transcript. A step works in place. So on a
    GPU, where launching its many small kernels takes longer than running them, it is captured as a CUDA graph
    once and then replayed. Capturing takes as long as many tokens, so the graph is kept, with its state. A
    clip or a column that is not used is masked.
    """

    def __init__(self, speech_lm, n_clips, n_columns, temperature, storage):
        lm = speech_lm.lm
        device = speech_lm.device
        shape = lm.cache_shape(n_clips, n_columns)
        self.temperature = temperature
        self.cache = storage[: math.prod(shape)].view(shape)
        self.column = torch.zeros(1, dtype=torch.long, device=device)  # of the last token
        self.ids = torch.zeros(n_clips, n_columns, dtype=torch.long, device=device)
        # A float mask, 0 = attended and −∞ = not: of a bool mask attention would make one in each layer.
        self.mask = torch.zeros(n_clips, 1, 1, n_columns, dtype=storage.dtype, device=device)
        self.positions = torch.zeros(n_clips, dtype=torch.long, device=device)  # of the last token
        all_positions = torch.arange(n_columns, device=device)[:, None]
        self.cos, self.sin = lm.rotary(all_positions, lm.embed_tokens.weight.dtype)  # (L, 1, 1, d)
        self.forbidden = torch.zeros_like(speech_lm.forbidden)
        self.uniforms = torch.zeros(n_clips, n_columns, dtype=torch.float64, device=device)
        self.graph = None
        self.n_rollouts = 0

    def begin(self, prompt_mask, forbidden, uniforms):
        """Sets the state to prompts (B, S) without a token behind them."""
        B, S = prompt_mask.shape
        self.n_rollouts += 1
        self.cache.zero_()  # what is masked counts 0 times, and 0 · NaN would be NaN
        self.column.fill_(S - 1)
        self.ids.fill_(-1)
        self.mask.fill_(-math.inf)
        self.mask[:B, 0, 0, :S].masked_fill_(prompt_mask, 0.0)
        self.positions.fill_(-1)
        self.positions[:B] += prompt_mask.sum(dim=1)
        self.forbidden.copy_(forbidden)
        if uniforms is not None:
            n = min(uniforms.shape[1], self.ids.shape[1] - S)
            self.uniforms[:B, S : S + n] = uniforms[:, :n]

    def write_token(self, speech_lm):
        """Reads the last token of all clips, and writes the next."""
        if self.graph is not None:
            self.graph.replay()
            return
        self.step(speech_lm)
        if self.ids.is_cuda:  # this token has warmed the kernels up
            if speech_lm.graph_pool is None:
                speech_lm.graph_pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as NCCL's, may go on using the device.
            with torch.cuda.graph(graph, speech_lm.graph_pool, capture_error_mode="thread_local"):
                self.step(speech_lm)
            self.graph = graph

    def step(self, speech_lm):
        """The kernels of `write_token`. They work in place, and no value is asked of the device."""
        lm = speech_lm.lm
        token = self.ids.index_select(1, self.column)  # (B, 1)
        self.mask.index_fill_(3, self.column, 0.0)
        rotary = (self.cos.index_select(0, self.positions), self.sin.index_select(0, self.positions))
        hidden = lm(lm.embed_tokens(token), rotary, self.mask, self.cache, self.column)
        self.pick_token(speech_lm, hidden[:, 0])

    def pick_token(self, speech_lm, hidden):
        """Writes the token that hidden rows (B, H) predict."""
        self.column.add_(1)
        self.positions.add_(1)
        logits = head_logits(speech_lm, hidden).masked_fill(self.forbidden, -math.inf)  # (B, V)
        token = pick_tokens(logits, self.temperature, self.uniforms.index_select(1, self.column))
        self.ids.index_copy_(1, self.column, token[:, None])


def pick_tokens(logits, temperature, uniforms):
    """The next tokens (B,): the likeliest, or at a temperature those where the draws (B, 1) fall."""
    if temperature == 0:
        return logits.argmax(dim=1)
    cumulative = (logits.double() / temperature).softmax(dim=1).cumsum(dim=1)
    # The last allowed id ends the table at exactly 1: a draw of 0.999… picks no forbidden id behind it.
    cumulative = cumulative / cumulative[:, -1:]
    token = torch.searchsorted(cumulative, uniforms, right=True)[:, 0]
    # Logits that are NaN have no table, and the search runs past its end. The loss will stop the run.
    return torch.where(token < logits.shape[1], token, logits.argmax(dim=1))


# ----------------------------------------------------------------------------------------------------------
# Qwen3-ASR
# ----------------------------------------------------------------------------------------------------------


class Qwen3ASR(SpeechLM):
    """Qwen3-ASR (`-hf` checkpoints), as teacher or student: our LM in transformers' own model.

    Its encoder drops padding by itself, so embeddings do not depend on the batch. It has frames of no fixed
    rate to offer, so there is no `encode_frames`.
    """

    architecture = "Qwen3ASRForConditionalGeneration"

    def __init__(self, stock, processor):
        nn.Module.__init__(self)
        # Our LM takes the place of stock's, and its parameters: they are moved, not copied.
        with torch.device("meta"):
            lm = QwenLM(stock.config.text_config)
        lm.load_state_dict(stock.model.language_model.state_dict(keep_vars=True), assign=True)
        stock.model.language_model = lm
        self.model = stock.model
        self.lm_head = stock.lm_head
        self.stock_processor = processor
        self.stock_generation_config = stock.generation_config
        self.audio_features = stock.get_audio_features  # a method of the stock model around the same modules
        self.set_up(stock.config, Qwen3ASRFrontEnd(processor))

    @classmethod
    def load(cls, folder, dtype):
        weight_files(folder)
        stock, info = transformers.Qwen3ASRForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        # Transformers fills what is missing with random numbers.
        mismatched = [*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])]
        if mismatched:
            raise data.InputError(f"weights do not match config.json: {sorted(mismatched)[:3]} …")
        return cls(stock, processor)

    def generation_config(self):
        config = self.stock_generation_config
        if not config.do_sample:  # sampling flags beside greedy decoding could not be saved
            config.update(temperature=None, top_p=None, top_k=None)
        return config

    def processor(self):
        return self.stock_processor

    def encode(self, batch):
        """Audio embeddings (ΣA, H) of all clips, one clip after the other."""
        positions = torch.arange(batch.mel.shape[2], device=batch.mel.device)
        mel_mask = (positions < batch.mel_lens[:, None]).long()  # (B, F)
        with self.autocast():
            return self.audio_features(batch.mel.to(self.head.weight.dtype), mel_mask).pooler_output


# ----------------------------------------------------------------------------------------------------------
# Model folders, and what a model's prompt can name
# ----------------------------------------------------------------------------------------------------------


def local_folder(name):
    """`name` if it is a folder, else the cached, or now downloaded, folder of that hub repository.

    The folder of a run, or of a checkpoint, means the `model` in it.
    """
    name = os.fspath(name)
    own_model = os.path.join(name, "model")
    if os.path.isfile(os.path.join(own_model, "config.json")):
        return own_model
    if os.path.exists(os.path.join(name, "adapter_config.json")):
        raise data.InputError(f"{name} holds LoRA's matrices alone; give the folder `model` beside it")
    if os.path.isdir(name):
        return name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise data.InputError(f"{name} is neither a folder nor a name like Qwen/Qwen3-ASR-0.6B-hf")
    if re.fullmatch(r"Qwen/Qwen3-ASR-[\d.]+B", name):
        raise data.InputError(f"{name} has its original form (thinker.* keys); take {name}-hf")
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
    return huggingface_hub.snapshot_download(name, allow_patterns=patterns)


def weight_files(folder):
    """The paths of a folder's weights, as stock takes them: model.safetensors, else those of its index.

    What else lies there, such as a backup or an older split, is no part of the model. Raises InputError where
    there are none, or where one is a pointer of git lfs.
    """
    names = ["model.safetensors"]
    index = os.path.join(folder, "model.safetensors.index.json")
    if not os.path.exists(os.path.join(folder, names[0])):
        if not os.path.exists(index):
            raise data.InputError("no model.safetensors and no index of its parts; save it by transformers")
        names = sorted(set(data.read_json(index)["weight_map"].values()))
    paths = [os.path.join(folder, name) for name in names]
    for path in paths:
        if data.is_lfs_pointer(path):
            raise data.InputError(f"{path} is a pointer of git lfs, no weights; run git lfs pull")
    return paths


# What loading reads of a folder beside weights and config.json.
BESIDE_WEIGHTS = {
    "glmasr": ["tokenizer.json", "tokenizer_config.json"],
    "qwen3_asr": ["tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"],
}


def read_config(name, folder):
    """The config.json of a model folder as a dict."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise data.InputError(f"{name} is no model folder: it has no config.json")
    return data.read_json(path)


def model_kind(name, folder):
    """The kind in config.json, glmasr or qwen3_asr. InputError for others, with the command that converts."""
    config = read_config(name, folder)
    kind = config.get("model_type")
    if "script" in config:
        raise data.InputError(f"{name} is a run without a finished model; give one of its step-N")
    if "whisper_config" in config:
        raise data.InputError(f"{name} is a released ARK-ASR; run python -m prepare.ark {name} --out DIR")
    if "thinker_config" in config:
        raise data.InputError(f"{name} has thinker.* keys; take its -hf form, as Qwen/Qwen3-ASR-1.7B-hf")
    if kind not in ("glmasr", "qwen3_asr"):
        raise data.InputError(f"{name}: model_type is {kind!r}; python -m prepare.student makes a student")
    return kind


def check_languages(clips, default_language, *models):
    """Raises InputError for the first of the clips whose language a model's prompt cannot name.

    default_language: --language. Called at the start, so that no error about a language can come later.
    """
    for model in models:
        known = model.front_end.languages
        if not known:
            continue
        names = f"the prompt of {model.architecture} knows {', '.join(sorted(known))}"
        if default_language is not None and default_language not in known:
            raise data.InputError(f"--language {default_language}: {names}")
        for clip in clips:
            language = clip.language or default_language
            if language not in known:
                raise data.InputError(f'{clip.where}: "language" {language}: give it, or --language; {names}')


# ----------------------------------------------------------------------------------------------------------
# The loss: a divergence on the union of both supports (paper, Eq. 1), and what it is compared with
# ----------------------------------------------------------------------------------------------------------


def union_support(student_ids, teacher_ids):
    """U_t = S_t ∪ T_t without duplicates and invalid ids (Eq. 1).

    (N, K), (N, K) int64, ids < 0 invalid → support_ids (N, 2K), ascending, −1 where not counted; support_mask
    (N, 2K) bool, True = counted.
    """
    ids = torch.cat([student_ids, teacher_ids], dim=1).sort(dim=1).values
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    support_mask = is_first & (ids >= 0)
    return ids.masked_fill(~support_mask, -1), support_mask


def in_union_order(scores, student_ids, teacher_ids):
    """Scores (N, 2K) at S_t and then T_t, in the order of `union_support`. An id in both has one score."""
    order = torch.cat([student_ids, teacher_ids], dim=1).argsort(dim=1)
    return scores.gather(1, order)


def narrow_support(kind, support_ids, support_mask, student_topk, teacher_topk):
    """Narrows the mask (N, 2K) of the union U_t to a support: S_t, T_t or S_t ∩ T_t.

    kind: "student", "teacher" or "intersection"; any other keeps the union. support_ids, support_mask
    (N, 2K) are the union's; student_topk, teacher_topk (N, K).
    """
    if kind in ("student", "intersection"):
        support_mask = support_mask & (support_ids[:, :, None] == student_topk[:, None]).any(dim=2)
    if kind in ("teacher", "intersection"):
        support_mask = support_mask & (support_ids[:, :, None] == teacher_topk[:, None]).any(dim=2)
    return support_mask


def support_kl(student_logits, teacher_logits, support_mask, temperature=1.0, divergence="forward", beta=0.5):
    """A divergence of teacher p and student q on the support, times τ², nats, per row.

    forward: KL(p ‖ q), the paper's (Eq. 1); reverse: KL(q ‖ p); jsd: both to their mixture, weighted by beta.
    student_logits, teacher_logits: (N, U) raw scores; p = softmax_U(teacher / τ), q = softmax_U(student / τ);
    support_mask: (N, U) bool. → kl (N,), counted (N,) bool: rows with at least two ids in the support. Other
    rows are 0 and give no gradient; the teacher never gets one. float32 (float64 where an input is).
    """
    both = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    dtype = torch.promote_types(both, torch.float32)
    counted = support_mask.sum(dim=1) >= 2
    inside = support_mask & counted[:, None]  # nothing of a row that is not counted, be it NaN
    # Outside the support −1e9, which is finite: 0 · (−∞) would be NaN.
    scaled_student = torch.where(inside, student_logits.to(dtype) / temperature, -1e9)
    scaled_teacher = torch.where(inside, teacher_logits.detach().to(dtype) / temperature, -1e9)
    log_q = scaled_student.log_softmax(dim=1)
    log_p = scaled_teacher.log_softmax(dim=1)
    if divergence == "forward":
        kl = kl_rows(log_p, log_q)
    elif divergence == "reverse":
        kl = kl_rows(log_q, log_p)
    else:  # to the mixture m = β p + (1 − β) q
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        kl = beta * kl_rows(log_p, log_m) + (1 - beta) * kl_rows(log_q, log_m)
    return torch.where(counted, temperature**2 * kl, 0.0), counted


def kl_rows(log_p, log_q):
    """KL(p ‖ q) = Σ p (log p − log q), nats: (N, U), (N, U) → (N,)."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


CHUNK_LOGITS = 2**27  # float32 logits that exist at once, 0.5 GB: no (N, V) tensor is ever made


def head_logits(speech_lm, rows):
    """A model's raw logits in float32: (n, H) → (n, V). In bf16 rows and weights are rounded, not logits."""
    weight = speech_lm.head.weight
    if speech_lm.bf16 or weight.dtype == torch.bfloat16:
        assert type(speech_lm.head) is nn.Linear, "in bf16 the head's bare weight is read"
        return Bf16Product.apply(rows.bfloat16(), weight.bfloat16())
    return speech_lm.head(rows)


class Bf16Product(torch.autograd.Function):
    """rows · weightᵀ of bf16 matrices, summed and returned in float32."""

    @staticmethod
    def forward(ctx, rows, weight):
        ctx.save_for_backward(rows, weight)
        if rows.is_cuda:
            return torch.mm(rows, weight.T, out_dtype=torch.float32)
        with torch.autocast("cpu", enabled=False):  # which would round it to bf16
            return rows.float() @ weight.float().T

    @staticmethod
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        grad = grad.bfloat16()
        grad_rows = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = grad.T @ rows if ctx.needs_input_grad[1] else None
        return grad_rows, grad_weight


def topk_ids(speech_lm, hidden, forbidden, k):
    """S_t or T_t of Eq. 1, in the model's ids: hidden (N, H), forbidden (V,) → (N, K), see `topk_scores`."""
    return topk_scores(speech_lm, hidden, forbidden, k)[0]


@torch.no_grad()
def topk_scores(speech_lm, hidden, forbidden, k, other_ids=None):
    """A model's top-k ids at each row, and its raw logits at J other ids of the row and at these top-k ids.

    hidden (N, H), forbidden (V,), other_ids (N, J) or None → ids (N, K) best first, −1 not allowed, K < k
    only where the vocabulary is smaller than k; logits (N, J + K), float32. Each row is multiplied by the
    head once.
    """
    ids = []
    scores = []
    k = min(k, len(forbidden))
    chunk = max(CHUNK_LOGITS // len(forbidden), 1)
    for first in range(0, max(len(hidden), 1), chunk):
        rows = slice(first, first + chunk)
        logits = head_logits(speech_lm, hidden[rows])  # (chunk, V)
        others = logits[:, :0] if other_ids is None else logits.gather(1, other_ids[rows].clamp(min=0))
        logits = logits.masked_fill(forbidden, -math.inf)
        values, top_ids = block_topk(logits, k) if logits.is_cuda else logits.topk(k)
        ids.append(top_ids.masked_fill(values == -math.inf, -1))
        scores.append(torch.cat([others, values], dim=1))
    return torch.cat(ids), torch.cat(scores)


def block_topk(logits, k, block=128):
    """The same as `logits.topk(k)` of (n, V), which is slow on a GPU: it reads the logits several times.

    The k largest logits lie in the k blocks with the largest maxima. Where a value is −∞, its id has no
    meaning.
    """
    blocks = F.pad(logits, (0, -logits.shape[1] % block), value=-math.inf).unflatten(1, (-1, block))
    best = blocks.amax(dim=2).topk(min(k, blocks.shape[1])).indices  # (n, k)
    candidates = blocks.gather(1, best[:, :, None].expand(-1, -1, block)).flatten(1)  # (n, 128 k)
    values, places = candidates.topk(k)
    return values, best.gather(1, places // block) * block + places % block


class SupportScores(torch.autograd.Function):
    """The student's raw logits on the support only: (V, H), (N, H), (N, U) ids → (N, U) with gradient.

    scores[n, u] = weight[ids[n, u]] · hidden[n]. No (N, V) tensor is made, and no (N, U, H) of rows.
    All three products are kernels of an embedding bag with weights. The gradient of `hidden` is such a bag,
    scores are its derivative by the weights, and the gradient of `weight` is its derivative by the matrix.
    """

    @staticmethod
    def forward(ctx, weight, hidden, ids):
        hidden = hidden.contiguous()
        ids = ids.clamp(min=0)
        bags = torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])
        first = torch.arange(len(ids), device=ids.device) * ids.shape[1]  # of each bag, among all ids
        ctx.save_for_backward(weight, hidden, ids, bags)
        scores = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            hidden, weight, ids.flatten(), first, bags, mode=0
        )
        return scores.view(ids.shape)

    @staticmethod
    def backward(ctx, grad):
        weight, hidden, ids, bags = ctx.saved_tensors
        grad = grad.contiguous()
        grad_hidden = F.embedding_bag(ids, weight, mode="sum", per_sample_weights=grad)
        if not ctx.needs_input_grad[0]:
            return None, grad_hidden, None
        sizes = torch.full((len(ids),), ids.shape[1], device=ids.device)
        grad_weight = torch.ops.aten._embedding_bag_dense_backward(
            hidden, ids.flatten(), bags, sizes, ids.new_empty(0), len(weight), False, 0, grad.flatten(), -1
        )
        return grad_weight, grad_hidden, None


# (weight (V, H), hidden (N, H) of the same dtype, ids (N, U), below 0 = not counted) → scores (N, U)
support_scores = SupportScores.apply


def full_kl(student, student_hidden, teacher, teacher_hidden, alignment, *divergence):
    """`support_kl` on all ids that both models may write: (N, H), (N, H') rows → kl (N,), counted (N,).

    divergence: temperature, divergence and beta of `support_kl`. Exact.
    """
    columns = alignment.to_teacher.clamp(min=0)  # (V,)

    def kl_of_rows(student_rows, teacher_rows):
        teacher_logits = head_logits(teacher, teacher_rows)[:, columns]  # (chunk, V)
        student_logits = head_logits(student, student_rows)
        mask = ~alignment.student_forbidden.expand_as(student_logits)
        return support_kl(student_logits, teacher_logits, mask, *divergence)

    chunks = recomputed_chunks(kl_of_rows, len(columns), student_hidden, teacher_hidden)
    return torch.cat([kl for kl, _ in chunks]), torch.cat([counted for _, counted in chunks])


def token_ce(speech_lm, hidden, ids):
    """Cross-entropy −log q(token), over the whole vocabulary, nats: rows (N, H), tokens (N,) → (N,)."""

    def ce_of_rows(rows, row_ids):
        return F.cross_entropy(head_logits(speech_lm, rows), row_ids, reduction="none")

    return torch.cat(recomputed_chunks(ce_of_rows, len(speech_lm.forbidden), hidden, ids))


def recomputed_chunks(function, vocab_size, *tensors):
    """[function(rows, …)] chunk by chunk; its (chunk, V) logits are computed again in backward."""
    chunk = max(CHUNK_LOGITS // vocab_size, 1)
    pieces = zip(*[tensor.split(chunk) for tensor in tensors])
    return [checkpoint(function, *rows, use_reentrant=False) for rows in pieces]


# ----------------------------------------------------------------------------------------------------------
# Two vocabularies, and the self-check
# ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Alignment:
    """Ids of one vocabulary in the other, by identical token string; −1 where there is none."""

    to_teacher: torch.Tensor  # (V,)
    to_student: torch.Tensor  # (V',)
    student_forbidden: torch.Tensor  # (V,) bool: forbidden in the student, or without a counterpart
    teacher_forbidden: torch.Tensor  # (V',) bool, likewise

    def in_teacher(self, ids):
        """The student's ids as the teacher's, of any shape; −1 stays −1."""
        return torch.where(ids >= 0, self.to_teacher[ids.clamp(min=0)], -1)

    def in_student(self, ids):
        """The teacher's ids as the student's."""
        return torch.where(ids >= 0, self.to_student[ids.clamp(min=0)], -1)


def align_vocabularies(student, teacher):
    """The `Alignment` of two models. InputError where over 1 % of the student's tokens lack a counterpart."""
    student_forbidden = student.forbidden.tolist()
    teacher_forbidden = teacher.forbidden.tolist()
    teacher_vocabulary = teacher.front_end.tokenizer.get_vocab()
    to_teacher = torch.full((len(student_forbidden),), -1, device=student.device)
    to_student = torch.full((len(teacher_forbidden),), -1, device=student.device)
    pairs = [(student.front_end.stop_id, teacher.front_end.stop_id)]
    for token, student_id in student.front_end.tokenizer.get_vocab().items():
        teacher_id = teacher_vocabulary.get(token)
        if teacher_id is not None and not student_forbidden[student_id] and not teacher_forbidden[teacher_id]:
            pairs.append((student_id, teacher_id))
    student_ids, teacher_ids = torch.tensor(pairs, device=student.device).T
    to_teacher[student_ids] = teacher_ids
    to_student[teacher_ids] = student_ids

    n_shared = int((to_teacher >= 0).sum())
    n_text = student_forbidden.count(False)
    if n_shared < 0.99 * n_text:
        shared = f"the teacher has {n_shared} of the student's {n_text} text tokens"
        raise data.InputError(f"{shared}; they need one tokenizer, token by token")
    return Alignment(to_teacher, to_student, to_teacher < 0, to_student < 0)


def mapped_rollout(rollout, to_other):
    """The same transcripts in the ids of the other model. Ids in, ids out: nothing goes through text.

    to_other: (V,) `Alignment.to_teacher` or `to_student`.
    """
    ids = to_other[rollout.ids]
    assert (ids[rollout.row_mask()] >= 0).all(), "a transcript token has no counterpart; forbid it"
    return Rollout(ids.clamp(min=0), rollout.lens, rollout.stopped)  # padding becomes id 0 and is never read


def check_reference(clip, front_end, to_teacher):
    """Raises AudioError where the teacher lacks a token of the clip's text.

    to_teacher: a list by the student's ids, < 0 where the teacher lacks the token.
    """
    for i in front_end.encode_text(clip.text):
        if to_teacher[i] < 0:
            token = repr(front_end.decode([i]))
            raise data.AudioError(f"{clip.where}: text: the teacher lacks the token {token}; remove the line")


@torch.no_grad()
def self_check(speech_lm, waveforms, languages, default_language=None):
    """Does the model agree with itself? Its greedy transcripts of a few clips, scored by teacher forcing.

    → {nll: nats a token; agreement: share of tokens that are the likeliest of their row; batch_difference:
    largest difference of a logit between clips in a batch and one by one, over the largest logit;
    endoftext: mean probability of the pad token where the model stops (Qwen3-ASR ends on two ids, we allow
    one)}. InputError where rows are shifted or batches leak. The limits are wide, so that no sound model is
    refused: a greedy token's likelihood is at least 1 / V, and two logits count as equal when they differ by
    less than 0.1 % of the largest one, or 10 % in bf16.
    """
    was_training = speech_lm.training
    speech_lm.eval()
    front_end = speech_lm.front_end
    batch = data.collate(waveforms, front_end, languages, default_language).to(speech_lm.device)
    rollout = speech_lm.sample(batch, 32)
    batch_logits = speech_lm.head(speech_lm(batch, rollout)).float()  # (N, V)
    single_logits = []
    for b, waveform in enumerate(waveforms):
        alone = data.collate([waveform], front_end, [languages[b]], default_language).to(speech_lm.device)
        part = Rollout(rollout.ids[b : b + 1], rollout.lens[b : b + 1], rollout.stopped[b : b + 1])
        single_logits.append(speech_lm.head(speech_lm(alone, part)).float())
    single_logits = torch.cat(single_logits)
    speech_lm.train(was_training)

    allowed = ~speech_lm.forbidden
    tokens = rollout.ids[rollout.row_mask()][:, None]  # (N, 1)
    endoftext = batch_logits.softmax(dim=1)[tokens[:, 0] == front_end.stop_id, front_end.pad_id]
    batch_logits = batch_logits.masked_fill(speech_lm.forbidden, -math.inf)
    largest = single_logits[:, allowed].abs().max()
    is_float32 = not speech_lm.bf16 and speech_lm.head.weight.dtype == torch.float32
    tolerance = 1e-3 if is_float32 else 0.1
    best_logits = batch_logits.amax(dim=1, keepdim=True)
    is_likeliest = batch_logits.gather(1, tokens) >= best_logits - tolerance * largest
    figures = {
        "nll": -batch_logits.log_softmax(dim=1).gather(1, tokens).mean().item(),
        "agreement": is_likeliest.float().mean().item(),
        "batch_difference": ((batch_logits - single_logits)[:, allowed].abs().max() / largest).item(),
        "endoftext": endoftext.mean().item() if len(endoftext) else 0.0,
    }
    limit = math.log(int(allowed.sum())) + tolerance
    is_sound = figures["nll"] <= limit and figures["agreement"] >= 0.95
    if not is_sound or not figures["batch_difference"] <= tolerance:
        sound = f"sound: nll ≤ {limit:.1f}, agreement ≥ 0.95, batch_difference ≤ {tolerance:g}"
        misaligned = f"{speech_lm.architecture}: prompt, rows or masks are misaligned"
        raise data.InputError(f"self-check: {misaligned}: {figures}; {sound}")
    return figures


# ----------------------------------------------------------------------------------------------------------
# LoRA (not in the paper): y = W x + 2 B A x on the LM's projections, by peft, and W stays as it is
# ----------------------------------------------------------------------------------------------------------

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def add_lora(speech_lm, rank, seed):
    """Freezes the LM and puts LoRA beside its projections. A (rank, in) is drawn, B (out, rank) 0."""
    import peft  # read for --lora-rank only

    torch.manual_seed(seed)  # the same A on all ranks
    projections = rf".*\.language_model\..*\.({'|'.join(PROJECTIONS)})"  # the encoder has such names too
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=projections)
    wrapped = peft.get_peft_model(speech_lm, config)
    # peft freezes all other weights; encoder and adapter train beside LoRA.
    for part in (speech_lm.encoder, speech_lm.adapter):
        part.requires_grad_(True)
    speech_lm.peft_models.append(wrapped)


@torch.no_grad()
def merged_weights(speech_lm):
    """The state dict on the CPU under stock's names: LoRA is merged into the weights that it sits on."""
    weights = {}
    for name, tensor in speech_lm.state_dict().items():
        if ".lora_" not in name:
            weights[name.replace(".base_layer.", ".")] = tensor.cpu().contiguous()
    for name, module in speech_lm.named_modules():
        if hasattr(module, "base_layer"):
            assert not module.lora_variant and not any(module.lora_bias.values()), "only plain LoRA is merged"
            merged = module.base_layer.weight + module.get_delta_weight("default")
            weights[f"{name}.weight"] = merged.cpu().contiguous()
    return weights


# ----------------------------------------------------------------------------------------------------------
# Optimizer, schedule, checkpoints. `trained` is {name: parameter} of all that trains.
# ----------------------------------------------------------------------------------------------------------

PARTS = ("encoder", "adapter", "lm")


def trained_parameters(model, parts=PARTS):
    """Freezes the parts that are not named, and returns {name: parameter} of all that trains.

    The paper trains all parts. A parameter that is frozen already stays so: an adapter such as LoRA freezes
    the weights under it. A module that a fork adds belongs to no part, and trains.
    """
    for part in set(PARTS) - set(parts):
        getattr(model, part).requires_grad_(False)
    if "lm" not in parts:
        model.head.requires_grad_(False)  # with tied weights the embeddings
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizer(trained, lr, weight_decay):
    """AdamW (0.9, 0.95); no decay on norms, biases, embeddings and the output matrix."""
    decayed = []
    not_decayed = []
    for name, parameter in trained.items():
        is_exempt = parameter.ndim < 2 or "embed_tokens" in name or "lm_head" in name
        (not_decayed if is_exempt else decayed).append(parameter)
    groups = [{"params": decayed}, {"params": not_decayed, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)


def cosine_lr(step, steps, warmup_steps, lr):
    """Learning rate of update `step` (from 0): linear warm-up, then a cosine to 0 at `steps`."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))


def sum_gradients(trained, bucket_floats=2**24):
    """Sums each parameter's gradient over the ranks, in one fixed order, in flat buckets of about 64 MB.

    A gradient that a rank does not have, as after a step without a micro-batch, counts as zeros.
    """
    buckets = {}
    offset = 0
    for parameter in trained.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        buckets.setdefault(offset // bucket_floats, []).append(parameter.grad)
        offset += parameter.numel()
    if dist.is_initialized():
        for grads in buckets.values():
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat)
            parts = flat.split([grad.numel() for grad in grads])
            for grad, part in zip(grads, parts):
                grad.copy_(part.view_as(grad))


def save_checkpoint(out, step, model, trained, optimizer, keep):
    """Writes out/step-N: `model`, a stock folder in float32, and state.safetensors, what else resuming needs.

    With LoRA also `lora`, A and B as peft writes them. The other file holds AdamW's state and every trained
    tensor that the stock folder does not hold, such as A. All ranks call it; rank 0 writes. Complete or not
    at all: written beside and renamed. The last `keep` checkpoints stay.
    """
    # Every rank holds the same student, bit for bit.
    sums = [parameter.detach().view(torch.int32).sum(dtype=torch.int64) for parameter in trained.values()]
    checksums = data.gather(torch.stack(sums).tolist())
    assert all(checksum == checksums[0] for checksum in checksums), "the ranks' weights have come apart"
    if data.rank_and_world()[0] == 0:
        for leftover in glob.glob(os.path.join(glob.escape(out), "step-*.partial")):
            shutil.rmtree(leftover)
        state = {}
        in_folder = {name for name in model.state_dict() if ".lora_" not in name}
        for name, parameter in trained.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                state[f"{key}.{name}"] = value.cpu()
            if name not in in_folder:
                state[name] = parameter.detach().cpu()
        with complete_or_absent(os.path.join(out, f"step-{step}")) as folder:
            model.save_pretrained(os.path.join(folder, "model"))
            for wrapped in model.peft_models:
                wrapped.save_pretrained(os.path.join(folder, "lora"))
            save_file(state, os.path.join(folder, "state.safetensors"))
        for folder in list(data.complete_steps(out).values())[:-keep]:
            shutil.rmtree(folder)
    data.barrier()


def load_state(folder, trained, optimizer):
    """Restores what trains. All else is as in the model folder that the run began with.

    So a buffer, or a frozen module with weights of its own, that a fork adds has to be restored by it.
    """
    state = load_file(os.path.join(folder, "model", "model.safetensors"))
    state.update(load_file(os.path.join(folder, "state.safetensors")))
    for name, parameter in trained.items():
        parameter.data.copy_(state[name])
        for key in ("step", "exp_avg", "exp_avg_sq"):  # absent before the first update
            if f"{key}.{name}" in state:
                optimizer.state[parameter][key] = state[f"{key}.{name}"].to(parameter.device)


def save_model(out, model):
    """Writes out/model, the finished student, and with LoRA out/lora. All ranks call it; rank 0 writes."""
    if data.rank_and_world()[0] == 0:
        for wrapped in model.peft_models:
            wrapped.save_pretrained(os.path.join(out, "lora"))
        final = os.path.join(out, "model")
        shutil.rmtree(final, ignore_errors=True)
        with complete_or_absent(final) as folder:
            model.save_pretrained(folder)
    data.barrier()


@contextlib.contextmanager
def complete_or_absent(final):
    """A folder to write in, which gets its name once all of it has reached the disk; removed on failure."""
    partial = final + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    try:
        yield partial
        everything = os.path.join(glob.escape(partial), "**")  # and the folder itself
        for path in glob.glob(everything, recursive=True, include_hidden=True):
            flush(path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, SafetensorError):  # such as a full disk; it names no path
            raise OSError(errno.EIO, str(error), final) from error
        raise
    os.rename(partial, final)
    flush(os.path.dirname(os.path.abspath(final)))


def flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
