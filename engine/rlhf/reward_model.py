"""Reward models: what scores a completion, and the checks on whatever does.

A reward is any callable: `reward(prompts, completions)` gives a number for each completion, and so does
`reward(prompts, completions, rows)`, which gets what else is known of each prompt. `Reward` is a model trained
on comparisons (`method = "reward"`), on a base of its own or on a policy's, where it costs an adapter and a head. Its
score is read at the last token of prompt and completion (in front of eos, where eos is the pad token, too), and shifted
and scaled so that the reference policy's own samples have mean 0 and standard deviation 1 (Ziegler et al. 2019,
arXiv:1909.08593, section 2.1): Bradley and Terry's loss leaves both open, and β and value function are easier to choose
for scores of that size.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._files import read_json, write_json
from ..._folders import filling
from ..adapters.config import is_finite
from ..adapters.lora import active_adapter
from ..adapters.switch import adapter_names, set_adapter, use_adapter
from ..chat.ends import turn_end
from ..chat.template import ChatTemplate
from ..data.batches import packed, to_device
from ..data.text import append_eos, tokenize_pairs
from ..peft.format import CONFIG, load_adapter, read_adapter, save_adapter
from ..runtime import in_eval_mode
from .rollouts import chunks
from .shared_base import with_head

RewardFn = Callable[..., Any]  # (prompts, completions), or (prompts, completions, rows)
ADAPTER = "reward"  # the name of its adapter on a shared base
SCALE = "reward.json"  # the file of shift and scale
ROWS = 16  # scored at a time


class Reward:
    """A reward model: `model` of the task "reward", with the adapter called "reward" if it stands on a shared base.

    Called with texts, prompts and completions, or with their token ids, it gives the scores (B,), `scale` × the head's
    output + `shift` (None: not normalised yet). Texts get the end token behind them; token ids have it, if they ended.
    """

    def __init__(self, model: Any, tokenizer: Any = None, shift: float = 0.0, scale: float | None = None):
        self.model = model
        self.tokenizer = tokenizer
        self.shift = shift
        self.scale = scale

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Tensor:
        pairs = list(zip(prompts, completions, strict=True))
        if isinstance(prompts[0], str):
            rows = self._tokens(pairs)
        else:
            rows = [[*prompt, *completion] for prompt, completion in pairs]

        device = next(self.model.parameters()).device
        return torch.cat([self.score(to_device(packed(part), device)) for part in chunks(rows, ROWS)])

    def _tokens(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        """The token ids of texts, as `pairs` in `tasks/preferences.py` makes them in training."""
        if self.tokenizer is None:
            raise ValueError("a reward model without a tokenizer was given texts: Reward(model, tokenizer)")
        tokens = self.model.tokens
        template = chat_end = None
        if tokens.chat_template is not None:
            template = ChatTemplate(tokens.chat_template, **tokens.names)
            chat_end = turn_end(template, self.tokenizer)

        rows = []
        for (prompt, _), (ids, start) in zip(pairs, tokenize_pairs(self.tokenizer, pairs), strict=True):
            # After a prompt that the template wrote, its own end of a turn, even where no earlier turn shows one.
            ends = (tokens.eos_id, tokens.ends[1:])
            if template is not None and chat_end is not None and template.has_rendered(prompt):
                ends = (chat_end, ())
            rows.append(append_eos(ids, start, *ends))
        return rows

    @torch.no_grad()
    def score(self, inputs: dict[str, Any], **hidden_arguments: Any) -> Tensor:
        """The scores (B,) of packed rows, in fp32. `hidden_arguments`: what `hidden` takes besides."""
        adapter = use_adapter(self.model, ADAPTER) if ADAPTER in adapter_names(self.model) else nullcontext()
        # 6 in `round.py`: the head reads the last token that isn't padding.
        with in_eval_mode(self.model), adapter:
            states = self.model.hidden(**inputs, **hidden_arguments)  # (1, tokens, D)
            pooled = self.model.pool(states, inputs["input_ids"], None, inputs["cu_seqlens"])  # (B, D)
            outputs = self.model.head(pooled)  # (B,)

        scores = outputs.float()
        if self.scale is not None:
            scores = scores * self.scale
        return scores + self.shift

    def on(self, policy: Any) -> bool:
        """Whether it stands on the policy's base."""
        return self.model.embed is policy.embed

    def normalize(self, prompts: Sequence[Any], completions: Sequence[Any]) -> None:
        """8: choose shift and scale for mean 0 and standard deviation 1 on these, samples of the reference policy.

        ValueError where all of them score the same.
        """
        # Scores of the head alone
        self.shift = 0.0
        self.scale = None
        scores = self(prompts, completions).double()
        spread = float(scores.std(correction=0))
        if not spread > 0:
            raise ValueError(f"the reward model gives all {len(scores)} samples the same score, {float(scores[0]):.4g}")

        self.shift = -float(scores.mean()) / spread
        self.scale = 1 / spread

    def save(self, path: str | Path) -> None:
        """Write its adapter, head and normalisation to the folder `path`; `load_reward` reads it back."""
        with filling(path, CONFIG) as folder:
            save_adapter(self.model, folder, ADAPTER)
            write_json(folder / SCALE, {"shift": self.shift, "scale": self.scale})


def load_reward(policy: Any, path: str | Path, tokenizer: Any = None) -> Reward:
    """The reward model whose adapter lies in the folder `path`, on the base of `policy`, a causal language model.

    Call it before `ppo`; the policy's active adapter stays active. Raises as `load_adapter`, and ValueError where the
    folder has no head, or has more than an adapter and a head: what else was trained would change the policy.
    """
    model = with_head(policy, "reward")
    stored = read_adapter(model, path)

    # Nothing is missing of the head, and nothing comes with it that policy and reward model share.
    head_keys = {source.names[0] for key, source in model.key_map().items() if key.startswith("head.")}
    if missing := sorted(head_keys - stored.plain.keys()):
        raise ValueError(
            f'{path}: there is no {missing[0]}, the head of a reward model; train one with method = "reward"'
        )
    shared = ["token rows"] if stored.rows else sorted(stored.plain.keys() - head_keys)
    if shared:
        raise ValueError(f"{path} brings {shared[0]}, which would change the policy, too; train adapter and head alone")

    # Shift and scale as `Reward.save` wrote them
    scale_file = Path(path) / SCALE
    normalization = read_json(scale_file) if scale_file.exists() else {}
    for field, value in normalization.items():
        if not is_finite(value) and (field, value) != ("scale", None):
            raise ValueError(
                f"{scale_file}: {field} = {value!r}; expected a finite number, train the reward model again"
            )

    # Off the whole policy, whose head is none of the reward model's modules, and back on it.
    active = active_adapter(policy)
    set_adapter(policy, None)
    load_adapter(model, path, ADAPTER)
    model.requires_grad_(False)
    set_adapter(policy, active)
    return Reward(model, tokenizer, **normalization)


def asks_for_rows(reward: RewardFn) -> bool:
    """Whether a reward has a parameter `rows`."""
    try:
        return "rows" in inspect.signature(reward).parameters
    except ValueError:  # a function in C has no signature that could be read
        return False


def checked_scores(
    reward: RewardFn, prompts: Sequence[Any], completions: Sequence[Any], rows: Sequence[Any] = ()
) -> Tensor:
    """The scores (B,) that a reward gives, in fp32. ValueError where they are not one finite number a completion."""
    result = reward(prompts, completions, rows=rows) if asks_for_rows(reward) else reward(prompts, completions)
    try:
        values = result.detach() if isinstance(result, Tensor) else list(result)
        scores = torch.as_tensor(values, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the reward must give a number for each completion, not {result!r:.60}") from error

    if scores.shape != (len(completions),):
        raise ValueError(f"the reward gave {tuple(scores.shape)} for {len(completions)} completions; give one for each")
    if not scores.isfinite().all():
        bad = int((~scores.isfinite()).nonzero()[0])
        raise ValueError(f"the reward of completion {bad + 1}, {completions[bad]!r:.60}, is {float(scores[bad])}")
    return scores
