"""The tokens around a single user message: the model's chat template, or just the tokenizer's prefix."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from duo_id.common.errors import UserError, check
from duo_id.data.haystack import leading_tokens, tokenize

PLACEHOLDER = "What is the name of this place?"


@dataclass(frozen=True)
class Chat:
    """The tokens before and after a prompt.

    Attributes:
        before: the start of every context.
        after: between the question and the model's answer; empty without a chat template.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]


def plain(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """No chat template: only the tokens that the tokenizer itself puts in front of a text."""
    return Chat(tuple(leading_tokens(tokenizer)), ())


def split_chat(tokenizer: PreTrainedTokenizerBase, setting: str = "chat_template") -> Chat:
    """The model's chat template around one user message, up to where the model's answer begins.

    Args:
        tokenizer: of the model.
        setting: what chooses the template, for messages.

    Raises:
        UserError: there is no template, or it does not split into tokens before and after the message.
    """
    chosen, advice = f"{setting}=true", f"give {setting}=false"
    check(bool(tokenizer.chat_template), f"{chosen}: the model's tokenizer has none, {advice}")
    messages = [{"role": "user", "content": PLACEHOLDER}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
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
    return Chat(tuple(before), tuple(after))


def _template_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a template's text, its special tokens parsed as such."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []
