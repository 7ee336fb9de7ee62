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

    value: FiniteFloat = Field(0.1, ge=0)
    relative: bool = True
    scale: DampingScale = "mean"


class RefineRequest(_Strict):
    """How query gradients are refined; see `refine` of `query`."""

    method: RefineMethod
    iterations: int | None = Field(None, ge=1, le=MOST_ITERATIONS)
    sequences: int | None = Field(None, ge=1)
    tolerance: FiniteFloat | None = Field(None, ge=0)
    seed: int = Field(0, ge=0, lt=2**63)
    batch: int | None = Field(None, ge=1)
    step_size: FiniteFloat | None = Field(None, ge=0)
    momentum: FiniteFloat | None = Field(None, ge=0, lt=1)


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

    prompt: str = ""
    messages: list[dict[str, JsonValue]] | None = Field(None, max_length=MOST_MESSAGES)
    max_tokens: int = Field(32, ge=1)
    temperature: FiniteFloat = Field(
        0.0, ge=0, le=10, description="0: the likeliest token each time; else 0.01 or more."
    )
    seed: int = Field(0, ge=0, lt=2**63)


class Problem(BaseModel):
    """Why there is no answer."""

    detail: str = Field(description="A sentence.")


class Row(BaseModel):
    """One sequence of a list."""

    rank: int | None
    index: int
    score: float
    share: float | None
    scan_score: float | None
    exact: bool
    text: str
    tokens: list[str]
    document: int | None = None
    first_token: int | None = None


class Detail(BaseModel):
    """One sequence's scores by position, layer and module."""

    token_scores: list[float]
    layer_token_scores: list[list[float]]
    module_scores: list[float]
    carriers: int
    few: bool
    strongest: int


class QueryTokens(BaseModel):
    """The tokens of a completion after its prompt."""

    completion: str
    tokens: list[str]
    is_label: list[bool]
    split_token: str | None
    nats: float


class AskedQuery(QueryTokens):
    """The question's tokens."""

    prompt: str
    against: QueryTokens | None


class Agreement(BaseModel):
    """How well the index's scores agree with the exact ones."""

    spearman_top: float | None
    overlap: float | None
    scored_again: int


class AnswerModel(BaseModel):
    """An answer, or with stage "ranking" the index's part of it."""

    id: str
    question: dict[str, Any]
    model: str
    num_sequences: int
    layers: list[str]
    modules: list[str]
    module_layers: list[int]
    training_size: int | None
    meaning: dict[str, str]
    index: dict[str, Any]
    query: AskedQuery
    stage: Literal["ranking", "exact"]
    top: list[Row]
    bottom: list[Row]
    details: dict[str, Detail]
    distribution: dict[str, Any]
    agreement: Agreement | None
    refined: str | None
    seconds: dict[str, float]


class SequenceModel(BaseModel):
    """A training sequence."""

    index: int
    text: str
    tokens: list[str]
    is_label: list[bool]
    document: int | None = None
    first_token: int | None = None


class CompletionModel(BaseModel):
    """How the model goes on."""

    text: str
    tokens: list[str]
    finish: Literal["length", "end"]
