"""The console script `obm`: one verb, its arguments, one clear line for a user's mistake.

Only the chosen verb's module is imported, and that imports torch only when it runs, so that every
`--help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from train.libraries import keep_to_ourselves, load_quickly

VERBS = {
    "demo": "the whole story on the embedded world: calibrate, merge, evaluate, train, compare",
    "atlas": "the embedded world: train its tiny checkpoints, or print what its search finds",
    "calibrate": "second moments of each parent's linear inputs, which OBM needs",
    "merge": "merge base, VLM and agent into one checkpoint",
    "diagnose": "the geometry of task vectors: sparsity, overlap, spectrum, and what suits them",
    "tune": "tune the merge of every method on held-out questions, all as hard",
    "sport": "tune a checkpoint on better and worse steps of its own (SPORT), before GRPO",
    "sft": "cold start: teach a checkpoint from a solver's episodes, before GRPO",
    "train": "train a checkpoint by GRPO on multi-step search, under DeepSpeed",
    "eval": "evaluate a checkpoint on held-out questions",
    "compare": "floor, ceiling and curves of finished runs, as tables and a picture",
    "watch": "the status of a run that goes on elsewhere, as the training itself shows it",
    "follow": "how a run's episodes on chosen questions changed from evaluation to evaluation",
    "view": "episodes of runs as one page: filter, read, two side by side, over training",
    "index": "build an index over passages or pictures, for search and for serve",
    "serve": "serve text and image search over HTTP, as Search-R1's server does",
    "study": "several starts times several seeds, then the comparison",
    "cache": "the cache of tool results: export, import, stats, prune",
    "bench": "measure what the documentation promises",
    "doctor": "versions, cores, memory, devices, disk, logins, and what is missing",
    "init": "copy a shipped configuration to start from",
}
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0, or 2 for a user's mistake, or what the verb returns.

    Raises:
        Exception: what is no user's mistake keeps its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if arguments else EXIT_USER_ERROR
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"obm-warmstart {version('obm-warmstart')}")
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(VERBS)}"
        return _fail(f"there is no verb {verb!r}; {hint}")
    load_quickly()
    keep_to_ourselves()
    module = importlib.import_module(f"launch.commands.{verb}")
    # Intermixed, so that overrides may stand before, between and after the options.
    options = build_parser(verb, module).parse_intermixed_args(_at_home(arguments[1:]))
    try:
        return int(module.run(options) or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`obm ... | head`) has gone; that is no error of ours.
        sys.stderr.close()
        return 0
    except Exception as error:
        # Errors that carry an exit code say all there is to say; any other is a fault of ours.
        code = getattr(error, "exit_code", None)
        if options.debug or not isinstance(code, int):
            raise
        return _fail(str(error), code)


def overview() -> str:
    """What `obm --help` prints."""
    width = max(map(len, VERBS))
    lines = ["usage: obm VERB [--config FILE] [key=value ...] [options]", "", "verbs:"]
    lines += [f"  {verb.ljust(width)}  {words}" for verb, words in VERBS.items()]
    lines += [
        "",
        "examples:",
        "  obm demo",
        "  obm merge --config configs/demo.yaml --output runs/merged merge.density=0.3",
        "",
        "`obm VERB --help` has each verb's options; docs/quickstart.md a first walk.",
    ]
    return "\n".join(lines)


def build_parser(verb: str, module: ModuleType) -> argparse.ArgumentParser:
    """The parser of one verb: its docstring as description, its EXAMPLES at the end."""
    examples = "\n".join(f"  {line}" for line in module.EXAMPLES)
    parser = argparse.ArgumentParser(
        prog=f"obm {verb}",
        description=module.__doc__,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="full traceback on every error")
    return parser


def _at_home(arguments: Sequence[str]) -> list[str]:
    """`--output=~/x` as a shell reads `--output ~/x`; with the equals sign it leaves the `~`."""
    split = [argument.partition("=") for argument in arguments]
    return [
        name + equals + (os.path.expanduser(value) if name.startswith("--") else value)
        for name, equals, value in split
    ]


def _fail(message: str, code: int = EXIT_USER_ERROR) -> int:
    from train.terminal import spelt_out

    one_line = " ".join(message.split())
    print(f"error: {spelt_out(one_line)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
