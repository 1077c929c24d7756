"""The tokenizer and special tokens in the metadata of a GGUF file (`tokenizer.ggml.*`, `tokenizer.chat_template`).

    gpt2     GPT-2's byte-level pair encoding with its merges; `pre` names how a text is cut before
    llama    sentencepiece's pair encoding of Llama 2 and Mistral: spaces as "▁", unknown characters as bytes, and
             scores in the place of merges: whatever pair makes the token of the highest score is merged next

Each token has a type: what a control token's text looks like in a text is that token, and a user-defined one is whole
wherever it stands. Unused ones behind all others only fill the embedding up, and are left out.

How texts are cut: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp, and each family's published
tokenizer.json, which puts Qwen's texts into Unicode's composed form (NFC) first.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._outside import located, others_code
from ..._shapes import shown, with_fields
from .special_tokens import SpecialTokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6  # the types of tokens
NAMES = {  # of special tokens, as tokenizer_config.json has them
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of a text, a turn, a message
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_WORDS}|\p{{N}}|{_REST}"  # each digit is a piece
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"  # three of them are one
# The pieces into which a text is cut, by the name of `pre`; those of GPT-2 are known to the library.
SPLITS: dict[str, str | None] = {
    "gpt-2": None,
    "smollm": None,  # with each digit a piece, too
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def read_vocabulary(metadata: dict[str, Any], path: Path) -> tuple["Tokenizer", SpecialTokens]:
    """The tokenizer, and which tokens begin, end and pad a text. ValueError where it is damaged or not implemented."""
    fields = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    where = f"{path}: {PREFIX.removesuffix('.')}"
    numbers = dict.fromkeys([*NAMES.values(), *ENDS], int | None)
    switches = dict.fromkeys(("add_bos_token", "add_eos_token", "add_space_prefix"), bool | None)
    with_fields(fields, where, model=str, tokens=list, token_type=list, pre=str | None, **numbers, **switches)
    with_fields(metadata, path, **{TEMPLATE: str | None})
    tokens = fields["tokens"]
    if not tokens or not all(isinstance(token, str) for token in tokens) or len(fields["token_type"]) != len(tokens):
        raise ValueError(f"{where}.tokens: expected texts, and a token_type for each; restore the file")
    for name in numbers:
        if name in fields and not 0 <= fields[name] < len(tokens):
            raise ValueError(f"{where}.{name} = {fields[name]}: there are {len(tokens)} tokens; restore the file")

    with located(where):
        if fields["model"] not in BUILDERS:
            raise ValueError(f"model = {shown(fields['model'])} is not implemented; known: {', '.join(BUILDERS)}")
        tokenizer = BUILDERS[fields["model"]](fields, _ids(fields))
        _add_special_tokens(tokenizer, fields)
    return tokenizer, _special_tokens(fields, metadata.get(TEMPLATE))


def _ids(fields: dict[str, Any]) -> dict[str, int]:
    """The ids of the tokens, without unused ones at the end that have no part of their own, such as padding."""
    tokens = fields["tokens"]
    special = {fields.get(name) for name in (*NAMES.values(), *ENDS)}
    n = len(tokens)
    while n and fields["token_type"][n - 1] == UNUSED and n - 1 not in special:
        n -= 1
    ids = {token: i for i, token in enumerate(tokens[:n])}
    if len(ids) < n:
        twice = next(token for i, token in enumerate(tokens[:n]) if ids[token] != i)
        raise ValueError(f"tokens: {shown(twice)} is there twice; convert the model anew")
    return ids


def _byte_level(fields: dict[str, Any], ids: dict[str, int]) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    with_fields(fields, "gpt2", pre=str, merges=list)
    pre = fields["pre"]
    if pre not in SPLITS:
        raise ValueError(f"pre = {shown(pre)} is not implemented; known: {', '.join(SPLITS)}")
    if not all(isinstance(merge, str) and merge.count(" ") == 1 for merge in fields["merges"]):
        raise ValueError("merges: expected pairs of tokens with a space between them; restore the file")

    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    is_llama3 = SPLITS[pre] == _LLAMA3  # there a whole piece that is a token needs no merges
    with others_code(lambda error: ValueError(f"merges: {error}; restore the file")):
        tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=is_llama3))

    split = SPLITS[pre]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    before: list[Any] = []
    if split is not None:
        before = [pre_tokenizers.Split(Regex(split), behavior="isolated")]
    elif pre == "smollm":
        before = [pre_tokenizers.Digits(individual_digits=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level])
    if split == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), *_framing(fields, add_bos=is_llama3)]
    )
    return tokenizer


def _sentence_piece(fields: dict[str, Any], ids: dict[str, int]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    with_fields(fields, "llama", scores=list, unknown_token_id=int)
    scores = fields["scores"]
    if len(scores) != len(fields["tokens"]) or not all(type(score) is float for score in scores):
        raise ValueError("scores: expected a number for each of the tokens; restore the file")

    # Of the pairs that make the same token, the one with the longest beginning goes first, as in published ones.
    merges = []
    for token, token_id in ids.items():
        if fields["token_type"][token_id] != NORMAL:
            continue
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        merges += [(-scores[token_id], -len(left), left, right) for left, right in known]
    merges.sort()

    unknown = fields["tokens"][fields["unknown_token_id"]]
    tokenizer = Tokenizer(
        models.BPE(ids, [merge[2:] for merge in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    back: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(back)
    if framing := _framing(fields, add_bos=True):
        tokenizer.post_processor = processors.Sequence(framing)
    return tokenizer


BUILDERS = {"gpt2": _byte_level, "llama": _sentence_piece}


def _framing(fields: dict[str, Any], add_bos: bool) -> list[Any]:
    """What puts tokens around a text, if any are put there; `add_bos`: whether one begins it where that isn't said."""
    from tokenizers import processors

    def framed(switch: str, default: bool, name: str) -> list[str]:
        if not fields.get(switch, default):
            return []
        if name not in fields:
            raise ValueError(f"{switch} is set, but {name} is missing; restore the file")
        return [fields["tokens"][fields[name]]]

    bos = framed("add_bos_token", add_bos, "bos_token_id")
    eos = framed("add_eos_token", False, "eos_token_id")
    if not bos and not eos:
        return []
    return [
        processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            pair=[*bos, "$A", *eos, *(f"{token}:1" for token in bos), "$B:1", *(f"{token}:1" for token in eos)],
            special_tokens=[(token, fields["tokens"].index(token)) for token in {*bos, *eos}],
        )
    ]


def _add_special_tokens(tokenizer: "Tokenizer", fields: dict[str, Any]) -> None:
    """Make the control and user-defined tokens whole wherever their text stands."""
    from tokenizers import AddedToken

    named = {fields[name] for name in NAMES.values() if name in fields}
    added_tokens = []
    for token_id, (token, token_type) in enumerate(zip(fields["tokens"], fields["token_type"], strict=True)):
        if token_type in (CONTROL, USER_DEFINED) or token_id in named:
            added_tokens.append(AddedToken(token, special=token_type != USER_DEFINED, normalized=False))
    tokenizer.add_tokens(added_tokens)


def _special_tokens(fields: dict[str, Any], chat_template: str | None) -> SpecialTokens:
    names = {name: fields["tokens"][fields[key]] for name, key in NAMES.items() if key in fields}
    ends = dict.fromkeys(fields[name] for name in ENDS if name in fields)
    return SpecialTokens(
        bos_id=fields.get("bos_token_id"),
        ends=tuple(ends),
        pad_id=fields.get("padding_token_id"),
        chat_template=chat_template,
        # The class by which transformers takes the tokenizer.json as it is.
        settings={"tokenizer_class": "PreTrainedTokenizerFast", **names},
        names=names,
        config_pad_id=fields.get("padding_token_id"),
    )
