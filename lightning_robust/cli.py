"""The command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lightning_robust import __version__
from lightning_robust.errors import ConfigError, RobustError

_TRAINER_COMMANDS = {
    "fit": "train with a recipe, defend, monitor and report",
    "validate": "evaluate a checkpoint on the validation data, monitors included",
    "test": "evaluate a checkpoint on the test data, monitors included",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, or 1 after a fault that the user can mend."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    try:
        if arguments and arguments[0] in _TRAINER_COMMANDS:
            from lightning_robust.commands.train import run_trainer

            return run_trainer(arguments)
        return _run(_parser().parse_args(arguments))
    except RobustError as error:
        err.print(f"error: {error}")
    except BrokenPipeError:
        # The reader, `head` for instance, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        err.print("Interrupted.")
    return 1


def _run(options: argparse.Namespace) -> int:
    out = Console(highlight=False)
    if options.command in ("ls", "cp", "show"):
        from lightning_robust.commands import assets

        if options.command == "ls":
            {"attacks": assets.ls_attacks, "defenses": assets.ls_defenses}.get(options.what, assets.ls)(out)
        elif options.command == "show":
            assets.show(out, options.name)
        else:
            assets.cp(out, options.name, options.destination, options.force)
    elif options.command == "check":
        from lightning_robust.assets import find_asset
        from lightning_robust.commands.check import check_recipe

        faults = check_recipe([find_asset(name) for name in options.names])
        if faults:
            raise ConfigError("\n  ".join([f"{len(faults)} fault{'s' if len(faults) > 1 else ''}:", *faults]))
        out.print("No fault found.")
    elif options.command == "evaluate":
        from lightning_robust.commands.evaluate import evaluate

        evaluate(out, options)
    elif options.command == "attack":
        from lightning_robust.commands.attack import attack

        attack(out, options)
    elif options.command == "report":
        _check_margin(options.margin)
        from lightning_robust.commands.reading import reading
        from lightning_robust.results import write_report

        settings = {"baseline": options.baseline, "select": options.select, "margin": options.margin / 100}
        with reading("Making the report") as progress:
            path = write_report(options.runs, options.output, progress=progress, **settings)
        out.print(f"Report: {path}", soft_wrap=True)
    elif options.command == "compare":
        _check_margin(options.margin)
        from lightning_robust.commands.compare import compare

        compare(out, options)
    elif options.command == "power":
        from lightning_robust.commands.power import power

        power(out, options)
    return 0


def _check_margin(margin: float) -> None:
    if not 0 < margin < 100:
        raise ConfigError(f"Expected --margin to be between 0 and 100 points, but got {margin:g}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-robust",
        description="Language-model classifiers that are robust to attacks and to distribution shift.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in _TRAINER_COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    ls = commands.add_parser("ls", help="list recipes and fragments, attacks or defenses")
    ls.add_argument(
        "what", nargs="?", choices=["attacks", "defenses"], help="by default recipes and fragments"
    )
    show = commands.add_parser("show", help="print a recipe or fragment")
    show.add_argument("name", help="bare name or file")
    cp = commands.add_parser("cp", help="copy a recipe or fragment to edit it")
    cp.add_argument("name", help="bare name or file")
    cp.add_argument("destination", nargs="?", help="file or folder; by default the working folder")
    cp.add_argument("--force", action="store_true", help="replace an existing file")
    check = commands.add_parser("check", help="find all faults of a recipe at once")
    check.add_argument("names", nargs="+", metavar="NAME", help="a recipe, then fragments")
    _add_evaluate(
        commands.add_parser("evaluate", help="clean, adversarial and OOD report of a trained model")
    )
    _add_attack(commands.add_parser("attack", help="attack a text or a file and show what is found"))
    _add_report(commands.add_parser("report", help="make a self-contained HTML page of runs or a study"))
    _add_compare(commands.add_parser("compare", help="two runs side by side, with intervals"))
    _add_power(commands.add_parser("power", help="how many items and seeds an effect needs to be seen"))
    return parser


def _page(text: str) -> Path:
    # A path forgets the separator at its end, which says that a folder is meant.
    return Path(text) / "report.html" if text.endswith(("/", os.sep)) else Path(text)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", type=Path, help="folder with records, or a folder of runs"
    )
    parser.add_argument(
        "-o", "--output", default="report.html", type=_page, help="file to write; report.html in a folder"
    )
    _add_baseline(parser)
    _add_select(parser)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("baseline", metavar="RUN_A", type=Path, help="folder of a run, or of its seeds")
    parser.add_argument("treated", metavar="RUN_B", type=Path, help="the same, compared with RUN_A")
    _add_select(parser)


def _add_power(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        type=Path,
        help="runs whose spread to take; by default it is assumed",
    )
    parser.add_argument("--effect", type=float, default=2.0, help="points of accuracy to see (default: 2)")
    parser.add_argument(
        "--power", type=float, default=80.0, help="probability of seeing it, %% (default: 80)"
    )
    parser.add_argument(
        "--changed",
        type=float,
        default=10.0,
        help="assumed: answers that a defense changes, %% (default: 10)",
    )
    parser.add_argument(
        "--seed-spread",
        type=float,
        default=1.0,
        help="assumed: standard deviation of training runs in points (default: 1)",
    )
    _add_baseline(parser)


def _add_baseline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--baseline", default=None, metavar="NAME", help="what to compare with, where it is not clear"
    )


def _add_select(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--select",
        default="last",
        choices=("last", "clean", "joint", "oracle"),
        help="which evaluation of each run counts (default: last)",
    )
    parser.add_argument(
        "--margin", type=float, default=1.0, help="points that count as no change (default: 1)"
    )


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Lightning checkpoint (.ckpt), export folder or hub model")
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        default=[],
        metavar="NAME",
        help="recipe or fragment whose data and monitor to use",
    )
    parser.add_argument("--clean", metavar="FILE", help="in-distribution items")
    for role, text in (("ood", "shifted items"), ("adversarial", "items of a static adversarial benchmark")):
        parser.add_argument(
            f"--{role}", action="append", default=[], metavar="NAME=FILE", help=f"{text}; repeatable"
        )
    parser.add_argument(
        "--attack", action="append", default=None, metavar="NAME", help="repeatable; by default deepwordbug"
    )
    _add_setting(parser)
    parser.add_argument("--no-attack", action="store_true", help="static environments only")
    parser.add_argument("--num-examples", type=int, default=None, help="clean items to attack (default: 200)")
    parser.add_argument("--query-budget", type=int, default=None, help="queries that one search may make")
    parser.add_argument(
        "--time-budget", type=float, default=None, metavar="SECONDS", help="that all attacks may take"
    )
    parser.add_argument(
        "--autocast", default=None, metavar="TYPE", help="compute in bfloat16 or float16, which is faster"
    )
    parser.add_argument(
        "--seed", type=int, default=None, help="of the attacked sample and the attacks (default: 0)"
    )
    parser.add_argument(
        "--max-length", type=int, default=None, help="tokens kept of a text, for hub models (default: 128)"
    )
    parser.add_argument("-o", "--output", default=None, type=Path, help="folder of records and report.html")


def _add_attack(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Attacks the texts given by --text or --file, those on standard input, one a line, or those that you "
        "type. Without a label, what the model predicts counts as right."
    )
    parser.add_argument("model", help="Lightning checkpoint (.ckpt), export folder or hub model")
    parser.add_argument("--text", action="append", default=[], help="what to attack; twice for a pair")
    parser.add_argument("--label", default=None, help="right class, its name or number")
    parser.add_argument("--file", default=None, help="csv, tsv, json, jsonl or parquet; labels are optional")
    parser.add_argument(
        "--attack",
        action="append",
        default=None,
        metavar="NAME",
        help="see lightning-robust ls attacks; repeatable; by default deepwordbug",
    )
    _add_setting(parser)
    parser.add_argument("--num-examples", type=int, default=None, help="size of a random sample of the file")
    parser.add_argument("--query-budget", type=int, default=None, help="queries that one search may make")
    parser.add_argument("--seed", type=int, default=0, help="of the sample and the attacks (default: 0)")
    parser.add_argument(
        "--max-length", type=int, default=None, help="tokens kept of a text, for hub models (default: 128)"
    )
    parser.add_argument(
        "-o",
        "--output",
        default=None,
        type=Path,
        help="file of results, one JSON line each; an interrupted command goes on from it",
    )


def _add_setting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of all attacks, or ATTACK.KEY=VALUE of one; repeatable",
    )


if __name__ == "__main__":
    sys.exit(main())
