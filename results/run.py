"""Runs the experiments of RESULTS.md: a plain list of commands.

    python results/run.py --list               # what is finished, and what is left
    python results/run.py --jobs 2             # everything that is left, two runs side by side
    python results/run.py --only table-1       # one question

A run is finished when results/runs.jsonl has its line. So this can be stopped at any moment, and started
again: what was being run begins anew. Each run is one process of one thread, in runs/results/NAME.

A line holds the question, the arm, the settings, the command, the seconds, VUSS, and for each set the errors
and reference units of each speaker, from which results/tables.py computes everything else.
"""

import argparse
import collections
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
RUNS = HERE / "runs.jsonl"
WORK = ROOT / "runs" / "results"
sys.path.insert(0, str(ROOT))

TESTS = [f"example/{name}.jsonl" for name in ("en-clean", "en-other", "zh-read", "zh-net", "zh-meeting")]
DEV = ["example/dev.jsonl"]

ARMS = {
    "opd": [],
    "offline-kl": ["--states", "reference"],
    "teacher-kl": ["--states", "teacher"],
    "ce-reference": ["--states", "reference", "--objective", "ce"],
    "ce-teacher": ["--states", "teacher", "--objective", "ce"],
}
LEARNING_RATES = [2.5e-4, 5e-4, 1e-3, 2e-3]  # the grid, the same for all
KIN = {"teacher-kl": "offline-kl", "ce-teacher": "ce-reference"}  # they take the learning rate of their kin
SEEDS = {"opd": 8, "offline-kl": 8, "teacher-kl": 5, "ce-reference": 5, "ce-teacher": 3}


def experiments(finished):
    """All runs in the order in which they are made, as dicts. finished: the lines that exist."""
    runs = []

    # Question 0: the learning rate of three arms, by the error on dev after 100 steps.
    for arm in ("opd", "offline-kl", "ce-reference"):
        for lr in LEARNING_RATES:
            runs.append({"question": "tune", "arm": arm, "seed": 0, "steps": 100, "lr": lr, "sets": DEV})

    # Question 1: the arms from one base. Seed by seed, so that a stop leaves pairs.
    for seed in range(max(SEEDS.values())):
        for arm, n_seeds in SEEDS.items():
            lr = tuned_rate(KIN.get(arm, arm), finished)
            if seed < n_seeds and lr is not None:
                runs.append(
                    {"question": "table-1", "arm": arm, "seed": seed, "steps": 200, "lr": lr, "sets": TESTS}
                )
    for run in runs:
        run["name"] = f"{run['question']}-{run['arm']}-lr{run['lr']:g}-seed{run['seed']}"
    return runs


def tuned_rate(arm, finished):
    """The learning rate with the lowest error on dev, or None while the grid is not finished."""
    errors = {}
    for line in finished:
        if line["question"] == "tune" and line["arm"] == arm:
            errors[line["lr"]] = error_rate(line["errors"]["dev"])
    if len(errors) < len(LEARNING_RATES):
        return None
    return min(errors, key=errors.get)


def error_rate(speakers):
    """Σ errors / Σ units in %, of {speaker: [errors, units]}."""
    errors = sum(counts[0] for counts in speakers.values())
    units = sum(counts[1] for counts in speakers.values())
    return 100 * errors / units


def command_of(run):
    command = ["opd.py", "@example/opd.args", *ARMS[run["arm"]]]
    command += ["--seed", str(run["seed"]), "--steps", str(run["steps"]), "--lr", f"{run['lr']:g}"]
    command += ["--save-every", str(run["steps"]), "--eval", *run["sets"]]
    return [*command, "--out", f"runs/results/{run['name']}"]


def start(run):
    """Starts a run in one process of one thread. What an earlier start left is removed."""
    shutil.rmtree(WORK / run["name"], ignore_errors=True)
    WORK.mkdir(parents=True, exist_ok=True)
    with open(WORK / f"{run['name']}.log", "w", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, *command_of(run)],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def line_of(run, seconds):
    """The line of a run that has ended well."""
    out = WORK / run["name"]
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    line = {key: value for key, value in run.items() if key != "sets"}
    line["command"] = " ".join(command_of(run))
    line["seconds"] = round(seconds)
    line["vuss_first"] = round(summary["vuss_first"], 3)
    line["vuss_last"] = round(summary["vuss_last"], 3)
    line["errors"] = errors_by_speaker(out / f"eval-{run['steps']}")
    line["before"] = {stem: round(figures["value"], 3) for stem, figures in summary["before"].items()}
    return line


def errors_by_speaker(folder):
    """{set: {speaker: [errors, units]}} of the result files in a folder."""
    sets = {}
    for path in sorted(folder.glob("*.jsonl")):
        speakers = collections.defaultdict(lambda: [0, 0])
        for raw in path.read_text(encoding="utf-8").splitlines():
            result = json.loads(raw)
            speakers[result["speaker"]][0] += result["errors"]
            speakers[result["speaker"]][1] += result["units"]
        sets[path.stem] = dict(speakers)
    return sets


def finished_lines():
    if not RUNS.exists():
        return []
    return [json.loads(raw) for raw in RUNS.read_text(encoding="utf-8").splitlines()]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--list", action="store_true", help="print what is finished and what is left")
    parser.add_argument("--only", help="one question, such as table-1")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one core each")
    return parser.parse_args(argv)


def main(args):
    running = {}  # process → its run and when it began
    while True:
        lines = finished_lines()
        names = {line["name"] for line in lines}
        runs = [run for run in experiments(lines) if args.only in (None, run["question"])]
        left = [run for run in runs if run["name"] not in names]
        if args.list:
            print(f"{len(runs) - len(left)} of {len(runs)} runs are finished; next:")
            for run in left:
                print("  python", " ".join(command_of(run)))
            return
        started = {run["name"] for run, _ in running.values()}
        waiting = [run for run in left if run["name"] not in started]
        if not waiting and not running:
            return
        if waiting and len(running) < args.jobs:
            process = start(waiting[0])
            running[process] = (waiting[0], time.time())
            continue
        time.sleep(1)
        for process in list(running):
            if process.poll() is None:
                continue
            run, began = running.pop(process)
            if process.returncode:
                raise SystemExit(f"{run['name']} failed: see {WORK / run['name']}.log")
            line = line_of(run, time.time() - began)
            with open(RUNS, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            shutil.rmtree(WORK / run["name"])
            print(f"{run['name']}: {line['seconds']} s; {len(left) - 1} left", flush=True)


if __name__ == "__main__":
    main(parse_args())
