"""The words that a placement and its compiled handler share, by their byte offsets in its context."""

from __future__ import annotations

LEAST, LARGE, MOST, MOST_LARGE, HELD, HELD_PEAK, FILED, FILED_PEAK = range(0, 64, 8)
FILED_EVER, FORCE, ERROR, WANTED, FLAGS, PATH, DIGITS, COUNT = range(64, 128, 8)
RESERVE = 128
WORDS = 17
