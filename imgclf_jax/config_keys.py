"""Every config key, its default and what it means. The default's type is the key's type."""

from typing import Any

KEYS: dict[str, tuple[Any, str]] = {
    "seed": (0, "The number from which every random draw derives; 0 to 2**32 - 1."),
    "total": ("20 epochs", "How long to train: 'N epochs', 'N steps' or 'N examples' (5k, 1M)."),
    "batch_size": (128, "Examples a step, over all devices and hosts; divisible by the number of devices."),
    "precision": ("float32", "What layers compute in: 'float32' or 'bfloat16'. Parameters and logits stay float32."),
    "matmul_precision": (
        "float32",
        "Bits of products of float32 operands on TPU and GPU: 'float32', 'tensorfloat32' or 'bfloat16'.",
    ),
    "deterministic": (True, "Ask XLA for deterministic GPU kernels, so that a repeated run gives the same bits."),
    "steps_per_call": (0, "Steps in a call of the compiled program, at most; 0: chosen by size. Changes no result."),
    "mesh": (
        "data=-1",
        "The devices' arrangement: 'data=-1, fsdp=4' parts the state, 'seeds=4, data=-1' the seeds; -1: what is left.",
    ),
    "shard": (
        "all",
        "What is split over the mesh's fsdp: 'all' (parameters, optimizer, averages) or the state of the 'optimizer'.",
    ),
    "data.source": (
        "digits",
        "digits, tfds('name'), folder('path'), table('labels.csv'), arrays('file.npz') or fake(n, shape, classes).",
    ),
    "data.train": ("train", "The split to train on, in TFDS syntax: 'train[:90%]', 'train[1000:]+extra'."),
    "data.sampling": (
        "permutation",
        "Which example stands where in the stream: permutation, balanced, weighted('weights.npy'), repeated(3), "
        "curriculum('scores.npz'), subset('ids.npy'), or an import path.",
    ),
    "data.eval": ({"test": "test"}, 'Evaluation sets: a name and a split for each; of another source "fake()/test".'),
    "data.extra": (
        {},
        "Further streams for a method to read: a name, and a split or \"folder('crops')/train|batch_size(448)\" for "
        "each; the options preprocess('…') and sampling('…') too.",
    ),
    "data.unreadable": (
        "error",
        "Image files of a folder that cannot be read: 'error' stops and lists them all, 'skip' trains without them.",
    ),
    "data.data_dir": ("", "Where TFDS keeps prepared data, a bucket too; empty: ~/tensorflow_datasets."),
    "data.manual_dir": ("", "Original files already downloaded, for machines without a network (TFDS)."),
    "data.placement": ("host", "'host' streams batches; 'device' keeps the whole uint8 set on the accelerator."),
    "data.threads": (0, "Threads that decode images; 0: one for each core. Batches do not depend on it."),
    "preprocess": ("decode(3)", "Host ops, bytes to a fixed-shape uint8 image, for training."),
    "preprocess_eval": (
        "",
        "Host ops for evaluation and prediction, which draw nothing at random; empty: those of `preprocess`, where "
        "resize_small and central_crop take the place of random_resized_crop.",
    ),
    "augment": ("", "Device ops on the batch; those that draw at random are left out in evaluation. Scaled to [0, 1]."),
    "mix": (
        "",
        "mixup(0.2)|cutmix(1.0): one of them for each batch; mixup(probability=0.5): on half of them; empty: none.",
    ),
    "num_seeds": (1, "Replicas trained at once, of seed, seed + 1, …: results with deviations, and the ensemble's."),
    "tta": ("", "Views whose logits evaluation averages: flip, translate(pad), 'flip|translate(1)'; empty: one view."),
    "model": (
        "cnn",
        "The backbone: cnn, resnet(depth=50), …, or an import path; vit(head_init='zeros') is how its head begins.",
    ),
    "batch_norm": (
        "global",
        "Which images batch norm takes its statistics of in training: all, 'per_device', or 'groups(32)', of 32 each.",
    ),
    "init_from": ("", "Weights to start from: a work directory, a PyTorch file (.pth, .pt, .th) or a .safetensors."),
    "init_strict": (True, "Refuse `init_from` if more than the head differs from the model; False: take what fits."),
    "loss": (
        "softmax",
        "softmax, sigmoid (binary cross-entropies; probabilities of each class by itself), focal, or an import path.",
    ),
    "method": (
        "supervised",
        "What a run learns from a batch: supervised, distill, simclr, supcon, or an import path. With a method that "
        "trains no head, such as simclr, metrics, tta and arguments of loss are refused.",
    ),
    "gradient": (
        "",
        "Functions of the gradient: sam, asam, pgd (adversarial training), an import path; 'sam|my_file:noisy(0.1)'.",
    ),
    "optimizer": (
        "adam",
        "An optax optimizer, without its rate, after any transforms: 'add_decayed_weights(5e-4)|sgd'.",
    ),
    "schedule": (
        "constant(1e-3)",
        "The learning rate: constant, cosine, linear, one_cycle, step or triangle.",
    ),
    "clip": (0.0, "The greatest global norm of the gradient; 0: not clipped."),
    "accumulate": (1, "Parts that a step computes its batch's gradient in, one after the other: so much less memory."),
    "ema": (0.0, "Decay of the average of the weights that evaluation uses, such as 0.999; 0: the weights themselves."),
    "rules.lr": ("", "Learning rates by parameter: 'backbone/.*=0.1, head/.*=1', patterns of whole paths, first wins."),
    "rules.decay": ("", "The same for weight decay; '.*(bias|scale)=0' leaves out biases and normalizations."),
    "rules.freeze": (
        "",
        "Parameters not trained, as patterns of whole paths: 'backbone/.*'; their modules run as in evaluation.",
    ),
    "rules.shard": (
        "",
        "The axis along which a parameter is split over fsdp: 'head/kernel=0, .*bias=none'; else the largest.",
    ),
    "rules.layer_decay": (0.0, "The learning rate of each layer as a fraction of that of the layer above; 0: off."),
    "metrics": ("", "Metrics of evaluation beside accuracy, loss, nll and top5: auc, balanced_accuracy, f1, 'auc|f1'."),
    "tensorboard": (True, "Write TensorBoard's files beside metrics.jsonl."),
    "log_every": ("50 steps", "How often training metrics are written; empty: never."),
    "eval_every": ("1 epochs", "How often all of `data.eval` is evaluated; empty: at the end only."),
    "checkpoint_every": ("1 epochs", "How often a checkpoint is saved; empty: at the end only."),
    "checkpoint.keep": (2, "How many of the latest checkpoints are kept."),
    "checkpoint.best": (
        "",
        "A metric whose best checkpoint is kept too: 'val/accuracy', 'val/nll'; your own as 'min:val/my_error'.",
    ),
}

# Keys that say where and how and not what is computed: a run may be resumed with other values of these.
# `mesh` and `shard` among them: another number of devices changes results by rounding too.
LOCATION_KEYS = ("data.data_dir", "data.manual_dir", "data.placement", "data.threads", "steps_per_call", "tensorboard",
                 "mesh", "shard", "rules.shard")  # fmt: skip

# Keys that say how often something happens.
CADENCES = ("log_every", "eval_every", "checkpoint_every")

# Keys that no bit of the parameters follows from: a resumed run may have other values, which its record then says.
FREE_KEYS = (*CADENCES, "checkpoint.keep", "checkpoint.best", "metrics")

# Keys that may differ between the hosts of one run: the data are compared by their fingerprint.
OF_THE_HOST = ("data.data_dir", "data.manual_dir", "data.threads")

# What no evaluation set may be called: metrics.jsonl, result.json and `evaluate` have these names beside those of sets.
RESERVED = frozenset(
    {"train", "step", "epochs", "seconds", "images_per_second", "params_sha256", "num_seeds", "left_out"}
)
