"""A run on several processes ends with the bits of one: weights, metrics, checkpoints, result."""

import pytest
from divided_methods import MISTAKES, POLICIES, RUNS, VARIANTS, assert_same_left, divided, divided_policy, without_cell
from many_ranks import fork_server

CELLS = [(name, variant) for name in RUNS for variant in VARIANTS if without_cell(name, variant) is None]
QUICK = [("sft", "lora"), ("masked-lm", "gradual"), ("images", "full"), ("dpo", "nf4")]


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
