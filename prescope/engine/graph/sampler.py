"""Chooses tokens where the graph has not, and keeps the sequences."""

from typing import Any

import numpy as np
import torch


class Sampler:
    """Chooses tokens as transformers' `_sample` does, and keeps the sequences.

    Greedily, without processors and criteria of the user's own, the graph has chosen already (`greedy`), and the host
    only keeps what it is told.

    Attributes:
        lengths: (B,) new tokens of each sequence up to its end.
    """

    def __init__(self, processors: Any, config: Any, criteria: Any, input_ids: torch.Tensor) -> None:
        self._processors, self._sampled, self._criteria = processors, bool(config.do_sample), criteria
        eos = config._eos_token_tensor
        self._ends = set(eos.tolist()) if eos is not None else set()
        pad = config._pad_token_tensor
        self._pad = int(pad) if pad is not None else 0
        self._prompt = input_ids
        self._rows: list[torch.Tensor] = []  # (B,) each, on the host
        self._listed: list[list[int]] = [[] for _ in range(len(input_ids))]
        self._unfinished = np.ones(input_ids.shape[0], dtype=bool)
        self.lengths = np.zeros(input_ids.shape[0], dtype=np.int64)
        own = {"MaxLengthCriteria", "EosTokenCriteria"}
        self.greedy = (
            not self._sampled and not len(processors) and {type(c).__name__ for c in criteria} <= own
        )

    def next(self, logits: torch.Tensor, target: torch.Tensor) -> None:
        """Choose from logits (B, V) and write the choice where the next step reads it, (B, 1)."""
        target.copy_(self.choose(logits)[:, None])

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Choose tokens (B,) from logits (B, V) and keep them."""
        scores = self._processors(self.sequences(), logits.to(copy=True, dtype=torch.float32))
        if self._sampled:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        return self.take(tokens.cpu().numpy())

    def take(self, tokens: np.ndarray) -> torch.Tensor:
        """Keep one token per sequence (B,); sequences that have ended get padding."""
        kept = np.where(self._unfinished, tokens, self._pad)
        self.lengths += self._unfinished
        self._rows.append(torch.from_numpy(kept))
        self._unfinished &= ~np.isin(kept, list(self._ends)) if self._ends else True
        return self._rows[-1]

    def is_done(self) -> bool:
        """Whether all sequences have ended."""
        if not self.greedy:
            self._unfinished &= ~self._criteria(self.sequences(), None).cpu().numpy()
        return not self._unfinished.any()

    def so_far(self) -> list[list[int]]:
        """New tokens of each sequence, by the host's own record: asking waits for no GPU."""
        for row in self._rows[len(self._listed[0]) :]:
            for listed, token in zip(self._listed, row.tolist(), strict=True):
                listed.append(token)
        return self._listed

    def sequences(self) -> torch.Tensor:
        """(B, prompt + new tokens) on the model's device."""
        if not self._rows:
            return self._prompt
        new = torch.stack(self._rows, dim=1).to(self._prompt.device)
        return torch.cat([self._prompt, new], dim=1)
