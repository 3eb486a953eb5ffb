"""Programs with a mistake each, and the same with the mend that `ModeCheck` prints, on scikit-learn's digits.

`cost_of_mistakes.py` runs them.
"""

from costs import averages, configuration, evaluations, modes, ranks, statistics
from costs.base import MISTAKES, Mistake, Outcome, Setting

__all__ = [
    "MISTAKES",
    "Mistake",
    "Outcome",
    "Setting",
    "averages",
    "configuration",
    "evaluations",
    "modes",
    "ranks",
    "statistics",
]
