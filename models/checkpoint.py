"""`load` and `save`: checkpoints in Hugging Face layout, from a folder or from the hub.

A model says how its parameters are published (`key_map`); here the tensors are found, checked and copied straight into
their rows. Nothing is guessed: a tensor that is missing, left over or of another shape is an error that lists it. The
exceptions are few and said: a task's head that the checkpoint lacks is initialised and announced, and the heads of
other tasks and constant buffers are skipped.
"""

import json
import logging
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kernels import Linear
from .bert import Bert
from .gpt2 import GPT2
from .heads import n_outputs
from .layers import Published
from .llama import Llama
from .pooling import read_pooling, write_pooling
from .shards import Shards, read_json
from .tokens import SpecialTokens, load_tokenizer, load_tokenizer_file, save_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger("handtune")

Model = GPT2 | Bert | Llama
Family = type[Model]
FAMILIES: dict[str, Family] = {"gpt2": GPT2, "gpt3": GPT2, "bert": Bert, "llama": Llama}
HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "vocab.txt", "merges.txt")


def load(
    path: str | Path,
    task: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    labels: list[str] | tuple[str, ...] | int | None = None,
    *,
    head_layers: int | None = None,
) -> tuple[Model, "Tokenizer | None"]:
    """The model at `path` (a folder in Hugging Face layout, or a hub id) in eval mode, and its tokenizer or None.

    `task`: one of the tasks of `models/heads.py`; None takes it from config.json's `architectures`. `dtype`: "auto" is
    the checkpoint's own (fp16 becomes fp32 on a CPU). `device`: "auto" is CUDA where there is one. `labels`: names, or
    their number, for a task that classifies. `head_layers`: depth of the head. A stored head of another task, another
    number of labels or another depth than asked for is made anew.

    Raises FileNotFoundError for a missing folder or config.json, ValueError for everything that doesn't fit.
    """
    folder = _folder(path)
    published = read_json(folder / "config.json")
    family = _family(published, folder)
    shards = Shards(folder)
    config = _config(published, family, shards)
    task = task or _task_of(published, family, folder)
    known, stored_depth = _stored_head(published, family, folder)
    names = () if task == "reward" else _label_names(labels, known)
    depth = stored_depth if head_layers is None else head_layers
    pooling, normalize = read_pooling(folder) if task == "embedding" else ("mean", False)
    with torch.device("meta"):
        model = family(config, task, names, depth, pooling, normalize)
    model.to(_dtype(dtype, published, shards, target := _device(device)))
    model.to_empty(device=target)
    model.tie()
    _fill(model, shards, new_head=depth != stored_depth or not _reusable_head(model, published, len(known)))
    model.tokens = SpecialTokens.read(folder, published)
    model.eval()
    return model, load_tokenizer(folder)


def fresh(
    preset: str, tokenizer: str | Path | None, task: str, labels: tuple[str, ...], seed: int, **overrides: Any
) -> tuple[Model, "Tokenizer | None"]:
    """A freshly initialised model of a published size, on the default device, with the tokenizer.json at `tokenizer`.

    The vocabulary is the tokenizer's; its token "<|endoftext|>" or "</s>", where it has one, ends texts.
    """
    families = dict.fromkeys(FAMILIES.values())
    found = [family for family in families if preset in family.presets]
    if not found:
        known = ", ".join(name for family in families for name in family.presets)
        raise ValueError(f"preset {preset!r} is unknown; known: {known}")
    words = load_tokenizer_file(Path(tokenizer)) if tokenizer is not None else None
    if words is not None:
        overrides = {"vocab_size": words.get_vocab_size(), **overrides}
    torch.manual_seed(seed)
    model = found[0].from_name(preset, task=task, labels=labels, **overrides).to(_device("auto"))
    if words is not None:
        ends = [words.token_to_id(name) for name in ("<|endoftext|>", "</s>")]
        model.tokens = SpecialTokens(eos_id=next((i for i in ends if i is not None), None))
    return model.eval(), words


def save(model: Model, tokenizer: "Tokenizer | None", path: str | Path) -> None:
    """Write the model (and tokenizer) to the folder `path` in Hugging Face layout; transformers loads it back.

    Raises ValueError where an adapter is attached and not merged: it would be lost silently. And where a weight is
    quantised: what it was is lost already.
    """
    from safetensors.torch import save_file

    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.quantized is not None:
            raise ValueError(
                f"{name} is quantised to 4 bits: save_adapter(model, path), load the base in bfloat16 and save that"
            )
        if len(getattr(module, "lora", ())) and not getattr(module, "merged", None):
            raise ValueError(
                f"{name} carries an adapter: merge_lora(model) first, or save_adapter(model, path) instead"
            )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    own = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    for key, source in model.key_map().items():
        blocks = own[key].detach().split(source.rows) if source.rows else (own[key].detach(),)
        for name, block in zip(source.names, blocks, strict=True):
            tensors[name] = source.theirs(block).cpu()
    config = {**model.write_config(), **_task_config(model)}
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    config = {**config, **model.tokens.to_config(), "dtype": dtype}
    temporary = folder / "model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if model.task == "embedding":
        write_pooling(folder, model.pooling, bool(model.head.normalize), model.config.d_model)
    save_tokenizer(tokenizer, model.tokens, folder)


def _folder(path: str | Path) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded (or found in the hub's cache) first."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return _with_config(folder)
    if folder.exists():
        raise ValueError(f"{folder} is a file; give the checkpoint's folder")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path)):
        raise FileNotFoundError(f"{folder}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(str(path), allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(f"{path}: no such folder, and the hub did not give it ({reason})") from error
    return _with_config(folder)


def _with_config(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json there; a checkpoint folder in Hugging Face layout has one")
    return folder


def _family(published: dict[str, Any], folder: Path) -> Family:
    kind = published.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{folder / 'config.json'}: model_type {kind!r} is not an architecture of handtune ({known})")
    family = FAMILIES[kind]
    for field, accepted in family.required.items():
        if field in published and published[field] not in accepted:
            raise ValueError(f"{folder / 'config.json'}: {field} = {published[field]!r} is not implemented")
    return family


def _task_of(published: dict[str, Any], family: Family, folder: Path) -> str:
    names = published.get("architectures") or []
    if published.get("handtune_task") in family.architectures:
        return published["handtune_task"]
    for task, name in family.architectures.items():
        if name in names or (task == "masked-lm" and "BertForPreTraining" in names):
            return task
    tasks = ", ".join(family.architectures)
    raise ValueError(f"{folder / 'config.json'}: architectures {names} names no known task; pass task= one of {tasks}")


def _config(published: dict[str, Any], family: Family, shards: Shards) -> Any:
    """The configuration; where it doesn't say whether it is tied, a language model without output matrix is."""
    language_model = family.architectures.get("causal-lm") in (published.get("architectures") or ())
    if language_model and published.get("tie_word_embeddings") is None and "lm_head.weight" not in shards.names():
        published = {**published, "tie_word_embeddings": True}
    try:
        return family.read_config(published)
    except ValueError as error:
        raise ValueError(f"{shards.folder / 'config.json'}: {error}") from error


def _stored_head(published: dict[str, Any], family: Family, folder: Path) -> tuple[tuple[str, ...], int]:
    """Label names and depth of the head that is there. transformers leaves out the table of two unnamed labels."""
    table, depth = published.get("id2label"), published.get("head_layers", 1)
    names = {family.architectures[task] for task in ("sequence-classification", "token-classification")}
    if table is None and names & set(published.get("architectures") or ()):
        table = {i: f"LABEL_{i}" for i in range(published.get("num_labels", 2))}
    try:
        return tuple(str(table[key]) for key in sorted(table, key=int)) if table else (), int(depth)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: id2label or head_layers is damaged ({error})") from error


def _label_names(labels: list[str] | tuple[str, ...] | int | None, known: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(labels, int):
        if labels < 1:
            raise ValueError(f"labels {labels}: expected names, or a positive number")
        labels = [str(i) for i in range(labels)]
    if isinstance(labels, str) or len(set(labels or ())) != len(labels or ()):
        raise ValueError(f"labels {labels!r}: expected different names, or their number")
    return tuple(labels or known)


def _reusable_head(model: Model, published: dict[str, Any], width: int) -> bool:
    """Whether the stored head, `width` labels wide, is this task's: heads of several tasks go by the same name."""
    stored = published.get("architectures")
    if stored and model.architectures[model.task] not in stored:
        return False
    return model.task not in ("sequence-classification", "token-classification", "reward") or width == n_outputs(
        model.task, model.labels
    )


def _device(device: str | torch.device) -> torch.device:
    usable = torch.cuda.is_available()
    try:
        found = torch.device(("cuda" if usable else "cpu") if device == "auto" else device)
    except RuntimeError as error:
        raise ValueError(f'device {device!r}: expected "auto", "cpu" or "cuda"') from error
    if found.type == "cuda" and not usable:
        raise ValueError(f'device {device!r}: torch finds no CUDA here; use "cpu" or "auto"')
    return found


def _dtype(dtype: str | torch.dtype, published: dict[str, Any], shards: Shards, device: torch.device) -> torch.dtype:
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in names:
            raise ValueError(f'dtype {dtype!r}: expected "auto", {", ".join(names)}')
        return names[dtype]
    stored = str(published.get("dtype") or published.get("torch_dtype") or "auto").removeprefix("torch.")
    if stored not in (*names, "auto"):
        raise ValueError(f"{shards.folder / 'config.json'}: dtype = {stored!r} is not implemented; pass dtype=")
    found = shards.dtype() if stored == "auto" else names[stored]
    return torch.float32 if found == torch.float16 and device.type == "cpu" else found


def _task_config(model: Model) -> dict[str, Any]:
    out: dict[str, Any] = {"architectures": [model.architectures[model.task]]}
    if model.task == "reward":
        out |= {"handtune_task": "reward", "num_labels": 1}
    if model.head_layers > 1:
        out["head_layers"] = model.head_layers
    if model.labels:
        out["id2label"] = {str(i): name for i, name in enumerate(model.labels)}
        out["label2id"] = {name: i for i, name in enumerate(model.labels)}
    return out


def _canonical(name: str, prefix: str | tuple[str, ...]) -> str:
    """A published name without the base prefix (one word) and in today's spelling, so that all variants meet."""
    name = name.partition(".")[2] if name.startswith(prefix) else name
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name))


@torch.no_grad()
def _fill(model: Model, shards: Shards, new_head: bool) -> None:
    """Copy every parameter from the shards into its rows; make the head where it is not there."""
    stored = {_canonical(name, model.base_prefix): name for name in shards.names()}
    own = dict(model.named_parameters())
    model.initialize_head()
    missing: list[str] = []
    misshaped: list[str] = []
    head_missing: list[str] = []
    used: set[str] = set()
    for key, source in model.key_map().items():
        names = [_canonical(name, model.base_prefix) for name in source.names]
        used.update(names)
        if new_head and key.startswith(("head.out.", "head.hidden.")):
            head_missing += names
            continue
        for name, rows in zip(names, _row_blocks(own[key], source), strict=True):
            if name not in stored:
                (head_missing if key.startswith("head.") else missing).append(name)
                continue
            tensor = source.ours(shards.tensor(stored[name]))
            if tensor.shape != rows.shape:
                misshaped.append(f"{stored[name]} {tuple(tensor.shape)}, expected {tuple(rows.shape)}")
            else:
                rows.copy_(tensor)
    skipped = (*model.ignored, *model.other_heads)
    left = [
        name for short, name in stored.items() if short not in used and not any(fnmatchcase(short, p) for p in skipped)
    ]
    _complain(shards.folder, {"missing": missing, "left over": left, "of another shape": misshaped})
    if model.task == "causal-lm" and model.config.tied and "lm_head.weight" in stored:
        _refuse_another_head(shards.tensor(stored["lm_head.weight"]), model, shards.folder)
    model.head_is_new = bool(head_missing)
    if head_missing:
        log.warning("new, to be trained, for %s: %s", model.task, ", ".join(sorted(head_missing)))


def _refuse_another_head(stored: Tensor, model: Model, folder: Path) -> None:
    """ValueError where a tied model comes with an output matrix that isn't its embedding: which is meant, who knows."""
    if not torch.equal(stored.to(model.embed.tokens.weight), model.embed.tokens.weight):
        raise ValueError(
            f"{folder}: lm_head.weight is not the token embedding, but config.json has tie_word_embeddings = true; "
            "set it to false, or take the tensor out"
        )


def _row_blocks(parameter: nn.Parameter, source: Published) -> tuple[Tensor, ...]:
    return parameter.data.split(source.rows) if source.rows else (parameter.data,)


def _complain(folder: Path, problems: dict[str, list[str]]) -> None:
    parts = []
    for what, names in problems.items():
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            parts.append(f"{len(names)} {what}: {', '.join(names[:8])}{more}")
    if parts:
        raise ValueError(f"{folder}: the weights don't fit config.json; {'; '.join(parts)}")
