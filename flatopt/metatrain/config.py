"""Configuration of a meta-training run: frozen dataclasses, strict JSON, ``key=value`` overrides.

A recipe (see :mod:`flatopt.metatrain.recipes`) is a function that returns a :class:`MetaTrainConfig`.  The resolved
configuration travels with every checkpoint; nothing else decides what a run computes.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ..flatness import (
    EntropySurrogate,
    FlatnessMeasure,
    GradientNorm,
    HutchinsonTrace,
    PerturbationGap,
    SamGap,
    SpectralPenalty,
    SquaredTrace,
    TopEigenvalue,
)
from ..rules import RULES, UpdateRule

T = TypeVar("T")

MEASURES: dict[str, type[FlatnessMeasure]] = {
    "top-eigenvalue": TopEigenvalue,
    "trace": HutchinsonTrace,
    "squared-trace": SquaredTrace,
    "spectral-quadrature": SpectralPenalty,
    "local-entropy": EntropySurrogate,
    "gradient-norm": GradientNorm,
    "sam-gap": SamGap,
    "perturbation-gap": PerturbationGap,
}
"""Every measure of flatness by the name that configurations use."""

MEASURE_DEFAULTS: dict[str, dict[str, Any]] = {"top-eigenvalue": {"tol": 0.0, "num_iterations": 5}}
"""Where meta-training needs other defaults: an early stop looks at values, which a recorded step cannot."""

SCHEDULES = ("always", "first", "last", "every")
EVOLUTION_STRATEGIES = ("persistent-es", "truncated-es")
META_OPTIMIZERS = ("adam", "rmsprop-tf")
TRANSFORMS = ("none", "log")
TEACHERS = ("adam", "rmsprop")


@dataclass(frozen=True, kw_only=True)
class EstimatorConfig:
    """How the meta-gradient is estimated."""

    name: str = "persistent-es"
    """``persistent-es``, ``truncated-es`` or ``truncated-backprop``."""
    truncation_length: int = 20
    """Inner steps per meta-update."""
    std: float = 0.01
    """Standard deviation of the perturbations of the weights (evolution strategies only)."""
    families_per_update: int | None = None
    """Task families that one update runs, in turn; all if ``None`` (evolution strategies only)."""
    second_derivatives: bool = False
    """Differentiate through the inner gradients too (``truncated-backprop`` only)."""

    def __post_init__(self) -> None:
        _require(self.truncation_length >= 1, "estimator.truncation_length must be at least 1", self.truncation_length)
        _require(self.std > 0, "estimator.std must be positive", self.std)
        families = self.families_per_update
        _require(families is None or families >= 1, "estimator.families_per_update must be at least 1", families)


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One family of inner problems and how many of them a meta-update runs."""

    name: str
    """Family, a key of the named tasks of :mod:`flatopt.tasks`."""
    num_tasks: int = 32
    """Inner problems run side by side; an evolution strategy runs each twice, at antithetic weights."""
    min_steps: int = 150
    """Shortest horizon; horizons are log-uniform between both ends."""
    max_steps: int = 1500
    """Longest horizon."""
    unknown_horizon_probability: float = 0.33
    """Fraction of the runs in which the rule is not told the horizon."""
    weight: float = 1.0
    """Weight of the family in the meta-loss."""
    num_train: int | None = None
    """Training examples of every run, at most what there are; the family's own range of sizes if ``None``."""
    random_scaling: float = 0.0
    """Bound ``b`` of random scaling: the parameters are held in units of ``exp(U(-b, b))`` per coordinate; 0 for none.
    Never in validation."""

    def __post_init__(self) -> None:
        key = f"tasks.{self.name}"
        _require(0 <= self.random_scaling < 20, f"{key}.random_scaling must be in [0, 20)", self.random_scaling)
        _require(self.num_tasks >= 1, f"{key}.num_tasks must be at least 1", self.num_tasks)
        num_train = self.num_train
        _require(num_train is None or num_train >= 1, f"{key}.num_train must be at least 1", num_train)
        _require(self.min_steps >= 1, f"{key}.min_steps must be at least 1", self.min_steps)
        _require(self.max_steps >= self.min_steps, f"{key}.max_steps must be at least min_steps", self.max_steps)
        probability = self.unknown_horizon_probability
        _require(0 <= probability <= 1, f"{key}.unknown_horizon_probability must be in [0, 1]", probability)


@dataclass(frozen=True, kw_only=True)
class FlatnessConfig:
    """A measure of flatness as a penalty: which one, how much, and at which steps of a run.

    The penalty is ``coefficient * measure`` at the steps where the schedule is on and 0 at the others.  A measure that
    can be negative counts as 0 there, so that negative curvature is never rewarded, unless ``signed``.

    Example:
        >>> FlatnessConfig(name="trace", options={"num_matvecs": 2}).build_measure()
        HutchinsonTrace(num_matvecs=2)
    """

    name: str | None = None
    """A key of the named measures (``top-eigenvalue``, ``trace``, ...), no penalty if ``None``."""
    coefficient: float = 0.0
    """Weight of the measure."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of the measure that differ from their defaults; JSON values."""
    schedule: str = "always"
    """``always``, the ``first`` or ``last`` part of the horizon, or ``every`` so many steps."""
    fraction: float = 0.5
    """Size of that part, as a fraction of the horizon."""
    every: int = 1
    """On at steps ``every, 2 every, ...``, counted from 1."""
    signed: bool = False
    """Let negative values count.  For a difference of losses whose mean is wanted, such as ``perturbation-gap``."""
    clip: float = 100.0
    """Values above this count as this."""

    def __post_init__(self) -> None:
        key = "flatness"
        valid = ", ".join(SCHEDULES)
        _require(self.schedule in SCHEDULES, f"{key}.schedule must be one of {valid}", self.schedule)
        _require(0 < self.fraction <= 1, f"{key}.fraction must be in (0, 1]", self.fraction)
        _require(self.every >= 1, f"{key}.every must be at least 1", self.every)
        _require(self.coefficient >= 0, f"{key}.coefficient must not be negative", self.coefficient)
        _require(self.clip > 0, f"{key}.clip must be positive", self.clip)
        if self.name is None:
            _require(not self.options, f"{key}.options need a {key}.name", self.options)
        self.build_measure()

    def build_measure(self) -> FlatnessMeasure | None:
        """Return the measure with its options, or ``None``.

        Raises:
            ValueError: for an unknown name or option, naming the valid ones, or a value that does not fit.
        """
        if self.name is None:
            return None
        if self.name not in MEASURES:
            raise ValueError(f"unknown flatness.name {self.name!r}: valid are none, {_names(MEASURES)}")
        options = MEASURE_DEFAULTS.get(self.name, {}) | self.options
        measure: FlatnessMeasure = _convert(options, MEASURES[self.name], "flatness.options")
        if isinstance(measure, TopEigenvalue) and measure.tol > 0:
            raise ValueError(f"flatness.options.tol must be 0: a recorded step has no early stop, not {measure.tol}")
        if isinstance(measure, EntropySurrogate) and measure.subtract_loss:
            raise ValueError("flatness.options.subtract_loss must be false: the difference rewards negative curvature")
        return measure


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What an inner run is judged by, at each of its steps."""

    train_weight: float = 0.0
    """Weight of the loss before the step, on the batch of the training split whose gradient the rule sees."""
    meta_weight: float = 1.0
    """Weight of the loss after the step, on a fresh batch of ``meta_split``."""
    meta_split: str = "meta"
    """Where that batch is from: ``meta``, never trained on, or ``train``, as published."""
    transform: str = "none"
    """What both losses go through: ``none``, or ``log`` for the logarithm of the loss over that at the start of the
    run."""
    base_weight: float = 0.1
    """Weight of every step of the run."""
    final_weight: float = 3.0
    """Additional weight, times ``final_power``-th power of the fraction of the horizon."""
    final_power: float = 4.0
    """Exponent that moves the weight to the end of the run."""
    flatness: FlatnessConfig = field(default_factory=FlatnessConfig)
    """Penalty on the meta-objective: the *rule* learns to find flat minima."""
    inner_flatness: FlatnessConfig = field(default_factory=FlatnessConfig)
    """Penalty on the inner loss whose gradient the rule sees: the *optimizee* is regularised, as a baseline."""
    clip: float = 6.0
    """Losses above this count as this."""

    def __post_init__(self) -> None:
        splits = ("meta", "train")
        _require(self.meta_split in splits, "objective.meta_split must be one of meta, train", self.meta_split)
        _require(
            self.transform in TRANSFORMS, f"objective.transform must be one of {', '.join(TRANSFORMS)}", self.transform
        )
        _require(self.clip > 0, "objective.clip must be positive", self.clip)


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Ever longer runs: a stage ends when validation no longer improves; see :mod:`flatopt.metatrain.curriculum`."""

    stages: tuple[int, ...] = ()
    """Steps of the training runs of each stage, in place of the horizons of the tasks; no curriculum if empty.
    Validation runs have the length of the next stage, in the last one that of the stage itself."""
    min_num_eval: int = 3
    """Validations that a stage has at least."""

    def __post_init__(self) -> None:
        key, stages = "curriculum.stages", self.stages
        _require(all(stage >= 1 for stage in stages), f"{key} must be at least 1", stages)
        _require(list(stages) == sorted(set(stages)), f"{key} must increase", stages)
        _require(self.min_num_eval >= 1, "curriculum.min_num_eval must be at least 1", self.min_num_eval)


@dataclass(frozen=True, kw_only=True)
class ImitationConfig:
    """Updates in which the rule imitates known optimizers; see :mod:`flatopt.metatrain.imitation`."""

    probabilities: tuple[float, ...] = ()
    """Share of such updates in each stage of the curriculum, the last repeated; none if empty."""
    teachers: tuple[str, ...] = ("adam",)
    """``adam`` or ``rmsprop`` (Adam without its first moment); one is drawn for each imitation update."""
    lr: float = 0.01
    """Learning rate of the teachers."""
    coefficient: float = 1.0
    """Weight of the imitation loss; ``1 / lr^2`` measures it in units of the teacher's step."""

    def __post_init__(self) -> None:
        for probability in self.probabilities:
            _require(0 <= probability <= 1, "imitation.probabilities must be in [0, 1]", probability)
        for teacher in self.teachers:
            _require(teacher in TEACHERS, f"imitation.teachers must be of {', '.join(TEACHERS)}", teacher)
        _require(len(self.teachers) > 0, "imitation.teachers must name at least one", self.teachers)
        _require(self.lr > 0, "imitation.lr must be positive", self.lr)
        _require(self.coefficient > 0, "imitation.coefficient must be positive", self.coefficient)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Held-out runs, the same at every validation; see :mod:`flatopt.metatrain.validation`."""

    num_tasks: int = 4
    """Runs of each family."""
    num_steps: int | None = None
    """Their steps where there is no curriculum; the longest horizon of each family if ``None``."""
    seed: int = 1_000
    """Seed of their problems and batches."""
    patience: int | None = None
    """Without a curriculum, end the run after so many validations without improvement; never if ``None``."""

    def __post_init__(self) -> None:
        _require(self.num_tasks >= 1, "validation.num_tasks must be at least 1", self.num_tasks)
        steps, patience = self.num_steps, self.patience
        _require(steps is None or steps >= 1, "validation.num_steps must be at least 1 or none", steps)
        _require(patience is None or patience >= 1, "validation.patience must be at least 1 or none", patience)


@dataclass(frozen=True, kw_only=True)
class MetaTrainConfig:
    """Everything that decides what a meta-training run computes.

    Example:
        >>> config = MetaTrainConfig(recipe="mine", rule="adam", tasks=(TaskConfig(name="mlp"),), num_updates=100)
        >>> config.override(["tasks.mlp.num_tasks=8", "estimator.std=0.02"]).tasks[0].num_tasks
        8
        >>> MetaTrainConfig.from_json(config.to_json()) == config
        True
    """

    recipe: str
    """Name of the recipe the configuration comes from."""
    rule: str
    """Name of the rule, a key of :data:`flatopt.rules.RULES`."""
    rule_options: dict[str, Any] = field(default_factory=dict)
    """Hyper-parameters of the rule that differ from its defaults; JSON values."""
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    tasks: tuple[TaskConfig, ...]
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    imitation: ImitationConfig = field(default_factory=ImitationConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    num_updates: int
    """Meta-updates of the whole run, unless validation ends it earlier."""
    meta_optimizer: str = "adam"
    """``adam``, or ``rmsprop-tf`` for the RMSProp of TensorFlow 1."""
    meta_lr: float = 4e-4
    """Peak learning rate of the meta-optimizer."""
    meta_lr_final_fraction: float = 0.0
    """What is left of it at the end of the cosine."""
    schedule_updates: int | None = None
    """Length of the cosine, ``num_updates`` if ``None``; a run may end before its cosine does."""
    warmup_updates: int = 0
    """Meta-updates of linear warm-up."""
    max_grad_norm: float | None = 1.0
    """The meta-gradient is scaled down to this norm."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, which is then what is exported; 0 for none."""
    seed: int = 0
    checkpoint_every: int = 500
    """Meta-updates between checkpoints; 0 for none but the first, the last and those by time."""
    checkpoint_every_seconds: float = 300.0
    """Seconds after which a checkpoint is due in any case."""
    log_every: int = 10
    """Meta-updates between lines of ``metrics.jsonl``."""
    validate_every: int = 0
    """Meta-updates between validations; 0 for none.  With validation, what is exported are the best weights by it."""
    compile: bool = False
    """Compile the recorded inner step with ``torch.compile``: takes minutes per family on a CPU
    (evolution strategies only)."""
    tensorboard: bool = False
    """Also write TensorBoard events."""

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"unknown rule {self.rule!r}: valid are {_names(RULES)}")
        self.build_rule()
        _require(len(self.tasks) > 0, "tasks must name at least one family", self.tasks)
        families = self.estimator.families_per_update
        bound = "estimator.families_per_update must not exceed the number of tasks"
        _require(families is None or families <= len(self.tasks), bound, families)
        names = [task.name for task in self.tasks]
        _require(len(set(names)) == len(names), "tasks must have distinct names", names)
        for key in ("num_updates", "log_every"):
            _require(getattr(self, key) >= 1, f"{key} must be at least 1", getattr(self, key))
        for key in ("warmup_updates", "checkpoint_every", "validate_every"):
            _require(getattr(self, key) >= 0, f"{key} must not be negative", getattr(self, key))
        _require(0 < self.meta_lr < math.inf, "meta_lr must be a positive number", self.meta_lr)
        length = self.schedule_updates
        _require(length is None or length >= 1, "schedule_updates must be at least 1 or none", length)
        limit = self.max_grad_norm
        _require(limit is None or 0 < limit < math.inf, "max_grad_norm must be a positive number or none", limit)
        _require(0 <= self.ema_decay < 1, "ema_decay must be in [0, 1)", self.ema_decay)
        valid = ", ".join(META_OPTIMIZERS)
        _require(self.meta_optimizer in META_OPTIMIZERS, f"meta_optimizer must be one of {valid}", self.meta_optimizer)
        _require(
            not self.curriculum.stages or self.validate_every > 0,
            "validate_every must be at least 1 with a curriculum",
            self.validate_every,
        )
        if self.estimator.name in EVOLUTION_STRATEGIES and self.objective.flatness.name == "local-entropy":
            raise ValueError(
                "objective.flatness.name 'local-entropy' has a gradient but no meaningful value, and "
                f"{self.estimator.name} only evaluates: use 'perturbation-gap', or estimator.name=truncated-backprop"
            )

    def build_rule(self) -> UpdateRule:
        """Return the rule with its options; ``ValueError`` names the valid ones."""
        return _convert(self.rule_options, RULES[self.rule], "rule_options")

    def to_json(self) -> str:
        """Return the configuration as JSON text, every field included."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> MetaTrainConfig:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: for a missing or an unknown key or a value of another type; the message names it.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"configuration is not JSON: {error}") from None
        return _convert(data, cls, "", complete=True)

    def override(self, assignments: Sequence[str]) -> MetaTrainConfig:
        """Return a copy with some values replaced.

        Args:
            assignments: ``key=value``; keys of nested values are dotted, a task family goes by its name:
                ``num_updates=100``, ``estimator.std=0.02``, ``tasks.mlp.num_tasks=8``, ``rule_options.hidden=16``.

        Raises:
            ValueError: for an unknown key, naming the valid ones, or a value of another type, naming the type.
        """
        data = asdict(self)
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals:
                raise ValueError(f"{assignment!r} is not of the form key=value")
            _assign(data, type(self), key.split("."), text, key)
        return _convert(data, type(self), "")


def _assign(data: Any, hint: Any, path: list[str], text: str, key: str) -> None:
    """Parse ``text`` by the type found at ``path`` and put it there."""
    head, rest = path[0], path[1:]
    inner: Any
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        valid = [one.name for one in fields(hint)]
        if head not in valid:
            raise ValueError(f"unknown key {key!r}: valid are {_names(valid, key, path)}")
        inner = hints[head]
    elif get_origin(hint) is tuple and is_dataclass(get_args(hint)[0]):
        data = {entry["name"]: entry for entry in data}
        if head not in data or not rest:
            raise ValueError(f"unknown key {key!r}: valid are {_names(data, key, path, suffix='.KEY')}")
        inner = get_args(hint)[0]
    elif get_origin(hint) is dict:
        inner = Any
    else:
        raise ValueError(f"unknown key {key!r}: {key.removesuffix('.' + '.'.join(path))} has no parts")
    if rest:
        _assign(data[head] if head in data else {}, inner, rest, text, key)
    else:
        data[head] = _parse(text, inner, key)


def _parse(text: str, hint: Any, key: str) -> Any:
    """Read a value from the command line: plain text for ``str``, else JSON (with Python's ``None`` and ``True``)."""
    options = _options(hint)
    if str in options and not (type(None) in options and text.lower() in ("none", "null")):
        return text
    try:
        value = json.loads({"none": "null", "true": "true", "false": "false"}.get(text.lower(), text))
    except json.JSONDecodeError:
        if hint is Any:
            return text
        try:
            value = float(text)  # 1e-3 is JSON, .5 and 1_000 are not
        except ValueError:
            raise ValueError(f"{key} must be {_describe(hint)}, not {text!r}") from None
    _convert(value, hint, key)
    return value


def _convert(value: Any, hint: Any, key: str, *, complete: bool = False) -> Any:
    """Build a value of type ``hint`` from parsed JSON; with ``complete``, every field of a dataclass must be there."""
    if hint is Any:
        return value
    options = _options(hint)
    if len(options) > 1:
        if value is None and type(None) in options:
            return None
        return _convert(value, next(option for option in options if option is not type(None)), key, complete=complete)
    if is_dataclass(hint) and isinstance(value, dict):
        return _build(value, hint, key, complete=complete)
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin is tuple and isinstance(value, list | tuple):
        if args[-1] is Ellipsis:
            args = (args[0],) * len(value)
        if len(args) == len(value):
            return tuple(
                _convert(one, arg, f"{key}[{index}]", complete=complete)
                for index, (one, arg) in enumerate(zip(value, args, strict=True))
            )
    elif origin is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif origin in (int, bool, str, dict) and type(value) is origin:
        return value
    raise ValueError(f"{key or 'configuration'} must be {_describe(hint)}, not {value!r}")


def _build(data: dict[str, Any], cls: Any, key: str, *, complete: bool) -> Any:
    """Build a dataclass from a dict, strictly."""
    hints = get_type_hints(cls)
    prefix = f"{key}." if key else ""
    known = {one.name: one for one in fields(cls)}
    for name in data:
        if name not in known:
            raise ValueError(f"unknown key {prefix + name!r}: valid are {', '.join(prefix + one for one in known)}")
    for name, one in known.items():
        # Where the default is nothing, a key that is missing is one that the version which wrote the file did not have.
        required = one.default is not None and (complete or one.default is one.default_factory is MISSING)
        if required and name not in data:
            raise ValueError(f"missing key {prefix + name!r}")
    return cls(**{name: _convert(value, hints[name], prefix + name, complete=complete) for name, value in data.items()})


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, or the type alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _describe(hint: Any) -> str:
    """Name a type for people."""
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    options = [get_origin(option) or option for option in _options(hint)]
    return " or ".join(names.get(option, "a list" if option is tuple else "an object") for option in options)


def _names(valid: Any, key: str = "", path: Sequence[str] = (), suffix: str = "") -> str:
    """List valid names, with the part of ``key`` in front of ``path``."""
    prefix = key.removesuffix(".".join(path)) if path else ""
    return ", ".join(f"{prefix}{name}{suffix}" for name in valid) or "none"


def _require(condition: bool, message: str, value: object) -> None:
    """Raise ``ValueError`` with the bound and the value."""
    if not condition:
        raise ValueError(f"{message}, not {value!r}")
