"""A trainer's pushes to the Hub: in the background, one after the other, none of which can end the training."""

from __future__ import annotations

import os
import queue
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from accelerate.logging import get_logger

from .hub import Publication
from .text import one_line


logger = get_logger(__name__)

SNAPSHOTS = ".push"
"""Folder, inside the output folder, of what is being pushed: checkpoints may be rotated away meanwhile."""


class Pushes:
    """Runs publishing functions, in the background or at once, and says in one sentence what became of them.

    Attributes:
        last: the last publication.
        failures: the sentences of those that failed.
    """

    def __init__(self) -> None:
        self.last: Publication | None = None
        self.failures: list[str] = []
        self._waiting: queue.Queue[Callable[[], Publication]] = queue.Queue()
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self._waiting.unfinished_tasks > 0

    def start(self, publish: Callable[[], Publication]) -> None:
        """Publish in the background, after the pushes that were started before."""
        self._waiting.put(publish)
        if self._thread is None:
            # A daemon: a program that ends does not wait for it. Half a push changes nothing on the Hub.
            self._thread = threading.Thread(target=self._work, name="hf_kd-push", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Until nothing is in the background any more."""
        if self.busy:
            logger.info("Waiting for the push to the Hub that is under way.")
        self._waiting.join()

    def run(self, publish: Callable[[], Publication]) -> Publication | None:
        """Publish at once, after what is in the background; None if that failed, which is logged.

        Raises:
            ValueError: of the publishing function: a mistake of whoever called it.
        """
        self.wait()
        return self._publish(publish, raised=ValueError)

    def _work(self) -> None:
        while True:
            publish = self._waiting.get()
            try:
                self._publish(publish)
            finally:
                self._waiting.task_done()

    def _publish(
        self, publish: Callable[[], Publication], raised: type[Exception] | tuple[()] = ()
    ) -> Publication | None:
        try:
            publication = publish()
        except raised:
            raise
        except Exception as error:
            self.report(error)
            return None
        self.last = publication
        return publication

    def report(self, error: Exception) -> None:
        """Log a failure, and go on."""
        sentence = one_line(error)
        self.failures.append(sentence)
        logger.warning(sentence)


def snapshot(files: Mapping[str, Path], target: Path) -> None:
    """Files as they are now, by their path in ``target``: at no cost in space where the file system has hard links.

    They must not be written in place later, as a checkpoint's are not.
    """
    shutil.rmtree(target, ignore_errors=True)
    for name, source in files.items():
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, place)
        except OSError:
            shutil.copy2(source, place)
