"""How far apart two sides' factors are.

Compared is E, the whole approximation of a module's Fisher. With

    E = (Q_S ⊗ Q_A) diag(vec Λ) (Q_S ⊗ Q_A)ᵀ

a Frobenius product needs no matrix larger than a factor, and depends neither on eigenvectors' signs
nor on bases of eigenspaces in which Λ is constant:

    <E, E'> = Σ Λ ∘ (R_S∘² Λ' (R_A∘²)ᵀ)         R_S = Q_Sᵀ Q_S',  R_A = Q_Aᵀ Q_A'
"""

from ekfac_dist.report.tables import table


def product(one, other):
    """<E, E'> of two (Q_S, Q_A, Λ), see above."""
    (basis_S, basis_A, spectrum), (basis_S2, basis_A2, spectrum2) = one, other
    squares_S, squares_A = (basis_S.T @ basis_S2) ** 2, (basis_A.T @ basis_A2) ** 2
    return (spectrum * (squares_S @ spectrum2 @ squares_A.T)).sum().item()


def relative_error(one, other):
    """‖E - E'‖ / ‖E'‖."""
    norm = product(other, other)
    return (max(product(one, one) + norm - 2 * product(one, other), 0) / norm) ** 0.5


def errors_of(modules, one, other, device="cpu"):
    """Errors of each module, in float64: {module: (of E, of the mean of Λ)}.

    Args:
        modules: Names.
        one: A function from a name to (Q_S, Q_A, Λ), as of `read_factors`.
        other: The same, of what it should be.
        device: Where to compute.
    """
    errors = {}
    for name in modules:
        mine, theirs = (tuple(t.to(device).double() for t in read(name)) for read in (one, other))
        # Its mean is what damping is relative to.
        of_mean = abs(mine[2].sum() / theirs[2].sum() - 1).item()
        errors[name] = (relative_error(mine, theirs), of_mean)
    return errors


def median_and_worst(errors):
    """Of E's errors, as of `errors_of`."""
    of_E = sorted(error for error, _ in errors.values())
    return of_E[len(of_E) // 2], of_E[-1]


def errors_table(compared):
    """A table of {what is compared: errors}."""
    rows = []
    for what, errors in compared.items():
        middle, worst = median_and_worst(errors)
        name = max(errors, key=lambda name, errors=errors: errors[name][0])
        of_mean = max(error for _, error in errors.values())
        rows.append([what, f"{middle:.1e}", f"{worst:.1e}", name, f"{of_mean:.1e}"])
    return table(["relative error of E", "median", "worst", "module", "mean Λ, worst"], rows)
