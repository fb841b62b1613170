"""Every formula against numbers that were found another way: published examples, enumeration, algebra."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from evals.sample_files import read_samples, with_clustered_intervals
from evals.stats import (
    clustered_stderr,
    holm,
    leaves_out_zero,
    mcnemar_exact,
    minimum_detectable_difference,
    paired_bootstrap,
    paired_stderr,
    wilson_interval,
)
from tests.evals.result_files import write_answers


@pytest.mark.parametrize(
    ("successes", "n", "interval"),
    [  # Newcombe 1998, Statistics in Medicine 17, table I, method 3 (score without continuity correction)
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilsons_interval_as_published(successes, n, interval):
    assert wilson_interval(successes, n) == pytest.approx(interval, abs=5e-5)


@pytest.mark.parametrize("counts", list(itertools.product(range(6), repeat=2)))
def test_mcnemars_p_is_the_share_of_all_outcomes_that_are_at_least_as_uneven(counts):
    n = sum(counts)
    outcomes = [sum(tosses) for tosses in itertools.product((0, 1), repeat=n)]
    uneven = [heads for heads in outcomes if abs(2 * heads - n) >= abs(counts[0] - counts[1])]
    assert mcnemar_exact(*counts) == pytest.approx(len(uneven) / len(outcomes))


def test_mcnemars_p_of_a_published_table_and_of_many_documents():
    # Fagerland, Lydersen, Laake 2013, table 1 (airway hyper-responsiveness): 1 and 7 discordant pairs, exact p 0.070.
    assert mcnemar_exact(1, 7) == pytest.approx(0.0703125)
    # 10,000 discordant documents: the normal approximation with continuity correction is good to three digits.
    z = (200 - 1) / math.sqrt(10_000)
    assert mcnemar_exact(4900, 5100) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)
    assert mcnemar_exact(0, 0) == 1.0
    assert 0 < mcnemar_exact(0, 900) < 1e-250


def brute_force_stderr(scores, clusters):
    """Miller's equation 4 as it is printed: two sums over documents."""
    n, mean = len(scores), sum(scores) / len(scores)
    simple = sum((s - mean) ** 2 for s in scores) / (n - 1) / n
    pairs = [
        (scores[i] - mean) * (scores[j] - mean)
        for i in range(n)
        for j in range(n)
        if i != j and clusters[i] == clusters[j]
    ]
    return math.sqrt(simple + sum(pairs) / n**2)


def test_the_clustered_standard_error_is_the_double_sum():
    random = np.random.default_rng(1)
    clusters = [f"subject {i}" for i in random.integers(0, 9, 120)]
    skill = {name: random.random() for name in clusters}
    scores = [float(random.random() < skill[name]) for name in clusters]
    assert clustered_stderr(scores, clusters) == pytest.approx(brute_force_stderr(scores, clusters))


def test_documents_that_fail_together_count_as_one_and_single_ones_as_themselves():
    scores = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    alone = clustered_stderr(scores, range(8))
    assert alone == pytest.approx(np.std(scores, ddof=1) / math.sqrt(8))
    tenfold = clustered_stderr([s for s in scores for _ in range(10)], [i for i in range(8) for _ in range(10)])
    assert tenfold == pytest.approx(np.std(scores) / math.sqrt(8), rel=1e-3)  # as eight documents, and not as eighty
    with pytest.raises(ValueError, match="two groups"):
        clustered_stderr([0.0, 1.0], ["a", "a"])


def test_the_clustered_interval_covers_where_the_simple_one_does_not():
    """30 groups of 20 whose skills differ: of 300 such evaluations about 95 % must hold the true mean."""
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 20)
    covered = {"clustered": 0, "simple": 0}
    for _ in range(300):
        skills = random.beta(2, 2, 30)
        scores = (random.random(600) < skills[groups]).astype(float)
        miss = abs(scores.mean() - 0.5)
        covered["clustered"] += miss <= 1.96 * clustered_stderr(scores, groups)
        covered["simple"] += miss <= 1.96 * scores.std(ddof=1) / math.sqrt(600)
    assert 270 <= covered["clustered"] <= 297
    assert covered["simple"] < 230


def test_the_bootstrap_interval_is_that_of_the_normal_approximation_for_many_documents():
    random = np.random.default_rng(3)
    a = (random.random(4000) < 0.5).astype(float)
    b = np.where(random.random(4000) < 0.2, 1.0, a)
    found = paired_bootstrap(a, b)
    stderr = paired_stderr(a, b)
    assert found.value == pytest.approx((b - a).mean())
    assert found.ci95 == pytest.approx((found.value - 1.96 * stderr, found.value + 1.96 * stderr), abs=0.1 * stderr)
    assert leaves_out_zero(found.ci95)


def test_drawing_documents_and_drawing_counts_of_equal_differences_agree():
    random = np.random.default_rng(4)
    a = np.zeros(500)
    b = random.integers(-1, 2, 500).astype(float)
    # A difference too small to matter makes every value unique, so that single documents are drawn.
    jittered = b + np.arange(500) * 1e-12
    assert paired_bootstrap(a, b).ci95 == pytest.approx(paired_bootstrap(a, jittered).ci95, abs=0.005)


def test_equal_seeds_give_equal_intervals_and_identical_models_no_difference():
    random = np.random.default_rng(5)
    a, b = random.random(50), random.random(50)
    assert paired_bootstrap(a, b, seed=7) == paired_bootstrap(a, b, seed=7)
    assert paired_bootstrap(a, b, seed=7) != paired_bootstrap(a, b, seed=8)
    same = paired_bootstrap(a, a)
    assert (same.value, same.ci95) == (0.0, (0.0, 0.0))
    assert not leaves_out_zero(same.ci95)
    with pytest.raises(ValueError, match="3 and 2 scores"):
        paired_bootstrap([1, 0, 1], [1, 0])


def test_groups_are_resampled_as_wholes():
    """Two groups that differ in opposite ways: documents alone would claim more than is known."""
    a = [0.0] * 200
    b = [1.0] * 100 + [-0.5] * 100
    clusters = ["up"] * 100 + ["down"] * 100
    assert leaves_out_zero(paired_bootstrap(a, b).ci95)
    by_group = paired_bootstrap(a, b, clusters=clusters)
    assert by_group.ci95 == pytest.approx((-0.5, 1.0))
    assert by_group.n_clusters == 2


def test_groups_of_different_sizes_count_by_their_documents():
    """Every document gains 0.25: whatever groups are drawn, the mean gain is 0.25."""
    clusters = ["small"] * 3 + ["large"] * 60 + ["middle"] * 20
    found = paired_bootstrap([0.0] * 83, [0.25] * 83, clusters=clusters)
    assert found.ci95 == pytest.approx((0.25, 0.25))


def test_holms_correction_as_worked_by_hand():
    # 4 tests: 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1 -> not below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_difference_that_would_be_seen_in_four_of_five_evaluations():
    assert minimum_detectable_difference(0.01) == pytest.approx(0.02802, abs=1e-5)  # (1.95996 + 0.84162) / 100
    random = np.random.default_rng(6)
    seen = np.abs(random.normal(0.02802, 0.01, 20_000)) > 0.0195996
    assert seen.mean() == pytest.approx(0.8, abs=0.01)


def test_a_result_of_many_groups_is_stored_with_clustered_intervals_and_others_as_they_were(tmp_path):
    leaves = [f"mmlu_{i // 5:02d}" for i in range(120)]
    right = [{"acc": float(i // 5 % 3 == 0)} for i in range(120)]
    result = write_answers(tmp_path, "mmlu", right, leaves=leaves)
    rows = read_samples(tmp_path, result)
    stored = with_clustered_intervals(result, rows)
    expected = clustered_stderr([row["acc"] for row in right], leaves)
    assert stored.metrics["acc"].stderr == pytest.approx(expected)
    assert stored.metrics["acc"].ci95 == pytest.approx(
        (1 / 3 - 1.95996 * expected, 1 / 3 + 1.95996 * expected), rel=1e-4
    )
    assert expected > 2 * result.metrics["acc"].stderr
    few = write_answers(tmp_path, "two", right, leaves=["a"] * 60 + ["b"] * 60)
    assert with_clustered_intervals(few, read_samples(tmp_path, few)) == few
