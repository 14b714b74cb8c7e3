"""`fuyu_jax.load`: a model from a Hugging Face folder or from one of our checkpoints."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from fuyu_jax.config import MeshConfig
from fuyu_jax.data.processor import Processor
from fuyu_jax.errors import UserError
from fuyu_jax.generate.loading import load_checkpoint
from fuyu_jax.generate.pretrained import PretrainedModel
from fuyu_jax.interop import describe, read_params
from fuyu_jax.interop.files import KEPT, TOKENIZER_FILES, is_work_folder
from fuyu_jax.interop.images import image_policy, read_json
from fuyu_jax.model.checking import checked_backend
from fuyu_jax.model.decoder import make_decoder
from fuyu_jax.parallel.mesh import make_mesh
from fuyu_jax.text_tokenizer import NoTokenizer, TextTokenizer
from fuyu_jax.tokenizer import Tokenizer

_HUB_FILES = ("*.json", "*.safetensors", "*.model")


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
        opened = opened.with_processor(Processor(opened.tokenizer, policy))
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
    checked_backend(config)
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
