"""What the scripts of the corpora share: each yields its clips, and `write_manifest` writes them.

A new corpus is a new file beside librispeech.py with a generator that yields one dict for each clip,

    {"id": "84-121123-0000", "audio": path, "text": "GO DO YOU HEAR", "language": "en", "speaker": "84"}

with the keys that are known (docs/data.md), or `LeftOut(reason, which)` for what cannot be used. A segment
has `begin_time` and `end_time` (s), and `recording`, equal for all segments of one recording. A clip that
is made by the script and lies nowhere yet has its encoded file in `content` (bytes); it is packed.
"""

import collections
import contextlib
import io
import json
import os
import pathlib
import tarfile
import typing

import soundfile

import data

SHARD_BYTES = 10**9  # a shard ends with the first clip beyond this


class LeftOut(typing.NamedTuple):
    """A clip that cannot be used. Counted by its reason, and listed in a file beside the manifest."""

    reason: str
    which: str


def corpus_parser(name, docstring, root="ROOT", root_help="folder of the corpus, as it is distributed"):
    """The flags that all corpora have."""
    script = f"python -m prepare.{name}"
    parser = data.argument_parser(script, docstring)
    parser.usage = f"{script} {root} --out m.jsonl [--flag value …]"
    parser.add_argument("root", metavar=root, help=root_help)
    parser.add_argument("--out", required=True, metavar="m.jsonl", help="manifest to write")
    parser.add_argument("--pack", metavar="NAME.tar", help="store the clips in shards NAME-00000.tar, …")
    return parser


def write_manifest(args, clips, layout, is_folder=True):
    """Writes the manifest args.out, with args.pack its shards; prints what it holds and what was left out.

    clips: dicts and `LeftOut`s, see above. layout: what was looked for, for the error where there is no clip.
    is_folder: args.root must be a folder; else it may also be the name of something elsewhere.
    Raises InputError; nothing is left behind then.
    """
    if os.path.exists(args.out):
        raise data.InputError(f"--out {args.out} exists; remove it, or choose another name")
    if is_folder and not os.path.isdir(args.root):
        raise data.InputError(f"{args.root}: no such folder")
    folder = os.path.dirname(os.path.abspath(args.out))
    os.makedirs(folder, exist_ok=True)
    shards = Shards(args.pack) if args.pack else None

    n_clips = 0
    n_untexted = 0
    seconds = 0.0
    left_out = collections.Counter()  # reason → clips
    first_left_out = None
    list_path = os.path.splitext(args.out)[0] + ".left-out.jsonl"
    with complete_or_absent(list_path) as list_file, complete_or_absent(args.out, shards) as file:
        for clip in clips:
            line = clip if isinstance(clip, LeftOut) else manifest_line(clip, shards)
            if isinstance(line, LeftOut):
                which = line.which.encode("utf-8", "replace").decode()  # not every file name is UTF-8
                list_file.write(
                    json.dumps({"reason": line.reason, "which": which}, ensure_ascii=False) + "\n"
                )
                left_out[line.reason] += 1
                first_left_out = first_left_out or which
                continue
            line["audio"] = relative_where_below(line["audio"], folder)
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            n_clips += 1
            n_untexted += "text" not in line
            seconds += line["duration"]

        counts = ", ".join(f"{n} × {reason}" for reason, n in left_out.most_common())
        if n_clips == 0:
            first = f"; left out: {counts} (first: {first_left_out})" if left_out else ""
            raise data.InputError(f"{args.root}: no usable clip; looked for {layout}{first}")

    packed = f", {len(shards.paths)} shard(s)" if shards is not None else ""
    print(f"{args.out}: {n_clips} clips, {seconds / 3600:.3f} hours, {n_untexted} without text{packed}")
    if left_out:
        print(f"left out: {counts}; all of them are in {list_path}")
    else:
        os.remove(list_path)


@contextlib.contextmanager
def complete_or_absent(path, shards=None):
    """A file to write, which gets its name when all is written. On failure it is removed, and the shards."""
    partial = path + ".partial"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            yield file
        if shards is not None:
            shards.close()
        os.replace(partial, path)
    except BaseException as error:
        if os.path.exists(partial):
            os.remove(partial)
        if shards is not None:
            shards.remove()
        if isinstance(error, OSError) and error.filename is None:  # such as a full disk
            error.filename = path
        raise


def manifest_line(clip, shards):
    """The line of a clip, with its duration, its audio packed if there are shards; or a `LeftOut`."""
    line = {key: value for key, value in clip.items() if value is not None}
    name = line.get("id", line["audio"])
    content = line.pop("content", None)
    suffix = os.path.splitext(line["audio"])[1]
    is_segment = line.get("end_time", -1) >= 0
    try:
        place = name
        if content is None and not is_segment:
            place = line["audio"]
            content = pathlib.Path(place).read_bytes()
        end_s = line["end_time"] if is_segment else data.audio_duration(content, place)
        line["duration"] = round(end_s - max(line.get("begin_time", 0), 0), 4)
        if line["duration"] <= 0:
            return LeftOut("lasts 0 s or less", name)
        readable = data.parse_line(json.dumps(line).encode(), name, "")
        if shards is None:
            return line
        if "end_time" in line:
            content = flac(data.load_audio(readable))
            suffix = ".flac"
    except (data.InputError, OSError) as error:
        return LeftOut("cannot be used", str(error))
    line.update(shards.add(content, suffix))
    line.pop("begin_time", None)
    line.pop("end_time", None)
    return line


def flac(waveform):
    """The bytes of a FLAC file, 16 bit at 16 kHz, of a waveform (samples,)."""
    file = io.BytesIO()
    soundfile.write(file, waveform.numpy(), data.SAMPLE_RATE, subtype="PCM_16", format="FLAC")
    return file.getvalue()


def relative_where_below(path, folder):
    """A path relative to `folder` where it lies below it, so that both can be moved; else absolute."""
    return os.path.abspath(path).removeprefix(os.path.join(folder, ""))


class Shards:
    """Tar files NAME-00000.tar, NAME-00001.tar, … Their members are audio files, byte for byte.

    A manifest finds a clip by `offset` and `nbytes`, without reading the tar's headers.
    """

    def __init__(self, name):
        self.stem = os.path.abspath(name).removesuffix(".tar")
        self.paths = []
        self.tar = None
        os.makedirs(os.path.dirname(self.stem), exist_ok=True)

    def add(self, content, suffix):
        """Stores the bytes of a file. → the keys of its manifest line: audio, offset, nbytes"""
        if self.tar is None or self.tar.offset > SHARD_BYTES:
            self.open_next()
        header = tarfile.TarInfo(f"{len(self.paths) - 1:05d}-{self.tar.offset:010d}{suffix}")
        header.size = len(content)
        offset = self.tar.offset + tarfile.BLOCKSIZE  # the header is one block
        self.tar.addfile(header, io.BytesIO(content))
        self.tar.members.clear()  # tarfile would remember them all
        return {"audio": self.paths[-1], "offset": offset, "nbytes": len(content)}

    def open_next(self):
        self.close()
        path = f"{self.stem}-{len(self.paths):05d}.tar"
        try:
            self.tar = tarfile.TarFile(path, "x", format=tarfile.USTAR_FORMAT)
        except FileExistsError:
            raise data.InputError(f"--pack: {path} exists; remove it, or choose another name") from None
        self.paths.append(path)

    def close(self):
        if self.tar is not None:
            self.tar.close()

    def remove(self):
        with contextlib.suppress(OSError):  # a full disk refuses a tar's last block, and the tar goes anyway
            self.close()
        for path in self.paths:
            os.remove(path)


# ----------------------------------------------------------------------------------------------------------
# Reading corpora
# ----------------------------------------------------------------------------------------------------------


def keyed_lines(path):
    """{first word: rest of the line} of a text file such as Kaldi's. Raises InputError for a word twice."""
    rests = {}
    try:
        with open(path, encoding="utf-8-sig") as file:
            for line in file:
                words = line.split(maxsplit=1)
                if not words:
                    continue
                if words[0] in rests:
                    raise data.InputError(f"{path}: {words[0]} is there twice; remove one of the lines")
                rests[words[0]] = words[1].strip() if len(words) == 2 else ""
    except UnicodeDecodeError as error:
        raise data.InputError(f"{path}: not UTF-8 (byte {error.start}); convert it") from None
    except OSError as error:
        raise data.InputError(f"{path}: {error.strerror}; is ROOT the folder of this corpus?") from None
    return rests


def chosen_splits(folder, wanted):
    """The names of the folders in `folder`, or those of them that are wanted. Raises InputError."""
    splits = sorted(path.name for path in folder.glob("*") if path.is_dir())
    for split in wanted:
        if split not in splits:
            names = ", ".join(splits) or "none"
            raise data.InputError(f"--split {split}: no such folder in {folder}; it has {names}")
    return sorted(set(wanted)) or splits


def folder_or_itself(root, name):
    """The folder `name` in root, or root where it is that folder itself."""
    return root / name if (root / name).is_dir() else root
