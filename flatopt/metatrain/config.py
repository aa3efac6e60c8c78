"""Configuration of a meta-training run: frozen dataclasses, strict JSON, ``key=value`` overrides.

A recipe (see :mod:`flatopt.metatrain.recipes`) is a function that returns a :class:`MetaTrainConfig`.  The resolved
configuration travels with every checkpoint; nothing else decides what a run computes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal

from .._dataclass_json import above, assign, at_least, at_most, below, check, parse_json, read
from ..flatness import MEASURES, FlatnessMeasure
from ..rules import RULES, UpdateRule

EVOLUTION_STRATEGIES = ("persistent-es", "truncated-es")

Count = Annotated[int, at_least(1)]
NotNegative = Annotated[int, at_least(0)]
Positive = Annotated[float, above(0)]
Seed = Annotated[int, at_least(0), below(2**63)]
Probability = Annotated[float, at_least(0), at_most(1)]


@dataclass(frozen=True, kw_only=True)
class EstimatorConfig:
    """How the meta-gradient is estimated."""

    name: Literal["persistent-es", "truncated-es", "truncated-backprop"] = "persistent-es"
    truncation_length: Count = 20
    """Inner steps per meta-update."""
    std: Positive = 0.01
    """Standard deviation of the perturbations of the weights (evolution strategies only)."""
    families_per_update: Count | None = None
    """Task families that one update runs, in turn; all if ``None`` (evolution strategies only)."""
    only: tuple[str, ...] = ()
    """Patterns of the names of weights that are perturbed, as in a shell; the others stay as they begin; all if empty
    (evolution strategies only)."""
    second_derivatives: bool = False
    """Differentiate through the inner gradients too (``truncated-backprop`` only)."""

    def __post_init__(self) -> None:
        check(self)
        perturbs = self.name in EVOLUTION_STRATEGIES
        unused = ("second_derivatives",) if perturbs else ("std", "families_per_update", "only")
        defaults = {one.name: one.default for one in fields(self) if one.name in unused}
        if any(getattr(self, name) != value for name, value in defaults.items()):
            kept = " ".join(f"{name}={json.dumps(value)}" for name, value in defaults.items())
            raise ValueError(f"{self.name} has no use for {', '.join(unused)}: leave {kept}")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One family of inner problems and how many of them a meta-update runs."""

    name: str
    """Family, a key of :data:`flatopt.metatrain.families.FAMILIES`."""
    num_tasks: Count = 32
    """Inner problems run side by side; an evolution strategy runs each twice, at antithetic weights."""
    min_steps: Count = 150
    """Shortest horizon; horizons are log-uniform between both ends, rounded to truncations, of which there is one at
    least."""
    max_steps: Count = 1500
    """Longest horizon."""
    truncation_length: Count | None = None
    """Inner steps per meta-update of this family, ``estimator.truncation_length`` if ``None``."""
    unknown_horizon_probability: Probability = 0.33
    """Fraction of the runs in which the rule is not told the horizon."""
    weight: Positive = 1.0
    """Weight of the family in the meta-loss."""
    num_train: Count | None = None
    """Training examples of every run, at most what there are; the family's own range of sizes if ``None``."""
    random_scaling: Annotated[float, at_least(0), below(20)] = 0.0
    """Bound ``b`` of random scaling: the parameters are held in units of ``exp(U(-b, b))`` per coordinate; 0 for none.
    Never in validation."""

    def __post_init__(self) -> None:
        check(self)
        if self.max_steps < self.min_steps:
            raise ValueError(f"max_steps must be at least min_steps, {self.min_steps}, not {self.max_steps}")


@dataclass(frozen=True, kw_only=True)
class FlatnessConfig:
    """A measure of flatness as a penalty: which one, how much, and at which steps of a run.

    The penalty is ``coefficient * measure`` at the steps where the schedule is on and 0 at the others.  A value below
    0 counts as 0 there, so that negative curvature is never rewarded, unless ``signed``.

    Example:
        >>> FlatnessConfig(name="trace", options={"num_matvecs": 2}).build_measure()
        HutchinsonTrace(num_matvecs=2)
    """

    name: str | None = None
    """A key of the named measures (``top-eigenvalue``, ``trace``, ...), no penalty if ``None``."""
    coefficient: Annotated[float, at_least(0)] = 0.0
    """Weight of the measure."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of the measure that differ from their defaults; JSON values."""
    schedule: Literal["always", "first", "last", "every"] = "always"
    """``always``, the ``first`` or ``last`` part of the horizon, or ``every`` so many steps."""
    fraction: Annotated[float, above(0), at_most(1)] = 0.5
    """Size of that part, as a fraction of the horizon."""
    every: Count = 1
    """On at steps ``every, 2 every, ...``, counted from 1."""
    signed: bool = False
    """Let negative values count.  For a difference of losses whose mean is wanted, such as ``perturbation-gap``."""
    clip: Positive = 100.0
    """Values above this count as this."""

    def __post_init__(self) -> None:
        check(self)
        if self.name is None and self.options:
            raise ValueError(f"options need a name of a measure, not {self.options!r} alone")
        self.build_measure()

    def build_measure(self) -> FlatnessMeasure | None:
        """Return the measure with its options, or ``None``.

        Raises:
            ValueError: for an unknown name or option, naming the valid ones, or a value that does not fit.
        """
        if self.name is None:
            return None
        if self.name not in MEASURES:
            raise ValueError(f"unknown name {self.name!r} of a measure: valid are none, {', '.join(MEASURES)}")
        kind = MEASURES[self.name]
        measure: FlatnessMeasure = read({**kind.as_penalty, **self.options}, kind, "options")
        for key, value in kind.as_penalty.items():
            if getattr(measure, key) != value:
                raise ValueError(f"options.{key} must be {json.dumps(value)} in a penalty, not {self.options[key]!r}")
        return measure


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What an inner run is judged by, at each of its steps."""

    train_weight: float = 0.0
    """Weight of the loss before the step, on the batch of the training split whose gradient the rule sees."""
    meta_weight: float = 1.0
    """Weight of the loss after the step, on a fresh batch of ``meta_split``."""
    error_weight: float | None = None
    """Weight of the error after the step on that batch, as it is: the fraction of wrong classes, or mean square."""
    meta_split: Literal["meta", "train"] = "meta"
    """Where that batch is from: ``meta``, never trained on, or ``train``, as published."""
    transform: Literal["none", "log"] = "none"
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
    clip: Positive = 6.0
    """Losses above this count as this."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Ever longer runs: a stage ends when validation no longer improves; see :mod:`flatopt.metatrain.curriculum`."""

    stages: tuple[Count, ...] = ()
    """Steps of the training runs of each stage, multiples of the truncation length of every family, in place of the
    horizons of the tasks; no curriculum if empty.  Validation runs have the length of the next stage, in the last one
    that of the stage itself."""
    min_num_eval: Count = 3
    """Validations that a stage has at least."""

    def __post_init__(self) -> None:
        check(self)
        if list(self.stages) != sorted(set(self.stages)):
            raise ValueError(f"stages must increase, not {self.stages}")


@dataclass(frozen=True, kw_only=True)
class ImitationConfig:
    """Updates in which the rule imitates known optimizers; see :mod:`flatopt.metatrain.estimators.imitation`."""

    probabilities: tuple[Probability, ...] = ()
    """Share of such updates in each stage of the curriculum, the last repeated; none if empty."""
    teachers: tuple[Literal["adam", "rmsprop"], ...] = ("adam",)
    """``adam`` or ``rmsprop`` (Adam without its first moment); one is drawn for each imitation update."""
    lr: Positive = 0.01
    """Learning rate of the teachers."""
    coefficient: Positive = 1.0
    """Weight of the imitation loss; ``1 / lr^2`` measures it in units of the teacher's step."""

    def __post_init__(self) -> None:
        check(self)
        if not self.teachers:
            raise ValueError("teachers must name at least one")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Held-out runs, the same at every validation; see :mod:`flatopt.metatrain.validation`."""

    num_tasks: Count = 4
    """Runs of each family."""
    num_steps: Count | None = None
    """Their steps, rounded to truncations, where there is no curriculum; the longest horizon of each family if
    ``None``."""
    seed: Seed = 1_000
    """Seed of their problems and batches."""
    patience: Count | None = None
    """Without a curriculum, end the run after so many validations without improvement; never if ``None``."""
    relative: bool | None = None
    """Take the logarithm of the loss over that of the rule's initial weights, with horizons told and not told."""
    num_lengths: Count | None = None
    """Lengths of the runs of each family, log-uniform from its shortest to its longest horizon, where neither
    ``num_steps`` nor a curriculum gives one; the longest alone if ``None``."""
    compile: bool | None = None
    """Compile the steps of validation where those of training are."""

    def __post_init__(self) -> None:
        check(self)


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
    num_updates: Count
    """Meta-updates of the whole run, unless validation ends it earlier."""
    meta_optimizer: Literal["adam"] = "adam"  # which the training.json of every set says
    meta_lr: Positive = 4e-4
    """Peak learning rate of the meta-optimizer."""
    meta_lr_final_fraction: Probability = 0.0
    """What is left of it at the end of the cosine."""
    schedule_updates: Count | None = None
    """Length of the cosine, ``num_updates`` if ``None``; a run may end before its cosine does."""
    warmup_updates: NotNegative = 0
    """Meta-updates of linear warm-up."""
    max_grad_norm: Positive | None = 1.0
    """The meta-gradient is scaled down to this norm."""
    ema_decay: Annotated[float, at_least(0), below(1)] = 0.0
    """Decay of an exponential moving average of the weights, which is then what is exported; 0 for none."""
    seed: Seed = 0
    checkpoint_every: NotNegative = 500
    """Meta-updates between checkpoints; 0 for none but the first, the last and those by time."""
    checkpoint_every_seconds: Annotated[float, at_least(0)] = 300.0
    """Seconds after which a checkpoint is due in any case."""
    log_every: Count = 10
    """Meta-updates between lines of ``metrics.jsonl``."""
    validate_every: NotNegative = 0
    """Meta-updates between validations; 0 for none.  With validation, what is exported are the best weights by it."""
    compile: bool = False
    """Compile the recorded inner step with ``torch.compile``: takes minutes per family on a CPU
    (evolution strategies, and ``validation.compile``)."""
    tensorboard: bool = False
    """Also write TensorBoard events."""

    def __post_init__(self) -> None:
        check(self)
        if self.num_updates >= 2**31:
            raise ValueError(f"num_updates must be below {2**31}, not {self.num_updates}")
        if self.rule not in RULES:
            raise ValueError(f"unknown rule {self.rule!r}: valid are {', '.join(RULES)}")
        self.build_rule()
        if not self.tasks:
            raise ValueError("tasks must name at least one family")
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"tasks must have distinct names, not {names}")
        families = self.estimator.families_per_update
        if families is not None and families > len(names):
            raise ValueError(f"estimator.families_per_update must be at most the number of tasks, not {families}")
        if self.curriculum.stages:
            self._check_curriculum()
        compiles = self.estimator.name in EVOLUTION_STRATEGIES or (self.validate_every and self.validation.compile)
        if self.compile and not compiles:
            raise ValueError(f"{self.estimator.name} compiles nothing but validations: set validation.compile too")
        measure = self.objective.flatness.build_measure()
        if self.estimator.name in EVOLUTION_STRATEGIES and measure is not None and not measure.has_value:
            raise ValueError(
                f"objective.flatness.name {self.objective.flatness.name!r} has a gradient but no meaningful value, and "
                f"{self.estimator.name} only evaluates: use 'perturbation-gap', or estimator.name=truncated-backprop"
            )

    def _check_curriculum(self) -> None:
        """Raise ``ValueError`` for stages that would be rounded, and for what has no use beside them."""
        if not self.validate_every:
            raise ValueError("validate_every must be at least 1 with a curriculum, not 0")
        for task in self.tasks:
            length = self.truncation_length(task)
            if any(steps % length for steps in self.curriculum.stages):
                raise ValueError(
                    f"curriculum.stages must be multiples of {length}, {task.name}'s truncation, not "
                    f"{list(self.curriculum.stages)}"
                )
        unused = ("patience", "num_steps", "num_lengths")
        given = [f"validation.{name}" for name in unused if getattr(self.validation, name) is not None]
        if given:
            raise ValueError(f"a curriculum has no use for {', '.join(given)}: leave none")

    def truncation_length(self, task: TaskConfig) -> int:
        """Return the inner steps per meta-update of a family."""
        return task.truncation_length or self.estimator.truncation_length

    def build_rule(self) -> UpdateRule:
        """Return the rule with its options; ``ValueError`` names the valid ones."""
        return read(self.rule_options, RULES[self.rule], "rule_options")

    def to_json(self) -> str:
        """Return the configuration as JSON text, every field included."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> MetaTrainConfig:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: for a missing or an unknown key or a value of another type; the message names it.
        """
        return read(parse_json(text, "configuration"), cls, complete=True)

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
            assign(data, type(self), assignment)
        return read(data, type(self))
