"""Seconds of training until an LTM reaches a given honest NLL of text that it was not trained on, three ways.

(a) Algorithm 1 done plainly, T = 16 (ltm_training.py says what plainly is)
(b) ours, the same algorithm: the same noise, so the same models to rounding
(c) ours, cooperative: an encoder gives the q at which --steps fast steps begin

One decoder, one set of weights to start from (the encoder's beside), the same texts in the same order, the same AdamW.
Both kinds of inference have the rates of docs/results.md (0.5, falling to a fifth, ε 0.3), under which the bound is
lower than under the paper's. Every --every steps training stands still, and the ELBO of --sequences blocks of the
validation text is taken with fresh noise, by the model's own inference; that time counts for nobody. The figure is
Σ nats / Σ tokens, a bound. A way ends when it is at --nll, or after --most steps; what it did not reach is said.

    python benchmarks/time_to_quality.py --train …/wikitext-2/train.txt.xz --valid …/wikitext-2/valid.txt
        [--nll 5.25] [--steps 2] [--threads 2] [--json FILE]
"""

import argparse
import sys
import time

import torch
from _report import Comparison, add_json_option, write
from ltm_training import our_loss, plain_loss, training_step

from latentlm import LTM, InputError, LTMConfig
from latentlm.data import read_documents, train_tokenizer
from latentlm.data.datasets import Blocks
from latentlm.evaluation.likelihood import score
from latentlm.latent_lm import number_of_parameters

VOCABULARY, LENGTH, BATCH, LEAD = 2048, 128, 16, 20
TARGETS = {"b": 1.6, "c": 4.0}
WAYS = {
    "a": "Algorithm 1 done plainly, T = 16",
    "b": "ours, the same algorithm",
    "c": "ours, cooperative",
}


def model(way: str, steps: int) -> LTM:
    torch.manual_seed(0)  # the decoder's weights are made before an encoder's
    inference = {"inference": "cooperative", "inference_steps": steps} if way == "c" else {"inference_steps": 16}
    return LTM(
        LTMConfig(
            vocab_size=VOCABULARY, hidden_size=96, num_hidden_layers=2, num_attention_heads=4, sliding_window=4,
            max_position_embeddings=LENGTH, initializer_range=0.08, latents_per_layer=2, latent_size=8,
            encoder_layers=1, bos_token_id=0, eos_token_id=0, pad_token_id=0, **inference,
        )
    ).train()  # fmt: skip


@torch.no_grad()
def nll_per_token(model: LTM, texts: torch.Tensor) -> float:
    """−ELBO in nats per token, by the model's own inference and noise that it did not use."""
    model.eval()
    nats = sum(float(score(model, part, samples=1, seed=1)["elbo"].sum()) for part in texts.split(32))
    model.train()
    return nats / texts[:, 1:].numel()


def train(way: str, texts: torch.Tensor, valid: torch.Tensor, given: argparse.Namespace) -> dict[str, list[float]]:
    """After how many seconds and steps which NLL; the last one at --nll, where that was reached."""
    one = model(way, given.steps)
    loss = plain_loss if way == "a" else our_loss
    optimizer = torch.optim.AdamW(one.parameters(), lr=given.rate, betas=(0.9, 0.95), weight_decay=0.01)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / LEAD, total_iters=LEAD)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    spent, curve = 0.0, {"seconds": [], "steps": [], "nll": []}
    for step in range(1, given.most + 1):
        rows = torch.arange((step - 1) * BATCH, step * BATCH) % len(texts)
        batch = texts[order[rows]]
        begun = time.perf_counter()
        training_step(loss, one, optimizer, batch, step)
        warm_up.step()
        spent += time.perf_counter() - begun
        if step % given.every == 0:
            nll = nll_per_token(one, valid)
            for name, value in (("seconds", spent), ("steps", step), ("nll", nll)):
                curve[name].append(value)
            print(f"({way}) {step:4d} steps, {spent:6.1f} s: {nll:.4f} nats/token", flush=True)
            if nll <= given.nll:
                break
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, metavar="TEXT")
    parser.add_argument("--valid", required=True, metavar="TEXT")
    parser.add_argument("--nll", type=float, default=5.25, help="nats per token to be reached")
    parser.add_argument("--steps", type=int, default=2, help="of (c)")
    parser.add_argument("--rate", type=float, default=4e-3, help="of AdamW, for all")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--most", type=int, default=600)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--ways", nargs="+", choices=sorted(WAYS), default=sorted(WAYS))
    parser.add_argument("--threads", type=int, default=2)
    add_json_option(parser)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    try:
        documents, held_out = list(read_documents(given.train)), list(read_documents(given.valid))
    except InputError as error:
        sys.exit(str(error))
    tokenizer = train_tokenizer((one.text for one in documents), VOCABULARY)
    texts, valid = (
        torch.stack([block["input_ids"] for block in Blocks(of, tokenizer, LENGTH, drop_last=True)])
        for of in (documents, held_out)
    )
    valid = valid[: given.sequences]
    print(f"{len(texts)} blocks of {LENGTH} tokens to train on, {len(valid)} to measure, {given.threads} threads")
    for way in given.ways:
        print(f"({way}) {WAYS[way]}: {number_of_parameters(model(way, given.steps)):,} parameters")
    curves = {way: train(way, texts, valid, given) for way in given.ways}
    reached = {way: curve["seconds"][-1] for way, curve in curves.items() if curve["nll"][-1] <= given.nll}
    for way in curves.keys() - reached.keys():
        print(f"({way}) did not reach {given.nll} in {given.most} steps: {min(curves[way]['nll']):.4f} at best")
    comparisons = [
        Comparison.of_costs(
            f"training to {given.nll:g} nats/token: {WAYS[way]}", reached[way], reached["a"], "s", WAYS["a"], target
        )
        for way, target in TARGETS.items()
        if way in reached and "a" in reached
    ]
    for one in comparisons:
        print(one.line)
    write(given.json, vars(given), comparisons, {f"({way})": curve for way, curve in curves.items()})


if __name__ == "__main__":
    main()
