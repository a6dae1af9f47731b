"""Overlap diagnostics at student-visited positions: does the teacher agree where the student goes?

    python overlap.py --student example/base --teacher example/teacher --data example/dev.jsonl --out o.json
    torchrun --nproc_per_node=8 overlap.py --student S --teacher T --data test.jsonl --out o.json

The student transcribes each clip by itself, and the teacher scores those very tokens. At each row (a position
of a transcript) p = teacher, q = student, both over the ids that both models may write; S and T are the top-k
ids of student and teacher, U = S ∪ T (the paper's union support), I = S ∩ T.

Prints a table with a row for all positions, each language and each quarter of the transcript; --out stores it
as JSON. Values are sums over rows divided by counts, over all ranks. Only VUSS is in the paper.
It takes about as long as decoding the clips with both models.
"""

import collections
import os

import torch
from tqdm import tqdm

from data import (
    InputError,
    argument_parser,
    at_least,
    collate,
    gather,
    language_code,
    load_audio,
    micro_batches,
    run_script,
    setup_distributed,
    write_json,
)
from eval import MAX_NEW_TOKENS, TOKENS_PER_SECOND, languages_of, print_table, read_sets
from model import (
    SpeechLM,
    align_vocabularies,
    check_languages,
    support_kl,
    teacher_rollout,
    teacher_support,
    union_support,
)

MEASURES = (
    "vuss",
    "n_student",
    "n_teacher",
    "overlap_ratio",
    "jaccard",
    "top1",
    "mass_student",
    "mass_teacher",
    "advantage",
    "entropy_gap",
    "kl_union",
    "kl_full",
)


def parse_args(argv=None):
    parser = argument_parser("overlap.py", __doc__)
    add = parser.add_argument

    # models
    add("--student", required=True, help="student, folder or hub name")
    add("--teacher", required=True, help="teacher, folder or hub name")
    add("--k", type=at_least(1, int), default=32, help="ids per model in the support")

    # data
    add("--data", required=True, nargs="+", metavar="m.jsonl", help="manifests or audio; text is not read")
    add("--out", help="new JSON file for the table; without it the table is only printed")
    add("--language", help="language in the prompt of clips whose line names none")
    add("--batch-seconds", type=at_least(0.01), default=600.0, help="seconds of audio scored at once")
    add("--max-seconds", type=at_least(0.01), default=30.0, help="longest clip accepted; longer is an error")

    # rollout
    add("--max-new-tokens", type=at_least(1, int), default=MAX_NEW_TOKENS, help="cap on a rollout's tokens")
    add(
        "--tokens-per-second",
        type=at_least(0),
        default=TOKENS_PER_SECOND,
        help="cap by the audio: this × seconds + 16 tokens; 0 = off",
    )
    return parser.parse_args(argv)


def main(args):
    # ---- models and data -------------------------------------------------------------------------------
    rank, world, device = setup_distributed()
    if args.out and os.path.exists(args.out):
        raise InputError(f"--out {args.out} exists; give the name of a new file, or remove it first")
    sets = read_sets(args.data, args.max_seconds)
    clips = []
    for set_clips in sets.values():
        clips += set_clips
    student = SpeechLM.from_pretrained(args.student).to(device).eval()
    teacher = SpeechLM.from_pretrained(args.teacher).to(device).eval()
    alignment = align_vocabularies(student, teacher)
    default_language = language_code(args.language) if args.language else None
    check_languages(languages_of(sets), default_language, student, teacher)
    if args.out:
        os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)

    # ---- one pass over this rank's clips ---------------------------------------------------------------
    sums = collections.Counter()  # (group, measure or "positions") → sum over rows
    durations = [clip.duration for clip in clips]
    batches = micro_batches(range(rank, len(clips), world), durations, args.batch_seconds)
    for indices in tqdm(batches, disable=rank > 0, desc="overlap"):
        batch_clips = [clips[i] for i in indices]
        values, row_clip, row_quarter = measure(
            student, teacher, alignment, batch_clips, default_language, args, device
        )
        row_groups = []
        for b, quarter in zip(row_clip, row_quarter):
            language = batch_clips[b].language or "(none)"
            row_groups.append(("all", f"language {language}", f"quarter {quarter + 1}"))
        add_rows(sums, values, row_groups)

    # ---- means over all ranks --------------------------------------------------------------------------
    total = collections.Counter()
    for share in gather(sums):
        total.update(share)  # adds, negative values too
    if rank > 0:
        return
    table = means(total)
    rows = []
    for group, row in table.items():
        rows.append([group, row["positions"], *(f"{row[name]:.4f}" for name in MEASURES)])
    if args.out:
        result = {
            "student": args.student,
            "teacher": args.teacher,
            "data": args.data,
            "k": args.k,
            "clips": len(clips),
            "measures": table,
        }
        write_json(args.out, result)
    print_table(rows, ["rows", "n", *MEASURES])


def add_rows(sums, values, row_groups):
    """Adds per-row values {name: (N,)} to `sums`. row_groups: the groups of each row, N tuples."""
    groups = set().union(*row_groups)
    for group in sorted(groups):
        member = torch.tensor([group in own for own in row_groups], device=values["vuss"].device)  # (N,)
        sums[group, "positions"] += int(member.sum())
        for name in MEASURES:
            sums[group, name] += values[name][member].sum().item()


def means(sums):
    """{group: {positions, and the mean of each measure}}, groups in alphabetical order."""
    table = {}
    for group, key in sorted(sums):
        if key != "positions":
            continue
        n = sums[group, "positions"]
        table[group] = {"positions": n, **{name: sums[group, name] / n for name in MEASURES}}
    return table


# ----------------------------------------------------------------------------------------------------------
# The measures
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(student, teacher, alignment, clips, default_language, args, device, chunk=1024):
    """All measures of a batch of clips, `chunk` rows at a time.

    → {measure: (N,) float64}, and two lists of N: each row's place in `clips`, and its quarter (0–3).
    """
    waveforms = [load_audio(clip) for clip in clips]
    languages = [clip.language for clip in clips]

    # The student writes.
    student_batch = collate(waveforms, student.front_end, languages, default_language).to(device)
    encoded = student.encode(student_batch)
    rollout = student.sample(
        student_batch,
        args.max_new_tokens,
        k=args.k,
        tokens_per_second=args.tokens_per_second,
        forbidden=alignment.student_forbidden,
        encoded=encoded,
    )

    # Both score what it has written.
    teacher_batch = collate(waveforms, teacher.front_end, languages, default_language).to(device)
    teacher_batch = teacher.with_script_languages(teacher_batch, student.front_end.texts(rollout))
    student_hidden = student(student_batch, rollout, encoded)  # (N, H)
    teacher_hidden = teacher(teacher_batch, teacher_rollout(rollout, alignment))  # (N, H')

    # Measures on the sets of ids.
    row_mask = rollout.row_mask()  # (B, T)
    student_topk = rollout.topk_ids[row_mask]  # (N, K)
    _, support_mask, _, teacher_topk = teacher_support(
        teacher, teacher_hidden, student_topk, alignment, args.k, chunk
    )
    values = set_overlap(student_topk, teacher_topk, support_mask)

    # Measures on probabilities, in the student's ids; (N, V) is never there at once.
    parts = []
    columns = alignment.to_teacher.clamp(min=0)  # (V,)
    for rows in torch.arange(len(student_hidden), device=device).split(chunk):
        student_logits = student.head(student_hidden[rows])  # (chunk, V)
        teacher_logits = teacher.head(teacher_hidden[rows])[:, columns]  # (chunk, V)
        student_logits = student_logits.masked_fill(alignment.student_forbidden, -torch.inf)
        teacher_logits = teacher_logits.masked_fill(alignment.student_forbidden, -torch.inf)
        parts.append(
            probability_overlap(student_logits, teacher_logits, student_topk[rows], teacher_topk[rows])
        )
    for name in parts[0]:
        values[name] = torch.cat([part[name] for part in parts])

    row_clip, position = row_mask.nonzero(as_tuple=True)  # (N,)
    n_rows = rollout.lens + rollout.stopped  # (B,)
    quarter = 4 * position // n_rows[row_clip]
    return values, row_clip.tolist(), quarter.tolist()


def set_overlap(student_topk, teacher_topk, support_mask):
    """Measures on the sets of ids at each row.

    student_topk, teacher_topk: (N, K) student ids, −1 invalid, best first; support_mask: (N, 2K) the union's.
    → dict of (N,) float64: vuss = |U|, n_student = |S|, n_teacher = |T|, overlap_ratio = |I| / K,
    jaccard = |I| / |U|, top1 = both put the same id first. Without invalid ids vuss = K (2 − overlap_ratio).
    """
    K = student_topk.shape[1]
    n_student = (student_topk >= 0).sum(dim=1).double()
    n_teacher = (teacher_topk >= 0).sum(dim=1).double()
    n_union = support_mask.sum(dim=1).double()
    n_both = n_student + n_teacher - n_union
    same_first = (student_topk[:, 0] == teacher_topk[:, 0]) & (student_topk[:, 0] >= 0)
    return {
        "vuss": n_union,
        "n_student": n_student,
        "n_teacher": n_teacher,
        "overlap_ratio": n_both / K,
        "jaccard": n_both / n_union.clamp(min=1),
        "top1": same_first.double(),
    }


def probability_overlap(student_logits, teacher_logits, student_topk, teacher_topk):
    """Measures on the probabilities at each row, p = teacher, q = student.

    Logits (N, V) in one id space, −inf where forbidden; top-k ids (N, K), −1 invalid. → dict of (N,) float64:

    - mass_student = Σ_I q, mass_teacher = Σ_I p;
    - advantage = Σ_I q̄ (log p̄ − log q̄) / |I|, with p̄ and q̄ renormalised on I, at most 0;
    - entropy_gap = |H(p) − H(q)|, nats;
    - kl_union, kl_full = KL(p ‖ q) on U, both renormalised there, and on all ids, nats.
    """
    log_p = teacher_logits.double().log_softmax(dim=1)  # (N, V)
    log_q = student_logits.double().log_softmax(dim=1)
    p = log_p.exp()
    q = log_q.exp()

    in_both = is_member(student_topk, p) & is_member(teacher_topk, p)  # (N, V)
    mass_p = (p * in_both).sum(dim=1)
    mass_q = (q * in_both).sum(dim=1)
    # Where I is empty, everything below is multiplied by 0; the floor only keeps it finite.
    log_p_bar = log_p - mass_p.clamp(min=1e-300).log()[:, None]
    log_q_bar = log_q - mass_q.clamp(min=1e-300).log()[:, None]
    q_bar = q * in_both / mass_q.clamp(min=1e-300)[:, None]
    advantage = expectation(q_bar, log_p_bar - log_q_bar) / in_both.sum(dim=1).clamp(min=1)

    support_ids, support_mask = union_support(student_topk, teacher_topk)  # (N, 2K)
    columns = support_ids.clamp(min=0)
    kl_union, _ = support_kl(log_q.gather(1, columns), log_p.gather(1, columns), support_mask)
    return {
        "mass_student": mass_q,
        "mass_teacher": mass_p,
        "advantage": advantage,
        "entropy_gap": (expectation(q, log_q) - expectation(p, log_p)).abs(),
        "kl_union": kl_union,
        "kl_full": expectation(p, log_p - log_q),
    }


def is_member(ids, like):
    """(N, V) bool, True at the ids (N, K) of each row; ids < 0 are none."""
    member = torch.zeros_like(like, dtype=torch.bool)
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    member[rows[ids >= 0], ids[ids >= 0]] = True
    return member


def expectation(weights, values):
    """Σ weights · values over the last dimension, with 0 · (±∞) = 0."""
    return torch.where(weights > 0, weights * values, 0.0).sum(dim=-1)


if __name__ == "__main__":
    run_script(main, parse_args())
