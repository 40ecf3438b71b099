"""LangVAE of annotated texts: what the labels change, how they come from the data, and what does not fit."""

import json

import pytest
import torch
import yaml
from tests.command import assert_one_sentence, run
from tests.toy import VOCABULARY, Rows, padded, pretrained_part, small_model, texts
from tests.training.runs import unchecked
from torch.utils.data import Dataset

from latentlm import InputError, load
from latentlm.data import Annotated, Collator, Sentences, condition_of, load_tokenizer, read_documents
from latentlm.data.recipe import evaluation_sequences
from latentlm.evaluation.continuation import continuation
from latentlm.evaluation.likelihood import evaluate
from latentlm.model_card import check_figures, model_card
from latentlm.text import encode, write
from latentlm.training.recipe import parse_recipe
from latentlm.training.run import train

LABELS = ["ARG0", "ARG1", "V"]


def conditional(**changes):
    given = {"decoder_name": pretrained_part("gpt2"), "encoder_name": pretrained_part("bert")}
    model = small_model("lang_vae", annotation_labels=LABELS, annotation_size=6, **given, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in [
            *model.injection.parameters(),
            *(model.encoder.parameters() if model.config.has_encoder else ()),
        ]:
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def labels_of(*rows):
    return condition_of([row.split() for row in rows], LABELS)


# ---- the model -------------------------------------------------------------------------------------------------------


def test_what_fresh_weights_are():
    model = small_model("lang_vae", annotation_labels=LABELS, annotation_size=64, inference_start_log_variance=-2.0)
    assert 0.8 < float(model.annotations.labels.std()) < 1.2 and 0.8 < float(model.annotations.positions.std()) < 1.2
    assert (model.encoder.log_variance.bias == -2).all()


@torch.no_grad()
def test_the_vector_of_labels_by_hand():
    model = conditional()
    found = model.annotations(labels_of("ARG0 V ARG1", "V")["annotations"])
    e, w = model.annotations.labels, model.annotations.positions
    by_hand = (e[0] * w[0] + e[2] * w[1] + e[1] * w[2]) / 3**0.5
    torch.testing.assert_close(found[0], by_hand)
    torch.testing.assert_close(found[1], e[2] * w[0])  # without padding's
    turned = model.annotations(labels_of("ARG1 V ARG0")["annotations"])
    assert not torch.allclose(turned[0], found[0])
    none = model.annotations(torch.full((1, 2), -1))
    assert torch.equal(none, torch.zeros(1, 6))


@torch.no_grad()
def test_labels_change_posterior_and_text_but_not_the_prior():
    model = conditional()
    input_ids = texts(2, 7)
    one, other = labels_of("V ARG0", "ARG1"), labels_of("ARG1 V", "ARG1")
    posteriors = [model.infer(input_ids, None, c) for c in (one, other)]
    assert not torch.allclose(posteriors[0].mean[0], posteriors[1].mean[0])
    torch.testing.assert_close(posteriors[0].mean[1], posteriors[1].mean[1])
    z = posteriors[0].mean
    logits = [model.decode(z, input_ids, None, c) for c in (one, other)]
    assert (logits[0][0] - logits[1][0]).abs().max() > 1e-2
    torch.testing.assert_close(logits[0][1], logits[1][1])
    assert torch.equal(model.prior(2, 6, one).mean, model.prior(2, 6, other).mean)


@torch.no_grad()
@pytest.mark.parametrize("injection", ["prefix", "interleaved"])
def test_one_pass_is_step_by_step_is_generation(injection):
    model = conditional(injection=injection, latent_slots=2)
    input_ids, c = texts(3, 10), labels_of("V ARG0", "ARG1", "ARG0 V ARG1")
    z = torch.randn(3, model.config.latent_size, generator=torch.Generator().manual_seed(2))
    at_once = model.decode(z, input_ids, None, c)
    cache, steps = model.new_cache(), []
    for t in range(9):
        one = input_ids[:, t : t + 1]
        steps.append(model(one, condition=c, latents=z, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, 1), at_once, atol=1e-4, rtol=0)
    written = model.generate(input_ids[:, :3], latents=z, condition=c, max_new_tokens=6, do_sample=False)
    again = model.decode(z, written, None, c).argmax(-1)
    ended = (written[:, 3:] == 1).cumsum(1) - (written[:, 3:] == 1).long() > 0
    assert torch.equal(written[:, 3:][~ended], again[:, 2:][~ended])


@torch.no_grad()
def test_samples_in_front_are_each_their_own_rows():
    model = conditional()
    input_ids, c = texts(3, 6), labels_of("V ARG0", "ARG1", "ARG0 V ARG1")
    z = torch.randn(2, 3, model.config.latent_size, generator=torch.Generator().manual_seed(3))
    together = model.log_likelihood(z, input_ids, None, c)
    for sample in range(2):
        torch.testing.assert_close(together[sample], model.log_likelihood(z[sample], input_ids, None, c))


@torch.no_grad()
def test_generation_repeats_and_expands_labels():
    model = conditional()
    c = labels_of("V ARG0", "ARG1 V")
    z = torch.randn(2, model.config.latent_size, generator=torch.Generator().manual_seed(4))
    greedy = model.generate(latents=z, condition=c, max_new_tokens=6, do_sample=False)
    alone = [
        model.generate(latents=z[row : row + 1], condition=labels_of(text), max_new_tokens=6, do_sample=False)[0]
        for row, text in enumerate(["V ARG0", "ARG1 V"])
    ]
    for row in range(2):
        assert greedy[row, : len(alone[row])].tolist() == alone[row].tolist()
    beams = model.generate(latents=z, condition=c, max_new_tokens=6, num_beams=3)
    of_one = model.generate(latents=z[1:], condition=labels_of("ARG1 V"), max_new_tokens=6, num_beams=3)[0]
    assert beams[1, : len(of_one)].tolist() == of_one.tolist()
    # labels of one text serve many latents, and one latent many labels
    of_one_text = model.generate(latents=z, condition=labels_of("V ARG0"), max_new_tokens=3, do_sample=False)
    assert torch.equal(of_one_text[0], greedy[0, :4])
    assert len(model.generate(latents=z[:1], condition=c, max_new_tokens=3, do_sample=False)) == 2
    # labels say nothing of what z is: BOS alone draws from the prior
    assert len(model.generate(condition=c, max_new_tokens=3, seed=1, do_sample=True)) == 2
    several = model.generate(texts(2, 3), condition=c, num_return_sequences=3, max_new_tokens=3, seed=0, do_sample=True)
    assert len(several) == 6
    again = model.generate(texts(2, 3), condition=c, reinfer_every=2, max_new_tokens=4, seed=0, do_sample=True)
    assert len(again) == 2


@pytest.mark.parametrize("inference", ["amortised", "gradient", "cooperative"])
def test_gradients_reach_labels(inference):
    model = conditional(inference=inference, inference_steps=2).train()
    input_ids, mask = padded(texts(3, 8), [8, 5, 3], "right")
    model(input_ids, mask, labels_of("V ARG0", "ARG1", "ARG0 V ARG1"), seed=0).loss.backward()
    used = model.annotations.labels.grad.abs().sum(1)
    assert (used > 0).all()
    assert (model.annotations.positions.grad[3:] == 0).all()


@torch.no_grad()
def test_figures_do_not_depend_on_batches():
    model = conditional()
    rows = annotated_rows()
    one, many = (evaluate(model, rows, batch_size=size, iw_samples=3) for size in (1, 5))
    assert one["conditional"]
    for name in ("elbo_nll_per_token", "iw_nll_per_token", "prior_nll_per_token"):
        assert one[name] == pytest.approx(many[name], rel=1e-5)
    parts = [continuation(model, rows, prompt_tokens=2, samples=3, batch_size=size) for size in (1, 5)]
    assert parts[0]["continuation_nll_per_token"] == pytest.approx(parts[1]["continuation_nll_per_token"], rel=1e-5)


def test_the_card_says_what_its_figures_are_of():
    model = conditional()
    card = model_card(model, "me/model", figures=check_figures(evaluate(model, annotated_rows(), iw_samples=2), model))
    assert "All figures are of p(x | c)" in card
    assert "annotations=[['ARG0']]" in card and "--labels 'ARG0'" in card


def annotated_rows():
    generator = torch.Generator().manual_seed(5)
    rows = Rows([texts(1, length, seed=length)[0] for length in (4, 9, 6, 7, 5, 8)])
    items = [
        {**rows[index], "annotations": torch.randint(0, 3, (index % 3 + 1,), generator=generator)} for index in range(6)
    ]

    class Items(Dataset):
        def __len__(self):
            return len(items)

        def __getitem__(self, index):
            return items[index]

    return Items()


@pytest.mark.parametrize(
    "condition, message",
    [
        (None, "this model is conditional"),
        ({"annotations": torch.zeros(3, 2, dtype=torch.long)}, "the labels of 3 texts do not fit 2"),
        ({"annotations": torch.full((2, 2), 3)}, "less than 3"),
        ({"annotations": torch.full((2, 2), -2)}, "at least -1"),
        ({"annotations": torch.zeros(2, 2)}, "whole numbers"),
        ({"annotations": "ARG0 V"}, "whole numbers"),
        ({"annotations": torch.zeros(2, 999, dtype=torch.long)}, "999 labels exceed"),
    ],
)
def test_labels_that_do_not_fit(condition, message):
    model = conditional()
    with pytest.raises(InputError, match=message):
        model(texts(2, 5), condition=condition)
    with pytest.raises(InputError, match=message):
        model.generate(texts(2, 3), condition=condition, max_new_tokens=2)


def test_a_model_without_annotations_takes_none():
    model = small_model("lang_vae")
    with pytest.raises(InputError, match="trained without annotations"):
        model(texts(2, 5), condition=labels_of("V", "V"))
    with pytest.raises(InputError, match="trained without annotations"):
        condition_of([["V"]], None)
    with pytest.raises(InputError, match="text 2 has the label 'X', which is none of ARG0, ARG1, V"):
        condition_of([["V"], ["X"]], LABELS)
    for wrong in ([], ["V ARG0"], [["V"], []]):
        with pytest.raises(InputError, match="a list of the labels of each text"):
            condition_of(wrong, LABELS)


@torch.no_grad()
def test_in_half_precision():
    model = conditional().to(torch.bfloat16)
    posterior = model.infer(texts(2, 5), None, labels_of("V ARG0", "ARG1"))
    assert posterior.mean.dtype == torch.float32 and bool(torch.isfinite(posterior.mean).all())


def test_texts_may_lack_labels_that_nobody_needs(tmp_path):
    (tmp_path / "a.txt").write_text("w3 w4 & V\nw5\na & b & c\n")
    documents = read_documents(tmp_path / "a.txt", annotated=Annotated(" & ", needed=False))
    assert [(d.text, d.annotations) for d in documents] == [("w3 w4", None), ("w5", None), ("a & b & c", None)]
    for name, content in (("b.tsv", "text\troles\nw3 w4\tV\n"), ("c.tsv", "text\nw3 w4\n")):
        (tmp_path / name).write_text(content)
        documents = read_documents(tmp_path / name, annotated=Annotated("roles", needed=False))
        assert [(d.text, d.annotations) for d in documents] == [("w3 w4", None)]


# ---- the encoder's tokens, made with the batch -----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("annotated", [False, True])
def test_tokens_made_with_the_batch_are_those_made_in_the_model(annotated, monkeypatch):
    model = conditional() if annotated else small_model("lang_vae")
    items = [annotated_rows()[index] for index in range(6)]
    items = items if annotated else [{k: v for k, v in item.items() if k != "annotations"} for item in items]
    batch = Collator(model.config.pad_token_id, model.beside_batch)(items)
    plain = Collator(model.config.pad_token_id)(items)
    assert {"encoder_input_ids", "encoder_attention_mask"} <= batch["condition"].keys()
    expected = model.infer(plain["input_ids"], plain["attention_mask"], plain.get("condition")).mean
    monkeypatch.setattr("latentlm.pretrained.texts_of", None)  # nothing is tokenised again
    found = model.infer(batch["input_ids"], batch["attention_mask"], batch["condition"]).mean
    assert torch.equal(found, expected)


def test_attention_pooling_learns_and_cannot_be_kept(tmp_path):
    model = small_model("lang_vae", pooling="attention").train()
    input_ids, mask = padded(texts(3, 8), [8, 5, 3], "right")
    model(input_ids, mask, seed=0).loss.backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in model.encoder.pooling.parameters())
    assert all(p.grad is None for p in model.text_encoder.parameters())
    with torch.no_grad():
        together = model.eval().infer(input_ids, mask).mean
        torch.testing.assert_close(model.infer(input_ids[2:, :3]).mean, together[2:])
    with pytest.raises(InputError, match="no pooled states can be kept"):
        model.keep_embeddings(tmp_path)


# ---- from the data ---------------------------------------------------------------------------------------------------

LINES = ["w3 w4 & ARG0 V", "w5 w6 w7 & ARG1 V ARG0", "w8 & V"]


def write_file(tmp_path, name):
    path = tmp_path / name
    records = [line.split(" & ") for line in LINES]
    if name.endswith(".txt"):
        path.write_text("\n".join(LINES))
    elif name.endswith(".jsonl"):
        path.write_text("\n".join(json.dumps({"text": text, "roles": labels.split()}) for text, labels in records))
    elif name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        columns = {"text": [text for text, _ in records], "roles": [labels for _, labels in records]}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    else:
        cut = "\t" if name.endswith(".tsv") else ","
        path.write_text("\n".join(cut.join(row) for row in [["text", "roles"], *records]))
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.tsv", "a.csv"])
def test_labels_are_read_beside_the_text(tmp_path, name):
    annotated = Annotated(" & " if name.endswith(".txt") else "roles")
    documents = list(read_documents(write_file(tmp_path, name), annotated=annotated))
    assert [(d.text, d.annotations) for d in documents] == [
        ("w3 w4", ("ARG0", "V")),
        ("w5 w6 w7", ("ARG1", "V", "ARG0")),
        ("w8", ("V",)),
    ]


def test_labels_by_number_of_column(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("1\tw3 w4\tARG0 V\n2\tw5\tV\n")
    documents = list(read_documents(path, column="2", annotated=Annotated("3")))
    assert [d.annotations for d in documents] == [("ARG0", "V"), ("V",)]
    whole = list(read_documents(path, column="2", annotated=Annotated("3", "text")))
    assert [d.annotations for d in whole] == [("ARG0 V",), ("V",)]


@pytest.mark.parametrize(
    "name, content, place, message",
    [
        ("a.txt", "w3 w4 & V\n", " & ", r"a\.txt line 1 has 1 labels for 2 words"),
        ("a.txt", "w3 & V\nw4 w5 & V V V\n", " & ", r"a\.txt line 2 has 3 labels for 2 words"),
        ("a.txt", "w3 & V\n\nw4\n", " & ", r"a\.txt line 3 is not of the form TEXT & LABELS"),
        ("a.txt", "w3 & V & V\n", " & ", r"a\.txt line 1 is not of the form"),
        ("a.txt", " & V\n", " & ", r"a\.txt line 1 is not of the form"),
        ("a.txt", "w3 & \n", " & ", r"a\.txt line 1"),
        ("a.txt", "w3 & V\n", "", "the place of the annotations is empty"),
        ("a.txt", "w3 w4\tV\n", "\t", r"a\.txt line 1 has 1 labels for 2 words"),
        ("a.tsv", "text\troles\nw3\tV\nw4\n", "roles", r"a\.tsv line 3 has no labels in 'roles'"),
        ("a.tsv", "text\troles\nw3\tV\n", "rolls", r"annotations="),
        ("a.tsv", "text\troles\nw3\tV\n", "2", "both by name, or both by number"),
        ("a.csv", "text,roles\nw3 w4,V\n", "roles", r"a\.csv line 2 has 1 labels for 2 words"),
        ("a.jsonl", '{"text": "w3"}\n', "roles", "has no column 'roles' of labels"),
        ("a.jsonl", '{"text": "w3", "roles": [1]}\n', "roles", "line 1 has no labels in 'roles'"),
        ("a.jsonl", '{"text": "w3", "roles": 7}\n', "roles", "line 1 has no labels in 'roles'"),
    ],
)
def test_annotations_that_do_not_line_up(tmp_path, name, content, place, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        list(read_documents(tmp_path / name, annotated=Annotated(place)))


def test_other_places_of_annotations(tmp_path):
    (tmp_path / "a.txt").write_text("w3 & V\n")
    for wrong in ({"annotated": Annotated(" & ", "token")}, {"annotated": Annotated(" & "), "sample_by": "paragraph"}):
        with pytest.raises(InputError):
            list(read_documents(tmp_path / "a.txt", **wrong))
    with pytest.raises(InputError, match="has no annotations"):
        read_documents("builtin:sentences", annotated=Annotated("x"))


def test_texts_that_are_cut_keep_as_many_labels(tmp_path):
    tokenizer = load_tokenizer(pretrained_part("gpt2"))
    documents = read_documents(write_file(tmp_path, "a.txt"), annotated=Annotated(" & "))
    data = Sentences(documents, tokenizer, max_length=2, labels=LABELS)
    assert data.truncated == 2
    assert [item["annotations"].tolist() for item in data] == [[0, 2], [1, 2], [2]]
    with pytest.raises(InputError, match="not annotated"):
        Sentences(read_documents("builtin:sentences", limit=3), tokenizer, labels=LABELS)


# ---- through recipes and the command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("annotated")
    generator = torch.Generator().manual_seed(0)
    lines = []
    for n in range(80):
        words = torch.randint(3, VOCABULARY, (n % 5 + 1,), generator=generator).tolist()
        roles = torch.randint(0, 3, (len(words),), generator=generator).tolist()
        lines.append(" ".join(f"w{w}" for w in words) + " & " + " ".join(LABELS[r] for r in roles))
    (folder / "texts.txt").write_text("\n".join(lines))
    train(recipe(folder), folder / "run")
    return folder


def recipe(folder, *overrides):
    text = f"""
model:
  family: lang_vae
  decoder_name: {pretrained_part("gpt2")}
  encoder_name: {pretrained_part("bert")}
  latent_size: 4
data: {{source: {folder / "texts.txt"}, unit: sentences, length: 8, annotations: ' & '}}
training: {{max_steps: 4, per_device_train_batch_size: 8, learning_rate: 1e-2, save_steps: 2, eval_strategy: steps,
  eval_steps: 2, report_to: none, use_cpu: true, logging_steps: 1}}
"""
    return parse_recipe(text, "roles.yaml", overrides)


def test_trained_evaluated_encoded_and_written(run_folder, tmp_path):
    model, tokenizer = load(run_folder / "run")
    assert model.config.annotation_labels == LABELS
    sequences = evaluation_sequences(run_folder / "run", tokenizer, 8, labels=model.config.annotation_labels)
    assert evaluate(model, sequences, iw_samples=2)["conditional"]
    with unchecked():
        source, folder = str(run_folder / "texts.txt"), str(run_folder / "run")
        status, out, err = run("evaluate", folder, "--data", source, "--iw-samples", "2", "--reconstructions", "4")
        assert status == 0 and "p(x | c)" in out, err
        status, _, err = run("encode", folder, "--data", source, "--output", str(tmp_path / "z.npz"))
        assert status == 0, err
        status, out, err = run("generate", folder, "--labels", "ARG0 V", "-n", "2", "--seed", "1")
        assert status == 0 and len(out.splitlines()) == 2, err
    assert len(write(model, tokenizer, ["w3"], [["V"]], do_sample=False, max_new_tokens=2)) == 1
    one = encode(model, tokenizer, ["w3 w4", "w5"], annotations=[["V", "ARG0"], ["V"]])
    other = encode(model, tokenizer, ["w3 w4", "w5"], annotations=[["ARG0", "V"], ["V"]], batch_size=1)
    assert (one.mean[0] != other.mean[0]).any()
    assert one.mean[1] == pytest.approx(other.mean[1], abs=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate"], "this model is conditional"),
        (["generate", "--labels", "NO"], "the label 'NO'"),
        (["encode", "--text", "w3"], "this model is conditional"),
        (["encode", "--text", "w3", "--text", "w4", "--text", "w5", "--labels", "V", "--labels", "V"], "do not fit 3"),
        (["encode", "--text", "w3 w4", "--labels", "V"], "has 1 labels for 2 words"),
        (["encode", "--data", "builtin:sentences", "--labels", "V"], "--labels are of --text"),
        (["generate", "--labels", ""], "no labels"),
        (["evaluate", "--prior-samples", "3"], "prior_samples is of models of p(x)"),
        (["evaluate", "--diversity", "3"], "diversity is of models of p(x)"),
    ],
)
def test_what_the_command_line_says(run_folder, tmp_path, arguments, message):
    verb, *rest = arguments
    output = ["--output", str(tmp_path / "z.npz")] if verb == "encode" else []
    with unchecked():
        status, _, err = run(verb, str(run_folder / "run"), *rest, *output)
    assert_one_sentence(status, err)
    assert message in err


def test_resumed_is_uninterrupted(run_folder, tmp_path):
    import shutil

    (tmp_path / "cut").mkdir()
    shutil.copytree(run_folder / "run" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    shutil.copy(run_folder / "run" / "recipe.yaml", tmp_path / "cut")
    resumed, *_ = train(recipe(run_folder), tmp_path / "cut", resume=True)
    whole, _ = load(run_folder / "run")
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.unit=blocks", "annotations are of sentences"),
        ("data.cache=x", "annotations are of sentences"),
        ("model.annotation_labels=[a]", "model.annotation_labels comes from the data"),
        ("model.annotation_size=-1", "annotation_size must not be negative"),
        ("data.annotations_per=token", "annotations_per"),
    ],
)
def test_what_a_recipe_says_wrong(run_folder, override, message):
    with pytest.raises(InputError, match=message):
        recipe(run_folder, override)


@pytest.mark.parametrize(
    "override", ["model.annotation_size=0", "model={family: autoregressive, hidden_size: 16, num_attention_heads: 2}"]
)
def test_models_without_a_condition_read_the_texts_alone(run_folder, tmp_path, override):
    said = []
    checked = recipe(run_folder, *([override] if "=0" in override else []))
    if "autoregressive" in override:
        text = yaml.safe_dump(
            {**checked.document, "model": {"family": "autoregressive", "hidden_size": 16, "num_attention_heads": 2}}
        )
        checked = parse_recipe(text, "control.yaml", [f"data.tokenizer={pretrained_part('gpt2')}"])
    _, corpus, _ = train(checked, tmp_path / "run", on_stage=said.append)
    assert any("labels of the texts are left out" in stage for stage in said)
    assert "annotations" not in corpus.train[0]
    model, tokenizer = load(tmp_path / "run")
    own = evaluation_sequences(tmp_path / "run", tokenizer, 8)
    (tmp_path / "plain.txt").write_text("w3 w4\nw5\n")
    assert len(evaluation_sequences(tmp_path / "run", tokenizer, 8, str(tmp_path / "plain.txt"))) == 2
    given = evaluation_sequences(tmp_path / "run", tokenizer, 8, str(run_folder / "texts.txt"))
    for data in (own, given):
        texts_of = tokenizer.batch_decode([item["input_ids"][1:].tolist() for item in data])
        assert not any("ARG" in text or "<pad>" in text for text in texts_of)
        assert not evaluate(model, data, iw_samples=1)["conditional"]


def test_a_file_is_cut_where_a_text_is_refused(run_folder, tmp_path):
    (tmp_path / "long.txt").write_text("w3 w4 & V V\n" + "w5 " * 30 + "& " + "V " * 30 + "\n")
    folder, output = str(run_folder / "run"), str(tmp_path / "z.npz")
    with unchecked():
        status, out, err = run("encode", folder, "--data", str(tmp_path / "long.txt"), "--output", output)
        assert status == 0 and "cut at 8 tokens: 1 of 2 texts" in out, err
        status, _, err = run("encode", folder, "--text", "w5 " * 30, "--labels", "V " * 30, "--output", output)
    assert_one_sentence(status, err)
    assert "text 0 has 31 tokens and the model's context is 8" in err
