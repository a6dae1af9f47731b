"""The calculator of `bench.py --memory` beside the bytes that autograd keeps, and that training allocates."""

import functools

import bench
import pytest
import torch
from conftest import noise, qwen3_asr_folder, tiny_model

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
@pytest.mark.parametrize("kind", ["ours", "stock"])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_those_that_autograd_keeps(kind, rank, recompute, tmp_path):
    """On the CPU in float32, at two lengths. There our encoder keeps the attention's output twice."""
    if kind == "ours":
        speech_lm = tiny_model()
    else:
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
