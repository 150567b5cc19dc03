"""`manyheads-bench`: benchmarks. Needs jax, flax, optax and numpy; peer and data packages only for comparisons."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

from benchmarks.arguments import amount, names, positive
from benchmarks.sharding import commands as sharding_commands
from train.commands.cli import message_of
from train.interrupt import exit_on_sigint
from transformer.errors import UserError

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
        sub.add_argument("--rounds", type=positive, default=rounds, help=f"turns of each candidate ({rounds})")
        sub.set_defaults(call=call)
        return sub

    sub = command("step", _step, "a training step compared with torch's, eager and compiled", rounds=7)
    sub.add_argument("--steps", type=positive, default=3, help="steps in a turn (3)")
    sub.add_argument(
        "--no-compiled-peer", action="store_true", help="leave torch.compile out (it needs a C++ compiler)"
    )
    text = "plain: chunks of text, next to torch; packed: eight documents a row; large: 1.3 billion parameters, on an accelerator"
    sub.add_argument("--case", choices=("plain", "packed", "large"), default="plain", help=text)
    sub = command(
        "finetuning-step", _finetuning_step, "a step of fine-tuning an encoder compared with torch's", rounds=7
    )
    sub.add_argument("--steps", type=positive, default=3, help="steps in a turn (3)")
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
    sub.add_argument("--devices", type=positive, default=8, metavar="N", help="number of virtual CPU devices (8)")
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
    sub.add_argument("--long", type=positive, metavar="T", help="run blockwise over T tokens, both passes, once")
    sub.add_argument("--budget", type=float, default=10.0, help="seconds a call may take under --length (10)")
    sub.add_argument("--last", type=positive, default=1 << 20, help="the longest sequence of --length (1048576)")
    sub.add_argument("--support", action="store_true", help="print the table of features of each backend")
    text = "attention through history: ten models trained on the same pairs at the same budget, and a report"
    sub = commands.add_parser("history", help=text, description=text)
    sub.set_defaults(call=_history)
    sub.add_argument("--models", metavar="A,B,C", help="comma-separated names (all)")
    sub.add_argument("--parameters", type=positive, metavar="N", help="number of parameters of each model (1000000)")
    sub.add_argument(
        "--steps", type=positive, metavar="N", help="training steps of each model, so all see the same tokens"
    )
    sub.add_argument("--data", metavar="DATA", help="verses, synthetic, or the path of a config of pairs (verses)")
    sub.add_argument("--seed", type=int, metavar="N", help="seed of weights, dropout and the order of the data (0)")
    sub.add_argument("--dir", dest="directory", metavar="DIR", help="where runs and figures are kept (runs/history)")
    text = "every mechanism of attention, trained from a config for the same time on the same data: one table"
    sub = commands.add_parser("mechanisms", help=text, description=text)
    sub.set_defaults(call=_mechanisms)
    sub.add_argument("--minutes", type=amount, metavar="N", help="minutes of training for each mechanism (2)")
    sub.add_argument("--tasks", metavar="A,B,C", help="tasks among language, translation, reviews and pairs (all)")
    sub.add_argument("--dir", dest="directory", metavar="DIR", help="where runs and figures are kept (runs/mechanisms)")
    text = "a classifier initialised from a pretrained encoder, compared with random initialisation"
    sub = commands.add_parser("pretraining", help=text, description=text)
    sub.set_defaults(call=_pretraining)
    sub.add_argument("--seeds", type=positive, default=5, metavar="N", help="runs of each, with seeds 0 to N - 1 (5)")
    sub.add_argument(
        "--dir", dest="directory", metavar="DIR", help="where runs and figures are kept (runs/pretraining)"
    )
    text = "a classifier fine-tuned here, by transformers, and here with low-rank adapters, from the same weights"
    sub = commands.add_parser("finetuning", help=text, description=text)
    sub.set_defaults(call=_finetuning)
    sub.add_argument("--seeds", type=positive, default=5, metavar="N", help="runs of each, with seeds 0 to N - 1 (5)")
    sub.add_argument("--dir", dest="directory", metavar="DIR", help="where runs and figures are kept (runs/finetuning)")
    text = "runs that are killed at random moments, and moved between devices and processes, held against whole ones"
    sub = commands.add_parser("resume", help=text, description=text)
    sub.set_defaults(call=_resume)
    sub.add_argument("--kills", type=positive, default=25, metavar="N", help="of each family on one device (25)")
    sub.add_argument("--dir", dest="directory", metavar="DIR", help="where runs are kept (runs/resume)")
    text = (
        "a long run with evaluations, checkpoints and samples: growth of its memory, open files, stalls by checkpoints"
    )
    sub = commands.add_parser("soak", help=text, description=text)
    sub.set_defaults(call=_soak)
    sub.add_argument("--steps", type=positive, default=2000, metavar="N", help="its steps (2000)")
    sub.add_argument("--dir", dest="directory", metavar="DIR", help="where the run is kept, a new folder (runs/soak)")
    text = "the time of the test suite with an empty compilation cache"
    sub = commands.add_parser("suite", help=text, description=text)
    sub.set_defaults(call=_suite)
    sub.add_argument("--fast", action="store_true", help="the quick half of the tests")
    sharding_commands.add_to(commands)
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
    given["models"] = names(given["models"])
    run.run(**{name: value for name, value in given.items() if value is not None})


def _mechanisms(options: argparse.Namespace) -> None:
    from benchmarks import mechanisms
    from train.parallel.runtime import set_up_devices

    set_up_devices()
    given = {"minutes": options.minutes, "tasks": names(options.tasks), "directory": options.directory}
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


def _gpu(options: argparse.Namespace) -> None:
    from benchmarks import gpu

    gpu.run()


def _report(options: argparse.Namespace) -> None:
    from benchmarks.report import report

    print(report())


if __name__ == "__main__":
    sys.exit(main())
