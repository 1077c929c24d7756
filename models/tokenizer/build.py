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

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._files import json_if_there
from ..._outside import located, others_code
from ..._shapes import with_fields
from ..layers.config_fields import require_values
from .token_names import SETTINGS, TokenizerSettings, token_text

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
    complete = [names for names, _ in BUILDERS.values() if all((folder / name).is_file() for name in names)]
    if not complete:
        return None
    with located(folder / SETTINGS):
        require_values(described.merged, NEUTRAL_VALUES, remedy=f"; {CONVERT}")

    # The files alone don't tell how the text is cut; the class does.
    class_name = described.class_name
    if class_name not in BUILDERS or BUILDERS[class_name][0] not in complete:
        raise ValueError(
            f"{folder / complete[0][0]}: of a {class_name}, which is not built from such files, without "
            f"tokenizer.json; {CONVERT}"
        )
    names, build = BUILDERS[class_name]
    tokenizer: Tokenizer = build([folder / name for name in names], described)
    _add_special_tokens(tokenizer, folder, described)
    if class_name == "BertTokenizer":
        with located(folder / SETTINGS):
            _frame_texts(tokenizer, described)
    return tokenizer


def _byte_level(paths: list[Path], described: TokenizerSettings) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    with others_code(lambda error: ValueError(f"{paths[0]}, {paths[1].name}: damaged ({error}); restore them")):
        vocabulary, merges = models.BPE.read_file(*map(str, paths))
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    add_prefix_space = bool(described.merged.get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _word_piece(paths: list[Path], described: TokenizerSettings) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    (path,) = paths
    with others_code(lambda error: ValueError(f"{path}: damaged ({error}); restore the file")):
        vocabulary = models.WordPiece.read_file(str(path))
    unknown = described.names.get("unk_token", "[UNK]")
    if unknown not in vocabulary:
        raise ValueError(f"{path}: the unknown token {unknown!r} is not in it; restore the file")

    settings = described.merged
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


# By the name of transformers' class: the files that such a tokenizer is built from, and how.
BUILDERS = {
    "BertTokenizer": (("vocab.txt",), _word_piece),
    "GPT2Tokenizer": (("vocab.json", "merges.txt"), _byte_level),
}


def _frame_texts(tokenizer: "Tokenizer", described: TokenizerSettings) -> None:
    """[CLS] text [SEP], or [CLS] text [SEP] text [SEP] with segment ids 0 and 1. ValueError where one is null."""
    from tokenizers import processors

    for name in ("cls_token", "sep_token"):
        if name not in described.names:
            raise ValueError(f"{name} = {described.merged[name]!r}: a text needs it; name one")
    cls = described.names["cls_token"]
    sep = described.names["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[cls, "$A", sep],
        pair=[cls, "$A", sep, "$B:1", f"{sep}:1"],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )


def _add_special_tokens(tokenizer: "Tokenizer", folder: Path, described: TokenizerSettings) -> None:
    """Tokens beyond the vocabulary by their ids, then the special ones; ValueError where an id isn't the next free."""
    for listed_id, token in _added_tokens(folder, described):
        tokenizer.add_tokens([token])
        token_id = tokenizer.token_to_id(token.content)
        if token_id != listed_id:
            raise ValueError(
                f"{folder}: the added token {token.content!r} has id {listed_id}, but {token_id} is its place"
            )

    # What is known already is listed with its properties, which a bare name would take away.
    settings = described.merged
    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    if isinstance(extra, dict):
        extra = extra.values()
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    with located(folder / SETTINGS):
        for entry in [*described.special.values(), *extra]:
            if token_text(entry) not in known:
                tokenizer.add_special_tokens([_added_token(entry, special=True)])


def _added_tokens(folder: Path, described: TokenizerSettings) -> "list[tuple[int, AddedToken]]":
    """The tokens that have an id besides those of the vocabulary, in the order of the ids."""
    table = described.merged.get("added_tokens_decoder")
    if table is not None:
        with located(folder / SETTINGS):
            ids = sorted(table, key=int)
            return [(int(token_id), _added_token(table[token_id], special=False)) for token_id in ids]

    path = folder / "added_tokens.json"
    by_text = json_if_there(path)
    with_fields(by_text, path, **dict.fromkeys(by_text, int))
    texts = sorted(by_text, key=by_text.__getitem__)
    return [(by_text[text], _added_token(text, special=text in described.names.values())) for text in texts]


def _added_token(entry: Any, special: bool) -> "AddedToken":
    """A token from its text, or from a table of its properties: these files have both forms."""
    from tokenizers import AddedToken

    if not isinstance(entry, dict):
        entry = {"content": entry, "normalized": not special}
    flags = {key: bool(entry[key]) for key in ("single_word", "lstrip", "rstrip", "normalized") if key in entry}
    return AddedToken(token_text(entry), special=special or bool(entry.get("special")), **flags)
