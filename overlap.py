"""Overlap diagnostics: where do student and teacher agree, along the student's own transcripts or others?

    python overlap.py --student example/base --teacher example/teacher --data example/dev.jsonl --out runs/o
    torchrun --nproc_per_node=8 overlap.py --student S --teacher T --data test.jsonl --out runs/o

Each clip has a transcript whose tokens both models score: the student's own (`--states student`, the paper's
case), the manifest's text, or the teacher's. At each row (a position of a transcript) p = teacher, q =
student, both over the ids that both models may write; S and T are the top-k ids of student and teacher,
U = S ∪ T (the paper's union support), I = S ∩ T. Only VUSS is in the paper.

Prints a table with a column for all rows, each set, each language and each quarter of the transcripts. --out
gets overlap.json (the table, and the same by tenths) and clips.jsonl (a line a clip); docs/metrics.md defines
every number. Values are sums over rows divided by counts, over all ranks. It takes about as long as decoding
the clips with both models. (`draw_report` is the picture of a run of opd.py.)
"""

import collections
import os

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import data
import eval
import model
from data import at_least

QUARTERS = 4  # parts of a transcript in the table
TENTHS = 10  # and in overlap.json


def parse_args(argv=None):
    parser = data.argument_parser("overlap.py", __doc__)
    add = parser.add_argument
    whose = ["student", "reference", "teacher"]
    # models
    add("--student", required=True, help="student, folder or hub name")
    add("--teacher", required=True, help="teacher, folder or hub name")
    add("--k", type=at_least(1, int), default=32, help="ids per model in the support")
    # data
    add("--data", nargs="+", required=True, metavar="m.jsonl", help="manifests or audio files")
    add("--language", type=data.language_code, help="in the prompt of clips whose line names none")
    add("--context", choices=["both", "teacher", "none"], default="both", help="whose prompt has the context")
    add("--batch-seconds", type=at_least(0.01), default=600.0, help="seconds of audio scored at once")
    add("--max-seconds", type=at_least(0.01), default=30.0, help="longest clip accepted; longer is an error")
    # transcripts
    add("--states", choices=whose, default="student", help="whose transcripts are scored; reference: text")
    add("--max-new-tokens", type=at_least(1, int), default=800, help="cap on a written transcript")
    add("--tokens-per-second", type=at_least(0), default=25.0, help="cap too: this × seconds + 16; 0 = off")
    # output
    add("--out", help="new folder for tables; without it the table is only printed")
    return parser.parse_args(argv)


@torch.no_grad()
def main(args):
    rank, world, device = data.setup_distributed()

    # ---- models and data -------------------------------------------------------------------------------
    if args.out:
        data.check_out(args.out)
    sets = eval.read_sets(args.data, args.max_seconds)
    clips = []
    set_names = []
    for stem, set_clips in sets.items():
        clips += set_clips
        set_names += [stem] * len(set_clips)
    student = model.SpeechLM.from_pretrained(args.student).to(device).eval()
    teacher = model.SpeechLM.from_pretrained(args.teacher).to(device).eval()
    alignment = model.align_vocabularies(student, teacher)
    model.check_languages(clips, args.language, student, teacher)
    if args.states == "reference":
        to_teacher = alignment.to_teacher.tolist()
        for clip in clips:
            if clip.text is None:
                raise data.InputError(f'{clip.where}: no "text" for --states reference; give it one')
        for clip in clips[rank::world]:
            model.check_reference(clip, student.front_end, to_teacher)

    # ---- one pass over this rank's clips ---------------------------------------------------------------
    sums = collections.defaultdict(collections.Counter)  # group → number of its rows, sums over them
    lines = {}  # clip number → its line of clips.jsonl
    durations = [clip.duration for clip in clips]
    batches = data.cut_micro_batches(range(rank, len(clips), world), durations, args.batch_seconds)
    for indices in tqdm(batches, disable=rank > 0, desc="overlap"):
        batch_clips = [clips[i] for i in indices]
        transcripts, values = measure(student, teacher, alignment, batch_clips, args, device)
        # To the CPU at once: below are many small sums, and each would wait for the device.
        rollout = transcripts["scored"].to("cpu")
        values = {name: value.cpu() for name, value in values.items()}

        # Sums over the rows of each part of the transcripts.
        row_clip, position = rollout.row_mask().nonzero(as_tuple=True)  # (N,), (N,)
        n_rows = (rollout.lens + rollout.stopped)[row_clip]  # (N,) of the row's clip
        for name, n_parts in (("quarter", QUARTERS), ("tenth", TENTHS)):
            part = n_parts * position // n_rows
            for n in range(n_parts):
                add_rows(sums[f"{name} {n + 1}"], values, part == n)

        # A clip has a line, with the means over its rows, and counts in several groups.
        texts = {whose: student.front_end.texts(written) for whose, written in transcripts.items()}
        for b, i in enumerate(indices):
            clip = clips[i]
            clip_sums = collections.Counter()
            add_rows(clip_sums, values, row_clip == b)
            for group in ("all", f"set {set_names[i]}", f"language {clip.language or '(none)'}"):
                sums[group].update(clip_sums)
            lines[i] = {
                "clip": clip.where,
                "audio": clip.audio,
                "set": set_names[i],
                "language": clip.language,
                "text": clip.text,
                "transcript": texts["scored"][b],
                "stopped": bool(rollout.stopped[b]),
                "student": texts["student"][b],
                "teacher": texts["teacher"][b],
                "student_ids": ids_of(transcripts["student"], b),
                "teacher_ids": ids_of(transcripts["teacher"], b),
                **means(clip_sums),
            }

    # ---- tables over all ranks -------------------------------------------------------------------------
    lines = collections.ChainMap(*data.gather(lines))
    total = collections.defaultdict(collections.Counter)
    for rank_sums in data.gather(sums):
        for group, group_sums in rank_sums.items():
            total[group].update(group_sums)  # adds, negative values too
    if rank > 0:
        return
    tenths = [means(total.pop(f"tenth {n + 1}", {})) for n in range(TENTHS)]
    table = {group: means(total[group]) for group in sorted(total) if total[group]}

    # ---- report ----------------------------------------------------------------------------------------
    if args.out:
        os.makedirs(args.out, exist_ok=True)
        result = {**vars(args), "clips": len(clips), "measures": table, "tenths": tenths}
        data.write_json(os.path.join(args.out, "overlap.json"), result)
        lines = [lines[i] for i in range(len(clips))]
        data.add_lines(os.path.join(args.out, "clips.jsonl"), lines, mode="w")
    rows = []
    for name in table["all"]:
        row = [name]
        for group_means in table.values():
            value = group_means[name]
            row.append(value if name == "positions" else f"{value:.4f}")
        rows.append(row)
    eval.print_table(rows, ["mean over rows", *table])


def ids_of(rollout, b):
    """The token ids of a clip's transcript, without the stop token."""
    return rollout.ids[b, : rollout.lens[b]].tolist()


def add_rows(sums, values, row_mask):
    """Adds the rows of row_mask (N,) to `sums`, a Counter: their number, and the sum of each value (N,)."""
    if not row_mask.any():
        return
    sums["positions"] += int(row_mask.sum())
    for name, value in values.items():
        sums[name] += value[row_mask].sum().item()


def means(sums):
    """{positions, and the mean of each measure} from the sums over the rows of a group."""
    n = sums.get("positions", 0)
    table = {"positions": n}
    for name, value in sums.items():
        if name != "positions":
            table[name] = value / n
    return table


# ----------------------------------------------------------------------------------------------------------
# The measures
# ----------------------------------------------------------------------------------------------------------


def measure(student, teacher, alignment, clips, args, device, chunk=256):
    """All measures of a batch of clips, `chunk` rows at a time.

    → {"student", "teacher", "scored": `Rollout`}: what both models write, and the transcripts whose rows are
    scored, all in the student's ids; {measure: (N,) float64}.
    """
    waveforms = [data.load_audio(clip) for clip in clips]
    batch, teacher_batch = data.collate_both(clips, waveforms, student, teacher, args)
    batch = batch.to(device)
    teacher_batch = teacher_batch.to(device)
    encoded = student.encode(batch)
    teacher_encoded = teacher.encode(teacher_batch)

    # Both write, whichever transcript is scored: clips.jsonl keeps it, for simpler comparisons of the two.
    # The teacher's ids map one to one, because those without a counterpart are forbidden to it.
    caps = {"max_new_tokens": args.max_new_tokens, "tokens_per_second": args.tokens_per_second}
    student_written = student.sample(batch, **caps, forbidden=alignment.student_forbidden, encoded=encoded)
    teacher_written = teacher.sample(
        teacher_batch, **caps, forbidden=alignment.teacher_forbidden, encoded=teacher_encoded
    )
    transcripts = {
        "student": student_written,
        "teacher": model.mapped_rollout(teacher_written, alignment.to_student),
    }

    # The transcripts that are scored, and prompts as in opd.py: where a line has no language, the script of
    # the transcript decides that of the teacher's prompt.
    if args.states == "reference":
        rollout = student.front_end.transcripts([clip.text for clip in clips]).to(device)
    else:
        rollout = transcripts[args.states]
    transcripts["scored"] = rollout
    texts = student.front_end.texts(rollout)
    teacher_batch = teacher.with_script_languages(teacher_batch, texts, args.language)

    # Both score their tokens.
    student_hidden = student(batch, rollout, encoded)  # (N, H)
    same_rollout = model.mapped_rollout(rollout, alignment.to_teacher)
    teacher_hidden = teacher(teacher_batch, same_rollout, teacher_encoded)  # (N, H')
    token_ids = rollout.ids[rollout.row_mask()]  # (N,)

    # Measures on the sets of ids.
    student_topk = model.topk_ids(student, student_hidden, alignment.student_forbidden, args.k)  # (N, K)
    teacher_topk = model.topk_ids(teacher, teacher_hidden, alignment.teacher_forbidden, args.k)
    teacher_topk = alignment.in_student(teacher_topk)  # (N, K)
    _, support_mask = model.union_support(student_topk, teacher_topk)  # (N, 2K)
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
            probability_overlap(
                student_logits, teacher_logits, student_topk[rows], teacher_topk[rows], token_ids[rows]
            )
        )
    for name in parts[0]:
        values[name] = torch.cat([part[name] for part in parts])
    return transcripts, values


def set_overlap(student_topk, teacher_topk, support_mask):
    """Measures on the sets of ids at each row.

    student_topk, teacher_topk: (N, K) student ids, −1 invalid, best first; support_mask: (N, 2K) the union's.
    → dict of (N,) float64: vuss = |U|, and vuss_1, vuss_2, vuss_4, … = |U| of the best 1, 2, 4, … ids of
    each, below K; n_student = |S|, n_teacher = |T|, overlap_ratio = |I| / K, jaccard = |I| / |U|, top1 = both
    put the same id first. Without invalid ids vuss = K (2 − overlap_ratio).
    """
    K = student_topk.shape[1]
    n_student = (student_topk >= 0).sum(dim=1).double()
    n_teacher = (teacher_topk >= 0).sum(dim=1).double()
    n_union = support_mask.sum(dim=1).double()
    n_both = n_student + n_teacher - n_union
    values = {"vuss": n_union}
    for k in [2**n for n in range((K - 1).bit_length())]:  # below K; the best k ids are the first k
        _, nested_mask = model.union_support(student_topk[:, :k], teacher_topk[:, :k])
        values[f"vuss_{k}"] = nested_mask.sum(dim=1).double()
    same_first = (student_topk[:, 0] == teacher_topk[:, 0]) & (student_topk[:, 0] >= 0)
    values["n_student"] = n_student
    values["n_teacher"] = n_teacher
    values["overlap_ratio"] = n_both / K
    values["jaccard"] = n_both / n_union.clamp(min=1)
    values["top1"] = same_first.double()
    return values


def probability_overlap(student_logits, teacher_logits, student_topk, teacher_topk, token_ids):
    """Measures on the probabilities at each row, p = teacher, q = student.

    Logits (N, V) in one id space, −inf where forbidden; top-k ids (N, K), −1 invalid; token_ids (N,) of the
    transcript. → dict of (N,) float64:

    - mass_student = Σ_I q, mass_teacher = Σ_I p;
    - advantage = Σ_I q̄ (log p̄ − log q̄) / |I|, with p̄ and q̄ renormalised on I, at most 0;
    - entropy_gap = |H(p) − H(q)|, nats;
    - kl_union, kl_full = KL(p ‖ q) on U, both renormalised there, and on all ids, nats;
    - teacher_logp = log p of the transcript's token, nats;
    - first_student, first_teacher = q and p of the student's likeliest id.
    """
    # −1e9 in place of −∞, because 0 · (−∞) would be NaN.
    log_p = teacher_logits.double().log_softmax(dim=1).clamp(min=-1e9)  # (N, V)
    log_q = student_logits.double().log_softmax(dim=1).clamp(min=-1e9)
    p = log_p.exp()
    q = log_q.exp()
    first_student, first_ids = q.max(dim=1)

    # On U, and on the ids of it that are in I.
    support_ids, support_mask = model.union_support(student_topk, teacher_topk)  # (N, 2K)
    both_mask = model.narrow_support("intersection", support_ids, support_mask, student_topk, teacher_topk)
    columns = support_ids.clamp(min=0)
    union_log_p = log_p.gather(1, columns)  # (N, 2K)
    union_log_q = log_q.gather(1, columns)
    kl_union, _ = model.support_kl(union_log_q, union_log_p, support_mask)
    reverse_kl, _ = model.support_kl(union_log_q, union_log_p, both_mask, 1.0, "reverse")
    return {
        "mass_student": union_log_q.exp().where(both_mask, 0.0).sum(dim=1),
        "mass_teacher": union_log_p.exp().where(both_mask, 0.0).sum(dim=1),
        "advantage": -reverse_kl / both_mask.sum(dim=1).clamp(min=1),
        "entropy_gap": ((q * log_q).sum(dim=1) - (p * log_p).sum(dim=1)).abs(),
        "kl_union": kl_union,
        "kl_full": model.kl_rows(log_p, log_q),
        "teacher_logp": log_p.gather(1, token_ids[:, None])[:, 0],
        "first_student": first_student,
        "first_teacher": p.gather(1, first_ids[:, None])[:, 0],
    }


# ----------------------------------------------------------------------------------------------------------
# The picture of a run of opd.py
# ----------------------------------------------------------------------------------------------------------


def draw_report(out, lines, compared):
    """Draws a finished run of opd.py as out/report.png.

    lines: those of metrics.jsonl. compared: {set: summaries before and after}, errors in % with their 95 %
    intervals.
    """
    figure = Figure(figsize=(16, 3), layout="constrained")
    loss_axis, vuss_axis, health_axis, error_axis = figure.subplots(1, 4)
    metrics = max(lines, key=len)  # a step without a row has no VUSS
    panels = {
        loss_axis: ("nats a row", ["loss", "kl"]),
        vuss_axis: ("|union of both top-k|", [name for name in metrics if name.startswith("vuss")]),
        health_axis: ("share of the transcripts", ["empty", "capped", "looping"]),
    }
    steps = [line["step"] for line in lines]
    for axis, (title, names) in panels.items():
        for name in names:
            values = [line.get(name, np.nan) for line in lines]
            axis.plot(steps, values, linewidth=1, label=name)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.legend(fontsize="small")

    # None, where a set has no reference units or one cluster, is not drawn.
    for place, summaries in enumerate(compared.values()):
        looks = [(0.15, "o", "grey"), (-0.15, "s", "C0")]  # before, after
        for summary, (shift, marker, colour) in zip(summaries, looks):
            error_axis.plot([summary["value"]], [place + shift], marker, color=colour)
            error_axis.hlines(place + shift, summary["low"], summary["high"], color=colour)
    error_axis.set_yticks(range(len(compared)), list(compared), parse_math=False)  # $ is no formula
    error_axis.invert_yaxis()
    error_axis.set_title("error, %: before (grey), after; 95 %")
    figure.savefig(os.path.join(out, "report.png"), dpi=80)


if __name__ == "__main__":
    data.run_script(main, parse_args())
