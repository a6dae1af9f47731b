"""Overlap diagnostics: where do student and teacher agree, along the student's own transcripts or others?

    python overlap.py --student example/base --teacher example/teacher --data example/dev.jsonl --out runs/o
    torchrun --nproc_per_node=8 overlap.py --student S --teacher T --data test.jsonl --out runs/o
    python overlap.py --runs runs/opd-1 runs/opd-2 --out runs/curves     # pictures of runs, without a model
    python overlap.py --validate table.json                              # does a measure predict the gain?

Each clip has a transcript whose tokens both models score: the student's own (`--states student`, the paper's
case), the manifest's text, or the teacher's. At each row (a position of a transcript) p = teacher, q =
student, both over the ids that both models may write; S and T are the top-k ids of student and teacher,
U = S ∪ T (the paper's union support), I = S ∩ T. Only VUSS is in the paper.

Prints a table with a column for all rows, each set, each language and each quarter of the transcripts, and
one with the error rates that a measure has to beat as a predictor. --out gets overlap.json (both tables),
clips.jsonl (a line a clip), positions.png and confidence.png; docs/metrics.md defines every number.
Values are sums over rows divided by counts, over all ranks. It takes about as long as decoding the clips
with both models.
"""

import collections
import json
import math
import os

import jiwer
import numpy as np
import scipy.stats
import torch
from tqdm import tqdm

from data import (
    InputError,
    add_lines,
    argument_parser,
    at_least,
    check_out,
    collate,
    contexts_of,
    cut_micro_batches,
    gather,
    language_code,
    load_audio,
    read_lines,
    run_script,
    setup_distributed,
    write_json,
)
from eval import (
    CHARACTER_LANGUAGES,
    DECODING,
    cell_text,
    cluster_table,
    count_errors,
    estimate,
    language_of,
    languages_of,
    normalize,
    p_text,
    percent,
    print_table,
    read_sets,
)
from model import (
    TOKENS_PER_SECOND,
    SpeechLM,
    align_vocabularies,
    check_languages,
    missing_token,
    student_rollout,
    student_support,
    support_kl,
    teacher_rollout,
    teacher_support,
    union_support,
)

QUARTERS = 4  # parts of a transcript in the table
TENTHS = 10  # and in the picture
CONFIDENCE_BINS = 40  # of the picture of probabilities, in each direction


def holm(p_values):
    """Holm's adjusted p of several tests; a None stays None and is no test."""
    order = [i for i, p in enumerate(p_values) if p is not None]
    order.sort(key=lambda i: p_values[i])
    adjusted = [None] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, (len(order) - rank) * p_values[i])
        adjusted[i] = min(1.0, largest)
    return adjusted


def parse_args(argv=None):
    parser = argument_parser("overlap.py", __doc__)
    add = parser.add_argument

    # task
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--student", help="student, folder or hub name: compare it with --teacher on --data")
    task.add_argument("--runs", nargs="+", metavar="RUN", help="folders of opd.py: draw their steps in --out")
    task.add_argument("--validate", metavar="TABLE.json", help="test whether a measure predicts the gain")
    add("--out", help="new folder for tables and pictures; without it tables are only printed")

    # models
    add("--teacher", help="teacher, folder or hub name")
    add("--k", type=at_least(1, int), default=32, help="ids per model in the support")

    # data
    add("--data", nargs="+", default=[], metavar="m.jsonl", help="manifests or audio files")
    add("--language", help="language in the prompt of clips whose line names none")
    add(
        "--context",
        choices=["both", "teacher", "none"],
        default="both",
        help="whose prompt gives a line's context",
    )
    add("--batch-seconds", type=at_least(0.01), default=600.0, help="seconds of audio scored at once")
    add("--max-seconds", type=at_least(0.01), default=30.0, help="longest clip accepted; longer is an error")

    # transcripts
    add(
        "--states",
        choices=["student", "reference", "teacher"],
        default="student",
        help="whose transcripts are scored: what the student writes, the manifest's text, the teacher's",
    )
    add(
        "--max-new-tokens",
        type=at_least(1, int),
        default=DECODING["max_new_tokens"],
        help="cap on a written transcript",
    )
    add(
        "--tokens-per-second",
        type=at_least(0),
        default=TOKENS_PER_SECOND,
        help="cap by the audio: this × seconds + 16 tokens; 0 = off",
    )

    args = parser.parse_args(argv)
    if args.student and not (args.teacher and args.data):
        parser.error("--student, --teacher and --data go together")
    if args.runs and not args.out:
        parser.error("--runs needs --out, the folder for its picture")
    if not args.student:
        task_name = "runs" if args.runs else "validate"
        allowed = (task_name, "out") if args.runs else (task_name,)
        for name, value in vars(args).items():
            if name not in allowed and value != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} has no meaning with --{task_name}")
    return args


def main(args):
    rank, world, device = setup_distributed()
    if args.student:
        measure_sets(args, rank, world, device)
    elif rank > 0:
        return  # one process is enough for files
    elif args.runs:
        draw_runs(args.runs, args.out)
    else:
        validate(args.validate)


@torch.no_grad()
def measure_sets(args, rank, world, device):
    """--student: measures student and teacher on --data, on all ranks."""
    # ---- models and data -------------------------------------------------------------------------------
    if args.out:
        check_out(args.out)
        new_figure(1, 1)  # where matplotlib is missing, say so before the work
    sets = read_sets(args.data, args.max_seconds)
    clips = []
    set_names = []
    for stem, set_clips in sets.items():
        clips += set_clips
        set_names += [stem] * len(set_clips)
    student = SpeechLM.from_pretrained(args.student).to(device).eval()
    teacher = SpeechLM.from_pretrained(args.teacher).to(device).eval()
    alignment = align_vocabularies(student, teacher)
    default_language = language_code(args.language) if args.language else None
    check_languages(languages_of(sets), default_language, student, teacher)
    if args.states == "reference":
        check_references(clips, student, alignment)

    # ---- one pass over this rank's clips ---------------------------------------------------------------
    sums = collections.defaultdict(collections.Counter)  # group → number of its rows, sums over them
    histogram = np.zeros((CONFIDENCE_BINS, CONFIDENCE_BINS))  # rows by student's and teacher's probability
    lines = {}  # clip number → its line of clips.jsonl
    durations = [clip.duration for clip in clips]
    batches = cut_micro_batches(range(rank, len(clips), world), durations, args.batch_seconds)
    for indices in tqdm(batches, disable=rank > 0, desc="overlap"):
        batch_clips = [clips[i] for i in indices]
        rollout, values, written = measure(
            student, teacher, alignment, batch_clips, default_language, args, device
        )
        # To the CPU at once: below are many small sums, and each would wait for the device.
        rollout = rollout.to("cpu")
        values = {name: value.cpu() for name, value in values.items()}
        histogram += confidence_histogram(values)

        # Sums over the rows of each part of the transcripts.
        row_clip, position = rollout.row_mask().nonzero(as_tuple=True)  # (N,), (N,)
        n_rows = (rollout.lens + rollout.stopped)[row_clip]  # (N,) of the row's clip
        for name, n_parts in (("quarter", QUARTERS), ("tenth", TENTHS)):
            part = n_parts * position // n_rows
            for n in range(n_parts):
                add_rows(sums[f"{name} {n + 1}"], values, part == n)

        # A clip has a line, the means over its rows and its baselines, and counts in several groups.
        transcripts = student.front_end.texts(rollout)
        for b, i in enumerate(indices):
            counts = count_baselines(clips[i], **written[b])
            clip_sums = collections.Counter()
            add_rows(clip_sums, values, row_clip == b)
            for group in clip_groups(set_names[i], clips[i].language):
                sums[group].update(clip_sums)
            lines[i] = {
                "clip": clips[i].where,
                "audio": clips[i].audio,
                "set": set_names[i],
                "language": clips[i].language,
                "transcript": transcripts[b],
                "stopped": bool(rollout.stopped[b]),
                **means(clip_sums),
                **baselines(counts),
                **counts,
            }

    # ---- tables over all ranks -------------------------------------------------------------------------
    total = collections.defaultdict(collections.Counter)
    lines_of_all = {}
    histogram_of_all = 0
    for rank_sums, rank_lines, rank_histogram in gather((sums, lines, histogram)):
        for group, group_sums in rank_sums.items():
            total[group].update(group_sums)  # adds, negative values too
        lines_of_all.update(rank_lines)
        histogram_of_all = histogram_of_all + rank_histogram
    if rank > 0:
        return

    tenths = [means(total.pop(f"tenth {n + 1}", {})) for n in range(TENTHS)]
    measure_table = {group: means(total[group]) for group in sorted(total)}
    lines = [lines_of_all[i] for i in range(len(clips))]
    baseline_table = baselines_by_group(lines)

    # ---- report ----------------------------------------------------------------------------------------
    if args.out:
        os.makedirs(args.out, exist_ok=True)
        result = {
            "student": args.student,
            "teacher": args.teacher,
            "data": args.data,
            "states": args.states,
            "context": args.context,
            "k": args.k,
            "clips": len(clips),
            "measures": measure_table,
            "tenths": tenths,
            "baselines": baseline_table,
        }
        write_json(os.path.join(args.out, "overlap.json"), result)
        add_lines(os.path.join(args.out, "clips.jsonl"), lines, mode="w")
        position_figure(tenths, args.k).savefig(os.path.join(args.out, "positions.png"))
        confidence_figure(histogram_of_all).savefig(os.path.join(args.out, "confidence.png"))
    print_measures(measure_table)
    tqdm.write("")
    print_baselines(baseline_table)


def check_references(clips, student, alignment):
    """Raises InputError for the first clip without a text, or with a token that the teacher lacks."""
    to_teacher = alignment.to_teacher.tolist()
    for clip in clips:
        if clip.text is None:
            raise InputError(f'{clip.where}: no "text", which --states reference scores; give it one')
        token = missing_token(clip.text, student.front_end, to_teacher)
        if token is not None:
            raise InputError(
                f'{clip.where}: "text" has the token {token!r}, which the teacher\'s vocabulary lacks; '
                "leave the line out"
            )


def clip_groups(set_name, language):
    """The groups that a clip with all of its rows belongs to."""
    return "all", f"set {set_name}", f"language {language or '(none)'}"


def add_rows(sums, values, row_mask):
    """Adds the rows of row_mask (N,) to `sums`, a Counter: their number, and the sum of each value (N,)."""
    if row_mask.any():
        sums["positions"] += int(row_mask.sum())
        sums.update({name: value[row_mask].sum().item() for name, value in values.items()})


def means(sums):
    """{positions, and the mean of each measure} from the sums over the rows of a group."""
    n = sums.get("positions", 0)
    table = {"positions": n}
    for name, value in sums.items():
        if name != "positions":
            table[name] = value / n
    return table


def print_measures(table):
    """Prints the means {group: {measure: mean}}, a row for each measure and a column for each group."""
    rows = []
    for name in table["all"]:
        row = [name]
        for group_means in table.values():
            value = group_means[name]
            row.append(value if name == "positions" else f"{value:.4f}")
        rows.append(row)
    print_table(rows, ["mean over rows", *table])


def print_baselines(table):
    """Prints the baselines {group: {name: value}}, a row for each group."""
    rows = [[group, *row.values()] for group, row in table.items()]
    print_table(rows, ["baselines", *table["all"]])


# ----------------------------------------------------------------------------------------------------------
# The measures
# ----------------------------------------------------------------------------------------------------------


def measure(student, teacher, alignment, clips, default_language, args, device, chunk=256):
    """All measures of a batch of clips, `chunk` rows at a time.

    → the `Rollout` whose rows are scored, {measure: (N,) float64}, and for each clip what both models wrote:
    {student_text, teacher_text, student_ids, teacher_ids}, ids without the stop token, all in the student's.
    """
    waveforms = [load_audio(clip) for clip in clips]
    languages = [clip.language for clip in clips]
    student_contexts, teacher_contexts = contexts_of(clips, args.context)
    student_batch = collate(waveforms, student.front_end, languages, default_language, student_contexts)
    teacher_batch = collate(waveforms, teacher.front_end, languages, default_language, teacher_contexts)
    student_batch = student_batch.to(device)
    teacher_batch = teacher_batch.to(device)
    student_encoded = student.encode(student_batch)
    teacher_encoded = teacher.encode(teacher_batch)

    # Both write, whichever transcript is scored: the baselines compare what they have written. The teacher's
    # ids map one to one, because those without a counterpart are forbidden to it.
    student_written = student.sample(
        student_batch,
        args.max_new_tokens,
        k=args.k,
        tokens_per_second=args.tokens_per_second,
        forbidden=alignment.student_forbidden,
        encoded=student_encoded,
    )
    teacher_written = teacher.sample(
        teacher_batch,
        args.max_new_tokens,
        k=1,
        tokens_per_second=args.tokens_per_second,
        forbidden=alignment.teacher_forbidden,
        encoded=teacher_encoded,
    )
    teacher_written = student_rollout(teacher_written, alignment)

    # The transcripts that are scored, and prompts as in opd.py: where a line has no language, the script of
    # the transcript decides that of the teacher's prompt.
    if args.states == "student":
        rollout = student_written
    elif args.states == "teacher":
        rollout = teacher_written
    else:
        rollout = student.front_end.transcripts([clip.text for clip in clips]).to(device)
    teacher_batch = teacher.with_script_languages(teacher_batch, student.front_end.texts(rollout))

    # Both score their tokens.
    student_hidden = student(student_batch, rollout, student_encoded)  # (N, H)
    teacher_hidden = teacher(teacher_batch, teacher_rollout(rollout, alignment), teacher_encoded)  # (N, H')
    row_mask = rollout.row_mask()  # (B, T)
    token_ids = rollout.ids[row_mask]  # (N,)

    # Measures on the sets of ids.
    if args.states == "student":
        student_topk = rollout.topk_ids[row_mask]  # (N, K), the sampler's
    else:
        student_topk = student_support(student, student_hidden, alignment, args.k)  # (N, K)
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
            probability_overlap(
                student_logits, teacher_logits, student_topk[rows], teacher_topk[rows], token_ids[rows]
            )
        )
    for name in parts[0]:
        values[name] = torch.cat([part[name] for part in parts])

    written = []
    student_texts = student.front_end.texts(student_written)
    teacher_texts = student.front_end.texts(teacher_written)
    for b in range(len(clips)):
        written.append(
            {
                "student_text": student_texts[b],
                "teacher_text": teacher_texts[b],
                "student_ids": student_written.ids[b, : student_written.lens[b]].tolist(),
                "teacher_ids": teacher_written.ids[b, : teacher_written.lens[b]].tolist(),
            }
        )
    return rollout, values, written


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
    same_first = (student_topk[:, 0] == teacher_topk[:, 0]) & (student_topk[:, 0] >= 0)
    return {
        "vuss": n_union,
        **nested_vuss(student_topk, teacher_topk),
        "n_student": n_student,
        "n_teacher": n_teacher,
        "overlap_ratio": n_both / K,
        "jaccard": n_both / n_union.clamp(min=1),
        "top1": same_first.double(),
    }


def nested_ks(k):
    """1, 2, 4, … below k."""
    return [2**n for n in range((k - 1).bit_length())]


def nested_vuss(student_topk, teacher_topk):
    """VUSS at k = 1, 2, 4, … below K: {vuss_k: (N,) float64}. The best k ids of a list are its first k."""
    values = {}
    for k in nested_ks(student_topk.shape[1]):
        _, support_mask = union_support(student_topk[:, :k], teacher_topk[:, :k])
        values[f"vuss_{k}"] = support_mask.sum(dim=1).double()
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
    first_student, first_ids = q.max(dim=1)
    return {
        "mass_student": mass_q,
        "mass_teacher": mass_p,
        "advantage": advantage,
        "entropy_gap": (expectation(q, log_q) - expectation(p, log_p)).abs(),
        "kl_union": kl_union,
        "kl_full": expectation(p, log_p - log_q),
        "teacher_logp": log_p.gather(1, token_ids[:, None])[:, 0],
        "first_student": first_student,
        "first_teacher": p.gather(1, first_ids[:, None])[:, 0],
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


# ----------------------------------------------------------------------------------------------------------
# Simpler baselines: what a measure of overlap has to beat as a predictor
# ----------------------------------------------------------------------------------------------------------

COUNTS = ["units", "errors_student", "errors_teacher"]  # where the clip has a text
COUNTS += ["units_between", "errors_between", "tokens", "token_edits", "trigrams", "trigrams_equal"]


def count_baselines(clip, student_text, teacher_text, student_ids, teacher_ids):
    """The counts that the baselines of a clip are made of. They add up over clips.

    Texts are compared by the units of eval.py, in the clip's language (else what the script says of its text,
    or of the teacher's transcript). Counts against the reference are left out where the clip has no text.
    """
    text = teacher_text if clip.text is None else clip.text
    language = language_of({"language": clip.language, "text": text})
    counts = {}
    if clip.text is not None:
        student_counts = count_errors(clip.text, student_text, language)
        teacher_counts = count_errors(clip.text, teacher_text, language)
        counts["units"] = student_counts["units"]
        counts["errors_student"] = student_counts["errors"]
        counts["errors_teacher"] = teacher_counts["errors"]

    between = count_errors(teacher_text, student_text, language)
    counts["units_between"] = between["units"]
    counts["errors_between"] = between["errors"]

    counts["tokens"] = max(len(student_ids), len(teacher_ids))
    counts["token_edits"] = token_edits(student_ids, teacher_ids)

    student_trigrams = trigrams(student_text, language)
    teacher_trigrams = trigrams(teacher_text, language)
    counts["trigrams"] = student_trigrams.total() + teacher_trigrams.total()
    counts["trigrams_equal"] = (student_trigrams & teacher_trigrams).total()
    return counts


def baselines(counts):
    """The baselines from counts, of one clip or summed over clips; None where there is nothing to divide by.

    Errors are in %, error_gap in points, token_agreement and trigram_f1 are shares. Not in the paper.
    """
    error_student = ratio(counts, "errors_student", "units", 100)
    error_teacher = ratio(counts, "errors_teacher", "units", 100)
    token_error = ratio(counts, "token_edits", "tokens")
    return {
        "error_student": error_student,
        "error_teacher": error_teacher,
        "error_gap": None if error_student is None else error_student - error_teacher,
        "error_between": ratio(counts, "errors_between", "units_between", 100),
        "token_agreement": None if token_error is None else 1 - token_error,
        "trigram_f1": ratio(counts, "trigrams_equal", "trigrams", 2),
    }


def ratio(counts, numerator, denominator, factor=1):
    """factor · numerator / denominator, or None where the denominator is 0 or was not counted."""
    if not counts.get(denominator):
        return None
    return factor * counts[numerator] / counts[denominator]


def baselines_by_group(lines):
    """{group: {clips, baselines}} from the lines of clips.jsonl, groups in alphabetical order."""
    sums = collections.defaultdict(collections.Counter)
    for line in lines:
        counts = {name: line[name] for name in COUNTS if name in line}
        for group in clip_groups(line["set"], line["language"]):
            sums[group]["clips"] += 1
            sums[group].update(counts)
    return {group: {"clips": sums[group]["clips"], **baselines(sums[group])} for group in sorted(sums)}


def token_edits(a, b):
    """Levenshtein's distance of two lists of ids, each token as a word for jiwer."""
    if not a or not b:  # jiwer refuses an empty reference
        return len(a) + len(b)
    alignment = jiwer.process_words(" ".join(map(str, a)), " ".join(map(str, b)))
    return alignment.substitutions + alignment.deletions + alignment.insertions


def trigrams(text, language):
    """How often each three characters in a row stand in the normalised text; words keep a blank between."""
    separator = "" if language in CHARACTER_LANGUAGES else " "
    text = separator.join(normalize(text, language))
    return collections.Counter(text[i : i + 3] for i in range(len(text) - 2))


# ----------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------

POSITION_PANELS = {
    "overlap of sets": ["overlap_ratio", "jaccard", "top1"],
    "mass on I": ["mass_student", "mass_teacher"],
    "advantage, nats": ["advantage"],
    "entropy gap, nats": ["entropy_gap"],
    "KL, nats": ["kl_union", "kl_full"],
    "log p of the token, nats": ["teacher_logp"],
    "rows": ["positions"],
}
RUN_PANELS = {
    "loss": "loss of a row",
    "kl": "KL, nats",
    "vuss": "VUSS",
    "empty": "share of empty rollouts",
    "capped": "share of capped rollouts",
    "looping": "share of looping rollouts",
    "mean_tokens": "tokens of a rollout",
}


def new_figure(n_rows, n_columns):
    """A matplotlib figure with n_rows × n_columns axes, and these in a list."""
    try:
        from matplotlib.figure import Figure  # needs no screen; only pictures need the library
    except ImportError:
        raise InputError("pictures need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(4 * n_columns, 3 * n_rows), layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False).flatten().tolist()


def position_figure(tenths, k):
    """Means by tenth of the transcript, from its begin to its end: eight panels, VUSS / k first."""
    figure, axes = new_figure(2, 4)
    middles = (np.arange(TENTHS) + 0.5) / TENTHS

    def draw(axis, name, label, divisor=1):
        values = [row.get(name, np.nan) / divisor for row in tenths]  # no row in a tenth: a hole
        axis.plot(middles, values, marker=".", label=label)

    axes[0].set_title("VUSS / k: 1 = the same sets, 2 = disjoint")
    measures = set().union(*tenths)
    nested = sorted(int(name.removeprefix("vuss_")) for name in measures if name.startswith("vuss_"))
    for nested_k in nested:
        draw(axes[0], f"vuss_{nested_k}", f"k = {nested_k}", nested_k)
    draw(axes[0], "vuss", f"k = {k}", k)
    for axis, (title, names) in zip(axes[1:], POSITION_PANELS.items()):
        axis.set_title(title)
        for name in names:
            draw(axis, name, name)

    for axis in axes:
        axis.set_xlim(0, 1)
        axis.set_xlabel("relative position in the transcript")
        if len(axis.lines) > 1:
            axis.legend(fontsize="small")
    return figure


def confidence_histogram(values):
    """(bins, bins) number of rows by q and p of the student's likeliest id, both from 0 to 1."""
    first_student = values["first_student"].numpy()
    first_teacher = values["first_teacher"].numpy()
    unit = [[0, 1 + 1e-9], [0, 1 + 1e-9]]  # a softmax may round to a little above 1
    return np.histogram2d(first_student, first_teacher, CONFIDENCE_BINS, unit)[0]


def confidence_figure(histogram):
    """The histogram as a map, white where there is no row; above the diagonal the teacher is surer."""
    figure, (axis,) = new_figure(1, 1)
    shown = np.log10(np.where(histogram > 0, histogram, np.nan)).T  # the student's to the right
    image = axis.imshow(shown, origin="lower", extent=(0, 1, 0, 1))
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.5)
    axis.set_xlabel("student's probability of its likeliest token")
    axis.set_ylabel("teacher's of the same token")
    figure.colorbar(image, label="log₁₀ rows")
    return figure


def draw_runs(runs, out):
    """--runs: draws the metrics of several runs of opd.py over their steps as runs.png.

    Each line is the mean of the last 1/50 of the run's steps. Raises InputError for a folder that is no run.
    """
    check_out(out)
    figure, axes = new_figure(2, 4)
    for run in runs:
        lines = read_run(run)
        steps = [line["step"] for line in lines]
        width = max(len(lines) // 50, 1)
        label = f"{run} (mean of {width} steps)" if width > 1 else run
        for axis, (name, title) in zip(axes, RUN_PANELS.items()):
            values = np.array([line[name] for line in lines], dtype=float)
            smooth = np.convolve(values, np.full(width, 1 / width), mode="valid")
            axis.plot(steps[width - 1 :], smooth, label=label)
            axis.set_title(title)
            axis.set_xlabel("step")

    # The eighth panel names the runs.
    handles, labels = axes[0].get_legend_handles_labels()
    axes[-1].axis("off")
    axes[-1].legend(handles, labels, loc="center")
    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, "runs.png")
    figure.savefig(path)
    print(f"{len(runs)} run(s): {path}")


def draw_report(out, lines, compared):
    """Draws a finished run of opd.py as out/report.png. Without matplotlib, one line says so.

    lines: those of metrics.jsonl. compared: {set: summaries before and after}, errors in % with their 95 %
    intervals.
    """
    try:
        figure, (loss_axis, vuss_axis, health_axis, error_axis) = new_figure(1, 4)
    except InputError as error:
        print(f"no {os.path.join(out, 'report.png')}: {error}")
        return
    steps = [line["step"] for line in lines]
    nested = sorted(int(name.removeprefix("vuss_")) for name in lines[0] if name.startswith("vuss_"))
    panels = {
        loss_axis: ("nats a row", ["loss", "kl"]),
        vuss_axis: ("|union of both top-k|", [f"vuss_{k}" for k in nested] + ["vuss"]),
        health_axis: ("share of the transcripts", ["empty", "capped", "looping"]),
    }
    for axis, (title, names) in panels.items():
        for name in names:
            axis.plot(steps, [line[name] for line in lines], linewidth=1, label=name)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.legend(fontsize="small")

    for place, (before, after) in enumerate(compared.values()):
        for figures, shift, marker, colour in ((before, 0.15, "o", "grey"), (after, -0.15, "s", "C0")):
            if figures["value"] is not None:  # a set without reference units has no error
                error_axis.plot(figures["value"], place + shift, marker, color=colour)
            if figures["low"] is not None:
                error_axis.hlines(place + shift, figures["low"], figures["high"], color=colour)
    names = [name.replace("$", r"\$") for name in compared]  # matplotlib sets what is between $ as a formula
    error_axis.set_yticks(range(len(names)), names)
    error_axis.invert_yaxis()
    error_axis.set_title("error, %: before (grey), after; 95 %")
    figure.savefig(os.path.join(out, "report.png"), dpi=80)


def read_run(run):
    """The lines of a run's metrics.jsonl. Raises InputError where there is none of opd.py."""
    path = os.path.join(run, "metrics.jsonl")
    if not os.path.isfile(path):
        raise InputError(f"--runs {run}: no metrics.jsonl in it; give the --out folder of a run of opd.py")
    lines = read_lines(path)
    if not lines:
        raise InputError(f"--runs {run}: its metrics.jsonl has no step yet")
    for line in lines:
        missing = sorted(RUN_PANELS.keys() - line.keys())
        if missing:
            raise InputError(f"--runs {run}: its metrics.jsonl has no {missing[0]!r}; give a run of opd.py")
    return lines


# ----------------------------------------------------------------------------------------------------------
# Does a measure predict the gain?
# ----------------------------------------------------------------------------------------------------------

# I students are the rows and J teachers the columns of every table below. y is the mean over the test sets of
# ln(error after OPD).

DRAWS = 9_999  # permutations of a p-value
MIN_MODELS = 3  # students, and teachers, of a table that can be tested

# Student and teacher are close where these measures are low, or high. Close pairs should gain more.
LOW_IS_CLOSE = ["vuss", "vuss_1", "vuss_2", "vuss_4", "vuss_8", "vuss_16", "vuss_32"]
LOW_IS_CLOSE += ["entropy_gap", "kl_union", "kl_full", "error_between"]
HIGH_IS_CLOSE = ["overlap_ratio", "jaccard", "top1", "mass_student", "mass_teacher", "advantage"]
HIGH_IS_CLOSE += ["teacher_logp", "token_agreement", "trigram_f1"]

# The expected sign of r, unless the file states another. Lower VUSS, more gain, lower error after: r > 0.
EXPECTED_SIGN = {**dict.fromkeys(LOW_IS_CLOSE, 1), **dict.fromkeys(HIGH_IS_CLOSE, -1)}


def validate(path):
    """Prints whether the measures in a file of runs predict the gain. path: JSON, see docs/validate.md."""
    table = read_table(path)
    print_validation(table, analyse(table))


def analyse(table):
    """Finds out whether the measures of a table say more about the gain than the models' errors do.

    table: what `read_table` returns. Not in the paper. → a dict of plain numbers:

    - primary, r, p: the primary measure, its correlation with y, both double-centred, and p by permutation;
    - smallest_p: about the smallest p that a table of this size can have;
    - detectable_r: the true r that is found in about 80 % of tables of this size;
    - noise_ceiling: the largest r that the noise between seeds allows, None where it is not known;
    - measures: {name: the figures of `associations`, expected_sign, regret, and the figures of `predictions`
      for new_student and new_teacher};
    - regret_lowest_error: the regret of choosing the teacher with the lowest error;
    - pooled_spearman: a warning, see there;
    - verdict: a sentence.

    A table with fewer than three students or teachers has the verdict only.
    """
    n_students, n_teachers = table["y"].shape
    if min(n_students, n_teachers) < MIN_MODELS:
        size = f"{n_students} student(s) × {n_teachers} teacher(s)"
        return {"verdict": f"no test: {size}; a test needs {MIN_MODELS} × {MIN_MODELS} or more"}

    primary = table["primary"]
    orders = draw_orders(DRAWS, n_students, n_teachers)
    measures = associations(table, orders)
    for name, measure in table["measures"].items():
        sign = table["expected_sign"].get(name)
        measures[name]["expected_sign"] = sign
        measures[name]["regret"] = None if sign is None else regret(table["y"], sign * measure)
        measures[name]["new_student"] = predictions(table, measure, axis=0)
        measures[name]["new_teacher"] = predictions(table, measure, axis=1)

    result = {
        "primary": primary,
        "r": measures[primary]["r"],
        "p": measures[primary]["r_p"],
        "smallest_p": smallest_p(n_students, n_teachers),
        "detectable_r": detectable_r(n_students, n_teachers),
        "noise_ceiling": noise_ceiling(table["y"], table["seed_variance"]),
        "measures": measures,
        "regret_lowest_error": regret(table["y"], np.tile(table["teacher_errors"], (n_students, 1))),
        "pooled_spearman": pooled_spearman(table["measures"][primary], table["y"])[0],
    }
    result["verdict"] = verdict(result, n_students, n_teachers)
    return result


def verdict(result, n_students, n_teachers):
    """The sentence that the figures of `analyse` allow.

    It claims information only if the primary test has p < .05 and the improvement for new teachers is above 0
    with its whole interval.
    """
    name = result["primary"].upper() if result["primary"] == "vuss" else result["primary"]
    primary = result["measures"][result["primary"]]
    if result["p"] is None:
        return f"no test: {name} or the error after has nothing that belongs to a pair of models"
    if result["p"] < 0.05 and primary["new_teacher"]["low"] > 0:
        is_expected = result["r"] * primary["expected_sign"] > 0
        caveat = "" if is_expected else ", but with the sign opposite to the expected one"
        return f"{name} adds information beyond error rates{caveat}"

    reason = f"primary p {result['p']:.4f}"
    if result["p"] < 0.05:
        reason += ", but the improvement for new teachers may be 0"
    size = f"{n_students} × {n_teachers} cells"
    power = f"by {size} the primary test detects a true r of {result['detectable_r']:.2f} with 80 % power"
    return f"no evidence at this size ({reason}); {power}"


# ---- association -------------------------------------------------------------------------------------------


def associations(table, orders):
    """Correlates each measure with y over the table.

    orders: of `draw_orders`. → {measure: {r, r_p, r_p_holm, and so on for the others}}:

    - r: of the double-centred tables. Holm's p is over the measures but the primary, which stands alone.
    - partial: Spearman's, given the student's error before and the teacher's error.
    - tau_teachers: mean over the students of Kendall's τ over the teachers: "which teacher?"
    - tau_students: mean over the teachers of Kendall's τ over the students: "is this student ready?"

    Each p is two-sided, by the same permutations of the measure's rows and columns (for `partial`, of its
    residuals), so that cells of one model are not taken for independent ones. Values and p are None where
    nothing is left to correlate.
    """
    y = table["y"]
    row_orders, column_orders = orders
    swapped_orders = (column_orders, row_orders)
    y_centred = double_centre(y)
    y_residuals = rank_residuals(y, table["before"], table["teacher_errors"])
    figures = {}
    for name, measure in table["measures"].items():
        residuals = rank_residuals(measure, table["before"], table["teacher_errors"])
        tests = {
            "r": permutation_test(correlation, double_centre(measure), y_centred, orders),
            "partial": permutation_test(correlation, residuals, y_residuals, orders),
            "tau_teachers": permutation_test(mean_kendall, measure, y, orders),
            "tau_students": permutation_test(mean_kendall, measure.T, y.T, swapped_orders),
        }
        figures[name] = {}
        for key, (value, p) in tests.items():
            is_defined = bool(np.isfinite(value))
            figures[name][key] = float(value) if is_defined else None
            figures[name][f"{key}_p"] = float(p) if is_defined else None

    for key in ("r", "partial", "tau_teachers", "tau_students"):
        p_values = []
        for name in figures:
            is_secondary = key != "r" or name != table["primary"]
            p_values.append(figures[name][f"{key}_p"] if is_secondary else None)
        for name, adjusted in zip(figures, holm(p_values)):
            figures[name][f"{key}_p_holm"] = adjusted
    return figures


def double_centre(table):
    """m_ij − m̄_i· − m̄_·j + m̄_··, which removes all that belongs to one model alone. (…, I, J)."""
    row_means = table.mean(axis=-1, keepdims=True)
    column_means = table.mean(axis=-2, keepdims=True)
    centred = table - row_means - column_means + table.mean(axis=(-2, -1), keepdims=True)
    return without_rounding(centred, table)


def without_rounding(rest, table):
    """`rest` with 0 where it is nothing but the rounding of `table`. Both (…, I, J)."""
    scale = np.abs(table).max(axis=(-2, -1), keepdims=True)
    return np.where(np.abs(rest) > 1e-10 * scale, rest, 0.0)


def correlation(a, b):
    """Σ ab / √(Σa² Σb²) of centred tables (…, I, J) → (…); NaN where one of them is 0."""
    products = (a * b).sum(axis=(-2, -1))
    norms = np.sqrt((a**2).sum(axis=(-2, -1)) * (b**2).sum(axis=(-2, -1)))
    return np.divide(products, norms, out=np.full_like(products, np.nan), where=norms > 0)


def mean_kendall(a, b):
    """Kendall's τ-b between a row of `a` and the same row of `b`, as the mean over the rows.

    (…, I, J) → (…). A row that orders nothing, because all of it is tied, counts as τ = 0.
    """
    products = pair_signs(a) * pair_signs(b)  # (…, I, J, J)
    return products.sum(axis=(-2, -1)).mean(axis=-1)


def pair_signs(table):
    """Signs of the differences between the values of each row, with norm 1. (…, I, J) → (…, I, J, J)."""
    signs = np.sign(table[..., :, None] - table[..., None, :])
    n_untied = np.abs(signs).sum(axis=(-2, -1), keepdims=True)
    return signs / np.sqrt(np.maximum(n_untied, 1))


def rank_residuals(table, before, teacher_errors):
    """Ranks of a table's cells without their linear part in the ranks of both errors.

    table (I, J), before (I,), teacher_errors (J,) → (I, J). The correlation of two such tables is the partial
    Spearman correlation given the student's error before and the teacher's error.
    """
    n_students, n_teachers = table.shape
    ranks = scipy.stats.rankdata(table)
    before_ranks = scipy.stats.rankdata(np.repeat(before, n_teachers))
    teacher_ranks = scipy.stats.rankdata(np.tile(teacher_errors, n_students))
    columns = np.stack([np.ones_like(ranks), before_ranks, teacher_ranks], axis=1)
    coefficients = np.linalg.lstsq(columns, ranks, rcond=None)[0]
    residuals = ranks - columns @ coefficients
    return without_rounding(residuals.reshape(table.shape), ranks.reshape(table.shape))


def draw_orders(n_draws, n_rows, n_columns, seed=0):
    """Random orders of the rows (n_draws, n_rows) and of the columns (n_draws, n_columns)."""
    rng = np.random.default_rng(seed)
    row_orders = rng.permuted(np.tile(np.arange(n_rows), (n_draws, 1)), axis=1)
    column_orders = rng.permuted(np.tile(np.arange(n_columns), (n_draws, 1)), axis=1)
    return row_orders, column_orders


def permutation_test(statistic, measure, y, orders, chunk=500):
    """statistic(measure, y) and its two-sided p when rows and columns of `measure` are put in other orders.

    measure, y: (…, I, J), one table or many; orders: (D, I) and (D, J) → two arrays (…).
    p = (count + 1) / (D + 1); count: the orders whose |statistic| is at least that of the table itself.
    """
    value = statistic(measure, y)
    reached = np.abs(value) - 1e-9  # the table's own order comes out again, in other roundings
    row_orders, column_orders = orders
    count = np.zeros(value.shape)
    for start in range(0, len(row_orders), chunk):
        rows = row_orders[start : start + chunk, :, None]
        columns = column_orders[start : start + chunk, None, :]
        permuted = measure[..., rows, columns]  # (…, chunk, I, J)
        drawn = statistic(permuted, y[..., None, :, :])  # (…, chunk)
        count += (np.abs(drawn) >= reached[..., None]).sum(axis=-1)
    return value, (count + 1) / (len(row_orders) + 1)


def smallest_p(n_students, n_teachers):
    """About the smallest p that can be: of I! J! orders one is the table's own, and a p has DRAWS orders."""
    n_orders = math.factorial(n_students) * math.factorial(n_teachers)
    return max(1 / n_orders, 1 / (DRAWS + 1))


def detectable_r(n_students, n_teachers):
    """The true r that the primary test finds at .05 in 80 % of tables, by an approximation.

    tanh((z_.975 + z_.80) / √(n − 3)) is Fisher's for n independent pairs. Double-centring leaves
    (I − 1)(J − 1) degrees of freedom, those of n = (I − 1)(J − 1) + 1 pairs. In simulations the power at this
    r is .81 to .84 from 3 × 4 to 12 × 8 cells, and .71 at 3 × 3, where there are only 36 orders.
    """
    n = (n_students - 1) * (n_teachers - 1) + 1
    z = scipy.stats.norm.ppf(0.975) + scipy.stats.norm.ppf(0.80)
    return float(np.tanh(z / math.sqrt(n - 3)))


def noise_ceiling(y, seed_variance):
    """√(1 − s²_seed (I−1)(J−1)/(IJ) / s²(ỹ)), the r of a perfect measure; None where it is not known.

    seed_variance: of y between seeds of one cell, or None. s²(ỹ) is the mean of ỹ² over the cells.
    """
    n_students, n_teachers = y.shape
    variance = (double_centre(y) ** 2).mean()
    if seed_variance is None or variance == 0:
        return None
    noise = seed_variance * (n_students - 1) * (n_teachers - 1) / (n_students * n_teachers)
    share = 1 - noise / variance
    return float(math.sqrt(share)) if share > 0 else None


def pooled_spearman(measure, y):
    """Spearman's correlation over all cells and its usual p, which takes cells for independent.

    It validates nothing: strong models have both more overlap and fewer errors. None, None where one of the
    tables is constant.
    """
    if np.ptp(measure) == 0 or np.ptp(y) == 0:
        return None, None
    outcome = scipy.stats.spearmanr(measure.ravel(), y.ravel())
    return float(outcome.statistic), float(outcome.pvalue)


# ---- prediction --------------------------------------------------------------------------------------------


def predictions(table, measure, axis):
    """How much a measure improves the prediction of y for a student (axis 0) or teacher (1) not seen before.

    A ridge predicts y from both errors, and again from both errors and the measure. → error_without and error
    (root mean squares, in ln), improvement (their difference), and low and high of its 95 % interval, by a
    jackknife over the students or teachers left out.
    """
    y = table["y"]
    groups = np.indices(y.shape)[axis].ravel()  # (IJ,)
    before = np.broadcast_to(table["before"][:, None], y.shape).ravel()
    teacher_errors = np.broadcast_to(table["teacher_errors"], y.shape).ravel()
    columns = np.stack([before, teacher_errors, measure.ravel()], axis=1)  # (IJ, 3)
    squares_without = (left_out_ridge(columns[:, :2], y.ravel(), groups) - y.ravel()) ** 2
    squares_with = (left_out_ridge(columns, y.ravel(), groups) - y.ravel()) ** 2

    improvement, low, high = jackknife_improvement(squares_without, squares_with, groups)
    return {
        "error_without": math.sqrt(squares_without.mean()),
        "error": math.sqrt(squares_with.mean()),
        "improvement": improvement,
        "low": low,
        "high": high,
    }


def left_out_ridge(columns, y, groups, penalty=1.0):
    """Predicts the y of each cell by a ridge that has not seen the cell's group.

    columns (n, c); y, groups (n,) → (n,). The ridge minimises Σ (y − ȳ − Zβ)² + penalty · Σ β². Z is the
    columns, standardised over the cells that are seen; a column that is constant there is left out.
    """
    predicted = np.empty_like(y)
    for group in np.unique(groups):
        is_seen = groups != group
        centre = columns[is_seen].mean(axis=0)
        spread = columns[is_seen].std(axis=0)
        spread = np.where(spread > 1e-10 * np.abs(centre), spread, np.inf)
        Z = (columns - centre) / spread
        seen = Z[is_seen]
        mean = y[is_seen].mean()
        squares = seen.T @ seen + penalty * np.eye(columns.shape[1])
        beta = np.linalg.solve(squares, seen.T @ (y[is_seen] - mean))
        predicted[~is_seen] = mean + Z[~is_seen] @ beta
    return predicted


def jackknife_improvement(squares_without, squares_with, groups):
    """θ = root mean square without the measure − that with it, and its 95 % interval θ ± t_.975(G − 1) SE.

    The jackknife of eval.py, with the G groups of cells as its clusters. The predictions stay what they were.
    All arguments (n,) → θ, low, high.
    """

    def improvement(sums):  # (..., 1, 3): sums of squares without and with the measure, number of cells
        root_mean_squares = np.sqrt(sums[..., 0, :2] / sums[..., 0, 2:])
        return root_mean_squares[..., 0] - root_mean_squares[..., 1]

    columns = np.stack([squares_without, squares_with, np.ones(len(groups))], axis=1)  # (n, 3)
    figures = estimate(cluster_table([groups.tolist()], [columns]), improvement)
    return figures.value, figures.low, figures.high


def regret(y, score):
    """ln(error with the teacher of the lowest score / error with the best teacher), mean over the students.

    y, score: (I, J). Where several teachers share the lowest score, it is their mean.
    """
    is_chosen = score == score.min(axis=1, keepdims=True)
    chosen = (y * is_chosen).sum(axis=1) / is_chosen.sum(axis=1)
    return float((chosen - y.min(axis=1)).mean())


# ---- the table of runs ------------------------------------------------------------------------------------


def read_table(path):
    """A file of runs as tables, one run a cell: that of the lowest seed which has a run in every cell.

    → a dict:

    - students (I names), teachers (J names), sets (names), seed;
    - primary (a measure), expected_sign {measure: 1 or −1};
    - measures {name: (I, J)}, y (I, J);
    - before (I,) and teacher_errors (J,), like y means over the sets of ln(error %);
    - n_further: runs of other seeds, and seed_variance: of y within a cell, None without such runs.

    Raises InputError where the file has a defect, a run is missing or there twice, or an error is 0.
    """
    content = read_content(path)
    cells = content["cells"]
    runs = {}  # (student, teacher) → {seed: cell}
    for number, cell in enumerate(cells, 1):
        where = f"{path}: cell {number}"
        check_cell(cell, where)
        check_agreement(cell, where, cells)
        by_seed = runs.setdefault((cell["student"], cell["teacher"]), {})
        if cell["seed"] in by_seed:
            raise InputError(f"{where}: {run_name(cell)} is there twice; leave one out")
        by_seed[cell["seed"]] = cell

    # Sorted, so that the drawn permutations, and with them p, do not depend on the order of the cells.
    students = sorted({student for student, _ in runs})
    teachers = sorted({teacher for _, teacher in runs})
    seed = common_seed(path, students, teachers, runs)
    names = list(cells[0]["measures"])
    measures = {name: np.empty((len(students), len(teachers))) for name in names}
    y = np.empty((len(students), len(teachers)))
    before = np.empty(len(students))
    teacher_errors = np.empty(len(teachers))
    for i, student in enumerate(students):
        for j, teacher in enumerate(teachers):
            cell = runs[student, teacher][seed]
            y[i, j] = log_error(cell["after"])
            before[i] = log_error(cell["before"])
            teacher_errors[j] = log_error(cell["teacher_errors"])
            for name in names:
                measures[name][i, j] = cell["measures"][name]

    primary, expected_sign = declared(path, content, names)
    return {
        "students": students,
        "teachers": teachers,
        "sets": sorted(cells[0]["after"]),
        "primary": primary,
        "expected_sign": expected_sign,
        "seed": seed,
        "n_further": len(cells) - y.size,
        "measures": measures,
        "y": y,
        "before": before,
        "teacher_errors": teacher_errors,
        "seed_variance": pooled_variance(runs.values()),
    }


def log_error(errors):
    """Mean over the sets of ln(error). errors: {set: %}."""
    return sum(math.log(value) for value in errors.values()) / len(errors)


def pooled_variance(cells):
    """Variance of y between the seeds of a cell, pooled over cells; None without a second seed.

    cells: {seed: run} of each cell.
    """
    squares = 0.0
    degrees = 0
    for by_seed in cells:
        values = np.array([log_error(cell["after"]) for cell in by_seed.values()])
        squares += float(((values - values.mean()) ** 2).sum())
        degrees += len(values) - 1
    return squares / degrees if degrees else None


def common_seed(path, students, teachers, runs):
    """The lowest seed that has a run in every cell: the seed draws the order of the clips."""
    for student in students:
        for teacher in teachers:
            if (student, teacher) not in runs:
                pair = f"student {student} with teacher {teacher}"
                raise InputError(f"{path}: no run of {pair}; add it, or leave one of the two out everywhere")
    seeds = set.intersection(*[set(by_seed) for by_seed in runs.values()])
    if not seeds:
        remedy = "run one seed in all of them, so that the order of the clips is the same"
        raise InputError(f"{path}: no seed has a run in every cell; {remedy}")
    return min(seeds)


def declared(path, content, names):
    """The primary measure and {measure: expected sign}: those of the file before those of EXPECTED_SIGN."""
    primary = content.get("primary", "vuss")
    if primary not in names:
        raise InputError(f'{path}: the primary measure "{primary}" is not in "measures"; name one of them')
    stated = content.get("expected_sign", {})
    is_valid = isinstance(stated, dict) and set(stated) <= set(names)
    if not is_valid or any(sign not in (1, -1) for sign in stated.values()):
        remedy = 'give 1 or -1 for measures of the table, as in {"vuss": 1}'
        raise InputError(f'{path}: "expected_sign" is {json.dumps(stated)[:60]}; {remedy}')
    expected_sign = {**EXPECTED_SIGN, **stated}
    if primary not in expected_sign:
        remedy = "state 1 (lower, then lower error after) or -1 (higher)"
        raise InputError(f'{path}: "expected_sign" has no sign for the primary measure "{primary}"; {remedy}')
    return primary, expected_sign


def read_content(path):
    """The object of a JSON file that has a list of cells."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the path of a table (docs/validate.md)") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); give one object (docs/validate.md)") from None
    cells = content.get("cells") if isinstance(content, dict) else None
    if not isinstance(cells, list) or not cells:
        raise InputError(f'{path}: has no list "cells"; give one object with a run a cell (docs/validate.md)')
    return content


def check_cell(cell, where):
    """Raises InputError unless a cell has all keys, names, a seed, and finite numbers, errors above 0."""
    if not isinstance(cell, dict):
        raise InputError(f"{where}: expected an object, found {type(cell).__name__}; see docs/validate.md")
    kinds = {"student": str, "teacher": str, "seed": int}
    kinds.update(dict.fromkeys(("measures", "before", "teacher_errors", "after"), dict))
    for key, kind in kinds.items():
        if key not in cell:
            raise InputError(f'{where}: key "{key}" is missing; every cell needs it')
        is_empty = cell[key] in ("", {})
        if type(cell[key]) is not kind or is_empty:
            expected = {str: "a name", int: "a whole number", dict: "an object with numbers"}[kind]
            raise InputError(f'{where}: "{key}" must be {expected}, found {json.dumps(cell[key])[:60]}')

    for key in ("measures", "before", "teacher_errors", "after"):
        for name, value in cell[key].items():
            shown = f'{where}: "{key}" of {name} is {json.dumps(value)[:60]}'
            if type(value) not in (int, float) or not math.isfinite(value):
                raise InputError(f"{shown}; give a finite number")
            if key != "measures" and value <= 0:
                remedy = "leave the set out everywhere, or take a larger one"
                raise InputError(f"{shown}, which has no logarithm; {remedy}")


def check_agreement(cell, where, cells):
    """Raises InputError unless a cell has the measures and sets of the first, and each model one error."""
    wanted = {"measures": set(cells[0]["measures"])}
    wanted.update(dict.fromkeys(("before", "teacher_errors", "after"), set(cells[0]["after"])))
    for key, names in wanted.items():
        odd = sorted(names ^ set(cell[key]))
        if odd:
            defect = "lacks" if odd[0] in names else "alone has"
            raise InputError(f'{where}: "{key}" {defect} {odd[0]}; all cells need the same measures and sets')

    for model, key in (("student", "before"), ("teacher", "teacher_errors")):
        first = next(other for other in cells if other[model] == cell[model])
        if cell[key] != first[key]:
            defect = f'"{key}" of {model} {cell[model]} differs between cells'
            raise InputError(f"{where}: {defect}; it is measured once, give it everywhere alike")


def run_name(cell):
    return f"student {cell['student']} with teacher {cell['teacher']}, seed {cell['seed']}"


# ---- the report --------------------------------------------------------------------------------------------


def print_validation(table, result):
    """Prints the verdict of `analyse` and the figures behind it."""
    n_students, n_teachers = table["y"].shape
    runs = f"one run each (seed {table['seed']}), {table['n_further']} of further seeds"
    tqdm.write(f"{n_students} students × {n_teachers} teachers, {runs}; sets: {', '.join(table['sets'])}")
    if "measures" not in result:
        tqdm.write(result["verdict"])
        return

    primary = result["primary"]
    if result["measures"][primary]["expected_sign"] > 0:
        expectation_text = f"r > 0 (lower {primary}, more gain, lower error after)"
    else:
        expectation_text = f"r < 0 (higher {primary}, more gain, lower error after)"
    r = cell_text(result["r"])
    p = cell_text(p_text(result["p"]))
    tqdm.write(f"primary: {primary}, expected {expectation_text}")
    tqdm.write(f"r {r}, p {p} (the smallest possible p is about {p_text(result['smallest_p'])})")
    if result["noise_ceiling"] is None:
        tqdm.write("noise ceiling of r: not known (no further seeds, or they differ as much as the cells)")
    else:
        tqdm.write(f"noise ceiling of r: {result['noise_ceiling']:.2f}")

    print_associations(result)
    print_predictions(result)
    rho = cell_text(result["pooled_spearman"])
    tqdm.write(f"\npooled Spearman of {primary} over all cells: {rho}. It validates nothing.")
    tqdm.write(f"verdict: {result['verdict']}")


def print_associations(result):
    """Prints a row for each measure: its correlations with y, each with its p."""
    primary = result["primary"]
    rows = []
    for name, figures in result["measures"].items():
        row = [name, sign_text(figures["expected_sign"])]
        for key in ("r", "partial", "tau_teachers", "tau_students"):
            is_primary_test = key == "r" and name == primary
            p = figures["r_p"] if is_primary_test else figures[f"{key}_p_holm"]
            row += [figures[key], p_text(p)]
        rows.append(row)
    tqdm.write(f"\ncorrelations with ln(error after); p by permutation, Holm's except for r of {primary}")
    print_table(rows, ["measure", "sign", "r", "p", "partial", "p", "τ teachers", "p", "τ students", "p"])


def print_predictions(result):
    """Prints a row for the errors alone and for each measure: errors of prediction, and the regret."""
    primary = result["measures"][result["primary"]]
    row = ["errors only"]
    for key in ("new_student", "new_teacher"):
        row += [f"{primary[key]['error_without']:.4f}", None, None]
    rows = [[*row, percent_text(result["regret_lowest_error"])]]
    for name, figures in result["measures"].items():
        row = [name]
        for key in ("new_student", "new_teacher"):
            own = figures[key]
            interval = f"{own['low']:.4f} … {own['high']:.4f}"
            row += [f"{own['error']:.4f}", f"{own['improvement']:.4f}", interval]
        rows.append([*row, percent_text(figures["regret"])])
    tqdm.write(
        "\nerror of a prediction of ln(error after) for a new model, and regret of choosing the teacher"
    )
    columns = ["better by", "95 %"]
    print_table(rows, ["measure", "new student", *columns, "new teacher", *columns, "regret %"])


def sign_text(sign):
    return {1: "+", -1: "−"}.get(sign)


def percent_text(log_ratio):
    return None if log_ratio is None else f"{percent(log_ratio):.1f}"


if __name__ == "__main__":
    run_script(main, parse_args())
