"""Tiny random models of transformers with tokenizers, for `exchange.py`: each family as its published checkpoints are.

A tokenizer's words are whole English ones; what differs between families is what matters for reading a text: which
special tokens there are, what a text ends with, and what pads it. `padding` says that: "own", a token of its own;
"eos", the token that ends texts; "none", no pad token is named anywhere.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

WORDS = (
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "mat",
    "tree",
    "it",
    "was",
    "old",
    "new",
    "small",
    "very",
)
D = 24
AUTO: dict[str, Any] = {
    "causal-lm": transformers.AutoModelForCausalLM,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
    "embedding": transformers.AutoModel,
    "reward": transformers.AutoModelForSequenceClassification,
    "image-classification": transformers.AutoModelForImageClassification,
}


@dataclass(frozen=True)
class Family:
    """How models of a family are made: `kind` is transformers' model_type, `base` the task of what is pretrained.

    `specials` are the special tokens in the order of their ids, `names` which of them are eos, pad and the like;
    `ending` is what the post-processor puts around a text.
    """

    kind: str
    sizes: dict[str, Any]
    base: str = "causal-lm"
    specials: tuple[str, ...] = ("</s>", "<s>", "<unk>", "<pad>")
    names: dict[str, str] = field(default_factory=lambda: {"eos_token": "</s>", "bos_token": "<s>"})
    ending: str = "$A"
    paddings: tuple[str, ...] = ("own",)
    own_output: bool = False  # of a T5: an output matrix that isn't the embedding
    sides: tuple[int, ...] = ()  # pixels, height and width, of what reads images


_LLAMA = {
    "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 40, "max_position_embeddings": 40,
}  # fmt: skip
_NEAR_AND_FAR = ["sliding_attention", "full_attention"]
_GEMMA = _LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 5, "layer_types": _NEAR_AND_FAR, "sliding_window": 4}
_SOFT_CAPPED = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.4}
_PARTLY_TURNED = {
    "num_attention_heads": 3, "num_key_value_heads": 1, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
    },
}  # fmt: skip
_T5 = {"d_model": D, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3, "dropout_rate": 0.0}
_BERT = {
    "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
    "max_position_embeddings": 40,
}  # fmt: skip
_ROBERTA = _BERT | {"max_position_embeddings": 44, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
_ALL = ("own", "eos", "none")
_BYTES = {"specials": ("<|end|>", "<|pad|>"), "names": {"eos_token": "<|end|>", "bos_token": "<|end|>"}}
_PIECES = {"names": {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}}
_OF_BERT = {
    "base": "masked-lm", "specials": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "names": {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "mask_token": "[MASK]"},
    "ending": "[CLS] $A [SEP]",
}  # fmt: skip
_OF_ROBERTA = {
    "base": "masked-lm", "specials": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
    "names": {
        "cls_token": "<s>", "bos_token": "<s>", "sep_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>",
        "mask_token": "<mask>",
    },
    "ending": "<s> $A </s>",
}  # fmt: skip
_OF_T5 = {"base": "seq2seq-lm", "specials": ("<pad>", "</s>", "<unk>"), "names": {"eos_token": "</s>"}}
_VIT = {
    "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8,
}  # fmt: skip
_GATED = _T5 | {"feed_forward_proj": "gated-gelu"}

FAMILIES: dict[str, Family | str] = {
    "GPT-2": Family("gpt2", {"n_embd": D, "n_layer": 2, "n_head": 3, "n_positions": 40}, paddings=_ALL, **_BYTES),
    "GPT-3": "transformers has no such architecture",
    "BLOOM": Family("bloom", {"hidden_size": D, "n_layer": 2, "n_head": 3}, paddings=_ALL, **_PIECES),
    "Llama": Family("llama", _LLAMA, paddings=_ALL, **_PIECES),
    "Mistral": Family("mistral", _LLAMA | {"sliding_window": 4}, paddings=_ALL, **_PIECES),
    "Qwen2": Family("qwen2", _LLAMA, paddings=_ALL, **_BYTES),
    "Qwen3": Family("qwen3", _LLAMA | {"head_dim": 8}, paddings=_ALL, **_BYTES),
    "SmolLM3": Family("smollm3", _LLAMA | {"no_rope_layers": [1, 0]}, paddings=_ALL, **_BYTES),
    "Gemma 2": Family("gemma2", _GEMMA | _SOFT_CAPPED, paddings=_ALL, **_PIECES),
    "Gemma 3": Family("gemma3_text", _GEMMA, paddings=_ALL, **_PIECES),
    "Phi-3": Family("phi3", _LLAMA | _PARTLY_TURNED, paddings=_ALL, **_PIECES),
    "OLMo 2": Family("olmo2", _LLAMA, paddings=_ALL, **_BYTES),
    "OLMo 3": Family("olmo3", _LLAMA | {"layer_types": _NEAR_AND_FAR, "sliding_window": 4}, paddings=_ALL, **_BYTES),
    "BERT": Family("bert", _BERT, **_OF_BERT),
    "DistilBERT": Family(
        "distilbert",
        {"dim": D, "n_layers": 2, "n_heads": 3, "hidden_dim": 40, "max_position_embeddings": 40},
        **_OF_BERT,
    ),
    "ModernBERT": Family(
        "modernbert", _BERT | {"num_hidden_layers": 4, "local_attention": 4}, **_OF_BERT,
    ),
    "MPNet": Family(
        "mpnet", _BERT | {"max_position_embeddings": 44}, **_OF_ROBERTA,
    ),
    "RoBERTa": Family("roberta", _ROBERTA, **_OF_ROBERTA),
    "XLM-RoBERTa": Family("xlm-roberta", _ROBERTA, **_OF_ROBERTA),
    "CamemBERT": Family("camembert", _ROBERTA, **_OF_ROBERTA),
    "T5 v1.0": Family("t5", _T5, ending="$A </s>", **_OF_T5),
    "T5 v1.1": Family("t5", _GATED, ending="$A </s>", own_output=True, **_OF_T5),
    "Flan-T5": Family("t5", _GATED | {"num_decoder_layers": 3}, ending="$A </s>", own_output=True, **_OF_T5),
    "XLNet": Family(
        "xlnet", {"d_model": D, "n_layer": 2, "n_head": 3, "d_inner": 40},
        specials=("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>"),
        names={"eos_token": "</s>", "cls_token": "<cls>", "sep_token": "<sep>"}, ending="$A <sep> <cls>",
    ),
    "ResNet": Family(
        "resnet", {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2]}, "embedding", sides=(40, 32),
    ),
    "ViT": Family("vit", _VIT | {"intermediate_size": 40}, "embedding", sides=(32, 32)),
    "DINOv2": Family("dinov2", _VIT, "embedding", sides=(40, 32)),
    "DINOv2, reg.": Family(
        "dinov2_with_registers", _VIT | {"use_swiglu_ffn": True}, "embedding", sides=(40, 32),
    ),
}  # fmt: skip


def pad_token(family: Family) -> str:
    """The family's pad token, where it has one of its own."""
    return next(token for token in family.specials if "pad" in token.lower())


def tokenizer_of(family: Family, padding: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of whole words; without the pad token where that is none of its own."""
    own = pad_token(family)
    specials = [token for token in family.specials if padding == "own" or token != own]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*specials, *WORDS])}, unk_token=WORDS[0]))
    tokenizer.add_special_tokens(specials)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if family.ending != "$A":
        around = [(token, specials.index(token)) for token in family.ending.split() if token != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(single=family.ending, special_tokens=around)
    names = dict(family.names)
    if padding != "none":
        names["pad_token"] = own if padding == "own" else names["eos_token"]
    names_of_inputs = ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names_of_inputs, **names)


def config_of(family: Family, tokenizer: Any) -> transformers.PretrainedConfig:
    """The family's configuration, its special tokens those of the tokenizer."""
    if family.sides:
        return transformers.AutoConfig.for_model(family.kind, **family.sizes)
    ids: dict[str, Any] = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("eos", "bos", "pad")}
    if family.kind == "t5":
        ids["decoder_start_token_id"] = ids["pad_token_id"]
    dropout = {"gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"), "bloom": ("hidden_dropout", "attention_dropout")}
    off = dict.fromkeys(dropout.get(family.kind, ()), 0.0)
    config = transformers.AutoConfig.for_model(family.kind, **family.sizes, **ids, **off, vocab_size=len(tokenizer))
    if family.own_output:
        config.scale_decoder_outputs = False
    return config


def class_of(family: Family, config: transformers.PretrainedConfig, task: str) -> Any:
    """transformers' class for the task, or None. Vectors of a T5 are its encoder's, as sentence-transformers has it."""
    if family.kind == "t5" and task == "embedding":
        return transformers.T5EncoderModel
    mapping = AUTO[task]._model_mapping
    return mapping.get(type(config), None)


@torch.no_grad()
def randomize(model: Any, seed: int = 0) -> Any:
    """All weights random, biases and norms too, which would hide errors at zero and one. Tied ones stay tied."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def their_model(family: Family, config: transformers.PretrainedConfig, task: str, n_labels: int = 3) -> Any:
    """transformers' model for the task with random weights, in eval mode."""
    torch.manual_seed(0)
    config.num_labels = 1 if task == "reward" else n_labels if task.endswith("classification") else 2
    model = class_of(family, config, task)(config)
    if family.own_output and task == "seq2seq-lm":  # a config that says so would give the encoder its own embedding
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return randomize(model)


def store(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save as transformers does."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
