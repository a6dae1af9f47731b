r"""Supervised fine-tuning: cross-entropy on transcripts (the paper's Base and TD stages).

    torchrun --nproc_per_node=2 sft.py --train train.jsonl --model DIR --out runs/base
    python sft.py --train runs/td/train.jsonl --text-field hyp --model runs/base/model --out runs/td-sft

The loss is the mean over the transcript tokens and stop tokens of the whole global batch. TD ("teacher data")
is the same on transcripts that the teacher wrote: a result file of eval.py is a manifest, its key is "hyp". A
transcript that the cap cut ("stopped": false) has no stop token to learn, and is counted as `cut`.

Not in the paper:
    1. --ctc-weight adds a CTC loss on the encoder's 50 Hz output, over UTF-8 bytes. It makes a model with
       random weights listen; without it the LM learns the statistics of the text first. Its head is not
       exported.
    2. SpecAugment (--time-masks, --freq-masks).

Prints a progress bar and the error on --eval sets. Writes OUT/model (a stock model folder), OUT/step-N
(checkpoints), metrics.jsonl and summary.json; docs/metrics.md defines every number. A model with random
weights comes from `python -m prepare.student`. Defaults are the paper's; the example's are in
example/make.py.
"""

import collections
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from torch import nn
from tqdm import tqdm

import data
import eval
import model

SCRIPT = os.path.basename(__file__)


def parse_args(argv=None):
    parser = data.argument_parser(SCRIPT, __doc__)
    add = parser.add_argument
    seconds = data.at_least(0.01)
    weight = data.at_least(0)
    whole = data.at_least(0, int)
    count = data.at_least(1, int)
    parts = list(model.PARTS)
    # model
    add("--model", required=True, help="folder or hub name of the model to start from; it stays as it is")
    # data
    add("--train", nargs="+", required=True, metavar="M", help="manifests with a transcript on every line")
    add("--text-field", default="text", help='key of the transcript; "hyp" in a result file of eval.py')
    add("--drop-looping", action="store_true", help="leave out and count transcripts that repeat themselves")
    add("--eval", nargs="*", default=[], metavar="M", help="manifests to score at the end")
    add("--language", type=data.language_code, help="of clips whose line names none (Qwen3-ASR wants one)")
    add("--no-context", action="store_true", help="prompts do not give a line's context")
    add("--max-seconds", type=seconds, default=30.0, help="longer clips do not train, and are counted")
    add("--on-bad-audio", choices=["error", "skip"], default="error", help="skip: list it in bad.jsonl")
    add("--workers", type=whole, default=2, help="processes a rank that read ahead; 0 = none")
    # objective
    add("--ctc-weight", type=weight, default=0.0, help="weight of the CTC loss on the encoder; 0 = off")
    # augmentation (SpecAugment)
    add("--time-masks", type=whole, default=0, help="masks along time per clip; 0 = off")
    add("--time-width", type=count, default=40, help="longest time mask, in mel frames of 10 ms")
    add("--freq-masks", type=whole, default=0, help="masks along frequency per clip; 0 = off")
    add("--freq-width", type=count, default=27, help="widest frequency mask, of 128 mel bins")
    # optimization
    add("--train-parts", nargs="+", choices=parts, default=parts, help="parts that train; the others stay")
    add("--lora-rank", type=whole, default=0, help="LoRA on a frozen LM; 0 = all weights")
    add("--steps", type=count, default=10_000, help="optimizer updates")
    add("--batch-size", type=count, default=960, help="clips per update, all ranks together")
    add("--micro-seconds", type=seconds, default=600.0, help="s of audio per forward pass and rank")
    add("--lr", type=weight, default=1e-4, help="peak learning rate")
    add("--warmup-steps", type=whole, default=1_000, help="linear warm-up, then cosine to 0")
    add("--weight-decay", type=weight, default=0.005, help="of AdamW; not on norms, biases, embeddings")
    add("--clip", type=weight, default=1.0, help="largest gradient norm; 0 = off")
    add("--bf16", action="store_true", help="compute in bf16; what trains stays float32")
    add("--recompute", action="store_true", help="activations again in backward: less memory, more time")
    # run
    add("--out", default="runs/sft", help="new or empty folder of the run")
    add("--resume", action="store_true", help="go on with the run in --out, from its newest checkpoint")
    add("--save-every", type=count, default=1_000, help="steps between checkpoints")
    add("--keep", type=count, default=2, help="last checkpoints kept")
    add("--eval-every", type=whole, default=0, help="steps between further evaluations; 0 = off")
    add("--tensorboard", action="store_true", help="write every metric to OUT/tensorboard too")
    add("--seed", type=whole, default=0, help="of the order of clips, of masks and of the CTC head")
    args = parser.parse_args(argv)
    if args.lora_rank and "lm" not in args.train_parts:
        parser.error("--lora-rank trains the LM; name lm in --train-parts")
    return args


def main(args):
    # ---- distributed -------------------------------------------------------------------------------------
    rank, world, device = data.setup_distributed()
    inputs = {"train": args.train, "model": model.local_folder(args.model)}
    first_step, checkpoint, config = data.open_run(args, SCRIPT, inputs)
    if first_step is None:  # the run in --out is finished
        return

    # ---- model -------------------------------------------------------------------------------------------
    student = model.SpeechLM.from_pretrained(args.model)
    if args.lora_rank:
        model.add_lora(student, args.lora_rank, args.seed)
    student = student.to(device).train()
    student.bf16 = args.bf16
    if args.recompute:
        student.recompute_activations()
    trained = model.trained_parameters(student, args.train_parts)
    ctc_head = None
    if args.ctc_weight:
        if isinstance(student, model.Qwen3ASR):
            raise data.InputError("--ctc-weight: not for Qwen3-ASR: its encoder has no fixed frame rate")
        torch.manual_seed(args.seed)  # the same initial weights on every rank
        ctc_head = nn.Linear(student.config.audio_config.hidden_size, 257).to(device)
        trained["ctc_head.weight"] = ctc_head.weight
        trained["ctc_head.bias"] = ctc_head.bias
    optimizer = model.make_optimizer(trained, args.lr, args.weight_decay)
    if checkpoint:
        model.load_state(checkpoint, trained, optimizer)

    # ---- data --------------------------------------------------------------------------------------------
    def is_cut(clip):
        """Did the cap cut this transcript? A model's transcript says so; a reference is complete."""
        return args.text_field != "text" and clip.fields.get("stopped") is False

    def is_wanted(clip):
        return not (args.drop_looping and eval.looping(clip.text))

    clips = data.Clips(args.train, args.max_seconds, args.text_field, is_wanted)
    eval_sets = eval.read_sets(args.eval, args.max_seconds)
    model.check_languages(clips.languages.values(), args.language, student)
    for set_clips in eval_sets.values():
        model.check_languages(set_clips, args.language, student)
        eval.clusters_of(set_clips)  # a line without its speaker shows now, not after hours
        if args.on_bad_audio == "error":
            for i in range(rank, len(set_clips), world):
                data.load_audio(set_clips[i])  # and so does a damaged clip

    def make_micro_batch(step, indices, batch_clips, waveforms):
        """One micro-batch, built by a data worker: clips, Batch, the transcripts as a Rollout."""
        languages = [clip.language or data.script_language(clip.text, args.language) for clip in batch_clips]
        contexts = None if args.no_context else [clip.context for clip in batch_clips]
        batch = data.collate(waveforms, student.front_end, languages, contexts=contexts)
        for b, i in enumerate(indices):
            n_frames = batch.mel_lens[b]
            batch.mel[b, :, :n_frames] = spec_augment(batch.mel[b, :, :n_frames], args, step, i)
        texts = [clip.text for clip in batch_clips]
        targets = student.front_end.transcripts(texts, [not is_cut(clip) for clip in batch_clips])
        return batch_clips, batch, targets

    dataset = data.StepDataset(clips, args, make_micro_batch)
    if rank == 0:
        hours = clips.seconds.sum(dtype=float) / 3600
        epochs = args.steps * args.batch_size / len(clips)
        print(f"train: {len(clips)} clips, {hours:.2f} h, left out: {clips.n_long} longer than", end=" ")
        print(f"{args.max_seconds:g} s, {clips.n_failed} not decoded, {clips.n_unwanted} looping")
        warmup_steps = min(args.warmup_steps, args.steps)
        print(f"{args.steps} steps = {epochs:.1f} epochs, the first {warmup_steps} are warm-up")
        print(f"{world} process(es) on {device.type}", flush=True)

    # ---- before ------------------------------------------------------------------------------------------
    writer = data.begin_run(args, config, first_step)
    decoding = {"batch_seconds": args.micro_seconds, "language": args.language, "no_context": args.no_context}

    # ---- training loop -----------------------------------------------------------------------------------
    steps = data.step_batches(dataset, first_step, args.steps, args.workers)
    bar = tqdm(steps, initial=first_step, total=args.steps, disable=rank > 0, desc="sft", mininterval=2)
    started = time.perf_counter()
    for step, micro_batches, bad in bar:
        data_s = time.perf_counter() - started
        done = step + 1
        # What the loss is divided by is known before the first backward pass.
        counts = collections.Counter(skipped=len(bad))
        for batch_clips, batch, targets in micro_batches:
            counts.update(tokens=int(targets.row_mask().sum()), clips=len(batch_clips))
        counts = data.sum_over_ranks(counts)
        if counts["skipped"]:
            data.report_bad(args.out, done, bad)

        sums = collections.Counter()  # (metric, what its sum is divided by) → sum
        counts["step"] = 1
        for batch_clips, batch, targets in micro_batches:
            batch = batch.to(device)
            targets = targets.to(device)

            # ============================ the loss, one micro-batch of B clips ============================
            # Encode, and read the transcript behind the prompt: a hidden row for each token to predict.
            if ctc_head is None:
                encoded = student.encode(batch)  # (ΣA, H)
            else:
                frames = student.encode_frames(batch)  # (B, T', D), for CTC too
                encoded = student.encode(batch, frames)
            hidden = student(batch, targets, encoded)  # (N, H)

            # Cross-entropy of the transcript tokens and the stop tokens.
            target_ids = targets.ids[targets.row_mask()]  # (N,)
            cross_entropy = model.token_ce(student, hidden, target_ids).sum()
            loss = cross_entropy / max(counts["tokens"], 1)

            # CTC of the transcript's bytes on the encoder's frames.
            if ctc_head is not None:
                texts = [None if is_cut(clip) else clip.text for clip in batch_clips]
                ctc, n_too_short = ctc_loss(ctc_head, frames, batch.mel_lens // 2, texts)
                loss = loss + args.ctc_weight * ctc / max(counts["clips"], 1)

            # The counts are those of the global batch, so the ranks' gradients only have to be summed.
            loss.backward()
            # ==============================================================================================

            sums["loss", "tokens"] += cross_entropy.item()
            sums["cut", "clips"] += int((~targets.stopped).sum())
            sums["silent", "clips"] += int(batch.silent.sum())
            if ctc_head is not None:
                sums["ctc", "clips"] += ctc.item()
                sums["ctc_too_short", "step"] += n_too_short

        # ---- one gradient --------------------------------------------------------------------------------
        sums = data.sum_over_ranks(sums)
        model.sum_gradients(trained)
        grad_norm = nn.utils.clip_grad_norm_(trained.values(), args.clip or math.inf).item()
        losses = (sums["loss", "tokens"], sums["ctc", "clips"])
        if not math.isfinite(sum(losses) + grad_norm):
            figures = f"Σ of cross-entropy and of CTC {losses}, gradient norm {grad_norm}"
            step_clips = sum([batch_clips for batch_clips, _, _ in micro_batches], [])
            data.stop_not_finite(args.out, done, figures, [(clip, clip.text) for clip in step_clips])

        # ---- step ----------------------------------------------------------------------------------------
        lr = model.cosine_lr(step, args.steps, args.warmup_steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if counts["tokens"]:  # a step without a row changes nothing
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # ---- log -----------------------------------------------------------------------------------------
        metrics = {"step": done}
        for (name, divisor), total in sums.items():
            metrics[name] = total / max(counts[divisor], 1)
        step_s = time.perf_counter() - started
        metrics.update(tokens=counts["tokens"], skipped=counts["skipped"], grad_norm=grad_norm, lr=lr)
        metrics.update(clips_per_s=counts["clips"] / step_s, data_s=data_s, step_s=step_s, **data.memory())

        # ---- eval, save ----------------------------------------------------------------------------------
        if args.eval_every and done % args.eval_every == 0 and done < args.steps:
            for stem, summary in eval.evaluate_run(student, eval_sets, decoding, args, done).items():
                metrics[f"{stem}/{summary['metric']}"] = summary["value"]
        if rank == 0:
            data.log_metrics(args.out, metrics, writer, bar)
        if done % args.save_every == 0 or done == args.steps:
            model.save_checkpoint(args.out, done, student, trained, optimizer, args.keep)
        started = time.perf_counter()

    # ---- after -------------------------------------------------------------------------------------------
    model.save_model(args.out, student)
    summaries = eval.evaluate_run(student, eval_sets, decoding, args, args.steps)
    if rank == 0:
        lines = data.read_lines(os.path.join(args.out, "metrics.jsonl"))
        skipped = sum(line["skipped"] for line in lines)
        if skipped:
            print(f"skipped: {skipped} clips that could not be used, listed in {args.out}/bad.jsonl")
        print(f"model: {os.path.join(args.out, 'model')}")
        summary = {"steps": args.steps, "eval": summaries, "skipped": skipped}
        # Written last: it marks a finished run.
        data.write_json(os.path.join(args.out, "summary.json"), summary)
    data.barrier()


def spec_augment(mel, args, step, clip):
    """SpecAugment of one mel (128, F), a function of (seed, step, clip). Masks are 0, near a mel's mean."""
    draws = np.random.default_rng((args.seed, 3, step, clip))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(draws.integers(2**63)))
        for _ in range(args.time_masks):  # each at most a quarter of the clip
            mel = torchaudio.functional.mask_along_axis(mel, args.time_width, 0.0, axis=1, p=0.25)
        for _ in range(args.freq_masks):
            mel = torchaudio.functional.mask_along_axis(mel, args.freq_width, 0.0, axis=0)
    return mel


def ctc_loss(ctc_head, frames, frame_lens, texts):
    """→ Σ over clips of CTC per byte of their UTF-8 text, and the number of clips too short for their text.

    frames (B, T', D), frame_lens (B,), texts: B strings, None = no loss. Byte b is class b + 1 and 0 the
    blank: 257 classes fit every language and need no vocabulary.
    """
    targets = [(text or "").encode() for text in texts]
    target_lens = torch.tensor([len(target) for target in targets])
    classes = torch.tensor(list(b"".join(targets)), dtype=torch.long, device=frames.device) + 1
    log_probs = ctc_head(frames.float()).double().log_softmax(dim=2).transpose(0, 1)  # (T', B, 257)
    losses = F.ctc_loss(
        log_probs, classes, frame_lens.cpu(), target_lens, reduction="none", zero_infinity=True
    )  # (B,)
    n_too_short = int(((losses.cpu() == 0) & (target_lens > 0)).sum())  # 0 by zero_infinity
    weights = [0.0 if text is None else 1 / max(len(target), 1) for text, target in zip(texts, targets)]
    return (losses * torch.tensor(weights, device=losses.device)).sum(), n_too_short


if __name__ == "__main__":
    data.run_script(main, parse_args())
