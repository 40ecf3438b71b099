"""The lm-evaluation-harness (Gao et al. 2021, package lm-eval) on any model of this library, as its type "latentlm".

What the harness calls a log-likelihood is exact of a model without latents, and otherwise an estimate that never
overstates in expectation:

    loglikelihood          log p̂(continuation | context) = log (1/K) Σ_k p(continuation | z_k, context),
                           z_k ~ q(z | context), or ~ p(z) where the context is empty
    loglikelihood_rolling  the importance-weighted bound of K samples (with K = 1 the ELBO), summed over blocks of the
                           model's context, each after BOS: no block knows of the one before

A difference of two such bounds, by which multiple choice is decided, is no bound of anything. The harness itself scores
long texts with a context that rolls along; blocks are what every other figure of this library is of.

The harness finds a model type only once its module is imported: `latentlm evaluate harness` does that, and for the
harness' own command `python -c "import latentlm.evaluation.harness, lm_eval.__main__ as command;
command.cli_evaluate()" run --model latentlm --model_args pretrained=MODEL --tasks TASK`.
"""

import json
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval import evaluator, simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from latentlm.data.tokenizers import bos_and_eos
from latentlm.errors import InputError, one_sentence
from latentlm.evaluation.batches import Batch, evaluating, in_batches
from latentlm.evaluation.continuation import latents_of_prompts
from latentlm.evaluation.likelihood import score
from latentlm.evaluation.samples import end_tokens, until_end
from latentlm.generation import WritesText
from latentlm.latent_lm import LatentLM
from latentlm.loading import load
from latentlm.text import longest_text

_EXACT = "log-likelihoods are exact"
_BOUNDS = (
    "loglikelihood is the log of the mean of p(continuation | z, context) over {samples} draws of q(z | context), and "
    "loglikelihood_rolling {rolling} of blocks of {longest} tokens: both understate in expectation, and a difference "
    "of two of them, which decides multiple choice, is no bound"
)
_SAMPLING = {"do_sample", "temperature", "top_k", "top_p", "num_beams"}
# as many as the harness takes at once, in this process: the errors of its errors are beyond its digits
_BOOTSTRAPS = 1000


@register_model("latentlm")
class HarnessLM(TemplateLM):
    """A model of this library as the harness asks it.

    Texts longer than the model's context lose the front of what stands before the continuation (`cut` counts them).
    BOS is given and never scored. All noise is a function of the seed and the text.

    Args:
        pretrained: a folder or hub name of a saved model, or the model itself, with its `tokenizer`.
        iw_samples: K; 1 of an exact model, whatever is given.
        batch_size: texts that are scored at a time; changes no figure.
        device: where a model that is loaded goes.
        max_batch_size: the harness gives it; there is no automatic batch size.
        inference: fields of the config that say how q is found, as inference_steps=64.

    Raises:
        InputError: no such model or setting, or a model that needs labels.
    """

    def __init__(
        self,
        pretrained: str | LatentLM,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        iw_samples: int = 16,
        batch_size: int | str = 8,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        **inference: Any,
    ):
        super().__init__()
        if isinstance(pretrained, LatentLM):
            if tokenizer is None:
                raise InputError("a model that is given itself needs its tokenizer: give both.")
            model = pretrained
        else:
            model, tokenizer = load(pretrained)
            if not torch.cuda.is_available() and str(device).startswith("cuda"):
                device = None  # the harness' command asks for a GPU where nothing is asked for
            model.to(device or "cpu")
        if model.annotation_labels is not None:
            raise InputError("the model needs labels for each text, and tasks have none: give one without a condition.")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"batch_size must be a number of texts, at least 1, not {batch_size}.")
        if iw_samples < 1:
            raise InputError("iw_samples must be at least 1.")
        if inference:
            model.change_inference(**inference)
        self.model, self.tokenizer = model, tokenizer
        self.samples = 1 if model.exact else iw_samples
        self.batch_size, self.seed, self.on_progress = int(batch_size), seed, on_progress
        self.bos, self.eos = bos_and_eos(tokenizer)
        self.cut = 0

    # ---- what the harness asks of a model ----------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.eos

    @property
    def prefix_token_id(self) -> int:
        return self.bos

    @property
    def max_length(self) -> int:
        return longest_text(self.model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Without special tokens, whatever is asked: BOS is put before a text where it is scored."""
        return self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]

    def note(self) -> str:
        """What the log-likelihoods are."""
        if self.model.exact:
            return _EXACT
        rolling = "the ELBO" if self.samples == 1 else f"the importance-weighted bound of {self.samples} samples"
        return _BOUNDS.format(samples=self.samples, rolling=rolling, longest=self.max_length)

    def get_model_info(self) -> dict[str, Any]:
        """For the config in the harness' results."""
        samples = {"iw_samples": self.samples, "exact": self.model.exact}
        return {"family": type(self.model).__name__, "log_likelihoods": self.note(), **samples, "seed": self.seed}

    # ---- log-likelihoods ---------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """log p(continuation | context) in nats of each pair, and whether it is what a greedy choice would write.

        That choice is of the mixture's next token: argmax_v Σ_k p(x_<t | z_k) p(v | z_k, x_<t).

        Tokens are those of the two texts together, split where the context's own tokens end, with white space at the
        end of the context moved to the continuation, as the harness does it.
        """
        pairs = []
        for context, continuation in (request.args for request in requests):
            # of an empty context the harness' own way would take a first BOS of the continuation for the context
            parts = self._encode_pair(context, continuation) if context else ([], self.tok_encode(continuation))
            pairs.append(((context, continuation), *parts))
        return self._loglikelihood_tokens(pairs)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows, prompt_tokens = [], []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise InputError(
                    f"a continuation of {len(continuation)} tokens exceeds the model's context of {self.max_length}: "
                    "take another task, or a model of a longer context."
                )
            kept = self._cut(context, self.max_length - len(continuation))
            rows.append([*kept, *continuation])
            prompt_tokens.append(len(kept))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)  # of nothing
        asked = [place for place, row in enumerate(rows) if len(row) > prompt_tokens[place]]
        with evaluating(self.model):
            for has_context in (True, False):
                places = [place for place in asked if bool(prompt_tokens[place]) == has_context]
                for indices, input_ids, attention_mask, _ in self._batches([rows[place] for place in places]):
                    chosen = [places[index] for index in indices]
                    begins = torch.tensor([prompt_tokens[place] for place in chosen], device=input_ids.device)
                    scores = self._continuations(input_ids, attention_mask, begins)
                    for place, value, greedy in zip(chosen, *(part.tolist() for part in scores), strict=True):
                        found[place] = (value, greedy)
        return found

    def _continuations(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, begins: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log p̂ of what follows the first tokens of each text, and whether all of it is the mixture's likeliest."""
        longest = input_ids.shape[1] - 1
        latents = latents_of_prompts(
            self.model,
            input_ids,
            attention_mask,
            prompt_tokens=begins,
            end=longest,
            samples=self.samples,
            seed=self.seed,
        )
        lengths = attention_mask.sum(1) - 1
        places = begins[:, None] + torch.arange(int((lengths - begins).max()), device=begins.device)
        there = places < lengths[:, None]
        places = places.clamp_max(longest - 1)
        targets = input_ids[:, 1:].gather(1, places)
        mixture, sums = torch.tensor(-math.inf, device=begins.device), []
        for z in latents:
            logits = self.model.decode(z, input_ids, attention_mask)
            kept = logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1]))
            log_p = kept.double().log_softmax(-1)
            of_tokens = log_p.gather(-1, targets[..., None])[..., 0].masked_fill(~there, 0.0)
            until = of_tokens.cumsum(1)
            mixture = torch.logaddexp(mixture, (until - of_tokens)[..., None] + log_p)
            sums.append(until[:, -1])
        greedy = ((mixture.argmax(-1) == targets) | ~there).all(1)
        return torch.stack(sums).logsumexp(0) - math.log(self.samples), greedy

    @torch.no_grad()
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p(text) in nats, or the bound on it, of each text without an end: the sum over its blocks."""
        blocks, of_request = [], []
        for place, (text,) in enumerate(request.args for request in requests):
            ids = self.tok_encode(text)
            for begin in range(0, len(ids), self.max_length):
                blocks.append(ids[begin : begin + self.max_length])
                of_request.append(place)
        values = [0.0] * len(blocks)
        bound = "elbo" if self.samples == 1 else "iw"
        with evaluating(self.model):
            for indices, input_ids, attention_mask, _ in self._batches(blocks):
                nll = score(self.model, input_ids, attention_mask, samples=self.samples, seed=self.seed)[bound]
                for index, value in zip(indices, nll.tolist(), strict=True):
                    values[index] = -value
        of_texts: list[list[float]] = [[] for _ in requests]
        for place, value in zip(of_request, values, strict=True):
            of_texts[place].append(value)
        return [math.fsum(of_text) for of_text in of_texts]

    def _cut(self, ids: Sequence[int], room: int) -> list[int]:
        self.cut += len(ids) > room
        return list(ids[max(len(ids) - room, 0) :])

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterable[Batch]:
        if not rows:
            return []
        return in_batches(self.model, _Texts(self.bos, rows), self.batch_size, self.on_progress)

    # ---- text --------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the first of its `until` strings or EOS.

        Greedy unless the task samples; z is one draw of q(z | context) either way. The new tokens take at most half of
        the model's context, and a context that is longer than the rest loses its front.

        Raises:
            InputError: a model that writes no text, or a setting of generation that is not for it.
        """
        if not isinstance(self.model, WritesText):
            raise InputError(f"a {type(self.model).__name__} does not write text: take tasks of log-likelihoods.")
        written: list[str] = []
        # the same question asked again is to have another answer, where answers are drawn
        before: Counter[tuple[str, str]] = Counter()
        with evaluating(self.model):
            for done, (context, settings) in enumerate((request.args for request in requests), start=1):
                asked = (context, json.dumps(settings, sort_keys=True))
                written.append(self._written(self.model, context, dict(settings), before[asked]))
                before[asked] += 1
                if self.on_progress is not None:
                    self.on_progress(done, len(requests))
        return written

    def _written(self, model: WritesText, context: str, settings: dict[str, Any], times: int) -> str:
        settings = dict(normalize_gen_kwargs(settings))
        until, new_tokens = settings.pop("until"), settings.pop("max_gen_toks")
        if unknown := settings.keys() - _SAMPLING:
            raise InputError(f"the task's generation_kwargs have {min(unknown)}, which latentlm does not take.")
        if not settings["do_sample"]:
            settings.pop("temperature", None)
            settings.pop("top_p", None)
            settings.pop("top_k", None)
        else:
            settings.setdefault("top_k", 0)
        new_tokens = min(new_tokens, max(self.max_length // 2, 1))
        prompt = [self.bos, *self._cut(self.tok_encode(context), self.max_length - new_tokens)]
        chance = random.Random(f"{self.seed} {times} {context}")
        rows = model.generate(
            torch.tensor([prompt], device=self.device),
            max_new_tokens=new_tokens,
            seed=chance.getrandbits(62),
            **settings,
        )
        new = until_end(rows[0, len(prompt) :].tolist(), [*end_tokens(model.config), self.eos])
        return postprocess_generated_text(str(self.tokenizer.decode(new)), until, None)


class _Texts(Dataset):
    def __init__(self, bos: int, rows: Sequence[Sequence[int]]):
        self.bos, self.rows = bos, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": torch.tensor([self.bos, *self.rows[index]]), "num_bytes": 0, "index": index}


class _Tasks(TaskManager):
    """The harness' tasks, and in one sentence why one cannot be loaded."""

    def __init__(self, include_path: Path | None = None, **kwargs: Any):
        super().__init__(include_path=include_path, **kwargs)
        self.own = include_path

    def load(self, task_list: Any) -> Any:
        for name in task_list:
            if not self.match_tasks([name]):
                _check_yaml(self.own)
                raise InputError(f"there is no task {name}: lm-eval ls tasks lists those of the harness.")
        try:
            return super().load(task_list)
        except Exception as error:  # YAML, data sets and their servers each raise their own kinds
            reason = one_sentence(error).rstrip(".")
            raise InputError(
                f"{', '.join(task_list)} cannot be loaded ({reason}): check the task's YAML and data."
            ) from error


def _check_yaml(folder: Path | None) -> None:
    """Raises InputError for a file of tasks that is no YAML: the harness passes over it."""
    for file in sorted(folder.rglob("*.yaml")) if folder is not None else ():
        try:
            list(yaml.parse(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"{file} is no YAML: {one_sentence(error)}") from error


@contextmanager
def _no_git() -> Iterator[None]:
    """Without git's complaint where the command does not run in a repository, whose commit nothing here reports."""
    asked = getattr(evaluator, "get_git_commit_hash", None)
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asked


def harness(lm: HarnessLM, tasks: Sequence[str], *, include_path: Path | None = None, limit: int | None = None) -> Any:
    """The results of tasks, as `lm_eval.simple_evaluate` gives them, without what it says of the machine.

    It sets the seeds of Python's, numpy's and torch's global generators.

    Args:
        include_path: a folder with tasks of one's own (YAML).
        limit: examples of each task.

    Raises:
        InputError: no such task, or one that cannot be loaded.
    """
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # as many processes as cores, for so few bootstraps
    names = [name.strip() for name in tasks if name.strip()]
    if not names:
        raise InputError("there is no task: name at least one.")
    if include_path is not None and not include_path.is_dir():
        raise InputError(f"{include_path} is no folder: give one with tasks (YAML).")
    own = None if include_path is None else _Tasks(include_path=include_path, include_defaults=False)
    # to look through the harness' own tasks takes seconds
    needed = own if own is not None and all(map(own.match_tasks, [[name] for name in names])) else None
    small_seed = lm.seed % 2**32  # of numpy
    with _no_git():
        results = simple_evaluate(
            model=lm,
            tasks=names,
            task_manager=needed or _Tasks(include_path=include_path),
            limit=limit,
            log_samples=False,
            bootstrap_iters=_BOOTSTRAPS,
            batch_size=lm.batch_size,
            random_seed=small_seed,
            numpy_random_seed=small_seed,
            torch_random_seed=small_seed,
            fewshot_random_seed=small_seed,
        )
    results["config"]["cut"] = lm.cut
    for of_machine in ("pretty_env_info", "git_hash", "upper_git_hash", "config_source"):
        results.pop(of_machine, None)
    return json.loads(json.dumps(results, default=handle_non_serializable))
