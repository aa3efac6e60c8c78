"""Kernels on a GPU that are captured once and launched together, as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ._torch import foreach_copy_
from ._warn import warn

Function = Callable[..., list[Tensor]]

CALLS_BEFORE = 3
"""So many equal calls are taken kernel by kernel before one is captured."""

MOST_CAPTURES = 8
"""Whose calls differ more often is better off without."""


class LaunchedTogether:
    """A function of tensors on a GPU whose kernels are captured at the first call and launched as one CUDA graph.

    A step of small networks is a thousand kernels of microseconds, which Python launches more slowly than they run.
    What the function writes to in place is written at every call.

    Args:
        function: what is captured; it never waits for the GPU.
        values: arguments, whose shapes all calls have.
        is_warm: whether it was called before; else it is called once, since libraries allocate what they need at their
            first call.
    """

    def __init__(self, function: Function, values: Sequence[Tensor], *, is_warm: bool = False):
        self.function = function  # whose constants the captured kernels read
        self.inputs = [value.clone() for value in values]
        if not is_warm:
            current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(current)
            with torch.no_grad(), torch.cuda.stream(aside):
                function(*self.inputs)
            current.wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, such as those that load data, may go on.
        with torch.no_grad(), torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            outputs = function(*self.inputs)
            own = {value.untyped_storage().data_ptr() for value in self.inputs}
            # What is only passed on is copied: the next call may want it as another argument.
            self.outputs = [one.clone() if one.untyped_storage().data_ptr() in own else one for one in outputs]
        self.places: dict[torch.dtype, list[int]] = {}
        """Where arguments of each dtype are: those are copied in one kernel."""
        for place, value in enumerate(values):
            self.places.setdefault(value.dtype, []).append(place)

    def __call__(self, *values: Tensor) -> list[Tensor]:
        """Return the results, in memory that the next call writes to."""
        for places in self.places.values():
            foreach_copy_([self.inputs[place] for place in places], [values[place] for place in places])
        self.graph.replay()
        return self.outputs


class Relaunched:
    """Takes calls kernel by kernel until they are alike, then launches them together.

    One that differs, and those after a failure, are taken kernel by kernel again.
    """

    def __init__(self) -> None:
        self.last: Hashable = None
        self.num_alike = 0
        self.num_captures = 0
        self.captured: Hashable = None
        self.together: LaunchedTogether | None = None

    def __call__(self, key: Hashable, function: Function, values: Sequence[Tensor]) -> list[Tensor]:
        """Return the results of a function.

        Args:
            key: alike where calls are but for the values of tensors: addresses, shapes, options.
            function: works in place, on tensors whose addresses are part of the key.
            values: other arguments of it, on one GPU.
        """
        with torch.cuda.device(values[0].device):
            if self.together is not None and key == self.captured:
                return self.together(*values)
            self.num_alike = self.num_alike + 1 if key == self.last else 0
            self.last = key
            if self.num_alike < CALLS_BEFORE or self.num_captures == MOST_CAPTURES:
                return function(*values)
            self.num_captures += 1
            self.together = None  # first: its memory is given back
            try:
                self.together = LaunchedTogether(function, values, is_warm=True)
            except RuntimeError as error:  # before anything was computed
                self.num_captures = MOST_CAPTURES
                reason = str(error).strip().splitlines()[0]
                warn(f"FlatOpt goes on without CUDA graphs: {reason}", RuntimeWarning)
                return function(*values)
            self.captured = key
            return self.together(*values)
