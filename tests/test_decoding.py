"""The kept storage of sampling: what it holds from before, and what it rounds up, changes no token."""

import contextlib

import pytest
import torch
from conftest import add_random_lora, batch_of, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode

import model as m

SHAPES = [[2.0] * 9, [0.4, 1.3], [6.0], [1.0] * 5, [0.3, 0.2, 0.9], [0.4, 1.3]]  # seconds; the longest first


def written(speech_lm, lengths_s, temperature=0.0, n_tokens=12):
    uniforms = torch.rand(len(lengths_s), n_tokens, generator=torch.Generator().manual_seed(len(lengths_s)))
    batch = batch_of(speech_lm, lengths_s)
    rollout = speech_lm.sample(batch, n_tokens, temperature, uniforms=uniforms)
    return rollout.ids.tolist(), rollout.lens.tolist(), rollout.stopped.tolist()


def likeliest(speech_lm, lengths_s):
    """Greedy ids of an exact size: each step a whole pass over prompt and transcript."""
    batch = batch_of(speech_lm, lengths_s)
    ids = torch.zeros(len(lengths_s), 0, dtype=torch.long)
    for t in range(12):
        rollout = m.Rollout(ids, torch.full((len(ids),), t), torch.ones(len(ids), dtype=torch.bool))
        rows = speech_lm(
            batch, m.Rollout(torch.nn.functional.pad(ids, (0, 1)), rollout.lens, rollout.stopped)
        )
        logits = speech_lm.head(rows.view(len(ids), t + 1, -1)[:, -1])
        ids = torch.cat([ids, logits.masked_fill(speech_lm.forbidden, -torch.inf).argmax(dim=1)[:, None]], 1)
    return ids


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_rollout_does_not_depend_on_those_before(temperature, bf16):
    """Rollouts of many shapes by one model beside each by a new one; few decoders serve them."""
    used = tiny_model(3)
    used.bf16 = bf16
    for lengths_s in SHAPES:
        fresh = tiny_model(3)
        fresh.bf16 = bf16
        assert written(used, lengths_s, temperature) == written(fresh, lengths_s, temperature)
    n_rollouts = {key[:2]: decoder.n_rollouts for key, decoder in used.decoders.items()}
    assert n_rollouts == {(12, 128): 1, (2, 64): 2, (1, 128): 1, (6, 64): 1, (3, 64): 1}
    # All share the storage that the first one needs. A larger rollout takes a larger one, and begins anew.
    storages = {decoder.cache.untyped_storage().data_ptr() for decoder in used.decoders.values()}
    assert len(storages) == 1
    written(used, [9.0] * 9, temperature)
    assert [key[:2] for key in used.decoders] == [(12, 192)]


@torch.no_grad()
@pytest.mark.parametrize("lengths_s", SHAPES[:5])
def test_rounding_up_changes_no_token(lengths_s):
    speech_lm = tiny_model(5)
    speech_lm.forbidden[speech_lm.front_end.stop_id] = True  # all write to the cap
    ids, _, _ = written(speech_lm, lengths_s)
    assert ids == likeliest(speech_lm, lengths_s).tolist()


def test_nothing_is_left_of_a_rollout_that_was_not_finite():
    """Masked or not, NaN among keys and values would be NaN in what attends over them."""
    speech_lm = tiny_model(3)
    before = written(speech_lm, [0.4, 1.3])
    speech_lm.cache_storage.fill_(torch.nan)
    assert written(speech_lm, [0.4, 1.3]) == before


def test_weights_that_have_moved_are_found():
    """Nothing is kept of the old places, nor of another precision."""
    speech_lm = tiny_model(3)
    in_float32 = written(speech_lm, [0.4, 1.3])
    speech_lm.bf16 = True
    in_bf16 = written(speech_lm, [0.4, 1.3])
    speech_lm.bf16 = False
    assert written(speech_lm, [0.4, 1.3]) == in_float32
    speech_lm.double()
    assert not speech_lm.decoders and not speech_lm.bf16_copies
    assert written(speech_lm.float(), [0.4, 1.3]) == in_float32
    speech_lm.bf16 = True
    assert written(speech_lm, [0.4, 1.3]) == in_bf16


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_rollouts_follow_an_update(bf16, lora):
    """After steps of the optimizer, and after a checkpoint is read, ids are those of a new model."""

    def new_model():
        speech_lm = tiny_model(3)
        speech_lm.bf16 = bf16
        return add_random_lora(speech_lm) if lora else speech_lm

    speech_lm = new_model()
    first_weights = {name: tensor.clone() for name, tensor in speech_lm.state_dict().items()}
    before = written(speech_lm, [0.4, 1.3])
    trained = m.trained_parameters(speech_lm)
    optimizer = m.make_optimizer(trained, 0.05, 0.0)
    batch = batch_of(speech_lm, [0.4, 1.3])
    rollout = speech_lm.front_end.transcripts(["abcdef", "xyzabc"])
    for _ in range(3):
        ids = rollout.ids[rollout.row_mask()]
        m.token_ce(speech_lm, speech_lm(batch, rollout), ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        written(speech_lm, [0.4, 1.3])
    fresh = new_model()
    fresh.load_state_dict(speech_lm.state_dict())
    after = written(speech_lm, [0.4, 1.3])
    assert after == written(fresh, [0.4, 1.3]) and after != before
    for name, parameter in speech_lm.named_parameters():
        parameter.data.copy_(first_weights[name])
    assert written(speech_lm, [0.4, 1.3]) == before


def test_copies_in_bf16_are_what_autocast_casts(monkeypatch):
    """With copies and without, the same tokens; afterwards each module has its own parameter again."""
    speech_lm = add_random_lora(tiny_model(3))
    speech_lm.bf16 = True
    parameters = dict(speech_lm.named_parameters())
    with_copies = [written(speech_lm, lengths_s) for lengths_s in SHAPES[:3]]
    assert len(speech_lm.bf16_copies) == 2 * (7 * 3 + 3) + 1
    assert all(parameter is parameters[name] for name, parameter in speech_lm.named_parameters())
    monkeypatch.setattr(m, "bf16_weights", lambda speech_lm: contextlib.nullcontext())
    assert [written(speech_lm, lengths_s) for lengths_s in SHAPES[:3]] == with_copies


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_a_gpu_does_not_ask_the_device(dtype, monkeypatch):
    """On PyTorch's fake tensors, which know no values: a step that needed one could not be captured."""
    monkeypatch.setattr(m, "compiled", lambda function: function)  # which wants a GPU
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        torch.set_default_dtype(dtype)
        speech_lm = tiny_model()
        torch.set_default_dtype(torch.float32)
        monkeypatch.setattr(type(speech_lm), "device", torch.device("cuda"))
        for temperature in (0.0, 1.0):
            storage = torch.zeros(10**6, dtype=dtype)
            decoder = m.Decoder(speech_lm, 4, 64, temperature, storage)
            prompt_mask = torch.ones(3, 20, dtype=torch.bool)
            decoder.begin(prompt_mask, speech_lm.forbidden, torch.rand(3, 16, dtype=torch.float64))
            decoder.step(speech_lm)
            tensors = [value for value in vars(decoder).values() if isinstance(value, torch.Tensor)]
            assert len(tensors) == 9 and all(tensor.device.type == "cuda" for tensor in tensors)


@pytest.mark.slow
@pytest.mark.parametrize("function", [m.rotate, m.gated])
def test_compiled_functions_are_the_plain_ones(function):
    generator = torch.Generator().manual_seed(0)
    for n in (1, 7):
        x = torch.randn(2, 4, n, 16, generator=generator)
        more = [torch.randn(2, 1, n, 16, generator=generator) for _ in range(2)]
        arguments = (x, *more) if function is m.rotate else (x, x + 1)
        torch.testing.assert_close(
            m.compiled(function)(*arguments), function(*arguments), rtol=1e-6, atol=1e-6
        )
