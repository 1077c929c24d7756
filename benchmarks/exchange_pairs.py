"""transformers' model and ours, which should be the same one: stored by one side, and read by the other."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from exchange_models import AUTO, Family, class_of, config_of, randomize, store, their_model, tokenizer_of
from torch import Tensor

from handtune.engine import LoRAConfig, add_lora, load_adapter, save_adapter
from handtune.engine.data.batches import packed
from handtune.models import load, save

POOLINGS = ("mean_tokens", "max_tokens", "lasttoken")


@dataclass(frozen=True)
class Pair:
    """transformers' model and ours, which should be the same one, with the tokenizers that lie beside them."""

    family: Family
    task: str
    theirs: Any
    ours: Any
    words: Any  # transformers' tokenizer
    tokenizer: Any  # ours
    rule: str = ""  # sentence-transformers' pooling mode

    @torch.no_grad()
    def reference(self, ids: Tensor, mask: Tensor) -> Tensor:
        """transformers' outputs (B, ...) in our shapes, for a batch as its tokenizer pads it."""
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.family.kind in ("gpt2", "bert", "distilbert"):  # which otherwise count the padding
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if self.task == "seq2seq-lm":
            inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        out = self.theirs(**inputs)
        if self.task == "question-answering":
            return torch.stack((out.start_logits, out.end_logits), -1)
        if self.task == "embedding":
            return sentence_vectors(out.last_hidden_state, mask, self.rule)
        return out.logits[:, 0] if self.task == "reward" else out.logits

    @torch.no_grad()
    def own(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Our outputs for the same."""
        more = {"decoder_input_ids": ids, "decoder_attention_mask": mask} if self.task == "seq2seq-lm" else {}
        return self.ours(ids, attention_mask=mask, **more)

    @torch.no_grad()
    def packed(self, rows: list[list[int]]) -> list[Tensor]:
        """Our outputs for rows laid end to end, as in training."""
        if self.task == "seq2seq-lm":
            return [self.own(torch.tensor([row]), torch.ones(1, len(row)))[0] for row in rows]
        out = self.ours(**packed(rows))
        return list(out) if len(out) == len(rows) else list(out[0].split([len(row) for row in rows]))

    def rows(self, texts: list[str]) -> list[list[int]]:
        """Token ids of the texts, by both tokenizers."""
        rows = [self.tokenizer.encode(text).ids for text in texts]
        assert rows == self.words(texts)["input_ids"], "the tokenizers differ"
        return rows

    def batch(self, texts: list[str], side: str) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, T), as transformers' tokenizer pads; where it has no pad token, by the model's, or by 0."""
        if self.words.pad_token is not None:
            out = self.words(texts, padding=True, padding_side=side, return_tensors="pt")
            return out["input_ids"], out["attention_mask"]
        rows = [torch.tensor(row) for row in self.rows(texts)]
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(rows, True, self.theirs.config.pad_token_id or 0, side)
        return ids, pad([torch.ones_like(row) for row in rows], True, 0, side)


def sentence_vectors(states: Tensor, mask: Tensor, rule: str) -> Tensor:
    """What sentence-transformers makes of states (B, T, D) by its pooling mode, at unit length."""
    real = mask[..., None].float()
    if rule == "mean_tokens":
        vectors = (states * real).sum(1) / real.sum(1).clamp(min=1e-9)
    elif rule == "max_tokens":
        vectors = states.masked_fill(real == 0, -1e9).amax(1)
    else:
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        vectors = states[torch.arange(len(states)), last]
    return torch.nn.functional.normalize(vectors, dim=-1)


def their_checkpoint(family: Family, task: str, padding: str, rule: str, folder: Path) -> Pair:
    """transformers stores a model, we load it."""
    words = tokenizer_of(family, padding)
    theirs = their_model(family, config_of(family, words), task)
    store(theirs, words, folder)
    if rule:
        tell_pooling(folder, rule)
    ours, tokenizer = load(folder, task, device="cpu")
    return Pair(family, task, theirs, ours, words, tokenizer, rule)


def our_checkpoint(family: Family, task: str, padding: str, rule: str, folder: Path) -> Pair:
    """We put the task's head on a pretrained model and store that; transformers loads it, tokenizer and all."""
    words = tokenizer_of(family, padding)
    config = config_of(family, words)
    store(their_model(family, config, family.base), words, folder / "base")
    if rule:
        tell_pooling(folder / "base", rule)
    labels = 3 if task in ("sequence-classification", "token-classification") else None
    ours, tokenizer = load(folder / "base", task, device="cpu", labels=labels)
    if ours.head_is_new:
        randomize(ours.head, seed=1)
    save(ours, tokenizer, folder / "ours")

    if rule:
        rule = told_pooling(folder / "ours")
    theirs = class_of(family, config, task).from_pretrained(folder / "ours").eval()
    words = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "ours")
    return Pair(family, task, theirs, ours, words, tokenizer, rule)


def tell_pooling(folder: Path, rule: str) -> None:
    """modules.json and 1_Pooling/config.json, as sentence-transformers writes them; vectors of unit length."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    kinds = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules]
    (folder / "modules.json").write_text(json.dumps(kinds), encoding="utf-8")
    (folder / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{mode}": mode == rule for mode in (*POOLINGS, "cls_token")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes), encoding="utf-8")


def told_pooling(folder: Path) -> str:
    """The pooling mode that a folder says."""
    modes = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    return next(name.removeprefix("pooling_mode_") for name, on in modes.items() if on is True)


def adapter_base(family: Family, words: Any, folder: Path) -> None:
    """What adapters stand on: a language model, where all of a classifier above it is a head that PEFT stores."""
    config = config_of(family, words)
    decoder = family.base == "causal-lm" and family.kind != "xlnet"
    store(their_model(family, config, family.base if decoder else "sequence-classification"), words, folder)


def their_classifier(family: Family, folder: Path, pad_id: int | None) -> Any:
    """transformers' classifier on the base at `folder`; its pad id, where it has none, is what ours came to."""
    model = AUTO["sequence-classification"].from_pretrained(folder, num_labels=3).eval()
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_id
    return model


def our_adapter(family: Family, task: str, padding: str, rule: str, folder: Path) -> Pair:
    """We store an adapter with its head, and PEFT loads it onto the base."""
    words = tokenizer_of(family, padding)
    adapter_base(family, words, folder / "base")
    ours, tokenizer = load(folder / "base", task, device="cpu", labels=3)
    add_lora(ours, LoRAConfig(rank=2, alpha=4, targets="mlp" if family.kind == "xlnet" else "all-linear"))
    ours.head.requires_grad_(True)
    for seed, (_, parameter) in enumerate(item for item in ours.named_parameters() if item[1].requires_grad):
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.2
    save_adapter(ours, folder / "ours")

    theirs = their_classifier(family, folder / "base", ours.tokens.config_pad_id)
    theirs = peft.PeftModel.from_pretrained(theirs, folder / "ours").eval()
    return Pair(family, task, theirs, ours, words, tokenizer)


def their_adapter(family: Family, task: str, padding: str, rule: str, folder: Path) -> Pair:
    """PEFT stores an adapter with its head, and we load it onto the base."""
    words = tokenizer_of(family, padding)
    adapter_base(family, words, folder / "base")
    ours, tokenizer = load(folder / "base", task, device="cpu", labels=3)
    heads = {"t5": ["classification_head"], "xlnet": ["sequence_summary", "logits_proj"]}.get(family.kind)
    # PEFT takes DistilBERT's pre_classifier for a head, too, and can't adapt it.
    targets = {"xlnet": r".*layer_[12]", "distilbert": r".*lin[12]?"}.get(family.kind, "all-linear")
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=targets, modules_to_save=heads)
    theirs = peft.get_peft_model(their_classifier(family, folder / "base", ours.tokens.config_pad_id), settings).eval()
    for seed, parameter in enumerate(p for p in theirs.parameters() if p.requires_grad):
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.2
    theirs.save_pretrained(folder / "theirs")
    load_adapter(ours, folder / "theirs")
    return Pair(family, task, theirs, ours, words, tokenizer)
