"""NLL of unigrams and bigrams on the validation data of a saved model: what a model of text has to beat.

    python studies/ngrams.py runs/gp-vae [--limit 150]

Unigrams with one added to each count; bigrams by interpolated Kneser-Ney with a discount of 0.75 (Chen and Goodman
1999, section 2.7), by the training data of the model's recipe, or its first tokens alone. Both are exact likelihoods of
the scored tokens, given BOS, in nats per token.
"""

import argparse
from collections.abc import Iterable

import torch
from torch import Tensor

import latentlm
from latentlm.data import read_documents
from latentlm.data.recipe import evaluation_sequences, make_sequences, saved_data_recipe

DISCOUNT = 0.75


def pairs(sequences: Iterable[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Each token and the one before it."""
    rows = [item["input_ids"] for item in sequences]
    return torch.cat([row[:-1] for row in rows]), torch.cat([row[1:] for row in rows])


def unigram_nll(tokens: Tensor, scored: Tensor, vocabulary: int) -> float:
    counts = torch.bincount(tokens, minlength=vocabulary).double() + 1
    return float(-(counts / counts.sum()).log()[scored].mean())


def bigram_nll(before: Tensor, tokens: Tensor, given: Tensor, scored: Tensor, vocabulary: int) -> float:
    counts = torch.zeros(vocabulary, vocabulary, dtype=torch.double)
    counts.index_put_((before, tokens), torch.ones(len(tokens), dtype=torch.double), accumulate=True)
    seen = counts.sum(1, keepdim=True)
    # how many different tokens each one has followed, with one added, so that an unseen one is possible
    novel = (counts > 0).sum(0).double() + 1
    lower = novel / novel.sum()
    left = DISCOUNT * (counts > 0).sum(1, keepdim=True) / seen.clamp_min(1)
    probabilities = (counts - DISCOUNT).clamp_min(0) / seen.clamp_min(1) + torch.where(seen > 0, left, 1.0) * lower
    assert torch.allclose(probabilities.sum(1), torch.ones((), dtype=torch.double))
    return float(-probabilities[given, scored].log().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--limit", type=int, help="documents of the validation data; by default all")
    parser.add_argument("--tokens", type=int, help="of the training data, from its beginning; by default all")
    options = parser.parse_args()
    model, tokenizer = latentlm.load(options.model)
    data = saved_data_recipe(options.model)
    assert data is not None
    vocabulary = len(tokenizer)
    documents = read_documents(data.source, column=data.column, sample_by=data.sample_by, limit=data.limit)
    before, tokens = pairs(make_sequences(documents, tokenizer, data.unit, data.length, drop_last=True))
    before, tokens = before[: options.tokens], tokens[: options.tokens]
    longest = model.config.max_position_embeddings
    given, scored = pairs(evaluation_sequences(options.model, tokenizer, longest, limit=options.limit))
    print(f"{len(tokens):,} tokens of training, {len(scored):,} scored, vocabulary {vocabulary:,}; nats per token")
    print(f"uniform {torch.tensor(float(vocabulary)).log():.4f}")
    print(f"unigram {unigram_nll(tokens, scored, vocabulary):.4f}")
    print(f"bigram  {bigram_nll(before, tokens, given, scored, vocabulary):.4f}")


if __name__ == "__main__":
    main()
