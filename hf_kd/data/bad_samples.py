"""Going on where a sample cannot be read: another takes its place, and which ones were bad is remembered."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, cast

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback
from transformers.utils import logging

from ..labels import IGNORE_INDEX
from ..text import some
from .views import view_seed


# Warnings of every process and worker count, since each reads samples of its own: not accelerate's logger, which
# speaks on the main process alone and not at all in a spawned worker.
logger = logging.get_logger(__name__)
main_process_logger = get_logger(__name__)

REPLACEMENTS = 8
"""How many other samples are tried before the data set itself is taken to be at fault."""

# The report names this many samples; each has had a warning of its own.
_MOST_NAMED = 20


class SkippingDataset(Dataset):
    """A map-style data set in which another sample takes the place of one that cannot be read.

    The place of sample i goes to one of eight others, chosen by a hash of i: the same one in every process, worker and
    epoch. It keeps its own "index". A bad sample is one whose reading or transform raises anything but MemoryError;
    each is warned about once. Everything else of the data set (`class_names`, `labels`, `set_epoch`, ...) is reachable
    here.

    `dataset`: has a length and gives samples by index, and may give batches by `__getitems__`. `evaluation`: for data
    on which metrics are taken: a replacement gets the label -100, so that metrics of labels leave it out.

    Attributes: `dataset`, `evaluation`, `bad_indices`.

    Raises TypeError for a data set without a length. Reading raises IndexError for an index out of range, and
    ValueError where a sample and all its replacements are bad, or where a replacement's label cannot be taken away.
    """

    def __init__(self, dataset: Dataset, *, evaluation: bool = False) -> None:
        super().__init__()
        by_index = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if not by_index or isinstance(dataset, IterableDataset):
            raise TypeError(
                f"Samples can be replaced in data sets with a length and an index, got {type(dataset).__name__}; a "
                'HubImageStream leaves them out by itself with on_bad_sample="skip".'
            )
        self.dataset = dataset
        self.evaluation = evaluation
        # In shared memory, where the workers of a loader, persistent ones included, can report to this process.
        self._bad = torch.zeros(len(self), dtype=torch.uint8).share_memory_()

    @property
    def bad_indices(self) -> list[int]:
        """The samples found bad so far by this process and its workers, in order."""
        return self._bad.nonzero().flatten().tolist()

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, index: int) -> Any:
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"Index {number} is outside this data set of {len(self)} samples.")
        number %= len(self)
        try:
            return self.dataset[number]
        except MemoryError:
            raise
        except Exception as error:  # readers and transforms raise nearly anything
            return self._read_another(number, error)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """A batch: as the data set gives it where it gives batches (a dict of tensors, or a list), else a list."""
        whole = getattr(self.dataset, "__getitems__", None)
        if whole is not None:
            try:
                return whole(indices)
            except MemoryError:
                raise
            except Exception as error:  # which sample it was shows when they are read one by one
                logger.debug("A batch could not be read as a whole: %s", error)
        return [self[index] for index in indices]

    def _read_another(self, index: int, error: Exception) -> Any:
        failed = [(index, error)]
        for place in self._replacements(index):
            try:
                sample = self.dataset[place]
            except MemoryError:
                raise
            except Exception as another:
                failed.append((place, another))
                continue
            for number, reason in failed:
                if not self._bad[number]:
                    self._bad[number] = 1
                    logger.warning(
                        "Sample %d cannot be read, sample %d takes its place: %s", number, place, _sentence(reason)
                    )
            return self._without_label(sample, index) if self.evaluation else sample
        for number, _ in failed:
            self._bad[number] = 1
        others, last = len(failed) - 1, failed[-1][1]
        replacements = f" and its {others} replacement{'s' if others > 1 else ''}" if others else ", the only one,"
        raise ValueError(
            f"Sample {index}{replacements} could not be read, so the data set or its transform is at fault: mend it, "
            f'or set on_bad_sample="raise" to stop at the first. The last error: {_sentence(last)}'
        ) from last

    def _replacements(self, index: int) -> Iterator[int]:
        """Other samples, each once, by hashes of the index and the attempt."""
        others = len(self) - 1
        seen: set[int] = set()
        attempt = 0
        while len(seen) < min(REPLACEMENTS, others):
            place = view_seed(0, attempt, index) % others
            attempt += 1
            if place not in seen:
                seen.add(place)
                yield place + (place >= index)

    @staticmethod
    def _without_label(sample: Any, index: int) -> Any:
        if not isinstance(sample, Mapping):
            raise TypeError(
                f"The replacement of sample {index} is a {type(sample).__name__}: samples must be dicts, for their "
                'labels to be left out of the metrics; give such samples, or set on_bad_sample="raise".'
            )
        unlabelled = dict(sample)
        for key in {"labels", "label"} & sample.keys():
            label = sample[key]
            if getattr(label, "ndim", 0):
                raise ValueError(
                    f"The replacement of sample {index} has a label of shape {tuple(label.shape)}, which cannot be "
                    'marked as absent: give class indices, or set on_bad_sample="raise".'
                )
            # Of the other labels' kind, for collators; but unsigned integers and booleans cannot hold it.
            if isinstance(label, Tensor):
                dtype = label.dtype if label.is_floating_point() else torch.int64
                unlabelled[key] = torch.full_like(label, IGNORE_INDEX, dtype=dtype)
            else:
                unlabelled[key] = IGNORE_INDEX
        return unlabelled

    # ---- The rest is the data set's own ----------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        # While it is unpickled or copied there is no data set yet to ask; and special methods belong to a class.
        if name.startswith("__") or "dataset" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")
        return getattr(self.dataset, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A copy's tensor is private to this process; one that came to a worker is shared already, and stays so.
        self._bad.share_memory_()


def _sentence(error: Exception) -> str:
    """An error's text on one line, with its type where the text alone would not say what happened."""
    text = " ".join(str(error).split())
    return text if text and isinstance(error, ValueError) else f"{type(error).__name__}: {text}".rstrip(": ")


class BadSampleReport(TrainerCallback):
    """Says after an epoch how many training samples were bad so far, and which, over all workers and processes."""

    def __init__(self) -> None:
        self._reported = 0

    def on_epoch_end(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        dataset = getattr(train_dataloader, "dataset", None)
        # A stream may be inside accelerate's share of it.
        while not hasattr(dataset, "bad_count") and isinstance(dataset, IterableDataset):
            dataset = getattr(dataset, "dataset", None)
        if isinstance(dataset, SkippingDataset):
            bad = sorted(set(gather_object(dataset.bad_indices)))
            which = f"were replaced by others: those with index {some(bad, _MOST_NAMED)}"
            self._report(len(bad), f"{len(bad)} of {len(dataset)} training samples", which)
        elif dataset is not None and hasattr(dataset, "bad_count"):
            # Where every process reads the whole stream each has counted the same images.
            count = max(gather_object([dataset.bad_count]))
            self._report(count, f"{count} images of the training stream, over all epochs,", "were left out")

    def _report(self, count: int, samples: str, consequence: str) -> None:
        if count > self._reported:
            main_process_logger.warning("%s could not be read and %s.", samples, consequence)
        self._reported = count
