"""Decode manifests greedily and score them: WER for words, CER for characters, with 95 % intervals.

    python eval.py --model example/teacher --data example/en-clean.jsonl example/zh-read.jsonl --out runs/t
    torchrun --nproc_per_node=8 eval.py --model DIR --data test.jsonl --out runs/x    # clips split over ranks
    python eval.py --model DIR --data clip.flac                                       # prints the transcript
    python eval.py --score runs/x/*.jsonl --normalizer paper                          # rescores, no model
    python eval.py --compare runs/x runs/y                                            # paired, file by file

--model writes OUT/<stem>.jsonl, which has the manifest's fields with hyp, stopped and error counts, and
OUT/summary.json. A hypothesis that the length cap cut has "stopped": false. A clip that cannot be decoded has
"error" in place of hyp, is counted as failed, and makes the exit status 1. A result file is a manifest, so
`sft.py --text-field hyp` learns from it. Intervals come from leaving out one cluster of clips at a time: one
speaker, or one recording (--cluster). docs/scores.md defines every figure.

Decoding takes about its real-time factor (RTF in the table) times the audio; scoring takes seconds.
"""

import dataclasses
import functools
import importlib.metadata
import os
import pathlib
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

import data
import model

# What `evaluate` and `transcribe` can be told about decoding; a caller gives some of the keys.
DECODING = {
    "batch_seconds": 600.0,  # of audio decoded at once
    "default_language": None,  # in the prompt of a clip whose line names none
    "with_context": True,  # prompts give a line's context
    "max_new_tokens": 800,  # cap on a transcript
    "tokens_per_second": 25.0,  # cap by the audio: this × seconds + 16 tokens; 0 = off
}

COUNTS = ("errors", "units", "substitutions", "deletions", "insertions")
RESULT_KEYS = ("hyp", "stopped", "error", *COUNTS)  # what a result line adds to the manifest's fields


def parse_args(argv=None):
    parser = data.argument_parser("eval.py", __doc__)
    add = parser.add_argument

    # task
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--model", help="student or teacher, folder or hub name: decode and score --data")
    task.add_argument("--score", nargs="+", metavar="FILE", help="score result files again, without a model")
    task.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two result files, or folders of them")
    add("--data", nargs="+", default=[], help="manifests (.jsonl) or audio files, with --model")
    add("--out", help="new folder for result files and summary.json; without it results are only printed")
    add("--json", metavar="FILE", help="store the figures that are printed")

    # decoding
    seconds = data.at_least(0.01)
    add("--language", help="language in the prompt of clips whose line names none (scores are by the line)")
    add("--no-context", action="store_true", help="prompts do not give a line's context")
    add("--batch-seconds", type=seconds, default=DECODING["batch_seconds"], help="audio decoded at once")
    add("--max-seconds", type=seconds, default=30.0, help="longest clip accepted; longer is an error")
    add(
        "--max-new-tokens",
        type=data.at_least(1, int),
        default=DECODING["max_new_tokens"],
        help="cap on a text",
    )
    add("--tokens-per-second", type=data.at_least(0), default=DECODING["tokens_per_second"], help="0 = off")

    # scoring
    add("--normalizer", choices=["default", "paper"], default="default", help="by language, or the paper's")
    add("--simplify", action="store_true", help="score traditional Chinese as simplified, both sides")
    add("--cluster", metavar="KEY", help="key of clips that belong together, if not speaker or recording")

    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data go together")
    if (args.language or args.no_context) and not args.model:
        parser.error("--language and --no-context are for decoding, with --model")
    if args.compare and args.out:
        parser.error("--out is for --model and --score; a comparison is stored by --json")
    return args


def main(args):
    rank, world, device = data.setup_distributed()
    if args.out:
        data.check_out(args.out)
    if args.json and not os.path.isdir(os.path.dirname(os.path.abspath(args.json))):
        raise data.InputError(f"--json {args.json}: no such folder; make it first")
    scoring = {"style": args.normalizer, "simplify": args.simplify, "cluster": args.cluster}

    if args.model:
        summaries = decode_and_score(args, scoring, world, device)
    elif rank == 0 and args.score:
        summaries = score_files(args, scoring)
    elif rank == 0:
        compare_results(args, scoring)
    if rank > 0 or args.compare:
        return  # also where a clip failed: torchrun would stop rank 0 before it has printed

    if args.score or args.out or any(summary["scored"] for summary in summaries.values()):
        print_summaries(summaries)
    if args.model and args.out:
        print(f"{world} process(es) on {device.type}; results in {args.out}", flush=True)
    if args.json:
        data.write_json(args.json, summaries)
    n_failed = sum(summary["failed"] for summary in summaries.values())
    if n_failed:
        print(f"eval.py: {n_failed} clip(s) not decoded", file=sys.stderr)
        sys.exit(1)


def decode_and_score(args, scoring, world, device):
    """--model: decodes and scores --data on all ranks. → {stem: summary}."""
    sets = read_sets(args.data, args.max_seconds)
    for clips in sets.values():
        clusters_of(clips, args.cluster)  # a line without its key shows before the model is loaded
    language = data.language_code(args.language) if args.language else None
    speech_lm = model.SpeechLM.from_pretrained(args.model).to(device).eval()
    model.check_languages(languages_of(sets), language, speech_lm)
    decoding = {
        "batch_seconds": args.batch_seconds,
        "default_language": language,
        "with_context": not args.no_context,
        "max_new_tokens": args.max_new_tokens,
        "tokens_per_second": args.tokens_per_second,
    }

    # A warm-up: what happens once, such as loading kernels, does not count in the real-time factor.
    first_clip = next(iter(sets.values()))[0]
    transcribe(speech_lm, [first_clip] * world, device, decoding, "warm-up")
    return evaluate(speech_lm, sets, device, decoding, args.out, scoring=scoring, strict=False)


def score_files(args, scoring):
    """--score: scores result files again. → {stem: summary}."""
    summaries = {}
    for path in args.score:
        stem = pathlib.Path(path).stem
        if stem in summaries:
            raise data.InputError(f"--score: two files have the stem {stem!r}; score them one by one")
        results = score(read_results(path, args.cluster), args.normalizer, args.simplify)
        clusters = [result["cluster"] for result in results]
        summaries[stem] = summarize(results, clusters, args.normalizer, args.simplify)
    if args.out:
        os.makedirs(args.out, exist_ok=True)
        data.write_json(os.path.join(args.out, "summary.json"), summaries)
    return summaries


def compare_results(args, scoring):
    """--compare: prints the comparison of two result files, or of the files of two folders."""
    path_a, path_b = args.compare
    if os.path.isdir(path_a) != os.path.isdir(path_b):
        raise data.InputError(f"--compare: of {path_a} and {path_b} one is a folder; give two of a kind")
    if os.path.isdir(path_a):
        figures = compare_folders(path_a, path_b, **scoring)
        print_comparison(figures)
    else:
        figures = pair_figures(count_set([path_a, path_b], **scoring))
        print_comparison({"sets": {pathlib.Path(path_a).stem: figures}})
    if args.json:
        data.write_json(args.json, figures)


# ----------------------------------------------------------------------------------------------------------
# Decoding
# ----------------------------------------------------------------------------------------------------------


def read_sets(paths, max_seconds):
    """{stem: [Clip]} of manifests (.jsonl, .json) or audio files.

    Raises InputError where two paths have one stem, and for a clip over max_seconds.
    """
    sets = {}
    for path in paths:
        stem = pathlib.Path(path).stem
        if stem in sets:
            raise data.InputError(f"two data sets, and so their results, have the name {stem!r}; rename one")
        is_manifest = path.endswith((".jsonl", ".json"))
        sets[stem] = data.read_manifest(path) if is_manifest else [data.clip_from_file(path)]
        for clip in sets[stem]:
            if clip.duration > max_seconds:
                too_long = f"{clip.duration:.1f} s, over --max-seconds {max_seconds:g}"
                remedy = "split the clip (docs/data.md, Long recordings), or raise it"
                raise data.InputError(f"{clip.where}: {too_long}; {remedy}")
    return sets


def languages_of(sets):
    """{code, or None where a line names none: first clip with it} of all sets, for `check_languages`."""
    languages = {}
    for clips in sets.values():
        for clip in clips:
            languages.setdefault(clip.language, clip)
    return languages


def evaluate(speech_lm, sets, device, decoding, out=None, *, scoring=None, strict=True):
    """Decodes and scores `sets` {stem: [Clip]} on all ranks. → {stem: summary}, see `summarize`.

    decoding: some of the keys of DECODING. scoring: some of style, simplify (`normalize`) and cluster
    (`clusters_of`). Rank 0 writes out/<stem>.jsonl and out/summary.json. Without `out`, the transcripts of a
    set that has no text to compare with are printed. Where a clip cannot be decoded, strict raises
    InputError. Otherwise its result line has "error", and it is counted and printed on stderr.
    """
    rank, _ = data.rank_and_world()
    scoring = dict(scoring or {})
    cluster = scoring.pop("cluster", None)
    clusters = {stem: clusters_of(clips, cluster) for stem, clips in sets.items()}
    summaries = {}
    for stem, clips in sets.items():
        start = time.perf_counter()
        answers = transcribe(speech_lm, clips, device, decoding, stem)
        seconds = time.perf_counter() - start

        results = [result_line(clip, answer, out) for clip, answer in zip(clips, answers)]
        failed = [result for result in results if "error" in result]
        if failed and strict:
            raise data.InputError(failed[0]["error"])
        results = score(results, **scoring)
        summaries[stem] = summarize(results, clusters[stem], **scoring, seconds=seconds)

        if rank == 0 and out:
            os.makedirs(out, exist_ok=True)
            data.add_lines(os.path.join(out, f"{stem}.jsonl"), results, mode="w")
        elif rank == 0 and summaries[stem]["scored"] == 0:
            print_transcripts(results, named=len(sets) > 1 or len(results) > 1)
        if rank == 0:
            for result in failed:
                print(f"eval.py: not decoded: {result['error']}", file=sys.stderr, flush=True)
    if rank == 0 and out:
        data.write_json(os.path.join(out, "summary.json"), summaries)
    return summaries


def transcribe(speech_lm, clips, device, decoding, label):
    """Greedy transcripts: each rank decodes its share, and every rank gets all of them.

    decoding: some of the keys of DECODING. → a dict for each clip, in the order of `clips`: {hyp, stopped},
    or {error} where it cannot be decoded. Batches hold clips of like length, the longest first.
    """
    decoding = {**DECODING, **decoding}
    assert decoding.keys() == DECODING.keys(), f"decoding takes the keys {', '.join(DECODING)}"
    rank, world = data.rank_and_world()
    durations = np.array([clip.duration for clip in clips])
    longest_first = np.argsort(-durations, kind="stable").tolist()
    batches = data.cut_micro_batches(longest_first[rank::world], durations, decoding["batch_seconds"])

    answers = {}  # clip number → answer
    for indices in tqdm(batches, desc=label, disable=rank > 0 or len(batches) < 2, leave=False):
        usable, waveforms, defects = data.load_usable([clips[i] for i in indices])
        unusable = [i for b, i in enumerate(indices) if b not in usable]
        for i, defect in zip(unusable, defects):
            answers[i] = {"error": defect["reason"]}
        if not usable:
            continue

        decoded = [indices[b] for b in usable]
        languages = [clips[i].language for i in decoded]
        contexts = [clips[i].context for i in decoded] if decoding["with_context"] else None
        language = decoding["default_language"]
        batch = data.collate(waveforms, speech_lm.front_end, languages, language, contexts).to(device)
        caps = {key: decoding[key] for key in ("max_new_tokens", "tokens_per_second")}
        rollout = speech_lm.sample(batch, **caps)
        hyps = speech_lm.front_end.texts(rollout)
        for i, hyp, stopped in zip(decoded, hyps, rollout.stopped.tolist()):
            answers[i] = {"hyp": hyp, "stopped": stopped}

    everywhere = {}
    for share in data.gather(answers):
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
            cut = "cut by --max-new-tokens or --tokens-per-second"
            print(f"eval.py: {cut}: {result['audio']}", file=sys.stderr, flush=True)


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
        return data.language_code(fields["language"])
    return data.script_language(fields["text"])


# ----------------------------------------------------------------------------------------------------------
# Scores
# ----------------------------------------------------------------------------------------------------------


def count_errors(reference, hypothesis, language, style="default", simplify=False):
    """{errors, units, substitutions, deletions, insertions} of one clip, counted by jiwer.

    Where the reference has no unit, every unit of the hypothesis is an insertion.
    """
    reference_units = normalize(reference, language, style, simplify)
    hypothesis_units = normalize(hypothesis, language, style, simplify)
    counts = {"substitutions": 0, "deletions": 0, "insertions": len(hypothesis_units)}
    if reference_units:  # jiwer refuses an empty reference
        alignment = jiwer.process_words(" ".join(reference_units), " ".join(hypothesis_units))
        counts = {name: getattr(alignment, name) for name in counts}
    n_errors = sum(counts.values())
    return {"errors": n_errors, "units": len(reference_units), **counts}


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
        if isinstance(text, str) and isinstance(hyp, str) and "error" not in fields:
            fields.update(count_errors(text, hyp, language_of(fields), style, simplify))
        scored.append(fields)
    return scored


def metric_name(languages):
    """WER, CER, or MER where some lines are scored by word and some by character."""
    by_character = {language in CHARACTER_LANGUAGES for language in languages}
    if len(by_character) == 2:
        return "MER"
    return "CER" if by_character == {True} else "WER"


def summarize(results, clusters, style="default", simplify=False, seconds=None):
    """Figures of one set from its scored result lines and the cluster of each line (`clusters_of`).

    value is 100 × Σ errors / Σ units; low, high are its 95 % interval. Lines without text are decoded only.
    seconds: of decoding; rtf is seconds / seconds of audio. docs/scores.md has all keys. What is not defined
    is None.
    """
    decoded = [result for result in results if "error" not in result]
    languages = []
    scored_clusters = []
    rows = []
    for result, cluster in zip(results, clusters, strict=True):
        if "errors" in result:
            languages.append(language_of(result))
            scored_clusters.append(cluster)
            rows.append([result[key] for key in COUNTS])
    counts = np.array(rows, dtype=int).reshape(-1, len(COUNTS))
    total = dict(zip(COUNTS, counts.sum(axis=0).tolist()))
    interval = estimate(cluster_table([scored_clusters], [counts[:, :2]]), rate)  # of errors and units
    names = {normalizer_name(language, style, simplify) for language in languages}
    audio_s = sum(result["duration"] for result in decoded)
    return {
        "metric": metric_name(languages),
        "value": 100 * total["errors"] / total["units"] if total["units"] else None,
        "low": number_or_none(interval.low),
        "high": number_or_none(interval.high),
        **total,
        "n": len(results),
        "scored": len(rows),
        "failed": len(results) - len(decoded),
        "empty": sum(not result["hyp"] for result in decoded),
        "looping": sum(looping(result["hyp"]) for result in decoded),
        "capped": sum(not result["stopped"] for result in decoded),
        "no_language": languages.count(None),
        "hours": audio_s / 3600,
        "normalizer": ", ".join(sorted(names)),
        "rtf": seconds / audio_s if seconds and audio_s else None,
        **cluster_figures(scored_clusters),
    }


# ----------------------------------------------------------------------------------------------------------
# Intervals: the jackknife over clusters
#
# Clips of one speaker are not independent, so what varies by chance is the cluster and not the clip. All
# figures come from one table (..., G, S, C) of counts: G clusters, S sets, and C columns, which are the
# errors of each result file and, last, the reference units. A statistic takes sums over clusters (..., S, C)
# to a number (...), so it can be computed with all clusters and without each. docs/scores.md has the sources.
# ----------------------------------------------------------------------------------------------------------

FEW_CLUSTERS = 12  # with fewer, intervals are rough
ROUNDING = 1e-9  # in % or in ln: a spread below it is the rounding of equal numbers


def clusters_of(clips, key=None):
    """The clusters of clips, as a list of (key, value): clips of one cluster are not independent.

    The key is `key`, or `speaker` if a line has one, else `recording`. Every line must have the key: an
    InputError names the first without. Only a line without `recording` belongs to its audio file instead, or
    to its part of a tar.
    """
    if key is None:
        has_speaker = any(clip.fields.get("speaker") not in (None, "") for clip in clips)
        key = "speaker" if has_speaker else "recording"
    clusters = []
    for clip in clips:
        value = clip.fields.get(key)
        if value not in (None, ""):
            clusters.append((key, str(value)))
        elif key == "recording":
            clusters.append(("audio+offset", (os.path.realpath(clip.audio), clip.offset)))
        else:
            remedy = "give it to every line, or choose another key (eval.py --cluster)"
            raise data.InputError(f'{clip.where}: no "{key}", which intervals are clustered by; {remedy}')
    return clusters


def cluster_figures(clusters):
    """{clusters, cluster_key}: how many different clusters there are, and what they were made of."""
    keys = {key for key, _ in clusters}
    return {"clusters": len(set(clusters)), "cluster_key": ", ".join(sorted(keys)) or None}


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


# Statistics: sums (..., S, C) → (...)


def rate(sums):
    """Error rate in % of one file, of one set."""
    return 100 * sums[..., 0, 0] / sums[..., 0, 1]


def log_errors(sums):
    """Logarithms of the errors of each file, as a mean over sets: (..., S, C) → (..., C − 1).

    All files have the same reference units, so these differ between files as the logarithms of rates do.
    """
    return np.log(sums[..., :-1]).mean(axis=-2)


def log_ratio(sums):
    """L = ln(E_B / E_A) of one set; of several the macro M, which is the mean of L over sets."""
    logs = log_errors(sums)
    return logs[..., 1] - logs[..., 0]


def percent(log_value):
    """The relative change in % that a logarithm of a ratio stands for."""
    return 100 * np.expm1(log_value)


@dataclasses.dataclass
class Estimate:
    """A figure, its standard error, its 95 % interval and its p. What is not defined is NaN."""

    value: float
    se: float
    low: float
    high: float
    p: float


def estimate(table, statistic):
    """The `Estimate` of a statistic from a table (G, S, C), or of many tables, by t of G − 1."""
    value, se = jackknife(table, statistic)
    return t_estimate(value, se, table.shape[-3] - 1)


def jackknife(table, statistic):
    """A statistic and its standard error by leaving out one cluster at a time: (..., G, S, C) → (...), (...).

    SE² = (G − 1)/G Σ_g (θ_(g) − θ)². Both are NaN where the statistic is not defined, with all clusters or
    without one of them. One cluster gives a value only.
    """
    n_clusters = table.shape[-3]
    total = table.sum(axis=-3)
    left_out = total[..., None, :, :] - table
    with np.errstate(divide="ignore", invalid="ignore"):
        value = statistic(total)
        deviations = statistic(left_out) - value[..., None]  # (..., G)
        se = np.sqrt((n_clusters - 1) / max(n_clusters, 1) * (deviations**2).sum(axis=-1))
    se = np.where(se < ROUNDING, 0.0, se)
    if n_clusters < 2:
        se = np.full_like(value, np.nan)
        return np.where(np.isfinite(value), value, np.nan), se
    is_defined = np.isfinite(se)
    return np.where(is_defined, value, np.nan), np.where(is_defined, se, np.nan)


def t_estimate(value, se, df):
    """The `Estimate` by Student's t: value ± t_.975(df) · se, and the two-sided p of the value 0.

    p = 2 (1 − T_df(|value| / se)). With se = 0 it is 1 for the value 0, else NaN.
    """
    half = scipy.special.stdtrit(df, 0.975) * se  # both tails together leave out 5 %
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * scipy.special.stdtr(df, -np.abs(value) / se)
    p_without_spread = np.where(np.abs(value) < ROUNDING, 1.0, np.nan)
    p = np.where(se == 0, p_without_spread, p)
    numbers = [value, se, value - half, value + half, p]
    return Estimate(*(np.asarray(number)[()] for number in numbers))  # [()]: a float where it is one number


def number_or_none(number):
    """A float for JSON, which has no NaN."""
    return None if np.isnan(number) else float(number)


# ----------------------------------------------------------------------------------------------------------
# Comparison of result files
# ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class CountedSet:
    """n clips of one set, counted in C − 1 result files."""

    metric: str
    clusters: list  # (n,) of (key, value)
    counts: np.ndarray  # (n, C): errors in each file, then reference units
    n_left_out: int = 0  # clips that one of the files could not score


def read_results(path, cluster=None):
    """Lines of a result file, with `where`, `cluster`, and `key`, which makes two lines the same clip.

    cluster: see `clusters_of`. A line with a text has the `language` that it is scored in. Raises InputError
    for a line with neither hypothesis nor error.
    """
    clips = data.read_manifest(path)
    results = []
    for clip, name in zip(clips, clusters_of(clips, cluster)):
        fields = clip.fields
        if not isinstance(fields.get("hyp"), str) and "error" not in fields:
            raise data.InputError(f'{clip.where}: neither "hyp" nor "error"; give a result file of eval.py')
        result = {"stopped": True, **fields, "where": clip.where, "cluster": name}
        result["key"] = (os.path.realpath(clip.audio), *clip.key[1:])
        if isinstance(fields.get("text"), str):
            result["language"] = language_of(fields)
        results.append(result)
    return results


def count_set(paths, style="default", simplify=False, cluster=None, strict=True):
    """The `CountedSet` of result files of the same clips, in whatever order their lines are.

    Raises InputError where they do not hold the same clips with the same texts, each once. A clip that was
    not decoded, or has no text, is an error too; with strict=False it is left out and counted.
    """
    files = []  # {key: result} of each file
    for path in paths:
        by_key = {}
        for result in score(read_results(path, cluster), style, simplify):
            if result["key"] in by_key:
                raise data.InputError(f"{result['where']}: {result['audio']} is there twice")
            by_key[result["key"]] = result
        files.append(by_key)
    first = files[0]
    for other, path in zip(files[1:], paths[1:]):
        check_same_clips(first, other, path)
        check_same_clips(other, first, paths[0])

    clusters = []
    languages = []
    rows = []
    for key, result in first.items():
        same_clip = [by_key[key] for by_key in files]
        unscored = [other for other in same_clip if "errors" not in other]
        if unscored and strict:
            defect = "was not decoded, or has no text"
            raise data.InputError(f"{unscored[0]['where']}: {unscored[0]['audio']} {defect}")
        if unscored:
            continue
        clusters.append(result["cluster"])
        languages.append(language_of(result))
        rows.append([*(other["errors"] for other in same_clip), result["units"]])
    counts = np.array(rows, dtype=float).reshape(-1, len(paths) + 1)
    if not counts[:, -1].any():
        raise data.InputError(f"{paths[0]}: no reference has a unit to compare")
    return CountedSet(metric_name(languages), clusters, counts, len(first) - len(rows))


def check_same_clips(results, others, others_path):
    """Raises InputError for the first of `results` {key: result} that has no partner in another file."""
    for key, result in results.items():
        partner = others.get(key, {})
        for name in ("key", "text", "language", "cluster"):
            if partner.get(name) != result.get(name):
                defect = "is not in" if name == "key" else f"has another {name} in"
                raise data.InputError(f"{result['where']}: {result['audio']} {defect} {others_path}")


def result_stems(folder):
    """The stems of the result files in a folder. Raises InputError where there is none."""
    stems = sorted(pathlib.Path(name).stem for name in os.listdir(folder) if name.endswith(".jsonl"))
    if not stems:
        raise data.InputError(f"{folder}: holds no result file (.jsonl); give the --out of eval.py")
    return stems


def compare_folders(folder_a, folder_b, style="default", simplify=False, cluster=None, strict=True):
    """Compares the result files of two folders, paired by name.

    → {"sets": {stem: `pair_figures`}, "macro"}. The macro is the primary figure of several sets: the mean of
    relative changes over `stems`, the sets with two clusters or more, as `change_figures`. Raises InputError
    where a file is in one folder only, or a pair cannot be compared (`count_set`). With strict=False such a
    set is left out instead, as are clips that one side could not score; "left_out" has {stem: reason} then.
    """
    counted = {}
    left_out = {}
    for stem in sorted({*result_stems(folder_a), *result_stems(folder_b)}):
        paths = [os.path.join(folder, f"{stem}.jsonl") for folder in (folder_a, folder_b)]
        try:
            counted[stem] = count_set(paths, style, simplify, cluster, strict)
        except data.InputError as error:
            if strict:
                raise
            left_out[stem] = str(error)
            continue
        if counted[stem].n_left_out:
            left_out[stem] = f"{counted[stem].n_left_out} clip(s) that one side could not score"

    sets = {stem: pair_figures(own) for stem, own in counted.items()}
    stems = [stem for stem in sets if sets[stem]["clusters"] > 1]
    macro = change_figures([counted[stem] for stem in stems]) if stems else {}
    comparison = {"sets": sets, "macro": {"stems": stems, **macro}}
    return comparison if strict else {**comparison, "left_out": left_out}


def pair_figures(counted):
    """Both rates of a `CountedSet` of two files in %, their difference in points, and `change_figures`."""
    errors_a, errors_b, units = counted.counts.sum(axis=0).tolist()
    return {
        "metric": counted.metric,
        "a": 100 * errors_a / units,
        "b": 100 * errors_b / units,
        "difference": 100 * (errors_b - errors_a) / units,
        **change_figures([counted]),
    }


def change_figures(sets):
    """The relative change of B against A over one or several `CountedSet`, None where it is not defined.

    n clips; relative = 100 (e^L − 1) with relative_low, relative_high and p, where L is `log_ratio`, and a
    cluster leaves all sets at once; `cluster_figures`.
    """
    clusters = [counted.clusters for counted in sets]
    change = estimate(cluster_table(clusters, [counted.counts for counted in sets]), log_ratio)
    return {
        "n": sum(map(len, clusters)),
        "relative": number_or_none(percent(change.value)),
        "relative_low": number_or_none(percent(change.low)),
        "relative_high": number_or_none(percent(change.high)),
        "p": number_or_none(change.p),
        **cluster_figures(sum(clusters, [])),
    }


# ----------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------


def print_summaries(summaries):
    """Prints the summaries {stem: summary} as a table, their normalisers, and their clusters."""
    rows = []
    for stem, s in summaries.items():
        row = [stem, s["metric"], s["value"], interval_text(s["low"], s["high"])]
        row += [s[key] for key in ("substitutions", "deletions", "insertions", "n")]
        row.append(number_text(s["hours"], ".3f"))
        row += [s[key] for key in ("empty", "looping", "capped", "failed")]
        row.append(number_text(s["rtf"], ".4f"))
        rows.append(row)
    header = ["set", "metric", "%", "95 %", "S", "D", "I", "clips", "hours"]
    print_table(rows, [*header, "empty", "loops", "capped", "failed", "RTF"])

    names = {summary["normalizer"] or "none" for summary in summaries.values()}
    tqdm.write("normalizer: " + "; ".join(sorted(names)))
    for stem, summary in summaries.items():
        if summary["no_language"]:
            reason = "neither a language nor a script that decides one"
            tqdm.write(f"{stem}: {summary['no_language']} line(s) with {reason}, scored as plain words")
    print_clusters(summaries)


def print_comparison(comparison, name_a="A", name_b="B"):
    """Prints a comparison (`compare_folders`) as a table: both rates, the change, its 95 % interval and p.

    With several sets the last row is the macro, the primary figure. Lines below say what was clustered, where
    intervals are rough, and what was left out. name_a, name_b: what the two sides are called in the header.
    """
    sets = comparison["sets"]
    figures = dict(sets)
    macro = comparison.get("macro", {"stems": list(sets)})
    if macro["stems"] and len(sets) > 1:
        figures["macro"] = macro
    rows = []
    for name, own in figures.items():
        interval = interval_text(own["relative_low"], own["relative_high"], "+.1f")
        change = [number_text(own["relative"], "+.1f", " %"), interval, p_text(own["p"])]
        rows.append([name, own.get("metric"), own["n"], own.get("a"), own.get("b"), *change])
    if rows:
        print_table(rows, ["set", "metric", "clips", f"{name_a} %", f"{name_b} %", "change", "95 %", "p"])
        print_clusters(figures)
    one_cluster = [stem for stem in sets if stem not in macro["stems"]]
    if one_cluster and len(sets) > 1:
        tqdm.write(f"not in the macro, because they have one cluster: {', '.join(one_cluster)}")
    for stem, reason in comparison.get("left_out", {}).items():
        tqdm.write(f"{stem}: left out: {reason}")


def print_clusters(figures):
    """Prints in a line how many clusters {name: figures} have, and warns where they are few."""
    texts = []
    few = []
    for name, own in figures.items():
        if own["clusters"]:
            texts.append(f"{name} {own['clusters']} by {own['cluster_key']}")
        if 0 < own["clusters"] < FEW_CLUSTERS:
            few.append(name)
    if texts:
        tqdm.write(f"clusters: {'; '.join(texts)}")
    if few:
        tqdm.write(f"fewer than {FEW_CLUSTERS} clusters, so intervals are rough: {', '.join(few)}")


def number_text(number, form, unit=""):
    """A number in a format, with its unit; a dash where it is not defined."""
    return "–" if number is None or np.isnan(number) else f"{number:{form}}{unit}"


def interval_text(low, high, form=".2f"):
    return "–" if low is None or np.isnan(low) else f"{low:{form}} to {high:{form}}"


def p_text(p):
    return "<0.0001" if p is not None and p < 0.0001 else number_text(p, ".4f")


def print_table(rows, header):
    """Prints rows of cells: numbers with a fraction to two places, None and NaN as a dash."""
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
    return number_text(cell, ".2f") if cell is None or isinstance(cell, float) else str(cell)


if __name__ == "__main__":
    data.run_script(main, parse_args())
