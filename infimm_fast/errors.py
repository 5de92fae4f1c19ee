"""Typed errors of the model, the processor and the converter. All are `ValueError`s with one sentence of text."""


class UserError(ValueError):
    """What all of them are: something in the user's input, not a bug; the command line prints it as one line."""


class ImageInputError(UserError):
    """A picture cannot be read or has an unusable size."""


class ImageCountError(UserError):
    """The number of ``<image>`` tokens and the number of images do not fit together."""


class PromptError(UserError):
    """A prompt is empty or not text."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, or does not fit the configuration."""


class ConfigurationError(UserError):
    """A configuration value is not accepted."""


class FoldError(UserError):
    """A gated block cannot be folded for inference, or no longer fits its folded weights."""
