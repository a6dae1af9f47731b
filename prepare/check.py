"""Reads every clip of manifests and prints what is wrong with them.

    python -m prepare.check train.jsonl dev.jsonl

Each defect is printed with its line; a last line for each manifest sums up. The exit status is 1 if there is
a defect. Training would stop at such a clip, leave it out, or learn from silence.
"""

import collections
import os
import sys

from tqdm import tqdm

from data import (
    N_FFT,
    AudioError,
    InputError,
    argument_parser,
    at_least,
    load_audio,
    manifest_lines,
    parse_line,
    run_script,
)


def parse_args(argv=None):
    script = "python -m prepare.check"
    parser = argument_parser(script, __doc__)
    parser.usage = f"{script} m.jsonl … [--max-seconds s]"
    parser.add_argument("manifests", nargs="+", metavar="m.jsonl", help="manifests to read")
    parser.add_argument("--max-seconds", type=at_least(0.01), default=30.0, help="a longer clip is a defect")
    return parser.parse_args(argv)


def check(path, max_seconds):
    """Prints the defects of a manifest and a summary. → number of defects"""
    folder = os.path.dirname(os.path.abspath(path))
    n_defects = 0
    n_clips = 0
    n_texts = 0
    seconds = 0.0
    languages = collections.Counter()
    first_lines = {}  # clip key: the line with it

    for _, number, raw in tqdm(manifest_lines(path), desc=path, unit=" clips", disable=None):
        try:
            clip = parse_line(raw, f"{path}:{number}", folder)
            defects = clip_defects(clip, max_seconds, first_lines)
            first_lines.setdefault(clip.key, clip.where)
            n_clips += 1
            n_texts += clip.text is not None
            seconds += clip.duration
            languages[clip.language or "(none)"] += 1
        except InputError as error:
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
        waveform = load_audio(clip)
    except AudioError as error:
        defects.append(str(error))
        return defects
    if len(waveform) < N_FFT:
        defects.append(f"{where}: {len(waveform)} samples, less than a window of 25 ms")
    if clip.text != "" and not waveform.any():  # silence with an empty text is a fair clip
        defects.append(f"{where}: every sample is zero")
    return defects


def main(args):
    n_defects = sum(check(path, args.max_seconds) for path in args.manifests)
    if n_defects:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main, parse_args())
