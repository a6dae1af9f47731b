"""A manifest of spoken digit strings, made from the Free Spoken Digit Dataset.

    python -m prepare.fsdd free-spoken-digit-dataset --split train --count 2000 --out digits.jsonl

Takes of one speaker are brought to one level, joined with pauses of 0 to 150 ms, and packed into shards, by
default beside the manifest. Takes 0 to 4 are the test split, as the data set has it, the others train.
"""

import os
import re
from pathlib import Path

import numpy as np
import torch

import data
from prepare.manifest import LeftOut, corpus_parser, flac, folder_or_itself, write_manifest

LAYOUT = "recordings/digit_speaker_take.wav"
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LONGEST_PAUSE = int(0.15 * data.SAMPLE_RATE)  # samples
PEAK = 0.9


def parse_args(argv=None):
    parser = corpus_parser("fsdd", __doc__)
    parser.add_argument(
        "--split", nargs="+", default=["train", "test"], choices=["train", "test"], help="takes to use"
    )
    parser.add_argument("--count", type=data.at_least(1, int), default=1_000, help="strings to make")
    parser.add_argument(
        "--max-digits", type=data.at_least(1, int), default=6, help="digits of the longest string"
    )
    parser.add_argument("--speakers", nargs="+", default=[], metavar="NAME", help="only these; else all")
    parser.add_argument("--seed", type=data.at_least(0, int), default=0, help="seed of the strings")
    args = parser.parse_args(argv)
    if args.pack is None:
        args.pack = os.path.splitext(args.out)[0]
    return args


def clips(args):
    root = folder_or_itself(Path(args.root), "recordings")
    takes = {}  # speaker: [(digit, waveform)]
    names = set()  # of all speakers of these splits
    for path in sorted(root.glob("[0-9]_*_*.wav")):
        match = re.fullmatch(r"(\d)_([^_]+)_(\d+)", path.stem)
        if match is None:
            yield LeftOut("not named digit_speaker_take", str(path))
            continue
        digit, speaker, take = match.groups()
        split = "test" if int(take) < 5 else "train"
        if split not in args.split:
            continue
        names.add(speaker)
        if args.speakers and speaker not in args.speakers:
            continue
        try:
            waveform = data.load_audio(data.clip_from_file(str(path))).numpy()
        except data.InputError as error:
            yield LeftOut("cannot be used", str(error))
            continue
        if not waveform.any():
            yield LeftOut("every sample is zero", str(path))
            continue
        level = np.sqrt(np.mean(waveform**2))
        takes.setdefault(speaker, []).append((int(digit), waveform / level))

    for speaker in args.speakers:
        if speaker not in takes:
            raise data.InputError(f"--speakers {speaker}: {root} has {', '.join(sorted(names)) or 'none'}")
    speakers = args.speakers or sorted(takes)
    rng = np.random.default_rng(args.seed)
    for n in range(args.count if speakers else 0):
        speaker = speakers[rng.integers(len(speakers))]
        digits, waveform = digit_string(takes[speaker], args.max_digits, rng)
        yield {
            "id": f"{speaker}-{n:06d}",
            "audio": f"{speaker}-{n:06d}.flac",
            "content": flac(waveform),
            "text": " ".join(WORDS[digit] for digit in digits),
            "language": "en",
            "speaker": speaker,
        }


def digit_string(takes, max_digits, rng):
    """→ digits and waveform (samples,) of takes [(digit, waveform)] drawn at random, joined with pauses."""
    n_digits = rng.integers(1, max_digits + 1)
    drawn = [takes[i] for i in rng.integers(len(takes), size=n_digits)]
    pieces = []
    for _, waveform in drawn:
        pieces.append(waveform)
        pieces.append(np.zeros(rng.integers(LONGEST_PAUSE + 1)))
    joined = np.concatenate(pieces[:-1])
    return [digit for digit, _ in drawn], torch.from_numpy(PEAK * joined / np.abs(joined).max())


def main(args):
    write_manifest(args, clips(args), LAYOUT)


if __name__ == "__main__":
    data.run_script(main, parse_args())
