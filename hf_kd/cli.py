"""The ``hf-kd`` command: each sub-command is a few lines over a public function."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .hub import Publication, PublishingError, publish_student
from .text import one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status: 0, 1 if the Hub refused, 2 for a mistake in the arguments, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser("hf-kd", description="Knowledge distillation with timm and transformers.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_publish(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, PublishingError) as error:
        print(f"hf-kd {args.command}: error: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
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


def _listed(publication: Publication) -> str:
    width = max(len(f"{size:,}") for size in publication.files.values())
    lines = [f"{publication.repo_id}, branch {publication.revision}:"]
    lines += [f"  {size:>{width},} bytes  {name}" for name, size in publication.files.items()]
    if publication.left_out:
        lines.append(f"Not published: {', '.join(publication.left_out)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
