"""`titan-yulan data prepare` against `datasets.load_dataset(...).map(...)`: the same tokenisation of the same files.

    python benchmarks/prepare.py                                20 and 200 MB in 4 files, JSONL and Parquet: 10 minutes
    python benchmarks/prepare.py --megabytes 5 --times 1        a minute or two

The text is the built-in corpus, repeated as often as the size needs; a line at the start of each document counts the
repetitions, so that no two are equal. Both sides take the same vocabulary, trained here, and the same encoder (that of
`Tokenizer`), put an end of text behind each document and use as many processes; that both end with the same number of
tokens is checked. Ours also shuffles across all files, hashes and syncs what it wrote. Each run is a process of its
own, timed from its start to its end, ours and theirs in turn, and the best of `--times` counts. Processor seconds, of
the process and all it started, say more than the clock where others use the machine too. Memory is the largest sum of
the resident memory of all processes of a run, looked at 20 times a second; what processes share counts for each. The
input that is ten times larger has as many files, ten times as long.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_yulan.data.bpe import train_bpe
from titan_yulan.data.corpus import DOMAINS
from titan_yulan.data.documents import BadRow, find_inputs, read_documents
from titan_yulan.data.source import Source
from titan_yulan.data.tokenizer import save_ranks
from titan_yulan.data.workers import default_workers

ROOT = Path(__file__).resolve().parent.parent
FILES = 4
VOCABULARY = 8192
GROWTH = 10  # of the input on which memory is compared

PEER = """
import json, sys, time
import datasets
from titan_yulan.data.tokenizer import Tokenizer

kind, files, vocabulary, cache, workers = json.loads(sys.argv[1])
tokenizer = Tokenizer.load(vocabulary)

def tokenise(batch):
    return {"input_ids": [[*tokenizer.encode(text), tokenizer.eos_id] for text in batch["text"]]}

rows = datasets.load_dataset(kind, data_files=files, split="train", cache_dir=cache)
begin = time.perf_counter()
made = rows.map(tokenise, batched=True, num_proc=workers, remove_columns=rows.column_names)
seconds = time.perf_counter() - begin
tokens = sum(len(chunk.flatten()) for chunk in made.data.column("input_ids").chunks)
print(json.dumps([tokens, seconds]))
"""


@dataclass(frozen=True)
class Input:
    """Files of one format and size."""

    kind: str  # json or parquet
    files: list[str]
    text_bytes: int


@dataclass(frozen=True)
class Run:
    """One process tree: seconds from start to end, processor seconds, bytes at its peak, tokens it made."""

    seconds: float
    processor: float
    memory: int
    tokens: int
    map_seconds: float = 0.0


def corpus(limit: int) -> Iterator[str]:
    """Documents of the built-in corpus with at least `limit` bytes together."""
    texts = [
        document.text
        for domain in DOMAINS
        for file in find_inputs([f"builtin:{domain}"])
        for document in read_documents(file)
        if not isinstance(document, BadRow) and document.text
    ]
    size = repetition = 0
    while size < limit:
        for text in texts:
            document = f"repetition {repetition}\n{text}"
            size += len(document.encode())
            yield document
            if size >= limit:
                break
        repetition += 1


def write_input(folder: Path, kind: str, size: int) -> Input:
    """About `size` bytes of text, dealt to the files in turn."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    written = 0
    if kind == "json":
        paths = [folder / f"{number}.jsonl" for number in range(FILES)]
        lines: list[TextIO] = [path.open("w", encoding="utf-8") for path in paths]
        for number, text in enumerate(corpus(size)):
            lines[number % FILES].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
        for file in lines:
            file.close()
    else:
        paths = [folder / f"{number}.parquet" for number in range(FILES)]
        schema = pyarrow.schema([("text", pyarrow.string())])
        writers = [pyarrow.parquet.ParquetWriter(path, schema) for path in paths]
        waiting: list[list[str]] = [[] for _ in paths]
        for number, text in enumerate(corpus(size)):
            waiting[number % FILES].append(text)
            written += len(text.encode())
            if len(waiting[number % FILES]) == 1000:
                writers[number % FILES].write_table(pyarrow.table({"text": waiting[number % FILES]}, schema=schema))
                waiting[number % FILES] = []
        for writer, rest in zip(writers, waiting, strict=True):
            writer.write_table(pyarrow.table({"text": rest}, schema=schema))
            writer.close()
    return Input(kind, [str(path) for path in paths], written)


def resident(root: int) -> int:
    """Resident bytes of a process and all its descendants."""
    parents: dict[int, int] = {}
    pages: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        parents[int(folder.name)], pages[int(folder.name)] = int(after_name[1]), int(after_name[21])
    tree = {root}
    while more := {process for process, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return sum(pages.get(process, 0) for process in tree) * os.sysconf("SC_PAGE_SIZE")


def measure(command: list[str]) -> tuple[Run, str]:
    """A run without its tokens, and its standard output."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, env={**os.environ, "PYTHONPATH": str(ROOT), **offline})
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            peak = max(peak, resident(process.pid))
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)[:200]} ended with {process.returncode}\n{text}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, peak, 0), text


def run_ours(given: Input, vocabulary: Path, folder: Path, workers: int) -> Run:
    options = [
        "--name",
        "benchmark",
        "--tokenizer",
        str(vocabulary),
        "--minimum-tokens",
        "0",
        "--workers",
        str(workers),
    ]
    command = [sys.executable, "-m", "titan_yulan.cli", "data", "prepare", "--output", str(folder), *options]
    run, _ = measure([*command, *given.files])
    tokens = Source.open(folder).tokens
    shutil.rmtree(folder)
    return replace(run, tokens=tokens)


def run_theirs(given: Input, vocabulary: Path, folder: Path, workers: int) -> Run:
    arguments = json.dumps([given.kind, given.files, str(vocabulary), str(folder), workers])
    run, text = measure([sys.executable, "-c", PEER, arguments])
    tokens, map_seconds = json.loads(text.strip().splitlines()[-1])
    shutil.rmtree(folder)
    return replace(run, tokens=tokens, map_seconds=map_seconds)


def compare(given: Input, vocabulary: Path, folder: Path, workers: int, times: int) -> tuple[Run, Run]:
    """The best of each side, in turn; memory is the largest of all runs of a side."""
    ours, theirs = [], []
    for _ in range(times):
        ours.append(run_ours(given, vocabulary, folder / "ours", workers))
        theirs.append(run_theirs(given, vocabulary, folder / "theirs", workers))
    if len({run.tokens for run in (*ours, *theirs)}) != 1:
        sys.exit(f"the sides disagree: {ours[0].tokens:,} and {theirs[0].tokens:,} tokens")
    return best(ours), best(theirs)


def best(runs: list[Run]) -> Run:
    """The least of every time, the most of memory."""
    return Run(
        min(run.seconds for run in runs),
        min(run.processor for run in runs),
        max(run.memory for run in runs),
        runs[0].tokens,
        min(run.map_seconds for run in runs),
    )


HEAD = """\
| input | | MB/s | million tokens/s | MB per processor second | time / ours | processor seconds / ours | peak MiB |
|---|---|---:|---:|---:|---:|---:|---:|"""


def rows(given: Input, ours: Run, theirs: Run, workers: int) -> str:
    """The lines of the table for one input; speeds are per process."""
    megabytes, millions = given.text_bytes / 1e6, ours.tokens / 1e6
    lines = []
    for name, run in (("ours", ours), ("`datasets`", theirs)):
        given_as = f"{'JSONL' if given.kind == 'json' else 'Parquet'}, {megabytes:,.0f} MB" if run is ours else ""
        speeds = [megabytes / run.seconds / workers, millions / run.seconds / workers, megabytes / run.processor]
        ratios = [run.seconds / ours.seconds, run.processor / ours.processor]
        numbers = [f"{number:.2f}" for number in (*speeds, *ratios)]
        lines.append([given_as, name, *numbers, f"{run.memory / 2**20:,.0f}"])
    speeds = [megabytes / theirs.map_seconds / workers, millions / theirs.map_seconds / workers]
    alone = [f"{number:.2f}" for number in speeds]
    lines.append(["", "its `map` alone", *alone, "", f"{theirs.map_seconds / ours.seconds:.2f}", "", ""])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--megabytes", type=float, default=20, help="size of the smaller input (default 20)")
    parser.add_argument(
        "--times",
        type=int,
        default=4,
        help="runs of each side on the smaller input (default 4); half as many on the larger",
    )
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes (default: one per core)")
    parser.add_argument("--folder", type=Path, help="where to work (default: the folder for temporary files)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        save_ranks(folder / "vocabulary.tiktoken", train_bpe(corpus(4_000_000), VOCABULARY))
        print(f"{options.workers} processes; speeds per process\n\n{HEAD}", flush=True)
        for growth, times in ((1, options.times), (GROWTH, max(1, options.times // 2))):
            for kind in ("json", "parquet"):
                given = write_input(folder / "input", kind, int(options.megabytes * 1e6 * growth))
                ours, theirs = compare(given, folder / "vocabulary.tiktoken", folder, options.workers, times)
                print(rows(given, ours, theirs, options.workers), flush=True)
                shutil.rmtree(folder / "input")


if __name__ == "__main__":
    main()
