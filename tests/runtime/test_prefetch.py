"""Work made ahead: in order, with errors where they belong, and no further than asked."""

import threading

import pytest

from ekfac_dist.runtime.prefetch import prefetch


def test_everything_comes_once_and_in_order():
    assert list(prefetch(lambda k: k * k, range(7))) == [k * k for k in range(7)]
    assert list(prefetch(lambda k: k, [])) == []


def test_an_error_comes_in_its_place():
    values = prefetch(lambda k: 6 // k, [3, 2, 0, 1])
    assert [next(values), next(values)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(values)


def test_it_works_in_another_thread_and_no_further_than_its_depth():
    made, here = [], threading.get_ident()

    def make(k):
        made.append(k)
        return threading.get_ident()

    items = prefetch(make, range(100), depth=2)
    assert next(items) != here
    items.close()
    assert len(made) <= 3
