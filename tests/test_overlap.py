"""overlap.py: each measure by hand and against plain Python, the baselines, the tables, the pictures."""

import dataclasses
import json
import math
import sys
import types

import numpy as np
import pytest
import soundfile
import torch
from conftest import SPECIALS, byte_tokenizer, noise, tiny_model
from runs import lines_of, run_on_cpu, run_ranks, write_clip, write_lines

import data
import overlap
from data import Clip, InputError, collate, load_audio, read_manifest
from model import Rollout, SpeechLM, align_vocabularies, top_ids

CPU = torch.device("cpu")
V = 120  # of the student; the last of its text tokens is unknown to the teacher
K = 5
LENS = [8, 2, 0, 4]  # tokens that the student writes of the four clips; the cap cut the first
STOPPED = [False, True, True, True]
N = 8 + 3 + 1 + 5  # rows: the stop token is one where it was written
TEACHER_LENS = [8, 3, 0, 1]
TEACHER_STOPPED = [True, True, True, True]
MEASURES = [
    "vuss",
    "vuss_1",
    "vuss_2",
    "vuss_4",
    "n_student",
    "n_teacher",
    "overlap_ratio",
    "jaccard",
    "top1",
    "mass_student",
    "mass_teacher",
    "advantage",
    "entropy_gap",
    "kl_union",
    "kl_full",
    "teacher_logp",
    "first_student",
    "first_teacher",
]
BASELINES = ["error_student", "error_teacher", "error_gap", "error_between", "token_agreement", "trigram_f1"]


@pytest.fixture(autouse=True, scope="module")
def on_cpu():
    yield from run_on_cpu()


# ----------------------------------------------------------------------------------------------------------
# One row by hand, all measures in plain Python
# ----------------------------------------------------------------------------------------------------------


def test_invalid_ids_and_disjoint_sets():
    """A second row has three ids on one side and one on the other, none in common; a third has none."""
    student_topk = torch.tensor([[2, 0, 1], [2, 0, 1], [-1, -1, -1]])
    teacher_topk = torch.tensor([[2, 1, 3], [3, -1, -1], [-1, -1, -1]])
    support_mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 4 + [False] * 2, [False] * 6])
    values = overlap.set_overlap(student_topk, teacher_topk, support_mask)
    assert {name: value.tolist() for name, value in values.items()} == {
        "vuss": [4, 4, 0],
        "vuss_1": [1, 2, 0],
        "vuss_2": [3, 3, 0],
        "n_student": [3, 3, 0],
        "n_teacher": [3, 1, 0],
        "overlap_ratio": [2 / 3, 0, 0],
        "jaccard": [0.5, 0, 0],
        "top1": [1, 0, 0],
    }
    student_logits = torch.tensor([[1.0, 0.5, 2.0, 0.0, -math.inf]] * 3)
    teacher_logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, -math.inf]] * 3)
    token_ids = torch.tensor([2, 0, 3])
    values = overlap.probability_overlap(
        student_logits, teacher_logits, student_topk, teacher_topk, token_ids
    )
    assert all(value.isfinite().all() for value in values.values())
    for name in ("mass_student", "mass_teacher", "advantage"):
        assert values[name][1] == 0 and values[name][0] != 0
    z = math.log(1 + math.e + math.e**2 + math.e**3)
    assert values["teacher_logp"].tolist() == pytest.approx([2 - z, -z, 3 - z])
    assert values["first_teacher"].tolist() == pytest.approx([math.exp(2 - z)] * 3)


def random_topk(rng, n_rows, k, has_invalid):
    """Lists of k different ids of 15; with has_invalid a random number of −1 at their end."""
    rows = []
    for _ in range(n_rows):
        ids = rng.permutation(15)[:k]
        if has_invalid:
            ids[rng.integers(k + 1) :] = -1
        rows.append(ids.tolist())
    return torch.tensor(rows)


@pytest.mark.parametrize("has_invalid", [False, True])
def test_nested_vuss_against_sets(has_invalid):
    rng = np.random.default_rng(0)
    student_topk = random_topk(rng, 20, 12, has_invalid)
    teacher_topk = random_topk(rng, 20, 12, has_invalid)
    values = overlap.nested_vuss(student_topk, teacher_topk)
    assert list(values) == ["vuss_1", "vuss_2", "vuss_4", "vuss_8"]
    for k in (1, 2, 4, 8):
        unions = []
        for S, T in zip(student_topk.tolist(), teacher_topk.tolist()):
            unions.append(len((set(S[:k]) | set(T[:k])) - {-1}))
        assert values[f"vuss_{k}"].tolist() == unions
        assert len(set(unions)) > 1


def test_vuss_is_overlap_ratio_in_other_words():
    """VUSS = k (2 − overlap ratio) where no id is invalid; and there is no k below 1."""
    rng = np.random.default_rng(1)
    for k in (1, 6):
        student_topk = random_topk(rng, 20, k, has_invalid=False)
        teacher_topk = random_topk(rng, 20, k, has_invalid=False)
        _, support_mask = overlap.union_support(student_topk, teacher_topk)
        values = overlap.set_overlap(student_topk, teacher_topk, support_mask)
        assert values["vuss"].tolist() == pytest.approx((k * (2 - values["overlap_ratio"])).tolist())
        assert [name for name in values if name.startswith("vuss_")] == [
            f"vuss_{j}" for j in (1, 2, 4) if j < k
        ]


class StubModel:
    """A vocabulary, a random output matrix, and hidden rows that are a function of their position."""

    architecture = "Stub"

    def __init__(self, vocabulary, seed, n_rows, lens, stopped, k):
        self.head = torch.nn.Linear(16, n_rows, bias=False)
        weight = torch.randn(n_rows, 16, generator=torch.Generator().manual_seed(seed))
        self.head.weight.data.copy_(weight)
        self.forbidden = torch.arange(n_rows) >= len(vocabulary)
        self.device = CPU
        self.lens = torch.tensor(lens)
        self.stopped = torch.tensor(stopped)
        self.k = k  # the k that it must be asked for
        self.seed = seed
        self.texts_read = []
        self.front_end = types.SimpleNamespace(
            tokenizer=types.SimpleNamespace(get_vocab=lambda: vocabulary),
            stop_id=vocabulary["stop"],
            pad_id=0,
            frame_multiple=8,
            languages={},
            n_audio_tokens=data.n_audio_tokens,
            features=data.log_mel,
            prompt=lambda n_audio, language, context: [1],
            texts=lambda rollout: [f"{n} tokens" for n in rollout.lens.tolist()],
            encode_text=lambda text: [vocabulary[token] for token in text.split()],
            decode=lambda ids: " ".join(f"t{i}" for i in ids),
        )

    def to(self, device):
        return self

    def eval(self):
        return self

    def encode(self, batch):
        return len(batch.seconds)

    def sample(self, batch, max_new_tokens, k, tokens_per_second, forbidden, encoded):
        """The clips of 1, 2, 3, 4 tenths of a second have transcripts of `lens` random tokens."""
        assert (max_new_tokens, k, tokens_per_second, encoded) == (800, self.k, 25.0, len(batch.seconds))
        places = [round(10 * seconds) - 1 for seconds in batch.seconds.tolist()]
        vocabulary = self.front_end.tokenizer.get_vocab()
        ids = torch.tensor([[vocabulary[f"t{i}"] for i in row] for row in self.drawn_tokens()])
        for b, n in enumerate(self.lens.tolist()):
            ids[b, n] = self.front_end.stop_id
        T = int((self.lens + self.stopped).max())
        rollout = Rollout(ids[places, :T], self.lens[places], self.stopped[places])
        hidden = self.hidden(torch.ones_like(rollout.ids, dtype=torch.bool))
        logits = self.head(hidden).masked_fill(forbidden, -math.inf)
        rollout.topk_ids = top_ids(logits, k).reshape(len(places), T, k)
        return rollout

    def drawn_tokens(self):
        """4 × 9 numbers of tokens, without the stop tokens; every other one is the same for all models."""
        numbers = np.random.default_rng(10 + self.seed).integers(V - 2, size=(4, 9))
        numbers[:, ::2] = np.random.default_rng(9).integers(V - 2, size=(4, 5))
        return numbers.tolist()

    def __call__(self, batch, rollout, encoded=None):
        return self.hidden(rollout.row_mask())

    def hidden(self, row_mask):
        """(N, 16) of the row's position in its transcript."""
        positions = row_mask.nonzero()[:, 1]
        return torch.sin(torch.outer(1.0 + positions, torch.arange(1.0, 17.0)))

    def with_script_languages(self, batch, texts):
        self.texts_read += texts
        return batch


@pytest.fixture
def student():
    vocabulary = {f"t{i}": i for i in range(V - 1)}
    return StubModel({**vocabulary, "stop": V - 1}, 0, V, LENS, STOPPED, K)


@pytest.fixture
def teacher(student):
    """The same tokens in another order but for t118, similar scores, and rows beyond the vocabulary."""
    order = np.random.default_rng(0).permutation(V - 1).tolist()
    tokens = [*(f"t{i}" for i in range(V - 2)), "stop"]
    model = StubModel(dict(zip(tokens, order)), 1, V + 3, TEACHER_LENS, TEACHER_STOPPED, 1)
    shared = [*range(V - 2), V - 1]
    model.head.weight.data[order] += 2 * student.head.weight.data[shared]
    return model


@pytest.fixture
def clips(tmp_path):
    clips = []
    for i in range(4):
        path = tmp_path / f"{i}.wav"
        soundfile.write(path, noise((i + 1) / 10, seed=i).numpy(), 16_000, subtype="FLOAT")
        clips.append(Clip(str(path), (i + 1) / 10, f"m:{i}", {}))
    return clips


def in_plain_python(student_logits, teacher_logits, token, k=K):
    """The measures of one row from its logits over the ids {id: logit} that both models may write."""
    ids = sorted(student_logits)
    z_q = math.log(sum(math.exp(x) for x in student_logits.values()))
    z_p = math.log(sum(math.exp(x) for x in teacher_logits.values()))
    q = {i: math.exp(student_logits[i] - z_q) for i in ids}
    p = {i: math.exp(teacher_logits[i] - z_p) for i in ids}
    student_order = sorted(ids, key=lambda i: -q[i])
    teacher_order = sorted(ids, key=lambda i: -p[i])
    S = student_order[:k]
    T = teacher_order[:k]
    union = set(S) | set(T)
    both = set(S) & set(T)
    mass_q = sum(q[i] for i in both)
    mass_p = sum(p[i] for i in both)
    union_q = sum(q[i] for i in union)
    union_p = sum(p[i] for i in union)
    advantage = sum(q[i] / mass_q * math.log(p[i] / mass_p * mass_q / q[i]) for i in both)
    return {
        "vuss": len(union),
        "vuss_1": len({S[0], T[0]}),
        "vuss_2": len({*S[:2], *T[:2]}),
        "vuss_4": len({*S[:4], *T[:4]}),
        "n_student": k,
        "n_teacher": k,
        "overlap_ratio": len(both) / k,
        "jaccard": len(both) / len(union),
        "top1": float(S[0] == T[0]),
        "mass_student": mass_q,
        "mass_teacher": mass_p,
        "advantage": advantage / max(len(both), 1),
        "entropy_gap": abs(sum(q[i] * math.log(q[i]) - p[i] * math.log(p[i]) for i in ids)),
        "kl_union": sum(p[i] / union_p * math.log(p[i] / union_p * union_q / q[i]) for i in union),
        "kl_full": sum(p[i] * math.log(p[i] / q[i]) for i in ids),
        "teacher_logp": math.log(p[token]),
        "first_student": q[S[0]],
        "first_teacher": p[S[0]],
    }


def rows_in_plain_python(student, teacher, writer):
    """The measures of each row of the transcripts that the stub `writer` writes, clip by clip."""
    row_mask = torch.arange(9) < (writer.lens + writer.stopped)[:, None]
    student_rows = student.head(student.hidden(row_mask)).double().tolist()
    teacher_rows = teacher.head(teacher.hidden(row_mask)).double().tolist()
    student_vocabulary = student.front_end.tokenizer.get_vocab()
    teacher_vocabulary = teacher.front_end.tokenizer.get_vocab()
    tokens = []
    for n, stopped, numbers in zip(writer.lens.tolist(), writer.stopped.tolist(), writer.drawn_tokens()):
        tokens += [student_vocabulary[f"t{i}"] for i in numbers[:n]]
        tokens += [student_vocabulary["stop"]] * stopped
    rows = []
    for student_row, teacher_row, token in zip(student_rows, teacher_rows, tokens, strict=True):
        student_logits, teacher_logits = {}, {}
        for name, i in student_vocabulary.items():
            if name in teacher_vocabulary:
                student_logits[i] = student_row[i]
                teacher_logits[i] = teacher_row[teacher_vocabulary[name]]
        rows.append(in_plain_python(student_logits, teacher_logits, token))
    return rows


def assert_rows(values, rows):
    assert list(values) == MEASURES
    for name in MEASURES:
        expected = [row[name] for row in rows]
        assert values[name].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def measure_stubs(student, teacher, clips, *flags, chunk=256):
    args = overlap.parse_args(["--student", "s", "--teacher", "t", "--data", "m", "--k", str(K), *flags])
    with torch.no_grad():
        return overlap.measure(
            student, teacher, align_vocabularies(student, teacher), clips, None, args, CPU, chunk
        )


@pytest.mark.parametrize("chunk", [256, 3])
def test_measures_against_plain_python(student, teacher, clips, chunk):
    rollout, values, written = measure_stubs(student, teacher, clips, chunk=chunk)
    assert rollout.lens.tolist() == LENS and rollout.stopped.tolist() == STOPPED
    assert teacher.texts_read == ["8 tokens", "2 tokens", "0 tokens", "4 tokens"]
    rows = rows_in_plain_python(student, teacher, writer=student)
    assert len(rows) == N and 0 < sum(row["top1"] for row in rows) < N
    assert_rows(values, rows)

    # What both wrote, for the baselines: both in the student's ids.
    assert [clip["teacher_text"] for clip in written] == [f"{n} tokens" for n in TEACHER_LENS]
    assert written[1] == {
        "student_text": "2 tokens",
        "teacher_text": "3 tokens",
        "student_ids": student.drawn_tokens()[1][:2],
        "teacher_ids": teacher.drawn_tokens()[1][:3],
    }


def test_measures_on_the_teachers_transcripts(student, teacher, clips):
    """The teacher's tokens, in the student's ids, and the student's own top-k there."""
    rollout, values, _ = measure_stubs(student, teacher, clips, "--states", "teacher")
    assert rollout.lens.tolist() == TEACHER_LENS and rollout.topk_ids is None
    assert teacher.texts_read == ["8 tokens", "3 tokens", "0 tokens", "1 tokens"]
    assert_rows(values, rows_in_plain_python(student, teacher, writer=teacher))


def test_vuss_at_smaller_k_is_that_of_a_run_with_it(student, teacher, clips):
    _, values, _ = measure_stubs(student, teacher, clips)
    for k in (1, 2, 4):
        student.k = k
        _, small, _ = measure_stubs(student, teacher, clips, "--k", str(k))
        assert small["vuss"].tolist() == values[f"vuss_{k}"].tolist()


# ----------------------------------------------------------------------------------------------------------
# Baselines
# ----------------------------------------------------------------------------------------------------------


def clip_with(text, language):
    return Clip("a.wav", 1.0, "m:1", {}, text, language)


def test_baselines_by_hand():
    """One word of three is wrong, and two of nine trigrams end in it; of three ids, 6 is lost and 8 new."""
    clip = clip_with("The cat, sat", "en")
    counts = overlap.count_baselines(clip, "the cat sit", "the cat sat", [5, 7, 8], [5, 6, 7])
    assert counts == {
        "units": 3,
        "errors_student": 1,
        "errors_teacher": 0,
        "units_between": 3,
        "errors_between": 1,
        "tokens": 3,
        "token_edits": 2,
        "trigrams": 9 + 9,
        "trigrams_equal": 7,
    }
    assert list(counts) == overlap.COUNTS
    values = overlap.baselines(counts)
    assert list(values) == BASELINES
    assert list(values.values()) == pytest.approx([100 / 3, 0, 100 / 3, 100 / 3, 1 / 3, 7 / 9])


def test_baselines_of_characters():
    """Chinese is compared by character, without the blank; the script decides where there is no language."""
    expected = {"units": 4, "errors_student": 2, "errors_teacher": 1, "units_between": 4, "errors_between": 1}
    for language in ("zh", None):
        clip = clip_with("今天下雨", language)
        counts = overlap.count_baselines(clip, "今天 刮风。", "今天下风", [1, 2], [1, 2])
        assert expected.items() <= counts.items()
        assert (counts["trigrams"], counts["trigrams_equal"]) == (4, 0)
        assert overlap.baselines(counts)["token_agreement"] == 1


def test_baselines_without_text_or_without_a_transcript():
    """No text: what needs a reference is None. Empty texts: nothing to divide by, but errors are counted."""
    counts = overlap.count_baselines(clip_with(None, "en"), "so it is", "so it was", [1, 2, 3], [1, 2, 4, 5])
    assert list(counts) == overlap.COUNTS[3:]
    values = overlap.baselines(counts)
    assert [values[name] for name in BASELINES[:3]] == [None] * 3
    assert values["error_between"] == pytest.approx(100 / 3) and values["token_agreement"] == 0.5

    counts = overlap.count_baselines(clip_with("", "en"), "oh", "", [7], [])
    assert list(counts.values()) == [0, 1, 0, 0, 1, 1, 1, 0, 0]
    assert list(overlap.baselines(counts).values()) == [None, None, None, None, 0, None]
    counts = overlap.count_baselines(clip_with("oh", "en"), "", "", [], [])
    assert list(overlap.baselines(counts).values()) == [100, 100, 0, None, None, None]


def test_baselines_add_up_over_the_clips_of_a_group():
    """Sums over clips, then one division. A clip without text is not in the errors, but in all else."""
    first = overlap.count_baselines(clip_with("a b c d", "en"), "a b", "a b c", [1, 2], [1, 2, 3])
    second = overlap.count_baselines(clip_with("e", "en"), "f", "e", [4], [5])
    third = overlap.count_baselines(clip_with(None, None), "g", "g", [6], [6])
    lines = [
        {"set": "x", "language": "en", **first},
        {"set": "y", "language": "en", **second},
        {"set": "y", "language": None, **third},
    ]
    table = overlap.baselines_by_group(lines)
    figures = {group: [row["clips"], row["error_student"], row["error_gap"]] for group, row in table.items()}
    assert figures == {
        "all": [3, pytest.approx(100 * 3 / 5), pytest.approx(100 * 2 / 5)],
        "language (none)": [1, None, None],
        "language en": [2, pytest.approx(100 * 3 / 5), pytest.approx(100 * 2 / 5)],
        "set x": [1, 50, 25],
        "set y": [2, 100, 100],
    }
    assert table["all"]["token_agreement"] == pytest.approx(1 - 2 / 5)
    assert table["all"]["error_between"] == pytest.approx(100 * 2 / 5)


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(student, teacher, clips, tmp_path, monkeypatch):
    """command(flags) runs overlap.py on the four clips; the first two are English and have a text."""
    models = {"s": student, "t": teacher}
    monkeypatch.setattr(overlap, "SpeechLM", types.SimpleNamespace(from_pretrained=models.get))
    lines = []
    for i, clip in enumerate(clips):
        fields = {"language": "en-US", "text": f"{8 - 5 * i} tokens"} if i < 2 else {}
        lines.append({"audio": clip.audio, "duration": clip.duration, **fields})
    write_lines(tmp_path / "m.jsonl", lines)
    flags = ["--student", "s", "--teacher", "t", "--data", str(tmp_path / "m.jsonl"), "--k", str(K)]
    return lambda *more: overlap.main(overlap.parse_args([*flags, *map(str, more)]))


@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures take a second, and most tests do not look at them. The histogram is stored as numbers."""

    def confidence_figure(histogram):
        return types.SimpleNamespace(savefig=lambda path: np.savetxt(path, histogram))

    monkeypatch.setattr(overlap, "position_figure", lambda tenths, k: confidence_figure([]))
    monkeypatch.setattr(overlap, "confidence_figure", confidence_figure)


def test_tables_are_means_over_the_rows_of_each_group(command, student, teacher, tmp_path, capsys):
    """All clips in one batch, longest first: the rows of the batch are those of clips 3, 2, 1, 0."""
    command("--out", tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["clips.jsonl", "confidence.png", "overlap.json", "positions.png"]
    assert is_png(tmp_path / "out" / "confidence.png") and is_png(tmp_path / "out" / "positions.png")
    result = json.loads((tmp_path / "out" / "overlap.json").read_text())
    assert [result[key] for key in ("student", "teacher", "states", "k", "clips")] == [
        "s",
        "t",
        "student",
        K,
        4,
    ]
    rows = rows_in_plain_python(student, teacher, writer=student)
    groups = {
        "all": list(range(N)),
        "language (none)": list(range(11, N)),
        "language en": list(range(11)),
        "quarter 1": [0, 1, 8, 11, 12, 13],
        "quarter 2": [2, 3, 9, 14],
        "quarter 3": [4, 5, 10, 15],
        "quarter 4": [6, 7, 16],
        "set m": list(range(N)),
    }
    table = result["measures"]
    assert list(table) == list(groups)
    for group, members in groups.items():
        assert table[group] == {"positions": len(members), **mean_of(rows, members)}, group
    tenths = [[0, 8, 11, 12], [1], [2, 13], [3, 9], [14], [4], [5, 10, 15], [6], [7, 16], []]
    for place, members in enumerate(tenths):
        assert result["tenths"][place] == {"positions": len(members), **mean_of(rows, members)}

    # One of four words of the student's is wrong where there is a text, none of the teacher's.
    assert result["baselines"]["language en"] == {
        "clips": 2,
        "error_student": 25,
        "error_teacher": 0,
        "error_gap": 25,
        "error_between": 25,
        "token_agreement": pytest.approx(1 - token_distance(student, teacher, 2) / 11),
        "trigram_f1": pytest.approx(2 * (6 + 5) / 24),
    }

    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == f"mean over rows {' '.join(groups)}".split()
    positions = [str(len(members)) for members in groups.values()]
    assert printed[1].split() == ["positions", *positions]
    for line, name in zip(printed[2:], MEASURES):
        assert line.split() == [name, *(f"{row[name]:.4f}" for row in table.values())]
    assert printed[len(MEASURES) + 3].split() == ["baselines", "clips", *BASELINES]
    assert printed[len(MEASURES) + 6].split()[:5] == ["language", "en", "2", "25.00", "0.00"]


def mean_of(rows, members):
    """{measure: mean over the rows `members`}, to compare with; empty where there are none."""
    if not members:
        return {}
    means = {}
    for name in MEASURES:
        mean = sum(rows[n][name] for n in members) / len(members)
        means[name] = pytest.approx(mean, rel=1e-4, abs=1e-6)
    return means


def token_distance(student, teacher, n_clips):
    """Σ Levenshtein distance of the first clips' tokens, by the textbook's table."""
    total = 0
    for b in range(n_clips):
        a = student.drawn_tokens()[b][: LENS[b]]
        c = teacher.drawn_tokens()[b][: TEACHER_LENS[b]]
        previous = list(range(len(c) + 1))
        for i, token in enumerate(a, 1):
            current = [i]
            for j, other in enumerate(c, 1):
                current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (token != other)))
            previous = current
        total += previous[-1]
    return total


def test_lines_of_clips_add_up_to_the_tables(command, no_pictures, tmp_path):
    """A clip's means times its rows, summed, are the table's; the cut into batches changes nothing."""
    command("--out", tmp_path / "one")
    result = json.loads((tmp_path / "one" / "overlap.json").read_text())
    lines = lines_of(tmp_path / "one" / "clips.jsonl")
    assert [line["clip"] for line in lines] == [f"{tmp_path / 'm.jsonl'}:{n}" for n in (1, 2, 3, 4)]
    assert [line["transcript"] for line in lines] == [f"{n} tokens" for n in LENS]
    assert [line["stopped"] for line in lines] == STOPPED
    assert [line["language"] for line in lines] == ["en", "en", None, None]
    assert [line["positions"] for line in lines] == [8, 3, 1, 5]
    assert ["error_student" in line for line in lines] == [True] * 4
    assert [line["error_student"] for line in lines] == [0, 50, None, None]
    for group, members in (("all", lines), ("language en", lines[:2]), ("set m", lines)):
        for name in MEASURES:
            total = sum(line[name] * line["positions"] for line in members)
            mean = total / sum(line["positions"] for line in members)
            assert result["measures"][group][name] == pytest.approx(mean, rel=1e-9), (group, name)
        for name, numerator, denominator in (
            ("error_student", "errors_student", "units"),
            ("error_between", "errors_between", "units_between"),
        ):
            share = sum(line.get(numerator, 0) for line in members) / sum(
                line.get(denominator, 0) for line in members
            )
            assert result["baselines"][group][name] == pytest.approx(100 * share)

    command("--out", tmp_path / "cut", "--batch-seconds", 0.3)
    assert_same_folder(tmp_path / "cut", tmp_path / "one")


def assert_same_folder(folder, expected):
    """The same tables and lines, to the last digits but a few."""
    one = json.loads((expected / "overlap.json").read_text())
    two = json.loads((folder / "overlap.json").read_text())
    assert two["baselines"] == one["baselines"]
    histogram = np.loadtxt(expected / "confidence.png")
    assert histogram.sum() == one["measures"]["all"]["positions"]
    assert np.array_equal(np.loadtxt(folder / "confidence.png"), histogram)
    for group, row in one["measures"].items():
        assert two["measures"][group] == pytest.approx(row, rel=1e-5), group
    for place, row in enumerate(one["tenths"]):
        assert two["tenths"][place] == pytest.approx(row, rel=1e-5), place
    for line, want in zip(lines_of(folder / "clips.jsonl"), lines_of(expected / "clips.jsonl"), strict=True):
        assert {name: line[name] for name in want if name not in MEASURES} == {
            name: value for name, value in want.items() if name not in MEASURES
        }
        for name in MEASURES:
            assert line[name] == pytest.approx(want[name], rel=1e-5, abs=1e-7), name


# ---- real models -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """Five clips with texts in m.jsonl, and two tiny models whose stop tokens have different ids.

    The rows of these tokens are scaled, so that a cap of 6 cuts some transcripts of either model, not all.
    """
    folder = tmp_path_factory.mktemp("stage")
    texts = ["on", "no one", "", "hé", "oh no"]
    lines = []
    for i, text in enumerate(texts):
        language = "en" if i < 3 else "fr"
        lines.append(write_clip(folder / f"{i}.wav", 0.3 + 0.1 * i, seed=i, text=text, language=language))
    write_lines(folder / "m.jsonl", lines)
    student = tiny_model(2, spread=0.1)
    student.head.weight.data[student.front_end.stop_id] *= -3
    student.save_pretrained(folder / "student")
    tokenizer = byte_tokenizer(specials=SPECIALS[::-1])
    teacher = tiny_model(1, tokenizer=tokenizer, width=48, hidden=64, spread=0.1)
    teacher.head.weight.data[teacher.front_end.stop_id] *= 3
    teacher.save_pretrained(folder / "teacher")
    return folder


def argv_of(stage, out, *more):
    models = ["--student", stage / "student", "--teacher", stage / "teacher", "--data", stage / "m.jsonl"]
    flags = [*models, "--out", out, "--k", K, "--max-new-tokens", 6, *more]
    return [str(flag) for flag in flags]


@pytest.mark.parametrize("states", ["student", "reference", "teacher"])
def test_states_against_each_clip_alone(stage, no_pictures, tmp_path, states):
    """Transcripts by their definition, clip by clip, and the measures of their rows in plain Python."""
    overlap.main(overlap.parse_args(argv_of(stage, tmp_path / "out", "--states", states)))
    lines = lines_of(tmp_path / "out" / "clips.jsonl")
    student = SpeechLM.from_pretrained(stage / "student").eval()
    teacher = SpeechLM.from_pretrained(stage / "teacher").eval()
    student_vocabulary = student.front_end.tokenizer.get_vocab()
    teacher_vocabulary = teacher.front_end.tokenizer.get_vocab()
    stop = student_vocabulary["<|im_end|>"]
    assert stop != teacher_vocabulary["<|im_end|>"]
    names = {i: token for token, i in student_vocabulary.items() if i < 256 or i == stop}
    assert {line["stopped"] for line in lines} == ({True} if states == "reference" else {True, False})

    for clip, line in zip(read_manifest(stage / "m.jsonl"), lines, strict=True):
        batch = collate([load_audio(clip)], student.front_end, [clip.language])
        if states == "reference":
            ids = [*student.front_end.encode_text(clip.text), stop]
        else:
            writer = student if states == "student" else teacher
            ids = [
                student_vocabulary[token] for token in greedy_tokens(writer, batch, set(names.values()), 6)
            ]
        stopped = ids[-1] == stop
        n_tokens = len(ids) - stopped
        assert line["transcript"] == student.front_end.decode(ids[:n_tokens])
        assert line["positions"] == len(ids) and line["stopped"] == stopped

        teacher_ids = [teacher_vocabulary[names[i]] for i in ids]
        student_rows = logits_of(student, batch, ids, stopped)
        teacher_rows = logits_of(teacher, batch, teacher_ids, stopped)
        rows = []
        for n, i in enumerate(ids):
            q = {j: student_rows[n][j] for j in names}
            p = {j: teacher_rows[n][teacher_vocabulary[names[j]]] for j in names}
            rows.append(in_plain_python(q, p, i))
        for name, mean in mean_of(rows, range(len(ids))).items():
            assert line[name] == mean, (clip.where, name)


def greedy_tokens(model, batch, allowed, cap):
    """The likeliest token after another, the stop token included, at most `cap`; each pass from the start."""
    vocabulary = model.front_end.tokenizer.get_vocab()
    columns = {vocabulary[token]: token for token in allowed}
    ids = []
    while len(ids) < cap and (not ids or ids[-1] != model.front_end.stop_id):
        logits = logits_of(model, batch, [*ids, 0], stopped=False)[-1]  # the last token is not read
        ids.append(max(columns, key=lambda i: logits[i]))
    return [columns[i] for i in ids]


@torch.no_grad()
def logits_of(model, batch, ids, stopped):
    """Logits at each row of a transcript of one clip, as lists."""
    prompt = model.front_end.prompt(int(batch.audio_lens[0]))
    batch = dataclasses.replace(batch, prompt_ids=torch.tensor([prompt]))
    lens = torch.tensor([len(ids) - stopped])
    return model.head(model(batch, Rollout(torch.tensor([ids]), lens, torch.tensor([stopped])))).tolist()


def test_two_ranks_give_the_folder_of_one(stage, no_pictures, tmp_path):
    def run_on_ranks(out):
        overlap.main(overlap.parse_args(argv_of(stage, out)))
        return 0

    run_on_ranks(tmp_path / "one")
    results = run_ranks(lambda: run_on_ranks(tmp_path / "two"), 2)
    assert [status for status, _ in results] == [0, 0], results
    assert "mean over rows" in results[0][1] and "mean over rows" not in results[1][1]
    assert_same_folder(tmp_path / "two", tmp_path / "one")


# ---- mistakes ----------------------------------------------------------------------------------------------


def test_mistakes_end_before_anything_is_computed(command, student, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "measure", None)
    with pytest.raises(InputError, match="m.jsonl is a file"):  # a manifest, perhaps
        command("--out", tmp_path / "m.jsonl")
    with pytest.raises(InputError, match="is not empty"):
        command("--out", tmp_path)
    teacher.front_end.languages = {"en": "English"}
    with pytest.raises(InputError, match=r'm\.jsonl:3: no "language"'):
        command()
    with pytest.raises(InputError, match="language 'cn' is not known"):
        command("--language", "cn")
    teacher.front_end.languages = {}
    student.front_end.encode_text = lambda text: [3, V - 1]
    with pytest.raises(InputError, match=r'm\.jsonl:3: no "text"'):
        command("--states", "reference")
    student.front_end.encode_text = lambda text: [3] if text == "8 tokens" else [V - 2]
    with pytest.raises(
        InputError, match=r"m\.jsonl:2: .* token 't118', which the teacher's vocabulary lacks"
    ):
        command("--states", "reference")


def test_pictures_need_matplotlib(command, tmp_path, monkeypatch):
    """It is asked for before the work, and not at all where the tables are only printed."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    command()
    monkeypatch.setattr(overlap, "measure", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        command("--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "m.jsonl"], "one of the arguments --student --runs --validate is required"),
        (["--student", "s", "--runs", "r"], "--runs: not allowed with argument --student"),
        (["--student", "s", "--data", "m.jsonl"], "--student, --teacher and --data go together"),
        (["--runs", "r"], "--runs needs --out"),
        (["--runs", "r", "--out", "o", "--batch-seconds", "9"], "--batch-seconds has no meaning with --runs"),
        (["--validate", "t.json", "--out", "o"], "--out has no meaning with --validate"),
    ],
)
def test_flags_without_meaning(argv, message, capsys):
    with pytest.raises(SystemExit):
        overlap.parse_args(argv)
    assert message in capsys.readouterr().err


def test_validate_gets_the_table(monkeypatch):
    paths = []
    monkeypatch.setattr(overlap, "validate", paths.append)
    overlap.main(overlap.parse_args(["--validate", "t.json"]))
    assert paths == ["t.json"]


# ----------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_position_figure():
    """Eight panels; VUSS over its own k; a hole where a tenth has no row."""
    row = {"positions": 2, "vuss": 6.0, "vuss_1": 1.0, "vuss_2": 3.0, "teacher_logp": -0.5}
    row.update(dict.fromkeys(["overlap_ratio", "jaccard", "top1", "mass_student", "mass_teacher"], 0.25))
    row.update(dict.fromkeys(["advantage", "entropy_gap", "kl_union", "kl_full"], 0.125))
    figure = overlap.position_figure([*[row] * 9, {"positions": 0}], k=4)
    assert len(figure.axes) == 8
    curves = {line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines}
    assert list(curves) == ["k = 1", "k = 2", "k = 4"]
    assert [curve[0] for curve in curves.values()] == [1, 1.5, 1.5]
    assert math.isnan(curves["k = 4"][9]) and not math.isnan(curves["k = 4"][8])
    x, y = figure.axes[7].lines[0].get_data()
    assert x.tolist() == pytest.approx([0.05 + 0.1 * n for n in range(10)]) and y.tolist() == [2] * 9 + [0]
    names = [line.get_label() for axis in figure.axes[1:] for line in axis.lines]
    assert names == [*MEASURES[6:16], "positions"]


def test_confidence_figure():
    """The student's probability grows to the right, the teacher's upward; the colour is log10 of the rows."""
    values = {
        "first_student": torch.tensor([0.99, 0.99, 1.0, 0.3]).double(),
        "first_teacher": torch.tensor([0.01, 0.01, 1.0, 0.6]).double(),
    }
    histogram = overlap.confidence_histogram(values)
    assert histogram.shape == (40, 40) and histogram.sum() == 4
    assert histogram[39, 0] == 2 and histogram[39, 39] == 1 and histogram[12, 24] == 1
    figure = overlap.confidence_figure(histogram)
    assert len(figure.axes) == 2  # the map and its scale
    (image,) = figure.axes[0].images
    pixels = image.get_array()
    assert image.origin == "lower" and pixels[0, 39] == pytest.approx(math.log10(2)) and pixels[24, 12] == 0


def write_run(folder, n_steps, **constants):
    folder.mkdir()
    lines = []
    for step in range(1, n_steps + 1):
        figures = {"loss": 1.0 / step, "kl": 0.5, "vuss": 50 + step, "empty": 0.0, "capped": 0.25}
        lines.append({"step": step, **figures, "looping": 0.0, "mean_tokens": 7.0, **constants})
    write_lines(folder / "metrics.jsonl", lines)
    return folder


@pytest.mark.slow
def test_runs_are_drawn_over_their_steps(tmp_path, monkeypatch, capsys):
    """A curve a run in seven panels, and the runs' names in the eighth. 150 steps: means of three."""
    figures = []

    def new_figure(n_rows, n_columns):
        figures.append(real_new_figure(n_rows, n_columns))
        return figures[-1]

    real_new_figure = overlap.new_figure
    monkeypatch.setattr(overlap, "new_figure", new_figure)
    monkeypatch.setattr(overlap, "SpeechLM", None)  # no model is loaded
    short = write_run(tmp_path / "short", 3, kl=0.75)
    long = write_run(tmp_path / "long", 150)
    overlap.main(overlap.parse_args(["--runs", str(short), str(long), "--out", str(tmp_path / "out")]))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["runs.png"]
    assert is_png(tmp_path / "out" / "runs.png")
    assert str(tmp_path / "out" / "runs.png") in capsys.readouterr().out

    ((_, axes),) = figures
    assert [len(axis.lines) for axis in axes] == [2] * 7 + [0]
    loss, kl, vuss = [[line.get_data() for line in axis.lines] for axis in axes[:3]]
    assert loss[0][0].tolist() == [1, 2, 3] and loss[0][1].tolist() == pytest.approx([1, 1 / 2, 1 / 3])
    assert kl[0][1].tolist() == [0.75] * 3
    assert vuss[1][0].tolist() == list(range(3, 151))
    assert vuss[1][1].tolist() == pytest.approx([50 + step - 1 for step in range(3, 151)])
    names = [text.get_text() for text in axes[7].get_legend().get_texts()]
    assert names == [str(short), f"{long} (mean of 3 steps)"]


def test_a_folder_that_is_no_run(tmp_path):
    run = write_run(tmp_path / "run", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "new").mkdir()
    write_lines(tmp_path / "new" / "metrics.jsonl", [])
    (tmp_path / "other").mkdir()
    write_lines(tmp_path / "other" / "metrics.jsonl", [{"step": 1, "loss": 2.0}])
    for name, message in (
        ("empty", "no metrics.jsonl in it"),
        ("missing", "no metrics.jsonl in it"),
        ("new", "has no step yet"),
        ("other", "has no 'capped'"),
    ):
        argv = ["--runs", str(run), str(tmp_path / name), "--out", str(tmp_path / "out")]
        with pytest.raises(InputError, match=f"{name}: .*{message}"):
            overlap.main(overlap.parse_args(argv))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="is not empty"):
        overlap.main(overlap.parse_args(["--runs", str(run), "--out", str(run)]))
