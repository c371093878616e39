"""Runs code given line by line on stdin, in one namespace, and answers each line with a line of JSON.

The Hub's client reads its settings when it is imported, so each environment is a process of its own. The client is the
real one; only its waits between two attempts are cut short.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    requests = os.fdopen(os.dup(0))
    os.dup2(2, 1)  # whatever else is printed must not end up among the answers,
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # and commands that read stdin not eat the requests
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))
    namespace: dict[str, Any] = {"tlstm_command": tlstm_command}
    for line in requests:
        request = json.loads(line)
        namespace.update(request["values"], result=None)
        try:
            exec(request["code"], namespace)  # the test's own code
            answer = {"result": namespace["result"]}
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            status = getattr(getattr(error, "response", None), "status_code", None)
            answer = {"error": {"kinds": kinds, "text": str(error), "status": status}}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def tlstm_command(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `tlstm arguments...`."""
    from tlstm.cli import main as tlstm_main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = tlstm_main(arguments)
    return code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    main()
