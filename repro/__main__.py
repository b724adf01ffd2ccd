"""The command line: `repro COMMAND ...`; each command is imported when it is chosen."""

from __future__ import annotations

import difflib
import errno
import gc
import importlib
import os
import select
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TextIO

from repro import __doc__ as PURPOSE
from repro.allocator import preload
from repro.commands import COMMANDS, ELSEWHERE, INPUT_ERROR, SIGNALLED
from repro.commands.terminal import coloured, printable
from repro.errors import InputError, Interrupted, RunStopped
from repro.masking import learn, learn_flags, masked, print_exception
from repro.provenance import versions

STOPPED = 3
INTERRUPTED = 130
UNREAD = SIGNALLED + signal.SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0 done; 1 a target was missed, or an image could not be captioned; 2 the input cannot be used
        or tells nothing; 3 training cannot go on; 130 and 143 stopped by SIGINT and SIGTERM. `program` adds 141:
        nobody reads the output any more.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    learn(os.environ.get("HF_TOKEN"))
    learn_flags(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print(f"usage: repro COMMAND ...\n\n{PURPOSE}\n\ncommands:")
        print(*(f"  {name:{width}}  {text}" for name, text in COMMANDS.items()), sep="\n")
        print("\n`repro COMMAND --help` describes a command.")
        return 0 if arguments else INPUT_ERROR
    if arguments[0] == "--version":
        print(", ".join(f"{name} {version}" for name, version in versions().items()))
        return 0
    try:
        if arguments[0] not in COMMANDS:
            near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise InputError(f"unknown command {arguments[0]!r}.{hint} `repro --help` lists them.")
        module, function = ELSEWHERE.get(arguments[0], (arguments[0], "main"))
        command = getattr(importlib.import_module(f"repro.commands.{module}"), function)
        return int(command(arguments[1:]))
    except InputError as error:
        _say(f"error: {error}")
        return INPUT_ERROR
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):  # which only a name that was given can be
            raise
        _say(f"error: {error.filename}: {error.strerror}")
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
    text = "\n".join(printable(line, sys.stderr) for line in masked(message).split("\n"))
    print(coloured(text, sys.stderr), file=sys.stderr)


def _is_unread(stream: TextIO) -> bool:
    """Tell whether a stream is a pipe that nobody reads any more, as after `| head`."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def program() -> None:
    """Run a command and end the process.

    Where a signal stopped it, or an upload hangs, this is done at once: threads that are still at work in XLA, Arrow or
    the network crash an interpreter that is taken down around them, and the status would be SIGSEGV's, or hold it up.
    All that is to be kept is on disk by then.
    """
    preload()
    sys.excepthook = print_exception
    try:
        try:
            status = main()
        except SystemExit as end:  # argparse's, after `--help`, which it prints without a word about a failure
            status = UNREAD if _is_unread(sys.stdout) else int(end.code or 0)
        sys.stdout.flush()  # here, since a failure when Python ends would be reported
    except BrokenPipeError:
        if not _is_unread(sys.stdout) and not _is_unread(sys.stderr):
            raise  # a connection's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still holds
        status = UNREAD
    jax = sys.modules.get("jax")
    # An upload (`repro.record.hub`) has been given up, since all of the run is done.
    uploads = any(thread.name == "hub" for thread in threading.enumerate())
    ends_now = uploads or status in (INTERRUPTED, SIGNALLED + signal.SIGTERM)
    # The other processes of a run wait for a proper end.
    if ends_now and not (jax and jax.distributed.is_initialized()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    gc.freeze()  # or Python looks for garbage among a million objects of libraries before it ends, for a second
    sys.exit(status)


if __name__ == "__main__":
    program()
