"""``python -m flatopt.metatrain``, the form of ``flatopt-train`` that ``torchrun`` can start."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
