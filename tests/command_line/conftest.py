"""What several files of tests type commands on; each makes its own."""

from pathlib import Path

import pytest
from small_commands import workshop
from small_runs import bert_folder, gpt2_folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {"gpt2": gpt2_folder(folder / "gpt2"), "bert": bert_folder(folder / "bert")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return workshop(tmp_path_factory.mktemp("workshop"))
