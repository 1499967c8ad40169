"""Rules of a whole run that need neither PyTorch nor its model: `config.py` and `estimation.py` keep to them."""

from v4train.errors import ConfigError

PRECISIONS = ("fp32", "bf16")
DEVICES = ("auto", "cpu", "cuda")


def check_compile(compiled: object, tensor: int) -> None:
    """Raise ConfigError for what isn't true or false, and for compiling on `tensor` ranks that share matrices."""
    if not isinstance(compiled, bool):
        raise ConfigError("compile", compiled, "it must be true or false", "use compile=false")
    if compiled and tensor > 1:
        rule = "what is compiled holds no collectives"
        raise ConfigError("compile", True, rule, "use compile=false with parallelism.tensor")
