"""What the engine knows of a prompt while it is run, and of how much it has run."""

from dataclasses import dataclass, field

import numpy as np

from fuyu_jax.generate.prompts import Prompt


@dataclass(eq=False)
class Work:
    """A prompt that is being run.

    shard: where its pages are. pages: in order. done: its tokens in the cache. said: the answer so
    far, with what ended it. logprobs, best: of a continuation's tokens. top: with beams, what may
    come first. error: why there is no answer.
    """

    prompt: Prompt
    shard: int = 0
    pages: list[int] = field(default_factory=list)
    done: int = 0
    said: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    best: list[bool] = field(default_factory=list)
    top: tuple[np.ndarray, np.ndarray] | None = None
    error: str = ""


@dataclass
class Usage:
    """Sums: tokens of prompts that were computed, and that were found in the cache; tokens of
    answers; seconds of both without compiling, and of compiling."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0
