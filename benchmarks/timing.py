"""Variants of a computation timed in turns, so that what disturbs one disturbs all."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Run = Callable[[], object]


def measure(variants: Mapping[str, Run], *, rounds: int) -> dict[str, list[float]]:
    """Let all variants take turns; the first two rounds warm up.

    Returns:
        Seconds of each round; of CPU time where there is one thread, which other processes disturb less.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 2):
        for name, run in variants.items():
            started = clock()
            run()
            if number >= 2:
                seconds[name].append(clock() - started)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """Return the median over the rounds of what a variant took, divided by another in the same round."""
    return statistics.median(own / other for own, other in zip(seconds[name], seconds[base], strict=True))
