"""What the documents say is so: figures come from results, files that they name are there, links lead somewhere."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from project import ROOT

ROOMS = ("engine", "models", "kernels", "handtune", "benchmarks", "docs", "examples", "tests")


def script(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documents() -> list[Path]:
    return [path for folder in (ROOT, *(ROOT / room for room in ROOMS)) for path in sorted(folder.glob("*.md"))] + [
        *sorted((ROOT / "examples").glob("*/*.md"))
    ]


def test_tables_are_those_of_the_results() -> None:
    tables = script("benchmarks/tables.py")
    assert (ROOT / "benchmarks/README.md").read_text(encoding="utf-8") == tables.page()
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.with_table(front) == front
    assert "GPT-2 small" in tables.small()


def test_the_reading_path_is_today_s() -> None:
    """What the command imports, less what another path would be about, in fewer than 8,000 lines."""
    path = script("docs/reading_path.py")
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert path.with_list(page) == page
    files = path.files()
    assert {"engine/training/loop.py", "models/llama/model.py", "kernels/lora/linear_triton.py"} <= set(files)
    assert sum(len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in files) < 8000
    for places in path.ELSEWHERE.values():
        assert all((ROOT / place).exists() for place in places)


def test_the_table_of_architectures_is_today_s() -> None:
    """Each family has a row, and what is stated of it agrees with what its model is made of."""
    table = script("docs/architectures.py")
    assert (ROOT / "docs/architectures.md").read_text(encoding="utf-8") == table.page()
    assert {*table.STATED, *table.ALIKE} == set(table.FAMILIES)
    for row in table.rows():
        model_type, _, position, attention, _, _, _, file = row
        family = table.FAMILIES[model_type.strip("`")]
        configs = table.published_sizes(model_type.strip("`"))
        assert ("rotary" in position) == any("rope" in name or "theta" in name for name in vars(configs[0]))
        assert ("causal" in attention) == (family.is_decoder or family.title == "T5")
        assert (ROOT / file[2 : file.index("`]")]).is_file()


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def named_files() -> Iterator[tuple[Path, str]]:
    """Each file of code that a document, a docstring or a comment names in backticks."""
    sources = [path for room in ROOMS[:4] for path in sorted((ROOT / room).rglob("*.py"))]
    for path in [*documents(), *sources]:
        for name in re.findall(r"`([\w./-]+\.py)`", path.read_text(encoding="utf-8")):
            yield path, name


def test_files_that_are_named_are_there() -> None:
    there = [path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    ends = {"/".join(path.parts[-count:]) for path in there for count in range(1, len(path.parts) + 1)}
    missing = [f"{path.relative_to(ROOT)}: {name}" for path, name in named_files() if name not in ends]
    assert not missing


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
