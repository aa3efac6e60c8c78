"""A learned optimizer that is a drop-in ``torch.optim.Optimizer``."""

from ._version import __version__
from .optimizer import FlatOpt
from .pretrained import LearnedRule, list_pretrained, load_pretrained, push_to_hub

__all__ = ["FlatOpt", "LearnedRule", "__version__", "list_pretrained", "load_pretrained", "push_to_hub"]
