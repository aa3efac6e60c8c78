"""What one estimate of the entropy gradient is made of: drift, curvature, noise.

On the 784-20-10 sigmoid net of meta-training, after 300 steps of Adam, estimate ``gamma (x - mu)`` eight times with
``gamma = 1`` and five steps of 0.1.  Drift is the estimate without noise.  What noise adds on average is what curvature
contributes, and it is taken from products of different estimates; the rest is noise.  The results are in
``docs/results/search.md``.

Run as ``OMP_NUM_THREADS=1 python docs/experiments/entropy_estimate.py``; ``--fast`` takes a tenth of the steps.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad

from flatopt.flatness import EntropySurrogate
from flatopt.tasks import load_images

FAST = "--fast" in sys.argv
NUM_STEPS = 31 if FAST else 301  # the last batch is the one of the estimates
NUM_ESTIMATES = 8
CHAINS = ((1e-6, False), (1e-4, False), (1e-4, True), (1e-3, True), (1e-2, True), (1e-1, True))

torch.manual_seed(0)
data = load_images("fashion-mnist", 28, standardize=False).train
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 20), torch.nn.Sigmoid(), torch.nn.Linear(20, 10))
for param in net.parameters():
    torch.nn.init.normal_(param, std=0.01)
adam = torch.optim.Adam(net.parameters(), lr=0.01)
for _ in range(NUM_STEPS):
    batch = torch.randint(len(data.targets), (128,))
    inputs, targets = data.inputs[batch], data.targets[batch]
    params = {name: param.detach().clone() for name, param in net.named_parameters()}
    loss = F.cross_entropy(net(inputs), targets)
    adam.zero_grad()
    loss.backward()
    adam.step()


def flat(tree: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in tree.values()])


def loss_fn(params: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(functional_call(net, params, (inputs,)), targets)


def estimate(temperature: float, antithetic: bool, seed: int) -> Tensor:
    chain = EntropySurrogate(gamma=1.0, num_steps=5, step_size=0.1, temperature=temperature, antithetic=antithetic)
    noise = chain.sample_noise(params, torch.Generator().manual_seed(seed))
    return flat(params) - flat(chain.mean(loss_fn, params, noise))


drift = estimate(0.0, False, 0)
print(f"loss {loss:.2f}, gradient {flat(grad(loss_fn)(params)).norm():.3f}, drift {drift.norm():.3f}")
for temperature, antithetic in CHAINS:
    added = torch.stack([estimate(temperature, antithetic, seed) - drift for seed in range(NUM_ESTIMATES)])
    products = (added @ added.T)[torch.triu(torch.ones(NUM_ESTIMATES, NUM_ESTIMATES), 1).bool()]
    noise = added.var(0).sum().sqrt()
    chains = "pair" if antithetic else "one"
    seen = f"{products.mean().sqrt():.2g}" if products.mean() > 0 else "not seen"
    print(f"{chains}, T = {temperature:g}: curvature {seen}, noise {noise:.2g}")
