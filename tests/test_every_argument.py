"""Every argument of every shipped spec changes the program or the data, or is refused: none is dropped in silence."""

import contextlib
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import thorough
from PIL import Image

from imgclf_jax import losses, metrics, step
from imgclf_jax.augment import mixing, ops, tta
from imgclf_jax.config import default_config
from imgclf_jax.core import spec
from imgclf_jax.data import decode, sampling, sources
from imgclf_jax.data.source import DataInfo
from imgclf_jax.methods import table as methods
from imgclf_jax.models import backbones, classifier, parts
from imgclf_jax.optim import optimizers, schedules, weight_averages
from imgclf_jax.recipe import Recipe
from imgclf_jax.run.digests import digest_program
from imgclf_jax.scores.multilabel import TargetPredictions

SHAPE = (4, 4, 1)
KEY, KEYS, IMAGES = jax.random.key(0), jax.random.split(jax.random.key(0), 2), np.zeros((2, 8, 8, 1), np.float32)


def program(function, *args):
    return digest_program(jax.make_jaxpr(function)(*args))


def of_model(text):
    model, x = classifier.build(text, 3, "float32"), jnp.zeros((2, 32, 32, 3))

    def train(key):
        variables = model.init(key, x)
        return model.apply(variables, x, train=True, mutable=[*variables], rngs={"dropout": key})

    return program(train, KEY)


def of_ops(text):
    x, ids = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3), np.arange(2)
    return program(ops.build(text, train=True), KEY, x, jnp.uint32(0), ids, ids)


def of_metric(text):
    rng = np.random.default_rng(0)
    targets, outputs = (rng.random((30, 4)) > 0.5).astype(np.float32), rng.random((30, 4))
    metric = metrics.build_whole_set(text, losses.Task.MULTILABEL)[spec.parse_one(text).name]
    return metric(TargetPredictions(targets, outputs, outputs))


def of_optimizer(text):
    built, lookahead = optimizers.build(text, optax.constant_schedule(0.5), 0.0), optimizers.split_lookahead(text)[1]
    average = weight_averages.build(0.0, lookahead, 100, built)

    def run(params):
        state = built.init(params)
        updates, state = built.update(params, state, params, value=jnp.float32(1))
        return updates, state, average.update(average.init((params, {})), (params, {}), jnp.int32(7), state)

    params = {"kernel": jnp.zeros((256, 130)), "bias": jnp.zeros(130), "conv": {"kernel": jnp.zeros((1, 1, 2, 3))}}
    return program(run, {"backbone": params})


def of_schedule(text):
    rate = schedules.build(text, lambda duration: int(duration[:-1] or 0), 100)
    return [float(rate(i)) for i in range(100)]


def of_method(text, gradient=""):
    config = default_config()
    config.update({"augment": "normalize", "model": "mlp(widths=(8, 8), dropout=0.5)", "method": text,
                   "gradient": gradient})  # fmt: skip

    def load(problem, run, *_):
        return {"apply": lambda fixed, images: len(run) * fixed}

    recipe = Recipe(config, DataInfo(64, SHAPE, tuple("abc"), ""), load)
    train = step.make_train_step(recipe.model, recipe.method, optax.sgd(1.0), optax.constant_schedule(1.0),
                                 recipe.augment(True), gradient=recipe.gradient)  # fmt: skip
    state = step.init_state(recipe.model, optax.sgd(1.0), SHAPE, 0, head=recipe.method.predicts)
    numbers = np.arange(16, dtype=np.int32)
    batch = {"image": np.zeros((16, *SHAPE), np.uint8), "label": numbers % 3, "id": numbers, "epoch": numbers}
    return program(train, state, {**batch, "unlabeled": batch}, jnp.zeros((16, 3)))


def of_attack(text):
    attack = methods.build_attack(text)
    return program(lambda *args: attack(jnp.sin, *args, 0.0, 1.0), IMAGES, KEYS)


def of_sampling(text):
    source = sources.fake(8)["train"]
    columns = {"weight": np.arange(8.0), "other": np.arange(8.0)[::-1].copy()}
    sampler = sampling.bind(text)[1](type(source)(**{**vars(source), "columns": columns}))
    return sampler.ids(0, np.arange(50)).tolist(), sampler.epoch


def of_source(text):
    found = spec.bind(spec.parse_one(text), sources.SOURCES, "source")()
    return str({name: (one.class_names, one.read(np.arange(one.size)), one.fingerprint) for name, one in found.items()})


def of_host_op(text):
    run, _ = decode.build(text if text.startswith("decode") else f"decode|{text}")
    image = run(Path("noise.jpg").read_bytes(), 0, 0)
    return image.shape, image.tobytes()


# By key: the table, and what is compared of a call. `tfds` is left out: its arguments say where the data are.
KINDS = {
    "model": (backbones.BACKBONES, of_model),
    "norm": (parts.NORMS, lambda text: of_model(f'resnet_cifar(depth=8, norm="{text}")')),
    "activation": (parts.ACTIVATIONS, lambda text: of_model(f'mlp(activation="{text}")')),
    "head_init": (classifier.HEAD_INITS, lambda text: of_model(f'mlp(head_init="{text}")')),
    "augment": (ops.DEVICE_OPS, of_ops),
    "mix": (mixing.MIXES, lambda text: program(mixing.build(text), KEY, IMAGES)),
    "tta": (tta.VIEWS, lambda text: program(lambda x: [view(x) for _, view in tta.build(text)], IMAGES)),
    "loss": (losses.LOSSES, lambda text: program(losses.build(text), np.eye(3), np.arange(3))),
    "metrics": ({"f1": metrics.WHOLE_SET["f1"]}, of_metric),
    "optimizer": (optimizers.OPTIMIZERS, of_optimizer),
    "transform": (optimizers.TRANSFORMS, lambda text: of_optimizer(f"{text}|sgd")),
    "lookahead": ({"lookahead": weight_averages.lookahead}, lambda text: of_optimizer(f"sgd|{text}")),
    "schedule": (schedules.SCHEDULES, of_schedule),
    "method": (methods.METHODS, of_method),
    "gradient": (methods.GRADIENTS, lambda text: of_method("supervised", text)),
    "attack": (methods.ATTACKS, of_attack),
    "sampling": (sampling.SAMPLINGS, of_sampling),
    "source": ({name: f for name, f in sources.SOURCES.items() if name != "tfds"}, of_source),
    "preprocess": (decode.HOST_OPS, of_host_op),
}
# What a call needs, or has so that its other arguments matter.
GIVEN = {
    "resnet": {"depth": 18}, "resnet_cifar": {"depth": 8}, "wide_resnet": {"depth": 10, "width": 1},
    "airbench": {"widths": (8, 8, 8)}, "vit": {"variant": "Ti", "patch": 8}, "mixer": {"variant": "S", "patch": 8},
    "group_norm": {"num_groups": 2}, "distill": {"teacher": "run"}, "pgd": {"steps": 2}, "subset": {"ids": "ids.npy"},
    **{key: {"peak": 0.1} for key in schedules.SCHEDULES}, "adaptive_grad_clip": {"clipping": 0.1},
    "clip": {"max_delta": 0.1}, "clip_by_block_rms": {"threshold": 0.1}, "clip_by_global_norm": {"max_norm": 0.1},
    "fake": {"n": 16, "shape": (4, 4, 1), "classes": 3}, "folder": {"path": "photos", "unreadable": "skip"},
    "table": {"path": "table.csv", "unreadable": "skip"}, "arrays": {"path": "arrays.npz"},
    **{key: {"height": 20} for key in ("resize", "central_crop", "random_resized_crop", "inception_crop")},
    "resize_small": {"size": 19},
}  # fmt: skip
# Another value of an argument, by its name, or by those of the call and the argument.
OTHER = {
    "remat": "block", "norm": "group_norm(num_groups=2)", "activation": "tanh", "block": "my:Res", "cell": "gru",
    "shortcut": "conv", "positions": "sincos", "pool": "mean", "param_dtype": "bfloat16", "reduction_axes": (2, 3),
    "axis_name": "data", "mode": "edge", "class_weights": (1.0, 2.0, 3.0), "positive_weights": (1.0, 2.0, 3.0),
    "rope": "eva02", "qkv_bias": "qv", "mlp": "swiglu",
    ("mixup", "alpha"): 0.5, "warmup": "10%", "at": ("20%",), "average": "micro", "strong": "cutout(2)",
    "ramp": "50%", "pattern": "backbone/dense0/kernel", ("pgd", "eps"): "4/255", "min_dim_size_to_factor": 200,
    "warmup_steps": 5, "axis": 1, "preconditioning": "schatten", "muon_weight_dimension_numbers": False,
    "weight_decay_mask": False, "mask": False, "momentum": 0.5, "draft": 8, "method": "bicubic",
    "like": "torchvision", "unreadable": "error", "by": "other", "shape": (8, 8, 1),
    "label": "other_label", "targets": ("number",), "split": "other_split", ("table", "classes"): ("dog", "cat"),
    **dict.fromkeys(("dtype", "mu_dtype", "state_dtype", "dtype_momentum", "accumulator_dtype"), "bfloat16"),
    **{(name, "depth"): 2 * GIVEN[name]["depth"] - 2 for name in ("resnet", "resnet_cifar")},
}  # fmt: skip


def other_value(name, argument, default):
    for key in ((name, argument), argument):
        if key in OTHER:
            return OTHER[key]
    if isinstance(default, tuple):
        return tuple(0.7 * x for x in default)
    change = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: 0.5 * x + 0.1, str: lambda x: "other"}
    return change.get(type(default), lambda x: 0.3)(default)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images of two classes with a broken one, their table, and arrays, in the working directory."""
    with contextlib.chdir(tmp_path_factory.mktemp("files")):
        Image.effect_noise((43, 33), 64).convert("RGB").save("noise.jpg")
        rows = ["file,label,number,other_label,split,other_split", "photos/cat/broken.png,cat,0,xcat,test,test"]
        for name in ("cat", "dog"):
            Path("photos", name).mkdir(parents=True)
            for i, (split, other) in enumerate([("train", "test"), *[("test", "train")] * 3]):
                Image.effect_noise((8, 8), 50).save(f"photos/{name}/{i}.png")
                rows.append(f"photos/{name}/{i}.png,{name},{i},x{name},{split},{other}")
        Path("photos/cat/broken.png").touch()
        Path("table.csv").write_text("\n".join(rows))
        np.save("ids", np.arange(5))
        np.savez("arrays", x_train=np.zeros((5, 4, 4, 1), np.uint8), y_train=np.arange(5) % 2)
        yield


SLOW = ("wide_resnet", "convnext", "vit", "mixer", "airbench", "layer_norm", "group_norm", "supcon", "simclr",
        "distill", "asam", "cutmix", "efficientnet", "mobilenet", "regnety", "resnet", "batch_norm", "fixmatch",
        "mean_teacher", "pgd", "clip_per_example")  # fmt: skip
CASES = [case for kind, (table, _) in KINDS.items() for name in table
         for case in (thorough((kind, name)) if name in SLOW else [(kind, name)])]  # fmt: skip


@pytest.mark.usefixtures("files", "shallow")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_an_argument_has_an_effect_or_is_refused(kind, name):
    table, result = KINDS[kind]
    given, silent = GIVEN.get(name, {}), []

    def of(arguments):
        return result(str(spec.Call(name, (), arguments)))

    plain = of(given)
    assert plain == of(given)
    for argument, parameter in inspect.signature(table[name]).parameters.items():
        default = given.get(argument, parameter.default)
        if default is parameter.empty or argument in ("parent", "name"):  # which the caller passes
            continue
        value = other_value(name, argument, default)
        with contextlib.suppress(TypeError, ValueError):  # of this package, a UserError, or of the library
            if of({**given, argument: value}) == plain:
                silent.append(f"{argument}={value!r}")
    assert not silent
