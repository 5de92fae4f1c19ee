"""Typed errors of exporters, artifacts and runners. All are `ValueError`s with one sentence of text."""


class ExportError(ValueError):
    """An export was asked for that cannot be made."""


class ArtifactError(ExportError):
    """A folder is no artifact of this version, or is damaged."""


class ProviderError(ExportError):
    """A runtime's provider is missing, or does not take the artifact."""


class LimitError(ExportError):
    """An input lies outside the shapes that an artifact declares."""


class VerificationError(ExportError):
    """An exported graph is not what it should be; the subclasses say in which way."""


class InvalidGraphError(VerificationError):
    """The ONNX checker or shape inference refuses a graph."""


class ShapeError(VerificationError):
    """A result has another shape or dtype than declared."""


class AxisError(VerificationError):
    """An axis that should be free is fixed in the graph, or has another name."""


class ToleranceError(VerificationError):
    """A result lies outside the error budget."""


class MissingKernelError(VerificationError):
    """A runtime has no kernel for a node."""
