"""A GPU computes what a CPU does. The tests that need one are skipped where there is none."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, batch_of, tiny_model
from test_decoding import SHAPES

import model as m
from data import read_lines, setup_distributed

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def three_steps(out, devices):
    """Three steps of the example in float32. → its metrics, and its transcripts of dev before and after"""
    command = [sys.executable, "opd.py", "@example/opd.args", "--steps", "3"]
    command += ["--eval", "example/dev.jsonl", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": devices}, check=True)
    transcripts = []
    for step in (0, 3):
        transcripts += [line["hyp"] for line in read_lines(out / f"eval-{step}" / "dev.jsonl")]
    return read_lines(out / "metrics.jsonl"), transcripts


@NEEDS_GPU
def test_float32_gives_the_numbers_of_a_cpu(tmp_path):
    """Rollouts and transcripts come from the CUDA graph on the GPU."""
    on_cpu, cpu_transcripts = three_steps(tmp_path / "cpu", "")
    on_gpu, gpu_transcripts = three_steps(tmp_path / "gpu", "0")
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        for key in ("loss", "kl", "grad_norm", "vuss", "mean_tokens"):
            assert gpu[key] == pytest.approx(cpu[key], rel=1e-5), (cpu["step"], key)
    assert gpu_transcripts == cpu_transcripts


@NEEDS_GPU
@pytest.mark.parametrize("bf16", [False, True])
def test_a_graph_writes_what_its_kernels_write(bf16, monkeypatch):
    """Rollouts of many shapes by replayed graphs and without any; the storage grows, and is given back."""

    def rollouts():
        speech_lm = tiny_model(3).to("cuda")
        speech_lm.bf16 = bf16
        batches = [batch_of(speech_lm, lengths_s).to("cuda") for lengths_s in SHAPES]
        ids = []
        for batch in (*batches[::-1], *batches):
            ids.append(speech_lm.sample(batch, 12).ids.tolist())
        speech_lm.free_decoders()
        for batch in batches:
            ids.append(speech_lm.sample(batch, 12).ids.tolist())
        return ids

    by_graphs = rollouts()
    monkeypatch.setattr(m.Decoder, "write_token", m.Decoder.step)
    assert by_graphs == rollouts()


def test_attention_is_not_that_of_cudnn():
    """In bf16 its backward gives NaN at some lengths on Hopper."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    setup_distributed()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
