"""Honest programs: the recipes of published work, re-created in a few lines on six batches of tiny images.

Nothing above information is to be said of any of them, and no callback may change what they compute.
"""

from programs import adversarial, detection, fine_tuning, reinforcement, self_supervised, semi_supervised, supervised
from programs.base import PROGRAMS

__all__ = [
    "PROGRAMS",
    "adversarial",
    "detection",
    "fine_tuning",
    "reinforcement",
    "self_supervised",
    "semi_supervised",
    "supervised",
]
