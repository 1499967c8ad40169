"""The exceptions a user of v4train is meant to see, and how a program shows them."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_FULL = "HYDRA_FULL_ERROR"
_wanted = os.environ.get(_FULL)  # before `errors_from_hydra` changes it


class ConfigError(ValueError):
    """Bad input: one line that names the key, the value, the rule it breaks and what to do about it.

    Programs print it and exit with code 2, before anything is allocated.
    """

    def __init__(self, key: str, value: object, rule: str, remedy: str) -> None:
        super().__init__(f"{key}={value}: {rule}; {remedy}")
        self.key, self.value, self.rule, self.remedy = key, str(value), rule, remedy

    def __reduce__(self) -> tuple:
        """Pickled by its parts: rank 0 sends it to the others, which shall end the same way."""
        return type(self), (self.key, self.value, self.rule, self.remedy)


class SweepFailed(Exception):
    """Jobs of a sweep have failed, and here is which and why, in one line."""


@contextmanager
def refusing_bad_input() -> Iterator[None]:
    """Around a program: a ConfigError, or OmegaConf's for a key that was taken away, becomes one line, and exit code 2;
    Ctrl-C ends it quietly with 130."""
    try:
        yield
    except ConfigError as error:
        _refuse(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from omegaconf.errors import OmegaConfBaseException  # here, as not every program reads a configuration

        if not isinstance(error, OmegaConfBaseException):
            raise
        from v4train.overrides import explain

        _refuse(explain(error))


def _refuse(error: ConfigError) -> None:
    print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
    sys.exit(2)


def errors_from_hydra() -> None:
    """Let errors of Hydra reach the program, which says them in one line: Hydra 1.3 would print several, and end it."""
    os.environ[_FULL] = "1"


def wants_traceback() -> bool:
    """Whether the user asks for more than the line, by Hydra's variable for that."""
    return _wanted == "1"


def user_environment() -> dict[str, str]:
    """The environment as the user gave it, for a process that is yet to start."""
    own = {name: value for name, value in os.environ.items() if name != _FULL}
    return own if _wanted is None else own | {_FULL: _wanted}
