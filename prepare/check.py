"""Reads every clip of manifests and prints what is wrong with them, or looks at two models on a few clips.

    python -m prepare.check train.jsonl dev.jsonl
    python -m prepare.check dev.jsonl --models STUDENT TEACHER    # the first command with real weights

Each defect is printed with its line; a last line for each manifest sums up. The exit status is 1 if there is
a defect. Training would stop at such a clip, leave it out, or learn from silence.

With --models no clip is checked. Both models transcribe a few clips, from the shortest to the longest, score
what they wrote, and the teacher scores the student's transcripts. (Its own text is written behind the line's
language or --language, whatever the script.) Each figure is printed with what sound models show. Models that
do not fit together, or that misread prompt, audio or ids, show there and not after a day of training.
"""

import argparse
import collections
import os
import re
import sys

import numpy as np
import torch
from tqdm import tqdm

import data
import model
import overlap

K = 32  # top-k ids of each model, with --models
LIKE_MARKUP = re.compile(r"\[[^\[\]]{1,40}\]|\{[^{}]{1,40}\}|\([^()\s]{1,40}\)|\*[^*\s]{1,40}\*")
MAX_NEW_TOKENS = 256  # of a transcript that --models shows


def parse_args(argv=None):
    script = "python -m prepare.check"
    parser = data.argument_parser(script, __doc__)
    options = "[--max-seconds s] [--models STUDENT TEACHER [--language code] [--clips n]]"
    parser.usage = f"{script} m.jsonl … {options}"
    add = parser.add_argument
    seconds = data.at_least(0.01)
    count = data.at_least(1, int)
    add("manifests", nargs="+", metavar="m.jsonl", help="manifests to read")
    add("--max-seconds", type=seconds, default=30.0, help="a longer clip is a defect")
    add("--models", nargs=2, metavar=("STUDENT", "TEACHER"), help="look at two models on a few of the clips")
    add("--language", type=data.language_code, help="of clips whose line names none, with --models")
    add("--clips", type=count, help="clips that --models looks at; 8 if absent")
    args = parser.parse_args(argv)
    if (args.language or args.clips) and not args.models:
        parser.error("--language and --clips have no meaning without --models")
    return args


def check(path, max_seconds):
    """Prints the defects of a manifest and a summary. → number of defects"""
    folder = os.path.dirname(os.path.abspath(path))
    n_defects = 0
    n_clips = 0
    n_texts = 0
    seconds = 0.0
    languages = collections.Counter()
    n_prefixed = 0
    markup = collections.Counter()  # what looks like it
    first_lines = {}  # clip key: the line with it

    for _, number, raw in tqdm(data.manifest_lines(path), desc=path, unit=" clips", disable=None):
        try:
            clip = data.parse_line(raw, f"{path}:{number}", folder)
            defects = clip_defects(clip, max_seconds, first_lines)
            first_lines.setdefault(clip.key, clip.where)
            n_clips += 1
            n_texts += clip.text is not None
            seconds += clip.duration
            languages[clip.language or "(none)"] += 1
            n_prefixed += clip.had_prefix
            markup.update(LIKE_MARKUP.findall(clip.text or ""))
        except data.InputError as error:
            defects = [str(error)]
        for defect in defects:
            tqdm.write(defect)
        n_defects += len(defects)

    if n_clips == 0 and n_defects == 0:
        print(f"{path}: holds no clip")
        n_defects = 1
    totals = f"{n_clips} clips, {seconds / 3600:.3f} hours, {n_texts} with text"
    counts = ", ".join(f"{language} {n}" for language, n in languages.most_common())
    print(f"{path}: {totals}, languages: {counts or 'none'}; {n_defects} defects")
    data.say_prefixes(path, n_prefixed)
    if markup:
        shown = ", ".join(f"{tag} {n}" for tag, n in markup.most_common(20))
        print(f"{path}: looks like markup, and is learned as words: {shown}")
    return n_defects


def clip_defects(clip, max_seconds, first_lines):
    """What is wrong with a clip: a list of messages."""
    where = f"{clip.where}: {clip.audio}"
    defects = []
    if clip.key in first_lines:
        defects.append(f"{where}: the same clip as {first_lines[clip.key]}")
    if clip.duration > max_seconds:
        defects.append(f"{where}: {clip.duration:.1f} s is over --max-seconds {max_seconds:g}")
    try:
        waveform = data.load_audio(clip)
    except data.AudioError as error:
        defects.append(str(error))
        return defects
    if len(waveform) < data.N_FFT:
        defects.append(f"{where}: {len(waveform)} samples, less than a window of 25 ms")
    tag = data.MARKUP.search(clip.text or "")
    if tag:
        defects.append(f"{clip.where}: text holds {tag[0]}, which no training takes; remove such tags")
    if clip.text != "" and not waveform.any():  # silence with an empty text is a fair clip
        defects.append(f"{where}: every sample is zero")
    return defects


@torch.no_grad()
def check_models(args):
    """--models: prints figures of both models on a few clips. Raises InputError where they are unsound."""
    clips = []
    for path in args.manifests:
        clips += [clip for clip in data.read_manifest(path) if clip.duration <= args.max_seconds]
    if not clips:
        raise data.InputError(f"no clip of at most {args.max_seconds:g} s in {' '.join(args.manifests)}")
    clips.sort(key=lambda clip: clip.duration)
    places = np.linspace(0, len(clips) - 1, min(args.clips or 8, len(clips))).round().astype(int)
    clips = [clips[i] for i in places]
    waveforms = [data.load_audio(clip) for clip in clips]
    languages = [clip.language for clip in clips]

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = model.SpeechLM.from_pretrained(args.models[0]).to(device).eval()
    teacher = model.SpeechLM.from_pretrained(args.models[1]).to(device).eval()
    model.check_languages(clips, args.language, student, teacher)
    alignment = model.align_vocabularies(student, teacher)
    n_text = int((~student.forbidden).sum())
    n_shared = int((~alignment.student_forbidden).sum())
    print(f"vocabulary: {n_shared} of the student's {n_text} text tokens are the teacher's too (sound: all)")

    # Each model against itself: its own transcript, scored by teacher forcing.
    for name, speech_lm in (("student", student), ("teacher", teacher)):
        figures = model.self_check(speech_lm, waveforms, languages, args.language)
        print(f"{name} on its own transcripts of {len(clips)} clips:")
        print(f"  nll {figures['nll']:.3f} nats a token (sound: below 0.5; shifted rows: about 10)")
        print(f"  agreement {figures['agreement']:.3f} (sound: above 0.99)")
        print(f"  batch_difference {figures['batch_difference']:.1e} (sound: below 1e-4 in float32)")
        print(f"  endoftext {figures['endoftext']:.3f} where it stops (sound: below 0.1)")

    # The teacher on the student's transcripts: what the first step of OPD will see.
    caps = {"max_new_tokens": MAX_NEW_TOKENS, "tokens_per_second": model.TOKENS_PER_SECOND}
    options = argparse.Namespace(language=args.language, states="student", context="both", k=K, **caps)
    transcripts, values = overlap.measure(student, teacher, alignment, clips, options, device)
    kl = values["kl_union"].mean()
    print("the teacher on the student's transcripts:")
    print(f"  KL {kl:.3f} nats a token (sound: below 2; misaligned ids or prompts: above 5)")
    print(f"  VUSS {values['vuss'].mean():.2f} (k = {K}, the paper: 51 to 54)")

    texts = student.front_end.texts(transcripts["student"])
    teacher_texts = student.front_end.texts(transcripts["teacher"])
    for clip, ours, theirs in zip(clips, texts, teacher_texts):
        print(f"{clip.where}, {clip.duration:.2f} s")
        print(f"  student   {ours}")
        print(f"  teacher   {theirs}")
        if clip.text is not None:
            print(f"  manifest  {clip.text}")


def main(args):
    if args.models:
        check_models(args)
        return
    n_defects = sum(check(path, args.max_seconds) for path in args.manifests)
    if n_defects:
        sys.exit(1)


if __name__ == "__main__":
    data.run_script(main, parse_args())
