"""What importing costs: nothing for the package and the command line's help, little beyond torch for the rest."""

import os
import subprocess
import sys
import time

from project import ROOT
from small_runs import CHAT, gpt2_folder, write_config, write_rows

TOUCH = (
    "import handtune.engine, handtune.models, handtune.kernels\n"
    "for package in (handtune.engine, handtune.models, handtune.kernels):\n"
    "    for name in package.__all__: getattr(package, name)\n"
)


def python(*arguments: str) -> tuple[str, float]:
    """Standard output of a fresh interpreter, which may keep what it compiled, and how many seconds it took."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command, start = [sys.executable, *arguments], time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=kept)
    assert done.returncode == 0, done.stderr
    return done.stdout, time.perf_counter() - start


def test_engine_and_models_cost_little_beyond_torch():
    """The processor time of each inside its own process, after torch; one of three tries is enough."""
    code = f"import time, torch\nstart = time.process_time()\n{TOUCH}print(time.process_time() - start)"
    assert any(float(python("-c", code)[0]) < 0.3 for _ in range(3))


def test_what_only_some_need_is_imported_by_them():
    heavy = ("transformers", "peft", "matplotlib", "jinja2", "tokenizers", "huggingface_hub", "triton", "pandas")
    code = f"{TOUCH}import sys\nprint([name for name in {heavy} if name in sys.modules])"
    assert python("-c", code)[0].strip() == "[]"


def test_commands_do_without_torch_s_compiler(tmp_path):
    """Importing it takes as long as torch itself. torch does so to draw weights on the meta device, among others."""
    base, out = {"path": str(gpt2_folder(tmp_path / "base"))}, str(tmp_path / "run")
    rows = str(write_rows(tmp_path / "rows.jsonl", CHAT))
    (tmp_path / "scores.py").write_text("def short(prompts, completions):\n    return [-len(c) for c in completions]\n")
    run = write_config(
        tmp_path / "run.toml", method="sft", out=out, model={**base, "quantize": "nf4"}, lora={"rank": 2},
        data={"train": rows}, train={"max_steps": 1},
    )  # fmt: skip
    policy = write_config(
        tmp_path / "ppo.toml", out=out + "-ppo", prompts=rows, reward="scores:short", model=base,
        ppo={"episodes": 2, "rollout_batch_size": 2, "batch_size": 2, "max_new_tokens": 2, "lora": {"rank": 2}},
    )  # fmt: skip
    fresh = write_config(
        tmp_path / "fresh.toml", method="sft", out=out + "-fresh", data={"train": rows},
        model={"preset": "gpt2", "tokenizer": f"{base['path']}/tokenizer.json"},
    )  # fmt: skip
    commands = [
        ["train", str(run)],
        ["generate", out, "--prompt", "x", "--max-new-tokens", "1"],
        ["ppo", str(policy)],
        ["check-data", str(fresh)],
    ]
    code = f"import os, sys\nos.chdir({str(tmp_path)!r})\nfrom handtune.cli import main\n"
    code += f"for command in {commands}: assert main(command) == 0\n"
    names = "'torch._dynamo', 'torch._inductor', 'sympy', 'handtune.engine.rlhf.run'"
    code += f"print([name for name in ({names}) if name in sys.modules])"
    assert python("-c", code)[0].splitlines()[-1] == "['handtune.engine.rlhf.run']"


def test_the_package_itself_imports_nothing():
    code = "import handtune, sys; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert python("-c", code)[0].strip() == "False False"


def test_help_answers_at_once_without_torch():
    """Beyond the start of a bare interpreter; best of five each."""
    bare = min(python("-c", "pass")[1] for _ in range(5))
    runs = [python("-m", "handtune", "--help") for _ in range(5)]
    assert min(seconds for _, seconds in runs) - bare < 0.2
    assert "train" in runs[0][0]
    code = (
        "import sys, runpy; sys.argv = ['handtune', '--help']\n"
        "try: runpy.run_module('handtune', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    assert python("-c", code)[0].strip().endswith("[]")
