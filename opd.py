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

Not in the paper: the arms above, --student-share, --lora-rank (LoRA on a frozen LM), and --context (words
that a line gives to the prompts beforehand).

Prints a progress bar, the error before and after, its change with a 95 % interval, and mean VUSS. Writes
OUT/model (a stock model folder), OUT/step-N (checkpoints), metrics.jsonl, samples.jsonl and summary.json;
docs/metrics.md defines every number. The example takes three minutes on two CPU cores. Defaults are the
paper's, for 24 GPUs.
"""

import collections
import math
import os
import sys
import time

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from data import (
    AudioError,
    Clips,
    InputError,
    StepDataset,
    add_lines,
    all_reduce_sum,
    argument_parser,
    at_least,
    barrier,
    begin_run,
    check_tensorboard,
    collate,
    content_of,
    contexts_of,
    find_run,
    language_code,
    load_usable,
    log_metrics,
    memory,
    read_json,
    read_lines,
    report_bad,
    run_script,
    setup_distributed,
    step_batches,
    stop_not_finite,
    tensorboard_writer,
    write_json,
)
from eval import (
    clusters_of,
    compare_folders,
    evaluate,
    languages_of,
    looping,
    print_comparison,
    print_summaries,
    read_sets,
)
from model import (
    PARTS,
    TOKENS_PER_SECOND,
    SpeechLM,
    align_vocabularies,
    check_languages,
    cosine_lr,
    full_kl,
    load_state,
    local_folder,
    make_optimizer,
    missing_token,
    model_to_train,
    narrow_support,
    save_checkpoint,
    save_model,
    self_check,
    student_rollout,
    student_support,
    sum_gradients,
    support_kl,
    support_scores,
    teacher_rollout,
    teacher_support,
    token_ce,
    trained_parameters,
)
from overlap import draw_report, nested_ks, set_overlap

SCRIPT = os.path.basename(__file__)

# What a step sums over its micro-batches and ranks: in nats, rows, and clips (docs/metrics.md).
SUMS = ["loss", "counted", "kl", "kl_counted"]
SUMS += ["rows", "vuss", "n_student", "n_teacher", "overlap_ratio", "top1"]
SUMS += ["clips", "tokens", "empty", "capped", "looping", "silent", "bad"]


def parse_args(argv=None):
    parser = argument_parser(SCRIPT, __doc__)
    add = parser.add_argument
    # models
    add("--student", required=True, help="folder or hub name of the model to distil into; it is not changed")
    add("--teacher", required=True, help="folder or hub name of the frozen teacher")
    # data
    add(
        "--train",
        nargs="+",
        required=True,
        metavar="m.jsonl",
        help="manifests; text is read with --states reference only",
    )
    add("--eval", nargs="*", default=[], metavar="m.jsonl", help="sets to score before and after")
    add("--language", help="of clips whose line names none, where a model's prompt wants one (Qwen3-ASR)")
    add(
        "--context",
        choices=["both", "teacher", "none"],
        default="both",
        help="whose prompt gives a line's context; teacher: the student learns to do without",
    )
    add("--max-seconds", type=at_least(0.01), default=30.0, help="longer clips do not train, and are counted")
    add(
        "--on-bad-audio",
        choices=["error", "skip"],
        default="error",
        help="skip: count it, list it in bad.jsonl",
    )
    add("--workers", type=at_least(0, int), default=2, help="processes a rank that read ahead; 0 = none")
    # arm
    add(
        "--states",
        choices=["student", "reference", "teacher"],
        default="student",
        help="whose transcript the positions come from: a rollout, the manifest's text, or the teacher's",
    )
    add("--objective", choices=["kl", "ce"], default="kl", help="ce: cross-entropy on that transcript")
    add(
        "--student-share",
        type=at_least(0),
        default=0.0,
        help="share of the steps that take the student's states instead (GKD's mixture); 0 = none",
    )
    # rollout
    add("--temperature", type=at_least(0), default=0.0, help="of the rollout's sampling; 0 = greedy")
    add(
        "--max-new-tokens", type=at_least(1, int), default=64, help="cap of a rollout, its stop token counted"
    )
    add(
        "--tokens-per-second",
        type=at_least(0),
        default=TOKENS_PER_SECOND,
        help="a cap too: this × seconds + 16; 0 = off",
    )
    # objective
    add("--k", type=at_least(1, int), default=32, help="top-k ids of each model")
    add(
        "--support",
        choices=["union", "teacher", "student", "intersection", "full"],
        default="union",
        help="ids that the KL is over: S_t ∪ T_t, T_t, S_t, S_t ∩ T_t, or all",
    )
    add(
        "--divergence",
        choices=["forward", "reverse", "jsd"],
        default="forward",
        help="KL(teacher ‖ student), KL(student ‖ teacher), or their mixture with --beta",
    )
    add("--beta", type=float, help="the teacher's weight in --divergence jsd, between 0 and 1; 0.5 if absent")
    add("--tau", type=at_least(1e-3), default=1.0, help="temperature of both distributions in the loss")
    # optimization
    add(
        "--train-parts",
        nargs="+",
        choices=list(PARTS),
        default=list(PARTS),
        help="parts of the student that train; the others stay as they are",
    )
    add("--lora-rank", type=at_least(0, int), default=0, help="LoRA on a frozen LM, by peft; 0 = all weights")
    add(
        "--lora-alpha",
        type=at_least(0.01),
        help="LoRA's product counts alpha / rank; twice the rank if absent",
    )
    add("--steps", type=at_least(1, int), default=10_000, help="optimizer updates")
    add("--batch-size", type=at_least(1, int), default=960, help="clips per update, all ranks together")
    add("--micro-seconds", type=at_least(0.01), default=600.0, help="s of audio per forward pass and rank")
    add("--lr", type=at_least(0), default=1e-4, help="peak learning rate")
    add("--warmup-steps", type=at_least(0, int), default=1_000, help="linear warm-up, then cosine to 0")
    add("--weight-decay", type=at_least(0), default=0.005, help="of AdamW; not on norms, biases, embeddings")
    add("--clip", type=at_least(0), default=1.0, help="largest gradient norm; 0 = off")
    add("--bf16", action="store_true", help="compute in bf16; what trains stays float32")
    add("--recompute", action="store_true", help="recompute activations in backward: less memory, more time")
    # run
    add("--out", default="runs/opd", help="new or empty folder of the run")
    add("--resume", action="store_true", help="go on with the run in --out, from its newest checkpoint")
    add("--save-every", type=at_least(1, int), default=1_000, help="steps between checkpoints")
    add("--keep", type=at_least(1, int), default=2, help="last checkpoints kept")
    add("--eval-every", type=at_least(0, int), default=0, help="steps between further evaluations; 0 = off")
    add(
        "--tensorboard",
        action="store_true",
        help="write every metric to OUT/tensorboard too, from this start on",
    )
    add(
        "--sample-every",
        type=at_least(0, int),
        default=100,
        help="steps between lines of samples.jsonl; 0 = off",
    )
    add("--seed", type=at_least(0, int), default=0, help="of the order of clips and of sampling")
    args = parser.parse_args(argv)
    if args.k < 2 and args.objective == "kl" and args.support in ("teacher", "student", "intersection"):
        parser.error("--k 1: a support of one id has no KL; give a larger one")
    if args.states == "student" and args.objective == "ce":
        parser.error("--objective ce: a student learns nothing from its own words; give other --states")
    if args.lora_alpha is not None and not args.lora_rank:
        parser.error("--lora-alpha has no meaning without --lora-rank")
    if args.lora_alpha is None:
        args.lora_alpha = 2.0 * args.lora_rank
    if args.lora_rank and "lm" not in args.train_parts:
        parser.error("--lora-rank trains the LM; name lm in --train-parts")
    if args.student_share > 1:
        parser.error("--student-share is a share of the steps, at most 1")
    if args.student_share and (args.states == "student" or args.objective == "ce"):
        parser.error("--student-share mixes the student's states into the kl of other --states")
    if args.beta is not None and args.divergence != "jsd":
        parser.error("--beta is the weight in --divergence jsd; leave it out")
    if args.divergence == "jsd":
        args.beta = 0.5 if args.beta is None else args.beta
        if not 0 < args.beta < 1:
            parser.error("--beta lies between 0 and 1; its ends are --divergence reverse and forward")
    return args


def main(args):
    # ---- distributed -------------------------------------------------------------------------------------
    rank, world, device = setup_distributed()
    check_tensorboard(args)
    contents = {
        "train": [content_of(path) for path in args.train],
        "student": content_of(local_folder(args.student)),
        "teacher": content_of(local_folder(args.teacher)),
    }
    first_step, checkpoint = find_run(args, SCRIPT, contents)
    if first_step is None:  # the run in --out is finished
        return

    # ---- models ------------------------------------------------------------------------------------------
    teacher = SpeechLM.from_pretrained(args.teacher, torch.bfloat16 if args.bf16 else torch.float32)
    teacher = teacher.to(device).eval().requires_grad_(False)
    student = model_to_train(args.student, checkpoint, args.lora_rank, args.lora_alpha, args.seed)
    student = student.to(device).train()
    student.bf16 = args.bf16
    if args.recompute:
        student.recompute_activations()
    for model in (student, teacher):  # `support_scores` would pass over whatever sits on a head
        assert type(model.head) is nn.Linear, "the scores on a support read the head's bare weight"
    alignment = align_vocabularies(student, teacher)
    trained = trained_parameters(student, args.train_parts)
    optimizer = make_optimizer(trained, args.lr, args.weight_decay)
    if checkpoint:
        load_state(checkpoint, student, trained, optimizer)

    # ---- data --------------------------------------------------------------------------------------------
    language = language_code(args.language) if args.language else None
    clips = Clips(args.train, args.max_seconds, "text" if args.states == "reference" else None)
    eval_sets = read_sets(args.eval, args.max_seconds)
    check_languages(clips.languages, language, student, teacher)
    check_languages(languages_of(eval_sets), language, student)
    for set_clips in eval_sets.values():
        clusters_of(set_clips)  # a line without its speaker shows now, and leaves no folder behind

    to_teacher = alignment.to_teacher.cpu()

    def check_reference(clip):
        """Raises AudioError where the teacher lacks a token of the reference: such a clip cannot be used."""
        token = missing_token(clip.text, student.front_end, to_teacher)
        if token is not None:
            raise AudioError(f"{clip.where}: the teacher's vocabulary lacks a token of the text, {token!r}")

    def make_micro_batch(step, indices, batch_clips, waveforms):
        """One micro-batch, made by a data worker: clips, both models' Batch, uniforms (B, T), references."""
        languages = [clip.language for clip in batch_clips]
        student_contexts, teacher_contexts = contexts_of(batch_clips, args.context)
        batch = collate(waveforms, student.front_end, languages, language, student_contexts)
        teacher_batch = collate(waveforms, teacher.front_end, languages, language, teacher_contexts)
        # Sampling is a function of (seed, step, clip): the same whatever the ranks and micro-batches.
        # (Nothing reads these draws at temperature 0.)
        uniforms = [
            np.random.default_rng((args.seed, 2, step, i)).random(args.max_new_tokens) for i in indices
        ]
        uniforms = torch.from_numpy(np.stack(uniforms))
        references = None
        if args.states == "reference":
            references = student.front_end.transcripts([clip.text for clip in batch_clips])
        return batch_clips, batch, teacher_batch, uniforms, references

    dataset = StepDataset(
        clips, args, make_micro_batch, check_reference if args.states == "reference" else None
    )
    if rank == 0:
        hours = clips.seconds.sum(dtype=float) / 3600
        left_out = (
            f"left out: {clips.n_long} longer than {args.max_seconds:g} s, {clips.n_failed} not decoded"
        )
        epochs = args.steps * args.batch_size / len(clips)
        peak_lr = cosine_lr(min(args.warmup_steps, args.steps - 1), args.steps, args.warmup_steps, args.lr)
        print(f"train: {len(clips)} clips, {hours:.2f} h, {left_out}")
        print(f"{args.steps} steps = {epochs:.1f} epochs, lr up to {peak_lr:.3g}")
        for name, model in (("student", student), ("teacher", teacher)):
            print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
        print(f"{world} process(es) on {device.type}", flush=True)

    # ---- before ------------------------------------------------------------------------------------------
    # Misaligned prompts, rows or masks show on four clips, from the shortest to the longest.
    by_length = np.argsort(clips.seconds, kind="stable")
    check_clips = [clips[i] for i in by_length[np.arange(4) * (len(clips) - 1) // 3]]
    usable, waveforms, bad = load_usable(check_clips)
    if not usable:
        raise InputError(f"self-check: none of four clips can be used; the first: {bad[0]['reason']}")
    languages = [check_clips[b].language for b in usable]
    for name, model in (("student", student), ("teacher", teacher)):
        check = self_check(model, waveforms, languages, language)
        if rank == 0:
            figures = ", ".join(f"{key} {value:.3g}" for key, value in check.items())
            print(f"self-check on {len(usable)} clips, {name}: {figures}", flush=True)

    def run_eval(step):
        if not eval_sets:
            return {}
        folder = os.path.join(args.out, f"eval-{step}")
        is_strict = args.on_bad_audio == "error"
        return evaluate(
            student,
            eval_sets,
            device,
            {
                "batch_seconds": args.micro_seconds,
                "default_language": language,
                "with_context": args.context == "both",
            },
            folder,
            strict=is_strict,
        )

    begin_run(args, SCRIPT, contents, first_step)
    writer = tensorboard_writer(args, first_step)
    before_path = os.path.join(args.out, "eval-0", "summary.json")
    if first_step == 0:
        before = run_eval(0)
    else:
        before = read_json(before_path) if os.path.exists(before_path) else {}

    # ---- training loop -----------------------------------------------------------------------------------
    n_ids = len(alignment.student_forbidden)
    nested_names = [f"vuss_{k}" for k in nested_ks(min(args.k, n_ids))]  # VUSS at smaller k
    sum_names = SUMS + nested_names
    bar = tqdm(initial=first_step, total=args.steps, disable=rank > 0, desc="opd", mininterval=1)
    started = time.perf_counter()
    for step, micro_batches, bad in step_batches(dataset, first_step, args.steps, args.workers):
        data_s = time.perf_counter() - started
        done = step + 1
        is_sampled = rank == 0 and args.sample_every and (step % args.sample_every == 0 or done == args.steps)
        samples = None
        sums = collections.Counter()
        step_clips = []
        step_texts = []
        states = states_of(args, step)
        for batch_clips, batch, teacher_batch, uniforms, references in micro_batches:
            batch = batch.to(device)
            teacher_batch = teacher_batch.to(device)
            uniforms = uniforms.to(device)
            references = references.to(device) if references else None

            # ============================ the method, one micro-batch of B clips ============================
            # Encode. One pass of the student's encoder, with gradient, serves the rollout and the loss. The
            # teacher is frozen: nothing that it does builds a graph.
            encoded = student.encode(batch)  # (ΣA, H)
            teacher_encoded = teacher.encode(teacher_batch)  # (ΣA', H')

            # Rollout: the student transcribes by itself, without gradient, and keeps its top-k ids S_t of
            # every step. From here on a row is a token of it, the stop token included. (The controlled arms
            # take another transcript, and nothing else differs.)
            if states == "student":
                rollout = student.sample(
                    batch,
                    args.max_new_tokens,
                    temperature=args.temperature,
                    k=args.k,
                    tokens_per_second=args.tokens_per_second,
                    forbidden=alignment.student_forbidden,
                    uniforms=uniforms,
                    encoded=encoded,
                )
            elif states == "teacher":
                transcripts = teacher_transcripts(teacher, teacher_batch, teacher_encoded, alignment, args)
                rollout = student_rollout(transcripts, alignment)
            else:
                rollout = references

            # The teacher reads the same tokens, id by id, behind its own prompt. (Without a language in the
            # manifest, the script of the text decides it.)
            texts = student.front_end.texts(rollout)
            teacher_batch = teacher.with_script_languages(teacher_batch, texts)
            same_transcripts = teacher_rollout(rollout, alignment)
            teacher_hidden = teacher(teacher_batch, same_transcripts, teacher_encoded)  # (N, H')

            # The student reads them, with gradient. S_t of a transcript that it did not write comes from
            # these rows.
            student_hidden = student(batch, rollout, encoded)  # (N, H)
            if rollout.topk_ids is None:
                student_topk = student_support(student, student_hidden, alignment, args.k)  # (N, K)
            else:
                student_topk = rollout.topk_ids[rollout.row_mask()]  # (N, K)

            # The teacher's top-k ids are T_t; U_t = S_t ∪ T_t, and the raw logits of both models there.
            support_ids, support_mask, teacher_logits, teacher_topk = teacher_support(
                teacher, teacher_hidden, student_topk, alignment, args.k
            )  # (N, 2K), (N, 2K), (N, 2K), (N, K)
            student_logits = support_scores(student.head.weight, student_hidden, support_ids)  # (N, 2K)

            # The loss of each row: KL(teacher ‖ student) on U_t (Eq. 1), or what the flags put in its place.
            if args.objective == "ce":
                loss = token_ce(student, student_hidden, rollout.ids[rollout.row_mask()])  # (N,)
                counted = torch.ones_like(loss, dtype=torch.bool)
            elif args.support == "full":
                loss, counted = full_kl(
                    student,
                    student_hidden,
                    teacher,
                    teacher_hidden,
                    alignment,
                    args.tau,
                    args.divergence,
                    args.beta,
                )  # (N,), (N,)
            else:
                loss_mask = narrow_support(
                    args.support, support_ids, support_mask, student_topk, teacher_topk
                )
                loss, counted = support_kl(
                    student_logits, teacher_logits, loss_mask, args.tau, args.divergence, args.beta
                )  # (N,), (N,)

            # Backward of the sum. The division by |𝒯| comes once, when the rows of all ranks are known.
            loss.sum().backward()
            # ================================================================================================

            # For the log: the paper's KL and overlap on U_t, whatever the loss is. (By default it is that KL.
            # A Counter's update adds.)
            kl, kl_counted = support_kl(student_logits.detach(), teacher_logits, support_mask)
            sums.update(loss=loss.sum().item(), counted=counted.sum().item())
            sums.update(kl=kl.sum().item(), kl_counted=kl_counted.sum().item())
            sums.update(rollout_sums(batch, rollout, texts, student_topk, teacher_topk, support_mask))
            step_clips += batch_clips
            step_texts += texts
            if is_sampled and samples is None:
                transcripts = teacher_transcripts(teacher, teacher_batch, teacher_encoded, alignment, args)
                teacher_texts = teacher.front_end.texts(transcripts)
                samples = sample_lines(done, student.front_end, batch_clips, rollout, teacher_texts, kl)

        # ---- one gradient --------------------------------------------------------------------------------
        # Σ over ranks of Σ over micro-batches, divided once by |𝒯|: the gradient does not depend on the cut.
        sums["bad"] = len(bad)
        totals = all_reduce_sum([sums[name] for name in sum_names], device)
        totals = dict(zip(sum_names, totals))
        n_bad = int(totals["bad"])
        if n_bad:
            report_bad(args.out, done, bad)
        sum_gradients(trained)
        for parameter in trained.values():
            parameter.grad /= max(totals["counted"], 1)
        grad_norm = nn.utils.clip_grad_norm_(trained.values(), args.clip or math.inf).item()
        if not math.isfinite(totals["loss"]) or not math.isfinite(grad_norm):
            what = f"loss {totals['loss']}, gradient norm {grad_norm}"
            stop_not_finite(args.out, done, what, step_clips, step_texts)

        # ---- step ----------------------------------------------------------------------------------------
        lr = cosine_lr(step, args.steps, args.warmup_steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if totals["counted"]:  # a step without a row changes nothing
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # ---- log -----------------------------------------------------------------------------------------
        step_s = time.perf_counter() - started
        n_rows = max(totals["rows"], 1)
        n_clips = max(totals["clips"], 1)
        n_counted = max(totals["counted"], 1)
        metrics = {
            "step": done,
            "loss": totals["loss"] / n_counted,
            "kl": totals["kl"] / max(totals["kl_counted"], 1),
            "vuss": totals["vuss"] / n_rows,
            **{name: totals[name] / n_rows for name in nested_names},
            "n_student": totals["n_student"] / n_rows,
            "n_teacher": totals["n_teacher"] / n_rows,
            "overlap_ratio": totals["overlap_ratio"] / n_rows,
            "top1": totals["top1"] / n_rows,
            "positions": int(totals["counted"]),
            "mean_tokens": totals["tokens"] / n_clips,
            "empty": totals["empty"] / n_clips,
            "capped": totals["capped"] / n_clips,
            "looping": totals["looping"] / n_clips,
            "silent": totals["silent"] / n_clips,
            "skipped": n_bad,
            "grad_norm": grad_norm,
            "lr": lr,
            "clips_per_s": totals["clips"] / step_s,
            "data_s": data_s,
            "step_s": step_s,
            **memory(),
        }

        # ---- eval, save ----------------------------------------------------------------------------------
        if args.eval_every and done % args.eval_every == 0 and done < args.steps:
            summaries = run_eval(done)
            for stem, summary in summaries.items():
                metrics[f"{stem}/{summary['metric']}"] = summary["value"]
            if rank == 0:
                print_summaries(summaries)
        if rank == 0:
            log_metrics(args.out, metrics, writer)
            bar.update()
            shown = {key: f"{metrics[key]:.3g}" for key in ("loss", "kl", "vuss", "clips_per_s")}
            bar.set_postfix(shown, refresh=False)
            add_lines(os.path.join(args.out, "samples.jsonl"), samples or [])
        if done % args.save_every == 0 or done == args.steps:
            save_checkpoint(args.out, done, student, trained, optimizer, args.keep)
        started = time.perf_counter()
    bar.close()

    # ---- after -------------------------------------------------------------------------------------------
    save_model(args.out, student)
    after = run_eval(args.steps)
    if rank == 0:
        lines = read_lines(os.path.join(args.out, "metrics.jsonl"))
        comparison = {}
        if before and after:
            folders = [os.path.join(args.out, f"eval-{step}") for step in (0, args.steps)]
            comparison = compare_folders(*folders, strict=False)
            print_comparison(comparison, "before", "after")
        elif after:  # --eval was given at a resume, so there is nothing to compare with
            print_summaries(after)
        vuss_first = float(np.mean([line["vuss"] for line in lines[:10]]))
        vuss_last = float(np.mean([line["vuss"] for line in lines[-10:]]))
        seconds = sum(line["step_s"] for line in lines)
        waited = sum(line["data_s"] for line in lines)
        print(f"VUSS {vuss_first:.2f} → {vuss_last:.2f} (first and last 10 steps)")
        peak = f"{lines[-1]['rss_gb']:.2f} GB"
        if device.type == "cuda":
            peak += f", {lines[-1]['gpu_gb']:.2f} GB on the GPU"
        print(f"{seconds:.0f} s of steps, {waited:.0f} s of them for data; peak {peak}")
        skipped = sum(line["skipped"] for line in lines)
        if skipped:
            print(f"skipped: {skipped} clips that could not be used, listed in {args.out}/bad.jsonl")
        print(f"model: {os.path.join(args.out, 'model')}")
        summary = {
            "steps": args.steps,
            "before": before,
            "after": after,
            "change": comparison,
            "vuss_first": vuss_first,
            "vuss_last": vuss_last,
            "seconds": seconds,
            "skipped": skipped,
            "model": os.path.join(args.out, "model"),
        }
        write_json(os.path.join(args.out, "summary.json"), summary)  # it marks a finished run
        compared = comparison.get("sets", {})
        draw_report(args.out, lines, {stem: (before[stem], after[stem]) for stem in compared})
    barrier()


def states_of(args, step):
    """The states of a step: the student's own for a share of the steps (GKD's mixture), else --states."""
    draw = np.random.default_rng((args.seed, 4, step, 0)).random()
    return "student" if draw < args.student_share else args.states


def teacher_transcripts(teacher, teacher_batch, teacher_encoded, alignment, args):
    """What the teacher writes greedily, without ids that the student lacks: a `Rollout` in its own ids."""
    return teacher.sample(
        teacher_batch,
        args.max_new_tokens,
        k=1,
        tokens_per_second=args.tokens_per_second,
        forbidden=alignment.teacher_forbidden,
        encoded=teacher_encoded,
    )


def rollout_sums(batch, rollout, texts, student_topk, teacher_topk, support_mask):
    """What the log needs of a micro-batch, summed over its rows and clips."""
    overlap = set_overlap(student_topk, teacher_topk, support_mask)
    return {
        **{name: values.sum().item() for name, values in overlap.items()},
        "rows": len(support_mask),
        "clips": len(texts),
        "tokens": rollout.lens.sum().item(),
        "empty": (rollout.lens == 0).sum().item(),
        "capped": (~rollout.stopped).sum().item(),
        "looping": sum(looping(text) for text in texts),
        "silent": batch.silent.sum().item(),
    }


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


if __name__ == "__main__":
    example = os.path.join(os.path.dirname(os.path.abspath(__file__)), "example", "opd.args")
    run_script(main, parse_args(sys.argv[1:] or ["@" + example]))
