"""The client's own work is tried on a network that is a few lines long."""

import os
import shutil
import tempfile
import threading
import time
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

from keras_resnet.serving import client as client_lib
from keras_resnet.serving import errors
from keras_resnet.serving import outputs
from tests import colours
from tests import programs

LABELS = b"cat\ndog\nowl\n"


class Digits:
    """Predicts class 7 of 10 for b"7", and rejects other bytes than digits."""

    labels = tuple(f"label {i}" for i in range(10))

    def __init__(self):
        self.asked = []

    def predict(self, images, stopped=None):
        self.asked.append(list(images))
        best = [int(image) if image.isdigit() else 0 for image in images]
        scores = np.full([len(images), 10], 0.05, np.float32)
        scores[:, 0] = 0.55
        return outputs.Predictions(
            [
                [self.labels[i], *self.labels[:i], *self.labels[i + 1 :]]
                for i in best
            ],
            scores,
            ["" if image.isdigit() else "no digit" for image in images],
        )


class OfAnEarlierVersion(Digits):
    """Rejects a whole batch for one image."""

    def predict(self, images, stopped=None):
        found = super().predict(images)
        if any(found.status):
            raise errors.RejectedError("no digit")
        return found._replace(note="export it again")


class ClientTest(parameterized.TestCase):
    def test_answers_come_in_the_order_of_the_images(self):
        images = [b"%d" % (i * 7 % 10) for i in range(25)]
        answers = client_lib.Client(Digits(), 4).predict(images)
        self.assertEqual(
            [answer.best[0][0] for answer in answers],
            [f"label {image.decode()}" for image in images],
        )

    def test_no_images_get_no_answers_and_the_network_is_not_asked(self):
        network = Digits()
        self.assertEqual(client_lib.Client(network).predict([]), [])
        self.assertEmpty(network.asked)

    def test_batches_are_cut_to_the_size(self):
        network = Digits()
        client_lib.Client(network, 4).predict([b"1"] * 10)
        self.assertEqual([len(batch) for batch in network.asked], [4, 4, 2])

    def test_answer_holds_the_most_probable_labels_best_first(self):
        (answer,) = client_lib.Client(Digits()).predict([b"3"], top=2)
        (best, probability), (second, _) = answer.best
        self.assertEqual((best, second), ("label 3", "label 0"))
        self.assertAlmostEqual(probability, 0.55, places=6)
        self.assertIsNone(answer.error)

    def test_no_answer_has_more_labels_than_there_are(self):
        (answer,) = client_lib.Client(Digits()).predict([b"3"], top=99)
        self.assertLen(answer.best, 10)

    @parameterized.parameters(
        ([0],), ([15],), ([3, 4],), ([0, 7, 15],), (list(range(16)),)
    )
    def test_bad_images_get_errors_and_the_others_their_answers(self, bad):
        images = [b"x" if i in bad else b"%d" % (i % 10) for i in range(16)]
        network = Digits()
        answers = client_lib.Client(network).predict(images)
        for i, answer in enumerate(answers):
            if i in bad:
                self.assertEqual(answer, client_lib.Answer(error="no digit"))
            else:
                self.assertEqual(answer.best[0][0], f"label {i % 10}")
        self.assertLen(network.asked, 1)

    def test_export_of_an_earlier_version_loses_the_batch_of_a_bad_image(self):
        client = client_lib.Client(OfAnEarlierVersion(), 2)
        answers = client.predict([b"1", b"2", b"3", b"x", b"5"])
        self.assertEqual(
            [answer.best[0][0] if answer.best else None for answer in answers],
            ["label 1", "label 2", None, None, "label 5"],
        )
        for answer in answers[2:4]:
            self.assertRegex(
                answer.error, "same batch was rejected: no digit; export"
            )
        self.assertEqual(client.note, "export it again")
        (alone,) = client.predict([b"x"])
        self.assertEqual(alone.error, "no digit")

    def test_sizes_below_1_are_refused(self):
        for sizes in ((0, 1), (1, 0), (1, 1, 0)):
            with self.assertRaisesRegex(ValueError, "1 or more, received 0"):
                client_lib.Client(Digits(), *sizes)

    def test_several_batches_are_on_the_way_and_come_back_in_order(self):
        together = threading.Barrier(3, timeout=60)

        class Slow(Digits):
            def predict(self, images, stopped=None):
                if images[0] in (b"0", b"2", b"4"):
                    together.wait()  # until all three are being asked
                    time.sleep(0.05 * (4 - int(images[0])))
                return super().predict(images)

        images = [b"%d" % i for i in range(10)]
        answers = client_lib.Client(Slow(), 2, in_flight=3).predict(images)
        self.assertEqual(
            [answer.best[0][0] for answer in answers],
            [f"label {i}" for i in range(10)],
        )

    def test_server_that_does_not_answer_ends_it(self):
        class Gone(Digits):
            def predict(self, images, stopped=None):
                if images[0] == b"2":
                    raise errors.ServerError("UNAVAILABLE", "gone")
                return super().predict(images)

        images = [b"%d" % i for i in range(5)]
        client = client_lib.Client(Gone(), 1)
        with self.assertRaisesRegex(errors.ServerError, "gone"):
            client.predict(images)

    @parameterized.parameters(1, 3)
    def test_bytes_on_the_way_are_bounded(self, in_flight):
        lock, now, most = threading.Lock(), [0], [0]

        class Counting(Digits):
            def predict(self, images, stopped=None):
                size = sum(len(image) for image in images)
                with lock:
                    now[0] += size
                    most[0] = max(most[0], now[0])
                time.sleep(0.005)
                with lock:
                    now[0] -= size
                found = [image.lstrip(b"0") or b"0" for image in images]
                return super().predict(found)

        sizes = [1, 30, 40, 100, 5, 5, 99, 20, 20, 20, 20, 20, 20] * 2
        images = [b"%0*d" % (size, i % 10) for i, size in enumerate(sizes)]
        with mock.patch.object(client_lib, "MAX_BYTES_IN_FLIGHT", 100):
            network = Counting()
            client = client_lib.Client(network, 32, in_flight)
            answers = client.predict(images)
        self.assertEqual(
            [answer.best[0][0] for answer in answers],
            [f"label {i % 10}" for i in range(len(sizes))],
        )
        self.assertLessEqual(most[0], 100)
        self.assertGreater(max(map(len, network.asked)), 1)

    def test_image_above_all_bounds_is_sent_alone(self):
        with mock.patch.object(client_lib, "MAX_BYTES_IN_FLIGHT", 3):
            network = Digits()
            client_lib.Client(network, 4).predict([b"1", b"00009", b"2", b"3"])
        self.assertEqual(network.asked, [[b"1"], [b"00009"], [b"2", b"3"]])

    def test_answers_that_nobody_wants_any_more_are_stopped(self):
        second = threading.Event()

        class Silent(Digits):
            def predict(self, images, stopped=None):
                if images == [b"0"]:
                    second.wait(60)
                    return super().predict(images)
                second.set()
                self.was_stopped = stopped.wait(60)
                raise errors.ServerError("CANCELLED", "stopped")

        network = Silent()
        images = [b"%d" % i for i in range(5)]
        client = client_lib.Client(network, 1, in_flight=2)
        answers = client._in_order(lambda image: image, images, 1)
        next(answers)
        answers.close()
        self.assertTrue(network.was_stopped)

    def test_file_above_the_limit_gets_an_error_the_others_their_answers(self):
        client = client_lib.Client(Digits(), max_image_bytes=2)
        first, second = client.predict_files(["data:,123", "data:,07"])
        self.assertIn("at most 2 bytes", first.error)
        self.assertEqual(second.best[0][0], "label 7")

    def test_files_are_read_a_batch_at_a_time(self):
        with tempfile.TemporaryDirectory() as folder:
            paths = [os.path.join(folder, str(i)) for i in range(5)]
            for i in (0, 1, 3, 4):
                with open(paths[i], "wb") as file:
                    file.write(b"%d" % i)
            network = Digits()
            answers = client_lib.Client(network, 2).predict_files(paths)
            self.assertEqual(next(answers).best[0][0], "label 0")
            self.assertEqual(network.asked, [[b"0", b"1"]])
            rest = list(answers)
        self.assertEqual(
            rest[1], client_lib.Answer(error="No such file or directory")
        )
        self.assertEqual(
            [rest[i].best[0][0] for i in (0, 2, 3)],
            ["label 1", "label 3", "label 4"],
        )


class SavedModelTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = folder.name
        cls.path = colours.publish(os.path.join(folder.name, "exported"))
        cls.images = {
            name: colours.image(name) for name in ("red", "green", "blue")
        }

    def test_network_names_the_colours(self):
        client = client_lib.Client(client_lib.SavedModel(self.path))
        answers = client.predict(list(self.images.values()))
        self.assertEqual(
            [answer.best[0][0] for answer in answers], list(self.images)
        )
        for answer in answers:
            e = np.exp([9.0, 3.0, 0.0, 0.0])
            np.testing.assert_allclose(
                [probability for _, probability in answer.best],
                e / e.sum(),
                rtol=1e-4,
            )

    def test_bad_image_among_good_ones_gets_its_own_error(self):
        client = client_lib.Client(client_lib.SavedModel(self.path))
        images = [self.images["red"], b"", self.images["blue"], b"text"]
        red, empty, blue, text = client.predict(images, top=1)
        self.assertEqual(red.best[0][0], "red")
        self.assertEqual(blue.best[0][0], "blue")
        for answer in (empty, text):
            self.assertEqual(
                answer.error,
                "not an image: an image must be a JPEG, PNG, GIF, BMP or WebP",
            )

    def test_image_that_is_cut_gets_the_reason_in_one_line(self):
        client = client_lib.Client(client_lib.SavedModel(self.path))
        (answer,) = client.predict([self.images["red"][:60]])
        self.assertEqual(
            answer.error, "truncated: the file ends before the image does"
        )
        self.assertNotRegex(answer.error, r"[\n\[{]")

    def test_export_without_status_is_read_with_a_note(self):
        module = tf.Module()

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
        def serving_default(image_bytes):
            tf.debugging.assert_equal(image_bytes, "good", "a bad image")
            rows = tf.tile([[0.2, 0.5, 0.3]], [tf.size(image_bytes), 1])
            return {"probabilities": rows, "classes": image_bytes}

        with tempfile.TemporaryDirectory() as directory:
            tf.saved_model.save(
                module,
                directory,
                {"serving_default": serving_default.get_concrete_function()},
            )
            path = os.path.join(directory, "assets", "labels.txt")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(LABELS)
            client = client_lib.Client(client_lib.SavedModel(directory))
            (answer,) = client.predict([b"good"])
            (bad,) = client.predict([b"bad"])
            code, out, err = programs.run(
                "predict", f"--saved_model={directory}", "data:,good"
            )
        self.assertEqual(
            [label for label, _ in answer.best], ["dog", "owl", "cat"]
        )
        self.assertIn("a bad image", bad.error)
        self.assertEqual(code, 0)
        self.assertLen(out, 4)
        self.assertEqual(err, [f"note: {client.note}"])
        self.assertIn("without status, so a bad image fails", client.note)

    def test_directory_of_versions_is_its_newest_one(self):
        with tempfile.TemporaryDirectory() as export_dir:
            for version in ("9", "10"):
                os.symlink(self.path, os.path.join(export_dir, version))
            network = client_lib.SavedModel(export_dir)
            self.assertEqual(os.path.basename(network.directory), "10")
        self.assertEqual(network.labels, colours.LABELS)

    @parameterized.parameters("a[b]*?", "a\\b", "a\udce9")
    @pytest.mark.slow
    def test_path_may_contain_wildcards_and_bytes(self, name):
        """TensorFlow looks for the files of variables by a pattern."""
        export_dir = os.path.join(self.folder, name)
        path = colours.export(export_dir)
        self.assertEqual(path, os.path.join(export_dir, "1"))
        network = client_lib.SavedModel(export_dir)
        (answer,) = client_lib.Client(network).predict([self.images["blue"]])
        self.assertEqual(answer.best[0][0], "blue")

    @parameterized.parameters("nowhere", "")
    def test_directory_without_versions_is_refused(self, name):
        with self.assertRaisesRegex(ValueError, "holds neither"):
            client_lib.SavedModel(os.path.join(self.folder, name))

    def test_saved_model_of_something_else_is_refused(self):
        with tempfile.TemporaryDirectory() as directory:
            tf.saved_model.save(tf.Module(), directory)
            with self.assertRaisesRegex(ValueError, "assets/labels.txt"):
                client_lib.SavedModel(directory)

    @parameterized.parameters(
        (lambda x: x * float("nan"), LABELS, "finite, received nan"),
        (lambda x: x * 1.8, LABELS, "sum 1, received 1.8"),
        (lambda x: -x, LABELS, "from 0 to 1"),
        (lambda x: x[:-1], LABELS, "2 rows, as images, received 1"),
        (lambda x: tf.concat([x, x], 0), LABELS, "2 rows, as images, rec.* 4"),
        (lambda x: x, b"one\ntwo\n", "labels.txt must have a line for each"),
        (lambda x: x, b"", "labels.txt must have a line for each"),
        (lambda x: x, b"\xff\n\n\n", "labels.txt: .*utf-8"),
        (
            lambda x: tf.compat.v1.placeholder_with_default(
                x[:, :1] * 4.0, [None, None]
            ),
            LABELS,
            "a line for each of the 1 classes",
        ),
        (lambda x: x, None, "must have assets/labels.txt"),
        (lambda x: x[0], LABELS, "serving_default from image_bytes"),
        (lambda x: tf.cast(x, tf.int32), LABELS, "serving_default from image"),
        (lambda x: tf.as_string(x), LABELS, "serving_default from image_bytes"),
    )
    def test_saved_model_of_a_stranger_is_one_error(
        self, change, labels, message
    ):
        module = tf.Module()

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
        def serving_default(image_bytes):
            rows = tf.tile([[0.25, 0.5, 0.25]], [tf.size(image_bytes), 1])
            return {"probabilities": change(rows)}

        with tempfile.TemporaryDirectory() as directory:
            tf.saved_model.save(
                module,
                directory,
                {"serving_default": serving_default.get_concrete_function()},
            )
            if labels is not None:
                path = os.path.join(directory, "assets", "labels.txt")
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "wb") as file:
                    file.write(labels)
            with self.assertRaisesRegex(ValueError, message) as caught:
                network = client_lib.SavedModel(directory)
                client_lib.Client(network).predict([b"1", b"2"])
            self.assertIn(directory, str(caught.exception))

    @parameterized.parameters(b"", b"text", b"\xff" * 100)
    def test_what_is_no_saved_model_is_one_error(self, content):
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "saved_model.pb")
            with open(path, "wb") as file:
                file.write(content)
            with self.assertRaisesRegex(ValueError, "must be a SavedModel"):
                client_lib.SavedModel(directory)

    def test_labels_that_are_no_file_do_not_wait(self):
        with tempfile.TemporaryDirectory() as directory:
            shutil.copytree(self.path, directory, dirs_exist_ok=True)
            path = os.path.join(directory, "assets", "labels.txt")
            os.remove(path)
            os.mkfifo(path)
            with self.assertRaisesRegex(ValueError, "must be a regular file"):
                client_lib.SavedModel(directory)


if __name__ == "__main__":
    absltest.main()
