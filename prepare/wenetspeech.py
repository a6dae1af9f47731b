"""The manifest of WenetSpeech: segments of long recordings.

    python -m prepare.wenetspeech /corpora/WenetSpeech --split TEST_NET --out test-net.jsonl

--split takes subsets of segments. WenetSpeech.json has gigabytes and is read as a stream. Without --pack no
recording is opened, so what is damaged or too short shows in prepare.check only.
"""

import os

import ijson

import data
from prepare.manifest import LeftOut, corpus_parser, write_manifest

LAYOUT = "WenetSpeech.json and the recordings that it names"


def parse_args(argv=None):
    parser = corpus_parser("wenetspeech", __doc__)
    parser.add_argument(
        "--split", nargs="+", default=[], metavar="SUBSET", help="such as L, TEST_NET; else all"
    )
    return parser.parse_args(argv)


def clips(args):
    path = os.path.join(args.root, "WenetSpeech.json")
    subsets = set()
    for recording in recordings(path):
        audio = os.path.join(args.root, recording["path"])
        exists = os.path.exists(audio)
        for segment in recording["segments"]:
            subsets.update(segment["subsets"])
            if args.split and not set(args.split) & set(segment["subsets"]):
                continue
            if not exists:
                yield LeftOut("no audio file", audio)
                continue
            yield {
                "id": segment["sid"],
                "audio": audio,
                "text": segment["text"],
                "language": "zh",
                "recording": recording["aid"],
                "begin_time": segment["begin_time"],
                "end_time": segment["end_time"],
            }
    for split in args.split:
        if split not in subsets:
            raise data.InputError(
                f"--split {split}: no such subset in {path}; it has {', '.join(sorted(subsets))}"
            )


def recordings(path):
    """Yields {aid, path, segments: [{sid, text, begin_time, end_time, subsets}]} of WenetSpeech.json."""
    try:
        with open(path, "rb") as file:
            yield from ijson.items(file, "audios.item", use_float=True)
    except OSError as error:
        raise data.InputError(f"{path}: {error.strerror}; is ROOT the folder of this corpus?") from None
    except ijson.JSONError as error:
        reason = str(error).splitlines()[0]
        raise data.InputError(f"{path}: cut off, or not JSON ({reason})") from None


def main(args):
    write_manifest(args, clips(args), LAYOUT)


if __name__ == "__main__":
    data.run_script(main, parse_args())
