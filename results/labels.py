"""Fresh audio with what a teacher has written for it, and the errors that a student shares with the teacher.

    python -m results.labels FRESH.jsonl OVERLAP/clips.jsonl OUT

FRESH.jsonl is of example/make.py, OVERLAP of overlap.py, with the teacher as both models and on its own
transcripts. Makes OUT/fresh.jsonl, whose lines have what the teacher has written as "teacher", and two halves
of it. Both have half of the clips of each language and condition: OUT/surest.jsonl those of whose transcripts
the teacher is surest, by its mean log-probability of a token, and OUT/random.jsonl any.
"""

import collections
import itertools
import os
import pathlib
import sys

import jiwer
import numpy as np

import data
import eval


def main(manifest, written, out):
    manifest = pathlib.Path(manifest)
    out = pathlib.Path(out)
    out.mkdir(parents=True)
    lines = data.read_lines(manifest)
    clips = data.read_lines(written)
    for line, clip in zip(lines, clips, strict=True):
        line["audio"] = os.path.relpath(manifest.parent / line["audio"], out)
        line["teacher"] = clip["teacher"]
    data.add_lines(out / "fresh.jsonl", lines, mode="w")

    draws = np.random.default_rng(0).random(len(lines))
    logps = [clip["teacher_logp"] for clip in clips]
    for name, scores in (("surest", logps), ("random", draws)):
        kinds = collections.defaultdict(list)  # language and condition → clip numbers, best first
        for i in sorted(range(len(lines)), key=lambda i: -scores[i]):
            kinds[lines[i]["language"], lines[i]["condition"]].append(i)
        half = []
        for numbers in kinds.values():
            half += numbers[: len(numbers) // 2]
        data.add_lines(out / f"{name}.jsonl", [lines[i] for i in sorted(half)], mode="w")


def shared_errors(results):
    """{teacher, student, shared: errors} of result lines of fresh.jsonl: those of each, and of both alike.

    An error is a unit of the reference that is another one or none in the transcript, or a unit between two.
    """
    counts = collections.Counter(teacher=0, student=0, shared=0)
    for result in results:
        teacher = errors_of(result["text"], result["teacher"], result["language"])
        student = errors_of(result["text"], result["hyp"], result["language"])
        counts.update(teacher=teacher.total(), student=student.total(), shared=(teacher & student).total())
    return dict(counts)


def errors_of(reference, hypothesis, language):
    """A Counter of a transcript's errors: (place in the reference, unit there or "", unit written or "")."""
    reference = eval.normalize(reference, language)
    hypothesis = eval.normalize(hypothesis, language)
    errors = collections.Counter()
    for chunk in jiwer.process_words(" ".join(reference), " ".join(hypothesis)).alignments[0]:
        if chunk.type == "equal":
            continue
        wanted = reference[chunk.ref_start_idx : chunk.ref_end_idx]  # empty for an insertion
        written = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]  # empty for a deletion
        for n, pair in enumerate(itertools.zip_longest(wanted, written, fillvalue="")):
            errors[chunk.ref_start_idx + min(n, len(wanted)), *pair] += 1
    return errors


if __name__ == "__main__":
    main(*sys.argv[1:])
