"""Telling a predictor that learns (`predictor.base.Learns`) what each layer of a forward pass has used.

Shapes: B sequences, N tokens of each in the forward, T = B * N tokens, K top-k, L MoE layers.
"""

import torch

from ..errors import UnsupportedOption
from ..predictor.base import Learns
from .positions import Forward


class Observing:
    """Tells one predictor, layer by layer, and when a text begins.

    A text begins where a cache is empty, or holds another number of sequences than the text before.
    """

    def __init__(self, learner: Learns) -> None:
        self._learner = learner
        self._num_sequences = self._num_tokens = 0
        self._is_padding_T1: torch.Tensor | None = None

    def begin(self, forward: Forward) -> None:
        """A forward pass begins."""
        if forward.past == 0 or forward.batch != self._num_sequences:
            self._num_sequences = 0  # not known, if that raises
            self._learner.begin(forward.batch)
            self._num_sequences = forward.batch
        self._num_tokens, self._is_padding_T1 = forward.batch * forward.length, None
        real = forward.real() if forward.phase == "prefill" else None  # a new token is no padding
        if real is not None and not real.all():
            self._is_padding_T1 = ~torch.from_numpy(real[:, -forward.length :].reshape(-1, 1))

    def end(self) -> None:
        """The forward pass is over: a module that is called alone is none of the text's."""
        self._num_tokens = 0

    def layer(self, moe_layer: int, ids_TK: torch.Tensor) -> None:
        """What a layer of the forward pass has used.

        Raises:
            UnsupportedOption: it was given other tokens than the model. And whatever the predictor raises.
        """
        if not self._num_tokens:
            return
        if len(ids_TK) != self._num_tokens:
            raise UnsupportedOption(
                f"the layer was given {len(ids_TK)} of {self._num_tokens} tokens, so nobody knows whose they are"
            )
        if self._is_padding_T1 is not None:
            ids_TK = ids_TK.masked_fill(self._is_padding_T1.to(ids_TK.device), -1)
        self._learner.observe(moe_layer, ids_TK)

    def step(self, ids_LTK: torch.Tensor) -> None:
        """What all layers of a step from a graph have used."""
        for moe_layer, ids_TK in enumerate(ids_LTK):
            self._learner.observe(moe_layer, ids_TK)
