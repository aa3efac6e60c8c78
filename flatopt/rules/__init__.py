"""Pure update rules: the contract, the driver, and one file per rule."""

from ._rule import Phases, RuleResult, State, StepContext, UpdateRule, Weights, apply_rule, observe_phase
from .adam import Adam
from .hierarchical_mlp import HierarchicalMLP

RULES: dict[str, type[UpdateRule]] = {rule.name: rule for rule in (Adam, HierarchicalMLP)}
"""Every rule by the name that ``config.json`` and the command line use."""

__all__ = [
    "RULES",
    "Adam",
    "HierarchicalMLP",
    "Phases",
    "RuleResult",
    "State",
    "StepContext",
    "UpdateRule",
    "Weights",
    "apply_rule",
    "observe_phase",
]
