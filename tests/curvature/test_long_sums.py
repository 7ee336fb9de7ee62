"""Running sums of very many terms: what is lost between flushes, and that a flush loses nothing."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from ekfac_dist.curvature import long_sums
from ekfac_dist.curvature.covariance import (
    add_outer_products_,
    mirror_,
    outer_product_positions_per_term,
)
from ekfac_dist.curvature.long_sums import FLUSH_AFTER, SECOND, LongSums, add_exactly_

CPU = torch.device("cpu")
DRAWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "squares": np.square,
    "fourth powers": lambda normal: normal**4,
    "log-normal": lambda normal: np.exp(3 * normal),
}


class Matrices(LongSums):
    """Sums of whole matrices."""

    def __init__(self, sums: dict[str, torch.Tensor], flush_after: int = FLUSH_AFTER):
        self.sums = sums
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(long_sums, "FLUSH_AFTER", flush_after)
            super().__init__(sums, next(iter(sums.values())).dtype)

    def add_term(self, name: str, term: torch.Tensor) -> None:
        for _ in self.chunks(name, 1):
            self.sums[name] += term

    def _parts(self, name: str) -> list[torch.Tensor]:
        return [self.sums[name]]


def add_one_by_one_(total: torch.Tensor, terms: np.ndarray) -> None:
    """Adds each of some terms [n, ...] to a float32 sum, in order."""
    start = total.numpy()[None]
    total.copy_(torch.from_numpy(np.add.accumulate(np.concatenate([start, terms]))[-1]))


def bias(terms: Callable[[int], np.ndarray], number: int, flush_after: int) -> np.ndarray:
    """Relative error of a sum of so many terms, that is flushed every so often."""
    drawn = terms(number)
    sums = Matrices({"a": torch.zeros(1, drawn.shape[1])}, flush_after)
    exact = drawn.sum(0, dtype=np.float64)
    for share in sums.chunks("a", number):
        add_one_by_one_(sums.sums["a"][0], drawn[share])
    sums.fold()
    return sums.sums["a"][0].double().numpy() / exact - 1


@pytest.mark.parametrize("name", DRAWS)
def test_terms_that_differ_are_summed_between_flushes_with_little_bias(name: str):
    generator = np.random.default_rng(0)

    def terms(number: int) -> np.ndarray:
        return DRAWS[name](generator.standard_normal((number, 8), dtype=np.float32))

    number = 64 * FLUSH_AFTER
    assert abs(bias(terms, number, FLUSH_AFTER).mean()) < 3e-6
    assert abs(bias(terms, number, number).mean()) > 3e-5  # what one level would do


def test_equal_terms_are_summed_between_flushes_with_little_bias():
    constants = np.random.default_rng(0).uniform(1, 2, (1, 200)).astype(np.float32)

    def terms(number: int) -> np.ndarray:
        return np.repeat(constants, number, 0)

    number = 16 * FLUSH_AFTER
    assert np.abs(bias(terms, number, FLUSH_AFTER)).max() < 7e-5
    assert np.abs(bias(terms, number, number)).max() > 7e-4  # what one level would do


@pytest.mark.parametrize("size", [1, 8, 40])
def test_products_are_summed_between_flushes_with_little_bias(size: int):
    """Whatever a CPU's library makes of a product's rows, one after the other or many at once."""
    torch.manual_seed(0)
    sums, exact = Matrices({"a": torch.zeros(size, size)}), torch.zeros(size, size).double()
    per_term = outer_product_positions_per_term([size], CPU)
    rows = torch.randn(10_000, size)
    rows[:, 0] = 0.7
    for _ in range(20):
        for share in sums.chunks("a", len(rows), per_term):
            add_outer_products_(sums.sums["a"], rows[share], bias=False)
        exact += rows.double().T @ rows.double()
    sums.fold()

    def error(total: torch.Tensor) -> float:
        return ((mirror_(total).double() - exact).diagonal() / exact.diagonal()).abs().max().item()

    assert error(sums.sums["a"]) < 7e-5


def test_a_flush_loses_nothing():
    generator = torch.Generator().manual_seed(0)
    scales = 10.0 ** torch.randint(-6, 7, (2, 500, 7), generator=generator)
    total, rest = torch.randn(2, 500, 7, generator=generator) * scales
    exact, rounded = total.double() + rest.double(), total + rest
    add_exactly_(total, rest)
    assert torch.equal(total, rounded)
    assert torch.equal(total.double() + rest.double(), exact)
    assert rest.any()


@pytest.mark.parametrize("spoilt", [torch.inf, -torch.inf, torch.nan, 3e38])
def test_what_is_not_finite_stays_to_be_seen_in_the_running_sum(spoilt: float):
    sums = Matrices({"a": torch.zeros(2, 2)}, 1)
    for _ in range(2):  # the second 3e38 is what overflows
        sums.add_term("a", torch.tensor([[0, spoilt], [0, 0]]))
    assert not torch.isfinite(sums.sums["a"]).all()


def test_a_flush_in_blocks_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch):
    terms = torch.randn(9, 10, 7)
    found = []
    for block in (2**20, 21, 1):
        monkeypatch.setattr("ekfac_dist.curvature.long_sums._BLOCK", block)
        sums = Matrices({"a": torch.zeros(10, 7)}, 2)
        for term in terms:
            sums.add_term("a", term)
        assert len(sums.state()) == 1 + {2**20: 1, 21: 4, 1: 10}[block]
        sums.fold()
        found.append(sums.sums["a"])
        assert list(sums.state()) == ["a/0"]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.allclose(found[0], terms.sum(0), atol=1e-5)


def test_there_is_no_second_level_before_the_first_flush_nor_in_float64():
    short, wide = (Matrices({"a": torch.zeros(1, 1, dtype=d)}, 5) for d in (None, torch.float64))
    assert [*short.chunks("a", 4), *wide.chunks("a", 10**9)] == [slice(0, 4), slice(0, 10**9)]
    assert list(short.state()) == list(wide.state()) == ["a/0"]
    short.add_term("a", torch.ones(1))
    assert list(short.state()) == ["a/0", f"{SECOND}a/0/0"]


def test_what_a_sum_takes_in_is_cut_where_it_is_flushed():
    sums = Matrices({"a": torch.zeros(1, 1), "b": torch.zeros(1, 1)}, 4)
    assert list(sums.chunks("a", 3)) == [slice(0, 3)]
    assert list(sums.chunks("b", 1)) == [slice(0, 1)]
    assert list(sums.chunks("a", 7)) == [slice(0, 1), slice(1, 5), slice(5, 7)]
    assert sums.num_added == {"a": 2, "b": 1}
    assert list(sums.chunks("a", 50, 10)) == [slice(0, 20), slice(20, 50)]
    assert sums.num_added == {"a": 3, "b": 1}
    assert list(sums.chunks("a", 9, 10)) == [slice(0, 9)]
    assert sums.num_added == {"a": 0, "b": 1}


def test_saved_pieces_are_taken_up_as_they_are_and_added_to_others():
    def summed(flush_after: int) -> Matrices:
        torch.manual_seed(0)
        sums = Matrices({"a": torch.zeros(3, 2), "b": torch.zeros(1, 4)}, flush_after)
        for _ in range(5):
            for name, total in sums.sums.items():
                sums.add_term(name, torch.randn_like(total))
        return sums

    def copied(pieces: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in pieces.items()}

    saved = copied(summed(2).state())
    again = Matrices({"a": torch.zeros(3, 2), "b": torch.zeros(1, 4)}, 2)
    for name, tensor in reversed(saved.items()):
        again.restore(name, tensor)
    assert again.state().keys() == saved.keys()
    assert all(torch.equal(again.state()[name], saved[name]) for name in saved)
    short = summed(10)  # it has no second level of its own
    for name, tensor in saved.items():
        short.add(name, tensor)
    short.fold()
    for name, total in summed(10).sums.items():
        assert torch.allclose(short.sums[name], 2 * total)
