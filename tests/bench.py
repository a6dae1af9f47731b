"""Speed, as ratios of two things timed alternately in one process (median of 7 and more).

    python tests/bench.py --quick                   # the example's sizes, under 2 minutes on two CPU cores
    python tests/bench.py --real --json real.json   # the release's student and Qwen3-ASR-1.7B, on a GPU, bf16
    python tests/bench.py --growth                  # how the parts of a step grow with its sizes, on the CPU
    python tests/bench.py --memory                  # GPU memory of a step at full size, computed

Needs no files: weights are random, and the packages that only read audio may be absent (the row that needs
them is left out). Exit status 1 if a bar is unmet.
"""

import argparse
import dataclasses
import gc
import importlib.util
import itertools
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import threading
import time
import unittest.mock

import tokenizers
import torch
import torch.nn.functional as F
import transformers

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ABSENT = [name for name in ("soundfile", "torchaudio") if importlib.util.find_spec(name) is None]
for name in ABSENT:
    sys.modules[name] = unittest.mock.MagicMock()

import data  # noqa: E402
import model as m  # noqa: E402
from prepare.student import glm_asr_config  # noqa: E402

TOKENS = 64  # that every rollout writes


@dataclasses.dataclass
class Figure:
    """A measured ratio. A negative bar is an upper bound, None: only shown."""

    name: str
    value: float
    cpu_bar: float | None
    gpu_bar: float | None


# ---- timing and memory -------------------------------------------------------------------------------------


def sync():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(*functions, n=7):
    """Median seconds of each function, called in turn n times after a warm-up."""
    times = [[] for _ in functions]
    for i in range(n + 1):
        for function, taken in zip(functions, times):
            sync()
            start = time.perf_counter()
            function()
            sync()
            if i > 0:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def peak_extra(function):
    """Bytes that a second call needs above what the first one left.

    The allocator's peak on a GPU, else the resident set's, looked at every half millisecond.
    """
    function()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    peak = [before]
    done = threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return max(peak[0] - before, 2**20)


# ---- models with random weights, and clips -----------------------------------------------------------------


def byte_tokenizer():
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    specials = [m.PAD_TOKEN, m.STOP_TOKEN, *m.PROMPT_TOKENS, *m.Qwen3ASRFrontEnd.prompt_tokens]
    core.add_special_tokens(specials)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=m.STOP_TOKEN, pad_token=m.PAD_TOKEN
    )


def our_model(width, layers, audio_heads, hidden, lm_layers, heads, kv_heads, ffn, vocab_size):
    """A SpeechLM with an encoder of the first three sizes and a tied Qwen2 of the others."""
    text = transformers.Qwen2Config(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=lm_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab_size,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        initializer_range=0.06,
    )
    audio = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": audio_heads,
        "initializer_range": 0.05,
    }
    words = byte_tokenizer()
    return write_anything(m.SpeechLM(glm_asr_config(audio, text, words, tied=True), words))


def release_student():
    """The sizes of the released student: 1.15 billion parameters."""
    return our_model(1280, 32, 20, 896, 24, 14, 2, 4864, 151_936)


def qwen3_asr_1_7b():
    return qwen3_asr(width=1024, layers=24, audio_heads=16, hidden=2048, ffn=6144)


def qwen3_asr_0_6b():
    return qwen3_asr(width=896, layers=18, audio_heads=14, hidden=1024, ffn=3072)


def qwen3_asr(width, layers, audio_heads, hidden, ffn):
    """A Qwen3ASR with an encoder of the first three sizes and a tied Qwen3 of 28 layers of the others."""
    words = byte_tokenizer()
    audio = {
        "d_model": width,
        "encoder_layers": layers,
        "encoder_attention_heads": audio_heads,
        "encoder_ffn_dim": 4 * width,
        "output_dim": hidden,
    }
    text = {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    }
    audio_id = words.convert_tokens_to_ids("<|audio_pad|>")
    config = transformers.Qwen3ASRConfig(audio_config=audio, text_config=text, audio_token_id=audio_id)
    processor = unittest.mock.Mock(tokenizer=words)
    processor.apply_chat_template.return_value = (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    return write_anything(m.Qwen3ASR(transformers.Qwen3ASRForConditionalGeneration(config), processor))


def write_anything(model):
    """Allows every id but the stop token: a random model then uses the whole vocabulary and all tokens."""
    model.forbidden[:] = False
    model.forbidden[model.front_end.stop_id] = True
    return model.eval()


def batch_of(model, n_clips, seconds, device):
    """A Batch of random log-mels, all clips of one length (a multiple of 80 ms)."""
    waveforms = [torch.zeros(round(seconds * data.SAMPLE_RATE))] * n_clips
    n_frames = round(seconds * 100)
    with unittest.mock.patch.object(
        model.front_end, "features", lambda waveform: torch.randn(data.N_MELS, n_frames) * 0.5
    ):
        return data.collate(waveforms, model.front_end, ["en"] * n_clips).to(device)


def same_vocabulary(vocab_size, student_forbidden):
    """The Alignment of two models with the same ids, the teacher's all allowed."""
    ids = torch.arange(vocab_size, device=student_forbidden.device)
    return m.Alignment(ids, ids, student_forbidden, torch.zeros_like(student_forbidden))


# ---- the method: the fenced block of opd.py, in its three parts ----------------------------------------


def write_rollout(student, batch, alignment, k, max_new_tokens):
    encoded = student.encode(batch)
    rollout = student.sample(
        batch, max_new_tokens, k=k, forbidden=alignment.student_forbidden, encoded=encoded
    )
    return encoded, rollout


def ask_teacher(student, teacher, teacher_batch, alignment, rollout, k):
    student_topk = rollout.topk_ids[rollout.row_mask()]
    texts = student.front_end.texts(rollout)
    teacher_batch = teacher.with_script_languages(teacher_batch, texts)
    teacher_hidden = teacher(teacher_batch, m.teacher_rollout(rollout, alignment))
    return m.teacher_support(teacher, teacher_hidden, student_topk, alignment, k)


def learn(student, batch, rollout, encoded, support):
    support_ids, support_mask, teacher_logits, _ = support
    student_hidden = student(batch, rollout, encoded)
    student_logits = m.support_scores(student.head.weight, student_hidden, support_ids)
    kl, _ = m.support_kl(student_logits, teacher_logits, support_mask)
    kl.sum().backward()


# ---- the figures -------------------------------------------------------------------------------------------


def rollout_figures(student, batch):
    """Sampling beside stock `generate` of the saved folder; the floor of a decode step in seconds."""
    stock_class = transformers.GlmAsrForConditionalGeneration
    with tempfile.TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        stock = stock_class.from_pretrained(
            folder, dtype=student.head.weight.dtype, attn_implementation="sdpa"
        )
    stock = stock.to(student.device).eval()
    inputs = {
        "input_ids": batch.prompt_ids,
        "attention_mask": batch.prompt_mask.long(),
        "input_features": batch.mel.to(student.head.weight.dtype),
        "input_features_mask": torch.ones_like(batch.mel[:, 0], dtype=torch.long),
    }

    def ours():
        return student.sample(batch, TOKENS, k=32, tokens_per_second=0).ids

    def generate():
        written = stock.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        return written[:, batch.prompt_ids.shape[1] :]

    equal = (ours() == generate()).float().mean().item()
    ours_s, generate_s = alternate(ours, generate)
    figures = [
        Figure("rollout: generate / ours", generate_s / ours_s, 1.5, 8.0),
        Figure("rollout: share of equal tokens", equal, 0.99, 0.5),
    ]
    floor_s = decode_floor_s(student, batch)
    short_s = alternate(lambda: student.sample(batch, 4, k=32, tokens_per_second=0))[0]
    step_s = (ours_s - short_s) / (TOKENS - 4)
    figures.append(Figure("decode step: share of the memory floor", floor_s / step_s, None, 0.33))
    return figures, floor_s


def decode_floor_s(model, batch):
    """Seconds to read the LM's weights and the prompt's cache once, at the bandwidth of a copy."""
    big = torch.empty(2**30 if batch.mel.is_cuda else 2**26, dtype=torch.uint8, device=batch.mel.device)
    other = torch.empty_like(big)
    copy_s = alternate(lambda: other.copy_(big))[0]
    config = model.config.text_config
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * batch.prompt_ids.numel() * config.num_key_value_heads * d
    weights = sum(parameter.numel() for parameter in model.lm.parameters())  # the tied head is in it
    return (weights + cache) * model.head.weight.element_size() / (2 * big.numel() / copy_s)


def decoding_figures(name, model, batch, published=None):
    """Speed of decoding 64 tokens a clip: times real time, and the share of the memory floor of a step."""
    seconds = float(batch.seconds.sum())
    whole_s = alternate(lambda: model.sample(batch, TOKENS, tokens_per_second=0))[0]
    short_s = alternate(lambda: model.sample(batch, 4, tokens_per_second=0))[0]
    step_s = (whole_s - short_s) / (TOKENS - 4)
    beside = f" (published: {published})" if published else ""
    return [
        Figure(f"{name}: decoding, times real time{beside}", seconds / whole_s, None, None),
        Figure(f"{name}: share of the memory floor", decode_floor_s(model, batch) / step_s, None, 0.2),
    ]


def agreement_figure(model, batch, name, gpu_bar):
    """Share of greedy tokens that the fast decoder (a CUDA graph on a GPU) and the plain loop have alike."""
    fast = model.sample(batch, TOKENS, tokens_per_second=0).ids
    with unittest.mock.patch.object(m, "may_copy_weights", lambda model: False):
        loop = model.sample(batch, TOKENS, tokens_per_second=0).ids
    width = min(fast.shape[1], loop.shape[1])
    share = (fast[:, :width] == loop[:, :width]).float().mean().item()
    return Figure(f"greedy tokens, fast decoder = plain loop, {name}", share, gpu_bar, gpu_bar)


def union_loss_figures(n_rows, vocab_size, hidden, k, device):
    """The loss on the support beside the same loss by way of all logits."""
    weight = (torch.randn(vocab_size, hidden, device=device) * 0.02).requires_grad_()
    rows = torch.randn(n_rows, hidden, device=device).requires_grad_()
    teacher_logits = torch.randn(n_rows, 2 * k, device=device)
    ids = torch.stack([torch.randperm(vocab_size, device=device)[: 2 * k] for _ in range(n_rows)])
    mask = torch.ones_like(ids, dtype=torch.bool)

    def ours():
        weight.grad = rows.grad = None
        m.support_kl(m.support_scores(weight, rows, ids), teacher_logits, mask)[0].mean().backward()

    def plain():
        weight.grad = rows.grad = None
        log_q = (rows @ weight.T).float().log_softmax(-1).gather(1, ids)
        m.support_kl(log_q, teacher_logits, mask)[0].mean().backward()

    memory = peak_extra(ours) / peak_extra(plain)  # above a gradient that is there already
    ours_s, plain_s = alternate(ours, plain)
    return [
        Figure("union loss: full logits / ours, time", plain_s / ours_s, 3.0, 3.0),
        Figure("union loss: ours / full logits, memory", memory, -1 / 5, -1 / 10),
    ]


@torch.no_grad()
def teacher_head_figures(head, n_clips, length, transcript, k):
    """The head on the scored rows beside the head on all `length` positions, the last `transcript` scored."""
    V, H = head.weight.shape
    device = head.weight.device
    states = torch.randn(n_clips, length, H, device=device, dtype=head.weight.dtype)
    student_topk = torch.randint(V, (n_clips * transcript, k), device=device)
    alignment = same_vocabulary(V, torch.zeros(V, dtype=torch.bool, device=device))
    teacher = unittest.mock.Mock(head=head)

    def ours():
        rows = states[:, -transcript:].reshape(-1, H)
        return m.teacher_support(teacher, rows, student_topk, alignment, k)

    def plain():
        logits = head(states).float()
        rows = logits[:, -transcript:].reshape(-1, V)
        ids, _ = m.union_support(student_topk, rows.topk(k).indices)
        return rows.gather(1, ids.clamp(min=0))

    memory = peak_extra(ours) / peak_extra(plain)
    ours_s, plain_s = alternate(ours, plain)
    return [
        Figure("teacher head: whole sequence / ours, time", plain_s / ours_s, 2.0, 2.0),
        Figure("teacher head: ours / whole sequence, memory", memory, None, -1 / 10),
    ]


def step_figures(student, teacher, batch, teacher_batch, floor_s):
    """A whole step beside decode floor + teacher trunk + one SFT step of the same clips."""
    alignment = same_vocabulary(len(student.forbidden), student.forbidden)
    optimizer = m.make_optimizer(dict(student.named_parameters()), 1e-6, 0.0)
    fixed = student.sample(batch, TOKENS, tokens_per_second=0)

    def update():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def opd_step():
        encoded, rollout = write_rollout(student, batch, alignment, 32, TOKENS)
        support = ask_teacher(student, teacher, teacher_batch, alignment, rollout, 32)
        learn(student, batch, rollout, encoded, support)
        update()

    @torch.no_grad()
    def trunk():
        teacher(teacher_batch, fixed)

    def sft_step():
        with student.autocast():
            logits = student.head(student(batch, fixed)).float()
        F.cross_entropy(logits, fixed.ids[fixed.row_mask()]).backward()
        update()

    opd_s, trunk_s, sft_s = alternate(opd_step, trunk, sft_step)
    share = opd_s / (TOKENS * floor_s + trunk_s + sft_s)
    figures = [Figure("OPD step / (decode floor + teacher trunk + SFT step)", share, None, -1.3)]
    if batch.mel.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        opd_step()
        peak_gb = torch.cuda.max_memory_allocated() / 1e9
        figures.append(Figure(f"OPD step of {float(batch.seconds.sum()):g} s: peak GB", peak_gb, None, None))
        square = torch.randn(8192, 8192, device=batch.mel.device, dtype=torch.bfloat16)
        product_s = alternate(lambda: square @ square)[0]
        share = sft_operations(student, batch, fixed) / sft_s / (2 * 8192**3 / product_s)
        figures.append(Figure("SFT step: share of the matrix-product peak", share, None, 0.35))
    return figures


def sft_operations(student, batch, rollout):
    """Operations of an SFT step in encoder, LM and head: six for each weight and position, none of attention.

    (PyTorch's own counter knows no attention in which heads share keys.)
    """
    n_frames = 50 * float(batch.seconds.sum())
    n_positions = batch.prompt_ids.numel() + rollout.ids.numel()
    n_products = n_frames * n_computed(student.encoder) + n_positions * n_computed(student.lm)
    n_products += int(rollout.row_mask().sum()) * student.head.weight.numel()
    return 6 * n_products


def audio_figures():
    """Real time per worker core: 10 s of flac decoded and its log-mel taken."""
    if "soundfile" in ABSENT or "torchaudio" in ABSENT:
        return []
    import soundfile

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    speech = torch.cumsum(torch.randn(160_000), 0)
    with tempfile.NamedTemporaryFile(suffix=".flac") as file:
        soundfile.write(file.name, (0.3 * speech / speech.abs().max()).numpy(), 16_000, format="FLAC")
        clip = data.Clip(file.name, 10.0, "bench", {})
        taken_s = alternate(lambda: data.log_mel(data.load_audio(clip)), n=21)[0]
    torch.set_num_threads(threads)
    return [Figure("audio and log-mel, times real time per core", 10.0 / taken_s, 200.0, None)]


def largest_batch_figures(student, device):
    """Clips of 15 s whose SFT step fits into the GPU, by doubling."""
    largest = 0
    n_clips = 32
    while True:
        try:
            batch = batch_of(student, n_clips, 15.0, device)
            targets = student.sample(batch, TOKENS)
            with student.autocast():
                logits = student.head(student(batch, targets)).float()
            logits.logsumexp(-1).mean().backward()
        except torch.OutOfMemoryError:
            return [Figure("largest SFT batch of 15 s clips (powers of two)", largest, None, None)]
        finally:
            student.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        largest = n_clips
        n_clips *= 2


def part_times(n_clips, seconds, vocab_size, k):
    """Median seconds of rollout, teacher and update of one OPD step on the CPU."""
    device = torch.device("cpu")
    student = our_model(96, 3, 4, 96, 3, 4, 2, 288, vocab_size)
    teacher = our_model(160, 4, 4, 160, 4, 4, 2, 480, vocab_size).requires_grad_(False)
    batch, teacher_batch = (batch_of(model, n_clips, seconds, device) for model in (student, teacher))
    alignment = same_vocabulary(vocab_size, student.forbidden)
    kept = {}

    def first():
        kept["encoded"], kept["rollout"] = write_rollout(student, batch, alignment, k, 16)

    def second():
        kept["support"] = ask_teacher(student, teacher, teacher_batch, alignment, kept["rollout"], k)

    def third():
        learn(student, batch, kept["rollout"], kept["encoded"], kept["support"])
        student.zero_grad(set_to_none=True)

    return alternate(first, second, third)


def growth():
    """The parts of a step, one of clips, seconds, vocabulary and k varied."""
    base = {"n_clips": 16, "seconds": 2.0, "vocab_size": 512, "k": 32}
    changes = [{}, {"n_clips": 32}, {"n_clips": 64}, {"seconds": 4.0}, {"seconds": 8.0}]
    changes += [{"vocab_size": 16_384}, {"vocab_size": 151_936}, {"k": 8}, {"k": 128}]
    print("clips  seconds   vocab    k   rollout s  teacher s  update s   step / base")
    base_s = None
    for change in changes:
        size = {**base, **change}
        parts_s = part_times(**size)
        base_s = base_s or sum(parts_s)
        sizes = f"{size['n_clips']:5d} {size['seconds']:8.0f} {size['vocab_size']:7d} {size['k']:4d}"
        parts = "".join(f"{part_s:11.3f}" for part_s in parts_s)
        print(f"{sizes}{parts}{sum(parts_s) / base_s:14.2f}", flush=True)


# ---- memory of a step, computed --------------------------------------------------------------------------
# What autograd keeps between forward and backward, layer by layer, with fused attention as on a GPU: it keeps
# q, k, v and its output, and no matrix of scores. On a CPU other tensors are kept, by a few percent.
# tests/test_memory.py compares both with what autograd really keeps.

CARDS_GB = (24, 80)  # GB are 10⁹ bytes
RESERVE_GB = 2.0  # of a card, left to the CUDA context and to fragmentation
CLIP_S = 10.0  # every clip of the computed micro-batch is so long
# Its positions in an LM: at most 13 a second, the rest of the prompt, the transcript.
SEQUENCE = 130 + 16 + TOKENS
MOST_SECONDS = 1000  # nobody needs larger micro-batches, and kernels begin to refuse them
LORA_RANK = 16


def encoder_memory(model, bf16, recompute):
    """Bytes a second of audio: what encoder and adapter keep, and what backward needs beside it.

    A layer keeps, for each frame: the inputs of two norms (float32); the norms' outputs, once for each linear
    layer where autocast casts them; q, k, v and the attention's output; the outputs of fc1 and of gelu. With
    recompute only its input. A convolution keeps its output before and behind gelu.
    """
    config = model.config.audio_config
    D = config.hidden_size
    value_bytes = 2 if bf16 else 4  # bytes of what is computed with
    n_inputs = 4 if bf16 else 2
    layer = 2 * 4 * D + value_bytes * ((n_inputs + 4) * D + 2 * config.intermediate_size)
    if isinstance(model, m.Qwen3ASR):
        n_frames = 13  # a second
        n_channels = config.downsample_hidden_size
        conv_outputs = [n_channels * 64 * 50, n_channels * 32 * 25, n_channels * 16 * 13]  # mel bins × frames
        n_kept_front = 2 * sum(conv_outputs)
        n_kept_adapter = n_frames * 3 * D
        layer += value_bytes * D  # attention runs window by window, and its outputs are put together
    else:
        n_frames = 50
        conv_outputs = [100 * D, 50 * D]
        n_kept_front = (
            2 * conv_outputs[0] + conv_outputs[1]
        )  # the last gelu's output is the first layer's input
        n_kept_adapter = n_frames * (D + model.config.text_config.hidden_size)  # 4 H for four frames
    kept_bytes = (
        value_bytes * (100 * data.N_MELS + n_kept_front + n_kept_adapter) + n_frames * 4 * D
    )  # the last norm's
    kept_bytes += n_frames * config.num_hidden_layers * (value_bytes * D if recompute else layer)
    # Backward holds the gradients of one layer, and its activations where they are computed again.
    extra_bytes = max(n_frames * layer * (2 if recompute else 1), value_bytes * 2 * conv_outputs[0])
    return kept_bytes, extra_bytes


def lm_memory(model, length, bf16, recompute):
    """Bytes a position, in sequences of so many: what the LM keeps, and what backward needs beside it.

    A layer keeps: the inputs of two norms, and what they multiply by a trained weight (float32); the norms'
    outputs, once for each linear layer where autocast casts them; q, k and v of all heads and the attention's
    output; its row of the mask; four tensors of the MLP. Qwen3 norms q and k too. LoRA adds what lies between
    A and B of seven projections, and under it the norms' weights do not train. With recompute only the input.
    """
    config = model.config.text_config
    H = config.hidden_size
    value_bytes = 2 if bf16 else 4
    n_inputs = 5 if bf16 else 2
    n_normed = 1 if model.lora_config else 2
    n_queries = config.num_attention_heads * head_size(config)
    layer = 2 * n_normed * 4 * H
    layer += value_bytes * (n_inputs * H + 4 * n_queries + length + 4 * config.intermediate_size)
    if config.model_type == "qwen3":
        n_qk = n_queries + config.num_key_value_heads * head_size(config)
        layer += (4 if model.lora_config else 4 + value_bytes) * n_qk
    if model.lora_config:
        layer += value_bytes * 7 * model.lora_config.r
    kept_bytes = (
        config.num_hidden_layers * (4 * H if recompute else layer) + n_normed * 4 * H
    )  # the last norm's
    return kept_bytes, layer * (2 if recompute else 1)


def head_size(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def n_computed(module):
    """Parameters of its linear and convolutional layers: those that autocast casts."""
    n = 0
    for part in module.modules():
        if isinstance(part, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d)):
            n += sum(parameter.numel() for parameter in part.parameters(recurse=False))
    return n


def n_kept_weights(model, recompute):
    """Parameters whose bf16 copies the graph keeps: with recompute those outside the layers."""
    n = n_computed(model.model)
    if recompute:
        n -= n_computed(model.encoder.layers) + n_computed(model.lm.layers)
    return n


def fixed_memory(student, teacher, bf16, recompute):
    """Bytes of the student with gradients and optimizer, and of the teacher, whatever the micro-batch."""
    n_student = sum(parameter.numel() for parameter in student.parameters())
    n_trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    n_teacher = sum(parameter.numel() for parameter in teacher.parameters())
    student_bytes = 4 * n_student + (4 + 8) * n_trained  # weights; gradients and AdamW's two moments
    if bf16:
        # Backward needs the weights too: the graph keeps autocast's copies. The head is scored in float32.
        student_bytes += 2 * n_kept_weights(student, recompute)
    return student_bytes, (2 if bf16 else 4) * n_teacher


def step_memory(student, teacher, seconds, bf16, recompute):
    """Bytes above the fixed ones at the high points of a micro-batch of so many seconds: {name: bytes}."""
    value_bytes = 2 if bf16 else 4
    text = student.config.text_config
    n_clips = seconds / CLIP_S
    encoder_kept_bytes, encoder_extra_bytes = encoder_memory(student, bf16, recompute)
    lm_kept_bytes, lm_extra_bytes = lm_memory(student, SEQUENCE, bf16, recompute)
    n_positions = n_clips * SEQUENCE
    kept_bytes = seconds * encoder_kept_bytes + n_positions * lm_kept_bytes
    n_head = student.head.weight.numel()

    # Rollout: at most a fused copy of the LM, and in bf16 autocast's copies of trained weights; keys and
    # values of the prefill and in the decoder's storage; logits of four tokens, stacked, and two more. The LM
    # has kept nothing yet.
    rollout = seconds * encoder_kept_bytes + value_bytes * n_computed(student.lm)
    if bf16:
        rollout += 2 * n_head
        if recompute and not student.lora_config:  # without recompute they are among the fixed bytes
            rollout += 2 * n_computed(student.lm)
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size(text) * value_bytes
    rollout += n_positions * 2 * cache + n_clips * (4 + 4 + 2) * 4 * text.vocab_size

    # Teacher: its first convolution's output before and behind gelu; later the logits of 1,024 rows, twice,
    # while those of the rows before are still there.
    conv_outputs = seconds * teacher.config.audio_config.downsample_hidden_size * 64 * 50
    n_rows = min(n_clips * (TOKENS + 1), 1024)
    teacher_bytes = max(
        value_bytes * 2 * conv_outputs, 3 * 4 * n_rows * teacher.config.text_config.vocab_size
    )

    # Backward: the head's gradient waits for that of the embeddings, which share the tensor; and one layer.
    # LoRA has frozen the head.
    head_gradient = 4 * n_head if student.head.weight.requires_grad else 0
    pieces = 2 * 4 * m.SupportScores.gpu_chunk_floats  # gathered rows of the head, and their gradient
    backward = head_gradient + max(pieces, seconds * encoder_extra_bytes, n_positions * lm_extra_bytes)
    return {"rollout": rollout, "teacher": kept_bytes + teacher_bytes, "backward": kept_bytes + backward}


def largest_seconds(student, teacher, card_gb, bf16, recompute):
    """The largest whole --micro-seconds, up to MOST_SECONDS, whose step fits the card. 0: none does."""
    room = 1e9 * (card_gb - RESERVE_GB) - sum(fixed_memory(student, teacher, bf16, recompute))
    largest = 0
    too_large = MOST_SECONDS + 1
    while too_large - largest > 1:
        seconds = (largest + too_large) // 2
        if max(step_memory(student, teacher, seconds, bf16, recompute).values()) <= room:
            largest = seconds
        else:
            too_large = seconds
    return largest


STUDENTS = {"Qwen3-ASR-0.6B": qwen3_asr_0_6b, "ARK-ASR-0.6B": release_student}


def memory_student(name, rank, recompute):
    student = STUDENTS[name]()
    if rank:
        m.add_lora(student, rank, alpha=32.0, seed=0)
    if recompute:
        student.recompute_activations()
    return student.train()


def memory_rows():
    """A row for each student and mode. The models have sizes and no storage."""
    rows = []
    with torch.device("meta"):
        teacher = qwen3_asr_1_7b()
    for name, rank, recompute in itertools.product(STUDENTS, (0, LORA_RANK), (False, True)):
        with torch.device("meta"):
            student = memory_student(name, rank, recompute)
        for bf16 in (False, True):
            student_bytes, teacher_bytes = fixed_memory(student, teacher, bf16, recompute)
            encoder_kept_bytes, _ = encoder_memory(student, bf16, recompute)
            lm_kept_bytes, _ = lm_memory(student, SEQUENCE, bf16, recompute)
            row = {"student": name, "rank": rank, "recompute": recompute, "bf16": bf16}
            row["student_bytes_per_parameter"] = student_bytes / sum(p.numel() for p in student.parameters())
            row["student_gb"] = student_bytes / 1e9
            row["teacher_gb"] = teacher_bytes / 1e9
            row["kept_mb_per_second"] = (encoder_kept_bytes + SEQUENCE / CLIP_S * lm_kept_bytes) / 1e6
            for card_gb in CARDS_GB:
                seconds = largest_seconds(student, teacher, card_gb, bf16, recompute)
                row[f"seconds_on_{card_gb}_gb"] = seconds
            rows.append(row)
    return rows


def print_memory(rows):
    """The table of docs/speed.md."""
    columns = ["student", "mode", "bytes a parameter", "fixed GB: student + teacher", "MB a second"]
    columns += [f"{card_gb} GB" for card_gb in CARDS_GB]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for row in rows:
        mode = f"LoRA {row['rank']}" if row["rank"] else "full"
        mode += ", `--recompute`" if row["recompute"] else ""
        mode += ", `--bf16`" if row["bf16"] else ""
        fixed_gb = row["student_gb"] + row["teacher_gb"]
        cells = [row["student"], mode, f"{row['student_bytes_per_parameter']:.1f}"]
        cells.append(f"{row['student_gb']:.1f} + {row['teacher_gb']:.1f} = {fixed_gb:.1f}")
        cells.append(f"{row['kept_mb_per_second']:.0f}")
        for card_gb in CARDS_GB:
            seconds = row[f"seconds_on_{card_gb}_gb"]
            shown = f"{seconds:,}"
            if seconds == 0:
                shown = "–"
            elif seconds == MOST_SECONDS:
                shown = f"≥ {shown}"
            cells.append(shown)
        print(f"| {' | '.join(cells)} |")


def measure_memory(row, card_gb):
    """Peak GB of two real updates on a GPU that may use card_gb, and the computed GB."""
    _, _, device = data.setup_distributed()
    whole = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min((card_gb - RESERVE_GB) * 1e9 / whole, 1.0))
    bf16 = row["bf16"]
    with device:  # weights are drawn there, which is fast
        teacher = qwen3_asr_1_7b().to(torch.bfloat16 if bf16 else torch.float32).requires_grad_(False)
        student = memory_student(row["student"], row["rank"], row["recompute"])
    student.bf16 = bf16
    n_clips = int(row[f"seconds_on_{card_gb}_gb"] // CLIP_S)
    batch = batch_of(student, n_clips, CLIP_S, device)
    teacher_batch = batch_of(teacher, n_clips, CLIP_S, device)
    alignment = same_vocabulary(len(student.forbidden), student.forbidden)
    optimizer = m.make_optimizer(m.trained_parameters(student), 1e-6, 0.0)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # the second one has AdamW's moments
        for _ in range(2):  # two micro-batches: the second one has gradients
            encoded, rollout = write_rollout(student, batch, alignment, 32, TOKENS)
            support = ask_teacher(student, teacher, teacher_batch, alignment, rollout, 32)
            learn(student, batch, rollout, encoded, support)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    measured_gb = torch.cuda.max_memory_allocated() / 1e9
    step = step_memory(student, teacher, n_clips * CLIP_S, bf16, row["recompute"])
    computed_gb = (sum(fixed_memory(student, teacher, bf16, row["recompute"])) + max(step.values())) / 1e9
    return measured_gb, computed_gb


def memory(json_path):
    """The table; on a GPU also the peak of every row with a figure for 24 GB."""
    rows = memory_rows()
    print_memory(rows)
    if torch.cuda.is_available():
        for row in rows:
            if row["seconds_on_24_gb"] >= CLIP_S:
                try:
                    row["measured_gb"], row["computed_gb"] = measure_memory(row, 24)
                except torch.OutOfMemoryError:
                    row["measured_gb"] = "more than the card"
                print(row, flush=True)
                gc.collect()
                torch.cuda.empty_cache()
    if json_path:
        pathlib.Path(json_path).write_text(json.dumps(rows, indent=1))


# ---- main --------------------------------------------------------------------------------------------------


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", action="store_true", help="the example's sizes, on the CPU")
    size.add_argument("--real", action="store_true", help="the release's student, Qwen3-ASR-1.7B, on a GPU")
    size.add_argument("--growth", action="store_true", help="time by size, the example's, CPU; no bars")
    size.add_argument("--memory", action="store_true", help="GPU memory of a step at full size, computed")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    if args.real and not torch.cuda.is_available():
        parser.error("--real needs a GPU")
    return args


def quick_figures():
    device = torch.device("cpu")
    student = our_model(96, 3, 4, 96, 2, 4, 2, 256, 512)
    teacher = our_model(160, 4, 4, 128, 3, 4, 2, 384, 512).requires_grad_(False)
    batch, teacher_batch = (batch_of(model, 32, 2.16, device) for model in (student, teacher))
    yield from union_loss_figures(256, 151_936, 896, 32, device)
    head = torch.nn.Linear(896, 151_936, bias=False)
    yield from teacher_head_figures(head, 4, 128 + 64, 64, 32)
    rollout, floor_s = rollout_figures(student, batch)
    yield from rollout
    yield agreement_figure(student, batch, "float32", 1.0)
    yield from step_figures(student, teacher, batch, teacher_batch, floor_s)
    yield from audio_figures()


def real_figures():
    _, _, device = data.setup_distributed()
    with device:  # weights are drawn there, which is fast
        student = release_student()
        bf16_student = release_student().to(torch.bfloat16)
        teacher = qwen3_asr_1_7b().to(torch.bfloat16).requires_grad_(False)
        small = qwen3_asr_0_6b().to(torch.bfloat16)
    student.bf16 = True
    batch, teacher_batch = (batch_of(model, 32, 10.0, device) for model in (student, teacher))
    yield from union_loss_figures(2048, 151_936, 896, 32, device)
    yield from teacher_head_figures(teacher.head, 32, 200, 64, 32)
    # Rollout and its baseline both have bf16 weights: `generate` knows no autocast of its own.
    rollout, floor_s = rollout_figures(bf16_student, batch)
    yield from rollout
    yield from step_figures(student, teacher, batch, teacher_batch, floor_s)
    yield from audio_figures()
    student.bf16 = False
    yield agreement_figure(student, batch, "float32", 1.0)
    student.bf16 = True
    yield agreement_figure(student, batch, "bf16", None)
    small_batch = batch_of(small, 32, 10.0, device)
    yield from decoding_figures("Qwen3-ASR-0.6B", small, small_batch)
    yield from decoding_figures("Qwen3-ASR-1.7B", teacher, teacher_batch, "696, transformers, H200")
    del small, bf16_student, teacher
    yield from largest_batch_figures(student, device)


def main():
    args = parse_args()
    torch.manual_seed(0)
    if args.quick or args.growth:
        torch.cuda.is_available = lambda: False  # time and memory of the CPU
    if args.growth:
        growth()
        return
    if args.memory:
        memory(args.json)
        return
    figures = real_figures() if args.real else quick_figures()
    place = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if args.real:
        place = torch.cuda.get_device_name()
    print(f"{place}, torch {torch.__version__}, transformers {transformers.__version__}")
    rows = []
    for figure in figures:
        bar = figure.gpu_bar if args.real else figure.cpu_bar
        row = {"name": figure.name, "value": figure.value, "bar": "shown", "met": None}
        verdict = ""
        if bar is not None:
            row["bar"] = f"{'≥' if bar > 0 else '≤'} {abs(bar):.3g}"
            row["met"] = figure.value >= bar if bar > 0 else figure.value <= -bar
            verdict = "met" if row["met"] else "UNMET"
        rows.append(row)
        print(f"{figure.name:55s} {figure.value:9.3f}   {row['bar']:8s} {verdict}", flush=True)
    if args.json:
        result = {"machine": place, "figures": rows}
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1, ensure_ascii=False))
    sys.exit(any(row["met"] is False for row in rows))


if __name__ == "__main__":
    main()
