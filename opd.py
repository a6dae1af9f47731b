"""On-policy distillation for speech recognition (arXiv 2605.28139, section 3).

The student transcribes each clip by itself, the frozen teacher scores those very tokens, and the student is
pulled toward the teacher by KL on the union of both top-k supports. No transcript is read.

The controlled arms change what is learned from a clip and nothing else. Clips, order, steps, optimizer and
schedule stay:

    opd           the defaults
    offline-kl    --states reference                  the same KL, along the manifest's transcripts
    teacher-kl    --states teacher                    the same KL, along the teacher's greedy transcripts
    ce-reference  --states reference --objective ce   more supervised training
    ce-teacher    --states teacher --objective ce     supervised by the teacher's transcripts (TD, online)

    torchrun --standalone --nproc_per_node=2 opd.py    # without arguments: those of example/opd.args
    python opd.py --train my.jsonl --student DIR --teacher DIR --eval test.jsonl --out runs/x
    torchrun --nproc_per_node=8 opd.py --train my.jsonl --student DIR --teacher DIR --out runs/x --bf16

The main deviations from the released code, each on purpose:
    1. The loss is the mean over the rows of the whole global batch, not a mean of the ranks' means.
    2. Both sides of the KL are raw logits. (The release mixes logits and log-probabilities.)
    3. Token ids go to the teacher as they are, never through text.
    4. The stop token is scored where the rollout stopped by itself, and there is none where the cap cut it.
    5. A rollout's cap grows with its clip, so that one looping rollout cannot hold the batch.
    6. An empty rollout is scored at its stop token; the release falls back to the reference text.
    7. Weights, gradients and the optimizer are float32; only computing is bf16, with --bf16.
    8. A clip's encoder output does not depend on its batch mates.
    9. S_t is the student's top-k when it reads the transcript, whoever wrote it, and not the sampler's.

Not in the paper: the arms above, --student-share, --lora-rank (LoRA on a frozen LM), and --context (words
that a line gives to the prompts beforehand).

Prints a progress bar, the error before and after, its change with a 95 % interval, and mean VUSS. Writes
OUT/model (a stock model folder), OUT/step-N (checkpoints), metrics.jsonl, samples.jsonl and summary.json;
docs/metrics.md defines every number. The example takes three minutes on two CPU cores. Defaults are the
paper's, for 24 GPUs.
"""

import collections
import functools
import math
import os
import sys
import time

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import data
import eval
import model
import overlap

SCRIPT = os.path.basename(__file__)


def parse_args(argv=None):
    parser = data.argument_parser(SCRIPT, __doc__)
    add = parser.add_argument
    seconds = data.at_least(0.01)
    weight = data.at_least(0)
    whole = data.at_least(0, int)
    count = data.at_least(1, int)
    whose = ["student", "reference", "teacher"]
    supports = ["union", "teacher", "student", "intersection", "full"]
    parts = list(model.PARTS)
    # models
    add("--student", required=True, help="folder or hub name of the model to distil into; it stays as it is")
    add("--teacher", required=True, help="folder or hub name of the frozen teacher")
    # data
    add("--train", nargs="+", required=True, metavar="M", help="manifests; --states reference reads text")
    add("--eval", nargs="*", default=[], metavar="M", help="manifests to score before and after")
    add("--language", type=data.language_code, help="of clips whose line names none (Qwen3-ASR wants one)")
    add("--context", choices=["both", "teacher", "none"], default="both", help="whose prompt has the context")
    add("--max-seconds", type=seconds, default=30.0, help="longer clips do not train, and are counted")
    add("--on-bad-audio", choices=["error", "skip"], default="error", help="skip: list it in bad.jsonl")
    add("--workers", type=whole, default=2, help="processes a rank that read ahead; 0 = none")
    # arm
    add("--states", choices=whose, default="student", help="whose transcript the rows come from")
    add("--objective", choices=["kl", "ce"], default="kl", help="ce: cross-entropy on that transcript")
    add("--student-share", type=weight, default=0.0, help="share of steps with the student's states")
    # rollout
    add("--temperature", type=weight, default=0.0, help="of the rollout's sampling; 0 = greedy")
    add("--max-new-tokens", type=count, default=64, help="cap of a rollout, its stop token counted")
    add("--tokens-per-second", type=weight, default=25.0, help="cap too: this × seconds + 16; 0 = off")
    # objective
    add("--k", type=count, default=32, help="top-k ids of each model")
    add("--support", choices=supports, default="union", help="ids of the KL; intersection: S_t ∩ T_t")
    add("--divergence", choices=["forward", "reverse", "jsd"], default="forward", help="forward: KL(p ‖ q)")
    add("--beta", type=float, help="the teacher's weight in --divergence jsd; 0.5 if absent")
    add("--tau", type=data.at_least(1e-3), default=1.0, help="temperature of both distributions in the loss")
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
    add("--out", default="runs/opd", help="new or empty folder of the run")
    add("--resume", action="store_true", help="go on with the run in --out, from its newest checkpoint")
    add("--save-every", type=count, default=1_000, help="steps between checkpoints")
    add("--keep", type=count, default=2, help="last checkpoints kept")
    add("--eval-every", type=whole, default=0, help="steps between further evaluations; 0 = off")
    add("--sample-every", type=whole, default=100, help="steps between samples.jsonl; 0 = off")
    add("--tensorboard", action="store_true", help="write every metric to OUT/tensorboard too")
    add("--seed", type=whole, default=0, help="of the order of clips and of sampling")
    args = parser.parse_args(argv)
    if args.divergence == "jsd" and args.beta is None:
        args.beta = 0.5
    is_ce = args.objective == "ce"
    if args.k < 2 and not is_ce and args.support not in ("union", "full"):
        parser.error("--k 1: a support of one id has no KL; give a larger one")
    if args.states == "student" and is_ce:
        parser.error("--objective ce: a student learns nothing from its own words; give other --states")
    if args.student_share > 1 or (args.student_share and (args.states == "student" or is_ce)):
        parser.error("--student-share is a share of the steps, at most 1, for the kl of other --states")
    if args.lora_rank and "lm" not in args.train_parts:
        parser.error("--lora-rank trains the LM; name lm in --train-parts")
    if args.beta is not None and (args.divergence != "jsd" or not 0 < args.beta < 1):
        parser.error("--beta weighs --divergence jsd, between 0 and 1; its ends are reverse and forward")
    return args


def main(args):
    # ---- distributed -------------------------------------------------------------------------------------
    rank, world, device = data.setup_distributed()
    inputs = {"train": args.train, "student": model.local_folder(args.student)}
    inputs["teacher"] = model.local_folder(args.teacher)
    first_step, checkpoint, config = data.open_run(args, SCRIPT, inputs)
    if first_step is None:  # the run in --out is finished
        return

    # ---- models ------------------------------------------------------------------------------------------
    teacher = model.SpeechLM.from_pretrained(args.teacher, torch.bfloat16 if args.bf16 else torch.float32)
    teacher = teacher.to(device).eval().requires_grad_(False)
    student = model.SpeechLM.from_pretrained(args.student)
    if args.lora_rank:
        model.add_lora(student, args.lora_rank, args.seed)
    student = student.to(device).train()
    student.bf16 = args.bf16
    if args.recompute:
        student.recompute_activations()
    # `support_scores` would pass over whatever sits on the head.
    assert type(student.head) is nn.Linear, "the scores on a support read the head's bare weight"
    alignment = model.align_vocabularies(student, teacher)
    trained = model.trained_parameters(student, args.train_parts)
    optimizer = model.make_optimizer(trained, args.lr, args.weight_decay)
    if checkpoint:
        model.load_state(checkpoint, trained, optimizer)

    # ---- data --------------------------------------------------------------------------------------------
    clips = data.Clips(args.train, args.max_seconds, "text" if args.states == "reference" else None)
    eval_sets = eval.read_sets(args.eval, args.max_seconds)
    model.check_languages(clips.languages.values(), args.language, student, teacher)
    for set_clips in eval_sets.values():
        model.check_languages(set_clips, args.language, student)
        eval.clusters_of(set_clips)  # a line without its speaker shows now, and leaves no folder behind
    check = None
    if args.states == "reference":
        to_teacher = alignment.to_teacher.tolist()
        check = functools.partial(model.check_reference, front_end=student.front_end, to_teacher=to_teacher)

    def make_micro_batch(step, indices, batch_clips, waveforms):
        """One micro-batch, made by a data worker: clips, both models' Batch, a uniform draw a token."""
        batch, teacher_batch = data.collate_both(batch_clips, waveforms, student, teacher, args)
        # Sampling is a function of (seed, step, clip): the same whatever the ranks and micro-batches.
        generators = [np.random.default_rng((args.seed, 2, step, i)) for i in indices]
        uniforms = np.stack([generator.random(args.max_new_tokens) for generator in generators])
        return batch_clips, batch, teacher_batch, torch.from_numpy(uniforms)

    dataset = data.StepDataset(clips, args, make_micro_batch, check)
    if rank == 0:
        hours = clips.seconds.sum(dtype=float) / 3600
        epochs = args.steps * args.batch_size / len(clips)
        print(f"train: {len(clips)} clips, {hours:.2f} h, left out: {clips.n_long} longer than", end=" ")
        print(f"{args.max_seconds:g} s, {clips.n_failed} not decoded")
        warmup_steps = min(args.warmup_steps, args.steps)
        print(f"{args.steps} steps = {epochs:.1f} epochs, the first {warmup_steps} are warm-up")
        print(f"{world} process(es) on {device.type}", flush=True)

    # ---- before ------------------------------------------------------------------------------------------
    # Misaligned prompts, rows or masks show on four clips, from the shortest to the longest.
    by_length = np.argsort(clips.seconds, kind="stable")
    check_clips = [clips[i] for i in by_length[np.arange(4) * (len(clips) - 1) // 3]]
    usable, waveforms, bad = data.load_usable(check_clips)
    if not usable:
        raise data.InputError(f"self-check: none of four clips can be used; the first: {bad[0]['reason']}")
    languages = [check_clips[b].language for b in usable]
    for name, speech_lm in (("student", student), ("teacher", teacher)):
        figures = model.self_check(speech_lm, waveforms, languages, args.language)
        if rank == 0:
            shown = ", ".join(f"{key} {value:.3g}" for key, value in figures.items())
            print(f"self-check on {len(usable)} clips, {name}: {shown}", flush=True)

    decoding = {"batch_seconds": args.micro_seconds, "language": args.language}
    decoding["no_context"] = args.context != "both"

    writer = data.begin_run(args, config, first_step)
    if first_step == 0:
        eval.evaluate_run(student, eval_sets, decoding, args, 0)

    # ---- training loop -----------------------------------------------------------------------------------
    caps = {"max_new_tokens": args.max_new_tokens, "tokens_per_second": args.tokens_per_second}
    student_writing = {**caps, "temperature": args.temperature, "forbidden": alignment.student_forbidden}
    teacher_writing = {**caps, "forbidden": alignment.teacher_forbidden}  # greedy
    # The controlled arms that flags choose; their functions are at the end of the file.
    given_rollout = functools.partial(arm_rollout, student, teacher, teacher_writing, alignment)
    other_loss = functools.partial(arm_loss, args, student, teacher, alignment)
    papers_loss = ("kl", "union", "forward", 1.0)
    has_other_loss = (args.objective, args.support, args.divergence, args.tau) != papers_loss
    steps = data.step_batches(dataset, first_step, args.steps, args.workers)
    bar = tqdm(steps, initial=first_step, total=args.steps, disable=rank > 0, desc="opd", mininterval=1)
    started = time.perf_counter()
    for step, micro_batches, bad in bar:
        data_s = time.perf_counter() - started
        done = step + 1
        # The student's own states for a share of the steps (GKD's mixture), else those of --states.
        draw = np.random.default_rng((args.seed, 4, step, 0)).random()
        states = "student" if draw < args.student_share else args.states
        is_sampled = rank == 0 and args.sample_every and (step % args.sample_every == 0 or done == args.steps)
        samples = []
        sums = collections.Counter()  # (metric, what its sum is divided by) → sum
        counts = collections.Counter(skipped=len(bad))
        transcripts = []  # (clip, its transcript)
        for batch_clips, batch, teacher_batch, uniforms in micro_batches:
            batch = batch.to(device)
            teacher_batch = teacher_batch.to(device)
            uniforms = uniforms.to(device)

            # ============================ the method, one micro-batch of B clips ============================
            # Encode. One pass of the student's encoder, with gradient, serves the rollout and the loss. The
            # teacher is frozen: nothing that it does builds a graph.
            encoded = student.encode(batch)  # (ΣA, H)
            teacher_encoded = teacher.encode(teacher_batch)  # (ΣA', H')

            # Rollout: the student transcribes by itself, without gradient. From here on a row is a token of
            # it, the stop token included. (The controlled arms take another transcript in its place.)
            if states == "student":
                rollout = student.sample(batch, **student_writing, uniforms=uniforms, encoded=encoded)
            else:
                rollout = given_rollout(states, batch_clips, teacher_batch, teacher_encoded)

            # Both models read the same tokens, id by id, the teacher behind its own prompt. (Where no line
            # names a language for that prompt, the script of the transcript decides it.)
            texts = student.front_end.texts(rollout)
            teacher_batch = teacher.with_script_languages(teacher_batch, texts, args.language)
            student_hidden = student(batch, rollout, encoded)  # (N, H)
            teacher_rollout = model.mapped_rollout(rollout, alignment.to_teacher)
            teacher_hidden = teacher(teacher_batch, teacher_rollout, teacher_encoded)  # (N, H')

            # At each row S_t and T_t, the top-k ids of student and teacher, and U_t = S_t ∪ T_t, all in the
            # student's ids. The teacher's head is multiplied once, for T_t and for its raw logits on U_t.
            student_topk = model.topk_ids(student, student_hidden, alignment.student_forbidden, args.k)
            other_ids = alignment.in_teacher(student_topk)  # (N, K), −1 where there is none
            teacher_topk, teacher_logits = model.topk_scores(
                teacher, teacher_hidden, alignment.teacher_forbidden, args.k, other_ids
            )
            teacher_topk = alignment.in_student(teacher_topk)  # (N, K)
            support_ids, support_mask = model.union_support(student_topk, teacher_topk)  # (N, 2K), ascending
            teacher_logits = model.in_union_order(teacher_logits, student_topk, teacher_topk)  # (N, 2K)

            # The student's raw logits on U_t: no other row of its output matrix is read with gradient.
            student_logits = model.support_scores(student.head.weight, student_hidden, support_ids)  # (N, 2K)

            # The loss of a row: KL(teacher ‖ student) on U_t (Eq. 1), or what other flags put in its place.
            kl, kl_mask = model.support_kl(student_logits, teacher_logits, support_mask)  # (N,), (N,)
            loss = kl
            loss_mask = kl_mask
            if has_other_loss:
                hidden = (student_hidden, teacher_hidden)
                support = (support_ids, support_mask, student_topk, teacher_topk)
                loss, loss_mask = other_loss(rollout, hidden, support, student_logits, teacher_logits)

            # Backward of the sum. The division by |𝒯| comes once, when the rows of all ranks are known.
            loss.sum().backward()
            # ================================================================================================

            # For the log. What a fork adds to one of these is in metrics.jsonl.
            counts.update(positions=int(loss_mask.sum()), kl_rows=int(kl_mask.sum()))
            counts.update(rows=len(kl), clips=len(texts))
            sums["loss", "positions"] += loss.sum().item()
            sums["kl", "kl_rows"] += kl.sum().item()
            for name, values in overlap.set_overlap(student_topk, teacher_topk, support_mask).items():
                sums[name, "rows"] += values.sum().item()
            clip_values = {
                "mean_tokens": rollout.lens,
                "empty": rollout.lens == 0,
                "capped": ~rollout.stopped,
                "silent": batch.silent,
            }
            for name, values in clip_values.items():
                sums[name, "clips"] += values.sum().item()
            sums["looping", "clips"] += sum(map(eval.looping, texts))
            transcripts += zip(batch_clips, texts)
            if is_sampled and not samples:
                written = teacher.sample(teacher_batch, **teacher_writing, encoded=teacher_encoded)
                teacher_texts = teacher.front_end.texts(written)
                samples = sample_lines(done, student.front_end, batch_clips, rollout, teacher_texts, kl)

        # ---- one gradient --------------------------------------------------------------------------------
        # Σ over ranks of Σ over micro-batches, divided once by |𝒯|: the gradient does not depend on the cut.
        sums = data.sum_over_ranks(sums)
        counts = data.sum_over_ranks(counts)
        if counts["skipped"]:
            data.report_bad(args.out, done, bad)
        model.sum_gradients(trained)
        for parameter in trained.values():
            parameter.grad /= max(counts["positions"], 1)
        grad_norm = nn.utils.clip_grad_norm_(trained.values(), args.clip or math.inf).item()
        if not math.isfinite(sums["loss", "positions"] + grad_norm):
            figures = f"loss {sums['loss', 'positions']}, gradient norm {grad_norm}"
            data.stop_not_finite(args.out, done, figures, transcripts)

        # ---- step ----------------------------------------------------------------------------------------
        lr = model.cosine_lr(step, args.steps, args.warmup_steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if counts["positions"]:  # a step without a row changes nothing
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # ---- log -----------------------------------------------------------------------------------------
        metrics = {"step": done}
        for (name, divisor), total in sums.items():
            metrics[name] = total / max(counts[divisor], 1)
        step_s = time.perf_counter() - started
        metrics.update(positions=counts["positions"], skipped=counts["skipped"], grad_norm=grad_norm, lr=lr)
        metrics.update(clips_per_s=counts["clips"] / step_s, data_s=data_s, step_s=step_s, **data.memory())

        # ---- eval, save ----------------------------------------------------------------------------------
        if args.eval_every and done % args.eval_every == 0 and done < args.steps:
            for stem, summary in eval.evaluate_run(student, eval_sets, decoding, args, done).items():
                metrics[f"{stem}/{summary['metric']}"] = summary["value"]
        if rank == 0:
            data.log_metrics(args.out, metrics, writer, bar)
            data.add_lines(os.path.join(args.out, "samples.jsonl"), samples)
        if done % args.save_every == 0 or done == args.steps:
            model.save_checkpoint(args.out, done, student, trained, optimizer, args.keep)
        started = time.perf_counter()

    # ---- after -------------------------------------------------------------------------------------------
    model.save_model(args.out, student)
    after = eval.evaluate_run(student, eval_sets, decoding, args, args.steps)
    if rank == 0:
        report(args, after)
    data.barrier()


def report(args, after):
    """Prints and draws what a run has done, and writes summary.json. after: {set: summary} at the end."""
    lines = data.read_lines(os.path.join(args.out, "metrics.jsonl"))
    before_path = os.path.join(args.out, "eval-0", "summary.json")
    before = data.read_json(before_path) if os.path.exists(before_path) else {}
    counted = {}
    not_compared = {}  # set → why
    for stem in sorted(before.keys() & after.keys()):  # a resume may give other sets than the start did
        paths = [os.path.join(args.out, f"eval-{step}", f"{stem}.jsonl") for step in (0, args.steps)]
        try:
            counted[stem] = eval.count_set(paths)
        except (data.InputError, OSError) as error:
            not_compared[stem] = str(error)
            print(f"{stem}: before and after are not compared: {error}")
    comparison = {**eval.compare_sets(counted), "not_compared": not_compared}
    if counted:
        eval.print_comparison(comparison, "before", "after")
    vuss = [line["vuss"] for line in lines if "vuss" in line] or [math.nan]  # no step had a row
    first = np.mean(vuss[:10])
    last = np.mean(vuss[-10:])
    summary = {
        "steps": args.steps,
        "before": before,
        "after": after,
        "change": comparison,
        "vuss_first": eval.number_or_none(first),
        "vuss_last": eval.number_or_none(last),
        "seconds": sum(line["step_s"] for line in lines),
        "skipped": sum(line["skipped"] for line in lines),
        "model": os.path.join(args.out, "model"),
    }
    shown = f"{eval.number_text(first, '.2f')} → {eval.number_text(last, '.2f')}"
    print(f"VUSS {shown} (first and last 10 steps)")
    if summary["skipped"]:
        print(f"skipped: {summary['skipped']} clips that could not be used, listed in {args.out}/bad.jsonl")
    print(f"model: {summary['model']}")
    overlap.draw_report(args.out, lines, {stem: (before[stem], after[stem]) for stem in counted})
    data.write_json(os.path.join(args.out, "summary.json"), summary)  # written last: it marks a finished run


def sample_lines(step, front_end, clips, rollout, teacher_texts, kl, n=2):
    """A few transcripts to read: the reference, what was learned from, the teacher's; KL a token in nats."""
    kl_per_clip = kl.split((rollout.lens + rollout.stopped).tolist())
    lines = []
    for b, clip in enumerate(clips[:n]):
        ids = rollout.ids[b, : len(kl_per_clip[b])].tolist()
        line = {
            "step": step,
            "clip": clip.where,
            "ref": clip.fields.get("text"),
            "transcript": front_end.decode(ids),
            "teacher": teacher_texts[b],
            "stopped": bool(rollout.stopped[b]),
            "tokens": [front_end.tokenizer.decode([i]) for i in ids],
            "kl": [round(value, 4) for value in kl_per_clip[b].tolist()],
        }
        lines.append(line)
    return lines


# ----------------------------------------------------------------------------------------------------------
# The controlled arms: another transcript, another loss
# ----------------------------------------------------------------------------------------------------------


def arm_rollout(student, teacher, teacher_writing, alignment, states, clips, teacher_batch, teacher_encoded):
    """The `Rollout`, in the student's ids, of the manifest's transcripts or the teacher's greedy ones."""
    if states == "reference":
        return student.front_end.transcripts([clip.text for clip in clips]).to(student.device)
    written = teacher.sample(teacher_batch, **teacher_writing, encoded=teacher_encoded)
    return model.mapped_rollout(written, alignment.to_student)


def arm_loss(args, student, teacher, alignment, rollout, hidden, support, student_logits, teacher_logits):
    """The loss of each row by the flags: → loss (N,) in nats, and loss_mask (N,), the rows of 𝒯.

    Cross-entropy, or a divergence at temperature τ on all ids, on the union, or on a part of it.
    hidden: (N, H) and (N, H') rows of student and teacher. support: ids and mask (N, 2K) of the union, and
    the top-k ids (N, K) of both. student_logits, teacher_logits (N, 2K), on the union.
    """
    student_hidden, teacher_hidden = hidden
    if args.objective == "ce":
        loss = model.token_ce(student, student_hidden, rollout.ids[rollout.row_mask()])
        return loss, torch.ones_like(loss, dtype=torch.bool)
    divergence = (args.tau, args.divergence, args.beta)
    if args.support == "full":
        return model.full_kl(student, student_hidden, teacher, teacher_hidden, alignment, *divergence)
    mask = model.narrow_support(args.support, *support)
    return model.support_kl(student_logits, teacher_logits, mask, *divergence)


if __name__ == "__main__":
    example = os.path.join(os.path.dirname(os.path.abspath(__file__)), "example", "opd.args")
    data.run_script(main, parse_args(sys.argv[1:] or ["@" + example]))
