"""Speech-LMs, their sampling, and the loss of on-policy distillation (arXiv 2605.28139).

    mel (B, 128, F) → Encoder → frames (B, T', D) → four merged → Adapter → audio embeddings (ΣA, H)
        → in the prompt's placeholders → Qwen causal LM → hidden rows (N, H) → head → logits (N, V)

Legend, used in all files:
    B  clips of a batch                N  rows: scored (clip, position) pairs of a batch, clip by clip
    S  prompt tokens                   K  top-k ids of a model at a row
    T  transcript tokens               U  ids of a support: the union of two top-k has at most 2K
    A  audio tokens, 12.5 a second     V  vocabulary: rows of the LM's output matrix
    F  mel frames, 100 a second        H  hidden size of the LM
    T' encoder frames, 50 a second     D  hidden size of the encoder

Order: encoder and adapter, prompts and token ids, the speech-LM, Qwen3-ASR, sampling, the loss, vocabularies
and self-check, LoRA, optimizer and checkpoints. The last section, the fast decoder, may be skipped.
"""

import contextlib
import dataclasses
import glob
import json
import math
import os
import re
import shutil

import huggingface_hub
import safetensors
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import (
    HOP,
    LANGUAGES,
    N_MELS,
    InputError,
    barrier,
    collate,
    complete_steps,
    gather,
    log_mel,
    n_audio_tokens,
    pad_left,
    rank_and_world,
    script_language,
)

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
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


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
        self.recompute = False  # activations again in the backward pass, in place of keeping them

    def forward(self, mel, frame_lens):
        x = F.gelu(self.conv1(mel))  # (B, D, F)
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # (B, T', D), T' = (F + 1) // 2
        positions = torch.arange(x.shape[1], device=x.device)
        rotary = rotary_table(positions, self.rotary_size, self.rotary_theta, x.dtype)
        key_mask = (positions < frame_lens[:, None])[:, None, None, :]  # (B, 1, 1, T')
        for layer in self.layers:
            if self.recompute and self.training:
                x = checkpoint(layer, x, rotary, key_mask, use_reentrant=False)
            else:
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
    """cos and sin (T', size) of the angles position · theta^(−2i / size), each frequency twice."""
    exponents = torch.arange(0, size, 2, device=positions.device).float() / size
    angles = positions.float()[:, None] * (1.0 / theta**exponents)  # (T', size / 2)
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Turns the first r dimensions of x (B, heads, T', d), as many as the table has: i with i + r / 2."""
    size = cos.shape[1]
    unturned = x[..., :size]
    first, second = unturned.chunk(2, dim=-1)
    turned = unturned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, x[..., size:]], dim=-1)


def init_weights(modules, spread):
    """Draws new weights: normal with standard deviation `spread`, biases 0. Norms are born as 1 and 0."""
    for module in modules:
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            nn.init.normal_(module.weight, std=spread)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


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
    topk_ids: torch.Tensor | None = None  # (B, T, K) the sampler's top-k; −1: not valid, or not scored

    def row_mask(self):
        """(B, T) bool, True = a scored row; `x[row_mask]` gives the N rows, clip by clip."""
        positions = torch.arange(self.ids.shape[1], device=self.ids.device)
        return positions < (self.lens + self.stopped)[:, None]

    def to(self, device):
        topk_ids = None if self.topk_ids is None else self.topk_ids.to(device)
        return Rollout(self.ids.to(device), self.lens.to(device), self.stopped.to(device), topk_ids)


class FrontEnd:
    """What our student wants to hear and read before the transcript: features, prompt, token ids.

    Small and without weights, so that data workers can carry it.
    """

    audio_token = AUDIO_TOKEN
    prompt_tokens = PROMPT_TOKENS
    frame_multiple = 8  # a batch's mel is padded to a multiple of this many frames
    languages = {}  # code → name as the prompt has it; empty: the prompt names no language

    def __init__(self, tokenizer, prompt=PROMPT, context_prompt=CONTEXT_PROMPT):
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in (*self.prompt_tokens, STOP_TOKEN, PAD_TOKEN) if token not in vocabulary]
        if missing:
            raise InputError(f"tokenizer {tokenizer.name_or_path} lacks the token(s) {' '.join(missing)}")
        self.tokenizer = tokenizer
        self.pad_id = vocabulary[PAD_TOKEN]
        self.stop_id = vocabulary[STOP_TOKEN]
        self.audio_id = vocabulary[self.audio_token]
        self.template_ids = self.token_ids(prompt)  # one placeholder
        self.context_prompt = context_prompt
        # Added tokens, longest first, to find them written out in a text.
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        added.sort(key=len, reverse=True)
        self.added_tokens = re.compile("|".join(re.escape(token) for token in added))

    def features(self, waveform):
        """(samples,) → log-mel (128, F) of the clip alone."""
        return log_mel(waveform)

    def n_audio_tokens(self, n_samples):
        return n_audio_tokens(n_samples)

    def prompt(self, n_audio, language=None, context=None):
        """Prompt ids (S,) with n_audio placeholders. Our student's prompt names no language."""
        has_context = context is not None and context.strip() != ""
        ids = self.context_template_ids(context) if has_context else self.template_ids
        place = ids.index(self.audio_id)
        return ids[:place] + [self.audio_id] * n_audio + ids[place + 1 :]

    def context_template_ids(self, context):
        """Ids of the prompt that gives a context (one placeholder). A control token in it stays text."""
        before, after = self.context_prompt.split(CONTEXT)
        # Stock processors tokenise the text between two control tokens in one piece, so the words before the
        # context must not be tokenised apart from it.
        control_tokens = list(self.added_tokens.finditer(before))
        begin = control_tokens[-1].end()
        return (
            self.token_ids(before[:begin])
            + self.encode_text(before[begin:] + context)
            + self.token_ids(after)
        )

    def token_ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode_text(self, text):
        """Token ids of a text. A control token written out in it stays text: it is cut behind its "<"."""
        ids = []
        begin = 0
        for match in self.added_tokens.finditer(text):
            ids += self.token_ids(text[begin : match.start()])
            ids += self.token_ids(text[match.start() : match.start() + 1])
            begin = match.start() + 1
            ids += self.token_ids(text[begin : match.end()])
            begin = match.end()
        return ids + self.token_ids(text[begin:])

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def texts(self, rollout):
        """The transcripts of a rollout as B strings."""
        lens = rollout.lens.tolist()
        return [self.decode(ids[:n]) for ids, n in zip(rollout.ids.tolist(), lens)]

    def transcripts(self, texts, stopped=None):
        """The `Rollout` of given texts, for teacher forcing; stopped: B bools, False = no stop token."""
        id_lists = [self.encode_text(text) for text in texts]
        lens = torch.tensor([len(id_list) for id_list in id_lists])
        ids = torch.full((len(texts), int(lens.max()) + 1), self.pad_id)
        for b, id_list in enumerate(id_lists):
            ids[b, : len(id_list) + 1] = torch.tensor([*id_list, self.stop_id])
        stopped = torch.ones(len(texts), dtype=torch.bool) if stopped is None else torch.tensor(stopped)
        return Rollout(ids, lens, stopped)


class Qwen3ASRFrontEnd(FrontEnd):
    """The same of Qwen3-ASR: another length rule, its own chat template, and a language in the prompt.

    The prompt ends with `language English<asr_text>`, which the model would otherwise write itself.
    """

    audio_token = "<|audio_pad|>"
    prompt_tokens = ["<|im_start|>", "<|audio_start|>", audio_token, "<|audio_end|>", "<asr_text>"]
    frame_multiple = 100  # its convolutions see chunks of one second
    languages = LANGUAGES

    def __init__(self, processor):
        user = {"role": "user", "content": [{"type": "audio", "audio": ""}]}
        system = {"role": "system", "content": [{"type": "text", "text": CONTEXT}]}
        prompts = []
        for turns in ([user], [system, user]):
            prompts.append(processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        super().__init__(processor.tokenizer, *prompts)

    def features(self, waveform):
        return log_mel(waveform, max(len(waveform), 8_000))  # half a second at least

    def n_audio_tokens(self, n_samples):
        """13 for each full second; the rest is halved three times, rounding up."""
        full, rest = divmod(max(n_samples, 8_000) // HOP, 100)
        return 13 * full + math.ceil(rest / 8)

    def prompt(self, n_audio, language=None, context=None):
        name = self.languages[language]
        return super().prompt(n_audio, context=context) + self.token_ids(f"language {name}<asr_text>")


def forbidden_ids(tokenizer, vocab_size, stop_id):
    """(V,) bool, True = never in a transcript: special and added `<…>` tokens but the stop, unused rows."""
    forbidden = torch.ones(vocab_size, dtype=torch.bool)
    for i in tokenizer.get_vocab().values():
        forbidden[i] = False
    for i in tokenizer.all_special_ids:
        forbidden[i] = True
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
        if text.model_type not in ("qwen2", "qwen3"):
            raise InputError(f"the LM is {text.model_type}; a student has a qwen2 or qwen3 LM")
        if audio.num_mel_bins != N_MELS or audio.num_key_value_heads != audio.num_attention_heads:
            raise InputError(f"the encoder wants {N_MELS} mel bins and as many key as query heads")
        if audio.intermediate_size != 4 * audio.hidden_size:
            raise InputError("the encoder's intermediate_size is not 4 × hidden_size, as four merged frames")
        encoder = Encoder(audio)
        adapter = Adapter(config)
        init_weights(encoder.modules(), audio.initializer_range)
        init_weights(adapter.modules(), text.initializer_range)
        # A ModuleDict, because stock's names begin with "model."; its parts are read by the properties below.
        self.model = nn.ModuleDict(
            {
                "audio_tower": encoder,
                "multi_modal_projector": adapter,
                "language_model": transformers.AutoModel.from_config(text),
            }
        )
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.lm.embed_tokens.weight
        else:
            init_weights([self.lm_head], text.initializer_range)
        self.set_up(config, FrontEnd(tokenizer))
        self.float()

    def set_up(self, config, front_end):
        """What every speech-LM has beside its modules."""
        self.config = config
        self.front_end = front_end
        self.bf16 = False  # compute in bf16 by autocast; the weights stay as they are
        self.lora_config = None  # peft's, after `add_lora`
        vocab_size = config.text_config.vocab_size
        n_tokens = len(front_end.tokenizer)
        if config.audio_token_id != front_end.audio_id or vocab_size < n_tokens:
            ours = f"audio token {config.audio_token_id} and {vocab_size} rows"
            raise InputError(
                f"model and tokenizer do not match: {ours}, {front_end.audio_id} and {n_tokens} tokens"
            )
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

    def autocast(self):
        """The context of compute precision. Every method that computes enters it by itself."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    # ---- folder in, folder out ----

    @staticmethod
    def from_pretrained(name, dtype=torch.float32):
        """A model from a folder or the hub: by config.json a `SpeechLM` or a `Qwen3ASR`, weights in `dtype`.

        Raises InputError that says what is missing, or which command converts the folder.
        """
        folder = local_folder(name)
        kind = model_kind(name, folder)
        model_class = {"glmasr": SpeechLM, "qwen3_asr": Qwen3ASR}[kind]
        try:
            model = model_class.load(folder, dtype)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        for key, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise InputError(f"{name}: {key} holds NaN or infinite weights")
        return model

    @classmethod
    def load(cls, folder, dtype):
        with folder_errors():
            config = transformers.GlmAsrConfig.from_pretrained(folder)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            weights = {}
            for path in glob.glob(os.path.join(glob.escape(folder), "*.safetensors")):
                weights.update(load_file(path))
        model = cls(config, tokenizer)
        # The parameters only. The LM's rotary frequencies stay float32: rounded to bf16 they would turn a key
        # 400 tokens away by up to half a radian.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.load_weights(weights)
        return model

    def load_weights(self, weights):
        """Takes over {name: tensor}, all of them and no other. InputError where they do not fit."""
        own = self.state_dict()
        if self.config.tie_word_embeddings:
            own.pop("lm_head.weight")  # the same tensor as the embeddings
            weights = {key: tensor for key, tensor in weights.items() if key != "lm_head.weight"}
        mismatched = sorted(own.keys() ^ weights.keys())
        mismatched += [key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape]
        if mismatched:
            raise InputError(f"weights and config.json do not match: {', '.join(mismatched[:3])} …")
        self.load_state_dict(weights, strict=False)

    def save_pretrained(self, folder):
        """Writes a folder that stock transformers loads: weights, configs, tokenizer, processor."""
        os.makedirs(folder, exist_ok=True)
        weights = merged_weights(self)
        if self.config.tie_word_embeddings:
            weights.pop("lm_head.weight")
        weights = {name: tensor.contiguous() for name, tensor in weights.items()}
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
            transformers.WhisperFeatureExtractor(feature_size=N_MELS),
            self.front_end.tokenizer,
            chat_template=CHAT_TEMPLATE,
            audio_token=AUDIO_TOKEN,
            default_transcription_prompt=PROMPT_TEXT,
        )

    def recompute_activations(self):
        """Computes activations again in the backward pass: less memory, more time, the same numbers."""
        self.encoder.recompute = True
        recompute_stock(self.lm)

    # ---- audio → embeddings → hidden rows ----

    def encode(self, batch):
        """Audio embeddings (ΣA, H) of all clips, one clip after the other."""
        return self.adapt(self.encode_frames(batch), batch)

    def encode_frames(self, batch):
        """The encoder's frames (B, T', D), batch.mel_lens // 2 of them real."""
        with self.autocast():
            return self.encoder(batch.mel.to(self.head.weight.dtype), batch.mel_lens // 2)

    def adapt(self, frames, batch):
        """Frames (B, T', D) → audio embeddings (ΣA, H): four frames, 80 ms, become one token."""
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
            output = self.lm(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions_of(mask),
                use_cache=False,
            )
        return output.last_hidden_state[:, S - 1 :][row_mask[:, :T]]

    def with_script_languages(self, batch, texts):
        """The batch, where the prompt names a language, with that of each text's script. Ours names none."""
        return batch

    # ---- sampling ----

    @torch.no_grad()
    def sample(
        self,
        batch,
        max_new_tokens,
        temperature=0.0,
        k=32,
        tokens_per_second=TOKENS_PER_SECOND,
        forbidden=None,
        uniforms=None,
        encoded=None,
    ):
        """Writes a transcript of each clip. → `Rollout` with the top-k ids of every step, after forbidding.

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
        if temperature > 0 and uniforms is None:
            uniforms = torch.rand(len(caps), max_new_tokens, dtype=torch.float64, device=caps.device)

        with self.autocast():
            encoded = self.encode(batch) if encoded is None else encoded
            # Prefill: the whole prompt in one pass. Its last column predicts the first token.
            output = self.lm(
                inputs_embeds=self.embed_prompt(batch, encoded),
                attention_mask=batch.prompt_mask,
                position_ids=positions_of(batch.prompt_mask),
                use_cache=True,
            )
            hidden = output.last_hidden_state[:, -1]  # (B, H)
            write = write_fast if may_copy_weights(self) else write_tokens
            ids, topk_ids = write(
                model=self,
                hidden=hidden,
                cache=output.past_key_values,
                mask=batch.prompt_mask,
                caps=caps,
                forbidden=forbidden,
                k=k,
                temperature=temperature,
                uniforms=uniforms,
            )
        self.train(was_training)

        # A rollout ends at its first stop token or at its cap; what was written behind it is dropped.
        positions = torch.arange(ids.shape[1], device=ids.device)
        is_stop = ids == self.front_end.stop_id
        stop_at = torch.where(is_stop, positions, ids.shape[1]).amin(dim=1)  # (B,)
        rollout = Rollout(ids, lens=stop_at.minimum(caps), stopped=stop_at < caps)
        row_mask = rollout.row_mask()
        T = int(row_mask.sum(dim=1).max())
        ids = ids.masked_fill(~row_mask, self.front_end.pad_id)
        topk_ids = topk_ids.masked_fill(~row_mask[:, :, None], -1)
        return Rollout(ids[:, :T], rollout.lens, rollout.stopped, topk_ids[:, :T])


def write_tokens(model, hidden, cache, mask, caps, forbidden, k, temperature, uniforms):
    """The sampling loop: one token after another, by the library's LM and its cache.

    hidden (B, H): the last prompt column's; mask (B, S): the prompt's. → ids (B, T), top-k ids (B, T, K)
    with −1 where fewer than k ids are allowed. Clips go on behind their stop token until all are through;
    the caller drops that.
    """
    ids = []
    topk_ids = []
    is_through = torch.zeros_like(caps, dtype=torch.bool)
    for t in range(int(caps.max())):
        logits = model.head(hidden).float().masked_fill(forbidden, -math.inf)  # (B, V)
        topk_ids.append(top_ids(logits, k))
        token = pick_tokens(logits, temperature, None if uniforms is None else uniforms[:, t : t + 1])  # (B,)
        ids.append(token)
        is_through |= (token == model.front_end.stop_id) | (caps <= t + 1)
        if is_through.all():
            break
        # One step of the LM: the new token's embedding in, the hidden row that predicts the next one out.
        mask = F.pad(mask, (0, 1), value=True)
        output = model.lm(
            inputs_embeds=model.lm.embed_tokens(token)[:, None],
            attention_mask=mask,
            position_ids=positions_of(mask)[:, -1:],
            past_key_values=cache,
            use_cache=True,
        )
        hidden = output.last_hidden_state[:, -1]
    return torch.stack(ids, dim=1), torch.stack(topk_ids, dim=1)


def pick_tokens(logits, temperature, uniforms):
    """The next tokens (B,): the likeliest, or at a temperature those where the draws (B, 1) fall."""
    if temperature == 0:
        return logits.argmax(dim=1)
    cumulative = (logits.double() / temperature).softmax(dim=1).cumsum(dim=1)
    # The last allowed id ends the table at exactly 1: a draw of 0.999… picks no forbidden id behind it.
    cumulative = cumulative / cumulative[:, -1:]
    token = torch.searchsorted(cumulative, uniforms.double(), right=True)[:, 0]
    # Logits that are NaN have no table, and the search runs past its end. The loss will stop the run.
    return torch.where(token < logits.shape[1], token, logits.argmax(dim=1))


def top_ids(logits, k):
    """The ids of the k largest logits (…, V), best first; −1 where forbidden (−∞). → (…, min(k, V))"""
    top = logits.topk(min(k, logits.shape[-1]))
    return top.indices.masked_fill(top.values == -math.inf, -1)


def positions_of(mask):
    """Position ids of tokens that are padded on the left: the first real one has 0."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


# ----------------------------------------------------------------------------------------------------------
# Qwen3-ASR
# ----------------------------------------------------------------------------------------------------------


class Qwen3ASR(SpeechLM):
    """Qwen3-ASR in transformers' own modules (`-hf` checkpoints), as teacher or student.

    Its encoder drops padding by itself, so embeddings do not depend on the batch. It has frames of no fixed
    rate to offer, so there is no `encode_frames`.
    """

    architecture = "Qwen3ASRForConditionalGeneration"

    def __init__(self, stock, processor):
        nn.Module.__init__(self)
        self.model = stock.model
        self.lm_head = stock.lm_head
        self.stock_processor = processor
        self.stock_generation_config = stock.generation_config
        self.audio_features = stock.get_audio_features  # a method of the stock model around the same modules
        self.set_up(stock.config, Qwen3ASRFrontEnd(processor))

    @classmethod
    def load(cls, folder, dtype):
        with folder_errors():
            stock, info = transformers.Qwen3ASRForConditionalGeneration.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
            processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        mismatched = [*sorted(info["missing_keys"]), *sorted(info["unexpected_keys"])]
        mismatched += sorted(str(key) for key in info["mismatched_keys"])
        if mismatched:
            raise InputError(f"weights and config.json do not match: {', '.join(mismatched[:3])} …")
        return cls(stock, processor)

    def generation_config(self):
        config = self.stock_generation_config
        if not config.do_sample:  # sampling flags beside greedy decoding could not be saved
            config.update(temperature=None, top_p=None, top_k=None)
        return config

    def processor(self):
        return self.stock_processor

    def recompute_activations(self):
        recompute_stock(self.encoder)
        recompute_stock(self.lm)

    def encode(self, batch):
        """Audio embeddings (ΣA, H) of all clips, one clip after the other."""
        positions = torch.arange(batch.mel.shape[2], device=batch.mel.device)
        mel_mask = (positions < batch.mel_lens[:, None]).long()  # (B, F)
        with self.autocast():
            return self.audio_features(batch.mel.to(self.head.weight.dtype), mel_mask).pooler_output

    def with_script_languages(self, batch, texts):
        """The batch whose prompts name, for clips without a language, that of their text's script.

        texts: B strings, such as the student's rollouts. Other prompts stay as they are.
        """
        if None not in batch.languages:
            return batch
        prompts = []
        for b, text in enumerate(texts):
            is_open = batch.languages[b] is None
            script = script_language(text, batch.default_language) if is_open else None
            if script:
                prompts.append(self.front_end.prompt(int(batch.audio_lens[b]), script, batch.contexts[b]))
            else:
                prompts.append(batch.prompt_ids[b][batch.prompt_mask[b]].tolist())
        prompt_ids, prompt_mask = pad_left(prompts, self.front_end.pad_id)
        device = batch.prompt_ids.device
        return dataclasses.replace(
            batch, prompt_ids=prompt_ids.to(device), prompt_mask=prompt_mask.to(device)
        )


def recompute_stock(module):
    """Gradient checkpointing of a transformers module, without the hook that frozen embeddings would need."""
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module.disable_input_require_grads()


def local_folder(name):
    """`name` if it is a folder, else the cached, or now downloaded, folder of that hub repository."""
    name = os.fspath(name)
    if os.path.isdir(name):
        return name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(
            f"{name} is no model folder: not a directory, nor a name like Qwen/Qwen3-ASR-0.6B-hf"
        )
    if re.fullmatch(r"Qwen/Qwen3-ASR-[\d.]+B", name):
        raise InputError(f"{name} has its original form (thinker.* keys); take {name}-hf")
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=patterns)
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = " ".join(str(error).split())[:80]
        where = "no such folder, and no such hub repository in the cache or within reach"
        raise InputError(
            f"{name}: {where} ({reason}); `hf download {name}` where there is a network"
        ) from error


@contextlib.contextmanager
def folder_errors():
    """Turns what libraries say of a broken model folder into one line."""
    config_error = huggingface_hub.errors.StrictDataclassError
    try:
        yield
    except (OSError, ValueError, safetensors.SafetensorError, config_error) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"is no model folder: {reason}") from error


def read_config(name, folder):
    """The config.json of a model folder as a dict. Raises InputError."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{name} is no model folder: config.json: {error}") from None


def model_kind(name, folder):
    """The kind in config.json, glmasr or qwen3_asr. InputError for others, with the command that converts."""
    config = read_config(name, folder)
    if "whisper_config" in config:
        raise InputError(f"{name} is a released ARK-ASR; convert it: python -m prepare.ark {name} --out DIR")
    if "thinker_config" in config:
        size = "0.6B" if "0.6b" in os.path.basename(os.path.realpath(folder)).lower() else "1.7B"
        raise InputError(
            f"{name} has Qwen3-ASR's original form (thinker.* keys); take Qwen/Qwen3-ASR-{size}-hf"
        )
    kind = config.get("model_type")
    if kind not in ("glmasr", "qwen3_asr"):
        raise InputError(
            f"{name}: model_type is {kind!r}, not glmasr or qwen3_asr; python -m prepare.student makes one"
        )
    return kind


def check_languages(languages, default_language, *models):
    """Raises InputError where a model's prompt cannot name the language of a clip.

    languages: {code, or None where a line names none: the first clip with it}; default_language: --language.
    Called at the start, so that no error about a language can come later.
    """
    for model in models:
        known = model.front_end.languages
        if not known:
            continue
        names = f"the prompt of {model.architecture} knows {', '.join(sorted(known))}"
        if default_language is not None and default_language not in known:
            raise InputError(f"--language {default_language}: {names}")
        for language, clip in languages.items():
            if language is None and default_language is None:
                raise InputError(f'{clip.where}: no "language": give --language; {names}')
            if language is not None and language not in known:
                raise InputError(f'{clip.where}: "language" {language}: {names}')


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


def narrow_support(kind, support_ids, support_mask, student_topk, teacher_topk):
    """The mask (N, 2K) of a support whose ids are all in the union.

    kind: "union" (the paper's), "teacher" (T_t), "student" (S_t) or "intersection" (S_t ∩ T_t).
    support_ids, support_mask (N, 2K) are the union's; student_topk, teacher_topk (N, K).
    """
    if kind in ("student", "intersection"):
        support_mask = support_mask & is_in(support_ids, student_topk)
    if kind in ("teacher", "intersection"):
        support_mask = support_mask & is_in(support_ids, teacher_topk)
    return support_mask


def is_in(ids, topk_ids, chunk=1024):
    """(N, U) bool: is ids[n, u] one of the row's topk_ids (N, K)? `chunk` rows at a time."""
    parts = []
    for rows, row_topk in zip(ids.split(chunk), topk_ids.split(chunk)):
        parts.append((rows[:, :, None] == row_topk[:, None]).any(dim=2))
    return torch.cat(parts)


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
    floor = torch.tensor(-1e9, dtype=dtype, device=support_mask.device)  # finite: 0 · (−∞) would be NaN
    scaled_student = torch.where(inside, student_logits.to(dtype) / temperature, floor)
    scaled_teacher = torch.where(inside, teacher_logits.detach().to(dtype) / temperature, floor)
    log_q = scaled_student.log_softmax(dim=1)
    log_p = scaled_teacher.log_softmax(dim=1)
    if divergence == "forward":
        kl = forward_kl(log_p, log_q)
    elif divergence == "reverse":
        kl = reverse_kl(log_p, log_q)
    else:
        kl = generalized_jsd(log_p, log_q, beta)
    return torch.where(counted, temperature**2 * kl, 0.0), counted


def forward_kl(log_p, log_q):
    """KL(p ‖ q) = Σ p (log p − log q), nats: (N, U), (N, U) → (N,). q has to cover all of p."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def reverse_kl(log_p, log_q):
    """KL(q ‖ p) = Σ q (log q − log p), nats: (N, U), (N, U) → (N,). q may choose one mode of p."""
    return (log_q.exp() * (log_q - log_p)).sum(dim=1)


def generalized_jsd(log_p, log_q, beta):
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m), m = β p + (1 − β) q, 0 < β < 1, nats: (N, U), (N, U) → (N,)."""
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)


@torch.no_grad()
def teacher_support(teacher, hidden, student_topk, alignment, k, chunk=1024):
    """What the teacher says at each row: T_t, the union with S_t, and its scores there.

    hidden (N, H') the teacher's rows, student_topk (N, K) → support_ids, support_mask (N, 2K), the
    teacher's raw logits on the support (N, 2K) float32, its own top-k (N, K). All ids are the student's, −1
    invalid. `chunk` rows at a time go through the head, so that no (N, V') tensor is kept.
    """
    supports = []
    masks = []
    scores = []
    topks = []
    for rows, student_ids in zip(hidden.split(chunk), student_topk.split(chunk)):
        logits = teacher.head(rows).float().masked_fill(alignment.teacher_forbidden, -math.inf)  # (chunk, V')
        top = top_ids(logits, k)
        teacher_ids = torch.where(top >= 0, alignment.to_student[top.clamp(min=0)], -1)
        support_ids, support_mask = union_support(student_ids, teacher_ids)
        # The scores once more, in float32: bf16 logits near 20 are 0.1 apart. (Their top-k may have ties.)
        columns = alignment.to_teacher[support_ids.clamp(min=0)].clamp(min=0)
        supports.append(support_ids)
        masks.append(support_mask)
        scores.append(support_scores(teacher.head.weight, rows, columns))
        topks.append(teacher_ids)
    return torch.cat(supports), torch.cat(masks), torch.cat(scores), torch.cat(topks)


def support_scores(head_weight, hidden, support_ids):
    """A model's raw logits on the support only: (V, H), (N, H), (N, U) ids → (N, U) with gradient.

    float32 (float64 if the matrix is). No (N, V) tensor is made.
    """
    dtype = torch.promote_types(head_weight.dtype, torch.float32)
    return SupportScores.apply(head_weight, hidden.to(dtype), support_ids.clamp(min=0))


class SupportScores(torch.autograd.Function):
    """scores[n, u] = weight[ids[n, u]] · hidden[n], a chunk of rows at a time, in backward too.

    Plain indexing would keep the gathered rows (N, U, H) for backward: 64 × 896 floats a row, 230 kB.
    """

    cpu_chunk_floats = 2**20  # of gathered rows at a time: what a cache holds
    gpu_chunk_floats = 2**24  # enough for a GPU to be busy

    @staticmethod
    def chunks(hidden, ids):
        """Slices of rows whose gathered matrix has at most so many entries (one row may exceed it)."""
        n_floats = SupportScores.gpu_chunk_floats if hidden.is_cuda else SupportScores.cpu_chunk_floats
        n = max(n_floats // max(ids.shape[1] * hidden.shape[1], 1), 1)
        return [slice(first, first + n) for first in range(0, len(ids), n)]

    @staticmethod
    def forward(ctx, weight, hidden, ids):
        ctx.save_for_backward(weight, hidden, ids)
        scores = hidden.new_empty(ids.shape)
        for rows in SupportScores.chunks(hidden, ids):
            gathered = F.embedding(ids[rows], weight).to(hidden.dtype)  # (n, U, H)
            scores[rows] = torch.einsum("nuh,nh->nu", gathered, hidden[rows])
        return scores

    @staticmethod
    def backward(ctx, grad):
        weight, hidden, ids = ctx.saved_tensors
        is_trained = ctx.needs_input_grad[0]
        grad_weight = torch.zeros_like(weight, dtype=hidden.dtype) if is_trained else None
        grad_hidden = torch.empty_like(hidden)
        for rows in SupportScores.chunks(hidden, ids):
            gathered = F.embedding(ids[rows], weight).to(hidden.dtype)
            grad_hidden[rows] = torch.einsum("nu,nuh->nh", grad[rows], gathered)
            if is_trained:
                outer = grad[rows][:, :, None] * hidden[rows][:, None]  # (n, U, H)
                grad_weight.index_add_(0, ids[rows].flatten(), outer.flatten(0, 1))
        return grad_weight.to(weight.dtype) if is_trained else None, grad_hidden, None


def full_kl(
    student,
    student_hidden,
    teacher,
    teacher_hidden,
    alignment,
    temperature=1.0,
    divergence="forward",
    beta=0.5,
    chunk=256,
):
    """`support_kl` on all ids that both models may write: (N, H), (N, H') rows → kl (N,), counted (N,).

    Exact. The logits of `chunk` rows at a time exist, and are computed again in backward.
    """
    columns = alignment.to_teacher.clamp(min=0)  # (V,)
    allowed = ~alignment.student_forbidden
    # In float32 as on the union: a teacher in bf16 would round its logits.
    teacher_weight = teacher.head.weight.detach()[columns].float()  # (V, H')

    def kl_of_chunk(student_rows, teacher_rows):
        teacher_logits = F.linear(teacher_rows.float(), teacher_weight)
        student_logits = student.head(student_rows).float()
        mask = allowed.expand(len(teacher_rows), -1)
        return support_kl(student_logits, teacher_logits, mask, temperature, divergence, beta)

    kls = []
    counted_parts = []
    for student_rows, teacher_rows in zip(student_hidden.split(chunk), teacher_hidden.split(chunk)):
        kl, counted = checkpoint(kl_of_chunk, student_rows, teacher_rows, use_reentrant=False)
        kls.append(kl)
        counted_parts.append(counted)
    return torch.cat(kls), torch.cat(counted_parts)


def token_ce(model, hidden, ids, chunk=256):
    """Cross-entropy −log q(token), over the whole vocabulary, nats: rows (N, H), tokens (N,) → (N,).

    The logits of `chunk` rows at a time exist, and are computed again in backward.
    """

    def ce_of_chunk(rows, row_ids):
        return F.cross_entropy(model.head(rows).float(), row_ids, reduction="none")

    parts = []
    for rows, row_ids in zip(hidden.split(chunk), ids.split(chunk)):
        parts.append(checkpoint(ce_of_chunk, rows, row_ids, use_reentrant=False))
    return torch.cat(parts)


@torch.no_grad()
def student_support(student, hidden, alignment, k, chunk=1024):
    """S_t of a transcript that is given: the student's top-k at its rows (N, H). → ids (N, K), −1 invalid."""
    topks = []
    for rows in hidden.split(chunk):
        logits = student.head(rows).float().masked_fill(alignment.student_forbidden, -math.inf)
        topks.append(top_ids(logits, k))
    return torch.cat(topks)


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


def align_vocabularies(student, teacher):
    """The `Alignment` of two models. InputError where over 1 % of the student's tokens lack a counterpart."""
    student_forbidden = student.forbidden.tolist()
    teacher_forbidden = teacher.forbidden.tolist()
    teacher_vocabulary = teacher.front_end.tokenizer.get_vocab()
    pairs = {student.front_end.stop_id: teacher.front_end.stop_id}
    for token, student_id in student.front_end.tokenizer.get_vocab().items():
        teacher_id = teacher_vocabulary.get(token)
        if teacher_id is None or student_forbidden[student_id] or teacher_forbidden[teacher_id]:
            continue
        pairs[student_id] = teacher_id

    n_text = student_forbidden.count(False)
    if len(pairs) < 0.99 * n_text:
        shared = f"only {len(pairs)} of the student's {n_text} text tokens are in the teacher's vocabulary"
        raise InputError(
            f"--student, --teacher: {shared}; distillation compares token by token: one tokenizer"
        )
    to_teacher = torch.full((len(student_forbidden),), -1)
    to_student = torch.full((len(teacher_forbidden),), -1)
    student_ids = torch.tensor(list(pairs.keys()))
    teacher_ids = torch.tensor(list(pairs.values()))
    to_teacher[student_ids] = teacher_ids
    to_student[teacher_ids] = student_ids
    device = student.device
    return Alignment(
        to_teacher=to_teacher.to(device),
        to_student=to_student.to(device),
        student_forbidden=(to_teacher < 0).to(device),
        teacher_forbidden=(to_student < 0).to(device),
    )


def teacher_rollout(rollout, alignment):
    """The same transcripts in the teacher's ids. Ids in, ids out: nothing goes through text."""
    ids = alignment.to_teacher[rollout.ids]
    assert (ids[rollout.row_mask()] >= 0).all(), (
        "a transcript token has no counterpart in the teacher's vocabulary: forbid it (student_forbidden), "
        "or leave the clip out"
    )
    return Rollout(ids.clamp(min=0), rollout.lens, rollout.stopped)  # padding becomes id 0 and is never read


def missing_token(text, front_end, to_teacher):
    """The first token of a text that has no counterpart in the teacher (to_teacher (V,) < 0), or None."""
    for i in front_end.encode_text(text):
        if to_teacher[i] < 0:
            return front_end.decode([i])
    return None


def student_rollout(rollout, alignment):
    """A transcript of the teacher in the student's ids. It was written without ids that the student lacks."""
    ids = alignment.to_student[rollout.ids]
    assert (ids[rollout.row_mask()] >= 0).all(), "a transcript token has no counterpart in the student"
    return Rollout(ids.clamp(min=0), rollout.lens, rollout.stopped)


@torch.no_grad()
def self_check(model, waveforms, languages, default_language=None):
    """Does the model agree with itself? Its greedy transcripts of a few clips, scored by teacher forcing.

    → {nll: nats a token; agreement: share of tokens that are the likeliest of their row; batch_difference:
    largest difference of a logit between clips in a batch and one by one, over the largest logit;
    endoftext: mean probability of the pad token where the model stops (Qwen3-ASR ends on two ids, we allow
    one)}. InputError where rows are shifted or batches leak. The limits are wide, so that no sound model is
    refused: a greedy token's likelihood is at least 1 / V, and two logits count as equal when they differ by
    less than 0.1 % of the largest one, or 10 % in bf16.
    """
    was_training = model.training
    model.eval()
    batch = collate(waveforms, model.front_end, languages, default_language).to(model.device)
    rollout = model.sample(batch, 32, k=1)
    batch_logits = model.head(model(batch, rollout)).float()  # (N, V)
    single_logits = []
    for b, waveform in enumerate(waveforms):
        one = collate([waveform], model.front_end, languages[b : b + 1], default_language).to(model.device)
        part = Rollout(rollout.ids[b : b + 1], rollout.lens[b : b + 1], rollout.stopped[b : b + 1])
        single_logits.append(model.head(model(one, part)).float())
    single_logits = torch.cat(single_logits)
    model.train(was_training)

    tokens = rollout.ids[rollout.row_mask()][:, None]  # (N, 1)
    is_stop = tokens[:, 0] == model.front_end.stop_id
    endoftext = batch_logits.softmax(dim=1)[is_stop, model.front_end.pad_id]
    batch_logits = batch_logits.masked_fill(model.forbidden, -math.inf)
    largest = single_logits[:, ~model.forbidden].abs().max()
    is_low_precision = model.bf16 or model.head.weight.dtype != torch.float32
    tolerance = 0.1 if is_low_precision else 1e-3
    difference = (batch_logits - single_logits)[:, ~model.forbidden].abs().max() / largest
    best_logits = batch_logits.amax(dim=1, keepdim=True)
    is_likeliest = batch_logits.gather(1, tokens) >= best_logits - tolerance * largest
    check = {
        "nll": -batch_logits.log_softmax(dim=1).gather(1, tokens).mean().item(),
        "agreement": is_likeliest.float().mean().item(),
        "batch_difference": difference.item(),
        "endoftext": endoftext.mean().item() if len(endoftext) else 0.0,
    }
    limit = math.log(int((~model.forbidden).sum())) + tolerance
    if not (check["nll"] <= limit and check["agreement"] >= 0.95 and check["batch_difference"] <= tolerance):
        sound = f"sound: nll ≤ {limit:.1f}, agreement ≥ 0.95, batch_difference ≤ {tolerance:g}"
        raise InputError(
            f"self-check: {model.architecture}: prompt, rows or masks are misaligned: {check}; {sound}"
        )
    return check


# ----------------------------------------------------------------------------------------------------------
# LoRA (not in the paper): y = W x + (alpha / rank) B A x on the LM's projections, and W stays as it is
# ----------------------------------------------------------------------------------------------------------

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def add_lora(model, rank, alpha, seed):
    """Freezes the LM and puts LoRA beside its projections, by peft. A (rank, in) is drawn, B (out, rank) 0.

    Raises InputError where peft is not installed.
    """
    try:
        import peft
    except ImportError:
        raise InputError("--lora-rank needs the package peft: pip install peft") from None
    torch.manual_seed(seed)  # the same A on all ranks
    model.lm_head.requires_grad_(False)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=PROJECTIONS)
    # Only LoRA's parameters require a gradient afterwards, and they are float32.
    peft.inject_adapter_in_model(config, model.lm)
    # As peft reads it beside the whole stock model, whose encoder has projections of the same names.
    names = "|".join(PROJECTIONS)
    model.lora_config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=rf".*\.language_model\..*\.({names})", inference_mode=True
    )


def is_lora(module):
    """Is it a linear layer with the plain LoRA of `add_lora`, and nothing else on it?"""
    # By name, because peft need not be installed.
    if (type(module).__module__, type(module).__name__) != ("peft.tuners.lora.layer", "Linear"):
        return False
    has_dropout = any(type(dropout) is not nn.Identity for dropout in module.lora_dropout.values())
    has_bias = any(module.lora_bias.values())
    is_plain = not (
        module.merged or module.disable_adapters or module.lora_variant or has_dropout or has_bias
    )
    has_one_adapter = list(module.lora_A) == ["default"] and module.active_adapters == ["default"]
    return is_plain and has_one_adapter


def weight_of(linear):
    """The weight (out, in) that a linear layer computes with, LoRA's product added where it has one."""
    if is_lora(linear):
        return linear.base_layer.weight + linear.get_delta_weight("default")
    return linear.weight


@torch.no_grad()
def merged_weights(model):
    """The state dict on the CPU under stock's names: LoRA is added to the weights that it sits on."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            weights[name.replace(".base_layer.", ".")] = tensor.cpu()
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            assert is_lora(module), (
                f"{name}: a saved folder can hold plain LoRA only, without dropout or DoRA"
            )
            weights[f"{name}.weight"] = weight_of(module).cpu()
    return weights


def save_lora(model, folder):
    """Writes A and B of all projections in peft's own format, for stock transformers and vLLM."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            weights["base_model.model." + name.replace(".default.", ".")] = tensor.cpu().contiguous()
    model.lora_config.save_pretrained(folder)
    save_file(weights, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})


# ----------------------------------------------------------------------------------------------------------
# Optimizer, schedule, checkpoints. `trained` is {name: parameter} of all that trains.
# ----------------------------------------------------------------------------------------------------------

PARTS = {  # by the names of stock transformers; with tied weights the embeddings are the output matrix too
    "encoder": ("model.audio_tower.",),
    "adapter": ("model.multi_modal_projector.",),
    "lm": ("model.language_model.", "lm_head."),
}


def trained_parameters(model, parts=tuple(PARTS)):
    """Freezes the parts that are not named, and returns {name: parameter} of all that trains.

    The paper trains all parts. A parameter that is frozen already stays so: an adapter such as LoRA freezes
    the weights under it. A module that a fork adds belongs to no part, and trains.
    """
    frozen = []
    for part in PARTS.keys() - set(parts):
        frozen += PARTS[part]
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(frozen)):
            parameter.requires_grad_(False)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizer(trained, lr, weight_decay):
    """AdamW (0.9, 0.95); no decay on norms, biases, embeddings and the output matrix."""
    decayed = []
    not_decayed = []
    for name, parameter in trained.items():
        is_exempt = parameter.ndim < 2 or "embed_tokens" in name or "lm_head" in name
        (not_decayed if is_exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def cosine_lr(step, steps, warmup_steps, lr):
    """Learning rate of update `step` (from 0): linear warm-up, then a cosine to 0 at `steps`."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))


def sum_gradients(trained, bucket_floats=2**24):
    """Sums each parameter's gradient over the ranks, in one fixed order, in flat buckets of about 64 MB.

    A gradient that a rank does not have, as after a step without a micro-batch, counts as zeros.
    """
    buckets = [[]]
    size = 0
    for parameter in trained.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if buckets[-1] and size + parameter.numel() > bucket_floats:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter.grad)
        size += parameter.numel()
    if not dist.is_initialized():
        return
    for grads in buckets:
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        parts = flat.split([grad.numel() for grad in grads])
        for grad, part in zip(grads, parts):
            grad.copy_(part.view_as(grad))


def check_replicas(trained):
    """Stops where the ranks' weights have come apart: every rank holds the same student, bit for bit."""
    sums = [parameter.detach().view(torch.int32).sum(dtype=torch.int64) for parameter in trained.values()]
    checksums = gather(torch.stack(sums).tolist())
    assert all(checksum == checksums[0] for checksum in checksums), "the ranks' weights have come apart"


def save_checkpoint(out, step, model, trained, optimizer, keep):
    """Writes out/step-N: `model`, a stock folder in float32, and state.safetensors, what else resuming needs.

    With LoRA also `lora`, peft's folder.

    The state holds the step, the updates made, AdamW's moments by parameter name, and every trained tensor
    that the stock folder does not hold, such as LoRA's. All ranks call it; rank 0 writes. Complete or not at
    all: written beside and renamed. The last `keep` checkpoints stay.
    """
    check_replicas(trained)
    if rank_and_world()[0] == 0:
        final = os.path.join(out, f"step-{step}")
        partial = final + ".partial"
        for leftover in glob.glob(os.path.join(glob.escape(out), "step-*.partial")):
            shutil.rmtree(leftover)
        model.save_pretrained(os.path.join(partial, "model"))
        if model.lora_config is not None:
            save_lora(model, os.path.join(partial, "lora"))
        state = {"step": torch.tensor(step), "updates": torch.tensor(0)}
        in_folder = {name for name in model.state_dict() if ".lora_" not in name}
        for name, parameter in trained.items():
            moments = optimizer.state.get(parameter, {})
            if moments:
                state["updates"] = moments["step"].long().cpu()
                state[f"exp_avg.{name}"] = moments["exp_avg"].cpu()
                state[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"].cpu()
            if name not in in_folder:
                state[f"weight.{name}"] = parameter.detach().cpu()
        save_file(state, os.path.join(partial, "state.safetensors"))
        os.rename(partial, final)
        for folder in list(complete_steps(out).values())[:-keep]:
            shutil.rmtree(folder)
    barrier()


def model_to_train(name, checkpoint, lora_rank, lora_alpha, seed):
    """The model of a run: `name` at its beginning, later that of its checkpoint; with LoRA where rank > 0.

    A LoRA run always goes on with the weights that it began with, because a checkpoint's folder has LoRA
    added to them. `load_state` then restores A and B, and what trained beside them.
    """
    folder = name
    if checkpoint and not lora_rank:
        folder = os.path.join(checkpoint, "model")
    model = SpeechLM.from_pretrained(folder)
    if lora_rank:
        add_lora(model, lora_rank, lora_alpha, seed)
    return model


def load_state(folder, model, trained, optimizer):
    """Restores what `save_checkpoint` wrote beside the model folder. InputError where it does not fit."""
    state = load_file(os.path.join(folder, "state.safetensors"))
    updates = float(state["updates"])
    # With LoRA, what trained beside it is in the stock folder.
    has_lora = model.lora_config is not None
    weights = load_file(os.path.join(folder, "model", "model.safetensors")) if has_lora else {}
    for name, parameter in trained.items():
        weight = state.get(f"weight.{name}", weights.get(name))
        if weight is not None:
            parameter.data.copy_(weight)
        elif has_lora:
            raise InputError(f"--resume: {folder} has no weights of {name}; it is another model's")
        if updates == 0:
            continue
        if f"exp_avg.{name}" not in state:
            raise InputError(f"--resume: {folder} has no moments of {name}; it is another model's")
        optimizer.state[parameter] = {
            "step": torch.tensor(updates, device=parameter.device),
            "exp_avg": state[f"exp_avg.{name}"].to(parameter.device),
            "exp_avg_sq": state[f"exp_avg_sq.{name}"].to(parameter.device),
        }


def save_model(out, model):
    """Writes out/model, the finished student, beside and renamed. All ranks call it; rank 0 writes.

    With LoRA also out/lora.
    """
    if rank_and_world()[0] == 0:
        if model.lora_config is not None:
            save_lora(model, os.path.join(out, "lora"))
        final = os.path.join(out, "model")
        for folder in (final, final + ".partial"):
            shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(final + ".partial")
        os.rename(final + ".partial", final)
    barrier()


# ----------------------------------------------------------------------------------------------------------
# The fast decoder: equal to `write_tokens`, only faster. Skip it on first reading.
# ----------------------------------------------------------------------------------------------------------
# It copies the LM's weights into fused matrices and keeps keys and values in fixed storage, so that a step
# is a few large operations, and on a GPU one CUDA graph. (Equal in float32; with bf16 it also rounds keys and
# rotary tables, which the plain loop keeps in float32.) A copy takes LoRA's product with it, and would pass
# over whatever else sits on a layer (a hook, another class): `may_copy_weights` is asked first.


def may_copy_weights(model):
    """May weights be copied? Only of stock modules with linear layers (plain or LoRA's) and without hooks."""
    kinds = getattr(model.lm.config, "layer_types", None) or []
    if any(kind != "full_attention" for kind in kinds):
        return False
    for module in (model.head, *model.lm.modules()):
        is_stock = type(module).__module__.startswith(("torch.nn.", "transformers.")) or is_lora(module)
        if not is_stock or "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return False
    with_bias = [model.lm.embed_tokens]  # or without
    without_bias = [model.head]
    for layer in model.lm.layers:
        attention = layer.self_attn
        mlp = layer.mlp
        with_bias += [attention.q_proj, attention.k_proj, attention.v_proj]
        without_bias += [attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    layers = [module.base_layer if is_lora(module) else module for module in with_bias + without_bias]
    are_plain = [type(layer) in (nn.Linear, nn.Embedding) for layer in layers]
    return all(are_plain) and all(module.bias is None for module in without_bias)


TOKENS_AT_ONCE = 4  # asking whether all rows are through waits for the device, so only every few tokens


def write_fast(model, hidden, cache, mask, caps, forbidden, k, temperature, uniforms):
    """`write_tokens` with fused weights, four tokens as one unit: a CUDA graph where there is a GPU."""
    B = len(caps)
    T = math.ceil(int(caps.max()) / TOKENS_AT_ONCE) * TOKENS_AT_ONCE
    decoder = FastDecoder(model.lm, cache, mask, T)
    head = model.head.weight.to(decoder.dtype)
    embeddings = model.lm.embed_tokens.weight
    hidden = hidden.clone()
    ids = caps.new_full((B, T), -1)
    topk_ids = caps.new_zeros((B, T, min(k, len(forbidden))))
    t = caps.new_zeros(1)  # the position to write, on the device, where a replayed graph finds it
    offsets = torch.arange(TOKENS_AT_ONCE, device=caps.device)
    if uniforms is not None:
        uniforms = F.pad(uniforms.to(caps.device), (0, T))

    def write_unit():
        """Everything is written in place, so that a graph can be replayed."""
        unit_logits = []
        for _ in range(TOKENS_AT_ONCE):
            logits = F.linear(hidden.to(decoder.dtype), head).float()  # (B, V)
            logits = logits.masked_fill(forbidden, -math.inf)
            unit_logits.append(logits)
            token = pick_tokens(
                logits, temperature, None if uniforms is None else uniforms.index_select(1, t)
            )
            ids.index_copy_(1, t, token[:, None])
            hidden.copy_(decoder.step(F.embedding(token, embeddings), t))
            t.add_(1)
        top = top_ids(torch.stack(unit_logits, dim=1), k)  # (B, 4, K)
        topk_ids.index_copy_(1, t - TOKENS_AT_ONCE + offsets, top)

    replay = write_unit
    for done in range(TOKENS_AT_ONCE, T + 1, TOKENS_AT_ONCE):
        if ids.is_cuda and done == 2 * TOKENS_AT_ONCE:  # the first unit has warmed the kernels up
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                write_unit()
            replay = graph.replay
        replay()
        has_stopped = (ids[:, :done] == model.front_end.stop_id).any(dim=1)
        if (has_stopped | (caps <= done)).all():
            break
    return ids, topk_ids


@dataclasses.dataclass
class FusedLayer:
    """The weights of one LM layer, and its storage of keys and values."""

    norm_1: torch.Tensor  # (H,)
    qkv: torch.Tensor  # ((heads + 2 · kv heads) · d, H)
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None  # (heads + kv heads, d), Qwen3's norms of queries and keys
    keys: torch.Tensor  # (B · kv heads, S + T, d)
    values: torch.Tensor
    o: torch.Tensor
    norm_2: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class FastDecoder:
    """One-token steps of a Qwen LM after a prefill, over fixed storage and with fused projections.

    cache: the prefill's, S positions; prompt_mask (B, S); T: tokens that may follow. Weights are copied, so a
    decoder lives for one batch.
    """

    def __init__(self, lm, cache, prompt_mask, T):
        config = lm.config
        device = prompt_mask.device
        cached = cache.layers
        self.dtype = cached[0].values.dtype
        if torch.is_autocast_enabled(device.type):
            self.dtype = torch.get_autocast_dtype(device.type)
        self.n_heads = config.num_attention_heads
        self.n_kv_heads = config.num_key_value_heads
        self.eps = config.rms_norm_eps
        self.activation = lm.layers[0].mlp.act_fn
        self.norm = lm.norm.weight
        self.S = prompt_mask.shape[1]
        # Added to attention scores: −∞ for padding, and for positions that are not written yet.
        mask = F.pad(prompt_mask, (0, T)).repeat_interleave(self.n_kv_heads, dim=0)
        self.bias = torch.zeros(mask.shape, dtype=self.dtype, device=device).masked_fill(~mask, -math.inf)[
            :, None
        ]
        self.next_position = prompt_mask.sum(dim=1)  # (B,) of the first token
        positions = torch.arange(self.S + T, device=device)[None]
        cos, sin = lm.rotary_emb(cached[0].keys, positions)
        self.rotary = torch.cat([cos, sin], dim=2)[0].to(self.dtype)  # (S + T, 2d)
        self.layers = [self.fuse(layer, past, T) for layer, past in zip(lm.layers, cached)]

    def fuse(self, layer, past, T):
        attention = layer.self_attn
        mlp = layer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        has_bias = attention.q_proj.bias is not None
        qk_norm = None
        if hasattr(attention, "q_norm"):
            q_norm = attention.q_norm.weight.expand(self.n_heads, -1)
            k_norm = attention.k_norm.weight.expand(self.n_kv_heads, -1)
            qk_norm = torch.cat([q_norm, k_norm]).to(self.dtype)
        return FusedLayer(
            norm_1=layer.input_layernorm.weight,
            qkv=torch.cat([weight_of(projection) for projection in projections]).to(self.dtype),
            qkv_bias=torch.cat([p.bias for p in projections]).to(self.dtype) if has_bias else None,
            qk_norm=qk_norm,
            keys=F.pad(past.keys.flatten(0, 1), (0, 0, 0, T)).to(self.dtype),
            values=F.pad(past.values.flatten(0, 1), (0, 0, 0, T)).to(self.dtype),
            o=weight_of(attention.o_proj).to(self.dtype),
            norm_2=layer.post_attention_layernorm.weight,
            gate_up=torch.cat([weight_of(mlp.gate_proj), weight_of(mlp.up_proj)]).to(self.dtype),
            down=weight_of(mlp.down_proj).to(self.dtype),
        )

    def step(self, x, t):
        """Hidden rows (B, H) after token t, a (1,) tensor; x (B, H): its embeddings, of the same dtype."""
        position = self.S + t
        self.bias.index_fill_(2, position, 0.0)  # (B · kv, 1, S + T)
        cos, sin = F.embedding(self.next_position + t, self.rotary)[:, None].chunk(2, dim=2)  # (B, 1, d)
        for layer in self.layers:
            y = self.normed(x, layer.norm_1).to(self.dtype)
            x = x + self.attend(layer, y, cos, sin, position)
            y = self.normed(x, layer.norm_2).to(self.dtype)
            gate, up = F.linear(y, layer.gate_up).chunk(2, dim=-1)
            x = x + F.linear(self.activation(gate) * up, layer.down)
        return self.normed(x, self.norm)

    def normed(self, x, weight):
        return F.rms_norm(x, x.shape[-1:], weight, self.eps)

    def attend(self, layer, x, cos, sin, position):
        """x (B, H) → (B, H); key and value of this position are written into the layer's storage."""
        B = len(x)
        d = cos.shape[2]
        qkv = F.linear(x, layer.qkv, layer.qkv_bias).view(B, -1, d)
        qk, v = qkv.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=1)  # (B, heads, d)
        if layer.qk_norm is not None:
            qk = F.rms_norm(qk, (d,), None, self.eps) * layer.qk_norm
        turned = torch.cat([-qk[..., d // 2 :], qk[..., : d // 2]], dim=2)
        q, k = (qk * cos + turned * sin).split([self.n_heads, self.n_kv_heads], dim=1)
        layer.keys.index_copy_(1, position, k.reshape(-1, 1, d))
        layer.values.index_copy_(1, position, v.reshape(-1, 1, d))
        # Query heads that share a key head take the place of query positions. Written out: for one position
        # PyTorch's own attention takes three times as long on a CPU.
        q = q.reshape(B * self.n_kv_heads, -1, d)  # (B · kv, heads / kv, d)
        scores = torch.baddbmm(self.bias, q, layer.keys.mT, alpha=d**-0.5)  # (B · kv, heads / kv, S + T)
        weights = scores.softmax(dim=2, dtype=torch.float32).to(self.dtype)
        return F.linear(torch.bmm(weights, layer.values).view(B, -1), layer.o)
