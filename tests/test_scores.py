"""Scores of eval.py: normalisation by table, errors, summaries, intervals, --compare, --score."""

import importlib.metadata
import json
import math

import numpy as np
import pytest
import scipy.stats
from coverage import simulate_pairs
from runs import write_lines

import eval as evaluation
from data import Clip, InputError

ENGLISH = f"en/3-whisper-{importlib.metadata.version('whisper-normalizer')}"
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # man, woman, girl, joined by ZWJ
KEYCAP = "5\ufe0f\u20e3"  # the 5 key
THUMB = "\U0001f44d\U0001f3fd"  # thumbs up with a skin tone

# ---- Normalisation. Units stand with blanks between them. --------------------------------------------------
DEFAULT = [  # language, text, units
    ("en", "Hello, World!", "hello world"),
    ("en", "２５％", "25%"),
    ("en", "I don’t, don‘t, donʼt, donʻt, don`t, don´t, don′t", "i " + "do not " * 6 + "do not"),
    ("en", "Mr. and Mrs. Smith met Dr. Jones", "mister and missus smith met doctor jones"),
    ("en", "[noise] hello (laughs) <unk>", "hello"),
    ("en", "3.5... or 3.", "3.5 or 3"),
    ("en", "\ufeffhel\u200blo under\u00adstand", "hello understand"),
    ("en", "press " + KEYCAP + " ❤\ufe0f " + THUMB, "press 5"),
    ("zh", "今天 天气\n很\t好。", "今 天 天 气 很 好"),
    ("zh", "，。！？、《》；：“”‘’（）【】——……·～", ""),
    ("zh", "Wi-Fi 密码是 abc", "w i f i 密 码 是 a b c"),
    ("zh", "百分之五十", "百 分 之 五 十"),  # numbers stay as they are written
    ("zh", "好" + FAMILY + "的" + THUMB, "好 的"),
    ("zh", "𠮷野家", "𠮷 野 家"),  # beyond U+FFFF, one unit
    ("zh", "\uf90a\u2f00", "金 一"),  # compatibility ideograph, radical
    ("ja", "ｶﾞｲﾄﾞ・か\u3099", "ガ イ ド が"),  # half-width and decomposed voiced kana
    ("ko", "\u1112\u1161\u11ab\u1100\u1173\u11af", "한 글"),  # decomposed syllables
    ("fr", "aujourd’hui, ça va ?", "aujourd hui ça va"),
    ("tr", "I\u0307zmir Iğdır’ın", "izmir ığdır ın"),
    ("tr", "ş < 3 > 2", "ş 3 2"),  # a comparison is no tag
    (None, "Hello, don't! Café 3.5", "hello don t café 3 5"),  # no language: plain words, not English
    ("km", "ភាសា\u200bខ្មែរ។", "ភ ា ស ា ខ ្ ម ែ រ"),
    ("hi", "हिन्दी है। क\u094d\u200dष", "हिन्दी है क\u094dष"),  # vowel signs stay
]
STYLES = [  # language, style, text, units
    ("en", "paper", "Don't stop, it's 5 o'clock!", "dont stop its 5 oclock"),
    ("tr", "paper", "İzmir'in ISISI", "izmirin ısısı"),
    ("en", "paper", "hel\u200blo " + THUMB + " " + KEYCAP, "hello 5"),
    ("zh", "paper", "你好，世界！ OK", "你 好 世 界 o k"),
    ("zh", "paper", "５０％", "５ ０"),  # no NFKC
    ("zh", "default+t2s", "頭髮、發現，後來", "头 发 发 现 后 来"),
    ("zh", "default+t2s", "乾燥的乾坤", "干 燥 的 乾 坤"),  # by phrase: 乾 stays in 乾坤
    ("zh", "default+t2s", "看著名著，看着名著", "看 着 名 着 看 着 名 着"),  # 著 and 着 are one
    ("zh", "default+t2s", "衞生，甚麼，麻痺", "卫 生 什 么 麻 痹"),
    ("zh", "paper+t2s", "臺灣！", "台 湾"),
    ("ja", "default+t2s", "廣島", "廣 島"),  # zh and yue only
]


@pytest.mark.parametrize("language, text, units", DEFAULT)
def test_normalize(language, text, units):
    assert evaluation.normalize(text, language) == units.split()


@pytest.mark.parametrize("language, style, text, units", STYLES)
def test_normalize_in_other_styles(language, style, text, units):
    assert evaluation.normalize(text, language, style) == units.split()


# ---- Errors ------------------------------------------------------------------------------------------------


ERRORS = [  # language, reference, hypothesis; substitutions, deletions, insertions, units
    ("en", "The cat, sat!", "the  CAT sat.", (0, 0, 0, 3)),  # both sides are normalised
    ("en", "big cat sat on the mat today", "so big bat sat on mat today", (1, 1, 1, 7)),
    ("en", "", "hello there you", (0, 0, 3, 0)),
    ("zh", "今天，天气很好。", "今天 天汽 很好", (1, 0, 0, 6)),
    ("ko", "한국어 문장", "한국 문장", (0, 1, 0, 5)),
]


@pytest.mark.parametrize("language, reference, hypothesis, counts", ERRORS)
def test_count_errors_by_hand(language, reference, hypothesis, counts):
    names = ("substitutions", "deletions", "insertions", "units")
    expected = {"errors": sum(counts[:3]), **dict(zip(names, counts))}
    assert evaluation.count_errors(reference, hypothesis, language) == expected


def test_looping():
    assert not evaluation.looping("")
    assert not evaluation.looping("the old man made a sign, no no no")
    assert evaluation.looping("the cat " * 30)
    # 48 bytes are 2.4 times what zlib makes of them; that they are 16 characters does not count.
    assert not evaluation.looping("好吧" * 7)
    assert evaluation.looping("好吧" * 8)


# ---- Result files ------------------------------------------------------------------------------------------

WORDS = "anna bert carl dora emil fritz gerd hans ida jan kurt lena".split()


def result_line(i, errors=0, units=10, **changed):
    """A result line of clip i: the first `errors` of `units` German words are missing."""
    line = {"audio": f"{i}.wav", "duration": 36.0, "text": " ".join(WORDS[:units]), "language": "de"}
    return {**line, "hyp": " ".join(WORDS[errors:units]), "stopped": True, **changed}


def write_rows(folder, rows, column):
    """Result files of a folder, one for each set of rows, with the errors of that column.

    A row is (set, speaker, clip, errors of each file …, units).
    """
    lines = {}
    for row in rows:
        line = result_line(0, row[column], row[-1], audio=f"/clips/{row[0]}-{row[2]}.wav", speaker=row[1])
        lines.setdefault(row[0], []).append(line)
    for name, own in lines.items():
        write_lines(folder / f"{name}.jsonl", own)
    return str(folder)


def write_pair(folder, rows):
    return write_rows(folder / "a", rows, 3), write_rows(folder / "b", rows, 4)


def run(*argv):
    return evaluation.main(evaluation.parse_args([str(argument) for argument in argv]))


def stored(path):
    """The figures of a JSON file, which must be strict."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)


# ---- Summaries and clusters --------------------------------------------------------------------------------


def test_score_recounts_and_sums_up(tmp_path, capsys):
    """Lines of every kind. The counts they carry are not those of their texts: they must not be believed.

    A rate is errors over units, not a mean of rates, and words invented on silence count.
    """
    lines = [
        result_line(0, 2) | {"errors": 99, "units": 1, "deletions": 99},
        result_line(1, text="anna", hyp="anna " * 59 + "anna", stopped=False),
        result_line(2, text="", hyp="bert carl"),
        result_line(3, text=None, hyp="", duration=72.0, errors=5),
        result_line(4, text="anna bert", hyp=""),
        result_line(5, duration=3600.0, error="is damaged"),  # failed, whatever hyp says
        result_line(6, text="<asr_text>好的", hyp="好", language=None),  # the script decides: Chinese
        result_line(7, text="Don't", hyp="do not", language="en"),
        result_line(8, text="é", hyp="é", language=None),  # plain words: Whisper's English drops accents
    ]
    path = write_lines(tmp_path / "in" / "mixed.jsonl", lines)
    with pytest.raises(SystemExit) as stop:
        run("--score", path, "--json", tmp_path / "s.json")
    assert stop.value.code == 1  # a clip was not decoded
    # errors: 2 deletions, 59 insertions, 2 on silence, 2 deletions, 1 deletion, none, none
    counts = zip([2, 59, 2, 2, 1, 0, 0], [10, 1, 0, 2, 2, 2, 1])
    _, _, low, high, _ = brute_force([("", i, i, e, e, n) for i, (e, n) in enumerate(counts)], rate_of)
    assert stored(tmp_path / "s.json")["mixed"] == {
        "metric": "MER",
        "value": pytest.approx(100 * 66 / 18),
        "low": pytest.approx(low),
        "high": pytest.approx(high),
        "errors": 66,
        "units": 18,
        "substitutions": 0,
        "deletions": 5,
        "insertions": 61,
        "n": 9,
        "scored": 7,
        "failed": 1,
        "empty": 2,
        "looping": 1,
        "capped": 1,
        "hours": pytest.approx(0.09),
        "normalizer": f"{ENGLISH}, words/3, zh/2",
        "rtf": None,
        "clusters": 7,
        "cluster_key": "audio+offset",
    }
    _, row, *notes = capsys.readouterr().out.splitlines()
    assert row.split() == f"mixed MER 366.67 {low:.2f} to {high:.2f} 0 5 61 9 0.09 2 1 1 1 –".split()
    assert "few" in notes[-1]  # clusters


def test_metric_name_follows_the_languages():
    metrics = {"en de": "WER", "zh yue ja ko th lo my km bo": "CER", "en zh": "MER", "": "WER"}
    assert {names: evaluation.metric_name(names.split()) for names in metrics} == metrics


def test_a_set_without_a_unit_has_no_rate(tmp_path):
    """Nor has it an interval; and the clip without a text is in no cluster."""
    lines = [result_line(0, text="", hyp="", speaker=0), result_line(1, text=None, speaker=1)]
    run("--score", write_lines(tmp_path / "r.jsonl", lines), "--json", tmp_path / "s.json")
    figures = stored(tmp_path / "s.json")["r"]
    assert figures["value"] is None and figures["low"] is None
    assert figures["clusters"] == 1


def clips_with(*fields):
    clips = []
    for i, changed in enumerate(fields):
        line = {"audio": f"{i}.wav", **changed}
        clips.append(Clip(f"/d/{line['audio']}", 1.0, f"m.jsonl:{i + 1}", line, offset=line.get("offset")))
    return clips


CLUSTERS = [  # --cluster, what lines have, the values of the key
    (None, [{"speaker": 0, "recording": "r"}, {"speaker": "a"}], "speaker", ["0", "a"]),
    (None, [{"recording": "r"}, {"recording": "r", "speaker": ""}], "recording", ["r", "r"]),
    (None, [{"speaker": None}, {"audio": "0.wav"}], "audio+offset", [("/d/0.wav", None)] * 2),
    (None, [{"audio": "x", "offset": n} for n in (5, 7)], "audio+offset", [("/d/x", 5), ("/d/x", 7)]),
    ("room", [{"speaker": "a", "room": 1}, {"room": "1"}], "room", ["1", "1"]),
]


@pytest.mark.parametrize("key, fields, name, values", CLUSTERS)
def test_clusters(key, fields, name, values):
    assert evaluation.clusters_of(clips_with(*fields), key) == [(name, value) for value in values]


def test_a_line_without_the_key_of_the_others_is_refused():
    speakers = [{"speaker": "a"}, {"speaker": "b"}, {}, {"speaker": None}]
    with pytest.raises(InputError, match=r'^m\.jsonl:3: no "speaker", which intervals are clustered by'):
        evaluation.clusters_of(clips_with(*speakers))
    with pytest.raises(InputError, match=r'^m\.jsonl:1: no "room".*--cluster'):
        evaluation.clusters_of(clips_with(*speakers), "room")


# ---- The jackknife, against scoring everything again without each cluster ----------------------------------


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


def rate_of(rows, column=3):
    return 100 * sum(row[column] for row in rows) / sum(row[5] for row in rows)


def macro_of(rows):
    logs = []
    for name in {row[0] for row in rows}:
        own = [row for row in rows if row[0] == name]
        logs.append(math.log(sum(row[4] for row in own) / sum(row[3] for row in own)))
    return math.fsum(logs) / len(logs)


def brute_force(rows, statistic):
    """(value, SE, low, high, p) of a statistic of rows."""
    clusters = {row[1] for row in rows}
    n = len(clusters)
    value = statistic(rows)
    squares = []
    for name in clusters:
        squares.append((statistic([row for row in rows if row[1] != name]) - value) ** 2)
    se = math.sqrt((n - 1) / n * math.fsum(squares))
    half = scipy.stats.t.ppf(0.975, n - 1) * se
    return value, se, value - half, value + half, 2 * scipy.stats.t.sf(abs(value) / se, n - 1)


def change_by_hand(rows):
    """The figures of the relative change that a comparison has."""
    value, _, low, high, p = brute_force(rows, macro_of)
    figures = {"n": len(rows)}
    for key, log_value in (("relative", value), ("relative_low", low), ("relative_high", high)):
        figures[key] = pytest.approx(100 * (math.exp(log_value) - 1), rel=1e-9)
    figures["p"] = pytest.approx(p, rel=1e-9)
    return {**figures, "clusters": len({row[1] for row in rows}), "cluster_key": "speaker"}


def test_comparison_against_brute_force(tmp_path, capsys):
    """Every figure of three sets that share speakers, of their macro, and of the table that is printed."""
    rows = random_rows()
    rows += [("alone", "s0", i, 2, 1, 5) for i in range(3)]
    folders = write_pair(tmp_path, rows)
    run("--compare", *folders, "--json", tmp_path / "c.json")
    comparison = stored(tmp_path / "c.json")
    assert comparison == evaluation.compare_folders(*folders)
    for stem in "xyz":
        own = [row for row in rows if row[0] == stem]
        a = rate_of(own)
        b = rate_of(own, 4)
        rates = {"a": pytest.approx(a), "b": pytest.approx(b), "difference": pytest.approx(b - a)}
        assert comparison["sets"][stem] == {"metric": "WER", **rates, **change_by_hand(own)}
    alone = comparison["sets"]["alone"]
    keys = ("relative", "relative_low", "p", "clusters")
    assert [alone[key] for key in keys] == [pytest.approx(-50), None, None, 1]
    in_macro = [row for row in rows if row[0] != "alone"]
    assert comparison["macro"] == {"stems": ["x", "y", "z"], **change_by_hand(in_macro)}

    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split() == "alone WER 3 40.00 20.00 -50.0 – –".split()
    macro = comparison["macro"]
    interval = f"{macro['relative_low']:+.1f} to {macro['relative_high']:+.1f}"
    cells = f"macro – 180 – – {macro['relative']:+.1f} {interval} {macro['p']:.4f}"
    assert printed[5].split() == cells.split()
    assert printed[7:] == ["one cluster, so no interval and not in the macro: alone"]


UNDEFINED = {  # errors of A, errors of B by cluster of 10 units → relative, low, p
    "no error of A": ([0, 0], [2, 1], (None, None, None)),
    "no error without a cluster": ([0, 3], [2, 1], (None, None, None)),
    "the same everywhere": ([3, 9, 6], [1, 3, 2], (-200 / 3, -200 / 3, None)),
    "no difference": ([4, 1, 2], [4, 1, 2], (0, 0, 1)),
}


@pytest.mark.parametrize("errors_a, errors_b, expected", UNDEFINED.values(), ids=UNDEFINED)
def test_what_is_not_defined_is_null(tmp_path, errors_a, errors_b, expected):
    rows = [("y", f"s{i}", i, 3 + i, 5, 10) for i in range(4)]
    for i, (a, b) in enumerate(zip(errors_a, errors_b)):
        rows.append(("x", f"s{i}", i, a, b, 10))
    run("--compare", *write_pair(tmp_path, rows), "--json", tmp_path / "c.json")
    comparison = stored(tmp_path / "c.json")
    figures = [comparison["sets"]["x"][key] for key in ("relative", "relative_low", "p")]
    assert figures == [None if value is None else pytest.approx(value) for value in expected]
    assert (comparison["macro"]["relative"] is None) == (expected[0] is None)
    assert comparison["macro"]["stems"] == ["x", "y"]


# ---- --compare ---------------------------------------------------------------------------------------------


def test_compare_pairs_by_clip_in_any_order_and_folder(tmp_path):
    """One audio file holds two segments, one tar two byte ranges; the files lie in different folders.

    A begin_time of −1 or null is the whole file's; a language may be spelled in two ways.
    """
    clips = [
        {"audio": "0.wav"},
        {"audio": "0.wav", "begin_time": 0.0, "end_time": 2.0},
        {"audio": "deep/1.wav", "begin_time": None, "end_time": -1},
        {"audio": "0.tar", "offset": 512, "nbytes": 99},
        {"audio": "0.tar", "offset": 2048, "nbytes": 99},
    ]
    a = []
    b = []
    for i, clip in enumerate(clips):
        a.append(result_line(0, i, **{**clip, "audio": f"../../{clip['audio']}"}))
        path = f"../{clip['audio']}" if i % 2 else str(tmp_path / clip["audio"])
        b.append(result_line(0, 4, language="de-AT", **{**clip, "audio": path}))
    b[2] |= {"begin_time": -1, "end_time": None}
    first = write_lines(tmp_path / "runs" / "a" / "r.jsonl", a)
    second = write_lines(tmp_path / "b" / "r.jsonl", b[::-1])
    run("--compare", first, second, "--json", tmp_path / "c.json")
    figures = stored(tmp_path / "c.json")["sets"]["r"]
    assert (figures["n"], figures["a"], figures["b"]) == (5, 20, 40)
    assert figures["clusters"] == 4 and figures["cluster_key"] == "audio+offset"  # two files, two of the tar


def test_another_key_and_normalizer(tmp_path):
    """A writes don't as do not: no error by default, two errors of two units in the paper's style."""
    for name, hyp in (("a", "I do not"), ("b", "i dont")):
        lines = []
        for i in range(6):
            text = {"text": "I don't", "hyp": hyp, "language": "en"}
            lines.append(result_line(i, speaker="s", room=i // 2, **text))
        write_lines(tmp_path / f"{name}.jsonl", lines)
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for normalizer, rates in (("default", [0, 200 / 3]), ("paper", [100, 0])):
        flags = ["--normalizer", normalizer, "--cluster", "room", "--json", tmp_path / "c.json"]
        run("--compare", *paths, *flags)
        figures = stored(tmp_path / "c.json")["sets"]["a"]
        assert [figures["a"], figures["b"]] == pytest.approx(rates)
        assert (figures["clusters"], figures["cluster_key"]) == (3, "room")


@pytest.mark.parametrize("flag, errors, name", [([], 3, "zh/2"), (["--simplify"], 0, "zh/2+t2s/2")])
def test_score_simplifies(tmp_path, flag, errors, name):
    line = result_line(0, text="台湾大学!", hyp="臺灣大學", language="zh")
    run("--score", write_lines(tmp_path / "r.jsonl", [line]), "--json", tmp_path / "s.json", *flag)
    summary = stored(tmp_path / "s.json")["r"]
    assert (summary["errors"], summary["units"], summary["normalizer"]) == (errors, 4, name)


UNPAIRED = {
    "only in A": ([0, 1, 77], [0, 1], r"a\.jsonl:3: .*77\.wav is not in .*b\.jsonl"),
    "only in B": ([0, 1], [0, 77, 1], r"b\.jsonl:2: .*77\.wav is not in .*a\.jsonl"),
    "twice": ([0, 1, 77, 77], [0, 1, 77], r"a\.jsonl:4: 77\.wav is there twice"),
    "other text": ([77], [result_line(77, text="anna bert")], "77.wav is not in .* with the same text"),
    "other speaker": ([result_line(7, speaker="x")], [result_line(7, speaker="y")], "is not in .* cluster"),
    "failed": (
        [0, 77],
        [0, result_line(77, error="bad")],
        r"a\.jsonl:2: 77\.wav is not in .*b\.jsonl, decoded and",
    ),
    "no hyp": ([77], [{"audio": "77.wav", "duration": 36.0}], r"b\.jsonl:1: neither"),
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


# ---- Coverage by simulation; `python tests/coverage.py` has the whole grid ---------------------------------


@pytest.mark.parametrize("n_speakers, is_balanced", [(6, False), (12, True), (40, False)])
def test_intervals_cover_the_truth(n_speakers, is_balanced):
    """Nominal 95 % is 90 % or more, and a null pair is rejected in 3 to 8 %, but for six unequal speakers.

    Those are at the edge: 89.9 % of a rate, and 8.8 % of null pairs.
    """
    shares = simulate_pairs(n_speakers, True, is_balanced)
    slack = 0.01 if n_speakers == 6 else 0
    assert shares["rate"] >= 0.90 - slack and shares["change"] >= 0.90
    assert 0.03 <= shares["null change"] <= 0.08 + slack


# ---- The flags ---------------------------------------------------------------------------------------------


FLAGS = """--data x.jsonl
--model m
--score x.jsonl --compare x.jsonl x.jsonl
--score x.jsonl --out y"""


@pytest.mark.parametrize("argv", FLAGS.splitlines())
def test_flags_without_meaning_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluation.parse_args(argv.split())
    assert caught.value.code == 2 and "error: " in capsys.readouterr().err
