"""Weights that others published, as learned rules of this package.

The files of L2O-DM and RNNProp are dill pickles of ``{module: {variable: float32 array}}``.  A pickle is a program, so
nothing that it names is ever looked up: the few names that such files need stand for inert records in here, any other
is an error, and arrays are made from their bytes.  Neither dill nor numpy is imported.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import pickletools
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._cards import rule_facts, write_card
from .._folder import read_bounded
from ..pretrained import LearnedRule
from ..rules import L2ODM, RNNProp, UpdateRule, Weights

MAX_FILE_BYTES = 2**20
"""The published files have about 30 kB."""

Arrays = Mapping[tuple[str, str], Tensor]
"""Tensors by module and variable."""


def import_weights(file: Path, rule: str) -> LearnedRule:
    """Read the published weights of a rule.

    Args:
        file: dill pickle of ``{module: {variable: float32 array}}``.
        rule: ``"l2o-dm"`` or ``"rnnprop"``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the rule is another, or if the file holds anything else than the weights of that rule; a pickle
            that names anything but what such files need is refused, naming it, and nothing of it is executed.
    """
    if rule not in FORMATS:
        raise ValueError(f"no published weights of {rule!r} can be read, only of: {', '.join(FORMATS)}")
    content = read_bounded(file, MAX_FILE_BYTES)
    published = FORMATS[rule]
    try:
        weights = published.convert(_check_arrays(read_arrays(content), published.shapes))
        metadata = {"imported_from": file.name, "sha256": hashlib.sha256(content).hexdigest()}
        return LearnedRule(published.rule, weights, _make_card(published.rule, weights, metadata), metadata)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_arrays(content: bytes) -> dict[tuple[str, str], Tensor]:
    """Read a dill pickle of ``{module: {variable: float32 array}}``, executing nothing; else ``ValueError``.

    Pickles of protocol 0 with bytes as text need a Python whose ``pickletools`` reads them (python/cpython#126997).
    """
    try:
        for code, argument, _ in pickletools.genops(content):
            # The unpickler makes room for all objects up to this number, at once.
            if code.name.endswith("PUT") and int(argument or 0) > len(content):
                raise _RefusedError(f"numbers an object {argument}")
        tree = _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except _RefusedError as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # a broken or hostile stream can fail in any way inside the stack machine
        raise ValueError(f"not a pickle of arrays: {type(error).__name__}: {str(error)[:200]}") from error
    if not isinstance(tree, dict) or not all(isinstance(module, dict) for module in tree.values()):
        raise ValueError("not a mapping of modules to variables")
    return {
        (_check_name(module), _check_name(variable)): _to_tensor(array, f"{module}/{variable}")
        for module, variables in tree.items()
        for variable, array in variables.items()
    }


class _RefusedError(Exception):
    """A pickle wants something that no file of weights needs."""

    def __init__(self, what: str):
        super().__init__(f"refused, nothing was executed: the pickle {what[:300]}")


class _Unpickler(pickle.Unpickler):
    """Resolves every global name to one of the stand-ins below."""

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _KNOWN:
            raise _RefusedError(f"names {module}.{name}")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError("names a persistent object")


class _Inert:
    """Stands for an object by its name; a pickle can pass it around but not change it."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError(f"changes {self!r}")

    def __repr__(self) -> str:
        return self.name


class _Function(_Inert):
    """Stands for a function; does what the stand-in does."""

    __slots__ = ("function",)

    def __init__(self, name: str, function: Callable[..., Any]):
        super().__init__(name)
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class _Record(_Inert):
    """Stands for an array or a dtype: keeps what it is made of, once."""

    __slots__ = ("arguments", "state")

    def __init__(self, name: str, *arguments: Any):
        super().__init__(name)
        self.arguments = arguments
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        if self.state != () or not isinstance(state, tuple):
            super().__setstate__(state)
        self.state = state


def _show(value: Any) -> str:
    """Return text, or a name; of other objects only the type, because nested ones may have endless representations."""
    return str(value) if isinstance(value, str | _Inert) else type(value).__name__


def _load_type(name: Any) -> _Inert:
    if name not in ("dict", "DictType"):
        raise _RefusedError(f"names the type {_show(name)}")
    return _Inert("dict")


def _import_module(name: Any, safe: Any = False) -> _Inert:
    if name in _HOMES_OF_RECONSTRUCT:
        return _Inert(name)
    raise _RefusedError(f"imports {_show(name)}")


def _get_attr(owner: Any, name: Any) -> _Function:
    if isinstance(owner, _Inert) and owner.name in _HOMES_OF_RECONSTRUCT and name == "_reconstruct":
        return _RECONSTRUCT
    raise _RefusedError(f"names {_show(name)} of {_show(owner)}")


_HOMES_OF_RECONSTRUCT = tuple(
    f"numpy.{core}.{module}" for core in ("core", "_core") for module in ("multiarray", "_multiarray_umath")
)
"""Where the versions of numpy keep the function that makes an empty array."""

_RECONSTRUCT = _Function("_reconstruct", partial(_Record, "numpy.ndarray"))

_KNOWN: dict[tuple[str, str], _Inert] = {
    ("collections", "defaultdict"): _Function("collections.defaultdict", lambda factory=None: {}),
    ("numpy", "ndarray"): _Inert("numpy.ndarray"),
    ("numpy", "dtype"): _Function("numpy.dtype", partial(_Record, "numpy.dtype")),
    # Newer versions of dill name it like any other function.
    **{(home, "_reconstruct"): _RECONSTRUCT for home in _HOMES_OF_RECONSTRUCT},
    # Older and newer versions of dill keep their helpers here.
    **{
        (dill, helper.__name__): _Function(helper.__name__, helper)
        for dill in ("dill.dill", "dill._dill")
        for helper in (_load_type, _import_module, _get_attr)
    },
}
"""Every global name that a file may have, and what stands for it."""


def _to_tensor(record: Any, where: str) -> Tensor:
    """Make the tensor of an array: ``state`` is version, shape, dtype, whether Fortran order, and the bytes."""
    if not (isinstance(record, _Record) and record.name == "numpy.ndarray" and len(record.state) == 5):
        raise ValueError(f"{where} is not an array")
    _, shape, dtype, is_fortran, data = record.state
    is_float32 = (
        isinstance(dtype, _Record)
        and dtype.name == "numpy.dtype"
        and dtype.arguments[:1] == ("f4",)
        and dtype.state[1:2] in (("<",), ("=",))
    )
    if not is_float32:
        raise ValueError(f"{where} is not an array of little-endian float32")
    if not (isinstance(shape, tuple) and all(type(size) is int and 0 <= size <= MAX_FILE_BYTES for size in shape)):
        raise ValueError(f"{where} has no proper shape")
    if isinstance(data, str):  # Python 2 wrote bytes as text
        data = data.encode("latin1")
    if not isinstance(data, bytes) or len(data) != 4 * math.prod(shape):
        raise ValueError(f"{where} does not hold the numbers of its shape {shape}")
    if is_fortran:
        shape = shape[::-1]
    tensor = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shape) if data else torch.zeros(shape)
    return tensor.permute(*range(tensor.dim() - 1, -1, -1)) if is_fortran else tensor


def _check_name(name: Any) -> str:
    if not isinstance(name, str) or len(name) > 200:
        raise ValueError("a module or variable is not called by a name")
    return name


# --- conversion ----------------------------------------------------------------------------------------------------

_VARIABLES = {"w_gates": "w", "b_gates": "b"}
"""The LSTM modules of Sonnet call their variables so."""


class _Format(NamedTuple):
    """What is published of a rule."""

    rule: UpdateRule
    shapes: dict[tuple[str, str], tuple[int, ...]]
    convert: Callable[[Arrays], Weights]


def _check_arrays(arrays: Arrays, shapes: Mapping[tuple[str, str], tuple[int, ...]]) -> Arrays:
    """Return the arrays under the names ``w`` and ``b``, if all are there and have their shapes."""
    renamed = {(module, _VARIABLES.get(variable, variable)): array for (module, variable), array in arrays.items()}
    if renamed.keys() != shapes.keys() or len(renamed) != len(arrays):
        found, wanted = (", ".join(sorted("/".join(key) for key in keys)) for keys in (arrays, shapes))
        raise ValueError(f"holds {found[:500] or 'nothing'} instead of {wanted}")
    for key, shape in shapes.items():
        if tuple(renamed[key].shape) != shape:
            raise ValueError(f"{'/'.join(key)} has shape {tuple(renamed[key].shape)} instead of {shape}")
    return renamed


def _convert_lstm(arrays: Arrays, module: str, name: str) -> Weights:
    """Convert columns input, candidate, forget, output to our rows; Sonnet adds 1 to the forget gate when it runs."""
    weight, bias = ([*arrays[module, variable].chunk(4, dim=-1)] for variable in "wb")
    (w_i, w_g, w_f, w_o), (b_i, b_g, b_f, b_o) = weight, bias
    return {
        f"{name}.weight": torch.cat([w_i, w_f, w_g, w_o], dim=1).T,
        f"{name}.bias": torch.cat([b_i, b_f + 1, b_g, b_o]),
    }


def _convert_linear(arrays: Arrays, module: str, name: str) -> Weights:
    return {f"{name}.weight": arrays[module, "w"].T, f"{name}.bias": arrays[module, "b"]}


def _convert_l2o_dm(arrays: Arrays) -> Weights:
    return {
        **_convert_lstm(arrays, "lstm_1", "lstm_0"),
        **_convert_lstm(arrays, "lstm_2", "lstm_1"),
        **_convert_linear(arrays, "linear", "readout"),
    }


def _convert_rnnprop(arrays: Arrays) -> Weights:
    return {**_convert_linear(arrays, "input_projection", "projection"), **_convert_l2o_dm(arrays)}


def _shapes(**modules: tuple[int, int]) -> dict[tuple[str, str], tuple[int, ...]]:
    """Return the shapes of ``w`` and ``b`` of modules, from those of ``w``."""
    return {
        (name, variable): of for name, shape in modules.items() for variable, of in (("w", shape), ("b", shape[1:]))
    }


FORMATS = {
    "l2o-dm": _Format(L2ODM(), _shapes(lstm_1=(22, 80), lstm_2=(40, 80), linear=(20, 1)), _convert_l2o_dm),
    "rnnprop": _Format(
        RNNProp(),
        _shapes(input_projection=(2, 20), lstm_1=(40, 80), lstm_2=(40, 80), linear=(20, 1)),
        _convert_rnnprop,
    ),
}
"""What can be read, by the name of the rule."""


def _make_card(rule: UpdateRule, weights: Weights, metadata: Mapping[str, str]) -> str:
    file = {"File": f"`{metadata['imported_from']}`, SHA-256 `{metadata['sha256']}`"}
    return write_card(
        f"{rule.name}, imported",
        purpose="What it was published for. Whoever passes it on must keep the licence notice of whoever published it.",
        facts={**rule_facts(rule, weights), "Made by": "others, imported from a file", **file},
    )
