"""`python peers/run.py RUN_FOLDER key=value`: the questions of an evaluation under kvpress's token eviction.

It reads `samples.jsonl` in the run folder and writes `answers-PRESS.jsonl` next to it, which duo_id judges. These files
are its only connection to duo_id, since kvpress needs an older transformers.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from answers import ANSWERS_SCHEMA, VERSION, Answers, Json, UsageError, load_samples
from presses import PEERS, SHARED_NOTE, Budget
from reading import compare, force, generate, read
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

USAGE = "python peers/run.py RUN_FOLDER [presses=snapkv,tova] [sparsity=0.5] [samples=4] [tasks=...] [generate=false]"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
console = Console()

Pending = list[tuple[str, float]]  # presses and sparsities


@dataclass
class Options:
    """The command line.

    Attributes:
        folder: a run folder with `samples.jsonl`.
        presses: names from `PEERS`.
        sparsity: of those in the samples' header; None: all.
        samples: only samples with a lower index; None: all.
        tasks: only these; None: all.
        generate: whether answers are generated; None: as in the samples' header.
        device: where the model runs.
    """

    folder: Path
    presses: list[str]
    sparsity: list[float] | None = None
    samples: int | None = None
    tasks: list[str] | None = None
    generate: bool | None = None
    device: str = DEVICE


def parse(arguments: Sequence[str]) -> Options:
    """The command line, checked.

    Raises:
        UsageError: it is not valid.
    """
    folders = [argument for argument in arguments if "=" not in argument]
    if len(folders) != 1:
        raise UsageError(f"give one run folder: {USAGE}")
    options = Options(Path(folders[0]), [name for name in PEERS if name != "kvzip"])
    readers: dict[str, Callable[[str], Any]] = {
        "presses": lambda text: text.split(","),
        "sparsity": lambda text: [float(number) for number in text.strip("[]").split(",")],
        "samples": int,
        "tasks": lambda text: text.split(","),
        "generate": lambda text: {"true": True, "false": False}[text.lower()],
        "device": str,
    }
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            continue
        if key not in readers:
            raise UsageError(f"{key}= is not an option, choose among {', '.join(readers)}")
        try:
            setattr(options, key, readers[key](value))
        except (ValueError, KeyError):
            raise UsageError(f"{argument} is not a valid value: {USAGE}") from None
    for name in options.presses:
        if name not in PEERS:
            raise UsageError(f"presses={name}: choose among {', '.join(PEERS)}")
    return options


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
            logits = [force(self.model, cache, prompt, question["answer"]) for _, prompt, question in questions]
            references[tokens] = logits, cache.bytes
        return references

    def answer(self, item: Json, name: str, sparsity: float, reference: dict[int, tuple[list[Tensor], int]]) -> Json:
        """The answers line of one item, press and sparsity."""
        share = self.header["shares"][self.header["sparsities"].index(sparsity)]
        windows = self.header["sink_size"], self.header["recent_size"]
        answers_by_number: dict[int, Json] = {}
        for tokens, questions in contexts(item).items():
            budget = Budget(tokens, share, *windows, self.header["chat_template"])
            cache = read(self.model, item["context"][:tokens], PEERS[name].make(budget), PEERS[name].eager)
            full, full_bytes = reference[tokens]
            for (number, prompt, question), logits in zip(questions, full, strict=True):
                measured = compare(force(self.model, cache, prompt, question["answer"]), logits, question["answer"])
                generated = None
                if self.generates and item["max_new_tokens"] and question["place"] is None:
                    limits = item["max_new_tokens"], item["stop"]
                    generated = generate(self.model, self.tokenizer, cache, prompt, *limits)
                sizes = {"bytes": cache.bytes, "full_bytes": full_bytes}
                answers_by_number[number] = {"question": number} | measured | {"generated": generated} | sizes
        return _line_key(item, sparsity) | {"questions": [answer for _, answer in sorted(answers_by_number.items())]}


def contexts(item: Json) -> dict[int, list[tuple[int, list[int], Json]]]:
    """The questions by the length of context read before them: number, prompt and question.

    For an answer inside the context, only the tokens before it are read, and the last of these is the prompt.
    """
    by_length: dict[int, list[tuple[int, list[int], Json]]] = {}
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
            for name, sparsity in missing:
                progress.update(bar, description=f"{item['task']} at {item['length']}: {name}")
                reason = ""
                try:
                    reference = reference or examiner.reference(item)
                    line = examiner.answer(item, name, sparsity, reference)
                except Exception as error:  # presses may raise anything, or run out of memory
                    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
                if reason:
                    failures += 1
                    torch.cuda.empty_cache()  # here, where no traceback keeps tensors alive
                    line = _line_key(item, sparsity) | {"error": reason}
                    if (name, reason) not in reported:
                        reported.add((name, reason))
                        console.print(f"{name} failed on {item['task']} at {item['length']}: {escape(reason)}")
                files[name].add(line)
                progress.advance(bar, len(item["context"]))
    return failures


def _line_key(item: Json, sparsity: float) -> Json:
    return {key: item[key] for key in ("task", "length", "index")} | {"sparsity": sparsity}


def load_model(header: Json, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer that the samples were made for.

    Raises:
        UsageError: they cannot be loaded.
    """
    source, options = header["model"], {"revision": header["revision"]}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        dtype, target = getattr(torch, header["dtype"]), {"": torch.device(device)}
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=target, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"the model {source} cannot be loaded on {device}: {' '.join(str(error).split())}") from None
    return model.eval().requires_grad_(False), tokenizer


def run(options: Options) -> int:
    """Answer what is still unanswered; returns the number of failures."""
    header, items, digest = load_samples(options.folder, options.tasks, options.samples)
    for value in options.sparsity or []:
        if value not in header["sparsities"]:
            raise UsageError(f"sparsity={value} is not among those of the samples: {header['sparsities']}")
    sparsities = options.sparsity or header["sparsities"]
    generates = header["generate"] if options.generate is None else options.generate
    versions = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    files = {}
    for name in options.presses:
        peer = PEERS[name]
        shared = {"schema": ANSWERS_SCHEMA, "version": VERSION, "samples": digest, "press": name}
        notes = {"settings": peer.settings(), "note": f"{SHARED_NOTE}; {peer.note}", "versions": versions}
        files[name] = Answers(options.folder / f"answers-{name}.jsonl", shared | notes)
    pending: list[tuple[Json, Pending]] = []
    for item in items:
        pairs = [(name, sparsity) for name in files for sparsity in sparsities]
        missing = [pair for pair in pairs if not files[pair[0]].has(item, pair[1], generates)]
        if missing:
            pending.append((item, missing))
    if not pending:
        return 0
    return examine(Examiner(*load_model(header, options.device), header, generates), pending, files)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status, 2 for a usage error, 130 after Ctrl-C."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    try:
        options = parse(arguments)
        failures = run(options)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk
        print(f"error: {error}; repeat the command to resume", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; repeat the command to resume", file=sys.stderr)
        return 130
    lost = f", {failures} failed" if failures else ""
    console.print(f"answers: {options.folder}/answers-*.jsonl{lost}", soft_wrap=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
