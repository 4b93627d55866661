"""Works of the benchmarks, as rows, the same for every contender.

Images are noise, except where they are decoded: there they are photos. A
training step is forward, backward and an update by gradient descent with
momentum, without weight decay.
"""

import dataclasses

from benchmarks import inputs
from keras_resnet import specs

_US = "keras_resnet"
_KINDS = ("train", "infer", "program", "input")


@dataclasses.dataclass(frozen=True)
class Work:
    """Row of the benchmarks.

    Attributes:
        kind: `"train"`, a training step; `"infer"`, a prediction; `"program"`,
            `apps.train` on CIFAR-10; `"input"`, photos that are decoded and
            augmented on one core.
        network: A name in `MODELS`, or `"resnetN"` with N = 6n + 2.
        batch_size: Images in a step.
        dtype: `"float32"`, `"bfloat16"`, or `"int8"` (predictions only).
        contenders: Names in `contenders.CONTENDERS[kind]`. The ratios are
            relative to the first one, which is ours.
        steps: Number of steps in a turn.
        goals: Smallest ratio of speeds that we want, by contender.
        augmentation: Name in `inputs.AUGMENTATIONS`, for the kind `"input"`.

    >>> Work("train", "resnet20", 8, "float32", ("keras_resnet",)).name
    'train resnet20, float32, batch 8'
    """

    kind: str
    network: str
    batch_size: int
    dtype: str
    contenders: tuple[str, ...]
    steps: int = 4
    goals: dict[str, float] = dataclasses.field(default_factory=dict)
    augmentation: str = "crop"

    @property
    def name(self) -> str:
        """Name in tables."""
        what = self.augmentation if self.kind == "input" else self.network
        return f"{self.kind} {what}, {self.dtype}, batch {self.batch_size}"

    @property
    def policy(self) -> str:
        """Keras' name of the dtype."""
        return f"mixed_{self.dtype}" if self.dtype == "bfloat16" else "float32"

    def spec(self) -> specs.Spec:
        """Returns the network, which may have any depth of 6n + 2."""
        if self.network in specs.MODELS:
            return specs.get_spec(self.network)
        depth = int(self.network.removeprefix("resnet"))
        return dataclasses.replace(
            specs.get_spec("resnet20"),
            name=self.network,
            units=specs.cifar_units(depth),
        )


def _training():
    keras = {"float32": 1.35, "bfloat16": 1.75}
    torch = {"float32": 1.30, "bfloat16": 1.10}
    for dtype in keras:
        yield Work(
            "train",
            "resnet50",
            16,
            dtype,
            (_US, "keras", "tf_keras", "torch"),
            steps=2,
            goals={
                "keras": keras[dtype],
                "tf_keras": 1.05,
                "torch": torch[dtype],
            },
        )
    keras = {"float32": 1.25, "bfloat16": 1.65}
    torch = {"float32": 1.20, "bfloat16": 1.15}
    for dtype in keras:
        yield Work(
            "train",
            "resnet56",
            128,
            dtype,
            (_US, "keras", "torch"),
            goals={"keras": keras[dtype], "torch": torch[dtype]},
        )


def _inference():
    folded, exported = "keras_resnet, folded", "keras_resnet, model.export"
    in_float32 = f"{exported}, float32"
    goals = {
        ("float32", 16): {exported: 1.2, "onnxruntime": 0.95},
        ("float32", 1): {exported: 1.35},
        ("bfloat16", 16): {in_float32: 2.4, "openvino": 0.90},
        ("bfloat16", 1): {},
    }
    without = {  # contenders that do not support a dtype
        "float32": {in_float32},
        "bfloat16": {"onnxruntime"},
    }
    names = (
        folded,
        exported,
        in_float32,
        "keras, model.export",
        "torch",
        "onnxruntime",
        "openvino",
    )
    for (dtype, batch_size), goal in goals.items():
        yield Work(
            "infer",
            "resnet50",
            batch_size,
            dtype,
            tuple(name for name in names if name not in without[dtype]),
            steps=max(4, 24 // batch_size),
            goals=goal,
        )


def _files():
    """Our files for other runtimes, each beside the file that torch makes."""
    for batch_size in (1, 16):
        for runtime in ("onnxruntime", "openvino"):
            name = runtime.removesuffix("runtime")
            yield Work(
                "infer",
                "resnet50",
                batch_size,
                "float32",
                (f"{_US}, {name}", runtime),
                steps=max(4, 24 // batch_size),
                goals={runtime: 0.95},
            )


def _int8():
    for batch_size in (1, 16, 64):
        yield Work(
            "infer",
            "resnet50",
            batch_size,
            "int8",
            (
                f"{_US}, saved_model",
                f"{_US}, onnx",
                f"{_US}, openvino",
                "onnxruntime",
                "openvino, nncf",
                "litert",
            ),
            steps=max(2, 48 // batch_size),
            goals={"onnxruntime": 1.0, "openvino, nncf": 0.9},
        )


def _depth():
    for depth in (20, 56, 110, 302, 602, 1202):
        unrolled = ("keras_resnet, unrolled",) if depth <= 302 else ()
        yield Work(
            "train",
            f"resnet{depth}",
            8,
            "float32",
            ("keras_resnet, looped", *unrolled, "torch"),
            steps=max(1, 100 // depth),
        )


def _memory():
    loop = "keras_resnet, looped"
    yield Work(
        "train",
        "resnet1202",
        8,
        "float32",
        (loop, "keras_resnet, unrolled"),
        steps=2,
        goals={"keras_resnet, unrolled": 0.97},
    )
    yield Work(
        "train",
        "resnet1202",
        32,
        "float32",
        (loop, "keras_resnet, unrolled", "keras_resnet, remat", "torch"),
        steps=1,
        goals={"keras_resnet, unrolled": 0.97, "torch": 1.0},
    )
    # This is the batch size of the papers.
    yield Work(
        "train",
        "resnet1202",
        128,
        "float32",
        ("keras_resnet, remat",),
        steps=1,
    )


def _batches():
    for batch_size in (1, 4, 16, 64, 256):
        yield Work(
            "train",
            "resnet20",
            batch_size,
            "float32",
            (_US, "keras", "torch"),
            steps=max(2, 128 // batch_size),
        )


def _program():
    for network in ("resnet20", "resnet56"):
        yield Work(
            "program",
            network,
            128,
            "float32",
            ("apps.train", "bare step"),
            steps=40,
            goals={"bare step": 0.90},
        )


def _input():
    yield Work(
        "input",
        "resnet50",
        16,
        "float32",
        ("keras_resnet", "pillow"),
        steps=20,
        goals={"pillow": 1.5},
    )


def _augmentation():
    for name, (fields, _) in inputs.AUGMENTATIONS.items():
        is_of_timm = "rand_augment" in fields.get("policy", "")
        peer = "timm" if is_of_timm else "torchvision"
        yield Work(
            "input",
            "resnet50",
            16,
            "float32",
            ("keras_resnet", peer),
            steps=10,
            goals={peer: 1.5},
            augmentation=name,
        )


GROUPS: dict[str, tuple[Work, ...]] = {
    "training": tuple(_training()),
    "inference": tuple(_inference()),
    "files": tuple(_files()),
    "int8": tuple(_int8()),
    "depth": tuple(_depth()),
    "memory": tuple(_memory()),
    "batches": tuple(_batches()),
    "program": tuple(_program()),
    "input": tuple(_input()),
    "augmentation": tuple(_augmentation()),
}
