"""Generation with a key/value cache: greedy, sampled with temperature, top-k and top-p, or by beams (`beam_search.py`).

Top-p is nucleus sampling (Holtzman et al. 2019, arXiv:1904.09751): the fewest tokens whose probabilities reach p.
Prompts of different lengths are padded on the left, so that all rows go on at the same column. An encoder-decoder reads
the prompt, and what it writes begins with its start token. A prompt of which several texts are wanted is read once, and
texts that have ended leave the batch, together with others (`LEAVE`).
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...kernels.lora.dora import cached_factors
from ..adapters.switch import adapters_of_rows
from ..data.text import completion_text
from ..finite import not_finite
from ..parallel.ranks import any_of
from ..parallel.sharding import is_sharded
from ..runtime import in_eval_mode
from .beam_search import beam_search
from .decoding import Decoding, require_finite
from .packing import pack, using
from .repetition import Repetition

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_NEW_TOKENS = 2**20  # more is a slip, and would fill the memory
MAX_BEAMS = 1000
LEAVE = 0.25  # the share of a batch that has ended, from which on it leaves: what stays is copied then
CONTEXT = 8  # tokens that those which can hold a stop string are decoded behind: at a start they would be other texts


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, T) of prompts filled up on the left."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return ids, mask


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    *,
    eos_id: int | Sequence[int] | None = None,
    pad_id: int | None = None,
    stop: Sequence[str] = (),
    tokenizer: "Tokenizer | None" = None,
    samples: int = 1,
    beams: int = 1,
    length_penalty: float = 1.0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
) -> Tensor:
    """Continue `input_ids` (B, T), left-padded where `attention_mask` (B, T) is 0; (B, T + n), n ≤ max_new_tokens.

    What an encoder-decoder gives is (B, 1 + n): its start token and the new ones. With `samples` there are so many rows
    for each of B, one behind the other.

    temperature: divides the logits; 0 is greedy.
    top_k: above 0, only the k likeliest tokens are drawn from.
    top_p: below 1, only the likeliest tokens that together have probability p.
    seed: the same one gives the same tokens.
    eos_id: the token that ends a row, or several of them.
    pad_id: what follows the end; by default the first `eos_id`, else 0.
    stop: strings that end a row once its new text (decoded by `tokenizer`) contains one of them, or its tokens one that
        is a special token.
    beams: where several, they look for the likeliest text instead of drawing one.
    length_penalty: weighs the length of the beams' texts, as `beam_search.py` says.
    repetition_penalty: above 1, tokens that occur already are less likely, as `repetition.py` says.
    no_repeat_ngram: above 0, no sequence of so many tokens is written a second time.

    Raises ValueError for settings out of range, for a model of another task than causal-lm and seq2seq-lm, and where
    prompt and new tokens exceed the model's positions; FloatingPointError where what is sampled from isn't finite.
    """
    check_settings(model, max_new_tokens, temperature, top_k, top_p)
    check_prompt(model, input_ids, max_new_tokens)
    repetition = Repetition(repetition_penalty, no_repeat_ngram)
    if stop and tokenizer is None:
        raise ValueError("stop strings need the tokenizer: pass tokenizer=")
    if samples < 1 or (samples > 1 and beams > 1):
        raise ValueError(f"samples = {samples}: expected at least 1, and 1 where beams look for the likeliest text")
    if beams > MAX_BEAMS:
        raise ValueError(f"beams = {beams:,}: expected at most {MAX_BEAMS:,}")
    if beams < 1 or (beams > 1 and (temperature != 0 or stop)):
        raise ValueError(f"beams = {beams} look for the likeliest text: set temperature = 0, and no stop strings")

    ends = [eos_id] if isinstance(eos_id, int) else list(eos_id or ())
    pad = pad_id if pad_id is not None else next(iter(ends), 0)
    stop_strings = () if tokenizer is None else stop_texts(tokenizer, stop, ends)

    n_rows = len(input_ids) * samples * beams
    packed = using(pack(model, n_rows, max_new_tokens))
    with in_eval_mode(model), cached_factors(), packed, adapters_of_rows(model) as adapters:
        decoding = Decoding(model, input_ids, attention_mask, max_new_tokens, adapters, beams=beams > 1)
        try:
            if beams > 1:
                return beam_search(decoding, beams, max_new_tokens, ends, pad, length_penalty, repetition)

            before = decoding.tokens.repeat_interleave(samples, 0)  # (B · samples, T)
            sampler = Sampler(len(before), temperature, top_k, top_p, seed, before.device)
            new = token_by_token(
                decoding, sampler, repetition, max_new_tokens, ends, pad, stop_strings, tokenizer, samples
            )
            return torch.cat((before, torch.stack(list(new), 1)), 1)
        except FloatingPointError:
            raise not_finite(model, "the model's logits") from None


def check_settings(model: Any, max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    """ValueError for settings out of range, and for a model that doesn't generate."""
    if model.task not in ("causal-lm", "seq2seq-lm"):
        raise ValueError(
            f'the model\'s task is {model.task}; to generate, load it with task="causal-lm", or "seq2seq-lm"'
        )
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ValueError(
            f"expected temperature ≥ 0, top_k ≥ 0, 0 < top_p ≤ 1 and max_new_tokens ≥ 1; got {temperature}, {top_k}, "
            f"{top_p}, {max_new_tokens}"
        )
    if max_new_tokens > MAX_NEW_TOKENS:
        raise ValueError(f"max_new_tokens = {max_new_tokens:,}: expected at most {MAX_NEW_TOKENS:,}")


def check_prompt(model: Any, input_ids: Tensor, max_new_tokens: int) -> None:
    """ValueError for prompts that are none, or that with what follows exceed the model's positions."""
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids: expected (B, T) with at least one token, got {tuple(input_ids.shape)}")

    # The last new token needs no position: it is not read again.
    limit = model.config.max_positions
    if limit is not None and input_ids.shape[1] + max_new_tokens - 1 > limit:
        raise ValueError(
            f"prompt of {input_ids.shape[1]} tokens and {max_new_tokens} new ones exceed the model's {limit} positions;"
            " shorten one of them"
        )


def continuations(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, **settings: Any
) -> list[list[int]]:
    """The tokens that `generate` adds to each prompt; those behind an end are padding. `settings` are its own."""
    device = next(model.parameters()).device
    input_ids, mask = left_padded(prompts)  # (B, T)
    tokens = generate(model, input_ids.to(device), mask.to(device), max_new_tokens, **settings)

    # What an encoder-decoder writes is a text of its own, behind a start token.
    start = 1 if model.task == "seq2seq-lm" else input_ids.shape[1]
    added: list[list[int]] = tokens[:, start:].tolist()
    return added


def stop_texts(tokenizer: "Tokenizer", stop: Sequence[str], ends: list[int]) -> list[str]:
    """The stop strings that are texts; one that is a special token is added to the end tokens `ends`.

    Raises ValueError for an empty one, and for one that holds a special token among others, which no decoded text does.
    """
    special = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    if "" in stop:
        raise ValueError("stop is an empty text, which every text begins with; give another, or none")
    texts = []
    for string in stop:
        # Decoding leaves special tokens out, so that only their ids can be looked for.
        if string in special:
            ends.append(special[string])
        elif any(token in string for token in special):
            raise ValueError(f"stop {string!r} holds a special token and more; give the special token alone")
        else:
            texts.append(string)
    return texts


def token_by_token(
    decoding: Decoding,
    sampler: "Sampler",
    repetition: Repetition,
    max_new_tokens: int,
    ends: Sequence[int],
    pad: int,
    stop: Sequence[str] = (),
    tokenizer: "Tokenizer | None" = None,
    samples: int = 1,
) -> Iterator[Tensor]:
    """Let each text grow by the one token chosen, until all have ended; gives the new tokens (B,) step by step.

    Here B counts the `samples` of each prompt, and A the texts that are computed still.
    """
    T = decoding.tokens.shape[1]
    device = decoding.tokens.device
    in_shards = is_sharded(decoding.model)
    reach = max((len(string.encode()) for string in stop), default=0)  # tokens that a stop string can be in

    # The prompts are computed once, and their logits and cache copied for the samples of each.
    logits = decoding.logits()
    if samples > 1:
        prompt = torch.arange(len(logits), device=device).repeat_interleave(samples)  # (B,)
        decoding.take(prompt)
        logits = logits[prompt]  # (B, V)
    B = len(logits)
    active = torch.arange(B, device=device)  # (A,)
    done = torch.zeros(B, dtype=torch.bool, device=device)  # (A,)

    for i in range(max_new_tokens):
        if i > 0:
            logits = decoding.logits()  # (A, V)
        scores = repetition.adjust(logits, decoding.tokens, decoding.token_mask)
        chosen = sampler.choose(scores, active).masked_fill_(done, pad)  # (A,)
        decoding.extend(chosen)
        yield chosen if len(active) == B else chosen.new_full((B,), pad).index_copy_(0, active, chosen)

        # A stop string can begin in an earlier token: the end of each text is decoded anew.
        for end in ends:
            done |= chosen == end
        if tokenizer is not None and stop:
            start = max(T, decoding.tokens.shape[1] - reach)
            contexts = decoding.tokens[:, max(0, start - CONTEXT) : start].tolist()
            texts = [
                completion_text(tokenizer, context, new)
                for context, new in zip(contexts, decoding.tokens[:, start:].tolist(), strict=True)
            ]
            done |= torch.tensor([any(string in text for string in stop) for text in texts], device=device)

        # Reading `done` makes the host wait for the GPU, and is of no use after the last token.
        if (ends or stop) and i + 1 < max_new_tokens:
            n_done = int(done.sum())
            goes_on = n_done < len(done)
            # Processes that share a model in shards compute as long as one of them needs it.
            if not (any_of(goes_on) if in_shards else goes_on):
                break
            if LEAVE * len(done) <= n_done < len(done):
                open_rows = (~done).nonzero()[:, 0]
                decoding.take(open_rows)
                active = active[open_rows]
                done = done[open_rows]


class Sampler:
    """Chooses the next tokens of texts: the likeliest, or drawn.

    Each of `n_texts` draws by numbers of its own, whichever of the others are still computed beside it.
    """

    def __init__(self, n_texts: int, temperature: float, top_k: int, top_p: float, seed: int, device: torch.device):
        self.n_texts = n_texts
        self.settings = (temperature, top_k, top_p)
        self.generator = torch.Generator(device).manual_seed(seed)

    def choose(self, logits: Tensor, texts: Tensor) -> Tensor:
        """The next token (A,) of each of these texts (A,) from their logits (A, V)."""
        if self.settings[0] == 0:
            best = logits.max(-1)
            require_finite(best.values)  # NaN is the largest of all, too
            return best.indices

        # One uniform number a row: torch.multinomial draws one for each token of the vocabulary, 30 times as slow on a
        # CPU.
        mass = probabilities(logits, *self.settings).cumsum(-1, dtype=torch.float64)  # (A, V)
        total = mass[:, -1:]  # (A, 1)
        require_finite(total)
        uniform = torch.rand((self.n_texts, 1), generator=self.generator, device=mass.device, dtype=mass.dtype)
        drawn = uniform[texts] * total
        return torch.searchsorted(mass, drawn, right=True)[:, 0]  # never one without probability: it doesn't add any


def probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The distribution sampled from, (B, V): logits over temperature, cut to the top k, then to the top p."""
    logits = logits / temperature
    # The k-th likeliest logit and those that equal it stay.
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, float("-inf"))

    # A token stays if those that are likelier do not yet reach p.
    if top_p < 1:
        ordered, order = logits.sort(descending=True)  # (B, V)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p
        beyond = torch.zeros_like(beyond).scatter(1, order, beyond)  # (B, V), back in the vocabulary's order
        logits = logits.masked_fill(beyond, float("-inf"))
    return logits.softmax(-1)
