"""The mean of a few seeds' figures, and how far it may be off.

Shared by the examples. A script in a folder beside this file finds it by
`sys.path.append(str(Path(__file__).parent.parent))`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# Student's t, 95 %, by the number of figures.
_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def interval(figures: Sequence[float]) -> tuple[float, float]:
    """Returns the mean, and how far to either side of it the 95 % interval reaches, by Student's t; nan for one figure.

    It says what another draw of weights and order would do, and nothing of other texts or sizes.
    """
    if len(figures) < 2:
        return figures[0], math.nan
    return statistics.fmean(figures), _T[len(figures)] * statistics.stdev(figures) / math.sqrt(len(figures))


def cell(figures: Sequence[float], form: str = ".3f") -> str:
    """The mean with its interval, of one figure that alone."""
    mean, reach = interval(figures)
    return f"{mean:{form}}" if math.isnan(reach) else f"{mean:{form}} ± {reach:.3f}"
