"""What requests and answers hold, as the OpenAPI description says it and requests are checked by.

`questions` says what a request asks.
"""

from typing import Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_validator,
)

from ekfac_dist.config.query import DampingScale, Normalize, Tokens
from ekfac_dist.config.refine import RefineMethod

MOST_ITERATIONS = 1000
MOST_MESSAGES = 1000


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class DampingRequest(_Strict):
    """The damping λ; see `damping` of `query`."""

    value: FiniteFloat = Field(0.1, ge=0, description="The multiple, or λ itself.")
    relative: bool = Field(True, description="Whether value is a multiple of each module's Λ.")
    scale: DampingScale = Field("mean", description="Of which mean of Λ it is a multiple.")


class RefineRequest(_Strict):
    """How query gradients are refined; see `refine` of `query`."""

    method: RefineMethod = Field(description="Conjugate gradients (cg), or ASTRA (astra).")
    iterations: int | None = Field(
        None, ge=1, le=MOST_ITERATIONS, description="Most steps; null: 20 with cg, else 300."
    )
    sequences: int | None = Field(
        None, ge=1, description="With cg, of how many training sequences G is the mean; null: 256."
    )
    tolerance: FiniteFloat | None = Field(
        None, ge=0, description="With cg, the relative residual that is enough; null: 0.001."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the sequences that are drawn.")
    batch: int | None = Field(
        None, ge=1, description="With astra, training sequences of a step; null: 16."
    )
    step_size: FiniteFloat | None = Field(
        None, ge=0, description="With astra, the length of a step; null: 0.1."
    )
    momentum: FiniteFloat | None = Field(
        None, ge=0, lt=1, description="With astra, what remains of a step in the next; null: 0.9."
    )


class QuestionRequest(_Strict):
    """What makes the model say the completion after the prompt?"""

    prompt: str = Field("", description="The text before the completion.")
    completion: str | None = Field(None, description="What the question is about.")
    against: str | None = Field(
        None, description="Another completion, for what makes the model say the one, not the other."
    )
    messages: list[dict[str, JsonValue]] | None = Field(
        None,
        max_length=MOST_MESSAGES,
        description="A chat, in place of prompt and completion; the question is about its last "
        "turn, the assistant's.",
    )
    top_k: int | None = Field(
        None, ge=1, description="Length of the list of the most positive sequences; null: 20."
    )
    bottom_k: int | None = Field(
        None, ge=0, description="Length of the list of the most negative; null: as top_k."
    )
    rescore: int | None = Field(
        None,
        ge=0,
        description="How many sequences at either end of the index's ranking are scored exactly; "
        "null: as many as the longer list has; 0: none.",
    )
    damping: FiniteFloat | DampingRequest | None = Field(
        None, description="The damping λ, or its value alone; null: the service's."
    )
    normalise: Normalize = Field(
        "none",
        validation_alias=AliasChoices("normalise", "normalize"),
        description="What scores are divided by.",
    )
    tokens: Tokens = Field("inputs", description="What a position's score is of.")
    refine: RefineRequest | None = Field(
        None, description="Whether query gradients are refined; null: not."
    )
    _spelling_of_normalise: str = PrivateAttr("normalise")

    @model_validator(mode="wrap")
    @classmethod
    def _note_spelling(
        cls, value: Any, validated: ModelWrapValidatorHandler["QuestionRequest"]
    ) -> "QuestionRequest":
        request = validated(value)
        if isinstance(value, dict) and "normalise" not in value and "normalize" in value:
            request._spelling_of_normalise = "normalize"
        return request

    @property
    def spelling_of_normalise(self) -> str:
        """The name under which `normalise` was given."""
        return self._spelling_of_normalise


class CompletionRequest(_Strict):
    """How does the model go on from the prompt?"""

    prompt: str = Field("", description="The text that it goes on from.")
    messages: list[dict[str, JsonValue]] | None = Field(
        None, max_length=MOST_MESSAGES, description="A chat, in place of prompt; it answers."
    )
    max_tokens: int = Field(32, ge=1, description="Most tokens of what it says.")
    temperature: FiniteFloat = Field(
        0.0, ge=0, le=10, description="0: the likeliest token each time; else 0.01 or more."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the draws at a temperature above 0.")


class Problem(BaseModel):
    """Why there is no answer."""

    detail: str = Field(description="A sentence.")


_INDEX = "Index of the sequence in the training data, from 0."
_TOKENS = "The text of each of its T + 1 tokens."
_DOCUMENT = "Index of the document that it is a part of, where sequences are parts of documents."
_FIRST_TOKEN = "Where in the document it begins, in tokens."


class Row(BaseModel):
    """One sequence of a list."""

    rank: int | None = Field(description="Place in its list, from 1; null: in none.")
    in_list: Literal["top", "bottom"] | None = Field(
        None,
        description='Of a "sequence" event: the list of the index\'s ranking that has it; null: '
        "none.",
    )
    index: int = Field(description=_INDEX)
    score: float = Field(
        description="Its influence, in nats as meaning.scale says: the exact score, or the index's."
    )
    share: float | None = Field(
        description="score over the sum of all positive scores; of a negative one over that of all "
        "negative scores' absolute values."
    )
    scan_score: float | None = Field(description="The index's score.")
    exact: bool = Field(description="Whether score is exact.")
    text: str = Field(description="Its text.")
    tokens: list[str] = Field(description=_TOKENS)
    document: int | None = Field(None, description=_DOCUMENT)
    first_token: int | None = Field(None, description=_FIRST_TOKEN)


class Detail(BaseModel):
    """One sequence's exact scores by position, layer and module; each sums to its score."""

    token_scores: list[float] = Field(description="Of each of its T positions.")
    layer_token_scores: list[list[float]] = Field(description="Of each layer, at each position.")
    module_scores: list[float] = Field(description="Of each module.")
    carriers: int = Field(
        description="The fewest tokens that hold nine tenths of the sum of |token scores|."
    )
    few: bool = Field(description="Whether these are few: 5 at most, and a tenth of all at most.")
    strongest: int = Field(
        description="First token of the run of tokens with the largest |sum of scores|."
    )


class QueryTokens(BaseModel):
    """The tokens of a completion after its prompt."""

    completion: str = Field(description="The completion.")
    tokens: list[str] = Field(description="The text of each token of prompt and completion.")
    is_label: list[bool] = Field(description="Whether the likelihood of each is explained.")
    split_token: str | None = Field(
        description="The token that begins in the prompt and ends in the completion, if there is "
        "one; it carries no label."
    )
    nats: float = Field(description="−log p(completion | prompt).")


class AskedQuery(QueryTokens):
    """The question's tokens."""

    prompt: str = Field(description="The prompt.")
    against: QueryTokens | None = Field(description="The other completion; null: none was given.")


class Agreement(BaseModel):
    """How well the index's scores agree with the exact ones."""

    spearman_top: float | None = Field(
        description="Rank correlation of both over the sequences with the index's highest scores; "
        "null: not defined."
    )
    overlap: float | None = Field(
        description="Fraction of the lists by exact scores that the index's lists have too, at "
        "most; null: no more sequences are scored exactly than are listed."
    )
    scored_again: int = Field(description="How many sequences are scored exactly.")


class AnswerModel(BaseModel):
    """An answer, or with stage "ranking" the index's part of it."""

    id: str = Field(description="By which the answer can be had again.")
    question: dict[str, Any] = Field(description="The request, with what it left out.")
    model: str = Field(description="Name of the model.")
    num_sequences: int = Field(description="Sequences of the index.")
    layers: list[str] = Field(description="Names of the layers, as details have them.")
    modules: list[str] = Field(description="Names of the modules, as details have them.")
    module_layers: list[int] = Field(description="Of each module, which of the layers it is in.")
    training_size: int | None = Field(
        description="Number of sequences that the model was trained on, where scores are in nats "
        "for one sequence; null: not known."
    )
    meaning: dict[str, str] = Field(description="What sign, scale and share of scores mean.")
    index: dict[str, Any] = Field(description="The index: its rank, dtype and fingerprint.")
    query: AskedQuery
    stage: Literal["ranking", "exact"] = Field(description="Whose scores the lists are by.")
    top: list[Row] = Field(description="The most positive sequences.")
    bottom: list[Row] = Field(description="The most negative sequences.")
    details: dict[str, Detail] = Field(
        description="Of each listed sequence that is scored exactly, by its index as text."
    )
    distribution: dict[str, Any] = Field(
        description="How the index's scores of all sequences are spread: their number, mean, "
        "median, deviation, extremes and a histogram, and the share that the strongest hold."
    )
    agreement: Agreement | None = Field(description="null: nothing is scored exactly.")
    refined: str | None = Field(
        description="What was solved, and whether it converged; null: query gradients are not "
        "refined."
    )
    seconds: dict[str, float] = Field(description="Duration of waiting, ranking and exact scoring.")


class SequenceModel(BaseModel):
    """A training sequence."""

    index: int = Field(description=_INDEX)
    text: str = Field(description="Its text.")
    tokens: list[str] = Field(description=_TOKENS)
    is_label: list[bool] = Field(description="Whether each token is predicted in training.")
    document: int | None = Field(None, description=_DOCUMENT)
    first_token: int | None = Field(None, description=_FIRST_TOKEN)


class CompletionModel(BaseModel):
    """How the model goes on."""

    text: str = Field(description="What it says.")
    tokens: list[str] = Field(description="The text of each of its tokens.")
    finish: Literal["length", "end"] = Field(
        description="Why it stops: max_tokens were said, or the model ended by itself."
    )
