import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from small import by_path
from toy_metatrain import Slow, toy_config, toy_estimator

import flatopt
from flatopt.metatrain import CurriculumConfig, EstimatorConfig, TrainingInterrupted, train
from flatopt.metatrain._stop import StopOnSignal
from flatopt.metatrain.checkpoint import latest
from flatopt.metatrain.curriculum import Verdict
from flatopt.metatrain.estimators import GradientEstimator, MetaGradient
from flatopt.metatrain.meta_optimizer import learning_rate

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Scripted(GradientEstimator):
    """Gradient and loss as functions of the weights and the number of the call."""

    gradient: object
    loss: object = staticmethod(lambda call: 1.0)

    def init(self, weights, generator, num_steps=None):
        return {"call": torch.tensor(0)}

    def estimate(self, weights, state, generator, num_steps=None):
        call = int(state["call"])
        loss = torch.tensor(self.loss(call))
        return MetaGradient(self.gradient(weights, call), loss, {"call": call}), {"call": state["call"] + 1}


@dataclass(frozen=True, kw_only=True)
class Crashing(GradientEstimator):
    """The toy estimator, until an exception after some calls."""

    calls: int
    log: list

    def init(self, weights, generator, num_steps=None):
        return toy_estimator().init(weights, generator)

    def estimate(self, weights, state, generator, num_steps=None):
        self.log.append(None)
        if len(self.log) > self.calls:
            raise ArithmeticError
        return toy_estimator().estimate(weights, state, generator)


def read_metrics(out):
    """The log, without the times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_equal(actual, expected):
    left, right = by_path(actual), by_path(expected)
    assert list(left) == list(right)
    for name in right:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0)


def assert_same_end(out, reference):
    """Weights, average, optimizer, estimator, generator, smoothed loss and metrics of two runs agree bit for bit."""
    left, right = latest(out / "checkpoints"), latest(reference / "checkpoints")
    assert left.update == right.update == left.config.num_updates
    for group in ("weights", "average", "optimizer", "estimator", "generator"):
        assert_equal(getattr(left, group), getattr(right, group))
    assert left.smoothed_loss == right.smoothed_loss
    assert read_metrics(out) == read_metrics(reference)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("reference") / "run"
    train(toy_config(), out, estimator=toy_estimator())
    return out


def start(out, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(flatopt.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "toy_metatrain.py"), str(out), *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_update(out, update, process):
    """Return once a line of the log says that ``update`` is done."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= update:
            return
        time.sleep(0.01)
    raise AssertionError(f"update {update} not seen: {process.communicate()[1]}")


def test_training_lowers_the_meta_loss(reference):
    losses = [line["loss"] for line in read_metrics(reference)]
    assert sum(losses[-9:]) < 0.7 * sum(losses[:9])


def test_an_update_is_clip_then_adam_then_average_with_the_learning_rate_of_its_number(tmp_path):
    config = toy_config(max_grad_norm=0.5, num_updates=25, ema_decay=0.6)

    def gradient(weights, call):
        return {name: (1 + call % 3) * weight.cos() for name, weight in weights.items()}

    actual = train(config, tmp_path, estimator=Scripted(gradient=gradient))

    weights = config.build_rule().init_weights(torch.Generator().manual_seed(config.seed))
    average = {name: weight.clone() for name, weight in weights.items()}
    leaves = list(weights.values())
    optimizer = torch.optim.Adam(leaves, lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: learning_rate(config, update))
    for call in range(25):
        for leaf, value in zip(leaves, gradient(weights, call).values(), strict=True):
            leaf.grad = value
        torch.nn.utils.clip_grad_norm_(leaves, 0.5)
        optimizer.step()
        schedule.step()
        decay = min(0.6, (1 + call) / (10 + call))
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}
    for name, value in average.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(latest(tmp_path / "checkpoints").weights, weights, rtol=1e-5, atol=1e-6)


def test_without_average_the_last_weights_are_returned(tmp_path):
    weights = train(toy_config(ema_decay=0.0), tmp_path, estimator=toy_estimator())
    assert_equal(weights, latest(tmp_path / "checkpoints").weights)


def test_learning_rate_warms_up_then_falls_to_its_final_fraction():
    config = toy_config(num_updates=1000, warmup_updates=100, meta_lr=2.0, meta_lr_final_fraction=0.1)
    assert learning_rate(config, 0) == pytest.approx(0.02)
    assert learning_rate(config, 99) == learning_rate(config, 100) == 2.0
    assert learning_rate(config, 550) == pytest.approx(1.1)  # half way between 2 and 0.2
    assert learning_rate(config, 999) == pytest.approx(0.2, abs=1e-4)


def test_a_run_that_ends_before_its_cosine_follows_the_longer_run():
    longer = toy_config(num_updates=1000, warmup_updates=100)
    shorter = toy_config(num_updates=400, schedule_updates=1000, warmup_updates=100)
    assert [learning_rate(shorter, update) for update in (0, 99, 250, 399)] == [
        learning_rate(longer, update) for update in (0, 99, 250, 399)
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_dropped_counted_and_reported(tmp_path, capsys, bad):
    def gradient(weights, call):
        values = {name: torch.full_like(weight, 0.5) for name, weight in weights.items()}
        if call in (2, 5):
            values["start"][1] = bad
        return values

    config = toy_config(num_updates=8, meta_lr_final_fraction=1.0, warmup_updates=0, ema_decay=0.0)
    weights = train(config, tmp_path, estimator=Scripted(gradient=gradient))

    # As if the two updates had not been: six steps of Adam against a constant gradient are six times the rate.
    start = config.build_rule().init_weights(torch.Generator().manual_seed(config.seed))
    for name in start:
        torch.testing.assert_close(weights[name], start[name] - 6 * config.meta_lr, rtol=1e-5, atol=1e-6)
    assert [line["num_dropped"] for line in read_metrics(tmp_path)] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert read_metrics(tmp_path)[2]["gradient_norm"] is None
    assert "2 meta-gradients were not finite and were dropped" in capsys.readouterr().err
    assert latest(tmp_path / "checkpoints").num_dropped == 2


def test_huge_finite_gradients_are_clipped_not_dropped(tmp_path):
    def gradient(weights, call):
        return {name: torch.full_like(weight, 1e30) for name, weight in weights.items()}

    train(toy_config(num_updates=2), tmp_path, estimator=Scripted(gradient=gradient))
    checkpoint = latest(tmp_path / "checkpoints")
    assert checkpoint.num_dropped == 0
    assert all(value.isfinite().all() for value in checkpoint.weights.values())


def test_a_loss_that_is_not_finite_does_not_spoil_the_moving_average(tmp_path):
    def gradient(weights, call):
        return {name: torch.zeros_like(weight) for name, weight in weights.items()}

    losses = [2.0, float("nan"), 2.0]
    train(toy_config(num_updates=3), tmp_path, estimator=Scripted(gradient=gradient, loss=losses.__getitem__))
    assert [line["smoothed_loss"] for line in read_metrics(tmp_path)] == pytest.approx([2.0, 2.0, 2.0])


@pytest.mark.parametrize("calls", [0, 3, 7, 8, 20, 29])
def test_a_run_that_died_resumes_bit_for_bit(tmp_path, reference, calls):
    with pytest.raises(ArithmeticError):
        train(toy_config(), tmp_path, estimator=Crashing(calls=calls, log=[]))
    assert latest(tmp_path / "checkpoints").update == calls - calls % 7
    train(toy_config(), tmp_path, estimator=toy_estimator(), resume=True)
    assert_same_end(tmp_path, reference)


def test_a_half_written_line_of_the_log_is_cut_on_resuming(tmp_path, reference):
    with pytest.raises(ArithmeticError):
        train(toy_config(), tmp_path, estimator=Crashing(calls=9, log=[]))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"update": 1')
    train(toy_config(), tmp_path, estimator=toy_estimator(), resume=True)
    assert_same_end(tmp_path, reference)


@pytest.mark.parametrize("damaged", [b"\xff\x00{", b'{"upda', b"3", b"null", b"{}"])
def test_a_damaged_line_within_the_log_is_the_only_one_that_resuming_drops(tmp_path, reference, damaged):
    with pytest.raises(ArithmeticError):
        train(toy_config(), tmp_path, estimator=Crashing(calls=9, log=[]))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:3], damaged, *lines[4:], b""]))
    train(toy_config(), tmp_path, estimator=toy_estimator(), resume=True)
    assert read_metrics(tmp_path) == [line for line in read_metrics(reference) if line["update"] != 4]


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    before = train(toy_config(), tmp_path, estimator=toy_estimator())
    metrics = read_metrics(tmp_path)
    assert_equal(train(toy_config(), tmp_path, estimator=toy_estimator(), resume=True), before)
    assert read_metrics(tmp_path) == metrics


def test_resuming_a_finished_run_prepares_nothing(tmp_path, capsys):
    train(toy_config(), tmp_path, estimator=toy_estimator())
    capsys.readouterr()
    train(toy_config(), tmp_path, estimator=Interrupting(where="prepare", log=[]), resume=True)
    assert "30 of 30 updates done" in capsys.readouterr().err


def test_sessions_and_seconds_add_up(tmp_path):
    with pytest.raises(ArithmeticError):
        train(toy_config(), tmp_path, estimator=Crashing(calls=15, log=[]), command="first")
    seconds = latest(tmp_path / "checkpoints").seconds
    train(toy_config(), tmp_path, estimator=toy_estimator(), resume=True, command="second")
    checkpoint = latest(tmp_path / "checkpoints")
    found = [(one["command"], one["first_update"], one["torch"]) for one in checkpoint.sessions]
    assert found == [("first", 0, torch.__version__), ("second", 14, torch.__version__)]
    assert 0 < seconds < checkpoint.seconds


def test_sigkill_then_resume_ends_bit_identical(tmp_path, reference):
    process = start(tmp_path)
    wait_for_update(tmp_path, 12, process)
    process.kill()
    process.communicate()
    assert 7 <= latest(tmp_path / "checkpoints").update < 30
    train(toy_config(), tmp_path, estimator=toy_estimator(), resume=True)
    assert_same_end(tmp_path, reference)


def test_sigint_saves_the_current_update_and_exits(tmp_path, reference):
    process = start(tmp_path)
    wait_for_update(tmp_path, 9, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    saved = latest(tmp_path / "checkpoints").update
    assert 9 <= saved < 30
    assert saved == read_metrics(tmp_path)[-1]["update"]  # nothing that was done is lost
    train(toy_config(), tmp_path, estimator=toy_estimator(), resume=True)
    assert_same_end(tmp_path, reference)


@dataclass(frozen=True, kw_only=True)
class Interrupting(GradientEstimator):
    """The toy estimator, until a signal in the middle of the preparation, of the first runs or of an update."""

    where: str
    log: list

    def prepare(self, weights):
        self._maybe("prepare")

    def init(self, weights, generator, num_steps=None):
        torch.rand(1, generator=generator)  # what an interrupted call has drawn is drawn again
        self._maybe("init")
        return toy_estimator().init(weights, generator)

    def estimate(self, weights, state, generator, num_steps=None):
        result = toy_estimator().estimate(weights, state, generator)
        self.log.append(None)
        self._maybe(f"update {len(self.log)}")
        return result

    def _maybe(self, where):
        if where == self.where:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("where", "update"), [("prepare", 0), ("init", 0), ("update 1", 0), ("update 5", 4), ("update 30", 29)]
)
def test_a_signal_stops_at_once_wherever_it_comes_and_the_run_resumes_bit_for_bit(tmp_path, capsys, where, update):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match=f"SIGTERM after update {update}") as caught:
        train(toy_config(), tmp_path / "cut", estimator=Interrupting(where=where, log=[]))
    assert (caught.value.signal_number, caught.value.update) == (signal.SIGTERM, update)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert latest(tmp_path / "cut" / "checkpoints").update == update
    assert "updates in" not in capsys.readouterr().err  # no summary of what did not end
    whole = Interrupting(where="never", log=[])
    train(toy_config(), tmp_path / "cut", estimator=whole, resume=True)
    train(toy_config(), tmp_path / "whole", estimator=whole)
    assert_same_end(tmp_path / "cut", tmp_path / "whole")


def test_a_signal_during_validation_takes_the_update_back(tmp_path):
    config = toy_config(validate_every=3, num_updates=12)

    def validate(weights, num_steps, interrupted=False):
        if interrupted:
            signal.raise_signal(signal.SIGINT)
        return Verdict(float(sum(value.double().sum() for value in weights.values())))

    calls = iter([False, True])
    with pytest.raises(TrainingInterrupted, match="SIGINT after update 5"):
        train(
            config,
            tmp_path / "cut",
            estimator=toy_estimator(),
            validate=lambda weights, num_steps: validate(weights, num_steps, next(calls)),
        )
    train(config, tmp_path / "cut", estimator=toy_estimator(), resume=True, validate=validate)
    train(config, tmp_path / "whole", estimator=toy_estimator(), validate=validate)
    assert_same_end(tmp_path / "cut", tmp_path / "whole")
    assert_equal(
        *(latest(tmp_path / name / "checkpoints").best for name in ("cut", "whole")),
    )


def test_a_handler_that_could_not_be_put_back_is_left_alone(monkeypatch):
    """As under a program that embeds Python: its handlers are ``None`` here."""
    installed = []
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda number, handler: installed.append(handler))
    with StopOnSignal():
        pass
    assert installed == []


def test_the_first_line_and_the_first_checkpoint_come_before_the_preparation(tmp_path, capsys):
    seen = []

    @dataclass(frozen=True)
    class Looking(Scripted):
        gradient: object = None

        def prepare(self, weights):
            seen.append((capsys.readouterr().err, latest(tmp_path / "checkpoints").update))

    gradient = Looking(gradient=lambda weights, call: {name: value * 0 for name, value in weights.items()})
    train(toy_config(num_updates=1), tmp_path, estimator=gradient)
    ((line, update),) = seen
    assert line == f"toy: 3 weights of toy, 1 updates, cpu, in {tmp_path}; tasks: quadratics\n"
    assert update == 0


def test_checkpoints_by_time(tmp_path):
    config = toy_config(checkpoint_every=0, checkpoint_every_seconds=0.0)
    with pytest.raises(ArithmeticError):
        train(config, tmp_path, estimator=Crashing(calls=4, log=[]))
    assert latest(tmp_path / "checkpoints").update == 4


def scripted_validation(losses, log):
    """Give one loss after the other, as a function of the weights seen so far: the same after a resume."""

    def validate(weights, num_steps):
        key = tuple(float(value.double().sum()) for value in weights.values()) + (num_steps,)
        if key not in log:
            log[key] = losses[len(log)]
        return Verdict(log[key])

    return validate


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_validation_sees_the_average_and_the_best_weights_are_returned(tmp_path, ema_decay):
    seen = []

    def validate(weights, num_steps):
        assert num_steps is None
        seen.append(weights)
        return Verdict([3.0, 1.0, 2.0][len(seen) - 1], {"mlp": 10.0 * len(seen)})

    config = toy_config(validate_every=10, log_every=100, ema_decay=ema_decay)
    weights = train(config, tmp_path, estimator=toy_estimator(), validate=validate)
    checkpoint = latest(tmp_path / "checkpoints")
    assert_equal(seen[2], checkpoint.average or checkpoint.weights)
    assert_equal(weights, seen[1])
    assert_equal(checkpoint.shipped_weights, seen[1])
    assert checkpoint.best_validation == {"update": 20, "loss": 1.0}
    keys = ("update", "validation_loss", "validation/mlp")
    assert [tuple(line.get(key) for key in keys) for line in read_metrics(tmp_path)] == [
        (10, 3.0, 10.0),
        (20, 1.0, 20.0),
        (30, 2.0, 30.0),
    ]


CURRICULUM = {
    "estimator": EstimatorConfig(truncation_length=10),
    "curriculum": CurriculumConfig(stages=(10, 20, 50), min_num_eval=2),
    "validate_every": 3,
    "num_updates": 60,
    "ema_decay": 0.0,
}


def test_advancing_goes_back_to_the_best_weights_and_lengthens_the_runs(tmp_path, capsys):
    seen, stages, given = [], [], []
    losses = iter([5.0, 6.0, 9.0, 8.0, 8.5, 20.0, 30.0, 30.0])  # the third and the sixth: the best at another length

    def validate(weights, num_steps):
        seen.append((weights, num_steps))
        return Verdict(next(losses))

    @dataclass(frozen=True)
    class Watching(GradientEstimator):
        def init(self, weights, generator, num_steps=None):
            return toy_estimator().init(weights, generator)

        def estimate(self, weights, state, generator, num_steps=None):
            given.append({key: value.detach().clone() for key, value in weights.items()})
            stages.append(num_steps)
            return toy_estimator().estimate(weights, state, generator)

    weights = train(toy_config(**CURRICULUM), tmp_path, estimator=Watching(), validate=validate)
    assert [steps for _, steps in seen] == [20, 20, 50, 50, 50, 50, 50, 50]
    assert_equal(seen[2][0], seen[0][0])  # measured again, at the next length
    assert_equal(seen[5][0], seen[3][0])
    assert_equal(weights, seen[3][0])  # nothing was better in the last stage, which ended the run
    assert stages == [10] * 6 + [20] * 6 + [50] * 6
    assert_equal(given[6], seen[0][0])  # the first updates of a stage start from the best weights of the one before
    assert_equal(given[12], seen[3][0])
    checkpoint = latest(tmp_path / "checkpoints")
    assert (checkpoint.update, checkpoint.progress.finished) == (18, True)
    assert checkpoint.best_validation == {"update": 9, "loss": 20.0, "stage": 2, "num_steps": 50}
    stages = [line["validation_stage"] for line in read_metrics(tmp_path) if "validation_loss" in line]
    assert stages == [0, 0, 1, 1, 2, 2]
    # What validation has ended does not go on.
    assert_equal(
        train(toy_config(**CURRICULUM), tmp_path, estimator=Watching(), resume=True, validate=validate), weights
    )
    assert "18 of 60 updates done, ended by validation" in capsys.readouterr().err


def test_a_curriculum_resumes_bit_for_bit(tmp_path):
    losses = [5.0, 6.0, 9.0, 8.0, 8.5, 20.0, 15.0, 14.0, 16.0, 15.0, 14.5, 13.0, *[12.0] * 30]
    log: dict = {}
    config = toy_config(**CURRICULUM, checkpoint_every=1)
    estimator = Crashing(calls=10**6, log=[])
    train(config, tmp_path / "whole", estimator=estimator, validate=scripted_validation(losses, log))
    whole = latest(tmp_path / "whole" / "checkpoints")
    assert whole.progress.stage == 2
    for calls in (5, 6, 7, 13):
        out = tmp_path / str(calls)
        with pytest.raises(ArithmeticError):
            dying = Crashing(calls=calls, log=[])
            train(config, out, estimator=dying, validate=scripted_validation(losses, log))
        train(config, out, estimator=estimator, resume=True, validate=scripted_validation(losses, log))
        resumed = latest(out / "checkpoints")
        for group in ("weights", "best", "optimizer", "estimator", "generator"):
            assert_equal(getattr(resumed, group), getattr(whole, group))
        assert (resumed.progress, resumed.best_validation) == (whole.progress, whole.best_validation)
        assert read_metrics(out) == read_metrics(tmp_path / "whole")


def test_a_used_folder_is_refused_with_the_way_out(tmp_path, reference):
    with pytest.raises(ValueError, match=f"not empty.*flatopt-train resume {reference}"):
        train(toy_config(), reference, estimator=toy_estimator())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not a folder"):
        train(toy_config(), tmp_path / "file", estimator=toy_estimator())


def test_what_a_kill_during_the_first_checkpoint_leaves_is_no_run(tmp_path):
    writing = tmp_path / "checkpoints" / ".writing-update-00000000"
    writing.mkdir(parents=True)
    (writing / "state.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="no whole checkpoint"):
        train(toy_config(), tmp_path, estimator=toy_estimator(), resume=True)
    train(toy_config(num_updates=2), tmp_path, estimator=toy_estimator())


def test_resuming_with_another_configuration_is_refused(reference):
    with pytest.raises(ValueError, match="another configuration"):
        train(toy_config(seed=1), reference, estimator=toy_estimator(), resume=True)


def test_a_device_that_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(ValueError, match="device 'nowhere' cannot be used"):
        train(toy_config(), tmp_path, estimator=toy_estimator(), device="nowhere")


def test_a_terminal_gets_a_progress_bar_with_the_loss(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    train(toy_config(), tmp_path, estimator=toy_estimator())
    err = capsys.readouterr().err
    assert "30/30" in err
    assert f"meta-loss {latest(tmp_path / 'checkpoints').smoothed_loss:.4f}" in err


def test_elsewhere_a_line_now_and_then_tells_the_progress(tmp_path, capsys):
    train(toy_config(), tmp_path, estimator=toy_estimator())
    lines = capsys.readouterr().err.splitlines()[1:]
    assert len(lines) == 2
    assert lines[0].startswith("update 1/30  meta-loss ")
    assert "ETA" in lines[0]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, last = sum(losses[:8]) / 8, sum(losses[-8:]) / 8  # of thirty
    assert lines[1].startswith("30 of 30 updates in 0:00:0")
    assert f", meta-loss {first:.4f} in the first quarter, {last:.4f} in the last (" in lines[1]


def test_tensorboard_events_are_written_when_asked_for(tmp_path):
    pytest.importorskip("tensorboard")
    train(toy_config(tensorboard=True, num_updates=3), tmp_path, estimator=toy_estimator())
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_weights_live_there_and_a_run_resumes_bit_for_bit(tmp_path):
    devices = set()

    def gradient(weights, call):
        devices.update(weight.device.type for weight in weights.values())
        if call == 12 and not crashed:
            crashed.append(call)
            raise ArithmeticError
        return {name: (1 + call % 3) * weight.cos() for name, weight in weights.items()}

    crashed = [None]
    whole = train(toy_config(), tmp_path / "whole", estimator=Scripted(gradient=gradient), device="cuda")
    crashed.clear()
    with pytest.raises(ArithmeticError):
        train(toy_config(), tmp_path / "cut", estimator=Scripted(gradient=gradient), device="cuda")
    resumed = train(toy_config(), tmp_path / "cut", estimator=Scripted(gradient=gradient), device="cuda", resume=True)
    assert devices == {"cuda"}
    assert_equal(resumed, whole)
    assert all(weight.device.type == "cpu" for weight in whole.values())


def test_slow_only_waits():
    """The toy of the signal tests computes what the reference does."""
    weights = toy_config().build_rule().init_weights(torch.Generator().manual_seed(0))
    results = []
    for seconds in (0.0, 0.01):
        estimator, generator = toy_estimator(seconds), torch.Generator().manual_seed(1)
        assert isinstance(estimator, Slow)
        results.append(estimator.estimate(weights, estimator.init(weights, generator), generator)[0].gradient)
    assert_equal(*results)
