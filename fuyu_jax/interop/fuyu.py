"""Fuyu: a text model of one of the families with a patch projection; and text models alone.

`transformers` builds `FuyuForCausalLM` over whatever text model its `text_config` names, so an
encoder-free model grown from Llama, Mistral or Qwen goes back as a Fuyu folder too.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from fuyu_jax.config import ModelConfig, flatten
from fuyu_jax.errors import UserError, nearest
from fuyu_jax.interop import llama, persimmon
from fuyu_jax.interop.fields import Fields
from fuyu_jax.interop.mapping import FileTensor, linear
from fuyu_jax.interop.persimmon import head

CONFIG_FILE = "config.json"
IMAGE_TOKEN_ID = 71011  # of Fuyu-8B's vocabulary
_FAMILIES: dict[str, ModuleType] = {
    name: family for family in (persimmon, llama) for name in family.MODEL_TYPES
}
TEXT_TYPES = tuple(_FAMILIES)
MODEL_TYPES = ("fuyu", *TEXT_TYPES)

# What other programs' configs say; the rest of ModelConfig is this program's own.
OWN = (
    "dtype",
    "attention_backend",
    "remat",
    "patch_init",
    "patch_init_std",
    "embedding_init_std",
    "patch_loss",
    "patch_loss_weight",
    "patch_loss_layer",
    "patch_size",
)


class Described(NamedTuple):
    """What a folder's `config.json` says.

    config: `vocab_size` is the file's; patches are 30 where it is a text model. text_type: the
    model type of the text model, Fuyu's own included. fuyu: it has a patch projection.
    raw: the file itself.
    """

    config: ModelConfig
    text_type: str
    fuyu: bool
    image_token_id: int | None
    raw: dict[str, Any]


def describe(folder: Path) -> Described:
    """Reads a folder's `config.json`.

    Raises:
      UserError: no such file, a model type or a value that is not supported (the nearest is named).
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{folder}: no {CONFIG_FILE} in it; give a folder as transformers saves it")
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from None
    fields = Fields(raw if isinstance(raw, dict) else {}, file)
    if "quantization_config" in fields.values:
        raise UserError(f"{file}: the weights are quantised; unquantised ones are needed")
    kind = str(fields.need("model_type"))
    if kind != "fuyu":
        values = _family(kind, file, MODEL_TYPES).read(fields, kind)
        return Described(ModelConfig(**values), kind, False, None, raw)
    text = fields.object("text_config")
    if not text.values:  # as the hub has it: all in one object
        text = Fields({**fields.values, "model_type": "persimmon"}, file)
    fields.only("num_channels", 3, 3)
    text_type = str(text.get("model_type", "persimmon"))
    if text_type == "persimmon":
        # 4.36 to 4.44 left out of `text_config` what is Persimmon's default; it stands outside.
        text = Fields({**fields.values, **text.values}, file)
    values = _family(text_type, file, TEXT_TYPES).read(text, text_type)
    if fields.values.get("tie_word_embeddings") is not None:
        values["tie_embeddings"] = bool(fields.values["tie_word_embeddings"])
    values["patch_size"] = fields.size("patch_size", 30)
    image_token_id = fields.get("image_token_id", IMAGE_TOKEN_ID)
    return Described(ModelConfig(**values), text_type, True, image_token_id, raw)


def _family(kind: str, file: Path, known: tuple[str, ...]) -> ModuleType:
    if kind not in _FAMILIES:
        raise UserError(f'{file}: model_type "{kind}" is not supported{nearest(kind, known)}')
    return _FAMILIES[kind]


def differences(
    ours: ModelConfig, theirs: ModelConfig, but: Iterable[str] = OWN
) -> dict[str, tuple[Any, Any]]:
    """Fields in which two models differ, other than `but`."""
    # 0 key heads stand for as many as heads; an unused scaling's numbers are nobody's.
    a, b = (
        flatten(dataclasses.replace(c, num_kv_heads=c.kv_heads, **_unscaled(c)))
        for c in (ours, theirs)
    )
    return {k: (a[k], b[k]) for k in a if k not in but and a[k] != b[k]}


def _unscaled(config: ModelConfig) -> dict[str, Any]:
    plain = ModelConfig()
    unused: list[str] = []
    if config.rotary_scaling == "none":
        unused.append("rotary_factor")
    if config.rotary_scaling != "llama3":
        unused += ["rotary_low_freq", "rotary_high_freq", "rotary_original_length"]
    return {name: getattr(plain, name) for name in unused}


def text_fields(config: ModelConfig, wished: str | None = None) -> dict[str, Any]:
    """The text model's config, of the wished model type or the first that can say all of it.

    Raises:
      UserError: no model type can; names the fields that stand against the nearest one.
    """
    found: dict[str, list[str]] = {}
    order = sorted(TEXT_TYPES, key=lambda t: t != wished)
    for kind in order:
        written = _FAMILIES[kind].write(config, kind)
        try:
            back = ModelConfig(**_FAMILIES[kind].read(Fields(written, Path(kind)), kind))
        except UserError as error:
            found[kind] = [str(error)]
            continue
        found[kind] = [f"{k}={a}" for k, (a, _) in differences(config, back).items()]
        if not found[kind]:
            return written
    kind = min(order, key=lambda k: len(found[k]))
    raise UserError(
        f'no model type of transformers has all of this model\'s settings; the nearest, "{kind}", '
        f"has not: {', '.join(found[kind])}"
    )


def file_tensors(config: ModelConfig, text_type: str, fuyu: bool) -> list[FileTensor]:
    """All tensors of a folder, by transformers' newest names."""
    body = "model.language_model." if fuyu else "model."
    made = [t._replace(name=body + t.name) for t in _FAMILIES[text_type].tensors(config)]
    if fuyu:
        made += linear(
            "model.vision_embed_tokens",
            "patch_projection",
            (config.patch_channels,),
            (config.dim,),
            True,
        )
    return made if config.tie_embeddings else [*made, head(config)]


_SKIPPED = re.compile(r"rotary_emb\.inv_freq$|^image_patch_projection|\.image_patch_projection")
_FUYU = (
    (r"^vit_encoder\.linear_encoder\.", "model.vision_embed_tokens."),
    (r"^vision_embed_tokens\.", "model.vision_embed_tokens."),
    (r"^language_model\.lm_head\.", "lm_head."),
    # Up to 4.51; then what Adept's names have become; then 4.52's.
    (r"^language_model\.model\.", "model.language_model."),
    (r"^model\.(?!language_model\.|vision_embed_tokens\.)", "model.language_model."),
    (r"^language_model\.", "model.language_model."),
)


def newest_name(name: str, text_type: str, fuyu: bool) -> str | None:
    """A tensor's name, of any generation, as the newest; None for what is no weight."""
    if _SKIPPED.search(name):
        return None
    name = _FAMILIES[text_type].rename(name)
    if fuyu:
        for pattern, new in _FUYU:
            name = re.sub(pattern, new, name)
    return name


def check_exportable(config: ModelConfig) -> None:
    """Raises:
    UserError: a setting that no model of transformers has.
    """
    plain = ModelConfig()
    for name in ("image_attention", "image_positions"):
        if getattr(config, name) != getattr(plain, name):
            raise UserError(
                f"model.{name}={getattr(config, name)}: Fuyu in transformers has no such setting, "
                "so this model cannot be handed back"
            )
