"""eval.py's scoring: normalisation by table, errors against a brute force, bootstrap intervals, comparisons,
rescoring of result files, and clips that cannot be decoded."""
import importlib.metadata
import json
import math
import os
import random
import re
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import soundfile

import data
import eval as evaluation
from conftest import DATA, ROOT, noise, tiny_model
from data import InputError

ENGLISH = f"en/1-whisper-{importlib.metadata.version('whisper-normalizer')}"
FAMILY = "\U0001F468\u200d\U0001F469\u200d\U0001F467"          # man, woman, girl, joined by ZWJ
KEYCAP = "5\ufe0f\u20e3"                                       # the 5 key
THUMB = "\U0001F44D\U0001F3FD"                                 # thumbs up with a skin tone
ENGLAND = "\U0001F3F4\U000E0067\U000E0062\U000E0065\U000E006E\U000E0067\U000E007F"

# ------------------------------------------------------------------------------------------------------------
# Normalisation. Units stand with blanks between them.
# ------------------------------------------------------------------------------------------------------------
EN = [
    ("Hello, World!", "hello world"),
    ("", ""),
    (" \t\r\n", ""),
    ("—?!", ""),
    ("twenty five percent", "25%"),
    ("25 percent", "25%"),
    ("25 per cent", "25%"),
    ("25%", "25%"),
    ("２５％", "25%"),
    ("two hundred and one", "201"),
    ("three point one four", "3.14"),
    ("two and a half", "2.5"),
    ("nineteen eighty four", "1984"),
    ("one oh one", "101"),
    ("double seven", "77"),
    ("minus five degrees", "-5 degrees"),
    ("the twenty first", "the 21st"),
    ("the 1960s", "the 1960s"),
    ("1 dog, one cat", "one dog one cat"),
    ("1,000 people", "1000 people"),
    ("3.5 miles.", "3.5 miles"),
    ("ten thousand dollars", "$10000"),
    ("It cost $20 million.", "it cost $20000000"),
    ("three dollars and fifty cents", "$3.50"),
    ("$3.50", "$3.50"),
    ("＄20 or £5", "$20 or £5"),
    ("50 cents", "¢50"),
    ("$0.50", "¢50"),
    ("I can't, won't, don't", "i can not will not do not"),
    ("it's we'll they're I've I'm he'd", "it is we will they are i have i am he would"),
    ("she'd been", "she had been"),
    ("let's, y'all, ain't", "let us you all aint"),
    ("gonna wanna gotta", "going to want to got to"),
    ("I don 't", "i do not"),
    ("I don’t", "i do not"),                                   # the typographic apostrophe
    ("it’s John’s", "it is john is"),
    ("the dogs' house", "the dogs house"),
    ("Mr. and Mrs. Smith met Dr. Jones", "mister and missus smith met doctor jones"),
    ("St. John", "saint john"),
    ("colour organise centre grey", "color organize center gray"),
    ("well-known AT&T", "well known at t"),
    ("um, uh, hmm, mm, mhm", ""),
    ("um yes uh no", "yes no"),
    ("[noise] hello (laughs) <unk>", "hello"),
    ("café naïve Łódź straße", "cafe naive lodz strasse"),
    ("U.S. army", "u s army"),
    ("Wait… what?", "wait what"),
    ("Wait…", "wait"),
    ("Wait...", "wait"),
    ("…", ""),
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
    ("我有50%的股份", "我 有 5 0 的 股 份"),
    ("百分之五十", "百 分 之 五 十"),                            # numbers stay as they are written
    ("二〇二四年①", "二 〇 二 四 年 1"),
    ("￥100", "1 0 0"),
    ("25℃", "2 5 c"),
    ("A股涨了3.5%", "a 股 涨 了 3 5"),
    ("Wi-Fi 密码是 abc", "w i f i 密 码 是 a b c"),
    ("K T V", "k t v"),
    ("去哪儿玩儿一会儿", "去 哪 儿 玩 儿 一 会 儿"),
    ("臺灣大學", "臺 灣 大 學"),
    ("阿·Q", "阿 q"),
    ("你\u200b好\u200d吗\ufeff", "你 好 吗"),
    ("\u202a你好\u202c\u2060", "你 好"),
    ("爱❤\ufe0f你", "爱 你"),
    ("好" + FAMILY + "的" + THUMB, "好 的"),
    ("按" + KEYCAP, "按 5"),
    (ENGLAND + "赢了🇨🇳", "赢 了"),
    ("好\ufe0f", "好"),
    ("𠮷野家", "𠮷 野 家"),                                      # beyond U+FFFF, one unit
    ("\uf90a\u2f00", "金 一"),                                   # compatibility ideograph, radical
    ("<unk>嗯", "u n k 嗯"),                                     # Whisper's brackets and fillers are en's only
    ("", ""),
    (" 。 ", ""),
]
OTHERS = [
    ("yue", "佢哋喺度，OK？", "佢 哋 喺 度 o k"),
    ("ja", "東京、日本。「はい」〜", "東 京 日 本 は い"),
    ("ja", "ラーメン 人々", "ラ ー メ ン 人 々"),
    ("ja", "ｶﾞｲﾄﾞ・か\u3099", "ガ イ ド が"),                    # half-width and decomposed voiced kana
    ("ja", "２０２４年", "2 0 2 4 年"),
    ("ko", "안녕하세요, 세계!", "안 녕 하 세 요 세 계"),
    ("ko", "\u1112\u1161\u11ab\u1100\u1173\u11af", "한 글"),      # decomposed syllables
    ("th", "ภาษา ไทย", "ภ า ษ า ไ ท ย"),
    ("fr", "L'eau d'ÉTÉ", "l eau d été"),
    ("fr", "aujourd’hui, ça va ?", "aujourd hui ça va"),
    ("fr", "« Bonjour » – e\u0301te\u0301…", "bonjour été"),
    ("de", "Straße, Öl & Käse!", "straße öl käse"),
    ("de", "GROẞ E-Mail 3,5 %", "groß e mail 3 5"),
    ("de", "ich ❤\ufe0f dich " + FAMILY + " " + KEYCAP, "ich dich 5"),
    ("de", "Donau\u00addampf \ufeffok", "donaudampf ok"),
    ("de", "ＯＫ ﬁn", "ok fin"),
    ("de", "um zwanzig Uhr (laut) hmm", "um zwanzig uhr laut hmm"),
    ("ru", "Привет, Мир! Ёлка.", "привет мир ёлка"),
    ("ru", "и\u0306 №5", "й no5"),
    ("es", "¿Qué tal? ¡Bien!", "qué tal bien"),
    ("hi", "हिन्दी है। क\u094d\u200dष", "हिन्दी है क\u094dष"),       # vowel signs stay
]
PAPER = [
    ("en", "Don't stop, it's 5 o'clock!", "dont stop its 5 oclock"),
    ("en", "I don’t", "i dont"),
    ("en", "twenty-five percent, 25%", "twentyfive percent 25"),
    ("en", "Mr. Smith's colour", "mr smiths colour"),
    ("en", "$3.50 1,000", "350 1000"),
    ("en", "um, [noise] yes", "um noise yes"),
    ("en", "A & B — C", "a b c"),
    ("en", "wait…what", "waitwhat"),
    ("en", "hel\u200blo " + THUMB + " " + KEYCAP, "hello 5"),
    ("en", "ＯＫ", "ｏｋ"),                                       # no NFKC
    ("en", "?!", ""),
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
    ("zh", "default", "乾燥的乾坤", "干 燥 的 乾 坤"),              # by phrase: 乾 stays in 乾坤
    ("zh", "default", "乾 坤", "乾 坤"),                          # blanks between characters mean nothing
    ("zh", "default", "軟體 ＯＫ", "软 体 o k"),                  # characters, not the mainland's words
    ("zh", "default", "这是简体。", "这 是 简 体"),
    ("zh", "default", "\uf900有此理", "岂 有 此 理"),               # a compatibility ideograph is traditional too
    ("zh", "paper", "臺灣！", "台 湾"),
    ("yue", "default", "廣東話", "广 东 话"),
    ("ja", "default", "廣島", "廣 島"),                          # zh and yue only
    ("en", "default", "臺灣 colour", "臺灣 color"),
    ("fr", "paper", "廣東 été", "廣東 été"),
]
TABLE = [*(("en", "default", False, *row) for row in EN), *(("zh", "default", False, *row) for row in ZH),
         *((language, "default", False, *row) for language, *row in OTHERS),
         *((language, "paper", False, *row) for language, *row in PAPER),
         *((language, style, True, *row) for language, style, *row in SIMPLIFIED)]


@pytest.mark.parametrize("language, style, simplify, text, units", TABLE)
def test_normalize(language, style, simplify, text, units):
    assert evaluation.normalize(text, language, style, simplify) == units.split(" ") * bool(units)


def test_normalize_defaults_are_the_default_style_and_traditional_left_alone():
    assert evaluation.normalize("Don't", "en") == ["do", "not"]
    assert evaluation.normalize("臺ＯＫ", "zh") == ["臺", "o", "k"]
    assert evaluation.normalize("Don't 臺", "en", style="paper", simplify=True) == ["dont", "臺"]


@pytest.mark.parametrize("language, options, name", [
    ("en", {}, ENGLISH), ("zh", {}, "zh/1"), ("de", {}, "words/1"), ("ru", {}, "words/1"),
    ("en", dict(style="paper"), "paper/1"), ("zh", dict(style="paper"), "paper/1"),
    ("de", dict(style="paper"), "paper/1"), ("zh", dict(simplify=True), "zh/1+t2s"),
    ("zh", dict(style="paper", simplify=True), "paper/1+t2s")])
def test_normalizer_name(language, options, name):
    assert evaluation.normalizer_name(language, **options) == name


def test_normalizer_names_tell_normalizers_apart():
    """Languages whose units are not the same function of the text do not share a name."""
    assert len({evaluation.normalizer_name(language) for language in ("en", "zh", "de")}) == 3


# ------------------------------------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------------------------------------
def edit_distance(reference, hypothesis):
    row = list(range(len(hypothesis) + 1))
    for i, r in enumerate(reference, 1):
        above, row = row, [i]
        for j, h in enumerate(hypothesis, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (r != h)))
    return row[-1]


def test_count_errors_equals_an_edit_distance():
    draw, kinds = random.Random(3), set()
    for _ in range(300):
        language, joint = draw.choice([("de", " "), ("zh", "")])
        reference, hypothesis = ([draw.choice("abc") for _ in range(draw.randrange(9))] for _ in range(2))
        counts = evaluation.count_errors(joint.join(reference), joint.join(hypothesis), language)
        assert set(counts) == {"errors", "units", "substitutions", "deletions", "insertions"}
        assert counts["errors"] == edit_distance(reference, hypothesis)
        assert counts["errors"] == counts["substitutions"] + counts["deletions"] + counts["insertions"]
        assert counts["units"] == len(reference)
        assert counts["insertions"] - counts["deletions"] == len(hypothesis) - len(reference)
        kinds |= {key for key in counts if counts[key] and key != "units"}
    assert kinds == {"errors", "substitutions", "deletions", "insertions"}


@pytest.mark.parametrize("language, reference, hypothesis, options, errors, units", [
    ("en", "twenty five percent", "25%", {}, 0, 1),
    ("en", "twenty five percent", "25%", dict(style="paper"), 3, 3),
    ("en", "don't", "do not", {}, 0, 2),
    ("en", "don't", "do not", dict(style="paper"), 2, 1),
    ("en", "Wait…", "wait", {}, 0, 1),
    ("zh", "台湾", "臺灣", {}, 2, 2),
    ("zh", "台湾", "臺灣", dict(simplify=True), 0, 2),
    ("zh", "臺灣", "台湾", dict(simplify=True), 0, 2),                # both sides are converted
    ("zh", "ＯＫ", "OK", {}, 0, 2),
    ("zh", "ＯＫ", "OK", dict(style="paper"), 2, 2),
    ("zh", "。", "好的" + FAMILY, {}, 2, 0),
    ("zh", "❤\ufe0f", "", {}, 0, 0)])
def test_count_errors_takes_style_and_simplify(language, reference, hypothesis, options, errors, units):
    counts = evaluation.count_errors(reference, hypothesis, language, **options)
    assert (counts["errors"], counts["units"]) == (errors, units)
    if units == 0:
        assert counts["insertions"] == errors and counts["substitutions"] == counts["deletions"] == 0


def test_looping():
    for text in ("", "a", "好", "the old man made a sign in the affirmative", "今天天气很好我们去公园吧", "no no no"):
        assert evaluation.looping(text) is False
    for text in ("the cat " * 30, "谢谢" * 30, "a" * 200):
        assert evaluation.looping(text) is True


def test_looping_threshold_is_exceeded_not_reached():
    at = [text for n in range(200) for k in range(20) for text in ["a" * n + "bcdefghijklmnopqrstuvwxyz"[:k]]
          if 5 * len(text) == 12 * len(zlib.compress(text.encode()))]
    assert at and not any(map(evaluation.looping, at))
    for n in range(1, 60):                                          # UTF-8 bytes are counted, not characters
        text = "好吧" * n
        assert evaluation.looping(text) == (6 * n / len(zlib.compress(text.encode())) > 2.4)


# ------------------------------------------------------------------------------------------------------------
# Bootstrap
# ------------------------------------------------------------------------------------------------------------
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
    tolerance = 0.1 * rates.std()                                   # five standard errors of the difference
    assert low == pytest.approx(np.quantile(rates, 0.025), abs=tolerance)
    assert high == pytest.approx(np.quantile(rates, 0.975), abs=tolerance)


def test_bootstrap_of_equal_utterances_is_the_value():
    low, high = evaluation.bootstrap([2] * 12, [7] * 12, 500)
    assert low == high == pytest.approx(200 / 7, rel=1e-12)
    assert evaluation.bootstrap([3], [4], 50) == (75, 75)
    assert evaluation.bootstrap([0, 0, 0], [4, 9, 1], 50) == (0, 0)
    assert evaluation.bootstrap([8, 2], [4, 1], 50) == (200, 200)       # insertions lead beyond 100 %


def test_bootstrap_of_a_binomial():
    """One clip in ten is wrong: P(≤ 2 of 10) = 0.930, P(≤ 3) = 0.987, P(0) = 0.35."""
    assert evaluation.bootstrap([1] + [0] * 9, [1] * 10, 10_000) == pytest.approx((0, 30))
    assert evaluation.bootstrap([0, 1], [1, 1], 10_000) == pytest.approx((0, 100))


def test_bootstrap_leaves_out_draws_without_units():
    """Draws of ([3 errors, 0 units], [1, 10]) are 40 % twice in three, 10 % once; the fourth has no rate."""
    assert evaluation.bootstrap([3, 1], [0, 10], 5_000) == pytest.approx((10, 40))
    assert evaluation.bootstrap([0] * 9 + [1], [0] * 9 + [10], 2_000) == pytest.approx((10, 10))


@pytest.mark.parametrize("errors, units", [([], []), ([0], [0]), ([3, 0], [0, 0])])
def test_bootstrap_without_units(errors, units):
    assert evaluation.bootstrap(errors, units, 100) == (None, None)


def test_bootstrap_is_a_function_of_the_seed():
    rng = np.random.default_rng(1)
    errors, units = rng.integers(0, 20, 50).tolist(), rng.integers(1, 40, 50).tolist()
    low, high = evaluation.bootstrap(errors, units, 200)
    assert (low, high) == evaluation.bootstrap(errors, units, 200, seed=0)
    assert (low, high) != evaluation.bootstrap(errors, units, 200, seed=1)


# ------------------------------------------------------------------------------------------------------------
# Comparison
# ------------------------------------------------------------------------------------------------------------
WORDS = "anna bert carl dora emil fritz gerd hans ida jan kurt lena".split()


def result_line(i, errors=0, units=10, **changed):
    """A result line of clip i: the first `errors` of `units` German words are missing."""
    return {"audio": f"{i}.wav", "duration": 36.0, "text": " ".join(WORDS[:units]), "language": "de",
            "hyp": " ".join(WORDS[errors:units]), "stopped": True, "errors": errors, "units": units,
            "substitutions": 0, "deletions": errors, "insertions": 0, **changed}


def write_lines(path, lines):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def compared(tmp_path):
    """compared(errors of A, errors of B, draws, units=10 each) → compare's dict, by way of two files."""
    def compared(errors_a, errors_b, draws=1000, units=None, **options):
        units = units or [10] * len(errors_a)
        a, b = (evaluation.read_results(write_lines(
            tmp_path / f"{name}.jsonl", map(result_line, range(len(units)), errors, units)))
            for name, errors in (("a", errors_a), ("b", errors_b)))
        return evaluation.compare(a, b, draws, **options)
    return compared


def run(*argv):
    return evaluation.main(evaluation.parse_args(list(map(str, argv))))


def test_compare_same_results(compared):
    same = compared([0, 3, 1, 5], [0, 3, 1, 5])
    assert {key: same[key] for key in ("metric", "n", "difference", "low", "high", "p")} == dict(
        metric="WER", n=4, difference=0, low=0, high=0, p=1)
    assert same["a"] == same["b"] == 22.5


def test_compare_is_paired(compared):
    """B has one error in ten fewer on every clip, however the clips differ: every draw says −10."""
    errors = [1, 9, 2, 8, 1, 7, 10, 3]
    found = compared(errors, [e - 1 for e in errors], 500)
    assert found["a"] == pytest.approx(51.25) and found["b"] == pytest.approx(41.25)
    assert [found[key] for key in ("difference", "low", "high")] == pytest.approx([-10] * 3)
    assert found["p"] == pytest.approx(2 / 501)
    back = compared([e - 1 for e in errors], errors, 500)
    assert back["difference"] == pytest.approx(10) and back["p"] == pytest.approx(2 / 501)


def test_compare_against_brute_force(compared):
    """Pooled rates of clips of unequal length, and two-sided p, from random numbers of our own."""
    rng = np.random.default_rng(8)
    units = rng.integers(1, 13, 30)
    a = rng.binomial(units, 0.4)
    b = np.where(rng.random(30) < 0.5, a, rng.binomial(units, 0.3))
    found = compared(a.tolist(), b.tolist(), 20_000, units.tolist())
    assert found["a"] == pytest.approx(100 * a.sum() / units.sum())
    assert found["b"] == pytest.approx(100 * b.sum() / units.sum())
    assert found["difference"] == pytest.approx(found["b"] - found["a"])
    differences = brute_force(b - a, units, 40_000, 7)
    p = 2 * min((differences <= 0).mean(), (differences >= 0).mean())
    assert 0.05 < p < 0.5                                           # else this would show nothing
    assert found["p"] == pytest.approx(p, abs=0.013)
    assert found["low"] == pytest.approx(np.quantile(differences, 0.025), abs=0.13 * differences.std())
    assert found["high"] == pytest.approx(np.quantile(differences, 0.975), abs=0.13 * differences.std())


def test_compare_exact_p(compared):
    """One clip better, one worse, equally long: 3 of 4 draws are ≤ 0, 3 of 4 are ≥ 0, so p is 1."""
    assert compared([0, 5], [5, 0], 400)["p"] == 1
    assert compared([5, 5, 5], [5, 5, 0], 30_000)["p"] == pytest.approx(2 * (2 / 3) ** 3, abs=0.03)


def test_compare_is_a_function_of_the_seed(compared):
    a, b = [3, 0, 5, 1, 9, 2, 4, 4], [1, 2, 5, 0, 4, 4, 3, 3]
    assert compared(a, b, 300) == compared(a, b, 300, seed=0) == compared(a, b, 300)
    intervals = [compared(a, b, 300, seed=seed) for seed in range(6)]
    assert len({(found["low"], found["high"], found["p"]) for found in intervals}) > 1


def test_p_under_the_null(compared):
    """Where A and B are two draws of one thing p < 0.05 comes about one time in twenty."""
    rng, small = np.random.default_rng(2), 0
    for _ in range(200):
        a, b = rng.binomial(10, 0.3, (2, 25)).tolist()
        small += compared(a, b, 400)["p"] < 0.05
    assert 3 <= small <= 25


@pytest.mark.parametrize("language, metric", [("zh", "CER"), ("de", "WER"), (None, "WER")])
def test_compare_names_the_metric(tmp_path, language, metric):
    lines = [result_line(0, 1, language=language), result_line(1, language=language)]
    results = evaluation.read_results(write_lines(tmp_path / "a.jsonl", lines))
    assert evaluation.compare(results, results, 20)["metric"] == metric


def test_compare_pairs_by_clip_in_any_order_and_folder(tmp_path):
    """One audio file holds two segments, one tar two byte ranges; the files lie in different folders."""
    clips = [dict(audio="0.wav"), dict(audio="0.wav", begin_time=0.0, end_time=2.0),
             dict(audio="0.wav", begin_time=2.0, end_time=4.0), dict(audio="deep/1.wav"),
             dict(audio="0.tar", offset=512, nbytes=99), dict(audio="0.tar", offset=2048, nbytes=99)]
    errors_a, errors_b = [1, 3, 0, 9, 4, 2], [2, 1, 0, 7, 5, 0]
    a = [result_line(0, e, **{**clip, "audio": "../../" + clip["audio"]}) for clip, e in zip(clips, errors_a)]
    b = [result_line(0, e, **{**clip, "audio": [f"../{clip['audio']}", str(tmp_path / clip["audio"])][i % 2]})
         for i, (clip, e) in enumerate(zip(clips, errors_b))]
    first, second, reverse = map(evaluation.read_results, (
        write_lines(tmp_path / "runs" / "a" / "r.jsonl", a), write_lines(tmp_path / "b" / "r.jsonl", b),
        write_lines(tmp_path / "c" / "r.jsonl", b[::-1])))
    found = evaluation.compare(first, second, 20_000)
    assert found == evaluation.compare(first, reverse, 20_000)
    assert (found["n"], found["a"], found["b"]) == pytest.approx((6, 100 * 19 / 60, 100 * 15 / 60))
    differences = brute_force(np.subtract(errors_b, errors_a), [10] * 6, 40_000, 3)
    assert found["low"] == pytest.approx(np.quantile(differences, 0.025), abs=1.7)        # a step is 1.67


def test_compare_knows_a_whole_file_by_any_name(tmp_path):
    """begin_time −1, null or absent: the whole file."""
    a = write_lines(tmp_path / "a.jsonl", [result_line(0, 1, begin_time=-1, end_time=-1),
                                           result_line(1, 0, begin_time=None)])
    b = write_lines(tmp_path / "b.jsonl", [result_line(1, 2), result_line(0, 3)])
    found = evaluation.compare(evaluation.read_results(a), evaluation.read_results(b), 50)
    assert (found["n"], found["difference"]) == (2, pytest.approx(20))


def test_compare_prints_both_values_and_the_verdict(tmp_path, capsys):
    a = write_lines(tmp_path / "a.jsonl", [result_line(i, 4) for i in range(5)])
    b = write_lines(tmp_path / "b.jsonl", [result_line(i, 1) for i in reversed(range(5))])
    before = sorted(tmp_path.iterdir())
    assert not run("--compare", a, b, "--bootstrap", 999)
    out = capsys.readouterr().out
    assert "WER" in out and "40.00" in out and "10.00" in out
    assert len(re.findall(r"[-−]30\.00", out)) == 3                   # the difference and its interval
    assert re.search(r"\bp\b.*0\.002", out, re.DOTALL)
    assert sorted(tmp_path.iterdir()) == before                     # prints only


def test_compare_recounts_with_the_normalizer_asked_for(tmp_path, capsys):
    """A writes don't as do not: no error by default, two errors of two units in the paper's style."""
    lines = [result_line(0, text="I don't", hyp=hyp, language="en", errors=1) for hyp in ("I do not", "i dont")]
    paths = [write_lines(tmp_path / f"{name}.jsonl", [line]) for name, line in zip("ab", lines)]
    run("--compare", *paths, "--bootstrap", 9)
    assert re.search(r" 0\.00 .* 66\.67 ", capsys.readouterr().out)
    run("--compare", *paths, "--bootstrap", 9, "--normalizer", "paper")
    assert re.search(r" 100\.00 .* 0\.00 ", capsys.readouterr().out)


def failed_line(i):
    kept = ("audio", "duration", "text", "language")
    return {**{key: value for key, value in result_line(i).items() if key in kept}, "error": "is damaged"}


def manifest_line(i):
    return {key: result_line(i)[key] for key in ("audio", "duration", "text", "language")}


UNPAIRED = [
    ("only in A", [0, 1, 77], [0, 1]),
    ("only in B", [0, 1], [0, 77, 1]),
    ("twice in A", [0, 1, 77, 77], [0, 1, 77]),
    ("twice in B", [77, 1], [1, 77, 77]),
    ("twice in both", [77, 1, 77], [1, 77, 77]),
    ("other text", [0, 77], [0, result_line(77, text="anna bert")]),
    ("no text", [0, 77], [0, result_line(77, text=None)]),
    ("failed in A", [0, failed_line(77)], [0, 77]),
    ("failed in B", [0, 77], [0, failed_line(77)]),
    ("failed in both", [0, failed_line(77)], [0, failed_line(77)]),
    ("no hyp", [77], [manifest_line(77)]),
    ("other folder", [0, 77], [0, result_line(77, audio="sub/77.wav")]),
    ("other segment", [0, 77], [0, result_line(77, begin_time=1.0)]),
    ("other bytes", [0, result_line(77, offset=0, nbytes=10)], [0, result_line(77, offset=10, nbytes=10)]),
]


@pytest.mark.parametrize("what, a, b", UNPAIRED, ids=[row[0] for row in UNPAIRED])
def test_compare_refuses_what_is_no_pair_and_names_the_clip(tmp_path, capsys, what, a, b):
    paths = [write_lines(tmp_path / f"{name}.jsonl",
                         [result_line(line) if isinstance(line, int) else line for line in lines])
             for name, lines in (("a", a), ("b", b))]
    with pytest.raises(InputError, match=r"77\.wav|[ab]\.jsonl:\d"):
        run("--compare", *paths)
    assert capsys.readouterr().out == ""


def test_bootstrap_and_compare_are_fast(tmp_path):
    rng = np.random.default_rng(0)
    units = rng.integers(1, 12, 10_000)
    files = [write_lines(tmp_path / name, map(result_line, range(10_000), rng.binomial(units, 0.2).tolist(),
                                              units.tolist())) for name in ("a.jsonl", "b.jsonl")]
    a, b = map(evaluation.read_results, files)
    start = time.process_time()
    low, high = evaluation.bootstrap([line["errors"] for line in a], units.tolist(), 10_000)
    middle = time.process_time()
    found = evaluation.compare(a, b, 10_000)
    end = time.process_time()
    assert low < found["a"] < high < low + 1 and found["n"] == 10_000
    assert middle - start < 5 and end - middle < 5


# ------------------------------------------------------------------------------------------------------------
# --score
# ------------------------------------------------------------------------------------------------------------
def mixed_lines():
    """Lines of every kind. Their counts are not those of their texts: they must not be believed."""
    return [result_line(0, 2) | {"errors": 99, "units": 1, "deletions": 99},
            result_line(1, text="anna", hyp="anna " * 59 + "anna", stopped=False),
            result_line(2, text="", hyp="bert carl"),
            result_line(3, text=None, hyp="", duration=72.0),
            result_line(4, text="anna bert", hyp=""),
            {**failed_line(5), "duration": 3600.0},
            result_line(6, text="好的", hyp="好", language="zh"),
            result_line(7, text="Don't", hyp="do not", language="en")]


def test_score_recounts_and_sums_up(tmp_path, capsys):
    path = write_lines(tmp_path / "in" / "mixed.jsonl", mixed_lines())
    before = open(path, "rb").read()
    assert not run("--score", path, "--out", tmp_path / "out", "--bootstrap", 300)
    assert os.listdir(tmp_path / "out") == ["summary.json"] and open(path, "rb").read() == before
    (stem, summary), = json.loads((tmp_path / "out" / "summary.json").read_text()).items()
    # errors: 2 deletions, 59 insertions, 2 on silence, 2 deletions, 1 deletion, none
    low, high = evaluation.bootstrap([2, 59, 2, 2, 1, 0], [10, 1, 0, 2, 2, 2], 300)
    normalizer = summary.pop("normalizer")
    assert stem == "mixed" and normalizer.replace(", ", ",") == f"{ENGLISH},words/1,zh/1"
    assert summary == dict(metric="MER", value=pytest.approx(100 * 66 / 17), low=pytest.approx(low),
                           high=pytest.approx(high), errors=66, units=17, substitutions=0, deletions=5,
                           insertions=61, n=8, scored=6, failed=1, empty=2, looping=1, capped=1,
                           hours=pytest.approx((6 * 36 + 72) / 3600), rtf=None)
    out = capsys.readouterr().out
    assert "mixed" in out and "388.24" in out


def test_score_several_files_and_without_out(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [write_lines(tmp_path / f"{name}.jsonl", [result_line(i, errors) for i in range(4)])
             for name, errors in (("one", 1), ("two", 3))]
    run("--score", *paths)
    out = capsys.readouterr().out
    assert re.search(r"one\b.*WER.*10\.00.*\n.*two\b.*WER.*30\.00", out)
    assert sorted(os.listdir()) == ["one.jsonl", "two.jsonl"]
    run("--score", *paths, "--out", "out", "--bootstrap", "20")
    summaries = json.load(open("out/summary.json"))
    assert [(stem, s["value"], s["low"], s["high"]) for stem, s in summaries.items()] == [
        ("one", 10, 10, 10), ("two", 30, 30, 30)]


@pytest.mark.parametrize("options, errors, units, name", [
    ([], 3, 7, "zh/1"), (["--normalizer", "default"], 3, 7, "zh/1"),
    (["--normalizer", "paper"], 5, 6, "paper/1"), (["--simplify"], 0, 7, "zh/1+t2s"),
    (["--simplify", "--normalizer", "paper"], 2, 6, "paper/1+t2s")])
def test_score_takes_normalizer_and_simplify(tmp_path, options, errors, units, name):
    """Three errors are traditional characters; don't against do not is two where contractions stay."""
    path = write_lines(tmp_path / "r.jsonl", [
        result_line(0, text="台湾大学!", hyp="臺灣大學", language="zh"),
        result_line(1, text="I don't", hyp="I do not", language="en")])
    run("--score", path, "--out", tmp_path / "out", "--bootstrap", 10, *options)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["r"]
    names = summary["normalizer"].replace(" ", "").split(",")
    assert (summary["errors"], summary["units"]) == (errors, units)
    assert name in names and names == sorted(names)


def test_score_nothing_to_score(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", [result_line(0, text=None), failed_line(1)])
    run("--score", path, "--out", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["r"]
    assert [summary[key] for key in ("value", "low", "high")] == [None] * 3
    assert [summary[key] for key in ("n", "scored", "failed", "errors", "units")] == [2, 0, 1, 0, 0]


def test_score_interval_follows_bootstrap(tmp_path):
    rng = np.random.default_rng(4)
    errors = rng.integers(0, 9, 40).tolist()
    path = write_lines(tmp_path / "r.jsonl", map(result_line, range(40), errors))
    found = {}
    for draws in (50, 10_000):
        run("--score", path, "--out", tmp_path / "out", "--bootstrap", draws, "--overwrite")
        found[draws] = json.loads((tmp_path / "out" / "summary.json").read_text())["r"]
        assert (found[draws]["low"], found[draws]["high"]) == evaluation.bootstrap(errors, [10] * 40, draws)
    assert found[50]["low"] != found[10_000]["low"] < found[10_000]["value"] < found[10_000]["high"]
    run("--score", path, "--out", tmp_path / "out", "--overwrite")     # 10,000 draws are the default
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["r"] == found[10_000]


@pytest.mark.parametrize("lines, message", [
    ([result_line(0), manifest_line(1)], r"r\.jsonl:2"), (["{broken"], r"r\.jsonl:1"), ([], r"r\.jsonl")])
def test_score_refuses_what_is_no_result_file(tmp_path, lines, message):
    path = tmp_path / "r.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    with pytest.raises(InputError, match=message):
        run("--score", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "summary.json").exists()


def test_score_refuses_equal_stems(tmp_path):
    paths = [write_lines(tmp_path / name / "r.jsonl", [result_line(0)]) for name in "ab"]
    with pytest.raises(InputError, match="'r'"):
        run("--score", *paths, "--out", tmp_path / "out")


@pytest.mark.parametrize("argv", [
    [], ["--data", "x.jsonl"], ["--model", "m"], ["--score"], ["--compare", "x.jsonl"],
    ["--compare", "x.jsonl", "x.jsonl", "x.jsonl"],
    ["--model", "m", "--data", "x.jsonl", "--score", "x.jsonl"],
    ["--score", "x.jsonl", "--compare", "x.jsonl", "x.jsonl"], ["--score", "x.jsonl", "--data", "x.jsonl"],
    ["--compare", "x.jsonl", "x.jsonl", "--data", "x.jsonl"],
    ["--score", "x.jsonl", "--normalizer", "other"], ["--score", "x.jsonl", "--bootstrap", "-1"]])
def test_one_of_model_score_and_compare(tmp_path, monkeypatch, argv):
    """The file that is named is fit for --score and --compare, so only the combination can be at fault."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "x.jsonl", [result_line(0)])
    with pytest.raises((SystemExit, InputError)) as caught:
        run(*argv)
    assert caught.type is InputError or caught.value.code == 2
    assert "m:" not in str(caught.value) and os.listdir() == ["x.jsonl"]


# ------------------------------------------------------------------------------------------------------------
# Clips that cannot be decoded
# ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture
def clips(tmp_path):
    """Manifest lines of three good clips, and of four bad: text, half a file, no file, a wrong duration."""
    good = []
    for i, seconds in enumerate((0.5, 0.9, 0.3)):
        soundfile.write(tmp_path / f"good{i}.wav", noise(seconds, seed=i).numpy(), 16_000)
        good.append(dict(audio=f"good{i}.wav", duration=seconds, text=f"clip {i}", language="en", speaker=i))
    (tmp_path / "not_audio.wav").write_text("no audio " * 100)
    whole = (tmp_path / "good1.wav").read_bytes()
    (tmp_path / "truncated.wav").write_bytes(whole[:len(whole) // 2])
    defects = [("not_audio.wav", 0.7), ("truncated.wav", 0.9), ("missing.wav", 0.4), ("good0.wav", 2.0)]
    bad = [dict(audio=name, duration=seconds, text="bad clip", language="en", speaker=9)
           for name, seconds in defects]
    return good, bad


CAPS = ["--max-new-tokens", 6, "--bootstrap", 50]


def evaluate(model_folder, path, out):
    """Through run_script, as the command does. → exit status, result lines, summary"""
    status = 0
    try:
        data.run_script(evaluation.main, evaluation.parse_args(list(map(str, [
            "--model", model_folder, "--data", path, "--out", out, *CAPS]))))
    except SystemExit as exit:
        status = exit.code
    summary, = json.loads((out / "summary.json").read_text()).values()
    lines = (out / os.path.basename(path)).read_text(encoding="utf-8").splitlines()
    return status, [json.loads(line) for line in lines], summary


def test_undecodable_clip_is_reported_counted_and_nothing_else(model_folder, clips, tmp_path, capsys):
    good, bad = clips
    path = write_lines(tmp_path / "m.jsonl", [good[0], bad[0], *good[1:]])
    status, lines, summary = evaluate(model_folder, path, tmp_path / "with")
    err = capsys.readouterr().err
    assert status == 1 and "m.jsonl:2" in err and "not_audio.wav" in err and "Traceback" not in err
    assert "m.jsonl:1" not in err and "m.jsonl:3" not in err
    path = write_lines(tmp_path / "other" / "m.jsonl",
                       [{**line, "audio": "../" + line["audio"]} for line in good])
    without_status, without_lines, without = evaluate(model_folder, path, tmp_path / "without")
    assert without_status == 0 and without["failed"] == 0 and without["n"] == 3
    assert (summary["n"], summary["scored"], summary["failed"]) == (4, 3, 1)
    changed = ("n", "failed", "rtf")
    assert all(summary[key] == without[key] for key in summary if key not in changed)
    assert summary["rtf"] > 0 and without["rtf"] > 0 and math.isfinite(summary["rtf"])
    assert summary["normalizer"] == ENGLISH and summary["units"] == 6
    failed = lines.pop(1)
    assert lines == without_lines and all("hyp" in line and "error" not in line for line in lines)
    error = failed.pop("error")
    assert isinstance(error, str) and error and "\n" not in error
    assert failed == {**bad[0], "audio": "../not_audio.wav"}


def test_every_kind_of_undecodable_clip(model_folder, clips, tmp_path, capsys):
    good, bad = clips
    path = write_lines(tmp_path / "m.jsonl", [*bad, good[0]])
    status, lines, summary = evaluate(model_folder, path, tmp_path / "out")
    err = capsys.readouterr().err
    assert status == 1 and (summary["n"], summary["failed"], summary["scored"]) == (5, 4, 1)
    assert all(f"m.jsonl:{number}" in err for number in (1, 2, 3, 4)) and "m.jsonl:5" not in err
    assert [("error" in line, "hyp" in line) for line in lines] == [(True, False)] * 4 + [(False, True)]
    assert summary["hours"] == pytest.approx(0.5 / 3600)
    capsys.readouterr()
    run("--score", tmp_path / "out" / "m.jsonl", "--out", tmp_path / "again", "--bootstrap", 50)
    again = json.loads((tmp_path / "again" / "summary.json").read_text())["m"]
    assert again == {**summary, "rtf": None}                        # rescoring says the same
    with pytest.raises(InputError, match=r"\.wav|m\.jsonl:\d"):
        run("--compare", tmp_path / "out" / "m.jsonl", tmp_path / "out" / "m.jsonl")


def test_nothing_but_undecodable_clips(model_folder, clips, tmp_path):
    path = write_lines(tmp_path / "m.jsonl", clips[1][:2])
    status, lines, summary = evaluate(model_folder, path, tmp_path / "out")
    assert status == 1 and (summary["n"], summary["failed"], summary["scored"]) == (2, 2, 0)
    assert summary["value"] is summary["low"] is summary["high"] is None and len(lines) == 2


def test_old_error_does_not_outlive_a_repair(model_folder, clips, tmp_path):
    path = write_lines(tmp_path / "m.jsonl", [{**clips[0][0], "error": "is damaged"}])
    status, (line,), summary = evaluate(model_folder, path, tmp_path / "out")
    assert status == 0 and "error" not in line and summary["failed"] == 0 and summary["scored"] == 1


def test_without_out_a_bad_clip_still_fails(model_folder, clips, tmp_path, capsys):
    for number, keep in enumerate((("audio", "duration", "text"), ("audio", "duration"))):     # decoded only
        lines = [{key: line[key] for key in keep} for line in (clips[0][0], clips[1][0])]
        path = write_lines(tmp_path / f"m{number}.jsonl", lines)
        with pytest.raises(SystemExit) as caught:
            data.run_script(evaluation.main, evaluation.parse_args(list(map(str, [
                "--model", model_folder, "--data", path, *CAPS]))))
        captured = capsys.readouterr()
        assert caught.value.code == 1 and f"m{number}.jsonl:2" in captured.err and captured.out


def test_model_takes_normalizer(model_folder, clips, tmp_path):
    good = [{**line, "text": "Don't"} for line in clips[0]]
    path = write_lines(tmp_path / "m.jsonl", good)
    for options, units, name in (([], 6, ENGLISH), (["--normalizer", "paper"], 3, "paper/1")):
        run("--model", model_folder, "--data", path, "--out", tmp_path / name, *CAPS, *options)
        summary = json.loads((tmp_path / name / "summary.json").read_text())["m"]
        assert (summary["units"], summary["normalizer"]) == (units, name)


@pytest.mark.parametrize("there", ["results", "a file of that stem", "a run"])
def test_an_out_folder_in_use_is_refused(there, model_folder, clips, tmp_path):
    """By --model and by --score, before anything slow, with nothing changed; --overwrite replaces results, but
    not a training run's or a model's files."""
    path, out = write_lines(tmp_path / "m.jsonl", clips[0]), tmp_path / "out"
    commands = [["--model", model_folder, "--data", path, *CAPS], ["--score", out / "m.jsonl"]]
    run(*commands[0], "--out", out)
    if there == "a run":
        (out / "config.json").write_text("{}")
    if there == "a file of that stem":
        (out / "summary.json").unlink()
        commands.pop()
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in out.iterdir()}
    for command in (*commands, *([*command, "--overwrite"] for command in commands if there == "a run")):
        with pytest.raises(InputError, match="--out .*choose another"):
            run(*command, "--out", out)
        assert before == {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in out.iterdir()}
    for command in commands if there != "a run" else ():
        (out / "summary.json").write_text("{}")
        run(*command, "--out", out, "--overwrite")
        assert json.loads((out / "summary.json").read_text())["m"]["scored"] == 3


def test_two_processes_write_what_one_writes(model_folder, clips, tmp_path):
    good, bad = clips
    paths = [write_lines(tmp_path / "m.jsonl", [bad[1], *good, bad[0]]),
             write_lines(tmp_path / "one.jsonl", good[:1])]        # one rank has nothing to do
    command = ["--model", model_folder, "--data", *paths, *CAPS]
    with pytest.raises(SystemExit) as caught:
        run(*command, "--out", tmp_path / "1")
    assert caught.value.code == 1
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, "eval.py", *map(str, command), "--out", str(tmp_path / "2")], cwd=ROOT,
                          capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1, done.stderr[-3000:]
    assert "m.jsonl:1" in done.stderr and "m.jsonl:5" in done.stderr
    for name in ("m.jsonl", "one.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    one, two = (json.loads((tmp_path / n / "summary.json").read_text()) for n in "12")
    assert one["m"]["failed"] == 2 and list(one) == list(two) == ["m", "one"]
    for stem in one:
        assert one[stem].pop("rtf") > 0 and two[stem].pop("rtf") > 0
    assert one == two


def real(folder):
    reason = f"real data, {DATA / folder}, is not there; set ASR_OPD_DATA"
    return pytest.mark.skipif(not (DATA / folder).is_dir(), reason=reason)


@real("edge")
def test_real_files_that_cannot_be_decoded(model_folder, tmp_path, capsys):
    names = ["wav_s16_16k.wav", "not_audio.wav", "truncated_half.wav", "empty_file.wav", "zero_samples.wav",
             "float_nan.wav", "opus_16k.opus", "mislabelled_flac_as.wav"]
    path = write_lines(tmp_path / "edge.jsonl", [
        dict(audio=str(DATA / "edge" / name), duration=2.435, language="en",
             text="the old man made a sign in the affirmative") for name in names])
    status, lines, summary = evaluate(model_folder, path, tmp_path / "out")
    assert status == 1 and (summary["n"], summary["failed"], summary["scored"]) == (8, 5, 3)
    assert [i for i, line in enumerate(lines) if "hyp" in line] == [0, 6, 7] and summary["units"] == 27
    err = capsys.readouterr().err
    assert all((name in err) == ("hyp" not in line) for name, line in zip(names, lines))


@real("aishell_sample")
def test_real_texts_with_other_punctuation_are_no_errors(tmp_path):
    """Characters apart, full stops, zero-width characters and another case change no unit."""
    lines = (DATA / "aishell_sample" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    for text in [json.loads(line)["text"] for line in lines[:400]]:
        counts = evaluation.count_errors(text, "，" + " ".join(text.upper()) + "\u200b。", "zh")
        assert counts["errors"] == 0 and counts["units"] == sum(map(str.isalnum, text))


def test_lines_that_were_not_decoded_teach_nothing(clips_dir, tmp_path, capsys):
    """A result file with an undecodable clip is teacher data all the same; the clip is counted."""
    import sft
    tiny_model().save_pretrained(tmp_path / "model")
    lines = [json.loads(line) for line in open(clips_dir / "m.jsonl")]
    results = [{**line, "hyp": line["text"], "stopped": True} for line in lines]
    results[3] = {**lines[3], "error": "is damaged"}
    (clips_dir / "td.jsonl").write_text("".join(json.dumps(line) + "\n" for line in results))
    sft.main(sft.parse_args([str(x) for x in (
        "--train", clips_dir / "td.jsonl", "--text-field", "hyp", "--model", tmp_path / "model", "--steps", 1,
        "--batch-size", 4, "--workers", 0, "--out", tmp_path / "run")]))
    assert "train: 11 clips" in (shown := capsys.readouterr().out) and "1 not decoded" in shown


def test_scored_in_another_language_is_another_set_and_odd_lines_are_no_hypotheses(tmp_path):
    """Characters and words do not compare; a null hyp beside an error is a failed clip."""
    lines = [dict(audio="a.wav", duration=1.0, text="你好", hyp="你", stopped=True, language=x) for x in ("zh", "en")]
    for name, line in zip("ab", lines):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    a, b = (evaluation.score(evaluation.read_results(tmp_path / f"{name}.jsonl")) for name in "ab")
    with pytest.raises(InputError, match="another text or language"):
        evaluation.compare(a, b)
    odd = dict(lines[0], hyp=None, error="is damaged")
    (tmp_path / "c.jsonl").write_text(json.dumps(odd) + "\n")
    summary = evaluation.summarize(evaluation.score(evaluation.read_results(tmp_path / "c.jsonl")))
    assert (summary["n"], summary["failed"], summary["scored"], summary["value"]) == (1, 1, 0, None)
    assert evaluation.bootstrap([0] * 50 + [1], [0] * 50 + [1], 1, seed=1) in ((None, None), (100.0, 100.0))
