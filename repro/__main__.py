"""The command line: `repro COMMAND ...`; each command is imported when it is chosen."""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from repro import __doc__ as PURPOSE
from repro.commands import COMMANDS, INPUT_ERROR, SIGNALLED
from repro.commands.terminal import printable
from repro.errors import InputError, Interrupted, RunStopped
from repro.masking import learn, learn_flags, masked, print_exception
from repro.provenance import versions

STOPPED = 3
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0 done; 1 a target was missed, or an image could not be captioned; 2 the input cannot be used
        or tells nothing; 3 training cannot go on; 130 and 143 stopped by SIGINT and SIGTERM; 141 nobody reads the
        captions any more.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    learn(os.environ.get("HF_TOKEN"))
    learn_flags(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else INPUT_ERROR
    if arguments[0] == "--version":
        print(", ".join(f"{name} {version}" for name, version in versions().items()))
        return 0
    try:
        if arguments[0] not in COMMANDS:
            near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise InputError(f"unknown command {arguments[0]!r}.{hint} `repro --help` lists them.")
        command = importlib.import_module(f"repro.commands.{arguments[0].replace('-', '_')}")
        return int(command.main(arguments[1:]))
    except InputError as error:
        _say(f"error: {error}")
        return INPUT_ERROR
    except RunStopped as error:
        _say(f"stopped: {error}")
        return STOPPED
    except Interrupted as error:
        print(error, file=sys.stderr)
        return SIGNALLED + error.signum
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _say(message: str) -> None:
    """Print on standard error; names in a message may hold anything."""
    print("\n".join(printable(line, sys.stderr) for line in masked(message).split("\n")), file=sys.stderr)


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    return (
        f"usage: repro COMMAND ...\n\n{PURPOSE}\n\ncommands:\n{commands}\n\n`repro COMMAND --help` describes a command."
    )


def program() -> None:
    """Run a command and end the process.

    Where a signal stopped it, this is done at once: threads of XLA or Arrow that are still at work crash an interpreter
    that is taken down around them, and the status would be SIGSEGV's. All that is to be kept is on disk by then.
    """
    # transformers 5 says at every start that PyTorch is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    sys.excepthook = print_exception
    status = main()
    jax = sys.modules.get("jax")
    # The other processes of a run wait for a proper end.
    if status in (INTERRUPTED, SIGNALLED + signal.SIGTERM) and not (jax and jax.distributed.is_initialized()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    program()
