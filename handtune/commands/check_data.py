"""`handtune check-data`: rows as a run would see them, and no weights."""

import argparse
import sys
import tempfile
from pathlib import Path

from ..adapted.policy import load_policy, policy_prompts
from ..adapted.starting import with_base
from ..config import PPORunConfig, RunConfig, from_table, read_table
from ..engine.rlhf.rollouts import fitting_prompts
from ..prepare import prepare, run_base
from ..reporting.token_display import distribution, legend, show
from ..terminal import print_unescaped


def run_check_data(options: argparse.Namespace) -> int:
    """`handtune check-data`: rows token by token, with the loss mask, and how often each class or tag occurs.

    For the file of `handtune ppo`, its prompts. The weights need not be there.
    """
    color = sys.stdout.isatty()
    table = read_table(options.config, options.override)
    if "prompts" in table:
        _check_prompts(with_base(from_table(PPORunConfig, table, options.config)), options.rows, color)
        return 0

    config: RunConfig = with_base(from_table(RunConfig, table, options.config))
    # A run would keep its tokenized corpus in its folder, which nothing has made here.
    with tempfile.TemporaryDirectory() as cache:
        ready = prepare(config, run_base(config, weights=False), Path(cache))
        # A reward model's examples are pairs like those of DPO, and its loss is on other tokens.
        encoding = "reward" if ready.objective.task == "reward" else ready.objective.encoding
        if encoding == "images":
            return 0  # the counts of each class have been printed, and every image has been decoded

        for split, examples in (("train", ready.examples), ("eval", ready.eval_examples)):
            if len(examples) and (counts := distribution(examples, encoding, ready.labels)):
                print(f"{split} {counts}")
        print(legend(encoding, color) + "\n")
        print_unescaped(show(ready.examples, ready.tokenizer, encoding, options.rows, color, ready.labels))
    return 0


def _check_prompts(config: PPORunConfig, count: int, color: bool) -> None:
    """Print the first prompts of a run token by token, as the policy will continue them; needs no weights."""
    model, tokenizer = load_policy(config, weights=False)
    prompts, _ = policy_prompts(config, model)
    max_new_tokens = config.ppo.max_new_tokens
    fitting = fitting_prompts(prompts, tokenizer, max_new_tokens, model.config.max_positions)
    lengths = [len(prompt.ids) for prompt in fitting]
    print(f"prompts: {len(fitting):,} of {min(lengths):,} to {max(lengths):,} tokens, room for {max_new_tokens:,} more",
          file=sys.stderr)  # fmt: skip

    print(legend("prompts", color) + "\n")
    examples = [{"input_ids": prompt.ids} for prompt in fitting]
    print_unescaped(show(examples, tokenizer, "prompts", count, color))
