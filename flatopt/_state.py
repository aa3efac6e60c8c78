"""The state of a parameter: what it must look like, how a saved one is taken over, and whose weights made it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from . import _dtensor as dtensor
from ._abstract import is_abstract
from ._groups import name_of
from .pretrained import LearnedRule
from .rules import TensorShape, UpdateRule, Weights

SHARED_PREFIX = "shared."
"""Marks the copies of the shared state, which every parameter keeps so that a checkpoint is keyed by parameters."""

RECORD = ("weights_name", "weights_sha256", "weights_commit")
"""Options of a group that record the weights.  Integers: flattened distributed checkpoints accept only numbers."""

NUMEL = "numel"
"""Coordinates of the parameter that a state was made for, where some of the state describes all of them together."""

AVERAGE, ITERATE = "param_average", "param_iterate"
"""The average of a parameter, where one is kept; and the parameter, while its average stands in its place."""

SHOWS_AVERAGES = "shows_averages"
"""Option of a group, 0 or 1: whether averages stand in the place of its parameters."""

CLOCK = "steps_taken"
"""Option of a group: steps of the run so far.  No tensor has taken them all where parts of a model take turns."""

SEED_STRIDE = 1_000_003
"""Seeds this far apart share no random initial state between parameters with indices below it."""

_NAME_BYTES = 96

Groups = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class StateLayout:
    """Keys and shapes of the state that a rule keeps of a parameter."""

    rule: UpdateRule
    per_tensor: dict[str, torch.Size]
    """Shapes by key."""
    per_coordinate: dict[str, torch.Size]
    """What stands behind the shape of the parameter, by key."""
    shared: frozenset[str]
    """Keys of the shared state, with their prefix."""
    compressed: torch.dtype | None
    """What the compressible part is kept in, ``None`` for what all is kept in."""
    known: dict[tuple[torch.Size, bool], dict[str, torch.Size]] = field(default_factory=dict, init=False, repr=False)
    """What :meth:`shapes_of` found, by the shape of the parameter, and whether that is complex."""

    @classmethod
    def of(cls, learned: LearnedRule, compressed: torch.dtype | None) -> StateLayout:
        """Return the layout of a rule's state."""
        rule, weights = learned.rule, learned.weights
        example = rule.init_state(weights, torch.zeros(1))
        once = {"step", *rule.memory}
        return cls(
            rule,
            {key: value.shape for key, value in example.items() if key in once},
            {key: value.shape[1:] for key, value in example.items() if key not in once},
            frozenset(SHARED_PREFIX + key for key in rule.init_shared(weights)),
            compressed,
        )

    def shapes_of(self, param: Tensor) -> dict[str, torch.Size]:
        """Return the shape of everything that the rule keeps of a parameter, by key."""
        kind = param.shape, param.is_complex()
        if kind not in self.known:
            shape, unkept = real_shape(param), self.rule.unkept(shape_of(param))
            own = {key: shape + extra for key, extra in self.per_coordinate.items() if key not in unkept}
            self.known[kind] = self.per_tensor | own
        return self.known[kind]

    def of_rule(self, state: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
        """Return the state of the rule itself."""
        return {key: state[key] for key in self.shapes_of(param)}

    @property
    def describes_whole(self) -> bool:
        """Whether some of the state is of all coordinates together, so that it must not be cut."""
        return len(self.per_tensor) > 1  # besides the step

    @cached_property
    def marks(self) -> frozenset[str]:
        """Keys that tell that the rule has a state; a wrapper may have put values of its own, or a ``step``."""
        every = self.per_tensor.keys() | self.per_coordinate.keys()
        return frozenset(every - {"step"} or every)

    def is_made(self, state: Mapping[str, Any]) -> bool:
        """Return whether the rule has a state here."""
        return not self.marks.isdisjoint(state)

    def check_shapes(self, state: Mapping[str, Any], param: Tensor, groups: Groups) -> None:
        """Raise ``ValueError`` unless all is there and every value per coordinate has the parameter's shape; cheap."""
        for key, expected in self.shapes_of(param).items():
            found = value.shape if isinstance(value := state.get(key), Tensor) else None
            if found != expected:
                _refuse(key, found, expected, param, groups)
        check_average_shapes(state, param, groups)

    def check(self, state: Mapping[str, Any], param: Tensor, groups: Groups) -> None:
        """Raise ``ValueError`` unless a loaded state has every key, and the shapes of the parameter."""
        if missing := {*self.shapes_of(param), *self.shared} - state.keys():
            raise ValueError(
                f"state of {name_of(param, groups)} has no {min(missing)!r}: it was saved by another optimizer or rule "
                f"than {self.rule.name!r}"
            )
        same = {key: self._as_kept(key, state[key]) for key in self.per_tensor}
        self.check_shapes({**state, **same}, param, groups)
        step = same["step"]
        if not is_abstract(step) and not 0 <= float(step) < math.inf:
            raise ValueError(f"state of {name_of(param, groups)} has taken {float(step)} steps: it is damaged")
        made_for = state.get(NUMEL) if self.describes_whole else None
        if made_for is not None and not (isinstance(made_for, Tensor) and is_abstract(made_for)):
            self.check_numel(float(made_for), param, groups)

    def check_numel(self, made_for: float | None, param: Tensor, groups: Groups) -> None:
        """Raise ``ValueError`` if a state was made for another number of coordinates; cut or extended, it may fit."""
        if made_for is None or math.isclose(made_for, param.numel(), rel_tol=torch.finfo(torch.float32).eps):
            return
        whole = " and ".join(repr(key) for key in self.per_tensor if key != "step")
        raise ValueError(
            f"state of {name_of(param, groups)} was made for {made_for:.0f} coordinates, but the parameter has shape "
            f"{list(param.shape)}: {whole} still describes the tensor that it was; delete optimizer.state[param] to "
            f"start it anew, or only optimizer.state[param][{NUMEL!r}] to go on with it"
        )

    def complete(self, state: MutableMapping[str, Any], param: Tensor) -> None:
        """Add what is kept besides the state of the rule, where it is missing."""
        if "num_skipped" not in state:
            state["num_skipped"] = torch.zeros((), dtype=torch.int64, device=param.device)
        if self.describes_whole and NUMEL not in state:
            state[NUMEL] = torch.full((), param.numel(), dtype=compute_dtype(param), device=param.device)

    def make(
        self, weights: Weights, param: Tensor, generator: torch.Generator, shared: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the state of a parameter before its first step."""
        dtype = compute_dtype(param)
        with dtensor.replicated_weights(param):
            given = real_view(param).detach().to(dtype).contiguous()
            fresh = self.rule.fresh_state(weights, given, generator, shape=shape_of(param))
            state = {
                key: dtensor.local_copy(value)
                if key in self.per_tensor
                else dtensor.placed_like(value.to(self._kept_dtype(key, dtype)), param)
                for key, value in fresh.items()
            }
        self.complete(state, param)
        return state | {SHARED_PREFIX + key: value.clone() for key, value in shared.items()}

    def take(self, saved: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
        """Return a copy of a saved state, where and how it is kept."""
        dtype = compute_dtype(param)
        unkept = self.rule.unkept(shape_of(param))
        kept = {key: value for key, value in saved.items() if key not in unkept}
        taken = {key: self._take(key, value, param, self._kept_dtype(key, dtype)) for key, value in kept.items()}
        self.complete(taken, param)
        return taken

    def _kept_dtype(self, key: str, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that a value is kept in between steps."""
        if key == "num_skipped":
            return torch.int64
        return self.compressed if self.compressed and key in self.rule.compressible_state else dtype

    def _take(self, key: str, value: Any, param: Tensor, dtype: torch.dtype) -> Any:
        """Return a copy of a saved value, on the device of ``param``, sharded as it is, in ``dtype`` if of its kind."""
        if isinstance(value, int | float):
            return torch.tensor(value, dtype=dtype, device=param.device)
        if not isinstance(value, Tensor):
            return value
        wanted = dtype if value.is_floating_point() or not dtype.is_floating_point else value.dtype
        copied = value.detach().to(param.device, wanted).clone(memory_format=torch.contiguous_format)
        copied = self._as_kept(key, copied)
        is_cut = key in self.per_coordinate or key in (AVERAGE, ITERATE)
        if is_cut and dtensor.is_dtensor(copied) != dtensor.is_dtensor(param):
            return dtensor.placed_like(dtensor.whole_copy(copied), param)
        return copied

    def _as_kept(self, key: str, value: Any) -> Any:
        """Return a value that exists once per tensor in its shape, if it has as many numbers."""
        shape = self.per_tensor.get(key)
        if shape is None:
            return value
        value = torch.as_tensor(value) if isinstance(value, int | float) else value
        return value.reshape(shape) if isinstance(value, Tensor) and value.numel() == shape.numel() else value


def check_average_shapes(state: Mapping[str, Any], param: Tensor, groups: Groups) -> None:
    """Raise ``ValueError`` unless the average of a parameter has its shape."""
    for key in (AVERAGE, ITERATE):
        if key in state and (found := getattr(state[key], "shape", None)) != (expected := real_shape(param)):
            _refuse(key, found, expected, param, groups)


def _refuse(key: str, found: Any, expected: torch.Size, param: Tensor, groups: Groups) -> None:
    if found is None:
        raise ValueError(f"state of {name_of(param, groups)} has no tensor {key!r}, which the optimizer keeps")
    raise ValueError(
        f"state {key!r} of {name_of(param, groups)} has shape {list(found)}, but the parameter needs "
        f"{list(expected)}: load a state of this shape, or delete this one (optimizer.state[param], or "
        "state_dict['state'][index]) to start it anew"
    )


def copy_of(param: Tensor) -> Tensor:
    """Return a parameter as a value of the state: an own copy, real, in the dtype to compute in, sharded as it is."""
    return dtensor.placed_like(real_view(param).detach().to(compute_dtype(param)), param)


def real_view(tensor: Tensor) -> Tensor:
    """Return a real view: complex numbers become pairs."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def real_shape(param: Tensor) -> torch.Size:
    """Return the shape of a parameter as pairs of real numbers, if it is complex."""
    return torch.Size((*param.shape, 2)) if param.is_complex() else param.shape


def shape_of(param: Tensor) -> TensorShape:
    """Return the shape of a whole parameter as a rule sees it."""
    return _shape_of(param.shape, param.is_complex())


@lru_cache(maxsize=1024)
def _shape_of(shape: torch.Size, is_complex: bool) -> TensorShape:
    return TensorShape.of(shape, is_complex=is_complex)


def compute_dtype(param: Tensor) -> torch.dtype:
    """Return the real dtype that a parameter is computed on in."""
    return _compute_dtype(param.dtype)


@lru_cache(maxsize=64)
def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype.to_real(), torch.float32)


def state_generator(seed: int, index: int) -> torch.Generator:
    """Return the source of the random initial state of parameter ``index`` of an optimizer with ``seed``."""
    return torch.Generator().manual_seed(seed * SEED_STRIDE + index)


def shared_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the shared state that a parameter keeps a copy of."""
    return {key.removeprefix(SHARED_PREFIX): value for key, value in state.items() if key.startswith(SHARED_PREFIX)}


def record_of(learned: LearnedRule) -> dict[str, int]:
    """Return what a parameter group records of the weights."""
    name = (learned.name or "").encode()[:_NAME_BYTES]
    return dict(
        zip(RECORD, (int.from_bytes(name, "big"), int(learned.sha256, 16), int(learned.commit or "0", 16)), strict=True)
    )


def describe_record(record: Mapping[str, int]) -> str:
    """Return a record in words.

    Example:
        >>> describe_record({"weights_name": int.from_bytes(b"flat-v2", "big"), "weights_sha256": 10**76})
        "'flat-v2' (SHA-256 161bcca7119915b5...)"
    """
    number = int(record.get("weights_name", 0))
    name = number.to_bytes((number.bit_length() + 7) // 8, "big").decode(errors="replace")
    commit = int(record.get("weights_commit", 0))
    at = f" at commit {commit:040x}" if commit else ""
    sha256 = f"{int(record['weights_sha256']):064x}"
    return f"{repr(name) if name else 'made in memory'}{at} (SHA-256 {sha256[:16]}...)"


def check_record(groups: Iterable[Mapping[str, Any]], learned: LearnedRule) -> None:
    """Raise ``ValueError`` if groups record other weights; earlier checkpoints, without a record, are taken."""
    own = record_of(learned)
    for group in groups:
        if group.get("weights_sha256", own["weights_sha256"]) != own["weights_sha256"]:
            raise ValueError(
                f"this state was made with the weights {describe_record(group)}, not {describe_record(own)}: give "
                "those as FlatOpt(pretrained=..., revision=...), or allow_other_weights=True to go on with these"
            )
