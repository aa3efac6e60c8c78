"""Checks that run in processes of their own, started by ``test_integrations.py``; each compares with one process."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import learned
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from flatopt import FlatOpt

OPTIONS = {"num_steps": 20, "weight_decay": 0.1}
RULES = ("toy-mixer", "orthogonalized-momentum", "orthogonalized-momentum, strips of 3", "l2o-scale")


def run_all(rank: int, world_size: int, folder: str) -> None:
    """Run every check on one rank."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        mesh = init_device_mesh("cpu", (world_size,))
        for name in RULES:
            check_placements(name, mesh)
            check_fsdp2(name, mesh, Path(folder) / name)
        check_placements("orthogonalized-momentum", mesh, LARGE, torch.float32)
        check_averages_of_shards(mesh, Path(folder) / "averages")
        check_averages_of_shards(mesh, Path(folder) / "landing", num_steps=7)
        check_forward_passes_around_averages(mesh)
        check_bad_gradient_on_one_rank(mesh)
        check_ddp()
        for name in ("orthogonalized-momentum", "rnnprop", "l2o-scale"):
            check_parameters_of_one_rank(name, lambda step: step % (2 + rank) > 0)
        check_zero_redundancy("adam")
        check_zero_redundancy("orthogonalized-momentum")
        check_tensor_parallel(mesh)
        check_hsdp(world_size)
        check_fsdp1_is_refused()
        check_whole_state_into_shards(mesh)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))


def batch(step: int) -> Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shares = isinstance(model, DistributedDataParallel | torch.distributed.fsdp.FSDPModule)
    for step in steps:
        opt.zero_grad()
        x = batch(step)
        model(x.chunk(world_size)[rank] if shares else x).sub(1).square().mean().backward()
        opt.step()


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(params: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for param, other in zip(params, expected, strict=True):
        torch.testing.assert_close(full(param.detach()), other.detach(), rtol=1e-4, atol=1e-6)


Placed = tuple[tuple[int, ...], list[Placement] | None]
"""Shape of a parameter, and how it is placed; ``None`` for a plain tensor."""

SMALL: list[Placed] = [
    ((5, 3), [Shard(0)]),
    ((1, 4), [Shard(0)]),
    ((2, 3), [Shard(1)]),
    ((4,), [Replicate()]),
    ((3,), None),
    ((), [Replicate()]),
    ((9, 2), [Shard(1)]),
]
"""Uneven and empty shards, along either axis, replicas and plain tensors; the last is made complex."""

LARGE: list[Placed] = [
    ((320, 700), [Shard(0)]),
    ((256, 700), [Shard(1)]),
    ((700, 320), [Shard(0)]),
    ((170, 700), [Shard(0)]),
    ((384, 400), [Shard(0)]),
    ((16, 4), [Shard(0)]),
]
"""Strips of 80, 128, 96, 192 and 4 rows; the shards are handled in pieces, those of the fourth cut through a strip."""


def check_placements(
    name: str, mesh: DeviceMesh, rows: list[Placed] = SMALL, last: torch.dtype = torch.complex64
) -> None:
    """Compare an optimizer of sharded parameters with one of plain ones."""
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float32] * (len(rows) - 1) + [last]
    plain = [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
        for (shape, _), dtype in zip(rows, dtypes, strict=True)
    ]
    placed = [
        nn.Parameter(value.detach().clone() if how is None else distribute_tensor(value.detach().clone(), mesh, how))
        for value, (_, how) in zip(plain, rows, strict=True)
    ]
    opts = [FlatOpt(params, pretrained=learned(name, perturbation=0.1), **OPTIONS) for params in (plain, placed)]
    for _ in range(4):
        for value, param, (_, how) in zip(plain, placed, rows, strict=True):
            value.grad = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            param.grad = value.grad.clone() if how is None else distribute_tensor(value.grad.clone(), mesh, how)
        for opt in opts:
            opt.step()
    assert_same(placed, plain)
    for param, value in zip(placed, plain, strict=True):
        for key, entry in opts[1].state[param].items():
            if (
                entry.shape[: param.dim()] == param.shape
                and entry.dim() >= param.dim() > 0
                and key not in opts[1].learned.rule.memory
            ):
                assert isinstance(entry, DTensor) == isinstance(param, DTensor), key
                assert not isinstance(entry, DTensor) or entry.placements == param.placements
            torch.testing.assert_close(full(entry), opts[0].state[value][key], rtol=1e-4, atol=1e-6)


def make_sharded(mesh: DeviceMesh, **options: Any) -> tuple[nn.Module, FlatOpt]:
    """Return the model sharded by FSDP2, layer by layer, and its optimizer."""
    model = make_model()
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, FlatOpt(model.parameters(), **options)


def save_and_load(saved: tuple[nn.Module, FlatOpt], fresh: tuple[nn.Module, FlatOpt], folder: Path) -> None:
    """Bring a fresh model and optimizer to the state of others, by a distributed checkpoint."""

    def states(model: nn.Module, opt: FlatOpt) -> dict[str, Any]:
        return {"model": model.state_dict(), "opt": get_optimizer_state_dict(model, opt)}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(states(*saved), checkpoint_id=folder)
        loaded = states(*fresh)
        dcp.load(loaded, checkpoint_id=folder)
        fresh[0].load_state_dict(loaded["model"])
        set_optimizer_state_dict(*fresh, loaded["opt"])


def check_fsdp2(name: str, mesh: DeviceMesh, folder: Path) -> None:
    """Sharded training is the training of one process, before and after a distributed checkpoint."""
    options = {"pretrained": learned(name, perturbation=0.1), **OPTIONS}
    oracle = make_model()
    oracle_opt = FlatOpt(oracle.parameters(), **options)
    train(oracle, oracle_opt, range(4))
    model, opt = make_sharded(mesh, **options)
    train(model, opt, range(4))
    assert_same(model.parameters(), oracle.parameters())

    other, other_opt = make_sharded(mesh, **options)
    save_and_load((model, opt), (other, other_opt), folder)
    for mine, yours in zip(opt.state.values(), other_opt.state.values(), strict=True):
        assert mine.keys() == yours.keys()
        for key, value in mine.items():
            assert torch.equal(full(value), full(yours[key])), key
    train(other, other_opt, range(4, 7))
    train(oracle, oracle_opt, range(4, 7))
    assert_same(other.parameters(), oracle.parameters())


def check_averages_of_shards(mesh: DeviceMesh, folder: Path, num_steps: int | None = None) -> None:
    """Shards have the averages of one process, also after a distributed checkpoint, and end on them as it does."""
    oracle = make_model()
    oracle_opt = FlatOpt(oracle.parameters(), num_steps=num_steps)
    train(oracle, oracle_opt, range(4))
    model, opt = make_sharded(mesh, num_steps=num_steps)
    train(model, opt, range(4))
    last = [full(param.detach()).clone() for param in model.parameters()]
    for one in (opt, oracle_opt):
        one.eval()
    assert_same(model.parameters(), oracle.parameters())
    assert not all(torch.equal(full(param), old) for param, old in zip(model.parameters(), last, strict=True))
    for one in (opt, oracle_opt):
        one.train()
    assert all(torch.equal(full(param), old) for param, old in zip(model.parameters(), last, strict=True))

    other, other_opt = make_sharded(mesh, num_steps=num_steps)
    save_and_load((model, opt), (other, other_opt), folder)
    train(other, other_opt, range(4, 7))
    train(oracle, oracle_opt, range(4, 7))
    landed = [full(param.detach()).clone() for param in other.parameters()]
    for one in (other_opt, oracle_opt):
        one.eval()
    equal = [torch.equal(full(param), old) for param, old in zip(other.parameters(), landed, strict=True)]
    assert all(equal) if num_steps else not all(equal)
    assert_same(other.parameters(), oracle.parameters())


def check_forward_passes_around_averages(mesh: DeviceMesh) -> None:
    """No pass computes with what was gathered before ``eval()`` or ``train()``, also where no backward pass was."""
    oracle = make_model()
    oracle_opt = FlatOpt(oracle.parameters())
    model, opt = make_sharded(mesh)
    for steps in (range(4), range(4, 6)):
        train(oracle, oracle_opt, steps)
        train(model, opt, steps)
        for change in ("train", "eval", "train"):
            for one in (oracle_opt, opt):
                getattr(one, change)()
            with torch.no_grad():
                torch.testing.assert_close(model(batch(0)), oracle(batch(0)))
    assert_same(opt.param_groups[0]["params"], oracle.parameters())


def check_bad_gradient_on_one_rank(mesh: DeviceMesh) -> None:
    """A tensor is skipped on all ranks when one of them sees NaN."""
    value = torch.ones(4, 3)
    param = nn.Parameter(distribute_tensor(value.clone(), mesh, [Shard(0)]))
    opt = FlatOpt([param], pretrained=learned("toy-mixer"))
    grad = torch.ones(4, 3)
    grad[0, 0] = float("nan")
    param.grad = distribute_tensor(grad, mesh, [Shard(0)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step()
    assert torch.equal(full(param.detach()), value)
    assert int(opt.state[param]["num_skipped"]) == 1


def check_ddp() -> None:
    """Replicas stay equal, and equal to one process with the whole batch."""
    oracle = make_model()
    rule = learned("toy-mixer", perturbation=0.1)
    train(oracle, FlatOpt(oracle.parameters(), pretrained=rule, **OPTIONS), range(5))
    model = DistributedDataParallel(make_model())
    train(model, FlatOpt(model.parameters(), pretrained=rule, **OPTIONS), range(5))
    assert_same(model.parameters(), oracle.parameters())


class WithExperts(nn.Module):
    """A network with layers that live on one rank only: none, two, four."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 16), nn.Linear(16, 1)
        torch.manual_seed(1 + dist.get_rank())
        self.experts = nn.Sequential(*[nn.Linear(16, 16) for _ in range(2 * dist.get_rank())])

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.experts(self.first(x).tanh()).tanh())


def check_parameters_of_one_rank(name: str, expert_steps: Callable[[int], bool]) -> None:
    """Experts that DDP ignores, other ones on every rank and with other steps, leave the shared parameters equal."""
    rule = learned(name, perturbation=0.1)
    for mark in ("DDP", "allreduce"):
        model = WithExperts()
        own = list(model.experts.parameters())
        shared = [*model.first.parameters(), *model.last.parameters()]
        names = [key for key, _ in model.named_parameters() if "experts" in key]
        if mark == "DDP":
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
            replica: nn.Module = DistributedDataParallel(model)
        else:
            for param in own:
                param.allreduce = False
            replica = model
        opt = FlatOpt([*own, *shared], pretrained=rule, num_steps=16)  # of the shared ones; experts go beyond
        for step in range(20):
            x = batch(step).chunk(dist.get_world_size())[dist.get_rank()]
            replica(x).sub(1).square().mean().backward()
            for param in shared:
                if mark != "DDP":
                    dist.all_reduce(param.grad)
                if step < 3 or step == 10:  # frozen at first, and once more, while the experts learn
                    param.grad = None
            for param in own:
                if not expert_steps(step):
                    param.grad = None
            opt.step()
            opt.zero_grad()
        assert len(own) == 0 or float(opt.state[own[0]]["step"]) == sum(map(expert_steps, range(20)))
        for param in shared:
            copies = [torch.empty_like(param) for _ in range(dist.get_world_size())]
            dist.all_gather(copies, param.detach())
            assert all(torch.equal(copy_, copies[0]) for copy_ in copies), name
            assert torch.equal(param, opt.state[param].get("param_average", param))


def check_tensor_parallel(mesh: DeviceMesh) -> None:
    """Columns of one layer and rows of the next on each rank, some parameters plain."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for name in ("orthogonalized-momentum", "l2o-scale"):
        rule = learned(name, perturbation=0.1)
        oracle = make_model()
        train(oracle, FlatOpt(oracle.parameters(), pretrained=rule, **OPTIONS), range(5))
        model = parallelize_module(make_model()[3:], mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        whole = nn.Sequential(*make_model()[:3], *model)
        train(whole, FlatOpt(whole.parameters(), pretrained=rule, **OPTIONS), range(5))
        assert_same(whole.parameters(), oracle.parameters())


def check_hsdp(world_size: int) -> None:
    """Shards inside groups of ranks that are replicas of one another."""
    mesh = init_device_mesh("cpu", (world_size, 1) if world_size < 4 else (2, 2), mesh_dim_names=("copies", "shards"))
    rule = learned("orthogonalized-momentum", perturbation=0.1)
    oracle = make_model()
    train(oracle, FlatOpt(oracle.parameters(), pretrained=rule, **OPTIONS), range(5))
    model = make_model()
    fully_shard(model, mesh=mesh)
    train(model, FlatOpt(model.parameters(), pretrained=rule, **OPTIONS), range(5))
    assert_same(model.parameters(), oracle.parameters())


def check_fsdp1_is_refused() -> None:
    """It hands over flattened parameters: refused at once, with the remedy, also if it wraps them later."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def refused(make: Callable[[], None]) -> None:
        try:
            make()
        except RuntimeError as error:
            assert "flattened" in str(error) and "FSDP2 (torch.distributed.fsdp.fully_shard)" in str(error)
            assert "\n" not in str(error)
        else:
            raise AssertionError("FSDP1 was accepted")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for keep in (True, False):
            model = FullyShardedDataParallel(make_model(), use_orig_params=keep, device_id=torch.device("cpu"))
            refused(lambda model=model: FlatOpt(model.parameters(), pretrained=learned("toy-mixer")))
        plain = make_model()
        opt = FlatOpt(plain.parameters(), pretrained=learned("toy-mixer"))
        model = FullyShardedDataParallel(plain, use_orig_params=True, device_id=torch.device("cpu"))
        model(batch(0)).square().mean().backward()
        refused(opt.step)


def check_whole_state_into_shards(mesh: DeviceMesh) -> None:
    """A state saved by one process goes on sharded, and the other way round, by the plain ``load_state_dict``."""
    rule = learned("orthogonalized-momentum", perturbation=0.1)
    oracle, model = make_model(), make_model()
    opt = FlatOpt(oracle.parameters(), pretrained=rule, **OPTIONS)
    train(oracle, opt, range(3))
    model.load_state_dict(oracle.state_dict())
    fully_shard(model, mesh=mesh)
    sharded = FlatOpt(model.parameters(), pretrained=rule, **OPTIONS)
    sharded.load_state_dict(opt.state_dict())
    opt.load_state_dict(sharded.state_dict())
    train(oracle, opt, range(3, 6))
    train(model, sharded, range(3, 6))
    assert_same(model.parameters(), oracle.parameters())


def check_zero_redundancy(name: str) -> None:
    """Each rank keeps the state of its own parameters; a rule that mixes nothing over tensors cannot notice."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # importing it warns of deprecations inside torch

    rule = learned(name, perturbation=0.1)
    oracle = make_model()
    train(oracle, FlatOpt(oracle.parameters(), pretrained=rule, **OPTIONS), range(5))
    model = DistributedDataParallel(make_model())
    zero = ZeroRedundancyOptimizer(model.parameters(), FlatOpt, pretrained=rule, **OPTIONS)
    train(model, zero, range(5))
    assert_same(model.parameters(), oracle.parameters())
    zero.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        assert len(copy.deepcopy(zero.state_dict())["state"]) == len(list(model.parameters()))
