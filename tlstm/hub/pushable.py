"""`Pushable`: `push_to_hub` for what is a few small files, a tokenizer or a configuration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


class Pushable(ABC):
    """Base of classes whose `files()` are all that there is to them."""

    @abstractmethod
    def files(self) -> Mapping[str, bytes]:
        """Name -> content of the files that hold this object."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        parent_commit: str | None = None,
        tags: Sequence[str] | None = None,
    ) -> CommitInfo:
        """Push the files to a Hub repo (made if missing) in one commit that leaves its other files alone.

        Arguments, result and errors as in `PreTrainedModel.push_to_hub`. A repo without a model card gets a short one,
        in whose place the next push of a model puts a whole one.
        """
        from tlstm.hub.push import push_files  # slow to import, and of no use to most who make a configuration

        return push_files(
            self.files(),
            repo_id,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            commit_description=commit_description,
            private=private,
            token=token,
            create_pr=create_pr,
            revision=revision,
            parent_commit=parent_commit,
            tags=tags,
        )
