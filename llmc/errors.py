"""The errors a user can meet. Each is one sentence that says what was asked, what was found, where, and what to do.

The command line prints ``str(error)`` and leaves with ``error.exit_code``; library users catch :class:`LlmcError`.
"""

from __future__ import annotations


class LlmcError(Exception):
    """Base of every error that is the user's to act on. ``exit_code`` is the process exit status of the command line."""

    exit_code = 1


class UsageError(LlmcError):
    """A flag or argument that cannot be meant: unknown target, contradicting options."""

    exit_code = 2


class ModelError(LlmcError):
    """The model could not be read: missing path, not a model, truncated file, NaN weights, hub unreachable."""

    exit_code = 3


class UnsupportedError(LlmcError):
    """The model was read, but it holds something llmc cannot compile. The message lists every such thing at once."""

    exit_code = 4


class ArtifactError(LlmcError):
    """The artifact is missing, damaged, or was built by another version or for another machine."""

    exit_code = 5


class OutputError(LlmcError):
    """The result could not be written: disk full, read-only place, another compile is writing there."""

    exit_code = 6


class RequestError(LlmcError):
    """A generation request that cannot be served: prompt longer than the context, out of pages, bad sampling values."""

    exit_code = 7


class MissingExtraError(LlmcError):
    """A feature needs packages that are not installed. The message holds the exact pip command."""

    exit_code = 8


class InternalError(LlmcError):
    """A compiler invariant does not hold: a defect in llmc, never the user's fault."""

    exit_code = 70
