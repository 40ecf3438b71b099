"""Generation: cached steps against the prefix computed anew for every token, in one process, with the same latents.

The opponent runs the decoder over all tokens so far without gradients and projects the last state only. Greedy; latents
are given, so that neither side infers. Asserts that both write the same tokens, up to the first of a text that rounding
decides (two best logits within 1e-4), and that prompts of unequal lengths continue in a batch as each does alone.
Prints tokens per second and ratios at batch 1 and 8, and what 5 beams cost beside greedy.

With --compiled also through a static cache with a compiled step, which CUDA has without asking and a CPU never
(transformers' rule); compiling takes about half a minute for each batch size, and is not counted.

    python benchmarks/ltm_generation.py [--threads 2] [--repeats 3] [--compiled] [--device cuda] [--json FILE]
"""

import argparse
import statistics
import time

import torch
from _report import Comparison, add_json_option, seconds, write
from torch import Tensor
from transformers import CompileConfig

from latentlm import LTM, LTMConfig

NEW_TOKENS = 128
PROMPT_TOKENS = 100
BEAMS = 5
TARGETS = {1: 4.0, 8: 15.0}  # batch size → cached / anew
TIE = 1e-4


@torch.no_grad()
def anew(model: LTM, input_ids: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Prompt and greedy continuation, and for each new token how far its logit lies above the second best."""
    margins = []
    for _ in range(NEW_TOKENS):
        logits = model(input_ids, latents=latents, use_cache=False, logits_to_keep=1).logits[:, -1]
        best, tokens = logits.topk(2)
        margins.append(best[:, 0] - best[:, 1])
        input_ids = torch.cat((input_ids, tokens[:, :1]), 1)
    return input_ids, torch.stack(margins, 1)


def cached(
    model: LTM, input_ids: Tensor, latents: Tensor, attention_mask: Tensor | None = None, beams: int = 1
) -> Tensor:
    return model.generate(
        input_ids, latents, attention_mask, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=beams
    )


def compiled(model: LTM, input_ids: Tensor, latents: Tensor) -> Tensor:
    how = CompileConfig(mode=None, fullgraph=False)
    how._compile_all_devices = True  # CPUs, too
    given = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "compile_config": how}
    return model.generate(input_ids, latents, cache_implementation="static", **given)


def assert_same(tokens: Tensor, expected: Tensor, margins: Tensor) -> int:
    """Asserts that texts agree as far as rounding decides nothing; returns the number of tokens compared."""
    decided = (margins > TIE).cumprod(1).bool()
    assert tokens.shape == expected.shape
    assert torch.equal(tokens[:, -NEW_TOKENS:][decided], expected[:, -NEW_TOKENS:][decided])
    return int(decided.sum())


def assert_unequal_lengths(model: LTM, prompts: Tensor, latents: Tensor) -> int:
    """The same for a batch of prompts of unequal lengths against each alone; returns the number of tokens compared."""
    lengths = [PROMPT_TOKENS + 1 - 9 * row for row in range(len(prompts))]
    attention_mask = torch.stack(
        [torch.arange(prompts.shape[1], device=prompts.device) < length for length in lengths]
    ).long()
    tokens = cached(model, prompts * attention_mask, latents, attention_mask)
    compared = 0
    for row, length in enumerate(lengths):
        alone, margins = anew(model, prompts[row : row + 1, :length], latents[row : row + 1])
        compared += assert_same(tokens[row : row + 1, -NEW_TOKENS:], alone[:, -NEW_TOKENS:], margins)
    return compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="the prefix anew once, and no prompts of unequal lengths")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_json_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = LTMConfig(
        vocab_size=8192, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, max_position_embeddings=512,
        sliding_window=64, latents_per_layer=8, initializer_range=0.1, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = LTM(config).to(arguments.device).eval()
    prompts = torch.randint(1, config.vocab_size, (max(TARGETS), PROMPT_TOKENS + 1), device=arguments.device)
    prompts[:, 0] = config.bos_token_id
    latents = torch.randn(max(TARGETS), *model.latent_shape, device=arguments.device)
    comparisons, measured = [], {}
    print(
        f"{NEW_TOKENS} new tokens after {PROMPT_TOKENS}, window {config.sliding_window}, "
        f"{arguments.threads} threads, {arguments.repeats} repeats"
    )
    for batch, target in TARGETS.items():
        rows = model, prompts[:batch], latents[:batch]
        begun = time.perf_counter()
        expected, margins = anew(*rows)  # these also warm up
        first = time.perf_counter() - begun
        compared = assert_same(cached(*rows), expected, margins)
        ways = {
            **({} if arguments.small else {"anew": lambda rows=rows: anew(*rows)}),
            "cached": lambda rows=rows: cached(*rows),
            f"{BEAMS} beams": lambda rows=rows: cached(*rows, beams=BEAMS),
        }
        if arguments.compiled:
            compared += assert_same(compiled(*rows), expected, margins)
            compiled(*rows)
            ways["compiled"] = lambda rows=rows: compiled(*rows)
        times = [[seconds(work) for work in ways.values()] for _ in range(arguments.repeats)]
        median = {"anew": first, **dict(zip(ways, map(statistics.median, zip(*times, strict=True)), strict=True))}
        for name, value in median.items():
            print(f"batch {batch}, {name:>7}: {batch * NEW_TOKENS / value:7.0f} tokens/s")
        rates = [batch * NEW_TOKENS / median[name] for name in ("cached", "anew")]
        what = f"generation, batch {batch}, {NEW_TOKENS} tokens"
        comparisons.append(Comparison.of_rates(what, *rates, "tokens/s", "the prefix anew", target))
        print(f"{comparisons[-1].line}; {compared} tokens agree")
        if arguments.compiled:
            rates[0] = batch * NEW_TOKENS / median["compiled"]
            what = f"generation, batch {batch}, {NEW_TOKENS} tokens, static cache, compiled"
            comparisons.append(Comparison.of_rates(what, *rates, "tokens/s", "the prefix anew", target))
            print(comparisons[-1].line)
        measured[f"time of {BEAMS} beams / greedy, batch {batch}"] = median[f"{BEAMS} beams"] / median["cached"]
        print(f"batch {batch}, time of {BEAMS} beams / greedy: {median[f'{BEAMS} beams'] / median['cached']:.2f}")
    if not arguments.small:
        compared = assert_unequal_lengths(model, prompts, latents)
        print(f"prompts of unequal lengths in a batch and alone: {compared} tokens agree")
    write(arguments.json, vars(arguments), comparisons, measured)


if __name__ == "__main__":
    main()
