import pytest
from transformers import PreTrainedTokenizerBase

from duo_id.common.errors import UserError
from duo_id.data.chat import Chat, plain, split_chat
from duo_id.data.haystack import leading_tokens, tokenize
from duo_id.models.loading import byte_tokenizer
from tests.data.conftest import TOKENIZERS, byte_level_bpe, metaspace
from tests.evaluate.tasks.making import tokenizer_of

USER = "{% for message in messages %}<s>[{{ message['role'] }}]\n{{ message['content'] }}</s>\n{% endfor %}"
ANSWER = "{% if add_generation_prompt %}<s>[assistant]\n{% endif %}"


def with_template(template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = byte_level_bpe()
    tokenizer.chat_template = template
    return tokenizer


def test_a_message_stands_between_the_two_parts() -> None:
    tokenizer = with_template(USER + ANSWER)
    chat = split_chat(tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert chat.before == (bos, *tokenize(tokenizer, "[user]\n"))
    assert chat.after == (eos, *tokenize(tokenizer, "\n"), bos, *tokenize(tokenizer, "[assistant]\n"))


def test_what_stands_between_an_answer_and_the_next_message() -> None:
    tokenizer = with_template(USER + ANSWER)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert split_chat(tokenizer).between == (eos, *tokenize(tokenizer, "\n"), bos, *tokenize(tokenizer, "[user]\n"))
    assert plain(tokenizer).between == ()


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1]['content'] }}" + ANSWER,
        "{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}" + USER + ANSWER,
    ],
    ids=["forgets-answers", "raises"],
)
def test_a_template_of_a_single_message_has_nothing_between(template: str) -> None:
    assert split_chat(with_template(template)).between is None


def test_reasoning_models_are_asked_not_to_think() -> None:
    empty = "{% if enable_thinking is false %}<think></think>{% endif %}"
    tokenizer = with_template(USER + ANSWER + empty)
    assert tokenizer.decode(split_chat(tokenizer).after).endswith("<think></think>")


@pytest.mark.parametrize("message", ["What is a mill?", "Say </s> twice, then\n\nstop.", "1 2 3"])
def test_parts_and_message_are_the_tokens_of_the_whole(message: str) -> None:
    tokenizer = with_template(USER + ANSWER)
    chat = split_chat(tokenizer)
    templated = tokenizer.apply_chat_template(
        [{"role": "user", "content": "@"}], add_generation_prompt=True, tokenize=False
    )
    before, after = templated.split("@")
    assert tokenizer.decode(chat.before) == before
    assert tokenizer.decode(chat.after) == after
    ids = [*chat.before, *tokenize(tokenizer, message), *chat.after]
    assert ids.count(tokenizer.eos_token_id) == 1, "what a text holds is no special token"
    assert tokenizer.decode(ids) == before + message + after


def test_the_embedded_models_template_is_split() -> None:
    tokenizer = tokenizer_of("smollm2")
    chat = split_chat(tokenizer)
    message = [{"role": "user", "content": "Name a river."}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == [*chat.before, *tokenize(tokenizer, "Name a river."), *chat.after]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has none"),
        ("{{ raise_exception('only\nsystem messages') }}", r"rejects a single user message \(only system messages\)"),
        ("{{ messages[0]['content'", "rejects a single user message"),
        (USER + USER, "repeats a message 2 times"),
        ("<s>", "repeats a message 0 times"),
        ("{{ messages[0]['content'] | upper }}", "repeats a message 0 times"),
        ("so{{ messages[0]['content'].strip() }}", None),
    ],
)
def test_templates_that_do_not_work_are_refused(template: str | None, message: str | None) -> None:
    if message is None:
        tokenizer = metaspace()  # every piece of text gets a space of its own
        tokenizer.chat_template, message = template, "does not tokenize separately"
    else:
        tokenizer = with_template(template)
    with pytest.raises(UserError, match=message) as caught:
        split_chat(tokenizer)
    assert str(caught.value).startswith("chat_template=true: ")
    assert str(caught.value).endswith("give chat_template=false")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_plain_is_what_the_tokenizer_puts_in_front(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    assert plain(tokenizer) == Chat(tuple(leading_tokens(tokenizer)), ())
    assert tokenizer("text")["input_ids"][: len(plain(tokenizer).before)] == list(plain(tokenizer).before)


def test_plain_of_the_byte_tokenizer_is_its_bos() -> None:
    tokenizer = byte_tokenizer()
    assert plain(tokenizer) == Chat((tokenizer.bos_token_id,), ())
    assert plain(TOKENIZERS["bytes_only"]) == Chat((), ())
