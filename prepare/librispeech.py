"""The manifest of LibriSpeech.

    python -m prepare.librispeech /corpora/LibriSpeech --split dev-clean dev-other --out dev.jsonl

ROOT is the folder LibriSpeech or the one above. Texts are written as they are, in capitals.
"""

from pathlib import Path

import data
from prepare.manifest import (
    LeftOut,
    chosen_splits,
    corpus_parser,
    folder_or_itself,
    keyed_lines,
    write_manifest,
)

LAYOUT = "SPLIT/SPEAKER/CHAPTER/*.flac with SPEAKER-CHAPTER.trans.txt"


def parse_args(argv=None):
    parser = corpus_parser("librispeech", __doc__)
    parser.add_argument(
        "--split", nargs="+", default=[], metavar="SPLIT", help="such as test-clean; else all"
    )
    return parser.parse_args(argv)


def clips(args):
    root = folder_or_itself(Path(args.root), "LibriSpeech")
    for split in chosen_splits(root, args.split):
        for chapter in sorted((root / split).glob("*/*/")):
            yield from chapter_clips(chapter)


def chapter_clips(chapter):
    audio = {path.stem: path for path in chapter.glob("*.flac")}
    texts = {}
    for path in chapter.glob("*.trans.txt"):
        texts.update(keyed_lines(path))

    for utterance in sorted(audio.keys() | texts.keys()):
        if utterance not in texts:
            yield LeftOut("no transcript", str(audio[utterance]))
        elif utterance not in audio:
            yield LeftOut("no audio file", f"{chapter}/{utterance}.flac")
        else:
            yield {
                "id": utterance,
                "audio": str(audio[utterance]),
                "text": texts[utterance],
                "language": "en",
                "speaker": chapter.parent.name,
            }


def main(args):
    write_manifest(args, clips(args), LAYOUT)


if __name__ == "__main__":
    data.run_script(main, parse_args())
