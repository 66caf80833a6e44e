"""A mixture of tasks: which task makes a sample depends only on the sample's index."""

from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction

from transformers import PreTrainedTokenizerBase

from duo_id.data.haystack import load_haystack
from duo_id.data.samples import Sample, Task
from duo_id.data.settings import DataSettings


class MixtureTask:
    """Several tasks with the same lengths, haystack and other settings, in proportion to their weights.

    The next sample is always made by the task that is furthest below its share (the first one if several are), so that
    every prefix of the samples is mixed as evenly as possible.
    """

    def __init__(
        self,
        tasks: Mapping[str, Callable[..., Task]],
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase,
        split: str,
        length_limit: int | None = None,
    ) -> None:
        """Make the tasks with a positive weight.

        Args:
            tasks: those that can be mixed.
            settings: of the samples, with the weights as `mixture`.
            tokenizer: of the model.
            split: train, validation or test.
            length_limit: the model's maximum number of tokens; None: no limit.

        Raises:
            UserError: a task cannot make samples with these settings.
        """
        haystack = load_haystack(settings.haystack, split)
        self.weights = {name: Fraction(str(weight)) for name, weight in settings.mixture.items() if weight > 0}
        self.tasks = {name: tasks[name](settings, tokenizer, split, length_limit, haystack) for name in self.weights}
        self._order: list[str] = []  # the task of each sample so far
        self._counts = Counter[str]()

    def sample(self, index: int, seed: int) -> Sample:
        """The sample of this (seed, split, index), from its task."""
        return self.tasks[self.task_of(index)].sample(index, seed)

    def task_of(self, index: int) -> str:
        """The name of the task that makes sample `index`."""
        total = sum(self.weights.values())
        while len(self._order) <= index:
            length = len(self._order) + 1
            deficits = {name: weight * length - total * self._counts[name] for name, weight in self.weights.items()}
            name = max(deficits, key=deficits.__getitem__)
            self._order.append(name)
            self._counts[name] += 1
        return self._order[index]
