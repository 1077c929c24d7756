"""The command line's grammar: each command, an example of it, its arguments, and what these mean.

It imports nothing, so that `--help` answers at once.
"""

from typing import Any

Arguments = dict[str, dict[str, Any]]  # the settings of each argument, as `add_argument` takes them, by its names

# What several commands have; a command need not say it again, but may say it otherwise.
SHARED: Arguments = {
    "config": {"help": "the TOML file"},
    "override": {"nargs": "*", "default": [], "help": "a change to it, section.field=value"},
    "model": {"help": "a checkpoint's folder, GGUF file or hub id, or the folder of a run"},
    "--prompts": {"help": "a file of rows with a prompt, messages or a text each, or what its prompts are made of"},
    "--adapter": {"action": "append", "default": [], "metavar": "DIR", "help": "an adapter's folder, or its run's"},
    "--force": {"action": "store_true", "help": "replace a file that is there"},
    "--max-new-tokens": {"type": int, "default": 64, "help": "the most that a text may have (default 64)"},
    "--temperature": {"type": float, "help": "how freely it is sampled; 0: always the likeliest token (default 1)"},
    "--top-k": {"type": int, "default": 0, "help": "draw from the k likeliest tokens only (default 0: from all)"},
    "--top-p": {
        "type": float,
        "default": 1.0,
        "help": "draw from the likeliest that together have probability p (default 1)",
    },
    "--repetition-penalty": {
        "type": float,
        "default": 1.0,
        "help": "above 1, tokens that occur already are less likely (default 1)",
    },
    "--no-repeat-ngram": {
        "type": int,
        "default": 0,
        "help": "never write so many tokens in a row a second time (default 0: no limit)",
    },
    "--stop": {"action": "append", "default": [], "metavar": "TEXT", "help": "end at this text (may be repeated)"},
    "--batch-size": {"type": int, "default": 16, "help": "rows computed at once (default 16)"},
    "--seed": {"type": int, "default": 0, "help": "of what is drawn at random (default 0)"},
    "--dtype": {"default": "auto", "help": "of the weights: auto (as they are stored), float32 or bfloat16"},
}

# What each command does, an example, and its arguments in the order of its help.
GRAMMAR: dict[str, tuple[str, str, Arguments]] = {
    "config": (
        "Print a run's file to fill in, with every field and what it means; without METHOD, the methods.",
        "handtune config classify > run.toml",
        {
            "method": {"nargs": "?", "help": "what is to be learned"},
            "--presets": {"action": "store_true", "help": "list the models that a file can name"},
        },
    ),
    "train": (
        "Train as a TOML file says; the same command on the same folder resumes.",
        "handtune train run.toml train.lr=1e-4",
        {"config": {}, "override": {"help": "a change to it, like train.lr=1e-4"}},
    ),
    "check-data": (
        "Show the rows as the model will see them, and which tokens are in the loss.",
        "handtune check-data run.toml --rows 5",
        {
            "config": {},
            "override": {"help": "a change to it, like data.max_length=256"},
            "-n --rows": {"type": int, "default": 3, "help": "how many (default 3)"},
        },
    ),
    "evaluate": (
        "Evaluate a finished run on held-out rows.",
        "handtune evaluate runs/headlines --data more.csv",
        {
            "run": {"help": "the run's folder"},
            "--data": {"help": "another file of rows (default: the run's own held-out rows)"},
            "--rouge": {"action": "store_true", "help": "compare generated texts with the rows' answers, too"},
        },
    ),
    "compare": (
        "Collect comparisons of a model's own completions; the same command goes on.",
        "handtune compare runs/sft --prompts prompts.jsonl --out pairs.jsonl",
        {
            "model": {"nargs": "?"},
            "--prompts": {},
            "--pairs": {"help": "instead of a model: rows of prompt and completions, or chosen and rejected"},
            "--out": {"required": True, "help": "the comparisons (JSONL); the session lies beside it"},
            "--force": {"help": "replace a file at --out that is of no session"},
            "--terminal": {"action": "store_true", "help": "here, and not in a browser"},
            "--labeler": {"help": "module:function answers: (prompt, left, right) → left, right, tie or skip"},
            "--repeat": {"type": float, "default": 0.1, "help": "share of pairs shown twice (default 0.1)"},
            "--port": {"type": int, "default": 0, "help": "of the page, on 127.0.0.1 (default: any)"},
            "--adapter": {},
            "--max-new-tokens": {},
            "--temperature": {"default": 1.0},
            "--repetition-penalty": {},
            "--no-repeat-ngram": {},
            "--stop": {},
            "--batch-size": {},
            "--seed": {},
            "--dtype": {},
        },
    ),
    "generate": (
        "Continue prompts.",
        "handtune generate runs/sft --prompt 'In the beginning' --temperature 0",
        {
            "model": {},
            "--adapter": {"help": "an adapter's folder, or its run's; several: rows of --prompts name theirs"},
            "--prompt": {"action": "append", "help": "a prompt (may be repeated)"},
            "--prompts": {},
            "--raw": {"action": "store_true", "help": "continue the prompts as they are, past any template"},
            "--out": {"help": "write the rows with their answers (JSONL) here, to train on, instead of printing"},
            "--force": {},
            "--max-new-tokens": {},
            "--temperature": {"help": "0 is greedy (default 1, with beams 0)"},
            "--top-k": {},
            "--top-p": {},
            "--repetition-penalty": {},
            "--no-repeat-ngram": {},
            "--beams": {"type": int, "default": 1, "help": "look for the likeliest text with so many beams"},
            "--length-penalty": {"type": float, "help": "of beams: above 1 favours long texts (default 1)"},
            "--stop": {},
            "--batch-size": {},
            "--seed": {},
            "--dtype": {},
        },
    ),
    "chat": (
        "Talk to a model: a question a line, and /help among them lists what else can be typed.",
        "handtune chat runs/sft --system 'You answer in one sentence.'",
        {
            "model": {},
            "--adapter": {"help": "an adapter's folder, or its run's; of several, /adapter NAME chooses"},
            "--system": {"help": "what the conversation begins with: how the model should answer"},
            "--max-new-tokens": {"default": 512, "help": "of an answer (default 512)"},
            "--temperature": {"default": 0.7, "help": "0 is greedy (default 0.7)"},
            "--top-k": {},
            "--top-p": {},
            "--repetition-penalty": {},
            "--no-repeat-ngram": {},
            "--stop": {},
            "--seed": {},
            "--dtype": {},
        },
    ),
    "predict": (
        "Predict labels, entities, answers, embeddings or scores by a model with a head.",
        "handtune predict runs/headlines new.csv --out labelled.jsonl",
        {
            "model": {},
            "file": {
                "nargs": "?",
                "help": "rows in any format that train reads, labels or not; of a .txt file a text a line; an image, "
                "or a folder of them; - reads standard input, texts or JSON objects a line",
            },
            "--text": {"action": "append", "help": "a text (may be repeated)"},
            "--out": {"help": "write the rows with their predictions (JSONL) here instead of printing"},
            "--force": {},
            "--batch-size": {},
            "--dtype": {},
        },
    ),
    "ppo": (
        "Improve a model on rewards, as a TOML file says; the same command on the same folder resumes.",
        "handtune ppo ppo.toml ppo.kl_coef=0.05",
        {
            "config": {},
            "override": {"help": "a change to it, like ppo.kl_coef=0.05"},
            "--quiet": {"action": "store_true", "help": "show no samples"},
        },
    ),
    "label": (
        "Label texts by a causal model, with a confidence; people can review the least certain.",
        "handtune label MODEL texts.jsonl --labels good bad --out labels.jsonl --sort",
        {
            "model": {},
            "data": {"help": "a file of rows with a text, or a .txt file, a text a line"},
            "--labels": {"nargs": "+", "required": True, "help": "names, or name=words: what stands for each"},
            "--template": {"default": "{text}\\n{label}", "help": r"a sentence (default {text}\n{label})"},
            "--raw": {"action": "store_true", "help": "put the sentence to the model as it is, past a chat template"},
            "--out": {"required": True, "help": "rows of text, label, confidence and second (JSONL)"},
            "--force": {},
            "--sort": {"action": "store_true", "help": "the least certain first"},
            "--adapter": {},
            "--batch-size": {},
            "--dtype": {},
        },
    ),
    "merge": (
        "Write a plain checkpoint of what a run has trained, or of a base with an adapter merged into it.",
        "handtune merge runs/sft merged --dtype bfloat16",
        {
            "model": {"help": "the base: a folder or hub id; or a run's folder"},
            "adapter": {
                "nargs": "?",
                "help": "the adapter's folder, or its run's (a run that is the model has its own)",
            },
            "out": {"help": "where the merged checkpoint goes"},
            "--dtype": {
                "default": None,
                "help": "of the written weights: float32, bfloat16 or float16 (default: the base's)",
            },
        },
    ),
    "report": (
        "Compare runs in a table and in one self-contained HTML page.",
        "handtune report runs/a runs/b --out report.html",
        {
            "runs": {"nargs": "+", "help": "run folders"},
            "-o --out": {"default": "report.html", "help": "the page (default report.html)"},
            "--force": {"help": "replace a file that is no page of handtune's"},
            "--watch": {
                "action": "store_true",
                "help": "while a run goes on, keep the page up to date: it reloads itself",
            },
        },
    ),
}
