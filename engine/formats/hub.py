"""Data sets of the hub, of which the Parquet files are read: `owner/name:split`, of one that is not on disk.

    owner/name                    a data set that has one split
    owner/name:train              one of its splits
    owner/name:sst2/train         a split of one of its configurations
    owner/name@REVISION:train     as it was at a commit, in a branch, under a tag

Which files make up which split says the data set's card (its field `configs`), or their names: data/train-*.parquet.
Where the main branch has no Parquet, the hub's own conversion is read, the branch refs/convert/parquet, whose files lie
in configuration/split/ (`partial-train` where the hub has converted the first part only).

What was downloaded stands in the hub's cache, and is read from there without the network, or with HF_HUB_OFFLINE=1.
Beside it stands the list of all files, by which a part that was not downloaded is missed.
"""

import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..._files import read_json, write_json
from ..._outside import hub_reason, others_code

CONVERTED = "refs/convert/parquet"
CARD = "README.md"
_ID = re.compile(
    r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>\w[\w./-]*))?(:((?P<config>[^/:]+)/)?(?P<split>[\w.-]+))?"
)
# The names by which files are taken for a split, where no card says it.
_SPLIT_WORDS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip

Splits = dict[str, list[str]]  # the files of each split


class DatasetId(NamedTuple):
    """What is to be read of a data set on the hub."""

    repository: str  # "owner/name"
    revision: str | None  # a commit, branch or tag; None: the newest commit
    config: str | None
    split: str | None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        parts = [part for part in (self.config, self.split) if part is not None]
        return f"{self.repository}{revision}{':' if parts else ''}{'/'.join(parts)}"


def dataset_id(text: str) -> DatasetId | None:
    """What a text means as the id of a data set; None where it is none."""
    match = _ID.fullmatch(text)
    return DatasetId(**match.groupdict()) if match else None


def pinned(dataset: DatasetId) -> DatasetId:
    """The same at the commit that it is at now. Raises as `dataset_files`."""
    folder, _ = dataset_files(dataset)
    return dataset._replace(revision=folder.name)


def dataset_files(dataset: DatasetId) -> tuple[Path, list[Path]]:
    """The folder of a data set in the hub's cache, which is named after the commit, and its Parquet files there.

    They are downloaded first. Raises FileNotFoundError where there is no such data set, or the hub does not give it,
    and ValueError where it isn't clear which part of it is meant.
    """
    revision = dataset.revision
    listed = _listed(dataset, revision)
    if not any(map(_is_parquet, listed)) and revision is None:
        revision = CONVERTED
        listed = _listed(dataset, revision)
    names = sorted(filter(_is_parquet, listed))
    if not names:
        raise FileNotFoundError(f"{dataset}: no Parquet files there; download the data set, and name its files")

    configs: dict[str, Splits] = {}
    if CARD in listed:
        configs = _by_card(_download(dataset, revision, [CARD]) / CARD, names)
    chosen = _chosen(dataset, configs or _by_names(names))
    folder = _download(dataset, revision, chosen)
    missing = [name for name in chosen if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{dataset}: the hub's cache lacks {missing[0]}; go online once")
    return folder, [folder / name for name in chosen]


class _Unreachable(Exception):
    """The hub can't be asked, so that what its cache holds has to do."""


def _is_parquet(name: str) -> bool:
    return name.endswith(".parquet")


def _listed(dataset: DatasetId, revision: str | None) -> list[str]:
    """The files of a revision, none where there is no such one; where the hub can't be reached, those in its cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    def explain(error: Exception) -> Exception:
        if isinstance(error, RevisionNotFoundError):
            return error
        if isinstance(error, RepositoryNotFoundError):
            return _not_given(dataset, error)
        return _Unreachable(error)

    try:
        with others_code(explain):
            info = HfApi().dataset_info(dataset.repository, revision=revision)
        names = [file.rfilename for file in info.siblings or []]
        listing = _listing(dataset, str(info.sha))
        if not listing.is_file():
            with suppress(OSError):  # a cache that others fill may be read only
                listing.parent.mkdir(parents=True, exist_ok=True)
                write_json(listing, names)
        return names
    except RevisionNotFoundError:
        if dataset.revision is not None:
            raise FileNotFoundError(f"{dataset}: no such revision on the hub; name a commit, branch or tag") from None
        return []
    except _Unreachable:
        try:
            folder = _download(dataset, revision, [CARD], offline=True)
        except FileNotFoundError:
            if revision is None:  # what was downloaded may be of the conversion
                return []
            raise
        listing = _listing(dataset, folder.name)
        if listing.is_file():
            return [str(name) for name in read_json(listing, list)]
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        n = sum(map(_is_parquet, names))
        print(f"{dataset}: without the hub, known by the {n} Parquet files that its cache holds", file=sys.stderr)
        return names


def _listing(dataset: DatasetId, commit: str) -> Path:
    """The file beside a data set's files in the hub's cache that names all files of a commit, downloaded or not."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=dataset.repository, repo_type="dataset")
    return folder / "handtune" / f"{commit}.json"


def _download(dataset: DatasetId, revision: str | None, names: list[str], offline: bool = False) -> Path:
    """The folder in the hub's cache that holds a revision, with these files as far as the revision has them."""
    from huggingface_hub import snapshot_download

    # The names are patterns there, in which a bracket stands for itself in brackets only.
    patterns = [re.sub(r"[*?[]", r"[\g<0>]", name) for name in names]
    with others_code(lambda error: _not_given(dataset, error)):
        folder = snapshot_download(
            dataset.repository, repo_type="dataset", revision=revision, allow_patterns=patterns,
            local_files_only=offline,
        )  # fmt: skip
    return Path(folder)


def _not_given(dataset: DatasetId, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(f"{dataset}: no such path, and the hub did not give the data set ({hub_reason(error)})")


def _by_card(card: Path, names: list[str]) -> dict[str, Splits]:
    """The files of each configuration's splits, as the data set's card tells; empty where it names none."""
    from huggingface_hub.repocard import metadata_load

    with others_code(lambda error: ValueError(f"{card}: its head is no YAML ({hub_reason(error)})")):
        metadata = metadata_load(card)
    entries = (metadata or {}).get("configs")
    configs: dict[str, Splits] = {}
    for entry in entries if isinstance(entries, list) else []:
        match entry:
            case {"config_name": str(config), "data_files": data_files}:
                splits = _by_patterns(data_files, names)
            case {"config_name": str(config), "data_dir": str(folder)}:
                inside = f"{folder.strip('./')}/".lstrip("/")  # "." is the whole
                splits = _by_split_words([name for name in names if name.startswith(inside)])
            case _:
                continue
        configs[config] = splits
    is_of_parquet = any(files for splits in configs.values() for files in splits.values())
    return configs if is_of_parquet else {}


def _by_patterns(data_files: Any, names: list[str]) -> Splits:
    """The files that a card's patterns match: one, a list, or a list with the split of each."""
    from fsspec.utils import glob_translate

    entries = data_files if isinstance(data_files, list) else [data_files]
    splits: Splits = {}
    for entry in entries:
        match entry:
            case {"split": str(split), "path": path}:
                patterns = path if isinstance(path, list) else [path]
            case _:
                split = "train"
                patterns = [entry]
        for pattern in patterns:
            is_meant = re.compile(glob_translate(str(pattern).removeprefix("./"))).match
            splits.setdefault(split, []).extend(filter(is_meant, names))
    return splits


def _by_names(names: list[str]) -> dict[str, Splits]:
    """The files of each configuration's splits, as their names tell."""
    parts = [name.split("/") for name in names]
    if all(len(part) == 3 and re.fullmatch(r"\d{4,}\.parquet", part[2]) for part in parts):
        configs: dict[str, Splits] = {}
        for (config, split, _), name in zip(parts, names, strict=True):
            configs.setdefault(config, {}).setdefault(split, []).append(name)
        return configs
    return {"default": _by_split_words(names)}


def _by_split_words(names: list[str]) -> Splits:
    splits: Splits = {}
    for name in names:
        stem = name.rpartition("/")[2].removesuffix(".parquet")
        if shard := re.fullmatch(r"(\w[\w.]*)-\d{5}-of-\d{5}(-\w+)?", stem):  # as `push_to_hub` names them
            split = shard[1]
        else:
            words = re.split(r"[\W_\d]+", name.removesuffix(".parquet").lower())
            split = next((_SPLIT_WORDS[word] for word in reversed(words) if word in _SPLIT_WORDS), "train")
        splits.setdefault(split, []).append(name)
    return splits


def _chosen(dataset: DatasetId, configs: Mapping[str, Splits]) -> list[str]:
    """The files that the id means. ValueError, with the choices, where it leaves open which, or there are no such."""
    config = dataset.config or ("default" if "default" in configs else next(iter(configs)))
    if dataset.config is None and len(configs) > 1 and config != "default":
        example = dataset._replace(config=config, split=dataset.split or "train")
        raise ValueError(f"{dataset}: which of its configurations? Write {example} or another ({', '.join(configs)})")
    if config not in configs:
        raise ValueError(f"{dataset}: there is no configuration {config!r}; there are {', '.join(configs)}")

    # Without the network only those are known that were downloaded before.
    if not any(configs[config].values()):
        raise FileNotFoundError(f"{dataset}: no Parquet files of it are there; go online once, or name another part")
    splits = {split: configs[config][split] for split in sorted(configs[config], key=lambda split: split != "train")}
    split = dataset.split or next(iter(splits))
    if dataset.split is None and len(splits) > 1:
        example = dataset._replace(split=split)
        raise ValueError(f"{dataset}: which of its splits? Write {example} or another ({', '.join(splits)})")
    if split not in splits:
        raise ValueError(f"{dataset}: there is no split {split!r}; there are {', '.join(splits)}")

    names = sorted(set(splits[split]))
    if not names:
        raise FileNotFoundError(f"{dataset}: no Parquet files of it are there; go online once, or name another part")
    shards = re.search(r"-of-(\d{5})", names[0])
    if shards and len(names) != int(shards[1]):
        raise FileNotFoundError(f"{dataset}: {len(names)} of its {int(shards[1])} files are there; go online once")
    return names
