"""A mixture of tasks: which of them makes a sample follows from the sample's index alone."""

from collections import Counter
from collections.abc import Mapping
from fractions import Fraction

from transformers import PreTrainedTokenizerBase

from duo_id.common.errors import check
from duo_id.data.haystack import load_haystack
from duo_id.data.samples import Sample
from duo_id.data.settings import DataSettings
from duo_id.data.synthetic import DraftedTask


class MixtureTask:
    """Several tasks with the same lengths, haystack and other settings, in the proportion of their weights.

    The next sample is always made by the task that lacks most to its share (of several, the one that is named first),
    so that every run of samples from the first on is mixed as evenly as possible.
    """

    def __init__(
        self,
        tasks: Mapping[str, type[DraftedTask]],
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase,
        split: str,
        length_limit: int | None = None,
    ) -> None:
        """Make the tasks that have a weight above 0.

        Args:
            tasks: those that can be mixed.
            settings: of the samples, with the weights as `mixture`.
            tokenizer: of the model.
            split: train, validation or test.
            length_limit: the most tokens that the model takes; None: it names no limit.

        Raises:
            UserError: an unknown task, or one that cannot make samples with these settings.
        """
        for name in settings.mixture:
            check(name in tasks, f"data.mixture.{name}: a mixture can have {', '.join(tasks)}")
        haystack = load_haystack(settings.haystack, split)
        self.weights = {name: Fraction(str(weight)) for name, weight in settings.mixture.items() if weight > 0}
        self.tasks = {name: tasks[name](settings, tokenizer, split, length_limit, haystack) for name in self.weights}
        self._order: list[str] = []  # the task of each sample so far
        self._counts = Counter[str]()

    def sample(self, index: int, seed: int) -> Sample:
        """The sample of this (seed, split, index) that its task makes."""
        return self.tasks[self.task_of(index)].sample(index, seed)

    def task_of(self, index: int) -> str:
        """The name of the task that makes sample `index`."""
        total = sum(self.weights.values())
        while len(self._order) <= index:
            length = len(self._order) + 1
            lacks = {name: weight * length - total * self._counts[name] for name, weight in self.weights.items()}
            name = max(lacks, key=lacks.__getitem__)
            self._order.append(name)
            self._counts[name] += 1
        return self._order[index]
