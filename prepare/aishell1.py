"""The manifest of AISHELL-1.

    python -m prepare.aishell1 /corpora/data_aishell --split test --out test.jsonl

ROOT is the folder data_aishell, its speakers' archives unpacked, or the one above. The blanks in its texts
come from a word segmenter and are removed.
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

LAYOUT = "wav/SPLIT/SPEAKER/*.wav with transcript/aishell_transcript_v0.8.txt"


def parse_args(argv=None):
    parser = corpus_parser("aishell1", __doc__)
    parser.add_argument("--split", nargs="+", default=[], metavar="SPLIT", help="train, dev, test; else all")
    return parser.parse_args(argv)


def clips(args):
    root = folder_or_itself(Path(args.root), "data_aishell")
    texts = keyed_lines(root / "transcript" / "aishell_transcript_v0.8.txt")
    for split in chosen_splits(root / "wav", args.split):
        for path in sorted((root / "wav" / split).glob("*/*.wav")):
            if path.stem not in texts:
                yield LeftOut("no transcript", str(path))
                continue
            yield {
                "id": path.stem,
                "audio": str(path),
                "text": "".join(texts[path.stem].split()),
                "language": "zh",
                "speaker": path.parent.name,
            }


def main(args):
    write_manifest(args, clips(args), LAYOUT)


if __name__ == "__main__":
    data.run_script(main, parse_args())
