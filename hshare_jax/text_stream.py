"""Text from token ids, a few at a time: whole characters only, and nothing that may begin a stop string."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TextStream:
    """The text of one row. `push` tokens as they come and show `text`; `finish` releases what was held back."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", stop: Sequence[str] = ()) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._new_stream = tokenizer.backend_tokenizer, DecodeStream
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._pending = ""  # decoded text that may be the beginning of a stop string
        self._tail: list[int] = []  # tokens whose bytes are not a whole character yet
        self.text = ""
        self.is_stopped = False

    def push(self, token: int) -> None:
        """Takes the next token. Tokens after a stop string are ignored."""
        if self.is_stopped:
            return
        piece = self._decode(token)
        self._tail = [*self._tail, token] if piece is None else []
        self._pending += piece or ""
        ends = [end for end in (self._pending.find(stop) for stop in self._stop) if end >= 0]
        if ends:
            self.text += self._pending[: min(ends)]
            self._pending, self.is_stopped = "", True
            return
        held = max((_overlap(self._pending, stop) for stop in self._stop), default=0)
        released = len(self._pending) - held
        self.text += self._pending[:released]
        self._pending = self._pending[released:]

    def _decode(self, token: int) -> str | None:
        """The text that a token completes; None if it completes none."""
        try:
            return self._stream.step(self._tokenizer, token)
        except Exception as error:
            # The tokenizers library raises Exception itself, which only its text tells from a mistake; a mistake is
            # raised again.
            if type(error) is not Exception or "Invalid prefix" not in str(error):
                raise
        # One invalid byte can turn earlier, already shown bytes into U+FFFD. We keep what was shown and restart.
        self._stream = self._new_stream(ids=[token], skip_special_tokens=True)
        return self._tokenizer.decode([*self._tail, token], skip_special_tokens=True)

    def finish(self) -> str:
        """The whole text, once no more tokens come."""
        if not self.is_stopped:
            self.text += self._pending + self._tokenizer.decode(self._tail, skip_special_tokens=True)
            self._pending, self._tail = "", []
        return self.text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-size:])), 0)
