"""Decode manifests greedily and score them: WER for words, CER for characters, with 95 % intervals.

    python eval.py --model example/teacher --data example/en-clean.jsonl example/zh-read.jsonl --out runs/t
    torchrun --nproc_per_node=8 eval.py --model DIR --data test.jsonl --out runs/x    # clips split over ranks
    python eval.py --model DIR --data clip.flac                                       # prints the transcript
    python eval.py --score runs/x/*.jsonl --normalizer paper                          # rescores, no model
    python eval.py --compare runs/x/test.jsonl runs/y/test.jsonl                      # paired bootstrap

--model writes OUT/<stem>.jsonl (the manifest's fields plus hyp, stopped, errors, units, substitutions,
deletions, insertions) and OUT/summary.json. A result file is itself a manifest: `sft.py --text-field hyp`
learns from it. A clip that cannot be read has "error" in place of hyp and makes the exit status 1 in the end.
"""
import functools
import importlib.metadata
import os
import re
import sys
import time
import unicodedata
import zlib
from unicodedata import category

import jiwer
import numpy as np
import opencc
from tqdm import tqdm
from whisper_normalizer.english import EnglishTextNormalizer

from data import (InputError, Parser, add_lines, at_least, clip_from_file, collate, gather, language_code,
                  load_or_note, micro_batches, rank_and_world, read_manifest, run_script,
                  script_language, setup_distributed, write_json)
from model import SpeechLM, check_languages

MAX_NEW_TOKENS = 256                                      # cap of a transcript
COUNTS = ("errors", "units", "substitutions", "deletions", "insertions")
RESULT_KEYS = ("hyp", "stopped", "error", *COUNTS)          # what a result line adds to the manifest's fields
CHARACTER_LANGUAGES = ("zh", "yue", "ja", "th", "ko")     # scored by character; every other language by word
VARIATION = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]")       # selectors of a character's glyph
english = EnglishTextNormalizer()
simplifier = functools.cache(lambda: opencc.OpenCC("t2s"))

# ---- Scoring -----------------------------------------------------------------------------------------------
def normalize(text, language, style="default", simplify=False):
    """The units that are compared: a list of words, or of characters for CHARACTER_LANGUAGES. First, format
    characters, variation selectors and enclosing marks go. default, en: NFKC, then Whisper's English
    normaliser; default, others: NFKC, lower case, punctuation and symbols as blanks. paper: lower case,
    punctuation and symbols deleted. Characters are taken without blanks, Latin words in Chinese text letter
    by letter. Traditional characters stay unless `simplify`."""
    text = "".join(c for c in text if category(c) not in ("Cf", "Me") and not VARIATION.match(c))
    if style == "default":
        text = unicodedata.normalize("NFKC", text)
        if language == "en":                    # Whisper's knows neither the curly apostrophe nor "Wait..."
            text = re.sub(r"\.{2,}", " ", text.replace("’", "'"))
            closed = max(map(text.rfind, ")]>")) + 1        # what nothing closes would take it quadratic time
            text = " ".join((text[:closed] + re.sub(r"[(\[<]", " ", text[closed:])).split())
            return english(re.sub(r"(\d{4000})(?=\d)", r"\1 ", text)).split()     # Python's limit on integers
    blank = " " if style == "default" else ""
    text = "".join(blank if category(c)[0] in "PS" else " " if category(c) in ("Zs", "Zl", "Zp", "Cc") else c
                   for c in text.lower())
    if language not in CHARACTER_LANGUAGES:
        return text.split()
    text = text.replace(" ", "")
    return list(simplifier().convert(text) if simplify and language in ("zh", "yue") else text)

def normalizer_name(language, style="default", simplify=False):
    """Name and version of what `normalize` does; a change of its results changes the version."""
    name = ("paper/1" if style == "paper" else "zh/1" if language in CHARACTER_LANGUAGES else "words/1"
            if language != "en" else f"en/1-whisper-{importlib.metadata.version('whisper-normalizer')}")
    return name + ("+t2s" if simplify and language in ("zh", "yue") else "")

def count_errors(reference, hypothesis, language, style="default", simplify=False):
    """{errors, units, substitutions, deletions, insertions} of a clip, by jiwer; no reference: insertions."""
    ref, hyp = (normalize(text, language, style, simplify) for text in (reference, hypothesis))
    if ref:
        m = jiwer.process_words(" ".join(ref), " ".join(hyp))
        s, d, i = m.substitutions, m.deletions, m.insertions
    else:
        s, d, i = 0, 0, len(hyp)                                # jiwer refuses an empty reference
    return dict(errors=s + d + i, units=len(ref), substitutions=s, deletions=d, insertions=i)

def looping(text):
    """Whisper's sign of a repetition loop: the UTF-8 text compresses by more than 2.4."""
    raw = text.encode()
    return len(raw) > 2.4 * len(zlib.compress(raw))

def resampled_sums(table, draws, seed):
    """(draws, c): column sums of a table (n, c) whose rows are drawn n times with replacement."""
    rng, table = np.random.default_rng(seed), np.asarray(table, dtype=np.float64)
    n = len(table)
    return np.stack([np.bincount(rng.integers(n, size=n), minlength=n) @ table for _ in range(draws)])

def bootstrap(errors, units, draws, seed=0):
    """95 % percentile interval (low, high) of 100 × Σ errors / Σ units, utterances drawn with replacement.
    Draws without a unit do not count; (None, None) where there is no unit, or no draw, at all."""
    if not draws or not sum(units):
        return None, None
    sums = resampled_sums(np.stack([errors, units], axis=1), draws, seed)
    rates = [100 * errors / units for errors, units in sums if units]
    return tuple(map(float, np.percentile(rates, [2.5, 97.5]))) if rates else (None, None)

def language_of(fields):
    """Language code that a result line is scored in: its `language`, else the script of its text, else en."""
    return language_code(fields.get("language")) or script_language(fields["text"]) or "en"

def score(results, style="default", simplify=False):
    """Result lines with their error counts, those that have a text and a hypothesis."""
    plain = [{key: value for key, value in r.items() if key not in COUNTS} for r in results]
    return [{**r, **count_errors(r["text"], r["hyp"], language_of(r), style, simplify)}
            if isinstance(r.get("hyp"), str) and isinstance(r.get("text"), str) else r for r in plain]

def summarize(results, style="default", simplify=False, draws=10_000, seconds=None):
    """Corpus figures of one set from its scored lines: value = 100 × Σ errors / Σ units, low–high its 95 %
    bootstrap interval. Clips without text are decoded only. `seconds`: decoding time, for the RTF."""
    scored, heard = ([r for r in results if key in r and "error" not in r] for key in ("errors", "hyp"))
    languages = {language_of(r) for r in scored}
    kinds = {language in CHARACTER_LANGUAGES for language in languages}
    total = {key: sum(r[key] for r in scored) for key in COUNTS}
    low, high = bootstrap([r["errors"] for r in scored], [r["units"] for r in scored], draws)
    audio_s = sum(r["duration"] for r in heard)
    return dict(metric="MER" if len(kinds) == 2 else "CER" if kinds == {True} else "WER",
                value=100 * total["errors"] / total["units"] if total["units"] else None, low=low, high=high,
                **total, n=len(results), scored=len(scored), failed=len(results) - len(heard),
                empty=sum(not r["hyp"] for r in heard), looping=sum(looping(r["hyp"]) for r in heard),
                capped=sum(not r["stopped"] for r in heard), hours=audio_s / 3600,
                normalizer=", ".join(sorted({normalizer_name(x, style, simplify) for x in languages})),
                rtf=seconds / audio_s if seconds and audio_s else None)

def read_results(path):
    """Lines of a result file, each with `key`, what makes two lines the same clip, and `where`."""
    results = []
    for clip in read_manifest(path):
        if not isinstance(clip.fields.get("hyp"), str) and "error" not in clip.fields:
            raise InputError(f'{clip.where}: neither "hyp" nor "error"; give a result file of eval.py')
        results.append({"stopped": True, **clip.fields, "where": clip.where,
                        "key": (os.path.realpath(clip.audio), *clip.key[1:])})
    return results

def compare(results_a, results_b, draws=10_000, seed=0):
    """Paired bootstrap of two systems over the same clips, in whatever order. → dict: metric, n, a, b (%),
    difference = b − a (points), low–high its 95 % interval, and p, two-sided: twice the smaller share of
    draws with a difference ≤ 0 or ≥ 0, (count + 1) / (draws + 1), at most 1. Raises InputError where the
    files do not hold the same clips with the same texts, each once and decoded."""
    by_key_a, by_key_b = ({r["key"]: r for r in results} for results in (results_a, results_b))
    for results, own, other in ((results_a, by_key_a, by_key_b), (results_b, by_key_b, by_key_a)):
        for r in results:
            wrong = ("is there twice" if own[r["key"]] is not r else "was not decoded, or has no text"
                     if "errors" not in r else "is in one of the files only" if r["key"] not in other
                     else "has another text or language in the other"
                     if any(other[r["key"]].get(x) != r.get(x) for x in ("text", "language")) else None)
            if wrong:
                raise InputError(f"--compare: {r['where']}: {r['audio']} {wrong}")
    table = np.array([(r["errors"], by_key_b[r["key"]]["errors"], r["units"]) for r in results_a])
    summary = summarize(results_a, draws=0)
    if not summary["units"]:
        raise InputError("--compare: no reference has a unit to compare")
    a, b = 100 * table[:, :2].sum(axis=0) / table[:, 2].sum()
    sums = resampled_sums(table, draws, seed)
    sums = sums[sums[:, 2] > 0]
    differences = 100 * (sums[:, 1] - sums[:, 0]) / sums[:, 2]
    low, high = np.percentile(differences, [2.5, 97.5])
    shares = ((differences <= 0).sum() + 1, (differences >= 0).sum() + 1)
    return dict(metric=summary["metric"], n=len(table), a=float(a), b=float(b), difference=float(b - a),
                low=float(low), high=float(high), p=float(min(1.0, 2 * min(shares) / (len(differences) + 1))))

def print_table(rows, header):
    rows = [header, *[["–" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell)
                       for cell in row] for row in rows]]
    widths = [max(len(row[c]) for row in rows) for c in range(len(header))]
    for row in rows:
        tqdm.write("  ".join(cell.ljust(w) if c == 0 else cell.rjust(w)       # beside a bar, if one is there
                             for c, (cell, w) in enumerate(zip(row, widths))))

def print_summaries(summaries):
    print_table(
        [[stem, s["metric"], s["value"], None if s["low"] is None else f"{s['low']:.2f}–{s['high']:.2f}",
          *(s[key] for key in ("substitutions", "deletions", "insertions", "n")), f"{s['hours']:.3f}",
          *(s[key] for key in ("empty", "looping", "capped", "failed")),
          None if s["rtf"] is None else f"{s['rtf']:.4f}"] for stem, s in summaries.items()],
        "set|metric|%|95 %|S|D|I|clips|hours|empty|loops|capped|failed|RTF".split("|"))
    tqdm.write("normalizer: " + "; ".join(sorted({s["normalizer"] or "none" for s in summaries.values()})))

# ---- Decoding ----------------------------------------------------------------------------------------------
def transcribe(model, clips, device, batch_seconds, label="decode", max_new_tokens=MAX_NEW_TOKENS,
               tokens_per_second=8.0):
    """Greedy transcripts of this rank's share of the clips, longest first, one batch of audio in memory; all
    ranks get all of them, in order. → result dicts as many as `clips`: hyp and stopped, or error."""
    rank, world = rank_and_world()
    durations = np.array([clip.duration for clip in clips])
    mine = np.argsort(-durations, kind="stable")[rank::world].tolist()
    found = {}
    batches = micro_batches(mine, durations, batch_seconds)
    for indices in tqdm(batches, desc=label, disable=rank > 0 or len(batches) < 2, leave=False):
        bad = []
        waveforms = [load_or_note(clips[i], bad) for i in indices]
        batch = collate(waveforms, model.front_end, [clips[i].language for i in indices])
        rollout = model.sample(model.with_languages(batch.to(device)), max_new_tokens, k=1,
                               tokens_per_second=tokens_per_second)
        for i, hyp, stopped in zip(indices, model.front_end.texts(rollout), rollout.stopped.tolist()):
            found[i] = {"hyp": hyp, "stopped": stopped}
        failed = [i for i, waveform in zip(indices, waveforms) if not len(waveform)]
        found.update({i: {"error": entry["reason"]} for i, entry in zip(failed, bad)})
    found = {i: value for share in gather(found) for i, value in share.items()}
    return [found[i] for i in range(len(clips))]

def evaluate(model, sets, device, batch_seconds, out=None, style="default", simplify=False, draws=10_000,
             strict=True, **caps):
    """Decodes and scores `sets` {stem: [Clip]}. → {stem: summary};
    rank 0 writes result files and summary.json to `out`. `strict`: an undecodable clip is an InputError."""
    summaries, writes = {}, out is not None and rank_and_world()[0] == 0
    for stem, clips in sets.items():
        results, start = [], time.perf_counter()
        for clip, found in zip(clips, transcribe(model, clips, device, batch_seconds, stem, **caps)):
            if strict and "error" in found:
                raise InputError(found["error"])
            fields = {key: value for key, value in clip.fields.items() if key not in RESULT_KEYS}
            if out is not None:                     # so that the result file is a manifest where it lies
                fields["audio"] = os.path.relpath(os.path.realpath(clip.audio), os.path.realpath(out))
            results.append({**fields, **found})
        seconds = time.perf_counter() - start
        results = score(results, style, simplify)
        summaries[stem] = summarize(results, style, simplify, draws, seconds)
        if writes:
            os.makedirs(out, exist_ok=True)
            add_lines(os.path.join(out, f"{stem}.jsonl"), results, "w")
        for r in results if rank_and_world()[0] == 0 else ():
            if "error" in r:
                print(f"eval.py: not decoded: {r['error']}", file=sys.stderr, flush=True)
            elif out is None and not summaries[stem]["scored"]:         # just read it
                print(r["hyp"] if len(sets) == len(results) == 1 else f"{r['audio']}\t{r['hyp']}")
    if writes:
        write_json(os.path.join(out, "summary.json"), summaries)
    return summaries

def read_sets(paths, max_seconds):
    """{stem: [Clip]} of manifests or audio files. InputError on equal stems and clips over max_seconds."""
    sets = {}
    for path in paths:
        stem = os.path.splitext(os.path.basename(path))[0]
        if stem in sets:
            raise InputError(f"two data sets have the stem {stem!r}, and so would their results; rename one")
        sets[stem] = read_manifest(path) if path.endswith((".jsonl", ".json")) else [clip_from_file(path)]
        for clip in sets[stem]:
            if clip.duration > max_seconds:
                raise InputError(f"{clip.where}: {clip.duration:.1f} s, over --max-seconds {max_seconds:g}; "
                                 "split the clip or raise it")
    return sets

# ---- Command -----------------------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = Parser(prog="eval.py", description=__doc__)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--model", help="student or teacher, folder or hub name: decode and score --data")
    task.add_argument("--score", nargs="+", metavar="hyps.jsonl", help="score result files, without a model")
    task.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two result files of the same clips")
    add = parser.add_argument
    add("--data", nargs="+", default=[], help="manifests (.jsonl) or audio files, with --model")
    add("--out", help="folder for result files and summary.json; without it results are only printed")
    add("--overwrite", action="store_true", help="replace the results that --out holds")
    add("--normalizer", choices=["default", "paper"], default="default", help="by language, or the paper's")
    add("--simplify", action="store_true", help="score traditional Chinese as simplified, both sides")
    add("--bootstrap", type=at_least(0, int), default=10_000, help="draws for intervals and p; 0 = none")
    add("--batch-seconds", type=at_least(0.01), default=600.0, help="seconds of audio decoded at once")
    add("--max-seconds", type=at_least(0.01), default=30.0, help="longest clip accepted; longer is an error")
    add("--max-new-tokens", type=at_least(1, int), default=MAX_NEW_TOKENS, help="cap on a transcript")
    add("--tokens-per-second", type=at_least(0), default=8.0, help="a cap: this × seconds + 16; 0 = off")
    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data go together")
    if args.compare and (args.out or not args.bootstrap):
        parser.error("--compare prints only, and needs --bootstrap draws")
    return args

def main(args):
    style = dict(style=args.normalizer, simplify=args.simplify)
    rank, world, device = setup_distributed()
    # ---- result files: one process is enough ---------------------------------------------------------------
    if rank > 0 and not args.model:
        return
    for path in args.data if args.out is not None else ():
        if os.path.realpath(path) == os.path.realpath(os.path.join(args.out, os.path.basename(path))):
            raise InputError(f"--out {args.out}: the result would overwrite the manifest {path}")
    sets = read_sets(args.data, args.max_seconds)
    for name in ("config.json", *(() if args.overwrite else ("summary.json", *(f"{x}.jsonl" for x in sets)))):
        if args.out is not None and os.path.exists(os.path.join(args.out, name)):
            raise InputError(f"--out {args.out} holds {name} (results: --overwrite); choose another")
    if args.compare:
        a, b = (score(read_results(path), **style) for path in args.compare)
        c = compare(a, b, args.bootstrap)
        print_table([[*(c[key] for key in ("metric", "n", "a", "b", "difference")),
                      f"{c['low']:.2f} to {c['high']:.2f}", f"{c['p']:.4f}"]],
                    ["metric", "clips", "A %", "B %", "B − A", "95 %", "p"])
        return
    if args.score:
        summaries = {}
        for path in args.score:
            stem = os.path.splitext(os.path.basename(path))[0]
            if stem in summaries:
                raise InputError(f"--score: two files have the stem {stem!r}; score them one by one")
            summaries[stem] = summarize(score(read_results(path), **style), **style, draws=args.bootstrap)
        print_summaries(summaries)
        if args.out is not None:
            os.makedirs(args.out, exist_ok=True)
            write_json(os.path.join(args.out, "summary.json"), summaries)
        return
    # ---- decoding ------------------------------------------------------------------------------------------
    model = SpeechLM.from_pretrained(args.model).to(device).eval()
    clips = [clip for clips in sets.values() for clip in clips]
    caps = dict(max_new_tokens=args.max_new_tokens, tokens_per_second=args.tokens_per_second)
    check_languages(clips, model)
    if args.out is not None:
        os.makedirs(args.out, exist_ok=True)
    transcribe(model, clips[:1] * world, device, args.batch_seconds, **caps)    # warm-up, for the RTF
    summaries = evaluate(model, sets, device, args.batch_seconds, args.out, **style, draws=args.bootstrap,
                         strict=False, **caps)
    failed = sum(s["failed"] for s in summaries.values())
    if rank == 0 and (args.out or any(s["scored"] for s in summaries.values())):
        print_summaries(summaries)
        print(f"{world} process(es) on {device.type}" + (f"; results in {args.out}" if args.out else ""))
    if rank == 0 and failed:                    # the other ranks end in peace: torchrun would stop this one
        print(f"eval.py: {failed} clip(s) not decoded", file=sys.stderr)
        sys.exit(1)

if __name__ == "__main__":
    run_script(main, parse_args())
