"""Makes the sets that only the experiments need, from those of the example.

    python -m results.sets OUT

style.jsonl      train, its transcripts in another style, which scoring removes: commas, full stops, a capital
half.jsonl       the first half of train
quarter.jsonl    the first quarter of train
silence.jsonl    60 clips of 1 to 4 s of a noise floor at −80 dB, whose transcript is empty
noise.jsonl      60 clips of 1 to 4 s of loud white or brown noise, whose transcript is empty
long.jsonl       80 clips of four sentences of one voice, from en-clean and zh-read, longer than any in train
"""

import collections
import os
import pathlib
import sys

import numpy as np
import soundfile

from data import SAMPLE_RATE, add_lines, load_audio, read_lines, read_manifest

EXAMPLE = pathlib.Path(__file__).resolve().parent.parent / "example"
N_EMPTY = 60  # clips of silence, and of noise
N_SENTENCES = 4  # of a long clip
PAUSE_S = 0.2  # between them


def styled(text, language):
    """A capital at the beginning, a comma behind every second word or third character, a full stop."""
    if language == "en":
        words = text.capitalize().split()
        pieces = [" ".join(words[i : i + 2]) for i in range(0, len(words), 2)]
        return ", ".join(pieces) + "."
    pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
    return ",".join(pieces) + "."


def train_lines(out):
    """The lines of train.jsonl, with paths from the folder `out`."""
    lines = read_lines(EXAMPLE / "train.jsonl")
    for line in lines:
        line["audio"] = os.path.relpath(EXAMPLE / line["audio"], out)
    return lines


def add_clip(out, lines, waveform, **fields):
    """Writes a waveform (samples,) into the folder, and adds its line."""
    audio = f"{fields['speaker']}-{len(lines):03d}.flac"
    soundfile.write(out / audio, waveform, SAMPLE_RATE, subtype="PCM_16")
    lines.append({"audio": audio, "duration": len(waveform) / SAMPLE_RATE, **fields})


def empty_clips(out, kind):
    """Clips without speech. Half of them ask for English and half for Chinese."""
    rng = np.random.default_rng(0)
    lines = []
    for n in range(N_EMPTY):
        waveform = rng.standard_normal(int(rng.uniform(1, 4) * SAMPLE_RATE))
        level = 1e-4
        if kind == "noise":
            level = 0.1
            if n % 4 > 1:  # brown: the sum of white, without its slow drift
                waveform = np.cumsum(waveform)
                waveform -= np.convolve(waveform, np.full(801, 1 / 801), mode="same")
        waveform *= level / np.sqrt(np.mean(waveform**2))
        add_clip(out, lines, np.clip(waveform, -1, 1), speaker=kind, language=("en", "zh")[n % 2], text="")
    return lines


def long_clips(out):
    """Sentences of one voice joined with pauses, about 7 to 11 s."""
    lines = []
    pause = np.zeros(int(PAUSE_S * SAMPLE_RATE))
    for name, separator in (("en-clean", " "), ("zh-read", "")):
        by_speaker = collections.defaultdict(list)
        for clip in read_manifest(EXAMPLE / f"{name}.jsonl"):
            by_speaker[clip.fields["speaker"]].append(clip)
        for speaker, clips in by_speaker.items():
            for first in (0, len(clips) - N_SENTENCES):
                chosen = clips[first : first + N_SENTENCES]
                pieces = []
                for clip in chosen:
                    pieces += [load_audio(clip).numpy(), pause]
                text = separator.join(clip.text for clip in chosen)
                language = chosen[0].language
                waveform = np.concatenate(pieces)
                add_clip(out, lines, waveform, speaker=speaker, language=language, text=text)
    return lines


def main(out):
    out = pathlib.Path(out)
    out.mkdir(parents=True)
    lines = train_lines(out)
    sets = {
        "style": [{**line, "text": styled(line["text"], line["language"])} for line in lines],
        "half": lines[: len(lines) // 2],
        "quarter": lines[: len(lines) // 4],
        "silence": empty_clips(out, "silence"),
        "noise": empty_clips(out, "noise"),
        "long": long_clips(out),
    }
    for name, set_lines in sets.items():
        add_lines(out / f"{name}.jsonl", set_lines, mode="w")


if __name__ == "__main__":
    main(*sys.argv[1:])
