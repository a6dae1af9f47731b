"""The manifest of any folder of audio files.

    python -m prepare.folder /my/recordings --language zh --out my.jsonl

Takes all audio files below ROOT, in linked folders too. The text of X.wav is read from X.txt beside it, in
UTF-8, if there is one.
"""

import os

import data
from prepare.manifest import LeftOut, corpus_parser, write_manifest

# What libsndfile or FFmpeg reads, films for their sound too.
SUFFIXES = """
    .wav .flac .ogg .oga .opus .spx .mp3 .mp2 .m4a .m4b .aac .mp4 .m4v .mov .3gp .3g2 .webm .mka .mkv .wma
    .wmv .asf .amr .ac3 .aiff .aif .aifc .au .snd .caf .w64 .rf64 .sph .nist .voc .ape .wv .tta .avi .flv .mpg
    .mpeg .ogv
""".split()
LAYOUT = f"audio files ({' '.join(SUFFIXES)})"


def parse_args(argv=None):
    parser = corpus_parser("folder", __doc__)
    parser.add_argument("--language", help="language of all clips, such as en; by default none is written")
    return parser.parse_args(argv)


def clips(args):
    language = data.language_code(args.language) if args.language else None
    real_files = set()
    for path in audio_files(args.root, set()):
        real_file = os.path.realpath(path)
        if real_file in real_files:
            yield LeftOut("a link to a file that is a clip already", path)
            continue
        real_files.add(real_file)
        try:
            text = text_beside(path)
        except UnicodeDecodeError:
            yield LeftOut("its .txt is not UTF-8", path)
            continue
        yield {"id": os.path.relpath(path, args.root), "audio": path, "text": text, "language": language}


def audio_files(folder, real_folders):
    """Yields the audio files below a folder, in order. Links may form a cycle: a folder is entered once."""
    real_folder = os.path.realpath(folder)
    if real_folder in real_folders:
        return
    real_folders.add(real_folder)
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            yield from audio_files(path, real_folders)
        elif os.path.isfile(path) and os.path.splitext(name)[1].lower() in SUFFIXES:
            yield path


def text_beside(audio):
    """The transcript of an audio file, or None."""
    for suffix in (".txt", ".TXT"):
        path = os.path.splitext(audio)[0] + suffix
        if os.path.isfile(path):
            with open(path, encoding="utf-8-sig") as file:
                return file.read().strip()
    return None


def main(args):
    write_manifest(args, clips(args), LAYOUT)


if __name__ == "__main__":
    data.run_script(main, parse_args())
