"""What vLLM and SGLang return with a completion: ids (tokens, layers, top-k) of all tokens that the model read.

vLLM (`--enable-return-routed-experts`): "routed_experts" of each choice, a .npy file in base64; in Python the attribute
`routed_experts` of each output, an array (vllm-project/vllm, its tests of routed experts).
SGLang (the same option, and "return_routed_experts" in the request): "routed_experts" in "meta_info", or in "sglext" /
"sgl_ext" of the OpenAI endpoints: int32 in base64, without its shape; newer versions name layers and shape in
"expert_ids_schema" (sgl-project/sglang, its state capturer). Both leave out the last token, which was sampled and never
read, and may leave out the beginning of the prompt.
"""

import base64
import binascii
import json
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from struct import error as StructError
from tokenize import TokenError
from typing import Any, Protocol, runtime_checkable
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np
from numpy.typing import NDArray

from ...core.files import parse_object, read_lines, read_text, require_file
from ...errors import BadTrace
from .requests import Foreign, Request

REMEDY = "save the server's answers as JSON, or one a line as .jsonl"
MOST_BYTES = 4 << 30
#: What numpy raises on damaged files: it reads a header as Python does, and a .npz as a zip.
NOT_NUMPY = (
    ValueError, EOFError, OSError, KeyError, SyntaxError, TokenError, MemoryError, NotImplementedError, RuntimeError,
    BadZipFile, StructError, ZlibError,
)  # fmt: skip


@runtime_checkable
class RequestOutput(Protocol):
    """What vLLM returns for one prompt."""

    prompt_token_ids: list[int] | None
    outputs: list[Any]


def responses_in(path: Path) -> list[dict[str, Any]]:
    """Answers of a server: one JSON object, a list of them, or one a line.

    Raises:
        BadTrace: the file holds something else; with the line.
    """
    require_file(path, BadTrace, MOST_BYTES)
    if path.suffix == ".jsonl":
        lines = enumerate(read_lines(path, BadTrace, REMEDY), 1)
        return [
            parse_object(line, f"{path}, line {n}", BadTrace, REMEDY) for n, line in lines if line.strip()
        ]
    text = read_text(path, BadTrace, REMEDY)
    if not text.lstrip().startswith("["):
        return [parse_object(text, str(path), BadTrace, REMEDY)]
    inner = parse_object(f'{{"all":{text}}}', str(path), BadTrace, REMEDY)["all"]
    if not all(isinstance(one, dict) for one in inner):
        raise BadTrace(f"{path} holds a list of something else than objects; {REMEDY}")
    return list(inner)


def vllm_requests(responses: Sequence[Any], where: str) -> Iterator[Request]:
    """One request for each completion.

    Raises:
        BadTrace: an answer holds no routed experts, or other numbers of them than of tokens.
    """
    for number, response in enumerate(responses):
        place = f"{where}, request {number}"
        if isinstance(response, RequestOutput):
            for choice in response.outputs:
                yield _request(
                    choice.routed_experts, len(response.prompt_token_ids or []), len(choice.token_ids), place
                )
            continue
        choices = _choices(response, place)
        usage = _mapping(response.get("usage"))
        for choice in choices:
            tokens = choice.get("token_ids")
            new = len(tokens) if isinstance(tokens, list) else usage.get("completion_tokens")
            yield _request(
                _npy(choice.get("routed_experts"), place),
                usage.get("prompt_tokens"),
                new if len(choices) == 1 or isinstance(tokens, list) else None,
                place,
            )


def sglang_requests(
    responses: Sequence[Any], foreign: Foreign, where: str
) -> Iterator[tuple[Request, list[int] | None]]:
    """One request for each completion, and its MoE layers if the answer names them.

    Raises: as `vllm_requests`.
    """
    for number, response in enumerate(responses):
        place = f"{where}, request {number}"
        usage = _mapping(response.get("usage"))
        if "meta_info" in response:
            holders = [_mapping(response["meta_info"])]
            usage = holders[0]
        else:
            parts = [response, *_choices(response, place)]
            holders = [
                _mapping(part[name]) for part in parts for name in ("sglext", "sgl_ext") if part.get(name)
            ]
        if not holders:
            raise BadTrace(f"{place} holds no routed experts; ask for return_routed_experts")
        for holder in holders:
            schema = _mapping(holder.get("expert_ids_schema"))
            flat = _int32(holder, place)
            L, K = (
                schema.get(n, size)
                for n, size in (("num_layers", foreign.shape.num_layers), ("top_k", foreign.shape.top_k))
            )
            if not (isinstance(L, int) and isinstance(K, int) and L > 0 and K > 0) or len(flat) % (L * K):
                raise BadTrace(
                    f"{place}: {len(flat)} expert ids are no whole number of tokens of {L} layers x top-{K}; "
                    f"shape counts all layers of the model, dense ones too"
                )
            layers = schema.get("moe_layer_ids")
            if layers is not None and not (
                isinstance(layers, list) and all(type(one) is int for one in layers)
            ):
                raise BadTrace(f"{place}: moe_layer_ids are {layers!r}, expected numbers of layers")
            new = usage.get("completion_tokens") if len(holders) == 1 else None
            yield _request(flat.reshape(-1, L, K), usage.get("prompt_tokens"), new, place), layers


def _request(ids: Any, num_prompt: Any, num_new: Any, where: str) -> Request:
    """A request whose rows end with the decoded tokens; the beginning of its prompt may have been left out."""
    if ids is None:
        raise BadTrace(
            f"{where} holds no routed experts; start the server with --enable-return-routed-experts"
        )
    ids = np.asarray(ids)
    rows = len(ids) if ids.ndim else 0
    num_prompt = rows if num_prompt is None else _count(num_prompt, "prompt tokens", where)
    decoded = (
        max(0, rows - num_prompt) if num_new is None else max(0, _count(num_new, "new tokens", where) - 1)
    )
    first = num_prompt + decoded - rows
    if first < 0 or decoded > rows:
        raise BadTrace(
            f"{where}: routing of {rows} tokens, but {num_prompt} of the prompt and {decoded} that were decoded and "
            f"read; it belongs to another answer, or is damaged"
        )
    return Request(ids=ids, num_prompt=rows - decoded, first=first, where=where)


def _count(value: Any, what: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BadTrace(f"{where}: {what} are {value!r}, which is no count")
    return value


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _choices(response: Mapping[str, Any], where: str) -> list[Mapping[str, Any]]:
    choices = response.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, Mapping) for choice in choices):
        raise BadTrace(f"{where}: choices are no list of objects; {REMEDY}")
    if not choices:
        raise BadTrace(f"{where} holds no choices; {REMEDY}")
    return choices


def _npy(encoded: Any, where: str) -> NDArray[Any] | None:
    if encoded is None:
        return None
    if isinstance(encoded, list):
        return array_of_lists(encoded, where)
    content = _bytes(encoded, where)
    try:
        found: NDArray[Any] = np.load(BytesIO(content), allow_pickle=False)
    except NOT_NUMPY as error:
        raise BadTrace(f"{where}: routed experts are no .npy in base64 ({error})") from error
    return found


def _int32(holder: Mapping[str, Any], where: str) -> NDArray[np.int32]:
    names = ["routed_experts"] if "routed_experts" in holder else ["input_expert_ids", "output_expert_ids"]
    content = b"".join(_bytes(holder.get(name), where) for name in names)
    if len(content) % 4:
        raise BadTrace(f"{where}: routed experts have {len(content)} bytes, no whole number of int32")
    return np.frombuffer(content, dtype="<i4")


def _bytes(encoded: Any, where: str) -> bytes:
    if not isinstance(encoded, str):
        raise BadTrace(f"{where}: routed experts are {type(encoded).__name__}, expected base64 text")
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadTrace(f"{where}: routed experts are no base64 ({error})") from error


def array_of_lists(lists: Any, where: str) -> NDArray[Any]:
    """Nested lists of equal lengths as an array.

    Raises:
        BadTrace: lengths differ, or something in them is no number.
    """
    try:
        array = np.array(lists)
    except (ValueError, OverflowError) as error:
        raise BadTrace(f"{where}: lists of different lengths ({error})") from error
    if array.dtype.kind not in "iuf":
        raise BadTrace(f"{where}: holds {json.dumps(lists, default=str)[:60]}, expected numbers")
    return array
