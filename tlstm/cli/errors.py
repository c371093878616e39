"""Which errors are the user's to mend, and how they read in one line."""

from __future__ import annotations

import sys

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
EXIT_PIPE = 141  # 128 + SIGPIPE

# Errors of libraries that may not have been imported, and are not imported for this: (module, name).
_FOREIGN = (
    ("tlstm.functional", "BackendUnavailableError"),
    ("huggingface_hub.errors", "HfHubHTTPError"),
    ("huggingface_hub.errors", "SafetensorsParsingError"),
    ("huggingface_hub.errors", "NotASafetensorsRepoError"),
    ("httpx", "HTTPError"),  # the connection's errors, under huggingface_hub 1
    ("httpx2", "HTTPError"),  # and 2
    ("torch", "OutOfMemoryError"),
)


class UsageError(ValueError):
    """A command line that does not make sense."""


def is_user_error(error: Exception) -> bool:
    """Whether the error is about input, files, network or machine rather than a bug of this program."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in _FOREIGN)
    foreign = tuple(kind for kind in found if kind is not None)
    # A missing optional package (ImportError) is told by the code that wants it, with its remedy.
    return isinstance(error, (ValueError, OSError, ImportError, FloatingPointError, *foreign))


def describe(error: Exception) -> str:
    """The error as one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error)
    text = " ".join([text, *(f"({note})" for note in getattr(error, "__notes__", ()))])
    return " ".join(text.split()) or type(error).__name__
