"""Does the network of meta-training show what a longer step does?  Steps 1.3 times as long, less steps as they are.

On the 784-20-10 sigmoid net the run of a plain set is branched at several steps.  Both branches see the same batches.
A *preference* is the sum over the next 20 steps of the inner product of an estimate's gradient with what the longer
steps changed.  It is positive where a meta-gradient from that estimate asks for shorter steps.  Losses and eigenvalues
are compared after 20 and after 320 steps.  Mean over six runs ± standard error.  The results are in
``docs/results/search.md``.

Run as ``OMP_NUM_THREADS=1 python docs/experiments/preferences.py rnnprop`` (or ``l2o-scale``); ``--fast`` takes one
branch, short windows and two runs.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

from flatopt import FlatOpt
from flatopt.flatness import EntropySurrogate, top_eigenvalue
from flatopt.tasks import load_images

FAST = "--fast" in sys.argv
(PLAIN,) = [name for name in sys.argv[1:] if name != "--fast"] or ["rnnprop"]
STARTS, WINDOWS, NUM_SEEDS = ((5,), (4, 8), 2) if FAST else ((0, 50, 100, 200, 350, 480), (20, 320), 6)
LONGER = 1.3
Tree = dict[str, Tensor]
Examples = tuple[Tensor, Tensor]

data = load_images("fashion-mnist", 28, standardize=False).train
chains = {
    f"entropy, gamma {gamma}": EntropySurrogate(
        gamma=gamma, num_steps=num_steps, step_size=step_size, temperature=0.001, antithetic=True
    )
    for gamma, num_steps, step_size in ((1.0, 5, 0.1), (0.1, 20, 0.5), (0.03, 60, 0.5))
}
results: dict[tuple[str, int], list[float]] = {}


def batch(size: int) -> Examples:
    index = torch.randint(len(data.targets), (size,))
    return data.inputs[index], data.targets[index]


def train(net: nn.Module, optimizer: FlatOpt, examples: Examples) -> None:
    optimizer.zero_grad()
    F.cross_entropy(net(examples[0]), examples[1]).backward()
    optimizer.step()


def tensors(net: nn.Module) -> Tree:
    return {name: param.detach().clone() for name, param in net.named_parameters()}


def inner(first: Tree, second: Tree) -> float:
    return float(sum((first[name] * second[name]).sum() for name in first))


def loss_on(net: nn.Module, examples: Examples) -> Callable[[Tree], Tensor]:
    return lambda params: F.cross_entropy(functional_call(net, params, (examples[0],)), examples[1])


def branch(net: nn.Module, optimizer: FlatOpt, lr: float) -> tuple[nn.Module, FlatOpt]:
    twin = copy.deepcopy(net)
    copied = FlatOpt(twin.parameters(), pretrained=PLAIN)
    if optimizer.state:
        copied.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied.param_groups[0]["lr"] = lr
    return twin, copied


def note(name: str, step: int, seed: int, value: float | Tensor) -> None:
    results.setdefault((name, step), [0.0] * NUM_SEEDS)[seed] += float(value)


def compare(net: nn.Module, optimizer: FlatOpt, step: int, seed: int) -> None:
    """Go on from here with steps of both lengths, and note how they differ."""
    (shorter, first), (longer, second) = branch(net, optimizer, 1.0), branch(net, optimizer, LONGER)
    for t in range(1, WINDOWS[-1] + 1):
        examples = batch(128)
        train(shorter, first, examples)
        train(longer, second, examples)
        if t <= WINDOWS[0] and t % 4 == 0:
            start, end = tensors(shorter), tensors(longer)
            moved = {name: end[name] - start[name] for name in start}
            middle = {name: (start[name] + end[name]) / 2 for name in start}
            gradients = {"loss": grad(loss_on(net, batch(2000)))(middle)}
            for name, chain in chains.items():
                mean = chain.mean(loss_on(net, batch(128)), middle, chain.sample_noise(middle))
                gradients[name] = {key: chain.gamma * (middle[key] - mean[key]) for key in mean}
            for name, value in gradients.items():
                note(name, step, seed, 4 * inner(value, moved))
        if t in WINDOWS:
            loss = loss_on(net, batch(2000))
            values = [loss(tensors(one)) for one in (shorter, longer)]
            note(f"loss after {t}", step, seed, values[1] - values[0])
            loss = loss_on(net, batch(2000))
            values = [top_eigenvalue(loss, tensors(one), tol=1e-3).log() for one in (shorter, longer)]
            note(f"ln eigenvalue after {t}", step, seed, values[1] - values[0])


for seed in range(NUM_SEEDS):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.Sigmoid(), nn.Linear(20, 10))
    for param in net.parameters():
        nn.init.normal_(param, std=0.01)
    optimizer = FlatOpt(net.parameters(), pretrained=PLAIN)
    for step in range(STARTS[-1] + 1):
        if step in STARTS:
            compare(net, optimizer, step, seed)
        train(net, optimizer, batch(128))
print("| longer steps from step |", " | ".join(map(str, STARTS)), "|")
for name in dict.fromkeys(name for name, _ in results):
    cells = (torch.tensor(results[name, start]) for start in STARTS)
    print("|", name, "|", " | ".join(f"{cell.mean():+.3f} ± {cell.std() / NUM_SEEDS**0.5:.3f}" for cell in cells), "|")
