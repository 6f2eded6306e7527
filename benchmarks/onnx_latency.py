"""ONNX Runtime against PyTorch on a CPU, in one run: `python -m benchmarks.onnx_latency`.

The mini teacher and the mini student, one image at 16 steps with guidance, end to end. Written is
`results/onnx_latency.json`: seconds, and ratios to the teacher under PyTorch in the same round.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import kdc
from studies.common import ledger

PROMPT, STEPS = "a red rose on a night background", 16


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--results", help="where to write (default: results/)")
    args = parser.parse_args(argv)
    teacher = kdc.load_teacher("mini", device="cpu")
    student = kdc.load_student("mini", teacher)
    how = {"steps": args.steps, "progress": False}
    with tempfile.TemporaryDirectory() as folder:
        calls, sizes = {}, {}
        for name, pipeline in (("teacher", teacher), ("student", student)):
            place = kdc.export(pipeline.unet, teacher, Path(folder) / name, onnx=True)
            for package, drawn in (("PyTorch", pipeline), ("ONNX Runtime", kdc.load_onnx(place))):
                calls[f"{name}, {package}"] = lambda p=drawn: kdc.generate(p, [PROMPT], **how)
            sizes[name] = (place / "onnx" / "unet" / "model.onnx").stat().st_size
        times = kdc.measure_latency(calls, rounds=args.rounds, warmup=2)
    values = {"rows": times.to_dict("index"), "unet_bytes": sizes, "steps": args.steps}
    path = ledger.write("onnx_latency", values, args.results, rounds=args.rounds)
    print(times[["median", "low", "high", "ratio"]].round(3).to_string())
    print(f"written to {path}, with {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
