"""The loss: exact values, brute force in float64, gradients, and one whole step beside stock transformers."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import QWEN3_ASR_TOKENS, QWEN_SPECIALS, byte_tokenizer, noise, qwen3_asr_folder, tiny_model
from torch.testing import assert_close

import model as m
from data import InputError, collate
from model import SpeechLM, support_kl, support_scores, teacher_support, union_support


def brute_force(student_ids, teacher_ids, student_logits, teacher_logits, tau):
    """Eq. 1 row by row in plain Python, over logits of the whole vocabulary: [(kl, counted)]."""
    values = []
    for row in range(len(student_ids)):
        support = sorted({i for i in student_ids[row].tolist() + teacher_ids[row].tolist() if i >= 0})
        if len(support) < 2:
            values.append((0.0, False))
            continue
        p = [math.exp(teacher_logits[row, u].item() / tau) for u in support]
        q = [math.exp(student_logits[row, u].item() / tau) for u in support]
        kl = sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q))
        values.append((tau**2 * kl, True))
    return values


def random_ids(n, k, vocab_size, generator):
    """(n, k) ids with duplicates and about a third invalid."""
    return torch.randint(-vocab_size // 2, vocab_size, (n, k), generator=generator).clamp(min=-1)


# ---- union_support -----------------------------------------------------------------------------------------


def test_union_support_against_sets():
    generator = torch.Generator().manual_seed(0)
    student_ids, teacher_ids = random_ids(200, 6, 12, generator), random_ids(200, 6, 12, generator)
    before = student_ids.clone(), teacher_ids.clone()
    ids, mask = union_support(student_ids, teacher_ids)
    for row in range(200):
        union = {*student_ids[row].tolist(), *teacher_ids[row].tolist()} - {-1}
        assert ids[row][mask[row]].tolist() == sorted(union)
    assert ids.shape == mask.shape == (200, 12) and ids.dtype == torch.int64 and (ids[~mask] == -1).all()
    assert torch.equal(student_ids, before[0]) and torch.equal(teacher_ids, before[1])


# ---- support_kl --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_kl_against_brute_force(tau):
    generator = torch.Generator().manual_seed(1)
    n, k, V = 300, 5, 14
    student_ids, teacher_ids = random_ids(n, k, V, generator), random_ids(n, k, V, generator)
    student = 3 * torch.randn(n, V, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(n, V, generator=generator, dtype=torch.float64)
    ids, mask = union_support(student_ids, teacher_ids)
    columns = ids.clamp(min=0)
    kl, counted = support_kl(student.gather(1, columns), teacher.gather(1, columns), mask, tau)
    expected = brute_force(student_ids, teacher_ids, student, teacher, tau)
    assert counted.tolist() == [is_counted for _, is_counted in expected]
    assert 0 < counted.sum() < n
    values = torch.tensor([value for value, _ in expected], dtype=torch.float64)
    assert_close(kl, values, rtol=1e-12, atol=1e-12)


def test_direction_is_teacher_to_student():
    """p = (3/4, 1/4), q = (1/2, 1/2): KL(p‖q) = 0.1308, the other way round 0.1438."""
    uneven, even = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    mask = torch.ones(1, 2, dtype=torch.bool)
    forward = support_kl(even, uneven, mask)[0].item()
    backward = support_kl(uneven, even, mask)[0].item()
    assert forward == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-7)
    assert backward == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-7)


@pytest.mark.parametrize("tau", [0.7, 1.0, 2.0])
def test_gradcheck(tau):
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(6, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    mask = torch.rand(6, 8, generator=generator) < 0.6
    mask[0] = False
    mask[1] = torch.arange(8) == 3
    assert torch.autograd.gradcheck(lambda x: support_kl(x, teacher, mask, tau)[0], (student,))
    support_kl(student, teacher, mask, tau)[0].sum().backward()
    assert (student.grad[~mask] == 0).all() and (student.grad[:2] == 0).all()
    p, q = ((x / tau).masked_fill(~mask, -torch.inf).softmax(1) for x in (teacher, student.detach()))
    assert_close(student.grad[2:], (tau * (q - p))[2:])


def test_teacher_gets_no_gradient_and_inputs_stay():
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    mask = torch.tensor([[True] * 4, [True, False, False, False], [False] * 4])
    before = student.detach().clone(), teacher.detach().clone(), mask.clone()
    support_kl(student, teacher, mask)[0].sum().backward()
    assert teacher.grad is None and student.grad[0].abs().sum() > 0
    for tensor, copy in zip((student, teacher, mask), before):
        assert torch.equal(tensor.detach(), copy)


def test_same_logits_give_zero():
    logits = 20 * torch.randn(50, 7)
    assert support_kl(logits, logits.clone(), torch.rand(50, 7) < 0.5)[0].abs().max() == 0


def test_rows_with_fewer_than_two_ids_are_zero_whatever_they_hold():
    garbage = torch.tensor([[float("nan"), float("inf"), -float("inf")]] * 3).requires_grad_()
    mask = torch.tensor([[False, False, False], [True, False, False], [False, False, True]])
    kl, counted = support_kl(garbage, garbage.detach(), mask)
    kl.sum().backward()
    assert kl.tolist() == [0, 0, 0] and counted.tolist() == [False] * 3
    assert (garbage.grad == 0).all()


def test_masked_entries_never_matter():
    student, teacher = torch.randn(2, 4), torch.randn(2, 4)
    mask = torch.tensor([[True, True, False, True], [False, True, True, False]])
    expected = support_kl(student, teacher, mask)[0]
    dirty_student = student.masked_fill(~mask, float("nan")).requires_grad_()
    dirty_teacher = teacher.masked_fill(~mask, float("inf"))
    kl, _ = support_kl(dirty_student, dirty_teacher, mask)
    kl.sum().backward()
    assert torch.equal(kl, expected)
    assert dirty_student.grad.isfinite().all() and (dirty_student.grad[~mask] == 0).all()


@pytest.mark.parametrize(
    "dtypes", ["float32 float32 float32", "float16 bfloat16 float32", "bfloat16 float64 float64"]
)
def test_dtypes(dtypes):
    """Of the student, of the teacher, and of the result."""
    student, teacher, expected = dtypes.split()
    student_logits = torch.randn(3, 4, dtype=getattr(torch, student))
    teacher_logits = torch.randn(3, 4, dtype=getattr(torch, teacher))
    mask = torch.ones(3, 4, dtype=torch.bool)
    kl, counted = support_kl(student_logits, teacher_logits, mask)
    assert kl.dtype == getattr(torch, expected) and counted.dtype == torch.bool
    exact = support_kl(student_logits.double(), teacher_logits.double(), mask)[0]
    assert_close(kl.double(), exact, rtol=1e-5, atol=1e-6)


def test_no_rows():
    no_ids = torch.empty(0, 3, dtype=torch.int64)
    ids, mask = union_support(no_ids, no_ids)
    student = torch.empty(0, 6, requires_grad=True)
    kl, counted = support_kl(student, torch.empty(0, 6), mask)
    kl.sum().backward()
    assert ids.shape == (0, 6) and kl.shape == counted.shape == (0,)


def test_large_scores_do_not_overflow():
    logits = torch.tensor([[0.0, 1e4]])
    kl, _ = support_kl(logits, logits.flip(1), torch.ones(1, 2, dtype=torch.bool))
    assert kl.item() == pytest.approx(1e4)


# ---- the teacher's side ------------------------------------------------------------------------------------


def random_teacher(V, H, seed=0):
    """What `teacher_support` reads of a teacher: its head."""
    torch.manual_seed(seed)
    return type("Teacher", (), {"head": torch.nn.Linear(H, V, bias=False)})()


def test_k_at_least_v_is_the_full_vocabulary_kl():
    V, H = 11, 6
    teacher, hidden, student_logits = random_teacher(V, H), torch.randn(9, H), torch.randn(9, V)
    same, none = torch.arange(V), torch.zeros(V, dtype=torch.bool)
    alignment = m.Alignment(same, same, none, none)
    student_topk = student_logits.topk(V).indices
    ids, mask, scores, _ = teacher_support(teacher, hidden, student_topk, alignment, k=50)
    kl, counted = support_kl(student_logits.gather(1, ids.clamp(min=0)), scores, mask)
    log_p, log_q = teacher.head(hidden).log_softmax(1), student_logits.log_softmax(1)
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)
    assert_close(kl, expected.detach())
    assert counted.all() and (mask.sum(1) == V).all()


def test_teacher_support_in_chunks_equals_one_piece_and_skips_forbidden_ids():
    """The teacher's vocabulary is the student's in reverse order, without its ids 0 and 1."""
    V, H, n, k = 20, 6, 23, 4
    teacher, hidden = random_teacher(V, H), torch.randn(n, H)
    to_teacher = torch.arange(V - 1, -1, -1)
    to_teacher[:2] = -1
    to_student = torch.arange(V - 1, -1, -1)
    to_student[V - 2 :] = -1
    alignment = m.Alignment(to_teacher, to_student, to_teacher < 0, to_student < 0)
    student_topk = torch.randint(2, V, (n, k))
    whole = teacher_support(teacher, hidden, student_topk, alignment, k, chunk=1000)
    for chunk in (1, 5, 23):
        parts = teacher_support(teacher, hidden, student_topk, alignment, k, chunk)
        for part, piece in zip(parts, whole):
            assert_close(part, piece)
    ids, mask, scores, teacher_topk = whole
    logits = teacher.head(hidden)
    for row in range(n):
        best = [u for u in logits[row].argsort(descending=True).tolist() if u < V - 2][:k]
        assert teacher_topk[row].tolist() == [V - 1 - u for u in best]
        support = ids[row][mask[row]]
        assert support.tolist() == sorted({*student_topk[row].tolist(), *teacher_topk[row].tolist()})
        assert_close(scores[row][mask[row]], logits[row][V - 1 - support])
    assert not (ids[mask] < 2).any() and not scores.requires_grad
    empty = teacher_support(teacher, hidden[:0], student_topk[:0], alignment, k)
    assert [len(part) for part in empty] == [0, 0, 0, 0]


def test_alignment_is_the_identity_for_one_tokenizer_and_an_error_for_two():
    student, teacher = tiny_model(0), tiny_model(1)
    alignment = m.align_vocabularies(student, teacher)
    text = ~student.forbidden
    assert torch.equal(alignment.to_teacher[text], text.nonzero()[:, 0])
    assert (alignment.to_teacher[~text] == -1).all()
    assert torch.equal(alignment.student_forbidden, student.forbidden)
    other = {("x" + token if i < 256 else token): i for token, i in byte_tokenizer().get_vocab().items()}
    teacher.front_end.tokenizer.get_vocab = lambda: other
    with pytest.raises(InputError, match="--student, --teacher: only 1 of the student's 257"):
        m.align_vocabularies(student, teacher)


def test_ids_go_to_the_teacher_as_they_are_and_stop_where_one_has_no_counterpart():
    """The teacher lacks the byte "b". Ids map by token string, and the stop token by its role."""
    student = tiny_model(0)
    specials = ["<|more|>", *m.PROMPT_TOKENS, m.PAD_TOKEN, m.STOP_TOKEN]
    teacher = tiny_model(1, byte_tokenizer(specials=specials))
    vocabulary = teacher.front_end.tokenizer.get_vocab()
    vocabulary["x"] = vocabulary.pop("b")
    teacher.front_end.tokenizer.get_vocab = lambda: vocabulary
    alignment = m.align_vocabularies(student, teacher)
    rollout = student.front_end.transcripts(["ac", "今"])
    mapped = m.teacher_rollout(rollout, alignment)
    a, c = (vocabulary[letter] for letter in "ac")
    assert mapped.ids[0, :3].tolist() == [a, c, teacher.front_end.stop_id]
    assert mapped.ids[1, 3] == teacher.front_end.stop_id != student.front_end.stop_id
    assert torch.equal(mapped.row_mask(), rollout.row_mask())
    assert alignment.student_forbidden[student.front_end.encode_text("b")].all()
    with pytest.raises(AssertionError, match="transcript token has no counterpart in the teacher's"):
        m.teacher_rollout(student.front_end.transcripts(["ac", "abc"]), alignment)


# ---- the student's side ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_at_a_time", [1, 3, 100])
def test_scores_and_gradients_of_the_support_are_those_of_all_logits(rows_at_a_time, monkeypatch):
    """Ids that repeat within a row and between rows, some not counted; chunks that do not divide the rows."""
    monkeypatch.setattr(m.SupportScores, "cpu_chunk_floats", rows_at_a_time * 6 * 4)
    torch.manual_seed(0)
    weight, hidden = torch.randn(11, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    ids = torch.randint(-1, 11, (7, 6))
    ids[0] = 5
    ids[1, :3] = 5
    upstream = torch.randn(7, 6, dtype=torch.float64).masked_fill(ids < 0, 0)
    chunks = m.SupportScores.chunks(hidden, ids)
    assert max(len(ids[rows]) for rows in chunks) == min(rows_at_a_time, 7)
    assert torch.equal(torch.cat([ids[rows] for rows in chunks]), ids)
    trained = weight.requires_grad_(), hidden.requires_grad_()
    ours = support_scores(weight, hidden, ids)
    plain = (hidden @ weight.T).gather(1, ids.clamp(min=0))
    assert_close(ours[ids >= 0], plain[ids >= 0], rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad((scores * upstream).sum(), trained) for scores in (ours, plain)]
    for our_grad, plain_grad in zip(*gradients):
        assert_close(our_grad, plain_grad, rtol=1e-12, atol=1e-12)
    assert support_scores(weight, hidden[:0], ids[:0]).shape == (0, 6)


# ---- the full vocabulary -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chunk, temperature, divergence", [(2, 1.0, "forward"), (256, 2.0, "forward"), (2, 2.0, "reverse")]
)
def test_full_kl_is_exact_whatever_the_chunk_and_honours_the_divergence(chunk, temperature, divergence):
    """Against the definition over the allowed ids, written out in float64; the teacher has other ids."""
    student = tiny_model(0).double()
    teacher = tiny_model(1, byte_tokenizer(["<|more|>"]), hidden=48).double().requires_grad_(False)
    alignment = m.align_vocabularies(student, teacher)
    allowed = (~alignment.student_forbidden).nonzero()[:, 0]
    torch.manual_seed(0)
    student_rows, teacher_rows = torch.randn(5, 32).double().requires_grad_(), torch.randn(5, 48).double()
    kl, counted = m.full_kl(
        student, student_rows, teacher, teacher_rows, alignment, temperature, divergence, chunk=chunk
    )
    assert counted.tolist() == [True] * 5
    log_q = (student.head(student_rows)[:, allowed] / temperature).log_softmax(1)
    log_p = (teacher.head(teacher_rows)[:, alignment.to_teacher[allowed]] / temperature).log_softmax(1)
    a, b = (log_q, log_p) if divergence == "reverse" else (log_p, log_q)
    expected = temperature**2 * (a.exp() * (a - b)).sum(1)
    assert_close(kl.double(), expected, rtol=1e-5, atol=1e-6)
    trained = (student_rows, student.head.weight)
    gradients = torch.autograd.grad(kl.sum(), trained), torch.autograd.grad(expected.sum(), trained)
    for ours, plain in zip(*gradients):
        assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_full_kl_of_a_teacher_in_bf16_does_not_round_its_logits():
    """As on the union, its weights and rows are bf16 and its logits float32."""
    student = tiny_model(0)
    teacher = tiny_model(1, hidden=48).to(torch.bfloat16).requires_grad_(False)
    alignment = m.align_vocabularies(student, teacher)
    torch.manual_seed(0)
    student_rows, teacher_rows = torch.randn(5, 32), (9 * torch.randn(5, 48)).bfloat16()
    kl, _ = m.full_kl(student, student_rows, teacher, teacher_rows, alignment)
    ids = (~alignment.student_forbidden).nonzero()[:, 0].expand(5, -1)
    student_logits = support_scores(student.head.weight, student_rows, ids)
    teacher_logits = support_scores(teacher.head.weight, teacher_rows, ids)
    on_all_ids, _ = support_kl(student_logits, teacher_logits, torch.ones_like(ids, dtype=torch.bool))
    assert_close(kl, on_all_ids, rtol=1e-5, atol=1e-6)


# ---- one whole step ----------------------------------------------------------------------------------------


def stock_logits(stock, batch, b, ids):
    """Logits (T, V) that predict `ids`, by a stock model's own forward on clip b alone."""
    prompt = batch.prompt_ids[b][batch.prompt_mask[b]]
    n_frames = int(batch.mel_lens[b])
    input_ids = torch.cat([prompt, ids])[None]
    features_mask = torch.ones(1, n_frames, dtype=torch.long)
    if isinstance(stock, transformers.Qwen3ASRForConditionalGeneration):
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
    student = SpeechLM.from_pretrained(tmp_path / "student", torch.float64).train()
    teacher = SpeechLM.from_pretrained(tmp_path / "teacher", torch.float64).eval().requires_grad_(False)
    alignment = m.align_vocabularies(student, teacher)
    waves = [noise(0.4), noise(2.24, seed=1), noise(1.12, seed=2)]  # whole audio tokens of 80 ms
    batch = collate(waves, student.front_end, ["en"] * 3)
    teacher_batch = collate(waves, teacher.front_end, ["en"] * 3)

    # The block of opd.py.
    encoded = student.encode(batch)
    rollout = student.sample(batch, 12, k=k, forbidden=alignment.student_forbidden, encoded=encoded)
    rollout.ids[1, 4] = student.front_end.stop_id  # the second transcript stops after four tokens
    rollout.lens[1] = 4
    rollout.stopped[1] = True
    student_topk = rollout.topk_ids[rollout.row_mask()]
    teacher_hidden = teacher(teacher_batch, m.teacher_rollout(rollout, alignment))
    support_ids, mask, teacher_logits, _ = teacher_support(
        teacher, teacher_hidden, student_topk, alignment, k
    )
    student_hidden = student(batch, rollout, encoded)
    student_logits = support_scores(student.head.weight, student_hidden, support_ids)
    kl, counted = support_kl(student_logits, teacher_logits, mask, tau)
    kl.sum().backward()

    # The same by stock classes, clip by clip and position by position.
    stock_student = transformers.GlmAsrForConditionalGeneration.from_pretrained(tmp_path / "student").double()
    stock_teacher = transformers.Qwen3ASRForConditionalGeneration.from_pretrained(
        tmp_path / "teacher"
    ).double()
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
            q, p = (ours[row, support] / tau).softmax(0), (theirs[row, support] / tau).softmax(0)
            terms.append(tau**2 * (p * (p.log() - q.log())).sum())
    torch.stack(terms).sum().backward()

    assert len(terms) == len(kl) == 12 + 5 + 12 and counted.all()
    assert_close(kl, torch.stack(terms), rtol=1e-6, atol=1e-6)
    expected = {name: p.grad for name, p in stock_student.named_parameters()}
    assert {name for name, _ in student.named_parameters()} == set(expected)
    for name, parameter in student.named_parameters():
        largest = expected[name].abs().max()
        assert largest > 1e-6 and (parameter.grad - expected[name]).abs().max() <= 1e-6 * largest, name
