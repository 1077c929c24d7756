"""A clone as some systems make it, without symbolic links, and the archive that is built of it."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from project import ROOT

pytestmark = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs git, and the repository"
)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is committed, and what is changed here, with text files in the place of links."""
    folder = tmp_path_factory.mktemp("clone") / "handtune"
    git = ["git", "-c", "core.symlinks=false", "-c", "advice.detachedHead=false"]
    subprocess.run([*git, "clone", "--quiet", "--shared", str(ROOT), str(folder)], check=True)
    changed = subprocess.run(
        ["git", "diff", "--name-only", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in changed.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes() if (ROOT / name).is_file() else b"")
    for package in ("engine", "models", "kernels"):
        assert (folder / "handtune" / package).is_file()
        assert not (folder / "handtune" / package).is_symlink()
    return folder


def test_it_is_imported_and_used(clone: Path) -> None:
    code = "from handtune.engine import train; from handtune.cli import main; print(train.__code__.co_filename)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=clone, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{clone / 'engine/training/loop.py'}\n"


def test_it_says_what_make_check_needs(clone: Path) -> None:
    (clone / ".venv").mkdir()
    (clone / ".venv" / ".installed").touch()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(["make", "check"], cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout == "make check needs symbolic links: git config core.symlinks true && git checkout -f\n"


def test_a_source_archive_holds_what_its_tests_need(clone: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=clone, capture_output=True, check=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        stored = {name.partition("/")[2] for name in archive.getnames()}

    listed = subprocess.run(["git", "ls-files", "-z"], cwd=clone, capture_output=True, text=True, check=True).stdout
    links = {f"handtune/{package}" for package in ("engine", "models", "kernels")}
    assert set(listed.strip("\0").split("\0")) - stored == {".ci/run", ".gitignore", *links}
