"""Routing as other programs write it, from arrays that are known: each function writes one program's own form."""

import base64
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

LAYERS, EXPERTS, TOP_K, WIDTH = 3, 8, 2, 6
SHAPE = (LAYERS, EXPERTS, TOP_K)


class Known(NamedTuple):
    """Requests whose routing is known."""

    ids: list[np.ndarray]  # (T, L, K) int16 each
    prompt_tokens: list[int]
    inputs: list[np.ndarray]  # (T, L, D) float32, exact in bfloat16


def known(lengths: tuple[int, ...] = (6, 4), prompts: tuple[int, ...] = (4, 1), seed: int = 0) -> Known:
    """Some requests, seeded."""
    rng = np.random.default_rng(seed)
    ids = [
        np.argsort(rng.random((n, LAYERS, EXPERTS)), axis=2)[..., :TOP_K].astype(np.int16) for n in lengths
    ]
    inputs = [rng.integers(-8, 8, (n, LAYERS, WIDTH)).astype(np.float32) for n in lengths]
    return Known(ids, list(prompts), inputs)


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def vllm_answer(ids: np.ndarray, prompt: int) -> dict[str, Any]:
    """Of /v1/completions: a .npy in base64, uint8 where that suffices; the last token was never read."""
    file = io.BytesIO()
    np.save(file, ids.astype(np.uint8))
    new = len(ids) - prompt + 1
    return {
        "id": "cmpl-1", "object": "text_completion", "model": "m",
        "choices": [
            {
                "index": 0, "text": "...", "finish_reason": "length", "token_ids": list(range(new)),
                "routed_experts": base64_of(file.getvalue()),
            }
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new},
    }  # fmt: skip


def sglang_answer(ids: np.ndarray, prompt: int, *, with_schema: bool = False) -> dict[str, Any]:
    """Of /generate: int32 in base64 without a shape."""
    new = len(ids) - prompt + 1
    meta: dict[str, Any] = {
        "id": "1",
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "finish_reason": {"type": "length"},
        "routed_experts": base64_of(ids.astype("<i4").tobytes()),
    }
    if with_schema:
        meta["expert_ids_schema"] = {
            "dtype": "int32", "layout": "row_major", "num_layers": ids.shape[1], "top_k": ids.shape[2],
            "moe_layer_ids": list(range(ids.shape[1] - LAYERS, ids.shape[1])),
        }  # fmt: skip
    return {"text": "...", "meta_info": meta}


def write_lines(path: Path, objects: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return path


def write_vllm(path: Path, of: Known) -> Path:
    return write_lines(path, [vllm_answer(*one) for one in zip(of.ids, of.prompt_tokens, strict=True)])


def write_sglang(path: Path, of: Known) -> Path:
    return write_lines(path, [sglang_answer(*one) for one in zip(of.ids, of.prompt_tokens, strict=True)])


def write_moe_trace(path: Path, ids: np.ndarray, prompt: int, *, first_layer: int = 0) -> Path:
    """llama.cpp's `layer,expert`: the prompt is one micro-batch, and only its last token reaches the last layer."""
    rows = ["layer,expert"]
    for begin, end in [(0, prompt), *((t, t + 1) for t in range(prompt, len(ids)))]:
        for layer in range(LAYERS):
            kept = range(end - 1, end) if layer == LAYERS - 1 else range(begin, end)
            rows += [f"{first_layer + layer},{expert}" for t in kept for expert in ids[t, layer]]
    path.write_text("\n".join(rows) + "\n")
    return path


def write_long_moe_trace(path: Path, ids: np.ndarray, prompt: int) -> Path:
    """`phase,token,layer,rank,expert`, as forks of it write."""
    rows = ["phase,token,layer,rank,expert"]
    rows += [
        f"{'prefill' if t < prompt else 'decode'},{t},{layer},{rank},{ids[t, layer, rank]}"
        for t in range(len(ids))
        for layer in range(LAYERS)
        for rank in range(TOP_K)
    ]
    path.write_text("\n".join(rows) + "\n")
    return path


def write_router_trace(folder: Path, of: Known, *, with_states: bool = True) -> Path:
    """Megatron-LM's, a rank for each request: the prompts in one step, then a token of each in a step."""
    folder.mkdir(exist_ok=True)
    steps = max(len(ids) - prompt for ids, prompt in zip(of.ids, of.prompt_tokens, strict=True))
    for rank, (ids, prompt, inputs) in enumerate(zip(*of, strict=True)):
        records, offset = [], 0
        with open(folder / f"hidden_states_rank{rank}.bin", "wb") as states:
            for step in range(steps + 1):
                rows = slice(0, prompt) if step == 0 else slice(prompt + step - 1, prompt + step)
                for layer in range(LAYERS):
                    part = ids[rows, layer]
                    record = {
                        "step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer + 1, "rank": rank,
                        "num_tokens": len(part), "topk": TOP_K, "top_indices": part.tolist(),
                    }  # fmt: skip
                    if with_states:
                        tensor = torch.from_numpy(inputs[rows, layer]).bfloat16()
                        content = tensor.view(torch.int16).numpy().tobytes()
                        states.write(content)
                        record |= {
                            "hs_offset": offset,
                            "hs_bytes": len(content),
                            "hs_shape": list(tensor.shape),
                        }
                        offset += len(content)
                    records.append(record)
                records.append({**records[-1], "block": "mtp", "mtp_idx": 0, "top_indices": [[0, 0]]})
        write_lines(folder / f"router_trace_rank{rank}.jsonl", records)
    return folder


def write_layers(folder: Path, of: Known) -> Path:
    """Safetensors by layer, router inputs in bfloat16; the texts behind one another."""
    folder.mkdir(exist_ok=True)
    sequence = torch.tensor([i for i, ids in enumerate(of.ids) for _ in ids])
    for layer in range(LAYERS):
        tensors = {
            "topk_ids": torch.from_numpy(np.concatenate(of.ids)[:, layer].astype(np.int64)),
            "hidden_states": torch.from_numpy(np.concatenate(of.inputs)[:, layer]).bfloat16(),
        }
        if layer == 0:
            tensors |= {"sequence": sequence, "prompt_tokens": torch.tensor(of.prompt_tokens)}
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / f"layer_{layer:02}.safetensors",
        )
    return folder
