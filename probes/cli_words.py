"""How what is written behind ``hamts probes`` is read, and refused."""

from __future__ import annotations

from hamts.errors import DataError

__all__ = ["chosen", "numbers", "usage", "words"]


def words(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def numbers(text: str | None) -> tuple[float, ...]:
    """Numbers between commas.

    Raises:
        ValueError: one of them is none.
    """
    try:
        return tuple(float(part) for part in words(text))
    except ValueError as error:
        raise ValueError(f"Numbers between commas are needed, such as 0.5,1,2. Got {text!r}.") from error


def chosen(names: list[str] | None, everything: bool) -> tuple[str, ...]:
    """The probes asked for; all of them with --all."""
    from probes.registry import get_probe, list_probes

    if everything:
        return tuple(list_probes())
    if not names:
        raise DataError("E-OPTION", "No probe was named.", fix="Name one, such as der, or pass --all.")
    with usage():
        for name in names:
            get_probe(name)
    return tuple(names)


class usage:
    """Configuration errors as panels, like every other bad input."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError) and not isinstance(error, DataError):
            raise DataError("E-OPTION", str(error)) from error
