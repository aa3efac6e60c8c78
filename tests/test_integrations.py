"""FlatOpt inside the training loops of others: the real libraries where they are installed, else their calls."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import distributed_checks
import pytest
import torch
from helpers import assert_same_state, learned
from torch import Tensor, nn

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


def plain_loop(rule: LearnedRule, num_steps: int, **options: Any) -> nn.Module:
    model = make_model()
    opt = FlatOpt(model.parameters(), pretrained=rule, **options)
    for step in range(num_steps):
        opt.zero_grad()
        loss_of(model, batch(step)).backward()
        opt.step()
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
    assert not hasattr(opt, "train") and not hasattr(opt, "eval")
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


# --- the real ones, where installed; their own warnings are not ours ------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_accelerate(toy: LearnedRule) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = make_model()
    opt = FlatOpt(model.parameters(), pretrained=toy)
    prepared, prepared_opt = accelerator.prepare(model, opt)
    for step in range(4):
        prepared_opt.zero_grad()
        accelerator.backward(loss_of(prepared, batch(step)))
        prepared_opt.step()
    assert_same_model(model, plain_loop(toy, 4))


@pytest.mark.filterwarnings("ignore")
def test_pytorch_lightning(toy: LearnedRule, tmp_path: Path) -> None:
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()

        def training_step(self, x: Tensor, index: int) -> Tensor:
            return loss_of(self.model, x)

        def configure_optimizers(self) -> FlatOpt:
            return FlatOpt(self.model.parameters(), pretrained=toy)

    def fit(num_epochs: int, **options: Any) -> tuple[Any, Any]:
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=num_epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            enable_checkpointing=False,
        )
        loader = torch.utils.data.DataLoader([batch(step) for step in range(3)], batch_size=None)
        trainer.fit(module, loader, **options)
        return module, trainer

    module, trainer = fit(1)
    assert_same_model(module.model, plain_loop(toy, 3))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, resumed_trainer = fit(2, ckpt_path=tmp_path / "half.ckpt")
    whole, whole_trainer = fit(2)
    assert_same_model(resumed.model, whole.model)
    assert_same_state(resumed_trainer.optimizers[0], whole_trainer.optimizers[0])


@pytest.mark.filterwarnings("ignore")
def test_transformers_trainer(toy: LearnedRule, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": loss_of(self.net, x)}

    trainer = transformers.Trainer(
        model=Model(),
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
        ),
        train_dataset=[{"x": row} for step in range(4) for row in batch(step)],
        optimizer_cls_and_kwargs=(FlatOpt, {"lr": 1.0, "pretrained": toy, "num_steps": 4}),
    )
    trainer.train()
    assert {float(state["step"]) for state in trainer.optimizer.optimizer.state.values()} == {4.0}


@pytest.mark.filterwarnings("ignore")
def test_timm_factory(toy: LearnedRule) -> None:
    timm_optim = pytest.importorskip("timm.optim")
    registry = timm_optim._optim_factory.OptimizerRegistry()
    registry.register(timm_optim.OptimInfo(name="flatopt", opt_class=FlatOpt, description="learned"))
    opt = registry.create_optimizer(make_model(), "flatopt", lr=1.0, weight_decay=0.1, pretrained=toy)
    assert isinstance(opt, FlatOpt)
