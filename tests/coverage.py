"""Do the 95 % intervals of the suite cover 95 %? Simulated sets with a known truth, by its own functions.

    python tests/coverage.py    # the whole grid, 2,000 draws each: half a minute

A simulated speaker has some clips, and on each of them makes Poisson errors. Its rate differs from the mean
by a speaker effect that A and B share, and by one of each system. Clips differ too, and both systems meet the
same clips. All effects have mean 1, so the true rates are those that are put in. Printed are the shares of
draws whose interval holds the truth, and the share of null pairs (equal true rates) with p < 0.05.
"""

import itertools
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import eval as evaluation  # noqa: E402
from results import seeds  # noqa: E402

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


def draw_tables(rng, n_speakers, has_speaker_effect, is_balanced, true_rates):
    """Tables (draws, G, 1, files + 1) of one set, as `evaluation.cluster_table` makes them.

    Speakers have 65 clips each, or from 20 to 200. true_rates: (files,), or (draws, files) where a draw has
    its own.
    """
    n_clips = np.full(n_speakers, 65.0) if is_balanced else np.geomspace(20, 200, n_speakers).round()
    size = (DRAWS, n_speakers)
    true_rates = np.broadcast_to(true_rates, (DRAWS, np.shape(true_rates)[-1]))
    units = n_clips * UNITS_PER_CLIP + rng.poisson(n_clips, size)  # (draws, G)
    shared = gamma_effect(rng, SHARED_SD * has_speaker_effect, size)
    shape = CLIP_SHAPE * n_clips  # the mean of n gamma effects is a gamma effect again
    shared = shared * rng.gamma(shape, 1 / shape, size)
    columns = []
    for f in range(true_rates.shape[-1]):
        own = gamma_effect(rng, OWN_SD * has_speaker_effect, size)
        columns.append(rng.poisson(units * shared * own * true_rates[:, f, None]))
    return np.stack([*columns, units], axis=-1)[:, :, None, :].astype(float)


def share_that_covers(estimates, truth):
    """The share of draws whose interval holds the truth."""
    return float(np.mean([estimate.low <= truth <= estimate.high for estimate in estimates]))


def simulate_pairs(n_speakers, has_speaker_effect, is_balanced):
    """Coverage of rate and relative change, and how often a null pair is rejected."""
    rng = np.random.default_rng((0, n_speakers, has_speaker_effect, is_balanced))
    setting = (rng, n_speakers, has_speaker_effect, is_balanced)
    tables = draw_tables(*setting, [RATE_A, RATE_B])
    null_tables = draw_tables(*setting, [RATE_A, RATE_A])
    rates = [evaluation.estimate(table[..., [0, 2]], evaluation.rate) for table in tables]
    changes = [evaluation.estimate(table, evaluation.log_ratio) for table in tables]
    null_changes = [evaluation.estimate(table, evaluation.log_ratio) for table in null_tables]
    return {
        "rate": share_that_covers(rates, 100 * RATE_A),
        "change": share_that_covers(changes, np.log(RATE_B / RATE_A)),
        "null change": float(np.mean([change.p < 0.05 for change in null_changes])),
    }


def simulate_seeds(n_seeds, n_speakers, seed_sd, is_paired):
    """Coverage of the total interval of two recipes with several runs, and of that of speakers alone.

    A run's true rate differs from its recipe's by an effect of its seed. Its logarithm has mean 0, so that
    the true change is known. Paired runs share half its variance.
    """
    rng = np.random.default_rng((0, n_seeds, n_speakers, round(1000 * seed_sd), is_paired))
    size = (DRAWS, n_seeds)
    part_sd = seed_sd / np.sqrt(2)
    shared = rng.normal(0, part_sd, size)
    arms = []
    for rate in (RATE_A, RATE_B):
        other = shared if is_paired else rng.normal(0, part_sd, size)
        arms.append(rate * np.exp(other + rng.normal(0, part_sd, size)))
    tables = draw_tables(rng, n_speakers, True, True, np.concatenate(arms, axis=1))
    truth = np.log(RATE_B / RATE_A)
    totals = []
    speakers_alone = []
    for table in tables:
        logs = evaluation.log_errors(table.sum(axis=0))  # (runs,)
        across = evaluation.estimate(table, lambda sums: seeds.contrast(evaluation.log_errors(sums), n_seeds))
        total, _, _ = seeds.total_estimate(logs, n_seeds, is_paired, across, n_speakers)
        totals.append(total)
        speakers_alone.append(across)
    return {
        "total": share_that_covers(totals, truth),
        "speakers alone": share_that_covers(speakers_alone, truth),
    }


def print_grid(simulate, columns, settings):
    rows = []
    for setting in settings:
        shares = simulate(*setting)
        rows.append([*map(str, setting), *(f"{share:.3f}" for share in shares.values())])
    evaluation.print_table(rows, [*columns, *shares])


if __name__ == "__main__":
    pairs = itertools.product((6, 12, 20, 40), (True, False), (True, False))
    print_grid(simulate_pairs, ["speakers", "they differ", "equal"], pairs)
    recipes = itertools.product((2, 3, 5), (6, 12, 40), (0.0, 0.05, 0.2), (True, False))
    print_grid(simulate_seeds, ["seeds", "speakers", "seed sd", "paired"], recipes)
