"""Memory against the size of the text: from a token store and by streaming it stays, with tokens in memory it grows.

The text is one text over and over, a running number before each line, so that no two are alike. For each size and way a
fresh process does the work while this one samples the memory of its own (RssAnon: pages that only more memory can hold;
those of mapped files are the disk's cache, which gives way). Training is the Trainer's, in random order, on a model so
small that the data is what counts. By streaming, all of the text is read and shuffled once, as an epoch does.

    python benchmarks/large_data.py [--threads 2] [--text SOURCE] [--megabytes 10 30 100 300 1000]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from _report import add_json_option, write

from latentlm.data import read_documents, train_tokenizer
from latentlm.data.recipe import DataRecipe, load_corpus
from latentlm.training.recipe import parse_recipe
from latentlm.training.run import train

STEPS, LENGTH, VOCABULARY = 50, 128, 8192
LARGEST_IN_MEMORY = 100
WAYS = ("imports", "store", "from the store", "streaming", "in memory")
RECIPE = f"""\
model: {{family: autoregressive, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 1}}
data: {{source: text.txt, validation: valid.txt, tokenizer: tokenizer, unit: blocks, length: {LENGTH}}}
training: {{max_steps: {STEPS}, per_device_train_batch_size: 8, eval_strategy: no, save_strategy: no, report_to: none,
           use_cpu: true}}
"""


def lines(source: str) -> Iterator[str]:
    """The text's lines without end, each numbered."""
    numbers = count()
    while True:
        yield from (f"{next(numbers)} {line}\n" for text in read_documents(source) for line in text.text.split("\n"))


def write_text(path: Path, source: str, megabytes: float) -> None:
    left = megabytes * 1e6
    with open(path, "wb") as file:
        for line in lines(source):
            left -= file.write(line.encode())
            if left <= 0:
                return


def work(way: str, folder: Path) -> dict[str, float]:
    """One way's work, in a process of its own."""
    given = {name: str(folder / file) for name, file in (("source", "text.txt"), ("validation", "valid.txt"))}
    data = DataRecipe(**given, tokenizer=str(folder / "tokenizer"), length=LENGTH, cache=str(folder / "store"))
    if way == "imports":
        return {}
    if way == "store":
        start = time.perf_counter()
        corpus = load_corpus(data)
        seconds = time.perf_counter() - start
        return {"sequences": len(corpus.train), "tokens_per_second": len(corpus.train) * LENGTH / seconds}
    if way == "streaming":
        for _ in load_corpus(replace(data, cache=None, streaming=True)).train:
            pass
        return {}
    overrides = [f"data.{name}={folder / file}" for name, file in
                 (("source", "text.txt"), ("validation", "valid.txt"), ("tokenizer", "tokenizer"))]  # fmt: skip
    if way == "from the store":
        overrides.append(f"data.cache={folder / 'store'}")
    with tempfile.TemporaryDirectory() as output:
        train(parse_recipe(RECIPE, "benchmark", overrides), Path(output) / "run")
    return {}


def own_memory(process: int) -> int:
    """Bytes of anonymous memory that a process holds now."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def measure(way: str, folder: Path, threads: int) -> tuple[float, dict[str, float]]:
    """The most memory of its own that a process has while it does the work, in MB; and what it reports."""
    command = [sys.executable, __file__, "--way", way, "--folder", str(folder), "--threads", str(threads)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, own_memory(process.pid))
        time.sleep(0.02)
    assert process.stdout is not None
    output = process.stdout.read()
    assert process.returncode == 0, f"{way} failed"
    return peak / 1e6, json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--text", default="builtin:python-docs")
    parser.add_argument("--megabytes", type=float, nargs="+", default=[3, 10, 30])
    parser.add_argument("--folder", type=Path, help="for text and store, by default a temporary one")
    add_json_option(parser)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.way:
        print(json.dumps(work(arguments.way, arguments.folder)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        train_tokenizer((document.text for document in read_documents(arguments.text)), VOCABULARY).save_pretrained(
            folder / "tokenizer"
        )
        write_text(folder / "valid.txt", arguments.text, 0.1)
        idle, _ = measure("imports", folder, arguments.threads)
        print(f"{arguments.threads} threads, blocks of {LENGTH} tokens, {STEPS} steps; most MB of own memory")
        print(f"with nothing but imports: {idle:.0f} MB")
        print(f"{'text, MB':>10}" + "".join(f"{way:>16}" for way in WAYS[1:]) + f"{'tokens/s':>12}{'sequences':>12}")
        peaks: dict[str, list[float]] = {way: [] for way in WAYS[1:]}
        sequences: list[float] = []
        for megabytes in arguments.megabytes:
            write_text(folder / "text.txt", arguments.text, megabytes)
            cells = ""
            for way, values in peaks.items():
                if way == "in memory" and megabytes > LARGEST_IN_MEMORY:
                    cells += f"{'–':>16}"
                    continue
                peak, report = measure(way, folder, arguments.threads)
                values.append(peak)
                cells += f"{peak:>16.0f}"
                if way == "store":
                    made = report
            sequences.append(made["sequences"])
            print(f"{megabytes:>10g}{cells}{made['tokens_per_second']:>12,.0f}{sequences[-1]:>12,.0f}", flush=True)
            for path in (folder / "store").iterdir():
                path.unlink()
        write(arguments.json, vars(arguments), [], {"most MB of own memory, by size of the text": peaks})
        for way, values in peaks.items():
            if len(values) > 1:
                grown = values[-1] - values[0]
                text = arguments.megabytes[len(values) - 1] - arguments.megabytes[0]
                each = grown * 1e6 / (sequences[len(values) - 1] - sequences[0])
                print(
                    f"{way:>14}: {grown / text:6.3f} MB more for each MB of text, {each:5.0f} bytes for each sequence"
                )


if __name__ == "__main__":
    main()
