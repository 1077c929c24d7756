"""What tags of words say about entities: which words are one, and of which type it is.

Schemes differ in what marks the words of an entity. Each mark stands in front of the type, parted by "-" or "_":

    BIO     B first, I further words; in its older form B only where two entities of a type touch
    BIOES   (IOBES) also E for the last word, S for the only one
    BILOU   (BIOUL) the same with L and U
    BMES    the same with M for the words in the middle

All are read by the rules of conlleval, BILOU and BMES by those of the marks of BIOES that mean the same.
"""

import re
from collections.abc import Iterable, Sequence

Entity = tuple[int, int, str]  # first word, one past the last word, type

MARKS = "BIESLUM"
AS_IN_BIOES = {"L": "E", "U": "S", "M": "I"}
PREFIXED = re.compile(f"([{MARKS}])[-_](.*)")
# In small letters, with another sign, or with the mark behind the type; and of these the ones that every scheme has.
OTHER_SPELLING = re.compile(f"(?i:[{MARKS}])[-_:/.|].+|.+[-_:/.|][{MARKS}]")
OTHER_B_OR_I = re.compile("(?i:[BI])[-_:/.|].+|.+[-_:/.|][BI]")


def tags_are_plain(names: Iterable[str]) -> bool:
    """Whether no tag of a set says where in an entity its word stands, as parts of speech don't.

    Marks without a type (B, I, O) are a scheme where an I or an end can follow a B; other single letters are plain.
    Raises ValueError for tags that can't be read and would make scores meaningless: with a prefix and without side by
    side, in another spelling of a scheme, or numbers, of which nobody knows which one is O.
    """
    tags = sorted(set(names) - {"O"})

    # Tags that are one thing altogether: marks without a type, or numbers.
    if tags and all(re.fullmatch(f"[{MARKS}]", tag) for tag in tags):
        return tags != ["I"] and not ("B" in tags and set("IMEL") & set(tags))
    if tags and all(re.fullmatch("[0-9]+", tag) for tag in tags):
        raise ValueError(
            f"tags are numbers ({', '.join(tags[:5])}), and a score needs to know which of them is O; write their names"
        )

    # Some with a prefix and some without: one of the two is a mistake, and nobody knows which.
    plain = [tag for tag in tags if not PREFIXED.fullmatch(tag)]
    if plain and len(plain) < len(tags):
        prefixed = next(tag for tag in tags if tag not in plain)
        raise ValueError(
            f"tag {plain[0]!r} has no prefix and {prefixed!r} has one; write every tag as O, B-type or I-type, or, if "
            "none is meant as a prefix, with another sign than - or _ behind the first letter"
        )

    misspelt = [tag for tag in plain if OTHER_SPELLING.fullmatch(tag)]
    if set(misspelt) >= set(plain) - {"o"} and any(map(OTHER_B_OR_I.fullmatch, misspelt)):
        raise ValueError(f"tag {misspelt[0]!r} looks like another spelling of B-type or I-type; write it like these")
    return bool(plain)


def entities(tags: Sequence[str], plain: bool) -> set[Entity]:
    """The entities of one row by conlleval's startOfChunk and endOfChunk; of `plain` tags each word but O is one."""
    spans: set[Entity] = set()
    first: int | None = None  # word of the entity that is open
    previous_mark = "O"
    previous_type = ""

    # The O behind the last word ends what is still open there.
    for i, tag in enumerate([*tags, "O"]):
        mark, entity_type = _mark_and_type(tag, plain)
        # An entity begins where a mark says so, where the type changes, and behind a mark that ends one.
        begins = mark in "BS" or entity_type != previous_type or previous_mark in "OES"
        if first is not None and (begins or mark == "O"):
            spans.add((first, i, previous_type))
            first = None
        if begins and mark != "O":
            first = i

        previous_mark = mark
        previous_type = entity_type
    return spans


def _mark_and_type(tag: str, plain: bool) -> tuple[str, str]:
    """Where in an entity a word stands, as B, I, E, S or O, and the entity's type."""
    if tag == "O":
        return "O", ""
    if plain:
        return "S", tag
    match = PREFIXED.fullmatch(tag)
    mark, entity_type = match.groups() if match else (tag, "")
    return AS_IN_BIOES.get(mark, mark), entity_type
