"""Files that lie elsewhere, by their URL: s3://bucket/rows.jsonl, gs://..., https://..., whatever fsspec can open.

A file is copied into this machine's cache before it is read, and once more where it has changed since. What a protocol
needs comes with its package (s3fs, gcsfs; aiohttp for https), which says, too, where it looks for credentials.
"""

import fcntl
import hashlib
import os
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from ..._files import flush_file, flush_folder
from ..._outside import hub_reason, others_code


def is_url(source: str | Path) -> bool:
    """Whether a source is named by a URL."""
    return "://" in str(source)


def local_path(source: str | Path) -> Path:
    """Where a source can be read on this machine: a path as it is, or the copy of a URL's file, which is made first.

    FileNotFoundError, with the reason, where the file can't be had.
    """
    if not is_url(source):
        return Path(source)
    url = str(source)
    with others_code(lambda error: _not_given(url, error)):
        from fsspec.core import url_to_fs

        system, path = url_to_fs(url)
        facts = system.info(path)
    # A query is no part of the file's name, but a bucket's names may hold its signs.
    name = PurePosixPath(urlsplit(path).path if url.startswith(("http:", "https:")) else path).name
    if facts["type"] != "file" or not name:
        raise FileNotFoundError(f"{url}: this is no file; give the URL of a single one")

    # Processes of this machine that need it at once wait for the first.
    version = sorted((key, str(value)) for key, value in facts.items())
    folder = _cache() / hashlib.sha256(f"{url} {version}".encode()).hexdigest()[:24]
    copy = folder / name
    if not copy.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not copy.exists():
                partial = folder / ".partial"
                with others_code(lambda error: _not_given(url, error)):
                    system.get_file(path, str(partial))
                flush_file(partial)
                partial.replace(copy)
                flush_folder(folder)
    return copy


def _cache() -> Path:
    """Where copies lie: in the folder that the system has for caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "handtune"


def _not_given(url: str, error: Exception) -> Exception:
    if isinstance(error, ImportError):
        return ValueError(f"{url}: its protocol needs a package that is not installed ({hub_reason(error)})")
    return FileNotFoundError(f"{url}: the file could not be fetched ({hub_reason(error)})")
