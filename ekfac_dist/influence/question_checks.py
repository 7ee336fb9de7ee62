"""What a session refuses of a question before it computes anything, and the question's tokens."""

import threading
from collections.abc import Sequence

from ekfac_dist.config import ScoresConfig, require_refinable
from ekfac_dist.curvature.damping import Damping
from ekfac_dist.errors import ConfigError, ModelError
from ekfac_dist.influence.asking import Question
from ekfac_dist.influence.lists import list_lengths
from ekfac_dist.influence.open_model import OpenModel
from ekfac_dist.influence.queries import QuerySet, tokenize_queries
from ekfac_dist.influence.refinement_start import require_refinable_model
from ekfac_dist.models.capture.tasks import CAUSAL_LM
from ekfac_dist.models.load.pretrained import context_length
from ekfac_dist.models.sharding import is_sharded
from ekfac_dist.passes.sequences import check_sequences


class QuestionChecks:
    """Refuses questions that an open model cannot answer; no collective, in any thread.

    Args:
        opened: The open model.
        lock: Is held while the tokenizer is used.
        shares_out: Whether the factors are shared out over the workers.
    """

    def __init__(self, opened: OpenModel, lock: threading.Lock, *, shares_out: bool) -> None:
        self._opened, self._lock, self._shares_out = opened, lock, shares_out

    def scores(self, question: Question) -> ScoresConfig:
        """The scores that a question asks for.

        Raises:
            ConfigError: If they cannot be meant.
            ModelError: If its gradients cannot be refined.
        """
        opened = self._opened
        scores = ScoresConfig(
            normalize=question.normalize,
            top_k=question.top_k,
            bottom_k=question.bottom_k,
            rescore=question.rescore,
            per_token="top" if question.rescore else "none",
            tokens=question.tokens if question.rescore else "inputs",
        )
        require_refinable(scores, question.refine)
        require_refinable_model(opened.model, CAUSAL_LM, question.refine)
        if question.refine.is_on and self._shares_out:
            raise ConfigError(
                f"refine.method is {question.refine.method}, for which every worker holds all "
                "factors, but those of this service are shared out, as they are too large for one; "
                "ask without refinement."
            )
        if scores.tokens == "outputs" and is_sharded(opened.model):
            raise ModelError(
                "tokens is outputs, but the model is sharded over the workers by FSDP, which "
                "gathers weights for one backward alone; ask with tokens: inputs."
            )
        list_lengths(scores, len(opened.train))
        Damping(**vars(question.damping)).require_used(opened.factors.modules)
        return scores

    def tokens(self, questions: Sequence[Question]) -> QuerySet:
        """The tokens of questions.

        Raises:
            DataError: If one has none to predict, or the model cannot read one.
        """
        opened = self._opened
        with self._lock:
            texts = [question.query for question in questions]
            queries = tokenize_queries(texts, opened.tokenizer, context_length(opened.model))
        check_sequences(opened.model, queries.sequences, "shorten the query")
        return queries
