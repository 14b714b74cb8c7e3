"""The contract of a source."""

from typing import Protocol, runtime_checkable

from fuyu_jax.data.example import Example


@runtime_checkable  # so that shape-checking tests can look
class Source(Protocol):
    """Examples by index; the same index always gives the same example."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """The example.

        Raises:
          BadImageError: one of its images cannot be read.
        """
        ...

    def id(self, index: int) -> str:
        """The example's id, without reading its images."""
        ...
