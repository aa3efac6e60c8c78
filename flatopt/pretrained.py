"""Learned rules by name: shipped with the package, in a folder, or on the Hugging Face Hub."""

from __future__ import annotations

import copy
import difflib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from . import hub
from ._cards import address, model_card
from ._folder import (
    CARD_FILE,
    CONFIG_FILE,
    FILES,
    TRAINING_FILE,
    WEIGHTS_FILE,
    Content,
    check_weights,
    read_config,
    read_folder,
    weights_sha256,
    write_folder,
)
from ._warn import warn
from .rules import UpdateRule, Weights


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
        TypeError: if ``pretrained`` is neither text nor a path.
        ValueError: if nothing can have that name, if ``revision`` is given without a Hub repository, or if the
            files are not exactly those of a learned rule.
        FileNotFoundError: if the folder, the repository, the revision or a file in it does not exist, or is not in
            the cache while the network is off.
        PermissionError: if the repository is gated or the token is refused.
        ConnectionError: if the Hub does not answer and the files are not in the cache.

    Example:
        >>> load_pretrained("no-such-optimizer")
        Traceback (most recent call last):
        ...
        ValueError: 'no-such-optimizer' is neither shipped weights ..., nor a folder, nor a Hub repository 'org/name'...
    """
    given: Any = pretrained
    if not isinstance(given, str | os.PathLike):
        is_class = isinstance(given, type) and issubclass(given, UpdateRule)
        kind = given.__name__ if is_class else type(given).__name__
        hint = f"; a rule without weights: LearnedRule({kind}(), {kind}().init_weights())"
        raise TypeError(
            f"pretrained must be a name, a folder or 'org/name', not {kind}"
            + (hint if is_class or isinstance(given, UpdateRule) else "")
        )
    source = os.fspath(pretrained)
    shipped = list_pretrained()
    if source in shipped or os.path.isdir(source):
        if revision is not None:
            raise ValueError(f"revision={revision!r} needs a Hub repository, but {source!r} is a local folder or name")
        return _load(shipped_folder(source), source) if source in shipped else load_folder(source)
    hub.check_ref("revision", revision)
    if isinstance(pretrained, str) and hub.is_repo_id(source):
        return _load_from_hub(
            source, revision, hub.Access(None if cache_dir is None else os.fspath(cache_dir), token, local_files_only)
        )
    close = difflib.get_close_matches(source, shipped, n=1)
    raise ValueError(
        f"{source!r} is neither shipped weights ({', '.join(shipped) or 'none'}), nor a folder, nor a Hub repository "
        f"'org/name'{f'; did you mean {close[0]!r}?' if close else ''}"
    )


def push_to_hub(
    learned: LearnedRule | str | os.PathLike[str],
    repo_id: str,
    *,
    revision: str | None = None,
    tag: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload learned optimizer",
    create_pr: bool = False,
) -> hub.PushResult:
    """Publish a learned rule on the Hugging Face Hub: weights, configuration and card in one commit.

    Where there is no ``training``, one that an earlier push left in the repository is deleted.

    Args:
        learned: the learned rule, or whatever :func:`load_pretrained` takes: a shipped name, a folder, a repository.
        repo_id: ``"org/name"``; made if it does not exist.  The card will say how to load it from there.
        revision: branch to commit to, made if it does not exist; ``None`` for the default branch.
        tag: name for the commit, such as ``v1.0``, that nothing has yet.
        private: visibility of a repository that is made, ``None`` for the default of the account.  With ``True``
            nothing is published in a repository that is there already and public.
        token: access token with write permission; ``None`` for the one that was logged in with.
        commit_message: first line of the commit.
        create_pr: open a pull request against the default branch instead of committing; excludes ``revision`` and
            ``tag``.

    Returns:
        Address, commit, and the line that loads it.

    Raises:
        ValueError: if ``repo_id`` is not of the form ``org/name``, ``revision`` or ``tag`` cannot be a name or is
            given with ``create_pr``, or the repository is there and public although ``private`` was asked for.
        FileExistsError: if the tag is there already; nothing is published then.
        FileNotFoundError: if the repository cannot be found with this token.
        PermissionError: if the token may not write there.
        ConnectionError: if the Hub does not answer.
    """
    if not isinstance(learned, LearnedRule):
        learned = load_pretrained(learned, token=token)
        _warn_of_other_files(learned.name or "")
    card = learned.card or model_card(learned.rule, learned.weights, name=repo_id)
    with tempfile.TemporaryDirectory() as folder:
        content = learned.content._replace(card=address(card, repo_id))
        write_folder(Path(folder), content, load_folder)
        paths = {name: Path(folder, name) for name in FILES}
        return hub.upload(
            {name: path if path.exists() else None for name, path in paths.items()},
            repo_id,
            revision=revision,
            tag=tag,
            private=private,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
        )


def _warn_of_other_files(source: str) -> None:
    """Warn of the files of a folder that are not published; a card may show one."""
    if os.path.isdir(source) and source not in list_pretrained():
        others = sorted(name for name in os.listdir(source) if name not in FILES and not name.startswith("."))
        if others:
            warn(f"{source}: not published, only {', '.join(FILES)} are: {', '.join(others)}")


_push_to_hub = push_to_hub  # inside the class, the name is that of its method


@dataclass(frozen=True, eq=False, repr=False)
class LearnedRule:
    """An update rule with the weights that were learned for it.

    The weights are copied: later changes of the tensors passed in do not reach this object.

    Args:
        rule: the update rule.
        weights: float32 tensors with the names and shapes of ``rule.init_weights()``; kept contiguous on the CPU.
        card: text of ``README.md``, empty for none.
        metadata: free JSON object stored in ``config.json``, for example recipe and seeds.
        training: free JSON object stored in ``training.json``: how the weights were made, in full.
        name: where it came from: a shipped name, a folder or a Hub repository; ``None`` when made in memory.
        commit: 40-digit commit of the Hub repository it came from.

    Raises:
        TypeError: if they are not a rule and a dict.
        ValueError: if the weights do not fit the rule or are not finite.

    Example:
        >>> import tempfile
        >>> from flatopt.rules import Adam
        >>> folder = tempfile.mkdtemp()
        >>> LearnedRule(Adam(lr=3e-4), {}).save_pretrained(folder)
        >>> LearnedRule.from_pretrained(folder).rule
        Adam(lr=0.0003, betas=(0.9, 0.999), eps=1e-08)
    """

    rule: UpdateRule
    weights: Weights
    card: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    name: str | None = None
    commit: str | None = None

    def __post_init__(self) -> None:
        rule, given = cast(Any, self.rule), cast(Any, self.weights)
        if not isinstance(rule, UpdateRule) or not isinstance(given, Mapping):
            kinds = f"{type(rule).__name__} and {type(given).__name__}"
            raise TypeError(f"a LearnedRule takes an UpdateRule and a dict of its weights, not {kinds}")
        for key, value in given.items():
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"weights: {key!r} must be a tensor, not {type(value).__name__}")
        weights = {key: value.detach().cpu().clone().contiguous() for key, value in self.weights.items()}
        check_weights(self.rule, weights)
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "metadata", copy.deepcopy(self.metadata))
        object.__setattr__(self, "training", copy.deepcopy(self.training))

    def __repr__(self) -> str:
        count = sum(value.numel() for value in self.weights.values())
        origin = f"{self.name!r}" + (f" at commit {self.commit}" if self.commit else "")
        return (
            f"LearnedRule({self.rule},\n"
            f"            {count:,} weights, SHA-256 {self.sha256[:12]}, {origin if self.name else 'made in memory'})"
        )

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the weights, 64 hex digits; see :func:`flatopt.pretrained.weights_sha256`."""
        return weights_sha256(self.weights)

    @property
    def content(self) -> Content:
        """What is saved of it."""
        return Content(self.rule, self.weights, self.card, self.metadata, self.training)

    from_pretrained = staticmethod(load_pretrained)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the folder that :func:`load_pretrained` reads, whole or not at all.

        Args:
            folder: where to write; parents are made.  An earlier folder of this format is replaced.

        Raises:
            FileExistsError: if something else than a folder of this format is there, or its ``README.md`` was edited.
            ValueError: if the rule or the metadata cannot be represented in JSON.
        """
        write_folder(Path(folder), self.content, load_folder)

    push_to_hub = _push_to_hub


def load_folder(folder: str | os.PathLike[str]) -> LearnedRule:
    """Read a folder written by :meth:`LearnedRule.save_pretrained`; errors as in :func:`load_pretrained`.

    Other files in it are ignored.  The learned rule has the folder as its ``name``.
    """
    path = Path(folder)
    if (path / "checkpoints").is_dir() and not (path / CONFIG_FILE).exists():
        raise FileNotFoundError(
            f"{path} is a run of meta-training, not yet a learned rule: flatopt-train export {path} --to FOLDER, "
            "then load FOLDER"
        )
    return _load(path, str(folder))


def list_pretrained() -> list[str]:
    """Return the names of the learned rules that come with the package, sorted.

    Example:
        >>> isinstance(list_pretrained(), list)
        True
    """
    root = _shipped_root()
    return sorted(path.parent.name for path in root.glob(f"*/{CONFIG_FILE}")) if root.is_dir() else []


def shipped_folder(name: str) -> Path:
    """Return the folder of a learned rule that comes with the package; ``ValueError`` if there is none of the name."""
    if name not in list_pretrained():
        raise ValueError(f"no shipped weights are called {name!r}; there are: {', '.join(list_pretrained()) or 'none'}")
    return _shipped_root() / name


def _shipped_root() -> Path:
    """Return the folder of shipped weights: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "_pretrained"
    return installed if installed.is_dir() else package.parent / "pretrained"


def _load(folder: Path, name: str, commit: str | None = None) -> LearnedRule:
    """Read a folder and check its weights."""
    content = read_folder(folder)
    try:
        return LearnedRule(*content, name=name, commit=commit)
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE}: {error}") from error


def _load_from_hub(repo_id: str, revision: str | None, access: hub.Access) -> LearnedRule:
    """Load a learned rule from one commit of a Hub repository."""
    commit = revision
    try:
        # The small file first: a repository of something else is refused before its weights are downloaded.
        snapshot = hub.download(
            repo_id,
            revision,
            access,
            first=CONFIG_FILE,
            check=read_config,
            others=[WEIGHTS_FILE, CARD_FILE, TRAINING_FILE],
        )
        commit = snapshot.name
        return _load(snapshot, repo_id, commit)
    except ValueError as error:
        raise ValueError(f"{repo_id!r} at {commit or 'its default branch'} is not a learned rule: {error}") from error
