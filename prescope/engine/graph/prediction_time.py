"""What a prediction takes in a decode step: where steps run from a graph, captured, as it is there.

Launched from Python, LLaPor's took 825 us a layer on an H200 (8 layers of tiny-moe, batch 3); in a graph it took 19 (16
layers of Qwen3-30B-A3B's shape, batch 1). Simulated by the former, none of its prefetches came in time.
"""

import torch

from ...device import Device
from ...predictor import Predictor
from ...predictor.base import measure_us
from ..predicting import Predicting

REPLAYS = 20


def prediction_us(
    predictor: Predictor, device: Device, num_tokens: int, width: int, is_captured: bool
) -> float:
    """Microseconds of one layer's prediction for random router inputs (num_tokens, width), on this machine, now.

    Args:
        is_captured: decode steps run from a graph. A predictor that cannot be captured is asked beside it, from Python.
    """
    with device.as_current():
        if is_captured:
            try:
                with torch.no_grad():
                    return _captured_us(predictor, device, num_tokens, width)
            except Exception:  # noqa: BLE001 - it may be anybody's code: whatever it is, it runs beside the graph
                device.synchronize()
        return measure_us(predictor, width, tokens=num_tokens, device=str(device.torch_device))


def _captured_us(predictor: Predictor, device: Device, num_tokens: int, width: int) -> float:
    where, shape = device.torch_device, predictor.shape
    predictor = predictor.to(where)
    asked = Predicting(predictor, predictor.lookahead, predictor.fast_path(predictor.lookahead))
    x_TD = torch.randn(
        num_tokens, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
    ).to(where)
    ids_TK = torch.arange(shape.top_k, device=where).expand(num_tokens, -1).contiguous()
    weights_TK = torch.full(ids_TK.shape, 1.0 / shape.top_k, dtype=torch.float32, device=where)
    layers = range(max(1, shape.num_layers - 1))  # the last one has none to predict for

    def predict_all() -> torch.Tensor:
        x_TD.add_(
            0.0
        )  # a predictor that looks its answer up launches nothing, and torch warns of an empty graph
        made = torch.empty(0, dtype=torch.float32, device="cpu")
        for layer in layers:
            made = asked.scores(layer, x_TD, ids_TK, weights_TK)
        return made

    predict_all()  # compiles its kernels, which cannot be done while a graph is captured
    replay, _ = device.capture(predict_all)
    replay()
    start = device.mark(True)
    for _ in range(REPLAYS):
        replay()
    end = device.mark(True)
    device.synchronize()
    return device.elapsed_us(start, end) / REPLAYS / len(layers)
