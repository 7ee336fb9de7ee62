"""Kronecker-factored curvature as pure functions of tensors.

Knows no processes, files, models or Hugging Face, and can be read, tested and reused without them.

Shape suffixes: M counted positions, I and O a module's input and output size (I includes the bias
coordinate, last, where there is a bias; i is the input size without it), n the size of a factor,
N sequences, T positions of one sequence, Q queries. A weight and its gradient are OI. Eigenvectors
stand in columns.

    A = 1/M Σ a aᵀ = Q_A diag(λ_A) Q_Aᵀ        S = 1/M Σ g gᵀ = Q_S diag(λ_S) Q_Sᵀ
    Λ = 1/N Σ_n (Q_Sᵀ G_n Q_A)∘²               G_n = Σ_t g_t a_tᵀ
    F ≈ E = (Q_S ⊗ Q_A) diag(vec Λ) (Q_S ⊗ Q_A)ᵀ

(George et al. 2018, eq. 7–9; Grosse et al. 2023, eq. 16–20.)
"""
