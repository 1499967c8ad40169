"""The one exception a user of v4train is meant to see."""


class ConfigError(ValueError):
    """Bad input: one line that names the key, the value, the rule it breaks and what to do about it.

    Programs print it and exit with code 2, before anything is allocated.
    """

    def __init__(self, key: str, value: object, rule: str, remedy: str) -> None:
        super().__init__(f"{key}={value}: {rule}; {remedy}")
        self.key = key
