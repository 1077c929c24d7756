"""One of every kind of input that handtune reads, in one folder, and the commands that read it.

Paths are relative to that folder, so that a command can run in a copy of what it needs.
"""

import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from small_images import class_folders
from small_methods import RUNS, base_folder
from small_runs import CHAT, PAIRS, QUESTIONS, SENTIMENT, TAGGED, bert, write_config, write_rows
from small_tokenizers import byte_level, llama_like, word_piece

from handtune.engine import LoRAConfig, add_lora
from handtune.models import Bloom, Llama, XLNet, load, save
from handtune.saved_runs import store_adapter

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{{ tone }}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
JUDGES = """def short(prompts, completions):
    return [-len(text) / 20 for text in completions]


def left(prompt, left, right):
    return "left"
"""
COUNTED = {"epochs": 1, "max_steps": 1, "batch_size": 2}
TABLES = {  # files of rows that are no JSON lines, with the method that reads them
    "rows.csv": ("classify", 'text,label\n"the good, old book",up\nthe dog,down\nwelcome,up\nsat,down\n'),
    "rows.tsv": ("classify", "text\tlabel\nthe good book\tup\nthe dog\tdown\nwelcome\tup\nsat\tdown\n"),
    "bare.tsv": ("classify", "the good book\tup\nthe dog\tdown\nwelcome\tup\nsat\tdown\n"),
    "rows.conll": ("tag", "the O\ncat B-ANIMAL\nlooked O\n\nParis B-PLACE\nis O\n\nFrance B-PLACE\nis O\n"),
    "rows.txt": ("pretrain", "The cat sat on the mat, and the dog looked at the cat.\n" * 30),
}
DIALOGUES = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
    for row in CHAT
]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": row["prompt"]}, {"from": "gpt", "value": row["completion"]}]}
    for row in CHAT
]
TOOLS = [
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "good morning"}]},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "good"},
        ],
        "tools": [{"name": "f"}],
        "chat_template_kwargs": {"tone": "dry"},
    }
] * 2
ALPACA = [{"instruction": "who sat?", "input": "the cat", "output": "the cat"}] * 3
COMPARED = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no", "margin": 0.5, "tie": False}
    for row in CHAT
]
# Rows of one shape each, with the method that reads them.
ROWS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "dialogues": ("sft", DIALOGUES), "sharegpt": ("sft", SHAREGPT), "tools": ("sft", TOOLS), "alpaca": ("sft", ALPACA),
    "compared": ("reward", COMPARED), "sentiment": ("classify", SENTIMENT[::4]), "tagged": ("tag", TAGGED),
    "questions": ("qa", QUESTIONS), "anchors": ("embed", PAIRS),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A command, what of the folder it needs, and which files to change; `weight`: how often it is drawn.

    The command may be `load FOLDER`, or `load_adapter MODEL ADAPTER`: those functions. `names_numbers`: whether NaN in
    its tensors is named; a checkpoint's are refused by their checksum.
    """

    name: str
    command: Sequence[str]
    needs: Sequence[str]
    targets: Sequence[str]
    weight: float = 1.0
    names_numbers: bool = True


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def make(folder: Path, main: Callable[[list[str]], int], everything: bool = True) -> list[Case]:
    """Make the inputs in `folder`, which must not be there; gives the cases. Not `everything`: the fast ones."""
    folder.mkdir()
    with inside(folder):
        _models(everything)
        _rows()
        cases = [*_checked(), *_generated(), *_configured(), *_adapted()]
        if everything:
            cases += [*_loaded(), *_trained(main), *_policies(main), *_finished(main), *_shown(main)]
    return cases


def _models(everything: bool) -> None:
    for family in ("gpt2", "bert", "t5", "resnet"):
        base_folder(family, Path())
    Path("gpt2/chat_template.jinja").write_text(TEMPLATE)
    Path("gpt2/special_tokens_map.json").write_text(
        json.dumps({"eos_token": "<|end|>", "pad_token": {"content": "<|end|>", "lstrip": False}})
    )
    Path("gpt2/tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>", "model_max_length": 64,
                    "extra_special_tokens": {}, "added_tokens_decoder": {"0": {"content": "<|end|>", "special": True}}})
    )  # fmt: skip
    # The same in two shards.
    shutil.copytree("gpt2", "sharded")
    tensors = load_file("gpt2/model.safetensors")
    Path("sharded/model.safetensors").unlink()
    names, table = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, f"sharded/{file}", metadata={"format": "pt"})
        table |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": table}
    Path("sharded/model.safetensors.index.json").write_text(json.dumps(index))
    if not everything:
        return

    save(bert("embedding"), word_piece(), Path("embedder"))
    torch.manual_seed(0)
    small = {"n_layer": 2, "n_head": 2, "d_model": 32}
    llama = Llama.from_name(
        "Llama-3.2-1B", vocab_size=llama_like().get_vocab_size(), n_kv_head=1, d_ff=64, head_width=16, **small
    )
    save(llama, llama_like(), Path("llama"))
    size = byte_level().get_vocab_size()
    save(Bloom.from_name("bloom-560m", vocab_size=size, **small), byte_level(), Path("bloom"))
    save(XLNet.from_name("xlnet-base-cased", vocab_size=size, d_ff=64, **small), byte_level(), Path("xlnet"))


def _rows() -> None:
    class_folders(Path("images"), count=3)
    from PIL import Image

    for path in sorted(Path("images").glob("*/002.png")):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    for name, (_, text) in TABLES.items():
        Path(name).write_text(text)
    for name, (_, rows) in ROWS.items():
        write_rows(Path(f"{name}.jsonl"), rows)
    Path("rows.json").write_text(json.dumps(CHAT))
    article = {"title": "x", "paragraphs": [
        {"context": row["context"], "qas": [{"id": "1", "question": row["question"], "answers": [
            {"text": row["answers"]["text"][0], "answer_start": row["answers"]["answer_start"][0]}]}]}
        for row in QUESTIONS]}  # fmt: skip
    Path("squad.json").write_text(json.dumps({"version": "1.1", "data": [article]}))
    _binary_rows()
    write_rows(Path("sft.jsonl"), CHAT)
    write_rows(Path("prompts.jsonl"), [{"prompt": "good morning"}, {"text": "the cat"}, *DIALOGUES[:1]])
    Path("judges.py").write_text(JUDGES)


# Files of rows that are no text, or packed, with the method that reads them.
BINARIES = {
    "rows.parquet": "sft", "rows.feather": "classify", "saved/rows.arrow": "sft", "rows.jsonl.gz": "sft",
    "rows.csv.zst": "classify",
}  # fmt: skip


def _binary_rows() -> None:
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"messages": [row["messages"] for row in DIALOGUES]}), "rows.parquet")
    pyarrow.feather.write_feather(pa.Table.from_pylist(SENTIMENT[::4]), "rows.feather")
    Path("saved").mkdir()
    table = pa.Table.from_pylist(CHAT)
    with pa.OSFile("saved/rows.arrow", "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    Path("saved/state.json").write_text('{"_data_files": [{"filename": "rows.arrow"}]}')
    Path("rows.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in CHAT).encode()))
    Path("rows.csv.zst").write_bytes(pa.Codec("zstd").compress(TABLES["rows.csv"][1].encode(), asbytes=True))


def _config(name: str, method: str, base: str, rows: str, **tables: Any) -> str:
    table: dict[str, Any] = {
        "model": {"path": base}, "data": {"train": rows, "eval": rows, "max_length": 64}, "train": COUNTED, **tables
    }  # fmt: skip
    if base == "resnet":
        table["data"] = {"train": rows, "eval": 0.34, "image_size": 16}
    write_config(Path(f"{name}.toml"), method=method, out="run", **table)
    return f"{name}.toml"


BASES = {"classify": "bert", "tag": "bert", "qa": "bert", "embed": "bert"}


def _checked() -> Iterator[Case]:
    """`check-data`: rows of every form, and configurations."""
    for name, (method, _) in ROWS.items():
        base = BASES.get(method, "gpt2")
        config = _config(f"check-{name}", method, base, f"{name}.jsonl")
        yield Case(f"rows {name}", ["check-data", config], [base, config, f"{name}.jsonl"], [f"{name}.jsonl"], 2)
    methods = {name: method for name, (method, _) in TABLES.items()} | {"rows.json": "sft", "squad.json": "qa"}
    for name, method in methods.items():
        base = BASES.get(method, "gpt2")
        config = _config(f"check-{name}", method, base, name)
        yield Case(f"rows {name}", ["check-data", config], [base, config, name], [name], 2)
    for name, method in BINARIES.items():
        base = BASES.get(method, "gpt2")
        rows = name.partition("/")[0]  # the folder, of one that datasets has saved
        config = _config(f"check-{rows}", method, base, rows)
        yield Case(f"rows {rows}", ["check-data", config], [base, config, rows], [name], 2)
    config = _config("check-images", "classify", "resnet", "images")
    pictures = sorted(str(path) for path in Path("images").rglob("*.*"))
    targets = [*pictures, "resnet/config.json", "resnet/preprocessor_config.json"]
    yield Case("images", ["check-data", config], ["resnet", config, "images"], targets, 4)


def _generated() -> Iterator[Case]:
    """`generate`, of every file of a checkpoint; `label`."""
    command = ["generate", "gpt2", "--prompts", "prompts.jsonl", "--max-new-tokens", "2", "--temperature", "0"]
    files = sorted(str(path) for path in Path("gpt2").iterdir())
    yield Case("generate", command, ["gpt2", "prompts.jsonl"], [*files, "prompts.jsonl"], 16)
    yield Case("generate, weights", command, ["gpt2", "prompts.jsonl"], ["gpt2/model.safetensors"], 10)
    sharded = ["generate", "sharded", "--prompt", "the cat", "--max-new-tokens", "2"]
    shards = sorted(str(path) for path in Path("sharded").glob("model*"))
    yield Case("generate, shards", sharded, ["sharded"], shards, 8)
    label = ["label", "gpt2", "sentiment.jsonl", "--labels", "good", "bad=the dog", "--out", "labelled.jsonl"]
    yield Case("label", label, ["gpt2", "sentiment.jsonl"], ["sentiment.jsonl", "gpt2/model.safetensors"], 4)


def _configured() -> Iterator[Case]:
    """A configuration with every field there is."""
    everything = {
        "model": {"path": "gpt2", "dtype": "float32", "device": "cpu", "add_tokens": ["<x>"], "recompute": True},
        "data": {"train": "sft.jsonl", "eval": 0.5, "max_length": 48, "truncate": "end", "chat": "auto",
                 "packing": False},
        "lora": {"rank": 2, "alpha": 4.0, "targets": ["attention"], "dropout": 0.1, "rslora": True, "dora": True,
                 "rank_pattern": {"c_proj": 3}, "alpha_pattern": {"c_proj": 3.0}, "loraplus_lr_ratio": 2.0,
                  "init": "kaiming"},
        "freeze": {"names": ["*"], "except": ["*lora*"], "token_rows": ["<|end|>"]},
        "train": {**COUNTED, "micro_batch_size": 1, "lr": 1e-3, "schedule": "wsd", "warmup": 0.1, "decay": 0.5,
                  "lr_floor": 0.1, "weight_decay": 0.1, "betas": [0.9, 0.99], "eps": 1e-8, "max_grad_norm": 1.0,
                  "lr_scale": {"*lora*": 2.0}, "lr_decay": 0.9, "eval_every": 1, "best": "loss",
                   "early_stopping_patience": 1,
                  "save_every": 1, "keep_last": 2, "seed": 3},
    }  # fmt: skip
    config = _config("train-everything", "sft", "gpt2", "sft.jsonl", **everything)
    yield Case("train everything", ["train", config], ["gpt2", config, "sft.jsonl"], [config], 30)
    yield Case("check everything", ["check-data", config], ["gpt2", config, "sft.jsonl"], [config], 6)


def _adapted() -> Iterator[Case]:
    """What is done with an adapter."""
    model, tokenizer = load("gpt2", device="cpu")
    add_lora(model, LoRAConfig(rank=2, dora=True))
    store_adapter(model, tokenizer, Path("adapter"), "default")
    files = [*sorted(str(path) for path in Path("adapter").iterdir()), "adapter/adapter_config.json"]
    weights = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json"]
    generate = ["generate", "gpt2", "--adapter", "adapter", "--prompt", "the cat", "--max-new-tokens", "2"]
    yield Case("generate, adapter", generate, ["gpt2", "adapter"], [*files, *weights], 10)
    yield Case(
        "merge",
        ["merge", "gpt2", "adapter", "merged"],
        ["gpt2", "adapter"],
        [*weights, "gpt2/model.safetensors", "gpt2/config.json"],
        14,
    )
    yield Case(
        "merge, shards",
        ["merge", "sharded", "adapter", "merged"],
        ["sharded", "adapter"],
        sorted(map(str, Path("sharded").glob("model*"))),
        4,
    )
    yield Case("load_adapter", ["load_adapter", "gpt2", "adapter"], ["gpt2", "adapter"], weights, 14)


def _loaded() -> Iterator[Case]:
    """`load`, of each family's files."""
    for name in ("gpt2", "bert", "t5", "resnet", "llama", "bloom", "xlnet", "embedder"):
        files = [str(path) for path in sorted(Path(name).rglob("*")) if path.suffix == ".json"]
        yield Case(f"load {name}", ["load", name], [name], [*files, f"{name}/config.json", f"{name}/config.json"], 4)


def _trained(main: Callable[[list[str]], int]) -> Iterator[Case]:
    """`train`: a configuration of each method; the files of an adapter; a run to go on with; a token cache."""
    for name, (family, method, rows) in RUNS.items():
        data = "images" if rows is None else str(write_rows(Path(f"{name}.jsonl"), rows))
        config = _config(f"train-{name}", method, family, data)
        yield Case(f"train {name}", ["train", config], [family, config, data], [config], 4)
        yield Case(f"check {name}", ["check-data", config], [family, config, data], [config], 2)
    # A run that has ended with an adapter.
    config = _config("adapter", "sft", "gpt2", "sft.jsonl", lora={"rank": 2, "dora": True}, train=COUNTED)
    _run(main, "train", config)
    os.rename("run", "adapted")

    # A run that stopped after its first steps.
    config = _config(
        "resume", "sft", "gpt2", "sft.jsonl", train={"epochs": 2, "batch_size": 2, "save_every": 1, "keep_last": 2}
    )
    _run(main, "train", config)
    os.rename("run", "half")
    shutil.rmtree("half/model")
    Path("half/result.json").unlink()
    for path in sorted(Path("half/checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(path)
    files = [
        str(path) for path in sorted(Path("half").rglob("*.*")) if path.suffix in (".json", ".jsonl", ".safetensors")
    ]
    files = [file for file in files if not file.startswith("half/best")]  # made anew before they are read
    facts = [file for file in files if file.endswith(("state.json", "tensors.safetensors", "run.json"))]
    needs = ["gpt2", config, "sft.jsonl", "half"]
    yield Case("resume", ["train", config], needs, [*files, *facts], 14, names_numbers=False)

    config = _config(
        "corpus", "pretrain", "gpt2", "rows.txt", data={"train": "rows.txt", "eval": 0.2, "max_length": 48}
    )
    _run(main, "train", config)
    shutil.rmtree("run/model")
    for path in Path("run").iterdir():
        if path.name not in ("corpus", "run.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.rename("run", "cached")
    files = [str(path) for path in sorted(Path("cached/corpus").rglob("*")) if path.is_file()]
    yield Case("token cache", ["train", config], ["gpt2", config, "rows.txt", "cached"], [*files, "rows.txt"], 6)


def _policies(main: Callable[[list[str]], int]) -> Iterator[Case]:
    """`ppo`: its configuration, prompts, reward model."""
    ppo = {"episodes": 4, "rollout_batch_size": 4, "batch_size": 2, "epochs": 1, "max_new_tokens": 2, "lr": 1e-3,
           "reward_norm_samples": 2, "kl_target": 3.0, "max_kl": 1000.0, "missing_eos_penalty": 0.1,
           "lora": {"rank": 2}}  # fmt: skip
    write_config(
        Path("ppo.toml"), out="run", prompts="prompts.jsonl", reward="judges:short", model={"path": "gpt2"}, ppo=ppo
    )
    needs = ["gpt2", "ppo.toml", "prompts.jsonl", "judges.py"]
    yield Case("ppo", ["ppo", "ppo.toml", "--quiet"], needs, ["ppo.toml"] * 3 + ["prompts.jsonl"], 20)
    yield Case("check ppo", ["check-data", "ppo.toml"], needs, ["ppo.toml", "prompts.jsonl"], 6)
    config = _config("reward", "reward", "gpt2", "compared.jsonl", lora={"rank": 2})
    _run(main, "train", config)
    os.rename("run", "judge")
    command = ["ppo", "ppo.toml", "--quiet", "reward=judge"]
    files = ["judge/adapter/adapter_model.safetensors", "judge/adapter/adapter_config.json"]
    yield Case("ppo, reward model", command, [*needs, "judge"], files, 4)


def _finished(main: Callable[[list[str]], int]) -> Iterator[Case]:
    """What reads a finished run: `evaluate`, `report`, `generate`, `train` once more."""
    config = _config("finished", "classify", "bert", "sentiment.jsonl", train={**COUNTED, "lr": 1e-3})
    _run(main, "train", config)
    os.rename("run", "finished")
    files = [f"finished/{name}" for name in ("run.json", "metrics.jsonl", "result.json", "examples.json")]
    needs = ["bert", "finished", "sentiment.jsonl"]
    model = ["finished/model/config.json", "finished/model/model.safetensors"]
    yield Case("evaluate", ["evaluate", "finished"], needs, [files[0], *model, "sentiment.jsonl"], 8)
    yield Case("report", ["report", "finished", "adapted"], ["finished", "adapted"], files, 12)
    command = ["generate", "adapted", "--prompt", "the cat", "--max-new-tokens", "2"]
    yield Case("generate, run", command, ["gpt2", "adapted", "sft.jsonl"], ["adapted/run.json"], 4)
    again = ["train", "adapter.toml"]
    needs = ["gpt2", "adapter.toml", "sft.jsonl", "adapted"]
    yield Case("train again", again, needs, ["adapted/run.json", "adapted/result.json", "adapted/metrics.jsonl"], 4)


def _shown(main: Callable[[list[str]], int]) -> Iterator[Case]:
    """`compare`: prompts, pairs, a session that goes on."""
    rows = [{"prompt": "the cat", "chosen": "good", "rejected": "bad"}, {"prompt": "x", "completions": ["a", "b", "c"]},
            {"text": "good", "label": "up", "second": "down", "confidence": 0.5}]  # fmt: skip
    write_rows(Path("pairs.jsonl"), rows * 2)
    command = ["compare", "--pairs", "pairs.jsonl", "--out", "answers.jsonl", "--labeler", "judges:left"]
    yield Case("compare pairs", command, ["pairs.jsonl", "judges.py"], ["pairs.jsonl"], 6)
    sampled = [
        "compare",
        "gpt2",
        "--prompts",
        "prompts.jsonl",
        "--out",
        "answers.jsonl",
        "--labeler",
        "judges:left",
        "--max-new-tokens",
        "2",
    ]
    yield Case("compare", sampled, ["gpt2", "prompts.jsonl", "judges.py"], ["prompts.jsonl"], 2)
    _run(main, *command)
    session = sorted(str(path) for path in Path("answers.jsonl.session").glob("*.json*"))
    yield Case(
        "compare again",
        command,
        ["pairs.jsonl", "judges.py", "answers.jsonl.session", "answers.jsonl"],
        [*session, "answers.jsonl"],
        8,
    )


def _run(main: Callable[[list[str]], int], *command: str) -> None:
    assert main(list(command)) == 0, command
