"""How much memory `titan-yulan checkpoint import` takes, against the size of what it writes. One process, CPU.

    python benchmarks/import_memory.py                         300 M parameters, 3.6 GB with moments: a few minutes
    python benchmarks/import_memory.py --layers 4 --folder /mnt/disk

A folder in DeepSpeed's universal layout with weights and moments in float32, and one of Hugging Face with weights in
bfloat16, are written and imported, each in a process of its own. Its largest resident set (VmHWM) counts pages of the
files that are mapped, which the system can drop; memory that no file backs (RssAnon, seen every 5 ms) stands apart.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_yulan import config as configuration
from titan_yulan.checkpoint.hugging_face import parameter_shapes
from titan_yulan.checkpoint.importing import import_checkpoint
from titan_yulan.config.model import ModelConfig
from titan_yulan.config.sections import RunConfig, TokenizerSection
from titan_yulan.data.tokenizer import save_ranks

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("deepspeed", "huggingface")


def run_config(folder: Path, layers: int) -> RunConfig:
    """YuLan-Mini's kind of model; the vocabulary is a byte a token, which the import does not depend on."""
    save_ranks(folder / "bytes.tiktoken", {bytes([value]): value for value in range(256)})
    model = ModelConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    config = configuration.load(ROOT / "train_configs" / "debug.toml").config
    return replace(config, model=model, tokenizer=TokenizerSection(path=str(folder / "bytes.tiktoken")))


def write(folder: Path, model: ModelConfig) -> None:
    """Both folders, of random tensors."""
    generator = torch.Generator().manual_seed(1)
    (folder / "huggingface").mkdir()
    states = folder / "deepspeed" / "global_step7_universal"
    halves = {}
    for name, shape in parameter_shapes(model).items():
        (states / "zero" / name).mkdir(parents=True)
        for key in ("fp32", "exp_avg", "exp_avg_sq"):
            tensor = torch.randn(shape, generator=generator)
            torch.save({"param": tensor}, states / "zero" / name / f"{key}.pt")
            if key == "fp32":
                halves[name] = tensor.bfloat16()
    torch.save(halves, folder / "huggingface" / "pytorch_model.bin")
    (folder / "deepspeed" / "latest_universal").write_text(states.name)
    for kind in KINDS:
        (folder / kind / "config.json").write_text(json.dumps(model.to_published()))


def measure(folder: Path, layers: int, kind: str, queue: multiprocessing.Queue) -> None:
    """Largest resident set and anonymous memory in bytes, and seconds; without a kind: of the imports of modules."""
    done, anonymous = threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.005):
            anonymous[0] = max(anonymous[0], memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    if kind:
        config = run_config(folder, layers)
        import_checkpoint(folder / kind, config, folder / f"{kind}-run", report=lambda line: None)
    seconds = time.perf_counter() - begin
    time.sleep(0.02)
    done.set()
    watcher.join()
    # not ru_maxrss, which begins with what the parent had when it started this process
    queue.put((memory("VmHWM"), anonymous[0], seconds))


def memory(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary folder)")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, queue = Path(name), context.Queue()
        model = run_config(folder, options.layers).model
        write(folder, model)
        sizes = [4 * torch.Size(shape).numel() for shape in parameter_shapes(model).values()]
        print(f"torch {torch.__version__}; weights {sum(sizes) / 1e6:,.0f} MB, largest {max(sizes) / 1e6:,.0f} MB\n")
        print("| import | written | peak memory | of it anonymous | seconds |")
        print("|---|---|---|---|---|")
        for kind in ("", *KINDS):
            child = context.Process(target=measure, args=(folder, options.layers, kind, queue))
            child.start()
            peak, anonymous, seconds = queue.get()
            child.join()
            size = sum(file.stat().st_size for file in folder.glob(f"{kind}-run/**/*") if file.is_file()) if kind else 0
            cells = (size, peak, anonymous)
            written = " | ".join(f"{cell / 1e6:,.0f} MB" for cell in cells)
            print(f"| {kind or 'modules alone'} | {written} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
