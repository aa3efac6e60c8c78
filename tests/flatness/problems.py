"""Losses with known curvature, shared by the tests of flatness."""

import torch
from torch.nn import functional as F

MATRIX = torch.tensor(
    [[4.0, 1.0, 0.0, 0.5], [1.0, -3.0, 0.2, 0.0], [0.0, 0.2, 1.0, 0.3], [0.5, 0.0, 0.3, 0.5]], dtype=torch.float64
)
"""An indefinite Hessian."""


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def quadratic_params(seed=0):
    """4 coordinates over a matrix, a 0-D tensor and an empty one."""
    values = torch.randn(4, dtype=torch.float64, generator=generator(seed))
    return {"a": values[:3].reshape(3, 1), "empty": values[:0], "b": values[3]}


def quadratic(matrix=MATRIX):
    def loss_fn(params):
        x = torch.cat([param.reshape(-1) for param in params.values()])
        return 0.5 * x @ matrix @ x

    return loss_fn


def network(seed=0):
    """Loss and parameters (27 scalars, one tensor of them unused) of a 3-4-2 tanh network on 6 examples."""
    g = generator(seed)
    inputs = torch.randn(6, 3, dtype=torch.float64, generator=g)
    targets = torch.randint(2, (6,), generator=g)
    shapes = {"w1": (4, 3), "b1": (4,), "w2": (2, 4), "b2": (2,), "unused": ()}
    params = {name: torch.randn(shape, dtype=torch.float64, generator=g) for name, shape in shapes.items()}

    def loss_fn(params):
        hidden = torch.tanh(F.linear(inputs, params["w1"], params["b1"]))
        return F.cross_entropy(F.linear(hidden, params["w2"], params["b2"]), targets)

    return loss_fn, params


def flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def like(vector, params):
    pieces = vector.split([param.numel() for param in params.values()])
    return {name: piece.reshape(params[name].shape) for name, piece in zip(params, pieces, strict=True)}


def explicit_hessian(loss_fn, params):
    """Return the ``[d, d]`` Hessian by torch.autograd on the flat vector."""
    return torch.autograd.functional.hessian(lambda x: loss_fn(like(x, params)), flat(params))


def finite_difference(function, params, direction, step=1e-5):
    """Return the central difference of ``function`` along a dict of tensors."""

    def moved(sign):
        return function({name: params[name] + sign * step * direction[name] for name in params})

    return (moved(1) - moved(-1)) / (2 * step)


def directional_derivative(function, params, direction):
    """Return the same by torch.autograd."""
    leaves = {name: param.clone().requires_grad_() for name, param in params.items()}
    grads = torch.autograd.grad(function(leaves), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return sum((grad * direction[name]).sum() for name, grad in zip(leaves, grads, strict=True))
