"""What can go wrong with the model. Every message says: expected, found, do."""


class ModelError(Exception):
    """Base of every error this package raises on purpose."""


class PromptTooLong(ModelError, ValueError):
    """The prompt and the room asked for its answer do not fit the context."""


class GrammarError(ModelError, ValueError):
    """The grammar is wrong, unsupported, or would cost too much to follow."""


class TooLate(ModelError):
    """The deadline passed before the whole result was there."""


class EngineClosed(ModelError):
    """The engine has been closed: it takes no more work."""


class BuildError(ModelError):
    """The model file could not be fetched, verified, built or opened."""
