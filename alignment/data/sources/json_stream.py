"""The text of a JSON document, read value by value: never more in memory than one value and a piece of the text."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from alignment.data.rows.twins import without_twins

PIECE = 1 << 20
"""Bytes that are read at once, unless one value is longer."""

_NEAR_END = 16
"""Characters before the end of what is read in which a fault may be a value that goes on: the longest sign is
\\ud83d\\ude00."""

_SPACE = re.compile(r"[ \t\n\r]*")


class JSONStream:
    """Reads the values of a document one after another.

    Args:
        file: open for bytes, at the beginning of UTF-8 text.

    Raises:
        ValueError: by all methods, as `json` and the decoder raise it, with the place in the whole document.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder(object_pairs_hook=without_twins)
        self._text = ""
        self._at = 0
        self._ended = False
        self._bytes = 0
        self._lines = 0  # line breaks in the text that is let go, and characters after the last of them
        self._column = 0

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._read_on()

    def take(self, sign: str) -> None:
        """Go past a sign that has to be next."""
        if self.peek() != sign:
            raise self._placed(json.JSONDecodeError(f"Expecting '{sign}'", self._text, self._at))
        self._at += 1

    def value(self) -> Any:
        """The next value."""
        self.peek()
        while True:
            try:
                found, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                goes_on = error.pos >= len(self._text) - _NEAR_END or error.msg.startswith("Unterminated string")
                if self._ended or not goes_on:
                    raise self._placed(error) from None
            else:
                if end < len(self._text) - 2 or self._ended:  # 1 may be the beginning of 1e+9
                    self._at = end
                    return found
            self._read_on()

    def elements(self) -> Iterator[Any]:
        """The elements of the array that begins here."""
        self.take("[")
        if self.peek() != "]":
            yield self.value()
            while self.peek() == ",":
                self._at += 1
                yield self.value()
            if self.peek() != "]":
                raise self._placed(json.JSONDecodeError("Expecting ',' delimiter", self._text, self._at))
        self.take("]")

    def end(self) -> None:
        """Refuse anything after the values that were read."""
        if self.peek():
            raise self._placed(json.JSONDecodeError("Extra data", self._text, self._at))

    def _read_on(self) -> None:
        """Read another piece, as long as the rest of the last one, so that no value is tried often; let go what is
        read."""
        piece = self._file.read(max(PIECE, len(self._text) - self._at))
        pending = len(self._decoder.getstate()[0])
        try:
            more = self._decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            error.start += self._bytes - pending
            raise
        self._bytes += len(piece)
        self._ended = not piece
        self._lines, self._column = self._place(self._at)
        self._text = self._text[self._at :] + more
        self._at = 0

    def _place(self, position: int) -> tuple[int, int]:
        """Line and column of a position in the text at hand, both from 0."""
        lines = self._text.count("\n", 0, position)
        if lines:
            return self._lines + lines, position - self._text.rindex("\n", 0, position) - 1
        return self._lines, self._column + position

    def _placed(self, error: json.JSONDecodeError) -> json.JSONDecodeError:
        line, column = self._place(error.pos)
        error.lineno, error.colno = line + 1, column + 1
        return error
