"""`tlstm push`: a checkpoint folder to a Hub repo, in one commit."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tlstm.cli.errors import UsageError

if TYPE_CHECKING:
    from tlstm.checkpoint.folder_view import FolderView

DESCRIPTION = """Push a checkpoint folder to a repo of the Hugging Face Hub, which is made if it is missing. The folder
is checked first. All its files go in one commit, which also removes the weights that the repo held before.

A repo without a model card gets one; a card that tlstm made is made anew, and one that you have written or changed is
never touched, apart from --card-tag and --license.
"""
EPILOG = """examples:
  tlstm push runs/first/model user/name --private
  tlstm push runs/first/model user/name --license apache-2.0 --tag v1.0
  tlstm push runs/first/model user/name --revision dev --message "After 10,000 steps"
  tlstm push runs/first/model someone/name --create-pr
  tlstm push runs/first/model user/name --transformers-shim

The access token is that of `hf auth login`, or HF_TOKEN, unless --token gives another one.
"""
_CARD_SOURCES = ("training.json", "tokenizer.json", "loss.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="checkpoint folder")
    parser.add_argument("repo", metavar="REPO", help="Hub repo id, user/name")
    parser.add_argument("--private", action="store_true", help="make a missing repo a private one")
    parser.add_argument(
        "--revision", "--branch", metavar="BRANCH", help="push to this branch, made if missing (default: main)"
    )
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of changing the branch")
    parser.add_argument("--parent-commit", metavar="COMMIT", help="fail if the branch has moved on from this commit")
    parser.add_argument("--tag", metavar="NAME", help="give the new commit this tag, which `tlstm pull` finds it by")
    parser.add_argument("--variant", metavar="NAME", help="push model.NAME.safetensors only, not the other weights")
    parser.add_argument("--message", metavar="TEXT", help="first line of the commit (default: Upload model)")
    parser.add_argument("--license", metavar="ID", help="state this licence in the model card, such as apache-2.0")
    parser.add_argument(
        "--card-tag", action="append", default=[], metavar="TEXT", help="add a tag to the model card (several times)"
    )
    parser.add_argument(
        "--transformers-shim",
        action="store_true",
        help="add modeling_tlstm.py, one line with which transformers loads the repo with trust_remote_code=True",
    )
    add_token_argument(parser)


def add_token_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--token", metavar="TOKEN", help="access token; other users of the machine may see it here")


def run(args: argparse.Namespace) -> int:
    from tlstm.checkpoint.folder_view import read_consistently
    from tlstm.checkpoint.stored_weights import is_weights_file
    from tlstm.cli.info import describe_checkpoint
    from tlstm.hub.card import make_card
    from tlstm.hub.push import hub_api, push_folder
    from tlstm.transformers_shim import add_shim

    if args.tag is not None:
        _check_tag(args)
    with tempfile.TemporaryDirectory(prefix="tlstm-push-") as staging:
        copy = Path(staging) / "checkpoint"
        read_consistently(Path(args.folder).expanduser(), lambda view: _copy(view, copy, args.variant))
        # What is no whole checkpoint is refused before anything is sent.
        report = describe_checkpoint(copy, variant=args.variant)
        if args.transformers_shim:
            add_shim(copy)
        sources = {name: (copy / name).read_bytes() for name in _CARD_SOURCES if (copy / name).is_file()}

        def card(repo_id: str) -> str:
            return make_card(report["config"], name=repo_id, parameters=report["parameters"]["total"], files=sources)

        def is_stale(name: str) -> bool:
            """Files of the set that the new one replaces: former weights, and the former training checkpoint."""
            folder, nested, _ = name.partition("/")
            in_training = bool(nested) and folder == "training" and (copy / folder).is_dir()
            return is_weights_file(name, args.variant) or in_training

        commit = push_folder(
            copy,
            args.repo,
            is_stale=is_stale,
            make_card=card,
            commit_message=args.message,
            private=args.private or None,
            token=args.token,
            create_pr=args.create_pr,
            revision=args.revision,
            parent_commit=args.parent_commit,
            tags=args.card_tag,
            license=args.license,
        )
    print(commit.pr_url or commit.commit_url)
    if args.tag is not None:
        hub_api(args.token).create_tag(commit.repo_url.repo_id, tag=args.tag, revision=commit.oid)
    return 0


def _check_tag(args: argparse.Namespace) -> None:
    """Before anything is sent: a commit without the tag that it was to have is half a push."""
    from huggingface_hub.errors import RepositoryNotFoundError

    from tlstm.hub.push import hub_api

    if args.create_pr:
        raise UsageError("--tag and --create-pr exclude each other: a tag names a commit of a branch")
    try:
        refs = hub_api(args.token).list_repo_refs(args.repo)
    except RepositoryNotFoundError:
        return  # it will be made
    if args.tag in {ref.name for ref in refs.tags}:
        raise UsageError(
            f"--tag {args.tag}: {args.repo} has this tag already; choose another, or delete that one first"
        )


def _copy(view: FolderView, target: Path, variant: str | None) -> None:
    """The files of one completed save into `target`: a run may go on saving into the folder while it is pushed.

    Hidden files and folders are left out; they are no part of a model. With a variant the other weights are, too.
    """
    shutil.rmtree(target, ignore_errors=True)  # of an attempt during which the folder changed
    target.mkdir()
    for name in [*view.names(), *_nested(view.folder)]:
        if any(part.startswith(".") for part in Path(name).parts) or _is_other(name, variant):
            continue
        path = view.path(name)
        if path is not None:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_checked(path, view.folder), target / name)


def _nested(folder: Path) -> Iterator[str]:
    """Names of the files in the folders of `folder`. Links to folders are not followed, which may lead anywhere."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if Path(parent, name).is_symlink():
                raise ValueError(
                    f"{Path(parent, name)}: a link to a folder, which is not pushed; copy the folder there"
                )
        if Path(parent) != folder:
            yield from (Path(parent, name).relative_to(folder).as_posix() for name in sorted(files))


def _checked(path: Path, folder: Path) -> Path:
    """The file that `path`, of a checkpoint in `folder`, leads to.

    A folder that somebody else made may have links to files of this machine that are no part of a model, to publish
    which is not what the user asked for. Links within the folder and those of the Hub's cache, which keeps the files of
    `snapshots/<revision>` in `blobs`, are followed.

    Raises:
        ValueError: a link leads to a file elsewhere, or to a hidden one.
    """
    root, real = folder.resolve(), path.resolve()
    if real == root / path.relative_to(folder):
        return real
    within = real.is_relative_to(root) and not any(part.startswith(".") for part in real.relative_to(root).parts)
    in_cache = root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
    if not within and not in_cache:
        raise ValueError(
            f"{path}: a link to {real}, which is no file of the folder, and is not pushed; remove the link, or copy "
            "the file there"
        )
    return real


def _is_other(name: str, variant: str | None) -> bool:
    from tlstm.checkpoint.stored_weights import is_weights_file

    is_weights = "/" not in name and name.startswith("model") and ".safetensors" in name
    return variant is not None and is_weights and not is_weights_file(name, variant)
