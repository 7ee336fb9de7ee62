"""Which sequences are left out: sizes, disjointness, and shares that leave nothing."""

import numpy as np
import pytest

from ekfac_dist.errors import ConfigError
from ekfac_dist.evaluate.subsets import lds_subsets, num_removed, random_removals, without


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.8, 0.95])
def test_every_subset_has_its_share(keep):
    subsets = lds_subsets(61, 30, keep, 0)
    assert subsets.shape == (30, 61)
    assert (subsets.sum(1) == round(keep * 61)).all()
    assert np.array_equal(subsets, lds_subsets(61, 30, keep, 0))
    assert not np.array_equal(subsets, lds_subsets(61, 30, keep, 1))


def test_halves_are_independent_of_each_other():
    subsets = lds_subsets(200, 100, 0.5, 0)
    overlap = (subsets[0::2] & subsets[1::2]).sum(1)
    assert overlap.min() > 40
    assert overlap.max() < 60
    assert len({subset.tobytes() for subset in subsets}) == 100


def test_what_is_left_out_is_disjoint_until_all_had_their_turn():
    left_out = ~lds_subsets(100, 40, 0.95, 0)
    for start in (0, 20):
        assert (left_out[start : start + 20].sum(0) == 1).all()
    assert not np.array_equal(left_out[0], left_out[20])


@pytest.mark.parametrize(("number", "keep", "what"), [(9, 0.05, "nothing"), (9, 0.99, "all of it")])
def test_subsets_that_hold_nothing_or_everything_are_refused(number, keep, what):
    with pytest.raises(ConfigError, match=f"lds.keep is .* 9 sequences.*would hold {what}"):
        lds_subsets(number, 5, keep, 0)


def test_a_removal_takes_away_at_least_one_and_not_all():
    assert num_removed(100, 0.05) == 5
    for share, what in ((0.001, "none"), (0.999, "all")):
        with pytest.raises(ConfigError, match=f"removal.share .* is {what} of them"):
            num_removed(100, share)


def test_removals_keep_all_others():
    assert without(5, np.array([1, 3])).tolist() == [True, False, True, False, True]
    subsets = random_removals(50, 5, 4, 0)
    assert (subsets.sum(1) == 45).all()
    assert len({subset.tobytes() for subset in subsets}) == 4
