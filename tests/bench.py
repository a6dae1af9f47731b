"""Speed, as ratios of two things timed alternately in one process (median of 7 and more).

    python tests/bench.py --quick    # the example's models, on one CPU core in under 2 minutes
    python tests/bench.py --real     # Qwen3-ASR of 0.6B and 1.7B with random weights, on a GPU, in bf16
    python tests/bench.py --memory   # GPU memory of a step at full size, computed

Exit status 1 if a bar is unmet.
"""

import argparse
import dataclasses
import gc
import itertools
import math
import pathlib
import statistics
import sys
import tempfile
import time
import unittest.mock

import soundfile
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import model  # noqa: E402
from prepare.student import glm_asr_config  # noqa: E402

TOKENS = 64  # that every rollout writes
K = 32  # top-k ids, opd.py's default


@dataclasses.dataclass
class Figure:
    """A measured ratio. A negative bar is an upper bound, None: only shown."""

    name: str
    value: float
    cpu_bar: float | None
    gpu_bar: float | None


# ---- timing and memory -------------------------------------------------------------------------------------


def seconds_now():
    """A clock. Without a GPU that of the process, in which other processes of the machine do not count."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def alternate(*functions, n=7):
    """Median seconds of each function, called in turn n times after a warm-up."""
    times = [[] for _ in functions]
    for i in range(n + 1):
        for function, function_times in zip(functions, times):
            start = seconds_now()
            function()
            if i > 0:
                function_times.append(seconds_now() - start)
    return [statistics.median(function_times) for function_times in times]


def peak_bytes(function):
    """The most bytes that tensors of a second call have at once, above what the first one left."""
    function()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


# ---- models, and clips of noise ----------------------------------------------------------------------------

EXAMPLE = ROOT / "example"


def our_student(text, layers=32):
    """A SpeechLM with the released encoder, of so many layers, and the tied LM of a Qwen config."""
    audio = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": layers,
        "num_attention_heads": 20,
    }
    words = transformers.AutoTokenizer.from_pretrained(EXAMPLE / "base")
    return write_anything(model.SpeechLM(glm_asr_config(audio, text, words, tied=True), words))


RELEASE_WIDTHS = {  # of the released student's LM
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}


def release_student():
    """The sizes of the released student: 1.14 billion parameters."""
    sizes = {"num_hidden_layers": 24, "vocab_size": 151_936, "tie_word_embeddings": True}
    return our_student(transformers.Qwen2Config(**RELEASE_WIDTHS, **sizes))


def qwen3_asr_1_7b():
    """The default sizes of transformers, but for the adapter's output."""
    return qwen3_asr({"output_dim": 2048}, {})


def qwen3_asr_0_6b():
    audio = {"d_model": 896, "encoder_layers": 18, "encoder_attention_heads": 14, "encoder_ffn_dim": 3584}
    return qwen3_asr({**audio, "output_dim": 1024}, {"hidden_size": 1024, "intermediate_size": 3072})


def qwen3_asr(audio, text):
    words = transformers.AutoTokenizer.from_pretrained(EXAMPLE / "base")
    words.add_tokens(model.Qwen3ASRFrontEnd.prompt_tokens, special_tokens=True)
    config = transformers.Qwen3ASRConfig(audio_token_id=words.convert_tokens_to_ids("<|audio_pad|>"))
    config.audio_config.update(audio)
    config.text_config.update(text)
    processor = unittest.mock.Mock(tokenizer=words)
    processor.apply_chat_template.return_value = (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    return write_anything(model.Qwen3ASR(transformers.Qwen3ASRForConditionalGeneration(config), processor))


def write_anything(speech_lm):
    """Allows every id but the stop token: the whole vocabulary is used, and all tokens are written."""
    speech_lm.forbidden[:] = False
    speech_lm.forbidden[speech_lm.front_end.stop_id] = True
    return speech_lm.eval()


def batch_of(speech_lm, n_clips, seconds, device):
    """A Batch of clips of noise, all of one length."""
    waveforms = [0.1 * torch.randn(round(seconds * data.SAMPLE_RATE)) for _ in range(n_clips)]
    return data.collate(waveforms, speech_lm.front_end, ["en"] * n_clips).to(device)


def backward_of_batch(student, teacher, batch, teacher_batch):
    """The method: the block between the fences of opd.py, for two models with the same ids."""
    ids = torch.arange(len(student.forbidden), device=student.device)
    alignment = model.Alignment(ids, ids, student.forbidden, teacher.forbidden)
    encoded = student.encode(batch)
    teacher_encoded = teacher.encode(teacher_batch)
    rollout = student.sample(batch, TOKENS, forbidden=alignment.student_forbidden, encoded=encoded)

    student_hidden = student(batch, rollout, encoded)
    same_rollout = model.mapped_rollout(rollout, alignment.to_teacher)
    teacher_hidden = teacher(teacher_batch, same_rollout, teacher_encoded)

    student_topk = model.topk_ids(student, student_hidden, alignment.student_forbidden, K)
    teacher_topk, teacher_logits = model.topk_scores(
        teacher, teacher_hidden, alignment.teacher_forbidden, K, alignment.in_teacher(student_topk)
    )
    teacher_topk = alignment.in_student(teacher_topk)
    support_ids, support_mask = model.union_support(student_topk, teacher_topk)
    teacher_logits = model.in_union_order(teacher_logits, student_topk, teacher_topk)
    student_logits = model.support_scores(student.head.weight, student_hidden, support_ids)
    kl, _ = model.support_kl(student_logits, teacher_logits, support_mask)
    kl.sum().backward()


# ---- the figures -------------------------------------------------------------------------------------------


@torch.no_grad()
def rollout_figures(student, batch):
    """Sampling beside transformers' `generate` of the same LM, from the same prompt embeddings.

    On a GPU also beside `generate` with a static cache, for which transformers compiles the forward pass.
    """
    dtype = torch.bfloat16 if student.bf16 else student.head.weight.dtype
    stock = transformers.AutoModelForCausalLM.from_config(
        student.config.text_config, dtype=dtype, attn_implementation="sdpa"
    )
    stock = stock.to(student.device).eval()
    stock.model.load_state_dict(student.lm.state_dict())
    stock.lm_head.weight = torch.nn.Parameter(student.head.weight.to(dtype))
    stock.generation_config = student.generation_config()
    encoded = student.encode(batch)
    embeds = student.embed_prompt(batch, encoded).to(dtype)
    prompt = {"inputs_embeds": embeds, "attention_mask": batch.prompt_mask.long()}

    def ours(n_tokens=TOKENS):
        return student.sample(batch, n_tokens, tokens_per_second=0, encoded=encoded).ids

    def generate():
        return stock.generate(**prompt, max_new_tokens=TOKENS)

    def compiled():
        return stock.generate(**prompt, max_new_tokens=TOKENS, cache_implementation="static")

    at = f"rollout of {len(batch.seconds)} clips"
    equal = (ours() == generate()).float().mean().item()
    ours_s, generate_s, short_s = alternate(ours, generate, lambda: ours(4))
    step_s = (ours_s - short_s) / (TOKENS - 4)
    floor_s = decode_floor_s(student, batch)
    figures = [
        Figure(f"{at}: generate / ours", generate_s / ours_s, 1.5, 4.0),
        Figure(f"{at}: share of equal tokens", equal, 0.99, None),
        Figure(f"{at}: a token, ms", 1e3 * step_s, None, None),
        Figure(f"{at}: memory floor of a token / ours", floor_s / step_s, None, 0.33),
    ]
    if batch.mel.is_cuda:
        ours_s, compiled_s = alternate(ours, compiled)
        figures.append(Figure(f"{at}: compiled generate / ours", compiled_s / ours_s, None, 1.0))
    return figures


def decode_floor_s(speech_lm, batch):
    """Seconds to read the LM's weights and the prompt's cache once, at the bandwidth of a copy."""
    source = torch.empty(2**30 if batch.mel.is_cuda else 2**26, dtype=torch.uint8, device=batch.mel.device)
    target = torch.empty_like(source)
    copy_s = alternate(lambda: target.copy_(source))[0]
    n_floats = sum(parameter.numel() for parameter in speech_lm.lm.parameters())  # the tied head is in it
    n_floats += batch.prompt_ids.numel() * math.prod(speech_lm.lm.cache_shape(1, 1))
    value_bytes = 2 if speech_lm.bf16 else speech_lm.head.weight.element_size()
    return n_floats * value_bytes / (2 * source.numel() / copy_s)


def union_loss_figures(n_rows, vocab_size, hidden, device):
    """The loss on the support beside the same loss by way of all logits."""
    weight = (torch.randn(vocab_size, hidden, device=device) * 0.02).requires_grad_()
    rows = torch.randn(n_rows, hidden, device=device).requires_grad_()
    teacher_logits = torch.randn(n_rows, 2 * K, device=device)
    ids = torch.rand(n_rows, vocab_size, device=device).topk(2 * K).indices
    mask = torch.ones_like(ids, dtype=torch.bool)

    def ours():
        scores = model.support_scores(weight, rows, ids)
        model.support_kl(scores, teacher_logits, mask)[0].mean().backward()
        weight.grad = rows.grad = None

    def plain():
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = rows @ weight.T
        log_q = logits.float().log_softmax(-1).gather(1, ids)
        model.support_kl(log_q, teacher_logits, mask)[0].mean().backward()
        weight.grad = rows.grad = None

    weight_bytes = weight.numel() * weight.element_size()  # of the gradient, which both need
    memory = (peak_bytes(ours) - weight_bytes) / (peak_bytes(plain) - weight_bytes)
    ours_s, plain_s = alternate(ours, plain)
    return [
        Figure("union loss: full logits / ours, time", plain_s / ours_s, 3.0, 3.0),
        Figure("union loss: ours / full logits, memory", memory, -1 / 5, -1 / 10),
    ]


@torch.no_grad()
def teacher_head_figures(head, n_clips, length, transcript):
    """The head on the scored rows beside the head on all `length` positions, the last `transcript` scored."""
    V, H = head.weight.shape
    device = head.weight.device
    states = torch.randn(n_clips, length, H, device=device, dtype=head.weight.dtype)
    student_topk = torch.randint(V, (n_clips * transcript, K), device=device)
    forbidden = torch.zeros(V, dtype=torch.bool, device=device)
    teacher = unittest.mock.Mock(head=head, bf16=False)

    def ours():
        rows = states[:, -transcript:].reshape(-1, H)
        return model.topk_scores(teacher, rows, forbidden, K, student_topk)

    def plain():
        rows = head(states).float()[:, -transcript:].reshape(-1, V)
        ids, _ = model.union_support(student_topk, rows.topk(K).indices)
        return rows.gather(1, ids.clamp(min=0))

    ours_s, plain_s = alternate(ours, plain)
    memory = peak_bytes(ours) / peak_bytes(plain)
    return [
        Figure("teacher head: whole sequence / ours, time", plain_s / ours_s, 2.0, 1.5),
        Figure("teacher head: ours / whole sequence, memory", memory, None, -1 / 10),
    ]


def step_figures(student, teacher, batch, teacher_batch):
    """An OPD step without the optimizer beside its parts: what no way of computing it can do without."""
    rollout = student.sample(batch, TOKENS, tokens_per_second=0)

    def opd_step():
        backward_of_batch(student, teacher, batch, teacher_batch)
        student.zero_grad(set_to_none=True)

    @torch.no_grad()
    def teacher_forward():
        teacher(teacher_batch, rollout)

    def student_passes():
        student(batch, rollout).float().square().sum().backward()
        student.zero_grad(set_to_none=True)

    opd_s, teacher_s, student_s = alternate(opd_step, teacher_forward, student_passes)
    floor_s = TOKENS * decode_floor_s(student, batch)
    parts = {"teacher's forward": teacher_s, "student's passes": student_s, "decode floor": floor_s}
    figures = [Figure("OPD step / its parts", opd_s / sum(parts.values()), None, -1.3)]
    for name, seconds in {"OPD step": opd_s, **parts}.items():
        figures.append(Figure(f"{name}, ms", 1e3 * seconds, None, None))
    if batch.mel.is_cuda:
        peak_gb = peak_bytes(opd_step) / 1e9
        figures.append(Figure("OPD step: GB above the weights", peak_gb, None, None))
        square = torch.randn(8192, 8192, device=batch.mel.device, dtype=torch.bfloat16)
        peak = 2 * 8192**3 / alternate(lambda: square @ square)[0]  # operations a second
        share = 2 * n_products(teacher, teacher_batch, rollout) / teacher_s / peak
        figures.append(Figure("teacher's forward: share of a matrix product's speed", share, None, None))
        share = 6 * n_products(student, batch, rollout) / student_s / peak
        figures.append(Figure("student's passes: share of a matrix product's speed", share, None, None))
    return figures


def n_products(speech_lm, batch, rollout):
    """Products of a forward pass: one for each weight and position, none of attention and of the head."""
    frames_hz = 13 if isinstance(speech_lm, model.Qwen3ASR) else 50
    n = frames_hz * float(batch.seconds.sum()) * n_computed(speech_lm.encoder)
    return n + (batch.prompt_ids.numel() + rollout.ids.numel()) * n_computed(speech_lm.lm)


def evaluation_figure(speech_lm, batch):
    """Seconds of audio a second of decoding. Transformers publishes 696 for Qwen3-ASR-1.7B."""
    seconds = alternate(lambda: speech_lm.sample(batch, TOKENS), n=3)[0]
    return Figure("evaluation: times real time", float(batch.seconds.sum()) / seconds, None, None)


def audio_figure():
    """Real time per worker core: 10 s of flac decoded and its log-mel taken."""
    speech = torch.cumsum(torch.randn(160_000), 0)
    with tempfile.NamedTemporaryFile(suffix=".flac") as file:
        soundfile.write(file.name, (0.3 * speech / speech.abs().max()).numpy(), 16_000, format="FLAC")
        clip = data.Clip(file.name, 10.0, "bench", {})
        clip_s = alternate(lambda: data.log_mel(data.load_audio(clip)), n=21)[0]
    return Figure("audio and log-mel, times real time per core", 10.0 / clip_s, 200.0, None)


# ---- memory of a step, computed ----------------------------------------------------------------------------
# What autograd keeps between forward and backward, layer by layer, with the kernels of a GPU: attention keeps
# q, k, v and its output, and no matrix of scores; a norm keeps its input. tests/test_memory.py compares both
# with what autograd really keeps.

CARDS_GB = (24, 80)  # GB are 10⁹ bytes
RESERVE_GB = 2.0  # of a card, left to the CUDA context and to fragmentation
CLIP_S = 10.0  # every clip of the computed micro-batch is so long
# Its positions in an LM: at most 13 a second, the rest of the prompt, the transcript.
SEQUENCE = 130 + 16 + TOKENS
MOST_SECONDS = 1000  # nobody needs larger micro-batches, and kernels begin to refuse them
LORA_RANK = 16


def encoder_memory(speech_lm, bf16, recompute):
    """Bytes a second of audio: what encoder and adapter keep, and what backward needs beside it.

    A layer keeps, for each frame: the inputs of two norms (float32); the norms' outputs, once for each linear
    layer where autocast casts them; q, k, v and the attention's output; the outputs of fc1 and of gelu. With
    recompute only its input. A convolution keeps its output before and behind gelu.
    """
    config = speech_lm.config.audio_config
    D = config.hidden_size
    value_bytes = 2 if bf16 else 4  # bytes of what is computed with
    n_inputs = 4 if bf16 else 2
    layer = 2 * 4 * D + value_bytes * ((n_inputs + 4) * D + 2 * config.intermediate_size)
    if isinstance(speech_lm, model.Qwen3ASR):
        n_frames = 13  # a second
        n_channels = config.downsample_hidden_size
        conv_outputs = [n_channels * 64 * 50, n_channels * 32 * 25, n_channels * 16 * 13]  # mel bins × frames
        n_front = 2 * sum(conv_outputs)
        n_adapter = n_frames * 3 * D
        layer += value_bytes * D  # attention runs window by window, and its outputs are put together
    else:
        n_frames = 50
        conv_outputs = [100 * D, 50 * D]
        n_front = 2 * conv_outputs[0] + conv_outputs[1]  # the last gelu's output is the first layer's input
        n_adapter = n_frames * (D + speech_lm.config.text_config.hidden_size)  # 4 H for four frames
    kept_bytes = value_bytes * (100 * data.N_MELS + n_front + n_adapter)
    kept_bytes += n_frames * 4 * D  # the last norm's
    kept_bytes += n_frames * config.num_hidden_layers * (value_bytes * D if recompute else layer)
    # Backward holds the gradients of one layer, and its activations where they are computed again.
    extra_bytes = max(n_frames * layer * (2 if recompute else 1), value_bytes * 2 * conv_outputs[0])
    return kept_bytes, extra_bytes


def lm_memory(speech_lm, length, bf16, recompute):
    """Bytes a position, in sequences of so many: what the LM keeps, and what backward needs beside it.

    A layer keeps: the inputs of two norms (float32); the norms' outputs, once for each linear layer where
    autocast casts them; q, k and v of all query heads and the attention's output; its row of the mask; four
    tensors of the MLP. With recompute only its input.
    """
    config = speech_lm.config.text_config
    H = config.hidden_size
    has_lora = len(speech_lm.peft_models) > 0
    value_bytes = 2 if bf16 else 4
    n_inputs = 5 if bf16 else 2
    d = speech_lm.lm.layers[0].self_attn.d
    n_queries = config.num_attention_heads * d
    n_values = n_inputs * H + 4 * n_queries + length + 4 * config.intermediate_size
    if bf16 and has_lora:
        n_values += n_queries  # peft casts the input of o_proj to float32, and autocast casts it back
    layer = 2 * 4 * H + value_bytes * n_values
    if config.model_type == "qwen3":  # norms of q and k in float32, in bf16 also what a trained weight scales
        n_qk = n_queries + config.num_key_value_heads * d
        layer += 4 * n_qk * (2 if bf16 and not has_lora else 1)
    kept_bytes = 4 * H  # the last norm's
    kept_bytes += config.num_hidden_layers * (4 * H if recompute else layer)
    return kept_bytes, layer * (2 if recompute else 1)


def n_computed(module):
    """Parameters of its linear and convolutional layers: those that autocast casts."""
    n = 0
    for part in module.modules():
        if isinstance(part, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d)):
            n += sum(parameter.numel() for parameter in part.parameters(recurse=False))
    return n


def n_kept_weights(speech_lm, recompute):
    """Parameters whose bf16 copies the graph keeps: with recompute those outside the layers."""
    n = n_computed(speech_lm.model)
    if recompute:
        n -= n_computed(speech_lm.encoder.layers) + n_computed(speech_lm.lm.layers)
    return n


def fixed_memory(student, teacher, bf16, recompute):
    """Bytes of the student with gradients and optimizer, and of the teacher, whatever the micro-batch."""
    n_student = sum(parameter.numel() for parameter in student.parameters())
    n_trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    n_teacher = sum(parameter.numel() for parameter in teacher.parameters())
    student_bytes = 4 * n_student + (4 + 8) * n_trained  # weights; gradients and AdamW's two moments
    if bf16:
        # Backward needs the weights too: the graph keeps autocast's copies. The head is scored in float32.
        # And sampling keeps copies of its own, of the LM and the head.
        student_bytes += 2 * n_kept_weights(student, recompute)
        student_bytes += 2 * (n_computed(student.lm) + student.head.weight.numel())
    return student_bytes, (2 if bf16 else 4) * n_teacher


def step_memory(student, teacher, seconds, bf16, recompute):
    """Bytes above the fixed ones at the high points of a micro-batch of so many seconds: {name: bytes}."""
    value_bytes = 2 if bf16 else 4
    text = student.config.text_config
    n_clips = seconds / CLIP_S
    n_positions = n_clips * SEQUENCE
    encoder_kept_bytes, encoder_extra_bytes = encoder_memory(student, bf16, recompute)
    lm_kept_bytes, lm_extra_bytes = lm_memory(student, SEQUENCE, bf16, recompute)
    encoded = seconds * encoder_kept_bytes
    forwarded = encoded + n_positions * lm_kept_bytes
    n_head = student.head.weight.numel()

    # The teacher's encoder: its first convolution's output, before and behind gelu.
    conv_outputs = teacher.config.audio_config.downsample_hidden_size * 64 * 50 * seconds
    teacher_encoder = encoded + value_bytes * 2 * conv_outputs

    # What both models keep for the run once they have sampled: keys and values, for clips and columns rounded
    # up, and a token's logits, twice. While one writes, a layer at the prompt's positions.
    n_rows, n_columns = model.decoder_size(math.ceil(n_clips), SEQUENCE)
    kept = 0
    for speech_lm in (student, teacher):
        kept += value_bytes * math.prod(speech_lm.lm.cache_shape(n_rows, n_columns))
        kept += n_rows * 2 * 4 * speech_lm.config.text_config.vocab_size
    rollout = encoded + n_positions * lm_extra_bytes

    # The top-k of either model: a chunk of logits, twice, and in bf16 a copy of the head.
    topk = forwarded + 2 * 4 * min(n_clips * (TOKENS + 1) * text.vocab_size, model.CHUNK_LOGITS)
    topk += 2 * n_head if bf16 else 0

    # Backward: the head's gradient waits for that of the embeddings, which share the tensor; and one layer.
    # LoRA has frozen the head.
    head_gradient = 4 * n_head if student.head.weight.requires_grad else 0
    backward = forwarded + head_gradient
    backward += max(seconds * encoder_extra_bytes, n_positions * lm_extra_bytes)
    peaks = {"teacher's encoder": teacher_encoder, "rollout": rollout, "top-k": topk, "backward": backward}
    return {name: kept + peak for name, peak in peaks.items()}


def largest_seconds(student, teacher, card_gb, bf16, recompute):
    """The largest whole --micro-seconds, up to MOST_SECONDS, whose step fits the card. 0: none does."""
    room = 1e9 * (card_gb - RESERVE_GB) - sum(fixed_memory(student, teacher, bf16, recompute))
    seconds = MOST_SECONDS
    while seconds > 0 and max(step_memory(student, teacher, seconds, bf16, recompute).values()) > room:
        seconds -= 1
    return seconds


STUDENTS = {"Qwen3-ASR-0.6B": qwen3_asr_0_6b, "ARK-ASR-0.6B": release_student}


def memory_table():
    """Prints the table of docs/speed.md."""
    print(
        "| student | mode | bytes a parameter | fixed GB: student + teacher | MB a second | 24 GB | 80 GB |"
    )
    print("|---|---|---|---|---|---|---|")
    with torch.device("meta"):  # sizes without storage
        teacher = qwen3_asr_1_7b()
    modes = itertools.product(STUDENTS, (0, LORA_RANK), (False, True), (False, True))
    for name, rank, recompute, bf16 in modes:
        with torch.device("meta"):
            student = STUDENTS[name]()
            if rank:
                model.add_lora(student, rank, seed=0)
        mode = f"LoRA {rank}" if rank else "full"
        mode += ", `--recompute`" if recompute else ""
        mode += ", `--bf16`" if bf16 else ""
        student_bytes, teacher_bytes = fixed_memory(student, teacher, bf16, recompute)
        student_gb = student_bytes / 1e9
        teacher_gb = teacher_bytes / 1e9
        n_parameters = sum(parameter.numel() for parameter in student.parameters())
        encoder_kept_bytes, _ = encoder_memory(student, bf16, recompute)
        lm_kept_bytes, _ = lm_memory(student, SEQUENCE, bf16, recompute)
        kept_bytes = encoder_kept_bytes + SEQUENCE / CLIP_S * lm_kept_bytes
        cells = [
            name,
            mode,
            f"{student_bytes / n_parameters:.1f}",
            f"{student_gb:.1f} + {teacher_gb:.1f} = {student_gb + teacher_gb:.1f}",
            f"{kept_bytes / 1e6:.0f}",
        ]
        for card_gb in CARDS_GB:
            seconds = largest_seconds(student, teacher, card_gb, bf16, recompute)
            ends = {0: "–", MOST_SECONDS: f"≥ {MOST_SECONDS:,}"}
            cells.append(ends.get(seconds, f"{seconds:,}"))
        print(f"| {' | '.join(cells)} |", flush=True)


# ---- main --------------------------------------------------------------------------------------------------


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", action="store_true", help="the example's models, on the CPU")
    size.add_argument("--real", action="store_true", help="Qwen3-ASR of 0.6B and 1.7B, on a GPU in bf16")
    size.add_argument("--memory", action="store_true", help="GPU memory of a step at full size, computed")
    args = parser.parse_args()
    if args.real and not torch.cuda.is_available():
        parser.error("--real needs a GPU")
    return args


def quick_figures():
    device = torch.device("cpu")
    student = write_anything(model.SpeechLM.from_pretrained(EXAMPLE / "base"))
    teacher = write_anything(model.SpeechLM.from_pretrained(EXAMPLE / "teacher"))
    teacher.requires_grad_(False)
    batch = batch_of(student, 32, 2.16, device)
    teacher_batch = batch_of(teacher, 32, 2.16, device)
    yield from union_loss_figures(256, 151_936, 896, device)
    yield from teacher_head_figures(torch.nn.Linear(896, 151_936, bias=False), 4, 128 + 64, 64)
    yield from rollout_figures(student, batch)
    yield from step_figures(student, teacher, batch, teacher_batch)
    yield audio_figure()


def real_figures():
    _, _, device = data.setup_distributed()
    with device:  # weights are drawn there, which is fast
        student = qwen3_asr_0_6b()
        teacher = qwen3_asr_1_7b().to(torch.bfloat16).requires_grad_(False)
    student.bf16 = True
    yield from union_loss_figures(2048, 151_936, 1024, device)
    yield from teacher_head_figures(teacher.head, 32, 200, 64)
    for n_clips in (32, 128):
        yield from rollout_figures(student, batch_of(student, n_clips, 10.0, device))
    student.free_decoders()
    batch = batch_of(student, 32, 10.0, device)
    yield from step_figures(student, teacher, batch, batch_of(teacher, 32, 10.0, device))
    yield evaluation_figure(teacher, batch_of(teacher, 128, 10.0, device))


def main():
    args = parse_args()
    torch.manual_seed(0)
    if args.memory:
        memory_table()
        return
    if args.quick:
        torch.cuda.is_available = lambda: False  # time and memory of the CPU
        torch.set_num_threads(1)
    place = torch.cuda.get_device_name() if args.real else "one thread of a CPU"
    print(f"{place}, torch {torch.__version__}, transformers {transformers.__version__}")
    all_met = True
    for figure in real_figures() if args.real else quick_figures():
        bar = figure.gpu_bar if args.real else figure.cpu_bar
        verdict = "shown"
        if bar is not None:
            is_met = figure.value >= bar if bar > 0 else figure.value <= -bar
            all_met = all_met and is_met
            verdict = f"{'≥' if bar > 0 else '≤'} {abs(bar):.3g} {'met' if is_met else 'UNMET'}"
        print(f"{figure.name:55s} {figure.value:9.3f}   {verdict}", flush=True)
    sys.exit(not all_met)


if __name__ == "__main__":
    main()
