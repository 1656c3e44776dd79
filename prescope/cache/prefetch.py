"""How much of what is prefetched may be on the link at once."""

#: Copies below this do not reach the link's rate: PCIe 5 gave 53 GB/s at 4 MiB, 48 at 1 MiB (benchmarks/async_io.py).
LEAST_BYTES_UNDER_WAY = 4 << 20


def most_in_flight(device_kind: str, row_bytes: int) -> int:
    """Prefetches under way at most: one on the wire and one behind it, so that demand waits for no more.

    On CUDA as many more as small experts need to keep the link at its rate.
    """
    return max(2, LEAST_BYTES_UNDER_WAY // row_bytes) if device_kind == "cuda" else 2
