"""Refines query gradients: solves (G + D) x = ∇log p(q) over all modules together.

G is the Gauss–Newton matrix of the loss, with the softmax's exact Hessian and without any
approximation between modules: a mean over training sequences of Σ_t Jᵀ(diag p_t − p_t p_tᵀ)J. D is
each module's damping λ. The factors' (E + D)⁻¹ is the preconditioner, and its solution the start.

    cg       the same sequences for all products and queries, drawn by a seed
    astra    other sequences at each step

The queries of a block are solved for together, as many as fit the memory budget with the four
vectors that a solve holds of each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ekfac_dist.config import ScoresConfig
from ekfac_dist.curvature import iterative, kronecker, products
from ekfac_dist.curvature.float32_products import precisely
from ekfac_dist.curvature.iterative import Solution, Vectors
from ekfac_dist.errors import NonFiniteError
from ekfac_dist.influence.blocks import refined_at_a_time
from ekfac_dist.influence.context import ScoringContext
from ekfac_dist.influence.gauss_newton import GaussNewton
from ekfac_dist.influence.preconditioned import (
    PreparedQueries,
    WholeGradients,
    empty_gradients,
)
from ekfac_dist.influence.queries import QuerySet
from ekfac_dist.influence.query_gradients import prepare
from ekfac_dist.influence.refined import Refined
from ekfac_dist.influence.refinement_sample import RefinementSample
from ekfac_dist.models.capture.linearised import Linearisation
from ekfac_dist.runtime.progress import Progress


@dataclass
class Refinement:
    """Computes refined query gradients.

    Attributes:
        context: Model, factors, damping, workers, and how gradients are refined.
        sample: The training sequences that G is of.
        config: The scores that are asked for; its memory budget.
        residuals: Takes ‖∇ − (G + D) x‖ / ‖∇‖ of every query group, of the start and after each
            step, NaN after its last one [Q, steps + 1].
        go_on: As of `GaussNewton`.
    """

    context: ScoringContext
    sample: RefinementSample
    config: ScoresConfig
    residuals: Tensor
    go_on: Callable[[], bool] | None = None

    @property
    def result(self) -> Refined:
        """How query gradients are refined, with the residuals, which are filled in later."""
        settings, sample = self.context.refine, self.sample
        num_sequences = len(sample.of_product(0))
        return Refined(settings, num_sequences, sample.num_training, self.residuals)

    @property
    def num_rows(self) -> int:
        """Q, the number of query groups."""
        return len(self.residuals)

    def in_steps_of(self, step_tokens: int) -> "Refinement":
        """The same in steps of at most so many positions, padding included."""
        return replace(self, sample=replace(self.sample, step_tokens=step_tokens))

    def prepare(
        self, name: str, queries: QuerySet, groups: Sequence[int], rank: int | None
    ) -> PreparedQueries:
        """Computes the refined gradients of a block of query groups; a collective.

        Args:
            name: What their passes are called in progress and errors.
            queries: All queries.
            groups: Indices of the block's query groups.
            rank: Rank of the gradients, reduced to a module's own where that is less; None: whole.

        Returns:
            x in place of the factors' solution.

        Raises:
            ModelError: If the model's backward cannot be differentiated.
            NonFiniteError: If NaN or infinity appears.
            Preempted: If SIGTERM has come; nothing of the block is saved.
            ScanStopped: If `go_on` is false.
        """
        groups = list(groups)
        at_a_time = refined_at_a_time(self.context, self.config, rank)
        parts = [groups[k : k + at_a_time] for k in range(0, len(groups), at_a_time)]
        if rank is None and len(parts) == 1:
            return self._whole(name, queries, groups)
        return self._joined(name, queries, parts, rank)

    def _joined(
        self, name: str, queries: QuerySet, parts: list[list[int]], rank: int | None
    ) -> PreparedQueries:
        """The refined gradients of several parts of a block."""
        context, groups = self.context, [group for part in parts for group in part]
        joined = PreparedQueries(
            groups,
            {m.name: empty_gradients(context, len(groups), m, rank) for m in context.modules},
            context.zeros(len(groups), dtype=torch.float64),
        )
        for number, part in enumerate(parts, start=1):
            suffix = f" (solve {number}/{len(parts)})" if len(parts) > 1 else ""
            solved = self._whole(name + suffix, queries, part)
            slots = slice(groups.index(part[0]), groups.index(part[-1]) + 1)
            joined.losses.update(solved.losses)
            joined.self_influence[slots] = solved.self_influence
            for module_name, gradients in joined.gradients.items():
                (matrices_QOI,) = solved.gradients[module_name].tensors()
                for slot, matrix_OI in zip(range(len(groups))[slots], matrices_QOI, strict=True):
                    if isinstance(gradients, WholeGradients):
                        gradients.put_(slot, matrix_OI)
                        continue
                    left_Or, right_Ir = products.low_rank(matrix_OI, gradients.left_QOr.shape[-1])
                    gradients.left_QOr[slot], gradients.right_QIr[slot] = left_Or, right_Ir
        return joined

    def _whole(self, name: str, queries: QuerySet, groups: list[int]) -> PreparedQueries:
        """The whole refined gradients of some query groups, in one solve."""
        context = self.context
        in_parameters = replace(context, in_eigenbasis=False)
        prepared = prepare(name, in_parameters, queries, groups, None, solved=False)
        gradients = {name: of.tensors()[0] for name, of in prepared.gradients.items()}
        solution = self._solved_by_all(name.replace("queries", "refine"), gradients)
        self.residuals[groups] = torch.nan
        self.residuals[groups, : solution.residuals.shape[1]] = solution.residuals
        if context.in_eigenbasis:
            self._rotate(solution.vectors)
        refined = {name: WholeGradients(x_QOI) for name, x_QOI in solution.vectors.items()}
        return PreparedQueries(groups, {**refined}, prepared.self_influence, prepared.losses)

    def _rotate(self, vectors: Vectors) -> None:
        """Rotates a block into the eigenbasis, in place."""
        fitted = self.context.fitted
        for module in self.context.modules:
            for matrix_OI in vectors[module.name]:
                bases = fitted.output_basis(module), fitted.input_basis(module)
                matrix_OI.copy_(kronecker.rotate(matrix_OI, *bases))

    def _solved_by_all(self, name: str, gradients: Vectors) -> Solution:
        """As `_solve`; that it diverges is agreed on, as all workers see it at the same step."""
        solution, diverged = None, None
        try:
            solution = self._solve(name, gradients)
        except NonFiniteError as error:
            diverged = error
        with self.context.world.agree():
            if diverged is not None:
                raise diverged
        assert solution is not None
        return solution

    def _solve(self, name: str, gradients: Vectors) -> Solution:
        """Solves for a block of right-hand sides, which are overwritten.

        Args:
            name: The solve's name in progress.
            gradients: ∇ [Q, O, I] of each module.
        """
        context, settings = self.context, self.context.refine
        progress = self._progress(name)
        with (
            precisely(context.world.device),
            progress,
            Linearisation(
                context.model, context.modules, context.dtype, context.task
            ) as linearisation,
        ):
            product = GaussNewton(context, self.sample, linearisation, progress.update, self.go_on)
            if settings.method == "cg":
                return iterative.conjugate_gradients(
                    product,
                    self._precondition,
                    gradients,
                    iterations=settings.num_iterations,
                    tolerance=settings.effective_tolerance,
                )
            return iterative.astra(
                product,
                self._precondition,
                gradients,
                iterations=settings.num_iterations,
                step_size=settings.effective_step_size,
                momentum=settings.effective_momentum,
            )

    def _precondition(self, of: Vectors, into: Vectors) -> None:
        """Overwrites a block with its products with (E + D)⁻¹."""
        context = self.context
        for module in context.modules:
            bases = context.fitted.output_basis(module), context.fitted.input_basis(module)
            solved_QOI = kronecker.solve(of[module.name], *bases, context.damped(module))
            into[module.name].copy_(solved_QOI)

    def _progress(self, name: str) -> Progress:
        """Progress of a solve that takes all of its steps."""
        context, sample = self.context, self.sample
        lengths, products = sample.sequences.num_positions, range(context.refine.num_iterations + 1)
        own = [[i for b in sample.own_batches(context.world, k) for i in b] for k in products]
        everyones = [sample.of_product(k) for k in products]
        return Progress(
            name,
            total=sum(int(lengths[indices].sum()) for indices in own),
            unit="tokens",
            num_sequences=sum(map(len, own)),
            whole=(
                sum(int(lengths[indices].sum()) for indices in everyones),
                sum(map(len, everyones)),
            ),
            enabled=context.show_progress and context.world.is_main,
        )
