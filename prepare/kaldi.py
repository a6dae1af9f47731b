"""The manifest of a Kaldi data folder: wav.scp, and segments, text and utt2spk where they exist.

    python -m prepare.kaldi data/train --language el --out train.jsonl

Paths in wav.scp start at ROOT or else, as in Kaldi, at the current folder. A wav.scp entry that is a command
(its end is "|") is never run; its clips are left out. An end of −1 in segments is the end of the recording.
"""

import functools
import os

import soundfile

import data
from prepare.manifest import LeftOut, corpus_parser, keyed_lines, write_manifest

LAYOUT = "wav.scp with the paths of audio files"


def parse_args(argv=None):
    parser = corpus_parser("kaldi", __doc__)
    parser.add_argument("--language", help="language of all clips, such as en; by default none is written")
    return parser.parse_args(argv)


def clips(args):
    language = data.language_code(args.language) if args.language else None
    wav_scp = keyed_lines(os.path.join(args.root, "wav.scp"))
    texts = lines_if_there(args.root, "text")
    speakers = lines_if_there(args.root, "utt2spk") or {}
    segments = lines_if_there(args.root, "segments")

    for clip_id in wav_scp if segments is None else segments:
        line = {"id": clip_id, "language": language, "speaker": speakers.get(clip_id)}
        recording = clip_id
        channel = None
        if segments is not None:
            where = f"{args.root}/segments: {clip_id}"
            recording, begin, end, channel = parse_segment(segments[clip_id], where)
            line.update({"recording": recording, "begin_time": begin, "end_time": end})
        if texts is not None:
            line["text"] = texts.get(clip_id)

        source = wav_scp.get(recording, "")
        path = os.path.join(args.root, source)
        if not os.path.isfile(path):
            path = source
        if source.endswith("|"):
            yield LeftOut("its audio is a command, which is never run", f"{clip_id} {source}")
        elif not os.path.isfile(path):
            yield LeftOut("no audio file", f"{clip_id} {path or recording}")
        elif texts is not None and clip_id not in texts:
            yield LeftOut("no transcript", clip_id)
        elif channel is not None and not is_only_channel(path, channel):
            yield LeftOut("perhaps one of several channels; split the recording first", clip_id)
        else:
            yield {**line, "audio": path}


def lines_if_there(root, name):
    path = os.path.join(root, name)
    return keyed_lines(path) if os.path.exists(path) else None


def parse_segment(segment, where):
    """(recording, begin, end, channel or None) of "recording begin end [channel]"."""
    words = segment.split()
    try:
        begin = float(words[1])
        end = float(words[2])
    except (IndexError, ValueError):
        raise data.InputError(f"{where}: expected recording, begin and end in s, found {segment!r}") from None
    channel = words[3] if len(words) > 3 else None
    return words[0], begin, end, channel


@functools.cache
def is_only_channel(path, channel):
    """Is the channel the whole file? Channels are counted from 0 or, in older folders, from 1."""
    try:
        return channel in ("0", "1") and soundfile.info(path).channels == 1
    except soundfile.LibsndfileError:
        return False


def main(args):
    write_manifest(args, clips(args), LAYOUT)


if __name__ == "__main__":
    data.run_script(main, parse_args())
