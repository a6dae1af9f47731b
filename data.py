"""Manifests, audio, log-mel features and batches: the one data path of every script.

    manifest line → Clip → load_audio → waveform (samples,) → log_mel (128, F) → collate → Batch

A manifest is JSON Lines, one clip a line (docs/data.md). `load_audio` is the only function that decodes
audio. Features are computed on each clip alone, so they do not depend on its batch. Which clips a step sees
is a pure function of (seed, step): `BatchOrder`. Behind it come the few lines that processes share (start,
sums over ranks, the folder of a run, flags and errors), and last the languages.
"""

import argparse
import array
import collections
import contextlib
import dataclasses
import datetime
import errno
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import pathlib
import re
import resource
import shlex
import shutil
import subprocess
import sys
import unicodedata

import av
import langcodes
import numpy as np
import safetensors
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchaudio
from langcodes.data_dicts import MACROLANGUAGES
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

SAMPLE_RATE = 16_000  # Hz
N_FFT = 400  # samples: a window of 25 ms
HOP = 160  # samples: a mel frame every 10 ms
N_MELS = 128
BLOCK = 8 * HOP  # samples of one audio token: 80 ms = 8 mel frames = 4 encoder frames
DURATION_TOLERANCE_S = 0.1  # between manifest and decoded audio: codecs pad by some tens of milliseconds


class InputError(argparse.ArgumentTypeError, ValueError):
    """A mistake of the user: shown as one line (what, where, remedy) with exit status 2, no traceback.

    argparse shows it too, where it is the type of a flag that raises it.
    """


class AudioError(InputError):
    """A clip that cannot be used. Only some ranks may meet it, so the rank that does prints it."""


class NonFiniteError(InputError):
    """The loss or its gradient is not finite: exit status 3."""


# ----------------------------------------------------------------------------------------------------------
# Manifest
# ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class Clip:
    """One line of a manifest."""

    audio: str  # path, made absolute against the manifest's folder
    duration: float  # s, of the clip itself: end − begin for a segment
    where: str  # "train.jsonl:12", for messages
    fields: dict  # the line as it was read
    text: str | None = None
    language: str | None = None  # code, or None where the line names none
    begin_time: float = -1.0  # s; −1: from the start
    end_time: float = -1.0  # s; −1: to the end
    offset: int | None = None  # the clip's bytes inside `audio`; None: the whole file
    nbytes: int | None = None
    context: str | None = None  # words that the prompt gives beforehand, such as names
    had_prefix: bool = False  # of Qwen3-ASR's own fine-tuning data, see `PREFIX`

    @property
    def key(self):
        """What makes two lines the same clip."""
        return self.audio, self.offset, max(self.begin_time, 0), max(self.end_time, -1)


# Qwen3-ASR's own fine-tuning data begin a text with this; "None" where there is no speech.
PREFIX = re.compile(r"\s*language ([A-Za-z]+)\s*<asr_text>\s*")
# Tags that corpora and models write into a text, such as <|zh|>, <|NEUTRAL|> or <COMMA>: no words. Scoring
# passes over them, and none is learned.
MARKUP = re.compile(r"<[^<>\s]{1,40}>")

KINDS = {  # key → what its value must be
    **dict.fromkeys(("audio", "text", "language", "context"), "a string"),
    **dict.fromkeys(("duration", "begin_time", "end_time"), "a number of seconds"),
    **dict.fromkeys(("offset", "nbytes"), "a whole number of bytes"),
}


def is_of_kind(value, kind):
    if kind == "a string":
        return isinstance(value, str)
    if kind == "a number of seconds":
        return type(value) in (int, float) and abs(value) < 2**62  # type: True is no number
    return type(value) is int and 0 <= value < 2**62


def parse_line(raw, where, folder, text_field="text"):
    """A `Clip` from one line of JSON (bytes). text_field: see `Clips`. Raises InputError."""
    try:
        fields = json.loads(raw.decode("utf-8-sig"))
        if b"\\u" in raw:  # half a surrogate pair could not be written again
            json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON in UTF-8 ({error}); give one object a line") from None
    if not isinstance(fields, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(fields).__name__}")

    # The prompt has the words of a prefix already. A line that names no language takes the prefix's.
    values = {"had_prefix": False}
    for key in (text_field, "hyp"):
        match = PREFIX.match(str(fields.get(key)))
        if match and text_field is not None:
            values["had_prefix"] = True
            fields[key] = fields[key][match.end() :]
            if match[1] != "None" and not fields.get("language"):
                fields["language"] = match[1]
    for name, kind in KINDS.items():
        key = text_field if name == "text" else name
        value = fields.get(key)
        if value is not None:
            if not is_of_kind(value, kind):
                raise InputError(f'{where}: "{key}" must be {kind}, found {json.dumps(value)[:60]}')
            values[name] = value
        elif name in ("audio", "duration"):
            raise InputError(f'{where}: key "{name}" is missing; every line needs it')
    clip = Clip(where=where, fields=fields, **values)

    if clip.duration <= 0:
        raise InputError(f'{where}: "duration" must be above 0 s, found {clip.duration:g}')
    if clip.end_time >= 0 and clip.end_time <= max(clip.begin_time, 0):
        raise InputError(f"{where}: end_time {clip.end_time:g} is not after begin_time {clip.begin_time:g}")
    if (clip.offset is None) != (clip.nbytes is None) or clip.nbytes == 0:
        raise InputError(f'{where}: "offset" and "nbytes" go together, and nbytes is above 0')
    clip.audio = os.path.join(folder, clip.audio)
    if clip.language is not None:
        try:
            clip.language = language_code(clip.language)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    return clip


def say_prefixes(path, n_prefixed):
    if n_prefixed and rank_and_world()[0] == 0:
        print(f'{path}: {n_prefixed} texts began with "language …<asr_text>", which was taken off')


def manifest_lines(path):
    """Yields (byte offset, line number, bytes) of each line that is not blank, be it with CRLF or a BOM."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip(b"\xef\xbb\xbf \t\r\n"):
                yield file.tell() - len(raw), number, raw


class Clips:
    """The clips of several manifests as a sequence: clips[i] reads its line again, so memory stays small.

    One pass at the start checks every line. Left out and counted are clips over `max_seconds` (n_long),
    result lines of eval.py whose clip could not be decoded (n_failed), and what is_wanted(clip) refuses
    (n_unwanted).

    seconds: (n,) float32, durations. languages: {code, or None where a line names none: first clip with it}.
    text_field: the key of the transcript; None: no transcript is read. Raises InputError where a line has
    none, or markup in it, which would be learned as speech. With learns_text=False neither is an error.
    """

    def __init__(self, paths, max_seconds, text_field=None, is_wanted=None, learns_text=True):
        self.files = [open(path, "rb") for path in paths]
        self.text_field = text_field
        self.languages = {}
        self.n_long = 0
        self.n_failed = 0
        self.n_unwanted = 0
        places = array.array("d")  # five numbers a clip: its file, line number, first byte, bytes, seconds
        for file, path in enumerate(paths):
            n_prefixed = 0
            for offset, number, raw in manifest_lines(path):
                clip = self.parse(raw, path, number)
                n_prefixed += clip.had_prefix
                markup = MARKUP.search(clip.text or "") if learns_text else None
                if markup:
                    tag = f'"{text_field}" holds {markup[0]}, which would be learned as speech'
                    raise InputError(f"{clip.where}: {tag}; remove such tags from the manifest")
                if text_field and clip.text is None and learns_text:
                    if "error" not in clip.fields:
                        raise InputError(f'{clip.where}: no "{text_field}", which every line needs here')
                    self.n_failed += 1
                elif clip.duration > max_seconds:
                    self.n_long += 1
                elif is_wanted is not None and not is_wanted(clip):
                    self.n_unwanted += 1
                else:
                    places.extend((file, number, offset, len(raw), clip.duration))
                    self.languages.setdefault(clip.language, clip)
            say_prefixes(path, n_prefixed)
        if not places:
            limit = f" of at most {max_seconds:g} s" if max_seconds < math.inf else ""
            raise InputError(f"{', '.join(paths)}: holds no clip{limit}")
        self.places = np.frombuffer(places).reshape(-1, 5)
        self.seconds = self.places[:, 4].astype(np.float32)

    def __len__(self):
        return len(self.seconds)

    def __getitem__(self, i):
        file, number, offset, nbytes = self.places[i, :4].astype(int)
        raw = os.pread(self.files[file].fileno(), nbytes, offset)  # data workers share the open file
        return self.parse(raw, self.files[file].name, number)

    def parse(self, raw, path, number):
        folder = os.path.dirname(os.path.abspath(path))
        return parse_line(raw, f"{path}:{number}", folder, self.text_field)


def read_manifest(path, text_field="text"):
    """All clips of a manifest, in order. Raises InputError for the first line with a defect."""
    return list(Clips([path], math.inf, text_field, learns_text=False))


# ----------------------------------------------------------------------------------------------------------
# Audio
# ----------------------------------------------------------------------------------------------------------

# libsndfile reads what it reads whole: wav, flac, aiff, au, caf, w64, sph, and Ogg of one stream. FFmpeg, by
# PyAV, reads the rest. (FFmpeg would decode all Opus at 48 kHz, libsndfile does at the file's own rate.) A
# playlist is not in the list of formats, because it opens other files.
FFMPEG_READS = "aac,ac3,aiff,amr,ape,asf,au,avi,caf,flac,flv,matroska,mov,mp3,mpeg,mpegts,ogg,tta,w64,wav,wv"
resampler = functools.lru_cache(16)(torchaudio.transforms.Resample)  # its filters take long to make


def load_audio(clip):
    """The waveform of a clip: (samples,) float32 at 16 kHz, channels averaged. Raises AudioError."""
    with audio_errors(f"{clip.where}: {clip.audio}"):
        with open_audio(clip) as file:
            channels, rate = decode(clip, file)
        peak = np.abs(channels).max()
        if not np.isfinite(peak):
            raise InputError("holds NaN or infinite samples; repair or remove it")
        if peak > 10:
            raise InputError(f"has samples up to {peak:.0f}, as of int16, not up to 1; divide by 32768")
        waveform = channels.mean(axis=1)
        if channels.shape[1] > 1 and np.square(waveform).mean() < 1e-3 * np.square(channels).mean():
            raise InputError("its channels cancel when averaged (opposite phase); extract one channel")
        decoded_s = len(waveform) / rate
        if abs(decoded_s - clip.duration) > DURATION_TOLERANCE_S + 0.01 * clip.duration:
            raise InputError(f"{decoded_s:.2f} s decoded, the manifest says {clip.duration:.2f} s")
        if rate > 5_000 * math.gcd(rate, SAMPLE_RATE):  # the filter would be huge
            raise InputError(f"its sample rate, {rate} Hz, has no usable ratio to 16 kHz; resample it")
    return resampler(rate, SAMPLE_RATE)(torch.from_numpy(waveform))


@contextlib.contextmanager
def audio_errors(place):
    """Turns the errors of reading audio into AudioErrors that name their place."""
    try:
        yield
    except InputError as error:
        raise AudioError(f"{place}: {error}") from None
    except (soundfile.LibsndfileError, av.FFmpegError, ValueError) as error:
        reason = f"cannot be decoded ({getattr(error, 'strerror', error)})"
        raise AudioError(f"{place}: {reason}; get it anew, or convert it to wav or flac") from None
    except OSError as error:
        raise AudioError(f"{place}: {error.strerror}; paths start in the manifest's folder") from None


def open_audio(clip):
    """A readable file with the clip's audio: the whole file, or its range of a container such as a tar."""
    # Opened here, so that it has no name: soundfile would take *.raw for a file without a header.
    file = open(os.open(clip.audio, os.O_RDONLY), "rb")
    if clip.offset is None:
        return file
    with file:
        file.seek(clip.offset)
        content = file.read(clip.nbytes)
    if len(content) < clip.nbytes:
        raise InputError(f"ends before byte {clip.offset + clip.nbytes}, the clip's end by the manifest")
    return io.BytesIO(content)


def decode(clip, file):
    """(samples, channels) float32 of the clip's time range, and its sample rate in Hz."""
    begin_s = max(clip.begin_time, 0)
    end_s = clip.end_time
    if end_s < 0:
        end_s = begin_s + clip.duration + 60  # the rest of a file that is longer than stated takes no memory

    audio = sound_file(file, clip.end_time)
    if audio is None:
        channels, rate = ffmpeg_samples(file, begin_s, end_s)
    else:
        rate = audio.samplerate
        begin = min(round(begin_s * rate), audio.frames)
        end = min(round(end_s * rate), audio.frames)
        # Some codecs cannot seek (GSM 6.10), and in Vorbis the place is a fraction of a second off.
        first = begin if audio.seekable() and audio.subtype != "VORBIS" else 0
        if first > 0:
            audio.seek(first)
        channels = audio.read(end - first, dtype="float32", always_2d=True)[begin - first :]
        if len(channels) < end - begin:
            raise InputError(f"is damaged: {len(channels)} of {end - begin} samples decoded; get it anew")

    decoded_s = len(channels) / rate
    if decoded_s == 0 or clip.end_time - begin_s - decoded_s > DURATION_TOLERANCE_S:
        raise InputError(f"holds {decoded_s:.2f} s from {begin_s:g} s on, and ends before the clip does")
    return channels, rate


def sound_file(file, end_time=-1):
    """The `SoundFile` of an open file, or None where libsndfile does not read all of it and FFmpeg has to.

    end_time: of a segment, in s; −1: the whole file. The recording of a segment is not searched for further
    streams; it has some where the first one ends before. Raises InputError for a WAV that is cut off, which
    decoders pass by in silence.
    """
    # Of several Ogg or FLAC streams in one file, libsndfile reads only the first. No other file is searched.
    content = file.read(4)
    if content.startswith((b"OggS", b"fLaC", b"ID3")) and end_time < 0:
        content += file.read()
    file.seek(0)
    if len(re.findall(rb"OggS\0[\2\6]|fLaC[\0\x80]\0\0\x22", content)) > 1:
        return None
    try:
        audio = soundfile.SoundFile(file)
    except soundfile.LibsndfileError:
        return None
    # Of MP3 libsndfile knows the length by its first frame only. Streaming writers leave it 0 or all ones.
    if audio.format == "MP3" or not 0 < audio.frames < 2**36 - 1:
        return None
    if audio.format in ("OGG", "FLAC") and audio.frames / audio.samplerate < end_time:
        return None
    # Some writers count the header too, and what is written to a pipe states 2 or 4 GB.
    for stated, present in re.findall(r"data *: (\d+) \(should be (\d+)\)", audio.extra_info):
        if int(present) + 64 < int(stated) < 0x7E00_0000:
            raise InputError(f"is cut off: {present} of {stated} bytes; get it whole, or re-encode it")
    return audio


def ffmpeg_samples(file, begin_s, end_s):
    """(samples, channels) float32 from begin_s to end_s, and the sample rate in Hz, by FFmpeg."""
    rate = SAMPLE_RATE
    pieces = []
    for position, frame in ffmpeg_frames(file, begin_s):
        rate = frame.rate
        begin = max(round(begin_s * rate) - position, 0)
        end = max(round(end_s * rate) - position, 0)
        pieces.append(frame.to_ndarray().T[begin:end])
        if end <= frame.samples:
            break
    channels = np.concatenate(pieces) if pieces else np.zeros((0, 1), dtype=np.float32)
    return channels, rate


def ffmpeg_frames(file, begin_s=0.0):
    """Yields (number of its first sample, frame of planar float32) from `begin_s`, or before, to the end."""
    file.seek(0)
    options = {"format_whitelist": FFMPEG_READS}
    with av.open(file, options=options, metadata_errors="replace") as container:  # tags of any encoding
        if not container.streams.audio or container.streams.audio[0].codec_context is None:
            raise InputError("holds no audio of a known codec")
        stream = container.streams.audio[0]
        start = stream.start_time or 0
        decoder = stream.codec_context
        if decoder.name == "opus":  # FFmpeg's own is far too loud for some changes of Opus' mode
            decoder = av.CodecContext.create("libopus", "r")
            decoder.extradata = stream.codec_context.extradata
        # Times are exact where their unit is no longer than a sample: not in webm and wma (ms), and in Ogg
        # each stream has its own. There frames are counted from the first on, as in AMR, whose frames need
        # all that was before.
        is_timed = stream.time_base * stream.rate <= 1 and container.format.name not in ("ogg", "flac", "amr")
        if is_timed and begin_s > 1:  # early: a frame of MP3 at 8 kbit/s may need the data of 0.4 s before it
            container.seek(start + int((begin_s - 1) / stream.time_base), stream=stream)
        as_float = av.AudioResampler(format="fltp")
        kind = None
        position = 0
        damage = None
        for packet in container.demux(stream):
            try:
                frames = decoder.decode(packet)
            except av.InvalidDataError as error:  # or a tag behind the audio, if no frame follows it
                damage = error
                continue
            if frames and damage is not None:
                raise damage
            for frame in frames:
                if kind is None and is_timed:
                    position = round((frame.pts - start) * stream.time_base * frame.rate)
                if kind not in (None, (frame.rate, frame.layout.name)):
                    raise InputError("changes its sample rate or channels on the way; re-encode it")
                if frame.layout.nb_channels > 8:  # where PyAV reads beyond the frame
                    raise InputError("has more than 8 channels; extract one")
                kind = (frame.rate, frame.layout.name)
                yield position, *as_float.resample(frame)
                position += frame.samples


def audio_duration(content, name="audio"):
    """Seconds of a sound file, given as its bytes. An AudioError begins with `name`."""
    with audio_errors(name):
        file = io.BytesIO(content)
        audio = sound_file(file)
        if audio is None:
            return sum(frame.samples / frame.rate for _, frame in ffmpeg_frames(file))
        if audio.format in ("WAV", "WAVEX", "FLAC"):  # others are decoded to be measured
            return audio.frames / audio.samplerate
        return len(audio.read(audio.frames, dtype="int16")) / audio.samplerate


def clip_from_file(path):
    """A `Clip` of a bare audio file. Raises AudioError."""
    duration = audio_duration(pathlib.Path(path).read_bytes(), path)
    return Clip(os.path.abspath(path), duration, path, {"audio": path, "duration": duration})


# ----------------------------------------------------------------------------------------------------------
# Features
# ----------------------------------------------------------------------------------------------------------


# (128, 201) triangular filters on the slaney mel scale, 0 to 8 kHz, each of area 1.
MEL_FILTERS = torchaudio.functional.melscale_fbanks(
    N_FFT // 2 + 1, 0.0, 8000.0, N_MELS, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
).T


def log_mel(waveform, padded_samples=None):
    """Whisper's log-mel of one clip: (samples,) float32 → (128, F), F = padded_samples // 160.

    The clip is zero-padded at its end, by default to a multiple of 1,280 samples: 80 ms, 8 frames, one audio
    token. Equal to `WhisperFeatureExtractor(feature_size=128)` on the padded clip.
    """
    if padded_samples is None:
        padded_samples = max(math.ceil(len(waveform) / BLOCK), 1) * BLOCK
    waveform = F.pad(waveform, (0, padded_samples - len(waveform)))
    window = torch.hann_window(N_FFT)  # around each frame's centre; both ends of the clip are reflected
    spectrum = torch.stft(waveform, N_FFT, HOP, window=window, return_complex=True)
    power = spectrum[:, :-1].abs().square()  # (201, F): the last frame is dropped, as Whisper does
    mel = (MEL_FILTERS @ power).clamp(min=1e-10).log10()
    mel = mel.maximum(mel.max() - 8.0)
    return (mel + 4.0) / 4.0


def n_audio_tokens(n_samples):
    """Audio tokens of n_samples at 16 kHz, 12.5 a second: 48,000 → 37, 480,000 → 375."""
    n_frames = math.ceil(n_samples / HOP)
    return max((n_frames + 1) // 2 // 4, 1)


# ----------------------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Batch:
    """B clips as a model takes them. Prompts are padded on the left, so transcripts start in one column."""

    mel: torch.Tensor  # (B, 128, F) float32, exactly 0 beyond a clip's mel_lens
    mel_lens: torch.Tensor  # (B,) mel frames, multiples of 8 for our student
    audio_lens: torch.Tensor  # (B,) audio tokens
    prompt_ids: torch.Tensor  # (B, S)
    prompt_mask: torch.Tensor  # (B, S) True = prompt, False = padding on the left
    seconds: torch.Tensor  # (B,) float64 clip durations
    silent: torch.Tensor  # (B,) bool: every sample is zero
    languages: list  # B codes as the manifest has them; None where it names none
    contexts: list  # B texts that the prompts give beforehand; None where there is none

    def to(self, device):
        """The batch with its tensors on another device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **{name: value.to(device) for name, value in tensors.items()})


def collate(waveforms, front_end, languages, default_language=None, contexts=None):
    """The `Batch` of waveforms [(samples,)] with their languages [code or None].

    front_end: a model's features, prompt and ids (model.FrontEnd). default_language names the language in the
    prompt of a clip that has none, where the model's prompt names one at all. contexts: of each clip, text or
    None, that its prompt gives beforehand.
    """
    contexts = contexts or [None] * len(waveforms)
    mels = [front_end.features(waveform) for waveform in waveforms]
    mel_lens = [mel.shape[1] for mel in mels]
    multiple = front_end.frame_multiple
    padded_frames = math.ceil(max(mel_lens) / multiple) * multiple
    audio_lens = [front_end.n_audio_tokens(len(waveform)) for waveform in waveforms]
    prompts = []
    for audio_len, language, context in zip(audio_lens, languages, contexts):
        prompts.append(front_end.prompt(audio_len, language or default_language, context))
    prompt_ids, prompt_mask = pad_left(prompts, front_end.pad_id)
    return Batch(
        mel=torch.stack([F.pad(mel, (0, padded_frames - mel.shape[1])) for mel in mels]),
        mel_lens=torch.tensor(mel_lens),
        audio_lens=torch.tensor(audio_lens),
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        seconds=torch.tensor([len(waveform) / SAMPLE_RATE for waveform in waveforms], dtype=torch.float64),
        silent=torch.tensor([not waveform.any() for waveform in waveforms]),
        languages=list(languages),
        contexts=list(contexts),
    )


def collate_both(clips, waveforms, student, teacher, args):
    """The `Batch` of clips for the student and for the teacher. args: --language and --context."""
    languages = [clip.language for clip in clips]
    contexts = [clip.context for clip in clips]
    student_contexts = contexts if args.context == "both" else None
    teacher_contexts = contexts if args.context != "none" else None
    student_batch = collate(waveforms, student.front_end, languages, args.language, student_contexts)
    teacher_batch = collate(waveforms, teacher.front_end, languages, args.language, teacher_contexts)
    return student_batch, teacher_batch


def pad_left(prompts, pad_id):
    """Prompt ids (B, S) and their mask (B, S) from B lists of ids."""
    options = {"batch_first": True, "padding_side": "left"}
    prompt_ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], padding_value=pad_id, **options)
    prompt_mask = pad_sequence([torch.ones(len(prompt), dtype=torch.bool) for prompt in prompts], **options)
    return prompt_ids, prompt_mask


# ----------------------------------------------------------------------------------------------------------
# Order of batches
# ----------------------------------------------------------------------------------------------------------


class BatchOrder:
    """order(step) → clip numbers (batch_size,) of the global batch of `step`, a pure function of the seed.

    Each epoch is a fresh permutation, one after the other in an endless stream. The stream is cut into pools
    of `pool_batches` batches; a pool is sorted by duration, so that a batch holds clips of like length, cut
    into batches, and these are shuffled. No clip is dropped. The very first batch holds the longest clips of
    all, so that a batch that does not fit into memory shows at once.
    """

    def __init__(self, seconds, batch_size, seed, pool_batches=50):
        self.seconds = seconds
        self.batch_size = batch_size
        self.seed = seed
        self.pool_batches = max(min(pool_batches, len(seconds) // batch_size), 1)  # at most one epoch
        self.pool = functools.lru_cache(1)(self.pool)  # the last one is kept for the steps that follow

    def epoch(self, epoch):
        """(n,) the permutation of one epoch."""
        order = np.random.default_rng((self.seed, 0, epoch, 0)).permutation(len(self.seconds))
        if epoch == 0:
            longest = np.argsort(-self.seconds, kind="stable")[: self.batch_size]
            order = np.concatenate([longest, order[~np.isin(order, longest)]])
        return order

    def pool(self, pool):
        """(pool_batches, batch_size) the batches of one pool, in the order in which they are taken."""
        n = len(self.seconds)
        size = self.pool_batches * self.batch_size
        epochs, places = np.divmod(np.arange(pool * size, (pool + 1) * size), n)
        stream = np.concatenate([self.epoch(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs)])
        # Longest first within an epoch: only a batch that straddles two epochs can hold a clip twice.
        stream = stream[np.lexsort((-self.seconds[stream], epochs))]
        batches = stream.reshape(self.pool_batches, self.batch_size)
        shuffled = np.random.default_rng((self.seed, 1, pool, 0)).permutation(self.pool_batches)
        if pool == 0:
            shuffled = np.concatenate([[0], shuffled[shuffled != 0]])
        return batches[shuffled]

    def __call__(self, step):
        pool, place = divmod(step, self.pool_batches)
        return self.pool(pool)[place]


def cut_micro_batches(indices, seconds, micro_seconds):
    """Lists of clip numbers, longest first, with clips × longest ≤ micro_seconds (one clip may exceed it)."""
    batches = []
    for i in sorted(indices, key=lambda i: (-seconds[i], i)):
        if not batches or (len(batches[-1]) + 1) * seconds[batches[-1][0]] > micro_seconds:
            batches.append([])
        batches[-1].append(i)
    return batches


class StepDataset:
    """Item `step`: (this rank's micro-batches of that step, its bad clips), made in a data worker.

    make(step, indices, clips, waveforms) builds one micro-batch. A clip that cannot be used is left out of
    its micro-batch and listed as {clip, audio, reason}; with on_bad_audio "error" it ends the run instead.
    check(clip), where there is one, raises AudioError for a clip that cannot be used for its text.
    """

    def __init__(self, clips, args, make, check=None):
        self.clips = clips
        self.order = BatchOrder(clips.seconds, args.batch_size, args.seed)
        self.args = args
        self.make = make
        self.check = check

    def __getitem__(self, step):
        rank, world = rank_and_world()
        share = self.order(step)[rank::world].tolist()
        items = []
        bad = []
        try:
            for indices in cut_micro_batches(share, self.clips.seconds, self.args.micro_seconds):
                clips = [self.clips[i] for i in indices]
                usable, waveforms, defects = load_usable(clips, self.check)
                bad += defects
                indices = [indices[b] for b in usable]
                clips = [clips[b] for b in usable]
                if usable:
                    items.append(self.make(step, indices, clips, waveforms))
        except InputError as error:
            return AudioError(error)  # a value: raised in the worker, it would arrive wrapped in a traceback
        if bad and self.args.on_bad_audio == "error":
            return AudioError(f"{bad[0]['reason']} (or leave such clips out: --on-bad-audio skip)")
        return items, bad


def load_usable(clips, check=None):
    """→ places of the clips that can be used, their waveforms, and {clip, audio, reason} of the others."""
    usable = []
    waveforms = []
    bad = []
    for b, clip in enumerate(clips):
        try:
            if check is not None:
                check(clip)
            waveforms.append(load_audio(clip))
            usable.append(b)
        except AudioError as error:
            bad.append({"clip": clip.where, "audio": clip.audio, "reason": str(error)})
    return usable, waveforms, bad


def step_batches(dataset, first_step, last_step, workers):
    """Yields (step, micro-batches, bad clips) of [first_step, last_step); `workers` processes read ahead."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        sampler=range(first_step, last_step),
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    try:
        for step, item in zip(range(first_step, last_step), loader):
            if isinstance(item, InputError):
                raise item
            yield step, *item
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error):
            raise
        remedy = "if memory was short, give fewer --workers; go on by --resume"
        raise AudioError(f"a data worker was killed; {remedy}") from error


# ----------------------------------------------------------------------------------------------------------
# Processes
# ----------------------------------------------------------------------------------------------------------


def setup_distributed():
    """(rank, world size, device). Under torchrun LOCAL_RANK picks the device and RANK the data."""
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in convolutions too
    # In bf16 torch 2.11 takes cuDNN's attention, whose backward gives NaN on Hopper where there is a mask and
    # the length is 64 more than a multiple of 128 (github.com/pytorch/pytorch/issues/196678). It also
    # prepares anew for every length of a batch, which made a step four times as long.
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        # Ranks wait for each other while rank 0 writes a checkpoint, or for the slowest at an evaluation.
        timeout = datetime.timedelta(hours=2)
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl", timeout=timeout)
    return *rank_and_world(), device


def rank_and_world():
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def sum_over_ranks(sums):
    """Sums a Counter of numbers over all ranks, in their order. → Counter with the names that any rank has"""
    totals = collections.Counter()
    for share in gather(dict(sums)):
        totals.update(share)  # adds
    return totals


def gather(value):
    """The values of all ranks, in their order, on every rank."""
    values = [value] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def barrier():
    if dist.is_initialized():
        dist.barrier()


def memory():
    """Peak memory of this process in GB: resident, and on its GPU."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"rss_gb": resident / 1e9, "gpu_gb": torch.cuda.max_memory_allocated() / 1e9}


# ----------------------------------------------------------------------------------------------------------
# Output folders
# ----------------------------------------------------------------------------------------------------------

# What a resumed run may change, because it moves no weight. Training data and models are compared by content.
MAY_CHANGE = """
    resume out json eval workers micro_seconds recompute save_every keep eval_every sample_every
    on_bad_audio tensorboard
""".split()


def open_run(args, script, inputs):
    """Opens a run's folder before anything slow. → (steps done, folder of that checkpoint or None, config)

    The steps are 0 where there is no checkpoint, and None where the run is finished. inputs: {flag: path, or
    list of paths} of training data and model folders. config is what `begin_run` writes. Rank 0 looks, and
    every rank gets its answer or its InputError.
    """
    answer = None
    if rank_and_world()[0] == 0:
        try:
            answer = look_at_run(args, script, inputs)
        except (InputError, OSError) as error:
            answer = InputError(error)
    answer = gather(answer)[0]
    if isinstance(answer, InputError):
        raise answer
    return answer


def look_at_run(args, script, inputs):
    """`open_run` on rank 0."""
    out = args.out
    if getattr(args, "tensorboard", False) and importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard needs the package tensorboard: pip install tensorboard")
    config = {
        "script": script,
        "args": vars(args),
        "inputs": {name: fingerprint(path) for name, path in inputs.items()},
        "git": git_commit(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "world_size": rank_and_world()[1],
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    names = os.listdir(out) if os.path.exists(out) else []
    if not names or names == ["config.json.new"]:  # killed before its first file was complete
        return 0, None, config
    if not args.resume:
        raise InputError(f"--out {out} is not empty: choose another, or go on by the same flags and --resume")

    old = read_json(os.path.join(out, "config.json")) if "config.json" in names else {}
    if old.get("script") != script:
        raise InputError(f"--out {out} holds no run of {script} (config.json); choose another folder")
    for name, value in old["args"].items():
        change = f"--resume: --{name.replace('_', '-')} was {value}, now {getattr(args, name, None)}"
        if name in inputs:
            if old["inputs"][name] != config["inputs"][name]:
                raise InputError(f"{change}: the run began with other content; keep it")
        elif name not in MAY_CHANGE and value != getattr(args, name, None):
            raise InputError(f"{change}; keep it")

    steps = complete_steps(out)
    while steps and not is_readable(steps[max(steps)]):
        damaged = steps.pop(max(steps))
        print(f"{damaged} cannot be read, and is left aside as {damaged}.damaged", flush=True)
        shutil.rmtree(damaged + ".damaged", ignore_errors=True)  # of an earlier time
        os.rename(damaged, damaged + ".damaged")
    step = max(steps, default=0)
    if "summary.json" in names:
        print(f"{out}: finished{f' at step {step}' if steps else ''}; nothing to do", flush=True)
        return None, None, config
    if "steps" in vars(args):  # eval.py has none
        print(f"{out}: goes on from step {step}", flush=True)
    return step, steps.get(step), config


def fingerprint(path):
    """SHA-256 of a manifest, or of a model folder; of a list of paths a list.

    Of a model: its config, and of each file of weights the size and 2**16 pieces of 4 kB, evenly spread: all
    of up to 268 MB. Where a part was trained, all of its tensors have changed, so it shows.
    """
    if isinstance(path, list):
        return [fingerprint(one_path) for one_path in path]
    with open(os.path.join(path, "config.json") if os.path.isdir(path) else path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    for weights in sorted(pathlib.Path(path).glob("*.safetensors")):
        with open(weights, "rb") as file:
            size = os.path.getsize(weights)
            digest.update(size.to_bytes(8))
            for offset in range(0, size, max(2**12, size // 2**16)):
                file.seek(offset)
                digest.update(file.read(2**12))
    return digest.hexdigest()


def git_commit():
    """The commit of this checkout, or None."""
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "HEAD"]
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def complete_steps(out):
    """{step: folder} of the complete checkpoints of a run; what was being written has another name."""
    names = [path.name.removeprefix("step-") for path in pathlib.Path(out).glob("step-*")]
    steps = sorted(int(name) for name in names if re.fullmatch(r"0|[1-9]\d*", name))
    return {step: os.path.join(out, f"step-{step}") for step in steps}


def is_readable(checkpoint):
    """Are both files of tensors there, and as long as their headers say?"""
    try:
        for name in ("state.safetensors", os.path.join("model", "model.safetensors")):
            safetensors.safe_open(os.path.join(checkpoint, name), framework="pt")
    except (OSError, safetensors.SafetensorError):
        return False
    return True


def begin_run(args, config, first_step):
    """Writes config.json, and cuts metrics.jsonl and its kin back to `first_step`: no step is there twice.

    → rank 0's writer to OUT/tensorboard, or None. What a start before wrote there after `first_step` goes.
    """
    barrier()  # every rank has got this far, so that a refused run leaves no folder behind
    if rank_and_world()[0] > 0:
        return None
    os.makedirs(args.out, exist_ok=True)
    write_json(os.path.join(args.out, "config.json"), config)
    for name in ("metrics.jsonl", "samples.jsonl", "bad.jsonl"):
        path = os.path.join(args.out, name)
        if "steps" in vars(args) and os.path.exists(path):  # not eval.py's results of a set of that name
            lines = [line for line in read_lines(path) if line["step"] <= first_step]
            add_lines(path + ".new", lines, mode="w")
            os.replace(path + ".new", path)
    if not getattr(args, "tensorboard", False):
        return None
    from torch.utils.tensorboard import SummaryWriter  # an optional package, slow to import

    return SummaryWriter(os.path.join(args.out, "tensorboard"), purge_step=first_step + 1)


def check_out(out):
    """Raises InputError where a folder for results is not empty, OSError where a file is in its place."""
    if os.path.exists(out) and os.listdir(out):
        raise InputError(f"--out {out} is not an empty folder: choose a new one")


def report_bad(out, step, bad):
    """Adds the clips that any rank could not use in `step` to bad.jsonl. All ranks call it together."""
    bad_of_all = sum(gather(bad), [])
    if rank_and_world()[0] == 0:
        add_lines(os.path.join(out, "bad.jsonl"), [{"step": step, **entry} for entry in bad_of_all])


def stop_not_finite(out, step, what, transcripts):
    """Saves this rank's [(clip, text)] of the step and stops with status 3; no weight is touched."""
    path = os.path.join(out, f"nonfinite-{step}-{rank_and_world()[0]}.jsonl")
    lines = []
    for clip, text in transcripts:
        lines.append({"step": step, "clip": clip.where, "audio": clip.audio, "text": text})
    add_lines(path, lines, mode="w")
    barrier()
    raise NonFiniteError(f"step {step}: {what}: not finite; its clips are in {path}; lower --lr?")


def is_lfs_pointer(path):
    """Does a file hold what git lfs leaves in place of one that has not been fetched?"""
    with open(path, "rb") as file:
        return file.read(20).startswith(b"version https://git")


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write_json(path, value):
    """Complete or not at all: written beside and renamed."""
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
    os.replace(path + ".new", path)


def read_lines(path):
    """The objects of a JSON Lines file, without a last line that a kill cut off."""
    with open(path, "rb") as file:
        return [json.loads(line) for line in file if line.endswith(b"}\n")]


def add_lines(path, lines, mode="a"):
    with open(path, mode, encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def log_metrics(out, metrics, writer, bar):
    """Adds a step to metrics.jsonl, to TensorBoard where there is a writer, and in part to the bar."""
    add_lines(os.path.join(out, "metrics.jsonl"), [metrics])
    shown = [key for key in ("loss", "kl", "vuss", "clips_per_s") if key in metrics]
    bar.set_postfix({key: metrics[key] for key in shown}, refresh=False)
    if writer is not None:
        for name, value in metrics.items():
            if value is not None:  # the error of a set without reference units
                writer.add_scalar(name, value, metrics["step"])
        writer.flush()


# ----------------------------------------------------------------------------------------------------------
# Flags and errors
# ----------------------------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults in --help, and the script's docstring as it is written."""


def argument_parser(script, docstring):
    """An argparse parser without abbreviations; `@FILE` reads flags from the lines of a file."""
    parser = argparse.ArgumentParser(
        prog=script,
        usage=f"{script} [--flag value …] [@file]",
        description=docstring,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        fromfile_prefix_chars="@",
    )
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    return parser


def at_least(low, kind=float):
    """The type of a flag whose value is a finite number, `low` or above."""

    def number(text):
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be at least {low:g}, found {text}")
        return value

    return number


def run_script(main, args):
    """Runs main(args). A user's mistake, or a path that fails, is one line and status 2 (not finite: 3).

    Mistakes that all ranks meet are printed once a node, others by the rank that met them.
    """
    try:
        main(args)
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and error.errno is None:  # not the system's: a library uses the class
            raise
        is_shared = isinstance(error, InputError) and not isinstance(error, AudioError)
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 or not is_shared:
            remedy = "" if isinstance(error, InputError) else "; give a path that can be used"
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                remedy = "; make room on that disk"
            tqdm.write(f"{os.path.basename(sys.argv[0])}: error: {error}{remedy}", file=sys.stderr)
        sys.exit(3 if isinstance(error, NonFiniteError) else 2)
    if dist.is_initialized():
        dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------
# Languages
# ----------------------------------------------------------------------------------------------------------


@functools.cache
def language_code(name):
    """The code of a manifest's `language`: "Chinese", "zh-CN", "cmn" → "zh"; "zh-HK", "zh-yue" → "yue".

    Understood are the codes of ISO 639 with two or three letters and English names, each with tags of region
    or script. Raises InputError for anything else: a Chinese set labelled "cn" must not be scored by word.
    """
    first, *tags = re.split("[-_]", name.strip().lower())
    if not re.fullmatch("[a-z]{2,3}", first):
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE  # slow to import

        first = {**TO_LANGUAGE_CODE, "filipino": "fil"}.get(first, "und")
    language = langcodes.Language.get(first)
    are_tags = all(re.fullmatch("[a-z0-9]{2,8}", tag) for tag in tags)
    if language.language is None or not language.is_valid() or not are_tags:
        raise InputError(f"language {name!r} is not known; give a code of ISO 639 such as en, zh or yue")
    code = language.language
    if code != "yue" and MACROLANGUAGES.get(code) == "zh":  # cmn, wuu, nan, hak, gan, …
        code = "zh"
    return "yue" if code == "zh" and ("hk" in tags or "yue" in tags) else code


def script_language(text, default=None):
    """The language that the script of a text decides, or the default.

    Kana means Japanese, else Hangul Korean, else Han Chinese, unless the default is Cantonese or Japanese.
    Thai and Greek letters decide where most letters are theirs; many languages share the other scripts.
    """
    text = unicodedata.normalize("NFKC", MARKUP.sub(" ", text))
    scripts = [unicodedata.name(c, "?").split()[0] for c in text if c.isalpha()]
    if "HIRAGANA" in scripts or "KATAKANA" in scripts:
        return "ja"
    if "HANGUL" in scripts:
        return "ko"
    if "CJK" in scripts:
        return default if default in ("yue", "ja") else "zh"
    most = max(dict.fromkeys(scripts), key=scripts.count, default=None)
    return {"THAI": "th", "GREEK": "el"}.get(most, default)
