"""How often something has been compiled in this process, as JAX itself counts it."""

from typing import Any, NamedTuple

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


class Compiled(NamedTuple):
    """Programs (also those that a persistent cache gave), and the compiler's seconds."""

    number: int = 0
    seconds: float = 0.0


_sums = Compiled()


def _count(event: str, seconds: float, **_: Any) -> None:
    global _sums
    if event == _EVENT:
        _sums = Compiled(_sums.number + 1, _sums.seconds + seconds)


jax.monitoring.register_event_duration_secs_listener(_count)


def compiled() -> Compiled:
    """Sums since this module was imported."""
    return _sums
