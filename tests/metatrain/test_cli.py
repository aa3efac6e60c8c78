import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from small import assert_trees_equal
from toy_metatrain import toy_config, toy_estimator

import flatopt
from flatopt._version import __version__
from flatopt.metatrain import RECIPES, checkpoint, speed, train, trainer
from flatopt.metatrain._describe import settings
from flatopt.metatrain._log import read_metrics
from flatopt.metatrain._plot import draw_run
from flatopt.metatrain.checkpoint import latest
from flatopt.metatrain.cli import main
from flatopt.pretrained import load_folder, load_pretrained
from flatopt.tasks._data import _cached_table

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
    command = [sys.executable, "-m", "flatopt", "train", *map(str, arguments)]
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


def test_a_folder_with_a_shipped_name_is_used_by_its_path(toy_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(toy_run), "--to", "flat-v2"]) == 0
    source = capsys.readouterr().out.rpartition('pretrained="')[2].partition('"')[0]
    assert (
        load_pretrained(source).sha256 == load_folder(tmp_path / "flat-v2").sha256 != load_pretrained("flat-v2").sha256
    )


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


def test_list_shows_every_recipe_with_the_time_of_its_shipped_run(capsys):
    assert main(["list"]) == 0
    header, *lines, _ = capsys.readouterr().out.splitlines()
    assert header.split() == ["recipe", "rule", "updates", "took", "on", "data"]
    assert [line.split()[0] for line in lines] == list(RECIPES)
    (line,) = [line for line in lines if line.startswith("rnnprop ")]
    metadata = load_pretrained("rnnprop").metadata
    assert str(timedelta(seconds=round(metadata["seconds"]))) in line
    assert metadata["sessions"][0]["hardware"] in line and line.endswith("fashion-mnist")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_setting_that_is_shown_can_be_given_back(recipe):
    config = RECIPES[recipe]()
    assert config.override(settings(config)) == config
    keys = [line.partition("=")[0] for line in settings(config)]
    assert len(set(keys)) == len(keys) and f"tasks.{config.tasks[0].name}.num_tasks" in keys


def test_show_takes_settings_and_says_what_the_recipe_is(capsys):
    assert main(["show", "smoke", "tasks.tabular.num_tasks=7"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("A whole run with several checkpoints")
    assert "\ntasks.tabular.num_tasks=7\n" in out


def test_a_dry_run_checks_and_does_nothing(tmp_path, capsys):
    assert main(["run", "smoke", "num_updates=3", "--dry-run", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "num_updates=3\n" in out and out.endswith("tasks: tabular (nothing was done)\n")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_goes_on_when_it_gets_more_updates(tmp_path, capsys):
    long, short = tmp_path / "long", tmp_path / "short"
    assert main(["run", "smoke", "num_updates=6", "--out", str(long)]) == 0
    assert main(["run", "smoke", "num_updates=3", "schedule_updates=6", "--out", str(short)]) == 0
    assert main(["resume", str(short), "num_updates=6", "schedule_updates=none"]) == 0
    one, other = (latest(out / "checkpoints") for out in (long, short))
    assert other.update == 6 and other.config == one.config
    assert_trees_equal((one.weights, one.estimator), (other.weights, other.estimator))
    assert main(["resume", str(short), "seed=5"]) == 2
    assert "only num_updates, schedule_updates" in capsys.readouterr().err


def test_speed_is_a_row_per_way_to_take_a_step(capsys, monkeypatch):
    monkeypatch.setattr(speed, "NUM_TRUNCATIONS", 1)
    monkeypatch.setattr(speed, "modes", lambda: ["plain", "recorded"])
    assert main(["speed", "--rounds", "1"]) == 0
    header, plain, recorded, note = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", "problem-steps/s", "ratio"]
    assert plain.split()[0] == "plain" and plain.split()[2] == "1.00"
    assert recorded.split()[0] == "recorded" and "1 rounds" in note
    assert float(recorded.split()[2]) > 0


def test_plot_draws_a_run_and_its_log_has_the_signal_to_noise_ratio(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["run", "smoke", "num_updates=4", "validate_every=2", "--out", str(out)]) == 0
    assert main(["plot", str(out)]) == 0
    assert (out / "metrics.png").read_bytes().startswith(b"\x89PNG")
    titles = [axes.get_title() for axes in draw_run(read_metrics(out / "metrics.jsonl")).axes]
    assert [title.split()[0] for title in titles] == ["meta-loss", "norm", "signal-to-noise", "validation", "held-out"]
    assert main(["plot", str(tmp_path / "none")]) == 2
    assert "nothing to draw" in capsys.readouterr().err


def test_a_panel_has_points_and_the_mean_of_the_last_lines():
    metrics = [{"update": update, "loss": float(update)} for update in range(1, 41)]
    (axes,) = draw_run(metrics).axes
    points, mean = axes.lines
    assert list(points.get_ydata()) == [float(update) for update in range(1, 41)]
    assert mean.get_ydata()[-1] == sum(range(21, 41)) / 20


@pytest.mark.parametrize(
    ("module", "extra", "command"),
    [("matplotlib", "eval", "plot"), ("sklearn", "train", "run"), ("numpy", "train", "--dry-run")],
)
def test_a_missing_extra_is_one_line(tmp_path, module, extra, command):
    out = tmp_path / "run"
    arguments = ["run", "smoke", "num_updates=1", "--out", str(out), *(["--dry-run"] if command == "--dry-run" else [])]
    code = "import sys; from flatopt.metatrain.cli import main; "
    if command == "plot":
        assert main(arguments) == 0
        arguments = ["plot", str(out)]
    code += f"sys.modules[{module!r}] = None; sys.exit(main({arguments!r}))"
    environment = {**os.environ, "PYTHONPATH": str(Path(flatopt.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"flatopt-train: {module} is not installed: pip install 'flatopt[{extra}]'\n"
    assert out.exists() == (command == "plot")  # nothing was begun


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device", "x"), PermissionError(13, "Permission denied")]
)
def test_a_disk_that_cannot_be_written_is_one_line_that_says_how_to_go_on(tmp_path, capsys, monkeypatch, error):
    original = trainer.save

    def save(state, folder):
        if state.update > 0:
            raise error
        original(state, folder)

    monkeypatch.setattr(trainer, "save", save)
    assert main(["run", "smoke", "num_updates=2", "--out", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert error.strerror in line
    assert line.endswith(f"; then go on with: flatopt-train resume {tmp_path / 'run'}")


def test_a_disk_that_is_full_from_the_start_does_not_offer_to_go_on(tmp_path, capsys, monkeypatch):
    def write_durably(path, content):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(checkpoint, "write_durably", write_durably)
    assert main(["run", "smoke", "num_updates=2", "--out", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "No space left" in line and "resume" not in line


def test_smoke_needs_no_data_that_has_to_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("FLATOPT_DATA", str(tmp_path))
    _cached_table.cache_clear()
    assert main(["run", "smoke", "num_updates=1", "--out", str(tmp_path / "run")]) == 0


def test_a_dry_run_says_that_data_are_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FLATOPT_DATA", str(tmp_path))
    _cached_table.cache_clear()
    assert main(["run", "l2o-dm", "--dry-run", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "name their folder in FLATOPT_DATA" in said.err


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert (caught.value.code, capsys.readouterr().out) == (0, f"flatopt {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "smok", "--out", "OUT"], "unknown recipe 'smok': valid are smoke, flat-v2"),
        (["run", "smoke", "speed=1", "--out", "OUT"], "unknown key 'speed': valid are recipe, rule"),
        (["run", "smoke", "seed=a", "--out", "OUT"], "seed must be an integer of at least 0"),
        (["run", "smoke", "estimator.name=guess", "--out", "OUT"], "estimator.name must be one of persistent-es, "),
        (["run", "smoke", "tasks.tabular.name=tree", "--out", "OUT"], "'tree'"),
        (["run", "smoke", "--out", "OUT", "--device", "nowhere"], "device 'nowhere' cannot be used"),
        (["resume", "OUT"], "no whole checkpoint in OUT/checkpoints"),
        (["export", "OUT", "--to", "OUT/export"], "no whole checkpoint in OUT/checkpoints"),
        (["push", "OUT", "org/name"], "'OUT' is neither shipped weights"),
        (["speed", "--rounds", "0"], "--rounds must be at least 1, got 0"),
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
