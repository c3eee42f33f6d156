"""How the commands of the service end: one line of what went wrong, and the exit code that it is."""

import sys
from collections.abc import Callable

from assay_platform.errors import AssayError, InputError


def exit_code(command: Callable[[], None]) -> int:
    """Run a command: 0, 2 for what was asked wrongly, 1 for work that failed, 130 for Ctrl-C before it had begun."""
    try:
        command()
    except AssayError as error:
        sys.stderr.write(f"assay: {error}\n")
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        return 130
    return 0
