"""From a name to a local folder: a path as it is, or a download from the Hugging Face hub of just the files needed.

Where things are cached, the token and the offline switch are huggingface_hub's own business (HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE). What is added here: less to download, SHA-256 of what was, and one line when it fails.
"""

import errno
import glob
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd.checkpoints.autoencoder import SUBFOLDERS, find_autoencoder, read_config
from fastsd.checkpoints.file_bytes import file_sha256
from fastsd.checkpoints.folder import CONFIG_FILES, read_layout
from fastsd.checkpoints.weight_files import COMPONENTS, choose, choose_all, choose_local, open_weights, remote_files
from fastsd.errors import CheckpointError, HubError
from fastsd.wording import shown

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

logger = logging.getLogger("fastsd")

SMALL_FILES = (
    "model_index.json",
    *CONFIG_FILES.values(),
    *(
        f"tokenizer/{name}"
        for name in (
            "tokenizer.json",
            "vocab.json",
            "merges.txt",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
        )
    ),
)

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class _Source:
    """One revision of one repository, and how to ask for it."""

    repo_id: str
    revision: str | None
    token: str | bool | None
    cache_dir: Path | None
    local_files_only: bool

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id} at {shown(self.revision)}"


def resolve(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """A local folder as it is (never touches the network); otherwise a hub id `owner/name`, downloaded or cached.

    Of a repository only the JSON, the tokenizer and one set of safetensors are fetched: `variant`'s, or without one the
    plain files, else the only variant (as `open_folder` chooses). The configs come first, so another architecture costs
    no gigabytes. The commit that a branch or tag stood for is logged (logger "fastsd").

    Raises CheckpointError if there is no such folder or it is not a model fastsd runs, HubError if the hub does not
    give it: offline and not cached, unauthorised, gated, unknown repository or revision, or a broken download.
    """
    source = _local_or_source(name_or_path, revision, token, cache_dir, local_files_only)
    if isinstance(source, Path):
        return source
    folder = _fetch_configs(source, SMALL_FILES)
    _check_layout(source, folder)
    _fetch_weights(
        source, folder, lambda listing: _needed(source, listing, variant), lambda: choose_local(folder, variant, False)
    )
    return folder


def resolve_autoencoder(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The same for an autoencoder alone: of a repository the folder that holds it, its root or vae/ or vqvae/, and that only."""
    source = _local_or_source(name_or_path, revision, token, cache_dir, local_files_only)
    if isinstance(source, Path):
        return source
    root = _fetch_configs(source, tuple(f"{name}/config.json".lstrip("/") for name in SUBFOLDERS))
    try:
        folder = find_autoencoder(root)
        read_config(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    start = "" if folder == root else f"{folder.name}/"

    def needed(listing: "list[RepoFile]") -> "Iterator[RepoFile]":
        by_name = {file.path[len(start) :]: file for file in listing if file.path.rpartition("/")[0] == start[:-1]}
        for name in _remote(source, by_name, variant):
            yield by_name[name]

    _fetch_weights(source, root, needed, lambda: open_weights(folder, "vae", variant, False))
    return folder


def resolve_file(
    repo_id: str,
    choose: Callable[[Sequence[str]], str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """One file at the top of a hub repository, downloaded or cached.

    choose: the names of the files there → the one that is wanted; its errors are passed on. Raises HubError as `resolve` does.
    """
    source = _Source(repo_id, revision, token, Path(cache_dir) if cache_dir is not None else None, local_files_only)
    folder = _fetch_configs(source, ())
    chosen: list[str] = []

    def needed(listing: "list[RepoFile]") -> "Iterator[RepoFile]":
        files = {file.path: file for file in listing if "/" not in file.path}
        chosen.append(choose(list(files)))
        yield files[chosen[0]]

    def find() -> None:
        chosen.append(choose(os.listdir(folder) if folder.is_dir() else []))

    _fetch_weights(source, folder, needed, find)
    return folder / chosen[0]


def _remote(source: _Source, names: Iterable[str], variant: str | None) -> list[str]:
    names = list(names)
    try:
        return remote_files(choose("vae", names, variant, allow_pickle=False), "vae", names)
    except CheckpointError as error:
        raise HubError(f"{source}: {error} (only safetensors are downloaded)") from error


def _local_or_source(
    name_or_path: str | Path,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> Path | _Source:
    """What is there as a path, and else what the hub is to be asked for. CheckpointError for what can be neither."""
    if str(name_or_path) and os.path.exists(name_or_path):
        return Path(name_or_path)
    if isinstance(name_or_path, Path) or not is_repo_id(name_or_path):
        raise CheckpointError(
            f"no such folder: {shown(str(name_or_path), 300)!r} (a model on the hub is named owner/name)"
        )
    directory = Path(cache_dir) if cache_dir is not None else None
    return _Source(name_or_path, revision, token, directory, local_files_only)


def is_repo_id(name: str) -> bool:
    """Whether a repository of the hub may be called so."""
    return len(name) <= 96 and ".." not in name and "--" not in name and _REPO_ID.fullmatch(name) is not None


def _fetch_configs(source: _Source, files: Sequence[str]) -> Path:
    """The folder of the revision's commit, with these of its files."""
    folder = _snapshot(source, source.revision, list(files))
    if source.revision is None or not _COMMIT.fullmatch(source.revision):
        logger.info("%s: revision %s is commit %s", source.repo_id, source.revision or "main", folder.name)
    return folder


def _fetch_weights(
    source: _Source,
    folder: Path,
    needed: "Callable[[list[RepoFile]], Iterable[RepoFile]]",
    find: Callable[[], object],
) -> None:
    """Download what is needed of the repository's files and is not there.

    find: what raises CheckpointError unless all of it is there.
    """
    commit = folder.name
    try:
        listing = _list_files(source, commit)
    except HubError as error:
        # Not reachable, though the configs came out of the cache: the weights may be there as well.
        if not _is_complete(find):
            raise
        logger.info("%s: taken from the cache (%s)", source, error)
        return
    wanted = {file.path: file for file in needed(listing)}
    fresh = [name for name in wanted if not os.path.exists(folder / name)]
    if fresh:
        _snapshot(source, commit, list(wanted))
    for name in fresh:
        _verify(source, folder / name, wanted[name])


def _snapshot(source: _Source, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # here, so that local folders do not wait for its import

    with _explained(source):
        return Path(
            snapshot_download(
                source.repo_id,
                revision=revision,
                token=source.token,
                cache_dir=source.cache_dir,
                local_files_only=source.local_files_only,
                allow_patterns=[glob.escape(file) for file in files],
            )
        )


def _check_layout(source: _Source, folder: Path) -> None:
    """Refuse another architecture by its configs, before its weights are downloaded."""
    if not os.path.isfile(folder / "model_index.json"):
        raise HubError(f"{source}: no model_index.json in the repository, so it is not in the diffusers layout")
    try:
        read_layout(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _list_files(source: _Source, commit: str) -> "list[RepoFile]":
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    if source.local_files_only:
        raise HubError(
            f"{source}: not in the cache, or not all of it, and local_files_only=True forbids to download it"
        )
    with _explained(source):
        tree = HfApi(token=source.token).list_repo_tree(source.repo_id, recursive=True, revision=commit)
        return [item for item in tree if isinstance(item, RepoFile)]


def _needed(source: _Source, listing: "list[RepoFile]", variant: str | None) -> "Iterator[RepoFile]":
    by_path = {file.path: file for file in listing}
    names = {
        component: [path.removeprefix(f"{component}/") for path in by_path if path.startswith(f"{component}/")]
        for component in COMPONENTS
    }
    try:
        choices = choose_all(names, variant, allow_pickle=False)
    except CheckpointError as error:
        raise HubError(f"{source}: {error} (only safetensors are downloaded)") from error
    for component, choice in choices.items():
        for name in remote_files(choice, component, names[component]):
            yield by_path[f"{component}/{name}"]


def _is_complete(find: Callable[[], object]) -> bool:
    try:
        find()
    except CheckpointError:
        return False
    return True


def _verify(source: _Source, path: Path, file: "RepoFile") -> None:
    """Compare a fresh download with the hub's SHA-256; a corrupt one is removed, so that the next try fetches it."""
    if file.lfs is None or file_sha256(path) == file.lfs.sha256:
        return
    blob = path.resolve()
    path.unlink()
    blob.unlink(missing_ok=True)
    raise HubError(f"{source}: {file.path} arrived corrupt (its SHA-256 is not the hub's) and was removed; try again")


@contextmanager
def _explained(source: _Source) -> Iterator[None]:
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # its HTTP client, and with it the kinds of errors, differ between releases
        raise HubError(f"{source}: {_explain(error, source)}") from error


def _explain(error: Exception, source: _Source) -> str:
    from huggingface_hub import errors

    chain = list(_causes(error))
    status = next((code for item in chain if (code := _status(item)) is not None), None)
    if any(isinstance(item, errors.GatedRepoError) for item in chain):
        return "the model is gated: accept its terms on its page on the hub, then set HF_TOKEN to a token of yours"
    if any(isinstance(item, errors.RevisionNotFoundError) for item in chain):
        return "no such revision (branch, tag or commit) in the repository"
    if status == 401:
        return "the hub answered 401: private or unknown repository, or a wrong token; set HF_TOKEN, check the name"
    if status == 404:
        return "no such model on the hub, and no such local folder; check the name"
    if status is not None:
        return f"the hub answered {status}; try again later, or use a local folder"
    if any(isinstance(item, errors.OfflineModeIsEnabled) for item in chain) or source.local_files_only:
        return "offline, and not (completely) in the cache; unset HF_HUB_OFFLINE and local_files_only to download it"
    if any(isinstance(item, OSError) and item.errno == errno.ENOSPC for item in chain):
        return "disk full while downloading; free some space, or set HF_HOME to another disk"
    lines = [line.strip() for line in str(chain[-1]).splitlines() if line.strip()] or [type(chain[-1]).__name__]
    return f"the network failed or the download broke off ({shown(lines[0], 200)}); check the connection and try again"


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _status(error: Any) -> int | None:
    """The HTTP status an error of huggingface_hub carries."""
    return getattr(getattr(error, "response", None), "status_code", None)
