"""`tlstm pull`: a checkpoint from a Hub repo into a folder."""

from __future__ import annotations

import argparse
import functools
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

DESCRIPTION = """Pull a checkpoint from a repo of the Hugging Face Hub into a folder: weights, config, tokenizer and
card, all of one commit. The folder is made if it is missing; a checkpoint in it is replaced as a whole, and other files
stay.
"""
EPILOG = """examples:
  tlstm pull user/name models/name
  tlstm pull user/name models/name --revision v1.0
  tlstm pull user/name models/name --revision refs/pr/1

The access token is that of `hf auth login`, or HF_TOKEN.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo", metavar="REPO", help="Hub repo id, user/name")
    parser.add_argument("folder", metavar="DIR", help="folder to put the checkpoint into")
    parser.add_argument(
        "--revision", metavar="NAME", help="branch, tag, commit or refs/pr/N of the repo (default: main)"
    )


def run(args: argparse.Namespace) -> int:
    from tlstm.checkpoint.folder_swap import replace_files
    from tlstm.cli.info import describe_checkpoint
    from tlstm.hub import CARD, checkpoint_files, download_snapshot

    patterns = checkpoint_files()
    snapshot = download_snapshot(args.repo, revision=args.revision, allow_patterns=[*patterns, CARD])
    report = describe_checkpoint(snapshot)  # what is no whole checkpoint does not replace one

    def is_part(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    # The weights come first and the config last, as `replace_files` asks.
    names = sorted(
        (path.name for path in snapshot.iterdir() if path.name == CARD or is_part(path.name)),
        key=lambda name: (not name.endswith(".safetensors"), name == "config.json", name),
    )
    files = {name: functools.partial(shutil.copyfile, snapshot / name) for name in names}
    replace_files(Path(args.folder).expanduser(), files, is_stale=is_part)
    print(f"{args.folder}: {len(names)} files of {args.repo}, {report['parameters']['total']:,} parameters")
    return 0
