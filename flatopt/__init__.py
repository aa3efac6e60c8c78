"""A learned optimizer that is a drop-in ``torch.optim.Optimizer``."""

from .hub import load_pretrained
from .optimizer import FlatOpt
from .pretrained import LearnedRule, list_pretrained

__version__ = "0.1.0"

__all__ = ["FlatOpt", "LearnedRule", "list_pretrained", "load_pretrained"]
