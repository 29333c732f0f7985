"""What `[monitor] statistics_every` costs: measured on the debug model, counted for YuLan-Mini.

    python benchmarks/statistics_cost.py [--pairs 40] [--rows 1] [--csv FILE]

Measured: one process on the CPU trains the debug job's first phase on made-up rows (16 of 128 tokens in two
micro-batches) with statistics in every other step, so that both kinds of step meet the same noise. The share at a
distance of N steps is (observed - plain) / (N * plain): of the median processor time of each kind of step, and, because
others may use the machine, of the fastest by the clock.

Counted: floating-point operations of the extra pass over those of a step, for the 2.4-billion model at 4,096 tokens, 18
rows on a GPU (the published batch on 56), one row and six layers observed. Attention in forward and the scores of the
log-sum-exp count as whole squares; the pass has no head. What counting leaves out: that the pass runs eagerly and
gathers the weights once more, and the reading of weights, moments and gradients.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import ROOT, Timing, best, head, median, table, timed
from titan_yulan import config as configuration
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.presets import PRESETS
from titan_yulan.curriculum.plan import Plan
from titan_yulan.data.loader import Batch
from titan_yulan.learner import Learner
from titan_yulan.monitor.flops import flops_per_token
from titan_yulan.monitor.statistics import is_due
from titan_yulan.parallel import process

DISTANCES = (10, 23, 100)
_WARM_UP = 4  # steps


def measure(pairs: int, rows: int) -> tuple[list[Timing], list[Timing]]:
    """Of the plain steps and of the observed ones."""
    options = ["--monitor.statistics_every=2", f"--monitor.statistics_rows={rows}"]
    config = configuration.load(ROOT / "train_configs/debug.toml", options).config
    plan = Plan(config)
    learner = Learner(config, plan, process.start(), "auto", lambda line: None)
    phase = plan.phases[0]
    learner.build(phase)
    generator = torch.Generator().manual_seed(0)
    batches = [made_up(phase.section.batch.micro_batch_size, phase.sequence_length, generator) for _ in range(2)]
    found: dict[bool, list[Timing]] = {False: [], True: []}
    for step in range(2 * pairs + _WARM_UP):
        timing = timed(partial(learner.train_step, step % phase.steps, batches))
        if step >= _WARM_UP:
            found[is_due(step + 1, 2)].append(timing)
    process.leave()
    return found[False], found[True]


def made_up(rows: int, length: int, generator: torch.Generator) -> Batch:
    size = (rows, length + 1)
    return Batch(
        tokens=torch.randint(8192, size, generator=generator),
        document_ids=torch.zeros(size, dtype=torch.int64),
        loss_mask=torch.ones(size, dtype=torch.bool),
        source=torch.zeros(rows, dtype=torch.int64),
        position=torch.zeros(rows, dtype=torch.int64),
        weight=torch.ones(rows),
    )


def counted_share(model: ModelConfig, length: int, rows_of_step: int, rows: int, layers: int) -> float:
    """FLOPs of an observed step's extra pass over those of the step."""
    width = model.num_attention_heads * model.attention_head_dim
    step = rows_of_step * length * flops_per_token(model, length)
    one_row = length * (flops_per_token(model, length) // 3 - 2 * model.vocab_size * model.hidden_size)
    scores = layers * 2 * length * length * width
    return rows * (one_row + scores) / step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40, help="steps of each kind")
    parser.add_argument("--rows", type=int, default=1, help="rows that hidden states are measured on")
    parser.add_argument("--csv", type=Path, help="append the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(head("torch"))
    plain, observed = measure(options.pairs, options.rows)
    share = counted_share(PRESETS["yulan_mini_2b"], 4096, 18, options.rows, 6)
    plain_clock, plain_processor = best(plain).seconds, median(plain).processor
    rows: list[tuple[str, str, float]] = [
        ("debug, clock, fastest", f"{1000 * plain_clock:.0f} ms", best(observed).seconds / plain_clock - 1),
        (
            "debug, processor, median",
            f"{1000 * plain_processor:.0f} ms",
            median(observed).processor / plain_processor - 1,
        ),
        ("YuLan-Mini 2.4B, counted", "-", share),
    ]
    columns = ["", "plain step", "an observed step takes more", *(f"share of time, every {n}" for n in DISTANCES)]
    lines = [[name, step, f"{extra:.1%}", *(f"{extra / n:.3%}" for n in DISTANCES)] for name, step, extra in rows]
    print(table(columns, lines, options.csv))


if __name__ == "__main__":
    main()
