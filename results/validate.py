"""Does a measure of overlap, taken before OPD, predict what OPD gains, beyond the errors of both models?

    python -m results.validate table.json

A correlation over many pairs of models does not answer that: strong models agree more and also end with fewer
errors. Where agreement has no effect at all, such a correlation still has p < .05 in 97 to 100 % of simulated
tables. So the answer comes from a table of students × teachers, at least 3 × 3, with one run of OPD a pair,
all with the same steps and the same order of clips. The measures are those of `overlap.py --states student`
on a development set before OPD. Name the primary measure and its sign before you look. Include a teacher that
writes in another style (few errors, little overlap) and one that is nearly the student (the reverse).

    {"primary": "vuss",
     "cells": [
      {"student": "base", "teacher": "large", "seed": 0,
       "measures": {"vuss": 52.1, "kl_full": 0.31},
       "before": {"en-clean": 7.2, "zh-read": 9.0},
       "teacher_errors": {"en-clean": 3.1, "zh-read": 4.4},
       "after": {"en-clean": 5.9, "zh-read": 7.5}}]}

before, teacher_errors and after are errors in % of the student before OPD, the teacher, and the student
after, on the same sets. Runs of further seeds only show how much a seed changes. Leave out measures that
repeat another one: each costs power in Holm's correction. "expected_sign": {"mine": 1} gives a sign to a
measure that has none below.

The verdict claims information only if the primary p is below .05 and the prediction for new teachers improves
with its whole interval. That is strict: with a true r of .6 and 8 × 6 pairs it was so in 36 % of simulated
tables, and without an effect in none of 400. The functions define the other figures. The partial correlation
and both τ are driven by strength too: without an effect the first has p < .05 in 31 to 48 %.
"""

import collections
import math

import numpy as np
import scipy.stats

import data
import eval

DRAWS = 9_999  # permutations of a p-value

# Student and teacher are close where these measures are low, or high. Close pairs should gain more.
LOW_IS_CLOSE = ["vuss", "vuss_1", "vuss_2", "vuss_4", "vuss_8", "vuss_16", "vuss_32"]
LOW_IS_CLOSE += ["entropy_gap", "kl_union", "kl_full", "error_between"]
HIGH_IS_CLOSE = ["overlap_ratio", "jaccard", "top1", "mass_student", "mass_teacher", "advantage"]
HIGH_IS_CLOSE += ["teacher_logp", "token_agreement", "trigram_f1"]

# The expected sign of r. Lower VUSS, more gain, lower error after: r > 0.
EXPECTED_SIGN = {**dict.fromkeys(LOW_IS_CLOSE, 1), **dict.fromkeys(HIGH_IS_CLOSE, -1)}


def parse_args(argv=None):
    parser = data.argument_parser("python -m results.validate", __doc__)
    parser.add_argument("table", metavar="table.json", help="the runs, one a cell")
    return parser.parse_args(argv)


def main(args):
    table = table_of(data.read_json(args.table))
    result = analyse(table)
    n_students, n_teachers = table["y"].shape
    print(f"{n_students} students × {n_teachers} teachers, seed {table['seed']}")
    print(f"\ncorrelations with ln(error after); p of r of {result['primary']} as it is, others Holm's")
    header, rows = association_rows(result)
    eval.print_table(rows, header)
    print("\nerror of a prediction of ln(error after) for a new student or teacher, root mean square")
    header, rows = prediction_rows(result)
    eval.print_table(rows, header)
    print(f"\n{conclusion(result)}")


def table_of(content):
    """Runs as tables of I students (rows) × J teachers (columns), both sorted by name.

    content: what the JSON file holds. A cell's run is that of the lowest seed that is in every cell. → dict:

    - students, teachers (names), seed, primary (a measure), expected_sign {measure: 1 or −1};
    - measures {name: (I, J)}, y (I, J): mean over the sets of ln(error after);
    - before (I,) and teacher_errors (J,), likewise;
    - seed_variance: of y between the seeds of a cell, pooled over cells; NaN without a second seed.
    """
    runs = {}  # (student, teacher) → {seed: cell}
    before = {}  # student → its errors; they are measured once
    teacher_errors = {}  # teacher → likewise
    for cell in content["cells"]:
        student = cell["student"]
        teacher = cell["teacher"]
        by_seed = runs.setdefault((student, teacher), {})
        assert cell["seed"] not in by_seed, f"a run is there twice: {cell}"
        by_seed[cell["seed"]] = cell
        before.setdefault(student, cell["before"])
        teacher_errors.setdefault(teacher, cell["teacher_errors"])
        assert before[student] == cell["before"], f"two errors of one student: {cell}"
        assert teacher_errors[teacher] == cell["teacher_errors"], f"two errors of one teacher: {cell}"
        for key in ("before", "teacher_errors"):
            assert cell[key].keys() == cell["after"].keys(), f"{key} and after have other sets: {cell}"

    # Sorted, so that the drawn permutations, and with them p, do not depend on the order of the cells.
    students = sorted(before)
    teachers = sorted(teacher_errors)
    seeds = [set(by_seed) for by_seed in runs.values()]
    seed = min(set.intersection(*seeds))
    shape = (len(students), len(teachers))
    measures = {name: np.empty(shape) for name in content["cells"][0]["measures"]}
    y = np.empty(shape)
    for i, student in enumerate(students):
        for j, teacher in enumerate(teachers):
            cell = runs[student, teacher][seed]
            y[i, j] = log_error(cell["after"])
            for name, table in measures.items():
                table[i, j] = cell["measures"][name]
    return {
        "students": students,
        "teachers": teachers,
        "seed": seed,
        "primary": content.get("primary", "vuss"),
        "expected_sign": {**EXPECTED_SIGN, **content.get("expected_sign", {})},
        "measures": measures,
        "y": y,
        "before": np.array([log_error(before[student]) for student in students]),
        "teacher_errors": np.array([log_error(teacher_errors[teacher]) for teacher in teachers]),
        "seed_variance": pooled_variance(runs.values()),
    }


def log_error(errors):
    """Mean over the sets of ln(error). errors: {set: %}."""
    logs = [math.log(value) for value in errors.values()]
    return sum(logs) / len(logs)


def pooled_variance(cells):
    """Variance of y between the seeds of a cell. cells: {seed: run} of each."""
    squares = 0.0
    degrees = 0
    for by_seed in cells:
        values = np.array([log_error(cell["after"]) for cell in by_seed.values()])
        squares += float(((values - values.mean()) ** 2).sum())
        degrees += len(values) - 1
    return squares / degrees if degrees else math.nan


def analyse(table):
    """Whether the measures of a table say more about the error after OPD than the models' own errors do.

    table: of `table_of`. → a dict of plain numbers, NaN where there is nothing to compute:

    - primary, r, p: the primary measure, its correlation with y, both double-centred, and p by permutation;
    - detectable_r, noise_ceiling: how large an r is found, and how large one can be;
    - measures: {name: the figures of `associations`, expected_sign, regret, and the figures of `predictions`
      as new_student and new_teacher};
    - regret_lowest_error: the regret of choosing the teacher with the lowest error;
    - pooled_spearman: over all cells. It validates nothing: strong models have more overlap, fewer errors;
    - verdict: a sentence.
    """
    y = table["y"]
    n_students, n_teachers = y.shape
    assert min(y.shape) >= 3, f"{n_students} student(s) × {n_teachers} teacher(s): a test needs 3 × 3 or more"
    primary = table["primary"]
    measures = associations(table, draw_orders(n_students, n_teachers))
    for name, measure in table["measures"].items():
        sign = table["expected_sign"][name]
        measures[name]["expected_sign"] = sign
        measures[name]["regret"] = regret(y, sign * measure)
        measures[name]["new_student"] = predictions(table, measure, axis=0)
        measures[name]["new_teacher"] = predictions(table, measure, axis=1)

    pooled = scipy.stats.spearmanr(table["measures"][primary].ravel(), y.ravel())
    result = {
        "primary": primary,
        "r": measures[primary]["r"],
        "p": measures[primary]["r_p"],
        "detectable_r": detectable_r(n_students, n_teachers),
        "noise_ceiling": noise_ceiling(y, table["seed_variance"]),
        "measures": measures,
        "regret_lowest_error": regret(y, np.tile(table["teacher_errors"], (n_students, 1))),
        "pooled_spearman": float(pooled.statistic),
    }
    result["verdict"] = verdict(result, n_students, n_teachers)
    return result


def verdict(result, n_students, n_teachers):
    """The sentence that the figures of `analyse` allow."""
    name = shown_name(result["primary"])
    primary = result["measures"][result["primary"]]
    p = result["p"]
    if math.isnan(p):
        return f"no test: {name} or the error after has nothing that belongs to a pair of models"
    if p < 0.05 and primary["new_teacher"]["low"] > 0:
        sentence = f"{name} adds information beyond error rates"
        if result["r"] * primary["expected_sign"] < 0:
            sentence += ", but with the sign opposite to the expected one"
        return sentence

    reason = f"primary p {p:.4f}"
    if p < 0.05:
        reason += ", but the improvement for new teachers may be 0"
    power = f"by {n_students} × {n_teachers} cells the primary test detects"
    power += f" a true r of {result['detectable_r']:.2f} with 80 % power"
    return f"no evidence at this size ({reason}); {power}"


def shown_name(measure):
    return "VUSS" if measure == "vuss" else measure


# ---- association -------------------------------------------------------------------------------------------


def associations(table, orders):
    """Correlates each measure with y over the table, by `orders` of `draw_orders`.

    → {measure: {r, r_p, r_p_holm, and so on for the others}}:

    - r: of the double-centred tables. Holm's p is over the measures but the primary, which has none.
    - partial: Spearman's, given the student's error before and the teacher's error.
    - tau_teachers: mean over the students of Kendall's τ over the teachers: "which teacher?"
    - tau_students: mean over the teachers of Kendall's τ over the students: "is this student ready?"

    Each p is two-sided, by the same permutations of the measure's rows and columns (for `partial`, of its
    residuals), so that cells of one model are not taken for independent ones.
    """
    y = table["y"]
    swapped_orders = orders[::-1]
    y_centred = double_centre(y)
    y_residuals = rank_residuals(y, table["before"], table["teacher_errors"])
    figures = {}
    for name, measure in table["measures"].items():
        residuals = rank_residuals(measure, table["before"], table["teacher_errors"])
        tests = {
            "r": permutation_test(correlation, double_centre(measure), y_centred, orders),
            "partial": permutation_test(correlation, residuals, y_residuals, orders),
            "tau_teachers": permutation_test(mean_kendall, measure, y, orders),
            "tau_students": permutation_test(mean_kendall, measure.T, y.T, swapped_orders),
        }
        figures[name] = {}
        for key, (value, p) in tests.items():
            figures[name][key] = value
            figures[name][f"{key}_p"] = p

    for key in ("r", "partial", "tau_teachers", "tau_students"):
        names = [name for name in figures if key != "r" or name != table["primary"]]
        adjusted = holm([figures[name][f"{key}_p"] for name in names])
        for name, p in zip(names, adjusted):
            figures[name][f"{key}_p_holm"] = p
    return figures


def double_centre(table):
    """m_ij − m̄_i· − m̄_·j + m̄_··, which removes all that belongs to one model alone. (I, J)."""
    row_means = table.mean(axis=1, keepdims=True)
    column_means = table.mean(axis=0)
    centred = table - row_means - column_means + table.mean()
    return centred.round(10)  # so that 0 is left where there is nothing else, not rounding


def correlation(a, b):
    """Σ ab / √(Σa² Σb²) of centred tables (…, I, J) → (…); NaN where one of them is 0."""
    products = (a * b).sum(axis=(-2, -1))
    squares_a = (a**2).sum(axis=(-2, -1))
    squares_b = (b**2).sum(axis=(-2, -1))
    with np.errstate(invalid="ignore"):
        return products / np.sqrt(squares_a * squares_b)


def mean_kendall(a, b):
    """Kendall's τ-b between a row of `a` and the same row of `b`, as the mean over the rows.

    (…, I, J) → (…). A row that orders nothing, because all of it is tied, counts as τ = 0.
    """
    products = pair_signs(a) * pair_signs(b)  # (…, I, J, J)
    return products.sum(axis=(-2, -1)).mean(axis=-1)


def pair_signs(table):
    """Signs of the differences between the values of each row, with norm 1. (…, I, J) → (…, I, J, J)."""
    differences = table[..., :, None] - table[..., None, :]
    signs = np.sign(differences)
    n_untied = np.abs(signs).sum(axis=(-2, -1), keepdims=True)
    return signs / np.sqrt(n_untied.clip(min=1))


def rank_residuals(table, before, teacher_errors):
    """Ranks of a table's cells without their linear part in the ranks of both errors.

    table (I, J), before (I,), teacher_errors (J,) → (I, J). The correlation of two such tables is the partial
    Spearman correlation given the student's error before and the teacher's error.
    """
    n_students, n_teachers = table.shape
    ranks = scipy.stats.rankdata(table)
    columns = [np.ones(table.size)]
    for errors in (np.repeat(before, n_teachers), np.tile(teacher_errors, n_students)):
        columns.append(scipy.stats.rankdata(errors))
    columns = np.stack(columns, axis=1)  # (IJ, 3)
    coefficients = np.linalg.lstsq(columns, ranks)[0]
    residuals = ranks - columns @ coefficients
    return residuals.round(10).reshape(table.shape)


def draw_orders(n_rows, n_columns):
    """Random orders of the rows (DRAWS, n_rows) and of the columns (DRAWS, n_columns), the same each time."""
    rng = np.random.default_rng(0)
    orders = []
    for n in (n_rows, n_columns):
        identities = np.tile(np.arange(n), (DRAWS, 1))
        orders.append(rng.permuted(identities, axis=1))
    return orders


def permutation_test(statistic, measure, y, orders):
    """statistic(measure, y) and its two-sided p when rows and columns of `measure` are put in other orders.

    measure, y: (I, J); orders: (D, I) and (D, J). p = (count + 1) / (D + 1); count: the orders whose
    |statistic| is at least that of the table itself. It cannot be much below 1 / (I! J!).
    """
    value = float(statistic(measure, y))
    if math.isnan(value):
        return value, math.nan
    row_orders, column_orders = orders
    permuted = measure[row_orders[:, :, None], column_orders[:, None, :]]  # (D, I, J)
    drawn = np.abs(statistic(permuted, y))  # (D,)
    # The table's own order comes out again, in other roundings.
    count = (drawn >= abs(value) - 1e-9).sum()
    return value, float((count + 1) / (len(drawn) + 1))


def holm(p_values):
    """Holm's adjusted p of several tests, in the order of `p_values`; a NaN stays NaN and is no test.

    The i-th smallest of m p-values is multiplied by m + 1 − i, is at least its predecessor and at most 1.
    This holds whatever the dependence between the tests (Holm 1979).
    """
    adjusted = [math.nan] * len(p_values)
    tests = [i for i, p in enumerate(p_values) if not math.isnan(p)]
    tests.sort(key=lambda i: p_values[i])
    largest = 0.0
    for rank, i in enumerate(tests):
        factor = len(tests) - rank
        largest = max(largest, factor * p_values[i])
        adjusted[i] = min(1.0, largest)
    return adjusted


def detectable_r(n_students, n_teachers):
    """The true r that the primary test finds at .05 in 80 % of tables, by an approximation.

    tanh((z_.975 + z_.80) / √(n − 3)) is Fisher's for n independent pairs. Double-centring leaves
    (I − 1)(J − 1) degrees of freedom, those of n = (I − 1)(J − 1) + 1 pairs. In simulations the power at this
    r is .81 to .84 from 3 × 4 to 12 × 8 cells, and .71 at 3 × 3, where there are only 36 orders.
    """
    n = (n_students - 1) * (n_teachers - 1) + 1
    z_size, z_power = scipy.stats.norm.ppf([0.975, 0.80])
    return math.tanh((z_size + z_power) / math.sqrt(n - 3))


def noise_ceiling(y, seed_variance):
    """√(1 − s²_seed (I−1)(J−1)/(IJ) / s²(ỹ)), the r of a perfect measure; NaN where that is not above 0.

    s²_seed: the variance of y between seeds of one cell. s²(ỹ): the mean of ỹ² over the cells.
    """
    n_students, n_teachers = y.shape
    n_free = (n_students - 1) * (n_teachers - 1)
    noise = seed_variance * n_free / y.size
    variance = (double_centre(y) ** 2).mean()
    if variance > noise:
        return math.sqrt(1 - noise / variance)
    return math.nan


# ---- prediction --------------------------------------------------------------------------------------------


def predictions(table, measure, axis):
    """How much a measure improves the prediction of y for a student (axis 0) or teacher (1) not seen before.

    A ridge predicts y from both errors, and again from both errors and the measure. → error_without and error
    (root mean squares, in ln), improvement (their difference), and low and high of its 95 % interval, by a
    jackknife over the students or teachers left out. There the predictions stay what they were.
    """
    shape = table["y"].shape
    y = table["y"].ravel()  # (IJ,)
    groups = np.indices(shape)[axis].ravel()  # (IJ,)
    before = np.repeat(table["before"], shape[1])
    teacher_errors = np.tile(table["teacher_errors"], shape[0])
    columns = np.stack([before, teacher_errors, measure.ravel()], axis=1)  # (IJ, 3)
    errors_without = left_out_ridge(columns[:, :2], y, groups) - y
    errors = left_out_ridge(columns, y, groups) - y

    counts = np.stack([errors_without**2, errors**2, np.ones(len(y))], axis=1)  # (IJ, 3)
    sums = {group: counts[groups == group].sum(axis=0) for group in range(shape[axis])}
    figures = eval.estimate(eval.cluster_table([sums]), improvement)
    return {
        "error_without": math.sqrt((errors_without**2).mean()),
        "error": math.sqrt((errors**2).mean()),
        "improvement": float(figures.value),
        "low": float(figures.low),
        "high": float(figures.high),
    }


def improvement(sums):
    """√(Σ squares without / n) − √(Σ squares with / n): (…, 1, 3) → (…)."""
    n = sums[..., 0, 2]
    error_without = np.sqrt(sums[..., 0, 0] / n)
    error = np.sqrt(sums[..., 0, 1] / n)
    return error_without - error


def left_out_ridge(columns, y, groups):
    """Predicts the y of each cell by a ridge that has not seen the cell's group.

    columns (n, c); y, groups (n,) → (n,). The ridge minimises Σ (y − ȳ − Zβ)² + Σ β². Z is the columns,
    standardised over the cells that are seen; a column that is constant there is left out.
    """
    predicted = np.empty_like(y)
    for group in np.unique(groups):
        is_seen = groups != group
        centre = columns[is_seen].mean(axis=0)
        spread = columns[is_seen].std(axis=0)
        spread[spread <= 1e-10 * np.abs(centre)] = np.inf
        Z = (columns - centre) / spread
        seen = Z[is_seen]
        mean = y[is_seen].mean()
        squares = seen.T @ seen + np.eye(columns.shape[1])
        products = seen.T @ (y[is_seen] - mean)
        beta = np.linalg.solve(squares, products)
        predicted[~is_seen] = mean + Z[~is_seen] @ beta
    return predicted


def regret(y, score):
    """ln(error with the teacher of the lowest score / error with the best teacher), mean over the students.

    y, score: (I, J). Where several teachers share the lowest score, it is their mean.
    """
    is_chosen = score == score.min(axis=1, keepdims=True)
    chosen = (y * is_chosen).sum(axis=1) / is_chosen.sum(axis=1)
    return float((chosen - y.min(axis=1)).mean())


# ---- simpler baselines, from clips.jsonl of overlap.py -----------------------------------------------------


def baselines(lines):
    """What a measure of overlap has to beat as a predictor, from the lines of clips.jsonl, which have a text.

    → {error_student: of the student's own transcripts against the text, %; error_between: against the
    teacher's own transcripts, %; token_agreement: 1 − edits of token ids / ids of the longer one; trigram_f1:
    2 × equal runs of three characters / all}. Sums over clips, then one division.
    """
    sums = collections.Counter()
    for line in lines:
        language = eval.language_of(line)
        student = line["student"]
        teacher = line["teacher"]
        against_text = eval.count_errors(line["text"], student, language)
        against_teacher = eval.count_errors(teacher, student, language)
        student_ids = " ".join(map(str, line["student_ids"]))
        teacher_ids = " ".join(map(str, line["teacher_ids"]))
        tokens = eval.count_errors(teacher_ids, student_ids, language=None)  # each id is a word
        student_trigrams = trigrams(student, language)
        teacher_trigrams = trigrams(teacher, language)
        equal_trigrams = student_trigrams & teacher_trigrams
        counts = {
            "errors": against_text["errors"],
            "units": against_text["units"],
            "errors_between": against_teacher["errors"],
            "units_between": against_teacher["units"],
            "token_edits": tokens["errors"],
            "tokens": max(len(line["student_ids"]), len(line["teacher_ids"])),
            "equal_trigrams": equal_trigrams.total(),
            "trigrams": student_trigrams.total() + teacher_trigrams.total(),
        }
        sums.update(counts)
    return {
        "error_student": 100 * sums["errors"] / sums["units"],
        "error_between": 100 * sums["errors_between"] / sums["units_between"],
        "token_agreement": 1 - sums["token_edits"] / sums["tokens"],
        "trigram_f1": 2 * sums["equal_trigrams"] / sums["trigrams"],
    }


def trigrams(text, language):
    """How often each three characters in a row stand in the normalised text; words keep a blank between."""
    separator = "" if language in eval.CHARACTER_LANGUAGES else " "
    text = separator.join(eval.normalize(text, language))
    starts = range(len(text) - 2)
    return collections.Counter(text[i : i + 3] for i in starts)


# ---- the report --------------------------------------------------------------------------------------------


def association_rows(result):
    """→ the header, and a row for each measure: correlations with y, help for new teachers, regret."""
    header = ["measure", "sign", "r", "p", "partial (p)", "τ teachers (p)", "τ students (p)"]
    header += ["new teacher: better by, ln (95 %)", "regret, %"]
    rows = []
    for name, figures in result["measures"].items():
        row = [name]
        row.append("+" if figures["expected_sign"] > 0 else "−")
        row.append(signed(figures["r"]))
        row.append(eval.p_text(figures["r_p" if name == result["primary"] else "r_p_holm"]))
        for key in ("partial", "tau_teachers", "tau_students"):
            p = eval.p_text(figures[f"{key}_p_holm"])
            row.append(f"{signed(figures[key])} ({p})")
        row.append(better_by(figures["new_teacher"]))
        row.append(regret_cell(figures["regret"]))
        rows.append(row)
    errors_only = ["errors only", *[""] * (len(header) - 2)]
    errors_only.append(regret_cell(result["regret_lowest_error"]))
    rows.append(errors_only)
    return header, rows


def prediction_rows(result):
    """→ the header, and a row for the errors alone and for each measure: errors of prediction, in ln."""
    header = ["measure", "new student", "better by (95 %)", "new teacher", "better by (95 %)"]
    primary = result["measures"][result["primary"]]
    errors_only = ["errors only"]
    for key in ("new_student", "new_teacher"):
        errors_only.append(f"{primary[key]['error_without']:.3f}")
        errors_only.append("")
    rows = [errors_only]
    for name, figures in result["measures"].items():
        row = [name]
        for key in ("new_student", "new_teacher"):
            row.append(f"{figures[key]['error']:.3f}")
            row.append(better_by(figures[key]))
        rows.append(row)
    return header, rows


def conclusion(result):
    """The figures of the whole table, and the verdict."""
    ceiling = result["noise_ceiling"]
    ceiling = "not known" if math.isnan(ceiling) else f"{ceiling:.2f}"
    pooled = f"pooled Spearman of {shown_name(result['primary'])}, which validates nothing"
    pooled += f": {result['pooled_spearman']:.2f}"
    return f"Noise ceiling of r: {ceiling}; {pooled}. Verdict: *{result['verdict']}*."


def better_by(figures):
    """The improvement of `predictions` with its interval."""
    low = signed(figures["low"], 3)
    high = signed(figures["high"], 3)
    return f"{signed(figures['improvement'], 3)} ({low} to {high})"


def regret_cell(log_ratio):
    return f"{eval.percent(log_ratio):.1f}"


def signed(value, places=2):
    if math.isnan(value):
        return "–"
    text = f"{value:+.{places}f}"
    return text.replace("-", "−")


if __name__ == "__main__":
    data.run_script(main, parse_args())
