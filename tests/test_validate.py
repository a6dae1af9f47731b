"""overlap.py --validate: statistics by hand or by another route, size and power by simulation, the file."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import scipy.stats

import overlap
from data import InputError
from eval import holm

# ----------------------------------------------------------------------------------------------------------
# Simulated experiments
# ----------------------------------------------------------------------------------------------------------


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


def rejections(vuss, y, n_draws=999, at_once=20):
    """The share of tables (n, I, J) whose primary test has p < .05."""
    orders = overlap.draw_orders(n_draws, *y.shape[1:])
    p_values = []
    for start in range(0, len(y), at_once):
        measure = overlap.double_centre(vuss[start : start + at_once])
        target = overlap.double_centre(y[start : start + at_once])
        p_values.append(overlap.permutation_test(overlap.correlation, measure, target, orders)[1])
    return (np.concatenate(p_values) < 0.05).mean()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 6), (6, 4)])
def test_without_an_effect_the_primary_test_keeps_its_size_and_the_pooled_correlation_does_not(shape):
    vuss, y = simulate(2000, *shape, true_r=0)
    assert 0.03 <= rejections(vuss, y) <= 0.07
    pooled = [overlap.pooled_spearman(vuss[i], y[i])[1] for i in range(200)]
    assert np.mean(np.array(pooled) < 0.05) > 0.9


def test_power():
    """.97 at a true .6; and the detectable r has about the power that the verdict says."""
    vuss, y = simulate(400, 8, 6, true_r=0.6)
    assert rejections(vuss, y) > 0.9
    for shape in ((8, 6), (6, 4), (4, 4)):
        vuss, y = simulate(400, *shape, true_r=overlap.detectable_r(*shape))
        assert 0.75 <= rejections(vuss, y) <= 0.9


def test_detectable_r_by_hand():
    assert overlap.detectable_r(8, 6) == pytest.approx(math.tanh(2.8015852 / math.sqrt(33)), abs=1e-7)
    assert overlap.detectable_r(3, 3) == pytest.approx(math.tanh(2.8015852 / math.sqrt(2)), abs=1e-7)


# ----------------------------------------------------------------------------------------------------------
# Association
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair():
    """A measure and y, 5 students × 4 teachers, with ties in the measure."""
    rng = np.random.default_rng(3)
    measure = rng.integers(4, size=(5, 4)).astype(float)
    y = 0.3 * measure + rng.normal(size=(5, 4))
    return measure, y


def test_double_centring_by_hand():
    table = np.array([[1.0, 2.0], [3.0, 8.0]])
    assert overlap.double_centre(table).tolist() == [[1, -1], [-1, 1]]
    assert overlap.double_centre(np.stack([table, 3 * table]))[1].tolist() == [[3, -3], [-3, 3]]


def test_what_belongs_to_one_model_is_removed_to_the_last_bit():
    table = np.array([[0.1], [0.7], [1e3]]) + np.array([0.3, 1 / 3, 7.7])
    centred = overlap.double_centre(table)
    assert not centred.any()
    assert np.isnan(overlap.correlation(centred, np.eye(3)))


def test_permutation_test_is_the_loop_over_all_orders():
    """3 × 3: all 36 orders in plain Python, and drawn ones near their share."""
    rng = np.random.default_rng(1)
    measure = overlap.double_centre(rng.normal(size=(3, 3)))
    y = overlap.double_centre(measure + rng.normal(size=(3, 3)))
    orders = list(itertools.permutations(range(3)))

    def r_of(rows, columns):
        values = [(measure[rows[i], columns[j]], y[i, j]) for i in range(3) for j in range(3)]
        return np.corrcoef(np.transpose(values))[0, 1]

    r = r_of((0, 1, 2), (0, 1, 2))
    row_orders, column_orders = zip(*itertools.product(orders, orders))
    drawn = [r_of(rows, columns) for rows, columns in zip(row_orders, column_orders)]
    count = sum(abs(value) >= abs(r) - 1e-9 for value in drawn)
    assert 1 < count < 20

    all_orders = (np.array(row_orders), np.array(column_orders))
    value, p = overlap.permutation_test(overlap.correlation, measure, y, all_orders, chunk=7)
    assert value == pytest.approx(r)
    assert p == (count + 1) / 37

    _, p = overlap.permutation_test(overlap.correlation, measure, y, overlap.draw_orders(9999, 3, 3))
    share = count / 36
    assert p == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 9999))
    assert round(p * 10_000, 6).is_integer()


def test_many_tables_at_once_are_as_one_by_one():
    vuss, y = simulate(5, 4, 3, true_r=0.5)
    orders = overlap.draw_orders(99, 4, 3)
    for statistic in (overlap.correlation, overlap.mean_kendall):
        values, p_values = overlap.permutation_test(statistic, vuss, y, orders)
        for i in range(5):
            value, p = overlap.permutation_test(statistic, vuss[i], y[i], orders)
            assert (value, p) == (pytest.approx(values[i]), p_values[i])


def test_orders_are_permutations_and_the_same_each_time():
    row_orders, column_orders = overlap.draw_orders(50, 5, 4)
    assert (np.sort(row_orders, axis=1) == np.arange(5)).all()
    assert (np.sort(column_orders, axis=1) == np.arange(4)).all()
    assert len(np.unique(row_orders, axis=0)) > 20
    assert (overlap.draw_orders(50, 5, 4)[0] == row_orders).all()


def test_mean_kendall_is_scipys(pair):
    measure, y = pair
    rows = [scipy.stats.kendalltau(measure[i], y[i]).statistic for i in range(5)]
    assert overlap.mean_kendall(measure, y) == pytest.approx(np.mean(rows))
    columns = [scipy.stats.kendalltau(measure[:, j], y[:, j]).statistic for j in range(4)]
    assert overlap.mean_kendall(measure.T, y.T) == pytest.approx(np.mean(columns))


def test_a_row_of_ties_counts_as_no_order():
    measure = np.array([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
    y = np.array([[2.0, 4.0, 9.0], [1.0, 2.0, 3.0]])
    assert overlap.mean_kendall(measure, y) == pytest.approx(0.5)


def test_partial_spearman_by_the_inverse_of_the_rank_correlations(pair):
    measure, y = pair
    before = np.array([0.3, 1.0, 0.2, 0.7, 0.7])
    teacher_errors = np.array([0.4, 0.1, 0.9, 0.2])
    columns = [measure.ravel(), y.ravel(), np.repeat(before, 4), np.tile(teacher_errors, 5)]
    ranks = [scipy.stats.rankdata(column) for column in columns]
    inverse = np.linalg.inv(np.corrcoef(ranks))
    partial = -inverse[0, 1] / math.sqrt(inverse[0, 0] * inverse[1, 1])

    residuals = [overlap.rank_residuals(table, before, teacher_errors) for table in (measure, y)]
    assert overlap.correlation(*residuals) == pytest.approx(partial)


def test_a_measure_that_is_an_error_has_no_partial_correlation():
    before = np.array([0.3, 1.0, 0.2])
    table = np.repeat(before[:, None], 4, axis=1)
    assert not overlap.rank_residuals(table, before, np.array([0.4, 0.1, 0.9, 0.2])).any()


def test_noise_ceiling_by_hand():
    """ỹ = ±1 in a 2 × 2 table: s² = 1, and (I−1)(J−1)/(IJ) = 1/4."""
    y = np.array([[1.0, 2.0], [3.0, 8.0]])
    assert overlap.noise_ceiling(y, 0.76) == pytest.approx(0.9)
    assert overlap.noise_ceiling(y, 4.0) is None
    assert overlap.noise_ceiling(y, None) is None
    assert overlap.noise_ceiling(np.ones((3, 3)), 0.1) is None


# ----------------------------------------------------------------------------------------------------------
# Prediction
# ----------------------------------------------------------------------------------------------------------


def test_ridge_is_least_squares_with_rows_for_the_penalty():
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(12, 3)) * [1, 5, 0.1] + [3, 0, 40]
    y = columns @ [1.0, 0.2, 3.0] + rng.normal(size=12)
    groups = np.repeat(np.arange(3), 4)
    predicted = overlap.left_out_ridge(columns, y, groups, penalty=2.0)
    for group in range(3):
        seen = columns[groups != group]
        seen_y = y[groups != group]
        Z = (seen - seen.mean(axis=0)) / seen.std(axis=0)
        rows = np.concatenate([Z, math.sqrt(2.0) * np.eye(3)])
        targets = np.concatenate([seen_y - seen_y.mean(), np.zeros(3)])
        beta = np.linalg.lstsq(rows, targets, rcond=None)[0]
        new = (columns[groups == group] - seen.mean(axis=0)) / seen.std(axis=0)
        np.testing.assert_allclose(predicted[groups == group], seen_y.mean() + new @ beta)


def test_a_constant_column_changes_no_prediction():
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(12, 2))
    y = columns.sum(axis=1)
    groups = np.repeat(np.arange(3), 4)
    constant = np.where(groups == 2, 7.0, 0.1)[:, None]  # constant while group 2 is left out
    predicted = overlap.left_out_ridge(np.concatenate([columns, constant], axis=1), y, groups)
    expected = overlap.left_out_ridge(columns, y, groups)
    np.testing.assert_allclose(predicted[groups == 2], expected[groups == 2])


def test_jackknife_of_the_improvement_by_hand():
    """Three groups of one cell: θ = √(14/3) − √1; without a group √(13/2), √(10/2), √(5/2), each − 1."""
    squares = np.array([1.0, 4.0, 9.0])
    value, low, high = overlap.jackknife_improvement(squares, np.ones(3), np.arange(3))
    theta = math.sqrt(14 / 3)
    variance = sum((math.sqrt(half) - theta) ** 2 for half in (6.5, 5.0, 2.5)) * 2 / 3
    half_width = 4.30265273 * math.sqrt(variance)  # t_.975(2)
    assert value == pytest.approx(theta - 1)
    assert (low, high) == (pytest.approx(theta - 1 - half_width), pytest.approx(theta - 1 + half_width))


def test_predictions_leave_out_whole_students_or_teachers():
    """A table where only the measure knows y: it helps for new students and for new teachers."""
    vuss, y = simulate(1, 6, 5, true_r=1)
    table = {"y": y[0], "before": np.arange(6.0), "teacher_errors": np.arange(5.0)}
    for axis, groups in ((0, np.repeat(np.arange(6), 5)), (1, np.tile(np.arange(5), 6))):
        figures = overlap.predictions(table, vuss[0], axis)
        columns = np.stack([np.repeat(np.arange(6.0), 5), np.tile(np.arange(5.0), 6)], axis=1)
        predicted = overlap.left_out_ridge(columns, y[0].ravel(), groups)
        error_without = np.sqrt(((predicted - y[0].ravel()) ** 2).mean())
        assert figures["error_without"] == pytest.approx(error_without)
        assert figures["improvement"] == pytest.approx(error_without - figures["error"])
        assert 0 < figures["low"] < figures["improvement"] < figures["high"]


def test_regret_by_hand():
    """The second student's lowest score is shared by two teachers, 0 and 1 above the best."""
    y = np.array([[1.0, 2.0, 5.0], [4.0, 3.0, 9.0]])
    score = np.array([[7.0, 6.0, 8.0], [2.0, 2.0, 3.0]])
    assert overlap.regret(y, score) == pytest.approx((1 + 0.5) / 2)
    assert overlap.regret(y, y) == 0


# ----------------------------------------------------------------------------------------------------------
# The whole analysis
# ----------------------------------------------------------------------------------------------------------


def table_of(vuss, y, **measures):
    """A table as `read_table` returns it, where both errors are noisy signs of strength."""
    rng = np.random.default_rng(7)
    return {
        "students": [f"s{i}" for i in range(len(y))],
        "teachers": [f"t{j}" for j in range(y.shape[1])],
        "sets": ["a"],
        "primary": "vuss",
        "expected_sign": {"vuss": 1, "overlap_ratio": -1},
        "seed": 0,
        "n_further": 0,
        "measures": {"vuss": vuss, **measures},
        "y": y,
        "before": y.mean(axis=1) + 0.05 * rng.normal(size=len(y)),
        "teacher_errors": y.mean(axis=0) + 0.05 * rng.normal(size=y.shape[1]),
        "seed_variance": None,
    }


def test_verdict_with_an_effect():
    vuss, y = simulate(1, 8, 6, true_r=0.95)
    result = overlap.analyse(table_of(vuss[0], y[0]))
    assert result["p"] == result["smallest_p"] == 1e-4
    assert result["verdict"] == "VUSS adds information beyond error rates"

    result = overlap.analyse(table_of(-vuss[0], y[0]))
    assert result["r"] < -0.9
    assert result["verdict"].endswith("but with the sign opposite to the expected one")


def test_verdict_needs_both_the_primary_test_and_the_prediction_for_new_teachers():
    vuss, y = simulate(1, 8, 6, true_r=0.95)
    result = overlap.analyse(table_of(vuss[0], y[0]))
    power = "by 8 × 6 cells the primary test detects a true r of 0.45 with 80 % power"

    weak = {**result, "p": 0.05}
    assert overlap.verdict(weak, 8, 6) == f"no evidence at this size (primary p 0.0500); {power}"
    useless = copy.deepcopy(result)
    useless["measures"]["vuss"]["new_teacher"]["low"] = 0.0
    reason = "primary p 0.0001, but the improvement for new teachers may be 0"
    assert overlap.verdict(useless, 8, 6) == f"no evidence at this size ({reason}); {power}"


def test_without_an_effect_there_is_no_evidence():
    vuss, y = simulate(1, 6, 4, true_r=0)
    result = overlap.analyse(table_of(vuss[0], y[0]))
    assert result["pooled_spearman"] > 0.5
    assert result["verdict"].startswith("no evidence at this size (primary p 0.")
    assert "by 6 × 4 cells" in result["verdict"]


@pytest.mark.slow
def test_without_an_effect_partial_spearman_errs_and_the_verdict_does_not(monkeypatch):
    """Errors are noisy signs of strength; what they miss of it drives measure and error after."""
    monkeypatch.setattr(overlap, "DRAWS", 199)
    vuss, y = simulate(100, 8, 6, true_r=0)
    results = [overlap.analyse(table_of(vuss[i], y[i])) for i in range(100)]
    partial = [result["measures"]["vuss"]["partial_p"] < 0.05 for result in results]
    claims = [result["verdict"].startswith("VUSS adds") for result in results]
    assert np.mean(partial) > 0.2
    assert np.mean(claims) <= 0.05


def test_secondary_p_values_go_through_holm():
    """The overlap ratio says what VUSS says, with the other sign; the primary r is not in the family."""
    vuss, y = simulate(1, 5, 4, true_r=0.4)
    noise = np.random.default_rng(0).normal(size=(5, 4))
    table = table_of(vuss[0], y[0], overlap_ratio=2 - vuss[0] / 32, noise=noise)
    result = overlap.analyse(table)
    measures = result["measures"]
    for key in ("partial", "tau_teachers", "tau_students"):
        p_values = [measures[name][f"{key}_p"] for name in measures]
        assert [measures[name][f"{key}_p_holm"] for name in measures] == holm(p_values)
        assert measures["overlap_ratio"][key] == pytest.approx(-measures["vuss"][key])
        assert measures["overlap_ratio"][f"{key}_p"] == measures["vuss"][f"{key}_p"]
    assert measures["vuss"]["r_p_holm"] is None
    others = ["overlap_ratio", "noise"]
    assert [measures[name]["r_p_holm"] for name in others] == holm([measures[name]["r_p"] for name in others])
    assert result["p"] == measures["vuss"]["r_p"] == measures["overlap_ratio"]["r_p"]

    assert measures["overlap_ratio"]["regret"] == measures["vuss"]["regret"] == overlap.regret(y[0], vuss[0])
    assert measures["noise"]["regret"] is None  # no expected sign, so no choice


def test_figures_are_those_of_the_functions():
    vuss, y = simulate(1, 5, 4, true_r=0.4)
    table = table_of(vuss[0], y[0])
    table["seed_variance"] = 0.001
    result = overlap.analyse(table)
    own = result["measures"]["vuss"]
    orders = overlap.draw_orders(9999, 5, 4)
    swapped_orders = overlap.draw_orders(9999, 5, 4)[::-1]
    _, p = overlap.permutation_test(overlap.mean_kendall, vuss[0], y[0], orders)
    assert (own["tau_teachers"], own["tau_teachers_p"]) == (overlap.mean_kendall(vuss[0], y[0]), p)
    _, p = overlap.permutation_test(overlap.mean_kendall, vuss[0].T, y[0].T, swapped_orders)
    assert (own["tau_students"], own["tau_students_p"]) == (overlap.mean_kendall(vuss[0].T, y[0].T), p)
    centred = [overlap.double_centre(values[0]) for values in (vuss, y)]
    assert result["r"] == overlap.correlation(*centred)
    assert result["r"] == pytest.approx(np.corrcoef(centred[0].ravel(), centred[1].ravel())[0, 1])
    assert own["new_student"] == overlap.predictions(table, vuss[0], 0)
    assert own["new_teacher"] == overlap.predictions(table, vuss[0], 1)
    assert result["noise_ceiling"] == overlap.noise_ceiling(y[0], 0.001)
    lowest = table["teacher_errors"].argmin()
    assert result["regret_lowest_error"] == pytest.approx((y[0][:, lowest] - y[0].min(axis=1)).mean())


def test_a_table_that_is_too_small_has_no_test():
    vuss, y = simulate(1, 2, 6, true_r=1)
    verdict = "no test: 2 student(s) × 6 teacher(s); a test needs 3 × 3 or more"
    assert overlap.analyse(table_of(vuss[0], y[0])) == {"verdict": verdict}
    assert overlap.smallest_p(3, 3) == pytest.approx(1 / 36)
    assert overlap.smallest_p(8, 6) == 1e-4


@pytest.mark.parametrize("measure", [np.full((4, 3), 64.0), np.add.outer(np.arange(4.0), [0.1, 0.2, 0.7])])
def test_a_measure_that_knows_nothing_of_pairs_has_no_test(measure):
    _, y = simulate(1, 4, 3, true_r=0)
    result = overlap.analyse(table_of(measure, y[0]))
    assert result["r"] is None and result["p"] is None
    expected = "no test: VUSS or the error after has nothing that belongs to a pair of models"
    assert result["verdict"] == expected


# ----------------------------------------------------------------------------------------------------------
# The file
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def content():
    """3 × 3 cells with seeds 1 and 2, and 0 in the first cell only. Seeds differ by e^0.2 in one set."""
    cells = []
    for i, student in enumerate(("a-small", "b-base", "c-large")):
        for j, teacher in enumerate(("a-near", "b-far", "c-odd")):
            for seed in (2, 1):
                cells.append(
                    {
                        "student": student,
                        "teacher": teacher,
                        "seed": seed,
                        "measures": {"vuss": 40.0 + 3 * i + (i - j) ** 2, "jaccard": 0.5 - 0.1 * i * j},
                        "before": {"en": 20.0 - i, "zh": 10.0},
                        "teacher_errors": {"en": 4.0, "zh": 9.0 + j},
                        "after": {"en": 8.0 + i + j + i * j, "zh": 2.0 * math.exp(0.2 * (seed - 1))},
                    }
                )
    cells.append({**cells[0], "seed": 0})
    return {"cells": cells}


def write(tmp_path, content):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def test_read_table(tmp_path, content):
    table = overlap.read_table(write(tmp_path, content))
    assert table["students"] == ["a-small", "b-base", "c-large"]
    assert table["teachers"] == ["a-near", "b-far", "c-odd"]
    assert (table["seed"], table["n_further"], table["sets"]) == (1, 10, ["en", "zh"])
    signs = table["expected_sign"]
    assert (table["primary"], signs["vuss"], signs["jaccard"]) == ("vuss", 1, -1)
    assert table["measures"]["vuss"].tolist() == [[40, 41, 44], [44, 43, 44], [50, 47, 46]]
    assert table["measures"]["jaccard"][2].tolist() == pytest.approx([0.5, 0.3, 0.1])
    assert table["y"][2].tolist() == pytest.approx([math.log(math.sqrt(2 * en)) for en in (10, 13, 16)])
    assert table["before"].tolist() == pytest.approx([math.log(math.sqrt(10 * en)) for en in (20, 19, 18)])
    assert table["teacher_errors"].tolist() == pytest.approx(
        [math.log(math.sqrt(4 * zh)) for zh in (9, 10, 11)]
    )

    # Seeds 1 and 2 are 0.1 apart in y: 0.005 a cell; seed 0 of the first cell is as its seed 2.
    first = 0.1**2 * 2 / 3
    assert table["seed_variance"] == pytest.approx((8 * 0.005 + first) / (8 + 2))


def test_the_order_of_the_cells_changes_nothing(tmp_path, content):
    analysis = overlap.analyse(overlap.read_table(write(tmp_path, content)))
    content["cells"].reverse()
    assert overlap.analyse(overlap.read_table(write(tmp_path, content))) == analysis


def test_without_a_second_seed_the_seed_variance_is_not_known(tmp_path, content):
    content["cells"] = [cell for cell in content["cells"] if cell["seed"] == 2]
    table = overlap.read_table(write(tmp_path, content))
    assert (table["seed"], table["n_further"], table["seed_variance"]) == (2, 0, None)


def test_the_file_declares_the_primary_measure_and_signs(tmp_path, content):
    content["primary"] = "jaccard"
    content["expected_sign"] = {"jaccard": 1}
    table = overlap.read_table(write(tmp_path, content))
    assert table["primary"] == "jaccard"
    assert (table["expected_sign"]["jaccard"], table["expected_sign"]["vuss"]) == (1, 1)


def test_the_command_prints_the_verdict_and_every_table(tmp_path, content, capsys):
    overlap.main(overlap.parse_args(["--validate", write(tmp_path, content)]))
    out = capsys.readouterr().out
    assert "3 students × 3 teachers, one run each (seed 1), 10 of further seeds; sets: en, zh" in out
    assert "primary: vuss, expected r > 0 (lower vuss, more gain, lower error after)" in out
    assert "(the smallest possible p is about 0.0278)" in out
    assert "It validates nothing." in out
    assert out.rstrip().split("\n")[-1].startswith("verdict: no evidence at this size (primary p 0.")
    table = overlap.read_table(write(tmp_path, content))
    result = overlap.analyse(table)
    rows = [line.split() for line in out.split("\n") if line.startswith("jaccard")]
    figures = result["measures"]["jaccard"]
    assert rows[0][1:4] == ["−", f"{figures['r']:.2f}", f"{figures['r_p_holm']:.4f}"]
    assert rows[1][1:3] == [f"{figures['new_student'][key]:.4f}" for key in ("error", "improvement")]
    assert rows[1][-1] == f"{100 * math.expm1(figures['regret']):.1f}"


def test_the_command_says_that_a_table_is_too_small(tmp_path, content, capsys):
    content["cells"] = [cell for cell in content["cells"] if cell["teacher"] != "c-odd"]
    overlap.validate(write(tmp_path, content))
    assert "no test: 3 student(s) × 2 teacher(s); a test needs 3 × 3 or more" in capsys.readouterr().out


def change(key, value):
    """A defect: the last cell's `key` becomes `value`, or goes where that is None."""

    def apply(content):
        cell = content["cells"][-1] = copy.deepcopy(content["cells"][-1])
        cell[key] = value
        if value is None:
            del cell[key]

    return apply


def drop_pair(content):
    content["cells"] = [
        cell for cell in content["cells"] if (cell["student"], cell["teacher"]) != ("b-base", "c-odd")
    ]


def part_seeds(content):
    content["cells"] = [cell for i, cell in enumerate(content["cells"]) if i not in (0, 3)]


DEFECTS = {
    "no pair": (drop_pair, "no run of student b-base with teacher c-odd; add it"),
    "no common seed": (part_seeds, "no seed has a run in every cell; run one seed"),
    "twice": (change("seed", 1), "cell 19: student a-small with teacher a-near, seed 1 is there twice"),
    "no key": (change("after", None), 'cell 19: key "after" is missing'),
    "true": (change("seed", True), 'cell 19: "seed" must be a whole number, found true'),
    "no name": (change("student", ""), 'cell 19: "student" must be a name, found ""'),
    "no set": (change("after", {}), 'cell 19: "after" must be an object with numbers, found {}'),
    "zero": (
        change("after", {"en": 0, "zh": 2.0}),
        'cell 19: "after" of en is 0, which has no logarithm; leave',
    ),
    "NaN": (change("measures", {"vuss": math.nan, "jaccard": 1}), '"measures" of vuss is NaN; give a finite'),
    "text": (change("before", {"en": "20", "zh": 10.0}), '"before" of en is "20"; give a finite number'),
    "measure": (change("measures", {"vuss": 1}), 'cell 19: "measures" lacks jaccard; all cells'),
    "set": (change("before", {"en": 1, "zh": 1, "yue": 1}), 'cell 19: "before" alone has yue; all cells'),
    "base": (change("before", {"en": 21, "zh": 10.0}), '"before" of student a-small differs between cells'),
    "teacher": (change("teacher_errors", {"en": 5, "zh": 9.0}), '"teacher_errors" of teacher a-near differs'),
    "no cells": (lambda content: content.update(cells=[]), 'has no list "cells"; give one object'),
    "no object": (lambda content: content.update(cells=[1]), "cell 1: expected an object, found int"),
    "primary": (lambda content: content.update(primary="x"), 'primary measure "x" is not in "measures"'),
    "sign": (
        lambda content: content.update(expected_sign={"vuss": 2}),
        '"expected_sign" is {"vuss": 2}; give 1',
    ),
    "sign of none": (
        lambda content: content.update(expected_sign={"x": 1}),
        "give 1 or -1 for measures of the",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_of_the_file_is_one_line_with_a_remedy(tmp_path, content, defect):
    apply, message = DEFECTS[defect]
    apply(content)
    path = write(tmp_path, content)
    with pytest.raises(InputError) as raised:
        overlap.validate(path)
    assert message in str(raised.value)
    assert str(raised.value).startswith(path)


def test_a_primary_measure_without_a_known_sign_needs_one(tmp_path, content):
    for cell in content["cells"]:
        cell["measures"] = {"mine": cell["measures"]["vuss"]}
    content["primary"] = "mine"
    with pytest.raises(InputError, match='no sign for the primary measure "mine"; state 1'):
        overlap.validate(write(tmp_path, content))


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="No such file or directory; give the path of a table"):
        overlap.validate(str(tmp_path / "none.json"))
    broken = tmp_path / "broken.json"
    broken.write_text('{"cells": [', encoding="utf-8")
    with pytest.raises(InputError, match="broken.json: not JSON .*; give one object"):
        overlap.validate(str(broken))
