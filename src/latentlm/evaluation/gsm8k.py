"""Arithmetic reasoning: grade-school problems in words (GSM8K, Cobbe et al. 2021, arXiv 2110.14168), as in Kong et al.
2025 (figure 6 and appendix A.3).

A model goes on after "Question: …\\nAnswer:", several times; the problem is passed if any of the texts has the right
number. As in Kong et al. z is inferred anew for each trial. They do not say how prompts and answers are written, how a
number is found in a text, or where a text ends. Their control, as ours, is a beam search.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from latentlm.data import read_columns, text_batch
from latentlm.errors import InputError
from latentlm.evaluation.batches import evaluating
from latentlm.evaluation.samples import end_tokens, until_end
from latentlm.generation import WritesText
from latentlm.latent_lm import LatentLM
from latentlm.text import longest_text, on_device, token_counts

#: width of the control's search, unless there are more trials (Kong et al. 2025, appendix A.3)
BEAMS = 5
_QUESTION, _ANSWER = "Question: ", "\nAnswer:"
# the next problem of a prompt of examples: what a model that has answered may go on with
_STOP = "\nQuestion:"
_CALCULATION = re.compile(r"<<[^<>]*>>")
# a minus after a digit, a letter or a bracket subtracts or joins; only commas between thousands belong to a number
_SIGN = r"(?:(?<![\w)\].])[-−])?(?:\$ ?[-−]?)?"
_SIZE = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
_NUMBER = _SIGN + _SIZE
_ANY_NUMBER = re.compile(_NUMBER)
_FINAL_NUMBER = re.compile(rf"####[ \t]*({_NUMBER})")


@dataclass(frozen=True)
class Problem:
    """A question, its worked answer as the file has it (with `<<calculations>>` and `#### number`), and the number."""

    question: str
    answer: str
    number: Decimal

    @property
    def prompt(self) -> str:
        return f"{_QUESTION}{self.question}{_ANSWER}"

    @property
    def example(self) -> str:
        """The prompt and its answer, without the `<<calculations>>`: they were made for a calculator."""
        return f"{self.prompt} {_CALCULATION.sub('', self.answer)}"


def read_problems(source: str | Path, limit: int | None = None) -> list[Problem]:
    """The problems of a `.jsonl` file (or `.xz` of one) with the columns "question" and "answer".

    Raises:
        InputError: none, or one whose answer does not end in `#### number`.
    """
    problems = []
    for where, (question, answer) in read_columns(source, ("question", "answer"), limit=limit):
        number = strict_number(answer)
        if number is None:
            raise InputError(f"{where}: its answer has no number after ####: add it, or take the problem out.")
        problems.append(Problem(question.strip(), answer.strip(), number))
    if not problems:
        raise InputError(f"{source} holds no problem: give a file with at least one.")
    return problems


def strict_number(text: str) -> Decimal | None:
    """The number that stands directly after the first ####; commas and $ do not count. None if there is none."""
    found = _FINAL_NUMBER.search(text)
    return None if found is None else _decimal(found[1])


def flexible_number(text: str) -> Decimal | None:
    """`strict_number`, or without one the last number of the text."""
    strict = strict_number(text)
    numbers = [] if strict is not None else _ANY_NUMBER.findall(text)
    return _decimal(numbers[-1]) if numbers else strict


def _decimal(number: str) -> Decimal:
    return Decimal(re.sub(r"[,$ ]", "", number).replace("−", "-"))


def pass_at_k(trials: int, right: int, k: int) -> float:
    """Probability that k of the trials, drawn without replacement, have a right one: 1 − C(n − c, k) ÷ C(n, k).

    Chen et al. 2021 (arXiv 2107.03374), eq. 1: of independent trials, the unbiased estimate of pass@k.
    """
    if not 0 <= right <= trials or not 1 <= k <= trials:
        raise ValueError(f"{right} of {trials} trials are right and {k} are drawn: there are no such numbers")
    return 1 - math.comb(trials - right, k) / math.comb(trials, k)


@torch.no_grad()
def gsm8k(
    model: LatentLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    examples: Sequence[Problem] = (),
    shots: int = 0,
    trials: int = 5,
    max_new_tokens: int = 50,
    beams: int | None = None,
    temperature: float | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Solves each problem `trials` times and counts.

    A trial ends at EOS, where the next "Question:" begins a line, or after `max_new_tokens`. One of a latent model
    infers q(z | prompt) once, with noise of its own, and draws its z from that. All chance is a function of the seed
    and the question.

    Args:
        examples: solved problems, `shots` of which, drawn for each question (never the question itself), stand before
            it, separated by blank lines. Where they and the new tokens exceed the model's context, as many of the first
            are left out as need be.
        beams: width of a beam search, whose `trials` best texts are taken; 1 samples. None is a search of at least
            `BEAMS` for an exact model where no temperature is given, and otherwise 1.
        temperature: of sampling, from all tokens; None is 1.
        on_progress: called with (problems done, problems in all).

    Returns:
        Figures, and for each problem what was written. Of figures: `strict_pass_at_k` (the number after ####) and
        `flexible_pass_at_k` (without that, the last number) for k = 1 … trials, means over problems of `pass_at_k`; of
        a beam search whether the k best texts have a right one. `…_standard_error` over problems. Beside each
        `…_chance_at_k`: the same texts against the answers of all other problems, what a number that has nothing to do
        with the question would pass; None of one problem alone. `strict_answered` and `flexible_answered`: share of the
        trials with a number. `too_long`: problems that leave no room for the new tokens, which count as not answered.

    Raises:
        InputError: a model that writes no text or needs labels, too few examples, or settings that do not fit.
    """
    if not isinstance(model, WritesText):
        raise InputError(f"a {type(model).__name__} does not write text, so it solves no problems.")
    if model.annotation_labels is not None:
        raise InputError("the model needs labels for each text, and problems have none: give one without a condition.")
    if trials < 1 or max_new_tokens < 1 or shots < 0 or not problems:
        raise InputError("there must be at least 1 problem, 1 trial and 1 new token, and no negative number of shots.")
    if len({example.question for example in examples}) < shots + (shots > 0):
        raise InputError(f"{shots} shots need at least {shots + 1} different examples, and there are {len(examples)}.")
    if beams is None:
        beams = max(BEAMS, trials) if model.exact and temperature is None else 1
    if beams > 1 and not model.exact:
        raise InputError("beams share one z, and each trial of a latent model has its own: leave the beams out.")
    if beams > 1 and temperature is not None:
        raise InputError("a beam search has no temperature: leave it out, or take 1 beam to sample.")
    if 1 < beams < trials:
        raise InputError(f"{beams} beams give at most {beams} trials, not {trials}.")
    if temperature is not None and not 0 < temperature < math.inf:
        raise InputError(f"temperature must be a number above 0, not {temperature}.")
    decoding: dict[str, Any] = (
        {"num_beams": beams, "do_sample": False}
        if beams > 1
        else {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": temperature or 1.0}
    )
    room = longest_text(model) - max_new_tokens
    if room < 1:
        raise InputError(
            f"{max_new_tokens} new tokens leave no room for a question in the model's context of "
            f"{longest_text(model)}: ask for fewer."
        )
    ends = [*end_tokens(model.config), tokenizer.eos_token_id]
    records: list[dict[str, Any]] = []
    with evaluating(model):
        for problem in problems:
            # of the question, so that neither the others nor their order change what is written
            chance = random.Random(f"{seed} {problem.question}")
            seen = [example for example in examples if example.question != problem.question]
            prompt, used = _fitting(tokenizer, problem, chance.sample(seen, shots), room)
            texts: list[str] = []
            if prompt is not None:
                batch = on_device(text_batch(tokenizer, [prompt], end=False), model.device)
                # of a latent model each trial infers for itself: the noise of inference is a part of its chance
                for together in [trials] if model.exact else [1] * trials:
                    rows = model.generate(
                        **batch,
                        max_new_tokens=max_new_tokens,
                        num_return_sequences=together,
                        seed=chance.getrandbits(62),
                        **decoding,
                    )
                    new = rows[:, batch["input_ids"].shape[1] :].tolist()
                    texts += [str(tokenizer.decode(until_end(row, ends))).split(_STOP)[0] for row in new]
            records.append({"question": problem.question, "shots": used, "too_long": prompt is None, "texts": texts})
            if on_progress is not None:
                on_progress(len(records), len(problems))
    figures: dict[str, Any] = {
        "problems": len(problems),
        "trials": trials,
        "max_new_tokens": max_new_tokens,
        "beams": beams,
        "temperature": None if beams > 1 else temperature or 1.0,
        "shots": shots,
        "mean_shots_used": math.fsum(record["shots"] for record in records) / len(records),
        "too_long": sum(record["too_long"] for record in records),
    }
    numbers = [problem.number for problem in problems]
    for name, number_of in (("strict", strict_number), ("flexible", flexible_number)):
        answers = [[number_of(text) for text in record["texts"]] for record in records]
        figures |= {
            f"{name}_{key}": value for key, value in _passed(answers, numbers, trials, in_order=beams > 1).items()
        }
        for record, given in zip(records, answers, strict=True):
            record[name] = [None if number is None else str(number) for number in given]
    for record, number in zip(records, numbers, strict=True):
        record["number"] = str(number)
    return figures, records


def _fitting(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, shown: Sequence[Problem], room: int
) -> tuple[str | None, int]:
    """The prompt with as many of the last examples as its tokens leave room for, and their number; None for no room."""
    for first in range(len(shown) + 1):
        prompt = "\n\n".join([*(example.example for example in shown[first:]), problem.prompt])
        if token_counts(tokenizer, [prompt])[0] <= room:
            return prompt, len(shown) - first
    return None, 0


def _passed(
    answers: Sequence[Sequence[Decimal | None]], numbers: Sequence[Decimal], trials: int, in_order: bool
) -> dict[str, float | None]:
    """The figures of one way to read a number; `answers` of a problem are those of its trials, or none at all.

    Args:
        in_order: pass@k is of the first k answers, not of any k.
    """
    figures: dict[str, float | None] = {
        "answered": sum(answer is not None for given in answers for answer in given) / (trials * len(answers))
    }
    occurrences = Counter(numbers)
    for k in range(1, trials + 1):
        passed, chance = [], []
        for given, number in zip(answers, numbers, strict=True):
            different = {number, *(one for one in given if one is not None)}
            of = {one: _pass(given, one, trials, k, in_order) for one in different}
            passed.append(of[number])
            chance.append(math.fsum((occurrences[one] - (one == number)) * value for one, value in of.items()))
        mean, number_of = math.fsum(passed) / len(passed), len(passed)
        variance = math.fsum((value - mean) ** 2 for value in passed) / max(number_of - 1, 1)
        figures[f"pass_at_{k}"] = mean
        figures[f"pass_at_{k}_standard_error"] = math.sqrt(variance / number_of) if number_of > 1 else None
        figures[f"chance_at_{k}"] = math.fsum(chance) / (number_of * (number_of - 1)) if number_of > 1 else None
    return figures


def _pass(given: Sequence[Decimal | None], number: Decimal, trials: int, k: int, in_order: bool) -> float:
    if in_order:
        return float(number in given[:k])
    return pass_at_k(trials, sum(one == number for one in given), k)


def pass_table(name: str, figures: Mapping[str, Any]) -> Table:
    """pass@k in per cent, beside what chance would pass; below it how many texts have a number at all."""
    how = f"{figures['beams']} beams" if figures["beams"] > 1 else f"sampling at {figures['temperature']:g}"
    answered = f"{100 * figures['strict_answered']:.1f}% of the texts have a #### number"
    answered += f", {100 * figures['flexible_answered']:.1f}% any number"
    if figures["shots"]:
        answered += f"; there was room for {figures['mean_shots_used']:.2f} shots"
    title = f"{name}: {figures['problems']:,} problems, {how}, {figures['shots']} shots"
    table = Table(title=title, caption=answered)
    for column in ("pass@k, %", "#### number", "± s.e.", "by chance", "any number", "± s.e.", "by chance"):
        table.add_column(column, justify="right")
    for k in range(1, figures["trials"] + 1):
        keys = (f"pass_at_{k}", f"pass_at_{k}_standard_error", f"chance_at_{k}")
        values = [figures[f"{way}_{key}"] for way in ("strict", "flexible") for key in keys]
        table.add_row(str(k), *("" if value is None else f"{100 * value:.2f}" for value in values))
    return table
