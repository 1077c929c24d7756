"""Adding tokens to a model: to its tokenizer, its embedding and its output matrix.

A new row is the mean of the existing rows (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html). Its
logit is then the mean of the old logits, and by Jensen's inequality exp(mean z) ≤ mean exp(z): the new token takes at
most 1/(V + 1) of the probability, V tokens before it, and the model predicts what it predicted before. A small random
row, next to large ones that point elsewhere, may get a logit above all others and take all of it.

Many published matrices have more rows than their tokenizer has tokens (Qwen2.5: 151936 for 151665). New tokens take
those spare rows first, which were never trained; only then do the matrices grow.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...kernels import Linear
from ...kernels.lora.factors import LinearPart
from ..layers.heads import MaskedLMHead

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def add_tokens(model: Any, tokenizer: "Tokenizer | None", tokens: Sequence[str]) -> list[int]:
    """Add special tokens to tokenizer and model, both in place; gives the ids of `tokens`, new or known before.

    Call it before an adapter is added and before training starts: an optimizer that holds the old matrices knows
    nothing of the new ones. `save` writes the larger model. Raises ValueError, with nothing changed, for what is no
    list of texts, for a model without a token embedding, and where its embedding or head is adapted or quantised.
    """
    if isinstance(tokens, str) or not all(isinstance(token, str) and token for token in tokens):
        raise ValueError(f"tokens {tokens!r}: expected a list of texts, none of them empty")
    if tokenizer is None:
        raise ValueError("there is no tokenizer to add tokens to; the checkpoint has no tokenizer.json")
    parameters = _token_parameters(model)  # first, as it may refuse the model

    first_free_id = max(tokenizer.get_vocab().values(), default=-1) + 1
    tokenizer.add_special_tokens(list(tokens))
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token] for token in tokens]
    new_ids = sorted({token_id for token_id in ids if token_id >= first_free_id})
    if new_ids:
        old_size = model.config.vocab_size
        new_size = max(new_ids[-1] + 1, old_size)
        _resize_rows(model, parameters, min(first_free_id, old_size), new_size, new_ids)
        _list_in_settings(model, tokenizer, new_ids)
    return ids


def resize(model: Any, size: int) -> None:
    """Bring the embedding and the output matrix to `size` rows in place, for a caller that will fill in all of them.

    Existing rows stay, further ones get their mean, and rows beyond `size` go. Raises ValueError as `add_tokens` does.
    """
    _resize_rows(model, _token_parameters(model), min(size, model.config.vocab_size), size, [])


def _token_parameters(model: Any) -> list[tuple[nn.Module, str]]:
    """The parameters with a row for each token, as (module, name), each once; or a ValueError."""
    embedding = dict(model.named_modules()).get("embed.tokens")
    if type(embedding) is not nn.Embedding:
        raise ValueError("embed.tokens is no plain embedding: add tokens before an adapter, and to a model of text")
    parameters: list[tuple[nn.Module, str]] = [(embedding, "weight")]
    head = model.head
    if isinstance(head, Linear):
        if head.quantized is not None or len(head.lora):
            raise ValueError("head carries an adapter or is quantised: add tokens to the plain model first")
    elif not isinstance(head, MaskedLMHead):
        return parameters  # the head of another task has no row for a token

    if head.weight is not embedding.weight:  # not tied
        parameters.append((head, "weight"))
    if head.bias is not None:
        parameters.append((head, "bias"))
    return parameters


@torch.no_grad()
def _resize_rows(
    model: Any, parameters: list[tuple[nn.Module, str]], n_known: int, size: int, new_ids: list[int]
) -> None:
    """Bring each parameter to `size` rows; new tokens, and rows beyond the old ones, get the mean of the known rows."""
    for module, name in parameters:
        old = module.get_parameter(name)  # (V, D), or a bias (V,)
        rows = old.new_zeros((size, *old.shape[1:]))
        rows[: len(old)] = old[:size]
        # The mean in at least fp32: a sum in bf16 would stop growing.
        mean = old[:n_known].mean(0, dtype=torch.promote_types(old.dtype, torch.float32))  # (D,), or of a bias ()
        rows[sorted({*new_ids, *range(len(old), size)})] = mean.to(old.dtype)
        module.register_parameter(name, nn.Parameter(rows, old.requires_grad))

    # Bring whatever else holds the number of tokens in step.
    model.embed.tokens.num_embeddings = size
    if isinstance(model.head, Linear):
        model.head.out_features = size
        model.head.parts = (LinearPart("", 0, size),)
    model.tie()
    model.config = replace(model.config, vocab_size=size)


def _list_in_settings(model: Any, tokenizer: "Tokenizer", new_ids: list[int]) -> None:
    """Keep tokenizer_config.json in step: where it lists the added tokens, transformers believes it alone."""
    table = model.tokens.settings.get("added_tokens_decoder")
    if table is None:
        return
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    entries = {str(token_id): {"content": tokenizer.id_to_token(token_id), **flags} for token_id in new_ids}
    settings = {**model.tokens.settings, "added_tokens_decoder": {**table, **entries}}
    model.tokens = replace(model.tokens, settings=settings)
