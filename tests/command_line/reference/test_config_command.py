"""`handtune config`: the file that it prints has every field, says what each means, and is read as the defaults."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from small_methods import RUNS, base_folder
from small_runs import write_rows

from handtune.cli import main
from handtune.config import PPORunConfig, RunConfig, from_table
from handtune.engine.tasks.objectives import METHODS
from handtune.models.families import FAMILIES
from handtune.reference.fields import comments, tables
from handtune.reference.methods import ONLY_FOR, PURPOSES, has, rows_of
from handtune.reference.presets import n_parameters
from handtune.reference.template import config_class_of, explanation, template

OPTIONS = [
    (root, table, key, option)
    for root in (RunConfig, PPORunConfig)
    for table in tables(root)
    for key, option in table.options.items()
]
FIELD = re.compile(r"# ([\w.]+) = ")


def uncommented(text: str) -> str:
    """The file with all that is commented out, but for examples where leaving out means something else."""
    lines = []
    for line in re.sub(r"(?m)^# \[\[.*\n(#.*\n)*", "", text).splitlines():  # [[data.mix]] is in the place of another
        is_example = "left out:" in line
        if line.startswith("# [") or (FIELD.match(line) and not is_example):
            line = line.removeprefix("# ")
        lines.append(line)
    return "\n".join(lines)


@pytest.mark.parametrize("method", PURPOSES)
def test_the_file_is_read_as_the_defaults(method: str) -> None:
    config_class = config_class_of(method)
    required = {"out": f"runs/{method}", "model": {"path": tomllib.loads(template(method))["model"]["path"]}}
    if method == "ppo":
        required |= {"prompts": "prompts.jsonl", "reward": "runs/reward"}
    else:
        required |= {"method": method, "data": {"train": "rows.jsonl"}}
    default = from_table(config_class, required, "x")
    assert from_table(config_class, tomllib.loads(template(method)), "x") == default

    # With the defaults written out, too; [lora] is then there.
    text = re.sub(
        r"(?m)^# \w+ = .*\n(?:#  +# .*\n)+", lambda match: re.sub(r"\n#  +# ", " ", match[0]), template(method)
    )
    table = tomllib.loads(uncommented(text))
    if method != "ppo":
        required["lora"] = {}
        required["train"] = {}
    assert from_table(config_class, table, "x") == from_table(config_class, required, "x")
    assert table["lora" if method != "ppo" else "ppo"]


def test_every_field_is_in_a_file() -> None:
    files = {method: template(method) for method in PURPOSES}
    for root, table, key, _ in OPTIONS:
        name = f"{table.name}.{key}".lstrip(".")
        methods = [method for method in PURPOSES if config_class_of(method) is root and has(method, name)]
        assert methods or any(has(method, name) for method in PURPOSES), name
        for method in methods:
            section = files[method].partition(f"[{table.name}]")[2] if table.name else files[method]
            assert re.search(rf"(?m)^(# )?{key} = \S", section), (method, name)
    names = {f"{table.name}.{key}".lstrip(".") for _, table, key, _ in OPTIONS} | {
        table.name for _, table, *_ in OPTIONS
    }
    assert ONLY_FOR.keys() <= names


@pytest.mark.parametrize(
    ("root", "table", "key", "option"), OPTIONS, ids=lambda value: value if type(value) is str else ""
)
def test_every_field_is_explained(root, table, key, option) -> None:
    text = comments(table.config_class)[option.field.name]
    assert len(text) > 10, f"{table.config_class.__name__}.{key} has no comment that reads alone"
    if option.field.default is None:
        assert "None:" in text, f"{key}: say what it means to leave it out"
    if choices := option.field.metadata.get("choices"):
        assert all(choice in explanation(table.config_class, option) for choice in choices)
    if "least" in option.field.metadata and option.field.metadata["least"][0] >= 0:
        assert re.search(r"above 0|0 or more", explanation(table.config_class, option))


def test_methods_and_shapes_are_those_of_the_engine() -> None:
    assert tuple(PURPOSES) == (*METHODS, "ppo")
    for method in PURPOSES:
        assert rows_of(method)
        assert all(rows_of(method).values())
    assert list(rows_of("sft")) == [
        "text", "prompt/completion", "messages", "instruction/input/output", "conversations",
    ]  # fmt: skip
    assert (
        list(rows_of("dpo")) == list(rows_of("reward")) == ["prompt/chosen/rejected", "conversations/chosen/rejected"]
    )
    assert list(rows_of("classify")) == ["text/label", "text/text_pair/label", "image/label"]
    assert list(rows_of("embed")) == ["anchor/positive[/negative]"]


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"(?m)^  {method} +\S", listed) for method in PURPOSES)
    assert main(["config", "dpo"]) == 0
    assert capsys.readouterr().out == template("dpo")
    assert main(["config", "stf"]) == 2
    assert capsys.readouterr().err == f"handtune: method 'stf' is unknown; known: {', '.join(PURPOSES)}\n"
    assert main(["config", "sft", "--presets"]) == 2


def test_presets(capsys: pytest.CaptureFixture[str]) -> None:
    """Each with its size, which is that of the whole model although few blocks are made."""
    assert main(["config", "--presets"]) == 0
    said = capsys.readouterr().out
    for family in FAMILIES.values():
        assert all(re.search(rf"(?m)^  {re.escape(name)} +[\d,]+\.\d million", said) for name in family.presets)
    assert all(name in said for name in FAMILIES)
    for family in dict.fromkeys(FAMILIES.values()):
        name = next(iter(family.presets))
        assert re.search(rf"(?m)^  {name} +{n_parameters(family, name) / 1e6:,.1f} million", said)
    assert re.search(r"(?m)^  gpt2 +124\.4 million", said)  # as published
    assert re.search(r"(?m)^  resnet18 +11\.7 million", said)


@pytest.mark.parametrize("method", ["sft", "classify"])
def test_a_run_from_the_printed_file(method: str, tmp_path: Path, capsys, monkeypatch) -> None:
    """As a new user goes about it: print, fill in, look at the rows, train."""
    monkeypatch.chdir(tmp_path)
    family, _, rows = RUNS[method]
    main(["config", method])
    text = capsys.readouterr().out
    text = re.sub(r'(?m)^path = ".*?"', f"path = {json.dumps(str(base_folder(family, tmp_path)))}", text)
    (tmp_path / "run.toml").write_text(text)
    write_rows(tmp_path / "rows.jsonl", rows)
    assert main(["check-data", "run.toml"]) == 0
    assert main(["train", "run.toml", "train.max_steps=1"]) == 0
    assert (tmp_path / "runs" / method / "model/config.json").is_file()
