"""The bytes of a request as JSON: in UTF-8, in the encoding that it names, or as Chinese programs write them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Coroutine
from email.message import Message as Header
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

from stocklora.cli.console import UserError

LEAST_USUAL = 0.9  # share of the characters of GB2312, the usual ones, in a Chinese text


class AnyEncoding(APIRoute):
    """A route whose requests may be written in other encodings than UTF-8; see ``text_of_body``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own way to another kind of request (its guide: Custom Request and APIRoute class)."""
        handle = super().get_route_handler()

        async def read_and_handle(request: Request) -> Response:
            return await handle(_Request(request.scope, request.receive))

        return read_and_handle


class _Request(Request):
    async def json(self) -> Any:
        header = Header()
        header["content-type"] = self.headers.get("content-type", "")
        charset = header.get_param("charset")
        body = await self.body()
        try:
            return json.loads(text_of_body(body, charset if isinstance(charset, str) else None))
        except UserError as error:
            raise HTTPException(400, str(error)) from None  # FastAPI lets this one through


def text_of_body(body: bytes, charset: str | None) -> str:
    """The text of a request's body, which JSON wants in UTF-8 and Chinese programs also write in GBK.

    Args:
        body: as it came.
        charset: that ``Content-Type`` names, if it does. Without one, bytes that are no UTF-8 are GB18030 if what they
            say in it is Chinese: text of most other encodings has rare characters there, or none.

    Raises:
        UserError: it cannot be read, or not without a guess.
    """
    if charset is None and (found := json.detect_encoding(body)) != "utf-8":
        charset = found  # a byte order mark, or the zeros of UTF-16
    try:
        return body.decode(charset or "utf-8").removeprefix("\ufeff")
    except LookupError:
        raise UserError(f"Content-Type: no encoding is called {charset!r}; send UTF-8") from None
    except UnicodeError as error:
        place = f"byte {error.start} of the body" if isinstance(error, UnicodeDecodeError) else "the body"
        wrong = f"{place} is not {charset or 'UTF-8'}"
    if charset is None:
        with contextlib.suppress(UnicodeDecodeError):
            text = body.decode("gb18030")
            foreign = [character for character in text if not character.isascii()]
            usual = sum(bool(character.encode("gb2312", "ignore")) for character in foreign)
            if usual >= LEAST_USUAL * len(foreign):
                return text
        wrong += ", nor Chinese in GB18030"
    raise UserError(f"{wrong}; send UTF-8, or name the encoding: Content-Type: application/json; charset=gbk")
