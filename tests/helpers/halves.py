"""What half of the data changes: dense computations, and comparisons of what manifests say."""

import math

import pytest
import torch

from ekfac_dist.curvature.halves import NUM_VECTORS, fixed_vectors


def numbers(halves):
    """All numbers of a manifest's entry, by their path; None where something is not known."""
    found = {}
    for damping, scores in halves["scores"].items():
        found |= {(damping, key): value for key, value in scores.items()}
    for module, values in halves["modules"].items():
        found |= {(module, key): value for key, value in values.items()}
    return found


def assert_same_halves(one, other, tolerance=1e-8):
    """That two fits say the same of their halves."""
    one, other = (numbers(factors.manifest["halves"]) for factors in (one, other))
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert other[key] == (value and pytest.approx(value, rel=tolerance)), key


def even_and_odd(values):
    """The values of the sequences with an even index, and of those with an odd one."""
    return values[::2], values[1::2]


def dense_difference(vectors, exactly=False):
    """‖δ‖ / ‖X‖ of a factor X, from the vectors [T, n] at the positions of each sequence.

    Args:
        vectors: The vectors of all sequences, in the order of their indices.
        exactly: Whether with δ as it is, or with what the fixed vectors show of it.
    """
    halves = [torch.cat(list(half)) for half in even_and_odd(vectors)]
    even, odd = (x.T @ x / len(x) for x in halves)
    counts = [len(x) for x in halves]
    delta = (even - odd) * math.sqrt(counts[0] * counts[1]) / sum(counts)
    everything = torch.cat(halves)
    whole = everything.T @ everything / sum(counts)
    if not exactly:
        delta = fixed_vectors(len(delta), delta) @ delta / math.sqrt(NUM_VECTORS)
    return (delta.norm() / whole.norm()).item()


def dense_turning(values, difference):
    """θ² of each two eigenvectors of A [I, I], from its eigenvalues and ‖δ‖ / ‖A‖."""
    tau = difference**2 * (values**2).sum() / values.sum() ** 2
    turning = torch.zeros(len(values), len(values), dtype=values.dtype)
    for i, one in enumerate(values):
        for j, other in enumerate(values):
            if i != j:
                B2 = tau * one * other
                turning[i, j] = B2 / ((one - other) ** 2 + 4 * B2)
    return turning


def dense_change(dense, lam, Q, damping, per_token=False):
    """Σω, Σωr and Σωr² of a module, with the Fisher matrices of the two halves in a basis.

    To the last is added what turns of A's eigenvectors change of E.

    Args:
        dense: `DenseModule` of all sequences, in the order of their indices.
        lam: Λ [O, I] of all.
        Q: The basis [O·I, O·I].
        damping: λ over mean(Λ).
        per_token: Whether each position is squared by itself.
    """
    of_sequences = [[G] for G in dense.gradients]
    if per_token:
        of_sequences = [
            [torch.outer(g, a) for g, a in zip(gs, xs, strict=True)]
            for gs, xs in zip(dense.grads, dense.acts, strict=True)
        ]
    squares = torch.stack([sum((Q.T @ x.flatten()) ** 2 for x in each) for each in of_sequences])
    even, odd = even_and_odd(squares)
    numbers = len(even), len(odd)
    delta = (even.mean(0) - odd.mean(0)) * math.sqrt(numbers[0] * numbers[1]) / sum(numbers)
    theta2 = dense_turning(torch.linalg.eigvalsh(dense.A), dense_difference(dense.acts))
    w = lam / (lam + damping * lam.mean()) ** 2
    turned = sum(
        (torch.outer(w_I, w_I) * (lam_I[:, None] - lam_I) ** 2 * theta2).sum()
        for w_I, lam_I in zip(w, lam, strict=True)
    )
    lam = lam.flatten()
    damped = lam + damping * lam.mean()
    omega, r = (lam / damped) ** 2, (delta + damping * delta.mean()) / damped
    return torch.stack([omega.sum(), (omega * r).sum(), (omega * r**2).sum() + turned])


def correlation(changes, scale=1.0):
    """1 / √(1 + scale · v / √n) with v and n from Σω, Σωr and Σωr² of each module."""
    signal, first, second = sum(changes).tolist()
    n = sum(change[0].sqrt() for change in changes).item() ** 2 / signal
    return 1 / math.sqrt(1 + scale * (second / signal - (first / signal) ** 2) / math.sqrt(n))
