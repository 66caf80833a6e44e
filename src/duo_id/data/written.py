"""`data=self`: samples whose answers the model itself wrote, read from a folder that `duo_id.data.writing` made."""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from duo_id.common.documents import FIRST, LARGEST_ROWS, Data, Line, NonNegative, checked, parse_lines, read_text
from duo_id.common.errors import UserError, check
from duo_id.common.integrity import check_sums, digest_of
from duo_id.data.haystack import Haystack
from duo_id.data.in_memory import SampleList
from duo_id.data.samples import SPLITS, UNSCORED, Sample
from duo_id.data.settings import DataSettings

TEXTS = "texts.jsonl"  # of a folder: one text per line
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], Field(min_length=1), FIRST]


class _Row(Data):
    """A line of `TEXTS`."""

    split: Line
    temperature: NonNegative
    prompt: Ids
    written: Ids


@dataclass(frozen=True)
class WrittenText:
    """A prompt and what the model wrote after it.

    Attributes:
        split: train, validation or test; no two share text of the haystack.
        temperature: 0 where it wrote greedily.
        prompt: tokens.
        written: tokens, the one that ends the text included if there is one.
    """

    split: str
    temperature: float
    prompt: tuple[int, ...]
    written: tuple[int, ...]

    def __len__(self) -> int:
        """Tokens of both."""
        return len(self.prompt) + len(self.written)


class WrittenTask:
    """Texts of a folder, in another order on every pass; what the model wrote is the only answer of each."""

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase,
        split: str,
        length_limit: int | None = None,
        haystack: Haystack | None = None,
    ) -> None:
        """Read the texts of a split.

        Args:
            settings: with the folder as `self_path`, see `duo_id.data.writing.with_written`.
            tokenizer: of the model.
            split: train, validation or test.
            length_limit: the model's maximum number of tokens; None: no limit.
            haystack: not read: the prompts hold what they need of it.

        Raises:
            UserError: the folder holds no texts of this split, or other ones than this model and these settings take.
        """
        score, folder = settings.score, settings.self_path
        check(score == "answers", f"data.score={score}: self has no questions, choose answers, or data.mixture.self=0")
        if folder is None:
            raise UserError("data=self reads what a model wrote: give data.self_path=DIR, a folder of such texts")
        texts, _ = read_written(folder, settings.self_sha256)
        texts = sorted((text for text in texts if text.split == split), key=len)
        check(bool(texts), f"data.self_path={folder} has no {split} texts")
        longest, limits = len(texts[-1]), [limit for limit in (settings.length_max, length_limit) if limit is not None]
        check(
            longest <= min(limits, default=longest),
            f"data.self_path={folder} has texts of {longest} tokens, more than data.length_max or the model takes "
            f"({min(limits, default=longest)}): give others",
        )
        largest, known = max(max(*text.prompt, *text.written) for text in texts), len(tokenizer)
        check(
            largest < known,
            f"data.self_path={folder} has token {largest}, and the model knows {known}: give what this model wrote",
        )
        self.split, self.curriculum = split, settings.curriculum if split == "train" else 0
        self.texts = SampleList([_sample(text) for text in texts])

    def __len__(self) -> int:
        """How many texts there are."""
        return len(self.texts)

    def sample(self, index: int, seed: int) -> Sample:
        """Text `index` of an endless run of passes, each in its own order of (seed, split, pass).

        While a curriculum lasts, one of the shortest texts, whose number grows.
        """
        if index < self.curriculum:
            shortest = 1 + (len(self.texts) - 1) * index // self.curriculum
            return self.texts.samples[random.Random(f"{seed}:{index}").randrange(shortest)]
        return self.texts.sample(index, seed)


def _sample(text: WrittenText) -> Sample:
    prompt, written = torch.tensor(text.prompt), torch.tensor(text.written)
    return Sample(
        input_ids=torch.cat([prompt, written]),
        labels=torch.cat([torch.full_like(prompt, UNSCORED), written]),
        answers=torch.cat([torch.zeros_like(prompt), torch.ones_like(written)]),
    )


def written_lines(texts: Iterable[WrittenText], tokenizer: PreTrainedTokenizerBase) -> str:
    """The contents of `TEXTS`; `text` is for people, and not read."""
    rows: list[dict[str, Any]] = []
    for text in texts:
        words = tokenizer.decode(list(text.written))
        rows.append({"text": words, "split": text.split, "temperature": text.temperature})
        rows[-1] |= {"prompt": text.prompt, "written": text.written}
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_written(folder: str, sha256: str | None = None) -> tuple[Sequence[WrittenText], str]:
    """The texts of a folder, and the digest of their file.

    Args:
        folder: as `data.self_path` names it.
        sha256: that the digest must be; None: any.

    Raises:
        UserError: there is no such folder, a file in it is damaged or holds something else, or the digest differs.
    """
    path = Path(folder) / TEXTS
    check(path.is_file(), f"data.self_path={folder}: there is no {TEXTS} in it; data.self_path=null writes one")
    check_sums(path.parent, f"remove data.self_path={folder}, or copy it again")
    contents = read_text(path, LARGEST_ROWS)
    digest = digest_of(contents)
    check(
        sha256 in (None, digest),
        f"data.self_sha256={sha256}: the texts of data.self_path={folder} have the digest {digest}: give the folder "
        "that the run read, or start a new run without data.self_sha256",
    )
    return _parsed(contents, path), digest


@lru_cache(maxsize=1)  # by their contents: each split reads them
def _parsed(contents: str, path: Path) -> list[WrittenText]:
    texts = []
    for number, row in parse_lines(contents.splitlines(), path):
        found = checked(_Row, row, f"{path}, line {number}")
        check(found.split in SPLITS, f"{path}, line {number}: split={found.split} is none of {', '.join(SPLITS)}")
        texts.append(WrittenText(found.split, found.temperature, tuple(found.prompt), tuple(found.written)))
    return texts
