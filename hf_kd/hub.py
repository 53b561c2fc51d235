"""Publishing a student on the Hugging Face Hub: one commit, retried, read back, and failures in one sentence."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers.utils import logging

from .model_card import PROVENANCE, README, StudentCard
from .repository import (
    CONFIG,
    check_folder,
    files_of,
    holds_weights,
    mend_wrapped,
    read_json,
    replaced_by,
    without_paths,
)
from .student import save_student
from .text import first_line, one_line, some


logger = logging.get_logger(__name__)

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds between the attempts of a push; a server's Retry-After is waited for instead, up to ``LONGEST_WAIT``."""
LONGEST_WAIT = 300.0

_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
"""Packages whose errors mean that there was no answer."""


class PublishingError(RuntimeError):
    """Why a student is not on the Hub, and what to do, in one sentence."""


@dataclass(frozen=True)
class Publication:
    """What was published, as it was read back from the Hub (or, of a dry run, what would be).

    Attributes:
        repo_id: ``owner/name``.
        revision: the branch.
        files: sizes in bytes, by path in the repository.
        card: the text of README.md.
        left_out: what of the folder is not published.
        commit: its identifier; None for a dry run.
        url: of the commit, or of the pull request.
    """

    repo_id: str
    revision: str
    files: Mapping[str, int]
    card: str
    left_out: Sequence[str] = ()
    commit: str | None = None
    url: str | None = None


@dataclass
class _Push:
    """The arguments of one push, checked."""

    repo_id: str
    files: Mapping[str, Path]
    card: StudentCard
    local_card: str | None
    """The text of the folder's README.md, if there is one."""
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str = "Publish the student"
    token: str | None = None
    overwrite: bool = False
    also_in: str | None = None
    left_out: Sequence[str] = ()
    made: str | None = None
    """The commit, once it is made: only reading it back can fail then."""

    @property
    def branch(self) -> str:
        return self.revision or "main"

    def content(self, remote_card: str | None = None) -> dict[str, Path | bytes]:
        """The repository's files; texts are made for it, and say nothing of this machine."""
        content: dict[str, Path | bytes] = dict(self.files)
        for name in (PROVENANCE, CONFIG):
            if name in content:
                content[name] = _public_json(self.files[name], whole=name == PROVENANCE)
        content[README] = self.card.merged(self.local_card, remote_card).encode()
        for name, text in self.card.eval_result_files().items():
            content.setdefault(name, text.encode())
        if self.also_in is not None:
            # The student of this moment once more, under a name that the next push does not replace.
            names = [name for name in content if name.endswith(".safetensors") or name in (CONFIG, PROVENANCE)]
            content.update({f"{self.also_in}/{name}": content[name] for name in names})
        return content


def publish_student(
    student: str | os.PathLike[str] | nn.Module,
    repo_id: str,
    *,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Publish the student",
    token: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    label_names: Sequence[str] | None = None,
    also_in: str | None = None,
    **card: Any,
) -> Publication:
    """Publish a student on the Hugging Face Hub, in one commit, so that timm and transformers open it.

    Published are safetensors weights, ``config.json`` (with labels and preprocessing), the card, results, curves, and
    how the student came about (``distillation.json``, ``training_args.json``): never a pickle, an optimiser or a
    teacher. What was published is read back and compared. A card that was edited by hand, here or on the Hub, keeps
    what is written outside of its marks.

    Args:
        student: a folder that ``save_model`` or :func:`hf_kd.save_student` wrote, or a network.
        repo_id: ``owner/name``, or a name of your own; made if it does not exist.
        license: identifier of the weights' licence. Needed unless the card in the folder names one, or the training
            data's or starting weights' licence is known.
        private: whether a repository that is made here is private.
        revision: branch; made if it does not exist.
        create_pr: open a pull request instead of changing the branch.
        token: by default the one of ``hf auth login`` or HF_TOKEN.
        overwrite: replace weights that hf_kd did not publish.
        dry_run: only say what would be published, without a network.
        label_names: names of the classes, for a bare timm network.
        also_in: folder of the repository that gets weights and configuration once more.
        card: further fields of :class:`hf_kd.model_card.StudentCard`, such as ``dataset`` or ``results``.

    Raises:
        ValueError: for a folder without a student, a name that the Hub does not allow, or a missing licence.
        PublishingError: if the Hub could not be reached or refused; then nothing has changed there.
    """
    repo_id = _checked_id(repo_id)
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"A pull request goes to main, so `revision` {revision!r} cannot be given with `create_pr`.")
    if isinstance(student, nn.Module):
        with tempfile.TemporaryDirectory() as folder:
            save_student(student, folder, label_names=label_names)
            return publish_student(
                folder, repo_id, license=license, private=private, revision=revision, create_pr=create_pr,
                commit_message=commit_message, token=token, overwrite=overwrite, dry_run=dry_run, also_in=also_in,
                **card,
            )  # fmt: skip
    if label_names is not None:
        raise ValueError("`label_names` are for a network; a saved student has its own in config.json.")
    check_folder(student)
    with tempfile.TemporaryDirectory() as mended:
        files, left_out = files_of(student)
        if mend_wrapped(student, mended):
            files.update(files_of(mended)[0])
        local_card = files[README].read_text(encoding="utf-8-sig") if README in files else None
        given = {"license": license, **card}
        push = _Push(
            repo_id, files, _card(Path(student), files.get(CONFIG), repo_id, local_card, given), local_card,
            private=private, revision=revision, create_pr=create_pr, commit_message=commit_message, token=token,
            overwrite=overwrite, also_in=also_in, left_out=left_out,
        )  # fmt: skip
        return _publication(push, repo_id, push.content()) if dry_run else _send(push)


def _card(
    folder: Path, config_file: Path | None, repo_id: str, local_card: str | None, given: Mapping[str, Any]
) -> StudentCard:
    """The card of the folder, with a licence from somewhere."""
    card = StudentCard.from_folder(
        folder, config_file=config_file, repo_id=repo_id, model_name=repo_id.rpartition("/")[2],
        **{key: value for key, value in given.items() if value is not None},
    )  # fmt: skip
    if not card.known_license(local_card):
        raise ValueError(
            "The student has no licence, and none can be inherited from its training data or starting weights: give "
            'its identifier, such as license="apache-2.0" (config: hub_license; hf-kd publish --license).'
        )
    return card


def make_repository(repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Make a repository if there is none of the name; its full name.

    Raises:
        ValueError: for a name that the Hub does not allow.
        PublishingError: if it cannot be made.
    """
    with publishing(repo_id, token):
        return HfApi(token=token, library_name="hf_kd").create_repo(repo_id, private=private, exist_ok=True).repo_id


@contextlib.contextmanager
def publishing(repo_id: str, token: str | None) -> Iterator[None]:
    """The body talks to the Hub about a repository: what keeps it from doing so is a PublishingError.

    Raises:
        ValueError: for a name that the Hub does not allow.
    """
    _check_reachable(_checked_id(repo_id), token)
    try:
        yield
    except (ValueError, PublishingError) as error:
        if isinstance(error, OSError):
            raise PublishingError(_sentence(repo_id, _cause(error))) from error
        raise
    except Exception as error:
        raise PublishingError(_sentence(repo_id, _cause(error))) from error


# ---- The push ------------------------------------------------------------------------------------------------------


def _check_reachable(repo_id: str, token: str | None) -> None:
    if huggingface_hub.constants.is_offline_mode():
        raise PublishingError(f"Nothing was published to {repo_id}: HF_HUB_OFFLINE is set.")
    if token is None and get_token() is None:
        raise PublishingError(
            f"Nothing was published to {repo_id}: there is no token for the Hub. Log in with `hf auth login`, or "
            "set HF_TOKEN."
        )


def _send(push: _Push) -> Publication:
    _check_reachable(push.repo_id, push.token)
    waits = iter(WAITS)
    attempts = 0
    while True:
        attempts += 1
        try:
            return _attempt(push)
        except PublishingError:
            raise
        except Exception as error:
            cause = _cause(error)
            wait = next(waits, None) if _is_passing(cause, push) else None
            if wait is None:
                sentence = _sentence(push.repo_id, cause, attempts=attempts, branch=push.branch, made=push.made)
                raise PublishingError(sentence) from error
            wait = min(max(wait, _retry_after(cause)), LONGEST_WAIT)
            logger.warning(
                "The push to %s failed (%s); it is tried again in %g s.", push.repo_id, _reason(cause), wait
            )
            time.sleep(wait)


def _attempt(push: _Push) -> Publication:
    api = HfApi(token=push.token, library_name="hf_kd")
    repo_id = api.create_repo(push.repo_id, private=push.private, exist_ok=True).repo_id
    if push.branch != "main":
        api.create_branch(repo_id, branch=push.branch, exist_ok=True)
    head = api.model_info(repo_id, revision=push.branch)
    present = {file.rfilename for file in head.siblings or []}
    if holds_weights(present) and PROVENANCE not in present and not (push.overwrite or push.create_pr):
        raise PublishingError(
            f"Nothing was published to {repo_id}: it holds weights that hf_kd did not publish. Take another name, or "
            "replace them with overwrite=True (hf-kd publish --overwrite)."
        )
    remote_card = _read(api, repo_id, str(head.sha), README) if README in present else None
    content = replace(push, card=replace(push.card, repo_id=repo_id)).content(remote_card)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, source) for name, source in content.items()
    ]
    operations += [CommitOperationDelete(name) for name in replaced_by(content, present)]
    with _quiet_client():
        commit = api.create_commit(
            repo_id, operations, commit_message=push.commit_message, revision=push.branch,
            parent_commit=head.sha, create_pr=push.create_pr,
        )  # fmt: skip
    oid = push.made = str(commit.oid)
    differing = _differences(api, repo_id, oid, content)
    if differing:
        raise PublishingError(
            f"What was published to {repo_id} as commit {oid} is not what was sent: {some(differing, 5)} read back "
            "otherwise. Publish again."
        )
    logger.info("Published %s as commit %s.", repo_id, oid)
    url = commit.pr_url or str(commit.commit_url)
    return replace(_publication(push, repo_id, content), commit=oid, url=url)


def _publication(push: _Push, repo_id: str, content: Mapping[str, Path | bytes]) -> Publication:
    sizes = {name: len(s) if isinstance(s, bytes) else s.stat().st_size for name, s in sorted(content.items())}
    card = content[README]
    assert isinstance(card, bytes)
    return Publication(repo_id, push.branch, sizes, card.decode(), push.left_out)


def _read(api: HfApi, repo_id: str, revision: str, name: str) -> str | None:
    """A text of a repository, past the cache."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = api.hf_hub_download(repo_id, name, revision=revision, local_dir=folder)
        except EntryNotFoundError:
            return None
        return Path(path).read_bytes().decode("utf-8-sig")


def _differences(api: HfApi, repo_id: str, commit: str, content: Mapping[str, Path | bytes]) -> list[str]:
    """The files that the Hub has otherwise than they were sent, by size and hash."""
    there = {info.path: info for info in api.get_paths_info(repo_id, list(content), revision=commit)}
    differing = []
    for name, source in content.items():
        info = there.get(name)
        lfs = getattr(info, "lfs", None)
        sha256, blob, size = _hashes(source)
        found = (lfs.sha256 if lfs else getattr(info, "blob_id", None), getattr(info, "size", None))
        if found != (sha256 if lfs else blob, size):
            differing.append(name)
    return differing


def _hashes(source: Path | bytes) -> tuple[str, str, int]:
    """SHA-256, git's blob id, and the size."""
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    for chunk in [source] if isinstance(source, bytes) else _chunks(source):
        sha256.update(chunk)
        blob.update(chunk)
    return sha256.hexdigest(), blob.hexdigest(), size


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            yield chunk


@contextlib.contextmanager
def _quiet_client() -> Iterator[None]:
    """Without huggingface_hub's warnings: that nothing has changed is no fault here."""
    log = huggingface_hub.logging.get_logger("huggingface_hub.hf_api")
    level = log.level
    log.setLevel("ERROR")
    try:
        yield
    finally:
        log.setLevel(level)


def _public_json(path: Path, whole: bool) -> bytes:
    """A JSON file without the machine's paths: in all its values, or where transformers keeps a model's origin."""
    values = read_json(path)
    if whole:
        public = without_paths(values)
    else:
        public = {key: without_paths(value) if key == "_name_or_path" else value for key, value in values.items()}
    return path.read_bytes() if public == values else (json.dumps(public, indent=2) + "\n").encode()


# ---- Failures ------------------------------------------------------------------------------------------------------


def _checked_id(repo_id: str) -> str:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name for a repository on the Hub: {first_line(error)}") from None
    return repo_id


def _cause(error: Exception) -> Exception:
    """The error of the Hub or the network beneath what the client made of it."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_transport(error: Exception) -> bool:
    """Whether the network failed, so that there was no answer."""
    name = type(error).__module__.split(".")[0]
    return _status(error) is None and (isinstance(error, (ConnectionError, TimeoutError)) or name in _CLIENTS)


def _is_passing(error: Exception, push: _Push) -> bool:
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if _is_transport(error):
        # The answer may have been lost rather than the request: a second pull request would be opened.
        return not push.create_pr
    # 412: somebody else's commit came first, and the next attempt begins with it.
    return _status(error) in (408, 412, 429) or (_status(error) or 0) >= 500


def _retry_after(error: Exception) -> float:
    headers = getattr(getattr(error, "response", None), "headers", {})
    value = headers.get("Retry-After", "0")
    with contextlib.suppress(ValueError):
        return float(value)
    with contextlib.suppress(ValueError):
        return parsedate_to_datetime(value).timestamp() - time.time()
    return 0.0


def _reason(error: Exception) -> str:
    status = _status(error)
    if status is not None:
        said = getattr(error, "server_message", None)
        return f"the Hub answered {status}" + (f": {' '.join(said.split()).rstrip('.')}" if said else "")
    if _is_transport(error):
        return f"the Hub cannot be reached: {first_line(error)}"
    return one_line(error).rstrip(".")


def _sentence(
    repo_id: str, error: Exception, *, attempts: int = 1, branch: str = "main", made: str | None = None
) -> str:
    """What failed, and what to do; ``made`` is the commit, if it was made before."""
    status = _status(error)
    reason = _reason(error)
    advice = ""
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        advice = " Log in with `hf auth login`, or set HF_TOKEN to a token that is valid."
    elif isinstance(error, RevisionNotFoundError):
        advice = f" There is no branch {branch!r}."
    elif status == 403 or isinstance(error, RepositoryNotFoundError):
        advice = (
            f" The token has no right to write there, or the name is somebody else's: take a token with the right to "
            f"write, or a name under your own account in place of {repo_id!r}."
        )
    elif attempts > 1:
        advice = f" It was tried {attempts} times."
    what = f"Nothing was published to {repo_id}"
    if made is not None:
        what = f"Commit {made} was made in {repo_id}, but could not be read back"
    return f"{what}: {reason}.{advice}"


def command(folder: str | os.PathLike[str], repo_id: str) -> str:
    """The command that publishes a folder later."""
    return shlex.join(["hf-kd", "publish", str(folder), repo_id])
