"""Every error and warning that peft raises on purpose.

PeftError
├── NoMatchingPeftModuleError   no module of the model matches the config's targets   (also ValueError)
├── ConfigError                 a config field has a wrong value                       (also ValueError)
├── AdapterError                an adapter is used in a state that does not allow it   (also ValueError)
├── MergeError                  a merge would not keep the model's outputs             (also ValueError)
└── CheckpointError             an adapter file cannot be read, trusted or written     (also ValueError)
    ├── AdapterMismatchError    its tensors do not fit the model's adapter             (also RuntimeError)
    └── BaseMismatchError       it was trained on another base model
PeftWarning (UserWarning)       something works, but probably not as meant
"""


class PeftError(Exception):
    """Root of all errors that peft raises on purpose."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """No module or parameter of the model matches what the config targets."""


class ConfigError(PeftError, ValueError):
    """A config field has a value of the wrong type or out of range; the message names the field."""


class AdapterError(PeftError, ValueError):
    """An adapter is unknown, already there, or in a state that does not allow the call."""


class MergeError(PeftError, ValueError):
    """A merge would lose or change what the adapter does."""


class CheckpointError(PeftError, ValueError):
    """An adapter file cannot be read, trusted or written; the message names the file."""


class AdapterMismatchError(CheckpointError, RuntimeError):
    """The tensors of an adapter file do not fit the adapter's slots in the model."""


class BaseMismatchError(CheckpointError):
    """The adapter was trained on another base model than the one it is loaded onto."""


class PeftWarning(UserWarning):
    """Something works, but probably not as meant."""


def nearest(name, known, n=3):
    """`known` names that look most like `name`, as text for an error message."""
    import difflib

    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=n, cutoff=0.3)
    return ", ".join(close) if close else "none is close"
