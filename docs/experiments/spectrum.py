"""Draw the eigenvalue density of the Hessian where Adam and FlatOpt end, on the digits of scikit-learn.

Run as ``OMP_NUM_THREADS=1 python docs/experiments/spectrum.py docs/results/spectrum.png``; ``--fast`` takes a tenth of
the steps.  One seed, a ReLU MLP 64-32-10, 400 steps at batch size 64, density of the training loss.
"""

from __future__ import annotations

import sys

import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from flatopt import FlatOpt, flatness

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

FAST = "--fast" in sys.argv
NUM_STEPS = 40 if FAST else 400
(OUT,) = [name for name in sys.argv[1:] if name != "--fast"] or ["spectrum.png"]

digits = load_digits()
inputs, targets = torch.tensor(digits.data[:1200], dtype=torch.float32) / 16, torch.tensor(digits.target[:1200])
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
for name, make in {
    "Adam(lr=1e-2)": lambda params: torch.optim.Adam(params, lr=1e-2),
    "FlatOpt": lambda params: FlatOpt(params, num_steps=NUM_STEPS),
}.items():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    optimizer = make(model.parameters())
    for _ in range(NUM_STEPS):
        batch = torch.randint(len(targets), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[batch]), targets[batch]).backward()
        optimizer.step()
    loss_fn, params = flatness.module_loss(model.eval(), F.cross_entropy, (inputs, targets))
    generator = torch.Generator().manual_seed(0)
    grid, density = flatness.spectral_density(loss_fn, params, num_matvecs=4, num_lanczos=60, generator=generator)
    flatness.plot_spectral_density(grid, density, ax=axes)
    axes.lines[-1].set_label(f"{name}, training loss {loss_fn(params):.4f}")
    print(f"{name}: loss {loss_fn(params):.4f}, largest eigenvalue {grid[density > 1e-6 * density.max()].max():.2f}")
axes.legend()
axes.grid(alpha=0.25)
figure.savefig(OUT, dpi=120)
