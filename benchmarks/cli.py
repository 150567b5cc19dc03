"""`manyheads-bench`: benchmarks. Needs jax, flax, optax and numpy; peer and data packages only for comparisons."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Sequence

from train.commands.cli import message_of
from train.interrupt import exit_on_sigint
from transformer.errors import UserError, is_number

OVERRIDABLE = ("plan", "sharding")
"""Commands with a config, whose fields can be overridden: --model.num-layers 8."""
RESUMABLE = ("plan", "history", "mechanisms", "pretraining", "finetuning", "resume")
"""Commands that keep partial results when they are interrupted."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in OVERRIDABLE:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides = rest
    interruptible = contextlib.nullcontext() if options.command in RESUMABLE else exit_on_sigint("manyheads-bench")
    try:
        with interruptible:
            options.call(options)
    except UserError as error:
        print(f"manyheads-bench: {message_of(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("manyheads-bench: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="manyheads-bench", description="Benchmarks; results are stored in benchmarks/results/."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, call: object, text: str, rounds: int) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--rounds", type=_positive, default=rounds, help=f"turns of each candidate ({rounds})")
        sub.set_defaults(call=call)
        return sub

    sub = command("step", _step, "a training step compared with torch's, eager and compiled", rounds=7)
    sub.add_argument("--steps", type=_positive, default=3, help="steps in a turn (3)")
    sub.add_argument(
        "--no-compiled-peer", action="store_true", help="leave torch.compile out (it needs a C++ compiler)"
    )
    text = "plain: chunks of text, next to torch; packed: eight documents a row; large: 1.3 billion parameters, on an accelerator"
    sub.add_argument("--case", choices=("plain", "packed", "large"), default="plain", help=text)
    sub = command(
        "finetuning-step", _finetuning_step, "a step of fine-tuning an encoder compared with torch's", rounds=7
    )
    sub.add_argument("--steps", type=_positive, default=3, help="steps in a turn (3)")
    text = "plain: rows of one length; padded: of half the length to the whole"
    sub.add_argument("--case", choices=("plain", "padded"), default="plain", help=text)
    sub.add_argument("--compiled-peer", action="store_true", help="also compare with torch.compile")
    text = "text embedding compared with sentence-transformers, with the same weights"
    sub = command("embedding", _embedding, text, rounds=3)
    text = "also compare with its ONNX backend, in an environment of its own, which is made on first use"
    sub.add_argument("--onnx", action="store_true", help=text)
    text = "an imported encoder under fsdp and tensor parallelism, compared with transformers on one device"
    sub = commands.add_parser("import-layouts", help=text, description=text)
    sub.set_defaults(call=_import_layouts)
    sub.add_argument("--devices", type=_positive, default=8, metavar="N", help="number of virtual CPU devices (8)")
    command("decode", _decode, "greedy decoding compared with transformers' generate", rounds=5)
    command("data", _data, "throughput of the loader compared with the step", rounds=3)
    command(
        "experts", _experts, "time of a mixture of experts over the number of tokens, and a dense layer's", rounds=5
    )
    command("compile", _compile, "compile time of the step at 6 and 48 layers", rounds=3)
    sub = command("attention", _attention, "attention: exactness, speed, length; features of each backend", rounds=5)
    sub.add_argument("--certify", action="store_true", help="every mechanism and backend against float64")
    for platform in ("tpu", "gpu"):
        text = f"--certify also compiles for a {platform.upper()} with this interpreter's JAX; no such device is needed"
        sub.add_argument(f"--{platform}-python", metavar="PYTHON", help=text)
    sub.add_argument("--speed", action="store_true", help="compare the speed of the backends")
    sub.add_argument("--length", action="store_true", help="time and memory over the length of the sequence")
    sub.add_argument("--long", type=_positive, metavar="T", help="run blockwise over T tokens, both passes, once")
    sub.add_argument("--budget", type=float, default=10.0, help="seconds a call may take under --length (10)")
    sub.add_argument("--last", type=_positive, default=1 << 20, help="the longest sequence of --length (1048576)")
    sub.add_argument("--support", action="store_true", help="print the table of features of each backend")
    text = "attention through history: ten models trained on the same pairs at the same budget, and a report"
    sub = commands.add_parser("history", help=text, description=text)
    sub.set_defaults(call=_history)
    sub.add_argument("--models", metavar="A,B,C", help="comma-separated names (all)")
    sub.add_argument("--parameters", type=_positive, metavar="N", help="number of parameters of each model (1000000)")
    sub.add_argument(
        "--steps", type=_positive, metavar="N", help="training steps of each model, so all see the same tokens"
    )
    sub.add_argument("--data", metavar="DATA", help="verses, synthetic, or the path of a config of pairs (verses)")
    sub.add_argument("--seed", type=int, metavar="N", help="seed of weights, dropout and the order of the data (0)")
    sub.add_argument("--dir", dest="directory", metavar="DIR", help="where runs and figures are kept (runs/history)")
    text = "every mechanism of attention, trained from a config for the same time on the same data: one table"
    sub = commands.add_parser("mechanisms", help=text, description=text)
    sub.set_defaults(call=_mechanisms)
    sub.add_argument("--minutes", type=_amount, metavar="N", help="minutes of training for each mechanism (2)")
    sub.add_argument("--tasks", metavar="A,B,C", help="tasks among language, translation, reviews and pairs (all)")
    sub.add_argument("--dir", dest="directory", metavar="DIR", help="where runs and figures are kept (runs/mechanisms)")
    text = "a classifier initialised from a pretrained encoder, compared with random initialisation"
    sub = commands.add_parser("pretraining", help=text, description=text)
    sub.set_defaults(call=_pretraining)
    sub.add_argument("--seeds", type=_positive, default=5, metavar="N", help="runs of each, with seeds 0 to N - 1 (5)")
    sub.add_argument(
        "--dir", dest="directory", metavar="DIR", help="where runs and figures are kept (runs/pretraining)"
    )
    text = "a classifier fine-tuned here, by transformers, and here with low-rank adapters, from the same weights"
    sub = commands.add_parser("finetuning", help=text, description=text)
    sub.set_defaults(call=_finetuning)
    sub.add_argument("--seeds", type=_positive, default=5, metavar="N", help="runs of each, with seeds 0 to N - 1 (5)")
    sub.add_argument("--dir", dest="directory", metavar="DIR", help="where runs and figures are kept (runs/finetuning)")
    text = "runs that are killed at random moments, and moved between devices and processes, held against whole ones"
    sub = commands.add_parser("resume", help=text, description=text)
    sub.set_defaults(call=_resume)
    sub.add_argument("--kills", type=_positive, default=25, metavar="N", help="of each family on one device (25)")
    sub.add_argument("--dir", dest="directory", metavar="DIR", help="where runs are kept (runs/resume)")
    text = (
        "a long run with evaluations, checkpoints and samples: growth of its memory, open files, stalls by checkpoints"
    )
    sub = commands.add_parser("soak", help=text, description=text)
    sub.set_defaults(call=_soak)
    sub.add_argument("--steps", type=_positive, default=2000, metavar="N", help="its steps (2000)")
    sub.add_argument("--dir", dest="directory", metavar="DIR", help="where the run is kept, a new folder (runs/soak)")
    text = "the time of the test suite with an empty compilation cache"
    sub = commands.add_parser("suite", help=text, description=text)
    sub.set_defaults(call=_suite)
    sub.add_argument("--fast", action="store_true", help="the quick half of the tests")
    text = "one model under every sharding strategy on the available devices: exactness, time, memory, communication"
    sub = commands.add_parser("sharding", help=text, description=text)
    sub.set_defaults(call=_sharding)
    sub.add_argument("config", metavar="CONFIG", help="a YAML file of configs/")
    sub.add_argument("--strategies", metavar="A,B,C", help="comma-separated names (all that apply)")
    text = "measure each strategy with each of a field's values, such as model.remat=none,full; may be repeated"
    sub.add_argument("--vary", action="append", default=[], metavar="FIELD=A,B", help=text)
    sub.add_argument("--devices", type=_positive, metavar="N", help="number of virtual CPU devices")
    sub.add_argument(
        "--target", help="compile for devices that are not available, such as h100:8, and report the communication"
    )
    sub.add_argument("--install", action="store_true", help="make an environment with the target's compiler, once")
    sub.add_argument("--compiler-python", metavar="PYTHON", help="interpreter of an environment with that compiler")
    sub.add_argument("--rounds", type=_positive, default=5, help="turns of each strategy (5)")
    sub.add_argument(
        "--dir", dest="directory", metavar="DIR", help="where the report and its figures are written (plans)"
    )
    text = (
        "rank sharding layouts for TPUs or GPUs that need not be available: compiled ahead, time and memory predicted"
    )
    sub = commands.add_parser("plan", help=text, description=text)
    sub.set_defaults(call=_plan)
    sub.add_argument("config", nargs="?", metavar="CONFIG", help="a YAML file of configs/")
    text = "such as v5e:4x4, v5p:4x4x4, v7:2x2x2, h100:8, h200:2x8, gb200:72, mi300x:8, or my.yaml:8 with a file of figures"
    sub.add_argument("--target", help=text)
    sub.add_argument("--candidates", type=_positive, default=24, metavar="N", help="layouts to compile (24)")
    text = "instead of planning, compare predictions with measurements on this device, and record the errors"
    sub.add_argument("--validate", action="store_true", help=text)
    sub.add_argument(
        "--tokens", type=_amount, metavar="N", help="training tokens, such as 1e12, to predict the time of training"
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
    sub.add_argument("--explain", nargs=2, type=_positive, metavar=("A", "B"), help=text)
    sub.add_argument("--analytic", action="store_true", help="by formula only, without compiling")
    sub.add_argument("--install", action="store_true", help="make an environment with the target's compiler, once")
    sub.add_argument("--compiler-python", metavar="PYTHON", help="interpreter of an environment with that compiler")
    sub.add_argument("--workers", type=_positive, metavar="N", help="concurrent compilers (one per core, at most 4)")
    sub.add_argument("--dir", dest="directory", metavar="DIR", help="where report and config are written (plans)")
    text = "measure the times of operations on this device, which plans for such devices then rest on"
    sub = commands.add_parser("calibrate", help=text, description=text)
    sub.set_defaults(call=_calibrate)
    sub.add_argument("--out", metavar="FILE", help="file to write (one in the cache folder)")
    for name, call, text in (
        ("gpu", _gpu, "all measurements that need an accelerator"),
        ("report", _report, "the stored results as a Markdown table"),
    ):
        commands.add_parser(name, help=text, description=text).set_defaults(call=call)
    return parser


def _step(options: argparse.Namespace) -> None:
    from benchmarks import step

    step.run(options.rounds, options.steps, compiled_peer=not options.no_compiled_peer, case=options.case)


def _finetuning_step(options: argparse.Namespace) -> None:
    from benchmarks.encoders import step

    step.run(options.rounds, options.steps, case=options.case, compiled_peer=options.compiled_peer)


def _import_layouts(options: argparse.Namespace) -> None:
    from train.parallel.runtime import set_up_devices

    set_up_devices(options.devices)
    from benchmarks.encoders import layouts

    layouts.run(options.devices)


def _embedding(options: argparse.Namespace) -> None:
    from benchmarks.encoders import embedding
    from train.parallel.runtime import set_up_devices

    set_up_devices()
    embedding.run(options.rounds, onnx=options.onnx)


def _decode(options: argparse.Namespace) -> None:
    from benchmarks import decode

    decode.run(options.rounds)


def _data(options: argparse.Namespace) -> None:
    from benchmarks import data

    data.run(options.rounds)


def _experts(options: argparse.Namespace) -> None:
    from benchmarks import experts

    experts.run(options.rounds)


def _compile(options: argparse.Namespace) -> None:
    from benchmarks import compile_time

    compile_time.run(options.rounds)


def _attention(options: argparse.Namespace) -> None:
    if not (options.certify or options.speed or options.length or options.long or options.support):
        raise UserError("attention: choose --certify, --speed, --length, --long or --support")
    if options.certify:
        from benchmarks.attention import certify
        from train.parallel.runtime import make_cpu_devices

        # A ring needs several devices; on a CPU they are virtual, and must be set up before JAX starts.
        make_cpu_devices(8)
        compilers = {"tpu": options.tpu_python, "gpu": options.gpu_python}
        if certify.run(compilers={name: python for name, python in compilers.items() if python})["failed"]:
            raise UserError("attention: an error against float64 exceeds its limit; see the table")
    if options.speed:
        from benchmarks.attention import speed

        speed.run(options.rounds)
    if options.length:
        from benchmarks.attention import length

        length.run(options.budget, options.last)
    if options.long:
        from benchmarks.attention import long

        long.run(options.long)
    if options.support:
        from benchmarks.attention import support

        print(support.table())


def _history(options: argparse.Namespace) -> None:
    from benchmarks.history import run
    from train.parallel.runtime import set_up_devices

    set_up_devices()
    given = {
        name: getattr(options, name) for name in ("models", "parameters", "steps", "data", "seed", "directory")
    }  # fmt: skip
    given["models"] = _names(given["models"])
    run.run(**{name: value for name, value in given.items() if value is not None})


def _mechanisms(options: argparse.Namespace) -> None:
    from benchmarks import mechanisms
    from train.parallel.runtime import set_up_devices

    set_up_devices()
    given = {"minutes": options.minutes, "tasks": _names(options.tasks), "directory": options.directory}
    mechanisms.run(**{name: value for name, value in given.items() if value is not None})


def _pretraining(options: argparse.Namespace) -> None:
    from benchmarks import pretraining
    from train.parallel.runtime import set_up_devices

    set_up_devices()
    pretraining.run(options.seeds, options.directory or pretraining.DIRECTORY)


def _finetuning(options: argparse.Namespace) -> None:
    from benchmarks.encoders import quality
    from train.parallel.runtime import set_up_devices

    set_up_devices()
    quality.run(options.seeds, options.directory or quality.DIRECTORY)


def _resume(options: argparse.Namespace) -> None:
    from benchmarks.robustness import resume

    resume.run(options.kills, options.directory or resume.DIRECTORY)


def _soak(options: argparse.Namespace) -> None:
    from benchmarks.robustness import soak

    soak.run(options.steps, options.directory or soak.DIRECTORY)


def _suite(options: argparse.Namespace) -> None:
    from benchmarks.robustness import suite

    suite.run(options.fast)


def _sharding(options: argparse.Namespace) -> None:
    if options.target is not None:
        import jax

        from benchmarks.sharding.measuring import traffic

        # Only shapes are traced here; nothing runs.
        jax.config.update("jax_platforms", "cpu")
        traffic.run(
            options.config, options.target, overrides=tuple(options.overrides), strategies=_names(options.strategies),
            vary=options.vary, python=options.compiler_python, install=options.install, output=options.directory,
        )  # fmt: skip
        return
    from benchmarks.sharding.measuring import measure
    from train.parallel.runtime import set_up_devices

    set_up_devices(options.devices)
    measure.run(
        options.config, overrides=tuple(options.overrides), strategies=_names(options.strategies), vary=options.vary,
        rounds=options.rounds, output=options.directory,
    )  # fmt: skip


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _plan(options: argparse.Namespace) -> None:
    if options.validate:
        from benchmarks.sharding.validation import validate

        if options.config or options.target or options.overrides:
            raise UserError("plan: --validate has its own cases, and takes no config, target or field")
        validate.run()
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

        names = list(dict.fromkeys(_names(options.compare) or []))
        kinds = list(dict.fromkeys(parse_target(name).kind for name in names))
        prices = parse_prices(options.price, kinds)
        compare.run(
            options.config, names, overrides=tuple(options.overrides), how=how, goal=goal, prices=prices,
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


def _calibrate(options: argparse.Namespace) -> None:
    from benchmarks.sharding.validation import calibrate

    calibrate.run(options.out)


def _gpu(options: argparse.Namespace) -> None:
    from benchmarks import gpu

    gpu.run()


def _report(options: argparse.Namespace) -> None:
    from benchmarks.report import report

    print(report())


def _positive(text: str) -> int:
    if not is_number(text.strip()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: 1 or more")
    return int(text)


def _amount(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a number above 0, such as 3e11")
    return number


if __name__ == "__main__":
    sys.exit(main())
