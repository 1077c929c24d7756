"""Small tokenizers of the kinds that matter: GPT-2's (byte-level, no special tokens placed), BERT's and T5's."""

import re
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

_SENTENCES = [
    "The cat sat on the mat, and the dog looked at the cat.",
    "User: What is the capital of France?\nAssistant: The capital of France is Paris.\n",
    "Question: who wrote the book?\n\nAnswer: the woman wrote the book in 1920.",
    "system user assistant hello good morning, thank you; you are welcome!",
] * 3


@cache
def byte_level(trim_offsets: bool = True) -> Tokenizer:
    """GPT-2's kind; `<|end|>` (id 0) ends texts, `<|im_start|>` and `<|im_end|>` mark turns."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return tokenizer


@cache
def word_piece() -> Tokenizer:
    """BERT's kind: lower case, [CLS] text [SEP] text [SEP]; words of more than five letters are two pieces.

    Made by hand, because the library's trainer gives another vocabulary in every process.
    """
    words = sorted(set(re.findall(r"\w+", " ".join(_SENTENCES).lower())))
    letters = sorted(set("".join(words)))
    pieces = [piece for word in words for piece in ([word] if len(word) < 6 else [word[:4], "##" + word[4:]])]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    entries = dict.fromkeys([*special, *".,:;?!", *letters, *("##" + letter for letter in letters), *pieces])
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(entries)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


@cache
def sentence_piece(sentinels: int = 20) -> Tokenizer:
    """T5's kind: <pad> </s> <unk>, pieces with the space in front, <extra_id_0> the last id; text </s>."""
    words = sorted({piece for line in _SENTENCES for piece in re.findall(r"\w+|[^\w\s]", line)})
    letters = sorted(set("".join(words)))
    special = ["<pad>", "</s>", "<unk>"]
    extra = [f"<extra_id_{i}>" for i in reversed(range(sentinels))]
    scored = [("▁", -2.0), *((f"▁{word}", -4.0) for word in words), *((letter, -8.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram([*((name, 0.0) for name in special), *scored], unk_id=2))
    tokenizer.add_special_tokens([*special, *extra])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


@cache
def llama_like(begins: bool = True) -> Tokenizer:
    """Llama 2's kind: <unk> <s> </s>, bytes, then words with the space in front, also of a text; `begins`: <s> text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({letter for line in _SENTENCES for letter in line if not letter.isspace()})
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "▁", *letters])}
    merges: list[tuple[str, str]] = []

    # Each word grows letter by letter, first with the space in front.
    words = sorted({word for line in _SENTENCES for word in re.findall(r"\w+", line)})
    for word in [*(f"▁{word}" for word in words), *words]:
        for end in range(1, len(word)):
            if word[: end + 1] not in vocabulary:
                vocabulary[word[: end + 1]] = len(vocabulary)
                merges.append((word[:end], word[end]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return tokenizer
