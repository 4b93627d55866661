"""Contenders of the benchmarks: this package, and the peers.

A contender is a function from a work to a step. A step is a function without
arguments that returns when its result is ready. A contender runs in its own
process (`benchmarks.worker`), and imports its packages there.
"""

import importlib
import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

from benchmarks import inputs
from benchmarks import prepared
from benchmarks import runtimes

Step = Callable[[], Any]


class Contender(NamedTuple):
    """Implementation of a kind of work.

    Attributes:
        packages: Top-level packages that must be installed.
        make: Function from a work (`works.Work`) and the arguments below to a
            step and a dict of facts about it.
        arguments: Further arguments of `make`.
    """

    packages: tuple[str, ...]
    make: Callable[..., tuple[Step, dict]]
    arguments: dict[str, Any]

    def missing(self) -> list[str]:
        """Returns the packages that are not installed."""
        return [p for p in self.packages if not importlib.util.find_spec(p)]


def _tensorflow_step(work, model, apply) -> tuple[Step, dict]:
    """Returns a training step in one graph, for models of any Keras version."""
    import tensorflow as tf

    images, labels = map(tf.constant, prepared.batch(work))
    variables = model.trainable_variables

    @tf.function(autograph=False)
    def step(images, labels):
        with tf.GradientTape() as tape:
            logits = tf.cast(model(images, training=True), "float32")
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            )
        apply(tape.gradient(loss, variables), variables)
        return loss

    graph = step.get_concrete_function(images, labels).graph.as_graph_def()
    nodes = len(graph.node)
    nodes += sum(len(f.node_def) for f in graph.library.function)
    return lambda: step(images, labels).numpy(), {"graph_nodes": nodes}


def _train_keras_resnet(work, **arguments):
    import keras

    import keras_resnet
    from keras_resnet.training import optimizers

    keras.config.set_dtype_policy(work.policy)
    model = keras_resnet.resnet(
        work.spec(), classifier_activation=None, **arguments
    )
    optimizer = optimizers.Momentum(0.01, momentum=0.9)
    optimizer.build(model.trainable_variables)
    return _tensorflow_step(work, model, optimizer.apply)


def _train_keras(work):
    """Trains keras.applications, or the same CIFAR network of Keras' layers."""
    import keras

    keras.config.set_dtype_policy(work.policy)
    if work.spec().stem == "imagenet":
        name = work.network.replace("resnet", "ResNet")
        model = getattr(keras.applications, name)(
            weights=None, classifier_activation=None
        )
    else:
        from benchmarks import peers

        model = peers.cifar_of_keras_layers(work.spec().units)
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    optimizer.build(model.trainable_variables)
    return _tensorflow_step(work, model, optimizer.apply)


def _train_tf_keras(work):
    import tf_keras

    tf_keras.mixed_precision.set_global_policy(work.policy)
    name = work.network.replace("resnet", "ResNet")
    model = getattr(tf_keras.applications, name)(
        weights=None, classifier_activation=None
    )
    optimizer = tf_keras.optimizers.SGD(0.01, momentum=0.9)
    optimizer.build(model.trainable_variables)

    def apply(gradients, variables):
        optimizer.apply_gradients(zip(gradients, variables, strict=True))

    return _tensorflow_step(work, model, apply)


def _train_torch(work):
    import torch

    model, images, labels = prepared.torch_network(work)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(
            "cpu", torch.bfloat16, enabled=work.dtype == "bfloat16"
        ):
            logits = model(images)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, {}


def _saved(function, work, directory) -> Step:
    """Returns a call of a saved signature, as a server makes it."""
    import tensorflow as tf

    images = tf.constant(prepared.batch(work)[0])
    loaded = tf.saved_model.load(directory)
    signature = loaded.signatures[function]
    (name,) = signature.structured_input_signature[1]

    def step(loaded=loaded):  # the signature has no reference to its variables
        (answer, *_) = signature(**{name: images}).values()
        return answer.numpy()

    return step


def _infer_folded(work):
    import tensorflow as tf

    import keras_resnet
    from keras_resnet.serving import folding

    model = prepared.as_trained(keras_resnet.resnet(work.spec()))
    network = folding.fold(model, work.dtype)
    image = tf.TensorSpec([None, *model.input_shape[1:]], name="images")
    with tempfile.TemporaryDirectory() as directory:
        signature = tf.function(
            lambda images: {"probabilities": network(images)},
            input_signature=[image],
            autograph=False,
        )
        tf.saved_model.save(tf.Module(), directory, {"images": signature})
        return _saved("images", work, directory), {}


def _infer_exported(work, builder="keras_resnet", policy=None):
    import keras

    import keras_resnet

    keras.config.set_dtype_policy(policy or work.policy)
    if builder == "keras_resnet":
        model = keras_resnet.resnet(work.spec())
    else:
        name = work.network.replace("resnet", "ResNet")
        model = getattr(keras.applications, name)(weights=None)
    with tempfile.TemporaryDirectory() as directory:
        prepared.as_trained(model).export(directory, verbose=False)
        return _saved("serving_default", work, directory), {}


def _infer_torch(work):
    import torch

    model, images, _ = prepared.torch_network(work)
    model.eval()

    @torch.inference_mode()
    def step():
        with torch.autocast(
            "cpu", torch.bfloat16, enabled=work.dtype == "bfloat16"
        ):
            return model(images).float().numpy()

    return step, {}


def _train_program(work, data_dir):
    """Runs `apps.train` with input and metrics. It measures its own time."""
    from keras_resnet.data import datasets
    from keras_resnet.training import configs
    from keras_resnet.training import loop
    from keras_resnet.training import recipes

    dataset = datasets.load("cifar10", data_dir)
    recipe = recipes.get_recipe("cifar10").with_steps(work.steps + 1)
    config = configs.Config(
        work.network,
        "cifar10",
        recipe,
        {},
        work.policy,
        data_dir=data_dir,
    )

    def step():
        with tempfile.TemporaryDirectory() as workdir:
            result = loop.train_and_evaluate(
                config,
                workdir,
                dataset=dataset,
                report=lambda line: None,
                log_every=20,
                eval_every=10**6,
            )
        return work.batch_size / result["images_per_second"]

    return step, {"times_itself": True}


def _row(package, make, *others, **arguments):
    return Contender((package, *others), make, arguments)


CONTENDERS: dict[str, dict[str, Contender]] = {
    "train": {
        "keras_resnet": _row("keras_resnet", _train_keras_resnet),
        "keras_resnet, looped": _row(
            "keras_resnet", _train_keras_resnet, looped=True
        ),
        "keras_resnet, unrolled": _row(
            "keras_resnet", _train_keras_resnet, looped=False
        ),
        "keras_resnet, remat": _row(
            "keras_resnet", _train_keras_resnet, remat=True
        ),
        "keras": _row("keras", _train_keras),
        "tf_keras": _row("tf_keras", _train_tf_keras),
        "torch": _row("torch", _train_torch),
    },
    "infer": {
        "keras_resnet, folded": _row("keras_resnet", _infer_folded),
        "keras_resnet, saved_model": _row(
            "keras_resnet", runtimes.infer_saved_model
        ),
        "keras_resnet, model.export": _row("keras_resnet", _infer_exported),
        "keras_resnet, model.export, float32": _row(
            "keras_resnet", _infer_exported, policy="float32"
        ),
        "keras, model.export": _row("keras", _infer_exported, builder="keras"),
        "torch": _row("torch", _infer_torch),
        "keras_resnet, onnx": _row(
            "keras_resnet",
            runtimes.infer_onnxruntime,
            *("onnxruntime", "tf2onnx"),
            is_ours=True,
        ),
        "keras_resnet, openvino": _row(
            "keras_resnet",
            runtimes.infer_openvino,
            *("openvino", "tf2onnx", "onnxruntime"),
            is_ours=True,
        ),
        "onnxruntime": _row(
            "onnxruntime", runtimes.infer_onnxruntime, "torch", "onnx"
        ),
        "openvino": _row("openvino", runtimes.infer_openvino, "torch", "onnx"),
        "openvino, nncf": _row(
            "openvino", runtimes.infer_openvino, "torch", "onnx", "nncf"
        ),
        "litert": _row("ai_edge_litert", runtimes.infer_litert),
    },
    "program": {
        "apps.train": _row("keras_resnet", _train_program),
        "bare step": _row("keras_resnet", _train_keras_resnet),
    },
    "input": {
        "keras_resnet": _row("keras_resnet", inputs.keras_resnet),
        "pillow": _row("PIL", inputs.pillow),
        "timm": _row("torch", inputs.timm, "timm", "torchvision"),
        "torchvision": _row("torch", inputs.torchvision, "torchvision"),
    },
}


def prepare(packages: tuple[str, ...]) -> None:
    """Imports packages, so that the measurement excludes their import."""
    for package in packages:
        importlib.import_module(package)
    if packages[0] in ("torch", "PIL"):
        return
    import tensorflow as tf

    importlib.import_module("keras_resnet.training.loop")
    tf.add(tf.constant(0.0), 1.0).numpy()  # starts the device
