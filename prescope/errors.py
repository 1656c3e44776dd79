"""Every error a user can cause, each with the remedy in its message.

A broken invariant of prescope itself is an `assert`, never one of these.
"""


class PrescopeError(Exception):
    """Base of all errors prescope raises on purpose."""


class NotAMoE(PrescopeError):
    """The model has no MoE layer that goes through transformers' experts interface."""


class UnsupportedExperts(PrescopeError):
    """The experts' weights are in a form that prescope cannot move one by one, or are asked for while it has them."""


class SlotPoolTooSmall(PrescopeError):
    """Fewer slots than one token of one layer needs at once."""


class SlotPoolTooLarge(PrescopeError):
    """The slots do not fit into the memory of the device."""


class BadModelFolder(PrescopeError):
    """A model folder is missing, incomplete, truncated or corrupt."""


class AlreadyAttached(PrescopeError):
    """The model runs through another engine that is in use."""


class NotAttached(PrescopeError):
    """The engine has been detached (or never was attached)."""


class ForkedProcess(NotAttached):
    """The engine belongs to the process that this one was forked from."""


class WaitTimedOut(PrescopeError, TimeoutError):
    """A copy, a computation or a thread did not come to its end in many times the time that it takes."""


class NotEnoughMemory(PrescopeError):
    """The experts do not fit into host memory or may not be pinned there, or memory ran out in the middle of a run."""


class TraceMismatch(PrescopeError):
    """A routing trace (or what was learned from it) belongs to another model."""


class BadTrace(PrescopeError):
    """A routing trace cannot be read, or lacks what was asked of it."""


class CannotWrite(PrescopeError, OSError):
    """A file cannot be written: no space, no permission, or something else of that name."""


class TransferFailed(PrescopeError):
    """Copying an expert's weights to its slot failed."""


class BadProfile(PrescopeError):
    """A hardware profile cannot be read, or lacks what was asked of it."""


class NoProfile(PrescopeError):
    """This machine has not been calibrated."""


class ForeignProfile(PrescopeError):
    """A hardware profile was measured on another machine, so no engine may be planned by it."""


class UnsupportedOption(PrescopeError, ValueError):
    """A value of a setting that this machine, model or version cannot serve."""


class BadSweep(PrescopeError):
    """A sweep cannot be read, is about something else than asked for, or is run by somebody else."""
