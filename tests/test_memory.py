"""The calculator of `bench.py --memory` beside the bytes that autograd keeps, and that training allocates."""

import functools

import bench
import pytest
import torch
import transformers
from conftest import noise, qwen3_asr_folder, tiny_model
from runs import run_ranks
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import model


def kept_bytes(function, speech_lm):
    """Bytes of the storages that autograd keeps for backward, those of the parameters left out."""
    own = {parameter.untyped_storage()._cdata for parameter in speech_lm.parameters()}
    storages = {}  # held, so that no other storage gets the same address

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    assert output.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


def prepare(speech_lm, rank, recompute):
    if rank:
        model.add_lora(speech_lm, rank, seed=0)
    if recompute:
        speech_lm.recompute_activations()
    return speech_lm.train()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_those_that_autograd_keeps(rank, recompute, tmp_path):
    """Of Qwen3-ASR, on the CPU in float32, at two lengths."""
    speech_lm = model.SpeechLM.from_pretrained(qwen3_asr_folder(tmp_path / "model"))
    prepare(speech_lm, rank, recompute)
    rollout = speech_lm.front_end.transcripts(["one two three", "four", ""])
    measured = []
    computed = []
    for seconds in (2.0, 6.0):
        waveforms = [noise(seconds), noise(seconds - 0.2), noise(seconds - 0.1)]
        batch = data.collate(waveforms, speech_lm.front_end, ["en"] * 3)
        measured.append(kept_bytes(functools.partial(speech_lm, batch, rollout), speech_lm))
        n_rows = int(rollout.row_mask().sum(dim=1).max())
        length = batch.prompt_ids.shape[1] + n_rows - 1
        of_encoder, _ = bench.encoder_memory(speech_lm, False, recompute)
        of_lm, _ = bench.lm_memory(speech_lm, length, False, recompute)
        computed.append(3 * (seconds * of_encoder + length * of_lm))
    assert computed == pytest.approx(measured, rel=0.15)


def memory_efficient_attention(q, k, v, attn_mask, dropout_p=0.0, scale=None, is_causal=False):
    """PyTorch's attention as a GPU computes it where there is a mask."""
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cuda") else torch.float32
    bias = torch.zeros_like(attn_mask, dtype=dtype).expand(len(q), q.shape[1], q.shape[2], k.shape[2])
    attention = torch.ops.aten._scaled_dot_product_efficient_attention
    return attention(q.to(dtype), k.to(dtype), v.to(dtype), bias, True, dropout_p, is_causal, scale=scale)[0]


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_at_full_width_on_a_fake_gpu(recompute, kind, rank, bf16):
    """In a process of its own: after autograd on a fake GPU, forks of a process cannot train any more."""
    ((status, text),) = run_ranks(lambda: check_full_width(recompute, kind, rank, bf16), 1)
    assert status == 0, text


def check_full_width(recompute, kind, rank, bf16):
    """The release's widths, with fewer layers, and autocast's rules for GPUs. Tensors have no storage.

    The attention is set here, because PyTorch's choice among its kernels would want a GPU.
    """
    torch.nn.functional.scaled_dot_product_attention = memory_efficient_attention
    # All is on one device and float32 already; fake tensors refuse that a module moves or converts them.
    torch.nn.Module._apply = lambda module, *args: module
    seconds = 10
    length = 205
    sizes = {"num_hidden_layers": 4, "head_dim": 64, "vocab_size": 1000}
    text = transformers.CONFIG_MAPPING[kind](**bench.RELEASE_WIDTHS, **sizes)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        speech_lm = prepare(bench.our_student(text, layers=4), rank, recompute)
        mel = torch.randn(2, 128, 100 * seconds)
        mel_lens = torch.full((2,), 50 * seconds)
        embeds = torch.randn(2, length, 896, requires_grad=True)
        mask = torch.ones(2, 1, length, length, dtype=torch.bool)
        rotary = speech_lm.lm.rotary(torch.arange(length).expand(2, length), embeds.dtype)

        def forward():
            frames = speech_lm.encoder(mel, mel_lens)
            encoded = speech_lm.adapter(frames.reshape(2, -1, 4 * 1280).clone())
            return encoded.sum() + speech_lm.lm(embeds, rotary, mask).sum()

        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", bf16)  # torch.autocast itself would want a GPU
        measured = kept_bytes(forward, speech_lm)
    of_encoder, _ = bench.encoder_memory(speech_lm, bf16, recompute)
    of_lm, _ = bench.lm_memory(speech_lm, length, bf16, recompute)
    computed = 2 * (seconds * of_encoder + length * of_lm)
    if bf16:
        computed += 2 * bench.n_kept_weights(speech_lm, recompute)
    assert computed == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("rank", [0, 4])
def test_fixed_memory_is_that_of_an_update(rank):
    """Weights, gradients and AdamW's moments of a real update, byte for byte."""
    student = prepare(tiny_model(0), rank, recompute=False)
    teacher = tiny_model(1)
    trained = model.trained_parameters(student)
    optimizer = model.make_optimizer(trained, 1e-3, 0.0)
    model.sum_gradients(trained)
    optimizer.step()
    tensors = [*student.parameters()]
    for parameter in trained.values():
        moments = optimizer.state[parameter]
        tensors += [parameter.grad, moments["exp_avg"], moments["exp_avg_sq"]]
    student_bytes, teacher_bytes = bench.fixed_memory(student, teacher, bf16=False, recompute=False)
    assert student_bytes == sum(tensor.nbytes for tensor in tensors)
    assert teacher_bytes == sum(parameter.nbytes for parameter in teacher.parameters())
    _, half = bench.fixed_memory(student, teacher, bf16=True, recompute=False)
    assert half == teacher_bytes / 2


def test_sizes_and_the_largest_micro_batch():
    """The parameters of the models, and a micro-batch that fits where one second more does not."""
    with torch.device("meta"):
        student = bench.qwen3_asr_0_6b()
        release = bench.release_student()
        teacher = bench.qwen3_asr_1_7b()
    sizes = []
    for speech_lm in (student, release, teacher):
        sizes.append(sum(parameter.numel() for parameter in speech_lm.parameters()) / 1e9)
    assert sizes == pytest.approx([0.78, 1.14, 2.04], abs=0.01)
    seconds = bench.largest_seconds(student, teacher, 24, bf16=True, recompute=False)
    assert seconds > 0
    room = 22e9 - sum(bench.fixed_memory(student, teacher, bf16=True, recompute=False))
    step = bench.step_memory(student, teacher, seconds, bf16=True, recompute=False)
    larger_step = bench.step_memory(student, teacher, seconds + 1, bf16=True, recompute=False)
    assert max(step.values()) <= room < max(larger_step.values())
