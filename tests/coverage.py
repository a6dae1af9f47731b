"""Do the 95 % intervals of eval.py cover 95 %? Simulated sets with a known truth, by eval.py's own functions.

    python tests/coverage.py               # the whole grid, 2,000 draws each: 15 seconds
    python tests/coverage.py --draws 200   # a quick look

A simulated speaker has some clips, and on each of them makes Poisson errors. Its rate differs from the mean
by a speaker effect that A and B share, and by one of each system. Clips differ too, and both systems meet the
same clips. All effects have mean 1, so the true rates are those that are put in. With 65 clips a speaker the
design effect is about 6 for a rate and 4 for a difference. Printed are the shares of draws whose interval
holds the truth, and the share of null pairs (equal true rates) with p < 0.05.
"""

import itertools
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import eval as evaluation  # noqa: E402
from data import argument_parser, at_least  # noqa: E402

# speakers, whether they differ, whether they have equally many clips
SETTINGS = list(itertools.product((6, 12, 20, 40), (True, False), (True, False)))
DRAWS = 2000

RATE_A = 0.06
RATE_B = 0.05
UNITS_PER_CLIP = 18
CLIP_SHAPE = 0.5  # of the gamma effect of a clip: standard deviation 1.4
SHARED_SD = 0.5  # of the speaker effect that both systems share
OWN_SD = 0.2  # of the speaker effect of one system


def gamma_effect(rng, sd, size):
    """Random factors with mean 1 and this standard deviation; 1 for sd 0."""
    return rng.gamma(1 / sd**2, sd**2, size) if sd else np.ones(size)


def clips_per_speaker(n_speakers, is_balanced):
    """(G,) clips: 65 each, or from 20 to 200, each larger than the one before by the same factor."""
    return np.full(n_speakers, 65.0) if is_balanced else np.geomspace(20, 200, n_speakers).round()


def draw_tables(rng, n_draws, n_speakers, has_speaker_effect, is_balanced, true_rates):
    """Tables (draws, G, 1, files + 1) of one set, as `evaluation.cluster_table` makes them.

    true_rates: (files,), or (draws, files) where a draw has its own.
    """
    n_clips = clips_per_speaker(n_speakers, is_balanced)
    size = (n_draws, n_speakers)
    true_rates = np.broadcast_to(true_rates, (n_draws, np.shape(true_rates)[-1]))
    units = n_clips * UNITS_PER_CLIP + rng.poisson(n_clips, size)  # (draws, G)
    shared = gamma_effect(rng, SHARED_SD * has_speaker_effect, size)
    shape = CLIP_SHAPE * n_clips  # the mean of n gamma effects is a gamma effect again
    shared = shared * rng.gamma(shape, 1 / shape, size)
    columns = []
    for f in range(true_rates.shape[-1]):
        own = gamma_effect(rng, OWN_SD * has_speaker_effect, size)
        columns.append(rng.poisson(units * shared * own * true_rates[:, f, None]))
    return np.stack([*columns, units], axis=-1)[:, :, None, :].astype(float)


def share_that_covers(tables, statistic, truth):
    """The share of draws whose interval holds `truth`."""
    value, se = evaluation.jackknife(tables, statistic)
    low, high = evaluation.t_interval(value, se, tables.shape[-3] - 1)
    return float(((low <= truth) & (truth <= high)).mean())


def share_rejected(tables, statistic):
    """The share of draws with p < 0.05."""
    value, se = evaluation.jackknife(tables, statistic)
    return float((evaluation.t_test(value, se, tables.shape[-3] - 1) < 0.05).mean())


def share_flipped(tables):
    """The share of draws with p < 0.05 by the exact sign-flip test, which is for up to 12 speakers."""
    if tables.shape[-3] > evaluation.FEW_CLUSTERS:
        return None
    errors = tables[..., 0, :]  # (draws, G, 3)
    return float((evaluation.sign_flip(errors[..., 1] - errors[..., 0]) < 0.05).mean())


def simulate_pairs(n_speakers, has_speaker_effect, is_balanced, n_draws=DRAWS, seed=0):
    """Coverage of rate, difference and relative change, and how often tests reject a null pair."""
    rng = np.random.default_rng((seed, n_speakers, has_speaker_effect, is_balanced))
    setting = (rng, n_draws, n_speakers, has_speaker_effect, is_balanced)
    tables = draw_tables(*setting, [RATE_A, RATE_B])
    null_tables = draw_tables(*setting, [RATE_A, RATE_A])
    return {
        "rate": share_that_covers(tables, evaluation.rate, 100 * RATE_A),
        "difference": share_that_covers(tables, evaluation.difference, 100 * (RATE_B - RATE_A)),
        "change": share_that_covers(tables, evaluation.log_ratio, np.log(RATE_B / RATE_A)),
        "null difference": share_rejected(null_tables, evaluation.difference),
        "null change": share_rejected(null_tables, evaluation.log_ratio),
        "null sign-flip": share_flipped(null_tables),
    }


def simulate_seeds(n_seeds, n_speakers, seed_sd, is_paired, n_draws=DRAWS, seed=0):
    """Coverage of the total interval of two recipes with several runs, and of the other two spreads alone.

    A run's true rate differs from its recipe's by an effect of its seed; paired runs share half its variance.
    """
    rng = np.random.default_rng((seed, n_seeds, n_speakers, round(1000 * seed_sd), is_paired))
    shared = gamma_effect(rng, seed_sd / np.sqrt(2), (n_draws, n_seeds))
    arms = []
    for rate in (RATE_A, RATE_B):
        own = gamma_effect(rng, seed_sd / np.sqrt(2), (n_draws, n_seeds))
        other = shared if is_paired else gamma_effect(rng, seed_sd / np.sqrt(2), (n_draws, n_seeds))
        arms.append(rate * own * other)
    tables = draw_tables(rng, n_draws, n_speakers, True, True, np.concatenate(arms, axis=1))
    truth = 100 * (RATE_B - RATE_A)

    def mean_difference(sums):
        return evaluation.contrast(evaluation.rates(sums), n_seeds)

    values = evaluation.rates(tables.sum(axis=-3))  # (draws, runs)
    seed_part, square_per_df, _ = evaluation.seed_variance(values, n_seeds, is_paired)
    value, se = evaluation.jackknife(tables, mean_difference)
    total, df = evaluation.total_variance(seed_part, square_per_df, se**2, n_speakers)
    low, high = evaluation.t_interval(value, np.sqrt(total), df)
    seed_df = n_seeds - 1 if is_paired else seed_part**2 / square_per_df
    seed_low, seed_high = evaluation.t_interval(value, np.sqrt(seed_part), seed_df)
    return {
        "total": float(((low <= truth) & (truth <= high)).mean()),
        "seeds alone": float(((seed_low <= truth) & (truth <= seed_high)).mean()),
        "speakers alone": share_that_covers(tables, mean_difference, truth),
    }


def share_cells(shares):
    return [None if share is None else f"{share:.3f}" for share in shares.values()]


def parse_args(argv=None):
    parser = argument_parser("coverage.py", __doc__)
    parser.add_argument(
        "--draws", type=at_least(1, int), default=DRAWS, help="simulated sets for each setting"
    )
    return parser.parse_args(argv)


def main(args):
    rows = []
    for n_speakers, has_effect, is_balanced in SETTINGS:
        shares = simulate_pairs(n_speakers, has_effect, is_balanced, args.draws)
        setting = ["yes" if has_effect else "no", "yes" if is_balanced else "no"]
        rows.append([str(n_speakers), *setting, *share_cells(shares)])
    evaluation.print_table(rows, ["speakers", "speaker effect", "balanced", *shares])

    rows = []
    for n_seeds, n_speakers, seed_sd in itertools.product((2, 3, 5), (6, 12, 40), (0.0, 0.05, 0.2)):
        for is_paired in (True, False):
            shares = simulate_seeds(n_seeds, n_speakers, seed_sd, is_paired, args.draws)
            setting = [str(n_speakers), seed_sd, "yes" if is_paired else "no"]
            rows.append([str(n_seeds), *setting, *share_cells(shares)])
    evaluation.print_table(rows, ["seeds", "speakers", "seed sd", "paired", *shares])


if __name__ == "__main__":
    main(parse_args())
