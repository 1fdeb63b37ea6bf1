"""pass@k against the counting of all choices, its interval against Wilson's and by how often it holds the truth."""

import random
from itertools import combinations
from math import sqrt

import pytest

from elm_mlx.problems.pass_rates import pass_at_k, pass_rate


@pytest.mark.parametrize("answers", [1, 2, 5, 8])
def test_the_estimate_is_the_share_of_choices_that_hold_a_right_answer(answers):
    for right in range(answers + 1):
        for k in range(1, answers + 1):
            choices = list(combinations(range(answers), k))
            expected = sum(min(choice) < right for choice in choices) / len(choices)
            assert pass_at_k(right, answers, k) == pytest.approx(expected, abs=1e-12)


def test_it_is_unbiased_where_the_plug_in_is_too_low():
    chance, answers, k, draw = 0.2, 10, 5, random.Random(0)
    rights = [sum(draw.random() < chance for _ in range(answers)) for _ in range(20_000)]
    truth = 1 - (1 - chance) ** k
    unbiased = sum(pass_at_k(right, answers, k) for right in rights) / len(rights)
    plug_in = sum(1 - (1 - right / answers) ** k for right in rights) / len(rights)
    assert unbiased == pytest.approx(truth, abs=0.01)
    assert plug_in < truth - 0.03


@pytest.mark.parametrize(("right", "answers", "k"), [(0, 4, 5), (5, 4, 1), (-1, 4, 1), (1, 4, 0), (0, 0, 1)])
def test_counts_that_cannot_be_are_refused(right, answers, k):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(right, answers, k)


def test_no_problems_are_refused():
    with pytest.raises(ValueError, match="no problems"):
        pass_rate([], 1)


@pytest.mark.parametrize(("solved", "problems"), [(0, 20), (3, 20), (20, 20), (1, 1), (41, 97)])
def test_of_one_answer_each_the_interval_is_wilsons(solved, problems):
    found = pass_rate([(1, 1)] * solved + [(0, 1)] * (problems - solved), 1)
    z, p = 1.959963984540054, solved / problems
    centre = (solved + z * z / 2) / (problems + z * z)
    half = z / (problems + z * z) * sqrt(problems * p * (1 - p) + z * z / 4)
    assert found.rate == pytest.approx(p)
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half), abs=1e-9)
    assert found.problems == problems


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("alike", [True, False])
def test_the_interval_holds_the_truth_nineteen_times_in_twenty(k, alike):
    draw, answers, problems, runs = random.Random(k + alike), 8, 60, 600

    def chance():
        return 0.3 if alike else draw.choice([0.0, 0.05, 0.3, 0.6, 1.0])

    truth = sum(1 - (1 - p) ** k for p in ([0.3] if alike else [0.0, 0.05, 0.3, 0.6, 1.0])) / (1 if alike else 5)
    held = 0
    for _ in range(runs):
        chances = [chance() for _ in range(problems)]
        found = pass_rate([(sum(draw.random() < p for _ in range(answers)), answers) for p in chances], k)
        held += found.low <= truth <= found.high
    assert 0.92 <= held / runs <= 0.985


def test_equal_estimates_do_not_make_it_certain():
    found = pass_rate([(4, 8)] * 3, 1)
    assert found.rate == 0.5
    assert found.high - found.low > 0.3  # of 24 answers


def test_it_is_shown_in_per_cent():
    assert str(pass_rate([(1, 2), (0, 2)], 1)).startswith("pass@1 25.0% (")
