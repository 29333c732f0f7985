"""`titan-yulan scaling`: laws of loss, fitted to runs and asked questions."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_yulan.errors import UserError
from titan_yulan.verbs.common import add_verb

if TYPE_CHECKING:
    from titan_yulan.scaling.store import Stored

_BEYOND = "* beyond the runs that the law was fitted to: more parameters, tokens or epochs than any of them had"


def add(verbs: Any) -> None:
    """The verbs scaling fit, predict, plan."""
    scaling = verbs.add_parser("scaling", help="loss by size, tokens and repeated data: fit, predict, plan")
    group = scaling.add_subparsers(metavar="VERB", required=True)

    fit = add_verb(group, "fit", "fit a law to runs, with intervals", _fit)
    fit.add_argument("inputs", nargs="+", type=Path, metavar="PATH", help="run folder, folder of run folders, or .csv")
    fit.add_argument("--form", choices=("chinchilla", "data_constrained"), default="data_constrained")
    fit.add_argument("--tied", action="store_true", help="one exponent for parameters and tokens")
    fit.add_argument("--best", action="store_true", help="of a run folder the lowest validation loss, not the last")
    kinds = ("autoregressive", "masked_diffusion")
    fit.add_argument("--objective", choices=kinds, default="", help="of a folder or table only the runs with it")
    fit.add_argument("--resamples", type=int, default=200, metavar="N", help="fits to resampled runs, for intervals")
    fit.add_argument("--delta", type=float, default=1e-3, help="of the Huber loss, in log loss")
    fit.add_argument("--seed", type=int, default=0, help="of the resampling")
    fit.add_argument("--output", type=Path, metavar="FILE", help="write the fit as JSON, for predict and plan")
    fit.add_argument("--plot", type=Path, metavar="FILE", help="draw runs and law (.png, .svg, .pdf)")

    predict = add_verb(group, "predict", "the loss of a model that was not trained", _predict)
    _add_fit(predict)
    for name in ("--parameters", "--tokens"):
        predict.add_argument(name, required=True, metavar="N", help="such as 124M")
    predict.add_argument("--unique-tokens", metavar="N", help="different ones among the tokens (default: all)")

    plan = add_verb(group, "plan", "which size, how many epochs, from which compute another objective wins", _plan)
    _add_fit(plan)
    plan.add_argument("--against", metavar="FIT", help="a second law, such as that of masked diffusion")
    plan.add_argument("--flops", nargs="+", default=["1e18", "1e19", "1e20", "1e21"], metavar="C", help="compute 6 N D")
    plan.add_argument("--unique-tokens", required=True, metavar="N", help="tokens that are there, such as 100M")
    plan.add_argument("--worth", type=float, default=0.5, help="a repeated token is worth at least this of a fresh one")
    plan.add_argument("--plot", type=Path, metavar="FILE", help="draw loss over compute (.png, .svg, .pdf)")


def _add_fit(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--fit", required=True, metavar="FIT", help="file of 'scaling fit --output', or datablations")


def _number(name: str, text: str) -> float:
    from titan_yulan.config.values import Tokens

    try:
        value = Tokens.parse(text).value
    except ValueError:
        value = 0.0
    if not value > 0:
        raise UserError(f"{name} {text}: a positive number, such as 124M or 1e19")
    return value


def _fit(options: argparse.Namespace) -> None:
    from titan_yulan.scaling.fit import fit
    from titan_yulan.scaling.plot import plot_fit
    from titan_yulan.scaling.runs import read_runs
    from titan_yulan.scaling.store import LEVEL, save_fit

    if options.resamples < 0 or options.delta <= 0:
        raise UserError("--resamples is at least 0, --delta above 0")
    runs = read_runs(options.inputs, options.best, options.objective)
    found = fit(
        runs, options.form, tied=options.tied, delta=options.delta, resamples=options.resamples, seed=options.seed
    )
    print(f"{options.form} fitted to {len(runs)} runs, {LEVEL:.0%} intervals from {options.resamples} resamples")
    for name, value in found.law.coefficients.items():
        interval = ""
        if len(found.samples):
            low, high = found.interval(name, LEVEL)
            interval = f"  [{low:.5g}, {high:.5g}]"
        print(f"  {name:<4}{value:>12.6g}{interval}")
    root_mean_square = float((found.residuals**2).mean() ** 0.5)
    print(f"measured / fitted loss: root mean square difference {root_mean_square:.2%}")
    for name in found.undetermined():
        print(f"WARNING: these runs do not determine {name}")
    if options.output:
        save_fit(options.output, found, runs)
    if options.plot:
        plot_fit(found.law, runs, options.plot)


def _predict(options: argparse.Namespace) -> None:
    from titan_yulan.scaling.store import open_fit

    stored = open_fit(options.fit)
    parameters, tokens = _number("--parameters", options.parameters), _number("--tokens", options.tokens)
    unique = _number("--unique-tokens", options.unique_tokens) if options.unique_tokens else tokens
    unique = min(unique, tokens)
    loss, interval = stored.losses(parameters, tokens, unique)
    mark = "*" if stored.beyond(parameters, tokens, tokens / unique) else ""
    print(f"loss {loss:.10g}" + (f"  {_interval(interval)}" if interval else "") + mark)
    if mark:
        print(_BEYOND)


def _interval(ends: tuple[float, float], digits: str = ".5g") -> str:
    return f"[{ends[0]:{digits}}, {ends[1]:{digits}}]"


def _plan(options: argparse.Namespace) -> None:
    from titan_yulan.scaling.forms import critical_compute
    from titan_yulan.scaling.plot import plot_plan
    from titan_yulan.scaling.store import open_fit

    unique = _number("--unique-tokens", options.unique_tokens)
    compute = [_number("--flops", text) for text in options.flops]
    stored = [open_fit(name) for name in (options.fit, options.against) if name]
    lines = [f"{unique:.6g} unique tokens, compute counted as 6 N D", *_sizes(stored, compute, unique)]
    lines += _worths(stored, options.worth)
    if options.against:
        lines += _comparison(stored[0], stored[1], compute, unique)
    lines.append(f"masked diffusion wins from {critical_compute(unique):.4g} FLOPs on, as published (arXiv 2507.15857)")
    print("\n".join([*lines, _BEYOND] if any("*" in line for line in lines) else lines))
    if options.plot:
        plot_plan({law.name: law.law for law in stored}, compute, unique, options.plot)


def _sizes(stored: Sequence[Stored], compute: Sequence[float], unique: float) -> Iterator[str]:
    """The best size of each law for each amount of compute."""
    from titan_yulan.scaling.answers import compute_optimal

    yield f"{'law':<16}{'FLOPs':>10}{'parameters':>14}{'tokens':>12}{'epochs':>9}{'loss':>9}  95% interval"
    for law in stored:
        for flops in compute:
            best = compute_optimal(law.law, flops, unique)
            _, interval = law.losses(best.parameters, best.tokens, min(unique, best.tokens))
            line = (
                f"{law.name:<16}{flops:>10.3g}{best.parameters:>14.4g}{best.tokens:>12.4g}"
                f"{best.epochs(unique):>9.2f}{best.loss:>9.4f}"
            )
            line += f"  {_interval(interval, '.4f')}" if interval else ""
            yield line + ("*" if law.beyond(best.parameters, best.tokens, best.epochs(unique)) else "")


def _worths(stored: Sequence[Stored], worth: float) -> Iterator[str]:
    from titan_yulan.scaling.answers import epochs_worth

    for law in stored:
        if law.law.form == "data_constrained":
            epochs = epochs_worth(law.law, worth)
            mark = "*" if law.beyond(0, 0, epochs) else ""
            yield f"{law.name}: a token is worth {worth:.0%} of a fresh one up to epoch {epochs:.1f}{mark}"


def _comparison(first: Stored, second: Stored, compute: Sequence[float], unique: float) -> Iterator[str]:
    """Where the second law has the lower loss, in the compute of the runs and of the question."""
    from titan_yulan.scaling.answers import compute_optimal, first_win_interval, ranges_won

    trained = [6 * run.parameters * run.tokens for law in (first, second) for run in law.runs]
    within = min([*compute, *trained]), max([*compute, *trained])
    looked = f"(looked for from {within[0]:.4g} to {within[1]:.4g} FLOPs)"
    if not within[0] < within[1]:
        raise UserError(f"--flops {within[0]:g}: give a second amount of compute, to compare the laws between the two")

    def told(flops: float) -> str:
        bests = [(law, compute_optimal(law.law, flops, unique)) for law in (first, second)]
        beyond = any(law.beyond(best.parameters, best.tokens, best.epochs(unique)) for law, best in bests)
        return f"{flops:.4g}{'*' * beyond}"

    won = ranges_won(first.law, second.law, unique, within)
    ranges = ", ".join(f"from {told(low)} to {told(high)} FLOPs" for low, high in won) or "nowhere"
    yield f"{second.name} has the lower loss {ranges} {looked}"
    if len(first.samples) and len(second.samples):
        low, high = first_win_interval(first.laws, second.laws, unique, within)
        ends = f"{_limited(low, within)} to {_limited(high, within)}"
        yield f"  95% range of where that begins: {ends}"


def _limited(flops: float, within: tuple[float, float]) -> str:
    if flops <= within[0]:
        return f"{flops:.4g} or less"
    return f"more than {within[1]:.4g} or never" if flops > within[1] else f"{flops:.4g}"
