"""A step of each method, as a run compiles it, against the papers' losses in NumPy: gradient, metrics and teacher."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from cases import thorough
from scipy.special import expit, log_softmax, rel_entr, softmax

from imgclf_jax.augment import ops
from imgclf_jax.core import rng, sharding, tree
from imgclf_jax.data.source import DataInfo
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe

LAST = 2  # the step that is compared: at step 0 B of LoRA is zero, and the teacher is the student
TEACHER = np.random.default_rng(1).normal(size=(12, 3)).astype(np.float32)
KNOWN = {"variables": TEACHER, "apply": lambda w, x: x.reshape(len(x), -1) @ w}  # of the run that distill reads
AUGMENT = {"w": "pad_crop(1)|normalize(0.5, 0.25)", "s": "cutout(2, fill=99)|normalize(0.5, 0.25)"}


def features(p, x):
    return np.tanh(x @ p["backbone/dense0/kernel"] + p["backbone/dense0/bias"])


def logits(p, x):
    return features(p, x) @ p["head/kernel"] + p["head/bias"]


def nll(z, y):
    return -(y * log_softmax(z, 1)).sum(1)


def bernoulli(p, q):
    """The divergence summed over classes; of one-hot p it is the cross-entropy."""
    return (rel_entr(p, q) + rel_entr(1 - p, 1 - q)).sum(1)


def supervised(values, p, step):
    """(Loss, metrics) of parameters p and a step: views x f64[b, h * w * c], labels y, and constant parameters."""
    return values(logits(p, step.x[0]), step.y).mean(), {}


def distill(values, link, divergence, p, step):
    """Section 2 of arXiv:1503.02531."""
    z, t = logits(p, step.x[0]), step.x[0] @ TEACHER
    kl = 2.5**2 * divergence(link(t / 2.5), link(z / 2.5)).mean()
    return 0.7 * values(z, step.y).mean() + 0.3 * kl, {"distillation": kl}


def contrast(temperature, by_label, p, step):
    """Equation 2 of arXiv:2004.11362; with one positive for each view it is equation 1 of arXiv:2002.05709."""
    ids, z = np.tile(step.y.argmax(1) if by_label else np.arange(8), 2), features(p, np.concatenate(step.x))
    z = np.maximum(z @ p["projector/hidden/kernel"] + p["projector/hidden/bias"], 0) @ p["projector/out/kernel"]
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    positive = (ids[:, None] == ids) & ~np.eye(16, dtype=bool)
    similar = np.exp(z @ z.T / temperature) * ~np.eye(16, dtype=bool)
    losses = -np.log(similar / similar.sum(1, keepdims=True), where=positive, out=np.zeros((16, 16)))
    accuracy = positive[np.arange(16), similar.argmax(1)].mean()
    return (losses.sum(1) / positive.sum(1)).mean(), {"contrastive_accuracy": accuracy}


def fixmatch(p, step):
    """Equations 3 and 4 of arXiv:2001.07685."""
    q = softmax(logits(step.before, step.x[1]), 1)
    mask = q.max(1) >= 0.54
    assert 0 < mask.mean() < 1
    unlabeled = (mask * nll(logits(p, step.x[2]), np.eye(3)[q.argmax(1)])).mean()
    metrics = {"mask_rate": mask.mean(), "unlabeled_loss": unlabeled}
    return nll(logits(p, step.x[0]), step.y).mean() + 2 * unlabeled, metrics


def mean_teacher(weight, p, step):
    """Section 2 of arXiv:1703.01780, with the mean over classes of the authors' code."""
    z, t = logits(p, np.concatenate(step.x[::2])), logits(step.teacher, np.concatenate(step.x[1::2]))
    distance = ((softmax(z, 1) - softmax(t, 1)) ** 2).mean()
    metrics = {"consistency": distance, "consistency_weight": weight}
    return nll(z[:8], step.y).mean() + weight * distance, metrics


def lora(p, step):
    """Equation 3 of arXiv:2106.09685, with alpha / rank = 3 / 2; the rest of the backbone is frozen."""
    base = {name: x for name, x in step.before.items() if name.startswith("backbone/dense0/")}
    product = p["backbone/lora/dense0/kernel/a"] @ p["backbone/lora/dense0/kernel/b"]
    merged = {"backbone/dense0/kernel": base["backbone/dense0/kernel"] + 3 / 2 * product}
    return supervised(nll, {**p, **base, **merged}, step)


DISTILL = "distill('run', alpha=0.3, temperature=2.5)"
# The method; the loss; its views: weak or strong, of the batch or (in capitals) of the unlabeled stream; the oracle.
CASES = [
    ("supervised", "softmax", "w", (supervised, nll)),
    (DISTILL, "softmax", "w", (distill, nll, lambda z: softmax(z, 1), lambda p, q: rel_entr(p, q).sum(1))),
    ("simclr(temperature=0.4, width=5)", "softmax", "ww", (contrast, 0.4, False)),
    ("supcon(temperature=0.3, width=5, hidden=6)", "softmax", "ww", (contrast, 0.3, True)),
    ("fixmatch(0.54, weight=2.0, strong='cutout(2, fill=99)')", "softmax", "wWS", (fixmatch,)),
    ("mean_teacher(decay=0.6, weight=9.0, ramp='')", "softmax", "ww  ", (mean_teacher, 9)),
    ("lora(rank=2, alpha=3.0)", "softmax", "w", (lora,)),
    *thorough(
        ("supervised", "softmax(label_smoothing=0.1, class_weights=(1, 3, 0.5))", "w",
         (supervised, lambda z, y: y @ [1, 3, 0.5] * nll(z, 0.9 * y + 0.1 / 3))),
        ("supervised", "sigmoid", "w", (supervised, lambda z, y: bernoulli(y, expit(z)))),
        ("supervised", "focal(gamma=0.5)", "w", (supervised, lambda z, y: nll(z, y * (1 - softmax(z, 1)) ** 0.5))),
        (DISTILL, "sigmoid", "w", (distill, lambda z, y: bernoulli(y, expit(z)), expit, bernoulli)),
        ("mean_teacher(decay=0.6, weight=9.0, ramp='5 steps')", "softmax", "wwWW",
         (mean_teacher, 9 * np.exp(-5 * (1 - LAST / 5) ** 2))),
    ),
]  # fmt: skip


def flat(variables):
    return {name: np.float64(x) for name, x in tree.named_leaves(variables)}


def slopes(loss, p, name):
    """The gradient with respect to the parameter `name`, by central differences."""
    units = 1e-5 * np.eye(p[name].size).reshape(-1, *p[name].shape)
    values = [[loss({**p, name: p[name] + sign * unit})[0] for sign in (1, -1)] for unit in units]
    return (np.array(values) @ [1, -1] / 2e-5).reshape(p[name].shape)


def view(kind, key, batch):
    images = (batch if kind.islower() else batch["unlabeled"])["image"]
    return np.float64(jax.jit(ops.build(AUGMENT[kind.lower()], train=True))(key, images)).reshape(len(images), -1)


@pytest.mark.parametrize(("method", "loss", "views", "oracle"), CASES)
def test_a_step_is_that_of_the_paper(method, loss, views, oracle, fake_config):
    """By plain SGD at learning rate 1, whose update is the gradient; with a stream in two microbatches, as in one."""
    fake_config.update(method=method, loss=loss, augment=AUGMENT["w"], model="mlp(widths=(4,), activation='tanh')",
                       batch_size=8, optimizer="sgd", schedule="constant(1.0)")  # fmt: skip
    streams = {"unlabeled": "train|batch_size(12)"} if "W" in views else {}
    fake_config.data.extra, fake_config.accumulate = streams, 1 + len(streams)
    data = DataInfo(64, (4, 3, 1), tuple("abc"), "")
    data.extra.update(dict.fromkeys(streams, data))
    recipe = Recipe(fake_config, data, lambda problem, *_: vars(problem) | KNOWN)
    programs, draw = Programs(recipe, sharding.make_mesh(jax.devices()[:1])), np.random.default_rng(0)
    batch = jax.tree.map(lambda x: draw.integers(256 if x.dtype == np.uint8 else 3, size=x.shape, dtype=x.dtype),
                         programs.batch_shape)  # fmt: skip
    state, teacher = programs.init_state(), {}
    state = state.replace(params=jax.tree.map(lambda x: x + 0.1, state.params))  # as by `init_from`
    for n in range(LAST + 1):
        p, keep = flat(state.params), min(1 - 1 / (n + 1), 0.6)
        teacher = {name: (1 - keep) * x + keep * teacher.get(name, 0) for name, x in p.items()}
        state, sums = programs.train(state, programs.zero_sums(), sharding.put_batch(batch, programs.mesh))

    after, average = (flat(x) for x in (state.params, state.model_state.get("teacher", {}).get("average", {})))
    keys = jax.random.split(rng.key(0, "inputs", LAST), len(views)) if views != "w" else [rng.key(0, "augment", LAST)]
    step = SimpleNamespace(y=np.eye(3)[batch["label"]], before=p, teacher=teacher)
    step.x = [view(kind, key, batch) for kind, key in zip(views, keys, strict=True) if kind != " "]
    function = functools.partial(*oracle, step=step)
    for name, x in p.items():
        np.testing.assert_allclose(x - after[name], slopes(function, p, name), rtol=1e-5, atol=1e-6, err_msg=name)
        if average:
            np.testing.assert_allclose(average[f"params/{name}"], teacher[name], rtol=1e-5, atol=1e-6)
    value, metrics = function(p)
    for name, wanted in {"loss": value, **metrics}.items():
        np.testing.assert_allclose(sums[name] / 8, wanted, rtol=1e-5, err_msg=name)
