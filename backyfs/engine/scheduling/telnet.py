"""What a telnet client sends, turned into lines. Pure: bytes in, lines and an answer out.

The client keeps its default, line by line: it echoes and edits, and sends a line when it is
complete. Offers of options are declined, each once per request, as RFC 854 asks. Backspace, Ctrl-U
and Ctrl-W work for clients that send every key (nc, a raw terminal). A line ends with CR LF, CR NUL
or LF alone.
"""

from __future__ import annotations

LINE_MAX = 1024
"""Bytes of a line; the rest of a longer one is dropped."""

IAC = 255
DONT, DO, WONT, WILL = 254, 253, 252, 251
SB, EL, EC, AYT, IP, SE = 250, 248, 247, 246, 244, 240
_REFUSAL = {DO: WONT, WILL: DONT}

_CTRL_C, _CTRL_D, _BS, _CTRL_U, _CTRL_W, _DEL = 3, 4, 8, 21, 23, 127


class Lines:
    """One connection's input. `ended`: the client said that no more will come (Ctrl-D)."""

    def __init__(self) -> None:
        self.ended = False
        self._line = bytearray()
        self._state = self._data
        self._verb = 0
        self._answer = bytearray()
        self._lines: list[str] = []
        self._after_cr = False

    def feed(self, data: bytes) -> tuple[list[str], bytes]:
        """The lines that are complete now, and what is to be sent back."""
        self._answer.clear()
        self._lines = []
        for byte in data:
            self._state(byte)
        return self._lines, bytes(self._answer)

    def _data(self, byte: int) -> None:
        after_cr, self._after_cr = self._after_cr, byte == 13
        if byte == IAC:
            self._state = self._command
        elif byte in (10, 0) and after_cr:
            pass  # the second half of a line's end
        elif byte in (10, 13):
            self._complete()
        elif byte in (_BS, _DEL):
            self._erase()
        elif byte == _CTRL_W:
            self._erase_word()
        elif byte in (_CTRL_U, _CTRL_C):
            self._line.clear()
        elif byte == _CTRL_D:
            self.ended = self.ended or not self._line
        elif byte >= 32 and len(self._line) < LINE_MAX:
            self._line.append(byte)

    def _command(self, byte: int) -> None:
        self._state = self._data
        if byte in (DO, DONT, WILL, WONT):
            self._verb, self._state = byte, self._option
        elif byte == SB:
            self._state = self._subnegotiation
        elif byte == EC:
            self._erase()
        elif byte in (EL, IP):
            self._line.clear()
        elif byte == AYT:
            self._answer += b"\r\n[yes]\r\n"

    def _option(self, byte: int) -> None:
        self._state = self._data
        if self._verb in _REFUSAL:
            self._answer += bytes((IAC, _REFUSAL[self._verb], byte))

    def _subnegotiation(self, byte: int) -> None:
        if byte == IAC:
            self._state = self._subnegotiation_command

    def _subnegotiation_command(self, byte: int) -> None:
        self._state = self._data if byte == SE else self._subnegotiation

    def _complete(self) -> None:
        self._lines.append(self._line.decode("utf-8", "replace").strip())
        self._line.clear()

    def _erase(self) -> None:
        """Take away the last character, all bytes of it."""
        while self._line and self._line.pop() & 0xC0 == 0x80:
            pass

    def _erase_word(self) -> None:
        text = self._line.rstrip()
        self._line = text[: text.rfind(b" ") + 1]
