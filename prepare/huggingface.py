"""The manifest of a data set on the Hugging Face hub, or of a local folder in one of its layouts.

    python -m prepare.huggingface openslr/librispeech_asr --config clean --split test --language en \\
        --out test.jsonl --pack test.tar

NAME is a data set on the hub, or a folder with parquet files, with audio files and their metadata.csv, or
of `save_to_disk`. It is read as a stream by the package `datasets`, which requirements.txt does not install.
Code that a data set brings along is never run.

The bytes of each audio file are packed into shards as they are, by default beside the manifest. Texts are
written as they are. A clip without a column `id` gets the name of its split and the number of its row.
"""

import os

import data
from prepare.manifest import LeftOut, corpus_parser, write_manifest

LAYOUT = "rows with audio"
TEXT_NAMES = (
    "text",
    "txt",
    "sentence",
    "transcription",
    "transcript",
    "normalized_text",
    "raw_text",
    "raw_transcription",
)
LANGUAGE_NAMES = ("language", "locale", "lang")
SPEAKER_NAMES = ("speaker_id", "speaker", "client_id")
ID_NAMES = ("id", "__key__")  # __key__: of a tar in the layout of WebDataset
DATA_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".tsv")
SAVED_NAMES = ("state.json", "dataset_dict.json")  # files that only `save_to_disk` writes


def parse_args(argv=None):
    root_help = "data set on the hub, such as openslr/librispeech_asr, or a local folder"
    parser = corpus_parser("huggingface", __doc__, "NAME", root_help)
    parser.add_argument("--config", metavar="CONFIG", help="configuration; needed where there are several")
    parser.add_argument("--split", nargs="+", default=[], metavar="SPLIT", help="such as test; else all")
    parser.add_argument("--audio-column", metavar="COLUMN", help="by default the one of the type Audio")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text-column", metavar="COLUMN", help=f"by default one of {', '.join(TEXT_NAMES)}")
    text.add_argument("--no-text", action="store_true", help="write no transcripts")
    parser.add_argument(
        "--language",
        help=f"language of all clips, such as en; by default that of a column {', '.join(LANGUAGE_NAMES)}, "
        "and where there is none, none is written",
    )
    args = parser.parse_args(argv)
    if args.pack is None:
        args.pack = os.path.splitext(args.out)[0]
    return args


def clips(args):
    language = data.language_code(args.language) if args.language else None
    folders = sorted({os.path.dirname(path) for path in data_files(args.root)})
    for split, rows in chosen_splits(args).items():
        features = rows.features or features_of_first_row(args.root, rows)
        audio_column = chosen_audio_column(args, features)
        text_column = None if args.no_text else chosen_text_column(args, features)
        language_column = first_column(LANGUAGE_NAMES, features)
        speaker_column = first_column(SPEAKER_NAMES, features)
        id_column = first_column(ID_NAMES, features)

        for number, row in enumerate(stored_rows(args.root, rows)):
            clip_id = string_of(row, id_column, features) or f"{split}-{number}"
            text = string_of(row, text_column, features)
            text = None if text is None else text.rstrip("\r\n")  # the end of a .txt in a tar
            if text_column is not None and text is None:
                yield LeftOut("no transcript", clip_id)
                continue
            path, content = stored_audio(row.get(audio_column))
            if content is None and path:
                try:
                    content = bytes_of_file(beside_data(path, folders))
                except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError):
                    yield LeftOut("no audio file that can be read", f"{clip_id} {path}")
                    continue
            if not content:
                yield LeftOut("no audio", clip_id)
                continue
            yield {
                "id": clip_id,
                "audio": (path or "audio").split("::")[0],  # only its suffix is used: the clip is packed
                "content": content,
                "text": text,
                "language": language or string_of(row, language_column, features) or None,
                "speaker": string_of(row, speaker_column, features) or None,
            }


# ----------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------


def chosen_splits(args):
    """{split: its rows, not yet read} of the data set: all splits, or those that are wanted."""
    try:
        import datasets
    except ImportError as error:
        raise data.InputError(f"needs the package datasets ({error}): pip install datasets") from None
    datasets.utils.logging.set_verbosity(50)  # what it logs as an error it raises too

    is_saved = any(os.path.exists(os.path.join(args.root, name)) for name in SAVED_NAMES)
    if is_saved and args.config is not None:
        raise data.InputError(f"--config: {args.root} was written by save_to_disk and has none; leave it out")
    try:
        splits = saved_splits(args.root) if is_saved else streamed_splits(args.root, args.config)
    except (datasets.exceptions.DatasetsError, ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise data.InputError(f"{args.root}: {reason}") from None
    for split in args.split:
        if split not in splits:
            raise data.InputError(f"--split {split}: {args.root} has {', '.join(splits)}")
    return {split: splits[split] for split in args.split or splits}


def streamed_splits(root, config):
    """{split: rows} of a data set on the hub or of a folder, as `load_dataset` streams them."""
    import datasets

    builder = datasets.load_dataset_builder(root, config)
    builder.config.decode_num_threads = 0  # else threads decode the audio files of a folder on the hub
    return builder.as_streaming_dataset()


def saved_splits(root):
    """{split: rows} of a folder that was written by `save_to_disk`."""
    import datasets

    saved = datasets.load_from_disk(root)
    if isinstance(saved, datasets.Dataset):
        saved = {str(saved.split or "train"): saved}
    return {split: rows.to_iterable_dataset() for split, rows in saved.items()}


def features_of_first_row(root, rows):
    """The columns of a split that states none, such as one of JSON or CSV files."""
    import datasets
    import pyarrow

    for row in stored_rows(root, rows):
        return datasets.Features.from_arrow_schema(pyarrow.Table.from_pylist([row]).schema)
    raise data.InputError(f"{root}: has no row")


def stored_rows(root, rows):
    """Yields the rows of a split as dicts of what is stored, without decoding anything.

    Features are taken away, because the package would apply them: it encodes and decodes by torchcodec, even
    where an audio file is only passed on. Raises InputError that names a file which cannot be read.
    """
    import datasets

    try:
        yield from rows.cast(datasets.Features())
    except (datasets.exceptions.DatasetsError, ValueError, TypeError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        remedy = "fetch the file anew, or take it away"
        raise data.InputError(f"{faulty_file(root) or f'{root}: {reason}'}; {remedy}") from None


def data_files(root):
    """The files with rows below a local folder, in order; none where it is a name on the hub."""
    paths = []
    for folder, _, names in os.walk(root):
        paths += [os.path.join(folder, name) for name in names if name.endswith(DATA_SUFFIXES)]
    return sorted(paths)


def faulty_file(root):
    """The first data file of a local folder that cannot be read like the others, and why; None if all can."""
    import pyarrow.parquet

    columns = None
    for path in data_files(root):
        if data.is_lfs_pointer(path):
            return f"{path}: is a pointer of git lfs, not the data"
        if not path.endswith(".parquet"):
            continue
        try:
            own_columns = set(pyarrow.parquet.read_schema(path).names)
        except (ValueError, OSError):
            return f"{path}: is cut off, or no parquet file"
        columns = columns or own_columns
        if own_columns != columns:
            return f"{path}: has the columns {sorted(own_columns)}, the files before {sorted(columns)}"
    return None


def beside_data(path, folders):
    """A path of an audio file; a relative one starts at the data file that names it."""
    for folder in folders:
        if os.path.exists(os.path.join(folder, path)):
            return os.path.join(folder, path)
    return path


def stored_audio(value):
    """(path or None, bytes or None) of the value of an audio column."""
    if isinstance(value, dict):
        return value.get("path"), value.get("bytes")
    if isinstance(value, bytes):
        return None, value
    return (value, None) if isinstance(value, str) else (None, None)


def bytes_of_file(path):
    """The content of a file that is named by a path or by a URL of fsspec, such as hf://… or zip://…::…"""
    import fsspec

    with fsspec.open(path, "rb") as file:
        return file.read()


def string_of(row, column, features):
    """A value as a string, that of a class as the name of the class. None where there is no value."""
    value = row.get(column)
    if value is None:
        return None
    names = getattr(features[column], "names", None)
    if names is not None and isinstance(value, int):
        return names[value] if value >= 0 else None  # −1: not known
    return str(value)


# ----------------------------------------------------------------------------------------------------------
# Columns
# ----------------------------------------------------------------------------------------------------------


def chosen_audio_column(args, features):
    import datasets

    columns = [column for column in features if isinstance(features[column], datasets.Audio)]
    return only_column(args, features, "audio", args.audio_column, columns)


def chosen_text_column(args, features):
    column = only_column(args, features, "text", args.text_column, columns_named(TEXT_NAMES, features))
    feature = features[column]
    if not holds_strings(feature):
        raise data.InputError(f"--text-column {column}: {args.root} has no text there, but {feature}")
    if args.text_column is None and not is_string(feature):
        # Numbers may be what the package guesses from a metadata.csv: 007 has become 7.
        remedy = f"give --text-column {column}, or store strings, for instance in a metadata.jsonl"
        raise data.InputError(f"{args.root}: column {column} is {feature}, and not of strings; {remedy}")
    return column


def only_column(args, features, kind, wanted, columns):
    """The column that a flag wants, else the only one of `columns`. Raises InputError."""
    names = ", ".join(features) or "none"
    if wanted is not None:
        if wanted not in features:
            raise data.InputError(f"--{kind}-column {wanted}: no such column; {args.root} has {names}")
        return wanted
    if len(columns) == 1:
        return columns[0]
    problem = f"{kind} may be {' or '.join(columns)}" if columns else f"no column is known as {kind}"
    flags = "--text-column or --no-text" if kind == "text" else "--audio-column"
    raise data.InputError(f"{args.root}: {problem}; choose by {flags}; the columns are {names}")


def first_column(names, features):
    """The column that has the first of these names, or None."""
    columns = columns_named(names, features)
    return columns[0] if columns else None


def columns_named(names, features):
    """The columns that have one of these names, in capitals or not, and hold strings."""
    columns = []
    for name in names:
        for column in features:
            if column.lower() == name and holds_strings(features[column]):
                columns.append(column)
    return columns


def holds_strings(feature):
    """Can `string_of` write it as it was? Strings, classes and whole numbers can; 1 may have become 1.0."""
    import datasets

    is_whole = isinstance(feature, datasets.Value) and "int" in feature.dtype
    return is_string(feature) or is_whole or isinstance(feature, datasets.ClassLabel)


def is_string(feature):
    import datasets

    return isinstance(feature, datasets.Value) and "string" in feature.dtype


def main(args):
    write_manifest(args, clips(args), LAYOUT, is_folder=False)


if __name__ == "__main__":
    data.run_script(main, parse_args())
