"""How often the intervals of `titan-yulan scaling fit` hold the law that made the runs: 100 seeds of noisy runs.

python benchmarks/scaling_coverage.py [SEEDS]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.scaling.making import PLANTED, make_runs
from titan_yulan.scaling.fit import fit

NOISE = 0.005  # of the logarithm of the loss


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    covered = dict.fromkeys(PLANTED, 0)
    for seed in range(seeds):
        found = fit(make_runs(noise=NOISE, seed=seed), "data_constrained", resamples=200, seed=seed)
        for name, planted in PLANTED.items():
            low, high = found.interval(name, 0.95)
            covered[name] += low <= planted <= high
    print(f"{len(make_runs())} runs with {NOISE:.1%} noise, 200 resamples, 95% intervals; of {seeds} seeds they cover")
    print("  ".join(f"{name} {count}" for name, count in covered.items()))


if __name__ == "__main__":
    main()
