"""LongBench (Bai et al. 2023, arXiv 2308.14508) and LongBench v2 (Bai et al. 2024, arXiv 2412.15204)."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import Field

from duo_id.common.documents import Data
from duo_id.common.errors import UserError
from duo_id.evaluate.published.building import Entry, Form
from duo_id.evaluate.published.sources import (
    Row,
    Texts,
    from_hub,
    hub_split,
    hub_zip,
    local_files,
    positive,
    read_json,
    read_rows,
    texts,
)

HUB, HUB_V2 = "zai-org/LongBench", "zai-org/LongBench-v2"
V2 = "longbench-v2"

# Wordings of our own, one for each kind of task: the authors' prompts are theirs. What stands before {context} is read
# with it, what follows is the question.
QA = (
    "Below is a text, and after it a question about the text.\n\n{context}\n\n"
    "Answer with a few words from the text above and nothing else.\nQuestion: {input}\nAnswer:"
)
QA_ZH = "下面是一段文字和一个问题。\n\n{context}\n\n请根据上文用几个词回答。\n问题：{input}\n答案："
SUMMARY = "Below is a text.\n\n{context}\n\nSummarise the text above on about one page.\nSummary:"
SUMMARY_ZH = "下面是一段文字。\n\n{context}\n\n请概括上文的主要内容。\n概括："
QUERY = "Below is the record of a meeting.\n\n{context}\n\nAnswer in a few sentences.\nQuestion: {input}\nAnswer:"
EXAMPLES = "Go on as the examples do.\n\n{context}\n{input}"
EXAMPLES_ZH = "请按照下面例子的方式继续。\n\n{context}\n{input}"
FIND = (
    "Below are numbered paragraphs.\n\n{context}\n\nThis is a summary of one of them:\n\n{input}\n\n"
    "Which paragraph is it? Answer like this: Paragraph 1.\nAnswer:"
)
FIND_ZH = (
    "下面是编号的段落。\n\n{context}\n\n以下是其中一段的摘要：\n\n{input}\n\n"
    "它是哪一段的摘要？请这样回答：段落1。\n答案："
)
COUNT = (
    "Below are numbered paragraphs, some of which occur several times.\n\n{context}\n\n"
    "How many different paragraphs are there? Answer with the number alone.\nAnswer:"
)
CODE = "Go on with this code.\n\n{context}{input}\nThe next line is:\n"
CHOICE = (
    "Below is a text, and after it a question about the text with four choices.\n\n{context}\n\n"
    "Question: {question}\n(A) {choice_A}\n(B) {choice_B}\n(C) {choice_C}\n(D) {choice_D}\n"
    "Which choice is right? Name its letter."
)
CUE = "The correct answer is ("

# Metric, new tokens and first line only: as in the authors' eval.py and dataset2maxlen.json. Neither few-shot examples
# nor code are put into a chat template, as in their pred.py.
DATA_SETS: dict[str, tuple[str, Form]] = {
    "narrativeqa": (QA, Form("qa_f1", 128)),
    "qasper": (QA, Form("qa_f1", 128)),
    "multifieldqa_en": (QA, Form("qa_f1", 64)),
    "multifieldqa_zh": (QA_ZH, Form("qa_f1_zh", 64)),
    "hotpotqa": (QA, Form("qa_f1", 32)),
    "2wikimqa": (QA, Form("qa_f1", 32)),
    "musique": (QA, Form("qa_f1", 32)),
    "dureader": (QA_ZH, Form("rouge_l_zh", 128)),
    "gov_report": (SUMMARY, Form("rouge_l", 512)),
    "qmsum": (QUERY, Form("rouge_l", 512)),
    "multi_news": (SUMMARY, Form("rouge_l", 512)),
    "vcsum": (SUMMARY_ZH, Form("rouge_l_zh", 512)),
    "trec": (EXAMPLES, Form("classification", 64, "\n", chat=False)),
    "triviaqa": (EXAMPLES, Form("qa_f1", 32, "\n", chat=False)),
    "samsum": (EXAMPLES, Form("rouge_l", 128, "\n", chat=False)),
    "lsht": (EXAMPLES_ZH, Form("classification", 64, "\n", chat=False)),
    "passage_count": (COUNT, Form("count", 32)),
    "passage_retrieval_en": (FIND, Form("retrieval", 32)),
    "passage_retrieval_zh": (FIND_ZH, Form("retrieval", 32)),
    "lcc": (CODE, Form("code", 64, chat=False)),
    "repobench-p": (CODE, Form("code", 64, chat=False)),
}


class Asked(Data):
    """A row of LongBench."""

    context: str
    input: str
    answers: Texts


class Classified(Asked):
    """A row of a data set of classification."""

    all_classes: Annotated[list[str], Field(min_length=1)]


class Choice(Data):
    """A row of LongBench v2."""

    context: str
    question: str
    choice_A: str
    choice_B: str
    choice_C: str
    choice_D: str
    answer: Literal["A", "B", "C", "D"]


def read_longbench(name: str, folder: str | None) -> tuple[Form, list[Entry]]:
    """One of the data sets of LongBench.

    Args:
        name: a key of `DATA_SETS`.
        folder: a local one with NAME.jsonl, and perhaps the authors' dataset2prompt.json and dataset2maxlen.json, which
            then give the prompt and the length of answers; None: the hub.

    Raises:
        UserError: the data is missing or not what it should be.
    """
    template, form = DATA_SETS[name]
    template = _template(name, read_json(folder, "dataset2prompt.json").get(name, template))
    tokens = read_json(folder, "dataset2maxlen.json").get(name, form.max_new_tokens)
    form = replace(form, max_new_tokens=positive(f"dataset2maxlen.json: {name}", tokens))
    schema = Classified if form.metric == "classification" else Asked
    rows = _rows(name, folder, HUB, lambda: hub_zip(HUB, "data.zip", f"data/{name}.jsonl"), schema)
    return form, [_entry(f"longbench/{name}", template, row, _references(row, form)) for row in rows]


def read_longbench_v2(folder: str | None) -> tuple[Form, list[Entry]]:
    """LongBench v2, whose answers are letters.

    Args:
        folder: a local one with data.json; None: the hub.

    Raises:
        UserError: the data is missing or not what it should be.
    """
    rows = _rows("data", folder, HUB_V2, lambda: hub_split(HUB_V2, "train"), Choice, parts=False)
    return Form("choice", 128), [_entry(V2, CHOICE, row, (row["answer"],), CUE) for row in rows]


def _rows(
    name: str,
    folder: str | None,
    repository: str,
    download: Callable[[], list[Row]],
    schema: type[Data],
    parts: bool = True,
) -> list[Row]:
    if folder is None:
        return from_hub(repository, download, lambda row: schema)
    if not (files := local_files(folder, name, parts)):
        raise UserError(
            f"data.path={folder} has no {name}.jsonl, .json or .parquet: put the files of "
            f"huggingface.co/datasets/{repository} there, unpacked, or leave data.path out"
        )
    return [row for file in files for row in read_rows(file, lambda row: schema)]


def _references(row: Row, form: Form) -> tuple[str, ...]:
    """The right answers; of a classification, the right class and then the others."""
    answers = texts(row, "answers")
    if form.metric != "classification":
        return answers
    return (*answers[:1], *(name for name in texts(row, "all_classes") if name not in answers))


def _entry(task: str, template: str, row: Row, references: tuple[str, ...], cue: str = "") -> Entry:
    head, _, tail = template.partition("{context}")
    fields = _Fields(task, row)
    return Entry(head.format_map(fields), row["context"], tail.format_map(fields), references, cue)


def _template(name: str, template: Any) -> str:
    """A prompt, if it asks for columns alone: no attributes, and no widths that fill the memory."""
    where = f"tasks=longbench/{name}: dataset2prompt.json"
    try:
        if not isinstance(template, str):
            raise ValueError("it is no text")
        for _, field, form, conversion in Formatter().parse(template):
            if field is not None and (not field.isidentifier() or form or conversion):
                raise ValueError(f"{{{field:.40}}} is not the name of a column")
    except ValueError as error:
        raise UserError(f"{where} has no prompt that can be filled in ({error})") from error
    if "{context}" not in template:
        raise UserError(f"{where} has no context")
    return template


class _Fields(dict[str, Any]):
    """A row as the fields of a prompt."""

    def __init__(self, task: str, row: Mapping[str, Any]) -> None:
        super().__init__(row)
        self.task = task

    def __missing__(self, key: str) -> str:
        raise UserError(f"tasks={self.task}: the data has no {key}, which the prompt asks for")
