"""Fields of a Hugging Face `config.json`, read so that nothing is guessed or overlooked."""

from pathlib import Path
from typing import Any, NamedTuple

from fuyu_jax.config import ModelConfig
from fuyu_jax.errors import UserError, nearest


class Fields(NamedTuple):
    """One JSON object of a config file and where it is from."""

    values: dict[str, Any]
    where: Path

    def get(self, name: str, default: Any) -> Any:
        """A value; what is missing or null is `default`, transformers' documented one."""
        value = self.values.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        if self.values.get(name) is None:
            raise UserError(f'{self.where}: no "{name}" in it')
        return self.values[name]

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.need(name) if default is None else self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f'{self.where}: "{name}" is {value!r}, not a positive integer')
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.need(name) if default is None else self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f'{self.where}: "{name}" is {value!r}, not a number')
        return float(value)

    def only(self, name: str, default: Any, *known: Any) -> Any:
        """A value that must be one of those supported here; the nearest is named."""
        value = self.get(name, default)
        if value not in known:
            hint = nearest(str(value), map(str, known))
            raise UserError(f'{self.where}: "{name}": {value!r} is not supported{hint}')
        return value

    def object(self, name: str) -> "Fields":
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise UserError(f'{self.where}: "{name}" is not an object')
        return Fields(value, self.where)


def rotary(fields: Fields, *, theta: float | None, fraction: float) -> dict[str, Any]:
    """Rotary settings from `rope_parameters` (5.x) or `rope_theta`, `rope_scaling` and
    `partial_rotary_factor` (4.x).

    Args:
      fields: of the text model.
      theta: the family's base where none is given; None: it must be given.
      fraction: the family's rotated part of a head where none is given.
    """
    # As in transformers: the older object wins where both are, and an object over its surroundings.
    inner = fields.object("rope_scaling")
    if not inner.values:
        inner = fields.object("rope_parameters")
    if any(isinstance(v, dict) for v in inner.values.values()):
        raise UserError(
            f'{fields.where}: "rope_parameters" differ from layer to layer; not supported'
        )
    both = Fields({**fields.values, **inner.values}, fields.where)
    if both.get("rope_theta", theta) is None:
        raise UserError(
            f'{fields.where}: no "rope_theta" in it, and defaults differ between versions of '
            "transformers; write it there (Adept's Fuyu and Persimmon have 25000.0)"
        )
    kind = Fields({"rope_type": inner.get("rope_type", inner.get("type", "default"))}, fields.where)
    scaling = kind.only("rope_type", "default", "default", "linear", "llama3")
    read: dict[str, Any] = {
        "rotary_base": both.number("rope_theta", theta),
        "rotary_fraction": both.number("partial_rotary_factor", fraction),
    }
    if scaling != "default":
        read |= {"rotary_scaling": scaling, "rotary_factor": inner.number("factor")}
    if scaling == "llama3":
        length = fields.get("original_max_position_embeddings", None)
        length = length or inner.get("original_max_position_embeddings", None)
        read |= {
            "rotary_low_freq": inner.number("low_freq_factor"),
            "rotary_high_freq": inner.number("high_freq_factor"),
            "rotary_original_length": int(length or fields.need("max_position_embeddings")),
        }
    return read


def rotary_fields(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `rotary`, for both generations of readers."""
    scaling: dict[str, Any] = {}
    if config.rotary_scaling != "none":
        scaling = {"rope_type": config.rotary_scaling, "factor": config.rotary_factor}
    if config.rotary_scaling == "llama3":
        scaling |= {
            "low_freq_factor": config.rotary_low_freq,
            "high_freq_factor": config.rotary_high_freq,
            "original_max_position_embeddings": config.rotary_original_length,
        }
    shared: dict[str, Any] = {"rope_theta": config.rotary_base}
    if config.rotary_fraction != 1:
        shared["partial_rotary_factor"] = config.rotary_fraction
    new = {"rope_type": "default", **scaling, **shared}
    return {**shared, "rope_scaling": scaling or None, "rope_parameters": new}
