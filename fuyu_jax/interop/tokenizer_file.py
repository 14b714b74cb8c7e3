"""A sentencepiece model as a `tokenizer.json`, which is what transformers' processor opens."""

import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fuyu_jax.errors import UserError
from fuyu_jax.interop.images import read_json
from fuyu_jax.tokenizer import BOS_PIECE, IMAGE_PIECE, Tokenizer
from fuyu_jax.vocabulary import CONFIG_FILE, JSON_FILE, import_tokenizers

_SPACE = "\u2581"
_TRIALS = 200


def write_tokenizer_json(model: Path, folder: Path) -> str:
    """Writes `tokenizer.json` and `tokenizer_config.json` of a sentencepiece model.

    Returns:
      "" or why there is none: a library is missing, or random texts get other ids from it (then
      nothing is written).
    """
    try:
        ours = Tokenizer(model)
        fast = _convert(model)
    except (UserError, ImportError) as error:
        return str(error)
    except Exception as error:  # the library raises bare Exception
        return f"{model.name} cannot be converted ({' '.join(str(error).split())[:200]})"
    pieces = [ours.piece(i) for i in range(ours.vocab_size)]
    names = {"bos_token": ours.bos_id, "eos_token": ours.eos_id, "pad_token": ours.pad_id}
    config: dict[str, Any] = {n: None if i is None else pieces[i] for n, i in names.items()}
    config |= read_json(folder / CONFIG_FILE)  # what came with it stays
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / JSON_FILE
        fast.save(str(file))
        theirs = Tokenizer(file)
        for text in _texts(pieces):
            if ours.encode(text) != theirs.encode(text):
                return f"a {JSON_FILE} of {model.name} gives other ids for {text!r}"
        shutil.copyfile(file, folder / JSON_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    return ""


def takes_images(file: Path) -> bool:
    """Whether transformers' FuyuProcessor can lay out images with a `tokenizer.json`.

    It encodes placeholders and `<s>` as one text and always takes the first token away.
    """
    try:
        fast = import_tokenizers().Tokenizer.from_file(str(file))
    except UserError:
        return True  # cannot be told
    image, begin = fast.token_to_id(IMAGE_PIECE), fast.token_to_id(BOS_PIECE)
    ids = fast.encode(f"{IMAGE_PIECE}{IMAGE_PIECE}{BOS_PIECE}", add_special_tokens=False).ids
    return image is None or ids[1:] == [image, image, begin]


def _texts(pieces: list[str]) -> list[str]:
    """Pieces in random rows, and characters that no piece may have."""
    rng = random.Random(0)
    whole = [p.replace(_SPACE, " ") for p in pieces if not (p.startswith("<") or "|" in p)]
    texts = ["", " ", "  two  spaces ", "a\nb\tc", "naïve 図 🙂", "12 345 6.7, [8]"]
    return texts + ["".join(rng.choices(whole, k=rng.randint(1, 12))) for _ in range(_TRIALS)]


def _convert(model: Path) -> Any:
    tokenizers = import_tokenizers()
    from sentencepiece import sentencepiece_model_pb2 as proto

    read = proto.ModelProto()
    read.ParseFromString(model.read_bytes())
    kinds = proto.ModelProto.SentencePiece
    pieces = list(read.pieces)
    scored = [(p.piece, p.score) for p in pieces]
    spec = read.trainer_spec
    if spec.model_type == proto.TrainerSpec.UNIGRAM:
        core = tokenizers.models.Unigram(scored, spec.unk_id, spec.byte_fallback)
    elif spec.model_type == proto.TrainerSpec.BPE:
        core = tokenizers.models.BPE(
            {name: i for i, (name, _) in enumerate(scored)},
            _merges({p.piece: p.score for p in pieces if p.type == kinds.NORMAL}),
            unk_token=scored[spec.unk_id][0],
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    else:
        raise UserError(f"{model.name} is neither BPE nor unigram")
    fast = tokenizers.Tokenizer(core)
    steps = []
    if read.normalizer_spec.precompiled_charsmap:
        charsmap = read.normalizer_spec.precompiled_charsmap
        steps.append(tokenizers.normalizers.Precompiled(charsmap))
    if read.normalizer_spec.add_dummy_prefix:
        steps.append(tokenizers.normalizers.Prepend(_SPACE))
    steps.append(tokenizers.normalizers.Replace(" ", _SPACE))
    fast.normalizer = tokenizers.normalizers.Sequence(steps)
    back = tokenizers.decoders
    undo = [back.Replace(_SPACE, " "), back.ByteFallback(), back.Fuse()]
    if read.normalizer_spec.add_dummy_prefix:
        undo.append(back.Strip(" ", 1, 0))
    fast.decoder = back.Sequence(undo)
    added = tokenizers.AddedToken
    # What a user has defined is looked for where spaces are marked already.
    own = [added(p.piece, normalized=True) for p in pieces if p.type == kinds.USER_DEFINED]
    fast.add_tokens(own)
    control = [p.piece for p in pieces if p.type in (kinds.CONTROL, kinds.UNKNOWN)]
    fast.add_special_tokens([added(p, normalized=False, special=True) for p in control])
    return fast


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs that make a piece, the best piece first: sentencepiece's order of merging."""
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, len(found), left, right))
    return [(left, right) for _, _, left, right in sorted(found)]
