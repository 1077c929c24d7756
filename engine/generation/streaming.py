"""A text as it is written, piece by piece, for people who watch.

A piece is shown as soon as nothing can change it any more: a character of several tokens once all its bytes are there,
and what may be the beginning of a stop string once it is known not to be one. The pieces together are the text that
`completions` gives.

A prompt that goes on where the last text ended, as a conversation's does, is not computed again: see `Streamer`.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...kernels.lora.dora import cached_factors
from ..data.text import completion_text
from ..finite import not_finite
from ..runtime import in_eval_mode
from .decoding import Decoding
from .packing import MIN_STEPS, Packed, pack, using
from .repetition import Repetition
from .sampling import CONTEXT, Sampler, check_prompt, check_settings, stop_texts, token_by_token

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNFINISHED = "\ufffd"  # what a decoder writes for the bytes of a character that is not there as a whole


class Streamer:
    """One text after another by a causal model; the settings are those of `generate`, which says what they are.

    Keys and values stay from text to text, for the tokens that a prompt has in common with the text before, and so do
    packed weights. Both belong to the model's weights: `forget` them where an adapter is switched. `n_kept` tells of
    how many tokens of the last prompt they were there, `ended` whether the last text ended by itself, and not because
    it was as long as allowed.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: "Tokenizer",
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        repetition_penalty: float = 1.0,
        no_repeat_ngram: int = 0,
    ):
        check_settings(model, 1, temperature, top_k, top_p)
        self.model = model
        self.tokenizer = tokenizer
        self.n_kept = 0
        self.ended = False
        self._choice = (temperature, top_k, top_p)
        self._repetition = Repetition(repetition_penalty, no_repeat_ngram)
        self._stop_ids: list[int] = []  # of stop strings that are special tokens
        self._stop = stop_texts(tokenizer, stop, self._stop_ids)
        self._decoding: Decoding | None = None
        self._packed: Packed | None = None  # made for the first text, which need not be long

    def forget(self) -> None:
        """Compute the next prompt from its beginning, and by the weights as they are then."""
        self._decoding = None
        self._packed = None

    @torch.no_grad()
    def pieces(self, prompt: Sequence[int], max_new_tokens: int, seed: int = 0) -> Iterator[str]:
        """What the model writes behind the tokens of `prompt`, up to its first end token or stop string.

        A caller that has enough may stop at any piece, and go on with another prompt. Raises what `generate` raises,
        with the first piece.
        """
        device = next(self.model.parameters()).device
        input_ids = torch.tensor([prompt], dtype=torch.long, device=device)  # (1, T)
        check_prompt(self.model, input_ids, max_new_tokens)

        pieces = Pieces(self.tokenizer, prompt, self._stop)
        ends = [*self.model.tokens.ends, *self._stop_ids]
        sampler = Sampler(1, *self._choice, seed, device)
        self.ended = False
        if self._packed is None:
            self._packed = pack(self.model, rows=1, steps=MIN_STEPS)
        with in_eval_mode(self.model), cached_factors(), using(self._packed):
            decoding = self._begin(input_ids, max_new_tokens)
            try:
                for token in token_by_token(decoding, sampler, self._repetition, max_new_tokens, ends, pad=0):
                    number = int(token)
                    if number in ends:
                        self.ended = True
                        break
                    if piece := pieces.add(number):
                        yield piece
                    if pieces.stopped:
                        self.ended = True
                        break
            except FloatingPointError:
                raise not_finite(self.model, "the model's logits") from None
        if piece := pieces.remainder():
            yield piece

    def _begin(self, input_ids: torch.Tensor, max_new_tokens: int) -> Decoding:
        if self._decoding is None:
            self._decoding = Decoding(self.model, input_ids, None, max_new_tokens)
        else:
            self._decoding.restart(input_ids, max_new_tokens)
        self.n_kept = self._decoding.n_cached
        return self._decoding


class Pieces:
    """The text of tokens that come one by one, in pieces that nothing changes any more.

    `prompt` are the tokens in front of them, `stop` the strings that end the text. `stopped` tells whether one has.
    """

    def __init__(self, tokenizer: "Tokenizer", prompt: Sequence[int], stop: Sequence[str]):
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids = list(prompt)
        self._n_decoded = len(prompt)  # tokens whose text is there as a whole
        self._seams = [0, len(prompt)]  # numbers of tokens behind which no character is cut in two
        self._text = ""  # decoded, and not shown yet

    def add(self, token: int) -> str:
        """What can be shown now that there is one more token; may be empty."""
        self._ids.append(token)
        if self._decode(wait=True):
            return self._show(wait=True)
        return ""

    def remainder(self) -> str:
        """What remains to be shown where no token follows."""
        self._decode(wait=False)
        return self._show(wait=False)

    def _decode(self, wait: bool) -> bool:
        """Take in the text of the tokens that are not decoded yet; with `wait`, not in the middle of a character."""
        # Some decoders reject a whole run of bytes for one that makes no character: the context begins with one.
        start = next(seam for seam in reversed(self._seams) if seam == 0 or seam <= self._n_decoded - CONTEXT)
        context = self._ids[start : self._n_decoded]
        text = completion_text(self._tokenizer, context, self._ids[self._n_decoded :])
        if wait and text.endswith(UNFINISHED):
            return False
        self._text += text
        self._n_decoded = len(self._ids)
        self._seams.append(self._n_decoded)
        return True

    def _show(self, wait: bool) -> str:
        """Take out what is before a stop string, and, with `wait`, before what may become one."""
        if self.stopped:
            return ""
        cuts = [at for string in self._stop if (at := self._text.find(string)) >= 0]
        if cuts:
            self.stopped = True
            shown = min(cuts)
        elif wait:
            shown = len(self._text) - max(map(self._begun, self._stop), default=0)
        else:
            shown = len(self._text)
        piece = self._text[:shown]
        self._text = self._text[shown:]
        return piece

    def _begun(self, string: str) -> int:
        """How many characters at the end of the text are the beginning of a stop string."""
        longest = min(len(string) - 1, len(self._text))
        return next((n for n in range(longest, 0, -1) if self._text.endswith(string[:n])), 0)
