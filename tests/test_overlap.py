"""overlap.py: each measure by hand, all of them against plain Python, and the table of the command."""

import json
import math
import types

import numpy as np
import pytest
import soundfile
import torch
from conftest import noise

import data
import overlap
from data import Clip, InputError
from model import Rollout, align_vocabularies, top_ids

CPU = torch.device("cpu")
V = 120  # of the student; the last of its text tokens is unknown to the teacher
K = 5
LENS = [8, 2, 0, 4]  # transcript tokens of the four clips; the cap cut the first
STOPPED = [False, True, True, True]
N = 8 + 3 + 1 + 5  # rows: the stop token is one where it was written


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
        "n_student": [3, 3, 0],
        "n_teacher": [3, 1, 0],
        "overlap_ratio": [2 / 3, 0, 0],
        "jaccard": [0.5, 0, 0],
        "top1": [1, 0, 0],
    }
    student_logits = torch.tensor([[1.0, 0.5, 2.0, 0.0, -math.inf]] * 3)
    teacher_logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, -math.inf]] * 3)
    values = overlap.probability_overlap(student_logits, teacher_logits, student_topk, teacher_topk)
    assert all(value.isfinite().all() for value in values.values())
    for name in ("mass_student", "mass_teacher", "advantage"):
        assert values[name][1] == 0 and values[name][0] != 0


class StubModel:
    """A vocabulary, a random output matrix, and hidden rows that are a function of their position."""

    architecture = "Stub"

    def __init__(self, vocabulary, seed, n_rows, languages=()):
        self.head = torch.nn.Linear(16, n_rows, bias=False)
        weight = torch.randn(n_rows, 16, generator=torch.Generator().manual_seed(seed))
        self.head.weight.data.copy_(weight)
        self.forbidden = torch.arange(n_rows) >= len(vocabulary)
        self.device = CPU
        self.texts_read = []
        self.front_end = types.SimpleNamespace(
            tokenizer=types.SimpleNamespace(get_vocab=lambda: vocabulary),
            stop_id=vocabulary["stop"],
            pad_id=0,
            frame_multiple=8,
            languages=dict.fromkeys(languages),
            n_audio_tokens=data.n_audio_tokens,
            features=data.log_mel,
            prompt=lambda n_audio, language: [1],
            texts=lambda rollout: [f"{n} tokens" for n in rollout.lens.tolist()],
        )

    def to(self, device):
        return self

    def eval(self):
        return self

    def encode(self, batch):
        return len(batch.seconds)

    def sample(self, batch, max_new_tokens, k, tokens_per_second, forbidden, encoded):
        """The clips of 1, 2, 3, 4 tenths of a second have the transcripts of LENS, with stop token `119`."""
        assert (max_new_tokens, k, tokens_per_second, encoded) == (800, K, 25.0, len(batch.seconds))
        places = [round(10 * seconds) - 1 for seconds in batch.seconds.tolist()]
        ids = torch.randint(V - 2, (4, 9), generator=torch.Generator().manual_seed(2))
        for b, n in enumerate(LENS):
            ids[b, n] = self.front_end.stop_id
        rollout = Rollout(ids[places, :8], torch.tensor(LENS)[places], torch.tensor(STOPPED)[places])
        hidden = self.hidden(torch.ones_like(rollout.ids, dtype=torch.bool))
        logits = self.head(hidden).masked_fill(forbidden, -math.inf)
        rollout.topk_ids = top_ids(logits, k).reshape(len(places), 8, k)
        return rollout

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
    return StubModel({**vocabulary, "stop": V - 1}, seed=0, n_rows=V)


@pytest.fixture
def teacher(student):
    """The same tokens in another order but for t118, similar scores, and rows beyond the vocabulary."""
    order = np.random.default_rng(0).permutation(V - 1).tolist()
    tokens = [*(f"t{i}" for i in range(V - 2)), "stop"]
    model = StubModel(dict(zip(tokens, order)), seed=1, n_rows=V + 3)
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


def in_plain_python(student_logits, teacher_logits):
    """The measures of one row from its logits over the ids {id: logit} that both models may write."""
    ids = sorted(student_logits)
    z_q = math.log(sum(math.exp(x) for x in student_logits.values()))
    z_p = math.log(sum(math.exp(x) for x in teacher_logits.values()))
    q = {i: math.exp(student_logits[i] - z_q) for i in ids}
    p = {i: math.exp(teacher_logits[i] - z_p) for i in ids}
    S = sorted(ids, key=lambda i: -q[i])[:K]
    T = sorted(ids, key=lambda i: -p[i])[:K]
    union = set(S) | set(T)
    both = set(S) & set(T)
    mass_q = sum(q[i] for i in both)
    mass_p = sum(p[i] for i in both)
    union_q = sum(q[i] for i in union)
    union_p = sum(p[i] for i in union)
    advantage = sum(q[i] / mass_q * math.log(p[i] / mass_p * mass_q / q[i]) for i in both)
    return {
        "vuss": len(union),
        "n_student": K,
        "n_teacher": K,
        "overlap_ratio": len(both) / K,
        "jaccard": len(both) / len(union),
        "top1": float(S[0] == T[0]),
        "mass_student": mass_q,
        "mass_teacher": mass_p,
        "advantage": advantage / max(len(both), 1),
        "entropy_gap": abs(sum(q[i] * math.log(q[i]) - p[i] * math.log(p[i]) for i in ids)),
        "kl_union": sum(p[i] / union_p * math.log(p[i] / union_p * union_q / q[i]) for i in union),
        "kl_full": sum(p[i] * math.log(p[i] / q[i]) for i in ids),
    }


def rows_in_plain_python(student, teacher):
    row_mask = torch.arange(8) < (torch.tensor(LENS) + torch.tensor(STOPPED))[:, None]
    student_rows = student.head(student.hidden(row_mask)).tolist()
    teacher_rows = teacher.head(teacher.hidden(row_mask)).tolist()
    teacher_vocabulary = teacher.front_end.tokenizer.get_vocab()
    rows = []
    for student_row, teacher_row in zip(student_rows, teacher_rows):
        student_logits, teacher_logits = {}, {}
        for token, i in student.front_end.tokenizer.get_vocab().items():
            if token in teacher_vocabulary:
                student_logits[i] = student_row[i]
                teacher_logits[i] = teacher_row[teacher_vocabulary[token]]
        rows.append(in_plain_python(student_logits, teacher_logits))
    return rows


@pytest.mark.parametrize("chunk", [1024, 3])
def test_measures_against_plain_python(student, teacher, clips, chunk):
    args = overlap.parse_args(["--student", "s", "--teacher", "t", "--data", "m", "--k", str(K)])
    alignment = align_vocabularies(student, teacher)
    values, clip, quarter = overlap.measure(student, teacher, alignment, clips, None, args, CPU, chunk)
    assert clip == [0] * 8 + [1] * 3 + [2] + [3] * 5
    assert quarter == [0, 0, 1, 1, 2, 2, 3, 3] + [0, 1, 2] + [0] + [0, 0, 1, 2, 3]  # of each clip's own rows
    assert teacher.texts_read == ["8 tokens", "2 tokens", "0 tokens", "4 tokens"]
    expected = rows_in_plain_python(student, teacher)
    assert len(expected) == N and 0 < sum(row["top1"] for row in expected) < N
    for name in overlap.MEASURES:
        assert values[name].tolist() == pytest.approx([row[name] for row in expected], rel=1e-4, abs=1e-6), (
            name
        )


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(student, teacher, clips, tmp_path, monkeypatch):
    """command(flags) runs overlap.py on the four clips, of which the first two are English."""
    models = {"s": student, "t": teacher}
    monkeypatch.setattr(overlap, "SpeechLM", types.SimpleNamespace(from_pretrained=models.get))
    lines = []
    for i, clip in enumerate(clips):
        language = {"language": "en-US"} if i < 2 else {}
        lines.append(json.dumps({"audio": clip.audio, "duration": clip.duration, **language}) + "\n")
    (tmp_path / "m.jsonl").write_text("".join(lines))
    flags = ["--student", "s", "--teacher", "t", "--data", str(tmp_path / "m.jsonl"), "--k", str(K)]
    return lambda *more: overlap.main(overlap.parse_args([*flags, *map(str, more)]))


def test_table_is_means_over_the_rows_of_each_group(command, student, teacher, tmp_path, capsys):
    """All clips in one batch, longest first: the rows of the batch are those of clips 3, 2, 1, 0."""
    command("--out", tmp_path / "out" / "o.json")
    result = json.loads((tmp_path / "out" / "o.json").read_text())
    assert [result[key] for key in ("student", "teacher", "k", "clips")] == ["s", "t", K, 4]
    table = result["measures"]
    rows = rows_in_plain_python(student, teacher)
    groups = {
        "all": list(range(N)),
        "language (none)": list(range(11, N)),
        "language en": list(range(11)),
        "quarter 1": [0, 1, 8, 11, 12, 13],
        "quarter 2": [2, 3, 9, 14],
        "quarter 3": [4, 5, 10, 15],
        "quarter 4": [6, 7, 16],
    }
    assert list(table) == list(groups)
    for group, members in groups.items():
        assert table[group]["positions"] == len(members)
        for name in overlap.MEASURES:
            mean = sum(rows[n][name] for n in members) / len(members)
            assert table[group][name] == pytest.approx(mean, rel=1e-4, abs=1e-6), (group, name)
    header, first, *_ = capsys.readouterr().out.splitlines()
    assert header.split() == ["rows", "n", *overlap.MEASURES]
    assert first.split() == ["all", str(N), *(f"{table['all'][name]:.4f}" for name in overlap.MEASURES)]

    command("--out", tmp_path / "cut.json", "--batch-seconds", 0.3)  # the cut into batches changes nothing
    for group, row in json.loads((tmp_path / "cut.json").read_text())["measures"].items():
        assert row == pytest.approx(table[group], rel=1e-6), group


def test_two_ranks_give_the_table_of_one(command, tmp_path, monkeypatch):
    """Rank 1 first: it writes nothing, and what it hands over is kept for rank 0."""
    command("--out", tmp_path / "one.json")
    shares = []

    def gather(sums):
        shares.append(sums)
        return shares

    monkeypatch.setattr(overlap, "gather", gather)
    for rank in (1, 0):
        monkeypatch.setattr(overlap, "setup_distributed", lambda rank=rank: (rank, 2, CPU))
        command("--out", tmp_path / "two.json")
        assert (tmp_path / "two.json").exists() == (rank == 0)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    for group, row in one["measures"].items():
        assert two["measures"][group] == pytest.approx(row, rel=1e-6), group


def test_mistakes_end_before_anything_is_computed(command, student, teacher, tmp_path):
    with pytest.raises(InputError, match="m.jsonl exists"):  # a manifest, perhaps
        command("--out", tmp_path / "m.jsonl")
    teacher.front_end.languages = {"en": "English"}
    with pytest.raises(InputError, match=r'm\.jsonl:3: no "language"'):
        command()
    with pytest.raises(InputError, match="language 'cn' is not known"):
        command("--language", "cn")
    command("--language", "en")
