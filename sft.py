r"""Supervised fine-tuning: cross-entropy on transcripts (the paper's Base and TD stages).

    torchrun --nproc_per_node=2 sft.py --train train.jsonl --config example/base/config.json \
        --tokenizer example/base --out runs/base
    python sft.py --train td.jsonl --text-field hyp --model runs/base/model --out runs/td

The loss is the mean over the transcript tokens and the stop token of the whole global batch, counted over all
micro-batches and ranks. From random weights a CTC loss on the encoder's 50 Hz output (UTF-8 bytes, its head
is not exported) makes the model listen: without it the LM learns the text's statistics first. Not in the
paper: CTC, SpecAugment. Prints a progress bar and the error on --eval sets; writes OUT/model, metrics.jsonl,
config.json, summary.json. Defaults are the paper's; the example's: example/make.py.
"""
import math
import os
import time

import torch
import torch.nn.functional as F
import torchaudio
import transformers
from torch import nn
from tqdm import tqdm

from data import (Clips, InputError, Parser, StepDataset, all_reduce_sum, at_least, barrier, catch_sigterm,
                  collate, find_run, finish_run, gather, load_or_note, memory, one_line, print_plan,
                  read_json, read_lines, report_bad, run_script, script_language, setup_distributed,
                  start_run, step_batches, stop_nonfinite, training_flags)
from eval import evaluate, print_summaries, read_sets
from model import (SpeechLM, check_languages, cosine_lr, load_checkpoint, make_optimizer, refresh,
                   save_checkpoint, shard, speed_options, whole)

def parse_args(argv=None):
    parser = Parser(prog="sft.py", description=__doc__)
    training_flags(parser, "sft")
    add = parser.add_argument_group("objective").add_argument
    add("--text-field", default="text", help='key to learn; "hyp" in a result file of eval.py')
    add("--ctc-weight", type=at_least(0), default=0.0, help="weight of CTC on the encoder; 0 = off")
    add = parser.add_argument_group("model, in one of three ways (folders or hub names)").add_argument
    add("--model", help="start from this model: GlmAsr, Qwen3-ASR (-hf) or ARK-ASR")
    add("--encoder", help="GlmAsr or ARK-ASR model whose audio encoder a new student takes over (with --lm)")
    add("--lm", help="qwen2 or qwen3 causal LM of that student; the adapter between them is new")
    add("--config", help="config.json of a GlmAsr model: random weights of these sizes (with --tokenizer)")
    add("--tokenizer", help="tokenizer folder; the prompt's control tokens are added where it lacks them")
    add = parser.add_argument_group("augmentation (SpecAugment)").add_argument
    add("--time-masks", type=at_least(0, int), default=0, help="masks along time per clip; 0 = off")
    add("--time-width", type=at_least(1, int), default=40, help="longest, in mel frames of 10 ms")
    add("--freq-masks", type=at_least(0, int), default=0, help="masks along frequency per clip; 0 = off")
    add("--freq-width", type=at_least(1, int), default=27, help="widest frequency mask, of 128 mel bins")
    return parser.parse_args(argv)

def augment(mel, args, step, clip):
    """SpecAugment of one mel (128, F), a pure function of (seed, step, clip); 0 is near the mean."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash((args.seed, step, clip)))
        for axis, masks, width in ((1, args.time_masks, min(args.time_width, mel.shape[1] // 4)),
                                   (0, args.freq_masks, args.freq_width)):
            for _ in range(masks):
                mel = torchaudio.functional.mask_along_axis(mel[None], width, 0.0, axis + 1)[0]
    return mel

def ctc_loss(ctc_head, frames, frame_lens, texts):
    """Sum over clips of CTC / bytes of its UTF-8 text, frames (B, T', D), lens (B,), and clips too short for
    it. Byte b is class b + 1, 0 is blank; 257 classes fit every language and need no vocabulary."""
    targets = [list((text or "").encode()) for text in texts]
    lens = torch.tensor([len(t) for t in targets])
    flat = torch.tensor([b + 1 for t in targets for b in t], dtype=torch.long, device=frames.device)
    log_probs = ctc_head(frames).double().log_softmax(-1).transpose(0, 1)
    losses = F.ctc_loss(log_probs, flat, frame_lens.cpu(), lens, reduction="none", zero_infinity=True)
    needed = torch.tensor([len(t) + sum(a == b for a, b in zip(t, t[1:])) for t in targets])
    weights = torch.tensor([0.0 if text is None else 1 / max(len(t), 1) for text, t in zip(texts, targets)])
    return (losses * weights.to(losses.device)).sum(), int((needed > frame_lens.cpu()).sum())

def main(args):
    # ---- distributed ---------------------------------------------------------------------------------------
    rank, world, device = setup_distributed()
    first_step, checkpoint = gather(find_run(args, rank))[0]            # as rank 0 sees the file system
    if first_step is None:
        return
    stop = catch_sigterm()
    # ---- data ----------------------------------------------------------------------------------------------
    clips = Clips(args.train, args.text_field, args.max_seconds)
    eval_sets = read_sets(args.eval, args.max_seconds)
    # ---- model ---------------------------------------------------------------------------------------------
    torch.manual_seed(args.seed)                    # the same initial weights on every rank
    given = [name for name in ("model", "encoder", "lm", "config", "tokenizer") if getattr(args, name)]
    if given not in (["model"], ["encoder", "lm"], ["config", "tokenizer"]):
        raise InputError(f"give --model, or --encoder and --lm, or --config and --tokenizer; found {given}")
    if args.model or checkpoint:
        model = SpeechLM.from_pretrained(os.path.join(checkpoint, "model") if checkpoint else args.model)
    elif args.lm:
        model = SpeechLM.from_parts(args.encoder, args.lm)
    else:
        try:
            config = read_json(args.config)
            tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise InputError(f"--config {args.config}, --tokenizer: {one_line(error)}") from None
        model = SpeechLM.from_config(config, tokenizer)
    if args.ctc_weight and model.is_qwen3_asr:
        raise InputError("--ctc-weight: only for GlmAsr encoders; leave it out for Qwen3-ASR")
    check_languages(sum(eval_sets.values(), clips.of_each_language), model)
    if args.ctc_weight:                             # trained with the model, not a part of what is exported
        model.ctc_head = nn.Linear(model.net.config.audio_config.hidden_size, 257)
    model.to(device).train()
    # ---- shards, optimizer, resume, output folder ----------------------------------------------------------
    actor = shard(model, args.bf16)                 # for evaluation; the model itself without torchrun
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    if checkpoint:
        load_checkpoint(checkpoint, model, optimizer)
    log = start_run(args, rank, first_step)
    if rank == 0:
        print_plan(args, clips, world, device, model=model)
    speed_options(model, args.compile, args.recompute)
    front_end, limit = model.front_end, model.net.config.text_config.max_position_embeddings // 2

    def make(indices, step, bad):
        """One micro-batch: clip numbers, Batch, the transcripts as a Rollout, their texts."""
        chosen = [clips[i] for i in indices]
        too_long = [len(front_end.encode_text(clip.text)) > limit for clip in chosen]
        waveforms = [load_or_note(clip, bad, long and f"its transcript has over {limit} tokens, half of the "
                                  "LM's positions; cut it") for clip, long in zip(chosen, too_long)]
        texts = [clip.text if len(w) else None for clip, w in zip(chosen, waveforms)]
        mels = [augment(front_end.features(w), args, step, i) for i, w in zip(indices, waveforms)]
        languages = [clip.language or script_language(clip.text) or "en" for clip in chosen]
        return indices, collate(waveforms, front_end, languages, mels), front_end.transcripts(texts), texts

    def run_eval(step):
        summaries = evaluate(actor, eval_sets, device, args.micro_seconds,
                             os.path.join(args.out, f"eval-{step}"), strict=args.on_bad_audio == "error")
        if rank == 0:
            print_summaries(summaries)
        return summaries

    # ---- training loop -------------------------------------------------------------------------------------
    dataset = StepDataset(clips.seconds, args.batch_size, args.micro_seconds, args.seed, rank, world, make)
    batches, summaries = step_batches(dataset, first_step, args.steps, args.workers), None
    bar = tqdm(initial=first_step, total=args.steps, disable=rank > 0, desc="sft", mininterval=2)
    start = time.perf_counter()
    for step, micros, bad in batches:
        done, data_s = step + 1, time.perf_counter() - start
        counts = [(t.row_mask().sum(), (b.seconds > 0).sum(), b.silent.sum()) for _, b, t, _ in micros]
        n_tokens, n_clips, n_silent = all_reduce_sum([int(sum(column)) for column in zip(*counts)], device)
        # ---- loss, backward --------------------------------------------------------------------------------
        # Σ cross-entropy over tokens / tokens of the global batch, plus the weighted CTC loss per clip
        loss = ctc = n_short = 0
        for i, (_, batch, targets, texts) in enumerate(micros):
            batch, targets = batch.to(device), targets.to(device)
            model.set_requires_gradient_sync(i == len(micros) - 1)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                hidden, frames, frame_lens = model(batch, targets)
                logits = model.head(hidden).float()                                           # (N, V)
            ce = F.cross_entropy(logits, targets.ids[targets.row_mask()], reduction="sum")
            ctc_sum, short = (ctc_loss(model.ctc_head, frames.to(model.ctc_head.weight.dtype), frame_lens,
                                       texts) if args.ctc_weight else (ce.new_zeros(()), 0))
            (ce / max(n_tokens, 1) + args.ctc_weight * ctc_sum / max(n_clips, 1)).backward()
            loss, ctc, n_short = loss + ce.item(), ctc + ctc_sum.item(), n_short + short
        if step < 0:                                    # the trial of the longest clips
            optimizer.zero_grad(set_to_none=True)
            start = time.perf_counter()
            continue
        norm = whole(nn.utils.clip_grad_norm_(model.parameters(), args.clip or float("inf"))).item()
        loss, ctc, n_short, n_bad, stopping = all_reduce_sum(
            [loss, ctc, n_short, len(bad), stop.is_set()], device)
        if n_bad:
            report_bad(args, done, bad)
        if not math.isfinite(loss + ctc) or not math.isfinite(norm):
            stop_nonfinite(args, rank, done, clips, [(indices, targets) for indices, _, targets, _ in micros],
                           front_end, f"loss {loss}, CTC {ctc}, gradient norm {norm}")
        # ---- step ------------------------------------------------------------------------------------------
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, args.steps, args.warmup_steps, args.lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # ---- log, eval, save -------------------------------------------------------------------------------
        seconds = time.perf_counter() - start
        metrics = dict(step=done, loss=loss / max(n_tokens, 1), **(dict(
            ctc=ctc / max(n_clips, 1), ctc_too_short=n_short) if args.ctc_weight else {}),
            grad_norm=norm, lr=optimizer.param_groups[0]["lr"], tokens=n_tokens, skipped=int(n_bad),
            silent=n_silent / max(n_clips, 1), clips_per_s=n_clips / seconds, step_s=seconds, data_s=data_s,
            update_s=seconds - data_s, **memory())
        bar.update()
        bar.set_postfix({name: f"{metrics[name]:.3g}" for name in ("loss", "clips_per_s")}, False)
        if eval_sets and (done == args.steps or args.eval_every and done % args.eval_every == 0):
            refresh(actor, model)
            summaries = run_eval(done)
            metrics.update({f"{stem}/{s['metric']}": s["value"] for stem, s in summaries.items()})
        log(metrics)
        if done % args.save_every == 0 or done == args.steps or stopping:
            save_checkpoint(args.out, done, model, optimizer, args.keep)
        if stopping and done < args.steps:
            if rank == 0:
                tqdm.write(f"stopped by SIGTERM after step {done}; the same with --resume auto goes on")
            return
        start = time.perf_counter()
    bar.close()
    if eval_sets and summaries is None:             # resumed after its last step
        summaries = run_eval(args.steps)
    if rank == 0:
        finish_run(args, read_lines(os.path.join(args.out, "metrics.jsonl")), eval=summaries or {})
    barrier()

if __name__ == "__main__":
    run_script(main, parse_args())
