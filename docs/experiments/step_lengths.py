"""How long the steps of a learned optimizer are, early, in the middle and late in a run of 400 steps.

Root mean square update of the first layer of a tanh MLP 784-32-10 on Fashion-MNIST, in thousandths, one seed.

Run as ``OMP_NUM_THREADS=1 python docs/experiments/step_lengths.py rnnprop rnnprop-entropy FOLDER ...``, with names of
shipped sets or folders.  ``--fast`` takes a tenth of the steps.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

from flatopt import FlatOpt
from flatopt.tasks import load_images

FAST = "--fast" in sys.argv
SCALE = 10 if FAST else 1
WINDOWS = ((80, 120), (180, 220), (350, 400))

data = load_images("fashion-mnist", 28, standardize=False).train
for weights in [name for name in sys.argv[1:] if name != "--fast"] or ["rnnprop", "rnnprop-entropy"]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
    for param in net.parameters():
        torch.nn.init.normal_(param, std=0.01)
    optimizer, generator, sizes = FlatOpt(net.parameters(), pretrained=weights), torch.Generator().manual_seed(1), []
    for _ in range(400 // SCALE):
        index, before = torch.randint(len(data.targets), (128,), generator=generator), net[1].weight.detach().clone()
        optimizer.zero_grad()
        F.cross_entropy(net(data.inputs[index]), data.targets[index]).backward()
        optimizer.step()
        sizes.append(1e3 * (net[1].weight.detach() - before).square().mean().sqrt())
    means = [sum(sizes[a // SCALE : b // SCALE]) / ((b - a) // SCALE) for a, b in WINDOWS]
    print(weights, *(f"{mean:.2f}" for mean in means))
