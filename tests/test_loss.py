"""union_support, support_kl, teacher_support, student_scores:
exact values, brute force in float64, gradients."""
import math

import pytest
import torch

from conftest import byte_tokenizer, tiny_model
from data import InputError
from model import Alignment, align_vocabularies, student_scores, support_kl, teacher_support, union_support


def brute_force(student_ids, teacher_ids, student_logits, teacher_logits, tau):
    """Eq. 1 row by row in plain Python; logits are over the vocabulary."""
    values = []
    for s_ids, t_ids, s, t in zip(student_ids.tolist(), teacher_ids.tolist(), student_logits.tolist(),
                                  teacher_logits.tolist()):
        support = sorted({i for i in s_ids + t_ids if i >= 0})
        if len(support) < 2:
            values.append((0.0, False))
            continue
        p = [math.exp(t[u] / tau) for u in support]
        q = [math.exp(s[u] / tau) for u in support]
        kl = sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q))
        values.append((tau ** 2 * kl, True))
    return values


def random_ids(n, k, v, generator):
    """(n, k) ids with duplicates and about a third invalid."""
    return torch.randint(-v // 2, v, (n, k), generator=generator).clamp(min=-1)


def test_union_support_lists_each_valid_id_once():
    ids, mask = union_support(torch.tensor([[3, 1, -1], [5, 5, 5], [-1, -1, -1]]),
                              torch.tensor([[1, 7, 3], [5, -1, 5], [-1, -5, -1]]))
    assert [row[m].tolist() for row, m in zip(ids, mask)] == [[1, 3, 7], [5], []]
    assert ids.shape == mask.shape == (3, 6) and ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert (ids[~mask] == -1).all()


def test_union_support_against_sets():
    generator = torch.Generator().manual_seed(0)
    s, t = random_ids(200, 6, 12, generator), random_ids(200, 6, 12, generator)
    before = s.clone(), t.clone()
    ids, mask = union_support(s, t)
    for row in range(200):
        assert ids[row][mask[row]].tolist() == sorted(
            {i for i in s[row].tolist() + t[row].tolist() if i >= 0})
    assert torch.equal(s, before[0]) and torch.equal(t, before[1])


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_kl_against_brute_force(tau):
    generator = torch.Generator().manual_seed(1)
    n, k, v = 300, 5, 14
    s_ids, t_ids = random_ids(n, k, v, generator), random_ids(n, k, v, generator)
    s, t = (3 * torch.randn(n, v, generator=generator, dtype=torch.float64) for _ in range(2))
    ids, mask = union_support(s_ids, t_ids)
    kl, counted = support_kl(s.gather(1, ids.clamp(min=0)), t.gather(1, ids.clamp(min=0)), mask, tau)
    want = brute_force(s_ids, t_ids, s, t, tau)
    assert counted.tolist() == [c for _, c in want] and 0 < sum(counted.tolist()) < n
    torch.testing.assert_close(kl, torch.tensor([x for x, _ in want], dtype=torch.float64),
                               rtol=1e-12, atol=1e-12)


def test_direction_is_teacher_to_student():
    """p = (3/4, 1/4), q = (1/2, 1/2): KL(p‖q) = 0.1308, the other way round 0.1438."""
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert support_kl(student, teacher, mask)[0].item() == pytest.approx(
        0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-7)
    assert support_kl(teacher, student, mask)[0].item() == pytest.approx(
        0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-7)


@pytest.mark.parametrize("tau", [0.7, 1.0, 2.0])
def test_gradcheck(tau):
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(6, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    mask = torch.rand(6, 8, generator=generator) < 0.6
    mask[0], mask[1] = False, torch.arange(8) == 3
    assert torch.autograd.gradcheck(lambda s: support_kl(s, teacher, mask, tau)[0], (student,))
    support_kl(student, teacher, mask, tau)[0].sum().backward()
    assert ((student.grad[~mask] == 0).all() and (student.grad[:2] == 0).all()
            and (student.grad[2:][mask[2:]] != 0).any())


def test_gradient_is_tau_times_q_minus_p():
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher, mask, tau = (torch.randn(4, 5, generator=generator, dtype=torch.float64),
                          torch.ones(4, 5, dtype=torch.bool), 2.0)
    support_kl(student, teacher, mask, tau)[0].sum().backward()
    torch.testing.assert_close(student.grad,
                               tau * ((student / tau).softmax(1) - (teacher / tau).softmax(1)).detach())


def test_teacher_gets_no_gradient_and_inputs_stay():
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    mask = torch.tensor([[True] * 4, [True, False, False, False], [False] * 4])
    before = student.detach().clone(), teacher.detach().clone(), mask.clone()
    support_kl(student, teacher, mask)[0].sum().backward()
    assert teacher.grad is None and student.grad[0].abs().sum() > 0
    assert all(torch.equal(a.detach(), b) for a, b in zip((student, teacher, mask), before))


def test_same_logits_give_zero():
    logits = 20 * torch.randn(50, 7)
    assert support_kl(logits, logits.clone(), torch.rand(50, 7) < 0.5)[0].abs().max() == 0


def test_rows_with_fewer_than_two_ids_are_zero_whatever_they_hold():
    garbage = torch.tensor([[float("nan"), float("inf"), -float("inf")]] * 3).requires_grad_()
    mask = torch.tensor([[False, False, False], [True, False, False], [False, False, True]])
    kl, counted = support_kl(garbage, garbage.detach(), mask)
    kl.sum().backward()
    assert kl.tolist() == [0, 0, 0] and counted.tolist() == [False] * 3 and (garbage.grad == 0).all()


def test_masked_entries_never_matter():
    student, teacher = torch.randn(2, 4), torch.randn(2, 4)
    mask = torch.tensor([[True, True, False, True], [False, True, True, False]])
    want = support_kl(student, teacher, mask)[0]
    dirty = [x.masked_fill(~mask, bad).requires_grad_()
             for x, bad in ((student, float("nan")), (teacher, float("inf")))]
    kl, _ = support_kl(*dirty, mask)
    kl.sum().backward()
    assert torch.equal(kl, want) and dirty[0].grad.isfinite().all() and (dirty[0].grad[~mask] == 0).all()


@pytest.mark.parametrize("student, teacher, want", [
    ("float32", "float32", "float32"), ("bfloat16", "float32", "float32"), ("float16", "bfloat16", "float32"),
    ("float64", "float32", "float64"), ("bfloat16", "float64", "float64")])
def test_dtypes(student, teacher, want):
    s, t = torch.randn(3, 4, dtype=getattr(torch, student)), torch.randn(3, 4, dtype=getattr(torch, teacher))
    kl, counted = support_kl(s, t, torch.ones(3, 4, dtype=torch.bool))
    assert kl.dtype == getattr(torch, want) and counted.dtype == torch.bool
    exact = support_kl(s.double(), t.double(), torch.ones(3, 4, dtype=torch.bool))[0]
    torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=1e-6)


def test_no_rows():
    ids, mask = union_support(torch.empty(0, 3, dtype=torch.int64), torch.empty(0, 3, dtype=torch.int64))
    student = torch.empty(0, 6, requires_grad=True)
    kl, counted = support_kl(student, torch.empty(0, 6), mask)
    kl.sum().backward()
    assert ids.shape == (0, 6) and kl.shape == counted.shape == (0,)


def test_large_scores_do_not_overflow():
    kl, _ = support_kl(torch.tensor([[0.0, 1e4]]), torch.tensor([[1e4, 0.0]]),
                       torch.ones(1, 2, dtype=torch.bool))
    assert kl.item() == pytest.approx(1e4)


def identity_alignment(v):
    ids, none = torch.arange(v), torch.zeros(v, dtype=torch.bool)
    return Alignment(ids, ids, none, none)


def fake_teacher(v, h, seed=0):
    torch.manual_seed(seed)
    return type("Teacher", (), {"head": torch.nn.Linear(h, v, bias=False)})()


def test_k_at_least_v_is_the_full_vocabulary_kl():
    v, h = 11, 6
    teacher, hidden, student_logits = fake_teacher(v, h), torch.randn(9, h), torch.randn(9, v)
    ids, mask, scores, _ = teacher_support(teacher, hidden, student_logits.topk(v).indices,
                                           identity_alignment(v), k=50)
    kl, counted = support_kl(student_logits.gather(1, ids.clamp(min=0)), scores, mask)
    want = torch.nn.functional.kl_div(student_logits.log_softmax(1), teacher.head(hidden).log_softmax(1),
                                      log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(kl, want.detach())
    assert counted.all() and (mask.sum(1) == v).all()


def test_teacher_support_in_chunks_equals_one_piece_and_skips_forbidden_ids():
    """The teacher's vocabulary is the student's in reverse order,
    without its ids 0 and 1, and its last id is forbidden."""
    v, h, n, k = 20, 6, 23, 4
    teacher, hidden = fake_teacher(v, h), torch.randn(n, h)
    to_teacher = torch.arange(v - 1, -1, -1)
    to_teacher[:2] = -1
    to_student = torch.where(torch.arange(v) < v - 2, torch.arange(v - 1, -1, -1), -1)
    alignment = Alignment(to_teacher, to_student, to_teacher < 0, to_student < 0)
    student_topk = torch.randint(2, v, (n, k))
    whole = teacher_support(teacher, hidden, student_topk, alignment, k, chunk=1000)
    for parts in (teacher_support(teacher, hidden, student_topk, alignment, k, chunk=c) for c in (1, 5, 23)):
        for a, b in zip(whole, parts):
            torch.testing.assert_close(a, b)
    ids, mask, scores, teacher_ids = whole
    logits = teacher.head(hidden)
    for row in range(n):
        best = [u for u in logits[row].argsort(descending=True).tolist() if u < v - 2][:k]
        assert teacher_ids[row].tolist() == [v - 1 - u for u in best]
        assert ids[row][mask[row]].tolist() == sorted(
            {*student_topk[row].tolist(), *teacher_ids[row].tolist()})
        torch.testing.assert_close(scores[row][mask[row]], logits[row][v - 1 - ids[row][mask[row]]])
    assert not (ids[mask] < 2).any() and not scores.requires_grad
    assert [x.shape[0] for x in teacher_support(
        teacher, hidden[:0], student_topk[:0], alignment, k)] == [0, 0, 0, 0]


def test_student_scores_equal_the_heads_and_so_do_the_gradients():
    weight, hidden = (torch.randn(30, 8, dtype=torch.float64, requires_grad=True),
                      torch.randn(7, 8, dtype=torch.float64, requires_grad=True))
    ids = torch.randint(-1, 30, (7, 6))
    upstream = torch.randn(7, 6, dtype=torch.float64).masked_fill(ids < 0, 0)
    got = student_scores(weight, hidden, ids)
    want = (hidden @ weight.T).gather(1, ids.clamp(min=0))
    torch.testing.assert_close(got[ids >= 0], want.to(got.dtype)[ids >= 0])
    grads = [torch.autograd.grad((x * upstream).sum(), (weight, hidden)) for x in (got, want)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_alignment_is_the_identity_for_one_tokenizer_and_an_error_for_two():
    student, teacher = tiny_model(0), tiny_model(1)
    alignment = align_vocabularies(student, teacher)
    text = ~student.forbidden
    assert (torch.equal(alignment.to_teacher[text], text.nonzero()[:, 0])
            and (alignment.to_teacher[~text] == -1).all())
    assert torch.equal(alignment.student_forbidden, student.forbidden)
    other = byte_tokenizer()
    other.get_vocab = lambda: {("x" + t if i < 256 else t): i
                               for t, i in byte_tokenizer().get_vocab().items()}
    teacher.front_end.tokenizer = other
    with pytest.raises(InputError, match="--student, --teacher: only 1 of the student's 257"):
        align_vocabularies(student, teacher)
