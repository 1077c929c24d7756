"""Adding tokens to a model: to its tokenizer, its embedding and its output matrix.

A new row is the mean of the rows that are there (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
Its logit is then the mean of the old logits, and by Jensen's inequality exp(mean z) ≤ mean exp(z): of the probability
it takes 1/(V + 1) at most, and what the model said before, it still says. A small random row, next to large ones that
point elsewhere, may get a logit above all others and take everything.

Many published matrices have more rows than their tokenizer has tokens (Qwen2.5: 151936 for 151665). New tokens take
those spare rows first, which were never trained; the matrices grow by what is left.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...kernels import Linear
from ...kernels.lora.factors import LinearPart
from ..layers.heads import MaskedLMHead

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def add_tokens(model: Any, tokenizer: "Tokenizer | None", tokens: Sequence[str]) -> list[int]:
    """Add special tokens to tokenizer and model, both in place; gives the ids of `tokens`, new or known before.

    Before an adapter is added and before training starts: an optimizer that holds the old matrices knows nothing of the
    new ones. `save` writes the larger model. Raises ValueError, with nothing changed, for what is no list of texts, for
    a model without a token embedding, and where its embedding or head is adapted or quantised.
    """
    if isinstance(tokens, str) or not all(isinstance(token, str) and token for token in tokens):
        raise ValueError(f"tokens {tokens!r}: expected a list of texts, none of them empty")
    if tokenizer is None:
        raise ValueError("there is no tokenizer to add tokens to; the checkpoint has no tokenizer.json")
    owners = _owners(model)
    before = max(tokenizer.get_vocab().values(), default=-1) + 1
    tokenizer.add_special_tokens(list(tokens))
    known = tokenizer.get_vocab()
    ids = [known[token] for token in tokens]
    new = sorted({number for number in ids if number >= before})
    if new:
        size = max(new[-1] + 1, model.config.vocab_size)
        _grow(model, owners, min(before, model.config.vocab_size), size, new)
        model.config = replace(model.config, vocab_size=size)
        _tell_settings(model, tokenizer, new)
    return ids


def resize(model: Any, size: int) -> None:
    """Bring the embedding and the output matrix to `size` rows, for one that has them all to be put in; in place.

    What is there stays, the mean of it fills up, and what is beyond goes. Raises ValueError as `add_tokens` does.
    """
    owners = _owners(model)
    known = min(size, model.config.vocab_size)
    _grow(model, owners, known, size, [])
    model.config = replace(model.config, vocab_size=size)


def _owners(model: Any) -> list[tuple[nn.Module, str]]:
    """The parameters with a row for each token, as (module, name), each once; or a ValueError."""
    embedding = dict(model.named_modules()).get("embed.tokens")
    if type(embedding) is not nn.Embedding:
        raise ValueError("embed.tokens is no plain embedding: add tokens before an adapter, and to a model of text")
    owners: list[tuple[nn.Module, str]] = [(embedding, "weight")]
    head = model.head
    if isinstance(head, Linear):
        if head.quantized is not None or len(head.lora):
            raise ValueError("head carries an adapter or is quantised: add tokens to the plain model first")
    elif not isinstance(head, MaskedLMHead):
        return owners
    if head.weight is not embedding.weight:
        owners.append((head, "weight"))
    return owners if head.bias is None else [*owners, (head, "bias")]


@torch.no_grad()
def _grow(model: Any, owners: list[tuple[nn.Module, str]], known: int, size: int, new: list[int]) -> None:
    """Bring each of `owners` to `size` rows; the `new` ones, and all that no token had, get the mean of the `known`."""
    for module, name in owners:
        old = module.get_parameter(name)
        rows = old.new_zeros((size, *old.shape[1:]))
        rows[: len(old)] = old[:size]
        rows[sorted({*new, *range(len(old), size)})] = _mean(old[:known])
        module.register_parameter(name, nn.Parameter(rows, old.requires_grad))
    model.embed.tokens.num_embeddings = size
    if isinstance(model.head, Linear):
        model.head.out_features, model.head.parts = size, (LinearPart("", 0, size),)
    model.tie()


def _mean(rows: Tensor) -> Tensor:
    """The mean row in at least fp32, brought to the rows' dtype: a sum in bf16 would stop growing."""
    return rows.mean(0, dtype=torch.promote_types(rows.dtype, torch.float32)).to(rows.dtype)


def _tell_settings(model: Any, tokenizer: "Tokenizer", new: list[int]) -> None:
    """Keep tokenizer_config.json in step: where it lists the added tokens, transformers believes it alone."""
    table = model.tokens.settings.get("added_tokens_decoder")
    if table is None:
        return
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    more = {str(number): {"content": tokenizer.id_to_token(number), **flags} for number in new}
    settings = {**model.tokens.settings, "added_tokens_decoder": {**table, **more}}
    model.tokens = replace(model.tokens, settings=settings)
