"""The gradient index: every training sequence's gradient, kept as a few outer products a module.

    G_n ≈ Σ_c u_c v_cᵀ        in the eigenbasis of one store of factors, which is a rotation

So a score ⟨P, G_n⟩ with any preconditioned query gradient P, whatever its damping, is
Σ_c u_cᵀ P v_c: queries are answered without running the model over the training data again.

    layout       files, names, sizes, the manifest
    norms        norms of whole gradients at any damping, from a few that are stored
    build        the pass that makes the products and norms
    writer       the directory while it is being made; going on after an interruption
    reader       a finished index, checked
    scan         scores from an index, by the observer that scores the data
    inputs, making, run   `index`, the command
"""
