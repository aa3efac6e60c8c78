"""Pure update rules: the contract, the driver, and one file per rule."""

from ._average import PolynomialAverage
from ._driver import Plan, apply_rule
from ._phases import Coordinates, Phases, batched_phases, plain_phases
from ._rule import State, StepContext, StripRows, TensorFacts, TensorShape, UpdateRule, Weights
from ._stores import RuleResult, Update
from ._strips import Strips
from ._sums import Reduce
from .adam import Adam
from .l2o_dm import L2ODM
from .l2o_scale import L2OScale
from .orthogonalized_momentum import OrthogonalizedMomentum
from .rnnprop import RNNProp

RULES: dict[str, type[UpdateRule]] = {
    rule.name: rule for rule in (Adam, OrthogonalizedMomentum, L2ODM, RNNProp, L2OScale)
}
"""Every rule by the name that ``config.json`` and the command line use."""

__all__ = [
    "RULES",
    "Adam",
    "Coordinates",
    "L2ODM",
    "L2OScale",
    "OrthogonalizedMomentum",
    "Phases",
    "Plan",
    "PolynomialAverage",
    "RNNProp",
    "Reduce",
    "RuleResult",
    "State",
    "StepContext",
    "StripRows",
    "Strips",
    "TensorFacts",
    "TensorShape",
    "Update",
    "UpdateRule",
    "Weights",
    "apply_rule",
    "batched_phases",
    "plain_phases",
]
