"""Runs the experiments of RESULTS.md: a plain list of commands.

    python -m results.run --list               # what is finished, and what is left
    python -m results.run --jobs 2             # everything that is left, two runs side by side
    python -m results.run --only table-1       # some questions
    python -m results.run --only table-1 --since COMMIT    # and anew what an older commit made
    python -m results.run --only labels-tune labels        # a grid of rates, then what takes the best

A run is finished when results/runs.jsonl has its line. So this can be stopped at any moment, and started
again, with --since too: what was being run begins anew. Each run is one process of one thread, in
runs/results/NAME, on a GPU where there is one: so give `--only scale-tune scale` to a machine with a GPU, and
the others to one without. Models and data that an unfinished run needs are made first, and made anew where
they are missing. They take espeak-ng and flite (example/make.py), and the recordings of ASR_OPD_DATA for the
digit strings. --since makes no model anew: remove runs/results first where these should change too.

A line holds the question, the arm, the settings, the command, the commit that was checked out when the run
began (12 digits), the seconds, and what results/tables.py computes the tables from: the errors of each
speaker in each set (speakers in the order of results/units.json, which has their reference units), or the
measures of overlap.py; of some questions also VUSS during the run, errors before it, counts of loops.
"""

import argparse
import collections
import datetime
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np

import data
import eval
from results import labels, validate

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
RUNS = HERE / "runs.jsonl"
UNITS = HERE / "units.json"
FOLDER = "runs/results"  # of all runs and models, from ROOT
WORK = ROOT / FOLDER
# What a line depends on, as git's path patterns. It must be committed before a run begins.
CODE = ["*.py", "example", "results/scale-*.json", ":!*.md", ":!tests"]

TEST_SETS = ["en-clean", "en-other", "zh-read", "zh-net", "zh-meeting"]
TESTS = " ".join(f"example/{name}.jsonl" for name in TEST_SETS)
DEV = "example/dev.jsonl"
BASE = "example/base"
TEACHER = "example/teacher"

# ------------------------------------------------------------------------------------- models and their data
# Name → command. {out} in it stands for its folder, runs/results/NAME.

SFT = "sft.py --workers 0 --keep 99 --out {out}"
SPEC_AUGMENT = "--time-masks 1 --time-width 20 --freq-masks 1 --freq-width 20"
SETS = f"{FOLDER}/sets"
TD = "--text-field hyp --batch-size 32 --warmup-steps 20"
N_TD_SEEDS = 3

MODELS = {
    # What the example's models have learned from, and weights to begin with.
    "extra": "example/make.py extra --extra-hours 5 --work {out}",
    "start-base": (
        "-m prepare.student --config example/base/config.json --tokenizer example/base --out {out}"
    ),
    "start-teacher": (
        "-m prepare.student --config example/teacher/config.json --tokenizer example/base --out {out}"
    ),
    # Students: the checkpoints of the base's training, made again.
    "students": (
        f"{SFT} --train {FOLDER}/extra/labelled.jsonl --model {FOLDER}/start-base"
        f" --steps 2500 --batch-size 16 --warmup-steps 100 --lr 3e-3"
        f" --ctc-weight 1 --save-every 100 {SPEC_AUGMENT}"
    ),
    # Weaker teachers: the checkpoints of a shorter training of the teacher.
    "teachers": (
        f"{SFT} --train example/train.jsonl {FOLDER}/extra/extra.jsonl --model {FOLDER}/start-teacher"
        f" --steps 1600 --batch-size 32 --warmup-steps 200 --lr 3e-3"
        f" --ctc-weight 0.5 --save-every 200 {SPEC_AUGMENT}"
    ),
    # A teacher of another style: the shipped one, tuned on punctuation.
    "sets": "-m results.sets {out}",
    "teacher-style": (
        f"{SFT} --train {SETS}/style.jsonl --model {TEACHER}"
        f" --steps 300 --batch-size 32 --warmup-steps 20 --lr 1e-3"
    ),
    # TD: what the teacher writes, and students that have learned from it.
    "td-text": f"eval.py --model {TEACHER} --data example/train.jsonl --out {{out}}",
    "td-text-style": f"eval.py --model {FOLDER}/teacher-style/model --data example/train.jsonl --out {{out}}",
}
# A base of another seed: the same data in another order, other weights to begin with. The same checkpoint.
MODELS["start-base-2"] = f"{MODELS['start-base']} --seed 1"
MODELS["students-2"] = MODELS["students"].replace("start-base", "start-base-2") + " --seed 1"
BASE_2 = f"{FOLDER}/students-2/step-1600/model"

# A larger instance, for a machine with a GPU: thirty times the parameters, eight times the audio. The base is
# again from the middle of its training.
for name in ("base", "teacher"):
    MODELS[f"scale-start-{name}"] = (
        f"-m prepare.student --config results/scale-{name}.json --tokenizer example/base --out {{out}}"
    )
SCALE_TRAIN = f"example/train.jsonl {FOLDER}/extra/extra.jsonl"
for name, lr, manifests in (
    ("base", 1e-3, f"{FOLDER}/extra/labelled.jsonl"),
    ("teacher", 5e-4, SCALE_TRAIN),
):
    MODELS[f"scale-{name}"] = (
        f"sft.py --bf16 --keep 99 --out {{out}} --train {manifests} --model {FOLDER}/scale-start-{name}"
        f" --steps 1500 --batch-size 32 --warmup-steps 200 --lr {lr:g} --ctc-weight 0.5"
        f" --save-every 200 --eval {DEV} --eval-every 200 {SPEC_AUGMENT}"
    )
SCALE_BASE = f"{FOLDER}/scale-base/step-800/model"
SCALE_TEACHER = f"{FOLDER}/scale-teacher/model"

# Fresh audio, of voices and sentences that no model has heard, and what two teachers write for it.
MODELS["fresh"] = "example/make.py fresh --work {out}"
FRESH = f"{FOLDER}/fresh/fresh.jsonl"
# A teacher between the shipped one and sft-1600 of question 3, which has a little too many errors there.
MODELS["teacher-weak"] = (
    f"{SFT} --train example/train.jsonl {FOLDER}/extra/extra.jsonl --model {FOLDER}/teachers/step-1600/model"
    f" --steps 400 --batch-size 32 --warmup-steps 20 --lr 1e-3 {SPEC_AUGMENT}"
)
LABEL_TEACHERS = {"good": TEACHER, "weak": f"{FOLDER}/teacher-weak/model"}
for name, model in LABEL_TEACHERS.items():
    MODELS[f"written-{name}"] = (
        f"overlap.py --student {model} --teacher {model} --states teacher --max-new-tokens 64"
        f" --data {FRESH} --out {{out}}"
    )
    MODELS[f"labels-{name}"] = f"-m results.labels {FRESH} {FOLDER}/written-{name}/clips.jsonl {{out}}"

TD_STUDENTS = (1000, 1300, 1600)  # checkpoints that get TD
for n_steps in TD_STUDENTS:
    checkpoint = f"{FOLDER}/students/step-{n_steps}/model"
    MODELS[f"student-td-{n_steps}"] = (
        f"{SFT} --model {checkpoint} --train {FOLDER}/td-text/train.jsonl {TD} --steps 100 --lr 5e-4"
    )

# Human speech: digit strings of six speakers, one of them held out. The example's teacher is tuned on the
# other five, the example's base on two of them, and the audio without transcripts is of the five.
FSDD = os.path.join(os.environ.get("ASR_OPD_DATA", ROOT.parent / "shared" / "data"), "fsdd")
SPEAKERS = ["george", "jackson", "lucas", "nicolas", "theo", "yweweler"]
for n, held_out in enumerate(SPEAKERS):
    others = SPEAKERS[n + 1 :] + SPEAKERS[:n]
    folder = f"{FOLDER}/digits-{held_out}"
    stem = f"digits-{held_out}.jsonl"
    for name, split, speakers, count, seed in (
        ("labelled", "train", others, 3000, 0),
        ("base", "train", others[:2], 1000, 1),
        ("train", "train", others, 1200, 2),
        ("test", "test", [held_out], 300, 3),
    ):
        MODELS[f"digits-{held_out}-{name}"] = (
            f"-m prepare.fsdd {shlex.quote(FSDD)} --split {split} --speakers {' '.join(speakers)}"
            f" --count {count} --seed {seed} --out {{out}}/{stem}"
        )
    for name, steps, clips in (("teacher", 500, "labelled"), ("base", 300, "base")):
        MODELS[f"digits-{held_out}-{name}-model"] = (
            f"{SFT} --train {folder}-{clips}/{stem} --model example/{name}"
            f" --steps {steps} --batch-size 16 --warmup-steps 20 --lr 2e-3 --ctc-weight 0.5"
        )

# ------------------------------------------------------------------------------------------------------ runs

ARMS = {
    "opd": "",
    "offline-kl": "--states reference",
    "teacher-kl": "--states teacher",
    "ce-reference": "--states reference --objective ce",
    "ce-teacher": "--states teacher --objective ce",
}
LEARNING_RATES = [2.5e-4, 5e-4, 1e-3, 2e-3]  # the grid, the same for all
SCALE_RATES = [1e-4, 3e-4, 1e-3]
TUNED_ARMS = ["opd", "offline-kl", "ce-reference"]
KIN = {"teacher-kl": "offline-kl", "ce-teacher": "ce-reference"}  # they take the learning rate of their kin
SEEDS = {"opd": 8, "offline-kl": 8, "teacher-kl": 5, "ce-reference": 5, "ce-teacher": 3}

STUDENTS = {f"sft-{n}": f"{FOLDER}/students/step-{n}/model" for n in (1000, 1300, 1600, 1900, 2200)}
for n_steps in TD_STUDENTS:
    STUDENTS[f"sft-{n_steps}-td"] = f"{FOLDER}/student-td-{n_steps}/model"
TEACHERS = {
    "shipped": TEACHER,
    "sft-800": f"{FOLDER}/teachers/step-800/model",
    "sft-1200": f"{FOLDER}/teachers/step-1200/model",
    "sft-1600": f"{FOLDER}/teachers/step-1600/model",
    "style": f"{FOLDER}/teacher-style/model",
    "clone": f"{FOLDER}/students/step-1700/model",  # of the students' own training, just behind sft-1600
}
# Pairs that get two more seeds, for the noise ceiling.
REPEATED = [
    ("sft-1000", "shipped"),
    ("sft-1300", "sft-1200"),
    ("sft-1600", "style"),
    ("sft-1900", "clone"),
    ("sft-2200", "sft-1600"),
    ("sft-1300-td", "sft-800"),
]

DIGIT_SPEAKERS = ["jackson", "nicolas", "theo", "george", "lucas", "yweweler"]  # held out, one by one
STRENGTHS = [600, 1200, 2500]  # steps of the base's training, which has 2,500
ABLATIONS = {
    "default": "",
    "support-teacher": "--support teacher",
    "support-student": "--support student",
    "support-intersection": "--support intersection",
    "support-full": "--support full",
    "divergence-reverse": "--divergence reverse",
    "divergence-jsd": "--divergence jsd",
    "k-4": "--k 4",
    "k-8": "--k 8",
    "k-16": "--k 16",
    "k-64": "--k 64",
    "tau-0.5": "--tau 0.5",
    "tau-2": "--tau 2",
    "temperature-0.7": "--temperature 0.7",
    "temperature-1": "--temperature 1",
    "student-share-0.5": "--states reference --student-share 0.5",
    "parts-encoder": "--train-parts encoder",
    "parts-adapter": "--train-parts adapter",
    "parts-lm": "--train-parts lm",
}

# Teachers whose students get more and more TD, and what each has written for that.
READY_TEACHERS = {"style": (TEACHERS["style"], "td-text-style"), "shipped": (TEACHER, "td-text")}
READY_STARTS = [0, 50, 100, 200, 400]  # steps of TD
READY_SEEDS = 4
READY_LR = 1e-3
# What may help a student that is not ready.
RESCUES = {
    "lr-tenth": "",  # a tenth of the rate
    "divergence-reverse": "--divergence reverse",
    "divergence-jsd": "--divergence jsd",
    "tau-2": "--tau 2",
    "student-share-0.5": "--states teacher --student-share 0.5",
}
RESCUE_STARTS = [0, 100]

# Audio without transcripts: the three arms that one has, and the two that transcripts would bring.
LABEL_ARMS = ["opd", "teacher-kl", "ce-teacher", "offline-kl", "ce-reference"]
LABEL_RATE = 1e-3  # that of all arms, beside their tuned ones
LABEL_SEEDS = 6
FEW_LABEL_SEEDS = 3  # for what is not the primary comparison


def experiments(finished):
    """All runs in the order in which they are made, as dicts. finished: the lines that exist."""
    runs = []

    # Question 0: the learning rate of three arms, by the error on dev after 100 steps.
    for arm in TUNED_ARMS:
        for lr in LEARNING_RATES:
            runs.append(opd_run("tune", arm, 0, lr, steps=100, sets=DEV))
    rates = {}
    for arm in ARMS:
        rates[arm] = tuned_rate(KIN.get(arm, arm), finished)
    if None in rates.values():
        return runs

    # Question 1: the arms from one base. Seed by seed, so that a stop leaves pairs.
    for seed in range(max(SEEDS.values())):
        for arm, n_seeds in SEEDS.items():
            if seed < n_seeds:
                runs.append(opd_run("table-1", arm, seed, rates[arm]))
    runs.append(eval_run("table-1", "base", BASE))
    runs.append(eval_run("table-1", "teacher", TEACHER))

    # The arms of Table 1 have the rates tuned for them. Here offline-kl has that of opd.
    for seed in range(SEEDS["offline-kl"]):
        runs.append(opd_run("rate", "offline-kl", seed, rates["opd"]))

    # Question 2: the recipe. TD is 100 steps, OPD and more SFT are 200. Overlap is measured on the way.
    for seed in range(N_TD_SEEDS):
        td_model = f"{FOLDER}/table-2-td-seed{seed}/model"
        runs.append(td_run("td", seed, rates["ce-teacher"], student=BASE, steps=100))
        runs.append(td_run("td+sft", seed, rates["ce-teacher"], student=td_model, steps=200))
        for arm, student in (("opd", BASE), ("td+opd", td_model)):
            flags = "--save-every 50 --keep 9"
            run = opd_run("table-2", arm, seed, rates["opd"], student=student, flags=flags)
            runs.append(run)
            # Before OPD, base and teacher are the same for all seeds: once is enough.
            first = 50 if arm == "opd" and seed > 0 else 0
            for step in range(first, 201, 50):
                model = f"{FOLDER}/{run['name']}/step-{step}/model" if step else student
                overlap = overlap_run("table-2", f"{run['name']}-step{step}", model, TEACHER)
                runs.append({**overlap, "arm": arm, "seed": seed, "steps": step})
    # TD and SFT have the rate of the CE arms. Here more SFT has that of opd.
    for seed in range(N_TD_SEEDS):
        td_model = f"{FOLDER}/table-2-td-seed{seed}/model"
        runs.append(td_run("td+sft", seed, rates["opd"], student=td_model, steps=200, question="td-rate"))

    # Question 3: does overlap predict the gain? Both models alone, each pair before, 100 steps of OPD.
    for name, model in STUDENTS.items():
        runs.append(eval_run("table-3", f"student-{name}", model))
    for name, model in TEACHERS.items():
        runs.append(eval_run("table-3", f"teacher-{name}", model))
    for student, student_model in STUDENTS.items():
        for teacher, teacher_model in TEACHERS.items():
            name = f"table-3-{student}-{teacher}"
            runs.append(overlap_run("table-3", f"{name}-before", student_model, teacher_model))
            runs.append(pair_run(student, teacher, 0, rates["opd"]))
    for seed in (1, 2):
        for student, teacher in REPEATED:
            runs.append(pair_run(student, teacher, seed, rates["opd"]))
    # And what overlap does: KL on the intersection, or on as many ids as the union has, the student's own.
    for seed in range(3):
        for arm, flags in (("intersection", ""), ("student", "--k 52")):
            runs.append(opd_run("support", arm, seed, rates["opd"], flags=f"--support {arm} {flags}"))

    # Question 4: human speech. 100 steps from a base that has heard two of the five; the sixth is tested.
    # The learning rates are the example's; offline-kl is also run with that of opd.
    digit_arms = [(arm, arm, rates[arm]) for arm in TUNED_ARMS]
    digit_arms.append(("offline-kl with opd's lr", "offline-kl", rates["opd"]))
    for held_out in DIGIT_SPEAKERS:
        folder = f"{FOLDER}/digits-{held_out}"
        stem = f"digits-{held_out}.jsonl"
        student = f"{folder}-base-model/model"
        teacher = f"{folder}-teacher-model/model"
        test = f"{folder}-test/{stem}"
        for name, model in (("base", student), ("teacher", teacher)):
            run = eval_run("digits", f"{name}-{held_out}", model, test)
            runs.append({**run, "role": name, "condition": held_out})
        for seed in range(2):
            for label, arm, lr in digit_arms:
                run = opd_run("digits", arm, seed, lr, steps=100, student=student, teacher=teacher, sets=test)
                run["arm"] = label
                run["command"] += f" --train {folder}-train/{stem}"
                run["name"] += f"-{held_out}"
                run["condition"] = held_out
                runs.append(run)

    # Question 5: students of other strength (about 25, 50 and 100 % of the base's training), less audio. Both
    # arms have the rate of opd, because question 4 showed how much of a difference can be the rate's.
    for seed in range(2):
        for arm in ("opd", "offline-kl"):
            for steps in STRENGTHS:
                run = opd_run(
                    "strength", arm, seed, rates["opd"], student=f"{FOLDER}/students/step-{steps}/model"
                )
                run["name"] += f"-sft-{steps}"
                run["condition"] = f"base after {steps} steps"
                runs.append(run)
            for part in ("quarter", "half"):
                run = opd_run("amount", arm, seed, rates["opd"], flags=f"--train {SETS}/{part}.jsonl")
                run["name"] += f"-{part}"
                run["condition"] = f"a {part} of the audio"
                runs.append(run)
    for steps in STRENGTHS:
        runs.append(eval_run("strength", f"student-sft-{steps}", f"{FOLDER}/students/step-{steps}/model"))

    # Question 6: silence, noise, and clips longer than any in training, before and after.
    odd_sets = f"{SETS}/silence.jsonl {SETS}/noise.jsonl {SETS}/long.jsonl"
    runs.append(eval_run("robustness", "base", BASE, odd_sets))
    runs.append(eval_run("robustness", "teacher", TEACHER, odd_sets))
    for seed in (6, 7):
        for arm in ("opd", "offline-kl"):
            name = f"table-1-{arm}-lr{rates[arm]:g}-seed{seed}"
            runs.append(eval_run("robustness", f"{arm}-seed{seed}", f"{FOLDER}/{name}/model", odd_sets))

    # The two arms of the primary comparison from the base of another seed.
    runs.append(eval_run("base-2", "base", BASE_2))
    for seed in range(4):
        for arm in ("opd", "offline-kl"):
            runs.append(opd_run("base-2", arm, seed, rates[arm], student=BASE_2))

    # Question 7: one flag at a time, 100 steps.
    for seed in range(2):
        for arm, flags in ABLATIONS.items():
            runs.append(opd_run("ablation", arm, seed, rates["opd"], steps=100, flags=flags))

    runs += ready_runs()
    runs += label_runs(finished)

    # The larger instance, its learning rates again by the error on dev after 100 steps.
    for arm in TUNED_ARMS:
        for lr in SCALE_RATES:
            runs.append(scale_run("scale-tune", arm, 0, lr, steps=100, sets=DEV))
    scale_rates = {}
    for arm in TUNED_ARMS:
        scale_rates[arm] = tuned_rate(arm, finished, "scale-tune", SCALE_RATES)
    if None in scale_rates.values():
        return runs
    runs.append(eval_run("scale", "before-base", SCALE_BASE))
    runs.append(eval_run("scale", "before-teacher", SCALE_TEACHER))
    for seed in range(3):
        for arm, lr in scale_rates.items():
            runs.append(scale_run("scale", arm, seed, lr))
    return runs


def scale_run(question, arm, seed, lr, **options):
    """A run of opd.py on the larger instance."""
    flags = f"--bf16 --workers 1 --train {SCALE_TRAIN}"
    return opd_run(question, arm, seed, lr, student=SCALE_BASE, teacher=SCALE_TEACHER, flags=flags, **options)


def opd_run(question, arm, seed, lr, *, steps=200, student=BASE, teacher=TEACHER, flags="", sets=TESTS):
    """A run of opd.py."""
    parts = ["opd.py @example/opd.args", ARMS.get(arm, ""), flags.strip()]
    if student != BASE:
        parts.append(f"--student {student}")
    if teacher != TEACHER:
        parts.append(f"--teacher {teacher}")
    parts.append(f"--seed {seed} --steps {steps} --lr {lr:g}")
    if "--save-every" not in flags:
        parts.append(f"--save-every {steps}")
    parts.append(f"--eval {sets} --out {{out}}")
    return {
        "question": question,
        "name": f"{question}-{arm}-lr{lr:g}-seed{seed}",
        "arm": arm,
        "student": student,
        "teacher": teacher,
        "seed": seed,
        "steps": steps,
        "lr": lr,
        "command": " ".join(part for part in parts if part),
    }


def td_run(arm, seed, lr, *, student, steps, question="table-2", text="td-text"):
    """SFT on what the teacher has written for the clips of train."""
    return {
        "question": question,
        "name": f"{question}-{arm}-seed{seed}",
        "arm": arm,
        "student": student,
        "teacher": TEACHER,
        "seed": seed,
        "steps": steps,
        "lr": lr,
        "command": f"{SFT} --train {FOLDER}/{text}/train.jsonl {TD} --lr {lr:g} --seed {seed}"
        f" --eval {TESTS} --model {student} --steps {steps}",
    }


def ready_runs():
    """Question 8: how much TD makes a student ready for OPD?

    Checkpoints of one run of TD, a seed and teacher, are the starts; from each 100 steps of every arm.
    """
    runs = []
    for seed in range(READY_SEEDS):
        for teacher in READY_TEACHERS:
            runs.append(first_td_run(teacher, seed))
            for td_steps in READY_STARTS:
                if td_steps > 0 or seed == 0:  # the base is the same for all seeds: once is enough
                    runs.append(ready_overlap_run(teacher, seed, td_steps))
                for arm in ("opd", "td"):
                    runs.append(ready_run("ready", arm, teacher, seed, td_steps))
    # Behind those of the primary comparison.
    for seed in range(READY_SEEDS):
        for teacher in READY_TEACHERS:
            for td_steps in READY_STARTS:
                runs.append(ready_run("ready-kl", "teacher-kl", teacher, seed, td_steps))
    for seed in range(2):
        for td_steps in RESCUE_STARTS:
            for arm, flags in RESCUES.items():
                lr = READY_LR / 10 if arm == "lr-tenth" else READY_LR
                runs.append(ready_run("ready-rescue", arm, "style", seed, td_steps, lr=lr, flags=flags))
    return runs


def first_td_run(teacher, seed):
    """The run of TD of which checkpoints are the starts of question 8."""
    model, text = READY_TEACHERS[teacher]
    run = td_run("first-td", seed, READY_LR, student=BASE, steps=500, question="ready", text=text)
    run["name"] += f"-{teacher}"
    run["command"] += " --save-every 50"
    return {**run, "teacher": model}


def ready_start(teacher, seed, td_steps):
    """The student of a seed after some steps of TD on what a teacher has written."""
    if td_steps == 0:
        return BASE
    return f"{FOLDER}/{first_td_run(teacher, seed)['name']}/step-{td_steps}/model"


def ready_overlap_run(teacher, seed, td_steps):
    """The overlap of such a student with its teacher."""
    student = ready_start(teacher, seed, td_steps)
    name = f"ready-before-seed{seed}-{teacher}-{td_steps}"
    run = overlap_run("ready", name, student, READY_TEACHERS[teacher][0])
    return {**run, "seed": seed, "td_steps": td_steps}


def ready_run(question, arm, teacher, seed, td_steps, *, lr=READY_LR, flags=""):
    """100 steps of OPD, of another arm of it, or of more TD, from such a student."""
    model, text = READY_TEACHERS[teacher]
    student = ready_start(teacher, seed, td_steps)
    if arm == "td":
        run = td_run(arm, seed, lr, student=student, steps=100, question=question, text=text)
    else:
        run = opd_run(question, arm, seed, lr, steps=100, student=student, teacher=model, flags=flags)
    run["name"] += f"-{teacher}-{td_steps}"
    return {**run, "teacher": model, "td_steps": td_steps}


def label_runs(finished):
    """Question 9: audio without transcripts that no teacher has heard. OPD, or SFT on what it writes?"""
    runs = []
    for teacher, model in LABEL_TEACHERS.items():
        runs.append(eval_run("labels", f"teacher-{teacher}", model, f"{TESTS} {FRESH}"))
    runs.append(eval_run("labels", "base", BASE, f"{TESTS} {FRESH}"))
    pairs = []
    for teacher in LABEL_TEACHERS:
        for arm in LABEL_ARMS:
            if (teacher, arm) != ("weak", "ce-reference"):  # which reads no teacher: once is enough
                pairs.append((teacher, arm))
    rates = {}
    for teacher, arm in pairs:
        for lr in LEARNING_RATES:
            runs.append(label_run("labels-tune", arm, teacher, 0, lr, steps=100, sets=DEV))
        rate = tuned_rate(arm, finished, "labels-tune", LEARNING_RATES, LABEL_TEACHERS[teacher])
        if rate is not None:
            rates[teacher, arm] = rate
    for seed in range(LABEL_SEEDS):
        for (teacher, arm), rate in rates.items():
            runs.append(label_run("labels", arm, teacher, seed, rate))
    if len(rates) < len(pairs):
        return runs
    for seed in range(LABEL_SEEDS):
        for (teacher, arm), rate in rates.items():
            is_primary = teacher == "weak" and arm in ("opd", "ce-teacher")
            if rate != LABEL_RATE and (is_primary or seed < FEW_LABEL_SEEDS):
                runs.append(label_run("labels-rate", arm, teacher, seed, LABEL_RATE, sets=TESTS))
    for seed in range(FEW_LABEL_SEEDS):
        for part in ("surest", "random"):
            lr = rates["weak", "ce-teacher"]
            run = label_run("labels-filter", "ce-teacher", "weak", seed, lr, sets=TESTS, train=part)
            run["name"] += f"-{part}"
            runs.append({**run, "condition": part})
    return runs


def label_run(question, arm, teacher, seed, lr, *, steps=200, sets=None, train="fresh"):
    """A run of opd.py on the fresh audio, or on a half of it (results/labels.py).

    sets: what is scored; the test sets and the fresh audio if absent.
    """
    folder = f"{FOLDER}/labels-{teacher}"
    sets = sets or f"{TESTS} {folder}/fresh.jsonl"
    flags = f"--train {folder}/{train}.jsonl"
    model = LABEL_TEACHERS[teacher]
    run = opd_run(question, arm, seed, lr, steps=steps, teacher=model, flags=flags, sets=sets)
    run["name"] += f"-{teacher}"
    return run


def pair_run(student, teacher, seed, lr):
    """A cell of question 3: 100 steps of OPD of one student with one teacher."""
    run = opd_run("table-3", "opd", seed, lr, steps=100, student=STUDENTS[student], teacher=TEACHERS[teacher])
    run["name"] = f"table-3-{student}-{teacher}-seed{seed}"
    return run


def eval_run(question, name, model, sets=TESTS):
    """A model as it is, on some sets."""
    command = f"eval.py --model {model} --data {sets} --out {{out}}"
    return {"question": question, "name": f"{question}-{name}", "model": model, "command": command}


def overlap_run(question, name, student, teacher):
    """The overlap of a student with a teacher, on dev."""
    command = f"overlap.py --student {student} --teacher {teacher} --data {DEV} --out {{out}}"
    return {
        "question": question,
        "name": name,
        "student": student,
        "teacher": teacher,
        "command": command,
    }


def tuned_rate(arm, finished, question="tune", rates=LEARNING_RATES, teacher=None):
    """The learning rate with the lowest error on dev, or None while the grid is not finished.

    teacher: the one of a question with several.
    """
    errors = {}
    for line in finished:
        if line["question"] == question and line["arm"] == arm and teacher in (None, line["teacher"]):
            errors[line["lr"]] = sum(line["errors"]["dev"])
    if len(errors) < len(rates):
        return None
    return min(errors, key=errors.get)


# ------------------------------------------------------------------------------------------------- the loop


def needs(run):
    """The names whose folders a command reads."""
    names = []
    for argument in shlex.split(run["command"]):
        if argument.startswith(f"{FOLDER}/"):
            names.append(argument.split("/")[2])
    return names


def is_complete(name):
    return (WORK / name / "finished").exists()


def next_job(runs, makers, busy):
    """The first of `runs` that can start now, or what makes a folder that one of them waits for, or None."""
    for run in runs:
        if run["name"] in busy:
            continue
        missing = [makers[name] for name in needs(run) if not is_complete(name)]
        job = next_job(missing, makers, busy) if missing else run
        if job is not None:
            return job
    return None


def git(*arguments):
    """What git prints, without the last line's end."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def checked_out():
    """The commit that is checked out, 12 digits."""
    edited = git("diff", "--name-only", "HEAD", "--", *CODE)
    if edited:
        raise SystemExit(f"commit your changes first, a line names the commit that made it: {edited}")
    return git("rev-parse", "HEAD")[:12]


def names_before(commit, questions):
    """The names of the finished runs of some questions which commits before the given one have made."""
    later = git("rev-list", "HEAD", "--not", f"{commit}^@").split()  # the commit itself is one of them
    later = {name[:12] for name in later}
    lines = [line for line in finished_lines() if line["question"] in questions]
    return {line["name"] for line in lines if line["commit"] not in later}


def start(job):
    """Starts a job in one process of one thread. What an earlier start left is removed."""
    shutil.rmtree(WORK / job["name"], ignore_errors=True)
    WORK.mkdir(parents=True, exist_ok=True)
    with open(WORK / f"{job['name']}.log", "w", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, *shlex.split(command_of(job))],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )


def command_of(job):
    """The command of a job, with the name of its folder."""
    return job["command"].replace("{out}", f"{FOLDER}/{job['name']}")


def line_of(run, seconds):
    """The line of a run that has ended well."""
    out = WORK / run["name"]
    line = {**run, "command": command_of(run), "seconds": round(seconds)}
    line["date"] = datetime.date.today().isoformat()
    script = run["command"].split()[0]
    if script == "overlap.py":
        overlap = json.loads((out / "overlap.json").read_text(encoding="utf-8"))
        line["measures"] = rounded(overlap["measures"]["all"])
        clips = data.read_lines(out / "clips.jsonl")
        line["baselines"] = rounded(validate.baselines(clips))
        looping = [eval.looping(clip["student"]) for clip in clips]
        line["baselines"]["looping"] = sum(looping) / len(clips)
        return line
    folder = out if script == "eval.py" else out / f"eval-{run['steps']}"
    # Whisper's normaliser makes "one two" 12, a single word: digit strings are scored without it.
    normalizer = "paper" if run["question"] == "digits" else "default"
    line["errors"] = errors_by_speaker(folder, normalizer)
    if run["question"] == "robustness":
        line["health"] = health(folder)
    if script == "opd.py":
        line["vuss"] = vuss_of(out / "metrics.jsonl", at_every_k=run["question"] == "table-2")
    if script == "opd.py" and run["question"] == "labels":
        line["shared"] = labels.shared_errors(data.read_lines(folder / "fresh.jsonl"))
        line["shared_before"] = labels.shared_errors(data.read_lines(out / "eval-0" / "fresh.jsonl"))
    if run["question"] == "ready" and run["arm"] == "opd":
        line["errors_before"] = errors_by_speaker(out / "eval-0", normalizer)
        first = data.read_lines(out / "metrics.jsonl")[0]
        line["first_step"] = rounded({name: first[name] for name in ("kl", "top1", "looping")})
    return line


def rounded(figures):
    """The numbers among {name: value}, to six digits."""
    return {name: float(f"{value:.6g}") for name, value in figures.items() if value is not None}


def vuss_of(path, at_every_k):
    """{vuss, or also vuss_1, …: means over the first ten steps, the last ten, and all} of a metrics.jsonl."""
    steps = data.read_lines(path)
    table = {}
    for key in steps[0]:
        if key == "vuss" or (at_every_k and key.startswith("vuss_")):
            values = [step[key] for step in steps]
            parts = {"first": values[:10], "last": values[-10:], "all": values}
            table[key] = {name: round(float(np.mean(part)), 3) for name, part in parts.items()}
    return table


def health(folder):
    """{set: [clips, empty, looping, capped transcripts]} of an evaluation."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    counts = {}
    for stem, figures in summary.items():
        counts[stem] = [figures["n"], figures["empty"], figures["looping"], figures["capped"]]
    return counts


def errors_by_speaker(folder, normalizer):
    """{set: errors of each speaker, speakers sorted} of the result files in a folder.

    The reference units of each speaker go to results/units.json, where they must be the same for all runs.
    """
    units = json.loads(UNITS.read_text(encoding="utf-8")) if UNITS.exists() else {}
    errors = {}
    for path in sorted(folder.glob("*.jsonl")):
        speakers = collections.defaultdict(lambda: [0, 0])
        for result in eval.score(data.read_lines(path), normalizer):
            speakers[result["speaker"]][0] += result["errors"]
            speakers[result["speaker"]][1] += result["units"]
        names = sorted(speakers)
        units_of_set = {name: speakers[name][1] for name in names}
        units.setdefault(path.stem, units_of_set)
        assert units[path.stem] == units_of_set, f"{path}: other clips than before"
        errors[path.stem] = [speakers[name][0] for name in names]
    UNITS.write_text(json.dumps(units, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    return errors


def finished_lines():
    if not RUNS.exists():
        return []
    return data.read_lines(RUNS)


def add_line(line):
    """Adds a line to runs.jsonl, or puts it in the place of the line of its name.

    The file changes at once or not at all: it is written beside and renamed.
    """
    beside = RUNS.with_suffix(".new")
    lines = {one["name"]: one for one in [*finished_lines(), line]}
    with open(beside, "w", encoding="utf-8") as file:
        for one in lines.values():
            file.write(json.dumps(one, ensure_ascii=False, separators=(",", ":")) + "\n")
    os.replace(beside, RUNS)


def finish(job, seconds, has_line):
    """Marks the folder of a job as complete, and adds the line of a run that has none yet."""
    (WORK / job["name"] / "finished").touch()
    if "question" in job and not has_line:
        add_line(line_of(job, seconds))
    print(f"{job['name']}: {seconds:.0f} s", flush=True)


QUESTIONS = ["tune", "table-1", "rate", "table-2", "td-rate", "table-3", "support", "digits", "strength"]
QUESTIONS += ["amount", "robustness", "base-2", "ablation", "ready", "ready-kl", "ready-rescue"]
QUESTIONS += ["labels-tune", "labels", "labels-filter", "labels-rate", "scale-tune", "scale"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--list", action="store_true", help="print what is finished and what is left")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=QUESTIONS, help="some questions")
    parser.add_argument("--since", metavar="COMMIT", help="redo the runs that commits before this one made")
    parser.add_argument(
        "--jobs",
        type=int,
        choices=range(1, 65),
        default=1,
        metavar="N",
        help="runs side by side, one core each",
    )
    return parser.parse_args(argv)


def main(args):
    running = {}  # process → its job and when it began
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that `finally` is reached
    try:
        work(args, running)
    finally:  # where a run has failed, or this one is stopped, the others end too
        for process in running:
            process.terminate()


def work(args, running):
    outdated = names_before(args.since, args.only) if args.since else set()
    while True:
        lines = finished_lines()
        finished_names = {line["name"] for line in lines} - outdated
        all_runs = experiments(lines)
        runs = [run for run in all_runs if run["question"] in args.only]
        left = [run for run in runs if run["name"] not in finished_names]
        if args.list:
            print(f"{len(runs) - len(left)} of {len(runs)} runs are finished; next:")
            for run in left:
                print("  python", command_of(run))
            return

        makers = {name: {"name": name, "command": command} for name, command in MODELS.items()}
        makers.update({run["name"]: run for run in all_runs})
        busy = {job["name"] for job, _ in running.values()}
        job = next_job(left, makers, busy)
        if job is None and not running:
            return
        if job is not None and len(running) < args.jobs:
            job = {**job, "commit": checked_out()}
            running[start(job)] = (job, time.time())
            continue

        time.sleep(1)
        for process in list(running):
            if process.poll() is None:
                continue
            job, began = running.pop(process)
            if process.returncode:
                raise SystemExit(f"{job['name']} failed: see {WORK / job['name']}.log")
            finish(job, time.time() - began, job["name"] in finished_names)
            outdated.discard(job["name"])
            # A run's folder goes, unless an unfinished run reads it. Models stay.
            needed = set()
            for run in all_runs:
                if run["name"] not in finished_names:
                    needed.update(needs(run))
            if "question" in job and job["name"] not in needed:
                shutil.rmtree(WORK / job["name"])


if __name__ == "__main__":
    main(parse_args())
