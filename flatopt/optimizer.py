"""``FlatOpt``: an update rule with learned weights behind the interface of ``torch.optim.Optimizer``.

No update maths is here.  The class finds the parameters that have a usable gradient, brings dtypes, layouts, devices
and shards into the form that :func:`flatopt.rules.apply_rule` wants, calls it, and writes the steps back.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .pretrained import LearnedRule, load_pretrained
from .rules import Phases, State, StepContext, UpdateRule, Weights, apply_rule, plain_phases

CHUNK_SIZE = 2**15
"""Coordinates handled at once: bounds the memory of a step whatever the size of the tensors."""

COMPILED_CHUNK_SIZE = 2**18
"""The same where compiled code keeps what is between its inputs and outputs in registers."""

PACK_SIZE = 2**14
"""Tensors up to this size are handled side by side: below it a step costs calls, not arithmetic."""

SEED_STRIDE = 1_000_003
"""Seeds this far apart share no random initial state between parameters with indices below it."""

SHARED_PREFIX = "shared."
"""Marks the copies of the shared state, which every parameter keeps so that a checkpoint is keyed by parameters."""

# Gradients up to this fraction of the square root of the largest number can be squared and summed 1e8 times.
_OVERFLOW_MARGIN = 1e-4


class FlatOpt(Optimizer):
    r"""Implements a learned optimizer: pretrained weights, nothing to tune.

    .. math::
        \begin{aligned}
            s_t, \sigma_t &= \mathrm{observe}_w(s_{t-1}, g_t, \theta_{t-1})
                && \text{each tensor: accumulators and sums} \\
            c_t, m_t &= \mathrm{mix}_w(\sigma_t, m_{t-1}, t / T)
                && \text{all tensors: a few controls per tensor} \\
            \Delta_t, \alpha_t &= \mathrm{propose}_w(s_t, g_t, \theta_{t-1}, c_t)
                && \text{each coordinate: step and step size} \\
            \theta_t &= (1 - \gamma \alpha_t \lambda)\, \theta_{t-1} + \gamma \Delta_t
        \end{aligned}

    with :math:`g_t` the gradient (negated by ``maximize``), :math:`w` the learned weights, :math:`\gamma` = ``lr``,
    :math:`\lambda` = ``weight_decay``, :math:`T` = ``num_steps`` and :math:`\alpha_t` the rule's own step size.

    It needs no closure, no loss and no ``train()`` or ``eval()``.  State is kept in ``float32`` for half-precision
    parameters and in ``float64`` for double ones; half-precision parameters are added to in ``float32`` and rounded
    once.  Complex parameters are treated as pairs of real numbers.  Parameters sharded as ``DTensor`` (FSDP2) are
    updated shard by shard with statistics over the whole tensor.  Parameters on several devices, or in ``float64``
    beside ``float32``, are updated in one group per device and dtype: the rule mixes information inside each.

    A tensor takes part from its first gradient that is not zero; before that nothing moves it, weight decay included.
    A gradient with NaN, inf or values whose squares would overflow counts as no gradient: the tensor and its state
    stay as they are, ``state[param]["num_skipped"]`` counts it, and one ``RuntimeWarning`` per optimizer tells it.
    Finding that out costs one synchronisation with the device per step, so a step cannot be captured in a CUDA graph.

    Args:
        params: iterable of parameters, of ``(name, parameter)`` pairs, or of dicts that define parameter groups.
        lr: multiplies the learned step, 1.0 is as learned; a float or a tensor with one element, per group, driven by
            any scheduler.
        pretrained: name of a shipped set of weights (:func:`flatopt.list_pretrained`), a folder, a Hugging Face Hub id
            ``"org/name"``, or a :class:`flatopt.LearnedRule`.
        num_steps: length of the run in steps if it is known: the learned schedule then ends with it.  ``None`` for a
            run that may stop at any time.  The value of the first parameter group counts.
        weight_decay: decoupled weight decay, multiplied by the rule's own step size, so that values usual for AdamW
            (0.01 to 0.1) mean the same here.
        revision: branch, tag or commit on the Hub; a 40-digit commit that was used before needs no network.
        cache_dir: where downloads are kept.
        token: access token for the Hub.
        local_files_only: never download.
        maximize: go up instead of down.
        compile: compile the arithmetic on coordinates with ``torch.compile``: half a minute at the first step, once for
            all models, for steps up to twice as fast on large ones.  Falls back to eager execution, with a warning,
            where that is not possible.
        state_dtype: ``torch.bfloat16`` keeps in it those accumulators of which the rule says that they may be
            (``UpdateRule.compressible_state``: the recurrent states, most of the memory of ``l2o-dm`` and ``rnnprop``);
            they are computed in ``float32`` and rounded once per step.  ``None`` keeps all in ``float32``.
        seed: decides the random initial learning rates of ``l2o-scale``, the same on every device and whatever the
            global generator does; other rules start from no random numbers.  The value of the first parameter group
            counts.

    Raises:
        ValueError: if ``lr``, ``weight_decay``, ``num_steps`` or ``seed`` is out of range, if the weights are not what
            they should be, or if ``state_dtype`` is not one that the rule's state may have.
        TypeError: if ``params`` is a single tensor.

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
        pretrained: str | os.PathLike[str] | LearnedRule = "flat-v1",
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
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not 0.0 <= lr < math.inf:
            raise ValueError(f"Invalid learning rate: {lr}, must be finite and >= 0")
        if not 0.0 <= weight_decay < math.inf:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}, must be finite and >= 0")
        if num_steps is not None and not num_steps >= 1:
            raise ValueError(f"Invalid num_steps value: {num_steps}, must be >= 1 or None")
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"Invalid seed value: {seed}, must be in [0, 2^32)")
        if isinstance(pretrained, LearnedRule):
            self.learned = pretrained
        else:
            self.learned = load_pretrained(
                pretrained, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
            )
        if state_dtype not in (None, torch.bfloat16):
            raise ValueError(f"Invalid state_dtype value: {state_dtype}, must be torch.bfloat16 or None")
        if state_dtype is not None and not self.learned.rule.compressible_state:
            raise ValueError(f"Invalid state_dtype value: all state of {self.learned.rule.name!r} needs full precision")
        self._state_dtype = state_dtype
        self._compile = bool(compile)
        self._warned_not_finite = False
        self._prepare()
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            # A number even when unknown: flattened distributed checkpoints accept only numbers and tensors.
            "num_steps": math.inf if num_steps is None else num_steps,
            "maximize": maximize,
            "seed": seed,
            # Inert: OneCycleLR and CyclicLR write their momentum here, and refuse optimizers that have none.
            "momentum": 0.0,
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...

    # A compiled training step breaks its graph here.  The public torch.compiler.disable would import the compiler.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: clears the gradients, computes them again and returns the loss; called once.

        Returns:
            What ``closure`` returned, ``None`` without one.

        Raises:
            RuntimeError: if a gradient is sparse.
            TypeError: if a parameter with a gradient is neither floating-point nor complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        slots = list(self._slots())  # whole: an error comes before anything is changed
        for slot in slots:
            if not self.state[slot.param]:
                self._init_state(slot.param)

        buckets: dict[tuple[torch.device, torch.dtype], list[_Slot]] = {}
        grads: dict[Tensor, Tensor] = {}
        norms: dict[Tensor, float] = {}
        steps: dict[Tensor, float] = {}
        for key in dict.fromkeys(_bucket(param) for param in self.state):
            members = buckets[key] = [slot for slot in slots if _bucket(slot.param) == key]
            holders = [param for param, state in self.state.items() if state and _bucket(param) == key]
            grads.update({slot.param: _local(slot.grad, slot.param) for slot in members})
            measured = _measure(members, [grads[slot.param] for slot in members], self._steps(holders))
            norms.update(zip([slot.param for slot in members], measured[: len(members)], strict=True))
            steps.update(zip(holders, measured[len(members) :], strict=True))

        context = (1.0 + max(steps.values(), default=0.0), float(self.param_groups[0]["num_steps"] or math.inf))
        for (device, dtype), members in buckets.items():
            limit = math.sqrt(torch.finfo(dtype).max) * _OVERFLOW_MARGIN
            usable = []
            for slot in members:
                if not norms[slot.param] <= limit:
                    self._skip(slot)
                elif norms[slot.param] > 0 or steps[slot.param] > 0:
                    usable.append(slot)
            if usable:
                self._update(usable, [grads[slot.param] for slot in usable], context, device, dtype)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state made by :meth:`state_dict`, in the precision that this optimizer keeps it in.

        The tensors are copied: two optimizers never share them.

        Args:
            state_dict: optimizer state.

        Raises:
            ValueError: if its groups do not fit, or if it is the state of another optimizer or rule.
        """
        seen: dict[str, Any] = {}

        def capture(_: Optimizer, state_dict: dict[str, Any]) -> None:
            for param_id, state in state_dict["state"].items():
                missing = sorted(self._state_keys - state.keys()) if state else []
                if missing:
                    raise ValueError(
                        f"state of parameter {param_id!r} has no {missing[0]!r}: "
                        f"it was saved by another optimizer or rule than {self.learned.rule.name!r}"
                    )
            seen.update(state_dict)

        # torch casts every float to the parameter's dtype.  The hooks frame its work from inside the user's own hooks:
        # after the last of them that may replace the dict, and before the first that may look at the result.
        handles = [
            self.register_load_state_dict_pre_hook(capture),
            self.register_load_state_dict_post_hook(lambda _: self._restore(seen), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = {key: self.__dict__[key] for key in ("learned", "_compile", "_state_dtype", "_warned_not_finite")}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":
                    group.setdefault(key, value)
        if "learned" in state:
            self._state_dtype = state.get("_state_dtype")  # older pickles have neither this nor a seed
            for group in self.param_groups:
                group.setdefault("seed", 0)
            self._prepare()

    def _prepare(self) -> None:
        """Set what follows from the rule and is not part of a copy or a pickle."""
        rule = self.learned.rule
        self._weights: dict[tuple[torch.device, torch.dtype], Weights] = {}
        self._phases = plain_phases(rule)
        self._compiled = _Compiled(self._phases) if self._compile else None
        if self._compiled is not None:
            self._phases = self._compiled.phases()
        self._rule_keys = tuple(rule.init_state(self.learned.weights, torch.zeros(1)))
        shared_keys = {SHARED_PREFIX + key for key in rule.init_shared(self.learned.weights)}
        self._state_keys = set(self._rule_keys) | shared_keys

    def _slots(self) -> Iterator[_Slot]:
        """Yield every parameter that has a gradient."""
        for group_index, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                if param.grad.layout != torch.strided:
                    raise RuntimeError("FlatOpt does not support sparse gradients, use sparse=False or SparseAdam")
                if not (param.is_floating_point() or param.is_complex()):
                    raise TypeError(f"FlatOpt cannot optimize a parameter of dtype {param.dtype}")
                names = group.get("param_names")
                name = f"parameter {index} of group {group_index}" if names is None else f"parameter {names[index]!r}"
                yield _Slot(param, param.grad, group, name)

    def _weights_on(self, device: torch.device, dtype: torch.dtype) -> Weights:
        """Return the weights on a device, in a dtype."""
        if (device, dtype) not in self._weights:
            moved = {key: value.to(device, dtype) for key, value in self.learned.weights.items()}
            self._weights[device, dtype] = moved
        return self._weights[device, dtype]

    def _init_state(self, param: Tensor) -> None:
        """Make the state of a parameter."""
        rule, weights = self.learned.rule, self._weights_on(*_bucket(param))
        whole = torch.view_as_real(param) if param.is_complex() else param
        dtype = _bucket(param)[1]
        with _replicated_weights(param):
            fresh = rule.init_state(weights, whole.detach().to(dtype).contiguous(), self._generator(param))
            state = {
                key: _plain(value)
                if key in rule.tensor_state
                else _placed_like(value.to(self._kept_dtype(key, dtype)), param)
                for key, value in fresh.items()
            }
        state["num_skipped"] = torch.zeros((), dtype=torch.int64, device=param.device)
        relatives = (other for key, other in self.state.items() if other and _bucket(key) == _bucket(param))
        shared = _shared(next(relatives, {})) or rule.init_shared(weights)
        state.update({SHARED_PREFIX + key: value.clone() for key, value in shared.items()})
        self.state[param].update(state)

    def _generator(self, param: Tensor) -> torch.Generator:
        """Return the source of the initial state of a parameter: its own, so that no order of creation matters."""
        everywhere = (other for group in self.param_groups for other in group["params"])
        index = next(index for index, other in enumerate(everywhere) if other is param)
        return state_generator(int(self.param_groups[0]["seed"]), index)

    def _kept_dtype(self, key: str, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that a floating-point value of the state is kept in between steps."""
        return self._state_dtype if self._state_dtype and key in self.learned.rule.compressible_state else dtype

    def _steps(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return the step counters of parameters, on their devices."""
        for param in params:
            state = self.state[param]
            if state["step"].device != param.device:  # Lightning moves all of a state but this
                state["step"] = state["step"].to(param.device)
        return [self.state[param]["step"] for param in params]

    def _skip(self, slot: _Slot) -> None:
        """Count a gradient that cannot be used."""
        self.state[slot.param]["num_skipped"] += 1
        if not self._warned_not_finite:
            self._warned_not_finite = True
            warnings.warn(
                f"the gradient of {slot.name} holds NaN, inf or overflowing values: the tensor and its state are left "
                "as they are for this step; later cases are only counted, in state[param]['num_skipped']",
                RuntimeWarning,
                stacklevel=7,
            )

    def _update(
        self,
        slots: Sequence[_Slot],
        grads: Sequence[Tensor],
        context: tuple[float, float],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Step the parameters of one device and dtype."""

        def scalar(value: float | Tensor) -> Tensor:
            if isinstance(value, Tensor):
                return value.detach().to(device, dtype).reshape(())
            return torch.full((), value, device=device, dtype=dtype)  # a fill, where torch.tensor would synchronise

        targets = [_real(_plain_view(slot.param)) for slot in slots]
        params = [target.contiguous() for target in targets]
        shardings = [_sharding(slot.param) for slot in slots]
        lrs = {id(slot.group): scalar(slot.group["lr"]) for slot in slots}
        arguments: tuple[Any, ...] = (
            self.learned.rule,
            self._weights_on(device, dtype),
            params,
            [-grad if slot.group["maximize"] else grad for slot, grad in zip(slots, grads, strict=True)],
            [{key: _plain_view(self.state[slot.param][key]) for key in self._rule_keys} for slot in slots],
            _shared(self.state[slots[0].param]),
            StepContext(*map(scalar, context)),
            [lrs[id(slot.group)] for slot in slots],
            [slot.group["weight_decay"] for slot in slots],
        )
        with torch.autocast(device.type, enabled=False):  # a step taken inside autocast keeps its precision
            shared = _take_step(
                *arguments,
                phases=self._phases,
                chunk_size=COMPILED_CHUNK_SIZE if self._compiled and self._compiled.fast else CHUNK_SIZE,
                all_reduce=(lambda sums: _all_reduce(sums, shardings, torch.distributed.ReduceOp.SUM))
                if any(sharding is not None for sharding in shardings)
                else None,
            )

        for target, param in zip(targets, params, strict=True):
            if param is not target:
                target.copy_(param)
        if shared:
            for other, state in self.state.items():
                if state and _bucket(other) == (device, dtype):
                    for key, value in shared.items():
                        state[SHARED_PREFIX + key].copy_(value)

    def _restore(self, state_dict: dict[str, Any]) -> None:
        """Replace the loaded state by exact copies, on the device and in the dtypes it is kept in."""
        ids = [param_id for group in state_dict["param_groups"] for param_id in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for param_id, param in zip(ids, params, strict=True):
            for key, value in state_dict["state"].get(param_id, {}).items():
                wanted = torch.int64 if key == "num_skipped" else self._kept_dtype(key, _bucket(param)[1])
                self.state[param][key] = _restored(value, param, wanted)
            if self.state.get(param):
                skipped = torch.zeros((), dtype=torch.int64, device=param.device)
                self.state[param].setdefault("num_skipped", skipped)


def state_generator(seed: int, index: int) -> torch.Generator:
    """Return the source of the random initial state of parameter ``index`` of an optimizer with ``seed``."""
    return torch.Generator().manual_seed(seed * SEED_STRIDE + index)


class _Slot(NamedTuple):
    """A parameter with a gradient."""

    param: Tensor
    grad: Tensor
    group: dict[str, Any]
    name: str


class _Sharding(NamedTuple):
    """How a DTensor is cut: the mesh, and those of its dimensions along which ranks hold different parts."""

    mesh: Any
    dims: tuple[int, ...]


def _take_step(
    rule: UpdateRule,
    weights: Weights,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    shared: State,
    context: StepContext,
    lrs: Sequence[Tensor],
    weight_decays: Sequence[float],
    *,
    phases: Phases,
    chunk_size: int,
    all_reduce: Callable[[Tensor], Tensor] | None,
) -> State:
    """Advance parameters and states in place; return the new shared state."""

    def emit(index: int, where: slice, delta: Tensor, step_size: Tensor) -> None:
        target = params[index].view(-1)[where]
        value = target.to(delta.dtype)  # half types: computed in float32, rounded once
        if weight_decays[index] != 0:
            value = value * (1 - lrs[index] * step_size * weight_decays[index])
        target.copy_(value + lrs[index] * delta)

    return apply_rule(
        rule,
        weights,
        params,
        grads,
        states,
        shared,
        context,
        emit=emit,
        chunk_size=chunk_size,
        pack_size=PACK_SIZE,
        all_reduce=all_reduce,
        phases=phases,
    ).shared


class _Compiled:
    """The phases of a rule on coordinates, through ``torch.compile``; plain ones, with a warning, where it fails."""

    def __init__(self, plain: Phases):
        self.plain = plain
        self.fast: Phases | None = plain._replace(
            observe=torch.compile(plain.observe, fullgraph=True, dynamic=True),
            propose=torch.compile(plain.propose, fullgraph=True, dynamic=True),
        )

    def phases(self) -> Phases:
        """Return the phases as the driver takes them."""
        return self.plain._replace(observe=partial(self._call, "observe"), propose=partial(self._call, "propose"))

    def _call(self, name: str, *arguments: Any) -> Any:
        if self.fast is not None:
            try:
                return getattr(self.fast, name)(*arguments)
            # Raised before anything runs; the second is not a TorchDynamoException.
            except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
                reason = str(error).strip().splitlines()[0]
                warnings.warn(f"FlatOpt goes on without torch.compile: {reason}", RuntimeWarning, stacklevel=10)
                self.fast = None
        return getattr(self.plain, name)(*arguments)


def _measure(slots: Sequence[_Slot], grads: Sequence[Tensor], steps: Sequence[Tensor]) -> list[float]:
    """Return the largest absolute value of each gradient (inf for NaN), then the steps: one transfer to the host."""
    dtype = steps[0].dtype if steps else torch.float32
    if slots:
        # The norm of an empty tensor is an error; of a half type it has to be taken in the dtype of the others.
        sized = iter(torch._foreach_norm([grad for grad in grads if grad.numel()] or [grads[0].new_zeros(1)], math.inf))
        norms = torch.stack(
            [next(sized).to(dtype) if grad.numel() else grad.new_zeros((), dtype=dtype) for grad in grads]
        )
        norms = torch.nan_to_num(norms, nan=math.inf, posinf=math.inf)  # a maximum over ranks may lose a NaN
        shardings = [_sharding(slot.param) for slot in slots]
        if any(sharding is not None for sharding in shardings):
            norms = _all_reduce(norms, shardings, torch.distributed.ReduceOp.MAX)
        steps = [*norms.unbind(), *steps]
    return torch.stack([step.double() for step in steps]).tolist() if steps else []


def _bucket(param: Tensor) -> tuple[torch.device, torch.dtype]:
    """Return device and compute dtype of a parameter: those that agree are updated together."""
    real = param.dtype.to_real()
    return param.device, torch.promote_types(real, torch.float32)


def _shared(state: State) -> State:
    """Return the shared state that a parameter keeps a copy of."""
    return {key.removeprefix(SHARED_PREFIX): value for key, value in state.items() if key.startswith(SHARED_PREFIX)}


def _restored(value: Any, param: Tensor, dtype: torch.dtype) -> Any:
    """Return a copy of a saved value of the state of ``param``, in ``dtype`` if that is of the same kind."""
    if isinstance(value, int | float):
        return torch.tensor(value, dtype=dtype, device=param.device)
    if not isinstance(value, Tensor):
        return value
    wanted = dtype if value.is_floating_point() or not dtype.is_floating_point else value.dtype
    return value.detach().to(param.device, wanted).clone(memory_format=torch.contiguous_format)


def _real(tensor: Tensor) -> Tensor:
    """Return a real view: complex numbers become pairs."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


# --- DTensor: everything below is the identity for plain tensors ---------------------------------------------------


def _is_dtensor(tensor: Tensor) -> bool:
    """Tell if a tensor is a DTensor, without importing that machinery (a second) where nobody else did."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _plain_view(tensor: Any) -> Tensor:
    """Return the local shard, in the same storage."""
    return tensor.to_local() if _is_dtensor(tensor) else tensor.detach()


def _plain(tensor: Tensor) -> Tensor:
    """Return an own, contiguous copy of a value that is the same on every rank."""
    return _plain_view(tensor).clone(memory_format=torch.contiguous_format)


def _local(grad: Any, param: Any) -> Tensor:
    """Return the real, contiguous, local gradient, in the layout of its parameter."""
    if _is_dtensor(grad) and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return _real(_plain_view(grad)).contiguous()


def _placed_like(value: Any, param: Any) -> Tensor:
    """Return an own copy of a per-coordinate value, sharded as its parameter is."""
    if not _is_dtensor(param):
        return _plain(value)
    tensor = sys.modules["torch.distributed.tensor"]
    if not _is_dtensor(value):
        value = tensor.DTensor.from_local(value, param.device_mesh, [tensor.Replicate()] * param.device_mesh.ndim)
    value = value.redistribute(param.device_mesh, param.placements)
    return tensor.DTensor.from_local(
        _plain(value), param.device_mesh, param.placements, shape=value.shape, stride=value.stride()
    )


def _replicated_weights(param: Tensor) -> AbstractContextManager[Any]:
    """Let a rule combine its plain weights with a DTensor."""
    if not _is_dtensor(param):
        return nullcontext()
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()


def _sharding(param: Any) -> _Sharding | None:
    """Return how a parameter is sharded, ``None`` if every rank holds all of it."""
    if not _is_dtensor(param):
        return None
    dims = tuple(dim for dim, placement in enumerate(param.placements) if not placement.is_replicate())
    return _Sharding(param.device_mesh, dims) if dims else None


def _all_reduce(rows: Tensor, shardings: Sequence[_Sharding | None], op: Any) -> Tensor:
    """Reduce the rows of sharded tensors over the ranks that share them; others are complete already."""
    rows = rows.clone()
    for sharding in dict.fromkeys(sharding for sharding in shardings if sharding is not None):
        where = [index for index, other in enumerate(shardings) if other == sharding]
        part = rows[where]
        for dim in sharding.dims:
            torch.distributed.all_reduce(part, op=op, group=sharding.mesh.get_group(dim))
        rows[where] = part
    return rows
