"""How a folder's image processor makes patches, as our policy, and the other way round."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from fuyu_jax.config import TrainConfig
from fuyu_jax.data.layout import LayoutPolicy
from fuyu_jax.data.processor import FUYU_POLICY
from fuyu_jax.errors import UserError

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def read_json(file: Path) -> dict[str, Any]:
    """An object from a file; empty where there is none.

    Raises:
      UserError: not JSON.
    """
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from None
    return found if isinstance(found, dict) else {}


def image_policy(folder: Path, patch_size: int) -> LayoutPolicy:
    """Of a folder's image processor, where it says something; Fuyu's else.

    Raises:
      UserError: a size or a padding that is none.
    """
    policy = dataclasses.replace(FUYU_POLICY, patch_size=patch_size)
    for name in PROCESSOR_FILES:
        found = _image_part(read_json(folder / name))
        size = found.get("size")
        if isinstance(size, dict) and {"height", "width"} <= size.keys():
            sides = size["height"], size["width"]
            if not all(type(side) is int and side > 0 for side in sides):
                raise UserError(f'{folder / name}: "size" {size} is not of positive integers')
            policy = dataclasses.replace(policy, max_height=sides[0], max_width=sides[1])
        value = found.get("padding_value")
        if isinstance(value, int | float) and 0 <= value <= 255:
            policy = dataclasses.replace(policy, pad_value=int(value))
    return policy


def _image_part(found: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 keeps it inside the processor's file."""
    inner = found.get("image_processor")
    return inner if isinstance(inner, dict) else found


def update_image_files(folder: Path, run: TrainConfig) -> None:
    """Makes the files of an image processor say how a run's images were made."""
    data, size = run.data, run.model.patch_size
    before = image_policy(folder, size)
    for name in PROCESSOR_FILES:
        whole = read_json(folder / name)
        found = _image_part(whole)
        changes: dict[str, Any] = {}
        if (before.max_height, before.max_width) != (data.max_image_height, data.max_image_width):
            changes["size"] = {"height": data.max_image_height, "width": data.max_image_width}
        if before.pad_value != data.pad_value:
            changes["padding_value"] = float(data.pad_value)
        if changes and ("image_processor_type" in found or "size" in found):
            found |= changes
            (folder / name).write_text(json.dumps(whole, indent=2) + "\n")
