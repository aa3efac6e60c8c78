"""FlatOpt inside the training loops of others: the real libraries where they are installed, else their calls."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import distributed_checks
import pytest
import torch
from helpers import assert_same_state, learned
from torch import Tensor, nn
from torchvision_import import make_torchvision_importable

from flatopt import FlatOpt, LearnedRule


@pytest.fixture
def toy() -> LearnedRule:
    return learned("toy-mixer", perturbation=0.1)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def batch(step: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def plain_loop(
    rule: LearnedRule | None, steps: int, period: int = 100, shows_averages: bool = False, **options: Any
) -> nn.Module:
    """Train in the ordinary way; batches come again after each ``period``."""
    model = make_model()
    opt = FlatOpt(model.parameters(), **(options if rule is None else options | {"pretrained": rule}))
    for step in range(steps):
        opt.zero_grad()
        loss_of(model, batch(step % period)).backward()
        opt.step()
    if shows_averages:
        opt.eval()
    return model


def assert_same_model(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()))


# --- torch.distributed ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_fsdp2_ddp_and_zero_equal_one_process(world_size: int, tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    context = torch.multiprocessing.spawn(
        distributed_checks.run_all, (world_size, str(tmp_path)), nprocs=world_size, join=False
    )
    deadline = time.monotonic() + 270
    while not context.join(timeout=5):  # raises what a rank raised
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the processes hang")


# --- the calls that libraries make, imitated -----------------------------------------------------------------------


def test_calls_of_lightning(toy: LearnedRule) -> None:
    """Automatic optimization runs forward, backward and the hooks inside the closure, given by keyword."""
    model = make_model()
    opt = FlatOpt(model.parameters(), pretrained=toy)
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            loss = loss_of(model, batch(step))
            opt.zero_grad()
            loss.backward()
            return loss.detach()

        assert isinstance(opt.step(closure=closure), Tensor)
    assert_same_model(model, plain_loop(toy, 4))


def test_calls_of_accelerate(toy: LearnedRule) -> None:
    """``prepare`` sends the state through the device, ``step`` passes its closure by position."""
    model = make_model()
    opt = FlatOpt(model.parameters(), pretrained=toy)
    for step in range(4):
        opt.zero_grad(set_to_none=True)
        loss_of(model, batch(step)).backward()
        opt.step(None)
        opt.load_state_dict(opt.state_dict())
    assert_same_model(model, plain_loop(toy, 4))


def test_calls_of_the_huggingface_trainer(toy: LearnedRule) -> None:
    """Two groups, one without weight decay, from a class and JSON-like arguments; clipping and a schedule."""
    model = make_model()
    groups = [
        {"params": [param for param in model.parameters() if param.dim() > 1], "weight_decay": 0.1},
        {"params": [param for param in model.parameters() if param.dim() < 2], "weight_decay": 0.0},
    ]
    opt = FlatOpt(groups, **{"lr": 1.0, "pretrained": toy, "num_steps": 6})
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: min(1.0, step / 3))
    losses = []
    for step in range(6):
        loss = loss_of(model, batch(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        schedule.step()
        model.zero_grad()
        losses.append(float(loss.detach()))
    assert opt.param_groups[0]["lr"] == 1.0
    assert len(opt.state) == 4


def test_calls_of_timm(toy: LearnedRule) -> None:
    """Factories build ``Class(params, weight_decay=..., **kwargs)``."""
    kwargs = {"lr": 0.5, "pretrained": toy}
    opt = FlatOpt(make_model().named_parameters(), weight_decay=0.0, **kwargs)
    assert opt.defaults["lr"] == 0.5


def test_moving_the_state_as_lightning_does(toy: LearnedRule) -> None:
    """It moves every tensor of the state except the key ``step``."""
    model = make_model()
    opt = FlatOpt(model.parameters(), pretrained=toy)
    loss_of(model, batch(0)).backward()
    opt.step()
    for state in opt.state.values():
        for key, value in state.items():
            if key != "step":
                state[key] = value.to("cpu", copy=True)
    opt.step()
    assert {float(state["step"]) for state in opt.state.values()} == {2.0}


def test_scaler_with_unscaling_and_clipping(toy: LearnedRule) -> None:
    model = make_model()
    opt = FlatOpt(model.parameters(), pretrained=toy)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(4):
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch(step))
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        scaler.step(opt)
        scaler.update()
    assert {float(state["step"]) for state in opt.state.values()} == {4.0}


def test_step_in_a_compiled_training_step_runs(toy: LearnedRule) -> None:
    model = make_model()
    opt = FlatOpt(model.parameters(), pretrained=toy)

    def train_step(x: Tensor) -> None:
        opt.zero_grad()
        loss_of(model, x).backward()
        opt.step()

    torch._dynamo.reset()
    compiled = torch.compile(train_step, backend="eager")
    for step in range(3):
        compiled(batch(step))
    assert_same_model(model, plain_loop(toy, 3))


def test_the_exchange_for_averages_in_a_compiled_evaluation_runs() -> None:
    model = make_model()
    opt = FlatOpt(model.parameters())
    for step in range(3):
        opt.zero_grad()
        loss_of(model, batch(step)).backward()
        opt.step()
    last = copy.deepcopy(model)

    def evaluate(x: Tensor) -> Tensor:
        opt.eval()
        loss = loss_of(model, x).detach()
        opt.train()
        return loss

    torch._dynamo.reset()
    loss = torch.compile(evaluate, backend="eager")(batch(0))  # without warnings of what cannot be traced
    assert_same_model(model, last)
    assert float(loss) == float(evaluate(batch(0)))


# --- the real ones, where installed; their own warnings are not ours ------------------------------------------------

TABLE = Path(__file__).parent.parent / "docs" / "results" / "integrations.md"
HEADER = ["Library", "Version", "What ran", "Against the plain loop", "Resumed run"]
real = pytest.mark.filterwarnings("ignore", "error:.*[Ff]lat[Oo]pt:UserWarning", "error:.*num_steps:UserWarning")


def library(name: str, *needed: str) -> Any:
    """Import a library, or skip where it is not installed."""
    for each in (*needed, name):
        if importlib.util.find_spec(each.partition(".")[0]) is None:
            pytest.skip(f"{each} is not installed")
    make_torchvision_importable()
    for each in needed:
        importlib.import_module(each)
    return importlib.import_module(name)


def check_row(package: str, what: str, plain: str, resumed: str) -> None:
    """Hold the row of docs/integrations.md to what ran here; ``FLATOPT_WRITE_TABLES=1`` writes it instead."""
    lines = TABLE.read_text(encoding="utf-8").splitlines() if TABLE.exists() else []
    rows = {cells[0]: cells for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])}
    row = [package, importlib.metadata.version(package), what, plain, resumed]
    if os.environ.get("FLATOPT_WRITE_TABLES"):
        rows[package] = row
        lines = [HEADER, ["---"] * len(HEADER), *(rows[name] for name in sorted(rows, key=str.lower))]
        TABLE.write_text("".join("| " + " | ".join(line) + " |\n" for line in lines), encoding="utf-8")
    else:
        assert rows[package][2:] == row[2:], "FLATOPT_WRITE_TABLES=1 pytest tests/test_integrations.py renews the table"


def compare(one: nn.Module, other: nn.Module) -> str:
    """Return how well two models agree; fail if they do not."""
    pairs = list(zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    if all(torch.equal(first, second) for first, second in pairs):
        return "equal bit for bit"
    for first, second in pairs:
        torch.testing.assert_close(first, second)
    return "equal to rounding"


@real
def test_accelerate(tmp_path: Path) -> None:
    accelerate = library("accelerate")

    def prepared() -> tuple[Any, nn.Module, Any]:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = make_model()
        return accelerator, *accelerator.prepare(model, FlatOpt(model.parameters(), num_steps=8))

    def fit(accelerator: Any, model: nn.Module, opt: Any, first: int, last: int) -> None:
        for step in range(first, last):
            for half in batch(step).chunk(2):
                with accelerator.accumulate(model):
                    accelerator.backward(loss_of(model, half))
                    opt.step()
                    opt.zero_grad()

    accelerator, model, opt = prepared()
    fit(accelerator, model, opt, 0, 4)
    accelerator.save_state(str(tmp_path))
    fit(accelerator, model, opt, 4, 8)
    other_accelerator, other, other_opt = prepared()
    other_accelerator.load_state(str(tmp_path))
    fit(other_accelerator, other, other_opt, 4, 8)
    assert {float(state["step"]) for state in other_opt.optimizer.state.values()} == {8.0}
    assert_same_state(opt.optimizer, other_opt.optimizer)
    plain = compare(model, plain_loop(None, 8, num_steps=8))
    check_row("accelerate", "`prepare`, accumulation over 2, `save_state`", plain, compare(model, other))


def lightning(package: str) -> tuple[Any, Any]:
    """Return Lightning, and a module for it without an optimizer."""
    pl = library({"lightning": "lightning.pytorch"}.get(package, "pytorch_lightning"))

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()

        def training_step(self, x: Tensor, index: int) -> Tensor:
            return loss_of(self.model, x)

    return pl, Module


def lightning_trainer(pl: Any, folder: Path, **options: Any) -> Any:
    """Return a trainer that prints nothing."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", default_root_dir=folder, **quiet, **options)


@real
@pytest.mark.parametrize("package", ["lightning", "pytorch-lightning"])
def test_lightning(package: str, tmp_path: Path) -> None:
    pl, base = lightning(package)

    class Module(base):
        def configure_optimizers(self) -> FlatOpt:
            return FlatOpt(self.parameters(), num_steps=int(self.trainer.estimated_stepping_batches))

    def fit(max_steps: int, **options: Any) -> tuple[Any, Any]:
        module = Module()
        callbacks = [StopAfter(max_steps)]
        trainer = lightning_trainer(pl, tmp_path, max_epochs=2, enable_checkpointing=False, callbacks=callbacks)
        loader = torch.utils.data.DataLoader([batch(step % 4) for step in range(4)], batch_size=None)
        trainer.fit(module, loader, **options)
        return module, trainer

    class StopAfter(pl.Callback):
        def __init__(self, steps: int):
            self.steps = steps

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= self.steps

    module, trainer = fit(4)
    assert trainer.optimizers[0].param_groups[0]["num_steps"] == 8
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, resumed_trainer = fit(8, ckpt_path=tmp_path / "half.ckpt")
    whole, whole_trainer = fit(8)
    assert_same_state(resumed_trainer.optimizers[0], whole_trainer.optimizers[0])
    plain = compare(whole.model, plain_loop(None, 8, period=4, num_steps=8))
    what = "`Trainer.fit`, `estimated_stepping_batches`, `ckpt_path`"
    check_row(package, what, plain, compare(resumed.model, whole.model))


@real
@pytest.mark.parametrize("package", ["lightning", "pytorch-lightning"])
def test_lightning_validates_and_saves_averages(package: str, tmp_path: Path) -> None:
    """With the hooks of the tutorial: also in a run that goes on from a checkpoint of its validation."""
    pl, base = lightning(package)

    class Endless(base):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[bool] = []

        def configure_optimizers(self) -> FlatOpt:
            return FlatOpt(self.parameters())

        def show_averages(self) -> None:
            for optimizer in self.trainer.optimizers:
                optimizer.eval()

        def go_on(self) -> None:
            for optimizer in self.trainer.optimizers:
                optimizer.train()

        def on_validation_start(self) -> None:
            if self.trainer.state.fn == "fit":
                self.show_averages()

        def on_validation_end(self) -> None:
            if self.trainer.state.fn == "fit":
                self.go_on()

        on_train_start, on_train_end = go_on, show_averages

        def validation_step(self, x: Tensor, index: int) -> None:
            states = self.trainer.optimizers[0].state.values()
            self.seen.append(any("param_iterate" in state for state in states))
            self.log("loss", loss_of(self.model, x))

    def fit(epochs: int, **options: Any) -> tuple[Endless, Any]:
        module = Endless()
        options_of_saving = {"save_top_k": -1, "monitor": "loss", "save_on_train_epoch_end": False}
        checkpoints = pl.callbacks.ModelCheckpoint(tmp_path / "saved", **options_of_saving)
        options_of_run = {"max_epochs": epochs, "num_sanity_val_steps": 0, "callbacks": [checkpoints]}
        trainer = lightning_trainer(pl, tmp_path, **options_of_run)
        loader = torch.utils.data.DataLoader([batch(step) for step in range(4)], batch_size=None)
        trainer.fit(module, loader, loader, **options)
        last = copy.deepcopy(module.model)
        trainer.validate(module, loader, verbose=False)
        assert compare(module.model, last) == "equal bit for bit"
        return module, trainer.checkpoint_callback.best_model_path

    half, saved = fit(1)
    holds = torch.load(saved, weights_only=True)
    states = holds["optimizer_states"][0]["state"].values()
    for param, state in zip(holds["state_dict"].values(), states, strict=True):
        assert torch.equal(param, state["param_average"]) and not torch.equal(param, state["param_iterate"])
    whole, _ = fit(2)
    resumed, _ = fit(2, ckpt_path=saved)
    assert half.seen == [True] * 8 and whole.seen == [True] * 12  # four of validate()
    assert compare(whole.model, plain_loop(None, 8, period=4, shows_averages=True)) == "equal bit for bit"
    assert compare(whole.model, resumed.model) == "equal bit for bit"


class ForTrainer(nn.Module):
    """What the Trainer takes for a model."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": loss_of(self.net, x)}


def trainer_arguments(transformers: Any, folder: Path, **options: Any) -> Any:
    """Return arguments of the Trainer, without a schedule or clipping of its own, that save every fourth step."""
    plain = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "use_cpu": True}
    quiet = {"report_to": [], "disable_tqdm": True}
    return transformers.TrainingArguments(output_dir=str(folder), save_steps=4, **plain, **quiet, **options)


@real
def test_transformers_trainer(tmp_path: Path) -> None:
    transformers = library("transformers", "transformers.trainer", "accelerate")

    def fit(name: str, max_steps: int = 8, **options: Any) -> tuple[nn.Module, Any]:
        trainer = transformers.Trainer(
            model=ForTrainer(make_model()),
            args=trainer_arguments(transformers, tmp_path / name, max_steps=max_steps),
            train_dataset=[{"x": row} for step in range(8) for row in batch(step)],
            optimizer_cls_and_kwargs=(FlatOpt, {"lr": 1.0, "num_steps": max_steps}),
        )
        trainer._get_train_sampler = lambda *_: None  # the batches of the plain loop, in their order
        trainer.train(**options)
        return trainer.model.net, trainer.optimizer.optimizer

    whole, opt = fit("whole")
    resumed, resumed_opt = fit("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert {float(state["step"]) for state in resumed_opt.state.values()} == {8.0}
    assert_same_state(opt, resumed_opt)
    with pytest.warns(UserWarning, match="num_steps=12, given to this optimizer, takes the place of the num_steps=8"):
        longer, longer_opt = fit("longer", 12, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert longer_opt.param_groups[0]["num_steps"] == 12 and not torch.equal(longer[0].weight, whole[0].weight)
    what = "`Trainer`, `optimizer_cls_and_kwargs`, `resume_from_checkpoint`"
    check_row("transformers", what, compare(whole, plain_loop(None, 8, num_steps=8)), compare(whole, resumed))


@real
def test_transformers_trainer_evaluates_and_saves_averages(tmp_path: Path) -> None:
    """It calls ``optimizer.eval()`` before it evaluates, ``optimizer.train()`` before it goes on, and saves between."""
    transformers = library("transformers", "transformers.trainer", "accelerate")

    def fit(name: str, **options: Any) -> tuple[nn.Module, Any]:
        rows = [{"x": row} for step in range(8) for row in batch(step)]
        trainer = transformers.Trainer(
            model=ForTrainer(make_model()),
            args=trainer_arguments(transformers, tmp_path / name, max_steps=8, eval_strategy="steps", eval_steps=4),
            train_dataset=rows,
            eval_dataset=rows[:8],
            optimizer_cls_and_kwargs=(FlatOpt, {"lr": 1.0}),
        )
        trainer._get_train_sampler = lambda *_: None
        trainer.train(**options)
        return trainer.model.net, trainer.optimizer.optimizer

    whole, opt = fit("whole")
    assert compare(whole, plain_loop(None, 8, shows_averages=True)) == "equal bit for bit"
    assert not torch.equal(whole[0].weight, plain_loop(None, 8)[0].weight)
    resumed, resumed_opt = fit("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert compare(whole, resumed) == "equal bit for bit"
    assert_same_state(opt, resumed_opt)


@real
def test_peft(tmp_path: Path) -> None:
    peft = library("peft")

    def adapted() -> tuple[nn.Module, FlatOpt]:
        model = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules=["0", "2"]))
        return model, FlatOpt(model.parameters(), num_steps=8)

    def fit(model: nn.Module, opt: FlatOpt, first: int, last: int) -> None:
        for step in range(first, last):
            opt.zero_grad()
            loss_of(model, batch(step)).backward()
            opt.step()

    model, opt = adapted()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    fit(model, opt, 0, 4)
    model.save_pretrained(tmp_path)
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    fit(model, opt, 4, 8)
    other, other_opt = adapted()
    peft.set_peft_model_state_dict(other, peft.load_peft_weights(str(tmp_path), device="cpu"))
    other_opt.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    fit(other, other_opt, 4, 8)
    for key, value in model.state_dict().items():
        assert torch.equal(value, start[key]) is ("lora" not in key), key
    assert len(opt.state) == 4  # the frozen parameters were given too
    assert_same_state(opt, other_opt)
    check_row("peft", "`get_peft_model` with LoRA, `save_pretrained`", "frozen weights stay", compare(model, other))


@real
def test_timm() -> None:
    timm_optim = library("timm.optim")
    name, registry = "flatopt", timm_optim._optim_factory.default_registry
    registry.register(timm_optim.OptimInfo(name=name, opt_class=FlatOpt, description="learned"))

    def made() -> tuple[nn.Module, FlatOpt]:
        model = make_model()
        return model, timm_optim.create_optimizer_v2(model, name, lr=1.0, weight_decay=0.1, num_steps=8)

    def fit(model: nn.Module, opt: FlatOpt, first: int, last: int) -> None:
        for step in range(first, last):
            opt.zero_grad()
            loss_of(model, batch(step)).backward()
            opt.step()

    model, opt = made()
    assert isinstance(opt, FlatOpt)
    assert sorted(group["weight_decay"] for group in opt.param_groups) == [0.0, 0.1]  # none on biases
    fit(model, opt, 0, 4)
    other, other_opt = made()
    other.load_state_dict(model.state_dict())
    other_opt.load_state_dict(opt.state_dict())
    fit(model, opt, 4, 8)
    fit(other, other_opt, 4, 8)
    plain = make_model()
    decayed = [{"params": [param], "weight_decay": 0.1 * (param.dim() > 1)} for param in plain.parameters()]
    fit(plain, FlatOpt(decayed, num_steps=8), 0, 8)
    what = "`create_optimizer_v2` through its registry, weight decay by groups"
    check_row("timm", what, compare(model, plain), compare(model, other))


@real
def test_schedulefree_wrapper() -> None:
    schedulefree = library("schedulefree")

    def made() -> tuple[nn.Module, Any]:
        model = make_model()
        return model, schedulefree.ScheduleFreeWrapper(FlatOpt(model.parameters()), momentum=0.9)

    def fit(model: nn.Module, opt: Any, first: int, last: int) -> None:
        opt.train()
        for step in range(first, last):
            opt.zero_grad()
            loss_of(model, batch(step)).backward()
            opt.step()

    model, opt = made()
    before = float(loss_of(model, batch(0)).detach())
    fit(model, opt, 0, 20)
    opt.eval()  # as it asks to before saving
    other, other_opt = made()
    other.load_state_dict(model.state_dict())
    other_opt.load_state_dict(opt.state_dict())
    fit(model, opt, 20, 40)
    fit(other, other_opt, 20, 40)
    opt.eval()
    other_opt.eval()
    assert float(loss_of(model, batch(0)).detach()) < before
    what = "`ScheduleFreeWrapper`, `train`, `eval`"
    check_row("schedulefree", what, "another method", compare(model, other))
