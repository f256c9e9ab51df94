"""Text from tokens as they come, and printed so: the first prompt's at once, each other's after those before it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from dsv3rt.infer.generate import Generation

Decode = Callable[[Sequence[int]], str]

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns tokens into text in pieces that together are the text of all of them.

    A character whose bytes are spread over tokens waits until it is whole. decode: of a tokenizer; what it makes of
    tokens that end with a whole character must be how it begins what it makes of more.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._tokens: list[int] = []  # the last that were shown, as what comes next may depend on them, and what waits
        self._shown = ""

    def add(self, tokens: Sequence[int]) -> str:
        """What can be shown now."""
        self._tokens += tokens
        text = self._decode(self._tokens)
        if text.endswith(_UNFINISHED):
            return ""
        return self._show(text, kept=list(tokens))

    def finish(self) -> str:
        """The rest, finished or not."""
        return self._show(self._decode(self._tokens), kept=[])

    def _show(self, text: str, kept: list[int]) -> str:
        new = text[len(self._shown) :]
        self._tokens, self._shown = kept, self._decode(kept)
        return new


class _Page:
    """What has been printed, and what waits behind a prompt that is not done."""

    def __init__(self, prompts: Sequence[str], decode: Decode) -> None:
        self._streams = [TextStream(decode) for _ in prompts]
        self._waiting = list(prompts)
        self._is_done = [False] * len(prompts)
        self._first = 0  # the prompt whose text is printed now

    def add(self, row: int, tokens: Sequence[int], *, is_last: bool) -> None:
        self._waiting[row] += self._streams[row].add(tokens)
        if is_last and not self._is_done[row]:
            self._waiting[row] += self._streams[row].finish() + "\n"
            self._is_done[row] = True

    def print(self) -> None:
        while self._first < len(self._waiting):
            print(self._waiting[self._first], end="", flush=True)
            self._waiting[self._first] = ""
            if not self._is_done[self._first]:
                return
            self._first += 1


def print_text(generation: Generation, prompts: Sequence[str], decode: Decode) -> str:
    """Print prompts and what follows them; returns a line about speed and drafts."""
    page = _Page(prompts, decode)
    page.print()
    start, num_tokens = time.perf_counter(), 0
    for new in generation:
        for row, tokens in new:
            num_tokens += len(tokens)
            text = tokens[:-1] if tokens[-1] == generation.options.eos else tokens
            page.add(row, text, is_last=generation.has_ended(row))
        page.print()
    seconds = time.perf_counter() - start
    for row in range(len(prompts)):  # those that may have no new tokens
        page.add(row, [], is_last=True)
    page.print()
    summary = f"{num_tokens:,} tokens in {seconds:.2f} s"
    if num_tokens > 0:
        summary += f", {num_tokens / seconds:,.1f} a second"
    if generation.num_drafted > 0:
        summary += f"; {generation.acceptance:.0%} of {generation.num_drafted:,} drafts stood"
    return summary
