"""When each sequence of a run ended, taken from the stopping criteria that `model.generate` itself goes by.

They come from the call, its `generation_config` and the model's; only `generate` knows what is in force.
"""

import threading
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, StoppingCriteriaList


class RunProgress:
    """How far a run is, and where each of its sequences ends.

    Args:
        prompt_length: tokens of the output that come from the prompt.
        eos, pad: ids that end a sequence, and the one that fills it up, as far as there are such.
        on_step: told the number of new tokens of the longest sequence after each.
        is_cancelled: asked then.

    Attributes:
        num_tokens: new tokens of the longest sequence so far.
        has_run: whether the model has run since the criteria were last asked. Where it has not, they are asked about
            tokens that a draft proposes (transformers up to 5.17), which are not the run's yet.
        lengths: new tokens of each sequence, if whoever chooses them counts.
    """

    def __init__(
        self,
        prompt_length: int,
        eos: Collection[int],
        pad: int | None,
        on_step: Callable[[int], None],
        is_cancelled: Callable[[], bool],
    ) -> None:
        self.prompt_length = prompt_length
        self._eos, self._filling = set(eos), {-1, pad} - set(eos)
        self._on_step, self._is_cancelled = on_step, is_cancelled
        self.num_tokens = 0
        self.has_run = False
        self.lengths: list[int] | None = None
        #: (B, T) new tokens so far, by whoever chooses them.
        self._so_far: Callable[[], list[list[int]]] = list
        self._told: list[int] = []
        self._done: list[torch.Tensor] = []  # (B,) bool each; read at the end, for that waits for the GPU

    def told(self, sequences: torch.Tensor, done: torch.Tensor) -> bool:
        """The sequences (B, T) so far, prompts included; those of `done` (B,) end there. As `step`."""
        self._told.append(sequences.shape[1])
        self._done.append(done)
        # A reference only: to read it waits for the GPU.
        self.chosen_by(lambda: sequences[:, self.prompt_length :].tolist())
        return self.step(sequences.shape[1] - self.prompt_length)

    def chosen_by(self, so_far: Callable[[], list[list[int]]]) -> None:
        """Take the new tokens so far from there when somebody asks."""
        self._so_far = so_far

    def tokens_so_far(self) -> list[list[int]]:
        """The new tokens of each sequence up to its end, or up to now; for the run's own thread, in `on_step`."""
        return [row[: self._end(row)] for row in self._so_far()]

    def step(self, num_tokens: int) -> bool:
        """So many new tokens are there; returns whether the run is to end."""
        self.num_tokens = num_tokens
        self._on_step(num_tokens)
        return self._is_cancelled()

    def tokens(self, sequences: torch.Tensor) -> list[list[int]]:
        """The new tokens of each sequence, up to its end; sequences (B, T) with their prompts."""
        rows = sequences[:, self.prompt_length :].tolist()
        if self.lengths is not None:
            ends = self.lengths
        elif self._done and len(self._done[0]) == len(rows):
            ends = self._ends()
        else:  # beams: the criteria saw more of them than were returned, in another order
            ends = [self._end(row) for row in rows]
        return [row[:end] for row, end in zip(rows, ends, strict=True)]

    def _ends(self) -> list[int]:
        done_NB = torch.stack(self._done).cpu().numpy()
        first_B = np.where(done_NB.any(axis=0), done_NB.argmax(axis=0), len(done_NB) - 1)
        ends: list[int] = (np.array(self._told)[first_B] - self.prompt_length).tolist()
        return ends

    def _end(self, row: list[int]) -> int:
        """Where a sequence ends by its own tokens."""
        end = next((i + 1 for i, token in enumerate(row) if token in self._eos), len(row))
        while end and row[end - 1] in self._filling:
            end -= 1
        return end


class _Watched(StoppingCriteriaList):
    """The criteria of one `generate`, which tell of each token."""

    progress: RunProgress

    def __call__(self, input_ids: torch.Tensor, scores: Any, **keywords: Any) -> torch.Tensor:
        done = super().__call__(input_ids, scores, **keywords)
        if not self.progress.has_run:
            return done
        self.progress.has_run = False
        return torch.ones_like(done) if self.progress.told(input_ids, done) else done


class _OfDraft(StoppingCriteriaList):
    """The criteria of a draft that the model's own first layers make: what ran for it was not the run's step."""

    progress: RunProgress

    def __call__(self, input_ids: torch.Tensor, scores: Any, **keywords: Any) -> torch.Tensor:
        self.progress.has_run = False
        return super().__call__(input_ids, scores, **keywords)


def watched_criteria(model: PreTrainedModel, progress: RunProgress) -> Callable[..., StoppingCriteriaList]:
    """To stand in for the model's `_get_stopping_criteria`: the next `generate` of this thread tells `progress`."""
    thread, own = threading.get_ident(), type(model)._get_stopping_criteria
    is_taken = False

    def criteria(*args: Any, **keywords: Any) -> StoppingCriteriaList:
        nonlocal is_taken
        made = own(model, *args, **keywords)
        if threading.get_ident() != thread:
            return made
        found = _OfDraft(made) if is_taken else _Watched(made)
        is_taken = True
        found.progress = progress
        return found

    return criteria
