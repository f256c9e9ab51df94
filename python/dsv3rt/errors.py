"""Errors that dsv3rt raises beside ValueError and TypeError."""


class BackendUnavailableError(RuntimeError):
    """A CUDA tensor reached an op whose kernel is not in this installation."""
