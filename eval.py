r"""Decode manifests greedily and score them: WER for words, CER for characters.

    python eval.py --model example/teacher --data example/en-clean.jsonl example/zh-read.jsonl \
        --out runs/teacher
    # clips are split over ranks
    torchrun --nproc_per_node=8 eval.py --model DIR --data test.jsonl --out runs/x
    # prints the transcript
    python eval.py --model DIR --data clip.flac

Writes OUT/<stem>.jsonl (the manifest's fields plus hyp, stopped, errors, units, substitutions, deletions,
insertions) and OUT/summary.json. A result file is itself a manifest, its audio paths lead from where it lies:
`sft.py --text-field hyp` learns from it. The example's 500 test clips take 4 s on two cores.
"""
import json
import os
import re
import time
import unicodedata

import jiwer
import numpy as np
import torch.distributed as dist
from tqdm import tqdm
from whisper_normalizer.english import EnglishTextNormalizer

from data import (InputError, Parser, at_least, clip_from_file, collate, load_audio, make_folder,
                  micro_batches, rank_and_world, read_manifest, run_script, setup_distributed)
from model import ArkASR

MAX_NEW_TOKENS, TOKENS_PER_SECOND = 256, 8.0              # caps of a transcript, see --help
COUNTS = ("errors", "units", "substitutions", "deletions", "insertions")
RESULT_KEYS = ("hyp", "stopped", *COUNTS)                   # what a result line adds to the manifest's fields
CHARACTER_LANGUAGES = ("zh", "yue", "ja", "th", "ko")     # scored by character; every other language by word
LANGUAGE_NAMES = {"english": "en", "chinese": "zh", "mandarin": "zh", "cmn": "zh", "cantonese": "yue",
                  "japanese": "ja", "korean": "ko", "thai": "th"}
english = EnglishTextNormalizer()


# ------------------------------------------------------------------------------------------------------------
# Scoring
# ------------------------------------------------------------------------------------------------------------
def normalize(text, language):
    """The units that are compared: a list of words, or of characters for CHARACTER_LANGUAGES.

    en: Whisper's English normaliser, then words. Others: NFKC, lower case, punctuation and symbols removed;
    characters without blanks for zh and its like (Latin letters one by one), words otherwise. Applied to both
    sides alike.
    """
    if language == "en":
        return english(text).split()
    text = unicodedata.normalize("NFKC", text).lower()
    kinds = {c: unicodedata.category(c) for c in text}
    text = "".join(" " if kinds[c][0] in "PSZ" or kinds[c] == "Cc" else c for c in text if kinds[c] != "Cf")
    return list(re.sub(r"\s+", "", text)) if language in CHARACTER_LANGUAGES else text.split()


def count_errors(reference, hypothesis, language):
    """{errors, units, substitutions, deletions, insertions} of one clip, by jiwer.
    An empty reference counts insertions."""
    ref, hyp = normalize(reference, language), normalize(hypothesis, language)
    if ref:
        m = jiwer.process_words(" ".join(ref), " ".join(hyp))
        s, d, i = m.substitutions, m.deletions, m.insertions
    else:
        s, d, i = 0, 0, len(hyp)                                # jiwer refuses an empty reference
    return dict(errors=s + d + i, units=len(ref), substitutions=s, deletions=d, insertions=i)


def summarize(results):
    """Corpus figures of one set from its result lines: value = 100 × Σ errors / Σ units.
    Clips without text are decoded only."""
    scored = [r for r in results if "errors" in r]
    kinds = {language_of(r) in CHARACTER_LANGUAGES for r in scored}
    summary = dict(metric="MER" if len(kinds) == 2 else "CER" if kinds == {True} else "WER", value=None,
                   n=len(results), scored=len(scored),
                   **{key: sum(r[key] for r in scored) for key in COUNTS},
                   empty=sum(not r["hyp"] for r in results), capped=sum(not r["stopped"] for r in results),
                   hours=sum(r["duration"] for r in results) / 3600)
    if summary["units"]:
        summary["value"] = 100 * summary["errors"] / summary["units"]
    return summary


def language_of(fields):
    """Language code of a result line: its `language` ("zh-CN", "Chinese" → "zh"), else zh if the text has CJK
    characters, else en."""
    name = re.split("[-_]", (fields.get("language") or "").strip().lower())[0]
    return LANGUAGE_NAMES.get(name, name) or ("zh" if re.search(r"[\u3400-\u9fff]", fields["text"]) else "en")


def print_table(rows, header):
    """Aligned columns on screen: the first left, the others right."""
    rows = [header, *[["–" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell)
                       for cell in row] for row in rows]]
    widths = [max(len(row[c]) for row in rows) for c in range(len(header))]
    for row in rows:
        print("  ".join(cell.ljust(w) if c == 0 else cell.rjust(w)
                        for c, (cell, w) in enumerate(zip(row, widths))))


# ------------------------------------------------------------------------------------------------------------
# Decoding
# ------------------------------------------------------------------------------------------------------------
def transcribe(model, clips, device, batch_seconds, label="decode", max_new_tokens=MAX_NEW_TOKENS,
               tokens_per_second=TOKENS_PER_SECOND):
    """Greedy transcripts of this rank's share of the clips, longest first;
    all ranks get all of them, in order.

    → [(hyp, stopped)] as long as `clips`.
    """
    rank, world = rank_and_world()
    durations = np.array([clip.duration for clip in clips])
    mine = np.argsort(-durations, kind="stable")[rank::world].tolist()
    found = {}
    batches = micro_batches(mine, durations, batch_seconds)
    for indices in tqdm(batches, desc=label, disable=rank > 0 or len(batches) < 2, leave=False):
        batch = collate([load_audio(clips[i]) for i in indices], model.front_end).to(device)
        rollout = model.sample(batch, max_new_tokens, k=1, tokens_per_second=tokens_per_second)
        for i, ids, n, stopped in zip(indices, rollout.ids.tolist(), rollout.lens.tolist(),
                                      rollout.stopped.tolist()):
            found[i] = (model.front_end.decode(ids[:n]), stopped)
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, found)
        found = {i: value for share in shares for i, value in share.items()}
    return [found[i] for i in range(len(clips))]


def evaluate(model, sets, device, batch_seconds, out=None, **caps):
    """Decodes and scores `sets` {stem: [Clip]}. → {stem: summary};
    rank 0 writes result files and summary.json to `out`."""
    summaries, writes = {}, out is not None and rank_and_world()[0] == 0
    for stem, clips in sets.items():
        results = []
        for clip, (hyp, stopped) in zip(clips, transcribe(model, clips, device, batch_seconds, stem, **caps)):
            fields = {key: value for key, value in clip.fields.items() if key not in RESULT_KEYS}
            if out is not None:                     # so that the result file is a manifest where it lies
                fields["audio"] = os.path.relpath(os.path.realpath(clip.audio), os.path.realpath(out))
            counts = {} if clip.text is None else count_errors(clip.text, hyp, language_of(fields))
            results.append({**fields, "hyp": hyp, "stopped": stopped, **counts})
        summaries[stem] = summarize(results)
        if writes:
            os.makedirs(out, exist_ok=True)
            with open(os.path.join(out, f"{stem}.jsonl"), "w", encoding="utf-8") as file:
                file.writelines(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    if writes:
        with open(os.path.join(out, "summary.json"), "w") as file:
            json.dump(summaries, file, indent=1)
    return summaries


def read_sets(paths, max_seconds):
    """{stem: [Clip]} of manifests or bare audio files.
    Raises InputError on equal stems and on clips over max_seconds."""
    sets = {}
    for path in paths:
        stem = os.path.splitext(os.path.basename(path))[0]
        if stem in sets:
            raise InputError(f"two data sets have the stem {stem!r}: "
                             "their results would overwrite each other; rename one")
        sets[stem] = read_manifest(path) if path.endswith((".jsonl", ".json")) else [clip_from_file(path)]
        for clip in sets[stem]:
            if clip.duration > max_seconds:
                raise InputError(f"{clip.where}: {clip.duration:.1f} s is over --max-seconds "
                                 f"{max_seconds:g}; split the clip or raise it")
    return sets


# ------------------------------------------------------------------------------------------------------------
# Command
# ------------------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = Parser(prog="eval.py", description=__doc__)
    parser.add_argument("--model", required=True, help="model folder (student or teacher)")
    parser.add_argument("--data", required=True, nargs="+", help="manifests (.jsonl) or audio files")
    parser.add_argument("--out", help="folder for result files and summary.json; "
                                      "without it results are only printed")
    parser.add_argument("--batch-seconds", type=at_least(0.01), default=600.0,
                        help="audio decoded at once per process, in seconds")
    parser.add_argument("--max-seconds", type=at_least(0.01), default=30.0,
                        help="longest clip accepted, in seconds; longer is an error")
    parser.add_argument("--max-new-tokens", type=at_least(1, int), default=MAX_NEW_TOKENS,
                        help="cap on a transcript's tokens")
    parser.add_argument("--tokens-per-second", type=at_least(0), default=TOKENS_PER_SECOND,
                        help="a clip's cap is also this × its seconds + 16 tokens; 0 = off")
    return parser.parse_args(argv)


def main(args):
    rank, world, device = setup_distributed()
    sets = read_sets(args.data, args.max_seconds)
    if args.out is not None:
        make_folder(args.out)
        for path in args.data:
            if os.path.realpath(path) == os.path.realpath(os.path.join(args.out, os.path.basename(path))):
                raise InputError(f"--out {args.out} is the folder of {path}: "
                                 "the result would overwrite the manifest")
    model = ArkASR.from_pretrained(args.model).to(device).eval()
    start, caps = time.perf_counter(), dict(max_new_tokens=args.max_new_tokens,
                                            tokens_per_second=args.tokens_per_second)
    # bare audio: just read it
    if args.out is None and not any(clip.text is not None for clips in sets.values() for clip in clips):
        clips = [clip for clips in sets.values() for clip in clips]
        for clip, (hyp, _) in zip(clips, transcribe(model, clips, device, args.batch_seconds, **caps)):
            if rank == 0:
                print(hyp if len(clips) == 1 else f"{clip.audio}\t{hyp}")
        return
    summaries = evaluate(model, sets, device, args.batch_seconds, args.out, **caps)
    seconds = time.perf_counter() - start
    if rank > 0:
        return
    print_table([[stem, s["metric"], s["value"], s["errors"], s["units"], s["substitutions"], s["deletions"],
                  s["insertions"], s["n"], s["empty"], s["capped"]] for stem, s in summaries.items()],
                ["set", "metric", "%", "errors", "units", "S", "D", "I", "clips", "empty", "capped"])
    hours = sum(s["hours"] for s in summaries.values())
    print(f"{hours:.3f} hours in {seconds:.1f} s on {world} process(es)"
          + (f"; results in {args.out}" if args.out else ""))


if __name__ == "__main__":
    run_script(main, parse_args())
