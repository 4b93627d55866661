"""Models of TensorFlow Serving over gRPC.

gRPC needs the package tensorflow-serving-api; REST and networks in this process
(`client.SavedModel`) do not.
"""

import tensorflow as tf

from keras_resnet.serving import errors
from keras_resnet.serving import http_client
from keras_resnet.serving import servers

_MAX_VALUES = servers.MAX_RESPONSE_BYTES // 4
# Numbers of the data types in a message.
_DTYPES = {
    dtype.as_datatype_enum
    for dtype in (tf.string, tf.bfloat16, tf.float16, tf.float32, tf.float64)
}


class GrpcServer(servers.Server):
    """A model of a server that speaks gRPC.

    Raises:
        errors.ArgumentError: If a package is not installed.
    """

    def __init__(self, address: str, model: servers.ServedModel):
        super().__init__(address, model)
        try:
            import grpc
            from google.protobuf import message
            from tensorflow_serving.apis import predict_pb2
        except ImportError as error:
            raise errors.ArgumentError(
                "address",
                "gRPC needs the package tensorflow-serving-api: pip install "
                "tensorflow-serving-api; or use REST: http://HOST:8501",
            ) from error
        self._grpc = grpc
        self._decode_error = message.DecodeError
        self._request = predict_pb2.PredictRequest
        self._response = predict_pb2.PredictResponse
        channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", servers.MAX_RESPONSE_BYTES),
                # A small compressed response could expand to any size.
                ("grpc.compression_enabled_algorithms_bitset", 1),
                ("grpc.enable_http_proxy", 0),
                ("grpc.enable_retries", 0),  # `predict` retries
                ("grpc.initial_reconnect_backoff_ms", 100),
            ],
        )
        # gRPC's own stub would log a trace for an invalid response.
        self._call = channel.unary_unary(
            "/tensorflow.serving.PredictionService/Predict"
        )

    def _send(self, images, deadline, signature="serving_default"):
        request = self._request()
        request.model_spec.name = self.model.name
        request.model_spec.signature_name = signature
        if self._version is not None:
            request.model_spec.version.value = self._version
        elif self._label is not None:
            request.model_spec.version_label = self._label
        tensor = request.inputs["image_bytes"]
        tensor.dtype = tf.string.as_datatype_enum
        tensor.tensor_shape.dim.add(size=len(images))
        tensor.string_val.extend(images)
        response = self._response()
        try:
            response.ParseFromString(self._respond(request, deadline))
        except self._decode_error as error:
            raise http_client.InvalidResponse(
                "it must be a PredictResponse"
            ) from error
        number = response.model_spec.version.value
        if self._version is not None and number != self._version:
            raise http_client.InvalidResponse(
                f"it must be of version {self._version}, received version "
                f"{number}"
            )
        return dict(response.outputs)

    def _respond(self, request, deadline) -> bytes:
        call = self._call.future(
            request.SerializeToString(), timeout=deadline.seconds_left
        )
        try:
            return deadline.wait(call.result, self._grpc.FutureTimeoutError)
        except self._grpc.RpcError as error:
            code = error.code().name
            message = servers.sentence(error.details() or "")
            if "larger than max" in message:
                raise http_client.InvalidResponse(
                    f"{message}; send fewer images (batch_size)"
                ) from error
            raise self._error(code, message) from error
        finally:
            call.cancel()

    def _values(self, output):
        shape = output.tensor_shape
        sizes = [dim.size for dim in shape.dim]
        count = 1
        for size in sizes:
            count = count * size if size >= 0 else _MAX_VALUES + 1
        if shape.unknown_rank or count > _MAX_VALUES:
            raise ValueError(
                f"a tensor must have at most {_MAX_VALUES:,} values, "
                f"received the shape {str(sizes)[:60]}"
            )
        if output.dtype not in _DTYPES:
            raise ValueError(
                "a tensor must be text or floating-point, received the type "
                f"{output.dtype}"
            )
        try:
            return tf.make_ndarray(output)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"a tensor must have the values of its shape: {error}"
            ) from error
