"""`tlstm pull`: a checkpoint from a Hub repo into a folder."""

from __future__ import annotations

import argparse
import functools
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from tlstm.cli.errors import UsageError
from tlstm.cli.push import add_token_argument

DESCRIPTION = """Pull a checkpoint from a repo of the Hugging Face Hub into a folder: weights, config, tokenizer and
card, all of one commit. The folder is made if it is missing; a checkpoint in it is replaced as a whole, and other files
stay.
"""
EPILOG = """examples:
  tlstm pull user/name models/name
  tlstm pull user/name@v1.0 models/name
  tlstm pull user/name models/name --revision refs/pr/1

To go on with a training run that was pushed with its checkpoint: tlstm train --out DIR --resume user/name
The access token is that of `hf auth login`, or HF_TOKEN, unless --token gives another one.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo", metavar="REPO[@REVISION]", help="Hub repo id, user/name")
    parser.add_argument("folder", metavar="DIR", help="folder to put the checkpoint into")
    parser.add_argument(
        "--revision", metavar="NAME", help="branch, tag, commit or refs/pr/N of the repo (default: main)"
    )
    parser.add_argument("--variant", metavar="NAME", help="pull model.NAME.safetensors instead of model.safetensors")
    add_token_argument(parser)


def run(args: argparse.Namespace) -> int:
    from tlstm.checkpoint.folder_swap import FileContent, replace_files
    from tlstm.cli.info import describe_checkpoint
    from tlstm.config import CONFIG_NAME, LSTMConfig
    from tlstm.hub.card import CARD_NAME, CURVE_NAME
    from tlstm.hub.download import download_snapshot
    from tlstm.hub.locate import checkpoint_files
    from tlstm.transformers_shim import SHIM, SHIM_NAME, names_shim

    repo, _, revision = args.repo.partition("@")
    if revision and args.revision is not None:
        raise UsageError(f"the revision is given twice, as {revision!r} and --revision {args.revision}; leave out one")
    folder = Path(args.folder).expanduser()
    patterns, companions = checkpoint_files(args.variant), {CARD_NAME, CURVE_NAME}
    if (folder / CARD_NAME).exists() and not (folder / "config.json").exists():
        companions.remove(CARD_NAME)  # that README is about something else
    snapshot = download_snapshot(
        repo, revision=revision or args.revision, token=args.token, allow_patterns=[*patterns, *companions]
    )
    # What is no whole checkpoint does not replace one.
    report = describe_checkpoint(snapshot, variant=args.variant)

    def is_part(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    # The weights come first and the config last, as `replace_files` asks.
    names = sorted(
        (path.name for path in snapshot.iterdir() if path.name in companions or is_part(path.name)),
        key=lambda name: (not name.endswith(".safetensors"), name == "config.json", name),
    )
    files: dict[str, FileContent] = {name: functools.partial(shutil.copyfile, snapshot / name) for name in names}
    if names_shim(LSTMConfig.from_json_file(snapshot / CONFIG_NAME).extra):
        files = {SHIM_NAME: SHIM, **files}  # our own line: code is never downloaded
    replace_files(folder, files, is_stale=is_part)
    print(f"{args.folder}: {len(names)} files of {args.repo}, {report['parameters']['total']:,} parameters")
    return 0
