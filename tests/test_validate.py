"""results/validate.py: statistics by hand or by another route, size and power by simulation, baselines."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from results import validate

# ---- simulated experiments ---------------------------------------------------------------------------------


def simulate(n_tables, n_students, n_teachers, true_r, seed=0):
    """VUSS and ln(error after) of many experiments, each (n_tables, I, J), both driven by strength.

    A strong student or teacher has low VUSS and few errors. What belongs to a pair correlates by `true_r`.
    """
    rng = np.random.default_rng(seed)
    students = rng.normal(size=(n_tables, n_students, 1))
    teachers = rng.normal(size=(n_tables, 1, n_teachers))
    pairs = rng.normal(size=(n_tables, n_students, n_teachers))
    others = rng.normal(size=(n_tables, n_students, n_teachers))
    pair_gains = true_r * pairs + math.sqrt(1 - true_r**2) * others
    vuss = 50 - 2 * students - 2 * teachers + 1.2 * pairs
    y = 2 - 0.3 * students - 0.3 * teachers + 0.18 * pair_gains
    return vuss, y


def rejections(vuss, y):
    """The share of tables (n, I, J) whose primary test has p < .05, with 999 of the orders."""
    orders = [order[:999] for order in validate.draw_orders(*y.shape[1:])]
    p_values = []
    for measure, target in zip(vuss, y):
        centred = validate.double_centre(measure), validate.double_centre(target)
        p_values.append(validate.permutation_test(validate.correlation, *centred, orders)[1])
    return (np.array(p_values) < 0.05).mean()


@pytest.mark.slow
def test_without_an_effect_the_primary_test_keeps_its_size_and_the_pooled_correlation_does_not():
    vuss, y = simulate(2000, 8, 6, true_r=0)
    assert 0.03 <= rejections(vuss, y) <= 0.07
    pooled = [scipy.stats.spearmanr(vuss[i].ravel(), y[i].ravel()).pvalue for i in range(200)]
    assert np.mean(np.array(pooled) < 0.05) > 0.9


@pytest.mark.parametrize("shape", [(8, 6), (4, 4)])
def test_the_detectable_r_has_the_power_that_the_verdict_says(shape):
    vuss, y = simulate(400, *shape, true_r=validate.detectable_r(*shape))
    assert 0.75 <= rejections(vuss, y) <= 0.9


# ---- association -------------------------------------------------------------------------------------------


@pytest.fixture
def pair():
    """A measure and y, 5 students × 4 teachers, with ties in the measure."""
    rng = np.random.default_rng(3)
    measure = rng.integers(4, size=(5, 4)).astype(float)
    y = 0.3 * measure + rng.normal(size=(5, 4))
    return measure, y


def test_double_centring_removes_all_that_belongs_to_one_model():
    table = np.array([[1.0, 2.0], [3.0, 8.0]])
    assert validate.double_centre(table).tolist() == [[1, -1], [-1, 1]]
    centred = validate.double_centre(np.add.outer([0.1, 0.7, 1e3], [0.3, 1 / 3, 7.7]))
    assert not centred.any()
    assert np.isnan(validate.correlation(centred, np.eye(3)))


def test_permutation_test_is_the_loop_over_all_orders():
    rng = np.random.default_rng(1)
    measure = validate.double_centre(rng.normal(size=(3, 3)))
    y = validate.double_centre(measure + rng.normal(size=(3, 3)))
    orders = list(itertools.permutations(range(3)))
    row_orders, column_orders = zip(*itertools.product(orders, orders))
    drawn = []
    for rows, columns in zip(row_orders, column_orders):
        permuted = measure[list(rows)][:, list(columns)]
        drawn.append(np.corrcoef(permuted.ravel(), y.ravel())[0, 1])
    count = sum(abs(value) >= abs(drawn[0]) - 1e-9 for value in drawn)
    assert 1 < count < 20

    all_orders = (np.array(row_orders), np.array(column_orders))
    value, p = validate.permutation_test(validate.correlation, measure, y, all_orders)
    assert value == pytest.approx(drawn[0]) and p == (count + 1) / 37


def test_mean_kendall_is_scipys(pair):
    measure, y = pair
    rows = [scipy.stats.kendalltau(measure[i], y[i]).statistic for i in range(5)]
    assert validate.mean_kendall(measure, y) == pytest.approx(np.mean(rows))
    tied = np.array([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])  # the second row orders nothing
    assert validate.mean_kendall(tied, np.array([[2.0, 4.0, 9.0], [1.0, 2.0, 3.0]])) == pytest.approx(0.5)


def test_partial_spearman_by_the_inverse_of_the_rank_correlations(pair):
    measure, y = pair
    before = np.array([0.3, 1.0, 0.2, 0.7, 0.7])
    teacher_errors = np.array([0.4, 0.1, 0.9, 0.2])
    columns = [measure.ravel(), y.ravel(), np.repeat(before, 4), np.tile(teacher_errors, 5)]
    ranks = [scipy.stats.rankdata(column) for column in columns]
    inverse = np.linalg.inv(np.corrcoef(ranks))
    partial = -inverse[0, 1] / math.sqrt(inverse[0, 0] * inverse[1, 1])
    residuals = [validate.rank_residuals(table, before, teacher_errors) for table in (measure, y)]
    assert validate.correlation(*residuals) == pytest.approx(partial)
    of_one_model = np.repeat(before[:, None], 4, axis=1)
    assert not validate.rank_residuals(of_one_model, before, teacher_errors).any()


def test_holm_by_hand():
    assert validate.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    adjusted = validate.holm([math.nan, 0.6, 0.5])
    assert math.isnan(adjusted[0]) and adjusted[1:] == [1.0, 1.0]


def test_noise_ceiling_by_hand():
    """ỹ = ±1 in a 2 × 2 table: s² = 1, and (I−1)(J−1)/(IJ) = 1/4."""
    y = np.array([[1.0, 2.0], [3.0, 8.0]])
    assert validate.noise_ceiling(y, 0.76) == pytest.approx(0.9)
    assert math.isnan(validate.noise_ceiling(y, 4.0))


# ---- prediction --------------------------------------------------------------------------------------------


def test_ridge_is_least_squares_with_rows_for_the_penalty():
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(12, 3)) * [1, 5, 0.1] + [3, 0, 40]
    y = columns @ [1.0, 0.2, 3.0] + rng.normal(size=12)
    groups = np.repeat(np.arange(3), 4)
    predicted = validate.left_out_ridge(columns, y, groups)
    for group in range(3):
        seen = columns[groups != group]
        seen_y = y[groups != group]
        Z = (seen - seen.mean(axis=0)) / seen.std(axis=0)
        rows = np.concatenate([Z, np.eye(3)])
        targets = np.concatenate([seen_y - seen_y.mean(), np.zeros(3)])
        beta = np.linalg.lstsq(rows, targets, rcond=None)[0]
        new = (columns[groups == group] - seen.mean(axis=0)) / seen.std(axis=0)
        np.testing.assert_allclose(predicted[groups == group], seen_y.mean() + new @ beta)


def test_regret_by_hand():
    """The second student's lowest score is shared by two teachers, 0 and 1 above the best."""
    y = np.array([[1.0, 2.0, 5.0], [4.0, 3.0, 9.0]])
    score = np.array([[7.0, 6.0, 8.0], [2.0, 2.0, 3.0]])
    assert validate.regret(y, score) == pytest.approx((1 + 0.5) / 2)
    assert validate.regret(y, y) == 0


# ---- the whole analysis ------------------------------------------------------------------------------------


def table_of(vuss, y, **measures):
    """A table as validate.table_of returns it, where both errors are noisy signs of strength."""
    rng = np.random.default_rng(7)
    return {
        "primary": "vuss",
        "expected_sign": {"vuss": 1, "overlap_ratio": -1, "noise": 1},
        "measures": {"vuss": vuss, **measures},
        "y": y,
        "before": y.mean(axis=1) + 0.05 * rng.normal(size=len(y)),
        "teacher_errors": y.mean(axis=0) + 0.05 * rng.normal(size=y.shape[1]),
        "seed_variance": math.nan,
    }


def test_verdicts():
    """An effect, its opposite, each half of the condition without the other, and nothing to test."""
    vuss, y = simulate(1, 8, 6, true_r=0.95)
    result = validate.analyse(table_of(vuss[0], y[0]))
    assert result["p"] == 1e-4
    assert result["verdict"] == "VUSS adds information beyond error rates"
    reverse = validate.analyse(table_of(-vuss[0], y[0]))
    assert reverse["verdict"].endswith("but with the sign opposite to the expected one")

    weak = {**result, "p": 0.05}
    assert validate.verdict(weak, 8, 6).startswith("no evidence at this size (primary p 0.0500)")
    result["measures"]["vuss"]["new_teacher"]["low"] = 0.0
    assert "but the improvement for new teachers may be 0" in validate.verdict(result, 8, 6)

    of_one_model = np.add.outer(np.arange(8.0), np.arange(6.0) ** 2)
    result = validate.analyse(table_of(of_one_model, y[0], noise=vuss[0]))
    assert result["verdict"].startswith("no test: ")


# ---- the file ----------------------------------------------------------------------------------------------


@pytest.fixture
def content():
    """3 × 3 cells with seeds 2 and 1, and 0 in the first cell only. Seeds differ by e^0.2 in one set."""
    cells = []
    pairs = itertools.product(enumerate(("a-small", "b-base", "c-large")), enumerate(("a", "b", "c")))
    for (i, student), (j, teacher) in pairs:
        for seed in (2, 1):
            cell = {"student": student, "teacher": teacher, "seed": seed}
            cell["measures"] = {"vuss": 40.0 + 3 * i + (i - j) ** 2, "jaccard": 0.5 - 0.1 * i * j}
            cell["before"] = {"en": 20.0 - i, "zh": 10.0}
            cell["teacher_errors"] = {"en": 4.0, "zh": 9.0 + j}
            cell["after"] = {"en": 8.0 + i + j + i * j, "zh": 2.0 * math.exp(0.2 * (seed - 1))}
            cells.append(cell)
    cells.append({**cells[0], "seed": 0})
    return {"cells": cells}


def test_the_table_of_the_cells(content):
    table = validate.table_of(content)
    assert table["students"] == ["a-small", "b-base", "c-large"]
    assert table["teachers"] == ["a", "b", "c"]
    assert table["seed"] == 1
    assert table["primary"] == "vuss"
    assert table["measures"]["vuss"].tolist() == [[40, 41, 44], [44, 43, 44], [50, 47, 46]]
    assert table["measures"]["jaccard"][2].tolist() == pytest.approx([0.5, 0.3, 0.1])
    for key, products in (("before", [200, 190, 180]), ("teacher_errors", [36, 40, 44])):
        assert table[key].tolist() == pytest.approx([math.log(math.sqrt(x)) for x in products])
    assert table["y"][2].tolist() == pytest.approx([math.log(math.sqrt(2 * en)) for en in (10, 13, 16)])
    # Seeds 1 and 2 are 0.1 apart in y: 0.005 a cell; seed 0 of the first cell is as its seed 2.
    first = 0.1**2 * 2 / 3
    assert table["seed_variance"] == pytest.approx((8 * 0.005 + first) / (8 + 2))


# ---- baselines ---------------------------------------------------------------------------------------------


def clip_line(text, student, teacher, student_ids, teacher_ids, language="en"):
    line = {"text": text, "student": student, "teacher": teacher, "language": language}
    return {**line, "student_ids": student_ids, "teacher_ids": teacher_ids}


def test_baselines_by_hand():
    """One word of three is wrong, and two of nine trigrams end in it; of three ids, 6 is lost and 8 new."""
    english = clip_line("The cat, sat", "the cat sit", "the cat sat", [5, 7, 8], [5, 6, 7])
    # Chinese is compared by character, without the blank; the script decides where there is no language.
    chinese = clip_line("今天下雨", "今天 刮风。", "今天下风", [1, 2], [1], language=None)
    # An empty transcript has nothing to compare, but an error against the text.
    empty = clip_line("oh", "", "", [], [])
    assert validate.baselines([english, chinese, empty]) == {
        "error_student": 100 * (1 + 2 + 1) / (3 + 4 + 1),
        "error_between": pytest.approx(100 * (1 + 1) / (3 + 4)),
        "token_agreement": pytest.approx(1 - (2 + 1) / (3 + 2)),
        "trigram_f1": pytest.approx(2 * 7 / (9 + 9 + 2 + 2)),
    }
