"""The questions of an evaluation under kvpress's token eviction, in the environment of kvpress.

It reads `samples.jsonl` in the run folder and writes `answers-PRESS.jsonl` next to it, which duo_id judges. It imports
only those parts of duo_id that need neither a recent transformers nor Hydra.
"""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from duo_id.common.errors import UserError, check, one_line
from duo_id.peers.answers import ANSWERS_SCHEMA, VERSION, Answers, Json, load_samples
from duo_id.peers.heads import write_heads
from duo_id.peers.presses import PEERS, SHARED_NOTE, Budget
from duo_id.peers.reading import CompressedCache, append, compare, end_tokens, force, generate, load_model, read

RESUME = "repeat the command to resume"
console = Console()

AskedQuestion = tuple[int, list[int], Json]  # its number, its prompt and the rest of it
Pending = list[tuple[str, Json]]  # presses, and what is asked of them: `sparsity`, or that as None and `cache`


@dataclass
class Options:
    """What the command line asks for.

    Attributes:
        folder: a run folder with `samples.jsonl`.
        presses: names from `PEERS`.
        heads: write kvpress's static heads instead of answers.
        sparsity: of those in the samples' header; None: all, or none if `cache` is given.
        cache: shares of the cache, likewise.
        samples: only samples with a lower index; None: all.
        tasks: only these; None: all.
        generate: whether answers are generated; None: as in the samples' header.
        device: where the model runs; None: a GPU if there is one.
    """

    folder: str
    presses: list[str]
    heads: bool = False
    sparsity: list[float] | None = None
    samples: int | None = None
    tasks: list[str] | None = None
    generate: bool | None = None
    device: str | None = None
    cache: list[float] | None = None


@dataclass
class Examiner:
    """Asks a model the questions of items.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        header: of the samples.
        generates: whether answers are generated.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    header: Json
    generates: bool

    def reference(self, item: Json) -> dict[int, tuple[list[Tensor], int]]:
        """Full attention's logits of each question's answer, and bytes of its cache, by context length."""
        references = {}
        for tokens, questions in contexts(item).items():
            cache = read(self.model, item["context"][:tokens], None)
            logits = [logits for logits, _ in self.asked(item, cache, questions, generates=False)]
            references[tokens] = logits, cache.bytes
        return references

    def asked(
        self, item: Json, cache: CompressedCache, questions: Sequence[AskedQuestion], generates: bool
    ) -> Iterator[tuple[Tensor, list[int] | None]]:
        """Logits of each question's right answer, and the generated one if there is one.

        In turns it is always generated and stays in the cache with its question, but for an end of text.
        """
        turns = item.get("turns", False)
        for _, prompt, question in questions:
            logits, generated = force(self.model, cache, prompt, question["answer"]), None
            if turns or (generates and item["max_new_tokens"] and question["place"] is None):
                limits = item["max_new_tokens"], item["stop"]
                generated = generate(self.model, self.tokenizer, cache, prompt, *limits)
            if turns and generated:
                ends = end_tokens(self.model, self.tokenizer)
                append(self.model, cache, [*prompt, *(token for token in generated if token not in ends)])
            yield logits, generated

    def budget(self, tokens: int, asked: Json) -> Budget:
        """What is kept of a context of `tokens` tokens."""
        rest = self.header["sink_size"], self.header["recent_size"], self.header["chat_template"]
        if asked["sparsity"] is None:
            return Budget.of_cache(tokens, asked["cache"], *rest)
        share = self.header["shares"][self.header["sparsities"].index(asked["sparsity"])]
        return Budget(tokens, share, *rest)

    def answer(self, item: Json, name: str, asked: Json, reference: dict[int, tuple[list[Tensor], int]]) -> Json:
        """The answers line of one item and press."""
        answers_by_number: dict[int, Json] = {}
        for tokens, questions in contexts(item).items():
            press = PEERS[name].make(self.budget(tokens, asked))
            torch.manual_seed(self.header["seed"])  # leverage scores are sketched at random
            cache = read(self.model, item["context"][:tokens], press, PEERS[name].eager)
            full, full_bytes = reference[tokens]
            answered = self.asked(item, cache, questions, self.generates)
            for (number, _, question), of_full, (logits, generated) in zip(questions, full, answered, strict=True):
                measured = compare(logits, of_full, question["answer"])
                sizes = {"bytes": cache.bytes, "full_bytes": full_bytes}
                answers_by_number[number] = {"question": number} | measured | {"generated": generated} | sizes
        return _line_key(item, asked) | {"questions": [answer for _, answer in sorted(answers_by_number.items())]}


def contexts(item: Json) -> dict[int, list[AskedQuestion]]:
    """The questions by the length of context read before them: number, prompt and question.

    For an answer inside the context, only the tokens before it are read, and the last of these is the prompt.
    """
    by_length: dict[int, list[AskedQuestion]] = {}
    for number, question in enumerate(item["questions"]):
        start, context = question["place"], item["context"]
        tokens = len(context) if start is None else start - 1
        if tokens < 1:
            raise ValueError(f"question {number} leaves no context to read")
        prompt = question["prompt"] if start is None else [context[tokens]]
        by_length.setdefault(tokens, []).append((number, prompt, question))
    return by_length


def examine(examiner: Examiner, pending: Sequence[tuple[Json, Pending]], files: dict[str, Answers]) -> int:
    """Answer all items; returns the number of failures, which are reported and do not stop the others."""
    failures, reported = 0, set()
    columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=sum(len(item["context"]) * len(missing) for item, missing in pending))
        for item, missing in pending:
            reference = None
            for name, asked in missing:
                progress.update(bar, description=f"{item['task']} at {item['length']}: {name}")
                reason = ""
                try:
                    reference = reference or examiner.reference(item)
                    line = examiner.answer(item, name, asked, reference)
                except Exception as error:  # presses may raise anything, or run out of memory
                    reason = one_line(f"{type(error).__name__}: {error}", 300)
                if reason:
                    failures += 1
                    torch.cuda.empty_cache()  # here, where no traceback keeps tensors alive
                    line = _line_key(item, asked) | {"error": reason}
                    if (name, reason) not in reported:
                        reported.add((name, reason))
                        console.print(f"{name} failed on {item['task']} at {item['length']}: {escape(reason)}")
                files[name].add(line)
                progress.advance(bar, len(item["context"]))
    return failures


def _line_key(item: Json, asked: Json) -> Json:
    return {key: item[key] for key in ("task", "length", "index")} | asked


def _asked(options: Options, header: Json) -> list[Json]:
    """What is asked of each press, as its lines say it.

    Raises:
        UserError: the samples were not written for it.
    """
    known = {"sparsity": header["sparsities"], "cache": header.get("caches", [])}
    chosen = {"sparsity": options.sparsity, "cache": options.cache}
    if chosen == {"sparsity": None, "cache": None}:
        chosen = known
    for key, values in chosen.items():
        for value in values or []:
            check(value in known[key], f"{key}={value} is not among those of the samples: {known[key]}")
    shares = [{"sparsity": None, "cache": cache} for cache in chosen["cache"] or []]
    return [{"sparsity": sparsity} for sparsity in chosen["sparsity"] or []] + shares


def run(options: Options) -> int:
    """Answer what is still unanswered; returns the number of failures.

    Raises:
        UserError: the samples or the model cannot be read, or hold nothing of what was asked for.
    """
    folder = Path(options.folder)
    header, items, digest = load_samples(folder, options.tasks, options.samples)
    asked = _asked(options, header)
    generates = header["generate"] if options.generate is None else options.generate
    versions = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    files = {}
    for name in options.presses:
        peer = PEERS[name]
        shared = {"schema": ANSWERS_SCHEMA, "version": VERSION, "samples": digest, "press": name}
        notes = {"settings": peer.settings(), "note": f"{SHARED_NOTE}; {peer.note}", "versions": versions}
        files[name] = Answers(folder / f"answers-{name}.jsonl", shared | notes)
    pending: list[tuple[Json, Pending]] = []
    for item in items:
        pairs = [(name, each) for name in files for each in asked]
        missing = [pair for pair in pairs if not files[pair[0]].has(item, pair[1], generates)]
        if missing:
            pending.append((item, missing))
    if not pending:
        return 0
    return examine(Examiner(*load_model(header, options.device), header, generates), pending, files)


def main(options: str) -> int:
    """Do what `Options` as JSON ask for; returns the exit status, 2 for a user's mistake, 130 after Ctrl-C."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    chosen = Options(**json.loads(options))
    try:
        if chosen.heads:
            console.print(f"heads: {write_heads(Path(chosen.folder), chosen.device)}", soft_wrap=True, markup=False)
            return 0
        failures = run(chosen)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk
        print(f"error: {error}; {RESUME}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; {RESUME}", file=sys.stderr)
        return 130
    lost = f", {failures} failed" if failures else ""
    console.print(f"answers: {chosen.folder}/answers-*.jsonl{lost}", soft_wrap=True, markup=False)
    console.print(f"to take them in: duo-id evaluate resume={chosen.folder}", soft_wrap=True, markup=False)
    return 1 if failures else 0
