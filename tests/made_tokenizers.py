"""Small vocabularies of the kinds that Fuyu, Llama and Qwen have, trained here."""

import io
import json

import sentencepiece as spm

from fuyu_jax.tokenizer import EOS_PIECE, IMAGE_PIECE, NEWLINE_PIECE

TEXTS = [
    "Generate a coco-style caption.\n",
    "What is in the picture? A bus and 12 people in 1998.",
    "Où est le café ? Près de l'église, à 3 km.",
    "Wo steht das Haus?  Zwei  Leerzeichen, ein\tTab.",
    "图片里有什么？一辆公共汽车。",
    "point and box: <box>1, 2</box> <point> 7 </point>",
] * 30


def sentencepiece_model(path, *, kind="bpe", own=(), vocab_size=600):
    """As Llama's or (unigram) Fuyu's: byte pieces, spaces as ▁, one put before a text."""
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=out,
        vocab_size=vocab_size + len(own),
        model_type=kind,
        byte_fallback=True,
        hard_vocab_limit=False,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=kind == "bpe",
        user_defined_symbols=list(own),
        pad_id=-1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
        num_threads=1,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(out.getvalue())
    return path


def _metaspaced(fast):
    from tokenizers import decoders, normalizers

    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return fast


def fuyu_json(folder, coordinates=970):
    """Unigram, with the marks and coordinates as pieces; tokenizer.json and its own .model."""
    from tokenizers import Tokenizer, models

    own = [IMAGE_PIECE, NEWLINE_PIECE, EOS_PIECE, *map(str, range(coordinates))]
    model = sentencepiece_model(folder / "tokenizer.model", kind="unigram", own=own)
    sp = spm.SentencePieceProcessor(model_file=str(model))
    pieces = [(sp.id_to_piece(i), sp.get_score(i)) for i in range(sp.vocab_size())]
    fast = _metaspaced(Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True)))
    fast.save(str(folder / "tokenizer.json"))
    # As in Fuyu-8B's folder: neither of them is what the layout calls <s>.
    config = {"bos_token": EOS_PIECE, "eos_token": EOS_PIECE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def llama_json(folder):
    """BPE over characters with byte fallback."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    first = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    learnt = Tokenizer(models.BPE(unk_token="<unk>"))
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    learnt.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=500, show_progress=False, limit_alphabet=60)
    )
    state = json.loads(learnt.to_str())["model"]
    pieces = [*first, *sorted(state["vocab"], key=state["vocab"].get)]
    fast = Tokenizer(
        models.BPE(
            {p: i for i, p in enumerate(dict.fromkeys(pieces))},
            [tuple(m) for m in state["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    _metaspaced(fast)
    fast.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in first[:3]])
    fast.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def qwen_json(folder):
    """BPE over bytes: no <s>, no byte pieces, id 0 a piece of text, the end also its padding."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    folder.mkdir(parents=True, exist_ok=True)
    fast = Tokenizer(models.BPE())
    fast.normalizer = normalizers.NFC()
    words = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|\s+")
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    fast.train_from_iterator(TEXTS, trainer)
    ends = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    fast.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in ends])
    fast.save(str(folder / "tokenizer.json"))
    config = {"bos_token": None, "eos_token": ends[0], "pad_token": ends[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"
