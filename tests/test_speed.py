"""What was made fast gives what the plain way gives: supports, full vocabulary, decoding, options."""
import json

import pytest
import torch
from conftest import byte_tokenizer, noise, tiny_model

import model as m
import opd
from data import collate


@pytest.fixture
def pair(tmp_path):
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny_model(seed, hidden=48 if seed else 32).save_pretrained(tmp_path / name)
    return tmp_path / "student", tmp_path / "teacher"


def run(pair, clips_dir, out, *flags):
    opd.main(opd.parse_args([str(x) for x in (
        "--train", clips_dir / "m.jsonl", "--student", pair[0], "--teacher", pair[1], "--steps", 3,
        "--batch-size", 6, "--lr", 1e-3, "--warmup-steps", 0, "--max-new-tokens", 6, "--workers", 0,
        "--sample-every", 0, "--out", out, *flags)]))
    return [json.loads(line)["loss"] for line in open(out / "metrics.jsonl")]


def plain_scores(weight, hidden, ids):
    return (hidden @ weight.T).gather(1, ids)


# ---- scores on the support -----------------------------------------------------------------------------------
@pytest.mark.parametrize("rows_at_a_time", [1, 3, 100])
def test_scores_and_gradients_of_the_support_are_those_of_all_logits(rows_at_a_time, monkeypatch):
    """Ids that repeat within a row and between rows, chunks that do not divide the rows, float64."""
    monkeypatch.setattr(m.SupportScores, "chunks", staticmethod(
        lambda hidden, ids: (range(0, len(ids), rows_at_a_time), rows_at_a_time)))
    torch.manual_seed(0)
    weight, hidden = torch.randn(11, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    ids, upstream = torch.randint(0, 11, (7, 6)), torch.randn(7, 6, dtype=torch.float64)
    ids[0], ids[1, :3] = 5, ids[0, 0]
    found = []
    for function in (m.student_scores, plain_scores):
        w, h = weight.clone().requires_grad_(), hidden.clone().requires_grad_()
        scores = function(w, h, ids)
        (scores * upstream).sum().backward()
        found.append((scores.detach(), w.grad, h.grad))
    for ours, plain in zip(*found):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_ids_that_are_not_counted_do_not_stop_the_scores():
    weight, hidden = torch.randn(5, 3), torch.randn(2, 3)
    assert m.student_scores(weight, hidden, torch.tensor([[-1, 4], [2, -1]])).isfinite().all()
    assert m.student_scores(weight, torch.randn(0, 3), torch.zeros(0, 4, dtype=torch.long)).shape == (0, 4)


def test_chunks_bound_the_gathered_rows():
    starts, n = m.SupportScores.chunks(torch.empty(300, 896), torch.empty(300, 64))
    assert n * 64 * 896 <= 2**20 and len(starts) * n >= 300


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads_get_the_gradient_of_the_full_logits(tied):
    student = tiny_model(tied=tied)
    batch = collate([noise(0.5), noise(0.9, seed=1)], student.front_end)
    targets = student.front_end.transcripts(["ab", "hello"])
    ids = torch.stack([torch.randperm(260)[:9] for _ in range(int(targets.row_mask().sum()))])
    found = []
    for function in (m.student_scores, plain_scores):
        student.zero_grad()
        function(student.head.weight, student(batch, targets)[0], ids).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in student.named_parameters()})
    assert ("net.lm_head.weight" in found[0]) != tied
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-4, atol=1e-5 * float(found[1][name].abs().max()))


# ---- the full vocabulary -------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk", [2, 256])
def test_full_kl_is_exact_whatever_the_chunk(chunk, temperature):
    """Against p (log p − log q) over the allowed ids, written out in float64; the teacher has other ids."""
    student = tiny_model(0).double()
    teacher = tiny_model(1, byte_tokenizer(["<|more|>"]), hidden=48).double().requires_grad_(False)
    alignment = m.align_vocabularies(student, teacher)
    torch.manual_seed(0)
    rows_s, rows_t = torch.randn(5, 32, dtype=torch.float64), torch.randn(5, 48, dtype=torch.float64)
    gradients, values = [], []
    for way in ("ours", "plain"):
        student.zero_grad()
        hidden = rows_s.clone().requires_grad_()
        if way == "ours":
            kl, counted = m.full_kl(student, hidden, teacher, rows_t, alignment, temperature, chunk)
            assert counted.tolist() == [True] * 5
        else:
            allowed = (~alignment.student_forbidden).nonzero()[:, 0]
            log_q = (student.head(hidden)[:, allowed] / temperature).log_softmax(1)
            log_p = (teacher.head(rows_t)[:, alignment.to_teacher[allowed]] / temperature).log_softmax(1)
            kl = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(1)
        kl.sum().backward()
        values.append(kl.detach().double())
        gradients.append((hidden.grad, student.head.weight.grad.clone()))
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    for ours, plain in zip(*gradients):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_full_is_the_union_with_k_as_large_as_the_vocabulary(pair, clips_dir, tmp_path):
    full = run(pair, clips_dir, tmp_path / "full", "--support", "full")
    assert full == pytest.approx(run(pair, clips_dir, tmp_path / "all", "--k", 10_000), rel=1e-5)


# ---- rollout ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_decoder_steps_equal_the_stock_lm(model_type, tied):
    """Hidden rows after each token, against a forward pass of the stock LM over all of it; left-padded prompts."""
    lm = tiny_model(model_type=model_type, tied=tied)
    for p in lm.parameters():                               # biases and norms too, or they would not be seen
        torch.nn.init.normal_(p, 0.5 if p.ndim == 1 else 0.0, 0.2)
    batch = collate([noise(0.4), noise(1.3, seed=1), noise(2.2, seed=2)], lm.front_end)
    tokens = torch.randint(0, 250, (3, 5))
    with torch.no_grad():
        embeds, mask = lm.embed_prompt(batch, lm.encode(batch)[0]), batch.prompt_mask
        out = lm.lm(inputs_embeds=embeds, attention_mask=mask, position_ids=m.positions_of(mask), use_cache=True)
        decoder = m.Decoder(lm.lm, out.past_key_values, mask, 5)
        steps = [decoder.step(lm.lm.embed_tokens(tokens[:, t]), torch.tensor([t])) for t in range(5)]
        whole = torch.nn.functional.pad(mask, (0, 5), value=True)
        stock = lm.lm(inputs_embeds=torch.cat([embeds, lm.lm.embed_tokens(tokens)], dim=1), attention_mask=whole,
                      position_ids=m.positions_of(whole)).last_hidden_state[:, -5:]
    torch.testing.assert_close(torch.stack(steps, dim=1), stock, rtol=1e-4, atol=1e-4)


def test_rows_that_have_stopped_do_not_lengthen_the_run(monkeypatch):
    """A clip's cap ends it; once the last one is through, no further step is computed."""
    lm = tiny_model()
    calls, step = [], m.Decoder.step
    monkeypatch.setattr(m.Decoder, "step", lambda *args: calls.append(1) or step(*args))
    forbidden = lm.forbidden.clone()
    forbidden[lm.front_end.stop_id] = True
    batch = collate([noise(0.2), noise(0.5)], lm.front_end)
    rollout = lm.sample(batch, 64, tokens_per_second=4.0, forbidden=forbidden)
    assert rollout.lens.tolist() == [16, 18] and rollout.ids.shape[1] == 18
    assert len(calls) == 20                                 # the stop flags are looked at every four tokens
    assert (rollout.ids[0, 16:] == lm.front_end.pad_id).all() and (rollout.topk_ids[0, 16:] == -1).all()


def test_an_encoder_pass_serves_rollout_and_loss():
    """Equal rollouts, losses and gradients with the encoder's result handed on and computed again."""
    student, teacher = tiny_model(0), tiny_model(1).requires_grad_(False)
    alignment = m.align_vocabularies(student, teacher)
    batch = collate([noise(0.5), noise(1.1, seed=1)], student.front_end)
    found = []
    for reuse in (True, False):
        student.zero_grad()
        encoded = student.encode(batch) if reuse else None
        rollout = student.sample(batch, 6, encoded=encoded)
        scored = opd.score_rollout(teacher, alignment, batch, batch, rollout, 8, encoded)
        losses, _, _ = opd.backward_kl(student, [scored], 1.0, torch.device("cpu"))
        found.append((rollout.ids, losses[0], *(p.grad.clone() for p in student.parameters())))
    assert found[0][0].tolist() == found[1][0].tolist()
    for reused, again in zip(found[0][1:], found[1][1:]):
        torch.testing.assert_close(reused, again, rtol=1e-5, atol=1e-7)
    assert student.encoder.conv1.weight.grad.abs().max() > 0


# ---- options ---------------------------------------------------------------------------------------------------
def test_recomputed_activations_change_nothing_and_bf16_little(pair, clips_dir, tmp_path):
    plain = run(pair, clips_dir, tmp_path / "plain")
    assert run(pair, clips_dir, tmp_path / "recompute", "--recompute") == pytest.approx(plain, rel=1e-6)
    assert run(pair, clips_dir, tmp_path / "bf16", "--bf16") == pytest.approx(plain, rel=0.1)
    trained = m.SpeechLM.from_pretrained(tmp_path / "bf16" / "model")
    stored = m.load_file(str(tmp_path / "bf16" / "model" / "model.safetensors"))
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}          # masters stay float32
    start = m.SpeechLM.from_pretrained(pair[0])
    moved = [(a - b).abs().max() > 0 for a, b in zip(trained.parameters(), start.parameters())]
    assert sum(moved) == len(moved)


def test_recompute_reaches_encoder_and_lm():
    lm = tiny_model()
    m.speed_options(lm, False, True)
    layers = [layer for layer in lm.modules() if getattr(layer, "gradient_checkpointing", False)]
    assert lm.encoder in layers and lm.lm in layers or len(layers) >= 4
