"""The one exception a user of v4train is meant to see."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


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


@contextmanager
def refusing_bad_input() -> Iterator[None]:
    """Around a program: a ConfigError becomes its one line, and exit code 2; Ctrl-C ends it quietly with 130."""
    try:
        yield
    except ConfigError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
