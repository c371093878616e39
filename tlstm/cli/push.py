"""`tlstm push`: a checkpoint folder to a Hub repo, in one commit."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tlstm.checkpoint.folder_view import FolderView

DESCRIPTION = """Push a checkpoint folder to a repo of the Hugging Face Hub, which is made if it is missing. The folder
is checked first. All its files go in one commit, which also removes the weights that the repo held before.
"""
EPILOG = """examples:
  tlstm push runs/first/model user/name --private
  tlstm push runs/first/model user/name --revision dev --message "After 10,000 steps"
  tlstm push runs/first/model someone/name --create-pr

The access token is that of `hf auth login`, or HF_TOKEN.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="checkpoint folder")
    parser.add_argument("repo", metavar="REPO", help="Hub repo id, user/name")
    parser.add_argument("--private", action="store_true", help="make a missing repo a private one")
    parser.add_argument("--revision", metavar="BRANCH", help="push to this branch, made if missing (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of changing the branch")
    parser.add_argument("--message", metavar="TEXT", help="first line of the commit (default: Upload model)")


def run(args: argparse.Namespace) -> int:
    from tlstm.checkpoint.folder_view import read_consistently
    from tlstm.checkpoint.stored_weights import is_weights_file
    from tlstm.cli.info import describe_checkpoint
    from tlstm.hub import push_folder

    with tempfile.TemporaryDirectory(prefix="tlstm-push-") as staging:
        copy = Path(staging) / "checkpoint"
        read_consistently(Path(args.folder).expanduser(), lambda view: _copy(view, copy))
        describe_checkpoint(copy)  # what is no whole checkpoint is refused before anything is sent
        commit = push_folder(
            copy,
            args.repo,
            is_stale=is_weights_file,
            commit_message=args.message,
            private=args.private or None,
            create_pr=args.create_pr,
            revision=args.revision,
        )
    print(commit.pr_url or commit.commit_url)
    return 0


def _copy(view: FolderView, target: Path) -> None:
    """The files of one completed save into `target`: a run may go on saving into the folder while it is pushed.

    Hidden files and folders are left out; they are no part of a model.
    """
    shutil.rmtree(target, ignore_errors=True)  # of an attempt during which the folder changed
    target.mkdir()
    nested = (path.relative_to(view.folder).as_posix() for path in view.folder.glob("*/**/*") if path.is_file())
    for name in [*view.names(), *nested]:
        path = view.path(name)
        if path is None or any(part.startswith(".") for part in Path(name).parts):
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
