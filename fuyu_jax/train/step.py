"""The jitted train step, and the state that it carries, created sharded."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from fuyu_jax.batch import PackedBatch
from fuyu_jax.model.decoder import Decoder
from fuyu_jax.model.loss import loss_sums
from fuyu_jax.parallel.mesh import batch_sharding, state_shardings


class TrainState(NamedTuple):
    """All that a step changes.

    step: updates made. halted: 0, or 1 once a loss or gradient was not finite; from then on no
    step changes the parameters, so those before the bad batch are there to be saved.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    halted: jax.Array


class StepMetrics(NamedTuple):
    """Float32 scalars of one step: means over its loss positions, sums over its rows.

    patch_loss is a mean over patches, without its weight.
    """

    loss: jax.Array
    patch_loss: jax.Array
    grad_norm: jax.Array
    token_accuracy: jax.Array
    loss_tokens: jax.Array
    tokens: jax.Array
    halted: jax.Array


def create_state(
    make_model: Callable[[], Decoder],
    optimizer: Callable[[Any], Any],
    mesh: Mesh,
    read_params: Callable[[Any], Any] | None = None,
) -> tuple[nnx.GraphDef, TrainState, Any]:
    """Makes parameters and optimizer state, each born with its sharding.

    Args:
      make_model: with fresh parameters.
      optimizer: of parameters or their shapes.
      mesh: what the state lies on.
      read_params: from the parameters' shapes to parameters on the mesh, instead of fresh ones.

    Returns:
      The model's graph definition, the state, and the state's shardings.
    """
    graph, shapes = nnx.split(nnx.eval_shape(make_model))
    tx = optimizer(shapes)

    def begin(params: Any) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, tx.init(params), zero)

    def make() -> TrainState:
        return begin(nnx.split(make_model())[1])

    shardings = state_shardings(jax.eval_shape(make), mesh)
    if read_params is None:
        return graph, jax.jit(make, out_shardings=shardings)(), shardings
    params = read_params(shapes)
    rest = jax.jit(
        lambda p: begin(p)._replace(params=None), out_shardings=shardings._replace(params=None)
    )
    return graph, rest(params)._replace(params=params), shardings


def make_train_step(
    graph: nnx.GraphDef,
    tx: optax.GradientTransformation,
    shardings: Any,
    mesh: Mesh,
    *,
    image_id: int,
    patch_loss_weight: float = 0.0,
) -> Callable[[TrainState, PackedBatch], tuple[TrainState, StepMetrics]]:
    """The train step; its batch has a leading axis of accumulation steps [A, B, ...].

    The loss is Σ weight · cross-entropy / Σ weight over all A·B rows, so accumulation changes
    memory and nothing else. The model's loss on patches, where it has one, is added as a mean over
    all patches times its weight.
    """

    def loss_of(params: Any, batch: PackedBatch, factor: jax.Array):
        model = nnx.merge(graph, params)
        hidden, patch_loss = model.training_states(batch)
        loss, hits = loss_sums(hidden, model.head_kernel(), batch.tokens, batch.loss_weights)
        return loss + factor * patch_loss, (loss, patch_loss, hits)

    gradient = jax.grad(loss_of, has_aux=True)

    def accumulate(params: Any, batch: PackedBatch, factor: jax.Array):
        if batch.tokens.shape[0] == 1:
            return gradient(params, jax.tree.map(lambda x: x[0], batch), factor)

        def add(sums, one):
            return jax.tree.map(jnp.add, sums, gradient(params, one, factor)), None

        one = jax.tree.map(lambda x: x[0], batch)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, one, factor)
        )
        return jax.lax.scan(add, zeros, batch)[0]

    def step(state: TrainState, batch: PackedBatch) -> tuple[TrainState, StepMetrics]:
        weight = jnp.maximum(batch.loss_weights.sum(), 1e-6)
        patches = jnp.maximum((batch.tokens == image_id).sum(), 1)
        # Gradients are divided by the answers' weight, of all rows together; so this is, too.
        factor = patch_loss_weight * weight / patches
        grads, (loss, patch_loss, hits) = accumulate(state.params, batch, factor)
        loss = loss / weight
        grads = jax.tree.map(lambda g: g / weight, grads)
        norm = optax.global_norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & (state.halted == 0)

        def keep(new, old):
            return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

        new = TrainState(
            state.step + good.astype(jnp.int32),
            keep(params, state.params),
            keep(opt_state, state.opt_state),
            1 - good.astype(jnp.int32),
        )
        metrics = StepMetrics(
            loss=loss,
            patch_loss=patch_loss / patches,
            grad_norm=norm,
            token_accuracy=hits / jnp.maximum((batch.loss_weights > 0).sum(), 1),
            loss_tokens=(batch.loss_weights > 0).sum().astype(jnp.float32),
            tokens=(batch.segment_ids > 0).sum().astype(jnp.float32),
            halted=new.halted.astype(jnp.float32),
        )
        return new, metrics

    jitted = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh, leading=1)),
        out_shardings=(shardings, None),
    )

    def run(state: TrainState, batch: PackedBatch) -> tuple[TrainState, StepMetrics]:
        with jax.set_mesh(mesh):  # attention and loss keep to each device's own rows
            return jitted(state, batch)

    return run
