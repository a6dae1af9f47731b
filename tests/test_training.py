"""opd.py, sft.py, eval.py and overlap.py end to end on tiny models,
and that results do not depend on how work is split."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

import data
import eval as evaluation
import opd
import overlap
import sft
from conftest import DATA, ROOT, byte_tokenizer, noise, tiny_config, tiny_model
from data import InputError, collate, read_manifest
from model import SpeechLM, align_vocabularies, cosine_lr, shard, whole


# ---- helpers -----------------------------------------------------------------------------------------------
def run(script, *args, nproc=0, check=True):
    """Runs a script as a user does, under torchrun where nproc > 0. → CompletedProcess with text output."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]     # a free port
    launch = [sys.executable, *(torchrun if nproc else [])]
    done = subprocess.run([*launch, str(ROOT / script), *map(str, args)], capture_output=True, text=True,
                          cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=280)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def metrics_of(out):
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


@pytest.fixture
def models(tmp_path):
    """Folders of a student and of a larger teacher, same tokenizer."""
    tiny_model(0).save_pretrained(tmp_path / "student")
    tiny_model(1, width=48, hidden=64).save_pretrained(tmp_path / "teacher")
    return tmp_path / "student", tmp_path / "teacher"


def opd_args(clips_dir, models, out, *more):
    return ["--train", str(clips_dir / "m.jsonl"), "--student", str(models[0]), "--teacher", str(models[1]),
            "--out", str(out), "--workers", "0", "--steps", "3", "--batch-size", "6", "--lr", "1e-3",
            "--warmup-steps", "1", "--k", "8", "--max-new-tokens", "12", *map(str, more)]


def opd_run(*args):
    opd.main(opd.parse_args(opd_args(*args)))
    return metrics_of(args[2])


# ---- gradients do not depend on the split ------------------------------------------------------------------
def fixed_micros(student, teacher, rank, world, size):
    """This rank's share of 6 fixed rollouts of very different lengths, `size` clips at a time;
    one empty, one capped."""
    texts, stopped = (["a", "a much longer transcript than the others", "", "bc", "capped", "xyz"],
                      [True, True, True, True, False, True])
    mine, alignment, micros = list(range(6))[rank::world], align_vocabularies(student, teacher), []
    for cut in (mine[i:i + size] for i in range(0, len(mine), size)):
        waves = [noise(0.4 + 0.3 * i, seed=i) for i in cut]
        batch, teacher_batch = collate(waves, student.front_end), collate(waves, teacher.front_end)
        rollout = student.front_end.transcripts([texts[i] for i in cut])
        rollout.stopped = torch.tensor([stopped[i] for i in cut])
        generator = torch.Generator().manual_seed(0)
        table = torch.stack([torch.randperm(256, generator=generator)[:5]
                             for _ in range(300)]).reshape(6, 50, 5)
        rollout.topk_ids = table[cut][:, :rollout.ids.shape[1]]
        micros.append(opd.score_rollout(teacher, alignment, batch, teacher_batch, rollout, 5))
    return micros


def gradients(rank, world, size):
    student, teacher = (tiny_model(0, spread=0.1).train(),
                        tiny_model(1, width=48, hidden=64, spread=0.1).requires_grad_(False))
    shard(student, False)
    losses, _, n = opd.backward_kl(student, fixed_micros(student, teacher, rank, world, size), 1.5,
                                   torch.device("cpu"))
    assert all(p.grad is None for p in teacher.parameters())
    return ({name: whole(p.grad).clone() for name, p in student.named_parameters()}, n,
            sum(float(x.sum()) for x in losses))


def gradient_worker(rank, world, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(gradients(rank, world, size), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def assert_same_gradients(got, want):
    largest = max(float(g.abs().max()) for g in want.values())
    assert largest > 1e-3
    for name in want:
        assert float((got[name] - want[name]).abs().max()) <= 1e-6 * largest, name


def test_accumulation_equals_one_batch():
    want, n, loss = gradients(0, 1, 6)
    assert n == len("a" + "a much longer transcript than the others" + "bc" + "capped" + "xyz") + 5
    for size in (1, 2, 4):
        got, m, total = gradients(0, 1, size)
        assert m == n and total == pytest.approx(loss, rel=1e-5)
        assert_same_gradients(got, want)


@pytest.mark.parametrize("world, size", [(2, 6), (2, 2), (4, 6)])
def test_sharded_ranks_equal_one_process(tmp_path, world, size):
    want, n, loss = gradients(0, 1, 6)
    torch.multiprocessing.spawn(gradient_worker, (world, size, tmp_path), nprocs=world)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    assert sum(loss for *_, loss in found) == pytest.approx(loss, rel=1e-5)
    for got, m, _ in found:
        assert m == n
        assert_same_gradients(got, want)


def test_gradient_against_plain_autograd_on_the_definition():
    """Full logits, Python loop over positions, mean over positions with at least two ids:
    the same gradient."""
    student, teacher = (tiny_model(0, spread=0.1).train(),
                        tiny_model(1, width=48, hidden=64, spread=0.1).requires_grad_(False))
    scored, = fixed_micros(student, teacher, 0, 1, 6)
    got, _, _ = gradients(0, 1, 6)
    teacher_batch = collate([noise(0.4 + 0.3 * i, seed=i) for i in range(6)], teacher.front_end)
    student_logits = student.head(student(scored.batch, scored.rollout)[0])
    teacher_logits = teacher.head(teacher(teacher_batch, scored.rollout)[0]).masked_fill(
        teacher.forbidden, -torch.inf)
    terms = []
    for row in range(len(student_logits)):
        support = sorted({*scored.student_topk[row].tolist(), *teacher_logits[row].topk(5).indices.tolist()})
        p, q = (x[row, support].div(1.5).softmax(0) for x in (teacher_logits, student_logits))
        terms.append(1.5 ** 2 * (p * (p.log() - q.log())).sum())
    (sum(terms) / len(terms)).backward()
    largest = max(float(g.abs().max()) for g in got.values())
    for name, p in student.named_parameters():
        assert float((p.grad - got[name]).abs().max()) <= 1e-5 * largest, name


def test_no_countable_position_anywhere_is_a_zero_step():
    """k = 1 and a teacher that agrees: every support has one id, nothing is counted,
    and the step is a no-op, not a NaN."""
    student = tiny_model(0).train()
    batch = collate([noise(0.5)], student.front_end)
    rollout = student.sample(batch, 4, k=1)
    scored = opd.score_rollout(student, align_vocabularies(student, student), batch, batch, rollout, 1)
    losses, _, n = opd.backward_kl(student, [scored], 1.0, torch.device("cpu"))
    assert n == 0 and float(losses[0].abs().sum()) == 0
    assert all(p.grad is not None and float(p.grad.abs().max()) == 0 for p in student.parameters())


# ---- opd.py ------------------------------------------------------------------------------------------------
def test_opd_run_folder(clips_dir, models, tmp_path):
    out = tmp_path / "run"
    lines = opd_run(clips_dir, models, out, "--eval", clips_dir / "m.jsonl", "--sample-every", 2)
    assert ([line["step"] for line in lines] == [1, 2, 3]
            and all(line["loss"] > 0 and line["loss"] == line["kl"] for line in lines))
    assert all(8 <= line["vuss"] <= 16 for line in lines)
    SpeechLM.from_pretrained(out / "model")
    summary = json.load(open(out / "summary.json"))
    assert (summary["before"]["m"]["n"] == summary["after"]["m"]["n"] == 12
            and set(summary["seconds"]) == set(opd.PHASES))
    samples = [json.loads(line) for line in open(out / "samples.jsonl")]
    assert {s["step"] for s in samples} == {1, 3} and all(len(s["kl"]) == len(s["tokens"]) for s in samples)
    config = json.load(open(out / "config.json"))
    assert config["args"]["k"] == 8 and len(config["manifest_sha256"]) == 1
    with pytest.raises(InputError, match="already holds a run"):
        opd_run(clips_dir, models, out)


def test_every_metric_is_in_the_readme(clips_dir, models, tmp_path):
    readme = (ROOT / "README.md").read_text()
    keys = set(opd_run(clips_dir, models, tmp_path / "run")[0]) | set(overlap.MEASURES)
    assert [key for key in sorted(keys) if f"`{key}`" not in readme] == []


def test_opd_reads_no_transcript(clips_dir, models, tmp_path):
    """Without `text` in the manifest, and with nonsense in it, the run is the same to the last bit."""
    lines = [json.loads(line) for line in open(clips_dir / "m.jsonl")]
    results = []
    for name, change in (("with", {}), ("nonsense", {"text": 17}), ("without", None)):
        with open(clips_dir / f"{name}.jsonl", "w") as file:
            for line in lines:
                line = {**line, **(change or {})}
                if change is None:
                    del line["text"]
                file.write(json.dumps(line) + "\n")
        args = opd.parse_args(opd_args(clips_dir, models, tmp_path / name))
        args.train = [str(clips_dir / f"{name}.jsonl")]
        opd.main(args)
        results.append(([(m["loss"], m["grad_norm"], m["vuss"]) for m in metrics_of(tmp_path / name)],
                        (tmp_path / name / "model" / "model.safetensors").read_bytes()))
    assert results[0] == results[1] == results[2]


def test_opd_pulls_the_student_to_the_teacher(clips_dir, models, tmp_path):
    lines = opd_run(clips_dir, models, tmp_path / "run", "--steps", 40, "--batch-size", 12, "--lr", 3e-3)
    assert np.mean([m["loss"] for m in lines[-5:]]) < 0.5 * np.mean([m["loss"] for m in lines[:5]])


def test_micro_batches_do_not_change_the_run(clips_dir, models, tmp_path):
    runs = [opd_run(clips_dir, models, tmp_path / str(s), "--micro-seconds", s, "--lr", 1e-5)
            for s in (1000, 3, 0.1)]
    for key in ("loss", "grad_norm", "vuss", "positions"):
        for other in runs[1:]:
            assert [m[key] for m in other] == pytest.approx([m[key] for m in runs[0]], rel=2e-4), key


def test_resume_is_the_straight_run(clips_dir, models, tmp_path):
    out, again = tmp_path / "run", tmp_path / "again"
    straight = opd_run(clips_dir, models, out, "--steps", 4, "--save-every", 2, "--temperature", 0.7)
    shutil.copytree(out, again, symlinks=True)
    shutil.rmtree(again / "checkpoints" / "step-0000004")         # killed after step 3, saved after step 2
    os.remove(again / "checkpoints" / "latest")
    os.symlink("step-0000002", again / "checkpoints" / "latest")
    resumed = opd_run(clips_dir, models, again, "--steps", 4, "--save-every", 2, "--temperature", 0.7,
                      "--resume", "auto")
    timeless = lambda lines: [{k: v for k, v in m.items() if not k.endswith("_s") and k != "rss_gb"}
                              for m in lines]
    assert timeless(resumed) == timeless(straight)
    assert (again / "model/model.safetensors").read_bytes() == (out / "model/model.safetensors").read_bytes()


def test_a_checkpoint_killed_while_written_is_never_picked_up(clips_dir, models, tmp_path, monkeypatch):
    out = tmp_path / "run"
    before = opd_run(clips_dir, models, out, "--save-every", 1)
    kept = os.path.realpath(out / "model")
    weights = open(os.path.join(kept, "model.safetensors"), "rb").read()

    def killed(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(SpeechLM, "save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        opd_run(clips_dir, models, out, "--save-every", 1, "--steps", 5, "--resume", "auto")
    assert (os.path.realpath(out / "model") == kept
            and open(os.path.join(kept, "model.safetensors"), "rb").read() == weights)
    monkeypatch.undo()
    assert (len(opd_run(clips_dir, models, out, "--save-every", 1, "--steps", 5, "--resume", "auto")) == 5
            and len(before) == 3)
    assert sorted(os.listdir(out / "checkpoints")) == ["latest", "step-0000004", "step-0000005"]


@pytest.mark.parametrize("change, message", [
    (["--train", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
    (["--student", "nowhere"], "nowhere is no model folder"),
    (["--teacher", "nowhere"], "nowhere is no model folder"),
    (["--max-seconds", "0.1"], "m.jsonl: no clip of at most"),
    (["--resume", "auto", "--overwrite"], "contradict"),
])
def test_wrong_input_is_one_line(clips_dir, models, tmp_path, change, message):
    with pytest.raises(InputError, match=message) as error:
        opd_run(clips_dir, models, tmp_path / "run", *change)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_vocabularies_that_do_not_match(clips_dir, models, tmp_path):
    other = byte_tokenizer()
    state = json.loads(other.backend_tokenizer.to_str())
    state["model"]["vocab"] = {("x" + token if i > 99 else token): i
                               for token, i in state["model"]["vocab"].items()}
    SpeechLM.from_config(tiny_config(), byte_tokenizer()).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="token by token: one tokenizer"):
        opd_run(clips_dir, (models[0], tmp_path / "other"), tmp_path / "run")


def test_torchrun_equals_one_process_and_prints_errors_once(clips_dir, models, tmp_path):
    """The command as a user gives it: equal loss, gradient norm, VUSS and errors on 1 and 2 ranks."""
    more = ["--eval", clips_dir / "m.jsonl"]
    run("opd.py", *opd_args(clips_dir, models, tmp_path / "one", *more))
    done = run("opd.py", *opd_args(clips_dir, models, tmp_path / "two", *more), nproc=2)
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    for key in ("loss", "grad_norm", "vuss", "overlap_ratio", "positions", "mean_tokens", "capped"):
        assert [m[key] for m in two] == pytest.approx(
            [m[key] for m in one], rel=1e-3 if key == "grad_norm" else 1e-4), key
    assert one[0]["grad_norm"] == pytest.approx(two[0]["grad_norm"], rel=1e-5)
    summaries = [json.load(open(tmp_path / name / "summary.json")) for name in ("one", "two")]
    for summary in summaries:
        assert summary["before"]["m"].pop("rtf") > 0                                # the same but for speed
    assert summaries[0]["before"] == summaries[1]["before"]
    assert "before %" in done.stdout and str(tmp_path / "two" / "model") in done.stdout
    done = run("opd.py", *opd_args(clips_dir, models, tmp_path / "three", "--batch-size", 7), nproc=2,
               check=False)
    assert done.returncode != 0 and (done.stdout + done.stderr).count(
        "--batch-size 7 is not divisible by the 2 processes") == 1


# ---- sft.py, eval.py, overlap.py ---------------------------------------------------------------------------
def sft_args(clips_dir, out, *more):
    (out.parent / "config.json").write_text(json.dumps(tiny_config()))
    byte_tokenizer().save_pretrained(out.parent / "tokenizer")
    return ["--train", str(clips_dir / "m.jsonl"), "--config", str(out.parent / "config.json"),
            "--tokenizer", str(out.parent / "tokenizer"), "--out", str(out), "--workers", "0", "--steps", "3",
            "--batch-size", "4", "--lr", "1e-4", "--warmup-steps", "1", *map(str, more)]


def sft_run(*args):
    sft.main(sft.parse_args(sft_args(*args)))
    return metrics_of(args[1])


def test_sft_learns_by_heart_then_transcribes_and_feeds_the_next_stage(clips_dir, tmp_path, capsys):
    """12 clips by heart, eval.py finds no error, its result file is a TD manifest as it stands."""
    lines = sft_run(clips_dir, tmp_path / "sft", "--steps", 150, "--batch-size", 12, "--lr", 6e-3,
                    "--ctc-weight", 0.3)
    assert lines[-1]["loss"] < 0.05 < lines[0]["loss"]
    evaluation.main(evaluation.parse_args([
        "--model", str(tmp_path / "sft/model"), "--data", str(clips_dir / "m.jsonl"),
        "--out", str(tmp_path / "hyp")]))
    summary = json.load(open(tmp_path / "hyp/summary.json"))["m"]
    assert (summary["metric"] == "WER" and summary["errors"] == 0 and summary["units"] == 24
            and summary["value"] == 0 and summary["n"] == 12)
    results = [json.loads(line) for line in open(tmp_path / "hyp/m.jsonl")]
    assert [r["hyp"] for r in results] == [r["text"] for r in results] == [f"clip {i}" for i in range(12)]
    capsys.readouterr()
    evaluation.main(evaluation.parse_args(["--model", str(tmp_path / "sft/model"),
                                           "--data", str(clips_dir / "7.wav")]))
    assert capsys.readouterr().out == "clip 7\n"
    (tmp_path / "td").mkdir()
    sft.main(sft.parse_args(["--train", str(tmp_path / "hyp/m.jsonl"), "--text-field", "hyp",
                             "--model", str(tmp_path / "sft/model"), "--out", str(tmp_path / "td/run"),
                             "--steps", "1", "--batch-size", "4", "--workers", "0"]))
    assert metrics_of(tmp_path / "td/run")[0]["loss"] < 0.1


def test_sft_does_not_depend_on_the_cut(clips_dir, tmp_path):
    flags = ["--ctc-weight", 0.5, "--time-masks", 1, "--freq-masks", 1, "--time-width", 5]
    runs = [sft_run(clips_dir, tmp_path / str(s), "--micro-seconds", s, *flags) for s in (1000, 0.1)]
    assert runs[0][0]["tokens"] == runs[1][0]["tokens"]
    for key in ("loss", "ctc", "grad_norm"):
        assert [m[key] for m in runs[1]] == pytest.approx([m[key] for m in runs[0]], rel=1e-4), key


def test_sft_on_two_ranks_equals_one(clips_dir, tmp_path):
    args = sft_args(clips_dir, tmp_path / "two", "--ctc-weight", 0.5)
    run("sft.py", *args, nproc=2)
    one, two = sft_run(clips_dir, tmp_path / "one", "--ctc-weight", 0.5), metrics_of(tmp_path / "two")
    for key in ("loss", "ctc", "grad_norm", "tokens"):
        assert [m[key] for m in two] == pytest.approx([m[key] for m in one], rel=1e-4), key


def test_sft_needs_text_on_every_line(clips_dir, tmp_path):
    with open(clips_dir / "m.jsonl", "a") as file:
        file.write('{"audio": "0.wav", "duration": 0.3}\n')
    with pytest.raises(InputError, match='m.jsonl:13: no "text"'):
        sft_run(clips_dir, tmp_path / "run")


def test_ctc_loss_of_one_path():
    """Two frames, target "a": the paths aa, a-, -a."""
    head = torch.nn.Identity()
    frames = torch.randn(1, 2, 257)
    p = frames[0].softmax(1)
    a, blank = ord("a") + 1, 0
    want = -(p[0, a] * p[1, a] + p[0, a] * p[1, blank] + p[0, blank] * p[1, a]).log()
    loss, short = sft.ctc_loss(head, frames, torch.tensor([2]), ["a"])
    assert float(loss) == pytest.approx(float(want), rel=1e-5) and short == 0
    # needs three frames: counted, not infinite
    loss, short = sft.ctc_loss(head, frames, torch.tensor([2]), ["aa"])
    assert float(loss) == 0 and short == 1


def test_schedule_values():
    assert [cosine_lr(s, 10, 2, 1.0) for s in (0, 1, 2, 6, 10)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])


def test_overlap_measures_by_hand():
    """V = 4, K = 2; S = {0, 1}, T = {1, 2}: U = {0, 1, 2}, I = {1}."""
    p, q = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).double(), torch.tensor([[0.1, 0.5, 0.3, 0.1]]).double()
    s_ids, t_ids = torch.tensor([[0, 1]]), torch.tensor([[1, 2]])
    got = overlap.probability_overlap(p.log(), q.log(), s_ids, t_ids)
    got |= overlap.set_overlap(s_ids, t_ids, torch.tensor([[True, True, False, True]]))
    kl = lambda a, b: float((a * (a / b).log()).sum())
    h = lambda a: float(-(a * a.log()).sum())
    union = [0, 1, 2]
    want = dict(vuss=3, overlap_ratio=0.5, jaccard=1 / 3, top1=0, mass_student=0.3, mass_teacher=0.5,
                advantage=0, entropy_gap=abs(h(p) - h(q)), kl_full=kl(q, p),
                kl_union=kl(q[:, union] / 0.9, p[:, union] / 0.9))
    assert set(want) == set(overlap.MEASURES)
    assert {k: float(v) for k, v in got.items()} == pytest.approx(want)
    got = overlap.probability_overlap(p.log(), q.log(), torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    p_bar, q_bar = p[0, :2] / 0.8, q[0, :2] / 0.6
    assert float(got["advantage"]) == pytest.approx(-kl(p_bar, q_bar) / 2)


def test_overlap_of_a_model_with_itself(clips_dir, models, tmp_path):
    overlap.main(overlap.parse_args(["--student", str(models[0]), "--teacher", str(models[0]),
                                     "--data", str(clips_dir / "m.jsonl"), "--k", "8",
                                     "--out", str(tmp_path / "o.json"), "--max-new-tokens", "10"]))
    with pytest.raises(data.InputError, match="o.json exists"):         # a manifest, perhaps
        overlap.main(overlap.parse_args(["--student", "s", "--teacher", "t", "--data", "m.jsonl",
                                         "--out", str(tmp_path / "o.json")]))
    table = json.load(open(tmp_path / "o.json"))["measures"]
    row = table["all"]
    assert (row["vuss"], row["overlap_ratio"], row["jaccard"], row["top1"]) == (8, 1, 1, 1)
    assert (row["kl_union"] == row["entropy_gap"] == pytest.approx(0, abs=1e-6)
            and row["mass_student"] == pytest.approx(row["mass_teacher"]))
    assert (row["positions"] == sum(table[f"quarter {i}"]["positions"] for i in (1, 2, 3, 4))
            == table["language en"]["positions"])


def test_overlap_agrees_with_the_training_metrics(clips_dir, models, tmp_path):
    line = opd_run(clips_dir, models, tmp_path / "run", "--steps", 1, "--batch-size", 12)[0]
    overlap.main(overlap.parse_args(["--student", str(models[0]), "--teacher", str(models[1]),
                                     "--data", str(clips_dir / "m.jsonl"), "--k", "8",
                                     "--out", str(tmp_path / "o.json"), "--max-new-tokens", "12"]))
    row = json.load(open(tmp_path / "o.json"))["measures"]["all"]
    for ours, theirs in (("vuss", "vuss"), ("overlap_ratio", "overlap_ratio"), ("top1", "top1"),
                         ("kl_union", "kl")):
        assert row[ours] == pytest.approx(line[theirs], rel=1e-4)


# ---- people's recordings -----------------------------------------------------------------------------------
@pytest.mark.skipif(not (DATA / "aishell_sample").exists(),
                    reason=f"no recordings at {DATA} (set ASR_OPD_DATA)")
def test_recordings_of_people_through_the_same_commands(tmp_path):
    """en_prompts and aishell_sample together:
    SFT from random weights, TD transcripts, SFT on them, OPD, evaluation."""
    manifests = [DATA / "en_prompts/manifest.jsonl", DATA / "aishell_sample/manifest.jsonl"]
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    flags = ["--workers", "0", "--steps", "3", "--batch-size", "4", "--warmup-steps", "1"]
    sft.main(sft.parse_args(["--train", *map(str, manifests), "--config", str(tmp_path / "config.json"),
                             "--tokenizer", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "teacher"),
                             "--ctc-weight", "0.5", *flags]))
    assert len(metrics_of(tmp_path / "teacher")) == 3
    subset = tmp_path / "subset.jsonl"
    with open(subset, "w") as file:
        for manifest in manifests:
            for clip in read_manifest(manifest)[:4]:
                file.write(json.dumps({**clip.fields, "audio": clip.audio}, ensure_ascii=False) + "\n")
    evaluation.main(evaluation.parse_args([
        "--model", str(tmp_path / "teacher/model"), "--data", str(subset), "--out", str(tmp_path / "td"),
        "--max-new-tokens", "16"]))
    summary = json.load(open(tmp_path / "td/summary.json"))["subset"]
    assert summary["metric"] == "MER" and summary["n"] == 8 and summary["units"] > 0
    sft.main(sft.parse_args(["--train", str(tmp_path / "td/subset.jsonl"), "--text-field", "hyp",
                             "--model", str(tmp_path / "teacher/model"), "--out", str(tmp_path / "student"),
                             *flags]))
    opd.main(opd.parse_args(["--train", *map(str, manifests), "--student", str(tmp_path / "student/model"),
                             "--teacher", str(tmp_path / "teacher/model"), "--eval", str(subset),
                             "--out", str(tmp_path / "opd"), *flags, "--max-new-tokens", "16"]))
    assert len(metrics_of(tmp_path / "opd")) == 3 and (tmp_path / "opd/summary.json").exists()


# ---- flags -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script, flags", [
    (opd, "--k 0"), (opd, "--tau 0"), (opd, "--tau nan"), (opd, "--clip -1"), (opd, "--lr nan"),
    (opd, "--steps 0"), (opd, "--batch-size 0"), (opd, "--temperature -1"), (opd, "--save-every 0"),
    (opd, "--workers -1"), (opd, "--seed -1"), (opd, "--max-new-tokens 0"), (opd, "--micro-seconds nan"),
    (opd, "--warmup-steps 1.5"), (sft, "--ctc-weight -1"), (sft, "--time-masks -1"), (sft, "--lr inf"),
    (evaluation, "--max-new-tokens 0"), (overlap, "--k 0"), (opd, "--no-such-flag 1"), (opd, "--step 3")])
def test_wrong_flags_are_one_line_and_status_2(script, flags, capsys):
    needed = {opd: "--train m --student s --teacher t", sft: "--train m", evaluation: "--model m --data d",
              overlap: "--student s --teacher t --data d"}[script]
    with pytest.raises(SystemExit) as exit:
        script.parse_args([*needed.split(), *flags.split()])
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1 and flags.split()[0] in err
