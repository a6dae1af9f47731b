"""Compares two recipes, each trained with one or several seeds, by their evaluations.

    python -m results.seeds runs/a0 runs/a1 runs/a2 --against runs/b0 runs/b1 runs/b2 --json seeds.json

The first runs are those of recipe A, the others those of recipe B. A run is a folder of opd.py or sft.py, of
which the newest evaluation is read, or a folder of result files. Prints the rates of every run, and the
relative change from A to B, the mean over runs, with three spreads:

seed sd    how far would a rerun with another seed differ on this set?
cluster    how far would these checkpoints differ on other speakers?
total      does the recipe differ, with other speakers and other seeds?
"""

import os
import re

import numpy as np

import data
import eval


def parse_args(argv=None):
    parser = data.argument_parser("python -m results.seeds", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="A", help="folders of recipe A, one for each seed")
    add("--against", nargs="+", required=True, metavar="B", help="folders of recipe B")
    add("--normalizer", choices=["default", "paper"], default="default", help="as in eval.py")
    add("--cluster", metavar="KEY", help="as in eval.py")
    add("--json", metavar="FILE", help="store the figures")
    return parser.parse_args(argv)


def main(args):
    scoring = {"style": args.normalizer, "cluster": args.cluster}
    comparison = compare_seeds(args.runs, args.against, **scoring)
    print_seeds(comparison)
    if args.json:
        data.write_json(args.json, comparison)


# ---- runs --------------------------------------------------------------------------------------------------


def evaluation_of(folder):
    """(folder of result files, seed of its run or None) of a run folder or an evaluation of a run."""
    folder = os.path.abspath(folder)
    run = os.path.dirname(folder)
    config_path = os.path.join(folder, "config.json")
    if os.path.exists(config_path) and data.read_json(config_path).get("script") != "eval.py":
        run = folder
        steps = [re.fullmatch(r"eval-(\d+)", name) for name in os.listdir(run)]
        newest = max((int(match[1]) for match in steps if match), default=None)
        if newest is None:
            raise data.InputError(f"{run}: this run has no evaluation (eval-N); train with --eval")
        folder = os.path.join(run, f"eval-{newest}")
    config_path = os.path.join(run, "config.json")
    config = data.read_json(config_path) if os.path.exists(config_path) else {}
    return folder, config.get("args", {}).get("seed")


def compare_seeds(runs_a, runs_b, style="default", cluster=None):
    """Compares two recipes, as a dict.

    → paired; seeds_a, seeds_b, folders_a and folders_b of the runs; sets: {stem: metric, n clips, the rates a
    and b of every run, and `figures_of` the set}; macro: the stems with two clusters or more, and
    `figures_of` all of them.

    Runs are paired where both sides have the same seeds, each once. Raises InputError where a folder is given
    twice, runs stand at different steps, or the folders do not hold the same sets (`eval.count_set`).
    """
    side_a = [evaluation_of(run) for run in runs_a]
    side_b = [evaluation_of(run) for run in runs_b]
    is_paired = can_be_paired([seed for _, seed in side_a], [seed for _, seed in side_b])
    if is_paired:  # the same order on both sides
        side_a.sort(key=lambda run: run[1])
        side_b.sort(key=lambda run: run[1])
    folders = [folder for folder, _ in side_a + side_b]
    check_folders([*runs_a, *runs_b], folders)

    n_a = len(side_a)
    counted = {}
    sets = {}
    for stem in eval.result_stems(folders[0]):
        paths = [os.path.join(folder, f"{stem}.jsonl") for folder in folders]
        counted[stem] = eval.count_set(paths, style, cluster)
        *errors, units = sum(counted[stem].sums.values()).tolist()
        rates = [100 * n / units for n in errors]
        sets[stem] = {"metric": counted[stem].metric, "n": counted[stem].n}
        sets[stem] |= {"a": rates[:n_a], "b": rates[n_a:]}
        sets[stem] |= figures_of([counted[stem]], n_a, is_paired)
    stems = [stem for stem in sets if sets[stem]["clusters"] > 1]
    macro = {"stems": stems}
    if stems:
        macro |= figures_of([counted[stem] for stem in stems], n_a, is_paired)
    return {
        "paired": is_paired,
        "seeds_a": [seed for _, seed in side_a],
        "seeds_b": [seed for _, seed in side_b],
        "folders_a": folders[:n_a],
        "folders_b": folders[n_a:],
        "sets": sets,
        "macro": macro,
    }


def can_be_paired(seeds_a, seeds_b):
    """Whether both sides have the same seeds, each once. A seed that is not known is None."""
    if None in seeds_a + seeds_b or len(set(seeds_a)) < len(seeds_a):
        return False
    return sorted(seeds_a) == sorted(seeds_b)


def check_folders(runs, folders):
    """Raises InputError where runs are there twice, stand at different steps, or hold other sets.

    runs: as they were named. folders: of their result files, in any order.
    """
    run_names = {os.path.abspath(run) for run in runs}
    newest = {os.path.basename(folder) for folder in folders if folder not in run_names}
    if len(newest) > 1:
        raise data.InputError(
            f"the runs stand at {', '.join(sorted(newest))}; finish them, or name RUN/eval-N"
        )
    stems = eval.result_stems(folders[0])
    for folder in folders:
        if folders.count(folder) > 1:
            raise data.InputError(f"{folder} is given twice; each run counts once")
        if eval.result_stems(folder) != stems:
            raise data.InputError(f"{folders[0]} and {folder} hold other sets; compare the same sets")


# ---- statistics --------------------------------------------------------------------------------------------


def figures_of(sets, n_a, is_paired):
    """`change_over_seeds` and clusters of one or several `eval.CountedSet`; the first n_a files are of A.

    What is not defined is None, because JSON has no NaN.
    """
    sums = [counted.sums for counted in sets]
    figures = change_over_seeds(eval.cluster_table(sums), n_a, is_paired)
    per_seed = [eval.number_or_none(change) for change in figures.pop("per_seed")]
    figures = {name: eval.number_or_none(figure) for name, figure in figures.items()}
    return {**figures, "per_seed": per_seed, **eval.cluster_figures(sums)}


def change_over_seeds(table, n_a, is_paired):
    """The relative change from recipe A to B with three spreads, from a table (G, S, runs + 1).

    The statistic is L = ln(E_B / E_A), as a mean over runs and sets. Changes and the ends of intervals are
    100 (e^L − 1), in %. Spreads are 100 times those of L, which is close to %. → value; per_seed, of paired
    runs; seed_sd; cluster_se, cluster_low and cluster_high, by the jackknife; total_se, df, low, high and p,
    of seeds and clusters together. What is not defined is NaN.
    """
    across = eval.estimate(table, lambda sums: contrast(eval.log_errors(sums), n_a))
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = eval.log_errors(table.sum(axis=0))  # (runs,)
        total, df, seed_sd = total_estimate(logs, n_a, is_paired, across, len(table))
        per_seed = eval.percent(logs[n_a:] - logs[:n_a]).tolist() if is_paired else []
    return {
        "value": eval.percent(across.value),
        "per_seed": per_seed,
        "seed_sd": 100 * seed_sd,
        "cluster_se": 100 * across.se,
        "cluster_low": eval.percent(across.low),
        "cluster_high": eval.percent(across.high),
        "total_se": 100 * total.se,
        "df": df,
        "low": eval.percent(total.low),
        "high": eval.percent(total.high),
        "p": total.p,
    }


def contrast(values, n_a):
    """Mean of the runs of B − mean of the runs of A, which are the first n_a: (..., runs) → (...)."""
    return values[..., n_a:].mean(axis=-1) - values[..., :n_a].mean(axis=-1)


def total_estimate(values, n_a, is_paired, across, n_clusters):
    """The `eval.Estimate` of B − A over other seeds and other clusters, its df, and the sd over seeds.

    values: (runs,), a figure of each run. across: the `eval.Estimate` of their `contrast` over clusters.

    Paired, V_seed = s²(Δ_s)/S of the differences Δ_s, and sd = s(Δ_s). Unpaired, V_seed is the sum of s²/S of
    both sides, and sd = √(s²_A + s²_B). V = V_seed + SE²; df is Satterthwaite's, V² / (Σ (s²/S)²/(S − 1) +
    SE⁴/(G − 1)). All is NaN where a side has one run.
    """
    arms = [values[:n_a], values[n_a:]]
    if is_paired:
        arms = [arms[1] - arms[0]]
    seed_square = 0.0
    seed_variance = 0.0
    square_per_df = across.se**4 / (n_clusters - 1) if n_clusters > 1 else np.nan
    for arm in arms:
        n_seeds = len(arm)
        square = arm.var(ddof=1) if n_seeds > 1 else np.nan
        if square < eval.ROUNDING**2:
            square = 0.0
        seed_square += square
        seed_variance += square / n_seeds
        square_per_df += (square / n_seeds) ** 2 / max(n_seeds - 1, 1)
    variance = seed_variance + across.se**2
    with np.errstate(divide="ignore", invalid="ignore"):
        df = np.divide(variance**2, square_per_df)
    return eval.t_estimate(across.value, np.sqrt(variance), df), df, np.sqrt(seed_square)


def exact_sign_flip(differences):
    """The exact p of differences (G,) by cluster: the share of all 2^G signs with |Σ ± d_g| ≥ |Σ d_g|.

    For few clusters, because all signs are tried. The smallest p that it can give is 2 / 2^G.
    """
    n_clusters = len(differences)
    signs = 1 - 2 * (np.arange(2**n_clusters)[:, None] >> np.arange(n_clusters) & 1)  # (2^G, G)
    sums = np.abs(signs @ differences)
    rounding = eval.ROUNDING * np.abs(differences).sum()  # sums in another order are equal
    return float((sums >= np.abs(differences.sum()) - rounding).mean())


# ---- tables ------------------------------------------------------------------------------------------------


def print_seeds(comparison):
    """Prints the comparison of two recipes (`compare_seeds`): rates of each run, then the three spreads."""
    c = comparison
    print("paired by seed" if c["paired"] else "unpaired: the two sides do not have the same known seeds")
    for side in "ab":
        for folder, seed in zip(c[f"folders_{side}"], c[f"seeds_{side}"]):
            print(f"{side.upper()}: {os.path.relpath(folder)}" + ("" if seed is None else f" (seed {seed})"))

    n_columns = max(len(c["folders_a"]), len(c["folders_b"]))
    figures = dict(c["sets"])
    if c["macro"]["stems"]:
        figures["macro"] = c["macro"]
    rows = []
    for stem, own in figures.items():
        shown = {"A %": own.get("a"), "B %": own.get("b"), "change %": own["per_seed"]}
        for name, values in shown.items():
            if values:
                rows.append([stem, name, *values, *[None] * (n_columns - len(values))])
    eval.print_table(rows, ["set", "figure", *(f"run {i + 1}" for i in range(n_columns))])

    rows = []
    for stem, own in figures.items():
        row = [stem, eval.number_text(own["value"], "+.1f")]
        row.append(eval.number_text(own["cluster_se"], ".1f"))
        row.append(eval.interval_text(own["cluster_low"], own["cluster_high"], "+.1f"))
        row.append(eval.number_text(own["seed_sd"], ".1f"))
        row.append(eval.interval_text(own["low"], own["high"], "+.1f"))
        row.append(eval.number_text(own["df"], ".1f"))
        row.append(eval.p_text(own["p"]))
        rows.append(row)
    header = ["set", "change %", "cluster SE", "95 % cluster", "seed sd", "95 % total", "df", "p"]
    if min(len(c["folders_a"]), len(c["folders_b"])) == 1:  # one run says nothing about other seeds
        header = header[:4]
        rows = [row[:4] for row in rows]
    eval.print_table(rows, header)
    eval.print_clusters(figures)
    one_cluster = [stem for stem in c["sets"] if stem not in c["macro"]["stems"]]
    if one_cluster:
        print(f"not in the macro, because they have one cluster: {', '.join(one_cluster)}")


if __name__ == "__main__":
    data.run_script(main, parse_args())
