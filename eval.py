"""Decode manifests greedily and score them: WER for words, CER for characters, with 95 % intervals.

    python eval.py --model example/teacher --data example/en-clean.jsonl example/zh-read.jsonl --out runs/t
    torchrun --nproc_per_node=8 eval.py --model DIR --data test.jsonl --out runs/x    # clips split over ranks
    python eval.py --model DIR --data clip.flac                                       # prints the transcript
    python eval.py --score runs/x/*.jsonl --normalizer paper                          # rescores, no model
    python eval.py --compare runs/x/test.jsonl runs/y/test.jsonl                      # paired bootstrap

--model writes OUT/<stem>.jsonl (the manifest's fields plus hyp, stopped, errors, units, substitutions,
deletions, insertions) and OUT/summary.json, and prints a table with a row for each set. A hypothesis that the
length cap cut has "stopped": false. A result file is a manifest: `sft.py --text-field hyp` learns from it.

A clip that cannot be decoded has "error" in place of hyp, is counted as failed, and makes the exit status 1.
Decoding takes about its real-time factor (RTF in the table) times the audio; scoring takes seconds.
"""

import functools
import importlib.metadata
import os
import re
import sys
import time
import unicodedata
import zlib

import jiwer
import numpy as np
import opencc
from tqdm import tqdm
from whisper_normalizer.english import EnglishTextNormalizer

from data import (
    InputError,
    add_lines,
    argument_parser,
    at_least,
    clip_from_file,
    collate,
    gather,
    language_code,
    load_usable,
    micro_batches,
    rank_and_world,
    read_manifest,
    run_script,
    script_language,
    setup_distributed,
    write_json,
)
from model import SpeechLM, check_languages

MAX_NEW_TOKENS = 800
TOKENS_PER_SECOND = 25.0  # fast Greek and Hindi need 22

COUNTS = ("errors", "units", "substitutions", "deletions", "insertions")
RESULT_KEYS = ("hyp", "stopped", "error", *COUNTS)  # what a result line adds to the manifest's fields


def parse_args(argv=None):
    parser = argument_parser("eval.py", __doc__)
    add = parser.add_argument

    # task
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--model", help="student or teacher, folder or hub name: decode and score --data")
    task.add_argument("--score", nargs="+", metavar="hyps.jsonl", help="score result files, without a model")
    task.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two result files of the same clips")
    add("--data", nargs="+", default=[], help="manifests (.jsonl) or audio files, with --model")
    add("--out", help="new folder for result files and summary.json; without it results are only printed")

    # decoding
    add("--language", help="language in the prompt of clips whose line names none (scores are by the line)")
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
    add("--bootstrap", type=at_least(0, int), default=10_000, help="draws for intervals and p; 0 = none")

    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data go together")
    if args.language and not args.model:
        parser.error("--language is for decoding, with --model")
    if args.compare and (args.out or not args.bootstrap):
        parser.error("--compare prints only, and needs --bootstrap draws")
    return args


def main(args):
    rank, world, device = setup_distributed()
    if args.out and os.path.isdir(args.out) and os.listdir(args.out):
        raise InputError(f"--out {args.out} is not empty: choose a new folder")
    if args.model:
        decode_and_score(args, rank, world, device)
    elif rank > 0:
        return  # one process is enough for result files
    elif args.score:
        score_files(args)
    else:
        compare_files(args)


def decode_and_score(args, rank, world, device):
    """--model: decodes and scores --data on all ranks."""
    # ---- data and model --------------------------------------------------------------------------------
    sets = read_sets(args.data, args.max_seconds)
    default_language = language_code(args.language) if args.language else None
    model = SpeechLM.from_pretrained(args.model).to(device).eval()
    check_languages(languages_of(sets), default_language, model)
    decoding = {
        "default_language": default_language,
        "max_new_tokens": args.max_new_tokens,
        "tokens_per_second": args.tokens_per_second,
    }

    # ---- warm-up ---------------------------------------------------------------------------------------
    # What happens once, such as loading kernels, does not count in the real-time factor.
    first_clip = next(iter(sets.values()))[0]
    transcribe(model, [first_clip] * world, device, args.batch_seconds, "warm-up", **decoding)

    # ---- decode and score ------------------------------------------------------------------------------
    summaries = evaluate(
        model,
        sets,
        device,
        args.batch_seconds,
        args.out,
        style=args.normalizer,
        simplify=args.simplify,
        draws=args.bootstrap,
        strict=False,
        **decoding,
    )

    # ---- report ----------------------------------------------------------------------------------------
    if rank > 0:
        return  # also where a clip failed: torchrun would stop rank 0 before it has printed
    n_scored = sum(summary["scored"] for summary in summaries.values())
    n_failed = sum(summary["failed"] for summary in summaries.values())
    if args.out or n_scored:
        print_summaries(summaries)
        where = f"; results in {args.out}" if args.out else ""
        print(f"{world} process(es) on {device.type}{where}", flush=True)
    if n_failed:
        print(f"eval.py: {n_failed} clip(s) not decoded", file=sys.stderr)
        sys.exit(1)


def score_files(args):
    """--score: scores result files again."""
    summaries = {}
    for path in args.score:
        stem = stem_of(path)
        if stem in summaries:
            raise InputError(f"--score: two files have the stem {stem!r}; score them one by one")
        results = score(read_results(path), args.normalizer, args.simplify)
        summaries[stem] = summarize(results, args.normalizer, args.simplify, args.bootstrap)
    if args.out:
        os.makedirs(args.out, exist_ok=True)
        write_json(os.path.join(args.out, "summary.json"), summaries)
    print_summaries(summaries)


def compare_files(args):
    """--compare: the difference of two result files."""
    path_a, path_b = args.compare
    results_a = score(read_results(path_a), args.normalizer, args.simplify)
    results_b = score(read_results(path_b), args.normalizer, args.simplify)
    c = compare(results_a, results_b, args.bootstrap)
    interval = None if c["low"] is None else f"{c['low']:.2f} to {c['high']:.2f}"
    p = None if c["p"] is None else f"{c['p']:.4f}"
    header = ["metric", "clips", "A %", "B %", "B − A", "95 %", "p"]
    print_table([[c["metric"], c["n"], c["a"], c["b"], c["difference"], interval, p]], header)
    if c["reason"]:
        print(f"neither interval nor p: {c['reason']}")


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
                raise InputError(f"{clip.where}: {too_long}; split the clip or raise it")
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
    batch_seconds,
    out=None,
    *,
    default_language=None,
    max_new_tokens=MAX_NEW_TOKENS,
    tokens_per_second=TOKENS_PER_SECOND,
    style="default",
    simplify=False,
    draws=10_000,
    strict=True,
):
    """Decodes and scores `sets` {stem: [Clip]} on all ranks. → {stem: summary}, see `summarize`.

    Rank 0 writes out/<stem>.jsonl and out/summary.json. Without `out`, the transcripts of a set that has no
    text to compare with are printed. Where a clip cannot be decoded, strict raises InputError; else its
    result line has "error", and it is counted and printed on stderr.
    """
    rank, _ = rank_and_world()
    summaries = {}
    for stem, clips in sets.items():
        start = time.perf_counter()
        answers = transcribe(
            model, clips, device, batch_seconds, stem, default_language, max_new_tokens, tokens_per_second
        )
        seconds = time.perf_counter() - start

        results = [result_line(clip, answer, out) for clip, answer in zip(clips, answers)]
        failed = [result for result in results if "error" in result]
        if failed and strict:
            raise InputError(failed[0]["error"])
        results = score(results, style, simplify)
        summaries[stem] = summarize(results, style, simplify, draws, seconds)

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
):
    """Greedy transcripts: each rank decodes its share, and every rank gets all of them.

    → a dict for each clip, in the order of `clips`: {hyp, stopped}, or {error} where it cannot be decoded.
    Batches hold clips of like length, at most batch_seconds of audio, the longest first.
    """
    rank, world = rank_and_world()
    durations = np.array([clip.duration for clip in clips])
    longest_first = np.argsort(-durations, kind="stable").tolist()
    batches = micro_batches(longest_first[rank::world], durations, batch_seconds)

    answers = {}  # clip number → answer
    for indices in tqdm(batches, desc=label, disable=rank > 0 or len(batches) < 2, leave=False):
        usable, waveforms, defects = load_usable([clips[i] for i in indices])
        unusable = [i for b, i in enumerate(indices) if b not in usable]
        for i, defect in zip(unusable, defects):
            answers[i] = {"error": defect["reason"]}
        if not usable:
            continue

        languages = [clips[indices[b]].language for b in usable]
        batch = collate(waveforms, model.front_end, languages, default_language).to(device)
        rollout = model.sample(batch, max_new_tokens, k=1, tokens_per_second=tokens_per_second)
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


def summarize(results, style="default", simplify=False, draws=10_000, seconds=None):
    """Figures of one set from its scored result lines.

    metric: WER, CER, or MER where some lines are scored by word and some by character.
    value: 100 × Σ errors / Σ units; low, high: its 95 % bootstrap interval. Lines without text are decoded
    only. n, scored, failed, empty, looping, capped are clips; no_language are those scored by word because
    neither a language nor the script says more. seconds: of decoding; rtf is seconds / seconds of audio.
    """
    decoded = [result for result in results if "error" not in result]
    scored = [result for result in decoded if "errors" in result]
    languages = [language_of(result) for result in scored]
    names = {normalizer_name(language, style, simplify) for language in languages}
    by_character = {language in CHARACTER_LANGUAGES for language in languages}
    if len(by_character) == 2:
        metric = "MER"
    else:
        metric = "CER" if by_character == {True} else "WER"

    total = dict.fromkeys(COUNTS, 0)
    for result in scored:
        for key in COUNTS:
            total[key] += result[key]
    errors = [result["errors"] for result in scored]
    units = [result["units"] for result in scored]
    low, high = bootstrap(errors, units, draws)

    audio_s = sum(result["duration"] for result in decoded)
    return {
        "metric": metric,
        "value": 100 * total["errors"] / total["units"] if total["units"] else None,
        "low": low,
        "high": high,
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
    }


def bootstrap(errors, units, draws, seed=0):
    """95 % percentile interval (low, high) of 100 × Σ errors / Σ units, utterances drawn with replacement.

    Draws without a unit do not count; (None, None) where there is no unit, or no draw, at all.
    """
    if draws == 0 or sum(units) == 0:
        return None, None
    sums = resampled_sums(np.stack([errors, units], axis=1), draws, seed)
    sums = sums[sums[:, 1] > 0]
    if len(sums) == 0:
        return None, None
    low, high = np.percentile(100 * sums[:, 0] / sums[:, 1], [2.5, 97.5])
    return float(low), float(high)


def resampled_sums(table, draws, seed):
    """(draws, c): column sums of a table (n, c) whose rows are drawn n times with replacement."""
    rng = np.random.default_rng(seed)
    table = np.asarray(table, dtype=np.float64)
    n = len(table)
    sums = np.empty((draws, table.shape[1]))
    for i in range(draws):
        how_often = np.bincount(rng.integers(n, size=n), minlength=n)
        sums[i] = how_often @ table
    return sums


# ----------------------------------------------------------------------------------------------------------
# Comparison of two result files
# ----------------------------------------------------------------------------------------------------------


def read_results(path):
    """Lines of a result file, each with `key`, which makes two lines the same clip, and `where`.

    Raises InputError for a line with neither hypothesis nor error.
    """
    results = []
    for clip in read_manifest(path):
        fields = clip.fields
        if not isinstance(fields.get("hyp"), str) and "error" not in fields:
            raise InputError(f'{clip.where}: neither "hyp" nor "error"; give a result file of eval.py')
        key = (os.path.realpath(clip.audio), *clip.key[1:])
        results.append({"stopped": True, **fields, "where": clip.where, "key": key})
    return results


def compare(results_a, results_b, draws=10_000, seed=0):
    """Paired bootstrap of two systems over the same clips, in whatever order their lines are.

    → metric; n clips; a and b (%); difference = b − a (points); low and high of its 95 % interval; p,
    two-sided: twice the smaller share of draws with a difference ≤ 0 or ≥ 0, as (count + 1) / (draws + 1),
    at most 1; and the reason where interval and p are None.

    Raises InputError where the files do not hold the same clips with the same texts, each once and decoded.
    """
    by_key_a = {result["key"]: result for result in results_a}
    by_key_b = {result["key"]: result for result in results_b}
    check_pairs(results_a, by_key_a, by_key_b)
    check_pairs(results_b, by_key_b, by_key_a)
    rows = [(a["errors"], by_key_b[a["key"]]["errors"], a["units"]) for a in results_a]
    table = np.array(rows, dtype=np.float64)  # (n, 3): errors of A, errors of B, units
    errors_a, errors_b, units = table.sum(axis=0).tolist()
    if units == 0:
        raise InputError("--compare: no reference has a unit to compare")

    comparison = {
        "metric": summarize(results_a, draws=0)["metric"],
        "n": len(table),
        "a": 100 * errors_a / units,
        "b": 100 * errors_b / units,
        "difference": 100 * errors_b / units - 100 * errors_a / units,
        "low": None,
        "high": None,
        "p": None,
        "reason": None,
    }
    if len(table) < 2:
        comparison["reason"] = "they need two clips or more"
        return comparison

    sums = resampled_sums(table, draws, seed)
    sums = sums[sums[:, 2] > 0]
    if len(sums) == 0:
        comparison["reason"] = "no draw has a unit; raise --bootstrap"
        return comparison
    differences = 100 * (sums[:, 1] - sums[:, 0]) / sums[:, 2]
    low, high = np.percentile(differences, [2.5, 97.5])
    smaller = min((differences <= 0).sum(), (differences >= 0).sum())
    comparison["low"] = float(low)
    comparison["high"] = float(high)
    comparison["p"] = float(min(1.0, 2 * (smaller + 1) / (len(differences) + 1)))
    return comparison


def check_pairs(results, own, other):
    """Raises InputError for the first line of one file that has no partner in the other.

    own, other: {key: result} of this file and of the other.
    """
    for result in results:
        partner = other.get(result["key"])
        defect = None
        if own[result["key"]] is not result:
            defect = "is there twice"
        elif "errors" not in result or "error" in result:
            defect = "was not decoded, or has no text"
        elif partner is None:
            defect = "is in one of the files only"
        elif partner.get("text") != result["text"] or language_of(partner) != language_of(result):
            defect = "has another text or language in the other"
        if defect:
            raise InputError(f"--compare: {result['where']}: {result['audio']} {defect}")


# ----------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------

SUMMARY_HEADER = ["set", "metric", "%", "95 %", "S", "D", "I", "clips", "hours"]
SUMMARY_HEADER += ["empty", "loops", "capped", "failed", "RTF"]


def print_summaries(summaries):
    """Prints the summaries {stem: summary} as a table, and what each set was normalised by."""
    rows = []
    for stem, s in summaries.items():
        interval = None if s["low"] is None else f"{s['low']:.2f}–{s['high']:.2f}"
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
