"""Speed, as ratios of two things timed alternately in one process (median of 7 and more).

    python tests/bench.py --quick                   # the example's sizes, under 2 minutes on two CPU cores
    python tests/bench.py --real --json real.json   # the release's student and Qwen3-ASR-1.7B, on a GPU, bf16

Needs no files: weights are random, and the packages that only read audio or score text may be absent (the
row that needs one is left out). Exit status 1 if a bar is unmet.
"""
import argparse
import gc
import importlib.util
import io
import json
import os
import pathlib
import platform
import statistics
import sys
import threading
import time
import unittest.mock

import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
for name in ("soundfile", "ijson", "torchaudio", "jiwer", "opencc", "whisper_normalizer",
             "whisper_normalizer.english", "tqdm"):
    if importlib.util.find_spec(name.split(".")[0]) is None:
        sys.modules[name] = unittest.mock.MagicMock()

import tokenizers  # noqa: E402
import transformers  # noqa: E402

import data  # noqa: E402
import model as m  # noqa: E402
import opd  # noqa: E402

TOKENS = 64


# ---- timing ------------------------------------------------------------------------------------------------
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
            if i:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def peak_extra(function):
    """Bytes that a second call needs above what the first one left: the allocator's peak, or the resident
    set's, looked at every half millisecond."""
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
        return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before, peak, done = resident(), [0], threading.Event()

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


# ---- models with random weights ----------------------------------------------------------------------------
def tokenizer():
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_start|>", "<|audio_pad|>",
                             "<|audio_end|>", "<asr_text>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>",
                                                pad_token="<|endoftext|>")


def ark(width, layers, audio_heads, hidden, lm_layers, heads, kv_heads, ffn, vocab):
    text = dict(model_type="qwen2", hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=lm_layers,
                num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocab,
                rope_parameters=dict(rope_type="default", rope_theta=1e6), tie_word_embeddings=True,
                initializer_range=0.06)
    audio = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                 num_attention_heads=audio_heads, initializer_range=0.05)
    return m.SpeechLM.from_config(dict(audio_config=audio, text_config=text), tokenizer())


def qwen3_asr(d_model, layers, audio_heads, hidden, lm_layers, heads, kv_heads, ffn, vocab):
    words = tokenizer()
    audio = dict(d_model=d_model, encoder_layers=layers, encoder_attention_heads=audio_heads,
                 encoder_ffn_dim=4 * d_model, output_dim=hidden)
    text = dict(hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=lm_layers, num_attention_heads=heads,
                num_key_value_heads=kv_heads, head_dim=128, vocab_size=vocab, tie_word_embeddings=True)
    net = transformers.Qwen3ASRForConditionalGeneration(transformers.Qwen3ASRConfig(
        audio_config=audio, text_config=text, audio_token_id=words.convert_tokens_to_ids("<|audio_pad|>")))
    prompt = ("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|>"
              "<|im_end|>\n<|im_start|>assistant\n")
    processor = unittest.mock.Mock(tokenizer=words)
    processor.apply_chat_template.return_value = prompt
    return m.SpeechLM(net, words, processor)


def everything_allowed(lm):
    """Every id may be written but the stop: a random model then uses the whole vocabulary and all tokens."""
    lm.forbidden[:] = False
    lm.forbidden[lm.front_end.stop_id] = True
    return lm.eval()


def batch_of(lm, clips, seconds, device):
    """A Batch of random log-mels, all clips of one length (a multiple of 80 ms)."""
    waveforms = [torch.zeros(round(seconds * data.SAMPLE_RATE)) for _ in range(clips)]
    frames = round(seconds * 100)
    mels = [torch.randn(data.N_MELS, frames) * 0.5 for _ in waveforms]
    return data.collate(waveforms, lm.front_end, ["en"] * clips, mels).to(device)


# ---- the figures: each gives [(name, value, CPU bar, GPU bar)] ------------------------------------------------
def rollout(student, batch, seconds):
    stock = student.net
    ids = student.forbidden.nonzero()[:, 0].tolist()
    frames = torch.ones(batch.mel.shape[0], batch.mel.shape[2], dtype=torch.long, device=batch.mel.device)

    def ours():
        return student.sample(batch, TOKENS, k=32)

    @torch.no_grad()
    def generate():
        student.encoder.config._attn_implementation = "sdpa"
        found = stock.generate(
            input_ids=batch.prompt_ids, attention_mask=batch.prompt_mask.long(), input_features=batch.mel,
            input_features_mask=frames, max_new_tokens=TOKENS, do_sample=False, suppress_tokens=ids, pad_token_id=0)
        student.encoder.config._attn_implementation = "key_masked"
        return found[:, batch.prompt_ids.shape[1]:]

    same = (ours().ids == generate()).float().mean().item()
    mine, theirs = alternate(ours, generate)
    rows = [("rollout: generate / ours", theirs / mine, 1.5, 8.0), ("rollout: share of equal tokens", same, 0.99, 0.5)]
    # the floor of a decode step: weights and cache read once at the bandwidth of a copy
    big = torch.empty(2**26 if not batch.mel.is_cuda else 2**30, dtype=torch.uint8, device=batch.mel.device)
    other = torch.empty_like(big)
    copy, = alternate(lambda: other.copy_(big))
    config, width = student.net.config.text_config, student.head.weight.element_size()
    d = config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * batch.prompt_ids.numel() * config.num_key_value_heads * d
    weights = sum(p.numel() for p in student.lm.parameters())                   # the tied head is in it
    floor = (weights + cache) * width / (2 * big.numel() / copy)
    short = alternate(lambda: student.sample(batch, 4, k=32))[0]
    step = (mine - short) / (TOKENS - 4)
    rows.append(("decode step / reading weights and cache once", step / floor, None, -3.0))
    return rows, floor


def union_loss(n, vocab, hidden, k, device):
    weight = (torch.randn(vocab, hidden, device=device) * 0.02).requires_grad_()
    rows = torch.randn(n, hidden, device=device).requires_grad_()
    teacher_logits = torch.randn(n, 2 * k, device=device)
    ids = torch.stack([torch.randperm(vocab, device=device)[:2 * k].sort().values for _ in range(n)])
    mask = torch.ones_like(ids, dtype=torch.bool)

    def ours():
        weight.grad = rows.grad = None
        m.support_kl(m.student_scores(weight, rows, ids), teacher_logits, mask)[0].mean().backward()

    def plain():
        weight.grad = rows.grad = None
        log_q = (rows @ weight.T).float().log_softmax(-1).gather(1, ids)
        m.support_kl(log_q, teacher_logits, mask)[0].mean().backward()

    ours_bytes, plain_bytes = peak_extra(ours), peak_extra(plain)   # above a gradient that is there already
    mine, theirs = alternate(ours, plain)
    return [("union loss: full logits / ours, time", theirs / mine, 3.0, 3.0),
            ("union loss: ours / full logits, memory", ours_bytes / plain_bytes, -1 / 5, -1 / 10)]


@torch.no_grad()
def teacher_head(teacher, clips, length, transcript, k, device):
    """length: positions of a sequence, of which the last `transcript` are scored."""
    vocab, hidden = teacher.head.weight.shape
    states = torch.randn(clips, length, hidden, device=device, dtype=teacher.head.weight.dtype)
    student_topk = torch.randint(vocab, (clips * transcript, k), device=device)
    same = torch.arange(vocab, device=device)
    none = torch.zeros(vocab, dtype=torch.bool, device=device)
    alignment = m.Alignment(same, same, none, none)

    def ours():
        return m.teacher_support(teacher, states[:, -transcript:].reshape(-1, hidden), student_topk, alignment, k)

    def plain():
        logits = teacher.head(states).float()
        rows = logits[:, -transcript:].reshape(-1, vocab)
        top = rows.topk(k).indices
        ids, _ = m.union_support(student_topk, top)
        return rows.gather(1, ids.clamp(min=0))

    ours_bytes, plain_bytes = peak_extra(ours), peak_extra(plain)
    mine, theirs = alternate(ours, plain)
    return [("teacher head: whole sequence / ours, time", theirs / mine, 2.0, 2.0),
            ("teacher head: ours / whole sequence, memory", ours_bytes / plain_bytes, None, -1 / 10)]


def opd_step(student, teacher, batch, teacher_batch, floor, bf16):
    """A whole step over decode floor + teacher trunk + one SFT step of the same clips."""
    device, vocab = batch.mel.device, student.head.weight.shape[0]
    same, none = torch.arange(vocab, device=device), torch.zeros(vocab, dtype=torch.bool, device=device)
    alignment = m.Alignment(same, same, student.forbidden, none)
    optimizer = m.make_optimizer(student, 1e-6, 0.0)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        fixed = student.sample(batch, TOKENS)

    def update():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def ours():
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            encoded = student.encode(batch)
            written = student.sample(batch, TOKENS, encoded=encoded)
        scored = opd.score_rollout(teacher, alignment, batch, teacher_batch, written, 32, encoded)
        opd.backward_kl(student, [scored], 1.0, device, bf16=bf16)
        update()

    @torch.no_grad()
    def trunk():
        teacher(teacher_batch, fixed)

    def sft():
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = student.head(student(batch, fixed)[0]).float()
        F.cross_entropy(logits, fixed.ids[fixed.row_mask()]).backward()
        update()

    whole, forward, supervised = alternate(ours, trunk, sft)
    rows = [("OPD step / (decode floor + teacher trunk + SFT step)",
             whole / (TOKENS * floor + forward + supervised), None, -1.3)]
    if batch.mel.is_cuda:
        from torch.utils.flop_counter import FlopCounterMode
        with FlopCounterMode(display=False) as counter:
            sft()
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
        product, = alternate(lambda: a @ a)
        rows.append(("SFT step: share of the matrix-product peak",
                     counter.get_total_flops() / supervised / (2 * 8192**3 / product), None, 0.35))
    return rows


def audio_input():
    """Real time per worker core: 10 s of flac decoded and its log-mel taken."""
    import soundfile
    if isinstance(soundfile, unittest.mock.MagicMock) or isinstance(data.torchaudio, unittest.mock.MagicMock):
        return []
    import tempfile
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                # as in a worker
    with tempfile.NamedTemporaryFile(suffix=".flac") as file:
        speech = torch.cumsum(torch.randn(160_000), 0)
        content = io.BytesIO()
        soundfile.write(content, (0.3 * speech / speech.abs().max()).numpy(), 16_000, format="FLAC")
        file.write(content.getvalue())
        file.flush()
        clip = data.Clip(file.name, 10.0, "bench", {})
        taken, = alternate(lambda: data.log_mel(data.load_audio(clip)), n=21)
    torch.set_num_threads(threads)
    return [("audio and log-mel, times real time per core", 10.0 / taken, 200.0, None)]


def largest_batch(student, device):
    """Clips of 15 s whose SFT step fits, by doubling."""
    fits, n = 0, 32
    while True:
        try:
            batch = batch_of(student, n, 15.0, device)
            with torch.autocast(device.type, torch.bfloat16):
                fixed = student.sample(batch, TOKENS)
                logits = student.head(student(batch, fixed)[0]).float()
            logits.logsumexp(-1).mean().backward()
        except torch.OutOfMemoryError:
            return [("largest SFT batch of 15 s clips (powers of two)", fits, None, None)]
        finally:
            student.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        fits, n = n, 2 * n


def growth(device):
    """Seconds of rollout, teacher and update of one OPD step, one of clips, seconds, vocabulary and k varied."""
    base = dict(clips=16, seconds=2.0, vocab=512, k=32)
    print("clips  seconds   vocab    k   rollout s  teacher s  update s   step / base")
    for change in ({}, dict(clips=32), dict(clips=64), dict(seconds=4.0), dict(seconds=8.0), dict(vocab=16_384),
                   dict(vocab=151_936), dict(k=8), dict(k=128)):
        c = {**base, **change}
        student, teacher = (everything_allowed(ark(width, layers, 4, width, layers, 4, 2, 3 * width, c["vocab"]))
                            for width, layers in ((96, 3), (160, 4)))
        batch, teacher_batch = (batch_of(lm, c["clips"], c["seconds"], device) for lm in (student, teacher))
        same = torch.arange(c["vocab"])
        alignment = m.Alignment(same, same, student.forbidden, student.forbidden)
        kept = {}

        def rolled():
            kept["encoded"] = student.encode(batch)
            kept["rollout"] = student.sample(batch, 16, k=c["k"], encoded=kept["encoded"])

        def scored():
            kept["scored"] = opd.score_rollout(teacher, alignment, batch, teacher_batch, kept["rollout"], c["k"],
                                               kept["encoded"])

        def update():
            opd.backward_kl(student, [kept["scored"]], 1.0, device)
            student.zero_grad(set_to_none=True)

        phases = alternate(rolled, scored, update)
        if not change:
            whole = sum(phases)
        print(f"{c['clips']:5d} {c['seconds']:8.0f} {c['vocab']:7d} {c['k']:4d}"
              + "".join(f"{x:11.3f}" for x in phases) + f"{sum(phases) / whole:14.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", action="store_true", help="the example's sizes, on the CPU")
    size.add_argument("--real", action="store_true", help="the release's student, Qwen3-ASR-1.7B, on a GPU")
    size.add_argument("--growth", action="store_true", help="how a step's time grows, example's sizes, CPU; no bars")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.real and not torch.cuda.is_available():
        parser.error("--real needs a GPU")
    device = torch.device("cuda" if args.real else "cpu")
    if not args.real:
        torch.cuda.is_available = lambda: False             # time and memory of the CPU
        if args.growth:
            return growth(device)
        student = ark(96, 3, 4, 96, 2, 4, 2, 256, 512)
        teacher = ark(160, 4, 4, 128, 3, 4, 2, 384, 512)
        seconds, n, transcript, wide = 2.16, 256, 64, ark(96, 1, 4, 896, 1, 14, 2, 512, 151_936)
    else:
        student = ark(1280, 32, 20, 896, 24, 14, 2, 4864, 151_936).to(device)
        teacher = qwen3_asr(1024, 24, 16, 2048, 28, 16, 8, 6144, 151_936).to(device, torch.bfloat16)
        seconds, n, transcript, wide = 10.0, 2048, 64, teacher
    student, teacher = everything_allowed(student), everything_allowed(teacher)
    batch, teacher_batch = (batch_of(lm, 32, seconds, device) for lm in (student, teacher))
    figures = union_loss(n, 151_936, 896, 32, device)
    figures += teacher_head(wide.eval(), 4 if args.quick else 32, 128 + transcript if args.quick else 200,
                            transcript, 32, device)
    del wide
    # rollout and its baseline in compute precision: bf16 weights on a GPU
    compute = ark(1280, 32, 20, 896, 24, 14, 2, 4864, 151_936).to(device, torch.bfloat16) if args.real else student
    found, floor = rollout(everything_allowed(compute), batch, seconds)
    del compute
    figures += found + opd_step(student, teacher, batch, teacher_batch, floor, args.real) + audio_input()
    if args.real:
        figures += largest_batch(student, device)
    # ---- table: a negative bar is an upper bound ---------------------------------------------------------------
    place = torch.cuda.get_device_name() if args.real else f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{place}, torch {torch.__version__}, transformers {transformers.__version__}")
    rows = []
    for name, value, *bars in figures:
        bar = bars[args.real]
        met = None if bar is None else value >= bar if bar > 0 else value <= -bar
        rows.append(dict(name=name, value=value, bar=bar and f"{'≥' if bar > 0 else '≤'} {abs(bar):.3g}", met=met))
        verdict = {None: "", True: "met", False: "UNMET"}[met]
        print(f"{name:55s} {value:9.3f}   {rows[-1]['bar'] or 'shown':8s} {verdict}")
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(dict(machine=place, figures=rows), indent=1, ensure_ascii=False))
    sys.exit(any(row["met"] is False for row in rows))


if __name__ == "__main__":
    main()
