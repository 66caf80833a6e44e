"""The settings of training samples: see conf/data/."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from duo_id.common.config import (
    Count,
    Fraction,
    Number,
    Positive,
    Seed,
    Some,
    Text,
    Weight,
    settings,
)
from duo_id.common.errors import check
from duo_id.common.mistakes import did_you_mean
from duo_id.data.choices import MIXED_NAMES, TASK_NAMES
from duo_id.models.settings import ModelSettings

Temperature = Annotated[Number, Field(ge=0, le=10)]


@settings("data.haystack")
class HaystackSettings:
    """The source of the text that hides the needles: see conf/data/."""

    source: Literal["embedded", "packages", "file", "hub", "library"] = "embedded"  # library is for evaluation alone
    path: Text | None = None  # file: txt, jsonl, jsonl.zst or parquet, or a folder of such files
    id: Text | None = None  # hub: data set id
    name: Text | None = None  # hub: configuration of the data set
    split: Text = "train"  # hub: split of the data set
    revision: Text | None = None  # hub: branch, tag or commit
    text_key: Text = "text"  # file, hub: the column that holds the text
    sha256: Text | None = None  # of the text, which must have it; null: any. A run records that of its text

    def __post_init__(self) -> None:
        """Check that the source's settings are complete."""
        check(self.source != "file" or bool(self.path), "data.haystack.source=file needs data.haystack.path=FILE")
        check(
            self.path is None or self.source == "file",
            f"data.haystack.path={self.path}: data/haystack={self.source} reads no file, choose data/haystack=file",
        )
        check(self.source != "hub" or bool(self.id), "data.haystack.source=hub needs data.haystack.id=DATASET")


@settings("data")
class DataSettings:
    """The samples that heads are identified on: see conf/data/."""

    task: Text = "passkey"  # a name of `duo_id.data.choices`
    path: Text | None = None  # disk: a folder written by data_gen/write.py
    mixture: dict[str, Weight] = field(default_factory=dict)  # mixture: the weight of each task
    haystack: HaystackSettings = field(default_factory=HaystackSettings)
    length_min: Positive = 1  # tokens
    length_max: Positive | None = None  # tokens; null: the model's limit
    num_lengths: Positive = 1  # number of lengths between the two, evenly spaced
    curriculum: Count = 0  # training samples over which the longest length grows from length_min to length_max
    num_passkeys: Positive = 1
    passkey_words: Positive = 1
    num_questions: Positive = 1  # key_value, copying; multi_query: facts that its question asks for
    num_turns: Positive = 4  # turns: questions, of the three kinds in turn
    answer_words: Positive = 1  # key_value, multi_query, turns
    answer_tokens: Positive = 1  # copying
    text_skip: Count = 64  # text: first tokens that are not labelled
    text_tokens: Positive | None = None  # text: label at most this many of the last tokens; null: all
    self_path: Text | None = None  # self: a folder of texts that the model wrote; null: in the user's cache
    self_sha256: Text | None = None  # of these texts, which must have it; null: any. A run records that of its texts
    self_samples: Positive = 32  # texts for training; a quarter as many for validation, and for test
    self_share: Annotated[Number, Field(gt=0, lt=1)] = 0.25  # of a sample, which the model writes
    self_tokens: Positive = 2048  # that it writes at most
    self_temperatures: Some[Temperature] = field(default_factory=lambda: [0.0, 0.7])  # in turn; 0: greedy
    self_seed: Seed = 0  # of prompts and draws
    self_chat: bool | None = None  # prompts in the model's chat template; null: if it has one
    depth_min: Fraction = 0.05  # of the haystack, or the records
    depth_max: Fraction = 0.95
    score: Literal["answers", "questions", "all"] = "answers"  # what is labelled; all: also separators
    batch_size: Positive = 1
    padding_side: Literal["left", "right"] = "right"
    num_workers: Annotated[Count, Field(le=4096)] = 0

    @property
    def reads_written(self) -> bool:
        """Whether samples are texts that the model itself wrote."""
        return self.task == "self" or (self.task == "mixture" and self.mixture.get("self", 0) > 0)

    def __post_init__(self) -> None:
        """Check the task and combinations of settings; what depends on the tokenizer is checked by the task."""
        choices = ", ".join(TASK_NAMES)
        check(
            self.task in TASK_NAMES,
            f"data.task={self.task}: choose one of {choices}{did_you_mean(self.task, TASK_NAMES)}",
        )
        for name in self.mixture:
            among = f"data.mixture.{name}: a mixture can have {', '.join(MIXED_NAMES)}"
            check(name in MIXED_NAMES, f"{among}{did_you_mean(name, MIXED_NAMES)}")
        check(self.task != "disk" or bool(self.path), "data=disk needs data.path=DIR, a folder written by data_gen/")
        check(
            self.length_max is None or self.length_max >= self.length_min,
            f"data.length_max={self.length_max} must not be below data.length_min={self.length_min}",
        )
        check(
            self.curriculum == 0 or self.num_lengths > 1,
            f"data.curriculum={self.curriculum} needs data.num_lengths of at least 2: a single length cannot grow",
        )
        check(
            self.task != "mixture" or any(self.mixture.values()),
            "data=mixture needs a task with a positive weight, such as data.mixture.passkey=1",
        )
        check(
            self.depth_min <= self.depth_max,
            f"data.depth_min={self.depth_min} and data.depth_max={self.depth_max} must be fractions, in this order",
        )


@settings("")
class DataGenSettings:
    """`python data_gen/write.py`: see conf/data_gen.yaml."""

    model: ModelSettings
    data: DataSettings
    out: Text  # the folder to write
    n: Count  # training samples
    n_validation: Count
    n_test: Count
    seed: Seed = 0
