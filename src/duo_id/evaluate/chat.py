"""What stands around a single message of a user: the model's chat template, or what the tokenizer puts in front."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from duo_id.common.errors import UserError, check
from duo_id.data.haystack import leading_tokens, tokenize

PLACEHOLDER = "What is the name of this place?"
WITHOUT = "give chat_template=false"


@dataclass(frozen=True)
class Chat:
    """The tokens before and after a text that a model is asked.

    Attributes:
        before: with which every context begins.
        after: between the question and the model's answer; empty without a chat template.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]


def plain(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """No chat template: only what the tokenizer itself puts in front of a text."""
    return Chat(tuple(leading_tokens(tokenizer)), ())


def split_chat(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """The model's chat template around one message of a user, up to where the model's answer begins.

    Args:
        tokenizer: of the model.

    Raises:
        UserError: there is no template, or it is none that a message can be put into token by token.
    """
    check(bool(tokenizer.chat_template), f"chat_template=true: the model's tokenizer has none, {WITHOUT}")
    messages = [{"role": "user", "content": PLACEHOLDER}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates are programs, and raise what they like
        reason = " ".join(str(error).split())
        raise UserError(
            f"chat_template=true: the model's template takes no single message ({reason}), {WITHOUT}"
        ) from error
    check(
        text.count(PLACEHOLDER) == 1,
        f"chat_template=true: the model's template gives a message {text.count(PLACEHOLDER)} times, {WITHOUT}",
    )
    before, after = (_special(tokenizer, piece) for piece in text.split(PLACEHOLDER))
    check(
        [*before, *tokenize(tokenizer, PLACEHOLDER), *after] == _special(tokenizer, text),
        f"chat_template=true: the model's template cannot be split cleanly from the message in it, {WITHOUT}",
    )
    return Chat(tuple(before), tuple(after))


def _special(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a template's text, in which special tokens are what they seem."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []
