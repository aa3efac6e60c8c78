"""Text data: the alphabet, the splits and the windows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flatopt.tasks import Text, load_text
from flatopt.tasks import text as text_module
from flatopt.tasks.text import VOCAB_SIZE, encode


def test_every_byte_has_its_own_token_or_the_unknown_one() -> None:
    tokens = encode(bytes(range(256))).tolist()
    known = [token for token in tokens if token]
    assert sorted(known) == list(range(1, VOCAB_SIZE))
    assert all(tokens[byte] for byte in b"\n abcxyzABCXYZ0189_()[]{}:=,.'\"")
    assert tokens[200] == tokens[0] == tokens[127] == 0


def test_the_standard_library_gives_text_that_is_nearly_all_known() -> None:
    splits = load_text()
    assert 3_500_000 < sum(map(len, splits)) <= 4_001_000
    assert len(splits.train) > 5 * len(splits.meta) > 0
    assert all(len(split) > 50_000 for split in splits)
    assert (splits.train == 0).float().mean() < 0.01
    assert "import" in "".join(chr(token + 30) for token in splits.test[:20_000].tolist())


def test_splits_share_no_file_and_skip_installed_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    letters = "abcdefghijklmnopqrst"
    for letter in letters:
        (tmp_path / f"{letter}.py").write_text(letter * 5)
    for skipped in ("site-packages", "test"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "big.py").write_text("Z" * 100)
    monkeypatch.setattr(text_module.sysconfig, "get_path", lambda name: str(tmp_path))
    splits = load_text.__wrapped__(1000)
    parts = [{chr(token + 30) for token in split.tolist() if token != 1} for split in splits]
    assert parts == [set(letters) - set("abkl"), set("bl"), set("ak")]
    assert sum(int((split != 1).sum()) for split in load_text.__wrapped__(62)) == 62


def test_a_library_without_sources_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_text.__wrapped__()


def test_targets_are_the_next_characters() -> None:
    data = Text(context_length=12)
    table = data.table()
    batch = data.gather(table, torch.tensor([[0, 7]]))
    text = load_text().train
    for place, start in enumerate((0, 7)):
        assert torch.equal(batch.inputs[0, place], text[start : start + 12])
        assert torch.equal(batch.targets[0, place], text[start + 1 : start + 13])
    last = data.gather(table, table.starts[:, 0] + table.sizes[:, 0] - 1)
    assert torch.equal(last.targets[:, -1], torch.stack([split[-1] for split in load_text()]))
