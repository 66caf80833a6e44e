"""The tokens around a user message: the model's chat template, or just the tokenizer's prefix."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from duo_id.common.errors import UserError, check
from duo_id.data.haystack import leading_tokens, tokenize

PLACEHOLDER = "What is the name of this place?"
REPLY, NEXT = "It is called Rosehill.", "Who lives there?"
TEMPLATED: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}


@dataclass(frozen=True)
class Chat:
    """The tokens before and after a prompt.

    Attributes:
        before: the start of every context.
        after: between the question and the model's answer; empty without a chat template.
        between: between the model's answer and the user's next message; None: the template takes no second one.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    between: tuple[int, ...] | None = ()


def plain(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """No chat template: only the tokens that the tokenizer itself puts in front of a text."""
    return Chat(tuple(leading_tokens(tokenizer)), ())


def split_chat(tokenizer: PreTrainedTokenizerBase, setting: str = "chat_template", thinking: bool = False) -> Chat:
    """The model's chat template around one user message, up to where the model's answer begins.

    Args:
        tokenizer: of the model.
        setting: what chooses the template, for messages.
        thinking: let a model that can reason first, where its template asks.

    Raises:
        UserError: there is no template, or it does not split into tokens before and after the message.
    """
    chosen, advice = f"{setting}=true", f"give {setting}=false"
    check(bool(tokenizer.chat_template), f"{chosen}: the model's tokenizer has none, {advice}")
    messages = [{"role": "user", "content": PLACEHOLDER}]
    try:
        text = str(tokenizer.apply_chat_template(messages, enable_thinking=thinking, **TEMPLATED))
    except Exception as error:  # templates are programs and may raise anything
        reason = " ".join(str(error).split())
        raise UserError(f"{chosen}: the model's template rejects a single user message ({reason}), {advice}") from error
    check(
        text.count(PLACEHOLDER) == 1,
        f"{chosen}: the model's template repeats a message {text.count(PLACEHOLDER)} times, {advice}",
    )
    before, after = (_template_tokens(tokenizer, piece) for piece in text.split(PLACEHOLDER))
    check(
        [*before, *tokenize(tokenizer, PLACEHOLDER), *after] == _template_tokens(tokenizer, text),
        f"{chosen}: the model's template does not tokenize separately from the message in it, {advice}",
    )
    return Chat(tuple(before), tuple(after), _between(tokenizer, thinking))


def _between(tokenizer: PreTrainedTokenizerBase, thinking: bool) -> tuple[int, ...] | None:
    """The tokens between an answer and the next message, or None where the template has no place for these."""
    said = zip(("user", "assistant", "user"), (PLACEHOLDER, REPLY, NEXT), strict=True)
    messages = [{"role": role, "content": content} for role, content in said]
    try:
        text = str(tokenizer.apply_chat_template(messages, enable_thinking=thinking, **TEMPLATED))
    except Exception:  # as above
        return None
    if text.count(REPLY) != 1 or text.count(NEXT) != 1:
        return None
    return tuple(_template_tokens(tokenizer, text.partition(REPLY)[2].partition(NEXT)[0]))


def _template_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a template's text, its special tokens parsed as such."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []
