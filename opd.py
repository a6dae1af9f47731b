"""On-policy distillation for speech recognition (arXiv 2605.28139; README, "The method").

    torchrun --nproc_per_node=2 opd.py                     # without arguments: those in example/opd.args
    python opd.py --train my.jsonl --student DIR --teacher DIR --eval test.jsonl --out runs/x
    torchrun --nproc_per_node=8 opd.py --train m.jsonl --student DIR --teacher DIR

The student transcribes each clip by itself, the frozen teacher scores those very tokens, and the student is
pulled toward the teacher by KL on the union of both top-k supports. No transcript is read.
Deviations from the release, each on purpose: the mean is over the positions of the whole global batch, not
per rank; both sides of the KL are raw logits; token ids go to the teacher as they are, never through text;
the stop token is scored where the rollout stopped by itself; a length cap by audio; float32 master weights.
Prints a progress bar, errors before and after, VUSS, seconds per phase and the path of the model. Defaults
are the paper's or the release's values, where they state one; @FILE reads arguments from a file.
"""
import dataclasses
import math
import os
import sys
import time

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from data import (Batch, Clips, Parser, StepDataset, add_lines, all_reduce_sum, at_least, barrier,
                  catch_sigterm, collate, find_run, finish_run, gather, load_or_note, memory, print_plan,
                  read_json, read_lines, report_bad, run_script, setup_distributed, start_run, step_batches,
                  stop_nonfinite, training_flags)
from eval import evaluate, looping, print_summaries, print_table, read_sets
from model import (Rollout, SpeechLM, align_vocabularies, check_languages, cosine_lr, full_kl,
                   load_checkpoint, make_optimizer, refresh, save_checkpoint, self_check, shard,
                   speed_options, student_scores, support_kl, teacher_rollout, teacher_support, whole)
from overlap import set_overlap

PHASES = ("data", "rollout", "teacher", "update")

# ---- The method: rollout → teacher rows → union KL → gradient ----------------------------------------------
@dataclasses.dataclass
class Scored:
    """A micro-batch of rollouts with what the teacher says of them, N rows."""
    batch: Batch                    # the student's, B clips
    rollout: Rollout
    student_topk: torch.Tensor      # (N, K) S_t, −1 invalid
    teacher_topk: torch.Tensor      # (N, K) T_t in student ids, −1 invalid
    support_ids: torch.Tensor       # (N, 2K) U_t
    support_mask: torch.Tensor      # (N, 2K) True = counted
    teacher_scores: torch.Tensor    # (N, 2K) raw teacher logits on U_t
    teacher_hidden: torch.Tensor    # (N, H')
    encoded: tuple | None           # the student's encoder result with its graph, where the rollout left it

@torch.no_grad()
def score_rollout(teacher, alignment, batch, teacher_batch, rollout, k, encoded=None):
    """`Scored`: the frozen teacher on the student's own tokens: top-k ids, union support, logits there."""
    hidden = teacher(teacher_batch, teacher_rollout(rollout, alignment))[0]                   # (N, H')
    student_topk = rollout.topk_ids[rollout.row_mask()]                                       # (N, K)
    ids, mask, scores, teacher_topk = teacher_support(teacher, hidden, student_topk, alignment, k)
    return Scored(batch, rollout, student_topk, teacher_topk, ids, mask, scores, hidden, encoded)

def backward_kl(student, scored, tau, device, full=None, bf16=False):
    """Gradient of L = Σ_t KL_t / |𝒯| (Eq. 1), 𝒯 counted over all micro-batches and ranks of the step. full =
    (teacher, alignment): KL over all ids in place of the union (--support full). A sharded student's
    gradients end as the global sum; a rank, or all of them, without a counted position takes part with 0. →
    per micro-batch the KL of its rows (N,) at τ and at temperature 1, nats, and |𝒯|."""
    counted = [len(s.support_mask) if full else int((s.support_mask.sum(dim=1) >= 2).sum()) for s in scored]
    n_counted = int(all_reduce_sum([sum(counted)], device)[0])
    losses, at_1 = [], []
    for s in scored:
        student.set_requires_gradient_sync(s is scored[-1])
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            hidden = student(s.batch, s.rollout, s.encoded)[0]                                # (N, H)
        student_logits = student_scores(student.head.weight, hidden, s.support_ids)           # (N, 2K)
        if full:
            kl, _ = full_kl(student, hidden, full[0], s.teacher_hidden, full[1], tau)         # (N,)
        else:
            kl, _ = support_kl(student_logits, s.teacher_scores, s.support_mask, tau)         # (N,)
        (kl.sum() / max(n_counted, 1)).backward()
        losses.append(kl.detach())
        at_1.append(support_kl(student_logits.detach(), s.teacher_scores, s.support_mask)[0])
    return losses, at_1, n_counted

def rollout_sums(scored, front_end):
    """What the log needs, summed over this rank's rows and clips, in a fixed order."""
    names = "rows vuss overlap_ratio top1 clips tokens empty capped looping silent".split()
    sums = dict.fromkeys(names, 0.0)
    for s in scored:
        overlap, lens, there = (set_overlap(s.student_topk, s.teacher_topk, s.support_mask), s.rollout.lens,
                                s.batch.seconds > 0)
        values = (len(s.support_ids), *(overlap[name].sum() for name in names[1:4]), there.sum(), lens.sum(),
                  ((lens == 0) & there).sum(), (~s.rollout.stopped & there).sum(),
                  sum(map(looping, front_end.texts(s.rollout))), s.batch.silent.sum())
        sums = {name: sums[name] + float(value) for name, value in zip(names, values)}
    return sums

def write_samples(path, step, clips, front_end, rollout, teacher_texts, kl, n=2):
    """A few rollouts to read: reference, if any, student, teacher's own greedy text, KL per token in nats."""
    per_clip = kl.split((rollout.lens + rollout.stopped).tolist())
    ids = [row[:len(part)] for row, part in zip(rollout.ids.tolist(), per_clip)]
    add_lines(path, [dict(
        step=step, clip=clip.where, ref=clip.fields.get("text"), student=front_end.decode(ids[b]),
        teacher=teacher_texts[b], stopped=bool(rollout.stopped[b]),
        tokens=[front_end.tokenizer.decode([i]) for i in ids[b]],
        kl=[round(x, 4) for x in per_clip[b].tolist()]) for b, clip in enumerate(clips[:n])])

# ---- Command -----------------------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = Parser(prog="opd.py", description=__doc__)
    training_flags(parser, "opd")
    add = parser.add_argument_group("models (GlmAsr, Qwen3-ASR -hf, ARK-ASR)").add_argument
    add("--student", required=True, help="folder or hub name of the model to distil into; it is not changed")
    add("--teacher", required=True, help="folder or hub name of the frozen teacher")
    add = parser.add_argument_group("objective").add_argument
    add("--k", type=at_least(1, int), default=32, help="top-k ids per model; U_t is the union of both")
    add("--support", choices=["union", "full"], default="union", help="ids that the KL is over: U_t, or all")
    add("--tau", type=at_least(1e-3), default=1.0, help="temperature of both distributions in the loss")
    add = parser.add_argument_group("rollout").add_argument
    add("--temperature", type=at_least(0), default=0.0, help="of the rollout's sampling; 0 = greedy")
    add("--max-new-tokens", type=at_least(1, int), default=64, help="cap on a rollout's tokens")
    add("--tokens-per-second", type=at_least(0), default=8.0, help="a cap: this × seconds + 16; 0 = off")
    add("--sample-every", type=at_least(0, int), default=100, help="steps between samples; 0 = off")
    return parser.parse_args(argv)

def main(args):
    # ---- distributed ---------------------------------------------------------------------------------------
    rank, world, device = setup_distributed()
    first_step, checkpoint = gather(find_run(args, rank))[0]            # as rank 0 sees the file system
    if first_step is None:
        return
    stop = catch_sigterm()
    # ---- data ----------------------------------------------------------------------------------------------
    clips, eval_sets = Clips(args.train, None, args.max_seconds), read_sets(args.eval, args.max_seconds)
    # ---- models --------------------------------------------------------------------------------------------
    teacher = SpeechLM.from_pretrained(args.teacher, torch.bfloat16 if args.bf16 else torch.float32)
    teacher.to(device).eval().requires_grad_(False)
    student = SpeechLM.from_pretrained(os.path.join(checkpoint, "model") if checkpoint else args.student)
    student.to(device).train()
    alignment = align_vocabularies(student, teacher)
    check_languages(sum(eval_sets.values(), []), student)
    check_languages(clips.of_each_language, student, teacher)
    # ---- self-check, on four clips: misaligned prompts, rows or masks show here ----------------------------
    some = np.linspace(0, len(clips) - 1, min(len(clips), 1_000)).astype(int)
    some = some[np.argsort(clips.seconds[some], kind="stable")]                     # shortest, …, longest
    few = [clips[i] for i in some[np.arange(4) * (len(some) - 1) // 3]]
    few = [(waveform, clip.language) for clip in few if len(waveform := load_or_note(clip, []))]
    for role, lm in (("student", student), ("teacher", teacher)) if few else ():
        check = self_check(lm, *map(list, zip(*few)))
        if rank == 0:
            print(f"self-check, {role}: nll of its own text {check['nll']:.3f} nats a token, likeliest "
                  f"{check['agreement']:.0%}, in a batch {check['batch_difference']:.0e} off", flush=True)
    # ---- shards, optimizer, resume, output folder ----------------------------------------------------------
    actor = shard(student, args.bf16)           # writes the rollouts; the student itself without torchrun
    optimizer = make_optimizer(student, args.lr, args.weight_decay)
    if checkpoint:
        load_checkpoint(checkpoint, student, optimizer)
    log = start_run(args, rank, first_step)
    if rank == 0:
        print_plan(args, clips, world, device, student=student, teacher=teacher)
    speed_options(student, args.compile, args.recompute)
    speed_options(teacher, args.compile, False)
    student_front_end, teacher_front_end = student.front_end, teacher.front_end
    full = (teacher, alignment) if args.support == "full" else None
    endless = alignment.student_forbidden.clone()           # for the trial of the longest clips, to the cap
    endless[student_front_end.stop_id] = True

    def make(indices, step, bad):
        """One micro-batch: clip numbers, the student's and the teacher's Batch, uniforms (B, T)."""
        chosen = [clips[i] for i in indices]
        waveforms, languages = ([load_or_note(clip, bad) for clip in chosen],
                                [clip.language for clip in chosen])
        mels = [student_front_end.features(w) for w in waveforms]
        same = type(student_front_end) is type(teacher_front_end)           # then both take this log-mel
        uniforms = np.stack([np.random.default_rng((args.seed, 2, step, i)).random(args.max_new_tokens)
                             for i in indices])
        return (indices, collate(waveforms, student_front_end, languages, mels), collate(
            waveforms, teacher_front_end, languages, mels if same else None), torch.from_numpy(uniforms))

    def run_eval(step):
        folder = os.path.join(args.out, f"eval-{step}")
        if step == 0 and first_step > 0:        # "before" is the first start's, if it had any
            return read_json(os.path.join(folder, "summary.json"), {})
        return evaluate(actor, eval_sets, device, args.micro_seconds, folder,
                        strict=args.on_bad_audio == "error")

    before = run_eval(0) if eval_sets else {}
    # ---- training loop -------------------------------------------------------------------------------------
    dataset = StepDataset(clips.seconds, args.batch_size, args.micro_seconds, args.seed, rank, world, make)
    batches = step_batches(dataset, first_step, args.steps, args.workers)
    bar = tqdm(initial=first_step, total=args.steps, disable=rank > 0, desc="opd", mininterval=1)
    clock = [time.perf_counter()]
    for step, micros, bad in batches:
        done = step + 1
        clock.append(time.perf_counter())
        # ---- rollout: the student writes, no gradient ------------------------------------------------------
        rolled = []
        for indices, batch, teacher_batch, uniforms in micros:
            batch, teacher_batch = actor.with_languages(batch.to(device)), teacher_batch.to(device)
            # The weights are the loss's, so one pass of the encoder serves both. Several micro-batches encode
            # twice: all their activations would have to wait for the last one's rollout. So does a sharded
            # student, whose encoder is whole only inside its forward pass.
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                encoded = student.encode(batch) if len(micros) == 1 and actor is student else None
                rollout = actor.sample(
                    batch, args.max_new_tokens, args.temperature, args.k, args.tokens_per_second,
                    alignment.student_forbidden if step >= 0 else endless, uniforms, encoded)
            if None in teacher_batch.languages:         # not in the manifest: by the script of the rollout
                teacher_batch = teacher.with_languages(teacher_batch, student_front_end.texts(rollout))
            rolled.append((batch, teacher_batch, rollout, args.k, encoded))
        clock.append(time.perf_counter())
        # ---- teacher: scores of the very same tokens, no gradient ------------------------------------------
        scored = [score_rollout(teacher, alignment, *parts) for parts in rolled]
        clock.append(time.perf_counter())
        # ---- loss, backward --------------------------------------------------------------------------------
        losses, losses_at_1, n_counted = backward_kl(student, scored, args.tau, device, full, args.bf16)
        if step < 0:                                    # the trial of the longest clips
            optimizer.zero_grad(set_to_none=True)
            clock = [time.perf_counter()]
            continue
        grad_norm = whole(nn.utils.clip_grad_norm_(student.parameters(), args.clip or float("inf"))).item()
        sums = rollout_sums(scored, student_front_end)
        loss, kl, n_bad, stopping, *totals = all_reduce_sum(
            [sum(x.sum().item() for x in losses), sum(x.sum().item() for x in losses_at_1), len(bad),
             stop.is_set(), *sums.values()], device)
        sums = dict(zip(sums, totals))
        if n_bad:
            report_bad(args, done, bad)
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            stop_nonfinite(args, rank, done, clips, [(m[0], s.rollout) for m, s in zip(micros, scored)],
                           student_front_end, f"loss {loss}, gradient norm {grad_norm}")
        # ---- step ------------------------------------------------------------------------------------------
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, args.steps, args.warmup_steps, args.lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        refresh(actor, student)
        clock.append(time.perf_counter())
        # ---- log, eval, save -------------------------------------------------------------------------------
        per_row, per_clip = (1 / max(sums[name], 1) for name in ("rows", "clips"))
        metrics = dict(step=done, loss=loss / max(n_counted, 1), kl=kl / max(n_counted, 1),
                       **{name: sums[name] * per_row for name in ("vuss", "overlap_ratio", "top1")},
                       positions=n_counted, mean_tokens=sums["tokens"] * per_clip,
                       **{name: sums[name] * per_clip for name in ("empty", "capped", "looping", "silent")},
                       skipped=int(n_bad), grad_norm=grad_norm, lr=optimizer.param_groups[0]["lr"],
                       clips_per_s=sums["clips"] / (clock[-1] - clock[0]),
                       **{f"{phase}_s": b - a for phase, a, b in zip(PHASES, clock, clock[1:])}, **memory())
        log(metrics)
        bar.update()
        bar.set_postfix({key: f"{metrics[key]:.3g}" for key in ("loss", "kl", "vuss", "clips_per_s")}, False)
        if rank == 0 and args.sample_every and (step % args.sample_every == 0 or done == args.steps):
            written = teacher.sample(rolled[0][1], args.max_new_tokens, 0.0, 1, args.tokens_per_second)
            write_samples(
                os.path.join(args.out, "samples.jsonl"), done, [clips[i] for i in micros[0][0]],
                student_front_end, scored[0].rollout, teacher_front_end.texts(written), losses_at_1[0])
        if eval_sets and args.eval_every and done % args.eval_every == 0 and done < args.steps:
            summaries = run_eval(done)
            if rank == 0:
                print_summaries(summaries)
        if done % args.save_every == 0 or done == args.steps or stopping:
            save_checkpoint(args.out, done, student, optimizer, args.keep)
        if stopping and done < args.steps:
            if rank == 0:
                tqdm.write(f"stopped by SIGTERM after step {done}; the same with --resume auto goes on")
            return
        clock = [time.perf_counter()]
    bar.close()
    after = run_eval(args.steps) if eval_sets else {}
    # ---- summary -------------------------------------------------------------------------------------------
    if rank == 0:
        lines = read_lines(os.path.join(args.out, "metrics.jsonl"))
        vuss_ends = [float(np.mean([line["vuss"] for line in part])) for part in (lines[:10], lines[-10:])]
        seconds = {phase: sum(line[f"{phase}_s"] for line in lines) for phase in PHASES}
        rows = [[stem, s["metric"], s["value"], after[stem]["value"]] for stem, s in before.items()
                if stem in after and s["units"] == after[stem]["units"] > 0]
        if len(rows) > 1:
            rows.append(["mean", "", *(float(np.mean([row[c] for row in rows])) for c in (2, 3))])
        if rows:
            print_table([[*row, f"{100 * (row[3] / row[2] - 1):+.1f} %" if row[2] else None] for row in rows],
                        ["set", "metric", "before %", "after %", "change"])
        print(f"VUSS {vuss_ends[0]:.2f} → {vuss_ends[1]:.2f} (first and last 10 steps)   "
              + "   ".join(f"{phase} {s:.1f} s" for phase, s in seconds.items())
              + f"   peak {lines[-1]['rss_gb']:.2f} GB")
        finish_run(args, lines, before=before, after=after, vuss_first=vuss_ends[0], vuss_last=vuss_ends[1],
                   seconds=seconds, model=os.path.join(args.out, "model"))
    barrier()

if __name__ == "__main__":
    example = os.path.join(os.path.dirname(os.path.abspath(__file__)), "example", "opd.args")
    run_script(main, parse_args(sys.argv[1:] or ["@" + example]))
