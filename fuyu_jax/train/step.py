"""The jitted train step, and the state that it carries, created sharded."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fuyu_jax.batch import PackedBatch
from fuyu_jax.model.decoder import Decoder
from fuyu_jax.model.loss import loss_sums
from fuyu_jax.parallel.fsdp import Fsdp
from fuyu_jax.parallel.mesh import batch_sharding, state_shardings
from fuyu_jax.parallel.shards import ROW_AXES


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


class Shapes(NamedTuple):
    """A state before it is made: the model's graph definition, and shapes and shardings."""

    graph: nnx.GraphDef
    state: TrainState
    shardings: TrainState


def _begin(tx: optax.GradientTransformation, params: Any) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, tx.init(params), zero)


def state_shapes(
    make_model: Callable[[], Decoder], optimizer: Callable[[Any], Any], mesh: Mesh
) -> Shapes:
    """What `create_state` makes, without making it."""
    graph, params = nnx.split(nnx.eval_shape(make_model))
    shapes = jax.eval_shape(lambda p: _begin(optimizer(p), p), params)
    return Shapes(graph, shapes, state_shardings(shapes, mesh))


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
    graph, shapes, shardings = state_shapes(make_model, optimizer, mesh)
    tx = optimizer(shapes.params)

    def make() -> TrainState:
        return _begin(tx, nnx.split(make_model())[1])

    if read_params is None:
        return graph, jax.jit(make, out_shardings=shardings)(), shardings
    params = read_params(shapes.params)
    rest = jax.jit(
        lambda p: _begin(tx, p)._replace(params=None), out_shardings=shardings._replace(params=None)
    )
    return graph, rest(params)._replace(params=params), shardings


def _make_gradient(graph: nnx.GraphDef, fsdp: Fsdp):
    """A function (params, batch [A, B, ...], factor) → gradients and the sums of loss, patch loss
    and hits, all over all rows; it runs inside `shard_map` over the rows' axes.

    Parameters outside the layers are gathered once a step, a layer's once a pass over it.
    """

    def loss_of(params: Any, batch: PackedBatch, factor: jax.Array):
        model = nnx.merge(graph, params)
        hidden, patch_loss = model.training_states(batch, fsdp.layer if fsdp.gathers else None)
        loss, hits = loss_sums(
            hidden,
            model.head_kernel(),
            batch.tokens,
            batch.loss_weights,
            z_loss=model.config.z_loss,
        )
        return loss + factor * patch_loss, (loss, patch_loss, hits)

    def one(params: Any, batch: PackedBatch, factor: jax.Array):
        grads, sums = jax.grad(loss_of, has_aux=True)(params, batch, factor)
        return fsdp.scatter_rest(grads), sums

    def gradient(params: Any, batch: PackedBatch, factor: jax.Array):
        whole = fsdp.rest(params)
        first = jax.tree.map(lambda x: x[0], batch)
        if batch.tokens.shape[0] == 1:
            grads, sums = one(whole, first, factor)
        else:
            shapes = jax.eval_shape(one, whole, first, factor)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

            def add(total, part):
                # libtpu 0.0.42 fails where it tries to move a scatter behind this loop.
                more = jax.lax.optimization_barrier(one(whole, part, factor))
                return jax.tree.map(jnp.add, total, more), None

            grads, sums = jax.lax.scan(add, zeros, batch)[0]
        return fsdp.sum_gradients(grads), jax.lax.psum(sums, ROW_AXES)

    return gradient


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
    jitted = jit_train_step(
        graph, tx, shardings, mesh, image_id=image_id, patch_loss_weight=patch_loss_weight
    )

    def run(state: TrainState, batch: PackedBatch) -> tuple[TrainState, StepMetrics]:
        with jax.set_mesh(mesh):
            return jitted(state, batch)

    return run


def jit_train_step(
    graph: nnx.GraphDef,
    tx: optax.GradientTransformation,
    shardings: Any,
    mesh: Mesh,
    *,
    image_id: int,
    patch_loss_weight: float = 0.0,
):
    """`make_train_step`'s jitted function, to be called or lowered under `jax.set_mesh(mesh)`."""
    model = nnx.merge(graph, jax.tree.map(lambda _: None, shardings.params))
    fsdp = Fsdp.of(shardings.params, model.dtype)
    gradient = jax.shard_map(
        _make_gradient(graph, fsdp),
        mesh=mesh,
        in_specs=(fsdp.row_specs(), P(None, ROW_AXES), P()),
        out_specs=(fsdp.row_specs(), P()),
        # A kernel for TPU wants every axis to be manual; a tensor axis that splits nothing is.
        axis_names=set(ROW_AXES) | ({"tensor"} if mesh.shape["tensor"] == 1 else set()),
        check_vma=False,
    )

    def step(state: TrainState, batch: PackedBatch) -> tuple[TrainState, StepMetrics]:
        weight = jnp.maximum(batch.loss_weights.sum(), 1e-6)
        patches = jnp.maximum((batch.tokens == image_id).sum(), 1)
        # Gradients are divided by the answers' weight, of all rows together; so this is, too.
        factor = patch_loss_weight * weight / patches
        grads, (loss, patch_loss, hits) = gradient(state.params, batch, factor)
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

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh, leading=1)),
        out_shardings=(shardings, None),
    )
