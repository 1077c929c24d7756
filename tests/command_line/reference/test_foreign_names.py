"""Options by the names that other tools give them, and ours in the wrong place: refused in one line that names ours."""

from pathlib import Path

import pytest

from handtune.cli import main, parsed
from handtune.config import PPORunConfig, RunConfig, from_table
from handtune.engine.rlhf.config import PPOConfig
from handtune.reference.fields import tables
from handtune.reference.foreign_names import ELSEWHERE, OPTIONS_ELSEWHERE, REMARKS
from handtune.reference.grammar import GRAMMAR, SHARED

BASE = {"method": "sft", "out": "o", "model": {"path": "m"}, "data": {"train": "d"}}
PPO = {"out": "o", "model": {"path": "m"}, "prompts": "p", "reward": "r"}


def refusal(table: dict, config_class: type = RunConfig) -> str:
    with pytest.raises(ValueError) as error:
        from_table(config_class, table, "x")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [
        # In the table of ours, by another name.
        ("train", "learning_rate", "'lr'"),
        ("train", "num_train_epochs", "'epochs'"),
        ("train", "per_device_train_batch_size", "'micro_batch_size'"),
        ("train", "gradient-accumulation-steps", "'micro_batch_size'"),
        ("lora", "r", "'rank'"),
        ("lora", "target_modules", "'targets'"),
        ("model", "base_model", "'path'"),
        ("data", "cutoff_len", "'max_length'"),
        # In another table, by ours or another name.
        ("", "epochs", "'train.epochs'"),
        ("", "learning_rate", "'train.lr'"),
        ("", "lora_r", "'lora.rank'"),
        ("", "model_name_or_path", "'model.path'"),
        ("", "max_seq_length", "'data.max_length'"),
        ("", "output_dir", "'out'"),
        ("", "load_in_4bit", "'model.quantize'"),
        ("train", "rank", "'lora.rank'"),
        ("train", "output_dir", "'out'"),
        ("model", "max_seq_length", "'data.max_length'"),
        ("model", "targets", "'lora.targets'"),
        # Tables by another name.
        ("", "training", "'train'"),
        ("", "peft", "'lora'"),
        ("", "lora_config", "'lora'"),
        ("", "dataset", "'data'"),
    ],
)
def test_the_hint_names_ours(section: str, key: str, meant: str) -> None:
    table = {**BASE, key: 1} if not section else {**BASE, section: {**BASE.get(section, {}), key: 1}}
    place = f"x: {section}: " if section else "x: "
    assert refusal(table) == f"{place}unknown key {key!r}; did you mean {meant}?"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rate", "'ppo.lr'"),
        ("num_ppo_epochs", "'ppo.epochs'"),
        ("lora_r", "'ppo.lora.rank'"),
        ("init_kl_coef", "'ppo.kl_coef'"),
        ("num_generations", "'ppo.group_size'"),
        ("dataset_name", "'prompts'"),
        ("seed", "'ppo.seed'"),
    ],
)
def test_the_hint_knows_the_file_of_ppo(key: str, meant: str) -> None:
    assert refusal({**PPO, key: 1}, PPORunConfig) == f"x: unknown key {key!r}; did you mean {meant}?"


def test_what_needs_no_option_is_said() -> None:
    assert "the same command on the same folder goes on" in refusal({**BASE, "resume_from_checkpoint": True})
    assert "benchmarks/best_of.py does that" in refusal({**PPO, "ppo": {"best_of": 4}}, PPORunConfig)
    with pytest.raises(ValueError, match="unknown key 'clip'; did you mean 'clip_range'"):
        from_table(PPOConfig, {"clip": 0.2}, "x")


def test_the_names_lead_to_fields_and_are_none_themselves() -> None:
    keys = [(table.name, key) for root in (RunConfig, PPORunConfig) for table in tables(root) for key in table.options]
    sections = {table.name for root in (RunConfig, PPORunConfig) for table in tables(root)}
    names = {key for _, key in keys} | {f"{table}.{key}" for table, key in keys} | sections
    assert {name for entry in ELSEWHERE.values() for name in entry.split()} <= names
    known = {key for _, key in keys} - {"beta"}  # of DPO; the beta of PPO is kl_coef
    assert not {*ELSEWHERE, *REMARKS} & {*known, *sections}
    options = {name.split()[-1] for _, _, arguments in GRAMMAR.values() for name in arguments} | SHARED.keys()
    assert set(OPTIONS_ELSEWHERE.values()) <= options


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        (["train", "x.toml", "--model_name_or_path", "gpt2"], "changed without dashes: model.path=gpt2"),
        (["train", "x.toml", "--learning_rate=1e-4"], "changed without dashes: train.lr=1e-4"),
        (["train", "x.toml", "--epochs", "3"], "changed without dashes: train.epochs=3"),
        (["train", "x.toml", "--train.epochs", "3"], "changed without dashes: train.epochs=3"),
        (["train", "x.toml", "--what"], "changed without dashes: section.field=value"),
        (["train", "x.toml", "--logging_steps", "3"], "every step is logged"),
        (["ppo", "x.toml", "--learning_rate", "3"], "changed without dashes: ppo.lr=3"),
        (["ppo", "x.toml", "--quite"], "did you mean --quiet?"),
        (["generate", "x", "--max_new_tokens", "3"], "did you mean --max-new-tokens?"),
        (["generate", "x", "--num_beams", "3"], "did you mean --beams?"),
        (["merge", "a", "b", "--zzz"], "known: --dtype"),
        (["train", "x.toml", "--gradient-accumulation-steps", "8"], "without dashes: train.micro_batch_size=value"),
        (["train", "x.toml", "--min_lr", "1e-5"], "without dashes: train.lr_floor=value"),
        (["train", "x.toml", "--data", "x.jsonl"], "without dashes: section.field=x.jsonl"),
        (["generate", "x", "--foo", "3"], "known: "),
        (["evaluate", "x", "--dtype", "bfloat16"], "known: --data"),
    ],
)
def test_options_of_other_tools(command: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "unrecognized arguments: " in said
    assert hint in said


def test_words_too_many_get_no_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(["train"])
    assert capsys.readouterr().err.endswith("the following arguments are required: config\n")
    with pytest.raises(SystemExit):
        parsed(["check-data"])
    with pytest.raises(SystemExit):
        parsed(["merge", "a", "b", "c", "d"])
    assert capsys.readouterr().err.endswith("unrecognized arguments: d\n")
