"""`fuyu_jax.load`: a model to be asked, from a Hugging Face folder or one of our checkpoints."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int32

from fuyu_jax.batch import PackedBatch
from fuyu_jax.config import MeshConfig, ModelConfig
from fuyu_jax.data.example import BadImageError
from fuyu_jax.data.layout import lay_out
from fuyu_jax.data.processor import Processor
from fuyu_jax.data.rows import PatchedExample, fill_row, with_pixels
from fuyu_jax.errors import UserError
from fuyu_jax.generate.engine import Answer, Engine, bucket
from fuyu_jax.generate.loading import load_checkpoint
from fuyu_jax.interop import describe, read_params
from fuyu_jax.interop.files import KEPT, TOKENIZER_FILES, is_work_folder
from fuyu_jax.interop.images import image_policy, read_json
from fuyu_jax.model.decoder import Decoder, make_decoder
from fuyu_jax.parallel.mesh import make_mesh
from fuyu_jax.text_tokenizer import NoTokenizer, TextTokenizer
from fuyu_jax.tokenizer import Tokenizer

_HUB_FILES = ("*.json", "*.safetensors", "*.model")


class Score(NamedTuple):
    """How likely a continuation is.

    logprob: natural logarithm of its probability, summed over its tokens in float32. tokens: how
    many. bytes: of its text in UTF-8. is_greedy: each token was the likeliest one.
    """

    logprob: float
    tokens: int
    bytes: int
    is_greedy: bool


@functools.partial(jax.jit, static_argnames="graph")
def _hidden(graph: nnx.GraphDef, params: Any, batch: PackedBatch) -> Array:
    return nnx.merge(graph, params)(batch)


@functools.partial(jax.jit, static_argnames="graph")
def _logits(graph: nnx.GraphDef, params: Any, hidden: Array) -> Float32[Array, "S V"]:
    return nnx.merge(graph, params).logits(hidden)


@functools.partial(jax.jit, static_argnames="graph")
def _next_scores(
    graph: nnx.GraphDef, params: Any, hidden: Array, targets: Int32[Array, "S"]
) -> tuple[Float32[Array, "S"], Int32[Array, "S"]]:
    """Log probability of every target, and the likeliest token in its place."""
    logits = nnx.merge(graph, params).logits(hidden)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)
    return chosen[:, 0], jnp.argmax(logits, axis=1).astype(jnp.int32)


class PretrainedModel:
    """A model with its processor; prompts are as `Processor` takes them.

    A prompt is a list, in order, of texts, lists of token ids, and images (`PIL.Image`,
    `uint8[h, w, 3]`, or a `pathlib.Path`). It is laid out as in training: patches where the images
    stand, `<s>` before the first text, `<0x04>` behind the last. Token ids bring their own marks:
    nothing is put before or behind them. A language model that was never given image tokens takes
    texts and token ids alone, and gets no `<0x04>`.

    processor: prompts to arrays, and tokens to text. config: of the model. graph, params: of the
    flax module. eos_ids: what ends an answer.
    """

    def __init__(
        self,
        processor: Processor,
        config: ModelConfig,
        graph: nnx.GraphDef,
        params: Any,
        eos_ids: tuple[int, ...],
        mesh: Any = None,
    ):
        self.processor = processor
        self.config = config
        self.graph = graph
        self.params = params
        self.eos_ids = eos_ids
        self.mesh = mesh

    @property
    def tokenizer(self) -> Tokenizer:
        return self.processor.tokenizer

    def model(self) -> Decoder:
        """The flax module itself."""
        return nnx.merge(self.graph, self.params)

    def logits(self, prompt: Any) -> Float32[np.ndarray, "S V"]:
        """Scores of every vocabulary entry after each of a prompt's S tokens.

        Raises:
          UserError: something in the prompt cannot be taken; a prompt without a token.
          BadImageError: an image that is missing or broken.
        """
        ready = self._ready(prompt)
        hidden = self._run(ready, len(ready.layout.tokens))
        with self._on_mesh():
            logits = _logits(self.graph, self.params, hidden)
        return np.asarray(logits)[: len(ready.layout.tokens)]

    def generate(
        self,
        prompts: Sequence[Any],
        max_new_tokens: int = 64,
        *,
        batch_size: int = 0,
        eos_ids: Sequence[int] | None = None,
        banned: Sequence[int] = (),
    ) -> list[Answer]:
        """Greedy answers, in the order of the prompts; they do not depend on the batch.

        Args:
          prompts: each as above.
          max_new_tokens: the longest answer.
          batch_size: prompts at a time; by default all, but 32 at most.
          eos_ids: what ends an answer, if not what the model's own files say; may be empty.
          banned: ids that are never chosen.

        Raises:
          UserError: something in a prompt cannot be taken; a prompt without a token.
          BadImageError: an image that is missing or broken.
        """
        if isinstance(prompts, str):
            raise UserError("prompts: give a list of prompts, not one text")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens}: give 1 or more")
        examples = [self.processor.example(p, id=f"prompt {i}") for i, p in enumerate(prompts)]
        if not examples:
            return []
        engine = Engine(
            self.graph,
            self.tokenizer,
            self.processor.policy,
            batch_size=batch_size or min(len(examples), 32),
            max_new_tokens=max_new_tokens,
            mesh=self.mesh,
            eos_ids=self.eos_ids if eos_ids is None else tuple(int(t) for t in eos_ids),
            banned=tuple(int(t) for t in banned),
        )
        for example in examples:
            self._check(example.id, lay_out(example, self.tokenizer, engine.policy, ask=engine.ask))
        answers = engine.answer(self.params, examples)
        for example, answer in zip(examples, answers, strict=True):
            if answer.error:
                raise BadImageError(f"{example.id}: {answer.error}")
        return answers

    def score(self, prompt: Any, continuation: Any) -> Score:
        """How likely a continuation is after a prompt.

        Args:
          prompt: as above.
          continuation: a text, encoded on its own and without `|ENDOFTEXT|`; or token ids.

        Raises:
          UserError: as in `logits`; a continuation without a token.
        """
        ready = self._ready(prompt)
        scale = ready.layout.box_scale
        if isinstance(continuation, str):
            ids = self.tokenizer.encode(continuation, scale)
            size = len(continuation.encode("utf-8", "surrogatepass"))
        else:
            ids = [int(t) for t in continuation]
            size = len(self.tokenizer.decode(ids, scale).encode())
        if not ids:
            raise UserError("continuation: it has no token")
        self._check_ids(ids)
        begin = len(ready.layout.tokens)
        tokens = np.concatenate([ready.layout.tokens, np.asarray(ids, np.int32)])
        layout = dataclasses.replace(
            ready.layout,
            tokens=tokens,
            positions=np.arange(len(tokens), dtype=np.int32),
            loss_weights=np.zeros(len(tokens), np.float32),
        )
        hidden = self._run(ready._replace(layout=layout), len(tokens))
        # Only where something is predicted: V numbers a place are many.
        places = np.full(bucket(len(ids)), begin - 1)
        places[: len(ids)] = np.arange(begin - 1, len(tokens) - 1)
        targets = np.zeros(len(places), np.int32)
        targets[: len(ids)] = ids
        with self._on_mesh():
            found, best = _next_scores(self.graph, self.params, hidden[places], targets)
        found, best = np.asarray(found)[: len(ids)], np.asarray(best)[: len(ids)]
        return Score(
            float(found.sum(dtype=np.float32)),
            len(ids),
            size,
            bool((best == np.asarray(ids)).all()),
        )

    def _ready(self, prompt: Any) -> PatchedExample:
        example = self.processor.example(prompt)
        ask = self.tokenizer.answer_id is not None
        layout = lay_out(example, self.tokenizer, self.processor.policy, ask=ask)
        self._check(example.id, layout)
        return with_pixels(example, layout, self.processor.policy)

    def _check(self, id: str, layout: Any) -> None:
        if layout.grids and self.tokenizer.image_id < 0:
            raise UserError(
                f"{id}: this is a language model without image tokens; `python -m "
                "fuyu_jax.interop.convert` gives it some, to be trained"
            )
        if not len(layout.tokens):
            raise UserError(f"{id}: it has no token")
        self._check_ids(layout.tokens)

    def _check_ids(self, ids: Any) -> None:
        if max(ids) >= self.config.vocab_size or min(ids) < 0:
            raise UserError(
                f"token id {max(ids) if min(ids) >= 0 else min(ids)}: the model has "
                f"0 to {self.config.vocab_size - 1}"
            )

    def _run(self, ready: PatchedExample, length: int) -> Array:
        """Hidden states of one row, with padding behind: few shapes, so few compilations."""
        size = bucket(length)
        patches = size if ready.layout.grids else 0
        batch = PackedBatch.empty(1, size, patches, self.config.patch_channels)
        fill_row(batch, 0, [ready])
        with self._on_mesh():
            return _hidden(self.graph, self.params, batch)[0]

    def _on_mesh(self):
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()


def load(
    path: str | Path,
    *,
    dtype: str = "float32",
    mesh: MeshConfig | None = None,
    pad_value: int | None = None,
    tokenizer: str | Path | None = None,
) -> PretrainedModel:
    """Opens a model.

    Args:
      path: a Hugging Face folder (`config.json`, safetensors, tokenizer) of Fuyu, Persimmon,
        Llama, Mistral, Qwen2, Qwen2.5 or Qwen3; a work folder of train.py or one of its
        checkpoints; or, where `huggingface_hub` is installed, a hub id.
      dtype: of parameters and computation, "float32" or "bfloat16".
      mesh: devices that the parameters are sharded over; without it one.
      pad_value: of the edge of images, 0 to 255, if not the folder's own (Hugging Face's files
        say 1; Adept's own program has white, 255).
      tokenizer: a file, if not the folder's own.

    Raises:
      UserError: no such folder, or something in it that cannot be read; says what and where.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f'dtype="{dtype}": "float32" or "bfloat16"')
    if pad_value is not None and not 0 <= pad_value <= 255:
        raise UserError(f"pad_value={pad_value}: give 0 to 255")
    folder = _folder(path)
    own = is_work_folder(folder)
    opened = _open_own(folder, dtype, mesh) if own else _open_theirs(folder, dtype, mesh, tokenizer)
    if pad_value is not None:
        policy = dataclasses.replace(opened.processor.policy, pad_value=pad_value)
        opened.processor = Processor(opened.tokenizer, policy)
    return opened


def _folder(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{folder}: a file; give the folder that it lies in")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise UserError(f"{folder}: no such folder")
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{path}: no such folder; for a hub id, pip install huggingface_hub"
        ) from None
    try:
        found = huggingface_hub.snapshot_download(
            str(path),
            allow_patterns=list(_HUB_FILES),
            ignore_patterns=["consolidated*"],  # the same weights once more, under other names
        )
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: no such folder, and not had from the hub ({reason})") from None
    if not any(Path(found).glob("*.safetensors")):
        raise UserError(
            f"{path}: no *.safetensors on the hub; weights as pickles (.bin, .pt) run code when "
            "they are loaded, and are not read"
        )
    return Path(found)


def _open_own(folder: Path, dtype: str, mesh: MeshConfig | None) -> PretrainedModel:
    def change(config):
        model = dataclasses.replace(config.model, dtype=dtype)
        return dataclasses.replace(config, model=model, mesh=mesh or MeshConfig())

    loaded = load_checkpoint(folder, change)
    params = loaded.params
    if dtype != "float32":
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    eos = _answer_ends(loaded.tokenizer, _ends(loaded.workdir / KEPT, None))
    config = loaded.config.model
    config = dataclasses.replace(
        config, vocab_size=config.vocab_size or loaded.tokenizer.vocab_size
    )
    processor = Processor(loaded.tokenizer, loaded.policy)
    made = make_mesh(loaded.config.mesh)
    return PretrainedModel(processor, config, loaded.graph, params, eos, made)


def _open_theirs(
    folder: Path, dtype: str, mesh: MeshConfig | None, tokenizer: str | Path | None
) -> PretrainedModel:
    described = describe(folder)
    config = dataclasses.replace(described.config, dtype=dtype)
    made = make_mesh(mesh) if mesh else None
    if not tokenizer and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        opened: Tokenizer = NoTokenizer(folder, config.vocab_size, described.image_token_id)
    else:
        opened = (Tokenizer if described.fuyu else TextTokenizer)(tokenizer or folder)
    if opened.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {opened.vocab_size} pieces, the model {config.vocab_size}"
        )
    params, _ = read_params(folder, config, made, dtype=dtype)
    graph, _ = nnx.split(
        nnx.eval_shape(
            lambda: make_decoder(config, image_id=opened.image_id, newline_id=opened.newline_id)
        )
    )
    eos = _answer_ends(opened, _ends(folder, described.raw))
    processor = Processor(opened, image_policy(folder, config.patch_size))
    return PretrainedModel(processor, config, graph, params, eos, made)


def _answer_ends(tokenizer: Tokenizer, named: tuple[int, ...]) -> tuple[int, ...]:
    """What ends an answer: what the files name, and `|ENDOFTEXT|`.

    Fuyu's files name `</s>` (2), which it never says: its answers end with `|ENDOFTEXT|`.
    """
    own = (tokenizer.eos_id,) if tokenizer.eos_id >= 0 else ()
    if named and tokenizer.answer_id is None:  # a text model's files are right
        return named
    return tuple(dict.fromkeys((*own, *named)))


def _ends(folder: Path, config: dict[str, Any] | None) -> tuple[int, ...]:
    """What `generation_config.json`, or else the model's config, says to end an answer."""
    file = folder / "generation_config.json"
    for found, where in ((read_json(file), file), (config or {}, folder / "config.json")):
        text = found.get("text_config")
        for place in (found, text if isinstance(text, dict) else {}):
            ends = place.get("eos_token_id")
            if ends is None:
                continue
            ends = ends if isinstance(ends, list) else [ends]
            if not all(type(end) is int for end in ends):
                raise UserError(f'{where}: "eos_token_id" is {ends}, not token ids')
            return tuple(ends)
    return ()
