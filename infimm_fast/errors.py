"""Typed errors of the model, the processor and the converter. All are `ValueError`s with one sentence of text."""


class ImageInputError(ValueError):
    """A picture cannot be read or has an unusable size."""


class ImageCountError(ValueError):
    """The number of ``<image>`` tokens and the number of images do not fit together."""


class PromptError(ValueError):
    """A prompt is empty or not text."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit the configuration."""


class ConfigurationError(ValueError):
    """A configuration value is not accepted."""


class FoldError(ValueError):
    """A gated block cannot be folded for inference, or no longer fits its folded weights."""
