"""What lies beside the weights: end tokens, tokenizer files, templates; what is asked of the hub; writing safely."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_kills import killed_everywhere
from small_models import padded, theirs, tiny_gpt2, tiny_llama, token_rows
from small_tokenizers import byte_level, word_piece
from transformers import AutoModelForCausalLM, AutoTokenizer

from handtune.engine import generate
from handtune.engine.generation.completions import completions
from handtune.models import load, save
from handtune.models.tokenizer.special_tokens import load_tokenizer
from handtune.models.tokenizer.token_names import read_settings

TEXTS = ["The cat sat on the mat.", "<|end|> a<|im_start|>user <tool>x <extra>", " hello\n"]


def edit(folder: Path, name: str = "config.json", **fields: Any) -> None:
    """Change a JSON file, which may be new; a field of None becomes null."""
    path = folder / name
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **fields}))


def field(folder: Path, name: str, file: str = "config.json") -> Any:
    return json.loads((folder / file).read_text()).get(name)


def language_model(folder: Path, vocab_size: int = 61, **overrides: Any) -> Any:
    """transformers' tiny GPT-2, saved in `folder`, whose strong positions keep it from repeating one token."""
    reference = theirs(tiny_gpt2(vocab_size=vocab_size, **overrides), "causal-lm")
    with torch.no_grad():
        reference.transformer.wpe.weight *= 8
    reference.save_pretrained(folder)
    return reference


# Tokens that end a text


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ([7, 9, 11], None, (7, 9, 11)),
        ([7, 9, 11], [7, 9, 11], (7, 9, 11)),
        (7, [9, 7], (7, 9)),
        (7, None, (7,)),
        ([7], None, (7,)),
        (None, 9, (9,)),
        ([], None, ()),
        (-1, None, ()),
    ],
)
def test_every_end_token_is_known_and_kept(tmp_path, config, generation, ends):
    language_model(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").unlink()
    edit(tmp_path / "base", eos_token_id=config)
    if generation is not None:
        edit(tmp_path / "base", "generation_config.json", eos_token_id=generation, temperature=0.6)
    model, _ = load(tmp_path / "base", device="cpu")
    assert (model.tokens.ends, model.tokens.eos_id) == (ends, ends[0] if ends else None)
    save(model, None, tmp_path / "ours")
    assert field(tmp_path / "ours", "eos_token_id") == (list(ends) if len(ends) > 1 else ends[0] if ends else None)
    assert load(tmp_path / "ours", device="cpu")[0].tokens == model.tokens
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").generation_config
    if generation is not None:
        assert (back.eos_token_id, back.temperature) == (field(tmp_path / "ours", "eos_token_id"), 0.6)
    elif len(ends) > 1:
        assert back.eos_token_id == list(ends)


@pytest.mark.parametrize("value", ["</s>", [7, "</s>"], True, 7.0])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_ids_that_are_none_are_one_line(tmp_path, file, value):
    language_model(tmp_path)
    edit(tmp_path, file, eos_token_id=value)
    with pytest.raises(ValueError, match=rf"{file}: eos_token_id = .*: expected a token's id, or a list of ids"):
        load(tmp_path, device="cpu")


def test_a_padding_id_below_zero_is_none(tmp_path):
    theirs(tiny_llama(), "causal-lm").save_pretrained(tmp_path / "base")
    for name in ("config.json", "generation_config.json"):
        edit(tmp_path / "base", name, pad_token_id=-1, bos_token_id=-1)
    model, _ = load(tmp_path / "base", device="cpu")
    assert (model.tokens.pad_id, model.tokens.bos_id) == (None, None)
    save(model, None, tmp_path / "ours")
    assert field(tmp_path / "ours", "pad_token_id") is None


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_generation_stops_at_any_of_them_as_in_transformers(tmp_path, beams):
    reference = language_model(tmp_path)
    model, _ = load(tmp_path, device="cpu")
    inputs = padded(token_rows((5, 1, 9, 3)), "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    new = generate(model, ids, mask, 20, temperature=0)[:, 9:].tolist()
    # For each of two rows the first token, from the fourth on, that no other row has.
    others = [{token for j, row in enumerate(new) if j != i for token in row} for i in range(4)]
    own = [next((token for token in row[3:] if token not in others[i]), None) for i, row in enumerate(new)]
    ends = [token for token in own if token is not None][:2]
    assert len(ends) == 2
    ours = generate(model, ids, mask, 20, temperature=0, eos_id=ends, pad_id=3, beams=beams)
    reference.generation_config.eos_token_id = ends
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 3, "num_beams": beams}
    assert ours.tolist() == reference.generate(input_ids=ids, attention_mask=mask, **settings).tolist()
    if beams == 1:
        assert all(any(end in row for row in ours[:, 9:].tolist()) for end in ends)
        unpadded = generate(model, ids, mask, 20, temperature=0, eos_id=ends)  # then the first of them pads
        assert unpadded[ours != unpadded].eq(ends[0]).all() and ours[ours != unpadded].eq(3).all()


def test_a_completion_ends_at_the_first_of_them(tmp_path):
    words = byte_level()
    language_model(tmp_path, words.get_vocab_size())
    words.save(str(tmp_path / "tokenizer.json"))
    model, words = load(tmp_path, device="cpu")
    prompts = ["The cat sat", "hello"]
    free = [
        generate(model, torch.tensor([words.encode(prompt).ids]), max_new_tokens=12, temperature=0)[0].tolist()
        for prompt in prompts
    ]
    new = [row[len(words.encode(prompt).ids) :] for row, prompt in zip(free, prompts, strict=True)]
    edit(tmp_path, "generation_config.json", eos_token_id=[new[0][5], new[1][3]])
    model, words = load(tmp_path, device="cpu")
    cuts = [min(row.index(end) for end in model.tokens.ends if end in row) for row in new]
    expected = [words.decode(row[:cut]) for row, cut in zip(new, cuts, strict=True)]
    assert list(completions(model, words, prompts, 12, temperature=0)) == expected


# Tokenizer files


def lay(folder: Path, **files: Any) -> Path:
    """A checkpoint with a byte-level tokenizer.json and these files; a text is one, everything else JSON."""
    language_model(folder, 600)
    byte_level().save(str(folder / "tokenizer.json"))
    for name, value in {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}, **files}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def assert_same_tokenizer(first: Path, second: Path) -> Any:
    """AutoTokenizer makes the same of both folders."""
    a, b = (AutoTokenizer.from_pretrained(folder) for folder in (first, second))
    assert type(a) is type(b)
    for name in ("special_tokens_map", "all_special_ids", "added_tokens_decoder", "chat_template", "padding_side"):
        assert str(getattr(a, name)) == str(getattr(b, name)), name
    assert a.get_vocab() == b.get_vocab() and a.model_max_length == b.model_max_length
    for text in TEXTS:
        assert a(text)["input_ids"] == b(text)["input_ids"]
        assert a.decode(a(text)["input_ids"], skip_special_tokens=True) == b.decode(
            b(text)["input_ids"], skip_special_tokens=True
        )
    return b


SIDES = {
    "special tokens of their own file": {
        "special_tokens_map.json": {"eos_token": "<|end|>", "pad_token": {"content": "<|im_end|>", "lstrip": True}}
    },
    "added tokens": {
        "special_tokens_map.json": {"eos_token": "<|end|>", "additional_special_tokens": ["<tool>"]},
        "added_tokens.json": {"<tool>": 500, "<extra>": 501},
    },
    "several templates": {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "padding_side": "left",
            "chat_template": [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}],
        }
    },
    "several template files": {
        "chat_template.jinja": "{{ 1 }}\n",
        "additional_chat_templates/rag.jinja": "{{ 3 }}",
    },
    "settings": {
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": 77,
            "add_prefix_space": True,
            "eos_token": "<|end|>",
            "unk_token": "<|end|>",
            "bos_token": "<|end|>",
        }
    },
}


@pytest.mark.parametrize("files", SIDES.values(), ids=SIDES)
def test_transformers_makes_the_same_tokenizer_of_what_is_saved(tmp_path, files):
    folder = lay(tmp_path / "base", **files)
    model, words = load(folder, device="cpu")
    save(model, words, tmp_path / "ours")
    found = assert_same_tokenizer(folder, tmp_path / "ours")
    for name, value in files.items():
        if name in ("special_tokens_map.json", "added_tokens.json"):
            assert json.loads((tmp_path / "ours" / name).read_text()) == value
    if "tokenizer_config.json" not in files and "special_tokens_map.json" in files:
        assert found.eos_token == "<|end|>"
    again, words = load(tmp_path / "ours", device="cpu")
    assert again.tokens.chat_template == model.tokens.chat_template
    save(again, words, tmp_path / "third")
    assert_same_tokenizer(folder, tmp_path / "third")


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "BertTokenizer"])
def test_a_tokenizer_of_vocabulary_files_keeps_them(tmp_path, kind):
    folder = tmp_path / "base"
    language_model(folder, 600)
    (byte_level() if kind == "GPT2Tokenizer" else word_piece()).model.save(str(folder))
    special = {"eos_token": "<|end|>", "unk_token": "<|end|>", "bos_token": "<|end|>"} if kind[0] == "G" else {}
    edit(folder, "tokenizer_config.json", tokenizer_class=kind, **special)
    names = {path.name for path in folder.glob("vocab.*")} | {path.name for path in folder.glob("merges.txt")}
    size = load_tokenizer(folder, read_settings(folder, {})).get_vocab_size()
    edit(folder, "added_tokens.json", **{"<tool>": size, "<extra>": size + 1})
    model, words = load(folder, device="cpu")
    save(model, words, tmp_path / "ours")
    assert_same_tokenizer(folder, tmp_path / "ours")
    assert names and all((tmp_path / "ours" / n).read_bytes() == (folder / n).read_bytes() for n in names)
    save(model, None, tmp_path / "none")  # from which none must be built
    assert not any((tmp_path / "none" / name).exists() for name in names)
    assert load(tmp_path / "none", device="cpu")[1] is None


def test_a_refused_tokenizer_is_noticed_before_the_weights_are_read(tmp_path, monkeypatch):
    language_model(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"x")
    read = []
    monkeypatch.setattr("handtune.models.checkpoint.local_rows.read_into", lambda *_: read.append(1))
    with pytest.raises(ValueError, match=r"spiece.model: a sentencepiece model is not read"):
        load(tmp_path, device="cpu")
    assert not read


def test_a_sentencepiece_model_beside_a_tokenizer_is_none_of_our_business(tmp_path):
    folder = lay(tmp_path / "base")
    (folder / "tokenizer.model").write_bytes(b"\x00\xff")
    model, words = load(folder, device="cpu")
    assert words.encode(TEXTS[0]).ids == byte_level().encode(TEXTS[0]).ids
    save(model, words, tmp_path / "ours")
    assert (tmp_path / "ours" / "tokenizer.model").read_bytes() == b"\x00\xff"


@pytest.mark.parametrize("name", ["cls_token", "sep_token"])
def test_a_frame_without_one_of_its_tokens(tmp_path, name):
    word_piece().model.save(str(tmp_path))
    edit(tmp_path, "tokenizer_config.json", tokenizer_class="BertTokenizer", **{name: None})
    with pytest.raises(ValueError, match=rf"tokenizer_config.json: {name} = None: a text needs it"):
        load_tokenizer(tmp_path, read_settings(tmp_path, {}))


# The hub


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A repository of the hub as a folder: only what is asked for is downloaded, everything is listed."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    folder, cache = tmp_path / "repository", tmp_path / "cache"
    language_model(folder)

    def names() -> list[str]:
        return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]

    def download(_: str, **patterns: list[str]) -> str:
        for name in filter_repo_objects(names(), **patterns):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda _: names())
    return folder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.ckpt"])
def test_a_repository_of_pickles_is_named_as_a_folder_is(repository, name):
    (repository / "model.safetensors").rename(repository / name)
    with pytest.raises(ValueError, match=rf"^some/model/{name}: a pickle checkpoint can run code .* convert it") as hub:
        load("some/model", device="cpu")
    with pytest.raises(ValueError, match="a pickle") as local:
        load(repository, device="cpu")
    assert str(local.value).removeprefix(f"{repository}/") == str(hub.value).removeprefix("some/model/")


def test_a_repository_without_weights(repository, monkeypatch):
    (repository / "model.safetensors").rename(repository / "model.gguf")
    with pytest.raises(FileNotFoundError, match="the weights are missing"):
        load("some/model", device="cpu")

    def fail(_: str) -> None:
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.list_repo_files", fail)
    with pytest.raises(FileNotFoundError, match="the weights are missing"):
        load("some/model", device="cpu")


def test_a_repository_with_a_sentencepiece_model_only(repository):
    (repository / "spiece.model").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"spiece.model: a sentencepiece model is not read, and there is no tokenizer"):
        load("some/model", device="cpu")
    byte_level().save(str(repository / "tokenizer.json"))
    assert load("some/model", device="cpu")[1] is not None


# Writing and dtypes


@pytest.mark.deep
def test_a_folder_is_replaced_whole(tmp_path):
    """Killed at any operation, a save leaves the old model, the new one, or none: never a mixture that loads."""
    files = {"special_tokens_map.json": {"eos_token": "<|end|>"}, "chat_template.jinja": "{{ 1 }}"}
    model, words = load(lay(tmp_path / "base", **files), device="cpu")
    new, out = load(tmp_path / "base", device="cpu")[0], tmp_path / "ours"
    new.tokens = replace(new.tokens, chat_template="{{ 2 }}")
    torch.nn.init.zeros_(new.layers[0].qkv.weight)
    seen = []

    def check(n):
        if (out / "config.json").is_file():
            is_new = load(out, device="cpu")[0].tokens.chat_template == "{{ 2 }}"
            assert is_new == (not load(out, device="cpu")[0].layers[0].qkv.weight.any())
            seen.append(is_new)
        save(model, words, out)
        assert not list(out.rglob(".*"))  # what the killed one left has been used up

    save(model, words, out)
    assert killed_everywhere(lambda: save(new, words, out), check) > 40
    assert seen == sorted(seen)
    assert set(seen) == {False, True}


def test_weights_of_eight_bits_without_a_dtype(tmp_path):
    language_model(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(path).items()}, path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    with pytest.raises(ValueError, match=r'model.safetensors: .* stored as torch.float8_e4m3fn, .* pass dtype="bfl'):
        load(tmp_path, device="cpu")
    assert load(tmp_path, dtype="bfloat16", device="cpu")[0].embed.tokens.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype torch.float8_e4m3fn: expected float32, bfloat16, float16 or float64"):
        load(tmp_path, dtype=torch.float8_e4m3fn, device="cpu")


def test_a_special_token_of_another_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ["x"]}')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: \['x'\] is no token"):
        read_settings(tmp_path, {})
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "chat_template": "x"}')
    (tmp_path / "special_tokens_map.json").write_text('{"extra_special_tokens": 7}')
    with pytest.raises(ValueError, match=r"special_tokens_map\.json: extra_special_tokens"):
        read_settings(tmp_path, {})
