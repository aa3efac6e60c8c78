"""``FlatOpt``: an update rule with learned weights behind the interface of ``torch.optim.Optimizer``.

No update maths is here.  The class keeps options and state, finds the parameters that have a usable gradient, and
hands them to ``AppliedRule``, one device and dtype at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from ._abstract import real_tensors, without_autocast
from ._applied import AppliedRule
from ._averages import Averaging, advance_averages, check_iterates, check_no_average, start_average
from ._groups import check_gradient, check_options, longest_vector, name_of, refuse_flattened
from ._slots import OVERFLOW_MARGIN, Slot, advance_clock, bucket_of, measure, positions_in
from ._state import (
    CLOCK,
    RECORD,
    SHARED_PREFIX,
    SHOWS_AVERAGES,
    StateLayout,
    check_record,
    describe_record,
    record_of,
    shared_of,
    state_generator,
)
from ._torch import disable_dynamo
from ._watch import Watch
from .pretrained import LearnedRule, load_pretrained


class FlatOpt(Averaging):
    r"""Implements a learned optimizer: pretrained weights, nothing to tune.

    .. math::
        \begin{aligned}
            s_t, \sigma_t &= \mathrm{observe}_w(s_{t-1}, g_t, \theta_{t-1})
                && \text{each tensor: accumulators and sums} \\
            c_t, m_t &= \mathrm{mix}_w(\sigma_t, m_{t-1}, t / T)
                && \text{all tensors: a few controls per tensor} \\
            \Delta_t, \alpha_t &= \mathrm{propose}_w(s_t, g_t, \theta_{t-1}, c_t)
                && \text{each coordinate: step and step size} \\
            \theta_t &= (1 - \gamma \alpha_t \kappa)\, \theta_{t-1} + \gamma \Delta_t
        \end{aligned}

    with :math:`g_t` the gradient (negated by ``maximize``), :math:`w` the learned weights, :math:`\gamma` = ``lr``,
    :math:`\kappa` = ``weight_decay``, :math:`T` = ``num_steps`` and :math:`\alpha_t` the rule's own step size.

    It needs no closure and no loss.  The default rule keeps an average of the parameters that is better than the last
    ones.  With ``num_steps`` the run ends on it; at any other time, evaluate and save between :meth:`eval` and
    :meth:`train`.

    State is kept in ``float32`` for half-precision parameters and in ``float64`` for double ones; half-precision
    parameters are added to in ``float32`` and rounded once.  Complex parameters are treated as pairs of real numbers.
    Parameters sharded as ``DTensor`` (FSDP2) are updated shard by shard with statistics over the whole tensor.
    Parameters on several devices, or in ``float64`` beside ``float32``, are updated in one group per device and dtype,
    those of one rank apart: some rules mix information inside each.

    A tensor takes part in the steps in which its gradient is not zero everywhere.  In the others nothing moves it.
    A gradient with NaN, inf or values whose squares would overflow counts as no gradient: the tensor and its state
    stay as they are, ``state[param]["num_skipped"]`` counts it, and one ``RuntimeWarning`` per optimizer reports it.
    Finding that out costs one synchronisation with each device per step: no CUDA graph of yours can hold a step.

    Args:
        params: iterable of parameters, of ``(name, parameter)`` pairs, or of dicts that define parameter groups.
        lr: multiplies the learned step, 1.0 is as learned; a float or a tensor with one element, per group, driven by
            any scheduler.
        pretrained: name of a shipped set of weights (:func:`flatopt.list_pretrained`), a folder, a Hugging Face Hub id
            ``"org/name"``, or a :class:`flatopt.LearnedRule`.
        num_steps: length of the run in steps if it is known: the parameters move to their average in its last
            twentieth, and up to 800 steps the schedule ends with it.  A run that goes on does so as if unknown.
            ``None`` for a run that may stop at any time.  A loaded state never overrules what is given here;
            :meth:`set_num_steps` changes it in the middle of a run.
        weight_decay: decoupled weight decay, multiplied by the rule's own step size, so that values usual for AdamW
            (0.01 to 0.1) mean the same here.
        revision: branch, tag or commit on the Hub; a 40-digit commit that was used before needs no network.
        cache_dir: where downloads are kept.
        token: access token for the Hub.
        local_files_only: never download.
        maximize: go up instead of down.
        compile: on a CPU, ``True`` compiles the arithmetic with ``torch.compile``: half a minute at first, for steps
            1.1 times as fast on large models.  On a GPU, it launches the kernels of a step as one CUDA graph:
            the same bits, several times as fast, and a copy of the gradients is kept; ``None`` does so for two tensors
            and more, up to 256 MiB of gradients, ``False`` never.  Eager, with a warning, where it is not possible.
        state_dtype: ``torch.bfloat16`` keeps the accumulators in ``UpdateRule.compressible_state`` in half precision
            (the recurrent states, most of the memory of ``l2o-dm`` and ``rnnprop``).  They are computed in ``float32``
            and rounded once per step.  ``None`` keeps all in ``float32``.
        seed: decides the random initial learning rates of ``l2o-scale``, the same on every device; other rules draw no
            random numbers.  The value of the first parameter group counts.
        allow_other_weights: load the state of a run with other weights of the same rule, which is refused otherwise.

    Raises:
        ValueError: if ``lr``, ``weight_decay``, ``num_steps`` or ``seed`` is out of range, if the weights are not what
            they should be, or if ``state_dtype`` is not one that the rule's state may have.
        TypeError: if ``params`` is a single tensor.
        RuntimeError: if a parameter is flattened, as by FSDP1.

    Example:
        >>> import torch, flatopt
        >>> model = torch.nn.Linear(4, 2)
        >>> opt = flatopt.FlatOpt(model.parameters(), num_steps=100)
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     model(torch.ones(8, 4)).square().mean().backward()
        ...     opt.step()
    """

    learned: LearnedRule
    """The rule and its weights, with the card and the Hub commit they came with."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        *,
        pretrained: str | os.PathLike[str] | LearnedRule = "flat-v2",
        num_steps: int | None = None,
        weight_decay: float = 0.0,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        maximize: bool = False,
        compile: bool | None = None,
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
        allow_other_weights: bool = False,
    ) -> None:
        # A number even when unknown: flattened distributed checkpoints accept only numbers and tensors.
        options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "num_steps": num_steps, "seed": seed}
        options["maximize"] = maximize
        check_options(options)
        if isinstance(pretrained, LearnedRule):
            if revision is not None:
                raise ValueError(f"revision={revision!r} needs a Hub repository, but pretrained is a LearnedRule")
            self.learned = pretrained
        else:
            with real_tensors():
                self.learned = load_pretrained(
                    pretrained, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
                )
        if state_dtype not in (None, torch.bfloat16):
            raise ValueError(f"Invalid state_dtype value: {state_dtype}, must be torch.bfloat16 or None")
        if state_dtype is not None and not self.learned.rule.compressible_state:
            raise ValueError(f"Invalid state_dtype value: all state of {self.learned.rule.name!r} needs full precision")
        self._state_dtype, self._compile, self._allow_other_weights = state_dtype, compile, allow_other_weights
        self._watch = Watch(needs_matrices=self.learned.rule.strip_rows is not None)
        self._prepare()
        # Inert: OneCycleLR and CyclicLR write their momentum here, and refuse optimizers that have none.
        options |= {"momentum": 0.0, SHOWS_AVERAGES: 0, CLOCK: 0} | record_of(self.learned)
        super().__init__(params, options)
        self._watch.look_at_new(self.param_groups, self.defaults["num_steps"])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...

    @disable_dynamo  # a compiled training step breaks its graph here
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; return what ``closure`` returned, ``None`` without one.

        Args:
            closure: clears the gradients, computes them again and returns the loss; called once.

        Raises:
            RuntimeError: if a gradient is sparse, a parameter flattened, or its average in its place (:meth:`eval`).
            ValueError: if an option of a group is out of range, or a state or gradient does not have the shape of its
                parameter.
            TypeError: if a parameter with a gradient is neither floating-point nor complex.
        """
        check_no_average(self.param_groups)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        check_no_average(self.param_groups)  # again: the closure may have called eval()
        self._watch.look_at_step(self.param_groups)
        slots = list(self._slots())  # whole: an error comes before anything is changed
        self._init_states([slot.param for slot in slots if slot.is_new])
        for slot in slots:
            self._layout.complete(self.state[slot.param], slot.param)
        states = self._states()
        together = measure(slots, states, self.param_groups, are_stamped=self._layout.describes_whole)
        for slot in slots:
            self._layout.check_numel(slot.made_for, slot.param, self.param_groups)
        clocks: dict[Tensor, tuple[float, float, float]] = {}
        for key, (members, step) in together.items():
            usable = [slot for slot in members if self._is_usable(slot, key.dtype)]
            if usable:
                self._take_from_others([slot.param for slot in usable])
                context = step, self._watch.length(self.param_groups, step)
                with without_autocast(key.device):  # a step taken inside autocast keeps its precision
                    self._update(usable, context)
                clocks |= {slot.param: slot.clock(*context) for slot in usable}
        advance_clock(self.param_groups, clocks)
        if clocks and self.learned.rule.average is not None:
            advance_averages(states, clocks, self.learned.rule.average)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state made by :meth:`state_dict`, in the precision that this optimizer keeps it in.

        The tensors are copied: two optimizers never share them.

        Raises:
            ValueError: if groups or shapes do not fit, an option is out of range, it is of another optimizer, rule or
                set of weights, or it lacks the parameters that averages stand for.
        """
        seen: dict[str, Any] = {}
        given = [group.get("num_steps", math.inf) for group in self.param_groups]

        def capture(_: Optimizer, state_dict: dict[str, Any]) -> None:
            if not {"state", "param_groups"} <= state_dict.keys():
                raise ValueError("this is not the state of an optimizer: it must hold 'state' and 'param_groups'")
            self._check_loaded(state_dict)
            seen.update(state_dict)

        # torch casts every float to the parameter's dtype.  The hooks frame its work from inside the user's own hooks:
        # after the last of them that may replace the dict, and before the first that may look at the result.
        handles = [
            self.register_load_state_dict_pre_hook(capture),
            self.register_load_state_dict_post_hook(lambda _: self._restore(seen, given), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as any optimizer of torch, with the record of the weights in its groups."""
        self._watch.check_groups(self.param_groups)
        return super().state_dict()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters.

        Args:
            param_group: ``params``, and options that differ from those of the constructor.

        Raises:
            ValueError: if an option is out of range.
            RuntimeError: if a parameter is flattened.
        """
        if isinstance(param_group, dict):
            check_options(param_group, f" in parameter group {len(self.param_groups)}")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for param in group["params"]:
                refuse_flattened(param, self.param_groups, math.inf)
        except RuntimeError:
            self.param_groups.pop()
            raise
        group.update(record_of(self.learned) | ({CLOCK: 0} if self.state else {}))  # it may be of another optimizer
        self._longest_vector = longest_vector(self.param_groups)
        self._watch.look_at_added([group], self.param_groups)

    def set_num_steps(self, num_steps: int | None) -> None:
        """Set the length of the run in the middle of it, as writing ``num_steps`` into every parameter group does.

        Args:
            num_steps: all steps of the run, those taken included; ``None`` for a run that may stop at any time.

        Raises:
            ValueError: if it is below 1.

        Example:
            >>> opt = FlatOpt([torch.nn.Parameter(torch.ones(2))], num_steps=100)
            >>> opt.set_num_steps(150)
            >>> opt.param_groups[0]["num_steps"]
            150
        """
        check_options(option := {"num_steps": num_steps})
        for group in (self.defaults, *self.param_groups):
            group.update(option)
        self._watch.new_length(is_given=True)

    def __repr__(self) -> str:
        lines = super().__repr__().splitlines()
        lines = [line for line in lines if not line.strip().startswith((*RECORD, SHOWS_AVERAGES, CLOCK, "momentum:"))]
        rule, weights = self.learned.rule.name, describe_record(record_of(self.learned))
        return "\n".join([*lines[:-1], f"Rule: {rule}", f"Weights: {weights}", lines[-1]])

    def __getstate__(self) -> dict[str, Any]:
        own = ("learned", "_compile", "_state_dtype", "_allow_other_weights", "_watch")
        return super().__getstate__() | {key: self.__dict__[key] for key in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":  # which torch adds to the defaults, and no group needs
                    group.setdefault(key, value)
        if "learned" in state:  # a copy or a pickle: torch loads states through here, too
            self._longest_vector = longest_vector(self.param_groups)
            self._prepare()

    def _prepare(self) -> None:
        """Set what follows from the rule and is not part of a copy or a pickle."""
        self._applied = AppliedRule(self.learned, self._compile)
        with real_tensors():
            self._layout = StateLayout.of(self.learned, self._state_dtype)

    def _states(self) -> dict[Tensor, dict[str, Any]]:
        """Return the states that the rule has made, by parameter."""
        every = ((param, state) for param, state in self.state.items() if isinstance(param, Tensor))
        return {param: state for param, state in every if self._layout.is_made(state)}

    def _slots(self) -> Iterator[Slot]:
        """Yield every parameter that has a gradient."""
        for group in self.param_groups:
            for param in (param for param in group["params"] if param.grad is not None):
                state = self.state.get(param, {})
                is_new = not self._layout.is_made(state)
                if is_new:
                    refuse_flattened(param, self.param_groups, self._longest_vector)
                else:
                    self._layout.check_shapes(state, param, self.param_groups)
                check_gradient(param, param.grad, self.param_groups)
                yield Slot(param, param.grad, group, is_new)

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        """Raise ``ValueError`` if a state is not one for this optimizer; warn if it is an empty one of another."""
        groups = state_dict["param_groups"]
        if state_dict["state"] and not self._allow_other_weights:
            check_record(groups, self.learned)
        for index, group in enumerate(groups):
            check_options(dict(group), f" in parameter group {index} of the state")
        check_iterates(state_dict)
        self._watch.look_at_loaded(state_dict)
        for param_id, param in self._pairs(state_dict):
            if state := state_dict["state"].get(param_id):
                self._layout.check(state, param, self.param_groups)

    def _pairs(self, state_dict: dict[str, Any]) -> list[tuple[Any, Tensor]]:
        """Return what a state calls a parameter, and the parameter."""
        ids = [param_id for group in state_dict["param_groups"] for param_id in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        return list(zip(ids, params))  # noqa: B905, torch refuses other lengths

    def _init_states(self, params: Sequence[Tensor]) -> None:
        """Make the states of parameters; they join in the shared state."""
        positions = positions_in(self.param_groups) if params else {}
        shared = {bucket_of(param): shared_of(state) for param, state in self._states().items()} if params else {}
        for param in params:
            weights, bucket = self._applied.weights_for(param), bucket_of(param)
            if not shared.get(bucket):
                shared[bucket] = self.learned.rule.init_shared(weights)
            # Of its own, so that no order of creation matters.
            generator = state_generator(int(self.param_groups[0]["seed"]), positions[param])
            self.state[param].update(self._layout.make(weights, param, generator, shared[bucket]))
            if self.learned.rule.average is not None:
                start_average(param, self.state[param])

    def _is_usable(self, slot: Slot, dtype: torch.dtype) -> bool:
        """Return whether a gradient can be used, which one of zeros cannot; count it if it is not finite."""
        if slot.norm <= math.sqrt(torch.finfo(dtype).max) * OVERFLOW_MARGIN:
            return slot.norm > 0  # else a momentum that only dies away would be brought to unit size for long
        self.state[slot.param]["num_skipped"] += 1
        self._watch.tell(
            "not finite",
            f"the gradient of {name_of(slot.param, self.param_groups)} holds NaN, inf or overflowing values: the "
            "tensor and its state are left as they are for this step; later cases are only counted, in "
            "state[param]['num_skipped']",
            RuntimeWarning,
        )
        return False

    def _update(self, slots: Sequence[Slot], context: tuple[float, float]) -> None:
        """Step the parameters of one device and dtype."""
        states = [self.state[slot.param] for slot in slots]
        own = [self._layout.of_rule(state, slot.param) for state, slot in zip(states, slots, strict=True)]
        shared = self._applied.step(slots, own, shared_of(states[0]), context)
        for other, state in self._states().items() if shared else ():
            if bucket_of(other) == bucket_of(slots[0].param):
                for key, value in shared.items():
                    state[SHARED_PREFIX + key].copy_(value)  # every tensor keeps a copy

    def _restore(self, state_dict: dict[str, Any], given: Sequence[float]) -> None:
        """Replace the loaded state by exact copies, on the device and in the dtypes it is kept in."""
        for param_id, param in self._pairs(state_dict):
            if saved := state_dict["state"].get(param_id):
                self.state[param] = self._layout.take(saved, param)
        for group in self.param_groups:
            group.update(record_of(self.learned))
        self._watch.restore_length(self.param_groups, given)
        self.defaults["num_steps"] = self.param_groups[0]["num_steps"]  # of groups that are added
