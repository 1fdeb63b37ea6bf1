"""The pace against a machine whose times are known."""

from __future__ import annotations

import pytest

from elm_mlx.inference.pace import ReadingPace


@pytest.mark.parametrize("waiting", [1, 4, 100])
def test_a_prompt_is_read_in_parts_that_take_as_long_as_a_few_steps(
    monkeypatch: pytest.MonkeyPatch, waiting: int
) -> None:
    """And whatever a step took when it was compiled is forgotten."""
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    pace, done = ReadingPace(), []
    step, unit = 0.020, 0.00003
    for number in range(60):
        pace.round(True, waiting)
        layers = pace.layers(128)
        pace.computed(layers, 128)
        done.append(layers * 128 * unit)
        assert pace.layers(128) == 0  # nothing is left of this round
        now += (5.0 if number == 0 else step) + done[-1]
    assert done[:2] == [0, 0] and done[2] == 128 * unit
    longest = min(2 * step * waiting, 0.25)
    assert all(longest - 3 * 128 * unit < seconds <= longest + 1e-9 for seconds in done[12:30])
    assert done.count(0) == 3
