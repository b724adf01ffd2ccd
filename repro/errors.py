"""The one exception that a user is meant to read."""

from __future__ import annotations


class InputError(Exception):
    """What the user gave cannot be used; the message names the value and the remedy.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """
