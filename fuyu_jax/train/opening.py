"""All that a run needs, opened: data, tokenizer, model and state; on several hosts as on one."""

import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from fuyu_jax.checkpoint import check_workdir, claim_workdir
from fuyu_jax.config import TrainConfig
from fuyu_jax.data.layout import LayoutPolicy
from fuyu_jax.data.opening import Sources, keep_tokenizer, open_sources, open_tokenizer
from fuyu_jax.data.packed import PackedData
from fuyu_jax.errors import UserError
from fuyu_jax.generate.loading import model_maker
from fuyu_jax.parallel import hosts
from fuyu_jax.tokenizer import Tokenizer
from fuyu_jax.train.optimizer import make_optimizer
from fuyu_jax.train.start import Start, open_start
from fuyu_jax.train.step import TrainState, create_state


@dataclasses.dataclass
class Opened:
    """A run before its first step.

    begun_from: what is told of `init_from`. sees: its patch projection is trained.
    """

    sources: Sources
    policy: LayoutPolicy
    tokenizer: Tokenizer
    data: PackedData
    graph: nnx.GraphDef
    state: TrainState
    shardings: Any
    begun_from: str = ""
    sees: bool = False


def open_run(config: TrainConfig, workdir: Path, mesh: Mesh) -> Opened:
    """Opens a run, and makes the work folder its own.

    What is made once (the demo set, a tokenizer, cleaning) the first host makes, and the others
    find it. All other input each host reads for itself.

    Raises:
      UserError: bad input; nothing is written then.
      TrainingStoppedError: too many images are missing or broken.
    """
    known = hosts.together(lambda: check_workdir(workdir, config))
    with hosts.scratch_folder(workdir) as scratch:
        # The work folder is touched only when all input has been found good.
        place = workdir if known else scratch

        def find() -> tuple[Sources, Start | None, Tokenizer]:
            sources = open_sources(config.data)
            sources = sources.clean(place, progress=config.progress and hosts.first())
            if not known:
                sources.keep_cleaning(place)
            start = open_start(config, workdir, scratch)
            return sources, start, open_tokenizer(sources, place, start and start.tokenizer)

        sources, start, tokenizer = hosts.first_to_last(find)
        policy = LayoutPolicy.of(config.model, config.data)
        data = hosts.together(
            lambda: PackedData(
                sources.open_mixture("train", config.model, config.seed),
                tokenizer,
                policy,
                config.data,
                config.seed,
                balance_rows=config.rows_per_batch if config.data.balance_patches else 0,
                quiet=not hosts.first(),
            )
        )
        _check_same(data)
        graph, state, shardings = create_state(
            model_maker(config, tokenizer),
            lambda params: make_optimizer(config.optim, params, config.num_steps),
            mesh,
            start and start.read_params,
        )
        opened = Opened(sources, policy, tokenizer, data, graph, state, shardings)
        opened.sees = bool(start and start.sees)

        def keep() -> None:
            if not hosts.first():
                tokenizer.path = Tokenizer(workdir).path
                return
            claim_workdir(workdir, config)
            if not known:
                tokenizer.path = keep_tokenizer(tokenizer.path, workdir)
            opened.begun_from = start.finish(workdir) if start else ""
            sources.keep_cleaning(workdir)
            data.save_plan(workdir)

        hosts.first_to_last(keep)
    # A host meets the broken images of its own rows.
    name = "" if hosts.first() else f".host{hosts.index()}"
    data.bad.quiet = False
    data.bad.keep_in(workdir / f"bad_examples{name}.jsonl")
    return opened


def _check_same(data: PackedData) -> None:
    """Looks whether all hosts have planned the same rows.

    Raises:
      UserError: names a host that has not.
    """
    plans = hosts.gather(data.hash)
    for host, plan in enumerate(plans):
        if plan != plans[0]:
            raise UserError(
                f"host {host} sees other data than host 0 (plan {plan} there, {plans[0]} here): "
                "all hosts must see the same files"
            )
