"""overlap.py: each measure by hand and against plain Python, the lines and tables of a run."""

import dataclasses
import functools
import json
import math

import pytest
import torch
from conftest import SPECIALS, byte_tokenizer, tiny_model
from runs import lines_of, run_on_cpu, run_ranks, with_other_ids, write_clip, write_lines

import data
import model
import overlap

K = 5
on_cpu = pytest.fixture(autouse=True, scope="module")(run_on_cpu)


# ---- the measures of a row ---------------------------------------------------------------------------------


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


def in_plain_python(student_logits, teacher_logits, token, k=K):
    """The measures of one row from its logits over the ids {id: logit} that both models may write."""
    ids = sorted(student_logits)
    z_q = math.log(sum(math.exp(x) for x in student_logits.values()))
    z_p = math.log(sum(math.exp(x) for x in teacher_logits.values()))
    q = {i: math.exp(student_logits[i] - z_q) for i in ids}
    p = {i: math.exp(teacher_logits[i] - z_p) for i in ids}
    S = sorted(ids, key=lambda i: -q[i])[:k]
    T = sorted(ids, key=lambda i: -p[i])[:k]
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


# ---- runs with tiny models ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """Six clips with texts in m.jsonl and n.jsonl, and two tiny models with other ids.

    The rows of their stop tokens are scaled, so that a cap of 6 cuts some transcripts of either, not all.
    """
    folder = tmp_path_factory.mktemp("stage")
    texts = [("on", "en"), ("no one", "en"), ("", "en-US"), ("hé", "fr"), ("oh no", "fr"), ("a", None)]
    lines = []
    for i, (text, language) in enumerate(texts):
        fields = {"text": text, "language": language}
        lines.append(write_clip(folder / f"{i}.wav", 0.3 + 0.1 * i, seed=i, **fields))
    write_lines(folder / "m.jsonl", lines[:4])
    write_lines(folder / "n.jsonl", lines[4:])
    student = tiny_model(13, spread=0.1)
    student.head.weight.data[student.front_end.stop_id] *= 4
    student.save_pretrained(folder / "student")
    words = with_other_ids(byte_tokenizer(specials=SPECIALS[::-1]), missing="q")
    teacher = tiny_model(11, words, width=48, hidden=64, spread=0.1)
    teacher.head.weight.data[teacher.front_end.stop_id] *= 5
    teacher.save_pretrained(folder / "teacher")
    return folder


def run(stage, out, *more):
    """overlap.py in this process."""
    flags = ["--student", stage / "student", "--teacher", stage / "teacher", "--k", K, "--out", out]
    flags += ["--data", stage / "m.jsonl", stage / "n.jsonl", "--max-new-tokens", 6, *more]
    overlap.main(overlap.parse_args([str(flag) for flag in flags]))
    return out


@pytest.mark.parametrize("states", ["student", "reference", "teacher"])
def test_lines_and_tables_against_each_clip_alone(stage, tmp_path, capsys, states):
    """Transcripts by their definition, clip by clip, and the measures of their rows in plain Python."""
    out = run(stage, tmp_path / "out", "--states", states)
    lines = lines_of(out / "clips.jsonl")
    assert {line["stopped"] for line in lines} == ({True} if states == "reference" else {True, False})

    student = model.SpeechLM.from_pretrained(stage / "student").eval()
    teacher = model.SpeechLM.from_pretrained(stage / "teacher").eval()
    student_vocabulary = student.front_end.tokenizer.get_vocab()
    teacher_vocabulary = teacher.front_end.tokenizer.get_vocab()
    stop = student_vocabulary["<|im_end|>"]
    names = {i: token for token, i in student_vocabulary.items() if (i < 256 and token != "q") or i == stop}
    assert len(names) == 256 and student_vocabulary["a"] != teacher_vocabulary["a"]

    clips = data.read_manifest(stage / "m.jsonl") + data.read_manifest(stage / "n.jsonl")
    groups = {}  # group → the measures of its rows
    for clip, line in zip(clips, lines, strict=True):
        batch = data.collate([data.load_audio(clip)], student.front_end, [clip.language])
        reference_ids = [*student.front_end.encode_text(clip.text), stop]
        ids_of = {"reference": reference_ids}
        for whose, writer in (("student", student), ("teacher", teacher)):
            tokens = greedy_tokens(writer, batch, set(names.values()), 6)
            ids_of[whose] = [student_vocabulary[token] for token in tokens]
            ids = [i for i in ids_of[whose] if i != stop]
            assert line[f"{whose}_ids"] == ids and line[whose] == student.front_end.decode(ids)
        ids = ids_of[states]
        stopped = ids[-1] == stop
        n_tokens = len(ids) - stopped
        assert (line["clip"], line["language"], line["text"]) == (clip.where, clip.language, clip.text)
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
            parts = [f"quarter {4 * n // len(ids) + 1}", f"tenth {10 * n // len(ids) + 1}"]
            set_name = "m" if line["clip"].startswith(str(stage / "m.jsonl")) else "n"
            for group in ("all", f"set {set_name}", f"language {clip.language or '(none)'}", *parts):
                groups.setdefault(group, []).append(rows[-1])
        for name, mean in mean_of(rows).items():
            assert line[name] == mean, (clip.where, name)

    result = json.loads((out / "overlap.json").read_text())
    assert [result[key] for key in ("states", "k", "clips")] == [states, K, 6]
    assert result["tenths"] == [mean_of(groups.pop(f"tenth {n}", [])) for n in range(1, 11)]
    assert result["measures"] == {group: mean_of(groups[group]) for group in sorted(groups)}
    assert {"language (none)", "language en", "language fr", "quarter 4", "set n"} < groups.keys()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == f"mean over rows {' '.join(sorted(groups))}".split()


def mean_of(rows):
    """{positions, measure: mean over the rows}, to compare with; no measure where there is no row."""
    means = {"positions": len(rows)}
    for name in rows[0] if rows else []:
        mean = sum(row[name] for row in rows) / len(rows)
        means[name] = pytest.approx(mean, rel=1e-4, abs=1e-6)
    return means


def greedy_tokens(speech_lm, batch, allowed, cap):
    """The likeliest token after another, the stop token included, at most `cap`; each pass from the start."""
    vocabulary = speech_lm.front_end.tokenizer.get_vocab()
    columns = {vocabulary[token]: token for token in allowed}
    ids = []
    while len(ids) < cap and (not ids or ids[-1] != speech_lm.front_end.stop_id):
        logits = logits_of(speech_lm, batch, [*ids, 0], stopped=False)[-1]  # the last token is not read
        ids.append(max(columns, key=lambda i: logits[i]))
    return [columns[i] for i in ids]


@torch.no_grad()
def logits_of(speech_lm, batch, ids, stopped):
    """Logits at each row of a transcript of one clip, as lists."""
    prompt = speech_lm.front_end.prompt(int(batch.audio_lens[0]))
    batch = dataclasses.replace(batch, prompt_ids=torch.tensor([prompt]))
    lens = torch.tensor([len(ids) - stopped])
    rollout = model.Rollout(torch.tensor([ids]), lens, torch.tensor([stopped]))
    return speech_lm.head(speech_lm(batch, rollout)).tolist()


def test_no_cut_into_batches_rows_or_ranks_changes_the_tables(stage, tmp_path, monkeypatch):
    one = run(stage, tmp_path / "one")
    with monkeypatch.context() as patch:
        patch.setattr(overlap, "measure", functools.partial(overlap.measure, chunk=3))
        run(stage, tmp_path / "cut", "--batch-seconds", 0.8)
    results = run_ranks(lambda: run(stage, tmp_path / "ranks") and 0, 2)
    assert [status for status, _ in results] == [0, 0], results
    assert "mean over rows" in results[0][1] and "mean over rows" not in results[1][1]
    expected = json.loads((one / "overlap.json").read_text())
    for name in ("cut", "ranks"):
        result = json.loads((tmp_path / name / "overlap.json").read_text())
        for group, row in expected["measures"].items():
            assert result["measures"][group] == pytest.approx(row, rel=1e-5), group
        for row, want in zip(result["tenths"], expected["tenths"], strict=True):
            assert row == pytest.approx(want, rel=1e-5)
        lines = lines_of(tmp_path / name / "clips.jsonl")
        for line, want in zip(lines, lines_of(one / "clips.jsonl"), strict=True):
            for key, value in want.items():
                expected_value = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
                assert line[key] == expected_value, key


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, r'x\.jsonl:1: no "text"'), ("aqua", r"x\.jsonl:1: .* teacher lacks the token 'q'")],
)
def test_a_reference_that_cannot_be_scored_is_named(stage, tmp_path, monkeypatch, text, message):
    monkeypatch.setattr(overlap, "measure", None)
    line = lines_of(stage / "m.jsonl")[0]
    del line["text"]
    write_lines(tmp_path / "x.jsonl", [line if text is None else {**line, "text": text}])
    with pytest.raises(data.InputError, match=message):
        run(stage, tmp_path / "out", "--states", "reference", "--data", tmp_path / "x.jsonl")
    assert not (tmp_path / "out").exists()
