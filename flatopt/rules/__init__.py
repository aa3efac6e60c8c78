"""Pure update rules: the contract, the driver, and one file per rule."""

from ._networks import spell_out_products
from ._rule import Phases, RuleResult, State, StepContext, UpdateRule, Weights, apply_rule, observe_phase, plain_phases
from .adam import Adam
from .hierarchical_mlp import HierarchicalMLP
from .l2o_dm import L2ODM
from .l2o_scale import L2OScale
from .rnnprop import RNNProp

RULES: dict[str, type[UpdateRule]] = {rule.name: rule for rule in (Adam, HierarchicalMLP, L2ODM, RNNProp, L2OScale)}
"""Every rule by the name that ``config.json`` and the command line use."""

__all__ = [
    "RULES",
    "Adam",
    "HierarchicalMLP",
    "L2ODM",
    "L2OScale",
    "Phases",
    "RNNProp",
    "RuleResult",
    "State",
    "StepContext",
    "UpdateRule",
    "Weights",
    "apply_rule",
    "observe_phase",
    "plain_phases",
    "spell_out_products",
]
