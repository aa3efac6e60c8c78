import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy_metatrain import toy_config, toy_estimator

import flatopt
from flatopt.metatrain import RECIPES, train
from flatopt.metatrain.checkpoint import latest
from flatopt.metatrain.cli import main
from flatopt.pretrained import load_folder

SMOKE = ["run", "smoke", "num_updates=24", "checkpoint_every=5", "seed=3"]


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "run"
    train(toy_config(), out, estimator=toy_estimator(), command="flatopt-train run toy")
    return out


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The exported weights of an uninterrupted smoke run."""
    folder = tmp_path_factory.mktemp("reference")
    assert main([*SMOKE, "--out", str(folder / "run")]) == 0
    return export(folder / "run", folder / "export")


def export(out, folder):
    assert main(["export", str(out), "--to", str(folder)]) == 0
    return load_folder(folder)


def start(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(flatopt.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flatopt.metatrain.cli", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_update(out, update, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= update:
            return
        time.sleep(0.005)
    raise AssertionError(f"update {update} not seen: {process.communicate()[1]}")


def assert_same_weights(actual, expected):
    assert actual.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        torch.testing.assert_close(actual.weights[name], value, rtol=0, atol=0)


def test_a_killed_run_resumes_to_the_bits_of_an_uninterrupted_one(tmp_path, reference):
    process = start(*SMOKE, "--out", tmp_path / "run")
    wait_for_update(tmp_path / "run", 8, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert latest(tmp_path / "run" / "checkpoints").update < 24
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert latest(tmp_path / "run" / "checkpoints").update == 24
    assert_same_weights(export(tmp_path / "run", tmp_path / "export"), reference)


def test_sigterm_saves_says_how_to_go_on_and_exits_with_143(tmp_path, reference):
    out = tmp_path / "run"
    process = start(*SMOKE, "--out", out)
    wait_for_update(out, 6, process)
    process.terminate()
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 143, err
    assert err.splitlines()[-1].endswith(f"go on with: flatopt-train resume {out}")
    last_line = (out / "metrics.jsonl").read_text().splitlines()[-1]
    assert latest(out / "checkpoints").update == json.loads(last_line)["update"] < 24
    assert main(["resume", str(out)]) == 0
    assert_same_weights(export(out, tmp_path / "export"), reference)


def test_another_seed_gives_other_weights(tmp_path, reference):
    assert main([*SMOKE, "seed=4", "--out", str(tmp_path / "run")]) == 0
    other = export(tmp_path / "run", tmp_path / "export")
    assert any(not torch.equal(other.weights[name], value) for name, value in reference.weights.items())


def test_smoke_moves_the_weights_and_makes_several_checkpoints(tmp_path):
    config = RECIPES["smoke"]()
    assert config.num_updates >= 3 * config.checkpoint_every > 0
    assert main(["run", "smoke", "--out", str(tmp_path / "run")]) == 0
    checkpoint = latest(tmp_path / "run" / "checkpoints")
    assert checkpoint.config == config
    fresh = config.build_rule().init_weights(torch.Generator().manual_seed(config.seed))
    assert any(not torch.equal(checkpoint.weights[name], value) for name, value in fresh.items())


def test_export_saves_the_shipped_weights_and_their_origin(toy_run, tmp_path, capsys):
    learned = export(toy_run, tmp_path / "export")
    checkpoint = latest(toy_run / "checkpoints")
    printed = capsys.readouterr().out
    assert "update 30 of 30" in printed
    assert f'flatopt.FlatOpt(model.parameters(), pretrained="{tmp_path / "export"}")' in printed
    assert learned.rule == checkpoint.config.build_rule()
    for name, value in checkpoint.average.items():
        torch.testing.assert_close(learned.weights[name], value, rtol=0, atol=0)
    assert learned.metadata["recipe"] == "toy"
    assert learned.metadata["num_updates"] == 30
    assert learned.metadata["sessions"] == checkpoint.sessions
    assert learned.training == json.loads(checkpoint.config.to_json())


def test_the_card_tells_how_the_weights_were_made(toy_run, tmp_path):
    card = export(toy_run, tmp_path / "export").card
    session = latest(toy_run / "checkpoints").sessions[0]
    for fact in (
        "| Recipe | `toy`, seed 0 |",
        "| Meta-updates | 30 of 30 |",
        "moving average, decay 0.9",
        "`flatopt-train run toy`",
        f"torch {torch.__version__}",
        session["hardware"],
        session["commit"] or "unknown (not a checkout)",
        f"flatopt {flatopt.__version__}, commit",
        "[training.json](training.json)",
    ):
        assert fact in card


def test_the_card_draws_how_the_loss_fell(toy_run, tmp_path):
    card = export(toy_run, tmp_path / "export").card
    first, *_, last = [
        json.loads(line)["smoothed_loss"] for line in (toy_run / "metrics.jsonl").read_text().splitlines()
    ]
    assert first > last
    assert re.search(rf"\| Meta-loss, smoothed \| {first:.4f} `█[▁-█]*▁` {last:.4f} \|", card)


def test_what_is_exported_names_no_path_of_this_machine(tmp_path):
    out = tmp_path / "my run"
    assert main(["run", "smoke", "num_updates=1", "--out", str(out)]) == 0
    export(out, tmp_path / "export")
    for file in ("README.md", "config.json", "training.json"):
        text = (tmp_path / "export" / file).read_text()
        assert str(tmp_path) not in text
    assert "flatopt-train run smoke num_updates=1 --out 'my run'" in (tmp_path / "export" / "README.md").read_text()


def test_the_command_is_recorded_as_it_was_typed(tmp_path):
    out = tmp_path / "my run"
    assert main(["run", "smoke", "num_updates=1", "--out", str(out), "seed=7"]) == 0
    checkpoint = latest(out / "checkpoints")
    assert checkpoint.sessions[0]["command"] == f"flatopt-train run smoke num_updates=1 --out '{out}' seed=7"
    assert (checkpoint.config.num_updates, checkpoint.config.seed) == (1, 7)


def test_list_shows_every_recipe(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "smok", "--out", "OUT"], "unknown recipe 'smok': valid are smoke, flat-v2"),
        (["run", "smoke", "speed=1", "--out", "OUT"], "unknown key 'speed': valid are recipe, rule"),
        (["run", "smoke", "seed=a", "--out", "OUT"], "seed must be an integer, not 'a'"),
        (["run", "smoke", "estimator.name=guess", "--out", "OUT"], "estimator.name must be one of persistent-es, "),
        (["run", "smoke", "tasks.mlp.name=tree", "--out", "OUT"], "'tree'"),
        (["run", "smoke", "--out", "OUT", "--device", "nowhere"], "device 'nowhere' cannot be used"),
        (["resume", "OUT"], "no whole checkpoint in OUT/checkpoints"),
        (["export", "OUT", "--to", "OUT/export"], "no whole checkpoint in OUT/checkpoints"),
        (["push", "OUT", "org/name"], "'OUT' is neither shipped weights"),
    ],
)
def test_a_request_that_cannot_be_carried_out_gets_one_line_and_exit_code_2(tmp_path, capsys, arguments, message):
    out = str(tmp_path / "run")
    assert main([argument.replace("OUT", out) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("flatopt-train: ")
    assert message.replace("OUT", out) in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["run"], ["run", "smoke"], ["fly"], ["list", "seed=1"], ["run", "smoke", "--out", "x", "--fast"]]
)
def test_a_line_that_cannot_be_read_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: flatopt-train" in capsys.readouterr().err


def test_run_refuses_a_folder_with_a_run_and_names_resume(toy_run, capsys):
    before = (toy_run / "metrics.jsonl").read_bytes()
    assert main(["run", "smoke", "--out", str(toy_run)]) == 2
    assert f"go on with: flatopt-train resume {toy_run}" in capsys.readouterr().err
    assert (toy_run / "metrics.jsonl").read_bytes() == before


def test_export_does_not_replace_what_is_not_a_saved_rule(toy_run, capsys):
    assert main(["export", str(toy_run), "--to", str(toy_run)]) == 2
    assert "not" in capsys.readouterr().err
    assert latest(toy_run / "checkpoints").update == 30
