"""Files to and from the Hugging Face Hub; what is in them is no business of this file.

A branch of a Hub repository can move between two downloads.  So ``org/name@revision`` is resolved once, to a commit,
and every file comes from that commit.  A run can be repeated with ``revision=<commit>``, which needs no network once
the files are in the cache.

``huggingface_hub`` is imported inside functions, so that using local weights never loads it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

_COMMIT = re.compile("[0-9a-f]{40}")
_REF = re.compile(r"[^\x00-\x20\x7f~^:?*\[\\]+")  # what git allows in a name, nearly
_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


class Access(NamedTuple):
    """How to reach the Hub when loading."""

    cache_dir: str | None = None
    """Where downloads are kept, by default the cache of ``huggingface_hub``."""
    token: str | bool | None = None
    """Access token; ``None`` for the one that was logged in with, ``False`` for none."""
    local_files_only: bool = False
    """Never touch the network."""


class PushResult(NamedTuple):
    """Where files were published."""

    url: str
    """Page of the commit, or of the pull request when one was asked for."""
    commit: str
    """40 hex digits, to be used as ``revision``."""
    repo_id: str
    """``org/name``."""

    @property
    def usage(self) -> str:
        """The line that loads exactly what was published."""
        return f'flatopt.FlatOpt(model.parameters(), pretrained="{self.repo_id}", revision="{self.commit}")'


def is_repo_id(name: object) -> bool:
    """Return whether a name has the form ``org/name``."""
    return isinstance(name, str) and _REPO_ID.fullmatch(name) is not None


def check_ref(argument: str, value: object) -> None:
    """Raise ``ValueError`` unless a value may be the name of a branch, tag or commit; ``None`` is left out."""
    if value is not None and not (isinstance(value, str) and _REF.fullmatch(value)):
        raise ValueError(f"{argument} must be the name of a branch, tag or commit, got {value!r}")


def download(
    repo_id: str,
    revision: str | None,
    access: Access,
    *,
    first: str,
    check: Callable[[Path], Any],
    others: Sequence[str],
) -> Path:
    """Return the cache folder of one commit with the files that were asked for; its name is the commit.

    Revisions, what is done without network, and errors are as in :func:`flatopt.load_pretrained`.  The file ``first``
    must be there.  It is given to ``check``, which raises if the repository is something else, before the ``others``,
    of which only the first must exist, are downloaded.
    """
    snapshot = _download(repo_id, revision, [first], access)
    check(snapshot / first)
    return _download(repo_id, snapshot.name, list(others), access)


def upload(
    files: Mapping[str, Path | None],
    repo_id: str,
    *,
    revision: str | None = None,
    tag: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str,
    create_pr: bool = False,
) -> PushResult:
    """Publish files by their names, ``None`` for one that must not be there, in one commit.

    The other arguments and errors are as in :func:`flatopt.push_to_hub`.
    """
    if not is_repo_id(repo_id):
        raise ValueError(f"repo_id must be 'org/name', got {repo_id!r}")
    for name, value in (("revision", revision), ("tag", tag)):
        check_ref(name, value)
        if create_pr and value is not None:
            raise ValueError(f"a pull request is to the default branch: {name}={value!r} cannot be used with it")
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(library_name="flatopt", token=token)
    with _explained(repo_id, revision):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ValueError(f"{_describe(repo_id, revision)}: is there already, and public: nothing was published")
        if tag is not None and tag in [one.name for one in api.list_repo_refs(repo_id).tags]:
            raise FileExistsError(f"{_describe(repo_id, revision)}: there is a tag {tag!r} already")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        unwanted = {name for name, path in files.items() if path is None}
        stale = unwanted.intersection(api.list_repo_files(repo_id, revision=revision) if unwanted else ())
        added = [CommitOperationAdd(name, path) for name, path in sorted(files.items()) if path is not None]
        # create_commit, because upload_folder may spread the files over several commits.
        info = api.create_commit(
            repo_id,
            [*added, *(CommitOperationDelete(name) for name in sorted(stale))],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
        if tag is not None:
            api.create_tag(repo_id, tag=tag, revision=info.oid)
    return PushResult(info.pr_url or info.commit_url, info.oid, repo_id)


def _download(repo_id: str, revision: str | None, files: list[str], access: Access) -> Path:
    """Return the cache folder of one commit, holding ``files``; the first is required, the others may not exist."""
    from huggingface_hub import hf_hub_download, snapshot_download

    options: dict[str, Any] = {**access._asdict(), "library_name": "flatopt"}
    cached = None
    if revision is not None and _COMMIT.fullmatch(revision):
        # A commit never changes: if all of it is in the cache there is nothing to ask.
        cached, unknown = _in_cache(repo_id, revision, files, access.cache_dir)
        if cached is not None and not unknown:
            return cached
    try:
        with _explained(repo_id, revision):
            path = snapshot_download(
                repo_id, revision=revision, allow_patterns=files, tqdm_class=_silent_progress(), **options
            )
    except OSError:
        if cached is None:
            raise
        return cached  # what a download that broke off has left out can be done without
    snapshot = Path(path)
    if not (snapshot / files[0]).is_file():
        raise FileNotFoundError(
            f"{_describe(repo_id, revision)}: {files[0]} is not in commit {snapshot.name}, or not in the cache while "
            "the Hub cannot be asked"
        )
    for file in _in_cache(repo_id, snapshot.name, files, access.cache_dir)[1]:
        with suppress(OSError), _explained(repo_id, revision):  # the cache keeps the answer that there is none
            hf_hub_download(repo_id, file, revision=snapshot.name, **options)
    return snapshot


def _in_cache(repo_id: str, commit: str, files: list[str], cache_dir: str | None) -> tuple[Path | None, list[str]]:
    """Return the cache folder of a commit, and the files that are not in it although the commit may have them.

    There is no folder where the first file is missing.
    """
    from huggingface_hub import try_to_load_from_cache

    cache = None if cache_dir is None else Path(cache_dir).expanduser()
    found = {file: try_to_load_from_cache(repo_id, file, cache_dir=cache, revision=commit) for file in files}
    first = found[files[0]]
    folder = Path(first).parent if isinstance(first, str) else None
    return folder, [file for file, path in found.items() if path is None]


def _silent_progress() -> Any:
    """Return a progress bar that shows nothing: the files are small, and building an optimizer prints nothing."""
    from tqdm.auto import tqdm  # a dependency of huggingface_hub, which asks for a subclass of this one

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent


def _describe(repo_id: str, revision: str | None) -> str:
    """Return how messages name a revision of a repository."""
    return f"Hub repository {repo_id!r}, revision {revision or 'main'!r}"


@contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn the errors of the Hub client into built-in ones that name repository and revision."""
    from huggingface_hub import errors

    where = _describe(repo_id, revision)
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{where}: no such branch, tag or commit") from error
    except errors.GatedRepoError as error:
        raise PermissionError(f"{where}: access must be asked for on its page, then pass `token`") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{where}: no such model repository (nor local folder), or it is private and the token may not see it"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, errors.OfflineModeIsEnabled):
            raise FileNotFoundError(f"{where}: not complete in the cache, and the network is off") from error
        if isinstance(cause, errors.HfHubHTTPError) and cause.response.status_code in (401, 403):
            raise PermissionError(f"{where}: access denied: {_one_line(cause)}") from error
        raise ConnectionError(
            f"{where}: not complete in the cache, and the Hub does not answer: {_one_line(cause)}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{where}: a file is missing: {_one_line(error)}") from error
    except errors.HfHubHTTPError as error:
        kinds = {400: ValueError, 401: PermissionError, 403: PermissionError, 422: ValueError}
        kind = kinds.get(error.response.status_code, ConnectionError)
        raise kind(f"{where}: {_one_line(error)}") from error
    except Exception as error:
        # The HTTP library differs between versions of the client; what requests raises are OSErrors, too.
        if isinstance(error, (OSError, ValueError)) and not type(error).__module__.startswith("requests."):
            raise  # of the disk, or of an argument: clear as they are
        raise ConnectionError(f"{where}: the Hub does not answer: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    """Return the message of the client, which may have several lines."""
    return " ".join(str(error).split())
