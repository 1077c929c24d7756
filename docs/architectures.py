"""What each architecture is made of, in one table: docs/architectures.md.

    python docs/architectures.py            # writes the page

Which norms there are, whether key/value heads are shared, whether the feed-forward is gated and whether the output
matrix is the embedding is read off the models and their published sizes; what can't be read off stands in `STATED`.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the package from a bare clone

import torch
from torch import nn

from handtune.kernels import LayerNorm, RMSNorm
from handtune.models.families import FAMILIES
from handtune.models.gemma.block import Norm
from handtune.models.resnet.model import BatchNorm

PAGE = Path(__file__).resolve().parent / "architectures.md"


class Stated(NamedTuple):
    """Of the published models: where norms stand, and so on; `attention` beyond sharing heads; the tokenizer's kind."""

    norms: str
    position: str
    attention: str
    activation: str
    tokenizer: str


PRE = "in front of each sub-layer"
BEHIND = "behind the sum"
ROTARY = "rotary"
CAUSAL = "causal"
BOTH = "both directions"
BYTES = "byte-level BPE"
PIECES = "SentencePiece"
WORDS = "WordPiece"
FAIRSEQ = "learned, counted from behind the pad token"
STATED = {
    "gpt2": Stated(PRE, "learned", CAUSAL, "GELU (tanh)", BYTES),
    "gpt3": Stated(PRE, "learned", f"{CAUSAL}, every other layer within a band", "GELU (tanh)", BYTES),
    "bloom": Stated(f"{PRE}, behind the embedding", "ALiBi", CAUSAL, "GELU (tanh)", BYTES),
    "llama": Stated(PRE, ROTARY, CAUSAL, "SiLU", f"{PIECES}; from Llama 3 on {BYTES}"),
    "mistral": Stated(PRE, ROTARY, f"{CAUSAL}, some versions in a window", "SiLU", PIECES),
    "qwen2": Stated(PRE, ROTARY, CAUSAL, "SiLU", BYTES),
    "qwen3": Stated(f"{PRE}, on heads of q and k", ROTARY, CAUSAL, "SiLU", BYTES),
    "smollm3": Stated(PRE, "rotary, none in every fourth layer", CAUSAL, "SiLU", BYTES),
    "gemma2": Stated(
        "on both sides of each sub-layer", ROTARY, f"{CAUSAL}, every other layer in a window; soft-capped",
        "GELU (tanh)", PIECES,
    ),
    "gemma3_text": Stated(
        "on both sides of each sub-layer, on heads of q and k", "rotary, with two bases",
        f"{CAUSAL}, five of six layers in a window; as an embedder in {BOTH}", "GELU (tanh)", PIECES,
    ),
    "phi3": Stated(
        PRE, "rotary, in some sizes on a part of each head", f"{CAUSAL}, some sizes in a window", "SiLU",
        f"{PIECES}; of Phi-4 {BYTES}",
    ),
    "olmo2": Stated("behind each sub-layer, on all of q and k", ROTARY, CAUSAL, "SiLU", BYTES),
    "olmo3": Stated(
        "behind each sub-layer, on all of q and k", ROTARY, f"{CAUSAL}, three of four layers in a window", "SiLU",
        BYTES,
    ),
    "bert": Stated(BEHIND, "learned", BOTH, "GELU", WORDS),
    "distilbert": Stated(BEHIND, "learned", BOTH, "GELU", WORDS),
    "roberta": Stated(BEHIND, FAIRSEQ, BOTH, "GELU", BYTES),
    "xlm-roberta": Stated(BEHIND, FAIRSEQ, BOTH, "GELU", PIECES),
    "camembert": Stated(BEHIND, FAIRSEQ, BOTH, "GELU", PIECES),
    "mpnet": Stated(BEHIND, f"{FAIRSEQ}; a bias by distance", BOTH, "GELU", WORDS),
    "modernbert": Stated(
        PRE, "rotary, with two bases", f"{BOTH}, two of three layers in a window", "GELU", BYTES,
    ),
    "t5": Stated(
        PRE, "a bias by distance", f"{BOTH}; the decoder {CAUSAL}, and across", "ReLU; v1.1 GELU (tanh)", PIECES,
    ),
    "xlnet": Stated(BEHIND, "relative, in the scores", "in any order of the tokens", "GELU", PIECES),
    "resnet": Stated("behind each convolution", "", "", "ReLU", ""),
    "vit": Stated(PRE, "learned", BOTH, "GELU", ""),
    "dinov2": Stated(PRE, "learned, interpolated", BOTH, "GELU; of the giant SiLU", ""),
}  # fmt: skip
# Rows of their own would say the same.
ALIKE = {"resnet_small": "resnet", "dinov2_with_registers": "dinov2"}
NORMS = {LayerNorm: "LayerNorm", RMSNorm: "RMSNorm", Norm: "RMSNorm by 1 + w", BatchNorm: "BatchNorm"}
HEAD = ("model_type", "norm", "position", "attention", "feed-forward", "output matrix", "tokenizer", "file")


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """docs/architectures.md."""
    lines = [f"| {' | '.join(row)} |" for row in (HEAD, ["---"] * len(HEAD), *rows())]
    return (
        "# The architectures, part by part\n\n"
        "This page is written by `python docs/architectures.py`. A checkpoint's `model_type` stands in its\n"
        "config.json. What each family computes stands in formulas at the head of its file.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def rows() -> Iterator[list[str]]:
    """A row for each model_type."""
    for model_type, family in FAMILIES.items():
        if model_type in ALIKE:
            continue
        sizes = published_sizes(model_type)
        models = [weightless(family, config) for config in sizes]
        stated = STATED[model_type]
        attention = f"{shared_heads(sizes)}{stated.attention}"
        gated = said_of({is_gated(model) for model in models}, "gated, ", "some gated, ")
        file = f"models/{family.__module__.partition('models.')[2].replace('.', '/')}.py"
        yield [
            f"`{model_type}`", f"{norms(models[0])}, {stated.norms}", stated.position, attention,
            f"{gated}{stated.activation}", output_matrix(family, sizes), stated.tokenizer, f"[`{file}`](../{file})",
        ]  # fmt: skip


def published_sizes(model_type: str) -> list[Any]:
    """The configurations of the published sizes that are of this type."""
    family = FAMILIES[model_type]
    configs = [family.config_class(**fields) for fields in family.presets.values()]
    return [config for config in configs if config.to_published()["model_type"] == model_type]


def weightless(family: Any, config: Any) -> nn.Module:
    """Its model, without memory for weights."""
    with torch.device("meta"):
        model: nn.Module = family(config, "embedding" if family.reads_images else None)
    return model


def norms(model: nn.Module) -> str:
    """The kinds of its norms; of LayerNorms without a bias that, too."""
    names = {NORMS[type(module)] for module in model.modules() if type(module) in NORMS}
    biases = {module.bias is not None for module in model.modules() if isinstance(module, LayerNorm)}
    return " and ".join(sorted(names)) + (" without a bias" if biases == {False} else "")


def said_of(answers: set[bool], of_all: str, of_some: str) -> str:
    """What is said where the answer is yes for all sizes, or for some; "" where it is for none."""
    if answers == {True}:
        return of_all
    return of_some if True in answers else ""


def shared_heads(sizes: list[Any]) -> str:
    """What is to be said in front of the rest about key/value heads that query heads share."""
    shares = {config.kv_heads < config.n_head for config in sizes if "n_kv_head" in vars(config)}
    return said_of(shares, "shared keys, ", "keys shared in some sizes, ")


def is_gated(model: nn.Module) -> bool:
    """Whether its feed-forwards are."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return "gate_up" in names


def output_matrix(family: Any, sizes: list[Any]) -> str:
    """Whether it is the token embedding."""
    if family.reads_images:
        return ""
    return said_of({config.tied for config in sizes}, "the embedding", "the embedding in some sizes") or "its own"


if __name__ == "__main__":
    main()
