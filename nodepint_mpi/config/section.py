"""What all sections of a config have in common."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from nodepint_mpi.names import NAME_RULE, is_name

NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


def _check_name(text: str) -> str:
    if not is_name(text):
        raise ValueError(f"must be a name: {NAME_RULE}")
    return text


Name = Annotated[str, AfterValidator(_check_name)]
"""One component of a path."""


def require_dotted(keys: Any) -> Any:
    """The keys of a config, in a file that changes some of them. Local.

    Raises:
        ValueError: for one without its section.
    """
    for key in keys:
        if "." not in key:
            raise ValueError(
                f'names keys as the command line does, in quotes: "time.n_slices", not "{key}"'
            )
    return keys


class Section(BaseModel):
    """A part of the config."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def changed(self) -> set[str]:
        """Keys whose values are not the default ones. Local.

        A run's `config.toml` states every key, so `model_fields_set` cannot tell which were given.
        """
        fields = type(self).model_fields
        return {
            key for key, field in fields.items()
            if field.is_required() or getattr(self, key) != field.default
        }  # fmt: skip
