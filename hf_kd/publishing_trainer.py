"""The Trainer's pushes to the Hub, written by hf_kd: the repository's content, the background, and failures."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from transformers.trainer_utils import HubStrategy, SaveStrategy

from .curves import CURVES, draw_curves
from .hub import Publication, PublishingError, command, make_repository, publish_student
from .model_card import README, StudentCard
from .pushes import SNAPSHOTS, Pushes, snapshot
from .reliable_trainer import ReliableTrainer
from .repository import files_of


if TYPE_CHECKING:
    from .config import DistillationConfig


logger = get_logger(__name__)


class PublishingTrainer(ReliableTrainer):
    """A Trainer that publishes a student as :func:`hf_kd.publish_student` does, and that no push can end.

    Attributes:
        pushes: what became of the pushes: ``pushes.last``, ``pushes.failures``.
    """

    args: DistillationConfig
    hub_model_id: str | None  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Trainer makes the repository in its own __init__.
        self.pushes = Pushes()
        super().__init__(*args, **kwargs)

    def student_card(self, **given: Any) -> StudentCard:
        """The card of the student as it is now; ``given`` are fields of :class:`hf_kd.model_card.StudentCard`."""
        raise TypeError(f"{type(self).__name__} must define student_card(**given).")

    def write_card(self, place: Path, **given: Any) -> None:
        """Write the card and the curves into a student's folder; ``given`` as for :meth:`student_card`."""
        draw_curves(self.state.log_history, place / CURVES)
        given.setdefault("curves", CURVES if (place / CURVES).is_file() else None)
        self.student_card(**given).save(place)

    def check_license(self) -> None:
        """Refuse to train for a push that could not be made.

        Raises:
            ValueError: if ``push_to_hub`` is set and the student has no licence, nor one to inherit.
        """
        if not self.args.push_to_hub:
            return
        readme = Path(self.args.output_dir) / README
        existing = readme.read_text(encoding="utf-8-sig") if readme.is_file() else None
        if not self.student_card().known_license(existing):
            raise ValueError(
                "`push_to_hub` needs the student's licence, and neither its training data nor its starting weights "
                'have one to inherit: give `hub_license`, such as "apache-2.0".'
            )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, or say why it cannot be made; each push tries again."""
        if not self.is_world_process_zero():
            return
        self.hub_model_id = self._repo_id()
        private = self.args.hub_private_repo if private is None else private
        try:
            self.hub_model_id = make_repository(self._repo_id(), token=token or self.args.hub_token, private=private)
        except PublishingError as error:
            self.pushes.report(PublishingError(f"{error} Training goes on, and each push tries again."))

    # Trainer's returns what the client says of its upload; this what was read back.
    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Publication | None:
        """Publish the student with its card; see :func:`hf_kd.publish_student`.

        All processes call it, and the first one publishes, once. A Hub that cannot be reached, or refuses, ends
        nothing: the sentence that says so is logged with the command that publishes the output folder later.

        Args:
            blocking: wait until it is done; otherwise it goes on in the background.
            token, private, revision: in place of ``hub_token``, ``hub_private_repo`` and ``hub_revision``.
            kwargs: of :meth:`create_model_card` (``license``, ``dataset_tags``, ``results``, ...); ``create_pr`` and
                ``overwrite``.

        Returns:
            What was published, as it was read back; None on other processes, in the background, or if it failed.

        Raises:
            ValueError: for a missing licence, once the student is saved.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        options = {key: kwargs.pop(key) for key in ("create_pr", "overwrite") if key in kwargs}
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        self.create_model_card(**kwargs)
        repo_id = self._repo_id()
        publish = self._publishing(
            Path(self.args.output_dir), repo_id, revision=revision or self.args.hub_revision, token=token,
            private=private, commit_message=commit_message or "End of training", **options,
        )  # fmt: skip
        if not blocking:
            self.pushes.start(publish)
            return None
        publication = self.pushes.run(publish)
        if publication is not None:
            self.hub_model_id = publication.repo_id
        return publication

    def _publishing(
        self, folder: Path, repo_id: str, *, token: str | None = None, private: bool | None = None, **options: Any
    ) -> Callable[[], Publication]:
        def publish() -> Publication:
            try:
                return publish_student(
                    folder,
                    repo_id,
                    token=token or self.args.hub_token,
                    private=self.args.hub_private_repo if private is None else private,
                    license=self.args.hub_license,
                    **options,
                )
            except PublishingError as error:
                if SNAPSHOTS in folder.parts:
                    raise PublishingError(f"{error} Training goes on.") from error
                raise PublishingError(
                    f"{error} The student is saved: publish it later with `{command(folder, repo_id)}`."
                ) from error

        return publish

    def _repo_id(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish a checkpoint's student in the background, as ``hub_strategy`` wants it.

        The state that a checkpoint holds beside the student is not published: with the strategies "checkpoint" and
        "all_checkpoints" the student of each is there under "last-checkpoint" or its own name.
        """
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.pushes.busy and not self.args.hub_always_push:
            logger.info("A push to the Hub is under way, so that of %s is left out.", checkpoint_folder)
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        checkpoint = Path(checkpoint_folder)
        folder = Path(self.args.output_dir) / SNAPSHOTS / checkpoint.name
        try:
            card = Path(self.args.output_dir) / README
            snapshot(files_of(checkpoint)[0] | ({README: card} if card.is_file() else {}), folder)
            self.write_card(folder, folder=Path(self.args.output_dir).absolute().name)
        except Exception as error:
            self.pushes.report(RuntimeError(f"The student of {checkpoint} could not be prepared for a push: {error}"))
            return
        also_in = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        by_epoch = self.args.save_strategy != SaveStrategy.STEPS
        when = f"epoch {int(self.state.epoch or 0)}" if by_epoch else f"step {self.state.global_step}"
        publish = self._publishing(
            folder,
            self._repo_id(),
            revision=self.args.hub_revision,
            commit_message=f"Training in progress, {when}",
            also_in=also_in.get(HubStrategy(self.args.hub_strategy)),
        )

        def publish_and_clear() -> Publication:
            try:
                return publish()
            finally:
                shutil.rmtree(folder, ignore_errors=True)

        self.pushes.start(publish_and_clear)

    def _finish_current_push(self) -> None:
        self.pushes.wait()
        if self.is_world_process_zero():
            shutil.rmtree(Path(self.args.output_dir) / SNAPSHOTS, ignore_errors=True)
