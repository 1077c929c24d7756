"""What begins, ends and pads a text, whichever file says so: as transformers takes it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from project import ROOT
from small_models import both, theirs, tiny_llama, tiny_phi3
from small_tokenizers import byte_level, llama_like
from transformers import AutoModelForCausalLM, AutoTokenizer

from handtune.models import load, save
from handtune.models.tokenizer.special_tokens import SpecialTokens
from handtune.models.tokenizer.token_names import read_settings

FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
TABLE = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False, "single_word": False}
ADDED = {"1": {"content": "<s>", "special": True}, "2": {"content": "</s>", "special": True}}


def lay(folder: Path, **files: Any) -> Path:
    """A folder with a Llama-like tokenizer, and JSON files by their names without the suffix."""
    folder.mkdir(exist_ok=True)
    llama_like().save(str(folder / "tokenizer.json"))
    for name, contents in files.items():
        (folder / f"{name}.json").write_text(json.dumps(contents))
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": FAST | {"bos_token": "<s>", "eos_token": TABLE}},
        {"tokenizer_config": FAST, "special_tokens_map": {"bos_token": "<s>", "eos_token": "</s>"}},
        {"tokenizer_config": FAST | {"eos_token": "<s>"}, "special_tokens_map": {"eos_token": {"content": "</s>"}}},
        {
            "tokenizer_config": FAST | {"eos_token": "<s>", "added_tokens_decoder": ADDED},
            "special_tokens_map": {"eos_token": "</s>"},
        },
        {"tokenizer_config": FAST | {"eos_token": None, "bos_token": "<s>"}},
        {"tokenizer_config": {"tokenizer_class": "LlamaTokenizerFast"}},
        {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "eos_token": "<unk>", "bos_token": None}},
        {"tokenizer_config": FAST | {"image_token": "<unk>"}},
        {"tokenizer_config": FAST | {"extra_special_tokens": {"eot_token": "</s>"}}},
    ],
)
def test_names_are_those_of_transformers(files: dict[str, Any], tmp_path: Path) -> None:
    folder = lay(tmp_path, **files, config={"model_type": "llama"})
    assert (
        read_settings(folder, {"model_type": "llama"}).names == AutoTokenizer.from_pretrained(folder).special_tokens_map
    )


@pytest.mark.parametrize(
    ("config", "generation", "named", "ends"),
    [
        (2, None, "</s>", (2,)),
        (1, None, "</s>", (2, 1)),
        (1, [1, 2], "</s>", (2, 1)),
        (None, None, "</s>", (2,)),
        (1, 1, None, (1,)),
        (None, [1, 2], None, (1, 2)),
        (None, None, "<none>", ()),
    ],
)
def test_the_tokenizers_end_goes_first(config, generation, named, ends, tmp_path, caplog) -> None:
    """As transformers' Trainer aligns a model with its tokenizer; an end that the model doesn't know of is said."""
    files: dict[str, Any] = {"tokenizer_config": FAST | ({} if named is None else {"eos_token": named})}
    if generation is not None:
        files["generation_config"] = {"eos_token_id": generation}
    folder = lay(tmp_path, **files)
    tokens = SpecialTokens.read(folder, read_settings(folder, {}), {"eos_token_id": config}, llama_like())
    assert tokens.ends == ends
    listed = [config, generation, *(generation if isinstance(generation, list) else [])]
    unknown = named == "</s>" and 2 not in listed and any(number is not None for number in listed)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: its eos_token is '</s>' (2), but its model says 1; '</s>' is taken"
    ] * unknown


def test_a_template_knows_what_only_the_model_names(tmp_path: Path) -> None:
    """The end of a text; a beginning only where the tokenizer has one, as in transformers."""
    config = {"eos_token_id": 2, "bos_token_id": 1}
    folder = lay(tmp_path, tokenizer_config=FAST)
    assert SpecialTokens.read(folder, read_settings(folder, {}), config, llama_like()).names == {"eos_token": "</s>"}
    folder = lay(tmp_path, tokenizer_config=FAST | {"eos_token": None})
    assert (
        SpecialTokens.read(folder, read_settings(folder, {}), config, llama_like()).names == {}
    )  # null says that there is none


def test_one_more_end_is_stored_for_transformers(tmp_path: Path) -> None:
    theirs(tiny_llama(eos_token_id=2), "causal-lm").save_pretrained(tmp_path / "base")
    byte_level().save(str(tmp_path / "base/tokenizer.json"))
    model, tokenizer = load(tmp_path / "base", device="cpu")
    model.tokens = model.tokens.ending_with(5).ending_with(5)
    save(model, tokenizer, tmp_path / "ours")
    for name in ("config.json", "generation_config.json"):
        stored = json.loads((tmp_path / "ours" / name).read_text())
        assert stored["eos_token_id"][-1] == 5
        assert stored["eos_token_id"].count(5) == 1


def test_ids_that_there_are_none_of_are_null(tmp_path) -> None:
    """Left out, transformers would take the default of its configuration, of Phi-3 beyond the vocabulary."""
    both(tmp_path / "base", tiny_phi3(pad_token_id=None), "causal-lm")
    model, _ = load(tmp_path / "base", device="cpu")
    save(model, None, tmp_path / "ours")
    stored = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert stored["pad_token_id"] is None
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").config.pad_token_id is None


def test_nothing_else_reads_them() -> None:
    """Which tokens begin, end and pad a text is decided in three files of `models`; the rest asks `model.tokens`.

    RoBERTa counts positions from behind the pad id of its config.json, whatever pads a batch.
    """
    reads = re.compile(r"(bos|eos|pad)_token_id[\"']|[\"'](special_tokens_map|tokenizer_config)\.json[\"']")
    allowed = {f"models/tokenizer/{name}.py" for name in ("special_tokens", "token_names", "gguf_vocabulary")}
    allowed |= {"models/roberta.py"}
    files = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for room in ("engine", "models", "kernels", "handtune")
        for path in (ROOT / room).rglob("*.py")
    }
    assert {name for name, text in files.items() if reads.search(text)} - allowed == set()
