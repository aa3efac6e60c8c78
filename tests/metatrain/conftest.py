import sys
from pathlib import Path

# The toy is imported by tests and, through PYTHONPATH, by the processes that they start.
sys.path.insert(0, str(Path(__file__).parent))
