from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flatopt import FlatOpt
from flatopt.evaluate.cli import main

MODULE = """
import torch
import torch.nn.functional as F
from torch import nn

def make(seed):
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(40, 5, generator=generator)
    targets = (inputs[:, 0] > 0).long()
    torch.manual_seed(seed)
    model = nn.Linear(5, 2)
    train = [(inputs[i : i + 10], targets[i : i + 10]) for i in (0, 10)]
    test = [(inputs[20:36], targets[20:36]), (inputs[36:], targets[36:])]
    def loss_fn(model, batch):
        outputs = model(batch[0])
        return F.cross_entropy(outputs, batch[1]), {"accuracy": (outputs.argmax(1) == batch[1]).float().mean()}
    return model, train, test, loss_fn

def bad(seed):
    model, train, test, loss_fn = make(seed)
    return model, train, test, lambda model, batch: model(batch[0])

def named(key):
    def make_named(seed):
        model, train, test, loss_fn = make(seed)
        return model, train, test, lambda model, batch: (loss_fn(model, batch)[0], {key: 123.0})
    return make_named

optimizer, losses, seconds, test_loss = map(named, ("optimizer", "losses", "seconds", "test_loss"))

def empty(seed):
    model, train, test, loss_fn = make(seed)
    return model, [], test, loss_fn

value = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_problem.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_row_of_flatopt_is_a_plain_training_loop(folder: Path) -> None:
    main(["compare", "my_problem:make", "--seeds", "1", "--steps", "7", "--lrs", "0.1", "1e-5", "--out", "out"])
    records = json.loads((folder / "out" / "results.json").read_text())
    assert [record["optimizer"] for record in records] == ["Adam, lr 0.1", "Adam, lr 1e-05", "FlatOpt"]
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(40, 5, generator=generator)
    targets = (inputs[:, 0] > 0).long()
    torch.manual_seed(0)
    model = nn.Linear(5, 2)
    optimizer = FlatOpt(model.parameters(), num_steps=7)
    losses = []
    for step in range(7):
        start = 10 * (step % 2)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs[start : start + 10]), targets[start : start + 10])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    outputs = model(inputs[20:])
    assert records[-1]["losses"][0] == pytest.approx(losses)
    assert records[-1]["test_loss"][0] == pytest.approx(F.cross_entropy(outputs, targets[20:]).item(), rel=1e-5)
    assert records[-1]["accuracy"][0] == pytest.approx((outputs.argmax(1) == targets[20:]).float().mean().item())
    table = (folder / "out" / "table.md").read_text(encoding="utf-8")
    best = min(records[:2], key=lambda record: record["test_loss"][0])["optimizer"]
    assert f"| {best} * " in table and table.count(" * ") == 1
    assert (folder / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_problem", "module:function"),
        ("no_such_module:make", "No module named 'no_such_module'"),
        ("my_problem:missing", "no function 'missing'"),
        ("my_problem:value", "no function 'value'"),
        ("my_problem:bad", "0-D tensor"),
        ("my_problem:empty", "hold no batch"),
        ("my_problem:optimizer", "no metric may be called 'optimizer'"),
        ("my_problem:losses", "no metric may be called 'losses'"),
        ("my_problem:seconds", "no metric may be called 'seconds'"),
        ("my_problem:test_loss", "no metric may be called 'test_loss'"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    name: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["compare", name, "--fast", "--seeds", "1", "--out", str(folder / "out")])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and message in printed and printed.count("\n") == 1


def test_learning_rates_must_be_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("fast", "-1", "inf"):
        with pytest.raises(SystemExit):
            main(["compare", "my_problem:make", f"--lrs={text}", "--out", str(folder / "out")])
        assert text in capsys.readouterr().err
