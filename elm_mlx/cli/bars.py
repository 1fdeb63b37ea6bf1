"""Bars for tables in a terminal."""

from __future__ import annotations


def bar(share: float, width: int) -> str:
    """A bar of eighths of a character, `width` characters at a `share` of 1; never none."""
    eighths = max(1, round(share * width * 8))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
