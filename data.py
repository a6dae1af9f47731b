"""Manifests, audio, log-mel features and batches: the one data path of every script.

    manifest line → Clip → load_audio → waveform (samples,) → collate → Batch (mel, lengths, prompt ids)

A manifest is JSON Lines, one clip a line (README, "Data format"). `load_audio` is the only place that decodes
audio, by soundfile: files, segments, byte ranges of a tar. Features are Whisper's log-mel with 128 bins, of
each clip alone. The order of the clips is a pure function of (seed, step): see `batch_indices`.

    python data.py check example/train.jsonl          # reads every clip, reports every defect with its line
    python data.py librispeech ROOT --out m.jsonl     # also aishell1, wenetspeech, kaldi, fsdd, folder
"""
import argparse
import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import unicodedata
import zlib
from pathlib import Path

import ijson
import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torchaudio
from tqdm import tqdm

SAMPLE_RATE = 16_000            # Hz
N_FFT, HOP, N_MELS = 400, 160, 128   # 25 ms window, 10 ms hop
BLOCK = 1_280                   # samples of one audio token: 80 ms = 8 mel frames = 4 encoder frames
# what a resumed run may change: it moves no weight, but for --steps, which re-draws the schedule
RESUME_FREE = {"steps", "resume", "overwrite", "keep", "on_bad_audio", "out", "eval", "workers",
               "micro_seconds", "save_every", "eval_every", "sample_every"}
RUN_FILES = r"checkpoints|model|eval-\d+|summary\.json|(metrics|samples|bad|nonfinite-\d+-\d+)\.jsonl(\.new)?"
FIELDS = {                      # a manifest's keys: their types, and what to call them
    "audio": ((str,), "a path"), "text": ((str,), "a string"), "language": ((str,), "a string"),
    **dict.fromkeys(("duration", "begin_time", "end_time"), ((int, float), "a number of seconds")),
    **dict.fromkeys(("offset", "nbytes", "crc32"), ((int,), "a whole number of bytes"))}
STATES = ("text", "no text", "failed")      # of a line; failed: a result line with "error" in its place
ROW = np.dtype([("offset", "<i8"), ("line", "<u4"), ("seconds", "<f4"), ("language", "u1"), ("state", "u1")])
SHARD_BYTES = 10**9             # a tar shard ends at the first clip beyond this
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64",
                  ".sph", ".m4a", ".aac", ".mp4", ".webm", ".wma")          # last five: unreadable
DURATION_TOLERANCE_S = 0.1      # manifest against decoded audio; codecs pad by a few tens of milliseconds
LANGUAGES = {                   # Qwen3-ASR's thirty, as its prompt names them
    "ar": "Arabic", "yue": "Cantonese", "zh": "Chinese", "cs": "Czech", "da": "Danish", "nl": "Dutch",
    "en": "English", "fil": "Filipino", "fi": "Finnish", "fr": "French", "de": "German", "el": "Greek",
    "hi": "Hindi", "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean",
    "mk": "Macedonian", "ms": "Malay", "fa": "Persian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian",
    "ru": "Russian", "es": "Spanish", "sv": "Swedish", "th": "Thai", "tr": "Turkish", "vi": "Vietnamese"}
CODES = {**{name.lower(): code for code, name in LANGUAGES.items()}, "mandarin": "zh", "cmn": "zh"}
SCRIPTS = {"HIRAGANA": "ja", "KATAKANA": "ja", "HANGUL": "ko", "CJK": "zh", "LATIN": "en", "CYRILLIC": "ru",
           "ARABIC": "ar", "THAI": "th", "GREEK": "el", "DEVANAGARI": "hi"}     # of a letter's Unicode name

class InputError(ValueError):
    """A user's mistake: shown as one line (what, where, remedy), exit status 2, no traceback."""

class AudioError(InputError):
    """A clip that cannot be used, a full disk: each rank that meets it prints it, it may be the only one."""

def one_line(error):
    return " ".join(str(error).split())[:300]

# ---- Manifest ----------------------------------------------------------------------------------------------
@dataclasses.dataclass(slots=True)
class Clip:
    """One manifest line. Times in s, `offset`/`nbytes` in bytes; `fields`: the line as it was read."""
    audio: str                      # path, made absolute against the manifest's folder
    duration: float                 # s, of the clip itself: end − begin for a segment
    where: str                      # "train.jsonl:12", for messages
    fields: dict
    text: str | None = None
    language: str | None = None
    begin_time: float = -1.0        # −1: from the start
    end_time: float = -1.0          # −1: to the end
    offset: int | None = None       # byte range inside `audio`; None: the whole file
    nbytes: int | None = None
    crc32: int | None = None        # of those bytes

    @property
    def key(self):
        return (self.audio, self.offset, max(self.begin_time, 0), max(self.end_time, -1))

def parse_line(line, where, folder, text_field="text"):
    """A `Clip` from one line of JSON. Raises InputError that names `where` and the field."""
    try:
        fields = json.loads(line)
        if "\\u" in line:
            json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:   # also 5,000 digits, half a surrogate pair, 1,000 brackets
        raise InputError(f"{where}: not JSON ({error}); a manifest has one object a line") from None
    if not isinstance(fields, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(fields).__name__}")
    found = {}
    for name, (kinds, what) in FIELDS.items():
        key = text_field if name == "text" else name
        value = fields.get(key)
        if value is None and name in ("audio", "duration"):
            raise InputError(f'{where}: key "{name}" is missing; every line needs {what}, "{name}"')
        if value is None:
            continue
        if type(value) not in kinds:                    # type, not isinstance: True is no number
            raise InputError(f'{where}: "{key}" must be {what}, found {json.dumps(value)[:60]}')
        if kinds[0] is not str and not -2**62 < value < 2**62:        # NaN, infinity, or in no file
            raise InputError(f'{where}: "{key}" must be finite, found {str(value)[:20]}')
        found[name] = value
    clip = Clip(where=where, fields=fields, **found)
    if "\0" in clip.audio or not clip.audio:
        raise InputError(f'{where}: "audio" is not a path: {clip.audio!r}')
    if clip.duration <= 0:
        raise InputError(f'{where}: "duration" must be above 0 s, found {clip.duration:g}')
    if clip.end_time >= 0 and clip.end_time <= max(clip.begin_time, 0):
        raise InputError(f"{where}: end_time {clip.end_time:g} is not after begin_time {clip.begin_time:g}")
    if ((clip.offset is None) != (clip.nbytes is None)
            or (clip.offset is not None and (clip.offset < 0 or clip.nbytes <= 0))):
        raise InputError(f'{where}: "offset" and "nbytes" go together, offset ≥ 0 and nbytes > 0')
    clip.audio = os.path.join(folder, clip.audio)
    return clip

def open_manifest(path):
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"manifest {path}: {error.strerror}; give the path of a JSON Lines file") from None

def manifest_clips(path, text_field="text", errors=None, begin=0, end=math.inf, number=1):
    """Yields (byte offset, line number, `Clip`) of the lines that start in [begin, end), line `number` first.
    Blank lines, CRLF and a byte-order mark are accepted. Defects go to `errors` (a list), else InputError."""
    folder = os.path.dirname(os.path.abspath(path))
    with open_manifest(path) as file:
        if begin:
            file.seek(begin)
        for raw in file:
            if begin >= end:
                break
            where = f"{path}:{number}"
            try:
                if number == 1 and raw.startswith(b"\x1f\x8b"):
                    raise InputError(f"{where}: gzip; decompress the manifest")
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if line:
                    yield begin, number, parse_line(line, where, folder, text_field)
            except (InputError, UnicodeDecodeError) as error:
                if isinstance(error, UnicodeDecodeError):
                    error = InputError(f"{where}: not UTF-8 (byte {error.start}); save the manifest as UTF-8")
                if errors is None:
                    raise error from None
                errors.append(str(error))
            begin, number = begin + len(raw), number + 1

def read_manifest(path, text_field="text"):
    """All clips of a manifest, in order. Raises InputError."""
    if clips := [clip for _, _, clip in manifest_clips(path, text_field)]:
        return clips
    raise InputError(f"manifest {path}: holds no clip")

def index_span(span):
    """The rows (n,) ROW of a part of a manifest: the arguments of `manifest_clips`."""
    path, text_field, begin, end, number = span
    codes, rows = {code: i for i, code in enumerate(LANGUAGES)}, []
    for offset, line, clip in manifest_clips(path, text_field, None, begin, end, number):
        code = language_code(clip.language) if clip.language else None
        state = ("text" if clip.text is not None or text_field is None else
                 "failed" if "error" in clip.fields else "no text")
        rows.append((offset, line, clip.duration, codes.get(code, 254 if code else 255), STATES.index(state)))
    return np.array(rows, ROW)

def manifest_index(path, text_field):
    """One ROW per clip of a manifest, memory-mapped: all processes of a machine share it. Made, with every
    line checked, when the file is first seen or has changed; kept in $XDG_CACHE_HOME/asr-opd."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "asr-opd")
    name = hashlib.sha256(os.fsencode(f"{os.path.realpath(path)} {text_field} {ROW}")).hexdigest()[:32]
    try:
        with open_manifest(path) as file:
            status, spans, begin, number = os.fstat(file.fileno()), [], 0, 1
            cache = folder / f"{name}-{status.st_size}-{status.st_mtime_ns}.npy"
            if not cache.exists():
                while block := file.read(2**24):
                    block += file.readline()
                    spans.append((path, text_field, begin, begin + len(block), number))
                    begin, number = begin + len(block), number + block.count(b"\n")
        if not cache.exists():
            args = min(len(spans), os.cpu_count()), signal.signal, (signal.SIGTERM, signal.SIG_DFL)
            with multiprocessing.get_context("fork").Pool(*args) if len(spans) > 4 else (
                    contextlib.nullcontext()) as pool:      # SIG_DFL: else the pool could not end them
                parts = (pool.imap if pool else map)(index_span, spans)
                rows = np.concatenate([np.empty(0, ROW), *parts])
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                np.save(file, rows)
            os.replace(file.name, cache)
            for old in set(folder.glob(f"{name}-*")) - {cache}:
                old.unlink(missing_ok=True)
        if (rows := np.load(cache, mmap_mode="r")).dtype != ROW:
            raise ValueError("is another's")
    except InputError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{folder}, index of {path}: {one_line(error)}; see XDG_CACHE_HOME") from None
    if not len(rows):
        raise InputError(f"manifest {path}: holds no clip")
    return rows

class Clips:
    """The clips of several manifests as a sequence, without those over max_seconds (n_long) and those that
    eval.py could not decode (n_failed), with their `seconds` (n,). A line is read when its clip is asked for;
    in memory are 8 bytes a clip at most. InputError where a line has no `text_field` (None: none wanted)."""
    def __init__(self, paths, text_field, max_seconds):
        self.paths, self.text_field = paths, text_field
        try:
            if int(os.environ.get("LOCAL_RANK", 0)) == 0:
                [manifest_index(path, text_field) for path in paths]
        finally:                                # an error is every rank's: the others meet it below
            barrier()
        self.indexes = [manifest_index(path, text_field) for path in paths]
        self.ends = np.cumsum([len(index) for index in self.indexes])
        columns = ([index[key] for index in self.indexes] for key in ("seconds", "state", "language"))
        seconds, states, languages = (c[0] if len(c) == 1 else np.concatenate(c) for c in columns)
        if (missing := states == STATES.index("no text")).any():
            path, line = self.place(int(missing.argmax()))[:2]
            raise InputError(f'{path}:{line}: no "{text_field}", which every line needs (--text-field)')
        failed, long = states == STATES.index("failed"), seconds > np.float32(max_seconds)
        self.rows, self.seconds = range(len(seconds)), seconds          # of the index, which all share
        if (failed | long).any():
            self.rows = np.flatnonzero(~(failed | long)).astype(np.uint32)
            self.seconds, languages = seconds[self.rows], languages[self.rows]
        self.n_failed, self.n_long = int(failed.sum()), int((long & ~failed).sum())
        if not len(self.rows):
            raise InputError(f"{', '.join(paths)}: no clip of at most --max-seconds {max_seconds:g}")
        self.of_each_language = [self[int(i)] for i in np.unique(languages, return_index=True)[1]]
    def place(self, row):
        """(path, line number, byte offset) of a row, counted over all manifests."""
        file = int(np.searchsorted(self.ends, row, side="right"))
        entry = self.indexes[file][row - int(self.ends[file])]                      # from the end: negative
        return self.paths[file], int(entry["line"]), int(entry["offset"])
    def __len__(self):
        return len(self.rows)
    def __getitem__(self, i):
        path, number, offset = self.place(int(self.rows[i]))
        for _, _, clip in manifest_clips(path, self.text_field, None, offset, offset + 1, number):
            return clip
        raise InputError(f"{path}:{number}: has changed since this run began")

def language_code(name):
    """A manifest's `language` as a code: "Chinese", "zh-CN", "zh" → "zh"; None stays None."""
    name = re.split("[-_]", (name or "").strip().lower())[0]
    return CODES.get(name, name) or None

def script_language(text):
    """Language code by the script of a text: any kana ja, else any Hangul ko, else any CJK zh, else the most
    frequent script's (Latin en, Cyrillic ru, …); None without letters. Control tokens do not count."""
    text = unicodedata.normalize("NFKC", re.sub(r"<[^<>\s]{1,40}>", "", text))
    scripts = [unicodedata.name(c, "?").split()[0] for c in text if c.isalpha()]
    found = [SCRIPTS[script] for script in scripts if script in SCRIPTS]
    return next((code for code in ("ja", "ko", "zh") if code in found),
                max(found, key=found.count, default=None))

# ---- Audio -------------------------------------------------------------------------------------------------
resampler = functools.lru_cache(16)(lambda rate: torchaudio.transforms.Resample(rate, SAMPLE_RATE))

def cut_off(raw):
    """Has a WAV fewer bytes than it says (ffffffff: unknown), an Ogg no end? libsndfile tells of neither."""
    if raw[:4] == b"RIFF":
        return len(raw) + 64 < int.from_bytes(raw[4:8], "little") < 0x7FFF_0000
    p = raw[raw.rfind(b"OggS"):]            # the last page: flags at byte 5 (4: end), sizes from byte 26 on
    return raw[:4] == b"OggS" and (len(p) < 28 or p[5] < 4 or len(p) < 27 + sum(p[26:27 + p[26]]))

def load_audio(clip):
    """The waveform of a clip: (samples,) float32 at 16 kHz, channels averaged. Raises AudioError with line
    and remedy. libsndfile shortens damaged files silently: the length is compared with `duration`."""
    def bad(reason):
        return AudioError(f"{clip.where}: {clip.audio}: {reason}")

    try:
        if os.path.exists(clip.audio) and not os.path.isfile(clip.audio):       # a pipe would be waited for
            raise bad("is a directory, or no plain file")
        with open(clip.audio, "rb") as raw:         # by content, whatever the name's extension claims
            size, offset = os.fstat(raw.fileno()).st_size, clip.offset or 0
            nbytes = size if clip.nbytes is None else clip.nbytes
            if offset + nbytes > size:
                raise bad(f"ends before byte {offset + nbytes}; the shard is shorter than the manifest says")
            raw.seek(offset)
            # A segment of a long recording is sought, anything else read at once.
            seek = clip.end_time >= 0 and clip.offset is None and clip.crc32 is None
            content = raw if seek else io.BytesIO(raw.read(nbytes))
            if clip.crc32 is not None and clip.crc32 != zlib.crc32(content.getbuffer()):
                raise bad("has changed since the manifest was made (crc32 of its bytes); import it again")
            if not seek and cut_off(content.getvalue()):
                raise bad("is cut off: its header or last page promises more; get it whole, or re-encode it")
            with soundfile.SoundFile(content) as file:
                rate, n_frames = file.samplerate, file.frames
                begin = round(max(clip.begin_time, 0) * rate)
                end = round(clip.end_time * rate) if clip.end_time >= 0 else n_frames
                if n_frames and (begin >= n_frames or end > n_frames + round(DURATION_TOLERANCE_S * rate)):
                    raise bad(f"{clip.begin_time:g}–{clip.end_time:g} s is outside: {n_frames / rate:.2f} s")
                end = min(end, n_frames)
                if end - begin > (clip.duration + 60) * rate or rate > 5_000 * math.gcd(rate, SAMPLE_RATE):
                    raise bad(f"states {n_frames} samples at {rate} Hz: streamed or damaged; re-encode it")
                # libsndfile's seek misplaces Vorbis by a fraction of a second and spoils MP3's first frame.
                first = 0 if file.subtype == "VORBIS" or file.subtype.startswith("MPEG") else begin
                file.seek(first)
                channels = file.read(end - first, dtype="float32", always_2d=True)      # (samples, channels)
                channels = channels[begin - first:]
    except OSError as error:
        raise bad(f"{error.strerror or error}; relative paths start at the manifest's folder") from None
    except soundfile.LibsndfileError as error:
        raise bad(f"libsndfile cannot read it ({error.error_string}); convert it to wav or flac") from None
    if len(channels) == 0:
        raise bad("holds no samples; re-encode it or remove the line")
    if len(channels) < end - begin:
        raise bad(f"is damaged: {len(channels)} of {end - begin} samples could be decoded")
    if not np.isfinite(channels).all():
        raise bad("holds NaN or infinite samples; repair or remove it")
    waveform = channels.mean(axis=1)
    if channels.shape[1] > 1 and np.square(waveform).mean() < 1e-3 * np.square(channels).mean():
        raise bad("its channels cancel when averaged (opposite phase); extract one channel")
    decoded_s = len(waveform) / rate
    if abs(decoded_s - clip.duration) > DURATION_TOLERANCE_S + 0.01 * clip.duration:
        raise bad(f"{decoded_s:.2f} s decoded, the manifest says {clip.duration:.2f} s; is it truncated?")
    waveform = torch.from_numpy(np.ascontiguousarray(waveform))
    return waveform if rate == SAMPLE_RATE else resampler(rate)(waveform)

def load_or_note(clip, bad, problem=None):
    """`load_audio`; of a clip that cannot be used, or has another `problem`, (0,) samples, which keep its
    place but count for nothing, and a line in the list `bad`."""
    try:
        if problem:
            raise AudioError(f"{clip.where}: {problem}")
        return load_audio(clip)
    except AudioError as error:
        bad.append(dict(clip=clip.where, audio=clip.audio, reason=str(error)))
        return torch.zeros(0)

def clip_from_file(path):
    """A `Clip` for a bare audio file, its duration from the header."""
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file")
    try:
        info = soundfile.info(path)
    except (OSError, TypeError, soundfile.LibsndfileError) as error:     # TypeError: soundfile, of a *.raw
        raise InputError(f"{path}: neither a .jsonl manifest nor readable audio ({error})") from None
    fields = dict(audio=path, duration=info.duration)
    return Clip(os.path.abspath(path), max(info.duration, 1e-3), "--data", fields)

# ---- Features ----------------------------------------------------------------------------------------------
mel_filters = functools.cache(lambda: torchaudio.functional.melscale_fbanks(                  # → (128, 201)
    N_FFT // 2 + 1, 0.0, 8000.0, N_MELS, SAMPLE_RATE, norm="slaney", mel_scale="slaney").T)

def log_mel(waveform, padded_samples=None):
    """Whisper's log-mel of one clip: (samples,) float32 → (128, F), F = padded_samples // 160. Zero-padded at
    its end, by default to a multiple of 1,280 samples (80 ms): 8 frames per audio token. Equal to
    `WhisperFeatureExtractor(feature_size=128)` on the padded clip."""
    padding = (padded_samples or max(len(waveform) + -len(waveform) % BLOCK, BLOCK)) - len(waveform)
    waveform = torch.nn.functional.pad(waveform, (0, padding))
    spectrum = torch.stft(waveform, N_FFT, HOP, window=torch.hann_window(N_FFT), center=True,
                          pad_mode="reflect", return_complex=True)[:, :-1]                    # (201, F)
    mel = (mel_filters() @ spectrum.abs().square()).clamp(min=1e-10).log10()
    return (mel.maximum(mel.max() - 8.0) + 4.0) / 4.0

def n_audio_tokens(n_samples):
    """Audio tokens of n_samples at 16 kHz, 12.5 a second: 48,000 → 37, 480,000 → 375."""
    return max((-(-n_samples // HOP) + 1) // 2 // 4, 1)

# ---- Batches -----------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Batch:
    """B clips as a model takes them. Prompts are padded on the left, so transcripts start in one column."""
    mel: torch.Tensor               # (B, 128, F) float32, exactly 0 beyond a clip's mel_lens
    mel_lens: torch.Tensor          # (B,) frames, multiples of 8
    audio_lens: torch.Tensor        # (B,) audio tokens
    prompt_ids: torch.Tensor        # (B, S)
    prompt_mask: torch.Tensor       # (B, S) True = prompt, False = padding on the left
    seconds: torch.Tensor           # (B,) clip durations; 0: no clip, the place counts for nothing
    silent: torch.Tensor            # (B,) bool: every sample is zero
    languages: list                 # B codes, None = unknown; empty where prompts name no language
    padded: bool                    # some clip is shorter than the batch
    def to(self, device):
        return Batch(*(x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x
                       for x in vars(self).values()))

def collate(waveforms, front_end, languages=None, mels=None):
    """`Batch` of waveforms [(samples,)], languages [code, name, None], `mels` [(128, F)] if at hand."""
    mels = [front_end.features(w) for w in waveforms] if mels is None else mels
    unknown = [None] * len(mels)
    languages = [language_code(x) for x in languages or unknown] if front_end.languages else []
    audio_lens = [front_end.n_audio_tokens(len(w)) for w in waveforms]
    mel_lens = torch.tensor([mel.shape[1] for mel in mels])
    longest = int(mel_lens.max())
    mel = torch.zeros(len(mels), N_MELS, longest + -longest % front_end.frame_multiple)
    for b in range(len(mels)):
        mel[b, :, :mel_lens[b]] = mels[b]
    prompts = [front_end.prompt(n, language) for n, language in zip(audio_lens, languages or unknown)]
    return Batch(mel, mel_lens, torch.tensor(audio_lens), *pad_left(prompts, front_end.pad_id),
                 torch.tensor([len(w) / SAMPLE_RATE for w in waveforms]),
                 torch.tensor([len(w) > 0 and not w.any() for w in waveforms]), languages,
                 int(mel_lens.min()) < mel.shape[2])

def pad_left(prompts, pad_id):
    """Prompt ids (B, S) and mask (B, S) of lists of ids: transcripts then start in one column."""
    S = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), S), pad_id), torch.zeros(len(prompts), S, dtype=torch.bool)
    for b, prompt in enumerate(prompts):
        ids[b, S - len(prompt):], mask[b, S - len(prompt):] = torch.tensor(prompt), True
    return ids, mask

def epoch_order(places, n, seed, epoch):
    """Clip numbers at `places` (m,) of this epoch's permutation of n clips, which is never there as a whole:
    a Feistel network over the next power of four, walked until inside."""
    bits = np.uint64(max(((n - 1).bit_length() + 1) // 2, 1))
    low = (np.uint64(1) << bits) - np.uint64(1)
    keys = np.random.default_rng((seed, 0, epoch)).integers(2**63, size=8, dtype=np.uint64)

    def shuffled(x):
        left, right = x >> bits, x & low
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & low)
        return left << bits | right

    found = shuffled(np.asarray(places, np.uint64))
    while (outside := found >= n).any():
        found[outside] = shuffled(found[outside])
    return found.astype(np.int64)

def batch_indices(seconds, batch_size, seed, step, pool_batches=50):
    """Clip numbers (batch_size,) of the global batch of `step` (from 0): a pure function of (seed, step). One
    endless stream, a fresh permutation each epoch, is cut into pools of `pool_batches` batches (at most an
    epoch); each is sorted by duration, cut into batches, and these are shuffled. No clip is dropped."""
    n, pool_batches = len(seconds), max(min(pool_batches, len(seconds) // batch_size), 1)
    pool, place = divmod(step, pool_batches)
    size = batch_size * pool_batches
    epoch, places = divmod(np.arange(pool * size, (pool + 1) * size), n)
    stream = np.concatenate([epoch_order(places[epoch == e], n, seed, int(e)) for e in np.unique(epoch)])
    # sorted within an epoch: only a batch that straddles two epochs can hold a clip twice
    batches = stream[np.lexsort((seconds[stream], epoch))].reshape(pool_batches, batch_size)
    return batches[np.random.default_rng((seed, 1, pool)).permutation(pool_batches)[place]]

def micro_batches(indices, seconds, micro_seconds, n_pieces=1):
    """Cuts clips, longest first, so that clips × longest ≤ micro_seconds (one clip may exceed it), and into
    at least n_pieces (or single clips)."""
    cut, current = [], []
    for i in sorted(indices, key=lambda i: (-seconds[i], i)):
        if current and (len(current) + 1) * seconds[current[0]] > micro_seconds:
            cut.append(current)
            current = []
        current.append(i)
    cut = cut + [current] if current else cut
    while len(cut) < min(n_pieces, len(indices)):
        largest = max(cut, key=len)
        place, half = cut.index(largest), len(largest) // 2
        cut[place:place + 1] = largest[:half], largest[half:]
    return cut

class StepDataset(torch.utils.data.Dataset):
    """Item s: this rank's micro-batches of step s, which `make(clip numbers, step, bad)` builds in a worker,
    as many on every rank, and `bad`, filled by `load_or_note`; item −1: the longest clips, to try them."""
    def __init__(self, seconds, batch_size, micro_seconds, seed, rank, world, make):
        self.seconds, self.batch_size, self.micro_seconds, self.seed, self.rank, self.world, self.make = (
            seconds, batch_size, micro_seconds, seed, rank, world, make)
    def __getitem__(self, step):
        if step >= 0:
            batch = batch_indices(self.seconds, self.batch_size, self.seed, step)
        else:                   # of n clips the longest may have micro_seconds / n; which n takes the most?
            order, n = np.argsort(self.seconds), np.arange(1, self.batch_size // self.world + 1)
            ascending = self.seconds[order]
            places = np.searchsorted(ascending, self.micro_seconds / n, side="right") - 1
            places[0] = len(order) - 1
            batch = np.full(self.batch_size, order[places[(n * ascending[places] * (places >= 0)).argmax()]])
        bad, shares = [], [batch[rank::self.world].tolist() for rank in range(self.world)]
        n_pieces = max(len(micro_batches(share, self.seconds, self.micro_seconds)) for share in shares)
        cuts = micro_batches(shares[self.rank], self.seconds, self.micro_seconds, n_pieces)
        try:
            return [self.make(cut, max(step, 0), bad) for cut in cuts], bad
        except InputError as error:  # a worker would wrap it in its traceback; step_batches raises it plainly
            return AudioError(error)

def step_batches(dataset, first_step, last_step, workers):
    """Yields (step, micro-batches, bad clips): step −1, a trial of the longest clips that changes nothing,
    then [first_step, last_step). Read ahead by `workers` processes (0: by this)."""
    steps = [-1, *range(first_step, last_step)] if first_step < last_step else []
    # torchrun's SIGTERM reaches the workers too, who are needed until their rank ends them
    init = lambda _: (torch.set_num_threads(1), signal.signal(signal.SIGTERM, signal.SIG_IGN))
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=steps, num_workers=workers,
                                         worker_init_fn=init)
    for step, item in zip(steps, loader):
        if isinstance(item, InputError):
            raise item
        yield step, *item
        if step < 0 and rank_and_world()[0] == 0:
            sizes = ", ".join(f"{key[:3]} {gb:.2f} GB" for key, gb in memory().items())
            with tqdm.external_write_mode():                    # beside the progress bar, not behind it
                print(f"probe: {dataset.batch_size} of the longest clips fit; peak {sizes}", flush=True)

# ---- Processes, output folders, errors: the plumbing that every script shares ------------------------------
def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def setup_distributed():
    """(rank, world size, device). Under torchrun LOCAL_RANK picks the device, RANK the data."""
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    return (*rank_and_world(), device)

def all_reduce_sum(values, device):
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()

def gather(value):
    values = [value] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values

def barrier():
    if dist.is_initialized():
        dist.barrier()

def find_run(args, rank):
    """Looks at --out before anything slow. → (step to go on from, its checkpoint or None); None: finished.
    InputError where it may not be touched, or where arguments beyond RESUME_FREE have changed."""
    if args.batch_size % (world := rank_and_world()[1]):
        raise InputError(f"--batch-size {args.batch_size} is not divisible by the {world} processes")
    say = print if rank == 0 else lambda *_, **__: None
    if args.overwrite and args.resume == "auto":
        raise InputError("--overwrite and --resume auto contradict each other; give one of them")
    out, used = Path(args.out), any(re.fullmatch(RUN_FILES, path.name) for path in Path(args.out).glob("*"))
    links = [out / "model", out / "checkpoints" / "latest"]
    try:
        summary = read_json(out / "summary.json", {"steps": None})
        config = read_json(out / "config.json", None if used else {"manifest_sha256": None})
        ours = "manifest_sha256" in config and "steps" in summary and (out.is_dir() or not out.exists())
    except (OSError, TypeError, ValueError):
        ours = False
    if not ours or any(os.path.lexists(link) and not link.is_symlink() for link in links):
        raise InputError(f"--out {args.out} already holds a run, or files, that are not ours; choose another")
    latest = os.path.realpath(links[1])
    if not os.path.exists(latest):      # lost by a copy, or a kill came before it: the newest there is
        latest = max(map(str, out.glob("checkpoints/step-*[0-9]")), default=latest)
    values = [value if isinstance(value, list) else [value] for value in vars(args).values()]
    for path in map(str, sum(values, [])) if args.overwrite else ():
        if os.path.exists(path) and out.resolve() in Path(path).resolve().parents:
            raise InputError(f"--overwrite empties --out {args.out}, where {path} lies; choose another")
    if not os.path.exists(latest) or args.overwrite:
        if args.resume == "auto":
            say(f"{args.out}: no checkpoint to go on from; starting from step 0", flush=True)
        return 0, None
    if args.resume != "auto":
        raise InputError(f"--out {args.out} already holds a run: use --resume auto, or --overwrite")
    step = int(latest[-7:])
    for name, old in {"script": config["script"], **config["args"]}.items():
        new = os.path.basename(sys.argv[0]) if name == "script" else getattr(args, name, old)
        if name not in RESUME_FREE and new != old:
            raise InputError(f"--resume auto: --{name.replace('_', '-')} was {old}, now {new}; keep it")
    for path, old in config["manifest_sha256"].items():
        if hashlib.file_digest(open_manifest(path), "sha256").hexdigest() != old:
            raise InputError(f"--resume auto: {path} has changed since the run began; keep it")
    if args.steps < step:
        raise InputError(f"--steps {args.steps}: {args.out} is at step {step} already")
    if step == args.steps == summary["steps"] and links[0].exists():
        say(f"{args.out}: finished at step {step}; nothing to do", flush=True)
        return None, None
    say(f"{args.out}: goes on from step {step}", flush=True)
    return step, latest

def start_run(args, rank, first_step):
    """Makes the output folder, config.json in it; --overwrite: empties it of an earlier run. Line files are
    cut back to `first_step`, so that they hold each step once. → log(metrics), for metrics.jsonl"""
    barrier()                                   # every rank has looked before rank 0 writes
    if rank > 0:
        return lambda metrics: None
    os.makedirs(args.out, exist_ok=True)
    names = os.listdir(args.out)                # an earlier run's config.json goes last: it is replaced
    for path in (os.path.join(args.out, name) for name in names if re.fullmatch(RUN_FILES, name)):
        if first_step == 0 and "config.json" in names:
            (shutil.rmtree if os.path.isdir(path) and not os.path.islink(path) else os.remove)(path)
    versions = {name: importlib.metadata.version(name)
                for name in ("torch", "torchaudio", "transformers", "numpy")}
    hashes = {path: hashlib.file_digest(open(path, "rb"), "sha256").hexdigest() for path in args.train}
    config = dict(script=os.path.basename(sys.argv[0]), args=vars(args), git=git_commit(),
                  python=sys.version.split()[0], **versions, world_size=int(os.environ.get("WORLD_SIZE", 1)),
                  threads=torch.get_num_threads(), device=torch.cuda.get_device_name()
                  if torch.cuda.is_available() else "cpu", manifest_sha256=hashes)
    write_json(os.path.join(args.out, "config.json"), config)
    for path in (os.path.join(args.out, name) for name in ("metrics.jsonl", "samples.jsonl", "bad.jsonl")):
        if os.path.exists(path):
            add_lines(path + ".new", [line for line in read_lines(path) if line["step"] <= first_step], "w")
            os.replace(path + ".new", path)
    return lambda metrics: add_lines(os.path.join(args.out, "metrics.jsonl"), [metrics])

def print_plan(args, clips, world, device, **models):
    sizes = (f"{name} {sum(p.numel() for p in m.parameters()) / 1e6:.2f} M" for name, m in models.items())
    hours, epochs = clips.seconds.sum(dtype=float) / 3600, args.steps * args.batch_size / len(clips)
    print(f"train: {len(clips)} clips, {hours:.2f} h, {clips.n_long} left out as longer than "
          f"{args.max_seconds:g} s, {clips.n_failed} not decoded; {args.steps} steps = {epochs:.1f} epochs; "
          f"{', '.join(sizes)} parameters; {world} process(es) on {device.type}", flush=True)

def finish_run(args, lines, **summary):
    """summary.json, which marks the run as finished, and the last lines on screen. lines: metrics.jsonl's."""
    summary.update(steps=args.steps, skipped=sum(line["skipped"] for line in lines))
    write_json(os.path.join(args.out, "summary.json"), summary)
    if summary["skipped"]:
        print(f"skipped: {summary['skipped']} clips that could not be used, listed in {args.out}/bad.jsonl")
    print(f"model: {os.path.join(args.out, 'model')}")

def catch_sigterm():
    """An event that SIGTERM sets; the ranks agree on it once a step."""
    event = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: event.set())
    return event

def report_bad(args, step, bad):
    """The clips that any rank could not use in `step`: written to bad.jsonl, or an error of all ranks."""
    lines = [dict(step=step, **entry) for share in gather(bad) for entry in share]
    if args.on_bad_audio == "error":
        raise InputError(f"{lines[0]['reason']} (or leave such clips out: --on-bad-audio skip)")
    if rank_and_world()[0] == 0:
        add_lines(os.path.join(args.out, "bad.jsonl"), lines)

def memory():
    gpu = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    return dict(rss_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, gpu_gb=gpu)

class NonFiniteError(InputError):
    """The loss or its gradient is not finite: exit status 3."""

def stop_nonfinite(args, rank, step, clips, batches, front_end, what):
    """Saves this rank's `batches` [(clip numbers, Rollout)] and stops before the weights are touched."""
    path = os.path.join(args.out, f"nonfinite-{step}-{rank}.jsonl")
    add_lines(path, [dict(step=step, clip=clips[i].where, audio=clips[i].audio, ids=ids[:n], text=text)
                     for indices, rollout in batches for i, ids, n, text in zip(
                         indices, rollout.ids.tolist(), rollout.lens.tolist(), front_end.texts(rollout))])
    barrier()
    raise NonFiniteError(f"step {step}: {what}: not finite; its batch is in {path}; lower --lr?")

def read_json(path, default=None):
    if default is not None and not os.path.exists(path):
        return default
    with open(path, encoding="utf-8") as file:
        return json.load(file)

def read_lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("}\n")]         # no line that was cut off

def add_lines(path, lines, mode="a"):
    with open(path, mode, encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

def write_json(path, value):
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
    os.replace(path + ".new", path)

def git_commit():
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "HEAD"]
    git = shutil.which("git") and subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return git or None

def run_script(main, args):
    """Runs main(args); a user's mistake becomes one line on rank 0 and exit status 2 (non-finite loss: 3)."""
    try:
        sys.stdout.reconfigure(errors="replace")            # a terminal without → should not end a run
        main(args)
    except (InputError, RuntimeError, OSError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            error = AudioError("out of memory; lower --micro-seconds (eval.py, overlap.py: --batch-seconds), "
                               f"or train with --bf16 or --recompute: {one_line(error)}")
        elif isinstance(error, OSError):                    # disk full, not permitted, gone, …
            error = AudioError(f"{one_line(error)}; see to room and permissions, --out "
                               f"{vars(args).get('out')} too, then go on (training: --resume auto)")
        elif "by peer" in str(error):                       # gloo's words
            error = AudioError("another process of this run has ended; its message says why")
        elif not isinstance(error, InputError):
            raise
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 or isinstance(error, AudioError):      # once a node
            tqdm.write(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(3 if isinstance(error, NonFiniteError) else 2)
    if dist.is_initialized():
        dist.destroy_process_group()

def at_least(low, kind=float):
    def number(text):
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be at least {low:g}, found {text}")
        return value
    number.__name__ = kind.__name__             # for argparse's own message, "invalid int value"
    return number

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        return action.help if str(action.default) in "None[]False" else super()._get_help_string(action)

class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, no abbreviations, and `@file` whose lines may hold `--flag value`."""
    def __init__(self, **more):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, fromfile_prefix_chars="@", **more)
    def error(self, message):
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{self.prog}: error: {message} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)
    def convert_arg_line_to_args(self, line):
        return shlex.split(line, comments=True)

def training_flags(parser, name):
    add = parser.add_argument_group("data").add_argument
    add("--train", nargs="+", required=True, metavar="m.jsonl", help="manifests; opd.py reads no text")
    add("--eval", nargs="*", default=[], metavar="m.jsonl", help="scored at the end (opd: before too)")
    add("--max-seconds", type=at_least(0.01), default=30.0, help="longer clips are left out and counted")
    add("--workers", type=at_least(0, int), default=2, help="processes a rank that read ahead; 0 = none")
    add("--on-bad-audio", choices=["error", "skip"], default="error", help="error: stop; skip: see bad.jsonl")
    add = parser.add_argument_group("optimization").add_argument
    add("--steps", type=at_least(1, int), default=10_000, help="optimizer updates")
    add("--batch-size", type=at_least(1, int), default=960, help="clips per update, all ranks together")
    add("--micro-seconds", type=at_least(0.01), default=600.0, help="s of audio per forward pass and rank")
    add("--lr", type=at_least(0), default=1e-4, help="peak learning rate")
    add("--warmup-steps", type=at_least(0, int), default=1_000, help="linear warm-up, then cosine to 0")
    add("--weight-decay", type=at_least(0), default=0.005, help="AdamW; not on norms, biases and embeddings")
    add("--clip", type=at_least(0), default=1.0, help="gradient norm is clipped to this; 0 = off")
    add = parser.add_argument_group("speed").add_argument
    add("--bf16", action="store_true", help="bf16 compute; what trains stays float32")
    add("--compile", action="store_true", help="torch.compile encoders and LMs; for GPUs")
    add("--recompute", action="store_true", help="recompute activations in backward: less memory, more time")
    add = parser.add_argument_group("run").add_argument
    add("--out", default=f"runs/{name}", help="output folder; refused where it holds a run")
    add("--resume", choices=["never", "auto"], default="never", help="auto: from the last checkpoint, if any")
    add("--overwrite", action="store_true", help="remove the run that --out holds")
    add("--save-every", type=at_least(1, int), default=1_000, help="steps between checkpoints")
    add("--keep", type=at_least(1, int), default=2, help="last checkpoints kept")
    add("--eval-every", type=at_least(0, int), default=0, help="steps between further evaluations; 0 = off")
    add("--seed", type=at_least(0, int), default=0, help="of new weights, order, sampling, masks")

# ---- Corpora: generators over the layouts in which they are distributed ------------------------------------
# Each yields dicts: `id`, `audio` (a path, or FLAC bytes), what is known of text, language, speaker, begin
# and end; or, for what cannot be used, (reason, which), counted and shown at the end.
def keyed_lines(path):
    """{first word: rest of the line} of a text file such as Kaldi's."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            parts = [line.split(maxsplit=1) for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {one_line(error)}; is ROOT the folder of this corpus?") from None
    values = {key: "".join(rest).strip() for key, *rest in parts}
    if len(values) < len(parts):
        twice = collections.Counter(part[0] for part in parts).most_common(1)[0][0]
        raise InputError(f"{path}: {twice} is there twice; remove one of the lines")
    return values

def chosen_splits(root, wanted):
    there = sorted(path.name for path in Path(root).glob("*") if path.is_dir())
    for split in set(wanted) - set(there):
        raise InputError(f"--split {split}: no such folder in {root}; there are {', '.join(there) or 'none'}")
    return wanted or there

def joined(paths, texts, **known):
    paths = {path.stem: path for path in paths}
    for i in sorted(paths.keys() | texts.keys()):
        if i in paths and i in texts:
            yield dict(id=i, audio=str(paths[i]), text=texts[i], **known)
        else:
            yield ("no transcript", str(paths[i])) if i in paths else ("no audio file", i)

def librispeech(args):
    """SPLIT/SPEAKER/CHAPTER/*.flac with .trans.txt; capitals stay."""
    root = next(iter(Path(args.root).glob("LibriSpeech")), Path(args.root))
    for split in chosen_splits(root, args.split):
        for chapter in sorted((root / split).glob("*/*/")):
            texts = [keyed_lines(path) for path in chapter.glob("*.trans.txt")]
            yield from joined(chapter.glob("*.flac"), dict(item for part in texts for item in part.items()),
                              language="en", speaker=chapter.parent.name)

def aishell1(args):
    """wav/SPLIT/SPEAKER/*.wav, transcript/aishell_transcript_v0.8.txt; the blanks between words go."""
    root = next(iter(Path(args.root).glob("data_aishell")), Path(args.root))
    texts = keyed_lines(root / "transcript" / "aishell_transcript_v0.8.txt")
    for split in chosen_splits(root / "wav", args.split):
        for speaker in sorted((root / "wav" / split).glob("*/")):
            paths = sorted(speaker.glob("*.wav"))
            known = {p.stem: "".join(texts[p.stem].split()) for p in paths if p.stem in texts}
            yield from joined(paths, known, language="zh", speaker=speaker.name)

def wenetspeech(args):
    """WenetSpeech.json, read as a stream, and the audio that it names; --split takes subsets of segments."""
    path, found = os.path.join(args.root, "WenetSpeech.json"), set()
    try:
        with open(path, "rb") as file:
            for entry in ijson.items(file, "audios.item", use_float=True):
                audio = os.path.join(args.root, entry["path"])
                there = os.path.exists(audio)
                for s in entry["segments"]:
                    found.update(s["subsets"])
                    if not args.split or set(args.split) & set(s["subsets"]):
                        yield (dict(id=s["sid"], audio=audio, text=s["text"], language="zh",
                                    begin_time=float(s["begin_time"]), end_time=float(s["end_time"]))
                               if there else ("no audio file", audio))
    except (OSError, ijson.JSONError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: missing, cut off or not WenetSpeech's: {one_line(repr(error))}") from None
    for split in set(args.split) - found:
        raise InputError(f"--split {split}: no such subset in {path}; there are {', '.join(sorted(found))}")

def kaldi(args):
    """wav.scp with paths, and segments, text, utt2spk where they are there."""
    wavs, segments, texts, speakers = (keyed_lines(os.path.join(args.root, name)) if name == "wav.scp"
                                       or os.path.exists(os.path.join(args.root, name)) else None
                                       for name in ("wav.scp", "segments", "text", "utt2spk"))
    for i, segment in (segments or {i: i for i in wavs}).items():
        recording, *times = segment.split() if segments else [i]
        source = wavs.get(recording, "")
        path = os.path.join(args.root, source)
        path = path if os.path.isfile(path) else source         # else from the current folder, as in Kaldi
        line = dict(id=i, audio=path, text=(texts or {}).get(i), speaker=(speakers or {}).get(i))
        try:
            line.update(zip(("begin_time", "end_time"), map(float, times), strict=segments is not None))
        except ValueError:
            raise InputError(f"{args.root}/segments: {i}: expected recording, begin and end in s") from None
        if source.endswith("|"):
            yield "a command, which is never run", f"{i} {source}"
        elif not os.path.isfile(path):
            yield "no audio file", f"{i} {path}"
        else:
            yield line if texts is None or i in texts else ("no transcript", i)

def fsdd(args):
    """{digit}_{speaker}_{take}.wav; takes of one speaker are joined, with pauses, to strings of digits."""
    root, takes = next(iter(Path(args.root).glob("recordings")), Path(args.root)), {}
    for path in sorted(root.glob("[0-9]_*_*.wav")):
        match = re.fullmatch(r"(\d)_([^_]+)_(\d+)", path.stem)
        digit, speaker, take = match.groups() if match else (0, 0, 0)
        if not match:
            yield "not named digit_speaker_take", str(path)
        elif (("test" if int(take) < 5 else "train") in (args.split or ["train", "test"])
                and speaker in (args.speakers or [speaker])):
            try:
                wave = load_audio(clip_from_file(str(path))).numpy()
                if not wave.any():
                    raise InputError(f"{path}: all its samples are zero")
                takes.setdefault(speaker, []).append((int(digit), wave / np.sqrt(np.mean(wave**2))))
            except InputError as error:
                yield "cannot be read", one_line(error)
    if args.split and not takes:
        raise InputError(f"--split {args.split[0]}: no usable take in {root}; 0 to 4 are test, others train")
    for speaker in set(args.speakers) - set(takes):
        raise InputError(f"--speakers {speaker}: {root} has {', '.join(sorted(takes)) or 'none'}")
    speakers = args.speakers or sorted(takes)
    rng, words = np.random.default_rng(args.seed), "zero one two three four five six seven eight nine".split()
    for n in range(args.count if speakers else 0):
        speaker, pieces = speakers[rng.integers(len(speakers))], []
        size = rng.integers(1, args.max_digits + 1)
        picks = [takes[speaker][i] for i in rng.integers(len(takes[speaker]), size=size)]
        for _, wave in picks:
            pieces += [wave, np.zeros(rng.integers(int(0.15 * SAMPLE_RATE) + 1))]   # up to 150 ms
        wave, file = np.concatenate(pieces[:-1]), io.BytesIO()
        soundfile.write(file, 0.9 * wave / np.abs(wave).max(), SAMPLE_RATE, format="FLAC")
        yield dict(id=f"{speaker}-{n:06d}", audio=file.getvalue(), text=" ".join(words[d] for d, _ in picks),
                   language="en", speaker=speaker)

def folder(args):
    """Audio below ROOT (wav, flac, ogg, opus, mp3, …), its transcript, if any, in a .txt beside it."""
    for path in sorted(path for path in Path(args.root).rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES):
        line, beside = dict(id=str(path.relative_to(args.root)), audio=str(path)), path.with_suffix(".txt")
        try:
            yield {**line, "text": beside.read_text("utf-8-sig").strip()} if beside.is_file() else line
        except UnicodeDecodeError:
            yield "its .txt is not UTF-8", str(path)

CORPORA = {corpus.__name__: corpus for corpus in (librispeech, aishell1, wenetspeech, kaldi, fsdd, folder)}

def import_clip(line, language, pack, tars):
    """A corpus's line with duration, from the header alone, and language (by script where it has none);
    (reason, which) of a clip that cannot be read. pack: stem of tar shards, or None; whole files go there
    byte for byte, segments as 16-bit FLAC; `tars` holds the shards made so far."""
    line = {key: value for key, value in line.items() if value is not None}
    code = line.get("language") or language or script_language(line.get("text", ""))
    line.update({"language": code} if code else {})
    audio, suffix = line["audio"], ".flac"
    try:
        if "end_time" in line:
            line["duration"] = round(line["end_time"] - line["begin_time"], 4)
            clip = parse_line(json.dumps(line), line["id"], "")
            if pack:
                file = io.BytesIO()
                soundfile.write(file, load_audio(clip).numpy(), SAMPLE_RATE, "PCM_16", format="FLAC")
                audio = file.getvalue()
        else:
            info = soundfile.info(io.BytesIO(audio) if isinstance(audio, bytes) else audio)
            line["duration"] = round(info.duration, 4)
            if pack and not isinstance(audio, bytes):
                suffix, audio = os.path.splitext(audio)[1], Path(audio).read_bytes()
        json.dumps(line, ensure_ascii=False, default=str).encode()
    except (OSError, TypeError, ValueError, soundfile.LibsndfileError) as error:   # also names not in UTF-8
        return "cannot be read", f"{line['id']!a}: {one_line(error)}"
    if not 0 < line["duration"] < 10**7:
        return "no samples, or no length in its header", line["id"]
    if pack:
        if not tars or tars[-1].offset > SHARD_BYTES:
            if tars:
                tars[-1].close()
            try:
                tars.append(tarfile.open(f"{pack}-{len(tars):05d}.tar", "x", format=tarfile.USTAR_FORMAT))
            except OSError as error:
                raise InputError(f"--pack: {error.filename}: {error.strerror}; remove it first") from None
        info = tarfile.TarInfo(f"{len(tars):05d}-{tars[-1].offset:010d}{suffix}")
        info.size = len(audio)
        line.update(audio=tars[-1].name, offset=tars[-1].offset + 512,                   # after the header
                    nbytes=len(audio), crc32=zlib.crc32(audio))
        tars[-1].addfile(info, io.BytesIO(audio))
        tars[-1].members.clear()                                    # tarfile's own memory of them, unbounded
        line = {key: value for key, value in line.items() if key not in ("begin_time", "end_time")}
    return line

def import_corpus(args):
    """Writes the manifest of a corpus, with --pack its tar shards; prints what is in it and what is not."""
    out, partial, tars, left_out = Path(os.path.abspath(args.out)), Path(args.out + ".partial"), [], {}
    n = n_untexted = seconds = 0
    if out.exists():
        raise InputError(f"--out {out} exists; remove it first")
    if not os.path.isdir(args.root):
        raise InputError(f"{args.root}: no such folder")
    default = os.path.splitext(args.out)[0] if args.command == "fsdd" else None # joined clips are nowhere yet
    pack = (args.pack or default) and os.path.abspath(args.pack or default).removesuffix(".tar")
    for path in (args.out, pack or args.out):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    try:
        with open(partial, "w", encoding="utf-8") as file:
            for line in CORPORA[args.command](args):
                if isinstance(line, dict):
                    line = import_clip(line, getattr(args, "language", None), pack, tars)
                if isinstance(line, tuple):                             # (reason, which)
                    left_out.setdefault(line[0], [0, line[1]])[0] += 1
                    continue
                audio = Path(os.path.abspath(line["audio"]))
                inside = audio.is_relative_to(out.parent)
                line["audio"] = str(audio.relative_to(out.parent) if inside else audio)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                n, n_untexted, seconds = n + 1, n_untexted + ("text" not in line), seconds + line["duration"]
        why = "".join(f"\n  left out: {count} × {reason} (first: {first})"
                      for reason, (count, first) in left_out.items())
        if n == 0:
            raise InputError(f"{args.root}: no usable clip; {args.command} is "
                             f"{CORPORA[args.command].__doc__} {one_line(why)}")
        if tars:
            tars[-1].close()
        partial.rename(out)
    except BaseException:
        for path in (partial, *(Path(tar.name) for tar in tars)):
            path.unlink(missing_ok=True)
        raise
    print(f"{args.out}: {n} clips, {seconds / 3600:.3f} hours, {n_untexted} without text, "
          f"{len(tars)} shard(s){why}")

# ---- python data.py check ----------------------------------------------------------------------------------
def check(path, max_seconds):
    """Reads every clip; prints counts, hours, languages and every defect with its line. → defects"""
    clips, defects, seconds, languages, first_line = [], [], 0.0, collections.Counter(), {}
    for _, _, clip in manifest_clips(path, errors=defects):
        clips.append(clip)
        if first_line.setdefault(clip.key, clip.where) != clip.where:
            defects.append(f"{clip.where}: the same clip as {first_line[clip.key]}")
        if clip.duration > max_seconds:
            defects.append(f"{clip.where}: {clip.duration:.1f} s is over --max-seconds {max_seconds:g}")
        try:
            waveform = load_audio(clip)
        except AudioError as error:
            defects.append(str(error))
            continue
        if clip.text != "" and not waveform.any():
            defects.append(f"{clip.where}: {clip.audio}: every sample is zero")
        if len(waveform) < N_FFT:
            defects.append(f"{clip.where}: {clip.audio}: {len(waveform)} samples, less than a 25 ms window")
        seconds += len(waveform) / SAMPLE_RATE
        languages[clip.language or "(none)"] += 1
    if not clips and not defects:
        defects.append(f"{path}: holds no clip")
    print(f"{path}: {len(clips)} clips, {seconds / 3600:.3f} hours, "
          f"with text {sum(c.text is not None for c in clips)}, "
          f"empty text {sum(c.text == '' for c in clips)}, languages "
          + (", ".join(f"{name} {n}" for name, n in languages.most_common()) or "none"))
    print(*(f"  {defect}\n" for defect in defects), f"{path}: {len(defects)} defect(s)", sep="")
    return len(defects)

def parse_args(argv=None):
    parser = Parser(prog="data.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    checker = commands.add_parser("check", help="read every clip, report every defect; exit status 1 if any")
    checker.add_argument("manifests", nargs="+", metavar="m.jsonl", help="manifests to read")
    checker.add_argument("--max-seconds", type=at_least(0.01), default=30.0, help="longer clips are defects")
    for name, importer in CORPORA.items():
        corpus = commands.add_parser(name, help=importer.__doc__, description=importer.__doc__)
        corpus.add_argument("root", metavar="ROOT", help="folder of the corpus, as it is distributed")
        corpus.add_argument("--out", required=True, metavar="m.jsonl", help="manifest to write")
        corpus.add_argument("--pack", metavar="NAME.tar", help="store clips in shards NAME-00000.tar, …")
        if name in ("kaldi", "folder"):
            corpus.add_argument("--language", help="language of all clips, such as en; by default by script")
        else:
            corpus.add_argument("--split", nargs="+", default=[],
                                choices=["train", "test"] if name == "fsdd" else None,
                                help="parts to take, by default all; WenetSpeech: subsets such as TEST_NET")
        if name == "fsdd":
            corpus.add_argument("--count", type=at_least(1, int), default=1_000, help="strings to join")
            corpus.add_argument("--max-digits", type=at_least(1, int), default=6, help="longest string")
            corpus.add_argument("--speakers", nargs="+", default=[], help="only these; by default all")
            corpus.add_argument("--seed", type=at_least(0, int), default=0, help="seed of the strings")
    return parser.parse_args(argv)

def main(args):
    if args.command in CORPORA:
        import_corpus(args)
    elif sum(check(path, args.max_seconds) for path in args.manifests):
        sys.exit(1)

if __name__ == "__main__":
    run_script(main, parse_args())
