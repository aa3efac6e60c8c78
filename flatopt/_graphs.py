"""Kernels on a GPU that are captured once and launched together, as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ._torch import foreach_copy_
from ._warn import reason_of, warn

Function = Callable[..., list[Tensor]]

CALLS_BEFORE = 3
"""So many equal calls are taken kernel by kernel before one is captured."""

MOST_CAPTURES = 8
"""So many in a row may be of little use; whose calls differ more often is better off without."""

USEFUL_CALLS = 100
"""Launches after which a capture was worth it."""


class LaunchedTogether:
    """A function of tensors on a GPU whose kernels are captured when this is made, and launched as one CUDA graph.

    A step of small networks is a thousand kernels of microseconds, which Python launches more slowly than they run.
    What the function writes to in place is written at every call.

    Args:
        function: what is captured; it never waits for the GPU.  Tensors that it takes from elsewhere have to live as
            long as this.
        values: arguments, whose shapes all calls have.
        is_warm: whether it was called before; else it is called once, since libraries allocate what they need at their
            first call.

    Raises:
        RuntimeError: if it cannot be captured; nothing was computed then.
    """

    def __init__(self, function: Function, values: Sequence[Tensor], *, is_warm: bool = False):
        self.device = values[0].device
        with torch.cuda.device(self.device), torch.inference_mode(False), torch.no_grad():
            self.inputs = [value.clone() for value in values]
            current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            if not is_warm:
                aside.wait_stream(current)
                with torch.cuda.stream(aside):
                    function(*self.inputs)
                current.wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            # The outer stream is the current one again whatever happens; other threads, which load data, may go on.
            capture = torch.cuda.graph(self.graph, stream=aside, capture_error_mode="thread_local")
            with torch.cuda.stream(current), capture:
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
        with torch.cuda.device(self.device):
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
        self.num_captures = self.num_launches = 0
        """Captures of little use in a row, and launches of the last one."""
        self.captured: Hashable = None
        self.together: LaunchedTogether | None = None

    def __call__(self, key: Hashable, function: Function, values: Sequence[Tensor]) -> list[Tensor]:
        """Return the results of a function.

        Args:
            key: alike where calls are but for the values of tensors: addresses, shapes, options.
            function: works in place, on tensors whose addresses are part of the key.
            values: other arguments of it, on one GPU.
        """
        if self.together is None or key != self.captured:
            self.num_alike = self.num_alike + 1 if key == self.last else 0
            self.last = key
            if self.num_alike >= CALLS_BEFORE:
                self._capture(key, function, values)
        if self.together is None or key != self.captured:
            return function(*values)
        self.num_launches += 1
        return self.together(*values)

    def _capture(self, key: Hashable, function: Function, values: Sequence[Tensor]) -> None:
        """Capture a call that has come to stay in the place of the last one, unless that was tried too often."""
        if self.num_launches >= USEFUL_CALLS:
            self.num_captures = 0
        self.together, self.captured, self.num_launches = None, None, 0  # first: its memory is given back
        if self.num_captures == MOST_CAPTURES:
            return
        self.num_captures += 1
        try:
            self.together, self.captured = LaunchedTogether(function, values, is_warm=True), key
        except RuntimeError as error:
            self.num_captures = MOST_CAPTURES
            warn(f"FlatOpt goes on without CUDA graphs: {reason_of(error)}", RuntimeWarning)
