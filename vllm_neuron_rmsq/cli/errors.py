"""The error of the command line."""


class CommandError(Exception):
    """A command cannot do what was asked; the message says why and what to do. Shown without a trace."""
