"""Cards of weights: with every copy of a network, and for its classes only."""

import os
import tempfile

import keras
import numpy as np
import pytest
from absl.testing import absltest
from absl.testing import parameterized

import keras_resnet
from keras_resnet import weights
from keras_resnet.weights import cards
from keras_resnet.weights import labels
from keras_resnet.weights import published


class CardTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.model = keras_resnet.ResNet20(weights="cifar10")

    def check(self, model):
        self.assertEqual(weights.card(model), weights.card(self.model))
        self.assertEqual(weights.card(model).name, "cifar10")

    def test_a_clone_and_a_saved_model_keep_the_card(self):
        folder = self.enter_context(tempfile.TemporaryDirectory())
        self.check(keras.models.clone_model(self.model))
        path = os.path.join(folder, "model.keras")
        self.model.save(path)
        self.check(keras.models.load_model(path))

    @parameterized.parameters(3, 10)
    def test_a_model_with_another_classifier_keeps_the_card(self, classes):
        x = self.model.get_layer("pool").output
        other = keras.layers.Dense(classes, activation="softmax")(x)
        model = keras.Model(self.model.input, other)
        self.check(model)
        with self.assertRaisesRegex(ValueError, "classifier of its weights"):
            keras_resnet.decode_predictions(
                np.eye(classes)[:1], top=1, model=model
            )
        base = keras_resnet.ResNet20(
            weights="cifar10", include_top=False, pooling="avg"
        )
        self.assertIsNone(labels.of_model(base))
        image = keras.Input((32, 32, 3))
        self.check(keras.Model(image, self.model(image)))

    def test_random_weights_have_no_card(self):
        self.assertIsNone(weights.card(keras_resnet.ResNet20()))

    @parameterized.parameters(
        *({"details": 1}, {"preparation": {}}, {"x": 1}),
        *({"name": ["x"]}, {"classes": "10"}, {"top1": True}),
    )
    def test_a_damaged_card_is_refused(self, **fields):
        json_card = weights.card(self.model).to_json()
        with self.assertRaisesRegex(ValueError, "a card must have the fields"):
            published.Card.from_json({**json_card, **fields})

    @parameterized.parameters(
        ({"card": [1]}, "a card must have the fields"),
        ({"card": "x"}, "a card must have the fields"),
        ({"network": [1]}, "must be texts and numbers"),
        ({"network": {"padding": [1]}}, "must be texts and numbers"),
    )
    @pytest.mark.slow
    def test_a_damaged_configuration_is_refused(self, fields, message):
        config = self.model.get_layer("stem_conv").get_config()
        with self.assertRaisesRegex(ValueError, message):
            cards.Stem(**{**config, **fields})


if __name__ == "__main__":
    absltest.main()
