"""Scores of eval.py: normalisation by table, errors, summaries, bootstrap, --compare, --score."""

import importlib.metadata
import json
import os
import zlib

import numpy as np
import opencc
import pytest
from conftest import DATA

import eval as evaluation
from data import InputError

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


def test_summary_is_errors_over_units_not_a_mean_of_rates():
    """1/1 and 1/9 and 2 words invented on silence: 4/10, not the mean of 100 % and 11 %."""
    lines = [
        scored_line(errors=1, units=1, substitutions=1),
        scored_line(errors=1, units=9, deletions=1, stopped=False),
        scored_line(text="", hyp="oh well", errors=2, units=0, insertions=2),
        {"hyp": "", "stopped": False, "duration": 72.0, "language": "en"},
        {"error": "is damaged", "duration": 3600.0, "language": "en", "text": "x"},
    ]
    summary = evaluation.summarize(lines, draws=0, seconds=18.0)
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
    assert evaluation.summarize(lines, draws=0)["metric"] == metric


def test_lines_without_a_language_are_counted_and_said(capsys):
    """Whisper's English normaliser is for English only: it drops accents."""
    lines = [scored_line(None, "é"), scored_line(None, "b"), scored_line(None, "好"), scored_line("fr", "é")]
    summary = evaluation.summarize(lines, draws=0)
    assert [summary[key] for key in ("no_language", "normalizer", "metric")] == [2, "words/2, zh/1", "MER"]
    evaluation.print_summaries({"test": summary})
    said = "test: 2 line(s) with neither a language nor a script that decides one, scored as plain words"
    assert capsys.readouterr().out.splitlines()[-1] == said


# ----------------------------------------------------------------------------------------------------------
# Bootstrap
# ----------------------------------------------------------------------------------------------------------


def brute_force(errors, units, draws, seed):
    """100 × Σ errors / Σ units of `draws` resamples, (draws,), by how often each utterance was drawn."""
    n = len(units)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    return 100 * (counts @ np.array(errors)) / (counts @ np.array(units))


def test_bootstrap_against_brute_force():
    rng = np.random.default_rng(0)
    units = rng.integers(1, 30, 25)
    errors = rng.binomial(units, rng.beta(1, 3, 25))
    low, high = evaluation.bootstrap(errors.tolist(), units.tolist(), 40_000)
    rates = brute_force(errors, units, 40_000, 99)
    tolerance = 0.1 * rates.std()  # five standard errors of the difference
    assert low == pytest.approx(np.quantile(rates, 0.025), abs=tolerance)
    assert high == pytest.approx(np.quantile(rates, 0.975), abs=tolerance)


def test_bootstrap_by_hand():
    assert evaluation.bootstrap([2] * 12, [7] * 12, 500) == pytest.approx((200 / 7, 200 / 7), rel=1e-12)
    assert evaluation.bootstrap([0, 0, 0], [4, 9, 1], 50) == (0, 0)
    assert evaluation.bootstrap([8, 2], [4, 1], 50) == (200, 200)  # insertions lead beyond 100 %
    # One clip in ten is wrong: P(≤ 2 of 10) = 0.930, P(≤ 3) = 0.987, P(0) = 0.35.
    assert evaluation.bootstrap([1] + [0] * 9, [1] * 10, 10_000) == pytest.approx((0, 30))


def test_bootstrap_leaves_out_draws_without_units():
    """Draws of ([3 errors, 0 units], [1, 10]) are 40 % twice in three, 10 % once; the fourth has no rate."""
    assert evaluation.bootstrap([3, 1], [0, 10], 5_000) == pytest.approx((10, 40))
    for errors, units in (([], []), ([0], [0]), ([3, 0], [0, 0])):
        assert evaluation.bootstrap(errors, units, 100) == (None, None)
    outcomes = {evaluation.bootstrap([0] * 9 + [1], [0] * 9 + [1], 1, seed) for seed in range(20)}
    assert outcomes == {(None, None), (100.0, 100.0)}


# ----------------------------------------------------------------------------------------------------------
# --compare
# ----------------------------------------------------------------------------------------------------------
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


def run(*argv):
    return evaluation.main(evaluation.parse_args([str(argument) for argument in argv]))


@pytest.fixture
def compared(tmp_path):
    """compared(errors of A, errors of B, draws, units=10 each) → compare's dict, by way of two files."""

    def compared(errors_a, errors_b, draws=1000, units=None, **options):
        units = units or [10] * len(errors_a)
        results = []
        for name, errors in (("a", errors_a), ("b", errors_b)):
            lines = map(result_line, range(len(units)), errors, units)
            results.append(evaluation.read_results(write_lines(tmp_path / f"{name}.jsonl", lines)))
        return evaluation.compare(*results, draws, **options)

    return compared


def test_compare_is_paired(compared):
    """B has one error in ten fewer on every clip, however the clips differ: every draw says −10."""
    errors = [1, 9, 2, 8, 1, 7, 10, 3]
    better = [e - 1 for e in errors]
    c = compared(errors, better, 500)
    assert [c[key] for key in ("a", "b", "difference", "low", "high")] == pytest.approx(
        [51.25, 41.25] + [-10] * 3
    )
    assert c["p"] == pytest.approx(2 / 501)
    back = compared(better, errors, 500)
    assert back["difference"] == pytest.approx(10) and back["p"] == pytest.approx(2 / 501)


def test_compare_against_brute_force(compared):
    """Pooled rates of clips of unequal length, and two-sided p, from random numbers of our own."""
    rng = np.random.default_rng(8)
    units = rng.integers(1, 13, 30)
    a = rng.binomial(units, 0.4)
    b = np.where(rng.random(30) < 0.5, a, rng.binomial(units, 0.3))
    c = compared(a.tolist(), b.tolist(), 20_000, units.tolist())
    assert c["a"] == pytest.approx(100 * a.sum() / units.sum())
    assert c["b"] == pytest.approx(100 * b.sum() / units.sum())
    differences = brute_force(b - a, units, 40_000, 7)
    p = 2 * min((differences <= 0).mean(), (differences >= 0).mean())
    assert 0.05 < p < 0.5  # else this would show nothing
    assert c["p"] == pytest.approx(p, abs=0.013)
    assert c["low"] == pytest.approx(np.quantile(differences, 0.025), abs=0.13 * differences.std())
    assert c["high"] == pytest.approx(np.quantile(differences, 0.975), abs=0.13 * differences.std())


def test_compare_exact_p(compared):
    """One clip better, one worse, equally long: 3 of 4 draws are ≤ 0, 3 of 4 are ≥ 0, so p is 1."""
    assert compared([0, 5], [5, 0], 400)["p"] == 1
    assert compared([5, 5, 5], [5, 5, 0], 30_000)["p"] == pytest.approx(2 * (2 / 3) ** 3, abs=0.03)


def test_compare_leaves_out_draws_without_units(compared):
    """Of two clips one has no word: three draws in four say −50 points, the fourth has no rate."""
    c = compared([5, 0], [0, 0], 400, units=[10, 0])
    assert [c[key] for key in ("difference", "low", "high")] == [-50, -50, -50] and c["p"] < 0.01


def test_one_clip_has_neither_interval_nor_p(compared, tmp_path, capsys):
    c = compared([5], [3])
    assert (c["n"], c["difference"], c["low"], c["high"], c["p"]) == (1, -20, None, None, None)
    run("--compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    out = capsys.readouterr().out.splitlines()
    assert out[1].split() == ["WER", "1", "50.00", "30.00", "-20.00", "–", "–"]
    assert out[2] == "neither interval nor p: they need two clips or more"


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
        relative = f"../{clip['audio']}"
        a.append(result_line(0, errors_a, **{**clip, "audio": f"../{relative}"}))
        path = relative if i % 2 else str(tmp_path / clip["audio"])
        b.append(result_line(0, errors_b, language="de-AT", **{**clip, "audio": path}))
    b[3] |= {"begin_time": -1, "end_time": None}
    first = evaluation.read_results(write_lines(tmp_path / "runs" / "a" / "r.jsonl", a))
    second = evaluation.read_results(write_lines(tmp_path / "b" / "r.jsonl", b))
    reverse = evaluation.read_results(write_lines(tmp_path / "c" / "r.jsonl", b[::-1]))
    c = evaluation.compare(first, second, 500)
    assert c == evaluation.compare(first, reverse, 500)
    assert (c["n"], c["a"], c["b"]) == pytest.approx((6, 100 * 19 / 60, 100 * 15 / 60))


def test_compare_prints_both_values_and_the_verdict(tmp_path, capsys):
    a = write_lines(tmp_path / "a.jsonl", [result_line(i, 4) for i in range(5)])
    b = write_lines(tmp_path / "b.jsonl", [result_line(i, 1) for i in reversed(range(5))])
    before = sorted(tmp_path.iterdir())
    run("--compare", a, b, "--bootstrap", 999)
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == "metric clips A % B % B − A 95 % p".split()
    assert row.split() == "WER 5 40.00 10.00 -30.00 -30.00 to -30.00 0.0020".split()
    assert sorted(tmp_path.iterdir()) == before  # prints only


def test_compare_recounts_with_the_normalizer_asked_for(tmp_path, capsys):
    """A writes don't as do not: no error by default, two errors of two units in the paper's style."""
    for name, hyp in (("a", "I do not"), ("b", "i dont")):
        line = result_line(0, text="I don't", hyp=hyp, language="en", errors=1)
        write_lines(tmp_path / f"{name}.jsonl", [line])
    for normalizer, rates in (("default", ["0.00", "66.67"]), ("paper", ["100.00", "0.00"])):
        run("--compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--normalizer", normalizer)
        assert capsys.readouterr().out.splitlines()[1].split()[2:4] == rates


UNPAIRED = {
    "only in A": ([0, 1, 77], [0, 1], r"77\.wav is in one"),
    "twice in A": ([0, 1, 77, 77], [0, 1, 77], r"77\.wav is there twice"),
    "twice in both": ([77, 1, 77], [1, 77, 77], r"77\.wav is there twice"),
    "other text": ([0, 77], [0, result_line(77, text="anna bert")], r"77\.wav has another text"),
    "other language": ([77], [result_line(77, language="en")], r"77\.wav has another text or language"),
    "failed in A": ([0, failed_line(77)], [0, 77], r"77\.wav was not decoded"),
    "failed in B": ([0, 77], [0, result_line(77, error="is damaged")], r"77\.wav was not decoded"),
    "no hyp": ([77], [{"audio": "77.wav", "duration": 36.0}], r"b\.jsonl:1: neither"),
    "other bytes": (
        [0, result_line(77, offset=0, nbytes=10)],
        [0, result_line(77, offset=10, nbytes=10)],
        r"77\.wav is in one",
    ),
    "unknown language": ([77], [result_line(77, language="cn")], r"b\.jsonl:1: language 'cn' is not known"),
    "nothing to say": ([result_line(77, text="")], [result_line(77, text="")], "no reference has a unit"),
}


@pytest.mark.parametrize("a, b, message", UNPAIRED.values(), ids=UNPAIRED)
def test_compare_refuses_what_is_no_pair_and_names_the_clip(tmp_path, capsys, a, b, message):
    paths = []
    for name, lines in (("a", a), ("b", b)):
        lines = [result_line(line) if isinstance(line, int) else line for line in lines]
        paths.append(write_lines(tmp_path / f"{name}.jsonl", lines))
    with pytest.raises(InputError, match=message):
        run("--compare", *paths)
    assert capsys.readouterr().out == ""


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
    run("--score", path, "--out", tmp_path / "out", "--bootstrap", 300)
    assert os.listdir(tmp_path / "out") == ["summary.json"] and open(path, "rb").read() == before
    # errors: 2 deletions, 59 insertions, 2 on silence, 2 deletions, 1 deletion, none
    low, high = evaluation.bootstrap([2, 59, 2, 2, 1, 0], [10, 1, 0, 2, 2, 2], 300)
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
    assert summary.pop("normalizer") == f"{ENGLISH}, words/2, zh/1"
    assert summary == pytest.approx({**figures, **kinds, **clips})
    header, row, *_ = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["set", "metric", "%", "95"]
    assert row.split()[:3] == ["mixed", "MER", "388.24"]
    assert row.split()[4:] == "0 5 61 8 0.080 2 1 1 1 –".split()


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
    run("--score", path, "--out", tmp_path / "out", "--bootstrap", 10, *options)
    summary = summaries_of(tmp_path / "out")["r"]
    assert (summary["errors"], summary["units"], summary["normalizer"]) == (errors, units, names)


@pytest.mark.parametrize(
    "lines, message",
    [
        ([result_line(0), {"audio": "1.wav", "duration": 1.0}], r"r\.jsonl:2: neither"),
        ([result_line(0), result_line(1, language="cn")], r"r\.jsonl:2: language 'cn' is not known"),
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
--compare x.jsonl x.jsonl --bootstrap 0
--score x.jsonl --normalizer other
--model m --data x.jsonl --max-new-tokens 0
--model m --data x.jsonl --overwrite"""


@pytest.mark.parametrize("argv", FLAGS.splitlines())
def test_flags_without_meaning_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluation.parse_args(argv.split())
    assert caught.value.code == 2 and "error: " in capsys.readouterr().err
