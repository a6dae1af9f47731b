r"""Supervised fine-tuning: cross-entropy on transcripts (the paper's Base and TD stages).

    torchrun --nproc_per_node=2 sft.py --train train.jsonl --config example/base/config.json \
        --tokenizer example/base --out runs/base
    python sft.py --train td.jsonl --text-field hyp --model runs/base/model --out runs/td

With --model it starts from a folder; with --config and --tokenizer from random weights. The loss is the mean
over the transcript tokens and the stop token of the whole global batch, counted over all micro-batches and
ranks. From random weights a CTC loss on the encoder's 50 Hz output (UTF-8 bytes, head dropped when saving)
makes the model listen: without it the LM learns the text's statistics first. Not in the paper: CTC,
SpecAugment. Prints a progress bar with loss and clips per second, and the error on --eval sets; writes
OUT/model, metrics.jsonl, config.json, summary.json. Defaults are the paper's; the example's: example/make.py.
"""
import json
import os
import time

import torch
import torch.nn.functional as F
import torchaudio
import transformers
from torch import nn
from tqdm import tqdm

from data import (InputError, Parser, StepDataset, all_reduce_sum, at_least, collate, drop_long, load_audio,
                  one_line, read_manifest, run_script, script_language, setup_distributed, start_run,
                  step_batches, training_flags, write_json)
from eval import evaluate, print_table, read_sets
from model import (SpeechLM, all_reduce_gradients, check_languages, cosine_lr, load_state, make_optimizer,
                   save_checkpoint, speed_options, start_folder)


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
    """SpecAugment on one clip's mel (128, F), a pure function of (seed, step, clip).
    The mask value 0 is near the mean."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash((args.seed, step, clip)))
        for axis, masks, width in ((1, args.time_masks, min(args.time_width, mel.shape[1] // 4)),
                                   (0, args.freq_masks, args.freq_width)):
            for _ in range(masks):
                mel = torchaudio.functional.mask_along_axis(mel[None], width, 0.0, axis + 1)[0]
    return mel


def ctc_loss(ctc_head, frames, frame_lens, texts):
    """Sum over clips of CTC / bytes of its UTF-8 text: frames (B, T', D), lens (B,). → loss, clips too short
    for their text.

    Byte b is class b + 1, 0 is blank; 257 classes fit every language and need no vocabulary."""
    targets = [list(text.encode()) for text in texts]
    lens = torch.tensor([len(t) for t in targets])
    flat = torch.tensor([b + 1 for t in targets for b in t], dtype=torch.long, device=frames.device)
    log_probs = ctc_head(frames).float().log_softmax(-1).transpose(0, 1)                     # (T', B, 257)
    losses = F.ctc_loss(log_probs, flat, frame_lens.cpu(), lens, reduction="none", zero_infinity=True)
    needed = torch.tensor([len(t) + sum(a == b for a, b in zip(t, t[1:])) for t in targets])
    return (losses / lens.clamp(min=1).to(losses.device)).sum(), int((needed > frame_lens.cpu()).sum())


def main(args):
    # ---- distributed ---------------------------------------------------------------------------------------
    rank, world, device = setup_distributed()
    if args.batch_size % world:
        raise InputError(f"--batch-size {args.batch_size} is not divisible by the {world} processes")
    # ---- data ----------------------------------------------------------------------------------------------
    clips = [clip for path in args.train for clip in read_manifest(path, args.text_field)]
    n_failed = len(clips)
    clips = [clip for clip in clips if clip.text is not None or "error" not in clip.fields]
    n_failed -= len(clips)                          # lines of a result file that eval.py could not decode
    for clip in clips:
        if clip.text is None:
            raise InputError(f'{clip.where}: no "{args.text_field}"; '
                             "supervised training needs it on every line (--text-field)")
    clips, n_long = drop_long(clips, args.max_seconds)
    if not clips:
        raise InputError(f"--train: no clip of at most --max-seconds {args.max_seconds:g}")
    eval_sets = read_sets(args.eval, args.max_seconds)
    # ---- model ---------------------------------------------------------------------------------------------
    torch.manual_seed(args.seed)                    # the same initial weights on every rank
    source = start_folder(args, args.model)
    given = [name for name in ("model", "encoder", "lm", "config", "tokenizer") if getattr(args, name)]
    if given not in (["model"], ["encoder", "lm"], ["config", "tokenizer"]):
        raise InputError("start from a model, --model, from two, --encoder and --lm, or from random weights, "
                         f"--config and --tokenizer; found {given or 'none of these'}")
    if args.model or args.resume:
        model = SpeechLM.from_pretrained(source)
    elif args.lm:
        model = SpeechLM.from_parts(args.encoder, args.lm)
    else:
        if not os.path.isdir(args.tokenizer):
            raise InputError(f"--tokenizer {args.tokenizer}: not a folder")
        try:
            config = json.load(open(args.config))
            tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise InputError(f"--config {args.config}, --tokenizer {args.tokenizer}: "
                             f"{one_line(error)}") from None
        model = SpeechLM.from_config(config, tokenizer)
    if args.ctc_weight and model.is_qwen3_asr:
        raise InputError("--ctc-weight: only for GlmAsr encoders; leave it out for Qwen3-ASR")
    check_languages(sum(eval_sets.values(), clips), model)
    ctc_head = nn.Linear(model.net.config.audio_config.hidden_size, 257)
    model.to(device).train(), ctc_head.to(device)
    speed_options(model, args.compile, args.recompute)
    trained = nn.ModuleList([model, ctc_head]) if args.ctc_weight else nn.ModuleList([model])
    # ---- output folder, optimizer, resume ------------------------------------------------------------------
    optimizer = make_optimizer(trained, args.lr, args.weight_decay)
    first_step = 0
    if args.resume:
        first_step, extra = load_state(args.out, optimizer)
        if args.ctc_weight:
            ctc_head.load_state_dict(extra)
    if args.steps < first_step:
        raise InputError(f"--steps {args.steps}: {args.out} is at step {first_step} already")
    log = start_run(args, rank, first_step)
    if rank == 0:
        hours = sum(clip.duration for clip in clips) / 3600
        print(f"train: {len(clips)} clips, {hours:.2f} h, {n_long} left out as longer than "
              f"{args.max_seconds:g} s, {n_failed} that eval.py could not decode; "
              f"{args.steps} steps of {args.batch_size} clips = "
              f"{args.steps * args.batch_size / len(clips):.1f} epochs; "
              f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
              f"{world} process(es) on {device.type}", flush=True)

    front_end = model.front_end

    def make(indices, step):
        """One micro-batch: Batch, the transcripts as a Rollout, their texts."""
        waveforms, texts = [load_audio(clips[i]) for i in indices], [clips[i].text for i in indices]
        mels = [augment(front_end.features(w), args, step, i) for i, w in zip(indices, waveforms)]
        languages = [clips[i].language or script_language(clips[i].text) for i in indices]
        return collate(waveforms, front_end, languages, mels), front_end.transcripts(texts), texts

    def run_eval(step):
        summaries = evaluate(model, eval_sets, device, args.micro_seconds,
                             os.path.join(args.out, f"eval-{step}"))
        if rank == 0:
            log({"step": step, **{f"{stem}/{s['metric']}": s["value"] for stem, s in summaries.items()}})
            print_table([[stem, s["metric"], s["value"]] for stem, s in summaries.items()],
                        [f"step {step}", "metric", "%"])
        return summaries

    # ---- training loop -------------------------------------------------------------------------------------
    dataset = StepDataset(clips, args.batch_size, args.micro_seconds, args.seed, rank, world, make)
    bar = tqdm(range(first_step, args.steps), initial=first_step, total=args.steps, disable=rank > 0,
               desc="sft", mininterval=2)
    batches = step_batches(dataset, first_step, args.steps, args.workers)
    for step in bar:
        start = time.perf_counter()
        micros = next(batches)
        n_tokens = all_reduce_sum([sum(int(targets.row_mask().sum()) for _, targets, _ in micros)], device)[0]
        # ---- loss ------------------------------------------------------------------------------------------
        # Σ cross-entropy over tokens / tokens of the global batch, plus the weighted CTC loss per clip
        loss_sum = ctc_sum = n_short = 0
        for batch, targets, texts in micros:
            batch, targets = batch.to(device), targets.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                hidden, frames, frame_lens = model(model.with_languages(batch), targets)
                logits = model.head(hidden).float()                                           # (N, V)
            ce = F.cross_entropy(logits, targets.ids[targets.row_mask()], reduction="sum")
            ctc, short = (ctc_loss(ctc_head, frames, frame_lens, texts) if args.ctc_weight
                          else (ce.new_zeros(()), 0))
            (ce / n_tokens + args.ctc_weight * ctc / args.batch_size).backward()
            loss_sum, ctc_sum, n_short = loss_sum + ce.item(), ctc_sum + ctc.item(), n_short + short
        # ---- step ------------------------------------------------------------------------------------------
        all_reduce_gradients(trained.parameters())
        norm = nn.utils.clip_grad_norm_(trained.parameters(), args.clip or float("inf")).item()
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, args.steps, args.warmup_steps, args.lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # ---- log, eval, save -------------------------------------------------------------------------------
        loss_sum, ctc_sum, n_short = all_reduce_sum([loss_sum, ctc_sum, n_short], device)
        seconds = time.perf_counter() - start
        metrics = dict(step=step + 1, loss=loss_sum / n_tokens, ctc=ctc_sum / args.batch_size,
                       ctc_too_short=n_short, grad_norm=norm, lr=optimizer.param_groups[0]["lr"],
                       tokens=n_tokens, clips_per_s=args.batch_size / seconds, step_s=seconds)
        if not args.ctc_weight:
            del metrics["ctc"], metrics["ctc_too_short"]
        log(metrics)
        bar.set_postfix({"loss": f"{metrics['loss']:.3f}", "clips/s": f"{metrics['clips_per_s']:.1f}"},
                        refresh=False)
        if not metrics["loss"] < float("inf") or not norm < float("inf"):
            raise RuntimeError(f"step {step + 1}: loss {metrics['loss']}, gradient norm {norm}: "
                               "not finite; lower --lr")
        done = step + 1
        if (done % args.save_every == 0 or done == args.steps) and rank == 0:
            save_checkpoint(args.out, done, model, optimizer,
                            ctc_head.state_dict() if args.ctc_weight else None)
        if eval_sets and args.eval_every and done % args.eval_every == 0 and done < args.steps:
            run_eval(done)
    summaries = run_eval(args.steps) if eval_sets else {}
    if rank == 0:
        write_json(os.path.join(args.out, "summary.json"), {"steps": args.steps, "eval": summaries})
        print(f"model: {os.path.join(args.out, 'model')}")


if __name__ == "__main__":
    run_script(main, parse_args())
