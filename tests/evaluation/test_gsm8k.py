"""pass@k against enumeration over subsets, numbers in texts, and models that are known to be right or wrong."""

import itertools
import json
import math
import os
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from tests.command import assert_one_sentence, run
from tests.toy import three_verbs
from tests.training.runs import trained, unchecked

import latentlm
from latentlm import InputError, LatentLMConfig
from latentlm.data import train_tokenizer
from latentlm.evaluation.gsm8k import Problem, flexible_number, gsm8k, pass_at_k, read_problems, strict_number
from latentlm.generation import WritesText

# lines as the data has them
REAL = [
    {
        "question": "A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts in total?",
        "answer": "It takes 2/2=<<2/2=1>>1 bolt of white fiber\nSo the total amount of fabric is 2+1=<<2+1=3>>3 bolts "
        "of fabric\n#### 3",
    },
    {
        "question": "How much does he save?",
        "answer": "He pays $1,200 - $200 = $<<1200-200=1000>>1,000.\n#### 1,000",
    },
    {"question": "How much colder is it than the café’s fridge?", "answer": "1 - 6 = <<1-6=-5>>-5\n#### -5"},
]


def lines(folder: Path, *records, name="test.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def problems(tmp_path):
    return read_problems(lines(tmp_path, *REAL))


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, strict, flexible",
    [
        ("so 3 + 4 = 7\n#### 7", "7", "7"),
        ("#### 1,200", "1200", "1200"),
        ("#### 1,234,567.50", "1234567.5", "1234567.5"),
        ("#### -5", "-5", "-5"),
        ("#### −5", "-5", "-5"),
        ("#### $18.", "18", "18"),
        ("#### -$3.50", "-3.5", "-3.5"),
        ("#### $ -3", "-3", "-3"),
        ("####7", "7", "7"),
        ("#### 5%", "5", "5"),
        ("#### .5", "0.5", "0.5"),
        ("#### 7 apples of 9\n#### 8", "7", "7"),
        ("#### seven of 9", None, "9"),
        ("####\n9", None, "9"),
        ("", None, None),
        ("none at all ####", None, None),
        ("she has 3, then 4.", None, "4"),
        ("10 - 5", None, "5"),
        ("10-5", None, "5"),
        ("it is -5", None, "-5"),
        ("(-5)", None, "-5"),
        ("5,6", None, "6"),
        ("12,3456", None, "3456"),
        ("٣ cafés", None, None),
        ("<<2+1=3>>3 bolts", None, "3"),
    ],
)
def test_numbers_of_texts(text, strict, flexible):
    def decimal(number):
        return None if number is None else Decimal(number)

    assert (strict_number(text), flexible_number(text)) == (decimal(strict), decimal(flexible))


def test_numbers_are_compared_as_numbers():
    assert strict_number("#### 1,000.00") == strict_number("#### 1000")
    assert strict_number("#### 0.1") == Decimal("0.1")


def test_problems_of_a_file(problems):
    assert [problem.number for problem in problems] == [3, 1000, -5]
    assert problems[1].prompt == "Question: How much does he save?\nAnswer:"
    assert problems[1].example == problems[1].prompt + " He pays $1,200 - $200 = $1,000.\n#### 1,000"


@pytest.mark.skipif("GSM8K" not in os.environ, reason="GSM8K names no folder with test.jsonl and train.jsonl.xz")
@pytest.mark.parametrize("name, number", [("test.jsonl", 1319), ("train.jsonl.xz", 7473)])
def test_numbers_of_all_answers_of_the_data(name, number):
    problems = read_problems(Path(os.environ["GSM8K"]) / name)
    assert len(problems) == number
    for problem in problems:
        gold = Decimal(problem.answer.split("#### ")[1].replace(",", ""))
        assert (problem.number, flexible_number(problem.example)) == (gold, gold)
        assert "<<" not in problem.example
        assert flexible_number(problem.example.replace("####", "")) == gold


@pytest.mark.parametrize(
    "record, told",
    [
        ({"question": "a", "answer": "7"}, "line 2: its answer has no number after ####"),
        ({"question": "a", "answer": "#### seven"}, "line 2: its answer has no number after ####"),
        ({"question": "a"}, "line 2 has no text in column 'answer'"),
        ({"question": " ", "answer": "#### 1"}, "line 2 has no text in column 'question'"),
        (["a"], "line 2 is list"),
    ],
)
def test_problems_that_are_none(tmp_path, record, told):
    with pytest.raises(InputError, match=told):
        read_problems(lines(tmp_path, REAL[0], record))


def test_files_that_are_none(tmp_path):
    for name, content, told in (
        ("empty.jsonl", b"", "no problem"),
        ("a.txt", b"a", "give a .jsonl"),
        ("a.jsonl.xz", b"a", "truncated"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=told):
            read_problems(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        read_problems(tmp_path / "missing.jsonl")


# ---- pass@k ----------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets_with_a_right_trial():
    for trials in range(1, 7):
        for right in range(trials + 1):
            passed = [True] * right + [False] * (trials - right)
            for k in range(1, trials + 1):
                subsets = list(itertools.combinations(passed, k))
                assert pass_at_k(trials, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize("numbers", [(5, 6, 1), (5, -1, 1), (5, 1, 0), (5, 1, 6)])
def test_pass_at_k_of_no_trials(numbers):
    with pytest.raises(ValueError, match="no such numbers"):
        pass_at_k(*numbers)


# ---- models that are known -------------------------------------------------------------------------------------------


class Scripted(WritesText):
    """Goes on after each prompt with texts that a list says."""

    config_class = LatentLMConfig

    def __init__(self, tokenizer, texts, **config):
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        super().__init__(LatentLMConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.eos_token_id, **ends))
        self.config.max_position_embeddings = config.get("context", 400)
        self.place = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer, self.texts, self.asked, self.seeds = tokenizer, texts, [], []
        self.exact = config.get("exact", False)
        self.given = {}

    def generate(self, input_ids=None, attention_mask=None, *, max_new_tokens, num_return_sequences, seed, **options):
        prompt = self.tokenizer.decode(input_ids[0, 1:])
        given = self.given.setdefault(prompt, [])
        if not given:  # a latent model is asked for each trial
            self.asked.append((prompt, options))
            self.seeds.append(seed)
        assert seed not in given
        question = prompt.split("Question: ")[-1].removesuffix("\nAnswer:")
        eos = self.tokenizer.eos_token_id
        new = [self.tokenizer.encode(text, add_special_tokens=False) for text in self.texts(question)]
        rows = [([*ids, eos] + [5] * max_new_tokens)[:max_new_tokens] for ids in new]
        assert num_return_sequences == (len(rows) if self.exact else 1)
        if not self.exact:
            rows = [rows[len(given)]]
        given.append(seed)
        return torch.cat([input_ids.expand(len(rows), -1), torch.tensor(rows)], dim=1)


@pytest.fixture(scope="module")
def tokenizer():
    letters = [f"Question: {line['question']}\nAnswer: {line['answer']}" for line in REAL]
    return train_tokenizer(letters, 300)


def answers(question):
    """Five texts; of the robe two are right and strict, of the saving one by its last number, of the fridge none."""
    if "robe" in question:
        return ["#### 3", "1 and 2.", "so\n#### 3.0", "#### 1,000", "no\nQuestion: 3"]
    if "save" in question:
        return ["it is $1,000.", "#### 3", "", "7", "#### 8 of 1000"]
    return ["7", "5", "10-5", "#### 5", "-"]


def test_figures_of_a_scripted_model(tokenizer, problems):
    figures, records = gsm8k(Scripted(tokenizer, answers), tokenizer, problems)
    strict, flexible = [2, 0, 0], [2, 1, 0]
    for k in range(1, 6):
        for name, right in (("strict", strict), ("flexible", flexible)):
            values = [pass_at_k(5, number, k) for number in right]
            mean = sum(values) / 3
            assert figures[f"{name}_pass_at_{k}"] == pytest.approx(mean)
            error = math.sqrt(sum((value - mean) ** 2 for value in values) / 2 / 3)
            assert figures[f"{name}_pass_at_{k}_standard_error"] == pytest.approx(error)
    assert figures["flexible_answered"] == pytest.approx(12 / 15)
    assert figures["strict_answered"] == pytest.approx(6 / 15)
    assert (figures["problems"], figures["too_long"], figures["shots"], figures["beams"]) == (3, 0, 0, 1)
    assert records[0]["texts"][4] == "no"  # the next question is no part of the answer, nor what follows EOS
    assert records[1]["texts"][2] == ""
    assert records[0]["strict"] == ["3", None, "3.0", "1000", None]
    # by chance: each problem's texts against each other problem's number
    by_chance = []
    for record, problem in zip(records, problems, strict=True):
        for other in problems:
            if other is not problem:
                right = sum(number is not None and Decimal(number) == other.number for number in record["flexible"])
                by_chance.append(pass_at_k(5, right, 2))
    assert figures["flexible_chance_at_2"] == pytest.approx(sum(by_chance) / 6)
    assert sum(by_chance) > 0


def test_chance_counts_other_problems_of_the_same_number(tokenizer):
    same = [Problem(name, "#### 3", Decimal(3)) for name in ("one", "two")]
    figures, _ = gsm8k(Scripted(tokenizer, lambda question: ["#### 3"]), tokenizer, same, trials=1)
    assert figures["strict_pass_at_1"] == figures["strict_chance_at_1"] == 1.0


def test_a_model_that_is_right_passes_and_one_problem_has_no_chance(tokenizer, problems):
    model = Scripted(tokenizer, lambda question: ["so\n#### 3"] * 2)
    figures, _ = gsm8k(model, tokenizer, problems[:1], trials=2)
    for name in ("strict", "flexible"):
        assert figures[f"{name}_pass_at_1"] == figures[f"{name}_pass_at_2"] == figures[f"{name}_answered"] == 1.0
        assert figures[f"{name}_chance_at_1"] is None
        assert figures[f"{name}_pass_at_1_standard_error"] is None


def test_beams_pass_in_their_order(tokenizer, problems):
    model = Scripted(tokenizer, answers, exact=True)
    figures, _ = gsm8k(model, tokenizer, problems)
    assert model.asked[0][1] == {"num_beams": 5, "do_sample": False}
    assert [figures[f"strict_pass_at_{k}"] for k in range(1, 6)] == pytest.approx([1 / 3] * 5)
    model = Scripted(tokenizer, lambda question: answers(question)[::-1], exact=True)
    figures, _ = gsm8k(model, tokenizer, problems)
    assert [figures[f"strict_pass_at_{k}"] for k in range(1, 6)] == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3])
    assert figures["temperature"] is None


def test_an_exact_model_samples_where_it_is_asked_to(tokenizer, problems):
    for asked, temperature in (({"temperature": 0.5}, 0.5), ({"beams": 1}, 1.0)):
        model = Scripted(tokenizer, answers, exact=True)
        figures, _ = gsm8k(model, tokenizer, problems, **asked)
        assert model.asked[0][1] == {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": temperature}
        assert (figures["beams"], figures["temperature"]) == (1, temperature)
    model = Scripted(tokenizer, lambda question: ["7"] * 2, exact=True)
    assert gsm8k(model, tokenizer, problems, trials=2)[0]["beams"] == 5


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_shots_stand_before_the_question_and_are_never_it(tokenizer, problems):
    model = Scripted(tokenizer, answers)
    figures, records = gsm8k(model, tokenizer, problems, examples=problems, shots=2)
    for (prompt, _), problem, record in zip(model.asked, problems, records, strict=True):
        *shown, last = prompt.split("\n\n")
        assert last == problem.prompt
        assert sorted(shown) == sorted(other.example for other in problems if other is not problem)
        assert record["shots"] == 2
    assert figures["mean_shots_used"] == 2


def test_shots_and_noise_are_of_the_seed_and_the_question(tokenizer, problems):
    examples = [Problem(f"question {n}", f"#### {n}", Decimal(n)) for n in range(30)]

    def asked(problems, seed):
        model = Scripted(tokenizer, answers)
        gsm8k(model, tokenizer, problems, examples=examples, shots=1, seed=seed)
        return {
            prompt.split("\n\n")[-1]: (prompt, noise)
            for (prompt, _), noise in zip(model.asked, model.seeds, strict=True)
        }

    first = asked(problems, 0)
    assert asked(problems[::-1], 0) == first
    assert asked(problems[1:2], 0) == {problems[1].prompt: first[problems[1].prompt]}
    other = asked(problems, 1)
    assert all(other[prompt] != value for prompt, value in first.items())
    assert len({noise for _, noise in first.values()}) == 3


def test_examples_make_room_first_and_then_the_question_is_not_answered(tokenizer, problems):
    def tokens(text):
        return len(tokenizer.encode(text, add_special_tokens=False))

    robe, saving, fridge = problems
    alone = tokens(robe.prompt) + 50
    with_one = {example.question: tokens(f"{example.example}\n\n{robe.prompt}") + 50 for example in (saving, fridge)}
    both = tokens(f"{saving.example}\n\n{fridge.example}\n\n{robe.prompt}") + 50
    for context, shots in ((both, 2), (both - 1, 1), (min(with_one.values()) - 1, 0), (alone, 0)):
        model = Scripted(tokenizer, answers, context=context)
        figures, records = gsm8k(model, tokenizer, [robe], examples=[saving, fridge, robe], shots=2)
        assert (records[0]["shots"], figures["mean_shots_used"], figures["too_long"]) == (shots, shots, 0)
        assert figures["strict_pass_at_5"] == 1.0
    # the last example stays
    model = Scripted(tokenizer, answers, context=both - 1)
    gsm8k(model, tokenizer, [robe], examples=[saving, fridge, robe], shots=2)
    whole = Scripted(tokenizer, answers, context=both)
    gsm8k(whole, tokenizer, [robe], examples=[saving, fridge, robe], shots=2)
    assert whole.asked[0][0].endswith(model.asked[0][0])
    model = Scripted(tokenizer, answers, context=alone - 1)
    figures, records = gsm8k(model, tokenizer, [robe], examples=[saving, fridge, robe], shots=2)
    assert (figures["too_long"], figures["flexible_pass_at_5"], figures["flexible_answered"]) == (1, 0.0, 0.0)
    assert records[0]["texts"] == [] and records[0]["too_long"] and not model.asked


@pytest.mark.parametrize(
    "asked, told",
    [
        ({"trials": 0}, "at least 1 problem"),
        ({"max_new_tokens": 0}, "at least 1 problem"),
        ({"shots": -1}, "at least 1 problem"),
        ({"shots": 1}, "1 shots need at least 2 different examples"),
        ({"beams": 5}, "beams share one z"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"temperature": math.nan}, "temperature must be"),
    ],
)
def test_settings_that_do_not_fit(tokenizer, problems, asked, told):
    with pytest.raises(InputError, match=told):
        gsm8k(Scripted(tokenizer, answers), tokenizer, problems, **asked)


def test_models_and_problems_that_do_not_fit(tokenizer, problems):
    exact = Scripted(tokenizer, answers, exact=True)
    for asked, told in (({"beams": 2, "temperature": 1.0}, "has no temperature"), ({"beams": 2}, "at most 2 trials")):
        with pytest.raises(InputError, match=told):
            gsm8k(exact, tokenizer, problems, **asked)
    with pytest.raises(InputError, match="at least 1 problem"):
        gsm8k(exact, tokenizer, [])
    with pytest.raises(InputError, match="does not write text"):
        gsm8k(three_verbs(), tokenizer, problems)
    conditional = Scripted(tokenizer, answers)
    conditional.config.annotation_labels = ["A"]
    with pytest.raises(InputError, match="needs labels"):
        gsm8k(conditional, tokenizer, problems)


# ---- trained models --------------------------------------------------------------------------------------------------

SHORT = [Problem("the cat?", "#### 3", Decimal(3)), Problem("a dog", "#### 4", Decimal(4))]


@pytest.mark.parametrize("family", ["ltm", "gpt_vae", "gp_vae", "autoregressive"])
def test_families_write_the_same_again_and_something_else_by_another_seed(family):
    model, tokenizer = latentlm.load(trained(family))
    options = {"trials": 3, "max_new_tokens": 6}
    first = gsm8k(model, tokenizer, SHORT, **options)
    assert gsm8k(model, tokenizer, SHORT, **options) == first
    figures, records = first
    assert figures["too_long"] == 0 and all(len(record["texts"]) == 3 for record in records)
    # neither the order of the problems nor their number changes what is written
    assert gsm8k(model, tokenizer, SHORT[::-1], **options)[1] == records[::-1]
    if family == "autoregressive":
        assert figures["beams"] == 5
    else:
        assert gsm8k(model, tokenizer, SHORT, seed=1, **options)[1] != records


def test_each_trial_has_its_own_z_of_the_prompt(monkeypatch):
    model, tokenizer = latentlm.load(trained("ltm"))
    drawn, inferred, posteriors = [], [], []
    latents_for, infer = model._latents_for, model.infer

    def spied(*arguments):
        drawn.append(latents_for(*arguments))
        return drawn[-1]

    def inferring(input_ids, *arguments, **options):
        inferred.append(tokenizer.decode(input_ids[0, 1:]))
        posterior = infer(input_ids, *arguments, **options)
        posteriors.append(posterior.mean)
        return posterior

    monkeypatch.setattr(model, "_latents_for", spied)
    monkeypatch.setattr(model, "infer", inferring)
    gsm8k(model, tokenizer, SHORT, trials=4, max_new_tokens=2)
    assert inferred == [problem.prompt for problem in SHORT for _ in range(4)]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(posteriors, 2))
    assert [len(latents) for latents in drawn] == [1] * 4 * len(SHORT)
    for place in range(len(SHORT)):
        of_problem = drawn[4 * place : 4 * place + 4]
        assert all(not torch.equal(one, other) for one, other in itertools.combinations(of_problem, 2))


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with unchecked():
        yield tmp_path


def test_the_command_writes_figures_and_texts(folder):
    short = [{"question": problem.question, "answer": problem.answer} for problem in SHORT]
    data, train = lines(folder, *short), lines(folder, *short, name="train.jsonl")
    options = ["--data", data, "--max-new-tokens", "4", "--trials", "2", "--json", "a.json", "--texts", "texts.jsonl"]
    status, out, err = run("evaluate", "gsm8k", str(trained("ltm")), *options)
    assert (status, err) == (0, "")
    assert "2 problems, sampling at 1, 0 shots" in out
    figures = json.loads((folder / "a.json").read_text())
    assert list(figures)[:3] == ["task", "model", "family"]
    assert (figures["task"], figures["family"], figures["seed"], figures["problems"]) == ("gsm8k", "LTM", 0, 2)
    written = [json.loads(line) for line in (folder / "texts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [len(record["texts"]) for record in written] == [2, 2]
    model, tokenizer = latentlm.load(trained("ltm"))
    expected, records = gsm8k(model, tokenizer, SHORT, trials=2, max_new_tokens=4)
    assert {name: figures[name] for name in expected} == expected
    assert written == records
    status, out, _ = run("evaluate", "gsm8k", str(trained("ltm")), *options, "--train", train, "--shots", "1")
    assert status == 0
    assert json.loads((folder / "a.json").read_text())["shots"] == 1
    assert "any number; there was room for 0.00 shots" in " ".join(out.split())  # in so small a context
    assert "too long for the model's context" not in out
    status, out, _ = run("evaluate", "gsm8k", str(trained("ltm")), "--data", data, "--max-new-tokens", "31")
    assert status == 0 and "not answered: 2 problems" in out  # of a context of 32 one token is left


@pytest.mark.parametrize(
    "options, told",
    [
        ("--data missing.jsonl", "missing.jsonl does not exist"),
        ("--data wrong.jsonl", "wrong.jsonl line 1: its answer has no number"),
        ("--data good.jsonl --shots 1", "give some by --train"),
        ("--data good.jsonl --train good.jsonl", "say how many"),
        ("--data good.jsonl --max-new-tokens 5000", "5000 new tokens leave no room for a question"),
        ("--data good.jsonl --shots 4 --train good.jsonl", "4 shots need"),
        ("--data good.jsonl --beams 3", "beams share one z"),
        ("--data good.jsonl --temperature -1", "temperature must be"),
        ("--data good.jsonl --texts missing/a.jsonl", "missing/a.jsonl cannot be written"),
        ("--data good.jsonl --set nonsense=1", "nonsense"),
        ("", "--data"),
    ],
)
def test_mistakes_are_told_in_one_sentence(folder, options, told):
    lines(folder, *REAL, name="good.jsonl")
    lines(folder, {"question": "a", "answer": "7"}, name="wrong.jsonl")
    status, _, err = run("evaluate", "gsm8k", str(trained("ltm")), *options.split())
    assert_one_sentence(status, err)
    assert status == 2 and told in err


def test_it_is_a_job_of_one_process(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = run("evaluate", "gsm8k", "model", "--data", "test.jsonl")
    assert status == 2 and "evaluate gsm8k is a job of one process" in err


def test_help_shows_an_example():
    with unchecked():
        assert "Example: latentlm evaluate gsm8k " in " ".join(run("evaluate", "gsm8k", "--help")[1].split())
