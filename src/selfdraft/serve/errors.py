"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from starlette.responses import JSONResponse

from selfdraft.errors import EngineError, OptionError, PromptTooLong, RequestError, SelfdraftError
from selfdraft.serve.worker import Refused

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
LONGEST = 500
"""Most characters of a message: what a client sent is never sent back whole."""


class ApiError(Exception):
    """What a client is told. `wait`: seconds of Retry-After."""

    def __init__(
        self, status: int, message: str, param: str | None = None, *, code: str | None = None, wait: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.wait = status, message, param, code, wait
        self.challenge = "Bearer"
        """How a browser or client is asked for a key, with status 401."""

    @classmethod
    def of(cls, error: BaseException) -> ApiError:
        """The error of a request as its client is told it; a fault of ours says nothing of the inside."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, Refused):
            return cls(error.status, str(error), code=error.code, wait=error.wait)
        if isinstance(error, PromptTooLong):
            return cls(400, str(error), "messages", code="context_length_exceeded")
        if isinstance(error, RequestError | OptionError):
            return cls(400, str(error))
        if isinstance(error, EngineError) and "every token is banned" in str(error):
            return cls(400, str(error))
        said = str(error) if isinstance(error, SelfdraftError) else "the server failed at this request"
        return cls(500, said, code="internal_error")

    def document(self) -> dict[str, object]:
        """The JSON document."""
        message = self.message if len(self.message) <= LONGEST else self.message[:LONGEST] + " ..."
        message = message.encode("utf-8", "replace").decode()
        kind = KINDS.get(self.status, "server_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": str(self.wait)} if self.wait is not None else {}
        headers |= {"WWW-Authenticate": self.challenge} if self.status == 401 else {}
        return JSONResponse(self.document(), self.status, headers)
