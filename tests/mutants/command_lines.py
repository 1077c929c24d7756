"""Damage for command lines: words left out, doubled and replaced, values that no option takes."""

import random

VALUES = (
    *("", " ", "-1", "0", "1", "2", "0.5", "nan", "inf", "-inf", "1e300", "1e-300", "1e400", "99999999999999999999"),
    *("9" * 5000, "x", "\x1b[31m", "\x00", "\udcff", ".", "nowhere", "/dev/zero", "/dev/null", "/nowhere/x", "a" * 300),
    *("{", "{text}", "{text.__class__}{label}", "{0}"),
)
WRITING = ("max-new-tokens", "temperature", "stop", "batch-rows", "seed", "dtype", "adapter")
FLAGS = {
    "generate": (*WRITING, "prompt", "prompts", "out", "top-k", "top-p", "beams", "length-penalty"),
    "label": ("labels", "template", "out", "adapter", "batch-rows", "dtype"),
    "compare": (*WRITING, "prompts", "pairs", "out", "repeat", "labeler"),
    "evaluate": ("data", "rouge"),
    "report": ("out",),
    "check-data": ("rows",),
    "merge": ("dtype",),
    "config": ("presets",),
}
FIELDS = (
    *("out", "name", "method", "model.path", "model.task", "model.dtype", "model.device", "model.labels"),
    *(
        "model.quantize",
        "model.add_tokens",
        "data.train",
        "data.eval",
        "data.max_length",
        "data.image_size",
        "lora.rank",
    ),
    *("lora.alpha", "lora.targets", "freeze.names", "train.lr", "train.batch_size", "train.max_steps", "train.seed"),
    *(
        "train.betas",
        "train.lr_scale",
        "train.unfreeze",
        "ppo.kl_coef",
        "ppo.group_size",
        "a.b.c",
        "train",
        "train.lr.x",
        "",
        ".",
    ),
)
FIELD_VALUES = (*VALUES, "[]", "{}", "[1, 'x']", "{'*' = nan}", "'''", "true", "1979-05-27", "[nan, 1.0]", "'.'")


def change_command(command: list[str], generator: random.Random) -> str:
    """Change a command in one way; says how."""
    at = generator.randrange(1, len(command))
    way = generator.choice(["drop", "double", "value", "option", "option", "option", "unknown"])
    if way == "drop":
        return f"without {command.pop(at)[:60]!r}"
    if way == "double":
        command.insert(at, command[at])
    elif way == "value":
        command[at] = generator.choice(VALUES)
    elif way == "unknown":
        command.insert(at, generator.choice(["--unknown", "--", "-n", "-x=1", "--debug", "--help", "--out"]))
    elif command[0] in ("train", "ppo", "check-data") and generator.random() < 0.9:
        at = len(command)
        command.append(f"{generator.choice(FIELDS)}={generator.choice(FIELD_VALUES)}")
    else:
        at = len(command)
        command.append(f"--{generator.choice(FLAGS.get(command[0], WRITING))}={generator.choice(VALUES)}")
    return f"{way} {command[at][:60]!r}"
