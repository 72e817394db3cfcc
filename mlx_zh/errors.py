"""Every error that a user can cause, as one small tree.

Entry points catch `MlxZhError`, print it as one paragraph and exit with status 2; anything else is a bug and
keeps its traceback.
"""


class MlxZhError(Exception):
    """Base class. The message says what is wrong, where, what was found and what to do."""


class RecipeError(MlxZhError):
    """A recipe or a command-line override that cannot be used."""


class DataError(MlxZhError):
    """A data file, or a row in it, that cannot be used."""


class TemplateError(MlxZhError):
    """A chat template that does not render, or does not render consistently."""


class ModelError(MlxZhError):
    """A model that cannot be found, read or run."""


class AdapterError(MlxZhError):
    """An adapter that is missing, damaged or made for another model."""


class PlanError(MlxZhError):
    """A run that needs more memory than there is."""


class TrainingError(MlxZhError):
    """A run whose figures show that it cannot be right."""


class UploadError(MlxZhError):
    """A model that could not be put on a hub."""


class DownloadError(MlxZhError):
    """A file that could not be obtained, or that is not the one that was expected."""


class StorageError(MlxZhError):
    """A disk that is full, or a folder that cannot be written."""


class DistributedError(MlxZhError):
    """Machines that do not find each other, or do not agree, or one that is gone."""


def first_line(error: BaseException) -> str:
    """What a library's error says in its first line; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
