"""A step of inner runs as one flat graph: the one place that takes torch's tracer and compiler apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx.experimental.proxy_tensor import make_fx

from .._graphs import LaunchedTogether
from .._torch import pytree
from ..rules import Weights
from .runs import Draws, Runs, StepLosses, Terms, map_tree, stack_losses

Step = Callable[[Weights, Runs, Draws, Terms], tuple[Runs, StepLosses]]


class Recorder:
    """Graphs of a step, each recorded when it is first asked for with such terms and shapes.

    Recording takes seconds and removes most of a step's Python and ``vmap`` overhead.  Compiling the graph takes a
    minute or two for each family of problems.  On a GPU the kernels of a step are launched together.
    """

    def __init__(self, step: Step, *, compiled: bool):
        self.step = step
        self.compiled = compiled
        self.graphs: dict[Any, Callable[..., list[Tensor]]] = {}
        self.kept: list[Callable[..., list[Tensor]]] = []

    def run(self, weights_N: Weights, runs: Runs, steps: Iterable[tuple[Draws, Terms]]) -> tuple[Runs, StepLosses]:
        """Take steps by their graphs; weights and runs are taken apart once, not at every step."""
        fixed, (carried, form) = pytree.tree_leaves(weights_N), pytree.tree_flatten(runs)
        losses = []
        graphs: dict[Terms, Callable[..., list[Tensor]]] = {}
        for draws, terms in steps:
            values = [*fixed, *carried, *pytree.tree_leaves(draws)]
            # Of one layout in all steps: a step returns contiguous runs, and batches are slices of one draw.
            if terms not in graphs:
                graphs[terms] = self._graph(values, pytree.tree_structure((weights_N, runs, draws)), terms)
            results = graphs[terms](*values)
            carried, step_losses = results[: len(carried)], results[len(carried) :]
            losses.append([loss.clone() for loss in step_losses])  # the next launch writes where this one wrote
        return pytree.tree_unflatten([value.clone() for value in carried], form), stack_losses(losses)

    def _graph(self, values: list[Tensor], form: pytree.TreeSpec, terms: Terms) -> Callable[..., list[Tensor]]:
        """Return the function of the tensors of weights, runs and draws to those of runs and losses."""
        key = (terms, repr(form), *((value.shape, value.stride(), value.dtype) for value in values))
        if key not in self.graphs:
            self.graphs[key] = self._record(values, form, terms)
        return self.graphs[key]

    def _record(self, values: list[Tensor], form: pytree.TreeSpec, terms: Terms) -> Callable[..., list[Tensor]]:
        def flat(*values: Tensor) -> list[Tensor]:
            weights_N, before, draws = pytree.tree_unflatten(list(values), form)
            after, losses = self.step(weights_N, before, draws, terms)
            # In the order of `before`, so that the results can be fed back.
            return pytree.tree_leaves((map_tree(lambda _, value: value, before, after), losses))

        recorded = make_fx(flat)(*values)
        module = torch.fx.GraphModule(recorded, fx_graph_cse(recorded.graph))
        module.graph.eliminate_dead_code()
        for node in module.graph.nodes:
            if node.target is torch.ops.aten.scalar_tensor.default:  # a constant, which a GPU would have to wait for
                node.update_kwarg("device", values[0].device)
        module.recompile()
        function: Callable[..., list[Tensor]] = module
        if self.compiled:
            # The compiler without the tracer in front of it: the graph is there, and keyed by its shapes.
            with torch.no_grad():
                function = torch._inductor.compile(module, list(values))
        if not values[0].is_cuda:
            return function
        together = LaunchedTogether(function, values)
        self.kept.append(function)  # whose constants the captured kernels read
        return together
