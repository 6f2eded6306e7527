"""Does the cache of latents on disk stay as fast and as small when the data set grows?

    python -m benchmarks.latents [--counts 1000 50000]

Each count runs in a process of its own: it encodes so many synthetic images with the mini teacher
into shards, opens the cache again, and draws batches from it. Measured are images a second, batches
a second, and how far the process's own memory (without what is mapped from files) rises above where
it stood before. Written is `results/latent_cache.json`, with the ratios of the last count to the
first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset

import kdc
from studies.common import ledger

CAPTIONS = 500  # distinct ones


class Noise(Dataset):
    """Synthetic images, each from a seed of its own; item i is the same in any count."""

    def __init__(self, count: int, size: int = 64):
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count

    def identity(self) -> dict:
        return {"noise": self.count, "size": self.size}

    def captions_of(self, index: int) -> tuple[str, ...]:
        return (f"image {index % CAPTIONS}",)

    def __getitem__(self, index: int) -> dict:
        g = torch.Generator().manual_seed(index)
        image = torch.rand((3, self.size, self.size), generator=g) * 2 - 1
        return {"image": image, "caption": self.captions_of(index)[0]}


def own_memory() -> int:
    """Bytes that the process holds for itself, files mapped into it not among them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("the memory of a process is read from /proc, which only Linux has")


class Peak:
    """The highest `own_memory` while it is entered."""

    def __enter__(self):
        self.highest, self.ended = own_memory(), threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self):
        while not self.ended.wait(0.01):
            self.highest = max(self.highest, own_memory())

    def __exit__(self, *raised):
        self.ended.set()
        self.thread.join()


def measure(count: int, batches: int = 400, batch_size: int = 32) -> dict[str, float]:
    """What one count costs; the first images and batches are not timed."""
    pipeline = kdc.load_teacher("mini", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        kdc.cache_latents(pipeline, Noise(256), batch_size, folder=f"{folder}/warm-up")
        before, started = own_memory(), time.perf_counter()
        with Peak() as peak:
            kdc.cache_latents(pipeline, Noise(count), batch_size, folder=f"{folder}/cache")
            encoded = time.perf_counter()
            data = kdc.cache_latents(pipeline, Noise(count), batch_size, folder=f"{folder}/cache")
            opened = time.perf_counter()
            generator = torch.Generator().manual_seed(0)
            for _ in range(20):
                data.draw(batch_size, generator)
            drawing = time.perf_counter()
            for _ in range(batches):
                data.draw(batch_size, generator)
            drawn = time.perf_counter()
        size = sum(f.stat().st_size for f in Path(folder, "cache").rglob("*") if f.is_file())
        return {
            "images": count,
            "images_per_second": count / (encoded - started),
            "second_start_seconds": opened - encoded,
            "batches_per_second": batches / (drawn - drawing),
            "own_memory_bytes": peak.highest - before,
            "bytes_on_disk": size,
        }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 50_000])
    parser.add_argument("--results", help="where to write (default: results/)")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure(args.one)))
        return
    rows = []
    for count in args.counts:
        command = [sys.executable, "-m", "benchmarks.latents", "--one", str(count)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    ratios = {name: rows[-1][name] / rows[0][name] for name in rows[0]}
    path = ledger.write("latent_cache", {"rows": rows, "last_over_first": ratios}, args.results)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
