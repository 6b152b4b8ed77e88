"""The base of every settings class: frozen, typed, and unknown names are refused."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Settings as plain values. A string under a field is its help text."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        # YAML's types are taken as they are: "3" is not a number, 1.5 is not a count, 1 is not a bool.
        strict=True,
    )
