"""The errors that a user can cause.

Entry points catch `MlxZhError`, print it as one paragraph and exit with status 2. Any other exception is a bug: its
traceback goes to a file, and the status is 70.
"""


class MlxZhError(Exception):
    """Base class. The message says what is wrong, where, what was got and what to do."""


class RecipeError(MlxZhError):
    """A recipe or a command-line override that cannot be used."""


class DataError(MlxZhError):
    """A data file, or a row in it, that cannot be used."""


class TemplateError(MlxZhError):
    """A chat template that fails to render, or renders parts of a conversation inconsistently."""


class RefusedByTemplate(TemplateError):
    """A chat template that refuses the roles or the content of one conversation."""

    reason = "refused by the chat template"  # under which such rows are counted


class RefusedTools(RefusedByTemplate):
    """A conversation with tools that a chat template cannot write."""

    reason = "tool message"


class RefusedReasoning(RefusedByTemplate):
    """A conversation with reasoning that the model would not write after this chat template."""

    reason = "separate reasoning"


class ModelError(MlxZhError):
    """A model that is missing, or that cannot be read or run."""


class AdapterError(MlxZhError):
    """An adapter that is missing, damaged or made for another model."""


class PlanError(MlxZhError):
    """A run that needs more memory than there is."""


class DeviceError(MlxZhError):
    """An accelerator that gives up the same work again and again."""


class TrainingError(MlxZhError):
    """A training run whose numbers show that something is wrong."""


class UploadError(MlxZhError):
    """A model that could not be uploaded to a hub."""


class PlacingError(MlxZhError):
    """A model that could not be given to Ollama or LM Studio."""


class DownloadError(MlxZhError):
    """A file that could not be downloaded, or whose content is not the expected one."""


class StorageError(MlxZhError):
    """A full disk, or a file or folder that cannot be read or written."""


class ServerError(MlxZhError):
    """A server that cannot listen, or a request that it cannot answer."""


class JudgeError(MlxZhError):
    """A model that was to judge answers and cannot be asked, or that gives no answer."""


class RefusedByJudge(JudgeError):
    """A question that a judge refuses; it may answer others."""


class DistributedError(MlxZhError):
    """Ranks that cannot connect or do not agree, or a rank that is gone."""


def first_line(error: BaseException) -> str:
    """The first line of a library error's message, or the name of its class when the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class StudioError(MlxZhError):
    """A studio that cannot start, or a page of it that cannot be shown."""
