"""What most tests of the Hub do in a client process: push a small model, pull one, and tell models apart."""

from __future__ import annotations

import pytest
from hub.client import Client, ClientError


def push(client: Client, name: str, seed: int = 0, **options) -> str:
    """Push the model of `seed`; the commit."""
    return client.run(
        "result = causal_lm(seed).push_to_hub(name, **options).oid", name=name, seed=seed, options=options
    )


def pull(client: Client, name: str, **options) -> str:
    """Pull a model; the hash of its weights."""
    code = "result = digest(LSTMForCausalLM.from_pretrained(name, **options))"
    return client.run(code, name=name, options=options)


def made(client: Client, seed: int) -> str:
    """The hash of the weights of the model of `seed`."""
    return client.run("result = digest(causal_lm(seed))", seed=seed)


def failed_pull(client: Client, name: str, **options) -> ClientError:
    with pytest.raises(ClientError) as failure:
        pull(client, name, **options)
    return failure.value


def command(client: Client, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `tlstm arguments...`."""
    code = "result = tlstm_command(*arguments)"
    return tuple(client.run(code, arguments=[str(argument) for argument in arguments]))
