"""What a user can repair.

Every error here is shown as one sentence on stderr and ends the program with exit code 2: it says the
name of what is wrong, the value that was found and the value that would be right. A mistake in a call from
Python (shapes that disagree, say) is a plain ``ValueError``; a broken promise of ours is an ``assert``.
"""


class RwkvTrainError(Exception):
    """A problem that the user can repair; the message names the fix."""


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
