"""Exceptions of exports, clients and servers that callers handle."""


class ArgumentError(ValueError):
    """An argument of a function is invalid.

    Attributes:
        argument: Name of the argument.
    """

    def __init__(self, argument: str, reason: str | Exception):
        super().__init__(str(reason))
        self.argument = argument


class RejectedError(Exception):
    """A network rejects a whole batch, and will reject it every time."""


class ServerError(OSError):
    """A server did not return a valid response.

    The message names the server, the reason and a remedy.

    Attributes:
        code: Name of the error in gRPC, such as "NOT_FOUND".
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code
