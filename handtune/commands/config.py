"""`handtune config`: the file of a run to be filled in, the methods, the models."""

import argparse

from ..reference.methods import PPO, PURPOSES
from ..reference.presets import presets
from ..reference.template import template


def run_config(options: argparse.Namespace) -> int:
    """`handtune config`: the file of a run of a method, or the methods that there are; with --presets, the models."""
    if options.presets and options.method is not None:
        raise ValueError("--presets lists the models whatever the method; give one of the two")
    if options.presets:
        print(presets(), end="")
    elif options.method is not None:
        print(template(options.method), end="")
    else:
        print("What can be learned:\n")
        for method, purpose in PURPOSES.items():
            print(f"  {method:<12}{purpose}")
        print(
            "\nNext: handtune config METHOD > run.toml writes a file to fill in; then handtune train run.toml"
            f"\n(for {PPO}: handtune ppo run.toml). handtune config --presets lists the models."
        )
    return 0
