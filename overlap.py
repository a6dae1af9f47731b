"""Overlap diagnostics at student-visited positions: does the teacher agree where the student goes?

    python overlap.py --student example/base --teacher example/teacher --data example/dev.jsonl --out o.json

The student transcribes each clip by itself, the teacher scores those very tokens; p = student, q = teacher, S
and T their top-k ids, U = S ∪ T, I = S ∩ T. All probabilities are over the ids that both models may write.
Prints a table, in all, by language and by quarter of the transcript; --out stores it as JSON. Values are sums
over rows divided by counts over all ranks. Not in the paper: everything but VUSS.
"""
import collections
import os

import torch
from tqdm import tqdm

from data import (InputError, Parser, at_least, collate, gather, load_audio, micro_batches, run_script,
                   setup_distributed, write_json)
from eval import print_table, read_sets
from model import (SpeechLM, align_vocabularies, check_languages, support_kl, teacher_rollout,
                   teacher_support, union_support)

MEASURES = ("vuss", "overlap_ratio", "jaccard", "top1", "mass_student", "mass_teacher", "advantage",
            "entropy_gap", "kl_union", "kl_full")

def set_overlap(student_topk, teacher_topk, support_mask):
    """Per-row set measures from top-k ids (N, K) (student ids, −1 invalid, best first) and the union's mask
    (N, 2K). → dict of (N,) float64: vuss = |U|, overlap_ratio = |I| / K, jaccard = |I| / |U|, top1 = both put
    the same id first."""
    union = support_mask.sum(1).double()
    both = (student_topk >= 0).sum(1).double() + (teacher_topk >= 0).sum(1) - union    # |I| = |S| + |T| − |U|
    return dict(vuss=union, overlap_ratio=both / student_topk.shape[1], jaccard=both / union.clamp(min=1),
                top1=((student_topk[:, 0] == teacher_topk[:, 0]) & (student_topk[:, 0] >= 0)).double())

def probability_overlap(student_logits, teacher_logits, student_topk, teacher_topk):
    """Per-row measures on probabilities. Logits (N, V) in one id space, −inf where forbidden; top-k ids (N,
    K). → dict of (N,) float64: mass_student, mass_teacher = Σ_I p, Σ_I q; advantage = Σ_I p̄ (log q̄ − log
    p̄) / |I|, p̄ and q̄ renormalised on I (≤ 0); entropy_gap = |H(q) − H(p)|; kl_union, kl_full = KL(q ‖ p)
    on U and on all ids, in nats."""
    log_p, log_q = student_logits.double().log_softmax(1), teacher_logits.double().log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    plain = lambda x, weight: torch.where(weight > 0, x, 0)                                   # 0 log 0 = 0
    in_s, in_t = (torch.zeros_like(p, dtype=torch.bool) for _ in range(2))
    for member, ids in ((in_s, student_topk), (in_t, teacher_topk)):
        rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
        member[rows[ids >= 0], ids[ids >= 0]] = True
    both = in_s & in_t                                                                        # (N, V)
    mass_p, mass_q = (p * both).sum(1), (q * both).sum(1)
    p_bar = p * both / mass_p.clamp(min=1e-300)[:, None]
    log_ratio = ((log_q - mass_q.clamp(min=1e-300).log()[:, None])
                 - (log_p - mass_p.clamp(min=1e-300).log()[:, None]))
    entropy_p, entropy_q = -(p * plain(log_p, p)).sum(1), -(q * plain(log_q, q)).sum(1)
    support_ids, support_mask = union_support(student_topk, teacher_topk)
    columns = support_ids.clamp(min=0)
    return dict(mass_student=mass_p, mass_teacher=mass_q,
                advantage=(p_bar * plain(log_ratio, p_bar)).sum(1) / both.sum(1).clamp(min=1),
                entropy_gap=(entropy_q - entropy_p).abs(),
                kl_union=support_kl(log_p.gather(1, columns), log_q.gather(1, columns), support_mask)[0],
                kl_full=(q * (plain(log_q, q) - plain(log_p, q))).sum(1))

@torch.no_grad()
def measure(student, teacher, alignment, waveforms, languages, k, max_new_tokens, tokens_per_second, device,
            chunk=1024):
    """All measures of a batch of clips. → {name: (N,) float64}, each row's clip (N,) and quarter 0–3 (N,)."""
    student_batch = student.with_languages(collate(waveforms, student.front_end, languages).to(device))
    rollout = student.sample(student_batch, max_new_tokens, k=k, tokens_per_second=tokens_per_second,
                             forbidden=alignment.student_forbidden)
    teacher_batch = teacher.with_languages(collate(waveforms, teacher.front_end, languages).to(device),
                                           student.front_end.texts(rollout))
    row_mask = rollout.row_mask()
    student_topk = rollout.topk_ids[row_mask]
    student_hidden = student(student_batch, rollout)[0]
    teacher_hidden = teacher(teacher_batch, teacher_rollout(rollout, alignment))[0]
    _, support_mask, _, teacher_topk = teacher_support(teacher, teacher_hidden, student_topk, alignment, k)
    values = set_overlap(student_topk, teacher_topk, support_mask)
    parts = []
    for rows in torch.arange(len(student_hidden), device=device).split(chunk):
        logits = (student.head(student_hidden[rows]),
                  teacher.head(teacher_hidden[rows])[:, alignment.to_teacher.clamp(min=0)])     # student ids
        logits = [x.masked_fill(alignment.student_forbidden, -torch.inf) for x in logits]       # (chunk, V)
        parts.append(probability_overlap(*logits, student_topk[rows], teacher_topk[rows]))
    values.update({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    clip, position = row_mask.nonzero(as_tuple=True)
    return values, clip.tolist(), (4 * position // (rollout.lens + rollout.stopped)[clip]).tolist()

def parse_args(argv=None):
    parser = Parser(prog="overlap.py", description=__doc__)
    add = parser.add_argument
    add("--student", required=True, help="student, folder or hub name")
    add("--teacher", required=True, help="teacher, folder or hub name")
    add("--data", required=True, nargs="+", metavar="m.jsonl", help="manifests or audio; text is not read")
    add("--out", help="new JSON file for the table; without it the table is only printed")
    add("--k", type=at_least(1, int), default=32, help="ids per model in the support")
    add("--batch-seconds", type=at_least(0.01), default=600.0, help="seconds of audio scored at once")
    add("--max-seconds", type=at_least(0.01), default=30.0, help="longest clip accepted; longer is an error")
    add("--max-new-tokens", type=at_least(1, int), default=64, help="cap on a rollout's tokens")
    add("--tokens-per-second", type=at_least(0), default=8.0, help="a cap: this × seconds + 16; 0 = off")
    return parser.parse_args(argv)

def main(args):
    rank, world, device = setup_distributed()
    if args.out and os.path.exists(args.out):
        raise InputError(f"--out {args.out} exists; give the name of a new file, or remove it first")
    clips = [clip for clips in read_sets(args.data, args.max_seconds).values() for clip in clips]
    student, teacher = (SpeechLM.from_pretrained(folder).to(device).eval()
                        for folder in (args.student, args.teacher))
    alignment = align_vocabularies(student, teacher)
    check_languages(clips, student, teacher)
    if args.out:
        os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    sums = collections.Counter()                        # (group, measure or "positions") → sum over rows
    batches = micro_batches(range(rank, len(clips), world), [c.duration for c in clips], args.batch_seconds)
    for indices in tqdm(batches, disable=rank > 0, desc="overlap"):
        values, row_clip, row_quarter = measure(
            student, teacher, alignment, [load_audio(clips[i]) for i in indices],
            [clips[i].language for i in indices], args.k, args.max_new_tokens, args.tokens_per_second, device)
        groups = [("all", f"language {clips[indices[b]].language or '(none)'}", f"quarter {quarter + 1}")
                  for b, quarter in zip(row_clip, row_quarter)]
        for group in sorted({g for row in groups for g in row}):
            member = torch.tensor([group in row for row in groups], device=device)
            sums.update({(group, name): values[name][member].sum().item() for name in MEASURES})
            sums[group, "positions"] += int(member.sum())
    shares, sums = gather(sums), collections.Counter()
    for share in shares:
        sums.update(share)                              # adds, negative values too
    if rank > 0:
        return
    table = {group: dict(positions=n, **{name: sums[group, name] / n for name in MEASURES})
             for (group, key), n in sorted(sums.items()) if key == "positions"}
    print_table([[group, row["positions"], *(f"{row[name]:.4f}" for name in MEASURES)]
                 for group, row in table.items()], ["rows", "n", *MEASURES])
    if args.out:
        write_json(args.out, dict(student=args.student, teacher=args.teacher, data=args.data, k=args.k,
                                  clips=len(clips), measures=table))

if __name__ == "__main__":
    run_script(main, parse_args())
