"""What comes from outside takes bounded time and memory, and is refused in one line that names it and the limit."""

import json
import os
import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_runs import CHAT, gpt2, gpt2_folder, write_config, write_rows

from handtune._files import json_if_there, parse_json, read_json
from handtune._shapes import NotTOML, parse_toml, with_fields
from handtune.cli import main
from handtune.engine import LoRAConfig, PPOConfig, TrainConfig
from handtune.engine.adapters.module_patterns import matches_end
from handtune.engine.chat.template import ChatTemplate
from handtune.engine.data.images import MAX_PIXELS, decode
from handtune.models import GPT2, Llama, load
from handtune.models.layers.image_processor import ImageProcessor


@pytest.fixture(autouse=True)
def limits() -> Iterator[None]:
    """Memory, and the processor's time, for which what is not bounded would ask."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 2**30, before[1]))
    start = time.process_time()
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - start < 20


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return gpt2_folder(tmp_path_factory.mktemp("base") / "gpt2")


@pytest.fixture
def complaint(capsys):
    """Runs a command that must fail in one line; gives it."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err.splitlines()[-1].removeprefix("handtune: ")

    return run


def changed(base: Path, target: Path, name: str = "config.json", **fields: object) -> Path:
    """A copy of a checkpoint in which a JSON file says something else."""
    target.mkdir()
    for path in base.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    (target / name).write_text(json.dumps({**json_if_there(base / name), **fields}))
    return target


# Files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a." * 200_000 + "a = 1", "a key of more than 64 parts"),
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("a = " + "9" * 5000, "limit .4300 digits"),
        ("#" * 1_000_001, "at most 1,000,000"),
    ],
)
def test_toml_without_end(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^x: .*{message}"):
        parse_toml(text, "x")


def test_toml_with_dots_in_its_texts() -> None:
    assert parse_toml('text = "' + "a.b " * 1000 + '"', "x") == {"text": "a.b " * 1000}
    with pytest.raises(NotTOML, match="x: not valid TOML"):
        parse_toml("a = ", "x")


def test_json_without_end() -> None:
    twice = ", ".join(f'"{i}": 1' for i in (*range(200_000), 199_999))
    for text, message in [
        ("[" * 100_000, "nested too deeply"),
        ("[" + "9" * 400 + "]", "a number of 400 digits"),
        ("{" + twice + "}", "the field '199999' stands twice"),
    ]:
        with pytest.raises(ValueError, match=f"^x: .*{message}.*; restore"):
            parse_json(text, "x")


def test_fields_are_named_where_they_are_of_another_kind() -> None:
    row = {"a": 1, "b": None, "c": True}
    assert with_fields(row, "x", a=int, b=str | None, d=list | None) is row
    assert with_fields(row, "x", a=float) is row
    for kinds, message in [
        ({"b": str}, "x: b: expected text, got None"),
        ({"c": int}, "x: c: expected a whole number, got True"),
        ({"d": dict}, "x: d: expected an object, and it is missing"),
    ]:
        with pytest.raises(ValueError, match=message):
            with_fields(row, "x", **kinds)
    with pytest.raises(ValueError, match=r"x: expected an object, got \[\.\.\.\]|x: expected an object, got \[\]"):
        with_fields([], "x")


def test_pipes_are_refused_at_once(base, complaint, tmp_path) -> None:
    """Opened, each of them would wait for ever for somebody who writes."""
    rows, pipe = write_rows(tmp_path / "rows.jsonl", CHAT), "a pipe or device, where a"
    job = write_config(
        tmp_path / "run.toml", method="sft", out=str(tmp_path / "run"), model={"path": str(base)},
        data={"train": str(rows)},
    )  # fmt: skip
    for name in ("a.jsonl", "a.txt", "a.toml"):
        os.mkfifo(tmp_path / name)
    assert pipe in complaint("train", tmp_path / "a.toml")
    assert pipe in complaint("train", job, f"data.train={tmp_path / 'a.jsonl'}")
    assert pipe in complaint("train", job, "method=pretrain", f"data.train={tmp_path / 'a.txt'}")
    assert pipe in complaint("generate", base, "--prompts", tmp_path / "a.jsonl")
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja", "vocab.json", "generation_config.json"):
        copy = changed(base, tmp_path / name.replace(".", "-"))
        (copy / name).unlink(missing_ok=True)
        os.mkfifo(copy / name)
        with pytest.raises(ValueError, match=re.escape(f"{copy / name}: {pipe}")):
            load(copy)
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match=f"a.png.*{pipe} image"):
        decode(tmp_path / "a.png", ImageProcessor())
    with pytest.raises(ValueError, match="null: a pipe or device"):
        read_json("/dev/null")


# Configurations


@pytest.mark.parametrize("value", ["a", -1, 0, 10**30, True, None, [1], 1.5, float("nan")])
@pytest.mark.parametrize("field", ["n_embd", "n_head", "n_layer", "vocab_size", "n_positions"])
def test_sizes_that_are_none(base, tmp_path, field: str, value: object) -> None:
    folder = changed(base, tmp_path / "x", **{field: value})
    with pytest.raises(ValueError, match=rf"config.json: {field} = .*: expected"):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layer": 10**6}, "n_layer = 1000000: expected at most 1,000"),
        ({"head_width": 2**24}, "2 heads of 16777216: expected a width of at most"),
        ({"layer_norm_epsilon": -1.0}, "layer_norm_epsilon = -1.0: expected a finite number"),
        ({"architectures": "GPT2LMHeadModel"}, "architectures: expected a list, got 'GPT2LMHeadModel'"),
        ({"architectures": [1]}, "architectures: expected names"),
        ({"model_type": ["gpt2"]}, "model_type: expected text"),
        ({"handtune_task": []}, r"handtune_task: expected text, got \[\]"),
        ({"id2label": [0, 1]}, "id2label: expected an object"),
        ({"head_layers": "2"}, "head_layers: expected a whole number"),
        ({"eos_token_id": 10**30}, "eos_token_id = 1000.*: expected a token's id"),
    ],
)
def test_fields_of_config_json(base, tmp_path, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        load(changed(base, tmp_path / "x", **fields))


def test_numbers_of_labels_and_layers_without_end(base, tmp_path) -> None:
    stored = {"architectures": ["GPT2ForSequenceClassification"], "num_labels": 10**12}
    with pytest.raises(ValueError, match=r"num_labels = 1000000000000: expected 1 to 1,000,000"):
        load(changed(base, tmp_path / "x", **stored))
    with pytest.raises(ValueError, match="head_layers: expected a number from 1 to 100, got 1000000000"):
        load(base, "sequence-classification", labels=2, head_layers=10**9)
    for field in ("n_layer", "d_model"):
        with pytest.raises(ValueError, match=f"{field} = 1000000000: expected at most"):
            GPT2.from_name("gpt2", **{field: 10**9})
    sizes = {"n_layer": 2, "d_model": 64, "n_head": 4, "n_kv_head": 2, "d_ff": 64, "vocab_size": 64, "head_width": 16}
    assert Llama.from_name("Qwen2.5-7B", window=8, window_layers=(1,), **sizes).config.window_layers == (1,)
    with pytest.raises(ValueError, match="n_layer = 'a': expected int"):
        GPT2.from_name("gpt2", n_layer="a")


def test_other_files_of_a_checkpoint(base, tmp_path) -> None:
    for i, (name, fields, message) in enumerate([
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, "chat_template: template: expected text"),
        ("tokenizer_config.json", {"chat_template": 3}, "chat_template: expected text or a list, got 3"),
        ("generation_config.json", {"eos_token_id": "a"}, "eos_token_id = 'a'"),
    ]):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            load(changed(base, tmp_path / str(i), name, **fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.epochs=1e300", "train: epochs: 1e+300 is no number to compute with"),
        ("train.epochs=1000000000", "train: epochs: expected at most 1,000,000, got 1000000000"),
        ("train.max_steps=1000000000000000000", "train: max_steps: expected at most 1,000,000,000"),
        ("train.warmup=1e300", "train: warmup: 1e+300 is no number to compute with"),
        ("train.lr=inf", "train: lr: inf is no number to compute with"),
        ("train.lr=" + "9" * 400, "train: lr: a whole number of 1,329 bits, where 64 are the most"),
        ("lora.rank=1000000000", "lora: rank: expected a positive whole number, at most 32,768"),
        ('lora.rank_pattern={ "(a)\\\\1" = 4 }', "rank_pattern: '(a)\\\\1': groupref in a pattern"),
        ("model.head_layers=1000000000", "head_layers: expected a number from 1 to 100"),
        ("train.lr=" + "[" * 100_000, "train.lr: TOML that is nested too deeply"),
        ("model." + "a." * 100_000 + "b=1", "no field lies in 100,001 sections"),
    ],
)
def test_a_run_without_end(base, complaint, tmp_path, change: str, message: str) -> None:
    job = write_config(
        tmp_path / "run.toml", method="classify" if "head" in change else "sft", out=str(tmp_path / "run"),
        model={"path": str(base), **({"labels": ["a", "b"]} if "head" in change else {})},
        data={"train": str(write_rows(tmp_path / "rows.jsonl", CHAT))},
    )  # fmt: skip
    if "head" in change:
        write_rows(tmp_path / "rows.jsonl", [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}])
    assert message in complaint("train", job, change)


def test_settings_without_end(base, complaint) -> None:
    for settings in ({"epochs": float("inf")}, {"epochs": float("nan")}, {"batch_size": 10**18}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}: expected"):
            TrainConfig(**settings)
    with pytest.raises(ValueError, match="max_new_tokens: expected at most 1,048,576"):
        PPOConfig(max_new_tokens=10**9)
    line = complaint("generate", base, "--prompt", "x", "--beams", 10**9, "--max-new-tokens", 4)
    assert line == "beams = 1,000,000,000: expected at most 1,000"


# Images


def test_images_that_become_too_large(tmp_path) -> None:
    """A line of 65,000 pixels, scaled up to 256 on its short side, takes 12.5 GB."""
    Image.new("L", (65_000, 1)).save(tmp_path / "line.png")
    with pytest.raises(ValueError, match=r"line.png: an image of 65000 x 1 pixels; one side may be 50 times the other"):
        decode(tmp_path / "line.png", ImageProcessor())
    assert decode(tmp_path / "line.png", ImageProcessor(32, 32, squeeze=True)).shape == (3, 32, 32)
    header = bytearray((tmp_path / "line.png").read_bytes())
    header[16:24] = (12_000).to_bytes(4, "big") * 2
    from zlib import crc32

    header[29:33] = crc32(header[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(header)
    with pytest.raises(ValueError, match=f"bomb.png: an image of 12000 x 12000 pixels; at most {MAX_PIXELS:,}"):
        decode(tmp_path / "bomb.png", ImageProcessor())
    Image.new("RGB", (500, 10)).save(tmp_path / "long.png")
    assert decode(tmp_path / "long.png", ImageProcessor(16, 16)).shape == (3, 16, 800)
    with pytest.raises(ValueError, match="at most 4096 pixels a side"):
        ImageProcessor(10**6, 10**6)


# Patterns


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|aa)+", "(a*)*b", ".*.*.*.*.*.*.*.*b", "(((((a*)*)*)*)*)*b", "(a?){999}b"]
)
def test_patterns_that_backtrack(pattern: str) -> None:
    assert matches_end(pattern, "a" * 200 + "!") is False
    config = LoRAConfig(rank_pattern={pattern: 4})
    assert config.rank_of("a" * 200 + "!") == 16


def test_patterns_match_as_python_s() -> None:
    random = Random(0)
    parts = [
        "a", "b", ".", r"\d", r"\.", "[ab]", "[^a]", "(a|ab)", "(a|b.)*", "a+", "b*", "x?", "(?:ab){1,2}", "a{2}",
        "(a*)*", "^", "$", "(?=a)", "(?!b)", r"\w+", "(b{0,2}a)+", "(a{2,3}){2}", "a*?", "[a-c0-9]", r"\D", "(|a)b",
        r"\b", r"\B", r"\ba", r"a\b", r"\B1", r"(\b|b)+", r"(?=\b)", r"b\B",
    ]  # fmt: skip
    for _ in range(1000):
        pattern = "".join(random.choices(parts, k=random.randint(1, 5)))
        path = "".join(random.choices("ab.1_", k=random.randint(0, 8)))
        expected = re.fullmatch(rf"(.*\.)?({pattern})", path) is not None
        assert matches_end(pattern, path) == expected, (pattern, path)
    for pattern, message in [(r"(a)\1", "groupref"), ("(?i)a", "flags"), ("(?i:a)", "flags"), ("(", "no regular")]:
        with pytest.raises(ValueError, match=message):
            matches_end(pattern, "aa")
    with pytest.raises(ValueError, match="at most 1,000"):
        matches_end("a" * 2000, "a")


# Chat templates

SHARED = "{% set x = [1] %}" + "{% set x = [x, x] %}" * 40
GROWS = (
    "{{% set n = namespace(s='a') %}}{{% for i in range(60) %}}{{% set n.s = n.s {} n.s %}}{{% endfor %}}{{{{ n.s }}}}"
)
LARGE = "{% set s = 'a' * 4000000 %}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**9 }}", "{{ 10**9 * 'a' }}", "{{ (10**10)**1000 }}", GROWS.format("+"), GROWS.format("~"),
        "{{ 'a' | center(10**9) }}", "{{ 'a'.ljust(10**9) }}", "{{ 'a'.zfill(10**9) }}", "{{ '%999999999d' % 5 }}",
        "{{ '%*d' % (10**9, 5) }}", "{{ '{:999999999}'.format(5) }}", "{{ '{:{}}'.format(5, 10**9) }}",
        LARGE + "{{ s.replace('a', s) }}", LARGE + "{{ s.replace('', s) }}", LARGE + "{{ s | replace('a', s) }}",
        LARGE + "{{ s.join(['a'] * 10000) }}", LARGE + "{{ range(99999) | map('string') | join(s) }}",
        LARGE + "{{ [s] * 10000 }}", LARGE + "{{ ([s] * 10000) | tojson }}", LARGE + "{{ '%s' % [[s] * 10000] }}",
        LARGE + "{% for i in range(99999) %}{{ s[1:] }}{% endfor %}",
        "{{ [1] | tojson(indent=10**9) }}", "{{ 'a\n' | indent(10**9, true) }}", "{{ [1] | batch(10**9, 'x') | list }}",
        "{{ ('\t' * 1000).expandtabs(10**8) }}", "{{ lipsum(10**6) }}", "{% for i in range(10**9) %}{% endfor %}",
        "{{ ('a' * 4000000).translate({97: 'b' * 4000000}) }}", "{{ ('a' * 200000).translate({97: 'b' * 20000}) }}",
        "{{ ('%(a)9999d' * 200000) % {'a': 1} | length }}", "{{ (('%(a)9999d' * 200000) % {'a': 1}) | length }}",
        "{{ ('{0:9999}' * 200000).format(1) }}", "{{ ('a ' * 20000) | wordwrap(1, wrapstring='b' * 100000) }}",
        "{{ ('http://a.com ' * 20000) | urlize(target='x' * 100000) }}",
        "{{ ('http://a.com ' * 20000) | urlize(target='x' * 100000, extra_schemes=[] | map('string')) }}",
        "{{ ('http://a.com ' * 20000) | urlize(rel='x' * 100000) }}",
        "{{ range(100000) | list | tojson(indent=4000) }}",
        "{{ ('ab:c ' * 9999) | urlize(extra_schemes=['ab:'] * 9999) }}", "{{ '%(a)999999999d' % {'a': 1} }}",
        "{{ '{:٩٩٩٩٩٩٩٩٩}'.format(1) }}", "{{ '%.999999999f' % 1.0 }}", LARGE + "{{ ('%(a)s' * 10000) % {'a': [s]} }}",
        LARGE + "{{ ('{0[0]}' * 10000).format([s]) }}", LARGE + "{{ ('{0}' * 10000).format([s]) }}",
        LARGE + "{{ range(99999) | list | tojson(separators=(s, '')) }}", "{{ ('\r' * 99999) | indent('a' * 99999) }}",
        LARGE + "{% set n = namespace(a=s) %}{{ ([n] * 10000) | join(attribute='a') }}", "{{ 5 | round(-10**9) }}",
        "{{ (5).to_bytes(10**10, 'big') }}",
        LARGE + "{% macro f() %}{{ kwargs.values() }}{% endmacro %}{{ f(a=[s] * 10000) }}",
        LARGE + "{{ {}[[s] * 10000] }}", "{{ '%99999999999d'.encode() % 5 }}", "{{ ('f' * 4000000) | int(0, 16) }}",
        "{{ range(9) | map('string') | batch(10**9, 'x') | list }}", "{{ strftime_now('%200d' * 800000) }}",
        "{{ strftime_now(pattern='%200d' * 800000) }}", LARGE + "{{ ('{text}' * 10000).format(text=s) }}",
        LARGE + "{{ ('http://a.com ' * 20000) | urlize(trim_url_limit=9, target=s) }}",
        LARGE + "{{ ([[s]] * 10000) | join }}", LARGE + "{{ ([s] * 10000) | join(s) }}", LARGE + "{{ s + s }}",
        LARGE + "{{ ([[s] * 10000] * 10000) | sum(start=[]) | length }}",
    ],
)  # fmt: skip
def test_templates_that_grow(source: str) -> None:
    start = time.thread_time()
    with pytest.raises(
        ValueError,
        match=r"makes .*more than|widths|parts of values|an indent|undefined|unsafe|Range too big",
    ):
        ChatTemplate(source).render([{"role": "user", "content": "x"}])
    assert time.thread_time() - start < 5


@pytest.fixture
def hurried(monkeypatch) -> None:
    monkeypatch.setattr("handtune.engine.chat.limits.MAX_SECONDS", 0.05)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) if n else '' }}{{ f(n - 1) if n else '' }}{% endmacro %}{{ f(60) }}",
        "{% for x in [1] recursive %}{% if loop.depth < 60 %}{{ loop([1, 1]) }}{% endif %}{% endfor %}",
        SHARED + "{{ x }}",
        SHARED + SHARED.replace("x", "y") + "{{ x == y }}",
        "{{ ([range(99999) | list] * 10000) | sum(start=[]) | length }}",
    ],
)
def test_templates_that_never_end(hurried, source: str) -> None:
    template = ChatTemplate(source)
    for _ in range(2):  # the second time it isn't tried
        start = time.thread_time()
        with pytest.raises(ValueError, match=r"takes more than 0.05 seconds"):
            template.render([{"role": "user", "content": "x"}])
    assert time.thread_time() - start < 0.05


def test_templates_that_python_can_t_compile() -> None:
    for source in ("{{ " + "(" * 500 + "1" + ")" * 500 + " }}", "{% for i in x %}" * 30 + "{% endfor %}" * 30):
        with pytest.raises(ValueError, match=r"^chat template: .*; correct the template"):
            ChatTemplate(source)


def test_what_templates_do_stays_as_it_was() -> None:
    source = (
        "{{ 5 % 3 }}{{ '%s and 100%%' % 'x' }}{{ '{{}} {}'.format('a') }}{{ [1, 2] + [3] }}{{ 'abc'[1:] ~ 1 ~ none }}"
        "{% for a, b in {'k': 'v'} | items %}{{ loop.length }}{{ loop.last }}{{ a + b }}{% endfor %}{{ (1, 'a') }}"
        "{% for m in messages if m.role == 'user' %}{{ m.content | trim | upper }}{% else %}none{% endfor %}"
        "{{ ['a', 'b'] | join('-') }}{{ range(3) | map('string') | join }}{{ {'a': [1]} | tojson }}{{ 2 ** 10 * 3 }}"
        "{{ messages | join(',', attribute='role') }}{{ [{'n': 2}] | sum('n') }}{{ [[1], [2]] | sum(start=[]) }}"
        "{{ '%5.1f|%-3s' % (2.25, 'a') }}{{ '{:>4}{a:.2f}'.format('b', a=1) }}{{ {'a': [1]} | tojson(indent=1) }}"
    )
    text = (
        "2x and 100%{} a[1, 2, 3]bc1None1Truekv(1, 'a')Xa-b012{\"a\": [1]}3072user2[1, 2]  2.2|a     b1.00"
        '{\n "a": [\n  1\n ]\n}'
    )
    assert ChatTemplate(source).render([{"role": "user", "content": " x "}]) == text


# Numbers that are none


@pytest.fixture
def unsound(base, tmp_path) -> Path:
    """A base with NaN in the rows of one published tensor."""
    folder = changed(base, tmp_path / "unsound")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("h.1.mlp.c_fc.weight"))
    tensors[name][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_weights_that_are_no_numbers(base, unsound, complaint, tmp_path) -> None:
    name = "transformer.h.1.mlp.c_fc.weight holds NaN or infinity"
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "good"}, {"text": "bad"}])
    for more in ((), ("--temperature", "0"), ("--beams", "2")):
        line = complaint("generate", unsound, "--prompt", "good", "--max-new-tokens", "2", *more)
        assert line.startswith(f"{unsound / 'model.safetensors'}: {name}"), line
    line = complaint("label", unsound, rows, "--labels", "up", "down", "--out", tmp_path / "labelled.jsonl")
    assert line.startswith(f"{unsound / 'model.safetensors'}: {name}")
    line = complaint("compare", unsound, "--prompts", rows, "--out", tmp_path / "pairs.jsonl", "--max-new-tokens", 4)
    assert f"{unsound / 'model.safetensors'}: {name}" in line
    job = write_config(
        tmp_path / "run.toml", method="sft", out=str(tmp_path / "run"), model={"path": str(unsound)}, lora={"rank": 2},
        data={"train": str(write_rows(tmp_path / "chat.jsonl", CHAT)), "max_length": 64}, train={"epochs": 1},
    )  # fmt: skip
    assert f"{unsound / 'model.safetensors'}: {name}" in complaint("train", job)
    assert main(["train", str(job), f"model.path={base}", f"out={tmp_path / 'sound'}"]) == 0
    line = complaint("merge", unsound, tmp_path / "sound/adapter", tmp_path / "merged")
    assert line.startswith(f"{unsound / 'model.safetensors'}: {name}")
    assert not (tmp_path / "merged").exists()


def test_logits_that_are_no_numbers_of_sound_weights() -> None:
    from handtune.engine import generate

    model = gpt2()
    with torch.no_grad():
        model.embed.tokens.weight.fill_(3e38)
    with pytest.raises(FloatingPointError, match="the model's logits are not finite, though all weights are"):
        generate(model.eval(), torch.tensor([[1, 2]]), max_new_tokens=1, temperature=0)
