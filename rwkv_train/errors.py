"""What a user can repair.

Every error here is shown as one sentence on stderr and ends the program with its exit code, 2 as a rule: it says
the name of what is wrong, the value that was found and the value that would be right. A mistake in a call from
Python (shapes that disagree, say) is a plain ``ValueError``; a broken promise of ours is an ``assert``.
"""


class RwkvTrainError(Exception):
    """A problem that the user can repair; the message names the fix."""

    exit_code: int = 2
    is_reported_elsewhere: bool = False
    """Set on an error that all processes of a run raise and another one of them prints."""


class ConfigError(RwkvTrainError):
    """A setting is unknown, has the wrong type, or does not fit the others."""


class DataError(RwkvTrainError):
    """Text, tokens or a corpus on disk cannot be used as they are."""


class CheckpointError(RwkvTrainError):
    """A file of weights or a training checkpoint cannot be read, written or used here."""


class BackendError(RwkvTrainError):
    """A backend of an operator cannot run this problem on this machine."""


class TrainingError(RwkvTrainError):
    """A run cannot go on: the loss or a tensor of the model is no longer finite."""


class LostProcessError(RwkvTrainError):
    """A process of the run ended, hangs or cannot be reached; nothing is to repair in the settings."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: the same command may be started again, and goes on from the last checkpoint."""
