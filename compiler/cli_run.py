"""qnpu-run: a folder of two graphs and a prompt → tokens, one after the other → print."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from qnpu.compiler.console import (
    DebugOption,
    JsonOption,
    QuietOption,
    VersionOption,
    application,
    command,
    error_console,
    peak_rss_bytes,
    print_json,
)
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.rules import UnknownModel
from qnpu.models.load import load_onnx, load_tokenizer
from qnpu.models.tokenizer import Tokenizer
from qnpu.runtime_check.generate import (
    DECODE_NAME,
    PREFILL_NAME,
    CachedRunner,
    Generation,
    generate,
)

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder gives for a part of a letter


@command
def _run(
    model: Annotated[
        Path, typer.Argument(help="A folder that qnpu-compile --context wrote.", show_default=False)
    ],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.", show_default=False)],
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="To generate at most.", min=1)] = 64,
    ignore_eos: Annotated[bool, typer.Option(help="Go on behind the end of the text.")] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder, tokenizer.json or id. Default: in the folder.")
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
    version: VersionOption = False,
) -> None:
    """Generate text with the integer graphs alone, always the most likely token.

    The text goes to standard output as it comes, tokens per second to standard error.
    """
    del debug, version  # for the decorator, and for what comes before
    paths = model / PREFILL_NAME, model / DECODE_NAME
    prefill, decode = (load_onnx(path) for path in paths)
    words = load_tokenizer(tokenizer or paths[1])
    if words is None:
        fault = UnknownModel(tokenizer or str(model), "no tokenizer lies there")
        raise DiagnosticError(fault.at(file=str(model)))
    runner = CachedRunner(prefill, decode, paths)
    ids = words.encode(prompt)
    if words.adds_bos and words.bos_token_id is not None:
        ids = [words.bos_token_id, *ids]
    end = words.eos_token_id
    stop = () if ignore_eos or end is None else (end,)
    write: Callable[[int], None] = _ignore if json else _Printer(words, stop).take
    found = generate(runner, ids, tokens, stop, write)
    if json:
        print_json(_summary(words, found, stop))
        return
    sys.stdout.write("\n")
    if not quiet:
        error_console().print(Text(_rates(found), "dim"))


def _ignore(token: int) -> None:
    del token


class _Printer:
    """Writes the text of tokens as it becomes known; letters of several tokens come whole."""

    def __init__(self, words: Tokenizer, stop: tuple[int, ...]) -> None:
        self._words, self._stop = words, stop
        self._ids: list[int] = []
        self._written = 0

    def take(self, token: int) -> None:
        """One more token."""
        if token in self._stop:
            return
        self._ids.append(token)
        text = self._words.decode(self._ids)
        if not text.endswith(_UNFINISHED):
            sys.stdout.write(text[self._written :])
            sys.stdout.flush()
            self._written = len(text)


def _summary(words: Tokenizer, found: Generation, stop: tuple[int, ...]) -> dict[str, object]:
    return {
        "text": words.decode([token for token in found.ids if token not in stop]),
        "ids": found.ids,
        "stopped": bool(found.ids) and found.ids[-1] in stop,
        "prompt_tokens": found.prompt_tokens,
        "prefill_tokens_per_second": round(found.prefill_rate, 2),
        "decode_tokens_per_second": round(found.decode_rate, 2),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _rates(found: Generation) -> str:
    return (
        f"prompt {found.prompt_tokens} tokens, {found.prefill_rate:.1f} tokens/s; "
        f"generated {len(found.ids)} tokens, {found.decode_rate:.1f} tokens/s"
    )


run_app = application(
    _run,
    """
qnpu-run chat "The capital of France is"
qnpu-run chat "Once upon a time" --tokens 200 --json
""",
)
