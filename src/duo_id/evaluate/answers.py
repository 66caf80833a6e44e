"""What a model said about one context: logits of the right answers, generated answers, and free text."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Written:
    """What a model wrote by itself after the first question that follows a context, greedily.

    Attributes:
        tokens: up to the one that ends the text, or as many as were asked for.
        logits: (tokens, vocabulary), from which each was chosen.
    """

    tokens: list[int]
    logits: Tensor


@dataclass
class Answers:
    """A model's answers to one item.

    Attributes:
        logits: one tensor (answer tokens, vocabulary) per question, teacher-forced, in the model's dtype.
        generated: the tokens it generated for each question, or None where nothing was generated.
        bytes: of the context's keys and values in the cache.
        total_bytes: the same at the end of each generated answer: of context, question and answer, in turns of the
            conversation so far; None where nothing was generated.
        written: what it wrote, where that was asked for and a question follows the context.
        along: (tokens, vocabulary), its logits along the text that it was given to follow.
    """

    logits: list[Tensor]
    generated: list[list[int] | None]
    bytes: int = 0
    total_bytes: list[int | None] = field(default_factory=list)
    written: Written | None = None
    along: Tensor | None = None
