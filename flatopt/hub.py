"""Learned rules by name: shipped with the package, in a folder, or on the Hugging Face Hub.

A branch of a Hub repository can move between two downloads.  So ``org/name@revision`` is resolved once, to a commit;
every file comes from that commit; and the commit is kept on the :class:`~flatopt.pretrained.LearnedRule`, so that a
run can be repeated with ``revision=learned.commit``, which needs no network once the files are in the cache.

``huggingface_hub`` is imported inside functions: shipped names and folders never load it.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from .pretrained import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    LearnedRule,
    list_pretrained,
    load_folder,
    read_config,
    shipped_folder,
    weights_sha256,
)

_COMMIT = re.compile("[0-9a-f]{40}")
_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)

_FRONT_MATTER = """---
library_name: flatopt
license: apache-2.0
tags:
- learned-optimizer
- pytorch
- optimizer
---

"""


class PushResult(NamedTuple):
    """Where a learned rule was published."""

    url: str
    """Page of the commit, or of the pull request when one was asked for."""
    commit: str
    """40 hex digits, to be used as ``revision``."""


def load_pretrained(
    pretrained: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> LearnedRule:
    """Return a learned rule by shipped name, folder, or Hub repository, looked for in this order.

    Without network (``local_files_only``, ``HF_HUB_OFFLINE=1``, or a Hub that does not answer) the commit last seen
    for ``revision`` is used if all of its files are in the cache.

    Args:
        pretrained: a name of :func:`~flatopt.list_pretrained`, a folder, or ``"org/name"``.
        revision: Hub only: branch, tag or 40-digit commit; ``None`` for the default branch.
        cache_dir: Hub only: where downloads are kept, by default the cache of ``huggingface_hub``.
        token: Hub only: access token; ``None`` for the one that was logged in with, ``False`` for none.
        local_files_only: Hub only: never touch the network.

    Raises:
        ValueError: if nothing can have that name, if ``revision`` is given without a Hub repository, or if the
            files are not exactly those of a learned rule.
        FileNotFoundError: if the repository, the revision or a file in it does not exist, or is not in the cache
            while the network is off.
        PermissionError: if the repository is gated or the token is refused.
        ConnectionError: if the Hub does not answer and the files are not in the cache.

    Example:
        >>> load_pretrained("no-such-optimizer")
        Traceback (most recent call last):
        ...
        ValueError: 'no-such-optimizer' is neither shipped weights ..., nor a folder, nor a Hub repository 'org/name'...
    """
    source = os.fspath(pretrained)
    is_shipped = source in list_pretrained()
    if is_shipped or os.path.isdir(source):
        if revision is not None:
            raise ValueError(f"revision={revision!r} needs a Hub repository, but {source!r} is a local folder or name")
        # A new object each time: whoever changes the tensors of one must not change those of the next.
        return dataclasses.replace(_load_shipped(source)) if is_shipped else load_folder(source)
    if isinstance(pretrained, str) and _REPO_ID.fullmatch(source):
        return _load_hub(
            source, revision, _Cache(None if cache_dir is None else os.fspath(cache_dir), token, local_files_only)
        )
    shipped = list_pretrained()
    close = difflib.get_close_matches(source, shipped, n=1)
    raise ValueError(
        f"{source!r} is neither shipped weights ({', '.join(shipped) or 'none'}), nor a folder, nor a Hub repository "
        f"'org/name'{f'; did you mean {close[0]!r}?' if close else ''}"
    )


def push_to_hub(
    learned: LearnedRule,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload learned optimizer",
    create_pr: bool = False,
) -> PushResult:
    """Publish a learned rule on the Hub: weights, configuration and card in one commit.

    Args:
        learned: the learned rule; :func:`model_card` of it becomes ``README.md``.
        repo_id: ``"org/name"``; made if it does not exist.
        revision: branch to commit to, made if it does not exist; ``None`` for the default branch.
        private: visibility of a repository that is made; ``None`` for the default of the account.
        token: access token with write permission; ``None`` for the one that was logged in with.
        commit_message: first line of the commit.
        create_pr: open a pull request against the default branch instead of committing; excludes ``revision``.

    Returns:
        Address and commit.

    Raises:
        ValueError: if ``repo_id`` is not of the form ``org/name`` or ``revision`` is given with ``create_pr``.
        FileNotFoundError: if the repository cannot be found with this token.
        PermissionError: if the token may not write there.
        ConnectionError: if the Hub does not answer.
    """
    if not _REPO_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id must be 'org/name', got {repo_id!r}")
    if create_pr and revision is not None:
        raise ValueError(f"create_pr=True commits to the default branch, revision={revision!r} cannot be used with it")
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="flatopt", token=token)
    with tempfile.TemporaryDirectory() as folder, _explained(repo_id, revision):
        dataclasses.replace(learned, card=model_card(learned, repo_id)).save_pretrained(folder)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # create_commit, because upload_folder may spread the files over several commits.
        info = api.create_commit(
            repo_id,
            [CommitOperationAdd(path.name, path) for path in sorted(Path(folder).iterdir())],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return PushResult(info.pr_url or info.commit_url, info.oid)


def model_card(learned: LearnedRule, repo_id: str | None = None) -> str:
    """Return the text of ``README.md``: the rule's own card, or one that says what it is and how to use it.

    Args:
        learned: the learned rule; front matter is put before its ``card`` if that has none.
        repo_id: name to use in the example of a card that has to be written.

    Example:
        >>> from flatopt.rules import Adam
        >>> print(model_card(LearnedRule(Adam(), {}, card="# My optimizer")).splitlines()[1])
        library_name: flatopt
    """
    if learned.card:
        return learned.card if learned.card.startswith("---") else _FRONT_MATTER + learned.card
    rows = [(item.name, getattr(learned.rule, item.name)) for item in dataclasses.fields(learned.rule)]
    return "".join(
        [
            _FRONT_MATTER,
            f"# {repo_id or learned.name or learned.rule.name}\n\n",
            f"A learned optimizer for PyTorch, used through `flatopt`: rule `{learned.rule.name}`, ",
            f"{sum(value.numel() for value in learned.weights.values()):,} weights, ",
            f"SHA-256 `{weights_sha256(learned.weights)}`.\n\n",
            "```python\nimport flatopt\n\n",
            f'optimizer = flatopt.FlatOpt(model.parameters(), pretrained="{repo_id or "this/folder"}")\n```\n\n',
            "| hyper-parameter | value |\n|---|---|\n",
            *(f"| `{key}` | `{value}` |\n" for key, value in rows),
        ]
    )


@lru_cache
def _load_shipped(name: str) -> LearnedRule:
    """Read shipped weights, once per process."""
    return dataclasses.replace(load_folder(shipped_folder(name)), name=name)


class _Cache(NamedTuple):
    """How to reach the Hub: the arguments that every download takes."""

    folder: str | None
    token: str | bool | None
    local_files_only: bool


def _load_hub(repo_id: str, revision: str | None, cache: _Cache) -> LearnedRule:
    """Load a learned rule from one commit of a Hub repository."""
    # The small file first: a repository of something else is refused before its weights are downloaded.
    snapshot = _download(repo_id, revision, [CONFIG_FILE], cache)
    commit = snapshot.name
    try:
        read_config(snapshot / CONFIG_FILE)
        _download(repo_id, commit, [WEIGHTS_FILE, CARD_FILE], cache)
        learned = load_folder(snapshot)
    except ValueError as error:
        raise ValueError(f"{repo_id!r} at commit {commit} is not a learned rule: {error}") from error
    return dataclasses.replace(learned, name=repo_id, commit=commit)


def _download(repo_id: str, revision: str | None, files: list[str], cache: _Cache) -> Path:
    """Return the cache folder of one commit, holding ``files``; the first is required, the others may not exist."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fetch(local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                cache_dir=cache.folder,
                token=cache.token,
                local_files_only=local_files_only,
                allow_patterns=files,
                library_name="flatopt",
                tqdm_class=_silent_progress(),
            )
        )

    if revision is not None and _COMMIT.fullmatch(revision):
        # A commit never changes: if it is in the cache there is nothing to ask.
        try:
            snapshot = fetch(local_files_only=True)
            if (snapshot / files[0]).is_file():
                return snapshot
        except LocalEntryNotFoundError:
            pass
    with _explained(repo_id, revision):
        snapshot = fetch(cache.local_files_only)
    if not (snapshot / files[0]).is_file():
        raise FileNotFoundError(
            f"{_describe(repo_id, revision)}: {files[0]} is not in commit {snapshot.name}, or not in the cache while "
            "the Hub cannot be asked"
        )
    return snapshot


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
            raise PermissionError(f"{where}: access denied: {cause}") from error
        raise ConnectionError(f"{where}: not complete in the cache, and the Hub does not answer: {cause}") from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{where}: a file is missing: {error}") from error
    except errors.HfHubHTTPError as error:
        kind = PermissionError if error.response.status_code in (401, 403) else ConnectionError
        raise kind(f"{where}: {error}") from error
    except (OSError, ValueError):
        raise  # of the disk, or of an argument: clear as they are
    except Exception as error:
        # What is left are the transport errors of the HTTP library, which differs between versions of the client.
        raise ConnectionError(f"{where}: the Hub does not answer: {error}") from error
