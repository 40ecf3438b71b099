"""The adapter against sums written out, and the harness itself on tasks of this folder, without a network."""

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from tests.command import assert_one_sentence, run
from tests.toy import BOS, EOS, VOCABULARY, grid_model, pretrained_part, small_model, three_verbs
from tests.training.runs import trained, unchecked

import latentlm
from latentlm import InputError
from latentlm.data import load_tokenizer
from latentlm.distributions import Stream, sequence_keys
from latentlm.evaluation.harness import HarnessLM, _Tasks, harness
from latentlm.evaluation.likelihood import score

PAIRS = [
    ("w3 w4 w5", " w6 w7"),
    ("w3 w4 w5", " w8"),
    ("w9", " w3 w4 w5 w6 w7 w8 w9 w10"),
    ("", "w11 w12 w13"),
    ("w5 w6 w7 w8 w9 w10 w11", " w12"),
    ("", "w4"),
    ("w5 w6  ", "w7"),
]
LATENT = ("ltm", "gpt_vae", "gp_vae", "lang_vae")


@pytest.fixture(scope="module")
def tokenizer():
    """Words w3 to w22 are the tokens 3 to 22."""
    return load_tokenizer(pretrained_part("gpt2"))


def ids_of(text):
    return [int(word[1:]) for word in text.split()]


def asked(kind, *arguments):
    return [Instance(kind, {}, one, place) for place, one in enumerate(arguments)]


def row(*ids):
    return torch.tensor([[BOS, *ids]])


# ---- log-likelihoods -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["autoregressive", "huggingface"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_exact_model_is_a_sum_of_log_softmax(tokenizer, family, batch_size):
    model = small_model(family)
    lm = HarnessLM(model, tokenizer, batch_size=batch_size, iw_samples=7)
    found = lm.loglikelihood(asked("loglikelihood", *PAIRS))
    other_order = lm.loglikelihood(asked("loglikelihood", *PAIRS[::-1]))[::-1]
    assert [value for value, _ in other_order] == pytest.approx([value for value, _ in found], abs=1e-5)
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        before, after = ids_of(context), ids_of(continuation)
        with torch.no_grad():
            logits = model.decode(torch.zeros(1, 0), row(*before, *after))[0, len(before) :].double()
        expected = sum(float(logits[place].log_softmax(-1)[token]) for place, token in enumerate(after))
        assert value == pytest.approx(expected, abs=1e-6 * len(after) + 2e-6)
        assert greedy == (logits.argmax(-1).tolist() == after)
    assert (lm.samples, lm.note()) == (1, "log-likelihoods are exact")


@pytest.mark.parametrize("family", LATENT)
@pytest.mark.parametrize("samples", [1, 4])
def test_a_latent_model_is_a_log_mean_over_draws_from_the_context(tokenizer, family, samples):
    model = small_model(family)
    found = HarnessLM(model, tokenizer, iw_samples=samples, batch_size=3, seed=5).loglikelihood(
        asked("loglikelihood", *PAIRS)
    )
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        before, after = ids_of(context), ids_of(continuation)
        whole = row(*before, *after)
        with torch.no_grad():
            prior = model.prior(1, len(before) + len(after))
            law, seen = prior, whole
            if before:
                seen = row(*before)
                law = model.going_on(model.infer(seen, seed=5), torch.tensor([len(before)]), prior)
            latents = model.draw_latents(law, sequence_keys(seen), samples, seed=5, stream=Stream.CONTINUATION)
            of_tokens = torch.stack([model.log_likelihood(z, whole)[0, len(before) :] for z in latents]).double()
            logits = torch.stack([model.decode(z, whole)[0, len(before) :] for z in latents]).double()
        expected = float(of_tokens.sum(1).logsumexp(0)) - math.log(samples)
        assert value == pytest.approx(expected, abs=2e-5 * len(after))
        likeliest = []
        for place in range(len(after)):
            weights = of_tokens[:, :place].sum(1).exp()
            mixture = (weights[:, None] * logits[:, place].softmax(-1)).sum(0)
            likeliest.append(int(mixture.argmax()))
        assert greedy == (likeliest == after)


@pytest.mark.parametrize("family", ["ltm", "gp_vae", "autoregressive"])
def test_what_the_mixture_likes_best_is_greedy_and_nothing_else(tokenizer, family):
    lm = HarnessLM(small_model(family), tokenizer, iw_samples=3, seed=2, batch_size=64)

    # as ids, so that special tokens may be the likeliest
    for number in (1, 2):
        every = list(itertools.product(range(VOCABULARY), repeat=number))
        found = lm._loglikelihood_tokens([(("", ""), [3, 4, 5], list(one)) for one in every])
        greedy = [one for one, (_, is_greedy) in zip(every, found, strict=True) if is_greedy]
        assert len(greedy) == 1
        # of the first token the likeliest, and of the second after it
        first = [
            sum(math.exp(value) for one, (value, _) in zip(every, found, strict=True) if one[0] == token)
            for token in range(VOCABULARY)
        ]
        assert greedy[0][0] == first.index(max(first))
        assert sum(first) == pytest.approx(1, abs=1e-5)
        after = {one: value for one, (value, _) in zip(every, found, strict=True) if one[:-1] == greedy[0][:-1]}
        assert greedy[0] == max(after, key=after.get)


def test_estimates_understate_and_reach_the_sum_over_all_latents(tokenizer):
    model = grid_model()
    context, continuation = [3, 4], [5, 6, 7]
    with torch.no_grad():
        q = model.infer(row(*context))
        log_likelihood = model.log_likelihood(model.points[:, None], row(*context, *continuation))[:, 0, 2:].sum(-1)
        exact = float((q.log_probabilities[0] + log_likelihood).logsumexp(0))

    def mean(samples, seeds):
        values = []
        for seed in range(seeds):
            lm = HarnessLM(model, tokenizer, iw_samples=samples, seed=seed)
            values.append(lm._loglikelihood_tokens([(("", ""), context, continuation)])[0][0])
        return sum(values) / seeds

    few, more = mean(1, 60), mean(4, 60)
    assert few < more < exact + 0.05
    assert mean(3000, 1) == pytest.approx(exact, abs=0.1)


def test_choices_of_one_question_share_their_draws(tokenizer):
    """So a difference between choices is none of their noise."""
    lm = HarnessLM(small_model("ltm"), tokenizer, iw_samples=1)
    alone = lm.loglikelihood(asked("loglikelihood", ("w3 w4", " w5")))[0]
    with_others = lm.loglikelihood(asked("loglikelihood", ("w3 w4", " w6 w7"), ("w3 w4", " w5"), ("w9", " w5")))
    assert with_others[1] == pytest.approx(alone, abs=1e-5)
    every = lm.loglikelihood(asked("loglikelihood", *(("w3 w4", f" w{token}") for token in range(3, VOCABULARY))))
    probabilities = sum(math.exp(value) for value, _ in every)
    special = lm._loglikelihood_tokens([(("", ""), [3, 4], [token]) for token in range(3)])
    assert probabilities + sum(math.exp(value) for value, _ in special) == pytest.approx(1, abs=1e-5)


def test_tokens_are_those_of_both_texts_together():
    model, tokenizer = latentlm.load(trained("autoregressive"))
    lm = HarnessLM(model, tokenizer)
    context, continuation = "the ca ", "t sat"
    whole = tokenizer.encode("the ca t sat", add_special_tokens=False)
    before = tokenizer.encode("the ca", add_special_tokens=False)
    [found] = lm.loglikelihood(asked("loglikelihood", (context, continuation)))
    with torch.no_grad():
        ids = torch.tensor([[tokenizer.bos_token_id, *whole]])
        expected = float(model.log_likelihood(torch.zeros(1, 0), ids)[0, len(before) :].sum())
    assert found[0] == pytest.approx(expected, abs=1e-5)


def test_nothing_is_certain_and_unicode_is_text():
    model, tokenizer = latentlm.load(trained("ltm"))
    lm = HarnessLM(model, tokenizer, iw_samples=2)
    nothing, both, café = lm.loglikelihood(asked("loglikelihood", ("the cat", ""), ("", ""), ("a", " café 日本")))
    assert nothing == both == (0.0, True)
    assert café[0] < -1


def test_a_long_context_loses_its_front_and_a_long_continuation_is_refused(tokenizer):
    model = small_model("autoregressive", max_position_embeddings=4)
    lm = HarnessLM(model, tokenizer)
    long, short = lm.loglikelihood(asked("loglikelihood", ("w3 w4 w5 w6", " w7 w8"), ("w5 w6", " w7 w8")))
    assert long == pytest.approx(short, abs=1e-5)
    assert lm.cut == 1
    whole = HarnessLM(small_model("ltm", max_position_embeddings=4), tokenizer, iw_samples=2)
    filled, alone = whole.loglikelihood(asked("loglikelihood", ("w9", " w3 w4 w5 w6"), ("", "w3 w4 w5 w6")))
    assert filled == alone
    with pytest.raises(InputError, match="a continuation of 5 tokens exceeds the model's context of 4"):
        lm.loglikelihood(asked("loglikelihood", ("w3", " w4 w5 w6 w7 w8")))


@pytest.mark.parametrize("family", [*LATENT, "autoregressive"])
@pytest.mark.parametrize("samples", [1, 3])
def test_rolling_is_the_sum_over_blocks_of_the_bound(tokenizer, family, samples):
    model = small_model(family, max_position_embeddings=5)
    words = [3 + place % 20 for place in range(13)]
    texts = [" ".join(f"w{word}" for word in words[:number]) for number in (13, 10, 1, 0, 5)]
    lm = HarnessLM(model, tokenizer, iw_samples=samples, batch_size=2, seed=3)
    found = lm.loglikelihood_rolling(asked("loglikelihood_rolling", *((text,) for text in texts)))
    for text, value in zip(texts, found, strict=True):
        ids, expected = ids_of(text), 0.0
        for begin in range(0, len(ids), 5):
            with torch.no_grad():
                scores = score(model, row(*ids[begin : begin + 5]), samples=1 if model.exact else samples, seed=3)
            expected -= float(scores["elbo" if samples == 1 or model.exact else "iw"])
        assert value == pytest.approx(expected, abs=1e-4)
    if family == "autoregressive":
        with torch.no_grad():
            direct = sum(
                float(model.log_likelihood(torch.zeros(1, 0), row(*words[begin : begin + 5])).sum())
                for begin in (0, 5, 10)
            )
        assert found[0] == pytest.approx(direct, abs=1e-5)


# ---- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["ltm", "gp_vae", "autoregressive", "lang_vae"])
def test_writing_stops_at_strings_and_lengths(tokenizer, family):
    lm = HarnessLM(small_model(family), tokenizer)

    def write(**settings):
        return lm.generate_until(asked("generate_until", ("w3 w4", settings)))[0]

    whole = write(max_gen_toks=8)
    words = whole.split()
    assert 1 < len(words) <= 8
    assert write(max_gen_toks=8) == whole
    stop = words[1]
    assert write(max_gen_toks=8, until=[stop]) == whole.split(stop)[0]
    assert write(max_gen_toks=8, until=stop) == whole.split(stop)[0]
    assert write(max_gen_toks=8, until=["absent"]) == whole
    if family != "gp_vae":  # which writes all at once
        assert whole.startswith(write(max_gen_toks=2))


def test_samples_differ_from_one_another_and_are_of_the_seed(tokenizer):
    question = ("w3 w4", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8})
    requests = asked("generate_until", question, question, ("w5", question[1]))

    def written(seed):
        return HarnessLM(small_model("ltm"), tokenizer, seed=seed).generate_until(requests)

    first = written(0)
    assert first[0] != first[1]
    assert written(0) == first
    assert written(1) != first
    alone = HarnessLM(small_model("ltm"), tokenizer).generate_until(requests[2:])
    assert alone == first[2:]


def test_new_tokens_take_half_of_the_context_at_most(tokenizer):
    lm = HarnessLM(small_model("autoregressive", max_position_embeddings=8), tokenizer)
    long = "w3 w4 w5 w6 w7 w8 w9 w10 w11"
    [found] = lm.generate_until(asked("generate_until", (long, {"until": []})))
    [same] = lm.generate_until(asked("generate_until", ("w8 w9 w10 w11", {"max_gen_toks": 4})))
    assert found == same
    assert lm.cut == 1


def test_the_end_of_a_text_ends_it(tokenizer, monkeypatch):
    lm = HarnessLM(small_model("autoregressive"), tokenizer)
    monkeypatch.setattr(lm.model, "generate", lambda ids, **_: torch.cat([ids, torch.tensor([[7, EOS, 8]])], 1))
    assert lm.generate_until(asked("generate_until", ("w3", {})))[0].strip() == "w7"


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_told(tokenizer):
    model = small_model("ltm")
    for options, told in (
        ({"batch_size": "auto"}, "batch_size must be a number"),
        ({"batch_size": 0}, "batch_size must be a number"),
        ({"iw_samples": 0}, "iw_samples must be at least 1"),
        ({"nonsense": 1}, "nonsense"),
    ):
        with pytest.raises(InputError, match=told):
            HarnessLM(model, tokenizer, **options)
    with pytest.raises(InputError, match="needs its tokenizer"):
        HarnessLM(model)
    with pytest.raises(InputError, match="does not write text"):
        HarnessLM(three_verbs(), tokenizer).generate_until(asked("generate_until", ("w3", {})))
    with pytest.raises(InputError, match="have repetition_penalty"):
        HarnessLM(model, tokenizer).generate_until(asked("generate_until", ("w3", {"repetition_penalty": 2.0})))
    conditional = small_model("gpt_vae")
    conditional.config.annotation_labels = ["A"]
    with pytest.raises(InputError, match="needs labels"):
        HarnessLM(conditional, tokenizer)


def test_a_folder_and_settings_of_inference_as_the_harness_gives_them():
    lm = get_model("latentlm").create_from_arg_string(
        f"pretrained={trained('ltm')},iw_samples=3,inference_steps=5,seed=7", {"batch_size": 2, "device": "cuda:0"}
    )
    assert isinstance(lm, HarnessLM)
    assert (lm.samples, lm.batch_size, lm.seed, lm.model.config.inference_steps) == (3, 2, 7, 5)
    info = lm.get_model_info()
    assert "is no bound" in info["log_likelihoods"] and "3 samples of blocks of 48 tokens" in info["log_likelihoods"]
    one = get_model("latentlm").create_from_arg_string(f"pretrained={trained('ltm')},iw_samples=1")
    assert "the ELBO of blocks" in one.note()


# ---- the harness itself ----------------------------------------------------------------------------------------------

TASKS = {
    "choice": """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "writing": """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{greedy}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "rolling": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
""",
}
QUESTIONS = ("the cat sat", "some dogs are in", "a café")


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder of tasks of each kind whose answers a trained control gives, and the control."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    with unchecked():
        lm = HarnessLM(*latentlm.load(trained("autoregressive")))
        records = []
        for question in QUESTIONS:
            [written] = lm.generate_until(asked("generate_until", (question, {"until": ["\n"], "max_gen_toks": 4})))
            choices = [" x", written or " y", " quickly the of 日本"]
            values = [value for value, _ in lm.loglikelihood([*asked("l", *((question, f" {c}") for c in choices))])]
            records.append(
                {"question": question, "choices": choices, "greedy": written, "gold": values.index(max(values))}
            )
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
        for name, content in TASKS.items():
            of_data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
            (tmp_path / f"{name}.yaml").write_text(f"task: local_{name}\ntest_split: test\n{of_data}{content}")
        yield tmp_path, lm


NAMES = ",".join(f"local_{name}" for name in TASKS)


def test_the_harness_runs_its_three_kinds_of_tasks(tasks):
    folder, lm = tasks
    results = harness(lm, NAMES.split(","), include_path=folder)
    found = results["results"]
    assert found["local_choice"]["acc,none"] == 1.0
    assert found["local_writing"]["exact_match,none"] == 1.0
    nats = sum(lm.loglikelihood_rolling(asked("loglikelihood_rolling", *((text,) for text in QUESTIONS))))
    num_bytes = sum(len(text.encode()) for text in QUESTIONS)
    assert found["local_rolling"]["bits_per_byte,none"] == pytest.approx(-nats / num_bytes / math.log(2))
    assert results["config"]["log_likelihoods"] == "log-likelihoods are exact"
    assert str(Path.home()) not in json.dumps({name: results["config"][name] for name in lm.get_model_info()})
    assert "pretty_env_info" not in results


def test_the_command_prints_the_table_and_says_what_are_bounds(tasks):
    folder, _ = tasks
    options = ["--tasks", NAMES, "--include-path", str(folder), "--limit", "2", "--iw-samples", "2", "--json", "a.json"]
    status, out, _ = run("evaluate", "harness", str(trained("ltm")), *options)
    assert status == 0
    assert "local_rolling" in out and "bits_per_byte" in out
    assert "is no bound." in " ".join(out.split())
    figures = json.loads((folder / "a.json").read_text())
    assert (figures["task"], figures["family"], figures["iw_samples"], figures["seed"]) == ("harness", "LTM", 2, 0)
    assert figures["harness"]["n-samples"]["local_choice"]["effective"] == 2
    again = run("evaluate", "harness", str(trained("ltm")), *options, "--batch-size", "1")
    assert again[0] == 0
    of_one = json.loads((folder / "a.json").read_text())["harness"]["results"]
    for name, values in figures["harness"]["results"].items():
        assert of_one[name] == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize(
    "options, told",
    [
        ("--tasks ,", "there is no task"),
        ("--tasks local_choice --include-path missing", "missing is no folder"),
        ("--tasks local_broken --include-path .", "local_broken cannot be loaded"),
        ("--tasks local_choice --limit 0", "--limit"),
        ("", "--tasks"),
    ],
)
def test_mistakes_are_told_in_one_sentence(tasks, options, told):
    folder, _ = tasks
    broken = (folder / "choice.yaml").read_text().replace("local_choice", "local_broken").replace("rows.", "none.")
    (folder / "broken.yaml").write_text(broken)
    status, _, err = run("evaluate", "harness", str(trained("ltm")), *options.split())
    assert_one_sentence(status, err)
    assert status == 2 and told in err


def test_a_file_of_tasks_that_does_not_parse_is_named(tmp_path):
    (tmp_path / "broken.yaml").write_text("task: absent\ndataset_path: [json\n")
    with pytest.raises(InputError, match=r"broken\.yaml is no YAML: .*line"):
        _Tasks(include_path=tmp_path, include_defaults=False).load(["absent"])


def test_a_task_that_is_missing_is_named(tmp_path):
    # without the harness' own tasks, which take seconds to look through
    with pytest.raises(InputError, match="there is no task absent: lm-eval ls tasks"):
        _Tasks(include_path=tmp_path, include_defaults=False).load(["absent"])


def test_without_the_package_it_says_how_to_install_it(monkeypatch):
    for name in ("lm_eval", "lm_eval.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    with unchecked():
        status, _, err = run("evaluate", "harness", "model", "--tasks", "piqa")
    assert (status, err) == (2, "latentlm: this needs the package lm-eval: pip install 'latentlm[harness]'.\n")


def test_it_is_a_job_of_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with unchecked():
        status, _, err = run("evaluate", "harness", "model", "--tasks", "piqa")
    assert status == 2 and "evaluate harness is a job of one process" in err


def test_help_shows_an_example():
    with unchecked():
        assert "Example: latentlm evaluate harness " in " ".join(run("evaluate", "harness", "--help")[1].split())
