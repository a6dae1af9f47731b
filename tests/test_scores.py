"""Scores of eval.py: normalisation by table, errors, summaries, intervals, --compare, --seeds, --score."""

import importlib.metadata
import itertools
import json
import math
import os
import statistics
import zlib
from fractions import Fraction

import numpy as np
import opencc
import pytest
import scipy.stats
from conftest import DATA
from coverage import SETTINGS, simulate_pairs, simulate_seeds

import eval as evaluation
from data import Clip, InputError

ENGLISH = f"en/2-whisper-{importlib.metadata.version('whisper-normalizer')}"
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # man, woman, girl, joined by ZWJ
KEYCAP = "5\ufe0f\u20e3"  # the 5 key
THUMB = "\U0001f44d\U0001f3fd"  # thumbs up with a skin tone
ENGLAND = "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"

# ----------------------------------------------------------------------------------------------------------
# Normalisation. Units stand with blanks between them.
# ----------------------------------------------------------------------------------------------------------
EN = [
    ("Hello, World!", "hello world"),
    ("", ""),
    (" \t\r\n", ""),
    ("—?!", ""),
    ("twenty five percent", "25%"),
    ("25 per cent", "25%"),
    ("２５％", "25%"),
    ("two hundred and one", "201"),
    ("three point one four", "3.14"),
    ("two and a half", "2.5"),
    ("one oh one", "101"),
    ("minus five degrees", "-5 degrees"),
    ("the 1960s", "the 1960s"),
    ("1 dog, one cat", "one dog one cat"),
    ("1,000 people", "1000 people"),
    ("3.5 miles.", "3.5 miles"),
    ("ten thousand dollars", "$10000"),
    ("It cost $20 million.", "it cost $20000000"),
    ("$3.50", "$3.50"),
    ("＄20 or £5", "$20 or £5"),
    ("$0.50", "¢50"),
    ("I can't, won't, don't", "i can not will not do not"),
    ("it's we'll they're I've I'm he'd", "it is we will they are i have i am he would"),
    ("she'd been", "she had been"),
    ("I don 't", "i do not"),
    ("I don’t, don‘t, donʼt, donʻt, don`t, don´t, don′t", "i " + "do not " * 6 + "do not"),
    ("it’s John`s", "it is john is"),
    ("“‘Yes,’ she said”", "yes she said"),
    ("the dogs' house", "the dogs house"),
    ("Mr. and Mrs. Smith met Dr. Jones", "mister and missus smith met doctor jones"),
    ("colour organise centre grey", "color organize center gray"),
    ("well-known AT&T", "well known at t"),
    ("um, uh, hmm, mm, mhm", ""),
    ("[noise] hello (laughs) <unk>", "hello"),
    ("café naïve Łódź straße", "cafe naive lodz strasse"),
    ("U.S. army", "u s army"),
    ("Wait…", "wait"),
    ("Wait...", "wait"),
    ("…", ""),
    ("3.5... or 3.", "3.5 or 3"),
    ("ＨＥＬＬＯ　ｗｏｒｌｄ", "hello world"),
    ("ﬁnd the oﬃce", "find the office"),
    ("\ufeffhel\u200blo under\u00adstand", "hello understand"),
    ("press " + KEYCAP + " ❤\ufe0f " + THUMB, "press 5"),
]
ZH = [
    ("今天 天气 很 好。", "今 天 天 气 很 好"),
    ("你\u3000好\u00a0吗\n？", "你 好 吗"),
    ("，。！？、《》；：“”‘’（）【】——……·～", ""),
    (",.!?;:'\"()[]{}<>-_=+*/\\|@#$^&~`", ""),
    ("《红楼梦》、《西游记》！", "红 楼 梦 西 游 记"),
    ("「你好」『世界』", "你 好 世 界"),
    ("ＡＢｃ１２３", "a b c 1 2 3"),
    ("我有50％的股份", "我 有 5 0 的 股 份"),
    ("百分之五十", "百 分 之 五 十"),  # numbers stay as they are written
    ("二〇二四年①", "二 〇 二 四 年 1"),
    ("￥100", "1 0 0"),
    ("25℃", "2 5 c"),
    ("A股涨了3.5%", "a 股 涨 了 3 5"),
    ("Wi-Fi 密码是 abc", "w i f i 密 码 是 a b c"),
    ("去哪儿玩儿一会儿", "去 哪 儿 玩 儿 一 会 儿"),
    ("阿·Q", "阿 q"),
    ("你\u200b好\u200d吗\ufeff", "你 好 吗"),
    ("\u202a你好\u202c\u2060", "你 好"),
    ("爱❤\ufe0f你", "爱 你"),
    ("好" + FAMILY + "的" + THUMB, "好 的"),
    ("按" + KEYCAP, "按 5"),
    (ENGLAND + "赢了🇨🇳", "赢 了"),
    ("𠮷野家", "𠮷 野 家"),  # beyond U+FFFF, one unit
    ("\uf90a\u2f00", "金 一"),  # compatibility ideograph, radical
    ("<unk>嗯", "u n k 嗯"),  # Whisper's brackets and fillers are en's only
    ("", ""),
    (" 。 ", ""),
]
OTHERS = [
    ("yue", "佢哋喺度，OK？", "佢 哋 喺 度 o k"),
    ("ja", "東京、日本。「はい」〜", "東 京 日 本 は い"),
    ("ja", "ラーメン 人々", "ラ ー メ ン 人 々"),
    ("ja", "ｶﾞｲﾄﾞ・か\u3099", "ガ イ ド が"),  # half-width and decomposed voiced kana
    ("ko", "안녕하세요, 세계!", "안 녕 하 세 요 세 계"),
    ("ko", "\u1112\u1161\u11ab\u1100\u1173\u11af", "한 글"),  # decomposed syllables
    ("th", "ภาษา ไทย", "ภ า ษ า ไ ท ย"),
    ("fr", "L'eau d'ÉTÉ", "l eau d été"),
    ("fr", "aujourd’hui, ça va ?", "aujourd hui ça va"),
    ("fr", "« Bonjour » – e\u0301te\u0301…", "bonjour été"),
    ("de", "Straße, Öl & Käse!", "straße öl käse"),
    ("de", "GROẞ E-Mail 3,5 %", "groß e mail 3 5"),
    ("de", "ich ❤\ufe0f dich " + FAMILY + " " + KEYCAP, "ich dich 5"),
    ("de", "Donau\u00addampf \ufeffok", "donaudampf ok"),
    ("de", "um zwanzig Uhr (laut) hmm", "um zwanzig uhr laut hmm"),
    ("ru", "Привет, Мир! Ёлка.", "привет мир ёлка"),
    ("ru", "и\u0306 №5", "й no5"),
    ("es", "¿Qué tal? ¡Bien!", "qué tal bien"),
    ("tr", "İzmir, ISPARTA", "izmir ısparta"),
    ("tr", "I\u0307zmir Iğdır’ın", "izmir ığdır ın"),
    ("az", "İŞIQ Bakı", "işıq bakı"),
    ("de", "ISPARTA", "isparta"),
    (None, "Hello, don't! Café 3.5", "hello don t café 3 5"),  # no language: plain words, not English
    (None, "twenty five", "twenty five"),
    ("lo", "ສະບາຍດີ, ໂລກ", "ສ ະ ບ າ ຍ ດ ີ ໂ ລ ກ"),
    ("my", "မြန်မာ။", "မ ြ န ် မ ာ"),
    ("km", "ភាសា\u200bខ្មែរ។", "ភ ា ស ា ខ ្ ម ែ រ"),
    ("bo", "བོད་སྐད།", "བ ོ ད ས ྐ ད"),
    ("hi", "हिन्दी है। क\u094d\u200dष", "हिन्दी है क\u094dष"),  # vowel signs stay
]
PAPER = [
    ("en", "Don't stop, it's 5 o'clock!", "dont stop its 5 oclock"),
    ("en", "I don’t donʼt don´t", "i dont dont dont"),
    ("tr", "İzmir'in ISISI", "izmirin ısısı"),
    ("en", "twenty-five percent, 25%", "twentyfive percent 25"),
    ("en", "$3.50 1,000", "350 1000"),
    ("en", "um, [noise] yes", "um noise yes"),
    ("en", "A & B — C", "a b c"),
    ("en", "wait…what", "waitwhat"),
    ("en", "hel\u200blo " + THUMB + " " + KEYCAP, "hello 5"),
    ("en", "ＯＫ", "ｏｋ"),  # no NFKC
    ("fr", "L'eau d'ÉTÉ", "leau dété"),
    ("fr", "e\u0301te\u0301", "e\u0301te\u0301"),
    ("zh", "你好，世界！ OK", "你 好 世 界 o k"),
    ("zh", "５０％", "５ ０"),
    ("zh", "臺灣《》" + FAMILY, "臺 灣"),
    ("ko", "안녕, 세계", "안 녕 세 계"),
]
SIMPLIFIED = [
    ("zh", "default", "臺灣大學", "台 湾 大 学"),
    ("zh", "default", "頭髮、發現，後來", "头 发 发 现 后 来"),
    ("zh", "default", "乾燥的乾坤", "干 燥 的 乾 坤"),  # by phrase: 乾 stays in 乾坤
    ("zh", "default", "軟體 ＯＫ", "软 体 o k"),  # characters, not the mainland's words
    ("zh", "default", "这是简体，什么么？", "这 是 简 体 什 么 么"),
    ("zh", "default", "看著名著，看着名著", "看 着 名 着 看 着 名 着"),  # 著 and 着 are one
    ("zh", "default", "衞生，甚麼，麻痺", "卫 生 什 么 麻 痹"),
    ("zh", "default", "一幺三，一么三", "一 么 三 一 么 三"),
    ("zh", "default", "\uf900有此理", "岂 有 此 理"),  # a compatibility ideograph is traditional too
    ("zh", "paper", "臺灣！", "台 湾"),
    ("yue", "default", "廣東話", "广 东 话"),
    ("ja", "default", "廣島", "廣 島"),  # zh and yue only
    ("en", "default", "臺灣 colour", "臺灣 color"),
    ("fr", "paper", "廣東 été", "廣東 été"),
]
TABLE = [
    *(("en", "default", False, *row) for row in EN),
    *(("zh", "default", False, *row) for row in ZH),
    *((language, "default", False, *row) for language, *row in OTHERS),
    *((language, "paper", False, *row) for language, *row in PAPER),
    *((language, style, True, *row) for language, style, *row in SIMPLIFIED),
]


@pytest.mark.parametrize("language, style, simplify, text, units", TABLE)
def test_normalize(language, style, simplify, text, units):
    assert evaluation.normalize(text, language, style, simplify) == units.split(" ") * bool(units)


def test_language_of():
    """What the line says, else what the script decides; control tokens have no script."""
    language_of = evaluation.language_of
    texts = {"hello": None, "㐀": "zh", "<|im_end|>ภา": "th"}
    assert {text: language_of({"text": text, "language": None}) for text in texts} == texts
    spellings = {"en": "en", "zh-CN": "zh", "zh-HK": "yue", "Chinese": "zh"}
    assert {name: language_of({"text": "好", "language": name}) for name in spellings} == spellings
    with pytest.raises(InputError, match="language 'cn' is not known"):
        language_of({"text": "你好", "language": "cn"})


@pytest.mark.skipif(
    not (DATA / "aishell_sample").is_dir(), reason=f"no {DATA}/aishell_sample; set ASR_OPD_DATA"
)
def test_recorded_texts_in_other_forms_are_no_errors():
    """Blanks, full stops, zero-width characters, another case, and the forms of Taiwan and Hong Kong."""
    lines = (DATA / "aishell_sample" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    for text in texts:
        units = evaluation.normalize(text, "zh")
        assert evaluation.normalize("，" + " ".join(text.upper()) + "\u200b。", "zh") == units
    for form in ("s2t", "s2tw", "s2hk"):
        converter = opencc.OpenCC(form)
        for text in texts:
            assert evaluation.simplified(converter.convert(text)) == evaluation.simplified(text)


# ----------------------------------------------------------------------------------------------------------
# Errors
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "language, reference, hypothesis, substitutions, deletions, insertions, units",
    [
        ("en", "The cat, sat!", "the  CAT sat.", 0, 0, 0, 3),  # both sides are normalised
        ("en", "big cat sat on the mat today", "so big bat sat on mat today", 1, 1, 1, 7),
        ("en", "the cat sat", "", 0, 3, 0, 3),
        ("en", "", "hello there you", 0, 0, 3, 0),
        ("en", "um", "hello there", 0, 0, 2, 0),  # empty after normalisation
        ("en", "don't go", "don`t go", 0, 0, 0, 3),
        ("tr", "İzmir ISPARTA", "izmir ısparta", 0, 0, 0, 2),
        ("zh", "今天，天气很好。", "今天 天汽 很好", 1, 0, 0, 6),
        ("zh", "。", "好的" + FAMILY, 0, 0, 2, 0),
        ("zh", "❤\ufe0f", "", 0, 0, 0, 0),
        ("ja", "カナ", "かな", 2, 0, 0, 2),
        ("ko", "한국어 문장", "한국 문장", 0, 1, 0, 5),
        ("bo", "བོད་སྐད།", "བོད་སྐ", 0, 1, 0, 6),
        (None, "guten Tag", "Guten Tag!", 0, 0, 0, 2),
    ],
)
def test_count_errors_by_hand(language, reference, hypothesis, substitutions, deletions, insertions, units):
    assert evaluation.count_errors(reference, hypothesis, language) == {
        "errors": substitutions + deletions + insertions,
        "units": units,
        "substitutions": substitutions,
        "deletions": deletions,
        "insertions": insertions,
    }


def test_looping():
    for text in (
        "",
        "a",
        "好",
        "the old man made a sign in the affirmative",
        "今天天气很好我们去公园吧",
        "no no no",
    ):
        assert evaluation.looping(text) is False
    for text in ("the cat " * 30, "谢谢" * 30, "a" * 200):
        assert evaluation.looping(text) is True
    for n in range(1, 60):  # UTF-8 bytes are counted, not characters
        text = "好吧" * n
        assert evaluation.looping(text) == (6 * n / len(zlib.compress(text.encode())) > 2.4)


# ----------------------------------------------------------------------------------------------------------
# Summaries
# ----------------------------------------------------------------------------------------------------------


def scored_line(language="en", text="x", errors=0, units=1, **changed):
    counts = {"substitutions": 0, "deletions": 0, "insertions": 0, "errors": errors, "units": units}
    return {
        "language": language,
        "text": text,
        "hyp": "x",
        "stopped": True,
        "duration": 36.0,
        **counts,
        **changed,
    }


def one_cluster(lines):
    return [("speaker", "a")] * len(lines)


def test_summary_is_errors_over_units_not_a_mean_of_rates():
    """1/1 and 1/9 and 2 words invented on silence: 4/10, not the mean of 100 % and 11 %."""
    lines = [
        scored_line(errors=1, units=1, substitutions=1),
        scored_line(errors=1, units=9, deletions=1, stopped=False),
        scored_line(text="", hyp="oh well", errors=2, units=0, insertions=2),
        {"hyp": "", "stopped": False, "duration": 72.0, "language": "en"},
        {"error": "is damaged", "duration": 3600.0, "language": "en", "text": "x"},
    ]
    summary = evaluation.summarize(lines, one_cluster(lines), seconds=18.0)
    keys = (
        "metric",
        "value",
        "errors",
        "units",
        "n",
        "scored",
        "failed",
        "empty",
        "capped",
        "low",
        "hours",
        "rtf",
    )
    expected = ["WER", 40, 4, 10, 5, 3, 1, 1, 2, None, pytest.approx(0.05), pytest.approx(0.1)]
    assert [summary[key] for key in keys] == expected


@pytest.mark.parametrize(
    "languages, metric",
    [("en de", "WER"), ("zh yue ja ko th lo my km bo", "CER"), ("en zh", "MER"), ("", "WER")],
)
def test_metric_name_follows_the_languages(languages, metric):
    lines = [scored_line(language) for language in languages.split()]
    assert evaluation.summarize(lines, one_cluster(lines))["metric"] == metric


def test_lines_without_a_language_are_counted_and_said(capsys):
    """Whisper's English normaliser is for English only: it drops accents."""
    lines = [scored_line(None, "é"), scored_line(None, "b"), scored_line(None, "好"), scored_line("fr", "é")]
    summary = evaluation.summarize(lines, [("speaker", i) for i in range(4)])
    assert [summary[key] for key in ("no_language", "normalizer", "metric")] == [2, "words/2, zh/1", "MER"]
    evaluation.print_summaries({"test": summary})
    said = "test: 2 line(s) with neither a language nor a script that decides one, scored as plain words"
    assert said in capsys.readouterr().out.splitlines()


# ----------------------------------------------------------------------------------------------------------
# Clusters
# ----------------------------------------------------------------------------------------------------------


def clips_with(*fields):
    clips = []
    for i, changed in enumerate(fields):
        line = {"audio": f"{i}.wav", **changed}
        clips.append(Clip(f"/d/{line['audio']}", 1.0, f"m.jsonl:{i + 1}", line, offset=line.get("offset")))
    return clips


CLUSTERS = {
    "speaker": (
        None,
        [{"speaker": "a", "recording": "r"}, {"speaker": 5}],
        [("speaker", "a"), ("speaker", "5")],
    ),
    "recording": (
        None,
        [{"recording": "r"}, {"recording": "r", "speaker": ""}, {"speaker": None}],
        [("recording", "r")] * 2 + [("audio+offset", ("/d/2.wav", None))],
    ),
    "file": (
        None,
        [{"audio": "x.wav"}, {"audio": "x.wav", "begin_time": 1.0}],
        [("audio+offset", ("/d/x.wav", None))] * 2,
    ),
    "tar": (
        None,
        [{"audio": "x.tar", "offset": 512}, {"audio": "x.tar", "offset": 1024}],
        [("audio+offset", ("/d/x.tar", 512)), ("audio+offset", ("/d/x.tar", 1024))],
    ),
    "key": ("room", [{"speaker": "a", "room": 1}, {"room": "1"}], [("room", "1")] * 2),
    "file by key": ("audio+offset", [{"speaker": "a"}], [("audio+offset", ("/d/0.wav", None))]),
}


@pytest.mark.parametrize("key, fields, clusters", CLUSTERS.values(), ids=CLUSTERS)
def test_clusters(key, fields, clusters):
    assert evaluation.clusters_of(clips_with(*fields), key) == clusters


def test_a_line_without_the_key_of_the_others_is_refused():
    speakers = [{"speaker": "a"}, {"speaker": "b"}, {}, {"speaker": None}]
    with pytest.raises(InputError, match=r'^m\.jsonl:3: no "speaker", which intervals are clustered by'):
        evaluation.clusters_of(clips_with(*speakers))
    with pytest.raises(InputError, match=r'^m\.jsonl:1: no "room".*--cluster'):
        evaluation.clusters_of(clips_with(*speakers), "room")


# ----------------------------------------------------------------------------------------------------------
# The jackknife, against scoring everything again without each cluster
#
# A row is (set, cluster, clip, errors of A, errors of B, units).
# ----------------------------------------------------------------------------------------------------------


def random_rows(sets=("x", "y", "z"), n_speakers=7, n_clips=60, seed=0):
    """Rows whose speakers differ in their rates, and of which some are in one set only."""
    rng = np.random.default_rng(seed)
    rates = rng.beta(2, 4, n_speakers)
    rows = []
    for s, name in enumerate(sets):
        for i in range(n_clips):
            speaker = int(rng.integers(s, n_speakers))
            units = int(rng.integers(0, 13))
            errors_a, errors_b = rng.binomial(units, [rates[speaker], 0.8 * rates[speaker]]).tolist()
            rows.append((name, f"s{speaker}", i, errors_a, errors_b, units))
    return rows


def rate_of(rows):
    return 100 * sum(row[3] for row in rows) / sum(row[5] for row in rows)


def difference_of(rows):
    return 100 * (sum(row[4] for row in rows) - sum(row[3] for row in rows)) / sum(row[5] for row in rows)


def macro_of(rows):
    logs = []
    for name in {row[0] for row in rows}:
        own = [row for row in rows if row[0] == name]
        logs.append(math.log(sum(row[4] for row in own) / sum(row[3] for row in own)))
    return math.fsum(logs) / len(logs)


def by_speaker(row):
    return row[1]


def by_clip(row):
    return row[0], row[2]


def brute_force(rows, statistic, cluster=by_speaker):
    """(value, SE, low, high, p) of a statistic of rows."""
    clusters = {cluster(row) for row in rows}
    n = len(clusters)
    value = statistic(rows)
    squares = []
    for name in clusters:
        squares.append((statistic([row for row in rows if cluster(row) != name]) - value) ** 2)
    se = math.sqrt((n - 1) / n * math.fsum(squares))
    half = scipy.stats.t.ppf(0.975, n - 1) * se
    return value, se, value - half, value + half, 2 * scipy.stats.t.sf(abs(value) / se, n - 1)


def relative(log_value):
    return 100 * (math.exp(log_value) - 1)


def effective_of(rows):
    units = {}
    for row in rows:
        units[row[1]] = units.get(row[1], 0) + row[5]
    return sum(units.values()) ** 2 / sum(n**2 for n in units.values())


def sign_flip_of(rows):
    """Exact p of Σ over sets of (E_B − E_A) / N, by all signs."""
    units = {}
    for row in rows:
        units[row[0]] = units.get(row[0], 0) + row[5]
    sums = {}
    for row in rows:
        sums[row[1]] = sums.get(row[1], 0) + Fraction(row[4] - row[3], units[row[0]])
    observed = abs(sum(sums.values()))
    outcomes = []
    for signs in itertools.product((-1, 1), repeat=len(sums)):
        outcomes.append(abs(sum(sign * d for sign, d in zip(signs, sums.values()))) >= observed)
    return sum(outcomes) / len(outcomes)


def assert_figures(figures, expected):
    """The same keys in the same order, numbers to nine places and all else exactly."""
    assert list(figures) == list(expected)
    for key, value in expected.items():
        is_number = isinstance(value, float) or (isinstance(value, list) and isinstance(value[0], float))
        assert figures[key] == (pytest.approx(value, rel=1e-9) if is_number else value), key


WORDS = "anna bert carl dora emil fritz gerd hans ida jan kurt lena".split()


def result_line(i, errors=0, units=10, **changed):
    """A result line of clip i: the first `errors` of `units` German words are missing."""
    line = {"audio": f"{i}.wav", "duration": 36.0, "text": " ".join(WORDS[:units]), "language": "de"}
    counts = {"errors": errors, "units": units, "substitutions": 0, "deletions": errors, "insertions": 0}
    return {**line, "hyp": " ".join(WORDS[errors:units]), "stopped": True, **counts, **changed}


def failed_line(i):
    return {"audio": f"{i}.wav", "duration": 36.0, "text": "anna", "language": "de", "error": "is damaged"}


def write_lines(path, lines):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def write_rows(folder, rows, column):
    """Result files of a folder, one for each set of rows, with the errors of that column."""
    for name in sorted({row[0] for row in rows}):
        lines = []
        for row in rows:
            if row[0] == name:
                audio = f"/clips/{name}-{row[2]}.wav"
                lines.append(result_line(0, row[column], row[-1], audio=audio, speaker=row[1]))
        write_lines(folder / f"{name}.jsonl", lines)
    return str(folder)


def write_pair(folder, rows):
    return write_rows(folder / "a", rows, 3), write_rows(folder / "b", rows, 4)


def run(*argv):
    return evaluation.main(evaluation.parse_args([str(argument) for argument in argv]))


def test_jackknife_by_hand():
    """Two clusters of 10 units with 1 and 3 errors: θ = 20, without one 30 or 10, so SE² = ½ (100 + 100)."""
    table = np.array([[[1, 10]], [[3, 10]]], dtype=float)
    value, se = evaluation.jackknife(table, evaluation.rate)
    assert (value, se) == pytest.approx((20, 10), rel=1e-12)
    t = math.tan(math.pi * 0.475)  # the quantile of Cauchy's distribution, which is t with one degree
    assert evaluation.t_interval(value, se, 1) == pytest.approx((20 - 10 * t, 20 + 10 * t), rel=1e-9)
    assert evaluation.t_test(value, se, 1) == pytest.approx(1 - 2 * math.atan(2) / math.pi, rel=1e-12)


def test_leading_dimensions_are_many_tables():
    tables = np.random.default_rng(3).integers(1, 50, (2, 4, 6, 3, 3)).astype(float)
    value, se = evaluation.jackknife(tables, evaluation.log_ratio)
    p = evaluation.t_test(value, se, 5)
    for index in np.ndindex(2, 4):
        one = evaluation.estimate(tables[index], evaluation.log_ratio)
        assert (value[index], se[index], p[index]) == pytest.approx((one.value, one.se, one.p), rel=1e-12)


def test_summary_against_brute_force():
    rows = random_rows(("x",))
    lines = [scored_line(errors=row[3], units=row[5]) for row in rows]
    clusters = [("speaker", row[1]) for row in rows]
    summary = evaluation.summarize(lines, clusters)
    value, se, low, high, _ = brute_force(rows, rate_of)
    _, se_by_clip, *_ = brute_force(rows, rate_of, by_clip)
    assert (summary["value"], summary["low"], summary["high"]) == pytest.approx((value, low, high), rel=1e-10)
    assert (summary["clusters"], summary["cluster_key"], summary["reason"]) == (7, "speaker", None)
    assert summary["effective_clusters"] == pytest.approx(effective_of(rows), rel=1e-12)
    assert summary["design_effect"] == pytest.approx((se / se_by_clip) ** 2, rel=1e-9)


def test_clips_without_text_or_hypothesis_are_no_clusters():
    lines = [scored_line(errors=1, units=4), {"hyp": "x", "stopped": True, "duration": 1.0}, failed_line(0)]
    clusters = [("speaker", name) for name in "abc"]
    summary = evaluation.summarize(lines, clusters)
    assert (summary["clusters"], summary["low"], summary["effective_clusters"]) == (1, None, 1)
    assert summary["reason"] == "one cluster gives neither interval nor p"
    nothing = evaluation.summarize(lines[1:], clusters[1:])
    keys = ("value", "low", "clusters", "effective_clusters", "design_effect", "cluster_key", "reason")
    assert [nothing[key] for key in keys] == [None, None, 0, None, None, None, None]


def test_comparison_against_brute_force(tmp_path):
    """Every figure of three sets that share speakers, and of their macro."""
    rows = random_rows()
    comparison = evaluation.compare_folders(*write_pair(tmp_path, rows))
    assert list(comparison) == ["sets", "macro"] and list(comparison["sets"]) == ["x", "y", "z"]
    p_values = []
    for name, figures in comparison["sets"].items():
        own = [row for row in rows if row[0] == name]
        value, se, low, high, p = brute_force(own, difference_of)
        change, _, change_low, change_high, _ = brute_force(own, macro_of)
        _, se_by_clip, *_ = brute_force(own, difference_of, by_clip)
        n_clusters = len({row[1] for row in own})
        p_values.append(p)
        expected = {
            "metric": "WER",
            "n": 60,
            "a": rate_of(own),
            "b": rate_of(own) + value,
            "difference": value,
            "low": low,
            "high": high,
            "p": p,
            "relative": relative(change),
            "relative_low": relative(change_low),
            "relative_high": relative(change_high),
            "clusters": n_clusters,
            "effective_clusters": effective_of(own),
            "design_effect": (se / se_by_clip) ** 2,
            "cluster_key": "speaker",
            "sign_flip": sign_flip_of(own),
            "sign_flip_floor": 2 / 2**n_clusters,
            "holm": figures["holm"],
            "reason": None,
        }
        assert_figures(figures, expected)
    assert [len({row[1] for row in rows if row[0] == name}) for name in "xyz"] == [7, 6, 5]

    smallest, middle, largest = sorted(p_values)
    adjusted = [3 * smallest, max(3 * smallest, 2 * middle)]
    adjusted.append(max(adjusted[1], largest))
    holm = sorted(figures["holm"] for figures in comparison["sets"].values())
    assert holm == pytest.approx([min(1, p) for p in adjusted], rel=1e-9)

    value, se, low, high, p = brute_force(rows, macro_of)
    _, se_by_clip, *_ = brute_force(rows, macro_of, by_clip)
    macro = comparison["macro"]
    rates = [(figures["a"], figures["b"]) for figures in comparison["sets"].values()]
    shares = {}
    for name in "xyz":
        own = [row for row in rows if row[0] == name]
        for row in own:
            shares[row[1]] = shares.get(row[1], 0) + row[5] / sum(r[5] for r in own) / 3
    expected = {
        "stems": ["x", "y", "z"],
        "n": 180,
        "mean_a": sum(a for a, _ in rates) / 3,
        "mean_b": sum(b for _, b in rates) / 3,
        "relative": relative(value),
        "relative_low": relative(low),
        "relative_high": relative(high),
        "p": p,
        "clusters": 7,
        "effective_clusters": 1 / sum(share**2 for share in shares.values()),
        "design_effect": (se / se_by_clip) ** 2,
        "cluster_key": "speaker",
        "sign_flip": sign_flip_of(rows),
        "sign_flip_floor": 2 / 2**7,
        "reason": None,
    }
    assert_figures(macro, expected)


def test_order_of_lines_is_free_and_exchange_flips_the_signs(tmp_path):
    rows = random_rows()
    forth = evaluation.compare_folders(*write_pair(tmp_path, rows))
    shuffled = [rows[i] for i in np.random.default_rng(5).permutation(len(rows))]
    again = evaluation.compare_folders(
        write_rows(tmp_path / "a", rows, 3), write_rows(tmp_path / "shuffled", shuffled, 4)
    )
    assert again == forth  # the order is that of A
    reordered = evaluation.compare_folders(*write_pair(tmp_path, shuffled))
    back = evaluation.compare_folders(str(tmp_path / "b"), str(tmp_path / "a"))
    for name, figures in forth["sets"].items():
        assert_figures(reordered["sets"][name], figures)
        other = back["sets"][name]
        flipped = [-other["difference"], -other["high"], -other["low"], other["p"], other["holm"]]
        keys = ("difference", "low", "high", "p", "holm")
        assert [figures[key] for key in keys] == pytest.approx(flipped, rel=1e-9)
        for key, opposite in (("relative", "relative"), ("relative_low", "relative_high")):
            assert (1 + figures[key] / 100) * (1 + other[opposite] / 100) == pytest.approx(1, rel=1e-9)
        for key in ("sign_flip", "design_effect", "effective_clusters"):
            assert figures[key] == pytest.approx(other[key], rel=1e-9)


# ---- figures that are not given ----------------------------------------------------------------------------

NOT_GIVEN = {
    "one cluster": ("aa", [4, 2], [2, 1], [10, 10], "one cluster gives neither interval nor p"),
    "no error of A": ("ab", [0, 0], [2, 1], [10, 10], "no relative change: one side has no error"),
    "no error without b": (
        "ab",
        [0, 3],
        [2, 1],
        [10, 10],
        "no relative change: one side has no error without one of the clusters",
    ),
    "the same everywhere": (
        "abc",
        [4] * 3,
        [2] * 3,
        [10] * 3,
        "no p: leaving out any cluster changes nothing",
    ),
    "no difference": ("abc", [4, 1, 2], [4, 1, 2], [10] * 3, None),
    "units in one cluster": (
        "ab",
        [4, 0],
        [2, 0],
        [10, 0],
        "neither interval nor p: one cluster has all reference units; "
        "no relative change: one side has no error without one of the clusters",
    ),
}
GIVEN = {  # difference, low, p; relative, relative_low
    "one cluster": (-15, None, None, -50, None),
    "no error of A": (15, 15 - 5 * 12.7062047, pytest.approx(1 - 2 * math.atan(3) / math.pi), None, None),
    "no error without b": (0, -20 * 12.7062047, 1, None, None),
    "the same everywhere": (-20, -20, None, -50, -50),
    "no difference": (0, 0, 1, 0, 0),
    "units in one cluster": (-20, None, None, None, None),
}


@pytest.mark.parametrize("case", NOT_GIVEN)
def test_figures_that_are_not_given_have_a_reason(tmp_path, capsys, case):
    speakers, errors_a, errors_b, units, reason = NOT_GIVEN[case]
    rows = [("x", s, i, *row) for i, (s, *row) in enumerate(zip(speakers, errors_a, errors_b, units))]
    write_pair(tmp_path, rows)
    paths = [tmp_path / "a" / "x.jsonl", tmp_path / "b" / "x.jsonl"]
    figures = evaluation.pair(evaluation.count_set(list(map(str, paths))))
    keys = ("difference", "low", "p", "relative", "relative_low")
    for key, expected in zip(keys, GIVEN[case]):
        assert figures[key] == (
            pytest.approx(expected, rel=1e-6) if type(expected) in (int, float) else expected
        )
    assert figures["reason"] == reason
    run("--compare", *paths)
    assert (f"x: {reason}" in capsys.readouterr().out.splitlines()) == (reason is not None)


def test_equal_differences_at_unequal_rates_are_no_spread(tmp_path):
    """One error fewer of ten on every clip, however many there are: SE is 0, not the rounding of rates."""
    errors = [1, 9, 2, 8, 1, 7, 10, 3]
    rows = [("x", f"s{i}", i, e, e - 1, 10) for i, e in enumerate(errors)]
    figures = evaluation.compare_folders(*write_pair(tmp_path, rows))["sets"]["x"]
    assert [figures[key] for key in ("difference", "low", "high")] == pytest.approx([-10] * 3)
    assert figures["p"] is None and figures["sign_flip"] == 2 / 2**8


def test_a_set_of_one_cluster_is_not_in_the_macro(tmp_path):
    rows = random_rows(("x", "y"))
    rows += [("alone", "s0", i, 2, 1, 5) for i in range(3)]
    comparison = evaluation.compare_folders(*write_pair(tmp_path, rows))
    without = evaluation.compare_folders(*write_pair(tmp_path / "without", rows[:-3]))
    macro = comparison["macro"]
    assert macro["reason"] == "sets of one cluster are not in it: alone"
    assert macro["stems"] == ["x", "y"] and macro["relative_low"] == without["macro"]["relative_low"]
    assert macro["mean_a"] == pytest.approx(sum(s["a"] for s in comparison["sets"].values()) / 3)
    assert comparison["sets"]["alone"]["relative"] == pytest.approx(-50)
    assert [comparison["sets"][name]["holm"] for name in "xy"] == [
        without["sets"][name]["holm"] for name in "xy"
    ]  # what has no p is no test


def test_macro_is_not_given_where_a_set_has_no_error(tmp_path):
    rows = random_rows(("x",)) + [("perfect", f"s{i}", i, 0, 1, 10) for i in range(3)]
    comparison = evaluation.compare_folders(*write_pair(tmp_path, rows))
    macro = comparison["macro"]
    keys = ("relative", "relative_low", "relative_high", "p", "reason")
    assert [macro[key] for key in keys] == [None] * 4 + ["no relative change: one side has no error"]
    assert comparison["sets"]["perfect"]["difference"] == 10 and macro["clusters"] == 7


# ---- exact p, Holm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 5, 12])
def test_sign_flip_against_enumeration(n):
    differences = np.random.default_rng(n).integers(-9, 12, (3, n))
    for row, p in zip(differences, evaluation.sign_flip(differences / 7)):
        outcomes = []
        for signs in itertools.product((-1, 1), repeat=n):
            outcomes.append(abs(sum(s * d for s, d in zip(signs, row.tolist()))) >= abs(row.sum()))
        assert p == sum(outcomes) / 2**n


def test_sign_flip_is_for_up_to_twelve_clusters(tmp_path):
    assert evaluation.sign_flip(np.full(6, 0.1)) == 2 / 2**6  # its floor
    assert evaluation.sign_flip(np.zeros(3)) == 1
    for n, floor in ((12, 2 / 2**12), (13, None)):
        rows = [("x", f"s{i}", i, 5, 4 - i % 2, 10) for i in range(n)]
        figures = evaluation.compare_folders(*write_pair(tmp_path / str(n), rows))["sets"]["x"]
        assert figures["sign_flip"] == figures["sign_flip_floor"] == floor


def test_holm_by_hand():
    """Sorted .01 .02 .04 .3: times 4, 3, 2, 1 they are .04 .06 .08 .3."""
    assert evaluation.holm([0.04, 0.01, 0.3, 0.02]) == pytest.approx([0.08, 0.04, 0.3, 0.06])
    assert evaluation.holm([0.03, None, 0.02, 0.025]) == pytest.approx([0.06, None, 0.06, 0.06])
    assert evaluation.holm([0.6, 0.7]) == [1, 1] and evaluation.holm([None, 0.2]) == [None, 0.2]
    assert evaluation.holm([]) == []


# ----------------------------------------------------------------------------------------------------------
# --compare
# ----------------------------------------------------------------------------------------------------------


def test_compare_pairs_by_clip_in_any_order_and_folder(tmp_path):
    """One audio file holds two segments, one tar two byte ranges; the files lie in different folders.

    A begin_time of −1 or null is the whole file's; a language may be spelled in two ways.
    """
    clips = [
        {"audio": "0.wav"},
        {"audio": "0.wav", "begin_time": 0.0, "end_time": 2.0},
        {"audio": "0.wav", "begin_time": 2.0, "end_time": 4.0},
        {"audio": "deep/1.wav", "begin_time": None, "end_time": -1},
        {"audio": "0.tar", "offset": 512, "nbytes": 99},
        {"audio": "0.tar", "offset": 2048, "nbytes": 99},
    ]
    a, b = [], []
    for i, (clip, errors_a, errors_b) in enumerate(zip(clips, [1, 3, 0, 9, 4, 2], [2, 1, 0, 7, 5, 0])):
        relative_path = f"../{clip['audio']}"
        a.append(result_line(0, errors_a, **{**clip, "audio": f"../{relative_path}"}))
        path = relative_path if i % 2 else str(tmp_path / clip["audio"])
        b.append(result_line(0, errors_b, language="de-AT", **{**clip, "audio": path}))
    b[3] |= {"begin_time": -1, "end_time": None}
    first = write_lines(tmp_path / "runs" / "a" / "r.jsonl", a)
    second = write_lines(tmp_path / "b" / "r.jsonl", b)
    reverse = write_lines(tmp_path / "c" / "r.jsonl", b[::-1])
    figures = evaluation.pair(evaluation.count_set([first, second]))
    assert figures == evaluation.pair(evaluation.count_set([first, reverse]))
    assert (figures["n"], figures["a"], figures["b"]) == pytest.approx((6, 100 * 19 / 60, 100 * 15 / 60))
    assert (figures["clusters"], figures["cluster_key"]) == (
        4,
        "audio+offset",
    )  # 0.wav, 1.wav, two of the tar


def test_compare_two_files_prints_and_stores_one_pair(tmp_path, capsys):
    rows = [("x", f"s{i}", i, 4, 1 + i % 2, 10) for i in range(4)]
    write_pair(tmp_path, rows)
    paths = [tmp_path / "a" / "x.jsonl", tmp_path / "b" / "x.jsonl"]
    run("--compare", *paths, "--json", tmp_path / "pair.json")
    figures = evaluation.pair(evaluation.count_set(list(map(str, paths))))
    assert json.loads((tmp_path / "pair.json").read_text()) == figures
    low, high = f"{figures['low']:+.2f}", f"{figures['high']:+.2f}"
    change = [f"{figures[key]:+.1f}" for key in ("relative", "relative_low", "relative_high")]
    p = f"{figures['p']:.4f}"
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "set metric clips A % B % B − A 95 % p".split(),
        ["x", "WER", "4", "40.00", "15.00", "-25.00", low, "to", high, p],
        "set clusters by effective design effect sign-flip p floor".split(),
        "x 4 speaker 4.00 1.00 0.1250 0.1250".split(),
        "set metric A % B % change 95 % p".split(),
        ["x", "WER", "40.00", "15.00", change[0], "%", change[1], "to", change[2], "–"],
        "intervals over clusters by speaker: x 4".split(),
        "fewer than 12 effective clusters, so intervals are rough: x 4.0".split(),
    ]


def test_compare_two_folders_prints_and_stores_sets_and_macro(tmp_path, capsys):
    rows = random_rows(("x", "y"), n_speakers=30, n_clips=200)
    folders = write_pair(tmp_path, rows)
    run("--compare", *folders, "--json", tmp_path / "c.json")
    stored = json.loads((tmp_path / "c.json").read_text())
    assert stored == evaluation.compare_folders(*folders)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][-2:] == ["Holm", "p"] and lines[1][-1] == f"{stored['sets']['x']['holm']:.4f}"
    assert [line[0] for line in lines] == "set x y set x y macro set x y macro mean intervals".split()
    macro = stored["macro"]
    change = [f"{macro[key]:+.1f}" for key in ("relative", "relative_low", "relative_high")]
    p = evaluation.p_text(macro["p"])
    assert lines[10] == ["macro", "–", "–", "–", change[0], "%", change[1], "to", change[2], p]
    means = [f"{macro[key]:.2f}" for key in ("mean_a", "mean_b")]
    assert lines[11] == ["mean", "–", *means, "–", "–", "–"]
    assert lines[12] == "intervals over clusters by speaker: x 30, y 29, macro 30".split()

    evaluation.print_comparison(stored, "before", "after")
    header = capsys.readouterr().out.splitlines()[0]
    assert header.split() == "set metric before % after % change 95 % p".split()


def test_compare_by_another_key(tmp_path, capsys):
    lines = [result_line(i, 1 + i % 3, speaker="s", room=i // 2) for i in range(6)]
    paths = [write_lines(tmp_path / f"{name}.jsonl", lines) for name in "ab"]
    run("--compare", *paths, "--cluster", "room", "--json", tmp_path / "c.json")
    stored = json.loads((tmp_path / "c.json").read_text())
    assert (stored["clusters"], stored["cluster_key"], stored["p"]) == (3, "room", 1)
    assert "intervals over clusters by room: a 3" in capsys.readouterr().out.splitlines()


def test_compare_recounts_with_the_normalizer_asked_for(tmp_path, capsys):
    """A writes don't as do not: no error by default, two errors of two units in the paper's style."""
    for name, hyp in (("a", "I do not"), ("b", "i dont")):
        line = result_line(0, text="I don't", hyp=hyp, language="en", errors=1)
        write_lines(tmp_path / f"{name}.jsonl", [line])
    for normalizer, rates in (("default", ["0.00", "66.67"]), ("paper", ["100.00", "0.00"])):
        run("--compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--normalizer", normalizer)
        assert capsys.readouterr().out.splitlines()[1].split()[3:5] == rates


UNPAIRED = {
    "only in A": (
        [0, 1, 77],
        [0, 1],
        r"a\.jsonl:3: .*77\.wav is in one of the files only, not in .*b\.jsonl",
    ),
    "only in B": (
        [0, 1],
        [0, 77, 1],
        r"b\.jsonl:2: .*77\.wav is in one of the files only, not in .*a\.jsonl",
    ),
    "twice in A": ([0, 1, 77, 77], [0, 1, 77], r"77\.wav is there twice"),
    "twice in both": ([77, 1, 77], [1, 77, 77], r"77\.wav is there twice"),
    "other text": ([0, 77], [0, result_line(77, text="anna bert")], r"77\.wav has another text"),
    "other language": ([77], [result_line(77, language="en")], r"77\.wav has another language"),
    "other speaker": (
        [result_line(77, speaker="x")],
        [result_line(77, speaker="y")],
        r"77\.wav has another speaker",
    ),
    "failed in A": ([0, failed_line(77)], [0, result_line(77, text="anna")], r"a\.jsonl:2: 77\.wav was not"),
    "failed in B": (
        [0, 77],
        [0, result_line(77, error="is damaged")],
        r"b\.jsonl:2: 77\.wav was not decoded",
    ),
    "no text": (
        [result_line(77, text=None)],
        [result_line(77, text=None)],
        r"77\.wav was not decoded, or has",
    ),
    "no hyp": ([77], [{"audio": "77.wav", "duration": 36.0}], r"b\.jsonl:1: neither"),
    "other bytes": (
        [0, result_line(77, offset=0, nbytes=10)],
        [0, result_line(77, offset=10, nbytes=10)],
        r"77\.wav is in one",
    ),
    "unknown language": ([77], [result_line(77, language="cn")], r"b\.jsonl:1: language 'cn' is not known"),
    "nothing to say": ([result_line(77, text="")], [result_line(77, text="")], "no reference has a unit"),
    "no speaker": ([result_line(0, speaker="a"), 77], [0, 77], r'a\.jsonl:2: no "speaker"'),
}


@pytest.mark.parametrize("a, b, message", UNPAIRED.values(), ids=UNPAIRED)
def test_compare_refuses_what_is_no_pair_and_names_the_clip(tmp_path, capsys, a, b, message):
    paths = []
    for name, lines in (("a", a), ("b", b)):
        lines = [result_line(line) if isinstance(line, int) else line for line in lines]
        paths.append(write_lines(tmp_path / f"{name}.jsonl", lines))
    with pytest.raises(InputError, match=message):
        run("--compare", *paths, "--json", tmp_path / "c.json")
    assert capsys.readouterr().out == "" and not (tmp_path / "c.json").exists()


def test_compare_refuses_folders_that_do_not_hold_the_same_files(tmp_path):
    for name in ("a/x", "a/y", "b/x"):
        write_lines(tmp_path / f"{name}.jsonl", [result_line(0)])
    (tmp_path / "empty").mkdir()
    for other, message in (
        ("b", r"^y\.jsonl is in one of .*/a and .*/b only"),
        ("empty", "empty: holds no result file"),
        ("a/x.jsonl", "one is a folder, the other is not"),
    ):
        with pytest.raises(InputError, match=message):
            run("--compare", tmp_path / "a", tmp_path / other)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        evaluation.compare_folders(str(tmp_path / "a"), str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="--json .*: no such folder"):
        run("--compare", tmp_path / "a", tmp_path / "a", "--json", tmp_path / "nowhere" / "c.json")


def test_what_cannot_be_compared_is_left_out_and_named_where_that_is_asked_for(tmp_path, capsys):
    """x lacks one clip on each side, y is in one folder only, z has no text, w other texts."""
    a, b = tmp_path / "a", tmp_path / "b"
    lines = [result_line(f"../{i}", 2 + i) for i in range(3)]
    third, fourth = (result_line(f"../{i}", text="anna") for i in (3, 4))
    write_lines(a / "x.jsonl", [*lines, failed_line("../3"), fourth])
    write_lines(b / "x.jsonl", [*lines, third, failed_line("../4")])
    write_lines(a / "y.jsonl", lines)
    for folder, text in ((a, "anna"), (b, "bert")):
        write_lines(folder / "z.jsonl", [result_line("../0", text=None)])
        write_lines(folder / "w.jsonl", [result_line("../0", text=text)])
    comparison = evaluation.compare_folders(str(a), str(b), strict=False)
    assert list(comparison["sets"]) == ["x"] and comparison["sets"]["x"]["n"] == 3
    assert comparison["sets"]["x"]["p"] == 1 and comparison["macro"]["stems"] == ["x"]
    left_out = comparison["left_out"]
    assert sorted(left_out) == ["w", "x", "y", "z"]
    assert left_out["x"] == "2 clip(s) that one side could not score"
    assert "is in one of" in left_out["y"] and "no reference has a unit" in left_out["z"]
    assert "0.wav has another text" in left_out["w"]
    evaluation.print_comparison(comparison, "before", "after")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[:2]] == ["set", "x"]
    assert sorted(printed[-4:]) == [f"{stem}: left out: {left_out[stem]}" for stem in "wxyz"]

    nothing = {"sets": {}, "macro": evaluation.macro_figures({}, {}), "left_out": {"z": "no text"}}
    evaluation.print_comparison(nothing)
    assert capsys.readouterr().out == "z: left out: no text\n"


# ----------------------------------------------------------------------------------------------------------
# --seeds
# ----------------------------------------------------------------------------------------------------------


def write_run(folder, seed, rows, column, step=10):
    write_rows(folder / f"eval-{step}", rows, column)
    (folder / "config.json").write_text(json.dumps({"args": {"seed": seed}}))
    return str(folder)


def rows_of_runs(n_runs, sets=("x", "y"), n_speakers=6, seed=1):
    """Rows (set, cluster, clip, errors of each run …, units); later runs are better."""
    rng = np.random.default_rng(seed)
    skill = rng.uniform(0.2, 0.5, n_speakers)
    rows = []
    for name in sets:
        for i in range(40):
            units = int(rng.integers(4, 13))
            p = skill[i % n_speakers] * np.linspace(1.2, 0.7, n_runs)
            rows.append((name, f"s{i % n_speakers}", i, *rng.binomial(units, p).tolist(), units))
    return rows


@pytest.fixture
def runs(tmp_path):
    """Folders of six runs: seeds 0, 1, 2 of recipe A, then seeds 1, 2, 0 of recipe B; and the rows."""
    rows = rows_of_runs(6)
    folders = []
    for i, seed in enumerate((0, 1, 2, 1, 2, 0)):
        folders.append(write_run(tmp_path / f"r{i}", seed, rows, 3 + i))
    return folders, rows


def rates_by_hand(rows, columns):
    units = sum(row[-1] for row in rows)
    return [100 * sum(row[c] for row in rows) / units for c in columns]


def logs_by_hand(rows, columns):
    logs = []
    for c in columns:
        of_sets = []
        for name in {row[0] for row in rows}:
            of_sets.append(math.log(sum(row[c] for row in rows if row[0] == name)))
        logs.append(sum(of_sets) / len(of_sets))
    return logs


def seeds_by_hand(rows, values_of, columns_a, columns_b, is_paired):
    """What `seed_figures` returns, from one function (rows, columns) → a value for each run."""

    def mean_difference(some_rows):
        b, a = values_of(some_rows, columns_b), values_of(some_rows, columns_a)
        return sum(b) / len(b) - sum(a) / len(a)

    a, b = values_of(rows, columns_a), values_of(rows, columns_b)
    value, se, low, high, _ = brute_force(rows, mean_difference)
    v_cluster = se**2
    if is_paired:
        deltas = [y - x for x, y in zip(a, b)]
        seed_square = statistics.variance(deltas)
        v_seed = seed_square / len(deltas)
        seed_part = v_seed**2 / (len(deltas) - 1)
    else:
        deltas = None
        seed_square = statistics.variance(a) + statistics.variance(b)
        v_a, v_b = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
        v_seed = v_a + v_b
        seed_part = v_a**2 / (len(a) - 1) + v_b**2 / (len(b) - 1)
    v = v_seed + v_cluster
    n_clusters = len({row[1] for row in rows})
    df = v**2 / (seed_part + v_cluster**2 / (n_clusters - 1))
    half = scipy.stats.t.ppf(0.975, df) * math.sqrt(v)
    return {
        "value": value,
        "per_seed": deltas,
        "seed_sd": math.sqrt(seed_square),
        "cluster_se": se,
        "cluster_low": low,
        "cluster_high": high,
        "total_se": math.sqrt(v),
        "df": df,
        "low": value - half,
        "high": value + half,
        "p": 2 * scipy.stats.t.sf(abs(value) / math.sqrt(v), df),
        "reason": None,
    }


def as_changes(figures):
    """The same figures of logarithms as `relative_figures` gives them."""
    changed = dict(figures)
    for key in ("value", "cluster_low", "cluster_high", "low", "high"):
        changed[key] = relative(figures[key])
    for key in ("seed_sd", "cluster_se", "total_se"):
        changed[key] = 100 * figures[key]
    if figures["per_seed"]:
        changed["per_seed"] = [relative(value) for value in figures["per_seed"]]
    return changed


@pytest.mark.parametrize("is_paired", [True, False])
def test_seeds_against_a_hand_calculation(runs, is_paired):
    """Paired, the runs of B are put in the order of seeds; unpaired, one run of A is left away."""
    folders, rows = runs
    columns_a = [3, 4, 5] if is_paired else [3, 4]
    columns_b = [8, 6, 7] if is_paired else [6, 7, 8]
    c = evaluation.compare_seeds(folders[: len(columns_a)], folders[3:])
    assert (c["paired"], c["reason"]) == (is_paired, None)
    assert c["unpaired_reason"] == (None if is_paired else "the two sides have other seeds")
    assert (c["seeds_a"], c["seeds_b"]) == (([0, 1, 2], [0, 1, 2]) if is_paired else ([0, 1], [1, 2, 0]))
    assert c["folders_a"] == [f"{folder}/eval-10" for folder in folders[: len(columns_a)]]
    for name in "xy":
        own = [row for row in rows if row[0] == name]
        figures = c["sets"][name]
        assert figures["a"] == pytest.approx(rates_by_hand(own, columns_a))
        assert figures["b"] == pytest.approx(rates_by_hand(own, columns_b))
        assert [figures[key] for key in ("metric", "n", "clusters", "cluster_key")] == [
            "WER",
            40,
            6,
            "speaker",
        ]
        expected = seeds_by_hand(own, rates_by_hand, columns_a, columns_b, is_paired)
        assert_figures(figures["difference"], expected)
        changes = as_changes(seeds_by_hand(own, logs_by_hand, columns_a, columns_b, is_paired))
        assert_figures(figures["relative"], changes)
    changes = as_changes(seeds_by_hand(rows, logs_by_hand, columns_a, columns_b, is_paired))
    assert_figures(c["macro"]["relative"], changes)
    assert (c["macro"]["stems"], c["macro"]["clusters"]) == (["x", "y"], 6)


def test_seed_variance_and_df_by_numbers():
    """Δ = 1, 3, 5: s² = 4, so V_seed = 4/3. With V_cluster = 2 of 5 clusters V = 10/3."""
    values = np.array([1.0, 1, 1, 2, 4, 6])
    variance, per_df, sd = evaluation.seed_variance(values, 3, is_paired=True)
    assert (variance, per_df, sd) == pytest.approx((4 / 3, (4 / 3) ** 2 / 2, 2))
    total, df = evaluation.total_variance(variance, per_df, 2.0, 5)
    assert (total, df) == pytest.approx((10 / 3, (100 / 9) / (8 / 9 + 1)))
    # Unpaired: A = 1, 3 has s² = 2, B = 2, 4, 9 has s² = 13.
    variance, per_df, sd = evaluation.seed_variance(np.array([1.0, 3, 2, 4, 9]), 2, is_paired=False)
    assert (variance, per_df, sd) == pytest.approx((1 + 13 / 3, 1 + (13 / 3) ** 2 / 2, math.sqrt(15)))


def test_seeds_print_every_run_and_three_spreads(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders, _ = runs
    run("--seeds", *folders[:3], "--against", *folders[3:], "--json", tmp_path / "s.json")
    lines = capsys.readouterr().out.splitlines()
    c = json.loads((tmp_path / "s.json").read_text())
    assert c == evaluation.compare_seeds(folders[:3], folders[3:])
    assert lines[0] == "paired by seed: 0, 1, 2"
    assert lines.pop(1) == "A: r0/eval-10 (seed 0), r1/eval-10 (seed 1), r2/eval-10 (seed 2)"
    assert lines.pop(1) == "B: r5/eval-10 (seed 0), r3/eval-10 (seed 1), r4/eval-10 (seed 2)"
    assert lines[1].split() == "set figure seed 0 seed 1 seed 2".split()
    assert lines[2].split() == ["x", "A", "%", *(f"{value:.2f}" for value in c["sets"]["x"]["a"])]
    macro = c["macro"]["relative"]
    assert lines[10].split() == ["macro", "change", "%", *(f"{value:.2f}" for value in macro["per_seed"])]
    header = "set B − A in mean cluster SE 95 % cluster seed sd 95 % total df p Holm p"
    assert lines[11].split() == header.split()
    p_values = [figures["difference"]["p"] for figures in c["sets"].values()]
    adjusted = [figures["holm"] for figures in c["sets"].values()]
    assert adjusted == evaluation.holm(p_values) != p_values
    shown = [evaluation.p_text(p_values[0]), evaluation.p_text(adjusted[0])]
    assert lines[12].split()[:2] == ["x", "points"] and lines[12].split()[-2:] == shown
    cells = [f"{macro['value']:+.1f}", f"{macro['cluster_se']:.1f}"]
    cells += [
        f"{macro['cluster_low']:+.1f}",
        "to",
        f"{macro['cluster_high']:+.1f}",
        f"{macro['seed_sd']:.1f}",
    ]
    cells += [f"{macro['low']:+.1f}", "to", f"{macro['high']:+.1f}", f"{macro['df']:.1f}"]
    assert lines[16].split() == ["macro", "change", "%", *cells, evaluation.p_text(macro["p"]), "–"]
    assert [line.split(":")[0] for line in lines[17:20]] == ["cluster", "seed sd", "total, df, p"]

    os.remove("r4/config.json")
    run("--seeds", *folders[:2], "--against", folders[3], "r4/eval-10", folders[5])
    lines = capsys.readouterr().out.splitlines()
    reason = "not every run has a config.json that names its seed"
    assert lines[0] == f"unpaired, 2 and 3 runs: {reason}"
    assert lines.pop(1) == "A: r0/eval-10 (seed 0), r1/eval-10 (seed 1)"
    assert lines.pop(1) == "B: r3/eval-10 (seed 1), r4/eval-10, r5/eval-10 (seed 0)"
    assert lines[1].split() == "set figure run 1 run 2 run 3".split()
    assert lines[2].split()[-1] == "–" and lines[4].split()[:2] == ["y", "A"]


def test_one_run_a_side_has_no_seed_column(runs, capsys):
    folders, rows = runs
    run("--seeds", folders[0], "--against", folders[5])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "paired by seed: 0"
    assert "set B − A in mean cluster SE 95 % cluster".split() in [line.split() for line in lines]
    assert "one run on a side: no seed column and no total" in lines
    c = evaluation.compare_seeds([folders[0]], [folders[5]])
    counted = evaluation.compare_folders(f"{folders[0]}/eval-10", f"{folders[5]}/eval-10")
    figures = c["sets"]["x"]["difference"]
    pair = counted["sets"]["x"]
    assert (figures["cluster_low"], figures["cluster_high"]) == pytest.approx((pair["low"], pair["high"]))
    keys = ("seed_sd", "total_se", "df", "low", "high", "p")
    assert [figures[key] for key in keys] == [None] * 6
    macro = c["macro"]["relative"]
    assert macro["cluster_low"] == pytest.approx(counted["macro"]["relative_low"])


def test_seeds_without_errors_or_with_one_cluster_have_reasons(tmp_path, capsys):
    rows = [("x", "s0", i, 2, 3, 1, 0, 10) for i in range(3)] + [
        ("y", f"s{i}", i, 2, 3, 1, 1, 10) for i in range(3)
    ]
    folders = [write_run(tmp_path / str(i), i % 2, rows, 3 + i) for i in range(4)]
    run("--seeds", *folders[:2], "--against", *folders[2:], "--json", tmp_path / "s.json")
    c = json.loads((tmp_path / "s.json").read_text())
    assert c["sets"]["x"]["relative"]["value"] is None and c["macro"]["stems"] == ["y"]
    points = c["sets"]["x"]["difference"]
    assert points["value"] == pytest.approx(-20) and points["seed_sd"] == pytest.approx(math.sqrt(200))
    assert points["total_se"] is None
    # In y all clusters agree, so the spread is that of seeds: Δ = −10, −20, V = 50/2, df = 1.
    points = c["sets"]["y"]["difference"]
    assert (points["cluster_se"], points["total_se"], points["df"]) == pytest.approx((0, 5, 1))
    assert points["reason"] is None and points["p"] == pytest.approx(1 - 2 * math.atan(3) / math.pi)
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "x, points: one cluster gives neither interval nor p",
        "x, change %: no relative change: one side has no error",
        "macro: sets of one cluster are not in it: x",
    ]


def test_seeds_that_all_agree(tmp_path):
    """No spread at all: p is 1 for no difference, and there is none for another."""
    rows = [("x", f"s{i}", i, 2, 2, 2, 2, 10) for i in range(3)]
    rows += [("y", f"s{i}", i, 4, 4, 2, 2, 10) for i in range(3)]
    folders = [write_run(tmp_path / str(i), i % 2, rows, 3 + i) for i in range(4)]
    c = evaluation.compare_seeds(folders[:2], folders[2:])
    same, better = (c["sets"][name]["difference"] for name in "xy")
    assert (same["low"], same["high"], same["p"], same["reason"]) == (0, 0, 1, None)
    assert (better["low"], better["high"], better["p"]) == (-20, -20, None)
    assert better["reason"] == "no p: leaving out any cluster changes nothing"


def test_evaluation_of_a_run(tmp_path):
    """A run folder means its newest evaluation, by number; another folder itself, with its parent's seed."""
    rows = rows_of_runs(1, ("x",))
    for step in (9, 10):
        write_run(tmp_path / "run", 7, rows, 3, step)
    (tmp_path / "run" / "eval-notes").mkdir()
    newest = str(tmp_path / "run" / "eval-10")
    assert evaluation.evaluation_of(str(tmp_path / "run") + "/") == (newest, 7)
    assert evaluation.evaluation_of(f"{tmp_path}/run/eval-9") == (f"{tmp_path}/run/eval-9", 7)
    bare = write_rows(tmp_path / "elsewhere" / "results", rows, 3)
    assert evaluation.evaluation_of(bare) == (bare, None)
    (tmp_path / "untested").mkdir()
    (tmp_path / "untested" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"untested: this run has no evaluation \(eval-N\)"):
        evaluation.evaluation_of(str(tmp_path / "untested"))


def test_why_runs_are_not_paired():
    assert evaluation.why_unpaired([2, 1], [1, 2]) is None
    assert evaluation.why_unpaired([1], [None]) == "not every run has a config.json that names its seed"
    assert evaluation.why_unpaired([1, 1], [1, 1]) == "one side has a seed twice"
    assert evaluation.why_unpaired([1, 2], [1, 3]) == "the two sides have other seeds"


def test_seeds_refuse_a_run_twice_and_other_sets(runs, tmp_path):
    folders, rows = runs
    with pytest.raises(InputError, match="r0/eval-10 is given twice"):
        run("--seeds", folders[0], f"{folders[0]}/eval-10", "--against", folders[3])
    os.rename(f"{folders[3]}/eval-10/y.jsonl", f"{folders[3]}/eval-10/z.jsonl")
    with pytest.raises(InputError, match=r"^y\.jsonl is in one of .*/r0/eval-10 and .*/r3/eval-10 only"):
        run("--seeds", folders[0], "--against", folders[3])


# ----------------------------------------------------------------------------------------------------------
# Coverage by simulation; `python tests/coverage.py` has the whole grid
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_speakers, has_speaker_effect, is_balanced", SETTINGS)
def test_intervals_cover_the_truth(n_speakers, has_speaker_effect, is_balanced):
    """Nominal 95 % is 90 % or more, and a null pair is rejected in 3 to 8 %. Six unequal speakers that differ
    are at the edge: 89.9 % of a rate, and 8.8 % of null pairs by the relative change.
    """
    shares = simulate_pairs(n_speakers, has_speaker_effect, is_balanced)
    is_hardest = n_speakers == 6 and has_speaker_effect and not is_balanced
    assert min(shares["difference"], shares["change"]) >= 0.90
    assert shares["rate"] >= (0.89 if is_hardest else 0.90)
    assert 0.03 <= shares["null difference"] <= 0.08
    assert 0.03 <= shares["null change"] <= (0.09 if is_hardest else 0.08)
    if n_speakers <= 12:
        assert 0.01 <= shares["null sign-flip"] <= 0.06  # six speakers: at most 2/64


@pytest.mark.parametrize("is_paired", [True, False])
def test_total_interval_covers_where_either_spread_alone_does_not(is_paired):
    shares = simulate_seeds(3, 40, 0.2, is_paired)
    assert 0.90 <= shares["total"] <= 0.99 and shares["speakers alone"] < 0.5
    shares = simulate_seeds(3, 12, 0.0, is_paired)
    assert 0.90 <= shares["total"] <= 0.995


# ----------------------------------------------------------------------------------------------------------
# --score
# ----------------------------------------------------------------------------------------------------------


def summaries_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_score_recounts_and_sums_up(tmp_path, capsys):
    """Lines of every kind. The counts they carry are not those of their texts: they must not be believed."""
    lines = [
        result_line(0, 2) | {"errors": 99, "units": 1, "deletions": 99},
        result_line(1, text="anna", hyp="anna " * 59 + "anna", stopped=False),
        result_line(2, text="", hyp="bert carl"),
        result_line(3, text=None, hyp="", duration=72.0),
        result_line(4, text="anna bert", hyp=""),
        result_line(5, duration=3600.0, error="is damaged"),  # failed, whatever hyp says
        result_line(6, text="好的", hyp="好", language="zh"),
        result_line(7, text="Don't", hyp="do not", language="en"),
    ]
    path = write_lines(tmp_path / "in" / "mixed.jsonl", lines)
    before = open(path, "rb").read()
    with pytest.raises(SystemExit) as stop:
        run("--score", path, "--out", tmp_path / "out", "--json", tmp_path / "s.json")
    assert stop.value.code == 1  # a clip was not decoded
    assert os.listdir(tmp_path / "out") == ["summary.json"] and open(path, "rb").read() == before
    assert json.loads((tmp_path / "s.json").read_text()) == summaries_of(tmp_path / "out")
    # errors: 2 deletions, 59 insertions, 2 on silence, 2 deletions, 1 deletion, none
    counts = zip([2, 59, 2, 2, 1, 0], [10, 1, 0, 2, 2, 2])
    _, _, low, high, _ = brute_force([("", i, i, e, e, n) for i, (e, n) in enumerate(counts)], rate_of)
    summary = summaries_of(tmp_path / "out")["mixed"]
    figures = {"metric": "MER", "value": 100 * 66 / 17, "errors": 66, "units": 17, "low": low, "high": high}
    kinds = {
        "substitutions": 0,
        "deletions": 5,
        "insertions": 61,
        "no_language": 0,
        "hours": 0.08,
        "rtf": None,
    }
    clips = {"n": 8, "scored": 6, "failed": 1, "empty": 2, "looping": 1, "capped": 1}
    clusters = {"clusters": 6, "effective_clusters": 17**2 / (100 + 1 + 4 + 4 + 4), "design_effect": 1}
    clusters |= {"cluster_key": "audio+offset", "reason": None}
    assert summary.pop("normalizer") == f"{ENGLISH}, words/2, zh/1"
    assert summary == pytest.approx({**figures, **kinds, **clips, **clusters})
    header, row, _, cluster_header, clusters, warning = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["set", "metric", "%", "95"]
    assert row.split() == f"mixed MER 388.24 {low:.2f} to {high:.2f} 0 5 61 8 0.080 2 1 1 1 –".split()
    assert cluster_header.split() == "set clusters by effective design effect".split()
    assert clusters.split() == "mixed 6 audio+offset 2.56 1.00".split()
    assert warning == "fewer than 12 effective clusters, so intervals are rough: mixed 2.6"


def test_score_by_speaker_and_by_key(tmp_path, capsys):
    lines = [result_line(i, i, speaker="ab"[i % 2], room=i) for i in range(4)]
    path = write_lines(tmp_path / "r.jsonl", lines)
    for options, n, key in (([], 2, "speaker"), (["--cluster", "room"], 4, "room")):
        run("--score", path, "--json", tmp_path / "s.json", *options)
        summary = json.loads((tmp_path / "s.json").read_text())["r"]
        assert (summary["clusters"], summary["cluster_key"]) == (n, key)
    run("--score", path, "--cluster", "language", "--json", tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["r"]["low"] is None
    assert capsys.readouterr().out.splitlines()[-1] == "r: one cluster gives neither interval nor p"


@pytest.mark.parametrize(
    "options, errors, units, names",
    [
        ([], 3, 7, f"{ENGLISH}, zh/1"),
        (["--normalizer", "paper"], 5, 6, "paper/2"),
        (["--simplify"], 0, 7, f"{ENGLISH}, zh/1+t2s/2"),
        (["--simplify", "--normalizer", "paper"], 2, 6, "paper/2, paper/2+t2s/2"),
    ],
)
def test_score_takes_normalizer_and_simplify(tmp_path, options, errors, units, names):
    """Three errors are traditional characters; don't against do not is two where contractions stay."""
    lines = [
        result_line(0, text="台湾大学!", hyp="臺灣大學", language="zh"),
        result_line(1, text="I don't", hyp="I do not", language="en"),
    ]
    path = write_lines(tmp_path / "r.jsonl", lines)
    run("--score", path, "--out", tmp_path / "out", *options)
    summary = summaries_of(tmp_path / "out")["r"]
    assert (summary["errors"], summary["units"], summary["normalizer"]) == (errors, units, names)


@pytest.mark.parametrize(
    "lines, message",
    [
        ([result_line(0), {"audio": "1.wav", "duration": 1.0}], r"r\.jsonl:2: neither"),
        ([result_line(0), result_line(1, language="cn")], r"r\.jsonl:2: language 'cn' is not known"),
        ([result_line(0, speaker="a"), result_line(1)], r'r\.jsonl:2: no "speaker"'),
        ([], r"r\.jsonl"),
    ],
)
def test_score_refuses_what_is_no_result_file(tmp_path, lines, message):
    path = write_lines(tmp_path / "r.jsonl", lines)
    with pytest.raises(InputError, match=message):
        run("--score", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_score_refuses_equal_stems_and_a_folder_in_use(tmp_path):
    paths = [write_lines(tmp_path / name / "r.jsonl", [result_line(0)]) for name in "ab"]
    with pytest.raises(InputError, match="'r'"):
        run("--score", *paths, "--out", tmp_path / "out")
    with pytest.raises(InputError, match="--out .*/b is not empty: choose a new folder"):
        run("--score", paths[0], "--out", tmp_path / "b")
    assert os.listdir(tmp_path / "b") == ["r.jsonl"]


FLAGS = """--data x.jsonl
--model m
--score x.jsonl --compare x.jsonl x.jsonl
--score x.jsonl --data x.jsonl
--score x.jsonl --language en
--compare x.jsonl x.jsonl --out y
--seeds x --against y --out z
--seeds x
--score x.jsonl --against y
--score x.jsonl --normalizer other
--model m --data x.jsonl --max-new-tokens 0
--model m --data x.jsonl --overwrite"""


@pytest.mark.parametrize("argv", FLAGS.splitlines())
def test_flags_without_meaning_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluation.parse_args(argv.split())
    assert caught.value.code == 2 and "error: " in capsys.readouterr().err


def test_runs_that_stand_at_different_steps_are_not_compared(runs, capsys):
    folders, _ = runs
    os.rename(f"{folders[1]}/eval-10", f"{folders[1]}/eval-7")
    with pytest.raises(evaluation.InputError, match="stand at eval-10, eval-7"):
        evaluation.compare_seeds(folders[:2], folders[2:4])
    named = [folders[0], f"{folders[1]}/eval-7"]
    assert evaluation.compare_seeds(named, folders[2:4])["paired"] is False


@pytest.mark.parametrize("flag, name", [("--out", "file"), ("--out", "file/x"), ("--json", "folder")])
def test_results_that_cannot_be_stored_are_refused_at_the_start(tmp_path, flag, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    path = write_lines(tmp_path / "x.jsonl", [result_line(0)])
    with pytest.raises(evaluation.InputError, match=flag):
        run("--score", path, flag, tmp_path / name)


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"args": 5}', '{"args": {"seed": [1]}}'])
def test_another_programs_config_names_no_seed(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert evaluation.seed_of(str(tmp_path / "config.json")) is None
