"""The whole configuration as frozen, typed dataclasses, and how a run's flags change it.

`configs/*.py` each define `get_config() -> TrainConfig`; `--config=configs/x.py
--config.optim.peak_lr=1e-3` loads one and replaces a field. (ml_collections.config_flags sets
attributes in place, which a frozen dataclass refuses, and its errors take several lines.)
"""

import dataclasses
import hashlib
import importlib.util
import json
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fuyu_jax.errors import UserError, nearest


@dataclass(frozen=True)
class ModelConfig:
    """One decoder block, parameterised; the defaults are Fuyu's (Persimmon's) at a small size."""

    vocab_size: int = 0  # 0: the tokenizer's
    dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 0  # 0: as many as num_heads
    head_dim: int = 32
    mlp_dim: int = 512
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    mlp: Literal["relu2", "gelu_gated", "silu_gated"] = "relu2"
    qk_norm: bool = True
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    tie_embeddings: bool = False
    rotary_fraction: float = 0.5
    rotary_base: float = 25_000.0
    # Stretched positions: "linear" divides all frequencies by the factor, "llama3" the low ones.
    rotary_scaling: Literal["none", "linear", "llama3"] = "none"
    rotary_factor: float = 1.0
    rotary_low_freq: float = 1.0  # llama3: wavelengths above original length / this are divided,
    rotary_high_freq: float = 4.0  # those below original length / this are not
    rotary_original_length: int = 8192  # llama3: positions before the stretching
    image_attention: Literal["causal", "bidirectional"] = "causal"
    # Fuyu's images have one-dimensional positions alone; "fourier" adds row and column to a patch.
    image_positions: Literal["none", "fourier"] = "none"
    window: int = 0  # how many positions back a token sees; 0: all of its segment
    patch_size: int = 30
    init_std: float = 0.02
    # Of the patch projection: drawn like the rest, or whitening a sample of training patches.
    patch_init: Literal["normal", "whiten"] = "normal"
    patch_init_std: float = 0.0  # whiten: of its features. 0: init_std
    embedding_init_std: float = 0.0  # 0: init_std
    # "edges": in training, tell each patch's edges from its state after `patch_loss_layer` layers.
    patch_loss: Literal["none", "edges"] = "none"
    patch_loss_weight: float = 1.0
    patch_loss_layer: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters are float32
    attention_backend: Literal["auto", "splash", "pallas", "blockwise", "reference"] = "auto"
    # What is kept of a layer for the backward pass: all of it; its input ("full"); that, queries,
    # keys, values and attention's output ("minimal"); the same in the host's memory ("offload").
    remat: Literal["none", "full", "minimal", "offload"] = "none"
    z_loss: float = 0.0  # weight of (log of the softmax's denominator)², added to the loss

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def patch_channels(self) -> int:
        """Bytes of a patch, C."""
        return self.patch_size**2 * 3


# Unrelated images differ in about 32 of 64 bits; past 16 the bands of the search are of three
# bits, so that it compares almost everything with everything.
MAX_DISTANCE = 16


@dataclass(frozen=True)
class CleaningConfig:
    """Which examples to leave out. All is off but for images whose header cannot be read."""

    min_image_side: int = 0  # pixels of the shorter side, of every image; 0: off
    max_aspect_ratio: float = 0.0  # longer over shorter side, of every image; 0: off
    min_text_chars: int = 0  # of all texts of an example, without the blanks around each; 0: off
    max_text_chars: int = 0  # of the same; 0: off
    # "header": what cannot be opened. "decode": also what breaks later, so every image is decoded.
    drop_unreadable: Literal["header", "decode"] = "header"
    drop_exact_duplicates: bool = False  # the same texts and the same decoded pixels
    # Bits of 64 in which perceptual hashes may differ; -1: off. Texts may differ: of several
    # questions about one image, in records of their own, the first alone stays.
    near_duplicate_distance: int = -1

    @property
    def on(self) -> bool:
        """Whether it asks for more than a run does without it."""
        return self != CleaningConfig()

    def check(self, prefix: str = "") -> None:
        """Looks for values that mean nothing.

        Raises:
          UserError: names the field (with `prefix` in front), its value and what it may be.
        """
        for name in ("min_image_side", "min_text_chars", "max_text_chars"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"{prefix}{name}={getattr(self, name)}: give 1 or more, or 0 for off"
                )
        ratio = self.max_aspect_ratio
        if ratio != 0 and not (math.isfinite(ratio) and ratio >= 1):
            raise UserError(
                f"{prefix}max_aspect_ratio={ratio}: longer over shorter side is 1 or more; 0 for "
                "off"
            )
        if 0 < self.max_text_chars < self.min_text_chars:
            raise UserError(
                f"{prefix}max_text_chars={self.max_text_chars} is less than "
                f"min_text_chars={self.min_text_chars}: no text would stay"
            )
        if self.drop_unreadable not in ("header", "decode"):
            raise UserError(
                f'{prefix}drop_unreadable={self.drop_unreadable!r}: give "header" or "decode"'
            )
        if not -1 <= self.near_duplicate_distance <= MAX_DISTANCE:
            raise UserError(
                f"{prefix}near_duplicate_distance={self.near_duplicate_distance}: give 0 to "
                f"{MAX_DISTANCE} bits, or -1 for off"
            )


@dataclass(frozen=True)
class ColumnsConfig:
    """Columns of parquet files; "": found by name. Naming one of texts leaves the others out."""

    image: str = ""
    conversations: str = ""
    texts: str = ""
    question: str = ""
    answer: str = ""
    caption: str = ""
    id: str = ""


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture: what it is, where its splits are, and its share.

    Paths may be globs and `{000..012}` patterns, except for llava, for tfds, where they are
    `DIRECTORY:SPLIT`, and for array_record, where they are the folder of a prepared set. Fields
    that are None are those of `DataConfig`.
    """

    name: str
    kind: Literal["llava", "webdataset", "parquet", "interleaved", "text", "tfds", "array_record"]
    train: str
    validation: str = ""
    test: str = ""
    weight: float = 1.0
    image_dir: str = ""  # llava, interleaved: "" for the file's own folder
    prompt: str = ""  # webdataset, parquet: asked where a record has a caption alone
    max_images: int = 0  # interleaved: documents are cut into examples of so many; 0: whole
    max_chars: int = 0  # interleaved, text: and of so many characters
    columns: ColumnsConfig = ColumnsConfig()  # parquet
    text_field: str = "text"  # text: which field of a line holds it
    resolution: Literal["native", "patches", "sampled"] | None = None
    max_image_height: int | None = None
    max_image_width: int | None = None
    max_image_patches: int | None = None
    min_image_side: int | None = None
    max_image_side: int | None = None
    token_drop: tuple[tuple[float, float], ...] | None = None
    cleaning: CleaningConfig | None = None  # as a whole: a rule that is not named is off


@dataclass(frozen=True)
class DataConfig:
    """Where examples come from and how they fill rows."""

    source: Literal["demo", "llava", "mixture"] = "demo"
    mixture: tuple[SourceConfig, ...] = ()  # mixture: a list of objects, as a flag in JSON
    data_dir: str = "~/.cache/fuyu_jax/demo"  # demo: where the set is prepared
    demo_train_images: int = 0  # demo: 0 for the builder's own size
    train_json: str = ""  # llava: a LLaVA-style JSON or JSONL file
    validation_json: str = ""  # llava: "" for none
    test_json: str = ""  # llava: "" for the validation file
    image_dir: str = ""  # llava: "" for the JSON file's folder
    # A sentencepiece model or tokenizer.json; "": that of init_from, or the demo's, or trained here
    tokenizer: str = ""
    tokenizer_vocab: int = 1536  # pieces, when it is trained here
    tokens_per_row: int = 1024  # S
    patches_per_row: int = 960  # P
    max_image_height: int = 1080
    max_image_width: int = 1920
    pad_value: int = 1  # of the bottom and right edge, in 0..255
    # How images are sized under that cap: see `data.resolution`.
    resolution: Literal["native", "patches", "sampled"] = "native"
    max_image_patches: int = 0  # patches: of one image
    min_image_side: int = 64  # sampled: pixels, the root of the area
    max_image_side: int = 256
    resolution_schedule: tuple[tuple[float, float], ...] = ()  # (epoch, factor on the sides)
    token_drop: tuple[tuple[float, float], ...] = ()  # (epoch, mean rate) of patches left out
    jpeg_draft: bool = True  # decode JPEGs at 1/2, 1/4 or 1/8 where the image is shrunk as much
    plan_block: int = 4096  # examples planned together
    easy_first_epochs: int = 0  # so many epochs go from easy examples to hard ones
    # Training stops when more images than both allow are missing or broken.
    max_bad_examples: int = 10
    max_bad_share: float = 0.001  # of all examples
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)  # of the training split
    balance_patches: bool = False  # rows of a global batch have about equally many patches
    prefetch_rows: int = 16
    threads: int = 1
    workers: int = 0  # processes that make rows; 0: threads of this one


_AT_LEAST = {
    "tokens_per_row": 1,
    "patches_per_row": 0,
    "max_image_height": 1,
    "max_image_width": 1,
    "pad_value": 0,
    "plan_block": 1,
    "easy_first_epochs": 0,
    "max_bad_examples": 0,
    "max_bad_share": 0,
    "prefetch_rows": 1,
    "threads": 1,
    "workers": 0,
}


def check_data(config: DataConfig) -> None:
    """Looks for numbers that mean nothing.

    Raises:
      UserError: names the field, its value and what it may be.
    """
    for name, least in _AT_LEAST.items():
        if getattr(config, name) < least:
            raise UserError(f"data.{name}={getattr(config, name)}: give {least} or more")
    if config.pad_value > 255:
        raise UserError(f"data.pad_value={config.pad_value}: give 0 to 255")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule."""

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    peak_lr: float = 1e-3
    end_lr_ratio: float = 0.1
    warmup_steps: int = 100
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices; norms, biases and embeddings have none
    clip_norm: float = 1.0
    muon_lr: float = 0.02  # muon: of the layers' matrices; the rest takes peak_lr with AdamW
    # (regular expression over parameter paths, factor on the learning rate); the first match counts
    lr_multipliers: tuple[tuple[str, float], ...] = ()
    # Of the first moment (adamw, muon); Adafactor has none, and its second moments are factored.
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    freeze: tuple[str, ...] = ()  # regular expressions over parameter paths: what does not learn


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation by generation."""

    every: int = 500  # steps between validations; 0: never
    examples: int = 128  # of a validation during training
    batch_size: int = 64
    max_new_tokens: int = 48
    final_examples: int = 0  # of each split at the end of training; 0: all of them
    summary: bool = True  # evaluate test (and blind, and compositional) at the end


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    name: str = "run"
    workdir: str = "workdir"
    init_from: str = ""  # a Hugging Face folder, or a work folder: begin with its parameters
    seed: int = 0
    num_steps: int = 1000
    rows_per_batch: int = 8  # B, over all hosts, in each accumulation step
    grad_accum: int = 1
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10
    progress: bool = True
    profile_steps: str = ""  # "10:13" writes a trace of steps 10 to 12 into WORKDIR/profile
    peak_flops: float = 0.0  # of one device, FLOP/s; 0: as known of its kind
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


# What may differ when a run is taken up again: it changes what is shown or kept, not what is
# learnt. Everything else belongs to the work folder.
RESUMABLE_CHANGES = frozenset(
    {
        "workdir",
        "log_every",
        "progress",
        "profile_steps",
        "peak_flops",
        "checkpoint_every",
        "keep_checkpoints",
        "data.prefetch_rows",
        "data.threads",
        "data.workers",
        "data.max_bad_share",
        "data.max_bad_examples",
        "model.attention_backend",
        "model.remat",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
    }
)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{"optim.peak_lr": 1e-3, ...}` in the order of the fields."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{f.name}.")
        elif value and isinstance(value, tuple) and dataclasses.is_dataclass(value[0]):
            flat[prefix + f.name] = [dataclasses.asdict(item) for item in value]
        else:
            flat[prefix + f.name] = value
    return flat


def replace(config: Any, changes: dict[str, Any]) -> Any:
    """A config with fields replaced by dotted name; values are checked against their types.

    Raises:
      UserError: an unknown name (the nearest right one is named) or a value of another type.
    """
    for name, value in changes.items():
        config = _replace_one(config, name, name.split("."), value)
    return config


def _replace_one(config: Any, name: str, path: list[str], value: Any) -> Any:
    hints = typing.get_type_hints(type(config))
    here = path[0]
    if here not in hints:
        root = name[: len(name) - len(".".join(path))]
        # Of several groups that have the name, the outer one.
        deep_first = sorted(flatten(config), key=lambda k: -k.count("."))
        known = {k: k for k in hints} | {k.split(".")[-1]: k for k in deep_first}
        # A right name in the wrong group ("peak_lr" for "optim.peak_lr") is told too.
        hint = nearest(here, known)
        for short, full in known.items():
            hint = hint.replace(f'"{short}"', f'"{root}{full}"')
        raise UserError(f'unknown config key "{name}"{hint}')
    current = getattr(config, here)
    if len(path) > 1:
        if not dataclasses.is_dataclass(current):
            raise UserError(f'unknown config key "{name}": "{here}" is a value, not a group')
        return dataclasses.replace(config, **{here: _replace_one(current, name, path[1:], value)})
    if dataclasses.is_dataclass(current):
        if isinstance(value, dict):
            return dataclasses.replace(config, **{here: _group(current, name, value)})
        inner = ", ".join(f"{name}.{k}" for k in list(flatten(current))[:3])
        raise UserError(f'config key "{name}" is a group; set a field of it, such as {inner}')
    return dataclasses.replace(config, **{here: _typed(name, hints[here], value)})


def _typed(name: str, hint: Any, value: Any) -> Any:
    """`value` (a flag's text, or a Python value) as the field's type."""
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            options = [str(a) for a in typing.get_args(hint)]
            raise UserError(
                f'config key "{name}": {value!r} is unknown{nearest(str(value), options)}'
            )
        return value
    if hint == tuple[SourceConfig, ...]:
        return _sources(name, value)
    if hint == tuple[str, ...]:
        return _texts(name, value)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _group(hint(), name, value)
    if type(None) in typing.get_args(hint):
        (inner,) = (a for a in typing.get_args(hint) if a is not type(None))
        return None if value is None else _typed(name, inner, value)
    if typing.get_origin(hint) in (tuple, types.GenericAlias):
        first = typing.get_args(typing.get_args(hint)[0])[0]
        try:
            pairs = json.loads(value) if isinstance(value, str) else value
            return tuple((first(a), float(b)) for a, b in pairs)
        except (ValueError, TypeError):
            example = '[["patch", 2.0]]' if first is str else "[[0, 0.5], [2, 1.0]]"
            raise UserError(
                f'config key "{name}": {value!r} is not a list such as {example}'
            ) from None
    try:
        if hint is bool:
            words = {"true": True, "1": True, "false": False, "0": False}
            return value if isinstance(value, bool) else words[str(value).lower()]
        if hint is int:
            if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
                raise ValueError
            return int(value.replace("_", "")) if isinstance(value, str) else int(value)
        if hint is float:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
        if not isinstance(value, str):
            raise ValueError
        return value
    except (ValueError, KeyError):
        raise UserError(f'config key "{name}": {value!r} is not of type {hint.__name__}') from None


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """Texts from a list, from its JSON, or one text by itself."""
    if isinstance(value, str) and not value.lstrip().startswith("["):
        return (value,) if value else ()
    try:
        texts = json.loads(value) if isinstance(value, str) else value
        if isinstance(texts, list | tuple) and all(isinstance(t, str) for t in texts):
            return tuple(texts)
    except ValueError:
        pass
    raise UserError(f'config key "{name}": {value!r} is not a list such as ["embedding", "head"]')


def _group(group: Any, name: str, value: Any) -> Any:
    """A group with the fields that an object names replaced."""
    if not isinstance(value, dict):
        raise UserError(f'config key "{name}": {value!r} is not an object {{"field": value}}')
    for key, one in value.items():
        group = _replace_one(group, f"{name}.{key}", [key], one)
    return group


def _sources(name: str, value: Any) -> tuple[SourceConfig, ...]:
    """Sources from objects, or from their JSON; their fields are checked as all others are."""
    try:
        items = json.loads(value) if isinstance(value, str) else value
        items = [dataclasses.asdict(i) if isinstance(i, SourceConfig) else dict(i) for i in items]
    except (ValueError, TypeError):
        example = '[{"name": "a", "kind": "parquet", "train": "a/*.parquet", "weight": 0.5}, ...]'
        raise UserError(f'config key "{name}": not a list such as {example}') from None
    sources = []
    for at, item in enumerate(items):
        if missing := [k for k in ("name", "kind", "train") if k not in item]:
            raise UserError(f'config key "{name}", source {at}: no "{missing[0]}"')
        source = SourceConfig("", "text", "")
        for key, one in item.items():
            source = _replace_one(source, f"{name}[{at}].{key}", [key], one)
        sources.append(source)
    return tuple(sources)


def load(path: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Loads a config file and applies overrides.

    Args:
      path: a Python file with `get_config() -> TrainConfig`.
      overrides: `optim.peak_lr=1e-3` and the like.

    Raises:
      UserError: no such file, a file without `get_config`, an unknown key, an ill-typed value.
    """
    file = Path(path)
    if not file.is_file():
        known = sorted(str(p) for p in Path("configs").glob("*.py"))
        raise UserError(f"config {path}: no such file{nearest(path, known) if known else ''}")
    spec = importlib.util.spec_from_file_location(f"fuyu_jax_config_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config {path}: {type(error).__name__}: {error}") from None
    if not isinstance(config, TrainConfig):
        raise UserError(
            f"config {path}: get_config() gave {type(config).__name__}, not TrainConfig"
        )
    changes = {}
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise UserError(f'override "{override}": write it as --config.{name}=VALUE')
        changes[name] = value
    return replace(config, changes)


def to_json(config: TrainConfig) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> TrainConfig:
    """A config written by `to_json`; a field that this version lacks is an error."""
    flat: dict[str, Any] = {}

    def walk(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value

    walk(json.loads(text), "")
    return replace(TrainConfig(), flat)


def differences(ours: TrainConfig, theirs: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Fields that differ: `{"optim.peak_lr": (ours, theirs)}`."""
    a, b = flatten(ours), flatten(theirs)
    return {k: (a[k], b[k]) for k in a if a[k] != b[k]}


def digest(value: Any) -> str:
    """A short, stable hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
