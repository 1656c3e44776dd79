"""Start-up: how fast experts reach pinned host rows, and what that takes.

    python benchmarks/startup.py --model olmoe-1b-7b --out startup.json          # 16 cores, a GPU, 64 GiB
    python benchmarks/startup.py --model olmoe-1b-7b --save DIR --out ...        # also prescope.load from page cache
    python benchmarks/startup.py --model olmoe-1b-7b-cut2 --device cpu           # no GPU: nothing is pinned
    python benchmarks/startup.py --runs --out runs.json                          # the first calls, on a GPU: 2 minutes
    python benchmarks/startup.py --runs --model toy --device cpu                 # the same script on a CPU

First pages alone (kind of page, threads, pinning), then the engine on a model in GPU memory, on the same model in CPU
memory, and, with --save, on a checkpoint. Random weights. Peaks are of anonymous resident memory, above that of before.
With --runs instead: the embedded model's cold start, part by part, in a process of its own, beside that of
transformers alone; then calls of `generate` one after another at Qwen3-30B-A3B's shape with fewer experts (what is
recorded and compiled does not depend on how many), without and with compiled layers: what each waits for before its
prompt is read, for its first tokens, and which record graphs.
Prints markdown tables last; writes JSON after every cell.
"""

import argparse
import gc
import mmap
import os
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _models import open_model
from _startup_runs import COLD_COLUMNS, RUN_COLUMNS, runs
from _written import write_cells

import prescope
from prescope.core.machine import machine_facts
from prescope.device import CudaDevice, Device, NullDevice
from prescope.engine.engine import Engine
from prescope.hf import HostParameter
from prescope.weights.pages import HostPages, copy_rows, num_threads, run_jobs

GIB = 1 << 30
PAGES_BYTES = 1 << 30
ENGINE_COLUMNS = [
    "experts in", "experts GB", "fill s", "fill GB/s", "touch GB/s", "copy GB/s", "pin GB/s", "extra peak GiB",
    "allowed GiB", "attach or load s", "first token s", "second token s", "detach s",
]  # fmt: skip
PAGES_COLUMNS = ["what", "pages", "threads", "GB/s", "spread"]


def main() -> None:
    """Run all parts, print the tables last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="olmoe-1b-7b; with --runs qwen3-30b-a3b")
    parser.add_argument("--runs", action="store_true", help="measure calls instead of pages and loading")
    parser.add_argument("--experts", type=int, default=16, help="of a layer, with --runs")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--slots", type=float, default=0.25)
    parser.add_argument("--repeats", type=int, default=5, help="of the pages' part; each start-up runs once")
    parser.add_argument("--save", help="empty folder for the checkpoint, on a disk with room for the model")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    args.model = args.model or ("qwen3-30b-a3b" if args.runs else "olmoe-1b-7b")
    on_gpu = args.device == "cuda"
    facts = {
        **machine_facts(),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU, nothing is pinned",
        "threads": num_threads(),
        "huge_pages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "huge_pages_shmem": _first_line("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        # torch's own memory on huge pages: 1 makes transformers' loading several times faster; read once, at start.
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", "not set"),
        "weights": "random",
    }
    print(f"# {facts}", flush=True)
    started = time.perf_counter()
    cells: list[dict[str, Any]] = []

    def keep(cell: dict[str, Any]) -> None:
        cells.append(cell)
        print(f"# {time.perf_counter() - started:.0f} s: {cell}", flush=True)
        write_cells(args, facts, cells)

    try:
        if args.runs:
            runs(args, keep)
        else:
            pages_alone(CudaDevice() if on_gpu else NullDevice(), args.repeats, keep)
            engines(args, keep)
    except KeyboardInterrupt:
        print("# interrupted: what follows is what there is")
    print(f"# {time.perf_counter() - started:.0f} s on {facts['device']}")
    tables = {"pages": PAGES_COLUMNS, "engine": ENGINE_COLUMNS, "cold": COLD_COLUMNS, "runs": RUN_COLUMNS}
    for part, columns in tables.items():
        shown = [cell for cell in cells if cell["part"] == part]
        if shown:
            print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for cell in shown:
            print(f"| {' | '.join(_show(cell.get(column)) for column in columns)} |")


# -- pages alone ---------------------------------------------------------------------------------------------------


def pages_alone(device: Device, repeats: int, keep: Callable[[dict[str, Any]], None]) -> None:
    """GB/s of first touch, of copying and of pinning, by kind of page and threads."""
    source = torch.empty(128, PAGES_BYTES // 128, dtype=torch.uint8).fill_(1)
    for threads in sorted({1, 4, num_threads()} & set(range(1, num_threads() + 1))):
        runs: dict[str, list[float]] = {}
        for _ in range(repeats + 1):
            pages = HostPages(PAGES_BYTES)
            rates = {"copy to fresh pages": _rate(copy_rows, _rows(pages), source, threads)}
            rates["copy to touched pages"] = _rate(copy_rows, _rows(pages), source, threads)
            pages.close()
            pages = HostPages(PAGES_BYTES)
            rates["touch"] = _rate(pages.touch, threads)
            rates |= _pin_and_unpin(device, pages.data, threads)
            pages.close()
            for what, rate in rates.items():
                runs.setdefault(what, []).append(rate)
        for what, of_what in runs.items():  # the first run warms up the machine's own memory
            keep(_pages_cell(what, f"private, {pages.advice}", threads, of_what[1:]))
    _shared_pages(device, min(3, repeats), keep)


def _shared_pages(device: Device, repeats: int, keep: Callable[[dict[str, Any]], None]) -> None:
    """What Python's mmap gives unless told otherwise; one thread pins them, as one call did."""
    runs: dict[str, list[float]] = {}
    for _ in range(repeats):
        memory = mmap.mmap(-1, PAGES_BYTES)
        data = torch.frombuffer(memory, dtype=torch.uint8)
        jobs = [partial(piece.numpy()[:: mmap.PAGESIZE].fill, 0) for piece in _pieces(data, 128)]
        rates = {"touch": _rate(run_jobs, jobs), **_pin_and_unpin(device, data, 1)}
        del data, jobs
        for what, rate in rates.items():
            runs.setdefault(what, []).append(rate)
    for what, of_what in runs.items():
        keep(_pages_cell(what, "shared", num_threads() if what == "touch" else 1, of_what))


def _rows(pages: HostPages) -> torch.Tensor:
    return pages.data.view(128, -1)


def _pieces(data: torch.Tensor, num: int) -> list[torch.Tensor]:
    return list(data.view(num, -1).unbind(0)) if data.numel() % (num * mmap.PAGESIZE) == 0 else [data]


def _pin_and_unpin(device: Device, data: torch.Tensor, threads: int) -> dict[str, float]:
    """GB/s of one cudaHostRegister, or of one of each of `threads` pieces at a time; nothing without a GPU."""
    if device.kind != "cuda":
        return {}
    pieces = _pieces(data, threads)
    rate = _rate(run_jobs, [partial(device.pin, piece) for piece in pieces], threads)
    return {
        "pin": rate,
        "unpin": _rate(run_jobs, [partial(device.unpin, piece) for piece in pieces], threads),
    }


def _rate(work: Callable[..., object], *arguments: Any) -> float:
    started = time.perf_counter()
    work(*arguments)
    return PAGES_BYTES / (time.perf_counter() - started) / 1e9


def _pages_cell(what: str, kind: str, threads: int, rates: list[float]) -> dict[str, Any]:
    median = statistics.median(rates)
    return {
        "part": "pages", "what": what, "pages": kind, "threads": threads, "GB/s": median,
        "spread": (max(rates) - min(rates)) / median, "runs": rates,
    }  # fmt: skip


# -- the engine ----------------------------------------------------------------------------------------------------


def engines(args: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> None:
    """Attach to the model in GPU memory, then to the same in CPU memory, then load it from a folder."""
    device, dtype = torch.device(args.device), torch.bfloat16
    model = open_model(args.model, device, dtype).model
    settings = {"slots": args.slots, "device": args.device}
    if args.device == "cpu":
        settings["link_gb_per_s"] = 50.0  # emulated; it has no part in filling
    else:
        keep(start_up("GPU memory", lambda: prescope.attach(model, **settings), 1))
        model.to("cpu")
        gc.collect()
        torch.cuda.empty_cache()
    keep(start_up("CPU memory", lambda: prescope.attach(model, **settings), 0))
    # Again, on pages that this machine has touched before: a virtual machine may get its own memory page by page.
    keep(start_up("CPU memory, again", lambda: prescope.attach(model, **settings), 0))
    if args.save:
        # Detaching has given the model back, so what is saved is what was built.
        model.to("cpu").save_pretrained(args.save)
        del model
        gc.collect()
        keep(start_up("a folder, in page cache", lambda: prescope.load(args.save, **settings), 2))


def start_up(where: str, open_engine: Callable[[], Engine], copies_taken: int) -> dict[str, Any]:
    """One engine from nothing to its second token and back.

    copies_taken: of the experts in host memory, that this start-up adds for good (0: they were there; 1: it fills
    rows; 2: a whole model comes, of which rows remain).
    """
    gc.collect()
    started = time.perf_counter()
    with Peak() as peak:
        engine = open_engine()
    opened_s = time.perf_counter() - started
    host = engine.runner.host
    nbytes, parts = host.nbytes, host.seconds
    layer = max(rows.rows.nbytes for rows in host.layers)
    rest = sum(p.nbytes for p in engine.model.parameters() if not isinstance(p, HostParameter))
    slots = engine.num_slots * engine.shape.row_bytes if engine.describe()["device"] == "cpu" else 0
    allowed = layer + slots + (nbytes if copies_taken else 0) + (rest if copies_taken == 2 else 0)
    tokens = torch.arange(16)[None]
    engine.generate(tokens, max_new_tokens=1)
    first_s = time.perf_counter() - started
    engine.generate(tokens, max_new_tokens=1)
    second_s = time.perf_counter() - started - first_s
    engine.check_integrity()
    leaving = time.perf_counter()
    engine.detach()
    return {
        "part": "engine", "experts in": where, "experts GB": nbytes / 1e9, "fill s": host.fill_seconds,
        "fill GB/s": nbytes / host.fill_seconds / 1e9,
        **{f"{part} GB/s": nbytes / parts[part] / 1e9 for part in parts if parts[part] > 0.001},
        "extra peak GiB": peak.extra_bytes / GIB, "allowed GiB": allowed / GIB,
        "attach or load s": opened_s, "first token s": first_s, "second token s": second_s,
        "detach s": time.perf_counter() - leaving,
    }  # fmt: skip


class Peak:
    """The most anonymous memory this process had resident meanwhile, above what it had before; looked at every 5 ms.

    Anonymous: pages of a checkpoint that is mapped are the page cache's, which gives them back when memory is short.
    """

    def __enter__(self) -> "Peak":
        self.before_bytes = self.most_bytes = _resident_bytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.most_bytes = max(self.most_bytes, _resident_bytes())

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def extra_bytes(self) -> int:
        return self.most_bytes - self.before_bytes


def _resident_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in status if line.startswith(("RssAnon", "RssShmem")))


def _first_line(path: str) -> str:
    return Path(path).read_text().splitlines()[0] if Path(path).exists() else "unknown"


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
