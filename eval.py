"""Decode manifests greedily and score them: WER for words, CER for characters, with 95 % intervals.

    python eval.py --model example/teacher --data example/en-clean.jsonl example/zh-read.jsonl --out runs/t
    torchrun --nproc_per_node=8 eval.py --model DIR --data test.jsonl --out runs/x    # clips split over ranks
    python eval.py --model DIR --data clip.flac                                       # prints the transcript
    python eval.py --score runs/x/*.jsonl --normalizer paper                          # rescores, no model
    python eval.py --compare runs/x runs/y                                            # paired, file by file
    python eval.py --seeds runs/a0 runs/a1 --against runs/b0 runs/b1                  # recipes, several runs

--model writes OUT/<stem>.jsonl (the manifest's fields plus hyp, stopped, errors, units, substitutions,
deletions, insertions) and OUT/summary.json, and prints a table with a row for each set. A hypothesis that the
length cap cut has "stopped": false. A result file is a manifest: `sft.py --text-field hyp` learns from it.

Intervals come from leaving out one cluster of clips at a time: one speaker, or one recording (--cluster).
--json stores the figures; docs/scores.md defines every figure.

A clip that cannot be decoded has "error" in place of hyp, is counted as failed, and makes the exit status 1.
Decoding takes about its real-time factor (RTF in the table) times the audio; scoring takes seconds.
"""

import dataclasses
import functools
import importlib.metadata
import math
import os
import re
import sys
import time
import unicodedata
import zlib

import jiwer
import numpy as np
import scipy.special
from tqdm import tqdm
from whisper_normalizer.english import EnglishTextNormalizer

from data import (
    InputError,
    add_lines,
    argument_parser,
    at_least,
    check_out,
    clip_from_file,
    collate,
    cut_micro_batches,
    gather,
    language_code,
    load_usable,
    rank_and_world,
    read_json,
    read_manifest,
    run_script,
    script_language,
    setup_distributed,
    write_json,
)
from model import TOKENS_PER_SECOND, SpeechLM, check_languages

MAX_NEW_TOKENS = 800

COUNTS = ("errors", "units", "substitutions", "deletions", "insertions")
RESULT_KEYS = ("hyp", "stopped", "error", *COUNTS)  # what a result line adds to the manifest's fields


def parse_args(argv=None):
    parser = argument_parser("eval.py", __doc__)
    add = parser.add_argument

    # task
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--model", help="student or teacher, folder or hub name: decode and score --data")
    task.add_argument("--score", nargs="+", metavar="hyps.jsonl", help="score result files, without a model")
    task.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="two result files of the same clips, or two folders of them",
    )
    task.add_argument(
        "--seeds", nargs="+", metavar="RUN", help="run or result folders of recipe A, one for each seed"
    )
    add("--against", nargs="+", default=[], metavar="RUN", help="those of recipe B, with --seeds")
    add("--data", nargs="+", default=[], help="manifests (.jsonl) or audio files, with --model")
    add("--out", help="new folder for result files and summary.json; without it results are only printed")

    # decoding
    add("--language", help="language in the prompt of clips whose line names none (scores are by the line)")
    add("--no-context", action="store_true", help="prompts do not give a line's context")
    add("--batch-seconds", type=at_least(0.01), default=600.0, help="seconds of audio decoded at once")
    add("--max-seconds", type=at_least(0.01), default=30.0, help="longest clip accepted; longer is an error")
    add("--max-new-tokens", type=at_least(1, int), default=MAX_NEW_TOKENS, help="cap on a transcript")
    add(
        "--tokens-per-second",
        type=at_least(0),
        default=TOKENS_PER_SECOND,
        help="cap by the audio: this × seconds + 16 tokens; 0 = off",
    )

    # scoring
    add("--normalizer", choices=["default", "paper"], default="default", help="by language, or the paper's")
    add("--simplify", action="store_true", help="score traditional Chinese as simplified, both sides")
    add(
        "--cluster",
        metavar="KEY",
        help="manifest key of clips that are not independent; default: speaker, else recording",
    )
    add("--json", metavar="FILE", help="store the figures that are printed")

    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data go together")
    if (args.language or args.no_context) and not args.model:
        parser.error("--language and --no-context are for decoding, with --model")
    if bool(args.seeds) != bool(args.against):
        parser.error("--seeds and --against go together")
    if (args.compare or args.seeds) and args.out:
        parser.error("--out is for --model and --score; a comparison is stored by --json")
    return args


def main(args):
    rank, world, device = setup_distributed()
    if args.out:
        check_out(args.out)
    if args.json and not os.path.isdir(os.path.dirname(os.path.abspath(args.json))):
        raise InputError(f"--json {args.json}: no such folder; make it first")
    if args.json and os.path.isdir(args.json):
        raise InputError(f"--json {args.json} is a folder; give the name of a file")
    if args.model:
        decode_and_score(args, rank, world, device)
    elif rank > 0:
        return  # one process is enough for result files
    elif args.score:
        score_files(args)
    elif args.compare:
        compare_results(args)
    else:
        comparison = compare_seeds(args.seeds, args.against, args.normalizer, args.simplify, args.cluster)
        print_seeds(comparison)
        store(args, comparison)


def store(args, figures):
    """Writes the figures to --json, if it is given."""
    if args.json:
        write_json(args.json, figures)


def decode_and_score(args, rank, world, device):
    """--model: decodes and scores --data on all ranks."""
    # ---- data and model --------------------------------------------------------------------------------
    sets = read_sets(args.data, args.max_seconds)
    for clips in sets.values():
        clusters_of(clips, args.cluster)  # a line without its key shows before the model is loaded
    default_language = language_code(args.language) if args.language else None
    model = SpeechLM.from_pretrained(args.model).to(device).eval()
    check_languages(languages_of(sets), default_language, model)
    decoding = {
        "batch_seconds": args.batch_seconds,
        "default_language": default_language,
        "with_context": not args.no_context,
        "max_new_tokens": args.max_new_tokens,
        "tokens_per_second": args.tokens_per_second,
    }

    # ---- warm-up ---------------------------------------------------------------------------------------
    # What happens once, such as loading kernels, does not count in the real-time factor.
    first_clip = next(iter(sets.values()))[0]
    transcribe(model, [first_clip] * world, device, label="warm-up", **decoding)

    # ---- decode and score ------------------------------------------------------------------------------
    summaries = evaluate(
        model,
        sets,
        device,
        decoding,
        args.out,
        style=args.normalizer,
        simplify=args.simplify,
        cluster=args.cluster,
        strict=False,
    )

    # ---- report ----------------------------------------------------------------------------------------
    if rank > 0:
        return  # also where a clip failed: torchrun would stop rank 0 before it has printed
    n_scored = sum(summary["scored"] for summary in summaries.values())
    if args.out or n_scored:
        print_summaries(summaries)
        where = f"; results in {args.out}" if args.out else ""
        print(f"{world} process(es) on {device.type}{where}", flush=True)
    store(args, summaries)
    stop_if_failed(summaries)


def score_files(args):
    """--score: scores result files again."""
    summaries = {}
    for path in args.score:
        stem = stem_of(path)
        if stem in summaries:
            raise InputError(f"--score: two files have the stem {stem!r}; score them one by one")
        results = score(read_results(path, args.cluster), args.normalizer, args.simplify)
        clusters = [result["cluster"] for result in results]
        summaries[stem] = summarize(results, clusters, args.normalizer, args.simplify)
    if args.out:
        os.makedirs(args.out, exist_ok=True)
        write_json(os.path.join(args.out, "summary.json"), summaries)
    print_summaries(summaries)
    store(args, summaries)
    stop_if_failed(summaries)


def stop_if_failed(summaries):
    """Ends with status 1 where a clip could not be decoded."""
    n_failed = sum(summary["failed"] for summary in summaries.values())
    if n_failed:
        print(f"eval.py: {n_failed} clip(s) not decoded", file=sys.stderr)
        sys.exit(1)


def compare_results(args):
    """--compare: the difference of two result files, or of the files of two folders."""
    path_a, path_b = args.compare
    if os.path.isdir(path_a) != os.path.isdir(path_b):
        raise InputError(
            f"--compare {path_a} {path_b}: one is a folder, the other is not; give two of a kind"
        )
    if os.path.isdir(path_a):
        comparison = compare_folders(path_a, path_b, args.normalizer, args.simplify, args.cluster)
        store(args, comparison)
    else:
        figures = pair(count_set([path_a, path_b], args.normalizer, args.simplify, args.cluster))
        comparison = {"sets": {stem_of(path_a): figures}}
        store(args, figures)
    figures = dict(comparison["sets"])
    print_differences(figures)
    if len(figures) > 1:
        figures["macro"] = comparison["macro"]
    print_clusters(figures)
    print_comparison(comparison)


# ----------------------------------------------------------------------------------------------------------
# Decoding
# ----------------------------------------------------------------------------------------------------------


def read_sets(paths, max_seconds):
    """{stem: [Clip]} of manifests (.jsonl, .json) or audio files.

    Raises InputError where two paths have one stem, and for a clip over max_seconds.
    """
    sets = {}
    for path in paths:
        stem = stem_of(path)
        if stem in sets:
            raise InputError(f"two data sets have the stem {stem!r}, and so would their results; rename one")
        sets[stem] = read_manifest(path) if path.endswith((".jsonl", ".json")) else [clip_from_file(path)]
        for clip in sets[stem]:
            if clip.duration > max_seconds:
                too_long = f"{clip.duration:.1f} s, over --max-seconds {max_seconds:g}"
                remedy = "split the clip (docs/data.md, Long recordings), or raise it"
                raise InputError(f"{clip.where}: {too_long}; {remedy}")
    return sets


def stem_of(path):
    return os.path.splitext(os.path.basename(path))[0]


def languages_of(sets):
    """{code, or None where a line names none: first clip with it} of all sets, for `check_languages`."""
    languages = {}
    for clips in sets.values():
        for clip in clips:
            languages.setdefault(clip.language, clip)
    return languages


def evaluate(
    model,
    sets,
    device,
    decoding,
    out=None,
    *,
    style="default",
    simplify=False,
    cluster=None,
    strict=True,
):
    """Decodes and scores `sets` {stem: [Clip]} on all ranks. → {stem: summary}, see `summarize`.

    Rank 0 writes out/<stem>.jsonl and out/summary.json. Without `out`, the transcripts of a set that has no
    text to compare with are printed. Where a clip cannot be decoded, strict raises InputError; else its
    result line has "error", and it is counted and printed on stderr. cluster: the key of `clusters_of`.
    """
    rank, _ = rank_and_world()
    clusters = {stem: clusters_of(clips, cluster) for stem, clips in sets.items()}
    summaries = {}
    for stem, clips in sets.items():
        start = time.perf_counter()
        answers = transcribe(model, clips, device, label=stem, **decoding)
        seconds = time.perf_counter() - start

        results = [result_line(clip, answer, out) for clip, answer in zip(clips, answers)]
        failed = [result for result in results if "error" in result]
        if failed and strict:
            raise InputError(failed[0]["error"])
        results = score(results, style, simplify)
        summaries[stem] = summarize(results, clusters[stem], style, simplify, seconds)

        if rank == 0 and out:
            os.makedirs(out, exist_ok=True)
            add_lines(os.path.join(out, f"{stem}.jsonl"), results, mode="w")
        elif rank == 0 and summaries[stem]["scored"] == 0:
            print_transcripts(results, named=len(sets) > 1 or len(results) > 1)
        if rank == 0:
            for result in failed:
                print(f"eval.py: not decoded: {result['error']}", file=sys.stderr, flush=True)
    if rank == 0 and out:
        write_json(os.path.join(out, "summary.json"), summaries)
    return summaries


def transcribe(
    model,
    clips,
    device,
    batch_seconds,
    label,
    default_language=None,
    max_new_tokens=MAX_NEW_TOKENS,
    tokens_per_second=TOKENS_PER_SECOND,
    with_context=True,
):
    """Greedy transcripts: each rank decodes its share, and every rank gets all of them.

    → a dict for each clip, in the order of `clips`: {hyp, stopped}, or {error} where it cannot be decoded.
    Batches hold clips of like length, at most batch_seconds of audio, the longest first.
    """
    rank, world = rank_and_world()
    durations = np.array([clip.duration for clip in clips])
    longest_first = np.argsort(-durations, kind="stable").tolist()
    batches = cut_micro_batches(longest_first[rank::world], durations, batch_seconds)

    answers = {}  # clip number → answer
    for indices in tqdm(batches, desc=label, disable=rank > 0 or len(batches) < 2, leave=False):
        usable, waveforms, defects = load_usable([clips[i] for i in indices])
        unusable = [i for b, i in enumerate(indices) if b not in usable]
        for i, defect in zip(unusable, defects):
            answers[i] = {"error": defect["reason"]}
        if not usable:
            continue

        languages = [clips[indices[b]].language for b in usable]
        contexts = [clips[indices[b]].context for b in usable] if with_context else None
        batch = collate(waveforms, model.front_end, languages, default_language, contexts).to(device)
        rollout = model.sample(batch, max_new_tokens, tokens_per_second=tokens_per_second)
        hyps = model.front_end.texts(rollout)
        for b, hyp, stopped in zip(usable, hyps, rollout.stopped.tolist()):
            answers[indices[b]] = {"hyp": hyp, "stopped": stopped}

    everywhere = {}
    for share in gather(answers):
        everywhere.update(share)
    return [everywhere[i] for i in range(len(clips))]


def result_line(clip, answer, out):
    """The manifest's fields and the answer. Paths are relative to `out`, which makes the file a manifest."""
    fields = {key: value for key, value in clip.fields.items() if key not in RESULT_KEYS}
    if out:
        fields["audio"] = os.path.relpath(os.path.realpath(clip.audio), os.path.realpath(out))
    return {**fields, **answer}


def print_transcripts(results, named):
    """Prints hypotheses on stdout, with their files where `named`; those that the cap cut also on stderr."""
    for result in results:
        if "error" in result:
            continue
        print(f"{result['audio']}\t{result['hyp']}" if named else result["hyp"], flush=True)
        if not result["stopped"]:
            print(
                f"eval.py: cut by --max-new-tokens or --tokens-per-second: {result['audio']}",
                file=sys.stderr,
                flush=True,
            )


# ----------------------------------------------------------------------------------------------------------
# Normalisation: from text to the units that are compared
# ----------------------------------------------------------------------------------------------------------

# Scored by character: scripts that write no blanks between words, and Korean, whose blanks are not settled.
CHARACTER_LANGUAGES = ("zh", "yue", "ja", "ko", "th", "lo", "my", "km", "bo")
CHINESE = ("zh", "yue")
DOTTED_I_LANGUAGES = ("tr", "az")

APOSTROPHES = str.maketrans(dict.fromkeys("’‘ʼʻ`´′", "'"))
VARIATION = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]")  # selectors of a character's glyph

english = EnglishTextNormalizer()


def normalize(text, language, style="default", simplify=False):
    """The units of a text: a list of words, or of characters for CHARACTER_LANGUAGES.

    Format characters, variation selectors and enclosing marks go first, whatever the style. Then

    - default, English: NFKC, then Whisper's English normaliser;
    - default, others: NFKC, lower case, punctuation and symbols as blanks;
    - paper: lower case, punctuation and symbols deleted.

    language: code, or None for a text of unknown language, which is treated as one of the others.
    In English every sign that is typed for an apostrophe is one. In Turkish and Azeri, I is the capital of ı
    and İ that of i. Characters are taken without blanks, Latin words in Chinese text letter by letter.
    Traditional Chinese stays as it is unless `simplify`.
    """
    if language == "en":
        text = text.translate(APOSTROPHES)  # before NFKC, which makes a blank and an accent of ´
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Me") and not VARIATION.match(c))
    if style == "default":
        text = unicodedata.normalize("NFKC", text)
        if language == "en":
            text = re.sub(r"\.{2,}", " ", text)  # Whisper's would leave a dot of "Wait…"
            return english(text).split()

    if language in DOTTED_I_LANGUAGES:
        text = text.replace("İ", "i").replace("I", "ı")
    text = without_punctuation(text.lower(), " " if style == "default" else "")
    if language not in CHARACTER_LANGUAGES:
        return text.split()
    text = text.replace(" ", "")
    if simplify and language in CHINESE:
        text = simplified(text)
    return list(text)


def without_punctuation(text, replacement):
    """Punctuation and symbols become `replacement`, white space and control characters blanks."""
    characters = []
    for c in text:
        category = unicodedata.category(c)
        if category[0] in "PS":
            characters.append(replacement)
        elif category in ("Zs", "Zl", "Zp", "Cc"):
            characters.append(" ")
        else:
            characters.append(c)
    return "".join(characters)


@functools.cache
def simplifier():
    import opencc  # read for --simplify only

    return opencc.OpenCC("hk2s")


# Taiwan's forms, which hk2s leaves, as the mainland's. The mainland has 著 too (著名), and what is 幺 there
# (yāo, the digit one) is 么 in Taiwan, which is 麼 there: such pairs become one character, on both sides.
TAIWAN_FORMS = str.maketrans("著簷痺睪幺", "着檐痹睾么")


def simplified(text):
    """Simplified characters for traditional ones, with the forms of Hong Kong (衞) and Taiwan (走著).

    It is for comparing, not for reading: 著 is 着 everywhere (著名 → 着名). Words stay, such as 軟體 beside
    软件, except for 甚麼, which is how Hong Kong spells 什么.
    """
    return simplifier().convert(text).translate(TAIWAN_FORMS).replace("甚么", "什么")


def normalizer_name(language, style="default", simplify=False):
    """Name and version of what `normalize` does; a change of its results changes the version."""
    if style == "paper":
        name = "paper/2"
    elif language == "en":
        name = f"en/2-whisper-{importlib.metadata.version('whisper-normalizer')}"
    elif language in CHARACTER_LANGUAGES:
        name = "zh/1"
    else:
        name = "words/2"
    return f"{name}+t2s/2" if simplify and language in CHINESE else name


def language_of(fields):
    """The code that a result line is scored in: its `language`, else the script of its text, else None."""
    if fields.get("language"):
        return language_code(fields["language"])
    return script_language(fields["text"])


# ----------------------------------------------------------------------------------------------------------
# Scores
# ----------------------------------------------------------------------------------------------------------


def count_errors(reference, hypothesis, language, style="default", simplify=False):
    """{errors, units, substitutions, deletions, insertions} of one clip, counted by jiwer.

    Where the reference has no unit, every unit of the hypothesis is an insertion.
    """
    reference_units = normalize(reference, language, style, simplify)
    hypothesis_units = normalize(hypothesis, language, style, simplify)
    counts = {"units": len(reference_units), "substitutions": 0, "deletions": 0, "insertions": 0}
    if reference_units:
        measures = jiwer.process_words(" ".join(reference_units), " ".join(hypothesis_units))
        counts["substitutions"] = measures.substitutions
        counts["deletions"] = measures.deletions
        counts["insertions"] = measures.insertions
    else:
        counts["insertions"] = len(hypothesis_units)  # jiwer refuses an empty reference
    return {"errors": counts["substitutions"] + counts["deletions"] + counts["insertions"], **counts}


def looping(text):
    """Whisper's sign of a repetition loop: the UTF-8 text compresses by more than 2.4."""
    raw = text.encode()
    return len(raw) > 2.4 * len(zlib.compress(raw))


def score(results, style="default", simplify=False):
    """Result lines with error counts where a line has a text and a hypothesis. Old counts go."""
    scored = []
    for result in results:
        fields = {key: value for key, value in result.items() if key not in COUNTS}
        text = fields.get("text")
        hyp = fields.get("hyp")
        if isinstance(text, str) and isinstance(hyp, str):
            fields.update(count_errors(text, hyp, language_of(fields), style, simplify))
        scored.append(fields)
    return scored


def is_scored(result):
    return "errors" in result and "error" not in result


def metric_name(languages):
    """WER, CER, or MER where some lines are scored by word and some by character."""
    by_character = {language in CHARACTER_LANGUAGES for language in languages}
    if len(by_character) == 2:
        return "MER"
    return "CER" if by_character == {True} else "WER"


def summarize(results, clusters, style="default", simplify=False, seconds=None):
    """Figures of one set from its scored result lines and their clusters (`clusters_of`), one for each line.

    metric: WER, CER or MER. value: 100 × Σ errors / Σ units; low, high: its 95 % interval. Lines without
    text are decoded only. n, scored, failed, empty, looping, capped are clips; no_language are those scored
    by word because neither a language nor the script says more. clusters, effective_clusters, design_effect
    and cluster_key: see `cluster_figures`. reason: why there is no interval. seconds: of decoding; rtf is
    seconds / seconds of audio.
    """
    decoded = [result for result in results if "error" not in result]
    scored = [result for result in results if is_scored(result)]
    languages = [language_of(result) for result in scored]
    names = {normalizer_name(language, style, simplify) for language in languages}

    total = dict.fromkeys(COUNTS, 0)
    scored_clusters = []
    counts = []
    for result, cluster in zip(results, clusters, strict=True):
        if not is_scored(result):
            continue
        for key in COUNTS:
            total[key] += result[key]
        scored_clusters.append(cluster)
        counts.append((result["errors"], result["units"]))
    counted = CountedSet(
        metric_name(languages), scored_clusters, np.array(counts, dtype=float).reshape(-1, 2)
    )
    value = estimate(counted.table(), rate)

    audio_s = sum(result["duration"] for result in decoded)
    return {
        "metric": counted.metric,
        "value": 100 * total["errors"] / total["units"] if total["units"] else None,
        "low": value.low,
        "high": value.high,
        **total,
        "n": len(results),
        "scored": len(scored),
        "failed": len(results) - len(decoded),
        "empty": sum(not result["hyp"] for result in decoded),
        "looping": sum(looping(result["hyp"]) for result in decoded),
        "capped": sum(not result["stopped"] for result in decoded),
        "no_language": languages.count(None),
        "hours": audio_s / 3600,
        "normalizer": ", ".join(sorted(names)),
        "rtf": seconds / audio_s if seconds and audio_s else None,
        **cluster_figures([counted], rate),
        "reason": value.reason if scored and value.low is None else None,
    }


# ----------------------------------------------------------------------------------------------------------
# Intervals: the jackknife over clusters
#
# Clips of one speaker are not independent, so what varies by chance is the cluster and not the clip. All
# figures come from one table (..., G, S, C) of counts: G clusters, S sets, and C columns, which are the
# errors of each result file and, last, the reference units. A statistic takes sums over clusters (..., S, C)
# to a number (...), so it can be computed with all clusters and without each. Nothing is drawn at random.
#
# Sources: Bisani & Ney 2004 (intervals of error rates), Liu & Peng 2020 (arXiv 1912.09508: dependent
# utterances), Miller 2024 (arXiv 2411.00640: clustered errors), Cameron & Miller 2015 (few clusters),
# Dror et al. 2017 (several data sets).
# ----------------------------------------------------------------------------------------------------------

LEVEL = 0.975  # both tails together leave out 5 %
FEW_CLUSTERS = 12  # with fewer, intervals are rough; up to so many, all 2^G signs can be tried
ROUNDING = 1e-9  # points, or log ratios: a spread below it is the rounding of equal numbers
FILE_KEY = "audio+offset"  # the cluster key where lines name neither speaker nor recording


def clusters_of(clips, key=None):
    """The clusters of clips, as a list of (key, value): clips of one cluster are not independent.

    The key is `key`, or `speaker` if a line has one, else `recording`. Every line must have the key. Only for
    `recording`, a line without one belongs to its audio file, or to its part of a tar (FILE_KEY).
    Raises InputError for the first line without its key.
    """
    if key is None:
        has_speaker = any(has_value(clip.fields, "speaker") for clip in clips)
        key = "speaker" if has_speaker else "recording"
    return [cluster_of(clip, key) for clip in clips]


def cluster_of(clip, key):
    """(key, value) of one clip."""
    if has_value(clip.fields, key):
        return key, str(clip.fields[key])
    if key in ("recording", FILE_KEY):
        return FILE_KEY, (os.path.realpath(clip.audio), clip.offset)
    raise InputError(
        f'{clip.where}: no "{key}", which intervals are clustered by; give it to every line, '
        "or choose another key (eval.py --cluster)"
    )


def has_value(fields, key):
    return fields.get(key) not in (None, "")


@dataclasses.dataclass
class CountedSet:
    """What intervals and comparisons need of one set: n clips, counted in C − 1 result files."""

    metric: str
    clusters: list  # (n,) of (key, value)
    counts: np.ndarray  # (n, C): errors in each file, then reference units
    n_left_out: int = 0  # clips that one of the files could not score

    def table(self):
        """(G, 1, C): the sums of each cluster."""
        return joint_table([self])


def joint_table(sets):
    """The table (G, S, C) of several `CountedSet`."""
    return cluster_table([counted.clusters for counted in sets], [counted.counts for counted in sets])


def cluster_table(clusters, counts):
    """The table (G, S, C) of S sets: sums over the clips of each cluster. A cluster may be in several sets.

    clusters: a list of n names for each set. counts: an array (n, C) for each set.
    """
    rows = {}  # name → row
    for names in clusters:
        for name in names:
            rows.setdefault(name, len(rows))
    table = np.zeros((len(rows), len(counts), counts[0].shape[1]))
    for s, names in enumerate(clusters):
        indices = [rows[name] for name in names]
        np.add.at(table[:, s], indices, counts[s])
    return table


def clip_table(counts):
    """The table of S sets whose clusters are single clips: (Σn, S, C)."""
    clips = []
    for s, rows in enumerate(counts):
        clips.append([(s, i) for i in range(len(rows))])
    return cluster_table(clips, counts)


# ---- statistics: sums (..., S, C) → (...) ------------------------------------------------------------------


def rates(sums):
    """Error rates in % of each file, of one set: (..., 1, C) → (..., C − 1)."""
    return 100 * sums[..., 0, :-1] / sums[..., 0, -1:]


def log_errors(sums):
    """Logarithms of the errors of each file, as a mean over sets: (..., S, C) → (..., C − 1).

    All files have the same reference units, so these differ between files as the logarithms of rates do.
    """
    return np.log(sums[..., :-1]).mean(axis=-2)


def contrast(values, n_a=1):
    """Mean of the files of B − mean of the files of A, which are the first n_a: (..., files) → (...)."""
    return values[..., n_a:].mean(axis=-1) - values[..., :n_a].mean(axis=-1)


def rate(sums):
    """Error rate in % of one file."""
    return rates(sums)[..., 0]


def difference(sums):
    """Δ = rate of B − rate of A, in points."""
    return contrast(rates(sums))


def log_ratio(sums):
    """L = ln(E_B / E_A) of one set; of several the macro M, which is the mean of L over sets."""
    return contrast(log_errors(sums))


def percent(log_value):
    """The relative change in % that a logarithm of a ratio stands for; None stays None."""
    return None if log_value is None else 100 * math.expm1(log_value)


# ---- spread ------------------------------------------------------------------------------------------------


def jackknife(table, statistic):
    """A statistic and its standard error by leaving out one cluster at a time: (..., G, S, C) → (...), (...).

    SE² = (G − 1)/G Σ_g (θ_(g) − θ)². It is NaN where the statistic is not defined without some cluster, as it
    is with one cluster only.
    """
    n_clusters = table.shape[-3]
    total = table.sum(axis=-3)
    left_out = total[..., None, :, :] - table
    with np.errstate(divide="ignore", invalid="ignore"):
        value = statistic(total)
        deviations = statistic(left_out) - value[..., None]  # (..., G)
        se = np.sqrt((n_clusters - 1) / max(n_clusters, 1) * (deviations**2).sum(axis=-1))
    se = np.where(np.isfinite(se) & (n_clusters > 1), se, np.nan)
    return value, np.where(se < ROUNDING, 0.0, se)


def t_interval(value, se, df):
    """The 95 % interval value ± t_.975(df) · se, as (low, high)."""
    half = scipy.special.stdtrit(df, LEVEL) * se
    return value - half, value + half


def t_test(value, se, df):
    """Two-sided p = 2 (1 − T_df(|value| / se)). With se = 0 it is 1 for the value 0, else NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * scipy.special.stdtr(df, -np.abs(value) / se)
    is_zero = np.abs(value) < ROUNDING
    return np.where(se == 0, np.where(is_zero, 1.0, np.nan), p)


def sign_flip(differences):
    """Exact p of the cluster differences d (..., G): the share of all 2^G signs with |Σ ± d_g| ≥ |Σ d_g|."""
    n_clusters = differences.shape[-1]
    signs = 1 - 2 * (np.arange(2**n_clusters)[:, None] >> np.arange(n_clusters) & 1)  # (2^G, G)
    flipped = np.abs(differences @ signs.T)  # (..., 2^G)
    observed = np.abs(differences.sum(axis=-1, keepdims=True))
    tolerance = ROUNDING * np.abs(differences).sum(axis=-1, keepdims=True)  # sums of other order are equal
    return (flipped >= observed - tolerance).mean(axis=-1)


def holm(p_values):
    """Holm's adjusted p of several tests, in the order of `p_values`; a None stays None and is no test.

    The i-th smallest of m p-values is multiplied by m + 1 − i, is at least its predecessor and at most 1.
    This holds whatever the dependence between the tests (Holm 1979).
    """
    order = [i for i, p in enumerate(p_values) if p is not None]
    order.sort(key=lambda i: p_values[i])
    adjusted = [None] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, (len(order) - rank) * p_values[i])
        adjusted[i] = min(1.0, largest)
    return adjusted


@dataclasses.dataclass
class Estimate:
    """One figure with its uncertainty. None: not given; `reason` says why."""

    value: float | None
    se: float | None
    low: float | None
    high: float | None
    p: float | None
    reason: str | None


def estimate(table, statistic):
    """The `Estimate` of a statistic from a table (G, S, C), by the jackknife with t of G − 1."""
    n_clusters = len(table)
    value, se = jackknife(table, statistic)
    reason = None
    if not np.isfinite(value):
        reason = "no reference unit to divide by"
    elif n_clusters < 2:
        reason = "one cluster gives neither interval nor p"
    elif not np.isfinite(se):
        reason = "neither interval nor p: one cluster has all reference units"
    return t_estimate(value, se, n_clusters - 1, reason)


def t_estimate(value, se, df, reason=None):
    """An `Estimate` from a value, its standard error and the degrees of freedom; NaN becomes None."""
    low, high = t_interval(value, se, df)
    p = t_test(value, se, df)
    if reason is None and np.isnan(p):
        reason = "no p: leaving out any cluster changes nothing"
    numbers = [given_or_none(number) for number in (value, se, low, high, p)]
    return Estimate(*numbers, reason)


def given_or_none(number):
    return float(number) if np.isfinite(number) else None


def cluster_figures(sets, statistic):
    """Describes the clusters of one or several `CountedSet`.

    clusters: G. effective_clusters: 1 / Σ w², where w is a cluster's share of the reference units, as a mean
    over sets; of one set this is (ΣN)² / ΣN². design_effect: (SE of the statistic by cluster / SE by clip)².
    cluster_key: what clusters were made of.
    """
    keys = set()
    for counted in sets:
        keys.update(key for key, _ in counted.clusters)
    table = joint_table(sets)
    units = table[..., -1]  # (G, S)
    _, se = jackknife(table, statistic)
    _, se_by_clip = jackknife(clip_table([counted.counts for counted in sets]), statistic)
    has_units = len(units) > 0 and units.sum(axis=0).all()
    shares = (units / units.sum(axis=0)).mean(axis=1) if has_units else None
    return {
        "clusters": len(table),
        "effective_clusters": float(1 / (shares**2).sum()) if has_units else None,
        "design_effect": float((se / se_by_clip) ** 2) if se_by_clip > 0 and np.isfinite(se) else None,
        "cluster_key": ", ".join(sorted(keys)) or None,
    }


# ----------------------------------------------------------------------------------------------------------
# Comparison of result files
# ----------------------------------------------------------------------------------------------------------


def read_results(path, cluster=None):
    """Lines of a result file, each with `key`, which makes two lines the same clip, `where` and `cluster`.

    cluster: see `clusters_of`. Raises InputError for a line with neither hypothesis nor error.
    """
    clips = read_manifest(path)
    results = []
    for clip, name in zip(clips, clusters_of(clips, cluster)):
        fields = clip.fields
        if not isinstance(fields.get("hyp"), str) and "error" not in fields:
            raise InputError(f'{clip.where}: neither "hyp" nor "error"; give a result file of eval.py')
        key = (os.path.realpath(clip.audio), *clip.key[1:])
        results.append({"stopped": True, **fields, "where": clip.where, "key": key, "cluster": name})
    return results


def count_set(paths, style="default", simplify=False, cluster=None, strict=True):
    """The `CountedSet` of result files of the same clips, in whatever order their lines are.

    Raises InputError where they do not hold the same clips with the same texts, each once. A clip that was
    not decoded, or has no text, is an error too; with strict=False it is left out and counted.
    """
    files = [score(read_results(path, cluster), style, simplify) for path in paths]
    first = files[0]
    by_key = []  # {key: result} of each file
    for results in files:
        by_key.append({result["key"]: result for result in results})
    for results, path, own in zip(files, paths, by_key):
        check_pairs(results, own, by_key[0], paths[0])
        check_pairs(first, by_key[0], own, path)

    clusters = []
    languages = []
    rows = []
    for result in first:
        same_clip = [own[result["key"]] for own in by_key]
        unscored = [other for other in same_clip if not is_scored(other)]
        if unscored and strict:
            defect = "was not decoded, or has no text"
            raise InputError(f"{unscored[0]['where']}: {unscored[0]['audio']} {defect}")
        if unscored:
            continue
        clusters.append(result["cluster"])
        languages.append(language_of(result))
        rows.append([*(other["errors"] for other in same_clip), result["units"]])
    counts = np.array(rows, dtype=float).reshape(-1, len(paths) + 1)
    if not counts[:, -1].any():
        raise InputError(f"{paths[0]}: no reference has a unit to compare")
    return CountedSet(metric_name(languages), clusters, counts, len(first) - len(rows))


def check_pairs(results, own, other, other_path):
    """Raises InputError for the first line of one file that has no partner in the other.

    own, other: {key: result} of this file and of the other, which lies at other_path.
    """
    for result in results:
        partner = other.get(result["key"])
        defect = None
        if own[result["key"]] is not result:
            defect = "is there twice"
        elif partner is None:
            defect = f"is in one of the files only, not in {other_path}"
        elif partner.get("text") != result.get("text"):
            defect = f"has another text in {other_path}"
        elif is_scored(result) and language_of(partner) != language_of(result):
            defect = f"has another language in {other_path}"
        elif partner["cluster"] != result["cluster"]:
            defect = f"has another {result['cluster'][0]} in {other_path}"
        if defect:
            raise InputError(f"{result['where']}: {result['audio']} {defect}")


def result_files(folder):
    """{stem: path} of the result files in a folder. Raises InputError where there is none."""
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder")
    names = sorted(name for name in os.listdir(folder) if name.endswith(".jsonl"))
    if not names:
        raise InputError(f"{folder}: holds no result file (.jsonl); give a folder that eval.py --out wrote")
    return {stem_of(name): os.path.join(folder, name) for name in names}


def pair(counted):
    """The comparison of two files of one set, from their `CountedSet`, as a flat dict.

    metric; n clips; a and b (%); difference = b − a (points) with low and high of its 95 % interval, and p;
    relative = 100 (E_B / E_A − 1) with relative_low and relative_high; clusters and so on
    (`cluster_figures`; the design effect is that of the difference); sign_flip and its smallest possible
    value sign_flip_floor, for up to 12 clusters; holm: for `compare_folders`; reason: why figures are None.
    """
    table = counted.table()
    errors_a, errors_b, units = counted.counts.sum(axis=0).tolist()
    change = change_estimate(table)
    delta = estimate(table, difference)
    reasons = [delta.reason]
    if change.reason != delta.reason:
        reasons.append(change.reason)
    return {
        "metric": counted.metric,
        "n": len(counted.counts),
        "a": 100 * errors_a / units,
        "b": 100 * errors_b / units,
        "difference": delta.value,
        "low": delta.low,
        "high": delta.high,
        "p": delta.p,
        "relative": percent(change.value),
        "relative_low": percent(change.low),
        "relative_high": percent(change.high),
        **cluster_figures([counted], difference),
        **sign_flip_figures(table),
        "holm": None,
        "reason": joined(reasons),
    }


def change_estimate(table):
    """The `Estimate` of L or of the macro M (`log_ratio`). It is None altogether where some errors are 0."""
    zero = zero_errors(table)
    if zero:
        return Estimate(None, None, None, None, None, f"no relative change: {zero}")
    return estimate(table, log_ratio)


def zero_errors(table):
    """Says where a table (G, S, C) has no error in a file, with all clusters or without one; else None."""
    errors = table[..., :-1]
    total = errors.sum(axis=0)  # (S, files)
    if (total == 0).any():
        return "one side has no error"
    if len(table) > 1 and (total - errors == 0).any():
        return "one side has no error without one of the clusters"
    return None


def sign_flip_figures(table):
    """{sign_flip, sign_flip_floor} of a table (G, S, 3); None with one cluster, or more than 12."""
    n_clusters = len(table)
    if not 2 <= n_clusters <= FEW_CLUSTERS:
        return {"sign_flip": None, "sign_flip_floor": None}
    units = table[..., 2].sum(axis=0)
    differences = ((table[..., 1] - table[..., 0]) / units).sum(axis=1)  # (G,)
    return {"sign_flip": float(sign_flip(differences)), "sign_flip_floor": 2 / 2**n_clusters}


def joined(reasons):
    """Reasons as one text, without the Nones; None where there is no reason."""
    return "; ".join(reason for reason in reasons if reason) or None


def compare_folders(folder_a, folder_b, style="default", simplify=False, cluster=None, strict=True):
    """Compares the result files of two folders, paired by name: {"sets": {stem: pair}, "macro": {…}}.

    Each pair (`pair`) also has holm: its p adjusted for the number of sets. macro: see `macro_figures`.

    Raises InputError where a file is in one folder only, or a pair cannot be compared (`count_set`). With
    strict=False such a set is left out instead, as are clips that one side could not score: the result has
    "left_out" then, {stem: reason}, and `print_comparison` prints it. A folder without a result file is an
    error always.
    """
    paths_a = result_files(folder_a)
    paths_b = result_files(folder_b)
    left_out = {}
    for stem in sorted(paths_a.keys() ^ paths_b.keys()):
        left_out[stem] = f"{stem}.jsonl is in one of {folder_a} and {folder_b} only"
        if strict:
            raise InputError(f"{left_out[stem]}; move it away, or evaluate that set with both models")

    counted = {}
    for stem in sorted(paths_a.keys() & paths_b.keys()):
        try:
            paths = [paths_a[stem], paths_b[stem]]
            counted[stem] = count_set(paths, style, simplify, cluster, strict)
        except InputError as error:
            if strict:
                raise
            left_out[stem] = str(error)
            continue
        if counted[stem].n_left_out:
            left_out[stem] = f"{counted[stem].n_left_out} clip(s) that one side could not score"

    pairs = {stem: pair(counted_set) for stem, counted_set in counted.items()}
    adjusted = holm([figures["p"] for figures in pairs.values()])
    for figures, p in zip(pairs.values(), adjusted):
        figures["holm"] = p
    comparison = {"sets": pairs, "macro": macro_figures(counted, pairs)}
    if not strict:
        comparison["left_out"] = left_out
    return comparison


def macro_figures(counted, pairs):
    """The mean over sets of relative changes, which is the primary figure of a comparison of several sets.

    counted: {stem: CountedSet}, pairs: {stem: pair}. → stems that are in it and their n clips; relative,
    relative_low, relative_high (%) and p, from the mean of L = ln(E_B / E_A), where a cluster leaves all sets
    at once; clusters and so on; sign_flip; mean_a and mean_b, plain means of all rates. A set with one
    cluster is not in the macro, and the reason names it.
    """
    stems, reason = macro_stems(counted)
    reasons = [reason]
    figures = {
        "stems": stems,
        "n": sum(pairs[stem]["n"] for stem in stems),
        "mean_a": mean_of(pairs, "a"),
        "mean_b": mean_of(pairs, "b"),
    }
    keys = ["relative", "relative_low", "relative_high", "p", "clusters", "effective_clusters"]
    keys += ["design_effect", "cluster_key", "sign_flip", "sign_flip_floor"]
    figures.update(dict.fromkeys(keys))
    if stems:
        sets = [counted[stem] for stem in stems]
        table = joint_table(sets)
        change = change_estimate(table)
        figures["relative"] = percent(change.value)
        figures["relative_low"] = percent(change.low)
        figures["relative_high"] = percent(change.high)
        figures["p"] = change.p
        figures.update(cluster_figures(sets, log_ratio))
        figures.update(sign_flip_figures(table))
        reasons.append(change.reason)
    figures["reason"] = joined(reasons)
    return figures


def macro_stems(counted):
    """The stems whose sets have two clusters or more, and a reason that names the others, or None."""
    stems = [stem for stem in counted if len(set(counted[stem].clusters)) > 1]
    others = ", ".join(stem for stem in counted if stem not in stems)
    reason = f"sets of one cluster are not in it: {others}" if others else None
    return stems, reason


def mean_of(pairs, key):
    """Mean of a figure over pairs {stem: pair}; None where there is none."""
    return sum(figures[key] for figures in pairs.values()) / len(pairs) if pairs else None


# ----------------------------------------------------------------------------------------------------------
# Seeds: two recipes, each trained several times
# ----------------------------------------------------------------------------------------------------------


def evaluation_of(folder):
    """(folder of result files, seed of its run or None) of a run folder or an evaluation of a run.

    A run folder, which has a config.json, means its newest eval-N. Raises InputError where it has none.
    """
    folder = os.path.abspath(folder)
    run = os.path.dirname(folder)
    if os.path.exists(os.path.join(folder, "config.json")):
        run = folder
        steps = [re.fullmatch(r"eval-(\d+)", name) for name in os.listdir(run)]
        newest = max((int(match[1]) for match in steps if match), default=None)
        if newest is None:
            raise InputError(f"{run}: this run has no evaluation (eval-N); train with --eval")
        folder = os.path.join(run, f"eval-{newest}")
    return folder, seed_of(os.path.join(run, "config.json"))


def seed_of(config_path):
    """The seed that a run's config.json names; None where there is no such file, or another program's."""
    try:
        seed = read_json(config_path)["args"]["seed"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return seed if type(seed) is int else None


def why_unpaired(seeds_a, seeds_b):
    """Why runs of two recipes are not paired by seed; None where they are."""
    if None in seeds_a or None in seeds_b:
        return "not every run has a config.json that names its seed"
    if len(set(seeds_a)) < len(seeds_a) or len(set(seeds_b)) < len(seeds_b):
        return "one side has a seed twice"
    if set(seeds_a) != set(seeds_b):
        return "the two sides have other seeds"
    return None


def compare_seeds(folders_a, folders_b, style="default", simplify=False, cluster=None):
    """Compares two recipes, each with one or several runs, as a dict; docs/scores.md names all keys.

    The runs are paired where both sides have the same seeds, each once. Raises InputError where a folder is
    given twice, or the folders do not hold the same sets (`count_set`).
    """
    runs_a = [evaluation_of(folder) for folder in folders_a]
    runs_b = [evaluation_of(folder) for folder in folders_b]
    folders = [folder for folder, _ in runs_a + runs_b]
    newest = set()  # what run folders stand for
    for run, folder in zip([*folders_a, *folders_b], folders):
        if os.path.abspath(run) != folder:
            newest.add(os.path.basename(folder))
    if len(newest) > 1:
        raise InputError(f"the runs stand at {', '.join(sorted(newest))}; finish them, or name RUN/eval-N")
    real_paths = [os.path.realpath(folder) for folder in folders]
    for folder, real_path in zip(folders, real_paths):
        if real_paths.count(real_path) > 1:
            raise InputError(f"{folder} is given twice; each run counts once")
    reason = why_unpaired([seed for _, seed in runs_a], [seed for _, seed in runs_b])
    if reason is None:  # the same order on both sides
        runs_a.sort(key=lambda run: run[1])
        runs_b.sort(key=lambda run: run[1])
        folders = [folder for folder, _ in runs_a + runs_b]

    by_stem = [result_files(folder) for folder in folders]
    for folder, paths in zip(folders, by_stem):
        if paths.keys() != by_stem[0].keys():
            stem = sorted(paths.keys() ^ by_stem[0].keys())[0]
            raise InputError(
                f"{stem}.jsonl is in one of {folders[0]} and {folder} only; compare the same sets"
            )

    counted = {}
    sets = {}
    n_a = len(runs_a)
    is_paired = reason is None
    for stem in by_stem[0]:
        counted[stem] = count_set([paths[stem] for paths in by_stem], style, simplify, cluster)
        table = counted[stem].table()
        values = rates(table.sum(axis=0))
        sets[stem] = {
            "metric": counted[stem].metric,
            "n": len(counted[stem].counts),
            "a": values[:n_a].tolist(),
            "b": values[n_a:].tolist(),
            "difference": seed_figures(table, rates, n_a, is_paired),
            "relative": relative_figures(table, n_a, is_paired),
            **cluster_figures([counted[stem]], lambda sums: contrast(rates(sums), n_a)),
        }

    adjusted = holm([figures["difference"]["p"] for figures in sets.values()])
    for figures, p in zip(sets.values(), adjusted):
        figures["holm"] = p

    stems, left_out_reason = macro_stems(counted)
    macro = {"stems": stems, "relative": None, "reason": left_out_reason}
    if stems:
        chosen = [counted[stem] for stem in stems]
        macro["relative"] = relative_figures(joint_table(chosen), n_a, is_paired)
        macro.update(cluster_figures(chosen, lambda sums: contrast(log_errors(sums), n_a)))
    return {
        "paired": is_paired,
        "unpaired_reason": reason,
        "reason": None if min(n_a, len(runs_b)) > 1 else "one run on a side: no seed column and no total",
        "seeds_a": [seed for _, seed in runs_a],
        "seeds_b": [seed for _, seed in runs_b],
        "folders_a": folders[:n_a],
        "folders_b": folders[n_a:],
        "sets": sets,
        "macro": macro,
    }


def seed_variance(values, n_a, is_paired):
    """What seeds add to the variance of B − A: (V_seed, Σ v²/(S − 1), seed sd), of values (..., runs).

    Paired: v = s²(Δ_s)/S, and sd = s(Δ_s). Unpaired: v = s²/S of either arm, V_seed is their sum, and
    sd = √(s²_A + s²_B). The second number is the part of seeds in the df of `total_variance`. Each arm must
    have two runs.
    """
    arms = [values[..., :n_a], values[..., n_a:]]
    if is_paired:
        arms = [arms[1] - arms[0]]
    variance = 0.0
    square_per_df = 0.0
    seed_square = 0.0
    for arm in arms:
        n_seeds = arm.shape[-1]
        square = arm.var(axis=-1, ddof=1)
        square = np.where(square < ROUNDING**2, 0.0, square)
        seed_square = seed_square + square
        variance = variance + square / n_seeds
        square_per_df = square_per_df + (square / n_seeds) ** 2 / (n_seeds - 1)
    return variance, square_per_df, np.sqrt(seed_square)


def total_variance(seed_part, seed_square_per_df, cluster_part, n_clusters):
    """V = V_seed + V_cluster and its df = V² / (Σ v²/(S − 1) + V_cluster²/(G − 1)), of Satterthwaite."""
    total = seed_part + cluster_part
    with np.errstate(divide="ignore", invalid="ignore"):
        df = total**2 / (seed_square_per_df + cluster_part**2 / (n_clusters - 1))
    return total, df


SEED_FIGURES = ["value", "per_seed", "seed_sd", "cluster_se", "cluster_low", "cluster_high"]
SEED_FIGURES += ["total_se", "df", "low", "high", "p", "reason"]


def seed_figures(table, statistic, n_a, is_paired):
    """B − A of a statistic of each run, with three spreads, from a table (G, S, runs + 1).

    → value: mean over runs. per_seed: B − A of each seed, of paired runs only. Then three spreads, each with
    its question. seed_sd: how far would a rerun with another seed differ on this set? cluster_se, cluster_low
    and cluster_high: how far would these checkpoints differ on other speakers? total_se, df, low, high and p:
    does the recipe differ, with other speakers and other seeds? With one run on a side there is no seed_sd
    and no total. reason: why other figures are None.
    """
    values = statistic(table.sum(axis=0))  # (runs,)
    across = estimate(table, lambda sums: contrast(statistic(sums), n_a))
    figures = dict.fromkeys(SEED_FIGURES)
    figures["value"] = across.value
    figures["cluster_se"] = across.se
    figures["cluster_low"] = across.low
    figures["cluster_high"] = across.high
    figures["reason"] = across.reason
    if is_paired:
        figures["per_seed"] = (values[n_a:] - values[:n_a]).tolist()
    if min(n_a, len(values) - n_a) < 2:
        return figures

    variance, square_per_df, seed_sd = seed_variance(values, n_a, is_paired)
    figures["seed_sd"] = float(seed_sd)
    if across.se is None:
        return figures
    total, df = total_variance(variance, square_per_df, across.se**2, len(table))
    if total == 0:
        df = len(table) - 1  # the interval is the value itself, whatever the df
    whole = t_estimate(across.value, math.sqrt(total), df)
    figures.update(total_se=whole.se, df=given_or_none(df), low=whole.low, high=whole.high, p=whole.p)
    figures["reason"] = whole.reason
    return figures


def relative_figures(table, n_a, is_paired):
    """`seed_figures` of relative changes: value, per_seed and interval ends in %, spreads in 100 × ln.

    All are None where the errors of a run are 0, also without one of the clusters.
    """
    zero = zero_errors(table)
    if zero:
        return {**dict.fromkeys(SEED_FIGURES), "reason": f"no relative change: {zero}"}
    figures = seed_figures(table, log_errors, n_a, is_paired)
    for key in ("value", "cluster_low", "cluster_high", "low", "high"):
        figures[key] = percent(figures[key])
    for key in ("seed_sd", "cluster_se", "total_se"):
        figures[key] = None if figures[key] is None else 100 * figures[key]
    if is_paired:
        figures["per_seed"] = [percent(value) for value in figures["per_seed"]]
    return figures


# ----------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------

SUMMARY_HEADER = ["set", "metric", "%", "95 %", "S", "D", "I", "clips", "hours"]
SUMMARY_HEADER += ["empty", "loops", "capped", "failed", "RTF"]


def print_summaries(summaries):
    """Prints the summaries {stem: summary} as a table, their normalisers, and their clusters."""
    rows = []
    for stem, s in summaries.items():
        interval = interval_text(s["low"], s["high"])
        rtf = None if s["rtf"] is None else f"{s['rtf']:.4f}"
        counts = [s["substitutions"], s["deletions"], s["insertions"], s["n"], f"{s['hours']:.3f}"]
        shares = [s["empty"], s["looping"], s["capped"], s["failed"]]
        rows.append([stem, s["metric"], s["value"], interval, *counts, *shares, rtf])
    print_table(rows, SUMMARY_HEADER)

    names = {summary["normalizer"] or "none" for summary in summaries.values()}
    tqdm.write("normalizer: " + "; ".join(sorted(names)))
    for stem, summary in summaries.items():
        if summary["no_language"]:
            reason = "neither a language nor a script that decides one"
            tqdm.write(f"{stem}: {summary['no_language']} line(s) with {reason}, scored as plain words")
    print_clusters(summaries)
    print_few_clusters(summaries)
    print_reasons(summaries)


def print_comparison(comparison, name_a="A", name_b="B"):
    """Prints the relative changes of a comparison (`compare_folders`) as a table.

    Columns: set, metric, both rates, change and its 95 % interval. With several sets the last rows are the
    macro with its p, the primary figure, and the mean of the rates, which has no interval because it mixes
    WER and CER. Lines below say what was clustered, where intervals are rough, why figures are missing, and
    what was left out.
    name_a, name_b: what the two sides are called in the header.
    """
    rows = []
    macro = comparison.get("macro")
    is_one_set = len(comparison["sets"]) == 1
    for stem, figures in comparison["sets"].items():
        shown = [figures["metric"], figures["a"], figures["b"]]
        p = p_text(macro["p"]) if macro and is_one_set else None
        rows.append([stem, *shown, *change_cells(figures), p])
    if macro and len(rows) > 1:
        rows.append(["macro", None, None, None, *change_cells(macro), p_text(macro["p"])])
        rows.append(["mean", None, macro["mean_a"], macro["mean_b"], None, None, None])
    if rows:
        print_table(rows, ["set", "metric", f"{name_a} %", f"{name_b} %", "change", "95 %", "p"])
    figures = dict(comparison["sets"])
    if macro and len(figures) != 1:
        figures["macro"] = macro
    keys = {f["cluster_key"] for f in figures.values() if f["cluster_key"]}
    clusters = ", ".join(f"{name} {f['clusters']}" for name, f in figures.items() if f["clusters"])
    if keys:
        tqdm.write(f"intervals over clusters by {', '.join(sorted(keys))}: {clusters}")
    print_few_clusters(figures)
    print_reasons(figures)
    for stem, reason in comparison.get("left_out", {}).items():
        tqdm.write(f"{stem}: left out: {reason}")


def change_cells(figures):
    """Cells for the relative change and its interval."""
    change = None if figures["relative"] is None else f"{figures['relative']:+.1f} %"
    interval = interval_text(figures["relative_low"], figures["relative_high"], "+.1f")
    return [change, interval]


def print_differences(pairs):
    """Prints the differences of pairs {stem: pair} in points; Holm's p where there are several."""
    header = ["set", "metric", "clips", "A %", "B %", "B − A", "95 %", "p"]
    if len(pairs) > 1:
        header.append("Holm p")
    rows = []
    for stem, c in pairs.items():
        interval = interval_text(c["low"], c["high"], "+.2f")
        delta = f"{c['difference']:+.2f}"
        row = [stem, c["metric"], c["n"], c["a"], c["b"], delta, interval, p_text(c["p"])]
        if len(pairs) > 1:
            row.append(p_text(c["holm"]))
        rows.append(row)
    print_table(rows, header)


def print_clusters(figures):
    """Prints the clusters of {name: figures}, with the exact p where there are few."""
    header = ["set", "clusters", "by", "effective", "design effect"]
    has_sign_flip = any(f.get("sign_flip") is not None for f in figures.values())
    if has_sign_flip:
        header += ["sign-flip p", "floor"]
    rows = []
    for name, f in figures.items():
        row = [name, f["clusters"], f["cluster_key"], f["effective_clusters"], f["design_effect"]]
        if has_sign_flip:
            row += [p_text(f["sign_flip"]), p_text(f["sign_flip_floor"])]
        rows.append(row)
    print_table(rows, header)


def print_few_clusters(figures):
    """Warns of sets with fewer than 12 effective clusters."""
    few = []
    for name, f in figures.items():
        n_effective = f["effective_clusters"]
        if n_effective is not None and n_effective < FEW_CLUSTERS - 1e-6:  # 12 equal ones may be 11.999…
            few.append(f"{name} {n_effective:.1f}")
    if few:
        tqdm.write(f"fewer than {FEW_CLUSTERS} effective clusters, so intervals are rough: {', '.join(few)}")


def print_reasons(figures):
    """Prints why figures of {name: figures} are not given."""
    for name, f in figures.items():
        if f["reason"]:
            tqdm.write(f"{name}: {f['reason']}")


def print_seeds(comparison):
    """Prints the comparison of two recipes over seeds (`compare_seeds`): each run, then the three spreads."""
    c = comparison
    n_a = len(c["seeds_a"])
    n_b = len(c["seeds_b"])
    if c["paired"]:
        seeds = ", ".join(map(str, c["seeds_a"]))
        tqdm.write(f"paired by seed: {seeds}")
        header = ["set", "figure", *(f"seed {seed}" for seed in c["seeds_a"])]
    else:
        tqdm.write(f"unpaired, {n_a} and {n_b} runs: {c['unpaired_reason']}")
        header = ["set", "figure", *(f"run {i + 1}" for i in range(max(n_a, n_b)))]
    print_runs("A", c["folders_a"], c["seeds_a"])
    print_runs("B", c["folders_b"], c["seeds_b"])
    print_table(run_rows(c, len(header) - 2), header)

    rows = []
    reasons = {}
    for stem, figures in c["sets"].items():
        p_values = [p_text(figures["difference"]["p"]), p_text(figures["holm"])]
        rows.append([stem, *spread_cells(figures["difference"], "points", ".2f"), *p_values])
        rows.append([stem, *spread_cells(figures["relative"], "change %", ".1f"), None, None])
        reasons[f"{stem}, points"] = figures["difference"]
        reasons[f"{stem}, change %"] = figures["relative"]
    clustered = dict(c["sets"])
    reasons["macro"] = c["macro"]
    if c["macro"]["relative"]:
        p = p_text(c["macro"]["relative"]["p"])
        rows.append(["macro", *spread_cells(c["macro"]["relative"], "change %", ".1f"), p, None])
        reasons["macro, change %"] = c["macro"]["relative"]
        clustered["macro"] = c["macro"]

    header = ["set", "B − A in", "mean", "cluster SE", "95 % cluster", "seed sd", "95 % total", "df", "p"]
    header.append("Holm p")
    if c["reason"]:
        n_columns = 5  # the others need several runs
        header = header[:n_columns]
        rows = [row[:n_columns] for row in rows]
    print_table(rows, header)
    tqdm.write("cluster: how far would these checkpoints differ on other speakers?")
    if c["reason"]:
        tqdm.write(c["reason"])
    else:
        tqdm.write("seed sd: how far would a rerun with another seed differ on this set?")
        tqdm.write("total, df, p: does the recipe differ, with other speakers and other seeds?")
    tqdm.write("seed sd and cluster SE of changes are in 100 × ln(B / A), close to %")
    print_clusters(clustered)
    print_few_clusters(clustered)
    print_reasons(reasons)


def print_runs(side, folders, seeds):
    names = []
    for folder, seed in zip(folders, seeds):
        name = os.path.relpath(folder)
        names.append(name if seed is None else f"{name} (seed {seed})")
    tqdm.write(f"{side}: {', '.join(names)}")


def run_rows(comparison, n_columns):
    """Rows of every run: rates of A and B, and with paired runs B − A and the change."""
    rows = []
    for stem, figures in comparison["sets"].items():
        rows.append([stem, "A %", *figures["a"]])
        rows.append([stem, "B %", *figures["b"]])
        rows.append([stem, "B − A", *(figures["difference"]["per_seed"] or [])])
        rows.append([stem, "change %", *(figures["relative"]["per_seed"] or [])])
    macro = comparison["macro"]["relative"]
    if macro:
        rows.append(["macro", "change %", *(macro["per_seed"] or [])])
    with_figures = [row for row in rows if len(row) > 2]
    return [row + [None] * (n_columns + 2 - len(row)) for row in with_figures]


def spread_cells(figures, unit, places):
    """Cells of one row of `print_seeds` between its set and its p."""
    texts = {}
    for key, form in (("value", "+" + places), ("cluster_se", places), ("seed_sd", places), ("df", ".1f")):
        texts[key] = None if figures[key] is None else format(figures[key], form)
    cluster = interval_text(figures["cluster_low"], figures["cluster_high"], "+" + places)
    total = interval_text(figures["low"], figures["high"], "+" + places)
    return [unit, texts["value"], texts["cluster_se"], cluster, texts["seed_sd"], total, texts["df"]]


def interval_text(low, high, places=".2f"):
    return None if low is None else f"{low:{places}} to {high:{places}}"


def p_text(p):
    if p is None:
        return None
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"


def print_table(rows, header):
    """Prints rows of cells: numbers with a fraction to two places, None as a dash."""
    table = [header]
    for row in rows:
        table.append([cell_text(cell) for cell in row])
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *others in table:
        cells = [first.ljust(widths[0])]
        for cell, width in zip(others, widths[1:]):
            cells.append(cell.rjust(width))
        tqdm.write("  ".join(cells))  # not print: a progress bar may be on the screen


def cell_text(cell):
    if cell is None:
        return "–"
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


if __name__ == "__main__":
    run_script(main, parse_args())
