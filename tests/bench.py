"""Speed, as ratios of two things timed alternately in one process (median of 7 and more).

    python tests/bench.py --quick                   # the example's sizes, under 2 minutes on two CPU cores
    python tests/bench.py --real --json real.json   # the release's student and Qwen3-ASR-1.7B, on a GPU, bf16
    python tests/bench.py --growth                  # how the parts of a step grow with its sizes, on the CPU

Needs no files: weights are random, and the packages that only read audio may be absent (the row that needs
them is left out). Exit status 1 if a bar is unmet.
"""

import argparse
import dataclasses
import gc
import importlib.util
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
    words = byte_tokenizer()
    audio = {
        "d_model": 1024,
        "encoder_layers": 24,
        "encoder_attention_heads": 16,
        "encoder_ffn_dim": 4096,
        "output_dim": 2048,
    }
    text = {
        "hidden_size": 2048,
        "intermediate_size": 6144,
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
    student_logits = m.student_scores(student.head.weight, student_hidden, support_ids)
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
    # The floor of a decode step: weights and cache read once, at the bandwidth of a copy.
    big = torch.empty(2**30 if batch.mel.is_cuda else 2**26, dtype=torch.uint8, device=batch.mel.device)
    other = torch.empty_like(big)
    copy_s = alternate(lambda: other.copy_(big))[0]
    config = student.config.text_config
    d = config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * batch.prompt_ids.numel() * config.num_key_value_heads * d
    weights = sum(parameter.numel() for parameter in student.lm.parameters())  # the tied head is in it
    floor_s = (weights + cache) * student.head.weight.element_size() / (2 * big.numel() / copy_s)
    short_s = alternate(lambda: student.sample(batch, 4, k=32))[0]
    step_s = (ours_s - short_s) / (TOKENS - 4)
    figures.append(Figure("decode step / reading weights and cache once", step_s / floor_s, None, -3.0))
    return figures, floor_s


def union_loss_figures(n_rows, vocab_size, hidden, k, device):
    """The loss on the support beside the same loss by way of all logits."""
    weight = (torch.randn(vocab_size, hidden, device=device) * 0.02).requires_grad_()
    rows = torch.randn(n_rows, hidden, device=device).requires_grad_()
    teacher_logits = torch.randn(n_rows, 2 * k, device=device)
    ids = torch.stack([torch.randperm(vocab_size, device=device)[: 2 * k] for _ in range(n_rows)])
    mask = torch.ones_like(ids, dtype=torch.bool)

    def ours():
        weight.grad = rows.grad = None
        m.support_kl(m.student_scores(weight, rows, ids), teacher_logits, mask)[0].mean().backward()

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
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            sft_step()
        square = torch.randn(8192, 8192, device=batch.mel.device, dtype=torch.bfloat16)
        product_s = alternate(lambda: square @ square)[0]
        share = counter.get_total_flops() / sft_s / (2 * 8192**3 / product_s)
        figures.append(Figure("SFT step: share of the matrix-product peak", share, None, 0.35))
    return figures


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


# ---- main --------------------------------------------------------------------------------------------------


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", action="store_true", help="the example's sizes, on the CPU")
    size.add_argument("--real", action="store_true", help="the release's student, Qwen3-ASR-1.7B, on a GPU")
    size.add_argument("--growth", action="store_true", help="time by size, the example's, CPU; no bars")
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
    figures = union_loss_figures(256, 151_936, 896, 32, device)
    head = torch.nn.Linear(896, 151_936, bias=False)
    figures += teacher_head_figures(head, 4, 128 + 64, 64, 32)
    rollout, floor_s = rollout_figures(student, batch)
    return figures + rollout + step_figures(student, teacher, batch, teacher_batch, floor_s) + audio_figures()


def real_figures():
    device = torch.device("cuda")
    student = release_student().to(device)
    student.bf16 = True
    teacher = qwen3_asr_1_7b().to(device, torch.bfloat16).requires_grad_(False)
    batch, teacher_batch = (batch_of(model, 32, 10.0, device) for model in (student, teacher))
    figures = union_loss_figures(2048, 151_936, 896, 32, device)
    figures += teacher_head_figures(teacher.head, 32, 200, 64, 32)
    # Rollout and its baseline both have bf16 weights: `generate` knows no autocast of its own.
    rollout, floor_s = rollout_figures(release_student().to(device, torch.bfloat16), batch)
    figures += rollout + step_figures(student, teacher, batch, teacher_batch, floor_s) + audio_figures()
    return figures + largest_batch_figures(student, device)


def main():
    args = parse_args()
    torch.manual_seed(0)
    if not args.real:
        torch.cuda.is_available = lambda: False  # time and memory of the CPU
    if args.growth:
        growth()
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
        print(f"{figure.name:55s} {figure.value:9.3f}   {row['bar']:8s} {verdict}")
    if args.json:
        result = {"machine": place, "figures": rows}
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1, ensure_ascii=False))
    sys.exit(any(row["met"] is False for row in rows))


if __name__ == "__main__":
    main()
