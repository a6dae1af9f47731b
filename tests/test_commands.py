"""The commands as a user gives them: stages in a row, torchrun, several nodes, and changed copies."""

import json
import re
import shutil
import sys

import pytest
import torch
import transformers
from conftest import DATA, ROOT
from runs import (
    argv_of,
    assert_same_metrics,
    assert_same_run,
    error_line,
    free_port,
    lines_of,
    run_command,
    run_on_cpu,
    run_ranks,
    start_command,
    status_of,
    train,
    weights_of,
    write_lines,
    write_stage,
)
from test_training import opd_step

import eval as evaluation
import opd
import sft
from data import read_manifest
from model import SpeechLM

EXAMPLE = ROOT / "example"


@pytest.fixture(autouse=True, scope="module")
def on_cpu():
    yield from run_on_cpu()


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return write_stage(tmp_path_factory.mktemp("stage"))


# ---- launches ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_is_one_process(stage, tmp_path):
    """The command as the README gives it: the same metrics and errors on two ranks as on one."""
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ["--eval", stage / "m.jsonl", "--steps", 2, "--workers", 1]
    expected = train(opd, stage, one, *flags)
    status, text = run_command("opd.py", argv_of(opd, stage, two, *flags), nproc=2)
    assert status == 0, text[-3000:]
    assert "2 process(es) on cpu" in text and "before %" in text and str(two / "model") in text
    assert_same_metrics(lines_of(two / "metrics.jsonl"), expected, 1e-5)
    summaries = [json.loads((out / "summary.json").read_text()) for out in (one, two)]
    for when in ("before", "after"):
        sets = [{**summary[when]["m"], "rtf": 0} for summary in summaries]
        assert sets[0] == sets[1]
    assert json.loads((two / "config.json").read_text())["world_size"] == 2


def test_a_mistake_that_all_ranks_meet_is_printed_once(stage, tmp_path):
    argv = argv_of(opd, stage, tmp_path / "run", "--max-seconds", 0.1)
    results = run_ranks(lambda: status_of(opd, argv), 2)
    assert [status for status, _ in results] == [2, 2]
    assert "no clip of at most --max-seconds" in error_line(results[0][1])
    assert results[1][1] == "" and not (tmp_path / "run").exists()
    # And where only rank 0 looks: --out.
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    argv = argv_of(opd, stage, tmp_path / "run")
    results = run_ranks(lambda: status_of(opd, argv), 2)
    assert [status for status, _ in results] == [2, 2]
    assert "is not empty" in error_line(results[0][1]) and results[1][1] == ""


@pytest.mark.slow
def test_a_mistake_is_one_line_and_status_2_of_the_command(stage, tmp_path):
    argv = argv_of(opd, stage, tmp_path / "run", "--train", "nowhere.jsonl")
    status, text = run_command("opd.py", argv)
    assert status == 2 and text == "opd.py: error: nowhere.jsonl: no such file or folder\n"
    status, text = run_command(
        "sft.py", argv_of(sft, stage, tmp_path / "run", "--train", "no.jsonl"), nproc=2
    )
    lines = [line for line in text.splitlines() if "sft.py: error: " in line]
    assert status != 0 and lines == ["sft.py: error: no.jsonl: no such file or folder"]


@pytest.mark.slow
def test_two_nodes_are_two_ranks(stage, tmp_path):
    """Two torchruns that meet by --rdzv_endpoint, a process each: the run of one with two, bit for bit."""
    nodes = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{free_port()}", "--rdzv_id=1"]
    argv = argv_of(opd, stage, tmp_path / "two", "--steps", 2)
    logs = [open(tmp_path / f"log-{i}", "w+") for i in range(2)]
    agents = [start_command("opd.py", argv, 1, nodes, log) for log in logs]
    for agent, log in zip(agents, logs):
        status = agent.wait(150)
        log.seek(0)
        assert status == 0, log.read()[-3000:]
    argv = argv_of(opd, stage, tmp_path / "one", "--steps", 2)
    status, text = run_command("opd.py", argv, nproc=2)
    assert status == 0, text[-3000:]
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_the_example_on_eight_ranks(tmp_path):
    """The owner's command, on whatever cores there are: the losses are those of one process."""
    flags = ["@example/opd.args", "--steps", 2, "--eval", "--out"]
    status, text = run_command("opd.py", [*flags, tmp_path / "eight"], nproc=8)
    assert status == 0, text[-3000:]
    status, text = run_command("opd.py", [*flags, tmp_path / "one"])
    assert status == 0, text[-3000:]
    eight, one = (lines_of(tmp_path / name / "metrics.jsonl") for name in ("eight", "one"))
    assert_same_metrics(eight, one, 1e-5)
    assert len(one) == 2 and one[0]["positions"] > 100


# ---- stages ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_td_and_opd_on_the_example(tmp_path):
    """eval.py writes the teacher's transcripts, sft.py learns them, opd.py goes on from there."""
    clips = read_manifest(EXAMPLE / "dev.jsonl")[:12]
    lines = [{**clip.fields, "audio": clip.audio} for clip in clips]
    path = write_lines(tmp_path / "td.jsonl", lines)
    teacher = EXAMPLE / "teacher"
    argv = ["--model", teacher, "--data", path, "--out", tmp_path / "written"]
    assert status_of(evaluation, [str(flag) for flag in argv]) == 0
    results = lines_of(tmp_path / "written/td.jsonl")
    assert len(results) == 12 and sum(line["hyp"] == line["text"] for line in results) >= 10

    steps = ["--workers", 0, "--steps", 5, "--batch-size", 12, "--warmup-steps", 1, "--lr", 3e-4]
    argv = ["--train", tmp_path / "written/td.jsonl", "--text-field", "hyp", "--model", EXAMPLE / "base"]
    argv += ["--out", tmp_path / "td", *steps]
    assert status_of(sft, [str(flag) for flag in argv]) == 0
    argv = ["--train", path, "--student", tmp_path / "td/model", "--teacher", teacher]
    argv += ["--out", tmp_path / "opd", "--eval", path, *steps]
    assert status_of(opd, [str(flag) for flag in argv]) == 0
    for name in ("td", "opd"):
        losses = [line["loss"] for line in lines_of(tmp_path / name / "metrics.jsonl")]
        assert len(losses) == 5 and losses[-1] < losses[0]
    summary = json.loads((tmp_path / "opd/summary.json").read_text())
    assert summary["before"]["td"]["n"] == summary["after"]["td"]["n"] == 12
    assert SpeechLM.from_pretrained(tmp_path / "opd/model").architecture == "GlmAsrForConditionalGeneration"


@pytest.mark.slow
@pytest.mark.skipif(
    not (DATA / "aishell_sample").exists(), reason=f"no recordings of people in {DATA} (set ASR_OPD_DATA)"
)
def test_recordings_of_people_through_the_same_commands(stage, tmp_path):
    """English and Mandarin together: SFT, the model's own transcripts, SFT on them, OPD with evaluation."""
    manifests = [DATA / "en_prompts/manifest.jsonl", DATA / "aishell_sample/manifest.jsonl"]
    steps = ["--train", *manifests, "--steps", 2, "--batch-size", 4]
    train(sft, stage, tmp_path / "teacher", *steps, "--model", stage / "teacher", "--ctc-weight", 0.5)
    lines = []
    for manifest in manifests:
        lines += [{**clip.fields, "audio": clip.audio} for clip in read_manifest(manifest)[:3]]
    subset = write_lines(tmp_path / "subset.jsonl", lines)
    argv = ["--model", tmp_path / "teacher/model", "--data", subset, "--out", tmp_path / "td"]
    assert status_of(evaluation, [*map(str, argv), "--max-new-tokens", "16"]) == 0
    summary = json.loads((tmp_path / "td/summary.json").read_text())["subset"]
    assert summary["metric"] == "MER" and summary["n"] == 6 and summary["units"] > 0
    more = ["--train", tmp_path / "td/subset.jsonl", "--text-field", "hyp", "--steps", 2, "--batch-size", 4]
    assert len(train(sft, stage, tmp_path / "student", *more)) == 2
    more = ["--student", tmp_path / "student/model", "--teacher", tmp_path / "teacher/model"]
    assert len(train(opd, stage, tmp_path / "opd", *steps, *more)) == 2


# ---- changed copies ----------------------------------------------------------------------------------------


def write_copy(folder, file, old, new):
    """The scripts with one passage replaced: `old` is a pattern that must be there once."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    text, n = re.subn(old, lambda match: new, (folder / file).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert n == 1, f"{file} has the passage {n} times"
    (folder / file).write_text(text, encoding="utf-8")


def run_copy(folder, action):
    """Runs action() where the scripts of `folder` take the place of ours. → status, text"""

    def in_its_place():
        for path in folder.glob("*.py"):
            sys.modules.pop(path.stem, None)
        sys.path.insert(0, str(folder))
        return action()

    return run_ranks(in_its_place, 1)[0]


def train_copy(folder, stage, out, *more):
    """Two steps of the copy's opd.py. → its metrics"""

    def action():
        import opd as copy

        assert copy.__file__.startswith(str(folder))
        return status_of(copy, argv_of(copy, stage, out, "--steps", 2, "--batch-size", 5, "--clip", 0, *more))

    status, text = run_copy(folder, action)
    assert status == 0, text
    return lines_of(out / "metrics.jsonl")


def assert_holds_what_trained(out, start):
    """OUT/model is the last checkpoint's, and every tensor of it moved."""
    end = weights_of(out / "model")
    last = weights_of(out / "step-2/model")
    assert end.keys() == start.keys() == last.keys()
    for name in start:
        assert torch.equal(end[name], last[name]) and not torch.equal(end[name], start[name]), name


@pytest.mark.slow
def test_a_copy_with_another_divergence(stage, tmp_path):
    """The sum of both directions, by a change of one line of support_kl."""
    folder, out = tmp_path / "copy", tmp_path / "run"
    folder.mkdir()
    old = re.escape("kl = forward_kl(log_p, log_q)")
    write_copy(folder, "model.py", old, "kl = forward_kl(log_p, log_q) + reverse_kl(log_p, log_q)")
    lines = train_copy(folder, stage, out)

    def both_directions(support, teacher_logits, student_logits, tau):
        p = (teacher_logits[support] / tau).softmax(dim=0)
        q = (student_logits[support] / tau).softmax(dim=0)
        return tau**2 * ((p - q) * (p.log() - q.log())).sum()

    metrics, _, _ = opd_step(stage, 5, divergence=both_directions)
    assert {key: lines[0][key] for key in metrics} == pytest.approx(metrics, rel=1e-5)
    assert_holds_what_trained(out, weights_of(stage / "student"))


NEW_ENCODER = '''class GatedEncoder(Encoder):
    """An encoder with one more layer."""

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, mel, frame_lens):
        x = super().forward(mel, frame_lens)
        return x * torch.sigmoid(self.gate(x))


class Adapter(nn.Module):'''


@pytest.mark.slow
def test_a_copy_with_another_encoder(stage, tmp_path):
    """The folders that it saves hold the new layer's trained weights, and it loads them again."""
    folder, out = tmp_path / "copy", tmp_path / "run"
    folder.mkdir()
    write_copy(folder, "model.py", r"class Adapter\(nn\.Module\):", NEW_ENCODER)
    text = (folder / "model.py").read_text()
    assert text.count("encoder = Encoder(audio)") == 1
    (folder / "model.py").write_text(
        text.replace("encoder = Encoder(audio)", "encoder = GatedEncoder(audio)")
    )

    def write_models():
        import model

        for name in ("student", "teacher"):
            config = transformers.GlmAsrConfig.from_pretrained(stage / name)
            tokenizer = transformers.AutoTokenizer.from_pretrained(stage / name)
            torch.manual_seed(0)
            model.SpeechLM(config, tokenizer).save_pretrained(tmp_path / name)
        return 0

    status, text = run_copy(folder, write_models)
    assert status == 0, text
    flags = ["--student", tmp_path / "student", "--teacher", tmp_path / "teacher"]
    lines = train_copy(folder, stage, out, *flags)
    start = weights_of(tmp_path / "student")
    assert "model.audio_tower.gate.weight" in start
    assert_holds_what_trained(out, start)
    # It starts from its own result.
    again = train_copy(folder, stage, tmp_path / "again", *flags, "--student", out / "model")
    assert again[0]["loss"] < lines[0]["loss"]
