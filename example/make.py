"""Rebuilds the embedded bilingual example (a toy task: synthetic speech, small vocabulary) from nothing.

    apt-get install espeak-ng flite
    python example/make.py audio        # train, dev, five test sets -> example/
    python example/make.py extra        # what teacher and base learn from, which is not shipped -> --work
    python example/make.py tokenizer    # byte-level BPE of 512 tokens -> --work
    python example/make.py models       # teacher and base by sft.py, which share the tokenizer -> example/
    python example/make.py all
    python example/make.py fresh        # what neither teacher nor base has heard, for experiments -> --work

Provenance: every sentence comes from the two grammars below, which were written for this example. The
speech is synthesised by espeak-ng 1.51 (formant synthesis, GPL-3 program) and flite 2.2 (voices kal16, slt,
awb, rms; free CMU licence). Noise, babble, telephone band and room reverb are computed here; there is no
recording of anybody and no downloaded data. Chinese is read by espeak's `cmn-latn-pinyin` voice, because
the `cmn` voice of 1.51 spells the pinyin with English sounds ("qing three" for the third-tone qing).

Every random choice of a clip is from a generator seeded by (seed, set, clip number), so a clip can be
rebuilt alone and the number of worker processes changes nothing. A sentence belongs to exactly one of train
+ extra, dev and each test set by the hash of its text; speakers are disjoint between train + extra, dev and
test by the lists below. The fresh set has speakers of its own, and sentences of dev's kind that dev has not.
"""

import argparse
import functools
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import soundfile as sf

HERE = Path(__file__).resolve().parent
RATE_HZ = 16000
MIN_S, MAX_S = 1.0, 4.0  # a clip outside is drawn again
OPUS_LEVEL = 0.967  # libsndfile: bit rate = (1 - level) * 250 kbit/s + 6 kbit/s, about 14 kbit/s
N_TRAIN = 1200
N_DEV = 120
N_TEST = 120  # 6 clips of each of 20 voices
N_FRESH = 1500  # about an hour
EXTRA_SHARD = 2000  # clips in one tar of the extra set
# The base learns from the first hours of the extra set: clean clips, and few of the degraded ones. So the
# unlabelled audio of train has something to teach: conditions that the base has hardly heard.
BASE_HOURS = 5.0
BASE_DEGRADED = 8  # one in so many degraded clips
PROMPT = "Please transcribe this audio."
N_TOKENS = 512
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|audio|>",
    "<|user|>",  # the last ids;
    "<|begin_of_audio|>",
    "<|end_of_audio|>",
    "<|assistant|>",
]  # pad: endoftext, eos: im_end

# ------------------------------------------------------------------------------------------------- speakers
# A speaker is "voice+variant". TRAIN (EXTRA holds it too), DEV, TEST and FRESH share no variant in either
# language.

TRAIN = {
    "en": [
        "en-us+m1",
        "en-gb+f3",
        "en-us+Annie",
        "flite+slt",
        "flite+kal16",
        "en-gb-scotland+m2",
        "en-us+f1",
        "en-gb-x-rp+Alex",
        "en-us-nyc+Michael",
        "en-gb+klatt2",
        "en-029+robert",
        "en-us+linda",
    ],
    "zh": [
        "zh+m1",
        "zh+f3",
        "zh+Annie",
        "zh+m2",
        "zh+f1",
        "zh+Alex",
        "zh+Michael",
        "zh+klatt2",
        "zh+robert",
        "zh+linda",
        "zh+m4",
        "zh+belinda",
    ],
}
ACCENTS = ["en-us", "en-gb", "en-gb-scotland", "en-us-nyc", "en-gb-x-rp"]


def voices_of(variants):
    """Voices of both languages from espeak's variants; the English ones take turns at the accents."""
    return {
        "en": [f"{ACCENTS[i % len(ACCENTS)]}+{variant}" for i, variant in enumerate(variants)],
        "zh": [f"zh+{variant}" for variant in variants],
    }


# No robot, no whisper, and of variants that differ in little more than their name only one. Five more were
# tried and left out, because the teacher has over 50 % error on them in some condition: Marco, steph, travis,
# zac, kaukovalta. What a teacher does not understand says nothing about learning from it.
DEV = voices_of("m5 f4 Mike aunty grandpa grandma pedro max".split())
TEST_VARIANTS = """
    m3 f2 Andy Mario sandro quincy rob victor shelby anika gustave iven croak Nguyen boris marcelo norbert
    Storm Lee pablo
""".split()
TEST = voices_of(TEST_VARIANTS)
TEST["en"][-1] = "flite+rms"
MORE_VARIANTS = """
    m6 m7 m8 f5 klatt klatt3 Alicia Andrea antonio benjamin caleb david Denis Diogo ed edward Gene
    Henrique john miguel paul
""".split()
EXTRA = {
    "en": TRAIN["en"] + ["flite+awb"] + voices_of(MORE_VARIANTS)["en"],
    "zh": TRAIN["zh"] + voices_of(MORE_VARIANTS)["zh"],
}
FRESH = voices_of("adam announcer AnxiousAndy Jacky klatt4 klatt5".split())
SPEAKERS = {"train": TRAIN, "extra": EXTRA, "dev": DEV, "fresh": FRESH}  # the other sets: TEST

# set -> (language, condition); dev and fresh take them in this order, a fifth of their clips each
TESTS = {
    "en-clean": ("en", "clean"),
    "en-other": ("en", "noisy"),
    "zh-read": ("zh", "clean"),
    "zh-net": ("zh", "telephone"),
    "zh-meeting": ("zh", "meeting"),
}
CONDITIONS = ["clean", "noisy", "telephone", "meeting"]
TRAIN_MIX = {"en": [0.5, 0.3, 0.1, 0.1], "zh": [0.5, 0.0, 0.25, 0.25]}  # probabilities of CONDITIONS

# ------------------------------------------------------------------------------------------------- sentences

ONE_TO_TEN = "one two three four five six seven eight nine ten".split()
HANZI_NUMBERS = list("一二三四五六七八九十")


def english(rng):
    def pick(*items):
        return str(rng.choice(items))

    def number(low, high):
        return " ".join(rng.choice(ONE_TO_TEN[:9], rng.integers(low, high + 1)))

    def person():
        names = rng.permutation(["anna", "peter", "maria", "david"])
        return " and ".join(names[: 2 if rng.random() < 0.3 else 1])

    at_time = "at " + pick(*ONE_TO_TEN) + pick("", " thirty")
    day = pick("today", "tomorrow", "in the morning", "tomorrow morning")
    city = pick("london", "paris", "chicago")
    room = pick(" in the kitchen", " in the bedroom", " in the garage")
    goods = rng.permutation(["apples", "lemons", "tickets"])
    count = pick(*ONE_TO_TEN[1:])
    text = pick(
        f"call {person()} {at_time}",
        f"call {person()} {at_time} {day}",
        f"call {person()} {pick('in ' + city, day)}",
        f"call number {number(3, 6)}",
        f"the number is {number(3, 6)}",
        f"turn {pick('on', 'off')} the {pick('light', 'radio', 'music')}"
        f"{pick('', room)} {pick(at_time, day)}",
        f"{pick('open', 'close')} the {pick('door', 'window')}{pick('', room)} {pick(at_time, day)}",
        f"{pick('open', 'close')} the {pick('door', 'window')} and turn {pick('on', 'off')} the light{room}",
        f"play {pick('music', 'the radio')}{room} {at_time}",
        f"meet {person()} in {city} {pick(at_time, day)}",
        f"{person()} is in {pick(city, 'the ' + pick('kitchen', 'garage'))} {pick(at_time, day)}",
        f"the {city} train is {at_time} {pick('', day)}",
        f"buy {count} {goods[0]} {pick('in ' + city, day)}",
        f"buy {count} {goods[0]} and {pick(*ONE_TO_TEN[1:])} {goods[1]}",
    ).strip()
    command = text.split()[0] in ("call", "turn", "open", "close", "play", "meet", "buy")
    return "please " + text if command and rng.random() < 0.15 else text


def chinese(rng):
    def pick(*items):
        return str(rng.choice(items))

    def number(low, high):
        return "".join(rng.choice(HANZI_NUMBERS[:9], rng.integers(low, high + 1)))

    person = "小" + pick(*"王李张陈")
    day = pick("明天", "后天")
    date = f"{pick(*HANZI_NUMBERS)}月{pick('', '十')}{pick(*HANZI_NUMBERS[:9])}号"
    at_time = pick("早上", "晚上") + pick(*HANZI_NUMBERS) + pick("点", "点半")
    city = pick("北京", "上海", "杭州")
    when = pick(day, at_time, day + at_time, date)
    switch, room, thing = pick("打开", "关上"), pick("客厅", "厨房"), pick(*"灯门窗")
    drink = "喝" + pick(*"茶水")
    text = pick(
        f"{switch}{room}的{thing}",
        f"{at_time}{switch}{room}的{thing}",
        f"{switch}{room}的{thing}{pick('打开', '关上')}{pick(*'灯门窗')}",
        f"{person}{when}到{city}",
        f"{person}{when}去{city}",
        f"{person}的电话{number(3, 5)}",
        f"打电话{number(3, 6)}",
        f"{day}去{pick(city, '')}买{pick(*HANZI_NUMBERS)}个苹果",
        f"{person}买{number(1, 1)}个苹果{drink}",
        f"{when}请{person}{drink}",
        f"{person}{when}开车去{city}",
        f"去{city}的火车{at_time}开",
        f"{date}火车{pick('到', '去')}{city}",
    )
    return "请" + text if text[:2] in ("打开", "关上", "打电") and rng.random() < 0.3 else text


GRAMMARS = {"en": english, "zh": chinese}


def set_of_text(text):
    """The one set that may contain this sentence; "train" stands for extra too, and "dev" for fresh."""
    bucket = int(hashlib.md5(text.encode()).hexdigest(), 16) % 16
    return [*TESTS, "dev"][bucket] if bucket < 6 else "train"


# ------------------------------------------------------------------------------------------------- signals


def rng_of(*key):
    return np.random.default_rng([k if isinstance(k, int) else zlib.crc32(k.encode()) for k in key])


def rms(x):
    return np.sqrt(np.mean(x**2)) + 1e-9


def db(decibel):
    return 10 ** (decibel / 20)


def filtered(x, freqs_hz, gains):
    """x through a zero-phase filter whose gain is linear between the given points."""
    spectrum = np.fft.rfft(x) * np.interp(np.fft.rfftfreq(len(x), 1 / RATE_HZ), freqs_hz, gains)
    return np.fft.irfft(spectrum, len(x))


def resample(x, n_out):
    """x (n_in,) stretched to n_out samples, by cutting or zero-padding its spectrum."""
    return np.fft.irfft(np.fft.rfft(x)[: n_out // 2 + 1], n_out) * (n_out / len(x))


def language_of(speaker):
    return "zh" if speaker.startswith("zh+") else "en"


def speak(speaker, text, rng):
    """Speech (n,) at 16 kHz, RMS 0.1. Pitch and vocal-tract scale are the speaker's own, speed varies.

    In train, extra and fresh, pitch and scale vary too, which stands for more voices.
    """
    own = rng_of("speaker", speaker)
    vary_scale = rng.uniform(0.985, 1.015)
    vary_pitch = rng.uniform(-8, 8)
    if speaker in DEV[language_of(speaker)] + TEST[language_of(speaker)]:
        vary_scale = 1.0
        vary_pitch = 0.0
    scale = own.uniform(0.91, 1.1) * vary_scale  # > 1: shorter vocal tract, higher and faster
    pitch = own.uniform(30, 70) + vary_pitch
    speed = own.uniform(0.92, 1.08) * rng.uniform(0.93, 1.07) / scale
    voice, variant = speaker.split("+")
    if voice == "flite":
        with tempfile.NamedTemporaryFile(suffix=".wav") as wav:
            stretch = f"duration_stretch={0.95 / speed:.3f}"
            command = ["flite", "-voice", variant, "--setf", stretch, "-t", text, "-o", wav.name]
            subprocess.run(command, check=True)
            x, rate_hz = sf.read(wav.name)
    else:
        name, words_per_minute = ("cmn-latn-pinyin", 230) if voice == "zh" else (voice, 170)
        command = [
            "espeak-ng",
            "-v",
            f"{name}+{variant}",
            "-p",
            str(round(pitch)),
            "-s",
            str(round(words_per_minute * speed)),
            "--stdout",
            text,
        ]
        wav = subprocess.run(command, check=True, capture_output=True).stdout
        x, rate_hz = np.frombuffer(wav[44:], "<i2") / 32768, 22050  # its header does not know the length
    if len(x) == 0 or np.abs(x).max() == 0:
        raise ValueError(f"no speech from speaker {speaker} for {text!r}: is the voice installed?")
    loud = np.flatnonzero(np.abs(x) > 0.02 * np.abs(x).max())
    x = x[loud[0] : loud[-1] + 1]
    before, after = (rng.uniform(0.05, 0.2, 2) * rate_hz * scale).astype(int)
    x = np.concatenate([np.zeros(before), x, np.zeros(after)])
    x = resample(x, round(len(x) * RATE_HZ / (rate_hz * scale)))
    return filtered(x, [0, 30, 70, 8000], [0, 0, 1, 1]) * (0.1 / rms(x))


def coloured_noise(n, rng):
    """Noise (n,) whose power falls as 1 / f^0 (white) to 1 / f^2 (brown), unit RMS."""
    half_slope = rng.uniform(0, 1)
    freqs_hz = np.arange(0, 8001, 25)
    noise = filtered(rng.standard_normal(n), freqs_hz, np.maximum(freqs_hz, 50.0) ** -half_slope)
    return noise / rms(noise)


def babble(n, set_name, language, rng):
    """Three or four other sentences of the same set and language on top of each other (n,), unit RMS."""
    total = np.zeros(n)
    for _ in range(rng.integers(3, 5)):
        text = draw_text(set_name, language, rng)
        voice = speak(str(rng.choice(SPEAKERS.get(set_name, TEST)[language])), text, rng)
        total += np.roll(np.resize(voice, n), rng.integers(n))
    return total / rms(total)


def degrade(x, condition, set_name, language, rng):
    """x (n,) in one of the CONDITIONS; the result has its final level and does not clip."""
    level = rng.uniform(-26, -20)  # dB of full scale, RMS over the clip
    if condition == "clean":
        x = x + rms(x) * coloured_noise(len(x), rng) * db(-rng.uniform(35, 45))
    elif condition == "noisy":
        knots = rng.uniform(-6, 6, 4)  # level changes within the clip
        x = x * db(np.interp(np.arange(len(x)), np.linspace(0, len(x), 4), knots))
        is_babble = rng.random() < 0.35
        noise = babble(len(x), set_name, language, rng) if is_babble else coloured_noise(len(x), rng)
        x = x + rms(x) * noise * db(-rng.uniform(7 if is_babble else 5, 15))
        level = rng.uniform(-32, -18)
    elif condition == "telephone":
        x = x + rms(x) * coloured_noise(len(x), rng) * db(-rng.uniform(12, 20))
        x = filtered(x, [0, 200, 330, 3200, 3500, 8000], [0, 0, 1, 1, 0, 0])
        x = resample(x, len(x) // 2)  # 8 kHz
        x = 0.5 * x / np.abs(x).max()
        code = np.round(128 * np.sign(x) * np.log1p(255 * np.abs(x)) / np.log(256))  # 8-bit mu-law
        x = np.sign(code) * np.expm1(np.abs(code) / 128 * np.log(256)) / 255
        x = resample(x, 2 * len(x))
    else:  # meeting: a far microphone in a room
        rt60_s = rng.uniform(0.25, 0.6)
        t = np.arange(int(rt60_s * RATE_HZ)) / RATE_HZ
        tail = rng.standard_normal(len(t)) * 10 ** (-3 * t / rt60_s) * (t > rng.uniform(0.002, 0.01))
        response = tail * db(-rng.uniform(-1, 6)) / np.sqrt(np.sum(tail**2))  # direct to reverberant, dB
        response[0] = 1.0
        x = np.concatenate([x, np.zeros(RATE_HZ // 10)])
        n_fft = len(x) + len(response)
        x = np.fft.irfft(np.fft.rfft(x, n_fft) * np.fft.rfft(response, n_fft), n_fft)[: len(x)]
        is_babble = rng.random() < 0.35
        noise = babble(len(x), set_name, language, rng) if is_babble else coloured_noise(len(x), rng)
        x = x + rms(x) * noise * db(-rng.uniform(10, 20))
        level = rng.uniform(-38, -28)
    x = x * db(level) / rms(x)
    return x * min(1.0, 0.9 / np.abs(x).max())


# ------------------------------------------------------------------------------------------------- clips


def draw_text(set_name, language, rng):
    family = {"extra": "train", "fresh": "dev"}.get(set_name, set_name)
    while True:
        text = GRAMMARS[language](rng)
        if set_of_text(text) == family and not (set_name == "fresh" and text in dev_texts()):
            return text


@functools.cache
def dev_texts():
    with open(HERE / "dev.jsonl", encoding="utf-8") as file:
        return {json.loads(line)["text"] for line in file}


def make_clip(job):
    """One clip -> (its line of the manifest, the bytes of its file)."""
    seed, set_name, number = job
    rng = rng_of(seed, set_name, number)
    if set_name in ("train", "extra"):  # the languages alternate, the speakers take turns
        language, turn = ("en", "zh")[number % 2], number // 2
        condition = str(rng.choice(CONDITIONS, p=TRAIN_MIX[language]))
    else:
        n_clips = {"dev": N_DEV, "fresh": N_FRESH}.get(set_name)
        kind = list(TESTS)[number * len(TESTS) // n_clips] if n_clips else set_name
        language, condition = TESTS[kind]
        turn = number
    speakers = SPEAKERS.get(set_name, TEST)[language]
    speaker = speakers[turn % len(speakers)]
    while True:
        text = draw_text(set_name, language, rng)
        x = degrade(speak(speaker, text, rng), condition, set_name, language, rng)
        if MIN_S <= len(x) / RATE_HZ <= MAX_S:
            break
    file = io.BytesIO()
    if set_name == "extra":
        sf.write(file, x, RATE_HZ, format="FLAC", subtype="PCM_16")
        data = file.getvalue()
    else:
        sf.write(file, x, RATE_HZ, format="OGG", subtype="OPUS", compression_level=OPUS_LEVEL)
        data = with_serial(file.getvalue(), number)
    line = {
        "duration": round(len(x) / RATE_HZ, 3),
        "text": text,
        "language": language,
        "speaker": speaker,
        "condition": condition,
        "id": f"{set_name}-{number:05d}",
    }
    return line, data


def ogg_crc_table():
    table = []
    for byte in range(256):
        crc = byte << 24
        for _ in range(8):
            crc = (crc << 1) ^ (0x04C11DB7 if crc & 0x80000000 else 0)
        table.append(crc & 0xFFFFFFFF)
    return table


OGG_CRC = ogg_crc_table()


def with_serial(ogg, serial):
    """The Ogg file with this stream serial number; libsndfile draws a random one, no two builds alike."""
    pages, start = bytearray(ogg), 0
    while start < len(pages):
        n_segments = pages[start + 26]
        end = start + 27 + n_segments + sum(pages[start + 27 : start + 27 + n_segments])
        pages[start + 14 : start + 18] = serial.to_bytes(4, "little")
        pages[start + 22 : start + 26] = bytes(4)
        crc = 0
        for byte in pages[start:end]:
            crc = (crc << 8) & 0xFFFFFFFF ^ OGG_CRC[crc >> 24 ^ byte]
        pages[start + 22 : start + 26] = crc.to_bytes(4, "little")
        start = end
    return bytes(pages)


def add_to_tar(tar, line, data):
    """Appends a clip to an open tar -> its manifest line, which finds the bytes without the tar's headers."""
    suffix = ".flac" if line["id"].startswith("extra") else ".ogg"
    header = tarfile.TarInfo(line["id"] + suffix)  # mtime and uid are 0
    header.size = len(data)
    offset = tar.offset + 512  # a ustar header is one block
    tar.addfile(header, io.BytesIO(data))
    return {"audio": Path(tar.name).name, "offset": offset, "nbytes": len(data), **line}


def new_tar(path):
    return tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)


def write_manifest(path, lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    print(f"{path}: {len(lines)} clips, {sum(line['duration'] for line in lines) / 60:.1f} min", flush=True)


def make_audio(args):
    with multiprocessing.Pool(args.workers) as pool:
        lines = []
        for shard in range(2):
            numbers = range(shard * N_TRAIN // 2, (shard + 1) * N_TRAIN // 2)
            with new_tar(HERE / f"train-{shard}.tar") as tar:
                for clip in pool.imap(make_clip, [(args.seed, "train", n) for n in numbers], chunksize=8):
                    lines.append(add_to_tar(tar, *clip))
        write_manifest(HERE / "train.jsonl", lines)
        with new_tar(HERE / "test.tar") as tar:
            for name in ["dev", *TESTS]:
                n_clips = N_DEV if name == "dev" else N_TEST
                clips = pool.imap(make_clip, [(args.seed, name, n) for n in range(n_clips)], chunksize=8)
                write_manifest(HERE / f"{name}.jsonl", [add_to_tar(tar, *clip) for clip in clips])


def make_extra(args):
    with multiprocessing.Pool(args.workers) as pool:
        args.work.mkdir(parents=True, exist_ok=True)
        lines, seconds = [], 0.0
        while seconds < args.extra_hours * 3600:
            first = len(lines)
            with new_tar(args.work / f"extra-{first // EXTRA_SHARD}.tar") as tar:
                numbers = range(first, first + EXTRA_SHARD)
                for clip in pool.imap(make_clip, [(args.seed, "extra", n) for n in numbers], chunksize=8):
                    if seconds < args.extra_hours * 3600:  # the clips past the goal are made and left out
                        lines.append(add_to_tar(tar, *clip))
                        seconds += clip[0]["duration"]
        write_manifest(args.work / "extra.jsonl", lines)
        write_manifest(args.work / "labelled.jsonl", labelled_lines(lines))


def make_fresh(args):
    """Audio of voices and sentences that no other set has, in the conditions of the test sets."""
    args.work.mkdir(parents=True, exist_ok=True)
    with multiprocessing.Pool(args.workers) as pool, new_tar(args.work / "fresh.tar") as tar:
        clips = pool.imap(make_clip, [(args.seed, "fresh", n) for n in range(N_FRESH)], chunksize=8)
        write_manifest(args.work / "fresh.jsonl", [add_to_tar(tar, *clip) for clip in clips])


def labelled_lines(extra_lines):
    """What the base learns from, in the order of the extra set."""
    hours = np.cumsum([line["duration"] for line in extra_lines]) / 3600
    lines = []
    n_degraded = 0
    for line in extra_lines[: np.searchsorted(hours, BASE_HOURS) + 1]:
        is_clean = line["condition"] == "clean"
        if is_clean or n_degraded % BASE_DEGRADED == 0:
            lines.append(line)
        n_degraded += not is_clean
    return lines


# ------------------------------------------------------------------------------------------------- tokenizer


def make_tokenizer(args):
    """A Qwen2 tokenizer of N_TOKENS: 256 bytes, the merges, SPECIAL_TOKENS at the end.

    The Chinese sentences are trained on hanzi by hanzi: no merge crosses two, and every hanzi is one token.
    The merges don't suffice for every English word: the rarer of them take two tokens or more.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    rng = rng_of(args.seed, "tokenizer")
    texts = [PROMPT] * 300 + [english(rng) for _ in range(20000)]
    texts += [character for _ in range(20000) for character in chinese(rng)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=N_TOKENS - len(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(texts, trainer)
    trained = json.loads(bpe.to_str())["model"]
    first = len(trained["vocab"])
    vocab = trained["vocab"] | {token: first + i for i, token in enumerate(SPECIAL_TOKENS)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(merge) for merge in trained["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS[3:] + ["<|im_start|>"],
    )
    tokenizer.save_pretrained(args.work / "tokenizer")

    tokenizer = AutoTokenizer.from_pretrained(args.work / "tokenizer")
    assert tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == list(range(first, N_TOKENS)), len(tokenizer)
    lengths = {"english": [], "chinese": []}
    for grammar in (english, chinese):
        for text in {grammar(rng) for _ in range(2000)}:
            ids = tokenizer(text).input_ids
            assert tokenizer.decode(ids) == text, (text, ids)
            lengths[grammar.__name__].append(len(ids) / len(text.split() if grammar is english else text))
    print(
        f"{args.work / 'tokenizer'}: {len(tokenizer)} tokens, {np.mean(lengths['english']):.2f} a word, "
        f"{np.mean(lengths['chinese']):.2f} a hanzi, prompt {len(tokenizer(PROMPT).input_ids)}"
    )


# ---------------------------------------------------------------------------------------------------- models


def config(width, layers, hidden, lm_layers, lm_ffn):
    """A GlmAsr config.json. Narrow models want larger initial weights than the usual 0.02."""
    audio = dict(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    text = dict(
        model_type="qwen2",
        hidden_size=hidden,
        intermediate_size=lm_ffn,
        num_hidden_layers=lm_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.06,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    )
    return dict(audio_config=audio, text_config=text, tie_word_embeddings=True)


# name: (sizes, manifests, flags of sft.py, folder of the run that is taken). dev.jsonl chose the flags and
# no test set did. The base comes from the middle of its run: a recogniser with much to learn.
MODELS = {
    "teacher": (
        config(144, 4, 128, 3, 384),
        ["example/train.jsonl", "{work}/extra.jsonl"],
        "--steps 3200 --batch-size 32 --warmup-steps 200 --ctc-weight 0.5 --eval-every 400 --save-every 400",
        "model",
    ),
    "base": (
        config(96, 3, 96, 2, 256),
        ["{work}/labelled.jsonl"],
        "--steps 2500 --batch-size 16 --warmup-steps 100 --ctc-weight 1.0 --eval-every 500 --save-every 100",
        "step-1600/model",
    ),
}


def make_models(args):
    """Trains teacher and base side by side, one core each, and copies their folders to example/."""
    running = {}
    for name, (sizes, manifests, flags, _) in MODELS.items():
        (args.work / f"{name}.json").write_text(json.dumps(sizes))
        start = args.work / f"{name}-start"
        shutil.rmtree(start, ignore_errors=True)
        shutil.rmtree(args.work / name, ignore_errors=True)
        command = [
            sys.executable,
            "-m",
            "prepare.student",
            "--config",
            args.work / f"{name}.json",
            "--tokenizer",
            args.work / "tokenizer",
            "--seed",
            args.seed,
            "--out",
            start,
        ]
        subprocess.run(list(map(str, command)), cwd=HERE.parent, check=True)
        command = [
            sys.executable,
            "sft.py",
            "--train",
            *(m.format(work=args.work) for m in manifests),
            *flags.split(),
            "--model",
            start,
            "--out",
            args.work / name,
            "--eval",
            "example/dev.jsonl",
            "--lr",
            "3e-3",
            "--workers",
            "0",
            "--keep",
            "30",
            "--seed",
            args.seed,
            "--time-masks",
            "1",
            "--time-width",
            "20",
            "--freq-masks",
            "1",
            "--freq-width",
            "20",
        ]
        running[name] = subprocess.Popen(
            list(map(str, command)), cwd=HERE.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    for name, process in running.items():
        if process.wait():
            raise SystemExit(f"training the {name} failed")
        shutil.rmtree(HERE / name, ignore_errors=True)
        shutil.copytree(args.work / name / MODELS[name][3], HERE / name)


# ------------------------------------------------------------------------------------------------- main


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=["audio", "extra", "tokenizer", "models", "all", "fresh"])
    add = parser.add_argument
    add("--work", type=Path, default=Path("/tmp/asr-opd-example"), help="folder of what is not shipped")
    add("--extra-hours", type=float, default=8.0, help="hours of extra training audio, 0: none")
    add("--seed", type=int, default=0, help="the shipped example: 0")
    add("--workers", type=int, default=2, help="processes; changes nothing but the time")
    return parser.parse_args(argv)


def main(args):
    for program in ("espeak-ng", "flite"):
        if args.stage != "models" and shutil.which(program) is None:
            raise SystemExit(f"make.py: {program} is missing: apt-get install espeak-ng flite")
    stages = {"audio": make_audio, "extra": make_extra, "tokenizer": make_tokenizer, "models": make_models}
    shipped = list(stages)
    stages["fresh"] = make_fresh  # for experiments only
    for name in shipped if args.stage == "all" else [args.stage]:
        start = time.time()
        stages[name](args)
        print(f"{name}: {time.time() - start:.0f} s")


if __name__ == "__main__":
    main(parse_args())
