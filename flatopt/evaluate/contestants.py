"""The optimizers that are compared: tuned baselines, and the learned one with nothing tuned.

A family is an optimizer with a grid of settings: learning rates, with a cosine schedule or without, and options.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from flatopt.optimizer import FlatOpt
from flatopt.pretrained import LearnedRule, load_pretrained, weights_sha256

from ._code import code_hash, describe
from .baselines import SAM, MuonWithAdamW

STEP = ("flatopt.optimizer", "flatopt._applied", "flatopt._averages", "flatopt.rules")
"""Where most of the code stands that computes a step of FlatOpt.

Checks, warnings and files are not here, nor what makes states and finds shards and the number of a step (``_state``,
``_slots``, ``_dtensor``): after a change of results there, the cache has to go.
"""


class Setting(NamedTuple):
    """What is tuned of a family."""

    lr: float
    cosine: bool = False
    """Whether a cosine takes the learning rate to zero over the run."""
    options: tuple[tuple[str, float], ...] = ()
    """Further arguments by name."""

    def __str__(self) -> str:
        words = [f"{self.lr:g}", *(["cosine"] if self.cosine else []), *(f"{k} {v:g}" for k, v in self.options)]
        return ", ".join(words)


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """An optimizer in a comparison.

    Args:
        name: name in tables; no part of what a run is known by in the cache.
        build: makes the optimizer of parameters, learning rate, length of the run, seed and options.
        lrs: learning rates to choose from, per task, on the ``meta`` split; one value when nothing is tuned.
        cosines: schedules to choose from: with a cosine, without.
        options: options to choose from.
        averages: whether what counts is the averages of the parameters, which the optimizer's ``eval()`` shows.
        extends: whether the learning rates go on beyond an edge where the best one stands.
        learned: weights of a learned rule; they keep cached runs apart.
        horizon_known: whether a learned rule is told the length of the run.
    """

    name: str
    build: Callable[..., Optimizer]
    lrs: tuple[float, ...]
    cosines: tuple[bool, ...] = (False,)
    options: tuple[tuple[tuple[str, float], ...], ...] = ((),)
    averages: bool = False
    extends: bool = False
    learned: LearnedRule | None = None
    horizon_known: bool = True

    def settings(self) -> list[Setting]:
        """Return the grid."""
        return [Setting(lr, cosine, some) for some in self.options for cosine in self.cosines for lr in self.lrs]

    def identity(self) -> dict[str, Any]:
        """Return everything about the optimizer that decides the result of a run, but for its setting."""
        if self.learned is None:
            return {"build": describe(self.build), "code": code_hash(self.build), "averages": self.averages}
        return {
            "horizon_known": self.horizon_known,
            "averages": self.averages,
            "rule": repr(self.learned.rule),
            "weights": weights_sha256(self.learned.weights),
            "code": code_hash(type(self.learned.rule), room="flatopt.rules"),
            "step": code_hash(FlatOpt, room=STEP),
        }


def neighbour(setting: Setting, *, up: bool) -> Setting:
    """Return a setting with the next learning rate of the sequence 1, 3, 10, 30, ...

    Example:
        >>> neighbour(Setting(0.03), up=True), neighbour(Setting(0.001), up=False)
        (Setting(lr=0.1, cosine=False, options=()), Setting(lr=0.0003, cosine=False, options=()))
    """
    place = round(2 * math.log10(setting.lr)) + (1 if up else -1)
    return setting._replace(lr=float(f"{'3' if place % 2 else '1'}e{place // 2}"))


def plain(
    params: Iterable[Tensor],
    lr: float,
    num_steps: int,
    seed: int,
    *,
    optimizer: Callable[..., Optimizer],
    **options: float,
) -> Optimizer:
    """Build an optimizer that is told neither the length of the run nor the seed."""
    return optimizer(params, lr, **options)


def schedule_free(params: Iterable[Tensor], lr: float, num_steps: int, seed: int) -> Optimizer:
    """Build Schedule-Free AdamW with a warm-up over a twentieth of the run."""
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(params, lr, warmup_steps=num_steps // 20)


def prodigy(params: Iterable[Tensor], lr: float, num_steps: int, seed: int) -> Optimizer:
    """Build Prodigy, whose learning rate multiplies the one that it finds."""
    from prodigyopt import Prodigy

    return Prodigy(params, lr)


_ADAM_LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_LARGER_LRS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_SGD_LRS = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)
_DECAYS = tuple((("weight_decay", value),) for value in (0.01, 0.1, 1.0))
_BOTH = (True, False)

REFERENCE = "Adam + cosine"
"""The family that all others are compared with."""

UNKNOWN = ", length unknown"
NO_AVERAGE = ", no eval()"
"""Marks the row that shows the last parameters where the averages are better."""


def baselines() -> list[Contestant]:
    """Return the tuned families, the reference first; Muon where this torch has it.

    The reference is the part of Adam's grid with a cosine, so its runs are Adam's.
    """
    family = partial(Contestant, extends=True)
    adam, adamw, muon, sam = (partial(plain, optimizer=one) for one in (Adam, AdamW, MuonWithAdamW, SAM))
    sgd = partial(plain, optimizer=SGD, momentum=0.9)
    found = [
        family(name=REFERENCE, build=adam, lrs=_ADAM_LRS, cosines=(True,)),
        family(name="Adam", build=adam, lrs=_ADAM_LRS, cosines=_BOTH),
        family(name="Schedule-Free AdamW", build=schedule_free, lrs=_LARGER_LRS, averages=True),
        family(name="SGD momentum", build=sgd, lrs=_SGD_LRS, cosines=_BOTH),
        family(name="Prodigy", build=prodigy, lrs=(0.1, 0.3, 1.0, 3.0, 10.0), cosines=_BOTH),
        family(name="Muon", build=muon, lrs=_LARGER_LRS, cosines=_BOTH),
        family(name="SAM", build=sam, lrs=_SGD_LRS, cosines=_BOTH),
        family(name="AdamW", build=adamw, lrs=_ADAM_LRS, cosines=_BOTH, options=_DECAYS),
    ]
    return [one for one in found if one.name != "Muon" or hasattr(torch.optim, "Muon")]


def learned_contestants(pretrained: str) -> list[Contestant]:
    """Return FlatOpt with the length of the run known, and unknown, and the same with the rule not trained.

    The last one is FlatOpt with the length unknown, where nobody asks it for its averages.  An untrained rule is its
    hand-designed core: what the training of the weights is worth.
    """
    learned = load_pretrained(pretrained)
    found = [
        learned_contestant(name + ("" if horizon_known else UNKNOWN), rule, horizon_known=horizon_known)
        for name, rule in (("FlatOpt", learned), ("untrained core", untrained(learned)))
        for horizon_known in (True, False)
    ]
    last = [replace(found[1], name=found[1].name + NO_AVERAGE, averages=False)] if found[1].averages else []
    return [*found, *last]


def default_name() -> str:
    """Return the name of the weights that ``FlatOpt(params)`` has."""
    return str(inspect.signature(FlatOpt).parameters["pretrained"].default)


def untrained(learned: LearnedRule) -> LearnedRule:
    """Return the same rule with the weights that meta-training starts from."""
    return LearnedRule(learned.rule, learned.rule.init_weights(torch.Generator().manual_seed(0)))


def adam_core(learned: LearnedRule) -> LearnedRule | None:
    """Return the untrained rule with Adam's direction for matrices too, where the rule can do without strips."""
    if "strip_size" not in {one.name for one in fields(learned.rule)}:
        return None
    return untrained(LearnedRule(replace(learned.rule, strip_size=0), learned.weights))  # type: ignore[call-arg]


def learned_contestant(name: str, learned: LearnedRule, *, horizon_known: bool) -> Contestant:
    """Return FlatOpt with some weights as a contestant."""
    return Contestant(
        name=name,
        build=partial(flatopt, learned=learned, horizon_known=horizon_known),
        lrs=(1.0,),
        averages=learned.rule.average is not None and not horizon_known,
        learned=learned,
        horizon_known=horizon_known,
    )


def flatopt(
    params: Iterable[Tensor], lr: float, num_steps: int, seed: int, *, learned: LearnedRule, horizon_known: bool
) -> Optimizer:
    """Build FlatOpt."""
    return FlatOpt(params, lr, pretrained=learned, num_steps=num_steps if horizon_known else None, seed=seed)
