"""The demo set: drawn pictures of coloured shapes and short words, with questions about them.

It is small enough to be made in under a minute, deterministic, and so balanced that a model which
does not look at the pixels stays at the majority answer. Start at `prepare`, which makes the set
and its tokenizer, and `load`, which reads a split back.
"""

from fuyu_jax.data.demo.builder import DEFAULT_SIZES, ShapesAndWords
from fuyu_jax.data.demo.prepare import TOKENIZER_FILE, load, prepare, turns
from fuyu_jax.data.demo.questions import COMPOSITIONAL_FAMILIES, FAMILIES
from fuyu_jax.data.demo.scenes import COLOURS, HELD_OUT, SHAPES, WORDS, things_from_json
from fuyu_jax.data.demo.wording import caption_facts

__all__ = [
    "COLOURS",
    "COMPOSITIONAL_FAMILIES",
    "DEFAULT_SIZES",
    "FAMILIES",
    "HELD_OUT",
    "SHAPES",
    "TOKENIZER_FILE",
    "WORDS",
    "ShapesAndWords",
    "caption_facts",
    "load",
    "prepare",
    "things_from_json",
    "turns",
]
