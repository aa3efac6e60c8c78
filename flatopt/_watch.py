"""What an optimizer warns of, once in its life."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from ._groups import check_options, has_matrices, highest_lr, name_of, sharing_memory
from ._warn import warn

SMALL_LR = 0.01
"""Below it, ``lr`` looks like a learning rate of Adam's."""

SMALL_LR_STEPS = 100
"""Steps after which no warm-up explains such a learning rate any more."""

FLAT_NUMEL = 2**20
"""A vector this long beside no matrix looks like a flattened model: no bias is as long."""

STACK_LENGTH = 16
"""No kernel of a one-dimensional convolution is as long; an axis of a matrix is."""


class Watch:
    """Looks at the parameter groups of one optimizer."""

    def __init__(self) -> None:
        self.told: set[str] = set()
        self.highest_lr = -math.inf
        self.steps_seen = 0
        self.adopted: float | None = None
        """Length of the run that came with a state, not from the user."""
        self.is_given = False
        """Whether the length was set in the middle of the run, so that infinite means infinite."""

    def tell(self, what: str, message: str, category: type[Warning] = UserWarning) -> None:
        """Warn, if not told before."""
        if what not in self.told:
            self.told.add(what)
            warn(message, category)

    def check_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """Check what may have been written into the groups, in place."""
        for index, group in enumerate(groups):
            check_options(group, f" in parameter group {index}")
            for key in ("num_steps", "seed"):
                if group.get(key) != groups[0].get(key):
                    self.tell(
                        key,
                        f"{key} is {groups[0].get(key)} in parameter group 0 and {group.get(key)} in group {index}: "
                        "the value of group 0 counts for all",
                    )

    def look_at_new(self, groups: Sequence[dict[str, Any]], *, needs_matrices: bool) -> None:
        """Warn of a learning rate of another optimizer, of shared memory, of what may be a stack or a flat model."""
        params = [param for group in groups for param in group["params"] if not is_lazy(param)]
        longest = max((param.numel() for param in params), default=0)
        if needs_matrices and longest >= FLAT_NUMEL and not has_matrices(groups):
            warn(
                f"no parameter is a matrix, and one is a vector of {longest:,} coordinates: if it holds the flattened "
                "parameters of a model, FlatOpt cannot see its matrices and steps them like a bias; give the "
                "parameters themselves, and shard with FSDP2 (torch.distributed.fsdp.fully_shard)"
            )
        stack = next(filter(_is_stack, params), None) if needs_matrices else None
        if stack is not None:
            warn(
                f"{name_of(stack, groups)} has shape {list(stack.shape)} and is taken as one matrix of {len(stack)} "
                "rows: a stack of matrices, as of fused experts, needs a parameter for each, or another optimizer"
            )
        if pair := sharing_memory(groups):
            one, other = (name_of(param, groups) for param in pair)
            warn(
                f"{one} and {other} share their memory, so that a step of the one is lost where the other is written: "
                "use one parameter twice"
            )
        lr = highest_lr(groups)
        if lr is not None and 0 < lr < SMALL_LR:
            self._tell_small(lr)

    def look_at_loaded(self, state_dict: dict[str, Any]) -> None:
        """Warn of an empty state that another optimizer has saved: its options are taken over all the same."""
        groups = state_dict["param_groups"]
        if not state_dict["state"] and groups and all("num_steps" not in group for group in groups):
            warn(
                f"an empty state of another optimizer was loaded, with its lr={groups[0].get('lr')}: FlatOpt's lr is "
                "1.0 as learned; start without that state, or set lr in optimizer.param_groups again"
            )

    def look_at_step(self, groups: Sequence[dict[str, Any]]) -> None:
        """Check groups before a step; warn of a schedule of the learning rate that is none of this optimizer."""
        self.check_groups(groups)
        lr = highest_lr(groups)
        if lr is None or lr == 0:
            return
        if lr < self.highest_lr and (groups[0].get("num_steps") or math.inf) < math.inf:
            self.tell(
                "scheduler",
                "lr falls although num_steps is known, so the steps shrink twice: use a constant schedule, or leave "
                "num_steps out",
            )
        self.steps_seen += 1
        self.highest_lr = max(self.highest_lr, lr)
        if self.steps_seen == SMALL_LR_STEPS and self.highest_lr < SMALL_LR:
            first = highest_lr({"lr": group.get("initial_lr", 0.0)} for group in groups)  # of a long warm-up, say
            if first is not None and first < SMALL_LR:
                self._tell_small(self.highest_lr)

    def _tell_small(self, lr: float) -> None:
        self.tell(
            "small",
            f"lr={lr:g} looks like a learning rate of Adam's: FlatOpt's multiplies the learned step and is 1.0 as "
            "learned; leave lr out, or give a value near 1.0",
        )

    def length(self, groups: Sequence[dict[str, Any]], step: float) -> float:
        """Return the length of the run at a step, infinite if it is unknown or over; warn if it is over."""
        num_steps = float(groups[0].get("num_steps") or math.inf)
        if step > num_steps:
            self.tell(
                "over",
                f"step {step:.0f} is beyond num_steps={num_steps:.0f}: FlatOpt goes on as if the length was not known; "
                "optimizer.set_num_steps(n) gives it another one",
            )
            return math.inf
        return num_steps

    def restore_length(self, groups: Sequence[dict[str, Any]], given: Sequence[float]) -> None:
        """Let the lengths that were given before a state was loaded take the place of those that it brought."""
        replaced = []
        for group in groups:
            check_options(group)
        for group, num_steps in zip(groups, given, strict=True):
            is_given = num_steps < math.inf or self.is_given
            if is_given and num_steps not in (self.adopted, group["num_steps"]):
                replaced.append((group["num_steps"], num_steps))
                group["num_steps"] = num_steps
        if not replaced:
            if groups[0]["num_steps"] != given[0]:  # an equal one is still that of the user
                self.adopted = groups[0]["num_steps"]
            return
        self.new_length(is_given=self.is_given)
        saved, num_steps = replaced[0]
        warn(
            f"num_steps={num_steps}, given to this optimizer, takes the place of the num_steps={saved} of the state "
            "that was loaded; leave num_steps out to keep the saved one"
        )

    def new_length(self, *, is_given: bool = False) -> None:
        """Forget a length that was adopted, and that the run went on beyond one; the new one may be the user's."""
        self.told.discard("over")
        self.adopted, self.is_given = None, is_given


def _is_stack(param: Tensor) -> bool:
    """Return whether a parameter looks like several matrices."""
    return param.dim() == 3 and len(param) > 1 and min(param.shape[1:]) >= STACK_LENGTH
