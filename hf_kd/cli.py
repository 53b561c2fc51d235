"""The ``hf-kd`` command: each sub-command is a few lines over a public function."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from accelerate import PartialState

from .cache_command import caching_trainer
from .hub import Publication, publish_student
from .text import one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status: 0, 1 if something refused, 2 for a mistake in the arguments, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser("hf-kd", description="Knowledge distillation with timm and transformers.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_publish(commands)
    _add_cache_teacher(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"hf-kd {args.command}: error: {one_line(error)}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2
    except KeyboardInterrupt:
        print(f"hf-kd {args.command}: interrupted; the same command does it again.", file=sys.stderr)
        return 130
    return 0


def _add_publish(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "publish",
        help="publish a saved student on the Hugging Face Hub",
        description="Publish a student on the Hugging Face Hub in one commit, so that timm and transformers open it.",
    )
    parser.add_argument("dir", metavar="DIR", help="folder that trainer.save_model() or hf_kd.save_student() wrote")
    parser.add_argument("repo_id", metavar="REPO_ID", help="owner/name; made if it does not exist")
    parser.add_argument("--license", help="identifier of the licence, such as apache-2.0")
    parser.add_argument("--dataset", nargs="+", metavar="ID", help="Hub ids of the training data, for the card")
    parser.add_argument("--private", action="store_true", default=None, help="make a private repository")
    parser.add_argument("--revision", help="branch; made if it does not exist")
    parser.add_argument("--create_pr", "--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--message", default="Publish the student", help="of the commit")
    parser.add_argument("--overwrite", action="store_true", help="replace weights that hf_kd did not publish")
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="only list the files and the card; needs no network"
    )
    parser.set_defaults(run=_publish)


def _publish(args: argparse.Namespace) -> None:
    publication = publish_student(
        args.dir, args.repo_id, license=args.license, dataset=args.dataset, private=args.private,
        revision=args.revision, create_pr=args.create_pr, commit_message=args.message, overwrite=args.overwrite,
        dry_run=args.dry_run,
    )  # fmt: skip
    print(_listed(publication))
    if args.dry_run:
        print(f"\n{publication.card}\n\nNothing was published (--dry_run).")
    else:
        print(f"Published: {publication.url}")


def _add_cache_teacher(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "cache-teacher",
        help="compute a teacher's outputs on the training images ahead",
        description="Compute and store a teacher's logits on the training images, for all runs to come. Several "
        "processes share the work: accelerate launch ... -m hf_kd.cli cache-teacher CONFIG",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML of teacher, train_dir or dataset_name, teacher_cache_*")
    parser.add_argument(
        "overrides", nargs=argparse.REMAINDER, metavar="--FIELD VALUE", help="fields in place of the file's"
    )
    parser.set_defaults(run=_cache_teacher)


def _cache_teacher(args: argparse.Namespace) -> None:
    try:
        trainer = caching_trainer(args.config, args.overrides)
        rows = trainer.cache_teacher()
        if trainer.is_world_process_zero() and trainer.replay is not None:
            cache = trainer.replay.cache
            print(
                f"{cache.folder}: {rows:,} rows computed; it has {len(cache.views)} view(s) of {cache.samples:,} "
                f"samples, {cache.num_classes} classes, {cache.dtype}."
            )
    finally:
        PartialState().destroy_process_group()


def _listed(publication: Publication) -> str:
    width = max(len(f"{size:,}") for size in publication.files.values())
    lines = [f"{publication.repo_id}, branch {publication.revision}:"]
    lines += [f"  {size:>{width},} bytes  {name}" for name, size in publication.files.items()]
    if publication.left_out:
        lines.append(f"Not published: {', '.join(publication.left_out)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
