"""The other side of sft_peers.py: TRL's trainers, in an environment of their own, on the same rows and settings."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    work, spec, *rest = sys.argv[1:]
    settings = json.loads(Path(spec).read_text())
    {"sft": sft, "grpo": grpo, "judge": judge}[work](settings, *rest)


def base(settings: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(settings["model"], dtype=getattr(torch, settings["dtype"]))


def rows_of(settings: dict[str, Any], name: str) -> list[dict[str, Any]]:
    lines = (Path(settings["folder"]) / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    dialogues = [json.loads(line)["messages"] for line in lines]
    return [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in dialogues]


class Clock(transformers.TrainerCallback):
    """Writes the seconds of each step, and each evaluation, as our runs do."""

    def __init__(self, out: str) -> None:
        Path(out).mkdir(parents=True, exist_ok=True)
        self.path = Path(out) / "metrics.jsonl"
        self.started = time.perf_counter()

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def on_step_begin(self, *arguments: Any, **more: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        self.write({"tokens": 1, "tokens_per_second": 1 / (time.perf_counter() - self.started)})

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **more: Any) -> None:
        self.write({"eval": {"loss": metrics["eval_loss"]}})


def sft(settings: dict[str, Any], out: str) -> None:
    options = settings["sft"]
    train = rows_of(settings, "train")

    class InOrder(trl.SFTTrainer):
        """Sees its rows in the order in which they are given."""

        def _get_train_sampler(self, *arguments: Any, **more: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    config = trl.SFTConfig(
        output_dir=out, num_train_epochs=1, per_device_train_batch_size=options["batch_size"],
        gradient_accumulation_steps=1, learning_rate=options["lr"], lr_scheduler_type="linear", warmup_steps=0,
        weight_decay=0.0, max_length=options["max_length"], gradient_checkpointing=False, report_to=[], use_cpu=True,
        bf16=settings["dtype"] == "bfloat16", save_strategy="no", eval_strategy="epoch", logging_steps=1000,
    )  # fmt: skip
    trainer = InOrder(
        model=PeftModel.from_pretrained(base(settings), settings["start"], is_trainable=True), args=config,
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        train_dataset=Dataset.from_list([train[i] for i in settings["order"]]),
        eval_dataset=Dataset.from_list(rows_of(settings, "eval")), callbacks=[Clock(out)],
    )  # fmt: skip
    trainer.train()
    trainer.model.save_pretrained(out)


def grpo(settings: dict[str, Any], out: str) -> None:
    options = settings["grpo"]
    sys.path.insert(0, settings["folder"])
    from judges import about_twenty_words

    clock = Clock(out)
    ends: list[float] = []
    scores: list[float] = []

    class Rounds(transformers.TrainerCallback):
        """Writes how long each round took: what ours counts as a round, from its prompts to its last update."""

        def on_step_begin(self, *arguments: Any, **more: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            clock.write({"round_seconds": time.perf_counter() - ends[-1], "score": scores[-1]})

    def reward(prompts: Any, completions: Any, **more: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        found = about_twenty_words(prompts, texts)
        scores.append(sum(found) / len(found))
        return found

    config = trl.GRPOConfig(
        output_dir=out, max_steps=options["rounds"], per_device_train_batch_size=options["completions"],
        gradient_accumulation_steps=1, num_generations=options["group"], num_iterations=1,
        max_completion_length=options["new_tokens"], learning_rate=options["lr"], lr_scheduler_type="linear",
        warmup_steps=0, weight_decay=0.0, beta=options["kl"], temperature=1.0, gradient_checkpointing=False,
        report_to=[], use_cpu=True, bf16=settings["dtype"] == "bfloat16", save_strategy="no", logging_steps=1000,
    )  # fmt: skip
    lora = LoraConfig(r=settings["rank"], lora_alpha=settings["rank"], target_modules=PROJECTIONS)
    trainer = trl.GRPOTrainer(
        model=base(settings), args=config, processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        reward_funcs=reward, peft_config=lora, callbacks=[Rounds()],
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows_of(settings, "train")]),
    )  # fmt: skip
    trainer.train()


def judge(settings: dict[str, Any], *adapters: str) -> None:
    """Print the mean loss of the held-out answers' tokens under each adapter, by transformers and PEFT alone."""
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    examples = []
    for row in rows_of(settings, "eval"):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        # To the end of the turn: the line end behind it is written by nobody.
        stop = len(whole) - whole[::-1].index(tokenizer.eos_token_id)
        examples.append((len(prompt), torch.tensor([whole[:stop][: settings["sft"]["max_length"]]])))

    losses = []
    for adapter in adapters:
        model = PeftModel.from_pretrained(base(settings), adapter).eval()
        total = count = 0.0
        for n_prompt, ids in examples:
            with torch.no_grad():
                logits = model(ids).logits[0, n_prompt - 1 : -1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, n_prompt:], reduction="sum"))
            count += len(ids[0]) - n_prompt
        losses.append(total / count)
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps({"losses": losses, "versions": versions}))


if __name__ == "__main__":
    main()
