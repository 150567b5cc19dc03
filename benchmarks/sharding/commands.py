"""The commands about sharding: `sharding`, `plan` and `calibrate`."""

from __future__ import annotations

import argparse
import dataclasses

from benchmarks.arguments import amount, names, positive
from transformer.errors import UserError


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add their parsers to those of the other commands."""
    text = "one model under every sharding strategy on the available devices: exactness, time, memory, communication"
    sub = commands.add_parser("sharding", help=text, description=text)
    sub.set_defaults(call=_sharding)
    sub.add_argument("config", metavar="CONFIG", help="a YAML file of configs/")
    sub.add_argument("--strategies", metavar="A,B,C", help="comma-separated names (all that apply)")
    text = "measure each strategy with each of a field's values, such as model.remat=none,full; may be repeated"
    sub.add_argument("--vary", action="append", default=[], metavar="FIELD=A,B", help=text)
    sub.add_argument("--devices", type=positive, metavar="N", help="number of virtual CPU devices")
    sub.add_argument(
        "--target", help="compile for devices that are not available, such as h100:8, and report the communication"
    )
    sub.add_argument("--install", action="store_true", help="make an environment with the target's compiler, once")
    sub.add_argument("--compiler-python", metavar="PYTHON", help="interpreter of an environment with that compiler")
    sub.add_argument("--rounds", type=positive, default=5, help="turns of each strategy (5)")
    sub.add_argument(
        "--dir", dest="directory", metavar="DIR", help="where the report and its figures are written (plans)"
    )
    text = (
        "rank sharding layouts for TPUs or GPUs that need not be available: compiled ahead, time and memory predicted"
    )
    sub = commands.add_parser("plan", help=text, description=text)
    sub.set_defaults(call=_plan, usual=sub.get_default)
    sub.add_argument("config", nargs="?", metavar="CONFIG", help="a YAML file of configs/")
    text = "such as v5e:4x4, v5p:4x4x4, v7:2x2x2, h100:8, h200:2x8, gb200:72, mi300x:8, cpu:8, or my.yaml:8, a file of figures"
    sub.add_argument("--target", help=text)
    sub.add_argument("--candidates", type=positive, default=24, metavar="N", help="layouts to compile (24)")
    text = "instead of planning, compare predictions with measurements on this device, and record the errors"
    sub.add_argument("--validate", action="store_true", help=text)
    text = "instead, plan a set of models on this device, and measure how much slower each pick is than the best layout"
    sub.add_argument("--regret", action="store_true", help=text)
    text = "instead of planning, compare predictions with training runs that others published, and record the errors"
    sub.add_argument("--published", action="store_true", help=text)
    sub.add_argument(
        "--only", nargs="+", metavar="NAME", help="some of the published runs, or of the cases of --regret (all)"
    )
    text = "also compile the published runs with their targets' compilers, where those are installed"
    sub.add_argument("--compile", action="store_true", help=text)
    sub.add_argument(
        "--tokens", type=amount, metavar="N", help="training tokens, such as 1e12, to predict the time of training"
    )
    text = "what to minimise: time, cost by --price, or memory (time)"
    sub.add_argument("--objective", choices=("time", "cost", "memory"), default="time", help=text)
    text = "price of a device-hour in any currency: 2.5, or h100=2.5,v5e=1.2"
    sub.add_argument("--price", metavar="PRICE", help=text)
    text = "instead of one --target, compare the best layouts of several: v5e:4x4,h100:8"
    sub.add_argument("--compare", metavar="A,B,C", help=text)
    text = "also find the largest batch and the longest context that fit the best layout"
    sub.add_argument("--largest", action="store_true", help=text)
    text = "explain why one layout is better than another, by their numbers in the ranking"
    sub.add_argument("--explain", nargs=2, type=positive, metavar=("A", "B"), help=text)
    sub.add_argument("--analytic", action="store_true", help="by formula only, without compiling")
    sub.add_argument("--install", action="store_true", help="make an environment with the target's compiler, once")
    sub.add_argument("--compiler-python", metavar="PYTHON", help="interpreter of an environment with that compiler")
    sub.add_argument("--workers", type=positive, metavar="N", help="concurrent compilers (one per core, at most 4)")
    sub.add_argument("--dir", dest="directory", metavar="DIR", help="where report and config are written (plans)")
    text = "measure the times of operations on this device, which plans for such devices then rest on"
    sub = commands.add_parser("calibrate", help=text, description=text)
    sub.set_defaults(call=_calibrate)
    sub.add_argument("--out", metavar="FILE", help="file to write (one in the cache folder)")


def _sharding(options: argparse.Namespace) -> None:
    if options.target is not None:
        import jax

        from benchmarks.sharding.measuring import traffic

        # Only shapes are traced here; nothing runs.
        jax.config.update("jax_platforms", "cpu")
        traffic.run(
            options.config, options.target, overrides=tuple(options.overrides), strategies=names(options.strategies),
            vary=options.vary, python=options.compiler_python, install=options.install, output=options.directory,
        )  # fmt: skip
        return
    from benchmarks.sharding.measuring import measure
    from train.parallel.runtime import set_up_devices

    set_up_devices(options.devices)
    measure.run(
        options.config, overrides=tuple(options.overrides), strategies=names(options.strategies), vary=options.vary,
        rounds=options.rounds, output=options.directory,
    )  # fmt: skip


_MODES = {
    "validate": ("its own cases", ()),
    "regret": ("its own cases", ("only", "directory")),
    "published": ("its own runs", ("only", "directory", "compile", "compiler_python")),
}
"""What `plan` does in place of planning: what it compares, and the other options that it knows."""
_OF_MODES = ("only", "compile")
"""Options that planning does not know."""
_NOT_OPTIONS = ("command", "call", "usual", "overrides", "config", "target")


def _mode_of(options: argparse.Namespace) -> str | None:
    """Which of `_MODES` is asked for, if any; raises a `UserError` for options that it does not know."""
    chosen = [name for name in _MODES if getattr(options, name)]
    if len(chosen) > 1:
        raise UserError(f"plan: --{chosen[0]} and --{chosen[1]} do not go together")
    what, known = _MODES[chosen[0]] if chosen else ("", ())
    if chosen and (options.config or options.target or options.overrides):
        raise UserError(f"plan: --{chosen[0]} has {what}, and takes no config, target or field")
    for option, value in vars(options).items():
        is_unknown = option not in (*known, *_MODES, *_NOT_OPTIONS) if chosen else option in _OF_MODES
        if is_unknown and value != options.usual(option):
            name = {"directory": "dir"}.get(option, option).replace("_", "-")
            if chosen:
                raise UserError(f"plan: --{chosen[0]} has {what}, and takes no --{name}")
            modes = [f"--{mode}" for mode, (_, knows) in _MODES.items() if option in knows]
            raise UserError(f"plan: --{name} belongs to {' and '.join(modes)}")
    return chosen[0] if chosen else None


def _plan(options: argparse.Namespace) -> None:
    match _mode_of(options):
        case "validate":
            from benchmarks.sharding.validation import validate

            validate.run()
            return
        case "regret":
            from benchmarks.sharding.validation import regret

            regret.run(options.only, output=options.directory)
            return
        case "published":
            _published(options)
            return
    if options.compare and (options.target or options.explain or options.largest):
        raise UserError("plan: --compare has its own targets, and takes no --target, --explain or --largest")
    if not (options.config and (options.target or options.compare)):
        raise UserError("plan: give a config and a --target, such as configs/scale/gpt_1_3b.yaml --target h100:8")
    import jax

    from benchmarks.sharding.devices.targets import parse_target
    from benchmarks.sharding.planning import plan
    from benchmarks.sharding.planning.objective import Goal, parse_prices

    # Only shapes are traced here; nothing runs.
    jax.config.update("jax_platforms", "cpu")
    how = plan.How(
        number=options.candidates, python=options.compiler_python, install=options.install, analytic=options.analytic,
        workers=options.workers,
    )  # fmt: skip
    goal = Goal(objective=options.objective, tokens=options.tokens)
    if options.compare:
        from benchmarks.sharding.planning import compare

        targets = list(dict.fromkeys(names(options.compare) or []))
        kinds = list(dict.fromkeys(parse_target(name).kind for name in targets))
        prices = parse_prices(options.price, kinds)
        compare.run(
            options.config, targets, overrides=tuple(options.overrides), how=how, goal=goal, prices=prices,
            output=options.directory,
        )  # fmt: skip
        return
    kind = parse_target(options.target).kind
    goal = dataclasses.replace(goal, price=parse_prices(options.price, [kind]).get(kind))
    explain = tuple(options.explain) if options.explain else None
    plan.run(
        options.config, options.target, overrides=tuple(options.overrides), how=how, goal=goal, explain=explain,
        look_for_largest=options.largest, output=options.directory,
    )  # fmt: skip


def _published(options: argparse.Namespace) -> None:
    import jax

    from benchmarks.sharding.validation import published

    # Only shapes are traced here; nothing runs.
    jax.config.update("jax_platforms", "cpu")
    published.run(options.only, compiled=options.compile, python=options.compiler_python, output=options.directory)


def _calibrate(options: argparse.Namespace) -> None:
    from benchmarks.sharding.validation import calibrate

    calibrate.run(options.out)
