"""Decode manifests greedily and score them: WER for words, CER for characters, with 95 % intervals.

    python eval.py --model example/teacher --data example/en-clean.jsonl example/zh-read.jsonl --out runs/t
    torchrun --nproc_per_node=8 eval.py --model DIR --data big.jsonl --out runs/x --bf16 --resume   # goes on
    python eval.py --model DIR --data clip.flac                                       # prints the transcript
    python eval.py --score runs/x/*.jsonl --normalizer paper                          # rescores, no model
    python eval.py --compare runs/x runs/y                                            # two folders or files

--model writes OUT/<stem>.jsonl, which has the manifest's fields with hyp, stopped and error counts, and
OUT/summary.json. A clip that cannot be decoded has "error" in place of hyp, is counted as failed, and makes
the exit status 1. Intervals come from leaving out one speaker, or one recording, at a time. docs/scores.md
defines every figure. Decoding takes the real-time factor (RTF in the table) times the audio.
"""

import collections
import importlib.metadata
import json
import math
import os
import pathlib
import re
import sys
import time
import unicodedata
import zlib

import jiwer
import numpy as np
import opencc
import scipy.special
import torch
from tqdm import tqdm
from whisper_normalizer.english import EnglishTextNormalizer

import data
import model

# The flags of decoding and their defaults. `evaluate` and `transcribe` take some of them as a dict.
DECODING = {
    "batch_seconds": 600.0,  # of audio decoded at once
    "language": None,  # in the prompt of a clip whose line names none
    "no_context": False,  # prompts do not give a line's context
    "max_new_tokens": 800,  # cap on a transcript
    "tokens_per_second": model.TOKENS_PER_SECOND,  # cap by the audio: this × seconds + 16 tokens; 0 = off
}

COUNTS = ("errors", "units", "substitutions", "deletions", "insertions")


def parse_args(argv=None):
    parser = data.argument_parser("eval.py", __doc__)
    add = parser.add_argument
    # task
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--model", help="student or teacher, folder or hub name: decode and score --data")
    task.add_argument("--score", nargs="+", metavar="FILE", default=[], help="score result files again")
    task.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two result files, or folders of them")
    add("--data", nargs="+", default=[], help="manifests (.jsonl) or audio files, with --model")
    add("--out", help="new folder for result files and summary.json; without it results are only printed")
    add("--resume", action="store_true", help="go on with the run in --out: decode what is missing there")
    add("--json", metavar="FILE", help="store the figures that are printed")
    # decoding
    seconds = data.at_least(0.01)
    count = data.at_least(1, int)
    add("--language", type=data.language_code, help="in prompts of lines without one; scores go by the line")
    add("--no-context", action="store_true", help="prompts do not give a line's context")
    add("--bf16", action="store_true", help="weights and computing in bf16, not in float32")
    add("--batch-seconds", type=seconds, default=DECODING["batch_seconds"], help="audio decoded at once")
    add("--max-seconds", type=seconds, default=30.0, help="longest clip accepted; longer is an error")
    add("--max-new-tokens", type=count, default=DECODING["max_new_tokens"], help="cap on a text")
    add("--tokens-per-second", type=data.at_least(0), default=DECODING["tokens_per_second"], help="0 = off")
    # scoring
    add("--normalizer", choices=["default", "paper"], default="default", help="by language, or the paper's")
    add("--simplify", action="store_true", help="score traditional Chinese as simplified, both sides")
    add("--cluster", metavar="KEY", help="key of clips that belong together, if not speaker or recording")

    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data go together")
    if (args.out or args.language or args.no_context or args.bf16) and not args.model:
        parser.error("--out, --language, --no-context and --bf16 are for decoding, with --model")
    if args.resume and not args.out:
        parser.error("--resume goes on with the run in --out; name it")
    return args


def main(args):
    rank, world, device = data.setup_distributed()
    style = args.normalizer + ("+t2s" if args.simplify else "")
    if args.compare:
        comparison = compare_folders(*args.compare, style, args.cluster)
        print_comparison(comparison)
        if args.json:
            data.write_json(args.json, comparison)
        return

    summaries = decode_and_score(args, style, rank, world, device) if args.model else {}
    for stem, path in by_stem(args.score).items():
        results = read_results(path, args.cluster)
        clusters = [result["cluster"] for result in results]
        summaries[stem] = summarize(score(results, style), clusters, style)
    if rank > 0:
        return  # also where a clip failed: torchrun would stop rank 0 before it has printed
    if args.out:  # what was kept for --resume
        for path in pathlib.Path(args.out).glob("*.part"):
            path.unlink()
    if args.score or args.out or any(summary["scored"] for summary in summaries.values()):
        print_summaries(summaries)
    if args.json:
        data.write_json(args.json, summaries)
    n_failed = sum(summary["failed"] for summary in summaries.values())
    if n_failed:
        print(f"eval.py: {n_failed} clip(s) not decoded", file=sys.stderr)
        sys.exit(1)


def decode_and_score(args, style, rank, world, device):
    """--model: decodes and scores --data on all ranks. → {stem: summary}."""
    done = {}
    log = None
    if args.out:
        inputs = {"model": model.local_folder(args.model), "data": args.data}
        first_step, _, config = data.open_run(args, "eval.py", inputs)
        if first_step is None:  # it is finished
            return data.read_json(os.path.join(args.out, "summary.json"))
        done = read_parts(args.out)
        log = os.path.join(args.out, f"rank-{rank}.part")
    sets = read_sets(args.data, args.max_seconds)
    for clips in sets.values():
        clusters_of(clips, args.cluster)  # a line without its key shows before the model is loaded
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    speech_lm = model.SpeechLM.from_pretrained(args.model, dtype).to(device).eval()
    for clips in sets.values():
        model.check_languages(clips, args.language, speech_lm)
    if args.out:
        data.begin_run(args, config, first_step)  # when all ranks have read the part files
        if done and rank == 0:
            print(f"{len(done)} clips are decoded already", flush=True)
        data.barrier()  # the folder is there
    decoding = {name: getattr(args, name) for name in DECODING}
    # A warm-up: what happens once, such as loading kernels, does not count in the real-time factor. (What
    # happens for each shape of a batch, such as capturing a graph, does.)
    first_clip = next(iter(sets.values()))[0]
    transcribe(speech_lm, [first_clip] * 2 * world, device, decoding, "warm-up")
    return evaluate(speech_lm, sets, device, decoding, args.out, style, args.cluster, done, log)


def by_stem(paths):
    """{stem: path}. Results go by the stem, so two paths with the same one are an InputError."""
    stems = {}
    for path in paths:
        stem = pathlib.Path(path).stem
        if stem in stems:
            raise data.InputError(f"{stems[stem]} and {path} have the same name; rename one")
        stems[stem] = path
    return stems


# ----------------------------------------------------------------------------------------------------------
# Decoding
# ----------------------------------------------------------------------------------------------------------


def read_sets(paths, max_seconds):
    """{stem: clips} of manifests or audio files. Raises InputError where the longest clip is too long."""
    sets = {}
    for stem, path in by_stem(paths).items():
        if path.endswith((".jsonl", ".json")):
            clips = data.Clips([path], math.inf, "text", learns_text=False)
            longest = clips[clips.seconds.argmax()]
        else:
            longest = data.clip_from_file(path)
            clips = [longest]
        sets[stem] = clips
        if longest.duration > max_seconds:
            too_long = f"{longest.duration:.1f} s, over --max-seconds {max_seconds:g}"
            raise data.InputError(f"{longest.where}: {too_long}; split it (docs/data.md), or raise that")
    return sets


def evaluate(speech_lm, sets, device, decoding, out=None, style="default", cluster=None, done=(), log=None):
    """Decodes and scores `sets` {stem: clips} on all ranks. → {stem: summary}, see `summarize`.

    decoding: some of the keys of DECODING. style: of `normalize`. cluster: of `clusters_of`. Rank 0 writes
    out/<stem>.jsonl and out/summary.json, or without `out` prints the transcripts of sets without texts.
    done, log: see `transcribe`.
    """
    rank, _ = data.rank_and_world()
    summaries = {}
    for stem, clips in sets.items():
        answers, rtf = transcribe(speech_lm, clips, device, decoding, stem, done, log)
        errors = [answer["error"] for answer in answers if "error" in answer]
        results = score(result_lines(clips, answers, out), style)
        if rank == 0 and out:
            os.makedirs(out, exist_ok=True)
            results = write_through(results, os.path.join(out, f"{stem}.jsonl"))
        summaries[stem] = summarize(results, clusters_of(clips, cluster), style, rtf)
        if rank == 0:
            if not out and summaries[stem]["scored"] == 0:
                print_transcripts(clips, answers)
            for error in errors:
                print(f"eval.py: not decoded: {error}", file=sys.stderr, flush=True)
    if rank == 0 and out:
        data.write_json(os.path.join(out, "summary.json"), summaries)
    return summaries


def evaluate_run(speech_lm, sets, decoding, args, step):
    """The evaluation OUT/eval-N of a run of opd.py or sft.py after N steps. → {stem: summary}

    Raises InputError where a clip could not be decoded, unless --on-bad-audio is skip.
    """
    if not sets:
        return {}
    folder = os.path.join(args.out, f"eval-{step}")
    summaries = evaluate(speech_lm, sets, speech_lm.device, decoding, folder)
    speech_lm.free_decoders()  # an evaluation writes longer transcripts, and training needs that memory
    if data.rank_and_world()[0] == 0:
        print_summaries(summaries)
    n_failed = sum(summary["failed"] for summary in summaries.values())
    if n_failed and args.on_bad_audio == "error":
        data.barrier()  # torchrun stops rank 0 as soon as another rank ends: it names the clips first
        remedy = "mend them, or go on by --resume --on-bad-audio skip"
        raise data.InputError(f"--eval: {n_failed} clip(s) not decoded, named above; {remedy}")
    return summaries


def transcribe(speech_lm, clips, device, decoding, label, done=(), log=None):
    """Greedy transcripts: each rank decodes its share, and every rank gets all of them.

    → answers, {hyp, stopped} for each of `clips`, in their order, or {error} where it cannot be decoded; and
    the real-time factor. Batches hold clips of like length, the longest first. decoding: some of the keys of
    DECODING. done: what is not decoded again, see `read_parts`. log: file that gets a line a batch.
    """
    decoding = {**DECODING, **decoding}
    batch_seconds = decoding.pop("batch_seconds")
    rank, world = data.rank_and_world()
    durations = np.array([clip.duration for clip in clips])
    share = np.argsort(-durations, kind="stable").tolist()[rank::world]
    batches = []
    for batch in data.cut_micro_batches(share, durations, batch_seconds):
        # What is done leaves its batch after the cut: batch mates decide the last bits of a clip's scores.
        missing = [i for i in batch if (label, i) not in done]
        if missing:
            batches.append(missing)

    answers = {}  # clip number → answer
    # Rank 0's share, by batches: each holds about as much audio, be it of a few long clips or of many short.
    hours = sum(durations[indices].sum() for indices in batches) / 3600
    is_hidden = rank > 0 or len(batches) < 2
    bar = tqdm(batches, desc=f"{label}, {hours:.2f} h a rank", leave=False, disable=is_hidden)
    decoded_s = 0.0
    start = time.perf_counter()
    for indices in bar:
        batch_answers = decode_batch(speech_lm, [clips[i] for i in indices], device, **decoding)
        answers.update(zip(indices, batch_answers))
        if log:
            data.add_lines(log, [{"set": label, "clips": indices, "answers": batch_answers}])
        decoded_s += durations[indices].sum()
        rtf = (time.perf_counter() - start) / decoded_s / world
        bar.set_postfix_str(f"{len(answers)} clips, RTF {rtf:.4f}", refresh=False)

    fresh = collections.ChainMap(*data.gather(answers))
    seconds = time.perf_counter() - start
    audio_s = sum(durations[i] for i, answer in fresh.items() if "hyp" in answer)
    answers = [fresh[i] if i in fresh else done[label, i] for i in range(len(clips))]
    return answers, seconds / audio_s if audio_s else None


def decode_batch(speech_lm, clips, device, language, no_context, max_new_tokens, tokens_per_second):
    """The answers of the clips of one batch, see `transcribe`; the options are those of DECODING."""
    usable, waveforms, defects = data.load_usable(clips)
    # Those of the clips that failed; the others are inserted below.
    answers = [{"error": defect["reason"]} for defect in defects]
    if not usable:
        return answers
    languages = [clips[b].language for b in usable]
    contexts = None if no_context else [clips[b].context for b in usable]
    batch = data.collate(waveforms, speech_lm.front_end, languages, language, contexts).to(device)
    rollout = speech_lm.sample(batch, max_new_tokens=max_new_tokens, tokens_per_second=tokens_per_second)
    hyps = speech_lm.front_end.texts(rollout)
    for b, hyp, stopped in zip(usable, hyps, rollout.stopped.tolist()):
        answers.insert(b, {"hyp": hyp, "stopped": stopped})  # `usable` ascends
    return answers


def read_parts(out):
    """{(stem, clip number): answer} of a folder's part files. A last line that a kill cut off is removed."""
    done = {}
    for path in pathlib.Path(out).glob("*.part"):
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        for line in data.read_lines(path):
            for i, answer in zip(line["clips"], line["answers"]):
                if "hyp" in answer:  # what could not be decoded is tried again
                    done[line["set"], i] = answer
    return done


def result_lines(clips, answers, out):
    """Yields the manifest's fields with each answer. Paths are relative to `out`: the file is a manifest."""
    for clip, answer in zip(clips, answers, strict=True):
        fields = {key: clip.fields[key] for key in clip.fields if key not in ("hyp", "stopped", "error")}
        if out:
            fields["audio"] = os.path.relpath(os.path.realpath(clip.audio), os.path.realpath(out))
        yield {**fields, **answer}


def write_through(results, path):
    """Yields result lines, and writes each to a file on its way, so that they are never all in memory."""
    with open(path, "w", encoding="utf-8") as file:
        for result in results:
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
            yield result


def print_transcripts(clips, answers):
    """Prints file and hypothesis on stdout, a tab between them, and on stderr those that the cap cut."""
    for clip, answer in zip(clips, answers):
        if "hyp" in answer:
            print(clip.fields["audio"], answer["hyp"], sep="\t", flush=True)
            if not answer["stopped"]:
                print(f"eval.py: cut by the cap: {clip.fields['audio']}", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------
# Normalisation: from text to the units that are compared
# ----------------------------------------------------------------------------------------------------------

# Scored by character: scripts that write no blanks between words, and Korean, whose blanks are not settled.
CHARACTER_LANGUAGES = ("zh", "yue", "ja", "ko", "th", "lo", "my", "km", "bo")
CHINESE = ("zh", "yue")
DOTTED_I_LANGUAGES = ("tr", "az")
# One apostrophe for every sign that is typed for it. Accents that stand alone go before NFKC makes a blank
# and a mark of them. So does the Arabic tatweel, which only stretches a word.
SIGNS = str.maketrans({**dict.fromkeys("’‘ʼʻʹ`´′＇", "'"), **dict.fromkeys("¨¯¸˜\u0640")})
ROMANIAN = str.maketrans("şţŞŢ", "șțȘȚ")  # cedillas, as old keyboards have them, are commas below
VARIATION = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]")  # selectors of a character's glyph

# hk2s leaves Taiwan's forms. The mainland has 著 too (著名), and its 幺 (the digit one) is Taiwan's 么: such
# pairs become one character, because this is for comparing and not for reading.
TAIWAN_FORMS = str.maketrans("著簷痺睪幺", "着檐痹睾么")

english = EnglishTextNormalizer()
hk2s = opencc.OpenCC("hk2s")


def normalize(text, language, style="default"):
    """The units of a text: a list of words, or of characters for CHARACTER_LANGUAGES.

    Markup (`data.MARKUP`), format characters, variation selectors and enclosing marks go first, and signs
    are made one (SIGNS), whatever the style. Then

    - default, English: NFKC, then Whisper's English normaliser;
    - default, others and None: NFKC, lower case, punctuation and symbols as blanks;
    - paper: NFC, lower case, punctuation and symbols deleted.

    A style that ends in "+t2s" also makes traditional Chinese simplified.
    """
    is_paper = style.startswith("paper")
    text = data.MARKUP.sub(" ", text).translate(SIGNS)
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Me") and not VARIATION.match(c))
    text = unicodedata.normalize("NFC" if is_paper else "NFKC", text)
    if language == "en" and not is_paper:
        text = re.sub(r"\.{2,}", " ", text)  # Whisper's would leave a dot of "Wait…"
        return english(text).split()
    if language == "ro":
        text = text.translate(ROMANIAN)

    if language in DOTTED_I_LANGUAGES:
        text = text.replace("İ", "i").replace("I", "ı")  # I is the capital of ı
    characters = []
    for c in text.lower():
        category = unicodedata.category(c)
        if category[0] in "PS":
            c = "" if is_paper else " "
        elif category in ("Zs", "Zl", "Zp", "Cc"):
            c = " "
        characters.append(c)
    text = "".join(characters)
    if language not in CHARACTER_LANGUAGES:
        return text.split()
    text = text.replace(" ", "")
    if style.endswith("+t2s") and language in CHINESE:
        text = hk2s.convert(text).translate(TAIWAN_FORMS).replace("甚么", "什么")  # 甚麼: Hong Kong's 什么
    return list(text)


def normalizer_name(language, style="default"):
    """Name and version of what `normalize` does; a change of its results changes the version."""
    if style.startswith("paper"):
        name = "paper/3"
    elif language == "en":
        name = f"en/3-whisper-{importlib.metadata.version('whisper-normalizer')}"
    elif language in CHARACTER_LANGUAGES:
        name = "zh/2"
    else:
        name = "words/3"
    return f"{name}+t2s/2" if style.endswith("+t2s") and language in CHINESE else name


def language_of(fields):
    """The code that a result line is scored in: its `language`, else the script of its text, else None."""
    if fields.get("language"):
        return data.language_code(fields["language"])
    return data.script_language(fields["text"])


# ----------------------------------------------------------------------------------------------------------
# Scores
# ----------------------------------------------------------------------------------------------------------


def count_errors(reference, hypothesis, language, style="default"):
    """{errors, units, substitutions, deletions, insertions} of one clip, counted by jiwer."""
    reference_units = normalize(reference, language, style)
    hypothesis_units = normalize(hypothesis, language, style)
    counts = {"substitutions": 0, "deletions": 0, "insertions": len(hypothesis_units)}
    if reference_units:  # jiwer refuses an empty reference, where every unit of the hypothesis is inserted
        alignment = jiwer.process_words(" ".join(reference_units), " ".join(hypothesis_units))
        counts = {name: getattr(alignment, name) for name in counts}
    return {"errors": sum(counts.values()), "units": len(reference_units), **counts}


def looping(text):
    """Whisper's sign of a repetition loop: the UTF-8 text compresses by more than 2.4."""
    raw = text.encode()
    return len(raw) > 2.4 * len(zlib.compress(raw))


def score(results, style="default"):
    """Yields result lines with error counts where a line has a text and a hypothesis. Old counts go."""
    for result in results:
        fields = {key: value for key, value in result.items() if key not in COUNTS}
        if fields.get("text") is not None and "error" not in fields:
            fields.update(count_errors(fields["text"], fields["hyp"], language_of(fields), style))
        yield fields


def metric_name(languages):
    """WER, CER, or MER where some lines are scored by word and some by character."""
    metrics = {"CER" if language in CHARACTER_LANGUAGES else "WER" for language in languages}
    return "MER" if len(metrics) > 1 else min(metrics, default="WER")


def summarize(results, clusters, style="default", rtf=None):
    """Figures of one set from its scored result lines and the cluster of each line (`clusters_of`).

    rtf: the real-time factor. docs/scores.md defines all keys.
    """
    tally = collections.Counter()
    languages = set()
    sums = {}  # cluster → its errors and units
    for result, cluster in zip(results, clusters, strict=True):
        tally["n"] += 1
        if "error" in result:
            tally["failed"] += 1
            continue
        tally["empty"] += not result["hyp"]
        tally["looping"] += looping(result["hyp"])
        tally["capped"] += not result["stopped"]
        tally["audio_s"] += result["duration"]
        if "errors" in result:
            tally["scored"] += 1
            languages.add(language_of(result))
            tally.update({key: result[key] for key in COUNTS})
            sums[cluster] = sums.get(cluster, 0) + np.array([result["errors"], result["units"]])

    interval = estimate(np.array(list(sums.values())).reshape(-1, 1, 2), rate)
    names = {normalizer_name(language, style) for language in languages}
    return {
        "metric": metric_name(languages),
        "value": 100 * tally["errors"] / tally["units"] if tally["units"] else None,
        "low": number_or_none(interval.low),
        "high": number_or_none(interval.high),
        **{key: tally[key] for key in (*COUNTS, "n", "scored", "failed", "empty", "looping", "capped")},
        "hours": tally["audio_s"] / 3600,
        "normalizer": ", ".join(sorted(names)),
        "rtf": rtf,
        **cluster_figures([sums]),
    }


# ----------------------------------------------------------------------------------------------------------
# Intervals: the jackknife over clusters
#
# What varies by chance is the cluster, such as a speaker, and not the clip. Figures come from a table
# (G, S, C) of counts: G clusters, S sets, and C columns, the errors of each result file and last the
# reference units. A statistic takes sums over clusters (..., S, C) to a number (...).
# ----------------------------------------------------------------------------------------------------------

FEW_CLUSTERS = 12  # with fewer, intervals are rough
ROUNDING = 1e-9  # in % or in ln: a spread below it is the rounding of equal numbers


def clusters_of(clips, key=None):
    """The clusters of clips, as a list of (key, value): clips of one cluster are not independent.

    The key is `key`, or `speaker` if a line has one, else `recording`. An InputError names the first line
    without it. Only a line without `recording` belongs to its audio file instead, or to its part of a tar.
    """
    if key is None:
        has_speaker = any(clip.fields.get("speaker") not in (None, "") for clip in clips)
        key = "speaker" if has_speaker else "recording"
    clusters = []
    names = {}  # one object for each cluster, however many clips it has
    for clip in clips:
        value = clip.fields.get(key)
        if value not in (None, ""):
            cluster = (key, str(value))
        elif key == "recording":
            cluster = ("audio+offset", (os.path.realpath(clip.audio), clip.offset))
        else:
            remedy = "give it to every line, or choose another key (eval.py --cluster)"
            raise data.InputError(f'{clip.where}: no "{key}", which intervals are clustered by; {remedy}')
        clusters.append(names.setdefault(cluster, cluster))
    return clusters


def cluster_figures(sets):
    """{clusters, cluster_key}: how many clusters sets {cluster: …} have, and what these were made of."""
    clusters = set().union(*sets)
    keys = {key for key, _ in clusters}
    return {"clusters": len(clusters), "cluster_key": ", ".join(sorted(keys)) or None}


def cluster_table(sets):
    """The table (G, S, C) of sets, each of which is {cluster: its sums (C,)}."""
    rows = {}
    for s, sums in enumerate(sets):
        for cluster, row in sums.items():
            rows.setdefault(cluster, np.zeros((len(sets), len(row))))[s] = row
    return np.array(list(rows.values()))


def rate(sums):
    """Error rate in % of one file, of one set."""
    return 100 * sums[..., 0, 0] / sums[..., 0, 1]


def log_errors(sums):
    """Logarithms of the errors of each file, as a mean over sets: (..., S, C) → (..., C − 1)."""
    return np.log(sums[..., :-1]).mean(axis=-2)


def log_ratio(sums):
    """L = ln(E_B / E_A) of one set; of several the macro M, which is the mean of L over sets."""
    logs = log_errors(sums)
    return logs[..., 1] - logs[..., 0]


def percent(log_value):
    """The relative change in % that a logarithm of a ratio stands for."""
    return 100 * np.expm1(log_value)


# A figure, its standard error, its 95 % interval and its p. What is not defined is NaN.
Estimate = collections.namedtuple("Estimate", "value se low high p")


def estimate(table, statistic):
    """The `Estimate` of a statistic by leaving out one cluster of a table (G, S, C) at a time.

    SE² = (G − 1)/G Σ_g (θ_(g) − θ)². One cluster gives a value only. Nothing is defined where the statistic
    is not, with all clusters or without one.
    """
    n_clusters = len(table)
    total = table.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = statistic(total)
        deviations = statistic(total - table) - value  # (G,)
        se = np.sqrt((n_clusters - 1) / max(n_clusters, 1) * (deviations**2).sum())
    if se < ROUNDING:
        se = 0.0
    if not np.isfinite(value) or n_clusters > 1 and not np.isfinite(se):
        value = np.nan
        se = np.nan
    return t_estimate(value, se, n_clusters - 1)


def t_estimate(value, se, df):
    """The `Estimate` by Student's t: value ± t_.975(df) · se, and the two-sided p of the value 0.

    p = 2 (1 − T_df(|value| / se)). With se = 0 it is 1 for the value 0, else NaN.
    """
    half = scipy.special.stdtrit(df, 0.975) * se  # both tails together leave out 5 %
    if se == 0:
        p = 1.0 if abs(value) < ROUNDING else np.nan
    else:
        p = 2 * scipy.special.stdtr(df, -abs(value) / se)
    return Estimate(value, se, value - half, value + half, p)


def number_or_none(number):
    """A float for JSON, which has no NaN."""
    return None if np.isnan(number) else float(number)


# ----------------------------------------------------------------------------------------------------------
# Comparison of result files
# ----------------------------------------------------------------------------------------------------------


# n clips of one set, counted in C − 1 result files. sums: {(key, value) of a cluster: its sums (C,)}, the
# errors in each file and last the reference units.
CountedSet = collections.namedtuple("CountedSet", "metric n sums")


def read_results(path, cluster=None):
    """Lines of a result file with `where`, `cluster`, and `clip`: what two lines of one clip share."""
    clips = data.read_manifest(path)
    results = []
    for clip, name in zip(clips, clusters_of(clips, cluster)):
        fields = clip.fields
        if not isinstance(fields.get("hyp"), str) and "error" not in fields:
            raise data.InputError(f'{clip.where}: neither "hyp" nor "error"; give a result file of eval.py')
        language = language_of(fields) if clip.text is not None else None
        same = (os.path.realpath(clip.audio), *clip.key[1:], clip.text, language, name)
        results.append({"stopped": True, **fields, "where": clip.where, "cluster": name, "clip": same})
    return results


def count_set(paths, style="default", cluster=None):
    """The `CountedSet` of result files of the same clips, in whatever order their lines are.

    Raises InputError where they do not hold the same clips with the same texts, each once. A clip that no
    file has decoded, or that has no text, is left out; one that only some have decoded is an error.
    """
    files = []  # {clip: scored result} of each file
    for path in paths:
        results = {}
        for result in score(read_results(path, cluster), style):
            if result["clip"] in results:
                raise data.InputError(f"{result['where']}: {result['audio']} is there twice")
            if "errors" in result:
                results[result["clip"]] = result
        files.append(results)
    sums = {}
    clips = collections.ChainMap(*files)
    for clip, result in clips.items():
        for results, path in zip(files, paths):
            if clip not in results:
                defect = f"is not in {path}, decoded and with the same text, language and cluster"
                raise data.InputError(f"{result['where']}: {result['audio']} {defect}")
        counts = np.array([*(results[clip]["errors"] for results in files), result["units"]])
        sums[result["cluster"]] = sums.get(result["cluster"], 0) + counts
    if not any(counts[-1] for counts in sums.values()):
        raise data.InputError(f"{paths[0]}: no reference has a unit to compare")
    languages = {language_of(result) for result in clips.values()}
    return CountedSet(metric_name(languages), len(clips), sums)


def result_stems(folder):
    """The stems of the result files in a folder. Raises InputError where there is none."""
    stems = sorted(pathlib.Path(name).stem for name in os.listdir(folder) if name.endswith(".jsonl"))
    if not stems:
        raise data.InputError(f"{folder}: holds no result file (.jsonl); give the --out of eval.py")
    return stems


def compare_folders(folder_a, folder_b, style="default", cluster=None):
    """Compares the result files of two folders, paired by name, or two files. → see `compare_sets`"""
    pairs = {}
    if os.path.isdir(folder_a):
        for stem in sorted({*result_stems(folder_a), *result_stems(folder_b)}):
            pairs[stem] = [os.path.join(folder, f"{stem}.jsonl") for folder in (folder_a, folder_b)]
    else:
        pairs[pathlib.Path(folder_a).stem] = [folder_a, folder_b]
    return compare_sets({stem: count_set(paths, style, cluster) for stem, paths in pairs.items()})


def compare_sets(counted):
    """Compares two systems over {stem: `CountedSet`}. → {"sets": {stem: `pair_figures`}, "macro"}

    The macro is the primary figure of several sets, `change_figures` of its `stems`, those with two clusters
    or more.
    """
    sets = {stem: pair_figures(own) for stem, own in counted.items()}
    in_macro = [stem for stem in sets if sets[stem]["clusters"] > 1]
    macro = change_figures([counted[stem] for stem in in_macro]) if in_macro else {}
    return {"sets": sets, "macro": {"stems": in_macro, **macro}}


def pair_figures(counted):
    """Both rates of a `CountedSet` of two files in %, their difference in points, and `change_figures`."""
    errors_a, errors_b, units = sum(counted.sums.values()).tolist()
    return {
        "metric": counted.metric,
        "a": 100 * errors_a / units,
        "b": 100 * errors_b / units,
        "difference": 100 * (errors_b - errors_a) / units,
        **change_figures([counted]),
    }


def change_figures(sets):
    """The relative change 100 (e^L − 1) of B against A over one or several `CountedSet`, L as in `log_ratio`.

    A cluster leaves all sets at once. None where it is not defined.
    """
    sums = [counted.sums for counted in sets]
    change = estimate(cluster_table(sums), log_ratio)
    return {
        "n": sum(counted.n for counted in sets),
        "relative": number_or_none(percent(change.value)),
        "relative_low": number_or_none(percent(change.low)),
        "relative_high": number_or_none(percent(change.high)),
        "p": number_or_none(change.p),
        **cluster_figures(sums),
    }


# ----------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------


def print_summaries(summaries):
    """Prints the summaries {stem: summary} as a table, their normalisers, and their clusters."""
    header = "set,metric,%,95 %,S,D,I,clips,hours,empty,loops,capped,failed,RTF".split(",")
    keys = ["substitutions", "deletions", "insertions", "n", "hours", "empty", "looping", "capped", "failed"]
    rows = []
    for stem, summary in summaries.items():
        row = [stem, summary["metric"], summary["value"], interval_text(summary["low"], summary["high"])]
        row += [summary[key] for key in keys]
        row.append(number_text(summary["rtf"], ".4f"))
        rows.append(row)
    print_table(rows, header)
    names = {summary["normalizer"] or "none" for summary in summaries.values()}
    tqdm.write("normalizer: " + "; ".join(sorted(names)))
    print_clusters(summaries)


def print_comparison(comparison, name_a="A", name_b="B"):
    """Prints a comparison (`compare_folders`) as a table; of several sets the last row is the macro."""
    sets = comparison["sets"]
    stems = comparison["macro"]["stems"]
    figures = dict(sets)
    if stems and len(sets) > 1:
        figures["macro"] = comparison["macro"]
    rows = []
    for name, own in figures.items():
        interval = interval_text(own["relative_low"], own["relative_high"], "+.1f")
        change = [number_text(own["relative"], "+.1f"), interval, p_text(own["p"])]
        rows.append([name, own.get("metric"), own["n"], own.get("a"), own.get("b"), *change])
    print_table(rows, ["set", "metric", "clips", f"{name_a} %", f"{name_b} %", "change %", "95 %", "p"])
    print_clusters(figures)
    one_cluster = [stem for stem in sets if stem not in stems]
    if one_cluster:
        tqdm.write(f"one cluster, so no interval and not in the macro: {', '.join(one_cluster)}")


def print_clusters(figures):
    """Prints in a line how many clusters {name: figures} have, and which are few."""
    texts = []
    for name, own in figures.items():
        if own["clusters"]:
            few = " (few, so intervals are rough)" if own["clusters"] < FEW_CLUSTERS else ""
            texts.append(f"{name} {own['clusters']} by {own['cluster_key']}{few}")
    if texts:
        tqdm.write(f"clusters: {'; '.join(texts)}")


def number_text(number, form):
    """A number in a format; a dash where it is not defined."""
    return "–" if number is None or np.isnan(number) else f"{number:{form}}"


def interval_text(low, high, form=".2f"):
    return "–" if low is None or np.isnan(low) else f"{low:{form}} to {high:{form}}"


def p_text(p):
    return "<0.0001" if p is not None and p < 0.0001 else number_text(p, ".4f")


def print_table(rows, header):
    """Prints rows of cells: numbers with a fraction to two places, None and NaN as a dash."""
    table = [header]
    for row in rows:
        cells = []
        for cell in row:
            is_decimal = cell is None or isinstance(cell, float)
            cells.append(number_text(cell, ".2f") if is_decimal else str(cell))
        table.append(cells)
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *others in table:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        tqdm.write("  ".join([first.ljust(widths[0]), *cells]))  # not print: a bar may be on the screen


if __name__ == "__main__":
    data.run_script(main, parse_args())
