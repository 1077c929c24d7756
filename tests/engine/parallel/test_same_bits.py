"""A run on several processes ends with the bits of one: weights, metrics, checkpoints, result."""

import random
import time

import pytest
from divided_methods import (
    MISTAKES,
    POLICIES,
    RUNS,
    VARIANTS,
    assert_same_left,
    configuration,
    divided,
    divided_policy,
    in_process,
    typed,
    without_cell,
)
from many_ranks import fork_server, on_ranks, one_is_killed
from small_runs import logged

CELLS = [(name, variant) for name in RUNS for variant in VARIANTS if without_cell(name, variant) is None]
KILLS = 25  # of each of two runs
QUICK = [("sft", "lora"), ("images", "full")]


@pytest.fixture(scope="module", autouse=True)
def processes():
    with fork_server("divided_methods"):
        yield


@pytest.mark.parametrize(("name", "variant"), QUICK)
def test_a_method_on_three_processes(name, variant, tmp_path) -> None:
    alone = divided(name, variant, 1, tmp_path / "1")
    assert_same_left(alone, divided(name, variant, 3, tmp_path / "3"))


def test_a_policy_on_three_processes(tmp_path) -> None:
    alone = divided_policy("ppo", 1, tmp_path / "1")
    assert_same_left(alone, divided_policy("ppo", 3, tmp_path / "3"))


@pytest.mark.deep
@pytest.mark.parametrize(("variant", "shard"), [("lora", "none"), ("nf4", "full")])
def test_killed_at_random_moments_and_resumed_by_other_numbers(variant, shard, tmp_path) -> None:
    """Of 1 to 4 processes one dies, wherever it is; the others notice, and the next ones go on from what is stored."""
    settings = {"epochs": 200, "save_every": 1, "eval_every": 7, "best": "last"}
    alone = divided("sft", variant, 1, tmp_path / "alone", **settings)
    steps = len([row for row in logged(alone) if "loss" in row])

    # So long that all lives together come near the end of the run, on whatever machine.
    seconds = {}
    for n_steps in (1, 21):
        started = time.monotonic()
        divided("sft", variant, 3, tmp_path / f"{n_steps}", shard=shard, **settings, max_steps=n_steps)
        seconds[n_steps] = time.monotonic() - started
    a_step = (seconds[21] - seconds[1]) / 20
    longest = 0.8 * (seconds[1] + steps * a_step / KILLS)

    config = configuration("sft", variant, tmp_path / "kills", shard, **settings)
    generator = random.Random(5)
    n_killed = 0
    for life in range(KILLS):
        n = generator.randint(1, 4) if shard == "none" else generator.randint(2, 4)
        victim, after = generator.randrange(n), generator.uniform(0.5 * seconds[1], longest)
        folder = tmp_path / f"life-{life}"
        if not one_is_killed(n, folder, victim, after, in_process, "train", str(config)):
            break
        n_killed += 1
    assert len([row for row in logged(tmp_path / "kills/run") if "loss" in row]) > steps // 20
    assert n_killed > KILLS // 2
    on_ranks(3, tmp_path / "end", in_process, "train", str(config))
    assert_same_left(alone, tmp_path / "kills/run")


@pytest.mark.deep
def test_what_is_written_and_predicted_on_three_processes(tmp_path) -> None:
    """Texts and predictions in their order, batch by batch; the first process alone prints them, or writes a file."""
    for name, arguments in {
        "sft": ["generate", "--temperature", "1", "--max-new-tokens", "6"],
        "classify": ["predict"],
        "tag": ["evaluate"],
    }.items():
        run = divided(name, "lora", 1, tmp_path / name)
        rows = str(tmp_path / name / "rows.jsonl")
        source = {"generate": ["--prompts", rows], "predict": [rows], "evaluate": []}[arguments[0]]
        batches = [] if name == "tag" else ["--batch-size", "2"]
        command = [arguments[0], str(run), *source, *arguments[1:], *batches]
        alone, *_ = on_ranks(1, tmp_path / f"{name}-1", typed, command)
        assert len(alone) > 20
        assert on_ranks(3, tmp_path / f"{name}-3", typed, command) == [alone, "", ""]
        if name != "tag":
            for n in (1, 3):
                out = tmp_path / f"{name}-{n}.jsonl"
                on_ranks(n, tmp_path / f"{name}-out-{n}", typed, [*command, "--out", str(out)])
            assert (tmp_path / f"{name}-1.jsonl").read_bytes() == (tmp_path / f"{name}-3.jsonl").read_bytes()


@pytest.mark.deep
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake, tmp_path) -> None:
    alone = divided("sft", "lora", 1, tmp_path / "1")
    other = divided("sft", "lora", 3, tmp_path / "3", mistake)
    with pytest.raises(AssertionError):
        assert_same_left(alone, other)


@pytest.mark.deep
@pytest.mark.parametrize(("name", "variant"), CELLS)
def test_every_method_on_any_number_of_processes(name, variant, tmp_path) -> None:
    alone = divided(name, variant, 1, tmp_path / "1")
    for n in (2, 3, 4):
        assert_same_left(alone, divided(name, variant, n, tmp_path / str(n)))


@pytest.mark.deep
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_on_any_number_of_processes(name, tmp_path) -> None:
    alone = divided_policy(name, 1, tmp_path / "1")
    for n in (2, 3, 4):
        assert_same_left(alone, divided_policy(name, n, tmp_path / str(n)))
