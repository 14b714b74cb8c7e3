"""A model of `fuyu_jax.load` as lmms-eval asks it. Only lmms-eval imports this."""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from PIL import Image as PilImage
from tqdm import tqdm

from fuyu_jax.data.example import BadImageError
from fuyu_jax.errors import UserError, nearest
from fuyu_jax.evals.settings import parse_mesh
from fuyu_jax.generate.engine import Answer
from fuyu_jax.generate.opening import load
from fuyu_jax.generate.pretrained import Score

_MARK = re.compile(r"[ \t]*<image>\n?")
# What a task may say about generation and means something here.
_KNOWN = ("max_new_tokens", "temperature", "top_p", "num_beams", "length_penalty")
_HANDLED = ("until", "do_sample")


class FuyuJax(lmms):
    """`--model fuyu_jax --model_args checkpoint=FOLDER[,dtype=bfloat16][,mesh="fsdp=-1"]`.

    Args:
      checkpoint: as `fuyu_jax.load` takes it.
      dtype: "float32" or "bfloat16".
      mesh: axes, as `--mesh` of eval.py.
      batch_size: answers that are decoded together.
      max_new_tokens: where a task does not say.
      seed: of tasks that draw by chance.
      device, max_batch_size: lmms-eval's own; JAX chooses devices by JAX_PLATFORMS.

    Raises:
      UserError: an unknown argument, or a checkpoint that cannot be opened.
    """

    is_simple = True

    def __init__(
        self,
        checkpoint: str = "",
        dtype: str = "float32",
        mesh: str = "",
        batch_size: int | str = 16,
        max_new_tokens: int = 128,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        for name in unknown:
            known = ("checkpoint", "dtype", "mesh", "batch_size", "max_new_tokens", "seed")
            raise UserError(f'--model_args: unknown "{name}"{nearest(name, known)}')
        if not checkpoint:
            raise UserError("--model_args: give checkpoint=FOLDER")
        self.model = load(checkpoint, dtype=dtype, mesh=parse_mesh(mesh))
        self._batch_size = 16 if batch_size == "auto" else int(batch_size)
        self._max_new_tokens = int(max_new_tokens)
        self._seed = int(seed)

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        asked = []
        for request in requests:
            context, options, to_visual, doc_id, task, split = request.args
            asked.append((self._prompt(context, to_visual, doc_id, task, split), options))
        answers = self._generate(asked)
        return [
            GenerationResult(
                text=_until(answer.text, options),
                token_counts=TokenCounts(output_tokens=len(answer.tokens)),
            )
            for answer, (_, options) in zip(answers, asked, strict=True)
        ]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of each request's rounds. After each the task says what comes next."""
        prompts: dict[int, list[Any]] = {}
        rounds: list[list[str]] = [[] for _ in requests]
        infos: list[Any] = [None] * len(requests)
        for n, request in enumerate(requests):
            context, _, to_visual, _, doc_id, task, split = request.args
            prompts[n] = self._prompt(context, to_visual, doc_id, task, split)
        at = 0
        while prompts:
            order = list(prompts)
            said = self._generate([(prompts[n], requests[n].args[1]) for n in order])
            at += 1
            prompts = {}
            for n, answer in zip(order, said, strict=True):
                _, options, _, to_text, doc_id, task, split = requests[n].args
                visuals, context, over, done, infos[n] = to_text(
                    self.task_dict[task][split][doc_id],
                    previous_output=[*rounds[n], _until(answer.text, options)],
                    round_idx=at,
                    previous_round_info=infos[n],
                )
                rounds[n] = list(done)
                if not over:
                    prompts[n] = _interleaved(context, visuals)
        return rounds

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """For each (negative log-likelihood, is greedy).

        lmms-eval takes the smallest. It turns a bare pair into a text; the wrapper it hands on.
        """
        pairs = []
        for request in requests:
            if len(request.args) == 2:  # a choice by itself
                context, words = request.args
                prompt = _interleaved(context, ())
            else:
                context, words, to_visual, doc_id, task, split = request.args
                prompt = self._prompt(context, to_visual, doc_id, task, split)
                if not isinstance(words, str):
                    words = words(self.task_dict[task][split][doc_id])
            if self.model.tokenizer.answer_id is not None:
                # Behind the mark of an answer a model has learnt answers without a space.
                words = words.removeprefix(" ")
            pairs.append((prompt, words))
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(pairs), desc="fuyu_jax: likelihoods") as bar:

            def on_score(at: int, score: Score | str) -> None:
                if isinstance(score, str):
                    raise BadImageError(f"request {at}: {score}")
                found[at] = (-score.logprob, score.is_greedy)
                bar.update()

            self.model.scores(pairs, on_score=on_score)
        return [GenerationResult(text=found[n]) for n in range(len(pairs))]

    def _prompt(self, context: str, to_visual: Any, doc_id: Any, task: str, split: str) -> list:
        doc = self.task_dict[task][split][doc_id]
        return _interleaved(context, (to_visual(doc) if to_visual is not None else None) or ())

    def _generate(self, asked: Sequence[tuple[list, Mapping[str, Any]]]) -> list[Answer]:
        """Requests with the same settings at once."""
        groups: dict[str, list[int]] = {}
        for n, (_, options) in enumerate(asked):
            groups.setdefault(json.dumps(self._settings(options), sort_keys=True), []).append(n)
        answers: dict[int, Answer] = {}
        with tqdm(total=len(asked), desc="fuyu_jax: answers") as bar:
            for settings, places in groups.items():

                def on_answer(at: int, answer: Answer, places: list[int] = places) -> None:
                    if answer.error:
                        raise BadImageError(f"request {places[at]}: {answer.error}")
                    answers[places[at]] = answer
                    bar.update()

                self.model.generate(
                    [asked[n][0] for n in places],
                    batch_size=self._batch_size,
                    on_answer=on_answer,
                    seed=self._seed,
                    **json.loads(settings),
                )
        return [answers[n] for n in range(len(asked))]

    def _settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """A task's `generation_kwargs` as `generate` takes them."""
        found: dict[str, Any] = {"max_new_tokens": self._max_new_tokens}
        for name, value in options.items():
            if name in _KNOWN and value is not None:
                found[name] = value
            elif name not in _KNOWN and name not in _HANDLED:
                told = f"fuyu_jax does nothing with a task's generation_kwargs.{name}={value}"
                warnings.warn(told, stacklevel=2)  # each is told once
        found["max_new_tokens"] = int(found["max_new_tokens"])
        # Tasks write top_p 0 where they draw nothing.
        if not found.get("temperature") or options.get("do_sample") is False:
            found = {k: v for k, v in found.items() if k not in ("temperature", "top_p")}
        if options.get("do_sample") and options.get("temperature") is None:
            found["temperature"] = 1.0
        return found


def _interleaved(context: str, visuals: Any) -> list[Any]:
    """Texts and images in order: images where `<image>` stands, or else before the text.

    Raises:
      UserError: something to see that is no image; marks for another number of images.
    """
    visuals = list(visuals) if isinstance(visuals, list | tuple) else [visuals]
    for visual in visuals:
        if not isinstance(visual, PilImage.Image):
            raise UserError(f"fuyu_jax sees images, not {type(visual).__name__}")
    pieces = _MARK.split(context)
    if len(pieces) == 1 or not visuals:
        return [*visuals, context]
    if len(pieces) - 1 != len(visuals):
        raise UserError(f"{len(pieces) - 1} <image> marks for {len(visuals)} images")
    parts: list[Any] = [pieces[0]]
    for visual, piece in zip(visuals, pieces[1:], strict=True):
        parts += [visual, piece]
    return [part for part in parts if not (isinstance(part, str) and not part)]


def _until(text: str, options: Mapping[str, Any]) -> str:
    """An answer up to the first of a task's stop texts."""
    stops = options.get("until") or ()
    for stop in (stops,) if isinstance(stops, str) else stops:
        if stop:
            text = text.split(stop)[0]
    return text
