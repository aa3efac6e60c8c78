"""Finished runs in one SQLite file, shared by processes: what is there is never trained again."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from .._checks import check_folder

Record = dict[str, Any]
"""One row of results: JSON values by name."""


class NotComputed(LookupError):
    """A run that is asked of a cache which computes nothing."""


class RunCache:
    """Finished runs by their keys, so that a long evaluation stopped at any moment goes on where it was.

    Each result is written in a transaction of its own: several processes may share the file, and one that is killed
    loses the run that it was in.  Two of them that need the same run at the same time both compute it.

    Args:
        path: file to read and extend; made when missing.
        cached_only: raise :class:`NotComputed` instead of computing.
    """

    def __init__(self, path: Path, *, cached_only: bool = False) -> None:
        self.path, self.cached_only = path, cached_only
        if not path.parent.is_dir():  # one that is there may be only read from
            check_folder(path.parent)
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._connect() as connection:
                connection.execute("create table if not exists runs (key text primary key, result text) without rowid")
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} cannot be used as a cache of runs: {error}") from error

    def get(self, key: Record, compute: Callable[[], Record]) -> Record:
        """Return the stored result of ``key``; compute and store it the first time.

        Raises:
            NotComputed: it is not there, and the cache is ``cached_only``.
        """
        name = json.dumps(key, sort_keys=True)
        with self._connect() as connection:
            found = connection.execute("select result from runs where key = ?", (name,)).fetchone()
        if found is None and self.cached_only:
            raise NotComputed(name)
        text = found[0] if found else json.dumps(compute())
        if found is None:
            with self._connect() as connection:
                connection.execute("insert or ignore into runs values (?, ?)", (name, text))
        return json.loads(text)

    def items(self) -> list[tuple[Record, Record]]:
        """Return all keys with their results."""
        with self._connect() as connection:
            return [(json.loads(key), json.loads(result)) for key, result in connection.execute("select * from runs")]

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=60)) as connection, connection:
            yield connection
