"""`tlstm generate` for many texts: through a few rows, each refilled as soon as its text has ended."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tlstm.cli.generate_texts import INTERRUPTED, PieceDecoder, Result, Text

if TYPE_CHECKING:
    from tlstm.cli.texts_file import TextsFile
    from tlstm.generation.batching import BatchedText
    from tlstm.models import LSTMForCausalLM
    from tlstm.tokenizer.tokenizer import Tokenizer
    from tlstm.training.interrupt import StopRequest


def generate_batch(
    model: LSTMForCausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[tuple[str, list[int]]],
    settings: dict[str, Any],
    stop: StopRequest,
    *,
    batch_size: int,
    decoder: str,
    copies: int,
    emit: Callable[[Text], None],
    file: TextsFile | None = None,
    progress: bool = False,
) -> Result:
    """`copies` texts of each prompt, handed to `emit` in the order of the prompts, each as soon as its turn has come.

    A stop request ends it after the token in the making: what has ended is kept, texts that were begun are handed out
    as they are, prompts that were not are left out. With a `file`, only the texts that it lacks are made, each goes
    there as soon as it ends, and `emit` gets none; what was begun is not written, so that a resumed run makes it whole.
    """
    from tqdm import tqdm

    todo = [number for number in range(len(prompts)) if file is None or not _has(file, number, copies)]
    settings = _for_prompts(settings, todo)
    batcher = model.generate_many(
        [prompts[number][1] for number in todo], batch_size, tokenizer=tokenizer, decoder=decoder, **settings
    )
    texts: dict[int, Text] = {}
    states: dict[int, Any] = {}
    handed_out = 0
    reader_gone = False

    def take(batched: BatchedText) -> int:
        words, ids = prompts[todo[batched.prompt]]
        decode = PieceDecoder(tokenizer, ids)
        text = "".join(map(decode.step, batched.new_tokens)) + decode.flush()
        index = todo[batched.prompt] * copies + batched.copy
        reason = batched.finish_reason or INTERRUPTED
        texts[index] = Text(words, text, batched.new_tokens, reason, batched.seed)
        states[index] = batched.state
        return index

    bar = tqdm(
        total=len(prompts) * copies, initial=(len(prompts) - len(todo)) * copies, unit="text", disable=not progress
    )
    if file is not None:
        file.open()
    try:
        with bar:
            while stop.signal is None and (ended := batcher.step()) is not None:
                for batched in ended:
                    index = take(batched)
                    if file is not None and index not in file.records:
                        file.add(index, _record(texts[index]))
                    bar.update()
                    bar.set_postfix_str(f"{batcher.timings.decode_tokens_per_second:,.0f} tokens/s", refresh=False)
                while file is None and handed_out in texts:
                    emit(texts[handed_out])
                    handed_out += 1
        if file is None:
            for batched in batcher.unfinished:
                take(batched)
            for index in sorted(texts):
                if index >= handed_out:
                    emit(texts[index])
    except BrokenPipeError:
        reader_gone = True
    finally:
        if file is not None:
            file.close()
    order = sorted(texts)
    return Result(
        [texts[index] for index in order],
        None if not states else _joined([states[index] for index in order]),
        batcher.timings,
        reader_gone,
        decoder=batcher.decoder,
    )


def show_progress(quiet: bool, to_stdout: bool) -> bool:
    """A bar is for a terminal that nothing else is written to."""
    return not quiet and sys.stderr.isatty() and not (to_stdout and sys.stdout.isatty())


def _has(file: TextsFile, number: int, copies: int) -> bool:
    return all(number * copies + copy in file.records for copy in range(copies))


def _for_prompts(settings: dict[str, Any], numbers: list[int]) -> dict[str, Any]:
    """The settings with the seeds of these prompts, where each prompt has its own."""
    seed = settings.get("seed")
    return settings | {"seed": [seed[number] for number in numbers]} if isinstance(seed, list) else settings


def _record(text: Text) -> dict[str, Any]:
    return {
        "prompt": text.prompt,
        "text": text.text,
        "tokens": text.tokens,
        "finish_reason": text.finish_reason,
        "seed": text.seed,
    }


def _joined(states: list[Any]) -> Any:
    """The states of single texts as one."""
    from tlstm.generation.state import GenerationState
    from tlstm.state import LSTMState

    seeds = [seed for state in states for seed in state.seeds or ()]
    return GenerationState(
        recurrent=LSTMState.cat([state.recurrent for state in states]),
        tokens=tuple(ids for state in states for ids in state.tokens),
        vocab_size=states[0].vocab_size,
        seeds=tuple(seeds) or None,
        return_index=tuple(index for state in states for index in state.return_index),
    )
