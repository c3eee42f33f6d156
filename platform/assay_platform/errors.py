"""The exceptions that Assay raises on purpose.

    AssayError
    ├── InputError            the call or its input is wrong: exit code 2, HTTP 422
    │   ├── ConfigError         assay.toml or a command-line value
    │   ├── SchemaError         the schema file
    │   └── DataError           a table: names the file, the column and the first bad row
    └── WorkError             the input was fine, the work failed: exit code 1
        ├── DownloadError       a data set could not be fetched or verified
        ├── StorageError        a disk is full, a file cannot be written
        ├── RegistryError       a model, version or alias is missing or not acceptable
        │   └── GateRefusedError  a version did not pass the gate of promotion
        ├── ArtifactError       a model artifact is damaged or of another format
        ├── ClusterError        Ray could not be started or reached, or a job failed
        │   └── JobLostError      the node that a job ran on was lost
        └── TaskError           a dispatched task has no result
            ├── TaskLostError     its workers died, more often than it may be retried
            └── TaskLateError     it was not done by its deadline

A message is one sentence or two for a person: what was wrong, where, and what is allowed. Everything else
that escapes is a bug of ours and keeps its traceback.
"""


class AssayError(Exception):
    """Base of every error that Assay raises on purpose."""


class InputError(AssayError):
    """The call or its input is wrong."""


class ConfigError(InputError):
    """A setting has a value that is not allowed."""


class SchemaError(InputError):
    """The schema file does not say what a schema file has to say."""


class DataError(InputError):
    """A table does not fit its schema."""


class WorkError(AssayError):
    """The work failed although the input was acceptable."""


class DownloadError(WorkError):
    """A data set could not be fetched or is not the one that was pinned."""


class StorageError(WorkError):
    """A file could not be written or read."""


class RegistryError(WorkError):
    """A model, a version or an alias is missing."""


class GateRefusedError(RegistryError):
    """A version did not pass the gate of promotion."""


class ArtifactError(WorkError):
    """A model artifact is damaged, incomplete or of an unknown format."""


class ClusterError(WorkError):
    """Ray could not be started or reached, or a submitted job failed."""


class JobLostError(ClusterError):
    """The node that a job ran on was lost, and the job with it."""


class TaskError(WorkError):
    """A dispatched task has no result, and its own code did not say why."""


class TaskLostError(TaskError):
    """The workers that ran a task died, more often than it may be retried."""


class TaskLateError(TaskError):
    """A task was not done by its deadline."""
