"""Run PyTorch's own optimizer tests on FlatOpt.

Use: ``TEST_OPTIM_PY=.../test/test_optim.py python tests/run_torch_suite.py``

That file is not part of the torch wheel; the one of torch 2.6 works with later versions.  Its tests are made from
``optim_db`` while it is imported, so FlatOpt has to be put there first, and the sister modules that it imports but
that have nothing to do with FlatOpt have to be stood in for.
"""

from __future__ import annotations

import functools
import os
import sys
import types
import unittest
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.testing._internal import common_optimizers
from torch.testing._internal.common_optimizers import ErrorOptimizerInput, OptimizerInfo, OptimizerInput
from torch.testing._internal.opinfo.core import DecorateInfo

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from helpers import learned  # noqa: E402

from flatopt import FlatOpt, LearnedRule, list_pretrained, load_pretrained  # noqa: E402
from flatopt.rules import Adam  # noqa: E402


def optim_inputs(device: Any, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    """Return fresh constructor arguments, in every combination that PyTorch's suite asks optimizers for."""
    adam, toy = learned(Adam(lr=0.01)), learned("toy-mixer")
    rows: list[tuple[str, dict[str, Any]]] = [
        ("Adam", {"pretrained": adam}),
        ("learned", {"pretrained": toy}),
        ("lr", {"pretrained": toy, "lr": 0.5}),
        ("tensor lr", {"pretrained": toy, "lr": torch.tensor(0.5)}),
        ("weight_decay", {"pretrained": toy, "weight_decay": 0.1}),
        ("maximize", {"pretrained": toy, "maximize": True}),
        ("maximize, weight_decay", {"pretrained": adam, "maximize": True, "weight_decay": 0.1}),
        ("num_steps", {"pretrained": toy, "num_steps": 50}),
    ]
    rows += [(name, {"pretrained": name}) for name in list_pretrained()]
    return [OptimizerInput(params=None, kwargs=kwargs, desc=name) for name, kwargs in rows]


def error_inputs(device: Any, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    """Return arguments that must be refused: those common to all optimizers, and our own."""
    pretrained = learned(Adam())
    # FlatOpt takes its weights from a keyword; without it the common cases would need shipped weights.
    common = common_optimizers.get_error_inputs_for_all_optims(device, dtype)
    for case in common:
        case.optimizer_error_input.kwargs["pretrained"] = pretrained
    rows = [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
        ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
        ({"num_steps": 0}, "Invalid num_steps value: 0"),
    ]
    own = [
        ErrorOptimizerInput(
            OptimizerInput(params=None, kwargs=kwargs | {"pretrained": pretrained}, desc=message),
            error_type=ValueError,
            error_regex=message,
        )
        for kwargs, message in rows
    ]
    return common + own


def only(chosen: Callable[[LearnedRule], bool]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test with some rules only."""

    def inputs(device: Any, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
        cases = []
        for case in optim_inputs(device, dtype):
            pretrained = case.kwargs["pretrained"]
            if chosen(pretrained if isinstance(pretrained, LearnedRule) else load_pretrained(pretrained)):
                cases.append(case)
        return cases

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def wrapper(*args: Any, **kwargs: Any) -> None:
            with mock.patch.object(INFO, "optim_inputs_func", inputs):
                test(*args, **kwargs)

        return wrapper

    return decorate


def is_adam(learned: LearnedRule) -> bool:
    return isinstance(learned.rule, Adam)


def has_no_matrices(learned: LearnedRule) -> bool:
    return learned.rule.strip_rows is None


INFO = OptimizerInfo(
    FlatOpt,
    optim_inputs_func=optim_inputs,
    optim_error_inputs_func=error_inputs,
    supported_impls=(),
    not_og_supported_flags=("maximize", "num_steps", "momentum", "weight_decay"),
    supports_complex=True,
    decorators=(
        # Takes one complex tensor for two real ones, which a rule that looks at whole tensors must tell apart.
        DecorateInfo(only(is_adam), "TestOptimRenewed", "test_complex_2d"),
        # Takes a complex vector for a real matrix [n, 2], which a rule that looks at matrices must tell apart.
        DecorateInfo(only(has_no_matrices), "TestOptimRenewed", "test_complex"),
    ),
)


def main() -> int:
    """Run the file; return the number of failures and errors."""
    path = Path(os.environ["TEST_OPTIM_PY"])
    common_optimizers.optim_db[:] = [INFO]
    for name, attribute in {
        "optim": "",
        "optim.test_lrscheduler": "TestLRScheduler",
        "optim.test_optim": "TestDifferentiableOptimizer",
        "optim.test_swa_utils": "TestSWAUtils",
    }.items():
        stand_in = types.ModuleType(name)
        if attribute:
            setattr(stand_in, attribute, type(attribute, (), {}))
        sys.modules[name] = stand_in
    module = types.ModuleType("torch_test_optim")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    suite = unittest.defaultTestLoader.loadTestsFromModule(module)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = unittest.TextTestRunner(verbosity=1).run(suite)
    for test, reason in result.skipped:
        print("skipped", test.id().split(".")[-1], "--", reason.splitlines()[0])
    bad = len(result.failures) + len(result.errors)
    print(f"ran {result.testsRun}, failed or errored {bad}, skipped {len(result.skipped)}")
    return bad


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(min(main(), 100))
