"""Tokenizers for old checkpoints, which have no tokenizer.json: built from their vocabulary files.

    vocab.json, merges.txt   GPT-2's byte-level pair encoding (Radford et al. 2019): tokens of 256 printable characters
                             that stand for bytes, and the merges in the order in which they were learned
    vocab.txt                BERT's WordPiece (Schuster and Nakajima 2012; Devlin et al. 2018, arXiv:1810.04805): one
                             token a line, "##" where it goes on inside a word; the longest that fits is taken

How text is cleaned for BERT is in tokenizer_config.json: `do_lower_case` (true where it is missing, which is wrong for
a cased vocabulary without that file), `strip_accents` (where null, the same as `do_lower_case`) and
`tokenize_chinese_chars`. Special tokens are there too (`added_tokens_decoder`), or in two older files,
special_tokens_map.json and added_tokens.json.

Other tokenizers with files of these names cut text differently, so that the class has to be named or known by the
architecture. sentencepiece models (T5's spiece.model, XLNet's, Llama 2's tokenizer.model) are not read.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._files import json_if_there
from ..._outside import others_code
from ..._shapes import with_fields
from .token_names import CLASS_NAMES, NAMES, SETTINGS, TokenizerSettings, token_text

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

CONVERT = "write it once with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
# Settings that would cut text differently, and the values with which they don't.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "add_bos_token": (False, None),
    "add_eos_token": (False, None),
    "do_basic_tokenize": (True, None),
    "never_split": (None, []),
    "split_special_tokens": (False, None),
    "wordpieces_prefix": ("##", None),
}


def build_tokenizer(folder: Path, described: TokenizerSettings) -> "Tokenizer | None":
    """The tokenizer that the vocabulary files in `folder` describe, or None where there are none.

    Raises ValueError where they are damaged or of a kind that is not implemented.
    """
    if sentencepiece := sorted(folder.glob("*.model")):
        raise ValueError(
            f"{sentencepiece[0]}: a sentencepiece model is not read, and there is no tokenizer.json; {CONVERT}"
        )
    byte_level = [folder / name for name in ("vocab.json", "merges.txt")]
    word_piece = folder / "vocab.txt"
    has_byte_level = all(path.is_file() for path in byte_level)
    has_word_piece = word_piece.is_file()
    if not has_byte_level and not has_word_piece:
        return None

    settings = described.merged
    class_name = described.class_name
    for field, accepted in NEUTRAL_VALUES.items():
        if (value := settings.get(field)) not in accepted:
            raise ValueError(f"{folder / SETTINGS}: {field} = {value!r} is not implemented; {CONVERT}")

    # The files alone don't tell how the text is cut; the class does.
    if class_name == "BertTokenizer" and has_word_piece:
        tokenizer = _word_piece(word_piece, settings)
    elif class_name == "GPT2Tokenizer" and has_byte_level:
        tokenizer = _byte_level(byte_level, settings)
    else:
        path = word_piece if has_word_piece else byte_level[0]
        raise ValueError(
            f"{path}: of a {class_name}, which is not built from such files, without tokenizer.json; {CONVERT}"
        )

    settings = {**CLASS_NAMES[class_name], **settings}
    _add_special_tokens(tokenizer, folder, settings)
    if class_name == "BertTokenizer":
        _frame_texts(tokenizer, folder, settings)
    return tokenizer


def _byte_level(paths: list[Path], settings: dict[str, Any]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    with others_code(lambda error: ValueError(f"{paths[0]}, {paths[1].name}: damaged ({error}); restore them")):
        vocabulary, merges = models.BPE.read_file(*map(str, paths))
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    add_prefix_space = bool(settings.get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _word_piece(path: Path, settings: dict[str, Any]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    with others_code(lambda error: ValueError(f"{path}: damaged ({error}); restore the file")):
        vocabulary = models.WordPiece.read_file(str(path))
    unknown = token_text(settings.get("unk_token") or CLASS_NAMES["BertTokenizer"]["unk_token"])
    if unknown not in vocabulary:
        raise ValueError(f"{path}: the unknown token {unknown!r} is not in it; restore the file")

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
        strip_accents=settings.get("strip_accents"),
        lowercase=bool(settings.get("do_lower_case", True)),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _frame_texts(tokenizer: "Tokenizer", folder: Path, settings: dict[str, Any]) -> None:
    """[CLS] text [SEP], or [CLS] text [SEP] text [SEP] with segment ids 0 and 1. ValueError where one is null."""
    from tokenizers import processors

    for name in ("cls_token", "sep_token"):
        if not settings[name]:
            raise ValueError(f"{folder / SETTINGS}: {name} = {settings[name]!r}: a text needs it; name one")
    cls = token_text(settings["cls_token"])
    sep = token_text(settings["sep_token"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[cls, "$A", sep],
        pair=[cls, "$A", sep, "$B:1", f"{sep}:1"],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )


def _add_special_tokens(tokenizer: "Tokenizer", folder: Path, settings: dict[str, Any]) -> None:
    """Tokens beyond the vocabulary by their ids, then the special ones; ValueError where an id isn't the next free."""
    for listed_id, token in _added_tokens(folder, settings):
        tokenizer.add_tokens([token])
        token_id = tokenizer.token_to_id(token.content)
        if token_id != listed_id:
            raise ValueError(
                f"{folder}: the added token {token.content!r} has id {listed_id}, but {token_id} is its place"
            )

    # What is known already is listed with its properties, which a bare name would take away.
    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    if isinstance(extra, dict):
        extra = extra.values()
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for entry in [*(settings[name] for name in NAMES if settings.get(name)), *extra]:
        if token_text(entry) not in known:
            tokenizer.add_special_tokens([_added_token(entry, special=True)])


def _added_tokens(folder: Path, settings: dict[str, Any]) -> "Iterator[tuple[int, AddedToken]]":
    """The tokens that have an id besides those of the vocabulary, in the order of the ids."""
    table = settings.get("added_tokens_decoder")
    if isinstance(table, dict):
        for token_id in sorted(table, key=int):
            yield int(token_id), _added_token(table[token_id], special=False)
        return

    path = folder / "added_tokens.json"
    ids = json_if_there(path)
    with_fields(ids, str(path), **dict.fromkeys(ids, int))
    special = {token_text(settings[name]) for name in NAMES if settings.get(name)}
    for text in sorted(ids, key=ids.__getitem__):
        yield ids[text], _added_token(text, special=text in special)


def _added_token(entry: Any, special: bool) -> "AddedToken":
    """A token from its text, or from a table of its properties: these files have both forms."""
    from tokenizers import AddedToken

    if not isinstance(entry, dict):
        return AddedToken(str(entry), special=special, normalized=not special)
    flags = {key: bool(entry[key]) for key in ("single_word", "lstrip", "rstrip", "normalized") if key in entry}
    return AddedToken(entry["content"], special=special or bool(entry.get("special")), **flags)
