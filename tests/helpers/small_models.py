"""Tiny random models of transformers, the truth that ours are compared with, and batches for them."""

import json
import os
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor
from transformers import (
    BertConfig,
    BloomConfig,
    DistilBertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    MPNetConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    SmolLM3Config,
)

from handtune.engine.data.batches import packed
from handtune.models import load

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# They count positions from behind the pad token's id, and not by `position_ids` as all others do.
BEHIND_PAD = ("roberta", "xlm-roberta", "camembert", "mpnet")
ENCODERS = ("bert", "distilbert", "modernbert", *BEHIND_PAD)  # they score a text by column 0, where padding may stand
PAD = 0  # no real token of `token_rows` has it
LABELS = {"sequence-classification": 4, "token-classification": 5, "reward": 1}


def tiny_gpt2(**overrides: Any) -> GPT2Config:
    """Two layers, three heads of eight, forty positions, no dropout."""
    sizes = {"vocab_size": 61, "n_positions": 40, "n_embd": 24, "n_layer": 2, "n_head": 3}
    rest = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD}
    return GPT2Config(**{**sizes, **rest, **ids, **overrides})


def tiny_bert(**overrides: Any) -> BertConfig:
    """Two layers, three heads of eight, forty positions, no dropout."""
    sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    more = {"intermediate_size": 40, "max_position_embeddings": 40, "pad_token_id": PAD}
    rest = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(**{**sizes, **more, **rest, **overrides})


def tiny_roberta(config: type = RobertaConfig, **overrides: Any) -> RobertaConfig:
    """Two layers, three heads of eight, forty rows of the position table, one type, no dropout; pads with id 0."""
    sizes = tiny_bert(max_position_embeddings=41, type_vocab_size=1, layer_norm_eps=1e-5).to_diff_dict()
    return config(**{**sizes, "model_type": config.model_type, "bos_token_id": 2, "eos_token_id": 3, **overrides})


def tiny_distilbert(**overrides: Any) -> DistilBertConfig:
    """Two layers, three heads of eight, forty positions, no dropout."""
    sizes = {"vocab_size": 61, "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40, "max_position_embeddings": 40}
    rest = dict.fromkeys(("dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout"), 0.0)
    return DistilBertConfig(**{**sizes, **rest, "pad_token_id": PAD, **overrides})


def tiny_mpnet(**overrides: Any) -> MPNetConfig:
    """Two layers, three heads of eight, forty-two rows of the position table, no dropout."""
    sizes = tiny_roberta(max_position_embeddings=42).to_diff_dict()
    return MPNetConfig(**{**sizes, "model_type": "mpnet", "pad_token_id": 1, **overrides})


def tiny_modernbert(**overrides: Any) -> ModernBertConfig:
    """Four layers, of which two look two tokens far, three heads of eight, forty positions; pads with id 0."""
    sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3}
    more = {"intermediate_size": 40, "max_position_embeddings": 40, "local_attention": 4, "pad_token_id": PAD}
    ids = {"bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    return ModernBertConfig(**{**sizes, **more, **ids, **overrides})


def tiny_llama(**overrides: Any) -> LlamaConfig:
    """Two layers, six heads of four on two key/value heads, forty positions."""
    sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6}
    more = {"num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 40, "pad_token_id": PAD}
    ids = {"bos_token_id": None, "eos_token_id": None}
    return LlamaConfig(**{**sizes, **more, **ids, **overrides})


def tiny_gemma2(**overrides: Any) -> Gemma2Config:
    """As `tiny_gemma3`, with soft-caps that bend scores and logits of this size."""
    apart = ("rope_parameters", "dtype")
    sizes = {key: value for key, value in tiny_gemma3().to_diff_dict().items() if key not in apart}
    caps = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.4}
    ids = {"bos_token_id": None, "eos_token_id": None}
    return Gemma2Config(**{**sizes, "model_type": "gemma2", **caps, **ids, **overrides})


def tiny_gemma3(**overrides: Any) -> Gemma3TextConfig:
    """Four layers, of which the second and the fourth see all, six heads of four on two key/value heads."""
    sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 6, "head_dim": 4}
    more = {"num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 40, "pad_token_id": PAD}
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 5}
    rest = {"query_pre_attn_scalar": 7, "bos_token_id": None, "eos_token_id": None}
    return Gemma3TextConfig(**{**sizes, **more, **layers, **rest, **overrides})


def tiny_smollm3(**overrides: Any) -> SmolLM3Config:
    """As `tiny_llama`, of four layers, of which two don't turn their heads."""
    sizes = {**tiny_llama().to_diff_dict(), "num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}
    return SmolLM3Config(**{**sizes, "model_type": "smollm3", "bos_token_id": None, "eos_token_id": None, **overrides})


def tiny_olmo(config: type = Olmo2Config, **overrides: Any) -> Olmo2Config:
    """As `tiny_llama`; OLMo 3 with a layer that sees five tokens, and one that sees all."""
    windows = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
    more = windows if config is Olmo3Config else {}
    ids = {"bos_token_id": None, "eos_token_id": None}
    sizes = {key: value for key, value in tiny_llama().to_diff_dict().items() if key != "rope_parameters"}
    return config(**{**sizes, "model_type": config.model_type, **more, **ids, **overrides})


def tiny_phi3(**overrides: Any) -> Phi3Config:
    """As `tiny_llama`, with three heads of eight, of which six entries are turned."""
    apart = ("rope_parameters", "head_dim")
    sizes = {key: value for key, value in tiny_llama().to_diff_dict().items() if key not in apart}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    turned = {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.75}}
    ids = {"bos_token_id": None, "eos_token_id": None}
    return Phi3Config(**{**sizes, "model_type": "phi3", **heads, **turned, **ids, **overrides})


CLASSES = {
    ("gemma2", "causal-lm"): transformers.Gemma2ForCausalLM,
    ("gemma2", "sequence-classification"): transformers.Gemma2ForSequenceClassification,
    ("gemma2", "reward"): transformers.Gemma2ForSequenceClassification,
    ("gemma2", "token-classification"): transformers.Gemma2ForTokenClassification,
    ("gemma2", "embedding"): transformers.Gemma2Model,
    ("gemma3_text", "causal-lm"): transformers.Gemma3ForCausalLM,
    ("gemma3_text", "sequence-classification"): transformers.Gemma3TextForSequenceClassification,
    ("gemma3_text", "reward"): transformers.Gemma3TextForSequenceClassification,
    ("gemma3_text", "embedding"): transformers.Gemma3TextModel,
    ("gpt2", "causal-lm"): transformers.GPT2LMHeadModel,
    ("gpt2", "sequence-classification"): transformers.GPT2ForSequenceClassification,
    ("gpt2", "token-classification"): transformers.GPT2ForTokenClassification,
    ("gpt2", "question-answering"): transformers.GPT2ForQuestionAnswering,
    ("gpt2", "embedding"): transformers.GPT2Model,
    ("gpt2", "reward"): transformers.GPT2ForSequenceClassification,
    ("bloom", "causal-lm"): transformers.BloomForCausalLM,
    ("bloom", "sequence-classification"): transformers.BloomForSequenceClassification,
    ("bloom", "token-classification"): transformers.BloomForTokenClassification,
    ("bloom", "question-answering"): transformers.BloomForQuestionAnswering,
    ("bloom", "embedding"): transformers.BloomModel,
    ("bloom", "reward"): transformers.BloomForSequenceClassification,
    ("llama", "causal-lm"): transformers.LlamaForCausalLM,
    ("llama", "sequence-classification"): transformers.LlamaForSequenceClassification,
    ("llama", "token-classification"): transformers.LlamaForTokenClassification,
    ("llama", "question-answering"): transformers.LlamaForQuestionAnswering,
    ("llama", "embedding"): transformers.LlamaModel,
    ("llama", "reward"): transformers.LlamaForSequenceClassification,
    ("bert", "masked-lm"): transformers.BertForMaskedLM,
    ("bert", "sequence-classification"): transformers.BertForSequenceClassification,
    ("bert", "token-classification"): transformers.BertForTokenClassification,
    ("bert", "question-answering"): transformers.BertForQuestionAnswering,
    ("bert", "embedding"): transformers.BertModel,
    ("bert", "reward"): transformers.BertForSequenceClassification,
    ("t5", "seq2seq-lm"): transformers.T5ForConditionalGeneration,
    ("t5", "sequence-classification"): transformers.T5ForSequenceClassification,
    ("t5", "token-classification"): transformers.T5ForTokenClassification,
    ("t5", "question-answering"): transformers.T5ForQuestionAnswering,
    ("t5", "embedding"): transformers.T5EncoderModel,
    ("t5", "reward"): transformers.T5ForSequenceClassification,
}
for kind in ("SmolLM3", "Olmo2", "Olmo3", "Phi3"):
    for model_type, task in [*CLASSES]:
        name = CLASSES["llama", task].__name__.replace("Llama", kind) if model_type == "llama" else ""
        if hasattr(transformers, name):
            CLASSES[kind.lower(), task] = getattr(transformers, name)
for name in (*LABELS, "masked-lm", "question-answering", "embedding"):
    for kind in ("DistilBert", "ModernBert", "MPNet", "Roberta", "XLMRoberta", "Camembert"):
        its_class = getattr(transformers, CLASSES["bert", name].__name__.replace("Bert", kind))
        CLASSES[its_class.config_class.model_type, name] = its_class
for kind in ("Mistral", "Qwen2", "Qwen3"):
    for (model_type, task), its_class in [*CLASSES.items()]:
        if model_type == "llama":
            CLASSES[kind.lower(), task] = getattr(transformers, its_class.__name__.replace("Llama", kind))


def theirs(config: PretrainedConfig, task: str, seed: int = 0) -> PreTrainedModel:
    """transformers' model for the task, in eval mode. All weights are random: a bias of zero hides errors."""
    torch.manual_seed(seed)
    if task in LABELS:
        config.num_labels = LABELS[task]
    model = CLASSES[config.model_type, task](config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def both(folder: Path, config: PretrainedConfig, task: str, seed: int = 0) -> tuple[PreTrainedModel, Any]:
    """transformers' model, and ours loaded from what transformers saved in `folder`."""
    model = theirs(config, task, seed)
    model.save_pretrained(folder)
    return model, load(folder, task, device="cpu")[0]


def token_rows(lengths: tuple[int, ...] = (7, 1, 12, 4), vocab: int = 61, seed: int = 0) -> list[list[int]]:
    """Random rows of real tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab, (n,), generator=generator).tolist() for n in lengths]


def padded(rows: list[list[int]], side: str = "right", pad: int = PAD) -> dict[str, Tensor]:
    """Ids, mask and position ids (B, T) of rows filled up on one side; positions count the real tokens."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, columns], mask[i, columns] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def their_logits(model: PreTrainedModel, task: str, inputs: dict[str, Tensor]) -> Tensor:
    """transformers' outputs in our shapes."""
    if model.config.model_type in BEHIND_PAD:
        inputs = {name: tensor for name, tensor in inputs.items() if name != "position_ids"}
    out = model(**inputs)
    if task == "question-answering":
        return torch.stack((out.start_logits, out.end_logits), -1)
    if task == "embedding":
        mask = inputs["attention_mask"][..., None]
        return (out.last_hidden_state * mask).sum(1) / mask.sum(1)
    return out.logits[:, 0] if task == "reward" else out.logits


def real(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits of the real tokens (N, C) in the order of the rows; those of whole rows as they are."""
    return logits[mask.bool()] if logits.dim() == 3 else logits


@torch.no_grad()
def assert_same_logits(
    reference: PreTrainedModel, model: Any, task: str, rows: list[list[int]], n_types: int = 1
) -> None:
    """Ours equals transformers' on real tokens: rows alone, padded on either side, and packed.

    transformers' encoders read column 0, so their whole-row tasks have no left-padded truth but the rows alone.
    """
    by_row = task in ("sequence-classification", "reward", "embedding")
    pad = reference.config.pad_token_id
    bound = 1e-4
    types = [[(i + j) % n_types for j in range(len(row))] for i, row in enumerate(rows)]
    truth = []
    for row, row_types in zip(rows, types, strict=True):
        inputs = padded([row]) | {"token_type_ids": torch.tensor([row_types])}
        if n_types == 1 and reference.config.model_type != "bert":
            del inputs["token_type_ids"]  # GPT-2 adds a token's embedding for them, be they zero; Llama knows none
        truth.append(their_logits(reference, task, inputs)[0])
        assert_within(model(**inputs)[0], truth[-1], bound, "alone")
    expected = torch.stack(truth) if by_row else torch.cat(truth)
    for side in ("right", "left"):
        inputs = padded(rows, side, PAD if pad is None else pad)
        mask = inputs["attention_mask"]
        if n_types > 1:
            inputs["token_type_ids"] = torch.zeros_like(mask)
            inputs["token_type_ids"][mask.bool()] = torch.tensor([*chain(*types)])
        if not (by_row and side == "left" and reference.config.model_type in ENCODERS and task != "embedding"):
            assert_within(real(their_logits(reference, task, inputs), mask), expected, bound, f"transformers, {side}")
        given = {key: value for key, value in inputs.items() if key != "position_ids"}
        assert_within(real(model(**given), mask), expected, bound, f"{side} padding")
        assert_within(real(model(**inputs), mask), expected, bound, f"{side} padding, position ids given")
    line = packed(rows)
    if n_types > 1:
        line["token_type_ids"] = torch.tensor([[*chain(*types)]])
    whole = model(**line)
    assert_within(whole if by_row else whole[0], expected, bound, "packed")
    del line["position_ids"]
    whole = model(**line)
    assert_within(whole if by_row else whole[0], expected, bound, "packed, positions found")


def assert_within(ours: Tensor, reference: Tensor, bound: float, what: str) -> None:
    assert ours.shape == reference.shape, f"{what}: {tuple(ours.shape)} instead of {tuple(reference.shape)}"
    error = (ours.float() - reference.float()).abs().max().item()
    assert error <= bound, f"{what}: off by {error:.1e}"


def assert_same_gradients(reference: PreTrainedModel, model: Any, zero: tuple[str, ...] = ()) -> None:
    """Each of our gradients equals transformers' to 1e-4 of its largest entry; ours are found through the key map.

    `zero`: parameters that the loss does not depend on, whose gradient is rounding noise.
    """
    published = dict(reference.named_parameters(remove_duplicate=False))  # a tied matrix by both its names
    left = dict(reference.named_parameters()).values()
    own = dict(model.named_parameters())
    table = model.key_map()
    assert set(own) == set(table)
    for key, source in table.items():
        parts = [published[name] for name in source.names]
        left = [parameter for parameter in left if not any(parameter is part for part in parts)]
        expected = torch.cat([source.ours(part.grad) for part in parts])
        error, size = (own[key].grad - expected).abs().max(), expected.abs().max()
        assert error <= (1e-4 if key in zero else 1e-4 * size), f"{key}: off by {error:.1e}, of at most {size:.1e}"
        assert (size <= 1e-4) == (key in zero), f"{key}: at most {size:.1e}"
    assert not left


def assert_same_state(reference: PreTrainedModel, folder: Path, **settings: Any) -> PreTrainedModel:
    """What we saved in `folder`, loaded by transformers, is bitwise `reference`; gives the loaded model."""
    loaded, found = type(reference).from_pretrained(folder, output_loading_info=True, **settings)
    assert not any(found.values()), found
    expected = reference.state_dict()
    state = loaded.state_dict()
    assert set(state) == set(expected)
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name
    return loaded.eval()


def tiny_bloom() -> BloomConfig:
    """Two layers, three heads of eight."""
    return BloomConfig(vocab_size=61, hidden_size=24, n_layer=2, n_head=3, pad_token_id=0, hidden_dropout=0.0)


def change_config(folder: Path, **fields: Any) -> None:
    """Change fields of config.json; one of None is taken out."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def on_cpu(folder: Path, *arguments: Any, **settings: Any) -> Any:
    return load(folder, *arguments, device="cpu", **settings)[0]
