"""Read the corpus folder, turn it into token streams, and draw windows from them.

Knows files, tokenizers and windows; knows nothing of models. Layout of a corpus folder:
``train/<domain>.txt``, ``valid/<domain>.txt``, ``ood/<domain>.txt`` and ``tokenizers/<name>.json``;
documents are separated by a line ``<|endoftext|>``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
PIECE_CHARS = 65_536  # long documents are cut here so that all cores get work
PIECES_PER_CALL = 512  # bounds the memory of tokenizers' Encoding objects to a few hundred MB
MIXTURE_EXPONENT = 0.7  # of a domain's size; 1.0 would be proportional, 0.0 equal shares

Streams = dict[str, np.ndarray]  # domain -> uint16 token ids, every document ended by END_OF_TEXT


def read_documents(path: Path) -> list[str]:
    """Documents of one domain file, without the separators and without empty ones."""
    parts = path.read_text(encoding="utf-8").split(f"{END_OF_TEXT}\n")
    documents = [part.removesuffix(END_OF_TEXT) for part in parts]
    return [document for document in documents if document.strip()]


def cut_document(document: str, limit: int = PIECE_CHARS) -> Iterator[str]:
    """Pieces of at most about ``limit`` characters whose token ids, joined, are the document's.

    Cut only after a newline that a non-space follows: there the pre-tokenizer's pattern always ends a
    word, so no merge crosses the cut. Without such a place the piece stays long.
    """
    start = 0
    place = re.compile(r"\n(?=\S)")
    while len(document) - start > limit:
        found = place.search(document, start + limit)
        if found is None:
            break
        yield document[start : found.end()]
        start = found.end()
    yield document[start:]


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """One uint16 stream: each document's ids, then the end-of-text id. Uses all cores (tokenizers does)."""
    end_id = tokenizer.token_to_id(END_OF_TEXT)
    if end_id is None:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT} token; documents could not be told apart")
    if tokenizer.get_vocab_size() > 2**16:
        raise ValueError(f"{tokenizer.get_vocab_size()} token ids do not fit the uint16 streams")
    pieces, ends = [], []
    for document in documents:
        pieces.extend(cut_document(document))
        ends.append(len(pieces) - 1)
    ends_document = np.zeros(len(pieces), dtype=bool)
    ends_document[ends] = True
    out: list[np.ndarray] = []
    for start in range(0, len(pieces), PIECES_PER_CALL):
        encodings = tokenizer.encode_batch_fast(
            pieces[start : start + PIECES_PER_CALL], add_special_tokens=False
        )
        for offset, encoding in enumerate(encodings):
            out.append(np.array(encoding.ids, dtype=np.uint16))
            if ends_document[start + offset]:
                out.append(np.array([end_id], dtype=np.uint16))
    return np.concatenate(out) if out else np.zeros(0, dtype=np.uint16)


def load_streams(corpus: Path, split: str, tokenizer: Tokenizer) -> Streams:
    """Token stream of every domain file of one split, by name.

    Raises FileNotFoundError when the split has no files.
    """
    paths = sorted((corpus / split).glob("*.txt"))
    if not paths:
        raise FileNotFoundError(
            f"no *.txt in {corpus / split}; unpack the corpus and pass its folder as --corpus"
        )
    return {path.stem: encode_documents(tokenizer, read_documents(path)) for path in paths}


def mixture_weights(streams: Streams, exponent: float = MIXTURE_EXPONENT) -> dict[str, float]:
    """Share of training windows per domain, proportional to size ** exponent; sums to 1."""
    raw = {domain: float(len(stream)) ** exponent for domain, stream in streams.items()}
    total = sum(raw.values())
    return {domain: value / total for domain, value in raw.items()}


@dataclass
class WindowSampler:
    """Random training windows, all domains in every batch; data and random numbers stay on the device."""

    tokens: torch.Tensor  # (N,) int32, all domains joined
    first: torch.Tensor  # (D,) where a domain starts in `tokens`
    num_starts: torch.Tensor  # (D,) window starts a domain offers
    cumulative: torch.Tensor  # (D,) mixture weights, summed up
    window: int  # tokens per window: context + 1
    generator: torch.Generator

    @classmethod
    def build(
        cls, streams: Streams, weights: dict[str, float], window: int, device: str, seed: int
    ) -> WindowSampler:
        short = {domain: len(stream) for domain, stream in streams.items() if len(stream) <= window}
        if short:
            raise ValueError(
                f"domains shorter than a window of {window} tokens: {short}; lower --context or add text"
            )
        lengths = np.array([len(stream) for stream in streams.values()])
        joined = np.concatenate(list(streams.values())).astype(np.int32)
        shares = np.array([weights[domain] for domain in streams])
        return cls(
            tokens=torch.from_numpy(joined).to(device),
            first=torch.from_numpy(np.cumsum(lengths) - lengths).to(device),
            num_starts=torch.from_numpy(lengths - window + 1).to(device),
            cumulative=torch.from_numpy(np.cumsum(shares) / shares.sum()).to(device),
            window=window,
            generator=torch.Generator(device=device).manual_seed(seed),
        )

    def draw(self, batch: int) -> torch.Tensor:
        """(batch, window) int64; systematic sampling gives a domain its share of every batch, +- 1 window."""
        device = self.tokens.device
        uniform = torch.rand(batch + 1, dtype=torch.float64, device=device, generator=self.generator)
        quantile = (torch.arange(batch, device=device) + uniform[0]) / batch
        domain = torch.searchsorted(self.cumulative, quantile).clamp_(max=len(self.first) - 1)
        start = self.first[domain] + (uniform[1:] * self.num_starts[domain]).long()
        index = start[:, None] + torch.arange(self.window, device=device)
        return self.tokens[index].long()


def window_starts(stream: np.ndarray, context: int, limit: int | None = None) -> np.ndarray:
    """Starts of windows that predict every token once, the ragged end left out; ``limit`` spreads so many."""
    count = (len(stream) - 1) // context
    if count < 1:
        raise ValueError(f"a stream of {len(stream)} tokens has no window of {context + 1}; lower --context")
    if limit is None or limit >= count:
        return np.arange(count) * context
    return np.linspace(0, count - 1, limit).round().astype(np.int64) * context


def evaluation_windows(stream: np.ndarray, context: int, limit: int | None = None) -> torch.Tensor:
    """(W, context + 1) int64 tokens at `window_starts`."""
    index = window_starts(stream, context, limit)[:, None] + np.arange(context + 1)
    return torch.from_numpy(stream[index].astype(np.int64))
