"""A trained model, from a run or from weights."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from imgclf_jax import losses
from imgclf_jax.core import processes, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources, stream
from imgclf_jax.inference import backbone_features
from imgclf_jax.methods import Problem
from imgclf_jax.programs import Programs, programs_for_images
from imgclf_jax.recipe import Recipe, check_names
from imgclf_jax.run import provenance
from imgclf_jax.run.checkpoint import Checkpoints, Gone
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.trained import Trained
from imgclf_jax.weights import pretrained

log = logging.getLogger(__name__)


def load(workdir: str | os.PathLike[str], checkpoint: str = "", trust: bool = False) -> Trained:
    """The trained model of the run in a work directory; `checkpoint` is "best", "latest" or a step, see `restore`.

    Nothing that the run names is imported or fetched, unless `trust` says so. Raises UserError if there is no run or
    no such checkpoint, or if the run's config names code of its own.
    """
    place = Workdir.named(os.fspath(workdir))
    with contextlib.nullcontext() if trust else place.untrusted([os.fspath(workdir)]):
        config = place.load_config()
        check_names(config)
        model = restore(config, place, checkpoint)
        _ = model.programs.host_ops  # all that may import is put together in here
        return model


def load_teacher(problem: Problem, run: str, checkpoint: str = "", trust: bool = False) -> dict[str, Any]:
    """What `methods.Teacher` has: the variables of the run in a work directory, and pure functions of them.

    Raises UserError, besides what `load` raises it for, if the run's images differ from the problem's.
    """
    found = load(run, checkpoint, trust)
    recipe, replicas = found.programs.recipe, found.programs.recipe.num_seeds
    if replicas > 1:
        raise UserError(f"{run} holds num_seeds={replicas} models, and a teacher is one; train it with one seed")
    if recipe.data.image_shape != problem.image_shape:
        raise UserError(f"{run} was trained on images {list(recipe.data.image_shape)}, and this run has "
                        f"{list(problem.image_shape)}; give both the same preprocess")  # fmt: skip
    if recipe.normalization != problem.normalization:
        raise UserError(
            f"{run} was trained with {recipe.normalization or 'no normalization'!r} in augment, and this run"
            f" has {problem.normalization or 'none'!r}: its predictions would be wrong; give both the same"
        )
    params, model_state = found.state.evaluated

    def apply(variables: Any, images: jax.Array) -> jax.Array:
        found.programs.check_predicts()
        return losses.at_least_float32(recipe.model.apply(variables, images, train=False))

    def features(variables: Any, images: jax.Array) -> jax.Array:
        return losses.at_least_float32(backbone_features(recipe.model, variables, images))

    return {"variables": {"params": params, **model_state}, "apply": apply, "features": features,
            "link": losses.link_of(recipe.config.loss), "class_names": recipe.data.class_names,
            "classes": len(recipe.data.class_names)}  # fmt: skip


def load_trained(config: ConfigDict, workdir: Workdir | None, which: str) -> Trained:
    """The trained model of a run or, without a work directory, of the weights that `init_from` names."""
    return restore(config, workdir, which) if workdir else load_converted(config)


def restore(config: ConfigDict, workdir: Workdir, which: str) -> Trained:
    """The trained model of a run; `which` is "best", "latest" or a step.

    The empty text is the best checkpoint if there is one, and else the latest. Raises UserError if there is no such
    checkpoint.
    """
    programs = _programs(config, workdir)
    if not workdir.checkpoints.is_dir():
        raise UserError(f"{workdir.path} holds no checkpoint yet; train first")
    for _ in range(20):
        with contextlib.suppress(Gone):  # the run that goes on in this directory saves and removes checkpoints
            state, step = _choose(config, workdir, which, programs)
            processes.agree("comparing modules", provenance.module_digests, in_both=True)  # more are imported by now
            return Trained(programs, state, step)
    raise UserError(f"{workdir.checkpoints}: each checkpoint was removed while it was read; wait until the run ends")


def restore_each(config: ConfigDict, workdir: Workdir, which: str) -> Iterator[Trained]:
    """The trained model at several steps, one after the other; `which` is "all", or steps such as "100,200".

    Raises UserError, before the first one, if there is none of these steps.
    """
    programs = _programs(config, workdir)
    kept = Checkpoints(workdir.checkpoints, config.checkpoint.keep, config.checkpoint.best, read_only=True)
    there = (
        processes.broadcast_from_process_0("listing checkpoints", kept.steps) if workdir.checkpoints.is_dir() else []
    )
    asked = [str(step) for step in there] if which == "all" else which.split(",")
    if not there or not set(asked) <= {str(step) for step in there}:
        raise UserError(
            f"--checkpoints={which}: there are {there} in {workdir.checkpoints}; pass all, or some of these"
        )

    def load(step: int) -> Trained:
        model = Trained(programs, kept.restore(step, {"state": programs.state_shape}, optimizer=False)["state"], step)
        workdir.check_parameters(step, model.state.params)
        return model

    return (load(int(step)) for step in asked)


def _programs(config: ConfigDict, workdir: Workdir) -> Programs:
    recipe = Recipe(config, workdir.load_data_info(), load_teacher)
    return Programs(recipe, sharding.make_inference_mesh(config.mesh))


def _choose(config: ConfigDict, workdir: Workdir, which: str, programs: Programs) -> tuple[Any, int]:
    metric = config.checkpoint.best
    checkpoints = Checkpoints(workdir.checkpoints, config.checkpoint.keep, metric, read_only=True)
    steps, best = processes.broadcast_from_process_0(
        "choosing a checkpoint", lambda: [checkpoints.steps(), checkpoints.best_step()]
    )
    names = {"latest": steps[-1] if steps else None, "best": best, "": best}
    step = names.get(which, int(which) if which.isdecimal() else None)
    if step is None and which == "":
        found = checkpoints.restore_latest({"state": programs.state_shape}, optimizer=False)
        if found is None:
            raise UserError(f"{workdir.path} holds no checkpoint yet; train first")
        step, run = found
    elif step is None or step not in steps:
        raise UserError(f"--checkpoint={which}: there are {steps} in {workdir.checkpoints}"
                        + (f", {best} is the best by {metric}" if best is not None
                           else f", and none has a finite {metric}" if metric
                           else "; 'best' needs checkpoint.best to be set"))  # fmt: skip
    else:
        try:
            run = checkpoints.restore(step, {"state": programs.state_shape}, optimizer=False)
        except Gone:
            raise
        except UserError as e:
            intact = processes.broadcast_from_process_0(
                "looking for another checkpoint", lambda: checkpoints.intact(step)
            )
            if not intact:
                raise
            raise UserError(f"{e}; --checkpoint={intact} names one that is whole") from e
    workdir.check_parameters(step, run["state"].params)
    log.info("checkpoint of step %d from %s", step, workdir.checkpoints)
    return run["state"], step


def load_converted(config: ConfigDict, base: dict[str, sources.Source] | None = None, whole: bool = True) -> Trained:
    """The model of the weights that `init_from` names, at step 0, for the classes of the source `base`.

    That is the config's, unless it has been opened before. If it need not be `whole`, its head may be random.

    Raises UserError if the weights lack a part of the model.
    """
    base = base or sources.open_data(config)
    source = next(iter(base.values()))  # every split has the same classes and the same shape
    with contextlib.suppress(UserError):
        source = sources.take_split(base, config.data.train)
    mesh = sharding.make_inference_mesh(config.mesh)
    programs = programs_for_images(config, stream.as_evaluated(source, config), mesh)
    weights = pretrained.load(programs, whole)
    return Trained(programs, programs.init_state(weights=weights.taken), 0)
