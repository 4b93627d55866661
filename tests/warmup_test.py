"""Warm-up requests are the official messages of TensorFlow Serving."""

import os
import tempfile

import numpy as np
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized
from tensorflow_serving.apis import prediction_log_pb2

from keras_resnet.serving import warmup


class WarmupTest(parameterized.TestCase):
    def records(self, image, batch_sizes):
        folder = self.enter_context(tempfile.TemporaryDirectory())
        warmup.write(folder, "name", image, batch_sizes)
        path = os.path.join(folder, "assets.extra/tf_serving_warmup_requests")
        return [
            prediction_log_pb2.PredictionLog.FromString(record.numpy())
            for record in tf.data.TFRecordDataset(path)
        ]

    def test_every_signature_is_asked_with_every_batch_size(self):
        image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
        found = {}
        for log in self.records(image, [1, 300]):
            kind = log.WhichOneof("log_type")
            request = getattr(log, kind).request
            self.assertEqual(request.model_spec.name, "name")
            signature = request.model_spec.signature_name
            if kind == "classify_log":
                examples = request.input.example_list.examples
                size = len(examples)
                (encoded,) = (
                    examples[0]
                    .features.feature["image/encoded"]
                    .bytes_list.value
                )
                images = tf.io.decode_png(encoded)[None]
            else:
                ((name, proto),) = request.inputs.items()
                images = tf.make_ndarray(proto)
                size = len(images)
                if name == "image_bytes":
                    images = tf.io.decode_png(images[0])[None]
            np.testing.assert_array_equal(images[0], image)
            found.setdefault((kind, signature), []).append(size)
        self.assertEqual(
            found,
            {
                ("predict_log", "serving_default"): [1, 300],
                ("predict_log", "images"): [1, 300],
                ("predict_log", "features"): [1, 300],
                ("classify_log", "classify"): [1, 300],
            },
        )

    def test_no_batch_sizes_are_no_file(self):
        with tempfile.TemporaryDirectory() as folder:
            warmup.write(folder, "name", np.zeros([4, 4, 3], np.uint8), [])
            self.assertEqual(os.listdir(folder), [])

    @parameterized.parameters(
        ([1, 0], "1 or more, received 0"),
        ([1] * 251, "at most 250 batch sizes"),
    )
    def test_what_is_no_batch_size_is_refused(self, sizes, message):
        with self.assertRaisesRegex(ValueError, message):
            warmup.check_batch_sizes(sizes)


if __name__ == "__main__":
    absltest.main()
