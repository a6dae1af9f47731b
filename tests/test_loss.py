"""The loss: exact values, brute force in float64, gradients, and one whole step beside stock transformers."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import QWEN3_ASR_TOKENS, QWEN_SPECIALS, byte_tokenizer, noise, qwen3_asr_folder, tiny_model
from runs import divergence_of, support_of
from torch.testing import assert_close
from transformers import GlmAsrForConditionalGeneration, Qwen3ASRForConditionalGeneration

import data
import model

# ---- supports ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("support", ["union", "teacher", "student", "intersection"])
def test_supports_against_sets(support):
    """(N, K) ids with duplicates and about a third invalid; ids ascend."""
    generator = torch.Generator().manual_seed(3)
    student_topk = torch.randint(-6, 12, (200, 6), generator=generator).clamp(min=-1)
    teacher_topk = torch.randint(-6, 12, (200, 6), generator=generator).clamp(min=-1)
    ids, union_mask = model.union_support(student_topk, teacher_topk)
    mask = model.narrow_support(support, ids, union_mask, student_topk, teacher_topk)
    for row in range(200):
        student_ids = set(student_topk[row].tolist()) - {-1}
        teacher_ids = set(teacher_topk[row].tolist()) - {-1}
        assert ids[row][mask[row]].tolist() == support_of(support, student_ids, teacher_ids)
    assert ids.shape == mask.shape == (200, 12) and (ids[~union_mask] == -1).all()


def head_of(weight):
    """What `topk_ids` reads of a model: its head."""
    head = torch.nn.Linear(weight.shape[1], len(weight), bias=False)
    head.weight.data = weight
    return type("Model", (), {"head": head, "bf16": False})()


def test_topk_ids_are_the_best_allowed_ones_of_each_row():
    """Best first, −1 where fewer than k are allowed, in the other vocabulary by token; 2,500 rows."""
    V, H = 20, 6
    generator = torch.Generator().manual_seed(0)
    teacher = head_of(torch.randn(V, H, generator=generator))
    hidden = torch.randn(2500, H, generator=generator)
    # The teacher's vocabulary is the student's in reverse order, without the student's ids 0 and 1.
    to_teacher = torch.arange(V - 1, -1, -1)
    to_teacher[:2] = -1
    to_student = torch.arange(V - 1, -1, -1)
    to_student[V - 2 :] = -1
    alignment = model.Alignment(to_teacher, to_student, to_teacher < 0, to_student < 0)
    order = teacher.head(hidden)[:, : V - 2].argsort(dim=1, descending=True)
    for k in (1, 4, V - 2, V, 50):
        ids = model.topk_ids(teacher, hidden, alignment.teacher_forbidden, k)
        n_allowed = min(k, V - 2)
        assert torch.equal(ids[:, :n_allowed], order[:, :n_allowed]) and not ids.requires_grad
        assert ids.shape[1] == min(k, V)
        assert (ids[:, n_allowed:] == -1).all()
        student_ids = alignment.in_student(ids)
        assert torch.equal(student_ids, torch.where(ids >= 0, V - 1 - ids, -1))
        assert torch.equal(alignment.in_teacher(student_ids), ids)
    assert alignment.in_teacher(torch.tensor([0, 1, 2, -1])).tolist() == [-1, -1, V - 3, -1]


@pytest.mark.parametrize("k", [1, 5, 32, 300])
def test_top_k_by_blocks_is_that_of_torch(k):
    """With ties among the values: −1 to 1 in steps of 0.01, and ids of which none comes twice."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-100, 101, (20, 300), generator=generator) / 100
    logits[:, 7::3] = -torch.inf
    values, ids = model.block_topk(logits, k)
    assert torch.equal(values, logits.topk(k).values)
    for row, row_values, row_ids in zip(logits, values, ids):
        finite_ids = row_ids[row_values.isfinite()]
        assert torch.equal(row[finite_ids], row_values[: len(finite_ids)])
        assert len(set(finite_ids.tolist())) == min(k, 202)


def test_bf16_products_are_summed_in_float32():
    """Forward of the rounded inputs in float32, under autocast too; backward in bf16."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 64, generator=generator, requires_grad=True)
    head = head_of(torch.randn(300, 64, generator=generator))
    head.bf16 = True
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.head_logits(head, rows)
    weight = head.head.weight
    assert logits.dtype == torch.float32
    assert torch.equal(logits, rows.bfloat16().float() @ weight.bfloat16().float().T)
    grad = torch.randn(5, 300, generator=generator)
    logits.backward(grad)
    torch.testing.assert_close(rows.grad, grad @ weight, rtol=0.05, atol=0.3)
    torch.testing.assert_close(weight.grad, grad.T @ rows, rtol=0.05, atol=0.1)


# ---- support_kl --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("divergence, beta", [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.1), ("jsd", 0.8)])
def test_divergences_and_their_gradients_against_brute_force(divergence, beta, tau):
    """In float64, on random supports, some of no id or one; what is not counted may hold NaN and ∞."""
    generator = torch.Generator().manual_seed(4)
    n, U = 100, 9
    student = 3 * torch.randn(n, U, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(n, U, generator=generator, dtype=torch.float64)
    mask = torch.rand(n, U, generator=generator) < 0.4
    is_counted = mask.sum(dim=1) >= 2
    assert 0 < is_counted.sum() < n
    garbage = torch.tensor([math.nan, math.inf, -math.inf]).repeat(3)
    student = torch.where(mask & is_counted[:, None], student, garbage).requires_grad_()
    teacher = torch.where(mask & is_counted[:, None], teacher, garbage.flip(0)).requires_grad_()
    values, counted = model.support_kl(student, teacher, mask, tau, divergence, beta)
    values.sum().backward()
    assert torch.equal(counted, is_counted) and counted.dtype == torch.bool and teacher.grad is None
    for row in range(n):
        inside = mask[row]
        expected = torch.zeros((), dtype=torch.float64)
        expected_gradient = torch.zeros(U, dtype=torch.float64)
        if is_counted[row]:
            z = student[row].detach()[inside].requires_grad_()
            p = (teacher[row].detach()[inside] / tau).softmax(dim=0)
            q = (z / tau).softmax(dim=0)
            expected = tau**2 * divergence_of(divergence, p, q, beta)
            expected_gradient[inside] = torch.autograd.grad(expected, z)[0]
        assert_close(values[row], expected.detach(), rtol=1e-10, atol=1e-12)
        assert_close(student.grad[row], expected_gradient, rtol=1e-9, atol=1e-12)


def test_direction_is_teacher_to_student():
    """p = (3/4, 1/4), q = (1/2, 1/2): KL(p‖q) = 0.1308, the other way round 0.1438."""
    teacher = torch.tensor([[math.log(3.0), 0.0]])
    student = torch.zeros(1, 2)
    mask = torch.ones(1, 2, dtype=torch.bool)
    for divergence, expected in (("forward", 0.130812), ("reverse", 0.143841)):
        kl, _ = model.support_kl(student, teacher, mask, 1.0, divergence)
        assert kl.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("divergence, expected", [("forward", 4e4), ("reverse", 4e4), ("jsd", math.log(2))])
def test_divergences_stay_finite_at_scores_far_apart(divergence, expected):
    student = torch.tensor([[2e4, -2e4, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-2e4, 2e4, 0.0]])
    mask = torch.tensor([[True, True, False]])
    values, _ = model.support_kl(student, teacher, mask, 1.0, divergence)
    values.sum().backward()
    assert values.item() == pytest.approx(expected, rel=1e-6)
    assert student.grad.isfinite().all() and student.grad[0, 2] == 0


def test_the_loss_of_half_precision_is_in_float32():
    student_logits = torch.randn(3, 4, dtype=torch.bfloat16)
    teacher_logits = torch.randn(3, 4, dtype=torch.float16)
    mask = torch.ones(3, 4, dtype=torch.bool)
    kl, _ = model.support_kl(student_logits, teacher_logits, mask)
    assert kl.dtype == torch.float32
    exact, _ = model.support_kl(student_logits.double(), teacher_logits.double(), mask)
    assert_close(kl.double(), exact, rtol=1e-5, atol=1e-6)


# ---- scores without all logits -----------------------------------------------------------------------------


def test_scores_and_gradients_of_the_support_are_those_of_all_logits():
    """Ids that repeat within a row and between rows, some not counted; more rows than go at once."""
    n, U, V, H = 600, 64, 90, 64
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(n, H, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(-9, V, (n, U), generator=generator).clamp(min=-1)
    ids[0] = 5
    upstream = torch.randn(n, U, generator=generator, dtype=torch.float64).masked_fill(ids < 0, 0)
    ours = model.support_scores(weight, hidden, ids)
    plain = (hidden @ weight.T).gather(1, ids.clamp(min=0))
    assert_close(ours[ids >= 0], plain[ids >= 0], rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad((scores * upstream).sum(), (weight, hidden)) for scores in (ours, plain)]
    for our_gradient, plain_gradient in zip(*gradients):
        assert_close(our_gradient, plain_gradient, rtol=1e-12, atol=1e-12)
    assert model.support_scores(weight, hidden[:0], ids[:0]).shape == (0, U)


@pytest.mark.parametrize("tau, divergence", [(1.0, "forward"), (2.0, "reverse"), (2.0, "jsd")])
def test_losses_of_the_whole_vocabulary_are_exact(tau, divergence):
    """`full_kl` and `token_ce`, and their gradients, in float64; more rows than go at once, and other ids."""
    student = tiny_model(0).double()
    teacher = tiny_model(1, byte_tokenizer(["<|more|>"]), hidden=48).double().requires_grad_(False)
    alignment = model.align_vocabularies(student, teacher)
    allowed = (~alignment.student_forbidden).nonzero()[:, 0]
    torch.manual_seed(0)
    student_rows = torch.randn(300, 32).double().requires_grad_()
    teacher_rows = torch.randn(300, 48).double()
    ids = torch.randint(257, (300,))
    kl, counted = model.full_kl(student, student_rows, teacher, teacher_rows, alignment, tau, divergence, 0.3)
    cross_entropy = model.token_ce(student, student_rows, ids)
    q = (student.head(student_rows)[:, allowed] / tau).softmax(dim=1)
    p = (teacher.head(teacher_rows)[:, alignment.to_teacher[allowed]] / tau).softmax(dim=1)
    expected = torch.stack([tau**2 * divergence_of(divergence, *row, 0.3) for row in zip(p, q)])
    expected_entropy = -student.head(student_rows).log_softmax(dim=1).gather(1, ids[:, None])[:, 0]
    assert counted.all()
    trained = (student_rows, student.head.weight)
    for ours, plain in ((kl, expected), (cross_entropy, expected_entropy)):
        assert_close(ours.double(), plain, rtol=1e-5, atol=1e-6)
        gradients = torch.autograd.grad(ours.sum(), trained), torch.autograd.grad(plain.sum(), trained)
        for our_gradient, plain_gradient in zip(*gradients):
            assert_close(our_gradient, plain_gradient, rtol=1e-4, atol=1e-6)


# ---- two vocabularies --------------------------------------------------------------------------------------


def test_ids_go_to_the_teacher_as_they_are_and_stop_where_one_has_no_counterpart():
    """The teacher lacks the byte "b". Ids map by token string, and the stop token by its role."""
    student = tiny_model(0)
    specials = ["<|more|>", *model.PROMPT_TOKENS, model.PAD_TOKEN, model.STOP_TOKEN]
    teacher = tiny_model(1, byte_tokenizer(specials=specials))
    vocabulary = teacher.front_end.tokenizer.get_vocab()
    vocabulary["x"] = vocabulary.pop("b")
    teacher.front_end.tokenizer.get_vocab = lambda: vocabulary
    alignment = model.align_vocabularies(student, teacher)
    rollout = student.front_end.transcripts(["ac", "今"])
    mapped = model.mapped_rollout(rollout, alignment.to_teacher)
    a, c, stop = vocabulary["a"], vocabulary["c"], teacher.front_end.stop_id
    assert mapped.ids[0, :3].tolist() == [a, c, stop]
    assert mapped.ids[1, 3] == stop
    assert stop != student.front_end.stop_id and torch.equal(mapped.row_mask(), rollout.row_mask())
    assert alignment.student_forbidden[student.front_end.encode_text("b")].all()
    with pytest.raises(AssertionError, match="a transcript token has no counterpart"):
        model.mapped_rollout(student.front_end.transcripts(["ac", "abc"]), alignment.to_teacher)


# ---- one whole step ----------------------------------------------------------------------------------------


def stock_logits(stock, batch, b, ids):
    """Logits (T, V) that predict `ids`, by a stock model's own forward on clip b alone."""
    prompt = batch.prompt_ids[b][batch.prompt_mask[b]]
    n_frames = int(batch.mel_lens[b])
    input_ids = torch.cat([prompt, ids])[None]
    features_mask = torch.ones(1, n_frames, dtype=torch.long)
    if isinstance(stock, Qwen3ASRForConditionalGeneration):
        n_frames = math.ceil(n_frames / 100) * 100
        features_mask = F.pad(features_mask, (0, n_frames - features_mask.shape[1]))
    output = stock(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        input_features=batch.mel[b : b + 1, :, :n_frames].double(),
        input_features_mask=features_mask,
    )
    return output.logits[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("tied, model_type", [(True, "qwen2"), (False, "qwen3")])
def test_one_step_in_float64_equals_stock_and_the_definition(tmp_path, tied, model_type):
    """Loss and every gradient of opd.py's block, beside a loop over positions with full logits.

    Qwen3-ASR teaches our student: other prompt, other ids. One transcript stops, two meet the cap.
    """
    tau, k = 1.5, 5
    tiny_model(5, spread=0.1, tied=tied, model_type=model_type).save_pretrained(tmp_path / "student")
    words = byte_tokenizer(specials=[*QWEN3_ASR_TOKENS, *QWEN_SPECIALS])
    qwen3_asr_folder(tmp_path / "teacher", words, seed=1)
    from_pretrained = model.SpeechLM.from_pretrained
    student = from_pretrained(tmp_path / "student", torch.float64).train()
    teacher = from_pretrained(tmp_path / "teacher", torch.float64).eval().requires_grad_(False)
    alignment = model.align_vocabularies(student, teacher)
    waves = [noise(0.4), noise(2.24, seed=1), noise(1.12, seed=2)]  # whole audio tokens of 80 ms
    batch = data.collate(waves, student.front_end, ["en"] * 3)
    teacher_batch = data.collate(waves, teacher.front_end, ["en"] * 3)

    # The block of opd.py.
    encoded = student.encode(batch)
    rollout = student.sample(batch, 12, forbidden=alignment.student_forbidden, encoded=encoded)
    rollout.ids[1, 4] = student.front_end.stop_id  # the second transcript stops after four tokens
    rollout.lens[1] = 4
    rollout.stopped[1] = True
    student_hidden = student(batch, rollout, encoded)
    teacher_hidden = teacher(teacher_batch, model.mapped_rollout(rollout, alignment.to_teacher))
    student_topk = model.topk_ids(student, student_hidden, alignment.student_forbidden, k)
    teacher_topk = model.topk_ids(teacher, teacher_hidden, alignment.teacher_forbidden, k)
    support_ids, mask = model.union_support(student_topk, alignment.in_student(teacher_topk))
    student_logits = model.support_scores(student.head.weight, student_hidden, support_ids)
    teacher_ids = alignment.in_teacher(support_ids)
    teacher_logits = model.support_scores(teacher.head.weight, teacher_hidden, teacher_ids)
    kl, counted = model.support_kl(student_logits, teacher_logits, mask, tau)
    kl.sum().backward()

    # The same by stock classes, clip by clip and position by position.
    stock_student = GlmAsrForConditionalGeneration.from_pretrained(tmp_path / "student").double()
    stock_teacher = Qwen3ASRForConditionalGeneration.from_pretrained(tmp_path / "teacher").double()
    stop = words.convert_tokens_to_ids("<|im_end|>")
    pairs = {i: i for i in range(256)} | {student.front_end.stop_id: stop}  # student id → teacher id
    terms = []
    for b in range(3):
        ids = rollout.ids[b][: int(rollout.lens[b] + rollout.stopped[b])]
        ours = stock_logits(stock_student, batch, b, ids)[:, list(pairs.keys())]
        teacher_ids = torch.tensor([pairs[i] for i in ids.tolist()])
        with torch.no_grad():
            theirs = stock_logits(stock_teacher, teacher_batch, b, teacher_ids)[:, list(pairs.values())]
        for row in range(len(ids)):
            support = sorted({*ours[row].topk(k).indices.tolist(), *theirs[row].topk(k).indices.tolist()})
            p = (theirs[row, support] / tau).softmax(dim=0)
            q = (ours[row, support] / tau).softmax(dim=0)
            terms.append(tau**2 * (p * (p.log() - q.log())).sum())
    torch.stack(terms).sum().backward()

    assert len(terms) == len(kl) == 12 + 5 + 12 and counted.all()
    assert_close(kl, torch.stack(terms), rtol=1e-6, atol=1e-6)
    expected = {name: p.grad for name, p in stock_student.named_parameters()}
    assert {name for name, _ in student.named_parameters()} == set(expected)
    for name, parameter in student.named_parameters():
        largest = expected[name].abs().max()
        assert largest > 1e-6 and (parameter.grad - expected[name]).abs().max() <= 1e-6 * largest, name
