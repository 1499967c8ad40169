"""Config group `data`: what a source is, and how several are mixed, packed and read."""

from dataclasses import dataclass, fields
from typing import Any

from v4train.errors import ConfigError
from v4train.structured import structured

WHEN_DRY = ("stop", "drop")


@dataclass
class SourceConfig:
    """One source. Values and their meaning: conf/data/_data.yaml."""

    source: str | None  # None: a mixture's have their own
    path: Any
    name: str | None
    split: str
    column: str
    validation_fraction: float
    epochs: int | None
    on_error: str
    retries: int
    max_document_bytes: int
    verify: bool
    recall: Any


@dataclass
class DataConfig(SourceConfig):
    """All data of a run: one source, or with `sources` a mixture of several. Values and their meaning: conf/data/."""

    sources: dict[str, Any] | None
    weights: Any
    when_dry: str
    packing: str
    fim_rate: float
    lanes: int | None
    workers: int

    @property
    def named_sources(self) -> dict[str, SourceConfig]:
        """Every source by name; of a mixture, keys that a source doesn't set are the group's."""
        own = {field.name: getattr(self, field.name) for field in fields(SourceConfig)}
        if not self.sources:
            return {self.source: SourceConfig(**own)}
        made = {}
        for name, values in self.sources.items():
            if not isinstance(values, dict):
                rule = "each source of a mixture is a group of keys"
                raise ConfigError(f"data.sources.{name}", values, rule, "give it source= and path=")
            made[name] = structured(SourceConfig, own | values, f"data.sources.{name}")
        return made
