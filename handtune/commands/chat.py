"""`handtune chat`: talk to a model, at the terminal or through a pipe."""

import argparse

from .._outside import located
from ..adapted.generator import generator_of
from ..conversation.session import Session, tell
from ..conversation.turns import Conversation
from ..engine.training.guards import explained_memory_error
from .generate import check_sampling


def run_chat(options: argparse.Namespace) -> int:
    """`handtune chat`: a question a line, answered as it is written, each with all that was said before."""
    check_sampling(options)
    generator = generator_of(options.model, options.adapter, options.dtype)
    with located(options.model):
        conversation = Conversation(
            generator, tell, system=options.system, max_new_tokens=options.max_new_tokens, seed=options.seed,
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, stop=options.stop,
            repetition_penalty=options.repetition_penalty, no_repeat_ngram=options.no_repeat_ngram,
        )  # fmt: skip

    # Keys and values of a long conversation are what may not fit.
    device = next(generator.model.parameters()).device
    with explained_memory_error(device, lambda: "/reset from time to time, or use --dtype bfloat16"):
        Session(conversation).run()
    return 0
